"""The node as a program: one event loop that carries events between the core and the world.

Decided here: when things happen (what is read, written, sent and ticked, in which order), where a commit runs (inline while
commits are fast, in a thread when they are slow), and what starting and stopping mean. What should happen is the core's word.
"""

from __future__ import annotations

import contextlib
import gc
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import p2pcluster
from p2pcluster import bundle, config, process
from p2pcluster.config import Options
from p2pcluster.core import protocol
from p2pcluster.core.codec import Buffer, Message, decode, encode
from p2pcluster.core.executor import Executor, Kill, Say, Send, Start, ToLeader
from p2pcluster.core.handshake import Handshake, Identity, derive_key
from p2pcluster.core.log import Log
from p2pcluster.core.node import Grant, Node, NodeReady, Session, grant_message, is_over
from p2pcluster.core.queues import Chunk
from p2pcluster.errors import ClusterError, HomeError, JournalError, ProtocolError
from p2pcluster.home import Home, Keyfile
from p2pcluster.journal import Checkpoint, Compaction, Journal, Write, checkpoint_of
from p2pcluster.stream import Connection, ConnectionClosed, Listener, PortTaken

LOCAL = "local"  # the session of this machine's own executor
SELF = "self"  # the session over which this node deploys and starts runs
COMMIT_FAST_S = 0.003  # commits that take longer on average go to a thread
COMMIT_WEIGHT = 0.2  # of the newest commit in that average
TICK_S = 0.02
IDLE_TICK_S = 0.1
COMPACT_BYTES = 1 << 20  # copied in one slice, or a fourth of what is deleted
WAL_BUSY_BYTES = config.WAL_BYTES_MAX // 2  # copied back while work goes on, which then waits for it ...
WAL_IDLE_BYTES = config.WAL_BYTES_MAX // 64  # ... and long before that when there is none


@dataclass(frozen=True, slots=True)
class Offer:
    """What this node brings: a project's folder, and how its run is to be started. `project` is None for a pair of hands."""

    project: bundle.Project | None = None
    until_done: bool = False
    again: bool = False
    params: dict[str, Any] | None = None


class Committer:
    """Work on the journal, inline or in a thread; one piece at a time. `wake` is called from the thread when one is done."""

    def __init__(self, journal: Journal, wake: Callable[[], None]) -> None:
        self.journal = journal
        self.seconds = 0.0
        self._wake = wake
        self._lock = threading.Condition()
        self._job: Callable[[], Compaction] | None = None
        self._result: Compaction | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._job is not None

    @property
    def is_slow(self) -> bool:
        return self.seconds > COMMIT_FAST_S

    def write(self, write: Write) -> Compaction:
        """Write now; durable when this returns. Raises `JournalError`."""
        started_s = time.monotonic()
        compaction = self.journal.write(write)
        self.seconds += COMMIT_WEIGHT * (time.monotonic() - started_s - self.seconds)
        return compaction

    def begin(self, job: Callable[[], Compaction]) -> None:
        """Do `job` in the thread; `take_finished` says when it is done."""
        assert self._job is None, "one piece at a time"
        if self._thread is None:
            sys.setswitchinterval(0.0005)  # a thread that waits for the interpreter waits this long, ten times less than usual
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        with self._lock:
            self._job, self._result = job, None
            self._lock.notify()

    def take_finished(self) -> Compaction | None:
        """What the job that was begun gave, once it is done. Raises what it raised."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._result is None:
                return None
            result, self._job, self._result = self._result, None, None
            return result

    def wait(self) -> None:
        """Until the job that was begun is over."""
        with self._lock:
            while self._job is not None and self._result is None and self._error is None:
                self._lock.wait()

    def _run(self) -> None:
        while True:
            with self._lock:
                while self._job is None or self._result is not None or self._error is not None:
                    self._lock.wait()
                job = self._job
            result: Compaction | None = None
            error: BaseException | None = None
            try:
                result = job()
            except BaseException as caught:  # it belongs to the loop, which raises it again
                error = caught
            with self._lock:
                self._result, self._error = result, error
                self._lock.notify_all()
            self._wake()


class Bodies:
    """The bytes of granted items: from memory, or read again from the journal; of each queue the last chunk stays at hand."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._last: dict[str, tuple[Chunk, bytes, bytes]] = {}

    def of(self, queue: str, chunk: Chunk, lo: int, hi: int) -> tuple[Buffer, Buffer]:
        if chunk.body is not None:
            return chunk.slice(lo, hi)
        found = self._last.get(queue)
        if found is None or found[0] is not chunk:
            lengths, body = self._journal.read_bodies(queue, chunk)
            found = self._last[queue] = (chunk, lengths, body)
        return chunk.slice_of(found[1], found[2], lo, hi)


