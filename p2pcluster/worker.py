"""Inside a stage process: import the project, run one stage over the items that the node hands in, say what became of them.

Two threads: the main one runs user code, the other reads the socket, so that a node that died, or asks for work back, is noticed
while a function runs. Before an item runs, its id goes to a mapped file, which outlives this process: whoever finds the process
dead reads there which item it died with.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import mmap
import operator
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pcluster import config, output, shadows
from p2pcluster.core import context as contexts
from p2pcluster.core.codec import FrameReader, Message, decode, encode, frame
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.stages import Stage
from p2pcluster.errors import ClusterError, ProjectError, WrongUsage
from p2pcluster.runners import SourceRunner, StageRunner, TickRunner, Work, callable_of, entered_in, error_of, source_runner

if TYPE_CHECKING:
    from p2pcluster.together import TaskRunner

POSITION_BYTES = 16  # two u64 in the machine's order: the work's number, the running item's id (0: none)
PROGRESS_S = 0.5  # what a function says of its progress goes on this often at most, and its end always


# ---- the socket


class Channel:
    """The socket to the node. Sending is for any thread; `listen` runs in one of its own."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._reader = FrameReader(config.FRAME_BYTES_MAX)

    def send(self, *messages: Message) -> None:
        parts = [part for message in messages for part in frame(encode(message))]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        with self._lock:
            self._sock.sendall(data)

    def receive(self) -> list[Message]:
        """The next messages; an empty list at the end of the stream."""
        while True:
            data = self._sock.recv(1 << 20)
            if not data:
                return []
            payloads = self._reader.feed(data)
            if payloads:
                return [decode(payload) for payload in payloads]


# ---- the process


