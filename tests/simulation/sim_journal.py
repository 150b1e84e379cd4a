"""A journal without a file: what `p2pcluster.journal` promises, on a disk that fails and crashes when a test says so.

It passes the contract of the real one (`tests/contract`). It decides when a write is durable and what a crash leaves;
CRCs, chains and whatever else makes damage to a file visible are the real journal's affair. A `SimDisk` outlives the
`SimJournal`s that are opened on it, as a disk outlives processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from zlib import crc32

from p2pcluster import config
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.log import CONFIG, Entry
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.records import BundlePart
from p2pcluster.core.rows import Row, Rows
from p2pcluster.core.snapshot import Head, TableRow, configuration_text
from p2pcluster.core.tables import BODY_COLUMNS, TABLES
from p2pcluster.errors import JournalCorrupt, JournalError
from p2pcluster.journal import (
    Compaction,
    Filled,
    Recovered,
    Write,
    apply_entry,
    checkpoint_of,
    next_chain,
    pinned_entry,
)

_CHUNK_COLUMNS = [name for name in TABLES["chunks"].columns if name not in BODY_COLUMNS]
_KEY_COLUMNS = TABLES["chunks"].key_columns


class Fault(Enum):
    """How a write fails. All raise; only after `AFTER` is the write there when the journal is opened again."""

    BEFORE = "before"
    AFTER = "after"
    TORN = "torn"


@dataclass
class Image:
    """What is on the disk for good."""

    entries: dict[int, Entry] = field(default_factory=dict)  # by index, without a gap
    commit_idxs: dict[int, int] = field(default_factory=dict)
    chains: dict[int, bytes] = field(default_factory=lambda: {0: bytes(16)})  # of the entries, and of the base
    tables: dict[str, dict[Row, Row]] = field(default_factory=lambda: {table: {} for table in TABLES})
    chunk_bodies: dict[Row, tuple[bytes, bytes]] = field(default_factory=dict)
    bundle_bodies: dict[Row, bytes] = field(default_factory=dict)
    hard_state: HardState = field(default_factory=HardState)
    base: tuple[int, int, int] = (0, 0, 0)  # index, term, at_ms
    commit_idx: int = 0
    applied: tuple[int, int, int, bytes] = (0, 0, 0, bytes(16))
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def last_index(self) -> int:
        return self.base[0] + len(self.entries)


class SimDisk:
    """A disk for one journal. `fail_write` says which of the writes to come fails, and how."""

    def __init__(self) -> None:
        self.image = Image()
        self._countdown = 0
        self._fault = Fault.BEFORE

    def fail_write(self, number: int, fault: Fault) -> None:
        """Of the writes from now on the `number`th, counted from 1, fails."""
        assert number >= 1
        self._countdown, self._fault = number, fault

    def next_fault(self) -> Fault | None:
        self._countdown -= 1
        return self._fault if self._countdown == 0 else None


class SimJournal:
    """The journal on a `SimDisk`. A write is on the disk when `sync` returns; until then a crash loses it.

    A crash is that nobody uses this object any more and another is opened. After an error it refuses to go on.
    """

    def __init__(self, disk: SimDisk, commit_index: int) -> None:
        self.commits = 0
        self._commit_index = commit_index
        self._disk = disk
        self._fault: Fault | None = None
        self._begun: Write | None = None
        self._usable = True

    @classmethod
    def open(
        cls, disk: SimDisk, body_memory_bytes_max: int = config.BODY_MEMORY_BYTES_MAX
    ) -> tuple[SimJournal, Recovered]:
        """Recover what is on the disk: the tables, then the committed part of the log."""
        image = disk.image
        state = State(body_memory_bytes_max)
        for table in TABLES:
            state.load(table, [(*key, *row) for key, row in sorted(image.tables[table].items())])
        state.loaded(*image.applied)
        last = image.commit_idxs.get(image.last_index, 0)
        commit_index = min(max(image.commit_idx, last, image.applied[0]), image.last_index)
        for index in range(state.applied_idx + 1, commit_index + 1):
            apply_entry(state, image.entries[index])
        return cls(disk, commit_index), Recovered(image.hard_state, *image.base, image.last_index, commit_index, state)

    # ---- writing

    def write(self, write: Write) -> Compaction:
        """Make `write` durable: it is so when this returns. Raises `JournalError`."""
        self.begin(write)
        return self.sync()

    def begin(self, write: Write) -> None:
        """The first half of `write`, for who wants a crash in between."""
        self._check_usable()
        assert self._begun is None, "one write at a time"
        self._fault = self._disk.next_fault()
        if self._fault is Fault.BEFORE:
            raise self._failed()
        self._begun = write

    def sync(self) -> Compaction:
        """The second half."""
        assert self._begun is not None, "nothing was begun"
        write, self._begun = self._begun, None
        if self._fault is Fault.TORN:
            raise self._failed()
        compaction = self._put_down(write)
        if self._fault is Fault.AFTER:
            raise self._failed()
        self.commits += 1
        return compaction

    def _failed(self) -> JournalError:
        self._usable = False
        return JournalError("the simulated disk failed: start again")

    def _check_usable(self) -> None:
        if not self._usable:
            raise JournalError("this journal failed or is closed: open it again")

    def _put_down(self, write: Write) -> Compaction:
        image = self._disk.image
        image.meta |= dict(write.meta)
        if write.hard_state is not None:
            image.hard_state = write.hard_state
        if write.truncate_from is not None:
            self._truncate(write.truncate_from)
        for entry in write.entries:
            assert entry.index == image.last_index + 1, "entries are written without a gap"
            image.entries[entry.index] = Entry(entry.index, entry.term, entry.at_ms, entry.kind, bytes(entry.body))
            self._commit_index = max(self._commit_index, entry.index if write.sole_voter else write.commit_index)
            image.commit_idxs[entry.index] = self._commit_index
            image.chains[entry.index] = next_chain(image.chains[entry.index - 1], entry)
        self._commit_index = max(self._commit_index, write.commit_index)
        if not write.entries or write.truncate_from is not None:
            image.commit_idx = self._commit_index
        if write.checkpoint is not None:
            c = write.checkpoint
            self._put_rows(c.rows)
            image.applied = (c.applied_idx, c.applied_term, c.applied_at_ms, c.applied_hash)
        if write.configuration is not None:
            image.meta["configuration"] = configuration_text(write.configuration)
        return Compaction() if write.compact is None else self._compact(*write.compact)

    # ---- snapshots

    def snapshot_head(self, state: State, configuration: Configuration) -> Head:
        """The head of a snapshot of `state`."""
        chain = self._disk.image.chains[state.applied_idx]
        return Head(state.applied_idx, state.applied_term, state.at_ms, chain, state.hash, configuration)

    def snapshot_rows(self, state: State) -> Iterator[TableRow]:
        """Every row of `state` with its bytes."""
        for table, rows in state.all_rows().items():
            for key, row in rows.items():
                yield self._snapshot_row(state, table, key, row or ())

    def _snapshot_row(self, state: State, table: str, key: Row, row: Row) -> TableRow:
        if table == "chunks":
            (chunk,) = state.queues[key[0]].chunks.overlap(key[1], key[1] + 1)
            in_memory = chunk.lengths is not None and chunk.body is not None
            lengths, body = (chunk.lengths, chunk.body) if in_memory else self.read_bodies(key[0], chunk)
            named = dict(zip(_CHUNK_COLUMNS, (*key, *row), strict=False))
            named |= {"entry_idx": 0, "entry_offset": 0, "body_crc": crc32(body or b"", crc32(lengths or b""))}
            return TableRow(table, tuple(named.values()), (lengths or b"", body or b""))
        if table == "bundles":
            parts, _, _, size, crc = row
            version, number = key
            body = self.read_bundle_part(version, number, state.bundles[(version, number)])
            return TableRow(table, (*key, parts, 0, 0, size, crc), (body,))
        return TableRow(table, (*key, *row), ())

    def install(self, head: Head, rows: list[TableRow], hard_state: HardState | None) -> None:
        """Become the snapshot: tables and log are replaced; term, vote and what else is this node's own stay."""
        self._check_usable()
        fault = self._disk.next_fault()
        if fault in (Fault.BEFORE, Fault.TORN):
            raise self._failed()
        old = self._disk.image
        image = self._disk.image = Image(
            hard_state=hard_state or old.hard_state,
            base=(head.index, head.term, head.at_ms),
            commit_idx=head.index,
            chains={head.index: head.chain},
            applied=(head.index, head.term, head.at_ms, head.state_hash),
            meta={**old.meta, "configuration": configuration_text(head.configuration)},
        )
        for row in rows:
            keys = TABLES[row.table].key_columns
            key = row.values[:keys]
            image.tables[row.table][key] = row.values[keys:]
            if row.table == "chunks":
                lengths, body = row.bodies
                image.chunk_bodies[key] = (bytes(lengths), bytes(body))
            if row.table == "bundles":
                image.bundle_bodies[key] = bytes(row.bodies[0])
        if fault is Fault.AFTER:
            raise self._failed()
        self.commits += 1
        self._commit_index = head.index

    # ---- the image

    def _truncate(self, from_index: int) -> None:
        image = self._disk.image
        commit_index = max(image.commit_idx, *image.commit_idxs.values(), 0)
        assert from_index > commit_index, f"entry {from_index} is committed and would be cut off"
        for index in range(from_index, image.last_index + 1):
            del image.entries[index], image.commit_idxs[index], image.chains[index]

    def _put_rows(self, rows: Rows) -> None:
        for table, changes in rows.items():
            for key, row in changes.items():
                if len(key) < TABLES[table].key_columns:
                    for old in [old for old in self._disk.image.tables[table] if old[0] == key[0]]:
                        del self._disk.image.tables[table][old]
                elif row is None:
                    self._delete_row(table, key)
                else:
                    self._put_row(table, key, row)

    def _delete_row(self, table: str, key: Row) -> None:
        image = self._disk.image
        image.tables[table].pop(key, None)
        if table == "chunks":
            image.chunk_bodies.pop(key, None)
        if table == "bundles":
            image.bundle_bodies.pop(key, None)

    def _put_row(self, table: str, key: Row, row: Row) -> None:
        image = self._disk.image
        if table == "chunks":
            fixed = len(_CHUNK_COLUMNS) - _KEY_COLUMNS
            if len(row) > fixed:
                image.chunk_bodies[key] = (row[fixed], row[fixed + 1])
            row = row[:fixed]
        if table == "bundles":
            _, entry, offset, size, _ = row
            image.bundle_bodies[key] = bytes(image.entries[entry].body[offset : offset + size])
        image.tables[table][key] = row

    # ---- reading

    def read_bodies(self, queue: str, chunk: Chunk) -> tuple[bytes, bytes]:
        """The `lengths` and `body` of a chunk whose bytes were dropped from memory."""
        self._check_usable()
        image = self._disk.image
        entry = image.entries.get(chunk.entry)
        if chunk.body_crc is None and entry is not None:
            return _cut(entry, chunk.offset, chunk.count, chunk.body_bytes)
        found = image.chunk_bodies.get((queue, chunk.first))
        if found is None:
            raise JournalCorrupt(f"the bytes of {queue} {chunk.first} are nowhere", chunk.entry or None)
        return found

    def read_bundle(self, version: str, parts: list[BundlePart]) -> bytes:
        """The zip of a version: each part from its row, or from the log while it has none."""
        return b"".join(self.read_bundle_part(version, number, part) for number, part in enumerate(parts))

    def read_bundle_part(self, version: str, number: int, part: BundlePart) -> bytes:
        """One part of a version's zip."""
        found = self._disk.image.bundle_bodies.get((version, number))
        return (
            bytes(self._disk.image.entries[part.entry].body[part.offset : part.offset + part.body_bytes])
            if found is None
            else found
        )

    def entries(self, after: int, bodies_after: int = 0) -> Iterator[Entry]:
        """The log's entries above `after`; up to `bodies_after` only configurations have their bodies."""
        for index, entry in list(self._disk.image.entries.items()):
            if index > after:
                has_body = index > bodies_after or entry.kind == CONFIG
                yield entry if has_body else Entry(entry.index, entry.term, entry.at_ms, entry.kind, b"")

    @property
    def meta(self) -> dict[str, Any]:
        """What was written as `Write.meta`."""
        return dict(self._disk.image.meta)

    @property
    def base_index(self) -> int:
        """The last entry that was compacted away."""
        return self._disk.image.base[0]

    @property
    def commit_index(self) -> int:
        """The largest commit index that is on the disk."""
        return self._commit_index

    @property
    def log_bytes(self) -> int:
        """How many bytes the log's entries hold."""
        return sum(len(entry.body) for entry in self._disk.image.entries.values())

    def begin_generation(self, configuration: Configuration, state: State) -> int:
        """Make this copy the cluster: all that the log holds is committed. Returns the new generation."""
        image = self._disk.image
        generation = int(image.meta.get("generation") or 0) + 1
        self.write(
            Write(
                hard_state=HardState(image.hard_state.term + 1, None),
                commit_index=image.last_index,
                checkpoint=checkpoint_of(state),
                configuration=configuration,
                meta=(("generation", generation),),
            )
        )
        return generation

    # ---- keeping small

    def _compact(self, keep_from_index: int, bytes_max: int) -> Compaction:
        """As the real one: entries go once no chunk's row names them; a log over its limit has bytes copied out."""
        image = self._disk.image
        limit = min(image.applied[0], keep_from_index - 1)
        if limit <= image.base[0]:
            return Compaction()
        filled: list[Filled] = []
        if self._held(limit) <= limit and self.log_bytes > config.LOG_BYTES_MAX:
            filled = self._fill(bytes_max)
        target = min(limit, self._held(limit) - 1)
        size = 0
        for index in range(image.base[0] + 1, target + 1):
            entry = image.entries.pop(index)
            del image.commit_idxs[index], image.chains[index - 1]
            image.base = (index, entry.term, entry.at_ms)
            size += len(entry.body)
            if size > 4 * bytes_max:
                break
        over = self._held(limit) <= limit and self.log_bytes > config.LOG_BYTES_MAX
        return Compaction(image.base[0] < target or over, tuple(filled))

    def _pins(self) -> dict[Row, int]:
        found = {key: pinned_entry((*key, *row)) for key, row in self._disk.image.tables["chunks"].items()}
        return {key: entry for key, entry in found.items() if entry}

    def _held(self, limit: int) -> int:
        return min(self._pins().values(), default=limit + 1)

    def _fill(self, bytes_max: int) -> list[Filled]:
        image = self._disk.image
        filled = []
        size = 0
        for key, entry in sorted(self._pins().items(), key=lambda pin: pin[1]):
            row = image.tables["chunks"][key]
            named = dict(zip(_CHUNK_COLUMNS, (*key, *row), strict=True))
            lengths, body = _cut(image.entries[entry], named["entry_offset"], named["count"], named["body_bytes"])
            crc = crc32(body, crc32(lengths))
            self._put_row("chunks", key, (*row[:-1], crc, lengths, body))
            filled.append(Filled(str(key[0]), key[1], crc))
            size += len(lengths) + len(body)
            if size > bytes_max:
                break
        return filled

    def close(self) -> None:
        """Close in order."""
        self._usable = False

    def abandon(self) -> None:
        """Let go of the disk as it is: after an error, and in tests of a crash."""
        self._usable = False


def _cut(entry: Entry, offset: int, count: int, body_bytes: int) -> tuple[bytes, bytes]:
    data = bytes(entry.body[offset : offset + 4 * count + body_bytes])
    return data[: 4 * count], data[4 * count :]
