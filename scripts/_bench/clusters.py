"""Several nodes on loopback that are one cluster: started, waited for, given a project, asked who leads, killed.

Refuses to know what is measured. It sends no signal but to processes that it started.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from _bench.nodes import START_S, BenchError, Node, copy_project, environment, free_port, read_json_file
from p2pcluster.client import Cluster
from p2pcluster.core.codec import Message
from p2pcluster.core.membership import voters_wanted
from p2pcluster.errors import ClusterError
from p2pcluster.home import Keyfile
from p2pcluster.lan import Lan

ANSWER_S = 0.1  # a node that does not answer by then is asked again later: the next one may lead
POLL_S = 0.005
DEPLOY_S = 60.0

T = TypeVar("T")


class Progress(NamedTuple):
    """What the leader says at one moment; `at_s` is when the answer was here."""

    at_s: float
    leader: str
    done: int
    processes: int
    ready: int


class Traffic(NamedTuple):
    """Broadcasts that were heard: of discovery and elections, without the headers of UDP and IP."""

    datagrams: int
    bytes: int


class Nodes:
    """`count` nodes over `folder` with homes of their own, one port and one key, started at the same instant."""

    def __init__(self, folder: Path, count: int, *arguments: str, project: str | None = None,
                 params: Mapping[str, int] | None = None) -> None:
        """All of them offer `project`; None: they wait for `deploy`."""
        self.folder = folder
        self.port = free_port()
        self._arguments = arguments
        self._params = params
        Keyfile(folder / "authkey").make()
        (folder / "project").mkdir()
        if project is not None:
            copy_project(project, "pipeline.py", folder / "project")
        self.started_s = time.monotonic()
        self._running: dict[str, Node] = {}
        with ExitStack() as failed:
            failed.callback(self.kill)
            for name in (f"node{number}" for number in range(count)):
                self.start(name)
            failed.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self, name: str) -> Node:
        """Also for one that was killed, with the home that it had."""
        node = Node(self.folder, None, *self._arguments, params=self._params, name=name, port=self.port)
        self._running[name] = node
        return node

    def kill(self) -> None:
        for node in self._running.values():
            node.kill_now()
        for node in self._running.values():
            node.kill()

    def stop(self) -> None:
        """All at once: the last would be without a majority."""
        for node in self._running.values():
            node.ask_to_stop()
        for node in self._running.values():
            node.wait_until_stopped()

    def named(self, name: str) -> Node:
        return self._running[name]

    def names(self) -> list[str]:
        return list(self._running)

    def others(self, name: str) -> list[Node]:
        return [node for node in self._running.values() if node.name != name]

    def connect(self, pipeline: str | None = None) -> Cluster:
        """By the first node, which is asked who leads."""
        return next(iter(self._running.values())).connect(pipeline)

    def wait_for_voters(self) -> str:
        """Until all are there, with as many votes as so many nodes have; returns the leader's name."""
        voters = voters_wanted(len(self._running)) - 1

        def settled() -> str | None:
            try:
                with self.connect() as cluster:
                    status = cluster.status()
            except ClusterError:
                return None
            roles = [node["role"] for node in status["nodes"]]
            whole = len(roles) == len(self._running) and roles.count("voter") == voters and "leader" in roles
            return _short(status["leader"]["name"]) if whole else None

        return wait_for(settled, f"a leader and {voters} voters", 0.05)

    def deploy(self, project: str, by: str, items: int | None = None) -> None:
        """As a user on the machine of node `by` would.

        `items` takes the place of W1's million in the file, since `deploy` sets no parameter.
        """
        source = self.folder / "deployed"
        source.mkdir()
        copy_project(project, "pipeline.py", source)
        if items is not None:
            text = (source / "pipeline.py").read_text()
            assert '"items": 1_000_000' in text, "the project's default"
            (source / "pipeline.py").write_text(text.replace('"items": 1_000_000', f'"items": {items}'))
        words = ["deploy", str(source), "--home", str(self.folder / by), "--authkey-file", str(self.folder / "authkey"),
                 "--cluster", self.folder.name, "--bind", "127.0.0.1", "--port", str(self.port)]
        done = subprocess.run([sys.executable, "-m", "p2pcluster", *words], env=environment(), cwd=self.folder,
                              text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEPLOY_S, check=False)
        if done.returncode:
            raise BenchError(f"deploy ended with exit code {done.returncode}: {done.stdout}{done.stderr}")

    def wait_for_line(self, text: str) -> float:
        """The moment at which the first of the nodes printed a line with `text`."""

        def first() -> float | None:
            found = [at_s for node in self._running.values() for at_s, line in list(node.lines) if text in line]
            return min(found, default=None)

        return wait_for(first, f"a node that prints {text!r}", POLL_S)

    def read_output(self, pipeline: str, name: str) -> Any:
        """What the sink wrote when its process ended, on whichever node that was."""

        def written() -> Path | None:
            files = [node.out_dir(pipeline) / name for node in self._running.values()]
            return next((file for file in files if file.exists() and file.stat().st_size), None)

        return read_json_file(wait_for(written, name, 0.05))

    def hear(self, for_s: float) -> Traffic:
        """Listen at the port that is shared, as one more node would; what goes to one node alone is not heard."""
        with Lan("127.0.0.1", self.port) as lan:
            until_s = time.monotonic() + for_s
            sizes: list[int] = []
            while time.monotonic() < until_s:
                sizes += [len(data) for data, _ in lan.receive()]
                time.sleep(0.02)
        return Traffic(len(sizes), sum(sizes))


def progress_of(cluster: Cluster) -> Progress | None:
    """Asked of the very node that `cluster` is connected to; None: it does not lead, or does not answer.

    `Cluster.status` would look for who leads, and rest 200 ms between two tries.
    """
    deadline_s = time.monotonic() + ANSWER_S
    try:
        fields = cluster.link.reply(cluster.link.request(Message("status", {}), deadline_s), deadline_s).fields
    except ClusterError:
        return None
    return read_status(fields["status"]) if "status" in fields else None


def read_status(status: dict[str, Any]) -> Progress:
    """`status` was here just now; `ready` is what waits for a stage."""
    stages, queues = status["stages"], status["queues"]
    return Progress(time.monotonic(), _short(status["leader"]["name"]), sum(stage["done"] for stage in stages),
                    sum(stage["processes"] for stage in stages), queues[0]["ready"] if queues else 0)


def wait_for(look: Callable[[], T | None], what: str, pause_s: float) -> T:
    """What `look` finds at last. Raises `BenchError`."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        found = look()
        if found is not None:
            return found
        time.sleep(pause_s)
    raise BenchError(f"no sign of {what} in {START_S:g} s")


def _short(name: str) -> str:
    """A node is called by its host and its home."""
    return name.rpartition("/")[2]
