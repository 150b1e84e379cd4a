"""The node as a program: one event loop that carries events between the core and the world.

Decided here: when things happen (what is read, written, sent and ticked, in which order), where a commit runs (inline while
commits are fast, in a thread when they are slow), and what starting and stopping mean. What should happen is the core's word.
"""

from __future__ import annotations

import contextlib
import gc
import getpass
import os
import platform
import random
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import p2pcluster
from p2pcluster import config, process
from p2pcluster.beacons import Beacons, ask_for_key_text
from p2pcluster.clients import Clients
from p2pcluster.committer import Bodies, Committer
from p2pcluster.config import Address, Options, parse_address
from p2pcluster.core import protocol
from p2pcluster.core.absence import Absence
from p2pcluster.core.codec import Message
from p2pcluster.core.datagram import State
from p2pcluster.core.executor import Executor, Kill, Say, Send, Settled, Start, ToLeader
from p2pcluster.core.handshake import Handshake, Identity, derive_key
from p2pcluster.core.log import CONFIG, Log
from p2pcluster.core.membership import AskForKey, Blocked, Decision, Found, MakeKey, Serve, role_of
from p2pcluster.core.messages import decode_configuration
from p2pcluster.core.grants import Grant, grant_message
from p2pcluster.core.node import Node, NodeReady
from p2pcluster.core.sessions import LOCAL_SESSION, Session
from p2pcluster.core.records import BundlePart
from p2pcluster.core.queues import State as QueuesState
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState, Ready
from p2pcluster.core.snapshot import decode_snapshot, encode_snapshot, read_configuration
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import ClusterError, HomeError, Superseded
from p2pcluster.gathering import Gathering
from p2pcluster.home import Home, Keyfile
from p2pcluster.journal import Checkpoint, Compaction, Journal, Recovered, Write, checkpoint_of
from p2pcluster.logbook import Logbook
from p2pcluster.neighbours import Neighbours, session_of
from p2pcluster.offering import Offer, Offering
from p2pcluster.peers import Events, Peers
from p2pcluster.placements import Placements
from p2pcluster.projects import Projects
from p2pcluster.rivals import Rivals
from p2pcluster.stream import Connection, Listener, PortTaken

OWN_REQUESTS = 1 << 40  # what this node itself asks of the leader is numbered from here, above what its executor asks
DOORS_MAX = 3  # nodes of a cluster that a newcomer knocks at together
ACCEPTED_TOLD_MAX = 10  # clusters that may have dissolved into this one, so that a client of one goes on here
MEMBERS_TOLD_MAX = 20  # addresses that a client hears when it connects, to find another node when this one has gone
TICK_S = 0.02
IDLE_TICK_S = 0.1
HEARTBEAT_TICK_S = 0.05  # half of Raft's interval between heartbeats
COMPACT_BYTES = 1 << 20  # copied in one slice, or a fourth of what is deleted
WAL_BUSY_BYTES = config.WAL_BYTES_MAX // 2  # copied back while work goes on, which then waits for it ...
WAL_IDLE_BYTES = config.WAL_BYTES_MAX // 64  # ... and long before that when there is none


