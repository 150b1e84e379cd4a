"""Finding a cluster's nodes for a program that is none: it asks the network, and believes who proves that it lives and has the key.

It never answers the question by which nodes learn that somebody lives, so that it counts in nobody's founding or election. And it listens
before it speaks: a node that is about to found its cluster founds none once it has heard another key.
"""

from __future__ import annotations

import platform
import secrets
import selectors
import time
from types import TracebackType
from typing import Self

import p2pcluster
from p2pcluster import config
from p2pcluster.config import Address, Options
from p2pcluster.core import protocol
from p2pcluster.core.datagram import Beacon, Gate, Heard, Reason, State
from p2pcluster.lan import Lan, Seeds

QUIET_S = config.BEACON_INTERVAL_LEADERLESS_S * 1.2  # who has no leader beacons once in this time, unasked
SPEAK_EACH_S = 0.5
LOOK_S = 0.02
_OTHER_KEYS = (Reason.OTHER_KEY, Reason.NO_KEY)


class Finder:
    """Listens on the cluster's port while it is open. `key` is the derived one. Raises `HomeError` where the port cannot be shared."""

    def __init__(self, options: Options, key: bytes, bind: str) -> None:
        self._lan = Lan(bind, options.port)
        self._seeds = Seeds(options.seed)
        self._gate = Gate(key, options.cluster, secrets.token_hex(8), secrets.token_hex(8), secrets.token_bytes(32), protocol.VERSION)
        self._me = Beacon(
            name="client", state=State.JOINING, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None, last_index=0,
            last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1, tcp_host=None, tcp_port=options.port,
            udp_port=self._lan.own_port, interval_ms=1, package=p2pcluster.__version__, python=platform.python_version(),
        )
        self._speak_s = time.monotonic() + QUIET_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._seeds.close()
        self._lan.close()

    def look(self, cluster_id: str | None, timeout_s: float) -> list[Address]:
        """Where a node of the cluster listens, and before it the one that it says leads; nothing when none is heard in time. None stands
        for any cluster of this name and key."""
        by_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for sock in self._lan.sockets():
                selector.register(sock, selectors.EVENT_READ)
            while (now_s := time.monotonic()) < by_s:
                found = self._hear(cluster_id, round(now_s * 1000))
                if found:
                    return found
                if now_s >= self._speak_s and not any(reason in self._gate.refused_counts for reason in _OTHER_KEYS):
                    self._speak_s = now_s + SPEAK_EACH_S
                    self._speak()
                selector.select(LOOK_S)
        return []

    def _hear(self, cluster_id: str | None, now_ms: int) -> list[Address]:
        for data, where in self._gate.repeat_questions(self._me, now_ms):
            self._send(data, where)
        for data, address in self._lan.receive():
            heard = self._gate.open(data, address, self._me, now_ms)
            if isinstance(heard, Heard) and isinstance(heard.body, Beacon):
                beacon = heard.body
                if beacon.cluster_id is not None and cluster_id in (None, beacon.cluster_id):
                    own = Address(beacon.tcp_host or heard.address.host, beacon.tcp_port)
                    return [own] if beacon.leader_address is None else [beacon.leader_address, own]
        return []

    def _speak(self) -> None:
        self._lan.broadcast(self._gate.seal(self._me, broadcast=True))
        for seed in self._seeds.addresses():
            self._lan.send(self._gate.seal(self._me), seed)

    def _send(self, data: bytes, where: Address | None) -> None:
        if where is None:
            self._lan.broadcast(data)
        else:
            self._lan.send(data, where)
