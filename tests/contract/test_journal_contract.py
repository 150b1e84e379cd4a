"""What the core's shell may rely on in a journal: one suite for the simulated one and the real one.

A fake earns its place in simulations here. The real one's own affairs, damage to its file above all, are in
`unit/test_journal.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from p2pcluster import config
from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.log import COMMANDS, CONFIG, NOOP, Entry
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.ranges import Fence
from p2pcluster.core.snapshot import decode_snapshot, encode_snapshot, read_configuration
from p2pcluster.errors import JournalError
from p2pcluster.journal import Compaction, Journal, Write, checkpoint_of
from tests.contract.stores import MEMORY, RealStore, SimStore, Store
from tests.simulation.queue_model import beginning, entry_body, plain_rows
from tests.simulation.sim_journal import Fault, SimJournal
from tests.simulation.sole_voter import SoleVoter, facts, put

FENCE = Fence("n1", "b1", 1)
ERROR = {"type": "ValueError", "text": "no", "traceback": None}


@pytest.fixture(params=["sim", "real"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return SimStore() if request.param == "sim" else RealStore(tmp_path)


@pytest.fixture
def node(store: Store) -> SoleVoter:
    """A node whose projects are deployed and run."""
    made = SoleVoter(store)
    made.commit(*beginning())
    return made


# --- Writing and recovering ------------------------------------------------------------------------------------------


def test_a_new_journal_is_empty(store: Store) -> None:
    journal, recovered = store.open()
    assert recovered.hard_state == HardState(0, None)
    assert (recovered.base_index, recovered.base_term, recovered.base_at_ms) == (0, 0, 0)
    assert (recovered.last_index, recovered.commit_index, recovered.state.applied_idx) == (0, 0, 0)
    assert list(journal.entries(0)) == []
    assert (journal.meta.get("node_id"), journal.log_bytes) == (None, 0)


@pytest.mark.parametrize("ending", [SoleVoter.crash, SoleVoter.end])
def test_everything_that_a_write_holds_is_there_afterwards(
    node: SoleVoter, ending: Callable[[SoleVoter], None]
) -> None:
    node.write(
        Write(
            node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"two")]),
            HardState(3, "n2"),
            sole_voter=True,
            meta=(("node_id", "n1"), ("cluster_name", "lab")),
        )
    )
    before = facts(node.state)
    ending(node)
    assert node.recovered.hard_state == HardState(3, "n2")
    assert (node.recovered.last_index, node.recovered.commit_index) == (3, 3)
    assert (node.journal.meta["node_id"], node.journal.meta["cluster_name"]) == ("n1", "lab")
    assert facts(node.state) == before
    assert node.values("p/in") == [b"one", b"two"]


def test_a_vote_is_kept_without_any_entry(store: Store) -> None:
    journal, _ = store.open()
    journal.write(Write(hard_state=HardState(7, "n3")))
    store.crash()
    assert store.open()[1].hard_state == HardState(7, "n3")


def test_entries_come_back_as_they_were_written(node: SoleVoter) -> None:
    body = memoryview(entry_body([put("p/in", 1, b"x")]))
    entries = (Entry(2, 1, 20, NOOP, b""), Entry(3, 2, 20, COMMANDS, body), Entry(4, 2, 21, CONFIG, b"who votes"))
    node.write(Write(entries, sole_voter=True))
    node.crash()
    found = list(node.journal.entries(1))
    assert [(e.index, e.term, e.at_ms, e.kind, bytes(e.body)) for e in found] == [
        (e.index, e.term, e.at_ms, e.kind, bytes(e.body)) for e in entries
    ]
    assert [bytes(e.body) for e in node.journal.entries(1, bodies_after=2)] == [b"", bytes(body), b"who votes"]
    assert [bytes(e.body) for e in node.journal.entries(1, bodies_after=4)] == [b"", b"", b"who votes"], (
        "of a configuration the body too"
    )


def test_writing_goes_on_after_an_end_in_order_and_after_a_crash(node: SoleVoter) -> None:
    for seq, ending in enumerate((node.end, node.crash, node.end, node.end, node.crash), 1):
        node.commit(put("p/in", seq, b"%d" % seq))
        ending()
    assert node.recovered.last_index == 6
    assert node.values("p/in") == [b"1", b"2", b"3", b"4", b"5"]


def test_a_gap_between_entries_is_refused(node: SoleVoter) -> None:
    with pytest.raises(AssertionError, match="gap"):
        node.journal.write(Write((Entry(3, 1, 0, NOOP, b""),)))


# --- What is committed -----------------------------------------------------------------------------------------------


def test_only_committed_entries_are_applied(node: SoleVoter) -> None:
    entries = node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"two")], [put("p/in", 3, b"three")])
    node.journal.write(Write(entries, commit_index=3))
    node.crash()
    assert (node.recovered.last_index, node.recovered.commit_index, node.state.applied_idx) == (4, 3, 3)
    assert node.values("p/in") == [b"one", b"two"]


def test_a_commit_index_that_comes_alone_is_kept(node: SoleVoter) -> None:
    node.journal.write(Write(node.entries([put("p/in", 1, b"one")]), commit_index=1))
    node.journal.write(Write(commit_index=2))
    node.journal.write(Write(commit_index=1))  # late: nothing is taken back
    node.crash()
    assert (node.recovered.commit_index, node.values("p/in")) == (2, [b"one"])


def test_what_a_lone_voter_has_committed_stays_committed_when_there_are_more(node: SoleVoter) -> None:
    """Its last entry is committed by being durable, and Raft counts it only later."""
    node.commit(put("p/in", 1, b"one"))
    node.journal.write(Write(node.entries([put("p/in", 2, b"two")]), commit_index=1))
    node.crash()
    assert (node.recovered.commit_index, node.values("p/in")) == (2, [b"one"])


def test_a_tail_that_is_cut_off_takes_no_commit_index_with_it(node: SoleVoter) -> None:
    node.journal.write(Write(node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"two")]), commit_index=1))
    node.journal.write(Write((Entry(4, 1, 50, NOOP, b""),), commit_index=2))
    node.journal.write(Write(truncate_from=3, commit_index=1))
    node.crash()
    assert (node.recovered.commit_index, node.values("p/in")) == (2, [b"one"])


def test_a_tail_that_is_not_committed_is_replaced(node: SoleVoter) -> None:
    node.journal.write(Write(node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"old")]), commit_index=2))
    replacement = Entry(3, 2, 60, COMMANDS, entry_body([put("p/in", 2, b"new")]))
    node.journal.write(Write((replacement,), truncate_from=3, commit_index=2))
    node.crash()
    assert (node.recovered.last_index, node.recovered.commit_index) == (3, 2)
    node.journal.write(Write(commit_index=3))
    node.crash()
    assert node.values("p/in") == [b"one", b"new"]


def test_a_tail_is_cut_off_without_anything_in_its_place(node: SoleVoter) -> None:
    node.journal.write(Write(node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"two")]), commit_index=1))
    node.journal.write(Write(truncate_from=2, commit_index=1))
    node.crash()
    assert (node.recovered.last_index, node.recovered.commit_index) == (1, 1)
    node.commit(put("p/in", 1, b"three"))
    node.crash()
    assert node.values("p/in") == [b"three"]


@pytest.mark.parametrize("commit", [Write(commit_index=3), Write((Entry(4, 1, 50, NOOP, b""),), commit_index=3)])
def test_a_committed_entry_is_never_cut_off(node: SoleVoter, commit: Write) -> None:
    node.journal.write(Write(node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"two")]), commit_index=1))
    node.journal.write(commit)
    with pytest.raises(AssertionError, match="committed"):
        node.journal.write(Write(truncate_from=3))


# --- Tables and bytes ------------------------------------------------------------------------------------------------


def test_the_tables_stand_for_the_log_up_to_where_they_stand(node: SoleVoter) -> None:
    node.commit(put("p/in", 1, b"one", b"two"), commands.take("p/in", [(1, 2)], FENCE))
    node.checkpoint()
    node.commit(commands.done("p/in", [(1, 2)], [Port(["p/last.results"], lengths_blob([4]), b"done")]))
    before = facts(node.state)
    node.crash()
    assert facts(node.state) == before
    node.checkpoint()
    node.compact()
    node.crash()
    assert node.recovered.base_index == 1, "the entry that holds what is open is kept"
    assert facts(node.state) == before
    assert (node.values("p/in"), node.values("p/last.results")) == ([b"two"], [b"done"])


def test_a_finished_log_goes_as_a_whole(node: SoleVoter) -> None:
    node.commit(put("p/in", 1, b"one"))
    node.commit(commands.done("p/in", [(1, 2)], []))
    node.checkpoint()
    assert node.compact() == Compaction()
    assert (list(node.journal.entries(0)), node.journal.log_bytes) == ([], 0)
    before = facts(node.state)
    node.crash()
    assert (node.recovered.base_index, node.recovered.base_term, node.recovered.base_at_ms) == (3, 1, 30)
    assert (node.recovered.last_index, facts(node.state)) == (3, before)
    node.commit(put("p/in", 2, b"two"))
    node.crash()
    assert node.values("p/in") == [b"two"]


def test_compaction_goes_no_further_than_the_tables_and_what_others_need(node: SoleVoter) -> None:
    for seq in range(1, 6):
        node.commit(put("p/in", seq, b"x"), commands.done("p/in", [(seq, seq + 1)], []))
        if seq == 3:
            node.checkpoint()
    node.write(Write(compact=(3, 1 << 20)))
    assert [entry.index for entry in node.journal.entries(0)] == [3, 4, 5, 6]
    node.compact()
    assert [entry.index for entry in node.journal.entries(0)] == [5, 6]
    node.crash()
    assert node.state.queues["p/in"].done == 5


def test_compaction_goes_in_slices_and_says_when_there_is_more(node: SoleVoter) -> None:
    for seq in range(1, 10):
        node.commit(put("p/in", seq, b"x" * 100), commands.done("p/in", [(seq, seq + 1)], []))
    node.checkpoint()
    left = [len(list(node.journal.entries(0)))]
    while node.compact(bytes_max=100).more:
        left.append(len(list(node.journal.entries(0))))
    assert list(node.journal.entries(0)) == []
    assert len(left) > 3
    assert left == sorted(set(left), reverse=True), "each slice deletes something"


@pytest.mark.parametrize("memory", [0, MEMORY])
def test_every_open_items_bytes_come_back_wherever_they_lie(
    store: Store, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SoleVoter(store, memory)
    node.commit(*beginning())
    keys = b'["a", "b", "a"]'
    node.commit(put("p/in", 1, b"in", b"the", b"log"), put("w/x", 2, b"first", b"second", b"never", keys=keys))
    for seq in range(3, 15):
        node.commit(put("p/d", seq, b"small %d" % seq, b""))
    wanted = {
        "p/in": [b"in", b"the", b"log"],
        "w/x": [b"first", b"second"],
        "p/d": [b for s in range(3, 15) for b in (b"small %d" % s, b"")],
    }
    assert {queue: node.values(queue) for queue in wanted} == wanted
    node.checkpoint()
    assert {queue: node.values(queue) for queue in wanted} == wanted
    node.crash()
    assert {queue: node.values(queue) for queue in wanted} == wanted
    monkeypatch.setattr(config, "LOG_BYTES_MAX", 0)
    while node.compact(bytes_max=20).more:
        assert {queue: node.values(queue) for queue in wanted} == wanted
    assert list(node.journal.entries(0)) == []
    node.crash()
    assert {queue: node.values(queue) for queue in wanted} == wanted
    node.commit(commands.done("p/in", [(2, 3)], []), commands.take("p/d", [(3, 9)], FENCE))
    node.checkpoint()
    node.crash()
    assert node.values("p/in") == [b"in", b"log"]
    assert node.values("p/d") == wanted["p/d"]


def test_bytes_are_found_before_the_state_hears_that_they_moved(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LOG_BYTES_MAX", 0)
    node = SoleVoter(store, memory=0)
    node.commit(*beginning())
    node.commit(put("p/in", 1, b"one"))
    node.checkpoint()
    compaction = node.journal.write(Write(compact=(3, 1 << 20)))
    assert [(chunk.queue, chunk.first) for chunk in compaction.filled] == [("p/in", 1)]
    assert list(node.journal.entries(0)) == []
    assert node.chunks("p/in")[0].body_crc is None
    assert node.values("p/in") == [b"one"]


def test_a_chunk_moves_while_its_items_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of compaction rides with a commit that finishes the items whose bytes it moves."""
    monkeypatch.setattr(config, "LOG_BYTES_MAX", 0)
    node = SoleVoter(store, memory=0)
    node.commit(*beginning())
    node.commit(put("p/in", 1, b"one", b"two"))
    node.checkpoint()
    finished = node.entries([commands.done("p/in", [(1, 3)], [])])
    node.write(Write(finished, sole_voter=True, compact=(3, 1 << 20)))
    assert node.chunks("p/in") == []
    node.checkpoint()
    node.crash()
    assert (node.chunks("p/in"), node.state.queues["p/in"].done) == ([], 2)