class StageProcess:
    """One process from its first message to its end."""

    def __init__(self, channel: Channel, position: memoryview, errors: output.Lines, in_hand: memoryview) -> None:
        """`in_hand` has room for the ids of the items that this process may have in hand together."""
        self._channel = channel
        self._position = position
        self._in_hand = in_hand
        self._errors = errors
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._works: dict[int, Work] = {}
        self._runner: StageRunner | TaskRunner | None = None
        self._source: SourceRunner | None = None
        self._progress_s = 0.0

    def run(self) -> int:
        """The exit code."""
        threading.Thread(target=self._listen, daemon=True).start()
        setup = self._inbox.get()
        try:
            return self._run_role(setup.fields)
        except BaseException as error:  # the user's module, class or source may raise anything: it travels as text
            if not isinstance(error, ClusterError):
                traceback.print_exc()
            self._channel.send(Message("error", {"error": error_of(error)}))
            return 1

    def _listen(self) -> None:
        while messages := self._messages():
            for message in messages:
                self._on_message(message)
        os._exit(1)  # the node is gone: nothing that runs here may go on beside its successor

    def _messages(self) -> list[Message]:
        try:
            return self._channel.receive()
        except OSError:
            return []

    def _on_message(self, message: Message) -> None:
        if message.kind == "work":
            work = Work(message)
            self._works[work.number] = work
            self._inbox.put(message)
        elif message.kind == "recall":
            self._on_recall(message.fields["work"])
        elif message.kind == "part_ack":
            if self._runner is not None:
                self._runner.on_part_ack(message.fields["item"], message.fields["is_kept"])
        elif message.kind == "tick" and isinstance(self._source, TickRunner):
            self._source.on_tick(message.fields["seq"], message.fields["at_ms"])
        elif message.kind == "ack" and self._source is not None:
            self._source.on_ack(message.fields["seq"])
        elif message.kind in ("pause", "resume") and self._source is not None:
            self._source.on_pause(message.kind == "pause")
        else:
            if message.kind == "stop" and self._source is not None:
                self._source.on_stop()
            self._inbox.put(message)

    def _on_recall(self, number: int) -> None:
        work = self._works.get(number)
        if work is None or self._runner is None:
            return
        self._runner.recalls.recall(work, lambda kept: self._channel.send(Message("returned", {"work": number, "kept": kept})))
        self._runner.report()

    def _run_role(self, setup: dict[str, Any]) -> int:
        pipeline = load_pipeline(setup["folder"], setup["project"])
        output.tag_logging(self._errors)
        context = contexts.Context(
            run=setup["run"], queue=None, stage=setup["stage"], node=setup["node"], params=setup["params"],
            out_dir=Path(setup["out_dir"]), log=logging.getLogger(setup["stage"]), on_progress=self._on_progress,
        )
        if setup["role"] == "on_done":
            context.totals = setup.get("totals")
            return self._run_on_done(pipeline, context)
        manifest = pipeline.manifest()
        record = next(entry for entry in manifest["stages"] if entry["name"] == setup["stage"])
        queues = {entry["name"]: entry for entry in manifest["queues"]}
        stage = pipeline.stages[setup["stage"]]
        context.queue = stage.name if record["reads"] is None else record["reads"]
        context.queue = f"{pipeline.name}/{context.queue}"
        if record["concurrency"] > 1:
            return self._run_tasks(record, queues, stage, context)
        with contexts.active(context), callable_of(stage) as function:
            if record["kind"] == "source":
                return self._run_source(record, queues, stage, function, context)
            return self._run_stage(record, queues, stage, function, context)

    def _run_stage(self, record: dict[str, Any], queues: dict[str, dict[str, Any]], stage: Stage[..., Any],
                   function: Callable[..., Any], context: contexts.Context) -> int:
        if record["batch"] is None:
            self._runner = StageRunner(record, queues, function, stage.is_generator, context, self._position, self._channel.send)
        else:
            from p2pcluster.together import BatchRunner

            self._runner = BatchRunner(record, queues, function, stage.is_generator, context, self._position, self._channel.send,
                                       self._in_hand)
        self._channel.send(Message("ready", {}))
        while (message := self._inbox.get()).kind != "stop":
            number = message.fields["work"]
            self._runner.run(self._works[number])
            del self._works[number]
        return 0

    def _run_tasks(self, record: dict[str, Any], queues: dict[str, dict[str, Any]], stage: Stage[..., Any],
                   context: contexts.Context) -> int:
        import asyncio

        from p2pcluster.together import TaskRunner

        with contexts.active(context), asyncio.Runner() as loop_runner, entered_in(stage, loop_runner) as function:
            tasks = self._runner = TaskRunner(record, queues, function, stage.is_generator, context, self._position, self._channel.send,
                                              self._in_hand, loop_runner.get_loop())
            self._channel.send(Message("ready", {}))
            loop_runner.run(tasks.serve(self._inbox, self._works))
        return 0

    def _run_source(self, record: dict[str, Any], queues: dict[str, dict[str, Any]], stage: Stage[..., Any],
                    function: Callable[..., Any], context: contexts.Context) -> int:
        self._source = source_runner(record, queues, function, stage.is_generator, self._channel.send, context)
        self._channel.send(Message("ready", {}))
        message = self._inbox.get()
        if message.kind != "stop":
            self._source.run(message)
        return 0

    def _run_on_done(self, pipeline: Pipeline, context: contexts.Context) -> int:
        self._channel.send(Message("ready", {}))
        with contexts.active(context):
            assert pipeline.on_done is not None, "the manifest says that there is an on_done"
            pipeline.on_done()
        sys.stdout.flush()
        self._channel.send(Message("finished", {}))
        return 0

    def _on_progress(self, fraction: float, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._progress_s < PROGRESS_S and fraction < 1:
            return
        self._progress_s = now_s
        self._channel.send(Message("progress", {"fraction": fraction, "text": text, "total": None}))


def load_pipeline(folder: str, project: dict[str, Any]) -> Pipeline:
    """Import the project's module from `folder` and find its pipeline.

    Raises `WrongUsage` when the file that was named holds no such pipeline, `ProjectError`, or what the module raises.
    """
    paths = [os.path.normpath(os.path.join(folder, path)) for path in project["import_paths"]]
    hidden = shadows.hidden_names(paths)
    sys.path[:0] = paths
    try:
        module = importlib.import_module(project["module"])
    finally:
        if hidden and (text := shadows.wrong_import(hidden, paths, project["module"])) is not None:
            raise ProjectError(text)
    if project["variable"] is not None:
        found = getattr(module, project["variable"], None)
        if not isinstance(found, Pipeline):
            raise WrongUsage(f"{project['module']}.py has no Pipeline called {project['variable']}: name the variable that holds one")
        return found
    pipelines = {name: value for name, value in vars(module).items() if isinstance(value, Pipeline)}
    distinct = {id(value): name for name, value in pipelines.items()}
    if not distinct:
        raise WrongUsage(f"{project['module']}.py has no Pipeline: assign one to a variable, as in pipeline = Pipeline(...)")
    if len(distinct) > 1:
        names = ", ".join(sorted(distinct.values()))
        raise ProjectError(f"{project['module']}.py has {len(distinct)} pipelines ({names}): say which one, {project['module']}.py:NAME")
    return next(iter(pipelines.values()))


def _print_manifest(folder: str, project: dict[str, Any]) -> int:
    """The child that tells a node what a project holds: one JSON line on the real standard output, whatever the module prints."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(signal, "alarm"):
        signal.alarm(2 * config.MANIFEST_S)  # the node may be gone: a module that never comes back must not stay for ever
    try:
        manifest = load_pipeline(folder, project).manifest()
        answer: dict[str, Any] = {"manifest": manifest}
    except ClusterError as error:
        answer = {"error": str(error), "code": error.code, "traceback": None}
    except SyntaxError as error:
        where = f"{os.path.basename(error.filename or '?')}, line {error.lineno}"
        answer = {"error": f"{where}: {error.msg}: correct it and try again", "code": ProjectError.code, "traceback": traceback.format_exc()}
    except BaseException as error:  # the module may raise anything, SystemExit too: it is the answer
        remedy = _import_remedy(error, project) if isinstance(error, ImportError) else "correct it; --verbose shows the traceback"
        answer = {"error": f"importing {project['module']} raised {_raised(error, folder)}: {remedy}", "code": ProjectError.code,
                  "traceback": traceback.format_exc()}
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        out.write(json.dumps(answer) + "\n")
        out.close()
    return 0


def _import_remedy(error: ImportError, project: dict[str, Any]) -> str:
    if "no known parent package" in str(error) and "." not in project["module"]:
        return ("a file that imports from its package with a dot is run by a pyproject.toml in the folder that holds the package: "
                f'pipeline = "PACKAGE.{project["module"]}:VARIABLE" under [tool.p2pcluster]')
    return "correct it, or install what it imports"


def _raised(error: BaseException, folder: str) -> str:
    """What was raised, and where in the project."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(folder)]
    where = f" ({os.path.relpath(frames[-1].filename, folder)}, line {frames[-1].lineno})" if frames else ""
    return f"{error_of(error)['text']}{where}"


def _answer_placement(folder: str, project: dict[str, Any]) -> int:
    """The child that calls a pipeline's placement: the question is a JSON line on standard input, which then stays open as long as the node
    lives; the answer is one on the real standard output, whatever the function prints."""
    out, asker = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), "rb", buffering=0)
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if hasattr(signal, "alarm"):
        signal.alarm(2 * config.PLACEMENT_S)  # the node may be gone, and a function in C may never let the thread below look
    question = json.loads(asker.readline())
    threading.Thread(target=_end_with, args=(asker,), daemon=True).start()
    try:
        placement = load_pipeline(folder, project).placement
        assert placement is not None, "the manifest said that there is one"
        text = _plan_text(placement(question["nodes"], question["stages"]))
    except BaseException as error:  # the user's code may raise anything, SystemExit too: it is the answer
        text = json.dumps({"error": f"it raised {_raised(error, folder)}"})
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        out.write(text + "\n")
        out.close()
    return 0


