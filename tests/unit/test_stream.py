"""Sockets that are cut, full, reset and attacked; all on loopback, nothing waits for anything but the fact itself."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from p2pcluster import config, stream
from p2pcluster.core.codec import Buffer, FrameReader, decode, frame
from p2pcluster.core.handshake import Handshake, Identity, derive_key
from p2pcluster.errors import (
    AuthenticationFailed,
    ClusterNotFound,
    HomeError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    Unavailable,
)
from p2pcluster.stream import BlockingConnection, Connection, ConnectionClosed, Listener, PortTaken, dial, start_dial

KEY = derive_key(b"a key")
PATIENCE_S = 20.0
FRAME_BYTES_MAX = 8 << 20


def identity(node_id: str, **changes: Any) -> Identity:
    known = Identity(
        node_id=node_id,
        boot_id=f"boot-{node_id}",
        role="node",
        name=f"host-{node_id}",
        cluster_name="default",
        cluster_id=None,
        protocol=1,
        package="0.1.0",
        python="3.11.7",
        facts={"cores": 2},
    )
    return dataclasses.replace(known, **changes)


def dialling(key: bytes = KEY, **changes: Any) -> Handshake:
    return Handshake("dial", key, identity("dialler", **changes), os.urandom(32))


def accepting() -> Handshake:
    return Handshake("accept", KEY, identity("listener"), os.urandom(32))


def wait_until_ready(sock: Any, event: int) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        assert selector.select(PATIENCE_S), "nothing came"


def wait_for_payloads(connection: Connection, count: int, *others: Connection) -> list[Buffer]:
    """Reads until so many payloads came, while the others write."""
    payloads: list[Buffer] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while len(payloads) < count:
        assert time.monotonic() < deadline_s, f"{len(payloads)} of {count} payloads came"
        for other in others:
            other.flush()
        if not any(other.wants_write for other in others):
            wait_until_ready(connection, selectors.EVENT_READ)
        payloads += connection.read()
    return payloads


def wait_for_error(connection: Connection) -> Exception:
    while True:
        wait_until_ready(connection, selectors.EVENT_READ)
        try:
            connection.read()
        except Exception as error:
            return error


def received_until_closed(sock: socket.socket) -> bytes:
    """All of it, up to an end in order: a reset raises, as it can overtake what was said before it."""
    sock.settimeout(PATIENCE_S)
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    left, right = socket.socketpair()
    connections = Connection(left, FRAME_BYTES_MAX), Connection(right, FRAME_BYTES_MAX)
    yield connections
    for connection in connections:
        connection.close()


@pytest.fixture
def tcp_sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    with left, right:
        yield left, right


class Loop:
    """The part of a node's loop that concerns a listener: a clock of its own, and what came in."""

    def __init__(self, make_handshake: Callable[[], Handshake] = accepting) -> None:
        self.listener = Listener("127.0.0.1", 0, make_handshake, FRAME_BYTES_MAX)
        self.selector = selectors.DefaultSelector()
        self.listener.register(self.selector)
        self.accepted: list[Connection] = []
        self.dialled: list[Connection] = []
        self.notes: list[str] = []
        self.now_s = 1000.0

    def turn(self, timeout_s: float = 0.0) -> None:
        for key, _ in self.selector.select(timeout_s):
            assert key.data is self.listener
            self.accepted += self.listener.ready(key.fileobj, self.now_s)
        self.notes += self.listener.take_notes()

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, "it did not come about"
            self.turn(0.01)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.listener.expire(self.now_s)
        self.notes += self.listener.take_notes()

    def knock(self) -> socket.socket:
        return socket.create_connection(self.listener.address)

    def connect(self, handshake: Handshake | None = None) -> Connection:
        """A connection that dials as a node does, driven together with this loop until it is through."""
        connection = self.dial(handshake)
        self.drive(connection)
        return connection

    def dial(self, handshake: Handshake | None = None) -> Connection:
        connection = start_dial(*self.listener.address, handshake or dialling(), FRAME_BYTES_MAX)
        self.dialled.append(connection)
        return connection

    def drive(self, connection: Connection) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not connection.is_established:
            assert time.monotonic() < deadline_s
            connection.flush()
            self.turn()
            connection.read()

    def close(self) -> None:
        self.listener.close()
        self.selector.close()
        for connection in self.accepted + self.dialled:
            connection.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


