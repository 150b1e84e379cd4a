"""The quick reader of logs says what a slow and obvious one says, and counts what SQLite reads, whatever is there."""

from __future__ import annotations

import sqlite3
import struct
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import wal
from p2pcluster.wal import checksum, scan_wal

SALTS, OLDER_SALTS = (0x01020304, 0xFFFFFFFF), (0x01020303, 7)
unhurried = settings(deadline=None, derandomize=True)

PAGE_BYTES = st.sampled_from([512, 1024, 4096])


@dataclass(frozen=True)
class Frame:
    page: int
    pages_at_commit: int
    content: bytes
    salts: tuple[int, int] = SALTS
    sums_xor: tuple[int, int] = (0, 0)  # what happened to the sums afterwards


@dataclass(frozen=True)
class Log:
    """A log by its parts, written word by word."""

    page_bytes: int
    big_endian: bool
    frames: list[Frame] = field(default_factory=list)
    salts: tuple[int, int] = SALTS

    def header(self) -> bytes:
        head = struct.pack(">6I", 0x377F0682 | self.big_endian, 3007000, self.page_bytes, 1, *self.salts)
        return head + struct.pack(">2I", *checksum(head, self.big_endian))

    def write(self) -> bytes:
        parts = [self.header()]
        sums = checksum(parts[0][:24], self.big_endian)
        for frame in self.frames:
            numbers = struct.pack(">2I", frame.page, frame.pages_at_commit)
            content = (frame.content * (self.page_bytes // len(frame.content) + 1))[: self.page_bytes]
            sums = checksum(numbers + content, self.big_endian, sums)
            stored = (sums[0] ^ frame.sums_xor[0], sums[1] ^ frame.sums_xor[1])
            parts += [numbers, struct.pack(">4I", *frame.salts, *stored), content]
        return b"".join(parts)


def slowly(data: bytes, log: Log) -> wal.WalReport:
    """The report on a log whose header is known to be good, by the definition."""
    frame_bytes = 24 + log.page_bytes
    sums = checksum(data[:24], log.big_endian)
    frames = commits = end = behind = commits_behind = 0
    bad: int | None = None
    bad_is_commit = False
    for number in range((len(data) - 32) // frame_bytes):
        frame = data[32 + number * frame_bytes :][:frame_bytes]
        page, size, *rest = struct.unpack_from(">6I", frame)
        ours = page != 0 and tuple(rest[:2]) == log.salts
        if bad is not None:
            behind += ours
            commits_behind += ours and size != 0
            continue
        sums = checksum(frame[:8] + frame[24:], log.big_endian, sums)
        if not ours or sums != tuple(rest[2:]):
            bad, bad_is_commit = number, ours and size != 0
            continue
        frames += 1
        if size:
            commits, end = commits + 1, frames
    return wal.WalReport(
        page_bytes=log.page_bytes,
        frames=frames,
        commits=commits,
        valid_end_offset=32 + end * frame_bytes,
        damaged=None,
        first_bad_frame=bad,
        frames_behind_bad=behind,
        commits_behind_bad=commits_behind,
        last_commit_only=commits_behind == 1 and not bad_is_commit,
    )


FRAMES = st.builds(
    Frame,
    page=st.one_of(st.just(1), st.integers(0, 2**32 - 1)),
    pages_at_commit=st.one_of(st.just(0), st.just(3), st.integers(0, 2**32 - 1)),
    content=st.one_of(st.just(b"\0"), st.just(b"\xff"), st.binary(min_size=1, max_size=300)),
)
SICK_FRAMES = st.one_of(
    st.builds(replace, FRAMES, salts=st.just(OLDER_SALTS)),
    st.builds(replace, FRAMES, page=st.just(0)),
    st.builds(replace, FRAMES, sums_xor=st.sampled_from([(1, 0), (0, 1 << 31)])),
)
WHOLE_LOGS = st.builds(
    Log, PAGE_BYTES, st.booleans(), st.lists(st.builds(replace, FRAMES, page=st.integers(1, 2**32 - 1)), max_size=12)
)
LOGS = st.builds(Log, PAGE_BYTES, st.booleans(), st.lists(st.one_of(FRAMES, FRAMES, SICK_FRAMES), max_size=12))
BATCH_BYTES = st.sampled_from([1, 3000, 1 << 20])  # one frame at a time, a few, all


def scan_in_batches(data: bytes, batch_bytes: int) -> wal.WalReport:
    with mock.patch.object(wal, "_BATCH_BYTES", batch_bytes):
        return scan_wal(data)


@unhurried
@given(WHOLE_LOGS, BATCH_BYTES)
def test_every_frame_of_a_whole_log_is_intact(log: Log, batch_bytes: int) -> None:
    report = scan_in_batches(log.write(), batch_bytes)
    assert report.frames == len(log.frames)
    assert report.commits == sum(frame.pages_at_commit != 0 for frame in log.frames)
    assert (report.first_bad_frame, report.damaged, report.frames_behind_bad) == (None, None, 0)


@unhurried
@given(LOGS, BATCH_BYTES, st.integers(0, 5000))
def test_the_report_is_that_of_the_slow_reader(log: Log, batch_bytes: int, cut_bytes: int) -> None:
    whole = log.write()
    data = whole[: max(32, len(whole) - cut_bytes)]
    report = scan_in_batches(data, batch_bytes)
    assert replace(report, damaged=None) == slowly(data, log)
    assert (report.damaged is not None) == (report.commits_behind_bad > 0)


@unhurried
@given(WHOLE_LOGS.filter(lambda log: log.frames), st.data())
def test_no_change_of_any_bit_goes_unseen(log: Log, data: st.DataObject) -> None:
    whole = bytearray(log.write())
    offset = data.draw(st.integers(32, len(whole) - 1))
    whole[offset] ^= 1 << data.draw(st.integers(0, 7))
    assert scan_wal(whole).first_bad_frame == (offset - 32) // (24 + log.page_bytes)


@unhurried
@given(WHOLE_LOGS, st.integers(0, 31), st.integers(0, 7))
def test_behind_a_header_with_a_changed_bit_any_commit_is_damage(log: Log, offset: int, bit: int) -> None:
    whole = bytearray(log.write())
    whole[offset] ^= 1 << bit
    report = scan_wal(whole)
    assert (report.frames, report.commits, report.valid_end_offset) == (0, 0, 0)
    if any(frame.pages_at_commit for frame in log.frames):
        assert report.damaged


@unhurried
@given(st.binary(max_size=3000), BATCH_BYTES)
def test_whatever_is_in_a_file_it_is_read_to_a_report(data: bytes, batch_bytes: int) -> None:
    assert 0 <= scan_in_batches(data, batch_bytes).valid_end_offset <= max(len(data), 32)


@unhurried
@given(st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.booleans())
def test_the_checksum_is_linear_in_what_came_before(data: bytes, sum_1: int, sum_2: int, big_endian: bool) -> None:
    words = data[: len(data) // 8 * 8]
    from_zero = checksum(words, big_endian)
    of_zeros = checksum(bytes(len(words)), big_endian, (sum_1, sum_2))
    together = checksum(words, big_endian, (sum_1, sum_2))
    assert together == tuple((a + b) % 2**32 for a, b in zip(from_zero, of_zeros, strict=True))


HARM = st.sampled_from(["flip", "zero", "cut", "copy", "nothing"])


def harmed(log: bytes, harm: str, at: int, size: int) -> bytes:
    at %= len(log)
    if harm == "flip":
        return log[:at] + bytes([log[at] ^ (1 << size % 8)]) + log[at + 1 :]
    if harm == "zero":
        end = min(at + size, len(log))
        return log[:at] + bytes(end - at) + log[end:]
    if harm == "copy":  # a write that went to the wrong place
        end = min(at + size, len(log))
        return log[:at] + log[: end - at] + log[end:]
    return log[:at] if harm == "cut" else log


@settings(unhurried, max_examples=150)
@given(
    page_bytes=PAGE_BYTES,
    older=st.lists(st.integers(0, 3000), max_size=6),
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    harm=HARM,
    at=st.integers(0, 1 << 20),
    size=st.integers(1, 3000),
)
def test_commits_are_counted_as_sqlite_reads_them_and_none_that_was_synced_is_lost_untold(
    page_bytes: int, older: list[int], sizes: list[int], harm: str, at: int, size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        live, copy = Path(folder, "live"), Path(folder, "copy")
        db = sqlite3.connect(live, isolation_level=None)
        db.execute("PRAGMA synchronous = OFF")
        db.execute(f"PRAGMA page_size = {page_bytes}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("CREATE TABLE items (body BLOB)")
        for body_bytes in older:
            db.execute("INSERT INTO items VALUES (?)", (b"a" * body_bytes,))
        db.execute("PRAGMA wal_checkpoint(RESTART)")
        for body_bytes in sizes:
            db.execute("INSERT INTO items VALUES (?)", (b"b" * body_bytes,))
        whole = Path(folder, "live-wal").read_bytes()
        copy.write_bytes(live.read_bytes())
        db.close()
        before = scan_wal(whole)
        assert (before.commits, before.damaged) == (len(sizes), None)
        changed = harmed(whole, harm, at, size)
        Path(folder, "copy-wal").write_bytes(changed)
        report = scan_wal(changed)
        try:
            reader = sqlite3.connect(copy)
            reader.execute("PRAGMA synchronous = OFF")
            rows = reader.execute("SELECT count(*) FROM items").fetchone()[0] - len(older)
            reader.close()
        except sqlite3.OperationalError:  # a version that SQLite does not know
            assert report.damaged
            return
        assert rows == report.commits
        at %= len(whole)
        if harm == "flip" or at >= 32:  # a header and all frames but one may be gone together: then nothing tells
            behind_harm = harm != "cut" and at + size <= last_commit_at(whole, before)
            assert report.damaged or rows == len(sizes) or not behind_harm
        if rows == len(sizes):
            assert report.damaged is None


def last_commit_at(log: bytes, report: wal.WalReport) -> int:
    """Where the last commit's own frames begin."""
    assert report.page_bytes
    frame_bytes = 24 + report.page_bytes
    ends = [at for at in range(32, report.valid_end_offset, frame_bytes) if struct.unpack_from(">I", log, at + 4)[0]]
    return ends[-2] + frame_bytes if len(ends) > 1 else 32
