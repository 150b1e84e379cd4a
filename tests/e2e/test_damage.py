"""A damaged journal is never taken for a whole one: neither by the check, nor by a node that starts on it.

Bytes are changed one at a time, at random: the seed is printed, and `P2PCLUSTER_TEST_SEED` gives another. Whatever is
not noticed must not matter: then every row, and the bytes of every item that is not finished, are shown to be what
they were.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from harness import ROOT, Site

from p2pcluster.errors import JournalCorrupt, JournalError
from p2pcluster.journal import Journal, JournalReader, Recovered, row_crc
from p2pcluster.wal import scan_wal
from tests.journals import Scribe, mixed

sys.path.insert(0, str(ROOT / "scripts"))

import _journal  # noqa: E402
import journal_check  # noqa: E402
from _contents import contents_of  # noqa: E402

FLIPS_REPLAYED, FLIPS_COMPACTED = 400, 600  # in closed journals: a thousand together
WAL_FLIPS = 200  # in each write-ahead log
OPENED_FLIPS = 100  # in closed journals, each opened as a node would


@pytest.fixture
def seed(capsys: pytest.CaptureFixture[str]) -> int:
    seed = int(os.environ.get("P2PCLUSTER_TEST_SEED", "2718"))
    with capsys.disabled():
        print(f" seed {seed}", end="", flush=True)
    return seed


def flips(chance: Random, size: int, count: int) -> Iterator[tuple[int, int]]:
    """Where, and with what the byte there is combined: half of them turn a single bit."""
    for _ in range(count):
        yield chance.randrange(size), 1 << chance.randrange(8) if chance.random() < 0.5 else chance.randrange(1, 256)


@dataclass
class Flipped:
    """A file of which one byte at a time is another."""

    path: Path
    whole: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.whole = self.path.read_bytes()

    def put(self, at: int, mask: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([self.whole[at] ^ mask]))

    def restore(self, at: int) -> None:
        self.put(at, 0)


Everything = tuple[Any, ...]


def everything(recovered: Recovered, meta: dict[str, Any], bodies: Any) -> Everything:
    """All that a node would start from."""
    state = recovered.state
    held = [(queue.name, chunk.first, *map(bytes, bodies(queue.name, chunk)))
            for queue in state.queues.values() for chunk in queue.chunks]
    kept = {name: value for name, value in meta.items() if name in ("node_id", "cluster_id", "cluster_name")}
    return (recovered.hard_state, recovered.last_index, recovered.commit_index, state.applied_idx, state.hash, kept,
            state.all_rows(), held)


def everything_read(folder: Path) -> Everything:
    """The same, over a connection that only reads."""
    place = _journal.place_of(str(folder))
    db = _journal.connect(place)
    try:
        reader = JournalReader(db, place.journal, body_memory_bytes_max=0)
        return everything(reader.recovered, reader.meta,
                          lambda queue, chunk: _journal.bodies_of(db, place.journal, queue, chunk))
    finally:
        db.close()


def everything_opened(folder: Path) -> Everything:
    """What a node that starts here has. Raises what stops it."""
    journal, recovered = Journal.open(folder / "journal.sqlite3", folder / "journal.mark", body_memory_bytes_max=0)
    try:
        return everything(recovered, journal.meta, lambda queue, chunk: (
            (chunk.lengths, chunk.body) if chunk.body is not None else journal.read_bodies(queue, chunk)))
    finally:
        journal.abandon()


# ---- where the log's rows lie in the file (https://www.sqlite.org/fileformat2.html)


class LogMap:
    """Which entry of the log each byte of a journal belongs to; the tree around the entries belongs to none."""

    def __init__(self, data: bytes, root: int) -> None:
        self._data = data
        self._page_bytes = int.from_bytes(data[16:18], "big")
        self._usable = self._page_bytes - data[20]
        self.entry_at: dict[int, int] = {}
        self._page(root)

    def _page(self, number: int) -> None:
        start = (number - 1) * self._page_bytes
        head = start + (100 if number == 1 else 0)
        kind, cells = self._data[head], int.from_bytes(self._data[head + 3 : head + 5], "big")
        assert kind in (5, 13), f"page {number} is no page of a table"
        pointers = head + (8 if kind == 13 else 12)
        for cell in range(cells):
            at = start + int.from_bytes(self._data[pointers + 2 * cell : pointers + 2 * cell + 2], "big")
            if kind == 13:
                self._leaf_cell(at)
            else:
                self._page(int.from_bytes(self._data[at : at + 4], "big"))
        if kind == 5:
            self._page(int.from_bytes(self._data[head + 8 : head + 12], "big"))

    def _leaf_cell(self, at: int) -> None:
        payload, at = self._varint(at)
        index, at = self._varint(at)
        most, least = self._usable - 35, (self._usable - 12) * 32 // 255 - 23
        local = payload
        if payload > most:
            local = least + (payload - least) % (self._usable - 4)
            local = least if local > most else local
        self._mark(at, local, index)
        left, page = payload - local, int.from_bytes(self._data[at + local : at + local + 4], "big")
        while left > 0:
            start = (page - 1) * self._page_bytes
            here = min(left, self._usable - 4)
            self._mark(start + 4, here, index)
            left, page = left - here, int.from_bytes(self._data[start : start + 4], "big")

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        while True:
            byte = self._data[at]
            value, at = value << 7 | byte & 0x7F, at + 1
            if byte < 0x80:
                return value, at

    def _mark(self, at: int, count: int, index: int) -> None:
        self.entry_at.update(dict.fromkeys(range(at, at + count), index))


def log_map(folder: Path) -> LogMap:
    db = _journal.connect(_journal.place_of(str(folder)))
    try:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'journal'").fetchone()
    finally:
        db.close()
    return LogMap((folder / "journal.sqlite3").read_bytes(), root)


# ---- closed journals


def closed(folder: Path, seed: int, from_start: bool) -> Path:
    scribe = mixed(folder, seed, from_start, steps=40 if from_start else 70)
    scribe.close()
    return folder


def told(place: _journal.Place) -> tuple[str, list[int | None], str]:
    """What a check says: damaged or whole, the entries that it names, and what the whole holds."""
    try:
        report = journal_check.check(place)
    except JournalError:
        return "refused", [], ""
    if report.is_whole:
        return "whole", [], report.digest
    return "damaged", [problem.index for problem in report.problems], ""


@pytest.mark.parametrize(("from_start", "count"), [(True, FLIPS_REPLAYED), (False, FLIPS_COMPACTED)],
                         ids=["whole log", "compacted"])
def test_the_check_notices_every_flipped_byte_that_matters(tmp_path: Path, seed: int, from_start: bool, count: int,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    folder = closed(tmp_path / "home", seed, from_start)
    place = _journal.place_of(str(folder))
    outcome, _, digest = told(place)
    assert outcome == "whole"
    before, entry_at = everything_read(folder), log_map(folder).entry_at
    file = Flipped(place.journal)
    counts: Counter[str] = Counter()
    for at, mask in flips(Random(seed), len(file.whole), count):
        file.put(at, mask)
        outcome, indexes, found = told(place)
        counts[f"{outcome}, {'an entry' if at in entry_at else 'elsewhere'}"] += 1
        if outcome == "whole":
            assert found == digest, f"byte {at} with {mask:#x}: it is said to be whole and holds something else"
            assert everything_read(folder) == before, f"byte {at} with {mask:#x}"
        elif at in entry_at:
            assert entry_at[at] in indexes, f"byte {at}, {mask:#x} lies in {entry_at[at]} and the check names {indexes}"
        file.restore(at)
    assert told(place) == ("whole", [], digest)
    assert file.path.read_bytes() == file.whole
    with capsys.disabled():
        print(f" {dict(sorted(counts.items()))}", end="", flush=True)
    assert counts["damaged, an entry"] > 0 and counts["whole, elsewhere"] > 0


def test_a_node_does_not_start_on_another_state_because_of_a_flipped_byte(tmp_path: Path, seed: int,
                                                                         capsys: pytest.CaptureFixture[str]) -> None:
    folder = closed(tmp_path / "home", seed, from_start=False)
    before = everything_read(folder)
    whole = (folder / "journal.sqlite3").read_bytes()
    counts: Counter[str] = Counter()
    for number, (at, mask) in enumerate(flips(Random(seed), len(whole), OPENED_FLIPS)):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(folder, copy)
        Flipped(copy / "journal.sqlite3").put(at, mask)
        damaged = (copy / "journal.sqlite3").read_bytes()
        try:
            found = everything_opened(copy)
        except JournalError as error:
            counts[type(error).__name__] += 1
            assert (copy / "journal.sqlite3").read_bytes() == damaged, "the file is kept as it is"
        else:
            counts["started"] += 1
            assert found == before, f"byte {at} with {mask:#x}"
        shutil.rmtree(copy)
    with capsys.disabled():
        print(f" {dict(counts)}", end="", flush=True)


# ---- the write-ahead log that a kill leaves behind


def meaning(folder: Path) -> Everything:
    """What a node that starts here has, whatever way its chunks lie: nothing is lost with a checkpoint alone."""
    journal, recovered = Journal.open(folder / "journal.sqlite3", folder / "journal.mark", body_memory_bytes_max=0)
    try:
        contents = contents_of(recovered.state, lambda queue, chunk: (
            (bytes(chunk.lengths), bytes(chunk.body)) if chunk.body is not None else journal.read_bodies(queue, chunk)))
        return recovered.hard_state, recovered.last_index, recovered.commit_index, journal.meta["node_id"], contents
    finally:
        journal.abandon()


def without_last_commit(killed: Path) -> Path:
    """The same files, as if the kill had come before the last commit reached the write-ahead log."""
    copy = shutil.copytree(killed, killed.with_name("cut"))
    log = copy / "journal.sqlite3-wal"
    os.truncate(log, scan_wal(log).valid_end_offset - 1)
    return copy


def committed(killed: Path) -> list[Everything]:
    """What a node may start from. A kill may come when a commit is in the file and its write has not returned, so that
    nobody was told and the mark does not know of it: then its loss is none."""
    found = [meaning(shutil.copytree(killed, killed.with_name("untouched")))]
    with contextlib.suppress(JournalCorrupt):
        found.append(meaning(without_last_commit(killed)))
    return found


def flip_the_log(killed: Path, acceptable: list[Everything], seed: int, count: int) -> Counter[str]:
    """Start a node on each of `count` write-ahead logs with one byte changed: it has what was committed, or says that
    it has not."""
    log = killed / "journal.sqlite3-wal"
    counts: Counter[str] = Counter()
    for number, (at, mask) in enumerate(flips(Random(seed), log.stat().st_size, count)):
        copy = killed.with_name(f"copy{number}")
        shutil.copytree(killed, copy)
        flipped = Flipped(copy / log.name)
        flipped.put(at, mask)
        try:
            found = meaning(copy)
        except JournalCorrupt:
            counts["refused"] += 1
            assert (copy / log.name).stat().st_size == len(flipped.whole), "the write-ahead log is kept as it is"
            assert not journal_check.check(_journal.place_of(str(copy))).is_whole, f"byte {at} with {mask:#x}"
        else:
            counts["started with all" if found == acceptable[0] else "started without what nobody was told of"] += 1
            assert found in acceptable, f"byte {at} with {mask:#x}: a node starts on something else"
        shutil.rmtree(copy)
    return counts


def test_no_flip_in_the_log_of_a_killed_writer_makes_a_node_start_on_less(tmp_path: Path, seed: int,
                                                                          capsys: pytest.CaptureFixture[str]) -> None:
    scribe = mixed(tmp_path / "home", seed, from_start=False, steps=25)
    scribe.journal.checkpoint_wal()  # what follows begins the log anew, with frames of the former one behind
    scribe.wander(12)
    scribe.vote(2, "node-b")
    killed = scribe.killed(tmp_path / "killed")
    scribe.journal.abandon()
    assert journal_check.check(_journal.place_of(str(killed))).is_whole
    acceptable = committed(killed)
    assert len(acceptable) == 1, "the last vote was told"
    counts = flip_the_log(killed, acceptable, seed, WAL_FLIPS)
    with capsys.disabled():
        print(f" {dict(counts)}", end="", flush=True)
    assert counts["refused"] > 0


SQUARES = """
import time
from p2pcluster import Pipeline, sink, source, stage

