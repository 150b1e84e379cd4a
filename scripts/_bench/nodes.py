"""Nodes as a user starts them: `python -m p2pcluster` in a process of its own, in a folder that is thrown away.

On loopback, each under a port and a cluster name of its own, so that no other node of the machine joins in. Every wait
is bounded, and whatever was started is ended by its own process id.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from p2pcluster import connect
from p2pcluster.client import Cluster

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = Path(__file__).parent / "projects"
SLOW_NODE = Path(__file__).with_name("slow_disk_node.py")
SERVES = " leads cluster "  # in the line that a node prints once it serves
START_S = 60.0
STOP_S = 30.0
LINES_SHOWN = 15


class BenchError(Exception):
    """A case cannot give its figures: a process failed, or the items are not those that were put."""


class LogSize(NamedTuple):
    """How much a journal's log grew since its start. In a journal of one voter, one entry is one commit."""

    entries: int
    bytes: int


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one case, on the disk that TMPDIR names."""
    folder = Path(tempfile.mkdtemp(prefix="p2pcluster-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment() -> dict[str, str]:
    """This process's, with this package to be found, and without what would name another cluster.

    Nor without byte code: each process would compile every module anew, which is no user's start.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PCLUSTER_")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, "PYTHONPATH": str(ROOT)}


class Node:
    """One node over `folder`, which holds its home, key and project; others may follow over the same folder."""

    def __init__(self, folder: Path, project: str | None, *arguments: str, params: Mapping[str, int] | None = None,
                 file: str = "pipeline.py", delay_s: float | None = None, name: str = "home",
                 port: int | None = None) -> None:
        """`project` is one of the folders in `projects`, of which `file` is taken as its pipeline.py; None: no project.

        `delay_s` makes each of the node's fsyncs so much longer. Nodes with the same `port` and a `name` each are one
        cluster.
        """
        self.folder = folder
        self.name = name
        self.started_s = time.monotonic()
        target = _copied_project(folder, project, file)
        program = ["-m", "p2pcluster"] if delay_s is None else [str(SLOW_NODE), repr(delay_s)]
        settings = [word for name, value in (params or {}).items() for word in ("--set", f"{name}={value}")]
        self._popen = subprocess.Popen(
            [sys.executable, *program, "run", str(target), *arguments, *settings, "--home", str(self.home),
             "--authkey-file", str(self.key_file), "--cluster", self.cluster,
             "--bind", "127.0.0.1", "--port", str(free_port() if port is None else port)],
            cwd=folder, env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        self.lines: list[tuple[float, str]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def home(self) -> Path:
        return self.folder / self.name

    @property
    def key_file(self) -> Path:
        return self.folder / "authkey"

    @property
    def cluster(self) -> str:
        return self.folder.name

    @property
    def pid(self) -> int:
        return self._popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def wait_for_line(self, text: str, timeout_s: float = START_S) -> float:
        """The moment at which a line with `text` came."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = [at_s for at_s, line in self.lines if text in line]
                if found:
                    return found[0]
                if self._ended or not self._changed.wait(max(0.0, deadline_s - time.monotonic())):
                    raise self._failed(f"did not print {text.strip()!r} in {timeout_s:g} s")

    def wait_for_serving(self) -> float:
        return self.wait_for_line(SERVES)

    def wait_until_done(self, timeout_s: float) -> None:
        """For `--until-done`: the run is done and nothing is parked."""
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failed(f"was not done in {timeout_s:g} s") from None
        self._reader.join(STOP_S)
        if code != 0:
            raise self._failed(f"ended with exit code {code}")

    def ask_to_stop(self) -> None:
        self._popen.send_signal(signal.SIGTERM)

    def wait_until_stopped(self) -> None:
        self.wait_until_done(STOP_S)

    def stop(self) -> None:
        """Let it drain and close its journal."""
        self.ask_to_stop()
        self.wait_until_stopped()

    def kill_now(self) -> float:
        """The moment of the kill; what is left of the process is for `kill`."""
        killed_s = time.monotonic()
        self._popen.kill()
        return killed_s

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        self._reader.join(STOP_S)

    def connect(self, pipeline: str | None) -> Cluster:
        return connect(pipeline=pipeline, cluster=self.cluster, home=self.home, authkey_file=self.key_file)

    def out_dir(self, pipeline: str) -> Path:
        return self.home / "out" / pipeline

    def log_size(self) -> LogSize:
        """For a node that has ended in order."""
        db = sqlite3.connect(f"{(self.home / 'journal.sqlite3').as_uri()}?mode=ro", uri=True)
        try:
            (last,) = db.execute("SELECT max(idx) FROM journal").fetchone()
            (size,) = db.execute("SELECT sum(length(body)) FROM journal").fetchone()
        finally:
            db.close()
        return LogSize(last or 0, size or 0)

    def _read(self) -> None:
        assert self._popen.stdout is not None, "its output is a pipe"
        for line in self._popen.stdout:
            with self._changed:
                self.lines.append((time.monotonic(), line.rstrip("\n")))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._popen.stdout.close()

    def _failed(self, what: str) -> BenchError:
        last = "\n".join(f"  {line}" for _, line in self.lines[-LINES_SHOWN:])
        return BenchError(f"a node {what}; its last lines:\n{last}")


def _copied_project(folder: Path, project: str | None, file: str) -> Path:
    """The project as a user has it: a folder of its own with a pipeline.py in it."""
    target = folder / "project"
    target.mkdir(exist_ok=True)
    if project is not None:
        copy_project(project, file, target)
    return target


def copy_project(project: str, file: str, target: Path) -> None:
    shutil.copyfile(PROJECTS / project / file, target / "pipeline.py")
    shutil.copyfile(PROJECTS / "common.py", target / "common.py")


def read_json_file(path: Path) -> Any:
    """What a stage wrote when it ended. Raises `BenchError` where there is nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path.name} was not written as it should be: {error}") from error
