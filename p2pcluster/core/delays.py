"""Items that wait for a time: of each when it is due, and which are due by now without a look at all the others.

This file alone decides how a due time is written. It is a number: milliseconds of the cluster's time, or, below zero, of the time of day
since the epoch with its sign turned. The first stands still while the whole cluster does, so a delay is never shorter than it was asked
for; the second does not, so what is put for nine o'clock is due at nine o'clock. Whether something is due is asked with both times, by
whoever leads.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

_STALE_MIN = 64  # entries of items that wait no more may always stay so many


def by_clock(at_ms: int) -> int:
    """The due time for a time of day."""
    return -at_ms


class Delayed(dict[int, int]):
    """By id when each item is due. Two lines say which comes next in each time; an entry of theirs counts as long as this agrees."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])

    def __setitem__(self, item_id: int, due: int) -> None:
        super().__setitem__(item_id, due)
        self._stand(due, item_id, item_id + 1)

    def put_off(self, lo: int, hi: int, due: int) -> None:
        """The ids `[lo, hi)` wait for one time."""
        self.update(dict.fromkeys(range(lo, hi), due))
        self._stand(due, lo, hi)

    def _stand(self, due: int, lo: int, hi: int) -> None:
        line = self._lines[due < 0]
        if len(line) > 2 * len(self) + _STALE_MIN:
            line[:] = [(abs(other), item_id, item_id + 1) for item_id, other in self.items() if (other < 0) == (due < 0)]
            heapify(line)
        heappush(line, (abs(due), lo, hi))

    def due(self, cluster_ms: int, wall_ms: int, count: int) -> list[int]:
        """The ids of items that are due, about `count` at most. They stay here until they are taken out."""
        found: set[int] = set()
        for line, now_ms, sign in zip(self._lines, (cluster_ms, wall_ms), (1, -1), strict=True):
            kept = []
            while line and line[0][0] <= now_ms and len(found) < count:
                at_ms, lo, hi = entry = heappop(line)
                ids = [item_id for item_id in range(lo, hi) if self.get(item_id) == sign * at_ms]
                if ids:
                    kept.append(entry)
                    found.update(ids[:count])
            for entry in kept:
                heappush(line, entry)
        return sorted(found)

    def wait_ms(self, cluster_ms: int, wall_ms: int) -> int:
        """How long until the next one is due."""
        waits = []
        for line, now_ms, sign in zip(self._lines, (cluster_ms, wall_ms), (1, -1), strict=True):
            while line and not any(self.get(item_id) == sign * line[0][0] for item_id in range(*line[0][1:])):
                heappop(line)
            waits += [line[0][0] - now_ms] if line else []
        return max(0, min(waits, default=0))

    def is_due_by(self, cluster_ms: int, wall_ms: int) -> bool:
        """Whether one may be due by then."""
        return any(line and line[0][0] <= now_ms for line, now_ms in zip(self._lines, (cluster_ms, wall_ms), strict=True))
