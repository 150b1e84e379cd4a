"""pause, resume, scale and logs on real nodes: what people say at run time outlasts kills and versions, and what stages print can be read."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from harness import NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect
from p2pcluster.errors import ClusterError, UnknownName, WrongUsage
from tests.status_schema import mismatches

WATCHED = """
    import logging
    import os
    import sys
    import time
    from p2pcluster import Pipeline, Queue, current, source, stage

    @source
    def Count():
        number = 0
        while True:
            number += 1
            with open(current().out_dir / "called", "a") as file:
                file.write("x")
            time.sleep(0.005)
            yield number

    @stage(processes=1)
    def Keep(x):
        return x

    @stage(processes=1)
    def Talk(x):
        print("printed", x)
        print("complained", x, file=sys.stderr)
        logging.getLogger("of a library").info("noted %s", x)
        current().log.warning("warned %s", x)
        os.system(f"echo a child said {x}")
        return x

    pipeline = Pipeline("watched", Count >> Keep >> Queue("kept", maxsize=None), Queue("in", codec="json") >> Talk >> Queue("said", maxsize=None))
"""


def stage_of(cluster: Cluster, name: str) -> dict[str, Any]:
    """What status says of it; before it is deployed, nothing."""
    unknown = {"done": 0, "processes": 0, "idle_because": None}
    return next((stage for stage in cluster.status()["stages"] if stage["name"] == name), unknown)


def serves(site: Site, node: NodeProcess) -> None:
    node.wait_for_line("leads cluster")
    wait_for(lambda: site.is_up, "the node listens")


def talked(cluster: Cluster, value: int) -> None:
    """A value goes through the stage that is not paused: whoever waited meanwhile has waited for something."""
    cluster.put("in", value)
    with cluster.take("said", limit=1, wait_s=30) as values:
        assert list(values) == [value]


def test_what_is_paused_and_scaled_stays_so_over_a_kill_and_a_new_version_and_logs_go_on(site: Site) -> None:
    project = site.project(WATCHED)
    node = site.start("run", project)
    serves(site, node)
    called = site.out("watched") / "called"
    with site.connect("watched") as cluster:
        wait_for(lambda: stage_of(cluster, "Keep")["done"] > 5, "the source runs")
        follower = site.start("logs", "Talk", "-f")
        assert site.do("pause", "Count").lines == ["watched: Count is paused"]
        node.wait_for_line("watched: stage Count is paused; to go on, run resume Count")
        wait_for(lambda: stage_of(cluster, "Count")["idle_because"] == "it is paused", "status says so")
        talked(cluster, 1)
        before = called.stat().st_size
        talked(cluster, 2)
        assert called.stat().st_size == before, "a paused source is not called"
        assert stage_of(cluster, "Count")["processes"] == 1, "its process stays"
        assert site.do("scale", "Keep", 3).lines == ["watched: Keep is to have 3 processes"]
        wait_for(lambda: stage_of(cluster, "Keep")["processes"] == 3, "three processes run")
        follower.wait_for_line("Talk 2 out | printed 2")
        follower.signal(signal.SIGINT)
        assert follower.wait_for_exit() == 130 and follower.errors == []
        logged = site.do("logs", "Talk")
        assert logged.code == 0 and logged.err == ""
        texts = [line.split("Z ", 1)[1].split(" ", 1)[1] for line in logged.lines]
        by_us = [text for text in texts if not text.endswith(("a child said 1", "a child said 2"))]
        assert sorted(by_us) == sorted(f"watched/Talk {x} {said} {x}" for x in (1, 2) for said in (
            "out | printed", "err | complained", "info | noted", "warning | warned")), logged.out
        assert [text for text in by_us if "2" not in text] == by_us[:4], "they come in the order of their times"
        assert sum(" out | a child said" in text for text in texts) == 2, "of what a child wrote, nobody knows the item"
    assert {"Talk | printed 1", "Talk | complained 1", "Talk | warned 1", "Talk | a child said 1"} <= set(node.lines)
    assert not any("noted" in line for line in node.lines), "a terminal shows what Python shows without a word: warnings"

    node.kill()
    node = site.start("run", project)
    serves(site, node)
    with site.connect("watched") as cluster:
        wait_for(lambda: stage_of(cluster, "Keep")["processes"] == 3, "it is scaled after a kill")
        assert stage_of(cluster, "Count")["idle_because"] == "it is paused"
        assert "Talk 1 out | printed 1" in site.do("logs").out, "what the killed node had heard is in its files"
        talked(cluster, 3)
        assert called.stat().st_size == before, "a source that is paused at the start of a node is not called"
        site.deploy(WATCHED + "\n    # a new version\n")
        wait_for(lambda: stage_of(cluster, "Keep")["processes"] == 3, "it is scaled in the new version")
        status = cluster.status()
        assert list(mismatches(status)) == []
        assert next(one for one in status["stages"] if one["name"] == "Keep")["scaled"] == 3
        assert site.do("pause").lines == ["watched: every stage is paused"]
        assert cluster.status()["pipelines"][0]["state"] == "paused"
        assert json.loads(site.do("status", "--json").out)["pipelines"][0]["state"] == "paused"
        assert site.do("resume", "Count").lines == ["watched: Count is not paused any more; still paused: every stage"]
        assert cluster.resume() == []
        assert cluster.status()["pipelines"][0]["state"] == "running"
        wait_for(lambda: called.stat().st_size > before, "the source is called again")
        assert site.do("scale", "Keep", "code").lines == ["watched: Keep is to have as many processes as its code says"]
        wait_for(lambda: stage_of(cluster, "Keep")["processes"] == 1, "as many as the code says")
        with pytest.raises(UnknownName, match="has no stage 'Nobody'; it has Count, Keep, Talk"):
            cluster.pause("Nobody")
        with pytest.raises(WrongUsage, match="Count is a source"):
            cluster.scale("Count", 2)
    for words, error in ((("logs", "Nobody"), "has no stage 'Nobody'"), (("scale", "Keep", 0), "to run none, pause it"),
                         (("scale", "Count", 2), "is a source"), (("resume", "Nobody"), "it has Count, Keep, Talk")):
        assert error in site.do(*words).the_error(), words


SPREAD = """
    import time
    from p2pcluster import Pipeline, Queue, current, stage

    @stage(processes=3, per_node=1)
    def Say(x):
        print("value", x, "on", current().node)
        time.sleep(0.05)
        return x

    pipeline = Pipeline("spread", Queue("in", codec="json") >> Say >> Queue("out", maxsize=None))
