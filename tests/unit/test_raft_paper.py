"""One test for each rule of Raft that a single node can be held to, and the rules that this core adds.

"raft" is the extended paper (Ongaro and Ousterhout 2014), "dissertation" is Ongaro's (2014). The node under test is
`a`; the test is its disk, its network and its clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, TypeVar

import pytest

from p2pcluster.core import codec
from p2pcluster.core.log import COMMANDS, CONFIG, NOOP, Entry, Log, Mode
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
    from_message,
    to_message,
)
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState, Raft, RaftSettings, Ready, Role
from p2pcluster.errors import NotLeader, RemoteProtocolError

HEARTBEAT_MS = 100
ELECTION_MS = 600
LEASE_MS = 500
ABC = Configuration(("a", "b", "c"))
AnyMessage = TypeVar("AnyMessage", bound=RaftMessage)


def entries_of(*terms: int, first: int = 1) -> list[Entry]:
    return [Entry(first + at, term, 0, COMMANDS, b"%d/%d" % (first + at, term)) for at, term in enumerate(terms)]


class Rig:
    """The node `a`, and everything that it has said."""

    def __init__(
        self,
        terms: Sequence[int] = (),
        configuration: Configuration = ABC,
        hard_state: HardState | None = None,
        commit_index: int = 0,
        log: Log | None = None,
        connected: str = "bcde",
        seed: int = 1,
        **settings: int,
    ) -> None:
        self.now_ms = 10_000
        self.messages: list[RaftMessage] = []
        self.readies: list[Ready] = []
        log = log or Log(entries=entries_of(*terms))
        self.raft = Raft(
            RaftSettings("a", **settings), Random(seed), hard_state or HardState(log.last_term), log, configuration,
            commit_index, self.now_ms,
        )
        for peer in connected:
            self.raft.peer_connected(peer, self.now_ms)

    # The shell

    def pump(self) -> None:
        """Persist, send, apply at once, until there is nothing to do."""
        while self.raft.has_ready():
            self.finish(self.begin())

    def begin(self) -> Ready:
        """Take a Ready and leave it out."""
        ready = self.raft.ready()
        self.readies.append(ready)
        return ready

    def finish(self, ready: Ready) -> None:
        self.messages += ready.messages
        self.raft.advance(ready)

    def tick(self, delta_ms: int) -> None:
        """Let time pass in small steps."""
        end_ms = self.now_ms + delta_ms
        while self.now_ms < end_ms:
            self.now_ms = min(self.now_ms + 20, end_ms)
            self.raft.tick(self.now_ms)
            self.pump()

    def step(self, message_class: type[RaftMessage], sender: str, **fields: Any) -> None:
        """Hand a message in, and do nothing else."""
        self.raft.step(self.message(message_class, sender, **fields), self.now_ms)

    def hear(self, message_class: type[RaftMessage], sender: str, **fields: Any) -> None:
        self.step(message_class, sender, **fields)
        self.pump()

    def message(self, message_class: type[RaftMessage], sender: str, **fields: Any) -> RaftMessage:
        defaults = {"generation": 0, "term": self.raft.term, "to": "a", "over_tcp": True}
        return message_class(sender=sender, **{**defaults, **fields})

    def said(self, message_class: type[AnyMessage], to: str | None = None) -> list[AnyMessage]:
        """What was sent of a class since it was asked last."""
        found = [
            message for message in self.messages
            if isinstance(message, message_class) and to in (None, message.to)
        ]
        self.messages = [message for message in self.messages if message not in found]
        return found

    # Common ways

    def append(self, *entries: Entry, term: int, prev: tuple[int, int], commit: int = 0, sender: str = "b") -> None:
        """The leader `sender` appends."""
        self.hear(
            AppendEntries, sender, term=term, prev_index=prev[0], prev_term=prev[1], commit_index=commit,
            sent_ms=self.now_ms, entries=entries,
        )

    def acknowledge(self, peer: str, match_index: int, over_tcp: bool = True, sent_ms: int | None = None) -> None:
        self.hear(
            AppendReply, peer, match_index=match_index, over_tcp=over_tcp,
            sent_ms=self.now_ms if sent_ms is None else sent_ms,
        )

    def stand(self) -> None:
        """Let the election timeout pass, to the pre-vote."""
        end_ms = self.now_ms + 2 * ELECTION_MS + 20
        while self.raft.role is Role.FOLLOWER:
            assert self.now_ms < end_ms, "no election began"
            self.tick(20)

    def campaign(self) -> None:
        """To the vote."""
        self.stand()
        self.hear(PreVoteReply, "b", term=self.raft.term + 1, granted=True)
        assert self.raft.role is Role.CANDIDATE

    def lead(self) -> None:
        """To leadership, with everything said so far forgotten."""
        self.campaign()
        self.hear(VoteReply, "b", granted=True)
        assert self.raft.role is Role.LEADER

    def lead_and_commit(self) -> None:
        self.lead()
        for peer in ("b", "c"):
            self.acknowledge(peer, self.raft.last_index)
        assert self.raft.commit_index == self.raft.last_index
        self.tick(HEARTBEAT_MS)
        self.messages = []

    def propose(self, body: bytes = b"x") -> int:
        index = self.raft.propose(COMMANDS, body, self.raft.cluster_time_ms(self.now_ms))
        self.pump()
        return index

    def notes(self) -> list[str]:
        return [note.what for ready in self.readies for note in ready.notes]

    def committed(self) -> list[int]:
        return [entry.index for ready in self.readies for entry in ready.committed]


# Terms (raft 5.1)


def test_a_higher_term_makes_a_follower_of_anyone() -> None:
    for prepare in (Rig.stand, Rig.campaign, Rig.lead):
        rig = Rig()
        prepare(rig)
        rig.append(term=9, prev=(0, 0))
        assert (rig.raft.role, rig.raft.term, rig.raft.leader_id) == (Role.FOLLOWER, 9, "b")


@pytest.mark.parametrize(
    ("request_class", "fields", "reply_class"),
    [
        (PreVoteRequest, {"last_index": 9, "last_term": 3}, PreVoteReply),
        (VoteRequest, {"last_index": 9, "last_term": 3, "transfer": True}, VoteReply),
        (AppendEntries, {"prev_index": 0, "prev_term": 0, "commit_index": 0, "sent_ms": 1}, AppendReply),
        (InstallSnapshot, {"snapshot": SnapshotMeta(9, 3, 0, ABC, "s"), "sent_ms": 1}, SnapshotReply),
    ],
)
def test_a_request_of_an_earlier_term_is_refused_with_the_present_one(
    request_class: type[RaftMessage], fields: dict[str, Any], reply_class: type[RaftMessage]
) -> None:
    rig = Rig(hard_state=HardState(5))
    rig.hear(request_class, "b", term=4, **fields)
    (reply,) = rig.said(reply_class)
    assert (reply.to, reply.term) == ("b", 5)
    assert not getattr(reply, "granted", False) and getattr(reply, "match_index", 0) == 0
    assert (rig.raft.term, rig.raft.leader_id, rig.raft.last_index) == (5, None, 0)


def test_a_reply_of_an_earlier_term_is_nothing() -> None:
    rig = Rig()
    rig.campaign()
    rig.hear(VoteReply, "b", term=rig.raft.term - 1, granted=True)
    assert rig.raft.role is Role.CANDIDATE


def test_what_was_not_sent_yet_is_not_sent_in_a_later_term() -> None:
    rig = Rig()
    rig.step(AppendEntries, "b", term=1, prev_index=0, prev_term=0, commit_index=0, sent_ms=0, entries=entries_of(1))
    rig.hear(VoteRequest, "c", term=2, last_index=9, last_term=1, transfer=True)
    assert [type(message) for message in rig.messages] == [VoteReply]


# Elections (raft 5.2; the pre-vote: dissertation 9.6)


def test_a_follower_waits_for_an_election_timeout_and_not_longer_than_two() -> None:
    for seed in range(20):
        rig = Rig(seed=seed)
        rig.tick(ELECTION_MS - 1)
        assert rig.raft.role is Role.FOLLOWER
        rig.tick(ELECTION_MS + 20)
        assert rig.raft.role is Role.PRE_CANDIDATE


def test_followers_time_out_at_different_moments() -> None:
    deadlines = {Rig(seed=seed).raft.next_tick_ms for seed in range(20)}
    assert len(deadlines) > 15


def test_a_leader_that_is_heard_puts_the_election_off() -> None:
    rig = Rig()
    for _ in range(30):
        rig.append(term=1, prev=(0, 0))
        rig.tick(HEARTBEAT_MS)
    assert (rig.raft.role, rig.raft.leader_id) == (Role.FOLLOWER, "b")


def test_a_silent_leader_is_forgotten() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.stand()
    assert rig.raft.leader_id is None


def test_a_pre_vote_changes_neither_term_nor_vote() -> None:
    rig = Rig(terms=(3,))
    rig.stand()
    asked = rig.said(PreVoteRequest)
    assert {message.to for message in asked} == {"b", "c"}
    assert {(message.term, message.last_index, message.last_term) for message in asked} == {(4, 1, 3)}
    assert rig.raft.hard_state == HardState(3, None)
    assert not any(ready.needs_persist for ready in rig.readies)


def test_granting_a_pre_vote_changes_nothing() -> None:
    rig = Rig(hard_state=HardState(3))
    for candidate in "bc":
        rig.hear(PreVoteRequest, candidate, term=4, last_index=0, last_term=0)
    assert [(reply.granted, reply.term) for reply in rig.said(PreVoteReply)] == [(True, 4), (True, 4)]
    assert rig.raft.hard_state == HardState(3, None)


def test_a_pre_vote_for_no_later_term_is_refused() -> None:
    rig = Rig(hard_state=HardState(3))
    rig.hear(PreVoteRequest, "b", term=3, last_index=9, last_term=3)
    assert [(reply.granted, reply.term) for reply in rig.said(PreVoteReply)] == [(False, 3)]


def test_a_majority_of_pre_votes_begins_the_election() -> None:
    rig = Rig()
    rig.stand()
    rig.said(PreVoteRequest)
    rig.hear(PreVoteReply, "b", term=1, granted=True)
    assert rig.raft.hard_state == HardState(1, "a")
    assert {(message.to, message.term, message.transfer) for message in rig.said(VoteRequest)} == {
        ("b", 1, False), ("c", 1, False),
    }


def test_a_pre_vote_granted_for_an_earlier_attempt_does_not_count() -> None:
    rig = Rig()
    rig.campaign()
    rig.hear(VoteReply, "b", granted=False)
    rig.hear(VoteReply, "c", granted=False)
    rig.stand()
    rig.hear(PreVoteReply, "b", term=1, granted=True)
    assert rig.raft.role is Role.PRE_CANDIDATE


def test_a_refused_pre_vote_from_a_later_term_teaches_that_term() -> None:
    rig = Rig()
    rig.stand()
    rig.hear(PreVoteReply, "b", term=7, granted=False)
    assert (rig.raft.role, rig.raft.term) == (Role.FOLLOWER, 7)


def test_a_majority_of_votes_makes_a_leader() -> None:
    rig = Rig()
    rig.campaign()
    rig.hear(VoteReply, "c", granted=True)
    assert (rig.raft.role, rig.raft.leader_id) == (Role.LEADER, "a")


def test_the_vote_for_oneself_counts_once_it_is_durable() -> None:
    """etcd#14370, for votes: nobody leads by a vote that a crash takes back."""
    rig = Rig(configuration=Configuration(("a",)))
    rig.raft.tick(rig.now_ms)
    ready = rig.begin()
    assert ready.hard_state == HardState(1, "a")
    rig.raft.tick(rig.now_ms + 10 * ELECTION_MS)
    assert rig.raft.role is Role.CANDIDATE
    rig.finish(ready)
    assert rig.raft.role is Role.LEADER


