"""The queues of the older API: the methods of Python's `queue.Queue` over a queue of the server's.

Decided here: a raw `get` acknowledges at once, so its item is the caller's alone; queues have no maximum, so `put` never waits for room;
a server that is away is waited for. Each thread has a connection of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from p2pcluster.classic import utils
from p2pcluster.classic.functions import ScriptEnds, is_loading, needs_value
from p2pcluster.client import RETRY_S, Cluster, Link
from p2pcluster.config import Options
from p2pcluster.errors import AuthenticationFailed, ClusterError, ClusterNotFound, ProtocolError, UnknownName, WrongUsage

JOIN_S = 0.2  # between two looks of `join`


class Door:
    """The way to a server: its options and key, and a connection for each thread. `on_try` hears of lost and found connections."""

    def __init__(self, options: Options, secret: bytes, on_try: Callable[[ClusterError | None], None] | None = None) -> None:
        self.options = options
        self.secret = secret
        self._on_try = on_try  # not told of what is raised
        self._local = threading.local()

    def connect(self, timeout_s: float) -> Cluster:
        """A connection of its own, where everything has to be done in this time. Raises `ClusterNotFound`, `ProtocolError`."""
        return Cluster(Link(self.options, timeout_s, self.secret, self._heard), utils.PIPELINE)

    def _heard(self, trouble: ClusterError | None) -> None:
        """Who is away is waited for, but not who will never answer."""
        if isinstance(trouble, AuthenticationFailed):
            raise AuthenticationFailed(f"what listens at {self.options.seed[0]} is no server of the older API, or has another authkey: give "
                                       "both programs the same") from trouble
        if isinstance(trouble, ProtocolError):
            raise trouble
        if self._on_try is not None:
            self._on_try(trouble)

    def open(self, timeout_s: float) -> Cluster:
        """Connect this thread within the time, until the server has its queues; from then on a server that is away is waited for. Raises
        `ClusterNotFound`."""
        deadline_s = time.monotonic() + timeout_s
        cluster = self.connect(timeout_s)
        while cluster.project() is None:
            if time.monotonic() > deadline_s:
                cluster.close_connection()
                raise ClusterNotFound(f"the node at {self.options.seed[0]} has no queues after {timeout_s:g} s: is it a server of the "
                                      "older API?")
            time.sleep(RETRY_S)
        cluster.link.timeout_s = utils.FOREVER_S
        self._local.cluster = cluster
        return cluster

    @property
    def cluster(self) -> Cluster:
        """This thread's connection."""
        cluster: Cluster | None = getattr(self._local, "cluster", None)
        return cluster or self.open(utils.FOREVER_S)


class RawQueue:
    """A queue by name. Raises `queue.Empty` as Python's own do, and `ClusterError`."""

    maxsize = 0  # none, as `queue.Queue` says it

    def __init__(self, door: Door, name: str) -> None:
        self.door = door
        self.name = name
        self._tasks = 0

    def __repr__(self) -> str:
        return f"<queue {self.name!r} of {self.door.options.cluster}>"

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put a value; it is durable when this returns."""
        self.door.cluster.put(self.name, item)

    def put_nowait(self, item: Any) -> None:
        self.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take a value, which nobody else then gets. Raises `queue.Empty`."""
        if block and timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        with self.door.cluster.take(self.name, 1, timeout if block else 0.0) as items:
            for value in items:
                self._tasks += 1
                return value
        raise queue.Empty

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def qsize(self) -> int:
        """How many values wait."""
        return self._count("ready")

    def empty(self) -> bool:
        return self.qsize() == 0

    def full(self) -> bool:
        return False

    def task_done(self) -> None:
        """One value that this program got is dealt with. Raises `ValueError` when there is none such."""
        if not self._tasks:
            raise ValueError("task_done() called too many times")
        self._tasks -= 1

    def join(self) -> None:
        """Until the queue is empty and nobody of those who give back what they cannot finish has one of its values."""
        while self._count("ready", "leased", "delayed"):
            time.sleep(JOIN_S)

    def _count(self, *states: str) -> int:
        found = [q for q in self.door.cluster.status()["queues"] if (q["pipeline"], q["name"]) == (utils.PIPELINE, self.name)]
        if not found:
            raise UnknownName(f"the server has no queue {self.name!r}: name it in its configure")
        return sum(found[0][state] for state in states)


class IdleQueue(RawQueue):
    """The same while a script is run for its functions: it does nothing, and the script ends where it needs a value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<queue {self.name!r}>"

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        return None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        raise ScriptEnds

    def task_done(self) -> None:
        return None

    def join(self) -> None:
        return None

    def _count(self, *states: str) -> int:
        needs_value()
        return 0


class Queues(Mapping[str, RawQueue]):
    """`queues[name]`: those that were configured, and any other that the server has."""

    def __init__(self, door: Callable[[], Door]) -> None:
        self._door = door
        self._made: dict[str, RawQueue] = {}  # one for each name, as each counts what `task_done` is told
        self.names: list[str] = []

    def __getitem__(self, name: str) -> RawQueue:
        if is_loading():
            return IdleQueue(name)
        if name not in self:
            raise WrongUsage(f"there is no queue {name!r:.60} here; there are {', '.join(self) or 'none'}: name it in configure")
        return self._made.setdefault(name, RawQueue(self._door(), name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (is_loading() or name in self.names or name in server_queues(self._door().cluster))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def server_queues(cluster: Cluster) -> list[str]:
    """The names of a server's queues, without those that servers and clients talk by."""
    return [record["name"] for record in cluster.manifest["queues"] if record["name"] not in (utils.ASKED, utils.ANSWERS)]


