"""Seeded bugs: variants of the code under test, each of which some check must notice.

A check that never fails shows nothing. `MUTATIONS` has for each a patch, the words that the failure must contain, and
options that make what it needs more frequent. `first_failure` plays seeds until one fails.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from p2pcluster.core import rollouts
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import read_ports
from p2pcluster.core.delays import Delayed
from p2pcluster.core.executor import Executor
from p2pcluster.core.log import Log, Progress
from p2pcluster.core.messages import VoteRequest
from p2pcluster.core.node import Node
from p2pcluster.core.pacing import Pacers
from p2pcluster.core.queues import State
from p2pcluster.core.records import Outcome, QueueState
from p2pcluster.core.quorum import Configuration, agreed_value
from p2pcluster.core.raft import HardState, Raft, Role
from p2pcluster.core.ranges import RangeSet
from p2pcluster.core.ticks import Ticker
from p2pcluster.journal import Recovered, Write
from p2pcluster.neighbours import Neighbours
from tests.simulation.cluster import run
from tests.simulation.disk import Disk
from tests.simulation.machine import Life
from tests.simulation.options import draw
from tests.simulation.sim_journal import SimDisk, SimJournal

Patch = AbstractContextManager[Any]
SEEDS_MAX = 60


@dataclass(frozen=True)
class Mutation:
    """A seeded bug. `notices`: a pattern that what is said about it must match."""

    name: str
    patches: Callable[[], list[Patch]]
    notices: str
    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """The first seed that a mutation fails, and what was said."""

    seed: int
    seeds: int
    error: str


def first_failure(mutation: Mutation, seeds: Iterable[int]) -> Failure | None:
    """Play seeds with the bug until one fails."""
    played = 0
    for seed in seeds:
        played += 1
        with ExitStack() as stack:
            for patch in mutation.patches():
                stack.enter_context(patch)
            error = run(draw(seed, **mutation.given)).error
        if error is not None:
            return Failure(seed, played, error)
    return None


def is_noticed(mutation: Mutation, failure: Failure | None) -> bool:
    """Whether the failure is about the bug, and the seed passes without it."""
    if failure is None or not re.search(mutation.notices, failure.error):
        return False
    return run(draw(failure.seed, **mutation.given)).error is None


def swap(owner: Any, name: str, made: Callable[[Any], Any]) -> Callable[[], list[Patch]]:
    """A patch that puts `made(original)` in the place of a method."""
    def patches() -> list[Patch]:
        return [mock.patch.object(owner, name, made(getattr(owner, name)))]

    return patches


# ---- disks


def skipped_fsync() -> list[Patch]:
    """A write is acknowledged when it is with the system, and a crash takes the last ones back."""
    kept: dict[int, tuple[Any, int]] = {}
    write, crash = Disk.write, Disk.crash

    def lazily(self: Disk, wanted: Write) -> Any:
        store: Any = self._store
        image, writes = kept.get(id(self), (None, 0))
        if image is None or writes >= 5:
            kept[id(self)] = (copy.deepcopy(store.disk.image), 0)
        else:
            kept[id(self)] = (image, writes + 1)
        return write(self, wanted)

    def taking_back(self: Disk) -> None:
        store: Any = self._store
        if id(self) in kept:
            store.disk.image = kept.pop(id(self))[0]
        crash(self)

    return [mock.patch.object(Disk, "write", lazily), mock.patch.object(Disk, "crash", taking_back)]


def _vote_not_stored(original: Any) -> Any:
    def next_write(self: Life, ready: Any) -> Write:
        write: Write = original(self, ready)
        if write.hard_state is None:
            return write
        return replace(write, hard_state=HardState(write.hard_state.term, None))

    return next_write


def _term_not_stored(original: Any) -> Any:
    def next_write(self: Life, ready: Any) -> Write:
        write: Write = original(self, ready)
        forgets = write.hard_state is not None and write.hard_state.voted_for is None
        return replace(write, hard_state=None) if forgets else write

    return next_write


def _wrong_commit_index(original: Any) -> Any:
    def next_write(self: Life, ready: Any) -> Write:
        write: Write = original(self, ready)
        return replace(write, commit_index=self.node.raft.last_index) if write.entries else write

    return next_write


def _uncommitted_applied(original: Any) -> Any:
    def open_all(disk: SimDisk, body_memory_bytes_max: int = 1 << 30) -> tuple[SimJournal, Recovered]:
        disk.image.commit_idx = disk.image.last_index
        found: tuple[SimJournal, Recovered] = original(disk, body_memory_bytes_max)
        return found

    return open_all


def _snapshot_with_vote(original: Any) -> Any:
    def install(self: Disk, head: Any, rows: Any, hard_state: HardState | None) -> None:
        theirs = HardState(head.term, "of the sender")
        original(self, head, rows, theirs)

    return install


def _other_bytes(original: Any) -> Any:
    def read_bodies(self: Any, queue: str, chunk: Any) -> tuple[bytes, bytes]:
        lengths, body = original(self, queue, chunk)
        return lengths, body[1:] + body[:1]

    return read_bodies


def _never_compacts(original: Any) -> Any:
    return lambda self: 0


# ---- Raft


def _own_vote_early(original: Any) -> Any:
    def campaign(self: Raft, by_transfer: bool = False) -> None:
        original(self, by_transfer)
        self._votes[self.id] = True
        self._count_votes()

    return campaign


def _counts_itself_early(original: Any) -> Any:
    return lambda self: {**original(self), self.id: self.last_index}


def acknowledges_early() -> list[Patch]:
    """Everything is sent at once, durable or not."""
    def send_now(self: Raft, message_class: Any, to: str, **fields: Any) -> None:
        send(self, message_class, to, **fields)
        self._urgent.append(self._messages.pop())

    send = Raft._send
    return [mock.patch.object(Raft, "_send", send_now), mock.patch.object(Raft, "_send_early", send_now)]


def _commits_older_terms(original: Any) -> Any:
    def maybe_commit(self: Raft) -> None:
        index = agreed_value(self.configuration, self._match_indexes(), 0)
        if index > self.commit_index:
            self._commit_to(index)
            self._carry_configuration_on()

    return maybe_commit


def early_configuration() -> list[Patch]:
    """A leader changes the configuration although nothing of its own term is committed."""
    def can_change(self: Raft) -> bool:
        return (self.role is Role.LEADER and self._transfer_to is None and len(self._configurations) == 1
                and not self.configuration.is_joint)

    def check_serving(self: Node) -> bool:
        raft = self.raft
        if raft.role is Role.LEADER and not self._serving and raft.configuration.learners and can_change(raft):
            first, *others = raft.configuration.learners
            raft.change_configuration((*raft.configuration.voters, first), tuple(others), raft.cluster_time_ms(self._now_ms))
        return bool(original(self))

    original = Node._check_serving
    return [mock.patch.object(Raft, "can_change_configuration", property(can_change)),
            mock.patch.object(Node, "_check_serving", check_serving)]


def _refuses_as_learner(original: Any) -> Any:
    def on_request(self: Raft, message: Any) -> None:
        if self.configuration.is_voter(self.id):
            original(self, message)

    return on_request


def learner_refuses() -> list[Patch]:
    """A node that does not know yet that it is a voter gives no vote (etcd#10998)."""
    return [mock.patch.object(Raft, name, _refuses_as_learner(getattr(Raft, name)))
            for name in ("_on_vote_request", "_on_pre_vote_request")]


def _forgets_its_vote(original: Any) -> Any:
    def on_vote_request(self: Raft, message: VoteRequest) -> None:
        before = self._hard_state
        original(self, message)
        self._hard_state = before

    return on_vote_request


def _wins_with_any_vote(original: Any) -> Any:
    def count_votes(self: Raft) -> None:
        if self.role is Role.CANDIDATE and any(self._votes.values()) and self.id in self._votes:
            self._become_leader()
        else:
            original(self)

    return count_votes


def _any_log(original: Any) -> Any:
    return lambda self, last_index, last_term: True


def _any_ground(original: Any) -> Any:
    return lambda self, message: message.prev_index <= self.last_index


def _truncates_what_it_has(original: Any) -> Any:
    def append_foreign(self: Raft, message: Any) -> None:
        if self.log.floor_index <= message.prev_index < self.last_index:
            self._truncate(message.prev_index + 1)
        original(self, message)

    return append_foreign


def forgets_the_old_half() -> list[Patch]:
    """The new voters decide alone from the first entry of a change on (raft 6)."""
    def newest(self: Raft) -> Configuration:
        configuration = self._configurations[-1][1]
        return configuration.without_old() if configuration.is_joint else configuration

    return [mock.patch.object(Raft, "configuration", property(newest))]


def _skips_over_compacted(original: Any) -> Any:
    def wait_for_snapshot(self: Progress, base_index: int) -> None:
        self._probe_from(base_index + 1)

    return wait_for_snapshot


def _commit_goes_back(original: Any) -> Any:
    def on_append_entries(self: Raft, message: Any) -> None:
        original(self, message)
        if message.commit_index and message.prev_index and message.commit_index < self.commit_index:
            self.commit_index = max(self.applied_index - 1, message.commit_index, 0)

    return on_append_entries


# ---- states


def _reads_a_clock(original: Any) -> Any:
    def count_delivery(self: State, queue: Any, item_id: int, *rest: Any) -> bool:
        parked = bool(original(self, queue, item_id, *rest))
        if item_id in queue.delayed:
            self.clock = getattr(self, "clock", id(type(self)) % 7) + 1  # each node has its own
            queue.delayed[item_id] += self.clock
        return parked

    return count_delivery


def _done_twice(original: Any) -> Any:
    def apply_done(self: State, message: Message, context: Any) -> Outcome:
        outcome: Outcome = original(self, message, context)
        if outcome.result == "already" and message.fields["queue"] in self.queues:
            self.queues[message.fields["queue"]].done += 1
        return outcome

    return apply_done


def _emits_for_the_refused(original: Any) -> Any:
    def apply_done(self: State, message: Message, context: Any) -> Outcome:
        outcome: Outcome = original(self, message, context)
        if outcome.result == "already":
            self._emit(read_ports(message.fields["ports"], message.blobs), None, context)
        return outcome

    return apply_done


def _old_epoch(original: Any) -> Any:
    def apply_put(self: State, message: Message, context: Any) -> Outcome:
        key, epoch, seq = message.fields["producer"]
        producer = self.producers.get(key)
        if producer is not None and epoch < producer.epoch:
            message = message._replace(fields={**message.fields, "producer": [key, producer.epoch, seq]})
        outcome: Outcome = original(self, message, context)
        return outcome

    return apply_put


def _counts_nothing(original: Any) -> Any:
    return lambda self, queue, leases, ran: (set(), set())


def _visible_at_once(original: Any) -> Any:
    def hide(self: State, ports: Any, context: Any) -> Any:
        spans = original(self, ports, context)
        for name, first, count in spans:
            self.queues[name].hidden.remove(first, first + count)
            self.queues[name].ready.add(first, first + count)
            self.queues[name].put += count
        return spans

    return hide


def _gives_back_what_others_hold(original: Any) -> Any:
    def refuse_whole(self: State, queue: Any, message: Message, code: str) -> Outcome:
        for lo, hi in message.fields["ranges"]:
            self._release_found(queue, [(a, b) for a, b, _ in queue.leases.overlap(lo, hi)])
        return original(self, queue, message, code)  # type: ignore[no-any-return]

    return refuse_whole


def _releases_under_any_fence(original: Any) -> Any:
    def apply_release(self: State, message: Message, context: Any) -> Outcome:
        queue = self.queues[message.fields["queue"]]
        found = [(a, b) for lo, hi in message.fields["ranges"] for a, b, _ in queue.leases.overlap(lo, hi)]
        released = self._release_found(queue, found)
        return Outcome("release", "ok" if released else "already", {"count": released})

    return apply_release


def _keeps_leases(original: Any) -> Any:
    return lambda self: self._lost.clear()


def _nothing(original: Any) -> Any:
    return lambda self, *arguments: None


def _mixes_only_ok(original: Any) -> Any:
    def mix(self: State, outcome: Outcome) -> None:
        if outcome.result == "ok":
            original(self, outcome)

    return mix


def _applies_again(original: Any) -> Any:
    return lambda state, message, context: state._handlers[message.kind](message, context)


def _forgets_parked(original: Any) -> Any:
    def count_delivery(self: State, queue: Any, item_id: int, *rest: Any) -> bool:
        parked = bool(original(self, queue, item_id, *rest))
        if parked:
            del queue.parked[item_id]
        return parked

    return count_delivery


def _counts_what_waits(original: Any) -> Any:
    def on_exit(self: Executor, key: int, how: str, running: int, stderr: list[str], now_ms: int) -> None:
        works = self.processes[key].works
        if running and works:
            running = works[-1].slices[-1].hi - 1
        original(self, key, how, running, stderr, now_ms)

    return on_exit


# ---- leading


def _grants_twice(original: Any) -> Any:
    def grant(self: Node, session: Any, queue: Any, ranges: Any) -> None:
        original(self, session, queue, ranges)
        if self._random.random() < 0.2:
            self._promised[queue.name] = RangeSet()

    return grant


def grants_twice() -> list[Patch]:
    """What was promised is forgotten before its record is in the log."""
    def on_taken(self: Node, outcome: Outcome, queue: str, ranges: Any, session: Any, grant: Any) -> None:
        for lo, hi in ranges:
            self._promised.setdefault(queue, RangeSet()).remove(lo, hi)
        if grant is not None and grant.session in self.sessions:
            self._outbox.append((grant.session, grant))

    return [mock.patch.object(Node, "_grant", _grants_twice(Node._grant)), mock.patch.object(Node, "_on_taken", on_taken)]


def _answers_early(original: Any) -> Any:
    def admit(self: Node, session: Any, message: Message) -> None:
        original(self, session, message)
        seq = message.fields["producer"][2]
        self._reply(session.id, message, "ok", seq=seq, added=0)

    return admit


def _fence_again(original: Any) -> Any:
    def grant(self: Node, session: Any, queue: Any, ranges: Any) -> None:
        self._take_count = min(self._take_count, 3)
        original(self, session, queue, ranges)

    return grant


def any_cluster() -> list[Patch]:
    """A node works for whoever leads, of whatever cluster."""
    def serving_leader(self: Neighbours) -> tuple[str, int, int] | None:
        assert self.node is not None
        if self.node.is_serving:
            return self.node_id, self.node.raft.term, 0
        said = [(hello.term, node_id) for node_id, hello in self.hellos.items() if hello.leader == node_id and hello.is_here]
        term, leader = max(said, default=(0, None))
        return None if leader is None else (leader, term, self.hellos[leader].number)

    def find(self: Life, now_ms: int) -> None:
        original(self, now_ms)
        for peer in self.discovery.live_peers(now_ms):
            if self._led_by is None and peer.node_id != self.node_id:
                self.peers.want(peer.node_id, peer.tcp_address, peer.node_id)

    original = Life._find
    return [mock.patch.object(Neighbours, "serving_leader", serving_leader), mock.patch.object(Life, "_find", find)]


# ---- versions


def _keeps_what_waits(original: Any) -> Any:
    def replace_stage(self: Executor, full: str, queue: str, record: Any, former: Any) -> Any:
        waiting = list(former.buffer) if former is not None else []
        if former is not None:
            former.buffer.clear()
        stage = original(self, full, queue, record, former)
        stage.buffer.extend(waiting)
        return stage

    return replace_stage


def _gives_before_the_plan(original: Any) -> Any:
    return lambda self, session, queue: session.has_reported and queue.pipeline in session.versions


def _gives_of_paused(original: Any) -> Any:
    def room_behind(self: Node, queue: QueueState) -> int:
        pipeline = self.state.pipelines.get(queue.pipeline)
        paused = {} if pipeline is None else dict(pipeline.paused)
        if pipeline is not None:
            pipeline.paused.clear()
        room: int = original(self, queue)
        if pipeline is not None:
            pipeline.paused.update(paused)
        return room

    return room_behind


def _forgets_pauses(original: Any) -> Any:
    def load_projects(self: State, *row: Any) -> None:
        original(self, *row)
        self.pipelines[row[0]].paused.clear()

    return load_projects


def stays_where_it_does_not_start() -> list[Patch]:
    """Nobody notices what does not start."""
    return [mock.patch.object(rollouts, "_failures", lambda pipeline, rolled: iter(()))]


def _forgets_the_nodes(original: Any) -> Any:
    def load_projects(self: State, *row: Any) -> None:
        original(self, *row)
        pipeline = self.pipelines.get(row[0])
        if pipeline is not None and pipeline.rollout is not None:
            pipeline.rollout.nodes.clear()

    return load_projects


def _ids_again(original: Any) -> Any:
    def apply_undeploy(self: State, message: Message, context: Any) -> Outcome:
        outcome: Outcome = original(self, message, context)
        self.ended = {name: (run, 1) for name, (run, _) in self.ended.items()}
        return outcome

    return apply_undeploy


# ---- when things happen


def _ticks_early(original: Any) -> Any:
    return lambda self, state, owners, wall_ms: original(self, state, owners, wall_ms + 300)


def _due_early(original: Any) -> Any:
    return lambda self, cluster_ms, wall_ms, count: original(self, cluster_ms + 200, wall_ms + 200, count)


def each_leader_has_a_bucket() -> list[Patch]:
    """What went through is not in the log."""
    def begin(self: Node) -> None:
        self._pacers = Pacers()
        original(self)

    original = Node._begin_serving
    return [mock.patch.object(State, "_pace", lambda *arguments: None), mock.patch.object(Node, "_begin_serving", begin)]


def _gives_all(original: Any) -> Any:
    return lambda self, full_ns, interval_ns, now_ms, wanted: wanted


def _waits_not(original: Any) -> Any:
    def append(self: State, queue: Any, port: Any, *more: Any) -> int:
        count: int = original(self, queue, port._replace(delay_ms=None, at_ms=None), *more)
        return count

    return append


HARD: dict[str, Any] = {"crash_every_ms": 900, "machines": 5, "voters": 3, "late": 0, "real_journal": False}
SIM: dict[str, Any] = {"real_journal": False}
UPDATED: dict[str, Any] = {**HARD, "deploy_every_ms": 400, "undeploy_every_ms": 400}
SLOW_DISKS: dict[str, Any] = {**HARD, "fsync_ms_max": 25}
SWAPPING: dict[str, Any] = {**SLOW_DISKS, "crash_every_ms": 2_500, "down_ms_max": 8_000, "delay_ms_max": 40,
                            "partition_every_ms": 2_000}
ALONE: dict[str, Any] = {**SLOW_DISKS, "voters": 1, "machines": 2}
GROWING: dict[str, Any] = {**HARD, "voters": 1, "machines": 4}

CONTROLLED: dict[str, Any] = {**HARD, "control_every_ms": 200}

MUTATIONS: tuple[Mutation, ...] = (
    Mutation("what is paused is given", swap(Node, "_room_behind", _gives_of_paused), "its stage is paused", CONTROLLED),
    Mutation("a loaded pipeline is not paused", swap(State, "_load_projects", _forgets_pauses), "paused|hash", CONTROLLED),
    Mutation("skipped fsync", skipped_fsync, "forgot|lost|wrote", HARD),
    Mutation("vote not stored", swap(Life, "_next_write", _vote_not_stored), "own vote is not durable|a vote in term", SIM),
    Mutation("term not stored", swap(Life, "_next_write", _term_not_stored), "which is not durable|forgot term", HARD),
    Mutation("wrong commit index recorded", swap(Life, "_next_write", _wrong_commit_index), "durable on|is committed|hash", HARD),
    Mutation("uncommitted entries applied at recovery", swap(SimJournal, "open", _uncommitted_applied), "durable on|hash", HARD),
    Mutation("a snapshot that carries the vote", swap(Disk, "install", _snapshot_with_vote), "after a snapshot", GROWING),
    Mutation("bytes of another item", swap(SimJournal, "read_bodies", _other_bytes), "was put|is not the log's|do not add",
             {**SIM, "body_memory_bytes_max": 0}),
    Mutation("a log that is never compacted", swap(Life, "_keep_from_index", _never_compacts), "bytes of log",
             {**HARD, "log_bytes_max": 3_000}),
    Mutation("own vote counted before the commit", swap(Raft, "_campaign", _own_vote_early), "not durable", ALONE),
    Mutation("own log counted before the commit", swap(Raft, "_match_indexes", _counts_itself_early), "durable on", ALONE),
    Mutation("acknowledged before the fsync", acknowledges_early, "not durable", SLOW_DISKS),
    Mutation("commit by counting an older term", swap(Raft, "_maybe_commit", _commits_older_terms), "by counting",
             {**HARD, "append_bytes_max": 200, "loss": 0.1, "partition_every_ms": 1_500}),
    Mutation("configuration before the no-op", early_configuration, "before anything of term", GROWING),
    Mutation("a learner that refuses to vote", learner_refuses, "no progress: 0 leaders",
             {**SIM, "machines": 4, "voters": 1, "late": 0, "crash_every_ms": 0, "partition_every_ms": 0, "pause_every_ms": 0,
              "change_crash_share": 0.5}),
    Mutation("a vote that is forgotten", swap(Raft, "_on_vote_request", _forgets_its_vote), " votes for .* and |not durable", HARD),
    Mutation("a leader by any vote", swap(Raft, "_count_votes", _wins_with_any_vote), "election safety|two leaders|durable on|by counting",
             {**HARD, "voters": 5}),
    Mutation("votes for any log", swap(Log, "is_up_to_date", _any_log), "leader completeness|durable on|lost it|cut off", HARD),
    Mutation("appends to any ground", swap(Raft, "_stands_on_common_ground", _any_ground), "log matching", HARD),
    Mutation("cuts off what it has", swap(Raft, "_append_foreign", _truncates_what_it_has),
             "would be cut off|lost it|cuts off|leader completeness|is not durable", HARD),
    Mutation("the old half forgotten", forgets_the_old_half, "durable on|election safety|two leaders",
             SWAPPING),
    Mutation("compaction without a snapshot", swap(Progress, "wait_for_snapshot", _skips_over_compacted), "no progress",
             {**GROWING, "log_bytes_max": 3_000}),
    Mutation("a commit index that goes back", swap(Raft, "_on_append_entries", _commit_goes_back), "goes back from commit|committed",
             {**HARD, "loss": 0.3, "delay_ms_max": 40}),
    Mutation("an apply that reads the clock", swap(State, "_count_delivery", _reads_a_clock), "is not the log's", SIM),
    Mutation("done applied twice", swap(State, "_apply_done", _done_twice), "are open", HARD),
    Mutation("outputs of what was refused", swap(State, "_apply_done", _emits_for_the_refused), "are open|instead of|never put|is not the log's", HARD),
    Mutation("an old epoch accepted", swap(State, "_apply_put", _old_epoch), "instead of", {**HARD, "process_dies_share": 0.05}),
    Mutation("session_end that counts nothing", swap(State, "_ran_in", _counts_nothing), "instead of", HARD),
    Mutation("deliveries counted for what only waits", swap(Executor, "on_exit", _counts_what_waits), "deliveries count",
             {**HARD, "process_dies_share": 0.05}),
    Mutation("a release by a stale fence", swap(State, "_apply_release", _releases_under_any_fence), "instead of", SIM),
    Mutation("parts that outlive their lease", swap(State, "_withdraw", _nothing), "instead of|is not the log's",
             {**HARD, "process_dies_share": 0.05}),
    Mutation("parts that are seen at once", swap(State, "_hide", _visible_at_once), "put in|twice or left out|is not done|instead of", SIM),
    Mutation("a divided batch that gives back what others hold", swap(State, "_refuse_whole", _gives_back_what_others_hold),
             "instead of|is not the log's|two valid fences", {**HARD, "process_dies_share": 0.05, "client_puts": 12, "clients": 3}),
    Mutation("keys forgotten", swap(State, "_load_keys", _nothing), "instead of|is not the log's|hash", HARD),
    Mutation("what is said twice happens twice", swap(State, "_once", _applies_again), "instead of|is not the log's", HARD),
    Mutation("a hash that leaves something out", swap(State, "_mix", _mixes_only_ok), "hash", SIM),
    Mutation("a parked item lost", swap(State, "_count_delivery", _forgets_parked), "are open", SIM),
    Mutation("a lease that outlives its session", swap(Node, "_end_lost_sessions", _keeps_leases), "no progress", HARD),
    Mutation("parts of a grant given twice", grants_twice, "two valid fences|given twice|holds an item", SIM),
    Mutation("a fence used again", swap(Node, "_grant", _fence_again), "given twice", SIM),
    Mutation("a put answered before it is committed", swap(Node, "_admit", _answers_early), "acknowledged put is lost", SIM),
    Mutation("a tick before its time", swap(Ticker, "look", _ticks_early), "before its time", {**SIM, "wall_skew_ms_max": 0}),
    Mutation("ticks that are not noted", swap(State, "_note_tick", _nothing), "is not the log's|behind the one before", SIM),
    Mutation("an item before its time", swap(Delayed, "due", _due_early), "ready before its time", SIM),
    Mutation("a put that does not wait", swap(State, "_append", _waits_not), "is not the log's|instead of", SIM),
    Mutation("a rate that is not kept", swap(Pacers, "allowed", _gives_all), "than its rate allows", SIM),
    Mutation("a bucket for each leader", each_leader_has_a_bucket, "is not the log's|than its rate allows", HARD),
    Mutation("items that wait go to the next version", swap(Executor, "_replace_stage", _keeps_what_waits), "in a process of version", UPDATED),
    Mutation("items for a version that is not in force", swap(Node, "_may_be_given", _gives_before_the_plan), "is in force", UPDATED),
    Mutation("a version that does not start stays", stays_where_it_does_not_start, "no progress", UPDATED),
    Mutation("a roll-out that is forgotten", swap(State, "_load_projects", _forgets_the_nodes), "is not the log's|instead of|hash", UPDATED),
    Mutation("ids of an undeployed pipeline used again", swap(State, "_apply_undeploy", _ids_again), "is not the log's|instead of|used again|open",
             UPDATED),
    Mutation("any cluster's leader obeyed", any_cluster, "of (another )?cluster", {**SIM, "machines": 4, "voters": 0, "late": 0, "loss": 0.3, "udp_cut_every_ms": 1_500}),
)