def test_a_candidate_that_is_refused_by_a_majority_is_a_follower_again() -> None:
    rig = Rig()
    rig.campaign()
    rig.hear(VoteReply, "b", granted=False)
    assert rig.raft.role is Role.CANDIDATE
    rig.hear(VoteReply, "c", granted=False)
    assert (rig.raft.role, rig.raft.hard_state) == (Role.FOLLOWER, HardState(1, "a"))


def test_a_candidate_that_hears_nothing_begins_anew() -> None:
    rig = Rig()
    rig.campaign()
    rig.tick(2 * ELECTION_MS)
    assert (rig.raft.role, rig.raft.term) == (Role.PRE_CANDIDATE, 1)


def test_a_candidate_follows_the_leader_of_its_term() -> None:
    for prepare in (Rig.stand, Rig.campaign):
        rig = Rig(hard_state=HardState(1))
        prepare(rig)
        rig.append(term=rig.raft.term, prev=(0, 0))
        assert (rig.raft.role, rig.raft.leader_id) == (Role.FOLLOWER, "b")


def test_two_leaders_in_one_term_stop_the_node() -> None:
    rig = Rig()
    rig.lead()
    with pytest.raises(AssertionError, match="two leaders"):
        rig.append(term=rig.raft.term, prev=(0, 0))


def test_votes_that_were_lost_on_the_way_are_asked_again() -> None:
    rig = Rig()
    rig.stand()
    rig.said(PreVoteRequest)
    rig.tick(HEARTBEAT_MS)
    assert {message.to for message in rig.said(PreVoteRequest)} == {"b", "c"}
    rig.hear(PreVoteReply, "b", term=1, granted=True)
    rig.said(VoteRequest)
    rig.tick(HEARTBEAT_MS)
    assert {message.to for message in rig.said(VoteRequest)} == {"b", "c"}


def test_who_refused_a_pre_vote_is_asked_again() -> None:
    """It may have been protecting a leader that it has lost by now."""
    rig = Rig()
    rig.stand()
    for peer in "bc":
        rig.hear(PreVoteReply, peer, granted=False)
    rig.said(PreVoteRequest)
    rig.tick(HEARTBEAT_MS)
    assert {message.to for message in rig.said(PreVoteRequest)} == {"b", "c"}


@pytest.mark.parametrize("outsider", ["x", "learner"])
def test_votes_of_others_than_voters_do_not_count(outsider: str) -> None:
    rig = Rig(configuration=Configuration(("a", "b", "c"), (), ("learner",)))
    rig.campaign()
    rig.hear(VoteReply, outsider, granted=True)
    assert rig.raft.role is Role.CANDIDATE


def test_a_joint_configuration_needs_votes_of_both_halves() -> None:
    """Raft 6."""
    rig = Rig(configuration=Configuration(("d", "e", "a"), ("a", "b", "c")))
    rig.stand()
    for peer in "bcd":
        assert rig.raft.role is Role.PRE_CANDIDATE
        rig.hear(PreVoteReply, peer, term=1, granted=True)
    rig.hear(VoteReply, "b", granted=True)
    rig.hear(VoteReply, "c", granted=True)
    assert rig.raft.role is Role.CANDIDATE
    rig.hear(VoteReply, "e", granted=True)
    assert rig.raft.role is Role.LEADER


# Votes


def ask_vote(rig: Rig, candidate: str, term: int, last: tuple[int, int] = (99, 99), transfer: bool = False) -> bool:
    rig.hear(VoteRequest, candidate, term=term, last_index=last[0], last_term=last[1], transfer=transfer)
    (reply,) = rig.said(VoteReply)
    return reply.granted


def test_one_vote_a_term_first_come_first_served() -> None:
    rig = Rig()
    assert ask_vote(rig, "b", 1)
    assert not ask_vote(rig, "c", 1)
    assert ask_vote(rig, "b", 1)
    assert ask_vote(rig, "c", 2)


def test_a_restarted_node_does_not_vote_twice() -> None:
    rig = Rig()
    assert ask_vote(rig, "b", 1)
    again = Rig(hard_state=rig.raft.hard_state)
    assert again.raft.hard_state == HardState(1, "b")
    assert not ask_vote(again, "c", 1)


def test_a_vote_is_durable_before_it_is_sent() -> None:
    rig = Rig()
    rig.step(VoteRequest, "b", term=1, last_index=0, last_term=0, transfer=False)
    assert rig.raft.take_urgent() == []
    ready = rig.begin()
    assert ready.hard_state == HardState(1, "b")
    assert [type(message) for message in ready.messages] == [VoteReply]


