"""What commands do to queues, rule by rule.

That the rules hold together is `property/test_queue_machine.py`'s affair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from p2pcluster.core import commands
from p2pcluster.core.chunks import Chunk, ChunkIndex
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.queues import State
from p2pcluster.core.ranges import Fence
from p2pcluster.core.records import Outcome, QueueState
from tests.simulation.queue_model import MANIFESTS, beginning, deployment, entry_body, source_key, values_of

FENCE, OTHER = Fence("n1", "b1", 1), Fence("n2", "b9", 1)
ERROR = {"type": "ValueError", "text": "no", "traceback": None}


class Log:
    """A state with two projects, and a short way to say commands to it."""

    def __init__(self, body_memory_bytes_max: int = 1 << 30) -> None:
        self.state = State(body_memory_bytes_max)
        self.at_ms = 0
        self.seq = 0
        self.say(*beginning())

    def say(self, *messages: Message) -> list[Outcome]:
        self.at_ms += 1
        return self.state.apply(self.state.applied_idx + 1, 1, self.at_ms, entry_body(messages))

    def one(self, message: Message) -> tuple[str, dict[str, Any]]:
        (outcome,) = self.say(message)
        return outcome.result, outcome.fields

    def put(self, queue: str, *bodies: bytes, keys: Sequence[str | None] | None = None) -> tuple[str, dict[str, Any]]:
        self.seq += 1
        return self.one(client_put(queue, self.seq, *bodies, keys=keys))

    def take(self, queue: str, *ranges: tuple[int, int], fence: Fence = FENCE) -> tuple[str, dict[str, Any]]:
        return self.one(commands.take(queue, ranges or [(1, 1000)], fence))

    def done(
        self, queue: str, *ranges: tuple[int, int], ports: Sequence[Port] = (), whole: bool = False,
        fence: Fence | None = None, parts: int = 0,
    ) -> tuple[str, dict[str, Any]]:
        return self.one(commands.done(queue, ranges, ports, whole, None if fence is None else [fence] * len(ranges), parts))

    def part(self, queue: str, item_id: int, number: int, ports: Sequence[Port], fence: Fence = FENCE) -> tuple[str, dict[str, Any]]:
        return self.one(commands.part(queue, item_id, fence, number, ports))

    def fail(self, queue: str, item_id: int, fence: Fence = FENCE) -> tuple[str, dict[str, Any]]:
        return self.one(commands.fail(queue, item_id, fence, ERROR, 50))

    def about(self, kind: str, queue: str, ids: list[int] | None = None) -> tuple[str, dict[str, Any]]:
        return self.one(Message(kind, {"queue": queue, "ids": ids}))

    def queue(self, name: str) -> QueueState:
        return self.state.queues[name]

    def run_of(self, pipeline: str) -> tuple[int, str]:
        return self.state.pipelines[pipeline].run, self.state.pipelines[pipeline].state

    def values(self, queue: str) -> list[bytes]:
        found = []
        for chunk in self.queue(queue).chunks:
            for lo, hi in self.queue(queue).open_ranges(chunk.first, chunk.end):
                found += values_of(*chunk.slice(lo, hi))
        return found

    def end_run(self) -> None:
        """All sources and queues of `p` are closed, and nothing is open."""
        self.say(*(Message("close", {"pipeline": "p", "name": name}) for name in ("gen", "in")))
        for name in ("p/a", "p/b", "p/c", "p/in"):
            self.about("discard", name)
        assert self.run_of("p")[1] == "done"


def port(queues: list[str], *bodies: bytes, counts: list[int] | None = None) -> Port:
    return Port(
        queues, lengths_blob(map(len, bodies)), b"".join(bodies), None if counts is None else lengths_blob(counts)
    )


def client_put(
    queue: str, seq: int, *bodies: bytes, keys: Sequence[str | None] | None = None, epoch: int = 0
) -> Message:
    blob = None if keys is None else json.dumps(keys).encode()
    return commands.put("c1", epoch, seq, [Port([queue], lengths_blob(map(len, bodies)), b"".join(bodies), None, blob)])


@pytest.fixture
def log() -> Log:
    return Log()


# --- Put -------------------------------------------------------------------------------------------------------------


def test_a_put_is_applied_once_however_often_it_is_said(log: Log) -> None:
    assert log.one(client_put("p/in", 1, b"x")) == ("ok", {"seq": 1, "added": 1})
    assert log.one(client_put("p/in", 1, b"x")) == ("already", {"seq": 1, "added": 1}), "the answer of the first time"
    assert log.one(client_put("p/in", 3, b"z")) == ("refused", {"code": "sequence", "seq": 1})
    assert log.one(client_put("p/in", 2, b"y")) == ("ok", {"seq": 2, "added": 1})
    assert log.values("p/in") == [b"x", b"y"]


def test_a_refused_put_leaves_nothing_behind(log: Log) -> None:
    ports = [port(["p/in"], b"x"), port(["p/nowhere"], b"y")]
    assert log.one(commands.put("c1", 0, 1, ports)) == ("refused", {"code": "unknown_queue"})
    assert (log.values("p/in"), log.state.producers) == ([], {})
    assert log.put("p/in", b"x")[0] == "ok"


def test_fan_out_gives_every_item_to_both_and_holds_its_bytes_once(log: Log) -> None:
    log.say(commands.put("c1", 0, 1, [port(["p/a", "p/b"], b"one", b"two")]))
    assert log.values("p/a") == log.values("p/b") == [b"one", b"two"]
    (a,), (b,) = log.queue("p/a").chunks, log.queue("p/b").chunks
    assert a.body is b.body
    assert (a.entry, a.offset) == (b.entry, b.offset)


def test_a_closed_queue_takes_nothing_from_outside(log: Log) -> None:
    log.say(Message("close", {"pipeline": "p", "name": "in"}))
    assert log.put("p/in", b"x") == ("refused", {"code": "closed"})


def test_a_queue_whose_stage_does_not_run_takes_nothing(log: Log) -> None:
    log.end_run()
    assert log.put("p/a", b"x") == ("refused", {"code": "not_running"})
    assert log.put("p/d", b"x") == ("refused", {"code": "sequence", "seq": 0})
    log.seq = 0
    assert log.put("p/d", b"x")[0] == "ok"


def test_a_key_counts_once_in_each_queue_and_run(log: Log) -> None:
    assert log.put("p/in", b"1", b"2", b"3", keys=["k", None, "k"]) == ("ok", {"seq": 1, "added": 2})
    assert log.put("p/in", b"4", b"5", keys=["k", "new"])[1]["added"] == 1
    assert log.put("w/x", b"6", keys=["k"])[1]["added"] == 1
    assert log.values("p/in") == [b"1", b"2", b"5"]
    assert [
        chunk.key_of(item_id) for chunk in log.queue("p/in").chunks for item_id in range(chunk.first, chunk.end)
    ] == ["k", None, "new"]
    log.end_run()
    log.say(Message("start_run", {"pipeline": "p", "params": None}))
    assert log.put("p/in", b"7", keys=["k"])[1]["added"] == 1
    assert log.put("w/x", b"8", keys=["k"])[1]["added"] == 0


# --- Take, done, release ---------------------------------------------------------------------------------------------


def test_a_take_gets_what_is_ready_of_what_it_names(log: Log) -> None:
    log.put("p/in", b"1", b"2", b"3")
    assert log.take("p/in", (2, 3)) == ("ok", {"count": 1})
    assert log.take("p/in", (1, 9), fence=OTHER) == ("ok", {"count": 2})
    assert log.take("p/in", (1, 9)) == ("already", {"count": 0})
    assert list(log.queue("p/in").leases) == [(1, 2, OTHER), (2, 3, FENCE), (3, 4, OTHER)]


def test_done_removes_inputs_and_adds_outputs_at_once(log: Log) -> None:
    log.put("p/in", b"1", b"2")
    log.take("p/in")
    assert log.done("p/in", (1, 3), ports=[port(["p/last.results"], b"one", b"two")]) == ("ok", {"count": 2})
    assert (log.values("p/in"), log.values("p/last.results")) == ([], [b"one", b"two"])
    assert log.done("p/in", (1, 3), ports=[port(["p/last.results"], b"one", b"two")]) == ("already", {"count": 0})
    assert log.values("p/last.results") == [b"one", b"two"]


def test_of_a_done_that_comes_in_part_too_late_the_open_part_counts(log: Log) -> None:
    log.put("p/in", b"1", b"2", b"3", b"4")
    log.done("p/in", (2, 3))
    outputs = port(["p/last.results"], b"3a", b"4a", b"1a", b"2a")
    assert log.done("p/in", (3, 5), (1, 3), ports=[outputs]) == ("ok", {"count": 3})
    assert log.values("p/last.results") == [b"3a", b"4a", b"1a"]


def test_outputs_of_the_open_part_are_told_by_their_counts_at_each_port(log: Log) -> None:
    log.say(commands.put("c1", 0, 1, [port(["p/a"], b"1", b"2", b"3")]))
    log.done("p/a", (1, 2))
    ports = [port(["p/c"], b"c1", b"c3", b"c3'", counts=[1, 0, 2]), port(["p/d"], b"d1", b"d2", counts=[1, 1, 0])]
    assert log.done("p/a", (1, 4), ports=ports) == ("ok", {"count": 2})
    assert (log.values("p/c"), log.values("p/d")) == ([b"c3", b"c3'"], [b"d2"])


def test_a_batch_of_which_a_part_is_done_is_refused_and_goes_back(log: Log) -> None:
    log.put("p/in", b"1", b"2", b"3")
    log.take("p/in")
    log.done("p/in", (2, 3))
    batch = {"ports": [port(["p/last.results"], b"sum")], "whole": True}
    assert log.done("p/in", (1, 4), **batch, fence=OTHER) == ("refused", {"code": "divided"})
    assert not log.queue("p/in").ready, "who has lost an item does not give it back"
    assert log.done("p/in", (1, 4), **batch, fence=FENCE) == ("refused", {"code": "divided"})
    assert list(log.queue("p/in").ready) == [(1, 2), (3, 4)]
    assert log.values("p/last.results") == []
    assert log.queue("p/in").deliveries == {}


def test_a_whole_batch_has_as_many_outputs_as_it_likes(log: Log) -> None:
    log.put("p/in", b"1", b"2", b"3")
    assert log.done("p/in", (1, 4), ports=[port(["p/last.results"], b"sum")], whole=True) == ("ok", {"count": 3})
    assert log.values("p/last.results") == [b"sum"]


def test_outputs_in_parts_are_there_at_once_with_done(log: Log) -> None:
    log.put("p/in", b"1")
    log.take("p/in")
    results = ["p/last.results"]
    assert log.part("p/in", 1, 0, [port(results, b"a", b"b")]) == ("ok", {"parts": 1})
    assert log.part("p/in", 1, 1, [port(results, b"c")]) == ("ok", {"parts": 2})
    assert (log.values("p/last.results"), log.queue("p/last.results").put) == ([], 0)
    assert log.queue("p/last.results").room_taken == 3
    assert log.done("p/in", (1, 2), ports=[port(results, b"d")], whole=True, fence=FENCE, parts=2) == ("ok", {"count": 1})
    assert (log.values("p/last.results"), log.queue("p/last.results").put) == ([b"a", b"b", b"c", b"d"], 4)


def _is_released(log: Log) -> None:
    log.one(commands.release("p/in", [(1, 2)], FENCE))


def _fails(log: Log) -> None:
    log.fail("p/in", 1)


def _is_of_a_session_that_ends(log: Log) -> None:
    log.say(commands.session_end(FENCE.node, FENCE.boot, None, ERROR, 5))


def _is_done_by_somebody_else(log: Log) -> None:
    log.done("p/in", (1, 2))


def _is_discarded(log: Log) -> None:
    log.about("discard", "p/in")


def _begins_anew(log: Log) -> None:
    log.part("p/in", 1, 0, [port(["p/d"], b"x")])


def _is_a_batch_that_was_divided(log: Log) -> None:
    log.put("p/in", b"2")
    log.done("p/in", (2, 3))
    assert log.done("p/in", (1, 3), whole=True, fence=FENCE, parts=1) == ("refused", {"code": "divided"})


@pytest.mark.parametrize("what_happens", [
    _is_released, _fails, _is_of_a_session_that_ends, _is_done_by_somebody_else, _is_discarded, _begins_anew, _is_a_batch_that_was_divided])
def test_parts_vanish_when_their_item(log: Log, what_happens: Callable[[Log], None]) -> None:
    log.put("p/in", b"1")
    log.take("p/in")
    log.part("p/in", 1, 0, [port(["p/last.results"], b"a", b"b")])
    what_happens(log)
    results = log.queue("p/last.results")
    assert (results.next_id, results.put, results.room_taken, len(results.chunks), results.open_bytes) == (3, 0, 0, 0, 0)
    answer = log.done("p/in", (1, 2), ports=[port(["p/last.results"], b"c")], whole=True, fence=FENCE, parts=1)
    assert answer in [("refused", {"code": "stale_fence"}), ("already", {"count": 0}), ("ok", {"count": 1})]
    assert b"a" not in log.values("p/last.results")


def test_parts_count_under_their_fence_alone_and_in_their_order(log: Log) -> None:
    log.put("p/in", b"1")
    log.take("p/in")
    ports = [port(["p/last.results"], b"a")]
    assert log.part("p/in", 1, 0, ports, OTHER) == ("refused", {"code": "stale_fence"})
    assert log.part("p/in", 1, 1, ports) == ("refused", {"code": "sequence", "parts": 0})
    log.part("p/in", 1, 0, ports)
    log.part("p/in", 1, 1, ports)
    assert log.part("p/in", 1, 1, ports) == ("already", {"parts": 2})
    assert log.done("p/in", (1, 2), whole=True, fence=OTHER, parts=2) == ("refused", {"code": "stale_fence"})
    assert log.done("p/in", (1, 2), whole=True, fence=FENCE, parts=3) == ("refused", {"code": "parts_missing"})
    assert list(log.queue("p/in").ready) == [(1, 2)], "what its holder cannot finish goes back"


def test_parts_stay_in_their_pipeline(log: Log) -> None:
    log.put("p/in", b"1")
    log.take("p/in")
    assert log.part("p/in", 1, 0, [port(["w/x"], b"a")]) == ("refused", {"code": "unknown_queue"})


def test_items_that_ran_together_when_their_machine_died_are_counted_and_not_parked(log: Log) -> None:
    log.put("p/in", b"1", b"2", b"3")  # a stage without retries reads it
    log.take("p/in")
    log.say(commands.session_end(FENCE.node, FENCE.boot, {"p/in": [[1, 3], 3]}, ERROR, 5))
    assert (log.queue("p/in").deliveries, list(log.queue("p/in").parked)) == ({1: 1, 2: 1}, [3])


def test_a_key_is_forgotten_when_it_is_old(log: Log) -> None:
    log.put("p/in", b"1", b"2", keys=["a", "b"])
    before_ms = log.at_ms + 1
    log.put("p/in", b"3", keys=["c"])
    forget = Message("forget_keys", {"queue": "p/in", "before_ms": before_ms})
    assert [log.one(forget), log.one(forget)] == [("ok", {"count": 2}), ("already", {"count": 0})]
    assert log.put("p/in", b"1", b"3", keys=["a", "c"])[1]["added"] == 1


@pytest.mark.parametrize("state", ["ready", "leased to another", "delayed"])
def test_a_done_is_welcome_from_whoever_comes_first(log: Log, state: str) -> None:
    log.say(commands.put("c1", 0, 1, [port(["p/a"], b"1")]))
    if state != "ready":
        log.take("p/a", fence=OTHER)
    if state == "delayed":
        log.fail("p/a", 1, OTHER)
        assert list(log.queue("p/a").delayed) == [1]
    assert log.done("p/a", (1, 2)) == ("ok", {"count": 1})
    assert log.queue("p/a").open_count == 0


def test_a_parked_item_is_not_done(log: Log) -> None:
    log.put("p/in", b"1")
    log.take("p/in")
    log.fail("p/in", 1)
    assert log.done("p/in", (1, 2), ports=[port(["p/last.results"], b"x")]) == ("already", {"count": 0})
    assert (list(log.queue("p/in").parked), log.values("p/last.results")) == ([1], [])


def test_only_the_fence_of_a_lease_gives_it_back(log: Log) -> None:
    log.put("p/in", b"1", b"2")
    log.take("p/in")
    assert log.one(commands.release("p/in", [(1, 3)], OTHER)) == ("already", {"count": 0})
    assert log.one(commands.release("p/in", [(1, 3)], FENCE._replace(seq=2))) == ("already", {"count": 0})
    assert log.one(commands.release("p/in", [(2, 9)], FENCE)) == ("ok", {"count": 1})
    assert list(log.queue("p/in").ready) == [(2, 3)]
    assert log.queue("p/in").deliveries == {}


@pytest.mark.parametrize(
    "message",
    [
        commands.take("p/none", [(1, 2)], FENCE),
        commands.release("p/none", [(1, 2)], FENCE),
        commands.done("p/none", [(1, 2)], []),
        commands.fail("p/none", 1, FENCE, ERROR, 0),
        Message("due", {"queue": "p/none", "ids": [1]}),
        Message("retry", {"queue": "p/none", "ids": None}),
        Message("discard", {"queue": "p/none", "ids": None}),
        commands.done("p/in", [(1, 2)], [port(["p/none"], b"x")]),
    ],
)
def test_a_queue_that_is_not_there_is_no_accident(log: Log, message: Message) -> None:
    log.put("p/in", b"1")
    assert log.one(message) == ("refused", {"code": "unknown_queue"})
    assert log.values("p/in") == [b"1"]


# --- Failures --------------------------------------------------------------------------------------------------------


def test_where_no_stage_reads_a_queue_who_took_the_item_says_how_often_it_is_tried(log: Log) -> None:
    """With each failure, since it may be another one the next time; a stage's own word goes over that."""

    def failed(queue: str, item_id: int, retries: int) -> bool:
        log.take(queue)
        message = commands.fail(queue, item_id, FENCE, ERROR, 50)
        _, fields = log.one(message._replace(fields={**message.fields, "retries": retries}))
        log.about("due", queue, [item_id])
        return bool(fields["parked"])

    log.say(commands.put("c1", 0, 1, [port(["p/d", "p/a"], b"1", b"2")]))
    assert [failed("p/d", 1, 2), failed("p/d", 1, 3), failed("p/d", 1, 2)] == [False, False, True]
    assert log.queue("p/d").parked[1].deliveries == 3
    log.take("p/d")
    assert log.fail("p/d", 2) == ("ok", {"parked": True}), "without a word it is not tried again"
    assert [failed("p/a", 1, 9), failed("p/a", 1, 9)] == [False, True]


