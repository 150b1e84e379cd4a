"""Reads SQLite's write-ahead log without SQLite, to find committed work that SQLite would drop without a word.

SQLite ends a log at the first frame whose salts or checksum are wrong and takes that for the end of a crash: one
flipped bit hides every commit behind it. This file alone decides what in a log is the end of a crash and what is
damage. It refuses to know what the pages hold, and which commits were acknowledged: a last commit that is broken
looks the same whether the power failed during it or a bit flipped after it (`WalReport.last_commit_only`); only the
journal's own mark tells them apart.

The file: a header of 32 bytes (magic, version, page size, sequence, two salts, two sums), then frames of 24 bytes and
a page (page number, pages of the database at a commit else 0, the header's salts, two sums). All numbers are big-
endian, but the sums run over words whose order the magic tells. Each frame's sums continue those of the frame before.
See https://www.sqlite.org/fileformat2.html#the_write_ahead_log.
"""

from __future__ import annotations

import io
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

from p2pcluster.errors import JournalError

_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_MAGIC = 0x377F0682  # with the lowest bit set, the sums run over big-endian words
_VERSION = 3007000
_PAGE_SIZES = tuple(1 << power for power in range(9, 17))
_BATCH_BYTES = 1 << 20  # stays in the processor's cache, and a few hundred frames share each step of a checksum
_WORD = 0xFFFFFFFF

Sums = tuple[int, int]


@dataclass(frozen=True)
class WalReport:
    """What a log holds. `damaged` says in one line what SQLite would drop, or is None."""

    page_bytes: int | None  # None: no header tells it
    frames: int  # intact ones from the start, also those of a transaction that did not commit
    commits: int  # those that SQLite will see
    valid_end_offset: int  # behind the last of these commits
    damaged: str | None = None
    first_bad_frame: int | None = None  # counted from 0: what ends the log (torn, an older log's rest, or damage)
    frames_behind_bad: int = 0  # of the current salts
    commits_behind_bad: int = 0
    last_commit_only: bool = False  # damaged, but a power failure during the last commit leaves the same picture


class _Header(NamedTuple):
    page_bytes: int
    salts: Sums
    sums: Sums
    big_endian: bool


class _Frame(NamedTuple):
    page: int
    commit: bool
    salts: Sums
    sums: Sums

    def belongs_to(self, salts: Sums) -> bool:
        return self.page != 0 and self.salts == salts


