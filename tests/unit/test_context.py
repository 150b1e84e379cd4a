"""What a running function can ask about its item."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from p2pcluster import Context, current
from p2pcluster.core.context import active
from p2pcluster.errors import WrongUsage


def context(**changes: Any) -> Context:
    shown: list[tuple[float, str]] = []
    given: dict[str, Any] = {
        "run": 2,
        "queue": "squares/Square",
        "stage": "Square",
        "node": "node-1",
        "params": {"size": 3},
        "out_dir": "out/squares",
        "log": logging.getLogger("stage"),
        "on_progress": lambda fraction, text: shown.append((fraction, text)),
    }
    made = Context(**{**given, **changes})
    made.item_id = 7
    return made


def test_outside_a_stage_there_is_no_current_item() -> None:
    with pytest.raises(WrongUsage, match=r"current\(\) was called outside a stage; call it in the function"):
        current()


def test_inside_a_stage_current_is_what_the_worker_made() -> None:
    with active(context()) as made:
        assert current() is made
        assert (current().stage, current().node, current().params) == ("Square", "node-1", {"size": 3})
    with pytest.raises(WrongUsage):
        current()


def test_a_nested_run_does_not_lose_the_outer_context() -> None:
    with active(context()) as outer:
        with active(context()):
            pass
        assert current() is outer


def test_the_key_is_the_same_at_every_delivery() -> None:
    made = context()
    first = made.key
    made.delivery = 2
    assert made.key == first == "2/squares/Square/7"


def test_the_key_follows_the_item() -> None:
    made = context()
    made.item_id = 8
    assert made.key == "2/squares/Square/8"


def test_the_key_of_the_put_comes_first() -> None:
    made = context()
    made.put_key = "order-12"
    assert made.key == "order-12"


def test_where_there_is_no_item_there_is_no_key() -> None:
    made = context(queue=None)
    made.item_id = None
    with pytest.raises(WrongUsage, match="'Square' has no item now, so it has no key"):
        assert made.key


def test_progress_is_a_fraction_or_counts_towards_a_total() -> None:
    shown: list[tuple[float, str]] = []
    made = context(on_progress=lambda fraction, text: shown.append((fraction, text)))
    made.progress(0.25)
    made.progress(3, "rows", total=4)
    made.progress(5, total=4)
    made.progress(-1)
    made.progress(0, "nothing to do", total=0)
    assert shown == [(0.25, ""), (0.75, "rows"), (1.0, ""), (0.0, ""), (1.0, "nothing to do")]


def test_each_task_of_an_async_stage_has_its_own_item() -> None:
    async def handle(item_id: int, all_here: asyncio.Barrier) -> int | None:
        mine = context()
        mine.item_id = item_id
        with active(mine):
            await all_here.wait()
            return current().item_id

    async def handle_all() -> list[int | None]:
        all_here = asyncio.Barrier(3)
        return await asyncio.gather(*(handle(item_id, all_here) for item_id in range(3)))

    assert asyncio.run(handle_all()) == [0, 1, 2]


def test_a_misspelt_field_is_an_error_and_not_a_new_field() -> None:
    with pytest.raises(AttributeError):
        context().item = 3  # type: ignore[attr-defined]
