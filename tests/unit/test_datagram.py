"""Which datagrams count, which do not and why, and what is said about those."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.core import codec
from p2pcluster.core import datagram as module
from p2pcluster.core.codec import Message
from p2pcluster.core.datagram import (
    Ballot,
    Beacon,
    Gate,
    Heard,
    Outgoing,
    Reason,
    Refused,
    State,
    ballots,
    short_name,
)
from p2pcluster.core.handshake import derive_key
from p2pcluster.core.messages import AppendEntries, PreVoteReply, PreVoteRequest, VoteReply, VoteRequest
from p2pcluster.errors import LocalProtocolError

KEY = derive_key(b"a key")
OTHER_KEY = derive_key(b"another key")
ATTACKER = Address("10.6.6.6", 666)


def beacon(**changes: Any) -> Beacon:
    return dataclasses.replace(
        Beacon(
            name="host", state=State.FRESH, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None,
            last_index=0, last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1,
            tcp_host=None, tcp_port=47400, udp_port=50001, interval_ms=333, package="0.1.0", python="3.11.7",
        ),
        **changes,
    )


class Program:
    """A gate, the address of its socket, and what it says about itself."""

    def __init__(self, node_id: str, boot_id: str = "", key: bytes | None = KEY, **changes: Any) -> None:
        number = sum(map(ord, node_id + boot_id)) % 250
        known: dict[str, Any] = {"cluster": "default", "protocol": 1} | changes
        boot_id = boot_id or f"boot-{node_id}"
        self.gate = Gate(key, node_id=node_id, boot_id=boot_id, secret=bytes([number]) * 32, **known)
        self.address = Address(f"10.0.0.{number}", 50000 + number)
        self.beacon = beacon(name=node_id)
        self.now_ms = 0

    def say(self, **changes: Any) -> bytes:
        return self.gate.seal(dataclasses.replace(self.beacon, **changes), broadcast=True)

    def open(self, data: bytes, sender: Program | Address) -> Heard | Refused:
        address = sender if isinstance(sender, Address) else sender.address
        return self.gate.open(data, address, self.beacon, self.now_ms)

    def refuses(self, data: bytes, sender: Program | Address) -> Reason:
        result = self.open(data, sender)
        assert isinstance(result, Refused), result
        return result.reason

    def hears(self, data: bytes, sender: Program | Address) -> Any:
        result = self.open(data, sender)
        assert isinstance(result, Heard), result
        return result.body


def deliver(receiver: Program, sender: Program, answers: tuple[Outgoing, ...]) -> None:
    """Hands over what goes to the receiver, and the answers to that, until nobody has anything to say."""
    for data, address in answers:
        if address in (None, receiver.address):
            deliver(sender, receiver, receiver.open(data, sender).answers)


def meet(one: Program, other: Program) -> None:
    """What happens when the two hear each other's beacons."""
    for speaker, listener in ((one, other), (other, one)):
        listener.now_ms += 2 * module.RETRY_MS
        deliver(speaker, listener, listener.open(speaker.say(), speaker).answers)


@pytest.fixture
def pair() -> tuple[Program, Program]:
    one, other = Program("n1"), Program("n2")
    meet(one, other)
    return one, other


# --- What counts


def test_a_beacon_arrives_as_it_was_said(pair: tuple[Program, Program]) -> None:
    one, other = pair
    said = beacon(
        name="lab-3", state=State.MEMBER, cluster_id="c1", generation=2, term=7, leader_id="n9",
        leader_address=Address("10.0.0.9", 47401), last_index=2**40, last_term=6, commit_index=99, role="voter",
        voters=3, members=4, has_work=True, expect=5, tcp_host="lab.example", tcp_port=1, udp_port=65535,
        interval_ms=7500,
    )  # fmt: skip
    heard = other.open(one.gate.seal(said, broadcast=True), one)
    assert isinstance(heard, Heard)
    assert heard.body == said
    assert (heard.node_id, heard.boot_id, heard.is_broadcast, heard.address) == ("n1", "boot-n1", True, one.address)


def test_what_was_sealed_for_one_address_is_no_broadcast(pair: tuple[Program, Program]) -> None:
    one, other = pair
    heard = other.open(one.gate.seal(one.beacon), one)
    assert isinstance(heard, Heard) and not heard.is_broadcast


def test_numbers_rise_with_each_datagram(pair: tuple[Program, Program]) -> None:
    one, other = pair
    first, second = other.open(one.say(), one), other.open(one.say(), one)
    assert isinstance(first, Heard) and isinstance(second, Heard)
    assert second.counter == first.counter + 1