def test_an_item_is_parked_after_its_last_delivery(log: Log) -> None:
    """`left` has one retry."""
    log.say(commands.put("c1", 0, 1, [port(["p/a"], b"1", b"2")]))
    log.take("p/a")
    assert log.fail("p/a", 1) == ("ok", {"parked": False})
    assert (log.queue("p/a").delayed, log.queue("p/a").deliveries) == ({1: log.at_ms + 50}, {1: 1})
    assert log.take("p/a") == ("already", {"count": 0}), "a delayed item is not ready"
    assert log.about("due", "p/a", [1, 2, 1]) == ("ok", {"count": 1})
    log.take("p/a")
    assert log.fail("p/a", 1) == ("ok", {"parked": True})
    (parked,) = log.queue("p/a").parked.values()
    assert (parked.deliveries, parked.at_ms, parked.error, parked.run) == (2, log.at_ms, ERROR, 1)
    assert (log.queue("p/a").deliveries, log.queue("p/a").open_count) == ({}, 1)


def test_a_stale_fence_counts_nothing(log: Log) -> None:
    log.put("p/in", b"1")
    assert log.fail("p/in", 1) == ("refused", {"code": "stale_fence"})
    log.take("p/in")
    assert log.fail("p/in", 1, OTHER) == ("refused", {"code": "stale_fence"})
    assert log.fail("p/in", 7) == ("refused", {"code": "stale_fence"})
    assert log.queue("p/in").open_count == 1


