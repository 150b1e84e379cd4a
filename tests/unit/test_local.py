"""`run_local` does in this process what a cluster does: each form of a stage, each way of a value, and no waiting for a retry."""

from __future__ import annotations

import asyncio
import gc
import functools
import itertools
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pcluster import DROP, At, Pipeline, Queue, To, current, sink, source, stage
from p2pcluster.errors import ValueRefused, WrongUsage

ROOT = Path(__file__).parents[2]


@source
def Numbers() -> Iterator[int]:
    yield from range(10)


def results_of(*stages: Any, **options: Any) -> list[Any]:
    """What the last of a row of stages returned."""
    flow = Numbers
    for one in stages:
        flow = flow >> one
    run = Pipeline("local", flow).run_local(**options)
    assert run.parked == []
    return run.results[stages[-1].name]


# --- How a function may be written ------------------------------------------------------------------------------------


def test_lambdas_partials_closures_and_a_function_twice() -> None:
    by = 3

    @stage
    def Times(x: int) -> int:
        return x * by

    more = stage(lambda x: x + 1, name="more")
    part = stage(functools.partial(pow, 2), name="part")
    assert results_of(Times, more, Times.named("again"), part) == [2 ** ((x * 3 + 1) * 3) for x in range(10)]
    assert Times(2) == 6


def test_classes_are_made_once_entered_and_left() -> None:
    seen: list[str] = []

    @stage
    class Plain:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, x: int) -> int:
            self.calls += 1
            return self.calls

    @stage
    class Entered:
        def __enter__(self) -> Any:
            seen.append("in")
            return self

        def __exit__(self, *exception: object) -> None:
            seen.append("out")

        def __call__(self, x: int) -> int:
            return x

    @stage(concurrency=2)
    class Awaited:
        async def __aenter__(self) -> Any:
            seen.append("in")
            return self

        async def __aexit__(self, *exception: object) -> None:
            seen.append("out")

        async def __call__(self, x: int) -> int:
            return x

    assert sorted(results_of(Plain, Entered, Awaited)) == list(range(1, 11))
    assert sorted(seen) == ["in", "in", "out", "out"]


def test_async_functions_have_as_many_items_in_hand_as_they_may() -> None:
    met: list[Any] = []

    @stage(concurrency=5)
    async def Meet(x: int) -> int:
        await barrier.wait()
        met.append((current().item_id, current().key))
        return x

    @stage(concurrency=3)
    async def Twice(x: int) -> AsyncIterator[int]:
        for _ in range(2):
            await asyncio.sleep(0)
            yield x

    @stage
    async def One(x: int) -> AsyncIterator[int]:
        yield x

    barrier = asyncio.Barrier(5)  # nobody passes alone
    assert sorted(results_of(Meet, Twice, One)) == sorted([*range(10), *range(10)])
    assert sorted(met) == sorted((item_id, f"1/local/Meet/{item_id}") for item_id in range(1, 11))


