"""`"auto"` over simulated time: pipelines whose stages take their time, planned once a second as the leader does."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core.demand import loads_of
from p2pcluster.core.sessions import Session
from p2pcluster.core.placement import Plan, plan_processes
from p2pcluster.core.planner import Planner
from p2pcluster.core.records import PipelineState
from p2pcluster.core.status import Rates

STEP_MS = 20
START_MS = 300  # from the plan to a process that works


@dataclass
class Queue:
    """As much of a queue as a plan looks at; items are a fluid here."""

    name: str
    maxsize: int | None
    open_count: float = 0.0
    put: float = 0.0
    done: float = 0.0
    delayed: tuple[()] = ()
    open_bytes: int = 0
    bytes_max: int | None = None

    @property
    def room(self) -> float:
        return 1e9 if self.maxsize is None else max(0.0, self.maxsize - self.open_count)


@dataclass
class Line:
    """A pipeline of automatic stages behind a source that emits `rate_per_s` items as long as there is room."""

    name: str
    service_ms: list[float]
    maxsize: int = 10_000
    rate_per_s: float = 1e6
    queues: list[Queue] = field(default_factory=list)
    held_ms: float = 0.0  # of processes, in all

    def __post_init__(self) -> None:
        self.queues = [Queue(f"{self.name}/{at}", self.maxsize) for at in range(len(self.service_ms))]

    def state(self) -> PipelineState:
        names = [str(at) for at in range(len(self.service_ms))]
        stages = [_stage("source", "source", None, names[:1])]
        stages += [_stage(name, "stage", name, names[at + 1:at + 2]) for at, name in enumerate(names)]
        return PipelineState(self.name, "v", {}, {"stages": stages, "back_edges": []}, {}, "", {}, run=1, state="running")

    def work(self, processes: dict[str, int]) -> None:
        """`STEP_MS` pass, the last stage first, so that there is room."""
        for at in reversed(range(len(self.queues))):
            queue, behind = self.queues[at], self.queues[at + 1] if at + 1 < len(self.queues) else None
            able = processes.get(queue.name, 0) * STEP_MS / self.service_ms[at]
            moved = min(able, queue.open_count, behind.room if behind else 1e9)
            queue.open_count, queue.done = queue.open_count - moved, queue.done + moved
            if behind:
                behind.open_count, behind.put = behind.open_count + moved, behind.put + moved
        first = self.queues[0]
        emitted = min(self.rate_per_s * STEP_MS / 1000, first.room)
        first.open_count, first.put = first.open_count + emitted, first.put + emitted


def _stage(name: str, kind: str, reads: str | None, writes: list[str]) -> dict[str, Any]:
    return {"name": name, "kind": kind, "processes": "auto", "per_node": None, "concurrency": 1, "rate": None, "where": None, "reads": reads,
            "ports": [{"queues": writes}]}


class World:
    """Nodes with slots, and lines that share them."""

    def __init__(self, slots: dict[str, int], lines: list[Line]) -> None:
        self.lines, self.slots, self.now_ms = lines, slots, 0
        self.sessions = [Session(name, "node", name, "boot", name, {"slots": count}, has_reported=True) for name, count in slots.items()]
        self.state: Any = SimpleNamespace(pipelines={line.name: line.state() for line in lines},
                                          queues={queue.name: queue for line in lines for queue in line.queues})
        self.rates = Rates()
        self.plan: Plan = {}
        self.working: list[tuple[int, dict[str, int]]] = [(0, {})]
        self.moves: list[tuple[int, int]] = []

    def run(self, until_ms: int) -> World:
        while self.now_ms < until_ms:
            if self.now_ms % 1000 == 0:
                self._replan()
            while len(self.working) > 1 and self.working[1][0] <= self.now_ms:
                self.working.pop(0)
            for line in self.lines:
                line.work(self.working[0][1])
                line.held_ms += STEP_MS * sum(count for stage, count in self.working[0][1].items() if stage.startswith(f"{line.name}/"))
            self.now_ms += STEP_MS
        return self

    def _replan(self) -> None:
        self.rates.sample(self.state, self.now_ms)
        measured = {queue.name: 1000.0 * line.service_ms[at] for line in self.lines for at, queue in enumerate(line.queues) if queue.done}
        for session in self.sessions:
            session.service_us = measured
        plan = plan_processes(self.slots, loads_of(self.state, self.sessions, self.rates, Planner()), self.plan, self.now_ms // 1000)
        stages = {(node, stage) for each in (plan, self.plan) for node, counts in each.items() for stage in counts}
        started = sum(max(0, plan.get(n, {}).get(s, 0) - self.plan.get(n, {}).get(s, 0)) for n, s in stages)
        self.moves.append((self.now_ms, started))
        self.plan = plan
        self.working.append((self.now_ms + START_MS, self.processes))

    @property
    def processes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for stages in self.plan.values():
            for stage, count in stages.items():
                found[stage] = found.get(stage, 0) + count
        return found

    def started_since(self, ms: int) -> int:
        return sum(count for at_ms, count in self.moves if at_ms >= ms)


node_slots = st.lists(st.integers(1, 16), min_size=1, max_size=5).map(lambda counts: {f"n{at}": count for at, count in enumerate(counts)})


@settings(max_examples=15, deadline=None)
@given(slots=node_slots, stages=st.integers(2, 5), slow=st.integers(0, 4), ms=st.sampled_from([10.0, 50.0]),
       maxsize=st.sampled_from([1_000, 10_000]))
def test_a_stage_that_is_ten_times_slower_than_the_rest_holds_the_free_slots_within_five_seconds(
    slots: dict[str, int], stages: int, slow: int, ms: float, maxsize: int
) -> None:
    line = Line("p", [ms / 10] * stages, maxsize)
    line.service_ms[slow % stages] = ms
    world = World(slots, [line]).run(5_000)
    assert world.processes[f"p/{slow % stages}"] >= max(1, _fair(sum(slots.values()), stages))


def _fair(slots: int, stages: int) -> int:
    """How many processes a stage has that takes ten times as long as each of the others, within a fifth."""
    return int(0.8 * min(slots - (stages - 1), slots * 10 / (9 + stages)))


@settings(max_examples=15, deadline=None)
@given(slots=node_slots, service_ms=st.lists(st.sampled_from([2.0, 5.0, 10.0, 40.0]), min_size=1, max_size=5),
       maxsize=st.sampled_from([1_000, 10_000]))
def test_processes_settle_and_every_stage_goes_on(slots: dict[str, int], service_ms: list[float], maxsize: int) -> None:
    line = Line("p", service_ms, maxsize)
    world = World(slots, [line]).run(30_000)
    before = [queue.done for queue in line.queues]
    world.run(90_000)
    total = sum(slots.values())
    assert world.started_since(30_000) <= max(4, total // 2), "processes come and go for nothing"
    gone_through_per_s = (line.queues[-1].done - before[-1]) / 60
    assert gone_through_per_s >= 0.6 * _ideal_per_s(service_ms, max(total, len(service_ms)))


def _ideal_per_s(service_ms: list[float], slots: int) -> float:
    """What the best whole numbers of processes give."""
    counts = [1] * len(service_ms)
    for _ in range(slots - len(counts)):
        worst = min(range(len(counts)), key=lambda at: counts[at] / service_ms[at])
        counts[worst] += 1
    return min(1000 * count / ms for count, ms in zip(counts, service_ms, strict=True))


@settings(max_examples=10, deadline=None)
@given(slots=node_slots.filter(lambda slots: sum(slots.values()) >= 2), first=st.sampled_from([2.0, 10.0, 100.0]),
       second=st.lists(st.sampled_from([2.0, 20.0]), min_size=1, max_size=2))
def test_two_pipelines_with_work_each_hold_two_fifths_of_the_slots_time(slots: dict[str, int], first: float, second: list[float]) -> None:
    lines = [Line("p", [first]), Line("q", second)]
    World(slots, lines).run(60_000)
    whole_ms = 60_000 * sum(slots.values())
    assert all(line.held_ms >= 0.4 * whole_ms for line in lines)
