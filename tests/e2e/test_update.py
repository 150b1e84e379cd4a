"""New versions over several machines: node by node, items kept, back when they do not start; several pipelines, and their end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect

NODES = ("a", "b", "c")

ROLLING = """
    import os, sys, time
    from p2pcluster import At, Pipeline, Queue, current, source, stage

    VERSION = {version!r}
    {start}

    @source
    def Numbers(cursor=None):
        for n in range(0 if cursor is None else cursor + 1, {count}):
            time.sleep(0.002)  # faster than what follows, which therefore always has something to do
            yield At(n, n)

    @stage(processes=6, per_node=2)
    def Work(n):
        begins = time.time()
        time.sleep(0.03)
        return {{"n": n, "version": VERSION, "node": current().node, "begins": begins, "ends": time.time()}}

    pipeline = Pipeline("rolling", Numbers >> Queue("numbers", maxsize=60) >> Work >> Queue("out", maxsize=None))
"""


class Nodes:
    """Three nodes of one cluster. The first one is where the project is deployed from."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.running: dict[str, NodeProcess] = {}
        self.empty = site.folder / "empty"
        self.empty.mkdir()

    def environment(self, name: str) -> dict[str, str]:
        return {"P2PCLUSTER_HOME": str(self.site.folder / name)}

    def start(self, name: str, folder: Path | None = None) -> NodeProcess:
        self.running[name] = self.site.start("run", cwd=folder or self.empty, **self.environment(name))
        return self.running[name]

    def start_all(self, **folders: Path) -> None:
        for name in NODES:
            self.start(name, folders.get(name))
        with self.connect(None) as link:
            wait_for(lambda: len(link.status()["nodes"]) == 3, "all nodes are there", 60)

    def connect(self, pipeline: str | None, name: str = "a", timeout_s: float = 30.0) -> Cluster:
        wait_for((self.site.folder / name / "address.json").exists, "the node listens")
        return connect(pipeline, home=self.site.folder / name, authkey_file=self.site.key_file, timeout_s=timeout_s)

    def version(self, version: str, start: str = "", count: int = 100_000) -> Path:
        return self.site.project(ROLLING.format(version=version, start=start, count=count))

    def deploy(self, version: str, start: str = "", count: int = 100_000, **more: Any) -> Any:
        return self.site.do("deploy", self.version(version, start, count), **self.environment("a"), **more)

    def work_pids(self) -> dict[str, set[int]]:
        return {name: set(node.stage_pids("Work")) for name, node in self.running.items()}


@pytest.fixture
def nodes(site: Site) -> Iterator[Nodes]:
    yield Nodes(site)


def alarms(link: Cluster) -> str:
    return "\n".join(link.status()["alarms"])


def taken(link: Cluster, queue: str = "out") -> list[dict[str, Any]]:
    with link.take(queue, wait_s=0.5) as items:
        return list(items)


def test_a_version_goes_over_the_nodes_under_load_and_one_that_does_not_start_comes_back(nodes: Nodes) -> None:
    nodes.start_all()
    assert nodes.deploy("one").code == 0
    with nodes.connect("rolling") as link:
        wait_for(lambda: all(len(pids) == 2 for pids in nodes.work_pids().values()), "every node works")
        wait_for(lambda: sum(stage["done"] for stage in link.status()["stages"] if stage["name"] == "Work") > 100, "some of it is done")

        done = nodes.deploy("two")
        assert (done.code, done.lines[-1].partition("runs on ")[2]) == (0, "3 nodes"), (done.out, done.err)
        assert "~pipeline.py" in done.lines[0]

        wait_for(lambda: all(len(pids) == 2 for pids in nodes.work_pids().values()), "every node works")
        before = nodes.work_pids()
        start = "if 'stage' in sys.argv: print('no licence', file=sys.stderr, flush=True); os._exit(3)"
        error = nodes.deploy("three", start=start).the_error()
        assert "rolled back" in error and "no licence" in error and "exited with code 3" in error, error
        wait_for(lambda: all(len(pids) == 2 for pids in nodes.work_pids().values()), "the former one runs on")
        after = nodes.work_pids()
        assert [before[name] == after[name] for name in NODES].count(True) == 2, "one node alone has tried it"
        assert "was rolled back, because" in alarms(link) and "no licence" in alarms(link)

        done = nodes.deploy("four", count=10)  # the source has got further, and so ends
        assert (done.code, done.lines[-1].partition("runs on ")[2]) == (0, "3 nodes"), (done.out, done.err)
        assert "rolled back" not in alarms(link)
        link.wait(60)
        assert link.parked() == []
        found = taken(link)
    assert sorted(value["n"] for value in found) == list(range(len(found))), "nothing is lost, and nothing is there twice"
    assert {"one", "two"} <= {value["version"] for value in found} <= {"one", "two", "four"}, "the last one may find nothing left to do"
    check_order(found)