class Daemon:
    """One node from its start to its end; `run` returns the exit code."""

    def __init__(self, options: Options, home: Home, key: bytes, offer: Offer, out: Callable[[str], None] | None = None) -> None:
        self.options = options
        self.home = home
        self.offer = offer
        self.boot = secrets.token_hex(8)
        self.name = f"{socket.gethostname()}" or "node"
        self._key = derive_key(key)
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._printer = process.Printer(sys.stdout, self.wake)
        self._out = out or self._printer.line
        self._clients: dict[str, Connection] = {}
        self._replies: dict[int, Callable[[dict[str, Any]], None]] = {}
        self._next_request = 1
        self._next_client = 1
        self._signals = 0
        self._stopping_by_s: float | None = None
        self._exit_code: int | None = None
        self._checkpointed_s = self._ticked_s = 0.0
        self._compacting = False
        self._in_flight: NodeReady | None = None
        self._old_positions = True
        self._watched: tuple[str, int] | None = None

    # ---- from start to end

    def run(self) -> int:
        """Serve until told to stop, or until the offered run is done. Raises `ClusterError` for what stops a node."""
        self.journal, recovered = Journal.open(self.home.journal, self.home.mark)
        try:
            self._start(recovered)
            with self._signal_handlers():
                while self._exit_code is None:
                    self._turn()
        except BaseException:
            self._abandon()
            raise
        self._close()
        return self._exit_code

    def _start(self, recovered: Any) -> None:
        now_ms = self._now_ms()
        meta = self.journal.meta
        node_id = meta.get("node_id")
        if node_id is None:
            node_id, cluster_id = secrets.token_hex(8), secrets.token_hex(8)
            self.journal.write(Write(meta=(("node_id", node_id), ("cluster_id", cluster_id), ("cluster_name", self.options.cluster))))
            meta = self.journal.meta
        if meta["cluster_name"] != self.options.cluster:
            raise HomeError(f"{self.home.path} belongs to cluster {meta['cluster_name']!r} and not to {self.options.cluster!r}: choose "
                            f"another --home, or --cluster {meta['cluster_name']}")
        self.node_id, self.cluster_id = node_id, meta["cluster_id"]
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._listener = self._listen()
        self._listener.register(self._selector)
        self.address = f"{self.options.advertise or self._listener.address[0]}:{self._listener.address[1]}"
        log = Log(recovered.base_index, recovered.base_term, recovered.base_at_ms)
        self._load_log(log, recovered)
        self.node = Node(node_id, self.boot, self.name, random.Random(secrets.randbits(64)), recovered.hard_state, log, recovered.state,
                         recovered.commit_index, now_ms, process.ran_before(self.home.run, self.boot))
        self.executor = Executor(self.name)
        self._processes = process.ProcessTable(self._selector, self.home.run, self.boot, self._printer, self._on_process_message,
                                               self._on_process_exit)
        self._committer = Committer(self.journal, self.wake)
        self._bodies = Bodies(self.journal)
        self.node.open_session(Session(LOCAL, "node", node_id, self.boot, self.name, self.facts()))
        self.node.open_session(Session(SELF, "client", node_id, self.boot + "-self", self.name))
        self.home.write_address(*self._listener.address, self.options.cluster)
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again
        while not self.node.is_serving:
            self._committer.wait()
            self._tick(time.monotonic())
            self._pump()
        self._out(f"node {self.name} leads cluster {self.options.cluster} at {self.address}; home {self.home.path}")
        self._offer_project()

    def _load_log(self, log: Log, recovered: Any) -> None:
        """The log as the core knows it: what is committed without its bytes, which stay in the journal."""
        for entry in self.journal.entries(recovered.base_index, bodies_after=recovered.commit_index):
            log.append([entry])
            log.release_through(min(entry.index, recovered.commit_index))

    def _listen(self) -> Listener:
        def make_handshake() -> Handshake:
            return Handshake("accept", self._key, self._identity(), secrets.token_bytes(32))

        try:
            return Listener(self.options.bind, self.options.port, make_handshake)
        except PortTaken:
            if self.options.port != config.PORT:
                raise
            return Listener(self.options.bind, 0, make_handshake)

    def _identity(self) -> Identity:
        return Identity(self.node_id, self.boot, "node", self.name, self.options.cluster, self.cluster_id, protocol.VERSION,
                        p2pcluster.__version__, platform.python_version())

    def facts(self) -> dict[str, Any]:
        """What rules and people may know of this machine."""
        cores = os.cpu_count() or 1
        return {
            "cores": cores, "memory_gb": _memory_gb(), "name": self.name, "os": sys.platform, "python": platform.python_version(),
            "tags": list(self.options.tag), "address": self.address, "slots": self.options.slots or cores,
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
        for connection in self._clients.values():
            with contextlib.suppress(ConnectionClosed):
                connection.flush()
            connection.close()
        self._listener.close()
        self.journal.write(Write(commit_index=self.node.raft.commit_index, checkpoint=checkpoint_of(self.node.state)))
        self.journal.close()
        self.home.close()
        self._printer.close(2.0)

    def _end_processes(self) -> None:
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
            elif key.fileobj in self._selector.get_map():
                key.data(mask)
        now_s = time.monotonic()
        if now_s - self._ticked_s >= TICK_S:
            self._tick(now_s)
        self._pump()
        self._maybe_end()

    def _timeout_s(self) -> float:
        busy = bool(self._processes.processes) or self._stopping_by_s is not None or self.node.has_work
        return TICK_S if busy else IDLE_TICK_S

    def _tick(self, now_s: float) -> None:
        self._ticked_s = now_s
        now_ms = self._now_ms()
        self.node.tick(now_ms)
        self._processes.poll()
        self.executor.tick(now_ms, self._processes.positions())
        if (expiry_s := self._listener.next_expiry_s) is not None and now_s >= expiry_s:
            self._listener.expire(now_s)
        for note in self._listener.take_notes():
            self._out(note)
        self._keep_house(now_s)
        self._watch_run()

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
                self.node.step(LOCAL, action.message, self._now_ms())
            elif isinstance(action, Send):
                self._processes.send(action.key, action.message)
            elif isinstance(action, Start):
                self._start_process(action)
            elif isinstance(action, Kill):
                self._processes.kill(action.key)
            elif isinstance(action, Say):
                self._out(action.text)
        return bool(actions)

    def _carry_outbox(self) -> bool:
        sent = self.node.take_outbox()
        for session, item in sent:
            message = self._materialized(item) if isinstance(item, Grant) else item
            if session == LOCAL:
                self.executor.on_leader(message, self._now_ms())
            elif session == SELF:
                self._replies.pop(message.fields["req"])(message.fields)
            elif session in self._clients:
                self._send_client(session, message)
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
        if not self._in_flight.needs_write:
            self._after_write(Compaction())
            return True
        write = self._next_write(self._in_flight)
        if self._committer.is_slow:
            self._committer.begin(lambda: self._committer.write(write))
            return False
        self._after_write(self._committer.write(write), write.compact is not None)
        return True

    def _next_write(self, ready: NodeReady | None) -> Write:
        """What is to be written now. The tables' changes and compaction ride with the entries, so that they cost no fsync of their own."""
        checkpoint = self._due_checkpoint()
        compact = (self.node.raft.commit_index + 1, COMPACT_BYTES) if self._compacting else None
        if ready is None:
            return Write(commit_index=self.node.raft.commit_index, checkpoint=checkpoint, compact=compact)
        return Write(ready.entries, ready.hard_state, ready.commit_index, ready.sole_voter, checkpoint=checkpoint, compact=compact)

    def _after_write(self, compaction: Compaction, compacted: bool = True) -> None:
        if compacted:
            self._compacting = compaction.more
        for chunk in compaction.filled:
            self.node.state.filled(chunk.queue, chunk.first, chunk.body_crc)
        if self._in_flight is not None:
            ready, self._in_flight = self._in_flight, None
            self.node.advance(ready)

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
        if self._old_positions and self.node.is_settled:
            self._old_positions = False
            process.forget_ran_before(self.home.run, self.boot)
        if self._committer.is_busy:
            return
        overdue = self.node.state.dirty_count and now_s > self._checkpointed_s + 2 * config.CHECKPOINT_INTERVAL_S
        if overdue or (self._compacting and not self.node.has_work):
            write = self._next_write(None)
            self._after_write(self._committer.write(write), write.compact is not None)
        wal_bytes = self.journal.wal_bytes
        if wal_bytes > (WAL_BUSY_BYTES if self.node.has_work else WAL_IDLE_BYTES):
            self._committer.begin(self._checkpoint_wal)

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

    def _start_process(self, action: Start) -> None:
        spec = action.spec
        try:
            folder = self._folder_of(spec.version, action.project["zip_sha256"])
            out_dir = self.home.out / spec.pipeline
            out_dir.mkdir(parents=True, exist_ok=True)
            self._processes.start(action.key, spec, {
                "folder": str(folder), "project": action.project, "run": spec.run, "stage": spec.stage, "role": spec.role,
                "node": self.name, "params": action.params, "out_dir": str(out_dir),
                "hash_seed": process.hash_seed(self.cluster_id, spec.pipeline, spec.run),
                "queue": self._queue_of(spec.pipeline, spec.stage),
            })
        except (OSError, ClusterError) as error:
            self.executor.on_exit(action.key, f"could not be started ({error})", 0, [], self._now_ms())

    def _queue_of(self, pipeline: str, stage: str) -> str:
        record = self.node.state.pipelines[pipeline].stage(stage)
        return f"{pipeline}/{record['reads']}" if record and record["reads"] else ""

    def _folder_of(self, version: str, zip_sha256: str) -> Path:
        """The unpacked project of a version; out of the journal when it is not there."""
        folder = self.home.bundles / version
        if not folder.exists():
            parts = self.node.state.bundle_parts(version)
            assert parts is not None, "a version is deployed once its parts are applied"
            bundle.unpack(self.journal.read_bundle(version, parts), zip_sha256, folder)
        return folder

    def _on_process_message(self, key: int, message: Message) -> None:
        self.executor.on_message(key, message, self._now_ms())

    def _on_process_exit(self, key: int, how: str, running: int, stderr: list[str]) -> None:
        self.executor.on_exit(key, how, running, stderr, self._now_ms())

    # ---- clients

    def _accept(self, connections: list[Connection]) -> None:
        for connection in connections:
            assert connection.session is not None
            session_id = f"client-{self._next_client}"
            self._next_client += 1
            peer = connection.session.peer
            self._clients[session_id] = connection
            self.node.open_session(Session(session_id, "client", peer.node_id, peer.boot_id, peer.name))
            self._selector.register(connection, selectors.EVENT_READ, lambda mask, s=session_id: self._on_client(s, mask))
            self._flush_client(session_id)

    def _on_client(self, session_id: str, mask: int) -> None:
        connection = self._clients.get(session_id)
        if connection is None:
            return
        try:
            if mask & selectors.EVENT_READ:
                for payload in connection.read():
                    if session_id not in self._clients:
                        return  # a reply found it gone
                    self._on_client_message(session_id, decode(payload))
        except (ConnectionClosed, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                self._out(f"a client at {connection.peer_address} was refused: {error}")
            self._drop_client(session_id)
            return
        self._flush_client(session_id)

    def _on_client_message(self, session_id: str, message: Message) -> None:
        protocol.check("client", "client", message)
        if message.kind == "stop":
            self._send_client(session_id, Message("reply", {"req": message.fields["req"], "kind": "stop", "result": "ok"}))
            self._out("stopping: a client asked for it")
            self.stop(1 if self.offer.until_done else 0)
            return
        self.node.step(session_id, message, self._now_ms())

    def _send_client(self, session_id: str, message: Message) -> None:
        if message.fields.get("kind") == "status" and "status" in message.fields:
            self._complete_status(message.fields["status"])
        connection = self._clients.get(session_id)
        if connection is not None:
            connection.send(encode(message))
            self._flush_client(session_id)

    def _complete_status(self, status: dict[str, Any]) -> None:
        status["cluster"] |= {"id": self.cluster_id, "name": self.options.cluster}
        status["leader"] |= {"name": self.name, "address": self.address}

    def _flush_client(self, session_id: str) -> None:
        connection = self._clients.get(session_id)
        if connection is None:
            return
        try:
            connection.flush()
        except ConnectionClosed:
            self._drop_client(session_id)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_write else 0)
        key = self._selector.get_key(connection)
        if key.events != wanted:
            self._selector.modify(connection, wanted, key.data)

    def _drop_client(self, session_id: str) -> None:
        connection = self._clients.pop(session_id, None)
        if connection is None:
            return
        self._selector.unregister(connection)
        connection.close()
        self.node.close_session(session_id)

    # ---- the offered project and its run

    def _ask(self, message: Message, on_reply: Callable[[dict[str, Any]], None]) -> None:
        request = self._next_request
        self._next_request += 1
        self._replies[request] = on_reply
        self.node.step(SELF, message._replace(fields={**message.fields, "req": request}), self._now_ms())

    def _offer_project(self) -> None:
        project = self.offer.project
        if project is None:
            self._out("no project here: this node works for the cluster's pipelines; to bring one, run it where a pipeline.py is")
            return
        packed = bundle.pack(project.folder, extra_excludes=project.excludes)
        for note in packed.notes:
            self._out(note)
        folder = self.home.bundles / packed.version
        bundle.unpack(packed.zip_bytes, packed.zip_sha256, folder)
        record = {"module": project.module, "variable": project.variable, "import_paths": list(project.import_paths)}
        manifest = self._manifest(packed.version, folder, record)
        origin = {"node": self.node_id, "name": self.name, "folder": str(project.folder)}
        deployed = self.node.state.pipelines.get(manifest["pipeline"])
        if deployed is not None and deployed.version != packed.version and deployed.origin != origin:
            self._out(f"{manifest['pipeline']}: another version is deployed, from {deployed.origin.get('folder')} on "
                      f"{deployed.origin.get('name')}; this node works for that one. To replace it: python -m p2pcluster deploy")
            self._begin_run(manifest)
            return
        if deployed is not None and deployed.version == packed.version and deployed.project == record:
            self._begin_run(manifest)
            return
        if deployed is not None:
            changed = bundle.changed_files(deployed.files, packed.files)
            self._out(f"{manifest['pipeline']}: version {packed.version[:8]} replaces {deployed.version[:8]}: {_listed(changed)}")
        for message in deploy_messages(packed, manifest, record, origin):
            last = message.kind == "deploy"
            self._ask(message, (lambda fields: self._on_deployed(fields, manifest)) if last else _ignore)

    def _manifest(self, version: str, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
        for pipeline in self.node.state.pipelines.values():
            if pipeline.version == version and pipeline.project == record:
                return pipeline.manifest
        answer = process.read_manifest(folder, record)
        if "error" in answer:
            if answer["traceback"] and self.options.verbose:
                self._out(answer["traceback"])
            raise process.refusal(answer)
        manifest: dict[str, Any] = answer["manifest"]
        return manifest

    def _on_deployed(self, fields: dict[str, Any], manifest: dict[str, Any]) -> None:
        assert fields["result"] == "ok", f"deploying was refused: {fields}"
        self._begin_run(manifest)

    def _begin_run(self, manifest: dict[str, Any]) -> None:
        pipeline = self.node.state.pipelines[manifest["pipeline"]]
        if pipeline.state == "done" and not self.offer.again:
            self._out(f"{pipeline.name}: run {pipeline.run} is done; --again starts the next one")
            self._watched = (pipeline.name, pipeline.run)
            return
        if pipeline.state == "running":
            self._out(f"{pipeline.name}: run {pipeline.run} goes on")
            self._watched = (pipeline.name, pipeline.run)
            if self.offer.params:
                self._out(f"{pipeline.name}: --set is for a new run; run {pipeline.run} keeps the parameters that it was started with")
            return
        params = {**(pipeline.manifest["params"] or {}), **(self.offer.params or {})}
        self._ask(Message("start_run", {"pipeline": pipeline.name, "params": params}),
                  lambda fields: self._on_run_started(pipeline.name, fields))

    def _on_run_started(self, name: str, fields: dict[str, Any]) -> None:
        assert fields["result"] in ("ok", "refused"), f"starting a run failed: {fields}"
        self._out(f"{name}: run {fields['run']} {'starts' if fields['result'] == 'ok' else 'goes on'}")
        self._watched = (name, fields["run"])

    def _watch_run(self) -> None:
        if self._watched is None or not self.offer.until_done or self._stopping_by_s is not None:
            return
        name, run = self._watched
        pipeline = self.node.state.pipelines[name]
        if pipeline.run == run and not is_over(pipeline):
            return
        parked = self.node.state.parked_of_run(pipeline)
        seconds = (pipeline.done_ms - pipeline.started_ms) / 1000
        text = f"{pipeline.name}: run {pipeline.run} done in {seconds:.1f} s"
        if parked:
            text += f", {parked} item{'s' if parked > 1 else ''} parked: python -m p2pcluster parked list"
        self._out(text)
        self.stop(3 if parked else 0)


def deploy_messages(packed: bundle.Bundle, manifest: dict[str, Any], project: dict[str, Any], origin: dict[str, Any]) -> Iterator[Message]:
    """The commands that ship a bundle: its parts as ordinary entries, then the deploy that names them."""
    size = config.BUNDLE_PART_BYTES
    parts = max(1, -(-len(packed.zip_bytes) // size))
    for part in range(parts):
        yield Message("bundle_part", {"version": packed.version, "part": part, "parts": parts},
                      (memoryview(packed.zip_bytes)[part * size : (part + 1) * size],))
    yield Message("deploy", {"pipeline": manifest["pipeline"], "version": packed.version, "origin": origin, "manifest": manifest,
                             "files": packed.files, "zip_sha256": packed.zip_sha256, "project": project})


def open_key(options: Options) -> bytes:
    """The cluster's key, made when there is none. Raises `HomeError`."""
    keyfile = Keyfile(options.authkey_file) if options.authkey_file else Keyfile.default(options.cluster)
    return keyfile.make()


def _ignore(fields: dict[str, Any]) -> None:
    assert fields["result"] in ("ok", "already"), f"a part of a bundle was refused: {fields}"


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)
    except (ValueError, OSError, AttributeError):
        return None
