"""A user's `placement(nodes, stages)`: what it is asked, when, and what its answer is worth.

It is asked once for each version, run and set of nodes, and again only when one of them changes; so its answer cannot waver with what
happens to wait in a queue. An answer is checked before it counts. Without one (not yet, failed, wrong) the default plan holds, and after a
failure it is asked again in a minute. The function itself runs elsewhere: this module makes questions and hears outcomes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from p2pcluster import config
from p2pcluster.core.commands import PROCESSES_MAX
from p2pcluster.core.placement import admitted_nodes, allowed_nodes, facts_of

if TYPE_CHECKING:
    from p2pcluster.core.sessions import Session
    from p2pcluster.core.records import PipelineState

_TOLD_CHARS_MAX = 300  # of what a function of the user's gives as its reason


@dataclass(frozen=True, slots=True)
class Question:
    """What a pipeline's function is called with, where it is, and the session of each node by the name that the function knows."""

    pipeline: str
    version: str
    run: int
    nodes: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    sessions: dict[str, str]
    project: dict[str, Any] = field(compare=False)
    zip_sha256: str = field(compare=False)


@dataclass(slots=True)
class _Asked:
    """A question that is out or was answered; `counts` by stage and session are those of the last good answer."""

    question: Question
    counts: dict[str, dict[str, int]]
    alarm: str | None = None
    again_ms: int | None = None


class Planner:
    """The questions of one leader. `look` at every plan; whoever runs the functions takes the questions and brings the answers."""

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}
        self._questions: list[Question] = []

    def look(self, pipelines: Sequence[PipelineState], nodes: Sequence[Session], now_ms: int) -> None:
        """Ask what has to be asked. `pipelines`: those that run."""
        wanted = [pipeline for pipeline in pipelines if pipeline.manifest.get("placement")]
        self._asked = {pipeline.name: self._asked[pipeline.name] for pipeline in wanted if pipeline.name in self._asked}
        for pipeline in wanted:
            question = question_of(pipeline, nodes)
            asked = self._asked.get(pipeline.name)
            is_due = asked is not None and asked.again_ms is not None and now_ms >= asked.again_ms
            if question.nodes and (asked is None or asked.question != question or is_due):
                self._asked[pipeline.name] = _Asked(question, asked.counts if asked else {}, asked.alarm if asked else None)
                self._questions.append(question)

    def take_questions(self) -> list[Question]:
        """What is to be asked now. A later question of a pipeline stands for its former one."""
        questions, self._questions = self._questions, []
        return questions

    def answer(self, question: Question, answer: dict[str, Any], now_ms: int) -> bool:
        """What came of a question: `{"plan": ...}` or `{"error": text}`. Whether the plan may now be another one."""
        asked = self._asked.get(question.pipeline)
        if asked is None or asked.question != question:
            return False  # something changed meanwhile, and the new question is out
        why = answer["error"] if "error" in answer else next(faults(question, answer["plan"]), None)
        if why is None:
            asked.counts, asked.alarm, asked.again_ms = _by_stage(question, answer["plan"]), None, None
            return True
        asked.counts, asked.again_ms = {}, now_ms + int(1000 * config.PLACEMENT_AGAIN_S)
        asked.alarm = (f"{question.pipeline}: its placement is not followed, because {_short(why)}; the processes are placed as without it, "
                       f"and it is asked again after {config.PLACEMENT_AGAIN_S:g} s, or when another version is deployed")
        return True

    def counts(self, pipeline: str, stage: str) -> dict[str, int] | None:
        """By session how many processes of a stage are wanted; None where that is left to the default plan."""
        asked = self._asked.get(pipeline)
        return asked.counts.get(stage) if asked else None

    @property
    def alarms(self) -> list[str]:
        return [asked.alarm for _, asked in sorted(self._asked.items()) if asked.alarm is not None]


def question_of(pipeline: PipelineState, nodes: Sequence[Session]) -> Question:
    """Equal for equal nodes, in whatever order they came. Sources are not in it: `where=` says where they run."""
    admitted = sorted(admitted_nodes(pipeline, nodes), key=lambda session: (session.name, session.node))
    shared = Counter(session.name for session in admitted)
    names = {session.id: session.name if shared[session.name] == 1 else f"{session.name} {session.node}" for session in admitted}
    told = [{**facts_of(session, pipeline), "name": names[session.id], "slots": session.facts.get("slots")} for session in admitted]
    stages = []
    for stage in pipeline.manifest["stages"]:
        if stage["kind"] != "source":
            allowed = allowed_nodes(pipeline, stage, admitted)[0]
            fit = [names[session.id] for session in admitted if allowed is None or session.id in allowed]
            stages.append({**{name: stage[name] for name in ("name", "kind", "processes", "per_node")}, "nodes": fit})
    sessions = {name: session for session, name in names.items()}
    return Question(pipeline.name, pipeline.version, pipeline.run, told, stages, sessions, pipeline.project, pipeline.zip_sha256)


def faults(question: Question, plan: Any) -> Iterator[str]:
    """What is wrong with an answer, each in some words that follow "because"."""
    if not isinstance(plan, dict) or not all(isinstance(counts, dict) for counts in plan.values()):
        yield "it does not return {node: {stage: processes}}"
        return
    stages = {stage["name"]: stage for stage in question.stages}
    for node, counts in plan.items():
        if node not in question.sessions:
            yield f"it names a node {node!r}, and there are {', '.join(question.sessions)}"
            return
        for name, count in counts.items():
            if name not in stages:
                yield f"it names a stage {name!r}, and those that it may place are {', '.join(stages)}"
                return
            yield from _faults_of(stages[name], node, count)
    totals = {name: sum(counts.get(name, 0) for counts in plan.values()) for counts in plan.values() for name in counts}
    for name, total in totals.items():
        if not total:
            yield f"it gives {name} no process anywhere: leave a stage out to have it placed as without it"


def _faults_of(stage: dict[str, Any], node: str, count: Any) -> Iterator[str]:
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= PROCESSES_MAX:
        yield f"{count!r:.50} processes of {stage['name']} on {node} is no number from 0 to {PROCESSES_MAX}"
    elif count and node not in stage["nodes"]:
        yield f"it puts {stage['name']} on {node}, where its where= does not hold"
    elif stage["per_node"] is not None and count > stage["per_node"]:
        yield f"it puts {count} processes of {stage['name']} on {node}, and its per_node= is {stage['per_node']}"


def _by_stage(question: Question, plan: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for node, counts in sorted(plan.items()):
        for stage, count in counts.items():
            if count:
                found.setdefault(stage, {})[question.sessions[node]] = count
    return found


def _short(text: str) -> str:
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return line if len(line) <= _TOLD_CHARS_MAX else line[: _TOLD_CHARS_MAX - 3] + "..."
