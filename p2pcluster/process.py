"""Stage processes as the operating system sees them: starting, listening, printing, ending.

Decided here: how a process is started (a new interpreter, never a fork), what it inherits, and how its end is noticed. What it is
started for and what its end means is the executor's. A process gets three things of this node's: a socket, a mapped position file
in the home, and two pipes whose lines appear in the node's terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from p2pcluster import config
from p2pcluster.core import loglines, protocol
from p2pcluster.core.codec import Message, decode, encode
from p2pcluster.core.executor import Spec
from p2pcluster.errors import ClusterError, ProjectError, WrongUsage
from p2pcluster.errors import ProtocolError
from p2pcluster.stream import Connection, ConnectionClosed

_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)
# The package is imported before the project's folder is on the path, so that a project's `queue.py` cannot take the place of the
# standard library's in our own imports; and the package's folder is on the path only for that.
_BOOT = (
    "import sys; root = sys.argv[1]; sys.path.insert(0, root); from p2pcluster.worker import main; sys.path.remove(root); "
    "sys.exit(main(sys.argv[2:]))"
)
_POSITION = struct.Struct("=QQ")
_OUTPUT_BYTES_MAX = 1 << 20  # of lines that wait for the terminal; then the processes wait
_LINE_BYTES_MAX = 1 << 16  # of one line; longer ones are cut into several
_READ_BYTES = 1 << 16
_REST_BYTES_MAX = _READ_BYTES // 16  # a pipe that gave less is next read at the tick: a turn of the loop for each line would hold it
_PIPE_BYTES = 1 << 18  # what a process may print in the meantime without waiting, where the system allows it


def worker_command(*arguments: str) -> list[str]:
    """The command line of a process that runs `worker.main` with these arguments."""
    return [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, *arguments]


def hash_seed(*names: object) -> int:
    """The PYTHONHASHSEED that all stage processes of a run share, so that sets come in the same order after a restart."""
    return int.from_bytes(sha256(repr(names).encode()).digest()[:4], "big")


class Printer:
    """Lines for people, written by a thread, so that a terminal that is held does not hold the node.

    Past `_OUTPUT_BYTES_MAX` waiting bytes `is_full`: the loop then stops reading what processes print, and they wait.
    """

    def __init__(self, stream: TextIO, on_room: Callable[[], None]) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character gets the line all the same
        self._stream = stream
        self._on_room = on_room
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._lock = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        return self._bytes > _OUTPUT_BYTES_MAX

    def line(self, text: str) -> None:
        with self._lock:
            self._lines.append(text)
            self._bytes += len(text) + 1
            self._lock.notify()

    def close(self, timeout_s: float) -> None:
        """Write what waits, but no longer than that."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while True:
            with self._lock:
                while not self._lines and not self._closing:
                    self._lock.wait()
                if not self._lines:
                    return
                text = "\n".join(self._lines) + "\n"
                self._lines.clear()
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):
                pass  # the terminal is gone: the pipeline is not there for it
            with self._lock:
                was_full, self._bytes = self.is_full, sum(len(line) + 1 for line in self._lines)
            if was_full:
                self._on_room()