def test_a_bundle_is_read_from_the_log_and_then_from_its_rows(node: SoleVoter) -> None:
    parts = node.state.bundle_parts("v1")
    assert parts is not None
    whole = node.journal.read_bundle("v1", parts)
    assert whole == b"".join(message.blobs[0] for message in beginning()[:2])
    node.checkpoint()
    node.compact()
    assert list(node.journal.entries(0)) == []
    assert node.journal.read_bundle("v1", parts) == whole
    node.crash()
    parts = node.state.bundle_parts("v1")
    assert parts is not None
    assert node.journal.read_bundle("v1", parts) == whole


def test_keys_that_come_in_a_new_run_outlive_the_checkpoint_that_ends_those_of_the_old(node: SoleVoter) -> None:
    node.commit(put("p/in", 1, b"one", keys=b'["k"]'))
    node.checkpoint()
    node.commit(
        Message("discard", {"queue": "p/in", "ids": None}),
        Message("close", {"pipeline": "p", "name": "in"}),
        Message("close", {"pipeline": "p", "name": "gen"}),
        Message("start_run", {"pipeline": "p", "params": None}),
        put("p/in", 2, b"two", keys=b'["k"]'),
    )
    assert node.state.pipelines["p"].run == 2
    node.checkpoint()
    node.crash()
    node.commit(put("p/in", 3, b"three", keys=b'["k"]'))
    assert node.values("p/in") == [b"two"]


