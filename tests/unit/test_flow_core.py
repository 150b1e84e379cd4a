"""Rates, delays, ticks and processes that make way, with a leader, machines' halves and a clock of the test's own."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from p2pcluster.core.codec import Message
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.pacing import burst_of, interval_ns_of
from p2pcluster.core.stages import Queue, sink, source, stage
from tests import hostile
from tests.flow import WALL_MS, Flow


def nothing(value: Any) -> Any:
    return value


def of(*flows: Any) -> dict[str, Any]:
    return Pipeline("f", *flows).manifest()


def assert_kept(rate: str, gone_ms: list[int]) -> None:
    """Over no window more went through than the rate and one burst."""
    interval_ns = interval_ns_of(rate)
    for at, first_ms in enumerate(gone_ms):
        for count, last_ms in enumerate(gone_ms[at:], 1):
            assert count <= burst_of(interval_ns) + (last_ms - first_ms) * 1e6 / interval_ns + 1e-6, (first_ms, last_ms, count)


# ---- rates


@pytest.mark.parametrize(("rate", "seconds", "count"), [("5/s", 12, 60), ("50/s", 6, 300), ("1000/s", 2, 2_000)])
def test_a_stage_is_given_what_its_rate_allows_on_all_machines_together_and_no_less(rate: str, seconds: int, count: int) -> None:
    flow = Flow(of(Queue("in", maxsize=None) >> sink(nothing, name="S", rate=rate, processes=4)), Random(0), machines=2)
    for at in range(0, count * 2, 1000):
        flow.put("in", [b"v"] * min(1000, count * 2 - at))
    flow.pass_time(400)  # for the processes to be there
    began = len(flow.ran)
    flow.pass_time(1_000 * seconds)
    assert_kept(rate, [ran_ms for ran_ms, _, _ in flow.ran][:1500])
    assert 0.95 * count <= len(flow.ran) - began <= count + burst_of(interval_ns_of(rate))


def test_no_more_than_the_burst_waits_on_a_machine_for_its_turn() -> None:
    flow = Flow(of(Queue("in", maxsize=None) >> sink(nothing, name="S", rate="5/s", processes=1)), Random(0))
    flow.put("in", [b"v"] * 1000)
    for _ in range(100):
        flow._tick(20)  # nobody runs anything
        assert len(flow.queue("in").leases) <= 2
    assert_kept("5/s", [])


def test_the_next_leader_goes_on_with_the_bucket_of_the_one_before() -> None:
    flow = Flow(of(Queue("in", maxsize=None) >> sink(nothing, name="S", rate="100/s", processes=1)), Random(0))
    flow.put("in", [b"v"] * 1000)
    for _ in range(12):
        flow.pass_time(140)
        flow.lead()
    assert_kept("100/s", [ran_ms for ran_ms, _, _ in flow.ran])
    assert len(flow.ran) > 100


def test_a_first_item_does_not_wait_for_a_slow_rate() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", rate="5/h", processes=1)), Random(0))
    flow.pass_time(2_000)
    flow.put("in", [b"v"] * 3)
    flow.pass_time(100)
    assert len(flow.ran) == 1
    flow.lead()
    flow.pass_time(60_000, 1_000)
    assert len(flow.ran) == 1
    flow.pass_time(700_000, 1_000)
    assert len(flow.ran) == 2


def test_a_source_emits_what_its_rate_allows_and_its_end_is_no_item() -> None:
    flow = Flow(of(source(nothing_at_all, name="G", rate="20/s") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.sources["G"] = [b"%d" % number for number in range(70)]
    came_ms = []
    for _ in range(200):
        before = flow.queue("S").put
        flow.pass_time(20)
        came_ms += [flow.now_ms] * (flow.queue("S").put - before)
    assert len(came_ms) == 70
    assert 3_200 < came_ms[-1] - came_ms[0] < 3_700
    assert flow.is_done


@pytest.mark.parametrize("what", ["stage", "source"])
def test_on_a_slow_disk_the_rate_is_kept_by_the_times_in_the_log(what: str) -> None:
    """What is let go is stamped when it is written: whoever went by the time at which it was let go would find the next one early."""
    if what == "stage":
        flow = Flow(of(Queue("in", maxsize=None) >> sink(nothing, name="S", rate="8/s", processes=2)), Random(0))
        flow.put("in", [b"v"] * 100)
    else:
        flow = Flow(of(source(emits_numbers, name="G", rate="8/s", processes=2) >> sink(nothing, name="S", processes=1)), Random(0))
        flow.sources["G"] = [b"v"] * 100
    stamped: list[int] = []
    pace, commit = flow.state._pace, flow._commit

    def noted(pipeline: str, name: str, interval_ns: int, count: int, context: Any) -> None:
        stamped.extend([context.at_ms] * count)
        pace(pipeline, name, interval_ns, count, context)

    flow.state._pace = noted  # type: ignore[method-assign]
    flow._commit = lambda: flow.random.random() < 0.1 and commit()  # type: ignore[method-assign]
    flow.pass_time(12_000)
    assert len(stamped) > 20
    if what == "stage":
        assert_kept("8/s", stamped)
    else:
        assert all(later >= earlier for earlier, later in zip(stamped, stamped[1:], strict=False))
        assert len(stamped) <= 8 * (stamped[-1] - stamped[0]) / 1000 + 4, "a batch of the test's source may be three"


def emits_numbers(shard: int, shards: int) -> Any:
    yield from ()


def nothing_at_all() -> Any:
    yield from ()


def test_a_node_without_rates_looks_at_no_bucket() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.node._pacers = None  # type: ignore[assignment]  # whoever asks it anything fails
    flow.node._pacers = type("Nobody", (), {"is_due": lambda self, now_ms: False})()  # type: ignore[assignment]
    flow.put("in", [b"v"] * 100)
    flow.pass_time(200)
    assert len(flow.ran) == 100


# ---- delays


def test_what_is_put_with_a_delay_is_given_to_nobody_before_and_soon_after() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(2_000)
    put_ms = flow.now_ms
    flow.put("in", [b"late", b"later"], delay_ms=700)
    flow.put("in", [b"now"])
    flow.pass_time(1_500)
    assert [value for _, _, value in flow.ran] == [b"now", b"late", b"later"]
    assert all(700 <= ran_ms - put_ms <= 800 for ran_ms, _, value in flow.ran if value != b"now")


def test_what_is_put_for_a_time_of_day_comes_then_also_when_the_cluster_was_down_for_a_while() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(2_000)
    flow.put("in", [b"at nine"], at_ms=WALL_MS + 3_600_000)
    flow.put("in", [b"in an hour"], delay_ms=3_600_000)
    assert len(flow.queue("in").delayed) == 2
    flow.pass_time(1_000)
    flow.wall_ms = WALL_MS + 3_599_000  # the cluster's own time stood still meanwhile
    flow.lead()
    flow.pass_time(200)
    assert flow.ran == []
    flow.pass_time(1_500)
    assert [value for _, _, value in flow.ran] == [b"at nine"]


def test_a_time_that_is_over_is_now() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(2_000)
    flow.put("in", [b"v"], at_ms=5)
    flow.pass_time(100)
    assert len(flow.ran) == 1


def test_what_waits_is_dropped_by_discard_and_holds_the_run_open_until_then() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.put("in", [b"v"] * 5, delay_ms=60_000)
    flow.ask(Message("close", {"pipeline": "f", "name": "in"}))
    flow.pass_time(3_000)
    assert not flow.is_done
    assert flow.ask(Message("discard", {"queue": "f/in", "ids": None})).fields["count"] == 5
    assert flow.is_done


def test_a_node_with_nothing_due_for_long_has_nothing_to_look_for() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(3_000)
    flow.put("in", [b"v"], delay_ms=60_000)
    flow.put("in", [b"v"], at_ms=WALL_MS + 60_000)
    flow.pass_time(100)
    assert not flow.node.has_pending
    flow.pass_time(59_700, 100)
    assert flow.node.has_pending


# ---- ticks


def nothing_now() -> None:
    return None


def test_a_source_is_called_at_each_tick_once_the_first_at_once_and_then_an_interval_apart() -> None:
    flow = Flow(of(source(nothing_now, name="T", every_s=1.5) >> sink(nothing, name="S", processes=1)), Random(0), machines=2)
    flow.pass_time(10_000)
    assert [number for _, number, _ in flow.ticked] == [1, 2, 3, 4, 5, 6, 7]
    at_ms = [tick_ms for _, _, tick_ms in flow.ticked]
    assert [later - earlier for earlier, later in zip(at_ms, at_ms[1:], strict=False)] == [1_500] * 6
    assert all(0 <= ran_ms - tick_ms <= 100 for ran_ms, _, tick_ms in flow.ticked)
    assert flow.queue("S").put == 7


@pytest.mark.parametrize(("missed", "expected"), [("all", [1, 2, 3, 4, 5, 6, 7, 8, 9]), ("skip", [1, 2, 3, 4, 9])])
def test_of_ticks_that_were_missed_each_is_made_up_for_or_the_last_as_asked(missed: Any, expected: list[int]) -> None:
    """Expected are intervals since the first; the numbers have no gap."""
    flow = Flow(of(source(nothing_now, name="T", every_s=10, missed=missed) >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(35_000, 100)
    flow.wall_ms += 50_000  # nobody led
    flow.lead()
    flow.pass_time(1_000)
    first_ms = flow.ticked[0][2]
    assert [1 + (tick_ms - first_ms) // 10_000 for _, _, tick_ms in flow.ticked] == expected
    assert [number for _, number, _ in flow.ticked] == list(range(1, 1 + len(expected)))


@pytest.mark.parametrize("seed", range(15))
def test_whoever_leads_and_whatever_dies_no_tick_is_doubled_or_lost(seed: int) -> None:
    random = Random(seed)
    flow = Flow(of(source(nothing_now, name="T", every_s=0.5, missed="all") >> sink(nothing, name="S", processes=1)), random, machines=2)
    for _ in range(30):
        flow.pass_time(random.choice((20, 100, 600)))
        what = random.random()
        if what < 0.3:
            flow.lead()
        elif what < 0.6:
            for machine in flow.machines.values():
                for process in list(machine.processes.values()):
                    if process.spec.role == "source":
                        process.end("died of signal 9 (SIGKILL)")
        flow.carry()
    flow.pass_time(4_000)
    values = [b"%d" % number for number in range(1, 1 + flow.queue("S").put)]
    assert [value for _, _, value in flow.ran] == values
    assert flow.pipeline.ticks["T/0"] - flow.ticked[0][2] - WALL_MS == 500 * (len(values) - 1)
    assert len(values) >= 10


def test_a_machine_that_comes_back_to_the_same_leader_is_told_a_tick_again_that_may_have_been_lost() -> None:
    flow = Flow(of(source(nothing_now, name="T", every_s=1) >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(2_500)
    (machine,) = flow.machines.values()
    machine.executor.on_leader, heard = lambda message, now_ms: None, machine.executor.on_leader  # type: ignore[method-assign]
    before = len(flow.ticked)
    flow.pass_time(1_500)
    machine.executor.on_leader = heard  # type: ignore[method-assign]
    flow.node.close_session("m0")
    flow.join("m0")
    flow.pass_time(900)
    assert len(flow.ticked) > before
    assert [number for _, number, _ in flow.ticked] == list(range(1, 1 + len(flow.ticked)))


def test_a_paused_source_is_not_called_and_a_closed_one_never_again() -> None:
    flow = Flow(of(source(nothing_now, name="T", every_s=1) >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(2_500)
    flow.ask(Message("pause", {"pipeline": "f", "stage": "T", "reason": ""}))
    before = len(flow.ticked)
    flow.pass_time(3_000)
    assert len(flow.ticked) == before
    flow.ask(Message("resume", {"pipeline": "f", "stage": "T"}))
    flow.pass_time(1_000)
    assert len(flow.ticked) > before
    flow.ask(Message("close", {"pipeline": "f", "name": "T"}))
    before = len(flow.ticked)
    flow.pass_time(3_000)
    assert (len(flow.ticked), flow.is_done) == (before, True)


def test_a_new_run_begins_with_tick_one() -> None:
    flow = Flow(of(source(nothing_now, name="T", every_s=1) >> sink(nothing, name="S", processes=1)), Random(0))
    flow.pass_time(2_500)
    flow.ask(Message("close", {"pipeline": "f", "name": "T"}))
    flow.pass_time(500)
    flow.ticked.clear()
    flow.ask(Message("start_run", {"pipeline": "f", "params": None}))
    flow.pass_time(1_500)
    assert [number for _, number, _ in flow.ticked] == [1, 2]


# ---- processes that make way


def test_a_process_that_has_had_its_items_makes_way_for_a_fresh_one_which_is_no_crash() -> None:
    flow = Flow(of(Queue("in") >> sink(nothing, name="S", processes=2, max_items=10)), Random(0))
    flow.put("in", [b"%d" % number for number in range(95)])
    most = 0
    for _ in range(100):
        flow.pass_time(20)
        (machine,) = flow.machines.values()
        processes = list(machine.processes.values())
        assert len(processes) <= 2
        most = max([most, *(process.ran for process in processes)])  # type: ignore[attr-defined]
    assert sorted(value for _, _, value in flow.ran) == sorted(b"%d" % number for number in range(95))
    assert most <= 10
    assert 10 <= len(machine.started) <= 12
    assert machine.executor.stages["f/S"].crashes == 0
    assert not flow.queue("in").deliveries


# ---- a stage that stops by itself


def failing(**options: Any) -> Flow:
    flow = Flow(of(Queue("in", maxsize=None) >> sink(nothing, name="S", processes=1, retries=0, **options)), Random(0))
    flow.fails = lambda stage, value: value == b"bad"
    return flow


def test_a_stage_of_whose_items_too_many_are_parked_stops_until_somebody_lets_it_go_on() -> None:
    flow = failing(parked_share_max=0.5)
    flow.put("in", [b"good"] * 50 + [b"bad"] * 500)
    flow.pass_time(2_000)
    parked = len(flow.queue("in").parked)
    assert 50 <= parked <= 150, "what was in its hands when it stopped is finished"
    (reason,) = flow.pipeline.paused.values()
    assert "items were parked" in reason and reason.isprintable()
    assert any("items were parked" in alarm for alarm in flow.node.status()["alarms"])
    flow.pass_time(2_000)
    flow.lead()
    flow.pass_time(2_000)
    assert len(flow.queue("in").parked) == parked
    flow.fails = lambda stage, value: False
    flow.ask(Message("resume", {"pipeline": "f", "stage": "S"}))
    flow.pass_time(2_000)
    assert (len(flow.queue("in").parked), flow.queue("in").open_count) == (parked, 0)


def test_a_new_version_lets_it_go_on_and_a_person_s_pause_outlasts_one() -> None:
    flow = failing(parked_share_max=0.1)
    flow.put("in", [b"bad"] * 100)
    flow.pass_time(2_000)
    assert flow.pipeline.paused["S"]
    flow.ask(Message("pause", {"pipeline": "f", "stage": None, "reason": ""}))
    bundle, deploy = hostile.deploying("f", "2" * 64)[:2]
    flow.ask(bundle)
    flow.ask(deploy._replace(fields={**deploy.fields, "manifest": flow.manifest, "origin": {"node": "m0"}}))
    flow.pass_time(5_000)
    assert flow.pipeline.version == "2" * 64 and flow.pipeline.paused == {"": ""}


def test_without_a_stated_limit_all_are_tried_and_parked() -> None:
    flow = failing()
    flow.put("in", [b"bad"] * 300)
    flow.pass_time(2_000)
    assert len(flow.queue("in").parked) == 300
    assert not flow.pipeline.shares


def test_a_stage_that_waits_for_its_rate_keeps_no_slot_from_one_that_works() -> None:
    kept, busy = stage(nothing, name="Kept", rate="2/s"), stage(nothing, name="Busy")
    flow = Flow(of(Queue("kept", maxsize=None) >> kept, Queue("busy", maxsize=None) >> busy), Random(0))
    flow.put("kept", [b"v"] * 2000)
    flow.put("busy", [b"v"] * 2000)
    (machine,) = flow.machines.values()
    for _ in range(200):
        flow._tick(20)
        flow.turn()  # an item every 20 ms, of either
    running = [process.spec.stage for process in machine.processes.values()]
    assert (running.count("Kept"), running.count("Busy")) == (1, 3)
