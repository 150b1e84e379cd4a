"""What a state is made of: queues with their items by state, producers, pipelines, parts of bundles. Plain records.

What a command does to them is decided in `queues`; how they lie in tables, in `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from p2pcluster.config import BUNDLE_VERSIONS_KEPT
from p2pcluster.core.chunks import ChunkIndex
from p2pcluster.core.codec import Buffer
from p2pcluster.core.delays import Delayed
from p2pcluster.core.ranges import LeaseMap, Range, RangeSet
from p2pcluster.core.shares import Share


@dataclass(frozen=True, slots=True)
class Parked:
    """Why an item is out of the way: `error` as the stage process or the node reported it."""

    run: int
    deliveries: int
    at_ms: int
    error: dict[str, Any]


@dataclass(slots=True)
class Parts:
    """What an item that still runs has emitted so far, ahead of its `done`: `count` parts, and of each (queue, first id, number of ids)."""

    count: int
    spans: list[tuple[str, int, int]]


class QueueState:
    """One queue. Persistent: `next_id, put, done, closed`, the items by state, `keys`, `parts`; the rest is derived or a node's own.

    `hidden` are the ids of what comes into this queue in parts, in no state until the item that they come from is done; `parts` are, by
    item of this queue, what it has emitted so. `keys` are in the order in which they came, each with when that was.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.next_id = 1
        self.put = 0
        self.done = 0
        self.closed = False
        self.chunks = ChunkIndex()
        self.ready = RangeSet()
        self.leases = LeaseMap()
        self.delayed = Delayed()
        self.deliveries: dict[int, int] = {}
        self.parked: dict[int, Parked] = {}
        self.keys: dict[bytes, int] = {}
        self.hidden = RangeSet()
        self.parts: dict[int, Parts] = {}
        self.open_bytes = 0
        # what the pipelines' manifests say of it
        self.maxsize: int | None = None
        self.bytes_max: int | None = None
        self.read_by: str | None = None
        self.results = False
        self.interval_ns = 0  # between two items of its reader's rate; 0 without one
        self.pipeline = name.partition("/")[0]

    @property
    def open_count(self) -> int:
        return len(self.ready) + len(self.leases) + len(self.delayed)

    @property
    def room_taken(self) -> int:
        """How many items count towards `maxsize`."""
        return self.open_count + len(self.hidden)

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


@dataclass(frozen=True, slots=True)
class Release:
    """What one deployment brought: a version, and where it came from."""

    version: str
    origin: dict[str, Any]
    manifest: dict[str, Any]
    files: dict[str, str]
    zip_sha256: str
    project: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Rollout:
    """A new version on its way: `nodes` run it, the others what they ran before. `number` names it among all that ever were."""

    number: int
    former: Release
    nodes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class PipelineState:
    """A deployed pipeline: its version and how far its run is. `state`: new, running, done. While a version is rolled out, the former one
    is in force too, on the nodes that do not have the new one yet: see `on`."""

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
    totals: dict[str, int] = field(default_factory=dict)  # by queue that a stage reads, how many were done when the run began
    paused: dict[str, str] = field(default_factory=dict)  # by stage the reason, "" where a person said so; the stage "" is all of them
    scaled: dict[str, int | str] = field(default_factory=dict)  # by stage the processes that a person wants instead of the manifest's
    paced: dict[str, int] = field(default_factory=dict)  # by stage with a rate, when its bucket is full again; see `pacing`
    ticks: dict[str, int] = field(default_factory=dict)  # by producer of a source that ticks, the last tick of this run; see `ticks`
    shares: dict[str, Share] = field(default_factory=dict)  # by stage with `parked_share_max`, how many of its last items were parked

    def is_paused(self, stage: str) -> bool:
        """Whether the stage gets no items, or, a source, is not called."""
        return "" in self.paused or stage in self.paused

    def processes(self, stage: dict[str, Any]) -> int | str:
        """How many processes a stage is to have, or "auto"."""
        return self.scaled.get(stage["name"]) or stage["processes"]  # type: ignore[no-any-return]

    rollout: Rollout | None = None
    rolled: dict[str, Any] | None = None  # how the last roll-out ended: `version`, on how many `nodes`, and the `failure` that took it back
    first_id: int = 1  # of each queue that is made: above those of a pipeline of this name that was undeployed

    def full(self, queue: str) -> str:
        return f"{self.name}/{queue}"

    @property
    def release(self) -> Release:
        return Release(self.version, self.origin, self.manifest, self.files, self.zip_sha256, self.project)

    def on(self, node: str) -> PipelineState:
        """The pipeline as it is on a node: of the version that is in force there."""
        if self.rollout is None or node in self.rollout.nodes:
            return self
        return replace(self, **self.rollout.former.fields())

    def version_on(self, node: str) -> str:
        return self.version if self.rollout is None or node in self.rollout.nodes else self.rollout.former.version

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """Those that are in force, the newest last."""
        return [self.manifest] if self.rollout is None else [self.rollout.former.manifest, self.manifest]

    @property
    def versions_kept(self) -> set[str]:
        """Whose files stay: what runs, and what a roll-back returns to."""
        former = [self.rollout.former.version] if self.rollout else []
        return {self.version, *former, *self.previous[: BUNDLE_VERSIONS_KEPT - 1]}

    @property
    def sources(self) -> list[dict[str, Any]]:
        return [stage for stage in self.manifest["stages"] if stage["kind"] == "source"]

    def stage(self, name: str) -> dict[str, Any] | None:
        """What the newest version that has such a stage says of it."""
        return next((stage for manifest in reversed(self.manifests) for stage in manifest["stages"] if stage["name"] == name), None)

    def source_key(self, stage: str, shard: int) -> str:
        return f"source:{self.name}/{self.run}/{stage}/{shard}"

    def detail(self) -> dict[str, Any]:
        return {"origin": self.origin, "manifest": self.manifest, "files": self.files, "zip_sha256": self.zip_sha256,
                "project": self.project, "params": self.params, "previous": self.previous, "totals": self.totals,
                "paused": self.paused, "scaled": self.scaled, "paced": self.paced, "ticks": self.ticks, "shares": self.shares,
                "rolled": self.rolled, "first_id": self.first_id,
                "rollout": self.rollout and {"number": self.rollout.number, "former": self.rollout.former.fields(),
                                             "nodes": self.rollout.nodes}}


def source_of(key: str) -> tuple[str, str]:
    """The pipeline and the source that a producer's key names; nothing for one that is no source's."""
    pipeline, _, rest = key.removeprefix("source:").partition("/")
    return (pipeline, rest.partition("/")[2].rpartition("/")[0]) if key.startswith("source:") else ("", "")


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


@dataclass(frozen=True, slots=True)
class Applying:
    """Where a command stands: which entry, when, and where its blobs begin in the entry's body."""

    index: int
    at_ms: int
    blobs_at: int
    blobs: tuple[Buffer, ...]

    def blob_offset(self, number: int) -> int:
        return self.blobs_at + sum(len(blob) for blob in self.blobs[:number])


def within(held: dict[int, Any], lo: int, hi: int) -> list[int]:
    """The ids of `held` in `[lo, hi)`, by the shorter way."""
    if hi - lo < len(held):
        return [item_id for item_id in range(lo, hi) if item_id in held]
    return sorted(item_id for item_id in held if lo <= item_id < hi)
