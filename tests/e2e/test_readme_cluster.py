"""The README's three terminals: each command is typed as it stands there, and each printed line compared, a killed leader included.

A node's command opens a terminal; `...` in a line stands for anything. What a node prints is looked for in its terminal, and what is printed
after a kill in all of them together, among what is new.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import NodeProcess, Site, wait_for

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
TITLE = "### Three terminals\n"
PATIENCE_S = 60.0
NODE = "python -m p2pcluster "


class Step(NamedTuple):
    """A command, and the lines that it is said to lead to."""

    command: str
    lines: list[str]


def steps() -> list[Step]:
    section = re.split(r"^##", README[README.index(TITLE) + len(TITLE) :], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = [(kind, text.splitlines()) for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)]
    found: list[Step] = []
    for kind, lines in blocks:
        if kind == "sh":
            found += [Step(command, []) for command in lines]
        else:
            found[-1].lines.extend(line for line in lines if line != "...")
    return found


def missing(expected: list[str], said: list[str]) -> list[str]:
    """The lines that nothing of what was said stands for; each line that was said stands for one."""
    left, lacking = list(said), []
    for line in expected:
        pattern = ".*".join(re.escape(part) for part in line.split("..."))
        found = next((one for one in left if re.fullmatch(pattern, one)), None)
        if found is None:
            lacking.append(line)
        else:
            left.remove(found)
    return lacking


class Desk:
    """Terminals by the home of the node that runs in them, and one more for what ends by itself."""

    def __init__(self, site: Site) -> None:
        self.site = site
        (pipeline,) = re.findall(r"^```python\n(# pipeline\.py\n.*?)^```$", README[: README.index(TITLE)], flags=re.MULTILINE | re.DOTALL)[-1:]
        self.folder = site.project(pipeline)
        self.terminals: dict[str, NodeProcess] = {}

    def type(self, step: Step) -> None:
        words = shlex.split(step.command.removeprefix(NODE))
        if not step.command.startswith(NODE):
            self._in_shell(step)
        elif words[0].startswith("-"):
            self._open(words, step)
        else:
            self._ask(words, step)

    def _open(self, words: list[str], step: Step) -> None:
        node = self.terminals[words[-1]] = self.site.start(*words, cwd=self.folder)
        self._wait(step, lambda: list(node.lines))

    def _in_shell(self, step: Step) -> None:
        before = {home: len(node.lines) for home, node in self.terminals.items()}
        subprocess.run(["sh", "-c", step.command], cwd=self.folder, check=True, timeout=PATIENCE_S)
        self._wait(step, lambda: [line for home, node in self.terminals.items() for line in node.lines[before[home] :]])

    def _ask(self, words: list[str], step: Step) -> None:
        def said() -> list[str]:
            done = self.site.do(*words, cwd=self.folder)
            assert done.code == 0, done.err
            return done.lines

        self._wait(step, said)

    def _wait(self, step: Step, said: Callable[[], list[str]]) -> None:
        heard: list[list[str]] = [[]]

        def all_there() -> bool:
            heard[0] = said()
            return not missing(step.lines, heard[0])

        try:
            wait_for(all_there, f"{step.command} shows {step.lines}", PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; lacking {missing(step.lines, heard[0])} in {heard[0]}") from None


def test_three_terminals_show_what_the_readme_says_and_a_killed_leader_is_replaced(site: Site) -> None:
    desk = Desk(site)
    for step in steps():
        desk.type(step)
    assert [node.wait_for_exit() for node in desk.terminals.values()] == [0, 0, 0], "stop ends all of them"


def test_the_readme_shows_three_nodes_a_kill_and_the_end() -> None:
    commands = [step.command for step in steps()]
    assert len({command for command in commands if command.startswith(NODE + "--bind 127.0.0.1 ")}) == 3
    assert sum(command.startswith("kill -9 ") for command in commands) == 1
    assert commands[-1].startswith(NODE + "stop")
    assert all(step.lines for step in steps()[:-1]), "each shows what comes out"


def test_a_line_that_does_not_come_is_noticed() -> None:
    assert missing(["node ... leads", "a"], ["node x leads", "b"]) == ["a"]
    assert missing(["a", "a"], ["a"]) == ["a"]
