"""Ranges are sets of ids, and leases a dict from id to fence: the same answers, whatever is done to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core.ranges import Fence, LeaseMap, Range, RangeSet

SPAN = 30
quick = settings(deadline=None, derandomize=True)

RANGES = st.tuples(st.integers(0, SPAN), st.integers(1, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))
RANGE_STEPS = st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), RANGES), max_size=25)
FENCES = st.builds(Fence, st.sampled_from(["n1", "n2"]), st.sampled_from(["b1", "b2"]), st.integers(1, 2))


def ids(ranges: list[Range]) -> list[int]:
    return [item_id for lo, hi in ranges for item_id in range(lo, hi)]


def built(steps: list[tuple[str, Range]]) -> tuple[RangeSet, set[int]]:
    ranges, model = RangeSet(), set[int]()
    for kind, (lo, hi) in steps:
        if kind == "add":
            ranges.add(lo, hi)
            model |= set(range(lo, hi))
        else:
            removed = ranges.remove(lo, hi)
            assert ids(removed) == sorted(model & set(range(lo, hi)))
            model -= set(range(lo, hi))
        check(ranges, model)
    return ranges, model


def check(ranges: RangeSet, model: set[int]) -> None:
    assert ids(list(ranges)) == sorted(model)
    assert len(ranges) == len(model)
    assert bool(ranges) == bool(model)
    pairs = list(ranges)
    assert all(lo < hi for lo, hi in pairs), "an empty range is kept"
    assert all(before[1] < after[0] for before, after in zip(pairs, pairs[1:], strict=False)), (
        "neighbours are not merged"
    )
    for item_id in range(-1, SPAN + 10):
        assert (item_id in ranges) == (item_id in model)


# --- RangeSet --------------------------------------------------------------------------------------------------------


@quick
@given(RANGE_STEPS)
def test_a_range_set_is_a_set_of_ids(steps: list[tuple[str, Range]]) -> None:
    ranges, model = built(steps)
    assert ranges == RangeSet((item_id, item_id + 1) for item_id in sorted(model)), "equal sets are equal"
    ranges.clear()
    check(ranges, set())


@quick
@given(RANGE_STEPS, RANGES)
def test_what_overlaps_is_told_without_a_change(steps: list[tuple[str, Range]], span: Range) -> None:
    ranges, model = built(steps)
    assert ids(ranges.overlap(*span)) == sorted(model & set(range(*span)))
    check(ranges, model)


@quick
@given(RANGE_STEPS, RANGE_STEPS, st.integers(-1, 40))
def test_the_first_ids_are_the_lowest_that_are_not_outside(
    steps: list[tuple[str, Range]], outside_steps: list[tuple[str, Range]], count: int
) -> None:
    ranges, model = built(steps)
    outside, not_these = built(outside_steps)
    assert ids(ranges.first(count, outside)) == sorted(model - not_these)[: max(0, count)]
    assert ids(ranges.first(count)) == sorted(model)[: max(0, count)]
    assert all(lo < hi for lo, hi in ranges.first(count, outside)), "an empty range is handed out"
    check(ranges, model)


def test_neighbours_become_one_range() -> None:
    assert list(RangeSet([(5, 7), (1, 3), (3, 5)])) == [(1, 7)]
    assert repr(RangeSet([(1, 3)])) == "RangeSet([(1, 3)])"


def test_a_million_ids_in_a_row_are_one_range() -> None:
    ranges = RangeSet((lo, lo + 1000) for lo in range(0, 1_000_000, 1000))
    assert (len(ranges), list(ranges)) == (1_000_000, [(0, 1_000_000)])


def test_nothing_is_handed_out_where_nothing_is_asked_for() -> None:
    ranges = RangeSet([(1, 5)])
    assert (ranges.first(0), ranges.first(-3)) == ([], [])


def test_an_empty_range_is_not_added() -> None:
    with pytest.raises(AssertionError, match="empty"):
        RangeSet([(3, 3)])


def test_a_range_set_is_not_equal_to_something_else_and_not_hashable() -> None:
    assert RangeSet([(1, 2)]) != [(1, 2)]
    with pytest.raises(TypeError):
        hash(RangeSet())


# --- LeaseMap --------------------------------------------------------------------------------------------------------


def check_leases(leases: LeaseMap, model: dict[int, Fence]) -> None:
    assert {item_id: fence for lo, hi, fence in leases for item_id in range(lo, hi)} == model
    assert [lo for lo, _, _ in leases] == sorted(lo for lo, _, _ in leases)
    assert len(leases) == len(model)
    assert leases.held_by == Counter(fence[:2] for fence in model.values())
    assert 0 not in leases.held_by.values(), "a session that holds nothing is still listed"


@quick
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), RANGES, FENCES), max_size=25), RANGES)
def test_a_lease_map_is_a_dict_from_id_to_fence(steps: list[tuple[str, Range, Fence]], span: Range) -> None:
    leases, model = LeaseMap(), dict[int, Fence]()
    for kind, (lo, hi), fence in steps:
        if kind == "add":
            for a, b in (
                [(i, i + 1) for i in range(lo, hi) if i not in model]
                if model.keys() & set(range(lo, hi))
                else [(lo, hi)]
            ):
                leases.add(a, b, fence)
            model |= {i: fence for i in range(lo, hi) if i not in model}
        else:
            removed = leases.remove(lo, hi)
            assert {i: f for a, b, f in removed for i in range(a, b)} == {
                i: f for i, f in model.items() if lo <= i < hi
            }
            model = {i: f for i, f in model.items() if not lo <= i < hi}
        check_leases(leases, model)
    parts = leases.overlap(*span)
    assert {i: f for a, b, f in parts for i in range(a, b)} == {i: f for i, f in model.items() if i in range(*span)}
    for node in ("n1", "n2"):
        held = {i for a, b, _ in leases.of_session(node, "b1") for i in range(a, b)}
        assert held == {i for i, f in model.items() if f[:2] == (node, "b1")}
    check_leases(leases, model)


@pytest.mark.parametrize("taken", [(1, 3), (4, 6), (2, 9), (3, 4)])
def test_an_id_has_one_lease(taken: Range) -> None:
    leases = LeaseMap()
    leases.add(2, 5, Fence("n1", "b1", 1))
    with pytest.raises(AssertionError, match="leased already"):
        leases.add(*taken, Fence("n2", "b1", 1))


def test_an_empty_lease_is_refused() -> None:
    with pytest.raises(AssertionError, match="empty"):
        LeaseMap().add(3, 3, Fence("n1", "b1", 1))


# --- The checks can fail ---------------------------------------------------------------------------------------------


def steps_by_chance(random: Random) -> list[tuple[str, Range]]:
    starts = [random.randint(0, SPAN) for _ in range(25)]
    return [(random.choice(["add", "add", "remove"]), (lo, lo + random.randint(1, 8))) for lo in starts]


def _miscount(ranges: RangeSet, lo: int, hi: int) -> list[Range]:
    removed = original_remove(ranges, lo, hi)
    ranges._size += len(removed) > 1
    return removed


def _never_merge(ranges: RangeSet, lo: int, hi: int) -> None:
    original_remove(ranges, lo, hi)
    at = sum(before < lo for before in ranges._los)
    ranges._los.insert(at, lo)
    ranges._his.insert(at, hi)
    ranges._size += hi - lo


original_remove = RangeSet.remove


@pytest.mark.parametrize(("name", "bug"), [("remove", _miscount), ("add", _never_merge)])
def test_a_range_set_with_a_bug_is_noticed(
    name: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RangeSet, name, bug)
    with pytest.raises(AssertionError):
        for seed in range(5):
            built(steps_by_chance(Random(seed)))


def test_a_lease_map_that_miscounts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    leases = LeaseMap()
    leases.add(1, 3, Fence("n1", "b1", 1))
    leases.held_by[("n1", "b1")] += 1
    with pytest.raises(AssertionError):
        check_leases(leases, {1: Fence("n1", "b1", 1), 2: Fence("n1", "b1", 1)})
