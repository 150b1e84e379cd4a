"""The README says what the code does: its files are written, its commands run in their order, and its tables compared with the code.

A ```python block that begins with `# NAME` is that file. A ```sh block is typed line by line into one shell's folder, on loopback, in a
home of its own; a `run` without --until-done goes on in the background until `stop`. A ```text block behind it is what comes out: each of
its lines, in any order, `...` standing for anything. Commands that only look are repeated until they show it. The section with several
terminals is typed by a test of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import p2pcluster
from p2pcluster import cli, client, config, errors
from p2pcluster.core.options import Options, checked_options

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PATIENCE_S = 60.0

# Run by others than this test, and said there.
RUN_ELSEWHERE = {
    "python scripts/test.py": "what CI runs, this test among it",
    "python queue_server.py": "two programs that end by Ctrl-C: tests/e2e/test_classic.py",
    "python queue_client.py": "the other one",
}
OF_OTHERS = {f"{name}_orders.py" for name in ("celery", "dramatiq", "rq", "huey", "dispy")}  # need what is not here: they are only compiled
TERMINALS = README[README.index("### Three terminals\n") : README.index("## What it promises\n")]  # typed by tests/e2e/test_readme_cluster.py
ONLY_LOOK = ("status", "parked", "results")


class Block(NamedTuple):
    """A fenced block of the README."""

    kind: str
    text: str
    line: int

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    @property
    def file(self) -> str | None:
        """The file that it is, for a block of Python."""
        found = re.match(r"# (\S+\.py)\n", self.text)
        return found[1] if self.kind == "python" and found else None


def blocks(text: str = README) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in found]


def section(title: str) -> str:
    """The README from a heading to the next one."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), flags=re.M | re.S)
    assert found, f"the README has no section {title!r}"
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The cells of the tables of a section, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [at for at, row in enumerate(cells) if set(row[0]) == {"-"}]
    heads = {at - 1 for at in rules} | set(rules)
    return [row for at, row in enumerate(cells) if at not in heads]


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


# ---- the README, read as somebody would who types all of it