def test_what_carries_a_token_happens_once_and_is_answered_as_before(log: Log) -> None:
    parked_log(log)
    retry = Message("retry", {"queue": "p/in", "ids": None, "once": "r1"})
    assert log.one(retry) == ("ok", {"count": 3})
    log.take("p/in", fence=OTHER)
    for item_id in (1, 2, 3):
        while item_id not in log.queue("p/in").parked:
            log.fail("p/in", item_id, OTHER)
            log.say(Message("due", {"queue": "p/in", "ids": [item_id]}))
            log.take("p/in", fence=OTHER)
    assert log.one(retry) == ("already", {"count": 3})
    assert len(log.queue("p/in").parked) == 3, "parked again, and not retried by an answer that was lost"
    discard = Message("discard", {"queue": "p/in", "ids": None, "once": "r1"})
    assert log.one(discard) == ("ok", {"count": 3}), "another kind's token is another one"


def test_a_run_that_was_started_by_a_token_is_not_started_again_by_it(log: Log) -> None:
    log.end_run()
    start = Message("start_run", {"pipeline": "p", "params": None, "once": "s1"})
    assert log.one(start) == ("ok", {"run": 2})
    log.end_run()
    assert log.one(start) == ("already", {"run": 2}) and log.run_of("p") == (2, "done")
    other = start._replace(fields={**start.fields, "once": "s2"})
    assert log.one(other) == ("ok", {"run": 3})
    assert log.one(other._replace(fields={**other.fields, "once": "s3"})) == ("refused", {"code": "running", "run": 3})
    log.end_run()
    assert log.one(other._replace(fields={**other.fields, "once": "s3"})) == ("ok", {"run": 4}), "what is refused is not remembered"


