"""TCP: framed, sealed connections for an event loop, the door that strangers knock at, and a blocking connection for
clients.

This file alone decides how many bytes are read and written at a time, how much a stranger may cost before he is
authenticated, and what a closed connection is called. It refuses to know what a payload means and who may do what;
who the other side is, it learns from `core.handshake`.

Before authentication: 16 places of 4 KB, 2 s each. While all are taken the listening socket is left alone, so that
newcomers wait in the kernel's queue, where they cost nothing here; whoever has then been given 250 ms loses his
place. Refusing the newest would let sixteen silent connections close the door for 2 s at a time. Dropping the oldest
at once would, when all nodes come at the same moment after a change of leader, drop honest ones in the middle of a
handshake of two or three milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from types import TracebackType
from typing import Literal, Self

from p2pcluster import config
from p2pcluster.core.codec import Buffer, FrameReader, frame
from p2pcluster.core.handshake import TAG_BYTES, Handshake, Identity, Session
from p2pcluster.errors import ClusterError, ClusterNotFound, HomeError, LocalProtocolError, ProtocolError, Unavailable

# One call of `read` or `flush` moves about so much, so that one busy connection does not starve the others of the loop.
READ_BYTES_MAX = 1 << 20
WRITE_BYTES_MAX = 4 << 20
# Parts up to this size are joined, a copy being cheaper than one more part to send; larger ones are sent from where
# they lie.
_JOIN_BYTES_MAX = 1 << 13
_JOINED_BYTES_MAX = 1 << 16
_PARTS_MAX = 512  # in one sendmsg; Linux and macOS take 1,024
_LENGTH_BYTES = 4

PENDING_MAX = config.PREAUTH_TOTAL_BYTES_MAX // config.PREAUTH_BYTES_MAX
PENDING_GRACE_S = config.PREAUTH_S / 8  # a hundred handshakes on a LAN
_ACCEPT_PAUSE_S = 0.5
_BACKLOG = 128
_TOLD_MAX = 1024

_HAS_SENDMSG = hasattr(socket.socket, "sendmsg")  # Windows has none
_IN_PROGRESS = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OUR_MISTAKES = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)

Closing = Literal["ended", "reset", "refused", "unreachable"]
_CLOSING_OF: dict[int, Closing] = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.ETIMEDOUT: "unreachable",
}
_SENTENCES: dict[Closing, str] = {
    "ended": "the connection was closed",
    "reset": "the connection was reset",
    "refused": "nobody listens there",
    "unreachable": "the machine cannot be reached",
}


class ConnectionClosed(Unavailable):
    """The connection is gone; what was sent on it and not answered may or may not have happened.

    `how`: "ended" (in order, as when a process exits), "reset", "refused" (nobody listens there), "unreachable".
    """

    code = "connection_closed"

    def __init__(self, how: Closing, detail: str = "") -> None:
        super().__init__(_SENTENCES[how] + (f" ({detail})" if detail else ""))
        self.how: Closing = how


class PortTaken(HomeError):
    """Another program listens on the port."""

    code = "port_taken"


def _closed(error: OSError, otherwise: Closing = "reset") -> ConnectionClosed:
    if error.errno == errno.EBADF:
        return ConnectionClosed("ended", "by this side")
    return ConnectionClosed(_CLOSING_OF.get(error.errno or 0, otherwise), error.strerror or str(error))


class Connection:
    """One non-blocking socket that carries frames, for a loop that waits with a selector.

    With a handshake nothing but that handshake passes until `session` is set; from then on every frame is sealed.
    Without one (an inherited socket to a process of our own) frames pass as they are. In the loop: `read` when
    readable, `flush` when writable, and wait for writable only while `wants_write`.
    """

    def __init__(
        self,
        sock: socket.socket,
        frame_bytes_max: int = config.FRAME_BYTES_MAX,
        handshake: Handshake | None = None,
        *,
        is_connecting: bool = False,
    ) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # macOS refuses it on a connection that is gone already; the first read will say that it is.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.frame_bytes_max = frame_bytes_max
        self.session: Session | None = None
        self.outgoing_bytes = 0
        self._sock = sock
        self._handshake = handshake
        self._is_connecting = is_connecting
        self._reader = FrameReader(frame_bytes_max if handshake is None else config.PREAUTH_BYTES_MAX - _LENGTH_BYTES)
        # Ours and still growing while a bytearray; whatever belongs to the caller or is partly sent is a view.
        self._outgoing: deque[bytearray | memoryview] = deque()
        self._end: ConnectionClosed | None = None
        if not is_connecting:
            self._greet()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def is_established(self) -> bool:
        """Whether payloads can be sent."""
        return not self._is_connecting and (self._handshake is None or self.session is not None)

    @property
    def wants_write(self) -> bool:
        return self._is_connecting or bool(self._outgoing)

    @property
    def peer_address(self) -> str:
        """`host:port` of the other side, for messages; "" where there is none."""
        try:
            name = self._sock.getpeername()
        except OSError:
            return ""
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""

    def read(self) -> list[Buffer]:
        """The payloads that have arrived whole, in order; [] during the handshake.

        Raises `ConnectionClosed` once everything that came before the end was returned, and `ProtocolError` when the
        other side breaks the protocol or the handshake; the caller then closes.
        """
        if self._end is not None:
            raise self._end
        if self._is_connecting and not self._has_connected():
            return []
        return self._read_frames() if self.is_established else self._read_handshake()

    def send(self, parts: Iterable[Buffer]) -> None:
        """Queues one frame. Large parts are not copied: they may not change before `outgoing_bytes` is 0.

        Raises `LocalProtocolError` for a frame that the other side would refuse.
        """
        assert self.is_established, "nothing but the handshake is sent before it is over"
        payload = list(parts)
        size = sum(map(len, payload))
        if size > self.frame_bytes_max:
            raise LocalProtocolError(
                f"a frame of {size} bytes is over the limit of {self.frame_bytes_max}: send it in smaller pieces"
            )
        self._enqueue(payload if self.session is None else self.session.sealer.seal(payload))

    def flush(self) -> None:
        """Writes what the socket takes now, up to a bound. Raises `ConnectionClosed`."""
        if self._is_connecting and not self._has_connected():
            return
        budget = WRITE_BYTES_MAX
        while self._outgoing and budget > 0:
            sent = self._write_some()
            if sent == 0:
                return
            budget -= sent
            self._drop_sent(sent)

    def refuse(self, reason: str) -> None:
        """Tells the other side, before the handshake is over, why the connection will be closed.

        A courtesy: it may be gone, or not speak this protocol at all.
        """
        refusal = None if self._handshake is None else self._handshake.refusal(reason)
        if refusal is None:
            return
        self._enqueue(refusal)
        with contextlib.suppress(ConnectionClosed):
            self.flush()
        # Bytes that stay unread turn the close into a reset, which can overtake what was just said.
        self._receive(memoryview(bytearray(config.PREAUTH_BYTES_MAX)))

    def close(self) -> None:
        self._sock.close()

    def shut_down(self) -> None:
        """Ends the stream both ways and wakes whoever waits for it in another thread; `close` is still due."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read_frames(self) -> list[Buffer]:
        payloads: list[Buffer] = []
        budget = READ_BYTES_MAX
        while budget > 0:
            space = self._reader.space()
            count = self._receive(space)
            if count == 0:
                break
            budget -= count
            payloads += self._reader.received(count)
            if count < len(space):
                break  # the socket is empty, as far as anyone can know without asking once more
        if self._end is not None and not payloads:
            raise self._end
        if self.session is None:
            return payloads
        unseal = self.session.opener.open
        return [unseal(payload) for payload in payloads]

    def _read_handshake(self) -> list[Buffer]:
        """Takes what belongs to the handshake and not a byte more: what follows is sealed, and may be large."""
        while self.session is None:
            count = self._receive(self._reader.space()[: self._reader.missing_bytes])
            if self._end is not None:
                raise self._end
            if count == 0:
                break
            self._shake(count)
        self.flush()
        return []

    def _shake(self, count: int) -> None:
        assert self._handshake is not None
        try:
            for payload in self._reader.received(count):
                # The bound is on all that comes before the proof, not on each message.
                self._reader.frame_bytes_max -= _LENGTH_BYTES + len(payload)
                reply = self._handshake.receive(payload)
                if reply is not None:
                    self._enqueue(reply)
        except ProtocolError as error:
            self.refuse(str(error))
            raise
        self.session = self._handshake.session
        if self.session is not None:
            self._handshake = None
            self._reader = FrameReader(self.frame_bytes_max + TAG_BYTES)

    def _greet(self) -> None:
        opening = None if self._handshake is None else self._handshake.start()
        if opening is not None:
            self._enqueue(opening)

    def _has_connected(self) -> bool:
        """Whether dialling is over. Raises `ConnectionClosed` when it failed."""
        if self._end is None:
            self._end = self._dialling_failure()
        if self._end is not None:
            raise self._end
        if self._is_connecting:
            return False
        self._greet()
        return True

    def _dialling_failure(self) -> ConnectionClosed | None:
        """Why dialling failed, or None; also notes when it has succeeded."""
        failure = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            return _closed(OSError(failure, os.strerror(failure)), "unreachable")
        try:
            peer = self._sock.getpeername()
        except OSError as error:
            return None if error.errno == errno.ENOTCONN else _closed(error, "unreachable")
        self._is_connecting = False
        return _reached_itself() if peer == self._sock.getsockname() else None

    def _receive(self, space: memoryview) -> int:
        """How many bytes came into `space`; 0 when none are there, or the stream has ended, as `_end` then says."""
        try:
            count = self._sock.recv_into(space)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._end = _closed(error)
            return 0
        if count == 0:
            self._end = ConnectionClosed("ended", "in the middle of a frame" if self._reader.buffered_bytes else "")
        return count

    def _enqueue(self, payload: Iterable[Buffer]) -> None:
        outgoing = self._outgoing
        for part in frame(payload):
            self.outgoing_bytes += len(part)
            last = outgoing[-1] if outgoing else None
            if len(part) > _JOIN_BYTES_MAX:
                outgoing.append(memoryview(part))
            elif isinstance(last, bytearray) and len(last) < _JOINED_BYTES_MAX:
                last += part
            else:
                outgoing.append(bytearray(part))

    def _write_some(self) -> int:
        """How many bytes the socket took; 0 when it is full."""
        try:
            if _HAS_SENDMSG:
                return self._sock.sendmsg(list(islice(self._outgoing, _PARTS_MAX)))
            return self._sock.send(self._outgoing[0])
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise _closed(error) from error

    def _drop_sent(self, sent: int) -> None:
        outgoing = self._outgoing
        self.outgoing_bytes -= sent
        while sent:
            first = outgoing[0]
            if len(first) > sent:
                outgoing[0] = memoryview(first)[sent:]
                return
            sent -= len(first)
            outgoing.popleft()


