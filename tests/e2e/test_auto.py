"""`"auto"` between real nodes: the stage that is slow gets the free slots of all machines, and gives them up when another one is slow."""

from __future__ import annotations

import time

from harness import Site, wait_for
from p2pcluster.client import connect

PIPELINE = """
    import time
    from p2pcluster import Pipeline, Queue, source, stage

    @source
    def Numbers():
        yield from range(100_000)

    @stage
    def Quick(x):
        time.sleep(0.004)
        return x

    @stage
    def Slow(x):
        time.sleep(0.04)
        return x

    pipeline = Pipeline("auto", Numbers >> Quick >> Slow >> Queue("out", maxsize=None))
"""


def test_the_slow_stage_gets_the_free_slots_of_every_machine(site: Site) -> None:
    project = site.project(PIPELINE)
    site.start("run", str(project), P2PCLUSTER_HOME=str(site.folder / "one"), P2PCLUSTER_SLOTS="4")
    wait_for(lambda: (site.folder / "one" / "address.json").exists(), "the first node listens")
    with connect("auto", home=site.folder / "one", authkey_file=site.key_file, timeout_s=30) as link:

        def processes() -> dict[str, int]:
            return {one["name"]: one["processes"] for one in link.status()["stages"]}

        wait_for(lambda: processes()["Slow"] == 3 and processes()["Quick"] == 1, "the free slots are the slow stage's")
        empty = site.folder / "empty"
        empty.mkdir()
        site.start("run", cwd=empty, P2PCLUSTER_HOME=str(site.folder / "two"), P2PCLUSTER_SLOTS="4")
        wait_for(lambda: processes()["Slow"] == 7, "and so are those of a machine that comes")
        until_s = time.monotonic() + 2
        while time.monotonic() < until_s:
            assert processes()["Slow"] == 7, "it stays so over the next plans"
            time.sleep(0.1)
