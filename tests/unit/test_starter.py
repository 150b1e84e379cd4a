"""`new`: what it writes runs, and its test passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pcluster import cli

ROOT = Path(__file__).resolve().parents[2]


def pytest_in(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # an edit within a second that keeps the size would run the old bytecode
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=60, check=False)


def test_the_test_of_a_new_project_passes_and_notices_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "here" / "my squares"
    assert cli.main(["new", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["pipeline.py", "test_pipeline.py"]
    done = pytest_in(folder)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    assert "Pipeline('my-squares'," in (folder / "pipeline.py").read_text()
    (folder / "pipeline.py").write_text((folder / "pipeline.py").read_text().replace("** 2", "** 3"))
    assert pytest_in(folder).returncode == 1


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pipeline.py").write_text("mine")
    assert cli.main(["new", str(tmp_path)]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert (tmp_path / "pipeline.py").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_place_where_nothing_can_be_written_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["new", str(tmp_path / "file" / "folder")]) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said and len(said.splitlines()) == 1