@pytest.mark.parametrize(
    ("last", "granted"), [((2, 3), True), ((3, 3), True), ((1, 4), True), ((1, 3), False), ((9, 2), False)]
)
def test_only_a_log_as_complete_as_the_own_gets_a_vote(last: tuple[int, int], granted: bool) -> None:
    """Raft 5.4.1."""
    rig = Rig(terms=(1, 3))
    assert ask_vote(rig, "b", 5, last) is granted
    assert rig.raft.hard_state == HardState(5, "b" if granted else None)
    rig.hear(PreVoteRequest, "b", term=6, last_index=last[0], last_term=last[1])
    assert [reply.granted for reply in rig.said(PreVoteReply)] == [granted]


def test_a_vote_puts_the_own_election_off_and_a_refusal_does_not() -> None:
    rig = Rig(terms=(2,))
    deadline_ms = rig.raft.next_tick_ms
    rig.now_ms += 100
    assert not ask_vote(rig, "b", 3, (0, 0))
    assert rig.raft.next_tick_ms == deadline_ms
    assert ask_vote(rig, "c", 3)
    assert rig.raft.next_tick_ms != deadline_ms


def test_a_node_that_hears_its_leader_helps_nobody_to_depose_it() -> None:
    """Dissertation 4.2.3: the request is not even allowed to raise the term."""
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.tick(ELECTION_MS - 40)
    rig.hear(VoteRequest, "c", term=5, last_index=9, last_term=9, transfer=False)
    assert (rig.said(VoteReply), rig.raft.term) == ([], 1)
    rig.hear(PreVoteRequest, "c", term=5, last_index=9, last_term=9)
    assert [reply.granted for reply in rig.said(PreVoteReply)] == [False]
    rig.tick(40)
    rig.hear(PreVoteRequest, "c", term=5, last_index=9, last_term=9)
    assert [reply.granted for reply in rig.said(PreVoteReply)] == [True]


def test_a_leader_with_a_majority_behind_it_protects_itself() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.hear(VoteRequest, "c", term=9, last_index=99, last_term=9, transfer=False)
    assert rig.raft.role is Role.LEADER


def test_a_vote_that_the_leader_itself_asked_for_is_given_at_once() -> None:
    """Dissertation 4.2.3 with 3.10."""
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    assert ask_vote(rig, "c", 2, transfer=True)


def test_a_leader_whose_connection_is_refused_is_not_protected() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.raft.peer_disconnected("b", rig.now_ms)
    rig.hear(PreVoteRequest, "c", term=2, last_index=9, last_term=9)
    assert [reply.granted for reply in rig.said(PreVoteReply)] == [False]
    rig.raft.peer_refused("b", rig.now_ms)
    rig.hear(PreVoteRequest, "c", term=2, last_index=9, last_term=9)
    assert [reply.granted for reply in rig.said(PreVoteReply)] == [True]


def test_a_reset_by_the_leader_begins_the_election_within_a_heartbeat() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.raft.peer_disconnected("b", rig.now_ms)
    rig.tick(HEARTBEAT_MS)
    assert rig.raft.role is Role.PRE_CANDIDATE


def test_a_reset_by_anybody_else_begins_nothing() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.raft.peer_disconnected("c", rig.now_ms)
    rig.raft.peer_refused("c", rig.now_ms)
    rig.tick(HEARTBEAT_MS)
    assert (rig.raft.role, rig.raft.leader_id) == (Role.FOLLOWER, "b")


def test_a_node_without_a_majority_on_the_line_does_not_campaign() -> None:
    rig = Rig(connected="")
    rig.tick(3 * ELECTION_MS)
    assert rig.raft.role is Role.FOLLOWER
    assert rig.raft.next_tick_ms is None
    rig.hear(TimeoutNow, "b")
    assert rig.raft.role is Role.FOLLOWER
    rig.raft.peer_connected("c", rig.now_ms)
    rig.tick(20)
    assert rig.raft.role is Role.PRE_CANDIDATE


def test_a_learner_votes_and_never_campaigns() -> None:
    """etcd#10998: it may be a voter already in the configuration of the one who asks."""
    rig = Rig(configuration=Configuration(("b", "c"), (), ("a",)))
    rig.tick(5 * ELECTION_MS)
    assert rig.raft.role is Role.FOLLOWER
    rig.hear(TimeoutNow, "b")
    assert rig.raft.role is Role.FOLLOWER
    assert ask_vote(rig, "b", 3)


def test_a_node_that_has_not_joined_does_nothing() -> None:
    rig = Rig(configuration=Configuration())
    rig.tick(5 * ELECTION_MS)
    assert (rig.raft.role, rig.messages) == (Role.FOLLOWER, [])


# A lone voter


def test_a_lone_voter_leads_at_its_first_tick() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    assert rig.raft.next_tick_ms == rig.now_ms
    rig.raft.tick(rig.now_ms)
    rig.pump()
    assert (rig.raft.role, rig.raft.term, rig.raft.commit_index) == (Role.LEADER, 1, 1)
    assert rig.messages == []
    assert rig.raft.next_tick_ms is None


def test_a_lone_voter_commits_only_what_is_durable() -> None:
    """etcd#14370."""
    rig = Rig(configuration=Configuration(("a",)))
    rig.tick(20)
    index = rig.raft.propose(COMMANDS, b"x", 0)
    ready = rig.begin()
    assert [entry.index for entry in ready.entries] == [index]
    rig.raft.propose(COMMANDS, b"y", 0)
    rig.raft.tick(rig.now_ms + 1)
    assert (ready.committed, rig.raft.commit_index) == ([], index - 1)
    rig.finish(ready)
    assert rig.raft.commit_index == index
    following = rig.begin()
    assert [entry.body for entry in following.entries] == [b"y"]
    assert [entry.body for entry in following.committed] == [b"x"]


def test_what_a_lone_voter_writes_is_stored_as_committed_with_it() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    rig.tick(20)
    rig.raft.propose(COMMANDS, b"x", 0)
    assert rig.begin().commit_index == 2
    rig = Rig()
    rig.lead_and_commit()
    rig.raft.propose(COMMANDS, b"x", 0)
    assert rig.begin().commit_index == 1


def test_a_lone_voter_that_is_about_to_be_one_of_three_does_not_decide_alone() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    rig.tick(20)
    rig.raft.change_configuration(("a", "b", "c"), (), 0)
    rig.raft.propose(COMMANDS, b"x", 0)
    ready = rig.begin()
    assert ready.commit_index == 1
    rig.finish(ready)
    assert rig.raft.commit_index == 1


def test_a_lone_voter_does_not_lose_patience_with_its_disk() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    rig.raft.tick(rig.now_ms)
    ready = rig.begin()
    for _ in range(20):
        rig.now_ms += ELECTION_MS
        rig.raft.tick(rig.now_ms)
    rig.finish(ready)
    rig.pump()
    assert (rig.raft.role, rig.raft.term) == (Role.LEADER, 1)


# Leading (raft 5.3, 5.4.2, 8)


def test_a_term_begins_with_an_empty_entry() -> None:
    """Raft 8: so that what was committed before is known to be."""
    rig = Rig(terms=(1, 1))
    rig.lead()
    (entry,) = [entry for ready in rig.readies for entry in ready.entries]
    assert (entry.index, entry.term, entry.kind, entry.body) == (3, 2, NOOP, b"")
    appends = [message for message in rig.said(AppendEntries) if message.entries]
    assert {(message.to, message.prev_index, message.prev_term) for message in appends} == {("b", 2, 1), ("c", 2, 1)}
    assert not rig.raft.has_committed_in_term
    rig.acknowledge("b", 3)
    assert rig.raft.has_committed_in_term
    assert rig.committed() == [1, 2, 3]


def test_a_leader_beats_once_an_interval() -> None:
    rig = Rig()
    rig.lead_and_commit()
    for _ in range(5):
        rig.tick(HEARTBEAT_MS)
        for peer in "bc":
            rig.acknowledge(peer, 1)
    beats = rig.said(AppendEntries, to="b")
    assert len(beats) == 5
    assert all(not beat.entries and (beat.prev_index, beat.commit_index) == (1, 1) for beat in beats)


