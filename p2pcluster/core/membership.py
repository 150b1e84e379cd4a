"""Who makes a cluster, who joins it, and which of its members vote.

Decided here alone: when a node founds and when it never may, when it says its beacon and to whom, which of two clusters
of one name stays, whom to dial to find the leader, and which configuration a leader strives for. Not known here: how a
datagram is proven (`datagram.py`), how a change of the configuration happens (`raft.py`), sockets, the time, chance
(both are arguments).

Founding. A fresh node listens for a window. It beacons every sixth of it, so that one of its last two beacons is heard
wherever no more than every other one is lost. Whoever hears a member never founds. When the window is over, the
lowest id founds among those of whom one of the last two beacons was heard:

    FRESH --hears of a cluster--> JOINING --the node has joined--> MEMBER
      | window over, lowest, enough nodes                            ^
      +-------------------------> FOUNDER --a window without another-+
      | heard its cluster's name under another key
      +-------------------------> BLOCKED (joins all the same, if a member is heard)

Two nodes that both hear each other as promised cannot both found: the one that is not the lowest waits. Two that did
not hear each other can, and see it when they do: `Discovery.rivals` says which cluster stays.

Which one stays: the one in which something was put or done; of two such, both (people decide); of two empty ones the
one with more members, then the lower id. Work comes before members because an empty cluster loses nothing by giving
way, however many nodes are in it: a machine without data that was switched on before the machine with the data would
else keep them apart.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.core.datagram import Beacon, Heard, Reason, Refused, State
from p2pcluster.core.quorum import Configuration

if TYPE_CHECKING:
    from random import Random

PEERS_MAX = 1024  # remembered from beacons
PAST_BOOTS_MAX = 8  # of one node: a late datagram of a program that is gone brings nothing back
HURRIED_WINDOWS = 10  # a fresh node beacons fast for so long; then it waits for people, who need no hurry
LEADERLESS_MS = round(1000 * config.BEACON_INTERVAL_LEADERLESS_S)
CALM_MS_MIN = round(1000 * config.BEACON_INTERVAL_S_MIN)
CALM_MS_MAX = round(1000 * config.BEACON_INTERVAL_S_MAX)
DEAD_VOTER_MS = round(1000 * config.PROMOTE_STABLE_S)  # a vote is lost as slowly as it is given: a restart moves none
DEAD_STANDBY_MS = 10 * DEAD_VOTER_MS  # replacing it copies the whole state to another machine


# --- Discovery ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class MakeKey:
    """Nobody of this cluster name has a key: make one, put it into the gate, and call `key_made`."""


@dataclass(frozen=True, slots=True)
class AskForKey:
    """Somebody has the key and this node has not: read the file once more, ask, or say so; then call `key_found`."""

    host: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Found:
    """Found the cluster: this node the only voter; then call `founded`."""


@dataclass(frozen=True, slots=True)
class Join:
    """There is a cluster: dial its leader (`leader`, `doors`); then call `joined`."""

    cluster_id: str


@dataclass(frozen=True, slots=True)
class Blocked:
    """This cluster's name is used under another key: say so, with `key`, `key --set` and `--cluster`."""

    host: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Serve:
    """No other founder was heard for a window: sources may start and puts be acknowledged."""


Decision = MakeKey | AskForKey | Found | Join | Blocked | Serve


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done now: say the beacon by broadcast, and to these; and what was decided, each thing once."""

    broadcast: bool = False
    unicast: tuple[Address, ...] = ()
    decision: Decision | None = None


class Verdict(enum.Enum):
    """What becomes of this node's cluster beside another one of its name."""

    STAYS = "stays"  # the other gives way: accept it when it asks
    YIELDS = "yields"  # nothing was put or done here: ask the other to accept, then dissolve
    STANDS = "stands"  # both hold work: both go on, and people decide


@dataclass(frozen=True, slots=True)
class Rival:
    """Another cluster of this name and key."""

    cluster_id: str
    verdict: Verdict
    members: int
    doors: tuple[Door, ...]


