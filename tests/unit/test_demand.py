"""What counts as waiting for a stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from p2pcluster.core.demand import expected_items, fullness
from p2pcluster.core.records import PipelineState, QueueState


def pipeline(*edges: tuple[str | None, str, str], back: list[list[str]] | None = None) -> PipelineState:
    """Each edge: the queue that a stage reads (None: a source), its name, the queue that it writes."""
    stages = [{"name": name, "kind": "stage" if reads else "source", "reads": reads, "ports": [{"queues": [writes] if writes else []}]}
              for reads, name, writes in edges]
    return PipelineState("p", "v", {}, {"stages": stages, "back_edges": back or []}, {}, "", {}, run=1, state="running")


def queue(ready: int = 0, put: int = 0, done: int = 0, delayed: int = 0) -> Any:
    return SimpleNamespace(open_count=ready + delayed, delayed=range(delayed), put=put, done=done)


def test_what_lies_further_up_counts_by_what_came_of_it_so_far() -> None:
    line = pipeline((None, "s", "a"), ("a", "a", "b"), ("b", "b", "c"), ("c", "c", ""))
    queues = {"p/a": queue(10, 110, 100), "p/b": queue(50, 1000, 950), "p/c": queue(5, 475, 470)}
    assert expected_items(line, queues) == {"a": 10, "b": 50 + 10 * 10, "c": 5 + (50 + 100) / 2}


def test_before_anything_was_done_one_item_makes_one() -> None:
    line = pipeline((None, "s", "a"), ("a", "a", "b"), ("b", "b", ""))
    assert expected_items(line, {"p/a": queue(10, 10, 0), "p/b": queue()}) == {"a": 10, "b": 10}


def test_what_a_source_puts_beside_a_stage_does_not_make_each_of_its_items_many() -> None:
    both = pipeline((None, "s", "a"), (None, "t", "b"), ("a", "a", "b"), ("b", "b", ""))
    assert expected_items(both, {"p/a": queue(10, 20, 10), "p/b": queue(0, 10_000, 10_000)}) == {"a": 10, "b": 10}


def test_a_circle_counts_once_and_what_is_not_due_does_not_count() -> None:
    circle = pipeline((None, "s", "a"), ("a", "a", "b"), ("b", "b", "a"), back=[["b", "a"]])
    assert expected_items(circle, {"p/a": queue(10, 20, 10, delayed=1000), "p/b": queue(4, 10, 6)}) == {"a": 10, "b": 14}


def test_a_queue_is_as_full_as_the_nearer_of_its_limits_says() -> None:
    half = QueueState("p/q")
    half.maxsize, half.bytes_max, half.open_bytes = 10, 100, 50
    assert fullness(half) == 0.5
    half.maxsize = half.bytes_max = None
    assert fullness(half) == 0.0
