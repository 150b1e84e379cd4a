"""A person at the controls: stages are paused, resumed and scaled, all of them or one, at any moment; at the end all run as their code says."""

from __future__ import annotations

from collections import deque
from typing import Any

from p2pcluster.core.codec import Message
from tests.simulation import pipeline
from tests.simulation.clients import Client

STAGES = tuple(stage["name"] for stage in pipeline.MANIFEST["stages"])


class Controller(Client):
    """See the module."""

    def __init__(self, *arguments: Any, every_ms: int, until_ms: int) -> None:
        super().__init__(*arguments)
        self._every_ms, self._until_ms = every_ms, until_ms
        self._last: deque[Message] = deque()

    def _next(self) -> None:
        if self.is_done:
            return
        if self.world.now_ms < self._until_ms:
            self._ask(self._by_chance())
            return
        if not self._last:
            self._last.extend(_message("resume", stage) for stage in (None, *STAGES))
            self._last.extend(_message("scale", stage, processes=None) for stage in STAGES)
        self._ask(self._last[0])

    def _by_chance(self) -> Message:
        random = self.world.random
        stage = random.choice((None, *STAGES, *STAGES))
        what = random.random()
        if what < 0.4:
            return _message("pause", stage, reason=random.choice(("", "too many are parked")))
        if what < 0.75 or stage is None:
            return _message("resume", stage)
        return _message("scale", stage, processes=random.choice((None, 1, 3, "auto")))

    def on_answer(self, asked: Message, answer: Message) -> None:
        if self._last:
            if answer.fields["result"] == "refused":
                assert answer.fields["code"] in ("source", "unknown_pipeline", "unknown_name"), answer.fields
            self._last.popleft()
            if self._last:
                self._next()
            else:
                self.is_done = True
                self._drop()
            return
        self.world.after(self.world.random.randrange(1, 2 * self._every_ms), self._next)


def _message(kind: str, stage: str | None, **fields: Any) -> Message:
    return Message(kind, {"pipeline": pipeline.NAME, "stage": stage, **fields})
