"""What people and programs are shown of a cluster: the object of `status --json`, and why a stage is idle.

It reads the state and never changes it. The object's shape is a contract.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from p2pcluster.core import rollouts
from p2pcluster.core.idle import Facts, idle_because, unplaced
from p2pcluster.core.membership import role_of
from p2pcluster.core.placement import admitted_nodes, not_admitted
from p2pcluster.core.queues import State
from p2pcluster.core.records import PipelineState, QueueState
from p2pcluster.core.quorum import Configuration
from p2pcluster.errors import RemoteProtocolError

if TYPE_CHECKING:
    from p2pcluster.core.sessions import Session
    from p2pcluster.core.raft import Raft

RATE_WINDOW_MS = 5_000


class Rates:
    """How much each queue took in and gave out lately."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, dict[str, tuple[int, int]]]] = deque()

    def sample(self, state: State, now_ms: int) -> None:
        """Remember where the counts stand."""
        self._samples.append((now_ms, {name: (queue.put, queue.done) for name, queue in state.queues.items()}))
        while len(self._samples) > 2 and now_ms - self._samples[0][0] > RATE_WINDOW_MS:
            self._samples.popleft()

    def of(self, queue: str) -> tuple[float, float]:
        """Items in and out per second."""
        return self._between(0, queue)

    def of_late(self, queue: str) -> tuple[float, float]:
        """The same since the sample before the last one."""
        return self._between(-2, queue)

    def _between(self, since: int, queue: str) -> tuple[float, float]:
        if len(self._samples) < 2:
            return 0.0, 0.0
        (t0, old), (t1, new) = self._samples[since], self._samples[-1]
        if t1 <= t0 or queue not in new:
            return 0.0, 0.0
        before = old.get(queue, (0, 0))
        return tuple(1000.0 * (b - a) / (t1 - t0) for a, b in zip(before, new[queue], strict=True))  # type: ignore[return-value]


def status_of(state: State, rates: Rates, raft: Raft, sessions: list[Session],
              now_ms: int, wall_ms: int, alarms: list[str]) -> dict[str, Any]:
    """The object of `status --json`; the shell adds what only it knows (addresses, the cluster's name, who was refused). `now_ms` is the
    cluster's time, `wall_ms` the time of day."""
    nodes = [session for session in sessions if session.kind == "node"]
    return {
        "cluster": {"id": None, "name": None, "term": raft.term, "commit_index": raft.commit_index},
        "leader": {"id": raft.leader_id, "name": None, "address": None},
        "nodes": [_node(session, raft) for session in nodes],
        "pipelines": [
            {"name": p.name, "version": p.version, "origin": p.origin, "run": p.run, "state": _shown_state(p),
             "rollout": None if p.rollout is None else len(p.rollout.nodes)}
            for p in state.pipelines.values()
        ],
        "stages": [_stage(state, rates, nodes, p, stage, (now_ms, wall_ms)) for p in state.pipelines.values() for stage in p.manifest["stages"]],
        "queues": [_queue(queue, rates, now_ms) for queue in state.queues.values()],
        "network": {"refused_connections": 0, "refused_datagrams": 0, "refused_clients": 0},
        "alarms": _alarms(state, nodes, alarms),
    }


def _node(session: Session, raft: Raft) -> dict[str, Any]:
    committed = raft.committed_configuration
    # Until a change is through, those who only become voters do not yet help to survive anything: they are shown as what they were.
    settled = Configuration(committed.voters_old, (), tuple(committed.members - set(committed.voters_old))) if committed.is_joint else committed
    role = role_of(session.node, settled, raft.leader_id)
    return {"id": session.node, "name": session.name, "role": role, "address": session.facts.get("address"), "alive": True,
            "slots": session.facts.get("slots"), "facts": session.facts}


def _shown_state(pipeline: PipelineState) -> str:
    """running, paused or done; one of which no run was started stands still too."""
    return "paused" if pipeline.state == "new" or (pipeline.state == "running" and "" in pipeline.paused) else pipeline.state


