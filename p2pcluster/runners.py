"""A stage's function over the items that come, and a source's over what it emits: what is reported of them, in which order, and when.

This is the only code of the package that unpickles an item or calls a function of the user's. It knows no socket: what it has to say it gives
to a `send`, what it is told comes by methods. What a report means is `core.executor`'s affair.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from p2pcluster import config
from p2pcluster.core import context as contexts
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.commands import lengths_blob, lengths_of
from p2pcluster.core.pacing import burst_of, interval_ns_of
from p2pcluster.core.stages import DROP, At, Stage, To, entered, entered_async, needs_loop
from p2pcluster.errors import ValueRefused
from p2pcluster.values import DECODERS, ENCODERS, as_refusal, check_value

if TYPE_CHECKING:
    import asyncio


_STRIDE_MAX = 16  # items between two looks at the clock
_LARGE_BYTES = 4096  # values above this are counted towards a batch's bytes; `WORK_ITEMS_MAX` of those below it fit anyway
REPORT_INTERVAL_NS = 10_000_000  # results of a piece of work that takes longer than it was cut for go ahead after this
_SPECIAL = frozenset({type(DROP), To, At})
TICK_BYTES_MAX = 2 * config.VALUE_BYTES_MAX  # of what one tick emits: it travels in one message too
_NOTHING = object()
_ENDED = object()


def error_of(error: BaseException) -> dict[str, Any]:
    """An exception as text: nothing of the user's is unpickled by whoever reads it."""
    try:
        said = " ".join(str(error).splitlines())  # one line; the traceback has it as it was
    except Exception:  # the user's __str__ may do anything; the type is still worth telling
        said = "(its text cannot be made)"
    name = type(error).__name__
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception:
        trace = None
    return {"type": name, "text": (f"{name}: {said}" if said else name)[:2000], "traceback": trace and trace[-20_000:]}


# ---- a stage's function over items


