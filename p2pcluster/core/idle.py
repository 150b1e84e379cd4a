"""Why a stage is idle, in one line: the first of the reasons that holds.

This file alone decides which reason comes before which. What stops a stage altogether comes first, then what is not there, then what it
waits for; a stage that has something in every process has no reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pcluster.core import pacing, ticks
from p2pcluster.core.placement import allowed_nodes

if TYPE_CHECKING:
    from p2pcluster.core.sessions import Session
    from p2pcluster.core.queues import State
    from p2pcluster.core.records import PipelineState, QueueState


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a stage. `queue`: what it reads; `processes`: how many run; `now_ms` of the cluster, `wall_ms` of the day."""

    state: State
    nodes: Sequence[Session]
    pipeline: PipelineState
    stage: dict[str, Any]
    queue: QueueState | None
    outputs: Sequence[QueueState]
    processes: int
    now_ms: int
    wall_ms: int

    @property
    def name(self) -> str:
        return self.pipeline.full(self.stage["name"])


def idle_because(facts: Facts) -> str | None:
    """The line, or None for a stage that works or could work at any moment."""
    return next((why for rule in _RULES if (why := rule(facts)) is not None), None)


def unplaced(pipeline: PipelineState, stage: dict[str, Any], nodes: Sequence[Session]) -> str | None:
    """Why no node that is here may run a stage."""
    allowed, why = allowed_nodes(pipeline, stage, nodes)
    is_here = any(session.node == pipeline.origin.get("node") for session in nodes)
    if allowed is not None and not allowed and stage["where"] == "origin" and not is_here:
        return f"it runs where the project came from ({pipeline.origin.get('name')}), and that node is not here"
    return why


def is_full(queue: QueueState) -> bool:
    return (queue.maxsize is not None and queue.room_taken >= queue.maxsize) or (
        queue.bytes_max is not None and queue.open_bytes >= queue.bytes_max)


def in_words(ms: int) -> str:
    """How long, for people: no more precise than they need."""
    if ms < 10_000:
        return f"{max(ms, 0) / 1000:.1f} s"
    for unit_ms, unit, most in ((1000, "s", 120), (60_000, "min", 120), (3_600_000, "h", 48)):
        if ms < unit_ms * most:
            return f"{ms // unit_ms} {unit}"
    return f"{ms // 86_400_000} days"


# ---- what stops it altogether


def _run(facts: Facts) -> str | None:
    if facts.pipeline.state == "running":
        return None
    return f"run {facts.pipeline.run} is done" if facts.pipeline.state == "done" else "no run was started"


def _pause(facts: Facts) -> str | None:
    paused = facts.pipeline.paused
    for name, what in (("", "its pipeline"), (facts.stage["name"], "it")):
        if name in paused:
            return f"{what} stopped by itself: {paused[name]}" if paused[name] else f"{what} is paused"
    return None


def _end(facts: Facts) -> str | None:
    return "the source has ended" if facts.queue is None and facts.state.source_finished(facts.pipeline, facts.stage) else None


# ---- what is not there


def _reports(facts: Facts) -> str | None:
    """A new leader waits until a node has said what it holds."""
    return None if any(session.has_reported for session in facts.nodes) else "no node has reported to the leader yet"


def _stays(facts: Facts) -> str | None:
    return "every node that is here is stopping" if all(session.is_draining for session in facts.nodes) else None


def _trouble(facts: Facts) -> str | None:
    found = [(session.troubles[facts.name], session.name) for session in facts.nodes if facts.name in session.troubles]
    return f"{found[0][0]} (on {found[0][1]})" if found and not facts.processes else None


def _rule(facts: Facts) -> str | None:
    return unplaced(facts.pipeline, facts.stage, facts.nodes)


def _slot(facts: Facts) -> str | None:
    """The plan has it nowhere, though it may run somewhere."""
    if facts.queue is None or facts.processes or any(session.planned is None for session in facts.nodes):
        return None
    is_planned = any(session.planned["processes"].get(facts.name) for session in facts.nodes if session.planned)
    return None if is_planned else "no node has a free slot for it"


# ---- what it waits for


def _room(facts: Facts) -> str | None:
    full = next((queue for queue in facts.outputs if is_full(queue)), None)
    if full is None:
        return None
    return f"queue {full.name} is full" + ("" if full.read_by else ", and no stage reads it: take from it")


def _rate(facts: Facts) -> str | None:
    is_source = facts.queue is None
    interval_ns = facts.state.source_intervals_ns.get(facts.name, 0) if is_source else facts.queue.interval_ns  # type: ignore[union-attr]
    full_ns = facts.pipeline.paced.get(facts.stage["name"], 0)
    if not interval_ns or pacing.allowed(full_ns, interval_ns, facts.now_ms) or not (is_source or facts.queue.ready):  # type: ignore[union-attr]
        return None
    return f"its rate of {facts.stage['rate']} lets the next one go in {in_words(pacing.wait_ms(full_ns, interval_ns, facts.now_ms, 1))}"


def _tick(facts: Facts) -> str | None:
    if facts.stage.get("every_s") is None:
        return None
    last_ms = max((at_ms for key, at_ms in facts.pipeline.ticks.items() if key.rpartition("/")[0] == facts.stage["name"]), default=None)
    left_ms = ticks.next_ms(facts.stage, last_ms, facts.wall_ms) - facts.wall_ms
    return f"its next tick is in {in_words(left_ms)}" if left_ms > 0 else None


def _empty(facts: Facts) -> str | None:
    queue = facts.queue
    if queue is None or queue.open_count:
        return None
    return "its queue is empty" + (" and closed" if queue.closed else "") + (f"; {len(queue.parked)} parked" if queue.parked else "")


def _time(facts: Facts) -> str | None:
    queue = facts.queue
    if queue is None or queue.ready or queue.leases or not queue.delayed:
        return None
    tried = any(item_id in queue.deliveries for item_id in queue.delayed) if len(queue.deliveries) else False
    count = len(queue.delayed)
    what = ("1 item waits" if count == 1 else f"{count} items wait") + (" for another try" if tried else " until a time")
    return f"{what}, the next in {in_words(queue.delayed.wait_ms(facts.now_ms, facts.wall_ms))}"


def _absent(facts: Facts) -> str | None:
    """All that is there is with machines that do not answer: it goes back when their sessions end."""
    queue = facts.queue
    if queue is None or queue.ready or not queue.leases:
        return None
    here = {(session.node, session.boot) for session in facts.nodes}
    if any(holder in here for holder in queue.leases.held_by):
        return None
    names = {facts.state.members.get(node, {}).get("name", "a client") for node, _ in queue.leases.held_by}
    return f"all of its {len(queue.leases)} items are with {', '.join(sorted(names))}, and will come back if nothing is heard from there"


def _version(facts: Facts) -> str | None:
    rollout = facts.pipeline.rollout
    return None if rollout is None or facts.processes else f"version {facts.pipeline.version[:8]} is being rolled out"


def _start(facts: Facts) -> str | None:
    return "its process is starting" if not facts.processes else None


def _hands(facts: Facts) -> str | None:
    """Fewer items than processes: those that have none wait."""
    queue = facts.queue
    if queue is None or queue.ready or queue.delayed or not 0 < len(queue.leases) < facts.processes:
        return None
    return f"all of its {len(queue.leases)} items are in hand" if len(queue.leases) > 1 else "its only item is in hand"


_RULES: tuple[Callable[[Facts], str | None], ...] = (
    _run, _pause, _end, _reports, _stays, _trouble, _rule, _slot, _room, _rate, _tick, _empty, _time, _absent, _version, _start, _hands,
)
