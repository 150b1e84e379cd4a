"""What each command does to a cluster's state: queues of items, leases, producers, pipelines.

`State.apply` is total and deterministic: every command has an outcome, and nothing here reads a clock, chance or a disk. Equal
logs make equal states on every node. The unit is the chunk: what one command adds to one queue. Items are ids; where a million
consecutive ids are in one state, that is one range.

An item is open (ready, leased or delayed), parked, or finished. An id below `next_id` that is neither open nor parked is
finished. How chunks lie in memory, and whether their bytes are at hand, is each node's own affair and no part of the state.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from p2pcluster.core.chunks import Chunk, outputs_of, pick, positions
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.commands import ONCE, Port, decode_commands, read_ports
from p2pcluster.core.ranges import Fence, Range
from p2pcluster.core.records import BundlePart, Outcome, Parked, PipelineState, Producer, QueueState, shards_of, within
from p2pcluster.core.rows import RowedState

_OUTCOMES = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _refused(message: Message, code: str, **fields: Any) -> Outcome:
    return Outcome(message.kind, "refused", {"code": code, **fields})


class State(RowedState):
    """The replicated state; see the module. `body_memory_bytes_max` bounds the bytes of items that this node keeps at hand."""

    def __init__(self, body_memory_bytes_max: int = 1 << 62) -> None:
        super().__init__()
        self.body_memory_bytes_max = body_memory_bytes_max
        self.body_memory_bytes = 0
        self._handlers: dict[str, Callable[[Message, _Context], Outcome]] = {
            "put": self._apply_put,
            "done": self._apply_done,
            "take": self._apply_take,
            "release": self._apply_release,
            "fail": self._apply_fail,
            "due": self._apply_due,
            "session_end": self._apply_session_end,
            "retry": self._apply_retry,
            "discard": self._apply_discard,
            "bundle_part": self._apply_bundle_part,
            "deploy": self._apply_deploy,
            "start_run": self._apply_start_run,
            "assign": self._apply_assign,
            "close": self._apply_close,
            "pause": self._apply_pause,
            "resume": self._apply_resume,
            "scale": self._apply_scale,
            "on_done_ran": self._apply_on_done_ran,
            "forget": self._apply_forget,
            "member": self._apply_member,
            "member_left": self._apply_member_left,
            "accept": self._apply_accept,
            "dissolve": self._apply_dissolve,
        }

    # ---- applying

    def apply(self, index: int, term: int, at_ms: int, body: Buffer) -> list[Outcome]:
        """Apply an entry's commands in order; one outcome for each."""
        assert index > self.applied_idx, f"entry {index} is applied already"
        outcomes = []
        for message, offset in decode_commands(body):
            context = _Context(index, at_ms, offset, message.blobs)
            outcome = self._once(message, context) if self.moved_to is None else self._moved(message)
            self._mix(outcome)
            outcomes.append(outcome)
        self.skip(index, term, at_ms)
        return outcomes

    def _once(self, message: Message, context: _Context) -> Outcome:
        """A command that carries a token is applied once: said again, it is answered as before, for as long as producers are remembered."""
        token = message.fields.get("once")
        key = f"{ONCE}{message.kind}:{token}"
        if token is not None and key in self.producers:
            return Outcome(message.kind, "already", json.loads(self.producers[key].hash))
        outcome = self._handlers[message.kind](message, context)
        if token is not None and outcome.result != "refused":
            self.producers[key] = Producer(hash=_OUTCOMES.encode(outcome.fields), at_ms=context.at_ms)
            self._touch("producers", key)
        return outcome

    def skip(self, index: int, term: int, at_ms: int) -> None:
        """An entry without commands: the term's no-op, a configuration."""
        self.applied_idx = index
        self.applied_term = term
        self.at_ms = max(self.at_ms, at_ms)

    def _mix(self, outcome: Outcome) -> None:
        text = _OUTCOMES.encode([outcome.kind, outcome.result, outcome.fields])
        self.hash = hashlib.blake2b(self.hash + text.encode(), digest_size=16).digest()

    # ---- items

    def _append(self, queue: QueueState, port: Port, context: _Context, first_blob: int) -> int:
        count = len(port.lengths) // 4
        if count == 0:
            return 0
        pipeline = self.pipelines.get(queue.pipeline)
        offset = context.blob_offset(first_blob)
        body_bytes = len(port.body)
        keep = self.body_memory_bytes + body_bytes <= self.body_memory_bytes_max
        chunk = Chunk(queue.next_id, count, pipeline.run if pipeline else 0, context.at_ms, port.lengths if keep else None,
                      port.body if keep else None, body_bytes, context.index, offset,
                      None if port.keys is None else bytes(port.keys))
        if keep:
            self.body_memory_bytes += body_bytes
        queue.chunks.append(chunk)
        queue.ready.add(chunk.first, chunk.end)
        queue.next_id += count
        queue.put += count
        queue.open_bytes += body_bytes
        self._touch("queues", queue.name)
        self._touch("chunks", (queue.name, chunk.first))
        return count

    def drop_body(self, chunk: Chunk) -> None:
        """Let go of the chunk's bytes in memory; they are read again when they are asked for."""
        if chunk.body is not None:
            chunk.lengths = chunk.body = None
            self.body_memory_bytes -= chunk.body_bytes

    def _finish(self, queue: QueueState, lo: int, hi: int) -> None:
        """The ids `[lo, hi)`, in no state any more, are finished: chunks that hold nothing else go."""
        for chunk in queue.chunks.overlap(lo, hi):
            before = chunk.open_bytes
            chunk.open -= min(hi, chunk.end) - max(lo, chunk.first)
            assert chunk.open >= 0, "an item is finished twice"
            queue.open_bytes -= before - chunk.open_bytes
            if chunk.open:
                self._touch("chunks", (queue.name, chunk.first))
            else:
                self._forget_chunk(queue, chunk)
        for item_id in within(queue.deliveries, lo, hi):
            del queue.deliveries[item_id]

    def _forget_chunk(self, queue: QueueState, chunk: Chunk) -> None:
        queue.chunks.remove(chunk)
        self.drop_body(chunk)
        self._dirty.get("chunks", set()).discard((queue.name, chunk.first))
        if chunk.persisted:
            self._removed_chunks.add((queue.name, chunk.first))

    def _take_out(self, queue: QueueState, lo: int, hi: int) -> list[Range]:
        """Remove the open ids of `[lo, hi)` from whatever state they are in; returns them."""
        found = queue.open_ranges(lo, hi)
        for a, b in found:
            queue.ready.remove(a, b)
            queue.leases.remove(a, b)
        for item_id in within(queue.delayed, lo, hi):
            del queue.delayed[item_id]
        self._touch("leases", queue.name)
        return found

    def _touch_items(self, queue: QueueState, lo: int, hi: int) -> None:
        for chunk in queue.chunks.overlap(lo, hi):
            self._touch("chunks", (queue.name, chunk.first))

    # ---- put

    def _apply_put(self, message: Message, context: _Context) -> Outcome:
        key, epoch, seq = message.fields["producer"]
        producer = self.producers.get(key)
        source = message.fields["source"]
        if producer is None:
            if source is not None:
                return _refused(message, "unknown_producer")
            producer = Producer(epoch=epoch)
        if epoch != producer.epoch:
            return _refused(message, "stale_epoch", epoch=producer.epoch)
        if seq <= producer.seq:
            return Outcome("put", "already", {"seq": producer.seq, **({"added": producer.count} if source is None else {})})
        if seq != producer.seq + 1:
            return _refused(message, "sequence", seq=producer.seq)
        ports = _owned(read_ports(message.fields["ports"], message.blobs))
        wrong = self._wrong_target(ports, source is not None)
        if wrong:
            return _refused(message, *wrong)
        added = 0
        for port, first_blob in ports:
            for name in port.queues:
                added += self._put_port(self.queues[name], port, context, first_blob)
        producer.count = producer.count if source is not None else added
        self._move_producer(key, producer, seq, source, message, context)
        self._maybe_done_all({name for port, _ in ports for name in port.queues}, context, key)
        return Outcome("put", "ok", {"seq": seq, "added": added})

    def _wrong_target(self, ports: list[tuple[Port, int]], from_source: bool) -> tuple[str] | None:
        for port, _ in ports:
            for name in port.queues:
                queue = self.queues.get(name)
                if queue is None:
                    return ("unknown_queue",)
                pipeline = self.pipelines.get(queue.pipeline)
                if queue.closed and not from_source:
                    return ("closed",)
                if queue.read_by and pipeline is not None and pipeline.state != "running":
                    return ("not_running",)
        return None

    def _put_port(self, queue: QueueState, port: Port, context: _Context, first_blob: int) -> int:
        if port.keys is None:
            return self._append(queue, port, context, first_blob)
        fresh: list[tuple[int, str | None]] = []
        for at, key in enumerate(json.loads(bytes(port.keys))):
            if key is None:
                fresh.append((at, key))
                continue
            digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest not in queue.keys:
                queue.keys.add(digest)
                self._touch("keys", (queue.name, digest))
                fresh.append((at, key))
        if len(fresh) * 4 == len(port.lengths):
            return self._append(queue, port, context, first_blob)
        return self._append_some(queue, port, fresh, context)

    def _append_some(self, queue: QueueState, port: Port, fresh: list[tuple[int, str | None]], context: _Context) -> int:
        """Some of a put are known already. The rest no longer stands in the log as one piece, so it stays in memory until its row has it."""
        if not fresh:
            return 0
        body = pick(port.lengths, port.body, [at for at, _ in fresh])
        keys = json.dumps([key for _, key in fresh]).encode()
        before = queue.next_id
        added = self._append(queue, Port(port.queues, body[0], body[1], None, keys), context, 0)
        self._own_bytes(queue, before, body)
        return added

    def _own_bytes(self, queue: QueueState, first: int, body: tuple[Buffer, Buffer]) -> None:
        (chunk,) = queue.chunks.overlap(first, first + 1)
        if chunk.body is None:
            self.body_memory_bytes += chunk.body_bytes
        chunk.lengths, chunk.body = body
        chunk.entry = 0

    def _move_producer(self, key: str, producer: Producer, seq: int, source: dict[str, Any] | None, message: Message,
                       context: _Context) -> None:
        producer.seq = seq
        producer.at_ms = context.at_ms
        if source is not None:
            producer.count = source.get("count", producer.count)
            producer.hash = source.get("hash", producer.hash)
            producer.finished = bool(source.get("finished", False)) or producer.finished
            if source.get("cursor"):
                producer.cursor = bytes(message.blobs[-1])
        self.producers[key] = producer
        self._touch("producers", key)

    # ---- take, done, release, fail

    def _apply_take(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        fence = Fence(*message.fields["fence"])
        taken = 0
        for lo, hi in message.fields["ranges"]:
            for a, b in queue.ready.remove(lo, hi):
                queue.leases.add(a, b, fence)
                taken += b - a
        self._touch("leases", queue.name)
        return Outcome("take", "ok" if taken else "already", {"count": taken})

    def _apply_done(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        ranges = [(lo, hi) for lo, hi in message.fields["ranges"]]
        ports = _owned(read_ports(message.fields["ports"], message.blobs))
        if any(name not in self.queues for port, _ in ports for name in port.queues):
            return _refused(message, "unknown_queue")
        found = [part for lo, hi in ranges for part in queue.open_ranges(lo, hi)]
        count = sum(hi - lo for lo, hi in found)
        if not count:
            return Outcome("done", "already", {"count": 0})
        partial = count != sum(hi - lo for lo, hi in ranges)
        if partial and message.fields["whole"]:
            self._release_found(queue, found)
            return _refused(message, "divided")
        chosen = positions(ranges, found) if partial else None
        for lo, hi in found:
            self._take_out(queue, lo, hi)
            self._finish(queue, lo, hi)
        queue.done += count
        self._touch("queues", queue.name)
        self._emit(ports, chosen, context)
        self._maybe_done(queue.pipeline, context)
        return Outcome("done", "ok", {"count": count})

    def _emit(self, ports: list[tuple[Port, int]], chosen: list[int] | None, context: _Context) -> None:
        for port, first_blob in ports:
            if chosen is None:
                for name in port.queues:
                    self._append(self.queues[name], port, context, first_blob)
                continue
            body = pick(port.lengths, port.body, outputs_of(chosen, port.counts))
            for name in port.queues:
                queue = self.queues[name]
                before = queue.next_id
                if self._append(queue, Port(port.queues, *body), context, first_blob):
                    self._own_bytes(queue, before, body)

    def _release_found(self, queue: QueueState, found: list[Range]) -> int:
        released = 0
        for lo, hi in found:
            for a, b, _ in queue.leases.remove(lo, hi):
                queue.ready.add(a, b)
                released += b - a
        self._touch("leases", queue.name)
        return released

    def _apply_release(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        fence = Fence(*message.fields["fence"])
        found = [(a, b) for lo, hi in message.fields["ranges"] for a, b, held in queue.leases.overlap(lo, hi) if held == fence]
        released = self._release_found(queue, found)
        return Outcome("release", "ok" if released else "already", {"count": released})

    def _apply_fail(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        item_id = message.fields["id"]
        held = queue.leases.overlap(item_id, item_id + 1)
        if not held or held[0][2] != Fence(*message.fields["fence"]):
            return _refused(message, "stale_fence")
        parked = self._count_delivery(queue, item_id, message.fields, context)
        self._maybe_done(queue.pipeline, context)
        return Outcome("fail", "ok", {"parked": parked})

    def _count_delivery(self, queue: QueueState, item_id: int, fields: dict[str, Any], context: _Context) -> bool:
        queue.leases.remove(item_id, item_id + 1)
        deliveries = queue.deliveries.get(item_id, 0) + 1
        self._touch("leases", queue.name)
        self._touch_items(queue, item_id, item_id + 1)
        if deliveries <= self.retries(queue, fields.get("retries", 0)):
            queue.deliveries[item_id] = deliveries
            queue.delayed[item_id] = context.at_ms + fields["delay_ms"]
            return False
        queue.deliveries.pop(item_id, None)
        chunk = self._count_parked(queue, item_id, 1)
        queue.parked[item_id] = Parked(chunk.run, deliveries, context.at_ms, fields["error"])
        self._touch("parked", (queue.name, item_id))
        return True

    def retries(self, queue: QueueState, without_stage: int = 0) -> int:
        """How many deliveries beyond the first an item of the queue gets: its stage says it, or where none reads it, who took it."""
        pipeline = self.pipelines.get(queue.pipeline)
        stage = pipeline.stage(queue.read_by) if pipeline and queue.read_by else None
        return int(stage["retries"]) if stage else without_stage

    def _apply_due(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        ids = [item_id for item_id in message.fields["ids"] if queue.delayed.pop(item_id, None) is not None]
        for item_id in ids:
            queue.ready.add(item_id, item_id + 1)
            self._touch_items(queue, item_id, item_id + 1)
        return Outcome("due", "ok" if ids else "already", {"count": len(ids)})

    def _apply_session_end(self, message: Message, context: _Context) -> Outcome:
        node, boot = message.fields["node"], message.fields["boot"]
        released = counted = 0
        for name, queue in self.queues.items():
            leases = queue.leases.of_session(node, boot)
            ran = self._ran_in(queue, leases, message.fields["ran"])
            for lo, hi, _ in leases:
                for item_id in sorted(i for i in ran if lo <= i < hi):
                    self._count_delivery(queue, item_id, message.fields, context)
                    counted += 1
                released += self._release_found(queue, [(a, b) for a, b, _ in queue.leases.overlap(lo, hi)])
        for name in list(self.pipelines):
            self._maybe_done(name, context)
        return Outcome("session_end", "ok", {"released": released, "counted": counted})

    def _ran_in(self, queue: QueueState, leases: list[tuple[int, int, Fence]], ran: dict[str, list[int]] | None) -> set[int]:
        """Which leased items count a delivery. Where nobody can say what ran, all do that are not on their last one, and those that
        are if they were leased alone."""
        if ran is not None:
            return set(ran.get(queue.name, ()))
        sizes = Counter[Fence]()
        for lo, hi, fence in leases:
            sizes[fence] += hi - lo
        retries = self.retries(queue)
        return {
            item_id for lo, hi, fence in leases for item_id in range(lo, hi)
            if sizes[fence] == 1 or queue.deliveries.get(item_id, 0) < retries
        }

    # ---- parked

    def _apply_retry(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        ids = message.fields["ids"]
        chosen = [i for i in (sorted(queue.parked) if ids is None else dict.fromkeys(ids)) if i in queue.parked]
        for item_id in chosen:
            del queue.parked[item_id]
            self._count_parked(queue, item_id, -1)
            queue.ready.add(item_id, item_id + 1)
            self._touch("parked", (queue.name, item_id))
            self._touch_items(queue, item_id, item_id + 1)
        pipeline = self.pipelines.get(queue.pipeline)
        if chosen and pipeline and pipeline.state == "done" and queue.read_by:
            pipeline.state = "running"
            self._touch("projects", pipeline.name)
        return Outcome("retry", "ok" if chosen else "already", {"count": len(chosen)})

    def _apply_discard(self, message: Message, context: _Context) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        ids = message.fields["ids"]
        count = self._discard_all(queue) if ids is None else self._discard_parked(queue, ids)
        self._maybe_done(queue.pipeline, context)
        return Outcome("discard", "ok" if count else "already", {"count": count})

    def _discard_parked(self, queue: QueueState, ids: Iterable[int]) -> int:
        chosen = [i for i in ids if queue.parked.pop(i, None) is not None]
        for item_id in chosen:
            self._touch("parked", (queue.name, item_id))
            self._count_parked(queue, item_id, -1)
            self._finish(queue, item_id, item_id + 1)
        return len(chosen)

    def _discard_all(self, queue: QueueState) -> int:
        count = self._discard_parked(queue, list(queue.parked))
        for lo, hi in self._take_out(queue, 1, queue.next_id):
            self._finish(queue, lo, hi)
            count += hi - lo
        return count

    # ---- projects and runs

    def _apply_bundle_part(self, message: Message, context: _Context) -> Outcome:
        key = (message.fields["version"], message.fields["part"])
        if key in self.bundles:
            return Outcome("bundle_part", "already")
        (body,) = message.blobs
        self.bundles[key] = BundlePart(message.fields["parts"], context.index, context.blob_offset(0), len(body), crc32(body))
        self._touch("bundles", key)
        return Outcome("bundle_part", "ok")

    def bundle_parts(self, version: str) -> list[BundlePart] | None:
        """The parts of a version in order, or None when one is missing."""
        first = self.bundles.get((version, 0))
        if first is None:
            return None
        parts = [self.bundles.get((version, part)) for part in range(first.parts)]
        return None if any(part is None for part in parts) else [part for part in parts if part]

    def _apply_deploy(self, message: Message, context: _Context) -> Outcome:
        fields = message.fields
        if self.bundle_parts(fields["version"]) is None:
            return _refused(message, "parts_missing")
        name = fields["pipeline"]
        old = self.pipelines.get(name)
        new = PipelineState(name, fields["version"], fields["origin"], fields["manifest"], fields["files"], fields["zip_sha256"],
                            fields["project"])
        if old is not None:
            new.run, new.state, new.params, new.on_done_run = old.run, old.state, old.params, old.on_done_run
            new.started_ms, new.done_ms, new.totals = old.started_ms, old.done_ms, old.totals
            new.previous = [old.version, *old.previous][:2] if old.version != new.version else old.previous
            _keep_controls(old, new)
        self.pipelines[name] = new
        self._touch("projects", name)
        self._wire(new)
        self._forget_bundles()
        self._maybe_done(name, context)
        return Outcome("deploy", "ok", {"run": new.run, "state": new.state})

    def _forget_bundles(self) -> None:
        """The last two versions of each pipeline stay."""
        kept = {v for p in self.pipelines.values() for v in (p.version, *p.previous[:1])}
        for key in [key for key in self.bundles if key[0] not in kept]:
            del self.bundles[key]
            self._touch("bundles", key)

    def _apply_start_run(self, message: Message, context: _Context) -> Outcome:
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return _refused(message, "unknown_pipeline")
        if pipeline.state == "running":
            return _refused(message, "running", run=pipeline.run)
        self._forget_producers([key for key in self.producers if key.startswith(f"source:{pipeline.name}/")])
        for queue in self.queues.values():
            if queue.pipeline == pipeline.name:
                self._begin_queue(queue)
        pipeline.run += 1
        pipeline.state = "running"
        pipeline.params = message.fields["params"]
        pipeline.started_ms, pipeline.done_ms = context.at_ms, 0
        self._touch("projects", pipeline.name)
        self._maybe_done(pipeline.name, context)
        return Outcome("start_run", "ok", {"run": pipeline.run})

    def _begin_queue(self, queue: QueueState) -> None:
        queue.closed = False
        if queue.keys:
            queue.keys.clear()
            self._cleared_keys.add(queue.name)
            self._dirty["keys"] = {key for key in self._dirty.get("keys", ()) if key[0] != queue.name}
        if queue.results:
            self._discard_all(queue)
        self._touch("queues", queue.name)

    def _apply_assign(self, message: Message, context: _Context) -> Outcome:
        fields = message.fields
        pipeline = self.pipelines.get(fields["pipeline"])
        stage = pipeline.stage(fields["stage"]) if pipeline else None
        if pipeline is None or stage is None or pipeline.state != "running":
            return _refused(message, "not_running")
        key = pipeline.source_key(fields["stage"], fields["shard"])
        producer = self.producers.setdefault(key, Producer())
        if producer.finished:
            return Outcome("assign", "already", {"finished": True})
        producer.epoch += 1
        producer.node, producer.boot = fields["node"], fields["boot"]
        self._touch("producers", key)
        return Outcome("assign", "ok", {
            "producer": key, "epoch": producer.epoch, "seq": producer.seq, "count": producer.count, "hash": producer.hash,
        }, producer.cursor)

    def _apply_close(self, message: Message, context: _Context) -> Outcome:
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return _refused(message, "unknown_pipeline")
        name = message.fields["name"]
        stage = pipeline.stage(name)
        queue = self.queues.get(pipeline.full(name))
        if stage and stage["kind"] == "source":
            for shard in range(shards_of(stage)):
                key = pipeline.source_key(name, shard)
                producer = self.producers.setdefault(key, Producer())
                producer.epoch += 1
                producer.finished = True
                self._touch("producers", key)
        elif queue is not None:
            queue.closed = True
            self._touch("queues", queue.name)
        else:
            return _refused(message, "unknown_name")
        self._maybe_done(pipeline.name, context)
        return Outcome("close", "ok")

    # ---- what people say at run time, over what the code says

    def _apply_pause(self, message: Message, context: _Context) -> Outcome:
        """A stage, or all, are given nothing from here on. With a reason the stage stopped by itself; a person's word outlasts that."""
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return _refused(message, "unknown_pipeline")
        stage, reason = message.fields["stage"], message.fields["reason"]
        if stage is not None and pipeline.stage(stage) is None:
            return _refused(message, "unknown_name")
        if pipeline.paused.get(stage or "") in ("", reason):
            return Outcome("pause", "already")
        pipeline.paused[stage or ""] = reason
        self._touch("projects", pipeline.name)
        return Outcome("pause", "ok")

    def _apply_resume(self, message: Message, context: _Context) -> Outcome:
        """Takes back the one pause that is named; of those that are left, the outcome tells."""
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return _refused(message, "unknown_pipeline")
        stage = message.fields["stage"]
        if stage is not None and pipeline.stage(stage) is None:
            return _refused(message, "unknown_name")
        found = pipeline.paused.pop(stage or "", None)
        self._touch("projects", pipeline.name)
        return Outcome("resume", "already" if found is None else "ok", {"left": sorted(pipeline.paused)})

    def _apply_scale(self, message: Message, context: _Context) -> Outcome:
        """So many processes, whatever the code says; None: what the code says. A source's processes are its shards, which stay."""
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return _refused(message, "unknown_pipeline")
        stage = pipeline.stage(message.fields["stage"])
        if stage is None:
            return _refused(message, "unknown_name")
        if stage["kind"] == "source":
            return _refused(message, "source")
        before, count = pipeline.scaled.get(stage["name"]), message.fields["processes"]
        if count == before:
            return Outcome("scale", "already")
        if count is None:
            del pipeline.scaled[stage["name"]]
        else:
            pipeline.scaled[stage["name"]] = count
        self._touch("projects", pipeline.name)
        return Outcome("scale", "ok")

    def _apply_on_done_ran(self, message: Message, context: _Context) -> Outcome:
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None or message.fields["run"] <= pipeline.on_done_run:
            return Outcome("on_done_ran", "already")
        pipeline.on_done_run = message.fields["run"]
        self._touch("projects", pipeline.name)
        return Outcome("on_done_ran", "ok")

    def _apply_forget(self, message: Message, context: _Context) -> Outcome:
        self._forget_producers(message.fields["producers"])
        return Outcome("forget", "ok")

    def _forget_producers(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.producers.pop(key, None) is not None:
                self._touch("producers", key)

    def _apply_member(self, message: Message, context: _Context) -> Outcome:
        self.members[message.fields["node"]] = {"name": message.fields["name"], "facts": message.fields["facts"]}
        self._touch("members", message.fields["node"])
        return Outcome("member", "ok")

    def forget_members_but(self, node: str) -> None:
        """For a new generation only: the others are of the old one, and come back as new nodes."""
        for other in [member for member in self.members if member != node]:
            del self.members[other]
            self._touch("members", other)

    def _apply_member_left(self, message: Message, context: _Context) -> Outcome:
        if self.members.pop(message.fields["node"], None) is None:
            return Outcome("member_left", "already")
        self._touch("members", message.fields["node"])
        return Outcome("member_left", "ok")

    # ---- two clusters of one name

    def _apply_accept(self, message: Message, context: _Context) -> Outcome:
        """Another cluster may dissolve into this one, which therefore dissolves no more."""
        self.accepted.add(message.fields["cluster"])
        self._touch("clusters", message.fields["cluster"])
        return Outcome("accept", "ok")

    def _apply_dissolve(self, message: Message, context: _Context) -> Outcome:
        """Nothing was put here and nobody counts on this cluster: from here on everything is refused."""
        if self.has_work:
            return _refused(message, "has_work")
        if self.accepted:
            return _refused(message, "accepted_another")
        self.moved_to = message.fields["into"]
        self._touch("clusters", self.moved_to)
        return Outcome("dissolve", "ok")

    @property
    def has_work(self) -> bool:
        """Whether anything was ever put here."""
        return any(queue.put for queue in self.queues.values())

    def _moved(self, message: Message) -> Outcome:
        return _refused(message, "moved", into=self.moved_to)

    # ---- done

    def source_finished(self, pipeline: PipelineState, stage: dict[str, Any]) -> bool:
        """Every shard of the source has ended, or was closed."""
        keys = (pipeline.source_key(stage["name"], shard) for shard in range(shards_of(stage)))
        return all(key in self.producers and self.producers[key].finished for key in keys)

    def _maybe_done_all(self, queues: set[str], context: _Context, producer: str) -> None:
        names = {self.queues[name].pipeline for name in queues}
        if producer.startswith("source:"):
            names.add(producer[len("source:") :].partition("/")[0])
        for name in names:
            self._maybe_done(name, context)

    def _maybe_done(self, name: str, context: _Context) -> None:
        pipeline = self.pipelines.get(name)
        if pipeline is None or pipeline.state != "running":
            return
        if not all(self.source_finished(pipeline, stage) for stage in pipeline.sources):
            return
        for record in pipeline.manifest["queues"]:
            queue = self.queues[pipeline.full(record["name"])]
            if record["read_by"] and queue.open_count:
                return
            if record["outside"] and record["read_by"] and not queue.closed:
                return
        pipeline.state = "done"
        pipeline.done_ms = context.at_ms
        self._touch("projects", name)

    def parked_of_run(self, pipeline: PipelineState) -> int:
        """How many items of the pipeline's current run are parked."""
        return sum(
            1 for queue in self.queues.values() if queue.pipeline == pipeline.name
            for parked in queue.parked.values() if parked.run == pipeline.run
        )


@dataclass(frozen=True, slots=True)
class _Context:
    """Where a command stands: which entry, when, and where its blobs begin in the entry's body."""

    index: int
    at_ms: int
    blobs_at: int
    blobs: tuple[Buffer, ...]

    def blob_offset(self, number: int) -> int:
        return self.blobs_at + sum(len(blob) for blob in self.blobs[:number])


def _keep_controls(old: PipelineState, new: PipelineState) -> None:
    """What people said at run time holds in a new version too, as long as the stage is there. A stage that stopped by itself runs again: the
    version may have been made for that."""
    is_same = old.version == new.version
    new.paused = {name: reason for name, reason in old.paused.items() if (is_same or not reason) and (not name or new.stage(name))}
    kinds = {stage["name"]: stage["kind"] for stage in new.manifest["stages"]}
    new.scaled = {name: count for name, count in old.scaled.items() if kinds.get(name, "source") != "source"}


def _owned(ports: list[tuple[Port, int]]) -> list[tuple[Port, int]]:
    """The ports with bytes of their own, once for all their queues: a view would keep the whole entry in memory, megabytes maybe, for as
    long as one small item of it waits."""
    return [(port._replace(lengths=bytes(port.lengths), body=bytes(port.body)), first) for port, first in ports]
