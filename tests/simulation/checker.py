"""What must hold in a simulated cluster after every event, and what must hold at its end.

`Checker` remembers what was shown to anybody: that may never be untrue again. `Ledger` is the state that the committed
log stands for, item by item, in the plain words of `queue_model.Model`; each node's state has to agree with it. The
checker looks at disks, messages and states, and never asks the code under test whether it is right.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from p2pcluster.core.codec import Message
from p2pcluster.core.commands import decode_commands
from p2pcluster.core.log import COMMANDS, CONFIG, NOOP, Entry
from p2pcluster.core.messages import AppendReply, PreVoteReply, PreVoteRequest, RaftMessage, VoteReply, decode_configuration
from p2pcluster.core.grants import Grant
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.queues import State
from p2pcluster.core.records import Outcome, QueueState
from p2pcluster.core.quorum import Configuration, has_majority
from p2pcluster.core.raft import HardState, Ready, Role
from p2pcluster.core.ranges import Fence
from p2pcluster.core.snapshot import Head
from p2pcluster.journal import Recovered
from tests.simulation import pipeline
from tests.simulation.queue_model import OPEN, Item, Model, ModelQueue, Said, compare, said

if TYPE_CHECKING:
    from tests.simulation.disk import Durable
    from tests.simulation.machine import Life, Machine
    from tests.simulation.processes import SimStage

_SORTED = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
COMPARED_EVERY = 29  # entries, from one full comparison of a state with the ledger to the next


class Violation(AssertionError):
    """What must hold does not."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)


