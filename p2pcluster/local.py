"""`run_local`: a whole pipeline in this process, for tests and notebooks.

The core is the cluster's own, leader and executor both, on a log that is kept nowhere and a clock that jumps to whatever is due next, so
that a retry costs no time. Only the shell is different: a "process" is an object here, and runs when its work arrives. Values are encoded
on their way as in earnest. What needs a process of its own cannot be had: `timeout_s` ends nothing, and a function that ends its process
ends this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from p2pcluster.core import context as contexts
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import lengths_of
from p2pcluster.core.executor import Executor, Send, Spec, Start, ToLeader
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.log import Log
from p2pcluster.core.grants import Grant, grant_message
from p2pcluster.core.node import Node, is_over
from p2pcluster.core.sessions import LOCAL_SESSION, Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.stages import At
from p2pcluster.errors import ClusterError, ValueRefused, WrongUsage
from p2pcluster.values import DECODERS
from p2pcluster.runners import SourceRunner, StageRunner, Work, callable_of, entered_in, source_runner

_BATCH = 100  # values that a source puts at a time
_STEP_MS = 10  # the clock's step while nothing happens


@dataclass(frozen=True)
class LocalRun:
    """What a local run gave: `results` by last stage (or queue that no stage reads), `parked` as (stage, value, exception)."""

    results: dict[str, list[Any]] = field(default_factory=dict)
    parked: list[tuple[str, Any, BaseException]] = field(default_factory=list)


def run_local(pipeline: Pipeline, inputs: Any = None, params: Mapping[str, Any] | None = None, limit: int | None = None,
              out_dir: str | os.PathLike[str] | None = None) -> LocalRun:
    """Run `pipeline` to its end here.

    `inputs` replaces what the sources emit: values for the only source, or values by source (or by queue that is fed from outside).
    `limit` bounds the values of each source. `params` go over the pipeline's own. Raises what a source or `on_done` raises; what a stage
    raises parks its item after its deliveries, as in a cluster. Nothing waits: ticks of `every_s` follow each other at once, `rate` is not
    kept, and `max_items` and `parked_share_max` change nothing.
    """
    interrupted = threading.Event()
    if not _is_in_a_loop():
        return _run_here(pipeline, inputs, params, limit, out_dir, interrupted)
    with ThreadPoolExecutor(1) as pool:  # an async stage needs a loop of its own, and a notebook's thread has one that runs
        try:
            return pool.submit(_run_here, pipeline, inputs, params, limit, out_dir, interrupted).result()
        except KeyboardInterrupt:
            interrupted.set()
            raise


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_here(pipeline: Pipeline, inputs: Any, params: Mapping[str, Any] | None, limit: int | None,
              out_dir: str | os.PathLike[str] | None, interrupted: threading.Event) -> LocalRun:
    with contextlib.ExitStack() as stack:
        folder = Path(out_dir) if out_dir is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        merged = {**(pipeline.params or {}), **(params or {})}
        return _Run(pipeline, _inputs(pipeline, inputs), merged, limit, folder, stack, interrupted).to_end()


def _inputs(pipeline: Pipeline, inputs: Any) -> dict[str, Iterable[Any]]:
    names = [stage.name for stage in pipeline.stages.values() if stage.kind == "source"]
    names += [queue["name"] for queue in pipeline.manifest()["queues"] if queue["outside"]]
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        if len(names) != 1:
            raise WrongUsage(f"inputs= is a list and pipeline {pipeline.name!r} has {', '.join(names)}: give a dict of lists by name")
        return {names[0]: inputs}
    unknown = set(inputs) - set(names)
    if unknown:
        raise WrongUsage(f"inputs= names {sorted(unknown)[0]!r}, and pipeline {pipeline.name!r} has {', '.join(names)}")
    return dict(inputs)


class _Remembering(StageRunner):
    """Takes a note of what a function raised: the executor only hears text."""

    failures: dict[tuple[str, int], BaseException]
    waits_for_parts = False  # whoever would answer waits for this

    def _has_raised(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise error  # whoever runs it here wants it to stop

    def _report_failure(self, work: Work, error: BaseException) -> None:
        assert self._context.queue is not None and self._context.item_id is not None, "a stage runs an item"
        self.failures[(self._context.queue, self._context.item_id)] = error
        super()._report_failure(work, error)


class _Stage:
    """A stage "process": its runner, which runs what it is given at once."""

    def __init__(self, run: _Run, key: int, spec: Spec) -> None:
        record = run.records[spec.stage]
        stage = run.pipeline.stages[spec.stage]
        self._context = run.context(spec.stage, f"{run.pipeline.name}/{record['reads']}")
        with contexts.active(self._context):
            function = run.stack.enter_context(callable_of(stage))
        self._runner = self._made(run, record)(record, run.queues, function, stage.is_generator, self._context, _room(2),
                                               lambda message: run.hear(key, message))
        self._runner.failures = run.failures

    @staticmethod
    def _made(run: _Run, record: dict[str, Any]) -> Callable[..., Any]:
        if record["batch"] is None:
            return _Remembering
        from p2pcluster.together import BatchRunner

        class Batches(_Remembering, BatchRunner):
            """Both."""

        made: Any = Batches
        return lambda *arguments: made(*arguments, _room(record["batch"]))

    def on_message(self, message: Message) -> None:
        if message.kind == "work":
            with contexts.active(self._context):
                self._runner.run(Work(message))


class _Tasks:
    """A "process" of a stage with several items in hand: all of these share one loop, which runs while nothing else moves."""

    def __init__(self, run: _Run, key: int, spec: Spec) -> None:
        from p2pcluster.together import TaskRunner

        record = run.records[spec.stage]
        stage = run.pipeline.stages[spec.stage]
        context = run.context(spec.stage, f"{run.pipeline.name}/{record['reads']}")

        class Tasks(TaskRunner):
            waits_for_parts = False

            def say(self, message: Message) -> None:
                run.hear(key, message)

            def failed(self, work: Work, item_id: int, error: BaseException, elapsed_us: float) -> None:
                if isinstance(error, KeyboardInterrupt):
                    task = asyncio.current_task()
                    assert task is not None, "an item fails in its task"
                    task.add_done_callback(lambda ended: ended.exception())  # it comes up through the loop, and nobody asks the task
                    raise error
                run.failures[(f"{run.pipeline.name}/{record['reads']}", item_id)] = error
                super().failed(work, item_id, error, elapsed_us)

        loop_runner = run.loop_runner()
        with contexts.active(context):
            function = run.stack.enter_context(entered_in(stage, loop_runner))
        self.runner = Tasks(record, run.queues, function, stage.is_generator, context, _room(2),
                            lambda message: run.hear(key, message),
                            _room(record["concurrency"] * (record["batch"] or 1)), loop_runner.get_loop())

    def on_message(self, message: Message) -> None:
        if message.kind == "work":
            self.runner.begin(Work(message))


async def _wait_for_one(tasks: list[asyncio.Task[None]]) -> None:
    """Until one of them has ended, or for a step of the clock: what one waits for may come from a stage that waits for that."""
    await asyncio.wait(tasks, timeout=_STEP_MS / 1000, return_when=asyncio.FIRST_COMPLETED)


def _room(count: int) -> memoryview:
    return memoryview(bytearray(8 * count)).cast("Q")


class _Source:
    """A source "process": puts a batch, waits for its acknowledgement, puts the next."""

    def __init__(self, run: _Run, key: int, spec: Spec) -> None:
        self._say = lambda message: run.hear(key, message)
        record = run.records[spec.stage]
        self._name, self._run, self._shard = spec.stage, run, spec.shard
        self._context = run.context(spec.stage, None)
        self._values: Iterator[Any] | None = None
        stage = run.pipeline.stages[spec.stage]
        with contexts.active(self._context):
            function = run.stack.enter_context(callable_of(stage))
        self._runner = source_runner(record, run.queues, function, stage.is_generator, self._say, self._context)

    def on_message(self, message: Message) -> None:
        with contexts.active(self._context):
            if message.kind == "begin":
                self._values = self._begin()
                self._next()
            elif message.kind == "ack" and self._values is not None:
                self._runner.on_ack(message.fields["seq"])
                self._next()

    def _begin(self) -> Iterator[Any]:
        given = self._run.inputs.get(self._name)
        if given is not None:
            values = iter(given if self._shard == 0 else ())
        else:
            values = (value.value if isinstance(value, At) else value for value in self._runner.values(self._shard))
        return itertools.islice(values, self._run.limit)

    def _next(self) -> None:
        assert self._values is not None, "a source begins once"
        batch = list(itertools.islice(self._values, _BATCH))
        self._runner.put_values(batch, finished=len(batch) < _BATCH)
        if len(batch) < _BATCH:
            self._values = None


class _Run:
    """One local run: the two halves of the core, and objects in the place of processes."""

    def __init__(self, pipeline: Pipeline, inputs: dict[str, Iterable[Any]], params: dict[str, Any], limit: int | None, out_dir: Path,
                 stack: contextlib.ExitStack, interrupted: threading.Event) -> None:
        self._interrupted = interrupted  # by Ctrl-C, which only the main thread hears of
        self.pipeline = pipeline
        self.inputs = inputs
        self.params = params
        self.limit = limit
        self.out_dir = out_dir
        self.stack = stack
        self.manifest = pipeline.manifest()
        for record in self.manifest["stages"]:
            record["where"] = None  # rules are about a cluster's nodes, and here is none
            record["rate"] = None  # what it spares is elsewhere, and here the clock jumps
            record["max_items"] = record["parked_share_max"] = None  # here no process is replaced, and nobody lets a stage go on
        for record in self.manifest["queues"]:
            if record["read_by"] is None:  # whoever takes from it in a cluster is not here
                record["maxsize"] = record["bytes_max"] = None
        self.records = {record["name"]: record for record in self.manifest["stages"]}
        self.queues = {record["name"]: record for record in self.manifest["queues"]}
        self.failures: dict[tuple[str, int], BaseException] = {}
        self._now_ms = 0
        self._heard: deque[tuple[int, Message]] = deque()
        self._processes: dict[int, Any] = {}
        self._loop_runner: asyncio.Runner | None = None
        self._is_answered = False
        self._node = Node("local", Random(0), HardState(), Log(), State(), Configuration(("local",)), 0, 0)
        self._executor = Executor("local")

    def loop_runner(self) -> asyncio.Runner:
        """The loop of all stages with several items in hand."""
        if self._loop_runner is None:
            self._loop_runner = self.stack.enter_context(asyncio.Runner())
        return self._loop_runner

    def context(self, stage: str, queue: str | None) -> contexts.Context:
        return contexts.Context(run=1, queue=queue, stage=stage, node="local", params=self.params, out_dir=self.out_dir,
                                log=logging.getLogger(stage), on_progress=lambda fraction, text: None)

    def hear(self, key: int, message: Message) -> None:
        if self._interrupted.is_set():
            raise KeyboardInterrupt
        self._heard.append((key, message))

    def to_end(self) -> LocalRun:
        while not self._node.is_serving:
            self._tick()
        self._node.open_session(Session(LOCAL_SESSION, "node", "local", "boot", "local", {"slots": 1}))
        self._node.open_session(Session("user", "client", "user", "boot", "user"))
        self._executor.on_new_leader({}, self._now_ms)
        self._pump()
        self._start()
        while not is_over(self._node.state.pipelines[self.pipeline.name]):
            self._tick()
        return LocalRun(self._results(), self._parked())

    def _start(self) -> None:
        name = self.pipeline.name
        self._ask(Message("bundle_part", {"version": "local", "part": 0, "parts": 1}, (b"",)))
        self._ask(Message("deploy", {"pipeline": name, "version": "local", "origin": {"node": "local"}, "manifest": self.manifest, "files": {},
                                     "zip_sha256": "", "project": {}}))
        self._ask(Message("start_run", {"pipeline": name, "params": self.params}))
        for queue in self.manifest["queues"]:
            if queue["outside"]:
                self._feed(queue)

    def _feed(self, queue: dict[str, Any]) -> None:
        """Put what `inputs` has for a queue that is fed from outside, and close it."""
        runner = SourceRunner({"name": queue["name"], "ports": [{"label": None, "queues": [queue["name"]]}], "resumable": False,
                               "sharded": False, "processes": 1, "rate": None, "max_items": None}, self.queues, lambda arguments: (), False,
                              lambda message: self._put_from_outside(queue["name"], message))
        values = iter(self.inputs.get(queue["name"], ()))
        while batch := list(itertools.islice(values, _BATCH)):
            runner.put_values(batch, finished=False)
        self._ask(Message("close", {"pipeline": self.pipeline.name, "name": queue["name"]}))

    def _put_from_outside(self, queue: str, message: Message) -> None:
        ports = [{"queues": [f"{self.pipeline.name}/{queue}"]}]
        producer = [f"client:{queue}", 1, message.fields["seq"]]
        self._ask(Message("put", {"producer": producer, "ports": ports, "source": None}, message.blobs))

    def _ask(self, message: Message) -> None:
        self._is_answered = False
        self._node.step("user", message._replace(fields={**message.fields, "req": 1}), self._now_ms)
        self._pump()
        while not self._is_answered:  # a put waits for room
            self._tick()

    def _tick(self) -> None:
        self._now_ms += _STEP_MS
        self._node.tick(self._now_ms)
        self._executor.tick(self._now_ms, {})
        self._pump()
        if tasks := [task for process in self._processes.values() if isinstance(process, _Tasks) for task in process.runner.tasks]:
            self.loop_runner().run(_wait_for_one(tasks))
            self._pump()

    def _pump(self) -> None:
        """Carry everything until nothing moves."""
        while self._carry_heard() | self._carry_actions() | self._carry_outbox() | self._commit():
            pass

    def _carry_heard(self) -> bool:
        moved = bool(self._heard)
        while self._heard:
            key, message = self._heard.popleft()
            if key in self._executor.processes:
                self._executor.on_message(key, message, self._now_ms)
        return moved

    def _carry_actions(self) -> bool:
        actions = self._executor.take_actions()
        for action in actions:
            if isinstance(action, ToLeader):
                self._node.step(LOCAL_SESSION, action.message, self._now_ms)
            elif isinstance(action, Start):
                self._start_process(action.key, action.spec, action.totals)
            elif isinstance(action, Send):
                self._send(action.key, action.message)
        return bool(actions)

    def _start_process(self, key: int, spec: Spec, totals: dict[str, Any] | None) -> None:
        if spec.role == "on_done":
            assert self.pipeline.on_done is not None, "the manifest says that there is an on_done"
            context = self.context("on_done", None)
            context.totals = totals
            with contexts.active(context):
                self.pipeline.on_done()
            self.hear(key, Message("ready", {}))
            self.hear(key, Message("finished", {}))
            self._carry_heard()
            self._executor.on_exit(key, "ended", 0, [], self._now_ms)
            return
        tasks = spec.role == "stage" and self.records[spec.stage]["concurrency"] > 1
        self._processes[key] = (_Source if spec.role == "source" else _Tasks if tasks else _Stage)(self, key, spec)
        self.hear(key, Message("ready", {}))

    def _send(self, key: int, message: Message) -> None:
        if message.kind == "stop":
            self._processes.pop(key, None)
            self._executor.on_exit(key, "ended", 0, [], self._now_ms)
        elif key in self._processes:
            self._processes[key].on_message(message)

    def _carry_outbox(self) -> bool:
        sent = self._node.take_outbox()
        for session, item in sent:
            message = grant_message(item, [chunk.slice(lo, hi) for chunk, lo, hi in item.pieces]) if isinstance(item, Grant) else item
            if session == LOCAL_SESSION:
                self._executor.on_leader(message, self._now_ms)
            elif message.fields.get("result") != "refused":
                self._is_answered = True
            else:
                raise ClusterError(f"{message.fields['kind']} was refused ({message.fields.get('code')})")
        return bool(sent)

    def _commit(self) -> bool:
        if not self._node.has_ready():
            return False
        self._node.advance(self._node.ready())
        return True

    # ---- what came of it

    def _results(self) -> dict[str, list[Any]]:
        results = {}
        for record in self.manifest["queues"]:
            if record["read_by"] is None:
                name = record["name"].removesuffix(".results") if record["results"] else record["name"]
                results[name] = [value for _, value in self._values(record["name"], None)]
        return results

    def _parked(self) -> list[tuple[str, Any, BaseException]]:
        parked = []
        for record in self.manifest["queues"]:
            full = f"{self.pipeline.name}/{record['name']}"
            ids = self._node.state.queues[full].parked
            for item_id, value in self._values(record["name"], set(ids)):
                kind, text = ids[item_id].error["type"], ids[item_id].error["text"]
                refused = ValueRefused(text.removeprefix("ValueRefused: ")) if kind == "ValueRefused" else ClusterError(text)
                why = self.failures.get((full, item_id)) or refused
                parked.append((record["read_by"], value, why))
        return parked

    def _values(self, queue: str, ids: set[int] | None) -> Iterator[tuple[int, Any]]:
        """The values of the open items, or of the items `ids`."""
        state = self._node.state.queues[f"{self.pipeline.name}/{queue}"]
        decode_value = DECODERS[self.queues[queue]["codec"]]
        wanted = state.open_ranges(1, state.next_id) if ids is None and state.next_id > 1 else [(i, i + 1) for i in sorted(ids or ())]
        for lo, hi in wanted:
            for chunk in state.chunks.overlap(lo, hi):
                a, b = max(lo, chunk.first), min(hi, chunk.end)
                lengths, body = chunk.slice(a, b)
                start = 0
                for item_id, size in zip(range(a, b), lengths_of(lengths), strict=True):
                    yield item_id, decode_value(bytes(body[start : start + size]))
                    start += size
