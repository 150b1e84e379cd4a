"""The queue machine does what the model says, whatever a node keeps in memory, and its books always balance.

Several states apply one log: with all bodies in memory, with none, with a few, and one whose rows go to tables by
checkpoints, with small chunks laid together, from which it is loaded again now and then. Their hashes stay equal, and
each is the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core import chunks, commands, queues, shares
from p2pcluster.core.chunks import Chunk, ChunkIndex
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.queues import State
from p2pcluster.core.ranges import LeaseMap
from p2pcluster.core.records import Outcome, PipelineState, Producer, QueueState
from p2pcluster.core.rows import Row, Rows
from p2pcluster.core.tables import BODY_COLUMNS, TABLES
from tests.simulation.queue_chooser import Chooser
from tests.simulation.queue_model import Books, Model, beginning, compare, entry_body, said

ENTRIES = 40


class Replica:
    """A state, and where the bytes are that it has dropped: the log, and the rows that hold their own."""

    def __init__(self, log: dict[int, bytes], body_memory_bytes_max: int = 1 << 62) -> None:
        self.log = log
        self.memory = body_memory_bytes_max
        self.state = State(body_memory_bytes_max)
        self.tables: dict[str, dict[Row, Row]] = {table: {} for table in TABLES}
        self.row_bodies: dict[tuple[str, int], tuple[bytes, bytes]] = {}

    def bodies(self, queue: str, chunk: Chunk) -> tuple[Buffer, Buffer]:
        if chunk.lengths is not None and chunk.body is not None:
            return chunk.lengths, chunk.body
        if chunk.body_crc is not None:
            return self.row_bodies[(queue, chunk.first)]
        data = self.log[chunk.entry][chunk.offset : chunk.offset + 4 * chunk.count + chunk.body_bytes]
        return data[: 4 * chunk.count], data[4 * chunk.count :]

    def checkpoint(self) -> None:
        self.state.coalesce()
        write_rows(self.tables, self.row_bodies, self.state.rows_changed())
        self.state.rows_written()

    def load_again(self) -> None:
        """What a start of the node does when its last checkpoint is the end of its log."""
        old, self.state = self.state, State(self.memory)
        for table in TABLES:
            self.state.load(table, [(*key, *row) for key, row in sorted(self.tables[table].items())])
        self.state.loaded(old.applied_idx, old.applied_term, old.at_ms, old.hash)

    def check_tables(self) -> None:
        """What was written change by change is what would be written at once."""
        whole = self.state.all_rows()
        for table in TABLES:
            width = (
                len(TABLES[table].columns)
                - TABLES[table].key_columns
                - sum(name in BODY_COLUMNS for name in TABLES[table].columns)
            )
            if table == "bundles":
                width = 5
            assert self.tables[table] == {key: (row or ())[:width] for key, row in whole[table].items()}, table


def write_rows(
    tables: dict[str, dict[Row, Row]], bodies: dict[tuple[str, int], tuple[bytes, bytes]], rows: Rows
) -> None:
    """Put a checkpoint's rows in tables that are dicts, in the order in which they come."""
    fixed = len([name for name in TABLES["chunks"].columns if name not in BODY_COLUMNS]) - 2
    for table, changes in rows.items():
        for key, row in changes.items():
            if len(key) < TABLES[table].key_columns:
                for old in [old for old in tables[table] if old[0] == key[0]]:
                    del tables[table][old]
            elif row is None:
                tables[table].pop(key, None)
            elif table == "chunks":
                tables[table][key] = row[:fixed]
                if len(row) > fixed:
                    bodies[(key[0], key[1])] = row[fixed], row[fixed + 1]
            else:
                tables[table][key] = row


