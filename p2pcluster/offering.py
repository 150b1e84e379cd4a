"""What a node brings to its cluster: a project is packed, compared with what is deployed, shipped, and its run begun and watched.

Decided here: when a version replaces another, and what people are told. The node asks its leader, whoever that is, by messages whose answers come
later; a new leader is asked again from the start, except that a run that was found or begun is never begun twice.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pcluster import bundle, config, process
from p2pcluster.core import pythons
from p2pcluster.core.codec import Message
from p2pcluster.errors import ProjectError

Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Offer:
    """What was asked on the command line. `project` is None for a pair of hands, which says `without`."""

    project: bundle.Project | None = None
    until_done: bool = False
    again: bool = False
    params: dict[str, Any] | None = None
    without: str = "no project here: this node works for the cluster's pipelines; to bring one, run it where a pipeline.py is"


@dataclass(frozen=True, slots=True)
class RunEnd:
    """A watched run is over."""

    text: str
    exit_code: int


class Offering:
    """One node's offer. `ask` sends a message to the leader and calls back with the reply; `out` is for people."""

    def __init__(self, offer: Offer, origin: dict[str, Any], bundles: Path, verbose: bool, ask: Callable[[Message, Callable[[Reply], None]], None],
                 out: Callable[[str], None]) -> None:
        self.offer = offer
        self.watched: tuple[str, int] | None = None
        self._origin = origin
        self._bundles = bundles
        self._verbose = verbose
        self._ask = ask
        self._out = out
        self._is_planned = False  # whether the leader's plan has the watched pipeline
        self.is_asking = False  # set back by the loop when somebody else leads, for nobody answers any more
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._packed: bundle.Bundle | None = None
        self._record: dict[str, Any] = {}
        self._manifest: dict[str, Any] = {}

    def prepare_beside(self, wake: Callable[[], None]) -> None:
        """`prepare` in a thread, so that the node finds others meanwhile; what it raises, `begin` raises."""
        self._thread = threading.Thread(target=self._prepare_and_wake, args=(wake,), daemon=True)
        self._thread.start()

    def _prepare_and_wake(self, wake: Callable[[], None]) -> None:
        try:
            self.prepare()
        except BaseException as error:  # it belongs to the loop, which raises it again
            self._error = error
        wake()

    def prepare(self) -> None:
        """Pack the project and learn what it holds, from a child process. Raises `ProjectError`, `BundleRejected`."""
        project = self.offer.project
        if project is None:
            self._out(self.offer.without)
            return
        self._packed = pack_project(project)
        for note in self._packed.notes:
            self._out(note)
        folder = self._bundles / self._packed.version
        bundle.unpack(self._packed.zip_bytes, self._packed.zip_sha256, folder)
        self._record = project_record(project)
        answer = process.read_manifest(folder, self._record)
        if "error" in answer:
            if answer["traceback"] and self._verbose:
                self._out(answer["traceback"])
            raise process.refusal(answer)
        self._manifest = answer["manifest"]

    def begin(self) -> None:
        """Somebody leads: see what is deployed there, once the project is packed. For every turn of the loop."""
        if self._thread is None or self._thread.is_alive():
            return
        if self._error is not None:
            raise self._error
        if self._manifest and self.watched is None and not self.is_asking:
            self.is_asking = True
            self._ask(Message("project", {"pipeline": self._manifest["pipeline"]}), lambda reply: self._compare(reply["project"]))

    def _compare(self, deployed: dict[str, Any] | None) -> None:
        assert self._packed is not None, "a project was packed"
        name = self._manifest["pipeline"]
        if deployed is None:
            self._deploy()
        elif deployed["version"] == self._packed.version and self._is_settled(deployed):
            self._begin_run(deployed["run"], deployed["state"])
        elif deployed["version"] != self._packed.version and deployed["origin"] != self._origin:
            self._out(f"{name}: another version is deployed, from {deployed['origin'].get('folder')} on {deployed['origin'].get('name')}; this "
                      "node works for that one. To replace it: python -m p2pcluster deploy")
            self._begin_run(deployed["run"], deployed["state"])
        elif deployed["version"] != self._packed.version and _was_rolled_back(deployed, self._packed.version):
            self._out(f"{name}: version {self._packed.version[:8]}, which is in this folder, did not start before and was rolled back; "
                      f"version {deployed['version'][:8]} runs on. Correct it, or try it again with python -m p2pcluster deploy")
            self._begin_run(deployed["run"], deployed["state"])
        else:
            changed = changes(deployed, self._packed, self._record)
            self._out(f"{name}: version {self._packed.version[:8]} replaces {deployed['version'][:8]}: {_listed(changed)}")
            self._deploy()

    def _is_settled(self, deployed: dict[str, Any]) -> bool:
        """Whether there is nothing to deploy about the same files. Which Pythons they run on is the origin's to say: two machines that
        hold them and differ in their Python would else replace each other's deployment in turn."""
        same = {**deployed["project"], "python": None} == {**self._record, "python": None}
        return deployed["project"] == self._record or (same and deployed["origin"] != self._origin)

    def _deploy(self) -> None:
        assert self._packed is not None, "a project was packed"
        for message in deploy_messages(self._packed, self._manifest, self._record, self._origin):
            self._ask(message, self._on_deployed if message.kind == "deploy" else _heard)

    def _on_deployed(self, reply: Reply) -> None:
        if reply["result"] == "ok":
            self._begin_run(reply["run"], reply["state"])
        else:  # somebody's deployment came between and its parts are gone, or this cluster goes over into another: all is asked again
            self.is_asking = False

    def _begin_run(self, run: int, state: str) -> None:
        name = self._manifest["pipeline"]
        if state == "running":
            self.watched = (name, run)
            self._out(f"{name}: run {run} goes on")
            if self.offer.params:
                self._out(f"{name}: --set is for a new run; run {run} keeps the parameters that it was started with")
        elif state == "done" and not self.offer.again:
            self.watched = (name, run)
            self._out(f"{name}: run {run} is done; --again starts the next one")
        else:
            params = {**(self._manifest["params"] or {}), **(self.offer.params or {})}
            self._ask(Message("start_run", {"pipeline": name, "params": params}), self._on_run_started)

    def _on_run_started(self, reply: Reply) -> None:
        name = self._manifest["pipeline"]
        if "run" not in reply:
            self.is_asking = False
            return
        self.watched = (name, reply["run"])
        self._out(f"{name}: run {reply['run']} {'starts' if reply['result'] == 'ok' else 'goes on'}")

    def ended(self, pipelines: dict[str, dict[str, Any]]) -> RunEnd | None:
        """Whether the watched run is over, by the leader's last plan."""
        if self.watched is None:
            return None
        name, run = self.watched
        pipeline = pipelines.get(name)
        if pipeline is None:
            return self._undeployed(name, run)
        self._is_planned = True
        if not self.offer.until_done:
            return None
        if pipeline["run"] < run or (pipeline["run"] == run and not pipeline["is_over"]):
            return None
        if pipeline["run"] > run:
            return RunEnd(f"{name}: run {run} is over and run {pipeline['run']} has begun", 0)
        parked = pipeline["parked"]
        text = f"{name}: run {run} done in {pipeline['seconds']:.1f} s"
        if parked:
            text += f", {parked} item{'s' if parked > 1 else ''} parked: python -m p2pcluster parked list"
        return RunEnd(text, 3 if parked else 0)


    def _undeployed(self, name: str, run: int) -> RunEnd | None:
        """The pipeline is gone from the leader's plan. It is not offered again by a node that goes on: somebody has just ended it."""
        if not self._is_planned:
            return None  # the first plan has not come
        self._is_planned = False
        if self.offer.until_done:
            return RunEnd(f"{name}: undeployed before run {run} was done", 1)
        self._out(f"{name}: undeployed; this node offers it again when it is started next")
        return None


