"""The TCP connections between nodes: who dials whom, which of two connections stays, when to try again.

What is said over them is the loop's affair. A node has at most one connection to another; of two that were dialled at the same time the one stays that
the lower id dialled, which both sides see alike. A newer boot of a node replaces an older one's connection, which is dead.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pcluster import config
from p2pcluster.config import Address, parse_address
from p2pcluster.core.codec import Message, decode, encode
from p2pcluster.core.handshake import Handshake, Identity
from p2pcluster.core.protocol import LABEL_CHARS_MAX
from p2pcluster.errors import ClusterError, ProtocolError
from p2pcluster.stream import Connection, ConnectionClosed, start_dial

REDIAL_S = 0.1  # after a connection was lost or refused; doubles with each failure ...
REDIAL_S_MAX = 2.0  # ... up to this: a node that comes back is found within it
WAITING_BYTES_MAX = 4 * config.MIB  # of a large transfer on its way to one peer; what is urgent is never far behind
TOLD_MAX = 1024  # sentences about what other nodes do wrong
SILENT_S = config.SESSION_TIMEOUT_MS / 2000  # a connection over which nothing came for so long is given up: its machine, or the way to it, is gone


@dataclass(slots=True)
class Target:
    """An address that should be dialled: a node's, or a seed's, of which the node is not known yet."""

    address: Address
    node_id: str | None
    tries: int = 0
    next_s: float = 0.0


@dataclass(slots=True)
class Peer:
    """An authenticated connection to another node."""

    identity: Identity
    connection: Connection
    dialled: bool
    has_spoken: bool = True  # since the last tick
    heard_s: float = 0.0

    @property
    def address(self) -> str | None:
        """Where the node listens: what it says of itself, with the host that it is seen at where it does not know its own."""
        said = self.identity.facts.get("address")
        if not isinstance(said, str) or len(said) > LABEL_CHARS_MAX or not said.isprintable():
            return None
        try:
            parse_address(said)
        except ValueError:
            return None
        host, _, port = said.rpartition(":")
        seen = self.connection.peer_address.rpartition(":")[0]
        return f"{seen if host == config.BIND_ANY and seen else host}:{port}"


@dataclass(slots=True)
class Events:
    """What the loop hears."""

    on_message: Callable[[str, Message], None]
    on_connected: Callable[[Identity], None]
    on_gone: Callable[[str], None]
    on_refused: Callable[[str], None]
    on_note: Callable[[str], None]


@dataclass(slots=True)
class _Dialling:
    target: Target
    connection: Connection
    until_s: float


@dataclass(slots=True)
class Peers:
    """All connections to other nodes, wired to the loop's selector."""

    node_id: str
    selector: selectors.BaseSelector
    make_handshake: Callable[[], Handshake]
    events: Events
    peers: dict[str, Peer] = field(default_factory=dict)
    refused_count: int = 0
    _targets: dict[str, Target] = field(default_factory=dict)
    _dialling: dict[str, _Dialling] = field(default_factory=dict)
    _told: set[tuple[str, str]] = field(default_factory=set)
    _ticked_s: float = 0.0

    def want(self, name: str, address: Address, node_id: str | None) -> None:
        """Have `address` dialled until there is a connection to its node. `name` is the node's id, or a seed's text."""
        target = self._targets.get(name)
        if target is None or target.address != address:
            self._targets[name] = Target(address, node_id)

    def unwant(self, name: str) -> None:
        self._targets.pop(name, None)

    @property
    def wanted(self) -> set[str]:
        """The names of `want`."""
        return set(self._targets)

    def accept(self, connection: Connection) -> None:
        """A node has dialled us and proved who it is."""
        self._establish(connection, dialled=False)

    def send(self, node_id: str, message: Message) -> bool:
        """Queue a message; whether there is a connection to the node."""
        peer = self.peers.get(node_id)
        if peer is None:
            return False
        peer.connection.send(encode(message))
        self._flush(peer)
        return node_id in self.peers

    def has_room(self, node_id: str) -> bool:
        """Whether a large transfer to the node may go on."""
        peer = self.peers.get(node_id)
        return peer is not None and peer.connection.outgoing_bytes < WAITING_BYTES_MAX

    def tick(self, now_s: float) -> None:
        """Dial what is wanted and due; give up what takes too long, and who says nothing any more."""
        self._drop_silent(now_s)
        for name, dialling in list(self._dialling.items()):
            if now_s >= dialling.until_s:
                self._failed(name, now_s)
        for name, target in self._targets.items():
            connected = target.node_id is not None and target.node_id in self.peers
            if not connected and name not in self._dialling and now_s >= target.next_s:
                self._dial(name, target, now_s)

    def _drop_silent(self, now_s: float) -> None:
        has_slept = now_s - self._ticked_s > SILENT_S / 2  # then what came meanwhile may not be read yet
        self._ticked_s = now_s
        for node_id, peer in list(self.peers.items()):
            if peer.has_spoken or has_slept:
                peer.has_spoken, peer.heard_s = False, now_s
            elif now_s - peer.heard_s >= SILENT_S:
                self._drop(node_id)

    def close(self) -> None:
        for dialling in self._dialling.values():
            self.selector.unregister(dialling.connection)
            dialling.connection.close()
        for peer in self.peers.values():
            self.selector.unregister(peer.connection)
            peer.connection.close()
        self._dialling.clear()
        self.peers.clear()

    # ---- dialling

    def _dial(self, name: str, target: Target, now_s: float) -> None:
        try:
            connection = start_dial(target.address.host, target.address.port, self.make_handshake())
        except ConnectionClosed as error:
            self._again(target, now_s)
            if error.how == "refused" and target.node_id:
                self.events.on_refused(target.node_id)
            return
        self._dialling[name] = _Dialling(target, connection, now_s + config.PREAUTH_S)
        self.selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, lambda mask: self._on_dialling(name, now_s))

    def _on_dialling(self, name: str, now_s: float) -> None:
        dialling = self._dialling.get(name)
        if dialling is None:
            return
        connection = dialling.connection
        try:
            connection.flush()
            payloads = connection.read()
        except ConnectionClosed as error:
            self._failed(name, now_s)
            if error.how == "refused" and dialling.target.node_id:
                self.events.on_refused(dialling.target.node_id)
            return
        except ClusterError as error:
            self._failed(name, now_s)
            self._tell((str(dialling.target.address), error.code), f"{dialling.target.address}: {error}")
            return
        if not connection.is_established:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_write else 0)
            self.selector.modify(connection, wanted, self.selector.get_key(connection).data)
            return
        del self._dialling[name]
        self.selector.unregister(connection)
        assert connection.session is not None, "an established connection has a session"
        if dialling.target.node_id in (None, connection.session.peer.node_id):
            dialling.target.tries = 0
        else:
            self._again(dialling.target, now_s)  # another node has its address by now
        if dialling.target.node_id is None and name in self._targets:
            del self._targets[name]
            self._targets[connection.session.peer.node_id] = dialling.target
            dialling.target.node_id = connection.session.peer.node_id
        self._establish(connection, dialled=True)
        for payload in payloads:
            self._hear(connection.session.peer.node_id, payload)

    def _failed(self, name: str, now_s: float) -> None:
        dialling = self._dialling.pop(name)
        self.selector.unregister(dialling.connection)
        dialling.connection.close()
        self._again(dialling.target, now_s)

    def _again(self, target: Target, now_s: float) -> None:
        target.next_s = now_s + min(REDIAL_S * 2.0 ** min(target.tries, config.DOUBLINGS_MAX), REDIAL_S_MAX)
        target.tries += 1

    def _put_off(self, node_id: str) -> None:
        """Who says what nobody understands is dialled again, but not at once."""
        target = self._targets.get(node_id)
        if target is not None:
            target.next_s = self._ticked_s + REDIAL_S_MAX

    def _tell(self, key: tuple[str, str], text: str) -> None:
        """Once for each place and kind of trouble: the text may hold what a stranger says, who can say something else each time."""
        if key not in self._told and len(self._told) < TOLD_MAX:
            self._told.add(key)
            self.events.on_note(text)

    # ---- connections

    def _establish(self, connection: Connection, dialled: bool) -> None:
        assert connection.session is not None, "an established connection has a session"
        identity = connection.session.peer
        if identity.node_id == self.node_id or not self._stays(identity, dialled):
            connection.close()
            return
        self._drop(identity.node_id)
        peer = Peer(identity, connection, dialled)
        self.peers[identity.node_id] = peer
        self.selector.register(connection, selectors.EVENT_READ, lambda mask: self._on_peer(peer, mask))
        self.events.on_connected(identity)
        self._flush(peer)

    def _stays(self, identity: Identity, dialled: bool) -> bool:
        """Whether the new connection takes the place of the one that there is."""
        old = self.peers.get(identity.node_id)
        if old is None or old.identity.boot_id != identity.boot_id or old.dialled == dialled:
            return True
        return dialled == (self.node_id < identity.node_id)

    def _on_peer(self, peer: Peer, mask: int) -> None:
        node_id = peer.identity.node_id
        if self.peers.get(node_id) is not peer:
            return
        peer.has_spoken = peer.has_spoken or bool(mask & selectors.EVENT_READ)
        try:
            for payload in peer.connection.read() if mask & selectors.EVENT_READ else ():
                if self.peers.get(node_id) is not peer:
                    return
                self._hear(node_id, payload)
        except ConnectionClosed:
            self._drop(node_id)
            return
        except ProtocolError as error:
            self.refused_count += 1
            self._tell((node_id, error.code), f"node {peer.identity.name}: {error}; its connection is closed")
            self._drop(node_id)
            self._put_off(node_id)
            return
        if self.peers.get(node_id) is peer:
            self._flush(peer)

    def _hear(self, node_id: str, payload: bytes | bytearray | memoryview) -> None:
        self.events.on_message(node_id, decode(payload))

    def _flush(self, peer: Peer) -> None:
        try:
            peer.connection.flush()
        except ConnectionClosed:
            self._drop(peer.identity.node_id)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.connection.wants_write else 0)
        key = self.selector.get_key(peer.connection)
        if key.events != wanted:
            self.selector.modify(peer.connection, wanted, key.data)

    def _drop(self, node_id: str) -> None:
        peer = self.peers.pop(node_id, None)
        if peer is None:
            return
        self.selector.unregister(peer.connection)
        peer.connection.close()
        target = self._targets.get(node_id)
        if target is not None:
            target.tries, target.next_s = 0, 0.0
        self.events.on_gone(node_id)
