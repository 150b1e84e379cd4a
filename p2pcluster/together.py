"""Stages that have several items in hand at once: whole batches, and the tasks of an `async def`.

Decided here: what becomes of an item when those beside it fail. A batch that fails is tried again item by item, so that only the culprit
fails; of a task that fails the others hear nothing. A process that has no such stage never imports this.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from p2pcluster import config
from p2pcluster.core import context as contexts
from p2pcluster.core.codec import Message
from p2pcluster.core.stages import DROP
from p2pcluster.errors import ValueRefused
from p2pcluster.values import DECODERS, check_value
from p2pcluster.runners import Ahead, ItemLost, Ports, Recalls, StageRunner, Work, error_of


REPORT_S = 0.002  # the end of a task waits this long for others to be reported with it


class BatchRunner(StageRunner):
    """Calls its function with a list. `in_hand` says to whoever finds this process dead which items were in it."""

    def __init__(self, stage: dict[str, Any], queues: dict[str, dict[str, Any]], function: Callable[[list[Any]], Any], is_generator: bool,
                 context: contexts.Context, position: memoryview, send: Callable[[Message], None], in_hand: memoryview) -> None:
        super().__init__(stage, queues, lambda value: function([value]), is_generator, context, position, send)
        self._special = None
        self._whole = function
        self._in_hand = in_hand

    def run(self, work: Work) -> None:
        if work.count == 1 or not self._has_run_whole(work):
            super().run(work)

    def _has_run_whole(self, work: Work) -> bool:
        """False when the items are to be tried one by one."""
        work.at = work.count - 1
        if work.limit < work.count and not self.recalls.may_run(work, work.at):
            return True
        context, position = self._context, self._position
        context.run, context.item_id = work.runs, work.ids[0]
        context.put_key = work.keys[0] if work.keys is not None else None
        context.delivery = 1 + work.deliveries.get(str(work.ids[0]), 0)
        room = min(work.count, len(self._in_hand))
        for at in range(room):
            self._in_hand[at] = work.ids[at]
        position[0], position[1] = work.number, work.ids[0]
        self._work, self._since_ns = work, time.monotonic_ns()
        try:
            self._report_whole(work, work.count, self._emitted(self._whole([self._decode(body) for body in work.bodies()])))
        except ItemLost:
            self._ahead = None
            self._send(Message("lost", {"work": work.number, "count": work.count}))
        except BaseException as error:  # whichever item it is, it says so again when it runs alone
            self._has_raised(error)
            self._ahead = None
            self._send(Message("divided", {"work": work.number}))
            return False
        finally:
            position[1] = 0
            for at in range(room):
                self._in_hand[at] = 0
            context.put_key, context.delivery = None, 1
        return True

    def _emitted(self, returned: Any) -> list[tuple[int, bytes]]:
        return self._collected(values_of_batch(returned, bool(self._ports.encoders)))


def values_of_batch(returned: Any, has_outputs: bool) -> Iterable[Any]:
    """What a batch's function emits. Raises `ValueRefused` when that is no list of values."""
    if returned is DROP or (returned is None and not has_outputs):
        return []
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping):
        raise ValueRefused(f"a batch's function returned {type(returned).__name__}: return a list of what is to be emitted, or yield it")
    return returned


