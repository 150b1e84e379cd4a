"""What a node brings: the project is packed whole, or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


ELSEWHERE = {"node": "other", "name": "host", "folder": "/f"}
HERE = {"node": "me", "name": "here", "folder": "/f"}


@pytest.mark.parametrize(("origin", "python", "deploys"), [
    (HERE, "==3.10", True), (HERE, None, True), (ELSEWHERE, "==3.10", False), (ELSEWHERE, None, False),
])
def test_which_pythons_the_same_files_run_on_is_their_origins_to_say(tmp_path: Path, origin: dict[str, str], python: str | None, deploys: bool) -> None:
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
