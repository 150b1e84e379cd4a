"""What a pipeline is: flows that keep the rules, and the manifest that a node runs.

This file alone decides which graphs are pipelines, how queues are named, which edges close a cycle and what a manifest
says. It refuses to know how anything runs. A node reads the manifest, never these objects: they live in the processes
that import the project.

The rules, each checked when the `Pipeline` is made:
- a stage reads one queue, and a queue is read by one stage at most; sources read none, sinks feed none;
- a stage without a successor feeds `<stage>.results`;
- every stage can be reached from a source, or from a queue that is fed from outside;
- each cycle holds an unbounded queue, because a ring of full queues could never move again.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from p2pcluster import config
from p2pcluster.core.options import Options, call_site, check_name
from p2pcluster.core.stages import Edge, Flow, Joinable, Node, Queue, Stage, as_flow, distinct, who
from p2pcluster.errors import GraphError, WrongUsage
from p2pcluster.shadows import PythonsFirst, put_pythons_first

MANIFEST_FORMAT = 1
RESULTS_SUFFIX = ".results"


class _Graph:
    """The flows of one pipeline put together: who reads which queue, who feeds it, which edges close a cycle.

    Made in the order in which the rules build on each other; a step that finds one broken raises `GraphError`.
    `targets[stage][label]` are the queues of a port, in the order of the flows. Everything is by name.
    """

    def __init__(self, flows: Sequence[Flow[..., Any]]) -> None:
        self.edges = distinct(edge for flow in flows for edge in flow.edges)
        nodes = distinct(node for flow in flows for node in (*flow.heads, *_ends(flow.edges)))
        self.stages = self._named_once(node for node in nodes if isinstance(node, Stage))
        self.queues = self._named_once(node for node in nodes if isinstance(node, Queue))
        self._check_ends()
        self.reads = self._readings()
        self.reader = {queue: stage for stage, queue in self.reads.items()}
        self.results: set[str] = set()
        self.targets = {name: self._ports(stage) for name, stage in self.stages.items()}
        self.fed_by = self._feeders()
        self._check_inputs()
        reached = self._stages_in_reach()
        self.back_edges = self._closing_edges(reached)
        self.order = self._topological_order()

    @staticmethod
    def _named_once(nodes: Iterable[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for node in nodes:
            other = found.setdefault(node.name, node)
            if other is not node:
                remedy = "with one setting" if isinstance(node, Queue) else "or rename one with `.named(...)`"
                raise GraphError(f"{who(node)}: is not the {who(other)} of the same name; use one of them {remedy}")
        return found

    def _check_ends(self) -> None:
        for before, _, after in self.edges:
            if isinstance(after, Stage) and after.kind == "source":
                raise GraphError(f"{who(after)}: a source cannot stand behind {who(before)}; make it a stage")
            if isinstance(before, Stage) and before.kind == "sink":
                raise GraphError(f"{who(before)}: a sink cannot stand before {who(after)}; make it a stage")
            if isinstance(before, Queue) and isinstance(after, Queue):
                raise GraphError(f"{who(after)}: stands right behind {who(before)}; put a stage between them")

    def _readings(self) -> dict[str, str]:
        """The queue of each stage: the one that stands before it, else its own; its own is added here."""
        reads: dict[str, str] = {}
        reader: dict[str, str] = {}
        for before, _, after in self.edges:
            if not isinstance(before, Queue):
                continue
            stage = self.stages[after.name]
            if reads.setdefault(stage.name, before.name) != before.name:
                raise GraphError(
                    f"{who(stage)}: reads queue {reads[stage.name]!r} and queue {before.name!r}; put one before it and "
                    "feed that from both sides"
                )
            if reader.setdefault(before.name, stage.name) != stage.name:
                raise GraphError(
                    f"{who(stage)}: queue {before.name!r} is read by {who(self.stages[reader[before.name]])} too; "
                    "give each its own queue"
                )
        for name in self.queues:
            if name in self.stages and reads.get(name) != name:
                raise GraphError(
                    f"{who(self.queues[name])}: {who(self.stages[name])} has its name and does not read it; rename one"
                )
        for name, stage in self.stages.items():
            if stage.kind != "source" and name not in reads:
                reads[name] = name
                self.queues[name] = Queue(name)
        return reads

    def _ports(self, stage: Stage[..., Any]) -> dict[str | None, list[str]]:
        """Where a stage's values go. An unlabelled successor beside routes gets what any route gets."""
        ports: dict[str | None, list[str]] = {}
        for before, label, after in self.edges:
            if before is stage:
                ports.setdefault(label, []).append(after.name if isinstance(after, Queue) else self.reads[after.name])
        every = ports.pop(None, []) if len(ports) > 1 else []
        if not ports and stage.kind == "stage":
            ports[None] = [self._add_results(stage)]
        return {label: list(distinct(queues + every)) for label, queues in ports.items()}

    def _add_results(self, stage: Stage[..., Any]) -> str:
        name = stage.name + RESULTS_SUFFIX
        taken = self.queues.get(name)
        if taken is not None:
            raise GraphError(f"{who(taken)}: is the name of what {who(stage)} returns; rename it")
        self.queues[name] = Queue(name, maxsize=None)
        self.results.add(name)
        return name

    def _feeders(self) -> dict[str, list[str]]:
        fed_by: dict[str, list[str]] = {queue: [] for queue in self.queues}
        for stage, ports in self.targets.items():
            for queue in distinct(queue for queues in ports.values() for queue in queues):
                fed_by[queue].append(stage)
        return fed_by

    def _check_inputs(self) -> None:
        for name, stage in self.stages.items():
            if stage.kind == "source" and not self.targets[name]:
                raise GraphError(f"{who(stage)}: leads nowhere; put a stage, a sink or a Queue behind it")
        explicit = {node.name for edge in self.edges for node in (edge.before, edge.after) if isinstance(node, Queue)}
        for name, queue in self.queues.items():
            if self.fed_by[name] or (name in explicit and name in self.reader):
                continue
            if name in self.reader:
                raise GraphError(
                    f"{who(self.stages[self.reader[name]])}: has no input; put a source before it, or "
                    f'Queue("{name}") for a queue that is fed from outside'
                )
            raise GraphError(f"{who(queue)}: stands alone; put a stage before or behind it")

    def _after(self, stage: str) -> Iterator[tuple[str, str]]:
        """The stages right behind one, each with the queue between, in the order of the flows."""
        for queue in distinct(queue for queues in self.targets[stage].values() for queue in queues):
            if queue in self.reader:
                yield queue, self.reader[queue]

    def _stages_in_reach(self) -> list[str]:
        """Every stage, nearest to an input first. Raises for those that no item can reach."""
        reached = [name for name in self.stages if name not in self.reads or not self.fed_by[self.reads[name]]]
        for name in reached:  # grows while it is walked
            reached.extend(distinct(after for _, after in self._after(name) if after not in reached))
        for name, stage in self.stages.items():
            if name not in reached:
                raise GraphError(
                    f"{who(stage)}: no item can get there, because only its own successors feed it; "
                    "lead a source or a queue that is fed from outside into the cycle"
                )
        return reached

    def _closing_edges(self, reached: Sequence[str]) -> list[tuple[str, str]]:
        """The edges (stage, queue) that close a cycle; all of them lead into unbounded queues.

        Edges into bounded queues are laid first and must not close one. Those into unbounded ones follow, nearest to an
        input first, so that of a ring of them the way forward is kept and the way back is what closes it.
        """
        edges = [(stage, queue, after) for stage in reached for queue, after in self._after(stage)]
        edges.sort(key=lambda edge: self.queues[edge[1]].maxsize is None)
        laid: dict[str, list[str]] = {stage: [] for stage in reached}
        closing: list[tuple[str, str]] = []
        for stage, queue, after in edges:
            ring = _path(laid, after, stage)
            if ring is None:
                laid[stage].append(after)
            elif self.queues[queue].maxsize is None:
                closing.append((stage, queue))
            else:
                raise GraphError(
                    f"{who(self.stages[stage])}: closes the cycle {' >> '.join([*ring, after])}, which stops "
                    f'for good when it is full; put Queue("...", maxsize=None) before {after!r}'
                )
        return closing

    def _topological_order(self) -> list[str]:
        """Each stage behind all that feed it, closing edges left out; of several the one that was written first."""
        waits_for = {
            name: {stage for stage in self.fed_by.get(self.reads.get(name, ""), ()) if not self._closes(stage, name)}
            for name in self.stages
        }
        order: list[str] = []
        while waits_for:
            name = next(name for name, feeders in waits_for.items() if feeders.issubset(order))
            order.append(name)
            del waits_for[name]
        return order

    def _closes(self, stage: str, reader: str) -> bool:
        return (stage, self.reads[reader]) in self.back_edges