def test_the_end_of_a_session_counts_what_ran_and_gives_back_the_rest(log: Log) -> None:
    log.say(commands.put("c1", 0, 1, [port(["p/a", "p/b"], b"1", b"2", b"3")]))
    log.take("p/a", (1, 3))
    log.take("p/a", (3, 4), fence=OTHER)
    log.take("p/b", (1, 3))
    ended = commands.session_end("n1", "b1", {"p/a": [2, 3], "p/b": [1]}, ERROR, 9)
    assert log.one(ended) == ("ok", {"released": 2, "counted": 2})
    assert (list(log.queue("p/a").ready), log.queue("p/a").delayed) == ([(1, 2)], {2: log.at_ms + 9})
    assert list(log.queue("p/a").leases) == [(3, 4, OTHER)]
    assert list(log.queue("p/b").parked) == [1]
    assert log.one(ended) == ("ok", {"released": 0, "counted": 0})


def parked_log(log: Log) -> Log:
    log.put("p/in", b"1", b"2", b"3")
    log.take("p/in")
    for item_id in (1, 2, 3):
        log.fail("p/in", item_id)
    return log


def test_a_retry_gives_a_parked_item_all_its_deliveries_again(log: Log) -> None:
    parked_log(log)
    assert log.about("retry", "p/in", [3, 1, 3, 9]) == ("ok", {"count": 2})
    assert (list(log.queue("p/in").ready), list(log.queue("p/in").parked)) == ([(1, 2), (3, 4)], [2])
    assert log.about("retry", "p/in") == ("ok", {"count": 1})
    assert log.about("retry", "p/in") == ("already", {"count": 0})
    assert log.values("p/in") == [b"1", b"2", b"3"]
    assert log.queue("p/in").deliveries == {}


def test_discard_drops_parked_items_by_id_and_everything_without(log: Log) -> None:
    parked_log(log)
    log.put("p/in", b"4")
    assert log.about("discard", "p/in", [2, 2, 4]) == ("ok", {"count": 1})
    assert log.about("discard", "p/in") == ("ok", {"count": 3})
    queue = log.queue("p/in")
    assert (queue.open_count, len(queue.parked), len(queue.chunks), queue.done, queue.put) == (0, 0, 0, 0, 4)
    log.put("p/in", b"5")
    assert list(queue.ready) == [(5, 6)], "ids are not used again"


