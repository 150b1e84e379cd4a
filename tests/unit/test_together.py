"""Items that a process has in hand together: when they go to it, what they are reported as, and who is blamed for its death."""

from __future__ import annotations

from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest

from p2pcluster import Pipeline, Queue, config, sink, source, stage
from p2pcluster.core import context as contexts
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Executor, Kill, Send, Start, ToLeader
from p2pcluster.process import position_bytes, ran_before
from p2pcluster.together import BatchRunner
from p2pcluster.runners import Work
from tests import plans
from tests.flow import Flow

WAIT_MS = 50


def nothing(*arguments: Any) -> None:
    """What the functions do is said by a `Flow`."""


class Machine:
    """A machine with processes of one stage. `works` are what they were told to run, `asked` what the leader was asked for, since the last
    look."""

    def __init__(self, processes: int = 1, **options: Any) -> None:
        stage = plans.stage_of(ports=[{"label": None, "queues": ["T"]}], retries=3, **{"batch_wait_s": WAIT_MS / 1000, **options})
        self.executor = Executor("here")
        self._left: list[Any] = []
        self.executor.on_leader(plans.plan(plans.planned(plans.manifest_of(stage)), S=processes), 0)
        self.keys = [action.key for action in self._actions(Start)]
        for key in self.keys:
            self.says("ready", 0, key)

    def _actions(self, kind: type) -> list[Any]:
        actions = self._left + self.executor.take_actions()
        self._left = [action for action in actions if not isinstance(action, kind)]
        return [action for action in actions if isinstance(action, kind)]

    def says(self, kind: str, now_ms: int, key: int | None = None, blobs: tuple[bytes, ...] = (), **fields: Any) -> None:
        self.executor.on_message(self.keys[0] if key is None else key, Message(kind, fields, blobs), now_ms)

    def grant(self, lo: int, hi: int, now_ms: int, seq: int = 1, **deliveries: int) -> None:
        blobs = (array("I", [1] * (hi - lo)).tobytes(), b"x" * (hi - lo))
        self.executor.on_leader(Message("grant", {
            "queue": "p/S", "pieces": [[lo, hi, 1, None]], "fence": ["here", "boot", seq], "version": "v",
            "deliveries": {name.strip("_"): count for name, count in deliveries.items()}}, blobs), now_ms)

    def works(self) -> list[tuple[int, list[int]]]:
        """The number of each piece of work, and its items."""
        sent = [action.message.fields for action in self._actions(Send) if action.message.kind == "work"]
        return [(fields["work"], [i for lo, hi, _, _ in fields["slices"] for i in range(lo, hi)]) for fields in sent]

    def asked(self, *kinds: str) -> list[Message]:
        return [action.message for action in self._actions(ToLeader) if action.message.kind in kinds]

    def dies(self, running: int, now_ms: int) -> None:
        """The process; and the next one is there."""
        self.executor.on_exit(self.keys[0], "died of signal 9 (SIGKILL)", running, [], now_ms)

    def is_there_again(self, now_ms: int) -> None:
        self.executor.tick(now_ms, {})
        self.keys = [action.key for action in self._actions(Start)] or self.keys
        self.says("ready", now_ms)


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_goes_when_it_is_full_or_has_waited() -> None:
    machine = Machine(batch=4)
    machine.grant(1, 4, 10)
    assert machine.works() == []
    machine.grant(4, 7, 20)
    ((work, ids),) = machine.works()
    assert ids == [1, 2, 3, 4]
    machine.says("done", 30, work=work, count=4, elapsed_us=100.0, ports=[])
    machine.executor.tick(20 + WAIT_MS - 1, {})
    assert machine.works() == []
    machine.executor.tick(20 + WAIT_MS, {})
    assert [ids for _, ids in machine.works()] == [[5, 6]]


def test_an_item_that_failed_goes_alone_and_holds_up_no_batch() -> None:
    machine = Machine(batch=4)
    machine.grant(1, 6, 10, _3=1)
    assert [ids for _, ids in machine.works()] == [[3]]
    machine.says("done", 20, work=1, count=1, elapsed_us=100.0, ports=[])
    assert [ids for _, ids in machine.works()] == [[1, 2, 4, 5]]


def test_a_batch_is_reported_whole_under_the_fence_of_each_of_its_ranges() -> None:
    machine = Machine(batch=4)
    machine.grant(1, 3, 10)
    machine.grant(7, 9, 11, seq=2)
    machine.says("done", 20, work=1, count=4, elapsed_us=100.0, ports=[{"port": 0}], whole=True, parts=0, blobs=(b"", b""))
    (done,) = machine.asked("done")
    assert {name: done.fields[name] for name in ("ranges", "whole", "fences")} == {
        "ranges": [[1, 3], [7, 9]], "whole": True, "fences": [["here", "boot", 1], ["here", "boot", 2]]}
    assert done.fields["ports"] == [{"queues": ["p/T"]}] and "parts" not in done.fields