def scan_wal(source: bytes | bytearray | memoryview | str | os.PathLike[str]) -> WalReport:
    """Read a log, given as its bytes or its path; a missing file is an empty log.

    The file should be at rest: one that is being written may look damaged and must then be scanned again.
    Raises `JournalError` when the file cannot be read.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _scan(io.BytesIO(source))
    try:
        with open(source, "rb") as file:
            return _scan(file)
    except FileNotFoundError:
        return _scan(io.BytesIO())
    except OSError as error:
        raise JournalError(f"cannot read {source}: {error.strerror}; check the disk and permissions") from error


def _scan(file: BinaryIO) -> WalReport:
    head = file.read(_HEADER_BYTES)
    header = _parse_header(head)
    if header is None:
        return _scan_without_header(file, head)
    walk = _Walk(header)
    for batch in _batches(file, walk.frame_bytes):
        walk.feed(batch)
    return walk.report()


class _Walk:
    """Goes through the frames behind a good header.

    Invariant: `_bad` is None, and `_sums` are those of the last frame; or `_bad` is the frame number `_frames`.
    """

    def __init__(self, header: _Header) -> None:
        self.frame_bytes = _FRAME_HEADER_BYTES + header.page_bytes
        self._header = header
        self._sums = header.sums
        self._bad: _Frame | None = None
        self._frames = self._commits = self._committed_frames = 0
        self._behind = self._commits_behind = 0

    def feed(self, batch: array[int]) -> None:
        heads = _frame_heads(batch, self.frame_bytes)
        if self._bad is None:
            intact = _intact_frames(batch, heads, self._header, self._sums)
            self._count_intact(heads[:intact])
            if intact == len(heads):
                return
            self._bad, *heads = heads[intact:]
        behind = [frame for frame in heads if frame.belongs_to(self._header.salts)]
        self._behind += len(behind)
        self._commits_behind += sum(frame.commit for frame in behind)

    def _count_intact(self, heads: list[_Frame]) -> None:
        for frame in heads:
            self._frames += 1
            self._sums = frame.sums
            if frame.commit:
                self._commits += 1
                self._committed_frames = self._frames

    def report(self) -> WalReport:
        # Frames of these salts without a commit lose nothing: a transaction that was rolled back or killed leaves them
        # behind, and the next one need not cover all of them.
        lost = self._commits_behind
        bad = self._bad
        broken_commit = bad is not None and bad.commit and bad.belongs_to(self._header.salts)
        return WalReport(
            page_bytes=self._header.page_bytes,
            frames=self._frames,
            commits=self._commits,
            valid_end_offset=_HEADER_BYTES + self._committed_frames * self.frame_bytes,
            damaged=_damage(f"frame {self._frames}", self._behind, lost) if lost else None,
            first_bad_frame=None if bad is None else self._frames,
            frames_behind_bad=self._behind,
            commits_behind_bad=lost,
            # A commit is synced before the next is written: another one behind the broken one proves that it was whole.
            last_commit_only=lost == 1 and not broken_commit,
        )


def _damage(what: str, frames: int, commits: int) -> str:
    return f"{what} is bad, and SQLite would drop without a word what follows it: frames {frames}, commits {commits}"


def _scan_without_header(file: BinaryIO, head: bytes) -> WalReport:
    """A log whose header SQLite would not accept, and which it would take for empty.

    The header is synced before any frame is written, so frames behind a bad one were not left by a crash.
    """
    found = max((_frames_of_one_log(file, head, page_bytes) for page_bytes in _PAGE_SIZES), key=len)
    commits = sum(frame.commit for frame in found)
    return WalReport(
        page_bytes=None,
        frames=0,
        commits=0,
        valid_end_offset=0,
        damaged=_damage("the header", len(found), commits) if commits else None,
        first_bad_frame=0 if found else None,
        frames_behind_bad=len(found),
        commits_behind_bad=commits,
    )


def _frames_of_one_log(file: BinaryIO, head: bytes, page_bytes: int) -> list[_Frame]:
    """The frames with the same salts, if pages are of this size: several, or one that shares a salt with the header."""
    file.seek(_HEADER_BYTES)
    frame_bytes = _FRAME_HEADER_BYTES + page_bytes
    heads = (head for batch in _batches(file, frame_bytes) for head in _frame_heads(batch, frame_bytes))
    frames = [frame for frame in heads if frame.page]
    if not frames:
        return []
    (salts, count), *_ = Counter(frame.salts for frame in frames).most_common(1)
    in_header = struct.unpack_from(">2I", head, 16)
    if count < 2 and salts[0] != in_header[0] and salts[1] != in_header[1]:
        return []
    return [frame for frame in frames if frame.salts == salts]


def _parse_header(head: bytes) -> _Header | None:
    """The header, or None where SQLite would not accept it."""
    if len(head) < _HEADER_BYTES:
        return None
    magic, version, page_bytes, _sequence, salt_1, salt_2, sum_1, sum_2 = struct.unpack(">8I", head)
    big_endian = bool(magic & 1)
    if magic & ~1 != _MAGIC or version != _VERSION or page_bytes not in _PAGE_SIZES:
        return None
    if checksum(head[:24], big_endian) != (sum_1, sum_2):
        return None
    return _Header(page_bytes, (salt_1, salt_2), (sum_1, sum_2), big_endian)


def checksum(data: bytes, big_endian: bool, sums: Sums = (0, 0)) -> Sums:
    """SQLite's checksum, word by word; `sums` are those of what came before. For headers, and to test the quick one."""
    sum_1, sum_2 = sums
    for first, second in struct.iter_unpack(">2I" if big_endian else "<2I", data):
        sum_1 = (sum_1 + first + sum_2) & _WORD
        sum_2 = (sum_2 + second + sum_1) & _WORD
    return sum_1, sum_2


