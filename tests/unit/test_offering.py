"""What a node brings: the project is packed whole, or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from p2pcluster.bundle import find_project
from p2pcluster.errors import ProjectError
from p2pcluster.offering import pack_project


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
