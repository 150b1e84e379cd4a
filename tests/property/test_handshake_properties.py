"""Whatever an attacker without the key delivers, to whom and in which order.

Sessions exist only between two sides that said exactly what the other heard, and what comes out of a sealed stream is a
beginning of what was put in.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core.codec import Buffer, Message, encode_bytes
from p2pcluster.core.handshake import KINDS, Handshake, Identity, Opener, Sealer, derive_key
from p2pcluster.errors import AuthenticationFailed, ProtocolError

KEY = derive_key(b"a key")
SIDES = ("dial", "accept")

short_texts = st.text(min_size=1, max_size=40).filter(str.isprintable)
fact_values = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.lists(st.text(max_size=9))
facts = st.dictionaries(st.text(max_size=10), fact_values, max_size=5)


def identity(node_id: str, role: Any = "node", **changes: Any) -> Identity:
    known: dict[str, Any] = {
        "node_id": node_id,
        "boot_id": f"boot-{node_id}",
        "role": role,
        "name": node_id,
        "cluster_name": "default",
        "cluster_id": None,
        "protocol": 1,
        "package": "0.1.0",
        "python": "3.11.7",
        "facts": {"of": node_id},
    }
    return Identity(**(known | changes))


def joined(parts: list[Buffer] | None) -> bytes | None:
    return None if parts is None else b"".join(parts)


class Party:
    """One side of one handshake, on a network that the attacker is."""

    def __init__(self, side: Any, number: int) -> None:
        self.handshake = Handshake(side, KEY, identity(f"{side}{number}"), bytes([len(side), number]) * 16)
        self.said = [payload for payload in [joined(self.handshake.start())] if payload is not None]
        self.heard: list[bytes] = []
        self.is_out = False

    def hear(self, payload: bytes) -> None:
        if self.is_out or self.handshake.session is not None:
            return
        try:
            reply = joined(self.handshake.receive(payload))
        except ProtocolError:
            self.is_out = True
            return
        self.heard.append(payload)
        if reply is not None:
            self.said.append(reply)


def exchange(relay: Any) -> tuple[Party, Party]:
    """A handshake between two honest sides; `relay(index, payload)` is what arrives of the message `index`."""
    dial, accept = Party("dial", 1), Party("accept", 1)
    index = 0
    for _ in range(2):
        for source, target in ((dial, accept), (accept, dial)):
            position = index // 2
            if position < len(source.said):
                target.hear(relay(index, source.said[position]))
            index += 1
    return dial, accept


@given(short_texts, short_texts, short_texts, facts, facts, st.none() | short_texts)
def test_any_two_who_hold_the_key_find_each_other(
    node: str, name: str, cluster: str, here: dict[str, Any], there: dict[str, Any], cluster_id: str | None
) -> None:
    mine = identity(node, "client", name=name, cluster_name=cluster, facts=here)
    theirs = identity(node, "node", name=name, cluster_name=cluster, facts=there, cluster_id=cluster_id)
    dial, accept = Handshake("dial", KEY, mine, b"d" * 32), Handshake("accept", KEY, theirs, b"a" * 32)

    welcome = joined(accept.receive(joined(dial.start()) or b""))
    accepted = joined(accept.receive(joined(dial.receive(welcome or b"")) or b""))
    dial.receive(accepted or b"")

    assert dial.session is not None and accept.session is not None
    assert (dial.session.peer, accept.session.peer) == (theirs, mine)


def test_an_honest_exchange_ends_in_two_sessions() -> None:
    dial, accept = exchange(lambda index, payload: payload)

    assert dial.handshake.session is not None and accept.handshake.session is not None


@settings(max_examples=300)
@given(st.integers(0, 3), st.data())
def test_whatever_byte_of_whatever_message_is_altered_who_hears_it_gets_no_session(
    which: int, data: st.DataObject
) -> None:
    def relay(index: int, payload: bytes) -> bytes:
        if index != which:
            return payload
        place = data.draw(st.integers(0, len(payload) - 1))
        return payload[:place] + bytes([payload[place] ^ data.draw(st.integers(1, 255))]) + payload[place + 1 :]

    dial, accept = exchange(relay)

    assert dial.handshake.session is None
    assert accept.handshake.session is None or which == 3, "the last message comes after the accepting side is sure"


@given(st.integers(0, 3), st.data())
def test_a_message_cut_or_extended_gets_nobody_a_session(which: int, data: st.DataObject) -> None:
    def relay(index: int, payload: bytes) -> bytes:
        if index != which:
            return payload
        return payload[: data.draw(st.integers(0, len(payload) - 1))] + data.draw(st.binary(max_size=3))

    dial, accept = exchange(relay)

    assert dial.handshake.session is None or dial.heard == accept.said
    assert accept.handshake.session is None or accept.heard == dial.said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["magic", "protocol", "cluster", "key_id", "role", "node_id", "name", "reason", "other"])
known_values = st.sampled_from(["p2pcluster", 1, "default", "node", "client"])
made_up = st.builds(
    lambda kind, fields, blobs: encode_bytes(Message(kind, fields, tuple(blobs))),
    st.sampled_from(KINDS) | st.text(max_size=6),
    st.dictionaries(names, json_values | known_values, max_size=9),
    st.lists(st.binary(max_size=40) | st.just(b"n" * 32), max_size=3),
)


@settings(max_examples=200)
@given(st.sampled_from(SIDES), st.integers(0, 1), st.binary(max_size=200) | made_up)
def test_anything_at_all_said_at_any_point_is_refused_with_a_sentence(side: Any, heard: int, payload: bytes) -> None:
    party, other = Party(side, 1), Party("accept" if side == "dial" else "dial", 1)
    if side == "dial":
        other.hear(party.said[0])
    if heard:
        party.hear(other.said[0])
        assert not party.is_out

    try:
        party.handshake.receive(payload)
    except ProtocolError as error:
        assert str(error).isprintable() and len(str(error)) < 700
    assert party.handshake.session is None


class Network:
    """The attacker: gives anybody anything that anybody has said so far, though mostly what lets a handshake go on."""

    def __init__(self) -> None:
        self.diallers = [Party("dial", 1), Party("dial", 2)]
        self.accepters = [Party("accept", 1), Party("accept", 2)]
        self.parties = self.diallers + self.accepters

    def pass_on(self, dialler: int, accepter: int, steps: int) -> None:
        """So many messages of an honest exchange, each the latest that was said."""
        pair = self.diallers[dialler], self.accepters[accepter]
        for step in range(steps):
            source, target = pair if step % 2 == 0 else pair[::-1]
            if source.said:
                target.hear(source.said[-1])

    def pass_off(self, source: int, target: int, place: int) -> None:
        """Anything to anybody."""
        said = self.parties[source].said
        if said:
            self.parties[target].hear(said[place % len(said)])


passed_on = st.tuples(st.just("pass_on"), st.integers(0, 1), st.integers(0, 1), st.integers(1, 4))
passed_off = st.tuples(st.just("pass_off"), st.integers(0, 3), st.integers(0, 3), st.integers(0, 1))
schedules = st.lists(passed_on | passed_on | passed_off, min_size=1, max_size=8)


def test_the_attacker_can_also_be_an_honest_network() -> None:
    network = Network()
    network.pass_on(0, 1, 4)
    network.pass_on(1, 0, 4)

    assert all(party.handshake.session for party in network.parties)


@settings(max_examples=300)
@given(schedules)
def test_sessions_exist_only_between_two_who_heard_exactly_what_the_other_said(
    schedule: list[tuple[str, int, int, int]],
) -> None:
    network = Network()
    for what, *how in schedule:
        getattr(network, what)(*how)

    parties = network.parties
    for party in parties:
        session = party.handshake.session
        if session is None:
            continue
        (other,) = [one for one in parties if one.handshake.me == session.peer]
        assert other.handshake.side != party.handshake.side
        assert party.heard == other.said[: len(party.heard)]
        assert other.heard == party.said[: len(other.heard)]
        if other.handshake.session is not None:
            assert bytes(session.opener.open(b"".join(other.handshake.session.sealer.seal([b"x"])))) == b"x"


tampering = st.sampled_from(["drop", "repeat", "swap", "flip", "cut", "inject", "none"])


@settings(max_examples=200)
@given(
    st.lists(st.binary(max_size=60), min_size=1, max_size=8),
    st.lists(st.tuples(tampering, st.integers(0, 7)), max_size=3),
    st.data(),
)
def test_what_comes_out_of_a_sealed_stream_is_a_beginning_of_what_went_in(
    payloads: list[bytes], attacks: list[tuple[str, int]], data: st.DataObject
) -> None:
    sealer, opener = Sealer(b"k" * 32), Opener(b"k" * 32)
    honest = [b"".join(sealer.seal([payload])) for payload in payloads]
    frames = list(honest)
    for attack, place in attacks:
        tamper(frames, attack, place, data)

    opened = []
    try:
        for frame in frames:
            opened.append(bytes(opener.open(frame)))
    except AuthenticationFailed:
        assert frames != honest[: len(frames)]
    assert opened == payloads[: len(opened)]
    assert frames[: len(opened)] == honest[: len(opened)]


def tamper(frames: list[bytes], attack: str, place: int, data: st.DataObject) -> None:
    if place >= len(frames):
        return
    if attack == "drop":
        del frames[place]
    elif attack == "repeat":
        frames.insert(place, frames[place])
    elif attack == "swap":
        frames[0], frames[place] = frames[place], frames[0]
    elif attack == "flip" and frames[place]:
        at = data.draw(st.integers(0, len(frames[place]) - 1))
        frames[place] = frames[place][:at] + bytes([frames[place][at] ^ 1]) + frames[place][at + 1 :]
    elif attack == "cut":
        frames[place] = frames[place][: data.draw(st.integers(0, len(frames[place])))]
    elif attack == "inject":
        frames.insert(place, data.draw(st.binary(max_size=40)))