def _stage(state: State, rates: Rates, nodes: list[Session], pipeline: PipelineState, stage: dict[str, Any],
           times: tuple[int, int]) -> dict[str, Any]:
    name = pipeline.full(stage["name"])
    queue = state.queues[pipeline.full(stage["reads"])] if stage["reads"] else None
    outputs = [state.queues[pipeline.full(q)] for port in stage["ports"] for q in port["queues"]]
    processes = sum(session.running.get(name, 0) for session in nodes)
    measured = [session.service_us[name] for session in nodes if name in session.service_us]
    if queue is not None:
        done, rate = queue.done, rates.of(queue.name)[1]
    else:
        done = max((q.put for q in outputs), default=0)
        rate = max((rates.of(q.name)[0] for q in outputs), default=0.0)
    return {
        "pipeline": pipeline.name, "name": stage["name"], "processes": processes, "scaled": pipeline.scaled.get(stage["name"]), "done": done,
        "parked": len(queue.parked) if queue else 0, "rate_per_s": round(rate, 1),
        "service_ms": round(sum(measured) / len(measured) / 1000, 3) if measured else None,
        "idle_because": idle_because(Facts(state, nodes, pipeline, stage, queue, outputs, processes, *times)),
    }


def _queue(queue: QueueState, rates: Rates, now_ms: int) -> dict[str, Any]:
    rate_in, rate_out = rates.of(queue.name)
    oldest_ms = queue.oldest_ms()
    return {
        "pipeline": queue.pipeline, "name": queue.name.partition("/")[2], "ready": len(queue.ready), "leased": len(queue.leases),
        "delayed": len(queue.delayed), "parked": len(queue.parked), "bytes": queue.open_bytes, "rate_in_per_s": round(rate_in, 1),
        "rate_out_per_s": round(rate_out, 1), "oldest_s": None if oldest_ms is None else round(max(0, now_ms - oldest_ms) / 1000, 1),
    }


def _alarms(state: State, nodes: list[Session], alarms: list[str]) -> list[str]:
    troubles = [f"{stage} on {session.name}: {text}" for session in nodes for stage, text in sorted(session.troubles.items())]
    return [*alarms, *troubles, *leaders_alarms(state, nodes)]


def leaders_alarms(state: State, nodes: list[Session]) -> list[str]:
    """What is wrong as far as the leader sees; what its machines notice, they say themselves."""
    found = [why for pipeline in state.pipelines.values() if (why := rollouts.alarm(pipeline)) is not None]
    running = [pipeline for pipeline in state.pipelines.values() if pipeline.state == "running"]
    found += [f"{pipeline.name}: {why}" for pipeline in running if (why := not_admitted(pipeline, nodes)) is not None]
    found += [f"{pipeline.full(stage['name'])}: {why}" for pipeline in running if admitted_nodes(pipeline, nodes)
              for stage in pipeline.manifest["stages"] if (why := unplaced(pipeline, stage, nodes)) is not None]
    found += [f"{pipeline.full(name)} stopped by itself: {why}; to go on, run resume {name}, or deploy a version that is right"
              for pipeline in running for name, why in sorted(pipeline.paused.items()) if why]
    return found + [why for queue in state.queues.values() if (why := _unread(state, queue)) is not None]


def _unread(state: State, queue: QueueState) -> str | None:
    pipeline = state.pipelines.get(queue.pipeline)
    if pipeline is None or queue.read_by or queue.results or not queue.open_count:
        return None
    name = queue.name.partition("/")[2]
    if any(record["name"] == name for record in pipeline.manifest["queues"]):
        return None
    return (f"queue {queue.name} has {queue.open_count} items and no stage reads it in version {pipeline.version[:8]}: "
            f"deploy a version with that stage, or drop them: discard {name} --pipeline {pipeline.name}")


def parked_items(state: State, pipeline: str | None, after: str | None, count: int) -> list[dict[str, Any]]:
    """Parked items without their values, `count` at most, by queue and id from the one on that follows the item called `after`."""
    name_after, _, id_after = (after or ":0").rpartition(":")
    try:
        behind = (name_after, int(id_after))
    except ValueError as error:
        raise RemoteProtocolError(f"{after!r:.50} is no item") from error
    found: list[dict[str, Any]] = []
    for name in sorted(state.queues):
        queue = state.queues[name]
        if pipeline is not None and queue.pipeline != pipeline:
            continue
        chosen = [item_id for item_id in sorted(queue.parked) if (name, item_id) > behind][: count - len(found)]
        for item_id in chosen:
            parked = queue.parked[item_id]
            found.append({"id": f"{name}:{item_id}", "queue": name, "run": parked.run, "deliveries": parked.deliveries,
                          "at_ms": parked.at_ms, "error": parked.error})
    return found
