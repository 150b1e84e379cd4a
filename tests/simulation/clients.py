"""Programs outside of the cluster: they deploy, put and take, and ask again by the same number until they are answered."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from p2pcluster.core import commands, protocol
from p2pcluster.core.codec import Message, decode, encode
from p2pcluster.core.commands import Port
from p2pcluster.core.handshake import Identity
from p2pcluster.core.ranges import Fence
from p2pcluster.stream import ConnectionClosed
from tests.simulation import pipeline
from tests.simulation.world import End, Network, World, number_of

if TYPE_CHECKING:
    from tests.simulation.checker import Checker
    from tests.simulation.machine import Machine

PATIENCE_MS = 1_500
IN = f"{pipeline.NAME}/in"
OUT = f"{pipeline.NAME}/d"


class Client:
    """One program: one question at a time. It stands for its own machine, which never fails."""

    def __init__(self, number: int, world: World, network: Network, checker: Checker, machines: list[Machine]) -> None:
        self.number, self.world, self.network, self.checker = number, world, network, checker
        self.machine = self  # what an `End` asks of a life
        self.machines = machines
        self.is_powered = True
        self.end: End | None = None
        self.is_done = False
        self._connections = 0
        self._request = 0
        self._asked: Message | None = None
        self._hint: int | None = None

    def start(self) -> None:
        self.world.after(self.world.random.randrange(1, 50), self._next)

    # ---- the connection

    def _connect(self) -> None:
        known = [machine for machine in self.machines if machine.number == self._hint]
        main_id = self.checker.main_id
        inside = [machine for machine in self.machines if machine.life is None or machine.life.cluster_id == main_id]
        target = known[0] if known else self.world.random.choice(inside or self.machines)
        self._hint = None
        self._connections += 1
        end = End(self, self.network)  # type: ignore[arg-type]
        self.end = end
        name = f"client{self.number}"
        identity = Identity(name, f"{name}-{self._connections}", "client", name, "sim", None, protocol.VERSION, "0", "3.11")
        if not self.network.is_cut("tcp", self.number, target.number):
            self.world.after(self.network.delay_ms(), lambda: target.receive_dial(end, identity))

    def _drop(self) -> None:
        end, self.end = self.end, None
        if end is not None:
            end.close()

    def on_readable(self, end: End) -> None:
        if end is not self.end:
            return
        if end.session is not None and self._is_elsewhere(end):
            self._lost()
            return
        try:
            payloads = end.read()
        except ConnectionClosed:
            self._lost()
            return
        if end.session is not None and self._asked is not None and not payloads and not self._is_sent:
            self._is_sent = True
            end.send(encode(self._asked))
        for payload in payloads:
            self._hear(decode(payload))

    def _is_elsewhere(self, end: End) -> bool:
        """Whether this is no node of the cluster that the work is for, but of one that a machine founded which was cut off: an old
        leader's address leads there when its disk was wiped. What is said there says nothing about the work."""
        return end.other.life.cluster_id not in (None, self.checker.main_id)

    def _lost(self) -> None:
        """Ask again, of whoever leads."""
        self._drop()
        asked, request = self._asked, self._request
        if asked is not None:
            self.world.after(self.world.random.randrange(5, 150), lambda: self._again(asked, request))

    def _again(self, asked: Message, request: int) -> None:
        if self._asked is asked and self._request == request and self.end is None:
            self._ask(asked)

    def _ask(self, message: Message) -> None:
        self._request += 1
        request = self._request
        self._asked = message._replace(fields={**message.fields, "req": request})
        self._is_sent = self.end is not None and self.end.session is not None
        if self.end is None:
            self._connect()
        elif self._is_sent:
            self.end.send(encode(self._asked))
        self.world.after(PATIENCE_MS, lambda: self._give_up(request))

    def _give_up(self, request: int) -> None:
        if self._asked is not None and self._request == request:
            self._lost()

    def _hear(self, message: Message) -> None:
        if self._asked is None or message.fields["req"] != self._request:
            return
        if message.kind == "reply" and message.fields["result"] == "error":
            leader = message.fields.get("leader")
            self._hint = number_of(leader.rpartition(":")[0]) if leader else None
            self._lost()
            return
        asked, self._asked = self._asked, None
        self.on_answer(asked, message)

    # ---- what a program does

    def _next(self) -> None:
        """Ask the next question, or be done."""

    def on_answer(self, asked: Message, answer: Message) -> None:
        """Its answer has come."""


class Operator(Client):
    """Brings commands into the cluster, one after the other."""

    def __init__(self, *arguments: Any, messages: list[Message]) -> None:
        super().__init__(*arguments)
        self._left = deque(messages)

    def _next(self) -> None:
        if not self._left:
            self.is_done = True
            self._drop()
            return
        self._ask(self._left[0])

    def on_answer(self, asked: Message, answer: Message) -> None:
        if answer.fields["result"] == "refused" and answer.fields["code"] not in ("running", "parts_missing"):
            self.world.after(300, self._next)  # what it needs is not there yet
            return
        self._left.popleft()
        self._next()