# --- Snapshots -------------------------------------------------------------------------------------------------------


def busy(node: SoleVoter) -> None:
    """A bit of everything, some of it in the tables, some only in the log."""
    node.commit(put("p/in", 1, b"one", b"two", b"three"), put("w/x", 2, b"k", b"never", keys=b'["k", "k"]'))
    node.commit(commands.take("p/in", [(1, 3)], FENCE), commands.fail("p/in", 1, FENCE, ERROR, 5))
    node.write(
        Write(
            node.entries([Message("member", {"node": "n1", "name": "host", "facts": {}})]),
            sole_voter=True,
            checkpoint=checkpoint_of(node.state),
            compact=(node.last_index + 1, 1 << 20),
        )
    )
    node.commit(put("p/d", 3, b"four"), commands.take("w/x", [(1, 2)], FENCE))


@pytest.mark.parametrize("memory", [0, MEMORY])
@pytest.mark.parametrize("start", ["fresh", "behind", "another log"])
def test_a_snapshot_makes_another_journal_the_same(store: Store, memory: int, start: str, tmp_path: Path) -> None:
    source = SoleVoter(RealStore(tmp_path / "source"), memory)
    source.commit(*beginning())
    busy(source)
    configuration = Configuration(("n1", "n2", "n3"), (), ("n4",))
    head = source.journal.snapshot_head(source.state, configuration)
    head, rows = decode_snapshot(b"".join(encode_snapshot(head, source.journal.snapshot_rows(source.state))))
    target = SoleVoter(store, memory)
    target.write(Write(hard_state=HardState(4, "n9"), meta=(("node_id", "mine"),)))
    if start == "behind":
        target.journal.write(Write(target.entries(beginning()), commit_index=1))
    if start == "another log":
        target.journal.write(Write(tuple(Entry(index, 1, 0, NOOP, b"") for index in range(1, 9)), commit_index=1))
    target.journal.install(head, rows, None)
    target.crash()
    assert target.recovered.hard_state == HardState(4, "n9"), "term and vote are this node's own"
    assert target.journal.meta["node_id"] == "mine"
    assert read_configuration(target.journal.meta["configuration"]) == configuration
    assert (target.recovered.base_index, target.recovered.last_index, target.recovered.commit_index) == (5, 5, 5)
    assert (target.recovered.base_term, target.journal.base_index, target.journal.log_bytes) == (1, 5, 0)
    assert (target.state.hash, target.state.applied_idx, target.state.at_ms) == (
        source.state.hash,
        5,
        source.state.at_ms,
    )
    assert plain_rows(target.state, bundles_by_place=False) == plain_rows(source.state, bundles_by_place=False)
    for queue in ("p/in", "w/x", "p/d"):
        assert target.values(queue) == source.values(queue)
    parts = target.state.bundle_parts("v1")
    assert parts is not None
    assert target.journal.read_bundle("v1", parts) == b"".join(message.blobs[0] for message in beginning()[:2])
    for node in (source, target):
        node.commit(commands.done("p/in", [(2, 4)], []), put("p/in", 4, b"last"))
    target.checkpoint()
    target.compact()
    target.end()
    assert target.state.hash == source.state.hash
    assert target.values("p/in") == [b"last"]