VOTES = [
    PreVoteRequest(generation=1, term=5, sender="n1", to="n2", last_index=8, last_term=4),
    PreVoteReply(generation=1, term=5, sender="n1", to="n2", granted=True),
    VoteRequest(generation=1, term=5, sender="n1", to="n2", last_index=8, last_term=4, transfer=False),
    VoteReply(generation=1, term=5, sender="n1", to="n2", granted=False),
]


@pytest.mark.parametrize("vote", VOTES, ids=lambda vote: type(vote).__name__)
def test_a_vote_arrives_as_it_was_cast(pair: tuple[Program, Program], vote: Any) -> None:
    one, other = pair
    (ballot,) = ballots([vote])
    assert other.hears(one.gate.seal(ballot, broadcast=True), one) == vote


def test_votes_that_differ_in_their_target_only_are_one_datagram() -> None:
    one, others = Program("n1"), [Program("n2"), Program("n3"), Program("n4")]
    for other in others:
        meet(one, other)
    request = VOTES[2]
    asked = [dataclasses.replace(request, to=name) for name in ("n2", "n3")]
    (ballot,) = ballots(asked)
    data = one.gate.seal(ballot, broadcast=True)
    assert [other.hears(data, one) for other in others[:2]] == asked
    assert others[2].refuses(data, one) is Reason.ELSEWHERE


def test_different_votes_are_different_datagrams() -> None:
    assert len(ballots(VOTES)) == len(VOTES)


def test_what_belongs_on_tcp_is_no_ballot() -> None:
    append = AppendEntries(
        generation=0, term=1, sender="n1", to="n2", prev_index=0, prev_term=0, commit_index=0, sent_ms=0
    )
    with pytest.raises(AssertionError, match="travels by TCP"):
        ballots([append])


# --- A boot id that was never met


def test_nothing_of_a_program_counts_before_it_has_answered() -> None:
    one, other = Program("n1"), Program("n2")
    (ballot,) = ballots([VOTES[2]])
    assert other.refuses(one.say(), one) is Reason.UNPROVEN
    assert other.refuses(one.gate.seal(ballot, broadcast=True), one) is Reason.UNPROVEN


def test_the_answer_counts_and_carries_the_beacon() -> None:
    one, other = Program("n1"), Program("n2")
    ((question, to),) = other.open(one.say(), one).answers
    assert to == one.address
    answers = one.open(question, other).answers
    body = other.hears(answers[0][0], one)
    assert body == one.beacon


def test_two_programs_that_meet_know_each_other_after_four_datagrams() -> None:
    one, other = Program("n1"), Program("n2")
    ((question, _),) = other.open(one.say(), one).answers
    (answer, _), (question_back, _) = one.open(question, other).answers
    assert other.hears(answer, one) == one.beacon
    heard = other.open(question_back, one)
    assert isinstance(heard, Heard)
    ((answer_back, _),) = heard.answers
    assert one.hears(answer_back, other) == other.beacon


def test_what_was_sealed_before_the_answer_never_counts(pair: tuple[Program, Program]) -> None:
    one, third = pair[0], Program("n3")
    old, late = one.say(term=1), one.say(term=2)
    meet(one, third)
    assert third.refuses(old, one) in (Reason.REPEATED, Reason.REPLAYED)
    assert third.refuses(late, one) in (Reason.REPEATED, Reason.REPLAYED)


def test_recordings_of_a_program_that_is_gone_never_count() -> None:
    gone, listener = Program("n1"), Program("n2")
    recorded = [gone.say() for _ in range(50)]
    for second in range(50):
        listener.now_ms = 1000 * second
        assert listener.refuses(recorded[second], gone) is Reason.UNPROVEN


def test_an_answer_that_was_recorded_counts_for_no_later_question() -> None:
    one, other = Program("n1"), Program("n2")
    ((question, _),) = other.open(one.say(), one).answers
    answer = one.open(question, other).answers[0][0]
    other.now_ms = module.QUESTION_MS
    assert other.refuses(answer, one) is Reason.UNPROVEN


def test_an_answer_to_somebody_else_proves_nothing() -> None:
    one, other, third = Program("n1"), Program("n2"), Program("n3")
    ((question, _),) = third.open(one.say(), one).answers
    answer = one.open(question, third).answers[0][0]
    other.open(one.say(), one)
    assert other.refuses(answer, one) is Reason.UNPROVEN


