"""Which alarms of the leader's are told to every node's terminal, and when: each once, as long as it holds.

What is wrong for a moment, while nodes come or a leader is new, is told nobody. Numbers in the text do not make it another alarm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HOLDS_MS = 3_000  # what holds for less is a state that things go through
_NUMBERS = re.compile(r"\d+")


def kind_of(text: str) -> str:
    """The same for an alarm whose numbers change."""
    return _NUMBERS.sub("#", text)


class Alarms:
    """Of one leader."""

    def __init__(self) -> None:
        self._since_ms: dict[str, int] = {}

    def look(self, texts: Iterable[str], now_ms: int) -> dict[str, str]:
        """Of all that is wrong now, what has been for long enough, by kind."""
        found = {kind_of(text): text for text in texts}
        self._since_ms = {kind: self._since_ms.get(kind, now_ms) for kind in found}
        return {kind: found[kind] for kind in sorted(found) if now_ms - self._since_ms[kind] >= HOLDS_MS}
