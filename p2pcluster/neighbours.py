"""A node among others: whom it is connected to, who leads, how it joins, and how a snapshot travels.

It stands between the loop and the connections (`peers`): Raft's messages to the core, a member's messages to the leader's half or the machine's half,
whichever they are for. What any of them means is the core's word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from p2pcluster import config
from p2pcluster.config import parse_address
from p2pcluster.core import protocol
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.handshake import Identity
from p2pcluster.core.messages import KINDS_ON_THE_WIRE, InstallSnapshot, SnapshotMeta, from_message, to_message
from p2pcluster.core.node import Node, ToPeer
from p2pcluster.core.snapshot import Head
from p2pcluster.errors import RemoteProtocolError
from p2pcluster.peers import SILENT_S, Peers

SLICE_BYTES = config.BULK_SLICE_BYTES
BETWEEN_CLUSTERS = ("hello", "give_way", "accepted")  # two of one name and key talk only about which one stays
HELLO_INTERVAL_MS = int(1000 * SILENT_S) // 4  # said again although nothing is new: who says nothing is taken for dead


@dataclass(slots=True)
class Hello:
    """What a node last said of itself and of who leads, over the connection `number`."""

    identity: Identity
    number: int
    cluster_id: str | None = None
    leader: str | None = None
    leader_address: str | None = None
    term: int = 0
    is_here: bool = True


@dataclass(slots=True)
class _Outgoing:
    head: Head
    snapshot_id: str
    data: bytes
    sent: int = 0


@dataclass(slots=True)
class _Incoming:
    snapshot_id: str
    total: int
    data: bytearray = field(default_factory=bytearray)


class Neighbours:
    """See the module. The loop calls `tick` and `carry`, and hears through the callables."""

    def __init__(self, node_id: str, address: str, peers: Peers, to_leader_half: Callable[[str, Message], None],
                 to_machine_half: Callable[[Message], None]) -> None:
        self.node_id = node_id
        self.address = address
        self.cluster_id: str | None = None
        self.hellos: dict[str, Hello] = {}
        self.node: Node | None = None
        self._peers = peers
        self._to_leader_half = to_leader_half
        self._to_machine_half = to_machine_half
        self._connections = 0
        self._said: tuple[Any, ...] = ()
        self._said_ms = 0
        self._outgoing: dict[str, _Outgoing] = {}
        self._incoming: dict[str, _Incoming] = {}
        self._whole: dict[str, bytes] = {}

    # ---- who is there and who leads

    @property
    def connected(self) -> dict[str, Identity]:
        return {node_id: peer.identity for node_id, peer in self._peers.peers.items()}

    def leader(self) -> tuple[str | None, str | None]:
        """Who leads, as far as is known here, and where."""
        assert self.node is not None, "the node is made before it has neighbours"
        raft = self.node.raft
        if raft.leader_id is not None:
            return raft.leader_id, self.address_of(raft.leader_id)
        told = [hello for hello in self.hellos.values() if hello.leader and hello.is_here and hello.cluster_id == self.cluster_id]
        best = max(told, key=lambda hello: hello.term, default=None)
        if best is None or best.leader is None or (self.node_id in raft.configuration.members and best.term < raft.term):
            return None, None
        # Where this node sees him: who listens on all addresses cannot say more of himself than that.
        return best.leader, self.address_of(best.leader) or best.leader_address

    def serving_leader(self) -> tuple[str, int, int] | None:
        """Who leads and has said so himself, which he does once he serves, in which term and over which connection; only he can be
        worked for. Over another connection he knows nothing of what was said before, though it may have come between two looks."""
        assert self.node is not None, "the node is made before it has neighbours"
        if self.node.is_serving:
            return self.node_id, self.node.raft.term, 0
        said = [(hello.term, node_id) for node_id, hello in self.hellos.items()
                if hello.leader == node_id and hello.is_here and hello.cluster_id == self.cluster_id]
        term, leader = max(said, default=(0, None))
        is_old = self.node_id in self.node.raft.configuration.members and term < self.node.raft.term
        return None if leader is None or is_old else (leader, term, self.hellos[leader].number)

    def address_of(self, node_id: str) -> str | None:
        """Where a member listens."""
        if node_id == self.node_id:
            return self.address
        peer = self._peers.peers.get(node_id)
        if peer is not None and peer.address is not None:
            return peer.address
        assert self.node is not None, "the node is made before it has neighbours"
        member = self.node.state.members.get(node_id)
        return str(member["facts"]["address"]) if member and member["facts"].get("address") else None

    def addresses(self, most: int) -> list[str]:
        """Where other nodes of the cluster listen, as far as is known here."""
        members = self.node.state.members if self.node is not None else {}
        found = [self.address_of(node_id) for node_id in [*members, *self.hellos] if node_id != self.node_id]
        return list(dict.fromkeys(address for address in found if address))[:most]

    def on_connected(self, identity: Identity, now_ms: int) -> None:
        self._connections += 1
        self.hellos[identity.node_id] = Hello(identity, self._connections, identity.cluster_id)
        self._said = ()
        if self.node is not None:
            self.node.raft.peer_connected(identity.node_id, now_ms)

    def on_gone(self, node_id: str, now_ms: int) -> None:
        hello = self.hellos.get(node_id)
        if hello is not None:
            hello.is_here = False
        self._outgoing.pop(node_id, None)
        self._incoming.pop(node_id, None)
        if self.node is not None:
            self.node.raft.peer_disconnected(node_id, now_ms)
            self.node.close_session(session_of(node_id))

    def on_refused(self, node_id: str, now_ms: int) -> None:
        if self.node is not None:
            self.node.raft.peer_refused(node_id, now_ms)

    def tick(self, now_ms: int) -> None:
        """Dial whom this node should be connected to, and say who leads: when that has changed, and now and then."""
        assert self.node is not None, "the node is made before it has neighbours"
        self._want_members()
        leader, address = (self.node_id, self.address) if self.node.is_serving else self.leader()
        if leader == self.node_id and not self.node.is_serving:
            leader = address = None
        said = (self.cluster_id, leader, address, self.node.raft.term)
        if said != self._said or now_ms >= self._said_ms + HELLO_INTERVAL_MS:
            self._said, self._said_ms = said, now_ms
            for node_id in list(self._peers.peers):
                self._peers.send(node_id, Message("hello", {"cluster_id": self.cluster_id, "leader": leader, "leader_address": address,
                                                            "term": self.node.raft.term}))

    def _want_members(self) -> None:
        """Members with a copy are all connected, the lower id dials; anybody else dials the leader."""
        assert self.node is not None, "the node is made before it has neighbours"
        members = self.node.raft.configuration.members
        wanted: dict[str, str] = {}
        if self.node_id in members:
            wanted = {other: found for other in sorted(members) if self.node_id < other and (found := self.address_of(other))}
        leader, address = self.leader()
        if leader is not None and leader != self.node_id and address and self.node_id not in members:
            wanted[leader] = address
        # A node that lost its disk is another one at the old one's address: whoever dialled there for the old one would replace the
        # connection to the new one again and again.
        taken = {self.address, *(peer.address for peer in self._peers.peers.values())}
        wanted = {other: where for other, where in wanted.items() if other in self._peers.peers or where not in taken}
        for node_id, where in wanted.items():
            self._peers.want(node_id, parse_address(where), node_id)
        for name in self._peers.wanted - set(wanted):
            if name in members or name in self.hellos:
                self._peers.unwant(name)

    # ---- messages

    def on_message(self, node_id: str, message: Message, now_ms: int) -> None:
        """A node says something. Raises `ProtocolError` for what no node says."""
        assert self.node is not None, "the node is made before it has neighbours"
        if message.kind not in BETWEEN_CLUSTERS and self._is_foreign(node_id):
            raise RemoteProtocolError(f"a node of another cluster of this name does not send {message.kind!r:.50}")
        if message.kind in KINDS_ON_THE_WIRE:
            self._on_raft(node_id, message, now_ms)
            return
        spec = protocol.MEMBER.get(message.kind)
        sender = "executor" if spec is None else spec.sender
        protocol.check("member", sender, message)
        if message.kind == "hello":
            self._on_hello(node_id, message)
        elif message.kind == "snapshot_slice":
            self._on_slice(node_id, message)
        elif sender == "executor" or message.kind in ("give_way", "accepted"):
            self._to_leader_half(node_id, message)
        elif (serving := self.serving_leader()) is not None and node_id == serving[0]:
            self._to_machine_half(message)

    def _on_hello(self, node_id: str, message: Message) -> None:
        hello, where = self.hellos[node_id], message.fields["leader_address"]
        try:
            _ = None if where is None else parse_address(where)
        except ValueError as error:
            raise RemoteProtocolError(f"{where!r:.50} is not where a leader is") from error
        hello.cluster_id, hello.leader = message.fields["cluster_id"], message.fields["leader"]
        hello.leader_address, hello.term = where, message.fields["term"]

    def _is_foreign(self, node_id: str) -> bool:
        return None not in (self.cluster_id, self.hellos[node_id].cluster_id) and self.cluster_id != self.hellos[node_id].cluster_id

    def _on_raft(self, node_id: str, message: Message, now_ms: int) -> None:
        assert self.node is not None, "the node is made before it has neighbours"
        raft_message = from_message(message, over_tcp=True)
        if raft_message.sender != node_id:
            raise RemoteProtocolError(f"it sent a Raft message in the name of {raft_message.sender!r:.50}")
        if isinstance(raft_message, InstallSnapshot) and raft_message.snapshot.snapshot_id not in self._whole:
            return  # its bytes did not arrive whole: the leader asks again
        self.node.step_raft(raft_message, now_ms)

    def carry(self, messages: list[ToPeer]) -> None:
        """Send Raft's messages."""
        for to_peer in messages:
            self._peers.send(to_peer.peer, to_message(to_peer.message))

    def send(self, node_id: str, message: Message) -> bool:
        return self._peers.send(node_id, message)

    # ---- snapshots

    def begin_snapshot(self, peer: str, head: Head, data: bytes) -> None:
        """Send a snapshot to a peer, in slices, as the connection has room."""
        self._outgoing[peer] = _Outgoing(head, sha256(data).hexdigest(), data)

    def carry_snapshots(self) -> None:
        """Send the next slices; behind the last one Raft's message about it."""
        assert self.node is not None, "the node is made before it has neighbours"
        for peer, outgoing in list(self._outgoing.items()):
            while self._peers.has_room(peer) and outgoing.sent < len(outgoing.data):
                part = memoryview(outgoing.data)[outgoing.sent : outgoing.sent + SLICE_BYTES]
                fields = {"snapshot_id": outgoing.snapshot_id, "offset": outgoing.sent, "total": len(outgoing.data)}
                if not self._peers.send(peer, Message("snapshot_slice", fields, (part,))):
                    return
                outgoing.sent += len(part)
            if outgoing.sent == len(outgoing.data):
                del self._outgoing[peer]
                head = outgoing.head
                self.node.raft.snapshot_taken(peer, SnapshotMeta(head.index, head.term, head.at_ms, head.configuration, outgoing.snapshot_id))

    @property
    def is_sending(self) -> bool:
        return bool(self._outgoing)

    def _on_slice(self, node_id: str, message: Message) -> None:
        fields = message.fields
        incoming = self._incoming.get(node_id)
        if incoming is None or incoming.snapshot_id != fields["snapshot_id"]:
            incoming = self._incoming[node_id] = _Incoming(fields["snapshot_id"], fields["total"])
        if fields["offset"] != len(incoming.data):
            return
        incoming.data += message.blobs[0]
        if len(incoming.data) == incoming.total:
            del self._incoming[node_id]
            is_awaited = self.node is not None and not self.node.raft.is_installing  # else it would replace what is to be installed
            if is_awaited and sha256(incoming.data).hexdigest() == incoming.snapshot_id:
                self._whole = {incoming.snapshot_id: bytes(incoming.data)}

    def take_snapshot(self, snapshot_id: str) -> Buffer:
        """The bytes of a snapshot that arrived whole."""
        return self._whole.pop(snapshot_id)


def session_of(node_id: str) -> str:
    """The name of a member's session with the leader."""
    return f"node:{node_id}"