class Ledger(Model):
    """The state of the committed log, entry by entry, and the books about it."""

    def __init__(self) -> None:
        super().__init__()
        self.index = 0
        self.hash = bytes(16)
        self.discarded: Counter[str] = Counter()
        self.ran: Counter[tuple[str, int]] = Counter()  # by queue and item, how often a process began it
        self.counted: Counter[tuple[str, int]] = Counter()  # deliveries of which somebody said that they ran
        self.outcomes: Counter[str] = Counter()
        self.done_ids: dict[str, set[int]] = {}
        self.said: dict[int, list[Said]] = {}
        self.hashes: dict[int, bytes] = {0: bytes(16)}
        self.ended_sessions: set[tuple[str, str]] = set()
        self.counts: dict[int, dict[str, tuple[int, ...]]] = {}
        self.latest_wall_ms = 0  # what some machine may take for the time of day, at most
        self._tick_ms: dict[str, int] = {}
        self._paced_fences: set[tuple[Any, ...]] = set()
        self._paced_level, self._paced_ms = 0.0, 0

    def take_in(self, entry: Entry) -> None:
        """The next committed entry."""
        assert entry.index == self.index + 1, "the ledger takes entries in their order"
        self.index = entry.index
        if entry.kind == COMMANDS:
            messages = [message for message, _ in decode_commands(bytes(entry.body))]
            outcomes = self.apply(entry.at_ms, messages)
            self.said[entry.index] = outcomes
            for outcome in outcomes:
                self.outcomes[f"{outcome[0]} {outcome[2].get('code', outcome[1])}"] += 1
                text = _SORTED.encode(outcome[:3])
                self.hash = hashlib.blake2b(self.hash + text.encode(), digest_size=16).digest()
        self.hashes[entry.index] = self.hash

    def _end(self, queue: ModelQueue, item: Item, state: str) -> None:
        if state == "done":
            done = self.done_ids.setdefault(queue.name, set())
            require(item.id not in done, f"item {queue.name}:{item.id} is done twice")
            done.add(item.id)
        else:
            self.discarded[queue.name] += 1
        super()._end(queue, item, state)

    def _add(self, name: str, body: bytes, key: str | None = None, parents: tuple[Item, ...] = ()) -> Item:
        for parent in parents:
            require(parent.state == "done", f"an output in {name} has a parent that is not done")
        require(len(parents) < 2 or self.queues[name].record is None or name == f"{pipeline.NAME}/eat.results",
                f"an output in {name} has {len(parents)} parents")
        return super()._add(name, body, key, parents)

    def _count_delivery(self, queue: ModelQueue, item: Item, fields: dict[str, Any], in_company: bool = False) -> bool:
        if fields.get("ran", ...) is not None:
            key = queue.name, item.id
            self.counted[key] += 1
            require(self.counted[key] <= self.ran[key],
                    f"{queue.name}:{item.id} ran {self.ran[key]} times, and {self.counted[key]} deliveries count")
        return super()._count_delivery(queue, item, fields, in_company)

    def _done(self, fields: dict[str, Any], blobs: Any) -> tuple[Any, ...]:
        before = {name: len(queue.items) for name, queue in self.queues.items()}
        result = super()._done(fields, blobs)
        stage = pipeline.STAGE_OF.get(fields["queue"])
        if stage is not None and result[0] == "ok":
            self._check_outputs(stage, before)
        return result

    def _part(self, fields: dict[str, Any], blobs: Any) -> tuple[Any, ...]:
        before = {name: len(queue.items) for name, queue in self.queues.items()}
        result = super()._part(fields, blobs)
        if result[0] == "ok":
            self._check_outputs(pipeline.STAGE_OF[fields["queue"]], before)
        return result

    def _check_outputs(self, stage: str, before: dict[str, int]) -> None:
        """Each output is what the stage makes of the parent that the log names."""
        record = next(record for record in pipeline.MANIFEST["stages"] if record["name"] == stage)
        for number, port in enumerate(record["ports"]):
            for name in port["queues"]:
                queue = self.queues[f"{pipeline.NAME}/{name}"]
                for item_id in range(before[queue.name] + 1, len(queue.items) + 1):
                    item = queue.items[item_id]
                    made = [value for parent in item.parents for at, value in pipeline.outputs(stage, parent.body) if at == number]
                    require(item.body in made, f"{queue.name}:{item_id} is no output of {[parent.body for parent in item.parents]}")

    # ---- when things happen

    def _due(self, fields: dict[str, Any], blobs: Any) -> tuple[Any, ...]:
        queue = self.queues.get(fields["queue"])
        for item in [queue.items[i] for i in fields["ids"] if i in queue.items] if queue else []:
            if item.state == "delayed":
                is_time = item.due_ms <= self.at_ms if item.due_ms >= 0 else -item.due_ms <= self.latest_wall_ms
                require(is_time, f"{fields['queue']}:{item.id} is ready before its time, {item.due_ms}")
        return super()._due(fields, blobs)

    def _take(self, fields: dict[str, Any], blobs: Any) -> tuple[Any, ...]:
        """Over any time no more is given out of a queue with a rate than that and one burst. What a machine had all the while, and is
        leased to it anew, is not given out again: it has the fence that it had."""
        result = super()._take(fields, blobs)
        fence = tuple(fields["fence"])
        if fields["queue"] == pipeline.RATED and result[0] == "ok" and fence not in self._paced_fences:
            self._paced_fences.add(fence)
            passed = (self.at_ms - self._paced_ms) / pipeline.RATE_INTERVAL_MS
            self._paced_level = max(0.0, self._paced_level - passed) + result[1]["count"]
            self._paced_ms = self.at_ms
            require(self._paced_level <= pipeline.RATE_BURST + 1e-6, f"more of {pipeline.RATED} is given out than its rate allows")
        return result

    def _put(self, fields: dict[str, Any], blobs: Any) -> tuple[Any, ...]:
        key, _, seq = fields["producer"]
        before = self._ticks_of(key)
        result = super()._put(fields, blobs)
        if result[0] == "ok" and fields["source"] is not None and "tick_ms" in fields["source"]:
            self._look_at_tick(key, seq, fields["source"]["tick_ms"], before)
        return result

    def _ticks_of(self, key: str) -> int | None:
        """The time of the source's last tick, by the log."""
        return self._tick_ms.get(key)

    def _look_at_tick(self, key: str, seq: int, at_ms: int, before_ms: int | None) -> None:
        """Ticks come in their order, none before its time, each some whole intervals behind the one before: one, where all are made up for."""
        stage = key.split("/")[2]
        require(at_ms <= self.latest_wall_ms, f"tick {seq} of {stage} is run before its time")
        require((before_ms is None) == (seq == 1), f"tick {seq} of {stage} follows none")
        interval_ms = round(1000 * pipeline.TICK_S[stage])
        if before_ms is not None:
            count, rest = divmod(at_ms - before_ms, interval_ms)
            is_right = rest == 0 and (count == 1 if stage == "tick" else count >= 1)
            require(is_right, f"tick {seq} of {stage} is {at_ms - before_ms} ms behind the one before it")
        self._tick_ms[key] = at_ms

    def open_count(self, queue: str) -> int:
        return sum(1 for item in self.queues[queue].items.values() if item.state in OPEN)


