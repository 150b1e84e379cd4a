"""What a node brings: the project is packed whole, or not at all."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pcluster.bundle import find_project
from p2pcluster.core.codec import Message
from p2pcluster.errors import ProjectError
from p2pcluster.offering import Offer, Offering, changes, pack_project, project_record


def test_a_project_is_packed_with_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("x = 1\n")
    project = find_project(str(tmp_path), tmp_path)
    assert project is not None
    assert "pipeline.py" in pack_project(project).files


def test_a_pipeline_that_git_ignores_is_said_and_not_left_behind(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("pipeline.py\n")
    (tmp_path / "pipeline.py").write_text("x = 1\n")
    project = find_project(str(tmp_path), tmp_path)
    assert project is not None
    with pytest.raises(ProjectError, match="pipeline.py would not be shipped"):
        pack_project(project)


def offering_of(folder: Path, asked: list[tuple[Message, Any]], offer: Offer | None = None) -> Offering:
    """An offer that was packed, and what it asks of the leader with whom it tells the answer."""
    (folder / "pipeline.py").write_text("from p2pcluster import Pipeline, Queue, stage\n\npipeline = Pipeline('p', Queue('in') >> stage(print))\n")
    project = find_project(str(folder), folder)
    assert project is not None
    made = Offering(offer or Offer(project), HERE, folder / "bundles", False, lambda message, hears: asked.append((message, hears)), lambda _: None)
    made.offer = replace(made.offer, project=project)
    made.prepare_beside(lambda: None)
    assert made._thread is not None
    made._thread.join(60)
    return made


def test_a_deployment_whose_parts_are_gone_or_that_is_refused_is_begun_again(tmp_path: Path) -> None:
    asked: list[tuple[Message, Any]] = []
    made = offering_of(tmp_path, asked)
    for code in ("parts_missing", "moved"):
        made.begin()
        (_, hears_project), asked[:] = asked[0], []
        hears_project({"result": "ok", "project": None})
        assert [message.kind for message, _ in asked] == ["bundle_part", "deploy"]
        for _, hears in asked:
            hears({"result": "refused", "code": code})
        asked.clear()
    made.begin()
    assert [message.kind for message, _ in asked] == ["project"]


def test_a_run_that_another_one_has_followed_is_over_for_who_waits_for_its_end(tmp_path: Path) -> None:
    made = offering_of(tmp_path, [], Offer(until_done=True))
    made.watched = ("p", 1)
    plan = {"run": 2, "state": "running", "is_over": False, "seconds": None, "parked": 0}
    end = made.ended({"p": plan})
    assert end is not None and (end.exit_code, end.text) == (0, "p: run 1 is over and run 2 has begun")


def test_what_was_undeployed_is_not_offered_again_by_a_node_that_goes_on(tmp_path: Path) -> None:
    asked: list[tuple[Message, Any]] = []
    said: list[str] = []
    made = offering_of(tmp_path, asked)
    made._out = said.append
    made.watched = ("p", 1)
    plan = {"run": 1, "state": "running", "is_over": False, "seconds": None, "parked": 0}
    for pipelines in ({}, {"p": plan}, {}, {}):
        assert made.ended(pipelines) is None
        made.begin()
    assert (said, asked) == (["p: undeployed; this node offers it again when it is started next"], [])


def test_who_waits_for_the_end_of_a_run_that_was_undeployed_is_told(tmp_path: Path) -> None:
    made = offering_of(tmp_path, [], Offer(until_done=True))
    made.watched = ("p", 1)
    plan = {"run": 1, "state": "running", "is_over": False, "seconds": None, "parked": 0}
    assert made.ended({"p": plan}) is None
    end = made.ended({})
    assert end is not None and (end.exit_code, end.text) == (1, "p: undeployed before run 1 was done")


@pytest.mark.parametrize("failure", [{"node": "b", "stage": "Work", "text": "does not start"}, None])
def test_a_version_that_went_back_is_not_offered_again_until_it_is_changed(tmp_path: Path, failure: dict[str, str] | None) -> None:
    asked: list[tuple[Message, Any]] = []
    said: list[str] = []
    made = offering_of(tmp_path, asked)
    made._out = said.append
    assert made._packed is not None
    deployed = {"version": "0" * 64, "project": made._record, "origin": HERE, "files": {}, "run": 3, "state": "running",
                "rolled": {"version": made._packed.version, "nodes": 1, "failure": failure}}
    made._compare(deployed)
    if failure is None:
        assert [message.kind for message, _ in asked] == ["bundle_part", "deploy"]
        return
    assert "did not start before and was rolled back; version 00000000 runs on" in said[0] and "deploy" in said[0]
    assert (asked, made.watched) == ([], ("p", 3))
    deployed["rolled"] = {"version": "1" * 64, "nodes": 1, "failure": failure}
    made._compare(deployed)
    assert [message.kind for message, _ in asked] == ["bundle_part", "deploy"], "it is another one"


ELSEWHERE = {"node": "other", "name": "host", "folder": "/f"}
HERE = {"node": "me", "name": "here", "folder": "/f"}


@pytest.mark.parametrize(("origin", "python", "deploys"), [
    (HERE, "==3.10", True), (HERE, None, True), (ELSEWHERE, "==3.10", False), (ELSEWHERE, None, False),
])
def test_which_pythons_the_same_files_run_on_is_their_origins_to_say(
        tmp_path: Path, origin: dict[str, str], python: str | None, deploys: bool) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pipeline.py").write_text("from p2pcluster import Pipeline, Queue, stage\n\npipeline = Pipeline('p', Queue('in') >> stage(print))\n")
    project = find_project(str(folder), folder)
    assert project is not None
    asked: list[Message] = []
    offering = Offering(Offer(project), HERE, tmp_path / "bundles", False, lambda message, on_reply: asked.append(message), lambda text: None)
    offering.prepare()
    record = {**project_record(project), **({"python": python} if python else {})}
    if python is None:
        del record["python"]
    packed = pack_project(project)
    offering._compare({"version": packed.version, "project": record, "origin": origin, "files": packed.files, "run": 1, "state": "running"})
    assert [message.fields["project"]["python"] for message in asked if message.kind == "deploy"] == (
        [f"=={sys.version_info[0]}.{sys.version_info[1]}"] if deploys else [])
    assert changes({"files": packed.files}, packed, {"module": "pipeline", "python": ">=3.11"}) == ["pipeline.py for Python >=3.11"]
