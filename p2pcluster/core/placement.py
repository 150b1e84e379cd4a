"""How many processes of each stage each node runs: equal input, equal plan; a small change in, a small change out.

What a pipeline's own placement says comes first, and explicit counts are given as asked. The `"auto"` stages share the slots: each has
a process somewhere even beyond them, and the rest go, one by one, to the stage whose items would wait the longest. A process moves only
for a wait that is longer by `HYSTERESIS`, so that two stages that are about even do not take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pcluster.core import pythons, rules

if TYPE_CHECKING:
    from p2pcluster.core.node import Session
    from p2pcluster.core.records import PipelineState

HYSTERESIS = 1.5  # a process moves for a wait this many times as long
WAIT_US_MIN = 200_000.0  # shorter waits are noise: starting a process costs about as much
_NODES_TOLD = 3  # in one line that can be read


@dataclass(frozen=True, slots=True)
class Load:
    """A stage and what waits for it: `backlog` items of `service_us` each. Sources are not placed here: they are assigned."""

    stage: str
    kind: str
    processes: int | str
    per_node: int | None
    backlog: int
    service_us: float
    allowed: frozenset[str] | None = None  # the nodes that satisfy its rule; None: it has none
    prefers: str | None = None  # the node that it runs on as long as that is there
    barred: frozenset[str] = frozenset()  # nodes where it does not start: they get none of it as long as there are others
    counts: Mapping[str, int] | None = None  # by node, what the pipeline's own placement says; of nodes that are gone too

    def wait_us(self, processes: int) -> float:
        """How long the last item in line waits."""
        return self.backlog * self.service_us / max(processes, 1)


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


def plan_processes(slots: dict[str, int], loads: list[Load], current: Plan) -> Plan:
    """Processes by node and stage. `slots` by node; `current` is the plan in force."""
    plan: Plan = {node: {} for node in slots}
    if not slots:
        return plan
    left = [load for load in loads if load.kind != "source" and not _place(plan, load)]
    for load in left:
        if load.processes != "auto":
            _spread(plan, load, int(load.processes), slots)
    auto = [load for load in left if load.processes == "auto"]
    most = [_most(load, slots) for load in auto]
    for load, count in zip(auto, _shares(auto, most, sum(slots.values()), _totals(current)), strict=True):
        _spread(plan, load, count, slots)
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


def _shares(loads: list[Load], most: list[int], slots: int, current: dict[str, int]) -> list[int]:
    """How many processes each automatic stage gets in all, each within what it may have at most."""
    shares = [min(limit, max(1, current.get(load.stage, 1))) for load, limit in zip(loads, most, strict=True)]
    while sum(shares) > max(slots, len(loads)):
        spare = [at for at in range(len(loads)) if shares[at] > 1]
        shares[min(spare, key=lambda at: loads[at].wait_us(shares[at]))] -= 1
    while sum(shares) < slots and (open_to := _below(shares, most)):
        at = _longest(loads, shares, open_to)
        if loads[at].wait_us(shares[at]) < WAIT_US_MIN:
            break
        shares[at] += 1
    _move_one(loads, shares, most)
    return shares


def _below(shares: list[int], most: list[int]) -> list[int]:
    return [at for at in range(len(shares)) if shares[at] < most[at]]


def _longest(loads: list[Load], shares: list[int], among: list[int]) -> int:
    return max(among, key=lambda at: loads[at].wait_us(shares[at]))


def _move_one(loads: list[Load], shares: list[int], most: list[int]) -> None:
    """One process at a time goes from the stage that would miss it least to the one that needs it most."""
    givers = [at for at in range(len(loads)) if shares[at] > 1]
    takers = _below(shares, most)
    if not givers or not takers:
        return
    to = _longest(loads, shares, takers)
    giver = min(givers, key=lambda at: loads[at].wait_us(shares[at] - 1))
    gain_us = loads[to].wait_us(shares[to])
    if giver != to and gain_us >= WAIT_US_MIN and gain_us > HYSTERESIS * loads[giver].wait_us(shares[giver] - 1):
        shares[giver] -= 1
        shares[to] += 1


def _spread(plan: Plan, load: Load, count: int, slots: dict[str, int]) -> None:
    """Give `count` processes to the nodes with the most slots left, within `per_node`."""
    for _ in range(count):
        room = [node for node in plan if load.per_node is None or plan[node].get(load.stage, 0) < load.per_node]
        fit = plan.keys() if load.allowed is None else plan.keys() & load.allowed
        fit = fit if fit <= load.barred else fit - load.barred
        room = [node for node in room if node in fit]
        room = [load.prefers] if load.prefers in room else room
        if not room:
            return
        node = max(room, key=lambda name: slots[name] - sum(plan[name].values()))
        plan[node][load.stage] = plan[node].get(load.stage, 0) + 1
