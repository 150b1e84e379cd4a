"""UDP: one socket that hears what is said to everybody, one of the node's own, and the ways by which "everybody" is
reached.

This file alone decides which sockets are bound to what, which addresses a broadcast goes to, and what is said about a
way that does not work. It refuses to know what a datagram means and whether it can be trusted; that is `core.datagram`.

The shared port is for broadcasts: several programs of one machine bind it, a broadcast reaches all of them, and a
datagram to one address only one of them (`--seed` is answered by whichever that is). So each node also has a port of
its own, sends everything from it, and is answered there.

A broadcast goes to the directed address of each interface: 255.255.255.255 leaves by one interface only and needs a
default route. A way that fails is tried again at the next broadcast: on macOS "no route to host" comes and goes with
sleep and links, so no interface is ever given up. Interfaces come and go; they are looked up again every few seconds.

On one machine (`--bind 127.0.0.1`) Linux broadcasts on its loopback, and no packet leaves. Elsewhere the loopback
carries no broadcast: there it is a multicast with a time to live of 0, which no machine lets out. What does not come
from the machine itself is dropped. Only the Linux half is tested.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.errors import HomeError

RECEIVED_MAX = 64  # datagrams of one call of `receive`: the loop has other things to do
REFRESH_S = 10.0  # before interfaces are looked up again: a cable, a VPN, a network that came up after this program
RESOLVE_S = 30.0  # before host names of seeds are looked up again
TOLD_MAX = 256
LOOPBACK_BROADCAST = "127.255.255.255"
LIMITED_BROADCAST = "255.255.255.255"
LOOPBACK_GROUP = "239.255.71.40"  # "administratively scoped": of no meaning outside of a machine or site

_BUFFER_BYTES = config.DATAGRAM_BYTES_MAX + 1  # one more, so that a longer one is seen to be longer
_FLAG_UP, _FLAG_BROADCAST, _FLAG_LOOPBACK = 1, 2, 8
# Flags, address, broadcast address: of each system that they are known of. `struct ifreq` is a name of 16 bytes and
# then, for an address, a `sockaddr_in`, whose four bytes of address begin at 4 on both.
_IOCTLS = {"linux": (0x8913, 0x8915, 0x8919), "darwin": (0xC0206911, 0xC0206921, 0xC0206923)}
_IFREQ_BYTES, _FLAGS_AT, _ADDRESS_AT = 40, 16, 20
_NOTHING_THERE = (errno.EAGAIN, errno.EWOULDBLOCK)


@dataclass(frozen=True, slots=True)
class Interface:
    """A way by which everybody on one network is reached. `error`: why the last attempt failed, or ""."""

    name: str
    address: str
    broadcast: str
    sent: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class LanStatistics:
    """What went through, for `doctor` and `status`. `sent`: datagrams that the system took, each way counted."""

    broadcasts: int
    sent: int
    sent_bytes: int
    failed: int
    heard_shared: int
    heard_own: int
    heard_bytes: int
    dropped: int


class _Way:
    """One interface's address for broadcasts, and how it went."""

    __slots__ = ("name", "address", "broadcast", "sent", "error")

    def __init__(self, name: str, address: str, broadcast: str) -> None:
        self.name = name
        self.address = address
        self.broadcast = broadcast
        self.sent = 0
        self.error = ""


