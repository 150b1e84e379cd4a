"""The journal's file: what it refuses, what of damage it notices, and that it costs what it says.

What every journal promises its node, this one and the simulated one, is in `contract/test_journal_contract.py`.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from p2pcluster import config, journal
from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.log import NOOP, Entry
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.ranges import Fence
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import JournalCorrupt, JournalError
from p2pcluster.journal import FORMAT, Journal, Mark, Write, back_up, open_for_reading, read_mark, row_crc
from p2pcluster.wal import WalReport, scan_wal
from tests.contract.stores import RealStore
from tests.golden.make_journal import FOLDER as GOLDEN
from tests.golden.make_journal import describe
from tests.simulation.queue_model import beginning
from tests.simulation.sim_journal import Fault
from tests.simulation.sole_voter import SoleVoter, facts, put

FENCE = Fence("n1", "b1", 1)
ERROR = {"type": "ValueError", "text": "no", "traceback": None}


@pytest.fixture
def store(tmp_path: Path) -> RealStore:
    return RealStore(tmp_path / "store")


@pytest.fixture
def node(store: RealStore) -> SoleVoter:
    made = SoleVoter(store)
    made.commit(*beginning())
    return made


def fill(node: SoleVoter) -> None:
    """Rows in every table, and entries above them."""
    node.commit(put("p/in", 1, b"one", b"two", b"three", b"four"), put("w/x", 2, b"k", b"never", keys=b'["k", "k"]'))
    node.commit(commands.take("p/in", [(1, 4)], FENCE), commands.fail("p/in", 1, FENCE, ERROR, 5))
    node.commit(Message("member", {"node": "n1", "name": "host", "facts": {"cores": 2}}), Message("accept", {"cluster": "another"}),
                commands.part("p/in", 3, FENCE, 0, [Port(["p/last.results"], lengths_blob([4]), b"part")]))
    node.checkpoint()
    node.commit(commands.done("p/in", [(2, 3)], [Port(["p/last.results"], lengths_blob([2]), b"ok")]))
    node.commit(put("p/d", 3, b"above"))


def edited(store: RealStore, sql: str, *parameters: Any) -> None:
    """Change the closed file behind the journal's back."""
    db = sqlite3.connect(store.path)
    assert db.execute(sql, parameters).rowcount == 1, "the damage was done"
    db.commit()
    db.close()


def refused(store: RealStore, match: str) -> JournalCorrupt:
    """Neither a node nor a reader takes the file, and it stays as it is."""
    before = {path: path.read_bytes() for path in (store.path, store.wal_path) if path.exists()}
    with pytest.raises(JournalCorrupt, match=match) as caught:
        store.open()
    with pytest.raises(JournalCorrupt, match=match):
        open_for_reading(store.path, store.mark_path)
    assert {path: path.read_bytes() for path in before} == before, "a damaged file is kept"
    text = str(caught.value)
    assert "\n" not in text
    assert str(store.path) in text
    assert "journal_check" in text
    return caught.value


# --- What is no journal ----------------------------------------------------------------------------------------------


def test_a_file_of_a_newer_format_is_refused_and_not_touched(store: RealStore, node: SoleVoter) -> None:
    node.journal.close()
    edited(store, "UPDATE meta SET value = ?, crc = ? WHERE key = 'format'", FORMAT + 1, row_crc(("format", FORMAT + 1)))
    before = store.path.read_bytes()
    for opening in (store.open, lambda: open_for_reading(store.path)):
        with pytest.raises(JournalError, match=f"format {FORMAT + 1} and this version reads up to {FORMAT}: update p2pcluster"):
            opening()
    assert store.path.read_bytes() == before


