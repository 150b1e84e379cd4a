"""How a rate is kept: a bucket of tokens that is one number, the time at which it is full again.

This file alone decides how large the bucket is and how much it gives. Who takes from it, and what a token is for, is the leader's affair;
that number is in the log (`records.PipelineState.paced`), so that whoever leads next goes on with the same bucket. It is in nanoseconds of
the cluster's time, a whole number, or the states of two nodes might differ by a rounding.
"""

from __future__ import annotations

from p2pcluster import config
from p2pcluster.core.options import rate_per_s

_NS_PER_MS = 1_000_000


def interval_ns_of(rate: str | None) -> int:
    """From one token to the next; 0 without a rate."""
    return 0 if rate is None else max(1, round(1e9 / rate_per_s(rate)))


def burst_of(interval_ns: int) -> int:
    """What a full bucket holds, at least one."""
    return max(1, int(1e9 * config.RATE_BURST_S) // interval_ns)


def allowed(full_ns: int, interval_ns: int, now_ms: int) -> int:
    """How many tokens are in a bucket that is full at `full_ns`."""
    missing_ns = max(0, full_ns - now_ms * _NS_PER_MS)
    return max(0, burst_of(interval_ns) - -(-missing_ns // interval_ns))


def taken(full_ns: int, interval_ns: int, now_ms: int, count: int) -> int:
    """When a bucket is full again out of which `count` tokens are taken; they may be more than it has."""
    return max(full_ns, now_ms * _NS_PER_MS) + count * interval_ns


def wait_ms(full_ns: int, interval_ns: int, now_ms: int, count: int) -> int:
    """How long until it has so many tokens, or is full."""
    at_ns = full_ns - (burst_of(interval_ns) - min(count, burst_of(interval_ns))) * interval_ns
    return max(0, -(-(at_ns - now_ms * _NS_PER_MS) // _NS_PER_MS))


class Pacers:
    """What the leader lets go now, and when it has to look again for those that have to wait.

    It goes by the log alone, so nobody may ask for a bucket while something that was let go is not applied: by what time that is stamped
    in the end is not known before.
    """

    def __init__(self) -> None:
        self._next_ms: int | None = None

    def allowed(self, full_ns: int, interval_ns: int, now_ms: int, wanted: int) -> int:
        """How many of the wanted may go now."""
        count = min(wanted, allowed(full_ns, interval_ns, now_ms))
        if count < wanted:
            self._wake_at(now_ms + wait_ms(full_ns, interval_ns, now_ms, count + 1))
        return count

    def may_go(self, full_ns: int, interval_ns: int, now_ms: int, count: int) -> bool:
        """Whether all may go now. As many as never are in a bucket go when it is full."""
        left_ms = wait_ms(full_ns, interval_ns, now_ms, count) if count else 0
        if left_ms:
            self._wake_at(now_ms + left_ms)
        return not left_ms

    def _wake_at(self, at_ms: int) -> None:
        self._next_ms = at_ms if self._next_ms is None else min(at_ms, self._next_ms)

    def is_due(self, now_ms: int) -> bool:
        """Whether somebody who was told to wait may go by then."""
        return self._next_ms is not None and self._next_ms <= now_ms

    def look_again(self) -> None:
        """Whoever still has to wait says so again."""
        self._next_ms = None
