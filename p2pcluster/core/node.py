"""What a node does as the one who may lead: event in, `NodeReady` out.

It composes the log (`raft`), the state (`queues`) and the plan (`placement`), and decides what neither does: who gets which
items and when (windows, back-pressure), which commands are proposed, and what each session is told. Sessions are the machine's
own executor, other nodes' executors and clients; to this module they are names with a kind, and how bytes reach them is the
shell's affair. Everything that changes the state goes through one path: `_propose`, the log, `_apply`, the reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from p2pcluster import config
from p2pcluster.core import commands, rollouts, status
from p2pcluster.core.alarms import Alarms
from p2pcluster.core.codec import Buffer, Message, encode
from p2pcluster.core.demand import home_of, loads_of, origin_of
from p2pcluster.core.grants import Grant, deliveries_of, fitting, pieces_of
from p2pcluster.core.log import COMMANDS, CONFIG, Entry, Log
from p2pcluster.core.membership import Watch, next_configuration
from p2pcluster.core.messages import RaftMessage, decode_configuration
from p2pcluster.core.placement import admitted_nodes, allowed_nodes, plan_processes
from p2pcluster.core.pacing import Pacers
from p2pcluster.core.planner import Planner, Question
from p2pcluster.core.queues import State
from p2pcluster.core.records import Outcome, PipelineState, QueueState, shards_of, source_of
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState, Note, Raft, RaftSettings, Ready, Role
from p2pcluster.core.ranges import Fence, Range, RangeSet
from p2pcluster.core.sessions import LOCAL_SESSION, Session
from p2pcluster.core.ticks import Ticker
from p2pcluster.errors import RemoteProtocolError

if TYPE_CHECKING:
    from random import Random

REPLAN_INTERVAL_MS = 1000  # how often processes may move between stages: slower than they start
DUE_INTERVAL_MS = 50  # how late a retry may be
DUE_ITEMS_MAX = 10_000  # that one command makes ready
NEAR_MS = 200  # the clock is looked at often when something is due within this
LOST_SESSION_MS = config.SESSION_TIMEOUT_MS
ORIGIN_AWAITED_MS = 30_000  # a node that is started again is there by then
LOG_MEMORY_BYTES_MAX = 16 * config.MIB  # of entries kept for followers that are a little behind; four times that for slower ones

# What a session may ask for, besides reading. `done` and `release` need a lease, so they are everybody's.
_NODE_COMMANDS = frozenset({"put", "done", "part", "fail", "release", "on_done_ran", "bundle_part", "deploy", "start_run"})
_CLIENT_COMMANDS = frozenset({"put", "done", "fail", "release", "retry", "discard", "bundle_part", "deploy", "undeploy", "start_run", "close",
                              "pause", "resume", "scale"})


@dataclass(frozen=True, slots=True)
class _HeldPut:
    """A put that waits for room, and how many bytes it is as a message."""

    session: Session
    message: Message
    size: int


@dataclass(frozen=True, slots=True)
class NodeReady:
    """What the shell does now, in this order: write and fsync, then send; `Node.advance` applies and fills the outbox."""

    raft: Ready
    configuration: Configuration

    sole_voter: bool

    @property
    def needs_write(self) -> bool:
        return self.raft.needs_persist


@dataclass(frozen=True, slots=True)
class ToPeer:
    """A Raft message for another node; votes may go by UDP as well."""

    peer: str
    message: RaftMessage


Sent = tuple[str, "Message | Grant"]


class Node:
    """One node; see the module. `boot` is new at each start of the process."""

    def __init__(self, node_id: str, random: Random, hard_state: HardState, log: Log, state: State, configuration: Configuration,
                 commit_index: int, now_ms: int, generation: int = 0) -> None:
        """`configuration` is the one in force at `commit_index`, empty on a node that has not joined."""
        self.id = node_id
        self.state = state
        self.raft = Raft(RaftSettings(node_id, generation), random, hard_state, log, configuration, commit_index, now_ms)
        self.applied_configuration = configuration
        self.may_serve = True
        self.sessions: dict[str, Session] = {}
        self.notes: list[Note] = []
        self.alarms: dict[str, tuple[int, str]] = {}  # by pipeline and stage: the run that each came in, and its text
        self.rates = status.Rates()
        self._planner = Planner()
        self._pacers = Pacers()
        self._pacing: set[str] = set()  # sources of which a put is on its way into the log
        self._ticker = Ticker()
        self._alarms_told = Alarms()
        self._random = random
        self._now_ms = now_ms
        self._wall_ms = 0
        self._outbox: list[Sent] = []
        self._peer_outbox: list[ToPeer] = []
        self._pending: deque[tuple[Message, Any]] = deque()
        self._propose_by_ms: int | None = None
        self._out: NodeReady | None = None
        self._tokens: dict[int, list[Any]] = {}
        self._serving = self._gives_way = False
        self._old_below: dict[str, int] = {}
        self._promised: dict[str, RangeSet] = {}
        self._held: dict[str, deque[_HeldPut]] = {}
        self._coming: dict[str, int] = {}
        self._owners: dict[str, str] = {}
        self._rolling: set[str] = set()  # pipelines of which a step of the roll-out is on its way into the log
        self._uploads: dict[str, tuple[int, int]] = {}  # versions on their way here: how many parts came, and since when no more did
        self._waiters: list[tuple[str, int, str, int]] = []
        self._lost: dict[tuple[str, str], int] = {}
        self._watch = Watch(now_ms)
        self._next_due_ms = self._next_plan_ms = 0
        self._runs: dict[str, tuple[int, str, int]] = {}
        self._take_count = 0

    # ---- events

    @property
    def is_serving(self) -> bool:
        """Whether this node leads and everything committed before its term is applied."""
        return self._serving

    @property
    def has_pending(self) -> bool:
        """Whether something waits for the next entry, or for a time that is near."""
        return bool(self._pending) or self._out is not None or self._is_due_within(NEAR_MS)

    @property
    def has_work(self) -> bool:
        """Whether anything moves: a busy node looks at the clock more often."""
        return bool(self._pending) or any(p.state == "running" for p in self.state.pipelines.values())

    def tick(self, now_ms: int, wall_ms: int = 0) -> None:
        """Time has passed: elections, what is due, plans, sessions that stay away. `wall_ms`: the time of day, for what asks for that."""
        self._now_ms = max(self._now_ms, now_ms)
        self._wall_ms = wall_ms
        self.raft.tick(now_ms)
        if not self._check_serving():
            return
        if now_ms >= self._next_due_ms:
            self._next_due_ms = now_ms + DUE_INTERVAL_MS
            self._propose_due()
            self._outbox += self._ticker.look(self.state, self._owners, self._wall_ms)
            self._end_lost_sessions()
        if now_ms >= self._next_plan_ms:
            self._replan()
        if self._pacers.is_due(self.raft.cluster_time_ms(now_ms)):
            self._pacers.look_again()
            self._admit_held()
            self._dispatch()

    def open_session(self, session: Session) -> None:
        """A node or a client has come."""
        self.sessions[session.id] = session
        self._lost.pop((session.node, session.boot), None)
        if session.kind == "node" and self._serving:
            self._welcome(session)

    def close_session(self, session_id: str) -> None:
        """It has gone: what it holds goes back at once where it was a client; a node gets the time of a session to return."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return
        self._waiters = [waiter for waiter in self._waiters if waiter[0] != session_id]
        self._drop_held(session_id)
        for key in [key for key, owner in self._owners.items() if owner == session_id]:
            del self._owners[key]
            self._ticker.forget(key)
        if self._session_of(session.node, session.boot) is not None:
            return  # it has come back by another connection already
        if self._serving and self._holds_leases(session.node, session.boot):
            grace = 0 if session.kind == "client" and not session.is_watched else LOST_SESSION_MS
            self._lost[(session.node, session.boot)] = self._now_ms + grace

    def step(self, session_id: str, message: Message, now_ms: int) -> None:
        """A session says something. Raises `RemoteProtocolError` where that is no message of the protocol."""
        self._now_ms = max(self._now_ms, now_ms)
        if not self._serving:
            self._reply(session_id, message, "error", code="no_leader", text="this node does not lead; ask again")
            return
        session = self.sessions[session_id]
        allowed = _NODE_COMMANDS if session.kind == "node" else _CLIENT_COMMANDS
        if message.kind in allowed:
            self._on_command(session, message)
            return
        handler = getattr(self, f"_on_{session.kind}_{message.kind}", None)
        if handler is None:
            raise RemoteProtocolError(f"a {session.kind} does not send {message.kind!r}")
        handler(session, message)

    def accept(self, cluster: str, then: Callable[..., None], *arguments: Any) -> None:
        """Log that another cluster of this one's name may dissolve into it; `then` hears the outcome, with the arguments."""
        self._propose(Message("accept", {"cluster": cluster}), (then, *arguments))

    def dissolve(self, into: str) -> None:
        """Log that this cluster goes over into another, if nothing was put here."""
        self._propose(Message("dissolve", {"into": into}))

    def step_raft(self, message: RaftMessage, now_ms: int) -> None:
        """Another node's Raft message. Raises `RemoteProtocolError` when no correct node can have sent it."""
        self._now_ms = max(self._now_ms, now_ms)
        self.raft.step(message, now_ms)
        self._check_serving()

    def hand_over(self) -> bool:
        """This node is about to go: let the voter that has most of the log lead, so that there is no gap. Whether there is one."""
        voters = [peer for peer in self.raft.peers() if peer.is_connected and peer.node_id in self.raft.configuration.voters]
        if self.raft.role is Role.LEADER and voters and not self.raft.is_transferring:
            self.raft.transfer_leadership(max(voters, key=lambda peer: peer.match_index).node_id)
        return bool(voters)

    def give_way(self) -> bool:
        """This node is about to go for good. As the only voter it takes a standby with a whole copy in its place, which then leads.
        Whether somebody can follow it."""
        if self.raft.role is not Role.LEADER or self.hand_over():
            return True
        self._gives_way = any(peer.is_connected for peer in self.raft.peers())
        return self._gives_way

    def take_outbox(self) -> list[Sent]:
        """What is to be sent to sessions, in order; empty afterwards."""
        sent, self._outbox = self._outbox, []
        return sent

    def take_questions(self) -> list[Question]:
        """Calls of pipelines' placements that are to be made; empty afterwards. Their outcomes come by `answer`."""
        return self._planner.take_questions()

    def answer(self, question: Question, answer: dict[str, Any], now_ms: int) -> None:
        """What a pipeline's placement returned, or why it did not."""
        if self._planner.answer(question, answer, now_ms):
            self._next_plan_ms = 0

    def take_peer_outbox(self) -> list[ToPeer]:
        """What is to be sent to other nodes, in order; empty afterwards."""
        sent, self._peer_outbox = self._peer_outbox, []
        return sent + [ToPeer(message.to, message) for message in self.raft.take_urgent()]

    # ---- the log

    def has_ready(self) -> bool:
        self._maybe_propose()
        return self.raft.has_ready()

    def ready(self) -> NodeReady:
        """The next thing to write and send; only one is out at a time."""
        sole_voter = self.raft.role is Role.LEADER and self.raft.configuration.is_sole_voter(self.id)
        self._out = NodeReady(self.raft.ready(), self.raft.configuration, sole_voter)
        return self._out

    def advance(self, ready: NodeReady) -> None:
        """`ready` is durable and sent: apply what is committed."""
        assert ready is self._out, "only the one that is out can be advanced"
        self._out = None
        self._peer_outbox += [ToPeer(message.to, message) for message in ready.raft.messages]
        for entry in ready.raft.committed:
            self._apply(entry)
        self.raft.advance(ready.raft)
        self.notes += ready.raft.notes
        self._check_serving()
        if ready.raft.committed:
            self._release_log()
            self._after_apply()

    def _release_log(self) -> None:
        """Entries stay in memory a little while for followers that are about to ask for them."""
        log = self.raft.log
        if len(self.raft.configuration.members) < 2:
            self.raft.release_through(self.raft.applied_index)
        elif log.memory_bytes > LOG_MEMORY_BYTES_MAX:
            slowest = min((p.match_index for p in self.raft.peers() if p.is_connected), default=self.raft.applied_index)
            far = log.memory_bytes > 4 * LOG_MEMORY_BYTES_MAX
            self.raft.release_through(max(log.floor_index, self.raft.applied_index if far else min(self.raft.applied_index, slowest)))

    def _propose(self, command: Message, token: Any = None, delay_ms: int = 0) -> None:
        """Have a command in the next entry; `token` is a method and its arguments behind the outcome. With `delay_ms` nobody waits."""
        self._pending.append((command, token))
        by_ms = self._now_ms + delay_ms
        self._propose_by_ms = by_ms if self._propose_by_ms is None else min(by_ms, self._propose_by_ms)

    def _maybe_propose(self) -> None:
        """Everything that came since the last entry becomes the next one: one fsync for all of it."""
        if self._propose_by_ms is None or self._propose_by_ms > self._now_ms:
            return
        if self.raft.role is not Role.LEADER or self.raft.is_transferring or self._out is not None:
            return
        self._propose_by_ms = None
        while self._pending:
            parts: list[Buffer] = []
            tokens: list[Any] = []
            size = 0
            while self._pending and size < config.COMMIT_BYTES_MAX // 4:
                command, token = self._pending.popleft()
                encoded = encode(command)
                size += sum(len(part) for part in encoded)
                parts += encoded
                tokens.append(token)
            index = self.raft.propose(COMMANDS, b"".join(parts), self.raft.cluster_time_ms(self._now_ms))
            self._tokens[index] = tokens

    def _apply(self, entry: Entry) -> None:
        tokens = self._tokens.pop(entry.index, None)
        if entry.kind != COMMANDS:
            self.state.skip(entry.index, entry.term, entry.at_ms)
            if entry.kind == CONFIG:
                self.applied_configuration = decode_configuration(entry.body)
            return
        outcomes = self.state.apply(entry.index, entry.term, entry.at_ms, entry.body)
        for outcome, token in zip(outcomes, tokens or [None] * len(outcomes), strict=True):
            if token is not None:
                token[0](outcome, *token[1:])

    def _after_apply(self) -> None:
        if not self._serving:
            return
        self._admit_held()
        self._dispatch()
        self._answer_waiters()
        runs = {pipeline.name: (pipeline.run, pipeline.state, pipeline.on_done_run) for pipeline in self.state.pipelines.values()}
        if runs != self._runs:  # whoever waits for a run's end hears of it now
            self._runs, self._next_plan_ms = runs, 0

    # ---- leading

    def _check_serving(self) -> bool:
        """Begin to serve, or end it, as Raft says: a leader serves once it has applied all that was committed before its term."""
        leads = self.may_serve and self.raft.has_committed_in_term and (self._serving or self.raft.applied_index == self.raft.commit_index)
        if leads and not self._serving:
            self._begin_serving()
        elif self._serving and not leads:
            self._end_serving()
        return self._serving

    def _end_serving(self) -> None:
        """Another node may lead: whatever was promised and is not in the log is not known to be so. Sessions ask the next leader."""
        self._serving = self._gives_way = False
        self.sessions.clear()
        self._outbox.clear()
        self._pending.clear()
        self._tokens.clear()
        self._promised.clear()
        self._held.clear()
        self._coming.clear()
        self._pacing.clear()
        self._owners.clear()
        self._rolling.clear()
        self._uploads.clear()
        self._waiters.clear()
        self._lost.clear()
        self._planner = Planner()
        self._pacers = Pacers()
        self._ticker = Ticker()
        self._alarms_told = Alarms()
        self._propose_by_ms = None

    def _begin_serving(self) -> None:
        self._serving = True
        self._next_plan_ms = 0
        self._watch = Watch(self._now_ms)
        self._old_below = {name: queue.next_id for name, queue in self.state.queues.items()}
        for queue in self.state.queues.values():
            for node, boot in queue.leases.held_by:
                self._lost.setdefault((node, boot), self._now_ms + LOST_SESSION_MS)

    def _welcome(self, session: Session) -> None:
        member = {"name": session.name, "facts": session.facts}
        if self.state.members.get(session.node) != member:
            self._propose(Message("member", {"node": session.node, **member}))
        self._next_plan_ms = 0

    def _session_of(self, node: str, boot: str) -> Session | None:
        return next((s for s in self.sessions.values() if (s.node, s.boot) == (node, boot)), None)

    def _holds_leases(self, node: str, boot: str) -> bool:
        # A take that is on its way into the log may be its own: then it holds something as soon as that is applied.
        return any((node, boot) in queue.leases.held_by for queue in self.state.queues.values()) or bool(self._pending or self._tokens)

    def _end_lost_sessions(self) -> None:
        for (node, boot), due_ms in list(self._lost.items()):
            if due_ms > self._now_ms:
                continue
            self._end_session(node, boot, None)

    def _end_session(self, node: str, boot: str, ran: dict[str, list[int]] | None) -> None:
        """`ran`: what was running by queue; None when nobody can say, because the machine is gone."""
        self._lost.pop((node, boot), None)
        name = self.state.members.get(node, {}).get("name", node)
        error = {"type": "NodeDied", "text": f"node {name} died while this item ran", "traceback": None, "node": name}
        is_client = node not in self.state.members
        self._propose(commands.session_end(node, boot, {} if is_client else ran, error, 0))

    def _propose_due(self) -> None:
        now_ms = self.raft.cluster_time_ms(self._now_ms)
        for queue in self.state.queues.values():
            ids = queue.delayed.due(now_ms, self._wall_ms, DUE_ITEMS_MAX) if queue.delayed else []
            if ids:
                self._propose(Message("due", {"queue": queue.name, "ids": ids}))

    def _is_due_within(self, ms: int) -> bool:
        now_ms = self.raft.cluster_time_ms(self._now_ms)
        if self._pacers.is_due(now_ms + ms) or self._ticker.is_due(self._wall_ms + ms):
            return True
        return any(queue.delayed.is_due_by(now_ms + ms, self._wall_ms + ms) for queue in self.state.queues.values() if queue.delayed)

    # ---- commands of sessions

    def _on_command(self, session: Session, message: Message) -> None:
        if session.id != LOCAL_SESSION:
            commands.check(message)
        if message.kind == "put":
            self._on_put(session, message)
            return
        if message.kind == "fail":
            message = self._with_delay(message)
        self._propose(_bare(message), self._replier(session, message))

    def _replier(self, session: Session, message: Message) -> Any:
        request = message.fields.get("req")
        return (self._on_outcome, session.id, request) if request is not None else None

    def _on_outcome(self, outcome: Outcome, session_id: str, request: int) -> None:
        if session_id in self.sessions:
            self._outbox.append((session_id, Message("reply", {"req": request, "kind": outcome.kind, "result": outcome.result,
                                                               **outcome.fields})))
        if outcome.kind in ("deploy", "undeploy", "start_run", "close", "retry", "discard", "pause", "resume", "scale"):
            self._next_plan_ms = 0

    def _reply(self, session_id: str, message: Message, result: str, **fields: Any) -> None:
        request = message.fields.get("req")
        if request is not None:
            self._outbox.append((session_id, Message("reply", {"req": request, "kind": message.kind, "result": result, **fields})))

    def _with_delay(self, message: Message) -> Message:
        """A failed item's wait: the stage's back-off, doubled with each delivery, with jitter so that they do not come back at once. Where no
        stage reads the queue, who took the item says the first wait."""
        queue = self.state.queues.get(message.fields["queue"])
        pipeline = self.state.pipelines.get(queue.pipeline) if queue else None
        stage = pipeline.stage(queue.read_by) if queue and pipeline and queue.read_by else None
        if queue is None:
            return message
        deliveries = queue.deliveries.get(message.fields["id"], 0)
        backoff_s = float(stage["backoff_s"]) if stage else message.fields["delay_ms"] / 1000
        delay_s = min(backoff_s * 2.0 ** min(deliveries, config.DOUBLINGS_MAX), config.BACKOFF_MAX_S)
        return message._replace(fields={**message.fields, "delay_ms": int(1000 * delay_s * self._random.uniform(0.75, 1.25))})

    # ---- puts, held back while their queues are full

    def _on_put(self, session: Session, message: Message) -> None:
        producer = str(message.fields["producer"][0]) if message.fields["producer"] else ""
        if session.kind == "client" and producer.startswith("source:"):
            raise RemoteProtocolError("a client does not put for a source")
        held = self._held.get(producer)
        if held is not None or not self._may_go(producer, message):
            self._hold(session, producer, message)
            return
        self._admit(session, message)

    def _hold(self, session: Session, producer: str, message: Message) -> None:
        """A machine's sources wait for answers by themselves; what a client may have waiting here is limited."""
        size = sum(map(len, encode(message)))
        if session.kind == "client" and (session.held_puts >= config.HELD_PUTS_MAX or session.held_bytes + size > config.HELD_BYTES_MAX):
            text = (f"{session.held_puts} puts of this connection ({session.held_bytes >> 20} MiB) wait already for room in a full queue: "
                    "wait for their answers, then put this again")
            self._reply(session.id, message, "refused", code="too_many_held", text=text)
            return
        session.held_puts += 1
        session.held_bytes += size
        self._held.setdefault(producer, deque()).append(_HeldPut(session, message, size))

    def _drop_held(self, session_id: str) -> None:
        """Whoever has gone says it again, to whom it comes back; and nobody may leave behind what he had waiting."""
        for producer, held in list(self._held.items()):
            kept = deque(put for put in held if put.session.id != session_id)
            if kept:
                self._held[producer] = kept
            else:
                del self._held[producer]

    def _targets(self, message: Message) -> list[QueueState]:
        names = {name for port in message.fields["ports"] for name in port.get("queues", ())}
        return [self.state.queues[name] for name in names if name in self.state.queues]

    def _may_go(self, producer: str, message: Message) -> bool:
        return self._has_room(message) and (not self.state.source_intervals_ns or self._is_within_rate(producer, message))

    def _is_within_rate(self, producer: str, message: Message) -> bool:
        pipeline, stage = source_of(producer)
        interval_ns = self.state.source_intervals_ns.get(f"{pipeline}/{stage}", 0)
        if not interval_ns or pipeline not in self.state.pipelines:
            return True
        if f"{pipeline}/{stage}" in self._pacing:
            return False
        count = sum(len(message.blobs[blob]) // 4 for _, blob in _port_blobs(message))
        full_ns = self.state.pipelines[pipeline].paced.get(stage, 0)
        return self._pacers.may_go(full_ns, interval_ns, self.raft.cluster_time_ms(self._now_ms), count)

    def _has_room(self, message: Message) -> bool:
        for queue in self._targets(message):
            if queue.maxsize is not None and queue.room_taken + self._coming.get(queue.name, 0) >= queue.maxsize:
                return False
            if queue.bytes_max is not None and queue.open_bytes >= queue.bytes_max:
                return False
        return True

    def _admit(self, session: Session, message: Message) -> None:
        counts = [(name, len(message.blobs[blob]) // 4) for port, blob in _port_blobs(message) for name in port["queues"]]
        for name, count in counts:
            self._coming[name] = self._coming.get(name, 0) + count
        source = "/".join(source_of(message.fields["producer"][0])) if self.state.source_intervals_ns else ""
        self._pacing.add(source)
        self._propose(_bare(message), (self._on_put_outcome, session.id, message.fields.get("req"), counts, source))

    def _on_put_outcome(self, outcome: Outcome, session_id: str, request: int | None, counts: list[tuple[str, int]], source: str) -> None:
        self._pacing.discard(source)
        for name, count in counts:
            self._coming[name] -= count
        if request is not None:
            self._on_outcome(outcome, session_id, request)

    def _admit_held(self) -> None:
        for producer in list(self._held):
            held = self._held[producer]
            while held and self._may_go(producer, held[0].message):
                self._admit_one(held.popleft())
            if not held:
                del self._held[producer]

    def admit_all(self) -> None:
        """This node stops: take in what is held back for want of room, since whoever emitted it may not be able to do so again."""
        for producer in list(self._held):
            for put in self._held.pop(producer):
                self._admit_one(put)

    def _admit_one(self, put: _HeldPut) -> None:
        put.session.held_puts -= 1
        put.session.held_bytes -= put.size
        self._admit(put.session, put.message)

    # ---- items to sessions

    def _dispatch(self) -> None:
        for queue in self.state.queues.values():
            if not queue.ready:
                continue
            takers = [session for session in self.sessions.values() if session.windows.get(queue.name, 0) > 0]
            for session in takers:
                self._dispatch_to(session, queue)

    def _dispatch_to(self, session: Session, queue: QueueState) -> None:
        if session.kind == "node" and not self._may_be_given(session, queue):
            return
        promised = self._promised.get(queue.name)
        wanted = session.windows[queue.name]
        if session.kind == "node":
            wanted -= queue.leases.held_by[(session.node, session.boot)] + (len(promised) if promised else 0)
        count = min(wanted, self._room_behind(queue) if session.kind == "node" else wanted)
        if queue.interval_ns and count > 0 and session.kind == "node":
            count = 0 if promised else self._pacers.allowed(*self._bucket_of(queue), count)
        if count <= 0:
            return
        ranges = queue.ready.first(count, promised)
        if ranges:
            self._grant(session, queue, ranges)

    def _may_be_given(self, session: Session, queue: QueueState) -> bool:
        """Not before a node has reported, for what it holds may still look free; and only when it was told the version that is in force
        there, for its processes may be of another one."""
        pipeline = self.state.pipelines.get(queue.pipeline)
        return session.has_reported and pipeline is not None and session.versions.get(pipeline.name) == pipeline.version_on(session.node)

    def _bucket_of(self, queue: QueueState) -> tuple[int, int, int]:
        """The bucket of the rate of a queue's reader, and what time it is."""
        stage, pipeline = queue.read_by or "", self.state.pipelines[queue.pipeline]
        return pipeline.paced.get(stage, 0), queue.interval_ns, self.raft.cluster_time_ms(self._now_ms)

    def _room_behind(self, queue: QueueState) -> int:
        """How many items of the queue may be taken before what they become fills a queue behind it."""
        pipeline = self.state.pipelines.get(queue.pipeline)
        stage = pipeline.stage(queue.read_by) if pipeline and queue.read_by else None
        if pipeline is None or stage is None or pipeline.state != "running" or pipeline.is_paused(stage["name"]):
            return 0
        room = 1 << 30
        coming = len(queue.leases) + len(self._promised.get(queue.name, ()))
        for target in self._behind(pipeline, stage, queue):
            if target.maxsize is not None:
                room = min(room, target.maxsize - target.room_taken - coming)
            if target.bytes_max is not None and target.open_bytes >= target.bytes_max:
                return 0
        return room

    def _behind(self, pipeline: PipelineState, stage: dict[str, Any], queue: QueueState) -> Iterator[QueueState]:
        """The queues that a stage's items may fill; edges that close a cycle do not count. While a version rolls, those of either."""
        for manifest in pipeline.manifests:
            if pipeline.rollout is not None:
                read = queue.name.partition("/")[2]
                stage = next((one for one in manifest["stages"] if one["reads"] == read), {"name": "", "ports": []})
            back = {tuple(edge) for edge in manifest["back_edges"]}
            for name in (name for port in stage["ports"] for name in port["queues"] if (stage["name"], name) not in back):
                yield self.state.queues[pipeline.full(name)]

    def _grant(self, session: Session, queue: QueueState, ranges: list[Range]) -> None:
        self._take_count += 1
        fence = Fence(session.node, session.boot, (self.raft.term << 32) + self._take_count)
        pieces, ranges = fitting(pieces_of(queue, ranges), ranges)
        promised = self._promised.setdefault(queue.name, RangeSet())
        for lo, hi in ranges:
            promised.add(lo, hi)
        request = None
        if session.kind == "client":
            session.windows[queue.name] = 0
            request = session.take_requests.pop(queue.name, None)
        version = session.versions.get(queue.pipeline) if session.kind == "node" else None
        grant = Grant(session.id, "grant", queue.name, fence, pieces, deliveries_of(queue, ranges), request, version)
        waits = ranges[0][0] < self._old_below.get(queue.name, 0)
        if queue.interval_ns and session.kind == "node":
            waits = True  # then no leader has given away anything of a rate that the next one does not know of
        self._propose(commands.take(queue.name, ranges, fence), (self._on_taken, queue.name, ranges, session, grant if waits else None),
                      0 if waits else config.TAKE_RECORD_DELAY_MS)
        if not waits:
            self._outbox.append((session.id, grant))

    def _on_taken(self, outcome: Outcome, queue: str, ranges: list[Range], session: Session, grant: Grant | None) -> None:
        for lo, hi in ranges:
            self._promised[queue].remove(lo, hi)
        if grant is None or self.sessions.get(session.id) is not session:
            return  # who has come back since reports what it holds
        state = self.state.queues.get(queue)
        if state is None:
            return  # its pipeline was undeployed meanwhile
        held = [(a, b) for lo, hi in ranges for a, b, fence in state.leases.overlap(lo, hi) if fence == grant.fence]
        if held and grant.version is not None and not self._may_still_give(session, state, grant.version):
            self._propose(commands.release(queue, held, grant.fence))
        elif held:  # the rest was finished in the same entry, by somebody who had it from a former leader
            self._outbox.append((grant.session, replace(grant, pieces=pieces_of(state, held))))
        elif grant.request is not None:
            session.windows[queue], session.take_requests[queue] = sum(hi - lo for lo, hi in ranges), grant.request

    def _may_still_give(self, session: Session, queue: QueueState, version: str) -> bool:
        """Whether nothing has come between a take and its record: another version on that node, or a pause."""
        pipeline = self.state.pipelines[queue.pipeline]
        return version == pipeline.version_on(session.node) and not (queue.read_by and pipeline.is_paused(queue.read_by))

    # ---- what nodes say

    def _on_node_report(self, session: Session, message: Message) -> None:
        """What a node holds, the first thing that it says to a leader. It is compared with its leases behind the takes that are on
        their way into the log: some may be its own, and their grants lost with a former connection."""
        for boot, ran in message.fields["ran_before"].items():
            self._end_session(session.node, boot, ran)
        for node, boot in list(self._lost):
            if node == session.node and boot != session.boot:
                self._end_session(node, boot, {})
        for key in message.fields["sources"]:
            producer = self.state.producers.get(key)
            if producer is not None and (producer.node, producer.boot) == (session.node, session.boot):
                self._owners.setdefault(key, session.id)  # any other process is of an assignment that is over, and ends at its next put
        self._propose(Message("forget", {"producers": []}), (self._on_reported, session, message.fields))  # changes nothing and comes last

    def _on_reported(self, outcome: Outcome, session: Session, report: dict[str, Any]) -> None:
        """What a node reported can be compared with the state now; what ran when it died is counted, so that it may forget that."""
        if self.sessions.get(session.id) is not session:
            return
        for name, queue in self.state.queues.items():
            self._settle_leases(session, queue, report["held"].get(name, []))
        session.has_reported = True
        self._next_plan_ms = 0
        if report["ran_before"]:
            self._outbox.append((session.id, Message("reported", {})))

    def _settle_leases(self, session: Session, queue: QueueState, held: list[list[Any]]) -> None:
        """Leases that the node does not know of go back; what it holds beyond its leases (their records were lost with the former
        leader) is leased again, as far as nobody else has it."""
        known = RangeSet((lo, hi) for lo, hi, _ in held)
        for lo, hi, fence in queue.leases.of_session(session.node, session.boot):
            unknown = RangeSet([(lo, hi)])
            for a, b in known.overlap(lo, hi):
                unknown.remove(a, b)
            if unknown:
                self._propose(commands.release(queue.name, list(unknown), fence))
        for lo, hi, seq in held:
            ready = queue.ready.overlap(lo, hi)
            if ready:
                promised = self._promised.setdefault(queue.name, RangeSet())
                for a, b in ready:
                    promised.add(a, b)
                command = commands.take(queue.name, ready, Fence(session.node, session.boot, seq))
                self._propose(command, (self._on_taken, queue.name, ready, session, None))

    def _on_node_window(self, session: Session, message: Message) -> None:
        session.windows = {str(name): int(count) for name, count in message.fields["queues"].items()}
        self._dispatch()

    def _on_node_stats(self, session: Session, message: Message) -> None:
        session.service_us = message.fields["service_us"]
        session.running = message.fields["running"]
        session.troubles = message.fields["troubles"]
        if session.trials != message.fields["trials"]:
            session.trials = message.fields["trials"]
            self._next_plan_ms = 0
        if session.is_draining != message.fields["draining"]:
            session.is_draining = message.fields["draining"]
            self._next_plan_ms = 0

    def _on_node_source_lost(self, session: Session, message: Message) -> None:
        """The process of a source has gone: the next one learns from the log where it stands."""
        pipeline = self.state.pipelines.get(message.fields["pipeline"])
        if pipeline is not None:
            key = pipeline.source_key(message.fields["stage"], message.fields["shard"])
            if self._owners.get(key) == session.id:  # else it was one that had been replaced already
                del self._owners[key]
                self._ticker.forget(key)
        self._assign_sources()

    def _on_node_alarm(self, session: Session, message: Message) -> None:
        key, text = message.fields["key"], message.fields["text"]
        if text:
            pipeline = self.state.pipelines.get(key.partition("/")[0])
            self.alarms[key] = (pipeline.run if pipeline else 0, text)
        else:
            self.alarms.pop(key, None)

    # ---- plans

    def _replan(self) -> None:
        self._next_plan_ms = self._now_ms + REPLAN_INTERVAL_MS
        self.rates.sample(self.state, self._now_ms)
        nodes = [session for session in self.sessions.values() if session.kind == "node" and session.has_reported]
        staying = [n for n in nodes if not n.is_draining]
        self._planner.look([p for p in self.state.pipelines.values() if p.state == "running"], staying, self._now_ms)
        loads = loads_of(self.state, nodes, self.rates, self._planner)
        plan = plan_processes({n.id: int(n.facts.get("slots", 1)) for n in staying}, loads,
                              {n.id: (n.planned or {}).get("processes", {}) for n in nodes}, self._now_ms // 1000)
        for session in nodes:
            new = self._plan_for(session, plan.get(session.id, {}), nodes)
            if new != session.planned:
                session.planned = new
                session.versions = {name: planned["version"] for name, planned in new["pipelines"].items()}
                self._outbox.append((session.id, Message("plan", new)))
        self._tell_alarms(nodes)
        self._assign_sources()
        self._roll_out(staying)
        self._forget_old_uploads()
        self._forget_old_producers()
        self._forget_old_keys()
        self._maybe_change_configuration()

    def _runner_of_on_done(self, pipeline: PipelineState, nodes: list[Session]) -> Session | None:
        """The origin, where its files are; another node only when that stays away, for the run's end waits for it."""
        origin, node = origin_of(pipeline, nodes), str(pipeline.origin.get("node"))
        if origin is None and node in self.state.members and not self._watch.is_dead_for(node, ORIGIN_AWAITED_MS, self._now_ms):
            return None
        staying = [session for session in admitted_nodes(pipeline, nodes) if not session.is_draining]
        return origin if origin in staying else next(iter(staying), None)

    def _plan_for(self, session: Session, processes: dict[str, int], nodes: list[Session]) -> dict[str, Any]:
        pipelines = {}
        for pipeline in self.state.pipelines.values():
            release, rollout = pipeline.on(session.node).release, pipeline.rollout
            pipelines[pipeline.name] = {
                "version": release.version, "run": pipeline.run, "state": pipeline.state, "manifest": release.manifest,
                "project": release.project, "params": pipeline.params, "on_done_run": pipeline.on_done_run,
                "zip_sha256": release.zip_sha256, "rolled": pipeline.rolled,
                "rollout": rollout.number if rollout is not None and session.node in rollout.nodes else None,
                "paused": dict(pipeline.paused), "scaled": dict(pipeline.scaled),
                "runs_on_done": session is self._runner_of_on_done(pipeline, nodes), "is_over": is_over(pipeline),
                "seconds": (pipeline.done_ms - pipeline.started_ms) / 1000 if pipeline.state == "done" else None,
                "parked": self.state.parked_of_run(pipeline) if pipeline.state == "done" else 0,
                "totals": self.state.totals_of_run(pipeline) if pipeline.state == "done" else None,
            }
        return {"pipelines": pipelines, "processes": processes}

    def _roll_out(self, nodes: list[Session]) -> None:
        """The next step of each new version that is on its way over the nodes."""
        for pipeline in self.state.pipelines.values():
            if pipeline.rollout is None or pipeline.name in self._rolling:
                continue
            step = rollouts.next_step(pipeline, nodes, list(self._sources_of(pipeline)))
            if step is not None:
                self._rolling.add(pipeline.name)
                self._propose(step, (self._on_rolled, pipeline.name))

    def _on_rolled(self, outcome: Outcome, pipeline: str) -> None:
        self._rolling.discard(pipeline)
        self._next_plan_ms = 0

    def _sources_of(self, pipeline: PipelineState) -> Iterator[tuple[str, str | None]]:
        """The sources of a pipeline that have not ended, each with the session that runs it, None where one is about to be chosen."""
        for stage in pipeline.sources if pipeline.state == "running" else ():
            for shard in range(shards_of(stage)):
                key = pipeline.source_key(stage["name"], shard)
                producer, owner = self.state.producers.get(key), self._owners.get(key)
                if producer is not None and producer.finished:
                    continue
                is_next = key not in self._held and not pipeline.is_paused(stage["name"]) and self._fit_for(pipeline, stage)
                if owner is not None or is_next:
                    yield stage["name"], owner

    def _forget_old_uploads(self) -> None:
        """Parts of a version that nobody went on with: whoever shipped it has gone."""
        uploads = self.state.uploads()
        self._uploads = {version: self._uploads[version] if version in self._uploads and self._uploads[version][0] == count
                         else (count, self._now_ms) for version, count in uploads.items()}
        old = [version for version, (_, since_ms) in self._uploads.items() if self._now_ms - since_ms >= int(1000 * config.UPLOAD_S)]
        if old:
            self._uploads = {version: found for version, found in self._uploads.items() if version not in old}
            self._propose(Message("forget_uploads", {"versions": sorted(old)}))

    def _assign_sources(self) -> None:
        nodes = [session for session in self.sessions.values()
                 if session.kind == "node" and session.has_reported and session.planned and not session.is_draining]
        if not nodes:
            return
        for pipeline in self.state.pipelines.values():
            if pipeline.state != "running":
                continue
            for stage in (stage for stage in pipeline.sources if not pipeline.is_paused(stage["name"])):
                for shard in range(shards_of(stage)):
                    self._maybe_assign(pipeline, stage, shard, nodes)

    def _maybe_assign(self, pipeline: PipelineState, stage: dict[str, Any], shard: int, nodes: list[Session]) -> None:
        key = pipeline.source_key(stage["name"], shard)
        producer, owner = self.state.producers.get(key), self._owners.get(key)
        if owner is not None:
            self._maybe_revoke(pipeline, stage, shard, owner)
            return
        if key in self._held or (producer is not None and producer.finished):
            return  # with a new epoch, what is held back would be refused
        preferred, fit = home_of(pipeline, stage, nodes), self._fit_for(pipeline, stage)
        if not fit:
            return
        sound = [n for n in fit if not any(name.startswith(f"{pipeline.name}/") for name in n.troubles)] or fit
        session = next((n for n in fit if n.id == preferred), sound[shard % len(sound)])
        self._owners[key] = session.id
        command = Message("assign", {"pipeline": pipeline.name, "stage": stage["name"], "shard": shard, "node": session.node,
                                     "boot": session.boot})
        self._propose(command, (self._on_assigned, session.id, pipeline.name, stage["name"], shard, key))

    def _fit_for(self, pipeline: PipelineState, stage: dict[str, Any]) -> list[Session]:
        """The nodes that may run a source, which all know the newest version: a shard of it may be none of the former one."""
        nodes = [session for session in self.sessions.values()
                 if session.kind == "node" and session.has_reported and not session.is_draining
                 and session.versions.get(pipeline.name) == pipeline.version == pipeline.version_on(session.node)]
        allowed = allowed_nodes(pipeline, stage, nodes)[0]
        return [session for session in nodes if allowed is None or session.id in allowed]

    def _maybe_revoke(self, pipeline: PipelineState, stage: dict[str, Any], shard: int, owner: str) -> None:
        """A node that may not run the source any more lets it finish what it is at, and says so; then another one is chosen."""
        session = self.sessions.get(owner)
        if session is None or pipeline.rollout is not None or session.versions.get(pipeline.name) != pipeline.version:
            return  # a process of another version ends by itself
        allowed = allowed_nodes(pipeline, stage, [session])[0]
        if allowed is not None and owner not in allowed:
            self._outbox.append((owner, Message("revoke", {"pipeline": pipeline.name, "stage": stage["name"], "shard": shard})))

    def _on_assigned(self, outcome: Outcome, session_id: str, pipeline: str, stage: str, shard: int, key: str) -> None:
        if outcome.result != "ok":
            self._owners.pop(key, None)
            return
        if session_id not in self.sessions:
            return
        blobs = () if outcome.cursor is None else (outcome.cursor,)
        fields = {"pipeline": pipeline, "stage": stage, "shard": shard, **outcome.fields}
        self._outbox.append((session_id, Message("assigned", fields, blobs)))

    def _maybe_change_configuration(self) -> None:
        """One step towards the voters and standbys that the members should be; whoever has left is told once it is out."""
        for session in self.sessions.values():
            if session.is_leaving and session.node not in self.raft.configuration.members and session.node not in self.state.members:
                self._outbox.append((session.id, Message("left", {})))
        members = sorted(self.state.members)
        alive = {self.id, *(session.node for session in self.sessions.values() if session.kind == "node")}
        matches = {self.id: self.raft.last_index, **{peer.node_id: peer.match_index for peer in self.raft.peers()}}
        vitals = self._watch.observe(members, alive, matches, self.raft.last_index, self._now_ms)
        if not self.raft.can_change_configuration:
            return
        staying = [member for member in members if member != self.id or not self._gives_way]
        following = next_configuration(self.raft.configuration, staying, vitals, self.id, self._now_ms)
        if following is not None:
            self.raft.change_configuration(following.voters, following.learners, self.raft.cluster_time_ms(self._now_ms))

    def _forget_old_producers(self) -> None:
        horizon = self.raft.cluster_time_ms(self._now_ms) - int(1000 * config.PRODUCER_RETENTION_S)
        old = [key for key, producer in self.state.producers.items() if producer.at_ms < horizon and not key.startswith("source:")]
        if old:
            self._propose(Message("forget", {"producers": sorted(old)}))

    def _forget_old_keys(self) -> None:
        """Of queues that are fed from outside; the others' go with their run. Not one by one: some minutes' together."""
        horizon = self.raft.cluster_time_ms(self._now_ms) - int(1000 * config.KEY_RETENTION_S)
        for queue in self.state.queues.values():
            oldest_ms = next(iter(queue.keys.values()), horizon)
            if oldest_ms < horizon - int(1000 * config.KEYS_FORGOTTEN_S) and self._is_fed_from_outside(queue):
                self._propose(Message("forget_keys", {"queue": queue.name, "before_ms": horizon}))

    def _is_fed_from_outside(self, queue: QueueState) -> bool:
        pipeline = self.state.pipelines.get(queue.pipeline)
        records = pipeline.manifest["queues"] if pipeline else []
        return any(record["outside"] and queue.name == f"{queue.pipeline}/{record['name']}" for record in records)

    # ---- what clients ask

    def _on_client_take(self, session: Session, message: Message) -> None:
        name, count = message.fields["queue"], int(message.fields["count"])
        queue = self.state.queues.get(name)
        if queue is None:
            self._reply(session.id, message, "refused", code="unknown_queue")
            return
        if count <= 0:
            session.windows.pop(name, None)
            session.take_requests.pop(name, None)
            self._reply(session.id, message, "ok", count=0)
            return
        session.is_watched = session.is_watched or message.fields.get("watched") is True
        session.windows[name] = count
        session.take_requests[name] = message.fields["req"]
        self._dispatch_to(session, queue)

    def _on_client_read(self, session: Session, message: Message) -> None:
        """Values of a queue without taking them: what is open above an id."""
        queue = self.state.queues.get(message.fields["queue"])
        if queue is None:
            self._reply(session.id, message, "refused", code="unknown_queue")
            return
        wanted = RangeSet(queue.open_ranges(int(message.fields["after"]) + 1, max(queue.next_id, int(message.fields["after"]) + 2)))
        ranges = wanted.first(int(message.fields["count"]))
        if not ranges:
            self._reply(session.id, message, "ok", count=0)
            return
        pieces, _ = fitting(pieces_of(queue, ranges), ranges)
        grant = Grant(session.id, "values", queue.name, Fence("", "", 0), pieces, {}, message.fields["req"])
        self._outbox.append((session.id, grant))

    def _on_client_value(self, session: Session, message: Message) -> None:
        """One parked item's bytes."""
        queue = self.state.queues.get(message.fields["queue"])
        item_id = int(message.fields["id"])
        if queue is None or item_id not in queue.parked:
            self._reply(session.id, message, "refused", code="unknown_item")
            return
        ranges = [(item_id, item_id + 1)]
        grant = Grant(session.id, "values", queue.name, Fence("", "", 0), pieces_of(queue, ranges), {}, message.fields["req"])
        self._outbox.append((session.id, grant))

    def _on_client_status(self, session: Session, message: Message) -> None:
        self._reply(session.id, message, "ok", status=self.status())

    def _on_client_parked(self, session: Session, message: Message) -> None:
        count = config.PARKED_ITEMS_MAX
        found = status.parked_items(self.state, message.fields["pipeline"], message.fields["after"], count)
        self._reply(session.id, message, "ok", parked=found, more=len(found) == count)

    def _on_node_project(self, session: Session, message: Message) -> None:
        self._on_client_project(session, message)

    def _on_node_leave(self, session: Session, message: Message) -> None:
        """The node goes for good. Until it has left the configuration it goes on holding its copy."""
        self._propose(Message("member_left", {"node": session.node}))
        session.is_leaving = True
        self._next_plan_ms = 0

    def _on_node_seen(self, session: Session, message: Message) -> None:
        session.seen = message.fields["runs"]

    @property
    def all_have_seen_the_end(self) -> bool:
        """Whether every node that is there knows of each pipeline's last run that it is over."""
        over = {p.name: p.run for p in self.state.pipelines.values() if is_over(p)}
        return all(session.seen.get(name, 0) >= run for session in self.sessions.values() if session.kind == "node" for name, run in over.items())

    def _on_client_project(self, session: Session, message: Message) -> None:
        """What is deployed, for whoever wants to compare a folder with it."""
        pipeline = self.state.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            self._reply(session.id, message, "ok", project=None, pipelines=sorted(self.state.pipelines))
            return
        self._reply(session.id, message, "ok", project={
            "version": pipeline.version, "origin": pipeline.origin, "files": pipeline.files, "run": pipeline.run,
            "state": pipeline.state, "manifest": pipeline.manifest, "project": pipeline.project, "rolled": pipeline.rolled,
            "rollout": pipeline.rollout.number if pipeline.rollout else None,
        })

    def _on_client_wait(self, session: Session, message: Message) -> None:
        """Answered when the pipeline's run, or a later one, is done and its `on_done` has run."""
        pipeline = self.state.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            self._reply(session.id, message, "refused", code="unknown_pipeline")
            return
        if sum(1 for waiter in self._waiters if waiter[0] == session.id) >= config.WAITS_MAX:
            text = f"this connection waits for {config.WAITS_MAX} runs already: wait for an answer, or close it and connect again"
            self._reply(session.id, message, "refused", code="too_many_waits", text=text)
            return
        run = message.fields.get("run", max(pipeline.run, 1))
        if not commands.is_number(run):
            raise RemoteProtocolError("message 'wait': field 'run' is not a number")
        self._waiters.append((session.id, message.fields["req"], pipeline.name, run))
        self._answer_waiters()

    def _answer_waiters(self) -> None:
        for waiter in list(self._waiters):
            session_id, request, name, run = waiter
            pipeline = self.state.pipelines.get(name)
            if pipeline is None or pipeline.run > run or is_over(pipeline):
                self._waiters.remove(waiter)
                parked = self.state.parked_of_run(pipeline, run) if pipeline else 0
                result = {"result": "ok"} if pipeline else {"result": "refused", "code": "unknown_pipeline"}
                self._outbox.append((session_id, Message("reply", {"req": request, "kind": "wait", **result, "parked": parked, "run": run})))

    def _tell_alarms(self, nodes: list[Session]) -> None:
        found = self._alarms_told.look([*status.leaders_alarms(self.state, nodes), *self._planner.alarms], self._now_ms)
        for session in nodes:
            if session.told_alarms != found.keys():
                session.told_alarms = frozenset(found)
                self._outbox.append((session.id, Message("alarms", {"texts": list(found.values())})))

    def status(self) -> dict[str, Any]:
        """The object of `status --json`, less what only the shell knows."""
        runs = {name: pipeline.run for name, pipeline in self.state.pipelines.items()}
        alarms = {key: text for key, (run, text) in self.alarms.items() if runs.get(key.partition("/")[0], 0) == run}
        return status.status_of(self.state, self.rates, self.raft, list(self.sessions.values()),
                                self.raft.cluster_time_ms(self._now_ms), self._wall_ms, [*(alarms[key] for key in sorted(alarms)), *self._planner.alarms])


def is_over(pipeline: PipelineState) -> bool:
    """The run is done and so is what comes after it."""
    return pipeline.state == "done" and (not pipeline.manifest["on_done"] or pipeline.on_done_run >= pipeline.run)


def _bare(message: Message) -> Message:
    """The command in a message: the fields that belong to it, and not what ties it to a session."""
    fields = {name: message.fields[name] for name in commands.FIELDS[message.kind]}
    return message._replace(fields=fields | {name: message.fields[name] for name in commands.OPTIONAL if name in message.fields})


def _port_blobs(message: Message) -> list[tuple[dict[str, Any], int]]:
    return [(record, first) for record, (_, first) in zip(message.fields["ports"],
                                                          commands.read_ports(message.fields["ports"], message.blobs), strict=True)]
