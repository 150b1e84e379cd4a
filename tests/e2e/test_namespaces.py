"""Real nodes on hosts of their own: network namespaces, a bridge, real UDP broadcast. Started without an option that names another host."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from harness import Site
from hosts import WAIT_S, Hosts
from p2pcluster.client import connect
from tests.namespaces import Switch, inside, namespaces_can_be_made

PIPELINE = """
    import time
    from p2pcluster import Pipeline, Queue, source, stage

    @source
    def Numbers():
        for n in range(500):
            yield n

    @stage(processes=3)
    def Add(x):
        time.sleep(0.02)
        return x + 1

    pipeline = Pipeline("numbers", Numbers >> Add >> Queue("out", maxsize=None))
"""

CAPTURE = """
import socket
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
sock.bind(("br0", 0))
print("ready", flush=True)
while True:
    frame = sock.recv(2000)
    if frame[:6] == b"\\xff" * 6 and frame[23] == 17:
        for kind in (b"raft_pre_vote", b"raft_vote", b"beacon"):
            if b'"' + kind + b'"' in frame:
                print("broadcast", kind.decode(), flush=True)
"""


@pytest.fixture
def hosts(site: Site) -> Iterator[Hosts]:
    if not namespaces_can_be_made():
        pytest.skip("network namespaces cannot be made here")
    made = Hosts(site, Switch(), 3, site.project(PIPELINE))
    try:
        yield made
    finally:
        made.close()


def test_hosts_find_each_other_elect_by_broadcast_and_survive_the_loss_of_the_leaders_cable(hosts: Hosts) -> None:
    capture = hosts.switch.start(hosts.switch.bridge, CAPTURE)
    for name in hosts.names:
        hosts.start(name)
    hosts.wait_for_roles("a", leader=1, voter=2)
    capture.wait_for("broadcast beacon")
    status = hosts.status("a")
    assert status is not None
    assert {node["address"].partition(":")[0] for node in status["nodes"]} == set(hosts.addresses.values())
    first = hosts.leader("a")
    assert first is not None
    others = [name for name in hosts.names if name != first]

    hosts.switch.pull(first)
    second = hosts.wait_for_leader(others[0], others)
    assert hosts.term(second) > status["cluster"]["term"]
    capture.wait_for("broadcast raft_pre_vote")
    capture.wait_for("broadcast raft_vote")

    hosts.switch.plug(first)
    hosts.nodes[first].wait_for_line(" follows ", WAIT_S)
    hosts.wait_for_roles(first, leader=1, voter=2)
    with hosts.connect(first) as link:
        link.wait(WAIT_S)
        assert sorted(link.results("out")) == list(range(1, 501))
        assert link.parked() == []
    hosts.wait_for_equal_copies(hosts.names)


def test_a_program_on_a_host_without_a_node_finds_the_cluster_by_asking_the_network(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a node that starts while it asks founds its cluster all the same: whoever only looks counts for nothing."""
    monkeypatch.setenv("P2PCLUSTER_BIND", "0.0.0.0")
    monkeypatch.setenv("P2PCLUSTER_PORT", str(hosts.site.port))
    found: list[str] = []

    def program() -> None:
        with inside(hosts.namespaces["b"]), connect(home=hosts.site.folder / "none", authkey_file=hosts.site.key_file, timeout_s=60) as link:
            found.append(link.status()["leader"]["address"])

    asking = threading.Thread(target=program)
    asking.start()
    hosts.start("a").wait_for_line("founded cluster", WAIT_S)
    asking.join()
    assert found == [f"{hosts.addresses['a']}:{hosts.site.port}"]
