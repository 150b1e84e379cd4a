"""Finding the server of a port without its address: ask the network, and believe who proves that it lives and has the key.

It is no node: it says of itself that it joins something, and servers of the older API are alone in their clusters and count nobody.
"""

from __future__ import annotations

import platform
import secrets
import selectors
import time

import p2pcluster
from p2pcluster.config import Address, Options
from p2pcluster.core import protocol
from p2pcluster.core.datagram import Beacon, Gate, Reason, Refused, State
from p2pcluster.core.handshake import derive_key
from p2pcluster.errors import AuthenticationFailed, ClusterNotFound
from p2pcluster.lan import Lan

ASK_EACH_S = 0.5
OTHER_S = 2.0  # after a server with another key was heard, for one with this
SECOND_S = 0.3  # after the first server was heard, for others: nobody may work for two halves of a pipeline unaware


def find_servers(options: Options, secret: bytes, timeout_s: float) -> list[Address]:
    """Where the servers of this port and key listen, in an order that is the same for all who look: there should be one. Raises
    `ClusterNotFound` and `AuthenticationFailed`."""
    with Lan(options.bind, options.port) as lan:
        found, other_key = _Search(options, secret, lan).run(timeout_s)
    if found:
        return sorted(found.values())
    if other_key:
        raise AuthenticationFailed(f"the server of port {options.port} at {other_key} has another authkey: give both programs the same")
    raise ClusterNotFound(f"no server of port {options.port} and this authkey was heard for {timeout_s:g} s: start one, let UDP and TCP "
                          f"port {options.port} through the firewalls, or name its address with BaseClient")


class _Search:
    def __init__(self, options: Options, secret: bytes, lan: Lan) -> None:
        self._lan = lan
        node_id, boot_id = secrets.token_hex(8), secrets.token_hex(8)
        self._gate = Gate(derive_key(secret), options.cluster, node_id, boot_id, secrets.token_bytes(32), protocol.VERSION)
        self._me = Beacon(
            name="client", state=State.JOINING, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None, last_index=0,
            last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1, tcp_host=None, tcp_port=options.port,
            udp_port=lan.own_port, interval_ms=1, package=p2pcluster.__version__, python=platform.python_version(),
        )
        self._other_key = ""
        self._found: dict[str, Address] = {}  # by node: one may be heard over several networks

    def run(self, timeout_s: float) -> tuple[dict[str, Address], str]:
        """The servers by node, and the host of one with another key, or ""."""
        by_s, ask_s = time.monotonic() + timeout_s, 0.0
        with selectors.DefaultSelector() as selector:
            for sock in self._lan.sockets():
                selector.register(sock, selectors.EVENT_READ)
            while (now_s := time.monotonic()) < by_s:
                if now_s >= ask_s:
                    ask_s = now_s + ASK_EACH_S
                    self._lan.broadcast(self._gate.seal(self._me, broadcast=True))
                self._hear(round(now_s * 1000))
                if self._found or self._other_key:
                    by_s = min(by_s, now_s + (SECOND_S if self._found else OTHER_S))
                selector.select(max(0.0, min(ask_s, by_s) - time.monotonic()))
        return self._found, self._other_key

    def _hear(self, now_ms: int) -> None:
        for data, where in self._gate.repeat_questions(self._me, now_ms):
            self._send(data, where)
        for data, address in self._lan.receive():
            heard = self._gate.open(data, address, self._me, now_ms)
            for answer, where in heard.answers:
                self._send(answer, where)
            if isinstance(heard, Refused):
                if heard.reason is Reason.OTHER_KEY:
                    self._other_key = self._other_key or address.host
            elif isinstance(heard.body, Beacon) and heard.body.leader_id is not None:  # only a server leads; other clients ask as this does
                self._found.setdefault(heard.node_id, Address(heard.body.tcp_host or heard.address.host, heard.body.tcp_port))

    def _send(self, data: bytes, where: Address | None) -> None:
        if where is None:
            self._lan.broadcast(data)
        else:
            self._lan.send(data, where)