def test_an_entry_commits_when_a_majority_holds_it_durably() -> None:
    rig = Rig(configuration=Configuration(("a", "b", "c", "d", "e")))
    rig.stand()
    for peer in "bc":
        rig.hear(PreVoteReply, peer, term=1, granted=True)
    for peer in "bc":
        rig.hear(VoteReply, peer, granted=True)
    rig.acknowledge("b", 1)
    assert rig.raft.commit_index == 0
    rig.acknowledge("d", 1)
    assert rig.raft.commit_index == 1


def test_an_older_term_does_not_commit_by_counting() -> None:
    """Raft 5.4.2, figure 8; logcabin#44."""
    rig = Rig(terms=(1, 2))
    rig.lead()
    rig.acknowledge("b", 2)
    rig.acknowledge("c", 2)
    assert rig.raft.commit_index == 0
    rig.acknowledge("c", 3)
    assert rig.raft.commit_index == 3


def test_followers_learn_what_is_committed() -> None:
    rig = Rig()
    rig.lead_and_commit()
    index = rig.propose()
    rig.acknowledge("b", index)
    rig.propose()
    assert [message.commit_index for message in rig.said(AppendEntries, to="c")] == [1, index]


def test_proposals_that_come_together_travel_together() -> None:
    rig = Rig()
    rig.lead_and_commit()
    for _ in range(10):
        rig.raft.propose(COMMANDS, b"x", 0)
    rig.pump()
    (message,) = rig.said(AppendEntries, to="b")
    assert [entry.index for entry in message.entries] == list(range(2, 12))


def test_appends_run_ahead_of_their_answers_up_to_a_bound() -> None:
    """Dissertation 10.2.1: pipelining."""
    rig = Rig(append_bytes_max=2, in_flight_appends_max=3)
    rig.lead_and_commit()
    for _ in range(10):
        rig.raft.propose(COMMANDS, b"x", 0)
    rig.pump()
    sent = rig.said(AppendEntries, to="b")
    assert [[entry.index for entry in message.entries] for message in sent] == [[2, 3], [4, 5], [6, 7]]
    rig.acknowledge("b", 5)
    assert [message.prev_index for message in rig.said(AppendEntries, to="b")] == [7, 9]


def test_entries_go_only_to_who_is_connected() -> None:
    rig = Rig(connected="b")
    rig.lead_and_commit()
    rig.propose()
    assert rig.said(AppendEntries, to="c") == []
    rig.raft.peer_connected("c", rig.now_ms)
    rig.pump()
    (message,) = rig.said(AppendEntries, to="c")
    assert [entry.index for entry in message.entries] == [2]


def test_what_was_on_a_connection_that_broke_is_sent_again() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.propose()
    rig.propose()
    rig.said(AppendEntries)
    rig.raft.peer_disconnected("b", rig.now_ms)
    rig.raft.peer_connected("b", rig.now_ms)
    rig.pump()
    (message,) = rig.said(AppendEntries, to="b")
    assert [entry.index for entry in message.entries] == [2, 3]


def test_no_message_rests_on_entries_that_are_not_durable_here() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.raft.propose(COMMANDS, b"x", 0)
    ready = rig.begin()
    rig.raft.propose(COMMANDS, b"y", 0)
    sent = [entry.body for message in ready.messages if isinstance(message, AppendEntries) for entry in message.entries]
    assert set(sent) == {b"x"}
    assert rig.raft.take_urgent() == []


def test_heartbeats_do_not_wait_for_the_disk() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.raft.propose(COMMANDS, b"x", 0)
    rig.begin()
    rig.now_ms += HEARTBEAT_MS
    rig.raft.tick(rig.now_ms)
    beats = [message for message in rig.raft.take_urgent() if isinstance(message, AppendEntries)]
    assert {(beat.to, beat.prev_index, beat.entries) for beat in beats} == {("b", 0, ()), ("c", 0, ())}


def test_followers_at_odds_are_found_out_a_term_at_a_time() -> None:
    """Raft 5.3, the optimisation: one question for each term that differs, not for each entry."""
    leader = Rig(terms=[1] * 10 + [5] * 10)
    leader.lead()
    follower = Rig(terms=[1] * 5 + [2] * 50 + [3] * 50, hard_state=HardState(5))
    questions = 0
    while leader.raft.peers()[0].match_index < leader.raft.last_index:
        for message in leader.said(AppendEntries, to="b"):
            questions += 1
            follower.hear(
                AppendEntries, "b", term=message.term, prev_index=message.prev_index, prev_term=message.prev_term,
                commit_index=0, sent_ms=0, entries=message.entries,
            )
        for reply in follower.said(AppendReply):
            fields = ("match_index", "rejected_index", "hint_index", "hint_term", "sent_ms")
            leader.hear(AppendReply, "b", **{name: getattr(reply, name) for name in fields})
        assert questions < 10
    assert questions <= 5
    assert [follower.raft.log.term(index) for index in range(1, 22)] == [1] * 10 + [5] * 10 + [6]


def test_a_follower_that_acknowledges_what_does_not_exist_is_not_believed() -> None:
    rig = Rig()
    rig.lead()
    with pytest.raises(RemoteProtocolError):
        rig.acknowledge("b", 99)
    assert rig.raft.commit_index == 0


def test_only_a_leader_takes_proposals_and_the_others_name_it() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0), sender="c")
    with pytest.raises(NotLeader) as refusal:
        rig.propose()
    assert refusal.value.leader_hint == "c"


def test_a_leader_that_steps_down_calls_the_best_successor() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.propose()
    rig.acknowledge("c", 2)
    rig.raft.step_down("the disk is full")
    rig.pump()
    assert rig.raft.role is Role.FOLLOWER
    assert [message.to for message in rig.said(TimeoutNow)] == ["c"]


# Check-quorum and the lease (dissertation 6.2, 6.4.1)


def test_a_leader_that_no_majority_answers_steps_down() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.tick(LEASE_MS + 20)
    assert (rig.raft.role, rig.raft.leader_id) == (Role.FOLLOWER, None)
    assert "lost_leadership" in rig.notes()


def test_one_answering_follower_of_two_is_enough() -> None:
    rig = Rig()
    rig.lead_and_commit()
    for _ in range(20):
        rig.tick(HEARTBEAT_MS)
        rig.acknowledge("b", 1)
    assert rig.raft.role is Role.LEADER


def test_answers_that_did_not_come_over_tcp_do_not_keep_a_leader() -> None:
    """Datagrams that work where connections do not would suppress elections for ever."""
    rig = Rig()
    rig.lead_and_commit()
    for _ in range(7):
        rig.tick(HEARTBEAT_MS)
        rig.acknowledge("b", 1, over_tcp=False)
    assert rig.raft.role is Role.FOLLOWER


def test_the_lease_runs_from_when_the_answered_message_was_sent() -> None:
    rig = Rig()
    rig.lead()
    assert not rig.raft.has_lease(rig.now_ms)
    sent_ms = rig.now_ms
    rig.tick(200)
    rig.acknowledge("b", 1, sent_ms=sent_ms)
    assert rig.raft.has_lease(rig.now_ms)
    rig.tick(LEASE_MS - 200 - 20)
    assert rig.raft.has_lease(rig.now_ms)
    rig.tick(20)
    assert not rig.raft.has_lease(rig.now_ms)


def test_the_lease_ends_before_anybody_else_can_be_elected() -> None:
    with pytest.raises(AssertionError):
        RaftSettings("a", lease_ms=600, election_timeout_ms=600).validate()


def test_the_lease_is_void_after_a_sleep_and_comes_back_with_an_answer() -> None:
    rig = Rig()
    rig.lead_and_commit()
    sent_ms = rig.now_ms
    rig.acknowledge("b", 1)
    rig.now_ms += LEASE_MS // 2 + 1
    assert not rig.raft.has_lease(rig.now_ms)
    rig.raft.tick(rig.now_ms)
    assert not rig.raft.has_lease(rig.now_ms)
    assert rig.raft.role is Role.LEADER
    rig.acknowledge("b", 1, sent_ms=sent_ms)
    assert not rig.raft.has_lease(rig.now_ms)
    rig.acknowledge("b", 1)
    assert rig.raft.has_lease(rig.now_ms)


