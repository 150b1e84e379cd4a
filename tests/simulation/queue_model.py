"""The queue machine in the plainest words, one object for each item, and what must hold for `core.queues.State`.

`Model` alone says here what a command means. `compare` and `Books` look at a state from outside; they know neither
chunks' layout nor where bytes lie, so a state that was checkpointed, coalesced or read back from a journal has to pass
as well as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2pcluster.core import shares
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.codec import Buffer, Message, encode_bytes
from p2pcluster.core.queues import State
from p2pcluster.core.ranges import Fence, RangeSet
from p2pcluster.core.records import Outcome, QueueState
from p2pcluster.core.tables import BODY_COLUMNS, TABLES

OPEN = ("ready", "leased", "delayed")
Bodies = Callable[[str, Chunk], tuple[Buffer, Buffer]]


# --- The projects that the commands are about ------------------------------------------------------------------------


def _stage(
    name: str, kind: str, reads: str | None, ports: Sequence[Sequence[str]], retries: int = 0, processes: int = 1, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "reads": reads,
        "retries": retries,
        "processes": processes,
        "shape": "function",
        "per_node": None,
        "ports": [
            {"label": None if at == 0 else f"port{at}", "queues": list(queues)} for at, queues in enumerate(ports)
        ],
        "backoff_s": 1.0,
        "timeout_s": None,
        "where": None,
        "batch": None,
        "batch_wait_s": 0.05,
        "concurrency": 1,
        "resumable": False,
        "sharded": processes > 1,
        "rate": None,
        "every_s": None,
        "missed": "skip",
        "max_items": None,
        "parked_share_max": None,
        "defined_at": "pipeline.py:1",
        **more,
    }


def _queue(name: str, read_by: str | None = None, outside: bool = False, results: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "maxsize": None if results else 100,
        "bytes_max": None if results else 1000,
        "codec": "pickle",
        "read_by": read_by,
        "fed_by": [],
        "outside": outside,
        "results": results,
    }


def _manifest(pipeline: str, stages: list[dict[str, Any]], queues: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": 1,
        "pipeline": pipeline,
        "stages": stages,
        "queues": queues,
        "back_edges": [],
        "on_done": True,
        "order": [stage["name"] for stage in stages],
        "params": None,
        "placement": False,
    }


# A source with two shards that feeds two queues with each value, a stage with two ports, a merge, a sink, a queue
# without a reader, and a stage fed from outside whose results are kept.
MANIFESTS = {
    "v1": _manifest(
        "p",
        [
            _stage("gen", "source", None, [["a", "b"]], processes=2, rate="100/s"),
            _stage("left", "stage", "a", [["c"], ["d"]], retries=1, rate="7/m"),
            _stage("right", "stage", "b", [["c"]], parked_share_max=0.2),
            _stage("out", "sink", "c", [], retries=2),
            _stage("last", "stage", "in", [["last.results"]], parked_share_max=0.2),
        ],
        [
            _queue("a", "left"),
            _queue("b", "right"),
            _queue("c", "out"),
            _queue("d"),
            _queue("in", "last", outside=True),
            _queue("last.results", results=True),
        ],
    ),
    # `d` and `last.results` are gone, one shard fewer, other retries.
    "v2": _manifest(
        "p",
        [
            _stage("gen", "source", None, [["a", "b"]]),
            _stage("left", "stage", "a", [["c"]], retries=2, rate="50/s"),
            _stage("right", "stage", "b", [["c"]], retries=1),
            _stage("out", "sink", "c", [], parked_share_max=0.5),
            _stage("last", "stage", "in", [["kept.results"]], parked_share_max=0.1),
        ],
        [
            _queue("a", "left"),
            _queue("b", "right"),
            _queue("c", "out"),
            _queue("in", "last", outside=True),
            _queue("kept.results", results=True),
        ],
    ),
    # As v1, and `right` reads what was for `left` too: each reader of a queue and each queue of a reader may be another one.
    "v3": _manifest(
        "p",
        [
            _stage("gen", "source", None, [["a", "b"]], processes=2),
            _stage("right", "stage", "a", [["c"], ["d"]], retries=1),
            _stage("out", "sink", "c", [], retries=1),
            _stage("watch", "sink", "d", []),
        ],
        [_queue("a", "right"), _queue("b"), _queue("c", "out"), _queue("d", "watch"), _queue("in", outside=True)],
    ),
    # Nothing but a queue that is fed from outside.
    "w1": _manifest("w", [_stage("eat", "sink", "x", [], retries=1, parked_share_max=0.4)], [_queue("x", "eat", outside=True)]),
}
INTERVALS_NS = {None: 0, "8/s": 125_000_000, "100/s": 10_000_000, "7/m": 8_571_428_571, "50/s": 20_000_000}  # from one item of a rate to the next
BUNDLE = b"PK\x05\x06"


def deployment(version: str) -> list[Message]:
    """The commands that bring a version: its parts, then what names them."""
    parts = [
        Message(
            "bundle_part", {"version": version, "part": part, "parts": 2}, (BUNDLE + version.encode() + bytes([part]),)
        )
        for part in range(2)
    ]
    manifest = MANIFESTS[version]
    return [
        *parts,
        Message(
            "deploy",
            {
                "pipeline": manifest["pipeline"],
                "version": version,
                "origin": {"name": "host", "folder": "/f"},
                "manifest": manifest,
                "files": {"pipeline.py": version},
                "zip_sha256": version * 4,
                "project": {"module": "pipeline"},
            },
        ),
    ]


def beginning() -> list[Message]:
    """What most logs begin with: both projects are there and run."""
    starts = [Message("start_run", {"pipeline": name, "params": None}) for name in ("p", "w")]
    return [*deployment("v1"), *deployment("w1"), *starts]


def entry_body(messages: Iterable[Message]) -> bytes:
    """The body of the log's entry that holds these commands."""
    return b"".join(map(encode_bytes, messages))


