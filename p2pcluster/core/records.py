"""What a state is made of: queues with their items by state, producers, pipelines, parts of bundles. Plain records.

What a command does to them is decided in `queues`; how they lie in tables, in `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from p2pcluster.core.chunks import ChunkIndex
from p2pcluster.core.ranges import LeaseMap, Range, RangeSet


@dataclass(frozen=True, slots=True)
class Parked:
    """Why an item is out of the way: `error` as the stage process or the node reported it."""

    run: int
    deliveries: int
    at_ms: int
    error: dict[str, Any]


class QueueState:
    """One queue. Persistent: `next_id, put, done, closed`, the items by state, `keys`; the rest is derived or a node's own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.next_id = 1
        self.put = 0
        self.done = 0
        self.closed = False
        self.chunks = ChunkIndex()
        self.ready = RangeSet()
        self.leases = LeaseMap()
        self.delayed: dict[int, int] = {}
        self.deliveries: dict[int, int] = {}
        self.parked: dict[int, Parked] = {}
        self.keys: set[bytes] = set()
        self.open_bytes = 0
        # what the pipelines' manifests say of it
        self.maxsize: int | None = None
        self.bytes_max: int | None = None
        self.read_by: str | None = None
        self.results = False
        self.pipeline = name.partition("/")[0]

    @property
    def open_count(self) -> int:
        return len(self.ready) + len(self.leases) + len(self.delayed)

    def open_ranges(self, lo: int, hi: int) -> list[Range]:
        """The open ids of `[lo, hi)`."""
        leased = self.leases.overlap(lo, hi)
        if len(leased) == 1 and leased[0][0] == lo and leased[0][1] == hi:
            return [(lo, hi)]
        found = RangeSet(self.ready.overlap(lo, hi))
        for a, b, _ in leased:
            found.add(a, b)
        for item_id in within(self.delayed, lo, hi):
            found.add(item_id, item_id + 1)
        return list(found)

    def oldest_ms(self) -> int | None:
        """When the oldest item came that is not finished."""
        for chunk in self.chunks:
            return chunk.at_ms
        return None


@dataclass(slots=True)
class Producer:
    """Who puts: a client, or one shard of a source in one run."""

    epoch: int = 0
    seq: int = 0
    count: int = 0
    hash: str = ""
    cursor: bytes | None = None
    finished: bool = False
    at_ms: int = 0
    node: str = ""
    boot: str = ""


@dataclass(slots=True)
class PipelineState:
    """A deployed pipeline: its version and how far its run is. `state`: new, running, done."""

    name: str
    version: str
    origin: dict[str, Any]
    manifest: dict[str, Any]
    files: dict[str, str]
    zip_sha256: str
    project: dict[str, Any]
    run: int = 0
    state: str = "new"
    params: Any = None
    on_done_run: int = 0
    started_ms: int = 0
    done_ms: int = 0
    previous: list[str] = field(default_factory=list)
    totals: dict[str, list[int]] = field(default_factory=dict)
    paused: dict[str, str] = field(default_factory=dict)  # by stage the reason, "" where a person said so; the stage "" is all of them
    scaled: dict[str, int] = field(default_factory=dict)  # by stage the processes that a person wants instead of the manifest's

    def is_paused(self, stage: str) -> bool:
        """Whether the stage gets no items, or, a source, is not called."""
        return "" in self.paused or stage in self.paused

    def processes(self, stage: dict[str, Any]) -> int | str:
        """How many processes a stage is to have, or "auto"."""
        return self.scaled.get(stage["name"]) or stage["processes"]  # type: ignore[no-any-return]

    def full(self, queue: str) -> str:
        return f"{self.name}/{queue}"

    @property
    def sources(self) -> list[dict[str, Any]]:
        return [stage for stage in self.manifest["stages"] if stage["kind"] == "source"]

    def stage(self, name: str) -> dict[str, Any] | None:
        return next((stage for stage in self.manifest["stages"] if stage["name"] == name), None)

    def source_key(self, stage: str, shard: int) -> str:
        return f"source:{self.name}/{self.run}/{stage}/{shard}"

    def detail(self) -> dict[str, Any]:
        return {"origin": self.origin, "manifest": self.manifest, "files": self.files, "zip_sha256": self.zip_sha256,
                "project": self.project, "params": self.params, "previous": self.previous, "totals": self.totals,
                "paused": self.paused, "scaled": self.scaled}


def shards_of(stage: dict[str, Any]) -> int:
    """How many producers a source has: one for each process."""
    return int(stage["processes"])


@dataclass(slots=True)
class BundlePart:
    """A part of a zipped project; its bytes are in the log, then in the table."""

    parts: int
    entry: int
    offset: int
    body_bytes: int
    body_crc: int
    persisted: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What applying a command gave: `result` is ok, already or refused; `fields` are for whoever proposed it."""

    kind: str
    result: str
    fields: dict[str, Any] = field(default_factory=dict)
    cursor: bytes | None = None


def within(held: dict[int, Any], lo: int, hi: int) -> list[int]:
    """The ids of `held` in `[lo, hi)`, by the shorter way."""
    if hi - lo < len(held):
        return [item_id for item_id in range(lo, hi) if item_id in held]
    return sorted(item_id for item_id in held if lo <= item_id < hi)