@pytest.mark.parametrize("fault", list(Fault))
def test_a_snapshot_is_installed_as_a_whole_or_not_at_all(store: Store, fault: Fault, tmp_path: Path) -> None:
    source = SoleVoter(RealStore(tmp_path / "source"))
    source.commit(*beginning())
    head = source.journal.snapshot_head(source.state, Configuration(("n1",)))
    rows = list(source.journal.snapshot_rows(source.state))
    target = SoleVoter(store)
    target.commit(put("p/none", 1, b"x"))
    before = facts(target.state)
    store.fail_write(1, fault)
    with pytest.raises(JournalError):
        target.journal.install(head, rows, HardState(3, None))
    target.crash()
    if fault is Fault.AFTER:
        assert (target.state.hash, target.recovered.hard_state) == (source.state.hash, HardState(3, None))
    else:
        assert (facts(target.state), target.recovered.hard_state) == (before, HardState(0, None))


@pytest.mark.parametrize("has_tables", [False, True])
def test_in_a_new_generation_all_that_the_log_holds_is_committed(node: SoleVoter, has_tables: bool) -> None:
    if has_tables:
        node.checkpoint()
    tail = node.entries([put("p/in", 1, b"one")], [put("p/in", 2, b"two")])
    node.journal.write(Write(tail, HardState(6, "n2"), commit_index=1))
    node.crash()
    assert node.values("p/in") == []
    assert node.journal.begin_generation(Configuration(("n1",)), node.state) == 1
    node.crash()
    assert (node.recovered.commit_index, node.values("p/in")) == (3, [b"one", b"two"])
    assert node.recovered.hard_state == HardState(7, None)
    assert read_configuration(node.journal.meta["configuration"]) == Configuration(("n1",))
    assert node.journal.begin_generation(Configuration(("n1",)), node.state) == 2


