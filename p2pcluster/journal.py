"""The journal of a node: one SQLite file that holds the replicated log and the tables that lag behind it.

Decided here: how entries and rows lie in the file, what is durable when, and when a file is not what was written to it. What a
row means is `core.queues`'s. A write is one transaction with one fsync: term and vote, entries, and now and then the rows that
changed since the last time, which also moves `applied_idx`. Recovery loads the tables and applies the log's committed tail.

Three things make damage visible that SQLite alone would not show: every row carries a CRC, `meta` sums the CRCs of each table,
and the entries are chained by a hash. A write-ahead log is scanned before SQLite opens it, since SQLite ends at the first bad
frame without a word; and the mark, a small mapped file beside the journal, says after each commit how far the log and the ballot
(term and vote) went, so that even the loss of the last transaction is seen. The mark costs no fsync: it survives the death of the
process, and after the death of the machine it can only be behind. Only where the log is cut off does it go back, and then before
the log does and with a sync.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from p2pcluster import config
from p2pcluster.core.log import COMMANDS, CONFIG, Entry
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.queues import State
from p2pcluster.core.records import BundlePart
from p2pcluster.core.rows import Row, Rows
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.snapshot import Head, TableRow, configuration_text
from p2pcluster.core.tables import BODY_COLUMNS, TABLES
from p2pcluster.errors import JournalCorrupt, JournalError
from p2pcluster.wal import scan_wal

FORMAT = 3
# To change the format: raise FORMAT and add the step from the former one here; a newer file is refused, an older one is led up.
MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {
    1: lambda db: _add_table(db, "clusters"),
    2: lambda db: _lead_up_to_3(db),
}

_CHAIN_ZERO = bytes(16)
_LOG_COLUMNS = "idx, term, at_ms, kind, body, chain, commit_idx, crc"
# Every journal has these rows, so that one that is lost is missed.
_META_START: dict[str, Any] = {
    "format": FORMAT, "base_idx": 0, "base_term": 0, "base_at_ms": 0, "base_chain": _CHAIN_ZERO, "term": 0, "voted_for": None,
    "commit_idx": 0, "applied_idx": 0, "applied_term": 0, "applied_at_ms": 0, "applied_hash": bytes(16), "clean_idx": None,
    "clean_chain": None, "node_id": None, "cluster_id": None, "cluster_name": None, "configuration": None, "generation": None,
    **{f"sum_{table}": 0 for table in TABLES},
}
_ENTRY_HEAD = struct.Struct(">QQQB")
_MARK = struct.Struct(">8sQQQ16sI")
_MARK_MAGIC = b"p2pmark1"
_MARK_SLOT_BYTES = 64
_PAGE_BYTES = 4096
_PAGES_PER_ENTRY = 4  # beside its body's: the leaf, what is above it, and now and then the tables' changes
SUM_MASK = 0x7FFF_FFFF_FFFF_FFFF  # of the sums of CRCs in `meta`: what an SQLite integer holds


def row_crc(values: Iterable[Any]) -> int:
    """The CRC of a row's columns, in order, types and lengths included."""
    crc = 0
    for value in values:
        if value is None:
            crc = crc32(b"n", crc)
        elif isinstance(value, str):
            data = value.encode()
            crc = crc32(data, crc32(b"s%d:" % len(data), crc))
        elif isinstance(value, int):
            crc = crc32(b"i%d;" % value, crc)
        elif isinstance(value, float):  # nothing here is one: a damaged column can come back so
            crc = crc32(struct.pack(">d", value), crc32(b"f", crc))
        else:
            crc = crc32(value, crc32(b"b%d:" % len(value), crc))
    return crc


def next_chain(chain: bytes, entry: Entry) -> bytes:
    """The hash that ties an entry to all before it."""
    digest = hashlib.blake2b(chain, digest_size=16)
    digest.update(_ENTRY_HEAD.pack(entry.index, entry.term, entry.at_ms, entry.kind))
    digest.update(entry.body)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The rows that changed, and where the state stood that they belong to."""

    rows: Rows
    applied_idx: int
    applied_term: int
    applied_at_ms: int
    applied_hash: bytes


def checkpoint_of(state: State) -> Checkpoint:
    """What is to be written for `state`; the state counts it as written, for a write that fails stops the node."""
    state.coalesce()
    rows = state.rows_changed()
    state.rows_written()
    return Checkpoint(rows, state.applied_idx, state.applied_term, state.at_ms, state.hash)


@dataclass(frozen=True, slots=True)
class Write:
    """One transaction. `sole_voter`: this node alone is the majority, so an entry is committed when it is durable.

    `compact`: (index from which on the log is kept, bytes): a slice of compaction that rides along and costs no fsync of its own.
    """

    entries: tuple[Entry, ...] = ()
    hard_state: HardState | None = None
    commit_index: int = 0
    sole_voter: bool = False
    truncate_from: int | None = None
    checkpoint: Checkpoint | None = None
    compact: tuple[int, int] | None = None
    meta: tuple[tuple[str, Any], ...] = ()
    configuration: Configuration | None = None


@dataclass(frozen=True, slots=True)
class Filled:
    """A chunk whose row holds its bytes now; the state's chunk learns it by `body_crc`."""

    queue: str
    first: int
    body_crc: int


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a slice of compaction did: whether there is more to do, and which chunks have their bytes in their rows now."""

    more: bool = False
    filled: tuple[Filled, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a journal held: everything that the core starts from."""

    hard_state: HardState
    base_index: int
    base_term: int
    base_at_ms: int
    last_index: int
    commit_index: int
    state: State


def pinned_entry(chunk_row: Row) -> int | None:
    """The entry that a chunk's row needs the log to keep, if any."""
    named = dict(zip(TABLES["chunks"].columns, chunk_row, strict=False))
    return named["entry_idx"] if named["body_crc"] is None else None


