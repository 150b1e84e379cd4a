"""Says whether a journal is whole, or what is damaged in it.

    python scripts/journal_check.py HOME               a node's home; the node may run
    python scripts/journal_check.py FILE               a journal, or a copy of one

Looked at: the write-ahead log, which SQLite would cut at the first bad frame without a word; SQLite's own integrity
check; the CRC of every row and the sums of the tables; the chain of the log and how it counts on; the mark beside the
file; the log replayed by the core's own code and compared with the tables (all of it, where it goes back to the
start, else what the tables lack); the bytes of every item that is not finished and of every bundle. The last word of
the line that says "whole" stands for all that the cluster has put there: a copy has the same one, and so has another
node that stands at the same entry.

Exit code 0: whole. 1: damaged, each problem in a line of its own with the first entry that is bad, if it is one of
the log's. The file is never changed, and no value is ever loaded.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _contents import Contents, contents_of, digest, first_difference, sizes_are_right
from _journal import Place, bodies_of, connect, look_again, place_of, run, sqlite_errors
from p2pcluster import journal
from p2pcluster.core.log import CONFIG, KINDS, Entry
from p2pcluster.core.messages import decode_configuration
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.snapshot import read_configuration
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import ClusterError, JournalCorrupt
from p2pcluster.wal import scan_wal

SQLITE_PROBLEMS_MAX = 20
_FORMATS = ((1, 1), (2, 2))  # bytes 18 and 19 of an SQLite file: a rollback journal, or a write-ahead log
_NOT_AS_WRITTEN = (AssertionError, ArithmeticError, LookupError, TypeError, ValueError, ClusterError)  # of whole rows


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written; `index` is the first entry of the log that is bad, if it is one."""

    text: str
    index: int | None = None

    def __str__(self) -> str:
        return f"damaged: {self.text}" if self.index is None else f"damaged at entry {self.index}: {self.text}"


@dataclass
class Report:
    """What a check found. The rest is filled in as far as it could be read."""

    problems: list[Problem] = field(default_factory=list)
    first: int = 1
    last: int = 0
    committed: int = 0
    open: int = 0
    parked: int = 0
    queues: int = 0
    from_start: bool = False
    digest: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(map(str, self.problems))
        count = self.last - self.first + 1
        entries = f"{count} entries" + (f" ({self.first} to {self.last})" if count else "")
        replayed = "replayed from the start" if self.from_start else "the start is compacted away"
        return (f"whole: {entries}, {self.open} items open, {self.parked} parked, {self.queues} queues; {replayed}; "
                f"contents {self.digest}")


def check(place: Place) -> Report:
    """Look at everything. Raises `JournalError` when the file cannot be read, or is no journal of this version."""
    return look_again(place, lambda: _Check(place).run(), lambda report: not report.is_whole)