def _was_rolled_back(deployed: dict[str, Any], version: str) -> bool:
    rolled = deployed["rolled"]
    return rolled is not None and rolled["failure"] is not None and rolled["version"] == version


def pack_project(project: bundle.Project) -> bundle.Bundle:
    """The project as a bundle. Raises `BundleRejected`; `ProjectError` when the very module of the pipeline would not be in it."""
    packed = bundle.pack(project.folder, extra_excludes=project.excludes)
    module = project.module.replace(".", "/")
    places = [f"{path}/{module}{end}".removeprefix("./") for path in project.import_paths for end in (".py", "/__init__.py")]
    if not any(place in packed.files for place in places):
        raise ProjectError(f"{places[0]} would not be shipped, because git ignores it or [tool.p2pcluster] exclude names it: git add -f it, or "
                           "correct the exclusion")
    return packed


def project_record(project: bundle.Project) -> dict[str, Any]:
    """What a deployment says of a project beside its files: how it is imported, and by which Pythons."""
    return {"module": project.module, "variable": project.variable, "import_paths": list(project.import_paths),
            "python": project.python or pythons.same_minor(platform.python_version())}


def changes(deployed: dict[str, Any], packed: bundle.Bundle, record: dict[str, Any]) -> list[str]:
    """What is other than in the version that is deployed, for people."""
    return bundle.changed_files(deployed["files"], packed.files) or [f"{record['module']}.py for Python {record['python']}"]


def deploy_messages(packed: bundle.Bundle, manifest: dict[str, Any], project: dict[str, Any], origin: dict[str, Any]) -> Iterator[Message]:
    """The commands that ship a bundle: its parts as ordinary entries, then the deploy that names them."""
    size = config.BUNDLE_PART_BYTES
    parts = max(1, -(-len(packed.zip_bytes) // size))
    for part in range(parts):
        yield Message("bundle_part", {"version": packed.version, "part": part, "parts": parts},
                      (memoryview(packed.zip_bytes)[part * size : (part + 1) * size],))
    yield Message("deploy", {"pipeline": manifest["pipeline"], "version": packed.version, "origin": origin, "manifest": manifest,
                             "files": packed.files, "zip_sha256": packed.zip_sha256, "project": project})


def _heard(reply: Reply) -> None:
    """A part's; the deployment's says whether all of them are there."""


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
