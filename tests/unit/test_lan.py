"""UDP as the node uses it: several on one machine, hosts with addresses of their own, ways that fail.

No packet leaves this machine: what is not on the loopback is between network namespaces that the tests make.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.namespaces import Switch, namespaces_can_be_made

from p2pcluster import config, lan
from p2pcluster.config import Address
from p2pcluster.errors import HomeError
from p2pcluster.lan import Interface, Lan, Seeds

ROOT = Path(__file__).parents[2]
WAIT_S = 10.0


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def make(port: int) -> Iterator[Callable[..., Lan]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(Lan("127.0.0.1", port, **options))


def wait_for(receiver: Lan, count: int) -> list[tuple[bytes, Address]]:
    """What has come as soon as it is so many."""
    received: list[tuple[bytes, Address]] = []
    deadline_s = time.monotonic() + WAIT_S
    while len(received) < count:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, f"{len(received)} of {count} datagrams came"
        select.select(receiver.sockets(), [], [], left_s)
        received += receiver.receive()
    return received


# --- On the loopback


def test_every_node_of_a_machine_hears_a_broadcast_the_sender_too(make: Callable[..., Lan]) -> None:
    nodes = [make() for _ in range(4)]
    nodes[0].broadcast(b"here I am")
    for node in nodes:
        assert wait_for(node, 1) == [(b"here I am", Address("127.0.0.1", nodes[0].own_port))]


def test_a_datagram_to_a_nodes_own_port_reaches_it_alone(make: Callable[..., Lan]) -> None:
    nodes = [make() for _ in range(3)]
    nodes[0].send(b"for you", Address("127.0.0.1", nodes[1].own_port))
    assert wait_for(nodes[1], 1) == [(b"for you", Address("127.0.0.1", nodes[0].own_port))]
    nodes[0].broadcast(b"for all")
    assert wait_for(nodes[2], 1)[0][0] == b"for all"


def test_whoever_is_heard_can_be_answered_where_he_was_heard(make: Callable[..., Lan]) -> None:
    one, other = make(), make()
    one.broadcast(b"anybody?")
    ((_, address),) = wait_for(other, 1)
    other.send(b"yes", address)
    assert (b"yes", Address("127.0.0.1", other.own_port)) in wait_for(one, 2)


def test_receive_never_waits(make: Callable[..., Lan]) -> None:
    assert make().receive() == []


def test_one_call_of_receive_is_bounded_and_the_next_goes_on(
    make: Callable[..., Lan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lan, "RECEIVED_MAX", 4)
    one, other = make(), make()
    said = [bytes([number]) for number in range(10)]
    for data in said:
        one.send(data, Address("127.0.0.1", other.own_port))
    sizes: list[int] = []
    received: list[bytes] = []
    while len(received) < len(said):
        select.select(other.sockets(), [], [], WAIT_S)
        batch = other.receive()
        sizes.append(len(batch))
        received += [data for data, _ in batch]
    assert received == said
    assert max(sizes) <= 4


def test_a_flood_on_one_socket_leaves_room_for_the_other(
    make: Callable[..., Lan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lan, "RECEIVED_MAX", 4)
    one, other = make(), make()
    for _ in range(20):
        one.send(b"flood", Address("127.0.0.1", other.own_port))
    one.broadcast(b"beacon")
    select.select([other.sockets()[0]], [], [], WAIT_S)
    assert b"beacon" in [data for data, _ in other.receive()]


def test_a_datagram_that_is_too_long_is_seen_to_be(make: Callable[..., Lan]) -> None:
    node = make()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(bytes(5000), ("127.0.0.1", node.own_port))
        ((data, _),) = wait_for(node, 1)
    assert len(data) == config.DATAGRAM_BYTES_MAX + 1


def test_what_went_through_is_counted(make: Callable[..., Lan]) -> None:
    one, other = make(), make()
    one.broadcast(b"12345")
    one.send(b"123", Address("127.0.0.1", other.own_port))
    wait_for(other, 2)
    sent, heard = one.statistics(), other.statistics()
    assert (sent.broadcasts, sent.sent, sent.sent_bytes, sent.failed) == (1, 2, 8, 0)
    assert (heard.heard_shared, heard.heard_own, heard.heard_bytes) == (1, 1, 8)
    assert one.interfaces() == [Interface("loopback", "127.0.0.1", "127.255.255.255", sent=1)]


def test_nothing_is_sent_to_another_machine_from_the_loopback(make: Callable[..., Lan]) -> None:
    node = make()
    for _ in range(3):
        node.send(b"x", Address("192.0.2.1", 47400))
    assert (node.statistics().sent, node.statistics().failed) == (0, 3)
    (note,) = node.take_notes()
    assert "--bind 127.0.0.1" in note


def test_clusters_on_different_ports_do_not_hear_each_other(make: Callable[..., Lan]) -> None:
    one, same = make(), make()
    with Lan("127.0.0.1", free_port()) as other:
        one.broadcast(b"x")
        wait_for(same, 1)
        assert other.receive() == []


def test_a_node_that_hears_the_network_ignores_the_loopback(make: Callable[..., Lan], port: int) -> None:
    # 0.0.0.0 is bound and nothing is sent from it: what it would send to is made up.
    away = [Interface("made-up", "192.0.2.2", "192.0.2.255")]
    with Lan("0.0.0.0", port, find_interfaces=lambda: away) as outside:
        inside = make()
        inside.broadcast(b"x")
        wait_for(inside, 1)
        select.select([outside.sockets()[0]], [], [], WAIT_S)
        assert outside.receive() == []
        assert outside.statistics().dropped == 1


def test_without_a_network_the_nodes_of_a_machine_meet_on_the_loopback(port: int) -> None:
    with (
        Lan("0.0.0.0", port, find_interfaces=list) as one,
        Lan("0.0.0.0", port, find_interfaces=list) as other,
    ):
        one.broadcast(b"x")
        assert wait_for(other, 1)[0][0] == b"x"


def test_the_loopback_takes_the_port_nowhere_else(make: Callable[..., Lan], port: int) -> None:
    make()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port))


def test_a_port_that_a_program_holds_alone_is_an_error_with_a_remedy(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.255.255.255", port))
        with pytest.raises(HomeError, match="another --port"):
            Lan("127.0.0.1", port)


def test_an_address_of_another_machine_is_an_error_with_a_remedy(port: int) -> None:
    with pytest.raises(HomeError, match="--bind"):
        Lan("192.0.2.77", port)


def test_closing_gives_the_ports_back(port: int) -> None:
    Lan("127.0.0.1", port).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.255.255.255", port))


def test_the_multicast_of_other_systems_stays_on_the_machine(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Linux can do what macOS needs, so at least the sockets are right; a time to live of 0 keeps it here.
    monkeypatch.setattr(sys, "platform", "darwin")
    with Lan("127.0.0.1", port) as one, Lan("127.0.0.1", port) as other:
        one.broadcast(b"x")
        assert wait_for(other, 1) == [(b"x", Address("127.0.0.1", one.own_port))]
        assert other.interfaces()[0].broadcast == lan.LOOPBACK_GROUP
        assert one.sockets()[1].getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 0


def test_where_interfaces_cannot_be_asked_the_limited_broadcast_is_used(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with Lan("0.0.0.0", port) as node:
        assert [interface.broadcast for interface in node.interfaces()] == ["255.255.255.255"]


# --- What the network does


class FailingSocket:
    """A socket whose errors the test chooses; it sends nothing."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.sent: list[tuple[bytes, Any]] = []
        self.send_errors: dict[str, int] = {}
        self.receive_errors: Iterator[int] = iter(())

    def sendto(self, data: bytes, address: tuple[str, int]) -> int:
        if address[0] in self.send_errors:
            number = self.send_errors[address[0]]
            raise OSError(number, os.strerror(number))
        self.sent.append((data, address[0]))
        return len(data)

    def recvfrom(self, size: int) -> tuple[bytes, tuple[str, int]]:
        for number in self.receive_errors:
            raise OSError(number, os.strerror(number))
        received: tuple[bytes, tuple[str, int]] = self.real.recvfrom(size)
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


