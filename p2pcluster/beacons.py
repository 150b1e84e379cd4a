"""How a node is found and finds others: beacons and votes by UDP, wired to the loop.

It joins three parts that do not know each other: what a datagram is worth (`core.datagram`), what is decided on what was heard (`core.membership`),
and the sockets (`lan`). What a decision leads to is the loop's affair.
"""

from __future__ import annotations

import platform
import secrets
import selectors
from collections.abc import Callable
from random import Random
from typing import Any

import p2pcluster
from p2pcluster import config
from p2pcluster.config import Address, Options
from p2pcluster.core import protocol
from p2pcluster.core.datagram import Beacon, Gate, Heard, Reason, Refused, State, ballots, short_name
from p2pcluster.core.membership import AskForKey, Decision, Discovery
from p2pcluster.core.messages import PreVoteReply, PreVoteRequest, RaftMessage, VoteReply, VoteRequest
from p2pcluster.lan import Lan, Seeds

_ORDINARY = (Reason.OWN, Reason.UNPROVEN, Reason.REPEATED, Reason.ELSEWHERE)  # what happens where nobody does anything wrong
_VOTES = (PreVoteRequest, PreVoteReply, VoteRequest, VoteReply)


class Beacons:
    """See the module. `on_decision` hears each decision once, `on_vote` what came by UDP, `on_note` sentences for people.

    With `alone` it is found, and finds nobody: it answers who asks, and no other node is anything to it.
    """

    def __init__(self, options: Options, node_id: str, boot: str, name: str, key: bytes | None, tcp_port: int, cluster_id: str | None,
                 belonged_to: str | None, selector: selectors.BaseSelector, now_ms: int, on_decision: Callable[[Decision], None],
                 on_vote: Callable[[RaftMessage], None], on_note: Callable[[str], None], alone: bool = False) -> None:
        self._options = options
        self._alone = alone
        self._node_id = node_id
        self._boot = boot
        self._selector = selector
        self._on_decision = on_decision
        self._on_vote = on_vote
        self._on_note = on_note
        self.lan = Lan(options.bind, options.port)
        self._seeds = Seeds(options.seed)
        self._gate = self._gate_for(key)
        host = None if options.advertise is None else options.advertise
        me = Beacon(
            name=short_name(name), state=State.FRESH, cluster_id=cluster_id, generation=0, term=0, leader_id=None, leader_address=None, last_index=0,
            last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=options.expect, tcp_host=host,
            tcp_port=tcp_port, udp_port=self.lan.own_port, interval_ms=1, package=p2pcluster.__version__, python=platform.python_version(),
        )
        window_ms = config.FOUNDING_WINDOW_LOOPBACK_MS if options.loopback or alone else config.FOUNDING_WINDOW_MS
        self.discovery = Discovery(node_id, me, Random(secrets.randbits(64)), now_ms, window_ms=window_ms, has_key=key is not None,
                                   seeds=self._seeds.addresses(), belonged_to=belonged_to)
        for sock in self.lan.sockets():
            selector.register(sock, selectors.EVENT_READ, self._on_readable)
        self._received: list[tuple[bytes, Address]] = []

    def _gate_for(self, key: bytes | None) -> Gate:
        return Gate(key, self._options.cluster, self._node_id, self._boot, secrets.token_bytes(32), protocol.VERSION)

    @property
    def refused_count(self) -> int:
        """Datagrams that no honest program of this cluster sends, since this node has its key."""
        return sum(count for reason, count in self._gate.refused_counts.items() if reason not in _ORDINARY)

    def use_key(self, key: bytes, made: bool, now_ms: int) -> None:
        """There is a key now: made here, or found. What waits in the sockets was said before anybody had it."""
        self.lan.receive()
        self._received.clear()
        self._gate = self._gate_for(key)
        if made:
            self.discovery.key_made(now_ms)
        else:
            self.discovery.key_found(now_ms)

    def _on_readable(self, mask: int) -> None:
        # Read at once, or the loop would turn without rest until the tick; what it means can wait for that.
        self._received += self.lan.receive()

    def tick(self, now_ms: int, facts: dict[str, Any]) -> None:
        """Hear, decide, speak. `facts` are what beacons say of this node, as fields of `Beacon`."""
        self.discovery.seeds = self._seeds.addresses()
        self.discovery.update(now_ms, **facts)
        received, self._received = self._received, []
        for data, address in received:
            self._hear(data, address, now_ms)
        for data, where in self._gate.repeat_questions(self.discovery.beacon, now_ms):
            self._send(data, where)
        due = self.discovery.due(now_ms)
        if due.broadcast:
            self.lan.broadcast(self._gate.seal(self.discovery.beacon, broadcast=True))
        for address in due.unicast:
            self.lan.send(self._gate.seal(self.discovery.beacon), address)
        if due.decision is not None:
            self._on_decision(due.decision)
        for note in [*self._gate.take_notes(), *self.lan.take_notes()]:
            self._on_note(note)

    def _hear(self, data: bytes, address: Address, now_ms: int) -> None:
        heard = self._gate.open(data, address, self.discovery.beacon, now_ms)
        for answer, where in heard.answers:
            self._send(answer, where)
        if self._alone:
            return
        if isinstance(heard, Refused):
            self.discovery.hear_refused(heard, now_ms)
        elif isinstance(heard, Heard) and isinstance(heard.body, Beacon):
            self.discovery.hear(heard, now_ms)
        elif isinstance(heard.body, RaftMessage):
            self._on_vote(heard.body)

    def _send(self, data: bytes, where: Address | None) -> None:
        if where is None:
            self.lan.broadcast(data)
        else:
            self.lan.send(data, where)

    def send_votes(self, messages: list[RaftMessage]) -> None:
        """Vote requests and votes, by broadcast, and by unicast to whom no broadcast reaches."""
        votes = [message for message in messages if isinstance(message, _VOTES)]
        for ballot in ballots(votes):
            self.lan.broadcast(self._gate.seal(ballot, broadcast=True))
            for address in self.discovery.udp_addresses(ballot.to):
                self.lan.send(self._gate.seal(ballot), address)

    def close(self) -> None:
        for sock in self.lan.sockets():
            self._selector.unregister(sock)
        self.lan.close()
        self._seeds.close()


def ask_for_key_text(decision: AskForKey, cluster: str) -> str:
    """What a node without a key says when there is a cluster of its name."""
    return (f"cluster {cluster!r} is here (at {decision.host}) and this machine has not its key: on a machine that has it run python -m p2pcluster "
            "key, then here python -m p2pcluster key --set and paste it")