def test_a_lone_voter_has_the_lease_always() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    rig.tick(20)
    assert rig.raft.has_lease(rig.now_ms + 10**9)


def test_a_leader_reset_by_a_majority_steps_down_at_once() -> None:
    rig = Rig(connected="bc")
    rig.lead_and_commit()
    rig.raft.peer_disconnected("b", rig.now_ms)
    assert rig.raft.role is Role.LEADER
    rig.raft.peer_disconnected("c", rig.now_ms)
    assert rig.raft.role is Role.FOLLOWER


def test_a_learner_that_goes_away_deposes_nobody() -> None:
    rig = Rig(configuration=Configuration(("a",), (), ("d",)), connected="d")
    rig.tick(20)
    rig.raft.change_configuration(("a", "b", "c"), ("d",), 0)
    rig.pump()
    rig.raft.peer_disconnected("d", rig.now_ms)
    assert rig.raft.role is Role.LEADER


def test_new_voters_have_time_to_answer() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    rig.tick(3 * LEASE_MS)
    rig.raft.change_configuration(("a", "b", "c"), (), 0)
    rig.tick(LEASE_MS - 20)
    assert rig.raft.role is Role.LEADER
    rig.tick(20)
    assert rig.raft.role is Role.FOLLOWER


# Following (raft 5.3)


def test_an_append_that_does_not_connect_is_rejected() -> None:
    for prev in ((3, 2), (2, 9)):
        rig = Rig(terms=(1, 2))
        rig.append(*entries_of(3, first=prev[0] + 1), term=3, prev=prev)
        (reply,) = rig.said(AppendReply)
        assert (reply.rejected_index, reply.match_index) == (prev[0], 0)
        assert rig.raft.last_index == 2


@pytest.mark.parametrize(
    ("have", "prev", "come", "left", "truncate_from"),
    [
        ((1, 1), (2, 1), (2,), (1, 1, 2), None),
        ((1, 1, 2), (1, 1), (3,), (1, 3), 2),
        ((1, 2, 2), (0, 0), (3, 3), (3, 3), 1),
        ((1, 2, 2), (1, 1), (2, 3), (1, 2, 3), 3),
        ((), (0, 0), (1, 2), (1, 2), None),
    ],
)
def test_a_conflict_removes_the_entry_and_what_follows(
    have: tuple[int, ...],
    prev: tuple[int, int],
    come: tuple[int, ...],
    left: tuple[int, ...],
    truncate_from: int | None,
) -> None:
    rig = Rig(terms=have)
    rig.append(*entries_of(*come, first=prev[0] + 1), term=3, prev=prev)
    assert [rig.raft.log.term(index) for index in range(1, rig.raft.last_index + 1)] == list(left)
    assert [ready.truncate_from for ready in rig.readies if ready.entries] == [truncate_from]
    assert [reply.match_index for reply in rig.said(AppendReply)] == [prev[0] + len(come)]


def test_an_append_that_comes_late_removes_nothing() -> None:
    """Raft 5.3: the entries behind it may have been acknowledged already."""
    rig = Rig()
    for _ in range(2):
        rig.append(*entries_of(1, 1, 1), term=1, prev=(0, 0))
        rig.append(*entries_of(1), term=1, prev=(0, 0))
    assert rig.raft.last_index == 3
    assert [reply.match_index for reply in rig.said(AppendReply)] == [3, 1, 3, 1]


def test_a_follower_commits_no_further_than_it_agrees_with_the_leader() -> None:
    """Raft 5.3: the minimum of the leader's commit index and the last entry that the message speaks of."""
    rig = Rig(terms=(1, 1, 1))
    rig.append(term=2, prev=(1, 1), commit=3)
    assert rig.raft.commit_index == 1
    rig.append(*entries_of(2, first=2), term=2, prev=(1, 1), commit=9)
    assert (rig.raft.commit_index, rig.committed()) == (2, [1, 2])


def test_cutting_off_a_committed_entry_stops_the_node() -> None:
    rig = Rig(terms=(1, 1), commit_index=2)
    with pytest.raises(AssertionError, match="committed"):
        rig.append(*entries_of(3, first=2), term=3, prev=(1, 1))
    assert rig.raft.last_index == 2


def test_entries_are_acknowledged_when_they_are_durable() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.said(AppendReply)
    rig.step(AppendEntries, "b", prev_index=0, prev_term=0, commit_index=0, sent_ms=5, entries=tuple(entries_of(1)))
    assert rig.raft.take_urgent() == []
    ready = rig.begin()
    assert ready.needs_persist
    (reply,) = ready.messages
    assert isinstance(reply, AppendReply) and (reply.match_index, reply.sent_ms) == (1, 5)


def test_a_slow_disk_does_not_look_like_a_dead_node() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.step(AppendEntries, "b", prev_index=0, prev_term=0, commit_index=0, sent_ms=5, entries=tuple(entries_of(1)))
    ready = rig.begin()
    rig.step(AppendEntries, "b", prev_index=1, prev_term=1, commit_index=0, sent_ms=7)
    (answer,) = rig.raft.take_urgent()
    assert isinstance(answer, AppendReply)
    assert (answer.match_index, answer.rejected_index, answer.sent_ms) == (0, None, 7)
    rig.finish(ready)
    rig.step(AppendEntries, "b", prev_index=1, prev_term=1, commit_index=0, sent_ms=9)
    (answer,) = rig.raft.take_urgent()
    assert isinstance(answer, AppendReply) and answer.match_index == 1


def test_entries_cut_off_while_they_were_being_written_do_not_count_as_durable() -> None:
    rig = Rig()
    come = {"prev_term": 0, "prev_index": 0, "commit_index": 0, "sent_ms": 0}
    rig.step(AppendEntries, "b", **{**come, "term": 1, "entries": tuple(entries_of(1, 1, 1))})
    written = rig.begin()
    come |= {"prev_index": 1, "prev_term": 1}
    rig.step(AppendEntries, "c", **{**come, "term": 2, "entries": tuple(entries_of(2, first=2))})
    rig.finish(written)
    come |= {"prev_index": 2, "prev_term": 2}
    rig.step(AppendEntries, "c", **come)
    following = rig.begin()
    assert (following.truncate_from, [entry.term for entry in following.entries]) == (2, [2])
    assert [message.match_index for message in following.messages if isinstance(message, AppendReply)] == [2, 1]
    rig.finish(following)
    rig.messages = []
    rig.hear(AppendEntries, "c", **come)
    assert [reply.match_index for reply in rig.said(AppendReply)] == [2]


def test_entries_cut_off_after_they_were_written_do_not_count_as_durable() -> None:
    rig = Rig(terms=(1, 1, 1))
    rig.append(term=2, prev=(1, 1))
    rig.said(AppendReply)
    come = {"prev_index": 1, "prev_term": 1, "commit_index": 0, "sent_ms": 0}
    rig.step(AppendEntries, "b", **come, entries=tuple(entries_of(2, first=2)))
    rig.step(AppendEntries, "b", **{**come, "prev_index": 2, "prev_term": 2})
    (answer,) = rig.raft.take_urgent()
    assert isinstance(answer, AppendReply) and answer.match_index == 1


def test_what_never_went_to_the_disk_is_not_cut_off_there() -> None:
    rig = Rig(terms=(1,))
    come = {"prev_index": 1, "prev_term": 1, "commit_index": 0, "sent_ms": 0}
    rig.step(AppendEntries, "b", **come, entries=tuple(entries_of(1, first=2)))
    rig.step(AppendEntries, "c", **come, term=2, entries=tuple(entries_of(2, first=2)))
    ready = rig.begin()
    assert (ready.truncate_from, [entry.term for entry in ready.entries]) == (None, [2])


def test_two_cuts_before_the_disk_is_free_are_one() -> None:
    rig = Rig(terms=(1, 1, 1, 1))
    for term, prev_index in ((2, 3), (3, 1)):
        come = {"prev_index": prev_index, "prev_term": 1, "commit_index": 0, "sent_ms": 0}
        rig.step(AppendEntries, "b", **come, term=term, entries=tuple(entries_of(term, first=prev_index + 1)))
    ready = rig.begin()
    assert (ready.truncate_from, [(entry.index, entry.term) for entry in ready.entries]) == (2, [(2, 3)])


