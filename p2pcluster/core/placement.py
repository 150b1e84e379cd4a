"""How many processes of each stage each node runs: equal input, equal plan; a small change in, a small change out.

What a pipeline's own placement says comes first, and explicit counts are given as asked. The `"auto"` stages share the slots: each has
a process somewhere even beyond them, pipelines that have work share the rest evenly, and within a pipeline they go to the stage whose
items would wait the longest. A process moves only for a wait that is longer by `HYSTERESIS`, so that two stages that are about even do
not take turns, and what runs on a node stays there unless another one has much more room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pcluster.core import pythons, rules

if TYPE_CHECKING:
    from p2pcluster.core.sessions import Session
    from p2pcluster.core.records import PipelineState

HYSTERESIS = 1.25  # a process moves for a wait this many times as long
WAIT_US_MIN = 200_000.0  # shorter waits are noise: starting a process costs about as much
FAR = 4.0  # or for one this many times as long where that slows the pipeline's pace: its queues alone make waits differ
MOVES_DIVISOR = 4  # a plan moves at most this part of the slots, so that four plans move all of them and one mistake few
SATURATED = 0.9  # a stage that keeps this part of its processes at work is behind, or about to be
SATURATED_FULL = 0.4  # or this part, when its queue is full
TURN_S = 10  # how long a pipeline keeps the odd slot where that is much
EVEN = 0.85  # of an even part: whoever gets less without the odd slot has it in turn
IDLE = 0.6  # processes that are at work this little are more than are needed
WELL_USED = 0.8  # as many are left as are at work this much
UNEVEN = 2  # a process goes to another node for this much more room there; for less, it would come back
_NODES_TOLD = 3  # in one line that can be read


@dataclass(frozen=True, slots=True)
class Load:
    """A stage, `pipeline/stage`, and what waits for it: `backlog` items of `service_us` each, in its queue and further up. Sources are
    not placed here: they are assigned."""

    stage: str
    kind: str
    processes: int | str
    per_node: int | None
    backlog: float
    service_us: float
    allowed: frozenset[str] | None = None  # the nodes that satisfy its rule; None: it has none
    prefers: str | None = None  # the node that it runs on as long as that is there
    barred: frozenset[str] = frozenset()  # nodes where it does not start: they get none of it as long as there are others
    counts: Mapping[str, int] | None = None  # by node, what the pipeline's own placement says; of nodes that are gone too
    flow: float = 1.0  # of the items of its pipeline, how many come to it; only their proportions matter
    busy: float = 0.0  # how many processes it has kept busy of late
    is_full: bool = False  # whoever puts into its queue waits for it
    is_blocked: bool = False  # more of it would wait for room behind it

    @property
    def pipeline(self) -> str:
        return self.stage.partition("/")[0]

    def wait_us(self, processes: int) -> float:
        """How long the last item in line waits."""
        return self.backlog * self.service_us / max(processes, 1)

    def pace_us(self, processes: int) -> float:
        """How long it takes for all that comes to it, in proportion: the stage with the longest sets its pipeline's pace."""
        return self.flow * self.service_us / max(processes, 1)

    def is_behind(self, processes: int) -> bool:
        """Whether these are too few: a line that is long, or that is short only because its queue is. Rates come late, so that a stage
        whose queue is full may more than double from one plan to the next."""
        return self.wait_us(processes) >= WAIT_US_MIN or self.busy >= (SATURATED_FULL if self.is_full else SATURATED) * processes

    def gains(self, processes: int) -> bool:
        """Whether one more than these would have anything to do."""
        return not self.is_blocked and processes < self.backlog and self.is_behind(processes)


Plan = dict[str, dict[str, int]]


def allowed_nodes(pipeline: PipelineState, stage: dict[str, Any], nodes: Sequence[Session]) -> tuple[frozenset[str] | None, str | None]:
    """The sessions of the nodes that may run a stage, None for all: the project admits their Python, and they satisfy the stage's rule.
    And why there is none of them, in one line."""
    admitted = admitted_nodes(pipeline, nodes)
    if nodes and not admitted:
        return frozenset(), f"no node here has a Python that its project is for ({pipeline.project['python']})"
    if stage["where"] is not None:
        return rules.fitting(stage["where"], {session.id: (session.name, facts_of(session, pipeline)) for session in admitted})
    return (None if len(admitted) == len(nodes) else frozenset(session.id for session in admitted)), None


def admitted_nodes(pipeline: PipelineState, nodes: Sequence[Session]) -> list[Session]:
    """The nodes whose Python the project admits. One that was deployed before projects said so admits all."""
    python = pipeline.project.get("python")
    return [session for session in nodes if python is None or pythons.admits(python, session.facts.get("python"))]


def not_admitted(pipeline: PipelineState, nodes: Sequence[Session]) -> str | None:
    """Which nodes the project does not admit, and what to do about it, in one line; None where it admits all."""
    admitted = {session.id for session in admitted_nodes(pipeline, nodes)}
    told = [f"{session.name} (Python {session.facts.get('python')})" for session in nodes if session.id not in admitted]
    if not told:
        return None
    more = f" and {len(told) - _NODES_TOLD} more" if len(told) > _NODES_TOLD else ""
    return (f"none of its stages run on {', '.join(told[:_NODES_TOLD])}{more}, because its project is for Python "
            f"{pipeline.project['python']}: if they can run there, write python = \">=3.11\", or what holds, under [tool.p2pcluster] in its "
            "pyproject.toml and deploy it again")


