"""Several nodes on one machine, found by broadcast over loopback: joining, sharing the work, and dying."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT, NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect
from p2pcluster.errors import ClusterError
from p2pcluster.journal import open_for_reading

NUMBERS = """
    import time
    from p2pcluster import Pipeline, Queue, source, stage

    @source
    def Numbers():
        for n in range({count}):
            yield n

    @stage(processes=3)
    def Add(x):
        time.sleep({delay})
        return x + 1

    pipeline = Pipeline("numbers", Numbers >> Add >> Queue("out", maxsize=None))
"""


class Nodes:
    """Nodes of one cluster by name, each with a home of its own beside the site's."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.running: dict[str, NodeProcess] = {}

    def home(self, name: str) -> Path:
        return self.site.folder / name

    def start(self, name: str, *words: str) -> NodeProcess:
        node = self.site.start(*words, P2PCLUSTER_HOME=str(self.home(name)))
        self.running[name] = node
        return node

    def connect(self, name: str, timeout_s: float = 30.0) -> Cluster:
        return connect("numbers", home=self.home(name), authkey_file=self.site.key_file, timeout_s=timeout_s)

    def wait_for_roles(self, link: Cluster, **roles: int) -> dict[str, Any]:
        """The status once so many nodes have each role."""

        def fits() -> dict[str, Any] | None:
            try:
                status = link.status()
            except ClusterError:
                return None
            return status if Counter(node["role"] for node in status["nodes"]) == roles else None

        return wait_for(fits, f"nodes with the roles {roles}", 60)

    def leader(self, link: Cluster) -> str:
        return str(link.status()["leader"]["name"]).rpartition("/")[2]

    def copies_agree(self) -> bool:
        """Whether every copy is whole, and those that stand at one entry hold the same state."""
        states: dict[int, set[bytes]] = {}
        for name in self.running:
            home = self.home(name)
            done = self.site.python_file(ROOT / "scripts" / "journal_check.py", home)
            assert done.code == 0, (name, done.out, done.err)
            reader = open_for_reading(home / "journal.sqlite3", home / "journal.mark")
            states.setdefault(reader.state.applied_idx, set()).add(reader.state.hash)
        return all(len(hashes) == 1 for hashes in states.values())


@pytest.fixture
def nodes(site: Site) -> Iterator[Nodes]:
    yield Nodes(site)


def results(link: Cluster) -> list[int]:
    return sorted(link.results("out"))


