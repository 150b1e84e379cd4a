"""What the scripts that look at a journal share: which file is meant, how it is read without being touched, and how a
run ends.

A file is read in one transaction, over a connection that cannot write. A node may be writing to it meanwhile: SQLite
keeps such a reader's view whole, but the write-ahead log is also read past SQLite, and there a node that starts the
log anew can look like damage. So what looks like damage in a file that has changed since is looked at again. A longer
reading keeps the write-ahead log of a running node from being emptied; who wants to take time looks at a copy
(`python -m p2pcluster backup FILE`).
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from p2pcluster.core.messages import decode_configuration  # noqa: E402
from p2pcluster.core.log import CONFIG  # noqa: E402
from p2pcluster.core.chunks import Chunk  # noqa: E402
from p2pcluster.core.queues import State  # noqa: E402
from p2pcluster.core.records import QueueState  # noqa: E402
from p2pcluster.core.quorum import Configuration  # noqa: E402
from p2pcluster.core.snapshot import read_configuration  # noqa: E402
from p2pcluster.errors import ClusterError, JournalCorrupt, JournalError, UnknownName  # noqa: E402
from p2pcluster.journal import (  # noqa: E402
    JournalReader,
    MarkSlot,
    check_format,
    corrupt,
    read_bodies,
    read_mark,
    scan_for_damage,
)

LOOKS_MAX = 5
LOOK_AGAIN_S = 0.1

T = TypeVar("T")


class Place(NamedTuple):
    """A journal, and the mark beside it where there is one."""

    journal: Path
    mark: Path | None

    @property
    def wal(self) -> Path:
        return self.journal.with_name(self.journal.name + "-wal")

    def mark_slot(self) -> MarkSlot | None:
        """What the mark says. None without a mark, or with one that was never moved."""
        return read_mark(self.mark.read_bytes()) if self.mark is not None else None

    def stamps(self) -> list[tuple[int, int] | None]:
        """Size and time of each file: whether anybody has written since."""
        found: list[tuple[int, int] | None] = []
        for path in (self.journal, self.wal, self.mark):
            try:
                info = os.stat(path) if path is not None else None
            except FileNotFoundError:
                info = None
            found.append(None if info is None else (info.st_size, info.st_mtime_ns))
        return found


def place_of(words: str) -> Place:
    """The journal that a path means: a file, or a node's home. Raises `JournalError`."""
    path = Path(words)
    if path.is_dir():
        path = path / "journal.sqlite3"
    if not path.is_file():
        raise JournalError(f"there is no journal at {path}: name a node's home or the file itself")
    mark = path.with_name("journal.mark")
    return Place(path, mark if path.name == "journal.sqlite3" and mark.is_file() else None)


def connect(place: Place) -> sqlite3.Connection:
    """A connection that cannot write. Without a write-ahead log no node runs here: SQLite shall not make one."""
    mode = "mode=ro" if place.wal.exists() else "immutable=1"
    return sqlite3.connect(f"{place.journal.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", None) or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_PERM")):
            raise JournalError(f"{path} cannot be read ({error}): check who owns it and its folder, or look at a copy"
                               ) from error
        raise corrupt(path, f"SQLite says: {error}") from error
    except UnicodeDecodeError as error:  # its message names what it cannot read, and the driver cannot read the message
        raise corrupt(path, "its schema cannot be read") from error


def look_again(place: Place, look: Callable[[], T], is_bad: Callable[[T], bool]) -> T:
    """What `look` finds; again while it finds something bad in files that were written to meanwhile."""
    for _ in range(LOOKS_MAX - 1):
        before = place.stamps()
        found = look()
        if not is_bad(found) or place.stamps() == before:
            return found
        time.sleep(LOOK_AGAIN_S)
    return look()


class View:
    """A journal as it is now: its tables with the log's committed tail applied, and the bytes of items. Close soon."""

    def __init__(self, place: Place) -> None:
        """Raises `JournalCorrupt`, `JournalError`."""
        slot = place.mark_slot()
        scan_for_damage(place.journal, slot is not None)
        self.place = place
        self.db = connect(place)
        try:
            with sqlite_errors(place.journal):
                self.db.execute("BEGIN")
                if not check_format(self.db, place.journal):
                    raise JournalError(f"{place.journal} holds nothing yet: its node was about to make it")
                self.reader = JournalReader(self.db, place.journal, body_memory_bytes_max=0)
            missing = slot.missing(self.reader.last_index, self.reader.chain, self.reader.meta) if slot else None
            if missing:
                raise corrupt(place.journal, missing, self.reader.last_index + 1)
        except BaseException:
            self.db.close()
            raise

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    @property
    def state(self) -> State:
        return self.reader.state

    def queue(self, name: str) -> QueueState:
        """The queue of that name, with or without its pipeline's. Raises `UnknownName`."""
        found = [queue for full, queue in self.state.queues.items() if name in (full, full.partition("/")[2])]
        if len(found) != 1:
            raise UnknownName(f"{name!r} is {'several queues' if found else 'no queue'} of this journal: name one of "
                              f"{', '.join(sorted(self.state.queues)) or 'none, it has no queue'}")
        return found[0]

    def codec(self, queue: QueueState) -> str:
        """How the values of a queue are written."""
        pipeline = self.state.pipelines.get(queue.pipeline)
        for record in pipeline.manifest["queues"] if pipeline else ():
            if queue.name == f"{queue.pipeline}/{record['name']}":
                return str(record["codec"])
        return "pickle"

    def bodies(self, queue: str, chunk: Chunk) -> tuple[bytes, bytes]:
        return bodies_of(self.db, self.place.journal, queue, chunk)

    def configuration(self) -> Configuration:
        """The members with a copy as the log has them last; empty on a node that has not joined."""
        row = self.db.execute("SELECT body FROM journal WHERE kind = ? ORDER BY idx DESC LIMIT 1", (CONFIG,)).fetchone()
        return decode_configuration(row[0]) if row else read_configuration(self.reader.meta["configuration"])


def bodies_of(db: sqlite3.Connection, path: Path, queue: str, chunk: Chunk) -> tuple[bytes, bytes]:
    """The `lengths` and `body` of a chunk. Raises `JournalCorrupt`."""
    if chunk.lengths is not None and chunk.body is not None:
        return bytes(chunk.lengths), bytes(chunk.body)
    return read_bodies(db, path, queue, chunk)


def view(place: Place) -> View:
    """A view of the journal. Raises `JournalCorrupt`, `JournalError`."""

    def look() -> View | JournalCorrupt:
        try:
            return View(place)
        except JournalCorrupt as error:
            return error

    found = look_again(place, look, lambda result: isinstance(result, JournalCorrupt))
    if isinstance(found, JournalCorrupt):
        raise found
    return found


def run(name: str, main: Callable[[], int]) -> int:
    """The exit code of `main`; an error is one line, and a reader that has seen enough (`head`) is none."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except ClusterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def seconds(ms: float) -> str:
    """A duration for people."""
    s = ms / 1000
    if s < 120:
        return f"{s:.1f} s"
    return f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:.1f} h"
