"""Whatever a node says that holds the key and is of another mind: those who hear it take it in or refuse it with a typed error, and go on.

Three who hear it: the leader's half, of a machine that works for it; a machine's half, of who leads it; and a node as a neighbour. All that
they answer or keep is put into bytes, tables and beacons, as in earnest.
"""

from __future__ import annotations

from hashlib import sha256
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.config import Address, parse_address
from p2pcluster.core import protocol
from p2pcluster.core.codec import Message, decode, encode_bytes
from p2pcluster.core.commands import Port, lengths_blob, put
from p2pcluster.core.datagram import Beacon, Gate
from p2pcluster.core.datagram import State as Stage
from p2pcluster.core.executor import Executor, Kill, Send, Start, ToLeader
from p2pcluster.core.handshake import Identity
from p2pcluster.core.log import Log
from p2pcluster.core.node import Node
from p2pcluster.core.sessions import LOCAL_SESSION, Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.errors import RemoteProtocolError
from p2pcluster.neighbours import Neighbours
from p2pcluster.peers import Peers
from tests import hostile
from tests.property.test_request_properties import Victim

MESSAGES = 40  # of one attack
PEER = "m"
PIPELINE = "routed"


def deploying() -> list[Message]:
    """The pipeline with a source, begun."""
    messages = hostile.deploying(PIPELINE, "2" * 64)
    messages[1].fields["manifest"] = hostile.with_a_source(PIPELINE)
    return messages


def attack(random: Random, messages: list[Message]) -> Message:
    message = random.choice(messages)
    return hostile.mangled(message, random) if random.random() < 0.9 else message


# ---- the leader's half


class Led(Victim):
    """The leader, and a machine that works for it over the network."""

    session = f"node:{PEER}"

    def __init__(self) -> None:
        super().__init__()
        for message in [*deploying(), *hostile.deploying("good", "1" * 64)]:
            self.ask(message)
        self.say(hostile.from_executor()[0])

    def say(self, message: Message) -> None:
        """What `Neighbours` and the loop do with a message for the leader's half."""
        protocol.check("member", "executor", message)
        if message.kind == "join":
            fields, facts = message.fields, {**message.fields["facts"], "address": "127.0.0.1:9"}
            self.node.close_session(self.session)
            self.node.open_session(Session(self.session, "node", PEER, fields["boot"], fields["name"], facts))
        elif message.kind not in ("bundle_get", "stop_all", "leave") and self.session in self.node.sessions:
            self.node.step(self.session, message, self.now_ms)
        self.carry()

    def is_well(self) -> None:
        if self.node.state.pipelines["good"].state == "new":
            self.ask(Message("start_run", {"pipeline": "good", "params": {}}))
        super().is_well()


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_whatever_a_machine_says_to_its_leader_is_taken_in_or_refused_and_others_are_served(seed: int) -> None:
    random = Random(seed)
    led = Led()
    for _ in range(MESSAGES):
        message = attack(random, [*hostile.from_executor(), *hostile.from_executor(PIPELINE)])
        try:
            led.say(message)
        except RemoteProtocolError:
            pass
        except Exception as error:
            raise AssertionError(hostile.text_of(message)) from error
        try:
            led.pass_time(random.choice((20, 1100)))
            encode_bytes(Message("status", {"status": led.node.status()}))
        except Exception as error:
            raise AssertionError("later: " + hostile.text_of(message)) from error
    led.is_well()


# ---- a machine's half


class Listener(Executor):
    """Keeps what the leader says; of grants it only takes note, as it has no processes."""

    def __init__(self, node_name: str) -> None:
        super().__init__(node_name)
        self.said: list[Message] = []

    def on_leader(self, message: Message, now_ms: int) -> None:
        self.said.append(message)
        if message.kind != "grant":
            super().on_leader(message, now_ms)