# --- Frames on a socket -----------------------------------------------------------------------------------------------


def test_frames_arrive_whole_and_in_order(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    left.send([b"fir", b"", b"st"])
    left.send([])
    left.send([bytearray(b"third")])
    left.flush()

    assert wait_for_payloads(right, 3) == [b"first", b"", b"third"]


def test_blobs_larger_than_the_sockets_buffer_arrive_whole(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    blobs = [os.urandom(5_000_000), os.urandom(10_000), os.urandom(1_000_000)]
    left.send([b"head", *blobs])
    left.send([b"next"])
    total = left.outgoing_bytes
    left.flush()

    assert left.wants_write
    assert 0 < left.outgoing_bytes < total
    assert wait_for_payloads(right, 2, left) == [b"head" + b"".join(blobs), b"next"]
    assert left.outgoing_bytes == 0
    assert not left.wants_write


def test_frames_of_any_sizes_survive_partial_writes(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    left._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5_000)
    chance = random.Random(7)
    sizes = [0, 1, 8191, 8192, 8193, 65_532, 65_536, 70_000, 300_000]
    frames = [[chance.randbytes(chance.choice(sizes)) for _ in range(chance.randrange(4))] for _ in range(100)]
    received: list[Buffer] = []
    for parts in frames:
        left.send(parts)
        left.flush()
        received += right.read()
    received += wait_for_payloads(right, len(frames) - len(received), left)

    assert received == [b"".join(parts) for parts in frames]
    assert left.outgoing_bytes == 0


def test_more_parts_than_one_system_call_takes_arrive(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    parts: list[Buffer] = [bytes([index % 251]) * 8200 for index in range(900)]
    left.send(parts)

    assert wait_for_payloads(right, 1, left) == [b"".join(parts)]


def test_a_platform_without_sendmsg_sends_the_same(
    pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_HAS_SENDMSG", False)
    left, right = pair
    left.send([b"head", bytes(1_000_000), b"tail"])

    assert wait_for_payloads(right, 1, left) == [b"head" + bytes(1_000_000) + b"tail"]


def test_many_small_frames_are_one_piece_to_send_and_a_large_part_is_not_copied(
    pair: tuple[Connection, Connection],
) -> None:
    left, right = pair
    blob = bytearray(100_000)
    for _ in range(100):
        left.send([b"small"])
    left.send([b"head", blob])
    assert len(left._outgoing) == 2
    blob[:5] = b"later"
    left.flush()

    assert wait_for_payloads(right, 101, left)[-1] == b"head" + blob


def test_one_read_takes_a_bounded_share(
    pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "READ_BYTES_MAX", 1)
    left, right = pair
    for _ in range(20):
        left.send([bytes(9_000)])
    left.flush()

    first = right.read()

    assert 0 < len(first) <= 8, "what one call of the system brought"
    assert len(first + wait_for_payloads(right, 20 - len(first), left)) == 20


def test_one_flush_writes_a_bounded_share(
    pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WRITE_BYTES_MAX", 1)
    monkeypatch.setattr(stream, "_PARTS_MAX", 1)
    left, right = pair
    left.send([bytes(9_000), bytes(9_000)])
    total = left.outgoing_bytes

    left.flush()

    assert 0 < left.outgoing_bytes < total
    assert wait_for_payloads(right, 1, left) == [bytes(18_000)]


def test_nothing_to_read_is_nothing(pair: tuple[Connection, Connection]) -> None:
    assert pair[0].read() == []


def test_what_came_before_the_end_is_returned_before_the_end_is_raised(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    left.send([b"last words"])
    left.flush()
    left.close()

    assert wait_for_payloads(right, 1) == [b"last words"]
    for _ in range(2):
        with pytest.raises(ConnectionClosed) as raised:
            right.read()
        assert raised.value.how == "ended"


def test_an_end_in_the_middle_of_a_frame_is_said(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    left._sock.send(struct.pack(">I", 100) + b"half")
    left.close()

    assert str(wait_for_error(right)) == "the connection was closed (in the middle of a frame)"


def test_a_reset_is_told_from_an_end(tcp_sockets: tuple[socket.socket, socket.socket]) -> None:
    left, right = tcp_sockets
    connection = Connection(left)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    right.close()

    error = wait_for_error(connection)

    assert isinstance(error, ConnectionClosed)
    assert error.how == "reset"
    assert error.definite is False, "what was sent may have happened"


def test_writing_to_who_is_gone_raises(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    right.close()
    left.send([b"anybody?"])

    with pytest.raises(ConnectionClosed):
        left.flush()


def test_a_frame_over_the_limit_is_refused_before_it_is_sent(pair: tuple[Connection, Connection]) -> None:
    left, _ = pair
    with pytest.raises(LocalProtocolError, match="smaller pieces"):
        left.send([bytes(FRAME_BYTES_MAX), b"x"])

    assert left.outgoing_bytes == 0


def test_a_frame_over_the_limit_is_refused_when_it_comes(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    left._sock.send(struct.pack(">I", FRAME_BYTES_MAX + 1))

    assert isinstance(wait_for_error(right), RemoteProtocolError)


def test_small_packets_are_not_held_back(tcp_sockets: tuple[socket.socket, socket.socket]) -> None:
    connection = Connection(tcp_sockets[0])

    assert connection._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- Sealed connections -----------------------------------------------------------------------------------------------


def test_two_nodes_meet_and_talk_sealed(loop: Loop) -> None:
    near = loop.connect()
    (far,) = loop.accepted

    assert near.session is not None and far.session is not None
    assert near.session.peer == identity("listener")
    assert far.session.peer == identity("dialler")
    blob = os.urandom(3_000_000)
    near.send([b"a", blob])
    far.send([blob, b"b"])
    assert wait_for_payloads(far, 1, near) == [b"a" + blob]
    assert wait_for_payloads(near, 1, far) == [blob + b"b"]


def test_the_largest_frame_passes_sealed(loop: Loop) -> None:
    near = loop.connect()
    near.send([bytes(FRAME_BYTES_MAX)])

    assert [len(payload) for payload in wait_for_payloads(loop.accepted[0], 1, near)] == [FRAME_BYTES_MAX]


def test_a_large_frame_directly_behind_the_handshake_is_not_taken_for_a_part_of_it(loop: Loop) -> None:
    near = loop.dial()
    while not loop.accepted:
        near.flush()
        loop.turn()
        if not loop.accepted:
            near.read()
    (far,) = loop.accepted
    far.send([bytes(1_000_000)])
    far.flush()
    assert not near.is_established, "its last message and the frame lie in the socket together"

    assert wait_for_payloads(near, 1, far) == [bytes(1_000_000)]


def test_nothing_is_sent_before_the_other_side_has_proven_itself(loop: Loop) -> None:
    near = loop.dial()

    with pytest.raises(AssertionError):
        near.send([b"too early"])


def test_a_byte_altered_on_the_way_ends_the_connection(tcp_sockets: tuple[socket.socket, socket.socket]) -> None:
    near, far = handshaken(*tcp_sockets)
    near.send([b"a command"])
    near._outgoing[0][6] ^= 1
    near.flush()

    assert isinstance(wait_for_error(far), AuthenticationFailed)


def handshaken(left: socket.socket, right: socket.socket) -> tuple[Connection, Connection]:
    near, far = Connection(left, FRAME_BYTES_MAX, dialling()), Connection(right, FRAME_BYTES_MAX, accepting())
    near.flush()
    for connection in (far, near, far, near):
        wait_until_ready(connection, selectors.EVENT_READ)
        connection.read()
    assert near.is_established and far.is_established
    return near, far


def test_a_relay_that_lured_a_client_and_keeps_its_authenticated_socket_can_inject_nothing(loop: Loop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as lure:
        near = start_dial("127.0.0.1", lure.getsockname()[1], dialling(role="client"), FRAME_BYTES_MAX)
        near.flush()
        to_client, _ = lure.accept()
    to_listener = loop.knock()
    with to_client, to_listener:
        to_client.setblocking(False)
        to_listener.setblocking(False)
        while not (near.is_established and loop.accepted):
            near.flush()
            relay(to_client, to_listener)
            loop.turn()
            relay(to_listener, to_client)
            near.read()
        (far,) = loop.accepted
        near.close()
        to_listener.sendall(b"".join(frame([b"a command of the relay", bytes(16)])))

        assert isinstance(wait_for_error(far), AuthenticationFailed)


def relay(source: socket.socket, target: socket.socket) -> None:
    try:
        target.sendall(source.recv(1 << 16))
    except BlockingIOError:
        return


# --- Dialling from a loop ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_port_where_nobody_listens_is_refused() -> None:
    connection = start_dial("127.0.0.1", free_port(), dialling())
    wait_until_ready(connection, selectors.EVENT_WRITE)
    with pytest.raises(ConnectionClosed) as raised:
        connection.flush()

    assert raised.value.how == "refused"
    connection.close()


def test_a_failed_dialling_stays_failed() -> None:
    connection = start_dial("127.0.0.1", free_port(), dialling())
    wait_until_ready(connection, selectors.EVENT_WRITE)
    for call in (connection.read, connection.flush, connection.read):
        with pytest.raises(ConnectionClosed, match="nobody listens there"):
            call()
    connection.close()


def test_a_host_name_is_not_looked_up_in_the_loop() -> None:
    with pytest.raises(ConnectionClosed) as raised:
        start_dial("localhost", 1, dialling())

    assert raised.value.how == "unreachable"


def test_a_socket_that_reached_itself_reached_nobody() -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    connection = Connection(sock, FRAME_BYTES_MAX, dialling(), is_connecting=True)

    with pytest.raises(ConnectionClosed) as raised:
        connection.flush()
    assert raised.value.how == "refused"
    connection.close()


# --- The door ---------------------------------------------------------------------------------------------------------


def test_a_stranger_with_another_key_is_told_why_and_the_node_hears_it_once(loop: Loop) -> None:
    for _ in range(3):
        with pytest.raises(AuthenticationFailed, match="p2pcluster key --set"):
            loop.connect(dialling(derive_key(b"another key")))

    assert loop.listener.refused_count == 3
    assert loop.listener.pending_count == 0
    assert len(loop.notes) == 1
    assert loop.notes[0].startswith("refused 127.0.0.1: the other side holds another key")
    assert loop.accepted == []


def test_a_node_of_another_version_is_told_so(loop: Loop) -> None:
    with pytest.raises(ProtocolError, match="protocol 2"):
        loop.connect(dialling(protocol=2))


def test_different_complaints_about_one_host_are_all_heard(loop: Loop) -> None:
    for handshake in (dialling(derive_key(b"another")), dialling(protocol=2)):
        with pytest.raises(ProtocolError):
            loop.connect(handshake)

    assert len(loop.notes) == 2


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4junk", b"\0\0\0\0", b"noise" * 700, struct.pack(">I", 4093)],
    ids=["http", "junk", "empty", "noise", "one byte too many"],
)
def test_garbage_is_closed_counted_and_answered_with_a_reason(loop: Loop, garbage: bytes) -> None:
    for _ in range(2):
        sock = loop.knock()
        sock.sendall(garbage)
        refused = loop.listener.refused_count
        loop.wait(lambda: loop.listener.refused_count == refused + 1)
        answer = received_until_closed(sock)
        sock.close()

        (refusal,) = FrameReader(4096).feed(answer)
        assert decode(refusal).kind == "refuse"
    assert len(loop.notes) == 1
    assert loop.listener.pending_count == 0


def test_garbage_byte_by_byte_is_refused_as_soon_as_it_can_be_told(loop: Loop) -> None:
    with loop.knock() as sock:
        for byte in b"GET":
            sock.send(bytes([byte]))
            loop.wait(lambda: loop.listener.pending_count == 1)
            loop.turn(0.01)
        assert loop.listener.refused_count == 0
        sock.send(b" ")
        loop.wait(lambda: loop.listener.refused_count == 1)


def test_a_stranger_may_send_so_much_in_all_and_not_in_each_message(loop: Loop) -> None:
    with loop.knock() as sock:
        hello = b"".join(frame(dialling().start() or []))
        left = config.PREAUTH_BYTES_MAX - len(hello) - 4
        sock.sendall(hello)
        loop.wait(lambda: loop.listener.pending_count == 1)
        sock.sendall(struct.pack(">I", left + 1))
        loop.wait(lambda: loop.listener.refused_count == 1)

        assert f"over the limit of {left}" in loop.notes[0]


def test_the_reader_of_a_stranger_has_room_for_no_more(loop: Loop) -> None:
    with loop.knock():
        loop.wait(lambda: loop.listener.pending_count == 1)
        (connection,) = loop.listener._since_s

        assert len(connection._reader.space()) <= config.PREAUTH_BYTES_MAX


def test_who_says_nothing_has_two_seconds(loop: Loop) -> None:
    with loop.knock() as sock:
        loop.wait(lambda: loop.listener.pending_count == 1)
        assert loop.listener.next_expiry_s == loop.now_s + 2.0
        loop.pass_time(1.999)
        assert loop.listener.pending_count == 1
        loop.pass_time(0.001)

        assert loop.listener.pending_count == 0
        assert loop.listener.next_expiry_s is None
        assert b"did not prove who it is within 2 s" in received_until_closed(sock)
    assert loop.notes == ["refused 127.0.0.1: it did not prove who it is within 2 s"]


def test_who_sends_a_byte_now_and_then_has_two_seconds_too(loop: Loop) -> None:
    with loop.knock() as sock:
        hello = b"".join(frame(dialling().start() or []))
        for byte in hello[:20]:
            sock.send(bytes([byte]))
            loop.wait(lambda: loop.listener.pending_count == 1)
            loop.pass_time(0.09)
            loop.turn(0.01)
        loop.pass_time(0.2)

        assert loop.listener.pending_count == 0


def test_who_leaves_before_saying_anything_is_not_counted(loop: Loop) -> None:
    with loop.knock():
        loop.wait(lambda: loop.listener.pending_count == 1)
    loop.wait(lambda: loop.listener.pending_count == 0)

    assert loop.listener.refused_count == 0
    assert loop.notes == []


def test_silent_strangers_take_sixteen_places_and_no_more_and_lose_them_to_who_waits(loop: Loop) -> None:
    silent = [loop.knock() for _ in range(20)]
    loop.wait(lambda: loop.listener.pending_count == 16)
    for _ in range(5):
        loop.turn()
    assert loop.listener.pending_count == 16
    assert loop.listener not in [key.fileobj for key in loop.selector.get_map().values()], "or the loop would spin"

    honest = loop.dial()
    honest.flush()
    assert loop.listener.next_expiry_s == loop.now_s + 0.25
    loop.pass_time(0.249)
    assert loop.listener.pending_count == 16
    loop.pass_time(0.001)
    loop.drive(honest)

    assert loop.listener.pending_count == 4
    for sock in silent:
        sock.close()


def test_a_herd_of_honest_nodes_all_gets_in_without_one_being_dropped(loop: Loop) -> None:
    herd = [loop.dial(dialling(name=f"n{number}")) for number in range(40)]
    deadline_s = time.monotonic() + PATIENCE_S
    while not all(connection.is_established for connection in herd):
        assert time.monotonic() < deadline_s
        for connection in herd:
            connection.flush()
            connection.read()
        loop.turn()
        assert loop.listener.pending_count <= 16

    assert loop.listener.refused_count == 0
    assert len({connection.session.peer.name for connection in loop.accepted if connection.session}) == 40


def test_a_machine_out_of_descriptors_pauses_instead_of_spinning(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with loop.knock():
        real = loop.listener._sock
        monkeypatch.setattr(loop.listener, "_sock", Exhausted())
        loop.listener.ready(loop.listener, loop.now_s)
        monkeypatch.setattr(loop.listener, "_sock", real)
        loop.turn()
        assert loop.listener.pending_count == 0, "it does not even look"
        assert "ulimit -n" in loop.notes[0]
        expiry_s = loop.listener.next_expiry_s
        assert expiry_s is not None
        loop.pass_time(expiry_s - loop.now_s)

        loop.wait(lambda: loop.listener.pending_count == 1)


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.EHOSTUNREACH, errno.EPERM])
def test_a_newcomer_whose_network_fails_does_not_harm_the_node(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Failing:
        def accept(self) -> None:
            raise OSError(number, os.strerror(number))

    real = loop.listener._sock
    monkeypatch.setattr(loop.listener, "_sock", Failing())
    assert loop.listener.ready(loop.listener, loop.now_s) == []
    monkeypatch.setattr(loop.listener, "_sock", real)
    near = loop.connect()

    assert near.is_established


def test_a_taken_port_is_said_in_one_line_with_what_to_do(loop: Loop) -> None:
    port = loop.listener.address[1]
    with pytest.raises(PortTaken) as raised:
        Listener("127.0.0.1", port, accepting)

    assert isinstance(raised.value, HomeError)
    assert str(raised.value).isprintable()
    assert f"port {port}" in str(raised.value) and "--port" in str(raised.value)


@pytest.mark.parametrize("address", ["192.0.2.1", "no such host.invalid"])
def test_an_address_that_is_not_ours_is_said_with_what_to_do(address: str) -> None:
    with pytest.raises(HomeError, match="--bind") as raised:
        Listener(address, 0, accepting)
    assert not isinstance(raised.value, PortTaken)


def test_a_restarted_node_gets_its_port_back_at_once(loop: Loop) -> None:
    loop.connect()
    port = loop.listener.address[1]
    for connection in loop.accepted:
        connection.close()
    loop.listener.close()

    again = Listener("127.0.0.1", port, accepting)
    assert again.address == ("127.0.0.1", port)
    again.close()


def test_closing_leaves_nothing_in_the_selector_and_nobody_connected(loop: Loop) -> None:
    with loop.knock() as sock:
        loop.wait(lambda: loop.listener.pending_count == 1)
        loop.listener.close()

        assert len(loop.selector.get_map()) == 0
        assert received_until_closed(sock) == b""


# --- A blocking connection --------------------------------------------------------------------------------------------


class EchoNode:
    """A node in a thread: answers each payload with the same, or stays silent, until it is told to stop."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.address = self.loop.listener.address
        self.is_answering = threading.Event()
        self.is_answering.set()
        self.is_reading = threading.Event()
        self.is_reading.set()
        self.injected = b""
        self._stop, self._stopped = socket.socketpair()
        self.loop.selector.register(self._stopped, selectors.EVENT_READ, "stop")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._stop.send(b"x")
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._stop.close()
        self._stopped.close()

    def _run(self) -> None:
        selector = self.loop.selector
        while True:
            for key, _ in selector.select():
                if key.data == "stop":
                    self.loop.close()
                    return
                if key.data is self.loop.listener:
                    for connection in self.loop.listener.ready(key.fileobj, 0.0):
                        self.loop.accepted.append(connection)
                        selector.register(connection, selectors.EVENT_READ, connection)
                else:
                    self._echo(key.data)

    def _echo(self, connection: Connection) -> None:
        self.is_reading.wait(PATIENCE_S)
        try:
            payloads = connection.read()
        except ConnectionClosed:
            self.loop.selector.unregister(connection)
            return
        self.is_answering.wait(PATIENCE_S)
        if self.injected:
            connection._sock.send(self.injected)
        for payload in payloads:
            connection.send([payload])
        while connection.wants_write:
            wait_until_ready(connection, selectors.EVENT_WRITE)
            connection.flush()


@pytest.fixture
def node() -> Iterator[EchoNode]:
    made = EchoNode()
    yield made
    made.is_reading.set()
    made.is_answering.set()
    made.stop()


def test_a_client_asks_and_is_answered(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S, FRAME_BYTES_MAX) as client:
        assert client.peer == identity("listener")
        for size in (0, 10, 3_000_000):
            client.send([b"q", bytes(size)])
            assert client.receive(PATIENCE_S) == b"q" + bytes(size)


def test_several_answers_in_one_piece_are_given_one_by_one(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S, FRAME_BYTES_MAX) as client:
        for number in range(20):
            client.send([bytes([number])])
        assert [bytes(client.receive(PATIENCE_S)) for _ in range(20)] == [bytes([number]) for number in range(20)]


def test_threads_send_whole_frames_beside_each_other(node: EchoNode) -> None:
    def ask(number: int) -> None:
        for _ in range(20):
            client.send([bytes([number]) * (10 if number % 2 else 100_000)])

    with dial(*node.address, dialling(role="client"), PATIENCE_S, FRAME_BYTES_MAX) as client:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        answers = [bytes(client.receive(PATIENCE_S)) for _ in range(80)]
        for thread in threads:
            thread.join(PATIENCE_S)

    assert all(len(set(answer)) == 1 for answer in answers)
    assert sorted(answer[0] for answer in answers) == sorted(list(range(4)) * 20)


def test_where_nobody_listens_there_is_no_cluster() -> None:
    port = free_port()
    with pytest.raises(ClusterNotFound, match=f"127.0.0.1:{port}"):
        dial("127.0.0.1", port, dialling(), PATIENCE_S)


def test_a_client_with_another_key_is_told_what_to_do(node: EchoNode) -> None:
    with pytest.raises(AuthenticationFailed, match="p2pcluster key --set") as raised:
        dial(*node.address, dialling(derive_key(b"another")), PATIENCE_S)
    assert str(raised.value).startswith("127.0.0.1:")


def test_a_client_of_another_version_is_told_so(node: EchoNode) -> None:
    with pytest.raises(ProtocolError, match="protocol 2"):
        dial(*node.address, dialling(protocol=2), PATIENCE_S)


def test_who_accepts_and_never_answers_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(Unavailable, match="does not answer"):
        dial("127.0.0.1", server.getsockname()[1], dialling(), 0.05)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\0\0\0\2{}"])
def test_another_program_on_the_port_is_recognised(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_once, args=(server, answer))
        thread.start()
        with pytest.raises(RemoteProtocolError) as raised:
            dial("127.0.0.1", server.getsockname()[1], dialling(), PATIENCE_S)
        thread.join(PATIENCE_S)
    assert str(raised.value).isprintable()


def answer_once(server: socket.socket, answer: bytes) -> None:
    sock, _ = server.accept()
    with sock:
        sock.sendall(answer)
        sock.settimeout(PATIENCE_S)
        while sock.recv(1 << 16):
            pass


def test_who_closes_before_answering_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with pytest.raises(Unavailable, match="before it had answered") as raised:
            dial("127.0.0.1", server.getsockname()[1], dialling(), PATIENCE_S)
        thread.join(PATIENCE_S)
    assert raised.value.definite is False


def test_an_answer_that_is_late_can_still_be_received(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S) as client:
        node.is_answering.clear()
        client.send([b"question"])
        with pytest.raises(Unavailable, match="no answer within 0.01 s"):
            client.receive(0.01)
        node.is_answering.set()

        assert client.receive(PATIENCE_S) == b"question"


def test_waiting_no_time_takes_what_is_there(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S) as client:
        client.send([b"question"])
        wait_until_ready(client._connection, selectors.EVENT_READ)

        assert client.receive(0) == b"question"
        with pytest.raises(Unavailable):
            client.receive(0)


def test_a_node_that_takes_nothing_is_unavailable(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S) as client:
        client._send_timeout_s = 0.05
        node.is_reading.clear()
        with pytest.raises(Unavailable, match="takes no more data"):
            for _ in range(10):
                client.send([bytes(FRAME_BYTES_MAX)])


def test_a_node_that_goes_away_is_unavailable(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S) as client:
        node.stop()

        with pytest.raises(ConnectionClosed):
            client.receive(PATIENCE_S)


def test_an_injected_frame_leaves_the_outcome_open(node: EchoNode) -> None:
    with dial(*node.address, dialling(role="client"), PATIENCE_S) as client:
        node.injected = b"".join(frame([b"done!", bytes(16)]))
        client.send([b"question"])

        with pytest.raises(Unavailable, match="unusable") as raised:
            client.receive(PATIENCE_S)
        assert raised.value.definite is False
        with pytest.raises(ConnectionClosed, match="by this side"):
            client.receive(PATIENCE_S)


def test_an_answer_that_comes_in_drops_does_not_outlast_the_deadline(
    node: EchoNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now_s = 0.0

        def monotonic(self) -> float:
            self.now_s += 10.0
            return self.now_s

    with dial(*node.address, dialling(role="client"), PATIENCE_S, FRAME_BYTES_MAX) as client:
        client.send([bytes(1_000_000)])
        wait_until_ready(client._connection, selectors.EVENT_READ)
        monkeypatch.setattr(stream, "READ_BYTES_MAX", 1)
        monkeypatch.setattr(stream, "time", Clock())

        with pytest.raises(Unavailable, match="no answer within 1 s"):
            client.receive(1.0)


def test_closing_wakes_the_thread_that_receives(node: EchoNode, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = []
    is_about_to_wait = threading.Event()
    real_wait = stream._wait

    def wait(connection: Connection, event: int, deadline_s: float | None) -> bool:
        is_about_to_wait.set()
        return real_wait(connection, event, deadline_s)

    def receive(client: BlockingConnection) -> None:
        try:
            client.receive(None)
        except ConnectionClosed as error:
            errors.append(error)

    client = dial(*node.address, dialling(role="client"), PATIENCE_S)
    monkeypatch.setattr(stream, "_wait", wait)
    thread = threading.Thread(target=receive, args=(client,), daemon=True)
    thread.start()
    assert is_about_to_wait.wait(PATIENCE_S)
    client.close()
    thread.join(PATIENCE_S)

    assert not thread.is_alive()
    assert len(errors) == 1
