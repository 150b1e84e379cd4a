"""Values in batches, in hand together, in parts and in two forms: what `test_pipelines` has no room for."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest
from harness import Site, wait_for

from p2pcluster.errors import ItemsParked

HEAD = "from p2pcluster import At, DROP, Pipeline, Queue, To, current, sink, source, stage\n"


def test_of_a_batch_only_the_culprits_are_parked(shared: Site) -> None:
    """One item raises, one kills its process: each is tried alone, counted, and parked; all others come out once."""
    shared.deploy(
        HEAD
        + """
import os, signal

@source
def Numbers():
    yield from range(100)

@stage(batch=20, batch_wait_s=0.2, retries=1, backoff_s=0.05, processes=2)
def Sum(xs):
    with open(current().out_dir / "sizes", "a") as file:
        file.write(f"{len(xs)}\\n")
    if 33 in xs:
        raise ValueError("not this one")
    if 66 in xs:
        os.kill(os.getpid(), signal.SIGKILL)
    return [(len(xs), x) for x in xs if x % 10]

@stage(batch=1000, batch_wait_s=0.1)
def Count(pairs):
    yield len(pairs)

pipeline = Pipeline("batches", Numbers >> Sum >> [Queue("out", maxsize=None), Count])
""",
        "batches",
    )
    with shared.connect("batches") as cluster:
        wait_for(lambda: [p for p in shared.status()["pipelines"] if p["name"] == "batches" and p["state"] == "done"], "the end")
        out = list(cluster.results("out"))
        assert Counter(x for _, x in out) == Counter(x for x in range(100) if x % 10 and x not in (33, 66))
        assert sum(cluster.results("Count")) == len(out)
        parked = {cluster.parked_value("Sum", int(item["id"].rpartition(":")[2])): item for item in cluster.parked()}
    assert {value: (item["deliveries"], item["error"]["type"]) for value, item in parked.items()} == {
        33: (2, "ValueError"), 66: (2, "ProcessDied")}
    sizes = [int(line) for line in (shared.out("batches") / "sizes").read_text().split()]
    assert max(sizes) == 20 and max(size for size, _ in out) == 20


def test_async_items_in_hand_together_each_with_its_own_time(shared: Site) -> None:
    """Eight at once; one takes too long and is ended, one holds up the loop and takes the process along, which parks it alone."""
    shared.deploy(
        HEAD
        + """
import asyncio, time

@source
def Numbers():
    yield from range(60)

in_hand = set()

@stage(concurrency=8, timeout_s=0.3, retries=0, processes=1)
class Fetch:
    async def __aenter__(self):
        self.greeting = "got"
        return self

    async def __aexit__(self, *exception):
        pass

    async def __call__(self, x):
        in_hand.add(x)
        try:
            await asyncio.sleep(5 if x == 11 else 0.02)
            if x == 50:
                time.sleep(60)
            assert current().item_id == x + 1 and current().key.endswith(f"/{x + 1}")
            return (self.greeting, x, len(in_hand))
        finally:
            in_hand.discard(x)

@stage(batch=5, concurrency=3)
async def Each(values):
    for value in values:
        for part in value[:2]:
            await asyncio.sleep(0)
            yield part

pipeline = Pipeline("fetching", Numbers >> Fetch >> [Queue("fetched", maxsize=None), Each])
""",
        "fetching",
    )
    with shared.connect("fetching") as cluster:
        wait_for(lambda: [p for p in shared.status()["pipelines"] if p["name"] == "fetching" and p["state"] == "done"], "the end")
        fetched = list(cluster.results("fetched"))
        assert Counter(x for _, x, _ in fetched) == Counter(x for x in range(60) if x not in (11, 50))
        assert 1 < max(count for _, _, count in fetched) <= 8
        assert Counter(cluster.results("Each")) == Counter([part for value in fetched for part in value[:2]])
        parked = {cluster.parked_value("Fetch", int(item["id"].rpartition(":")[2])): item["error"] for item in cluster.parked()}
    assert {value: error["text"] for value, error in parked.items()} == {
        11: "TimeoutError: it ran longer than its timeout_s=0.3",
        50: "it ran longer than its timeout_s=0.3, so its process was ended"}


def test_one_item_that_becomes_many_is_there_at_once_or_not_at_all(shared: Site) -> None:
    """Tens of megabytes from one item go ahead in parts: nobody sees them before its end, and a process that dies leaves none of them."""
    shared.deploy(
        HEAD
        + """
