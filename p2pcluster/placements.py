"""The calls of users' placement functions: each in a child process, at most one for each pipeline, none of them waited for by the loop.

Decided here: a later question ends the call of the former one, and every question has an outcome. What is asked, and what an answer is
worth, is `core.planner`'s word.
"""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2pcluster import process
from p2pcluster.core.planner import Question
from p2pcluster.errors import ClusterError


class Placements:
    """`folder_of` gives the unpacked project of a version; it raises `ClusterError` where that cannot be had."""

    def __init__(self, folder_of: Callable[[str, str], Path]) -> None:
        self._folder_of = folder_of
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._answers: deque[tuple[Question, dict[str, Any]]] = deque()

    def ask(self, question: Question) -> None:
        """Call the function; the outcome is among the answers in time."""
        former = self._children.pop(question.pipeline, None)
        if former is not None:
            former.kill()
        try:
            child = process.start_placement(self._folder_of(question.version, question.zip_sha256), question.project,
                                            process.hash_seed(question.pipeline, question.run))
        except (OSError, ClusterError) as error:
            self._answers.append((question, {"error": f"its process could not be started ({error})"}))
            return
        self._children[question.pipeline] = child
        threading.Thread(target=self._wait, args=(question, child), daemon=True).start()

    def take_answers(self) -> list[tuple[Question, dict[str, Any]]]:
        """The outcomes since the last call."""
        return [self._answers.popleft() for _ in range(len(self._answers))]

    def close(self) -> None:
        """End what runs; nobody hears of it."""
        for child in self._children.values():
            child.kill()

    def _wait(self, question: Question, child: subprocess.Popen[bytes]) -> None:
        self._answers.append((question, process.ask_placement(child, question.nodes, question.stages)))
