"""Whatever an attacker delivers to a listener, in whatever pieces and by however many connections: bounded, counted, told once.

He holds no key. He may say anything, say what honest sides said (cut, twice, to others than it was for), and say it slowly.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import config
from p2pcluster.core.codec import frame
from p2pcluster.core.handshake import Handshake, Identity, derive_key
from p2pcluster.errors import ProtocolError
from p2pcluster.stream import PENDING_MAX, Connection, ConnectionClosed, Listener

KEY = derive_key(b"a key")
PATIENCE_S = 20.0


def identity(name: str) -> Identity:
    return Identity(name, f"boot-{name}", "node", name, "default", None, 1, "0.1.0", "3.11")


class Besieged:
    """A listener with a clock of its own, and everything that it let in."""

    def __init__(self) -> None:
        self.listener = Listener("127.0.0.1", 0, lambda: Handshake("accept", KEY, identity("n"), os.urandom(32)))
        self.selector = selectors.DefaultSelector()
        self.listener.register(self.selector)
        self.accepted: list[Connection] = []
        self.notes: list[str] = []
        self.now_s = 0.0

    def turn(self) -> None:
        for key, _ in self.selector.select(0):
            self.accepted += self.listener.ready(key.fileobj, self.now_s)
        self.listener.expire(self.now_s)
        self.notes += self.listener.take_notes()
        self.is_bounded()

    def is_bounded(self) -> None:
        waiting: Any = self.listener._since_s
        held = [connection._reader.buffered_bytes for connection in waiting]
        assert len(held) <= PENDING_MAX
        assert all(size <= config.PREAUTH_BYTES_MAX for size in held) and sum(held) <= config.PREAUTH_TOTAL_BYTES_MAX
        assert all(self.now_s - since_s <= config.PREAUTH_S for since_s in waiting.values())

    def knock(self) -> socket.socket:
        return socket.create_connection(self.listener.address)

    def lets_an_honest_node_in(self) -> None:
        sock = self.knock()
        connection = Connection(sock, handshake=Handshake("dial", KEY, identity("m"), os.urandom(32)))
        deadline_s = time.monotonic() + PATIENCE_S
        while not connection.is_established:
            assert time.monotonic() < deadline_s, "it is kept out"
            self.now_s += 0.01
            connection.flush()
            self.turn()
            connection.read()
        while not self.accepted:
            self.turn()
        connection.close()

    def close(self) -> None:
        self.listener.close()
        self.selector.close()
        for connection in self.accepted:
            connection.close()


def recorded() -> list[bytes]:
    """The frames of an honest handshake, both sides', and a sealed frame behind it."""
    dial, accept = Handshake("dial", KEY, identity("a"), b"d" * 32), Handshake("accept", KEY, identity("n"), b"a" * 32)
    said = [b"".join(dial.start() or [])]
    for side in (accept, dial, accept):
        said.append(b"".join(side.receive(said[-1]) or []))
    dial.receive(said[-1])
    assert dial.session is not None
    return [b"".join(frame([payload])) for payload in said] + [b"".join(frame(dial.session.sealer.seal([b"an order"])))]


RECORDED = recorded()
honest = st.sampled_from(RECORDED)
pieces = st.binary(max_size=300) | honest | st.tuples(st.sampled_from(RECORDED), st.integers(0, 400)).map(lambda p: p[0][: p[1]])
steps = st.lists(st.tuples(st.sampled_from(["say", "say", "half", "leave", "wait"]), st.integers(0, 24), pieces), max_size=60)


@settings(max_examples=60)
@given(steps)
def test_whatever_strangers_say_is_bounded_and_nobody_of_them_gets_in(script: list[tuple[str, int, bytes]]) -> None:
    besieged = Besieged()
    strangers = [besieged.knock() for _ in range(25)]
    try:
        for what, who, piece in script:
            with contextlib.suppress(OSError):
                if what == "say":
                    strangers[who].send(piece)
                elif what == "half":
                    strangers[who].shutdown(socket.SHUT_WR)
                elif what == "leave":
                    strangers[who].close()
            besieged.now_s += 0.3 if what == "wait" else 0.001
            besieged.turn()
        assert besieged.accepted == []
        besieged.lets_an_honest_node_in()
        assert len(besieged.notes) == len(set(besieged.notes)) <= 6
    finally:
        for sock in strangers:
            sock.close()
        besieged.close()


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_who_says_a_byte_a_second_holds_a_place_for_two_seconds_and_is_counted(seed: int) -> None:
    random = Random(seed)
    besieged = Besieged()
    slow = [besieged.knock() for _ in range(random.randrange(1, PENDING_MAX))]
    try:
        for second in range(4):
            for sock in slow:
                with contextlib.suppress(OSError):
                    sock.send(RECORDED[0][second : second + 1])
            besieged.turn()
            besieged.now_s += 1.0
        besieged.turn()
        assert besieged.listener.pending_count == 0
        assert besieged.listener.refused_count == len(slow)
        assert len(besieged.notes) == 1
    finally:
        for sock in slow:
            sock.close()
        besieged.close()


class Session:
    """Two honest sides over a middleman, who let the handshake through."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        self.dialled = Connection(ours, handshake=Handshake("dial", KEY, identity(name), os.urandom(32)))
        self.accepted = Connection(theirs, handshake=Handshake("accept", KEY, identity("n"), os.urandom(32)))
        while not (self.dialled.is_established and self.accepted.is_established):
            self.dialled.flush()
            self.accepted.read()
            self.dialled.read()

    def say(self, payload: bytes) -> bytes:
        """What the dialling side sends, in the middleman's hands."""
        assert self.dialled.session is not None
        return b"".join(frame(self.dialled.session.sealer.seal([payload])))

    def hear(self, data: bytes) -> list[bytes]:
        """What the accepting side takes for said, of what the middleman delivers."""
        self.dialled._sock.setblocking(True)
        self.dialled._sock.sendall(data)
        heard: list[bytes] = []
        with contextlib.suppress(ProtocolError, ConnectionClosed):
            heard += [bytes(payload) for payload in self.accepted.read()]
        return heard

    def close(self) -> None:
        self.dialled.close()
        self.accepted.close()


tricks = st.lists(st.tuples(st.sampled_from(["deliver", "repeat", "splice", "reflect", "flip", "drop"]), st.integers(0, 500)), max_size=12)


@settings(max_examples=150)
@given(tricks)
def test_a_middleman_between_two_sessions_delivers_a_beginning_of_what_was_said_or_nothing(script: list[tuple[str, int]]) -> None:
    one, other = Session("a"), Session("b")
    said: list[bytes] = []
    heard: list[bytes] = []
    wires: list[bytes] = []
    try:
        for number, (trick, at) in enumerate(script):
            payload = f"order {number}".encode()
            wire, foreign = one.say(payload), other.say(b"of another session")
            said.append(payload)
            wires.append(wire)
            if trick == "repeat":
                wire = wires[at % len(wires)]
            elif trick == "splice":
                wire = foreign
            elif trick == "reflect":
                assert one.accepted.session is not None
                wire = b"".join(frame(one.accepted.session.sealer.seal([b"an answer"])))
            elif trick == "flip":
                wire = wire[:4] + bytes([wire[4] ^ 1 << at % 8]) + wire[5:]
            elif trick == "drop":
                continue
            heard += one.hear(wire)
        assert heard == said[: len(heard)]
    finally:
        one.close()
        other.close()
