"""Nodes on hosts of their own: one network namespace each, a home and a clone of the project each, and faults of the network between them.

Asked from inside a host's namespace, as a program there would ask. What every test of them ends with is here too: all copies whole and alike.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness import ROOT, NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect
from p2pcluster.errors import ClusterError
from p2pcluster.journal import open_for_reading
from tests.namespaces import Switch, inside

sys.path.insert(0, str(ROOT / "scripts"))
import _journal  # noqa: E402
import journal_check  # noqa: E402

ROLES = {
    1: {"leader": 1},
    2: {"leader": 1, "standby": 1},
    3: {"leader": 1, "voter": 2},
    5: {"leader": 1, "voter": 4},
    7: {"leader": 1, "voter": 4, "standby": 1, "worker": 1},
}
WAIT_S = 60.0


class Hosts:
    """The hosts `a`, `b`, ... of one network, and the nodes that run there."""

    def __init__(self, site: Site, switch: Switch, count: int, project: Path) -> None:
        self.site = site
        self.switch = switch
        self.addresses = {name: f"10.77.3.{number}" for number, name in enumerate("abcdefg"[:count], 1)}
        self.namespaces = {name: switch.host(name, f"{address}/24") for name, address in self.addresses.items()}
        self.nodes: dict[str, NodeProcess] = {}
        for name in self.addresses:
            shutil.copytree(project, site.folder / f"project-{name}")

    @property
    def names(self) -> list[str]:
        return list(self.addresses)

    def home(self, name: str) -> Path:
        return self.site.folder / name

    def start(self, name: str) -> NodeProcess:
        command = ["ip", "netns", "exec", self.namespaces[name], sys.executable, "-m", "p2pcluster"]
        self.nodes[name] = self.site.start("run", str(self.site.folder / f"project-{name}"), command=command,
                                           P2PCLUSTER_HOME=str(self.home(name)), P2PCLUSTER_BIND="0.0.0.0")
        return self.nodes[name]

    def close(self) -> None:
        """Kill what runs, and take the network down; once more does nothing."""
        for node in self.nodes.values():
            if node.is_running:
                node.kill()
        with contextlib.suppress(OSError):
            self.switch.close()

    # ---- asking

    @contextlib.contextmanager
    def connect(self, name: str, timeout_s: float = 10.0) -> Iterator[Cluster]:
        """A program on the host; it is on that host as long as the block."""
        with inside(self.namespaces[name]), connect(home=self.home(name), authkey_file=self.site.key_file, timeout_s=timeout_s) as link:
            yield link

    def status(self, name: str, timeout_s: float = 1.0) -> dict[str, Any] | None:
        """The cluster as the host sees it; None while nobody leads for it."""
        try:
            with self.connect(name, timeout_s) as link:
                return link.status()
        except ClusterError:
            return None

    def leader(self, name: str) -> str | None:
        """Who leads, as the host sees it."""
        status = self.status(name)
        return str(status["leader"]["name"]).rpartition("/")[2] if status else None

    def wait_for_roles(self, name: str, **roles: int) -> dict[str, str]:
        """Each node's role once so many have each."""

        def fits() -> dict[str, str] | None:
            status = self.status(name)
            found = {node["name"].rpartition("/")[2]: node["role"] for node in status["nodes"]} if status else {}
            return found if Counter(found.values()) == roles else None

        return wait_for(fits, f"nodes with the roles {roles} as {name} sees them", WAIT_S)

    def wait_for_leader(self, name: str, among: Iterable[str]) -> str:
        """The leader that the host sees, once it is one of these."""
        known = set(among)
        return wait_for(lambda: (found := self.leader(name)) in known and found, f"{name} sees a leader among {sorted(known)}", WAIT_S) or ""

    # ---- what everything ends with

    def wait_for_equal_copies(self, copies: Iterable[str]) -> None:
        """All copies come to stand at one entry, hold the same state there, and are whole."""
        names = list(copies)

        def at_one_entry() -> dict[str, tuple[int, bytes]] | None:
            stands = {name: self._stand(name) for name in names}
            return stands if len({index for index, _ in stands.values()}) == 1 else None

        stands = wait_for(at_one_entry, f"the copies of {names} stand at one entry", WAIT_S)
        assert stands is not None and len(set(stands.values())) == 1, f"copies differ at one entry: {stands}"
        digests: dict[int, set[str]] = {}
        for name in names:
            report = journal_check.check(_journal.place_of(str(self.home(name))))
            assert report.is_whole, f"{name}: {report}"
            digests.setdefault(report.committed, set()).add(report.digest)
        assert all(len(some) == 1 for some in digests.values()), f"contents differ at one entry: {digests}"

    def _stand(self, name: str) -> tuple[int, bytes]:
        reader = open_for_reading(self.home(name) / "journal.sqlite3", self.home(name) / "journal.mark")
        return reader.state.applied_idx, reader.state.hash

    def term(self, name: str) -> int:
        """The term in the host's journal."""
        return int(open_for_reading(self.home(name) / "journal.sqlite3", self.home(name) / "journal.mark").meta["term"] or 0)
