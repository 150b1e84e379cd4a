"""A node that crashes, at any point and however often, goes on as the node that never did.

A life is a run of writes as a node makes them: entries, term and vote, the commit index, checkpoints, slices of
compaction; a tail that is not committed is cut off now and then. Between them the process dies, ends in order, or has a
write fail in one of the ways in which writes fail. What the journal then gives is compared with the model, and with a
state that applied the same log in one go.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import config
from p2pcluster.core import chunks
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.codec import Buffer
from p2pcluster.core.commands import decode_commands
from p2pcluster.core.log import COMMANDS, NOOP, Entry
from p2pcluster.core.queues import State
from p2pcluster.core.raft import HardState
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import JournalCorrupt, JournalError
from p2pcluster.journal import Compaction, Write, apply_entry, checkpoint_of
from tests.contract.stores import RealStore, SimStore, Store
from tests.simulation import sim_journal
from tests.simulation.queue_chooser import Chooser
from tests.simulation.queue_model import Model, beginning, compare, entry_body, plain_rows
from tests.simulation.sim_journal import Fault, SimJournal

STEPS = 30


class Life:
    """A node's journal and state through its crashes, and all that it ever wrote."""

    def __init__(self, random: Random, store: Store) -> None:
        self.random = random
        self.store = store
        self.sole = random.random() < 0.5
        self.entries: list[Entry] = []  # durable; entry n is at n - 1
        self.commit = 0
        self.hard_state = HardState()
        self.crashes = 0
        self._open()

    # ---- starting

    def _open(self) -> None:
        memory = self.random.choice([0, 200, 1 << 30])
        self.journal, recovered = self.store.open(memory)
        self.state = recovered.state
        assert recovered.hard_state == self.hard_state, "term or vote is lost"
        assert recovered.last_index == len(self.entries), "the log is not what is durable"
        assert recovered.commit_index == self.commit, "the commit index is lost"
        self._check_log(recovered.base_index)
        self._begin_again(self.commit)
        self.check()

    def _begin_again(self, upto: int) -> None:
        """The model and the state that never crashed, from the whole log."""
        self.model, self.twin = Model(), State()
        self.chooser = Chooser(self.random, self.model, serial=1000 * self.crashes)
        for entry in self.entries[:upto]:
            self._apply_beside(entry)

    def _apply_beside(self, entry: Entry) -> None:
        self.model.index = entry.index
        self.model.apply(entry.at_ms, [message for message, _ in decode_commands(entry.body)])
        apply_entry(self.twin, entry)

    def _check_log(self, base_index: int) -> None:
        found = [Entry(e.index, e.term, e.at_ms, e.kind, bytes(e.body)) for e in self.journal.entries(base_index)]
        assert found == self.entries[base_index:], "entries changed"

    # ---- writing

    def _new_entries(self) -> tuple[Entry, ...]:
        found = []
        at_ms = self.entries[-1].at_ms if self.entries else 0
        for index in range(len(self.entries) + 1, len(self.entries) + 1 + self.random.choice([0, 1, 1, 2])):
            at_ms += self.random.choice([0, 7])
            messages = beginning() if index == 1 else [] if self.random.random() < 0.1 else self.chooser.entry()
            kind = COMMANDS if messages else NOOP
            found.append(Entry(index, self.hard_state.term, at_ms, kind, entry_body(messages)))
        return tuple(found)

    def _next_write(self) -> Write:
        hard_state = truncate_from = None
        if self.random.random() < 0.1:
            hard_state = HardState(self.hard_state.term + 1, self.random.choice([None, "n1"]))
        if self.random.random() < 0.1:
            self.sole = not self.sole
        # Raft may be late to count what a lone voter has committed by writing it.
        commit = len(self.entries) if self.sole else self.random.randint(max(0, self.commit - 1), len(self.entries))
        known = max(commit, self.commit)
        if not self.sole and known < len(self.entries) and self.random.random() < 0.3:
            truncate_from = self.random.randint(known + 1, len(self.entries))
            del self.entries[truncate_from - 1 :]
        checkpoint = checkpoint_of(self.state) if self.random.random() < 0.3 else None
        compact = (self.commit + 1, self.random.choice([50, 400, 1 << 20])) if self.random.random() < 0.4 else None
        return Write(self._new_entries(), hard_state, commit, self.sole, truncate_from, checkpoint, compact)

    def step(self) -> None:
        before = list(self.entries)
        write = self._next_write()
        fault = self.random.choice(list(Fault)) if self.random.random() < 0.12 else None
        if fault is not None:
            self.store.fail_write(1, fault)
        try:
            compaction = self.journal.write(write)
        except JournalError:
            assert fault is not None, "a write failed by itself"
            self._after_failure(write, fault, before)
            return
        assert fault is None, "a write should have failed"
        self._note_durable(write)
        for chunk in compaction.filled:
            self.state.filled(chunk.queue, chunk.first, chunk.body_crc)
        self._apply_through(self.commit)
        if self.random.random() < 0.3:
            self.check()
        if self.random.random() < 0.12:
            self.crash() if self.random.random() < 0.6 else self.end()

    def _note_durable(self, write: Write) -> None:
        self.entries += write.entries
        self.hard_state = write.hard_state or self.hard_state
        self.commit = len(self.entries) if write.sole_voter else max(self.commit, write.commit_index)

    def _apply_through(self, commit: int) -> None:
        for entry in self.entries[self.state.applied_idx : commit]:
            apply_entry(self.state, entry)
            self._apply_beside(entry)
        assert self.state.hash == self.twin.hash, "after a crash the state goes another way"

    def _after_failure(self, write: Write, fault: Fault, before: list[Entry]) -> None:
        """Nothing that was said to be durable is lost, and the write is there as a whole or not at all."""
        if fault is Fault.AFTER:
            self._note_durable(write)
        else:
            self.entries = before
        self.crash()

    def crash(self) -> None:
        self.store.crash()
        self.crashes += 1
        self._open()

    def end(self) -> None:
        self.journal.close()
        self.crashes += 1
        self._open()

    # ---- looking

    def bodies(self, queue: str, chunk: Chunk) -> tuple[Buffer, Buffer]:
        if chunk.lengths is None or chunk.body is None:
            return self.journal.read_bodies(queue, chunk)
        return chunk.lengths, chunk.body

    def check(self) -> None:
        compare(self.state, self.model, self.bodies)
        assert (self.state.hash, self.state.applied_idx, self.state.at_ms) == (
            self.twin.hash,
            self.twin.applied_idx,
            self.twin.at_ms,
        )
        assert plain_rows(self.state) == plain_rows(self.twin), "rows that are not those of a state that never crashed"
        for version in {version for version, _ in self.state.bundles}:
            parts = self.state.bundle_parts(version)
            if parts is not None:
                whole = b"".join(self.model.bundles[(version, number)] for number in range(len(parts)))
                assert self.journal.read_bundle(version, parts) == whole, "a bundle changed"