def check_order(found: list[dict[str, Any]]) -> None:
    """On each node a version begins when the one before has finished what ran; and a node begins when the one before it has."""
    begun: list[float] = []
    for node in {value["node"] for value in found}:
        here = [value for value in found if value["node"] == node]
        ends = max(value["ends"] for value in here if value["version"] == "one")
        begins = min(value["begins"] for value in here if value["version"] == "two")
        assert ends <= begins, f"on {node} two versions work at once"
        begun += [ends, begins]
    by_node = sorted((begun[at], begun[at + 1]) for at in range(0, len(begun), 2))
    assert all(before[1] <= after[0] + 0.05 for before, after in zip(by_node, by_node[1:], strict=False)), by_node


def test_a_roll_out_goes_on_when_the_leader_is_killed_in_its_middle(nodes: Nodes) -> None:
    nodes.start_all()
    assert nodes.deploy("one").code == 0
    with nodes.connect("rolling", "c") as link:
        wait_for(lambda: sum(n["role"] == "voter" for n in link.status()["nodes"]) == 2, "another one can lead", 60)
        wait_for(lambda: all(len(pids) == 2 for pids in nodes.work_pids().values()), "every node works")
        leader = str(link.status()["leader"]["name"]).rpartition("/")[2]
        folder = nodes.version("two", start="if 'stage' in sys.argv: time.sleep(1)", count=10)
        deploying = nodes.site.start("deploy", folder, **nodes.environment("a" if leader != "a" else "b"))
        deploying.wait_for_line("replaces")
        wait_for(lambda: any("runs here now" in line for node in nodes.running.values() for line in node.lines), "a node has the new version")
        nodes.running[leader].kill()
        nodes.start(leader)
        assert deploying.wait_for_exit(60) == 0, deploying.errors
        assert deploying.lines[-1].partition("runs on ")[2] in ("2 nodes", "3 nodes"), deploying.lines
        link.wait(60)
        found = taken(link)
        assert link.project()["rollout"] is None  # type: ignore[index]
    assert sorted(value["n"] for value in found) == list(range(len(found)))
    assert {value["version"] for value in found} <= {"one", "two"}


BESIDE = """
    from p2pcluster import Pipeline, Queue, stage

    @stage(processes=1)
    def Work(x):
        return "{name} " + x

    @stage(processes=1)
    def Again(x):
        return x

    pipeline = Pipeline({name!r}, Queue("in", codec="json") >> Work >> {behind}Queue("out", codec="json"))
"""


def test_two_pipelines_of_two_machines_never_meet_and_one_of_them_ends(nodes: Nodes) -> None:
    site = nodes.site
    one, two = (site.project(BESIDE.format(name=name, behind="Again >> "), name) for name in ("one", "two"))
    nodes.start_all(a=one, b=two)
    with nodes.connect("one") as first, nodes.connect("two", "b") as second:
        wait_for(lambda: {p["name"] for p in first.status()["pipelines"]} == {"one", "two"}, "both are there")
        first.put_many("in", ["1", "2"])
        second.put("in", "3")
        wait_for(lambda: len(list(first.results("out"))) == 2 and len(list(second.results("out"))) == 1, "both have worked")
        assert first.discard("out") == 2
        assert taken(second) == ["two 3"]

        # a stage that vanished leaves its queue, and says so
        assert site.do("pause", "Again", "--pipeline", "one", **nodes.environment("a")).code == 0
        first.put("in", "4")
        wait_for(lambda: ready(first, "one", "Again") == 1, "it waits for the stage")
        site.project(BESIDE.format(name="one", behind=""), "one")
        assert site.do("deploy", one, **nodes.environment("a")).code == 0
        assert "no stage reads it" in alarms(first)
        first.put("in", "5")
        assert wait_for(lambda: list(first.results("out")), "the new version works") == ["one 5"]
        assert site.do("discard", "Again", "--yes", "--pipeline", "one", **nodes.environment("a")).lines == ["1 dropped"]
        assert "no stage reads it" not in alarms(first)

        error = site.do("undeploy", "one", **nodes.environment("b")).the_error()
        assert "still has 1 items in its queues and 0 parked" in error and "--discard" in error
        done = site.do("undeploy", "one", "--discard", **nodes.environment("b"))
        assert (done.code, "1 items dropped" in done.out) == (0, True), done.err
        nodes.running["a"].wait_for_line("one: undeployed; this node offers it again when it is started next")
        assert {q["pipeline"] for q in second.status()["queues"]} == {"two"}
        wait_for(lambda: sum(len(node.stage_pids("Work")) for node in nodes.running.values()) == 1, "its processes end")
        second.put("in", "6")
        assert wait_for(lambda: list(second.results("out")), "the other one works on") == ["two 6"]
        nodes.running["a"].stop()
        nodes.start("a", one).wait_for_line("one: run 2 starts")
        with nodes.connect("one") as again:
            again.put("in", "7")
            assert wait_for(lambda: list(again.results("out")), "it works again") == ["one 7"]


def ready(link: Cluster, pipeline: str, queue: str) -> int:
    return next(int(q["ready"]) for q in link.status()["queues"] if (q["pipeline"], q["name"]) == (pipeline, queue))