class Daemon:
    """One node from its start to its end; `run` returns the exit code. With `alone` it makes a cluster of its own and joins nobody."""

    def __init__(self, options: Options, home: Home, keyfile: Keyfile, offer: Offer, out: Callable[[str], None] | None = None,
                 alone: bool = False) -> None:
        self.options = options
        self._alone = alone
        self.home = home
        self.offer = offer
        self.boot = secrets.token_hex(8)
        self.name = _node_name(home.path, options)
        self._keyfile = keyfile
        key = keyfile.read()
        self._has_key = key is not None
        self._key = derive_key(key or secrets.token_bytes(32))  # without one nobody gets in, until there is one
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._led_by: tuple[str, int, int] | None = None
        self._absence = Absence()
        self._has_settled = False
        self._printer = process.Printer(sys.stdout, self.wake)
        self._out = out or self._printer.line
        self._replies: dict[int, tuple[str, Callable[[dict[str, Any]], None]]] = {}
        self._next_request = OWN_REQUESTS
        self._signals = 0
        self._stopping_by_s: float | None = None
        self._exit_code: int | None = None
        self._checkpointed_s = self._ticked_s = 0.0
        self._compacting = False
        self._commit_seen = (0, 0.0)  # the last commit index, and since when it is not on the disk
        self._in_flight: NodeReady | None = None
        self._ends_by_s = 0.0
        self._is_leaving = False
        self._told_addresses: list[str] = []
        self._waited_for = ""
        self._left_by: tuple[str, int, int] | None = None

    # ---- from start to end

    def run(self) -> int:
        """Serve until told to stop, or until the offered run is done. Raises `ClusterError` for what stops a node."""
        self.journal, recovered = Journal.open(self.home.journal, self.home.mark)
        try:
            with self._signal_handlers():
                self._start(recovered)
                while self._exit_code is None:
                    self._turn()
        except BaseException:
            self._abandon()
            raise
        self._close()
        return self._exit_code

    def _start(self, recovered: Recovered) -> None:
        now_ms = self._now_ms()
        meta = self.journal.meta
        node_id = meta.get("node_id")
        if node_id is None:
            node_id = secrets.token_hex(8)
            self.journal.write(Write(meta=(("node_id", node_id), ("cluster_name", self.options.cluster))))
            meta = self.journal.meta
        if meta["cluster_name"] != self.options.cluster:
            raise HomeError(f"{self.home.path} belongs to cluster {meta['cluster_name']!r} and not to {self.options.cluster!r}: choose "
                            f"another --home, or --cluster {meta['cluster_name']}")
        self.node_id, self.cluster_id, self.generation = node_id, meta.get("cluster_id"), int(meta.get("generation") or 0)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        self._listener = self._listen()
        self._listener.register(self._selector)
        self.address = f"{self.options.advertise or self._listener.address[0]}:{self._listener.address[1]}"
        log = Log(recovered.base_index, recovered.base_term, recovered.base_at_ms)
        configuration = self._load_log(log, recovered, read_configuration(meta.get("configuration")))
        self.node = Node(node_id, random.Random(secrets.randbits(64)), recovered.hard_state, log, recovered.state, configuration,
                         recovered.commit_index, now_ms, self.generation)
        self._peers = Peers(node_id, self._selector, self._dial_handshake, Events(
            self._on_peer_message, lambda identity: self.neighbours.on_connected(identity, self._now_ms()),
            lambda peer: self.neighbours.on_gone(peer, self._now_ms()), lambda peer: self.neighbours.on_refused(peer, self._now_ms()),
            self._out))
        self.neighbours = Neighbours(node_id, self.address, self._peers, self._on_member_message,
                                     lambda message: self._on_leader_message(message))
        self.neighbours.node, self.neighbours.cluster_id = self.node, self.cluster_id
        self._rivals = Rivals(node_id, self.neighbours, self._peers)
        origin = {"node": node_id, "name": self.name, "folder": str(self.offer.project.folder) if self.offer.project else ""}
        self._offering = Offering(self.offer, origin, self.home.bundles, self.options.verbose, self._ask, self._out)
        self.executor = Executor(self.name)
        self._logbook = Logbook(self.home.logs, self._out)
        self._processes = process.ProcessTable(self._selector, self.home.run, self.boot, self._printer, self._on_process_message,
                                               self._on_process_exit, self._logbook.add)
        self._clients = Clients(self._selector, self._on_client_message, lambda session: self.node.close_session(session), self._out)
        self._gathering = Gathering(node_id, self.boot, self._logbook, self.neighbours.send, self._clients.send, self._member_names)
        self._committer = Committer(self.journal, self.wake)
        self._bodies = Bodies(self.journal)
        self._projects = Projects(self.home.bundles, self.journal, self._bundle_parts, self._to_leader,
                                  self._start_process, self._on_process_exit, self._out)
        if recovered.state.applied_idx:
            self._projects.tidy({version for pipeline in recovered.state.pipelines.values() for version in pipeline.versions_kept})
        self._placements = Placements(self._projects.folder_of)
        self.home.write_address(*self._listener.address, self.options.cluster)
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again
        self._out(f"node {self.name} of cluster {self.options.cluster} at {self.address}; home {self.home.path}")
        self._offering.prepare_beside(self.wake)
        has_copy = bool(configuration.members) or recovered.last_index > 0
        self._beacons = Beacons(self.options, node_id, self.boot, self.name, self._key if self._has_key else None, self._listener.address[1],
                                self.cluster_id if has_copy else None, None if has_copy else self.cluster_id, self._selector, self._now_ms(),
                                self._on_decision, lambda vote: self.node.step_raft(vote, self._now_ms()), self._out, self._alone)

    def _load_log(self, log: Log, recovered: Recovered, configuration: Configuration) -> Configuration:
        """The log as the core knows it: what is committed without its bytes, which stay in the journal. Returns the configuration in
        force at the commit index; the one given is that of the tables."""
        for entry in self.journal.entries(recovered.base_index, bodies_after=recovered.commit_index):
            if entry.kind == CONFIG and self.journal.meta["applied_idx"] < entry.index <= recovered.commit_index:
                configuration = decode_configuration(entry.body)
            log.append([entry])
            log.release_through(min(entry.index, recovered.commit_index))
        return configuration

    # ---- finding a cluster

    def _on_decision(self, decision: Decision) -> None:
        """What was heard, or not heard, of other nodes has an outcome."""
        now_ms = self._now_ms()
        if isinstance(decision, MakeKey):
            found = self._keyfile.read()  # another node of this machine may just have made it
            self._use_key(found or self._keyfile.make(), made=found is None)
        elif isinstance(decision, AskForKey):
            self._ask_for_key(decision)
        elif isinstance(decision, Found):
            self._join(secrets.token_hex(8), Configuration((self.node_id,)))
            self.node.may_serve = False  # not before another window without another founder is over
            self._beacons.discovery.founded(self.cluster_id or "", now_ms)
            self._out(f"founded cluster {self.options.cluster}")
        elif isinstance(decision, Serve):
            self.node.may_serve = True
        elif isinstance(decision, Blocked):
            self._out(f"cluster {self.options.cluster!r} is used at {decision.host} under another key, so this node founds none: bring its key with "
                      "p2pcluster key there and p2pcluster key --set here, or choose another --cluster")

    def _ask_for_key(self, decision: AskForKey) -> None:
        key = self._keyfile.read()
        if key is None and sys.stdin.isatty():
            key = self._keyfile.set_key(getpass.getpass(f"key of cluster {self.options.cluster}: "))
        if key is None:
            raise HomeError(ask_for_key_text(decision, self.options.cluster))
        self._use_key(key, made=False)

    def _use_key(self, key: bytes, made: bool) -> None:
        self._key = derive_key(key)
        self._beacons.use_key(self._key, made, self._now_ms())

    def _find(self) -> None:
        """Knock at the doors of the cluster that was heard, as long as this node is not connected to its leader."""
        now_ms = self._now_ms()
        discovery = self._beacons.discovery
        wanted = discovery.cluster_id(now_ms)
        if self.cluster_id is None or self.cluster_id == wanted:
            for door in discovery.doors(now_ms)[:DOORS_MAX] if self._led_by is None else ():
                if door.node_id != self.node_id and door.node_id not in self.neighbours.connected:
                    self._peers.want(door.node_id, door.address, door.node_id)
        if self.cluster_id is None and wanted is not None:
            met = [hello for hello in self.neighbours.hellos.values() if hello.is_here and hello.cluster_id == wanted]
            if met:
                self._join(wanted, Configuration())
        if self._led_by is not None and discovery.state in (State.JOINING, State.BLOCKED) and self.cluster_id is not None:
            discovery.joined(self.cluster_id, now_ms)
        if discovery.newest_generation() > self.generation and self.node.raft.last_index > 0:
            raise Superseded(f"cluster {self.options.cluster} goes on in a newer generation, begun by recover on another node; this node's copy is "
                             "set aside and it joins as a new one")
        if self.node.raft.last_index == 0:
            self.generation = max(self.generation, discovery.newest_generation())
        discovery.remembered = tuple(
            Address(parse_address(address).host, self.options.port) for address in self.neighbours.addresses(MEMBERS_TOLD_MAX))
        self._rivals.tick(self.node, discovery, now_ms)
        if self._rivals.may_go(self.node, now_ms):
            raise Superseded(f"cluster {self.options.cluster} is here twice: the one that this node was in held no work and goes over into the other; "
                             "this node's copy is set aside and it joins as a new one")
        self.node.alarms.pop("rivals", None)
        for alarm in discovery.alarms(now_ms):
            self.node.alarms["rivals"] = (0, alarm)  # of no run: it holds in each
        waits_for = discovery.waits_for(now_ms)
        if waits_for and waits_for != self._waited_for:
            self._out(waits_for)
        self._waited_for = waits_for

    def _beacon_facts(self) -> dict[str, Any]:
        raft, state = self.node.raft, self.node.state
        leader, address = self.neighbours.leader()
        return {
            "generation": self.generation, "term": raft.term, "leader_id": leader, "leader_address": parse_address(address) if address else None,
            "last_index": raft.last_index, "last_term": raft.log.last_term, "commit_index": raft.commit_index,
            "role": role_of(self.node_id, raft.configuration, raft.leader_id) if self.cluster_id else "none",
            "voters": len(raft.configuration.voters), "members": len(state.members),
            "has_work": state.has_work,
        }

    def _join(self, cluster_id: str, configuration: Configuration) -> None:
        self._committer.wait()
        self.journal.write(Write(meta=(("cluster_id", cluster_id), ("generation", self.generation)), configuration=configuration))
        self.cluster_id = self.neighbours.cluster_id = cluster_id
        log = Log()
        self.node = Node(self.node_id, random.Random(secrets.randbits(64)), HardState(), log, self.node.state, configuration, 0, self._now_ms(),
                         self.generation)
        self.neighbours.node = self.node
        for peer in self.neighbours.connected:
            self.node.raft.peer_connected(peer, self._now_ms())

    def _sync_leader(self) -> None:
        """Speak to whoever leads: the first thing is what this machine holds."""
        led_by = self.neighbours.serving_leader()
        if led_by == self._led_by:
            return
        self._led_by = led_by
        if led_by is None:
            return
        leader = led_by[0]
        join = Message("join", {"boot": self.boot, "name": self.name, "facts": self.facts()})
        if leader == self.node_id:
            self._on_member_message(self.node_id, join)
            self._out(f"node {self.name} leads cluster {self.options.cluster}, term {self.node.raft.term}")
        elif self.neighbours.send(leader, join):
            self._out(f"node {self.name} follows {self.neighbours.hellos[leader].identity.name}")
        else:
            self._led_by = None  # its connection has just been found dead
            return
        self.executor.on_new_leader({} if self._has_settled else process.ran_before(self.home.run, self.boot), self._now_ms())
        self._projects.ask_again()
        self._replies.clear()
        self._offering.is_asking = False

    def _on_member_message(self, node_id: str, message: Message) -> None:
        """Something for the leader's half, from another node's executor or this one's."""
        session = LOCAL_SESSION if node_id == self.node_id else session_of(node_id)
        if message.kind == "join":
            if self.node.is_serving:
                fields = message.fields
                seen = self._seen_address() if node_id == self.node_id else self.neighbours.address_of(node_id)
                fields = {**fields, "facts": {**fields["facts"], "address": seen}}
                self.node.close_session(session)
                self.node.open_session(Session(session, "node", node_id, fields["boot"], fields["name"], fields["facts"]))
        elif message.kind in ("give_way", "accepted"):
            self._rivals.on_message(self.node, self._beacons.discovery, node_id, message, self._now_ms())
        elif message.kind == "log_lines":
            self._gathering.on_lines(node_id, message)
        elif message.kind == "stop_all":
            if node_id != self.node_id:
                self._stop_all()
        elif message.kind == "bundle_get":
            if (part := self._projects.slice_of(message)) is not None:
                self.neighbours.send(node_id, part)
        elif session in self.node.sessions:
            self.node.step(session, message, self._now_ms())

    def _seen_address(self) -> str:
        """Where others see this node: a node that listens on all addresses has to name one of them."""
        host, _, port = self.address.rpartition(":")
        if host == config.BIND_ANY:
            ways = [way.address for way in self._beacons.lan.interfaces() if way.address]
            host = next((address for address in ways if not address.startswith("127.")), config.BIND_LOOPBACK)
        return f"{host}:{port}"

    def _to_leader(self, message: Message) -> None:
        """To whoever leads. Without a leader it is dropped: the executor keeps what must not be lost, and says it to the next one."""
        if self._led_by is None:
            return
        leader = self._led_by[0]
        if leader == self.node_id:
            self._on_member_message(self.node_id, message)
        else:
            self.neighbours.send(leader, message)

    def _on_leader_message(self, message: Message) -> None:
        """Something for this machine's half from whoever leads."""
        request = message.fields.get("req")
        if message.kind == "reply" and request is not None and request >= OWN_REQUESTS:
            kind, on_reply = self._replies.pop(request, ("", None))
            if on_reply is not None and message.fields["result"] != "error" and message.fields["kind"] == kind:
                on_reply(message.fields)
        elif message.kind == "bundle_slice":
            self._projects.on_slice(message)
        elif message.kind == "logs":
            self._to_leader(self._gathering.answer(message))
        elif message.kind == "left":
            self._out("left the cluster")
            self.stop(0)
        elif message.kind == "stop":
            self._out("stopping: the cluster is stopped")
            self.stop(1 if self.offer.until_done else 0)
        else:
            self.executor.on_leader(message, self._now_ms())

    def _on_peer_message(self, node_id: str, message: Message) -> None:
        self.neighbours.on_message(node_id, message, self._now_ms())

    def _listen(self) -> Listener:
        def make_handshake() -> Handshake:
            return Handshake("accept", self._key, self._identity(), secrets.token_bytes(32))

        try:
            return Listener(self.options.bind, self.options.port, make_handshake)
        except PortTaken:
            listener = Listener(self.options.bind, 0, make_handshake)
            if self.options.port != config.PORT:
                self._out(f"port {self.options.port} is taken: connections come to port {listener.address[1]}, which others learn by discovery")
            return listener

    def _identity(self) -> Identity:
        return Identity(self.node_id, self.boot, "node", self.name, self.options.cluster, self.cluster_id, protocol.VERSION,
                        p2pcluster.__version__, platform.python_version(), {"address": self.address, "members": self.neighbours.addresses(MEMBERS_TOLD_MAX),
                        "accepted": sorted(self.node.state.accepted)[:ACCEPTED_TOLD_MAX]})

    def _dial_handshake(self) -> Handshake:
        return Handshake("dial", self._key, self._identity(), secrets.token_bytes(32))

    def facts(self) -> dict[str, Any]:
        """What rules and people may know of this machine."""
        cores = os.cpu_count() or 1
        return {
            "cores": cores, "memory_gb": _memory_gb(), "name": self.name, "os": sys.platform, "python": platform.python_version(),
            "tags": list(self.options.tag), "address": self.address, "slots": cores if self.options.slots is None else self.options.slots,
        }

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {name: signal.signal(getattr(signal, name), self._on_signal) for name in names}
        wakeup = signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals += 1

    def stop(self, exit_code: int) -> None:
        """Drain: let what runs finish, at most `DRAIN_S`, then end with `exit_code`."""
        if self._stopping_by_s is not None:
            return
        self._stopping_by_s = time.monotonic() + config.DRAIN_S
        self._stop_code = exit_code
        self.executor.drain()
        self.node.hand_over()

    def leave(self) -> str | None:
        """Go for good: hand over what this node holds and leave the cluster. Returns why that cannot be, or None."""
        members = self.node.state.members
        if self._led_by is None or len(members) < 2 and self.node.is_serving:
            return "this is the cluster's only node, or nobody leads: use stop"
        if self.node.is_serving and not self.node.give_way():
            return "no other node with a copy is here: start one, wait until status shows it as a standby or a voter, then leave"
        self._is_leaving = True
        self.executor.drain()
        self._out("leaving: what runs may finish, then this node goes out of the cluster")
        return None

    def _keep_leaving(self) -> None:
        """The steps of leaving, one after the other, as the cluster allows them."""
        if not self._is_leaving or self._stopping_by_s is not None or not self.executor.is_idle:
            return
        if self.node.is_serving:
            self.node.give_way()  # the last try may have come to nothing
        elif self._led_by is not None and self._led_by[0] != self.node_id and self._left_by != self._led_by:
            self._left_by = self._led_by
            self._to_leader(Message("leave", {}))

    def _maybe_end(self) -> None:
        if self._signals and self._stopping_by_s is None:
            running = len(self.executor.processes)
            self._out("stopping: what runs may finish; a second signal stops at once" if running else "stopping")
            self.stop(1 if self.offer.until_done else 0)
            self._signals = 1
        if self._stopping_by_s is None:
            return
        if self.executor.is_idle or self._signals > 1 or time.monotonic() > self._stopping_by_s:
            for key in list(self._processes.processes):
                self._processes.kill(key)
            self._exit_code = self._stop_code

    def _close(self) -> None:
        self._end_processes()
        self.node.admit_all()
        self._pump()
        while self._committer.is_busy:
            self._committer.wait()
            self._pump()
        self._say_what_was_refused()
        self._clients.close()
        self._peers.close()
        self._beacons.close()
        self._listener.close()
        self.journal.write(Write(commit_index=self.node.raft.commit_index, checkpoint=checkpoint_of(self.node.state),
                                 configuration=self.node.applied_configuration))
        self.journal.close()
        self.home.close()
        self._logbook.close()
        self._printer.close(2.0)

    def _say_what_was_refused(self) -> None:
        """How often; each kind was told once when it came first."""
        counts = self._refused_counts()
        if any(counts.values()):
            self._out("refused since the start: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))

    def _refused_counts(self) -> dict[str, int]:
        return {"connections": self._listener.refused_count + self._peers.refused_count, "datagrams": self._beacons.refused_count,
                "clients": self._clients.refused_count}

    def _end_processes(self) -> None:
        self._placements.close()
        for key, held in list(self._processes.processes.items()):
            self._processes.kill(key)
            held.popen.wait()
            held.close()

    def _abandon(self) -> None:
        """After an error: nothing more is written; what was acknowledged is in the journal."""
        with contextlib.suppress(AttributeError):
            self._end_processes()
        with contextlib.suppress(AttributeError):
            self._listener.close()
        self.journal.abandon()
        self.home.close()
        self._printer.close(2.0)

    # ---- the loop

    def _turn(self) -> None:
        """Wait for something, hear it, tell the core, carry out what it says."""
        events = self._selector.select(self._timeout_s())
        for key, mask in events:
            if isinstance(key.data, Listener):
                self._accept(key.data.ready(key.fileobj, time.monotonic()))
            elif self._is_registered(key):
                key.data(mask)
        self._pump()  # what came is answered before the housekeeping of the tick
        now_s = time.monotonic()
        if now_s - self._ticked_s >= TICK_S:
            self._tick(now_s)
            self._pump()
        self._maybe_end()

    def _is_registered(self, key: selectors.SelectorKey) -> bool:
        """Whether it still is what it was when the events came: what one of them did may have closed it."""
        now = self._selector.get_map().get(key.fd)
        return now is not None and now.data is key.data

    def _timeout_s(self) -> float:
        """Until the clock has to be looked at: often while something is in hand, else as often as others wait to hear of this node."""
        moves = self.executor.is_busy or self._processes.is_resting or self.node.has_pending or self.neighbours.is_sending
        if moves or self._stopping_by_s is not None or self.cluster_id is None or not self.node.is_serving:
            return TICK_S
        return HEARTBEAT_TICK_S if self._peers.peers else IDLE_TICK_S

    def _tick(self, now_s: float) -> None:
        self._ticked_s = now_s
        now_ms = self._now_ms()
        self.node.tick(now_ms, int(time.time() * 1000))
        self._carry_placements(now_ms)
        self._processes.poll()
        self.executor.tick(now_ms, self._processes.positions())
        self._logbook.tick()
        self._gathering.tick(now_ms)
        self._peers.tick(now_s)
        self.neighbours.tick(now_ms)
        self._beacons.tick(now_ms, self._beacon_facts())
        self._find()
        self._sync_leader()
        if self._led_by is not None:
            self._offering.begin()
        missing = self._absence.look(self._led_by is not None, self.node.raft.configuration, {self.node_id, *self.neighbours.connected},
                                     self.node.state.members, now_ms)
        if missing:
            self._out(missing)
        if (expiry_s := self._listener.next_expiry_s) is not None and now_s >= expiry_s:
            self._listener.expire(now_s)
        for note in self._listener.take_notes():
            self._out(note)
        self._keep_house(now_s)
        self._watch_run()
        self._keep_leaving()
        addresses = self.neighbours.addresses(MEMBERS_TOLD_MAX)
        if addresses != self._told_addresses:
            self._told_addresses = addresses
            self._clients.send_all(Message("members", {"addresses": addresses}))

    def _pump(self) -> None:
        """Carry messages and commits until nothing moves."""
        for _ in range(1000):
            moved = self._carry_actions() | self._carry_outbox()
            moved |= self._commit()
            if not moved:
                return

    def _carry_actions(self) -> bool:
        actions = self.executor.take_actions()
        for action in actions:
            if isinstance(action, ToLeader):
                self._to_leader(action.message)
            elif isinstance(action, Send):
                if action.message.kind == "stop" and self._projects.forget(action.key):
                    self._on_process_exit(action.key, "ended", 0, [])
                else:
                    self._processes.send(action.key, action.message)
            elif isinstance(action, Start):
                self._projects.provide(action)
            elif isinstance(action, Kill):
                self._processes.kill(action.key)
            elif isinstance(action, Settled):
                self._has_settled = True
                process.forget_ran_before(self.home.run, self.boot)
            elif isinstance(action, Say):
                self._out(action.text)
        return bool(actions)

    def _carry_placements(self, now_ms: int) -> None:
        for question in self.node.take_questions():
            self._placements.ask(question)
        for question, answer in self._placements.take_answers():
            self.node.answer(question, answer, now_ms)

    def _carry_outbox(self) -> bool:
        sent = self.node.take_outbox()
        for session, item in sent:
            message = self._materialized(item) if isinstance(item, Grant) else item
            if session == LOCAL_SESSION:
                self._on_leader_message(message)
            elif session in self._clients:
                if message.fields.get("kind") == "status" and "status" in message.fields:
                    self._complete_status(message.fields["status"])
                self._clients.send(session, message)
            else:
                self.neighbours.send(session.removeprefix("node:"), message)
        messages = self.node.take_peer_outbox()
        self.neighbours.carry(messages)
        self._beacons.send_votes([to_peer.message for to_peer in messages])
        self.neighbours.carry_snapshots()
        return bool(sent)

    def _materialized(self, grant: Grant) -> Message:
        return grant_message(grant, [self._bodies.of(grant.queue, chunk, lo, hi) for chunk, lo, hi in grant.pieces])

    def _commit(self) -> bool:
        if self._committer.is_busy:
            compaction = self._committer.take_finished()
            if compaction is None:
                return False
            self._after_write(compaction)
            return True
        if not self.node.has_ready():
            return False
        self._in_flight = self.node.ready()
        if self._in_flight.raft.snapshot is not None:
            self._install(self._in_flight)
            return True
        if not self._in_flight.needs_write:
            self._after_write(Compaction())
            return True
        write = self._next_write(self._in_flight)
        if self._committer.is_slow:
            self._committer.begin(lambda: self._committer.write(write))
            return False
        self._after_write(self._committer.write(write), write.compact is not None)
        return True

    def _install(self, ready: NodeReady) -> None:
        """The log and the state become a snapshot that has arrived."""
        meta = ready.raft.snapshot
        assert meta is not None, "there is a snapshot to install"
        head, rows = decode_snapshot(self.neighbours.take_snapshot(meta.snapshot_id))
        self.journal.install(head, rows, ready.raft.hard_state)
        state = QueuesState(config.BODY_MEMORY_BYTES_MAX)
        for table in TABLES:
            state.load(table, [row.values for row in rows if row.table == table])
        state.loaded(head.index, head.term, head.at_ms, head.state_hash)
        self.node.state, self.node.applied_configuration = state, head.configuration
        self._in_flight = None
        if ready.raft.entries:
            self.journal.write(Write(tuple(ready.raft.entries), commit_index=ready.raft.commit_index))
        self.node.advance(ready)

    def _next_write(self, ready: NodeReady | None) -> Write:
        """What is to be written now. The tables' changes and compaction ride with the entries, so that they cost no fsync of their own."""
        checkpoint = self._due_checkpoint()
        compact = (self._keep_from_index(), COMPACT_BYTES) if self._compacting else None
        if ready is None:
            return Write(commit_index=self.node.raft.commit_index, checkpoint=checkpoint, compact=compact,
                         configuration=self.node.applied_configuration if checkpoint else None)
        raft = ready.raft
        return Write(tuple(raft.entries), raft.hard_state, raft.commit_index, ready.sole_voter, raft.truncate_from, checkpoint,
                     compact, configuration=self.node.applied_configuration if checkpoint else None)

    def _after_write(self, compaction: Compaction, compacted: bool = True) -> None:
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
        """What Raft wants of the shell beside writing and sending."""
        if ready.load_entries is not None:
            low, high = ready.load_entries
            entries = []
            for entry in self.journal.entries(low - 1):
                if entry.index > high:
                    break
                entries.append(entry)
            if entries:  # what was written with them may have compacted them away, and Raft knows it then
                self.node.raft.entries_loaded(entries)
        for peer in ready.snapshots_wanted:
            self._begin_snapshot(peer)

    def _begin_snapshot(self, peer: str) -> None:
        state = self.node.state
        head = self.journal.snapshot_head(state, self.node.applied_configuration)
        data = b"".join(encode_snapshot(head, self.journal.snapshot_rows(state)))
        self._out(f"sending a snapshot of {len(data) >> 10} KiB to {self.node.state.members.get(peer, {}).get('name', peer)}")
        self.neighbours.begin_snapshot(peer, head, data)

    def _keep_from_index(self) -> int:
        """Entries that a connected follower still lacks are kept, unless the log grows too long: then it gets a snapshot."""
        commit = self.node.raft.commit_index
        if self.journal.log_bytes > 2 * config.LOG_BYTES_MAX:
            return commit + 1
        return min([commit, *(peer.match_index for peer in self.node.raft.peers() if peer.is_connected)]) + 1

    def _due_checkpoint(self) -> Checkpoint | None:
        """The tables' changes ride with a commit, so that they cost no fsync of their own."""
        state = self.node.state
        due_s = self._checkpointed_s + config.CHECKPOINT_INTERVAL_S
        if not state.dirty_count or (time.monotonic() < due_s and state.dirty_count < config.CHECKPOINT_DIRTY_MAX):
            return None
        self._checkpointed_s = time.monotonic()
        self._compacting = True
        return checkpoint_of(state)

    def _keep_house(self, now_s: float) -> None:
        """Keep the file small also when nothing is written: tables, a shorter log, a shorter write-ahead log."""
        if self._committer.is_busy:
            return
        overdue = self.node.state.dirty_count and now_s > self._checkpointed_s + 2 * config.CHECKPOINT_INTERVAL_S
        if overdue or self._commit_index_waits(now_s) or (self._compacting and not self.node.has_work):
            write = self._next_write(None)
            self._after_write(self._committer.write(write), write.compact is not None)
        if self.journal.wal_bytes_due > (WAL_BUSY_BYTES if self.node.has_work else WAL_IDLE_BYTES):
            self._committer.begin(self._checkpoint_wal)

    def _commit_index_waits(self, now_s: float) -> bool:
        """Whether no entry has come for a while that would carry the commit index to the disk: what reads the file would stand behind it."""
        commit_index = self.node.raft.commit_index
        if commit_index <= self.journal.commit_index or commit_index != self._commit_seen[0]:
            self._commit_seen = (commit_index, now_s)
        return now_s >= self._commit_seen[1] + config.COMMIT_INDEX_IDLE_S

    def _checkpoint_wal(self) -> Compaction:
        self.journal.checkpoint_wal()
        return Compaction(self._compacting)

    def wake(self) -> None:
        """Make the loop turn; for other threads."""
        with contextlib.suppress(BlockingIOError):
            self._wake_write.send(b"\0")

    def _on_wake(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _now_ms(self) -> int:
        return int(time.monotonic() * 1000)

    # ---- processes

    def _start_process(self, action: Start, folder: Path) -> None:
        spec = action.spec
        try:
            out_dir = self.home.out / spec.pipeline
            out_dir.mkdir(parents=True, exist_ok=True)
            self._processes.start(action.key, spec, {
                "folder": str(folder), "project": action.project, "run": spec.run, "stage": spec.stage, "role": spec.role,
                "node": self.name, "params": action.params, "out_dir": str(out_dir), "queue": action.queue,
                "hash_seed": process.hash_seed(self.cluster_id, spec.pipeline, spec.run), "totals": action.totals,
            }, action.in_hand)
        except (OSError, ClusterError) as error:
            self._on_process_exit(action.key, f"could not be started ({error})", 0, [])

    def _bundle_parts(self, version: str) -> list[BundlePart] | None:
        return self.node.state.bundle_parts(version)

    def _on_process_message(self, key: int, message: Message) -> None:
        self.executor.on_message(key, message, self._now_ms())

    def _on_process_exit(self, key: int, how: str, running: int, stderr: list[str]) -> None:
        self.executor.on_exit(key, how, running, stderr, self._now_ms())

    def _accept(self, connections: list[Connection]) -> None:
        for connection in connections:
            assert connection.session is not None, "whoever is let in is authenticated"
            if connection.session.peer.role == "node":
                self._peers.accept(connection)
            else:
                self._clients.accept(connection)

    def _on_client_message(self, session_id: str, message: Message) -> None:
        protocol.check("client", "client", message)
        if message.kind == "stop":
            self._clients.send(session_id, Message("reply", {"req": message.fields["req"], "kind": "stop", "result": "ok"}))
            self._to_leader(Message("stop_all", {}))
            self._stop_all()
            return
        if message.kind == "leave":
            why_not = self.leave()
            self._clients.send(session_id, Message("reply", {"req": message.fields["req"], "kind": "leave",
                                                             "result": "refused" if why_not else "ok", "code": "cannot_leave", "text": why_not}))
            return
        if not self.node.is_serving:
            leader, address = self.neighbours.leader()
            self._clients.send(session_id, Message("reply", {
                "req": message.fields.get("req", 0), "kind": message.kind, "result": "error", "code": "not_leader",
                "text": "another node leads" if leader else "no node leads now", "leader": address if leader != self.node_id else None}))
            return
        if message.kind == "bundle_get":
            part = self._projects.slice_of(message)
            reply = part or Message("reply", {"kind": message.kind, "result": "refused", "code": "unknown_version"})
            self._clients.send(session_id, reply._replace(fields={**reply.fields, "req": message.fields["req"]}))
            return
        if message.kind == "logs":
            self._gathering.ask(session_id, message, self._now_ms())
            return
        if session_id not in self.node.sessions:
            who = self._clients.identity(session_id)
            self.node.open_session(Session(session_id, "client", who.node_id, who.boot_id, who.name))
        self.node.step(session_id, message, self._now_ms())

    def _stop_all(self) -> None:
        """Stop, and where this node leads have all others stop too."""
        self._out("stopping: a client asked for it")
        for peer in self.neighbours.connected if self.node.is_serving else ():
            self.neighbours.send(peer, Message("stop", {}))
        self.stop(1 if self.offer.until_done else 0)

    def _member_names(self) -> dict[str, str]:
        here = {node_id: hello.identity.name for node_id, hello in self.neighbours.hellos.items() if hello.is_here}
        return {**{node_id: member["name"] for node_id, member in self.node.state.members.items()}, **here}

    def _complete_status(self, status: dict[str, Any]) -> None:
        status["cluster"] |= {"id": self.cluster_id, "name": self.options.cluster}
        status["leader"] |= {"name": self.name, "address": self._seen_address()}
        status["network"] |= {f"refused_{what}": count for what, count in self._refused_counts().items()}
        for node in status["nodes"]:
            node["address"] = self._seen_address() if node["id"] == self.node_id else self.neighbours.address_of(node["id"])

    # ---- the offered project and its run

    def _ask(self, message: Message, on_reply: Callable[[dict[str, Any]], None]) -> None:
        request = self._next_request
        self._next_request += 1
        self._replies[request] = (message.kind, on_reply)
        self._to_leader(message._replace(fields={**message.fields, "req": request}))

    def _watch_run(self) -> None:
        """End with the run, where that was asked for: the leader when all others know of it, or have had the time."""
        if self._stopping_by_s is not None:
            return
        end = self._offering.ended(self.executor.pipelines)
        if end is None:
            return
        self._ends_by_s = self._ends_by_s or time.monotonic() + config.DONE_ACKNOWLEDGED_S
        if self.node.is_serving and not self.node.all_have_seen_the_end and time.monotonic() < self._ends_by_s:
            return
        self._out(end.text)
        self.stop(end.exit_code)


def keyfile_of(options: Options) -> Keyfile:
    """Where the cluster's key is, or will be."""
    return Keyfile(options.authkey_file) if options.authkey_file else Keyfile.default(options.cluster)


def _node_name(home: Path, options: Options) -> str:
    """The host's name; with the home's beside it where that is not the usual one, since several nodes of a host differ by it."""
    host = socket.gethostname() or "node"
    return host if home.name == config.default_home("", options.cluster, host).name else f"{host}/{home.name}"


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)
    except (ValueError, OSError, AttributeError):
        return None