def test_a_cluster_that_was_given_nothing_dissolves_and_refuses_everything_after(log: Log) -> None:
    assert log.one(Message("dissolve", {"into": "other"})) == ("ok", {})
    assert log.put("p/in", b"a") == ("refused", {"code": "moved", "into": "other"})
    assert log.state.moved_to == "other"


def test_a_cluster_that_was_given_something_stays(log: Log) -> None:
    log.put("p/in", b"a")
    assert log.one(Message("dissolve", {"into": "other"})) == ("refused", {"code": "has_work"})
    assert log.state.moved_to is None


def test_of_two_clusters_that_would_both_give_way_one_stays(log: Log) -> None:
    """Whoever has accepted another is counted on."""
    log.one(Message("accept", {"cluster": "other"}))
    assert log.one(Message("dissolve", {"into": "other"})) == ("refused", {"code": "accepted_another"})


def test_parked_items_take_no_room_in_a_queue(log: Log) -> None:
    """Else a few large ones would hold back the stage before it forever."""
    parked_log(log)
    assert log.queue("p/in").open_bytes == 0
    log.about("retry", "p/in", [2])
    assert log.queue("p/in").open_bytes == 1
    log.about("discard", "p/in", [1])
    assert log.queue("p/in").open_bytes == 1
    log.done("p/in", (2, 3))
    assert log.queue("p/in").open_bytes == 0


# --- Sources ---------------------------------------------------------------------------------------------------------


def assign(shard: int = 0) -> Message:
    return Message("assign", {"pipeline": "p", "stage": "gen", "shard": shard, "node": "n1", "boot": "b1"})


def source_put(
    epoch: int, seq: int, *bodies: bytes, shard: int = 0, run: int = 1, cursor: bytes | None = None, **source: Any
) -> Message:
    ports = [port(["p/a", "p/b"], *bodies)] if bodies else []
    return commands.put(source_key("p", run, "gen", shard), epoch, seq, ports, source, cursor)


def test_an_assignment_tells_a_source_where_it_stands_and_cuts_off_the_one_before(log: Log) -> None:
    (first,) = log.say(assign())
    assert first.fields == {"producer": "source:p/1/gen/0", "epoch": 1, "seq": 0, "count": 0, "hash": ""}
    assert first.cursor is None
    log.say(source_put(1, 1, b"one", count=1, hash="h1", cursor=b"c1"), source_put(1, 2, b"two", count=2, hash="h2"))
    (second,) = log.say(assign())
    assert second.fields == {"producer": "source:p/1/gen/0", "epoch": 2, "seq": 2, "count": 2, "hash": "h2"}
    assert second.cursor == b"c1"
    assert log.one(source_put(1, 3, b"late")) == ("refused", {"code": "stale_epoch", "epoch": 2})
    assert log.one(source_put(2, 3, b"three")) == ("ok", {"seq": 3, "added": 2})


def test_a_source_puts_only_once_it_is_assigned(log: Log) -> None:
    assert log.one(source_put(1, 1, b"x")) == ("refused", {"code": "unknown_producer"})


def test_a_source_that_has_ended_puts_nothing_more(log: Log) -> None:
    log.say(assign(), source_put(1, 1, b"x"), source_put(1, 2, finished=True))
    assert log.one(source_put(1, 2, finished=True)) == ("already", {"seq": 2})
    assert log.one(source_put(1, 3, b"late")) == ("refused", {"code": "finished", "seq": 2})
    assert log.values("p/a") == [b"x"]


def test_a_closed_source_is_cut_off_and_finished(log: Log) -> None:
    log.say(assign(), Message("close", {"pipeline": "p", "name": "gen"}))
    assert log.one(source_put(1, 1, b"x")) == ("refused", {"code": "stale_epoch", "epoch": 2})
    assert log.one(assign()) == ("already", {"finished": True})
    assert log.one(assign(1)) == ("already", {"finished": True})


# --- Done, runs, versions --------------------------------------------------------------------------------------------


def test_a_run_is_done_when_every_shard_is_finished_and_nothing_is_open(log: Log) -> None:
    log.say(assign(0), assign(1), Message("close", {"pipeline": "p", "name": "in"}))
    log.say(source_put(1, 1, b"1"), source_put(1, 2, finished=True))
    assert log.run_of("p") == (1, "running")
    log.say(source_put(1, 1, finished=True, shard=1))
    log.done("p/a", (1, 2))
    log.take("p/b")
    assert log.run_of("p") == (1, "running")
    log.done("p/b", (1, 2), ports=[port(["p/c"], b"x")])
    log.take("p/c")
    log.fail("p/c", 1)
    assert log.run_of("p") == (1, "running"), "a delayed item is open"
    log.done("p/c", (1, 2))
    assert log.run_of("p") == (1, "done")
    assert log.state.pipelines["p"].done_ms == log.at_ms


def test_an_open_queue_that_is_fed_from_outside_keeps_a_run_from_being_done(log: Log) -> None:
    assert log.run_of("w") == (1, "running")
    log.put("w/x", b"1")
    log.say(Message("close", {"pipeline": "w", "name": "x"}))
    assert log.run_of("w") == (1, "running")
    log.done("w/x", (1, 2))
    assert log.run_of("w") == (1, "done")


def test_parked_items_do_not_keep_a_run_from_being_done_and_a_retry_opens_it_again(log: Log) -> None:
    log.put("w/x", b"1")
    log.say(Message("close", {"pipeline": "w", "name": "x"}))
    for _ in range(2):
        log.take("w/x")
        log.fail("w/x", 1)
        log.about("due", "w/x", [1])
    assert log.run_of("w") == (1, "done")
    assert log.state.parked_of_run(log.state.pipelines["w"]) == 1
    log.about("retry", "w/x")
    assert log.run_of("w") == (1, "running")
    log.done("w/x", (1, 2))
    assert log.run_of("w") == (1, "done")


