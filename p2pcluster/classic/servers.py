"""The servers of the older API: where the queues are, and what says what clients run.

Decided here: when the node starts (with `runserver`, or before it when a queue is asked for), that Ctrl-C and SIGTERM end it in order,
and how a client's question reaches the scheduler: by two queues, as JSON that names functions.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from p2pcluster.classic import utils
from p2pcluster.classic.clients import job_of
from p2pcluster.classic.functions import blocking_call, is_loading
from p2pcluster.classic.nodes import QueueNode
from p2pcluster.classic.processes import Job
from p2pcluster.classic.queues import Door, Queues
from p2pcluster.classic.schedulers import ClientInfo, PipelineReplicate
from p2pcluster.errors import ClusterError, WrongUsage
from p2pcluster.runners import error_of


class BaseServer:
    """Holds queues, durably: what was in them when it ended, however it ended, is there when it starts again, unless `fresh`."""

    @utils.in_one_line
    def __init__(self, port: int, authkey: bytes | str, *, home: str | os.PathLike[str] | None = None, fresh: bool = False) -> None:
        self.port = port
        self.authkey = authkey
        self.queues = Queues(self._door)
        self._is_started = False
        if not is_loading():
            self._node = QueueNode(port, authkey, home, fresh)
            utils.warn_of_weak_key(authkey)

    @utils.in_one_line
    def configure(self, names: Sequence[str]) -> None:
        """Name the queues. Before the server runs."""
        new = [name for name in utils.names_of(names) if name not in self.queues.names]
        if self._is_started and new:
            raise WrongUsage(f"the server runs already: call configure({new!r:.100}) before runserver and before a queue is used")
        self.queues.names += dict.fromkeys(new)

    @utils.in_one_line
    def runserver(self) -> None:
        """Serve until Ctrl-C, SIGTERM or `shutdown`."""
        if blocking_call():
            self.start()
            self.wait()

    @utils.in_one_line
    def shutdown(self) -> None:
        """End the server, from any thread, and whether it runs or not; the items stay."""
        if not is_loading():
            self._node.stop()

    def start(self) -> None:
        """Serve, and go on here. Raises `HomeError`."""
        if not self._is_started:
            self._is_started = True
            self._node.start(self.queues.names)

    def wait(self) -> None:
        """Until it ends; in the main thread a signal ends it."""
        with utils.sigterm_as_ctrl_c():
            try:
                self._node.wait()
            except KeyboardInterrupt:
                utils.say("stopping; the items stay")
                self._node.stop()

    def _door(self) -> Door:
        if not self._is_started:
            self.start()
        assert self._node.door is not None, "it was started"
        return self._node.door


class BroadcastServer(BaseServer):
    """The same; its clients find it without an address."""


class FunctionServer(BaseServer):
    """Tells its clients what to run: `functions = {name: [function, [queues]]}`, or with a third element, the number of processes."""

    @utils.in_one_line
    def __init__(self, port: int, authkey: bytes | str, functions: Mapping[str, Sequence[Any]], *,
                 home: str | os.PathLike[str] | None = None, fresh: bool = False) -> None:
        super().__init__(port, authkey, home=home, fresh=fresh)
        self._functions = _checked(functions)
        self.configure(_queues_of(self._functions))

    def start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._node.start(self.queues.names, talks=True)
            Clerk(self._node, self._functions, PipelineReplicate(), self.port).start()


class ProtocolServer:
    """Tells its clients what to run, as a scheduler decides, and sends them the folder of this program. The queues are those of
    `cluster_server`, which may have another port. Serves in its constructor."""

    @utils.in_one_line
    def __init__(self, port: int, cluster_server: BaseServer, functions: Mapping[str, Sequence[Any]], scheduler: Any, *,
                 home: str | os.PathLike[str] | None = None) -> None:
        if not blocking_call():
            return
        if not callable(getattr(scheduler, "schedule", None)):
            raise WrongUsage(f"{scheduler!r:.80} is no scheduler: give an object with schedule(info, functions), such as "
                             "PipelineReplicate()")
        if not isinstance(cluster_server, BaseServer):
            raise WrongUsage(f"{cluster_server!r:.80} is no server of queues: give a BaseServer or BroadcastServer that does not run yet")
        whole = _checked(functions)
        cluster_server.configure(_queues_of(whole))
        is_same = cluster_server.port == port
        node = cluster_server._node if is_same else QueueNode(port, cluster_server.authkey, home, True)
        if not is_same:
            cluster_server.start()
        cluster_server._is_started = True
        node.start(cluster_server.queues.names if is_same else [], _folder(), talks=True)
        Clerk(node, whole, scheduler, cluster_server.port).start()
        try:
            cluster_server.wait()
        finally:
            node.stop()


class Clerk(threading.Thread):
    """Answers the clients of a node that ask what to run."""

    def __init__(self, node: QueueNode, functions: Mapping[str, list[Any]], scheduler: Any, port: int) -> None:
        super().__init__(daemon=True)
        self._node = node
        self._scheduler = scheduler
        self._port = port
        self._functions = {name: pickle.dumps(one) for name, one in functions.items()}
        self._runs: dict[str, dict[str, list[str]]] = {}  # by machine and client, what that was told and has not ended yet

    def run(self) -> None:
        assert self._node.door is not None, "its node was started"
        try:
            cluster = self._node.door.cluster
            with cluster.take(utils.ASKED) as asked:
                for question in asked:
                    answer = self.hear(question["client"], question["facts"], question["ends"])
                    if answer is not None:
                        cluster.put(utils.ANSWERS, answer)
        except ClusterError as error:
            utils.say(f"clients are told nothing any more: {error}")

    def hear(self, client: str, facts: dict[str, Any], ends: bool) -> dict[str, Any] | None:
        """The answer to a client that asks, for the first time or once more; none to one that has ended."""
        runs = self._runs.setdefault(facts["name"], {})
        runs.pop(client, None)
        return None if ends else self._answer(client, facts, runs)

    def _answer(self, client: str, facts: dict[str, Any], runs: dict[str, list[str]]) -> dict[str, Any]:
        info = ClientInfo.of({**facts, "runs": [name for names in runs.values() for name in names]})
        try:
            functions = [_said(job) for job in jobs_of(self._scheduler.schedule(info, dict(self._functions)))]
            error = ""
            runs[client] = [one["name"] for one in functions]
        except BaseException as raised:  # the user's scheduler may raise anything, the end of the program too; the client hears of it
            traceback.print_exc()
            functions, error = [], str(error_of(raised)["text"])
        utils.say(f"client {info.name} at {info.address} runs " + (", ".join(one["name"] for one in functions) or f"nothing; {error}"))
        return {"client": client, "functions": functions, "error": error, "port": self._port, "version": self._node.version,
                "zip_sha256": self._node.zip_sha256}


def jobs_of(scheduled: Any) -> Iterator[Job]:
    """What a scheduler returned, whichever way it did. Raises `WrongUsage`."""
    chosen: Iterable[tuple[str | None, Any]] = scheduled.items() if isinstance(scheduled, Mapping) else ((None, one) for one in scheduled)
    for name, one in chosen:
        # Bytes are this server's own, which it handed to its own scheduler.
        yield _job(name, pickle.loads(one) if isinstance(one, bytes) else one)


def _job(name: str | None, one: Any) -> Job:
    """Raises `WrongUsage`."""
    if name is not None and (not isinstance(name, str) or not name.isprintable()):
        raise WrongUsage(f"a function's name is {name!r:.80} but must be text, such as 'Square'")
    job = job_of(*_whole(name, one))
    return Job(name or job.name, job.function, job.queues, job.count)


def _checked(functions: Any) -> dict[str, list[Any]]:
    """`{name: [function, queues, count]}` of functions that clients will find. Raises `WrongUsage`."""
    if not isinstance(functions, Mapping):
        raise WrongUsage(f"functions is {functions!r:.80} but must be {{name: [function, [queues]]}}")
    for name, one in functions.items():
        _job(name, one)
    return {name: _whole(name, one) for name, one in functions.items()}


def _whole(name: str | None, one: Any) -> list[Any]:
    """`[function, queues, count]`. Raises `WrongUsage`."""
    if not isinstance(one, (list, tuple)) or not 2 <= len(one) <= 3 or not callable(one[0]):
        raise WrongUsage(f"{name or 'a function'} is {one!r:.80} but must be [function, [queues]], or [function, [queues], number of "
                         "processes]")
    return [one[0], utils.names_of(one[1]), one[2] if len(one) == 3 else 1]


def _queues_of(functions: Mapping[str, list[Any]]) -> list[str]:
    return list(dict.fromkeys(name for _, queues, _ in functions.values() for name in queues))


def _said(job: Job) -> dict[str, Any]:
    """A function as a client is told of it; of a script its name in the folder, which lies elsewhere there."""
    fields = job.function.as_fields()
    if fields["script"]:
        fields["script"] = Path(fields["script"]).name
    return {**fields, "name": job.name, "queues": list(job.queues), "count": job.count}


def _folder() -> Path:
    """What is sent: the folder of the program. Raises `WrongUsage` where there is none."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        raise WrongUsage("ProtocolServer sends the folder of the program, and this one stands in no file: put it into a folder of its own")
    return Path(file).resolve().parent
