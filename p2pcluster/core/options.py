"""What a stage may be told: its name, its options, and the place in the user's files that a message about it points to.

This file alone decides which option is for which kind of stage, which values it admits and what it is when nobody gives
it. It refuses to know what a stage is and what an option does.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

from p2pcluster import config
from p2pcluster.core import rules
from p2pcluster.errors import GraphError

NAME_CHARS_MAX = 100  # a name is half of a queue's full name and appears in status lines

Kind = Literal["source", "stage", "sink"]
Processes = int | Literal["auto"]
Missed = Literal["skip", "all"]


class Site(NamedTuple):
    """A place in the user's files: `at` is `file.py:12`."""

    module: str
    at: str


_OWN_MODULES = {f"{__package__}.{name}" for name in ("options", "stages", "graph")}


def place(file: str, line: int, module: str) -> str:
    """`package/module.py:12`: the part of the path that is the same on every machine that the project is shipped to."""
    parts = file.replace("\\", "/").split("/")
    depth = module.count(".") + (2 if parts[-1] == "__init__.py" else 1)
    return f"{'/'.join(parts[-depth:])}:{line}"


def call_site() -> Site:
    """Where the user's code is that called into these modules."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") in _OWN_MODULES:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "__main__")
    return Site(module, place(frame.f_code.co_filename, frame.f_lineno, module))


def check_name(what: str, name: object, where: str) -> None:
    """Raise `GraphError` unless `name` can name a pipeline, a stage or a queue."""
    if not isinstance(name, str):
        raise GraphError(f"{what} at {where}: its name is {name!r}; give it a str")
    if not name or not name.isprintable() or "/" in name or len(name) > NAME_CHARS_MAX:
        raise GraphError(
            f"{what} {name!r} ({where}): not a usable name; take 1 to {NAME_CHARS_MAX} printable characters without '/'"
        )


@dataclass(frozen=True, slots=True)
class Options:
    """How a stage is run; the table below says which values and which kinds of stage each option is for."""

    processes: Processes
    per_node: int | None = None
    retries: int = config.RETRIES
    backoff_s: float = config.BACKOFF_S
    timeout_s: float | None = None
    where: str | None = None
    batch: int | None = None
    batch_wait_s: float = 0.0
    concurrency: int = 1
    rate: str | None = None
    every_s: float | None = None
    missed: Missed = "skip"
    max_items: int | None = None
    parked_share_max: float | None = None


class OptionWords(TypedDict, total=False):
    """The same for a type checker, less `batch`, which changes what the function takes."""

    name: str | None
    processes: Processes
    per_node: int | None
    retries: int
    backoff_s: float
    timeout_s: float | None
    where: str | None
    batch_wait_s: float
    concurrency: int
    rate: str | None
    every_s: float | None
    missed: Missed
    max_items: int | None
    parked_share_max: float | None


_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|m|h)")
_SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600}


def rate_per_s(rate: str) -> float:
    """How many items a second `"100/s"`, `"30/m"` or `"0.5/h"` allow. Raises `ValueError` for other text, and what is none in practice."""
    match = _RATE.fullmatch(rate)
    per_s = 0.0 if match is None else float(match[1]) / _SECONDS_OF_UNIT[match[2]]
    if not 1e-9 <= per_s <= 1e9:
        raise ValueError(f"{rate!r} is not a rate")
    return per_s


def is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_seconds(value: object, *, zero: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (value > 0 or (zero and value == 0))


def _is_share(value: object) -> bool:
    return _is_seconds(value, zero=True) and value < 1  # type: ignore[operator]


def is_rate(value: object) -> bool:
    try:
        return isinstance(value, str) and rate_per_s(value) > 0
    except ValueError:
        return False


class _Rule(NamedTuple):
    kinds: tuple[Kind, ...]
    none: bool
    admits: Callable[[Any], bool]
    says: str


_ALL: tuple[Kind, ...] = ("source", "stage", "sink")
_TAKERS: tuple[Kind, ...] = ("stage", "sink")

_RULES: dict[str, _Rule] = {
    "processes": _Rule(_ALL, False, lambda v: v == "auto" or is_whole(v, 1), 'a whole number from 1, or "auto"'),
    "per_node": _Rule(_ALL, True, lambda v: is_whole(v, 1), "a whole number from 1"),
    "retries": _Rule(_ALL, False, lambda v: is_whole(v, 0), "a whole number from 0"),
    "backoff_s": _Rule(_ALL, False, lambda v: _is_seconds(v, zero=True), "seconds, 0 or more"),
    "timeout_s": _Rule(_ALL, True, _is_seconds, "seconds, more than 0"),
    "where": _Rule(_ALL, True, lambda v: isinstance(v, str) and bool(v.strip()), "an expression in a str"),
    "batch": _Rule(_TAKERS, True, lambda v: is_whole(v, 1), "a whole number from 1"),
    "batch_wait_s": _Rule(_TAKERS, False, lambda v: _is_seconds(v, zero=True), "seconds, 0 or more"),
    "concurrency": _Rule(_TAKERS, False, lambda v: is_whole(v, 1), "a whole number from 1"),
    "rate": _Rule(_ALL, True, is_rate, 'a number and a unit, "100/s", "30/m" or "5/h"'),
    "every_s": _Rule(("source",), True, _is_seconds, "seconds, more than 0"),
    "missed": _Rule(("source",), False, lambda v: v in ("skip", "all"), '"skip" or "all"'),
    "parked_share_max": _Rule(_TAKERS, True, _is_share, "a share of one, 0 or more and less than 1"),
    "max_items": _Rule(_ALL, True, lambda v: is_whole(v, 1), "a whole number from 1"),
}


def _check_where(who: str, where: str | None) -> None:
    try:
        if where is not None:
            rules.parse(where)
    except GraphError as error:
        raise GraphError(f"{who}: {error}") from None


def checked_options(who: str, kind: Kind, given: Mapping[str, Any]) -> Options:
    """The options with their defaults. Raises `GraphError`, which `who` begins, for what the table does not admit."""
    for name, value in given.items():
        rule = _RULES.get(name)
        if rule is None:
            raise GraphError(f"{who}: option {name!r} is unknown; the options are name, {', '.join(_RULES)}")
        if kind not in rule.kinds:
            raise GraphError(f"{who}: {name} is for a {' or a '.join(rule.kinds)}; leave it out of a {kind}")
        if not (rule.none if value is None else rule.admits(value)):
            raise GraphError(f"{who}: {name}={value!r} is not {rule.says}; correct it or leave it out")
    _check_where(who, given.get("where"))
    options = {"processes": "auto" if kind == "stage" else 1, **given}
    if options.get("batch") is None and "batch_wait_s" in given:
        raise GraphError(f"{who}: batch_wait_s has no meaning without batch; give batch= too or leave it out")
    if options.get("every_s") is None and "missed" in given:
        raise GraphError(f"{who}: missed has no meaning without every_s; give every_s= too or leave it out")
    if options.get("batch") is not None:
        options.setdefault("batch_wait_s", config.BATCH_WAIT_S)
    # 30 and 30.0 seconds are the same option, so they make the same manifest.
    seconds = {name: float(value) for name, value in options.items() if name.endswith("_s") and value is not None}
    return Options(**{**options, **seconds})