class Facts:
    """What is known of one cluster: its log, and who led it."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.leader_of: dict[int, str] = {}
        self.entry_at: dict[tuple[int, int], tuple[bytes, int]] = {}
        self.committed: dict[int, tuple[int, int]] = {}  # the entry's term, and the term in which it was committed
        self.commit_index = 0
        self.configuration_at: dict[tuple[int, int], Configuration] = {}  # by index and term of its entry

    def found(self, entries: tuple[Entry, ...], configuration: Configuration) -> None:
        """What the cluster begins with."""
        self.configuration_at[(0, 0)] = configuration
        self.committed[0] = (0, 0)
        for entry in entries:
            self.committed[entry.index] = (entry.term, entry.term)
            self.commit_index = entry.index
            self.ledger.take_in(entry)


class Checker:
    """See the module."""

    def __init__(self) -> None:
        self.machines: list[Machine] = []
        self.clusters: dict[str | None, Facts] = {}
        self.main_id: str | None = None  # the cluster that the work is for
        self.vote_of: dict[tuple[str, int], str] = {}
        self.cluster_of: dict[str, str] = {}
        self.wiped: dict[str | None, Durable] = {}  # what disks held that were there when an entry was acknowledged
        self.elections = 0
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._told_term: dict[str, int] = {}
        self._told_entries: dict[str, tuple[int, int]] = {}
        self._led: set[tuple[str, int]] = set()
        self._looked_at: dict[str, Configuration] = {}
        self._grants: dict[Fence, tuple[str, list[tuple[int, int]]]] = {}
        self._version_of: dict[Fence | None, str | None] = {}  # that items were given for
        self._paused: dict[tuple[str, str], frozenset[str]] = {}  # by node and pipeline, the stages that it knew to be paused
        self._paused_at: dict[tuple[str, str], int] = {}  # by node and pipeline, the event in which it heard last of one more
        self._deployed_at: dict[tuple[str, str], int] = {}  # by node and pipeline, the event in which it heard last of another version

    def of(self, life: Life) -> Facts:
        """What is known of the life's cluster."""
        return self._facts(life.cluster_id)

    def _facts(self, cluster_id: str | None) -> Facts:
        found = self.clusters.get(cluster_id)
        if found is None:
            found = self.clusters[cluster_id] = Facts()
        return found

    def found(self, cluster_id: str, entries: tuple[Entry, ...], configuration: Configuration) -> None:
        """There is a cluster; the first one is that for which the work is."""
        self.main_id = self.main_id or cluster_id
        self._facts(cluster_id).found(entries, configuration)

    @property
    def main(self) -> Facts:
        return self._facts(self.main_id)

    def configurations(self) -> set[Configuration]:
        """Those that are in force somewhere, or may be again: the last committed one, and what lies above it in any log."""
        known, committed = self.main.configuration_at, self.main.committed
        last = max((at for at, term in known if committed.get(at, (-1, 0))[0] == term), default=0)
        found = {configuration for (at, term), configuration in known.items()
                 if at == last and committed.get(at, (0, 0))[0] == term}
        for (at, term), configuration in known.items():
            if at > last and any(machine.disk.durable.terms.get(at) == term for machine in self.machines):
                found.add(configuration)
        return found

    # ---- a life begins

    def started(self, life: Life, recovered: Recovered) -> None:
        """A node has read its disk: what it had told is there, and what nobody had committed was not applied."""
        node_id, raft, durable = life.node_id, life.node.raft, life.machine.disk.durable
        if life.cluster_id is not None:
            self._belongs(life)
            if raft.configuration.voters and (0, 0) not in self.of(life).configuration_at:  # it died behind the write that founds
                self.found(life.cluster_id, (), raft.configuration)
        require(raft.term >= self._told_term.get(node_id, 0),
                f"{life.name} forgot term {self._told_term.get(node_id)} and is in {raft.term}")
        require(recovered.hard_state == durable.hard_state,
                f"{life.name} wrote {durable.hard_state} and reads {recovered.hard_state}")
        require(recovered.commit_index >= durable.commit_index,
                f"{life.name} wrote that {durable.commit_index} is committed and reads {recovered.commit_index}")
        vote = self.vote_of.get((node_id, raft.term))
        require(vote in (None, raft.hard_state.voted_for), f"{life.name} forgot its vote for {vote} in term {raft.term}")
        index, term = self._told_entries.get(node_id, (0, 0))
        require(index <= raft.log.base_index or raft.log.holds(index, term),
                f"{life.name} acknowledged entry {index} of term {term} and lost it")
        self.look_at_entries(life, list(life.journal.entries(raft.log.base_index)))
        self._seen[node_id] = (raft.term, raft.commit_index, life.machine.starts)
        self._commit(life, is_recovered=True)
        self._recovered_state(life, recovered)

    def _recovered_state(self, life: Life, recovered: Recovered) -> None:
        state = recovered.state
        ledger = self.of(life).ledger
        for entry in life.journal.entries(recovered.base_index):
            if ledger.index < entry.index <= state.applied_idx:
                self._take_in(life, ledger, entry)
        self.look_at_state(life, state)

    @staticmethod
    def _take_in(life: Life, ledger: Ledger, entry: Entry) -> None:
        ledger.latest_wall_ms = pipeline.EPOCH_MS + life.world.now_ms + life.options.wall_skew_ms_max
        ledger.take_in(entry)

    def joined(self, life: Life) -> None:
        self._belongs(life)
        if life.node.raft.configuration.voters:
            assert life.cluster_id is not None
            self.found(life.cluster_id, (), life.node.raft.configuration)

    def _belongs(self, life: Life) -> None:
        cluster_id = life.cluster_id
        assert cluster_id is not None
        known = self.cluster_of.setdefault(life.node_id, cluster_id)
        has_copy = bool(life.node.raft.configuration.members) or life.node.raft.last_index > 0
        require(known == cluster_id or not has_copy, f"{life.name} went from cluster {known} to {cluster_id} with a copy")
        self.cluster_of[life.node_id] = cluster_id

    # ---- after every event

    def look(self, life: Life) -> None:
        """Something has happened on the node."""
        raft, node_id = life.node.raft, life.node_id
        term, commit_index, _ = self._seen.get(node_id, (0, 0, 0))
        require(raft.term >= term, f"{life.name} goes back from term {term} to {raft.term}")
        require(raft.commit_index >= commit_index or raft.last_index == 0,
                f"{life.name} goes back from commit index {commit_index} to {raft.commit_index}")
        require(raft.applied_index <= raft.commit_index <= raft.last_index, f"{life.name} applied the uncommitted")
        self._seen[node_id] = (raft.term, raft.commit_index, life.machine.starts)
        if raft.role is Role.LEADER:
            self._look_at_leader(life)
        self._commit(life, is_recovered=False)
        self._look_at_members(life)

    def _look_at_leader(self, life: Life) -> None:
        raft = life.node.raft
        if (life.node_id, raft.term) in self._led:
            return
        self._led.add((life.node_id, raft.term))
        self.elections += 1
        life.world.mark(life.name, "leads term", raft.term)
        facts = self.of(life)
        first = facts.leader_of.setdefault(raft.term, life.node_id)
        require(first == life.node_id, f"election safety: {first} and {life.node_id} both lead term {raft.term}")
        stored = life.machine.disk.durable.hard_state
        require((stored.term, stored.voted_for) == (raft.term, life.node_id),
                f"{life.name} leads term {raft.term} and its own vote is not durable: {stored}")
        for index, (term, committed_in) in facts.committed.items():
            held = index <= raft.log.base_index or raft.log.holds(index, term) or raft.term < committed_in
            require(held, f"leader completeness: {life.name} leads term {raft.term} without the committed entry {index}")

    def _commit(self, life: Life, is_recovered: bool) -> None:
        """The node is the first to know of these commits: a majority holds them on its disks."""
        raft, facts = life.node.raft, self.of(life)
        index = raft.commit_index
        if index <= facts.commit_index:
            return
        for newly in range(max(facts.commit_index, raft.log.base_index - 1) + 1, index + 1):
            facts.committed[newly] = (raft.log.term(newly), raft.term)
        facts.commit_index = index
        term = raft.log.term(index)
        if raft.role is Role.LEADER:
            require(term == raft.term, f"{life.name} commits entry {index} of term {term} by counting, in term {raft.term}")
        disks = {**self.wiped, **{machine.node_id: machine.disk.durable for machine in self.machines}}
        holders = {node_id for node_id, durable in disks.items() if node_id and durable.holds(index, term)}
        configuration = raft.committed_configuration if is_recovered else configuration_at(raft)
        require(has_majority(configuration, holders),
                f"{life.name} committed entry {index}, which is durable on {sorted(holders)} only,"
                f" and the voters are {configuration}")

    def _look_at_members(self, life: Life) -> None:
        if life.cluster_id is None:
            return
        configuration = life.node.raft.configuration
        if self._looked_at.get(life.node_id) is configuration:
            return
        self._looked_at[life.node_id] = configuration
        for member in configuration.members:
            cluster_id = self.cluster_of.get(member, life.cluster_id)
            require(cluster_id == life.cluster_id,
                    f"{life.name} of cluster {life.cluster_id} counts {member} of cluster {cluster_id}")

    def look_at_executor(self, life: Life) -> None:
        """The machine's half has heard something: it holds no item twice."""
        for queue, held in life.queues_held():
            end = 0
            for lo, hi, _ in sorted(held):
                require(lo >= end, f"{life.name} holds an item of {queue} twice: {sorted(held)}")
                end = hi

    # ---- messages

    def look_at_message(self, life: Life, message: RaftMessage) -> None:
        """A Raft message leaves: what it says is on the disk."""
        durable = life.machine.disk.durable
        if not isinstance(message, (PreVoteRequest, PreVoteReply)):  # those speak of a term that nobody is in
            self._told_term[message.sender] = max(message.term, self._told_term.get(message.sender, 0))
            require(durable.hard_state.term >= message.term,
                    f"{life.name} speaks in term {message.term}, which is not durable")
        if isinstance(message, VoteReply) and message.granted:
            first = self.vote_of.setdefault((message.sender, message.term), message.to)
            require(first == message.to, f"{life.name} votes for {first} and {message.to} in term {message.term}")
            require(durable.hard_state.term > message.term or durable.hard_state.voted_for == message.to,
                    f"{life.name} gives a vote in term {message.term} that is not durable")
        if isinstance(message, AppendReply) and message.rejected_index is None and message.match_index:
            self._look_at_acknowledgement(life, message)

    def _look_at_acknowledgement(self, life: Life, message: AppendReply) -> None:
        index = message.match_index
        durable = life.machine.disk.durable
        require(index <= durable.last_index, f"{life.name} acknowledges entry {index}, which is not durable")
        if index > durable.base:
            self._told_entries[message.sender] = (index, durable.terms[index])

    def look_at_ready(self, life: Life, ready: Ready) -> None:
        self._commit(life, is_recovered=False)
        if ready.truncate_from is not None:
            index, _ = self._told_entries.get(life.node_id, (0, 0))
            if index >= ready.truncate_from:
                del self._told_entries[life.node_id]
            require(ready.truncate_from > life.machine.disk.durable.commit_index,
                    f"{life.name} cuts off entry {ready.truncate_from}, which is committed")
        self.look_at_entries(life, ready.entries)
        if life.node.raft.role is Role.LEADER:
            self._look_at_changes(life, ready.entries)

    def _look_at_changes(self, life: Life, entries: list[Entry]) -> None:
        """A leader changes the configuration once something of its own term is committed, and then one step at a time."""
        raft, facts = life.node.raft, self.of(life)
        for entry in entries:
            if entry.kind != CONFIG or entry.term != raft.term:
                continue
            is_joint = decode_configuration(entry.body).is_joint
            life.world.mark(life.name, "begins a joint change" if is_joint else "writes a configuration")
            require(raft.log.term(raft.commit_index) == raft.term,
                    f"{life.name} changes the configuration before anything of term {raft.term} is committed")
            for index, term in facts.configuration_at:
                is_here = raft.log.base_index < index < entry.index and raft.log.holds(index, term)
                require(not is_here or index <= raft.commit_index,
                        f"{life.name} changes the configuration before entry {index} is committed, which changes it too")

    def look_at_entries(self, life: Life, entries: Iterable[Entry]) -> None:
        """Log matching: an index and a term name one entry, with one history."""
        facts, log = self.of(life), life.node.raft.log
        for entry in entries:
            fact = (hashlib.blake2b(bytes(entry.body), digest_size=8).digest(), log.term(entry.index - 1))
            first = facts.entry_at.setdefault((entry.index, entry.term), fact)
            require(first == fact, f"log matching: two entries {entry.index} of term {entry.term}")
            if entry.kind == CONFIG:
                facts.configuration_at[(entry.index, entry.term)] = decode_configuration(entry.body)

    # ---- states

    def watch(self, life: Life, state: State) -> None:
        """Look at whatever this state applies."""
        is_inside = False

        def skip(index: int, term: int, at_ms: int) -> None:
            type(state).skip(state, index, term, at_ms)
            if not is_inside:
                self._applied(life, state, Entry(index, term, at_ms, NOOP, b""), [])

        def apply(index: int, term: int, at_ms: int, body: Any) -> list[Outcome]:
            nonlocal is_inside
            is_inside = True
            try:
                outcomes = type(state).apply(state, index, term, at_ms, body)
            finally:
                is_inside = False
            self._applied(life, state, Entry(index, term, at_ms, COMMANDS, body), outcomes)
            return outcomes

        state.apply = apply  # type: ignore[method-assign]
        state.skip = skip  # type: ignore[method-assign]

    def _applied(self, life: Life, state: State, entry: Entry, outcomes: list[Outcome]) -> None:
        facts = self.of(life)
        ledger = facts.ledger
        committed = facts.committed.get(entry.index)
        require(committed is not None and committed[0] == entry.term,
                f"{life.name} applies entry {entry.index} of term {entry.term}, which nobody has committed")
        if entry.index > ledger.index:
            self._take_in(life, ledger, entry)
        for outcome, message in zip(outcomes, (m for m, _ in decode_commands(bytes(entry.body))) if outcomes else (), strict=True):
            if outcome.kind in ("deploy", "roll", "roll_back", "rolled_out", "undeploy"):
                self._deployed_at[(life.node_id, message.fields["pipeline"])] = life.world.events
        for name, pipeline_state in state.pipelines.items():
            paused = frozenset(pipeline_state.paused)
            if paused - self._paused.get((life.node_id, name), frozenset()):
                self._paused_at[(life.node_id, name)] = life.world.events
            self._paused[(life.node_id, name)] = paused
        expected = ledger.said.get(entry.index, [])
        require(said(outcomes) == expected,
                f"{life.name}, entry {entry.index}: {said(outcomes)} came out instead of {expected}")
        self.look_at_state(life, state)

    def look_at_state(self, life: Life, state: State) -> None:
        """The state has moved."""
        index, ledger = state.applied_idx, self.of(life).ledger
        require(state.hash == ledger.hashes.get(index),
                f"{life.name}: the state's hash at entry {index} is not what its outcomes make")
        for queue in state.queues.values():
            self._look_at_books(life, ledger, state, queue)
        if index == ledger.index and index % COMPARED_EVERY == 0:
            self.compare(life, state)

    @staticmethod
    def _look_at_books(life: Life, ledger: Ledger, state: State, queue: QueueState) -> None:
        at_end = state.applied_idx == ledger.index
        open_and_over = queue.open_count + queue.done + len(queue.parked)
        discarded = ledger.discarded[queue.name]
        if at_end or not discarded:
            require(queue.put == open_and_over + discarded,
                    f"{life.name}: of {queue.put} items put in {queue.name}, {queue.open_count} are open, {queue.done} done,"
                    f" {len(queue.parked)} parked and {discarded} discarded")
        unseen = ledger.queues[queue.name].unseen if at_end else 0
        first_id = state.pipelines[queue.pipeline].first_id
        unseen = unseen if at_end else queue.next_id - queue.put - first_id
        require(queue.next_id == queue.put + unseen + first_id, f"{life.name}: an id of {queue.name} is used twice or left out")

    def compare(self, life: Life, state: State) -> None:
        """The state is the ledger's, item by item."""
        def bodies(queue: str, chunk: Chunk) -> Any:
            if chunk.lengths is not None and chunk.body is not None:
                return chunk.lengths, chunk.body
            return life.journal.read_bodies(queue, chunk)

        try:
            compare(state, self.of(life).ledger, bodies)
        except Violation:
            raise
        except AssertionError as error:
            raise Violation(f"{life.name}: the state at entry {state.applied_idx} is not the log's: {error}") from error

    def installed(self, life: Life, head: Head) -> None:
        """A node became a snapshot."""
        self.look_at_state(life, life.node.state)

    def look_at_ballot(self, life: Life, before: HardState) -> None:
        """A snapshot came in: term and vote are still this node's own."""
        now = life.machine.disk.durable.hard_state
        require(now.term > before.term or now == before, f"{life.name} had {before}, and after a snapshot it has {now}")

    # ---- leases and answers

    def granted(self, life: Life, grant: Grant) -> None:
        """A leader hands out items: under a fence that names nothing else, and that nobody else's contradicts."""
        if grant.kind != "grant":
            return
        ranges = [(lo, hi) for _, lo, hi in grant.pieces]
        known = self._grants.setdefault(grant.fence, (grant.queue, ranges))
        require(known == (grant.queue, ranges), f"{life.name}: the fence {grant.fence} is given twice")
        if grant.version is not None:
            self._look_at_version(life, grant)
            self._look_at_pause(life, grant)
        queue = life.node.state.queues.get(grant.queue)
        if queue is None:
            return  # its pipeline ended while the grant was on its way out
        for lo, hi in ranges:
            for _, _, fence in queue.leases.overlap(lo, hi):
                require(fence == grant.fence,
                        f"two valid fences: {grant.queue} {lo}-{hi} goes out under {grant.fence} and is leased under {fence}")

    def _look_at_version(self, life: Life, grant: Grant) -> None:
        """A node is given items for the version that is in force there, or was until this very event."""
        self._version_of[grant.fence] = grant.version
        found = life.node.state.pipelines.get(grant.queue.partition("/")[0])
        in_force = found and found.version_on(grant.fence.node)
        is_new = self._deployed_at.get((life.node_id, grant.queue.partition("/")[0])) == life.world.events
        require(grant.version == in_force or is_new,
                f"{life.name} gives {grant.queue} out for version {grant.version} where {in_force} is in force")

    def _look_at_pause(self, life: Life, grant: Grant) -> None:
        """A node is given nothing of a stage that is paused, or was not until this very event."""
        found, queue = life.node.state.pipelines.get(grant.queue.partition("/")[0]), life.node.state.queues.get(grant.queue)
        if found is None or queue is None or queue.read_by is None:
            return
        is_paused = "" in found.paused or queue.read_by in found.paused
        is_new = self._paused_at.get((life.node_id, found.name)) == life.world.events
        require(not is_paused or is_new, f"{life.name} gives {grant.queue} out, and its stage is paused")

    def told(self, life: Life, message: Message) -> None:
        """A leader answers a machine: what it says has happened is in the log."""
        if message.kind != "reply" or message.fields["result"] not in ("ok", "already"):
            return
        asked, _ = life.executor._unanswered.get(message.fields["req"], (None, None))
        if asked is not None:
            self.acknowledged(asked)

    def acknowledged(self, asked: Message) -> None:
        """Whoever asked this was told that it is done."""
        fields = asked.fields
        if asked.kind == "put":
            key, epoch, seq = fields["producer"]
            producer = self.main.ledger.producers.get(key)
            require(producer is not None and producer.seq >= seq, f"an acknowledged put is lost: {key} {seq}")
        elif asked.kind == "done":
            queue = self.main.ledger.queues.get(fields["queue"])
            for lo, hi in fields["ranges"] if queue is not None else ():
                for item_id in range(max(lo, queue.first_id), hi):  # those below it are of a pipeline that ended
                    require(queue.items[item_id].state in ("done", "parked", "discarded"),
                            f"an acknowledged done is lost: {queue.name}:{item_id} is {queue.items[item_id].state}")

    def began(self, process: SimStage, item_id: int, value: bytes) -> None:
        """A process runs an item: with the bytes that were put."""
        name = process.life._reads(process)
        work = next(work for work in process.life.executor.processes[process.key].works if work.fence_of(item_id) is not None)
        version = self._version_of[work.fence_of(item_id)]
        require(version == process.spec.version,
                f"{process.life.name} runs {name}:{item_id} in a process of version {process.spec.version}, and it was given for {version}")
        queue = self.main.ledger.queues.get(name)
        if process.spec.pipeline == pipeline.SECOND_NAME and (queue is None or item_id < queue.first_id):
            return  # the pipeline has ended, and this node does not know it yet
        item = self.main.ledger.queues[name].items.get(item_id)
        require(item is not None, f"{process.life.name} runs {name}:{item_id}, which was never put")
        assert item is not None
        require(item.body == value, f"{process.life.name} runs {name}:{item_id} with {value!r}, and {item.body!r} was put")
        require(item.state not in ("hidden", "withdrawn"), f"{process.life.name} runs {name}:{item_id}, an output of an item that is not done")
        self.main.ledger.ran[(name, item_id)] += 1


def configuration_at(raft: Any) -> Configuration:
    """The configuration in force at the commit index, by the entries themselves."""
    return raft._configurations[-1][1]  # type: ignore[no-any-return]