class _Check:
    """One look at a journal. Steps that rest on what was found bad are left out."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._path = place.journal
        self._report = Report()

    def run(self) -> Report:
        slot = self._place.mark_slot()
        wal = scan_wal(self._place.wal)
        with self._found_bad():
            self._header()
            db = connect(self._place)
            try:
                with sqlite_errors(self._path):
                    db.execute("BEGIN")
                    self._look(db, slot)
            finally:
                db.close()
        if wal.damaged and not (wal.last_commit_only and slot is not None):
            self._add(f"the write-ahead log: {wal.damaged}", self._report.last + 1)
        if self._place.mark is not None and slot is None and any(self._place.mark.read_bytes()):
            self._add("the mark beside the file is not readable")
        return self._report

    # ---- problems

    def _add(self, text: str, index: int | None = None) -> None:
        self._report.problems.append(Problem(text, index))

    @contextmanager
    def _found_bad(self) -> Iterator[None]:
        """What the block finds to be damaged is a problem, and the check goes on behind it."""
        try:
            with sqlite_errors(self._path):
                yield
        except JournalCorrupt as error:
            self._add(error.what, error.index)

    # ---- steps

    def _header(self) -> None:
        with self._path.open("rb") as file:
            head = file.read(20)
        if head and tuple(head[18:20]) not in _FORMATS:
            self._add(f"the file's header says formats {tuple(head[18:20])}")

    def _look(self, db: sqlite3.Connection, slot: journal.MarkSlot | None) -> None:
        if not journal.check_format(db, self._path):  # a node was about to make it, or nothing is left of it
            if slot is not None:
                self._add("it is empty and had committed entries", 1)
            return
        with self._found_bad():
            self._integrity(db)
        meta: dict[str, Any] | None = None
        tables: State | None = None
        with self._found_bad():
            self._definitions(db)
        with self._found_bad():
            meta = journal.read_meta(db, self._path)
        if meta is not None:
            tables = self._tables(db, meta)
            self._log(db, meta, tables, slot)

    def _integrity(self, db: sqlite3.Connection) -> None:
        for (text,) in db.execute(f"PRAGMA integrity_check({SQLITE_PROBLEMS_MAX})"):
            if text != "ok":
                self._add("SQLite's check: " + " ".join(text.split()))

    def _definitions(self, db: sqlite3.Connection) -> None:
        """Each table has the columns that this version makes."""
        made = sqlite3.connect(":memory:", isolation_level=None)
        try:
            journal.make_tables(made)
            for table in ("meta", "journal", *TABLES):
                columns, expected = (list(some.execute(f"PRAGMA table_info({table})")) for some in (db, made))
                if columns != expected:
                    self._add(f"the definition of table {table} is not the one that it was made with")
        finally:
            made.close()

    def _tables(self, db: sqlite3.Connection, meta: dict[str, Any]) -> State | None:
        """The state that the tables alone stand for, or None when they are damaged."""
        state = State(body_memory_bytes_max=0)
        before = len(self._report.problems)
        for table in TABLES:
            with self._found_bad():
                rows, total = [], 0
                for values, crc in journal.read_rows(db, self._path, table):
                    rows.append(values)
                    total = (total + crc) & journal.SUM_MASK
                if total != meta[f"sum_{table}"]:
                    self._add(f"table {table} does not add up: a row is missing or too many")
                elif len(self._report.problems) == before:
                    self._load(state, table, rows)
        if len(self._report.problems) > before:
            return None
        state.loaded(meta["applied_idx"], meta["applied_term"], meta["applied_at_ms"], meta["applied_hash"])
        return state

    def _load(self, state: State, table: str, rows: list[tuple[Any, ...]]) -> None:
        try:
            state.load(table, rows)
        except _NOT_AS_WRITTEN as error:
            raise journal.corrupt(self._path, f"table {table} does not make sense: {_named(error)}") from error

    def _log(self, db: sqlite3.Connection, meta: dict[str, Any], tables: State | None,
             slot: journal.MarkSlot | None) -> None:
        report = self._report
        report.first, report.last = meta["base_idx"] + 1, meta["base_idx"]
        replay = _Replay(self._path, db, meta, tables)
        report.committed = replay.commit_idx
        report.from_start = replay.from_start
        before: tuple[int, int, int] = (meta["base_term"], meta["base_at_ms"], 0)
        chain = meta["base_chain"]
        with self._found_bad():
            for entry, chain, commit_idx in journal.read_log(db, self._path, report.last, chain):
                before = self._counts_on(before, entry, commit_idx)
                report.last = entry.index
                replay.take(entry)
            self._ends(meta, chain, slot)
            replay.end()
        if tables is not None and not report.problems:
            with self._found_bad():
                self._finish(replay, meta, chain)

    def _counts_on(self, before: tuple[int, int, int], entry: Entry, commit_idx: int) -> tuple[int, int, int]:
        """Term, time and commit index never go back."""
        now = (entry.term, entry.at_ms, commit_idx)
        for name, old, new in zip(("term", "at_ms", "commit_idx"), before, now, strict=True):
            if new < old:
                self._add(f"its {name} goes back from {old} to {new}", entry.index)
        if entry.kind not in KINDS:
            self._add(f"its kind is {entry.kind}", entry.index)
        return now

    def _ends(self, meta: dict[str, Any], chain: bytes, slot: journal.MarkSlot | None) -> None:
        """The log ends where the rest of the file, and the mark beside it, say so."""
        last = self._report.last
        missing = slot.missing(last, chain, meta) if slot else None
        if missing:
            self._add(missing, last + 1)
        if meta["clean_idx"] is not None and (meta["clean_idx"], meta["clean_chain"]) != (last, chain):
            self._add(f"the journal was closed at entry {meta['clean_idx']} and ends at {last}", last + 1)
        for name, index in (("tables stand", meta["applied_idx"]), ("commit index stands", self._report.committed)):
            if index > last:
                self._add(f"the {name} at entry {index} and the log ends at {last}", last + 1)
        if meta["applied_idx"] < meta["base_idx"]:
            self._add(f"the log was compacted up to entry {meta['base_idx']} and the tables stand at "
                      f"{meta['applied_idx']}")

    def _finish(self, replay: _Replay, meta: dict[str, Any], chain: bytes) -> None:
        contents, state = replay.contents(), replay.state
        for (version, number), part in state.bundles.items():
            journal.read_part(replay.db, self._path, version, number, part)
        queues = state.queues.values()
        self._report.open = sum(queue.open_count for queue in queues)
        self._report.parked = sum(len(queue.parked) for queue in queues)
        self._report.queues = len(queues)
        self._report.digest = digest(contents, replay.configuration, meta, chain)


class _Replay:
    """Applies the log to the tables' state, and where it is whole to an empty one, and compares the two."""

    def __init__(self, path: Path, db: sqlite3.Connection, meta: dict[str, Any], tables: State | None) -> None:
        self.db = db
        self._path = path
        self._tables = tables
        self.commit_idx = journal.last_commit_idx(db, meta)
        self.from_start = meta["base_idx"] == 0
        self._anew = State(body_memory_bytes_max=0) if self.from_start else None
        self._applied_idx = meta["applied_idx"]
        self._compared: Contents | None = None
        self.configuration = read_configuration(meta["configuration"])  # as of the tables, then of the log
        self._logged: Configuration | None = None

    @property
    def state(self) -> State:
        assert self._tables is not None, "the tables are damaged"
        return self._tables

    def take(self, entry: Entry) -> None:
        """The next entry. Raises `JournalCorrupt` where the log and the tables disagree."""
        if self._tables is None or entry.index > self.commit_idx:
            return
        if entry.kind == CONFIG:
            self._logged = decode_configuration(entry.body)
        if entry.index >= self._applied_idx and self._logged is not None:
            self._change_configuration(self._logged, entry.index)
        self._compared = None
        for state in (self._anew, self._tables):
            if state is not None and entry.index > state.applied_idx:
                self._apply(state, entry)
        if entry.index == self._applied_idx:
            self._compare()

    def _change_configuration(self, logged: Configuration, index: int) -> None:
        if index == self._applied_idx and logged != self.configuration:
            raise journal.corrupt(self._path, f"at entry {index} the configuration beside the tables is "
                                              f"{self.configuration} and the log's is {logged}")
        self.configuration = logged

    def _apply(self, state: State, entry: Entry) -> None:
        try:
            journal.apply_entry(state, entry)
        except _NOT_AS_WRITTEN as error:
            raise journal.corrupt(self._path, f"it cannot be applied: {_named(error)}", entry.index) from error

    def end(self) -> None:
        """The log has ended: what it made and what the tables and its tail made must be the same."""
        if self._tables is not None and self._anew is not None and self._compared is None:
            self._compare()

    def _compare(self) -> None:
        if self._anew is None:
            return
        self._compared = self.contents()
        other = contents_of(self._anew, self._bodies)
        difference = first_difference(other, self._compared, ("the log makes", "the tables hold"))
        if difference is not None:
            raise journal.corrupt(
                self._path, f"at entry {self._anew.applied_idx} the tables are not what the log makes: {difference}")

    def contents(self) -> Contents:
        """What the tables stand for now. Raises `JournalCorrupt` where bytes are missing."""
        if self._compared is not None:
            return self._compared
        try:
            return contents_of(self.state, self._bodies)
        except AssertionError as error:
            raise journal.corrupt(self._path, f"the tables do not make sense: {_named(error)}") from error

    def _bodies(self, queue: str, chunk: Chunk) -> tuple[bytes, bytes]:
        lengths, body = bodies_of(self.db, self._path, queue, chunk)
        if not sizes_are_right(chunk, lengths, body):
            raise journal.corrupt(
                self._path, f"the bytes of {queue} {chunk.first} are not as many as its row says", chunk.entry or None)
        return lengths, body


def _named(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="HOME|FILE")
    report = check(place_of(parser.parse_args().path))
    print(report)
    return 0 if report.is_whole else 1


if __name__ == "__main__":
    sys.exit(run("journal_check", main))
