"""A simulated machine: its disk, its clock, and the node that runs on it, life after life.

`Life` is the shell of one start of a node, as `daemon.Daemon` is the real one: it joins the real `Node`, `Executor`,
`Neighbours`, `Peers` and `Discovery` to simulated time, disks and wires, and decides nothing that they decide. Where a
method bears a name of the daemon's it does the same.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

from p2pcluster import config
from p2pcluster.config import Address, parse_address
from p2pcluster.core import protocol
from p2pcluster.core.codec import Message, decode, encode
from p2pcluster.core.datagram import Beacon, Heard, State
from p2pcluster.core.executor import Executor, Kill, Send, Settled, Start, ToLeader
from p2pcluster.core.handshake import Identity
from p2pcluster.core.log import CONFIG, Log
from p2pcluster.core.membership import Discovery, Found, MakeKey, Serve, role_of
from p2pcluster.core.messages import PreVoteReply, PreVoteRequest, VoteReply, VoteRequest, decode_configuration
from p2pcluster.core.grants import Grant, grant_message
from p2pcluster.core.node import Node, NodeReady
from p2pcluster.core.sessions import LOCAL_SESSION, Session
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.queues import State as QueuesState
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState, Ready, Role
from p2pcluster.core.snapshot import decode_snapshot, encode_snapshot, read_configuration
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import JournalError
from p2pcluster.journal import Checkpoint, Compaction, Recovered, Write, checkpoint_of
from p2pcluster.neighbours import Neighbours, session_of
from p2pcluster.peers import Events, Peers
from p2pcluster.stream import ConnectionClosed
from tests.simulation import pipeline
from tests.simulation.checker import Checker
from tests.simulation.disk import Disk
from tests.simulation.options import Options
from tests.simulation.processes import SimProcess, process_for
from tests.simulation.world import PORT, End, Network, SimSession, World, host_of, number_of

TICK_MS = 20
DRAIN_MS = 2_000  # less than a real node's, so that a drain that is not over by then happens
DOORS_MAX = 3
COMPACT_BYTES = 2_000
VOTES = (PreVoteRequest, PreVoteReply, VoteRequest, VoteReply)


class PowerCut(Exception):
    """The process or its machine dies here, in the middle of a write."""


class Machine:
    """What outlives a node: disk, files, clock. `number` is its place in the network."""

    def __init__(self, number: int, world: World, network: Network, checker: Checker, disk: Disk) -> None:
        self.number = number
        self.world, self.network, self.checker, self.disk = world, network, checker, disk
        self.options = world.options
        self.others: list[Machine] = []
        self.life: Life | None = None
        self.is_powered = True
        self.is_gone = False  # for good
        self.starts = 0
        self.folders: set[str] = set()  # of versions whose project is unpacked here
        self.positions: dict[str, dict[str, list[Any]]] = {}  # by boot and queue what ran when the node died
        self.node_id: str | None = None
        self.is_paused = False
        self._waiting: list[Callable[[], None]] = []
        self._clock_behind_ms = world.random.randrange(100_000)
        self._slept_ms = 0
        self._wall_skew_ms = world.random.randint(-self.options.wall_skew_ms_max, self.options.wall_skew_ms_max)

    @property
    def name(self) -> str:
        return f"m{self.number}"

    @property
    def is_up(self) -> bool:
        return self.life is not None

    def clock_ms(self) -> int:
        """What the machine's monotonic clock says."""
        return self.world.now_ms + self._clock_behind_ms

    def wall_ms(self) -> int:
        """What its clock on the wall says."""
        return pipeline.EPOCH_MS + self.world.now_ms + self._wall_skew_ms

    # ---- lives

    def start(self) -> None:
        """Start the node."""
        if self.is_up or self.is_gone:
            return
        self.is_powered = True
        self.starts += 1
        self.world.mark(self.name, "starts", self.starts)
        life = Life(self, f"{self.name}-boot{self.starts}")
        self.life = life
        try:
            life.start()
        except (JournalError, PowerCut):
            self.crash("its journal cannot be written")
            self.start_later(self.world.random.randrange(100, 1000))

    def crash(self, why: str, power: bool = False) -> None:
        """The node dies, and with `power` the machine: then nobody says so to its neighbours."""
        life = self.life
        if life is None:
            return
        self.world.mark(self.name, "loses power" if power else "dies", why)
        self.life = None
        life.die(power)
        if power:
            self.is_powered = False
        self.disk.crash()
        if self.is_paused:
            self.wake()

    def ended(self) -> None:
        """The node has ended in order."""
        assert self.life is not None
        self.world.mark(self.name, "ends")
        has_left = self.life.has_left
        self.life = None
        if has_left and self.random_share() < 0.5:
            self.is_gone = True
        else:
            self.start_later(self.world.random.randrange(50, 100 + self.options.down_ms_max))

    def random_share(self) -> float:
        return self.world.random.random()

    def start_later(self, delay_ms: int) -> None:
        self.world.after(delay_ms, self.start)

    def wipe(self) -> None:
        """A new disk in a dead machine: what starts here next is another node."""
        assert not self.is_up
        self.world.mark(self.name, "is wiped")
        self.checker.wiped[self.node_id] = self.disk.durable
        self.disk = self.disk.fresh()
        self.folders.clear()
        self.positions.clear()
        self.node_id = None

    # ---- pauses

    def pause(self, duration_ms: int, clock_stops: bool) -> None:
        """The machine does nothing for a while; with `clock_stops` its clock does not notice."""
        if self.is_paused or not self.is_up:
            return
        self.world.mark(self.name, "pauses with its clock" if clock_stops else "pauses", duration_ms)
        self.is_paused = True
        self._slept_ms = duration_ms if clock_stops else 0
        self.world.after(duration_ms, self.wake)

    def wake(self) -> None:
        if not self.is_paused:
            return
        self.is_paused = False
        self._clock_behind_ms -= self._slept_ms
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            self.world.after(0, action)

    def when_awake(self, action: Callable[[], None]) -> None:
        self._waiting.append(action)

    # ---- the network's side

    def receive_datagram(self, sender: Life, body: Any, is_broadcast: bool) -> None:
        if self.life is not None:
            self.life.hear_datagram(sender, body, is_broadcast)

    def receive_dial(self, end: End, identity: Identity) -> None:
        """Somebody connects to this machine."""
        if not self.is_powered or self.network.is_cut("tcp", self.number, end.host):
            return
        if self.life is None:
            self.world.after(self.network.delay_ms(), lambda: end.fail("refused"))
        else:
            self.life.accept(end, identity)


