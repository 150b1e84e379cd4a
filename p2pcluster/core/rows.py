"""A state as the rows of tables: which have changed, all of them, and a state out of them again.

Which columns there are is `tables`'s; what the values mean, `records`'s. Chunks that came in one by one are laid together here, before they get rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from zlib import crc32

from p2pcluster.core.chunks import Chunk, joinable, joins
from p2pcluster.core.pacing import interval_ns_of
from p2pcluster.core.ranges import Fence, RangeSet
from p2pcluster.core.records import BundlePart, Parked, Parts, PipelineState, Producer, QueueState, Release, Rollout, within
from p2pcluster.core.shares import Share

Row = tuple[Any, ...]
Rows = dict[str, dict[Row, Row | None]]

_OF_QUEUES = ("queues", "chunks", "leases", "keys", "parked", "parts")  # the tables whose rows name a queue first


class RowedState:
    """What `queues.State` holds, and which of it no table has yet. Whoever changes a record calls `_touch` with its table and key."""

    def __init__(self) -> None:
        self.applied_idx = 0
        self.applied_term = 0
        self.at_ms = 0
        self.hash = bytes(16)
        self.queues: dict[str, QueueState] = {}
        self.producers: dict[str, Producer] = {}
        self.pipelines: dict[str, PipelineState] = {}
        self.ended: dict[str, tuple[int, int]] = {}  # pipelines that were undeployed: their last run, and the first id that is free
        self.bundles: dict[tuple[str, int], BundlePart] = {}
        self.members: dict[str, dict[str, Any]] = {}
        self.accepted: set[str] = set()  # clusters of this one's name that were told that they may dissolve into it
        self.moved_to: str | None = None  # the cluster that this one has dissolved into
        self.source_intervals_ns: dict[str, int] = {}  # by pipeline and source, of those with a rate
        self.ticking: dict[str, list[dict[str, Any]]] = {}  # by pipeline the sources with every_s
        self._dirty: dict[str, set[Any]] = {}
        self._removed_chunks: set[tuple[str, int]] = set()
        self._removed_queues: set[str] = set()
        self._cleared_keys: set[str] = set()

    def _touch(self, table: str, key: Any) -> None:
        self._dirty.setdefault(table, set()).add(key)

    @property
    def dirty_count(self) -> int:
        return sum(len(keys) for keys in self._dirty.values()) + len(self._removed_chunks) + len(self._removed_queues)

    def queue(self, name: str, first_id: int = 1) -> QueueState:
        """The queue, made when it is not there; its ids then begin with `first_id`."""
        found = self.queues.get(name)
        if found is None:
            found = self.queues[name] = QueueState(name)
            found.next_id = first_id
            self._touch("queues", name)
        return found

    def _remove_queue(self, queue: QueueState) -> None:
        """The queue and all that is in it."""
        name = queue.name
        del self.queues[name]
        self._removed_queues.add(name)
        self._removed_chunks = {key for key in self._removed_chunks if key[0] != name}
        self._cleared_keys.discard(name)
        for table in _OF_QUEUES:
            if table in self._dirty:
                self._dirty[table] = {key for key in self._dirty[table] if name != (key if isinstance(key, str) else key[0])}

    def _count_parked(self, queue: QueueState, item_id: int, change: int) -> Chunk:
        """One more parked item in its chunk, or one less; parked items do not fill their queue."""
        (chunk,) = queue.chunks.overlap(item_id, item_id + 1)
        before = chunk.open_bytes
        chunk.parked += change
        queue.open_bytes += chunk.open_bytes - before
        return chunk

    def _wire(self, pipeline: PipelineState) -> None:
        """Make the pipeline's queues and let them know what the manifest says; those that it no longer names lose their reader."""
        for queue in self.queues.values():
            if queue.pipeline == pipeline.name:
                queue.maxsize = queue.bytes_max = queue.read_by = None
                queue.results, queue.interval_ns = False, 0
        for record in [record for manifest in pipeline.manifests for record in manifest["queues"]]:
            queue = self.queue(pipeline.full(record["name"]), pipeline.first_id)
            queue.maxsize, queue.bytes_max = record["maxsize"], record["bytes_max"]
            queue.read_by, queue.results = record["read_by"] or queue.read_by, record["results"]
        self.ticking[pipeline.name] = [stage for stage in pipeline.sources if stage["every_s"] is not None]
        for name in [name for name in self.source_intervals_ns if name.startswith(f"{pipeline.name}/")]:
            del self.source_intervals_ns[name]
        for stage in [stage for manifest in pipeline.manifests for stage in manifest["stages"]]:
            if stage["reads"]:
                self.queues[pipeline.full(stage["reads"])].interval_ns = interval_ns_of(stage["rate"])
            elif stage["rate"] is not None:
                self.source_intervals_ns[pipeline.full(stage["name"])] = interval_ns_of(stage["rate"])
            else:
                self.source_intervals_ns.pop(pipeline.full(stage["name"]), None)

    def _unwire(self, pipeline: PipelineState) -> None:
        """There is no such pipeline any more."""
        self.ticking.pop(pipeline.name, None)
        for name in [name for name in self.source_intervals_ns if name.startswith(f"{pipeline.name}/")]:
            del self.source_intervals_ns[name]

    def _begin_shares(self, pipeline: PipelineState, name: str | None = None) -> None:
        """What was parked before says nothing about a stage from here on, or about all of them."""
        for stage in pipeline.manifest["stages"]:
            if stage.get("parked_share_max") is not None and stage["reads"] and name in (None, stage["name"]):
                pipeline.shares[stage["name"]] = Share(1000 * self.queues[pipeline.full(stage["reads"])].done)

    def coalesce(self) -> None:
        """Lay small neighbouring chunks together that no row has yet: one object and one row for what came in one by one."""
        by_queue: dict[str, list[int]] = {}
        for name, first in self._dirty.get("chunks", ()):
            by_queue.setdefault(name, []).append(first)
        for name, firsts in by_queue.items():
            if len(firsts) > 8:
                self._coalesce_queue(self.queues[name], sorted(firsts))

    def _coalesce_queue(self, queue: QueueState, firsts: list[int]) -> None:
        run: list[Chunk] = []
        for chunk in [c for first in firsts for c in queue.chunks.overlap(first, first + 1)]:
            if run and not joins(run, chunk):
                self._join(queue, run)
                run = []
            if joinable(chunk):
                run.append(chunk)
        self._join(queue, run)

    def _join(self, queue: QueueState, chunks: list[Chunk]) -> None:
        if len(chunks) < 2:
            return
        first = chunks[0]
        body = b"".join(c.body for c in chunks if c.body is not None)
        lengths = b"".join(c.lengths for c in chunks if c.lengths is not None)
        joined = Chunk(first.first, sum(c.count for c in chunks), first.run, first.at_ms, lengths, body, len(body), 0, 0, None)
        queue.chunks.replace(chunks, joined)
        dirty = self._dirty["chunks"]
        for chunk in chunks:
            dirty.discard((queue.name, chunk.first))
        dirty.add((queue.name, joined.first))

    def rows_changed(self) -> Rows:
        """What changed since `rows_written`: for each table its rows by key, None for one that is gone.

        Rows come without body columns, save for chunks that the log does not hold in one piece. `leases` come whole for each queue that is
        named, `keys` of a queue that began anew as `(queue,): None`.
        """
        rows: Rows = {table: {(name,): None for name in self._removed_queues} for table in _OF_QUEUES}  # before what came since
        rows["keys"] |= {(name,): None for name in self._cleared_keys}
        for table, keys in self._dirty.items():
            changed = rows.setdefault(table, {})
            for key in keys:
                changed.update(self._rows_of(table, key))
        gone = rows.setdefault("chunks", {})
        for chunk_key in self._removed_chunks:
            gone.setdefault(chunk_key, None)
        return {table: found for table, found in rows.items() if found}

    def filled(self, queue: str, first: int, body_crc: int) -> None:
        """The chunk's bytes stand in its own row now, if there still is such a chunk."""
        found = self.queues[queue].chunks.overlap(first, first + 1) if queue in self.queues else []
        if found and found[0].first == first:
            found[0].body_crc = body_crc

    def rows_written(self) -> None:
        """The rows of the last `rows_changed` are durable."""
        for name, first in self._dirty.get("chunks", ()):
            for chunk in self.queues[name].chunks.overlap(first, first + 1):
                chunk.persisted = True
        for key in self._dirty.get("bundles", ()):
            if key in self.bundles:
                self.bundles[key].persisted = True
        self._dirty.clear()
        self._removed_chunks.clear()
        self._removed_queues.clear()
        self._cleared_keys.clear()

    def all_rows(self) -> Rows:
        """Every row that the state has: what the tables should hold."""
        rows: Rows = {table: {} for table in ("queues", "chunks", "leases", "keys", "parked", "producers", "projects",
                                              "bundles", "members", "clusters", "parts")}
        for name, queue in self.queues.items():
            rows["queues"].update(self._rows_of("queues", name))
            rows["leases"].update({k: v for k, v in self._rows_of("leases", name).items() if len(k) == 2})
            for chunk in queue.chunks:
                rows["chunks"].update(self._rows_of("chunks", (name, chunk.first)))
            for digest in sorted(queue.keys):  # equal states make equal snapshots
                rows["keys"][(name, digest)] = (queue.keys[digest],)
            for item_id in queue.parked:
                rows["parked"].update(self._rows_of("parked", (name, item_id)))
            for item_id in sorted(queue.parts):
                rows["parts"].update(self._rows_of("parts", (name, item_id)))
        for table, keys in (("producers", self.producers), ("projects", [*self.pipelines, *self.ended]), ("bundles", self.bundles),
                            ("members", self.members), ("clusters", self._clusters())):
            for key in keys:
                rows[table].update(self._rows_of(table, key))
        return rows

    def _rows_of(self, table: str, key: Any) -> dict[Row, Row | None]:
        return getattr(self, f"_rows_of_{table}")(key)  # type: ignore[no-any-return]

    def _rows_of_queues(self, name: str) -> dict[Row, Row | None]:
        queue = self.queues[name]
        return {(name,): (queue.next_id, queue.put, queue.done, int(queue.closed))}

    def _rows_of_chunks(self, key: tuple[str, int]) -> dict[Row, Row | None]:
        queue = self.queues[key[0]]
        (chunk,) = queue.chunks.overlap(key[1], key[1] + 1)
        unfinished = RangeSet(queue.open_ranges(chunk.first, chunk.end))
        for item_id in within(queue.parked, chunk.first, chunk.end):
            unfinished.add(item_id, item_id + 1)
        for lo, hi in queue.hidden.overlap(chunk.first, chunk.end):
            unfinished.add(lo, hi)
        assert len(unfinished) == chunk.open, "a chunk's count of open items is off"
        inside = {
            "deliveries": {i: queue.deliveries[i] for i in within(queue.deliveries, chunk.first, chunk.end)},
            "delayed": {i: queue.delayed[i] for i in within(queue.delayed, chunk.first, chunk.end)},
        }
        bodies: Row = ()
        if chunk.entry == 0 and not chunk.persisted:
            assert chunk.lengths is not None and chunk.body is not None, "bytes that the log does not hold stay in memory"
            chunk.body_crc = crc32(chunk.body, crc32(chunk.lengths))
            bodies = (bytes(chunk.lengths), bytes(chunk.body))
        return {(queue.name, chunk.first): (
            chunk.count, chunk.run, chunk.at_ms, None if chunk.open == chunk.count else json.dumps(list(unfinished)),
            json.dumps(inside["deliveries"]) if inside["deliveries"] else None,
            json.dumps(inside["delayed"]) if inside["delayed"] else None,
            None if chunk.keys is None else bytes(chunk.keys),
            chunk.entry, chunk.offset, chunk.body_bytes, chunk.body_crc, *bodies,
        )}

    def _rows_of_leases(self, name: str) -> dict[Row, Row | None]:
        rows: dict[Row, Row | None] = {(name,): None}
        for lo, hi, fence in self.queues[name].leases:
            rows[(name, lo)] = (hi, *fence)
        return rows

    def _rows_of_keys(self, key: tuple[str, bytes]) -> dict[Row, Row | None]:
        at_ms = self.queues[key[0]].keys.get(key[1])
        return {key: None if at_ms is None else (at_ms,)}

    def _rows_of_parts(self, key: tuple[str, int]) -> dict[Row, Row | None]:
        parts = self.queues[key[0]].parts.get(key[1])
        return {key: None if parts is None else (parts.count, json.dumps(parts.spans))}

    def _rows_of_parked(self, key: tuple[str, int]) -> dict[Row, Row | None]:
        parked = self.queues[key[0]].parked.get(key[1])
        if parked is None:
            return {key: None}
        return {key: (parked.run, parked.deliveries, parked.at_ms, json.dumps(parked.error))}

    def _rows_of_producers(self, key: str) -> dict[Row, Row | None]:
        p = self.producers.get(key)
        if p is None:
            return {(key,): None}
        return {(key,): (p.epoch, p.seq, p.count, p.hash, p.cursor, int(p.finished), p.at_ms, p.node, p.boot)}

    def _rows_of_projects(self, name: str) -> dict[Row, Row | None]:
        p = self.pipelines.get(name)
        if p is None and name not in self.ended:
            return {(name,): None}
        if p is None:
            run, first_id = self.ended[name]
            return {(name,): ("", run, "ended", 0, 0, 0, json.dumps({"first_id": first_id}))}
        return {(name,): (p.version, p.run, p.state, p.on_done_run, p.started_ms, p.done_ms, json.dumps(p.detail()))}

    def _rows_of_bundles(self, key: tuple[str, int]) -> dict[Row, Row | None]:
        part = self.bundles.get(key)
        if part is None:
            return {key: None}
        return {key: (part.parts, part.entry, part.offset, part.body_bytes, part.body_crc)}

    def _rows_of_members(self, node: str) -> dict[Row, Row | None]:
        member = self.members.get(node)
        return {(node,): None if member is None else (member["name"], json.dumps(member["facts"]))}

    def _clusters(self) -> dict[str, str]:
        """Other clusters of this one's name, each with what has been settled between them."""
        fates = dict.fromkeys(sorted(self.accepted), "accepted")
        return fates if self.moved_to is None else {**fates, self.moved_to: "moved"}

    def _rows_of_clusters(self, cluster: str) -> dict[Row, Row | None]:
        return {(cluster,): (self._clusters()[cluster],)}

    def load(self, table: str, rows: Iterable[Row]) -> None:
        """Take in the rows of a table as `rows_changed` gave them, key columns first. Tables come in the order of `TABLES`."""
        for row in rows:
            getattr(self, f"_load_{table}")(*row)

    def loaded(self, applied_idx: int, applied_term: int, at_ms: int, state_hash: bytes) -> None:
        """All tables are in, and this is where they stand."""
        self.applied_idx, self.applied_term, self.at_ms, self.hash = applied_idx, applied_term, at_ms, state_hash
        for queue in self.queues.values():  # rows come by their hash, and what came first is forgotten first
            queue.keys = dict(sorted(queue.keys.items(), key=lambda key: key[1]))
        for pipeline in self.pipelines.values():
            self._wire(pipeline)
        self._dirty.clear()

    def _load_queues(self, name: str, next_id: int, put: int, done: int, closed: int) -> None:
        queue = self.queue(name)
        queue.next_id, queue.put, queue.done, queue.closed = next_id, put, done, bool(closed)

    def _load_chunks(self, name: str, first: int, count: int, run: int, at_ms: int, unfinished: str | None,
                     deliveries: str | None, delayed: str | None, keys: bytes | None, entry: int, offset: int, body_bytes: int,
                     body_crc: int | None) -> None:
        queue = self.queue(name)
        chunk = Chunk(first, count, run, at_ms, None, None, body_bytes, entry, offset, keys)
        chunk.body_crc = body_crc
        chunk.persisted = True
        queue.chunks.append(chunk)
        ranges = [(first, first + count)] if unfinished is None else [(lo, hi) for lo, hi in json.loads(unfinished)]
        for lo, hi in ranges:
            queue.ready.add(lo, hi)
        chunk.open = sum(hi - lo for lo, hi in ranges)
        queue.open_bytes += chunk.open_bytes
        queue.deliveries.update({int(i): n for i, n in json.loads(deliveries or "{}").items()})
        for item_id, due in json.loads(delayed or "{}").items():
            queue.ready.remove(int(item_id), int(item_id) + 1)
            queue.delayed[int(item_id)] = due

    def _load_leases(self, name: str, lo: int, hi: int, node: str, boot: str, seq: int) -> None:
        queue = self.queue(name)
        queue.ready.remove(lo, hi)
        queue.leases.add(lo, hi, Fence(node, boot, seq))

    def _load_keys(self, name: str, digest: bytes, at_ms: int) -> None:
        self.queue(name).keys[digest] = at_ms

    def _load_parts(self, name: str, item_id: int, count: int, spans: str) -> None:
        parts = self.queue(name).parts[item_id] = Parts(count, [(target, first, size) for target, first, size in json.loads(spans)])
        for target, first, size in parts.spans:
            self.queue(target).ready.remove(first, first + size)
            self.queue(target).hidden.add(first, first + size)

    def _load_parked(self, name: str, item_id: int, run: int, deliveries: int, at_ms: int, error: str) -> None:
        queue = self.queue(name)
        queue.ready.remove(item_id, item_id + 1)
        self._count_parked(queue, item_id, 1)
        queue.parked[item_id] = Parked(run, deliveries, at_ms, json.loads(error))

    def _load_producers(self, key: str, epoch: int, seq: int, count: int, digest: str, cursor: bytes | None, finished: int,
                        at_ms: int, node: str, boot: str) -> None:
        self.producers[key] = Producer(epoch, seq, count, digest, cursor, bool(finished), at_ms, node, boot)

    def _load_projects(self, name: str, version: str, run: int, state: str, on_done_run: int, started_ms: int, done_ms: int,
                       detail: str) -> None:
        d = json.loads(detail)
        if state == "ended":
            self.ended[name] = (run, d["first_id"])
            return
        rollout = d.get("rollout")
        self.pipelines[name] = PipelineState(
            name, version, d["origin"], d["manifest"], d["files"], d["zip_sha256"], d["project"], run, state, d["params"],
            on_done_run, started_ms, done_ms, d["previous"], d["totals"], d.get("paused", {}), d.get("scaled", {}),
            d.get("paced", {}), d.get("ticks", {}), {stage: Share(*share) for stage, share in d.get("shares", {}).items()},
            rollout and Rollout(rollout["number"], Release(**rollout["former"]), rollout["nodes"]), d.get("rolled"), d.get("first_id", 1),
        )

    def _load_bundles(self, version: str, part: int, parts: int, entry: int, offset: int, body_bytes: int, body_crc: int) -> None:
        self.bundles[(version, part)] = BundlePart(parts, entry, offset, body_bytes, body_crc, True)

    def _load_members(self, node: str, name: str, facts: str) -> None:
        self.members[node] = {"name": name, "facts": json.loads(facts)}

    def _load_clusters(self, cluster: str, fate: str) -> None:
        if fate == "moved":
            self.moved_to = cluster
        else:
            self.accepted.add(cluster)