import os, time

@source
def One():
    yield "all"

@stage(processes=1, backoff_s=0.05)
def Spread(name):
    mark = current().out_dir / "half"
    for number in range(120_000):
        if number == 80_000 and not mark.exists():
            mark.write_text(str(os.getpid()))
            time.sleep(60)
        yield (number, "x" * 80)

@sink(batch=4000)
def Write(values):
    with open(current().out_dir / "numbers", "a") as file:
        file.writelines(f"{number}\\n" for number, _ in values)

pipeline = Pipeline("spread", One >> Spread >> Queue("many", maxsize=1000) >> Write)
""",
        "spread",
    )
    out = shared.out("spread")
    mark = out / "half"
    wait_for(mark.exists, "two thirds of the values")
    (many,) = [q for q in shared.status()["queues"] if (q["pipeline"], q["name"]) == ("spread", "many")]
    assert many["ready"] == many["leased"] == 0 and not (out / "numbers").exists()
    os.kill(int(mark.read_text()), signal.SIGKILL)
    with shared.connect("spread") as cluster:
        cluster.wait(60)
    assert Counter(map(int, (out / "numbers").read_text().split())) == Counter(range(120_000))


def test_two_forms_routes_and_what_a_run_came_to(shared: Site) -> None:
    """A value goes as JSON into one queue and pickled into another; `on_done` knows what each stage did."""
    shared.deploy(
        HEAD
        + """
import json

@source
def Numbers():
    yield from range(10)

@stage(retries=0)
def Check(x):
    if x == 3:
        raise ValueError(x)
    return To("odd" if x % 2 else "even", {"n": x})

@stage
def Read(value):
    return value["n"]

def finish():
    (current().out_dir / "totals").write_text(json.dumps([current().totals, current().params]))

pipeline = Pipeline("forms", Numbers >> Check >> {"odd": [Queue("audit", codec="json"), Read], "even": Queue("evens", codec="json")},
                    params={"who": "me"}, on_done=finish)
""",
        "forms",
    )
    with shared.connect("forms") as cluster:
        with pytest.raises(ItemsParked):
            cluster.wait(30)
        assert sorted(cluster.results("Read")) == [1, 5, 7, 9]
        assert sorted(value["n"] for value in cluster.results("audit")) == [1, 5, 7, 9]
        assert sorted(value["n"] for value in cluster.results("evens")) == [0, 2, 4, 6, 8]
    totals, params = json.loads((shared.out("forms") / "totals").read_text())
    assert params == {"who": "me"}
    assert totals == {"Numbers": {"done": 10, "parked": 0}, "Check": {"done": 9, "parked": 1}, "Read": {"done": 4, "parked": 0}}


def test_of_items_that_were_in_hand_when_their_node_died_each_is_tried_alone_and_none_is_parked(site: Site) -> None:
    """Nobody knows which of them did it, so even without retries they get another delivery."""
    project = site.project(
        HEAD
        + """
import asyncio, time

@source
def Numbers():
    yield from range(4)

def mark(name):
    (current().out_dir / f"{name}-{current().delivery}").touch()

@stage(processes=1, batch=4, retries=0)
def Batch(xs):
    mark(f"batch{len(xs)}")
    if current().delivery == 1:
        time.sleep(60)
    return xs

@stage(processes=1, concurrency=4, retries=0)
async def Task(x):
    mark(f"task{x}")
    if current().delivery == 1:
        await asyncio.sleep(60)
    return x

pipeline = Pipeline("dying", Numbers >> [Batch, Task])
"""
    )
    node = site.start("run", str(project))
    out = site.out("dying")
    first = {"batch4-1", *(f"task{x}-1" for x in range(4))}
    wait_for(lambda: out.exists() and {file.name for file in out.iterdir()} == first, "all are in hand")
    wait_for(lambda: [q["leased"] for q in site.status()["queues"] if q["name"] in ("Batch", "Task")] == [4, 4], "the log says so")
    node.kill()
    site.start("run", str(project))
    with site.connect("dying", timeout_s=30) as cluster:
        cluster.wait(30)
        assert sorted(cluster.results("Batch")) == sorted(cluster.results("Task")) == [0, 1, 2, 3]
    assert {file.name for file in out.iterdir()} == first | {"batch1-2", *(f"task{x}-2" for x in range(4))}
