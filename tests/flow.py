"""A pipeline on the pure core: one leader, some machines' halves, processes that do what a test says, and no time but the test's.

Decided here: in which order things happen, by a `Random`. All else is the code under test. Values are opaque bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob, lengths_of, put
from p2pcluster.core.executor import Executor, Kill, Send, Spec, Start, ToLeader
from p2pcluster.core.log import Log
from p2pcluster.core.grants import Grant, grant_message
from p2pcluster.core.node import Node
from p2pcluster.core.sessions import Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.records import PipelineState, QueueState
from tests import hostile

WALL_MS = 1_800_000_000_000  # the time of day at the start
Emits = Callable[[str, bytes], list[tuple[int, bytes]]]  # by stage and value, what comes of it, as (port, value)


class Process:
    """One process of a machine; `act` is its turn, and tells whether it did anything."""

    def __init__(self, machine: Machine, key: int, spec: Spec) -> None:
        self.machine, self.key, self.spec = machine, key, spec
        self.is_stopped = False
        self.say("ready")

    def say(self, kind: str, blobs: tuple[Any, ...] = (), **fields: Any) -> None:
        executor = self.machine.executor
        if self.key in executor.processes:
            executor.on_message(self.key, Message(kind, fields, blobs), self.machine.flow.now_ms)

    def hear(self, message: Message) -> None:
        if message.kind == "stop":
            self.is_stopped = True
        else:
            getattr(self, f"on_{message.kind}")(message)

    def act(self) -> bool:
        if not self.is_stopped:
            return self.work()
        self.end("ended")
        return True

    def end(self, how: str, running: int = 0) -> None:
        del self.machine.processes[self.key]
        self.machine.executor.on_exit(self.key, how, running, [], self.machine.flow.now_ms)

    def work(self) -> bool:
        return False


class StageProcess(Process):
    """Runs one item in a turn."""

    def __init__(self, machine: Machine, key: int, spec: Spec) -> None:
        self.works: deque[dict[str, Any]] = deque()
        self.ran = 0
        super().__init__(machine, key, spec)

    def on_work(self, message: Message) -> None:
        values = []
        for lengths, body in zip(message.blobs[::2], message.blobs[1::2], strict=True):
            data, start = bytes(body), 0
            for size in lengths_of(lengths):
                values.append(data[start : start + size])
                start += size
        self.works.append({"number": message.fields["work"], "values": values, "at": 0, "parts": 0})

    def on_part_ack(self, message: Message) -> None:
        assert message.fields["is_kept"], "nobody takes anything from a machine here"

    def on_recall(self, message: Message) -> None:
        for work in self.works:
            if work["number"] == message.fields["work"]:
                kept = work["at"] + (work["parts"] > 0)
                del work["values"][kept:]
                self.say("returned", work=work["number"], kept=kept)
        self.works = deque(work for work in self.works if work["at"] < len(work["values"]))

    def work(self) -> bool:
        if not self.works:
            return False
        work = self.works[0]
        value = work["values"][work["at"]]
        flow = self.machine.flow
        found = flow.emits(self.spec.stage, value)[work["parts"] * (flow.part_size or 0) :]
        if flow.part_size is not None and len(found) > flow.part_size:
            ports, blobs = _together(found[: flow.part_size])
            self.say("part", tuple(blobs), work=work["number"], part=work["parts"], ports=ports)
            work["parts"] += 1
            return True
        parts, work["parts"] = work["parts"], 0
        work["at"] += 1
        self.ran += 1
        if work["at"] == len(work["values"]):
            self.works.popleft()
        flow.ran.append((flow.now_ms, self.spec.stage, value))
        if flow.fails(self.spec.stage, value):
            self.say("failed", work=work["number"], elapsed_us=1000.0, error={"type": "E", "text": "E: no", "traceback": None})
            return True
        if parts:
            ports, blobs = _together(found)
            self.say("done", tuple(blobs), work=work["number"], count=1, elapsed_us=1000.0, ports=ports, whole=True, parts=parts)
            return True
        ports, blobs = [], []
        for port in sorted({port for port, _ in found}):
            group = [body for number, body in found if number == port]
            ports.append({"port": port, "counts": True})
            blobs += [lengths_blob(map(len, group)), b"".join(group), lengths_blob([len(group)])]
        self.say("done", tuple(blobs), work=work["number"], count=1, elapsed_us=1000.0, ports=ports)
        return True


def _together(found: list[tuple[int, bytes]]) -> tuple[list[dict[str, Any]], list[bytes]]:
    ports: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for number in sorted({number for number, _ in found}):
        group = [body for port, body in found if port == number]
        ports.append({"port": number})
        blobs += [lengths_blob(map(len, group)), b"".join(group)]
    return ports, blobs


class SourceProcess(Process):
    """Puts what `flow.sources` has for it, one value at a time; or, told a tick, one value of that name."""

    def __init__(self, machine: Machine, key: int, spec: Spec) -> None:
        self.seq = self.acked = self.at = 0
        self.has_begun = self.has_ended = False
        self.ticks: deque[Message] = deque()
        super().__init__(machine, key, spec)

    def on_begin(self, message: Message) -> None:
        self.seq = self.acked = message.fields["seq"]
        self.at = message.fields["count"]
        self.has_begun = True

    def on_ack(self, message: Message) -> None:
        self.acked = max(self.acked, message.fields["seq"])

    def on_tick(self, message: Message) -> None:
        self.ticks.append(message)

    def on_pause(self, message: Message) -> None:
        """It is not called while it is paused, which no test here asks for."""

    on_resume = on_pause

    def work(self) -> bool:
        values = self.machine.flow.sources.get(self.spec.stage)
        if values is None:
            return self._tick()
        if not self.has_begun or self.has_ended or self.seq - self.acked >= 4:
            return False
        batch = values[self.at : self.at + self.machine.flow.random.randrange(1, 4)]
        self.at += len(batch)
        self.has_ended = not batch
        self._put(batch, {"finished": not batch, "count": self.at, "hash": ""})
        return True

    def _tick(self) -> bool:
        while self.ticks and self.ticks[0].fields["seq"] <= self.seq:
            self.ticks.popleft()
        if not self.ticks:
            return False
        fields = self.ticks.popleft().fields
        flow = self.machine.flow
        flow.ticked.append((flow.now_ms, fields["seq"], fields["at_ms"] - WALL_MS))
        self._put([b"%d" % fields["seq"]], {"finished": False, "tick_ms": fields["at_ms"]})
        return True

    def _put(self, batch: list[bytes], source: dict[str, Any]) -> None:
        self.seq += 1
        blobs = (lengths_blob(map(len, batch)), b"".join(batch)) if batch else ()
        self.say("put", blobs, seq=self.seq, ports=[{"port": 0}] if batch else [], source=source)


class Machine:
    """A machine's half and its processes."""

    def __init__(self, flow: Flow, name: str) -> None:
        self.flow, self.name = flow, name
        self.executor = Executor(name)
        self.processes: dict[int, Process] = {}
        self.started: list[Spec] = []

    def start(self, action: Start) -> None:
        self.started.append(action.spec)
        made = SourceProcess if action.spec.role == "source" else StageProcess
        self.processes[action.key] = made.__new__(made)
        self.processes[action.key].__init__(self, action.key, action.spec)  # type: ignore[misc]  # it speaks while it is made