class Janitor(Client):
    """Looks at the parked items: some are tried again, some are discarded."""

    def __init__(self, *arguments: Any, every_ms: int, until_ms: int) -> None:
        super().__init__(*arguments)
        self._every_ms, self._until_ms = every_ms, until_ms

    def _next(self) -> None:
        if self.world.now_ms >= self._until_ms:
            self.is_done = True
            self._drop()
            return
        self._ask(Message("parked", {"pipeline": pipeline.NAME, "after": None}))

    def on_answer(self, asked: Message, answer: Message) -> None:
        if asked.kind == "parked" and answer.fields["parked"]:
            item = self.world.random.choice(answer.fields["parked"])
            ids = None if self.world.random.random() < 0.2 else [int(item["id"].rpartition(":")[2])]
            kind = "discard" if ids is not None and self.world.random.random() < 0.5 else "retry"
            self._ask(Message(kind, {"queue": item["queue"], "ids": ids, "once": f"j{self.number}x{self._request}"}))
            return
        self.world.after(self.world.random.randrange(1, 2 * self._every_ms), self._next)


class Producer(Client):
    """Puts values into the queue that is fed from outside. Now and then it forgets who it was: then keys are remembered."""

    def __init__(self, *arguments: Any, puts: int) -> None:
        super().__init__(*arguments)
        random = self.world.random
        self._batches: deque[tuple[list[bytes], list[str] | None, dict[str, int]]] = deque()
        for at in range(puts):
            values = [b"in%d:%d.%d" % (self.number, at, part) for part in range(random.randrange(1, 4))]
            keys = [value.decode() for value in values] if random.random() < 0.5 else None
            self._batches.append((values, keys, self._waits()))
        self.put: list[bytes] = [value for values, _, _ in self._batches for value in values]
        self._seq = 1
        self._name = self._new_name()
        self._pause_ms = max(2, int(1.8 * self.world.options.safety_ms / puts))

    def _waits(self) -> dict[str, int]:
        """Some are for later."""
        random = self.world.random
        at_ms = pipeline.EPOCH_MS + random.randrange(self.world.options.safety_ms)
        return random.choice(({}, {}, {"delay_ms": random.randrange(2_000)}, {"at_ms": at_ms}))

    def _new_name(self) -> str:
        return f"client:{self.world.random.getrandbits(64):016x}"

    def _next(self) -> None:
        if not self._batches:
            self.is_done = True
            self._drop()
            return
        values, keys, waits = self._batches[0]
        blob = None if keys is None else str(keys).replace("'", '"').encode()
        self._ask(commands.put(self._name, 1, self._seq, [Port([IN], *pipeline.pack(values), None, blob, **waits)]))

    def on_answer(self, asked: Message, answer: Message) -> None:
        if answer.fields["result"] == "refused":
            assert answer.fields["code"] in ("not_running", "unknown_queue"), answer.fields
            self.world.after(200, self._next)
            return
        self.checker.acknowledged(asked)
        self._seq += 1
        self._batches.popleft()
        self.world.after(self.world.random.randrange(self._pause_ms), self._next)

    def _lost(self) -> None:
        if self._batches and self._batches[0][1] is not None and self.world.random.random() < 0.3:
            self._name, self._seq = self._new_name(), 1
            self._drop()
            self._asked = None
            self.world.after(self.world.random.randrange(5, 150), self._next)
            return
        super()._lost()


class Taker(Client):
    """Takes from the queue that no stage reads: it is done with items, gives them back, or goes away with them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: list[bytes] = []
        self._holds: dict[tuple[int, int], list[bytes]] = {}

    def _next(self) -> None:
        if self.end is not None and self.world.random.random() < 0.1:
            self._drop()
        self._ask(Message("take", {"queue": OUT, "count": self.world.random.randrange(1, 6)}))

    def on_answer(self, asked: Message, answer: Message) -> None:
        if answer.kind == "grant":
            self._on_grant(answer)
        elif asked.kind == "take":
            self.world.after(300, self._next)
        else:
            if asked.kind == "done":
                assert answer.fields["result"] in ("ok", "already"), answer.fields
                self.checker.acknowledged(asked)
            self.world.after(self.world.random.randrange(1, 100), self._next)

    def _on_grant(self, grant: Message) -> None:
        ranges = [(lo, hi) for lo, hi, _, _ in grant.fields["pieces"]]
        what = self.world.random.random()
        message = commands.release(OUT, ranges, Fence(*grant.fields["fence"]))
        if what < 0.75:
            message = commands.done(OUT, ranges, [])
        if what < 0.1 or what > 0.9:
            self._drop()  # its session is over, and what it says next is late
        if self.world.random.random() < 0.9:
            self.world.after(self.world.random.randrange(1, 60), lambda: self._ask(message))
        else:
            self.world.after(self.world.random.randrange(1, 300), self._next)