def live(random: Random, store: Store, steps: int = STEPS) -> None:
    with (
        mock.patch.object(config, "LOG_BYTES_MAX", random.choice([0, 1500, 1 << 30])),
        mock.patch.object(chunks, "CHUNK_ITEMS_TARGET", random.choice([4096, 24])),
    ):
        life = Life(random, store)
        for _ in range(steps):
            life.step()
        life.crash()
        life.end()


unhurried = settings(deadline=None, derandomize=True)


@settings(unhurried, max_examples=15)
@given(st.randoms(use_true_random=False), st.integers(0, STEPS))
def test_on_a_simulated_disk(random: Random, steps: int) -> None:
    live(random, SimStore(), steps)


@pytest.mark.parametrize("seed", range(8))
def test_on_a_real_disk(seed: int, tmp_path: Path) -> None:
    live(Random(seed), RealStore(tmp_path))


@pytest.mark.parametrize("seed", range(8))
def test_a_longer_life_on_a_simulated_disk(seed: int) -> None:
    live(Random(seed), SimStore(), 2 * STEPS)


# --- The checks can fail ---------------------------------------------------------------------------------------------


def caught(*errors: type[Exception]) -> None:
    """One of the first lives by chance goes wrong."""
    with pytest.raises(errors or AssertionError):
        for seed in range(80):
            live(Random(seed), SimStore())


@pytest.mark.parametrize("table", list(TABLES))
def test_a_table_that_is_not_read_is_noticed(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, f"_load_{table}", lambda state, *row: None)
    caught(AssertionError, KeyError, ValueError)


def test_rows_that_are_never_deleted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = State.rows_changed
    monkeypatch.setattr(
        State,
        "rows_changed",
        lambda state: {
            table: {key: row for key, row in rows.items() if row is not None or len(key) < TABLES[table].key_columns}
            for table, rows in changed(state).items()
        },
    )
    caught()


def test_keys_of_a_new_run_that_go_with_those_of_the_old_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = State.rows_changed

    def cleared_last(state: State) -> dict[str, Any]:
        rows = changed(state)
        ends = {key: row for key, row in rows.get("keys", {}).items() if len(key) == 1}
        return {**rows, "keys": {**{k: row for k, row in rows.get("keys", {}).items() if k not in ends}, **ends}}

    monkeypatch.setattr(State, "rows_changed", cleared_last)
    caught()


def test_entries_that_go_while_chunks_need_them_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_journal, "pinned_entry", lambda row: None)
    caught(JournalCorrupt)


def test_an_applied_entry_that_is_not_committed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    put_down = SimJournal._put_down

    def hasty(journal: SimJournal, write: Write) -> Compaction:
        compaction = put_down(journal, write)
        journal._disk.image.commit_idx = journal._disk.image.last_index
        return compaction

    monkeypatch.setattr(SimJournal, "_put_down", hasty)
    caught()


def test_a_write_that_is_there_in_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    put_down = SimJournal._put_down

    def half(journal: SimJournal, write: Write) -> Compaction:
        return put_down(journal, replace(write, entries=write.entries[:1]))

    monkeypatch.setattr(SimJournal, "_put_down", half)
    caught(AssertionError, JournalCorrupt)
