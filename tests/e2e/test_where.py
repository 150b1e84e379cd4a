"""Rules between real nodes: a stage runs where its rule holds, waits with an alarm where it holds nowhere, and is looked at again when a node comes or goes."""

from __future__ import annotations

from harness import Site, wait_for
from p2pcluster.client import connect

PIPELINE = """
    from p2pcluster import Pipeline, Queue, current, source, stage

    @source
    def Numbers():
        yield from range(40)

    @stage(processes=2, where="cores >= 1 and 'gpu' in tags")
    def Train(x):
        return [x, current().node]

    pipeline = Pipeline("rules", Numbers >> Train >> Queue("out", maxsize=None))
"""


def test_a_stage_waits_for_a_node_that_satisfies_its_rule_and_runs_there_alone(site: Site) -> None:
    project = site.project(PIPELINE)
    plain = site.start("run", str(project), P2PCLUSTER_HOME=str(site.folder / "plain"), P2PCLUSTER_TAG="ssd")
    wait_for(lambda: (site.folder / "plain" / "address.json").exists(), "the first node listens")
    with connect("rules", home=site.folder / "plain", authkey_file=site.key_file, timeout_s=30) as link:
        (alarm,) = wait_for(lambda: link.status()["alarms"], "an alarm")
        assert "rules/Train: no node satisfies where=" in alarm and "plain 'gpu' in tags fails (tags is ['ssd'])" in alarm, alarm
        wait_for(lambda: next(one for one in link.status()["queues"] if one["name"] == "Train")["ready"] == 40, "all numbers wait")
        train = next(one for one in link.status()["stages"] if one["name"] == "Train")
        assert train["processes"] == 0 and "no node satisfies" in train["idle_because"]
        plain.wait_for_line("alarm: rules/Train: no node satisfies where=")
        empty = site.folder / "empty"
        empty.mkdir()
        site.start("run", cwd=empty, P2PCLUSTER_HOME=str(site.folder / "gpu"), P2PCLUSTER_TAG="gpu,ssd")
        link.wait(30)
        found = sorted(link.results("out"))
        assert [x for x, _ in found] == list(range(40))
        assert {node.rpartition("/")[2] for _, node in found} == {"gpu"}
        assert link.status()["alarms"] == []
    assert sum("alarm: rules/Train" in line for line in plain.lines) == 1, "it is told once"
