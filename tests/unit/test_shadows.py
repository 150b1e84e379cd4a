"""A project's modules that have the name of one of Python's own: they break no node, and who would get the wrong one is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from p2pcluster.process import read_manifest

ROOT = Path(__file__).parents[2]
PIPELINE = """
{imports}
from p2pcluster import Pipeline, sink, source

@source
def Numbers():
    yield 1

@sink
def Show(x):
    print(x)

pipeline = Pipeline("shadows", Numbers >> Show)

if __name__ == "__main__":
    pipeline.main()
"""
PROJECT = {"import_paths": ["."], "module": "pipeline", "variable": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("queue", "socket", "json", "selectors", "colorsys"):
        (tmp_path / f"{name}.py").write_text("def mine():\n    return 1\n")
    (tmp_path / "helper.py").write_text("import socket\n")
    return tmp_path


def answer(folder: Path, imports: str = "") -> dict[str, object]:
    (folder / "pipeline.py").write_text(PIPELINE.format(imports=imports))
    return read_manifest(folder, PROJECT)


@pytest.mark.parametrize(("imports", "file", "name"), [
    ("import queue", "pipeline.py", "queue"), ("from queue import mine", "pipeline.py", "queue"), ("import helper", "helper.py", "socket"),
])
def test_who_would_get_pythons_own_instead_is_told(folder: Path, imports: str, file: str, name: str) -> None:
    assert answer(folder, imports)["error"] == (
        f"{file} imports {name} and would get Python's own module of that name instead of the project's {name}.py: rename that")


def test_a_module_that_is_not_imported_or_whose_name_is_free_is_fine(folder: Path) -> None:
    assert "manifest" in answer(folder)
    assert "manifest" in answer(folder, "from colorsys import mine")


@pytest.mark.parametrize("command", [["-m", "p2pcluster", "run", "--help"], ["pipeline.py", "--help"]])
def test_a_node_that_is_started_beside_them_gets_pythons_own(folder: Path, command: list[str]) -> None:
    (folder / "pipeline.py").write_text(PIPELINE.format(imports="from queue import mine"))
    run = subprocess.run([sys.executable, *command], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--until-done" in run.stdout