def test_a_question_goes_where_the_stranger_was_heard_last() -> None:
    one, other = Program("n1"), Program("n2")
    replayed = one.say()
    other.open(replayed, ATTACKER)
    assert other.open(one.say(), one).answers == ()  # asked a moment ago, elsewhere
    outgoing = other.gate.repeat_questions(other.beacon, module.RETRY_MS)
    assert [address for _, address in outgoing] == [one.address, None]


def test_who_was_heard_lately_is_forgotten_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BOOTS_MAX", 2)
    listener, first, second, third = (Program(f"n{number}") for number in range(4))
    meet(first, listener)
    meet(second, listener)
    listener.hears(first.say(), first)
    meet(third, listener)
    listener.hears(first.say(), first)
    assert listener.refuses(second.say(), second) is Reason.UNPROVEN


def test_a_program_that_was_forgotten_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BOOTS_MAX", 2)
    listener, crowd = Program("n0"), [Program(f"n{number}") for number in range(1, 4)]
    kept = crowd[0].say()
    for program in crowd:
        meet(program, listener)
    assert listener.refuses(kept, crowd[0]) is Reason.UNPROVEN
    meet(crowd[0], listener)
    assert listener.hears(crowd[0].say(), crowd[0]) == crowd[0].beacon


def test_a_restarted_program_is_asked_again() -> None:
    before, after, listener = Program("n1", "boot-1"), Program("n1", "boot-2"), Program("n2")
    meet(before, listener)
    assert listener.refuses(after.say(), after) is Reason.UNPROVEN
    meet(after, listener)
    assert listener.hears(after.say(), after) == after.beacon


def test_a_question_is_repeated_by_unicast_and_by_broadcast_and_then_given_up() -> None:
    one, other = Program("n1"), Program("n2")
    other.open(one.say(), one)
    asked_ms = []
    for now_ms in range(0, 3 * module.QUESTION_MS, 10):
        outgoing = other.gate.repeat_questions(other.beacon, now_ms)
        if outgoing:
            assert [address for _, address in outgoing] == [one.address, None]
            asked_ms.append(now_ms)
    assert asked_ms == [40, 120, 280, 600, 1240]


def test_a_question_by_broadcast_is_answered_by_broadcast_too() -> None:
    one, other = Program("n1"), Program("n2")
    other.open(one.say(), one)
    _, (question, _) = other.gate.repeat_questions(other.beacon, module.RETRY_MS)
    answers = one.open(question, other).answers
    assert [address for _, address in answers[:2]] == [other.address, None]
    assert other.hears(answers[1][0], one) == one.beacon


def test_a_question_for_another_node_is_not_answered(pair: tuple[Program, Program]) -> None:
    one, other = pair
    third = Program("n3")
    meet(third, other)
    ((question, _),) = third.open(one.say(), one).answers
    heard = other.open(question, third)
    assert isinstance(heard, Heard) and heard.body == third.beacon
    assert heard.answers == ()


def test_one_recorded_question_is_answered_once() -> None:
    one, other = Program("n1"), Program("n2")
    ((question, _),) = other.open(one.say(), one).answers
    one.now_ms = 1
    first = one.open(question, other).answers
    one.now_ms = 2
    assert len(first) == 2  # the answer, and a question of its own
    assert one.open(question, other).answers == ()


# --- Each number once


def test_a_datagram_that_comes_twice_counts_once(pair: tuple[Program, Program]) -> None:
    one, other = pair
    data = one.say()
    other.hears(data, one)
    assert other.refuses(data, one) is Reason.REPEATED
    assert other.gate.take_notes() == []  # over two interfaces this is every day's business


def test_numbers_may_overtake_each_other_a_little(pair: tuple[Program, Program]) -> None:
    one, other = pair
    said = [one.say() for _ in range(module.REORDER_MAX)]
    for data in reversed(said):
        other.hears(data, one)
    assert {other.refuses(data, one) for data in said} == {Reason.REPEATED}


def test_a_number_that_is_far_behind_is_a_replay_and_told(pair: tuple[Program, Program]) -> None:
    one, other = pair
    late = one.say()
    for _ in range(module.REORDER_MAX):
        newest = one.say()
    other.hears(newest, one)
    assert other.refuses(late, one) is Reason.REPLAYED
    (note,) = other.gate.take_notes()
    assert note.startswith(one.address.host)


