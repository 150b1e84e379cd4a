"""Raft: who leads, which entries exist, which of them are committed. A pure state machine.

Decided here alone: terms, votes, leadership, replication, commitment and changes of the configuration. Not known
here: what an entry's body means (a configuration's excepted), where things are stored, how messages travel, what time
it really is. Time and chance are arguments. Messages that are stepped in are authenticated already. Sections are
those of the Raft paper ("raft") and of Ongaro's dissertation.

The shell's side of the contract:

    raft.tick(now) / raft.step(message, now) / raft.propose(...)     at any time, also while a Ready is out
    send raft.take_urgent()                                          at any time, if fsync has a thread of its own
    while raft.has_ready():
        ready = raft.ready()
        persist hard_state, snapshot, truncate_from, entries         in this order, one transaction, fsync
        send ready.messages                                          never before the line above
        apply ready.committed
        raft.advance(ready)                                          one Ready is out at a time

Connections are events too (`peer_connected`, `peer_disconnected`, `peer_refused`): a node campaigns only while it has a
majority on the line, a leader sends entries only to who is connected, and a reset is news that no timeout has to bring.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from p2pcluster.core.log import CONFIG, NOOP, Entry, Log, Mode, Progress
from p2pcluster.core.messages import (
    AppendEntries,
    AppendReply,
    InstallSnapshot,
    PreVoteReply,
    PreVoteRequest,
    RaftMessage,
    SnapshotMeta,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
    decode_configuration,
    encode_configuration,
)
from p2pcluster.core.quorum import Configuration, Tally, agreed_value, has_majority, tally
from p2pcluster.errors import NotLeader, RemoteProtocolError

if TYPE_CHECKING:
    from random import Random

__all__ = [
    "Configuration", "Entry", "HardState", "Log", "Note", "PeerStatus", "Raft", "RaftSettings", "Ready", "Role",
    "SnapshotMeta",
]

_NEVER_MS = -(2**62)


class Role(enum.Enum):
    """What a node is doing. A learner is a follower that its configuration does not let campaign."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre_candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class HardState:
    """What must survive a crash beside the log; durable before any message that depends on it is sent."""

    term: int = 0
    voted_for: str | None = None


@dataclass(frozen=True, slots=True)
class RaftSettings:
    """Who this node is, its times and its bounds."""

    node_id: str
    generation: int = 0
    heartbeat_interval_ms: int = 100
    election_timeout_ms: int = 600  # a follower waits between one and two of these
    lease_ms: int = 500  # the leader's patience with a silent majority, and its lease: one number
    append_bytes_max: int = 256 * 1024  # of bodies in one message; a single larger entry goes alone
    in_flight_appends_max: int = 32  # to one peer, unanswered
    load_entries_max: int = 256  # asked back from the journal at once

    def validate(self) -> None:
        """The relations that safety and liveness rest on."""
        assert self.node_id
        assert self.generation >= 0
        assert self.heartbeat_interval_ms > 0
        assert self.lease_ms >= 3 * self.heartbeat_interval_ms  # raft 5.6: one lost heartbeat must not depose
        assert self.lease_ms < self.election_timeout_ms  # dissertation 6.4.1: no other leader while a lease runs
        assert self.append_bytes_max > 0
        assert self.in_flight_appends_max > 0
        assert self.load_entries_max > 0


