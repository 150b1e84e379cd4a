"""Lines that stages print and log: how each says when it was printed, for which item, and at which level.

A stage process writes such a tag before each line, between two control characters that are in no text of the user's. Everything that is
done with lines in a node is done to many of them at once, by a few passes over bytes: one object per line would make a stage that prints
much the node's main work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

SHOWN, UNSHOWN, TEXT = "\x1e", "\x1d", "\x1f"  # a tag begins, of a line that terminals show or do not; the line's text begins
LEVELS = ("out", "err", "debug", "info", "warning", "error", "critical", "note")  # the last is the node's own
_MARKS = re.compile(b"[\x1d\x1e\x1f]")
_MARKS_IN_TEXT = re.compile("[\x1d\x1e\x1f]")
_TAG = re.compile(b"\x1e[^\x1f\n]*\x1f")
_UNSHOWN_LINE = re.compile(b"\x1d[^\n]*\n")
_BEGINS = re.compile(b"[\x1d\x1e][^\x1f\n]*\x1f")
_SEPARATOR = " | "


class LogLine(NamedTuple):
    """One line as it is stored. `at` is UTC in ISO form, so that lines sort by it; `item` is an id, or "-" outside of an item."""

    at: str
    item: str
    level: str
    text: str


def utc(at_ms: int) -> str:
    """A time since the epoch in ISO form, to the millisecond."""
    return f"{_second(at_ms // 1000)}.{at_ms % 1000:03d}Z"


@lru_cache(maxsize=4)
def _second(second: int) -> str:
    days, left = divmod(second, 86_400)
    era, day_of_era = divmod(days + 719_468, 146_097)  # eras of 400 years, which begin on the first of March
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month = (5 * day_of_year + 2) // 153
    day, month = day_of_year - (153 * month + 2) // 5 + 1, month + 3 if month < 10 else month - 9
    year = year_of_era + 400 * era + (month <= 2)
    return f"{year:04d}-{month:02d}-{day:02d}T{left // 3600:02d}:{left % 3600 // 60:02d}:{left % 60:02d}"


def tag(at: str, item: int | None, level: str, is_shown: bool = True) -> str:
    """What stands before a line's text in the pipe."""
    return f"{SHOWN if is_shown else UNSHOWN}{at} {item or '-'} {level}{TEXT}"


def clean(text: str) -> str:
    """The user's text without the control characters that mean something here."""
    if SHOWN in text or UNSHOWN in text or TEXT in text:  # three looks for a sign cost less than one for a pattern
        return _MARKS_IN_TEXT.sub("?", text)
    return text


def tagged(lines: bytes, otherwise: str) -> bytes:
    """Whole lines, each with a tag: what other programs wrote into the pipe has none, and gets `otherwise`."""
    if lines[:1] in (b"\x1d", b"\x1e") and lines.count(b"\n\x1d") + lines.count(b"\n\x1e") == lines.count(b"\n") - 1:
        return lines
    default = otherwise.encode()
    return b"".join((line if _BEGINS.match(line) else default + _MARKS.sub(b"?", line)) + b"\n" for line in lines.split(b"\n")[:-1])


def for_terminal(lines: bytes, prefix: bytes) -> bytes:
    """Tagged lines as a node's terminal shows them."""
    if UNSHOWN.encode() in lines:
        lines = _UNSHOWN_LINE.sub(b"", lines)
    return _TAG.sub(prefix.replace(b"\\", b"\\\\"), lines)


def for_log(lines: bytes) -> bytes:
    """Tagged lines as they are stored: TIME ITEM LEVEL | text."""
    return lines.translate(None, b"\x1d\x1e").replace(TEXT.encode(), _SEPARATOR.encode())


def note(at: str, text: str) -> bytes:
    """A stored line of the node's own."""
    return f"{at} - note{_SEPARATOR}{text}\n".encode()


def read(lines: bytes) -> Iterable[LogLine]:
    """The stored lines, taken apart; what is not one (the first of a file that was cut) is left out."""
    for line in lines.decode(errors="replace").split("\n"):
        head, separator, text = line.partition(_SEPARATOR)
        parts = head.split(" ")
        if separator and len(parts) == 3 and parts[2] in LEVELS:
            yield LogLine(parts[0], parts[1], parts[2], text)