def test_the_next_run_begins_anew_and_keeps_what_is_parked(log: Log) -> None:
    parked_log(log)
    log.put("p/d", b"for a reader")
    log.done("p/in", (1, 2))
    log.say(assign(), source_put(1, 1, b"x", count=1))
    log.put("p/last.results", b"a result")
    log.say(*(Message("close", {"pipeline": "p", "name": name}) for name in ("gen", "in")))
    for name in ("p/a", "p/b"):
        log.about("discard", name)
    assert log.one(Message("start_run", {"pipeline": "p", "params": {"n": 1}})) == ("ok", {"run": 2})
    assert log.one(Message("start_run", {"pipeline": "p", "params": None})) == (
        "refused",
        {"code": "running", "run": 2},
    )
    assert log.values("p/last.results") == []
    assert log.values("p/d") == [b"for a reader"]
    assert list(log.queue("p/in").parked) == [1, 2, 3]
    assert log.state.parked_of_run(log.state.pipelines["p"]) == 0
    (assigned,) = log.say(assign())
    assert (assigned.fields["producer"], assigned.fields["count"]) == ("source:p/2/gen/0", 0)
    assert log.put("p/in", b"again")[0] == "ok", "the queue is open again"


def roll_out(log: Log, version: str) -> None:
    """A new version, to its end."""
    number = log.say(*deployment(version))[-1].fields["rollout"]
    log.say(Message("roll", {"pipeline": "p", "rollout": number, "node": "n1"}), Message("rolled_out", {"pipeline": "p", "rollout": number}))


def rolling(log: Log) -> dict[str, Any]:
    """What names the roll-out that is under way."""
    rollout = log.state.pipelines["p"].rollout
    assert rollout is not None
    return {"pipeline": "p", "rollout": rollout.number}


FAILURE = {"node": "host", "stage": "left", "text": "does not start: No module named 'nowhere'"}


def test_a_new_version_keeps_items_and_the_last_two_versions(log: Log) -> None:
    log.put("p/d", b"kept")
    roll_out(log, "v2")
    assert log.state.pipelines["p"].previous == ["v1"]
    assert log.values("p/d") == [b"kept"]
    assert (log.state.bundle_parts("v1"), log.state.bundle_parts("v2")) != (None, None)
    roll_out(log, "v3")
    assert log.state.pipelines["p"].previous == ["v2", "v1"]
    assert log.state.bundle_parts("v1") is None
    assert log.state.bundle_parts("v2") is not None
    assert log.one(deployment("v1")[-1]) == ("refused", {"code": "parts_missing"})


def test_a_queue_that_the_new_version_does_not_name_is_nobodys(log: Log) -> None:
    """As after a start, when only the current version's manifest is known."""
    roll_out(log, "v2")
    queue = log.queue("p/last.results")
    assert (queue.read_by, queue.results, queue.maxsize, queue.bytes_max) == (None, False, None, None)
    assert log.queue("p/kept.results").results


def test_the_same_version_again_changes_nothing_that_counts(log: Log) -> None:
    assert log.say(*deployment("v1"))[-1].fields == {"run": 1, "state": "running", "rollout": None}
    assert log.state.pipelines["p"].previous == []


def test_a_version_goes_over_the_nodes_one_by_one_and_the_others_run_the_former_one(log: Log) -> None:
    log.say(*deployment("v2"))
    pipeline = log.state.pipelines["p"]
    assert (pipeline.version, pipeline.version_on("n1"), pipeline.on("n1").manifest) == ("v2", "v1", MANIFESTS["v1"])
    assert log.one(Message("roll", {**rolling(log), "node": "n1"})) == ("ok", {"nodes": 1})
    assert log.one(Message("roll", {**rolling(log), "node": "n1"})) == ("already", {})
    assert (pipeline.version_on("n1"), pipeline.version_on("n2")) == ("v2", "v1")
    assert log.one(Message("rolled_out", rolling(log))) == ("ok", {})
    pipeline = log.state.pipelines["p"]
    assert (pipeline.version_on("n2"), pipeline.rolled) == ("v2", {"version": "v2", "nodes": 1, "failure": None})


def test_while_a_version_is_rolled_out_queues_of_both_have_their_readers(log: Log) -> None:
    log.say(*deployment("v3"))
    assert (log.queue("p/a").read_by, log.queue("p/d").read_by) == ("right", "watch"), "as the new version says"
    assert (log.queue("p/b").read_by, log.queue("p/last.results").results) == ("right", True), "as the former one does, alone"
    log.say(Message("rolled_out", rolling(log)))
    assert (log.queue("p/b").read_by, log.queue("p/last.results").results) == (None, False)


def test_a_version_that_does_not_start_goes_back_with_what_came_with_it(log: Log) -> None:
    roll_out(log, "v2")
    before = log.state.pipelines["p"]
    log.say(*deployment("v3"))
    log.say(Message("roll", {**rolling(log), "node": "n1"}))
    assert log.one(Message("roll_back", {**rolling(log), "failure": FAILURE})) == ("ok", {})
    after = log.state.pipelines["p"]
    assert (after.release, after.previous, after.rollout) == (before.release, ["v1"], None)
    assert after.rolled == {"version": "v3", "nodes": 1, "failure": FAILURE}
    assert (log.state.bundle_parts("v3"), log.state.bundle_parts("v2") is None, log.queue("p/d").read_by) == (None, False, None)
    assert log.say(*deployment("v3"))[-1].result == "ok", "it may be tried again"
    assert log.state.pipelines["p"].rolled is None


def test_what_was_decided_about_another_roll_out_does_nothing(log: Log) -> None:
    log.say(*deployment("v2"))
    late = rolling(log)
    log.say(*deployment("v3"))
    for kind, more in (("roll", {"node": "n1"}), ("rolled_out", {}), ("roll_back", {"failure": FAILURE})):
        assert log.one(Message(kind, {**late, **more})) == ("already", {})
    assert log.state.pipelines["p"].version == "v3"