class Flow:
    """See the module. `manifest` may be changed before it is deployed."""

    def __init__(self, manifest: dict[str, Any], random: Random, machines: int = 1) -> None:
        self.random, self.manifest = random, manifest
        self.now_ms = 0
        self.wall_ms = WALL_MS
        self.ports_of = {record["name"]: len(record["ports"]) for record in manifest["stages"]}
        self.emits: Emits = lambda stage, value: [(0, value)] if self.ports_of[stage] else []
        self.fails: Callable[[str, bytes], bool] = lambda stage, value: False
        self.part_size: int | None = None  # what an item emits beyond so many values goes ahead in parts
        self.sources: dict[str, list[bytes]] = {}
        self.ran: list[tuple[int, str, bytes]] = []
        self.ticked: list[tuple[int, int, int]] = []  # when, which, and for what time since the start
        self.answers: list[Message] = []
        self.state = State()
        self.machines = {f"m{number}": Machine(self, f"m{number}") for number in range(machines)}
        self.lead()
        for message in hostile.deploying(manifest["pipeline"]):
            fields = {**message.fields, **({"manifest": manifest, "origin": {"node": "m0"}} if message.kind == "deploy" else {})}
            self.ask(message._replace(fields=fields))

    def lead(self) -> None:
        """A node begins to lead with the state as it is; what the one before had not logged is gone."""
        term = self.node.raft.term if hasattr(self, "node") else 0
        log = Log(self.state.applied_idx, self.state.applied_term, self.state.at_ms)
        self.node = Node("n", Random(self.random.getrandbits(32)), HardState(term, None), log, self.state, Configuration(("n",)),
                         self.state.applied_idx, self.now_ms)
        while not self.node.is_serving:
            self._tick(20)
        self.node.open_session(Session("client", "client", "client", "boot", "client"))
        for name in self.machines:
            self.join(name)

    def join(self, name: str) -> None:
        """A machine comes to whoever leads."""
        self.node.open_session(Session(name, "node", name, "boot", name, {"slots": 4, "python": "3.11.2"}))
        self.machines[name].executor.on_new_leader({}, self.now_ms)
        self.carry()

    @property
    def pipeline(self) -> PipelineState:
        return self.state.pipelines[self.manifest["pipeline"]]

    def queue(self, name: str) -> QueueState:
        return self.state.queues[f"{self.manifest['pipeline']}/{name}"]

    @property
    def is_done(self) -> bool:
        return self.pipeline.state == "done"

    def ask(self, message: Message) -> Message:
        """What a client asks, and the answer, which may take a while."""
        self.answers.clear()
        self.node.step("client", message._replace(fields={**message.fields, "req": 1}), self.now_ms)
        self.carry()
        return self.answers[-1]

    def put(self, queue: str, values: list[bytes], **waits: int) -> None:
        self._puts = getattr(self, "_puts", 0) + 1
        port = Port([f"{self.manifest['pipeline']}/{queue}"], lengths_blob(map(len, values)), b"".join(values), **waits)
        assert self.ask(put(f"client:{self._puts}", 1, 1, [port])).fields["result"] == "ok"

    # ---- time and turns

    def _tick(self, ms: int) -> None:
        self.now_ms += ms
        self.wall_ms += ms
        self.node.tick(self.now_ms, self.wall_ms)
        for machine in self.machines.values():
            machine.executor.tick(self.now_ms, {})
        self.carry()

    def turn(self) -> bool:
        """One process that has something to do does it; whether there was one."""
        processes = [process for machine in self.machines.values() for process in machine.processes.values()]
        self.random.shuffle(processes)
        moved = any(process.act() for process in processes)
        self.carry()
        return moved

    def pass_time(self, ms: int, step_ms: int = 20) -> None:
        """So much time, in which all do what they can."""
        for _ in range(0, ms, step_ms):
            self._tick(step_ms)
            while self.turn():
                pass

    def carry(self) -> None:
        """What the two halves say to each other, until they have nothing more to say."""
        for _ in range(10_000):
            if not any([self._carry_actions(), self._carry_outbox(), self._commit()]):
                return
        raise AssertionError("it does not come to rest")

    def _carry_actions(self) -> bool:
        moved = False
        for name, machine in self.machines.items():
            for action in machine.executor.take_actions():
                moved = True
                if isinstance(action, ToLeader):
                    self.node.step(name, action.message, self.now_ms)
                elif isinstance(action, Start):
                    machine.start(action)
                elif isinstance(action, Send) and action.key in machine.processes:
                    machine.processes[action.key].hear(action.message)
                elif isinstance(action, Kill) and action.key in machine.processes:
                    machine.processes[action.key].end("died of signal 9 (SIGKILL)")
        return moved

    def _carry_outbox(self) -> bool:
        sent = self.node.take_outbox()
        for session, item in sent:
            message = grant_message(item, [chunk.slice(lo, hi) for chunk, lo, hi in item.pieces]) if isinstance(item, Grant) else item
            if session == "client":
                self.answers.append(message)
            else:
                self.machines[session].executor.on_leader(message, self.now_ms)
        return bool(sent)

    def _commit(self) -> bool:
        if not self.node.has_ready():
            return False
        self.node.advance(self.node.ready())
        return True
