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
from itertools import takewhile
from typing import Any

from p2pcluster.core import pacing
from p2pcluster.core.chunks import Chunk, outputs_of, pick, positions
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.commands import ONCE, Port, decode_commands, read_ports
from p2pcluster.core.delays import by_clock
from p2pcluster.core.deployments import Deployments
from p2pcluster.core.ranges import Fence, Range, RangeSet
from p2pcluster.core.records import Applying, Outcome, Parked, Parts, PipelineState, Producer, QueueState, shards_of, source_of, within

_OUTCOMES = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _refused(message: Message, code: str, **fields: Any) -> Outcome:
    return Outcome(message.kind, "refused", {"code": code, **fields})


class State(Deployments):
    """The replicated state; see the module. `body_memory_bytes_max` bounds the bytes of items that this node keeps at hand."""

    def __init__(self, body_memory_bytes_max: int = 1 << 62) -> None:
        super().__init__()
        self.body_memory_bytes_max = body_memory_bytes_max
        self.body_memory_bytes = 0
        self._handlers: dict[str, Callable[[Message, Applying], Outcome]] = {
            "put": self._apply_put,
            "done": self._apply_done,
            "part": self._apply_part,
            "take": self._apply_take,
            "release": self._apply_release,
            "fail": self._apply_fail,
            "due": self._apply_due,
            "session_end": self._apply_session_end,
            "retry": self._apply_retry,
            "discard": self._apply_discard,
            "bundle_part": self._apply_bundle_part,
            "deploy": self._apply_deploy,
            "roll": self._apply_roll,
            "rolled_out": self._apply_rolled_out,
            "roll_back": self._apply_roll_back,
            "undeploy": self._apply_undeploy,
            "forget_uploads": self._apply_forget_uploads,
            "start_run": self._apply_start_run,
            "assign": self._apply_assign,
            "close": self._apply_close,
            "pause": self._apply_pause,
            "resume": self._apply_resume,
            "scale": self._apply_scale,
            "on_done_ran": self._apply_on_done_ran,
            "forget": self._apply_forget,
            "forget_keys": self._apply_forget_keys,
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
            context = Applying(index, at_ms, offset, message.blobs)
            outcome = self._once(message, context) if self.moved_to is None else self._moved(message)
            self._mix(outcome)
            outcomes.append(outcome)
        self.skip(index, term, at_ms)
        return outcomes

    def _once(self, message: Message, context: Applying) -> Outcome:
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

    def _append(self, queue: QueueState, port: Port, context: Applying, first_blob: int) -> int:
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
        if port.delay_ms is None and port.at_ms is None:
            queue.ready.add(chunk.first, chunk.end)
        else:
            queue.delayed.put_off(chunk.first, chunk.end, _due_of(port, context))
        queue.next_id += count
        queue.put += count
        queue.open_bytes += body_bytes
        self._touch("queues", queue.name)
        self._touch("chunks", (queue.name, chunk.first))
        return count

    def discount_body(self, chunk: Chunk) -> None:
        """The chunk is out of the state, and its bytes count no more. They stay with it: a grant that is on its way out may name it, and the
        journal may not have them."""
        if chunk.body is not None:
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
        self.discount_body(chunk)
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
        if queue.parts:
            self._withdraw(queue, lo, hi)
        return found

    def _touch_items(self, queue: QueueState, lo: int, hi: int) -> None:
        for chunk in queue.chunks.overlap(lo, hi):
            self._touch("chunks", (queue.name, chunk.first))

    # ---- put

    def _apply_put(self, message: Message, context: Applying) -> Outcome:
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
        if producer.finished:
            return _refused(message, "finished", seq=producer.seq)
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
        if source is not None and self.source_intervals_ns:
            self._pace_source(key, ports, context)
        if source is not None and "tick_ms" in source:
            self._note_tick(key, source["tick_ms"])
        self._maybe_done_all({name for port, _ in ports for name in port.queues}, context, key)
        return Outcome("put", "ok", {"seq": seq, "added": added})

    def _pace_source(self, key: str, ports: list[tuple[Port, int]], context: Applying) -> None:
        pipeline, stage = source_of(key)
        interval_ns = self.source_intervals_ns.get(f"{pipeline}/{stage}", 0)
        if interval_ns and pipeline in self.pipelines:
            self._pace(pipeline, stage, interval_ns, sum(len(port.lengths) // 4 for port, _ in ports), context)

    def _note_tick(self, key: str, at_ms: int) -> None:
        pipeline = self.pipelines.get(source_of(key)[0])
        if pipeline is not None:
            pipeline.ticks["/".join(key.split("/")[2:])] = at_ms
            self._touch("projects", pipeline.name)

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

    def _put_port(self, queue: QueueState, port: Port, context: Applying, first_blob: int) -> int:
        if port.keys is None:
            return self._append(queue, port, context, first_blob)
        fresh: list[tuple[int, str | None]] = []
        for at, key in enumerate(json.loads(bytes(port.keys))):
            if key is None:
                fresh.append((at, key))
                continue
            digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest not in queue.keys:
                queue.keys[digest] = context.at_ms
                self._touch("keys", (queue.name, digest))
                fresh.append((at, key))
        if len(fresh) * 4 == len(port.lengths):
            return self._append(queue, port, context, first_blob)
        return self._append_some(queue, port, fresh, context)

    def _append_some(self, queue: QueueState, port: Port, fresh: list[tuple[int, str | None]], context: Applying) -> int:
        """Some of a put are known already. The rest no longer stands in the log as one piece, so it stays in memory until its row has it."""
        if not fresh:
            return 0
        body = pick(port.lengths, port.body, [at for at, _ in fresh])
        keys = json.dumps([key for _, key in fresh]).encode()
        before = queue.next_id
        added = self._append(queue, port._replace(lengths=body[0], body=body[1], keys=keys), context, 0)
        self._own_bytes(queue, before, body)
        return added

    def _own_bytes(self, queue: QueueState, first: int, body: tuple[Buffer, Buffer]) -> None:
        (chunk,) = queue.chunks.overlap(first, first + 1)
        if chunk.body is None:
            self.body_memory_bytes += chunk.body_bytes
        chunk.lengths, chunk.body = body
        chunk.entry = 0

    def _move_producer(self, key: str, producer: Producer, seq: int, source: dict[str, Any] | None, message: Message,
                       context: Applying) -> None:
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

    def _apply_take(self, message: Message, context: Applying) -> Outcome:
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
        if queue.interval_ns and queue.read_by:
            self._pace(queue.pipeline, queue.read_by, queue.interval_ns, taken, context)
        return Outcome("take", "ok" if taken else "already", {"count": taken})

    def _pace(self, pipeline: str, stage: str, interval_ns: int, count: int, context: Applying) -> None:
        """So much went through a stage with a rate: in the log, so that the next leader goes on where this one was."""
        paced = self.pipelines[pipeline].paced
        paced[stage] = pacing.taken(paced.get(stage, 0), interval_ns, context.at_ms, count)
        self._touch("projects", pipeline)

    def _apply_done(self, message: Message, context: Applying) -> Outcome:
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
        if message.fields["whole"] and (code := self._why_not_whole(queue, message, partial)):
            return self._refuse_whole(queue, message, code)
        chosen = positions(ranges, found) if partial else None
        for lo, hi in found:
            self._take_out(queue, lo, hi)
            self._finish(queue, lo, hi)
        queue.done += count
        self._touch("queues", queue.name)
        self._emit(ports, chosen, context)
        self._maybe_done(queue.pipeline, context)
        return Outcome("done", "ok", {"count": count})

    def _why_not_whole(self, queue: QueueState, message: Message, partial: bool) -> str | None:
        """Why a `done` whose inputs cannot be told apart does not count; one that does is left with its parts to be seen."""
        if partial:
            return "divided"
        named = message.fields.get("parts", 0)
        if not named:
            return None
        first = message.fields["ranges"][0][0]
        held, parts = queue.leases.overlap(first, first + 1), queue.parts.get(first)
        if not held or held[0][2] != Fence(*message.fields["fences"][0]):
            return "stale_fence"
        if parts is None or parts.count != named:
            return "parts_missing"
        self._reveal(queue, first)
        return None

    def _refuse_whole(self, queue: QueueState, message: Message, code: str) -> Outcome:
        """What its sender still holds of the inputs goes back, and no delivery counts."""
        for (lo, hi), fence in zip(message.fields["ranges"], message.fields.get("fences", ()), strict=False):
            self._release_found(queue, [(a, b) for a, b, held in queue.leases.overlap(lo, hi) if held == Fence(*fence)])
        return _refused(message, code)

    # ---- outputs in parts

    def _apply_part(self, message: Message, context: Applying) -> Outcome:
        """Outputs that are in the log before their item is done. They take ids and room, and are in no state."""
        queue = self.queues.get(message.fields["queue"])
        ports = _owned(read_ports(message.fields["ports"], message.blobs))
        if queue is None or not all(self._is_beside(queue, name) for port, _ in ports for name in port.queues):
            return _refused(message, "unknown_queue")
        item_id, number = message.fields["id"], message.fields["part"]
        held = queue.leases.overlap(item_id, item_id + 1)
        if not held or held[0][2] != Fence(*message.fields["fence"]):
            return _refused(message, "stale_fence")
        if number == 0:
            self._withdraw(queue, item_id, item_id + 1)
        known = queue.parts.get(item_id, Parts(0, []))
        if number < known.count:
            return Outcome("part", "already", {"parts": known.count})
        if number > known.count:
            return _refused(message, "sequence", parts=known.count)
        queue.parts[item_id] = Parts(number + 1, known.spans + self._hide(ports, context))
        self._touch("parts", (queue.name, item_id))
        return Outcome("part", "ok", {"parts": number + 1})

    def _is_beside(self, queue: QueueState, name: str) -> bool:
        """Whether there is such a queue, of the same pipeline: what is hidden goes when the pipeline does."""
        return name in self.queues and self.queues[name].pipeline == queue.pipeline

    def _hide(self, ports: list[tuple[Port, int]], context: Applying) -> list[tuple[str, int, int]]:
        spans = []
        for port, first_blob in ports:
            for name in port.queues:
                target = self.queues[name]
                first = target.next_id
                count = self._append(target, port, context, first_blob)
                target.ready.remove(first, first + count)
                target.hidden.add(first, first + count)
                target.put -= count
                spans.append((name, first, count))
        return spans

    def _reveal(self, queue: QueueState, item_id: int) -> None:
        """The item is done: what it emitted in parts is there at once."""
        for name, first, count in queue.parts.pop(item_id).spans:
            target = self.queues[name]
            target.hidden.remove(first, first + count)
            target.ready.add(first, first + count)
            target.put += count
            self._touch("queues", name)
        self._touch("parts", (queue.name, item_id))

    def _withdraw(self, queue: QueueState, lo: int, hi: int) -> None:
        """The items of `[lo, hi)` are no longer held by whoever emitted parts for them: those vanish, and their ids are never used."""
        for item_id in within(queue.parts, lo, hi):
            for name, first, count in queue.parts.pop(item_id).spans:
                target = self.queues[name]
                target.hidden.remove(first, first + count)
                self._finish(target, first, first + count)
            self._touch("parts", (queue.name, item_id))

    def _emit(self, ports: list[tuple[Port, int]], chosen: list[int] | None, context: Applying) -> None:
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
            if queue.parts:
                self._withdraw(queue, lo, hi)
        self._touch("leases", queue.name)
        return released

    def _apply_release(self, message: Message, context: Applying) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        fence = Fence(*message.fields["fence"])
        found = [(a, b) for lo, hi in message.fields["ranges"] for a, b, held in queue.leases.overlap(lo, hi) if held == fence]
        released = self._release_found(queue, found)
        return Outcome("release", "ok" if released else "already", {"count": released})

    def _apply_fail(self, message: Message, context: Applying) -> Outcome:
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

    def _count_delivery(self, queue: QueueState, item_id: int, fields: dict[str, Any], context: Applying, in_company: bool = False) -> bool:
        """Whether the item is parked for it. One that ran in company never is: nobody knows which of them did the harm."""
        queue.leases.remove(item_id, item_id + 1)
        if queue.parts:
            self._withdraw(queue, item_id, item_id + 1)
        deliveries = queue.deliveries.get(item_id, 0) + 1
        self._touch("leases", queue.name)
        self._touch_items(queue, item_id, item_id + 1)
        if in_company or deliveries <= self.retries(queue, fields.get("retries", 0)):
            queue.deliveries[item_id] = deliveries
            queue.delayed[item_id] = context.at_ms + fields["delay_ms"]
            return False
        queue.deliveries.pop(item_id, None)
        chunk = self._count_parked(queue, item_id, 1)
        queue.parked[item_id] = Parked(chunk.run, deliveries, context.at_ms, fields["error"])
        self._touch("parked", (queue.name, item_id))
        self._count_share(queue)
        return True

    def _count_share(self, queue: QueueState) -> None:
        """A stage of whose last items more were parked than its version states stops, until somebody or a new version lets it go on."""
        pipeline = self.pipelines.get(queue.pipeline)
        share = pipeline.shares.get(queue.read_by or "") if pipeline else None
        stage = pipeline.stage(queue.read_by or "") if pipeline and share else None
        if pipeline is None or share is None or stage is None:
            return
        share = pipeline.shares[stage["name"]] = share.with_parked(queue.done)
        why = share.why_stop(stage, queue.done)
        if why is not None:
            pipeline.paused.setdefault(stage["name"], why)
        self._touch("projects", pipeline.name)

    def retries(self, queue: QueueState, without_stage: int = 0) -> int:
        """How many deliveries beyond the first an item of the queue gets: its stage says it, or where none reads it, who took it."""
        pipeline = self.pipelines.get(queue.pipeline)
        stage = pipeline.stage(queue.read_by) if pipeline and queue.read_by else None
        return int(stage["retries"]) if stage else without_stage

    def _apply_due(self, message: Message, context: Applying) -> Outcome:
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        ids = [item_id for item_id in message.fields["ids"] if queue.delayed.pop(item_id, None) is not None]
        for item_id in ids:
            queue.ready.add(item_id, item_id + 1)
            self._touch_items(queue, item_id, item_id + 1)
        return Outcome("due", "ok" if ids else "already", {"count": len(ids)})

    def _apply_session_end(self, message: Message, context: Applying) -> Outcome:
        node, boot = message.fields["node"], message.fields["boot"]
        released = counted = 0
        for name, queue in self.queues.items():
            leases = queue.leases.of_session(node, boot)
            ran, in_company = self._ran_in(queue, leases, message.fields["ran"])
            for lo, hi, _ in leases:
                for item_id in sorted(i for i in ran if lo <= i < hi):
                    self._count_delivery(queue, item_id, message.fields, context, item_id in in_company)
                    counted += 1
                released += self._release_found(queue, [(a, b) for a, b, _ in queue.leases.overlap(lo, hi)])
        for name in list(self.pipelines):
            self._maybe_done(name, context)
        return Outcome("session_end", "ok", {"released": released, "counted": counted})

    def _ran_in(self, queue: QueueState, leases: list[tuple[int, int, Fence]], ran: dict[str, list[Any]] | None) -> tuple[set[int], set[int]]:
        """Which leased items count a delivery, and which of those ran in one process together. Where nobody can say what ran, all do that
        are not on their last one, and those that are if they were leased alone."""
        if ran is not None:
            told = ran.get(queue.name, ())
            together = RangeSet(span for span in told if not isinstance(span, int))
            in_company = {item_id for lo, hi, _ in leases for a, b in together.overlap(lo, hi) for item_id in range(a, b)}
            return in_company | {item_id for item_id in told if isinstance(item_id, int)}, in_company
        sizes = Counter[Fence]()
        for lo, hi, fence in leases:
            sizes[fence] += hi - lo
        retries = self.retries(queue)
        return {
            item_id for lo, hi, fence in leases for item_id in range(lo, hi)
            if sizes[fence] == 1 or queue.deliveries.get(item_id, 0) < retries
        }, set()

    # ---- parked

    def _apply_retry(self, message: Message, context: Applying) -> Outcome:
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

    def _apply_discard(self, message: Message, context: Applying) -> Outcome:
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

    def _apply_start_run(self, message: Message, context: Applying) -> Outcome:
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
        pipeline.ticks = {}
        self._begin_shares(pipeline)
        pipeline.started_ms, pipeline.done_ms = context.at_ms, 0
        pipeline.totals = {record["name"]: self.queues[pipeline.full(record["name"])].done for record in pipeline.manifest["queues"]
                           if record["read_by"]}
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

    def _apply_assign(self, message: Message, context: Applying) -> Outcome:
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

    def _apply_close(self, message: Message, context: Applying) -> Outcome:
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

    def _apply_pause(self, message: Message, context: Applying) -> Outcome:
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

    def _apply_resume(self, message: Message, context: Applying) -> Outcome:
        """Takes back the one pause that is named; of those that are left, the outcome tells."""
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return _refused(message, "unknown_pipeline")
        stage = message.fields["stage"]
        if stage is not None and pipeline.stage(stage) is None:
            return _refused(message, "unknown_name")
        found = pipeline.paused.pop(stage or "", None)
        self._begin_shares(pipeline, stage)
        self._touch("projects", pipeline.name)
        return Outcome("resume", "already" if found is None else "ok", {"left": sorted(pipeline.paused)})

    def _apply_scale(self, message: Message, context: Applying) -> Outcome:
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

    def _apply_on_done_ran(self, message: Message, context: Applying) -> Outcome:
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None or message.fields["run"] <= pipeline.on_done_run:
            return Outcome("on_done_ran", "already")
        pipeline.on_done_run = message.fields["run"]
        self._touch("projects", pipeline.name)
        return Outcome("on_done_ran", "ok")

    def _apply_forget(self, message: Message, context: Applying) -> Outcome:
        self._forget_producers(message.fields["producers"])
        return Outcome("forget", "ok")

    def _apply_forget_keys(self, message: Message, context: Applying) -> Outcome:
        """Keys that came before a time may come again."""
        queue = self.queues.get(message.fields["queue"])
        if queue is None:
            return _refused(message, "unknown_queue")
        old = list(takewhile(lambda digest: queue.keys[digest] < message.fields["before_ms"], queue.keys))
        for digest in old:
            del queue.keys[digest]
            self._touch("keys", (queue.name, digest))
        return Outcome("forget_keys", "ok" if old else "already", {"count": len(old)})

    def _forget_producers(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.producers.pop(key, None) is not None:
                self._touch("producers", key)

    def _apply_member(self, message: Message, context: Applying) -> Outcome:
        self.members[message.fields["node"]] = {"name": message.fields["name"], "facts": message.fields["facts"]}
        self._touch("members", message.fields["node"])
        return Outcome("member", "ok")

    def forget_members_but(self, node: str) -> None:
        """For a new generation only: the others are of the old one, and come back as new nodes."""
        for other in [member for member in self.members if member != node]:
            del self.members[other]
            self._touch("members", other)

    def _apply_member_left(self, message: Message, context: Applying) -> Outcome:
        if self.members.pop(message.fields["node"], None) is None:
            return Outcome("member_left", "already")
        self._touch("members", message.fields["node"])
        return Outcome("member_left", "ok")

    # ---- two clusters of one name

    def _apply_accept(self, message: Message, context: Applying) -> Outcome:
        """Another cluster may dissolve into this one, which therefore dissolves no more."""
        self.accepted.add(message.fields["cluster"])
        self._touch("clusters", message.fields["cluster"])
        return Outcome("accept", "ok")

    def _apply_dissolve(self, message: Message, context: Applying) -> Outcome:
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
        return bool(self.ended) or any(queue.put for queue in self.queues.values())

    def _moved(self, message: Message) -> Outcome:
        return _refused(message, "moved", into=self.moved_to)

    # ---- done

    def source_finished(self, pipeline: PipelineState, stage: dict[str, Any]) -> bool:
        """Every shard of the source has ended, or was closed."""
        keys = (pipeline.source_key(stage["name"], shard) for shard in range(shards_of(stage)))
        return all(key in self.producers and self.producers[key].finished for key in keys)

    def _maybe_done_all(self, queues: set[str], context: Applying, producer: str) -> None:
        names = {self.queues[name].pipeline for name in queues}
        if producer.startswith("source:"):
            names.add(producer[len("source:") :].partition("/")[0])
        for name in names:
            self._maybe_done(name, context)

    def _maybe_done(self, name: str, context: Applying) -> None:
        pipeline = self.pipelines.get(name)
        if pipeline is None or pipeline.state != "running":
            return
        if not all(self.source_finished(pipeline, stage) for stage in pipeline.sources):
            return
        for record in (record for manifest in pipeline.manifests[:-1] for record in manifest["queues"]):
            if record["read_by"] and self.queues[pipeline.full(record["name"])].open_count:
                return  # nodes that run the former version still do something about these
        for record in pipeline.manifest["queues"]:
            queue = self.queues[pipeline.full(record["name"])]
            if record["read_by"] and queue.open_count:
                return
            if record["outside"] and record["read_by"] and not queue.closed:
                return
        pipeline.state = "done"
        pipeline.done_ms = context.at_ms
        self._touch("projects", name)

    def totals_of_run(self, pipeline: PipelineState) -> dict[str, dict[str, int]]:
        """By stage, how many items of the current run it has done, or as a source emitted, and how many are parked."""
        totals = {}
        for stage in pipeline.manifest["stages"]:
            if stage["reads"] is None:
                keys = [pipeline.source_key(stage["name"], shard) for shard in range(shards_of(stage))]
                totals[stage["name"]] = {"done": sum(self.producers[key].count for key in keys if key in self.producers), "parked": 0}
                continue
            queue = self.queues[pipeline.full(stage["reads"])]
            parked = sum(1 for parked in queue.parked.values() if parked.run == pipeline.run)
            totals[stage["name"]] = {"done": queue.done - pipeline.totals.get(stage["reads"], 0), "parked": parked}
        return totals

    def parked_of_run(self, pipeline: PipelineState, run: int | None = None) -> int:
        """How many items of a run of the pipeline are parked, of the current one without `run`."""
        wanted = pipeline.run if run is None else run
        return sum(
            1 for queue in self.queues.values() if queue.pipeline == pipeline.name
            for parked in queue.parked.values() if parked.run == wanted
        )


def _due_of(port: Port, context: Applying) -> int:
    return context.at_ms + port.delay_ms if port.delay_ms is not None else by_clock(port.at_ms or 0)


def _owned(ports: list[tuple[Port, int]]) -> list[tuple[Port, int]]:
    """The ports with bytes of their own, once for all their queues: a view would keep the whole entry in memory, megabytes maybe, for as
    long as one small item of it waits."""
    return [(port._replace(lengths=bytes(port.lengths), body=bytes(port.body)), first) for port, first in ports]
