"""When a new version goes on to the next node, when it is everywhere, and when it goes back.

Each node that was told to run it says what became of its *trial*: how many processes of other versions it still has, which stages have a
process that has proved itself, and what did not start. A version proves itself on one node, the one that it was deployed from where that is
here, before the next one gets it; so one that cannot start costs one node's work for a moment. It goes back when a stage does not start
where it is tried first. Where it has started on another node before, what it lacks is that node's fact, as it is without a roll-out.

A function that raises is none of this module's business: its items are tried again and parked, in the old version as in the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from p2pcluster.core.codec import Message

if TYPE_CHECKING:
    from p2pcluster.core.sessions import Session
    from p2pcluster.core.records import PipelineState

Sources = Sequence[tuple[str, str | None]]  # each with the session that runs it; None: one is about to be chosen


def versions_of(pipeline: PipelineState, nodes: Sequence[Session]) -> list[tuple[PipelineState, list[Session]]]:
    """The pipeline in each version that is in force, the newest first, with the nodes that run that."""
    if pipeline.rollout is None:
        return [(pipeline, list(nodes))]
    rolled, former = pipeline.rollout.nodes, pipeline.rollout.former
    return [(replace(pipeline, rollout=None), [session for session in nodes if session.node in rolled]),
            (replace(pipeline, rollout=None, **former.fields()), [session for session in nodes if session.node not in rolled])]


def next_step(pipeline: PipelineState, nodes: Sequence[Session], sources: Sources) -> Message | None:
    """The command that is to be logged now. `nodes`: those that are here and stay; `sources`: those of the pipeline that have not ended."""
    rollout = pipeline.rollout
    assert rollout is not None, "a version is rolled out"
    about = {"pipeline": pipeline.name, "rollout": rollout.number}
    (_, rolled), (_, left) = versions_of(pipeline, nodes)
    failure = next(_failures(pipeline, rolled), None)
    if failure is not None:
        return Message("roll_back", {**about, "failure": failure})
    if not nodes or not all(_is_well(pipeline, session, sources) for session in rolled):
        return None
    if not left:
        return Message("rolled_out", about)
    return Message("roll", {**about, "node": min(left, key=lambda session: _turn(pipeline, session)).node})


def _turn(pipeline: PipelineState, session: Session) -> tuple[bool, bool, str, str]:
    """Where somebody wrote and tried it comes first; a node where something of the pipeline does not start even now comes last."""
    is_ill = any(name.startswith(f"{pipeline.name}/") for name in session.troubles)
    return session.node != pipeline.origin.get("node"), is_ill, session.name, session.node


def _trial(pipeline: PipelineState, session: Session) -> dict[str, Any] | None:
    trial: dict[str, Any] | None = session.trials.get(pipeline.name)
    return trial if trial is not None and pipeline.rollout is not None and trial["rollout"] == pipeline.rollout.number else None


def _failures(pipeline: PipelineState, rolled: Sequence[Session]) -> Iterator[dict[str, Any]]:
    """What did not start where it was tried and has started nowhere."""
    sources = {stage["name"] for stage in pipeline.sources}
    trials = {session.id: trial for session in rolled if (trial := _trial(pipeline, session)) is not None}
    for session in rolled:
        failure = trials[session.id]["failure"] if session.id in trials else None
        if failure is not None:
            stage = failure["stage"]
            is_elsewhere = any(stage in trial["ready"] for other, trial in trials.items() if other != session.id)
            if stage in sources or not is_elsewhere:
                yield {"node": session.name, "stage": stage, "text": failure["text"]}


def _is_well(pipeline: PipelineState, session: Session, sources: Sources) -> bool:
    """Whether all that the node is to run of the new version has proved itself there, and nothing runs there of another one. What has
    failed and does not take the version back is left out: its node goes on trying."""
    trial = _trial(pipeline, session)
    if trial is None or trial["old"]:
        return False
    begin, counts = f"{pipeline.name}/", (session.planned or {}).get("processes", {})
    planned = {name.removeprefix(begin) for name, count in counts.items() if count and name.startswith(begin)}
    mine = {stage for stage, owner in sources if owner in (session.id, None)}
    failed = {trial["failure"]["stage"]} if trial["failure"] is not None else set()
    return pipeline.state != "running" or (planned | mine) - failed <= set(trial["ready"])


def alarm(pipeline: PipelineState) -> str | None:
    """What people are told of a version that went back, until another one is deployed."""
    rolled = pipeline.rolled
    if rolled is None or rolled["failure"] is None:
        return None
    return (f"{pipeline.name}: version {rolled['version'][:8]} was rolled back, because {_why(rolled)}; version {pipeline.version[:8]} runs on: "
            "correct it and deploy again, or deploy what runs now to end this alarm")


def _why(rolled: Mapping[str, Any]) -> str:
    failure = rolled["failure"]
    return f"{failure['stage']} on {failure['node']} {failure['text']}"


def told(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    """What has become of versions, for the terminal of a node; `before` is None when the node hears of the pipeline first."""
    if before is None:
        return
    rolled = after["rolled"]
    if rolled is not None and rolled != before["rolled"] and rolled["failure"] is not None:
        yield (f"{name}: version {rolled['version'][:8]} is rolled back, because {_why(rolled)}; version {after['version'][:8]} runs on")
    elif after["version"] != before["version"]:
        yield f"{name}: version {after['version'][:8]} runs here now"
