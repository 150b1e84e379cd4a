"""What waits for a time: which of it is due, and that nobody has to look at the rest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any

import pytest

from p2pcluster.client import _waits
from p2pcluster.core.delays import Delayed, by_clock
from p2pcluster.errors import WrongUsage


@pytest.mark.parametrize("seed", range(20))
def test_what_is_due_is_what_a_look_at_all_would_find(seed: int) -> None:
    random, delayed, plain = Random(seed), Delayed(), dict[int, int]()
    for step in range(300):
        lo = random.randrange(50)
        hi = lo + random.choice((1, 1, 5, 20))
        due = random.choice((1, -1)) * random.randrange(1, 100)
        what = random.random()
        if what < 0.3:
            delayed.put_off(lo, hi, due)
            plain |= dict.fromkeys(range(lo, hi), due)
        elif what < 0.6:
            delayed[lo] = plain[lo] = due
        else:
            for item_id in range(lo, hi):
                assert delayed.pop(item_id, None) == plain.pop(item_id, None)
        cluster_ms, wall_ms = random.randrange(100), random.randrange(100)
        expected = sorted(i for i, due in plain.items() if (due <= cluster_ms if due >= 0 else -due <= wall_ms))
        assert delayed.due(cluster_ms, wall_ms, 1000) == expected
        assert delayed.is_due_by(cluster_ms, wall_ms) or not expected
        assert delayed == plain


def test_a_time_of_day_is_another_line_than_the_clusters_time() -> None:
    delayed = Delayed()
    delayed[1], delayed[2] = 1000, by_clock(1000)
    assert (delayed.due(1000, 999, 9), delayed.due(999, 1000, 9), delayed.due(999, 999, 9)) == ([1], [2], [])


def test_of_very_many_that_are_due_some_are_told_and_then_the_others() -> None:
    delayed = Delayed()
    delayed.put_off(1, 1001, 5)
    found = []
    while ids := delayed.due(5, 0, 300):
        assert len(ids) <= 300
        found += ids
        for item_id in ids:
            del delayed[item_id]
    assert found == list(range(1, 1001))


def test_what_waits_no_more_leaves_nothing_behind() -> None:
    """An item that fails and is tried again, a million times."""
    delayed = Delayed()
    for at in range(10_000):
        delayed[at % 7] = 1_000_000 + at
        del delayed[at % 7]
    assert sum(map(len, delayed._lines)) < 100


# ---- how a client says it


@pytest.mark.parametrize(("delay_s", "at", "said"), [
    (None, None, {}), (0, None, {"delay_ms": 0}), (1.0001, None, {"delay_ms": 1001}), (None, 12.5, {"at_ms": 12_500}),
    (None, datetime(1970, 1, 2, tzinfo=UTC), {"at_ms": 86_400_000}),
    (None, datetime(1970, 1, 2, tzinfo=timezone(timedelta(hours=1))), {"at_ms": 82_800_000}),
])
def test_a_wait_is_said_in_milliseconds(delay_s: Any, at: Any, said: dict[str, int]) -> None:
    assert _waits(delay_s, at) == said


@pytest.mark.parametrize(("delay_s", "at", "why"), [
    (1, 2, "both given"), (-1, None, "seconds, 0 or more"), (float("nan"), None, "seconds, 0 or more"), (1e300, None, "seconds"),
    (True, None, "seconds"), ("1", None, "seconds"), (None, "tomorrow", "a datetime"), (None, datetime(2030, 1, 1), "no time zone"),
])
def test_what_is_no_wait_is_refused_with_what_to_do(delay_s: Any, at: Any, why: str) -> None:
    with pytest.raises(WrongUsage, match=why):
        _waits(delay_s, at)
