"""What people say at run time over what the code says, in words: pauses and numbers of processes.

That they are kept, and what they do, is decided in `queues` and `node`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def is_paused(pipeline: Mapping[str, Any], stage: str) -> bool:
    """Of a planned pipeline, as a node knows it."""
    return "" in pipeline["paused"] or stage in pipeline["paused"]


def changes(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    """What is different in a pipeline, a line each, for the terminal of a node; `before` is None when the node hears of it first."""
    old, new = (before or {}).get("paused", {}), after["paused"]
    for stage in sorted(new.keys() - old.keys()):
        why, what = (f": {new[stage]}" if new[stage] else ""), (f"stage {stage}" if stage else "every stage")
        yield f"{name}: {what} is paused{why}; to go on, run resume{f' {stage}' if stage else ''}"
    for stage in sorted(old.keys() - new.keys()):
        yield f"{name}: {f'stage {stage}' if stage else 'every stage'} is not paused any more"
    old, new = (before or {}).get("scaled", {}), after["scaled"]
    for stage in sorted(stage for stage in new if new[stage] != old.get(stage)):
        yield f"{name}: stage {stage} is scaled to {processes_text(new[stage])}"
    for stage in sorted(old.keys() - new.keys()):
        yield f"{name}: stage {stage} has as many processes as the code says"


def processes_text(count: int | str) -> str:
    """What a stage was scaled to."""
    if count == "auto":
        return "a share of the free slots"
    return "1 process" if count == 1 else f"{count} processes"
