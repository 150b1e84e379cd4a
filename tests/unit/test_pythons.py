"""Which Pythons a project admits, and what a cluster does with a node that has another one: it gets none of the project's stages."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcluster.core import pythons
from p2pcluster.core.commands import check
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.stages import sink, source, stage
from p2pcluster.errors import RemoteProtocolError
from tests import hostile
from tests.leader import Leader


@pytest.mark.parametrize(("requirement", "admitted", "others"), [
    (">=3.11", ["3.11.0", "3.11.7", "3.12.0rc1", "4.0.0"], ["3.10.13", "2.7.18"]),
    ("==3.11", ["3.11.0", "3.11.7", "3.11.9+"], ["3.12.0", "3.1.1", "3.110.0"]),
    ("==3.11.7", ["3.11.7"], ["3.11.6", "3.11.70", "3.12.7"]),
    (">3.11", ["3.12.0", "3.13.1"], ["3.11.7", "3.11.99"]),
    ("<=3.12", ["3.12.9", "3.11.0"], ["3.13.0a1"]),
    (" >= 3.11 , < 3.14,!=3.12.0", ["3.11.7", "3.12.1", "3.13.0"], ["3.12.0", "3.14.0", "3.10.0"]),
    ("!=3.12", ["3.11.7", "3.13.0"], ["3.12.0", "3.12.1"]),
])
def test_a_requirement_admits_what_it_says_and_two_numbers_stand_for_all_releases(
        requirement: str, admitted: list[str], others: list[str]) -> None:
    assert pythons.is_requirement(requirement)
    assert [version for version in admitted if not pythons.admits(requirement, version)] == []
    assert [version for version in others if pythons.admits(requirement, version)] == []


@pytest.mark.parametrize("text", ["", "3.11", ">=3", ">=3.11.1.1", "~=3.11", "==3.11.*", "===3.11", ">=3.11,", ">=3.11;<3.12",
                                  ">=three.11", ">=3.11rc1", "==3.11\n.7", ">=3.99999999", ">=3.11" + ",>=3.11" * 100, None, 3.11,
                                  [">=3.11"], {"a": 1}])
def test_anything_else_is_none(text: object) -> None:
    assert not pythons.is_requirement(text)


@pytest.mark.parametrize("version", [None, 3, "", "three", "3", ["3.11.7"], "3.99999.1"])
def test_a_version_that_cannot_be_read_is_not_admitted(version: object) -> None:
    assert not pythons.admits(">=2.0", version)


def test_without_a_setting_it_is_the_minor_version_of_the_deployment() -> None:
    assert pythons.same_minor("3.13.0rc2+") == "==3.13"


# ---- in a cluster


@source
def Numbers() -> object:
    yield 1


@stage(processes=2)
def Work(x: object) -> object:
    return x


@sink
def Keep(x: object) -> None:
    """Nothing."""


def two_nodes(python: str | None, **versions: str) -> Leader:
    """Nodes of these names and versions, and a project that came from node `a`."""
    leader = Leader()
    leader.deploy(Pipeline("p", Numbers >> Work >> Keep, on_done=lambda: None), origin="a", python=python)
    for name, version in versions.items():
        leader.join(name, python=version)
    leader.settle()
    return leader


def test_a_node_that_is_not_admitted_gets_no_stage_and_status_says_what_to_write() -> None:
    leader = two_nodes("==3.11", a="3.12.1", b="3.11.7")
    assert leader.processes("a") == {}
    assert leader.processes("b") == {"p/Work": 2, "p/Keep": 1}
    assert leader.owners() == {"b"}
    (alarm,) = leader.node.status()["alarms"]
    assert "\n" not in alarm
    for part in ("p: ", "a (Python 3.12.1)", "==3.11", 'python = ">=3.11"', "[tool.p2pcluster]", "pyproject.toml", "deploy"):
        assert part in alarm, alarm


def test_where_no_node_is_admitted_everything_waits_and_says_why() -> None:
    leader = two_nodes("==3.11", a="3.12.1", b="3.13.0")
    assert (leader.processes("a"), leader.processes("b"), leader.owners()) == ({}, {}, set())
    status = leader.node.status()
    (alarm,) = status["alarms"]
    assert "a (Python 3.12.1), b (Python 3.13.0)" in alarm
    assert {"==3.11" in one["idle_because"] for one in status["stages"]} == {True}
    leader.join("c", python="3.11.0")
    leader.settle()
    assert leader.processes("c") == {"p/Work": 2, "p/Keep": 1} and leader.owners() == {"c"}


@pytest.mark.parametrize("python", [">=3.11", None])
def test_a_project_that_admits_them_and_one_of_an_older_version_run_on_all(python: str | None) -> None:
    leader = two_nodes(python, a="3.12.1", b="3.11.7")
    assert leader.processes("a") == {"p/Work": 1, "p/Keep": 1} and leader.processes("b") == {"p/Work": 1}
    assert leader.owners() == {"a"}, "where the project came from"
    assert leader.node.status()["alarms"] == []


def test_the_end_of_a_run_is_told_to_a_node_that_is_admitted() -> None:
    assert two_nodes("==3.11", a="3.12.1", b="3.11.7").runs_on_done() == {"b"}
    assert two_nodes("==3.12", a="3.12.1", b="3.11.7").runs_on_done() == {"a"}
    assert two_nodes("==3.10", a="3.12.1", b="3.11.7").runs_on_done() == set()


@pytest.mark.parametrize("python", ["~=3.11", 3, [], ""])
def test_a_deployment_with_another_text_is_refused(python: Any) -> None:
    deploy = hostile.deploying()[1]
    check(deploy)
    with pytest.raises(RemoteProtocolError):
        check(deploy._replace(fields={**deploy.fields, "project": {**deploy.fields["project"], "python": python}}))
