"""Whole clusters of Raft nodes in simulated time: a bad network, slow disks, crashes, partitions, changes of members.

`Simulation` is the shell of all nodes, driven by one seed. `Checker` holds the invariants (raft, figure 3) and looks
after every event. The second half seeds bugs into the core and shows that the invariants notice each.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from p2pcluster.core import codec
from p2pcluster.core.log import COMMANDS, CONFIG, Entry, Log
from p2pcluster.core.messages import (
    AppendEntries,
    PreVoteReply,
    PreVoteRequest,
    RaftMessage,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
    VoteRequest,
    decode_configuration,
    from_message,
    to_message,
)
from p2pcluster.core.quorum import Configuration, agreed_value, has_majority
from p2pcluster.core.raft import HardState, Raft, RaftSettings, Ready, Role

NODE_IDS = ("a", "b", "c", "d", "e")
BY_DATAGRAM = {"raft_vote", "raft_vote_reply", "raft_pre_vote", "raft_pre_vote_reply"}
TICK_MS = 10

Applied = tuple[int, int, bytes]  # index, term, body


class Violation(AssertionError):
    """An invariant does not hold."""


def settings_of(node_id: str) -> RaftSettings:
    """Small bounds, so that every bound is met."""
    return RaftSettings(
        node_id, heartbeat_interval_ms=20, election_timeout_ms=120, lease_ms=100,
        append_bytes_max=40, in_flight_appends_max=3, load_entries_max=4,
    )


@dataclass
class Disk:
    """What survives a crash."""

    hard_state: HardState = HardState()
    base: SnapshotMeta = SnapshotMeta(0, 0, 0, Configuration(), "none")
    base_state: list[Applied] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    commit_index: int = 0

    def write(self, ready: Ready, snapshots: dict[str, list[Applied]]) -> None:
        """One transaction, in the order of the contract."""
        if ready.hard_state is not None:
            self.hard_state = ready.hard_state
        if ready.snapshot is not None:
            self.base, self.base_state, self.entries = ready.snapshot, snapshots[ready.snapshot.snapshot_id], []
        if ready.truncate_from is not None:
            assert ready.truncate_from > self.commit_index
            self.entries = [entry for entry in self.entries if entry.index < ready.truncate_from]
        self.entries += ready.entries
        self.commit_index = max(self.commit_index, min(ready.commit_index, self.last_index))
        assert [entry.index for entry in self.entries] == list(range(self.base.index + 1, self.last_index + 1))

    @property
    def last_index(self) -> int:
        return self.base.index + len(self.entries)

    def compact(self, base: SnapshotMeta, state: list[Applied]) -> None:
        self.entries = self.entries[base.index - self.base.index :]
        self.base, self.base_state = base, state

    def holds(self, index: int, term: int) -> bool:
        if index <= self.base.index:
            return True  # only what is committed is compacted
        return index <= self.last_index and self.entries[index - self.base.index - 1].term == term


class Node:
    """A machine: its disk, its program while that runs, and the state that the log made."""

    def __init__(self, node_id: str, configuration: Configuration) -> None:
        self.id = node_id
        self.disk = Disk(base=SnapshotMeta(0, 0, 0, configuration, "none"))
        self.raft: Raft = None  # type: ignore[assignment]
        self.is_up = False
        self.starts = 0  # voids what was scheduled for an earlier life
        self.state: list[Applied] = []
        self.configuration = configuration
        self.applied_at_ms = 0

    def start(self, raft_class: type[Raft], random: Random, now_ms: int) -> None:
        disk = self.disk
        self.is_up = True
        self.starts += 1
        self.state = list(disk.base_state)
        self.configuration, self.applied_at_ms = disk.base.configuration, disk.base.at_ms
        for entry in disk.entries[: disk.commit_index - disk.base.index]:
            self.apply(entry)
        log = Log(disk.base.index, disk.base.term, disk.base.at_ms, disk.entries)
        commit_index = max(disk.commit_index, disk.base.index)
        self.raft = raft_class(
            settings_of(self.id), random, disk.hard_state, log, self.configuration, commit_index, now_ms
        )

    def apply(self, entry: Entry) -> None:
        self.state.append((entry.index, entry.term, bytes(entry.body)))
        self.applied_at_ms = entry.at_ms
        if entry.kind == CONFIG:
            self.configuration = decode_configuration(entry.body)

    def snapshot(self, snapshot_id: str) -> SnapshotMeta:
        index = self.raft.applied_index
        term = self.state[-1][1] if self.state else 0
        return SnapshotMeta(index, term, self.applied_at_ms, self.configuration, snapshot_id)


class Checker:
    """The invariants. What it remembers was shown to somebody once, so it may never be untrue again."""

    def __init__(self) -> None:
        self.leader_of: dict[int, str] = {}
        self.vote_of: dict[tuple[str, int], str] = {}
        self.entry_at: dict[tuple[int, int], tuple[bytes, int]] = {}
        self.committed: dict[int, tuple[int, int]] = {}  # the entry's term, and the term in which it was committed
        self.committed_index = 0
        self.applied: dict[int, Applied] = {}
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.term_told: dict[str, int] = {}

    def look(self, node: Node, nodes: dict[str, Node]) -> None:
        """After every event on the node."""
        raft = node.raft
        life, term, commit_index = self.seen.get(node.id, (0, 0, 0))
        if life != node.starts:
            # What was known, and neither written down nor told to anybody, may be forgotten.
            term, commit_index = self.term_told.get(node.id, 0), 0
        self.require(raft.term >= term, f"{node.id} goes back from term {term} to {raft.term}")
        self.require(raft.commit_index >= commit_index, f"{node.id} goes back from commit index {commit_index}")
        self.require(raft.applied_index <= raft.commit_index <= raft.last_index, f"{node.id} applied the uncommitted")
        self.seen[node.id] = (node.starts, raft.term, raft.commit_index)
        if raft.role is Role.LEADER:
            self.look_at_leader(node)
        if raft.commit_index > self.committed_index:
            self.look_at_commit(node, nodes, is_recovered=life != node.starts)

    def look_at_leader(self, node: Node) -> None:
        raft = node.raft
        first = self.leader_of.setdefault(raft.term, node.id)
        self.require(first == node.id, f"election safety: {first} and {node.id} both lead term {raft.term}")
        own = HardState(raft.term, node.id)
        self.require(node.disk.hard_state == own, f"{node.id} leads with a vote for itself that is not durable")
        for index, (term, committed_in) in self.committed.items():
            held = index <= raft.log.base_index or raft.log.holds(index, term) or raft.term < committed_in
            self.require(held, f"leader completeness: {node.id} in term {raft.term} lacks the committed {index}")

    def look_at_commit(self, node: Node, nodes: dict[str, Node], is_recovered: bool) -> None:
        """The node is the first to know of this commit. What a sole voter wrote down was committed by that alone."""
        index = node.raft.commit_index
        term = node.raft.log.term(index)
        for newly in range(self.committed_index + 1, index + 1):
            self.committed[newly] = (node.raft.log.term(newly), node.raft.term)
        self.committed_index = index
        holders = {other.id for other in nodes.values() if other.disk.holds(index, term)}
        # The base class is asked, because a seeded bug may have its own view of who counts.
        configuration = Raft.configuration.fget(node.raft)  # type: ignore[attr-defined]
        if is_recovered:
            configuration = node.raft.committed_configuration
        self.require(
            has_majority(configuration, holders), f"{node.id} committed {index}, durable on {sorted(holders)} only"
        )

    def look_at_entries(self, log: Log, entries: list[Entry]) -> None:
        """Log matching: an index and a term name one entry, with one history."""
        for entry in entries:
            fact = (bytes(entry.body), log.term(entry.index - 1))
            first = self.entry_at.setdefault((entry.index, entry.term), fact)
            self.require(first == fact, f"log matching: two entries {entry.index} of term {entry.term}")

    def look_at_recovered(self, node: Node) -> None:
        for fact in node.state:
            self.require(self.applied.setdefault(fact[0], fact) == fact, f"{node.id} recovers another entry {fact[0]}")

    def look_at_applied(self, node: Node, entry: Entry) -> None:
        self.require(len(node.state) + 1 == entry.index, f"{node.id} applies {entry.index} after {len(node.state)}")
        fact = (entry.index, entry.term, bytes(entry.body))
        first = self.applied.setdefault(entry.index, fact)
        self.require(first == fact, f"state machine safety: {node.id} applies another entry {entry.index}")
        is_committed = entry.index in self.committed and self.committed[entry.index][0] == entry.term
        self.require(is_committed, f"{node.id} applies {entry.index}, which nobody has committed")

    def look_at_message(self, message: RaftMessage) -> None:
        if not isinstance(message, (PreVoteRequest, PreVoteReply)):  # those speak of a term that nobody is in
            self.term_told[message.sender] = max(message.term, self.term_told.get(message.sender, 0))
        if isinstance(message, VoteReply) and message.granted:
            first = self.vote_of.setdefault((message.sender, message.term), message.to)
            self.require(first == message.to, f"{message.sender} votes for {first} and {message.to} in {message.term}")

    @staticmethod
    def require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise Violation(otherwise)


@dataclass(frozen=True)
class Faults:
    """How bad the world is."""

    loss: float = 0.04
    repeat: float = 0.02
    delay_ms_max: int = 25
    fsync_ms_max: int = 25
    crash_every_ms: int = 500
    partition_every_ms: int = 700
    reconfigure_every_ms: int = 400
    transfer_every_ms: int = 1500


NO_FAULTS = Faults(0.0, 0.0, 2, 2, 0, 0, 0, 0)


class Simulation:
    """Five machines, of which the first voters are given. One seed decides everything."""

    def __init__(
        self,
        seed: int,
        raft_class: type[Raft] = Raft,
        voters: tuple[str, ...] = ("a", "b", "c"),
        faults: Faults = Faults(),
        disks: Mapping[str, Disk] | None = None,
    ) -> None:
        self.random = Random(seed)
        self.raft_class = raft_class
        self.faults = faults
        self.now_ms = 0
        self.checker = Checker()
        self.snapshots: dict[str, list[Applied]] = {"none": []}
        self.cut: set[frozenset[str]] = set()
        self.blocks: Callable[[RaftMessage], bool] = lambda message: False
        self.proposed = 0
        self.restarts = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._scheduled = 0
        self.nodes = {
            node_id: Node(node_id, Configuration(voters) if node_id in voters else Configuration())
            for node_id in NODE_IDS
        }
        for node in self.nodes.values():
            node.disk = (disks or {}).get(node.id, node.disk)
            self.start(node)

    # Time

    def after(self, delay_ms: int, action: Callable[[], None]) -> None:
        self._scheduled += 1
        heapq.heappush(self._queue, (self.now_ms + delay_ms, self._scheduled, action))

    def run(self, duration_ms: int) -> None:
        end_ms = self.now_ms + duration_ms
        while self._queue and self._queue[0][0] <= end_ms:
            self.now_ms, _, action = heapq.heappop(self._queue)
            action()
        self.now_ms = end_ms

    def run_until(self, fact: Callable[[], bool], limit_ms: int = 5000) -> None:
        end_ms = self.now_ms + limit_ms
        while not fact():
            assert self.now_ms < end_ms, "the fact did not come about in time"
            self.run(TICK_MS)

    def every(self, interval_ms: int, action: Callable[[], None]) -> None:
        if not interval_ms:
            return

        def again() -> None:
            action()
            self.after(self.random.randrange(1, 2 * interval_ms), again)

        self.after(self.random.randrange(1, 2 * interval_ms), again)

    def cause_chaos(self, duration_ms: int) -> None:
        """Faults and changes for a while, then a quiet world again."""
        faults = self.faults
        self.every(12, self.propose)
        self.every(faults.crash_every_ms, self.crash_someone)
        self.every(faults.partition_every_ms, self.partition)
        self.every(faults.reconfigure_every_ms, self.reconfigure)
        self.every(faults.transfer_every_ms, self.transfer)
        self.run(duration_ms)
        self._queue = []
        self.faults = NO_FAULTS
        for node in self.nodes.values():
            if node.is_up:
                self.crash(node)
        self.heal()
        for node in self.nodes.values():
            self.start(node)

    # Machines

    def start(self, node: Node) -> None:
        if node.is_up:
            return
        node.start(self.raft_class, Random(self.random.random()), self.now_ms)
        self.restarts += 1
        self.checker.look(node, self.nodes)
        self.checker.look_at_recovered(node)
        for other in self.up():
            if other is not node and self.is_linked(node.id, other.id):
                self.connect(node, other)
        self.tick(node, node.starts)

    def tick(self, node: Node, life: int) -> None:
        if node.is_up and node.starts == life:
            self.event(node, lambda raft: raft.tick(self.now_ms))
            self.after(self.random.randrange(TICK_MS // 2, 2 * TICK_MS), lambda: self.tick(node, life))

    def up(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_up]

    def leaders(self) -> list[Node]:
        return [node for node in self.up() if node.raft.role is Role.LEADER]

    def event(self, node: Node, action: Callable[[Raft], Any]) -> None:
        """Something happens on the node; then it is asked what to do, and looked at."""
        if not node.is_up:
            return
        action(node.raft)
        for message in node.raft.take_urgent():
            self.send(message)
        self.checker.look(node, self.nodes)
        if node.raft.has_ready():
            self.begin(node, node.raft.ready())

    def begin(self, node: Node, ready: Ready) -> None:
        self.checker.look_at_entries(node.raft.log, ready.entries)
        life = node.starts
        fsync_ms = self.random.randrange(1, self.faults.fsync_ms_max) if ready.needs_persist else 0
        self.after(fsync_ms, lambda: self.finish(node, life, ready))
        for peer in ready.snapshots_wanted:
            self.after(self.random.randrange(1, 20), lambda peer=peer: self.take_snapshot(node, life, peer))
        if ready.load_entries is not None:
            low, high = ready.load_entries
            self.after(self.random.randrange(1, 20), lambda: self.load(node, life, low, high))

    def finish(self, node: Node, life: int, ready: Ready) -> None:
        """The disk is done: send, apply, advance."""
        if not node.is_up or node.starts != life:
            return
        node.disk.write(ready, self.snapshots)
        for message in ready.messages:
            self.send(message)
        if ready.snapshot is not None:
            node.state = list(node.disk.base_state)
            node.configuration, node.applied_at_ms = ready.snapshot.configuration, ready.snapshot.at_ms
        for entry in ready.committed:
            self.checker.look_at_applied(node, entry)
            node.apply(entry)
        self.event(node, lambda raft: self.advance(node, ready))

    def advance(self, node: Node, ready: Ready) -> None:
        node.raft.advance(ready)
        applied_index = node.raft.applied_index
        if self.random.random() < 0.3:
            node.raft.release_through(applied_index)
        if self.random.random() < 0.03 and applied_index > node.disk.base.index:
            node.disk.compact(node.snapshot("compaction"), list(node.state))
            node.raft.compact_through(applied_index)

    def take_snapshot(self, node: Node, life: int, peer: str) -> None:
        if not node.is_up or node.starts != life:
            return
        if self.random.random() < 0.2:
            self.event(node, lambda raft: raft.snapshot_failed(peer))
            return
        snapshot = node.snapshot(f"{node.id}{node.starts}-{node.raft.applied_index}")
        self.snapshots[snapshot.snapshot_id] = list(node.state)
        self.event(node, lambda raft: raft.snapshot_taken(peer, snapshot))

    def load(self, node: Node, life: int, low: int, high: int) -> None:
        base_index = node.disk.base.index
        if node.is_up and node.starts == life and low > base_index:
            count = self.random.randrange(1, high - low + 2)
            entries = node.disk.entries[low - base_index - 1 :][:count]
            self.event(node, lambda raft: raft.entries_loaded(entries))

    def crash(self, node: Node) -> None:
        node.is_up = False
        for other in self.up():
            self.event(other, lambda raft: raft.peer_disconnected(node.id, self.now_ms))
            if self.random.random() < 0.7 and self.is_linked(node.id, other.id):
                self.event(other, lambda raft: raft.peer_refused(node.id, self.now_ms))

    def crash_someone(self) -> None:
        node = self.random.choice(list(self.nodes.values()))
        if node.is_up:
            self.crash(node)
            self.after(self.random.randrange(10, 400), lambda: self.start(node))

    # Network

    def is_linked(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut

    def connect(self, one: Node, other: Node) -> None:
        for node, peer in ((one, other), (other, one)):
            self.event(node, lambda raft, peer=peer: raft.peer_connected(peer.id, self.now_ms))

    def partition(self) -> None:
        """Cut some machines off; only half of the time does anybody see a reset."""
        side = set(self.random.sample(NODE_IDS, self.random.randrange(1, 3)))
        self.cut = {frozenset((one, other)) for one in side for other in NODE_IDS if other not in side}
        if self.random.random() < 0.5:
            for one, other in [tuple(pair) for pair in sorted(self.cut, key=sorted)]:
                for node, peer in ((one, other), (other, one)):
                    self.event(self.nodes[node], lambda raft, peer=peer: raft.peer_disconnected(peer, self.now_ms))
        self.after(self.random.randrange(50, 500), self.heal)

    def heal(self) -> None:
        cut, self.cut = self.cut, set()
        for one, other in [sorted(pair) for pair in sorted(cut, key=sorted)]:
            if self.nodes[one].is_up and self.nodes[other].is_up:
                self.connect(self.nodes[one], self.nodes[other])

    def send(self, message: RaftMessage) -> None:
        self.checker.look_at_message(message)
        payload = codec.encode_bytes(to_message(message))
        copies = (self.random.random() >= self.faults.loss) + (self.random.random() < self.faults.repeat)
        for _ in range(copies):
            delay_ms = self.random.randrange(self.faults.delay_ms_max)
            self.after(delay_ms, lambda: self.deliver(message.sender, message.to, payload))

    def deliver(self, sender: str, to: str, payload: bytes) -> None:
        if not self.is_linked(sender, to):
            return
        envelope = codec.decode(payload)
        message = from_message(envelope, over_tcp=envelope.kind not in BY_DATAGRAM)
        if self.blocks(message):
            return
        self.event(self.nodes[to], lambda raft: raft.step(message, self.now_ms))

    # What people do

    def propose(self) -> None:
        for node in self.leaders():
            if node.raft.next_tick_ms is not None and self.random.random() < 0.9:
                self.event(node, self.propose_to)

    def propose_to(self, raft: Raft) -> None:
        if raft._transfer_to is None:
            self.proposed += 1
            raft.propose(COMMANDS, f"command {self.proposed}".encode(), raft.cluster_time_ms(self.now_ms))

    def reconfigure(self) -> None:
        for node in self.leaders():
            if node.raft.can_change_configuration:
                ids = self.random.sample(NODE_IDS, 5)
                count = self.random.choice((1, 3, 3, 5))
                learners = tuple(ids[count : count + self.random.randrange(2)])
                self.event(
                    node,
                    lambda raft: raft.change_configuration(
                        tuple(ids[:count]), learners, raft.cluster_time_ms(self.now_ms)
                    ),
                )

    def transfer(self) -> None:
        for node in self.leaders():
            others = [voter for voter in node.raft.configuration.voters if voter != node.id]
            if others and node.raft._transfer_to is None:
                self.event(node, lambda raft: raft.transfer_leadership(self.random.choice(others)))

    def call_up(self, node: Node) -> None:
        """Make it campaign until it leads."""
        def leads() -> bool:
            if node.raft.role is Role.FOLLOWER:
                self.event(node, lambda raft: raft.step(self.timeout_now(node), self.now_ms))
            return node.raft.role is Role.LEADER

        self.run_until(leads)

    @staticmethod
    def timeout_now(node: Node) -> TimeoutNow:
        sender = next(node_id for node_id in NODE_IDS if node_id != node.id)
        return TimeoutNow(generation=0, term=node.raft.term, sender=sender, to=node.id)

    # Facts

    def agreed_leader(self) -> Node | None:
        """The leader that every member follows, or None."""
        leaders = self.leaders()
        if len(leaders) != 1:
            return None
        members = leaders[0].raft.configuration.members
        return leaders[0] if all(self.nodes[member].raft.leader_id == leaders[0].id for member in members) else None

    def has_converged(self) -> bool:
        """One leader, no change under way, and every member has applied everything."""
        leader = self.agreed_leader()
        if leader is None or not leader.raft.can_change_configuration:
            return False
        members = leader.raft.configuration.members | {leader.id}
        return all(self.nodes[member].state == leader.state for member in members) and (
            leader.raft.applied_index == leader.raft.last_index
        )


def calm(voters: tuple[str, ...] = ("a", "b", "c"), seed: int = 1) -> tuple[Simulation, Node]:
    """A cluster without faults that has a leader."""
    simulation = Simulation(seed, voters=voters, faults=NO_FAULTS)
    simulation.run_until(simulation.has_converged)
    leader = simulation.agreed_leader()
    assert leader is not None
    return simulation, leader


# Clusters without faults


def test_three_voters_elect_one_leader_and_agree_on_what_is_proposed() -> None:
    simulation, leader = calm()
    for _ in range(20):
        simulation.event(leader, simulation.propose_to)
    simulation.run_until(simulation.has_converged)
    bodies = [body for _, _, body in simulation.nodes["a"].state if body]
    assert bodies == [f"command {number}".encode() for number in range(1, 21)]


def test_a_lone_voter_leads_and_commits_alone() -> None:
    simulation, leader = calm(voters=("a",))
    simulation.event(leader, simulation.propose_to)
    simulation.run_until(simulation.has_converged)
    assert leader.state[-1] == (2, 1, b"command 1")


def test_another_leader_follows_a_crash_in_less_time_than_an_election_timeout() -> None:
    """A reset and a refused connection are news enough; nobody has to wait for silence."""
    simulation, leader = calm()
    start_ms = simulation.now_ms
    simulation.random.random = lambda: 0.0  # type: ignore[method-assign]  # everybody is refused
    simulation.crash(leader)
    simulation.run_until(lambda: bool(simulation.leaders()))
    assert simulation.now_ms - start_ms < settings_of("a").election_timeout_ms


def test_a_machine_that_comes_back_finds_its_log_again() -> None:
    simulation, leader = calm()
    follower = next(node for node in simulation.up() if node is not leader and node.id in "abc")
    simulation.crash(follower)
    for _ in range(30):
        simulation.event(leader, simulation.propose_to)
    simulation.run(300)
    simulation.start(follower)
    simulation.run_until(simulation.has_converged)
    assert follower.state == leader.state
    assert simulation.agreed_leader() is leader


def test_one_voter_becomes_three_in_one_change() -> None:
    simulation, leader = calm(voters=("a",))
    simulation.event(leader, lambda raft: raft.change_configuration(("a",), ("b", "c"), 0))
    simulation.run_until(simulation.has_converged)
    simulation.event(leader, lambda raft: raft.change_configuration(("a", "b", "c"), (), 0))
    simulation.run_until(simulation.has_converged)
    assert simulation.nodes["c"].raft.configuration == Configuration(("a", "b", "c"))
    simulation.crash(leader)
    simulation.run_until(lambda: bool(simulation.leaders()))


def test_a_leader_that_is_replaced_serves_to_the_end_and_leaves() -> None:
    simulation, leader = calm()
    others = tuple(sorted({"a", "b", "c"} - {leader.id}))
    simulation.event(leader, lambda raft: raft.change_configuration((*others, "d"), (), 0))
    simulation.run_until(lambda: any(node.id in (*others, "d") for node in simulation.leaders()))
    simulation.run_until(simulation.has_converged)
    assert leader.raft.role is Role.FOLLOWER
    assert simulation.agreed_leader() is not None


def test_a_removed_follower_learns_it_from_the_log() -> None:
    simulation, leader = calm()
    removed = next(node for node in simulation.up() if node.id in "abc" and node is not leader)
    rest = tuple(sorted({"a", "b", "c", "d"} - {removed.id}))
    simulation.event(leader, lambda raft: raft.change_configuration(rest, (), 0))
    simulation.run_until(simulation.has_converged)
    simulation.run(50)
    assert removed.raft.committed_configuration == Configuration(rest)
    simulation.run(1000)
    assert removed.raft.role is Role.FOLLOWER
    assert simulation.agreed_leader() is leader


def test_leadership_goes_to_whom_it_is_given() -> None:
    simulation, leader = calm()
    target = next(node for node in simulation.up() if node.id in "abc" and node is not leader)
    term = leader.raft.term
    simulation.event(leader, simulation.propose_to)
    simulation.event(leader, lambda raft: raft.transfer_leadership(target.id))
    simulation.run_until(lambda: simulation.agreed_leader() is target)
    assert target.raft.term == term + 1


def test_a_leader_cut_off_from_the_majority_stops_leading_before_another_begins() -> None:
    simulation, leader = calm()
    simulation.cut = {frozenset((leader.id, other)) for other in NODE_IDS if other != leader.id}
    simulation.run_until(lambda: any(node is not leader for node in simulation.leaders()))
    assert leader.raft.role is not Role.LEADER
    assert not leader.raft.has_lease(simulation.now_ms)


def test_a_voter_cut_off_for_long_comes_back_without_disturbing_the_leader() -> None:
    """Dissertation 9.6: the pre-vote keeps its term where it was."""
    simulation, leader = calm()
    lonely = next(node.id for node in simulation.up() if node.id in "abc" and node is not leader)
    term = leader.raft.term
    simulation.cut = {frozenset((lonely, other)) for other in NODE_IDS if other != lonely}
    simulation.run(3000)
    simulation.heal()
    simulation.run(500)
    assert (simulation.agreed_leader(), leader.raft.term) == (leader, term)


def test_a_learner_far_behind_gets_a_snapshot_and_the_rest() -> None:
    simulation, leader = calm()
    for _ in range(40):
        simulation.event(leader, simulation.propose_to)
    simulation.run_until(simulation.has_converged)
    leader.disk.compact(leader.snapshot("compaction"), list(leader.state))
    leader.raft.compact_through(leader.raft.applied_index)
    simulation.event(leader, lambda raft: raft.change_configuration(("a", "b", "c"), ("d",), 0))
    simulation.event(leader, simulation.propose_to)
    simulation.run_until(simulation.has_converged)
    assert simulation.nodes["d"].disk.base.index > 40
    assert simulation.nodes["d"].state == leader.state


# Clusters with every fault


@pytest.mark.parametrize("seed", range(10))
def test_the_invariants_hold_whatever_happens(seed: int) -> None:
    simulation = Simulation(seed, voters=("a", "b", "c") if seed % 3 else ("a",))
    simulation.cause_chaos(5000)
    assert simulation.restarts > 10
    simulation.run_until(simulation.has_converged)
    assert simulation.checker.committed
    leader = simulation.agreed_leader()
    assert leader is not None
    simulation.event(leader, simulation.propose_to)
    simulation.run_until(simulation.has_converged)
    assert leader.state[-1][2] == f"command {simulation.proposed}".encode()


# Seeded bugs: each invariant can fail, and does when it should


class ForgetsItsVote(Raft):
    """Grants without writing down to whom."""

    def _on_vote_request(self, message: Any) -> None:
        before = self._hard_state
        super()._on_vote_request(message)
        self._hard_state = before


class CountsItsVoteEarly(Raft):
    """Counts its own vote before it is durable (etcd#14370, for votes)."""

    def _campaign(self, by_transfer: bool = False) -> None:
        super()._campaign(by_transfer)
        self._votes[self.id] = True
        self._count_votes()


class CountsItselfEarly(Raft):
    """Counts its own entries before they are durable (etcd#14370)."""

    def _match_indexes(self) -> dict[str, int]:
        return {**super()._match_indexes(), self.id: self.last_index}


class AcknowledgesEarly(Raft):
    """Sends everything at once, durable or not."""

    def _send(self, message_class: type[RaftMessage], to: str, **fields: Any) -> None:
        super()._send(message_class, to, **fields)
        self._urgent.append(self._messages.pop())

    def _send_early(self, message_class: type[RaftMessage], to: str, **fields: Any) -> None:
        self._send(message_class, to, **fields)


class AppliesTheUncommitted(Raft):
    """Hands out for application what is merely there."""

    def _newly_committed(self) -> list[Entry]:
        if self.log.last_index <= self._apply_out_index or self.role is not Role.FOLLOWER:
            return super()._newly_committed()
        return self.log.entries_in_memory(self._apply_out_index + 1, self.last_index)


class VotesForAnyLog(Raft):
    """Does not compare logs (raft 5.4.1)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.log.is_up_to_date = lambda last_index, last_term: True  # type: ignore[method-assign]


class TruncatesWhatItHas(Raft):
    """Takes every append for the end of the log (raft 5.3: only a conflict removes)."""

    def _append_foreign(self, message: Any) -> None:
        if self.log.floor_index <= message.prev_index < self.last_index:
            self._truncate(message.prev_index + 1)
        super()._append_foreign(message)


class AcceptsAnyGround(Raft):
    """Does not check that the previous entry is the leader's (raft 5.3)."""

    def _stands_on_common_ground(self, message: Any) -> bool:
        return message.prev_index <= self.last_index


class ForgetsTheOldHalf(Raft):
    """Lets the new voters decide alone from the first entry of a change (raft 6)."""

    @property
    def configuration(self) -> Configuration:
        newest = super().configuration
        return newest.without_old() if newest.is_joint else newest


class WinsWithAnyVote(Raft):
    """Takes one more vote than its own for a majority."""

    def _count_votes(self) -> None:
        if self.role is Role.CANDIDATE and sum(self._votes.values()) >= 1 and self.id in self._votes:
            self._become_leader()
        else:
            super()._count_votes()


SEEDED_BUGS = {
    ForgetsItsVote: " votes for . and ",
    CountsItsVoteEarly: "not durable",
    CountsItselfEarly: r"durable on \[\] only",
    AcknowledgesEarly: "durable on| votes for . and |not durable",
    AppliesTheUncommitted: "nobody has committed",
    VotesForAnyLog: "leader completeness",
    TruncatesWhatItHas: "would be cut off|durable on",
    AcceptsAnyGround: "log matching",
    ForgetsTheOldHalf: "durable on",
    WinsWithAnyVote: "election safety|two leaders",
}
HOSTILE = Faults(crash_every_ms=250, partition_every_ms=300, reconfigure_every_ms=400)


def first_failure(raft_class: type[Raft], seeds: Iterable[int]) -> tuple[int, str] | None:
    for seed in seeds:
        voters = NODE_IDS if seed % 2 else ("a", "b", "c")
        try:
            Simulation(seed, raft_class, voters, HOSTILE).cause_chaos(3000)
        except AssertionError as failure:
            return seed, str(failure)
    return None


@pytest.mark.parametrize("raft_class", SEEDED_BUGS)
def test_a_seeded_bug_is_noticed(raft_class: type[Raft]) -> None:
    failure = first_failure(raft_class, range(40))
    assert failure is not None
    seed, violation = failure
    assert re.search(SEEDED_BUGS[raft_class], violation), violation
    assert first_failure(Raft, [seed]) is None  # what was noticed is the bug


class CommitsOlderTerms(Raft):
    """Commits whatever a majority holds, of any term (logcabin#44)."""

    def _maybe_commit(self) -> None:
        index = agreed_value(self.configuration, self._match_indexes(), 0)
        if index > self.commit_index:
            self._commit_to(index)


def play_figure_8(raft_class: type[Raft]) -> Simulation:
    """The paper's example of why an older term must not commit by counting: `a` leads with it, then `e` without it."""
    terms = {"a": (1, 2), "b": (1, 2), "c": (1,), "d": (1,), "e": (1, 3)}
    disks = {
        node_id: Disk(
            hard_state=HardState(3, None),
            base=SnapshotMeta(0, 0, 0, Configuration(NODE_IDS), "none"),
            entries=[Entry(at, term, 0, COMMANDS, b"term %d" % term * 7) for at, term in enumerate(terms[node_id], 1)],
        )
        for node_id in NODE_IDS
    }
    simulation = Simulation(1, raft_class, NODE_IDS, NO_FAULTS, disks)
    nodes = simulation.nodes
    simulation.cut = {frozenset((one, other)) for one in "abc" for other in "de"}

    def asks_but_is_not(message: RaftMessage, candidate: str) -> bool:
        return isinstance(message, (PreVoteRequest, VoteRequest)) and message.sender != candidate

    simulation.blocks = lambda message: asks_but_is_not(message, "a") or (
        isinstance(message, AppendEntries) and message.last_index > 2
    )
    simulation.call_up(nodes["a"])
    simulation.run_until(lambda: nodes["c"].disk.last_index == 2)
    simulation.run(50)
    simulation.crash(nodes["a"])
    simulation.heal()
    simulation.blocks = lambda message: asks_but_is_not(message, "e")
    simulation.call_up(nodes["e"])
    simulation.blocks = lambda message: False
    return simulation


def test_an_older_term_is_not_committed_by_counting() -> None:
    """Raft 5.4.2, figure 8."""
    simulation = play_figure_8(Raft)
    simulation.start(simulation.nodes["a"])
    simulation.run_until(simulation.has_converged)
    assert simulation.nodes["a"].state[1][:2] == (2, 3)


def test_counting_an_older_term_is_noticed() -> None:
    with pytest.raises(Violation, match="leader completeness"):
        play_figure_8(CommitsOlderTerms)

