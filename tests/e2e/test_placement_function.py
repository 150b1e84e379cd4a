"""A user's placement between real nodes: it decides where a stage runs; where it fails, that is told and the work goes on."""

from __future__ import annotations

from harness import NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect

PIPELINE = """
    from p2pcluster import Pipeline, Queue, current, stage

    @stage(processes=2)
    def Train(x):
        return [x, current().node]

    def placement(nodes, stages):
        print("the function prints")
        chosen = next(node["name"] for node in nodes if "fast" in node["tags"])
        return {chosen: {stage["name"]: 3 for stage in stages}}

    pipeline = Pipeline("placed", Queue("in", maxsize=None) >> Train >> Queue("out", maxsize=None), placement=placement)
"""


def start(site: Site, name: str, tag: str) -> NodeProcess:
    folder = site.folder / "empty"
    folder.mkdir(exist_ok=True)
    return site.start("run", cwd=folder, P2PCLUSTER_HOME=str(site.folder / name), P2PCLUSTER_TAG=tag)


def nodes_of(link: Cluster) -> set[str]:
    return {node.rpartition("/")[2] for _, node in link.results("out")}


def test_a_placement_decides_where_a_stage_runs_and_one_that_raises_is_an_alarm_and_no_obstacle(site: Site) -> None:
    leads = start(site, "leads", "slow")
    leads.wait_for_line("leads cluster")
    environment = {"P2PCLUSTER_HOME": str(site.folder / "leads")}
    assert site.do("deploy", site.project(PIPELINE), **environment).code == 0
    with connect("placed", home=site.folder / "leads", authkey_file=site.key_file, timeout_s=30) as link:
        (alarm,) = wait_for(lambda: link.status()["alarms"], "an alarm")
        assert alarm.startswith("placed: its placement is not followed, because it raised StopIteration (pipeline.py, line 10)"), alarm
        wait_for(lambda: len(leads.stage_pids("Train")) == 2, "the stage runs as without a placement")
        link.put_many("in", range(20))
        wait_for(lambda: len(list(link.results("out"))) == 20, "all of it is done")
        assert nodes_of(link) == {"leads"}

        follows = start(site, "follows", "fast")  # another node: it is asked again
        wait_for(lambda: [len(node.stage_pids("Train")) for node in (leads, follows)] == [0, 3], "three processes on the fast node alone")
        assert link.status()["alarms"] == []
        link.put_many("in", range(20, 60))
        link.close("in")
        link.wait(30)
        found = list(link.results("out"))
        assert sorted(x for x, _ in found) == list(range(60))
        assert {node.rpartition("/")[2] for x, node in found if x >= 20} == {"follows"}
        assert link.parked() == [] and any("the function prints" in line for line in leads.errors)
