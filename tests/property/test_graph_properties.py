"""Any graph that somebody may write is refused with a sentence, or makes a manifest that a node can trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from p2pcluster import GraphError, Pipeline, Queue, Stage, sink, source, stage

Manifest = dict[str, Any]


def check_manifest(manifest: Manifest) -> None:
    """What a node relies on; raises AssertionError."""
    assert json.loads(json.dumps(manifest)) == manifest
    stages = {one["name"]: one for one in manifest["stages"]}
    queues = {one["name"]: one for one in manifest["queues"]}
    assert len(stages) == len(manifest["stages"])
    assert len(queues) == len(manifest["queues"])
    check_both_sides_agree(stages, queues)
    check_order(manifest, stages, queues)
    check_every_stage_can_get_an_item(stages, queues)


def targets(one: Manifest) -> list[str]:
    return [queue for port in one["ports"] for queue in port["queues"]]


def check_both_sides_agree(stages: Manifest, queues: Manifest) -> None:
    for name, one in stages.items():
        assert (one["reads"] is None) == (one["kind"] == "source")
        assert (one["ports"] == []) == (one["kind"] == "sink")
        assert one["reads"] is None or queues[one["reads"]]["read_by"] == name
        labels = [port["label"] for port in one["ports"]]
        assert labels.count(None) == 0 or labels == [None]
        assert len(set(labels)) == len(labels)
        assert all(len(set(port["queues"])) == len(port["queues"]) for port in one["ports"])
        assert all(name in queues[queue]["fed_by"] for queue in targets(one))
    for name, queue in queues.items():
        readers = [one["name"] for one in stages.values() if one["reads"] == name]
        assert readers == ([] if queue["read_by"] is None else [queue["read_by"]])
        assert queue["fed_by"] == [one["name"] for one in stages.values() if name in targets(one)]
        assert queue["outside"] == (queue["fed_by"] == [])
        assert not (queue["outside"] and queue["read_by"] is None)
        assert not (queue["results"] and (queue["read_by"] or queue["maxsize"]))


def check_order(manifest: Manifest, stages: Manifest, queues: Manifest) -> None:
    assert sorted(manifest["order"]) == sorted(stages)
    place = {name: index for index, name in enumerate(manifest["order"])}
    back = [tuple(edge) for edge in manifest["back_edges"]]
    for name, one in stages.items():
        for queue in targets(one):
            reader = queues[queue]["read_by"]
            if (name, queue) in back:
                assert queues[queue]["maxsize"] is None
                assert place[reader] <= place[name]
            elif reader is not None:
                assert place[name] < place[reader]


def check_every_stage_can_get_an_item(stages: Manifest, queues: Manifest) -> None:
    reached = {name for name, one in stages.items() if one["kind"] == "source"}
    reached |= {queue["read_by"] for queue in queues.values() if queue["outside"]}
    for _ in stages:
        reached |= {queues[queue]["read_by"] for name in reached for queue in targets(stages[name])} - {None}
    assert reached == set(stages)


# Wild graphs: anything that can be written down.


MAKERS: dict[str, Callable[[str], Stage[..., Any] | Queue]] = {
    "source": lambda name: source(lambda: 1, name=name),
    "stage": lambda name: stage(lambda x: x, name=name),
    "sink": lambda name: sink(lambda x: None, name=name),
    "bounded": lambda name: Queue(name),
    "unbounded": lambda name: Queue(name, maxsize=None),
}


@st.composite
def nodes(draw: st.DrawFn) -> list[Stage[..., Any] | Queue]:
    kinds = draw(st.lists(st.sampled_from([*MAKERS, "stage", "stage"]), min_size=1, max_size=6))
    names = [f"n{i}" for i in range(len(kinds))]
    if draw(st.integers(0, 9)) == 0:
        names[-1] = draw(st.sampled_from(["n0", "n0.results", "begin"]))
    return [MAKERS[kind](name) for kind, name in zip(["source", *kinds], ["begin", *names], strict=True)]


@st.composite
def wild_flows(draw: st.DrawFn) -> list[Any]:
    """A way into most nodes, so that some graphs are sound, and arrows from anywhere to anywhere."""
    every = draw(nodes())
    feeders = {i: [node for node in every[:i] if may_feed(node, every[i])] for i in range(1, len(every))}
    into = [(draw(st.sampled_from(before)), every[i]) for i, before in feeders.items() if before]
    some = st.sampled_from(every)
    left = st.one_of(some, st.lists(some, max_size=2))
    routes = st.dictionaries(st.sampled_from(["ok", "bad", 1]), some, max_size=2)
    right = st.one_of(some, st.lists(some, max_size=3), routes)
    return draw(st.permutations(into + draw(st.lists(st.tuples(left, right), max_size=3))))


def may_feed(before: Stage[..., Any] | Queue, after: Stage[..., Any] | Queue) -> bool:
    if isinstance(before, Queue):
        return isinstance(after, Stage) and after.kind != "source"
    return before.kind != "sink" and (isinstance(after, Queue) or after.kind != "source")


@given(wild_flows())
def test_a_graph_is_refused_in_one_line_or_makes_a_sound_manifest(arrows: list[Any]) -> None:
    try:
        flows = [joined(left, right) for left, right in arrows]
        manifest = Pipeline("wild", *flows).manifest()
    except GraphError as refusal:
        event("refused")
        assert "\n" not in str(refusal)
        return
    event("accepted")
    check_manifest(manifest)


def joined(left: Any, right: Any) -> Any:
    if isinstance(left, list) and not isinstance(right, (Stage, Queue)):
        left = left[0] if left else Queue("left")
    return left >> right


# Tame graphs: each stage is fed by an earlier one, and ways back lead into unbounded queues.


@st.composite
def tame_arrows(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    count = draw(st.integers(1, 6))
    forward = [(draw(st.integers(0, i - 1)), i) for i in range(1, count + 1)]
    pairs = st.tuples(st.integers(1, count), st.integers(1, count))
    more = draw(st.lists(pairs, max_size=8))
    return forward + [pair for pair in more if pair[0] < pair[1]], [pair for pair in more if pair[0] >= pair[1]]


@given(tame_arrows(), st.randoms(use_true_random=False))
def test_a_sound_graph_is_accepted_however_its_flows_are_ordered(arrows: Any, random: Any) -> None:
    forward, back = arrows
    count = max(after for _, after in forward)
    stages = [source(lambda: 1, name="s0"), *(stage(lambda x: x, name=f"s{i}") for i in range(1, count + 1))]
    entries = {after: Queue(f"q{after}", maxsize=None) for _, after in back}
    flows = [
        stages[before] >> entries[after] >> stages[after] if after in entries else stages[before] >> stages[after]
        for before, after in forward + back
    ]
    random.shuffle(flows)
    manifest = Pipeline("tame", *flows).manifest()
    check_manifest(manifest)
    assert bool(manifest["back_edges"]) == goes_round(forward + back)
    assert manifest == Pipeline("tame", *flows).manifest()


def goes_round(arrows: list[tuple[int, int]]) -> bool:
    """Whether the arrows hold a cycle, the slow way: follow all of them until nothing new is reached."""
    reached = set(arrows)
    for _ in range(len(arrows)):
        reached |= {(start, end) for start, middle in reached for also, end in arrows if middle == also}
    return any(start == end for start, end in reached)


# The check itself can fail.


def sound() -> Manifest:
    a = stage(lambda x: x, name="a")
    begin = source(lambda: 1, name="begin")
    flow = begin >> Queue("ring", maxsize=None) >> a >> {"on": stage(lambda x: x, name="b"), "back": a}
    return Pipeline("sound", flow).manifest()


def spoil_order(manifest: Manifest) -> None:
    manifest["order"].reverse()


def spoil_back_edge(manifest: Manifest) -> None:
    manifest["back_edges"].clear()


def spoil_bound(manifest: Manifest) -> None:
    manifest["queues"][0]["maxsize"] = 10


def spoil_reader(manifest: Manifest) -> None:
    manifest["stages"][2]["reads"] = "ring"


def spoil_input(manifest: Manifest) -> None:
    manifest["stages"][0]["ports"][0]["queues"] = ["b"]
    manifest["queues"][0]["fed_by"].remove("begin")
    manifest["queues"][1]["fed_by"].insert(0, "begin")


def spoil_labels(manifest: Manifest) -> None:
    manifest["stages"][1]["ports"][0]["label"] = None


def spoil_json(manifest: Manifest) -> None:
    manifest["order"] = tuple(manifest["order"])


def test_a_sound_manifest_passes_the_check() -> None:
    check_manifest(sound())


@pytest.mark.parametrize(
    "spoil", [spoil_order, spoil_back_edge, spoil_bound, spoil_reader, spoil_input, spoil_labels, spoil_json]
)
def test_a_spoilt_manifest_fails_the_check(spoil: Callable[[Manifest], None]) -> None:
    manifest = sound()
    spoil(manifest)
    with pytest.raises(AssertionError):
        check_manifest(manifest)
