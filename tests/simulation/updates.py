"""Programs that change what is deployed: new versions, some of which do not start, and a second pipeline that comes and goes."""

from __future__ import annotations

from collections import deque
from typing import Any

from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port
from p2pcluster.core.ranges import Fence
from tests.simulation import pipeline
from tests.simulation.clients import Client

POLL_MS = 150


class Updater(Client):
    """Deploys one version after the other; like the verb, it mostly waits for what becomes of one. The last one is sound."""

    def __init__(self, *arguments: Any, every_ms: int, until_ms: int) -> None:
        super().__init__(*arguments)
        self._every_ms, self._until_ms = every_ms, until_ms
        self._count = 1
        self._is_last = False
        self._version = pipeline.VERSION
        self._left: deque[Message] = deque()

    def _next(self) -> None:
        if not self._left:
            self._is_last = self.world.now_ms >= self._until_ms
            self._version = self._choose()
            self._left.extend(pipeline.shipment(self._version))
        self._ask(self._left[0])

    def _choose(self) -> str:
        self._count += 1
        random = self.world.random
        if not self._is_last and random.random() < 0.35:
            return f"x{self._count}-{random.choice(pipeline.CAN_BE_BROKEN)}"
        return self._version if random.random() < 0.1 and self._version[0] == "v" else f"v{self._count}"

    def on_answer(self, asked: Message, answer: Message) -> None:
        if asked.kind == "project":
            self._look(answer.fields["project"])
            return
        if answer.fields["result"] == "refused":
            assert answer.fields["code"] == "parts_missing", answer.fields
            self._left = deque(pipeline.shipment(self._version))
        else:
            self._left.popleft()
        if self._left:
            self._next()
        elif self._is_last or self.world.random.random() < 0.7:
            self._poll()
        else:
            self._pause()

    def _poll(self) -> None:
        self._ask(Message("project", {"pipeline": pipeline.NAME}))

    def _look(self, project: dict[str, Any]) -> None:
        if project["rollout"] is not None:
            self.world.after(POLL_MS, self._poll)
        elif self._is_last:
            self.is_done = True
            self._drop()
        else:
            self._pause()

    def _pause(self) -> None:
        self.world.after(self.world.random.randrange(1, 2 * self._every_ms), self._next)


class Ender(Client):
    """Deploys the second pipeline, puts into it, holds some of that, and undeploys it; what it holds it says to be done later."""

    def __init__(self, *arguments: Any, every_ms: int, until_ms: int) -> None:
        super().__init__(*arguments)
        self._every_ms, self._until_ms = every_ms, until_ms
        self._seq = self._round = 0
        self._left: deque[Message] = deque()
        self._held: list[Message] = []

    def _next(self) -> None:
        if not self._left:
            if self.world.now_ms >= self._until_ms:
                self.is_done = True
                self._drop()
                return
            self._left.extend(self._one_round())
        self._ask(self._left[0])

    def _one_round(self) -> list[Message]:
        self._round += 1
        messages = [*pipeline.second_shipment(), Message("start_run", {"pipeline": pipeline.SECOND_NAME, "params": None})]
        for at in range(self.world.random.randrange(1, 6)):
            self._seq += 1
            values = pipeline.pack([b"u%d.%d.%d" % (self._round, at, part) for part in range(self.world.random.randrange(1, 4))])
            messages.append(commands.put(f"client:ender{self.number}", 1, self._seq, [Port([pipeline.SECOND_QUEUE], *values)]))
        if self.world.random.random() < 0.6:
            messages.append(Message("take", {"queue": pipeline.SECOND_QUEUE, "count": 3}))
        late, self._held = self._held, []
        return [*messages, *late, Message("undeploy", {"pipeline": pipeline.SECOND_NAME, "discard": self.world.random.random() < 0.7})]

    def on_answer(self, asked: Message, answer: Message) -> None:
        if answer.kind == "grant":
            ranges = [(lo, hi) for lo, hi, _, _ in answer.fields["pieces"]]
            self._held.append(commands.done(pipeline.SECOND_QUEUE, ranges, []))
            self._held.append(commands.release(pipeline.SECOND_QUEUE, ranges, Fence(*answer.fields["fence"])))
        elif asked.kind == "put" and answer.fields["result"] == "refused":
            assert answer.fields["code"] in ("not_running", "unknown_queue", "sequence"), answer.fields
        elif asked.kind == "put":
            self.checker.acknowledged(asked)
        self._left.popleft()
        pause_ms = self._every_ms if asked.kind == "undeploy" else 100
        self.world.after(self.world.random.randrange(1, pause_ms), self._next)

    def _give_up(self, request: int) -> None:
        if self._asked is not None and self._asked.kind == "take" and self._request == request:
            self._left.popleft()  # nothing is there to be taken
            self._asked = None
            self._drop()
            self._next()
            return
        super()._give_up(request)