# --- Writes that fail ------------------------------------------------------------------------------------------------


def scenario(node: SoleVoter) -> None:
    """Some of everything; each step writes one entry, so that the journal itself says which comes next."""
    steps: list[Callable[[], Write]] = [
        lambda: Write(node.entries(beginning())),
        lambda: Write(node.entries([put("p/in", 1, b"one", b"two", b"three"), commands.take("p/in", [(1, 3)], FENCE)])),
        lambda: Write(
            node.entries([commands.fail("p/in", 1, FENCE, ERROR, 5)]),
            HardState(2, "n1"),
            checkpoint=checkpoint_of(node.state),
        ),
        lambda: Write(
            node.entries([commands.done("p/in", [(2, 3)], [Port(["p/last.results"], lengths_blob([2]), b"ok")])])
        ),
        lambda: Write(
            node.entries([put("p/d", 2, b"d")]),
            checkpoint=checkpoint_of(node.state),
            compact=(node.last_index + 1, 1 << 20),
        ),
        lambda: Write(
            node.entries(
                [Message("retry", {"queue": "p/in", "ids": None}), put("w/x", 3, b"x", b"y", keys=b'["k","k"]')]
            )
        ),
        lambda: Write(
            node.entries([put("p/d", 4, b"e")]),
            checkpoint=checkpoint_of(node.state),
            compact=(node.last_index + 1, 1 << 20),
        ),
        lambda: Write(node.entries([commands.done("p/in", [(1, 2), (3, 4)], [])])),
    ]
    assert len(steps) == SCENARIO_WRITES
    for step in steps[node.last_index :]:
        node.write(replace(step(), sole_voter=True))


