"""When a source with `every_s` is called: which tick is the next one, and for which time.

Ticks are numbered from 1 in each run, and the number of one is the `seq` of the put that brings what it emitted, so the log holds each
once. The first is for the moment in which the run is ready for it; the others stand a whole number of intervals behind, by the time of
day, however late one was called. In the log stands the time of the last one; all else follows.

Of ticks that were missed, because nobody led or the source was slow, either each is made up for, or, the default, only the last: most
that ticks looks at how things are now, and a night's worth of looks in a row helps nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from p2pcluster.core.codec import Message
from p2pcluster.core.records import PipelineState, shards_of

if TYPE_CHECKING:
    from p2pcluster.core.rows import RowedState


def interval_ms_of(stage: dict[str, Any]) -> int:
    return max(1, round(1000 * stage["every_s"]))


def next_ms(stage: dict[str, Any], last_ms: int | None, wall_ms: int) -> int:
    """The time that the next tick is for; it is due when that has come. `last_ms` is that of the last one."""
    if last_ms is None:
        return wall_ms
    interval_ms = interval_ms_of(stage)
    missed = max(0, (wall_ms - last_ms) // interval_ms - 1) if stage["missed"] == "skip" else 0
    return last_ms + (1 + missed) * interval_ms


class Ticker:
    """The leader's word to the processes of such sources: it tells each tick once, to whoever the source is assigned to, and the next one
    when what came of it is in the log. A process that has heard of a tick already, from another leader, does not run it again."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, int, int]] = {}  # by producer the session, the assignment's epoch, and the tick's number
        self._next_ms: int | None = None

    def forget(self, key: str) -> None:
        """Whoever the source was assigned to has gone: the message may have gone with it."""
        self._told.pop(key, None)

    def is_due(self, wall_ms: int) -> bool:
        """Whether the next tick may be due by then."""
        return self._next_ms is not None and self._next_ms <= wall_ms

    def look(self, state: RowedState, owners: Mapping[str, str], wall_ms: int) -> Iterator[tuple[str, Message]]:
        """What is to be told to which session now. `owners`: by producer the session that it is assigned to."""
        self._next_ms = None
        for pipeline, stage, shard in _running(state):
            key = pipeline.source_key(stage["name"], shard)
            producer = state.producers.get(key)
            if producer is None or producer.finished or key not in owners:
                continue
            told = (owners[key], producer.epoch, producer.seq + 1)
            if self._told.get(key) == told:
                continue
            at_ms = next_ms(stage, pipeline.ticks.get(f"{stage['name']}/{shard}"), wall_ms)
            if at_ms > wall_ms:
                self._next_ms = at_ms if self._next_ms is None else min(at_ms, self._next_ms)
                continue
            self._told[key] = told
            yield owners[key], Message("tick", {"pipeline": pipeline.name, "stage": stage["name"], "shard": shard, "epoch": producer.epoch,
                                                "seq": producer.seq + 1, "at_ms": at_ms})


def _running(state: RowedState) -> Iterator[tuple[PipelineState, dict[str, Any], int]]:
    for name, stages in state.ticking.items():
        pipeline = state.pipelines.get(name)
        if pipeline is not None and pipeline.state == "running":
            for stage in stages:
                if not pipeline.is_paused(stage["name"]):
                    yield from ((pipeline, stage, shard) for shard in range(shards_of(stage)))
