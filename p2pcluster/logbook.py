"""What the stages of this machine printed: the last lines of each in memory, for whoever asks, and more of them in files that are bounded.

Decided here: how much is kept, and what is left out. Lines are taken in many at once (`core.loglines`). A stage that prints more than a
machine should store is cut, second by second, and a line says by how many; the terminal, and the stage, lose nothing by it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from p2pcluster import config
from p2pcluster.core import loglines


class Piece(NamedTuple):
    """Stored lines of one stage: the first of them is its line number `first`, counted from the node's start."""

    stage: str
    first: int
    line_count: int
    lines: bytes


@dataclass(slots=True)
class _Book:
    """One stage's lines. `ring` has (number of the first, how many, bytes)."""

    path: Path
    ring: deque[tuple[int, int, bytes]] = field(default_factory=deque)
    total: int = 0
    ring_bytes: int = 0
    second: int = 0
    lines_in_second: int = 0
    bytes_in_second: int = 0
    left_out: int = 0
    unwritten: bytearray = field(default_factory=bytearray)
    unwritten_since_s: float = 0.0
    file: BinaryIO | None = None
    file_bytes: int = 0


class Logbook:
    """All of a node's. `on_trouble` hears, once, why files cannot be written; the lines in memory go on then."""

    def __init__(self, folder: Path, on_trouble: Callable[[str], None]) -> None:
        self._folder = folder
        self._on_trouble = on_trouble
        self._has_told = False
        self._books: dict[str, _Book] = {}
        for path in sorted(folder.glob("*/*.log")):
            self._remember(path)
        self._bound_files()

    def _remember(self, path: Path) -> None:
        """What the former node of this home printed last."""
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - config.LOG_RING_BYTES // 4))
                lines = file.read()
        except OSError:
            return
        lines = lines[lines.find(b"\n") + 1 :] if len(lines) == config.LOG_RING_BYTES // 4 else lines
        lines = lines[: lines.rfind(b"\n") + 1]
        self._append(self._book(f"{path.parent.name}/{path.stem}"), lines, lines.count(b"\n"))

    def add(self, stage: str, lines: bytes) -> None:
        """Whole tagged lines of a stage; `stage` with its pipeline's name."""
        book, count, now_s = self._book(stage), lines.count(b"\n"), time.time()
        if int(now_s) != book.second:
            book.second, book.lines_in_second, book.bytes_in_second = int(now_s), 0, 0
        book.lines_in_second += count
        book.bytes_in_second += len(lines)
        if book.lines_in_second > config.LOG_LINES_PER_S_MAX or book.bytes_in_second > config.LOG_BYTES_PER_S_MAX:
            book.left_out += count
            return
        stored = loglines.for_log(lines)
        if book.left_out:
            stored = loglines.note(loglines.utc(int(1000 * now_s)), f"{book.left_out} lines left out: it printed more than is kept of a second") + stored
            count, book.left_out = count + 1, 0
        self._append(book, stored, count)
        book.unwritten += stored
        book.unwritten_since_s = book.unwritten_since_s or now_s
        if len(book.unwritten) >= config.LOG_WRITE_BYTES:
            self._write(book)

    def _book(self, stage: str) -> _Book:
        book = self._books.get(stage)
        if book is None:
            pipeline, _, name = stage.partition("/")
            book = self._books[stage] = _Book(self._folder / pipeline / f"{name}.log")
        return book

    def _append(self, book: _Book, lines: bytes, count: int) -> None:
        if count:
            book.ring.append((book.total, count, lines))
            book.total += count
            book.ring_bytes += len(lines)
        while len(book.ring) > 1 and (book.ring_bytes > config.LOG_RING_BYTES or book.total - book.ring[0][0] > config.LOG_RING_LINES):
            book.ring_bytes -= len(book.ring.popleft()[2])

    def since(self, pipeline: str | None, stage: str | None, after: dict[str, int], bytes_max: int) -> Iterator[Piece]:
        """What came of each stage behind its line number in `after`, the last of it where it is more than `bytes_max` together."""
        chosen = [(name, book) for name, book in self._books.items()
                  if pipeline in (None, name.partition("/")[0]) and stage in (None, name.partition("/")[2])]
        for at, (name, book) in enumerate(chosen):
            wanted = [part for part in book.ring if part[0] >= after.get(name, 0)]
            left = bytes_max // (len(chosen) - at)
            while wanted and sum(len(lines) for _, _, lines in wanted) > left:
                wanted.pop(0)
            if wanted:
                piece = Piece(name, wanted[0][0], sum(count for _, count, _ in wanted), b"".join(lines for _, _, lines in wanted))
                bytes_max -= len(piece.lines)
                yield piece

    # ---- files

    def tick(self) -> None:
        """Write what has waited long enough. Not each line by itself: the disk that they go to is the one that the journal waits for."""
        now_s = time.time()
        for book in self._books.values():
            if book.unwritten and not book.unwritten_since_s <= now_s < book.unwritten_since_s + config.LOG_WRITE_S:
                self._write(book)

    def _write(self, book: _Book) -> None:
        lines, book.unwritten, book.unwritten_since_s = book.unwritten, bytearray(), 0.0
        try:
            if book.file_bytes and book.file_bytes + len(lines) > config.LOG_FILE_BYTES:
                self._rotate(book)
            if book.file is None:
                book.path.parent.mkdir(mode=0o700, exist_ok=True)
                book.file = open(os.open(book.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)
                book.file_bytes = book.path.stat().st_size
            book.file.write(lines)
            book.file_bytes += len(lines)
        except OSError as error:
            self._trouble(error)

    def _rotate(self, book: _Book) -> None:
        """The file becomes the one before; what that was is gone."""
        assert book.file is not None, "only a file that is written grows"
        book.file.close()
        book.file, book.file_bytes = None, 0
        os.replace(book.path, book.path.with_suffix(".log.1"))
        self._bound_files()

    def _bound_files(self) -> None:
        """All of them together have a bound too: pipelines come and go. The oldest go first."""
        found = []
        for path in self._folder.glob("*/*.log*"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except OSError:
                continue  # it has just gone
        total = sum(size for _, size, _ in found)
        open_now = {book.path for book in self._books.values() if book.file is not None}
        for _, size, path in sorted(found):
            if total > config.LOGS_BYTES_MAX and path not in open_now:
                total -= size
                path.unlink(missing_ok=True)

    def _trouble(self, error: OSError) -> None:
        if not self._has_told:
            self._has_told = True
            self._on_trouble(f"what stages print is not written to {self._folder} ({error.strerror}); their last lines are kept in memory")

    def close(self) -> None:
        for book in self._books.values():
            if book.unwritten:
                self._write(book)
            if book.file is not None:
                book.file.close()
                book.file = None
