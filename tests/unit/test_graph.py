"""Which graphs are pipelines, what is said of those that are not, and the manifest."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from p2pcluster import DROP, At, GraphError, Pipeline, Queue, Stage, sink, source, stage
from p2pcluster.errors import WrongUsage

HERE = r"\(test_graph.py:\d+\)"


def begin(name: str = "begin") -> Stage[..., Any]:
    return source(lambda: 1, name=name)


def work(name: str) -> Stage[..., Any]:
    return stage(lambda x: x, name=name)


def end(name: str = "end") -> Stage[..., Any]:
    return sink(lambda x: None, name=name)


def entry(pipeline: Pipeline, part: str, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [one for one in pipeline.manifest()[part] if one["name"] == name]
    assert len(found) == 1
    return found[0]


def ports(pipeline: Pipeline, name: str) -> dict[str | None, list[str]]:
    return {port["label"]: port["queues"] for port in entry(pipeline, "stages", name)["ports"]}


# The manifest.


@source
def generate(cursor: int | None = None) -> Iterator[At[int]]:
    yield At(1, cursor=1)


@stage(processes=4, retries=5, timeout_s=30, where="cores >= 4")
def square(x: int) -> int:
    return x * x


@sink
def show(x: int) -> None:
    print(x)


def test_the_manifest_says_all_that_a_node_must_know() -> None:
    numbers = Queue("numbers", maxsize=5, codec="json")
    pipeline = Pipeline("squares", generate >> numbers >> square >> show, params={"n": 3})
    assert list(pipeline.stages) == ["generate", "square", "show"]
    assert list(pipeline.queues) == ["numbers", "show"]
    assert pipeline.manifest() == {
        "format": 1,
        "pipeline": "squares",
        "stages": [
            {
                "name": "generate",
                "kind": "source",
                "reads": None,
                "ports": [{"label": None, "queues": ["numbers"]}],
                "shape": "generator",
                "processes": 1,
                "per_node": None,
                "retries": 3,
                "backoff_s": 1.0,
                "timeout_s": None,
                "where": None,
                "batch": None,
                "batch_wait_s": 0.0,
                "concurrency": 1,
                "rate": None,
                "every_s": None,
                "missed": "skip",
                "max_items": None,
                "parked_share_max": None,
                "resumable": True,
                "sharded": False,
                "defined_at": generate.defined_at,
            },
            {
                "name": "square",
                "kind": "stage",
                "reads": "numbers",
                "ports": [{"label": None, "queues": ["show"]}],
                "shape": "function",
                "processes": 4,
                "per_node": None,
                "retries": 5,
                "backoff_s": 1.0,
                "timeout_s": 30.0,
                "where": "cores >= 4",
                "batch": None,
                "batch_wait_s": 0.0,
                "concurrency": 1,
                "rate": None,
                "every_s": None,
                "missed": "skip",
                "max_items": None,
                "parked_share_max": None,
                "resumable": False,
                "sharded": False,
                "defined_at": square.defined_at,
            },
            {
                "name": "show",
                "kind": "sink",
                "reads": "show",
                "ports": [],
                "shape": "function",
                "processes": 1,
                "per_node": None,
                "retries": 3,
                "backoff_s": 1.0,
                "timeout_s": None,
                "where": None,
                "batch": None,
                "batch_wait_s": 0.0,
                "concurrency": 1,
                "rate": None,
                "every_s": None,
                "missed": "skip",
                "max_items": None,
                "parked_share_max": None,
                "resumable": False,
                "sharded": False,
                "defined_at": show.defined_at,
            },
        ],
        "queues": [
            {
                "name": "numbers",
                "maxsize": 5,
                "bytes_max": 64 * 1024 * 1024,
                "codec": "json",
                "read_by": "square",
                "fed_by": ["generate"],
                "outside": False,
                "results": False,
            },
            {
                "name": "show",
                "maxsize": 10_000,
                "bytes_max": 64 * 1024 * 1024,
                "codec": "pickle",
                "read_by": "show",
                "fed_by": ["square"],
                "outside": False,
                "results": False,
            },
        ],
        "back_edges": [],
        "order": ["generate", "square", "show"],
        "params": {"n": 3},
        "placement": False,
        "on_done": False,
    }


def test_a_manifest_belongs_to_the_one_who_asked_for_it() -> None:
    pipeline = Pipeline("squares", generate >> square >> show, params={"sizes": [3]})
    first = pipeline.manifest()
    first["params"]["sizes"].append(4)
    first["stages"][0]["ports"][0]["queues"].append("more")
    assert pipeline.manifest()["params"] == {"sizes": [3]}
    assert ports(pipeline, "generate") == {None: ["square"]}


def test_params_are_kept_as_the_json_that_they_are() -> None:
    pipeline = Pipeline("squares", generate >> square >> show, params={"sizes": (3, 4)})
    assert pipeline.params == pipeline.manifest()["params"] == {"sizes": [3, 4]}


def test_placement_and_on_done_are_kept_and_only_mentioned_to_nodes() -> None:
    def placement(nodes: Any, stages: Any) -> dict[str, dict[str, int]]:
        return {}

    pipeline = Pipeline("squares", generate >> square >> show, placement=placement, on_done=lambda: None)
    assert pipeline.placement is placement
    assert (pipeline.manifest()["placement"], pipeline.manifest()["on_done"]) == (True, True)


# Queues and ports.


def test_a_stage_reads_the_queue_of_its_name_unless_another_stands_before_it() -> None:
    pipeline = Pipeline("p", begin() >> work("a") >> Queue("other", maxsize=3) >> work("b"))
    assert [entry(pipeline, "stages", name)["reads"] for name in ("begin", "a", "b")] == [None, "a", "other"]
    assert entry(pipeline, "queues", "other")["maxsize"] == 3


def test_all_that_feed_a_stage_feed_its_one_queue() -> None:
    a, b = work("a"), work("b")
    pipeline = Pipeline("p", begin() >> a >> b, Queue("other") >> b)
    assert entry(pipeline, "queues", "other")["fed_by"] == ["a"]
    assert "b" not in pipeline.queues


def test_a_queue_may_be_called_like_the_stage_that_reads_it() -> None:
    pipeline = Pipeline("p", begin() >> Queue("a", maxsize=7) >> work("a"))
    assert entry(pipeline, "queues", "a")["maxsize"] == 7


def test_a_queue_that_no_stage_feeds_is_fed_from_outside() -> None:
    pipeline = Pipeline("p", Queue("in") >> work("a") >> end())
    assert [queue["name"] for queue in pipeline.manifest()["queues"] if queue["outside"]] == ["in"]


def test_a_last_stage_keeps_what_it_returns_in_an_unbounded_queue() -> None:
    pipeline = Pipeline("p", begin() >> work("a"))
    assert ports(pipeline, "a") == {None: ["a.results"]}
    results = entry(pipeline, "queues", "a.results")
    assert results["results"]
    assert (results["maxsize"], results["bytes_max"], results["read_by"]) == (None, None, None)


def test_a_last_queue_is_an_ordinary_bounded_one() -> None:
    pipeline = Pipeline("p", begin() >> work("a") >> Queue("out"))
    out = entry(pipeline, "queues", "out")
    assert (out["results"], out["maxsize"], out["read_by"], out["outside"]) == (False, 10_000, None, False)
    assert ports(pipeline, "a") == {None: ["out"]}


def test_a_queue_that_only_is_called_like_results_is_ordinary() -> None:
    pipeline = Pipeline("p", begin() >> work("a") >> Queue("a.results"))
    assert not entry(pipeline, "queues", "a.results")["results"]


def test_a_source_may_feed_a_queue_for_others_to_take() -> None:
    assert ports(Pipeline("p", begin() >> Queue("out")), "begin") == {None: ["out"]}


def test_a_list_gives_every_item_to_each() -> None:
    pipeline = Pipeline("p", begin() >> [work("a"), work("b")] >> end())
    assert ports(pipeline, "begin") == {None: ["a", "b"]}
    assert entry(pipeline, "queues", "end")["fed_by"] == ["a", "b"]


def test_a_dict_makes_a_port_for_each_label_the_first_one_first() -> None:
    pipeline = Pipeline("p", begin() >> work("parse") >> {"ok": work("a"), "bad": [work("b"), Queue("log")]})
    assert list(ports(pipeline, "parse").items()) == [("ok", ["a"]), ("bad", ["b", "log"])]


def test_a_second_successor_in_another_flow_gets_every_item_too() -> None:
    a = work("a")
    pipeline = Pipeline("p", begin() >> a >> work("b"), a >> work("c"))
    assert ports(pipeline, "a") == {None: ["b", "c"]}


def test_an_unlabelled_successor_beside_routes_gets_what_any_route_gets() -> None:
    parse = work("parse")
    pipeline = Pipeline("p", begin() >> parse >> {"ok": work("a"), "bad": work("b")}, parse >> Queue("log"))
    assert ports(pipeline, "parse") == {"ok": ["a", "log"], "bad": ["b", "log"]}


def test_a_successor_with_and_without_a_label_gets_a_value_once() -> None:
    parse, a = work("parse"), work("a")
    pipeline = Pipeline("p", begin() >> parse >> {"ok": a, "bad": work("b")}, parse >> a)
    assert ports(pipeline, "parse") == {"ok": ["a"], "bad": ["b", "a"]}


def test_routes_of_two_flows_are_put_together_by_label() -> None:
    parse = work("parse")
    pipeline = Pipeline("p", begin() >> parse >> {"ok": work("a")}, parse >> {"bad": work("b"), "ok": work("c")})
    assert ports(pipeline, "parse") == {"ok": ["a", "c"], "bad": ["b"]}


def test_the_same_arrow_twice_is_one_arrow() -> None:
    a, b = begin(), work("b")
    assert ports(Pipeline("p", a >> b, a >> [b, b]), "begin") == {None: ["b"]}


def test_a_function_is_used_twice_under_two_names() -> None:
    pipeline = Pipeline("p", generate >> square >> square.named("again") >> show)
    assert pipeline.manifest()["order"] == ["generate", "square", "again", "show"]


# Cycles.


def test_a_cycle_with_an_unbounded_queue_has_an_edge_that_closes_it() -> None:
    fetch = work("fetch")
    pipeline = Pipeline("p", begin() >> Queue("urls", maxsize=None) >> fetch >> {"page": end(), "more": fetch})
    assert pipeline.manifest()["back_edges"] == [["fetch", "urls"]]
    assert pipeline.manifest()["order"] == ["begin", "fetch", "end"]


def test_only_an_edge_into_the_unbounded_queue_closes_a_cycle() -> None:
    a, b, c = work("a"), work("b"), work("c")
    back = c >> Queue("back", maxsize=None) >> a
    for flows in ((back, begin() >> a >> b >> c), (begin() >> a >> b >> c, back)):
        assert Pipeline("p", *flows).manifest()["back_edges"] == [["c", "back"]]


def test_of_a_ring_of_unbounded_queues_the_way_back_to_the_input_closes_it() -> None:
    a, b = work("a"), work("b")
    into_a, into_b = Queue("into_a", maxsize=None), Queue("into_b", maxsize=None)
    pipeline = Pipeline("p", b >> into_a >> a, a >> into_b >> b, begin() >> a)
    assert pipeline.manifest()["back_edges"] == [["b", "into_a"]]
    assert pipeline.manifest()["order"] == ["begin", "a", "b"]


def test_a_cycle_of_bounded_queues_is_refused_with_its_stages() -> None:
    a, b = work("a"), work("b")
    with pytest.raises(GraphError, match=rf"stage 'b' {HERE}: closes the cycle a >> b >> a, .*; put Queue\("):
        Pipeline("p", begin() >> a >> b >> a)


def test_an_unbounded_queue_beside_the_cycle_does_not_help() -> None:
    a, b = work("a"), work("b")
    with pytest.raises(GraphError, match="closes the cycle"):
        Pipeline("p", begin() >> a >> b >> a, b >> Queue("beside", maxsize=None) >> end())


def test_a_cycle_that_no_item_can_enter_is_refused() -> None:
    a, b = work("a"), work("b")
    with pytest.raises(GraphError, match=rf"stage 'a' {HERE}: no item can get there"):
        Pipeline("p", begin() >> end(), a >> Queue("ring", maxsize=None) >> b >> a)


# What is refused.

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no flows": (lambda: Pipeline("p"), rf"pipeline 'p' {HERE}: has no flows; give it"),
    "a stage before a source": (
        lambda: Pipeline("p", work("a") >> begin()),
        rf"source 'begin' {HERE}: a source cannot stand behind stage 'a' {HERE}; make it",
    ),
    "a queue before a source": (
        lambda: Pipeline("p", Queue("in") >> begin()),
        rf"source 'begin' {HERE}: a source cannot stand behind queue 'in' {HERE}",
    ),
    "a stage behind a sink": (
        lambda: Pipeline("p", begin() >> end() >> work("a")),
        rf"sink 'end' {HERE}: a sink cannot stand before stage 'a' {HERE}; make it",
    ),
    "a queue behind a sink": (
        lambda: Pipeline("p", begin() >> end() >> Queue("out")),
        rf"sink 'end' {HERE}: a sink cannot stand before queue 'out'",
    ),
    "a queue behind a queue": (
        lambda: Pipeline("p", begin() >> Queue("q") >> Queue("r") >> end()),
        rf"queue 'r' {HERE}: stands right behind queue 'q'",
    ),
    "a stage without input": (
        lambda: Pipeline("p", work("a") >> end()),
        rf'stage \'a\' {HERE}: has no input; put a source before it, or Queue\("a"\)',
    ),
    "a stage alone": (lambda: Pipeline("p", work("a")), rf"stage 'a' {HERE}: has no input"),
    "a source alone": (lambda: Pipeline("p", begin()), rf"source 'begin' {HERE}: leads nowhere; put"),
    "a queue alone": (lambda: Pipeline("p", Queue("q")), rf"queue 'q' {HERE}: stands alone; put"),
    "two stages of one name": (
        lambda: Pipeline("p", begin() >> work("a") >> work("a")),
        rf"stage 'a' {HERE}: is not the stage 'a' {HERE} of the same name; use one of them or rename one",
    ),
    "two queues of one name": (
        lambda: Pipeline("p", begin() >> Queue("q") >> work("a") >> Queue("q", maxsize=1) >> end()),
        rf"queue 'q' {HERE}: is not the queue 'q' {HERE} of the same name",
    ),
    "a queue read by two stages": (
        lambda: Pipeline("p", begin() >> Queue("q") >> [work("a"), work("b")]),
        rf"stage 'b' {HERE}: queue 'q' is read by stage 'a' {HERE} too; give",
    ),
    "a stage that reads two queues": (
        lambda: Pipeline("p", [Queue("q"), Queue("r")] >> work("a")),
        rf"stage 'a' {HERE}: reads queue 'q' and queue 'r'; put",
    ),
    "a queue called like another stage": (
        lambda: Pipeline("p", begin() >> Queue("a") >> work("b") >> work("a")),
        rf"queue 'a' {HERE}: stage 'a' {HERE} has its name and does not read it; rename one",
    ),
    "a queue called like a source": (
        lambda: Pipeline("p", begin() >> Queue("begin") >> end()),
        rf"queue 'begin' {HERE}: source 'begin' {HERE} has its name",
    ),
    "a queue called like the results of a stage": (
        lambda: Pipeline("p", begin() >> work("a"), Queue("a.results") >> end()),
        rf"queue 'a.results' {HERE}: is the name of what stage 'a' {HERE} returns; rename it",
    ),
    "a function that is not a stage": (
        lambda: Pipeline("p", print),  # type: ignore[arg-type]
        "plain 'print' cannot stand in a flow",
    ),
    "a bad name": (lambda: Pipeline("a/b", begin() >> end()), rf"pipeline 'a/b' {HERE}: not a usable name"),
    "a name that is not text": (
        lambda: Pipeline(begin() >> end()),  # type: ignore[arg-type]
        "pipeline at .*: its name is Flow",
    ),
    "names too long together": (
        lambda: Pipeline("é" * 60, begin() >> work("ü" * 60)),
        rf"queue 'ü+' {HERE}: over 200 bytes with the name of pipeline",
    ),
    "params that are not JSON": (
        lambda: Pipeline("p", begin() >> end(), params={"drop": DROP}),
        rf"pipeline 'p' {HERE}: params are not JSON \(.*\); use",
    ),
    "params that are not numbers": (
        lambda: Pipeline("p", begin() >> end(), params={"n": float("nan")}),
        "params are not JSON",
    ),
    "params without names": (
        lambda: Pipeline("p", begin() >> end(), params=[1]),  # type: ignore[arg-type]
        rf"pipeline 'p' {HERE}: params=\[1\] is not a dict; give",
    ),
    "on_done with arguments": (
        lambda: Pipeline("p", begin() >> end(), on_done=lambda run: None),  # type: ignore[arg-type, misc]
        r"cannot be called as on_done\(\); correct",
    ),
    "placement without stages": (
        lambda: Pipeline("p", begin() >> end(), placement=lambda nodes: {}),  # type: ignore[arg-type, misc]
        r"cannot be called as placement\(nodes, stages\); correct",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_a_pipeline_is_refused_with_name_place_and_remedy(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(GraphError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


# Ways to run, each handed on to the module that knows how.


def test_run_local_is_handed_on_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    local = types.ModuleType("p2pcluster.local")
    local.run_local = lambda pipeline, **arguments: (pipeline, arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "p2pcluster.local", local)
    pipeline = Pipeline("p", begin() >> end())
    assert pipeline.run_local(params={"n": 1}, limit=3) == (
        pipeline,
        {"inputs": None, "params": {"n": 1}, "limit": 3, "out_dir": None},
    )


def test_main_runs_the_started_file_until_done_and_exits_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    cli = types.ModuleType("p2pcluster.cli")
    calls: list[list[str]] = []
    cli.main = lambda words: calls.append(words) or 3  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "p2pcluster.cli", cli)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "pipeline.py")
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--again"])
    with pytest.raises(SystemExit) as exit:
        Pipeline("p", begin() >> end()).main()
    assert exit.value.code == 3
    assert calls == [["run", "pipeline.py", "--until-done", "--again"]]


def test_main_in_a_notebook_says_what_to_call_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "p2pcluster.cli", types.SimpleNamespace(main=None))
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    with pytest.raises(WrongUsage, match=r"call run_local\(\) instead"):
        Pipeline("p", begin() >> end()).main()


def test_a_manifest_is_json() -> None:
    manifest = Pipeline("p", generate >> square >> show).manifest()
    assert json.loads(json.dumps(manifest)) == manifest
