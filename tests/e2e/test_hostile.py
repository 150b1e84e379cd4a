"""A running node and somebody who means no good: with the key, without it, and between two who have it.

After each attack the node still is the same process, answers an honest client, has told a person once, and holds what it held.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from harness import NodeProcess, Site, wait_for

from p2pcluster import config
from p2pcluster.core import protocol
from p2pcluster.core.codec import Message, decode, encode, encode_bytes, frame
from p2pcluster.core.commands import Port, lengths_blob, put
from p2pcluster.core.handshake import Handshake, Identity, derive_key
from p2pcluster.errors import ClusterError, Unavailable
from p2pcluster.lan import Lan
from p2pcluster.stream import BlockingConnection, dial
from tests import hostile

CORPUS = Path(__file__).parents[1] / "golden" / "hostile.txt"
FUZZ_MESSAGES = int(os.environ.get("HOSTILE_MESSAGES", "400"))  # by hand: more, and another seed
FUZZ_SEED = int(os.environ.get("HOSTILE_SEED", "1"))


class Target:
    """A node with a pipeline to attack, one whose items must stay as they are, and one with a large item."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder)
        self.node: NodeProcess = self.site.hands()
        self.address = ("127.0.0.1", self.site.port)
        self.key = derive_key(self.site.key_file.read_bytes().strip())
        self.honest = self.connect()
        self.sequence = 0
        for name, version in ((hostile.NAME, "0" * 64), ("good", "1" * 64), ("large", "2" * 64)):
            for message in hostile.deploying(name, version):
                assert ask(self.honest, message).fields["result"] == "ok"

    def identity(self, **changes: Any) -> Identity:
        known: dict[str, Any] = {
            "node_id": secrets.token_hex(8), "boot_id": secrets.token_hex(8), "role": "client", "name": "test", "cluster_name": "default",
            "cluster_id": None, "protocol": protocol.VERSION, "package": "0", "python": "3",
        }
        return Identity(**{**known, **changes})

    def handshake(self, **changes: Any) -> Handshake:
        return Handshake("dial", changes.pop("key", self.key), self.identity(**changes), secrets.token_bytes(32))

    def connect(self, **changes: Any) -> BlockingConnection:
        return dial(*self.address, self.handshake(**changes), 20.0)

    def knock(self) -> socket.socket:
        return socket.create_connection(self.address, 10)

    def is_well(self) -> None:
        """The same process takes in an item of somebody who was connected all the time, and of somebody who comes now."""
        self.sequence += 1
        item = put("client:honest", 1, self.sequence, [Port(["good/in"], lengths_blob([1]), b"1")])
        assert ask(self.honest, item).fields == {"req": 9, "kind": "put", "result": "ok", "seq": self.sequence, "added": 1}
        with self.connect() as newcomer:
            status = ask(newcomer, Message("status", {})).fields["status"]
        (queue,) = (queue for queue in status["queues"] if (queue["pipeline"], queue["name"]) == ("good", "in"))
        assert queue["ready"] + queue["leased"] + queue["delayed"] + queue["parked"] == self.sequence
        assert self.node.is_running
        assert not any("Traceback" in line for line in self.node.errors), self.node.errors


def ask(connection: BlockingConnection, message: Message) -> Message:
    connection.send(encode(message._replace(fields={**message.fields, "req": 9})))
    while True:
        answer = decode(connection.receive(20))
        if answer.fields.get("req") == 9:
            return answer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("hostile"))
    yield made
    made.honest.close()
    made.site.close()


def until_closed(sock: socket.socket) -> bytes:
    """What it still says before it closes."""
    sock.settimeout(20)
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 16):
            said += piece
    return said


def corpus() -> list[bytes]:
    return [bytes.fromhex(line.partition(" ")[0]) for line in CORPUS.read_text().splitlines() if line and not line.startswith("#")]


# ---- with the key


def test_requests_of_every_kind_mangled_are_answered_or_end_their_connection_and_nobody_elses(target: Target) -> None:
    random = Random(FUZZ_SEED)
    answered = ended = 0
    connection = target.connect()
    for _ in range(FUZZ_MESSAGES):
        message = hostile.mangled(random.choice(hostile.requests()), random)
        if message.kind in ("stop", "leave"):
            continue
        try:
            connection.send(encode(message))
            ask(connection, Message("status", {}))
            answered += 1
        except Unavailable:
            ended += 1
            connection.close()
            connection = target.connect()
    connection.close()
    target.is_well()
    assert answered > FUZZ_MESSAGES // 10 and ended > FUZZ_MESSAGES // 10
    assert sum("a client at 127.0.0.1 was refused" in line for line in target.node.lines) == 1, "it is told once"


