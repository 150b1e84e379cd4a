"""The clients of the older API: where the functions run.

Decided here: how a client finds its server and how long it waits for the first word of it, and how it learns what to run where the server
says so: by JSON that names functions, never by a pickle. Files that a server sends go into a folder of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from p2pcluster import bundle
from p2pcluster.classic import utils
from p2pcluster.classic.finding import find_servers
from p2pcluster.classic.functions import Reference, blocking_call, is_loading, reference_of
from p2pcluster.classic.processes import Job, Processes, Setting
from p2pcluster.classic.queues import Door, Queues, server_queues
from p2pcluster.classic.wrappers import Looping
from p2pcluster.client import Cluster, bodies_of
from p2pcluster.config import Address
from p2pcluster.core.codec import Message
from p2pcluster.core.stages import Stage
from p2pcluster.errors import ClusterError, ClusterNotFound, ProjectError, WrongUsage

ASK_AGAIN_S = 5.0  # the server may have been started again meanwhile, and forgotten what it was asked
READ_EACH_S = 0.1
SILENT_S = 2.0  # for a server that is there, before a line says that it is looked for
END_S = 1.0  # for the last word to a server, which may be away


class _Client:
    """What all clients have: a server, a key, queues, and processes. One that is made while a script is run for its functions connects
    when one of these uses it."""

    def __init__(self, port: int, authkey: bytes | str, find: Callable[[float], Address], timeout_s: float) -> None:
        self.port = port
        self._authkey = authkey
        self._find = find
        self._timeout_s = timeout_s
        self._queues = Queues(lambda: self._door)
        if not is_loading():
            utils.warn_of_weak_key(authkey)
            self.connect()

    @functools.cached_property
    def _secret(self) -> bytes:
        return utils.stretched(self._authkey, self.port)

    @functools.cached_property
    def _door(self) -> Door:
        """The way to the server, once that is there. Raises `ClusterNotFound`, `AuthenticationFailed`."""
        self._by_s = time.monotonic() + self._timeout_s
        self._has_said = False
        self.server = self._find(self._timeout_s)
        door = Door(utils.options_of(self.port, seed=self.server), self._secret, self._on_try)
        try:
            door.open(max(1.0, self._by_s - time.monotonic()))
        except ClusterNotFound as error:
            raise ClusterNotFound(f"there was no server at {self.server} for {self._timeout_s:g} s ({error})") from error
        return door

    def connect(self) -> Door:
        """Wait for the server here, and not at some later line."""
        return self._door

    def _on_try(self, trouble: ClusterError | None) -> None:
        if trouble is None:
            self._has_said = False
        elif not self._has_said:
            self._has_said = True
            left_s = self._by_s - time.monotonic()
            utils.say(f"waiting for the server at {self.server}" + (f", for {left_s:.0f} s at most" if left_s > 0 else ""))

    @property
    def queues(self) -> Queues:
        """`queues[name]`: what can be put into and got from."""
        return self._queues

    @utils.in_one_line
    def configure(self, names: Sequence[str]) -> None:
        """Name the queues that are used here; the server has to have them."""
        self._queues.names += utils.names_of(names)
        if not is_loading():
            self._check(self._queues.names)

    def _check(self, names: Sequence[str]) -> None:
        known = server_queues(self._door.cluster)
        for name in names:
            if name not in known:
                raise WrongUsage(f"the server at {self.server} has no queue {name!r}, it has {', '.join(known) or 'none'}: name it in the "
                                 "server's configure")

    def _run(self, jobs: Sequence[Job], folder: str | None = None, path: Sequence[str] | None = None) -> None:
        self._check([name for job in jobs for name in job.queues])
        setting = Setting(self.port, str(self.server), self._secret, tuple(path or sys.path), folder)
        Processes(jobs, setting, self._door).run()


class BaseClient(_Client):
    """Runs functions on the queues of the server at `(host, port)`. Waits `timeout_s` for it at first, later for as long as it is away."""

    @utils.in_one_line
    def __init__(self, server_address: tuple[str, int], authkey: bytes | str, *, timeout_s: float = utils.CONNECT_S) -> None:
        if not isinstance(server_address, (tuple, list)) or len(server_address) != 2 or not isinstance(server_address[0], str):
            raise WrongUsage(f"the server's address is {server_address!r:.60} but must be (host, port), such as ('127.0.0.1', 50000)")
        host, port = server_address
        super().__init__(port, authkey, lambda left_s: Address(host or "127.0.0.1", port), timeout_s)

    @utils.in_one_line
    def process(self, funcs: Any, args: Any, num_process: Any = 1) -> None:
        """Run functions with their queues, each in so many processes, until all are over: in three lists, or one function."""
        if not blocking_call():
            return
        if callable(funcs):
            funcs, args, num_process = [funcs], [args], [num_process]
        self._run([job_of(func, queues, count) for func, queues, count in _in_step(funcs, args, num_process)])


class BroadcastClient(BaseClient):
    """The same, and the server of that port is found by itself."""

    @utils.in_one_line
    def __init__(self, server_port: int, authkey: bytes | str, *, timeout_s: float = utils.CONNECT_S) -> None:
        _Client.__init__(self, server_port, authkey, self._look, timeout_s)

    def _look(self, left_s: float) -> Address:
        return search(self.port, self._secret, left_s)


class FunctionClient(_Client):
    """Finds the server of that port, asks it what to run here, and runs that, all in its constructor."""

    @utils.in_one_line
    def __init__(self, server_port: int, authkey: bytes | str, *, timeout_s: float = utils.CONNECT_S) -> None:
        super().__init__(server_port, authkey, lambda left_s: search(server_port, self._secret, left_s), timeout_s)
        if blocking_call():
            with Conversation(self._door.cluster, self.server) as server:
                answer = server.ask(timeout_s)
                jobs = [_job_said(one, _script_here) for one in answer["functions"]]
                _say_what_runs(jobs)
                self._run(jobs)


class ProtocolClient(_Client):
    """The same, and the server sends the project's files too; `run` blocks."""

    @utils.in_one_line
    def __init__(self, server_port: int, authkey: bytes | str, *, timeout_s: float = utils.CONNECT_S) -> None:
        super().__init__(server_port, authkey, lambda left_s: search(server_port, self._secret, left_s), timeout_s)

    @utils.in_one_line
    def run(self) -> None:
        """Fetch the files, ask what to run, and run it until all is over."""
        if not blocking_call():
            return
        cluster = self._door.cluster
        with Conversation(cluster, self.server) as server:
            answer = server.ask(self._timeout_s)
            with received(cluster, answer["version"], answer["zip_sha256"]) as folder:
                jobs = [_job_said(one, lambda script: str(folder / script)) for one in answer["functions"]]
                _say_what_runs(jobs)
                self._queue_client(answer["port"])._run(jobs, str(folder), [str(folder), *sys.path[1:]])

    def _queue_client(self, port: int) -> _Client:
        """A client of the server that has the queues, which may be another one of that machine."""
        if port == self.port:
            return self
        return BaseClient((self.server.host, port), self._authkey, timeout_s=self._timeout_s)


