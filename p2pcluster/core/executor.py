"""What a machine does with the items and stages it was given: which process gets what, how much, and what a death means.

It is the follower's half of a node, pure like the rest: messages from the leader and from stage processes, exits and time come
in; actions come out. It holds what its session leased, shares it among the machine's processes in pieces sized by the measured
service time, and speaks to the leader for all of them. It knows no socket, no process and no user code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from p2pcluster import config
from p2pcluster.core import commands, controls, rollouts
from p2pcluster.core.alarms import kind_of
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import lengths_of
from p2pcluster.core.ranges import Fence, Range
from p2pcluster.errors import RemoteProtocolError

SERVICE_WEIGHT = 0.3  # of the newest measurement in the running average
UNMEASURED_MS_MIN = 500  # an item that runs this long says something of its stage before it is through
NO_LIMIT = 1 << 62
DEFAULT_SERVICE_US = float(config.WORK_QUEUED_US_MAX)  # until it is measured a function counts as slow: one item at a time
FAILURE_LINE_INTERVAL_MS = 1000  # a stage that fails at everything says so once a second, and `parked` has the rest


@dataclass(frozen=True, slots=True)
class Slice:
    """Leased items `[lo, hi)` of one queue and their bytes, cut off a grant."""

    lo: int
    hi: int
    fence: Fence
    run: int
    keys: tuple[str | None, ...] | None
    lengths: memoryview
    body: memoryview

    def cut(self, count: int) -> tuple[Slice, Slice | None]:
        """The first `count` items, and the rest."""
        if count >= self.hi - self.lo:
            return self, None
        size = sum(lengths_of(self.lengths[: 4 * count]))
        middle = self.lo + count
        keys = (None, None) if self.keys is None else (self.keys[:count], self.keys[count:])
        return (
            replace(self, hi=middle, keys=keys[0], lengths=self.lengths[: 4 * count], body=self.body[:size]),
            replace(self, lo=middle, keys=keys[1], lengths=self.lengths[4 * count :], body=self.body[size:]),
        )


@dataclass(slots=True)
class Work:
    """A piece of work in a process: slices in the order in which they run; the first `reported` items have been reported.

    `is_alone`: nothing else runs in the process meanwhile. `is_divided`: of a batch, its items run one by one by now.
    """

    number: int
    slices: list[Slice]
    count: int
    reported: int = 0
    sent_ms: int = 0
    is_alone: bool = False
    is_divided: bool = False

    def ranges(self, start: int, stop: int) -> list[Range]:
        """The ids of the items number `start` to `stop` (not included)."""
        found = []
        for part in self.slices:
            size = part.hi - part.lo
            if start < size and stop > 0:
                found.append((part.lo + max(start, 0), part.lo + min(stop, size)))
            start, stop = start - size, stop - size
        return found

    def fence_of(self, item_id: int) -> Fence | None:
        return next((part.fence for part in self.slices if part.lo <= item_id < part.hi), None)

    def fences(self, start: int, stop: int) -> list[Fence]:
        """Of each of the `ranges`."""
        found = []
        for part in self.slices:
            size = part.hi - part.lo
            if start < size and stop > 0:
                found.append(part.fence)
            start, stop = start - size, stop - size
        return found

    def rest(self, start: int) -> list[Slice]:
        """What is left from item number `start` on, as slices."""
        left = []
        for part in self.slices:
            size = part.hi - part.lo
            if start < size:
                left.append(part if start <= 0 else part.cut(start)[1])
            start -= size
        return [part for part in left if part is not None]

    def shorten(self, count: int) -> list[Slice]:
        """Keep the first `count` items only; returns the others."""
        rest = self.rest(count)
        kept = []
        left = count
        for part in self.slices:
            if left > 0:
                kept.append(part.cut(left)[0])
                left -= part.hi - part.lo
        self.slices, self.count = kept, count
        return rest


class Spec(NamedTuple):
    """What a process is started for. Another version, run or parameter is another spec, hence another process."""

    pipeline: str
    version: str
    run: int
    stage: str
    role: str  # stage, source or on_done
    shard: int = 0


@dataclass(slots=True)
class Process:
    """A process of this machine. `key` names it between executor and shell; `ports` are the queues of its own version's stage."""

    key: int
    spec: Spec
    ports: list[list[str]]
    ready: bool = False
    stopping: bool = False
    works: deque[Work] = field(default_factory=deque)
    position: tuple[int, int] = (0, 0)
    position_ms: int = 0
    recalled: int = 0
    is_stuck: bool = False
    assigned: Message | None = None
    is_paused: bool = False
    unacked: deque[tuple[int, Message]] = field(default_factory=deque)
    finished: bool = False
    failure: dict[str, Any] | None = None
    timed_out: bool = False
    left: int = NO_LIMIT  # how many items it may be given until it makes way for a fresh one
    stage: StageWork | None = None  # of its own version; a source has none
    ready_ms: int = 0
    has_worked: bool = False


@dataclass(slots=True)
class Trial:
    """What became here of a version that is rolled out. `failure`: the stage that did not start, and why."""

    rollout: int
    failure: dict[str, Any] | None = None