class StageProcess:
    """One running process. `position()` is (number of its work, id of the item that runs or 0)."""

    def __init__(self, key: int, spec: Spec, popen: subprocess.Popen[bytes], connection: Connection, position: mmap.mmap,
                 position_file: Path) -> None:
        self.key = key
        self.spec = spec
        self.popen = popen
        self.connection = connection
        self.stderr_lines: deque[str] = deque(maxlen=config.STDERR_LINES_KEPT)
        self.pidfd: int | None = None
        self.waits_to_write = False
        self._position = position
        self._position_file = position_file
        self._partial: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    def position(self) -> tuple[int, int]:
        number, item_id = _POSITION.unpack_from(self._position, 0)
        return number, item_id

    def lines(self, which: str, data: bytes, end: bool = False) -> bytes:
        """The lines that `data` completes, each with its end."""
        partial = self._partial[which]
        partial += data
        at = partial.rfind(b"\n") + 1
        whole = bytes(partial[:at])
        del partial[:at]
        if len(partial) > _LINE_BYTES_MAX or (end and partial):
            whole += bytes(partial) + b"\n"
            partial.clear()
        return whole.replace(b"\r\n", b"\n")

    def close(self) -> None:
        self.connection.close()
        for pipe in (self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        self._position.close()
        self._position_file.unlink(missing_ok=True)


class ProcessTable:
    """All processes of a node, wired to its loop's selector. `events` are what the loop hands to the executor."""

    def __init__(self, selector: selectors.BaseSelector, run_folder: Path, boot: str, printer: Printer,
                 on_message: Callable[[int, Message], None], on_exit: Callable[[int, str, int, list[str]], None],
                 on_lines: Callable[[str, bytes], None] = lambda stage, lines: None) -> None:
        """`on_lines` gets what a stage, named with its pipeline, printed: whole lines with tags (`core.loglines`)."""
        self.processes: dict[int, StageProcess] = {}
        self._selector = selector
        self._run_folder = run_folder
        self._boot = boot
        self._printer = printer
        self._on_message = on_message
        self._on_exit = on_exit
        self._on_lines = on_lines
        self._muted = False
        self._resting: list[tuple[StageProcess, str]] = []  # pipes that are not read before the next tick

    def start(self, key: int, spec: Spec, setup: dict[str, Any], in_hand: int = 0) -> None:
        """Start a process in the folder `setup["folder"]`. Raises `OSError` when the machine has no room for one."""
        ours, theirs = socket.socketpair()
        queue = f"{spec.pipeline}/{spec.stage}" if spec.role == "stage" else ""
        file = self._run_folder / f"{self._boot}-{key}.position"
        file.write_bytes(position_bytes(setup.get("queue", queue), in_hand))
        with file.open("r+b") as opened:
            position = mmap.mmap(opened.fileno(), _POSITION.size)
        os.set_inheritable(theirs.fileno(), True)
        environment = {**os.environ, "PYTHONHASHSEED": str(setup["hash_seed"]), "PYTHONUNBUFFERED": "1"}
        try:
            popen = subprocess.Popen(
                worker_command("stage", str(theirs.fileno()), str(file), f"{spec.pipeline}/{spec.stage}"), cwd=setup["folder"], env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(theirs.fileno(),),
                process_group=0,  # a signal to the terminal's group is the node's to answer
            )
        except BaseException:
            ours.close()
            position.close()
            file.unlink(missing_ok=True)
            raise
        finally:
            theirs.close()
        process = StageProcess(key, spec, popen, Connection(ours), position, file)
        self.processes[key] = process
        self._register(process)
        self.send(key, Message("setup", setup))

    def _register(self, process: StageProcess) -> None:
        self._selector.register(process.connection, selectors.EVENT_READ, lambda mask: self._on_socket(process, mask))
        for which in ("stdout", "stderr"):
            pipe = getattr(process.popen, which)
            os.set_blocking(pipe.fileno(), False)
            _widen(pipe.fileno())
            self._listen(process, which)
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # a kernel without it: the tick's poll notices the end
                process.pidfd = os.pidfd_open(process.popen.pid)
                self._selector.register(process.pidfd, selectors.EVENT_READ, lambda mask: self._reap(process))

    def send(self, key: int, message: Message) -> None:
        """Queue a message; what the socket does not take now goes when it is writable. Nothing for one that is gone."""
        process = self.processes.get(key)
        if process is None:
            return
        process.connection.send(encode(message))
        self._flush(process)

    def kill(self, key: int) -> None:
        process = self.processes.get(key)
        if process is not None:
            process.popen.kill()

    def positions(self) -> dict[int, tuple[int, int]]:
        return {key: process.position() for key, process in self.processes.items()}

    @property
    def is_resting(self) -> bool:
        """Whether something that was printed waits for the tick."""
        return bool(self._resting)

    def poll(self) -> None:
        """Notice ends where the system gives no descriptor for them, and let go of what was muted."""
        for process in list(self.processes.values()):
            if process.pidfd is None and process.popen.poll() is not None:
                self._reap(process)
        if self._muted != self._printer.is_full:
            self._mute(self._printer.is_full)
        resting, self._resting = self._resting, []
        for process, which in resting:
            self._listen(process, which)

    def _listen(self, process: StageProcess, which: str) -> None:
        pipe = getattr(process.popen, which)
        if not self._muted and not pipe.closed and pipe not in self._selector.get_map():
            self._selector.register(pipe, selectors.EVENT_READ, lambda mask: self._on_pipe(process, which))

    def _mute(self, muted: bool) -> None:
        self._muted = muted
        for process in self.processes.values():
            for which in ("stdout", "stderr"):
                pipe = getattr(process.popen, which)
                known = pipe in self._selector.get_map()
                if muted and known:
                    self._selector.unregister(pipe)
                elif not muted:
                    self._listen(process, which)

    def _flush(self, process: StageProcess) -> None:
        try:
            process.connection.flush()
        except ConnectionClosed:
            return  # its end is noticed by itself
        wants_write = process.connection.wants_write
        if wants_write != process.waits_to_write and process.connection in self._selector.get_map():
            process.waits_to_write = wants_write
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants_write else 0)
            self._selector.modify(process.connection, wanted, self._selector.get_key(process.connection).data)

    def _on_socket(self, process: StageProcess, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(process)
        if mask & selectors.EVENT_READ and self._read_socket(process) < 0 and process.connection in self._selector.get_map():
            self._selector.unregister(process.connection)

    def _read_socket(self, process: StageProcess) -> int:
        """Hand on what has arrived; how many messages, or -1 at the end, also when the process says what no stage process says."""
        try:
            payloads = process.connection.read()
            for payload in payloads:
                message = decode(payload)
                protocol.check("process", "process", message)
                self._on_message(process.key, message)
        except ConnectionClosed:
            return -1
        except ProtocolError as error:
            self._printer.line(f"{process.spec.stage}: its process broke the protocol and is ended ({error})")
            process.popen.kill()
            return -1
        return len(payloads)

    def _on_pipe(self, process: StageProcess, which: str) -> bool:
        pipe = getattr(process.popen, which)
        try:
            data = os.read(pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return False
        self._print(process, which, process.lines(which, data, end=not data))
        if len(data) < _REST_BYTES_MAX and pipe in self._selector.get_map():
            self._selector.unregister(pipe)
            if data:
                self._resting.append((process, which))
        if self._printer.is_full and not self._muted:
            self._mute(True)
        return bool(data)

    def _print(self, process: StageProcess, which: str, lines: bytes) -> None:
        if not lines:
            return
        at = loglines.utc(time.time_ns() // 1_000_000)
        lines = loglines.tagged(lines, loglines.tag(at, process.position()[1], "err" if which == "stderr" else "out"))
        said_by = "" if process.spec.role == "on_done" else f"{process.spec.stage} | "
        shown = loglines.for_terminal(lines, said_by.encode()).decode(errors="replace")
        if shown:
            self._printer.line(shown[:-1])
        if which == "stderr":
            kept = loglines.for_terminal(lines, b"").decode(errors="replace").split("\n")[-1 - config.STDERR_LINES_KEPT : -1]
            process.stderr_lines.extend(line[:2000] for line in kept)
        self._on_lines(f"{process.spec.pipeline}/{process.spec.stage}", lines)

    def _reap(self, process: StageProcess) -> None:
        """The process has ended: hear what it still said, then say that it is gone."""
        code = process.popen.poll()
        if code is None or process.key not in self.processes:
            return
        while self._read_socket(process) > 0:
            pass
        for which in ("stdout", "stderr"):
            for _ in range(16):  # what a grandchild goes on printing is not waited for
                if not self._on_pipe(process, which):
                    break
        position = process.position()[1]
        del self.processes[process.key]
        for thing in (process.connection, process.popen.stdout, process.popen.stderr, process.pidfd):
            if thing is not None and thing in self._selector.get_map():
                self._selector.unregister(thing)
        process.close()
        self._on_exit(process.key, how_ended(code), position, list(process.stderr_lines))


def _widen(pipe: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        return  # it stays as it is: who prints very much waits a little


def how_ended(code: int) -> str:
    """A return code in words, to follow "its process"."""
    if code == 0:
        return "ended"
    if code > 0:
        return f"exited with code {code}"
    try:
        return f"died of signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"died of signal {-code}"


def ran_before(run_folder: Path, boot: str) -> dict[str, dict[str, list[Any]]]:
    """By former boot and queue, the items that were running when this machine's node died; as [lo, hi] those that did so together."""
    found: dict[str, dict[str, list[Any]]] = {}
    for file in sorted(run_folder.glob("*.position")):
        former = file.stem.rpartition("-")[0]
        data = file.read_bytes()
        if former == boot or len(data) < _POSITION.size:
            continue
        _, item_id = _POSITION.unpack_from(data, 0)
        try:
            queue, in_hand = _read_about(data)
        except (ValueError, KeyError, TypeError):
            continue  # the machine died while it was written: then nothing ran there yet
        if item_id and queue:
            together = sorted({one for one in in_hand if one})
            ran = [[one, one + 1] for one in together] if len(together) > 1 else [item_id]
            found.setdefault(former, {}).setdefault(queue, []).extend(ran)
    return found


def position_bytes(queue: str, in_hand: int) -> bytes:
    """What a position file begins as: the position, a line about it, and room for the ids of what a process has in hand together."""
    about = json.dumps({"queue": queue, "in_hand": in_hand}).encode()
    about += b" " * (-(len(about) + 1) % 8) + b"\n"
    return _POSITION.pack(0, 0) + about + bytes(8 * in_hand)


def _read_about(data: bytes) -> tuple[str, tuple[int, ...]]:
    """The queue, and the ids of what was in hand together."""
    line, _, rest = data[_POSITION.size :].partition(b"\n")
    about = json.loads(line)
    count = min(int(about.get("in_hand", 0)), len(rest) // 8)
    return about["queue"], struct.unpack_from(f"={count}Q", rest)


def forget_ran_before(run_folder: Path, boot: str) -> None:
    """The deliveries are counted in the log: the files of former boots may go."""
    for file in run_folder.glob("*.position"):
        if file.stem.rpartition("-")[0] != boot:
            file.unlink(missing_ok=True)


def read_manifest(folder: Path, project: dict[str, Any], timeout_s: float = config.MANIFEST_S) -> dict[str, Any]:
    """What the project in `folder` holds, found by a child that imports it: `{"manifest": ...}` or `{"error", "code", "traceback"}`."""
    try:
        done = subprocess.run(worker_command("manifest", str(folder), json.dumps(project)), cwd=folder, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, timeout=timeout_s, check=False,
                              process_group=0)  # Ctrl-C is the node's to answer, and no fault of the module
    except subprocess.TimeoutExpired:
        return {"error": f"importing {project['module']} takes longer than {timeout_s:g} s: keep work out of the module's top level",
                "code": ProjectError.code, "traceback": None}
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"error": f"importing {project['module']} ended its process, which {how_ended(done.returncode)}: keep what does so below "
                         'if __name__ == "__main__"', "code": ProjectError.code, "traceback": None}
    return answer


def start_placement(folder: Path, project: dict[str, Any], hash_seed: int) -> subprocess.Popen[bytes]:
    """A child that imports the project in `folder` to call its placement. It ends when its standard input does, so with this process."""
    return subprocess.Popen(worker_command("placement", str(folder), json.dumps(project)), cwd=folder, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": str(hash_seed)}, process_group=0)


def ask_placement(child: subprocess.Popen[bytes], nodes: list[dict[str, Any]], stages: list[dict[str, Any]],
                  timeout_s: float = config.PLACEMENT_S) -> dict[str, Any]:
    """What the function returns, or why it does not: `{"plan": ...}` or `{"error": text}`. Blocks, and leaves no child behind."""
    assert child.stdin is not None and child.stdout is not None, "it was started with pipes"
    deadline_s = time.monotonic() + timeout_s
    said: bytes | None = b""
    with contextlib.suppress(OSError):  # it has ended before it read the question
        child.stdin.write(json.dumps({"nodes": nodes, "stages": stages}).encode() + b"\n")
        child.stdin.flush()
        said = _line_of(child.stdout.fileno(), deadline_s)
    if said == b"":
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)  # its end of the pipe is closed, so it ends by itself
    child.kill()
    code = child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):  # what it did not read cannot be written any more
            pipe.close()
    if said is None:
        return {"error": f"it takes longer than {timeout_s:g} s, the import of its module counted"}
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or len(answer) != 1 or not answer.keys() <= {"plan", "error"}:
        return {"error": f"its process {how_ended(code)} before it returned"}
    return answer


def _line_of(pipe: int, deadline_s: float) -> bytes | None:
    """A line, or what comes before the pipe's end or beyond any sense; None when neither has come in time."""
    said = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not said.endswith(b"\n") and len(said) <= config.PLACEMENT_BYTES_MAX:
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                return None
            data = os.read(pipe, 1 << 16)
            if not data:
                break
            said += data
    return bytes(said)


def refusal(answer: dict[str, Any]) -> ClusterError:
    """The error that an answer of `read_manifest` stands for."""
    return (WrongUsage if answer["code"] == WrongUsage.code else ProjectError)(answer["error"])
