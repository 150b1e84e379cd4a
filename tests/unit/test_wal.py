"""A log is called damaged when SQLite would drop committed work from it, and not when a crash explains what it holds.

The logs here are SQLite's own: a kill is the copy of its files while the connection is open. What SQLite then reads
from the files is the judge of every claim about them.
"""

from __future__ import annotations

import shutil
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pcluster.errors import JournalError
from p2pcluster.wal import WalReport, checksum, scan_wal

HEADER = 32
COMMITS = 30


@dataclass
class Database:
    """An open connection to a database of one table, whose log is never moved into the file unless a test does it."""

    path: Path
    page_bytes: int = 512

    def __post_init__(self) -> None:
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.execute(f"PRAGMA page_size = {self.page_bytes}")
        assert self.db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
        self.db.execute("PRAGMA wal_autocheckpoint = 0")
        self.db.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, body BLOB)")
        self.checkpoint("TRUNCATE")

    def checkpoint(self, kind: str) -> None:
        assert self.db.execute(f"PRAGMA wal_checkpoint({kind})").fetchone()[0] == 0

    def put(self, *sizes: int) -> None:
        """One commit of one row for each size."""
        for size in sizes:
            self.db.execute("INSERT INTO items (body) VALUES (?)", ((bytes(range(256)) * (size // 256 + 1))[:size],))

    @property
    def log(self) -> bytes:
        return self.path.with_name(self.path.name + "-wal").read_bytes()

    @property
    def frame_bytes(self) -> int:
        return 24 + self.page_bytes

    def killed(self) -> Killed:
        """What a kill would leave."""
        return Killed(self.path.read_bytes(), self.log, self.frame_bytes)


@dataclass(frozen=True)
class Killed:
    """The bytes of a database and of its log, at rest."""

    file: bytes
    log: bytes
    frame_bytes: int

    def at_frame(self, number: int) -> int:
        return HEADER + number * self.frame_bytes

    @property
    def frames(self) -> int:
        return (len(self.log) - HEADER) // self.frame_bytes

    def commit_frames(self) -> list[int]:
        return [n for n in range(self.frames) if struct.unpack_from(">I", self.log, self.at_frame(n) + 4)[0]]

    def rows_that_sqlite_reads(self, log: bytes, folder: Path) -> int:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "copy").write_bytes(self.file)
        (folder / "copy-wal").write_bytes(log)
        db = sqlite3.connect(folder / "copy")
        db.execute("PRAGMA synchronous = OFF")  # a copy need not outlive the machine
        try:
            return int(db.execute("SELECT count(*) FROM items").fetchone()[0])
        finally:
            db.close()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "db")


def flipped(log: bytes, offset: int, bits: int = 0x10) -> bytes:
    return log[:offset] + bytes([log[offset] ^ bits]) + log[offset + 1 :]


def zeroed(log: bytes, start: int, end: int) -> bytes:
    return log[:start] + bytes(end - start) + log[end:]


def with_big_endian_sums(log: bytes, page_bytes: int) -> bytes:
    """The same log as a big-endian machine would have written it."""
    head = struct.pack(">I", struct.unpack_from(">I", log)[0] | 1) + log[4:24]
    sums = checksum(head, True)
    parts = [head, struct.pack(">2I", *sums)]
    for at in range(HEADER, len(log), 24 + page_bytes):
        frame = log[at : at + 24 + page_bytes]
        sums = checksum(frame[:8] + frame[24:], True, sums)
        parts += [frame[:16], struct.pack(">2I", *sums), frame[24:]]
    return b"".join(parts)


# --- What is whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_bytes", [512, 1024, 4096, 65536])
def test_a_whole_log_is_read_to_its_end(page_bytes: int, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", page_bytes)
    database.put(*[100, 5000, 0, 70_000, 3] * 3)
    killed = database.killed()
    report = scan_wal(killed.log)
    assert report == WalReport(page_bytes, killed.frames, 15, len(killed.log))
    assert killed.rows_that_sqlite_reads(killed.log, tmp_path / "copy") == 15


def test_a_log_is_read_by_path_or_bytes_alike(database: Database) -> None:
    database.put(1, 2, 3)
    path = database.path.with_name("db-wal")
    views = (path, str(path), database.log, bytearray(database.log), memoryview(database.log))
    assert {scan_wal(view) for view in views} == {scan_wal(path)}
    assert scan_wal(path).commits == 3


def test_a_log_larger_than_what_is_read_at_once_is_read_to_its_end(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", 4096)
    database.put(*[900_000] * 4)
    assert len(database.log) > 3 << 20
    report = scan_wal(database.log)
    assert (report.commits, report.valid_end_offset, report.first_bad_frame) == (4, len(database.log), None)
    late = scan_wal(flipped(database.log, len(database.log) - 2 * database.frame_bytes))
    assert late.first_bad_frame == report.frames - 2


def test_sums_over_big_endian_words_are_understood_as_sqlite_understands_them(
    database: Database, tmp_path: Path
) -> None:
    database.put(*[300, 2000] * 5)
    killed = database.killed()
    log = with_big_endian_sums(killed.log, 512)
    assert killed.rows_that_sqlite_reads(log, tmp_path / "copy") == 10
    assert scan_wal(log) == scan_wal(killed.log)


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 31, b"\0" * 32, b"\0" * 100_000, b"\xff" * 40])
def test_an_empty_log_and_one_of_zeros_are_fine(data: bytes) -> None:
    assert scan_wal(data) == WalReport(None, 0, 0, 0)


def test_a_missing_file_is_an_empty_log(tmp_path: Path) -> None:
    assert scan_wal(tmp_path / "none") == scan_wal(b"")


def test_a_log_that_cannot_be_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=f"cannot read {tmp_path}: .*; check the disk and permissions$"):
        scan_wal(tmp_path)


# --- What a crash leaves ---------------------------------------------------------------------------------------------


def test_a_log_that_is_cut_anywhere_is_torn_and_not_damaged(database: Database, tmp_path: Path) -> None:
    database.put(*[300, 1000] * 4)
    killed = database.killed()
    for length in range(0, len(killed.log), 31):
        report = scan_wal(killed.log[:length])
        assert report.damaged is None
        assert report.valid_end_offset <= length
        assert report.commits == killed.rows_that_sqlite_reads(killed.log[:length], tmp_path / "copy")


def test_a_last_frame_that_is_torn_is_no_damage(database: Database) -> None:
    database.put(*[10] * 5)
    killed = database.killed()
    report = scan_wal(zeroed(killed.log, len(killed.log) - 100, len(killed.log)))
    assert (report.damaged, report.first_bad_frame, report.commits) == (None, killed.frames - 1, 4)


def test_a_log_of_zeros_behind_its_end_is_no_damage(database: Database) -> None:
    database.put(10, 10)
    whole = scan_wal(database.log)
    report = scan_wal(database.log + bytes(20 * database.frame_bytes))
    assert (report.commits, report.valid_end_offset, report.damaged) == (2, whole.valid_end_offset, None)


def test_the_rest_of_an_older_log_is_no_damage(database: Database, tmp_path: Path) -> None:
    database.put(*[800] * 10)
    older = len(database.log)
    database.checkpoint("RESTART")
    database.put(800, 800)
    killed = database.killed()
    assert len(killed.log) == older
    report = scan_wal(killed.log)
    assert (report.damaged, report.commits, report.frames_behind_bad) == (None, 2, 0)
    assert report.valid_end_offset < older
    assert killed.rows_that_sqlite_reads(killed.log, tmp_path / "copy") == 12


def test_damage_to_the_rest_of_an_older_log_is_none_of_our_business(database: Database) -> None:
    database.put(*[800] * 10)
    database.checkpoint("RESTART")
    database.put(800)
    end = scan_wal(database.log).valid_end_offset
    for offset in range(end, len(database.log), 97):
        assert scan_wal(flipped(database.log, offset)).damaged is None


def test_a_log_that_was_emptied_by_a_checkpoint_is_fine(database: Database) -> None:
    database.put(*[800] * 3)
    database.checkpoint("TRUNCATE")
    assert scan_wal(database.log) == scan_wal(b"")


def spill(database: Database) -> None:
    """Begin a transaction that is too large for SQLite's memory, so that its first pages are in the log already."""
    database.db.execute("PRAGMA cache_size = 10")
    database.db.execute("BEGIN")
    database.put(*[400] * 60)


def test_what_a_transaction_wrote_that_was_killed_is_no_damage(database: Database, tmp_path: Path) -> None:
    database.put(10, 10)
    committed_bytes = len(database.log)
    spill(database)
    killed = database.killed()
    report = scan_wal(killed.log)
    assert report.frames * database.frame_bytes + HEADER > committed_bytes
    assert (report.damaged, report.commits, report.valid_end_offset) == (None, 2, committed_bytes)
    assert killed.rows_that_sqlite_reads(killed.log, tmp_path / "copy") == 2


def test_what_a_transaction_wrote_that_was_rolled_back_is_no_damage(database: Database, tmp_path: Path) -> None:
    database.put(10, 10)
    spill(database)
    database.db.execute("ROLLBACK")
    database.put(10)
    killed = database.killed()
    report = scan_wal(killed.log)
    assert report.frames_behind_bad > 0, "the rest of the transaction lies behind the end, with the salts of this log"
    assert (report.damaged, report.commits) == (None, 3)
    assert killed.rows_that_sqlite_reads(killed.log, tmp_path / "copy") == 3


# --- What is damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big_endian", [False, True])
def test_any_byte_that_changes_is_told_unless_sqlite_loses_nothing_or_it_is_the_torn_end(
    big_endian: bool, database: Database, tmp_path: Path
) -> None:
    commits = 8 if big_endian else COMMITS
    database.put(*[20] * commits)
    killed = database.killed()
    assert killed.rows_that_sqlite_reads(killed.log, tmp_path / "copy") == commits
    log = with_big_endian_sums(killed.log, 512) if big_endian else killed.log
    last_frame_at = killed.at_frame(killed.frames - 1)
    harmless = 0
    for offset in range(len(log)):
        changed = flipped(log, offset, 1 << offset % 8)
        report = scan_wal(changed)
        if offset >= last_frame_at:
            assert (report.damaged, report.commits, report.first_bad_frame) == (None, commits - 1, killed.frames - 1)
        elif report.damaged is None:
            harmless += 1
            assert killed.rows_that_sqlite_reads(changed, tmp_path / "copy") == commits
    assert harmless == 0, "every byte in front of the last frame counts"


def test_what_is_called_damaged_sqlite_really_loses(database: Database, tmp_path: Path) -> None:
    database.put(*[20] * 12)
    killed = database.killed()
    for offset in range(4, killed.at_frame(killed.frames - 1), 41):
        changed = flipped(killed.log, offset)
        report = scan_wal(changed)
        assert report.damaged
        if offset not in range(4, 8):  # another version is refused aloud
            assert killed.rows_that_sqlite_reads(changed, tmp_path / "copy") == report.commits < 12


def test_the_report_says_which_frame_is_bad_and_what_lies_behind_it(database: Database) -> None:
    database.put(*[20] * COMMITS)
    killed = database.killed()
    report = scan_wal(flipped(killed.log, killed.at_frame(10) + 300))
    bad = sum(frame < 10 for frame in killed.commit_frames())
    assert (report.first_bad_frame, report.frames, report.commits) == (10, 10, bad)
    assert report.valid_end_offset == killed.at_frame(killed.commit_frames()[bad - 1] + 1)
    assert report.frames_behind_bad == killed.frames - 11
    assert report.commits_behind_bad == COMMITS - bad - (10 in killed.commit_frames())
    assert report.damaged == (
        "frame 10 is bad, and SQLite would drop without a word what follows it: "
        f"frames {report.frames_behind_bad}, commits {report.commits_behind_bad}"
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda log: zeroed(log, 0, 32),
        lambda log: b"\xff" * 32 + log[32:],
        lambda log: zeroed(log, 0, HEADER + 536),
        lambda log: zeroed(log, 0, 4096),
        lambda log: zeroed(log, HEADER, HEADER + 536),
        lambda log: zeroed(log, 4096, 8192),
        lambda log: log[: HEADER + 536] + log[HEADER + 2 * 536 :],
        lambda log: log[: HEADER + 536] + log[HEADER + 2 * 536 : HEADER + 3 * 536] + log[HEADER + 536 :],
    ],
    ids=["no header", "header of ones", "no header nor frame", "first block", "no first frame", "a block inside",
         "a frame less", "a frame elsewhere"],
)  # fmt: skip
def test_larger_damage_is_told_too(harm: Callable[[bytes], bytes], database: Database, tmp_path: Path) -> None:
    database.put(*[20] * COMMITS)
    killed = database.killed()
    changed = harm(killed.log)
    assert killed.rows_that_sqlite_reads(changed, tmp_path / "copy") < COMMITS
    assert scan_wal(changed).damaged


