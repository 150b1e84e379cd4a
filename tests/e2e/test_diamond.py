"""Items of which some raise and some kill their process, through a diamond, while the node is killed too."""

from __future__ import annotations

import subprocess
import sys

from harness import ROOT


def test_on_each_path_of_a_diamond_done_and_parked_together_are_what_was_put() -> None:
    """By the script that does it with ten thousand; it says itself what it found."""
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "diamond", "--count", "200", "--kills", "2", "--gap", "0.5", "--seed", "4"]
    done = subprocess.run([*command, "--timeout", "100"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills of the node" in done.stdout and "the same items fail each time" in done.stdout