class Cluster:
    """A model and the replicas that are to agree with it. `checks` are those that are made, of `ALL_CHECKS`."""

    def __init__(self, random: Random, checks: frozenset[str]) -> None:
        self.random = random
        self.checks = checks
        self.model = Model()
        self.log: dict[int, bytes] = {}
        self.replicas = [
            Replica(self.log),
            Replica(self.log, 0),
            Replica(self.log, 100),
            Replica(self.log, random.choice([1000, 1 << 30])),
        ]
        self.books = Books()
        self.at_ms = 0

    @property
    def kept(self) -> Replica:
        """The one with tables."""
        return self.replicas[-1]

    def apply(self, messages: list[Message]) -> None:
        self.at_ms += self.random.choice([0, 1, 20])
        index = len(self.log) + 1
        self.log[index] = entry_body(messages)
        self.model.index = index
        expected = self.model.apply(self.at_ms, messages)
        for replica in self.replicas:
            outcomes = replica.state.apply(index, 1, self.at_ms, self.log[index])
            if "model" in self.checks:
                assert said(outcomes) == expected, "the model says something else"
            if "hash" in self.checks:
                assert replica.state.hash == self.replicas[0].state.hash, "equal logs, and hashes that differ"
        self.books.note(messages, outcomes)

    def step(self, chooser: Chooser) -> None:
        messages = chooser.entry()
        self.apply(messages)
        if self.random.random() < (
            0.8 if len(messages) > 10 else 0.3
        ):  # many small chunks are the ones to be laid together
            self.kept.checkpoint()
            if self.random.random() < 0.5:
                if "tables" in self.checks:
                    self.kept.check_tables()
                self.kept.load_again()
        self._look_at(self.random.choice(self.replicas))

    def _look_at(self, replica: Replica) -> None:
        if "books" in self.checks:
            self.books.check(replica.state, replica.bodies)
        if "model" in self.checks:
            compare(replica.state, self.model, replica.bodies)
        if "memory" in self.checks:
            held = (
                chunk.body_bytes
                for queue in replica.state.queues.values()
                for chunk in queue.chunks
                if chunk.body is not None
            )
            assert replica.state.body_memory_bytes == sum(held), "bytes in memory are miscounted"

    def check(self) -> None:
        self.kept.checkpoint()
        if "tables" in self.checks:
            self.kept.check_tables()
        for replica in self.replicas:
            self._look_at(replica)


ALL_CHECKS = frozenset({"model", "books", "hash", "tables", "memory"})


def run(random: Random, entries: int = ENTRIES, checks: frozenset[str] = ALL_CHECKS) -> None:
    """Commands by chance, on all replicas."""
    with (
        mock.patch.object(chunks, "CHUNK_ITEMS_TARGET", random.choice([4096, 24])),
        mock.patch.object(shares, "ITEMS_MIN", 3),
        mock.patch.object(shares, "ITEMS_MAX", 6),
    ):
        cluster = Cluster(random, checks)
        chooser = Chooser(random, cluster.model)
        if random.random() < 0.9:
            cluster.apply(beginning())
        for _ in range(entries):
            cluster.step(chooser)
        cluster.check()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(0, ENTRIES))
def test_states_that_keep_different_things_in_memory_are_all_the_model(random: Random, entries: int) -> None:
    run(random, entries)


@pytest.mark.parametrize("seed", range(12))
def test_a_longer_log_is_the_model_too(seed: int) -> None:
    run(Random(seed), 2 * ENTRIES)


# --- Every check can fail --------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def caught(checks: set[str], message: str) -> None:
    """One of the first logs by chance makes the check fail; `a|b` where it depends on the log which of two does so first."""
    for seed in range(40):
        try:
            run(Random(seed), checks=frozenset(checks))
        except AssertionError as error:
            assert any(one in str(error) for one in message.split("|")), f"another check failed first: {error}"
            return
    pytest.fail(f"no check noticed; one should have said {message!r}")


def handle(monkeypatch: Patch, kind: str, handler: Callable[[State, Message, Any], Any]) -> None:
    """Every state from now on has `handler` for commands of this kind."""
    made = State.__init__

    def make(self: State, *args: Any) -> None:
        made(self, *args)
        self._handlers[kind] = lambda message, context: handler(self, message, context)

    monkeypatch.setattr(State, "__init__", make)