def test_an_older_format_is_led_up_step_by_step(
    store: RealStore, node: SoleVoter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(node)
    before = facts(node.state)
    node.journal.close()
    steps: list[int] = []

    def step(db: sqlite3.Connection) -> None:
        steps.append(db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()[0])

    monkeypatch.setattr(journal, "FORMAT", FORMAT + 2)
    monkeypatch.setattr(journal, "MIGRATIONS", {FORMAT: step, FORMAT + 1: step})
    node.open()
    assert steps == [FORMAT, FORMAT + 1]
    assert facts(node.state) == before
    node.end()
    assert steps == [FORMAT, FORMAT + 1]


def test_a_file_that_is_not_sqlites_is_refused(store: RealStore) -> None:
    store.path.write_bytes(b"a letter to my grandmother\n" * 100)
    for opening in (store.open, lambda: open_for_reading(store.path)):
        with pytest.raises(JournalError, match="is not an SQLite file: move it away, or choose another --home"):
            opening()
    assert store.path.read_bytes() == b"a letter to my grandmother\n" * 100


def test_a_journal_whose_first_page_is_gone_is_damaged_and_not_somebody_elses(
    store: RealStore, node: SoleVoter
) -> None:
    """Nobody is told to move it away."""
    node.journal.close()
    data = store.path.read_bytes()
    store.path.write_bytes(bytes(4096) + data[4096:])
    refused(store, "its first bytes are not those of an SQLite file")


def test_somebody_elses_sqlite_file_is_refused_and_not_touched(store: RealStore) -> None:
    db = sqlite3.connect(store.path)
    db.execute("CREATE TABLE songs (title TEXT)")
    db.commit()
    db.close()
    before = store.path.read_bytes()
    with pytest.raises(JournalError, match="an SQLite file and not a journal"):
        store.open()
    assert store.path.read_bytes() == before


def test_a_folder_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be written"):
        Journal.open(tmp_path / "none" / "journal.sqlite3", tmp_path / "none" / "journal.mark")
    with pytest.raises(JournalError, match="cannot be opened"):
        open_for_reading(tmp_path / "none" / "journal.sqlite3")


def test_a_file_that_its_node_died_making_is_made_again(store: RealStore) -> None:
    store.path.write_bytes(b"")
    assert store.open()[1].last_index == 0


# --- How it is written -----------------------------------------------------------------------------------------------


def test_a_commit_is_on_the_disk_when_it_returns(store: RealStore) -> None:
    """By these settings, as far as SQLite and the disk keep their word."""
    opened, _ = store.open()
    db = opened._db

    def setting(name: str) -> Any:
        return db.execute(f"PRAGMA {name}").fetchone()[0]

    assert setting("journal_mode") == "wal"
    assert setting("synchronous") == 2  # FULL: the log is synced at each commit
    assert setting("fullfsync") == 1  # on macOS, down to the disk itself
    assert setting("wal_autocheckpoint") == 0
    assert setting("busy_timeout") == 5000


def test_a_write_is_one_transaction(store: RealStore, node: SoleVoter) -> None:
    """Entries, vote, tables and a slice of compaction share an fsync."""
    before = scan_wal(store.wal_path).commits
    node.write(
        Write(
            node.entries([put("p/in", 1, b"x")]),
            HardState(2, "n1"),
            sole_voter=True,
            checkpoint=journal.checkpoint_of(node.state),
            compact=(2, 1 << 20),
            meta=(("node_id", "n1"),),
        )
    )
    assert scan_wal(store.wal_path).commits == before + 1


def test_an_end_in_order_leaves_one_file_that_says_where_it_ends(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    assert not store.wal_path.exists()
    meta = open_for_reading(store.path).meta
    assert meta["clean_idx"] == node.last_index
    node.open()
    node.commit(put("p/d", 4, b"y"))
    assert open_for_reading(store.path).meta["clean_idx"] is None


def test_the_write_ahead_log_is_copied_back_when_asked(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.commit(put("p/d", 4, b"y" * 10_000))
    opened = node.journal
    assert isinstance(opened, Journal)
    size = opened.wal_bytes
    assert size > 10_000
    opened.checkpoint_wal()
    node.commit(put("p/d", 5, b"y"))
    assert opened.wal_bytes == size, "it is begun anew in place"
    node.crash()
    assert node.values("p/d")[-1] == b"y"


# --- Damage in the file ----------------------------------------------------------------------------------------------


def first_row_of(table: str) -> str:
    keys = ", ".join([*TABLES[table].columns][: TABLES[table].key_columns])
    return f"({keys}) = (SELECT {keys} FROM {table} LIMIT 1)"


@pytest.mark.parametrize("table", list(TABLES))
def test_a_row_that_is_lost_is_noticed(table: str, store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    edited(store, f"DELETE FROM {table} WHERE {first_row_of(table)}")
    refused(store, f"table {table} does not add up")


@pytest.mark.parametrize(
    ("table", "column"),
    [(table, column) for table, spec in TABLES.items() for column in spec.columns if column not in ("lengths", "body")],
)
def test_a_row_that_is_changed_is_noticed(table: str, column: str, store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    changed = {
        "TEXT": f"coalesce({column}, '') || 'x'",
        "BLOB": f"CAST(coalesce({column}, '') || 'x' AS BLOB)",
        "INTEGER": f"coalesce({column}, 0) + 1.5",
    }[TABLES[table].columns[column]]
    edited(store, f"UPDATE {table} SET {column} = {changed} WHERE {first_row_of(table)}")
    refused(store, f"table {table}, row .* is damaged")


def test_a_row_too_many_is_noticed(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    row = ("ghost", "host", "{}")
    edited(store, "INSERT INTO members VALUES (?,?,?,?)", *row, row_crc(row))
    refused(store, "table members does not add up")


def test_a_row_that_is_older_than_the_sum_is_noticed(store: RealStore, node: SoleVoter) -> None:
    """A page that was never written: its rows are whole, and of yesterday."""
    fill(node)
    old = sqlite3.connect(store.path).execute("SELECT * FROM queues WHERE name = 'p/in'").fetchone()
    node.checkpoint()
    node.journal.close()
    edited(store, "REPLACE INTO queues VALUES (?,?,?,?,?,?)", *old)
    refused(store, "table queues does not add up")


def meta_keys() -> list[str]:
    return list(journal._META_START)


@pytest.mark.parametrize("key", meta_keys())
def test_a_meta_row_that_is_lost_is_noticed(key: str, store: RealStore, node: SoleVoter) -> None:
    """A vote that is lost would be given twice."""
    node.journal.close()
    edited(store, "DELETE FROM meta WHERE key = ?", key)
    refused(store, "does not say its format" if key == "format" else f"meta row '{key}' is missing")


@pytest.mark.parametrize("key", ["term", "voted_for", "applied_idx", "base_chain", "sum_chunks", "commit_idx"])
def test_a_meta_row_that_is_changed_is_noticed(key: str, store: RealStore, node: SoleVoter) -> None:
    node.journal.close()
    edited(store, "UPDATE meta SET value = 17 WHERE key = ?", key)
    refused(store, f"meta row '{key}' is damaged")


@pytest.mark.parametrize("column", ["term", "at_ms", "kind", "body", "chain", "commit_idx", "crc"])
def test_an_entry_that_is_changed_is_noticed(column: str, store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    edited(
        store,
        f"UPDATE journal SET {column} = CASE typeof({column}) WHEN 'integer' THEN {column} + 1 ELSE zeroblob(16) END "
        "WHERE idx = 3",
    )
    assert refused(store, "entry 3 is damaged").index == 3


def test_an_entry_that_is_missing_is_noticed(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    edited(store, "DELETE FROM journal WHERE idx = 3")
    assert refused(store, "entry 3 is missing").index == 3


def test_an_entry_of_another_log_is_noticed(store: RealStore, node: SoleVoter) -> None:
    """It is whole, and it does not follow the one before."""
    fill(node)
    node.journal.close()
    row = (6, 1, 60, NOOP, b"", bytes(16), 6)
    edited(store, "REPLACE INTO journal VALUES (?,?,?,?,?,?,?,?)", *row, row_crc(row))
    refused(store, "the chain breaks at entry 6")


@pytest.mark.parametrize("with_mark", [True, False])
def test_the_last_entry_of_a_log_that_was_closed_in_order_is_missed(
    store: RealStore, node: SoleVoter, with_mark: bool
) -> None:
    fill(node)
    node.journal.close()
    edited(store, "DELETE FROM journal WHERE idx = 6")
    if not with_mark:
        store.mark_path.unlink()
    refused(store, "was closed at entry 6 and ends at 5")


def test_tables_that_are_ahead_of_the_log_are_noticed(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.checkpoint()
    node.crash()
    node.journal.abandon()
    db = sqlite3.connect(store.path)
    db.execute("DELETE FROM journal WHERE idx > 4")
    db.commit()
    db.close()
    store.mark_path.unlink()
    with pytest.raises(JournalCorrupt, match="the tables stand at entry 6 and the log ends at 4"):
        store.open()


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_bytes_in_a_rows_own_columns_are_checked_when_they_are_read(
    store: RealStore, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "LOG_BYTES_MAX", 0)
    node = SoleVoter(store, memory)
    node.commit(*beginning())
    fill(node)
    node.checkpoint()
    while node.compact().more:
        pass
    node.journal.close()
    edited(store, "UPDATE chunks SET body = 'four times' WHERE queue = 'p/in'")
    node.open()
    with pytest.raises(JournalCorrupt, match="the bytes of p/in 1 are damaged"):
        node.values("p/in")
    assert node.values("p/d") == [b"above"]
    edited(store, "UPDATE bundles SET body = 'PK' WHERE version = 'v1' AND part = 1")
    parts = node.state.bundle_parts("v1")
    assert parts is not None
    with pytest.raises(JournalCorrupt, match="part 1 of bundle v1 is damaged"):
        node.journal.read_bundle("v1", parts)


def damage_somewhere(random: Random, data: bytes) -> bytes:
    """One bit, one byte or a page gone wrong."""
    at = random.randrange(len(data))
    kind = random.choice(["bit", "bit", "byte", "page"])
    if kind == "page":
        start = at - at % 4096
        return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]
    return (
        data[:at]
        + bytes([data[at] ^ (1 << random.randrange(8)) if kind == "bit" else random.randrange(256)])
        + data[at + 1 :]
    )


def everything(node: SoleVoter) -> Any:
    parts = {version: node.state.bundle_parts(version) for version in ("v1", "w1")}
    return (
        facts(node.state),
        node.recovered.hard_state,
        node.recovered.base_index,
        node.recovered.commit_index,
        [(e.index, e.term, e.at_ms, e.kind, bytes(e.body)) for e in node.journal.entries(0)],
        {queue: node.values(queue) for queue in node.state.queues},
        {version: node.journal.read_bundle(version, found) for version, found in parts.items() if found is not None},
    )


@pytest.mark.parametrize("wal", [False, True])
def test_damage_anywhere_is_noticed_or_does_no_harm(store: RealStore, wal: bool, tmp_path: Path) -> None:
    node = SoleVoter(store, memory=0)
    node.commit(*beginning())
    fill(node)
    node.write(Write(hard_state=HardState(5, "n1")))
    node.crash() if wal else node.end()
    before = everything(node)
    home = tmp_path / "before"
    shutil.copytree(store.path.parent, home)
    (home / "journal.sqlite3-shm").unlink(missing_ok=True)
    if not wal:
        (home / "journal.sqlite3-wal").unlink(missing_ok=True)
    noticed = 0
    for seed in range(40):
        damaged = RealStore(tmp_path / f"damaged-{seed}")
        shutil.copytree(home, damaged.path.parent, dirs_exist_ok=True)
        path = damaged.wal_path if wal else damaged.path
        path.write_bytes(damage_somewhere(Random(seed), path.read_bytes()))
        try:
            opened = SoleVoter(damaged, memory=0)
            assert everything(opened) == before, f"damage of seed {seed} went unseen"
            opened.journal.abandon()
        except JournalError as error:
            noticed += 1
            assert "\n" not in str(error)
        shutil.rmtree(damaged.path.parent)
    assert noticed > 10


# --- The mark: what was committed and is gone ------------------------------------------------------------------------


def cut_last_commit(store: RealStore) -> None:
    """As if the disk had lost what it said that it had."""
    report = scan_wal(store.wal_path)
    data = store.wal_path.read_bytes()
    end = report.valid_end_offset
    while scan_wal(data[:end]).commits == report.commits:
        end -= 24 + 4096
    store.wal_path.write_bytes(data[:end])


@pytest.mark.parametrize(
    "last",
    [
        lambda node: node.commit(put("p/in", 1, b"acknowledged")),
        lambda node: node.write(Write(hard_state=HardState(3, None))),
        lambda node: node.write(Write(hard_state=HardState(1, "n1"))),
    ],
    ids=["an entry", "a term", "a vote"],
)
def test_the_loss_of_the_last_commit_is_noticed(
    store: RealStore, node: SoleVoter, last: Callable[[SoleVoter], Any]
) -> None:
    node.write(Write(hard_state=HardState(1, None)))
    last(node)
    store.crash()
    cut_last_commit(store)
    refused(store, "it ends at entry 1 and had committed 2|the last term or vote is not in it")


def test_without_the_mark_the_loss_would_go_unseen(store: RealStore, node: SoleVoter) -> None:
    """That the mark is what notices it."""
    node.commit(put("p/in", 1, b"acknowledged"))
    store.crash()
    cut_last_commit(store)
    store.mark_path.unlink()
    assert store.open()[1].last_index == 1


def test_a_commit_that_was_not_acknowledged_may_be_gone(store: RealStore, node: SoleVoter) -> None:
    store.fail_write(1, Fault.AFTER)
    with pytest.raises(JournalError):
        node.commit(put("p/in", 1, b"never acknowledged"))
    store.crash()
    cut_last_commit(store)
    assert store.open()[1].last_index == 1


def test_the_very_first_commit_may_be_torn(store: RealStore) -> None:
    fresh = SoleVoter(store)
    for _ in range(2):  # with its last frame cut, and with it whole
        store.fail_write(1, Fault.TORN)
        with pytest.raises(JournalError):
            fresh.commit(*beginning())
        fresh.crash()
        assert fresh.last_index == 0
    fresh.commit(*beginning())


def test_a_journal_without_a_mark_gets_one(store: RealStore, node: SoleVoter) -> None:
    """A backup that was put in place, say: from here on the loss of its last commit is noticed."""
    node.journal.close()
    store.mark_path.unlink()
    node.open()
    slot = read_mark(store.mark_path.read_bytes())
    assert slot is not None
    assert slot.last_index == 1


def test_a_flipped_bit_in_the_middle_of_the_write_ahead_log_is_noticed(store: RealStore, node: SoleVoter) -> None:
    for seq in range(1, 4):
        node.commit(put("p/in", seq, b"x"))
    store.crash()
    data = bytearray(store.wal_path.read_bytes())
    data[len(data) // 2] ^= 4
    store.wal_path.write_bytes(data)
    refused(store, "SQLite would drop without a word")


@pytest.mark.parametrize("what", ["gone", "empty", "older"])
def test_a_journal_that_is_not_the_one_that_the_mark_knows_is_noticed(
    store: RealStore, node: SoleVoter, what: str
) -> None:
    node.journal.close()
    old = store.path.read_bytes()
    node.open()
    node.commit(put("p/in", 1, b"x"))
    node.journal.close()
    if what == "gone":
        store.path.unlink()
    else:
        store.path.write_bytes(b"" if what == "empty" else old)
    with pytest.raises(JournalCorrupt, match="it is gone|it is empty|it ends at entry 1 and had committed 2"):
        store.open()


def test_another_journal_of_the_same_length_is_noticed(store: RealStore, node: SoleVoter, tmp_path: Path) -> None:
    other = SoleVoter(RealStore(tmp_path / "other"))
    other.commit(put("p/other", 1, b"x"))
    other.journal.close()
    node.journal.close()
    shutil.copy(tmp_path / "other" / "life-0" / "journal.sqlite3", store.path)
    refused(store, "entry 1 is not the one that was committed")


def test_a_log_that_is_cut_off_takes_its_mark_back_first(
    store: RealStore, node: SoleVoter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may die between the commit and the mark's move."""

    def tail(fault: Fault) -> None:
        node.journal.write(
            Write(node.entries([put("p/in", 1, b"a")], [put("p/in", 2, b"b")], [put("p/in", 3, b"c")]), commit_index=1)
        )
        store.fail_write(1, fault)
        with pytest.raises(JournalError):
            node.journal.write(Write((Entry(2, 2, 90, NOOP, b""),), truncate_from=2, commit_index=1))
        node.crash()

    tail(Fault.BEFORE)
    assert node.last_index == 4
    node.journal.write(Write(truncate_from=2, commit_index=1))
    node.last_index = 1
    tail(Fault.AFTER)
    assert node.last_index == 2
    monkeypatch.setattr(Mark, "go_back", lambda mark, last_index: None)
    node.journal.write(Write(truncate_from=2, commit_index=1))
    node.last_index = 1
    with pytest.raises(JournalCorrupt, match="had committed 4"):
        tail(Fault.AFTER)


def test_a_snapshot_takes_the_mark_back_first(store: RealStore, node: SoleVoter, tmp_path: Path) -> None:
    """Its last entry may stand where this node had another one."""
    source = SoleVoter(RealStore(tmp_path / "source"))
    source.commit(*beginning())
    source.commit(put("p/in", 1, b"x"))
    head = source.journal.snapshot_head(source.state, Configuration(("n1",)))
    rows = list(source.journal.snapshot_rows(source.state))
    node.journal.write(Write((Entry(2, 1, 20, NOOP, b""),), commit_index=1))
    store.fail_write(1, Fault.AFTER)
    with pytest.raises(JournalError):
        node.journal.install(head, rows, None)
    node.crash()
    assert node.state.hash == source.state.hash


def test_a_mark_is_read_from_whichever_slot_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    mark = Mark(path)
    for index in range(1, 4):
        mark.move(index, 2 * index, bytes([index]) * 16)
    mark.close()
    whole = path.read_bytes()
    assert read_mark(whole) == (3, 3, 6, bytes([3]) * 16)
    half = bytearray(whole)
    half[64 + 20] ^= 1  # the third move went to the second slot
    assert read_mark(bytes(half)) == (2, 2, 4, bytes([2]) * 16)
    half[20] ^= 1
    assert read_mark(bytes(half)) is None
    assert read_mark(b"") is None
    assert Mark(path).slot.last_index == 3


def test_a_mark_that_is_nonsense_is_none(store: RealStore, node: SoleVoter) -> None:
    """The machine died while it was written: it may be behind, and this one is as far behind as can be."""
    node.journal.close()
    store.mark_path.write_bytes(b"nonsense" * 100)
    node.open()
    node.commit(put("p/in", 1, b"x"))
    node.end()
    assert node.last_index == 2


# --- A full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def test_a_full_disk_is_named_and_nothing_acknowledged_is_lost(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    store = RealStore(small_disk / "node")
    node = SoleVoter(store)
    node.commit(*beginning())
    acknowledged = 0
    with pytest.raises(JournalError, match=f"the disk of {store.path.parent} .*free some space") as caught:
        while True:
            node.commit(put("p/in", acknowledged + 1, b"x" * 10_000))
            acknowledged += 1
    assert "\n" not in str(caught.value)
    assert acknowledged > 5
    node.journal.abandon()
    with pytest.raises(JournalError, match="full|failed|cannot"):
        while True:  # started again on the full disk, it may open, and it fails in the same way
            node.open()
            node.commit(put("p/in", acknowledged + 1, b"x" * 10_000))
    node.journal.abandon()
    ballast.unlink()
    node.open()
    assert node.values("p/in") == [b"x" * 10_000] * acknowledged
    node.commit(put("p/in", acknowledged + 1, b"y"))
    node.end()
    assert node.values("p/in")[acknowledged:] == [b"y"]


def test_a_mark_that_finds_no_room_is_an_error_of_one_line(small_disk: Path) -> None:
    (small_disk / "all of it").write_bytes(bytes(1 << 20))
    with pytest.raises(JournalError, match="journal.mark cannot be written .*free some space"):
        Journal.open(small_disk / "journal.sqlite3", small_disk / "journal.mark")


# --- Readers and copies ----------------------------------------------------------------------------------------------


def test_a_reader_sees_what_is_committed_beside_the_open_writer(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    reader = open_for_reading(store.path, store.mark_path)
    assert (reader.last_index, facts(reader.state)) == (node.last_index, facts(node.state))
    node.commit(put("p/d", 4, b"y"))
    node.checkpoint()
    assert open_for_reading(store.path, store.mark_path).last_index == node.last_index
    assert reader.last_index == node.last_index - 1


def test_a_reader_changes_nothing(store: RealStore, node: SoleVoter) -> None:
    fill(node)
    node.journal.close()
    before = store.path.read_bytes()
    assert open_for_reading(store.path, store.mark_path).last_index == 6
    assert store.path.read_bytes() == before


def meanwhile(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """`action` happens once, after a reader has read the mark and before it reads the file."""
    connect = journal._connect_read_only
    left = [action]

    def act_first(path: Path) -> sqlite3.Connection:
        while left:
            left.pop()()
        return connect(path)

    monkeypatch.setattr(journal, "_connect_read_only", act_first)


def test_a_reader_is_not_misled_by_what_is_written_meanwhile(
    store: RealStore, node: SoleVoter, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.journal.write(Write(node.entries([put("p/in", 1, b"x")], [put("p/in", 2, b"y")]), commit_index=1))
    meanwhile(monkeypatch, lambda: node.journal.write(Write((Entry(4, 1, 50, NOOP, b""),), commit_index=1)))
    assert open_for_reading(store.path, store.mark_path).last_index == 4
    meanwhile(monkeypatch, lambda: node.journal.write(Write(truncate_from=3, commit_index=1)))
    assert open_for_reading(store.path, store.mark_path).last_index == 2


def test_a_write_ahead_log_that_is_begun_anew_while_it_is_scanned_is_no_damage(
    store: RealStore, node: SoleVoter, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.commit(put("p/in", 1, b"x"))
    good = scan_wal(store.wal_path)
    torn = WalReport(4096, 3, 1, 0, "frame 3 is bad", 3, 9, 5)
    answers = [torn, good]
    monkeypatch.setattr(journal, "scan_wal", lambda path: answers.pop(0))
    assert open_for_reading(store.path).last_index == 2
    answers[:] = [torn, torn]
    with pytest.raises(JournalCorrupt, match="frame 3 is bad"):
        open_for_reading(store.path)


def test_a_backup_holds_everything_and_is_a_journal(store: RealStore, node: SoleVoter, tmp_path: Path) -> None:
    fill(node)
    target = tmp_path / "copy.sqlite3"
    assert back_up(store.path, target) == node.last_index
    node.commit(put("p/d", 4, b"later"))
    copied = RealStore(tmp_path / "restored")
    shutil.copy(target, copied.path)
    restored = SoleVoter(copied)
    assert restored.last_index == node.last_index - 1
    assert restored.values("p/in") == node.values("p/in")
    restored.commit(put("p/d", 4, b"another"))
    with pytest.raises(JournalError, match="exists"):
        back_up(store.path, target)
    with pytest.raises(JournalError, match="no journal"):
        back_up(tmp_path / "none", tmp_path / "copy2")


def test_a_damaged_journal_is_not_copied_under_a_good_name(store: RealStore, node: SoleVoter, tmp_path: Path) -> None:
    fill(node)
    node.journal.close()
    edited(store, "DELETE FROM journal WHERE idx = 3")
    with pytest.raises(JournalCorrupt, match="entry 3 is missing"):
        back_up(store.path, tmp_path / "copy")
    assert not list(tmp_path.glob("copy*"))


# --- Small things ----------------------------------------------------------------------------------------------------


def test_a_rows_crc_tells_types_and_borders_apart() -> None:
    rows: list[tuple[Any, ...]] = [
        (),
        (None,),
        ("",),
        (b"",),
        (0,),
        ("0",),
        (b"0",),
        (0.0,),
        ("a", "b"),
        ("ab",),
        ("", "ab"),
        (None, None),
        (1, 2),
        (12,),
        (-1,),
        (1 << 62,),
        ("ä",),
        ("ä".encode(),),
    ]
    assert len({row_crc(row) for row in rows}) == len(rows)


def test_after_an_error_the_file_is_left_for_the_next_start_to_judge(store: RealStore, node: SoleVoter) -> None:
    """A connection that can write would copy the write-ahead log back as it closes."""
    store.fail_write(1, Fault.BEFORE)
    with pytest.raises(JournalError, match="start again"):
        node.commit(put("p/in", 1, b"x"))
    wal = store.wal_path.read_bytes()
    file = store.path.read_bytes()
    node.journal.abandon()
    assert (store.wal_path.read_bytes(), store.path.read_bytes()) == (wal, file)


# --- Journals of earlier versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_journal_of_an_earlier_version_is_opened_forever(version: int, memory: int, store: RealStore) -> None:
    shutil.copy(GOLDEN / f"journal_v{version}.sqlite3", store.path)
    opened, recovered = Journal.open(store.path, store.mark_path, memory)
    assert describe(opened, recovered) == json.loads((GOLDEN / f"journal_v{version}.json").read_text())
    opened.close()
    node = SoleVoter(store, memory)
    node.write(Write(truncate_from=node.recovered.commit_index + 1))
    node.last_index = node.recovered.commit_index
    node.commit(Message("retry", {"queue": "p/in", "ids": None}), put("p/d", 16, b"goes on"))
    node.checkpoint()
    while node.compact().more:
        pass
    node.end()
    assert node.values("p/in") == [b"first", b"third", b"fourth"]
    assert node.values("p/d")[-1] == b"goes on"


def test_what_only_reads_leaves_an_older_journal_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    shutil.copy(GOLDEN / "journal_v1.sqlite3", path)
    with pytest.raises(JournalError, match="has format 1, .* start its node once with this version, which leads it up"):
        open_for_reading(path)
    assert path.read_bytes() == (GOLDEN / "journal_v1.sqlite3").read_bytes()


def test_the_golden_journal_is_read_beside_a_shell_that_only_looks(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    shutil.copy(GOLDEN / "journal_v3.sqlite3", path)
    assert open_for_reading(path).last_index == 32
    db = sqlite3.connect(path)
    assert db.execute("SELECT id, error FROM parked WHERE queue = 'p/in'").fetchone()[0] == 1
    assert db.execute("SELECT name, next_id, put, done FROM queues WHERE name = 'p/in'").fetchone() == ("p/in", 5, 4, 1)
    columns = {table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")] for table in TABLES}
    assert columns == {table: [*spec.columns, "crc"] for table, spec in TABLES.items()}, "the columns are a contract"
