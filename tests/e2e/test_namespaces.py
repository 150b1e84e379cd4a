"""Real nodes on hosts of their own: network namespaces, a bridge, real UDP broadcast. Started without an option that names another host."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import NodeProcess, Site, wait_for
from tests.namespaces import Switch, namespaces_can_be_made

PIPELINE = """
    import time
    from p2pcluster import Pipeline, Queue, source, stage

    @source
    def Numbers():
        for n in range(1000):
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


class Hosts:
    """Hosts of one network; each runs a node with a home of its own."""

    def __init__(self, site: Site, switch: Switch, count: int) -> None:
        self.site = site
        self.switch = switch
        self.namespaces = {name: switch.host(name, f"10.77.3.{number}/24") for number, name in enumerate("abcde"[:count], 1)}
        self.nodes: dict[str, NodeProcess] = {}

    def environment(self, name: str) -> dict[str, str]:
        return {"P2PCLUSTER_HOME": str(self.site.folder / name), "P2PCLUSTER_BIND": "0.0.0.0"}

    def start(self, name: str, *words: object) -> NodeProcess:
        command = ["ip", "netns", "exec", self.namespaces[name], sys.executable, "-m", "p2pcluster"]
        self.nodes[name] = self.site.start(*words, command=command, **self.environment(name))
        return self.nodes[name]

    def do(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command on a host."""
        command = ["ip", "netns", "exec", self.namespaces[name], sys.executable, "-m", "p2pcluster", *words]
        return subprocess.run(command, env=self.site.environment(**self.environment(name)), capture_output=True, text=True, timeout=60, check=False)

    def status(self, name: str) -> dict[str, Any] | None:
        done = self.do(name, "status", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def wait_for_roles(self, name: str, **roles: int) -> dict[str, Any]:
        def fits() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status and Counter(node["role"] for node in status["nodes"]) == roles else None

        return wait_for(fits, f"nodes with the roles {roles} as {name} sees them", 90)

    def pull(self, name: str) -> None:
        """Pull the host's cable."""
        self.switch.run("link", "set", f"{name}0", "down", inside=self.switch.bridge)

    def plug(self, name: str) -> None:
        self.switch.run("link", "set", f"{name}0", "up", inside=self.switch.bridge)


@pytest.fixture
def hosts(site: Site) -> Iterator[Hosts]:
    if not namespaces_can_be_made():
        pytest.skip("network namespaces cannot be made here")
    switch = Switch()
    try:
        made = Hosts(site, switch, 3)
        yield made
        for node in made.nodes.values():
            if node.is_running:
                node.kill()
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            switch.close()


def name_of(hosts: Hosts, status: dict[str, Any]) -> str:
    return str(status["leader"]["name"]).rpartition("/")[2]


def test_hosts_find_each_other_elect_by_broadcast_and_survive_the_loss_of_the_leaders_cable(hosts: Hosts, tmp_path: Path) -> None:
    project = hosts.site.project(PIPELINE)
    capture = hosts.switch.start(hosts.switch.bridge, CAPTURE)
    for name in hosts.namespaces:
        hosts.start(name, "run", str(project))
    status = hosts.wait_for_roles("a", leader=1, voter=2)
    assert {node["address"].partition(":")[0] for node in status["nodes"]} == {"10.77.3.1", "10.77.3.2", "10.77.3.3"}
    first = name_of(hosts, status)
    other = next(name for name in hosts.namespaces if name != first)

    hosts.pull(first)
    after = wait_for(lambda: (s := hosts.status(other)) and name_of(hosts, s) != first and s, "another leader", 60)
    assert after["cluster"]["term"] > status["cluster"]["term"]
    capture.wait_for("broadcast raft_pre_vote")
    capture.wait_for("broadcast raft_vote")

    hosts.plug(first)
    hosts.wait_for_roles(other, leader=1, voter=2)
    hosts.nodes[first].wait_for_line(" follows ", 60)
    wait_for(lambda: (s := hosts.status(other)) and s["pipelines"][0]["state"] == "done", "the run is done", 90)
    values = [json.loads(line) for line in hosts.do(other, "results", "out").stdout.splitlines()]
    assert sorted(values) == list(range(1, 1001))
