"""A stage that does not start on a machine is that machine's trouble: told to the leader, and forgotten in time."""

from __future__ import annotations

from p2pcluster import config
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Executor, Start, ToLeader
from tests import plans

FORGOTTEN_MS = int(1000 * config.TROUBLE_FORGOTTEN_S)


class Machine:
    """A machine whose one stage cannot be started, and what it has told its leader last."""

    def __init__(self) -> None:
        self.executor = Executor("here")
        self.told: dict[str, str] = {}
        self.plan(1)

    def plan(self, processes: int, run: int = 1, now_ms: int = 0) -> None:
        self.executor.on_leader(plans.plan(plans.planned(plans.manifest_of(plans.stage_of()), run=run), S=processes), now_ms)
        self.look(now_ms)

    def look(self, now_ms: int) -> list[int]:
        """Time has passed; returns the processes that are to be started."""
        self.executor.tick(now_ms, {})
        started = []
        for action in self.executor.take_actions():
            if isinstance(action, Start):
                started.append(action.key)
            elif isinstance(action, ToLeader) and action.message.kind == "stats":
                self.told = action.message.fields["troubles"]
        return started

    def dies_at_start(self, now_ms: int) -> None:
        for key in list(self.executor.processes):
            self.executor.on_exit(key, "exited with code 1", 0, ["No module named 'rare'"], now_ms)
        self.look(now_ms)


def test_what_keeps_a_stage_from_starting_is_told_and_forgotten_once_others_have_taken_over_for_long() -> None:
    machine = Machine()
    machine.dies_at_start(10)
    assert "No module named 'rare'" in machine.told["p/S"]
    machine.plan(0, now_ms=20)
    machine.look(FORGOTTEN_MS)
    assert machine.told, "not before its time"
    machine.look(FORGOTTEN_MS + 10)
    assert machine.told == {}


def test_it_is_not_forgotten_while_the_machine_goes_on_trying() -> None:
    machine = Machine()
    machine.dies_at_start(10)
    machine.look(FORGOTTEN_MS + 20)
    assert machine.told


def test_a_new_run_forgets_it_and_a_process_that_starts_does_too() -> None:
    machine = Machine()
    machine.dies_at_start(10)
    machine.plan(0, run=2, now_ms=20)
    assert machine.told == {}

    machine = Machine()
    machine.dies_at_start(10)
    (key,) = machine.look(10_000) or list(machine.executor.processes)
    machine.executor.on_message(key, Message("ready", {}), 10_010)
    machine.look(10_020)
    assert machine.told == {}