def test_a_jump_of_the_numbers_forgets_nothing(pair: tuple[Program, Program]) -> None:
    one, other = pair
    before = one.say()
    other.hears(before, one)
    one.gate._counter += 10**15
    after = one.say()
    other.hears(after, one)
    assert other.refuses(before, one) is Reason.REPLAYED
    assert other.refuses(after, one) is Reason.REPEATED


def test_what_a_program_sent_itself_is_known_and_not_told(pair: tuple[Program, Program]) -> None:
    one, other = pair
    assert one.refuses(one.say(), other) is Reason.OWN
    assert one.gate.take_notes() == []


def test_a_copied_home_is_noticed_on_both_sides() -> None:
    one, twin = Program("n1", "boot-1"), Program("n1", "boot-2")
    meet(one, twin)
    meet(one, twin)
    for program, other in ((one, twin), (twin, one)):
        assert program.refuses(other.say(), other) is Reason.TWIN
        assert "a copy of this one's" in program.gate.take_notes()[0]


def test_ones_own_earlier_start_that_is_gone_is_no_twin() -> None:
    before, after = Program("n1", "boot-1"), Program("n1", "boot-2")
    assert after.refuses(before.say(), before) is Reason.UNPROVEN
    assert after.gate.take_notes() == []


# --- Bad input


def test_every_change_of_a_single_byte_is_refused(pair: tuple[Program, Program]) -> None:
    one, other = pair
    data = one.say()
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 0x55
        assert isinstance(other.open(bytes(altered), one), Refused), at
    assert other.hears(data, one) == one.beacon


def test_every_beginning_of_a_datagram_is_refused(pair: tuple[Program, Program]) -> None:
    one, other = pair
    data = one.say()
    reasons = {other.refuses(data[:size], one) for size in range(len(data))}
    assert reasons == {Reason.NOT_OURS, Reason.CUT, Reason.TAG}
    assert other.hears(data, one) == one.beacon


def test_a_longer_one_is_refused_before_it_is_looked_at(pair: tuple[Program, Program]) -> None:
    one, other = pair
    assert other.refuses(one.say() + bytes(config.DATAGRAM_BYTES_MAX), one) is Reason.TOO_LONG


def test_something_behind_the_end_is_refused(pair: tuple[Program, Program]) -> None:
    one, other = pair
    assert other.refuses(one.say() + b"x", one) is Reason.TAG


CORPUS = [
    b"",
    b"\0",
    b"p2p",
    b"p2pc",
    b"p2pc\0\1",
    b"p2pc\0\1\7default",
    b"p2pc\0\1\7default\xff",
    b"p2pc\0\1\7def\nult\0\0",
    b"p2pc\0\1\7defau\xff\xfe\0",
    b"p2pc" + bytes(100),
    b"p2pc\0\1" + b"\xff" * 1000,
    b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n\r\n",
    bytes(1200),
    bytes(range(256)) * 5,
    b"\x80\x04\x95",  # the beginning of a pickle
]


@pytest.mark.parametrize("data", CORPUS, ids=range(len(CORPUS)))
def test_the_corpus_is_refused_and_changes_nothing(pair: tuple[Program, Program], data: bytes) -> None:
    one, other = pair
    reason = other.refuses(data, one)
    assert reason in (Reason.NOT_OURS, Reason.CUT, Reason.TOO_LONG, Reason.VERSION, Reason.CLUSTER)
    assert other.gate.refused_counts[reason] == 1
    assert other.hears(one.say(), one) == one.beacon


def forged(sender: Program, message: Message) -> bytes:
    """A datagram with a body of one's own making, well sealed."""
    original, module_encode = module._encode, message
    try:
        module._encode = lambda body: module_encode
        return sender.gate.seal(sender.beacon)
    finally:
        module._encode = original


def beacon_fields(**changes: Any) -> dict[str, Any]:
    return module._beacon_fields(beacon()) | changes