class Selector:
    """Callbacks of connections, as a loop's selector keeps them."""

    def __init__(self) -> None:
        self._callbacks: dict[int, tuple[End, Any]] = {}

    def register(self, end: End, events: int, data: Any) -> None:
        self._callbacks[id(end)] = (end, data)

    def unregister(self, end: End) -> None:
        del self._callbacks[id(end)]

    def modify(self, end: End, events: int, data: Any) -> None:
        self._callbacks[id(end)] = (end, data)

    def get_key(self, end: End) -> Any:
        return SimpleNamespace(events=selectors.EVENT_READ, data=self._callbacks[id(end)][1])

    def callback(self, end: End) -> Callable[[int], None] | None:
        found = self._callbacks.get(id(end))
        return found[1] if found is not None else None


class Bodies:
    """The bytes of granted items."""

    def __init__(self, journal: Any) -> None:
        self._journal = journal

    def of(self, queue: str, chunk: Chunk, lo: int, hi: int) -> Any:
        if chunk.body is not None:
            return chunk.slice(lo, hi)
        lengths, body = self._journal.read_bodies(queue, chunk)
        return chunk.slice_of(lengths, body, lo, hi)


class Life:
    """One start of a node; see the module."""

    node_class: type[Node] = Node
    executor_class: type[Executor] = Executor

    def __init__(self, machine: Machine, boot: str) -> None:
        self.machine, self.boot = machine, boot
        self.world, self.network, self.checker = machine.world, machine.network, machine.checker
        self.options: Options = machine.options
        self.random = self.world.random
        self.is_up = True
        self.name = machine.name
        self.address = f"{host_of(machine.number)}:{PORT}"
        self.processes: dict[int, SimProcess] = {}
        self.clients: dict[str, End] = {}
        self._ends: list[End] = []
        self._next_client = 1
        self._led_by: tuple[str, int, int] | None = None
        self._has_settled = False
        self._in_flight: NodeReady | None = None
        self._busy: Write | None = None
        self._written: Compaction | None = None
        self._compacting = False
        self._checkpointed_ms = self.now_ms()
        self._waiting_starts: dict[str, list[Start]] = {}
        self._fetched: dict[str, list[bytes]] = {}
        self._counter = 0
        self._is_pumping = False
        self.has_left = self._is_leaving = False
        self._left_by: tuple[str, int, int] | None = None
        self._stopping_by_ms: int | None = None
        self._said_beacon_ms = 0

    def now_ms(self) -> int:
        return self.machine.clock_ms()

    # ---- from start to end

    def start(self) -> None:
        """What `Daemon._start` does."""
        self.journal, recovered = self.machine.disk.open(self.options.body_memory_bytes_max)
        meta = self.journal.meta
        if meta.get("node_id") is None:
            node_id = "%016x" % self.random.getrandbits(64)
            self.write(Write(meta=(("node_id", node_id), ("cluster_name", "sim"))))
            meta = self.journal.meta
        self.node_id: str = meta["node_id"]
        self.machine.node_id = self.node_id
        self.cluster_id: str | None = meta.get("cluster_id")
        log = Log(recovered.base_index, recovered.base_term, recovered.base_at_ms)
        configuration = self._load_log(log, recovered, read_configuration(meta.get("configuration")))
        self.node = self._make_node(recovered.hard_state, log, recovered.state, configuration, recovered.commit_index)
        self.selector = Selector()
        self.peers = Peers(self.node_id, self.selector, lambda: self, Events(  # type: ignore[arg-type]
            lambda peer, message: self.neighbours.on_message(peer, message, self.now_ms()),
            lambda identity: self.neighbours.on_connected(identity, self.now_ms()),
            lambda peer: self.neighbours.on_gone(peer, self.now_ms()),
            lambda peer: self.neighbours.on_refused(peer, self.now_ms()),
            self._on_note))
        self.neighbours = Neighbours(self.node_id, self.address, self.peers, self._on_member_message,
                                     self._on_leader_message)
        self.neighbours.node, self.neighbours.cluster_id = self.node, self.cluster_id
        self.executor = self.executor_class(self.name)
        self._bodies = Bodies(self.journal)
        has_copy = bool(configuration.members) or recovered.last_index > 0
        self.discovery = self._make_discovery(self.cluster_id if has_copy else None,
                                              None if has_copy else self.cluster_id)
        self.checker.started(self, recovered)
        self._schedule_tick()

    def _make_node(self, hard_state: HardState, log: Log, state: QueuesState, configuration: Configuration,
                   commit_index: int) -> Node:
        node = self.node_class(self.node_id, Random(self.random.getrandbits(64)), hard_state, log, state, configuration,
                               commit_index, self.now_ms())
        node.raft.settings = replace(node.raft.settings, append_bytes_max=self.options.append_bytes_max,
                                     in_flight_appends_max=4, load_entries_max=8)
        self.checker.watch(self, state)
        return node

    def _make_discovery(self, cluster_id: str | None, belonged_to: str | None) -> Discovery:
        me = Beacon(
            name=self.name, state=State.FRESH, cluster_id=cluster_id, generation=0, term=0, leader_id=None,
            leader_address=None, last_index=0, last_term=0, commit_index=0, role="none", voters=0, members=0,
            has_work=False, expect=1, tcp_host=host_of(self.machine.number), tcp_port=PORT, udp_port=PORT,
            interval_ms=1, package="0", python="3.11",
        )
        return Discovery(self.node_id, me, Random(self.random.getrandbits(64)), self.now_ms(),
                         window_ms=config.FOUNDING_WINDOW_LOOPBACK_MS, has_key=True, belonged_to=belonged_to)

    def _load_log(self, log: Log, recovered: Recovered, configuration: Configuration) -> Configuration:
        for entry in self.journal.entries(recovered.base_index, bodies_after=recovered.commit_index):
            if entry.kind == CONFIG and self.machine.disk.applied_index < entry.index <= recovered.commit_index:
                configuration = decode_configuration(entry.body)
            log.append([entry])
            log.release_through(min(entry.index, recovered.commit_index))
        return configuration

    def die(self, power: bool) -> None:
        """The process is gone: the kernel closes its connections, unless it is gone too."""
        self.is_up = False
        if self._busy is not None:
            self._write_as_dying(self._busy)
        for process in self.processes.values():
            process.is_alive = False
            if process.position[1]:
                ran = self.machine.positions.setdefault(self.boot, {})
                told: list[Any] = [[item_id, item_id + 1] for item_id in process.in_hand] or [process.position[1]]
                ran.setdefault(self._reads(process), []).extend(told)
        for end in self._ends:
            if power:
                end.is_dead = True
            else:
                end.close()

    @staticmethod
    def _reads(process: SimProcess) -> str:
        return pipeline.READS[(process.spec.pipeline, process.spec.stage)]

    def stop(self) -> None:
        """What `Daemon.stop` does: let what runs finish, then end."""
        if self._stopping_by_ms is None:
            self.world.mark(self.name, "stops")
            self._stopping_by_ms = self.now_ms() + DRAIN_MS
            self.executor.drain()
            self.node.hand_over()

    def leave(self) -> None:
        """What `Daemon.leave` does: go for good."""
        if self._led_by is None or (len(self.node.state.members) < 2 and self.node.is_serving):
            return
        if self.node.is_serving and not self.node.give_way():
            return
        self.world.mark(self.name, "leaves")
        self._is_leaving = True
        self.executor.drain()

    def _keep_leaving(self) -> None:
        if not self._is_leaving or self._stopping_by_ms is not None or not self.executor.is_idle:
            return
        if self.node.is_serving:
            self.node.give_way()
        elif self._led_by is not None and self._led_by[0] != self.node_id and self._left_by != self._led_by:
            self._left_by = self._led_by
            self._to_leader(Message("leave", {}))

    def _maybe_end(self) -> None:
        if self._stopping_by_ms is None or self._busy is not None:
            return
        if self.executor.is_idle or self.now_ms() > self._stopping_by_ms:
            self._close()

    def _close(self) -> None:
        """What `Daemon._close` does."""
        for process in self.processes.values():
            process.is_alive = False
        self.node.admit_all()
        self._pump()
        while self._busy is not None:
            write, self._busy = self._busy, None
            self._written = self.write(write)
            self._pump()
        self.is_up = False
        for end in self._ends:
            end.close()
        self.write(Write(commit_index=self.node.raft.commit_index, checkpoint=checkpoint_of(self.node.state),
                         configuration=self.node.applied_configuration))
        self.machine.disk.close()
        self.machine.ended()

    def _on_note(self, text: str) -> None:
        raise AssertionError(f"{self.name}: a correct peer broke the protocol: {text}")

    # ---- events

    def event(self, action: Callable[[], Any], may_wait: bool = True) -> None:
        """Something happens to the node; it carries out what follows, and is looked at."""
        if not self.is_up:
            return
        if self.machine.is_paused:
            self.machine.when_awake(lambda: self.event(action, may_wait))
            return
        try:
            action()
            if may_wait and not self._is_pumping and self.random.random() < 0.2:
                self._is_pumping = True  # the loop hears several things before it carries out what follows
                self.world.after(self.random.randrange(3), self._catch_up)
            elif not self._is_pumping or not may_wait:
                self._pump()
                self._maybe_end()
        except JournalError as error:
            self.machine.crash(f"after {error}")
            self.machine.start_later(self.random.randrange(20, 20 + self.options.down_ms_max))
            return
        except PowerCut:
            power = self.random.random() < self.options.power_share
            self.machine.crash("in a write", power)
            self.machine.start_later(self.random.randrange(20, 20 + self.options.down_ms_max))
            return
        if self.is_up:
            self.checker.look(self)

    def _catch_up(self) -> None:
        def nothing() -> None:
            self._is_pumping = False

        self.event(nothing, may_wait=False)

    def _schedule_tick(self) -> None:
        busy = bool(self.processes) or self.node.has_work
        self.world.after(self.random.randrange(TICK_MS, 5 * TICK_MS) if busy else 5 * TICK_MS, self._on_tick)

    def _on_tick(self) -> None:
        if not self.is_up:
            return
        if self.machine.is_paused:
            self.machine.when_awake(self._on_tick)
            return
        self.event(self._tick, may_wait=False)
        if self.is_up:
            self._schedule_tick()

    def _tick(self) -> None:
        now_ms = self.now_ms()
        self.node.tick(now_ms, self.machine.wall_ms())
        self.executor.tick(now_ms, {key: process.position for key, process in self.processes.items()})
        self.peers.tick(now_ms / 1000)
        self.neighbours.tick(now_ms)
        self._speak(now_ms)
        self._find(now_ms)
        self._sync_leader()
        self._keep_house(now_ms)
        self._keep_leaving()

    # ---- beacons and votes

    def _speak(self, now_ms: int) -> None:
        raft, state = self.node.raft, self.node.state
        leader, address = self.neighbours.leader()
        self.discovery.update(now_ms, **{
            "term": raft.term, "leader_id": leader, "leader_address": parse_address(address) if address else None,
            "last_index": raft.last_index, "last_term": raft.log.last_term, "commit_index": raft.commit_index,
            "role": role_of(self.node_id, raft.configuration, raft.leader_id) if self.cluster_id else "none",
            "voters": len(raft.configuration.voters), "members": len(state.members),
            "has_work": any(queue.put for queue in state.queues.values()),
        })
        due = self.discovery.due(now_ms)
        if due.broadcast:
            for other in self.machine.others:
                self._datagram(other, self.discovery.beacon, True)
        for where in due.unicast:
            self._datagram_to(where, self.discovery.beacon)
        if due.decision is not None:
            self._on_decision(due.decision)

    def _datagram_to(self, where: Address, body: Any) -> None:
        number = number_of(where.host)
        for other in self.machine.others:
            if other.number == number:
                self._datagram(other, body, False)

    def _datagram(self, other: Machine, body: Any, is_broadcast: bool) -> None:
        self._counter += 1
        counter = self._counter
        envelope = (counter, body)
        self.network.datagram(self.machine.number, other.number,
                              lambda: other.receive_datagram(self, envelope, is_broadcast))

    def hear_datagram(self, sender: Life, envelope: Any, is_broadcast: bool) -> None:
        counter, body = envelope
        address = Address(host_of(sender.machine.number), PORT)
        if isinstance(body, Beacon):
            heard = Heard(sender.node_id, sender.boot, counter, is_broadcast, address, body)
            self.event(lambda: self.discovery.hear(heard, self.now_ms()))
        elif body.to == self.node_id:
            self.event(lambda: self.node.step_raft(body, self.now_ms()))

    def _on_decision(self, decision: Any) -> None:
        if isinstance(decision, MakeKey):
            raise AssertionError("every simulated machine has the key")
        if isinstance(decision, Found):
            self._join("cluster-of-" + self.node_id, Configuration((self.node_id,)))
            self.node.may_serve = False
            self.discovery.founded(self.cluster_id or "", self.now_ms())
        elif isinstance(decision, Serve):
            self.node.may_serve = True

    def _find(self, now_ms: int) -> None:
        discovery = self.discovery
        wanted = discovery.cluster_id(now_ms)
        if self.cluster_id is None or self.cluster_id == wanted:
            for door in discovery.doors(now_ms)[:DOORS_MAX] if self._led_by is None else ():
                if door.node_id != self.node_id and door.node_id not in self.neighbours.connected:
                    self.peers.want(door.node_id, door.address, door.node_id)
        if self.cluster_id is None and wanted is not None:
            if any(hello.is_here and hello.cluster_id == wanted for hello in self.neighbours.hellos.values()):
                self._join(wanted, Configuration())
        if self._led_by is not None and discovery.state in (State.JOINING, State.BLOCKED) and self.cluster_id:
            discovery.joined(self.cluster_id, now_ms)

    def _join(self, cluster_id: str, configuration: Configuration) -> None:
        self.write(Write(meta=(("cluster_id", cluster_id),), configuration=configuration))
        self.cluster_id = self.neighbours.cluster_id = cluster_id
        self.node = self._make_node(HardState(), Log(), self.node.state, configuration, 0)
        self.neighbours.node = self.node
        for peer in self.neighbours.connected:
            self.node.raft.peer_connected(peer, self.now_ms())
        self.world.mark(self.name, "founds" if configuration.voters else "joins", cluster_id)
        self.checker.joined(self)

    # ---- leader and member

    def _sync_leader(self) -> None:
        led_by = self.neighbours.serving_leader()
        if led_by == self._led_by:
            return
        self._led_by = led_by
        if led_by is None:
            return
        self.world.mark(self.name, "is led by", led_by)
        leader = led_by[0]
        facts = {"address": self.address, "slots": 2, "cores": 2}
        join = Message("join", {"boot": self.boot, "name": self.name, "facts": facts})
        if leader == self.node_id:
            self._on_member_message(self.node_id, join)
        elif not self.neighbours.send(leader, join):
            self._led_by = None
            return
        ran_before = {boot: ran for boot, ran in self.machine.positions.items() if boot != self.boot}
        self.executor.on_new_leader({} if self._has_settled else ran_before, self.now_ms())
        for version, fetched in self._fetched.items():
            self._to_leader(Message("bundle_get", {"version": version, "part": len(fetched)}))

    def _on_member_message(self, node_id: str, message: Message) -> None:
        session = LOCAL_SESSION if node_id == self.node_id else session_of(node_id)
        if message.kind == "join":
            if self.node.is_serving:
                fields = message.fields
                self.node.close_session(session)
                self.node.open_session(
                    Session(session, "node", node_id, fields["boot"], fields["name"], fields["facts"]))
        elif message.kind == "bundle_get":
            self._on_bundle_get(node_id, message)
        elif session in self.node.sessions:
            self.node.step(session, message, self.now_ms())

    def _to_leader(self, message: Message) -> None:
        if self._led_by is None:
            return
        leader = self._led_by[0]
        if leader == self.node_id:
            self._on_member_message(self.node_id, message)
        else:
            self.neighbours.send(leader, message)

    def _on_leader_message(self, message: Message) -> None:
        if message.kind == "bundle_slice":
            self._on_bundle_slice(message)
            return
        if message.kind == "left":
            self.has_left = True
            self.stop()
            return
        self.checker.told(self, message)
        self.executor.on_leader(message, self.now_ms())
        if message.kind == "grant":
            self.checker.look_at_executor(self)

    # ---- carrying

    def _pump(self) -> None:
        for _ in range(1000):
            moved = self._carry_actions() | self._carry_outbox()
            moved |= self._commit()
            if not moved:
                return
        raise AssertionError(f"{self.name}: the loop never comes to rest")

    def _carry_actions(self) -> bool:
        actions = self.executor.take_actions()
        for action in actions:
            if isinstance(action, ToLeader):
                self._to_leader(action.message)
            elif isinstance(action, Send):
                if action.message.kind != "stop" or not self._forget_start(action.key):
                    self._send_process(action.key, action.message)
            elif isinstance(action, Start):
                self._start_process(action)
            elif isinstance(action, Kill):
                if action.key in self.processes:
                    self.processes[action.key].end("died of signal 9 (SIGKILL)")
            elif isinstance(action, Settled):
                self._has_settled = True
                for boot in [boot for boot in self.machine.positions if boot != self.boot]:
                    del self.machine.positions[boot]
        return bool(actions)

    def _carry_outbox(self) -> bool:
        sent = self.node.take_outbox()
        for session, item in sent:
            message = self._materialized(item) if isinstance(item, Grant) else item
            if session == LOCAL_SESSION:
                self._on_leader_message(message)
            elif session in self.clients:
                self.clients[session].send(encode(message))
            else:
                self.neighbours.send(session.removeprefix("node:"), message)
        messages = self.node.take_peer_outbox()
        for to_peer in messages:
            self.checker.look_at_message(self, to_peer.message)
        self.neighbours.carry(messages)
        for to_peer in messages:
            if isinstance(to_peer.message, VOTES):
                for other in self.machine.others:
                    if other.node_id == to_peer.peer:
                        self._datagram(other, to_peer.message, True)
        self.neighbours.carry_snapshots()
        return bool(sent)

    def _materialized(self, grant: Grant) -> Message:
        self.checker.granted(self, grant)
        return grant_message(grant, [self._bodies.of(grant.queue, chunk, lo, hi) for chunk, lo, hi in grant.pieces])

    # ---- writing

    def write(self, write: Write) -> Compaction:
        """Write and be sure of it. Raises `JournalError`, or `PowerCut` where a crash was ordered."""
        if self.machine.disk.dies_at_next_write:
            self.machine.disk.dies_at_next_write = False
            self._write_as_dying(write)
            raise PowerCut
        compaction = self.machine.disk.write(write)
        changes = any(entry.kind == CONFIG for entry in write.entries)
        if changes and self.random.random() < self.options.change_crash_share and self.now_is_unsafe():
            self.world.mark(self.name, "dies behind a change of the configuration")
            raise PowerCut
        return compaction

    def now_is_unsafe(self) -> bool:
        """Whether faults still happen."""
        return not self.network.is_calm

    def _write_as_dying(self, write: Write) -> None:
        """What is being written while the power goes: torn, lost, or there all the same."""
        self._busy = None
        chance = self.random.random()
        if chance < self.options.torn_share:
            self.world.mark(self.name, "leaves a torn write")
            self.machine.disk.write_torn(write)
        elif chance < self.options.torn_share + self.options.kept_share:
            try:
                self.machine.disk.write(write)
            except JournalError:
                return  # the disk had failed before: nothing is there of it

    def _commit(self) -> bool:
        if self._busy is not None:
            return False
        if self._written is not None:
            compaction, self._written = self._written, None
            self._after_write(compaction)
            return True
        if not self.node.has_ready():
            return False
        self._in_flight = self.node.ready()
        self.checker.look_at_ready(self, self._in_flight.raft)
        if self._in_flight.raft.snapshot is not None:
            self._install(self._in_flight)
            return True
        if not self._in_flight.needs_write:
            self._after_write(Compaction(), False)
            return True
        write = self._next_write(self._in_flight)
        if write.truncate_from is not None:
            self.world.mark(self.name, "cuts its log off from", write.truncate_from)
        if self.options.fsync_ms_max and self.random.random() < 0.7:
            self._busy = write
            self.world.after(self.random.randrange(1, 1 + self.options.fsync_ms_max), self._finish_write)
            return False
        self._after_write(self.write(write), write.compact is not None)
        return True

    def _finish_write(self) -> None:
        """The thread has written."""
        def finish() -> None:
            write, self._busy = self._busy, None
            assert write is not None
            self._written = self.write(write)
            self._compacting = self._compacting if write.compact is None else self._written.more

        self.event(finish)

    def _install(self, ready: NodeReady) -> None:
        meta = ready.raft.snapshot
        assert meta is not None
        head, rows = decode_snapshot(self.neighbours.take_snapshot(meta.snapshot_id))
        ballot = self.machine.disk.durable.hard_state
        self.machine.disk.install(head, rows, ready.raft.hard_state)
        self.checker.look_at_ballot(self, ballot)
        state = QueuesState(self.options.body_memory_bytes_max)
        for table in TABLES:
            state.load(table, [row.values for row in rows if row.table == table])
        state.loaded(head.index, head.term, head.at_ms, head.state_hash)
        self.node.state, self.node.applied_configuration = state, head.configuration
        self.checker.watch(self, state)
        self.world.mark(self.name, "becomes the snapshot at", head.index)
        self.checker.installed(self, head)
        self._in_flight = None
        if ready.raft.entries:
            self.write(Write(tuple(ready.raft.entries), commit_index=ready.raft.commit_index))
        self.node.advance(ready)

    def _next_write(self, ready: NodeReady | None) -> Write:
        checkpoint = self._due_checkpoint()
        compact = (self._keep_from_index(), COMPACT_BYTES) if self._compacting else None
        configuration = self.node.applied_configuration if checkpoint else None
        if ready is None:
            return Write(commit_index=self.node.raft.commit_index, checkpoint=checkpoint, compact=compact,
                         configuration=configuration)
        raft = ready.raft
        return Write(tuple(raft.entries), raft.hard_state, raft.commit_index, ready.sole_voter, raft.truncate_from,
                     checkpoint, compact, configuration=configuration)

    def _after_write(self, compaction: Compaction, compacted: bool = False) -> None:
        if compacted:
            self._compacting = compaction.more
        for chunk in compaction.filled:
            self.node.state.filled(chunk.queue, chunk.first, chunk.body_crc)
        raft = self.node.raft
        if self.journal.base_index > raft.log.base_index:
            raft.compact_through(min(self.journal.base_index, raft.applied_index))
        if self._in_flight is not None:
            ready, self._in_flight = self._in_flight, None
            self.node.advance(ready)
            self._after_advance(ready.raft)

    def _after_advance(self, ready: Ready) -> None:
        if ready.load_entries is not None:
            low, high = ready.load_entries
            entries = []
            for entry in self.journal.entries(low - 1):
                if entry.index > high:
                    break
                entries.append(entry)
            if entries:
                self.world.mark(self.name, "loads entries", low, high)
                self.node.raft.entries_loaded(entries)
        for peer in ready.snapshots_wanted:
            self._begin_snapshot(peer)

    def _begin_snapshot(self, peer: str) -> None:
        state = self.node.state
        head = self.journal.snapshot_head(state, self.node.applied_configuration)
        self.world.mark(self.name, "sends a snapshot at", head.index)
        data = b"".join(encode_snapshot(head, self.journal.snapshot_rows(state)))
        self.neighbours.begin_snapshot(peer, head, data)

    def _keep_from_index(self) -> int:
        commit = self.node.raft.commit_index
        if self.journal.log_bytes > 2 * config.LOG_BYTES_MAX:
            return commit + 1
        peers = self.node.raft.peers()
        return min([commit, *(peer.match_index for peer in peers if peer.is_connected)]) + 1

    def _due_checkpoint(self) -> Checkpoint | None:
        state = self.node.state
        due_ms = self._checkpointed_ms + int(1000 * config.CHECKPOINT_INTERVAL_S)
        if not state.dirty_count or (self.now_ms() < due_ms and state.dirty_count < config.CHECKPOINT_DIRTY_MAX):
            return None
        self._checkpointed_ms = self.now_ms()
        self._compacting = True
        return checkpoint_of(state)

    def _keep_house(self, now_ms: int) -> None:
        if self._busy is not None or self._written is not None:
            return
        overdue_ms = self._checkpointed_ms + int(2000 * config.CHECKPOINT_INTERVAL_S)
        overdue = self.node.state.dirty_count and now_ms > overdue_ms
        if overdue or (self._compacting and not self.node.has_work):
            write = self._next_write(None)
            self._after_write(self.write(write), write.compact is not None)

    # ---- processes

    def _start_process(self, action: Start) -> None:
        version = action.spec.version
        if version not in self.machine.folders:
            parts = self.node.state.bundle_parts(version)
            if parts is None:
                self._fetch(action)
                return
            assert self.journal.read_bundle(version, parts) == b"".join(pipeline.bundle_of(version)), "the project is another one"
            self.machine.folders.add(version)
        self.processes[action.key] = process_for(action.spec)(self, action.key, action.spec)

    def _fetch(self, action: Start) -> None:
        version = action.spec.version
        self._waiting_starts.setdefault(version, []).append(action)
        if version not in self._fetched:
            self._fetched[version] = []
            self._to_leader(Message("bundle_get", {"version": version, "part": 0}))

    def _on_bundle_get(self, node_id: str, message: Message) -> None:
        version, number = message.fields["version"], message.fields["part"]
        parts = self.node.state.bundle_parts(version)
        if parts is None or number >= len(parts):
            return
        body = self.journal.read_bundle_part(version, number, parts[number])
        fields = {"version": version, "part": number, "parts": len(parts)}
        self.neighbours.send(node_id, Message("bundle_slice", fields, (body,)))

    def _on_bundle_slice(self, message: Message) -> None:
        version, number = message.fields["version"], message.fields["part"]
        fetched = self._fetched.get(version)
        if fetched is None or number != len(fetched):
            return
        fetched.append(bytes(message.blobs[0]))
        if len(fetched) < message.fields["parts"]:
            self._to_leader(Message("bundle_get", {"version": version, "part": len(fetched)}))
            return
        del self._fetched[version]
        actions = self._waiting_starts.pop(version, [])
        assert tuple(fetched) == pipeline.bundle_of(version), "another project came than was deployed"
        self.machine.folders.add(version)
        for action in actions:
            self._start_process(action)

    def _forget_start(self, key: int) -> bool:
        for actions in self._waiting_starts.values():
            for action in actions:
                if action.key == key:
                    actions.remove(action)
                    if not actions:
                        self._fetched.pop(action.spec.version, None)
                    self.executor.on_exit(key, "ended", 0, [], self.now_ms())
                    return True
        return False

    def _send_process(self, key: int, message: Message) -> None:
        if key in self.processes:
            self.processes[key].hear(message)

    def hear_process(self, key: int, message: Message) -> None:
        if key in self.processes:
            protocol.check("process", "process", message)
            self.event(lambda: key in self.processes and self.executor.on_message(key, message, self.now_ms()))

    def on_process_exit(self, key: int, how: str, running: int, stderr: list[str]) -> None:
        def exited() -> None:
            if self.processes.pop(key, None) is not None:
                self.executor.on_exit(key, how, running, stderr, self.now_ms())

        self.event(exited)

    # ---- connections

    def dial(self, host: str) -> End:
        """What `stream.start_dial` gives: a connection that is on its way."""
        end = End(self, self.network)
        self._ends.append(end)
        number = number_of(host)
        (target,) = [other for other in [*self.machine.others, self.machine] if other.number == number]
        if not self.network.is_cut("tcp", self.machine.number, number):
            identity = self.identity()
            self.world.after(self.network.delay_ms(), lambda: target.receive_dial(end, identity))
        return end

    def accept(self, end: End, identity: Identity) -> None:
        """Somebody has dialled: greet, and take the connection in when the other side has greeted too."""
        ours = End(self, self.network, end)
        ours.session = SimSession(identity)

        def greet() -> None:
            self._ends.append(ours)
            mine = self.identity()
            self.network.stream(ours, lambda: greeted(mine))

        def greeted(mine: Identity) -> None:
            if not end.is_open:
                ours.arrive(end, None)
                return
            end.other = ours
            end.session = SimSession(mine)
            self.network.stream(end, lambda: self.event(take_in))
            end.life.on_readable(end)

        def take_in() -> None:
            if not ours.is_open:
                return
            if identity.role == "client":
                self._accept_client(ours)
            else:
                self.peers.accept(ours)  # type: ignore[arg-type]
                self._hear_early(ours)

        self.event(greet)

    def _hear_early(self, end: End) -> None:
        """What came while the connection was not yet known."""
        callback = self.selector.callback(end)
        if callback is not None:
            callback(selectors.EVENT_READ)

    def on_readable(self, end: End) -> None:
        """A connection of this life has something to say."""
        def read() -> None:
            callback = self.selector.callback(end)
            if callback is not None:
                callback(selectors.EVENT_READ)

        self.event(read)

    def identity(self) -> Identity:
        members = self.neighbours.addresses(20)
        return Identity(self.node_id, self.boot, "node", self.name, "sim", self.cluster_id, protocol.VERSION, "0",
                        "3.11", {"address": self.address, "members": members})

    # ---- clients

    def _accept_client(self, end: End) -> None:
        session_id = f"client-{self._next_client}"
        self._next_client += 1
        self.clients[session_id] = end
        self.selector.register(end, selectors.EVENT_READ, lambda mask: self._on_client(session_id))
        self._on_client(session_id)

    def _on_client(self, session_id: str) -> None:
        end = self.clients.get(session_id)
        if end is None:
            return
        try:
            for payload in end.read():
                self._on_client_message(session_id, decode(payload))
        except ConnectionClosed:
            del self.clients[session_id]
            self.selector.unregister(end)
            end.close()
            self.node.close_session(session_id)

    def _on_client_message(self, session_id: str, message: Message) -> None:
        protocol.check("client", "client", message)
        if not self.node.is_serving:
            leader, address = self.neighbours.leader()
            self.clients[session_id].send(encode(Message("reply", {
                "req": message.fields.get("req", 0), "kind": message.kind, "result": "error", "code": "not_leader",
                "text": "", "leader": address if leader != self.node_id else None})))
            return
        if session_id not in self.node.sessions:
            session = self.clients[session_id].session
            assert session is not None
            peer = session.peer
            self.node.open_session(Session(session_id, "client", peer.node_id, peer.boot_id, peer.name))
        self.node.step(session_id, message, self.now_ms())

    # ---- what the simulation asks

    @property
    def leads(self) -> bool:
        return self.node.raft.role is Role.LEADER

    def queues_held(self) -> Iterable[tuple[str, list[list[int]]]]:
        """By queue what the executor holds."""
        return self.executor._held().items()
