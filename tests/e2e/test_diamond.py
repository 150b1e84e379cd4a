"""Items of which some raise and some kill their process, through a diamond, while the node is killed too."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from harness import ROOT


def test_on_each_path_of_a_diamond_done_and_parked_together_are_what_was_put() -> None:
    """By the script that does it with ten thousand; it says itself what it found."""
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "diamond", "--count", "200", "--kills", "2", "--gap", "0.5", "--seed", "4"]
    done = subprocess.run([*command, "--timeout", "100"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills of the node" in done.stdout and "the same items fail each time" in done.stdout


GOOD: dict[str, Any] = {
    "calls": {("Left", 1): 1, ("Left", 2): 2, ("Right", 1): 1, ("Right", 2): 2, ("Join Left", 1): 1, ("Join Right", 1): 2},
    "results": {("Left", 1): 1},
    "parked": {("Left", 2): 1, ("Right", 2): 1, ("Join Right", 1): 1},
}


def fate(name: str, n: int) -> str:
    return "raises" if n == 2 or (name, n) == ("Join Right", 1) else ""


@pytest.mark.parametrize(("where", "call", "count", "trouble"), [
    ("results", ("Right", 1), 1, "came of a parked item"),
    ("results", ("Left", 1), 2, "came twice"),
    ("results", ("Left", 1), 0, "were to come and did not"),
    ("parked", ("Left", 2), 0, "fail each time and are not parked"),
    ("parked", ("Right", 1), 1, "do not fail and are parked"),
    ("calls", ("Right", 2), 1, "before they had been tried twice"),
])
def test_the_script_notices(where: str, call: tuple[str, int], count: int, trouble: str) -> None:
    check = runpy.run_path(str(ROOT / "scripts" / "soak.py"))["check_fates"]
    found = {name: Counter(counts) for name, counts in GOOD.items()}
    check(fate, **found)
    found[where][call] = count
    found[where] += Counter()  # what is there no time is not there
    with pytest.raises(SystemExit, match=trouble):
        check(fate, **found)