class Work:
    """A piece of work as the node sent it. `at` is the item that runs; nothing from `limit` on begins. See `Recalls`."""

    __slots__ = ("at", "closed", "count", "deliveries", "ids", "keys", "limit", "number", "runs", "slices")

    def __init__(self, message: Message) -> None:
        fields = message.fields
        self.number = fields["work"]
        self.slices = [(message.blobs[2 * n], message.blobs[2 * n + 1]) for n in range(len(fields["slices"]))]
        self.ids: list[int] = []
        self.keys: list[str | None] | None = None
        self.runs = fields["slices"][0][2]
        for lo, hi, _, keys in fields["slices"]:
            if keys is not None and self.keys is None:
                self.keys = [None] * len(self.ids)
            if self.keys is not None:
                self.keys += keys if keys is not None else [None] * (hi - lo)
            self.ids += range(lo, hi)
        self.deliveries: dict[str, int] = fields["deliveries"]
        self.count = self.limit = len(self.ids)
        self.at = -1
        self.closed = False

    def bodies(self) -> list[bytes]:
        """Each item's bytes."""
        found: list[bytes] = []
        for lengths, body in self.slices:
            data, sizes = bytes(body), lengths_of(lengths)
            found += [data[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        return found


class Recalls:
    """Giving back what has not begun, while it runs: the reader lowers `limit`, the runner announces `at` before it looks at it.

    Each writes its own and then reads the other's, so one of them sees the other (Dekker's idea, under one lock for the rare
    case that both meet).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def may_run(self, work: Work, at: int) -> bool:
        """For the runner, once it sees `at >= limit`: whether the item runs all the same."""
        with self._lock:
            if at < work.limit:
                return True
            work.closed = True
            return False

    def recall(self, work: Work, say: Callable[[int], None]) -> None:
        """For the reader: find how many items of the work stay with the runner, and say it.

        It is said under the lock, hence before the runner can leave the work and report on the next one.
        """
        with self._lock:
            while not work.closed:
                kept = min(work.at + 1, work.count)
                work.limit = kept
                if min(work.at + 1, work.count) == kept:
                    break
            say(work.limit)


class ItemLost(Exception):
    """What the item emitted was refused, because it is somebody else's by now: whoever has it runs it again."""


class Ahead:
    """The parts of what an item emits that go ahead of its report, which several answers may be out for. For any thread."""

    def __init__(self, item_id: int | None) -> None:
        self.item_id = item_id
        self.sent = 0
        self._answered = 0
        self._is_lost = False
        self._lock = threading.Condition()

    def on_ack(self, is_kept: bool) -> None:
        with self._lock:
            self._answered += 1
            self._is_lost = self._is_lost or not is_kept
            self._lock.notify_all()

    @property
    def has_room(self) -> bool:
        """Whether one more may go. Raises `ItemLost`."""
        if self._is_lost:
            raise ItemLost
        return self.sent - self._answered < config.PARTS_IN_FLIGHT

    def wait_for_room(self) -> None:
        with self._lock:
            while not self.has_room:
                self._lock.wait()


class StageRunner:
    """Runs one stage: work in, reports out. The function is any callable of one value.

    `waits_for_parts`: whether parts of what an item emits go ahead only as fast as they are taken in.
    """

    waits_for_parts = True

    def __init__(self, stage: dict[str, Any], queues: dict[str, dict[str, Any]], function: Callable[[Any], Any], is_generator: bool,
                 context: contexts.Context, position: memoryview, send: Callable[[Message], None]) -> None:
        self._function = function
        self._is_generator = is_generator
        self._context = context
        self._position = position
        self._send = send
        self._decode = DECODERS[queues[stage["reads"]]["codec"]]
        self._ports = Ports(stage, queues)
        self._encode = self._ports.encoders[0] if self._ports.encoders else _no_value
        # None: every call's result needs a look, because it emits what it yields, or in more than one form
        self._special = None if is_generator or self._ports.has_forms else _SPECIAL
        self._ahead: Ahead | None = None
        self._lock = threading.Lock()
        self._results: list[Any] = []
        self._large_bytes = 0
        self._work: Work | None = None
        self._since_ns = 0
        self.recalls = Recalls()

    def run(self, work: Work) -> None:
        """Every item of `work`, in order, up to where it was recalled."""
        context, position, results = self._context, self._position, self._results
        call, decode_value, encode_value = self._function, self._decode, self._encode
        pace, special = _Pace(REPORT_INTERVAL_NS), self._special
        context.run = work.runs
        position[0] = work.number
        self._work, self._since_ns = work, time.monotonic_ns()
        look_at = 0
        ids, keys, deliveries = work.ids, work.keys, work.deliveries
        for at, body in enumerate(work.bodies()):
            work.at = at
            if at >= work.limit and not self.recalls.may_run(work, at):
                break
            position[1] = context.item_id = ids[at]
            if keys is not None:
                context.put_key = keys[at]
            if deliveries:
                context.delivery = 1 + deliveries.get(str(ids[at]), 0)
            returned: Any = _NOTHING
            try:
                returned = call(decode_value(body))
                if special is None or type(returned) in special:
                    emitted = self._emitted(returned)
                    if self._ahead is None:
                        results.append(emitted)
                    else:
                        self._report_whole(work, 1, emitted)
                else:
                    encoded = encode_value(returned)
                    if len(encoded) > _LARGE_BYTES:
                        check_value(encoded)
                        self._large_bytes += len(encoded)
                    results.append(encoded)
            except BaseException as error:  # whatever it raises is this item's failure; only a signal ends the process
                self._has_raised(error)
                self.report()
                self._ahead = None
                self._report_failure(work, error if returned is _NOTHING or self._special is None else as_refusal(returned, error))
            if at >= look_at or self._large_bytes > config.WORK_BYTES_MAX:
                look_at = at + pace.look()
                if pace.is_due or self._large_bytes > config.WORK_BYTES_MAX:
                    self.report()
        position[1] = 0
        context.put_key, context.delivery = None, 1
        self.report()

    def _has_raised(self, error: BaseException) -> None:
        """For whoever runs a function elsewhere than in a process of its own."""

    def _emitted(self, returned: Any) -> list[tuple[int, bytes]]:
        """What a call emits that is not simply one value."""
        if self._is_generator:
            return self._collected(returned)
        return [] if returned is DROP else self._ports.encode_each(returned)

    def _collected(self, yielded: Any) -> list[tuple[int, bytes]]:
        """What is emitted value by value, less what goes ahead because it is too much for one message."""
        bodies: list[tuple[int, bytes]] = []
        size = 0
        encode_value, is_plain = self._encode, len(self._ports.encoders) == 1
        for value in yielded:
            if is_plain and type(value) not in _SPECIAL:
                try:
                    body = encode_value(value)
                except Exception as error:
                    raise as_refusal(value, error) from error
                if len(body) > _LARGE_BYTES:
                    check_value(body)
                bodies.append((0, body))
                size += len(body)
            elif value is not DROP:
                found = self._ports.encode_each(value)
                bodies += found
                size += sum(len(body) for _, body in found)
            if size > config.OUTPUT_PART_BYTES or len(bodies) >= config.OUTPUT_PART_ITEMS:
                self._send_ahead(bodies)
                bodies, size = [], 0
        self._large_bytes += size
        return bodies

    def _send_ahead(self, bodies: list[tuple[int, bytes]]) -> None:
        assert self._work is not None, "an item runs"
        if self._ahead is None:
            self.report()  # reports are in the items' order
            self._ahead = Ahead(self._context.item_id)
        if self.waits_for_parts:
            self._ahead.wait_for_room()
        self._send(self._ports.part(self._work.number, self._ahead.sent, bodies))
        self._ahead.sent += 1

    def on_part_ack(self, item_id: int, is_kept: bool) -> None:
        """A part is in the log, or was refused. For any thread."""
        ahead = self._ahead
        if ahead is not None and ahead.item_id == item_id:
            ahead.on_ack(is_kept)

    def _report_whole(self, work: Work, count: int, bodies: list[tuple[int, bytes]]) -> None:
        """What cannot be told apart: the rest of what went ahead in parts, or what a batch emitted."""
        ports, blobs = self._ports.pack_together(bodies)
        now_ns = time.monotonic_ns()
        elapsed_us, self._since_ns = (now_ns - self._since_ns) / 1000, now_ns
        fields = {"work": work.number, "count": count, "elapsed_us": elapsed_us, "ports": ports}
        if bodies or self._ahead is not None:
            fields |= {"whole": True, "parts": self._ahead.sent if self._ahead is not None else 0}
        self._ahead = None
        self._send(Message("done", fields, tuple(blobs)))

    def report(self) -> None:
        """Tell the node what is finished so far. For any thread."""
        with self._lock:
            count = len(self._results)
            if not count or self._work is None:
                return
            results = self._results[:count]
            del self._results[:count]
            self._large_bytes = 0
            now_ns = time.monotonic_ns()
            elapsed_us, self._since_ns = (now_ns - self._since_ns) / 1000, now_ns
            self._send_results(self._work.number, results, elapsed_us / count)

    def _send_results(self, number: int, results: list[Any], item_us: float) -> None:
        ports, blobs = self._ports.pack(results)
        refused = first_refused(results) if any(b"__main__" in blob for blob in blobs) else None
        if refused is None:
            self._send(Message("done", {"work": number, "count": len(results), "elapsed_us": item_us * len(results), "ports": ports},
                               tuple(blobs)))
            return
        at, error = refused
        if at:
            self._send_results(number, results[:at], item_us)
        self._send(Message("failed", {"work": number, "elapsed_us": item_us, "error": error_of(error)}))
        if at + 1 < len(results):
            self._send_results(number, results[at + 1 :], item_us)

    def _report_failure(self, work: Work, error: BaseException) -> None:
        now_ns = time.monotonic_ns()
        elapsed_us, self._since_ns = (now_ns - self._since_ns) / 1000, now_ns
        if isinstance(error, ItemLost):
            self._send(Message("lost", {"work": work.number, "count": 1}))
            return
        self._send(Message("failed", {"work": work.number, "elapsed_us": elapsed_us, "error": error_of(error)}))


def _no_value(value: Any) -> bytes:
    return b""


def first_refused(results: list[Any]) -> tuple[int, ValueRefused] | None:
    """Which of the results first holds a value that cannot be put. They are looked at singly only where the look at all together, which
    costs much less, has found something."""
    for at, result in enumerate(results):
        try:
            for body in _bodies_of(result):
                check_value(body)
        except ValueRefused as error:
            return at, error
    return None


def _bodies_of(result: Any) -> list[bytes]:
    """The bytes of a result: of one value, or of a list of (port, bytes)."""
    return [result] if type(result) is bytes else [body for _, body in result]


class _Pace:
    """When to look at the clock again: not at every item of a fast function, for which the look would cost as much as the work."""

    __slots__ = ("_interval_ns", "_last_ns", "_stride", "is_due", "since_ns")

    def __init__(self, interval_ns: int) -> None:
        self._interval_ns = interval_ns
        self._last_ns = self.since_ns = time.monotonic_ns()
        self._stride = 1
        self.is_due = False

    def begin(self) -> None:
        """The interval begins now: what was waited for does not count."""
        self.since_ns = time.monotonic_ns()

    def look(self) -> int:
        """How many items to run before the next look. `is_due` afterwards: whether the interval is over; it then begins anew."""
        now_ns = time.monotonic_ns()
        spent_ns, self._last_ns = now_ns - self._last_ns, now_ns
        self._stride = min(2 * self._stride, _STRIDE_MAX) if spent_ns < self._interval_ns // 16 else 1
        self.is_due = now_ns - self.since_ns > self._interval_ns
        if self.is_due:
            self.since_ns = now_ns
        return self._stride


class Ports:
    """Where values leave, and how they become bytes."""

    def __init__(self, stage: dict[str, Any], queues: dict[str, dict[str, Any]]) -> None:
        self.labels: dict[str | None, list[int]] = {}
        for number, port in enumerate(stage["ports"]):  # of one label there are several where its queues differ in their codec
            self.labels.setdefault(port["label"], []).append(number)
        self.has_forms = any(len(numbers) > 1 for numbers in self.labels.values())
        self._first = next(iter(self.labels.values()), [])
        self._name = stage["name"]
        self.encoders = [ENCODERS[queues[port["queues"][0]]["codec"]] for port in stage["ports"]]

    def encode_each(self, value: Any) -> list[tuple[int, bytes]]:
        """The numbers of the ports that a value takes, with its bytes for each."""
        numbers = self._first
        if isinstance(value, To):
            found = self.labels.get(value.label)
            if found is None:
                raise ValueRefused(f"stage {self._name!r} has no route {value.label!r}; it has {', '.join(map(repr, self.labels))}")
            numbers, value = found, value.value
        return [(number, self._encode(number, value)) for number in numbers]

    def _encode(self, number: int, value: Any) -> bytes:
        try:
            body = self.encoders[number](value)
        except Exception as error:
            raise as_refusal(value, error) from error
        check_value(body)
        return body

    def pack_together(self, bodies: list[tuple[int, bytes]]) -> tuple[list[dict[str, Any]], list[Buffer]]:
        """The ports and blobs of values that are not told apart by their inputs. Raises `ValueRefused`."""
        ports: list[dict[str, Any]] = []
        blobs: list[Buffer] = []
        for number in range(len(self.encoders)):
            found = [body for port, body in bodies if port == number]
            if not found:
                continue
            ports.append({"port": number})
            blobs += [lengths_blob(map(len, found)), b"".join(found)]
            if b"__main__" in blobs[-1]:
                for body in found:
                    check_value(body)
        return ports, blobs

    def part(self, work: int, number: int, bodies: list[tuple[int, bytes]]) -> Message:
        """The message for some of what an item emits."""
        ports, blobs = self.pack_together(bodies)
        return Message("part", {"work": work, "part": number, "ports": ports}, tuple(blobs))

    def pack(self, results: list[Any]) -> tuple[list[dict[str, Any]], list[Buffer]]:
        """The ports and blobs of a report: one entry of `results` for each input."""
        if not self.encoders:
            return [], []
        if all(type(result) is bytes for result in results):
            return [{"port": 0}], [lengths_blob(map(len, results)), b"".join(results)]
        ports: list[dict[str, Any]] = []
        blobs: list[Buffer] = []
        spread = [[(0, r)] if type(r) is bytes else r for r in results]
        for port in range(len(self.encoders)):
            bodies = [[body for number, body in result if number == port] for result in spread]
            counts = array("I", map(len, bodies))
            if any(counts):
                flat = [body for group in bodies for body in group]
                ports.append({"port": port, "counts": True})
                blobs += [lengths_blob(map(len, flat)), b"".join(flat), lengths_blob(counts)]
        return ports, blobs


# ---- a source


class SourceRunner:
    """Runs one shard of a source: calls or iterates the user's function and puts what it emits, in numbered batches."""

    def __init__(self, stage: dict[str, Any], queues: dict[str, dict[str, Any]], make: Callable[[dict[str, Any]], Any],
                 is_generator: bool, send: Callable[[Message], None]) -> None:
        self._stage = stage
        self._make = make
        self._is_generator = is_generator
        self._send = send
        self._ports = Ports(stage, queues)
        sizes = [queues[name]["maxsize"] for port in stage["ports"] for name in port["queues"]]
        self._batch_max = max(1, min([config.WORK_ITEMS_MAX, *[size // 8 for size in sizes if size is not None]]))
        self._in_flight_max = config.SOURCE_BATCHES_IN_FLIGHT
        if stage["rate"] is not None:  # what is on its way when the node stops is taken in all the same: no more than one burst
            self._batch_max, self._in_flight_max = min(self._batch_max, burst_of(interval_ns_of(stage["rate"]))), 1
        self._lock = threading.Condition()
        self._buffer: list[Any] = []  # of each value its bytes, for the first port, or a list of (port, bytes)
        self._large_bytes = 0
        self._is_plain = len(stage["ports"]) == 1 and not stage["resumable"]
        self._cursor: bytes | None = None
        self._count = 0
        self._hash = sha256()
        self._seq = self._acked = 0
        self._stop = self._paused = self._is_spent = False
        self._flushed_ns = 0
        self._awake = threading.Event()
        self._is_asleep = False

    def on_ack(self, seq: int) -> None:
        with self._lock:
            self._acked = max(self._acked, seq)
            self._lock.notify_all()

    def on_stop(self) -> None:
        with self._lock:
            self._stop = True
            self._lock.notify_all()

    def on_pause(self, paused: bool) -> None:
        """The function is called no more, or again. What it has given is put all the same."""
        with self._lock:
            self._paused = paused
            self._is_asleep = True  # what the source's thread looks at after each value
            self._lock.notify_all()

    def values(self, shard: int) -> Iterator[Any]:
        """What one shard emits, from its start, as the user's function gives it."""
        return self._values(self._arguments(shard, None))

    def _arguments(self, shard: int, cursor: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"cursor": cursor} if self._stage["resumable"] else {}
        if self._stage["sharded"]:
            arguments |= {"shard": shard, "shards": int(self._stage["processes"])}
        return arguments

    def put_values(self, values: list[Any], finished: bool) -> None:
        """Put these values as one batch."""
        self._put([self._ports.encode_each(value) for value in values if value is not DROP], finished)

    def run(self, begin: Message) -> None:
        """To the source's end. Raises what the user's code raises, after what it emitted before was put."""
        fields = begin.fields
        self._seq = self._acked = fields["seq"]
        self._count = fields["count"]
        threading.Thread(target=self._flush_late, daemon=True).start()
        arguments = self._arguments(fields["shard"], pickle.loads(begin.blobs[0]) if begin.blobs else None)
        try:
            ended = self._wait_while_paused() and self._emit_all(arguments, fields["count"], fields["hash"])
        except BaseException:
            with self._lock:
                self._flush(wait=True)
            raise
        with self._lock:
            self._flush(wait=True)
            if ended and not self._stop:
                self._put([], finished=True)
            if self._is_spent:
                self._make_way()
                return
            while not self._stop:
                self._lock.wait()

    def _emit_all(self, arguments: dict[str, Any], count: int, digest: str) -> bool:
        """Whether the source ended by itself."""
        values = self._values(arguments)
        if self._is_generator and not self._stage["resumable"] and count:
            found = self._skip(values, count)
            if found is None:
                self._send(Message("shorter", {}))
                return False
            if found != digest:
                self._send(Message("changed", {}))
                self._count, self._hash = 0, sha256()
                values = self._values(arguments)
        if self._stage["max_items"] is not None:
            values = self._up_to_max(values)
        self._emit_plainly(values) if self._is_plain else self._emit_each(values)
        return not self._stop and not self._is_spent

    def _up_to_max(self, values: Iterator[Any]) -> Iterator[Any]:
        count = 0
        for count, value in enumerate(itertools.islice(values, self._stage["max_items"]), 1):
            yield value
        self._is_spent = count == self._stage["max_items"]

    def _make_way(self) -> None:
        """This process emitted as much as it may. It goes when all of it is in the log: a function would not give it again."""
        while self._acked < self._seq and not self._stop:
            self._lock.wait()
        self._send(Message("spent", {}))

    def _emit_plainly(self, values: Iterator[Any]) -> None:
        """The short way of `_emit_each` for a source with one way out and no cursor; most are."""
        buffer, encode_value, batch_max = self._buffer, self._ports.encoders[0], self._batch_max
        pace = _Pace(int(1e9 * config.SOURCE_FLUSH_S))
        look_at = at = 0
        for value in values:
            at += 1
            if type(value) in _SPECIAL:
                self._emit(value)
            else:
                try:
                    body = encode_value(value)
                except Exception as error:
                    raise as_refusal(value, error) from error
                if len(body) > _LARGE_BYTES:
                    check_value(body)
                    self._large_bytes += len(body)
                buffer.append(body)
            if self._is_asleep and not self._attend():
                return
            if at >= look_at or len(buffer) >= batch_max or self._large_bytes >= config.WORK_BYTES_MAX:
                look_at = at + pace.look()
                full = len(buffer) >= batch_max or self._large_bytes >= config.WORK_BYTES_MAX
                if full or pace.is_due:
                    with self._lock:
                        self._flush(wait=full)
                    pace.begin()
                if self._stop:
                    return

    def _emit_each(self, values: Iterator[Any]) -> None:
        for value in values:
            self._emit(value)
            self._flush_now()
            if self._stop or (self._is_asleep and not self._attend()):
                return

    def _values(self, arguments: dict[str, Any]) -> Iterator[Any]:
        if self._is_generator:
            return iter(self._make(arguments))
        return _calls(lambda: self._make(arguments))

    def _skip(self, values: Iterator[Any], count: int) -> str | None:
        """Pass over what was put before; its hash, or None when there is less than that."""
        left = count
        while left:
            value = next(values, _calls)
            if value is _calls:
                return None
            if value is not DROP:
                self._hash.update(b"".join(body for _, body in self._ports.encode_each(value)))
                left -= 1
        return self._hash.hexdigest()

    def _emit(self, value: Any) -> None:
        cursor: bytes | None = None
        if isinstance(value, At):
            value, cursor = value.value, ENCODERS["pickle"](value.cursor)
        elif self._stage["resumable"] and value is not DROP:
            raise ValueRefused(f"source {self._stage['name']!r} takes a cursor and yielded a value without one: yield At(value, cursor)")
        with self._lock:
            if value is not DROP:
                self._buffer.append(self._ports.encode_each(value))
                self._large_bytes += sum(len(body) for _, body in self._buffer[-1])
            self._cursor = cursor if cursor is not None else self._cursor

    def _flush_now(self) -> None:
        """Put what has come together, if it is time to: when it is enough, or when something waited for `SOURCE_FLUSH_S`."""
        full = len(self._buffer) >= self._batch_max or self._large_bytes >= config.WORK_BYTES_MAX
        now_ns = time.monotonic_ns()
        if full or now_ns - self._flushed_ns > 1e9 * config.SOURCE_FLUSH_S:
            self._flushed_ns = now_ns
            with self._lock:
                self._flush(wait=full)

    def _flush(self, wait: bool, count: int | None = None) -> None:
        """Put what has come together, or the first `count` values. With all batches in flight it goes on growing, or waits when it must.

        A source that is told to stop puts the rest all the same: a function would not give it again.
        """
        while self._seq - self._acked >= self._in_flight_max and not self._stop:
            if not wait:
                return
            self._lock.wait()
        count = len(self._buffer) if count is None else min(count, len(self._buffer))
        if count or self._cursor is not None:
            taken = self._buffer[:count]
            del self._buffer[:count]  # in place, and no more than was taken: the source may go on appending meanwhile
            self._large_bytes = 0
            self._put(taken, finished=False)

    def _pack(self, taken: list[Any]) -> tuple[list[dict[str, Any]], list[Buffer]]:
        ports: list[dict[str, Any]] = []
        blobs: list[Buffer] = []
        for port, bodies in self._by_port(taken).items():
            ports.append({"port": port})
            blobs += [lengths_blob(map(len, bodies)), b"".join(bodies)]
        return ports, blobs

    def _put(self, taken: list[Any], finished: bool, tick_ms: int | None = None) -> None:
        ports, blobs = self._pack(taken)
        refused = first_refused(taken) if any(b"__main__" in blob for blob in blobs) else None
        if refused is not None:
            if refused[0]:
                self._put(taken[: refused[0]], finished=False)
            raise refused[1]
        self._seq += 1
        source: dict[str, Any] = {"finished": finished}
        self._count += len(taken)
        source["count"] = self._count
        if tick_ms is not None:
            source["tick_ms"] = tick_ms
        elif self._is_generator and not self._stage["resumable"]:
            one_way = self._is_plain and len(blobs) == 2  # then the bytes stand in the blob as they were emitted
            self._hash.update(blobs[1] if one_way else b"".join(body for value in taken for body in _bodies_of(value)))
            source["hash"] = self._hash.hexdigest()
        if self._cursor is not None:
            source["cursor"] = True
            blobs.append(self._cursor)
            self._cursor = None
        self._send(Message("put", {"seq": self._seq, "ports": ports, "source": source}, tuple(blobs)))

    def _by_port(self, taken: list[Any]) -> dict[int, list[bytes]]:
        if self._is_plain and all(type(body) is bytes for body in taken):
            return {0: taken} if taken else {}
        found: dict[int, list[bytes]] = {}
        for entry in taken:
            for port, body in [(0, entry)] if type(entry) is bytes else entry:
                found.setdefault(port, []).append(body)
        return dict(sorted(found.items()))

    def _attend(self) -> bool:
        """Somebody wants something of the source's thread: the flusher to be woken, or that it waits. Whether it goes on."""
        self._is_asleep = False
        self._awake.set()
        return self._wait_while_paused()

    def _wait_while_paused(self) -> bool:
        with self._lock:
            while self._paused and not self._stop:
                self._lock.wait()
            return not self._stop

    def _flush_late(self) -> None:
        """Put what stays behind when the source is silent after a burst. A value that cannot be put is left for the source's thread,
        whose error it is."""
        seen = 0
        stopping = False
        while not stopping:
            time.sleep(config.SOURCE_FLUSH_S)
            stopping = self._stop  # then the last look is now: the source may stay in its function until it is killed
            seen = len(self._buffer) if stopping else seen
            has_room = self._seq - self._acked < self._in_flight_max
            if has_room and len(self._buffer) == seen > 0 and first_refused(self._buffer[:seen]) is None:
                with self._lock:
                    self._flush(wait=False, count=seen)  # what came since was not looked at
            seen = len(self._buffer)
            self._is_asleep = not seen or self._paused  # said before the last look, as the source appends before it looks at this
            if self._is_asleep and not self._buffer:
                self._awake.wait()
                self._awake.clear()


class TickRunner(SourceRunner):
    """Runs one shard of a source with `every_s`: the function for each tick that the leader tells, and all that it emits for one in a
    single put, which has the tick's number. A tick that another leader tells once more is not run again."""

    def __init__(self, *arguments: Any, on_tick: Callable[[int], None]) -> None:
        super().__init__(*arguments)
        self._begins = on_tick
        self._ticks: deque[tuple[int, int]] = deque()

    def on_tick(self, number: int, at_ms: int) -> None:
        with self._lock:
            self._ticks.append((number, at_ms))
            self._lock.notify_all()

    def run(self, begin: Message) -> None:
        """Until it is told to stop. Raises what the user's code raises; of that tick nothing was put, and it is run again."""
        self._seq = self._acked = begin.fields["seq"]
        self._count = begin.fields["count"]
        emitted, most = 0, self._stage["max_items"]
        arguments = self._arguments(begin.fields["shard"], pickle.loads(begin.blobs[0]) if begin.blobs else None)
        finished = False
        while (tick := self._next_tick(finished)) is not None:
            number, at_ms = tick
            assert number == self._seq + 1, "a tick is told when what came of the one before is in the log"
            self._begins(number)
            for value in self._called(arguments):
                if value is _ENDED:
                    finished = True
                else:
                    self._emit(value)
                if self._large_bytes > TICK_BYTES_MAX:
                    raise ValueRefused(f"one tick emits more than {TICK_BYTES_MAX >> 20} MiB: put the data in files and emit their paths")
            refused = first_refused(self._buffer)
            if refused is not None:
                raise refused[1]
            self._put(self._buffer, finished, at_ms)
            emitted += len(self._buffer)
            self._buffer, self._large_bytes = [], 0
            if most is not None and emitted >= most and not finished:
                with self._lock:
                    self._make_way()
                return

    def _next_tick(self, finished: bool) -> tuple[int, int] | None:
        """None when it is told to stop, which whoever has ended waits for too."""
        with self._lock:
            while not self._stop:
                while self._ticks and self._ticks[0][0] <= self._seq:
                    self._ticks.popleft()
                if self._ticks and not self._paused and not finished:
                    return self._ticks.popleft()
                self._lock.wait()
        return None

    def _called(self, arguments: dict[str, Any]) -> Iterator[Any]:
        """What one call emits, and at last `_ENDED` where it is the source's end. The next call is told the last cursor."""
        values = self._make(arguments) if self._is_generator else itertools.islice(_calls(lambda: self._make(arguments)), 1)
        count = 0
        for value in values:
            count += 1
            if isinstance(value, At):
                arguments["cursor"] = value.cursor
            yield value
        if not count and not self._is_generator:
            yield _ENDED

    def _values(self, arguments: dict[str, Any]) -> Iterator[Any]:
        """Tick upon tick, without waiting."""
        for number in itertools.count(1):
            self._begins(number)
            for value in self._called(arguments):
                if value is _ENDED:
                    return
                yield value


def source_runner(record: dict[str, Any], queues: dict[str, dict[str, Any]], function: Callable[..., Any], is_generator: bool,
                  send: Callable[[Message], None], context: contexts.Context) -> SourceRunner:
    """The runner for a source, by what its record says."""
    arguments = (record, queues, lambda given: function(**given), is_generator, send)
    if record["every_s"] is None:
        return SourceRunner(*arguments)
    return TickRunner(*arguments, on_tick=lambda number: setattr(context, "item_id", number))


def _calls(function: Callable[[], Any]) -> Iterator[Any]:
    while True:
        try:
            value = function()
        except (StopIteration, StopAsyncIteration):
            return
        yield value


# ---- a stage's function, ready to be called


@contextlib.contextmanager
def callable_of(stage: Stage[..., Any]) -> Iterator[Callable[..., Any]]:
    """The stage's function ready to be called with values; a class is made and entered once, and left at the end."""
    if needs_loop(stage):
        import asyncio

        with asyncio.Runner() as runner, entered_in(stage, runner) as function:
            yield _in_loop(runner, function, stage.is_generator)
    elif stage.shape == "class":
        with entered(stage.function()) as made:
            yield made
    else:
        yield stage.function


@contextlib.contextmanager
def entered_in(stage: Stage[..., Any], runner: asyncio.Runner) -> Iterator[Callable[..., Any]]:
    """The function of a stage that is called in the loop of `runner`; a class is made, entered and left there."""
    if stage.shape != "class":
        yield stage.function
        return
    manager = entered_async(stage.function())
    made = runner.run(_awaited(manager.__aenter__()))
    try:
        yield made
    finally:
        runner.run(_awaited(manager.__aexit__(None, None, None)))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _in_loop(runner: asyncio.Runner, function: Callable[..., Any], is_generator: bool) -> Callable[..., Any]:
    """The function as one that is no coroutine: each call, or each value of a generator, is a turn of the loop."""
    async def called(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        if not hasattr(returned, "__await__"):
            return returned
        try:
            return await returned
        except RuntimeError as error:
            if isinstance(error.__cause__, StopIteration):  # what Python makes of it there, and it is how a source ends
                raise StopAsyncIteration from None
            raise

    async def next_of(generator: Any) -> Any:
        return await anext(generator, _NOTHING)

    def yielded(*args: Any, **kwargs: Any) -> Iterator[Any]:
        generator = function(*args, **kwargs)
        if not hasattr(generator, "__anext__"):
            yield from generator
            return
        try:
            while (value := runner.run(next_of(generator))) is not _NOTHING:
                yield value
        finally:
            runner.run(_awaited(generator.aclose()))

    return yielded if is_generator else lambda *args, **kwargs: runner.run(called(*args, **kwargs))