@dataclass(slots=True)
class StageWork:
    """What this machine knows of one stage of one version: the items that wait here, and how long one takes. Processes of a version that
    was replaced keep theirs until they have finished what runs."""

    name: str
    queue: str
    record: dict[str, Any]
    desired: int = 0
    buffer: deque[Slice] = field(default_factory=deque)
    deliveries: dict[int, int] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)  # items that ran together when their process died
    since_ms: int = 0  # when the wait for a full batch began
    service_us: float | None = None
    measured_us: float = 0.0
    measured_items: float = 0.0
    crashes: int = 0
    start_at_ms: int = 0
    trouble: str | None = None
    trouble_ms: int = 0
    trouble_wait_s: float = 0.0
    of: tuple[str, int] = ("", 0)  # the version and run that it was last planned for
    said_ms: int | None = None

    @property
    def buffered(self) -> int:
        return sum(part.hi - part.lo for part in self.buffer)

    @property
    def batch(self) -> int:
        """How many items the function is called with together; 0 where it is called with each."""
        return self.record["batch"] or 0

    @property
    def concurrency(self) -> int:
        """How many items a process has in hand at once."""
        return int(self.record["concurrency"])

    @property
    def work_items(self) -> int:
        """How many items make a piece of work."""
        if self.batch or self.concurrency > 1:
            return self.batch or 1
        if self.service_us is None:
            return 1
        return max(1, min(config.WORK_ITEMS_MAX, int(config.WORK_TARGET_US / max(self.service_us, 0.1))))

    @property
    def works_per_process(self) -> int:
        if self.concurrency > 1:
            return self.concurrency
        slow = self.service_us is None or self.service_us > config.WORK_QUEUED_US_MAX
        return 1 if slow else 2

    def goes_alone(self, item_id: int) -> bool:
        """Whether the item may have done harm when it ran with others: of a batch that failed, or in a process that died."""
        return item_id in self.alone or self.deliveries.get(item_id, 0) > (0 if self.batch else self.record["retries"])

    def window(self, processes: int) -> int:
        """How many items this machine wants to hold."""
        if not processes:
            return 0
        per_process = self.works_per_process * self.work_items
        spare = 0 if (self.service_us or 0) > config.SHARED_US_MAX else self.work_items * self.concurrency
        items: int = processes * (per_process + spare)
        return items if self.record["max_items"] is None else min(items, processes * self.record["max_items"])

    @property
    def trouble_text(self) -> str:
        """With when it is tried again, if it is: where others can run the stage, this machine is given none of it."""
        return f"{self.trouble}; tried again after {self.trouble_wait_s:g} s" if self.desired else str(self.trouble)

    def measure(self, elapsed_us: float, count: int) -> None:
        """Decayed sums of time and items, divided: one item that had to wait for the processor weighs as one, not as a thousand."""
        self.measured_us += elapsed_us - SERVICE_WEIGHT * self.measured_us
        self.measured_items += count - SERVICE_WEIGHT * self.measured_items
        self.service_us = self.measured_us / self.measured_items


class Start(NamedTuple):
    """`in_hand`: how many items the process may have in hand at once, 0 where it is one. `totals` of the run are for `on_done`."""

    key: int
    spec: Spec
    project: dict[str, Any]
    params: Any
    queue: str
    in_hand: int = 0
    totals: dict[str, Any] | None = None


class Send(NamedTuple):
    key: int
    message: Message


class Kill(NamedTuple):
    key: int


class ToLeader(NamedTuple):
    message: Message


class Settled(NamedTuple):
    """What ran when this node died the last time is counted in the log."""


class Say(NamedTuple):
    """A line for people."""

    text: str


Action = Start | Send | Kill | ToLeader | Settled | Say