# --- The model -------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """One item from its put to its end, and ever after."""

    id: int
    body: bytes
    key: str | None
    run: int
    at_ms: int
    parents: tuple[Item, ...]
    state: str = "ready"
    fence: Fence | None = None
    deliveries: int = 0
    due_ms: int = 0
    parked: tuple[int, int, int, dict[str, Any]] | None = None
    parts: int = 0
    emitted: list[tuple[ModelQueue, Item]] = field(default_factory=list, repr=False)  # in parts, while it runs


@dataclass
class ModelQueue:
    name: str
    items: dict[int, Item] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    unseen: int = 0  # what came in parts and is not seen yet, or never will be
    closed: bool = False
    record: dict[str, Any] | None = None  # of the manifest; None when no version names it now
    done: int = 0
    first_id: int = 1

    @property
    def pipeline(self) -> str:
        return self.name.partition("/")[0]

    def of(self, *states: str) -> list[Item]:
        return [item for item in self.items.values() if item.state in states]

    def open_of(self, ids: Iterable[int]) -> list[Item]:
        return [self.items[i] for i in ids if i in self.items and self.items[i].state in OPEN]


@dataclass
class ModelProducer:
    epoch: int = 0
    seq: int = 0
    count: int = 0
    hash: str = ""
    cursor: bytes | None = None
    finished: bool = False
    at_ms: int = 0
    node: str = ""
    boot: str = ""


@dataclass
class ModelPipeline:
    release: dict[str, Any]  # what the last deployment brought
    run: int = 0
    state: str = "new"
    params: Any = None
    on_done_run: int = 0
    started_ms: int = 0
    done_ms: int = 0
    previous: list[str] = field(default_factory=list)
    paused: dict[str, str] = field(default_factory=dict)
    scaled: dict[str, int | str] = field(default_factory=dict)
    paced: dict[str, int] = field(default_factory=dict)
    ticks: dict[str, int] = field(default_factory=dict)
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    rolling: dict[str, Any] | None = None  # `number`, the `former` release, and the `nodes` that run the new one
    rolled: dict[str, Any] | None = None
    first_id: int = 1

    @property
    def version(self) -> str:
        return self.release["version"]  # type: ignore[no-any-return]

    @property
    def manifest(self) -> dict[str, Any]:
        return self.release["manifest"]  # type: ignore[no-any-return]

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """Of the versions that some node runs, the newest first."""
        return [self.manifest, *([self.rolling["former"]["manifest"]] if self.rolling else [])]

    @property
    def kept(self) -> set[str]:
        former = {self.rolling["former"]["version"]} if self.rolling else set()
        return {self.version, *former, *self.previous[:1]}

    def is_paused(self, stage: str) -> bool:
        return bool({"", stage} & set(self.paused))

    def stage(self, name: str | None) -> dict[str, Any] | None:
        return next((s for manifest in self.manifests for s in manifest["stages"] if s["name"] == name), None)


def numbers_of(blob: Buffer) -> list[int]:
    return [number for (number,) in struct.iter_unpack("<I", bytes(blob))]


def values_of(lengths: Buffer, body: Buffer) -> list[bytes]:
    """The values of a `lengths` and a `body` blob, one by one."""
    values, data, start = [], bytes(body), 0
    for size in numbers_of(lengths):
        values.append(data[start : start + size])
        start += size
    assert start == len(data), "the bytes do not add up to the lengths"
    return values


Said = tuple[str, str, dict[str, Any], bytes | None]