def test_only_one_ready_is_out_at_a_time() -> None:
    rig = Rig(configuration=Configuration(("a",)))
    rig.raft.tick(rig.now_ms)
    ready = rig.begin()
    rig.raft.tick(rig.now_ms + 1)
    assert not rig.raft.has_ready()
    with pytest.raises(AssertionError):
        rig.raft.ready()
    rig.finish(ready)
    with pytest.raises(AssertionError):
        rig.raft.advance(ready)


def test_time_in_the_log_never_goes_back() -> None:
    log = Log(entries=[Entry(1, 1, 5000, COMMANDS, b"")])
    rig = Rig(log=log, configuration=Configuration(("a",)))
    assert rig.raft.cluster_time_ms(rig.now_ms + 30) == 5030
    rig.tick(40)
    rig.raft.propose(COMMANDS, b"", 17)
    rig.raft.propose(COMMANDS, b"", rig.raft.cluster_time_ms(rig.now_ms + 100))
    assert [entry.at_ms for entry in log.entries_in_memory(2, 4)] == [5020, 5020, 5140]


def test_a_new_leader_goes_on_from_the_time_of_the_old_one() -> None:
    rig = Rig()
    rig.append(Entry(1, 1, 777_000, COMMANDS, b""), term=1, prev=(0, 0))
    start_ms = rig.now_ms
    rig.lead()
    assert rig.raft.log.last_at_ms == 777_000 + rig.now_ms - start_ms


# Released entries, compaction and snapshots (raft 7)


def log_from_disk(*terms: int, released: int) -> Log:
    log = Log(entries=entries_of(*terms))
    log.release_through(released)
    return log


def test_released_entries_are_asked_back_for_a_follower_that_needs_them() -> None:
    rig = Rig(log=log_from_disk(1, 1, 1, 1, released=4), commit_index=4, load_entries_max=3)
    rig.lead()
    rig.hear(AppendReply, "b", match_index=0, rejected_index=4, hint_index=0, hint_term=0, sent_ms=0)
    assert [ready.load_entries for ready in rig.readies if ready.load_entries] == [(1, 3)]
    rig.said(AppendEntries)
    rig.raft.entries_loaded(entries_of(1, 1))
    rig.pump()
    (message,) = rig.said(AppendEntries, to="b")
    assert [entry.index for entry in message.entries] == [1, 2]
    rig.acknowledge("b", 2)
    assert [ready.load_entries for ready in rig.readies if ready.load_entries] == [(1, 3), (3, 4)]
    rig.raft.entries_loaded(entries_of(1, 1, first=3))
    rig.pump()
    sent = rig.said(AppendEntries, to="b")
    assert [[entry.index for entry in message.entries] for message in sent] == [[3, 4], [5]]


def test_a_follower_that_waits_for_the_disk_still_gets_heartbeats() -> None:
    rig = Rig(log=log_from_disk(1, 1, released=2), commit_index=2)
    rig.lead()
    rig.hear(AppendReply, "b", match_index=0, rejected_index=2, hint_index=0, hint_term=0, sent_ms=0)
    rig.said(AppendEntries)
    rig.tick(HEARTBEAT_MS)
    assert len(rig.said(AppendEntries, to="b")) == 1


def test_only_what_is_applied_and_durable_is_released_or_compacted() -> None:
    rig = Rig()
    rig.append(*entries_of(1, 1), term=1, prev=(0, 0), commit=1)
    rig.raft.release_through(1)
    for forget in (rig.raft.release_through, rig.raft.compact_through):
        with pytest.raises(AssertionError):
            forget(2)


def snapshot_of(index: int, term: int, configuration: Configuration = ABC) -> SnapshotMeta:
    return SnapshotMeta(index, term, 0, configuration, f"s{index}")


def leader_with_compacted_log() -> Rig:
    rig = Rig(terms=(1, 1, 1), commit_index=3)
    rig.raft.compact_through(3)
    rig.lead()
    rig.acknowledge("c", 4)
    rig.hear(AppendReply, "b", match_index=0, rejected_index=3, hint_index=1, hint_term=1, sent_ms=0)
    return rig


def test_a_follower_behind_the_log_gets_a_snapshot() -> None:
    rig = leader_with_compacted_log()
    assert [ready.snapshots_wanted for ready in rig.readies if ready.snapshots_wanted] == [("b",)]
    rig.said(AppendEntries)
    rig.raft.snapshot_taken("b", snapshot_of(4, 2))
    rig.pump()
    (message,) = rig.said(InstallSnapshot)
    assert (message.to, message.snapshot.index) == ("b", 4)
    rig.propose()
    assert rig.said(AppendEntries, to="b") == []
    rig.hear(SnapshotReply, "b", match_index=4, sent_ms=rig.now_ms)
    (message_after,) = rig.said(AppendEntries, to="b")
    assert [entry.index for entry in message_after.entries] == [5]


def test_a_follower_that_waits_for_a_snapshot_gets_heartbeats_that_stand_on_nothing() -> None:
    rig = leader_with_compacted_log()
    rig.said(AppendEntries)
    rig.tick(HEARTBEAT_MS)
    (beat,) = rig.said(AppendEntries, to="b")
    assert (beat.prev_index, beat.entries) == (0, ())


def test_a_snapshot_that_failed_is_wanted_again() -> None:
    rig = leader_with_compacted_log()
    rig.readies = []
    rig.raft.snapshot_failed("b")
    rig.pump()
    rig.hear(AppendReply, "b", match_index=0, rejected_index=3, hint_index=1, hint_term=1, sent_ms=0)
    assert [ready.snapshots_wanted for ready in rig.readies if ready.snapshots_wanted] == [("b",)]


def test_a_snapshot_replaces_a_log_that_it_goes_beyond() -> None:
    rig = Rig(terms=(1, 1))
    following = Configuration(("b", "c"), (), ("a",))
    rig.hear(InstallSnapshot, "b", term=3, snapshot=snapshot_of(9, 2, following), sent_ms=3)
    (ready,) = [ready for ready in rig.readies if ready.snapshot]
    assert (ready.snapshot and ready.snapshot.index, ready.truncate_from, ready.entries) == (9, None, [])
    assert (rig.raft.commit_index, rig.raft.applied_index, rig.raft.last_index, rig.raft.log.base_index) == (9, 9, 9, 9)
    assert rig.raft.configuration == following
    assert rig.committed() == []
    assert [(reply.match_index, reply.sent_ms) for reply in rig.said(SnapshotReply)] == [(9, 3)]
    rig.append(*entries_of(3, first=10), term=3, prev=(9, 2))
    assert [reply.match_index for reply in rig.said(AppendReply)] == [10]


def test_a_snapshot_of_what_is_committed_already_changes_nothing() -> None:
    rig = Rig(terms=(1, 1, 1), commit_index=2)
    rig.hear(InstallSnapshot, "b", snapshot=snapshot_of(2, 1), sent_ms=3)
    assert not any(ready.snapshot for ready in rig.readies)
    assert rig.raft.last_index == 3
    assert [reply.match_index for reply in rig.said(SnapshotReply)] == [2]


def test_a_snapshot_of_a_prefix_commits_it_and_keeps_the_rest() -> None:
    """Raft 7: entries behind the snapshot stay."""
    rig = Rig(terms=(1, 1, 1))
    rig.hear(InstallSnapshot, "b", snapshot=snapshot_of(2, 1), sent_ms=3)
    assert not any(ready.snapshot for ready in rig.readies)
    assert (rig.raft.commit_index, rig.raft.last_index, rig.committed()) == (2, 3, [1, 2])


def test_a_snapshot_that_is_not_durable_is_not_acknowledged() -> None:
    rig = Rig(terms=(1, 1))
    rig.append(term=1, prev=(2, 1))
    rig.said(AppendReply)
    rig.step(InstallSnapshot, "b", snapshot=snapshot_of(9, 1), sent_ms=3)
    rig.step(AppendEntries, "b", prev_index=0, prev_term=0, commit_index=0, sent_ms=4)
    (answer,) = rig.raft.take_urgent()
    assert isinstance(answer, AppendReply) and answer.match_index == 0
    assert [type(message) for message in rig.begin().messages] == [SnapshotReply]