class Reader:
    """Somebody with a terminal: a folder, a user's folder, commands. `python` is this Python, and the package can be imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        self.node: subprocess.Popen[str] | None = None
        self.said: list[str] = []
        self.environment = _environment(folder)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, "utf-8")

    def type(self, commands: list[str], expected: list[str]) -> str | None:
        """Run the commands; what is missing from their output, or None."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            said: list[str] = []
            for command in commands:
                trouble, lines = self._run(command, expected)
                said += lines
                if trouble:
                    return trouble
            missing = _missing(expected, said)
            if not missing:
                return None
            if not all(_verb(command) in ONLY_LOOK for command in commands) or time.monotonic() > deadline_s:
                return f"no line {missing[0]!r} in {said}"

    def _run(self, command: str, expected: list[str]) -> tuple[str | None, list[str]]:
        if _verb(command) == "run" and "--until-done" not in command:
            return self._start(command, expected)
        done = subprocess.run(["sh", "-c", command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=PATIENCE_S, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        if done.returncode:
            return f"it ended with exit code {done.returncode}: {lines}", lines
        if _verb(command) == "stop":
            assert self.node is not None and self.node.wait(PATIENCE_S) == 0, self.said
            self.node = None
        return None, lines

    def _start(self, command: str, expected: list[str]) -> tuple[str | None, list[str]]:
        """A node that goes on in the background, once it has said what it is to say."""
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        self.node = subprocess.Popen(words, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True)
        news = threading.Condition()
        self.said = []
        threading.Thread(target=_listen, args=(self.node, self.said, news), daemon=True).start()
        with news:
            news.wait_for(lambda: not _missing(expected, self.said), PATIENCE_S)
        return None, list(self.said)

    def leave(self) -> None:
        if self.node is not None:
            self.node.kill()
            self.node.wait()


def _listen(node: subprocess.Popen[str], said: list[str], news: threading.Condition) -> None:
    assert node.stdout is not None
    for line in node.stdout:
        with news:
            said.append(line.rstrip("\n"))
            news.notify()


def _environment(folder: Path) -> dict[str, str]:
    """A user's folder, `python`, loopback and a port of its own; and a standard library for the demo that is soon counted."""
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copytree(Path(sysconfig.get_path("stdlib")) / "json", folder / "stdlib" / "json", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(textwrap.dedent(f"""
        import sysconfig
        get_path = sysconfig.get_path
        sysconfig.get_path = lambda name, *more, **others: {str(folder / "stdlib")!r} if name == "stdlib" else get_path(name, *more, **others)
    """))
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("P2PCLUSTER_", "PYTEST_"))}
    return {**plain, "HOME": str(folder / "user"), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "P2PCLUSTER_BIND": "127.0.0.1", "P2PCLUSTER_PORT": str(_free_port())}


def _free_port() -> int:
    import socket

    for port in range(21_000 + os.getpid() % 9_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _verb(command: str) -> str | None:
    found = re.search(r"-m p2pcluster (\w+)", command)
    return found[1] if found else None


def _missing(expected: list[str], said: list[str]) -> list[str]:
    """The lines that nothing of what was said stands for; each line that was said stands for one."""
    left = [" ".join(line.split()) for line in said]
    missing = []
    for line in expected:
        pattern = ".*".join(re.escape(part) for part in " ".join(line.split()).split("..."))
        found = next((one for one in left if re.fullmatch(pattern, one)), None)
        if found is None:
            missing.append(line)
        else:
            left.remove(found)
    return missing


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path)
    yield made
    made.leave()


@pytest.mark.skipif(os.name == "nt", reason="types into sh")
def test_every_block_does_what_the_readme_says(reader: Reader) -> None:
    found = blocks(README.replace(TERMINALS, "\n" * TERMINALS.count("\n")))
    for at, block in enumerate(found):
        if block.file in OF_OTHERS:
            compile(block.text, block.file, "exec")
        elif block.file is not None:
            reader.write(block.file, block.text)
        elif block.kind == "sh":
            after = found[at + 1] if at + 1 < len(found) else None
            expected = after.lines if after is not None and after.kind == "text" else []
            commands = [command for command in block.lines if command not in RUN_ELSEWHERE]
            trouble = reader.type(commands, expected)
            assert trouble is None, f"README.md, line {block.line}: {commands}: {trouble}"
    assert reader.node is None, "the README stops what it starts"


def test_every_block_is_one_that_is_run_or_compared() -> None:
    found = blocks()
    assert {block.kind for block in found} == {"python", "sh", "text"}
    assert [block.line for block in found if block.kind == "python" and block.file is None] == []
    pictures = [block for before, block in zip([None, *found], found, strict=False)
                if block.kind == "text" and (before is None or before.kind != "sh")]
    assert len(pictures) == 1, "one picture, and output behind commands"
    assert README.count("```") == 2 * len(found)


def test_the_programs_for_others_are_there_and_do_the_same() -> None:
    """Each prices an order in the same words."""
    texts = {block.file: block.text for block in blocks() if block.file is not None}
    assert OF_OTHERS <= set(texts)
    assert all('{**order, "price": 3 * order["number"]}' in texts[name] for name in [*OF_OTHERS, "orders.py"])


def test_a_line_that_does_not_come_is_noticed() -> None:
    assert _missing(["a ... c", "d"], ["a b c", "e"]) == ["d"]
    assert _missing(["a", "a"], ["a"]) == ["a"]
    assert _missing(["a ...  9"], ["a b    9"]) == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = next(iter(RUN_ELSEWHERE))
    assert any(block.lines == [command] for block in blocks() if block.kind == "sh")
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert f'"$python" {command.removeprefix("python ")}' in script
    assert "--all-pythons" in script and "--all-pythons" in README


# ---- the command line


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    (verbs,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(verbs.choices)


def words_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a verb that are not those of every verb."""
    common = {"--" + name.replace("_", "-") for name in config.OPTION_NAMES} | {"-h", "--help"}
    return {word for action in parser._actions for word in action.option_strings} - common


def test_each_verb_is_in_the_table_and_each_verb_there_exists() -> None:
    assert [codes(row[0])[0].split()[0] for row in rows("Commands")][: len(parsers())] == list(parsers())


def test_each_option_of_a_verb_is_in_its_row() -> None:
    told = {codes(row[0])[0].split()[0]: " ".join(row) for row in rows("Commands")}
    for verb, parser in parsers().items():
        for word in words_of(parser) - {"--pipeline"}:
            assert f"`{word}" in told[verb] or f" {word}" in told[verb], f"{verb} has {word}, and the README does not say so"
    assert "--pipeline" in section("Commands")


def test_each_option_of_a_node_is_in_the_table_with_its_default() -> None:
    table = {codes(row[0])[0].split()[0]: row for row in rows("Options")}
    assert list(table) == ["--" + name.replace("_", "-") for name in config.OPTION_NAMES]
    defaults = config.Options()
    for name in ("cluster", "bind", "port", "expect"):
        assert table[f"--{name}"][1].strip("`") == str(getattr(defaults, name)), name


def test_each_key_of_the_projects_table_is_told() -> None:
    assert {codes(row[0])[0] for row in rows("The project's table")} == set(config.PROJECT_KEYS)


def test_each_option_that_the_readme_names_exists() -> None:
    known = {word for parser in parsers().values() for action in parser._actions for word in action.option_strings}
    known |= {"--all-pythons", "--with-scheduler"}  # of scripts/test.py, and of somebody else's worker
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_each_command_that_the_readme_names_can_be_typed() -> None:
    named = [line for block in blocks() if block.kind == "sh" for line in block.lines] + codes(README)
    commands = [re.sub(r".*python -m p2pcluster", "", line) for line in named if "python -m p2pcluster" in line]
    assert len(commands) > 12
    for command in commands:
        if "VERB" not in command:
            cli._parser().parse_args(cli._with_verb(shlex.split(command)))


def test_the_exit_codes_are_those_of_the_errors() -> None:
    raised = {value.exit_code for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.ClusterError)}
    assert {int(row[0]) for row in rows("Exit codes")} == raised | {0, 130}


# ---- the library


def test_each_option_of_a_stage_is_told() -> None:
    table = {name for row in rows("What a pipeline is made of") for name in codes(row[0])}
    with pytest.raises(errors.GraphError) as caught:
        checked_options("x", "stage", {"no such option": 1})
    assert table == set(str(caught.value).partition("the options are ")[2].split(", "))


def test_each_feature_has_a_line_and_each_line_names_what_there_is() -> None:
    """The table of all of it: every option of a stage, every verb, what a program imports, and no option that is not there."""
    told = " ".join(code for row in rows("All of it in lines") for cell in row for code in codes(cell))
    options = {field.name for field in dataclasses.fields(Options)}
    imported = {name for name in p2pcluster.__all__ if not isinstance(getattr(p2pcluster, name), type) or name in ("Pipeline", "Queue", "To", "At")}
    assert [name for name in sorted(options | imported | set(parsers())) if not re.search(rf"\b{name}\b", told)] == []
    asked = {"maxsize", "codec", "delay_s", "at", "key", "params", "on_done", "placement", "cursor"}
    assert set(re.findall(r"([a-z_]+)=", told)) <= options | asked


def test_the_defaults_of_a_stage_are_those_of_the_code() -> None:
    options = checked_options("x", "sink", {})
    told = {codes(row[0])[0]: row[1] for row in rows("What a pipeline is made of")}
    assert (told["retries"], told["backoff_s"]) == (str(options.retries), f"{options.backoff_s:g}")
    assert told["processes"].startswith(str(options.processes)) and f'"{checked_options("x", "stage", {}).processes}"' in told["processes"]
    assert (options.per_node, options.timeout_s, told["per_node"], told["timeout_s"]) == (None, None, "", "")


@pytest.mark.parametrize(("words", "value"), [
    (f"holds {config.QUEUE_ITEMS_MAX:,} items", config.QUEUE_ITEMS_MAX),
    (f"or {config.QUEUE_BYTES_MAX >> 20} MiB, unless", config.QUEUE_BYTES_MAX),
    (f"A value may have {config.VALUE_BYTES_MAX >> 20} MiB", config.VALUE_BYTES_MAX),
    (f"the whole project {config.BUNDLE_BYTES_MAX >> 20} MiB", config.BUNDLE_BYTES_MAX),
    (f"up to {config.BACKOFF_MAX_S:g} s", config.BACKOFF_MAX_S),
    (f"for at most {config.DRAIN_S:g} s", config.DRAIN_S),
    (f"It has {config.PLACEMENT_S:g} s,", config.PLACEMENT_S),
    (f"the last {config.LOG_RING_LINES:,} lines of each stage", config.LOG_RING_LINES),
    (f"more than {config.LOG_LINES_PER_S_MAX:,} lines in a second", config.LOG_LINES_PER_S_MAX),
    (f"{2 * config.LOG_FILE_BYTES >> 20} MiB of it at most, with the file before; {config.LOGS_BYTES_MAX >> 20} MiB for all", config.LOG_FILE_BYTES),
])
def test_each_limit_is_that_of_the_code(words: str, value: float) -> None:
    assert words in " ".join(README.split()), f"the README should say {words!r}"


def test_what_a_connection_is_said_to_have_it_has() -> None:
    text = section("From another program")
    named = set(re.findall(r"`(\w+)\(", text[text.index("A connection also") :]))
    used = {name for block in blocks() if block.file == "client.py" for name in re.findall(r"cluster\.(\w+)\(", block.text)}
    assert named and used
    assert [name for name in sorted(named | used) if not callable(getattr(client.Cluster, name, None))] == []


def test_what_current_is_said_to_answer_it_answers() -> None:
    (text,) = re.findall(r"^- \*\*`current\(\)`\*\* (.*?)^- ", section("What a pipeline is made of"), flags=re.MULTILINE | re.DOTALL)
    named = {re.sub(r".*\.(\w+)\(.*", r"\1", code) for code in codes(text)}
    assert named <= {name for name in dir(p2pcluster.Context) if not name.startswith("_")}
    assert len(named) >= 9


# ---- files


def test_each_script_is_in_the_table_and_each_script_there_exists() -> None:
    told = {codes(row[0])[0].split()[0] for row in rows("Scripts")}
    assert told == {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("[!_]*.py")}


def test_each_file_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:p2pcluster|scripts)/[\w/]+\.\w+)`", README))
    assert named and [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_changes_begin_with_this_version() -> None:
    text = (ROOT / "p2pcluster" / "CHANGES.md").read_text("utf-8")
    assert re.findall(r"^## (\S+)", text, flags=re.MULTILINE)[0] == p2pcluster.__version__
