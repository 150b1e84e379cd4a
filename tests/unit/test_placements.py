"""A user's placement in its child process: whatever it does, there is one outcome in time, and no process is left behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from p2pcluster import process
from p2pcluster.core.planner import Question
from p2pcluster.errors import ProjectError
from p2pcluster.placements import Placements

PROJECT = {"module": "pipeline", "variable": None, "import_paths": ["."]}
HEAD = """
import os, signal, sys, time
from p2pcluster import Pipeline, Queue, stage

@stage
def Work(x):
    return x

class Whole:
    def __index__(self):
        return 3

"""
TAIL = "\npipeline = Pipeline('p', Queue('in') >> Work, placement=placement)\n"
NODES = [{"name": "a", "cores": 4}, {"name": "b", "cores": 8}]
STAGES = [{"name": "Work", "nodes": ["a", "b"]}]


def project(folder: Path, body: str, above: str = "") -> Path:
    (folder / "pipeline.py").write_text(f"{HEAD}{above}\ndef placement(nodes, stages):\n    {body}\n{TAIL}")
    return folder


def outcome(folder: Path, timeout_s: float = 20) -> dict[str, Any]:
    child = process.start_placement(folder, PROJECT, 1)
    answer = process.ask_placement(child, NODES, STAGES, timeout_s)
    assert child.returncode is not None, "nothing is left behind"
    return answer


def test_the_function_gets_the_nodes_and_the_stages_and_may_print_and_ask_its_standard_input(tmp_path: Path) -> None:
    body = """print("nothing to do with the answer", sys.stdin.read())
    most = max(nodes, key=lambda node: node["cores"])
    return {most["name"]: {one["name"]: Whole() for one in stages}}"""
    assert outcome(project(tmp_path, body)) == {"plan": {"b": {"Work": 3}}}


@pytest.mark.parametrize(("body", "above", "told"), [
    ("return nodes[7]", "", "it raised IndexError: list index out of range (pipeline.py, line 15)"),
    ("sys.exit(3)", "", "it raised SystemExit: 3 (pipeline.py, line 15)"),
    ("return {}", "import no_such_module", "it raised ModuleNotFoundError: No module named 'no_such_module' (pipeline.py, line 13)"),
    ("os._exit(4)", "", "its process exited with code 4 before it returned"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "", "its process died of signal 11 (SIGSEGV) before it returned"),
    ("return None", "", "it returns None and not {node: {stage: processes}}"),
    ("return {'a': 3}", "", "it returns {'a': 3} and not {node: {stage: processes}}"),
    ("return {'a': {'Work': object}}", "", "it returns {'a': {'Work': <class 'object'>}} and not {node: {stage: processes}}"),
    ("return {str(n): {'Work': 1} for n in range(100_000)}", "", "what it returns has no end"),
])
def test_what_goes_wrong_is_told_in_some_words(tmp_path: Path, body: str, above: str, told: str) -> None:
    assert outcome(project(tmp_path, body, above)) == {"error": told}


@pytest.mark.parametrize("body", ["time.sleep(60)", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
def test_one_that_does_not_come_back_is_ended(tmp_path: Path, body: str) -> None:
    assert outcome(project(tmp_path, body), timeout_s=1) == {"error": "it takes longer than 1 s, the import of its module counted"}


def test_a_child_does_not_outlive_whoever_asked(tmp_path: Path) -> None:
    child = process.start_placement(project(tmp_path, "(open('began', 'w').close(), time.sleep(60))"), PROJECT, 1)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b'{"nodes": [], "stages": []}\n')
    child.stdin.flush()
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline_s, "it never began"
        time.sleep(0.02)
    child.stdin.close()
    assert child.wait(30) == 1
    child.stdout.close()


# ---- the node's side


def question(folder: Path, run: int = 1) -> Question:
    return Question("p", str(folder), run, NODES, STAGES, {"a": "a", "b": "b"}, PROJECT, "")


def answers(placements: Placements, count: int) -> list[tuple[Question, dict[str, Any]]]:
    found: list[tuple[Question, dict[str, Any]]] = []
    deadline_s = time.monotonic() + 30
    while len(found) < count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.02)
        found += placements.take_answers()
    return found


def test_a_later_question_ends_the_call_of_the_former_one(tmp_path: Path) -> None:
    placements = Placements(lambda version, zip_sha256: Path(version))
    (tmp_path / "slow").mkdir()
    (tmp_path / "fast").mkdir()
    slow = question(project(tmp_path / "slow", "time.sleep(60)"))
    fast = question(project(tmp_path / "fast", "return {'a': {'Work': 1}}"), run=2)
    placements.ask(slow)
    placements.ask(fast)
    found = {asked.run: answer for asked, answer in answers(placements, 2)}
    assert found == {1: {"error": "its process died of signal 9 (SIGKILL) before it returned"}, 2: {"plan": {"a": {"Work": 1}}}}
    placements.close()


def test_a_project_that_cannot_be_had_is_an_outcome_too(tmp_path: Path) -> None:
    def folder_of(version: str, zip_sha256: str) -> Path:
        raise ProjectError("it is gone")

    placements = Placements(folder_of)
    placements.ask(question(tmp_path))
    assert [answer for _, answer in placements.take_answers()] == [{"error": "its process could not be started (it is gone)"}]
    missing = Placements(lambda version, zip_sha256: tmp_path / "nowhere")
    missing.ask(question(tmp_path))
    ((_, answer),) = missing.take_answers()
    assert answer["error"].startswith("its process could not be started ([Errno 2]")