@pytest.mark.parametrize("page_bytes", [512, 4096, 65536])
def test_any_byte_of_the_header_that_changes_is_told_even_with_one_frame(page_bytes: int, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", page_bytes)
    database.put(20)
    killed = database.killed()
    assert killed.frames == 1
    for offset in range(HEADER):
        report = scan_wal(flipped(killed.log, offset))
        assert report.damaged == "the header is bad, and SQLite would drop without a word what follows it: " + (
            "frames 1, commits 1"
        )
        assert not report.last_commit_only


def test_two_frames_without_any_header_are_told(database: Database) -> None:
    database.put(20, 20)
    assert database.killed().frames == 2
    assert scan_wal(zeroed(database.log, 0, HEADER)).damaged


@pytest.mark.parametrize(("magic", "version"), [(0x377F0682, 3007001), (0x377F0684, 3007000), (0, 3007000)])
def test_a_header_that_sqlite_does_not_know_is_bad_even_if_its_sums_are_right(
    magic: int, version: int, database: Database
) -> None:
    database.put(20, 20)
    head = struct.pack(">2I", magic, version) + database.log[8:24]
    log = head + struct.pack(">2I", *checksum(head, False)) + database.log[HEADER:]
    assert str(scan_wal(log).damaged).startswith("the header is bad")


def test_a_bad_header_before_what_is_no_log_is_not_called_damage() -> None:
    noise = b"".join(struct.pack(">4I", n * 2654435761 % 2**32, n, n + 1, n + 2) for n in range(1, 4000))
    assert scan_wal(bytes(32) + noise).damaged is None


# --- The last commit, of which a file alone cannot tell --------------------------------------------------------------


def test_damage_within_the_last_commit_alone_is_told_with_that_reservation(database: Database) -> None:
    database.put(*[1500] * 4)
    killed = database.killed()
    last_begins = killed.commit_frames()[-2] + 1
    assert killed.frames - last_begins > 2
    for offset in range(killed.at_frame(last_begins), killed.at_frame(killed.frames - 1), 53):
        report = scan_wal(flipped(killed.log, offset))
        assert report.damaged
        assert report.last_commit_only


def test_damage_before_the_last_commit_is_told_without_reservation(database: Database) -> None:
    database.put(*[1500] * 4)
    killed = database.killed()
    last_but_one = killed.commit_frames()[-2]
    own_at = killed.at_frame(last_but_one)
    own_header = range(own_at, own_at + 16)  # damage here hides that the frame ends a commit
    for offset in range(HEADER, killed.at_frame(last_but_one + 1), 29):
        report = scan_wal(flipped(killed.log, offset))
        assert report.damaged
        assert offset in own_header or not report.last_commit_only


def test_a_power_failure_that_kept_only_the_end_of_the_last_commit_gets_the_reservation(database: Database) -> None:
    database.put(20, 20)
    before = len(database.log)
    database.put(1500)
    killed = database.killed()
    report = scan_wal(zeroed(killed.log, before, before + killed.frame_bytes))
    assert report.damaged
    assert report.last_commit_only
    assert report.commits == 2