BAD_BODIES = [
    Message("hello", {}),
    Message("beacon", {}),
    Message("beacon", beacon_fields(more=1)),
    Message("beacon", beacon_fields(), (b"blob",)),
    Message("beacon", beacon_fields(term=-1)),
    Message("beacon", beacon_fields(term=True)),
    Message("beacon", beacon_fields(term=2**63)),
    Message("beacon", beacon_fields(term=1.5)),
    Message("beacon", beacon_fields(state="leader")),
    Message("beacon", beacon_fields(state=[])),
    Message("beacon", beacon_fields(role={})),
    Message("beacon", beacon_fields(tcp_port=0)),
    Message("beacon", beacon_fields(udp_port=65536)),
    Message("beacon", beacon_fields(name="")),
    Message("beacon", beacon_fields(name="a\nb")),
    Message("beacon", beacon_fields(name="x" * 101)),
    Message("beacon", beacon_fields(leader_address=["h"])),
    Message("beacon", beacon_fields(leader_address=["h", "1"])),
    Message("beacon", beacon_fields(has_work=1)),
    Message("echo_request", beacon_fields()),
    Message("echo_request", beacon_fields(boot=None, nonce="n")),
    Message("echo_reply", beacon_fields(boot="b", nonce="n")),
    Message("echo_reply", beacon_fields(nonce="")),
    Message("raft_vote", {"to": ["n2"]}),
    Message("raft_vote", {"to": "n2"}),
    Message("raft_pre_vote_reply", {"to": [], "generation": 0, "term": 1, "sender": "n1", "granted": True}),
    Message("raft_pre_vote_reply", {"to": ["n2"], "generation": 0, "term": 1, "sender": "n3", "granted": True}),
    Message("raft_timeout_now", {"to": ["n2"], "generation": 0, "term": 1, "sender": "n1"}),
]


