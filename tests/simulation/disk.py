"""A simulated machine's disk: the journal on it, what fails, and what is surely on it.

The journal is `SimJournal` or, for some seeds, the real one in a folder. `Durable` says independently of it what a crash
may not take away, for the checker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pcluster.core.raft import HardState
from p2pcluster.core.snapshot import Head, TableRow
from p2pcluster.errors import JournalError
from p2pcluster.journal import Compaction, Recovered, Write
from tests.contract.stores import RealStore, SimStore
from tests.simulation.sim_journal import Fault


@dataclass
class Durable:
    """What is on the disk for good."""

    hard_state: HardState = HardState()
    terms: dict[int, int] = field(default_factory=dict)  # of the log's entries by index
    base: int = 0
    commit_index: int = 0

    @property
    def last_index(self) -> int:
        return max(self.terms, default=self.base)

    def note(self, write: Write) -> None:
        if write.hard_state is not None:
            self.hard_state = write.hard_state
        if write.truncate_from is not None:
            for index in [index for index in self.terms if index >= write.truncate_from]:
                del self.terms[index]
        for entry in write.entries:
            self.terms[entry.index] = entry.term
        commit_index = write.entries[-1].index if write.sole_voter and write.entries else write.commit_index
        self.commit_index = max(self.commit_index, min(commit_index, self.last_index))

    def holds(self, index: int, term: int) -> bool:
        """Only what is committed is compacted, so what lies below the base is there."""
        return index <= self.base or self.terms.get(index) == term


class Disk:
    """See the module."""

    def __init__(self, make_store: Callable[[], SimStore | RealStore]) -> None:
        self._make_store = make_store
        self._store = make_store()
        self.journal: Any = None
        self.durable = Durable()
        self.dies_at_next_write = False
        self.is_full = False
        self.error_at_next_write: Fault | None = None

    def fresh(self) -> Disk:
        """An empty one of the same kind."""
        return Disk(self._make_store)

    def open(self, body_memory_bytes_max: int) -> tuple[Any, Recovered]:
        self.journal, recovered = self._store.open(body_memory_bytes_max)
        if isinstance(self._store, RealStore):
            self.journal._db.execute("PRAGMA synchronous=OFF")  # a crash here is a copy of the files, so nothing need be synced
        self.applied_index = self._applied_index()
        return self.journal, recovered

    def _applied_index(self) -> int:
        """Where the tables stand, which is behind the state that was recovered."""
        if isinstance(self._store, SimStore):
            return self._store.disk.image.applied[0]
        return int(self.journal.meta["applied_idx"])

    def write(self, write: Write) -> Compaction:
        """Durable when this returns. Raises `JournalError`, and then it may be so or not."""
        fault = Fault.BEFORE if self.is_full else self.error_at_next_write
        self.error_at_next_write = None
        if fault is not None:
            self._store.fail_write(1, fault)
        try:
            compaction: Compaction = self.journal.write(write)
        except JournalError:
            if fault is Fault.AFTER:
                self._note(write)
            raise
        self._note(write)
        return compaction

    def write_torn(self, write: Write) -> None:
        """A part of it is on the disk when the power goes."""
        self._store.fail_write(1, Fault.TORN)
        try:
            self.journal.write(write)
        except JournalError:
            return
        raise AssertionError("a torn write came through")

    def _note(self, write: Write) -> None:
        self.durable.note(write)
        self.durable.base = max(self.durable.base, self.journal.base_index)
        if self.durable.terms and min(self.durable.terms) <= self.durable.base:
            self.durable.terms = {i: term for i, term in self.durable.terms.items() if i > self.durable.base}

    def install(self, head: Head, rows: list[TableRow], hard_state: HardState | None) -> None:
        if self.is_full:
            self._store.fail_write(1, Fault.BEFORE)
        self.journal.install(head, rows, hard_state)
        self.durable = Durable(hard_state or self.durable.hard_state, {}, head.index, head.index)

    def close(self) -> None:
        """The journal is closed in order."""
        self.journal.close()

    def crash(self) -> None:
        """Nobody uses the journal any more."""
        self._store.crash()


def sim_disk() -> Disk:
    return Disk(SimStore)


def real_disk(folder: Path) -> Disk:
    """A disk with real files, in folders of their own below `folder`."""
    made = 0

    def make() -> RealStore:
        nonlocal made
        made += 1
        place = folder / f"disk-{made}"
        place.mkdir(parents=True)
        return RealStore(place)

    return Disk(make)
