"""What a decorated function's process does with its queues: take, call, finish; again.

Decided here: an input is finished and its outputs are put in one command, so that an item is lost by nobody's death; how much is taken
ahead (what takes about as long as `config.WORK_TARGET_US`); that an item whose function raises goes back, counted in the journal, to be
tried again and in the end parked with the traceback; and that who feeds a queue waits while `config.QUEUE_ITEMS_MAX` values are in it.
"""

from __future__ import annotations

import queue
import secrets
import socket
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from p2pcluster import config
from p2pcluster.classic import utils
from p2pcluster.classic.in_hand import InHand
from p2pcluster.classic.queues import RawQueue
from p2pcluster.client import RETRY_S, Cluster, bodies_of
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import lengths_blob
from p2pcluster.core.stages import DROP, Stage
from p2pcluster.errors import Unavailable
from p2pcluster.values import ENCODERS, as_refusal, check_value
from p2pcluster.runners import callable_of, error_of

ROOM_EACH = 500  # values between two looks whether a queue is over its maximum ...
ROOM_S = 0.2  # ... and, while it is, how often it is looked at
SLOW_S = 10 * config.WORK_TARGET_US / 1e6  # what is left of a piece of work that takes this long is given back
SENT_AHEAD_MAX = 1000  # values of a source on their way

stopping = threading.Event()  # this process is to end when the item in hand is finished
_at_work = threading.Event()
_in_hand = InHand()


def has_item() -> bool:
    """Whether a decorated function is at work, which may finish."""
    return _at_work.is_set()


def be_watched(descriptor: int) -> None:
    """What this process has in hand is written where the one that started it can read it."""
    global _in_hand
    _in_hand = InHand(descriptor)


def run(stage: Stage[..., Any], queues: tuple[RawQueue, ...]) -> None:
    """The loop of a decorated function. A source's ends with it, the others when they are told to."""
    reads = queues[:1] if stage.kind != "source" else ()
    feeds = _Feeds(queues[len(reads):])
    with callable_of(stage) as call:
        if reads:
            _Taker(stage, call, reads[0], feeds).run()
        else:
            _Sender(stage, call, feeds).run()


class _Feeds:
    """The queues that a function feeds: each value goes to all of them."""

    def __init__(self, queues: tuple[RawQueue, ...]) -> None:
        self.queues = queues
        self._since_look = 0

    def full_names(self, cluster: Cluster) -> list[str]:
        return [cluster.full(one.name) for one in self.queues]

    def wait_for_room(self, count: int, cluster: Cluster) -> None:
        """`count` values were put: while a queue holds too many, no more come from here."""
        self._since_look += count
        if self._since_look < ROOM_EACH or not self.queues:
            return
        self._since_look = 0
        names = {one.name for one in self.queues}
        while not stopping.is_set():
            found = [q for q in cluster.status()["queues"] if q["pipeline"] == utils.PIPELINE and q["name"] in names]
            if all(q["ready"] + q["leased"] < config.QUEUE_ITEMS_MAX for q in found):
                return
            stopping.wait(ROOM_S)


def _encoded(value: Any) -> bytes:
    try:
        body = ENCODERS["pickle"](value)
    except Exception as error:  # a value's own __reduce__ may raise anything
        raise as_refusal(value, error) from error
    check_value(body)
    return body


# ---- a source


class _Sender:
    """A source: this thread calls the function, another puts what there is meanwhile, many in a message when they come fast."""

    def __init__(self, stage: Stage[..., Any], call: Callable[..., Any], feeds: _Feeds) -> None:
        self._values = call() if stage.is_generator else _calls(call)
        self._feeds = feeds
        self._waiting: queue.Queue[list[bytes] | None] = queue.Queue(SENT_AHEAD_MAX)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._send, daemon=True)

    def run(self) -> None:
        self._thread.start()
        try:
            for value in self._values:
                if self._error is not None or stopping.is_set():
                    break
                if value is not DROP:
                    self._waiting.put([_encoded(value)])
        finally:
            self._waiting.put(None)
            self._thread.join()  # what was emitted is put, also when this process is to end
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        try:
            cluster = self._feeds.queues[0].door.cluster
            names = self._feeds.full_names(cluster)
            producer, seq = f"client:{secrets.token_hex(8)}", 0
            for bodies in self._batches():
                seq += 1
                message = Message("put", {"producer": [producer, 1, seq], "ports": [{"queues": names}], "source": None},
                                  (lengths_blob(map(len, bodies)), b"".join(bodies)))
                cluster.check(cluster.link.call(message), ", ".join(names))
                self._feeds.wait_for_room(len(bodies), cluster)
        except BaseException as error:  # it belongs to the main thread, which raises it
            self._error = error
            while self._waiting.get() is not None:
                pass

    def _batches(self) -> Iterator[list[bytes]]:
        is_over = False
        while not is_over:
            bodies: list[bytes] = []
            size, more = 0, self._waiting.get()
            while more is not None:
                bodies += more
                size += len(more[0])
                if len(bodies) >= SENT_AHEAD_MAX or size > config.WORK_BYTES_MAX:
                    break
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
            is_over = more is None
            if bodies:
                yield bodies


def _calls(function: Callable[[], Any]) -> Iterator[Any]:
    """What a plain function returns, again and again, until it raises `StopIteration`."""
    while True:
        try:
            value = function()
        except StopIteration:
            return
        yield value


