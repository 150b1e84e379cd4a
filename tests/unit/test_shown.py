"""`status`: the object has the promised shape, and people see it within 80 columns, in colours only where they are wanted."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest

from p2pcluster.core.codec import Message
from p2pcluster.shown import WIDTH, status_lines, wants_colour
from tests.status_schema import SCHEMA, mismatches
from tests.unit.test_idle_because import FED, PLAIN, RULED, SITUATIONS, Scene

COLOUR = re.compile(r"\x1b\[[0-9]+m")


def completed(scene: Scene) -> dict[str, Any]:
    """With what the shell adds."""
    status = scene.node.status()
    status["cluster"] |= {"id": "c" * 16, "name": "default"}
    status["leader"] |= {"name": "desk", "address": "127.0.0.1:47400"}
    for node in status["nodes"]:
        node["facts"] = {"cores": 2, "memory_gb": None, "name": "a", "os": "linux", "python": "3.11.7", "tags": ["gpu"], "address": None, "slots": 2}
    return status


@pytest.mark.parametrize("pipeline", [PLAIN, FED, RULED])
def test_the_object_of_status_json_has_the_shape_that_is_promised(pipeline: Any) -> None:
    scene = Scene(pipeline)
    scene.ask("pause", pipeline="p", stage=None, reason="")
    assert list(mismatches(completed(scene))) == []


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda made: made.__name__)
def test_it_has_that_shape_in_each_situation_and_fits_80_columns(situation: Any) -> None:
    status = completed(situation()[0])
    assert list(mismatches(status)) == []
    lines = status_lines(status)
    assert all(len(line) <= WIDTH for line in lines)
    said = " ".join(" ".join(lines).split())
    assert SITUATIONS[situation] is None or SITUATIONS[situation] in said, "what is idle says why, to the end of the sentence"


def test_a_stage_says_what_it_was_scaled_to() -> None:
    scene = Scene()
    for processes, text in ((3, "scaled to 3 processes"), ("auto", "scaled to a share of the free slots")):
        scene.ask("scale", pipeline="p", stage="Work", processes=processes)
        status = completed(scene)
        assert list(mismatches(status)) == [] and f"    {text}" in status_lines(status)


@pytest.mark.parametrize(("change", "said"), [
    (lambda s: s["cluster"].pop("term"), "status.cluster.term is missing"),
    (lambda s: s.update(more=1), "status.more is not in the schema"),
    (lambda s: s["pipelines"][0].update(state="new"), "status.pipelines[0].state is 'new' and not running|paused|done"),
    (lambda s: s["stages"][0].update(done=True), "status.stages[0].done is True and not int"),
    (lambda s: s["queues"][0].update(ready=None), "status.queues[0].ready is None and not int"),
    (lambda s: s["alarms"].append(3), "status.alarms[0] is 3 and not str"),
    (lambda s: s.update(nodes={}), "status.nodes is no list"),
])
def test_another_shape_is_noticed(change: Any, said: str) -> None:
    status = copy.deepcopy(completed(Scene()))
    change(status)
    assert list(mismatches(status)) == [said]


def test_the_schema_names_what_the_contract_names() -> None:
    assert list(SCHEMA) == ["cluster", "leader", "nodes", "pipelines", "stages", "queues", "network", "alarms"]


# ---- on a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "environment", "wanted"), [
    (Terminal(), {}, True), (Terminal(), {"TERM": "xterm"}, True), (Terminal(), {"NO_COLOR": ""}, True), (io.StringIO(), {}, False),
    (Terminal(), {"NO_COLOR": "1"}, False), (Terminal(), {"TERM": "dumb"}, False),
])
def test_colours_are_for_terminals_whose_user_wants_them(stream: io.StringIO, environment: dict[str, str], wanted: bool) -> None:
    assert wants_colour(stream, environment) is wanted


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda made: made.__name__)
def test_colours_change_nothing_but_colours(situation: Any) -> None:
    status = completed(situation()[0])
    coloured = status_lines(status, colour=True)
    assert any(COLOUR.search(line) for line in coloured)
    assert [COLOUR.sub("", line) for line in coloured] == status_lines(status)


def test_long_names_are_cut_and_long_alarms_go_on_below() -> None:
    scene = Scene()
    status = completed(scene)
    status["nodes"][0]["name"] = "n" * 200
    status["leader"]["name"] = "l" * 200
    status["pipelines"][0]["name"] = "p" * 200
    for one in (*status["stages"], *status["queues"]):
        one["pipeline"], one["name"] = "p" * 200, "s" * 200
    status["alarms"] = ["a word " * 40 + "and the end"]
    lines = status_lines(status)
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[-1].endswith("and the end") and lines[-1].startswith("  ")
    assert any(line.startswith("node nnn") and line.endswith("alive") for line in lines)


def test_a_pipeline_that_has_not_run_says_so() -> None:
    scene = Scene()
    scene.node.state.pipelines["p"].run = 0
    assert any(line.startswith("p: has not run, version") for line in status_lines(completed(scene)))


def test_who_pauses_a_pipeline_sees_that(capsys: pytest.CaptureFixture[str]) -> None:
    scene = Scene()
    scene.node.step("client", Message("pause", {"pipeline": "p", "stage": None, "reason": "", "req": 1}), scene.now_ms)
    scene.carry()
    lines = status_lines(completed(scene))
    assert any(line.startswith("p: run 1 paused, version") for line in lines) and "    idle: its pipeline is paused" in lines