WIRED, WIRELESS = Interface("eth0", "192.0.2.2", "192.0.2.255"), Interface("wlan0", "198.51.100.2", "198.51.100.255")


class Network:
    """A node with interfaces that do not exist, a socket that sends nothing, and a clock."""

    def __init__(self, port: int) -> None:
        self.interfaces = [WIRED, WIRELESS]
        self.now_s = 0.0
        self.node = Lan("0.0.0.0", port, clock_s=lambda: self.now_s, find_interfaces=lambda: self.interfaces)
        self.socket = FailingSocket(self.node._own)
        self.node._own = self.socket  # type: ignore[assignment]

    @property
    def reached(self) -> list[str]:
        reached = [to for _, to in self.socket.sent]
        self.socket.sent.clear()
        return reached


@pytest.fixture
def network(port: int) -> Iterator[Network]:
    network = Network(port)
    yield network
    network.node.close()


def test_a_broadcast_goes_to_every_interface(network: Network) -> None:
    network.node.broadcast(b"x")
    assert network.reached == ["192.0.2.255", "198.51.100.255"]


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOBUFS, errno.EPERM])
def test_an_interface_that_fails_is_told_once_and_tried_each_time(network: Network, number: int) -> None:
    network.socket.send_errors["192.0.2.255"] = number
    for _ in range(3):
        network.node.broadcast(b"x")
    assert network.reached == 3 * ["198.51.100.255"]
    (note,) = network.node.take_notes()
    assert "eth0" in note and os.strerror(number) in note and "\n" not in note
    assert network.node.interfaces()[0].error == os.strerror(number)
    network.socket.send_errors.clear()
    network.node.broadcast(b"x")
    assert network.reached == ["192.0.2.255", "198.51.100.255"]
    assert [(way.sent, way.error) for way in network.node.interfaces()] == [(1, ""), (4, "")]


