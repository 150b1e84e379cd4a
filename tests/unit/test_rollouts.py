"""A new version on its way over the nodes: what the leader decides, and what a machine does and says."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from p2pcluster import Queue, config, sink, source, stage
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Executor, Send, Start, ToLeader
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.rollouts import told
from tests import plans
from tests.hostile import deploying
from tests.leader import Leader

WATCHED_MS = int(1000 * config.ROLL_OUT_WATCHED_S)
OLD, NEW, OTHER = "1" * 64, "2" * 64, "3" * 64
FAILURE = {"stage": "Work", "text": "does not start: No module named 'rare'"}


@source
def Numbers() -> Any:
    yield 1


@stage(processes=3, per_node=1)
def Work(x: Any) -> Any:
    return x


@stage(processes=1)
def Extra(x: Any) -> Any:
    return x


@sink
def Keep(x: Any) -> None:
    """Takes what comes out."""


PIPELINE = Pipeline("p", Queue("in") >> Work >> Queue("out", maxsize=None))


# ---- the leader's half


class Rolling(Leader):
    """Three machines that run a pipeline; each says what the test has it say."""

    def __init__(self, pipeline: Pipeline = PIPELINE, origin: str = "b") -> None:
        super().__init__()
        self.deploy(pipeline, origin, version=OLD)
        for name in ("a", "b", "c"):
            self.join(name)
        self.settle()

    def versions(self) -> dict[str, str]:
        """What each machine was told last to run."""
        return {name: self.plan(name)["pipelines"]["p"]["version"] for name in ("a", "b", "c")}

    def ask(self, *messages: Message) -> None:
        """A client says all of this at once."""
        for message in messages:
            fields = {**message.fields, **({"manifest": PIPELINE.manifest()} if message.kind == "deploy" else {}), "req": 1}
            self.node.step("client", message._replace(fields=fields), self.now_ms)
        self.carry()

    def new(self, *names: str) -> bool:
        """Whether these machines run the new version and the others the old one."""
        return self.versions() == {name: NEW if name in names else OLD for name in ("a", "b", "c")}

    def says(self, name: str, *ready: str, old: int = 0, failure: dict[str, str] | None = None, rollout: int | None = None) -> None:
        """How the new version does on a machine; what has failed there is its trouble too."""
        number = rollout or self.plan(name)["pipelines"]["p"]["rollout"]
        trials = {} if number is None else {"p": {"rollout": number, "old": old, "ready": list(ready), "failure": failure}}
        troubles = {} if failure is None else {f"p/{failure['stage']}": failure["text"]}
        stats = {"running": {}, "service_us": {}, "troubles": troubles, "draining": False, "trials": trials}
        self.node.step(name, Message("stats", stats), self.now_ms)
        self.settle()

    def alarms(self) -> str:
        return "\n".join(self.node.status()["alarms"])


@pytest.fixture
def rolling() -> Rolling:
    leader = Rolling()
    leader.deploy(PIPELINE, "b", version=NEW)
    leader.settle()
    return leader


def test_a_version_proves_itself_on_one_node_after_the_other_first_where_it_came_from(rolling: Rolling) -> None:
    assert rolling.new("b")
    rolling.says("b", "Work", old=1)
    assert rolling.new("b"), "something of the old one still runs there"
    rolling.says("b")
    assert rolling.new("b"), "nothing of the new one runs there yet"
    rolling.says("b", "Work")
    assert rolling.new("a", "b")
    rolling.says("a", "Work")
    assert rolling.new("a", "b", "c")
    assert rolling.node.state.pipelines["p"].rollout is not None
    rolling.says("c", "Work")
    pipeline = rolling.node.state.pipelines["p"]
    assert (pipeline.rollout, pipeline.rolled) == (None, {"version": NEW, "nodes": 3, "failure": None})
    assert rolling.plan("c")["pipelines"]["p"]["rollout"] is None


def test_a_version_that_does_not_start_where_it_is_tried_first_goes_back_and_no_other_node_has_had_it(rolling: Rolling) -> None:
    rolling.says("b", failure=FAILURE)
    assert rolling.new()
    pipeline = rolling.node.state.pipelines["p"]
    assert (pipeline.version, pipeline.rolled) == (OLD, {"version": NEW, "nodes": 1, "failure": {"node": "b", **FAILURE}})
    why = "because Work on b does not start: No module named 'rare'"
    assert f"p: version 22222222 was rolled back, {why}; version 11111111 runs on" in rolling.alarms()
    assert not any(plan.fields["pipelines"]["p"]["version"] == NEW for name, plan in rolling.sent if plan.kind == "plan" and name != "b")


def test_the_alarm_is_over_when_another_version_comes_or_the_one_that_runs_is_deployed_again(rolling: Rolling) -> None:
    rolling.says("b", failure=FAILURE)
    rolling.deploy(PIPELINE, "b", version=OLD)
    assert "rolled back" not in rolling.alarms()
    rolling.deploy(PIPELINE, "b", version=NEW)
    rolling.settle()
    assert rolling.new("b"), "the same may be tried again"
    rolling.says("b", failure=FAILURE)
    rolling.deploy(PIPELINE, "b", version=OTHER)
    assert "rolled back" not in rolling.alarms()


def test_what_a_machine_said_about_an_earlier_try_does_not_count_for_the_next(rolling: Rolling) -> None:
    late = rolling.plan("b")["pipelines"]["p"]["rollout"]
    rolling.says("b", failure=FAILURE)
    rolling.deploy(PIPELINE, "b", version=NEW)
    rolling.settle()
    rolling.says("b", failure=FAILURE, rollout=late)
    assert rolling.new("b")


def test_what_a_later_node_lacks_is_that_nodes_fact(rolling: Rolling) -> None:
    rolling.says("b", "Work")
    assert rolling.new("a", "b")
    rolling.says("a", failure=FAILURE)
    assert rolling.new("a", "b", "c"), "it has started on another one"
    rolling.says("c", "Work")
    assert rolling.node.state.pipelines["p"].rolled == {"version": NEW, "nodes": 3, "failure": None}


def test_nobody_waits_for_a_node_that_has_gone(rolling: Rolling) -> None:
    rolling.node.close_session("b")
    rolling.settle()
    assert rolling.versions()["a"] == NEW
    rolling.says("a", "Work")
    rolling.says("c", "Work")
    assert rolling.node.state.pipelines["p"].rolled == {"version": NEW, "nodes": 3, "failure": None}
    rolling.join("b")
    rolling.settle()
    assert rolling.new("a", "b", "c")


def test_a_node_is_given_nothing_between_the_step_and_its_plan(rolling: Rolling) -> None:
    """Its processes are of the former version until then."""
    rolling.says("b", "Work")
    for name in ("a", "b", "c"):
        rolling.node.step(name, Message("window", {"queues": {"p/in": 1}}), rolling.now_ms)
    assert rolling.node.state.pipelines["p"].version_on("a") == rolling.node.sessions["a"].versions["p"] == NEW
    rolling.node.sessions["a"].versions["p"] = OLD  # as it is before the plan goes out
    queue = rolling.node.state.queues["p/in"]
    assert [rolling.node._may_be_given(rolling.node.sessions[name], queue) for name in ("a", "b", "c")] == [False, True, True]


def test_items_whose_lease_had_to_be_in_the_log_first_go_back_when_another_version_came_meanwhile(rolling: Rolling) -> None:
    rolling.ask(Message("put", {"producer": ["client:x", 1, 1], "ports": [{"queues": ["p/in"]}], "source": None}, (b"\1\0\0\0", b"x")))
    rolling.node._old_below["p/in"] = 2  # as if it had come in a former leader's term
    rolling.node.step("b", Message("window", {"queues": {"p/in": 1}}), rolling.now_ms)
    rolling.ask(*deploying("p", OTHER))
    queue = rolling.node.state.queues["p/in"]
    assert (len(queue.ready), len(queue.leases)) == (1, 0)


def test_a_stage_that_only_one_of_the_versions_has_runs_only_where_that_version_is() -> None:
    leader = Rolling()
    with_extra = Pipeline("p", Queue("in") >> Work >> Queue("out", maxsize=None), Queue("more") >> Extra >> Queue("end", maxsize=None))
    leader.deploy(with_extra, "b", version=NEW)
    leader.settle()
    assert [leader.processes(name).get("p/Extra", 0) for name in ("a", "b", "c")] == [0, 1, 0]
    leader.says("b", "Work", "Extra")
    leader.says("a", "Work")
    leader.says("c", "Work")
    assert leader.node.state.pipelines["p"].rollout is None
    leader.deploy(PIPELINE, "a", version=OTHER)
    leader.settle()
    assert leader.versions() == {"a": OTHER, "b": NEW, "c": NEW}
    assert [leader.processes(name).get("p/Extra", 0) for name in ("a", "b", "c")] == [0, 1, 0]


def test_a_source_is_begun_anew_only_where_the_new_version_is() -> None:
    leader = Rolling(Pipeline("p", Numbers >> Work >> Queue("out", maxsize=None)), "c")
    assert leader.owners() == {"c"}
    leader.deploy(Pipeline("p", Numbers >> Work >> Queue("out", maxsize=None)), "a", version=NEW)
    leader.settle()
    assert leader.new("a")
    leader.says("a", "Work")
    assert leader.new("a", "b"), "the source is at home on another node still"
    leader.node.step("c", Message("source_lost", {"pipeline": "p", "stage": "Numbers", "shard": 0}), leader.now_ms)
    leader.settle()
    assert leader.owners() == {"a"}
    leader.says("b", "Work")
    assert leader.new("a", "b"), "now that it has begun on a, it has to prove itself there"
    leader.says("a", "Work", "Numbers")
    assert leader.new("a", "b", "c")


def test_a_source_whose_node_may_not_run_it_any_more_is_taken_away_and_begun_elsewhere() -> None:
    pipeline = Pipeline("p", Numbers >> Keep)
    leader = Leader()
    leader.deploy(pipeline, "a", python="==3.11", version=OLD)
    leader.join("a", python="3.11.2")
    leader.join("b", python="3.12.1")
    leader.settle()
    assert leader.owners() == {"a"}
    leader.deploy(pipeline, "a", python="==3.12", version=OLD)
    leader.settle()
    about = {"pipeline": "p", "stage": "Numbers", "shard": 0}
    assert ("a", Message("revoke", about)) in leader.sent
    leader.node.step("a", Message("source_lost", about), leader.now_ms)
    leader.settle()
    assert leader.owners() == {"b"}


def test_parts_of_a_project_that_nobody_goes_on_with_are_forgotten() -> None:
    leader = Rolling()
    part = next(message for message in deploying("p", NEW) if message.kind == "bundle_part")
    leader.node.step("client", part._replace(fields={**part.fields, "parts": 2, "req": 1}), leader.now_ms)
    leader.carry()
    leader.settle()
    assert leader.node.state.uploads() == {NEW: 1}
    leader.pass_time(int(1000 * config.UPLOAD_S) - 5_000)
    assert leader.node.state.uploads() == {NEW: 1}
    leader.pass_time(5_000)
    leader.settle()
    assert leader.node.state.uploads() == {}


def test_a_node_of_an_undeployed_pipeline_has_nothing_more_to_do_with_it() -> None:
    leader = Rolling()
    leader.node.step("client", Message("undeploy", {"pipeline": "p", "discard": False, "req": 1}), leader.now_ms)
    leader.settle()
    assert [leader.plan(name) for name in ("a", "b", "c")] == [{"pipelines": {}, "processes": {}}] * 3
    assert leader.node.status()["queues"] == []


# ---- a machine's half

ASSIGNED = {"pipeline": "p", "stage": "Numbers", "shard": 0, "producer": "source:p/1/Numbers/0", "epoch": 1, "seq": 0, "count": 0, "hash": ""}


class Machine:
    """A machine with a leader who plans and grants what the test says."""

    def __init__(self, pipeline: Pipeline = PIPELINE, processes: int = 1) -> None:
        self.executor = Executor("here")
        self.now_ms = 1
        self.processes = processes
        self.to_leader: list[Message] = []
        self.sent: list[tuple[int, Message]] = []
        self.started: list[int] = []
        self.plan(pipeline, OLD)

    def plan(self, pipeline: Pipeline | None, version: str = NEW, rollout: int | None = None) -> None:
        manifest = None if pipeline is None else pipeline.manifest()
        processes = {record["name"]: self.processes for record in (manifest["stages"] if manifest else ()) if record["reads"]}
        message = plans.plan(manifest and plans.planned(manifest, version=version, rollout=rollout), **processes)
        self.executor.on_leader(message, self.now_ms)
        self.take()

    def take(self) -> None:
        for action in self.executor.take_actions():
            if isinstance(action, ToLeader):
                self.to_leader.append(action.message)
            elif isinstance(action, Send):
                self.sent.append((action.key, action.message))
            elif isinstance(action, Start):
                self.started.append(action.key)

    def says(self, key: int, kind: str, **fields: Any) -> None:
        self.executor.on_message(key, Message(kind, fields), self.now_ms)
        self.take()

    def ready(self) -> int:
        """The process that was started last is."""
        self.says(self.started[-1], "ready")
        return self.started[-1]

    def exits(self, key: int, how: str = "ended", *stderr: str) -> None:
        self.executor.on_exit(key, how, 0, list(stderr), self.now_ms)
        self.take()

    def pass_time(self, ms: int) -> None:
        self.now_ms += ms
        self.executor.tick(self.now_ms, {})
        self.take()

    def grant(self, lo: int, hi: int, version: str = OLD, queue: str = "p/in") -> None:
        blobs = (array("I", [1] * (hi - lo)).tobytes(), b"x" * (hi - lo))
        fields = {"queue": queue, "version": version, "pieces": [[lo, hi, 1, None]], "fence": ["here", "boot", 1], "deliveries": {}}
        self.executor.on_leader(Message("grant", fields, blobs), self.now_ms)
        self.take()

    def works(self, key: int) -> list[Message]:
        return [message for to, message in self.sent if to == key and message.kind == "work"]

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [message.fields for message in self.to_leader if message.kind == kind]

    def released(self) -> list[tuple[str, list[list[int]]]]:
        return [(fields["queue"], fields["ranges"]) for fields in self.told("release")]

    def trial(self) -> dict[str, Any]:
        found: dict[str, Any] = self.told("stats")[-1]["trials"]["p"]
        return found


def test_items_that_wait_when_a_version_changes_go_back_and_so_does_what_comes_for_the_former_one() -> None:
    machine = Machine()
    key = machine.ready()
    machine.grant(1, 4)
    (work,) = machine.works(key)
    assert work.fields["slices"][0][:2] == [1, 2]
    machine.plan(PIPELINE, NEW)
    assert machine.released() == [("p/in", [[2, 4]])]
    machine.grant(4, 6, OLD)  # it was on its way
    assert machine.released()[1:] == [("p/in", [[4, 6]])]
    machine.says(key, "done", work=work.fields["work"], count=1, elapsed_us=10.0, ports=[])
    assert machine.told("done")[-1]["ranges"] == [[1, 2]]
    assert machine.sent[-1] == (key, Message("stop", {}))
    assert machine.started == [key], "what runs may finish first"
    machine.exits(key)
    newer = machine.ready()
    machine.grant(2, 4, NEW)
    assert [message.fields["slices"][0][:2] for message in machine.works(newer)] == [[2, 3]]


def test_what_an_old_process_gives_back_is_not_given_to_a_new_one() -> None:
    machine = Machine()
    key = machine.ready()
    machine.grant(1, 2)
    machine.says(key, "done", work=machine.works(key)[0].fields["work"], count=1, elapsed_us=10.0, ports=[])
    machine.grant(2, 9)
    work = machine.works(key)[1].fields
    machine.plan(PIPELINE, NEW)
    machine.to_leader.clear()
    machine.says(key, "returned", work=work["work"], kept=1)
    assert machine.released() == [("p/in", [[3, 9]])]


def test_an_old_process_reports_about_the_queue_that_its_version_read() -> None:
    """Ids are those of a queue: in another one they name other items."""
    machine = Machine()
    key = machine.ready()
    machine.grant(1, 2)
    machine.plan(Pipeline("p", Queue("other") >> Work >> Queue("out", maxsize=None)), NEW)
    machine.executor.on_new_leader({}, 1)
    machine.take()
    assert machine.told("report")[-1]["held"] == {"p/in": [[1, 2, 1]]}
    machine.says(key, "done", work=machine.works(key)[0].fields["work"], count=1, elapsed_us=10.0, ports=[])
    assert machine.told("done")[-1]["queue"] == "p/in"
    machine.exits(key)
    machine.ready()
    assert machine.told("window")[-1]["queues"] == {"p/other": 2}


def test_a_queue_whose_stage_has_another_name_is_read_under_that_name_and_again_under_the_first() -> None:
    renamed = Pipeline("p", Queue("in") >> Work.named("Again") >> Queue("out", maxsize=None))
    machine = Machine()
    for number, pipeline in enumerate((renamed, PIPELINE, renamed)):
        key = machine.started[-1]
        machine.plan(pipeline, str(number) * 64)
        machine.exits(key)
        newer = machine.ready()
        assert machine.told("window")[-1]["queues"] == {"p/in": 2}
        machine.grant(10 * number + 1, 10 * number + 2, str(number) * 64)
        assert len(machine.works(newer)) == 1
        machine.says(newer, "done", work=machine.works(newer)[0].fields["work"], count=1, elapsed_us=10.0, ports=[])


def test_a_process_has_proved_itself_when_it_has_worked_or_been_there_for_a_while() -> None:
    machine = Machine()
    old = machine.ready()
    machine.plan(PIPELINE, NEW, rollout=7)
    machine.pass_time(10)
    assert machine.trial() == {"rollout": 7, "old": 1, "ready": [], "failure": None}
    machine.exits(old)
    key = machine.ready()
    machine.pass_time(10)
    assert machine.trial() == {"rollout": 7, "old": 0, "ready": [], "failure": None}
    machine.grant(1, 2, NEW)
    machine.says(key, "failed", work=machine.works(key)[0].fields["work"], elapsed_us=10.0, error={"text": "ValueError: no"})
    machine.pass_time(10)
    assert machine.trial()["ready"] == ["Work"], "that its function raises is another matter"
    machine.plan(PIPELINE, OTHER, rollout=8)
    machine.exits(key)
    machine.ready()
    machine.pass_time(WATCHED_MS - 1)
    assert machine.trial()["ready"] == []
    machine.pass_time(1)
    assert machine.trial() == {"rollout": 8, "old": 0, "ready": ["Work"], "failure": None}


def test_a_process_that_says_what_it_lacks_fails_the_version_at_once_and_one_that_dies_does_so_the_second_time() -> None:
    machine = Machine()
    machine.plan(PIPELINE, NEW, rollout=7)
    machine.exits(machine.started[-1])
    machine.says(machine.started[-1], "error", error={"text": "ModuleNotFoundError: No module named 'rare'"})
    machine.exits(machine.started[-1], "exited with code 1")
    machine.pass_time(10)
    assert machine.trial()["failure"] == {"stage": "Work", "text": "does not start: ModuleNotFoundError: No module named 'rare'"}

    machine.plan(PIPELINE, OTHER, rollout=8)
    machine.exits(machine.ready(), "died of signal 9 (SIGKILL)")
    machine.pass_time(10)
    assert machine.trial()["failure"] is None
    machine.pass_time(1_000)
    machine.exits(machine.ready(), "exited with code 3", "a line", "no licence")
    machine.pass_time(10)
    assert machine.trial()["failure"] == {"stage": "Work", "text": "does not start: its process exited with code 3: no licence"}


def test_a_source_that_raises_before_it_has_emitted_anything_fails_the_version() -> None:
    pipeline = Pipeline("p", Numbers >> Keep)
    machine = Machine(pipeline)
    machine.plan(pipeline, NEW, rollout=7)
    machine.executor.on_leader(Message("assigned", ASSIGNED), 0)
    machine.take()
    key = machine.ready()
    machine.says(key, "error", error={"text": "FileNotFoundError: numbers.txt"})
    machine.exits(key, "exited with code 1")
    machine.pass_time(10)
    assert machine.trial()["failure"] == {"stage": "Numbers", "text": "does not start: FileNotFoundError: numbers.txt"}


def test_a_source_that_is_taken_away_ends_and_says_so() -> None:
    pipeline = Pipeline("p", Numbers >> Keep)
    machine = Machine(pipeline)
    about = {name: ASSIGNED[name] for name in ("pipeline", "stage", "shard")}
    machine.executor.on_leader(Message("assigned", ASSIGNED), 0)
    machine.take()
    key = machine.ready()
    for _ in range(2):
        machine.executor.on_leader(Message("revoke", about), 0)
        machine.take()
    assert [message for to, message in machine.sent if to == key][-1] == Message("stop", {})
    machine.exits(key)
    machine.pass_time(10)
    assert machine.told("source_lost") == [about]
    machine.executor.on_leader(Message("revoke", about), 0)
    machine.take()
    assert machine.told("source_lost") == [about, about], "whoever asks is told again"
    assert key == machine.started[-1]


def test_the_processes_of_a_pipeline_that_was_undeployed_end_and_its_items_go_back() -> None:
    machine = Machine()
    key = machine.ready()
    machine.grant(1, 4)
    machine.plan(None)
    assert machine.released() == [("p/in", [[2, 4]])]
    machine.says(key, "done", work=machine.works(key)[0].fields["work"], count=1, elapsed_us=10.0, ports=[])
    machine.exits(key)
    machine.pass_time(10)
    assert (machine.executor.stages, machine.executor.processes) == ({}, {})
    assert machine.told("window")[-1]["queues"] == {}


def test_a_terminal_says_which_version_runs_there_and_which_went_back() -> None:
    before = {"version": OLD, "rolled": None}
    back = {"version": NEW, "nodes": 1, "failure": {"node": "b", **FAILURE}}
    assert list(told("p", None, before)) == []
    assert list(told("p", before, {"version": NEW, "rolled": None})) == ["p: version 22222222 runs here now"]
    (line,) = told("p", before, {"version": OLD, "rolled": back})
    assert line == "p: version 22222222 is rolled back, because Work on b does not start: No module named 'rare'; version 11111111 runs on"
    assert list(told("p", {"version": OLD, "rolled": back}, {"version": OLD, "rolled": back})) == []