class Mark:
    """How far the journal's commits went, in a mapped file; see the module. Two slots in turn, so that one is always whole."""

    def __init__(self, path: Path) -> None:
        if not path.exists() or path.stat().st_size < 2 * _MARK_SLOT_BYTES:
            path.write_bytes(bytes(2 * _MARK_SLOT_BYTES))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 2 * _MARK_SLOT_BYTES)
        self.slot = read_mark(bytes(self._map)) or MarkSlot(0, 0, 0, _CHAIN_ZERO)

    def move(self, last_index: int, ballot: int, chain: bytes) -> None:
        self.slot = MarkSlot(self.slot.turn + 1, last_index, ballot, chain)
        head = _MARK.pack(_MARK_MAGIC, *self.slot, 0)[:-4]
        at = _MARK_SLOT_BYTES * (self.slot.turn % 2)
        self._map[at : at + _MARK.size] = head + struct.pack(">I", crc32(head))

    def begin(self, last_index: int, ballot: int, chain: bytes) -> None:
        """The first move, on the disk before any commit: without it a torn commit could not be told from a lost one."""
        self.move(last_index, ballot, chain)
        self._map.flush()

    def go_back(self, last_index: int) -> None:
        """The log is about to be cut off behind `last_index`: a mark that stayed ahead of it would look like a loss."""
        if self.slot.last_index > last_index:
            self.move(last_index, self.slot.ballot, _CHAIN_ZERO)
            self._map.flush()

    def close(self) -> None:
        self._map.flush()
        self._map.close()


class MarkSlot(NamedTuple):
    """What a mark says. `turn` counts its moves; `chain` is that of the last entry, zero where it is not known."""

    turn: int
    last_index: int
    ballot: int
    chain: bytes

    def missing(self, last_index: int, chain: bytes, meta: dict[str, Any]) -> str | None:
        """What a journal had committed and does not hold, which ends at entry `last_index` with `chain`."""
        if self.last_index > last_index:
            return f"it ends at entry {last_index} and had committed {self.last_index}"
        if self.last_index == last_index and self.chain not in (chain, _CHAIN_ZERO):
            return f"its entry {self.last_index} is not the one that was committed"
        if self.ballot > ballot_of(meta):
            return "the last term or vote is not in it"
        return None


def ballot_of(meta: dict[str, Any]) -> int:
    """Term and vote as one number that only grows: a vote is given once in a term."""
    term: int = meta["term"]
    return 2 * term + (meta["voted_for"] is not None)


def read_mark(data: bytes) -> MarkSlot | None:
    """The newer whole slot of a mark's bytes. None when there is none."""
    found = []
    for at in (0, _MARK_SLOT_BYTES):
        slot = data[at : at + _MARK.size]
        if len(slot) == _MARK.size:
            magic, *values, crc = _MARK.unpack(slot)
            if magic == _MARK_MAGIC and crc == crc32(slot[:-4]):
                found.append(MarkSlot(*values))
    return max(found, default=None)


