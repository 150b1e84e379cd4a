"""pause, resume and scale: what they do to a leader's grants and plans, to a machine's sources, and what outlives what."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcluster.core import controls
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob, put
from p2pcluster.core.executor import Executor, Say, Send, Start, ToLeader
from p2pcluster.core.graph import Pipeline, Queue
from p2pcluster.core.queues import State
from p2pcluster.core.rows import Row
from p2pcluster.core.stages import sink, source, stage
from p2pcluster.core.tables import TABLES
from tests import plans
from tests.leader import Leader


@source
def Numbers() -> object:
    yield 1


@stage(processes=3)
def Work(x: object) -> object:
    return x


@stage(processes=2)
def Again(x: object) -> object:
    return x


@sink
def Keep(x: object) -> None:
    """Nothing."""


PIPELINE = Pipeline("p", Numbers >> Work >> Keep, Queue("in") >> Again >> Queue("out"))
WITHOUT_WORK = Pipeline("p", Numbers >> Keep, Queue("in") >> Again >> Queue("out"))


class Led(Leader):
    """A leader with one machine that would hold four items of each queue."""

    def __init__(self) -> None:
        super().__init__()
        self.granted: list[tuple[str, int, int]] = []
        self.deploy(PIPELINE, origin="a")
        self.join("a")
        self.settle()
        self.node.step("a", Message("window", {"queues": {"p/Work": 4, "p/Keep": 4, "p/in": 4}}), self.now_ms)
        self._puts = 0

    def carry(self) -> None:
        while self.node.has_ready():
            self.node.advance(self.node.ready())
        for session, item in self.node.take_outbox():
            if isinstance(item, Message):
                self.sent.append((session, item))
            else:
                self.granted += [(item.queue, lo, hi) for _, lo, hi in item.pieces]

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.node.step("client", Message(kind, {"pipeline": "p", **fields, "req": 7}), self.now_ms)
        self.carry()
        return next(message.fields for session, message in reversed(self.sent) if session == "client")

    def pause(self, stage: str | None = None, reason: str = "") -> dict[str, Any]:
        return self.ask("pause", stage=stage, reason=reason)

    def resume(self, stage: str | None = None) -> dict[str, Any]:
        return self.ask("resume", stage=stage)

    def put(self, count: int) -> None:
        self._puts += 1
        message = put("client:x", 1, self._puts, [Port(["p/in"], lengths_blob([1] * count), b"x" * count)])
        self.node.step("client", message._replace(fields={**message.fields, "req": 8}), self.now_ms)
        self.carry()

    def state(self) -> str:
        (pipeline,) = self.node.status()["pipelines"]
        return str(pipeline["state"])


@pytest.mark.parametrize("named", ["Again", None])
def test_a_paused_stage_is_granted_nothing_until_it_is_resumed(named: str | None) -> None:
    leader = Led()
    assert leader.pause(named)["result"] == "ok"
    leader.put(2)
    leader.settle()
    assert leader.granted == []
    assert leader.processes("a")["p/Again"] == 2, "its processes stay"
    assert leader.resume(named)["result"] == "ok"
    assert leader.granted == [("p/in", 1, 3)]


def test_who_takes_from_a_queue_of_a_paused_pipeline_is_served() -> None:
    leader = Led()
    leader.pause()
    leader.put(1)
    leader.node.step("client", Message("take", {"queue": "p/in", "count": 5, "req": 9}), leader.now_ms)
    leader.carry()
    assert leader.granted == [("p/in", 1, 2)]


def test_a_paused_pipeline_says_so_and_a_paused_stage_leaves_it_running() -> None:
    leader = Led()
    assert leader.state() == "running"
    leader.pause("Work")
    assert leader.state() == "running"
    leader.pause()
    assert leader.state() == "paused"
    assert leader.resume() == {"req": 7, "kind": "resume", "result": "ok", "left": ["Work"]}
    assert leader.resume() == {"req": 7, "kind": "resume", "result": "already", "left": ["Work"]}
    assert leader.state() == "running"


def test_names_that_there_are_not_are_refused_and_a_source_is_not_scaled() -> None:
    leader = Led()
    assert leader.pause("Nobody")["code"] == "unknown_name"
    assert leader.resume("Nobody")["code"] == "unknown_name"
    assert leader.ask("scale", stage="Nobody", processes=2)["code"] == "unknown_name"
    assert leader.ask("scale", stage="Numbers", processes=2)["code"] == "source"
    assert leader.ask("pause", pipeline="none", stage=None, reason="")["code"] == "unknown_pipeline"


def test_a_source_that_is_paused_before_it_has_a_process_gets_none_until_it_is_resumed() -> None:
    leader = Leader()
    leader.deploy(PIPELINE, origin="a")
    leader.node.step("client", Message("pause", {"pipeline": "p", "stage": "Numbers", "reason": "", "req": 1}), leader.now_ms)
    leader.join("a")
    leader.settle()
    assert leader.owners() == set()
    leader.node.step("client", Message("resume", {"pipeline": "p", "stage": "Numbers", "req": 1}), leader.now_ms)
    leader.settle()
    assert leader.owners() == {"a"}


def test_scale_goes_over_the_code_until_it_is_taken_back() -> None:
    leader = Led()
    assert leader.processes("a")["p/Work"] == 3
    leader.ask("scale", stage="Work", processes=5)
    leader.settle()
    assert leader.processes("a")["p/Work"] == 5
    leader.ask("scale", stage="Work", processes="auto")
    leader.settle()
    assert leader.processes("a")["p/Work"] < 3
    leader.ask("scale", stage="Work", processes=None)
    leader.settle()
    assert leader.processes("a")["p/Work"] == 3


def test_scale_goes_over_a_placement_function_too() -> None:
    leader = Leader()
    leader.deploy(Pipeline("p", Numbers >> Work >> Keep, placement=lambda nodes, stages: {}), origin="a")
    leader.join("a")
    leader.settle()
    (question,) = leader.node.take_questions()
    leader.node.answer(question, {"plan": {"a": {"Work": 1}}}, leader.now_ms)
    leader.settle()
    assert leader.processes("a")["p/Work"] == 1
    leader.node.step("client", Message("scale", {"pipeline": "p", "stage": "Work", "processes": 4, "req": 1}), leader.now_ms)
    leader.settle()
    assert leader.processes("a")["p/Work"] == 4


def test_what_a_person_said_holds_in_a_new_version_and_what_a_stage_did_by_itself_does_not() -> None:
    leader = Led()
    leader.pause("Again")
    leader.pause("Work", "half of its items are parked")
    leader.ask("scale", stage="Work", processes=4)

    def controls_after(pipeline: Pipeline, version: str) -> tuple[dict[str, str], dict[str, int | str]]:
        leader.deploy(pipeline, origin="a", version=version * 64)
        found = leader.node.state.pipelines["p"]
        if found.rollout is not None:
            leader.node._propose(Message("rolled_out", {"pipeline": "p", "rollout": found.rollout.number}))
            leader.carry()
        found = leader.node.state.pipelines["p"]
        return found.paused, found.scaled

    assert controls_after(PIPELINE, "0") == ({"Again": "", "Work": "half of its items are parked"}, {"Work": 4}), "it is the same version"
    assert controls_after(PIPELINE, "1") == ({"Again": ""}, {"Work": 4})
    leader.pause("Work")
    assert controls_after(PIPELINE, "2") == ({"Again": "", "Work": ""}, {"Work": 4})
    assert controls_after(WITHOUT_WORK, "3") == ({"Again": ""}, {})
    assert controls_after(PIPELINE, "4") == ({"Again": ""}, {}), "the stage was gone for a while"


def test_a_persons_pause_stands_over_that_of_a_stage_itself() -> None:
    leader = Led()
    leader.pause("Work", "half of its items are parked")
    assert leader.pause("Work")["result"] == "ok"
    assert leader.pause("Work", "more are parked")["result"] == "already"
    assert leader.node.state.pipelines["p"].paused == {"Work": ""}


def test_an_older_journals_pipeline_is_neither_paused_nor_scaled() -> None:
    leader = Led()
    (row,) = leader.node.state.all_rows()["projects"].values()
    assert row is not None
    import json

    old: Row = (*row[:-1], json.dumps({name: value for name, value in json.loads(row[-1]).items() if name not in ("paused", "scaled")}))
    state = State()
    for table in TABLES:
        state.load(table, [("p", *old)] if table == "projects" else [])
    assert (state.pipelines["p"].paused, state.pipelines["p"].scaled) == ({}, {})


# ---- a machine's sources


class Machine:
    """A machine that was assigned a source, whose process is told what `told` lists."""

    def __init__(self, **paused: str) -> None:
        self.executor = Executor("here")
        self.plan(**paused)
        fields = {"pipeline": "p", "stage": "Numbers", "shard": 0, "producer": "source:p/1/Numbers/0", "epoch": 1, "seq": 0, "count": 0, "hash": ""}
        self.executor.on_leader(Message("assigned", fields), 0)
        (self.key,) = [action.key for action in self.executor.take_actions() if isinstance(action, Start)]

    def plan(self, **paused: str) -> None:
        names = {"all" if name == "" else name for name in paused}
        assert names == set(paused)
        said = {"" if name == "all" else name: why for name, why in paused.items()}
        self.executor.on_leader(plans.plan(plans.planned(PIPELINE.manifest(), paused=said)), 0)

    def told(self) -> list[str]:
        return [action.message.kind for action in self.executor.take_actions() if isinstance(action, Send) and action.key == self.key]


def test_a_source_process_is_told_of_a_pause_once_and_keeps_running() -> None:
    machine = Machine()
    machine.executor.on_message(machine.key, Message("ready", {}), 1)
    assert machine.told() == ["begin"]
    machine.plan(Numbers="")
    machine.plan(Numbers="", all="")
    assert machine.told() == ["pause"]
    machine.plan(all="")
    machine.executor.tick(5, {})
    assert machine.told() == []
    machine.plan(Work="")
    assert machine.told() == ["resume"]


def test_a_source_that_starts_while_it_is_paused_hears_that_before_it_begins() -> None:
    machine = Machine(Numbers="")
    assert machine.told() == []
    machine.executor.on_message(machine.key, Message("ready", {}), 1)
    assert machine.told() == ["pause", "begin"]


def test_what_waits_on_a_machine_for_a_stage_that_is_paused_goes_back() -> None:
    executor = Executor("here")

    def plan(**paused: str) -> None:
        executor.on_leader(plans.plan(plans.planned(PIPELINE.manifest(), paused=paused), Again=1), 0)

    def asked() -> list[Any]:
        actions = executor.take_actions()
        return [action.message.fields["ranges"] for action in actions if isinstance(action, ToLeader) and action.message.kind == "release"]

    plan()
    (key,) = [action.key for action in executor.take_actions() if isinstance(action, Start)]
    executor.on_message(key, Message("ready", {}), 0)
    grant = {"queue": "p/in", "pieces": [[1, 6, 1, None]], "fence": ["here", "boot", 1], "deliveries": {}, "version": "v"}
    executor.on_leader(Message("grant", grant, (lengths_blob([1] * 5), b"x" * 5)), 0)
    assert asked() == []
    plan(Again="")
    assert asked() == [[[2, 6]]], "the first one runs and is finished"


# ---- in words


def test_what_changed_is_said_in_a_line_each() -> None:
    before: dict[str, Any] = {"paused": {"B": ""}, "scaled": {"A": 2, "B": 3}}
    after: dict[str, Any] = {"paused": {"": "", "A": "too many are parked"}, "scaled": {"A": 1, "C": "auto"}}
    assert list(controls.changes("p", before, after)) == [
        "p: every stage is paused; to go on, run resume",
        "p: stage A is paused: too many are parked; to go on, run resume A",
        "p: stage B is not paused any more",
        "p: stage A is scaled to 1 process",
        "p: stage C is scaled to a share of the free slots",
        "p: stage B has as many processes as the code says",
    ]
    assert list(controls.changes("p", after, after)) == []
    assert len(list(controls.changes("p", None, after))) == 4


def test_the_terminal_says_it() -> None:
    machine = Machine()
    machine.plan(Numbers="")
    assert [action.text for action in machine.executor.take_actions() if isinstance(action, Say)] == [
        "p: stage Numbers is paused; to go on, run resume Numbers"]


# ---- alarms


def test_an_alarm_that_lasts_is_told_to_each_machine_once_and_one_that_passes_is_not() -> None:
    leader = Led()

    def told() -> list[list[str]]:
        return [message.fields["texts"] for session, message in leader.sent if session == "a" and message.kind == "alarms"]

    leader.pause("Work", "12 of its last 20 items are parked")
    leader.pass_time(1000)
    leader.resume("Work")
    for _ in range(5):
        leader.pass_time(1000)
    assert told() == []
    leader.pause("Work", "12 of its last 20 items are parked")
    for _ in range(6):
        leader.pass_time(1000)
    leader.node.state.pipelines["p"].paused["Work"] = "13 of its last 20 items are parked"
    for _ in range(6):
        leader.pass_time(1000)
    (texts,) = told()
    assert texts == [leader.node.status()["alarms"][0].replace("13", "12")]
    leader.resume("Work")
    leader.pass_time(1000)
    leader.pass_time(1000)
    assert told()[1:] == [[]]


def test_a_terminal_shows_an_alarm_when_it_is_new() -> None:
    machine = Machine()

    def said(*texts: str) -> list[str]:
        machine.executor.on_leader(Message("alarms", {"texts": list(texts)}), 0)
        return [action.text for action in machine.executor.take_actions() if isinstance(action, Say)]

    assert said("queue p/x has 3 items and no stage reads it") == ["alarm: queue p/x has 3 items and no stage reads it"]
    assert said("queue p/x has 40 items and no stage reads it", "p/A: no node") == ["alarm: p/A: no node"]
    assert said("p/A: no node") == []
    assert said("queue p/x has 5 items and no stage reads it", "p/A: no node") == ["alarm: queue p/x has 5 items and no stage reads it"]
