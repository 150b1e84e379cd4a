"""Bounded queues never stand still for good: any graph, any sizes, any order in which the machines and their processes get their turns.

Graphs are drawn with fan-out, merges, diamonds, routes, and cycles through queues without a limit. Each value says how many steps
it may still take, so that what goes round comes to an end. A run drains, or the test fails.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core.graph import Pipeline
from p2pcluster.core.stages import Queue, Stage, sink, source, stage
from tests.flow import Flow

STEPS = 6  # of one value and what comes of it
STANDSTILL_MS = 8_000  # longer than any retry waits, and than a machine needs to come back


def _emit() -> Any:
    yield from ()


def _take(value: Any) -> Any:
    return value


def drawn(random: Random, with_cycles: bool) -> dict[str, Any]:
    """The manifest of a graph. Stage `sN` reads the queue `qN`; each has one or two stages or sources before it."""
    count = random.randrange(2, 8)
    sources = [source(_emit, name=f"g{number}") for number in range(random.randrange(1, 3))]
    after: dict[int, list[int]] = {number: [] for number in range(-len(sources), count)}
    for number in range(count):
        for before in random.sample(range(-len(sources), number), min(len(sources) + number, random.choice((1, 1, 2)))):
            after[before].append(number)
    back = {number: random.randrange(number + 1) for number in range(count) if with_cycles and random.random() < 0.4}
    for number, earlier in back.items():
        if earlier not in after[number]:
            after[number].append(earlier)
    unused = [number for number in range(-len(sources), 0) if not after[number]]
    for number in unused:
        after[number].append(0)
    queues = [Queue(f"q{number}", maxsize=None if number in back.values() else random.randrange(1, 5)) for number in range(count)]
    stages = {number - len(sources): made for number, made in enumerate(sources)}
    stages |= {number: _stage(random, number, bool(after[number])) for number in range(count)}
    flows = [queues[number] >> stages[number] for number in range(count)]
    flows += [_joined(random, stages[number], [queues[target] for target in targets]) for number, targets in after.items() if targets]
    manifest = Pipeline("f", *flows).manifest()
    for record in manifest["queues"]:
        if record["maxsize"] is not None and random.random() < 0.3:
            record["bytes_max"] = random.randrange(1, 60)
    return manifest


def _stage(random: Random, number: int, goes_on: bool) -> Stage[..., Any]:
    options: dict[str, Any] = {"name": f"s{number}", "processes": random.randrange(1, 3)}
    options |= {"retries": random.choice((0, 2)), "backoff_s": 0.05}
    options |= {"max_items": 5} if random.random() < 0.1 else {}
    options |= {"rate": "200/s"} if random.random() < 0.1 else {}
    return stage(_take, **options) if goes_on or random.random() < 0.5 else sink(_take, **options)


def _joined(random: Random, before: Stage[..., Any], targets: list[Queue]) -> Any:
    if len(targets) > 1 and before.kind == "stage" and random.random() < 0.5:
        return before >> {f"way{number}": target for number, target in enumerate(targets)}
    return before >> targets


def behaviour(random: Random, flow: Flow) -> None:
    """What stages make of values: nothing, one or two of them, by any of their ways; some fail."""
    def emits(name: str, value: bytes) -> list[tuple[int, bytes]]:
        steps, ports = int(value.partition(b":")[0]), flow.ports_of[name]
        if not steps or not ports:
            return []
        made = b"%d:%s" % (steps - 1, value.partition(b":")[2])
        return [(random.randrange(ports), made) for _ in range(random.choice((0, 1, 1, 1, 1, 2)))]

    flow.emits = emits
    flow.fails = lambda name, value: random.random() < 0.05
    flow.sources = {record["name"]: [b"%d:%d" % (STEPS, number) for number in range(random.randrange(12))]
                    for record in flow.manifest["stages"] if record["kind"] == "source"}


def drain(random: Random, flow: Flow) -> bool:
    """Whether it comes to its end: turns by chance, and time when nobody can go on, or now and then."""
    since_ms, seen = flow.now_ms, -1
    while not flow.is_done:
        if random.random() < 0.1 or not flow.turn():
            flow._tick(20)
        counts = sum(queue.put + queue.done for queue in flow.state.queues.values())
        if counts != seen:
            since_ms, seen = flow.now_ms, counts
        if flow.now_ms - since_ms > STANDSTILL_MS:
            return False
    return True


def play(seed: int, with_cycles: bool) -> Flow:
    random = Random(seed)
    flow = Flow(drawn(random, with_cycles), random, machines=random.randrange(1, 4))
    behaviour(random, flow)
    assert drain(random, flow), f"seed {seed}: it stands still: " + ", ".join(
        f"{queue.name} {queue.open_count} of {queue.maxsize}" for queue in flow.state.queues.values())
    return flow


def assert_all_went_through(flow: Flow) -> None:
    for record in flow.manifest["queues"]:
        queue = flow.queue(record["name"])
        assert queue.put == queue.done + len(queue.parked) + queue.open_count
        assert not (record["read_by"] and queue.open_count)
    emitted = sum(len(values) for values in flow.sources.values())
    sources = [record for record in flow.manifest["stages"] if record["kind"] == "source"]
    first = {name for record in sources for port in record["ports"] for name in port["queues"]}
    assert sum(flow.queue(name).put for name in first) >= emitted


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 32))
def test_any_graph_without_cycles_drains(seed: int) -> None:
    assert_all_went_through(play(seed, with_cycles=False))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 32))
def test_any_graph_drains_whose_cycles_go_through_queues_without_a_limit(seed: int) -> None:
    assert_all_went_through(play(seed, with_cycles=True))


def test_the_graphs_have_what_they_are_for() -> None:
    """Fan-out, merges, diamonds, routes and cycles, each often."""
    manifests = [drawn(Random(seed), with_cycles=True) for seed in range(60)]
    ports = [[record["ports"] for record in manifest["stages"]] for manifest in manifests]
    assert sum(any(len(port["queues"]) > 1 for found in of for port in found) for of in ports) > 10, "fan-out"
    assert sum(any(len(found) > 1 for found in of) for of in ports) > 10, "routes"
    assert sum(any(len(record["fed_by"]) > 1 for record in manifest["queues"]) for manifest in manifests) > 10, "merges"
    assert sum(bool(manifest["back_edges"]) for manifest in manifests) > 10, "cycles"


def test_a_cycle_of_bounded_queues_stands_still_which_is_noticed() -> None:
    """The graph check refuses it; here its limit comes in behind that, so that this test can be seen to fail."""
    stuck = 0
    for seed in range(40):
        random = Random(seed)
        manifest = drawn(random, with_cycles=True)
        for record in manifest["queues"]:
            record["maxsize"] = 1 if record["maxsize"] is None and record["read_by"] else record["maxsize"]
        manifest["back_edges"] = []
        flow = Flow(manifest, random)
        behaviour(random, flow)
        flow.fails = lambda name, value: False
        stuck += not drain(random, flow)
        if stuck:
            return
    pytest.fail("none of them stood still")