def test_a_firewall_is_named(network: Network) -> None:
    network.socket.send_errors["192.0.2.255"] = errno.EPERM
    network.node.broadcast(b"x")
    assert "firewall" in network.node.take_notes()[0]


def test_macos_privacy_is_named(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    network.socket.send_errors["192.0.2.255"] = errno.EHOSTUNREACH
    monkeypatch.setattr(sys, "platform", "darwin")
    network.node.broadcast(b"x")
    assert "Local Network" in network.node.take_notes()[0]


def test_an_address_that_cannot_be_reached_is_told_once(network: Network) -> None:
    network.socket.send_errors["192.0.2.9"] = errno.EHOSTUNREACH
    for _ in range(3):
        network.node.send(b"x", Address("192.0.2.9", 1))
    assert len(network.node.take_notes()) == 1
    assert network.node.statistics().failed == 3


def test_interfaces_that_come_and_go_are_noticed(network: Network) -> None:
    network.node.broadcast(b"x")
    network.interfaces = [WIRELESS, Interface("tun0", "203.0.113.2", "203.0.113.255")]
    network.now_s += lan.REFRESH_S
    network.socket.sent.clear()
    network.node.broadcast(b"x")
    assert network.reached == ["198.51.100.255", "203.0.113.255"]
    assert [way.sent for way in network.node.interfaces()] == [2, 1]


def test_interfaces_are_not_looked_up_for_each_broadcast(network: Network) -> None:
    network.interfaces = []
    network.node.broadcast(b"x")
    assert network.reached == ["192.0.2.255", "198.51.100.255"]


def test_a_node_that_is_bound_to_one_address_uses_its_interface_only(port: int) -> None:
    loopback = Interface("made-up", "127.0.0.5", "127.0.0.255")
    node = Lan("127.0.0.5", port, find_interfaces=lambda: [loopback])
    try:
        node.bind, node.is_loopback = "198.51.100.2", False
        node._find_interfaces = lambda: [WIRED, WIRELESS]
        assert [way.name for way in node._interfaces_in_use()] == ["wlan0"]
        node.bind = "198.51.100.77"  # a second address of an interface, which none reports
        assert [way.name for way in node._interfaces_in_use()] == ["eth0", "wlan0"]
    finally:
        node.close()


@pytest.mark.parametrize("number", [10054, errno.ECONNREFUSED, errno.ENETDOWN, errno.EINTR])
def test_an_error_that_is_reported_on_reading_stops_nothing(network: Network, number: int) -> None:
    network.socket.receive_errors = iter([number] * 3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"x", ("127.0.0.1", network.node.own_port))
        select.select([network.socket.real], [], [], WAIT_S)
        assert [data for data, _ in network.node.receive()] == [b"x"]
    assert network.node.statistics().dropped == 3


def test_a_socket_that_reports_nothing_but_errors_holds_nobody_up(network: Network) -> None:
    network.socket.receive_errors = itertools.repeat(errno.ENETDOWN)
    assert network.node.receive() == []


# --- Interfaces of this machine (asked, never sent to)


@pytest.mark.skipif(sys.platform != "linux", reason="the ioctls of Linux")
def test_the_loopback_is_no_network() -> None:
    found = lan.network_interfaces()
    assert all(interface.name != "lo" for interface in found)
    for interface in found:
        assert socket.inet_aton(interface.address) and interface.broadcast != "0.0.0.0"


@pytest.mark.skipif(sys.platform != "linux", reason="the ioctls of Linux")
def test_an_interface_that_vanishes_while_it_is_asked_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(99, "gone0")])
    assert lan.network_interfaces() == []


