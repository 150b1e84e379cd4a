"""`status` for people: what of it is shown, within 80 columns, and which words have a colour where colours are wanted."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, TextIO

from p2pcluster.core.controls import processes_text

WIDTH = 80
_STYLES = {"good": "32", "bad": "31", "held": "33", "faint": "2"}
_OF_STATE = {"running": "good", "paused": "held", "done": "faint"}


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """On a terminal that has them, unless the user asked for none (NO_COLOR, as no-color.org has it)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def status_lines(status: dict[str, Any], colour: bool = False) -> list[str]:
    """The lines. Colours take no room: without them the lines are the same."""
    painter = _Painter(colour)
    cluster, leader = status["cluster"], status["leader"]
    lines = _cut(f"cluster {cluster['name']} ({cluster['id']}), term {cluster['term']}, led by {leader['name']} at {leader['address']}")
    for node in status["nodes"]:
        begin = f"node {node['name']}: {node['role']}, {node['slots']} slots, "
        lines += [_short(begin) + painter.paint("alive", "good") if node["alive"] else _short(begin) + painter.paint("away", "bad")]
    for pipeline in status["pipelines"]:
        state, run = pipeline["state"], pipeline["run"]
        shown = painter.paint(state, _OF_STATE[state]) if run else "has not run"
        end = f", version {pipeline['version'][:8]}" + ("" if pipeline["rollout"] is None else f" on {pipeline['rollout']} of the nodes so far")
        begin = _short(f"{pipeline['name']}: " + (f"run {run} " if run else ""), WIDTH - len(end) - len("has not run"))
        lines += ["", f"{begin}{shown}{end}"]
        lines += _stage_lines([s for s in status["stages"] if s["pipeline"] == pipeline["name"]], painter)
        lines += _queue_lines([q for q in status["queues"] if q["pipeline"] == pipeline["name"]], painter)
    refused = [f"{count} {name.removeprefix('refused_')}" for name, count in status["network"].items() if count]
    if refused:
        lines += ["", *_wrapped(f"refused at {leader['name']} since its start: {', '.join(refused)}")]
    for alarm in status["alarms"]:
        first, *more = _wrapped(f"alarm: {alarm}")
        lines += [painter.paint("alarm:", "bad") + first.removeprefix("alarm:"), *more]
    return lines


def _stage_lines(stages: list[dict[str, Any]], painter: _Painter) -> list[str]:
    lines = [painter.paint(f"  {'stage':<18}{'procs':>6}{'done':>12}{'parked':>7}{'per s':>9}{'ms':>9}", "faint")] if stages else []
    for s in stages:
        service = "" if s["service_ms"] is None else f"{s['service_ms']:.3g}"
        parked = painter.paint(f"{s['parked']:>7}", "bad" if s["parked"] else None)
        lines.append(f"  {s['name'][:17]:<18}{s['processes']:>6}{s['done']:>12}{parked}{s['rate_per_s']:>9.0f}{service:>9}")
        if s["scaled"] is not None:
            lines.append(painter.paint(f"    scaled to {processes_text(s['scaled'])}", "held"))
        if s["idle_because"]:
            lines += _wrapped(f"    idle: {s['idle_because']}")
    return lines


def _queue_lines(queues: list[dict[str, Any]], painter: _Painter) -> list[str]:
    lines = [painter.paint(f"  {'queue':<18}{'ready':>10}{'leased':>8}{'delayed':>8}{'parked':>7}{'oldest s':>10}", "faint")] if queues else []
    for q in queues:
        oldest = "" if q["oldest_s"] is None else f"{q['oldest_s']:.0f}"
        parked = painter.paint(f"{q['parked']:>7}", "bad" if q["parked"] else None)
        lines.append(f"  {q['name'][:17]:<18}{q['ready']:>10}{q['leased']:>8}{q['delayed']:>8}{parked}{oldest:>10}")
    return lines


class _Painter:
    """Puts words into colours, or leaves them as they are."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def paint(self, text: str, style: str | None) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._colour and style else text


def _cut(line: str) -> list[str]:
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."]


def _short(text: str, width: int = WIDTH - len("alive")) -> str:
    return text if len(text) <= width else text[: width - 4] + "... "


def _wrapped(line: str) -> list[str]:
    """A long line goes on below, further in: what it says is to be read to its end."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line.lstrip(), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False) or [""]