def test_an_async_item_that_takes_too_long_ends_alone() -> None:
    @stage(concurrency=10, timeout_s=0.05, retries=0)
    async def Wait(x: int) -> int:
        await asyncio.sleep(60 if x == 4 else 0)
        return x

    run = Pipeline("late", Numbers >> Wait).run_local()
    assert sorted(run.results["Wait"]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    ((name, value, error),) = run.parked
    assert (name, value, type(error), str(error)) == ("Wait", 4, TimeoutError, "it ran longer than its timeout_s=0.05")


def test_it_runs_beside_a_loop_that_runs_already() -> None:
    @stage(concurrency=2)
    async def Same(x: int) -> int:
        return x

    async def notebook() -> list[Any]:
        return results_of(Same)

    assert sorted(asyncio.run(notebook())) == list(range(10))


@pytest.mark.parametrize("how", ["stdin", "exec"])
def test_functions_that_live_in_main_are_fine(how: str) -> None:
    code = textwrap.dedent("""
        from p2pcluster import Pipeline, sink, source, stage

        @source
        def Numbers():
            yield from range(3)

        @stage(batch=2)
        def Square(xs):
            return [x * x for x in xs]

        @stage(concurrency=2)
        async def Next(x):
            return x + 1

        print(sorted(Pipeline("cells", Numbers >> Square >> Next).run_local().results["Next"]))
    """)
    words = ["-"] if how == "stdin" else ["-c", "import sys; exec(sys.stdin.read(), {'__name__': '__main__'})"]
    run = subprocess.run([sys.executable, *words], input=code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[1, 2, 5]\n", "")


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_list_and_what_it_returns_are_items() -> None:
    calls: list[list[int]] = []

    @stage(batch=4)
    def Some(xs: list[int]) -> list[Any]:
        calls.append(xs)
        return [DROP if x == 3 else None if x == 4 else x for x in xs]

    assert results_of(Some) == [0, 1, 2, None, 5, 6, 7, 8, 9]
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_batch_may_yield_route_or_return_nothing() -> None:
    kept: list[Any] = []

    @stage(batch=3)
    def Route(xs: list[int]) -> Iterator[Any]:
        for x in xs:
            yield To("odd", x) if x % 2 else To("even", x)

    @sink(batch=100)
    def Keep(xs: list[int]) -> None:
        kept.extend(xs)

    @stage(batch=100)
    async def Pairs(xs: list[int]) -> list[tuple[int, int]]:
        return [(x, x) for x in xs]

    run = Pipeline("routes", Numbers >> Route >> {"odd": Keep, "even": Pairs}).run_local()
    assert (run.results, run.parked, kept) == ({"Pairs": [(x, x) for x in range(0, 10, 2)]}, [], [1, 3, 5, 7, 9])


def test_of_a_batch_that_fails_only_the_culprit_is_tried_again_and_parked() -> None:
    calls: list[tuple[list[int], int]] = []

    @stage(batch=5, retries=2)
    def Pick(xs: list[int]) -> list[int]:
        calls.append((xs, current().delivery))
        if 3 in xs:
            raise KeyError("three")
        return xs

    run = Pipeline("culprit", Numbers >> Pick).run_local()
    assert sorted(run.results["Pick"]) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [(name, value, repr(error)) for name, value, error in run.parked] == [("Pick", 3, "KeyError('three')")]
    assert [delivery for xs, delivery in calls if xs == [3]] == [1, 2, 3], "it goes alone from then on"
    assert len([xs for xs, _ in calls if 3 in xs and len(xs) > 1]) == 1


def test_async_batches_are_in_hand_together_and_fail_one_by_one_too() -> None:
    calls: list[list[int]] = []

    @stage(batch=3, concurrency=3, retries=1)
    async def Meet(xs: list[int]) -> Any:
        calls.append(xs)
        if len(xs) == 3:
            await barrier.wait()
        if 4 in xs:
            raise KeyError(current().item_id)
        return [x for x in xs if x != 1]

    barrier = asyncio.Barrier(3)
    run = Pipeline("meet", Numbers >> Meet).run_local()
    assert sorted(run.results["Meet"]) == [0, 2, 3, 5, 6, 7, 8, 9]
    assert [(value, repr(error)) for _, value, error in run.parked] == [(4, "KeyError(5)")]
    assert sorted(calls) == [[0, 1, 2], [3], [3, 4, 5], [4], [4], [5], [6, 7, 8], [9]]


def test_a_batch_that_returns_no_list_is_told_so() -> None:
    @stage(batch=10, retries=0)
    def Text(xs: list[int]) -> Any:
        return "text"

    run = Pipeline("text", Numbers >> Text).run_local(limit=1)
    ((_, value, error),) = run.parked
    assert (value, type(error)) == (0, ValueRefused)
    assert "returned str: return a list of what is to be emitted, or yield it" in str(error)


# --- Values and their ways --------------------------------------------------------------------------------------------


def test_one_item_may_become_more_than_a_message_holds() -> None:
    @stage
    def Spread(x: int) -> Iterator[str]:
        for number in range(3000):
            yield f"{number:01000}"

    @stage(batch=10_000)
    def Count(texts: list[str]) -> list[int]:
        return [len(texts)]

    @stage(concurrency=2)
    async def Again(x: int) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(1 << 20)

    run = Pipeline("spread", Numbers >> Spread >> Queue("many", maxsize=100) >> Count >> Again).run_local(limit=2)
    assert len(run.results["Again"]) == 3 * 1
    assert run.parked == []


def test_of_an_item_that_fails_behind_a_part_nothing_is_seen() -> None:
    @stage(retries=1)
    def Spread(x: int) -> Iterator[bytes]:
        yield from [bytes(1 << 19)] * 5
        raise OSError("full")

    run = Pipeline("half", Numbers >> Spread).run_local(limit=1)
    assert run.results["Spread"] == []
    assert [(value, type(error)) for _, value, error in run.parked] == [(0, OSError)]


def test_a_value_goes_in_two_forms() -> None:
    @stage
    def Pair(x: int) -> Any:
        return (x, [x])

    @stage
    def Read(value: Any) -> Any:
        return value

    run = Pipeline("forms", Numbers >> Pair >> [Queue("text", codec="json"), Read]).run_local(limit=2)
    assert run.results == {"text": [[0, [0]], [1, [1]]], "Read": [(0, [0]), (1, [1])]}

    both = Pipeline("sources", Numbers >> [Queue("text", codec="json"), Read]).run_local(limit=2)
    assert both.results == {"text": [0, 1], "Read": [0, 1]}


def test_a_cycle_goes_round_until_it_is_left() -> None:
    @stage
    def Down(x: int) -> Any:
        return To("again", x - 1) if x > 0 else To("end", x)

    end = stage(lambda x: x, name="end")
    again = Queue("round", maxsize=None)
    run = Pipeline("round", Numbers >> again >> Down >> {"again": again, "end": end}).run_local()
    assert run.results["end"] == [0] * 10


def test_a_queue_is_fed_from_outside_and_one_at_the_end_has_no_limit() -> None:
    @stage
    def Same(x: int) -> int:
        return x

    run = Pipeline("outside", Queue("in", maxsize=5) >> Same >> Queue("out", maxsize=5)).run_local(inputs=range(500))
    assert run.results == {"out": list(range(500))}


def test_shards_cursors_params_limits_and_inputs() -> None:
    @source(processes=3)
    def Sharded(shard: int, shards: int) -> Iterator[Any]:
        yield from range(shard, 9, shards)

    @source
    def Resumed(cursor: Any = None) -> Iterator[Any]:
        yield from (At(x, x) for x in range(100, 109))

    @stage
    def Add(x: int) -> int:
        return x + current().params["by"]

    pipeline = Pipeline("all", [Sharded, Resumed] >> Add, params={"by": 1})
    assert sorted(pipeline.run_local().results["Add"]) == [*range(1, 10), *range(101, 110)]
    assert sorted(pipeline.run_local(params={"by": 0}, limit=2).results["Add"]) == [0, 1, 2, 3, 4, 5, 100, 101]
    assert pipeline.run_local(inputs={"Sharded": [7], "Resumed": []}).results["Add"] == [8]
    with pytest.raises(WrongUsage, match="give a dict of lists by name"):
        pipeline.run_local(inputs=[1])


def test_async_sources_plain_ones_generators_and_classes() -> None:
    numbers = iter(range(3))
    seen: list[str] = []

    @source
    async def Plain() -> int:
        await asyncio.sleep(0)
        for number in numbers:
            return number
        raise StopIteration

    @source
    async def Endless() -> AsyncIterator[int]:
        number = 10
        while True:
            await asyncio.sleep(0)
            yield number
            number += 1

    @source
    class Opened:
        async def __aenter__(self) -> Any:
            self.letters = iter("xyz")
            return self

        async def __aexit__(self, *exception: object) -> None:
            seen.append("left")

        async def __call__(self, cursor: Any = None) -> AsyncIterator[At[str]]:
            for letter in self.letters:
                yield At(letter, letter)

    same = stage(lambda x: x, name="same")
    run = Pipeline("sources", [Plain, Endless, Opened] >> same).run_local(limit=3)
    assert sorted(map(str, run.results["same"])) == ["0", "1", "10", "11", "12", "2", "x", "y", "z"]
    assert seen == ["left"]


def test_parked_items_come_with_what_was_raised_and_on_done_with_totals(tmp_path: Path) -> None:
    totals: list[Any] = []

    @stage(retries=1)
    def Odd(x: int) -> Iterator[int]:
        if x % 2 == 0:
            raise ValueError(x)
        yield x

    @sink
    def Write(x: int) -> None:
        (current().out_dir / str(x)).write_text(current().stage)

    pipeline = Pipeline("odd", Numbers >> Odd >> Write, on_done=lambda: totals.append((current().totals, current().out_dir)))
    run = pipeline.run_local(out_dir=tmp_path)
    assert [(name, value, repr(error)) for name, value, error in run.parked] == [("Odd", x, f"ValueError({x})") for x in range(0, 10, 2)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1", "3", "5", "7", "9"]
    assert totals == [({"Numbers": {"done": 10, "parked": 0}, "Odd": {"done": 5, "parked": 5}, "Write": {"done": 5, "parked": 0}}, tmp_path)]


def test_ticks_follow_each_other_with_their_numbers_and_cursors_until_the_source_ends() -> None:
    def poll(cursor: int | None = None) -> Any:
        yield At(("look", current().item_id, cursor), 10 * (current().item_id or 0))

    def count() -> int:
        if current().item_id == 4:
            raise StopIteration
        return current().item_id or 0

    ticks = Pipeline("ticks", source(count, name="count", every_s=3600) >> stage(lambda x: x, name="seen", rate="1/h", max_items=1))
    assert ticks.run_local().results == {"seen": [1, 2, 3]}
    polls = Pipeline("polls", source(poll, every_s=0.5) >> stage(lambda x: x, name="seen", parked_share_max=0.1))
    assert polls.run_local(limit=3).results == {"seen": [("look", 1, None), ("look", 2, 10), ("look", 3, 20)]}


# ---- Ctrl-C


def _interrupt(*_: object) -> object:
    signal.raise_signal(signal.SIGINT)
    time.sleep(0)  # where Python looks for signals
    return DROP


async def _interrupt_async(value: object) -> object:
    _interrupt()
    await asyncio.sleep(0)
    return DROP


def _endless() -> Iterator[int]:
    yield from itertools.count()


@pytest.mark.parametrize("options", [{}, {"batch": 3}])
def test_ctrl_c_ends_it_and_parks_nothing(options: dict[str, Any]) -> None:
    endless = source(_endless, name="Endless")
    with pytest.raises(KeyboardInterrupt):
        Pipeline("interrupted", endless >> stage(_interrupt, name="Stop", **options)).run_local()


@pytest.mark.parametrize("options", [{}, {"concurrency": 3}])
def test_ctrl_c_ends_async_stages_too(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    endless = source(_endless, name="Endless")
    with pytest.raises(KeyboardInterrupt):
        Pipeline("interrupted", endless >> stage(_interrupt_async, name="Stop", **options)).run_local()
    gc.collect()
    assert caplog.text == "", "asyncio has nothing to complain of"


def test_ctrl_c_ends_it_in_a_notebook_too_where_it_runs_in_another_thread() -> None:
    """The kernel's thread hears the signal while it waits for the thread that runs the pipeline."""
    main = threading.main_thread().ident
    assert main is not None

    def poke(value: int) -> object:
        if value == 50:
            signal.pthread_kill(main, signal.SIGINT)
        return DROP

    async def cell() -> None:
        Pipeline("interrupted", source(_endless, name="Endless") >> stage(poke, name="Poke")).run_local()

    loop = asyncio.new_event_loop()  # as a notebook's, which leaves signals alone
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