class _AheadOfTask(Ahead):
    """The same, waited for in a loop."""

    def __init__(self, item_id: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(item_id)
        self._loop = loop
        self._has_changed = asyncio.Event()

    def on_ack(self, is_kept: bool) -> None:
        super().on_ack(is_kept)
        self._loop.call_soon_threadsafe(self._has_changed.set)

    async def room(self) -> None:
        while not self.has_room:
            self._has_changed.clear()
            if not self.has_room:
                await self._has_changed.wait()


class TaskRunner:
    """Runs an `async def` with several items or batches in hand, each a piece of work of its own and a task with a context of its own."""

    waits_for_parts = True

    def __init__(self, stage: dict[str, Any], queues: dict[str, dict[str, Any]], function: Callable[[Any], Any], is_generator: bool,
                 context: contexts.Context, position: memoryview, send: Callable[..., None], in_hand: memoryview,
                 loop: asyncio.AbstractEventLoop) -> None:
        self.recalls = Recalls()
        self.tasks: set[asyncio.Task[None]] = set()
        self._function = function
        self._is_generator = is_generator
        self._is_batch = stage["batch"] is not None
        self._context = context
        self._position = position
        self._send = send
        self._in_hand = in_hand
        self._free = list(range(len(in_hand)))
        self._loop = loop
        self._decode = DECODERS[queues[stage["reads"]]["codec"]]
        self._ports = Ports(stage, queues)
        self._timeout_s: float | None = stage["timeout_s"]
        self._ahead: dict[int, _AheadOfTask] = {}
        self._running: dict[int, None] = {}
        self._reports: list[Message] = []

    async def serve(self, inbox: queue.SimpleQueue[Message], works: dict[int, Work]) -> None:
        """Run what comes, until told to stop, which is when nothing is in hand."""
        stopped = asyncio.Event()

        def hear(message: Message) -> None:
            if message.kind == "stop":
                stopped.set()
            else:
                self.begin(works.pop(message.fields["work"]))

        def carry() -> None:
            kind = ""
            while kind != "stop":
                message = inbox.get()
                kind = message.kind
                self._loop.call_soon_threadsafe(hear, message)

        threading.Thread(target=carry, daemon=True).start()
        await stopped.wait()
        self._send_reports()

    def begin(self, work: Work) -> None:
        """Make `work` a task, unless it was recalled."""
        work.at = work.count - 1
        if work.limit < work.count and not self.recalls.may_run(work, work.at):
            return
        task = self._loop.create_task(self._run(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def report(self) -> None:
        """Each task reports at its end."""

    def say(self, message: Message) -> None:
        """Soon, together with what others have to report meanwhile: the node writes it with one commit. At once where nothing else runs."""
        self._reports.append(message)
        if len(self._running) < 2:
            self._send_reports()
        elif len(self._reports) == 1:
            self._loop.call_later(REPORT_S, self._send_reports)

    def _send_reports(self) -> None:
        reports, self._reports = self._reports, []
        if reports:
            self._send(*reports)

    def on_part_ack(self, item_id: int, is_kept: bool) -> None:
        """A part is in the log, or was refused. For any thread."""
        ahead = self._ahead.get(item_id)
        if ahead is not None:
            ahead.on_ack(is_kept)

    async def _run(self, work: Work) -> None:
        bodies = work.bodies()
        if work.count > 1 and await self._has_run_whole(work, bodies):
            return
        for at, body in enumerate(bodies):
            with self._holding([work.ids[at]]), contexts.active(self._context_of(work, at)):
                await self._run_one(work, work.ids[at], body)

    def _context_of(self, work: Work, at: int) -> contexts.Context:
        context = copy.copy(self._context)
        context.run, context.item_id = work.runs, work.ids[at]
        context.put_key = work.keys[at] if work.keys is not None else None
        context.delivery = 1 + work.deliveries.get(str(work.ids[at]), 0)
        return context

    @contextmanager
    def _holding(self, ids: list[int]) -> Iterator[None]:
        """Say in the position file what is in hand."""
        self._running.update(dict.fromkeys(ids))
        room = [self._free.pop() for _ in range(min(len(ids), len(self._free)))]
        for slot, item_id in zip(room, ids, strict=False):
            self._in_hand[slot] = item_id
        self._position[1] = next(iter(self._running))
        try:
            yield
        finally:
            for item_id in ids:
                del self._running[item_id]
            for slot in room:
                self._in_hand[slot] = 0
            self._free += room
            self._position[1] = next(iter(self._running), 0)

    async def _has_run_whole(self, work: Work, bodies: list[bytes]) -> bool:
        """False when the items of a batch are to be tried one by one."""
        since_ns = time.monotonic_ns()
        with self._holding(work.ids), contexts.active(self._context_of(work, 0)):
            try:
                emitted = await self._emitted_in_time(work, work.ids[0], [self._decode(body) for body in bodies])
                self._report(work, work.count, work.ids[0], emitted, (time.monotonic_ns() - since_ns) / 1000)
            except ItemLost:
                self.say(Message("lost", {"work": work.number, "count": work.count}))
            except BaseException:  # whichever item it is, it says so again when it runs alone
                self.say(Message("divided", {"work": work.number}))
                return False
            finally:
                self._ahead.pop(work.ids[0], None)
        return True

    async def _run_one(self, work: Work, item_id: int, body: bytes) -> None:
        since_ns = time.monotonic_ns()
        try:
            value = self._decode(body)
            emitted = await self._emitted_in_time(work, item_id, [value] if self._is_batch else value)
            self._report(work, 1, item_id, emitted, (time.monotonic_ns() - since_ns) / 1000)
        except ItemLost:
            self.say(Message("lost", {"work": work.number, "count": 1}))
        except BaseException as error:  # whatever it raises is this item's failure
            self.failed(work, item_id, error, (time.monotonic_ns() - since_ns) / 1000)
        finally:
            self._ahead.pop(item_id, None)

    async def _emitted_in_time(self, work: Work, item_id: int, argument: Any) -> list[tuple[int, bytes]]:
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await self._emitted(work, item_id, argument)
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"it ran longer than its timeout_s={self._timeout_s:g}") from error
            raise

    async def _values(self, argument: Any) -> AsyncIterator[Any]:
        returned = self._function(argument)
        if self._is_generator:
            async for value in returned:
                yield value
        elif self._is_batch:
            for value in values_of_batch(await returned, bool(self._ports.encoders)):
                yield value
        else:
            yield await returned

    async def _emitted(self, work: Work, item_id: int, argument: Any) -> list[tuple[int, bytes]]:
        bodies: list[tuple[int, bytes]] = []
        size = 0
        async for value in self._values(argument):
            if value is DROP:
                continue
            found = self._ports.encode_each(value)
            bodies += found
            size += sum(len(body) for _, body in found)
            if size > config.OUTPUT_PART_BYTES or len(bodies) >= config.OUTPUT_PART_ITEMS:
                await self._send_ahead(work, item_id, bodies)
                bodies, size = [], 0
        return bodies

    async def _send_ahead(self, work: Work, item_id: int, bodies: list[tuple[int, bytes]]) -> None:
        ahead = self._ahead.setdefault(item_id, _AheadOfTask(item_id, self._loop))
        if self.waits_for_parts:
            await ahead.room()
        self._send_reports()
        self._send(self._ports.part(work.number, ahead.sent, bodies))
        ahead.sent += 1

    def _report(self, work: Work, count: int, item_id: int, bodies: list[tuple[int, bytes]], elapsed_us: float) -> None:
        ahead = self._ahead.get(item_id)
        fields: dict[str, Any] = {"work": work.number, "count": count, "elapsed_us": elapsed_us}
        if ahead is None and count == 1:
            fields["ports"], blobs = self._ports.pack([bodies])
            if any(b"__main__" in blob for blob in blobs):
                for _, body in bodies:
                    check_value(body)
        else:
            fields["ports"], blobs = self._ports.pack_together(bodies)
            if bodies or ahead is not None:
                fields |= {"whole": True, "parts": ahead.sent if ahead is not None else 0}
        self.say(Message("done", fields, tuple(blobs)))

    def failed(self, work: Work, item_id: int, error: BaseException, elapsed_us: float) -> None:
        """The function raised for this item alone."""
        self.say(Message("failed", {"work": work.number, "elapsed_us": elapsed_us, "error": error_of(error)}))
