"""Two clusters of one name: how the one without work gives way to the other.

The verdict is `membership`'s, and whether it still holds when it counts is decided where the commands are applied: first the cluster that stays writes
into its log that it accepts, and dissolves no more; then the other writes into its own that it dissolves, unless something was put there meanwhile.
Its nodes set their copies aside and join as new ones.
"""

from __future__ import annotations

from p2pcluster.core.codec import Message
from p2pcluster.core.membership import Discovery, Rival, Verdict
from p2pcluster.core.node import Node
from p2pcluster.core.records import Outcome
from p2pcluster.neighbours import Neighbours
from p2pcluster.peers import Peers

ASK_INTERVAL_MS = 1000
GO_WITHIN_MS = 3000  # after which a node of a dissolved cluster goes though others may not have heard of it


class Rivals:
    """See the module. The loop calls `tick`, and asks `may_go` before its node joins the other cluster."""

    def __init__(self, node_id: str, neighbours: Neighbours, peers: Peers) -> None:
        self._node_id = node_id
        self._neighbours = neighbours
        self._peers = peers
        self._asks_at_ms = 0
        self._goes_at_ms: int | None = None

    def tick(self, node: Node, discovery: Discovery, now_ms: int) -> None:
        """Where this node's cluster is to give way, ask the leader of the other to accept that, again and again."""
        if not node.is_serving or node.state.has_work:
            return
        for rival in discovery.rivals(now_ms):
            if rival.verdict is Verdict.YIELDS and rival.doors:
                self._ask(rival, now_ms)

    def _ask(self, rival: Rival, now_ms: int) -> None:
        door = rival.doors[0]  # its leader's, where that is known
        if door.node_id not in self._neighbours.connected:
            self._peers.want(door.node_id, door.address, door.node_id)
        elif now_ms >= self._asks_at_ms:
            self._asks_at_ms = now_ms + ASK_INTERVAL_MS
            self._neighbours.send(door.node_id, Message("give_way", {"cluster": self._neighbours.cluster_id}))

    def on_message(self, node: Node, discovery: Discovery, sender: str, message: Message, now_ms: int) -> None:
        """Another cluster would give way to this one, or has heard that this one may."""
        cluster = message.fields["cluster"]
        if not node.is_serving or cluster == self._neighbours.cluster_id and message.kind == "give_way":
            return
        if message.kind == "accepted":
            if cluster == self._neighbours.cluster_id:
                node.dissolve(message.fields["into"])
        elif not any(rival.cluster_id == cluster and rival.verdict is Verdict.YIELDS for rival in discovery.rivals(now_ms)):
            node.accept(cluster, self._on_accepted, sender, cluster)

    def _on_accepted(self, outcome: Outcome, sender: str, cluster: str) -> None:
        if outcome.result == "ok":
            self._neighbours.send(sender, Message("accepted", {"cluster": cluster, "into": self._neighbours.cluster_id}))

    def may_go(self, node: Node, now_ms: int) -> bool:
        """Whether the cluster has dissolved and nobody needs this node to hear of it any more."""
        if node.state.moved_to is None:
            return False
        self._goes_at_ms = self._goes_at_ms or now_ms + GO_WITHIN_MS
        others = [session for session in node.sessions.values() if session.kind == "node" and session.node != self._node_id]
        return not node.is_serving or not others or now_ms >= self._goes_at_ms