def start_dial(
    address: str, port: int, handshake: Handshake, frame_bytes_max: int = config.FRAME_BYTES_MAX
) -> Connection:
    """A connection that is on its way, for an event loop: never waits. `address` is numeric, as beacons carry it.

    Raises `ConnectionClosed` when it is known at once that nobody can be reached.
    """
    flags = socket.AI_NUMERICHOST
    try:
        family, kind, _, _, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
        sock = socket.socket(family, kind)
    except OSError as error:
        raise ConnectionClosed("unreachable", error.strerror or str(error)) from error
    sock.setblocking(False)
    failure = sock.connect_ex(name)
    if failure not in _IN_PROGRESS:
        sock.close()
        raise _closed(OSError(failure, os.strerror(failure)), "unreachable")
    return Connection(sock, frame_bytes_max, handshake, is_connecting=True)


def _reached_itself() -> ConnectionClosed:
    """A socket that dials a free port of its own machine can be given that very port, and then talks to itself."""
    return ConnectionClosed("refused", "the socket reached itself")


class Listener:
    """The listening socket, and the connections on it that are not authenticated yet.

    `register` it once with the loop's selector, in which it then keeps its own sockets, each with itself as the key's
    `data`. For such a key call `ready(key.fileobj, now_s)`; the connections that it returns are authenticated, no
    longer registered, and the caller's. Call `expire(now_s)` when `next_expiry_s` has come. `take_notes` has what a
    person should hear, once for each host and kind. A connection that `ready` returns may still have bytes to flush.
    """

    def __init__(
        self,
        address: str,
        port: int,
        make_handshake: Callable[[], Handshake],
        frame_bytes_max: int = config.FRAME_BYTES_MAX,
    ) -> None:
        self.refused_count = 0
        self._sock = _listen(address, port)
        self._make_handshake = make_handshake
        self._frame_bytes_max = frame_bytes_max
        self._selector: selectors.BaseSelector | None = None
        self._is_accepting = False
        self._paused_until_s: float | None = None
        self._since_s: dict[Connection, float] = {}  # the pending connections, oldest first
        self._notes: list[str] = []
        self._told: set[tuple[str, str]] = set()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; the port is the real one, also where 0 was asked for."""
        host, port = self._sock.getsockname()[:2]
        return host, port

    @property
    def pending_count(self) -> int:
        return len(self._since_s)

    @property
    def next_expiry_s(self) -> float | None:
        """When `expire` has something to do, on the clock of `now_s`; None when nothing is pending."""
        oldest_s = next(iter(self._since_s.values()), None)
        times_s = [] if oldest_s is None else [oldest_s + self._patience_s]
        if self._paused_until_s is not None:
            times_s.append(self._paused_until_s)
        return min(times_s, default=None)

    def fileno(self) -> int:
        return self._sock.fileno()

    def register(self, selector: selectors.BaseSelector) -> None:
        assert self._selector is None
        self._selector = selector
        self._regulate()

    def ready(self, fileobj: object, now_s: float) -> list[Connection]:
        """The connections that are authenticated now, after `fileobj`, one of this listener's, became readable."""
        if fileobj is self:
            self._accept(now_s)
            established: list[Connection] = []
        else:
            assert isinstance(fileobj, Connection)
            established = self._hear(fileobj)
        self._regulate()
        return established

    def expire(self, now_s: float) -> None:
        """Drops those who had their time."""
        if self._paused_until_s is not None and now_s >= self._paused_until_s:
            self._paused_until_s = None
        patience_s = self._patience_s
        for connection in [known for known, since_s in self._since_s.items() if now_s - since_s >= patience_s]:
            why = f"it did not prove who it is within {patience_s:g} s"
            connection.refuse(why)
            self._drop(connection, "silent", why)
        self._regulate()

    def take_notes(self) -> list[str]:
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        for connection in list(self._since_s):
            self._release(connection)
            connection.close()
        if self._is_accepting and self._selector is not None:
            self._selector.unregister(self)
            self._is_accepting = False
        self._selector = None
        self._sock.close()

    @property
    def _is_full(self) -> bool:
        return len(self._since_s) >= PENDING_MAX

    @property
    def _patience_s(self) -> float:
        return PENDING_GRACE_S if self._is_full else config.PREAUTH_S

    def _accept(self, now_s: float) -> None:
        assert self._selector is not None
        while not self._is_full:
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                # Nobody waits, or whoever did is gone: Linux reports the errors of his network here.
                assert error.errno not in _OUR_MISTAKES
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause(now_s, error)
                return
            connection = Connection(sock, self._frame_bytes_max, self._make_handshake())
            self._since_s[connection] = now_s
            self._selector.register(connection, selectors.EVENT_READ, self)

    def _pause(self, now_s: float, error: OSError) -> None:
        """The newcomer stays in the queue and the socket readable: without a pause the loop would spin."""
        self._paused_until_s = now_s + _ACCEPT_PAUSE_S
        self._tell("", "resources", f"no connection can be accepted ({error.strerror}): raise `ulimit -n`")

    def _hear(self, connection: Connection) -> list[Connection]:
        try:
            connection.read()
        except ConnectionClosed:
            self._release(connection)
            connection.close()
            return []
        except ProtocolError as error:
            self._drop(connection, error.code, str(error))
            return []
        if connection.session is None:
            return []
        self._release(connection)
        return [connection]

    def _drop(self, connection: Connection, kind: str, why: str) -> None:
        host = connection.peer_address.rpartition(":")[0] or "a connection that is gone"
        self.refused_count += 1
        self._tell(host, kind, f"refused {host}: {why}")
        self._release(connection)
        connection.close()

    def _release(self, connection: Connection) -> None:
        assert self._selector is not None
        self._selector.unregister(connection)
        del self._since_s[connection]

    def _tell(self, host: str, kind: str, note: str) -> None:
        if (host, kind) in self._told or len(self._told) >= _TOLD_MAX:
            return
        self._told.add((host, kind))
        self._notes.append(note)

    def _regulate(self) -> None:
        """Listens while there is a place; not to listen is to leave newcomers in the kernel's queue."""
        assert self._selector is not None
        should_accept = not self._is_full and self._paused_until_s is None
        if should_accept and not self._is_accepting:
            self._selector.register(self, selectors.EVENT_READ, self)
        elif self._is_accepting and not should_accept:
            self._selector.unregister(self)
        self._is_accepting = should_accept


