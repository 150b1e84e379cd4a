"""Time, chance and the network of a simulation: one heap of events, one `Random`, one trace.

Decided here: in which order things happen and what the network does to what is sent. Not known here: what is sent, and who the machines are beyond a
number. `World.fingerprint` covers each event and each byte that was sent, so that two runs of a seed can be compared.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING, Any

from p2pcluster.core.codec import Buffer
from p2pcluster.stream import ConnectionClosed

if TYPE_CHECKING:
    from p2pcluster.core.handshake import Identity
    from tests.simulation.machine import Life
    from tests.simulation.options import Options

Action = Callable[[], None]
RETRANSMIT_MS = 200  # what TCP waits before it sends again, doubled each time
PORT = 47400


class World:
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.random = Random(options.seed)
        self.now_ms = 0
        self.events = 0
        self.counts: Counter[str] = Counter()  # what happened how often
        self.says: Callable[[str], None] | None = None
        self._heap: list[tuple[int, int, Action]] = []
        self._scheduled = 0
        self._trace = blake2b(digest_size=16)

    # ---- time

    def after(self, delay_ms: int, action: Action) -> None:
        """Do `action` so much later; of two at the same time the one that was scheduled first."""
        assert delay_ms >= 0
        self._scheduled += 1
        heapq.heappush(self._heap, (self.now_ms + delay_ms, self._scheduled, action))

    def step(self, until_ms: int) -> bool:
        """The next event, if it comes by then; else time passes up to there."""
        if not self._heap or self._heap[0][0] > until_ms:
            self.now_ms = until_ms
            return False
        self.now_ms, _, action = heapq.heappop(self._heap)
        self.events += 1
        action()
        return True

    def every(self, mean_ms: int, action: Action, until_ms: int) -> None:
        """Do `action` again and again, at random times; never when `mean_ms` is 0."""
        if not mean_ms:
            return

        def again() -> None:
            if self.now_ms < until_ms:
                action()
                self.after(self.random.randrange(1, 2 * mean_ms), again)

        self.after(self.random.randrange(1, 2 * mean_ms), again)

    # ---- the trace

    def mark(self, who: str, what: str, *details: Any) -> None:
        """Something happened that a replay must repeat."""
        self.counts[what] += 1
        self._trace.update(repr((self.now_ms, who, what, *details)).encode())
        if self.says is not None:
            self.says(f"{self.now_ms:7} {who} {what} {' '.join(map(str, details))}")

    def mark_bytes(self, data: Buffer) -> None:
        self._trace.update(data)

    @property
    def fingerprint(self) -> str:
        """A hash of all that happened so far."""
        return self._trace.hexdigest()


class Network:
    """What lies between machines, which are numbers here. A cut is directed: from one to another, for TCP or for UDP."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._options = world.options
        self.is_calm = False
        self.cuts: dict[str, set[tuple[int, int]]] = {"tcp": set(), "udp": set()}
        self._closed: dict[str, set[tuple[int, int]]] = {"tcp": set(), "udp": set()}
        self._stalled: list[tuple[End, Action]] = []

    def is_cut(self, kind: str, source: int, target: int) -> bool:
        return (source, target) in self.cuts[kind]

    def delay_ms(self) -> int:
        """How long something is on its way."""
        random, options = self._world.random, self._options
        if self.is_calm:
            return random.randrange(1, 4)
        if options.reordering and random.random() < options.reordering:
            return random.randrange(options.delay_ms_max * 4)
        return random.randrange(1, 1 + options.delay_ms_max)

    def datagram(self, source: int, target: int, deliver: Action) -> None:
        """By UDP: lost, late, twice, in any order."""
        random, options = self._world.random, self._options
        if self.is_cut("udp", source, target):
            return
        copies = 1
        if not self.is_calm:
            copies = (random.random() >= options.loss) + (random.random() < options.duplication)
        for _ in range(copies):
            self._world.after(self.delay_ms(), deliver)

    # ---- TCP

    def stream(self, end: End, deliver: Action) -> None:
        """By TCP, from `end`: in order, late when packets were lost, not at all while the way is cut."""
        if self.is_cut("tcp", end.host, end.other.host):
            self._stalled.append((end, deliver))
            return
        delay_ms = self.delay_ms()
        wait_ms = RETRANSMIT_MS
        while not self.is_calm and wait_ms < 2000 and self._world.random.random() < self._options.loss / 4:
            delay_ms, wait_ms = delay_ms + wait_ms, 2 * wait_ms
        end.arrives_ms = max(end.arrives_ms, self._world.now_ms + delay_ms)
        self._world.after(end.arrives_ms - self._world.now_ms, deliver)

    def close(self, kind: str, ways: set[tuple[int, int]]) -> None:
        """Cut these ways for good: the end of a cut that was there before does not open them."""
        self.cuts[kind] |= ways
        self._closed[kind] |= ways

    def heal(self, kind: str, ways: set[tuple[int, int]]) -> None:
        """Open these ways again: what TCP could not get through goes on its way."""
        self.cuts[kind] -= ways - self._closed[kind]
        if kind == "tcp":
            stalled, self._stalled = self._stalled, []
            for end, deliver in stalled:
                self.stream(end, deliver)


class SimSession:
    """What a handshake leaves: who the peer is."""

    def __init__(self, peer: Identity) -> None:
        self.peer = peer


class End:
    """One end of a simulated TCP connection, with the face of `stream.Connection` as far as `peers.Peers` looks at it."""

    def __init__(self, life: Life, network: Network, other: End | None = None) -> None:
        self.life = life
        self.host = life.machine.number
        self.other: End = other if other is not None else self
        self.session: SimSession | None = None
        self.is_dead = False  # its machine lost power: nobody says so
        self.arrives_ms = 0
        self.outgoing_bytes = 0
        self.wants_write = False
        self._network = network
        self._inbox: list[bytes] = []
        self._failure: ConnectionClosed | None = None
        self._is_closed = False

    @property
    def is_established(self) -> bool:
        return self.session is not None

    @property
    def peer_address(self) -> str:
        return f"{host_of(self.other.host)}:{PORT}"

    @property
    def is_open(self) -> bool:
        return not self._is_closed and not self.is_dead

    def send(self, parts: list[Buffer]) -> None:
        payload = b"".join(parts)
        world = self.life.world
        world.mark_bytes(payload)
        other = self.other
        self._network.stream(self, lambda: other.arrive(self, payload))

    def arrive(self, sender: End, payload: bytes | None) -> None:
        """Bytes, or the end of the stream, have come."""
        if self.is_dead:
            if self.life.machine.is_powered:  # its kernel has never heard of this connection
                self._network.stream(self, lambda: sender.fail("reset"))
            return
        if self._is_closed:
            return
        if payload is None:
            self.fail("ended")
        else:
            self._inbox.append(payload)
            self.life.on_readable(self)

    def fail(self, how: Any) -> None:
        if self.is_open and self._failure is None:
            self._failure = ConnectionClosed(how)
            self.life.on_readable(self)

    def read(self) -> list[Buffer]:
        if self._inbox:
            inbox, self._inbox = self._inbox, []
            return list(inbox)
        if self._failure is not None:
            raise self._failure
        return []

    def flush(self) -> None:
        if self._failure is not None and not self._inbox:
            raise self._failure

    def close(self) -> None:
        """Orderly, or by the kernel when the process has died: the other end hears of it."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.other is not self and not self.is_dead:
            other = self.other
            self._network.stream(self, lambda: other.arrive(self, None))


def host_of(number: int) -> str:
    return f"10.0.0.{number}"


def number_of(host: str) -> int:
    return int(host.rpartition(".")[2])
