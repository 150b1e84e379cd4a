"""The processes of one `process` call: started, watched, replaced, ended.

Decided here: a process that dies (a signal, `os._exit`) is replaced, one whose function has returned or raised is not; what is said about
the server is said once for all of them; and Ctrl-C lets what runs finish. Nothing here looks at a clock while nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from p2pcluster import config
from p2pcluster.classic import in_hand, utils, worker
from p2pcluster.classic.functions import Reference
from p2pcluster.classic.queues import Door
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterError
from p2pcluster.process import how_ended
from p2pcluster.worker import Channel


@dataclass(frozen=True)
class Job:
    """One function, the names of its queues, and in how many processes it runs."""

    name: str
    function: Reference
    queues: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Setting:
    """What all processes of a call share: the server, its key, and where the program's modules are."""

    port: int
    server: str
    secret: bytes
    path: tuple[str, ...]
    folder: str | None = None


class _Process:
    """One process: `job` again and again, each time that it dies. `socket` is our end of the pair."""

    def __init__(self, job: Job, setting: Setting) -> None:
        self.job = job
        self._setting = setting
        self.deaths = 0
        self.refusal = ""

    def start(self) -> None:
        """Raises `ClusterError` where the machine has no room for it."""
        try:
            self._start()
        except OSError as error:
            raise ClusterError(f"no process for {self.job.name} can be started ({error.strerror}): end some that are not needed, or look "
                               "for room on the disk") from error

    def _start(self) -> None:
        page = in_hand.new_page()
        ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        try:
            self.in_hand = in_hand.InHand(page)
            self.popen = subprocess.Popen(
                worker.command(theirs.fileno(), page, self.job.name), stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), page),
                cwd=self._setting.folder, process_group=0,  # Ctrl-C is the program's to answer
            )
        finally:
            theirs.close()
            os.close(page)
        self.started_s = time.monotonic()
        self.socket = ours
        self.channel = Channel(ours)
        setting, job = self._setting, self.job
        fields = {"function": job.function.as_fields(), "name": job.name, "queues": list(job.queues), "port": setting.port,
                  "server": setting.server, "path": list(setting.path), "argv": sys.argv}
        self.send(Message("setup", fields, (setting.secret,)))

    def send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # it has died, which its socket's end tells
            self.channel.send(message)


class Processes:
    """See the module; `run` blocks until all are over."""

    def __init__(self, jobs: Sequence[Job], setting: Setting, door: Door) -> None:
        self._door = door
        self._selector = selectors.DefaultSelector()
        self._processes = [_Process(job, setting) for job in jobs for _ in range(job.count)]
        self._due: dict[_Process, float] = {}  # those that died and start again, each when
        self._server_is_away = False
        self._failed: list[str] = []

    def run(self) -> None:
        """Raises `Stopped` after Ctrl-C, and `ClusterError` where a process cannot do its work or a function has raised."""
        try:
            with utils.sigterm_as_ctrl_c():
                for process in self._processes:
                    self._start(process)
                while self._running or self._due:
                    self._turn()
        except KeyboardInterrupt:
            utils.say("stopping: what runs may finish; Ctrl-C again ends it at once")
            self._stop()
            raise utils.Stopped(worker.STOPPED) from None
        except BaseException:
            self._stop()
            raise
        finally:
            self._selector.close()
        if self._failed:
            raise ClusterError(f"of {len(self._processes)} processes {len(self._failed)} ended with an error "
                               f"({', '.join(sorted(set(self._failed)))}): it is printed above")

    @property
    def _running(self) -> list[_Process]:
        return [key.data for key in self._selector.get_map().values()]

    def _start(self, process: _Process) -> None:
        process.start()
        self._selector.register(process.socket, selectors.EVENT_READ, process)

    def _turn(self) -> None:
        wait_s = max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None
        for key, _ in self._selector.select(wait_s):
            self._hear(key.data)
        for process in [process for process, due_s in self._due.items() if due_s <= time.monotonic()]:
            del self._due[process]
            self._start(process)

    def _hear(self, process: _Process) -> None:
        try:
            messages = process.channel.receive()
        except OSError:
            messages = []
        for message in messages:
            if message.kind == "refused":
                process.refusal = message.fields["text"]
            else:
                self._on_server(message.fields["trouble"])
        if not messages:
            self._selector.unregister(process.socket)
            process.socket.close()
            self._on_end(process, process.popen.wait())

    def _on_server(self, trouble: str | None) -> None:
        if (trouble is not None) == self._server_is_away:
            return
        self._server_is_away = trouble is not None
        utils.say("the server is there again" if trouble is None else f"the server is away, and is waited for: {trouble}")

    def _on_end(self, process: _Process, code: int) -> None:
        held = process.in_hand.read()
        process.in_hand.close()
        if process.refusal:
            raise ClusterError(process.refusal)
        if held is not None and code != worker.STOPPED:
            process.deaths = 1  # it did start: what killed it is the item
            self._count(process.job.name, how_ended(code), held)
        elif code == worker.RAISED:
            self._failed.append(process.job.name)
            return
        elif code == 0:
            return
        else:
            lived_s = time.monotonic() - process.started_s
            process.deaths = 1 if lived_s > config.RESTART_BACKOFF_MAX_S else process.deaths + 1
            utils.say(f"a process of {process.job.name} {how_ended(code)} and is replaced")
        delay_s = min(config.RESTART_BACKOFF_S * 2.0 ** min(process.deaths - 1, config.DOUBLINGS_MAX), config.RESTART_BACKOFF_MAX_S)
        self._due[process] = time.monotonic() + delay_s

    def _count(self, name: str, how: str, held: dict[str, Any]) -> None:
        """The item that a process died with has had a delivery: it can say so no more, and only now is the lease still its own."""
        error = {"type": "ProcessDied", "text": f"its process {how}", "traceback": None, "stage": name, "node": socket.gethostname()}
        cluster = self._door.cluster
        reply = cluster.link.call(Message("fail", {**held, "error": error}))
        is_parked = reply.fields.get("parked", False)
        utils.say(f"a process of {name} {how} and is replaced; the item of {held['queue'].partition('/')[2]} that it had in hand is "
                  + (utils.parked(cluster.link.options) if is_parked else "tried again"))

    def _stop(self) -> None:
        """Let what runs finish, at most `DRAIN_S`; a second Ctrl-C ends it at once. Whatever was not finished goes back."""
        running: list[Any] = self._running
        for process in running:
            process.send(Message("stop", {}))
        by_s = time.monotonic() + config.DRAIN_S
        try:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.popen.wait(max(0.0, by_s - time.monotonic()))
        except KeyboardInterrupt:
            utils.say("ended at once")
        for process in running:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait()
            process.socket.close()
            process.in_hand.close()