def _plan_text(returned: Any) -> str:
    try:
        plan = {node: dict(counts) for node, counts in dict(returned).items()}
        text = json.dumps({"plan": plan}, default=operator.index)  # whole numbers of other libraries are numbers too
    except (TypeError, ValueError):
        return json.dumps({"error": f"it returns {returned!r:.80} and not {{node: {{stage: processes}}}}"})
    return text if len(text) < config.PLACEMENT_BYTES_MAX else json.dumps({"error": "what it returns has no end"})


def _end_with(asker: Any) -> None:
    """End when the node does, or as soon as it has heard enough."""
    asker.read()
    os._exit(1)


def main(argv: list[str]) -> int:
    """`manifest` or `placement` FOLDER PROJECT_JSON, or `stage FD POSITION_FILE NAME`: the name is for people who list processes."""
    if argv[0] == "manifest":
        return _print_manifest(argv[1], json.loads(argv[2]))
    if argv[0] == "placement":
        return _answer_placement(argv[1], json.loads(argv[2]))
    for ignored in (signal.SIGINT, getattr(signal, "SIGHUP", None)):
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)  # the node decides what a signal to the terminal's group means
    if hasattr(os, "nice"):
        os.nice(5)  # the node goes first: when it waits, all its processes wait
    errors = output.tag_output(contexts.item_in_hand)
    with open(argv[2], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    sock = socket.socket(fileno=int(argv[1]))
    head, room = memoryview(mapped)[:POSITION_BYTES].cast("Q"), memoryview(mapped)[mapped.find(b"\n", POSITION_BYTES) + 1 :].cast("Q")
    code = StageProcess(Channel(sock), head, errors, room).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of the user's may not keep a process that has been told to stop