def _listen(address: str, port: int) -> socket.socket:
    try:
        flags = socket.AI_PASSIVE
        family, kind, _, _, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
    except socket.gaierror as error:
        raise HomeError(
            f"cannot listen on {address!r} ({error.strerror}): name an address of this machine with --bind"
        ) from error
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        _claim(sock)
        sock.bind(name)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_listen(address, port, error) from error
    return sock


def _claim(sock: socket.socket) -> None:
    if sys.platform == "win32":
        # There SO_REUSEADDR would let a second program take the port from under this one.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        # Lets a restarted node have its port back at once; a second listener is refused all the same.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _cannot_listen(address: str, port: int, error: OSError) -> HomeError:
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"port {port} on {address} is taken: stop the program that listens there, or start this one with --port N"
        )
    if error.errno == errno.EACCES:
        return HomeError(f"port {port} needs another user ({error.strerror}): choose one above 1023 with --port N")
    return HomeError(
        f"cannot listen on {address} port {port} ({error.strerror}): name an address of this machine with --bind"
    )


def dial(
    address: str, port: int, handshake: Handshake, timeout_s: float, frame_bytes_max: int = config.FRAME_BYTES_MAX
) -> BlockingConnection:
    """An authenticated connection for a program that may wait.

    Raises `ClusterNotFound` when nobody answers there, `Unavailable` when somebody does and then does not go on,
    `AuthenticationFailed` or `ProtocolError` when the two sides do not fit, with the sentence that says why.
    """
    deadline_s = time.monotonic() + timeout_s
    where = f"{address}:{port}"
    try:
        sock = socket.create_connection((address, port), timeout_s)
    except OSError as error:
        raise _nobody(where, error.strerror or str(error)) from error
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise _nobody(where, str(_reached_itself()))
    connection = Connection(sock, frame_bytes_max, handshake)
    try:
        _establish(connection, deadline_s)
    except ConnectionClosed as error:
        connection.close()
        raise Unavailable(f"{where}: {error} before it had answered; try again") from error
    except ClusterError as error:
        connection.close()
        raise type(error)(f"{where}: {error}") from error
    return BlockingConnection(connection, timeout_s)


