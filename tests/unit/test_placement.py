"""How many processes of each stage each node runs."""

from __future__ import annotations

from dataclasses import replace

from p2pcluster.core.placement import Load, Plan, plan_processes


def load(stage: str, processes: int | str = "auto", backlog: int = 0, service_us: float = 1000.0, **others: object) -> Load:
    return Load(stage, str(others.pop("kind", "stage")), processes, others.pop("per_node", None), backlog, service_us, **others)  # type: ignore[arg-type]


def totals(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for stages in plan.values():
        for stage, count in stages.items():
            found[stage] = found.get(stage, 0) + count
    return found


def test_without_nodes_there_is_no_plan() -> None:
    assert plan_processes({}, [load("a")], {}) == {}


def test_every_stage_has_a_process_somewhere_even_beyond_the_slots() -> None:
    assert totals(plan_processes({"n": 1}, [load(name) for name in "abc"], {})) == {"a": 1, "b": 1, "c": 1}


def test_explicit_counts_are_given_as_asked_and_spread() -> None:
    assert plan_processes({"m": 2, "n": 2}, [load("a", 4)], {}) == {"m": {"a": 2}, "n": {"a": 2}}


def test_a_maximum_for_each_node_is_kept() -> None:
    assert plan_processes({"m": 8, "n": 8}, [load("a", 4, per_node=1)], {}) == {"m": {"a": 1}, "n": {"a": 1}}


def test_sources_are_assigned_and_not_placed() -> None:
    assert plan_processes({"n": 2}, [load("s", 1, kind="source")], {}) == {"n": {}}


def test_the_stage_with_the_longest_wait_gets_the_free_slots() -> None:
    plan = plan_processes({"n": 4}, [load("slow", backlog=1000, service_us=10_000), load("fast", backlog=1000, service_us=1)], {})
    assert plan == {"n": {"slow": 3, "fast": 1}}


def test_equal_input_gives_an_equal_plan_and_the_plan_in_force_stays() -> None:
    loads = [load("a", backlog=1000, service_us=10_000), load("b", backlog=1000, service_us=9_000)]
    plan = plan_processes({"m": 3, "n": 3}, loads, {})
    assert plan_processes({"m": 3, "n": 3}, loads, {}) == plan
    assert plan_processes({"m": 3, "n": 3}, loads, plan) == plan


def test_processes_move_only_for_a_clearly_longer_wait() -> None:
    current = {"n": {"p/a": 3, "p/b": 1}}
    even = [load("p/a", backlog=3000, service_us=1000), load("p/b", backlog=1800, service_us=1000)]
    assert plan_processes({"n": 4}, even, current) == current
    uneven = [load("p/a", backlog=10, service_us=1000), load("p/b", backlog=9000, service_us=1000)]
    assert plan_processes({"n": 4}, uneven, current) == {"n": {"p/a": 2, "p/b": 2}}


def test_a_plan_moves_a_quarter_of_the_slots_at_most() -> None:
    current = {"n": {"p/a": 15, "p/b": 1}}
    uneven = [load("p/a", backlog=10, service_us=1000), load("p/b", backlog=9000, service_us=1000)]
    assert plan_processes({"n": 16}, uneven, current) == {"n": {"p/a": 11, "p/b": 5}}


def test_a_stage_with_no_room_behind_it_gains_nothing() -> None:
    waiting = [load("p/a", backlog=9000, service_us=10_000, is_blocked=True), load("p/b", backlog=9000, service_us=1_000)]
    assert plan_processes({"n": 6}, waiting, {}) == {"n": {"p/a": 1, "p/b": 5}}
    assert plan_processes({"n": 6}, waiting[:1], {}) == {"n": {"p/a": 1}}


def test_a_stage_gets_no_more_processes_than_it_has_items() -> None:
    assert plan_processes({"n": 9}, [load("p/a", backlog=3, service_us=1e7)], {}) == {"n": {"p/a": 3}}


def test_a_stage_with_a_short_queue_that_is_always_full_grows_as_long_as_its_processes_are_at_work() -> None:
    short = load("p/a", backlog=4, service_us=20_000, is_full=True, busy=1.0)
    assert plan_processes({"n": 9}, [short], {"n": {"p/a": 1}}) == {"n": {"p/a": 3}}
    assert plan_processes({"n": 9}, [replace(short, busy=0.1)], {"n": {"p/a": 1}}) == {"n": {"p/a": 1}}


def test_pipelines_that_have_work_share_the_slots_evenly_however_much_waits_in_each() -> None:
    two = [load("p/a", backlog=10**6, service_us=1e6), load("p/b", backlog=10**6, service_us=1e6), load("q/a", backlog=10**4, service_us=1e4)]
    plan = totals(plan_processes({"n": 5, "m": 5}, two, {"n": {"p/a": 5}, "m": {"p/b": 4, "q/a": 1}}))
    assert plan["p/a"] + plan["p/b"] == 5 == plan["q/a"]


def test_a_pipeline_that_keeps_up_keeps_what_is_at_work_and_lends_the_rest() -> None:
    hungry, keeping_up = load("p/a", backlog=10**4, service_us=1e6), load("q/a", backlog=3, service_us=1e4, busy=2.9)
    assert totals(plan_processes({"n": 10}, [hungry, keeping_up], {"n": {"q/a": 4}})) == {"p/a": 6, "q/a": 4}
    assert totals(plan_processes({"n": 10}, [hungry, replace(keeping_up, busy=0.1)], {"n": {"q/a": 4}})) == {"p/a": 9, "q/a": 1}
    assert totals(plan_processes({"n": 10}, [hungry, replace(keeping_up, backlog=10**4)], {"n": {"p/a": 9, "q/a": 1}})) == {"p/a": 5, "q/a": 5}


def test_what_runs_stays_where_it_is_and_a_machine_that_comes_gets_its_part() -> None:
    loads = [load("p/a", 4), load("p/b", 2)]
    current = {"m": {"p/b": 2}, "n": {"p/a": 4}}
    assert plan_processes({"m": 2, "n": 4}, loads, current) == current
    assert plan_processes({"m": 2, "n": 4}, [load("p/a", 3), load("p/b", 2)], current) == {"m": {"p/b": 2}, "n": {"p/a": 3}}
    plan = plan_processes({"m": 2, "n": 4, "new": 4}, loads, current)
    assert plan == {"m": {"p/b": 1}, "n": {"p/a": 3}, "new": {"p/b": 1, "p/a": 1}}
    assert plan_processes({"m": 2, "n": 4, "new": 4}, loads, plan) == plan


def test_a_stage_that_may_run_on_one_node_only_waits_for_it() -> None:
    assert plan_processes({"m": 2, "n": 2}, [load("a", 2, allowed=frozenset({"n"}))], {}) == {"m": {}, "n": {"a": 2}}
    assert plan_processes({"m": 2}, [load("a", 2, allowed=frozenset({"n"}))], {}) == {"m": {}}


def test_an_automatic_stage_with_a_rule_gets_no_more_than_the_slots_of_the_nodes_that_satisfy_it() -> None:
    tied = load("tied", backlog=9000, service_us=10_000, allowed=frozenset({"n"}))
    assert plan_processes({"m": 6, "n": 2}, [tied, load("free", backlog=10)], {}) == {"m": {"free": 1}, "n": {"tied": 2}}
    free = load("free", backlog=9000, service_us=1_000)
    assert totals(plan_processes({"m": 6, "n": 2}, [tied, free], {})) == {"tied": 2, "free": 6}
    assert plan_processes({"m": 6, "n": 2}, [load("nowhere", backlog=9, allowed=frozenset())], {}) == {"m": {}, "n": {}}


def test_a_sink_is_where_it_would_rather_be_as_long_as_that_node_is_there() -> None:
    assert plan_processes({"m": 9, "n": 1}, [load("a", 1, kind="sink", prefers="n")], {}) == {"m": {}, "n": {"a": 1}}
    assert plan_processes({"m": 9}, [load("a", 1, kind="sink", prefers="n")], {}) == {"m": {"a": 1}}


def test_a_node_where_a_stage_does_not_start_gets_none_of_it_while_there_are_others() -> None:
    barred = frozenset({"n"})
    assert plan_processes({"m": 1, "n": 8}, [load("a", 4, barred=barred)], {}) == {"m": {"a": 4}, "n": {}}
    assert plan_processes({"m": 1, "n": 8}, [load("a", 4, per_node=1, barred=barred)], {}) == {"m": {"a": 1}, "n": {}}
    assert plan_processes({"n": 8}, [load("a", 4, barred=barred | {"gone"})], {}) == {"n": {"a": 4}}
    assert plan_processes({"m": 1, "n": 8}, [load("sink", 1, prefers="n", barred=barred)], {}) == {"m": {"sink": 1}, "n": {}}


def test_what_a_placement_says_comes_first_as_far_as_its_nodes_are_there_and_may_run_the_stage() -> None:
    said = load("a", 9, counts={"n": 3, "gone": 5})
    assert plan_processes({"m": 2, "n": 2}, [load("b", 2), said], {}) == {"m": {"b": 2}, "n": {"a": 3}}
    assert plan_processes({"m": 2}, [load("a", 2, counts={"gone": 5})], {}) == {"m": {"a": 2}}
    moved = load("a", 1, counts={"m": 3, "n": 3}, allowed=frozenset({"m"}), per_node=2)
    assert plan_processes({"m": 2, "n": 2}, [moved], {}) == {"m": {"a": 2}, "n": {}}