class Executor:
    """One machine's part; see the module. Take `take_actions` after every call."""

    def __init__(self, node_name: str) -> None:
        self.node_name = node_name
        self.processes: dict[int, Process] = {}
        self.stages: dict[str, StageWork] = {}
        self.draining = False
        self.pipelines: dict[str, dict[str, Any]] = {}
        self._assigned: dict[tuple[str, str, int], Message] = {}
        self._ticks: dict[tuple[str, str, int], Message] = {}
        self._source_backoff: dict[tuple[str, str, int], tuple[int, int]] = {}
        self._on_done: dict[str, tuple[int, int, int]] = {}
        self._trials: dict[str, Trial] = {}
        self._actions: list[Action] = []
        self._next_key = self._next_work = self._next_request = 1
        self._unanswered: dict[int, tuple[Message, Process | None]] = {}
        self._windows: dict[str, int] = {}
        self._stats: dict[str, Any] = {}
        self._alarms: dict[str, str] = {}
        self._now_ms = 0

    def take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    # ---- from the leader

    def on_new_leader(self, ran_before: dict[str, dict[str, list[int]]], now_ms: int) -> None:
        """Somebody leads whom this machine has not spoken to: say what is held here, then again all that was not answered.

        `ran_before`: by former boot of this node and queue, the items that were running when it died.
        """
        self._now_ms = now_ms
        self._windows, self._stats = {}, {}
        self._actions = [action for action in self._actions if not isinstance(action, ToLeader)]
        sources = [process.assigned.fields["producer"] for process in self.processes.values() if process.assigned is not None]
        sources += [message.fields["producer"] for message in self._assigned.values()]
        self._tell(Message("report", {"held": self._held(), "sources": sorted(set(sources)), "ran_before": ran_before}))
        for message, _ in self._unanswered.values():
            self._tell(message)
        self._update_window()
        self._report_stats()

    def _held(self) -> dict[str, list[list[Any]]]:
        """By queue, what this machine holds of it, as [lo, hi, the take's number]."""
        held: dict[str, list[list[Any]]] = {}
        places: list[tuple[str, Sequence[Slice]]] = [(stage.queue, stage.buffer) for stage in self.stages.values()]
        places += [(process.stage.queue, work.rest(work.reported)) for process in self.processes.values() if process.stage is not None
                   for work in process.works]
        for queue, slices in places:
            if slices:
                held.setdefault(queue, []).extend([part.lo, part.hi, part.fence.seq] for part in slices)
        return held

    def on_leader(self, message: Message, now_ms: int) -> None:
        """A message of the leader."""
        self._now_ms = now_ms
        handler = {"plan": self._on_plan, "grant": self._on_grant, "assigned": self._on_assigned,
                   "tick": self._on_tick, "revoke": self._on_revoke, "alarms": self._on_alarms, "reply": self._on_reply,
                   "reported": self._on_reported}.get(message.kind)
        if handler is None:
            raise RemoteProtocolError(f"a leader does not send {message.kind!r} to a node")
        handler(message)

    def _on_alarms(self, message: Message) -> None:
        """What is wrong in the cluster, whoever leads it: each is said when it is new."""
        found = {kind_of(text): text for text in message.fields["texts"]}
        for kind in found.keys() - self._alarms.keys():
            self._say(f"alarm: {found[kind]}")
        self._alarms = found

    def _on_reported(self, message: Message) -> None:
        self._actions.append(Settled())

    def _on_plan(self, message: Message) -> None:
        before, self.pipelines = self.pipelines, message.fields["pipelines"]
        for name, pipeline in self.pipelines.items():
            for line in (*rollouts.told(name, before.get(name), pipeline), *controls.changes(name, before.get(name), pipeline)):
                self._say(line)
            self._plan_trial(name, pipeline)
        self._tell(Message("seen", {"runs": {name: p["run"] for name, p in self.pipelines.items() if p["is_over"]}}))
        counts = message.fields["processes"]
        for name, pipeline in self.pipelines.items():
            for record in pipeline["manifest"]["stages"]:
                if record["reads"]:
                    self._plan_stage(name, pipeline, record, counts.get(f"{name}/{record['name']}", 0))
        planned = {f"{name}/{r['name']}" for name, p in self.pipelines.items() for r in p["manifest"]["stages"]}
        for full in [full for full in self.stages if full not in planned]:
            self._give_back(self.stages.pop(full))
        for name in self._trials.keys() - self.pipelines.keys():
            del self._trials[name]
        self._settle()
        self._report_stats()

    def _plan_stage(self, name: str, pipeline: dict[str, Any], record: dict[str, Any], desired: int) -> None:
        full = f"{name}/{record['name']}"
        stage, of = self.stages.get(full), (pipeline["version"], pipeline["run"])
        if stage is None or stage.of[0] != of[0]:
            stage = self._replace_stage(full, f"{name}/{record['reads']}", record, stage)
        if stage.record != record or stage.of != of:
            stage.crashes, stage.start_at_ms, stage.trouble, stage.of = 0, 0, None, of
        stage.record, stage.queue = record, f"{name}/{record['reads']}"
        stage.desired = desired
        if controls.is_paused(pipeline, record["name"]):
            self._give_back(stage)  # it has not begun

    def _replace_stage(self, full: str, queue: str, record: dict[str, Any], former: StageWork | None) -> StageWork:
        """What waits here was given for the former version, and goes back; how long an item took is the best guess at how long it will."""
        stage = StageWork(full, queue, record)
        if former is not None:
            self._give_back(former)
            stage.service_us, stage.measured_us, stage.measured_items = former.service_us, former.measured_us, former.measured_items
        self.stages[full] = stage
        return stage

    def _plan_trial(self, name: str, pipeline: dict[str, Any]) -> None:
        trial, number = self._trials.get(name), pipeline["rollout"]
        if number is None:
            self._trials.pop(name, None)
        elif trial is None or trial.rollout != number:
            self._trials[name] = Trial(number)

    def _on_grant(self, message: Message) -> None:
        stage = next((s for s in self.stages.values() if s.queue == message.fields["queue"]), None)
        fence = Fence(*message.fields["fence"])
        if stage is None or stage.of[0] != message.fields["version"]:
            ranges = [(lo, hi) for lo, hi, _, _ in message.fields["pieces"]]
            self._ask(commands.release(message.fields["queue"], ranges, fence))
            return
        was_empty = not stage.buffer
        for at, (lo, hi, run, keys) in enumerate(message.fields["pieces"]):
            lengths, body = message.blobs[2 * at], message.blobs[2 * at + 1]
            stage.buffer.append(Slice(lo, hi, fence, run, None if keys is None else tuple(keys), memoryview(lengths), memoryview(body)))
        stage.deliveries.update({int(item_id): count for item_id, count in message.fields["deliveries"].items()})
        if was_empty:
            stage.since_ms = self._now_ms
        self._feed(stage)

    def _on_assigned(self, message: Message) -> None:
        fields = message.fields
        where = (fields["pipeline"], fields["stage"], fields["shard"])
        self._assigned[where] = message
        self._end_former(where, fields["epoch"])
        self._settle()

    def _on_revoke(self, message: Message) -> None:
        """This machine may not run a source any more."""
        where = (message.fields["pipeline"], message.fields["stage"], message.fields["shard"])
        self._assigned.pop(where, None)
        self._ticks.pop(where, None)
        processes = self._sources_at(where)
        for process in processes:
            self._stop(process)
        if not processes:
            self._tell(Message("source_lost", message.fields))

    def _on_tick(self, message: Message) -> None:
        """A source is to be called. Its process may not be there yet; it hears it when it begins."""
        fields = message.fields
        where = (fields["pipeline"], fields["stage"], fields["shard"])
        self._ticks[where] = message
        self._end_former(where, fields["epoch"])
        for process in self._sources_at(where):
            self._tell_tick(process)

    def _tell_tick(self, process: Process) -> None:
        tick = self._ticks.get(_source(process.spec))
        if tick is not None and process.ready and process.assigned is not None and process.assigned.fields["epoch"] == tick.fields["epoch"]:
            self._send(process, Message("tick", {"seq": tick.fields["seq"], "at_ms": tick.fields["at_ms"]}))

    def _end_former(self, where: tuple[str, str, int], epoch: int) -> None:
        """A process of an assignment that is over ends at its next put; one that waits for a tick would wait for ever."""
        for process in self._sources_at(where):
            if process.assigned is not None and process.assigned.fields["epoch"] < epoch:
                self._stop(process)

    def _sources_at(self, where: tuple[str, str, int]) -> list[Process]:
        return [process for process in self.processes.values() if process.spec.role == "source" and _source(process.spec) == where]

    def _on_reply(self, message: Message) -> None:
        if message.fields["result"] == "error":
            return  # nobody leads there: it is asked again of whoever does next
        asked, process = self._unanswered.get(message.fields["req"], (None, None))
        if asked is None:
            return
        if asked.kind != message.fields["kind"]:
            raise RemoteProtocolError(f"a {message.fields['kind']!r:.50} was not asked for under that number")
        del self._unanswered[message.fields["req"]]
        if process is None or process.key not in self.processes:
            return
        if asked.kind == "part":
            is_kept = message.fields["result"] in ("ok", "already")
            self._send(process, Message("part_ack", {"item": asked.fields["id"], "part": asked.fields["part"], "is_kept": is_kept}))
            return
        if message.fields["result"] in ("ok", "already"):
            while process.unacked and process.unacked[0][0] <= message.fields["seq"]:
                process.unacked.popleft()
            self._send(process, Message("ack", {"seq": message.fields["seq"]}))
            if process.finished and not process.unacked:
                self._stop(process)
        elif message.fields.get("code") == "sequence":
            self._send_again(process, message.fields["seq"])
        elif message.fields.get("code") != "stale_epoch":
            self._say(f"{process.spec.stage}: its values were refused ({message.fields.get('code')})")
            self._actions.append(Kill(process.key))
        else:
            self._actions.append(Kill(process.key))

    def _send_again(self, process: Process, seq: int) -> None:
        if any(asker is process for _, asker in self._unanswered.values()):
            return
        for number, put in process.unacked:
            if number > seq:
                self._ask(put, process)

    # ---- from processes

    def on_message(self, key: int, message: Message, now_ms: int) -> None:
        """A stage process says something."""
        self._now_ms = now_ms
        process = self.processes[key]
        getattr(self, f"_on_process_{message.kind}")(process, message)

    def _on_process_ready(self, process: Process, message: Message) -> None:
        process.ready, process.ready_ms = True, self._now_ms
        if process.spec.role == "source":
            assert process.assigned is not None, "a source is started for an assignment"
            self._pause_source(process)
            self._send(process, Message("begin", process.assigned.fields, process.assigned.blobs))
            self._tell_tick(process)
        elif process.spec.role == "stage":
            stage = self._stage_of(process)
            stage.trouble = None
            self._feed(stage)
            self._update_window()

    def _on_process_done(self, process: Process, message: Message) -> None:
        work, stage = self._work_of(process, message), self._stage_of(process)
        start, count = work.reported, message.fields["count"]
        work.reported += count
        process.has_worked = True
        stage.measure(message.fields["elapsed_us"], count)
        stage.crashes, stage.trouble = 0, None
        ports = [_addressed(port, process.ports) for port in message.fields["ports"]]
        ranges = [list(found) for found in work.ranges(start, start + count)]
        fields = {"queue": stage.queue, "ranges": ranges, "ports": ports, "whole": False}
        if message.fields.get("whole"):
            fields |= {"whole": True, "fences": [list(fence) for fence in work.fences(start, start + count)]}
            fields |= {"parts": message.fields["parts"]} if message.fields.get("parts") else {}
        self._ask(Message("done", fields, message.blobs))
        self._after_report(process, work, stage)

    def _on_process_part(self, process: Process, message: Message) -> None:
        """Some of what an item emits, ahead of its report."""
        work, stage = self._work_of(process, message), self._stage_of(process)
        ((item_id, _), *_) = work.ranges(work.reported, work.reported + 1)
        ports = [_addressed(port, process.ports) for port in message.fields["ports"]]
        self._ask(Message("part", {"queue": stage.queue, "id": item_id, "fence": list(work.fences(work.reported, work.reported + 1)[0]),
                                   "part": message.fields["part"], "ports": ports}, message.blobs), process)

    def _on_process_lost(self, process: Process, message: Message) -> None:
        """The items are not this machine's any more, as somebody refused what they emitted: whoever holds them runs them again."""
        work, stage = self._work_of(process, message), self._stage_of(process)
        start, stop = work.reported, work.reported + message.fields["count"]
        for found, fence in zip(work.ranges(start, stop), work.fences(start, stop), strict=True):
            self._ask(commands.release(stage.queue, [found], fence))
        work.reported = stop
        self._after_report(process, work, stage)

    def _on_process_divided(self, process: Process, message: Message) -> None:
        """A batch has failed, and its items are tried one by one."""
        work = self._work_of(process, message)
        work.is_divided, work.sent_ms = True, self._now_ms

    def _on_process_failed(self, process: Process, message: Message) -> None:
        work, stage = self._work_of(process, message), self._stage_of(process)
        ((item_id, _),) = work.ranges(work.reported, work.reported + 1)
        work.reported += 1
        process.has_worked = True
        stage.measure(message.fields["elapsed_us"], 1)
        self._fail(process, stage, work, item_id, message.fields["error"])
        self._after_report(process, work, stage)

    @staticmethod
    def _stage_of(process: Process) -> StageWork:
        assert process.stage is not None, "a process that runs items has a stage"
        return process.stage

    def _take_back(self, stage: StageWork, slices: list[Slice]) -> None:
        """Items that did not run wait for another process of their version; where that was replaced, they go back."""
        stage.buffer.extendleft(reversed(slices))
        if self.stages.get(stage.name) is not stage:
            self._give_back(stage)

    def _work_of(self, process: Process, message: Message) -> Work:
        work = process.works[0]
        if work.number == message.fields["work"]:
            return work
        assert self._stage_of(process).concurrency > 1, "a process reports its works in order"
        return next(work for work in process.works if work.number == message.fields["work"])

    def _after_report(self, process: Process, work: Work, stage: StageWork) -> None:
        process.is_stuck = False
        work.sent_ms = self._now_ms  # of a batch that was divided the next item begins
        if work.reported >= work.count:
            process.works.remove(work)
        if not process.works:
            self._maybe_end(process)
        self._feed(stage)
        self._update_window()

    def _maybe_end(self, process: Process) -> None:
        """It has nothing in hand: time to go for one that was told to, or that had as many items as it may have."""
        if process.stopping:
            self._send(process, Message("stop", {}))
        elif process.left <= 0:
            self._stop(process)

    def _on_process_returned(self, process: Process, message: Message) -> None:
        """What was recalled and had not begun: the work is shorter by that."""
        stage = self._stage_of(process)
        for work in list(process.works):
            if work.number == message.fields["work"]:
                process.left += work.count - message.fields["kept"]
                self._take_back(stage, work.shorten(message.fields["kept"]))
                if work.reported >= work.count:
                    process.works.remove(work)
        if not process.works:
            process.is_stuck = False  # it had reported what it seemed to be stuck with, and no further report will say so
            self._maybe_end(process)
        self._feed(stage)

    def _on_process_put(self, process: Process, message: Message) -> None:
        assert process.assigned is not None, "only a source puts"
        fields = process.assigned.fields
        ports = [_addressed(port, process.ports) for port in message.fields["ports"]]
        seq = message.fields["seq"]
        put = Message("put", {"producer": [fields["producer"], fields["epoch"], seq], "ports": ports,
                              "source": message.fields["source"]}, message.blobs)
        process.finished = process.finished or bool(message.fields["source"].get("finished"))
        process.has_worked = True
        process.unacked.append((seq, put))
        self._source_backoff.pop(_source(process.spec), None)
        self._ask(put, process)

    def _on_process_changed(self, process: Process, message: Message) -> None:
        """A generator gave other values than before its restart."""
        self._alarm(process.spec, f"{process.spec.stage}: after a restart the generator gave other values than before, so all that it "
                                  "yields now counts as new; a generator that yields the same again, or At(value, cursor), avoids this")

    def _on_process_shorter(self, process: Process, message: Message) -> None:
        self._alarm(process.spec, f"{process.spec.stage}: after a restart the generator ended before the point that it had reached; it stays "
                                  f"open: to end it, run close {process.spec.stage}")

    def _on_process_spent(self, process: Process, message: Message) -> None:
        """A source emitted as much as one process of it may; all of that is in the log."""
        process.stopping = True

    def _on_process_finished(self, process: Process, message: Message) -> None:
        process.finished = True

    def _on_process_error(self, process: Process, message: Message) -> None:
        process.failure = message.fields["error"]

    def _on_process_progress(self, process: Process, message: Message) -> None:
        total = message.fields["total"]
        text = message.fields["text"]
        self._say(f"{process.spec.stage}: {100 * message.fields['fraction']:.0f} %{f' of {total:g}' if total else ''}"
                  f"{f' {text}' if text else ''}")

    # ---- deaths and time

    def on_exit(self, key: int, how: str, running: int, stderr: list[str], now_ms: int) -> None:
        """A process is gone: `how` it ended, the item that was `running` (0 for none), its last stderr lines."""
        self._now_ms = now_ms
        process = self.processes.pop(key)
        if process.spec.role == "source":  # whoever comes after it learns from the log where it stood
            self._unanswered = {request: held for request, held in self._unanswered.items() if held[1] is not process}
        {"stage": self._stage_exit, "source": self._source_exit, "on_done": self._on_done_exit}[process.spec.role](
            process, how, running, stderr)
        self._settle()

    def _stage_exit(self, process: Process, how: str, running: int, stderr: list[str]) -> None:
        stage = self._stage_of(process)
        left: list[Slice] = []
        in_company = running and stage.concurrency > 1 and len(process.works) > 1
        for work in process.works:
            at = next((n for n, item_id in _numbered(work) if item_id == running), None)
            if in_company or (at is not None and stage.batch and not work.is_divided and work.count > 1):
                stage.alone.update(item_id for _, item_id in _numbered(work))  # which of them it was shows when each runs alone
                at = None
            if at is None or at < work.reported:
                left += work.rest(work.reported)
                continue
            self._fail(process, stage, work, running, self._death(stage, process, how, stderr))
            left += _without_item(work.rest(work.reported), running)
        self._take_back(stage, left)
        if process.stopping:
            return
        stage.crashes += 1
        self._note_failure(process, self._start_trouble(process, how, stderr), stage.crashes, running)
        if stage.crashes > 1 or not process.ready:
            delay_s = min(config.RESTART_BACKOFF_S * 2.0 ** min(stage.crashes - 1, config.DOUBLINGS_MAX), config.RESTART_BACKOFF_MAX_S)
            stage.start_at_ms = self._now_ms + int(1000 * delay_s)
        if not process.ready:
            stage.trouble, stage.trouble_ms, stage.trouble_wait_s = self._start_trouble(process, how, stderr), self._now_ms, delay_s
            self._say(f"{process.spec.stage}: {stage.trouble_text}")
        elif not running:
            self._say(f"{process.spec.stage}: its process {how} and is started again")

    def _note_failure(self, process: Process, text: str, crashes: int, running: int) -> None:
        """A process has ended before its first item. Once may be chance, unless it said what it lacks."""
        trial, pipeline = self._trials.get(process.spec.pipeline), self.pipelines.get(process.spec.pipeline)
        if trial is None or pipeline is None or process.spec.version != pipeline["version"] or process.has_worked or running:
            return
        if trial.failure is None and (process.failure is not None or crashes >= config.ROLL_OUT_CRASHES):
            trial.failure = {"stage": process.spec.stage, "text": text}

    def _death(self, stage: StageWork, process: Process, how: str, stderr: list[str]) -> dict[str, Any]:
        timeout_s = stage.record["timeout_s"]
        if process.timed_out:
            text = f"it ran longer than its timeout_s={timeout_s:g}, so its process was ended"
            return {"type": "TimedOut", "text": text, "traceback": None, "exit": how, "stderr": stderr}
        how = "exited with code 0" if how == "ended" else how
        return {"type": "ProcessDied", "text": f"its process {how}", "traceback": None, "exit": how, "stderr": stderr}

    def _start_trouble(self, process: Process, how: str, stderr: list[str]) -> str:
        if process.failure is not None:
            return f"does not start: {process.failure['text']}"
        return f"does not start: its process {how}" + (f": {stderr[-1]}" if stderr else "")

    def _source_exit(self, process: Process, how: str, running: int, stderr: list[str]) -> None:
        where = _source(process.spec)
        self._assigned.pop(where, None)
        self._ticks.pop(where, None)
        if process.finished and not process.unacked:
            return
        if not process.stopping:
            tries = self._source_backoff.get(where, (0, 0))[0] + 1
            self._note_failure(process, self._start_trouble(process, how, stderr), tries, 0)
            delay_s = 0.0 if tries == 1 and process.failure is None else min(
                config.RESTART_BACKOFF_S * 2.0 ** min(tries, config.DOUBLINGS_MAX), config.RESTART_BACKOFF_MAX_S)
            self._source_backoff[where] = (tries, self._now_ms + int(1000 * delay_s))
            if process.failure is not None:
                self._alarm(process.spec, f"{process.spec.stage}: the source raised {process.failure['text']}; it is started again, and its "
                                          f"traceback is in the output")
            elif tries > 1:
                self._alarm(process.spec, f"{process.spec.stage}: the source's process {how} {tries} times without emitting anything; it is "
                                          "started again, and what it printed is in the output")
            else:
                self._say(f"{process.spec.stage}: the source's process {how} and is started again")
        else:
            self._source_backoff[where] = (0, self._now_ms)

    def _on_done_exit(self, process: Process, how: str, running: int, stderr: list[str]) -> None:
        spec = process.spec
        tries = self._on_done.get(spec.pipeline, (spec.run, 0, 0))[1] + 1
        if how == "ended" and process.finished:
            self._ask(Message("on_done_ran", {"pipeline": spec.pipeline, "run": spec.run}))
            self._on_done[spec.pipeline] = (spec.run, config.ON_DONE_TRIES, 0)
            return
        if process.stopping:
            return
        text = process.failure["text"] if process.failure else f"its process {how}"
        self._alarm(spec, f"on_done of {spec.pipeline} failed: {text}")
        self._on_done[spec.pipeline] = (spec.run, tries, self._now_ms + int(1000 * config.RESTART_BACKOFF_S * 2.0**tries))
        if tries >= config.ON_DONE_TRIES:
            self._ask(Message("on_done_ran", {"pipeline": spec.pipeline, "run": spec.run}))

    def tick(self, now_ms: int, positions: dict[int, tuple[int, int]]) -> None:
        """Time has passed. `positions`: of each process the number of its work and the item that runs."""
        self._now_ms = now_ms
        for key, position in positions.items():
            process = self.processes.get(key)
            if process is not None and process.works:
                self._watch(process, position)
        for stage in self.stages.values():
            if stage.batch and stage.buffer:
                self._feed(stage)
        self._settle()
        self._report_stats()

    def _watch_tasks(self, process: Process, stage: StageWork) -> None:
        """Of a process with several items in hand, which ends each in time by itself, unless one of them holds up all."""
        timeout_s = stage.record["timeout_s"]
        by_ms = self._now_ms - 1000 * (timeout_s + config.TIMEOUT_GRACE_S) if timeout_s is not None else -1
        if any(work.sent_ms < by_ms for work in process.works) and not process.timed_out:
            process.timed_out = True
            self._actions.append(Kill(process.key))

    def _watch(self, process: Process, position: tuple[int, int]) -> None:
        if self._stage_of(process).concurrency > 1:
            self._watch_tasks(process, self._stage_of(process))
            return
        if position != process.position or not position[1]:
            process.position, process.position_ms = position, self._now_ms
            return
        ran_s = (self._now_ms - process.position_ms) / 1000
        stage = self._stage_of(process)
        timeout_s = stage.record["timeout_s"]
        if timeout_s is not None and ran_s >= timeout_s and not process.timed_out:
            process.timed_out = True
            self._actions.append(Kill(process.key))
        work = process.works[-1]
        waiting = len(process.works) > 1 or work.count - work.reported > 1
        if ran_s >= config.RECALL_AFTER_S and waiting and process.recalled != work.number:
            process.recalled, process.is_stuck = work.number, True
            for held in process.works:
                self._send(process, Message("recall", {"work": held.number}))

    # ---- what should run, and what does

    def _settle(self) -> None:
        """Start what is missing, stop what is too many or of another version."""
        for process in list(self.processes.values()):
            if process.stage is not None and self.stages.get(process.stage.name) is not process.stage:
                self._stop(process)
        for stage in self.stages.values():
            self._settle_stage(stage)
        for pipeline_name, pipeline in self.pipelines.items():
            self._settle_on_done(pipeline_name, pipeline)
        self._settle_sources()
        self._update_window()

    def _settle_stage(self, stage: StageWork) -> None:
        pipeline_name, _, stage_name = stage.name.partition("/")
        pipeline = self.pipelines.get(pipeline_name)
        mine = [p for p in self.processes.values() if p.spec.role == "stage" and _full(p.spec) == stage.name]
        wanted = stage.desired if pipeline and pipeline["state"] == "running" and not self.draining else 0
        spec = Spec(pipeline_name, pipeline["version"], pipeline["run"], stage_name, "stage") if pipeline else None
        for process in mine:
            if process.spec != spec:
                self._stop(process)
        current = [p for p in mine if not p.stopping or p.left <= 0]  # one that makes way is replaced when it is gone
        for process in sorted(current, key=lambda p: len(p.works))[: max(0, len(current) - wanted)]:
            self._stop(process)
        old = any(p.spec != spec for p in mine)
        if pipeline is None or spec is None or old or self._now_ms < stage.start_at_ms:
            return
        for _ in range(wanted - len(current)):
            self._start(spec, pipeline)
        if not wanted and not mine and stage.buffer:
            self._give_back(stage)

    def _give_back(self, stage: StageWork) -> None:
        for part in stage.buffer:
            self._ask(commands.release(stage.queue, [(part.lo, part.hi)], part.fence))
        stage.buffer.clear()
        stage.deliveries.clear()
        stage.alone.clear()

    def _settle_sources(self) -> None:
        running = {_source(p.spec): p for p in self.processes.values() if p.spec.role == "source"}
        for where, process in running.items():
            pipeline = self.pipelines.get(where[0])
            over = pipeline is None or pipeline["state"] != "running" or process.spec.run != pipeline["run"]
            if self.draining or over or (pipeline and process.spec.version != pipeline["version"]):
                self._stop(process)
            self._pause_source(process)
        for where, message in list(self._assigned.items()):
            pipeline = self.pipelines.get(where[0])
            if where in running or pipeline is None or not _is_source(pipeline, where[1]):
                continue
            if self.draining:  # it may take long until this node goes
                del self._assigned[where]
                self._tell(Message("source_lost", {"pipeline": where[0], "stage": where[1], "shard": where[2]}))
                continue
            spec = Spec(where[0], pipeline["version"], pipeline["run"], where[1], "source", where[2])
            self._start(spec, pipeline).assigned = message
        for where, (tries, due_ms) in list(self._source_backoff.items()):
            if where not in running and where not in self._assigned and self._now_ms >= due_ms and due_ms:
                self._source_backoff[where] = (tries, 0)
                self._tell(Message("source_lost", {"pipeline": where[0], "stage": where[1], "shard": where[2]}))

    def _pause_source(self, process: Process) -> None:
        """Have its function called no more for now, or again. Its process stays: a generator that is started anew would run from its start."""
        pipeline = self.pipelines.get(process.spec.pipeline)
        wanted = pipeline is not None and controls.is_paused(pipeline, process.spec.stage)
        if process.ready and process.is_paused != wanted:
            process.is_paused = wanted
            self._send(process, Message("pause" if wanted else "resume", {}))

    def _settle_on_done(self, name: str, pipeline: dict[str, Any]) -> None:
        if pipeline["state"] != "done" or not pipeline["runs_on_done"] or not pipeline["manifest"]["on_done"]:
            return
        if pipeline["on_done_run"] >= pipeline["run"]:
            return
        run, tries, due_ms = self._on_done.get(name, (pipeline["run"], 0, 0))
        if run != pipeline["run"]:
            tries, due_ms = 0, 0
        busy = any(p.spec.role == "on_done" and p.spec.pipeline == name for p in self.processes.values())
        if busy or tries >= config.ON_DONE_TRIES or self._now_ms < due_ms or self.draining:
            return
        self._start(Spec(name, pipeline["version"], pipeline["run"], "on_done", "on_done"), pipeline)

    def _start(self, spec: Spec, pipeline: dict[str, Any]) -> Process:
        record = next((r for r in pipeline["manifest"]["stages"] if r["name"] == spec.stage), None)
        ports = [[f"{spec.pipeline}/{queue}" for queue in port["queues"]] for port in record["ports"]] if record else []
        process = Process(self._next_key, spec, ports, position_ms=self._now_ms)
        self._next_key += 1
        self.processes[process.key] = process
        process.stage = self.stages[_full(spec)] if spec.role == "stage" else None
        process.left = record["max_items"] or NO_LIMIT if record else NO_LIMIT
        project = {**pipeline["project"], "zip_sha256": pipeline["zip_sha256"]}
        queue = f"{spec.pipeline}/{record['reads']}" if record and record["reads"] else ""
        in_hand = (record["batch"] or 1) * record["concurrency"] if record else 1
        self._actions.append(Start(process.key, spec, project, pipeline["params"], queue, in_hand if in_hand > 1 else 0,
                                   pipeline.get("totals")))
        return process

    def _stop(self, process: Process) -> None:
        """Let it finish what runs; what has not begun comes back."""
        if process.stopping:
            return
        process.stopping = True
        for work in process.works:
            self._send(process, Message("recall", {"work": work.number}))
        if not process.works:
            self._send(process, Message("stop", {}))

    def _feed(self, stage: StageWork) -> None:
        """Hand waiting items to the processes that have room, in fair parts."""
        if stage.batch or stage.concurrency > 1:
            self._feed_together(stage)
            return
        while stage.buffer:
            hungry = [p for p in self.processes.values()
                      if p.ready and not p.stopping and not p.is_stuck and p.stage is stage and p.left > 0
                      and len(p.works) < stage.works_per_process]
            if not hungry:
                return
            process = min(hungry, key=lambda p: len(p.works))
            fair = -(-stage.buffered // len(hungry))
            self._give(process, stage, min(stage.work_items, fair))

    def _feed_together(self, stage: StageWork) -> None:
        """The same where a process has several items in hand: whole batches, or as many items as it may have. An item that may have done
        harm when it ran with others goes by itself, and of those that wait they go first."""
        if stage.alone or stage.deliveries:
            stage.buffer = deque(sorted(_each_alone(stage), key=lambda part: not stage.goes_alone(part.lo)))
        while stage.buffer:
            is_alone = stage.goes_alone(stage.buffer[0].lo)
            room = 1 if is_alone and stage.concurrency > 1 else stage.works_per_process
            hungry = [p for p in self.processes.values()
                      if p.ready and not p.stopping and not p.is_stuck and p.stage is stage and len(p.works) < room
                      and p.left > 0 and not (stage.concurrency > 1 and any(work.is_alone for work in p.works))]
            if not hungry or (not is_alone and self._waits_for_more(stage)):
                return
            process = min(hungry, key=lambda p: len(p.works))
            self._give(process, stage, 1 if is_alone else stage.work_items)
            process.works[-1].is_alone = is_alone
            stage.alone.difference_update(item_id for _, item_id in _numbered(process.works[-1]))
            stage.since_ms = self._now_ms

    def _waits_for_more(self, stage: StageWork) -> bool:
        return stage.buffered < stage.batch and self._now_ms - stage.since_ms < 1000 * stage.record["batch_wait_s"]

    def _give(self, process: Process, stage: StageWork, count: int) -> None:
        bytes_max = config.GRANT_BYTES_MAX if stage.batch else config.WORK_BYTES_MAX
        slices: list[Slice] = []
        size = 0
        count = min(count, process.left)
        while stage.buffer and count > 0:
            if slices and stage.batch and size + len(stage.buffer[0].body) > bytes_max:
                break
            head, rest = stage.buffer.popleft().cut(count)
            if len(head.body) > bytes_max and head.hi - head.lo > 1:
                fitting = max(1, (head.hi - head.lo) * bytes_max // len(head.body))
                if rest is not None:
                    stage.buffer.appendleft(rest)
                head, rest = head.cut(fitting)
            if rest is not None:
                stage.buffer.appendleft(rest)
            slices.append(head)
            count -= head.hi - head.lo
            size += len(head.body)
            if size >= bytes_max:
                break
        work = Work(self._next_work, slices, sum(part.hi - part.lo for part in slices), sent_ms=self._now_ms)
        self._next_work += 1
        process.works.append(work)
        process.left -= work.count
        deliveries = {}
        if stage.deliveries:
            for _, item_id in _numbered(work):
                if item_id in stage.deliveries:
                    deliveries[str(item_id)] = stage.deliveries.pop(item_id)
        fields = {"work": work.number, "queue": stage.queue, "deliveries": deliveries,
                  "slices": [[part.lo, part.hi, part.run, part.keys] for part in slices]}
        self._send(process, Message("work", fields, tuple(blob for part in slices for blob in (part.lengths, part.body))))

    # ---- small things

    def _fail(self, process: Process, stage: StageWork, work: Work, item_id: int, error: dict[str, Any]) -> None:
        fence = work.fence_of(item_id)
        assert fence is not None, "an item that failed is of its work"
        full = {**error, "stage": stage.name, "node": self.node_name, "version": process.spec.version}
        self._ask(commands.fail(stage.queue, item_id, fence, full, 0))
        if stage.said_ms is None or self._now_ms - stage.said_ms >= FAILURE_LINE_INTERVAL_MS:
            stage.said_ms = self._now_ms
            self._say(f"{stage.name.partition('/')[2]}: item {stage.queue}:{item_id} failed: {error['text']}")

    def _send(self, process: Process, message: Message) -> None:
        self._actions.append(Send(process.key, message))

    def _tell(self, message: Message) -> None:
        self._actions.append(ToLeader(message))

    def _ask(self, message: Message, process: Process | None = None) -> None:
        """Say what must not be lost: it is kept until it is answered. `process` is the source that waits for the answer."""
        request = self._next_request
        self._next_request += 1
        asked = message._replace(fields={**message.fields, "req": request})
        self._unanswered[request] = (asked, process)
        self._tell(asked)

    def _say(self, text: str) -> None:
        self._actions.append(Say(text))

    def _alarm(self, spec: Spec, text: str) -> None:
        self._say(text)
        self._tell(Message("alarm", {"key": f"{spec.pipeline}/{spec.stage}", "text": text}))

    def _update_window(self) -> None:
        windows = {}
        for stage in self.stages.values():
            ready = sum(1 for p in self.processes.values() if p.ready and not p.stopping and p.stage is stage)
            windows[stage.queue] = stage.window(ready)
        if any(_differs(windows.get(queue, 0), self._windows.get(queue, 0)) for queue in {*windows, *self._windows}):
            self._windows = windows
            self._tell(Message("window", {"queues": windows}))

    def _report_stats(self) -> None:
        running: dict[str, int] = {}
        for process in self.processes.values():
            if process.ready:
                running[_full(process.spec)] = running.get(_full(process.spec), 0) + 1
        for stage in self.stages.values():  # of a stage that others have taken over: what was missing may be there by now
            if stage.trouble and not stage.desired and self._now_ms >= stage.trouble_ms + int(1000 * config.TROUBLE_FORGOTTEN_S):
                stage.trouble = None
        stats = {
            "running": running,
            "service_us": {s.name: us for s in self.stages.values() if (us := self._service_us(s)) is not None},
            "troubles": {s.name: s.trouble_text for s in self.stages.values() if s.trouble},
            "trials": {name: self._report_of(name, trial) for name, trial in self._trials.items()},
            "draining": self.draining,
        }
        if stats != self._stats:
            self._stats = stats
            self._tell(Message("stats", stats))

    def _report_of(self, name: str, trial: Trial) -> dict[str, Any]:
        """How a version that is rolled out does here: how many processes of others are left, which of its stages have proved themselves."""
        mine = [p for p in self.processes.values() if p.spec.pipeline == name and p.spec.role != "on_done"]
        of_version = [p for p in mine if p.spec.version == self.pipelines[name]["version"]]
        proved = {p.spec.stage: True for p in of_version if self._has_proved_itself(p)}
        for process in of_version:
            if process.spec.role == "source" and not self._has_proved_itself(process):
                proved.pop(process.spec.stage, None)  # each shard of a source is one by itself
        return {"rollout": trial.rollout, "old": len(mine) - len(of_version), "ready": sorted(proved), "failure": trial.failure}

    def _has_proved_itself(self, process: Process) -> bool:
        return process.ready and (process.has_worked or self._now_ms - process.ready_ms >= int(1000 * config.ROLL_OUT_WATCHED_S))

    def _service_us(self, stage: StageWork) -> float | None:
        """How long an item takes. Before the first one is through, at least as long as it has been running: by steps, as each is told."""
        if stage.service_us is not None:
            return round(stage.service_us, 1)
        running_ms = [self._now_ms - p.position_ms for p in self.processes.values() if p.works and p.stage is stage]
        longest_ms = max(running_ms, default=0)
        return 1000.0 * (1 << longest_ms.bit_length() - 1) if longest_ms >= UNMEASURED_MS_MIN else None

    def drain(self) -> None:
        """Stop taking and starting; let what runs finish. `is_idle` says when that is so."""
        self.draining = True
        for stage in self.stages.values():
            stage.desired = 0
        self._settle()
        self._report_stats()

    @property
    def is_busy(self) -> bool:
        """Whether something is in hand that time matters to: then the clock is looked at more often."""
        return any(not p.ready or p.works or p.unacked or p.stopping for p in self.processes.values()) or any(
            stage.batch and stage.buffer for stage in self.stages.values())

    @property
    def is_idle(self) -> bool:
        return not self.processes


def _is_source(pipeline: dict[str, Any], stage: str) -> bool:
    return any(record["name"] == stage and record["kind"] == "source" for record in pipeline["manifest"]["stages"])


def _addressed(port: dict[str, Any], queues: list[list[str]]) -> dict[str, Any]:
    """A port as a command names it: by its queues, and not by its number in the stage."""
    return {"queues": queues[port["port"]], **{name: value for name, value in port.items() if name != "port"}}


def _full(spec: Spec) -> str:
    return f"{spec.pipeline}/{spec.stage}"


def _source(spec: Spec) -> tuple[str, str, int]:
    return spec.pipeline, spec.stage, spec.shard


def _numbered(work: Work) -> Iterator[tuple[int, int]]:
    return enumerate(item_id for part in work.slices for item_id in range(part.lo, part.hi))


def _each_alone(stage: StageWork) -> Iterator[Slice]:
    """What waits for a stage, with each item that goes alone in a slice of its own."""
    for part in stage.buffer:
        rest: Slice | None = part
        for item_id in [i for i in range(part.lo, part.hi) if stage.goes_alone(i)]:
            assert rest is not None, "the item lies in the rest"
            if item_id > rest.lo:
                before, rest = rest.cut(item_id - rest.lo)
                yield before
                assert rest is not None, "the item lies behind what was cut off"
            one, rest = rest.cut(1)
            yield one
        if rest is not None:
            yield rest


def _without_item(slices: Iterable[Slice], item_id: int) -> Iterator[Slice]:
    for part in slices:
        if not part.lo <= item_id < part.hi:
            yield part
            continue
        if item_id > part.lo:
            yield part.cut(item_id - part.lo)[0]
        rest = part.cut(item_id - part.lo + 1)[1]
        if rest is not None:
            yield rest


def _differs(new: int, old: int) -> bool:
    """Whether a window has changed so much that the leader should know."""
    return (new == 0) != (old == 0) or abs(new - old) > old // 4
