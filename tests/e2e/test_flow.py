"""When things happen, on a real node that is killed: rates, values that wait, ticks, processes that make way, a stage that stops by itself."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from harness import Site, wait_for

PIPELINE = """
    import os, time
    from p2pcluster import Pipeline, Queue, current, source, stage

    @source(every_s=0.15, missed="all", max_items=5)
    def Tick():
        if current().item_id > 12:
            raise StopIteration
        return current().item_id

    @stage
    def Ticked(number):
        return number

    @stage(rate="10/s", processes=2)
    def Rated(value):
        return time.time()

    @stage(processes=1)
    def Waited(value):
        return [value, time.time()]

    @stage(max_items=4, processes=1)
    def Fresh(value):
        return os.getpid()

    pipeline = Pipeline("flow", Tick >> Ticked, Queue("rated") >> Rated, Queue("waited") >> Waited, Queue("fresh") >> Fresh)
"""


def queue(site: Site, name: str) -> dict[str, Any]:
    (found,) = [record for record in site.status()["queues"] if record["name"] == name]
    return found


def test_rates_waits_ticks_and_fresh_processes_hold_through_a_kill_of_the_node(site: Site) -> None:
    folder = site.project(PIPELINE)
    node = site.start("run", folder)
    node.wait_for_line("run 1 starts")
    with site.connect("flow") as cluster:
        began_s = time.time()
        cluster.put_many("rated", range(12))
        cluster.put("waited", "for", delay_s=0.7)
        cluster.put("waited", "until", at=datetime.now(UTC) + timedelta(seconds=0.7))
        cluster.put("waited", "never", delay_s=3600)
        done = site.do("put", "waited", "--at", "2999-12-31T23:59:59+01:00", "--pipeline", "flow", stdin='"nor this"')
        assert done.code == 0, done.err
        cluster.put_many("fresh", range(18))
        wait_for(lambda: len(list(cluster.results("Ticked"))) >= 4, "some ticks")
    node.kill()
    node = site.start("run", folder)
    node.wait_for_line("run 1 goes on")
    with site.connect("flow") as cluster:
        wait_for(lambda: len(list(cluster.results("Waited"))) == 2, "what waited a little")
        handled = {value: handled_s for value, handled_s in cluster.results("Waited")}
        assert set(handled) == {"for", "until"}
        assert all(handled_s - began_s >= 0.7 for handled_s in handled.values())
        assert (queue(site, "waited")["delayed"], queue(site, "waited")["ready"]) == (2, 0)
        assert cluster.discard("waited") == 2
        for name in ("rated", "waited", "fresh"):
            cluster.close(name)
        cluster.wait(30)
        assert list(cluster.results("Ticked")) == list(range(1, 13))
        handled_s = sorted(cluster.results("Rated"))
        assert len(handled_s) == 12
        assert handled_s[-1] - handled_s[0] >= 0.5, "twelve at ten a second take more than one, of which the first may have been late"
        pids = Counter(cluster.results("Fresh"))
        assert sum(pids.values()) == 18 and max(pids.values()) <= 4
    assert not any("is started again" in line or "died" in line for line in node.lines)
    assert site.do("put", "waited", "--at", "tomorrow").the_error().startswith("--at tomorrow is not a time: write 2026-12-24T18:00+01:00")


BROKEN = """
    import time
    from p2pcluster import Pipeline, Queue, stage

    @stage(retries=0, parked_share_max=0.5, processes=1)
    def Parse(text):
        time.sleep(0.02)
        return int(text)

    pipeline = Pipeline("sick", Queue("texts") >> Parse)
"""


def test_a_stage_at_which_too_much_is_parked_stops_with_an_alarm_until_told_or_until_a_new_version(site: Site) -> None:
    node = site.start("run", site.project(BROKEN))
    node.wait_for_line("run 1 starts")
    with site.connect("sick") as cluster:
        cluster.put_many("texts", [f"no number {number}" for number in range(120)])
        (alarm,) = wait_for(lambda: [text for text in cluster.status()["alarms"] if "Parse" in text], "the alarm")
        assert "more than its parked_share_max=0.5 (parked list says why); to go on, run resume Parse, or deploy a version" in alarm, alarm
        parked = wait_for(lambda: queue(site, "texts")["leased"] == 0 and queue(site, "texts")["parked"], "what it had in hand is through")
        assert queue(site, "texts")["ready"] == 120 - parked
        assert site.do("resume", "Parse", "--pipeline", "sick").code == 0
        wait_for(lambda: queue(site, "texts")["parked"] >= parked + 20, "told to, it goes on")
        wait_for(lambda: [text for text in cluster.status()["alarms"] if "Parse" in text], "and stops again")
        site.deploy(BROKEN.replace("int(text)", "int(text.rpartition(' ')[2])"))
        wait_for(lambda: queue(site, "texts")["ready"] == queue(site, "texts")["leased"] == 0, "the new version goes through the rest")
        assert not [text for text in cluster.status()["alarms"] if "Parse" in text]
        cluster.retry("Parse")
        cluster.close("texts")
        cluster.wait(30)
        assert sorted(cluster.results("Parse")) == list(range(120))