def wrap(monkeypatch: Patch, owner: type, name: str, after: Callable[..., Any]) -> None:
    """`after(result, self, *args)` follows each call, and what it returns is what the caller gets."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args: after(function(self, *args), self, *args))


def ids_of_the_undeployed_come_again(m: Patch) -> None:
    def after(outcome: Outcome, state: State, message: Message, context: Any) -> Outcome:
        name = message.fields["pipeline"]
        if name in state.ended:
            state.ended[name] = (state.ended[name][0], 1)
        return outcome

    wrap(m, State, "_apply_undeploy", after)


def due_items_vanish(m: Patch) -> None:
    def due(state: State, message: Message, context: Any) -> Outcome:
        queue = state.queues.get(message.fields["queue"])
        if queue is not None:
            for item_id in sorted(set(message.fields["ids"]) & set(queue.delayed)):
                del queue.delayed[item_id]
                state._finish(queue, item_id, item_id + 1)
        return state._apply_due(message, context)

    handle(m, "due", due)


def done_is_reported_wrong(m: Patch) -> None:
    def done(state: State, message: Message, context: Any) -> Outcome:
        outcome = state._apply_done(message, context)
        return replace(outcome, fields={"count": outcome.fields["count"] + 1}) if outcome.result == "ok" else outcome

    handle(m, "done", done)


def ids_are_left_out(m: Patch) -> None:
    def after(count: int, state: State, queue: QueueState, *rest: Any) -> int:
        queue.next_id += queue.next_id > 5
        return count

    wrap(m, State, "_append", after)


def sessions_are_miscounted(m: Patch) -> None:
    wrap(m, LeaseMap, "add", lambda _, leases, lo, hi, fence: leases.held_by.update({fence[:2]: lo > 3}))


def taken_items_stay_ready(m: Patch) -> None:
    def take(state: State, message: Message, context: Any) -> Outcome:
        outcome = state._apply_take(message, context)
        if outcome.result == "ok":
            for lo, hi in message.fields["ranges"]:
                for a, b, _ in state.queues[message.fields["queue"]].leases.overlap(lo, hi):
                    state.queues[message.fields["queue"]].ready.add(a, b)
        return outcome

    handle(m, "take", take)


def joined_chunks_stay(m: Patch) -> None:
    def beside(index: ChunkIndex, old: list[Chunk], new: Chunk) -> None:
        at = index._chunks.index(old[0])
        index._chunks.insert(at, new)
        index._firsts.insert(at, new.first)

    m.setattr(ChunkIndex, "replace", beside)


def a_chunk_goes_with_its_first_item(m: Patch) -> None:
    def after(_: None, state: State, queue: QueueState, lo: int, hi: int) -> None:
        for chunk in queue.chunks.overlap(lo, hi):
            state._forget_chunk(queue, chunk)

    wrap(m, State, "_finish", after)


def discarded_items_stay_in_their_chunk(m: Patch) -> None:
    def keep(state: State, queue: QueueState, ids: Any) -> int:
        return sum(queue.parked.pop(item_id, None) is not None for item_id in ids)

    m.setattr(State, "_discard_parked", keep)


def parked_items_take_room(m: Patch) -> None:
    m.setattr(
        State, "_count_parked", lambda state, queue, item_id, change: queue.chunks.overlap(item_id, item_id + 1)[0]
    )


def open_bytes_drift(m: Patch) -> None:
    def after(_: None, state: State, queue: QueueState, lo: int, hi: int) -> None:
        queue.open_bytes += 1

    wrap(m, State, "_finish", after)


def a_parked_item_keeps_its_count(m: Patch) -> None:
    def after(parked: bool, state: State, queue: QueueState, item_id: int, *rest: Any) -> bool:
        queue.deliveries[item_id] = 1
        return parked

    wrap(m, State, "_count_delivery", after)


def outputs_come_twice(m: Patch) -> None:
    emit = State._emit
    wrap(m, State, "_emit", lambda _, state, *args: emit(state, *args))


def outputs_come_before_done(m: Patch) -> None:
    def done(state: State, message: Message, context: Any) -> Outcome:
        ports = commands.read_ports(message.fields["ports"], message.blobs)
        if message.fields["queue"] in state.queues and all(
            name in state.queues for port, _ in ports for name in port.queues
        ):
            state._emit(ports, None, context)
        return Outcome("done", "ok", {"count": 0})

    handle(m, "done", done)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (due_items_vanish, "an item is lost or counted twice"),
        (ids_of_the_undeployed_come_again, "an id of a pipeline that ended may be used again"),
        (done_is_reported_wrong, "what was said to be done is not what is done"),
        (ids_are_left_out, "an id is used twice or left out"),
        (sessions_are_miscounted, "what sessions hold is miscounted"),
        (taken_items_stay_ready, "an item is in two states|the range is leased already"),
        (joined_chunks_stay, "chunks overlap"),
        (a_chunk_goes_with_its_first_item, "an item has no bytes"),
        (discarded_items_stay_in_their_chunk, "a chunk's count of open items is off"),
        (parked_items_take_room, "a chunk's count of parked items is off"),
        (open_bytes_drift, "open bytes drift"),
        (a_parked_item_keeps_its_count, "deliveries of an item that is out of the way"),
        (outputs_come_twice, "a value is there twice"),
        (outputs_come_before_done, "an output of an item that is not done"),
    ],
)
def test_the_books_notice_a_state_whose(bug: Callable[[Patch], None], message: str, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    caught({"books"}, message)


@pytest.mark.parametrize("table", list(TABLES))
def test_the_tables_notice_a_change_that_is_not_written_to(table: str, monkeypatch: Patch) -> None:
    touch = State._touch
    monkeypatch.setattr(State, "_touch", lambda state, name, key: None if name == table else touch(state, name, key))
    caught({"tables"}, table)


def test_rows_of_a_queue_that_is_no_more_are_noticed(monkeypatch: Patch) -> None:
    def remove(state: State, queue: QueueState) -> None:
        for name in list(state._dirty):
            state._dirty[name] = {key for key in state._dirty[name] if queue.name not in (key, key[0])}
        del state.queues[queue.name]

    monkeypatch.setattr(State, "_remove_queue", remove)
    caught({"tables"}, "")


def test_a_hash_that_knows_of_memory_is_noticed(monkeypatch: Patch) -> None:
    def mix(state: State, outcome: Outcome) -> None:
        state.hash = b"%d" % state.body_memory_bytes

    monkeypatch.setattr(State, "_mix", mix)
    caught({"hash"}, "equal logs, and hashes that differ")


def test_bytes_in_memory_that_are_not_counted_are_noticed(monkeypatch: Patch) -> None:
    def drop(state: State, chunk: Chunk) -> None:
        chunk.lengths = chunk.body = None

    monkeypatch.setattr(State, "discount_body", drop)
    caught({"memory"}, "bytes in memory are miscounted")


# --- What the model notices: bugs that were here, and some that could be ----------------------------------------------


def release_by_anyone(m: Patch) -> None:
    def release(state: State, message: Message, context: Any) -> Outcome:
        queue = state.queues.get(message.fields["queue"])
        held = [h for lo, hi in message.fields["ranges"] for h in queue.leases.overlap(lo, hi)] if queue else []
        stolen = message._replace(fields={**message.fields, "fence": list(held[0][2])}) if held else message
        return state._apply_release(stolen, context)

    handle(m, "release", release)


def failure_by_anyone(m: Patch) -> None:
    def fail(state: State, message: Message, context: Any) -> Outcome:
        queue = state.queues.get(message.fields["queue"])
        held = queue.leases.overlap(message.fields["id"], message.fields["id"] + 1) if queue else []
        stolen = message._replace(fields={**message.fields, "fence": list(held[0][2])}) if held else message
        return state._apply_fail(stolen, context)

    handle(m, "fail", fail)


def a_divided_batch_is_half_done(m: Patch) -> None:
    handle(
        m,
        "done",
        lambda state, message, context: state._apply_done(
            message._replace(fields={**message.fields, "whole": False, "ports": []})
            if message.fields["whole"]
            else message,
            context,
        ),
    )


def what_never_ran_counts(m: Patch) -> None:
    def end(state: State, message: Message, context: Any) -> Outcome:
        node, boot = message.fields["node"], message.fields["boot"]
        if message.fields["ran"] is None:
            return state._apply_session_end(message, context)
        ran = {
            name: [i for lo, hi, _ in queue.leases.of_session(node, boot) for i in range(lo, hi)]
            for name, queue in state.queues.items()
        }
        return state._apply_session_end(message._replace(fields={**message.fields, "ran": ran}), context)

    handle(m, "session_end", end)


def one_delivery_more(m: Patch) -> None:
    wrap(m, State, "retries", lambda count, *_: count + 1)


def who_takes_from_outside_has_no_retries(m: Patch) -> None:
    wrap(m, State, "retries", lambda count, state, queue, *_: count if queue.read_by else 0)


def an_assignment_keeps_the_epoch(m: Patch) -> None:
    def assign(state: State, message: Message, context: Any) -> Outcome:
        outcome = state._apply_assign(message, context)
        if outcome.result == "ok" and outcome.fields["epoch"] > 1:
            state.producers[outcome.fields["producer"]].epoch -= 1
        return outcome

    handle(m, "assign", assign)


def one_shard_ends_for_all(m: Patch) -> None:
    m.setattr(
        State,
        "source_finished",
        lambda state, pipeline, stage: any(
            state.producers[key].finished
            for key in (pipeline.source_key(stage["name"], shard) for shard in range(stage["processes"]))
            if key in state.producers
        ),
    )


def a_put_does_not_wait(m: Patch) -> None:
    append = State._append
    m.setattr(State, "_append", lambda state, queue, port, *rest: append(state, queue, port._replace(delay_ms=None), *rest))


def a_time_of_day_is_taken_for_a_delay(m: Patch) -> None:
    m.setattr(queues, "by_clock", lambda at_ms: at_ms)


def a_run_goes_on_with_the_ticks_of_the_one_before(m: Patch) -> None:
    def start(state: State, message: Message, context: Any) -> Outcome:
        pipeline = state.pipelines.get(message.fields["pipeline"])
        ticks = pipeline.ticks if pipeline else {}
        outcome = state._apply_start_run(message, context)
        if pipeline:
            pipeline.ticks = ticks
        return outcome

    handle(m, "start_run", start)


def a_look_back_begins_at_the_beginning(m: Patch) -> None:
    m.setattr(State, "_begin_shares", lambda *_: None)


def what_is_parked_is_never_too_much(m: Patch) -> None:
    m.setattr(State, "_count_share", lambda *_: None)


def what_a_rate_let_through_is_not_in_the_log(m: Patch) -> None:
    m.setattr(State, "_pace", lambda *_: None)


def delayed_items_are_forgotten_at_the_end(m: Patch) -> None:
    m.setattr(QueueState, "open_count", property(lambda queue: len(queue.ready) + len(queue.leases)))


def a_token_counts_for_nothing(m: Patch) -> None:
    m.setattr(State, "_once", lambda state, message, context: state._handlers[message.kind](message, context))


def a_refusal_uses_up_its_token(m: Patch) -> None:
    once = State._once

    def used(state: State, message: Message, context: Any) -> Outcome:
        outcome = once(state, message, context)
        if outcome.result == "refused" and message.fields.get("once"):
            state.producers[f"once:{message.kind}:{message.fields['once']}"] = Producer(hash="{}")
        return outcome

    m.setattr(State, "_once", used)


def keys_outlive_a_run(m: Patch) -> None:
    begin = State._begin_queue

    def begin_with_keys(state: State, queue: QueueState) -> None:
        keys, queue.keys = queue.keys, {}
        begin(state, queue)
        queue.keys = keys

    m.setattr(State, "_begin_queue", begin_with_keys)


def results_outlive_a_run(m: Patch) -> None:
    begin = State._begin_queue

    def begin_with_results(state: State, queue: QueueState) -> None:
        results, queue.results = queue.results, False
        begin(state, queue)
        queue.results = results

    m.setattr(State, "_begin_queue", begin_with_results)


def keys_of_the_new_run_go_with_the_old(m: Patch) -> None:
    def after(rows: Rows, state: State) -> Rows:
        cleared = {key: row for key, row in rows.get("keys", {}).items() if len(key) == 1}
        return (
            {**rows, "keys": {**{key: row for key, row in rows["keys"].items() if len(key) == 2}, **cleared}}
            if cleared
            else rows
        )

    wrap(m, State, "rows_changed", after)


def queues_remember_an_older_version(m: Patch) -> None:
    def wire(state: State, pipeline: Any) -> None:
        for queue in state.queues.values():
            if queue.pipeline == pipeline.name:
                queue.read_by = None
        for record in pipeline.manifest["queues"]:
            queue = state.queue(pipeline.full(record["name"]))
            queue.maxsize, queue.bytes_max = record["maxsize"], record["bytes_max"]
            queue.read_by, queue.results = record["read_by"], record["results"]

    m.setattr(State, "_wire", wire)


def outputs_of_others_too(m: Patch) -> None:
    m.setattr(queues, "positions", lambda ranges, found: list(range(sum(hi - lo for lo, hi in found))))


def every_input_has_one_output(m: Patch) -> None:
    m.setattr(
        queues,
        "outputs_of",
        lambda inputs, counts: [at for at in inputs if counts is None or at < sum(commands.lengths_of(counts))],
    )


def bytes_begin_one_too_late(m: Patch) -> None:
    wrap(m, queues.Applying, "blob_offset", lambda offset, *_: offset + 1)


def a_part_of_a_put_is_sought_in_the_log(m: Patch) -> None:
    m.setattr(State, "_own_bytes", lambda state, queue, first, body: None)


def bodies_are_joined_backwards(m: Patch) -> None:
    join = State._join

    def backwards(state: State, queue: QueueState, chunks: list[Chunk]) -> None:
        bodies = [(chunk.lengths, chunk.body) for chunk in chunks]
        for chunk, body in zip(chunks, reversed(bodies), strict=True):
            chunk.lengths, chunk.body = body
        join(state, queue, chunks)

    m.setattr(State, "_join", backwards)


def a_source_goes_on_behind_its_end(m: Patch) -> None:
    def put(state: State, message: Message, context: Any) -> Outcome:
        producer = state.producers.get(message.fields["producer"][0])
        was_finished = producer is not None and producer.finished
        if producer is not None:
            producer.finished = False
        outcome = state._apply_put(message, context)
        if producer is not None:
            producer.finished = producer.finished or was_finished
        return outcome

    handle(m, "put", put)


def parts_of_others_go_at_a_deployment(m: Patch) -> None:
    def after(outcome: Outcome, state: State, *rest: Any) -> Outcome:
        state._forget_versions(list(state.uploads()))
        return outcome

    wrap(m, State, "_apply_deploy", after)


def a_version_that_does_not_start_stays(m: Patch) -> None:
    m.setattr(State, "_apply_roll_back", State._apply_rolled_out)


def a_deployment_said_again_begins_anew(m: Patch) -> None:
    def after(outcome: Outcome, state: State, message: Message, context: Any) -> Outcome:
        pipeline = state.pipelines.get(message.fields["pipeline"])
        if pipeline and pipeline.rollout and outcome.result == "ok":
            pipeline.rollout.nodes.clear()
        return outcome

    wrap(m, State, "_apply_deploy", after)


def the_former_version_is_forgotten_too_early(m: Patch) -> None:
    manifests = PipelineState.manifests.fget
    m.setattr(PipelineState, "manifests", property(lambda pipeline: manifests(pipeline)[-1:]))


def runs_begin_at_one_again(m: Patch) -> None:
    def after(outcome: Outcome, state: State, message: Message, context: Any) -> Outcome:
        name = message.fields["pipeline"]
        if name in state.ended:
            state.ended[name] = (0, state.ended[name][1])
        return outcome

    wrap(m, State, "_apply_undeploy", after)


@pytest.mark.parametrize(
    "bug",
    [
        a_source_goes_on_behind_its_end,
        parts_of_others_go_at_a_deployment,
        a_version_that_does_not_start_stays,
        a_deployment_said_again_begins_anew,
        the_former_version_is_forgotten_too_early,
        runs_begin_at_one_again,
        release_by_anyone,
        failure_by_anyone,
        a_divided_batch_is_half_done,
        what_never_ran_counts,
        one_delivery_more,
        who_takes_from_outside_has_no_retries,
        an_assignment_keeps_the_epoch,
        one_shard_ends_for_all,
        a_put_does_not_wait,
        a_time_of_day_is_taken_for_a_delay,
        a_run_goes_on_with_the_ticks_of_the_one_before,
        a_look_back_begins_at_the_beginning,
        what_is_parked_is_never_too_much,
        what_a_rate_let_through_is_not_in_the_log,
        delayed_items_are_forgotten_at_the_end,
        keys_outlive_a_run,
        a_token_counts_for_nothing,
        a_refusal_uses_up_its_token,
        results_outlive_a_run,
        keys_of_the_new_run_go_with_the_old,
        queues_remember_an_older_version,
        outputs_of_others_too,
        every_input_has_one_output,
        bytes_begin_one_too_late,
        a_part_of_a_put_is_sought_in_the_log,
        bodies_are_joined_backwards,
    ],
)
def test_the_model_notices_when(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    caught({"model"}, "")