class Journal:
    """The one writing connection to a journal. Every method may raise `JournalError`; after that the node must stop.

    Not safe to use from two threads at once; which thread does not matter.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, mark: Mark, reader: JournalReader) -> None:
        self.path = path
        self.commits = 0
        self.wal_bytes_due = 0  # about how much of the write-ahead log is not copied back; the file itself does not shrink
        self._db = connection
        self._mark = mark
        self._reader_db: sqlite3.Connection | None = None
        self._crcs = reader.crcs
        self._sums = reader.sums
        self._pins = reader.pins
        self._meta = reader.meta
        self._chain = reader.chain
        self._commit_idx = reader.commit_index
        self._last_index = reader.last_index
        self._log_bytes = reader.log_bytes

    @classmethod
    def open(cls, path: Path, mark_path: Path, body_memory_bytes_max: int = config.BODY_MEMORY_BYTES_MAX,
             ) -> tuple[Journal, Recovered]:
        """Open or make the journal at `path`, and recover what it holds.

        Raises `JournalCorrupt` when the file is not what was written to it, `JournalError` when it is no journal of this version.
        """
        try:
            mark = Mark(mark_path)
        except OSError as error:
            raise JournalError(f"{mark_path} cannot be written ({error.strerror}): free some space or check who owns it, then start again"
                               ) from error
        try:
            if not path.exists() and mark.slot.turn > 0:
                raise corrupt(path, "it is gone, and the mark beside it tells of entries")
            reader, is_doubtful = _read_checked(path, mark, body_memory_bytes_max) if path.exists() else (None, False)
            with _sqlite_errors(path):
                db = _open_for_writing(path, is_doubtful)
                reader = reader or JournalReader(db, path, body_memory_bytes_max)
            if mark.slot.turn == 0:
                mark.begin(reader.last_index, ballot_of(reader.meta), reader.chain)
        except BaseException:
            mark.close()
            raise
        journal = cls(path, db, mark, reader)
        return journal, reader.recovered

    # ---- writing

    def write(self, write: Write) -> Compaction:
        """Make `write` durable: it is so when this returns. Returns what its slice of compaction did."""
        if write.truncate_from is not None:
            self._mark.go_back(write.truncate_from - 1)
        compaction = Compaction()
        with _sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            self._write_in_transaction(write)
            if write.compact is not None:
                compaction = self._compact(*write.compact)
            self._db.execute("COMMIT")
        self.commits += 1
        self._mark.move(self._last_index, ballot_of(self._meta), self._chain)
        return compaction

    def _write_in_transaction(self, write: Write) -> None:
        meta: dict[str, Any] = dict(write.meta)
        if self._meta["clean_idx"] is not None:
            meta["clean_idx"] = None
        if write.hard_state is not None:
            meta |= {"term": write.hard_state.term, "voted_for": write.hard_state.voted_for}
        if write.truncate_from is not None:
            self._truncate(write.truncate_from)
        for entry in write.entries:
            self._insert(entry, entry.index if write.sole_voter else write.commit_index)
        self._commit_idx = max(self._commit_idx, write.commit_index)
        # No row says it, or the one that did has been cut off.
        if (not write.entries or write.truncate_from is not None) and self._commit_idx > self._meta["commit_idx"]:
            meta["commit_idx"] = self._commit_idx
        if write.checkpoint is not None:
            self._write_rows(write.checkpoint.rows)
            meta |= self._checkpoint_meta(write.checkpoint)
        if write.configuration is not None:
            meta["configuration"] = configuration_text(write.configuration)
        self._write_meta(meta)

    def _insert(self, entry: Entry, commit_idx: int) -> None:
        assert entry.index == self._last_index + 1, "entries are written without a gap"
        chain = next_chain(self._chain, entry)
        # A lone voter's entry is committed once it is durable, which Raft counts only later, under a newer configuration perhaps: what a
        # row has said stays said.
        self._commit_idx = max(self._commit_idx, commit_idx)
        values = (entry.index, entry.term, entry.at_ms, entry.kind, entry.body, chain, self._commit_idx)
        self._db.execute("INSERT INTO journal VALUES (?,?,?,?,?,?,?,?)", (*values, row_crc(values)))
        self._chain = chain
        self._last_index = entry.index
        self._log_bytes += len(entry.body)
        self.wal_bytes_due += len(entry.body) + _PAGES_PER_ENTRY * _PAGE_BYTES

    def _truncate(self, from_index: int) -> None:
        commit = max(self._db.execute("SELECT max(commit_idx) FROM journal").fetchone()[0] or 0, self._meta["commit_idx"])
        assert from_index > commit, f"entry {from_index} is committed and would be cut off"
        (size,) = self._db.execute("SELECT coalesce(sum(length(body)), 0) FROM journal WHERE idx >= ?", (from_index,)).fetchone()
        self._log_bytes -= size
        self._db.execute("DELETE FROM journal WHERE idx >= ?", (from_index,))
        row = self._db.execute("SELECT idx, chain FROM journal ORDER BY idx DESC LIMIT 1").fetchone()
        self._last_index, self._chain = row or (self._meta["base_idx"], self._meta["base_chain"])

    def _write_meta(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?,?)", (key, value, row_crc((key, value))))
        self._meta |= values

    def _checkpoint_meta(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "applied_idx": checkpoint.applied_idx, "applied_term": checkpoint.applied_term,
            "applied_at_ms": checkpoint.applied_at_ms, "applied_hash": checkpoint.applied_hash,
            **{f"sum_{table}": total for table, total in self._sums.items()},
        }

    def _write_rows(self, rows: Rows) -> None:
        for table, changes in rows.items():
            for key, values in changes.items():
                if len(key) < TABLES[table].key_columns:
                    self._delete_queue_rows(table, key[0])
                elif values is None:
                    self._delete_row(table, key)
                elif table == "bundles":
                    self._put_bundle_row(key, values)
                else:
                    self._put_row(table, key, values)

    def _put_row(self, table: str, key: Row, values: Row) -> None:
        names = [*TABLES[table].columns]
        fixed = [name for name in names if name not in BODY_COLUMNS]
        row = (*key, *values)
        crc = row_crc(row[: len(fixed)])
        if table == "chunks":
            self._pin(key, row)
        self._db.execute(_upsert(table, tuple(names[: len(row)])), (*row, crc))
        self._account(table, key, crc)

    def _put_bundle_row(self, key: Row, values: Row) -> None:
        """The part goes from the log's row to its own inside SQLite, never through this process's memory."""
        parts, entry, offset, size, body_crc = values
        crc = row_crc((*key, *values))
        self._db.execute(
            "INSERT OR REPLACE INTO bundles SELECT ?,?,?,?,?,?,?, substr(body, ?, ?), ? FROM journal WHERE idx = ?",
            (*key, parts, entry, offset, size, body_crc, offset + 1, size, crc, entry),
        )
        self._account("bundles", key, crc)

    def _delete_row(self, table: str, key: Row) -> None:
        names = [*TABLES[table].columns][: len(key)]
        self._db.execute(f"DELETE FROM {table} WHERE {' AND '.join(f'{name} = ?' for name in names)}", key)
        self._account(table, key, None)

    def _delete_queue_rows(self, table: str, queue: str) -> None:
        column = next(iter(TABLES[table].columns))
        for key in [key for key in self._crcs[table] if key[0] == queue]:
            self._account(table, key, None)
        self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (queue,))

    def _pin(self, key: Row, row: Row) -> None:
        entry = pinned_entry(row)
        if entry:
            self._pins[key] = entry
        else:
            self._pins.pop(key, None)

    def _account(self, table: str, key: Row, crc: int | None) -> None:
        if crc is None and table == "chunks":
            self._pins.pop(key, None)
        crcs = self._crcs[table]
        total = self._sums[table] - crcs.pop(key, 0) + (crc or 0)
        self._sums[table] = total & SUM_MASK
        if crc is not None:
            crcs[key] = crc

    # ---- reading

    def read_bodies(self, queue: str, chunk: Chunk) -> tuple[bytes, bytes]:
        """The `lengths` and `body` of a chunk whose bytes were dropped from memory, over a connection that only reads."""
        with _sqlite_errors(self.path):
            return read_bodies(self._reader, self.path, queue, chunk)

    @property
    def _reader(self) -> sqlite3.Connection:
        """A connection that only reads, for the loop's thread while another one commits."""
        if self._reader_db is None:
            self._reader_db = _connect_read_only(self.path)
        return self._reader_db

    def read_bundle(self, version: str, parts: list[BundlePart]) -> bytes:
        """The zip of a version: each part from its row, or from the log while it has none."""
        with _sqlite_errors(self.path):
            return b"".join(read_part(self._reader, self.path, version, number, part) for number, part in enumerate(parts))

    def read_bundle_part(self, version: str, number: int, part: BundlePart) -> bytes:
        """One part of a version's zip."""
        with _sqlite_errors(self.path):
            return read_part(self._reader, self.path, version, number, part)

    def entries(self, after: int, bodies_after: int = 0) -> Iterator[Entry]:
        """The log's entries above `after`; up to `bodies_after` only configurations have their bodies. They were checked when the journal
        was opened."""
        with _sqlite_errors(self.path):
            for row in self._db.execute("SELECT idx, term, at_ms, kind, CASE WHEN idx > ? OR kind = ? THEN body ELSE x'' END FROM journal "
                                        "WHERE idx > ? ORDER BY idx", (bodies_after, CONFIG, after)):
                yield Entry(*row)

    @property
    def meta(self) -> dict[str, Any]:
        """The `meta` table: node id, cluster id and name among others."""
        return dict(self._meta)

    @property
    def log_bytes(self) -> int:
        """About how many bytes the log's entries hold."""
        return self._log_bytes

    def begin_generation(self, configuration: Configuration, state: State) -> int:
        """Make this node's copy the cluster, whatever a lost majority may have had beyond it; returns the new generation.

        All that the log holds counts as committed from here on. Raft messages never cross generations, so a node of the old one that
        comes back cannot take part; it joins as a new one.
        """
        generation = int(self._meta.get("generation") or 0) + 1
        self.write(Write(hard_state=HardState(self._meta["term"] + 1, None), commit_index=self._last_index, checkpoint=checkpoint_of(state),
                         configuration=configuration, meta=(("generation", generation), ("commit_idx", self._last_index))))
        return generation

    # ---- keeping small

    def _compact(self, keep_from_index: int, bytes_max: int) -> Compaction:
        """Entries up to the tables' `applied_idx`, below `keep_from_index`, go once no chunk's row names them. When the log is over its
        limit, chunks that hold it back get their bytes copied to their own rows, about `bytes_max` a call. It looks at the tables
        and never at the state, which may be ahead of them.
        """
        limit = min(self._meta["applied_idx"], keep_from_index - 1)
        if limit <= self._meta["base_idx"]:
            return Compaction()
        filled: list[Filled] = []
        held = min(self._pins.values(), default=limit + 1)
        if held <= limit and self._log_bytes > config.LOG_BYTES_MAX:
            filled = self._fill(bytes_max)
            held = min(self._pins.values(), default=limit + 1)
        more = self._delete_through(min(limit, held - 1), 4 * bytes_max)
        return Compaction(more or (held <= limit and self._log_bytes > config.LOG_BYTES_MAX), tuple(filled))

    def _fill(self, bytes_max: int) -> list[Filled]:
        filled = []
        done_bytes = 0
        for key, _ in sorted(self._pins.items(), key=lambda pin: pin[1]):
            crc, size = self._fill_row(key)
            queue, first = key
            filled.append(Filled(queue, first, crc))
            done_bytes += size
            if done_bytes > bytes_max:
                break
        self._write_meta({"sum_chunks": self._sums["chunks"]})
        return filled

    def _fill_row(self, key: Row) -> tuple[int, int]:
        fixed = [name for name in TABLES["chunks"].columns if name not in BODY_COLUMNS]
        row = self._db.execute(f"SELECT {', '.join(fixed)} FROM chunks WHERE queue = ? AND first_id = ?", key).fetchone()
        named = dict(zip(fixed, row, strict=True))
        found = _log_bytes_of(self._db, named["count"], named["entry_idx"], named["entry_offset"], named["body_bytes"])
        if found is None:
            raise corrupt(self.path, f"the bytes of chunk {key} are not in entry {named['entry_idx']}", named["entry_idx"])
        lengths, body = found
        crc = crc32(body, crc32(lengths))
        self._put_row("chunks", key, (*row[2:-1], crc, lengths, body))
        return crc, len(lengths) + len(body)

    def _delete_through(self, target: int, bytes_max: int) -> bool:
        base = self._meta["base_idx"]
        if target <= base:
            return False
        stop, size = base, 0
        rows = self._db.execute("SELECT idx, length(body) FROM journal WHERE idx > ? AND idx <= ? ORDER BY idx", (base, target))
        for index, length in rows:
            stop, size = index, size + length
            if size > bytes_max:
                break
        rows.close()
        term, at_ms, chain = self._db.execute("SELECT term, at_ms, chain FROM journal WHERE idx = ?", (stop,)).fetchone()
        self._db.execute("DELETE FROM journal WHERE idx <= ?", (stop,))
        self._write_meta({"base_idx": stop, "base_term": term, "base_at_ms": at_ms, "base_chain": chain})
        self._log_bytes -= size
        return stop < target

    # ---- snapshots

    def snapshot_head(self, state: State, configuration: Configuration) -> Head:
        """The head of a snapshot of `state`."""
        row = self._reader.execute("SELECT chain FROM journal WHERE idx = ?", (state.applied_idx,)).fetchone()
        chain = row[0] if row else self._meta["base_chain"]
        return Head(state.applied_idx, state.applied_term, state.at_ms, chain, state.hash, configuration)

    def snapshot_rows(self, state: State) -> Iterator[TableRow]:
        """Every row of `state` with its bytes, from memory or from the file."""
        for table, rows in state.all_rows().items():
            for key, values in rows.items():
                if table == "chunks":
                    yield self._chunk_row(state, key, values or ())
                elif table == "bundles":
                    yield self._bundle_row(state, key, values or ())
                else:
                    yield TableRow(table, (*key, *(values or ())), ())

    def _chunk_row(self, state: State, key: Row, values: Row) -> TableRow:
        (chunk,) = state.queues[key[0]].chunks.overlap(key[1], key[1] + 1)
        if chunk.lengths is not None and chunk.body is not None:
            lengths, body = bytes(chunk.lengths), bytes(chunk.body)
        else:
            lengths, body = self.read_bodies(key[0], chunk)
        named = dict(zip([name for name in TABLES["chunks"].columns if name not in BODY_COLUMNS], (*key, *values), strict=False))
        named |= {"entry_idx": 0, "entry_offset": 0, "body_crc": crc32(body, crc32(lengths))}
        return TableRow("chunks", tuple(named.values()), (lengths, body))

    def _bundle_row(self, state: State, key: Row, values: Row) -> TableRow:
        body = self.read_bundle_part(key[0], key[1], state.bundles[key])
        parts, _, _, size, crc = values
        return TableRow("bundles", (*key, parts, 0, 0, size, crc), (body,))

    def install(self, head: Head, rows: list[TableRow], hard_state: HardState | None) -> None:
        """Become the snapshot: tables and log are replaced in one transaction; node id, term and vote stay this node's own."""
        self._mark.go_back(head.index - 1)  # this node may have had another entry there
        with _sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            for table in ("journal", *TABLES):
                self._db.execute(f"DELETE FROM {table}")
            for table in TABLES:
                self._crcs[table].clear()
                self._sums[table] = 0
            self._pins.clear()
            for row in rows:
                keys = TABLES[row.table].key_columns
                self._put_row(row.table, row.values[:keys], (*row.values[keys:], *map(bytes, row.bodies)))
            meta: dict[str, Any] = {
                "base_idx": head.index, "base_term": head.term, "base_at_ms": head.at_ms, "base_chain": head.chain,
                "configuration": configuration_text(head.configuration), "commit_idx": head.index, "clean_idx": None,
                **self._checkpoint_meta(Checkpoint({}, head.index, head.term, head.at_ms, head.state_hash)),
            }
            if hard_state is not None:
                meta |= {"term": hard_state.term, "voted_for": hard_state.voted_for}
            self._write_meta(meta)
            self._db.execute("COMMIT")
        self.commits += 1
        self._last_index, self._chain, self._log_bytes = head.index, head.chain, 0
        self._commit_idx = head.index
        self._mark.move(self._last_index, ballot_of(self._meta), self._chain)

    @property
    def base_index(self) -> int:
        """The last entry that was compacted away."""
        base: int = self._meta["base_idx"]
        return base

    @property
    def commit_index(self) -> int:
        """The largest commit index that is on the disk."""
        return self._commit_idx

    def checkpoint_wal(self) -> None:
        """Copy the write-ahead log back into the file, as far as no reader needs it."""
        with _sqlite_errors(self.path):
            _, frames, copied = self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self.wal_bytes_due = (frames - copied) * _PAGE_BYTES
            if self.wal_bytes > config.WAL_BYTES_MAX:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @property
    def wal_bytes(self) -> int:
        """The size of the write-ahead log's file."""
        try:
            return self.path.with_name(self.path.name + "-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close in order: the file then says where it ends, and its write-ahead log is gone."""
        if self._reader_db is not None:
            self._reader_db.close()
        with _sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            self._write_meta({"clean_idx": self._last_index, "clean_chain": self._chain})
            self._db.execute("COMMIT")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._db.close()
        self._mark.close()

    def abandon(self) -> None:
        """Let go of the file as it is: after an error, and in tests of a crash.

        SQLite would copy the write-ahead log back when its last connection closes, and delete it. After an error nobody knows what of it is on the
        disk: that is for the next start to judge. So a connection that cannot write closes last.
        """
        with suppress(sqlite3.Error, JournalError):
            if self._reader_db is None:
                self._reader_db = _connect_read_only(self.path)
            self._reader_db.execute("SELECT count(*) FROM meta").fetchone()
        self._db.close()
        if self._reader_db is not None:
            self._reader_db.close()
        self._mark.close()


class JournalReader:
    """Reads a whole journal over any connection, checks every row on the way, and gives the state that it stands for.

    Raises `JournalCorrupt` at the first thing that is not as it was written.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, body_memory_bytes_max: int = config.BODY_MEMORY_BYTES_MAX) -> None:
        self._db = db
        self._path = path
        self.crcs: dict[str, dict[Row, int]] = {table: {} for table in TABLES}
        self.sums: dict[str, int] = dict.fromkeys(TABLES, 0)
        self.pins: dict[Row, int] = {}
        db.execute("SAVEPOINT reading")  # a transaction, or a part of the caller's
        try:
            self.meta = read_meta(db, path)
            self.state = State(body_memory_bytes_max)
            self._load_tables()
            self._read_log()
        finally:
            if db.in_transaction:
                db.execute("RELEASE reading")

    def _corrupt(self, what: str, index: int | None = None) -> JournalCorrupt:
        return corrupt(self._path, what, index)

    def _load_tables(self) -> None:
        for table in TABLES:
            self.state.load(table, self._rows(table))
            if self.sums[table] != self.meta[f"sum_{table}"]:
                raise self._corrupt(f"table {table} does not add up: a row is missing or too many")
        applied_idx = self.meta["applied_idx"]
        self.state.loaded(applied_idx, self.meta["applied_term"], self.meta["applied_at_ms"], self.meta["applied_hash"])

    def _rows(self, table: str) -> Iterator[Row]:
        key_columns = TABLES[table].key_columns
        for values, crc in read_rows(self._db, self._path, table):
            self.crcs[table][values[:key_columns]] = crc
            if table == "chunks" and (entry := pinned_entry(values)):
                self.pins[values[:key_columns]] = entry
            self.sums[table] = (self.sums[table] + crc) & SUM_MASK
            yield values

    def _read_log(self) -> None:
        self.chain, index = self.meta["base_chain"], self.meta["base_idx"]
        self.log_bytes = 0
        commit = last_commit_idx(self._db, self.meta)
        for entry, self.chain, _ in read_log(self._db, self._path, index, self.chain):
            self.log_bytes += len(entry.body)
            index = entry.index
            if self.state.applied_idx < index <= commit:
                apply_entry(self.state, entry)
        self.last_index = index
        clean = self.meta["clean_idx"]
        if clean is not None and (clean, self.meta["clean_chain"]) != (index, self.chain):
            raise self._corrupt(f"the journal was closed at entry {clean} and ends at {index}", index + 1)
        if self.state.applied_idx > index:
            raise self._corrupt(f"the tables stand at entry {self.state.applied_idx} and the log ends at {index}", index + 1)
        self.commit_index = min(commit, index)

    @property
    def recovered(self) -> Recovered:
        meta = self.meta
        return Recovered(HardState(meta["term"], meta["voted_for"]), meta["base_idx"], meta["base_term"],
                         meta["base_at_ms"], self.last_index, self.commit_index, self.state)


class LogRow(NamedTuple):
    """A row of the log; `commit_idx` as it was known when the row was written."""

    entry: Entry
    chain: bytes
    commit_idx: int


def read_meta(db: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """The `meta` table, each row checked. Raises `JournalCorrupt`."""
    meta = {}
    for key, value, crc in db.execute("SELECT key, value, crc FROM meta"):
        if row_crc((key, value)) != crc:
            raise corrupt(path, f"meta row {key!r} is damaged")
        meta[key] = value
    for key in _META_START:
        if key not in meta:
            raise corrupt(path, f"meta row {key!r} is missing")
    return meta


def read_rows(db: sqlite3.Connection, path: Path, table: str) -> Iterator[tuple[Row, int]]:
    """The rows of a table in the order of their keys, without the body columns, each checked and with its CRC. Raises `JournalCorrupt`."""
    spec = TABLES[table]
    names = [name for name in spec.columns if name not in BODY_COLUMNS]
    order = ", ".join(names[: spec.key_columns])
    for row in db.execute(f"SELECT {', '.join(names)}, crc FROM {table} ORDER BY {order}"):
        values, crc = row[:-1], row[-1]
        if row_crc(values) != crc:
            raise corrupt(path, f"table {table}, row {values[: spec.key_columns]} is damaged")
        yield values, crc


def read_log(db: sqlite3.Connection, path: Path, after: int, chain: bytes) -> Iterator[LogRow]:
    """The log above entry `after`, whose chain is `chain`; each row checked against its CRC and the chain. Raises `JournalCorrupt`."""
    rows: sqlite3.Cursor | None = None
    expected = after + 1
    while True:
        try:
            rows = rows or db.execute(f"SELECT {_LOG_COLUMNS} FROM journal WHERE idx > ? ORDER BY idx", (after,))
            row = rows.fetchone()
        except sqlite3.DatabaseError as error:
            expected = _first_unreadable(db, expected)
            raise corrupt(path, f"the log cannot be read at entry {expected}: {error}", expected) from error
        if row is None:
            return
        if row[0] != expected:
            raise corrupt(path, f"entry {expected} is missing", expected)
        if row_crc(row[:7]) != row[7]:
            raise corrupt(path, f"entry {expected} is damaged", expected)
        entry = Entry(*row[:5])
        chain = next_chain(chain, entry)
        if chain != row[5]:
            raise corrupt(path, f"the chain breaks at entry {expected}", expected)
        yield LogRow(entry, chain, row[6])
        expected += 1


def _first_unreadable(db: sqlite3.Connection, index: int) -> int:
    """`index`, or the entry behind it: the driver reads a row ahead, and fails where it does."""
    try:
        row = db.execute(f"SELECT {_LOG_COLUMNS} FROM journal WHERE idx = ?", (index,)).fetchone()
    except sqlite3.DatabaseError:
        return index
    return index + 1 if row is not None and row_crc(row[:7]) == row[7] else index


def last_commit_idx(db: sqlite3.Connection, meta: dict[str, Any]) -> int:
    """How far a journal's log is known to be committed."""
    row = None
    with suppress(sqlite3.DatabaseError):  # who reads the log learns it too, and which entry it is
        row = db.execute("SELECT commit_idx FROM journal ORDER BY idx DESC LIMIT 1").fetchone()
    in_log: int = row[0] if row and isinstance(row[0], int) else 0
    return max(in_log, int(meta["commit_idx"]), int(meta["applied_idx"]))


def apply_entry(state: State, entry: Entry) -> None:
    """Apply an entry whose outcome nobody waits for."""
    if entry.kind == COMMANDS:
        state.apply(entry.index, entry.term, entry.at_ms, entry.body)
    else:
        state.skip(entry.index, entry.term, entry.at_ms)


def open_for_reading(path: Path, mark_path: Path | None = None) -> JournalReader:
    """The journal at `path` as it is now, of a running node too, over a connection that cannot write.

    Raises `JournalCorrupt`, `JournalError`. The connection is closed: the reader holds what was read.
    """
    while True:
        slot = _slot_at(mark_path)
        scan_for_damage(path, slot is not None)
        db = _connect_read_only(path)
        try:
            with _sqlite_errors(path):
                if (found := check_format(db, path)) < FORMAT:
                    raise JournalError(f"{path} has format {found}, and what only reads does not change it: start its node once with this "
                                       "version, which leads it up")
                reader = JournalReader(db, path)
        finally:
            db.close()
        missing = slot.missing(reader.last_index, reader.chain, reader.meta) if slot else None
        if missing is None:
            return reader
        if _slot_at(mark_path) == slot:  # else its node has cut the log off meanwhile
            raise corrupt(path, missing, reader.last_index + 1)


def _slot_at(mark_path: Path | None) -> MarkSlot | None:
    return read_mark(mark_path.read_bytes()) if mark_path is not None and mark_path.exists() else None


def recover(path: Path, mark_path: Path) -> tuple[int, int]:
    """Make the copy at `path` a cluster of its own, its node the only voter; returns the new generation and the last entry.

    For a survivor of a cluster whose majority is gone for good. Raises `JournalError`.
    """
    journal, recovered = Journal.open(path, mark_path)
    try:
        node_id = journal.meta.get("node_id")
        if node_id is None or recovered.last_index == 0:
            raise JournalError(f"{path} holds no copy of a cluster: run recover on a node that status showed as voter or standby")
        for entry in journal.entries(recovered.commit_index):
            apply_entry(recovered.state, entry)
        recovered.state.forget_members_but(node_id)
        generation = journal.begin_generation(Configuration((node_id,)), recovered.state)
        journal.close()
    except BaseException:
        journal.abandon()
        raise
    return generation, recovered.last_index


def set_aside(path: Path, mark_path: Path, name: str) -> None:
    """Give a journal that its node has no more use for another name, beside the old one."""
    for file in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm"), mark_path):
        if file.exists():
            os.replace(file, file.with_name(f"{file.name}.{name}"))


def back_up(path: Path, target: Path) -> int:
    """Copy the journal at `path`, of a running node too, to a new file; returns the last entry that it holds.

    The copy is checked before it gets its name. Raises `JournalError`, `JournalCorrupt`.
    """
    if target.exists():
        raise JournalError(f"{target} exists: name a file that does not, so that no older backup is lost")
    if not path.exists():
        raise JournalError(f"there is no journal at {path}: name the node's folder with --home")
    if not target.absolute().parent.is_dir():
        raise JournalError(f"there is no folder {target.absolute().parent}: make it, or name a file in one that is there")
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    source = _connect_read_only(path)
    try:
        with _sqlite_errors(path):
            copy = sqlite3.connect(partial)
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
            copy.close()
        last_index = open_for_reading(partial).last_index
        os.replace(partial, target)
    finally:
        source.close()
        partial.unlink(missing_ok=True)
    return last_index


def corrupt(path: Path, what: str, index: int | None = None) -> JournalCorrupt:
    return JournalCorrupt(
        f"journal {path} is damaged: {what}; the file is kept as it is: look with scripts/journal_check.py, then start with an "
        "empty --home, with which it joins the others as a new member; a node that was alone can restore a backup into that", index, what)


def _read_checked(path: Path, mark: Mark, body_memory_bytes_max: int) -> tuple[JournalReader | None, bool]:
    """What the file holds, if anything, found over a connection that cannot write: one that can would tidy up at its close, and a damaged file is
    to be kept as it is. Also whether its write-ahead log ends in what may be damage, of which the mark says that it is none."""
    is_doubtful = scan_for_damage(path, mark.slot.turn > 0)
    db = _connect_read_only(path)
    try:
        with _sqlite_errors(path):
            found = check_format(db, path)
            if 0 < found < FORMAT:
                _migrate(path, found)
            # 0: its node died while it made the file
            reader = JournalReader(db, path, body_memory_bytes_max) if found else None
    finally:
        db.close()
    if reader is None and mark.slot.turn > 0:
        raise corrupt(path, "it is empty and had committed entries")
    missing = mark.slot.missing(reader.last_index, reader.chain, reader.meta) if reader else None
    if reader and missing:
        raise corrupt(path, missing, reader.last_index + 1)
    return reader, is_doubtful


def _open_for_writing(path: Path, is_doubtful: bool) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        _set_up(db, path)
        make_tables(db)
        if is_doubtful:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # or the next start would have to doubt it again
    except BaseException:
        db.close()
        raise
    return db


def scan_for_damage(path: Path, marked: bool) -> bool:
    """Look for committed work that SQLite would not see. Raises `JournalCorrupt`.

    A last commit that is broken may never have been acknowledged: the power failed during it. Where there is a mark (`marked`), that
    is left to the mark, and true is returned; without one it is damage.
    """
    if marked and path.exists() and not _begins_as_sqlite(path):
        raise corrupt(path, "its first bytes are not those of an SQLite file")
    wal = path.with_name(path.name + "-wal")
    report = scan_wal(wal)
    while report.damaged and not (report.last_commit_only and marked):
        again = scan_wal(wal)
        if again == report:
            raise corrupt(path, report.damaged)
        report = again  # its node began the file anew while it was read
    return report.damaged is not None


def _begins_as_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) in (b"", b"SQLite format 3\0")


