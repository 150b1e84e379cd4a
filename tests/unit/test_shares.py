"""A stage of whose last items too many were parked: what counts as the last, and as too many."""

from __future__ import annotations

from random import Random

import pytest

from p2pcluster.core.shares import ITEMS_MAX, ITEMS_MIN, Share


def stops_after(share_max: float, parked_of: float, good_before: int = 0, seed: int = 0) -> int | None:
    """After how many items a stage stops, of which such a share is parked; None if it never does."""
    random, stage = Random(seed), {"name": "S", "parked_share_max": share_max}
    share, done = Share(0), good_before
    for count in range(1, 5_000):
        if random.random() >= parked_of:
            done += 1
            continue
        share = share.with_parked(done)
        assert 0 < share.parked_milli <= 1000 * done - share.done_at_milli + share.parked_milli <= 1000 * ITEMS_MAX
        if share.why_stop(stage, done) is not None:
            return count
    return None


def test_one_failure_of_three_stops_nothing() -> None:
    share = Share(0).with_parked(2)
    assert share.why_stop({"name": "S", "parked_share_max": 0.1}, 2) is None


def test_a_stage_that_never_worked_stops_after_the_least_number_of_items() -> None:
    assert stops_after(0.5, 1.0) == ITEMS_MIN
    assert stops_after(0.0, 1.0) == ITEMS_MIN


@pytest.mark.parametrize("good_before", [1_000, 1_000_000, 10**12])
def test_a_stage_that_breaks_behind_many_good_items_stops_within_a_look_back(good_before: int) -> None:
    after = stops_after(0.5, 1.0, good_before)
    assert after is not None and ITEMS_MAX // 2 <= after <= ITEMS_MAX


@pytest.mark.parametrize("seed", range(10))
def test_a_share_well_below_the_limit_never_stops_it_and_one_well_above_always_does(seed: int) -> None:
    assert stops_after(0.5, 0.25, seed=seed) is None
    assert stops_after(0.5, 0.8, 500, seed=seed) is not None
    assert stops_after(0.1, 0.01, seed=seed) is None


def test_without_a_limit_it_never_stops() -> None:
    share = Share(0)
    for _ in range(100):
        share = share.with_parked(0)
    assert share.why_stop({"name": "S"}, 0) is None
    assert share.why_stop({"name": "S", "parked_share_max": None}, 0) is None


def test_why_is_one_line_that_says_where_to_look() -> None:
    share = Share(10_000)
    for _ in range(15):
        share = share.with_parked(20)
    assert share.why_stop({"name": "S", "parked_share_max": 0.5}, 20) == (
        "15 of its last 25 items were parked, more than its parked_share_max=0.5 (parked list says why)")
