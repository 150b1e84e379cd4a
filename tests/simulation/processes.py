"""Stage processes of a simulated machine: they take work, report, fail, die where it hurts, and give back.

They stand for `worker.py` and `process.py`: what a process says is in the form of the real ones, what it runs is
`pipeline`'s. A process is killed with its node, and leaves behind its position, which names the item that ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from p2pcluster import config
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import lengths_of
from p2pcluster.core.executor import Spec
from tests.simulation import pipeline

if TYPE_CHECKING:
    from tests.simulation.machine import Life

START_MS_MAX = 60


class SimProcess:
    """A process: what it hears comes by `on_message`, what it says goes to its life by `say`."""

    def __init__(self, life: Life, key: int, spec: Spec) -> None:
        self.life, self.key, self.spec = life, key, spec
        self.world = life.world
        self.is_alive = True
        self.position = (0, 0)
        self.in_hand: list[int] = []  # what runs together
        self._heard_ms = self._said_ms = 0
        self.later(self.world.random.randrange(5, START_MS_MAX), self.begin)

    def later(self, delay_ms: int, action: Any) -> None:
        """Do something, if this process is alive by then and its machine runs."""
        def act() -> None:
            if not self.is_alive:
                return
            if self.life.machine.is_paused:
                self.life.machine.when_awake(act)
            else:
                action()

        self.world.after(delay_ms, act)

    def begin(self) -> None:
        if not pipeline.is_broken(self.spec.version, self.spec.stage):
            self.say(Message("ready", {}))
            return
        if self.world.random.random() < 0.5:
            self.say(Message("error", {"error": {"type": "ImportError", "text": "ImportError: no", "traceback": None}}))
        self.end("exited with code 1", ["no"])

    def hear(self, message: Message) -> None:
        """The node says something: it is here in a moment."""
        self._heard_ms = max(self._heard_ms, self.world.now_ms + self.world.random.randrange(2))
        self.later(self._heard_ms - self.world.now_ms, lambda: self.on_message(message))

    def say(self, message: Message) -> None:
        self._said_ms = max(self._said_ms, self.world.now_ms + self.world.random.randrange(2))
        life, key = self.life, self.key
        self.world.after(self._said_ms - self.world.now_ms, lambda: life.hear_process(key, message))

    def end(self, how: str, stderr: list[str] | None = None) -> None:
        """It ends by itself, or is killed; the node notices behind all that was said."""
        if not self.is_alive:
            return
        self.is_alive = False
        life, key, running = self.life, self.key, self.position[1]
        delay_ms = max(self._said_ms - self.world.now_ms, 0) + self.world.random.randrange(1, 6)
        self.world.after(delay_ms, lambda: life.on_process_exit(key, how, running, stderr or []))

    def on_message(self, message: Message) -> None:
        if message.kind == "stop":
            self.end("ended")
        else:
            getattr(self, f"on_{message.kind}")(message)


class SimStage(SimProcess):
    """Runs items one after the other and reports them in batches."""

    def __init__(self, life: Life, key: int, spec: Spec) -> None:
        super().__init__(life, key, spec)
        self._works: list[Work] = []
        self._is_running = self._is_lost = False

    def on_work(self, message: Message) -> None:
        self._works.append(Work(message))
        self._go_on()

    def _go_on(self) -> None:
        if self._is_running or not self._works:
            return
        work = self._works[0]
        if work.at >= len(work.ids):
            self._report(work)
            self._works.pop(0)
            self.position = (self.position[0], 0)
            self._go_on()
            return
        self._is_running = True
        value, item_id = work.values[work.at], work.ids[work.at]
        self.position = (work.number, item_id)
        time_ms = pipeline.service_ms(self.spec.stage, value)
        how = pipeline.behaviour(self.spec.stage, value, 1 + work.deliveries.get(str(item_id), 0))
        self.life.checker.began(self, item_id, value)
        self._send_ahead(work, value)
        if how != "hangs":
            self.later(time_ms, lambda: self._finish(work, value, how))

    def _send_ahead(self, work: Work, value: bytes) -> None:
        """Some of what it emits, as parts; what ran before is reported first."""
        self._is_lost = False
        parts = pipeline.parts_of(self.spec.stage, value)
        if parts:
            self._report(work)
        for number, output in enumerate(parts):
            ports, blobs = pipeline.pack_together([output])
            self.say(Message("part", {"work": work.number, "part": number, "ports": ports}, tuple(blobs)))

    def on_part_ack(self, message: Message) -> None:
        if not message.fields["is_kept"] and message.fields["item"] == self.position[1]:
            self._is_lost = True

    def _say_whole(self, work: Work, count: int, outputs: list[tuple[int, bytes]], parts: int) -> None:
        ports, blobs = pipeline.pack_together(outputs)
        self.say(Message("done", {"work": work.number, "count": count, "ports": ports, "elapsed_us": 1000.0, "whole": True, "parts": parts},
                         tuple(blobs)))

    def _finish(self, work: Work, value: bytes, how: str) -> None:
        self._is_running = False
        parts = pipeline.parts_of(self.spec.stage, value)
        if how == "dies" or self.world.random.random() < self.life.options.process_dies_share:
            self._report_some(work)
            self.end("died of signal 9 (SIGKILL)", ["it died"])
            return
        if how == "raises":
            self._report(work)
            error = {"type": "ValueError", "text": "ValueError: no", "traceback": None}
            self.say(Message("failed", {"work": work.number, "elapsed_us": 1000.0, "error": error}))
        elif parts and self._is_lost:
            self.say(Message("lost", {"work": work.number, "count": 1}))
        elif parts:
            self._say_whole(work, 1, pipeline.outputs(self.spec.stage, value)[len(parts) :], len(parts))
        else:
            work.results.append(pipeline.outputs(self.spec.stage, value))
        work.at += 1
        if self.world.random.random() < 0.3:
            self._report(work)
        self._go_on()

    def _report_some(self, work: Work) -> None:
        if self.world.random.random() < 0.5:
            self._report(work)

    def _report(self, work: Work) -> None:
        if work.results:
            ports, blobs = pipeline.pack_results(self.spec.stage, work.results)
            self.say(Message("done", {"work": work.number, "count": len(work.results), "ports": ports,
                                      "elapsed_us": 1000.0 * len(work.results)}, tuple(blobs)))
            work.results = []

    def on_recall(self, message: Message) -> None:
        """Keep what runs or has run, give the rest back."""
        for at, work in enumerate(self._works):
            if work.number == message.fields["work"]:
                kept = work.at + 1 if at == 0 and self._is_running else work.at
                self._report_some(work)
                del work.ids[kept:]
                self.say(Message("returned", {"work": work.number, "kept": kept}))
                self._go_on()
                return


class SimBatches(SimStage):
    """Runs what comes together as one, and where that fails its items one by one."""

    def _go_on(self) -> None:
        work = self._works[0] if self._works else None
        if self._is_running or work is None or work.at or work.is_divided or len(work.ids) < 2:
            super()._go_on()
            return
        self._is_running = True
        self.position, self.in_hand = (work.number, work.ids[0]), list(work.ids)
        hows = [pipeline.behaviour(self.spec.stage, value, 1 + work.deliveries.get(str(item_id), 0))
                for item_id, value in zip(work.ids, work.values, strict=True)]
        for item_id, value in zip(work.ids, work.values, strict=True):
            self.life.checker.began(self, item_id, value)
        self.later(max(pipeline.service_ms(self.spec.stage, value) for value in work.values), lambda: self._finish_batch(work, hows))

    def _finish_batch(self, work: Work, hows: list[str]) -> None:
        self._is_running, self.in_hand = False, []
        if "dies" in hows or self.world.random.random() < self.life.options.process_dies_share:
            self.end("died of signal 9 (SIGKILL)", ["it died"])
            return
        if "raises" in hows:
            work.is_divided = True
            self.say(Message("divided", {"work": work.number}))
        else:
            outputs = [output for value in work.values for output in pipeline.outputs(self.spec.stage, value)]
            self._say_whole(work, len(work.ids), outputs, 0)
            work.at = len(work.ids)
        self._go_on()

    def on_recall(self, message: Message) -> None:
        if self._is_running and self.in_hand and self._works[0].number == message.fields["work"]:
            self.say(Message("returned", {"work": message.fields["work"], "kept": len(self.in_hand)}))
            return
        super().on_recall(message)


class Work:
    """A piece of work as the node sent it; `at` is the item that runs."""

    def __init__(self, message: Message) -> None:
        self.number: int = message.fields["work"]
        self.deliveries: dict[str, int] = message.fields["deliveries"]
        self.ids = [item_id for lo, hi, _, _ in message.fields["slices"] for item_id in range(lo, hi)]
        self.values: list[bytes] = []
        for lengths, body in zip(message.blobs[::2], message.blobs[1::2], strict=True):
            self.values += cut(lengths, body)
        assert len(self.ids) == len(self.values), "the bytes of a piece of work are not those of its items"
        self.results: list[list[tuple[int, bytes]]] = []
        self.at = 0
        self.is_divided = False


def cut(lengths: Any, body: Any) -> list[bytes]:
    """The values of a `lengths` and a `body` blob."""
    data, start, values = bytes(body), 0, []
    for size in lengths_of(lengths):
        values.append(data[start : start + size])
        start += size
    assert start == len(data), "the bytes do not add up to the lengths"
    return values


class SimSource(SimProcess):
    """Emits the values of one shard, from where the log says that it stands."""

    _is_paused = False
    _has_begun = False

    def on_pause(self, message: Message) -> None:
        self._is_paused = True

    def on_resume(self, message: Message) -> None:
        self._is_paused = False
        if self._has_begun:
            self._emit()

    def on_begin(self, message: Message) -> None:
        fields = message.fields
        self._values = pipeline.source_values(self.spec.stage, self.spec.shard, self.life.options)
        self._is_resumable = self.spec.stage == "cur"
        self._at = self._start(message)
        self._seq = self._acked = fields["seq"]
        self._has_ended = False
        self._has_begun = True
        batches = len(self._values) / 2.5
        self._pause_ms = max(1, int(0.9 * self.life.options.safety_ms / batches)) if self.world.random.random() < 0.8 else 10
        self._emit()

    def _start(self, message: Message) -> int:
        if self._is_resumable:
            return int(bytes(message.blobs[0])) if message.blobs else 0
        count: int = message.fields["count"]
        expected = pipeline.digest_of(self._values[:count]) if count else ""
        assert message.fields["hash"] == expected, "a source is told another hash than the one of what it emitted"
        return count

    def _emit(self) -> None:
        if self._seq - self._acked >= config.SOURCE_BATCHES_IN_FLIGHT or self._has_ended or self._is_paused:
            return
        random = self.world.random
        if self._at < len(self._values) and random.random() < self.life.options.process_dies_share:
            self.end("died of signal 9 (SIGKILL)", ["it died"])
            return
        batch = self._values[self._at : self._at + random.randrange(1, 5)]
        self._at += len(batch)
        self._seq += 1
        self._has_ended = not batch
        self._put(batch)
        self.later(random.randrange(2 * self._pause_ms), self._emit)

    def _put(self, batch: list[bytes]) -> None:
        source: dict[str, Any] = {"finished": not batch}
        ports = [{"port": 0}] if batch else []
        blobs = list(pipeline.pack(batch)) if batch else []
        if self._is_resumable and batch:
            source["cursor"] = True
            blobs.append(pipeline.encode_cursor(self._at))
        elif not self._is_resumable:
            source |= {"count": self._at, "hash": pipeline.digest_of(self._values[: self._at])}
        self.say(Message("put", {"seq": self._seq, "ports": ports, "source": source}, tuple(blobs)))

    def on_ack(self, message: Message) -> None:
        was_full = self._seq - self._acked >= config.SOURCE_BATCHES_IN_FLIGHT
        self._acked = max(self._acked, message.fields["seq"])
        if was_full:
            self._emit()


class SimTicker(SimProcess):
    """A source with `every_s`: told a tick, it emits one value, or after so many its end."""

    _is_paused = _is_running = False

    def on_begin(self, message: Message) -> None:
        self._seq: int = message.fields["seq"]
        self._told: list[tuple[int, int]] = []

    def on_pause(self, message: Message) -> None:
        self._is_paused = True

    def on_resume(self, message: Message) -> None:
        self._is_paused = False
        if hasattr(self, "_told"):
            self._go_on()

    def on_tick(self, message: Message) -> None:
        self._told.append((message.fields["seq"], message.fields["at_ms"]))
        self._go_on()

    def _go_on(self) -> None:
        if self._is_running or self._is_paused or not self._told:
            return
        number, at_ms = self._told.pop(0)
        if number <= self._seq:
            self.world.mark(self.life.name, "hears a tick again", self.spec.stage, number)
            self._go_on()
            return
        assert number == self._seq + 1, "a tick is left out"
        self._is_running = True
        self.later(self.world.random.choice((1, 5, 100, 1_500)), lambda: self._finish(number, at_ms))

    def _finish(self, number: int, at_ms: int) -> None:
        if self.world.random.random() < 5 * self.life.options.process_dies_share:
            self.end("died of signal 9 (SIGKILL)", ["it died"])
            return
        self.world.mark(self.life.name, "runs a tick", self.spec.stage, number)
        self._is_running, self._seq = False, number
        ends = number > self.life.options.ticks
        blobs = () if ends else pipeline.pack([pipeline.tick_value(self.spec.stage, number)])
        source = {"finished": ends, "tick_ms": at_ms, "count": number - ends}
        self.say(Message("put", {"seq": number, "ports": [] if ends else [{"port": 0}], "source": source}, tuple(blobs)))
        self._go_on()

    def on_ack(self, message: Message) -> None:
        """The leader tells the next tick when this one is in the log."""


class SimOnDone(SimProcess):
    """What comes after a run."""

    def begin(self) -> None:
        super().begin()
        self.later(self.world.random.randrange(1, 40), self._finish)

    def _finish(self) -> None:
        if self.world.random.random() < self.life.options.process_dies_share:
            self.end("died of signal 9 (SIGKILL)")
            return
        self.say(Message("finished", {}))
        self.end("ended")


ROLES: dict[str, type[SimProcess]] = {"stage": SimStage, "source": SimSource, "on_done": SimOnDone}


def process_for(spec: Spec) -> type[SimProcess]:
    """What a process is that was started for this."""
    if spec.stage in pipeline.TICK_S:
        return SimTicker
    return SimBatches if spec.stage == "eat" else ROLES[spec.role]