# ---- a stage or a sink


class _Taker:
    """A function that is called with the values of a queue."""

    def __init__(self, stage: Stage[..., Any], call: Callable[..., Any], source: RawQueue, feeds: _Feeds) -> None:
        self._stage = stage
        self._call = call
        self._feeds = feeds
        self._cluster = source.door.cluster
        self._name = source.name
        self._full = self._cluster.full(source.name)
        self._targets = feeds.full_names(self._cluster)
        self._count = 1  # how many to take at once
        self._request = 0
        self._fence: list[Any] = []
        self._failing: dict[str, Any] = {}  # what a `fail` says of each item of this grant
        self._deliveries: dict[str, int] = {}  # those before this one, of items that have some
        self._ids: list[int] = []  # finished and not yet said so, with what they emit
        self._outputs: list[list[bytes]] = []

    def run(self) -> None:
        while not stopping.is_set():
            self._work_off(self._take())

    def _take(self) -> list[tuple[int, bytes]]:
        """The next items, waited for however long it takes, also for a server that is away."""
        link = self._cluster.link
        take = Message("take", {"queue": self._full, "count": self._count, "watched": _in_hand.is_watched})
        while True:
            self._request = link.request(take, time.monotonic() + utils.FOREVER_S)
            try:
                reply = link.reply(self._request, None)
            except Unavailable:
                continue
            if reply.kind == "grant":
                self._on_grant(reply)
                return list(bodies_of(reply))
            if reply.fields.get("result") != "error":
                self._cluster.check(reply, self._name)
            time.sleep(RETRY_S)

    def _on_grant(self, grant: Message) -> None:
        options = self._stage.options
        self._fence, self._deliveries = grant.fields["fence"], grant.fields["deliveries"]
        self._failing = {"queue": self._full, "fence": self._fence, "retries": options.retries,
                         "delay_ms": int(1000 * min(options.backoff_s, config.BACKOFF_MAX_S))}
        _in_hand.took(self._failing)

    def _work_off(self, items: list[tuple[int, bytes]]) -> None:
        link = self._cluster.link
        begun_s = time.monotonic()
        left = [item_id for item_id, _ in items]
        _at_work.set()
        try:
            for item_id, body in items:
                if stopping.is_set() or not link.is_current(self._request) or time.monotonic() - begun_s > SLOW_S:
                    break
                self._run_one(item_id, body)
                left.remove(item_id)
            spent_us = (time.monotonic() - begun_s) * 1e6 / len(items)  # without the commit, or a slow disk would have each item go alone
        finally:  # also what was interrupted goes back
            self._finish()
            self._give_back(left)
            _at_work.clear()
        most = int(config.WORK_TARGET_US / max(1.0, spent_us))
        self._count = max(1, min(config.WORK_ITEMS_MAX, 2 * self._count, most))

    def _run_one(self, item_id: int, body: bytes) -> None:
        _in_hand.begins(item_id)
        try:
            outputs = self._outputs_of(body)
        except KeyboardInterrupt:  # no failure of the item's
            raise
        except BaseException as error:  # whatever else it raises is this item's failure; only a signal ends the process
            self._finish()
            self._on_failure(item_id, error)
        else:
            self._ids.append(item_id)
            self._outputs.append(outputs)
        finally:
            _in_hand.ends()

    def _outputs_of(self, body: bytes) -> list[bytes]:
        returned = self._call(self._cluster.value_of(self._name, body))
        if self._stage.kind == "sink":
            return []
        values = returned if self._stage.is_generator else [returned]
        return [_encoded(value) for value in values if value is not DROP]

    def _on_failure(self, item_id: int, error: BaseException) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        told = {**error_of(error), "stage": self._stage.name, "node": socket.gethostname()}
        reply = self._cluster.link.call(Message("fail", {**self._failing, "id": item_id, "error": told}))
        if reply.fields.get("result") != "ok":  # its lease ended with a connection: it is with somebody else by now
            return
        times = self._deliveries.get(str(item_id), 0) + 1
        utils.say(f"{self._stage.name} failed {f'{times} times' if times > 1 else 'once'} with an item of {self._name}, which is "
                  + (utils.parked(self._cluster.link.options) if reply.fields["parked"] else "tried again"))

    def _finish(self) -> None:
        """Say what is finished, in one command with what came of it; asked again by id, so that it happens once."""
        if not self._ids:
            return
        ids, outputs = self._ids, self._outputs
        self._ids, self._outputs = [], []
        ports: list[dict[str, Any]] = []
        blobs: tuple[bytes, ...] = ()
        bodies = [body for group in outputs for body in group]
        if bodies and self._targets:
            ports = [{"queues": self._targets, "counts": True}]
            blobs = (lengths_blob(map(len, bodies)), b"".join(bodies), lengths_blob(array("I", map(len, outputs))))
        ranges = [[item_id, item_id + 1] for item_id in ids]
        done = Message("done", {"queue": self._full, "ranges": ranges, "ports": ports, "whole": False}, blobs)
        self._cluster.check(self._cluster.link.call(done), self._name)
        self._feeds.wait_for_room(len(bodies), self._cluster)

    def _give_back(self, ids: list[int]) -> None:
        if ids and self._cluster.link.is_current(self._request):
            ranges = [[item_id, item_id + 1] for item_id in ids]
            self._cluster.link.call(Message("release", {"queue": self._full, "ranges": ranges, "fence": self._fence}))