class Lan:
    """The two sockets. Nothing here waits; whatever the network does is a count or a note, never an exception.

    In the loop: register both of `sockets()` for reading, and call `receive` when one is readable.
    """

    def __init__(
        self,
        bind: str,
        port: int,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        find_interfaces: Callable[[], list[Interface]] | None = None,
    ) -> None:
        """Raises `HomeError` when the port cannot be had."""
        self.bind = bind
        self.port = port
        self.is_loopback = ipaddress.ip_address(bind).is_loopback
        self._clock_s = clock_s
        self._find_interfaces = find_interfaces or network_interfaces
        self._is_multicast = self.is_loopback and sys.platform != "linux"
        self._ways: dict[str, _Way] = {}
        self._refreshed_s: float | None = None
        self._told: set[tuple[str, str]] = set()
        self._notes: list[str] = []
        self._broadcasts = self._sent = self._sent_bytes = self._failed = 0
        self._heard_shared = self._heard_own = self._heard_bytes = self._dropped = 0
        self._own = self._open_own()
        try:
            self._shared = self._open_shared()
        except BaseException:
            self._own.close()
            raise
        self._refresh()

    @property
    def own_port(self) -> int:
        """Where this node alone is reached."""
        port = self._own.getsockname()[1]
        assert isinstance(port, int)
        return port

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """For a selector, to wait until there is something to read."""
        return self._shared, self._own

    def broadcast(self, data: bytes) -> None:
        """To everybody on every network of this machine (or on this machine, with `--bind 127.0.0.1`)."""
        self._refresh()
        self._broadcasts += 1
        for way in self._ways.values():
            error = self._send(data, (way.broadcast, self.port))
            way.error = "" if error is None else error.strerror or str(error)
            way.sent += error is None
            if error is not None:
                self._tell(way.name, error, f"interface {way.name}: cannot broadcast to {way.broadcast}")

    def send(self, data: bytes, address: Address) -> None:
        """To one program. `address` is numeric: a name would have to be looked up, and wait."""
        assert _is_numeric(address.host), address
        if self.is_loopback and not ipaddress.ip_address(address.host).is_loopback:
            self._failed += 1
            self._note(
                (address.host, "leaves"),
                f"nothing is sent to {address}: --bind {self.bind} keeps everything on this machine; leave out one of"
                " them",
            )
            return
        error = self._send(data, address)
        if error is not None:
            self._tell(address.host, error, f"cannot send to {address}")

    def receive(self) -> list[tuple[bytes, Address]]:
        """What has come, up to a bound; when there was more, the sockets stay readable."""
        received: list[tuple[bytes, Address]] = []
        for sock, up_to in ((self._own, RECEIVED_MAX // 2), (self._shared, RECEIVED_MAX)):
            while len(received) < up_to:
                one = self._receive_one(sock)
                if one is None:
                    break
                if self._counts(sock, one[1].host):
                    received.append(one)
        return received

    def interfaces(self) -> list[Interface]:
        """The ways in use, and how the last broadcast went on each."""
        self._refresh()
        return [Interface(way.name, way.address, way.broadcast, way.sent, way.error) for way in self._ways.values()]

    def statistics(self) -> LanStatistics:
        """What went through until now."""
        return LanStatistics(
            self._broadcasts, self._sent, self._sent_bytes, self._failed, self._heard_shared, self._heard_own,
            self._heard_bytes, self._dropped,
        )

    def take_notes(self) -> list[str]:
        """Sentences about what does not work: one for each way and error, once."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Gives both ports back."""
        self._shared.close()
        self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Sockets

    def _open_own(self) -> socket.socket:
        sock = _datagram_socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            if self._is_multicast:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self.bind))
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            sock.bind((self.bind, 0))
        except OSError as error:
            sock.close()
            raise HomeError(
                f"cannot use {self.bind} for datagrams ({error.strerror}): name an address of this machine with --bind"
            ) from error
        return sock

    def _open_shared(self) -> socket.socket:
        sock = _datagram_socket()
        try:
            # Both: macOS shares a port by the second, and Linux by it only among the programs of one user.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):  # Windows has none, and does the same with SO_REUSEADDR
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # A socket that is bound to an interface's own address hears no broadcast, and only Linux binds to a
            # broadcast address: for the loopback, so that the network cannot even knock.
            sock.bind((LOOPBACK_BROADCAST if self.is_loopback and not self._is_multicast else "", self.port))
            if self._is_multicast:
                group = socket.inet_aton(LOOPBACK_GROUP) + socket.inet_aton(self.bind)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        except OSError as error:
            sock.close()
            raise HomeError(
                f"UDP port {self.port} cannot be shared ({error.strerror}): stop the program that holds it alone, or"
                " start every node of the cluster with another --port N"
            ) from error
        return sock

    # Sending

    def _send(self, data: bytes, address: tuple[str, int]) -> OSError | None:
        assert len(data) <= config.DATAGRAM_BYTES_MAX, len(data)
        assert not self.is_loopback or self._stays_here(address[0]), address
        try:
            self._own.sendto(data, address)
        except OSError as error:
            self._failed += 1
            return error
        self._sent += 1
        self._sent_bytes += len(data)
        return None

    def _stays_here(self, host: str) -> bool:
        return ipaddress.ip_address(host).is_loopback or (self._is_multicast and host == LOOPBACK_GROUP)

    def _refresh(self) -> None:
        now_s = self._clock_s()
        if self._refreshed_s is not None and now_s < self._refreshed_s + REFRESH_S:
            return
        self._refreshed_s = now_s
        ways = {}
        for found in self._interfaces_in_use():
            known = self._ways.get(found.name)
            is_same = known is not None and (known.address, known.broadcast) == (found.address, found.broadcast)
            ways[found.name] = known if known and is_same else _Way(found.name, found.address, found.broadcast)
        self._ways = ways

    def _interfaces_in_use(self) -> list[Interface]:
        loopback = Interface("loopback", config.BIND_LOOPBACK, LOOPBACK_BROADCAST)
        if self.is_loopback:
            group = Interface("loopback", self.bind, LOOPBACK_GROUP)
            return [group if self._is_multicast else loopback]
        if sys.platform not in _IOCTLS:
            return [Interface("any", self.bind, LIMITED_BROADCAST)]
        found = self._find_interfaces()
        of_bind = [interface for interface in found if interface.address == self.bind]
        # Without a network there may still be other nodes on this machine. An address that no interface reports is a
        # second one of some interface.
        return of_bind or found or [loopback]

    # Receiving

    def _receive_one(self, sock: socket.socket) -> tuple[bytes, Address] | None:
        for _ in range(RECEIVED_MAX):
            try:
                data, name = sock.recvfrom(_BUFFER_BYTES)
            except OSError as error:
                if error.errno in _NOTHING_THERE:
                    return None
                # Not about this datagram: an earlier one found no listener (Windows: 10054), or a network went down.
                # The error is used up by having been reported; what else has come is behind it.
                self._dropped += 1
                continue
            self._heard_bytes += len(data)
            if sock is self._shared:
                self._heard_shared += 1
            else:
                self._heard_own += 1
            return data, Address(name[0], name[1])
        return None

    def _counts(self, sock: socket.socket, host: str) -> bool:
        """Whether it came from where this node speaks to: the nodes of a loopback are a cluster of their own."""
        is_from_here = ipaddress.ip_address(host).is_loopback
        speaks_here = self.is_loopback or sock is self._own or "loopback" in self._ways
        belongs = speaks_here if is_from_here else not self.is_loopback
        self._dropped += not belongs
        return belongs

    def _tell(self, where: str, error: OSError, what: str) -> None:
        self._note((where, str(error.errno)), f"{what} ({error.strerror or error}): {self._advice(error)}")

    def _note(self, key: tuple[str, str], note: str) -> None:
        if key not in self._told and len(self._told) < TOLD_MAX:
            self._told.add(key)
            self._notes.append(note)

    def _advice(self, error: OSError) -> str:
        if sys.platform == "darwin" and error.errno == errno.EHOSTUNREACH:
            return "if it goes on, allow this terminal in System Settings, Privacy & Security, Local Network"
        if error.errno in (errno.EPERM, errno.EACCES):
            return f"a firewall of this machine forbids it; let UDP and TCP port {self.port} through"
        return "it is tried again; --seed HOST:PORT needs no broadcast"