def test_a_version_takes_the_place_of_one_that_is_still_rolled_out(log: Log) -> None:
    """Whoever has the middle one goes back to what ran before it, until it is his turn."""
    log.say(*deployment("v2"))
    log.say(Message("roll", {**rolling(log), "node": "n1"}))
    log.say(*deployment("v3"))
    pipeline = log.state.pipelines["p"]
    assert (pipeline.version_on("n1"), pipeline.previous, log.state.bundle_parts("v2")) == ("v1", ["v1"], None)
    log.say(*deployment("v1"))
    pipeline = log.state.pipelines["p"]
    assert (pipeline.version_on("n1"), pipeline.rollout, pipeline.previous) == ("v1", None, []), "all have run that, and nothing is to be tried"


def test_a_deployment_that_is_said_again_goes_on_where_it_was(log: Log) -> None:
    log.say(*deployment("v2"))
    log.say(Message("roll", {**rolling(log), "node": "n1"}))
    before = log.state.pipelines["p"].rollout
    assert log.say(*deployment("v2"))[-1].fields["rollout"] == rolling(log)["rollout"]
    assert log.state.pipelines["p"].rollout == before
    log.say(Message("rolled_out", rolling(log)))
    assert log.say(*deployment("v2"))[-1].fields["rollout"] is None
    assert log.state.pipelines["p"].rolled == {"version": "v2", "nodes": 1, "failure": None}


def test_without_a_run_there_is_nothing_to_roll_out(log: Log) -> None:
    log.say(Message("close", {"pipeline": "w", "name": "x"}))
    assert log.state.pipelines["w"].state == "done"
    other = deployment("w1")
    other = [message._replace(fields={**message.fields, "version": "w2"}) for message in other]
    assert log.say(*other)[-1].fields == {"run": 1, "state": "done", "rollout": None}
    assert (log.state.pipelines["w"].version, log.state.pipelines["w"].previous) == ("w2", ["w1"])


def test_parts_that_are_on_their_way_outlast_the_deployment_of_others(log: Log) -> None:
    (first, second, deploy) = deployment("v2")
    log.say(first, *deployment("w1"))
    assert log.state.uploads() == {"v2": 1}
    assert log.say(second, deploy)[-1].result == "ok"
    assert log.state.uploads() == {}


def test_parts_that_nobody_went_on_with_are_forgotten_when_the_leader_says_so(log: Log) -> None:
    log.say(deployment("v2")[0])
    assert log.one(Message("forget_uploads", {"versions": ["v2", "v1", "nothing"]})) == ("ok", {"count": 1})
    assert log.one(Message("forget_uploads", {"versions": ["v2"]})) == ("already", {"count": 0})
    assert log.state.bundle_parts("v1") is not None


# --- The end of a pipeline -------------------------------------------------------------------------------------------


def undeploy(log: Log, pipeline: str = "p", discard: bool = False) -> tuple[str, dict[str, Any]]:
    return log.one(Message("undeploy", {"pipeline": pipeline, "discard": discard}))


def test_a_pipeline_with_items_is_not_undeployed_unless_told(log: Log) -> None:
    log.put("p/in", b"1", b"2", b"3")
    log.take("p/in", (1, 3))
    log.fail("p/in", 1)
    log.done("p/in", (2, 3), ports=[port(["p/last.results"], b"kept")])
    assert undeploy(log) == ("refused", {"code": "items_remain", "open": 2, "parked": 1})
    assert undeploy(log, discard=True) == ("ok", {"open": 2, "parked": 1})
    assert undeploy(log) == ("already", {})


def test_of_an_undeployed_pipeline_nothing_is_left_and_others_do_not_notice(log: Log) -> None:
    log.put("w/x", b"of the other")
    log.put("p/in", b"1", keys=["k"])
    log.say(assign())
    assert undeploy(log, discard=True)[0] == "ok"
    state = log.state
    assert (list(state.queues), list(state.pipelines)) == (["w/x"], ["w"])
    assert not [key for key in state.producers if key.startswith("source:")]
    assert (state.bundle_parts("v1"), state.bundle_parts("w1") is None) == (None, False)
    assert log.values("w/x") == [b"of the other"]
    assert state.body_memory_bytes == len(b"of the other")
    assert undeploy(log, "w") == ("refused", {"code": "items_remain", "open": 1, "parked": 0})


def test_ids_and_runs_of_an_undeployed_pipeline_are_never_used_again(log: Log) -> None:
    """Somebody who was away meanwhile may still say what he did with them."""
    log.put("p/in", b"1", b"2")
    log.take("p/in", (1, 3))
    undeploy(log, discard=True)
    log.say(*deployment("v1"), Message("start_run", {"pipeline": "p", "params": None}))
    log.put("p/in", b"new")
    assert (log.values("p/in"), log.queue("p/in").next_id, log.state.pipelines["p"].run) == ([b"new"], 4, 2)
    assert log.done("p/in", (1, 3)) == ("already", {"count": 0})
    assert log.values("p/in") == [b"new"]


def test_rows_of_an_undeployed_pipeline_go_and_come_back_with_the_next_of_its_name(log: Log) -> None:
    log.put("p/in", b"1", keys=["k"])
    log.take("p/in", (1, 2))
    log.fail("p/in", 1)
    log.state.rows_changed()
    log.state.rows_written()
    undeploy(log, discard=True)
    rows = log.state.rows_changed()
    tables = ("queues", "chunks", "leases", "keys", "parked", "parts")
    assert all(rows[table][("p/in",)] is None for table in tables)
    assert rows["projects"] == {("p",): ("", 1, "ended", 0, 0, 0, '{"first_id": 2}')}
    log.say(*deployment("v1"))
    rows = log.state.rows_changed()
    assert (rows["queues"][("p/in",)], rows["chunks"][("p/in",)]) == ((2, 0, 0, 0), None)
    assert log.state.all_rows()["queues"][("p/in",)] == (2, 0, 0, 0)


# --- Order, time, hashes ---------------------------------------------------------------------------------------------


def test_an_entry_is_applied_once(log: Log) -> None:
    with pytest.raises(AssertionError, match="already"):
        log.state.apply(log.state.applied_idx, 1, 0, b"")


def test_time_never_goes_back(log: Log) -> None:
    log.state.skip(10, 2, 500)
    log.state.skip(11, 2, 400)
    assert (log.state.at_ms, log.state.applied_term) == (500, 2)