def _batches(file: BinaryIO, frame_bytes: int) -> Iterator[array[int]]:
    """Whole frames, many at a time, as 8-byte units; one that the file's end cuts is left out, as SQLite does."""
    batch_bytes = max(1, _BATCH_BYTES // frame_bytes) * frame_bytes
    while data := file.read(batch_bytes):
        whole = len(data) - len(data) % frame_bytes
        if whole:
            yield array("Q", data[:whole])


def _column(batch: array[int], unit: int, frame_bytes: int) -> bytes:
    """The 8 bytes at 8 * `unit` of every frame, one after the other."""
    return batch[unit :: frame_bytes // 8].tobytes()


def _frame_heads(batch: array[int], frame_bytes: int) -> list[_Frame]:
    pages, salts, sums = (struct.iter_unpack(">2I", _column(batch, unit, frame_bytes)) for unit in range(3))
    return [_Frame(page, size != 0, salt, own) for (page, size), salt, own in zip(pages, salts, sums, strict=True)]


def _intact_frames(batch: array[int], heads: list[_Frame], header: _Header, sums: Sums) -> int:
    """How many frames from the start of the batch continue the log, whose sums so far are `sums`."""
    salted = next((at for at, frame in enumerate(heads) if not frame.belongs_to(header.salts)), len(heads))
    frame_bytes = _FRAME_HEADER_BYTES + header.page_bytes
    words = (8 + header.page_bytes) // 4
    least, middle, most = (_fibonacci(words + step) & _WORD for step in (-1, 0, 1))
    own_sums = _own_sums(batch[: salted * frame_bytes // 8], frame_bytes, header.big_endian)
    for at, (own_1, own_2) in enumerate(own_sums):
        sum_1, sum_2 = sums
        sums = (least * sum_1 + middle * sum_2 + own_1) & _WORD, (middle * sum_1 + most * sum_2 + own_2) & _WORD
        if sums != heads[at].sums:
            return at
    return salted


def _own_sums(batch: array[int], frame_bytes: int, big_endian: bool) -> list[Sums]:
    """What each frame adds to the sums: its checksum as if nothing came before it.

    The checksum is linear: what came before can be added afterwards (its weights are Fibonacci numbers), so all frames
    of a batch are summed side by side, each in 64 bits of one large integer. A loop over the words of each page takes
    ten times as long, and a dot product with the weights, `sum(map(mul, ...))`, longer still.
    """
    count = len(batch) * 8 // frame_bytes
    order: Literal["big", "little"] = "big" if big_endian else "little"
    low_words = int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0" * count, "little")
    sums_1 = sums_2 = 0
    for step, unit in enumerate((0, *range(3, frame_bytes // 8))):  # units 1 and 2, salts and sums, are left out
        pair = int.from_bytes(_column(batch, unit, frame_bytes), order)
        low, high = pair & low_words, pair >> 32 & low_words
        sums_1 += sums_2 + (high if big_endian else low)
        sums_2 += sums_1 + (low if big_endian else high)
        if step % 16 == 15:  # 32 words make 32 bits grow to less than 57: no lane runs over into the next
            sums_1 &= low_words
            sums_2 &= low_words
    lanes = ((sums & low_words).to_bytes(count * 8, order) for sums in (sums_1, sums_2))
    first, second = (struct.unpack(f"{'>' if big_endian else '<'}{count}Q", lane) for lane in lanes)
    return list(zip(first, second, strict=True))


def _fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