def test_three_nodes_started_at_the_same_instant_make_one_cluster_and_share_the_work(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=300, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        status = nodes.wait_for_roles(link, leader=1, voter=2)
        assert len({node["id"] for node in status["nodes"]}) == 3
        link.wait(60)
        assert results(link) == list(range(1, 301))
    founders = [name for name, node in nodes.running.items() if any("founded cluster" in line for line in node.lines)]
    assert len(founders) == 1


def test_a_leader_that_is_killed_is_replaced_and_nothing_is_lost_or_doubled(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=2000, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        nodes.wait_for_roles(link, leader=1, voter=2)
        for _ in range(2):
            first = nodes.leader(link)
            nodes.running[first].kill()
            wait_for(lambda: _leads_another(nodes, link, first), "another node leads", 30)  # noqa: B023
            pid = nodes.start(first, "run", str(project)).pid
            assert pid != 0
            nodes.wait_for_roles(link, leader=1, voter=2)
        link.wait(120)
        assert results(link) == list(range(1, 2001))
        assert link.parked() == []
    for node in nodes.running.values():
        node.stop()
    assert nodes.copies_agree()


def _leads_another(nodes: Nodes, link: Cluster, former: str) -> bool:
    try:
        return nodes.leader(link) != former
    except ClusterError:
        return False


def test_all_nodes_killed_at_once_go_on_where_they_were(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=1500, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        nodes.wait_for_roles(link, leader=1, voter=2)
    for node in nodes.running.values():
        node.kill()
    for name in ("c", "a", "b"):
        nodes.start(name, "run", str(project))
    with nodes.connect("b", 60) as link:
        link.wait(120)
        assert results(link) == list(range(1, 1501))
        assert link.parked() == []
    for node in nodes.running.values():
        node.stop()
    assert nodes.copies_agree()


def test_a_leader_that_sleeps_through_an_election_wakes_up_as_a_follower(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=1500, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        nodes.wait_for_roles(link, leader=1, voter=2)
        first = nodes.leader(link)
    other = next(name for name in nodes.running if name != first)
    nodes.running[first].signal(signal.SIGSTOP)
    try:
        with nodes.connect(other) as link:
            wait_for(lambda: _leads_another(nodes, link, first), "another node leads", 30)
            nodes.running[first].signal(signal.SIGCONT)
            nodes.running[first].wait_for_line(" follows ")
            link.wait(120)
            assert results(link) == list(range(1, 1501))
            assert link.parked() == []
    finally:
        nodes.running[first].signal(signal.SIGCONT)
    for node in nodes.running.values():
        node.stop()
    assert nodes.copies_agree()


def test_nodes_leave_one_after_the_other_until_the_last_which_can_only_be_stopped(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=100_000, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        nodes.wait_for_roles(link, leader=1, voter=2)
        first = nodes.leader(link)
    left = nodes.site.do("leave", P2PCLUSTER_HOME=str(nodes.home(first)))
    assert left.code == 0
    assert nodes.running[first].wait_for_exit(60) == 0
    other = next(name for name in nodes.running if name != first)
    with nodes.connect(other) as link:
        nodes.wait_for_roles(link, leader=1, standby=1)
        second = nodes.leader(link)
    (last,) = nodes.running.keys() - {first, second}
    assert nodes.site.do("leave", P2PCLUSTER_HOME=str(nodes.home(second))).code == 0
    assert nodes.running[second].wait_for_exit(60) == 0, "of two nodes the one that votes may leave too"
    with nodes.connect(last) as link:
        assert [node["id"] for node in nodes.wait_for_roles(link, leader=1)["nodes"]] == [link.status()["leader"]["id"]]
        made = len(results(link))
        wait_for(lambda: len(results(link)) > made, "the last one does the work")
        assert nodes.site.do("leave", P2PCLUSTER_HOME=str(nodes.home(last))).code == 1
        link.stop()
    assert nodes.running[last].wait_for_exit(30) == 0


def test_a_survivor_without_a_majority_can_be_made_the_cluster(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=1000, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        nodes.wait_for_roles(link, leader=1, voter=2)
    for name in ("a", "b"):
        nodes.running.pop(name).kill()
    refused = nodes.site.do("status", P2PCLUSTER_HOME=str(nodes.home("c")))
    assert refused.code == 5
    nodes.running["c"].kill()
    asked = nodes.site.do("recover", P2PCLUSTER_HOME=str(nodes.home("c")))
    assert asked.code == 2
    recovered = nodes.site.do("recover", "--yes", P2PCLUSTER_HOME=str(nodes.home("c")))
    assert recovered.code == 0
    assert "generation 1" in recovered.out
    nodes.start("c", "run", str(project))
    with nodes.connect("c") as link:
        nodes.wait_for_roles(link, leader=1)
        old = nodes.start("a", "run", str(project))
        nodes.wait_for_roles(link, leader=1, standby=1)
        assert any("newer generation" in line for line in old.errors)
        link.wait(60)
        assert results(link) == list(range(1, 1001))


def test_a_node_without_the_key_says_both_commands_and_ends(nodes: Nodes) -> None:
    nodes.start("a")
    nodes.running["a"].wait_for_line("leads cluster")
    stranger = nodes.site.do(P2PCLUSTER_HOME=str(nodes.home("b")), P2PCLUSTER_AUTHKEY_FILE=str(nodes.site.folder / "nokey"))
    assert stranger.code == 1
    error = stranger.the_error()
    assert "p2pcluster key," in error
    assert "key --set" in error


def test_a_machine_that_joins_late_gets_the_state_by_a_snapshot_and_works(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=3000, delay=0.002))
    nodes.start("a", "run", str(project))
    nodes.running["a"].wait_for_line("run 1 starts")
    with nodes.connect("a") as link:
        wait_for(lambda: any(queue["name"] == "out" and queue["ready"] > 500 for queue in link.status()["queues"]), "some results")
        nodes.start("b")
        nodes.wait_for_roles(link, leader=1, standby=1)
        link.wait(60)
        assert results(link) == list(range(1, 3001))
        done = link.status()["cluster"]["commit_index"]
        wait_for(lambda: _last_index(nodes, "b") >= done, "the copy has everything")
    for node in nodes.running.values():
        node.stop()
    assert nodes.copies_agree()


def _last_index(nodes: Nodes, name: str) -> int:
    home = nodes.home(name)
    return open_for_reading(home / "journal.sqlite3", home / "journal.mark").last_index


def test_until_done_ends_every_node_once_all_know_that_the_run_is_done(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=400, delay=0.01))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project), "--until-done")
    codes = [node.wait_for_exit(90) for node in nodes.running.values()]
    assert codes == [0, 0, 0], [node.lines[-5:] + node.errors[-5:] for node in nodes.running.values()]


def test_what_a_machine_that_hangs_holds_is_done_by_the_others(nodes: Nodes) -> None:
    project = nodes.site.project(NUMBERS.format(count=600, delay=0.02))
    for name in ("a", "b", "c"):
        nodes.start(name, "run", str(project))
    wait_for(lambda: (nodes.home("a") / "address.json").exists(), "the first node listens")
    with nodes.connect("a") as link:
        nodes.wait_for_roles(link, leader=1, voter=2)
        leader = nodes.leader(link)
        hung = next(name for name in nodes.running if name != leader and nodes.running[name].stage_pids("Add"))
        nodes.running[hung].signal(signal.SIGSTOP)
        try:
            link.wait(90)
            assert results(link) == list(range(1, 601))
            assert link.parked() == []
        finally:
            nodes.running[hung].signal(signal.SIGCONT)