"""


def test_lines_of_every_machine_come_together_and_a_machine_that_is_away_is_named(site: Site) -> None:
    project = site.project(SPREAD)
    running = {name: site.start("run", project, P2PCLUSTER_HOME=str(site.folder / name)) for name in ("a", "b", "c")}
    wait_for(lambda: (site.folder / "a" / "address.json").exists(), "the first node listens")

    def home(name: str) -> Path:
        return site.folder / name

    with connect("spread", home=home("a"), authkey_file=site.key_file, timeout_s=30.0) as cluster:
        wait_for(lambda: stage_of(cluster, "Say")["processes"] == 3 and len(cluster.status()["nodes"]) == 3, "a process on each", 60)

        def speakers() -> set[str]:
            cluster.put_many("in", range(10))
            return {line.node.rpartition("/")[2] for line in cluster.logs("Say").lines}

        wait_for(lambda: speakers() == set(running), "each machine says something")
        wait_for(lambda: sorted(node["role"] for node in cluster.status()["nodes"]) == ["leader", "voter", "voter"], "all of them vote", 60)
        printed = cluster.logs()
        assert printed.away == [] and [line.at for line in printed.lines] == sorted(line.at for line in printed.lines)
        assert all(line.text.endswith(f"on {line.node}") and line.item != "-" for line in printed.lines if line.stage == "Say")
        leader = cluster.status()["leader"]["name"].rpartition("/")[2]
        gone = next(name for name in running if name != leader and name != "a")
        running[gone].kill()
        wait_for(lambda: len(cluster.status()["nodes"]) == 2, "it is gone")
        done = site.do("logs", "Say", P2PCLUSTER_HOME=str(home("a")))
        assert f"/{gone} is away: its lines are missing" in done.err and len(done.err.splitlines()) == 1
        assert {line.split(" ")[1].rpartition("/")[2] for line in done.lines} == set(running) - {gone}
        assert cluster.pause("Say") is None
        running[leader].kill()

        def is_paused() -> bool:
            try:
                return stage_of(cluster, "Say")["idle_because"] == "it is paused"
            except ClusterError:
                return False

        site.start("run", project, P2PCLUSTER_HOME=str(home(gone)))
        wait_for(is_paused, "the next leader knows of the pause", 60)