def test_entries_that_were_being_written_when_a_snapshot_came_do_not_count_as_durable() -> None:
    rig = Rig()
    rig.append(term=2, prev=(0, 0))
    rig.said(AppendReply)
    come = {"prev_index": 0, "prev_term": 0, "commit_index": 0, "sent_ms": 0}
    rig.step(AppendEntries, "b", **come, entries=tuple(entries_of(1, 1, 1)))
    written = rig.begin()
    rig.step(InstallSnapshot, "b", snapshot=snapshot_of(9, 2), sent_ms=3)
    rig.finish(written)
    rig.step(AppendEntries, "b", **come)
    (answer,) = rig.raft.take_urgent()
    assert isinstance(answer, AppendReply) and answer.match_index == 0


def test_a_snapshot_makes_an_earlier_cut_needless() -> None:
    rig = Rig(terms=(1, 1))
    come = {"prev_index": 1, "prev_term": 1, "commit_index": 0, "sent_ms": 0}
    rig.step(AppendEntries, "b", **come, term=2, entries=tuple(entries_of(2, first=2)))
    rig.step(InstallSnapshot, "b", snapshot=snapshot_of(9, 2), sent_ms=3)
    ready = rig.begin()
    assert (ready.snapshot, ready.truncate_from, ready.entries) == (snapshot_of(9, 2), None, [])


def test_time_goes_on_from_a_snapshot() -> None:
    rig = Rig()
    rig.hear(InstallSnapshot, "b", term=3, snapshot=SnapshotMeta(9, 2, 5000, ABC, "s"), sent_ms=3)
    assert rig.raft.cluster_time_ms(rig.now_ms + 30) == 5030


def test_a_snapshot_that_turns_out_too_old_is_followed_by_another() -> None:
    rig = leader_with_compacted_log()
    rig.hear(SnapshotReply, "b", match_index=1, sent_ms=rig.now_ms)
    rig.readies = []
    rig.hear(AppendReply, "b", match_index=0, rejected_index=3, hint_index=1, hint_term=1, sent_ms=0)
    assert [ready.snapshots_wanted for ready in rig.readies if ready.snapshots_wanted] == [("b",)]


# Transfer of leadership (dissertation 3.10)


def test_the_successor_is_called_when_it_has_the_whole_log() -> None:
    rig = Rig()
    rig.lead_and_commit()
    index = rig.propose()
    rig.raft.transfer_leadership("b")
    rig.pump()
    assert rig.said(TimeoutNow) == []
    rig.acknowledge("b", index)
    assert [message.to for message in rig.said(TimeoutNow)] == ["b"]


def test_a_leader_on_its_way_out_takes_nothing_and_has_no_lease() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.acknowledge("b", 1)
    rig.raft.transfer_leadership("b")
    assert not rig.raft.has_lease(rig.now_ms)
    with pytest.raises(NotLeader) as refusal:
        rig.propose()
    assert refusal.value.leader_hint == "b"