def facts_of(session: Session, pipeline: PipelineState) -> dict[str, Any]:
    """What the rules of a pipeline may know of a node."""
    is_origin = session.node == pipeline.origin.get("node")
    return {**{name: session.facts.get(name) for name in rules.FACTS}, "name": session.name, "origin": is_origin}


def plan_processes(slots: dict[str, int], loads: list[Load], current: Plan, now_s: int = 0) -> Plan:
    """Processes by node and stage. `slots` by node; `current` is the plan in force."""
    plan: Plan = {node: {} for node in slots}
    if not slots:
        return plan
    left = [load for load in loads if load.kind != "source" and not _place(plan, load)]
    fixed = [(load, int(load.processes)) for load in left if load.processes != "auto"]
    auto = _shares([load for load in left if load.processes == "auto"], slots, _totals(current), now_s // TURN_S)
    spread = [(load, _fit(load, slots), count) for load, count in (*fixed, *auto)]
    for load, fit, count in spread:
        _keep(plan, load, fit, count, current)
    for load, fit, count in spread:
        _fill(plan, load, fit, count, slots)
    _even_out(plan, [(load, fit) for load, fit, _ in spread], slots)
    return plan


def _place(plan: Plan, load: Load) -> bool:
    """Put a stage where the pipeline's placement wants it; whether that is anywhere. It was said of the nodes and rules of its time."""
    may = {node: count for node, count in (load.counts or {}).items() if node in plan and (load.allowed is None or node in load.allowed)}
    for node, count in may.items():
        plan[node][load.stage] = count if load.per_node is None else min(count, load.per_node)
    return bool(may)


def _most(load: Load, slots: dict[str, int]) -> int:
    """How many processes an automatic stage may have: the slots of the nodes that it may run on, and one even beyond them."""
    fit = [count for node, count in slots.items() if load.allowed is None or node in load.allowed]
    return max(1, sum(count if load.per_node is None else min(count, load.per_node) for count in fit))


def _totals(plan: Plan) -> dict[str, int]:
    totals: dict[str, int] = {}
    for stages in plan.values():
        for stage, count in stages.items():
            totals[stage] = totals.get(stage, 0) + count
    return totals


def _shares(loads: list[Load], slots: dict[str, int], current: dict[str, int], turn: int) -> list[tuple[Load, int]]:
    """How many processes each automatic stage gets in all."""
    pipelines: dict[str, list[_Share]] = {}
    for load in loads:
        most = _most(load, slots)
        pipelines.setdefault(load.pipeline, []).append(_Share(load, most, min(most, max(1, current.get(load.stage, 1)))))
    budgets = _budgets(pipelines, sum(slots.values()), turn)
    moves = max(1, sum(slots.values()) // MOVES_DIVISOR)
    for name, shares in pipelines.items():
        _share(shares, budgets[name], moves)
    by_stage = {share.load.stage: share.count for shares in pipelines.values() for share in shares}
    return [(load, by_stage[load.stage]) for load in loads]


@dataclass(slots=True)
class _Share:
    """How many processes an automatic stage has, and may have at most."""

    load: Load
    most: int
    count: int

    @property
    def wait_us(self) -> float:
        return self.load.wait_us(self.count)

    @property
    def wait_after_us(self) -> float:
        return self.load.wait_us(self.count - 1)

    @property
    def at_work(self) -> int:
        """How many of them it needs to keep up; all of them unless it clearly needs fewer."""
        return self.count if self.load.busy > IDLE * self.count else max(1, math.ceil(self.load.busy / WELL_USED))

    @property
    def gains(self) -> bool:
        return self.count < self.most and self.load.gains(self.count)


def _budgets(pipelines: dict[str, list[_Share]], slots: int, turn: int) -> dict[str, int]:
    """How many processes each pipeline may have: evenly, up to what it could use (max-min fairness; Bertsekas and Gallager, Data
    Networks, section 6.5.2)."""
    budgets = {name: len(shares) for name, shares in pipelines.items()}
    wants = {name: _wanted(shares) for name, shares in pipelines.items()}
    have = {name: sum(share.count for share in shares) for name, shares in pipelines.items()}
    hungry = sorted(name for name in budgets if budgets[name] < wants[name])
    if hungry and slots // len(hungry) < EVEN * slots / len(hungry):
        first = {name: (at + turn) % len(hungry) for at, name in enumerate(hungry)}
    else:
        first = {name: -have[name] for name in hungry}
    while sum(budgets.values()) < slots and hungry:
        name = min(hungry, key=lambda name: (budgets[name], first[name]))
        budgets[name] += 1
        hungry = [name for name in hungry if budgets[name] < wants[name]]
    left = slots - sum(budgets.values())
    for name in budgets:  # what nobody wants stays where it is
        kept = min(max(0, have[name] - budgets[name]), max(0, left))
        budgets[name], left = budgets[name] + kept, left - kept
    return budgets


def _wanted(shares: list[_Share]) -> int:
    """How many processes a pipeline could use: all that it may have where something waits, else those that are at work."""
    if any(share.load.is_behind(share.count) and not share.load.is_blocked for share in shares):
        return sum(max(share.at_work, min(share.most, math.ceil(share.load.backlog))) for share in shares)
    return sum(share.at_work for share in shares)


def _share(shares: list[_Share], slots: int, moves: int) -> None:
    """Share a pipeline's slots among its automatic stages."""
    while sum(share.count for share in shares) > max(slots, len(shares)):
        min((share for share in shares if share.count > 1), key=lambda share: share.wait_after_us).count -= 1
    while sum(share.count for share in shares) < slots and (takers := [share for share in shares if share.gains]):
        max(takers, key=lambda share: share.wait_us).count += 1
    for _ in range(moves):
        if not _move_one(shares):
            return


def _move_one(shares: list[_Share]) -> bool:
    """A process goes from the stage that would miss it least to the one that needs it most; whether one did."""
    givers = [share for share in shares if share.count > 1]
    takers = [share for share in shares if share.gains]
    if not givers or not takers:
        return False
    taker, giver = max(takers, key=lambda share: share.wait_us), min(givers, key=lambda share: share.wait_after_us)
    longer = HYSTERESIS if _keeps_pace(giver, taker) else FAR
    if giver is taker or taker.wait_us <= longer * giver.wait_after_us:
        return False
    giver.count, taker.count = giver.count - 1, taker.count + 1
    return True


def _keeps_pace(giver: _Share, taker: _Share) -> bool:
    """Whether the slower of the two is no slower afterwards."""
    before_us = max(giver.load.pace_us(giver.count), taker.load.pace_us(taker.count))
    return max(giver.load.pace_us(giver.count - 1), taker.load.pace_us(taker.count + 1)) <= before_us


def _fit(load: Load, slots: Mapping[str, int]) -> frozenset[str]:
    """The nodes that may run a stage; those where it does not start only when there are no others."""
    fit = frozenset(slots) if load.allowed is None else frozenset(slots) & load.allowed
    return fit if fit <= load.barred else fit - load.barred


def _room(plan: Plan, load: Load, fit: frozenset[str]) -> list[str]:
    """The nodes that may have one more, in the order of the plan."""
    return [node for node in plan if node in fit and (load.per_node is None or plan[node].get(load.stage, 0) < load.per_node)]


def _keep(plan: Plan, load: Load, fit: frozenset[str], count: int, current: Plan) -> None:
    """As many processes as may stay where they are, do; those too many go where it has most of them."""
    held = {node: min(current.get(node, {}).get(load.stage, 0), count if load.per_node is None else load.per_node)
            for node in plan if node in fit}
    if load.prefers in held:
        limit = count if load.per_node is None else load.per_node
        held = {node: have if node == load.prefers else min(have, max(0, count - limit)) for node, have in held.items()}
    while sum(held.values()) > count:
        held[max(held, key=lambda node: (node != load.prefers, held[node]))] -= 1
    for node, have in held.items():
        if have:
            plan[node][load.stage] = have


def _fill(plan: Plan, load: Load, fit: frozenset[str], count: int, slots: Mapping[str, int]) -> None:
    """Start what is missing where the most slots are left."""
    for _ in range(count - sum(stages.get(load.stage, 0) for stages in plan.values())):
        room = _room(plan, load, fit)
        if not room:
            return
        node = load.prefers if load.prefers in room else max(room, key=lambda name: _left(plan, slots, name))
        assert node is not None
        plan[node][load.stage] = plan[node].get(load.stage, 0) + 1


def _left(plan: Plan, slots: Mapping[str, int], node: str) -> int:
    return slots[node] - sum(plan[node].values())


def _even_out(plan: Plan, loads: list[tuple[Load, frozenset[str]]], slots: Mapping[str, int]) -> None:
    """Some processes go to nodes with more room: a machine that has just come gets its part."""
    for _ in range(max(1, sum(slots.values()) // MOVES_DIVISOR)):
        move = _evening(plan, loads, slots)
        if move is None:
            return
        stage, node, to = move
        plan[node][stage] -= 1
        if not plan[node][stage]:
            del plan[node][stage]
        plan[to][stage] = plan[to].get(stage, 0) + 1


def _evening(plan: Plan, loads: list[tuple[Load, frozenset[str]]], slots: Mapping[str, int]) -> tuple[str, str, str] | None:
    """A stage of which a process goes from a node to another: from the fullest to the emptiest for which that may be."""
    nodes = sorted(plan, key=lambda node: (_left(plan, slots, node), node))
    for to in reversed(nodes):
        for node in nodes:
            if _left(plan, slots, to) - _left(plan, slots, node) < UNEVEN:
                break
            for load, fit in loads:
                if plan[node].get(load.stage, 0) and node != load.prefers and to in _room(plan, load, fit):
                    return load.stage, node, to
    return None