def test_a_node_that_holds_the_key_and_says_anything_ends_its_own_connection_and_nothing_else(tmp_path: Path) -> None:
    target = Target(tmp_path)
    random, me, there = Random(FUZZ_SEED), secrets.token_hex(8), target.honest.peer.node_id
    said = [*hostile.from_executor(), *hostile.between_nodes(me, there)]
    ended = 0
    peer = target.connect(node_id=me, role="node")
    peer.send(encode(hostile.from_executor()[0]))
    for _ in range(FUZZ_MESSAGES):
        message = hostile.mangled(random.choice(said), random)
        if message.kind in hostile.FATAL:
            continue
        try:
            peer.send(encode(message))
        except Unavailable:
            ended += 1
            peer.close()
            peer = target.connect(node_id=me, role="node")
    target.is_well()
    refused = ask(target.honest, Message("status", {})).fields["status"]["network"]["refused_connections"]
    assert refused >= ended > FUZZ_MESSAGES // 40
    assert sum("its connection is closed" in line for line in target.node.lines) == 1, "it is told once"
    peer.close()
    target.honest.close()
    target.site.close()


def test_a_pickle_that_would_do_something_is_carried_and_never_loaded(target: Target) -> None:
    witness = target.site.folder / "loaded"
    evil = f"cos\nsystem\n(S'touch {witness}'\ntR.".encode()
    with target.connect() as client:
        item = put(f"client:{secrets.token_hex(4)}", 1, 1, [Port([f"{hostile.NAME}/in"], lengths_blob([len(evil)]), evil)])
        ask(client, item)
        client.send([evil])
        with pytest.raises(Unavailable):
            client.receive(20)
    target.is_well()
    assert not witness.exists()


def test_who_asks_much_and_takes_no_answers_is_answered_once_he_does_and_others_meanwhile(target: Target) -> None:
    body, asked, queue = bytes(1 << 20), 90, "large/in"
    with target.connect() as client:
        item = put("client:large", 1, 1, [Port([queue], lengths_blob([len(body)]), body)])
        assert ask(client, item).fields["result"] == "ok"
        for number in range(asked):
            client.send(encode(Message("read", {"queue": queue, "after": 0, "count": 1000, "req": 100 + number})))
        target.is_well()
        answers = [decode(client.receive(20)) for _ in range(asked)]
        assert [(answer.kind, answer.fields["req"]) for answer in answers] == [("values", 100 + number) for number in range(asked)]


@pytest.mark.parametrize("part", [1, 4, 40, 700_000])
def test_a_client_that_dies_in_the_middle_of_a_frame_has_put_nothing(target: Target, part: int) -> None:
    body = bytes(1 << 20)
    client = target.connect()
    item = put("client:dies", 1, 1, [Port(["good/in"], lengths_blob([1 << 19] * 2), body)])
    sealed = b"".join(frame(client.session.sealer.seal(encode(item._replace(fields={**item.fields, "req": 1})))))
    client._connection._sock.setblocking(True)
    client._connection._sock.sendall(sealed[:part])
    client.close()
    target.is_well()


def test_frames_that_are_too_long_or_not_of_this_connection_end_it(target: Target) -> None:
    with target.connect() as one, target.connect() as other:
        spliced = b"".join(frame(one.session.sealer.seal(encode(Message("status", {"req": 1})))))
        other._connection._sock.sendall(spliced)
        with pytest.raises(Unavailable):
            other.receive(20)
    with target.connect() as client:
        client._connection._sock.sendall(struct.pack(">I", config.FRAME_BYTES_MAX + 17))
        with pytest.raises(Unavailable):
            client.receive(20)
    with target.connect() as client:
        client.send(encode(Message("status", {"req": 1}, (bytes(config.REQUEST_BYTES_MAX),))))
        with pytest.raises(Unavailable):
            client.receive(20)
    target.is_well()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:0", "", "x" * 3000, 7, None])
def test_a_node_that_says_nonsense_about_itself_is_done_without(target: Target, address: object) -> None:
    with contextlib.suppress(ClusterError), target.connect(role="node", facts={"address": address, "members": 5}) as peer:
        for leader_address in ("nowhere", "127.0.0.1:99999", "\ud800"):
            fields = {"cluster_id": None, "leader": peer.session.me.node_id, "leader_address": leader_address, "term": 9}
            peer.send(encode(Message("hello", fields)))
            decode(peer.receive(5))
    target.is_well()


# ---- without it


