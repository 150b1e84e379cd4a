"""What a stage may be told, and what it is when nobody tells it."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcluster import GraphError, Queue, Stage, sink, source, stage
from p2pcluster.core.options import Options, place, rate_per_s

MAKERS = {"source": source, "stage": stage, "sink": sink}


def made(kind: str, **options: Any) -> Stage[..., Any]:
    if kind == "source":
        return source(lambda: 1, name="made", **options)
    return MAKERS[kind](lambda x: x, name="made", **options)


def test_a_stage_is_scaled_and_sources_and_sinks_are_one_process_unless_told() -> None:
    assert [made(kind).options.processes for kind in MAKERS] == [1, "auto", 1]


def test_options_have_their_defaults() -> None:
    assert made("stage").options == Options(
        processes="auto",
        per_node=None,
        retries=3,
        backoff_s=1.0,
        timeout_s=None,
        where=None,
        batch=None,
        batch_wait_s=0.0,
        concurrency=1,
        rate=None,
        every_s=None,
        max_items=None,
    )


def test_a_batch_waits_fifty_milliseconds_unless_told() -> None:
    assert made("stage", batch=100).options.batch_wait_s == 0.05
    assert made("stage", batch=100, batch_wait_s=2).options.batch_wait_s == 2.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("processes", 0),
        ("processes", "many"),
        ("processes", True),
        ("processes", 1.5),
        ("processes", None),
        ("per_node", 0),
        ("retries", -1),
        ("retries", None),
        ("backoff_s", -0.1),
        ("backoff_s", float("nan")),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("timeout_s", "30"),
        ("where", 4),
        ("where", " "),
        ("where", lambda node: True),
        ("batch", 0),
        ("batch", True),
        ("concurrency", 0),
        ("rate", 10),
        ("rate", "10"),
        ("rate", "0/s"),
        ("rate", "-1/s"),
        ("rate", "10/week"),
        ("max_items", 0),
    ],
)
def test_a_value_that_an_option_does_not_admit_is_refused_by_name_and_place(option: str, value: object) -> None:
    with pytest.raises(GraphError, match=rf"stage 'made' \(test_options.py:\d+\): {option}=.* is not .*; "):
        made("stage", **{option: value})


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("source", "batch", 10),
        ("source", "concurrency", 2),
        ("stage", "every_s", 1),
        ("sink", "every_s", 1),
    ],
)
def test_an_option_of_another_kind_of_stage_is_refused(kind: str, option: str, value: object) -> None:
    with pytest.raises(GraphError, match=f"{option} is for a .*; leave it out of a {kind}"):
        made(kind, **{option: value})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(GraphError, match="option 'retry' is unknown; the options are name, processes, .*retries"):
        made("stage", retry=3)


def test_batch_wait_without_batch_is_refused() -> None:
    with pytest.raises(GraphError, match="batch_wait_s has no meaning without batch"):
        made("stage", batch_wait_s=1)


def test_whole_seconds_and_their_fractions_make_the_same_option() -> None:
    assert repr(made("stage", timeout_s=30).options) == repr(made("stage", timeout_s=30.0).options)


@pytest.mark.parametrize(("rate", "per_s"), [("100/s", 100.0), ("30/m", 0.5), ("36/h", 0.01), ("0.5/s", 0.5)])
def test_a_rate_is_a_number_and_a_unit(rate: str, per_s: float) -> None:
    assert rate_per_s(rate) == pytest.approx(per_s)


@pytest.mark.parametrize("name", ["", "a/b", "line\nbreak", "x" * 101])
def test_a_name_that_cannot_stand_in_a_queue_name_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match="not a usable name"):
        stage(lambda x: x, name=name)
    with pytest.raises(GraphError, match="not a usable name"):
        Queue(name)


def test_a_name_may_hold_spaces_and_letters_of_any_language() -> None:
    assert stage(lambda x: x, name="größte Zahl").name == "größte Zahl"


@pytest.mark.parametrize(
    ("file", "module", "at"),
    [
        ("/home/me/project/pipeline.py", "pipeline", "pipeline.py:7"),
        ("/home/me/project/pipeline.py", "__main__", "pipeline.py:7"),
        ("/home/me/project/shop/stages/parse.py", "shop.stages.parse", "shop/stages/parse.py:7"),
        ("/home/me/project/shop/__init__.py", "shop", "shop/__init__.py:7"),
        ("C:\\project\\shop\\parse.py", "shop.parse", "shop/parse.py:7"),
    ],
)
def test_a_place_is_the_same_wherever_the_project_lies(file: str, module: str, at: str) -> None:
    assert place(file, 7, module) == at
