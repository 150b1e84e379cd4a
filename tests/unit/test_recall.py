"""A process whose item runs long gives back what waits behind it, and is fed again when it can be."""

from __future__ import annotations

from array import array
from typing import Any

from p2pcluster import config
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Executor, Send, Start, ToLeader
from tests import plans

SLOW_MS = int(1000 * config.RECALL_AFTER_S)
SLOW_US = 1000.0 * SLOW_MS


class Machine:
    """A machine with one process of one stage, and a leader who grants what the test says. `sent` is what its process is told."""

    def __init__(self) -> None:
        self.executor = Executor("here")
        self.executor.on_leader(plans.plan(plans.planned(plans.manifest_of(plans.stage_of())), S=1), 0)
        (self.key,) = [action.key for action in self.executor.take_actions() if isinstance(action, Start)]
        self.says("ready", 0)

    def says(self, kind: str, now_ms: int, **fields: Any) -> None:
        self.executor.on_message(self.key, Message(kind, fields), now_ms)

    def done(self, work: int, now_ms: int) -> None:
        self.says("done", now_ms, work=work, count=1, elapsed_us=SLOW_US, ports=[])

    def grant(self, lo: int, hi: int, now_ms: int) -> None:
        blobs = (array("I", [1] * (hi - lo)).tobytes(), b"x" * (hi - lo))
        self.executor.on_leader(Message("grant", {"queue": "p/S", "pieces": [[lo, hi, 1, None]], "fence": ["here", "boot", 1], "deliveries": {},
                                                  "version": "v"},
                                        blobs), now_ms)

    def tick(self, work: int, item: int, now_ms: int) -> None:
        self.executor.tick(now_ms, {self.key: (work, item)})

    def told_us(self) -> list[float]:
        """How long an item takes, as the leader was told since this was last asked."""
        messages = [action.message for action in self.executor.take_actions() if isinstance(action, ToLeader)]
        return [message.fields["service_us"]["p/S"] for message in messages if message.kind == "stats" and message.fields["service_us"]]

    def sent(self, kind: str) -> list[int]:
        """The numbers of the works that the process was told of in messages of this kind, since this was last asked."""
        messages = [action.message for action in self.executor.take_actions() if isinstance(action, Send)]
        return [message.fields["work"] for message in messages if message.kind == kind]


def test_a_process_that_moved_on_unseen_and_gave_everything_back_is_fed_again() -> None:
    """It reports its item, and its position is looked at before it could say that it stands at no item: it seems to be stuck with it still.

    No report follows that could say otherwise, so that a process without work was never given any again, and the run stood still.
    """
    machine = Machine()
    machine.grant(1, 2, 1)
    (first,) = machine.sent("work")
    machine.done(first, SLOW_MS)
    machine.grant(2, 9, SLOW_MS + 1)
    second, third = machine.sent("work")
    machine.tick(second, 2, SLOW_MS + 2)
    machine.done(second, 2 * SLOW_MS + 2)
    machine.tick(second, 2, 2 * SLOW_MS + 3)
    recalled = machine.sent("recall")
    assert third in recalled, "it seems to be stuck"
    for work in recalled:
        machine.says("returned", 2 * SLOW_MS + 4, work=work, kept=0)
    assert machine.sent("work"), "all of its work came back: it gets some again"


def test_an_item_that_runs_for_long_says_how_slow_its_stage_is_at_least_before_it_is_through() -> None:
    machine = Machine()
    machine.grant(1, 2, 0)
    (work,) = machine.sent("work")
    machine.tick(work, 1, 10)
    machine.tick(work, 1, 400)
    assert machine.told_us() == []
    for now_ms in (600, 800, 1_500, 2_500):
        machine.tick(work, 1, now_ms)
    assert machine.told_us() == [512_000, 1_024_000, 2_048_000]
    machine.done(work, 3_000)
    machine.tick(0, 0, 3_010)
    assert machine.told_us() == [SLOW_US], "and then what it took"
