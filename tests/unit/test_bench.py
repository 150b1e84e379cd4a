"""The benchmark runs, loses no item and says what it should; how fast anything is, is not asked here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes its figures from /proc")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tiny(bench: ModuleType) -> Any:
    counts = {"items": 3000, "slow_items": 300, "managers_items": 300, "naps": 24, "latencies": 10, "starts": 1}
    return bench.cases.Sizes(**counts, idle_s=0.2, listen_s=0.2, kills=1, handovers=1, phases=2, phase_ms=400)


def case(bench: ModuleType, name: str, sizes: Any) -> dict[str, Any]:
    """The figures of one case; it raises when items are missing."""
    return dict(bench.run([name], sizes))[name]


# ---- each case in earnest, with few items


@pytest.mark.parametrize("name", ["w1", "w1_slow_disk"])
def test_w1_tells_rate_cpu_memory_and_the_items_of_a_commit(bench: ModuleType, tiny: Any, name: str) -> None:
    figures = case(bench, name, tiny)
    assert figures["items"] == (tiny.items if name == "w1" else tiny.slow_items)
    assert figures["rate_per_s"] > 0 and figures["node_rss_mib_max"] > 0
    assert figures["commits"] > 2 and figures["items_per_commit"] == figures["items"] / figures["commits"]
    assert figures["cpu_s_per_100k"].keys() <= {"node", "source", "stage", "sink", "all"}


def test_the_baseline_does_the_same_work_plain_and_batched(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "managers", tiny)
    items = {name: part["items"] for name, part in figures.items()}
    assert items == {"plain": tiny.managers_items, "batched": tiny.items}
    for part in figures.values():
        assert part["rate_per_s"] > 0 and part["cpu_s_per_100k"].keys() == {"server", "source", "stage", "sink", "all"}


def test_w2_is_a_share_of_the_ideal_that_nothing_exceeds(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "w2", tiny)
    assert figures["tasks"] == tiny.naps
    assert 0 < figures["share_of_ideal"] <= 1 and 0 < figures["managers_share_of_ideal"] <= 1


def test_what_a_stage_that_prints_costs_the_others_is_a_ratio_of_one_run(bench: ModuleType, tiny: Any) -> None:
    report = dict(bench.run(["logs"], tiny))
    figures = report["logs"]
    assert figures["silent"]["rate_per_s"] > 0 and figures["talking"]["rate_per_s"] > 0 and figures["talking"]["lines_per_s"] > 0
    assert report["ratios"] == {"logs_talking_to_silent": figures["talking"]["rate_per_s"] / figures["silent"]["rate_per_s"]}


def test_idle_latency_is_measured_by_a_source_by_a_program_and_over_managers(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "latency", tiny)
    for way in ("source", "put", "managers"):
        assert 0 < figures[way]["p50_ms"] <= figures[way]["p99_ms"]
    assert figures["put"]["returned_p50_ms"] > 0


def test_a_node_serves_then_its_first_item_arrives_then_the_run_is_done(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "start", tiny)
    assert 0 < figures["serves_s"] < figures["first_item_at_sink_s"] < figures["first_run_done_s"]
    assert figures["first_run_done_s"] <= figures["first_run_done_s_max"]


def test_an_idle_node_is_weighed_with_and_without_stages(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "idle", tiny)
    assert figures["alone"]["node_rss_mib"] > 0 and figures["alone"]["node_cpu_percent"] >= 0
    assert figures["with_stages"]["stage_rss_mib"] > 0


def test_what_waits_outlives_a_kill_and_a_stop_and_is_read_by_the_next_version(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "million", tiny)
    assert figures["items"] == tiny.items
    for name in ("fill_rate_per_s", "rss_mib", "start_after_kill_s", "start_after_stop_s", "drain_rate_per_s"):
        assert figures[name] > 0


def test_w1_on_three_nodes_loses_nothing_wherever_it_comes_from(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "nodes", tiny)
    assert (figures["count"], figures["items"]) == (3, tiny.items)
    assert figures["rate_per_s"] > 0 and figures["from_a_follower"]["rate_per_s"] > 0
    assert 0 < figures["start"]["first_item_at_sink_s"] < figures["start"]["first_run_done_s"]
    assert figures["idle"]["broadcast_bytes_per_node_minute"] >= figures["idle"]["broadcasts_per_node_minute"] >= 0


def test_after_a_kill_another_node_leads_and_then_more_is_done(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "failover", tiny)
    assert (figures["nodes"], figures["kills"]) == (3, 1)
    assert 0 < figures["new_leader_p50_ms"] <= figures["p50_ms"] <= figures["p99_ms"] == figures["max_ms"]


def test_a_leader_that_is_asked_to_stop_hands_over_and_the_time_without_progress_is_told(bench: ModuleType, tiny: Any) -> None:
    figures = case(bench, "handover", tiny)
    assert figures["handovers"] == 1
    assert 0 < figures["gap_p50_ms"] == figures["gap_max_ms"]


# ---- what is printed


def test_json_is_one_object_with_the_machine_the_cases_and_the_ratios(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    found = {"w1": {"rate_per_s": 80_000.0}, "managers": {"plain": {"rate_per_s": 5000.0}}}
    for name, figures in found.items():
        monkeypatch.setitem(bench.cases.CASES, name, lambda sizes, figures=figures: figures)
    assert bench.main(["--json", "--only", "w1", "managers"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"machine", "w1", "managers", "ratios"}
    assert report["ratios"] == {"w1_to_managers_plain": 16.0}
    assert {"cores", "memory_gb", "system", "python", "sqlite", "fsync_ms"} <= report["machine"].keys()


def test_the_table_shows_each_figure_and_its_aim(bench: ModuleType) -> None:
    table = list(bench.lines("w1", {"rate_per_s": 145_473.4, "cpu_s_per_100k": {"node": 0.1764, "sink": None}}))
    assert [line.split() for line in table] == [
        ["w1.rate_per_s", "145,473", "aim:", "200,000"],
        ["w1.cpu_s_per_100k.node", "0.176"], ["w1.cpu_s_per_100k.sink", "unknown"],
    ]


def test_a_case_that_fails_is_one_error_and_exit_code_1(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(sizes: Any) -> dict[str, Any]:
        raise bench.nodes.BenchError("items are missing")

    monkeypatch.setitem(bench.cases.CASES, "w1", fails)
    assert bench.main(["--only", "w1"]) == 1
    assert capsys.readouterr().err == "bench: items are missing\n"


@pytest.mark.parametrize(("count", "wrong_by"), [(9, 0), (11, 0), (10, 1)])
def test_a_missing_item_a_second_one_and_a_wrong_sum_are_noticed(bench: ModuleType, count: int, wrong_by: int) -> None:
    found = {"count": count, "total": sum(n * n for n in range(10)) + wrong_by}
    with pytest.raises(bench.nodes.BenchError, match="should be 10 and 285"):
        bench.cases.check_total("W1", found, 10)


def test_a_whole_count_and_sum_pass(bench: ModuleType) -> None:
    bench.cases.check_total("W1", {"count": 10, "total": sum(n * n for n in range(10))}, 10)


@pytest.mark.parametrize(("values", "parked"), [
    ([0, 1], 0), ([0, 1, 4, 4], 0), ([0, 1, 1], 0), ([0, 1, 5], 0), ([0, 1, 4], 1),
])
def test_a_square_that_is_missing_doubled_wrong_or_parked_is_noticed(
    bench: ModuleType, values: list[int], parked: int,
) -> None:
    with pytest.raises(bench.nodes.BenchError, match="of 3 items"):
        bench.cases.check_squares(values, 3, parked)
    bench.cases.check_squares([4, 0, 1], 3, 0)


def test_a_rate_of_a_log_that_was_not_copied_is_none(bench: ModuleType) -> None:
    bench.cases.check_copies([1000, 998, 1000], 3)
    for entries in ([1000, 0, 0], [1000, 1000, 500]):
        with pytest.raises(bench.nodes.BenchError, match="not that of a replicated log"):
            bench.cases.check_copies(entries, 3)


@pytest.mark.parametrize(("words", "names", "nodes", "kills"), [
    (["--nodes", "5"], ["w1", "nodes"], 5, 10),
    (["--failover", "50"], ["failover", "handover"], 3, 50),
    (["--nodes", "3", "--failover", "2"], ["w1", "nodes", "failover", "handover"], 3, 2),
    (["--only", "nodes", "--nodes", "7", "--quick"], ["nodes"], 7, 5),
])
def test_nodes_and_kills_are_counted_by_options_that_choose_their_cases(
    bench: ModuleType, words: list[str], names: list[str], nodes: int, kills: int,
) -> None:
    chosen, sizes = bench.chosen(bench.parse(words))
    assert (chosen, sizes.nodes, sizes.kills) == (names, nodes, kills)


@pytest.mark.parametrize("words", [["--failover", "0"], ["--nodes", "2"]])
def test_fewer_nodes_than_elect_another_and_no_kill_are_refused(bench: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(words)


class Said:
    """A leader's answers, one after another."""

    def __init__(self, *done: int | None) -> None:
        self.done = iter(done)


def test_what_the_killed_leader_did_last_is_not_taken_for_the_first_done_of_the_next(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def progress_of(cluster: Said) -> Any:
        done = next(cluster.done, None)
        return None if done is None else bench.cases.Progress(float(done), "b", done, 3, 9)

    monkeypatch.setattr(bench.cases, "progress_of", progress_of)
    first, later = bench.cases._next_done([Said(), Said(None, 7, 7, 8)], "a", float("inf"))
    assert (first.done, later.done) == (7, 8)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_percentile_is_one_of_the_values(bench: ModuleType, share: float, expected: int) -> None:
    assert bench.machine.percentile(range(100, 0, -1), share) == expected


def test_cpu_between_two_samples_lies_on_the_line_that_joins_them(bench: ModuleType) -> None:
    known = [(10.0, 1.0), (12.0, 3.0), (14.0, 3.5)]
    assert [bench.machine._value_at(known, at_s) for at_s in (9.0, 11.0, 12.0, 20.0)] == [1.0, 2.0, 3.0, 3.5]
