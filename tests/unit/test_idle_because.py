"""Why a stage is idle, as `status` says it: each situation that people meet, and its line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.graph import Pipeline, Queue
from p2pcluster.core.idle import in_words
from p2pcluster.core.ranges import Fence
from p2pcluster.core.stages import sink, source, stage
from tests.leader import Leader


@source
def Numbers() -> object:
    yield 1


@source(every_s=60)
def Clock() -> object:
    return 1


@source(rate="2/s")
def Slowly() -> object:
    yield 1


@stage(processes=2)
def Work(x: object) -> object:
    return x


@stage(processes=2, rate="2/s")
def Paced(x: object) -> object:
    return x


@sink
def Keep(x: object) -> None:
    """Nothing."""


@stage(where="'gpu' in tags", processes=1)
def Train(x: object) -> object:
    return x


@sink(where="origin")
def AtHome(x: object) -> None:
    """Nothing."""


PLAIN = Pipeline("p", Queue("in") >> Work >> Queue("out", maxsize=3))
FED = Pipeline("p", Numbers >> Queue("numbers", maxsize=3) >> Keep)
RULED = Pipeline("p", Queue("in") >> Train >> AtHome)


class Scene(Leader):
    """A leader with a machine `a`, that came from there, and a pipeline that runs."""

    def __init__(self, pipeline: Pipeline = PLAIN, joins: bool = True, python: str | None = None, origin: str = "a") -> None:
        super().__init__()
        self.deploy(pipeline, origin=origin, python=python)
        if joins:
            self.join("a", tags=[], python="3.11.7")
            self.settle()
        self._puts = 0

    def carry(self) -> None:
        while self.node.has_ready():
            self.node.advance(self.node.ready())
        self.sent += [(session, item) for session, item in self.node.take_outbox() if isinstance(item, Message)]

    def runs(self, count: int = 1, stage: str = "Work") -> None:
        """The machine has so many processes of a stage."""
        self.node.sessions["a"].running = {f"p/{stage}": count}

    def ask(self, kind: str, **fields: Any) -> None:
        self.node.step("client", Message(kind, {**fields, "req": 7}), self.now_ms)
        self.carry()

    def put(self, queue: str, count: int = 1, **waits: int) -> None:
        self._puts += 1
        message = commands.put("client:x", 1, self._puts, [Port([f"p/{queue}"], lengths_blob([1] * count), b"x" * count)])
        message.fields["ports"][0].update(waits)
        self.node.step("client", message._replace(fields={**message.fields, "req": 8}), self.now_ms)
        self.carry()

    def take(self, lo: int, hi: int, node: str = "a", boot: str = "boot") -> None:
        self.node._propose(commands.take("p/in", [(lo, hi)], Fence(node, boot, 1)))
        self.carry()

    def fail(self, item_id: int) -> None:
        self.take(item_id, item_id + 1)
        self.node._propose(commands.fail("p/in", item_id, Fence("a", "boot", 1), {"type": "E", "text": "no"}, 30_000))
        self.carry()

    def why(self, stage: str = "Work") -> str | None:
        found: str | None = next(one["idle_because"] for one in self.node.status()["stages"] if one["name"] == stage)
        return found


Made = Callable[[], tuple[Scene, str]]


def no_run_was_started() -> tuple[Scene, str]:
    scene = Scene()
    scene.node.state.pipelines["p"].state = "new"
    return scene, "Work"


def the_run_is_done() -> tuple[Scene, str]:
    scene = Scene()
    scene.ask("close", pipeline="p", name="in")
    return scene, "Work"


def it_is_paused() -> tuple[Scene, str]:
    scene = Scene()
    scene.ask("pause", pipeline="p", stage="Work", reason="")
    return scene, "Work"


def its_pipeline_is_paused() -> tuple[Scene, str]:
    scene = Scene()
    scene.ask("pause", pipeline="p", stage=None, reason="")
    return scene, "Work"


def it_stopped_because_too_many_are_parked() -> tuple[Scene, str]:
    scene = Scene()
    scene.ask("pause", pipeline="p", stage="Work", reason="12 of its last 20 items are parked")
    return scene, "Work"


def the_source_has_ended() -> tuple[Scene, str]:
    scene = Scene(FED)
    scene.ask("close", pipeline="p", name="Numbers")
    scene.node.state.pipelines["p"].state = "running"  # its last items are on their way
    return scene, "Numbers"


def no_node_has_reported() -> tuple[Scene, str]:
    scene = Scene(joins=False)
    return scene, "Work"


def every_node_is_stopping() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in")
    scene.node.sessions["a"].is_draining = True
    return scene, "Work"


def a_module_is_missing() -> tuple[Scene, str]:
    scene = Scene()
    scene.node.sessions["a"].troubles = {"p/Work": "does not start: ModuleNotFoundError: No module named 'numpy'"}
    return scene, "Work"


def it_dies_at_start() -> tuple[Scene, str]:
    scene = Scene()
    scene.node.sessions["a"].troubles = {"p/Work": "does not start: its process exited with code 1: boom; tried again after 4 s"}
    return scene, "Work"


def no_node_satisfies_the_rule() -> tuple[Scene, str]:
    return Scene(RULED), "Train"


def the_origin_is_not_here() -> tuple[Scene, str]:
    return Scene(RULED, origin="desk"), "AtHome"


def the_python_is_not_admitted() -> tuple[Scene, str]:
    return Scene(python=">=3.13"), "Work"


def there_is_no_slot() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in")
    planned = scene.node.sessions["a"].planned
    assert planned is not None
    scene.node.sessions["a"].planned = {**planned, "processes": {}}
    return scene, "Work"


def the_queue_behind_it_is_full() -> tuple[Scene, str]:
    scene = Scene(FED)
    scene.put("numbers", 3)
    return scene, "Numbers"


def its_output_has_no_reader() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("out", 3)
    return scene, "Work"


def it_is_limited_by_its_rate() -> tuple[Scene, str]:
    scene = Scene(Pipeline("p", Queue("in") >> Paced >> Queue("out")))
    scene.put("in", 5)
    scene.runs(2, "Paced")
    pipeline = scene.node.state.pipelines["p"]
    pipeline.paced["Paced"] = (scene.node.raft.cluster_time_ms(scene.now_ms) + 500) * 1_000_000
    return scene, "Paced"


def a_source_is_limited_by_its_rate() -> tuple[Scene, str]:
    scene = Scene(Pipeline("p", Slowly >> Keep))
    scene.runs(1, "Slowly")
    pipeline = scene.node.state.pipelines["p"]
    pipeline.paced["Slowly"] = (scene.node.raft.cluster_time_ms(scene.now_ms) + 500) * 1_000_000
    return scene, "Slowly"


def its_next_tick_is_not_yet() -> tuple[Scene, str]:
    scene = Scene(Pipeline("p", Clock >> Keep))
    scene.runs(1, "Clock")
    scene.node._wall_ms = 1_000_000
    scene.node.state.pipelines["p"].ticks["Clock/0"] = 1_000_000 - 15_000
    return scene, "Clock"


def its_queue_is_empty() -> tuple[Scene, str]:
    return Scene(), "Work"


def its_queue_is_empty_and_some_are_parked() -> tuple[Scene, str]:
    scene = Scene(Pipeline("p", Queue("in") >> Work.named("Once") >> Queue("out")))
    scene.put("in", 1)
    for _ in range(4):
        scene.fail(1)
        scene.node._propose(Message("due", {"queue": "p/in", "ids": [1]}))
        scene.carry()
    return scene, "Once"


def it_waits_for_a_retry() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in", 2)
    scene.fail(1)
    scene.fail(2)
    return scene, "Work"


def it_waits_for_a_time() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in", 1, delay_ms=7_200_000)
    return scene, "Work"


def its_items_are_with_a_machine_that_is_away() -> tuple[Scene, str]:
    scene = Scene()
    scene.node.state.members["b"] = {"name": "shelf", "facts": {}}
    scene.put("in", 4)
    scene.take(1, 5, node="b")
    return scene, "Work"


def a_version_is_rolled_out() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in", 1)
    scene.deploy(PLAIN, origin="a", version="1" * 64)
    return scene, "Work"


def its_process_is_starting() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in", 1)
    return scene, "Work"


def all_are_in_hand() -> tuple[Scene, str]:
    scene = Scene()
    scene.put("in", 2)
    scene.runs(5)
    scene.take(1, 3)
    return scene, "Work"


def it_works() -> tuple[Scene, str | None]:
    scene = Scene()
    scene.put("in", 20)
    scene.runs(2)
    scene.take(1, 3)
    return scene, "Work"


SITUATIONS: dict[Callable[[], tuple[Scene, Any]], str | None] = {
    no_run_was_started: "no run was started",
    the_run_is_done: "run 1 is done",
    it_is_paused: "it is paused",
    its_pipeline_is_paused: "its pipeline is paused",
    it_stopped_because_too_many_are_parked: "it stopped by itself: 12 of its last 20 items are parked",
    the_source_has_ended: "the source has ended",
    no_node_has_reported: "no node has reported to the leader yet",
    every_node_is_stopping: "every node that is here is stopping",
    a_module_is_missing: "does not start: ModuleNotFoundError: No module named 'numpy' (on a)",
    it_dies_at_start: "does not start: its process exited with code 1: boom; tried again after 4 s (on a)",
    no_node_satisfies_the_rule: ("no node satisfies where=\"'gpu' in tags\": on a 'gpu' in tags fails (tags is []): "
                                "start a node that does, or deploy another rule"),
    the_origin_is_not_here: "it runs where the project came from (desk), and that node is not here",
    the_python_is_not_admitted: "no node here has a Python that its project is for (>=3.13)",
    there_is_no_slot: "no node has a free slot for it",
    the_queue_behind_it_is_full: "queue p/numbers is full",
    its_output_has_no_reader: "queue p/out is full, and no stage reads it: take from it",
    it_is_limited_by_its_rate: "its rate of 2/s lets the next one go in 0.5 s",
    a_source_is_limited_by_its_rate: "its rate of 2/s lets the next one go in 0.5 s",
    its_next_tick_is_not_yet: "its next tick is in 45 s",
    its_queue_is_empty: "its queue is empty",
    its_queue_is_empty_and_some_are_parked: "its queue is empty; 1 parked",
    it_waits_for_a_retry: "2 items wait for another try, the next in 30 s",
    it_waits_for_a_time: "1 item waits until a time, the next in 2 h",
    its_items_are_with_a_machine_that_is_away: "all of its 4 items are with shelf, and will come back if nothing is heard from there",
    a_version_is_rolled_out: "version 11111111 is being rolled out",
    its_process_is_starting: "its process is starting",
    all_are_in_hand: "all of its 2 items are in hand",
    it_works: None,
}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda made: made.__name__)
def test_status_says_why_a_stage_is_idle(situation: Callable[[], tuple[Scene, str]]) -> None:
    scene, name = situation()
    assert scene.why(name) == SITUATIONS[situation]


def test_each_line_is_one_that_a_person_can_read() -> None:
    for line in SITUATIONS.values():
        assert line is None or (line[0].islower() or line[0].isdigit()) and "\n" not in line and not line.endswith(".")


def test_a_stage_that_was_stopped_by_itself_is_an_alarm_that_says_what_to_do() -> None:
    scene, _ = it_stopped_because_too_many_are_parked()
    (alarm,) = scene.node.status()["alarms"]
    assert alarm == ("p/Work stopped by itself: 12 of its last 20 items are parked; to go on, run resume Work, "
                     "or deploy a version that is right")
    scene.ask("resume", pipeline="p", stage="Work")
    assert scene.node.status()["alarms"] == []


@pytest.mark.parametrize(("ms", "text"), [
    (-5, "0.0 s"), (400, "0.4 s"), (9_999, "10.0 s"), (10_000, "10 s"), (119_000, "119 s"), (120_000, "2 min"), (7_199_000, "119 min"),
    (7_200_000, "2 h"), (172_799_000, "47 h"), (172_800_000, "2 days"), (864_000_000, "10 days"),
])
def test_times_are_told_no_more_precisely_than_people_need(ms: int, text: str) -> None:
    assert in_words(ms) == text
