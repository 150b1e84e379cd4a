"""Where a journal lives, simulated and real, with one face for tests: open it, have a write fail, let its process die.

A real process's death is the copy of its files while the connection is open: what SQLite does at its close never
happens. A torn write is what a power failure leaves of the last transaction: a part of its frames, or frames with
zeros.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from p2pcluster.core.chunks import Chunk
from p2pcluster.core.log import Entry
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.records import BundlePart
from p2pcluster.core.snapshot import Head, TableRow
from p2pcluster.journal import Compaction, Journal, Recovered, Write
from p2pcluster.wal import scan_wal
from tests.simulation.sim_journal import Fault, SimDisk, SimJournal

MEMORY = 1 << 30


class AnyJournal(Protocol):
    """What a core's shell needs of a journal."""

    def write(self, write: Write) -> Compaction: ...
    def read_bodies(self, queue: str, chunk: Chunk) -> tuple[bytes, bytes]: ...
    def read_bundle(self, version: str, parts: list[BundlePart]) -> bytes: ...
    def snapshot_head(self, state: State, configuration: Configuration) -> Head: ...
    def snapshot_rows(self, state: State) -> Iterator[TableRow]: ...
    def begin_generation(self, configuration: Configuration, state: State) -> int: ...
    def install(self, head: Head, rows: list[TableRow], hard_state: HardState | None) -> None: ...
    def entries(self, after: int, bodies_after: int = 0) -> Iterator[Entry]: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...
    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def base_index(self) -> int: ...
    @property
    def log_bytes(self) -> int: ...


class Store(Protocol):
    """A place that a journal is opened at again and again."""

    def open(self, body_memory_bytes_max: int = MEMORY) -> tuple[AnyJournal, Recovered]: ...
    def fail_write(self, number: int, fault: Fault) -> None:
        """Of the writes of the open journal the `number`th from now fails; closing is none."""

    def crash(self) -> None:
        """The process of the open journal dies; what it left is what the next `open` finds."""


class SimStore:
    """A simulated disk."""

    def __init__(self) -> None:
        self.disk = SimDisk()
        self._journal: SimJournal | None = None

    def open(self, body_memory_bytes_max: int = MEMORY) -> tuple[SimJournal, Recovered]:
        self._journal, recovered = SimJournal.open(self.disk, body_memory_bytes_max)
        return self._journal, recovered

    def fail_write(self, number: int, fault: Fault) -> None:
        self.disk.fail_write(number, fault)

    def crash(self) -> None:
        assert self._journal is not None
        self._journal.abandon()


class RealStore:
    """A folder. Each crash leaves its files in a new one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lives = 0
        self._journal: Journal | None = None
        self._connection: FailingConnection | None = None
        self._home().mkdir(parents=True)

    def _home(self) -> Path:
        return self._folder / f"life-{self._lives}"

    @property
    def path(self) -> Path:
        return self._home() / "journal.sqlite3"

    @property
    def mark_path(self) -> Path:
        return self._home() / "journal.mark"

    def open(self, body_memory_bytes_max: int = MEMORY) -> tuple[Journal, Recovered]:
        self._journal, recovered = Journal.open(self.path, self.mark_path, body_memory_bytes_max)
        self._connection = FailingConnection(self._journal._db, self.wal_path)
        self._journal._db = self._connection  # type: ignore[assignment]
        return self._journal, recovered

    @property
    def wal_path(self) -> Path:
        return self.path.with_name(self.path.name + "-wal")

    def fail_write(self, number: int, fault: Fault) -> None:
        assert self._connection is not None
        self._connection.countdown, self._connection.fault = number, fault

    def crash(self) -> None:
        old = self._home()
        self._lives += 1
        self._home().mkdir()
        for path in old.iterdir():
            if not path.name.endswith("-shm"):
                shutil.copy(path, self._home())
        if self._connection is not None and self._connection.torn is not None:
            tear(self.wal_path, *self._connection.torn, cut=self._lives % 2 == 0)
        if self._journal is not None:
            self._journal.abandon()
        shutil.rmtree(old)


def tear(wal: Path, start: int, stop: int, cut: bool) -> None:
    """Of the last transaction, the bytes from `start` to `stop`, the first page holds zeros; its last frame may be cut.

    A write that changed nothing leaves nothing to tear.
    """
    if start == stop:
        return
    data = bytearray(wal.read_bytes())
    page = max(start, 32) + 24  # SQLite syncs the file's own header before any frame
    data[page : page + 512] = bytes(512)
    wal.write_bytes(data[: stop - 10 if cut else stop])


class FailingConnection:
    """An SQLite connection one of whose commits fails."""

    def __init__(self, connection: sqlite3.Connection, wal: Path) -> None:
        self.countdown = 0
        self.fault = Fault.BEFORE
        self.torn: tuple[int, int] | None = None
        self._connection = connection
        self._wal = wal

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        if sql != "COMMIT":
            return self._connection.execute(sql, parameters)
        self.countdown -= 1
        if self.countdown != 0:
            return self._connection.execute(sql)
        if self.fault is not Fault.BEFORE:
            start = scan_wal(self._wal).valid_end_offset
            self._connection.execute(sql)
            if self.fault is Fault.TORN:
                self.torn = (start, scan_wal(self._wal).valid_end_offset)
        raise sqlite3.OperationalError("the disk failed")

    def close(self) -> None:
        self._connection.close()
