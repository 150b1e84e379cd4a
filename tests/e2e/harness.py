"""Real nodes for tests: started, watched, asked, killed and started again, with the command line that a person has.

Each `Site` is a place of its own (home, key, port, environment), so that no test meets another's node or the user's.
Nothing here sleeps for a fact: `wait_for` looks until it is true, and fails with what it waited for when the time is
over. Only processes that a site started are signalled, by their ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from p2pcluster import cli, connect
from p2pcluster.client import Cluster

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 30.0  # of one fact; a busy machine needs some of it, a failing test all of it
LOOK_S = 0.02  # between two looks

T = TypeVar("T")


def wait_for(fact: Callable[[], T], what: str, timeout_s: float = WAIT_S) -> T:
    """What `fact` returns once that is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := fact()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(LOOK_S)
    return found


def free_port() -> int:
    """A port that nobody listens on, outside of the range out of which systems give ports to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def the_error(self) -> str:
        """The one line that it complained with: no second one, and no traceback anywhere."""
        assert "Traceback" not in self.out + self.err, self.out + self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("waiting for ")]
        assert len(lines) == 1, f"one line of error was expected: {lines}"
        assert lines[0].startswith("p2pcluster: "), lines[0]
        return lines[0].removeprefix("p2pcluster: ")


class NodeProcess:
    """`python -m p2pcluster ...` that runs. Its lines are read all the time, unless it was started with `held`."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], held: bool = False) -> None:
        self.popen = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.popen.stdout, self.lines), (self.popen.stderr, self.errors))
        ]
        if not held:
            self.read_on()

    def read_on(self) -> None:
        """Begin to read what it prints."""
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def wait_for_line(self, text: str, timeout_s: float = WAIT_S) -> str:
        """The first line of its standard output that holds `text`."""
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            while True:
                found = next((line for line in self.lines if text in line), None)
                if found is not None:
                    return found
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"no line with {text!r} within {timeout_s:g} s: {self._last_lines()}"
                alive = self.is_running or any(reader.is_alive() for reader in self._readers)
                assert alive, f"it ended without a line with {text!r}: {self._last_lines()}"
                self._news.wait(min(left_s, 0.2))

    def wait_for_exit(self, timeout_s: float = WAIT_S) -> int:
        """The exit code, once it has ended and all its lines are read."""
        try:
            code = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it runs after {timeout_s:g} s: {self._last_lines()}") from None
        for reader in self._readers:
            if reader.ident is not None:  # it was started
                reader.join(timeout_s)
        return code

    def finished(self, timeout_s: float = WAIT_S) -> Finished:
        """The same, with all that it printed."""
        code = self.wait_for_exit(timeout_s)
        return Finished(code, "\n".join(self.lines), "\n".join(self.errors))

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, and nothing of it left."""
        children = list(children_of(self.pid)) if self.is_running else []
        self.popen.kill()
        self.wait_for_exit()
        wait_for(lambda: not any(is_alive(pid) for pid in children), "stage processes end with their node")

    def stop(self) -> int:
        """Ask it to end, as a service manager would."""
        self.signal(signal.SIGTERM)
        return self.wait_for_exit()

    def stage_pids(self, stage: str) -> list[int]:
        """The live processes that run a stage, a source or a sink of that name."""
        return [pid for pid in children_of(self.pid) if _stage_of(pid) == stage]

    def kill_one(self, pids: Callable[[], list[int]]) -> int:
        """`kill -9` one of the processes that `pids` finds, once there are any; returns its id when it is gone."""
        pid = wait_for(pids, "a process to kill")[0]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), f"process {pid} ends")
        return pid

    def _last_lines(self) -> str:
        return f"{self.lines[-20:]} {self.errors[-20:]}"

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._news:
                lines.append(line.rstrip("\n"))
                self._news.notify_all()


class Site:
    """A place for the nodes of one cluster, and for the projects that they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.key_file = folder / "key"
        self.port = free_port()
        self.nodes: list[NodeProcess] = []
        self.key_file.write_text("the key of a test\n")  # a node without one would first look for others who have it
        self.key_file.chmod(0o600)

    # ---- files

    def project(self, text: str, name: str = "project", **others: str) -> Path:
        """A folder with `text` as its pipeline.py; `others` are further modules by name. What is there is replaced."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for module, source in {"pipeline": text, **others}.items():
            (folder / f"{module}.py").write_text(textwrap.dedent(source))
        return folder

    @property
    def journal(self) -> Path:
        return self.home / "journal.sqlite3"

    def out(self, pipeline: str) -> Path:
        """Where the stages of a pipeline write."""
        return self.home / "out" / pipeline

    # ---- processes

    def environment(self, **others: str) -> dict[str, str]:
        """This place's and nothing of the user's; HOME too, so that not even a mistake reaches the user's files."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("P2PCLUSTER_")}
        return {
            **plain,
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "P2PCLUSTER_HOME": str(self.home),
            "P2PCLUSTER_AUTHKEY_FILE": str(self.key_file),
            "P2PCLUSTER_BIND": "127.0.0.1",
            "P2PCLUSTER_PORT": str(self.port),
            **others,
        }

    def start(
        self,
        *words: object,
        cwd: Path | None = None,
        held: bool = False,
        command: list[str] | None = None,
        **environment: str,
    ) -> NodeProcess:
        """A node that runs `words`; `command` stands for `python -m p2pcluster`."""
        line = [*(command or [sys.executable, "-m", "p2pcluster"]), *map(str, words)]
        node = NodeProcess(line, cwd or self.folder, self.environment(**environment), held)
        self.nodes.append(node)
        return node

    def hands(self) -> NodeProcess:
        """A node without a project, ready for clients."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        node = self.start("run", cwd=empty)
        node.wait_for_line("leads cluster")
        return node

    def do(
        self, *words: object, stdin: str = "", cwd: Path | None = None, timeout_s: float = WAIT_S, **environment: str
    ) -> Finished:
        """One command to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "p2pcluster", *map(str, words)],
            cwd=cwd or self.folder,
            input=stdin,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def python(self, text: str, timeout_s: float = WAIT_S) -> Finished:
        """A program of somebody's, run to its end with this place's environment."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(text)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def python_file(self, file: Path, *words: object, timeout_s: float = WAIT_S) -> Finished:
        """`python FILE WORDS` to its end."""
        done = subprocess.run(
            [sys.executable, str(file), *map(str, words)],
            cwd=file.parent,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def close(self) -> None:
        """End what still runs here, and show what it said, which pytest prints where a test has failed."""
        for node in self.nodes:
            how = "runs" if node.is_running else f"ended with {node.popen.returncode}"
            if node.is_running:
                node.kill()
            print(f"node {node.pid} {how}:", *node.lines[-20:], *node.errors[-40:], sep="\n  ")

    # ---- asking

    @property
    def is_up(self) -> bool:
        """Whether a node here says where it listens."""
        return (self.home / "address.json").exists()

    def connect(self, pipeline: str | None = None, timeout_s: float = 10.0) -> Cluster:
        return connect(pipeline, home=self.home, authkey_file=self.key_file, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        with self.connect() as cluster:
            return cluster.status()

    def deploy(self, text: str, name: str = "project", **others: str) -> None:
        """Ship a project to the node that runs here: the verb, in this process, since tests do it so often."""
        words = ["--home", str(self.home), "--authkey-file", str(self.key_file)]
        assert cli.main(["deploy", str(self.project(text, name, **others)), *words]) == 0

    def results_of(self, text: str, pipeline: str, stage: str, **others: str) -> list[Any]:
        """Deploy a pipeline, wait until it is done, and read what a last stage returned."""
        self.deploy(text, pipeline, **others)
        with self.connect(pipeline) as cluster:
            cluster.wait(WAIT_S)
            return list(cluster.results(stage))


class Proxy:
    """A way to a node that a test can close: bytes go through until `hold_answers` or `cut`.

    With it a connection is lost at a known point, which killing the node cannot promise.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self.port = free_port()
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._answers = threading.Event()
        self.mend()

    def hold_answers(self) -> None:
        """What is sent still arrives; what is answered does not."""
        self._answers.clear()

    def cut(self) -> None:
        """Lose what is connected, and refuse whoever comes until `mend`."""
        _end(self._listener)
        self._accepting.join()
        for sock in self._sockets:
            _end(sock)
        self._sockets.clear()

    def mend(self) -> None:
        self._answers.set()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._accepting = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._accepting.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                node = socket.create_connection(self._target)
                self.connections += 1
                self._sockets += [client, node]
                threading.Thread(target=self._carry, args=(client, node, None), daemon=True).start()
                threading.Thread(target=self._carry, args=(node, client, self._answers), daemon=True).start()

    @staticmethod
    def _carry(giver: socket.socket, taker: socket.socket, gate: threading.Event | None) -> None:
        with contextlib.suppress(OSError):
            while data := giver.recv(1 << 16):
                if gate is not None and not gate.is_set():
                    continue
                taker.sendall(data)
        _end(giver)
        _end(taker)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# ---- /proc


def children_of(pid: int) -> Iterator[int]:
    """The live child processes of a process."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            state, parent = _state_of(int(entry))
            if parent == pid and state not in ("Z", "X"):
                yield int(entry)


def _state_of(pid: int) -> tuple[str, int]:
    """The state letter and the parent's id; ("X", 0) for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def is_alive(pid: int) -> bool:
    return _state_of(pid)[0] not in ("Z", "X")


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stage_of(pid: int) -> str | None:
    """What a stage process runs; it is named at the end of its command line, for people too who look with `ps`."""
    arguments = _arguments(pid)
    return arguments[-1].rpartition("/")[2] if "stage" in arguments else None