@pytest.mark.parametrize("message", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_bad_body_from_a_member_is_refused_and_told(pair: tuple[Program, Program], message: Message) -> None:
    one, other = pair
    assert other.refuses(forged(one, message), one) is Reason.MALFORMED
    (note,) = other.gate.take_notes()
    assert "install one version" in note and "\n" not in note


def test_a_body_that_is_no_message_is_refused(pair: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    monkeypatch.setattr(codec, "encode_bytes", lambda message: b"no message")
    assert other.refuses(one.say(), one) is Reason.MALFORMED


def test_forged_bodies_of_the_test_are_what_a_gate_would_seal(pair: tuple[Program, Program]) -> None:
    one, other = pair
    assert other.hears(forged(one, Message("beacon", beacon_fields())), one) == beacon()


# --- Who does not belong together


def test_another_protocol_version_is_named() -> None:
    one, other = Program("n1", protocol=2), Program("n2")
    assert other.refuses(one.say(), one) is Reason.VERSION
    assert "speaks protocol 2 and this node protocol 1" in other.gate.take_notes()[0]


def test_another_cluster_is_named_whatever_its_key() -> None:
    for key in (KEY, OTHER_KEY, None):
        one, other = Program("n1", key=key, cluster="lab"), Program("n2")
        assert other.refuses(one.say(), one) is Reason.CLUSTER
        assert "'lab'" in other.gate.take_notes()[0]


def test_another_key_is_named_with_what_to_do() -> None:
    one, other = Program("n1", key=OTHER_KEY), Program("n2")
    refused = other.open(one.say(), one)
    assert refused == Refused(Reason.OTHER_KEY, one.address, one.gate.key_id)
    (note,) = other.gate.take_notes()
    assert one.gate.key_id in note and other.gate.key_id in note
    assert "key --set" in note and "--cluster" in note


def test_a_node_without_a_key_hears_that_there_is_one() -> None:
    keyed, keyless = Program("n1"), Program("n2", key=None)
    assert keyless.refuses(keyed.say(), keyed) is Reason.OTHER_KEY
    assert "this node holds none" in keyless.gate.take_notes()[0]
    assert keyed.refuses(keyless.say(), keyless) is Reason.NO_KEY
    assert "has no key" in keyed.gate.take_notes()[0]


def test_nodes_without_a_key_hear_each_other() -> None:
    one, other = Program("n1", key=None), Program("n2", key=None)
    meet(one, other)
    assert other.hears(one.say(), one) == one.beacon


def test_a_forger_who_knows_everything_but_the_key_is_refused(pair: tuple[Program, Program]) -> None:
    one, other = pair
    forger = Program("n1", "boot-n1", key=OTHER_KEY)
    forger.gate.key_id = one.gate.key_id
    forger.gate._counter = 10**6
    assert other.refuses(forger.say(), one) is Reason.TAG
    assert "do not prove it" in other.gate.take_notes()[0]


def test_each_host_and_reason_is_told_once_and_counted_each_time() -> None:
    stranger, other = Program("n1", key=OTHER_KEY), Program("n2")
    for _ in range(5):
        other.open(stranger.say(), stranger)
        other.open(b"rubbish", stranger)
    assert len(other.gate.take_notes()) == 2
    assert other.gate.take_notes() == []
    assert other.gate.refused_counts == {Reason.OTHER_KEY: 5, Reason.NOT_OURS: 5}
    other.open(b"rubbish", Address("10.9.9.9", 1))
    assert len(other.gate.take_notes()) == 1


def test_a_strangers_text_is_shown_only_where_it_is_printable() -> None:
    clear = module._CLEAR.pack(module.MAGIC, 1)
    for text in (b"\x1b[31mred", b"a\nb", b"\xff\xfe", b"x" * 101):
        other = Program("n2")
        size = bytes([len(text)])
        assert other.refuses(clear + size + text + b"\0", ATTACKER) is Reason.CUT
        assert other.refuses(clear + b"\7default" + size + text + bytes(100), ATTACKER) is Reason.CUT
        assert all(note.isprintable() for note in other.gate.take_notes())


def test_every_note_is_one_line_that_begins_with_the_host() -> None:
    other = Program("n2")
    strangers = [
        Program("n1", protocol=3), Program("n1", cluster="x"), Program("n1", key=OTHER_KEY), Program("n1", key=None),
    ]  # fmt: skip
    for stranger in strangers:
        other.open(stranger.say(), stranger)
    other.open(b"rubbish", strangers[0])
    notes = other.gate.take_notes()
    assert len(notes) == 5
    for note in notes:
        assert note.startswith("10.0.0.") and note.isprintable()


# --- Bounds


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRANGERS_MAX", 10)
    monkeypatch.setattr(module, "BOOTS_MAX", 10)
    monkeypatch.setattr(module, "TOLD_MAX", 10)
    listener = Program("n0")
    for number in range(50):
        program = Program(f"n{number + 1}")
        listener.open(program.say(), program)
        listener.open(b"rubbish", Address(f"10.1.0.{number}", 1))
    assert len(listener.gate._strangers) == 10
    for number in range(50):
        meet(Program(f"n{number + 1}"), listener)
    assert len(listener.gate._windows) == 10
    assert len(listener.gate.take_notes()) == 10


def test_the_longest_beacon_fits_in_a_datagram() -> None:
    number = 2**63 - 1
    hex_id = "f" * 16
    program = Program(hex_id, hex_id, cluster="c" * config.NAME_CHARACTERS_MAX)
    said = beacon(
        name="x" * module.NAME_CHARS_MAX, state=State.JOINING, cluster_id=hex_id, generation=number, term=number,
        leader_id=hex_id, leader_address=Address("y" * module.TEXT_CHARS_MAX, 65535), last_index=number,
        last_term=number, commit_index=number, role="standby", voters=number, members=number, has_work=False,
        expect=number, tcp_host="z" * module.TEXT_CHARS_MAX, tcp_port=65535, udp_port=65535, interval_ms=number,
        package="0.10.100", python="3.11.99+",
    )  # fmt: skip
    assert len(program.gate.seal(said)) <= config.DATAGRAM_BYTES_MAX
    listener = Program("n2", cluster=program.gate.cluster)
    listener.beacon = said
    ((question, _),) = listener.open(program.say(), program).answers
    assert len(question) <= config.DATAGRAM_BYTES_MAX


def test_a_beacon_that_does_not_fit_is_an_error_with_a_remedy() -> None:
    program = Program("n1")
    with pytest.raises(LocalProtocolError, match="shorter --advertise"):
        program.gate.seal(beacon(tcp_host="z" * 1200))


def test_a_vote_request_to_all_voters_of_a_joint_configuration_fits() -> None:
    program = Program("f" * 16, "e" * 16, cluster="c" * 64)
    to = tuple(f"{number:016x}" for number in range(10))
    assert len(program.gate.seal(Ballot(VOTES[2], to))) <= config.DATAGRAM_BYTES_MAX // 2


def test_a_beacon_of_every_day_is_small() -> None:
    program = Program("f" * 16, "e" * 16)
    said = beacon(
        name="workstation-12", state=State.MEMBER, cluster_id="c" * 16, term=12, leader_id="a" * 16,
        leader_address=Address("192.168.1.17", 47400), last_index=10**6, commit_index=10**6, role="voter",
    )  # fmt: skip
    assert len(program.gate.seal(said)) <= 600


@pytest.mark.parametrize(
    ("name", "short"), [("lab", "lab"), ("", "?"), ("a\nb", "a?b"), ("höst", "h?st"), ("x" * 99, "x" * 40)]
)
def test_names_are_made_fit_for_a_beacon(name: str, short: str) -> None:
    assert short_name(name) == short