@dataclass(frozen=True, slots=True)
class Door:
    """A node of a cluster, and where it accepts connections."""

    node_id: str
    address: Address


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads, as far as it was heard. `address` is None while only its id is known."""

    node_id: str
    address: Address | None
    generation: int
    term: int


@dataclass(slots=True)
class Peer:
    """Another node, by its newest beacon."""

    node_id: str
    boot_id: str
    counter: int
    beacon: Beacon
    host: str
    heard_ms: int
    broadcast_ms: int | None = None  # when a broadcast of it was heard last
    past_boots: deque[str] = field(default_factory=lambda: deque(maxlen=PAST_BOOTS_MAX))

    @property
    def tcp_address(self) -> Address:
        """Where it accepts connections."""
        return Address(self.beacon.tcp_host or self.host, self.beacon.tcp_port)

    @property
    def udp_address(self) -> Address:
        """Its own socket for datagrams."""
        return Address(self.host, self.beacon.udp_port)

    def is_live(self, now_ms: int) -> bool:
        """Whether one of its last two beacons was heard."""
        return now_ms <= self.heard_ms + _two_beacons_ms(self.beacon)

    def hears_broadcast(self, now_ms: int) -> bool:
        """Whether broadcasts pass between it and this node, taken that they do so both ways."""
        return self.broadcast_ms is not None and now_ms <= self.broadcast_ms + 2 * _two_beacons_ms(self.beacon)


def _two_beacons_ms(beacon: Beacon) -> int:
    # Half an interval more, for two programs that do not run on the millisecond.
    return beacon.interval_ms * 5 // 2 + 2 * config.TICK_MS


class Discovery:
    """What one node knows from beacons, and what it decides on that.

    Invariants: it never decides `Found` after it has heard of a cluster of its name, nor while the name was heard under
    another key, nor before the window is over; each decision comes once.
    """

    def __init__(
        self,
        node_id: str,
        me: Beacon,
        random: Random,
        now_ms: int,
        *,
        window_ms: int,
        has_key: bool,
        seeds: Sequence[Address] = (),
        remembered: Sequence[Address] = (),
        belonged_to: str | None = None,
    ) -> None:
        """`me`: the node's facts; with a `cluster_id` it is a member, else fresh. State and interval are set here.

        `seeds` and `remembered` get each beacon by unicast, numeric addresses; a remembered one only while nobody is
        heard from its host. `belonged_to`: the cluster that this home worked for without a copy; it founds no other.
        """
        assert window_ms >= config.BEACONS_PER_FOUNDING_WINDOW
        self.node_id = node_id
        self.has_key = has_key
        self.seeds = tuple(seeds)
        self.remembered = tuple(remembered)
        self.peers: OrderedDict[str, Peer] = OrderedDict()
        self._random = random
        self._window_ms = window_ms
        self._beat_ms = window_ms // config.BEACONS_PER_FOUNDING_WINDOW
        self._other_key: tuple[str, str] | None = None
        self._cluster_heard: str | None = belonged_to
        self._belonged_to = belonged_to
        self._decided: set[type[Decision]] = set()
        self._answers: dict[Address, None] = {}
        self._stranger_answered_ms = now_ms - self._beat_ms
        self._said_ms = now_ms - self._beat_ms
        self._next_ms = now_ms
        self._serve_ms = 0
        self._is_asking = False
        state = State.MEMBER if me.cluster_id is not None else State.FRESH
        self.me = replace(me, state=state, interval_ms=self._beat_ms)
        self._listen(now_ms)
        if belonged_to is not None and state is State.FRESH:
            self._become(State.JOINING, now_ms)

    def _listen(self, now_ms: int) -> None:
        self._listens_until_ms = now_ms + self._window_ms
        # Time alone proves nothing where a whole machine stood still for a moment: others must have been asked so often,
        # a beat apart, and may have answered. One less than fits, since ticks are late.
        self._asks_left = config.BEACONS_PER_FOUNDING_WINDOW - 1
        self._hurries_until_ms = now_ms + HURRIED_WINDOWS * self._window_ms

    # What can happen

    @property
    def state(self) -> State:
        """Where this node stands."""
        return self.me.state

    @property
    def beacon(self) -> Beacon:
        """What to say now, and to give the gate for its answers."""
        return self.me

    def update(self, now_ms: int, **facts: Any) -> None:
        """The node's own facts have changed (fields of `Beacon`). Who begins to lead says so at once."""
        before = self.me
        self.me = replace(self.me, **facts)
        leads = self.me.leader_id == self.node_id
        if leads and (before.leader_id, before.term) != (self.me.leader_id, self.me.term):
            self._speak_soon(now_ms)
        elif before.leader_id is not None and self.me.leader_id is None:
            self._next_ms = min(self._next_ms, now_ms + self._random.randrange(LEADERLESS_MS))

    def hear(self, heard: Heard, now_ms: int) -> None:
        """A beacon that counts has come."""
        assert isinstance(heard.body, Beacon)
        known = self.peers.get(heard.node_id)
        if known is not None and not _is_newer(heard, known):
            return
        is_new = known is None or known.boot_id != heard.boot_id or not known.is_live(now_ms)
        peer = self._remember(heard, known, now_ms)
        if self._wants_answer(peer.beacon, is_new):
            self._answers[heard.address] = None
            if is_new:
                self._speak_soon(now_ms)
        self._hear_of_cluster(peer.beacon, now_ms)

    def hear_refused(self, refused: Refused, now_ms: int) -> None:
        """A datagram that does not count has come; that this cluster's name is used under another key does."""
        if refused.reason not in (Reason.OTHER_KEY, Reason.NO_KEY):
            return
        if refused.reason is Reason.OTHER_KEY:
            self._other_key = (refused.address.host, refused.key_id)
        # So that a node without the key, or with another one, sees within its window that this one is here. Nothing is
        # proven about it, so the answers are few, however much comes.
        if now_ms >= self._stranger_answered_ms + self._beat_ms:
            self._stranger_answered_ms = now_ms
            self._answers[refused.address] = None
            self._speak_soon(now_ms)

    def key_made(self, now_ms: int) -> None:
        """The key that `MakeKey` asked for is in the gate: no other was heard, so nothing more is listened for.

        If the file was there by then, made by another node of this machine, it is `key_found` instead.
        """
        self._have_key(now_ms)

    def key_found(self, now_ms: int) -> None:
        """The key that `AskForKey` asked for is in the gate: listen for a whole window under it."""
        self._listen(now_ms)
        self._have_key(now_ms)

    def founded(self, cluster_id: str, now_ms: int) -> None:
        """What `Found` asked for is durable."""
        assert self.state is State.FRESH
        self._serve_ms = now_ms + self._window_ms
        self.me = replace(self.me, cluster_id=cluster_id, members=max(1, self.me.members))
        self._become(State.FOUNDER, now_ms)

    def joined(self, cluster_id: str, now_ms: int) -> None:
        """The leader has taken this node in; a worker may later be taken in elsewhere."""
        self.me = replace(self.me, cluster_id=cluster_id)
        self._become(State.MEMBER, now_ms)

    def due(self, now_ms: int) -> Due:
        """What to do now."""
        decision = self._decide(now_ms)
        if self._is_asking:
            self._answers.clear()
            return Due(decision=decision)  # who waits for a person must not be waited for
        unicast = dict(self._answers)
        self._answers.clear()
        is_time = now_ms >= self._next_ms
        if is_time:
            self._schedule(now_ms)
            self._asks_left -= 1
            unicast.update(dict.fromkeys(self._unicast_addresses(now_ms)))
        return Due(is_time, tuple(unicast), decision)

    @property
    def next_due_ms(self) -> int:
        """When `due` has something to do again, if nothing is heard before."""
        if self._answers:
            return self._said_ms
        times = [self._next_ms]
        if self.state is State.FRESH and self._asks_left <= 0:
            times.append(max(self._listens_until_ms, self._said_ms + self._beat_ms))
        elif self.state is State.FOUNDER:
            times.append(self._serve_ms)
        return min(times)

    # What can be asked

    def live_peers(self, now_ms: int) -> list[Peer]:
        """Those of whom one of the last two beacons was heard."""
        return [peer for peer in self.peers.values() if peer.is_live(now_ms)]

    def cluster_id(self, now_ms: int) -> str | None:
        """The cluster that this node is of, or wants to join."""
        if self.me.cluster_id is not None:
            return self.me.cluster_id
        heard = [peer.beacon for peer in self.live_peers(now_ms) if _is_of_cluster(peer.beacon)]
        return min(heard, key=_precedence).cluster_id if heard else self._cluster_heard

    def leader(self, now_ms: int) -> Leader | None:
        """Who leads that cluster: the claim of the highest term, the newest of equal ones."""
        cluster_id = self.cluster_id(now_ms)
        claims = [
            (peer.beacon.generation, peer.beacon.term, peer.heard_ms, peer.beacon)
            for peer in self.peers.values()
            if peer.beacon.cluster_id == cluster_id and peer.beacon.leader_id is not None
        ]
        if self.me.cluster_id is not None and self.me.leader_id is not None:
            claims.append((self.me.generation, self.me.term, now_ms, self.me))
        if not claims:
            return None
        generation, term, _, beacon = max(claims, key=lambda claim: claim[:3])
        assert beacon.leader_id is not None
        # What the leader says of itself is nearer than what somebody else says of it.
        peer = self.peers.get(beacon.leader_id)
        address = beacon.leader_address if peer is None else peer.tcp_address
        return Leader(beacon.leader_id, address, generation, term)

    def doors(self, now_ms: int, cluster_id: str | None = None) -> list[Door]:
        """Where to knock at a cluster (by default the one that this node is of, or wants): its leader first."""
        cluster_id = cluster_id or self.cluster_id(now_ms)
        inside = [
            peer
            for peer in self.live_peers(now_ms)
            if peer.beacon.cluster_id == cluster_id and _is_of_cluster(peer.beacon)
        ]
        inside.sort(key=lambda peer: (peer.beacon.leader_id != peer.node_id, -peer.beacon.term, peer.node_id))
        return [Door(peer.node_id, peer.tcp_address) for peer in inside]

    def tcp_address(self, node_id: str) -> Address | None:
        """Where a node accepts connections, as it was heard last."""
        peer = self.peers.get(node_id)
        return None if peer is None else peer.tcp_address

    def udp_addresses(self, node_ids: Collection[str]) -> list[Address]:
        """Where datagrams for these nodes go beside the broadcast: votes are too dear to be lost on one way."""
        return [self.peers[node_id].udp_address for node_id in sorted(node_ids) if node_id in self.peers]

    def newest_generation(self) -> int:
        """The highest one heard of this node's own cluster: above its own, the node stops and rejoins as new."""
        heard = [p.beacon.generation for p in self.peers.values() if p.beacon.cluster_id == self.me.cluster_id]
        return max([self.me.generation, *heard]) if self.me.cluster_id is not None else self.me.generation

    def rivals(self, now_ms: int) -> list[Rival]:
        """Other clusters of this name. For whoever leads; it asks as long as there are any."""
        if self.state not in (State.FOUNDER, State.MEMBER) or self.me.cluster_id is None:
            return []
        others: dict[str, list[Peer]] = {}
        for peer in self.live_peers(now_ms):
            cluster_id = peer.beacon.cluster_id
            if _is_of_cluster(peer.beacon) and cluster_id is not None and cluster_id != self.me.cluster_id:
                others.setdefault(cluster_id, []).append(peer)
        return [self._rival(cluster_id, others[cluster_id], now_ms) for cluster_id in sorted(others)]

    def _rival(self, cluster_id: str, peers: list[Peer], now_ms: int) -> Rival:
        # Work is never taken back, so whoever knows of it is right; of all else the leader knows most.
        has_work = any(peer.beacon.has_work for peer in peers)
        beacon = replace(max(peers, key=_knowledge).beacon, has_work=has_work)
        return Rival(cluster_id, _verdict(self.me, beacon), beacon.members, tuple(self.doors(now_ms, cluster_id)))

    def alarms(self, now_ms: int) -> list[str]:
        """What people have to know about, as long as it is so."""
        return [
            f"two clusters of this name hold work: {self.me.cluster_id} here ({self.me.members} members) and"
            f" {rival.cluster_id} at {_where(rival)} ({rival.members} members): stop the nodes of one, or start them"
            " with another --cluster"
            for rival in self.rivals(now_ms)
            if rival.verdict is Verdict.STANDS
        ]

    def waits_for(self, now_ms: int) -> str:
        """What keeps a node from being in a cluster, in words; "" when nothing does."""
        if self.state is State.FRESH and self._has_listened(now_ms):
            missing = self._missing(now_ms)
            if missing:
                return f"waiting for {missing} more node{'s' * (missing > 1)} (--expect {self._expected()})"
            lower = self._lowest(now_ms)
            return "" if lower == self.node_id else f"waiting for {self.peers[lower].beacon.name}, which founds the cluster"
        if self.state is State.JOINING:
            doors = self.doors(now_ms)
            where = f"; heard at {doors[0].address}" if doors else ", of which nobody is heard: start its nodes"
            return f"waiting to join cluster {self.cluster_id(now_ms)}{where}"
        return ""

    # Hearing

    def _remember(self, heard: Heard, known: Peer | None, now_ms: int) -> Peer:
        beacon = heard.body
        assert isinstance(beacon, Beacon)
        peer = known or Peer(heard.node_id, heard.boot_id, 0, beacon, "", now_ms)
        if peer.boot_id != heard.boot_id:
            peer.past_boots.append(peer.boot_id)
            peer.broadcast_ms = None
        peer.boot_id, peer.counter, peer.beacon = heard.boot_id, heard.counter, beacon
        peer.host, peer.heard_ms = heard.address.host, now_ms
        if heard.is_broadcast:
            peer.broadcast_ms = now_ms
        self.peers[heard.node_id] = peer
        self.peers.move_to_end(heard.node_id)
        if len(self.peers) > PEERS_MAX:
            self.peers.popitem(last=False)
        return peer

    def _wants_answer(self, beacon: Beacon, is_new: bool) -> bool:
        if is_new:
            return True
        if self.state in (State.FOUNDER, State.MEMBER) and not _is_of_cluster(beacon):
            return True
        # Who lost the leader finds the next one by it.
        is_behind = beacon.leader_id is None or beacon.term < self.me.term
        return self.me.leader_id == self.node_id and beacon.cluster_id == self.me.cluster_id and is_behind

    def _hear_of_cluster(self, beacon: Beacon, now_ms: int) -> None:
        if not _is_of_cluster(beacon):
            return
        if self.state in (State.FRESH, State.BLOCKED):
            self._cluster_heard = beacon.cluster_id
            self._become(State.JOINING, now_ms)
        elif self.state is State.FOUNDER and beacon.cluster_id != self.me.cluster_id:
            # Work that began here now would keep the two clusters apart for ever.
            if beacon.state is State.FOUNDER or _verdict(self.me, beacon) is Verdict.YIELDS:
                self._serve_ms = now_ms + self._window_ms

    # Deciding

    def _decide(self, now_ms: int) -> Decision | None:
        if self.state is State.JOINING and self._may_join(now_ms):
            cluster_id = self.cluster_id(now_ms)
            assert cluster_id is not None
            return self._once(Join(cluster_id))
        if self.state is State.FOUNDER and now_ms >= self._serve_ms:
            self._become(State.MEMBER, now_ms)
            return self._once(Serve())
        if self.state is not State.FRESH:
            return None
        if self._other_key is not None and not self.has_key:
            self._is_asking = True
            return self._once(AskForKey(*self._other_key))
        return self._decide_founding(now_ms) if self._has_listened(now_ms) else None

    def _has_listened(self, now_ms: int) -> bool:
        return self._asks_left <= 0 and now_ms >= self._listens_until_ms

    def _decide_founding(self, now_ms: int) -> Decision | None:
        if self._other_key is not None:
            self._become(State.BLOCKED, now_ms)
            return self._once(Blocked(*self._other_key))
        if self._knows_of_cluster(now_ms) or self._lowest(now_ms) != self.node_id:
            return None
        if not self.has_key:
            return self._once(MakeKey())
        return None if self._missing(now_ms) else self._once(Found())

    def _once(self, decision: Decision) -> Decision | None:
        if type(decision) in self._decided:
            return None
        self._decided.add(type(decision))
        return decision

    def _may_join(self, now_ms: int) -> bool:
        return self._belonged_to is None or bool(self.doors(now_ms))

    def _knows_of_cluster(self, now_ms: int) -> bool:
        # Who joins a cluster has heard a member, though this node has not.
        return any(peer.beacon.state is State.JOINING for peer in self.live_peers(now_ms))

    def _lowest(self, now_ms: int) -> str:
        fresh = [peer.node_id for peer in self.live_peers(now_ms) if peer.beacon.state is State.FRESH]
        return min([self.node_id, *fresh])

    def _expected(self) -> int:
        return max([self.me.expect, *(peer.beacon.expect for peer in self.peers.values())])

    def _missing(self, now_ms: int) -> int:
        return max(0, self._expected() - 1 - len(self.live_peers(now_ms)))

    def _have_key(self, now_ms: int) -> None:
        assert self.state is State.FRESH and not self.has_key
        self.peers.clear()  # what was heard without a key was not proven
        self.has_key = True
        self._is_asking = False
        self._other_key = None
        self._speak_soon(now_ms)

    def _become(self, state: State, now_ms: int) -> None:
        self.me = replace(self.me, state=state)
        self._speak_soon(now_ms)

    # Speaking

    def _speak_soon(self, now_ms: int) -> None:
        """At once, unless the last beacon was only just said."""
        self._next_ms = min(self._next_ms, max(now_ms, self._said_ms + self._beat_ms // 2))

    def _schedule(self, now_ms: int) -> None:
        interval_ms = self._interval_ms(now_ms)
        self._said_ms = now_ms
        self._next_ms = now_ms + interval_ms
        self.me = replace(self.me, interval_ms=interval_ms)

    def _interval_ms(self, now_ms: int) -> int:
        if self.state is State.FOUNDER or (self.state is State.FRESH and now_ms < self._hurries_until_ms):
            return self._beat_ms
        if self.state is not State.MEMBER or self.me.leader_id is None:
            return LEADERLESS_MS
        return self._random.randrange(CALM_MS_MIN, CALM_MS_MAX)

    def _unicast_addresses(self, now_ms: int) -> list[Address]:
        live = self.live_peers(now_ms)
        heard = {peer.host for peer in live}
        by_broadcast = {peer.host for peer in live if peer.hears_broadcast(now_ms)}
        addresses = [address for address in self.seeds if address.host not in by_broadcast]
        addresses += [address for address in self.remembered if address.host not in heard]
        return addresses + [peer.udp_address for peer in live if not peer.hears_broadcast(now_ms)]


def _is_newer(heard: Heard, known: Peer) -> bool:
    if heard.boot_id == known.boot_id:
        return heard.counter > known.counter
    return heard.boot_id not in known.past_boots


def _is_of_cluster(beacon: Beacon) -> bool:
    return beacon.cluster_id is not None and beacon.state in (State.FOUNDER, State.MEMBER)


def _knowledge(peer: Peer) -> tuple[int, int, bool, int]:
    """Whose word about its cluster is worth most."""
    beacon = peer.beacon
    return beacon.generation, beacon.term, beacon.leader_id == peer.node_id, beacon.commit_index


def _precedence(beacon: Beacon) -> tuple[bool, int, str]:
    """Of several clusters the one with the least stays."""
    return not beacon.has_work, -beacon.members, beacon.cluster_id or ""


def _verdict(ours: Beacon, theirs: Beacon) -> Verdict:
    if ours.has_work and theirs.has_work:
        return Verdict.STANDS
    return Verdict.STAYS if _precedence(ours) < _precedence(theirs) else Verdict.YIELDS


def _where(rival: Rival) -> str:
    return str(rival.doors[0].address) if rival.doors else "another place"


# --- Voters, standbys, workers --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Vitals:
    """How a member fares, as its leader sees it. `since_ms`: since when it is alive, or dead, without a break.

    `caught_up_since_ms`: since when its copy follows the leader's closely; None while it does not, or has none.
    """

    is_alive: bool
    since_ms: int
    caught_up_since_ms: int | None = None

    def is_ready(self, now_ms: int) -> bool:
        """Whether it can be trusted with a vote."""
        caught_up = self.caught_up_since_ms
        stable_ms = round(1000 * config.PROMOTE_STABLE_S)
        return self.is_alive and caught_up is not None and now_ms >= max(caught_up, self.since_ms) + stable_ms

    def is_dead_for(self, span_ms: int, now_ms: int) -> bool:
        """Whether it has been dead for at least that long."""
        return not self.is_alive and now_ms >= self.since_ms + span_ms


_UNHEARD_OF = Vitals(False, -(2**62))


class Watch:
    """Keeps the vitals of the members for a leader; a new one for each term.

    Caught up is who holds what the leader's log held one election timeout ago: in flight is not behind.
    """

    def __init__(self, now_ms: int) -> None:
        """A leader begins with giving everybody time to connect."""
        self._began_ms = now_ms
        self._vitals: dict[str, Vitals] = {}
        self._ends: deque[tuple[int, int]] = deque()

    def observe(
        self, members: Collection[str], alive: Collection[str], matches: Mapping[str, int], last_index: int, now_ms: int
    ) -> Mapping[str, Vitals]:
        """The vitals by now. `alive`: who has a session or is the leader; `matches`: its `match_index` by member."""
        self._ends.append((now_ms, last_index))
        while len(self._ends) > 1 and self._ends[1][0] <= now_ms - config.ELECTION_TIMEOUT_MS_MIN:
            self._ends.popleft()
        needed_index = self._ends[0][1]
        self._vitals = {
            member: self._observe(member, member in alive, matches.get(member, -1) >= needed_index, now_ms)
            for member in members
        }
        return self._vitals

    def is_dead_for(self, member: str, span_ms: int, now_ms: int) -> bool:
        """Whether a member has been dead for at least that long, as of the last look; who was never looked at has not."""
        return member in self._vitals and self._vitals[member].is_dead_for(span_ms, now_ms)

    def _observe(self, member: str, is_alive: bool, is_caught_up: bool, now_ms: int) -> Vitals:
        known = self._vitals.get(member) or Vitals(is_alive, now_ms if is_alive else self._began_ms)
        since_ms = known.since_ms if known.is_alive == is_alive else now_ms
        caught_up = known.caught_up_since_ms
        if not is_caught_up:
            caught_up = None
        elif caught_up is None:
            caught_up = now_ms
        return Vitals(is_alive, since_ms, caught_up)


def voters_wanted(members: int) -> int:
    """How many of so many members vote: odd, and by members and not by live ones, or a partition could lower it."""
    return 1 if members < 3 else 3 if members < 5 else 5


def standbys_wanted(members: int) -> int:
    """How many members beyond the voters hold a copy."""
    return min(1, max(0, members - voters_wanted(members)))


def role_of(node_id: str, configuration: Configuration, leader_id: str | None) -> str:
    """A member's role, as `status` and beacons name it."""
    if node_id == leader_id:
        return "leader"
    if configuration.is_voter(node_id):
        return "voter"
    return "standby" if node_id in configuration.learners else "worker"


def next_configuration(
    configuration: Configuration, members: Collection[str], vitals: Mapping[str, Vitals], leader_id: str, now_ms: int
) -> Configuration | None:
    """The next step towards what these members should be; None when there is none to take now.

    `members` are those who have joined and not left: whoever leaves is taken out first and then moved out of the
    configuration by this. Equal arguments give equal results. Voters are only ever exchanged, unless somebody left. The
    result is not joint: going there is `Raft.change_configuration`'s, which must be possible.
    """
    if configuration.is_joint or not members:
        return None
    plan = _Plan(configuration, frozenset(members), vitals, leader_id, now_ms)
    voters = plan.voters()
    learners = plan.learners(voters)
    if set(voters) == set(configuration.voters) and set(learners) == set(configuration.learners):
        return None
    return Configuration(voters=voters, learners=learners)


class _Plan:
    """One call of `next_configuration`."""

    def __init__(
        self,
        configuration: Configuration,
        members: frozenset[str],
        vitals: Mapping[str, Vitals],
        leader_id: str,
        now_ms: int,
    ) -> None:
        self._configuration = configuration
        self._members = members
        self._vitals = vitals
        self._leader_id = leader_id
        self._now_ms = now_ms
        self._staying = [voter for voter in configuration.voters if voter in members]
        self._standbys = [learner for learner in configuration.learners if learner in members]
        self._wanted = voters_wanted(len(members))

    def voters(self) -> tuple[str, ...]:
        """The next voters: those of now, without who left, the dead exchanged, filled up as far as others are ready."""
        ready = self._ready_standbys()
        is_coming = any(self._is_alive(standby) for standby in self._standbys if standby not in ready)
        kept = self._exchange_dead(self._staying[:], ready)
        kept += ready[: max(0, self._wanted - len(kept))]
        if len(kept) < self._wanted and is_coming and self._must_wait(len(kept)):
            return self._configuration.voters
        count = min(self._wanted, len(kept))
        count -= 1 - count % 2
        if count < 1:
            return self._configuration.voters
        best = set(sorted(kept, key=self._worth)[:count])
        if 2 * sum(map(self._is_alive, best)) <= count:
            return self._configuration.voters  # those could decide nothing; a leader's first look finds nobody alive
        return tuple(voter for voter in kept if voter in best)

    def learners(self, voters: tuple[str, ...]) -> tuple[str, ...]:
        """The next learners: enough to make the voters whole and live, and one more; those of now first."""
        good = [voter for voter in voters if voter in self._members and not self._is_dead(voter, DEAD_VOTER_MS)]
        needed = self._wanted - len(good) + standbys_wanted(len(self._members))
        others = self._members - set(voters)
        candidates = [member for member in others if self._is_alive(member) or self._has_copy(member)]
        chosen = set(sorted(candidates, key=self._fitness)[: max(0, needed)])
        order = [*self._standbys, *self._staying, *sorted(chosen)]
        return tuple(dict.fromkeys(member for member in order if member in chosen))

    def _exchange_dead(self, kept: list[str], ready: list[str]) -> list[str]:
        for place, voter in enumerate(kept):
            if ready and self._is_dead(voter, DEAD_VOTER_MS):
                kept[place] = ready.pop(0)
        return kept

    def _must_wait(self, available: int) -> bool:
        """Whether a standby that is on its way would make the number odd, or stand in for who left. Nobody waits where there can be more
        voters than now: a slow one would keep the others from voting, and the one that votes might die."""
        now = len(self._configuration.voters)
        return available < now or (available % 2 == 0 and available - 1 <= now)

    def _ready_standbys(self) -> list[str]:
        ready = [standby for standby in self._standbys if self._of(standby).is_ready(self._now_ms)]
        return sorted(ready, key=lambda standby: (self._of(standby).caught_up_since_ms, standby))

    def _worth(self, voter: str) -> tuple[bool, bool, bool, str]:
        """Of too many voters the last goes: the leader never, who does not vote yet first, then the dead, then the highest id."""
        return voter != self._leader_id, voter not in self._configuration.voters, not self._is_alive(voter), voter

    def _fitness(self, member: str) -> tuple[bool, bool, bool, str]:
        """Who should hold a copy, the best first: who has one and is not gone for long, then any live one."""
        is_gone = self._is_dead(member, DEAD_STANDBY_MS)
        return is_gone, not self._has_copy(member), not self._is_alive(member), member

    def _has_copy(self, member: str) -> bool:
        return member in self._configuration.members

    def _of(self, member: str) -> Vitals:
        return self._vitals.get(member, _UNHEARD_OF)

    def _is_alive(self, member: str) -> bool:
        return self._of(member).is_alive

    def _is_dead(self, member: str, span_ms: int) -> bool:
        return self._of(member).is_dead_for(span_ms, self._now_ms)
