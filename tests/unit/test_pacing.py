"""A rate's bucket: what it holds, what it gives, and that who leads next goes on with the same one."""

from __future__ import annotations

from random import Random

import pytest

from p2pcluster import config
from p2pcluster.core.options import rate_per_s
from p2pcluster.core.pacing import Pacers, allowed, burst_of, interval_ns_of, taken, wait_ms


@pytest.mark.parametrize(("rate", "interval_ns", "burst"), [
    ("5/s", 200_000_000, 1), ("100/s", 10_000_000, 10), ("30/m", 2_000_000_000, 1), ("5/h", 720_000_000_000, 1), ("100000/s", 10_000, 10_000),
])
def test_a_rate_is_an_interval_and_a_small_burst(rate: str, interval_ns: int, burst: int) -> None:
    assert (interval_ns_of(rate), burst_of(interval_ns)) == (interval_ns, burst)


def test_without_a_rate_there_is_no_interval() -> None:
    assert interval_ns_of(None) == 0


@pytest.mark.parametrize("text", ["0/s", "9" * 400 + "/s", "0." + "0" * 400 + "1/h", "0." + "0" * 310 + "1/h", "5", "5/d", "-1/s", "1e3/s"])
def test_what_is_no_rate_in_practice_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        rate_per_s(text)


def test_a_fresh_bucket_is_full_and_gives_one_more_each_interval() -> None:
    interval_ns = interval_ns_of("100/s")
    assert allowed(0, interval_ns, 1_000) == 10
    empty_ns = taken(0, interval_ns, 1_000, 10)
    assert [allowed(empty_ns, interval_ns, now_ms) for now_ms in (1_000, 1_009, 1_010, 1_025, 1_100, 9_000)] == [0, 0, 1, 2, 10, 10]


@pytest.mark.parametrize("rate", ["3/s", "7/m", "99/s", "333/s", "12345/s"])
def test_when_told_to_wait_the_tokens_are_there_and_a_millisecond_earlier_they_are_not(rate: str) -> None:
    interval_ns = interval_ns_of(rate)
    for count in (1, burst_of(interval_ns)):
        full_ns = taken(0, interval_ns, 777, burst_of(interval_ns))
        ms = wait_ms(full_ns, interval_ns, 777, count)
        assert allowed(full_ns, interval_ns, 777 + ms) >= count > allowed(full_ns, interval_ns, 777 + ms - 1)


@pytest.mark.parametrize("seed", range(20))
def test_over_no_window_more_than_the_rate_and_one_burst_may_go_whoever_leads(seed: int) -> None:
    """Leaders change at random; of each only what it logged is known to the next, which is all that it gave."""
    random = Random(seed)
    interval_ns = interval_ns_of(random.choice(["5/s", "100/s", "900/m", "2000/s"]))
    pacers, logged_ns, now_ms = Pacers(), 0, 0
    gone: list[tuple[int, int]] = []
    for _ in range(400):
        now_ms += random.choice((0, 1, 20, 50, 300))
        if random.random() < 0.05:
            pacers = Pacers()
        count = pacers.allowed(logged_ns, interval_ns, now_ms, random.randrange(1, 40))
        if count:
            now_ms += random.choice((0, 0, 3, 40))  # until it is written, and stamped
            logged_ns = taken(logged_ns, interval_ns, now_ms, count)
            gone.append((now_ms, count))
    for at, (first_ms, _) in enumerate(gone):
        total = 0
        for last_ms, count in gone[at:]:
            total += count
            assert total <= burst_of(interval_ns) + (last_ms - first_ms) * 1_000_000 / interval_ns + 1e-6


def test_a_batch_goes_whole_and_one_beyond_the_burst_when_the_bucket_is_full() -> None:
    pacers, interval_ns = Pacers(), interval_ns_of("100/s")
    assert pacers.may_go(0, interval_ns, 0, 25)
    full_ns = taken(0, interval_ns, 0, 25)
    assert not pacers.may_go(full_ns, interval_ns, 249, 25)
    assert pacers.is_due(250)
    assert pacers.may_go(full_ns, interval_ns, 250, 25)
    full_ns = taken(full_ns, interval_ns, 250, 25)
    assert pacers.may_go(full_ns, interval_ns, 250, 0), "the end of a source is no value"


def test_nobody_is_woken_who_was_not_told_to_wait() -> None:
    pacers, interval_ns = Pacers(), interval_ns_of("5/s")
    assert not pacers.is_due(1 << 60)
    assert pacers.allowed(taken(0, interval_ns, 1_000, 1), interval_ns, 1_000, 3) == 0
    assert (pacers.is_due(1_199), pacers.is_due(1_200)) == (False, True)
    pacers.look_again()
    assert not pacers.is_due(1 << 60)


def test_the_burst_spans_some_looks_at_the_clock() -> None:
    assert config.RATE_BURST_S * 1000 >= 4 * config.TICK_MS