# --- Seeds


def test_numeric_seeds_are_known_at_once_and_need_no_thread() -> None:
    seeds = Seeds([Address("192.0.2.1", 47400), Address("192.0.2.2", 1)])
    assert seeds.addresses() == (Address("192.0.2.1", 47400), Address("192.0.2.2", 1))


def test_names_are_looked_up_and_one_that_is_not_known_yet_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [OSError("not known"), [(0, 0, 0, "", ("192.0.2.7", 47400))]]
    asked = []

    def look_up(host: str, port: int, *rest: Any) -> Any:
        asked.append(host)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(lan, "RESOLVE_S", 0.01)
    seeds = Seeds([Address("lab.example", 47400)])
    deadline_s = time.monotonic() + WAIT_S
    while seeds.addresses() != (Address("192.0.2.7", 47400),):
        assert time.monotonic() < deadline_s
    seeds.close()
    assert asked[:2] == ["lab.example", "lab.example"]


# --- Between hosts: network namespaces, a bridge, real directed broadcast

HOST = """
import os, select, sys
from p2pcluster.config import Address
from p2pcluster.lan import Lan
node = Lan(sys.argv[1], int(sys.argv[2]))
print("ready", node.own_port, flush=True)
while True:
    readable, _, _ = select.select([0, *node.sockets()], [], [])
    for data, address in node.receive():
        print("heard", data.decode(), address.host, address.port, flush=True)
    lines = os.read(0, 4096).decode().splitlines() if 0 in readable else []
    for line in lines:
        words = line.split()
        if words[0] == "broadcast":
            node.broadcast(words[1].encode())
        elif words[0] == "send":
            node.send(words[1].encode(), Address(words[2], int(words[3])))
        elif words[0] == "interfaces":
            for way in node.interfaces():
                print("way", way.name, way.address, way.broadcast, way.sent, flush=True)
        for note in node.take_notes():
            print("note", note, flush=True)
        print("did", words[0], flush=True)
"""


CAPTURE = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
sock.bind((sys.argv[1], 0))
print("ready", flush=True)
while True:
    frame = sock.recv(2000)
    head = 14 + 4 * (frame[14] & 15)
    if frame[23] == 17:
        source, target = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
        port = int.from_bytes(frame[head + 2 : head + 4], "big")
        print("frame", frame[:6].hex(), source, target, port, frame[head + 8 :].decode(errors="replace"), flush=True)