class Recorder(Victim):
    """Keeps what a leader says to a machine that works."""

    executor_class = Listener

    def __init__(self) -> None:
        super().__init__()
        for message in deploying():
            self.ask(message)
        window = Message("window", {"queues": {f"{PIPELINE}/Route": 5, f"{hostile.NAME}/in": 5}})
        self.node.step(LOCAL_SESSION, window, self.now_ms)
        keyed = Port([f"{hostile.NAME}/in"], lengths_blob([1, 2]), b"122", keys=b'["k", null]')
        self.ask(put("client:a", 1, 1, [keyed]))
        self.pass_time()

    @property
    def said(self) -> list[Message]:
        assert isinstance(self.executor, Listener)
        return self.executor.said


class Machine:
    """An executor with its processes, which do what they are told."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.executor = Executor("m")
        self.now_ms = 0
        self.works: dict[int, list[list[int]]] = {}
        self.seqs: dict[int, int] = {}
        self.told: list[Message] = []

    def hear(self, message: Message) -> None:
        """What `Neighbours` does with a message of who leads."""
        protocol.check("member", "leader", message)
        if message.kind not in ("bundle_slice", "left", "stop"):
            self.executor.on_leader(message, self.now_ms)
        self.carry()

    def pass_time(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self.executor.tick(self.now_ms, {key: (works[0][0], works[0][1]) for key, works in self.works.items() if works})
        self.carry()

    def carry(self) -> None:
        try:
            self.carry_all()
        except RemoteProtocolError as error:
            raise AssertionError("the loop ends") from error

    def carry_all(self) -> None:
        for _ in range(50):
            actions = self.executor.take_actions()
            for action in actions:
                if isinstance(action, ToLeader):
                    self.told.append(decode(encode_bytes(action.message)))
                elif isinstance(action, Start):
                    encode_bytes(Message("setup", {"project": action.project, "params": action.params, "queue": action.queue}))
                    self.works[action.key] = []
                    self.say(action.key, Message("ready", {}))
                elif isinstance(action, Send):
                    self.tell(action.key, decode(encode_bytes(action.message)))
                elif isinstance(action, Kill):
                    self.end(action.key, "died of signal 9 (SIGKILL)")
            if not actions:
                return

    def say(self, key: int, message: Message) -> None:
        if key in self.executor.processes:
            self.executor.on_message(key, message, self.now_ms)

    def end(self, key: int, how: str) -> None:
        works = self.works.pop(key, None)
        if works is not None:
            self.executor.on_exit(key, how, works[0][1] if works else 0, ["last words"], self.now_ms)

    def tell(self, key: int, message: Message) -> None:
        """What a process does with it."""
        works = self.works.get(key)
        if works is None:
            return
        if message.kind == "begin":
            self.seqs[key] = message.fields["seq"] + 1
            blobs = (lengths_blob([1]), b"v")
            self.say(key, Message("put", {"seq": self.seqs[key], "ports": [{"port": 0}], "source": {"count": 1, "hash": "h"}}, blobs))
        elif message.kind == "work":
            for number, (lo, hi, _, _) in enumerate(message.fields["slices"]):
                assert len(message.blobs[2 * number]) == 4 * (hi - lo)
            slices = message.fields["slices"]
            works.append([message.fields["work"], slices[0][0], sum(hi - lo for lo, hi, _, _ in slices)])
        elif message.kind == "recall":
            self.say(key, Message("returned", {"work": message.fields["work"], "kept": 1}))
            for work in works:
                work[2] = min(work[2], 1) if work[0] == message.fields["work"] else work[2]
        elif message.kind == "stop":
            self.end(key, "ended")

    def work(self) -> None:
        """One process reports what it has done, or that it failed, or dies."""
        busy = [key for key, works in self.works.items() if works]
        if not busy:
            return
        key = self.random.choice(busy)
        number, _, count = self.works[key][0]
        what = self.random.randrange(4)
        if what == 0:
            self.end(key, "died of signal 11 (SIGSEGV)")
        elif what == 1:
            self.works[key][0][2] -= 1
            if not self.works[key][0][2]:
                self.works[key].pop(0)
            self.say(key, Message("failed", {"work": number, "elapsed_us": 9, "error": {"type": "E", "text": "t"}}))
        else:
            self.works[key].pop(0)
            ports = list(self.executor.processes[key].ports)[:1]
            blobs = (lengths_blob([1] * count), b"v" * count)
            fields = {"work": number, "count": count, "elapsed_us": 9, "ports": [{"port": 0} for _ in ports]}
            self.say(key, Message("done", fields, blobs if ports else ()))
        self.carry()


@pytest.fixture(scope="module")
def said() -> list[Message]:
    """All that a leader says to a machine; and no kind is missing."""
    recorded = Recorder().said
    assert {message.kind for message in recorded} >= {"plan", "grant", "assigned"}
    seqs = Message("reply", {"req": 1, "kind": "put", "result": "ok", "seq": 1})
    tick = Message("tick", {"pipeline": PIPELINE, "stage": "Emit", "shard": 0, "epoch": 1, "seq": 1, "at_ms": 1_000})
    return [*recorded, tick, Message("reported", {}), seqs, seqs._replace(fields={**seqs.fields, "result": "refused", "code": "sequence"}),
            Message("reply", {"req": 2, "kind": "done", "result": "already", "count": 1})]


def try_a_leader(seed: int, said: list[Message]) -> None:
    random = Random(seed)
    machine = Machine(random)
    honest = [message for message in said if message.kind != "reply"]
    for message in honest if random.random() < 0.7 else ():
        machine.hear(message)
    for _ in range(MESSAGES):
        message = attack(random, said)
        try:
            machine.hear(message)
        except RemoteProtocolError:
            pass
        except Exception as error:
            raise AssertionError(hostile.text_of(message)) from error
        try:
            machine.pass_time(random.choice((20, 1100)))
            for _ in range(2):
                machine.work()
        except Exception as error:
            raise AssertionError("later: " + hostile.text_of(message)) from error
    machine.executor.on_new_leader({}, machine.now_ms)
    for message in honest:
        machine.hear(message)
    plan = next(message for message in reversed(honest) if message.kind == "plan")
    running = {(process.spec.stage, process.stopping) for process in machine.executor.processes.values()}
    assert machine.executor.pipelines == plan.fields["pipelines"] and ("Same", False) in running


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_whatever_a_leader_says_to_a_machine_it_goes_on_and_works_for_the_next_one(said: list[Message], seed: int) -> None:
    try_a_leader(seed, said)


def at_work(said: list[Message]) -> tuple[Machine, Message, dict[str, int]]:
    """A machine whose processes of the pipeline with two ways have one item each, its plan, and the processes by stage."""
    machine = Machine(Random(0))
    plan = next(message for message in reversed(said) if message.kind == "plan" and PIPELINE in message.fields["pipelines"])
    machine.hear(plan)
    machine.hear(next(message for message in said if message.kind == "assigned"))
    for queue in (f"{PIPELINE}/Route", f"{hostile.NAME}/in"):
        version = plan.fields["pipelines"][queue.partition("/")[0]]["version"]
        machine.hear(Message("grant", {"queue": queue, "version": version, "fence": ["m", "boot", 1], "deliveries": {}, "pieces": [[1, 2, 1, None]]},
                             (lengths_blob([1]), b"v")))
    return machine, plan, {f"{p.spec.pipeline}/{p.spec.stage}": p.key for p in machine.executor.processes.values()}


def without_the_second_way(plan: Message) -> Message:
    changed = decode(encode_bytes(plan))
    pipeline = changed.fields["pipelines"][PIPELINE]
    pipeline["version"] = "3" * 64
    route = next(stage for stage in pipeline["manifest"]["stages"] if stage["name"] == "Route")
    del route["ports"][1]
    pipeline["manifest"]["stages"] = [stage for stage in pipeline["manifest"]["stages"] if stage["kind"] != "source"]
    return changed


@pytest.mark.parametrize("left", ["a version with fewer ways", "no pipeline"])
def test_a_process_of_an_older_version_reports_by_what_that_version_said(said: list[Message], left: str) -> None:
    machine, plan, keys = at_work(said)
    machine.told.clear()
    newer = without_the_second_way(plan) if left != "no pipeline" else plan._replace(fields={"pipelines": {}, "processes": {}})
    machine.executor.on_leader(newer, 0)  # what the processes say was on its way by then
    route, same = keys["routed/Route"], keys["victim/Same"]
    one = (lengths_blob([1]), b"v")
    machine.say(route, Message("done", {"work": machine.works[route][0][0], "count": 1, "elapsed_us": 9, "ports": [{"port": 1}]}, one))
    machine.say(keys["routed/Emit"], Message("put", {"seq": 2, "ports": [{"port": 0}], "source": {"count": 2, "hash": "h"}}, one))
    machine.say(same, Message("failed", {"work": machine.works[same][0][0], "elapsed_us": 9, "error": {"text": "t"}}))
    machine.carry()
    (done,) = (message for message in machine.told if message.kind == "done")
    (put_by_it,) = (message for message in machine.told if message.kind == "put")
    (failed,) = (message for message in machine.told if message.kind == "fail")
    assert done.fields["ports"] == [{"queues": [f"{PIPELINE}/Again"]}]
    assert put_by_it.fields["ports"] == [{"queues": [f"{PIPELINE}/Route"]}]
    assert failed.fields["error"]["version"] == "0" * 64


def test_a_source_that_the_plan_does_not_have_is_not_started(said: list[Message]) -> None:
    machine, plan, _ = at_work(said)
    assigned = next(message for message in said if message.kind == "assigned")
    for stage in ("Route", "nowhere"):
        machine.hear(assigned._replace(fields={**assigned.fields, "stage": stage}))
    assert [process.spec.stage for process in machine.executor.processes.values() if process.spec.role == "source"] == ["Emit"]


# ---- a neighbour


class FakePeers:
    """Connections over which everything is put into bytes, and goes nowhere."""

    def __init__(self) -> None:
        self.peers: dict[str, Any] = {}
        self.targets: dict[str, Address] = {}

    @property
    def wanted(self) -> set[str]:
        return set(self.targets)

    def want(self, name: str, address: Address, node_id: str | None) -> None:
        self.targets[name] = address

    def unwant(self, name: str) -> None:
        self.targets.pop(name, None)

    def send(self, node_id: str, message: Message) -> bool:
        encode_bytes(message)
        return node_id in self.peers

    def has_room(self, node_id: str) -> bool:
        return True


class FakePeer(dict[str, Any]):
    address = "127.0.0.1:9"

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self.identity = identity


class Neighbour:
    """A voter of two, the other of which is of another mind; its loop in small."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.peers = FakePeers()
        self.neighbours = Neighbours("n", "127.0.0.1:8", cast(Peers, self.peers), self.to_leader, lambda message: None)
        configuration = Configuration(("n", PEER))
        self.node = Node("n", Random(0), HardState(1, None), Log(), State(), configuration, 0, 0)
        self.neighbours.node, self.neighbours.cluster_id = self.node, "c"
        self.gate = Gate(b"k" * 32, "default", "n", "boot", b"s" * 32, 1)
        self.connect()

    def to_leader(self, node_id: str, message: Message) -> None:
        if message.kind == "give_way" and self.node.is_serving:
            self.node.accept(message.fields["cluster"], lambda outcome: None)
        elif message.kind == "accepted" and self.node.is_serving:
            self.node.dissolve(message.fields["into"])

    def connect(self) -> None:
        identity = Identity(PEER, "boot-m", "node", "host/m", "default", "c", 1, "0", "3")
        self.peers.peers[PEER] = FakePeer(identity)
        self.neighbours.on_connected(identity, self.now_ms)

    def hear(self, message: Message) -> None:
        try:
            self.neighbours.on_message(PEER, message, self.now_ms)
        except RemoteProtocolError:
            self.neighbours.on_gone(PEER, self.now_ms)
            self.connect()

    def pass_time(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self.node.tick(self.now_ms)
        while self.node.has_ready():
            ready = self.node.ready()
            if ready.raft.snapshot is not None:
                assert self.neighbours.take_snapshot(ready.raft.snapshot.snapshot_id)
            self.node.advance(ready)
        self.node.take_outbox()
        self.neighbours.carry(self.node.take_peer_outbox())
        self.neighbours.tick(self.now_ms)
        self.neighbours.serving_leader()
        leader, address = self.neighbours.leader()
        me = Beacon(name="n", state=Stage.MEMBER, cluster_id="c", generation=0, term=self.node.raft.term, leader_id=leader,
                    leader_address=parse_address(address) if address else None, last_index=0, last_term=0, commit_index=0, role="voter",
                    voters=2, members=2, has_work=False, expect=1, tcp_host=None, tcp_port=1, udp_port=1, interval_ms=1, package="0", python="3")
        self.gate.seal(me)
        for address in self.neighbours.addresses(20):
            assert len(str(parse_address(address))) <= protocol.LABEL_CHARS_MAX


def try_a_neighbour(seed: int) -> None:
    random = Random(seed)
    neighbour = Neighbour()
    messages = [*hostile.between_nodes(PEER, "n"), *hostile.from_executor()]
    for _ in range(MESSAGES):
        message = attack(random, messages)
        if message.kind in ("raft_append", "raft_snapshot") and message.fields.get("term") == neighbour.node.raft.term:
            continue  # that two lead in one term, or the committed is cut off, stops a node: it is no mistake of a message's form
        try:
            neighbour.hear(message)
            neighbour.pass_time(random.choice((20, 300)))
        except Exception as error:
            raise AssertionError(hostile.text_of(message)) from error


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_whatever_one_node_says_to_another_is_taken_in_or_ends_their_connection(seed: int) -> None:
    try_a_neighbour(seed)


def test_a_snapshot_that_is_to_be_installed_is_not_replaced_by_another_that_arrives_meanwhile() -> None:
    neighbour = Neighbour()
    first = [message for message in hostile.between_nodes(PEER, "n") if message.kind in ("snapshot_slice", "raft_snapshot")]
    for message in first:
        neighbour.hear(message)
    data = b"another"
    neighbour.hear(Message("snapshot_slice", {"snapshot_id": sha256(data).hexdigest(), "offset": 0, "total": len(data)}, (data,)))
    ready = neighbour.node.ready()
    assert ready.raft.snapshot is not None
    assert neighbour.neighbours.take_snapshot(ready.raft.snapshot.snapshot_id) == b"bytes of a snapshot"


def test_a_raft_message_in_another_nodes_name_and_words_between_clusters_end_the_connection() -> None:
    neighbour = Neighbour()
    for message in hostile.between_nodes("x", "n"):
        if message.kind.startswith("raft"):
            with pytest.raises(RemoteProtocolError, match="in the name of 'x'"):
                neighbour.neighbours.on_message(PEER, message, 0)
    neighbour.neighbours.on_message(PEER, Message("hello", {"cluster_id": "d", "leader": None, "leader_address": None, "term": 1}), 0)
    for message in [*hostile.between_nodes(PEER, "n"), *hostile.from_executor()]:
        if message.kind not in ("hello", "give_way", "accepted"):
            with pytest.raises(RemoteProtocolError, match="of another cluster"):
                neighbour.neighbours.on_message(PEER, message, 0)
    neighbour.neighbours.on_message(PEER, Message("give_way", {"cluster": "d"}), 0)
