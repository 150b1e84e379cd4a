"""Two clusters of one name that meet."""

from __future__ import annotations

from pathlib import Path

from harness import NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect

WORK = """
    from p2pcluster import Pipeline, Queue, source

    @source
    def Numbers():
        yield from range(3)

    pipeline = Pipeline("numbers", Numbers >> Queue("out", maxsize=None))
"""


class Cloud:
    """Nodes with a home each, on ports that keep them apart or bring them together."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def start(self, name: str, port: int, *words: object) -> NodeProcess:
        node = self.site.start(*words, P2PCLUSTER_HOME=str(self.site.folder / name), P2PCLUSTER_PORT=str(port))
        node.wait_for_line("leads cluster", 30)
        return node

    def connect(self, name: str) -> Cluster:
        return connect("numbers", home=self.site.folder / name, authkey_file=self.site.key_file, timeout_s=20.0)

    def folder(self, name: str) -> Path:
        return self.site.folder / name


def test_of_two_clusters_that_meet_the_one_without_work_goes_over_into_the_other(site: Site) -> None:
    cloud = Cloud(site)
    one = cloud.start("one", site.port, "run", site.project(WORK))
    one.wait_for_line("run 1 starts")
    with cloud.connect("one") as link:
        link.wait(30)
    idle = cloud.start("idle", site.port + 1)
    assert idle.stop() == 0
    again = site.start(P2PCLUSTER_HOME=str(cloud.folder("idle")), P2PCLUSTER_PORT=str(site.port))
    again.wait_for_line("follows", 60)
    with cloud.connect("one") as link:
        wait_for(lambda: len(link.status()["nodes"]) == 2, "the other node is a member")
        assert sorted(link.results("out")) == [0, 1, 2]
    assert one.stop() == 0 and again.stop() == 0
    assert list(cloud.folder("idle").glob("*superseded*")), "its copy is kept aside"