def read_bodies(db: sqlite3.Connection, path: Path, queue: str, chunk: Chunk) -> tuple[bytes, bytes]:
    """The bytes of a chunk, out of the log's entry that it came with or of its own row.

    A compaction that its state has not heard of yet may have moved them, so the row has the last word.
    """
    if chunk.body_crc is None:
        found = _log_bytes_of(db, chunk.count, chunk.entry, chunk.offset, chunk.body_bytes)
        if found is not None:
            return found
    row = db.execute("SELECT lengths, body, body_crc FROM chunks WHERE queue = ? AND first_id = ?", (queue, chunk.first)).fetchone()
    whole = row is not None and isinstance(row[0], bytes) and isinstance(row[1], bytes) and crc32(row[1], crc32(row[0])) == row[2]
    if not whole or chunk.body_crc not in (row[2], None):
        raise corrupt(path, f"the bytes of {queue} {chunk.first} are damaged", chunk.entry or None)
    return row[0], row[1]


def read_part(db: sqlite3.Connection, path: Path, version: str, number: int, part: BundlePart) -> bytes:
    """The bytes of a part of a bundle, out of its own row, or of the log while it has none. Raises `JournalCorrupt`."""
    row = db.execute("SELECT body FROM bundles WHERE version = ? AND part = ?", (version, number)).fetchone()
    if row is None:
        row = db.execute("SELECT substr(body, ?, ?) FROM journal WHERE idx = ?", (part.offset + 1, part.body_bytes, part.entry)).fetchone()
    if row is None or not isinstance(row[0], bytes) or crc32(row[0]) != part.body_crc:
        raise corrupt(path, f"part {number} of bundle {version[:8]} is damaged", part.entry)
    body: bytes = row[0]
    return body