def search(port: int, secret: bytes, timeout_s: float) -> Address:
    """Find the server of a port, and say so where it takes long."""
    options = utils.options_of(port)
    try:
        found = find_servers(options, secret, min(SILENT_S, timeout_s))
    except ClusterNotFound:
        if timeout_s <= SILENT_S:
            raise
        utils.say(f"looking for the server of port {port}, for {timeout_s:g} s at most")
        found = find_servers(options, secret, timeout_s - SILENT_S)
    if len(found) > 1:
        utils.say(f"there are {len(found)} servers of port {port} and this authkey, at {', '.join(map(str, found))}: this is a client of the "
                  "first; end the others, or name one with BaseClient")
    return found[0]


def job_of(func: Any, queues: Any, count: Any) -> Job:
    """One function as it was given to `process`. Raises `WrongUsage`."""
    reference = reference_of(func)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise WrongUsage(f"{reference.qualname}: the number of processes is {count!r:.40} but must be a whole number from 1")
    names = utils.names_of(queues)
    stage = func.stage if isinstance(func, Looping) else func
    if isinstance(stage, Stage) and len(names) < (2 if stage.kind == "stage" else 1):
        needs = {"source": "one that it feeds", "stage": "one that it reads and then one that it feeds", "sink": "one that it reads"}
        raise WrongUsage(f"{reference.qualname}: it has {', '.join(names) or 'no queue'} and needs {needs[stage.kind]}")
    return Job(reference.qualname, reference, tuple(names), count)


def _in_step(funcs: Any, args: Any, counts: Any) -> Iterator[tuple[Any, Any, Any]]:
    funcs, args = list(funcs), list(args)
    counts = [counts] * len(funcs) if isinstance(counts, int) else list(counts)
    if not len(funcs) == len(args) == len(counts):
        raise WrongUsage(f"process got {len(funcs)} functions, the queues of {len(args)} and the numbers of processes of {len(counts)}: "
                         "give one of each")
    return zip(funcs, args, counts, strict=True)


