"""A program that puts and takes while nodes die, go silent, move and are mistaken for others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from harness import NodeProcess, Site, wait_for

from p2pcluster.client import Cluster, connect
from p2pcluster.errors import AuthenticationFailed, ClusterError

ECHO = """
    from p2pcluster import Pipeline, Queue, stage

    @stage(processes=1)
    def Echo(x):
        return x

    pipeline = Pipeline("echo", Queue("in") >> Echo)
"""
PRODUCER = """
    import sys
    from p2pcluster import connect

    with connect("echo", timeout_s=20) as cluster:
        for number in range(int(sys.argv[1])):
            cluster.put("in", number, key=f"order {number}")
            print(number, flush=True)
"""


def start(site: Site, *names: str, words: tuple[object, ...] = ()) -> dict[str, NodeProcess]:
    """Nodes with a home of that name each, once they are in their cluster, and have a run where they bring a project."""
    nodes = {name: site.start(*words, P2PCLUSTER_HOME=str(site.folder / name)) for name in names}
    for node in nodes.values():
        wait_for(lambda: any("leads cluster" in line or "follows" in line for line in node.lines), "it is in the cluster")  # noqa: B023
        if words:
            node.wait_for_line(": run 1 ")
    return nodes


def through(site: Site, port: int, timeout_s: float) -> Cluster:
    """A connection by an address alone, as from another machine."""
    return connect("echo", seed=f"127.0.0.1:{port}", home=site.folder / "elsewhere", authkey_file=site.key_file, timeout_s=timeout_s)


class Putting(threading.Thread):
    """A program that puts one number after the other, by whatever way it finds."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster = cluster
        self.count = 0
        self.is_enough = False
        self.trouble: list[BaseException] = []

    def run(self) -> None:
        try:
            while not self.is_enough:
                self.cluster.put("in", self.count)
                self.count += 1
        except ClusterError as error:
            self.trouble.append(error)

    def wait_for_more(self) -> None:
        before = self.count
        wait_for(lambda: self.trouble or self.count > before + 5, "more is put")
        assert not self.trouble, self.trouble


def test_a_program_goes_on_when_the_leader_is_killed_goes_silent_and_when_all_start_again(site: Site) -> None:
    run = ("run", site.project(ECHO))
    nodes = start(site, "a", "b", "c", words=run)
    with connect("echo", home=site.folder / "a", authkey_file=site.key_file, timeout_s=30) as cluster, connect(
        "echo", home=site.folder / "b", authkey_file=site.key_file, timeout_s=30
    ) as looking:
        wait_for(lambda: [node["role"] for node in looking.status()["nodes"]].count("voter") == 2, "all three vote", 60)
        putting = Putting(cluster)
        putting.start()
        putting.wait_for_more()
        silent = leader(looking)
        nodes[silent].signal(signal.SIGSTOP)
        try:
            putting.wait_for_more()
        finally:
            nodes[silent].signal(signal.SIGCONT)
        nodes[leader(looking)].kill()
        putting.wait_for_more()
        for node in nodes.values():
            node.popen.kill()
        for node in nodes.values():
            node.kill()
        start(site, *nodes, words=run)
        putting.wait_for_more()
        putting.is_enough = True
        putting.join()
        cluster.close("in")
        cluster.wait(60)
        assert sorted(cluster.results("Echo")) == list(range(putting.count)), "each exactly once"


def leader(link: Cluster) -> str:
    return str(link.status()["leader"]["name"]).rpartition("/")[2]


def test_at_an_old_address_another_cluster_is_refused_and_the_own_one_is_found_elsewhere(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same name and key, as when a node is started with an empty home where another one was."""
    monkeypatch.setenv("P2PCLUSTER_PORT", str(site.port))
    run = ("run", site.project(ECHO))
    first = start(site, "one", words=run)["one"]
    with through(site, site.port, 3) as cluster:
        cluster.put("in", 0)
        first.kill()
        other = start(site, "other")["other"]
        cluster.link.timeout_s = 1.0
        with pytest.raises(AuthenticationFailed, match="the node there is of cluster [0-9a-f]+, and this program was connected to") as caught:
            cluster.put("in", 1)
        assert caught.value.definite, "nothing was sent there"
        # Its own node comes back, and has to take another port; to whoever asks the network it says which.
        other.signal(signal.SIGSTOP)
        start(site, "one", words=run)
        cluster.link.timeout_s = 30.0
        cluster.put("in", 2)
        other.kill()
        cluster.close("in")
        cluster.wait(30)
        assert sorted(cluster.results("Echo")) == [0, 2]


def test_a_producer_that_is_killed_and_run_again_with_keys_doubles_nothing(site: Site) -> None:
    start(site, "home", words=("run", site.project(ECHO)))
    program = site.folder / "producer.py"
    program.write_text(textwrap.dedent(PRODUCER))
    count = 120
    for killed_at in (30, 70, None):
        putting = subprocess.Popen([sys.executable, str(program), str(count)], env=site.environment(), cwd=Path(site.folder),
                                   stdout=subprocess.PIPE, text=True)
        assert putting.stdout is not None
        for line in putting.stdout:
            if killed_at is not None and int(line) == killed_at:
                os.kill(putting.pid, signal.SIGKILL)
        assert putting.wait(30) == (0 if killed_at is None else -signal.SIGKILL)
    with site.connect("echo") as cluster:
        cluster.close("in")
        cluster.wait(30)
        assert sorted(cluster.results("Echo")) == list(range(count))
