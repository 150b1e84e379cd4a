"""The connections of client programs: each is a session of its own, from its first word to its end.

What a client may ask, and of whom, is the loop's affair.
"""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable

from p2pcluster import config
from p2pcluster.core.codec import Buffer, Message, decode, encode
from p2pcluster.core.handshake import Identity
from p2pcluster.errors import ProtocolError, RemoteProtocolError
from p2pcluster.stream import Connection, ConnectionClosed

WAITING_BYTES_MAX = config.FRAME_BYTES_MAX  # of answers on their way to one client
TOLD_MAX = 1024  # sentences about what clients do wrong


class Clients:
    """All clients of a node, wired to its loop's selector. `on_message` may raise `ProtocolError`, which ends the connection."""

    def __init__(self, selector: selectors.BaseSelector, on_message: Callable[[str, Message], None], on_gone: Callable[[str], None],
                 on_note: Callable[[str], None]) -> None:
        self._selector = selector
        self._on_message = on_message
        self._on_gone = on_gone
        self._on_note = on_note
        self._connections: dict[str, Connection] = {}
        self._count = 0
        self.refused_count = 0
        self._told: set[tuple[str, str]] = set()

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._connections

    def identity(self, session_id: str) -> Identity:
        """Who it is."""
        session = self._connections[session_id].session
        assert session is not None, "a client is authenticated"
        return session.peer

    def accept(self, connection: Connection) -> None:
        """A client has proved that it holds the key."""
        self._count += 1
        session_id = f"client-{self._count}"
        self._connections[session_id] = connection
        self._selector.register(connection, selectors.EVENT_READ, lambda mask: self._on_ready(session_id, mask))
        self._flush(session_id)

    def send(self, session_id: str, message: Message) -> None:
        """Queue a message; nothing for a client that has gone."""
        connection = self._connections.get(session_id)
        if connection is not None:
            connection.send(encode(message))
            self._flush(session_id)

    def send_all(self, message: Message) -> None:
        """Queue a message for every client."""
        for session_id in list(self._connections):
            self.send(session_id, message)

    def close(self) -> None:
        """Say what is still to be said, as far as the sockets take it, and end all."""
        for connection in self._connections.values():
            with contextlib.suppress(ConnectionClosed):
                connection.flush()
            self._selector.unregister(connection)
            connection.close()
        self._connections.clear()

    def _on_ready(self, session_id: str, mask: int) -> None:
        connection = self._connections.get(session_id)
        if connection is None:
            return
        try:
            for payload in connection.read() if mask & selectors.EVENT_READ else ():
                if session_id not in self._connections:
                    return  # a reply found it gone
                request = _request(payload)
                try:
                    self._on_message(session_id, request)
                except ProtocolError as error:
                    self.send(session_id, _refusal(request, error))  # or it would ask again, and never know why it is not heard
                    raise
        except ConnectionClosed:
            self._drop(session_id)
        except ProtocolError as error:
            self._tell(connection.peer_address.rpartition(":")[0], error)
            self._drop(session_id)
        self._flush(session_id)

    def _flush(self, session_id: str) -> None:
        connection = self._connections.get(session_id)
        if connection is None:
            return
        try:
            connection.flush()
        except ConnectionClosed:
            self._drop(session_id)
            return
        # Who does not take his answers is not heard until he does: they would fill the memory.
        hears = connection.outgoing_bytes < WAITING_BYTES_MAX
        wanted = (selectors.EVENT_READ if hears else 0) | (selectors.EVENT_WRITE if connection.wants_write else 0)
        key = self._selector.get_key(connection)
        if key.events != wanted:
            self._selector.modify(connection, wanted, key.data)

    def _tell(self, host: str, error: ProtocolError) -> None:
        """Once for each machine and kind of trouble; each time it is counted."""
        self.refused_count += 1
        if (host, error.code) not in self._told and len(self._told) < TOLD_MAX:
            self._told.add((host, error.code))
            self._on_note(f"a client at {host} was refused: {error}")

    def _drop(self, session_id: str) -> None:
        connection = self._connections.pop(session_id, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
            self._on_gone(session_id)


def _refusal(request: Message, error: ProtocolError) -> Message:
    number = request.fields.get("req")
    return Message("reply", {"req": number if isinstance(number, int) else 0, "kind": request.kind, "result": "refused", "code": error.code,
                             "text": str(error)})


def _request(payload: Buffer) -> Message:
    """The message in `payload`. Raises `RemoteProtocolError`, also for one that could not be replicated in one frame."""
    if len(payload) > config.REQUEST_BYTES_MAX:
        raise RemoteProtocolError(
            f"a request of {len(payload)} bytes is over the limit of {config.REQUEST_BYTES_MAX}: send it in smaller pieces")
    return decode(payload)
