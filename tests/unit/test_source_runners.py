"""What a source's process puts: one put for each tick, whole or not at all; as much as one process may emit, and then it makes way."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from p2pcluster.core.codec import Message
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.stages import DROP, At, Stage, sink, source
from p2pcluster.errors import ValueRefused
from p2pcluster.runners import SourceRunner, TickRunner

BEGIN = Message("begin", {"producer": "source:p/1/S/0", "epoch": 1, "seq": 0, "count": 0, "hash": "", "shard": 0})


class Runs:
    """A source's runner in a thread of its own, with a node that acknowledges what it is told to."""

    def __init__(self, stage: Stage[..., Any], begin: Message = BEGIN, acknowledges: bool = True) -> None:
        manifest = Pipeline("p", stage >> sink(print, name="out")).manifest()
        record = next(entry for entry in manifest["stages"] if entry["name"] == stage.name)
        queues = {entry["name"]: entry for entry in manifest["queues"]}
        self.said: list[Message] = []
        self.called: list[int] = []
        self.error: BaseException | None = None
        self._acknowledges = acknowledges
        arguments = (record, queues, lambda given: stage.function(**given), stage.is_generator, self._hear)
        ticks = record["every_s"] is not None
        self.runner: Any = TickRunner(*arguments, on_tick=self.called.append) if ticks else SourceRunner(*arguments)
        self._thread = threading.Thread(target=self._run, args=(begin,), daemon=True)
        self._thread.start()

    def _run(self, begin: Message) -> None:
        try:
            self.runner.run(begin)
        except BaseException as error:
            self.error = error

    def _hear(self, message: Message) -> None:
        self.said.append(message)
        if message.kind == "put" and self._acknowledges:
            threading.Thread(target=self.runner.on_ack, args=(message.fields["seq"],)).start()

    def wait(self, fact: Callable[[], Any]) -> None:
        deadline_s = time.monotonic() + 10
        while not fact():
            assert time.monotonic() < deadline_s
            time.sleep(0.001)

    def end(self) -> None:
        self.runner.on_stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def puts(self) -> list[Message]:
        return [message for message in self.said if message.kind == "put"]

    def values(self) -> list[list[Any]]:
        """By put what it brought."""
        return [_values(message) for message in self.puts]


def _values(message: Message) -> list[Any]:
    if not message.fields["ports"]:
        return []
    body, found = bytes(message.blobs[1]), []
    for at in range(0, len(message.blobs[0]), 4):
        size = int.from_bytes(message.blobs[0][at : at + 4], "little")
        found.append(pickle.loads(body[:size]))
        body = body[size:]
    return found


def test_each_tick_is_one_put_with_its_number_and_time_whatever_it_emits() -> None:
    emits: Iterator[list[Any]] = iter([["a", "b"], [], [DROP], ["c"]])

    def each() -> Iterator[Any]:
        yield from next(emits)

    runs = Runs(source(each, name="S", every_s=1))
    for number in (1, 2, 3, 4):
        runs.runner.on_tick(number, 1000 * number)
        runs.wait(lambda number=number: len(runs.puts) == number)
    runs.end()
    assert runs.values() == [["a", "b"], [], [], ["c"]]
    told = [(put.fields["seq"], put.fields["source"]["tick_ms"]) for put in runs.puts]
    assert told == [(1, 1000), (2, 2000), (3, 3000), (4, 4000)]
    assert runs.called == [1, 2, 3, 4]


def test_a_tick_that_is_told_again_is_not_run_again() -> None:
    runs = Runs(source(lambda: 5, name="S", every_s=1), BEGIN._replace(fields={**BEGIN.fields, "seq": 7}))
    for number in (7, 8, 8, 7, 8, 9):
        runs.runner.on_tick(number, 0)
    runs.wait(lambda: len(runs.puts) == 2)
    runs.end()
    assert runs.called == [8, 9]


