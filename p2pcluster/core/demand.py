"""What each stage of each running pipeline has to do, for the plan: how many items, how long one takes, what holds it up.

This file alone decides what counts as waiting for a stage: what is in its queue, and what will come of what lies further up. Counting
its queue alone would have two stages of one pipeline give each other processes and take them back, as often as the queue between them
fills and empties.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from p2pcluster.core.options import rate_per_s
from p2pcluster.core.placement import Load, allowed_nodes
from p2pcluster.core.rollouts import versions_of

if TYPE_CHECKING:
    from p2pcluster.core.sessions import Session
    from p2pcluster.core.planner import Planner
    from p2pcluster.core.queues import State
    from p2pcluster.core.records import PipelineState, QueueState
    from p2pcluster.core.status import Rates

FULL = 0.9  # a queue that is this full holds up whoever puts into it, or soon will


def loads_of(state: State, nodes: list[Session], rates: Rates, planner: Planner) -> list[Load]:
    """The stages of the running pipelines. `nodes` are the sessions of the nodes that are here."""
    return [load for pipeline in state.pipelines.values() if pipeline.state == "running"
            for load in _loads_of(state, nodes, rates, planner, pipeline)]


def _loads_of(state: State, nodes: list[Session], rates: Rates, planner: Planner, pipeline: PipelineState) -> list[Load]:
    """Of one pipeline. While a version is rolled out, a node runs the stages of the one that is in force there; how many processes a stage
    of both has in all, the new one says."""
    loads: dict[str, Load] = {}
    versions = versions_of(pipeline, nodes)
    for version, group in versions:
        items = expected_items(version, state.queues)
        for stage in version.manifest["stages"]:
            load = _load(state, nodes, rates, planner, version, stage, items)
            if len(versions) > 1:
                fit = allowed_nodes(version, stage, group)[0]
                here = frozenset(session.id for session in group) if fit is None else fit
                newer = loads.get(load.stage)
                load = replace(load, allowed=here) if newer is None else replace(newer, allowed=(newer.allowed or frozenset()) | here)
            loads[load.stage] = load
    return list(loads.values())


def _load(state: State, nodes: list[Session], rates: Rates, planner: Planner, pipeline: PipelineState, stage: dict[str, Any],
          items: Mapping[str, float]) -> Load:
    name = pipeline.full(stage["name"])
    queue = state.queues[pipeline.full(stage["reads"])] if stage["reads"] else None
    measured = [session.service_us[name] for session in nodes if name in session.service_us]
    service_us = sum(measured) / len(measured) / stage["concurrency"] if measured else 0.0
    expected = items[stage["reads"]] if stage["reads"] and not pipeline.is_paused(stage["name"]) else 0.0
    back = {tuple(edge) for edge in pipeline.manifest["back_edges"]}
    behind = [state.queues[pipeline.full(name)] for port in stage["ports"] for name in port["queues"] if (stage["name"], name) not in back]
    return Load(
        name, stage["kind"], pipeline.processes(stage), stage["per_node"], _let_through(stage, expected), service_us,
        allowed=allowed_nodes(pipeline, stage, nodes)[0],
        prefers=home_of(pipeline, stage, nodes),
        barred=frozenset(session.id for session in nodes if name in session.troubles),
        counts=None if stage["name"] in pipeline.scaled else planner.counts(pipeline.name, stage["name"]),
        flow=queue.put + expected - due_count(queue) if queue else 0.0,
        busy=rates.of_late(queue.name)[1] * service_us / 1e6 if queue else 0.0,
        is_full=queue is not None and stage["rate"] is None and fullness(queue) >= FULL,
        is_blocked=any(fullness(queue) >= FULL for queue in behind),
    )


def _let_through(stage: dict[str, Any], items: float) -> float:
    """What waits for a rate waits for no process: of its items only a second's worth counts."""
    return items if stage["rate"] is None else min(items, rate_per_s(stage["rate"]))


def home_of(pipeline: PipelineState, stage: dict[str, Any], nodes: list[Session]) -> str | None:
    """The session that is to run a source or a sink as long as it is there: of the machine that the project came from."""
    origin = origin_of(pipeline, nodes)
    return origin.id if origin is not None and stage["kind"] != "stage" else None


def origin_of(pipeline: PipelineState, nodes: list[Session]) -> Session | None:
    return next((session for session in nodes if session.node == pipeline.origin.get("node")), None)


def fullness(queue: QueueState) -> float:
    """From 0 to 1 and beyond, by items or bytes, whichever is nearer to its limit."""
    by_items = queue.open_count / queue.maxsize if queue.maxsize else 0.0
    return max(by_items, queue.open_bytes / queue.bytes_max if queue.bytes_max else 0.0)


def due_count(queue: QueueState) -> int:
    return queue.open_count - len(queue.delayed)


def expected_items(pipeline: PipelineState, queues: Mapping[str, QueueState]) -> dict[str, float]:
    """By queue of the pipeline, how many items its reader has before it: those that are there, and those that will come of what lies
    further up, if it goes on as it went so far in this run. What comes round in a circle is left out, and so is what is not due."""
    back = {tuple(edge) for edge in pipeline.manifest["back_edges"]}
    writers: dict[str, list[str | None]] = {}
    for stage in pipeline.manifest["stages"]:
        for name in {name for port in stage["ports"] for name in port["queues"] if (stage["name"], name) not in back}:
            writers.setdefault(name, []).append(stage["reads"])
    expected: dict[str, float] = {}
    begun: set[str] = set()
    waiting = [stage["reads"] for stage in reversed(pipeline.manifest["stages"]) if stage["reads"]]
    while waiting:  # a stack of its own: whoever has the key may send a graph of any depth, and one whose circles no edge is said to close
        name = waiting[-1]
        queue, above = queues[pipeline.full(name)], writers.get(name, [])
        read = [before for before in above if before is not None]
        if name not in begun:
            begun.add(name)
            waiting += [before for before in read if before not in begun]
            continue
        waiting.pop()
        if name not in expected:
            each = _yield_of(queue, [queues[pipeline.full(before)] for before in read])
            coming = sum(expected.get(before, 0.0) for before in read) * (min(each, 1.0) if None in above else each)
            expected[name] = due_count(queue) + coming
    return expected


def _yield_of(queue: QueueState, before: list[QueueState]) -> float:
    """How many items of a queue one that was finished further up has made on average; one, while nobody can know."""
    finished = sum(each.done for each in before)
    return queue.put / finished if finished else 1.0