def test_items_of_a_batch_whose_process_died_run_alone_and_only_the_culprit_fails() -> None:
    machine = Machine(batch=3)
    machine.grant(1, 4, 10)
    assert [ids for _, ids in machine.works()] == [[1, 2, 3]]
    machine.dies(1, 20)
    assert machine.asked("fail") == [], "nobody knows which one it was"
    machine.is_there_again(30)
    for item_id in (1, 2):
        ((work, ids),) = machine.works()
        assert ids == [item_id]
        if item_id == 1:
            machine.says("done", 40, work=work, count=1, elapsed_us=300_000.0, ports=[])
    machine.dies(2, 50)
    assert [message.fields["id"] for message in machine.asked("fail")] == [2]


def test_of_a_batch_that_was_divided_the_item_that_ran_has_killed_the_process() -> None:
    machine = Machine(batch=3)
    machine.grant(1, 4, 10)
    machine.says("divided", 20, work=1)
    machine.says("done", 21, work=1, count=1, elapsed_us=100.0, ports=[])
    machine.dies(2, 30)
    assert [message.fields["id"] for message in machine.asked("fail")] == [2]


# --- Outputs in parts -------------------------------------------------------------------------------------------------


def test_parts_go_under_the_fence_of_their_item_and_a_refused_one_gives_it_back() -> None:
    machine = Machine()
    machine.grant(1, 3, 10)
    machine.works()
    machine.says("part", 20, work=1, part=0, ports=[{"port": 0}], blobs=(b"", b""))
    (part,) = machine.asked("part")
    assert {name: part.fields[name] for name in ("queue", "id", "fence", "part", "ports")} == {
        "queue": "p/S", "id": 1, "fence": ["here", "boot", 1], "part": 0, "ports": [{"queues": ["p/T"]}]}
    reply = {"req": part.fields["req"], "kind": "part", "result": "refused", "code": "stale_fence"}
    machine.executor.on_leader(Message("reply", reply), 30)
    (ack,) = [action.message for action in machine._actions(Send)]
    assert (ack.kind, ack.fields) == ("part_ack", {"item": 1, "part": 0, "is_kept": False})
    machine.says("lost", 40, work=1, count=1)
    (release,) = machine.asked("release", "fail")
    assert (release.kind, release.fields["ranges"], release.fields["fence"]) == ("release", [[1, 2]], ["here", "boot", 1])


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_in_parts_holds_nobody_up_for_good(seed: int) -> None:
    """Each item becomes many times what the queues behind it hold, on a diamond, while some of the items fail half way."""
    random = Random(seed)
    spread = stage(nothing, name="Spread", processes=3, retries=1, backoff_s=0.01)
    left, right = (stage(nothing, name=name, processes=1) for name in ("Left", "Right"))
    diamond = [Queue("a", maxsize=3) >> left, Queue("b", maxsize=2) >> right] >> Queue("c", maxsize=2) >> sink(nothing, name="S")
    first = source(nothing, name="G") >> Queue("q", maxsize=4) >> spread >> [Queue("a", maxsize=3), Queue("b", maxsize=2)]
    pipeline = Pipeline("f", first, diamond)
    flow = Flow(pipeline.manifest(), random, machines=2)
    flow.sources["G"] = [b"v%d" % number for number in range(12)]
    flow.part_size = 4
    flow.emits = lambda name, value: [(0, b"%s.%d" % (value, n)) for n in range(17)] if name == "Spread" else [(0, value)] * (name != "S")
    flow.fails = lambda name, value: name == "Spread" and random.random() < 0.2
    flow.pass_time(8_000)
    assert flow.is_done
    parked = len(flow.queue("q").parked)
    assert (flow.queue("a").put, flow.queue("b").put, flow.queue("c").done) == ((12 - parked) * 17, (12 - parked) * 17, (12 - parked) * 34)
    assert len(flow.queue("a").hidden) == len(flow.queue("b").hidden) == 0