def test_of_a_tick_that_raises_nothing_is_put() -> None:
    def half() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    runs = Runs(source(half, name="S", every_s=1))
    runs.runner.on_tick(1, 0)
    runs.wait(lambda: runs.error is not None)
    assert isinstance(runs.error, ValueError) and not runs.said


def test_of_a_tick_with_a_value_that_cannot_be_put_nothing_is_put() -> None:
    def mixed() -> Iterator[Any]:
        yield 1
        yield threading.Lock()

    runs = Runs(source(mixed, name="S", every_s=1))
    runs.runner.on_tick(1, 0)
    runs.wait(lambda: runs.error is not None)
    assert isinstance(runs.error, ValueRefused) and not runs.said


def test_the_next_tick_is_told_the_last_cursor_and_nothing_new_may_be_dropped() -> None:
    seen: list[Any] = []

    def poll(cursor: Any = None) -> Any:
        seen.append(cursor)
        return DROP if len(seen) == 2 else At(len(seen), f"after {len(seen)}")

    runs = Runs(source(poll, name="S", every_s=1))
    for number in (1, 2, 3):
        runs.runner.on_tick(number, 0)
    runs.wait(lambda: len(runs.puts) == 3)
    runs.end()
    assert seen == [None, "after 1", "after 1"]
    assert runs.values() == [[1], [], [3]]
    assert [pickle.loads(put.blobs[-1]) for put in runs.puts if put.fields["source"].get("cursor")] == ["after 1", "after 3"]


def test_a_source_that_ends_by_stop_iteration_says_so_in_its_last_tick() -> None:
    values = iter([1])
    runs = Runs(source(lambda: next(values), name="S", every_s=1))
    for number in (1, 2, 3):
        runs.runner.on_tick(number, 0)
    runs.wait(lambda: len(runs.puts) == 2)
    runs.end()
    assert [put.fields["source"]["finished"] for put in runs.puts] == [False, True]
    assert runs.called == [1, 2]


# ---- as much as one process may


@pytest.mark.parametrize("acknowledges", [True, False])
def test_a_source_that_emitted_as_much_as_it_may_makes_way_when_all_of_it_is_in_the_log(acknowledges: bool) -> None:
    numbers = iter(range(1000))
    runs = Runs(source(lambda: next(numbers), name="S", max_items=25), acknowledges=acknowledges)
    if acknowledges:
        runs.wait(lambda: runs.said and runs.said[-1].kind == "spent")
    else:
        runs.wait(lambda: sum(map(len, runs.values())) == 25)
        assert runs.said[-1].kind == "put"
        runs.runner.on_ack(runs.puts[-1].fields["seq"])
        runs.wait(lambda: runs.said[-1].kind == "spent")
    assert [value for put in runs.values() for value in put] == list(range(25))
    assert not any(put.fields["source"]["finished"] for put in runs.puts)


def test_a_source_that_ends_before_has_ended() -> None:
    def few(cursor: Any = None) -> Iterator[At]:
        yield from (At(number, number) for number in range(3))

    runs = Runs(source(few, name="S", max_items=4))
    runs.wait(lambda: runs.puts and runs.puts[-1].fields["source"]["finished"])
    runs.end()
    assert not any(message.kind == "spent" for message in runs.said)


def test_of_a_source_that_ticks_what_its_ticks_emitted_counts() -> None:
    runs = Runs(source(lambda: 1, name="S", every_s=1, max_items=2))
    for number in (1, 2, 3):
        runs.runner.on_tick(number, 0)
    runs.wait(lambda: runs.said and runs.said[-1].kind == "spent")
    assert runs.called == [1, 2]


def test_a_source_with_a_rate_has_one_small_batch_on_its_way() -> None:
    numbers = iter(range(100))
    runs = Runs(source(lambda: next(numbers), name="S", rate="50/s"), acknowledges=False)
    runs.wait(lambda: runs.puts)
    for seq in range(1, 6):
        assert len(runs.puts) == seq and len(runs.values()[-1]) <= 5
        runs.runner.on_ack(seq)
        runs.wait(lambda seq=seq: len(runs.puts) > seq)
    runs.end()
