"""When a user's placement is asked, which answers count, and what holds without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pcluster import config
from p2pcluster.core.graph import Pipeline, Queue
from p2pcluster.core.planner import Question
from p2pcluster.core.stages import sink, source, stage
from tests.leader import Leader

AGAIN_MS = int(1000 * config.PLACEMENT_AGAIN_S)


@source
def Numbers() -> object:
    yield 1


@stage(per_node=4)
def Train(x: object) -> object:
    return x


@stage(processes=2, where="'gpu' in tags")
def Draw(x: object) -> object:
    return x


@sink
def Keep(x: object) -> None:
    """Nothing."""


PIPELINE = Pipeline("p", Numbers >> Train >> Draw >> Keep, placement=lambda nodes, stages: {})
DEFAULT = {"a": {"p/Train": 1, "p/Keep": 1}, "b": {"p/Draw": 2}}


class Asked(Leader):
    """A leader with two machines, `a` and `b`, whose pipeline has a placement; the test answers for it."""

    def __init__(self, pipeline: Pipeline = PIPELINE) -> None:
        super().__init__()
        self.deploy(pipeline, origin="a")
        self.join("b", tags=["gpu"], cores=8, python="3.11.7")
        self.join("a", tags=[], cores=4, python="3.11.7")
        self.settle()

    def question(self) -> Question:
        (question,) = self.node.take_questions()
        return question

    def answer(self, question: Question, plan: Any = None, error: str | None = None) -> None:
        self.node.answer(question, {"plan": plan} if error is None else {"error": error}, self.now_ms)
        self.settle()

    def plans(self) -> dict[str, dict[str, int]]:
        return {name: self.processes(name) for name, session in self.node.sessions.items() if session.kind == "node"}

    def alarms(self) -> list[str]:
        found: list[str] = self.node.status()["alarms"]
        return found


def test_it_is_asked_about_nodes_and_stages_in_plain_words() -> None:
    question = Asked().question()
    facts = {"memory_gb": None, "os": None, "python": "3.11.7", "address": None, "slots": 2}
    assert question.nodes == [
        {**facts, "name": "a", "cores": 4, "tags": [], "origin": True},
        {**facts, "name": "b", "cores": 8, "tags": ["gpu"], "origin": False},
    ]
    assert question.stages == [
        {"name": "Train", "kind": "stage", "processes": "auto", "per_node": 4, "nodes": ["a", "b"]},
        {"name": "Draw", "kind": "stage", "processes": 2, "per_node": None, "nodes": ["b"]},
        {"name": "Keep", "kind": "sink", "processes": 1, "per_node": None, "nodes": ["a", "b"]},
    ]


def test_until_it_has_answered_the_default_plan_holds_and_its_answer_replaces_that() -> None:
    leader = Asked()
    assert leader.plans() == DEFAULT and leader.alarms() == []
    leader.answer(leader.question(), {"a": {"Train": 1, "Keep": 0}, "b": {"Train": 3, "Keep": 2}})
    assert leader.plans() == {"a": {"p/Train": 1}, "b": {"p/Train": 3, "p/Draw": 2, "p/Keep": 2}}, "what is left out is as without it"
    assert leader.alarms() == []


def test_it_is_asked_again_only_when_nodes_version_or_run_change() -> None:
    leader = Asked()
    leader.answer(leader.question(), {"b": {"Train": 4}})
    leader.pass_time(2 * AGAIN_MS)
    assert leader.node.take_questions() == []
    leader.node.close_session("a")
    leader.join("a", tags=[], cores=4, python="3.11.7")
    leader.settle()
    assert leader.node.take_questions() == [], "it is the same node"
    leader.join("c", tags=[], cores=1, python="3.11.7")
    leader.settle()
    assert [node["name"] for node in leader.question().nodes] == ["a", "b", "c"]
    assert leader.processes("b")["p/Train"] == 4, "the former answer holds until there is another"
    leader.node.close_session("c")
    leader.settle()
    assert [node["name"] for node in leader.question().nodes] == ["a", "b"]
    leader.deploy(PIPELINE, version="1" * 64, origin="a")
    leader.settle()
    assert leader.question().version == "1" * 64


def test_an_answer_to_a_question_that_was_replaced_counts_for_nothing() -> None:
    leader = Asked()
    former = leader.question()
    leader.join("c", tags=[], python="3.11.7")
    leader.settle()
    leader.answer(former, {"a": {"Train": 4}})
    leader.answer(former, error="it raised SystemExit")
    assert leader.processes("a").get("p/Train", 0) < 4 and leader.alarms() == []
    leader.answer(leader.question(), {"c": {"Train": 2}})
    assert leader.processes("c") == {"p/Train": 2}


def test_where_the_chosen_nodes_are_gone_the_default_plan_holds_for_that_stage() -> None:
    leader = Asked()
    leader.answer(leader.question(), {"b": {"Train": 4}, "a": {"Keep": 2}})
    leader.node.close_session("b")
    leader.settle()
    assert leader.plans() == {"a": {"p/Train": 1, "p/Keep": 2}}


WRONG = {
    "no dict": (["a"], "it does not return {node: {stage: processes}}"),
    "no dict inside": ({"a": 3}, "it does not return {node: {stage: processes}}"),
    "unknown node": ({"c": {"Train": 1}}, "it names a node 'c', and there are a, b"),
    "unknown stage": ({"a": {"Trian": 1}}, "it names a stage 'Trian', and those that it may place are Train, Draw, Keep"),
    "source": ({"a": {"Numbers": 1}}, "it names a stage 'Numbers', and those that it may place are"),
    "negative": ({"a": {"Train": -1}}, "-1 processes of Train on a is no number from 0"),
    "fraction": ({"a": {"Train": 1.5}}, "1.5 processes of Train on a"),
    "whole float": ({"a": {"Train": 1.0}}, "1.0 processes of Train on a"),
    "text": ({"a": {"Train": "2"}}, "'2' processes of Train on a"),
    "flag": ({"a": {"Train": True}}, "True processes of Train on a"),
    "too many": ({"a": {"Train": 10**9}}, "1000000000 processes of Train on a"),
    "per_node": ({"a": {"Train": 5}}, "it puts 5 processes of Train on a, and its per_node= is 4"),
    "where": ({"a": {"Draw": 1}}, "it puts Draw on a, where its where= does not hold"),
    "nowhere": ({"a": {"Train": 0, "Keep": 1}, "b": {"Train": 0}}, "it gives Train no process anywhere"),
}


@pytest.mark.parametrize("plan", [plan for plan, _ in WRONG.values()], ids=WRONG)
def test_a_wrong_answer_is_an_alarm_and_the_default_plan(plan: Any) -> None:
    told = next(told for wrong, told in WRONG.values() if wrong is plan)
    leader = Asked()
    question = leader.question()
    leader.answer(question, plan)
    assert leader.plans() == DEFAULT
    (alarm,) = leader.alarms()
    assert alarm.startswith(f"p: its placement is not followed, because {told}") and "asked again after 60 s" in alarm
    leader.pass_time(AGAIN_MS - 10_000)
    assert leader.node.take_questions() == []
    leader.pass_time(10_000)
    assert leader.question() == question, "asked again in its time"
    assert leader.alarms() == [alarm], "until it is known to be better"
    leader.answer(question, {"b": {"Train": 4}})
    assert leader.alarms() == [] and leader.processes("b")["p/Train"] == 4


def test_what_a_function_says_of_its_failure_is_cut_to_one_line() -> None:
    leader = Asked()
    leader.answer(leader.question(), error="it raised X:\n\x1b[31m" + "y" * 5000)
    (alarm,) = leader.alarms()
    assert alarm.isprintable() and len(alarm) < 600 and "it raised X: ?[31myyy" in alarm


def test_a_failure_ends_what_an_earlier_answer_said() -> None:
    leader = Asked()
    leader.answer(leader.question(), {"b": {"Train": 4}})
    leader.join("c", tags=[], slots=0, python="3.11.7")
    leader.settle()
    leader.answer(leader.question(), error="it raised KeyError: 'c'")
    assert leader.processes("b")["p/Train"] < 4 and len(leader.alarms()) == 1


def test_a_node_that_the_project_does_not_admit_is_not_there_for_it() -> None:
    leader = Asked()
    leader.deploy(PIPELINE, origin="a", version="1" * 64, python="==3.11")
    leader.join("c", tags=[], python="3.12.1")
    leader.settle()
    assert [node["name"] for node in leader.node.take_questions()[-1].nodes] == ["a", "b"]


def test_nodes_of_one_name_are_told_apart() -> None:
    leader = Asked()
    leader.node.take_questions()
    for name in ("c", "d"):
        leader.join(name, python="3.11.7")
        leader.node.sessions[name].name = "twin"
    leader.settle()
    question = leader.question()
    assert [node["name"] for node in question.nodes] == ["a", "b", "twin c", "twin d"]
    leader.answer(question, {"twin d": {"Train": 2}})
    assert (leader.processes("c").get("p/Train"), leader.processes("d")["p/Train"]) == (None, 2)


def test_equal_nodes_make_an_equal_question_in_whatever_order_they_came() -> None:
    one, other = Asked(), Asked()
    other.node.sessions = dict(reversed(other.node.sessions.items()))
    assert replace(one.question(), run=1) == replace(other.question(), run=1)


def test_a_pipeline_without_one_asks_nothing() -> None:
    assert Asked(Pipeline("p", Numbers >> Train >> Queue("out"))).node.take_questions() == []


def test_a_new_leader_asks_for_itself() -> None:
    leader = Asked()
    leader.answer(leader.question(), error="it raised SystemExit")
    leader.node.may_serve = False
    leader.pass_time()
    leader.node.may_serve = True
    leader.pass_time()
    leader.join("a", tags=["gpu"], python="3.11.7")
    leader.settle()
    assert leader.alarms() == [] and [node["name"] for node in leader.question().nodes] == ["a"]