"""


@pytest.fixture
def switch() -> Iterator[Switch]:
    if not namespaces_can_be_made():
        pytest.skip("network namespaces cannot be made here")
    switch = Switch()
    try:
        yield switch
    finally:
        switch.close()


def test_hosts_hear_a_directed_broadcast_and_it_is_one_on_the_wire(switch: Switch) -> None:
    names = {name: switch.host(name, f"10.77.0.{number}/24") for number, name in enumerate("abc", 1)}
    capture = switch.start(switch.bridge, CAPTURE, "br0")
    nodes = {name: switch.start(namespace, HOST, "0.0.0.0", "47400") for name, namespace in names.items()}
    nodes["a"].tell("broadcast hello")
    for name in "abc":
        assert nodes[name].wait_for("heard hello").split()[2] == "10.77.0.1"
    assert capture.wait_for("frame ffffffffffff 10.77.0.1 10.77.0.255 47400 hello")


def test_hosts_answer_each_others_own_port(switch: Switch) -> None:
    one = switch.start(switch.host("a", "10.77.0.1/24"), HOST, "0.0.0.0", "47400")
    other = switch.start(switch.host("b", "10.77.0.2/24"), HOST, "0.0.0.0", "47400")
    one.tell("broadcast anybody?")
    host, port = other.wait_for("heard anybody?").split()[2:]
    other.tell(f"send yes {host} {port}")
    assert one.wait_for("heard yes").split()[2] == "10.77.0.2"


def test_several_nodes_of_one_host_all_hear_a_broadcast_from_another(switch: Switch) -> None:
    sender = switch.start(switch.host("a", "10.77.0.1/24"), HOST, "0.0.0.0", "47400")
    there = switch.host("b", "10.77.0.2/24")
    nodes = [switch.start(there, HOST, "0.0.0.0", "47400") for _ in range(3)]
    sender.tell("broadcast hello")
    for node in nodes:
        node.wait_for("heard hello")


def test_a_host_in_two_networks_is_heard_in_both(switch: Switch) -> None:
    both = switch.start(switch.host("a", "10.77.0.1/24", "10.88.0.1/24"), HOST, "0.0.0.0", "47400")
    one = switch.start(switch.host("b", "10.77.0.2/24"), HOST, "0.0.0.0", "47400")
    other = switch.start(switch.host("c", "10.88.0.2/24"), HOST, "0.0.0.0", "47400")
    both.tell("broadcast hello")
    assert one.wait_for("heard hello").split()[2] == "10.77.0.1"
    assert other.wait_for("heard hello").split()[2] == "10.88.0.1"
    both.tell("interfaces")
    assert both.wait_for("way eth0") == "way eth0 10.77.0.1 10.77.0.255 1"
    assert both.wait_for("way eth1") == "way eth1 10.88.0.1 10.88.0.255 1"


def test_a_host_without_a_default_route_and_with_another_mask_is_heard(switch: Switch) -> None:
    one = switch.start(switch.host("a", "10.77.4.1/22"), HOST, "0.0.0.0", "47400")
    other = switch.start(switch.host("b", "10.77.7.2/22"), HOST, "0.0.0.0", "47400")
    one.tell("broadcast hello")
    assert other.wait_for("heard hello").split()[2] == "10.77.4.1"


def test_a_node_on_the_loopback_of_a_host_sends_nothing_out(switch: Switch) -> None:
    there = switch.host("a", "10.77.0.1/24")
    capture = switch.start(switch.bridge, CAPTURE, "br0")
    hidden = [switch.start(there, HOST, "127.0.0.1", "47400") for _ in range(2)]
    open_node = switch.start(there, HOST, "0.0.0.0", "47400")
    hidden[0].tell("broadcast secret")
    hidden[1].wait_for("heard secret")
    hidden[0].tell("send secret 10.77.0.2 47400")
    hidden[0].wait_for("note")
    open_node.tell("broadcast public")
    open_node.wait_for("heard public")
    capture.wait_for("frame ffffffffffff 10.77.0.1 10.77.0.255 47400 public")
    assert not any("secret" in line for line in capture.lines + open_node.lines)


def test_a_cable_that_is_pulled_and_put_back_is_survived(switch: Switch) -> None:
    there = switch.host("a", "10.77.0.1/24")
    one = switch.start(there, HOST, "0.0.0.0", "47400")
    other = switch.start(switch.host("b", "10.77.0.2/24"), HOST, "0.0.0.0", "47400")
    switch.run("link", "set", "eth0", "down", inside=there)
    one.tell("broadcast lost")
    one.wait_for("did broadcast")
    switch.run("link", "set", "eth0", "up", inside=there)
    one.tell("broadcast found")
    other.wait_for("heard found")


def test_an_interface_that_is_down_is_not_in_use(switch: Switch) -> None:
    there = switch.host("a", "10.77.0.1/24", "10.88.0.1/24")
    switch.run("link", "set", "eth0", "down", inside=there)
    node = switch.start(there, HOST, "0.0.0.0", "47400")
    node.tell("interfaces")
    assert node.wait_for("way") == "way eth1 10.88.0.1 10.88.0.255 0"
    node.wait_for("did interfaces")
    assert node.lines == []


def test_a_node_bound_to_one_address_speaks_in_its_network_only(switch: Switch) -> None:
    namespace = switch.host("a", "10.77.0.1/24", "10.88.0.1/24")
    capture = switch.start(switch.bridge, CAPTURE, "br0")
    node = switch.start(namespace, HOST, "10.88.0.1", "47400")
    node.tell("broadcast hello")
    assert node.wait_for("heard hello").split()[2] == "10.88.0.1"
    node.tell("interfaces")
    assert node.wait_for("way") == "way eth1 10.88.0.1 10.88.0.255 1"
    capture.wait_for("frame ffffffffffff 10.88.0.1 10.88.0.255 47400 hello")


def test_an_interface_request_has_the_layout_that_is_read() -> None:
    family, address = struct.unpack_from("=H2x4s", struct.pack("=16sHH4s", b"eth0", 2, 0, b"\x0a\0\0\1"), 16)
    assert family == socket.AF_INET and socket.inet_ntoa(address) == "10.0.0.1"
    assert lan._ADDRESS_AT == 16 + 4