def _ends(edges: Iterable[Edge]) -> Iterator[Node]:
    for before, _, after in edges:
        yield before
        yield after


def _path(successors: Mapping[str, Sequence[str]], start: str, goal: str) -> list[str] | None:
    """A way from `start` to `goal`, both included; None if there is none."""
    came_from: dict[str, str | None] = {start: None}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name == goal:
            path = [name]
            while (before := came_from[path[0]]) is not None:
                path.insert(0, before)
            return path
        for after in successors[name]:
            if after not in came_from:
                came_from[after] = name
                waiting.append(after)
    return None


# The pipeline and its manifest.


class Pipeline:
    """Flows under a name, checked. `stages` and `queues` by their names; `manifest()` for nodes.

    `params` is a JSON object that `current().params` gives to every stage. `placement(nodes, stages)` and `on_done()`
    are called in processes that import the project, never by a node. Raises `GraphError`.
    """

    def __init__(
        self,
        name: str,
        *flows: Joinable[..., Any],
        params: Mapping[str, Any] | None = None,
        placement: Callable[[Any, Any], Mapping[str, Mapping[str, int]]] | None = None,
        on_done: Callable[[], object] | None = None,
    ) -> None:
        self.name = name
        self.defined_at = call_site().at
        check_name("pipeline", name, self.defined_at)
        blame = f"pipeline {name!r} ({self.defined_at})"
        if not flows:
            raise GraphError(f"{blame}: has no flows; give it at least one `source >> stage`")
        self.params = _checked_params(blame, params)
        self.placement = _checked_function(blame, "placement(nodes, stages)", placement, 2)
        self.on_done = _checked_function(blame, "on_done()", on_done, 0)
        self._graph = _Graph([as_flow(flow) for flow in flows])
        self.stages: dict[str, Stage[..., Any]] = self._graph.stages
        self.queues: dict[str, Queue] = self._graph.queues
        for queue in self.queues.values():
            if len(f"{name}/{queue.name}".encode()) > config.QUEUE_NAME_BYTES_MAX:
                raise GraphError(
                    f"{who(queue)}: over {config.QUEUE_NAME_BYTES_MAX} bytes with the name of {blame}; shorten one"
                )

    def __repr__(self) -> str:
        return f"<pipeline {self.name!r} ({self.defined_at})>"

    def manifest(self) -> dict[str, Any]:
        """All that a node has to know of this pipeline, as plain JSON; the caller's to keep."""
        return {
            "format": MANIFEST_FORMAT,
            "pipeline": self.name,
            "stages": [self._stage_entry(stage) for stage in self.stages.values()],
            "queues": [self._queue_entry(queue) for queue in self.queues.values()],
            "back_edges": [list(edge) for edge in self._graph.back_edges],
            "order": list(self._graph.order),
            "params": copy.deepcopy(self.params),
            "placement": self.placement is not None,
            "on_done": self.on_done is not None,
        }

    def _stage_entry(self, stage: Stage[..., Any]) -> dict[str, Any]:
        ports = self._graph.targets[stage.name]
        return {
            "name": stage.name,
            "kind": stage.kind,
            "reads": self._graph.reads.get(stage.name),
            "ports": [{"label": label, "queues": same} for label, queues in ports.items() for same in self._by_codec(queues)],
            "shape": stage.shape,
            **{option.name: getattr(stage.options, option.name) for option in fields(Options)},
            "resumable": stage.resumable,
            "sharded": stage.sharded,
            "defined_at": stage.defined_at,
        }

    def _by_codec(self, queues: Sequence[str]) -> list[list[str]]:
        """The queues of a port, together those that take the same bytes."""
        codecs = distinct(self.queues[name].codec for name in queues)
        return [[name for name in queues if self.queues[name].codec == codec] for codec in codecs]

    def _queue_entry(self, queue: Queue) -> dict[str, Any]:
        feeders = self._graph.fed_by[queue.name]
        return {
            "name": queue.name,
            "maxsize": queue.maxsize,
            "bytes_max": queue.bytes_max,
            "codec": queue.codec,
            "read_by": self._graph.reader.get(queue.name),
            "fed_by": list(feeders),
            "outside": not feeders,
            "results": queue.name in self._graph.results,
        }

    # These two reach up to the faces: they are the way there from a pipeline.py, and the import waits for the call.

    def main(self) -> None:
        """Run this file as `python -m p2pcluster run FILE --until-done` would, with this program's arguments; exits."""
        import __main__

        try:
            put_pythons_first()
            from p2pcluster.cli import main

            file = getattr(__main__, "__file__", None)
            caller = call_site()
            if file is None and caller.module != "__main__" and sys._getframe(1).f_code.co_name == "<module>":
                raise WrongUsage(f'{caller.at} calls main() when it is imported, as it is in each process of a run: write if __name__ == "__main__": '
                                 "before it")
            if file is None:
                raise WrongUsage("main() runs the file that was started, and there is none here; call run_local() instead")
            code = main(["run", file, "--until-done", *sys.argv[1:]])
        except KeyboardInterrupt:  # while it is still loading
            code = 130
        raise SystemExit(code)

    def run_local(
        self,
        inputs: Any = None,
        params: Mapping[str, Any] | None = None,
        limit: int | None = None,
        out_dir: Any = None,
    ) -> Any:
        """Run to the end in this process, without a cluster; see `p2pcluster.local.run_local`."""
        with PythonsFirst():
            from p2pcluster.local import run_local

        return run_local(self, inputs=inputs, params=params, limit=limit, out_dir=out_dir)


def _checked_params(who: str, params: Any) -> dict[str, Any] | None:
    if params is None:
        return None
    try:
        plain = json.loads(json.dumps(params, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise GraphError(f"{who}: params are not JSON ({error}); use dict, list, str, numbers, bool and None") from None
    if not isinstance(plain, dict):
        raise GraphError(f"{who}: params={params!r} is not a dict; give each parameter a name")
    return plain


def _checked_function(who: str, called: str, function: Any, count: int) -> Any:
    if function is None:
        return None
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        raise GraphError(f"{who}: {function!r} cannot be called as {called}; correct its arguments") from None
    return function
