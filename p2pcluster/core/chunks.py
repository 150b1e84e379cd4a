"""Chunks: consecutive items that came together, and the values of a blob; how they are cut, picked from and laid together.

How chunks lie is each node's own affair and no part of the replicated state. What state their items are in is decided in `queues`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from p2pcluster.config import CHUNK_BYTES_TARGET, CHUNK_ITEMS_TARGET
from p2pcluster.core.codec import Buffer
from p2pcluster.core.commands import lengths_blob, lengths_of
from p2pcluster.core.ranges import Range, RangeSet


class Chunk:
    """Consecutive items of one queue and where their bytes are.

    `lengths` and `body` are None when they were dropped from memory; then they stand at `offset` of the log's entry `entry`, or
    in the chunk's own row when `body_crc` is set. `open` counts the items that are not finished, `parked` those of them that are
    out of the way.
    """

    __slots__ = ("at_ms", "body", "body_bytes", "body_crc", "count", "cut", "entry", "first", "keys", "lengths", "offset",
                 "open", "parked", "persisted", "run")

    def __init__(self, first: int, count: int, run: int, at_ms: int, lengths: Buffer | None, body: Buffer | None,
                 body_bytes: int, entry: int, offset: int, keys: Buffer | None) -> None:
        self.first = first
        self.count = count
        self.run = run
        self.at_ms = at_ms
        self.lengths = lengths
        self.body = body
        self.body_bytes = body_bytes
        self.body_crc: int | None = None
        self.entry = entry
        self.offset = offset
        self.keys = keys
        self.open = count
        self.parked = 0
        self.persisted = False
        self.cut = (0, 0)

    @property
    def end(self) -> int:
        return self.first + self.count

    @property
    def open_bytes(self) -> int:
        """About the bytes of its open items. Parked ones take no room, or a few of them would hold back a queue's feeders forever."""
        return self.body_bytes * (self.open - self.parked) // self.count

    def slice(self, lo: int, hi: int) -> tuple[memoryview, memoryview]:
        """The `lengths` and `body` of the ids `[lo, hi)`; the chunk's bytes must be in memory."""
        assert self.lengths is not None and self.body is not None, "the chunk's bytes are not in memory"
        return self.slice_of(self.lengths, self.body, lo, hi)

    def slice_of(self, lengths: Buffer, body: Buffer, lo: int, hi: int) -> tuple[memoryview, memoryview]:
        """The same out of bytes that were read again. Cuts that follow each other go on where the last one ended."""
        assert self.first <= lo < hi <= self.end, "the range lies outside of the chunk"
        at, stop = lo - self.first, hi - self.first
        lengths_view = memoryview(lengths)[4 * at : 4 * stop]
        if at == 0 and stop == self.count:
            return lengths_view, memoryview(body)
        known, offset = self.cut if self.cut[0] <= at else (0, 0)
        offset += sum(lengths_of(memoryview(lengths)[4 * known : 4 * at]))
        size = sum(lengths_of(lengths_view))
        self.cut = (stop, offset + size)
        return lengths_view, memoryview(body)[offset : offset + size]

    def key_of(self, item_id: int) -> str | None:
        """The key that the item was put with."""
        if self.keys is None:
            return None
        key: str | None = json.loads(bytes(self.keys))[item_id - self.first]
        return key


class ChunkIndex:
    """The chunks of one queue by id. Those at the front go first, so the front is an offset and not a shift."""

    __slots__ = ("_chunks", "_firsts", "_head")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._chunks: list[Chunk] = []
        self._head = 0

    def __len__(self) -> int:
        return len(self._chunks) - self._head

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks[self._head :])

    def append(self, chunk: Chunk) -> None:
        assert not len(self) or self._firsts[-1] < chunk.first, "chunks come in the order of their ids"
        self._firsts.append(chunk.first)
        self._chunks.append(chunk)

    def overlap(self, lo: int, hi: int) -> list[Chunk]:
        """The chunks with an id in `[lo, hi)`, in order."""
        at = max(bisect_right(self._firsts, lo, self._head) - 1, self._head)
        found = []
        while at < len(self._chunks) and self._firsts[at] < hi:
            if self._chunks[at].end > lo:
                found.append(self._chunks[at])
            at += 1
        return found

    def remove(self, chunk: Chunk) -> None:
        at = bisect_right(self._firsts, chunk.first, self._head) - 1
        assert self._chunks[at] is chunk, "the chunk is not in the queue"
        if at > self._head:
            del self._firsts[at], self._chunks[at]
            return
        self._head += 1
        if self._head > 64 and 2 * self._head > len(self._chunks):
            del self._firsts[: self._head], self._chunks[: self._head]
            self._head = 0

    def replace(self, old: list[Chunk], new: Chunk) -> None:
        """Put `new` where the consecutive chunks `old` stood."""
        at = bisect_right(self._firsts, old[0].first, self._head) - 1
        assert self._chunks[at : at + len(old)] == old, "the chunks are not neighbours"
        self._firsts[at : at + len(old)] = [new.first]
        self._chunks[at : at + len(old)] = [new]


def pick(lengths: Buffer, body: Buffer, positions: list[int]) -> tuple[bytes, bytes]:
    """The values at `positions` out of a blob of values."""
    sizes = lengths_of(lengths)
    ends = list(accumulate(sizes))
    view = memoryview(body)
    return lengths_blob(sizes[at] for at in positions), b"".join(view[ends[at] - sizes[at] : ends[at]] for at in positions)


def positions(ranges: list[Range], found: list[Range]) -> list[int]:
    """Which of the inputs in `ranges`, counted from 0, are those in `found`."""
    inside = RangeSet(found)
    positions: list[int] = []
    before = 0
    for lo, hi in ranges:
        for a, b in inside.overlap(lo, hi):
            positions += range(before + a - lo, before + b - lo)
        before += hi - lo
    return positions


def outputs_of(inputs: list[int], counts: Buffer | None) -> list[int]:
    """Which outputs, counted from 0, come from `inputs`: one each, or as many as `counts` says."""
    if counts is None:
        return inputs
    numbers = lengths_of(counts)
    ends = list(accumulate(numbers))
    return [output for at in inputs for output in range(ends[at] - numbers[at], ends[at])]


def joinable(chunk: Chunk) -> bool:
    return (chunk.body is not None and not chunk.persisted and chunk.keys is None and chunk.open == chunk.count
            and not chunk.parked and 8 * chunk.body_bytes <= CHUNK_BYTES_TARGET and 8 * chunk.count <= CHUNK_ITEMS_TARGET)


def joins(run: list[Chunk], chunk: Chunk) -> bool:
    last = run[-1]
    count = chunk.end - run[0].first
    size = sum(c.body_bytes for c in run) + chunk.body_bytes
    return (joinable(chunk) and last.end == chunk.first and last.run == chunk.run and count <= CHUNK_ITEMS_TARGET
            and size <= CHUNK_BYTES_TARGET)