def _datagram_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def network_interfaces() -> list[Interface]:
    """The machine's interfaces that are up and can broadcast, on a system of `_IOCTLS`."""
    with _datagram_socket() as sock:
        found = [_interface(sock, name) for _, name in socket.if_nameindex()]
    return [interface for interface in found if interface is not None]


def _interface(sock: socket.socket, name: str) -> Interface | None:
    """The interface, if it is up, has an address and can broadcast; one may vanish while it is asked."""
    flags_ioctl, address_ioctl, broadcast_ioctl = _IOCTLS[sys.platform]
    try:
        (flags,) = struct.unpack_from("=H", _ask_interface(sock, name, flags_ioctl), _FLAGS_AT)
        if flags & (_FLAG_UP | _FLAG_BROADCAST | _FLAG_LOOPBACK) != _FLAG_UP | _FLAG_BROADCAST:
            return None
        address = _ask_interface(sock, name, address_ioctl)[_ADDRESS_AT : _ADDRESS_AT + 4]
        broadcast = _ask_interface(sock, name, broadcast_ioctl)[_ADDRESS_AT : _ADDRESS_AT + 4]
    except OSError:
        return None
    # An interface that was given an address without a broadcast address reports 0.0.0.0.
    return Interface(name, socket.inet_ntoa(address), socket.inet_ntoa(broadcast)) if any(broadcast) else None


def _ask_interface(sock: socket.socket, name: str, what: int) -> bytes:
    import fcntl  # Windows has none, and does not come here

    request = name.encode()[:15].ljust(_IFREQ_BYTES, b"\0")
    answer = fcntl.ioctl(sock.fileno(), what, request)
    assert isinstance(answer, bytes)
    return answer


class Seeds:
    """The numeric addresses of `--seed`; names are looked up in a thread of their own, again and again."""

    def __init__(self, seeds: Iterable[Address]) -> None:
        self._lock = threading.Lock()
        self._names = []
        self._known: dict[Address, Address] = {}
        self._over = threading.Event()
        for seed in seeds:
            if _is_numeric(seed.host):
                self._known[seed] = seed
            else:
                self._names.append(seed)
        if self._names:
            threading.Thread(target=self._look_up, name="seeds", daemon=True).start()

    def addresses(self) -> tuple[Address, ...]:
        """Those that are known by now."""
        with self._lock:
            return tuple(self._known.values())

    def close(self) -> None:
        """The thread ends after the look-up that it is in."""
        self._over.set()

    def _look_up(self) -> None:
        while not self._over.is_set():
            for seed in self._names:
                # A name that is not known now may be later; the last address known stays until then.
                with contextlib.suppress(OSError):
                    name = socket.getaddrinfo(seed.host, seed.port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
                    with self._lock:
                        self._known[seed] = Address(str(name[0]), int(name[1]))
            self._over.wait(RESOLVE_S)


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
