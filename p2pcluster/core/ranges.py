"""Sets of item ids as sorted half-open ranges: a million consecutive ids cost what one costs.

`RangeSet` holds ids, `LeaseMap` holds ids with the fence under which each is leased. Neither knows what an item is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Range = tuple[int, int]


class Fence(NamedTuple):
    """Who may release, park or count: the session (node and its boot) and the number of its take."""

    node: str
    boot: str
    seq: int


class RangeSet:
    """Disjoint, sorted, merged ranges `[lo, hi)`. `len()` is the number of ids."""

    __slots__ = ("_his", "_los", "_size")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._los: list[int] = []
        self._his: list[int] = []
        self._size = 0
        for lo, hi in ranges:
            self.add(lo, hi)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._los, self._his, strict=True)))

    def __contains__(self, item_id: int) -> bool:
        at = bisect_right(self._los, item_id) - 1
        return at >= 0 and item_id < self._his[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._los == other._los and self._his == other._his

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"

    def add(self, lo: int, hi: int) -> None:
        """Add `[lo, hi)`; what is in already stays in."""
        assert lo < hi, f"an empty range {lo, hi}"
        los, his = self._los, self._his
        first = bisect_left(his, lo)
        last = bisect_right(los, hi)
        if first < last:
            self._size -= sum(his[first:last]) - sum(los[first:last])
            lo = min(lo, los[first])
            hi = max(hi, his[last - 1])
        los[first:last] = [lo]
        his[first:last] = [hi]
        self._size += hi - lo

    def remove(self, lo: int, hi: int) -> list[Range]:
        """Take out what is in of `[lo, hi)`; returns what that was."""
        los, his = self._los, self._his
        first = bisect_right(his, lo)
        last = bisect_left(los, hi)
        if first >= last:
            return []
        removed = [(max(los[at], lo), min(his[at], hi)) for at in range(first, last)]
        left, right = los[first], his[last - 1]
        keep = []
        if left < lo:
            keep.append((left, lo))
        if hi < right:
            keep.append((hi, right))
        los[first:last] = [pair[0] for pair in keep]
        his[first:last] = [pair[1] for pair in keep]
        self._size -= sum(b - a for a, b in removed)
        return removed

    def overlap(self, lo: int, hi: int) -> list[Range]:
        """What is in of `[lo, hi)`."""
        first = bisect_right(self._his, lo)
        last = bisect_left(self._los, hi)
        return [(max(self._los[at], lo), min(self._his[at], hi)) for at in range(first, last)]

    def first(self, count: int, outside: RangeSet | None = None) -> list[Range]:
        """The lowest ids, `count` at most, that are not in `outside`."""
        chosen: list[Range] = []
        if count <= 0:
            return chosen
        for lo, hi in zip(self._los, self._his, strict=True):
            for a, b in _without(lo, hi, outside):
                b = min(b, a + count)
                chosen.append((a, b))
                count -= b - a
                if count <= 0:
                    return chosen
        return chosen

    def clear(self) -> None:
        """Take out everything."""
        self._los.clear()
        self._his.clear()
        self._size = 0


def _without(lo: int, hi: int, outside: RangeSet | None) -> Iterator[Range]:
    for a, b in outside.overlap(lo, hi) if outside else ():
        if lo < a:
            yield lo, a
        lo = b
    if lo < hi:
        yield lo, hi


class LeaseMap:
    """Disjoint, sorted leases `[lo, hi)` with the fence of each; neighbours of one fence are not merged.

    `held_by` counts the ids by session (node, boot).
    """

    __slots__ = ("_fences", "_his", "_los", "_size", "held_by")

    def __init__(self) -> None:
        self._los: list[int] = []
        self._his: list[int] = []
        self._fences: list[Fence] = []
        self._size = 0
        self.held_by: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[int, int, Fence]]:
        return iter(list(zip(self._los, self._his, self._fences, strict=True)))

    def add(self, lo: int, hi: int, fence: Fence) -> None:
        """Lease `[lo, hi)`, none of which is leased."""
        assert lo < hi, f"an empty lease {lo, hi}"
        at = bisect_left(self._los, lo)
        assert at == 0 or self._his[at - 1] <= lo, "the range is leased already"
        assert at == len(self._los) or hi <= self._los[at], "the range is leased already"
        self._los.insert(at, lo)
        self._his.insert(at, hi)
        self._fences.insert(at, fence)
        self._size += hi - lo
        self.held_by[fence[:2]] += hi - lo

    def overlap(self, lo: int, hi: int) -> list[tuple[int, int, Fence]]:
        """The leased parts of `[lo, hi)`."""
        first = bisect_right(self._his, lo)
        last = bisect_left(self._los, hi)
        return [
            (max(self._los[at], lo), min(self._his[at], hi), self._fences[at]) for at in range(first, last)
        ]

    def remove(self, lo: int, hi: int) -> list[tuple[int, int, Fence]]:
        """End the leases of `[lo, hi)`; returns the parts that were leased."""
        removed = self.overlap(lo, hi)
        if not removed:
            return removed
        first = bisect_right(self._his, lo)
        last = bisect_left(self._los, hi)
        keep = []
        if self._los[first] < lo:
            keep.append((self._los[first], lo, self._fences[first]))
        if hi < self._his[last - 1]:
            keep.append((hi, self._his[last - 1], self._fences[last - 1]))
        self._los[first:last] = [entry[0] for entry in keep]
        self._his[first:last] = [entry[1] for entry in keep]
        self._fences[first:last] = [entry[2] for entry in keep]
        for a, b, fence in removed:
            self._size -= b - a
            self.held_by[fence[:2]] -= b - a
            if not self.held_by[fence[:2]]:
                del self.held_by[fence[:2]]
        return removed

    def of_session(self, node: str, boot: str) -> list[tuple[int, int, Fence]]:
        """Every lease of one session."""
        return [entry for entry in self if entry[2].node == node and entry[2].boot == boot]
