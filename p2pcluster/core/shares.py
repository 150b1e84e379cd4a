"""When a stage stops by itself: too many of its last items were parked.

This file alone decides what "its last items" are. The record is two numbers, how many items the stage had done when the look began and
how many were parked since; a look goes back some hundred items, and what is older goes out of it in the proportion that it has. So a stage
that breaks behind a million good items stops as soon as one that breaks early. It is part of the state, so every node comes to the same
decision; its numbers are whole ones, thousandths of an item, or what is rounded off would add up to a share that is not there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ITEMS_MIN = 20  # finished or parked: one failure of three says nothing yet
ITEMS_MAX = 100  # that a look goes back: enough to tell a fifth from a half, and soon full of what happens now


class Share(NamedTuple):
    """`done_at_milli`: how many items of the stage's queue were done, all in all, when the look began; `parked_milli`: parked ones since."""

    done_at_milli: int
    parked_milli: int = 0

    def with_parked(self, done: int) -> Share:
        """One more item is parked, and by now `done` are done."""
        parked = self.parked_milli + 1000
        total = max(0, 1000 * done - self.done_at_milli) + parked
        too_old = max(0, total - 1000 * ITEMS_MAX)
        parked -= too_old * parked // total
        return Share(1000 * done - (min(total, 1000 * ITEMS_MAX) - parked), parked)

    def why_stop(self, stage: dict[str, Any], done: int) -> str | None:
        """Why the stage should stop, in one line, or None."""
        share_max, total = stage.get("parked_share_max"), 1000 * done - self.done_at_milli + self.parked_milli
        if share_max is None or total < 1000 * ITEMS_MIN or self.parked_milli <= share_max * total:
            return None
        return (f"{round(self.parked_milli / 1000)} of its last {total // 1000} items were parked, "
                f"more than its parked_share_max={share_max:g} (parked list says why)")