def _job_said(one: dict[str, Any], find_script: Callable[[str], str]) -> Job:
    """A function that the server names; one of its own script is looked for here."""
    script = find_script(one["script"]) if one["script"] else None
    reference = Reference(one["module"], one["qualname"], script, one["package"], one["calls"])
    return Job(one["name"], reference, tuple(one["queues"]), one["count"])


def _script_here(script: str) -> str:
    """The server's script on this machine. Raises `ProjectError`."""
    spec = importlib.util.find_spec(Path(script).stem)
    if spec is None or spec.origin is None:
        raise ProjectError(f"the server's functions stand in its script {script}, which is not beside this program: copy it here, or use "
                           "ProtocolServer, which sends the files")
    return spec.origin


def _say_what_runs(jobs: Sequence[Job]) -> None:
    utils.say("the server has this client run " + (", ".join(f"{job.name} x {job.count}" for job in jobs) or "nothing"))


# ---- what the server says


class Conversation:
    """With a server that says what to run here: it is asked, answers, and hears of the end."""

    def __init__(self, cluster: Cluster, server: Address) -> None:
        self._cluster = cluster
        self._server = server
        self._me = secrets.token_hex(8)
        self._has_asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._has_asked:
            link, before_s = self._cluster.link, self._cluster.link.timeout_s
            link.timeout_s = END_S
            with contextlib.suppress(ClusterError):  # a server that is away has forgotten who ran what
                self._say(ends=True)
            link.timeout_s = before_s

    def ask(self, timeout_s: float) -> dict[str, Any]:
        """What to run here, by the server's scheduler. Raises `ClusterNotFound` when no answer comes in time, `ClusterError` when it
        failed."""
        by_s = time.monotonic() + timeout_s
        if utils.ASKED not in [record["name"] for record in self._cluster.manifest["queues"]]:
            raise WrongUsage(f"the server at {self._server} does not say what to run: it is no FunctionServer or ProtocolServer; use "
                             "BaseClient")
        ask_s = 0.0
        while (now_s := time.monotonic()) < by_s:
            if now_s >= ask_s:
                ask_s = now_s + ASK_AGAIN_S
                self._say(ends=False)
            answer = self._heard()
            if answer is not None and answer["error"]:
                raise ClusterError(f"the server's scheduler failed: {answer['error']}")
            if answer is not None:
                return answer
            time.sleep(READ_EACH_S)
        raise ClusterNotFound(f"the server at {self._server} did not say within {timeout_s:g} s what to run here: look what it prints")

    def _say(self, ends: bool) -> None:
        self._has_asked = True
        self._cluster.put(utils.ASKED, {"client": self._me, "facts": facts(self._server), "ends": ends})

    def _heard(self) -> dict[str, Any] | None:
        """The answer, taken off its queue without those of others; of several, where it was asked more than once, the last."""
        queue, after = self._cluster.full(utils.ANSWERS), 0
        found: dict[str, Any] | None = None
        while (reply := self._cluster.link.call(Message("read", {"queue": queue, "after": after, "count": 1000}))).kind == "values":
            for item_id, body in bodies_of(reply):
                after = item_id
                answer: dict[str, Any] = self._cluster.value_of(utils.ANSWERS, body)
                if answer["client"] == self._me:
                    found = answer
                    self._cluster.link.call(
                        Message("done", {"queue": queue, "ranges": [[item_id, item_id + 1]], "ports": [], "whole": False}))
        return found


def facts(server: Address) -> dict[str, Any]:
    """What this client says of itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(tuple(server))  # nothing is sent: it only chooses the way there
        address = probe.getsockname()[0]
    try:
        memory_gb: float | None = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)
    except (ValueError, OSError, AttributeError):
        memory_gb = None
    tags = list(utils.options_of(server.port).tag)
    return {"name": socket.gethostname(), "cores": os.cpu_count() or 1, "memory_gb": memory_gb, "tags": tags, "address": address}


@contextmanager
def received(cluster: Cluster, version: str, zip_sha256: str) -> Iterator[Path]:
    """The server's files in a folder of their own, as long as it is used."""
    slices: list[bytes] = []
    parts = 1
    while len(slices) < parts:
        reply = cluster.check(cluster.link.call(Message("bundle_get", {"version": version, "part": len(slices)})), "the project's files")
        parts = reply.fields["parts"]
        slices.append(bytes(reply.blobs[0]))
    with tempfile.TemporaryDirectory(prefix="p2pcluster-") as scratch:
        folder = Path(scratch) / version
        bundle.unpack(b"".join(slices), zip_sha256, folder)
        yield folder