def _nobody(where: str, why: str) -> ClusterNotFound:
    return ClusterNotFound(f"no node answers at {where} ({why}): start one there, or name another host and port")


def _establish(connection: Connection, deadline_s: float) -> None:
    connection.flush()
    while not connection.is_established:
        if not _wait(connection, selectors.EVENT_READ, deadline_s):
            raise Unavailable("somebody accepts connections there and does not answer; try again")
        connection.read()


class BlockingConnection:
    """An authenticated connection for threads: one may receive while others send.

    Whatever ends it raises `Unavailable`: what was sent and not answered may or may not have happened.
    """

    def __init__(self, connection: Connection, send_timeout_s: float) -> None:
        assert connection.session is not None
        self.peer: Identity = connection.session.peer
        self.session: Session = connection.session
        self._connection = connection
        self._send_timeout_s = send_timeout_s
        self._send_lock = threading.Lock()
        self._received: deque[Buffer] = deque()

    def send(self, parts: Iterable[Buffer]) -> None:
        """Returns when the frame is on its way. Raises `Unavailable` when the other side takes nothing for too long."""
        connection = self._connection
        with self._send_lock:
            connection.send(parts)
            deadline_s = time.monotonic() + self._send_timeout_s
            connection.flush()
            while connection.wants_write:
                if not _wait(connection, selectors.EVENT_WRITE, deadline_s):
                    raise Unavailable(f"{connection.peer_address} takes no more data; ask again by the same id")
                connection.flush()

    def receive(self, timeout_s: float | None) -> Buffer:
        """The next payload; waits for ever with None. Raises `Unavailable` when none came in time; it still may."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._received:
            self._received.extend(self._read())
            if not self._received and not _wait(self._connection, selectors.EVENT_READ, deadline_s):
                raise Unavailable(f"no answer within {timeout_s:g} s; ask again by the same id")
        return self._received.popleft()

    def close(self) -> None:
        """Also from another thread than the one that receives, which then gets `ConnectionClosed`."""
        self._connection.shut_down()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> list[Buffer]:
        try:
            return self._connection.read()
        except ProtocolError as error:
            # A ProtocolError is definite, and what is on its way on this connection is not.
            self.close()
            raise Unavailable(f"the connection is unusable: {error}") from error


# One descriptor for one wait: poll where there is one, as it needs no epoll object made, and select none above 1023.
_Waiter: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


def _wait(connection: Connection, event: int, deadline_s: float | None) -> bool:
    """Whether `event` came before the deadline; never when it has passed, however much keeps coming."""
    left_s = None if deadline_s is None else deadline_s - time.monotonic()
    if left_s is not None and left_s <= 0:
        return False
    with _Waiter() as waiter:
        try:
            waiter.register(connection, event)
        except ValueError:
            raise ConnectionClosed("ended", "by this side") from None
        return bool(waiter.select(left_s))