@source
def Numbers():
    for n in range(100_000):
        yield {"n": n}
        time.sleep(0.01)

@stage(retries=0)
def Square(x):
    if x["n"] % 10 == 3:
        raise ValueError(f"not {x}")
    return x["n"] ** 2

@sink
def Print(x):
    print(x)

pipeline = Pipeline("squares", Numbers >> Square >> Print)
"""


def test_no_flip_in_the_log_of_a_killed_node_makes_it_start_on_less(site: Site, tmp_path: Path, seed: int,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    node = site.start("run", site.project(SQUARES))
    node.wait_for_line(f"Print | {25 ** 2}")
    node.kill()
    killed = tmp_path / "killed"
    killed.mkdir()
    for path in site.home.glob("journal.*"):
        shutil.copy(path, killed / path.name)
    report = journal_check.check(_journal.place_of(str(killed)))
    assert report.is_whole, report
    assert report.last > 25 and report.parked > 0, "work was in hand"
    counts = flip_the_log(killed, committed(killed), seed, WAL_FLIPS)
    with capsys.disabled():
        print(f" {dict(counts)}", end="", flush=True)
    assert counts["refused"] > 0


# ---- what single flips would seldom meet


def last_commit_flipped(scribe: Scribe, folder: Path) -> Path:
    """A kill's files, with the last byte of the write-ahead log's last commit changed."""
    killed = scribe.killed(folder)
    scribe.journal.abandon()
    log = Flipped(killed / "journal.sqlite3-wal")
    log.put(len(log.whole) - 1, 1)
    return killed


def test_a_lost_last_vote_is_noticed(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    scribe.vote(5, "node-b")
    killed = last_commit_flipped(scribe, tmp_path / "killed")
    with pytest.raises(JournalCorrupt, match="the last term or vote is not in it"):
        everything_opened(killed)
    assert "term or vote" in str(journal_check.check(_journal.place_of(str(killed))))


def test_a_lost_last_entry_is_noticed(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    killed = last_commit_flipped(scribe, tmp_path / "killed")
    with pytest.raises(JournalCorrupt) as caught:
        everything_opened(killed)
    assert caught.value.index == scribe.index
    report = journal_check.check(_journal.place_of(str(killed)))
    assert [problem.index for problem in report.problems] == [scribe.index]


def test_without_a_mark_a_lost_last_entry_cannot_be_seen_and_an_earlier_one_is(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    killed = last_commit_flipped(scribe, tmp_path / "killed")
    (killed / "journal.mark").unlink()
    assert journal_check.check(_journal.place_of(str(killed))).last == scribe.index - 1
    log = Flipped(killed / "journal.sqlite3-wal")
    log.put(len(log.whole) // 2, 1)
    assert not journal_check.check(_journal.place_of(str(killed))).is_whole
    with pytest.raises(JournalCorrupt, match="SQLite would drop"):
        everything_opened(killed)


def test_a_journal_that_is_gone_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    scribe.close()
    (tmp_path / "home" / "journal.sqlite3").unlink()
    with pytest.raises(JournalCorrupt, match="it is gone"):
        everything_opened(tmp_path / "home")
    assert not (tmp_path / "home" / "journal.sqlite3").exists()


def test_a_journal_that_is_let_go_keeps_its_write_ahead_log(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    log = tmp_path / "home" / "journal.sqlite3-wal"
    size = log.stat().st_size
    scribe.journal.abandon()
    assert log.stat().st_size == size > 0
    assert everything_opened(tmp_path / "home")[1] == scribe.index


def test_the_check_would_notice_a_checkpoint_that_does_not_hold_what_the_log_made(tmp_path: Path) -> None:
    scribe = mixed(tmp_path / "home", 3, from_start=True, steps=30)
    queue = scribe.state.queues["mix/work"]
    queue.done += 1  # a bug in applying, which the rows' sums cannot know
    scribe.state._touch("queues", queue.name)
    scribe.close()
    report = journal_check.check(_journal.place_of(str(tmp_path / "home")))
    assert "the tables are not what the log makes: queues mix/work" in str(report)


def test_the_check_would_notice_bytes_of_an_item_that_are_others(tmp_path: Path) -> None:
    scribe = mixed(tmp_path / "home", 3, from_start=True, steps=30)
    chunks = scribe.state.queues["mix/both"].chunks
    chunk = next(chunk for chunk in chunks if not chunk.persisted and chunk.body is not None)
    chunk.entry, chunk.body = 0, bytes(len(chunk.body))  # a bug in laying chunks together: the sums fit
    scribe.close()
    report = journal_check.check(_journal.place_of(str(tmp_path / "home")))
    assert "bodies of items mix/both" in str(report)


def test_the_check_would_notice_a_commit_index_that_goes_back(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    scribe.close()
    db = sqlite3.connect(scribe.path)
    row = db.execute("SELECT idx, term, at_ms, kind, body, chain FROM journal WHERE idx = ?", (scribe.index,)).fetchone()
    changed = (*row, scribe.index - 2)  # a bug in writing: the row is as it was written
    db.execute("UPDATE journal SET commit_idx = ?, crc = ? WHERE idx = ?", (changed[6], row_crc(changed), scribe.index))
    db.commit()
    db.close()
    report = journal_check.check(_journal.place_of(str(tmp_path / "home")))
    assert [problem.index for problem in report.problems] == [scribe.index]
    assert f"commit_idx goes back from {scribe.index - 1} to {scribe.index - 2}" in str(report)
