"""What can be a stage, and that it stays the function that it was."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from p2pcluster import DROP, At, GraphError, Queue, Stage, To, i_wrap, io_wrap, o_wrap, sink, source, stage
from p2pcluster.core.stages import needs_loop
from p2pcluster.errors import ValueRefused


@stage(retries=5, timeout_s=30)
def square(x: dict[str, int]) -> int:
    """The square of a number."""
    return x["number"] * x["number"]


again = square.named("again", retries=0)
root = stage(math.sqrt, name="root")
increment = stage(lambda x: x + 1, name="increment")


class Holder:
    held = stage(lambda x: x, name="held")


def collected(values: AsyncIterator[Any]) -> list[Any]:
    async def collect() -> list[Any]:
        return [value async for value in values]

    return asyncio.run(collect())


# A stage is its function.


def test_the_plain_words_and_the_short_ones_are_the_same_decorators() -> None:
    assert (source, stage, sink) == (i_wrap, io_wrap, o_wrap)


def test_a_stage_is_called_like_its_function() -> None:
    assert square({"number": 3}) == 9


def test_a_stage_looks_like_its_function() -> None:
    assert square.__name__ == square.__qualname__ == square.name == "square"
    assert square.__doc__ == "The square of a number."
    assert square.__module__ == __name__
    assert list(inspect.signature(square).parameters) == ["x"]


def test_a_stage_knows_the_file_and_line_of_its_function() -> None:
    line = square.function.__code__.co_firstlineno
    assert square.defined_at == f"test_stages.py:{line}"
    assert again.defined_at == square.defined_at
    assert "test_stages.py" in root.defined_at


def test_a_stage_behind_another_decorator_is_found_where_the_function_is_written() -> None:
    def plain(x: int) -> int:
        return x

    wrapped = functools.lru_cache(plain)
    assert stage(wrapped).defined_at == f"test_stages.py:{plain.__code__.co_firstlineno}"


def test_attributes_of_the_function_do_not_become_the_stage_s() -> None:
    def plain(x: int) -> int:
        return x

    plain.__dict__["name"] = "another"
    assert stage(plain).name == "plain"


def test_named_uses_a_function_twice_with_options_of_its_own() -> None:
    assert again.name == "again"
    assert again is not square
    assert again({"number": 3}) == 9
    assert (again.options.retries, again.options.timeout_s) == (0, 30.0)
    assert square.options.retries == 5


def test_closures_and_partials_are_stages() -> None:
    def adder(n: int) -> Stage[[int], int]:
        @stage(name=f"add {n}")
        def add(x: int) -> int:
            return x + n

        return add

    def times(x: int, by: int) -> int:
        return x * by

    assert adder(3)(4) == 7
    assert stage(functools.partial(times, by=3), name="triple")(2) == 6


def test_a_lambda_a_partial_and_an_object_need_a_name() -> None:
    for nameless in (lambda x: x, functools.partial(pow, 2), Spell()):
        with pytest.raises(GraphError, match=r"stage at test_stages.py:\d+: .* has no name; add name="):
            stage(nameless)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(GraphError, match=r"stage at test_stages.py:\d+: 5 cannot be called"):
        stage(5)  # type: ignore[call-overload]


def test_a_stage_is_not_made_twice_of_one_function() -> None:
    with pytest.raises(GraphError, match="stage 'square' .* is a stage already; use its `.named"):
        sink(square)


# Signatures.


def test_a_stage_takes_exactly_one_item() -> None:
    for wrong in (lambda: 1, lambda x, y: 1, lambda *, x: 1):
        with pytest.raises(GraphError, match="is called with one positional item"):
            stage(wrong, name="wrong")
    for right in (lambda x: 1, lambda x, y=2: 1, lambda *xs: 1, lambda x=None: 1):
        assert stage(right, name="right").name == "right"


def test_a_source_takes_no_item() -> None:
    with pytest.raises(GraphError, match="a source takes no arguments but `cursor` and `shard, shards`"):
        source(lambda x: 1, name="wrong")


def test_a_source_that_takes_a_cursor_can_resume() -> None:
    def lines(cursor: int | None = None) -> Iterator[At[int]]:
        yield At(1, cursor=1)

    assert source(lines).resumable
    assert not source(lambda: 1, name="plain").resumable
    assert source(functools.partial(lambda path, cursor=None: path, "x"), name="bound").resumable


def test_a_stage_may_call_its_item_cursor() -> None:
    assert not stage(lambda cursor: cursor, name="query").resumable


def test_a_source_takes_both_shard_and_shards_or_neither() -> None:
    def rows(shard: int, shards: int) -> Iterator[int]:
        yield shard

    assert source(rows, processes=4).sharded
    with pytest.raises(GraphError, match="takes one of `shard, shards`; take both, or neither"):
        source(lambda shard: shard, name="half")


def test_a_generator_source_has_one_process_unless_it_takes_shards() -> None:
    def rows() -> Iterator[int]:
        yield 1

    assert source(rows).options.processes == 1
    with pytest.raises(GraphError, match="4 processes would each yield everything; take `shard, shards`"):
        source(rows, processes=4)
    assert source(lambda: 1, name="plain", processes=4).options.processes == 4


def test_a_source_is_not_scaled_by_a_queue_that_it_does_not_have() -> None:
    with pytest.raises(GraphError, match='a source has no queue that "auto" could go by'):
        source(lambda: 1, name="plain", processes="auto")



def test_two_processes_of_a_source_that_ticks_have_to_be_shards() -> None:
    def poll() -> int:
        return 1

    def poll_shard(shard: int, shards: int) -> int:
        return shard

    with pytest.raises(GraphError, match="2 processes would each run every tick; take `shard, shards`"):
        source(poll, every_s=1, processes=2)
    assert source(poll_shard, every_s=1, processes=2).sharded


def test_a_generator_that_would_begin_again_each_time_has_no_limit_of_items() -> None:
    def count() -> Iterator[int]:
        yield from range(10)

    def count_on(cursor: int | None = None) -> Iterator[At]:
        yield At(1, 1)

    with pytest.raises(GraphError, match="over and over; take `cursor`, or leave max_items out"):
        source(count, max_items=5)
    assert source(count_on, max_items=5).options.max_items == 5
    assert source(count, max_items=5, every_s=1).options.max_items == 5
    assert source(lambda: 1, name="one", max_items=5).options.max_items == 5


def test_missed_ticks_are_those_of_every_s() -> None:
    with pytest.raises(GraphError, match="missed has no meaning without every_s; give every_s= too or leave it out"):
        source(lambda: 1, name="one", missed="all")
    with pytest.raises(GraphError, match="missed='some' is not \"skip\" or \"all\""):
        source(lambda: 1, name="one", every_s=1, missed="some")


def test_concurrency_is_for_async_functions() -> None:
    async def fetch(x: int) -> int:
        return x

    assert stage(fetch, concurrency=8).options.concurrency == 8
    with pytest.raises(GraphError, match="concurrency is for `async def`; use processes=8"):
        stage(lambda x: x, name="plain", concurrency=8)


# Shapes.


def generates(x: int) -> Iterator[int]:
    yield x


async def awaits(x: int) -> int:
    return x


async def generates_async(x: int) -> AsyncIterator[int]:
    yield x


class Spell:
    """Records its life: entered, called, left."""

    def __init__(self) -> None:
        self.life = ["made"]

    def __enter__(self) -> str:
        self.life.append("entered")
        return "not what is called"

    def __exit__(self, *failure: object) -> None:
        self.life.append("left")

    def __call__(self, x: int) -> list[str]:
        self.life.append(f"called {x}")
        return self.life


class SpellGenerator(Spell):
    def __call__(self, x: int) -> Iterator[str]:  # type: ignore[override]
        yield from self.life
        yield f"called {x}"


class SpellAsync:
    life: list[str] = []

    async def __aenter__(self) -> None:
        self.life[:] = ["entered"]

    async def __aexit__(self, *failure: object) -> None:
        self.life.append("left")

    async def __call__(self, x: int) -> int:
        self.life.append("called")
        return x


class SpellAsyncGenerator(SpellAsync):
    async def __call__(self, x: int) -> AsyncIterator[int]:  # type: ignore[override]
        yield x


class SpellAsyncEntered(SpellAsync):
    def __call__(self, x: int) -> int:  # type: ignore[override]
        return x


class SpellAsyncEnteredGenerator(SpellAsync):
    def __call__(self, x: int) -> Iterator[int]:  # type: ignore[override]
        yield x


@pytest.mark.parametrize(
    ("function", "shape", "is_generator", "is_async"),
    [
        (lambda x: x, "function", False, False),
        (generates, "generator", True, False),
        (functools.partial(functools.partial(generates)), "generator", True, False),
        (awaits, "async", False, True),
        (functools.partial(awaits), "async", False, True),
        (generates_async, "async", True, True),
        (Spell, "class", False, False),
        (SpellGenerator, "class", True, False),
        (SpellGenerator(), "generator", True, False),
        (SpellAsync, "class", False, True),
        (SpellAsync(), "async", False, True),
        (SpellAsyncGenerator, "class", True, True),
    ],
)
def test_the_shape_of_a_function_is_found_through_partials_and_classes(
    function: Any, shape: str, is_generator: bool, is_async: bool
) -> None:
    made = stage(function, name="made")
    assert (made.shape, made.is_generator, made.is_async) == (shape, is_generator, is_async)


def test_a_class_is_made_entered_called_and_left_for_a_single_call() -> None:
    assert stage(Spell)(3) == ["made", "entered", "called 3", "left"]


def test_a_class_that_yields_is_left_when_all_is_yielded() -> None:
    assert list(stage(SpellGenerator)(3)) == ["made", "entered", "called 3"]


def test_a_class_with_async_def_is_entered_in_the_loop() -> None:
    assert asyncio.run(stage(SpellAsync)(3)) == 3
    assert SpellAsync.life == ["entered", "called", "left"]
    assert collected(stage(SpellAsyncGenerator)(3)) == [3]
    assert SpellAsync.life == ["entered", "left"]


def test_a_class_that_can_only_be_entered_in_a_loop_needs_one() -> None:
    entered = stage(SpellAsyncEntered)
    assert needs_loop(entered)
    assert not needs_loop(stage(Spell))
    assert asyncio.run(entered(3)) == 3  # type: ignore[arg-type]
    assert collected(stage(SpellAsyncEnteredGenerator)(3)) == [3]  # type: ignore[arg-type]


def test_a_class_with_a_sync_context_and_an_async_call_is_entered_too() -> None:
    class Mixed(Spell):
        async def __call__(self, x: int) -> list[str]:  # type: ignore[override]
            return self.life

    assert asyncio.run(stage(Mixed)(3)) == ["made", "entered", "left"]


def test_a_class_is_described_by_its_call() -> None:
    assert list(inspect.signature(stage(Spell)).parameters) == ["x"]


def test_a_class_must_be_made_without_arguments_and_be_callable() -> None:
    class Needy:
        def __init__(self, path: str) -> None: ...

        def __call__(self, x: int) -> int:
            return x

    class Mute: ...

    with pytest.raises(GraphError, match="stage 'Needy' .*: its class is made without arguments"):
        stage(Needy)
    with pytest.raises(GraphError, match="stage 'Mute' .*: its class has no __call__"):
        stage(Mute)


# Pickle.


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_stage_is_pickled_as_the_place_where_it_lives(protocol: int) -> None:
    for lives in (square, again, root, increment):
        pickled = pickle.dumps(lives, protocol)
        assert pickle.loads(pickled) is lives
        assert len(pickled) < 100


def test_a_copy_of_a_stage_is_the_stage() -> None:
    assert copy.deepcopy(square) is square


def test_a_stage_without_a_place_is_not_pickled() -> None:
    @stage
    def local(x: int) -> int:
        return x

    for homeless in (local, square.named("third"), Holder.held):
        with pytest.raises(ValueRefused, match="has no variable that holds it; assign it to one"):
            pickle.dumps(homeless)


# Values.


def test_drop_is_the_same_object_behind_a_pickle() -> None:
    assert pickle.loads(pickle.dumps(DROP)) is DROP


def test_to_and_at_survive_a_pickle() -> None:
    value = At(To("bad", {"number": 1}), cursor=[1, 2])
    assert pickle.loads(pickle.dumps(value)) == value
    assert value.value.label == "bad"


# Flows.

one = stage(lambda x: x, name="one")
two = stage(lambda x: x, name="two")
three = stage(lambda x: x, name="three")
four = stage(lambda x: x, name="four")


def test_a_flow_is_not_changed_by_what_is_joined_to_it() -> None:
    flow = one >> two
    longer = flow >> three
    assert [edge.after for edge in flow.edges] == [two]
    assert [edge.after for edge in longer.edges] == [two, three]
    with pytest.raises(AttributeError):
        flow.edges = ()  # type: ignore[misc]


def test_flows_join_from_either_side() -> None:
    assert (one >> two) >> three == one >> (two >> three)


def test_a_list_fans_out_and_merges() -> None:
    flow = one >> [two, three] >> four
    assert [(edge.before, edge.after) for edge in flow.edges] == [
        (one, two),
        (one, three),
        (two, four),
        (three, four),
    ]
    assert ([one, two] >> three).heads == (one, two)


def test_a_dict_routes_by_label() -> None:
    flow = one >> {"ok": two, "bad": [three, Queue("bad")]}
    assert [(edge.label, edge.after) for edge in flow.edges] == [("ok", two), ("bad", three), ("bad", Queue("bad"))]


def test_what_is_not_a_stage_cannot_stand_in_a_flow() -> None:
    def plain(x: int) -> int:
        return x

    for wrong in (
        lambda: one >> plain,  # type: ignore[operator]
        lambda: plain >> one,  # type: ignore[operator]
        lambda: one >> [two, plain],  # type: ignore[list-item]
        lambda: one >> {"ok": plain},
    ):
        with pytest.raises(GraphError, match=r"test_stages.py:\d+: plain 'plain' cannot stand in a flow; decorate it"):
            wrong()


def test_routes_need_labels_that_are_str_and_a_stage_that_chooses() -> None:
    with pytest.raises(GraphError, match=r"stage 'one' \(test_stages.py:\d+\): route 1 is not a str"):
        one >> {1: two}  # type: ignore[dict-item]
    with pytest.raises(GraphError, match="queue 'in' .*: a queue cannot choose routes"):
        Queue("in") >> {"ok": two}


def test_an_empty_list_or_dict_is_refused() -> None:
    empties: list[Any] = [[], (), {}]
    for value in empties:
        with pytest.raises(GraphError, match="an empty list or dict stands in a flow"):
            one >> value
    with pytest.raises(GraphError, match="an empty list or dict stands in a flow"):
        [] >> one


# Queues.


def test_a_queue_has_its_defaults() -> None:
    queue = Queue("work")
    assert (queue.maxsize, queue.codec, queue.bytes_max) == (10_000, "pickle", 64 * 1024 * 1024)


def test_an_unbounded_queue_has_no_limit_in_bytes_either() -> None:
    assert Queue("work", maxsize=None).bytes_max is None


def test_queues_with_the_same_settings_are_the_same_queue() -> None:
    assert Queue("work") == Queue("work")
    assert Queue("work") != Queue("work", maxsize=1)


@pytest.mark.parametrize(
    "options", [{"maxsize": 0}, {"maxsize": True}, {"maxsize": "10"}, {"codec": "xml"}, {"codec": 1}]
)
def test_a_queue_refuses_other_settings_at_its_place(options: dict[str, Any]) -> None:
    with pytest.raises(GraphError, match=r"queue 'work' \(test_stages.py:\d+\): "):
        Queue("work", **options)
