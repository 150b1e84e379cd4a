"""What a type checker says about pipelines: good neighbours pass, wrong ones are named. Skipped without mypy."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent / "typing_examples"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")


def complaints(example: Path, cache: Path) -> dict[int, str]:
    """What mypy says about one file, by line."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary"]
    run = subprocess.run(
        [*command, f"--cache-dir={cache}", str(example)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found = re.findall(rf"{re.escape(example.name)}:(\d+): error: (.*)", run.stdout)
    assert bool(found) == bool(run.returncode), run.stdout
    return {int(line): text for line, text in found}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_a_type_checker_accepts_pipelines_whose_neighbours_fit(cache: Path) -> None:
    assert complaints(EXAMPLES / "good.py", cache) == {}


def test_a_type_checker_rejects_each_wrong_neighbour_and_nothing_else(cache: Path) -> None:
    example = EXAMPLES / "bad.py"
    lines = example.read_text().splitlines()
    rejected = {number for number, line in enumerate(lines, 1) if line.endswith("# rejected")}
    found = complaints(example, cache)
    assert len(rejected) > 10
    assert set(found) == rejected, found
