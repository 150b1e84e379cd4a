"""What a node says to its person when nobody has led for a while: who is missing, and what to do about it.

It decides when that is worth a line, and which. A cluster without a majority waits, for as long as it takes, and is right to; a person who
sees nothing does not know what it waits for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from p2pcluster.core.quorum import Configuration, has_majority, majority

TOLD_AFTER_MS = 5_000  # an election takes less, a machine that is started again about as long


class Absence:
    """One node's watch; `look` as often as the clock is looked at."""

    def __init__(self) -> None:
        self._since_ms: int | None = None
        self._told = ""

    def look(self, is_led: bool, configuration: Configuration, here: Collection[str], members: Mapping[str, Mapping[str, Any]],
             now_ms: int) -> str | None:
        """A line, each time that there is something new to say. `here`: this node and those that it is connected to."""
        if is_led or not configuration.voters:
            self._since_ms, self._told = None, ""
            return None
        self._since_ms = now_ms if self._since_ms is None else self._since_ms
        if now_ms - self._since_ms < TOLD_AFTER_MS:
            return None
        line = _line(configuration, here, members)
        if line == self._told:
            return None
        self._told = line
        return line


def _line(configuration: Configuration, here: Collection[str], members: Mapping[str, Mapping[str, Any]]) -> str:
    if has_majority(configuration, here):
        return "nobody leads, though enough nodes are here; if that lasts, see what they say: python -m p2pcluster doctor"
    half = next(half for half in configuration.halves() if sum(1 for voter in half if voter in here) < majority(len(half)))
    away = ", ".join(sorted(str(members.get(voter, {}).get("name", voter)) for voter in half if voter not in here))
    present = sum(1 for voter in half if voter in here)
    needed = f"{majority(len(half))} of the {len(half)} nodes that vote must be here and {present} {'are' if present != 1 else 'is'}"
    why = needed if len(half) > 1 else "the one node that votes is not here"
    return f"nobody leads, so everything waits: {why}; start {away} again, or, only if lost for good: python -m p2pcluster recover"