def test_a_transfer_that_leads_to_nothing_is_given_up() -> None:
    rig = Rig()
    rig.lead_and_commit()
    rig.raft.transfer_leadership("b")
    for _ in range(ELECTION_MS // HEARTBEAT_MS + 1):
        rig.tick(HEARTBEAT_MS)
        rig.acknowledge("c", 1)
    assert rig.raft.role is Role.LEADER
    assert "transfer_failed" in rig.notes()
    rig.propose()


def test_who_is_called_campaigns_at_once_and_says_why() -> None:
    rig = Rig()
    rig.append(term=1, prev=(0, 0))
    rig.hear(TimeoutNow, "b")
    assert rig.raft.role is Role.CANDIDATE
    assert [message.transfer for message in rig.said(VoteRequest)] == [True, True]


# Changes of the configuration (raft 6)


def test_a_change_of_voters_goes_through_both_halves() -> None:
    rig = Rig()
    rig.lead_and_commit()
    index = rig.raft.change_configuration(("a", "d", "e"), (), 0)
    rig.pump()
    joint = Configuration(("a", "d", "e"), ("a", "b", "c"))
    assert rig.raft.configuration == joint
    for peer in "bc":
        rig.acknowledge(peer, index)
    assert rig.raft.commit_index == index - 1
    rig.acknowledge("d", index)
    assert rig.raft.commit_index == index
    assert rig.raft.configuration == Configuration(("a", "d", "e"))
    assert rig.raft.committed_configuration == joint
    rig.acknowledge("b", index + 1)
    rig.acknowledge("c", index + 1)
    assert rig.raft.committed_configuration == joint
    rig.acknowledge("e", index + 1)
    assert rig.raft.committed_configuration == Configuration(("a", "d", "e"))
    assert {peer.node_id for peer in rig.raft.peers()} == {"d", "e"}


def test_a_change_of_learners_alone_is_one_step() -> None:
    rig = Rig()
    rig.lead_and_commit()
    index = rig.raft.change_configuration(("a", "b", "c"), ("d",), 0)
    rig.pump()
    assert rig.raft.configuration == Configuration(("a", "b", "c"), (), ("d",))
    assert rig.said(AppendEntries, to="d")
    rig.acknowledge("b", index)
    assert (rig.raft.commit_index, rig.raft.last_index) == (index, index)


def test_a_learner_gets_the_log_and_does_not_count() -> None:
    rig = Rig(configuration=Configuration(("a", "b", "c"), (), ("d",)))
    rig.lead()
    assert rig.said(AppendEntries, to="d")
    rig.acknowledge("d", 1)
    assert rig.raft.commit_index == 0


def test_one_change_at_a_time() -> None:
    rig = Rig()
    rig.lead_and_commit()
    assert rig.raft.can_change_configuration
    index = rig.raft.change_configuration(("a", "b", "d"), (), 0)
    rig.pump()
    for _ in range(2):
        assert not rig.raft.can_change_configuration
        with pytest.raises(AssertionError):
            rig.raft.change_configuration(("a", "b", "c"), (), 0)
        rig.acknowledge("b", index)
        rig.acknowledge("d", index)
        index += 1
    assert rig.raft.can_change_configuration


def test_no_change_before_a_commit_in_the_own_term() -> None:
    """Ongaro on raft-dev, July 2015: otherwise two changes of two leaders may both go through."""
    rig = Rig()
    rig.lead()
    assert not rig.raft.can_change_configuration
    rig.acknowledge("b", 1)
    assert rig.raft.can_change_configuration


def test_a_configuration_is_never_proposed_as_an_ordinary_entry() -> None:
    rig = Rig()
    rig.lead_and_commit()
    with pytest.raises(AssertionError):
        rig.raft.propose(CONFIG, b"", 0)


def test_a_leader_outside_the_new_voters_leads_to_the_end_and_then_leaves() -> None:
    rig = Rig()
    rig.lead_and_commit()
    index = rig.raft.change_configuration(("b", "c", "d"), (), 0)
    rig.pump()
    for peer in "bd":
        rig.acknowledge(peer, index)
    assert (rig.raft.role, rig.raft.configuration) == (Role.LEADER, Configuration(("b", "c", "d")))
    rig.acknowledge("b", index + 1)
    assert rig.raft.role is Role.LEADER  # it does not count itself any more
    rig.acknowledge("d", index + 1)
    assert rig.raft.role is Role.FOLLOWER
    assert len(rig.said(TimeoutNow)) == 1
    rig.tick(5 * ELECTION_MS)
    assert rig.raft.role is Role.FOLLOWER


def config_entry(index: int, term: int, configuration: Configuration) -> Entry:
    return Entry(index, term, 0, CONFIG, encode_configuration(configuration))


def test_a_configuration_is_in_force_from_the_moment_it_is_in_the_log() -> None:
    rig = Rig()
    joint = Configuration(("a", "d", "e"), ("a", "b", "c"))
    rig.append(config_entry(1, 1, joint), term=1, prev=(0, 0))
    assert (rig.raft.configuration, rig.raft.committed_configuration) == (joint, ABC)


def test_a_configuration_goes_with_its_entry_when_that_is_cut_off() -> None:
    rig = Rig()
    rig.append(config_entry(1, 1, Configuration(("a", "d", "e"), ("a", "b", "c"))), term=1, prev=(0, 0))
    rig.append(*entries_of(2), term=2, prev=(0, 0), sender="c")
    assert rig.raft.configuration == ABC


def test_a_restarted_node_finds_the_change_that_was_under_way() -> None:
    joint = Configuration(("a", "d", "e"), ("a", "b", "c"))
    log = Log(entries=[*entries_of(1), config_entry(2, 1, joint)])
    rig = Rig(log=log, commit_index=1)
    assert (rig.raft.configuration, rig.raft.committed_configuration) == (joint, ABC)


def test_a_new_leader_finishes_the_change_of_the_old_one() -> None:
    joint = Configuration(("a", "b", "d"), ("a", "b", "c"))
    rig = Rig(log=Log(entries=[config_entry(1, 1, joint)]))
    rig.stand()
    rig.hear(PreVoteReply, "b", term=2, granted=True)
    rig.hear(VoteReply, "b", granted=True)
    rig.acknowledge("b", 2)
    assert rig.raft.configuration == Configuration(("a", "b", "d"))


def test_a_voter_that_is_being_removed_campaigns_until_the_change_is_committed() -> None:
    """Dissertation 4.2.2: its log may be the only one that wins. A simulation hung without this."""
    leaving = Configuration(("b", "c", "d"))
    rig = Rig(log=Log(entries=[config_entry(1, 1, leaving)]))
    rig.stand()
    rig.append(term=2, prev=(1, 1), commit=1)
    rig.tick(5 * ELECTION_MS)
    assert rig.raft.role is Role.FOLLOWER


# Generations


def test_messages_of_another_generation_are_not_heard() -> None:
    for generation in (4, 6):
        rig = Rig(generation=5)
        rig.hear(VoteRequest, "b", generation=generation, term=9, last_index=9, last_term=9, transfer=True)
        assert (rig.messages, rig.raft.term) == ([], 0)


def test_a_higher_generation_is_reported_once() -> None:
    rig = Rig(generation=5)
    for generation in (4, 6, 6, 7):
        rig.hear(VoteRequest, "b", generation=generation, term=9, last_index=9, last_term=9, transfer=True)
    notes = [note for ready in rig.readies for note in ready.notes]
    assert [(note.what, note.facts["by"], note.facts["sender"]) for note in notes] == [
        ("generation_superseded", 6, "b"), ("generation_superseded", 7, "b"),
    ]


def test_messages_carry_the_generation() -> None:
    rig = Rig(generation=5)
    rig.stand()
    assert {message.generation for message in rig.said(PreVoteRequest)} == {5}


def test_a_message_for_another_node_is_not_heard() -> None:
    rig = Rig()
    rig.campaign()
    rig.hear(VoteReply, "b", to="c", granted=True)
    assert rig.raft.role is Role.CANDIDATE


# Settings and status


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_interval_ms": 0}, {"lease_ms": 299}, {"lease_ms": 700}, {"append_bytes_max": 0},
        {"in_flight_appends_max": 0}, {"load_entries_max": 0}, {"generation": -1}, {"node_id": ""},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    RaftSettings("a").validate()
    with pytest.raises(AssertionError):
        RaftSettings(**{"node_id": "a", **wrong}).validate()


def test_the_leader_knows_where_everybody_stands() -> None:
    rig = Rig(connected="bd")
    rig.lead_and_commit()
    status = {peer.node_id: peer for peer in rig.raft.peers()}
    assert (status["b"].match_index, status["b"].mode, status["b"].is_connected) == (1, Mode.STREAM, True)
    assert not status["c"].is_connected
    assert Rig().raft.peers() == []


def test_notes_tell_the_story() -> None:
    rig = Rig()
    rig.lead_and_commit()
    assert rig.notes() == ["pre_campaign", "campaign", "leader", "became_leader"]


# On the wire

COMMON = {"generation": 3, "term": 4, "sender": "a", "to": "b"}
MESSAGES: list[RaftMessage] = [
    PreVoteRequest(**COMMON, last_index=5, last_term=3),
    PreVoteReply(**COMMON, granted=True),
    VoteRequest(**COMMON, last_index=5, last_term=3, transfer=True),
    VoteReply(**COMMON, granted=False),
    AppendEntries(
        **COMMON, prev_index=5, prev_term=3, commit_index=4, sent_ms=77,
        entries=(
            Entry(6, 3, 10, COMMANDS, b"body"),
            Entry(7, 4, 11, NOOP, b""),
            Entry(8, 4, 11, CONFIG, encode_configuration(ABC)),
        ),
    ),
    AppendReply(**COMMON, match_index=5, sent_ms=77),
    AppendReply(**COMMON, match_index=0, sent_ms=77, rejected_index=5, hint_index=2, hint_term=1),
    InstallSnapshot(**COMMON, snapshot=snapshot_of(9, 2), sent_ms=77),
    SnapshotReply(**COMMON, match_index=9, sent_ms=77),
    TimeoutNow(**COMMON),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: RaftMessage) -> None:
    payload = codec.encode_bytes(to_message(message))
    assert from_message(codec.decode(payload), over_tcp=False) == message
    assert from_message(codec.decode(payload), over_tcp=True).over_tcp


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_with_any_field_wrong_is_refused(message: RaftMessage) -> None:
    good = to_message(message)
    for name, value in good.fields.items():
        for wrong in (-1, 2**63, 1.5, "", "x" * 201, [1], {}, [["a"]], None, True):
            if isinstance(wrong, bool) and isinstance(value, bool) or (name == "rejected_index" and wrong is None):
                continue
            with pytest.raises(RemoteProtocolError):
                from_message(good._replace(fields={**good.fields, name: wrong}), over_tcp=True)
        with pytest.raises(RemoteProtocolError):
            less = {key: good.fields[key] for key in good.fields if key != name}
            from_message(good._replace(fields=less), over_tcp=True)
    with pytest.raises(RemoteProtocolError):
        from_message(good._replace(fields={**good.fields, "more": 1}), over_tcp=True)
    with pytest.raises(RemoteProtocolError):
        from_message(good._replace(blobs=(*good.blobs, b"x")), over_tcp=True)
    with pytest.raises(RemoteProtocolError):
        from_message(good._replace(kind="raft_unheard_of"), over_tcp=True)


@pytest.mark.parametrize(
    ("rows", "bodies"),
    [
        ([[2, 0, 1]], [b"x"]),
        ([[3, 5, 1], [3, 4, 1]], [b"x", b"y"]),
        ([[4, 0, 1], [3, 0, 1]], [b"x", b"y"]),
        ([[5, 0, 1]], [b"x"]),
        ([[3, 0, 9]], [b"x"]),
        ([[3, 0, 2]], [b"no configuration"]),
        ([[3, 0, 1]], []),
    ],
    ids=["term goes back", "time goes back", "terms go back", "term of the future", "kind", "configuration", "bodies"],
)
def test_entries_that_no_leader_has_are_refused(rows: list[list[int]], bodies: list[bytes]) -> None:
    fields = {**COMMON, "prev_index": 5, "prev_term": 3, "commit_index": 4, "sent_ms": 77, "entries": rows}
    with pytest.raises(RemoteProtocolError):
        from_message(codec.Message("raft_append", fields, tuple(bodies)), over_tcp=True)


def test_a_configuration_comes_out_as_it_went_in() -> None:
    joint = Configuration(("a", "b"), ("b",), ("c",))
    assert decode_configuration(encode_configuration(joint)) == joint


@pytest.mark.parametrize(
    "fields",
    [
        {"voters": [], "voters_old": [], "learners": []},
        {"voters": ["a"], "voters_old": [], "learners": ["a"]},
        {"voters": ["a", "a"], "voters_old": [], "learners": []},
        {"voters": ["a"], "voters_old": []},
        {"voters": "a", "voters_old": [], "learners": []},
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_configuration(codec.encode_bytes(codec.Message("configuration", fields)))
    with pytest.raises(RemoteProtocolError):
        decode_configuration(codec.encode_bytes(codec.Message("another", fields)))