SCENARIO_WRITES = 8


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("number", range(1, SCENARIO_WRITES + 1))
def test_whichever_write_fails_nothing_acknowledged_is_lost(
    store: Store, number: int, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "LOG_BYTES_MAX", 0)
    node = SoleVoter(store, memory=0)
    store.fail_write(number, fault)
    with pytest.raises(JournalError):
        scenario(node)
    acknowledged = node.state.hash
    index = node.last_index
    node.crash()
    if fault is not Fault.AFTER:
        assert (node.last_index, node.state.hash) == (index, acknowledged), "what was not acknowledged is there in part"
    assert node.last_index in (index, index + 1)
    scenario(node)
    node.crash()
    never_failed = SoleVoter(SimStore())
    scenario(never_failed)
    assert node.state.hash == never_failed.state.hash
    assert node.values("w/x") == [b"x"]
    assert node.values("p/last.results") == [b"ok"]
    assert node.state.queues["p/in"].done == 3


def test_a_disk_that_loses_what_it_said_to_have_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded bug for the test above."""

    def forget_the_last_entry(store: SimStore) -> None:
        image = store.disk.image
        last = image.last_index
        del image.entries[last], image.commit_idxs[last], image.chains[last]

    monkeypatch.setattr(SimStore, "crash", forget_the_last_entry)
    with pytest.raises(AssertionError, match="is there in part"):
        test_whichever_write_fails_nothing_acknowledged_is_lost(SimStore(), 3, Fault.BEFORE, monkeypatch)


def test_an_unsynced_write_is_lost_in_a_crash_of_the_simulated_disk() -> None:
    store = SimStore()
    journal, _ = store.open()
    journal.write(Write((Entry(1, 1, 0, NOOP, b""),), sole_voter=True))
    journal.begin(Write((Entry(2, 1, 0, NOOP, b""),), sole_voter=True))
    store.crash()
    assert store.open()[1].last_index == 1


def test_the_fake_has_what_the_real_one_has() -> None:
    """Save what is about files."""
    files = {"path", "checkpoint_wal", "wal_bytes"}
    real = {name for name in dir(Journal) if not name.startswith("_")} - files
    assert real <= {name for name in dir(SimJournal) if not name.startswith("_")}