class Model:
    """What every command does, item by item."""

    def __init__(self) -> None:
        self.queues: dict[str, ModelQueue] = {}
        self.producers: dict[str, ModelProducer] = {}
        self.pipelines: dict[str, ModelPipeline] = {}
        self.ended: dict[str, tuple[int, int]] = {}  # of pipelines that were undeployed: the last run, and an id above all that were used
        self.index = 0  # of the entry that is applied
        self.bundles: dict[tuple[str, int], bytes] = {}
        self.members: dict[str, tuple[str, dict[str, Any]]] = {}
        self.accepted: set[str] = set()
        self.moved_to: str | None = None
        self.at_ms = 0

    def apply(self, at_ms: int, messages: Iterable[Message]) -> list[Said]:
        self.at_ms = at_ms
        return [self._say(message, self._outcome(message)) for message in messages]

    def _outcome(self, message: Message) -> tuple[Any, ...]:
        if self.moved_to is not None:
            return "refused", {"code": "moved", "into": self.moved_to}
        token = message.fields.get("once")
        key = f"once:{message.kind}:{token}"
        if token is not None and key in self.producers:
            return "already", json.loads(self.producers[key].hash)
        said: tuple[Any, ...] = getattr(self, f"_{message.kind}")(message.fields, message.blobs)
        if token is not None and said[0] != "refused":
            told = json.dumps(said[1], sort_keys=True, separators=(",", ":"))
            self.producers[key] = ModelProducer(hash=told, at_ms=self.at_ms)
        return said

    @staticmethod
    def _say(message: Message, said: tuple[Any, ...]) -> Said:
        result, fields, *cursor = said
        return message.kind, result, fields, cursor[0] if cursor else None

    # ---- items in and out

    def _add(self, name: str, body: bytes, key: str | None = None, parents: tuple[Item, ...] = ()) -> Item:
        queue = self.queues[name]
        pipeline = self.pipelines.get(queue.pipeline)
        item = Item(len(queue.items) + queue.first_id, body, key, pipeline.run if pipeline else 0, self.at_ms, parents)
        queue.items[item.id] = item
        return item

    def _wait_for(self, item: Item, record: dict[str, Any]) -> None:
        """A put may say that its items wait at first: for so long, or until a time of day, which is told from the others by its sign."""
        if "delay_ms" in record:
            item.state, item.due_ms = "delayed", self.at_ms + record["delay_ms"]
        elif "at_ms" in record:
            item.state, item.due_ms = "delayed", -record["at_ms"]

    @staticmethod
    def _ports(
        fields: list[dict[str, Any]], blobs: Sequence[Buffer]
    ) -> Iterator[tuple[list[str], list[bytes], list[int] | None, list[Any]]]:
        left = list(blobs)
        for record in fields:
            values = values_of(left.pop(0), left.pop(0))
            counts = numbers_of(left.pop(0)) if record.get("counts") else None
            keys = json.loads(bytes(left.pop(0))) if record.get("keys") else [None] * len(values)
            yield record["queues"], values, counts, keys

    def _put(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        (key, epoch, seq), source = fields["producer"], fields["source"]
        producer = self.producers.get(key)
        if producer is None and source is not None:
            return "refused", {"code": "unknown_producer"}
        producer = producer or ModelProducer(epoch=epoch)
        if epoch != producer.epoch:
            return "refused", {"code": "stale_epoch", "epoch": producer.epoch}
        if seq <= producer.seq:
            return "already", {"seq": producer.seq} | ({"added": producer.count} if source is None else {})
        if producer.finished:
            return "refused", {"code": "finished", "seq": producer.seq}
        if seq > producer.seq + 1:
            return "refused", {"code": "sequence", "seq": producer.seq}
        targets = [name for port in fields["ports"] for name in port["queues"]]
        for name in targets:
            code = self._why_not(self.queues.get(name), source)
            if code:
                return "refused", {"code": code}
        added = 0
        for record, (names, values, _, keys) in zip(fields["ports"], self._ports(fields["ports"], blobs), strict=True):
            for name in names:
                for body, item_key in zip(values, keys, strict=True):
                    if item_key is None or item_key not in self.queues[name].keys:
                        self.queues[name].keys |= {} if item_key is None else {item_key: self.at_ms}
                        self._wait_for(self._add(name, body, item_key), record)
                        added += 1
        producer.seq, producer.at_ms = seq, self.at_ms
        if source is None:
            producer.count = added
        else:
            producer.count = source.get("count", producer.count)
            producer.hash = source.get("hash", producer.hash)
            producer.finished = producer.finished or source.get("finished", False)
            producer.cursor = bytes(blobs[-1]) if source.get("cursor") else producer.cursor
            of, _, stage, shard = key.removeprefix("source:").split("/")
            if of in self.pipelines:
                count = sum(len(values) for _, values, _, _ in self._ports(fields["ports"], blobs))
                self._count_towards_the_rate(self.pipelines[of], stage, count)
                if "tick_ms" in source:
                    self.pipelines[of].ticks = {**self.pipelines[of].ticks, f"{stage}/{shard}": source["tick_ms"]}
        self.producers[key] = producer
        owner = key.removeprefix("source:").partition("/")[0] if key.startswith("source:") else None
        for name in {self.queues[name].pipeline for name in targets} | {owner}:
            self._maybe_done(name)
        return "ok", {"seq": seq, "added": added}

    def _why_not(self, queue: ModelQueue | None, source: dict[str, Any] | None) -> str | None:
        if queue is None:
            return "unknown_queue"
        if queue.closed and source is None:
            return "closed"
        pipeline = self.pipelines.get(queue.pipeline)
        if queue.record and queue.record["read_by"] and pipeline and pipeline.state != "running":
            return "not_running"
        return None

    def _done(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None or any(name not in self.queues for port in fields["ports"] for name in port["queues"]):
            return "refused", {"code": "unknown_queue"}
        ids = [i for lo, hi in fields["ranges"] for i in range(lo, hi)]
        found = queue.open_of(ids)
        if not found:
            return "already", {"count": 0}
        if fields["whole"] and (code := self._why_not_whole(fields, ids, found)):
            for (lo, hi), fence in zip(fields["ranges"], fields.get("fences", ()), strict=False):
                self._give_back(item for item in _named(queue, [(lo, hi)]) if item.fence == Fence(*fence))
            return "refused", {"code": code}
        if fields.get("parts"):
            for target, item in found[0].emitted:
                item.state = "ready"
                target.unseen -= 1
            found[0].parts, found[0].emitted = 0, []
        for item in found:
            self._end(queue, item, "done")
        for names, values, counts, _ in self._ports(fields["ports"], blobs):
            origins = self._origins(ids, found, values, counts, fields["whole"])
            for name in names:
                for body, parents in zip(values, origins, strict=True):
                    if parents is not None:
                        self._add(name, body, parents=parents)
        self._maybe_done(queue.pipeline)
        return "ok", {"count": len(found)}

    @staticmethod
    def _why_not_whole(fields: dict[str, Any], ids: list[int], found: list[Item]) -> str | None:
        if len(found) < len(ids):
            return "divided"
        if fields.get("parts") and found[0].fence != Fence(*fields["fences"][0]):
            return "stale_fence"
        return "parts_missing" if found[0].parts != fields.get("parts", found[0].parts) else None

    def _part(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None or any(
            name not in self.queues or self.queues[name].pipeline != queue.pipeline
            for port in fields["ports"]
            for name in port["queues"]
        ):
            return "refused", {"code": "unknown_queue"}
        item = queue.items.get(fields["id"])
        if item is None or item.fence != Fence(*fields["fence"]):
            return "refused", {"code": "stale_fence"}
        if fields["part"] == 0:
            self._withdraw(item)
        if fields["part"] < item.parts:
            return "already", {"parts": item.parts}
        if fields["part"] > item.parts:
            return "refused", {"code": "sequence", "parts": item.parts}
        item.parts += 1
        for names, values, _, _ in self._ports(fields["ports"], blobs):
            for name in names:
                for body in values:
                    made = self._add(name, body)
                    made.state, made.parents = "hidden", (item,)
                    item.emitted.append((self.queues[name], made))
                    self.queues[name].unseen += 1
        return "ok", {"parts": item.parts}

    @staticmethod
    def _withdraw(item: Item) -> None:
        """It is no longer held by whoever emitted parts for it."""
        for _, made in item.emitted:
            made.state = "withdrawn"
        item.parts, item.emitted = 0, []

    @staticmethod
    def _origins(
        ids: list[int], found: list[Item], values: list[bytes], counts: list[int] | None, whole: bool
    ) -> list[tuple[Item, ...] | None]:
        """For each value the inputs that it comes from, None where those were finished before."""
        if whole:
            return [tuple(found)] * len(values)
        by_id = {item.id: (item,) for item in found}
        spread = [i for i, count in zip(ids, counts or [1] * len(ids), strict=True) for _ in range(count)]
        return [by_id.get(i) for i in spread]

    def _end(self, queue: ModelQueue, item: Item, state: str) -> None:
        self._withdraw(item)
        item.state, item.fence, item.deliveries, item.parked = state, None, 0, None
        queue.done += state == "done"

    def _give_back(self, items: Iterable[Item]) -> int:
        count = 0
        for item in list(items):
            self._withdraw(item)
            item.state, item.fence = "ready", None
            count += 1
        return count

    def _take(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        taken = [item for item in _named(queue, fields["ranges"]) if item.state == "ready"]
        for item in taken:
            item.state, item.fence = "leased", Fence(*fields["fence"])
        if queue.record and queue.record["read_by"]:
            self._count_towards_the_rate(self.pipelines[queue.pipeline], queue.record["read_by"], len(taken))
        return "ok" if taken else "already", {"count": len(taken)}

    def _count_towards_the_rate(self, pipeline: ModelPipeline, stage: str, count: int) -> None:
        """When, in nanoseconds, as much may go again as after a long rest."""
        interval_ns = INTERVALS_NS[(pipeline.stage(stage) or {"rate": None})["rate"]]
        if interval_ns:
            full_ns = max(pipeline.paced.get(stage, 0), self.at_ms * 1_000_000)
            pipeline.paced = {**pipeline.paced, stage: full_ns + count * interval_ns}

    def _release(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        fence = Fence(*fields["fence"])
        count = self._give_back(item for item in _named(queue, fields["ranges"]) if item.fence == fence)
        return "ok" if count else "already", {"count": count}

    def _fail(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        item = queue.items.get(fields["id"])
        if item is None or item.fence is None or item.fence != Fence(*fields["fence"]):
            return "refused", {"code": "stale_fence"}
        parked = self._count_delivery(queue, item, fields)
        self._maybe_done(queue.pipeline)
        return "ok", {"parked": parked}

    def _count_delivery(self, queue: ModelQueue, item: Item, fields: dict[str, Any], in_company: bool = False) -> bool:
        self._withdraw(item)
        item.deliveries += 1
        item.fence = None
        if in_company or item.deliveries <= self.retries(queue, fields.get("retries", 0)):
            item.state, item.due_ms = "delayed", self.at_ms + fields["delay_ms"]
            return False
        item.state, item.parked = "parked", (item.run, item.deliveries, self.at_ms, fields["error"])
        item.deliveries = 0
        self._count_share(queue)
        return True

    def _count_share(self, queue: ModelQueue) -> None:
        """`shares`: of a stage that may stop by itself, how many items it had done when the look back began, and parked ones since, both in
        thousandths. No more than some are looked back at: of the older ones both kinds go, in proportion."""
        name = queue.record["read_by"] if queue.record else None
        if name not in self.pipelines[queue.pipeline].shares:
            return
        pipeline = self.pipelines[queue.pipeline]
        stage, (done_at, parked) = pipeline.stage(name), pipeline.shares[name]
        assert stage is not None
        done, parked, most = max(0, 1000 * queue.done - done_at), parked + 1000, 1000 * shares.ITEMS_MAX
        if done + parked > most:
            parked -= (done + parked - most) * parked // (done + parked)
            done = most - parked
        pipeline.shares = {**pipeline.shares, name: (1000 * queue.done - done, parked)}
        is_enough = done + parked >= 1000 * shares.ITEMS_MIN
        if is_enough and parked > stage["parked_share_max"] * (done + parked) and name not in pipeline.paused:
            pipeline.paused = {**pipeline.paused, name: (
                f"{round(parked / 1000)} of its last {(done + parked) // 1000} items were parked, more than its "
                f"parked_share_max={stage['parked_share_max']:g} (parked list says why)")}

    def _look_from_here(self, pipeline: ModelPipeline, of: str, name: str | None = None) -> None:
        for stage in pipeline.manifest["stages"]:
            if stage["parked_share_max"] is not None and name in (None, stage["name"]):
                pipeline.shares = {**pipeline.shares, stage["name"]: (1000 * self.queues[f"{of}/{stage['reads']}"].done, 0)}

    def retries(self, queue: ModelQueue, without_stage: int = 0) -> int:
        stage = self.pipelines[queue.pipeline].stage(queue.record["read_by"]) if queue.record else None
        return stage["retries"] if stage else without_stage

    def _due(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        count = self._give_back(
            queue.items[i] for i in set(fields["ids"]) if i in queue.items and queue.items[i].state == "delayed"
        )
        return "ok" if count else "already", {"count": count}

    def _session_end(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        released = counted = 0
        for queue in self.queues.values():
            held = [
                item for item in queue.of("leased") if item.fence and item.fence[:2] == (fields["node"], fields["boot"])
            ]
            sizes = Counter(item.fence for item in held)
            for item in held:
                in_company = False
                if fields["ran"] is None:
                    counts = sizes[item.fence] == 1 or item.deliveries < self.retries(queue)
                else:
                    told = fields["ran"].get(queue.name, ())
                    in_company = any(item.id in range(*one) for one in told if isinstance(one, list))
                    counts = in_company or item.id in told
                if counts:
                    self._count_delivery(queue, item, fields, in_company)
                    counted += 1
                else:
                    released += self._give_back([item])
        for name in self.pipelines:
            self._maybe_done(name)
        return "ok", {"released": released, "counted": counted}

    def _retry(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        chosen = [item for item in queue.of("parked") if fields["ids"] is None or item.id in fields["ids"]]
        for item in chosen:
            item.state, item.parked = "ready", None
        pipeline = self.pipelines.get(queue.pipeline)
        if chosen and pipeline and pipeline.state == "done" and queue.record and queue.record["read_by"]:
            pipeline.state = "running"
        return "ok" if chosen else "already", {"count": len(chosen)}

    def _discard(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        count = self._drop(queue, fields["ids"])
        self._maybe_done(queue.pipeline)
        return "ok" if count else "already", {"count": count}

    def _drop(self, queue: ModelQueue, ids: list[int] | None) -> int:
        states = ("parked",) if ids is not None else ("parked", *OPEN)
        chosen = [item for item in queue.of(*states) if ids is None or item.id in ids]
        for item in chosen:
            self._end(queue, item, "discarded")
        return len(chosen)

    # ---- projects, runs, producers

    def _bundle_part(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        key = (fields["version"], fields["part"])
        if key in self.bundles:
            return "already", {}
        self.bundles[key] = bytes(blobs[0])
        return "ok", {}

    def _deploy(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        version, name = fields["version"], fields["pipeline"]
        if (version, 0) not in self.bundles or (version, 1) not in self.bundles:
            return "refused", {"code": "parts_missing"}
        old = self.pipelines.get(name)
        release = {of: fields[of] for of in ("version", "origin", "manifest", "files", "zip_sha256", "project")}
        if old is None:
            run, first_id = self.ended.pop(name, (0, 1))
            self.pipelines[name] = ModelPipeline(release, run=run, first_id=first_id)
        else:
            self.pipelines[name] = self._follow(old, release)
            if not self.pipelines[name].rolling:
                self._keep_controls(self.pipelines[name], keeps_reasons=version == old.version)
        self._put_in_force(name)
        self._drop_bundles(set() if old is None else {old.version, *old.kept})
        pipeline = self.pipelines[name]
        number = pipeline.rolling["number"] if pipeline.rolling else None
        return "ok", {"run": pipeline.run, "state": pipeline.state, "rollout": number}

    def _follow(self, old: ModelPipeline, release: dict[str, Any]) -> ModelPipeline:
        """Of a running pipeline, another version goes over the nodes that have all run `proven`."""
        new, proven = copy.copy(old), old.rolling["former"] if old.rolling else old.release
        new.release = release
        if release["version"] != old.version:
            new.rolling = new.rolled = None
            if release["version"] == proven["version"]:
                new.previous = old.previous[1:]
            else:
                if not old.rolling:
                    new.previous = [proven["version"], *old.previous][:2]
                if old.state == "running":
                    new.rolling = {"number": self.index, "former": proven, "nodes": []}
        elif old.rolled and old.rolled["failure"]:
            new.rolled = None
        return new

    @staticmethod
    def _keep_controls(pipeline: ModelPipeline, keeps_reasons: bool) -> None:
        kinds = {stage["name"]: stage["kind"] for stage in pipeline.manifest["stages"]}
        pipeline.paused = {
            name: why for name, why in pipeline.paused.items() if (name in kinds or name == "") and (keeps_reasons or why == "")
        }
        pipeline.scaled = {name: count for name, count in pipeline.scaled.items() if kinds.get(name, "source") != "source"}

    def _put_in_force(self, name: str) -> None:
        pipeline = self.pipelines[name]
        for queue in self.queues.values():
            if queue.pipeline == name:
                queue.record = None
        for record in [record for manifest in reversed(pipeline.manifests) for record in manifest["queues"]]:
            full = f"{name}/{record['name']}"
            queue = self.queues.setdefault(full, ModelQueue(full, first_id=pipeline.first_id))
            former = queue.record["read_by"] if queue.record else None  # who may read it still, on nodes that run the former version
            queue.record = {**record, "read_by": record["read_by"] or former}
        pipeline.shares = {}
        self._look_from_here(pipeline, name)
        self._maybe_done(name)

    def _drop_bundles(self, versions: set[str]) -> int:
        """Those of them that no pipeline keeps."""
        gone = versions - {version for pipeline in self.pipelines.values() for version in pipeline.kept}
        before = len(self.bundles)
        self.bundles = {key: body for key, body in self.bundles.items() if key[0] not in gone}
        return before - len(self.bundles)

    def _of_rollout(self, fields: dict[str, Any]) -> ModelPipeline | None:
        pipeline = self.pipelines.get(fields["pipeline"])
        is_meant = pipeline is not None and pipeline.rolling is not None and pipeline.rolling["number"] == fields["rollout"]
        return pipeline if is_meant else None

    def _roll(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        pipeline = self._of_rollout(fields)
        if pipeline is None or pipeline.rolling is None or fields["node"] in pipeline.rolling["nodes"]:
            return "already", {}
        pipeline.rolling["nodes"].append(fields["node"])
        return "ok", {"nodes": len(pipeline.rolling["nodes"])}

    def _end_rollout(self, fields: dict[str, Any], failure: dict[str, Any] | None) -> tuple[Any, ...]:
        pipeline = self._of_rollout(fields)
        if pipeline is None or pipeline.rolling is None:
            return "already", {}
        rolling, tried = pipeline.rolling, pipeline.version
        pipeline.rolled = {"version": tried, "nodes": len(rolling["nodes"]), "failure": failure}
        pipeline.rolling = None
        if failure is None:
            self._keep_controls(pipeline, keeps_reasons=False)
        else:
            pipeline.release, pipeline.previous = rolling["former"], pipeline.previous[1:]
        self._put_in_force(fields["pipeline"])
        self._drop_bundles(set() if failure is None else {tried})
        return "ok", {}

    def _rolled_out(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        return self._end_rollout(fields, None)

    def _roll_back(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        return self._end_rollout(fields, fields["failure"])

    def _undeploy(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        name = fields["pipeline"]
        pipeline = self.pipelines.get(name)
        if pipeline is None:
            return "already", {}
        queues = [queue for queue in self.queues.values() if queue.pipeline == name]
        left = {
            "open": sum(len(queue.of(*OPEN)) for queue in queues),
            "parked": sum(len(queue.of("parked")) for queue in queues),
        }
        if left != {"open": 0, "parked": 0} and not fields["discard"]:
            return "refused", {"code": "items_remain", **left}
        free = max([pipeline.first_id, *(queue.first_id + len(queue.items) for queue in queues)])
        self.ended[name] = (pipeline.run, free)
        self.queues = {of: queue for of, queue in self.queues.items() if queue.pipeline != name}
        self.producers = {key: p for key, p in self.producers.items() if not key.startswith(f"source:{name}/")}
        del self.pipelines[name]
        self._drop_bundles({pipeline.version, *pipeline.kept})
        return "ok", left

    def _forget_uploads(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        count = self._drop_bundles(set(fields["versions"]))
        return "ok" if count else "already", {"count": count}

    def _start_run(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        name = fields["pipeline"]
        pipeline = self.pipelines.get(name)
        if pipeline is None:
            return "refused", {"code": "unknown_pipeline"}
        if pipeline.state == "running":
            return "refused", {"code": "running", "run": pipeline.run}
        self.producers = {key: p for key, p in self.producers.items() if not key.startswith(f"source:{name}/")}
        for queue in self.queues.values():
            if queue.pipeline == name:
                queue.closed = False
                queue.keys.clear()
                if queue.record and queue.record["results"]:
                    self._drop(queue, None)
        pipeline.run += 1
        pipeline.state, pipeline.params, pipeline.ticks = "running", fields["params"], {}
        self._look_from_here(pipeline, name)
        pipeline.started_ms, pipeline.done_ms = self.at_ms, 0
        pipeline.totals = {
            record["name"]: self.queues[f"{name}/{record['name']}"].done
            for record in pipeline.manifest["queues"]
            if record["read_by"]
        }
        self._maybe_done(name)
        return "ok", {"run": pipeline.run}

    def _assign(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        pipeline = self.pipelines.get(fields["pipeline"])
        if pipeline is None or pipeline.stage(fields["stage"]) is None or pipeline.state != "running":
            return "refused", {"code": "not_running"}
        key = source_key(fields["pipeline"], pipeline.run, fields["stage"], fields["shard"])
        producer = self.producers.setdefault(key, ModelProducer())
        if producer.finished:
            return "already", {"finished": True}
        producer.epoch += 1
        producer.node, producer.boot = fields["node"], fields["boot"]
        return (
            "ok",
            {
                "producer": key,
                "epoch": producer.epoch,
                "seq": producer.seq,
                "count": producer.count,
                "hash": producer.hash,
            },
            producer.cursor,
        )

    def _close(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        pipeline = self.pipelines.get(fields["pipeline"])
        if pipeline is None:
            return "refused", {"code": "unknown_pipeline"}
        stage = pipeline.stage(fields["name"])
        queue = self.queues.get(f"{fields['pipeline']}/{fields['name']}")
        if stage and stage["kind"] == "source":
            for shard in range(stage["processes"]):
                producer = self.producers.setdefault(
                    source_key(fields["pipeline"], pipeline.run, stage["name"], shard), ModelProducer()
                )
                producer.epoch += 1
                producer.finished = True
        elif queue:
            queue.closed = True
        else:
            return "refused", {"code": "unknown_name"}
        self._maybe_done(fields["pipeline"])
        return "ok", {}

    def _unnamed(self, fields: dict[str, Any]) -> tuple[Any, ...] | None:
        pipeline = self.pipelines.get(fields["pipeline"])
        if pipeline is None:
            return "refused", {"code": "unknown_pipeline"}
        if fields["stage"] is not None and pipeline.stage(fields["stage"]) is None:
            return "refused", {"code": "unknown_name"}
        return None

    def _pause(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        unnamed = self._unnamed(fields)
        if unnamed:
            return unnamed
        paused, name, reason = self.pipelines[fields["pipeline"]].paused, fields["stage"] or "", fields["reason"]
        if name in paused and (paused[name] == "" or paused[name] == reason):
            return "already", {}
        paused[name] = reason
        return "ok", {}

    def _resume(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        unnamed = self._unnamed(fields)
        if unnamed:
            return unnamed
        paused, name = self.pipelines[fields["pipeline"]].paused, fields["stage"] or ""
        was_paused = name in paused
        paused.pop(name, None)
        self._look_from_here(self.pipelines[fields["pipeline"]], fields["pipeline"], fields["stage"])
        return "ok" if was_paused else "already", {"left": sorted(paused)}

    def _scale(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        unnamed = self._unnamed(fields)
        if unnamed:
            return unnamed
        pipeline = self.pipelines[fields["pipeline"]]
        stage = pipeline.stage(fields["stage"])
        if stage and stage["kind"] == "source":
            return "refused", {"code": "source"}
        if pipeline.scaled.get(fields["stage"]) == fields["processes"]:
            return "already", {}
        pipeline.scaled = {**pipeline.scaled, fields["stage"]: fields["processes"]}
        if fields["processes"] is None:
            del pipeline.scaled[fields["stage"]]
        return "ok", {}

    def _on_done_ran(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        pipeline = self.pipelines.get(fields["pipeline"])
        if pipeline is None or fields["run"] <= pipeline.on_done_run:
            return "already", {}
        pipeline.on_done_run = fields["run"]
        return "ok", {}

    def _forget(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        for key in fields["producers"]:
            self.producers.pop(key, None)
        return "ok", {}

    def _forget_keys(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        if queue is None:
            return "refused", {"code": "unknown_queue"}
        old = [key for key, at_ms in queue.keys.items() if at_ms < fields["before_ms"]]
        for key in old:
            del queue.keys[key]
        return "ok" if old else "already", {"count": len(old)}

    def _member(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        self.members[fields["node"]] = (fields["name"], fields["facts"])
        return "ok", {}

    def _member_left(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        return ("already" if self.members.pop(fields["node"], None) is None else "ok"), {}

    def _accept(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        self.accepted.add(fields["cluster"])
        return "ok", {}

    def _dissolve(self, fields: dict[str, Any], blobs: Sequence[Buffer]) -> tuple[Any, ...]:
        if self.ended or any(queue.items for queue in self.queues.values()):
            return "refused", {"code": "has_work"}
        if self.accepted:
            return "refused", {"code": "accepted_another"}
        self.moved_to = fields["into"]
        return "ok", {}

    def _maybe_done(self, name: str | None) -> None:
        pipeline = self.pipelines.get(name or "")
        if pipeline is None or pipeline.state != "running":
            return
        for stage in pipeline.manifest["stages"]:
            if stage["kind"] == "source":
                for shard in range(stage["processes"]):
                    producer = self.producers.get(source_key(name or "", pipeline.run, stage["name"], shard))
                    if producer is None or not producer.finished:
                        return
        for queue in self.queues.values():
            if queue.pipeline == name and queue.record and queue.record["read_by"]:
                own = [record for record in pipeline.manifest["queues"] if f"{name}/{record['name']}" == queue.name]
                is_fed = any(record["outside"] and record["read_by"] for record in own)
                if queue.of(*OPEN) or (is_fed and not queue.closed):
                    return
        pipeline.state, pipeline.done_ms = "done", self.at_ms


def source_key(pipeline: str, run: int, stage: str, shard: int) -> str:
    return f"source:{pipeline}/{run}/{stage}/{shard}"


def _named(queue: ModelQueue, ranges: Iterable[Sequence[int]]) -> list[Item]:
    return [queue.items[i] for lo, hi in ranges for i in range(lo, hi) if i in queue.items]


# --- What must hold --------------------------------------------------------------------------------------------------


def said(outcomes: Iterable[Outcome]) -> list[Said]:
    return [(o.kind, o.result, o.fields, o.cursor) for o in outcomes]


def compare(state: State, model: Model, bodies: Bodies) -> None:
    """The state is the model's, item by item and byte by byte."""
    assert set(state.queues) == set(model.queues)
    for name, queue in model.queues.items():
        _compare_queue(state.queues[name], queue, bodies)
    assert {key: _columns(p) for key, p in state.producers.items()} == {
        key: _columns(p) for key, p in model.producers.items()
    }
    assert set(state.pipelines) == set(model.pipelines)
    for name, pipeline in model.pipelines.items():
        found = state.pipelines[name]
        columns = {column: value for column, value in vars(pipeline).items() if column not in ("release", "rolling")}
        assert {column: getattr(found, column) for column in columns} == columns
        assert found.release.fields() == pipeline.release
        rollout = found.rollout and {
            "number": found.rollout.number, "former": found.rollout.former.fields(), "nodes": found.rollout.nodes
        }
        assert rollout == pipeline.rolling
    assert state.ended == model.ended
    assert set(state.bundles) == set(model.bundles)
    assert {key: (m["name"], m["facts"]) for key, m in state.members.items()} == model.members


def _columns(producer: Any) -> list[Any]:
    return [getattr(producer, name) for name in vars(ModelProducer())]


def _spread(spans: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int]]:
    for name, first, count in spans:
        yield from ((name, item_id) for item_id in range(first, first + count))


def _compare_queue(found: QueueState, queue: ModelQueue, bodies: Bodies) -> None:
    assert (found.next_id, found.put, found.done, found.closed) == (
        len(queue.items) + queue.first_id,
        len(queue.items) - queue.unseen,
        queue.done,
        queue.closed,
    )
    assert expand(found.ready) == {item.id for item in queue.of("ready")}
    held = {i: fence for lo, hi, fence in found.leases for i in range(lo, hi)}
    assert held == {item.id: item.fence for item in queue.of("leased")}
    assert found.delayed == {item.id: item.due_ms for item in queue.of("delayed")}
    assert found.deliveries == {item.id: item.deliveries for item in queue.items.values() if item.deliveries}
    parked = {i: (p.run, p.deliveries, p.at_ms, p.error) for i, p in found.parked.items()}
    assert parked == {item.id: item.parked for item in queue.of("parked")}
    assert found.keys == {
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest(): at_ms
        for key, at_ms in queue.keys.items()
    }
    assert expand(found.hidden) == {item.id for item in queue.of("hidden")}, "parts are seen too early, or kept too long"
    parts = {item_id: (parts.count, Counter(_spread(parts.spans))) for item_id, parts in found.parts.items()}
    assert parts == {
        item.id: (item.parts, Counter((target.name, made.id) for target, made in item.emitted))
        for item in queue.items.values()
        if item.parts
    }
    record = queue.record or {"maxsize": None, "bytes_max": None, "read_by": None, "results": False}
    assert {name: getattr(found, name) for name in ("maxsize", "bytes_max", "read_by", "results")} == {
        name: record[name] for name in ("maxsize", "bytes_max", "read_by", "results")
    }
    _compare_chunks(found, queue, bodies)


def _compare_chunks(found: QueueState, queue: ModelQueue, bodies: Bodies) -> None:
    for chunk in found.chunks:
        lengths, body = bodies(found.name, chunk)
        values = values_of(lengths, body)
        assert len(values) == chunk.count
        for item_id in range(chunk.first, chunk.end):
            item = queue.items[item_id]
            assert values[item_id - chunk.first] == item.body
            assert chunk.run == item.run
            if item.state in (*OPEN, "parked", "hidden"):
                assert chunk.key_of(item_id) == item.key
        assert chunk.at_ms == queue.items[chunk.first].at_ms, "a chunk is as old as its first item"


def expand(ranges: RangeSet) -> set[int]:
    """The ids of a set, which has to be in its one right form."""
    pairs = list(ranges)
    assert all(lo < hi for lo, hi in pairs), "an empty range is kept"
    assert all(a[1] < b[0] for a, b in zip(pairs, pairs[1:], strict=False)), "neighbours are not merged"
    ids = {i for lo, hi in pairs for i in range(lo, hi)}
    assert len(ids) == len(ranges)
    return ids


def plain_rows(state: State, bundles_by_place: bool = True) -> dict[str, Any]:
    """All rows, those of chunks taken apart into items: how items share chunks is each node's own affair.

    So is where a bundle's bytes lie, once a snapshot has brought them: `bundles_by_place` false leaves that out.
    """
    rows: dict[str, Any] = dict(state.all_rows())
    names = [name for name in TABLES["chunks"].columns if name not in BODY_COLUMNS]
    rows["chunks"] = {
        (key[0], item_id): row
        for key, values in rows["chunks"].items()
        for item_id, row in _items_of(dict(zip(names, (*key, *values), strict=False)))
    }
    if not bundles_by_place:
        rows["bundles"] = {key: (row[0], *row[3:]) for key, row in rows["bundles"].items()}
    return rows


def _items_of(chunk: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    first, end = chunk["first_id"], chunk["first_id"] + chunk["count"]
    open_ranges = [(first, end)] if chunk["open"] is None else json.loads(chunk["open"])
    keys = json.loads(chunk["keys"] or "[]")
    for lo, hi in open_ranges:
        for item_id in range(lo, hi):
            deliveries, delayed = (
                json.loads(chunk[name] or "{}").get(str(item_id)) for name in ("deliveries", "delayed")
            )
            yield item_id, (chunk["run"], deliveries, delayed, keys[item_id - first] if keys else None)


class Books:
    """Follows a state from outside, by its outcomes and bytes alone: nothing is lost, made twice or made of nothing.

    Values name where they come from (`queue#id/serial`), so an output can be followed to its input.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bytes], int] = {}
        self._done: Counter[str] = Counter()
        self._discarded: Counter[str] = Counter()
        self._began: set[str] = set()
        self._in_parts: set[str] = set()
        self._ids: Counter[str] = Counter()  # by pipeline, an id above all that were used before it was undeployed

    def note(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        for message, outcome in zip(messages, outcomes, strict=True):
            if outcome.kind == "done" and outcome.result == "ok":
                self._done[message.fields["queue"]] += outcome.fields["count"]
            if outcome.kind == "discard" and outcome.result == "ok":
                self._discarded[message.fields["queue"]] += outcome.fields["count"]
            if outcome.kind == "part" and outcome.result == "ok":
                self._in_parts |= {name for port in message.fields["ports"] for name in port["queues"]}
            if outcome.kind == "start_run" and outcome.result == "ok":
                self._began.add(message.fields["pipeline"])
            if outcome.kind == "undeploy" and outcome.result == "ok":
                self._forget(message.fields["pipeline"])

    def _forget(self, pipeline: str) -> None:
        """Its queues are gone, and if there are some of their names again, these begin anew."""
        begin = f"{pipeline}/"
        self._seen = {key: item_id for key, item_id in self._seen.items() if not key[0].startswith(begin)}
        self._done, self._discarded = (
            Counter({name: count for name, count in counts.items() if not name.startswith(begin)})
            for counts in (self._done, self._discarded)
        )
        self._in_parts = {name for name in self._in_parts if not name.startswith(begin)}
        self._ids[f"before {pipeline}"] = max(self._ids[pipeline], self._ids[f"before {pipeline}"])

    def check(self, state: State, bodies: Bodies) -> None:
        for queue in state.queues.values():
            self._ids[queue.pipeline] = max(self._ids[queue.pipeline], queue.next_id)
            first_id = state.pipelines[queue.pipeline].first_id
            assert first_id >= self._ids[f"before {queue.pipeline}"], "an id of a pipeline that ended may be used again"
            self._check_chunks(queue)
            self._check_origins(state, queue, bodies)
            self._check_counts(queue, first_id)
        self._began.clear()

    def _check_counts(self, queue: QueueState, first_id: int) -> None:
        gone = queue.put - queue.open_count - queue.done - len(queue.parked)
        if queue.pipeline in self._began and queue.name.endswith("results"):
            self._discarded[queue.name] = max(
                gone, self._discarded[queue.name]
            )  # a run's results go when the next one begins
        assert gone == self._discarded[queue.name], "an item is lost or counted twice"
        assert queue.done == self._done[queue.name], "what was said to be done is not what is done"
        unseen = queue.next_id - first_id - queue.put  # parts that are not seen yet, or never will be
        assert unseen >= len(queue.hidden) if queue.name in self._in_parts else not unseen, "an id is used twice or left out"
        held = Counter(fence[:2] for lo, hi, fence in queue.leases for _ in range(lo, hi))
        assert queue.leases.held_by == held, "what sessions hold is miscounted"

    @staticmethod
    def _check_chunks(queue: QueueState) -> None:
        states = [
            expand(queue.ready),
            {i for lo, hi, _ in queue.leases for i in range(lo, hi)},
            set(queue.delayed),
            set(queue.parked),
            expand(queue.hidden),
        ]
        unfinished = set().union(*states)
        assert len(unfinished) == sum(map(len, states)), "an item is in two states"
        covered = [i for chunk in queue.chunks for i in range(chunk.first, chunk.end)]
        assert covered == sorted(set(covered)), "chunks overlap"
        assert unfinished <= set(covered), "an item has no bytes"
        for chunk in queue.chunks:
            ids = set(range(chunk.first, chunk.end))
            assert chunk.open == len(ids & unfinished) > 0, "a chunk's count of open items is off"
            assert chunk.parked == len(ids & states[3]), "a chunk's count of parked items is off"
        assert queue.open_bytes == sum(chunk.open_bytes for chunk in queue.chunks), "open bytes drift"
        assert set(queue.deliveries) <= unfinished - states[3], "deliveries of an item that is out of the way"

    def _check_origins(self, state: State, queue: QueueState, bodies: Bodies) -> None:
        for chunk in queue.chunks:
            for item_id, body in enumerate(values_of(*bodies(queue.name, chunk)), chunk.first):
                assert self._seen.setdefault((queue.name, body), item_id) == item_id, "a value is there twice"
                name, _, number = body.rpartition(b"/")[0].decode().partition("#")
                if name != "root" and item_id not in queue.hidden:
                    assert not _is_unfinished(state.queues[name], int(number)), "an output of an item that is not done"


def _is_unfinished(queue: QueueState, item_id: int) -> bool:
    return bool(queue.open_ranges(item_id, item_id + 1)) or item_id in queue.parked