def test_the_corpus_of_garbage_is_refused_by_tcp_and_by_udp_and_told_once(target: Target) -> None:
    payloads = corpus()
    assert len(payloads) > 20
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for payload in payloads:
            for data in (payload, payload[: len(payload) // 2], payload * 9):
                out.sendto(data[:9000], ("127.255.255.255", target.site.port))
                with target.knock() as stranger:
                    stranger.sendall(data)
                    stranger.shutdown(socket.SHUT_WR)
                    assert len(until_closed(stranger)) < config.PREAUTH_BYTES_MAX
    target.is_well()
    strange = [line for line in target.node.lines if "127.0.0.1" in line and "127.0.0.1:" not in line]
    assert len(strange) == len(set(strange)) < 15, strange


def test_datagrams_of_its_own_altered_cut_or_sent_back_and_random_ones_change_nothing(target: Target) -> None:
    random = Random(FUZZ_SEED)
    with Lan("127.0.0.1", target.site.port) as lan:
        recorded: list[bytes] = []
        wait_for(lambda: recorded.extend(data for data, _ in lan.receive()) or recorded, "it says something by broadcast")
        before = len(target.node.lines)
        for _ in range(FUZZ_MESSAGES):
            data = bytearray(random.choice(recorded))
            trick = random.randrange(5)
            if trick == 0:
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            elif trick == 1:
                del data[random.randrange(len(data)) :]
            elif trick == 2:
                data += random.randbytes(random.randrange(1, 400))
            elif trick == 3:
                data = bytearray(random.randbytes(random.randrange(1200)))
            lan.broadcast(bytes(data[: config.DATAGRAM_BYTES_MAX]))
        target.is_well()
    said = target.node.lines[before:]
    assert len(said) == len(set(said)) <= 8, said


def test_an_honest_handshake_cut_or_half_closed_at_each_byte_of_its_steps_is_no_session(target: Target) -> None:
    hello = b"".join(frame(target.handshake().start() or []))
    for end in [*range(0, len(hello), 37), len(hello)]:
        with target.knock() as stranger:
            stranger.sendall(hello[:end])
            stranger.shutdown(socket.SHUT_WR)
            until_closed(stranger)
    with target.knock() as stranger:  # his proof is of another conversation
        stranger.sendall(hello)
        stranger.recv(4096)
        stranger.sendall(b"".join(frame([encode_bytes(Message("proof", {}, (encode_bytes(Message("facts", {})), bytes(32))))])))
        assert b"could not prove" in until_closed(stranger)
    target.is_well()


def test_another_key_cluster_or_version_is_told_on_both_sides_with_what_to_do_and_here_once(tmp_path: Path) -> None:
    target = Target(tmp_path)
    for changes in ({"key": derive_key(b"another")}, {"protocol": 77}, {"cluster_name": "other"}):
        for _ in range(5):
            with pytest.raises(ClusterError, match=r"--set|--cluster|install one version"):
                target.connect(**changes)
    for says in ("holds another key", "speaks protocol 77"):
        target.node.wait_for_line(says)
    target.is_well()
    network = ask(target.honest, Message("status", {})).fields["status"]["network"]
    assert network == {"refused_connections": 15, "refused_datagrams": 0, "refused_clients": 0}
    shown = target.site.do("status").lines
    assert any(line.startswith("refused at ") and line.endswith("since its start: 15 connections") for line in shown), shown
    assert sum("refused 127.0.0.1" in line for line in target.node.lines) == 2, "once for each kind of trouble"
    target.honest.close()
    target.node.stop()
    target.node.wait_for_line("refused since the start: 15 connections")
    target.site.close()


def test_five_hundred_who_say_nothing_and_some_who_say_a_byte_now_and_then_shut_nobody_out(target: Target) -> None:
    with contextlib.ExitStack() as stack:
        crowd = []
        for _ in range(500):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(target.address)
            crowd.append(sock)
        began_s = time.monotonic()
        newcomer = target.connect()
        for sock in crowd:
            with contextlib.suppress(OSError):
                sock.send(b"\0")
        assert ask(newcomer, Message("status", {})).fields["result"] == "ok"
        newcomer.close()
        assert time.monotonic() - began_s < 20
    wait_for(lambda: open_sockets(target.node.pid) < 60, "those who went are let go")
    target.is_well()


def open_sockets(pid: int) -> int:
    return sum(1 for name in os.listdir(f"/proc/{pid}/fd") if "socket" in _link(f"/proc/{pid}/fd/{name}"))


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


# ---- between two


def test_what_a_node_said_sent_back_to_it_or_over_another_session_counts_for_nothing(target: Target) -> None:
    """The middleman lets a handshake through, keeps what was said, and says it again: to the same side, and in another session."""
    with target.connect() as client:
        item = put("client:replay", 1, 1, [Port(["good/in"], lengths_blob([1]), b"1")])
        recorded = b"".join(frame(client.session.sealer.seal(encode(item))))
        sock = client._connection._sock
        sock.setblocking(True)
        sock.sendall(recorded[:-1] + bytes([recorded[-1] ^ 1]))
        with pytest.raises(Unavailable):
            client.receive(20)
    with target.knock() as first, target.knock() as second:
        hello = b"".join(frame(target.handshake().start() or []))
        first.sendall(hello)
        welcome = first.recv(4096)
        second.sendall(welcome)  # its own word, sent back
        assert b"refuse" in until_closed(second)
    target.is_well()