@dataclass(frozen=True, slots=True)
class Note:
    """A fact for people and tests: `what` happened, and the numbers and names that go with it."""

    what: str
    facts: dict[str, int | str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ready:
    """What the shell has to do now, in the order of the fields (see the module)."""

    hard_state: HardState | None  # None: unchanged
    snapshot: SnapshotMeta | None  # the state and the log become this one
    truncate_from: int | None  # the rows from here on go, before `entries` are written
    entries: list[Entry]
    commit_index: int  # committed as soon as the above is durable: to be stored beside the rows
    messages: list[RaftMessage]
    committed: list[Entry]  # to be applied, in order
    load_entries: tuple[int, int] | None  # read back released ones: all or the first of them to `entries_loaded`
    snapshots_wanted: tuple[str, ...]  # these peers need one: `snapshot_taken` or `snapshot_failed`
    notes: list[Note]

    @property
    def needs_persist(self) -> bool:
        """Whether there is anything to make durable before sending."""
        changes = (self.hard_state, self.snapshot, self.truncate_from)
        return bool(self.entries) or any(change is not None for change in changes)


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What the leader knows of a member. `acked_ms`: when the last message was sent that it has answered over TCP."""

    node_id: str
    match_index: int
    mode: Mode
    acked_ms: int | None
    is_connected: bool


class Raft:
    """One node's part.

    Invariants: term, vote within a term, commit_index and applied_index never go back; applied_index <= commit_index <=
    last_index; what is committed is never truncated; a message leaves only when what it rests on is durable.
    """

    def __init__(
        self,
        settings: RaftSettings,
        random: Random,
        hard_state: HardState,
        log: Log,
        configuration: Configuration,
        commit_index: int,
        now_ms: int,
    ) -> None:
        """`configuration` is the one in force at `commit_index`; the shell has applied everything up to there."""
        settings.validate()
        assert log.base_index <= commit_index <= log.last_index, (log.base_index, commit_index, log.last_index)
        assert log.last_term <= hard_state.term, "the log knows a term that the hard state does not"
        self.settings = settings
        self.id = settings.node_id
        self.log = log
        self.commit_index = commit_index
        self.applied_index = commit_index
        self.role = Role.FOLLOWER
        self.leader_id: str | None = None
        self._random = random
        self._now_ms = self._ticked_ms = now_ms
        self._clock_offset_ms = log.last_at_ms - now_ms
        self._connected: set[str] = set()
        self._generation_heard = settings.generation
        self._start_handing_out(hard_state)
        self._start_configurations(configuration)
        self._start_roles()

    def _start_handing_out(self, hard_state: HardState) -> None:
        self._hard_state = self._hard_state_out = self._hard_state_stable = hard_state
        self._out_index = self._stable_index = self.log.last_index  # handed to the shell; durable
        self._out_valid_index = 0  # of the entries in the Ready that is out, those above this are void by now
        self._apply_out_index = self.commit_index
        self._out: Ready | None = None
        self._truncate_from: int | None = None
        self._snapshot: SnapshotMeta | None = None
        self._messages: list[RaftMessage] = []
        self._urgent: list[RaftMessage] = []
        self._load_wanted: tuple[int, int] | None = None
        self._load_is_out = False
        self._snapshots_wanted: list[str] = []
        self._notes: list[Note] = []

    def _start_configurations(self, configuration: Configuration) -> None:
        # The first is committed, the others are not yet and go again if their entries do.
        self._configurations = [(self.commit_index, configuration)]
        for entry in self.log.entries_in_memory(max(self.commit_index, self.log.floor_index) + 1, self.last_index):
            if entry.kind == CONFIG:
                self._configurations.append((entry.index, decode_configuration(entry.body)))

    def _start_roles(self) -> None:
        self._contact_ms: int | None = None  # when the leader was heard last
        self._votes: dict[str, bool] = {}
        self._ask_again_ms = 0
        self._by_transfer = False
        self._progress: dict[str, Progress] = {}
        self._term_start_index = 0
        self._heartbeat_ms = 0
        self._patience_from_ms = 0
        self._acks_from_ms = _NEVER_MS
        self._transfer_to: str | None = None
        self._transfer_until_ms = 0
        self._reset_election_deadline()
        self._handlers: dict[type[RaftMessage], Callable[[Any], None]] = {
            PreVoteRequest: self._on_pre_vote_request,
            PreVoteReply: self._on_pre_vote_reply,
            VoteRequest: self._on_vote_request,
            VoteReply: self._on_vote_reply,
            AppendEntries: self._on_append_entries,
            AppendReply: self._on_append_reply,
            InstallSnapshot: self._on_install_snapshot,
            SnapshotReply: self._on_snapshot_reply,
            TimeoutNow: self._on_timeout_now,
        }

    # What can be asked

    @property
    def hard_state(self) -> HardState:
        """Term and vote, durable or about to be."""
        return self._hard_state

    @property
    def term(self) -> int:
        """The present term."""
        return self._hard_state.term

    @property
    def last_index(self) -> int:
        """The index of the newest entry, durable or not."""
        return self.log.last_index

    @property
    def configuration(self) -> Configuration:
        """The newest one in the log: it is in force from the moment it is there, committed or not (raft 6)."""
        return self._configurations[-1][1]

    @property
    def committed_configuration(self) -> Configuration:
        """The newest one that cannot be lost any more."""
        return self._configurations[0][1]

    @property
    def can_change_configuration(self) -> bool:
        """One change at a time, and only after a commit in the own term (dissertation 4.3; raft-dev, July 2015)."""
        return (
            self.role is Role.LEADER
            and self._transfer_to is None
            and self.commit_index >= self._term_start_index
            and len(self._configurations) == 1
            and not self.configuration.is_joint
        )

    @property
    def is_installing(self) -> bool:
        """Whether a snapshot was taken in whose bytes the shell still has to install."""
        return self._snapshot is not None or (self._out is not None and self._out.snapshot is not None)

    @property
    def is_transferring(self) -> bool:
        """Whether this leader is handing over: it proposes nothing meanwhile."""
        return self._transfer_to is not None

    @property
    def has_committed_in_term(self) -> bool:
        """Whether this leader knows everything that was committed before it (raft 8)."""
        return self.role is Role.LEADER and self.commit_index >= self._term_start_index

    @property
    def next_tick_ms(self) -> int | None:
        """When `tick` has something to do again, if nothing else happens before."""
        if self.role is Role.LEADER:
            return self._heartbeat_ms if self._progress else None
        if self.configuration.is_sole_voter(self.id):
            return self._now_ms if self.role is Role.FOLLOWER else None
        if self.role is not Role.FOLLOWER:
            return min(self._election_deadline_ms, self._ask_again_ms)
        waits_for_nothing = self.leader_id is None and not self._may_campaign()
        return None if waits_for_nothing else self._election_deadline_ms

    def has_lease(self, now_ms: int) -> bool:
        """Whether no other node can have been elected by `now_ms`, clocks running alike: a help, never a proof."""
        if self.role is not Role.LEADER:
            return False
        if self.configuration.is_sole_voter(self.id):
            return True
        has_slept = now_ms - self._ticked_ms > self.settings.lease_ms // 2
        return not has_slept and self._transfer_to is None and now_ms < self._quorum_heard_ms() + self.settings.lease_ms

    def cluster_time_ms(self, now_ms: int) -> int:
        """The time to stamp a proposal with: the last entry's, plus what has passed on this clock since."""
        return max(self.log.last_at_ms, now_ms + self._clock_offset_ms)

    def peers(self) -> list[PeerStatus]:
        """What a leader knows of the other members; nothing on any other node."""
        return [
            PeerStatus(peer, progress.match_index, progress.mode, progress.acked_ms, peer in self._connected)
            for peer, progress in self._progress.items()
        ]

    # What can happen

    def tick(self, now_ms: int) -> None:
        """Time has passed."""
        gap_ms = now_ms - self._ticked_ms
        self._see_time(now_ms)
        self._ticked_ms = self._now_ms
        if self.role is Role.LEADER:
            self._tick_leader(gap_ms)
        elif self.role is Role.FOLLOWER:
            self._tick_follower()
        else:
            self._tick_candidate()

    def step(self, message: RaftMessage, now_ms: int) -> None:
        """An authenticated message has come. Raises `RemoteProtocolError` when no correct peer can have sent it."""
        self._see_time(now_ms)
        if message.to != self.id or not self._is_of_this_generation(message):
            return
        if message.term > self.term and not self._meet_higher_term(message):
            return
        if message.term < self.term:
            self._answer_from_the_past(message)
        else:
            self._handlers[type(message)](message)

    def propose(self, kind: int, body: bytes, at_ms: int) -> int:
        """Append an entry; its index. It may still be lost: it counts when it comes back as committed with this term.

        An `at_ms` behind the log's last is raised to it, because the core puts entries of its own in between. Raises
        `NotLeader`, whose hint is a node id here.
        """
        assert kind != CONFIG, "a configuration is changed by change_configuration"
        self._require_leadership()
        return self._append_own(kind, body, at_ms)

    def change_configuration(self, voters: tuple[str, ...], learners: tuple[str, ...], at_ms: int) -> int:
        """Begin the change to these members; the index of its first entry. Ask `can_change_configuration` before.

        Other voters take two entries, of which the second follows by itself. Raises `NotLeader`.
        """
        self._require_leadership()
        assert self.can_change_configuration, "a change of the configuration came too early"
        following = Configuration(voters=voters, learners=learners)
        if set(voters) != set(self.configuration.voters):
            following = self.configuration.joint_with(voters, learners)
        return self._append_own(CONFIG, encode_configuration(following), at_ms)

    def transfer_leadership(self, to: str) -> None:
        """Let the voter `to` take over as soon as it has the whole log; give up after an election timeout.

        Until then proposals raise `NotLeader`, and so does this if the node does not lead (dissertation 3.10).
        """
        self._require_leadership()
        assert to != self.id and to in self.configuration.voters, to
        self._transfer_to = to
        self._transfer_until_ms = self._now_ms + self.settings.election_timeout_ms
        self._note("transfer_started", to=to)
        self._maybe_transfer()

    def step_down(self, reason: str) -> None:
        """Stop leading at once (a full disk, say) and call the best successor up; nothing to do on another node."""
        if self.role is Role.LEADER:
            self._call_successor()
            self._lose_leadership(reason)

    def peer_connected(self, node_id: str, now_ms: int) -> None:
        """There is an authenticated TCP connection to the node."""
        self._see_time(now_ms)
        self._connected.add(node_id)
        if node_id in self._progress:
            self._progress[node_id].restart()
            self._progress[node_id].heartbeat_due = True

    def peer_disconnected(self, node_id: str, now_ms: int) -> None:
        """The connection is gone, and what was on its way with it."""
        self._see_time(now_ms)
        self._connected.discard(node_id)
        if node_id == self.leader_id:
            self._hurry_election()
        if node_id in self._progress:
            self._progress[node_id].restart()
            if self.configuration.is_voter(node_id) and not self._is_connected_to_majority():
                self._lose_leadership("reset by a majority")

    def peer_refused(self, node_id: str, now_ms: int) -> None:
        """Connecting again was refused: nobody listens there, so there is no leader to protect."""
        self._see_time(now_ms)
        if node_id == self.leader_id and self.role is Role.FOLLOWER:
            self._contact_ms = None
            self._hurry_election()

    def entries_loaded(self, entries: Sequence[Entry]) -> None:
        """The shell read back what a Ready asked for: from its first index on, at least one, without a gap."""
        assert entries
        if self.role is not Role.LEADER:
            return
        self._load_is_out = False
        self.log.keep_loaded(entries)
        for progress in self._progress.values():
            progress.waits_for_load = False

    def snapshot_taken(self, peer: str, snapshot: SnapshotMeta) -> None:
        """The shell has a snapshot for the peer and sends its bytes; the message about it comes with the next Ready."""
        assert snapshot.index <= self.applied_index, (snapshot, self.applied_index)
        if self._waits_for_snapshot(peer):
            self._send(InstallSnapshot, peer, snapshot=snapshot, sent_ms=self._now_ms)

    def snapshot_failed(self, peer: str) -> None:
        """The snapshot did not get there: ask where the peer stands, which may make it wanted again."""
        if self._waits_for_snapshot(peer):
            self._progress[peer].restart()

    def release_through(self, index: int) -> None:
        """Drop the bodies up to `index` from memory: applied, durable, and in the journal if a follower needs one."""
        assert index <= min(self.applied_index, self._stable_index), (index, self.applied_index, self._stable_index)
        self.log.release_through(index)

    def compact_through(self, index: int) -> None:
        """Forget the entries up to `index`: the state that the shell has stored covers them."""
        assert index <= min(self.applied_index, self._stable_index), (index, self.applied_index, self._stable_index)
        self.log.compact_through(index)
        # What was asked back may be gone by now, and whoever waits for it needs a snapshot instead.
        self._load_wanted, self._load_is_out = None, False
        for progress in self._progress.values():
            progress.waits_for_load = False

    # What the shell has to do

    def has_ready(self) -> bool:
        """Whether `ready` has something to hand out. Never while a Ready is out."""
        if self._out is not None:
            return False
        return (
            self._out_index < self.log.last_index
            or self._apply_out_index < self.commit_index
            or self._hard_state != self._hard_state_out
            or self._truncate_from is not None
            or self._snapshot is not None
            or bool(self._messages or self._urgent or self._notes or self._snapshots_wanted)
            or self._load_wanted is not None
            or any(self._has_message_for(peer, progress) for peer, progress in self._progress.items())
        )

    def ready(self) -> Ready:
        """Everything that has come up since the last one."""
        assert self._out is None, "one Ready is out already"
        self._flush_appends()
        self._out = Ready(
            hard_state=self._hard_state if self._hard_state != self._hard_state_out else None,
            snapshot=self._snapshot,
            truncate_from=self._truncate_from,
            entries=self.log.entries_in_memory(self._out_index + 1, self.last_index) if self._has_new_entries() else [],
            commit_index=self._commit_index_when_durable(),
            messages=self._urgent + self._messages,
            committed=self._newly_committed(),
            load_entries=self._load_wanted,
            snapshots_wanted=tuple(self._snapshots_wanted),
            notes=self._notes,
        )
        self._hard_state_out = self._hard_state
        self._out_index = self._out_valid_index = self.last_index
        self._apply_out_index = self.commit_index
        self._snapshot = self._truncate_from = self._load_wanted = None
        self._messages, self._urgent, self._notes, self._snapshots_wanted = [], [], [], []
        return self._out

    def advance(self, ready: Ready) -> None:
        """What `ready` said is durable, sent and applied. The own log and vote count from here on, not before."""
        assert ready is self._out, "only the Ready that is out can be advanced"
        self._out = None
        if ready.hard_state is not None:
            self._hard_state_stable = ready.hard_state
        if ready.snapshot is not None:
            self._stable_index = max(self._stable_index, ready.snapshot.index)
            self.applied_index = max(self.applied_index, ready.snapshot.index)
        if ready.entries:
            self._stable_index = max(self._stable_index, min(ready.entries[-1].index, self._out_valid_index))
        if ready.committed:
            self.applied_index = ready.committed[-1].index
        if self.role is Role.CANDIDATE:
            self._count_own_vote()
        elif self.role is Role.LEADER:
            self._maybe_commit()

    def take_urgent(self) -> list[RaftMessage]:
        """Messages that rest on nothing but what is durable already: they may go at once, even while a Ready is out.

        Without them a slow disk would look like a dead node. Who persists inline need not ask: `ready` has them too.
        """
        urgent, self._urgent = self._urgent, []
        return urgent

    def _has_new_entries(self) -> bool:
        return self._out_index < self.last_index

    def _newly_committed(self) -> list[Entry]:
        if self._apply_out_index == self.commit_index:
            return []
        return self.log.entries_in_memory(self._apply_out_index + 1, self.commit_index)

    def _commit_index_when_durable(self) -> int:
        decides_alone = self.role is Role.LEADER and self.configuration.is_sole_voter(self.id)
        return self.last_index if decides_alone else self.commit_index

    # Small common things

    def _see_time(self, now_ms: int) -> None:
        # Events carry the time at which they were read, so one may be handled behind a later one.
        self._now_ms = max(self._now_ms, now_ms)

    def _note(self, what: str, **facts: int | str | None) -> None:
        self._notes.append(Note(what, facts))

    def _send(self, message_class: type[RaftMessage], to: str, **fields: Any) -> None:
        fields.setdefault("term", self.term)
        self._messages.append(
            message_class(generation=self.settings.generation, sender=self.id, to=to, **fields)
        )

    def _send_early(self, message_class: type[RaftMessage], to: str, **fields: Any) -> None:
        self._send(message_class, to, **fields)
        if self._hard_state == self._hard_state_stable:
            self._urgent.append(self._messages.pop())

    def _require_leadership(self) -> None:
        if self.role is not Role.LEADER:
            raise NotLeader("this node does not lead; ask the leader", self.leader_id)
        if self._transfer_to is not None:
            raise NotLeader("this leader is handing over; ask its successor in a moment", self._transfer_to)

    def _is_of_this_generation(self, message: RaftMessage) -> bool:
        if message.generation > self._generation_heard:
            self._generation_heard = message.generation
            self._note("generation_superseded", by=message.generation, sender=message.sender)
        return message.generation == self.settings.generation

    def _protects_leader(self) -> bool:
        # Dissertation 4.2.3: a node that hears its leader is no help in deposing it.
        if self.role is Role.LEADER:
            return not self._has_lost_quorum()
        if self.leader_id is None or self._contact_ms is None:
            return False
        return self._now_ms < self._contact_ms + self.settings.election_timeout_ms

    def _meet_higher_term(self, message: RaftMessage) -> bool:
        """Whether the message is to be handled. A pre-vote speaks of a term that nobody is in yet."""
        if isinstance(message, PreVoteRequest) or (isinstance(message, PreVoteReply) and message.granted):
            return True
        if isinstance(message, VoteRequest) and not message.transfer and self._protects_leader():
            return False
        self._become_follower(message.term)
        return True

    def _answer_from_the_past(self, message: RaftMessage) -> None:
        """The sender of an outdated request learns the present term; an outdated reply is nothing."""
        if isinstance(message, PreVoteRequest):
            self._send(PreVoteReply, message.sender, granted=False)
        elif isinstance(message, VoteRequest):
            self._send(VoteReply, message.sender, granted=False)
        elif isinstance(message, AppendEntries):
            self._send(AppendReply, message.sender, match_index=0, rejected_index=message.prev_index, sent_ms=0)
        elif isinstance(message, InstallSnapshot):
            self._send(SnapshotReply, message.sender, match_index=0, sent_ms=0)

    # Elections (raft 5.2, 5.4.1; dissertation 9.6 for the pre-vote)

    def _reset_election_deadline(self) -> None:
        timeout_ms = self.settings.election_timeout_ms
        self._election_deadline_ms = self._now_ms + timeout_ms + self._random.randrange(timeout_ms)

    def _hurry_election(self) -> None:
        # Everybody else is told of the reset at the same moment: a little chance keeps the candidates apart.
        soon_ms = self._now_ms + self._random.randrange(self.settings.heartbeat_interval_ms)
        self._election_deadline_ms = min(self._election_deadline_ms, soon_ms)

    def _is_connected_to_majority(self) -> bool:
        return has_majority(self.configuration, self._connected | {self.id})

    def _may_campaign(self) -> bool:
        # A voter that a change removes may hold the only log that wins, until the change is committed: if it did not
        # campaign, nobody could (dissertation 4.2.2).
        was_voter = any(configuration.is_voter(self.id) for _, configuration in self._configurations)
        return was_voter and self._is_connected_to_majority()

    def _tick_follower(self) -> None:
        if self.configuration.is_sole_voter(self.id):
            self._campaign()
        elif self._now_ms >= self._election_deadline_ms:
            self._set_leader(None)
            if self._may_campaign():
                self._pre_campaign()

    def _tick_candidate(self) -> None:
        if self.configuration.is_sole_voter(self.id):
            return  # there is nobody to wait for but the own disk, however slow
        if self._now_ms >= self._election_deadline_ms:
            self._become_follower(self.term)
            if self._may_campaign():
                self._pre_campaign()
        elif self._now_ms >= self._ask_again_ms:
            self._ask_votes()

    def _pre_campaign(self) -> None:
        self.role = Role.PRE_CANDIDATE
        self._set_leader(None)
        self._reset_election_deadline()
        self._votes = {self.id: True}
        self._note("pre_campaign", term=self.term + 1)
        self._ask_votes()
        self._count_votes()

    def _campaign(self, by_transfer: bool = False) -> None:
        self.role = Role.CANDIDATE
        self._set_leader(None)
        self._enter_term(self.term + 1, voted_for=self.id)
        self._reset_election_deadline()
        self._votes = {}
        self._by_transfer = by_transfer
        self._note("campaign", term=self.term)
        self._ask_votes()

    def _ask_votes(self) -> None:
        """Ask everyone who has not granted: datagrams get lost, and who refused a pre-vote may think better of it."""
        self._ask_again_ms = self._now_ms + self.settings.heartbeat_interval_ms
        log_end = {"last_index": self.last_index, "last_term": self.log.last_term}
        for voter in dict.fromkeys(self.configuration.voters + self.configuration.voters_old):
            if voter == self.id or self._votes.get(voter):
                continue
            if self.role is Role.PRE_CANDIDATE:
                self._send_early(PreVoteRequest, voter, term=self.term + 1, **log_end)
            else:
                self._send(VoteRequest, voter, transfer=self._by_transfer, **log_end)

    def _on_pre_vote_request(self, message: PreVoteRequest) -> None:
        granted = (
            message.term > self.term
            and self.log.is_up_to_date(message.last_index, message.last_term)
            and not self._protects_leader()
        )
        self._send_early(
            PreVoteReply, message.sender, term=message.term if granted else self.term, granted=granted
        )

    def _on_vote_request(self, message: VoteRequest) -> None:
        granted = self._hard_state.voted_for in (None, message.sender) and self.log.is_up_to_date(
            message.last_index, message.last_term
        )
        if granted:
            self._hard_state = HardState(self.term, message.sender)
            self._reset_election_deadline()
        self._send(VoteReply, message.sender, granted=granted)

    def _on_pre_vote_reply(self, message: PreVoteReply) -> None:
        if self.role is Role.PRE_CANDIDATE and message.term == self.term + message.granted:
            self._votes[message.sender] = message.granted
            self._count_votes()

    def _on_vote_reply(self, message: VoteReply) -> None:
        if self.role is Role.CANDIDATE:
            self._votes[message.sender] = message.granted
            self._count_votes()

    def _count_own_vote(self) -> None:
        if self._hard_state_stable == self._hard_state:
            self._votes[self.id] = True
            self._count_votes()

    def _count_votes(self) -> None:
        result = tally(self.configuration, self._votes)
        if self.role is Role.PRE_CANDIDATE:
            if result is Tally.WON:
                self._campaign()
        elif result is Tally.WON:
            self._become_leader()
        elif result is Tally.LOST:
            self._become_follower(self.term)

    def _on_timeout_now(self, message: TimeoutNow) -> None:
        if self.role is Role.FOLLOWER and self._may_campaign():
            self._campaign(by_transfer=True)

    def _become_follower(self, term: int, leader_id: str | None = None) -> None:
        if term > self.term:
            self._enter_term(term, voted_for=None)
        if self.role is Role.LEADER:
            self._drop_leadership()
        if self.role is not Role.FOLLOWER:
            self.role = Role.FOLLOWER
            self._reset_election_deadline()
        self._votes = {}
        self._set_leader(leader_id)

    def _enter_term(self, term: int, voted_for: str | None) -> None:
        assert term > self.term, (term, self.term)
        self._hard_state = HardState(term, voted_for)
        self._messages, self._urgent = [], []  # what has not left yet speaks of a term that is over

    def _set_leader(self, leader_id: str | None) -> None:
        if leader_id == self.leader_id:
            return
        self.leader_id = leader_id
        self._contact_ms = None
        self._note("leader", term=self.term, leader=leader_id)

    # Following (raft 5.3, 7)

    def _follow(self, leader_id: str) -> None:
        assert self.role is not Role.LEADER, f"two leaders in term {self.term}: {self.id} and {leader_id}"
        if self.role is not Role.FOLLOWER or self.leader_id != leader_id:
            self._become_follower(self.term, leader_id)
        self._contact_ms = self._now_ms
        self._reset_election_deadline()

    def _on_append_entries(self, message: AppendEntries) -> None:
        self._follow(message.sender)
        if not self._stands_on_common_ground(message):
            self._reject_append(message)
            return
        self._append_foreign(message)
        commit_index = min(message.commit_index, message.last_index)
        if commit_index > self.commit_index:
            self._commit_to(commit_index)
        if message.entries:
            self._send(AppendReply, message.sender, match_index=message.last_index, sent_ms=message.sent_ms)
        else:
            self._answer_heartbeat(message)

    def _stands_on_common_ground(self, message: AppendEntries) -> bool:
        return message.prev_index <= self.log.base_index or self.log.holds(message.prev_index, message.prev_term)

    def _reject_append(self, message: AppendEntries) -> None:
        hint_index = self.log.last_not_above(message.prev_index, message.prev_term)
        hint_term = self.log.term(hint_index) if hint_index >= self.log.base_index else 0
        self._send(
            AppendReply, message.sender, match_index=0, sent_ms=message.sent_ms,
            rejected_index=message.prev_index, hint_index=hint_index, hint_term=hint_term,
        )

    def _answer_heartbeat(self, message: AppendEntries) -> None:
        # Every leader of this term has what this node knows to be committed, so that much may be claimed unasked.
        match_index = min(self._stable_index, max(message.last_index, self.commit_index))
        self._send_early(AppendReply, message.sender, match_index=match_index, sent_ms=message.sent_ms)

    def _append_foreign(self, message: AppendEntries) -> None:
        """Skip what is here already, whatever comes behind it; only a conflict removes anything (raft 5.3)."""
        for position, entry in enumerate(message.entries):
            if entry.index > self.log.base_index and not self.log.holds(entry.index, entry.term):
                if entry.index <= self.last_index:
                    self._truncate(entry.index)
                self._append(message.entries[position:])
                self._clock_offset_ms = self.log.last_at_ms - self._now_ms
                return

    def _truncate(self, index: int) -> None:
        assert index > self.commit_index, f"entry {index} is committed (up to {self.commit_index}) and would be cut off"
        self.log.truncate_from(index)
        if index <= self._out_index:
            self._truncate_from = index
        self._out_index = min(self._out_index, index - 1)
        self._out_valid_index = min(self._out_valid_index, index - 1)
        self._stable_index = min(self._stable_index, index - 1)
        while self._configurations[-1][0] >= index:
            self._configurations.pop()

    def _on_install_snapshot(self, message: InstallSnapshot) -> None:
        self._follow(message.sender)
        snapshot = message.snapshot
        if snapshot.index > self.commit_index:
            if self.log.holds(snapshot.index, snapshot.term):
                self._commit_to(snapshot.index)
            else:
                self._install(snapshot)
        self._send(SnapshotReply, message.sender, match_index=snapshot.index, sent_ms=message.sent_ms)

    def _install(self, snapshot: SnapshotMeta) -> None:
        # Of what is on the disk, or on its way there, only the committed is sure to be the leader's too.
        self._stable_index = min(self._stable_index, self.commit_index)
        self._out_valid_index = min(self._out_valid_index, self.commit_index)
        self.log.replace_by_snapshot(snapshot.index, snapshot.term, snapshot.at_ms)
        self.commit_index = self._apply_out_index = self._out_index = snapshot.index
        self._configurations = [(snapshot.index, snapshot.configuration)]
        self._clock_offset_ms = snapshot.at_ms - self._now_ms
        self._snapshot, self._truncate_from = snapshot, None
        self._note("snapshot", index=snapshot.index, term=snapshot.term)

    # Leading (raft 5.3, 5.4.2; dissertation 6.2 for check-quorum, 6.4.1 for the lease)

    def _become_leader(self) -> None:
        self.role = Role.LEADER
        self._votes = {}
        self._patience_from_ms = self._now_ms
        self._heartbeat_ms = self._now_ms + self.settings.heartbeat_interval_ms
        self._set_leader(self.id)
        self._sync_progress()
        self._note("became_leader", term=self.term)
        self._term_start_index = self._append_own(NOOP, b"", self.cluster_time_ms(self._now_ms))

    def _drop_leadership(self) -> None:
        self._progress = {}
        self._transfer_to = None
        self._load_wanted, self._load_is_out = None, False
        self._snapshots_wanted = []
        self.log.drop_loaded()

    def _lose_leadership(self, reason: str) -> None:
        self._note("lost_leadership", term=self.term, reason=reason)
        self._become_follower(self.term)

    def _call_successor(self) -> None:
        candidates = [
            (progress.match_index, peer)
            for peer, progress in self._progress.items()
            if peer in self._connected and self.configuration.is_voter(peer)
        ]
        if candidates:
            self._send(TimeoutNow, max(candidates)[1])

    def _tick_leader(self, gap_ms: int) -> None:
        if gap_ms > self.settings.lease_ms // 2:
            # The machine slept, or this program did: what was acknowledged before says nothing about now.
            self._patience_from_ms = self._acks_from_ms = self._now_ms
            for progress in self._progress.values():
                progress.acked_ms = None
        if self._has_lost_quorum():
            self._lose_leadership("no majority answers")
            return
        if self._transfer_to is not None and self._now_ms >= self._transfer_until_ms:
            self._note("transfer_failed", to=self._transfer_to)
            self._transfer_to = None
        if self._now_ms >= self._heartbeat_ms:
            self._heartbeat_ms = self._now_ms + self.settings.heartbeat_interval_ms
            self._beat()

    def _quorum_heard_ms(self) -> int:
        """The latest time such that a majority answered, over TCP, something that was sent then or later."""
        heard = {peer: progress.acked_ms for peer, progress in self._progress.items() if progress.acked_ms is not None}
        return agreed_value(self.configuration, {**heard, self.id: self._now_ms}, _NEVER_MS)

    def _has_lost_quorum(self) -> bool:
        since_ms = max(self._quorum_heard_ms(), self._patience_from_ms)
        return self._now_ms >= since_ms + self.settings.lease_ms

    def _beat(self) -> None:
        for peer, progress in self._progress.items():
            if self._out is None:
                progress.heartbeat_due = True
            elif peer in self._connected:
                # What is out is not sent yet, so a heartbeat that overtakes it must stand on nothing.
                self._send_early(AppendEntries, peer, **self._append_fields(0))

    def _has_message_for(self, peer: str, progress: Progress) -> bool:
        if peer not in self._connected:
            return False
        return progress.heartbeat_due or progress.may_append(self.last_index, self.settings.in_flight_appends_max)

    def _flush_appends(self) -> None:
        for peer, progress in self._progress.items():
            if self._has_message_for(peer, progress):
                self._flush_appends_to(peer, progress)
        if self._progress:
            self.log.drop_loaded(min(progress.next_index for progress in self._progress.values()))

    def _flush_appends_to(self, peer: str, progress: Progress) -> None:
        is_quiet = True
        while progress.may_append(self.last_index, self.settings.in_flight_appends_max):
            if progress.next_index <= self.log.base_index:
                progress.wait_for_snapshot(self.log.base_index)
                self._snapshots_wanted.append(peer)
            elif not self._send_append(peer, progress):
                progress.waits_for_load = True
            else:
                is_quiet = False
        if is_quiet and progress.heartbeat_due:
            is_known = progress.mode is not Mode.SNAPSHOT and progress.next_index > self.log.base_index
            stands_on = progress.next_index - 1 if is_known else 0
            self._send(AppendEntries, peer, **self._append_fields(stands_on))
        progress.heartbeat_due = False

    def _send_append(self, peer: str, progress: Progress) -> bool:
        """Send the next batch; False when it has to be loaded first."""
        entries: list[Entry] | None = []
        if progress.next_index <= self.last_index:
            entries = self.log.batch(progress.next_index, self.settings.append_bytes_max)
        if entries is None:
            self._want_entries(progress.next_index)
            return False
        fields = self._append_fields(progress.next_index - 1)
        self._send(AppendEntries, peer, entries=tuple(entries), **fields)
        progress.sent(fields["prev_index"] + len(entries))
        return True

    def _append_fields(self, prev_index: int) -> dict[str, int]:
        prev_term = self.log.term(prev_index) if prev_index else 0
        return {
            "prev_index": prev_index,
            "prev_term": prev_term,
            "commit_index": self.commit_index,
            "sent_ms": self._now_ms,
        }

    def _want_entries(self, low: int) -> None:
        if not self._load_is_out:
            self._load_is_out = True
            self._load_wanted = (low, min(self.log.floor_index, low + self.settings.load_entries_max - 1))

    def _waits_for_snapshot(self, peer: str) -> bool:
        return peer in self._progress and self._progress[peer].mode is Mode.SNAPSHOT

    def _on_append_reply(self, message: AppendReply) -> None:
        progress = self._heard_from(message)
        if progress is None:
            return
        if message.rejected_index is None:
            self._accept(progress, message.match_index)
        elif not progress.is_stale_rejection(message.rejected_index):
            agree_index = self.log.last_not_above(message.hint_index, message.hint_term)
            progress.rejected(min(agree_index + 1, message.rejected_index))

    def _on_snapshot_reply(self, message: SnapshotReply) -> None:
        progress = self._heard_from(message)
        if progress is not None:
            self._accept(progress, message.match_index)
            if progress.mode is Mode.SNAPSHOT:  # an older snapshot than is needed by now
                progress.restart()

    def _heard_from(self, message: AppendReply | SnapshotReply) -> Progress | None:
        """What is known of the sender; None when that is of no use any more."""
        progress = self._progress.get(message.sender)
        if progress is None:
            return None
        if message.match_index > self.last_index:
            raise RemoteProtocolError(
                f"{message.sender} acknowledges entry {message.match_index}, the last is {self.last_index}; "
                "its journal is of another cluster or damaged"
            )
        if message.over_tcp and message.sent_ms >= self._acks_from_ms:
            acked_ms = min(message.sent_ms, self._now_ms)
            progress.acked_ms = acked_ms if progress.acked_ms is None else max(progress.acked_ms, acked_ms)
        return progress

    def _accept(self, progress: Progress, match_index: int) -> None:
        has_news = match_index > progress.match_index
        progress.accepted(match_index)
        if has_news:
            self._maybe_commit()
            self._maybe_transfer()

    def _maybe_commit(self) -> None:
        """Only an entry of the own term commits by counting; it takes those before it along (raft 5.4.2)."""
        index = agreed_value(self.configuration, self._match_indexes(), 0)
        if index > self.commit_index and self.log.term(index) == self.term:
            self._commit_to(index)
            self._carry_configuration_on()

    def _match_indexes(self) -> dict[str, int]:
        matches = {peer: progress.match_index for peer, progress in self._progress.items()}
        matches[self.id] = self._stable_index
        return matches

    def _maybe_transfer(self) -> None:
        target = self._transfer_to
        if target is not None and self._progress[target].match_index == self.last_index:
            self._send(TimeoutNow, target)

    # Log and configuration, whoever appends (raft 6)

    def _append_own(self, kind: int, body: bytes, at_ms: int) -> int:
        entry = Entry(self.last_index + 1, self.term, max(at_ms, self.log.last_at_ms), kind, body)
        self._append([entry])
        return entry.index

    def _append(self, entries: Sequence[Entry]) -> None:
        self.log.append(entries)
        for entry in entries:
            if entry.kind == CONFIG:
                self._adopt_configuration(entry)

    def _adopt_configuration(self, entry: Entry) -> None:
        self._configurations.append((entry.index, decode_configuration(entry.body)))
        self._note("configuration", index=entry.index, is_joint=self.configuration.is_joint)
        if self.role is Role.LEADER:
            self._patience_from_ms = self._now_ms
            self._sync_progress()

    def _commit_to(self, index: int) -> None:
        assert self.commit_index < index <= self.last_index, (self.commit_index, index, self.last_index)
        self.commit_index = index
        while len(self._configurations) > 1 and self._configurations[1][0] <= index:
            del self._configurations[0]
            self._note("configuration_committed", index=self._configurations[0][0])
            if self.role is Role.LEADER:
                self._sync_progress()

    def _carry_configuration_on(self) -> None:
        """The second half of a change follows the first; a leader that is no voter any more leaves (raft 6)."""
        index, configuration = self._configurations[-1]
        if index > self.commit_index:
            return
        if configuration.is_joint:
            body = encode_configuration(configuration.without_old())
            self._append_own(CONFIG, body, self.cluster_time_ms(self._now_ms))
        elif not configuration.is_voter(self.id):
            self._call_successor()
            self._lose_leadership("left the voters")

    def _sync_progress(self) -> None:
        """Send to every member, and to those who were one until the change that removes them is committed."""
        members = {member for _, configuration in self._configurations for member in configuration.members}
        members.discard(self.id)
        for peer in sorted(members - self._progress.keys()):
            self._progress[peer] = Progress(self.last_index + 1)
        for peer in sorted(self._progress.keys() - members):
            self._say_goodbye(peer, self._progress.pop(peer))

    def _say_goodbye(self, peer: str, progress: Progress) -> None:
        # So that a node that was removed learns it from the log, if it kept up.
        if peer in self._connected and progress.match_index >= self._configurations[0][0]:
            self._send(AppendEntries, peer, **self._append_fields(progress.match_index))