def test_the_hash_tells_outcomes_apart() -> None:
    one, same, other = Log(), Log(), Log()
    one.put("p/in", b"1")
    same.put("p/in", b"1")
    assert one.state.hash == same.state.hash
    other.put("p/nowhere", b"1")
    assert one.state.hash != other.state.hash


# --- Chunks ----------------------------------------------------------------------------------------------------------


def test_bodies_beyond_the_budget_are_not_kept() -> None:
    log = Log(body_memory_bytes_max=10)
    log.put("p/in", b"12345")
    log.put("p/in", b"123456")
    log.put("p/in", b"1234")
    assert [chunk.body is not None for chunk in log.queue("p/in").chunks] == [True, False, True]
    assert log.state.body_memory_bytes == 9
    log.done("p/in", (1, 2))
    assert log.state.body_memory_bytes == 4


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_small_item_does_not_keep_a_large_entry_in_memory(memory: int) -> None:
    log = Log(memory)
    small = Port(["p/d", "w/x"], lengths_blob([1]), b"s", None, b'["k"]')
    entry = bytearray(entry_body([commands.put("c1", 0, 1, [small, port(["p/in"], b"l" * 1_000_000)])]))
    log.state.apply(2, 1, 2, entry)
    log.done("p/in", (1, 2))
    entry.clear()  # BufferError while anything looks into it
    assert log.queue("p/d").ready


def test_small_chunks_that_no_row_has_yet_become_one() -> None:
    log = Log()
    for number in range(20):
        log.put("p/in", b"%d" % number)
    log.take("p/in", (3, 5))
    log.done("p/in", (7, 8))
    before = log.values("p/in")
    log.state.coalesce()
    assert [(chunk.first, chunk.count) for chunk in log.queue("p/in").chunks] == [(1, 6), (8, 13)]
    assert log.values("p/in") == before
    assert len(log.state.rows_changed()["chunks"]) == 2
    log.state.rows_written()
    log.state.coalesce()
    assert len(log.queue("p/in").chunks) == 2


def test_chunks_with_keys_or_parked_items_stay_by_themselves(log: Log) -> None:
    for number in range(12):
        log.put("p/in", b"%d" % number, keys=["k"] if number == 5 else None)
    log.take("p/in", (3, 4))
    log.fail("p/in", 3)
    log.state.coalesce()
    assert [chunk.first for chunk in log.queue("p/in").chunks] == [1, 3, 4, 6, 7]


def test_a_chunk_is_cut_anywhere() -> None:
    bodies = [b"a" * size for size in (3, 0, 5, 1, 0, 2)]
    chunk = Chunk(10, 6, 1, 0, lengths_blob(map(len, bodies)), b"".join(bodies), 11, 1, 0, None)
    for lo, hi in [(10, 16), (10, 11), (11, 13), (13, 16), (12, 13), (10, 12), (15, 16)]:
        assert values_of(*chunk.slice(lo, hi)) == bodies[lo - 10 : hi - 10]
    with pytest.raises(AssertionError, match="outside"):
        chunk.slice(9, 11)


def test_chunks_go_from_the_front_and_from_anywhere() -> None:
    index = ChunkIndex()
    chunks = [Chunk(1 + 2 * n, 2, 1, 0, None, None, 2, n, 0, None) for n in range(300)]
    for chunk in chunks:
        index.append(chunk)
    left = list(chunks)
    for at in [0] * 150 + [5, 100, 3] + [0] * 60:
        index.remove(left.pop(at))
        assert list(index) == left
        assert len(index) == len(left)
        lo = left[0].first
        assert index.overlap(lo - 1, lo + 5) == [chunk for chunk in left if chunk.first < lo + 5]
    with pytest.raises(AssertionError, match="order"):
        index.append(chunks[0])
    with pytest.raises(AssertionError, match="not in the queue"):
        index.remove(chunks[0])


def test_the_oldest_item_is_the_first_that_is_not_finished(log: Log) -> None:
    assert log.queue("p/in").oldest_ms() is None
    log.put("p/in", b"1")
    first_ms = log.at_ms
    log.put("p/in", b"2")
    assert log.queue("p/in").oldest_ms() == first_ms
    log.done("p/in", (1, 2))
    assert log.queue("p/in").oldest_ms() == log.at_ms - 1


# --- The small commands ----------------------------------------------------------------------------------------------


def test_on_done_is_noted_once_for_each_run(log: Log) -> None:
    ran = Message("on_done_ran", {"pipeline": "p", "run": 1})
    assert log.one(ran) == ("ok", {})
    assert log.one(ran) == ("already", {})
    assert log.one(Message("on_done_ran", {"pipeline": "none", "run": 1})) == ("already", {})


def test_a_forgotten_client_begins_again(log: Log) -> None:
    log.put("p/in", b"1")
    log.say(Message("forget", {"producers": ["c1", "c7"]}))
    assert log.one(client_put("p/in", 2, b"2")) == ("refused", {"code": "sequence", "seq": 0})
    assert log.one(client_put("p/in", 1, b"2", epoch=5))[0] == "ok"


def test_a_member_is_what_it_last_said(log: Log) -> None:
    for cores in (1, 2):
        log.say(Message("member", {"node": "n1", "name": "host", "facts": {"cores": cores}}))
    assert log.state.members == {"n1": {"name": "host", "facts": {"cores": 2}}}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (Message("close", {"pipeline": "none", "name": "x"}), "unknown_pipeline"),
        (Message("close", {"pipeline": "p", "name": "nothing"}), "unknown_name"),
        (Message("start_run", {"pipeline": "none", "params": None}), "unknown_pipeline"),
        (Message("assign", {"pipeline": "none", "stage": "gen", "shard": 0, "node": "n", "boot": "b"}), "not_running"),
        (Message("assign", {"pipeline": "p", "stage": "none", "shard": 0, "node": "n", "boot": "b"}), "not_running"),
    ],
)
def test_what_is_not_there_is_refused(log: Log, message: Message, code: str) -> None:
    assert log.one(message) == ("refused", {"code": code})