def test_keys_of_a_queue_that_is_fed_from_outside_are_forgotten_after_a_day_and_not_one_by_one() -> None:
    flow = Flow(Pipeline("f", Queue("in") >> sink(nothing, name="S", processes=1)).manifest(), Random(0))
    day_ms, few_ms = int(1000 * config.KEY_RETENTION_S), int(1000 * config.KEYS_FORGOTTEN_S)
    flow.pass_time(2_000)
    flow.put("in", [b"v"], keys=b'["first"]')
    flow._tick(few_ms // 2)
    flow.put("in", [b"v"], keys=b'["second"]')
    flow._tick(day_ms - few_ms)
    flow.pass_time(2_000)
    assert len(flow.queue("in").keys) == 2
    flow._tick(few_ms // 2)
    flow.pass_time(2_000)
    assert len(flow.queue("in").keys) == 2, "the first is a day old, and alone so"
    flow._tick(few_ms)
    flow.pass_time(2_000)
    assert len(flow.queue("in").keys) == 0


# --- Tasks ------------------------------------------------------------------------------------------------------------


def test_a_process_has_as_many_items_in_hand_as_it_may_and_reports_them_in_any_order() -> None:
    machine = Machine(concurrency=3)
    machine.grant(1, 6, 10)
    assert [ids for _, ids in machine.works()] == [[1], [2], [3]]
    machine.says("done", 20, work=2, count=1, elapsed_us=100.0, ports=[])
    assert [message.fields["ranges"] for message in machine.asked("done")] == [[[2, 3]]]
    machine.says("failed", 30, work=1, elapsed_us=100.0, error={"type": "E", "text": "E", "traceback": None})
    assert [message.fields["id"] for message in machine.asked("fail")] == [1]


def test_of_items_that_were_in_hand_when_their_process_died_each_runs_alone() -> None:
    machine = Machine(concurrency=3)
    machine.grant(1, 4, 10)
    assert [ids for _, ids in machine.works()] == [[1], [2], [3]]
    machine.dies(1, 20)
    assert machine.asked("fail") == []
    machine.grant(4, 6, 25)
    machine.is_there_again(30)
    done = []
    for now_ms in (40, 50, 60):
        ((work, ids),) = machine.works()
        done += ids
        machine.says("done", now_ms, work=work, count=1, elapsed_us=100.0, ports=[])
    assert done == [1, 2, 3]
    assert [ids for _, ids in machine.works()] == [[4], [5]]


def test_batches_in_hand_together_are_told_apart() -> None:
    machine = Machine(concurrency=2, batch=2)
    machine.grant(1, 6, 10)
    assert [ids for _, ids in machine.works()] == [[1, 2], [3, 4]]
    machine.says("done", 20, work=2, count=2, elapsed_us=100.0, ports=[{"port": 0}], whole=True, parts=0, blobs=(b"", b""))
    assert [message.fields["ranges"] for message in machine.asked("done")] == [[[3, 5]]]
    machine.says("divided", 30, work=1)
    machine.dies(2, 40)
    assert [message.fields["id"] for message in machine.asked("fail")] == [2], "of those in hand it ran alone by then"


def test_a_task_that_holds_up_the_loop_takes_its_process_along() -> None:
    machine = Machine(concurrency=2, timeout_s=1.0)
    machine.grant(1, 2, 10)
    machine._actions(Kill)
    late_ms = 10 + int(1000 * (1.0 + config.TIMEOUT_GRACE_S))
    machine.executor.tick(late_ms, {machine.keys[0]: (1, 1)})
    assert machine._actions(Kill) == []
    machine.executor.tick(late_ms + 1, {machine.keys[0]: (1, 1)})
    assert len(machine._actions(Kill)) == 1
    machine.dies(1, late_ms + 10)
    (fail,) = machine.asked("fail")
    assert fail.fields["error"]["text"] == "it ran longer than its timeout_s=1, so its process was ended"


# --- What is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("running", "in_hand", "found"), [
    (0, [], []), (7, [], [7]), (7, [7], [7]), (7, [7, 9, 8], [[7, 8], [8, 9], [9, 10]]), (0, [7, 8], []),
])
def test_a_position_file_says_what_ran_and_what_ran_together(tmp_path: Path, running: int, in_hand: list[int], found: list[Any]) -> None:
    data = bytearray(position_bytes("p/S", 4))
    data[8:16] = running.to_bytes(8, "little")
    at = data.index(b"\n") + 1
    assert at % 8 == 0 and len(data) == at + 4 * 8
    for number, item_id in enumerate(in_hand):
        data[at + 8 * number : at + 8 * number + 8] = item_id.to_bytes(8, "little")
    (tmp_path / "old-1.position").write_bytes(data)
    assert ran_before(tmp_path, "new") == ({"old": {"p/S": found}} if found else {})


# --- In the process ---------------------------------------------------------------------------------------------------


def runner_of(function: Any, sent: list[Message]) -> BatchRunner:
    stage = {"name": "S", "reads": "S", "ports": [], "batch": 3}
    context = contexts.Context(run=1, queue="p/S", stage="S", node="here", params=None, out_dir="", log=None,  # type: ignore[arg-type]
                               on_progress=lambda fraction, text: None)
    room = memoryview(bytearray(24)).cast("Q")
    return BatchRunner(stage, {"S": {"codec": "json"}}, function, False, context, memoryview(bytearray(16)).cast("Q"), sent.append, room)


def work_of(count: int) -> Work:
    fields = {"work": 1, "deliveries": {}, "slices": [[1, 1 + count, 1, None]]}
    return Work(Message("work", fields, (array("I", [1] * count).tobytes(), b"5" * count)))


def test_a_batch_that_was_recalled_before_it_began_does_not_run() -> None:
    sent: list[Message] = []
    calls: list[Any] = []
    runner, work, kept = runner_of(calls.append, sent), work_of(3), []
    runner.recalls.recall(work, kept.append)
    runner.run(work)
    assert (kept, calls, sent) == ([0], [], [])


def test_a_batch_that_has_begun_is_kept_whole() -> None:
    sent: list[Message] = []
    kept: list[int] = []
    runner, work = runner_of(lambda values: runner.recalls.recall(work, kept.append), sent), work_of(3)
    runner.run(work)
    assert kept == [3]
    assert [(message.kind, message.fields["count"]) for message in sent] == [("done", 3)]