def _log_bytes_of(db: sqlite3.Connection, count: int, entry: int, offset: int, body_bytes: int) -> tuple[bytes, bytes] | None:
    """The `lengths` and `body` that stand in an entry, or None when it is gone."""
    size = 4 * count + body_bytes
    row = db.execute("SELECT substr(body, ?, ?) FROM journal WHERE idx = ?", (offset + 1, size, entry)).fetchone()
    if row is None or len(row[0]) != size:
        return None
    return row[0][: 4 * count], row[0][4 * count :]


def _upsert(table: str, names: tuple[str, ...]) -> str:
    columns = (*names, "crc")
    keys = names[: TABLES[table].key_columns]
    rest = [name for name in columns if name not in keys]
    return (f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
            f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in rest)}")


def _connect_read_only(path: Path) -> sqlite3.Connection:
    with _sqlite_errors(path):
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)


def _set_up(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA busy_timeout = 5000")
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise JournalError(f"{path} cannot use a write-ahead log here ({mode}): choose a --home on a local disk")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA fullfsync = ON")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute(f"PRAGMA cache_size = -{config.SQLITE_CACHE_BYTES // 1024}")
    db.execute("PRAGMA temp_store = MEMORY")
    check_format(db, path)


def check_format(db: sqlite3.Connection, path: Path) -> int:
    """The format of the journal in the file, 0 when it is empty. Raises `JournalError` when there is something else."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return 0
    if "meta" not in tables:
        raise JournalError(f"{path} is an SQLite file and not a journal of p2pcluster: choose another --home")
    row = db.execute("SELECT value, crc FROM meta WHERE key = 'format'").fetchone()
    found = row[0] if row else None
    if not isinstance(found, int) or row[1] != row_crc(("format", found)):
        raise corrupt(path, "it does not say its format")
    if found > FORMAT:
        raise JournalError(f"{path} has format {found} and this version reads up to {FORMAT}: update p2pcluster on this machine")
    return found


def _migrate(path: Path, found: int) -> None:
    """Lead an older journal up to this version's format, each step in a transaction of its own."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        for step in range(found, FORMAT):
            db.execute("BEGIN IMMEDIATE")
            MIGRATIONS[step](db)
            db.execute("UPDATE meta SET value = ?, crc = ? WHERE key = 'format'", (step + 1, row_crc(("format", step + 1))))
            db.execute("COMMIT")
    finally:
        db.close()


def _make_table(db: sqlite3.Connection, table: str) -> None:
    spec = TABLES[table]
    columns = ", ".join(f"{name} {kind}" for name, kind in spec.columns.items() if name not in BODY_COLUMNS)
    bodies = ", ".join(f"{name} {kind}" for name, kind in spec.columns.items() if name in BODY_COLUMNS)
    keys = ", ".join([*spec.columns][: spec.key_columns])
    parts = [part for part in (columns, bodies, "crc INTEGER", f"PRIMARY KEY ({keys})") if part]
    db.execute(f"CREATE TABLE {table} ({', '.join(parts)})" + ("" if bodies else " WITHOUT ROWID"))


def _add_table(db: sqlite3.Connection, table: str) -> None:
    """A table that an older format has not, empty, with its sum."""
    _make_table(db, table)
    db.execute("INSERT INTO meta VALUES (?,?,?)", (f"sum_{table}", 0, row_crc((f"sum_{table}", 0))))


def _lead_up_to_3(db: sqlite3.Connection) -> None:
    """Keys with the time at which they came, all at the tables' time; and outputs in parts."""
    (at_ms,) = db.execute("SELECT value FROM meta WHERE key = 'applied_at_ms'").fetchone()
    old = db.execute("SELECT queue, hash FROM keys").fetchall()
    db.execute("DROP TABLE keys")
    _make_table(db, "keys")
    total = 0
    for key in old:
        crc = row_crc((*key, at_ms))
        db.execute("INSERT INTO keys VALUES (?,?,?,?)", (*key, at_ms, crc))
        total = (total + crc) & SUM_MASK
    db.execute("UPDATE meta SET value = ?, crc = ? WHERE key = 'sum_keys'", (total, row_crc(("sum_keys", total))))
    _add_table(db, "parts")


def make_tables(db: sqlite3.Connection) -> None:
    """Make an empty journal, where there is none."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
        return
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value, crc INTEGER) WITHOUT ROWID")
    db.execute("CREATE TABLE journal (idx INTEGER PRIMARY KEY, term INTEGER, at_ms INTEGER, kind INTEGER, body BLOB, chain BLOB, "
               "commit_idx INTEGER, crc INTEGER)")
    for table in TABLES:
        _make_table(db, table)
    for key, value in _META_START.items():
        db.execute("INSERT INTO meta VALUES (?,?,?)", (key, value, row_crc((key, value))))
    db.execute("COMMIT")


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours. The outcome of a write that failed is unknown: the journal must be opened again to learn it."""
    try:
        yield
    except sqlite3.Error as error:
        raise _as_journal_error(path, error) from error
    except UnicodeDecodeError as error:  # SQLite's message names what it cannot read, and the driver cannot read the message
        raise corrupt(path, "its schema cannot be read") from error


def _as_journal_error(path: Path, error: sqlite3.Error) -> JournalError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"):  # the second: the file beside the journal that is mapped cannot grow
        return JournalError(f"the disk of {path.parent} is full: free some space and start again; nothing acknowledged is lost")
    if name.startswith("SQLITE_NOTADB"):
        return JournalError(f"{path} is not an SQLite file: move it away, or choose another --home")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_FORMAT")):
        return corrupt(path, str(error))
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return JournalError(f"{path} cannot be opened for writing ({error}): check who owns it, or choose another --home")
    if name.startswith("SQLITE_IOERR"):
        return JournalError(f"the disk of {path.parent} failed ({error}, {name}): check the disk, then start again")
    if not name and "decode" in str(error):
        return corrupt(path, str(error))
    return JournalError(f"{path}: {error} ({name or 'SQLite'}); start again, and if it stays look with scripts/journal_check.py")


