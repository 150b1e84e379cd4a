"""What a client does when an answer does not come: each reply of each call is lost in each way, and what it says and leaves is as if none was.

The node is the core itself behind a connection that a test breaks at a chosen message; there is no socket, and the time is a number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from p2pcluster import Pipeline, Queue, stage
from p2pcluster import client as client_module
from p2pcluster.client import Cluster, Link
from p2pcluster.config import Address, Options
from p2pcluster.core.codec import Message, decode, encode_bytes
from p2pcluster.core.handshake import Handshake, Identity
from p2pcluster.core.log import Log
from p2pcluster.core.grants import Grant, grant_message
from p2pcluster.core.node import Node
from p2pcluster.core.sessions import Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.errors import AuthenticationFailed, ClusterError, ClusterNotFound, ItemsParked, NoLeader, QueueFull, Unavailable, WrongUsage
from p2pcluster.stream import ConnectionClosed

PIPELINE = Pipeline("p", Queue("in", maxsize=20) >> stage(lambda x: x, name="Same", retries=0) >> Queue("out"))
TIMEOUT_S = 10.0
WAYS = ("request lost", "reply lost", "silence", "deposed", "another leads")


class World:
    """One cluster, its clock, and what is to go wrong: `fault` is the number of a message of the client, and the way."""

    def __init__(self, fault: tuple[int, str] | None = None) -> None:
        self.now_s = 1000.0
        self.fault = fault
        self.sent = 0
        self.dials: list[Address] = []
        self.away: set[Address] = set()
        self.heard: list[Address] = []  # by whoever listens to the network
        self.cluster_ids = {Address("a", 1): "one", Address("b", 1): "one"}
        self.leads = Address("a", 1)
        self.node = Node("n", Random(0), HardState(), Log(), State(), Configuration(("n",)), 0, 0)
        self.connections: list[FakeConnection] = []
        while not self.node.is_serving:
            self.sleep(0.01)
        self.asked = deque[Message]()
        self._deploy()

    # ---- the clock, in the place of `time`

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.node.tick(round(self.now_s * 1000))
        self.pump()

    # ---- the node

    def pump(self) -> None:
        moved = True
        while moved:
            moved = False
            for session, item in self.node.take_outbox():
                moved = True
                message = grant_message(item, [chunk.slice(lo, hi) for chunk, lo, hi in item.pieces]) if isinstance(item, Grant) else item
                for connection in self.connections:
                    if connection.session == session:
                        connection.inbox.append(encode_bytes(message))
                if session == "test":
                    self.asked.append(message)
            if self.node.has_ready():
                self.node.advance(self.node.ready())
                moved = True

    def ask(self, message: Message) -> Message:
        """The node's answer to somebody else."""
        if "test" not in self.node.sessions:
            self.node.open_session(Session("test", "client", "test", "boot", "test"))
        self.node.step("test", message._replace(fields={**message.fields, "req": 1}), round(self.now_s * 1000))
        self.pump()
        return self.asked.pop()

    def _deploy(self) -> None:
        self.ask(Message("bundle_part", {"version": "v", "part": 0, "parts": 1}, (b"",)))
        self.ask(Message("deploy", {"pipeline": "p", "version": "v", "origin": {"node": "n"}, "manifest": PIPELINE.manifest(), "files": {},
                                    "zip_sha256": "", "project": {}}))
        self.ask(Message("start_run", {"pipeline": "p", "params": {}}))

    def park(self, count: int) -> None:
        """Items that fail at once."""
        with self.link() as cluster:
            cluster.put_many("in", list(range(count)))
        grant = self.ask(Message("take", {"queue": "p/in", "count": count}))
        for lo, hi, _, _ in grant.fields["pieces"]:
            for item_id in range(lo, hi):
                self.ask(Message("fail", {"queue": "p/in", "id": item_id, "fence": grant.fields["fence"], "error": {"text": "no"}, "delay_ms": 0}))

    def end_run(self) -> None:
        self.ask(Message("close", {"pipeline": "p", "name": "in"}))
        self.ask(Message("discard", {"queue": "p/in", "ids": None}))

    # ---- the client

    def dial(self, host: str, port: int, handshake: Handshake, timeout_s: float) -> FakeConnection:
        address = Address(host, port)
        self.dials.append(address)
        self.sleep(0.001)
        if address in self.away:
            raise ClusterNotFound(f"no node answers at {host}:{port}")
        self.connections.append(FakeConnection(self, address, handshake.me))
        return self.connections[-1]

    def link(self) -> Cluster:
        return Cluster(Link(Options(seed=[Address("a", 1)]), TIMEOUT_S, b"secret"), "p")

    def of_one_cluster(self) -> Cluster:
        """As `connect` makes it: it stays with its cluster."""
        cluster = self.link()
        cluster.link._only_seeds = False
        cluster.link._cluster_id = "one"
        return cluster


class FakeConnection:
    """What `dial` gives: to the node, or to nobody once the fault has come."""

    def __init__(self, world: World, address: Address, me: Identity) -> None:
        self.world = world
        self.address = address
        self.session = f"client-{len(world.connections)}"
        self.inbox: deque[bytes] = deque()
        self.is_closed = self.is_silent = self.leads_no_more = False
        self.me = me
        facts = {"address": f"{address.host}:{address.port}", "members": ["a:1", "b:1"]}
        self.peer = Identity("n", "b", "node", "n", "default", world.cluster_ids[address], 1, "1", "3", facts)

    def send(self, parts: Any) -> None:
        if self.is_closed:
            raise ConnectionClosed("reset")
        message = decode(b"".join(parts))
        world = self.world
        world.sent += 1
        way = world.fault[1] if world.fault is not None and world.fault[0] == world.sent else ""
        if way == "request lost":
            self.close()  # a frame that was on its way when the node died
        if way == "another leads":
            world.leads = Address("b", 1)
        if self.is_silent or self.is_closed:
            return
        if world.leads != self.address or self.leads_no_more:
            fields = {"req": message.fields["req"], "kind": message.kind, "result": "error", "code": "not_leader", "text": "another node leads",
                      "leader": f"{world.leads.host}:{world.leads.port}"}
            self.inbox.append(encode_bytes(Message("reply", fields)))
            return
        if self.session not in world.node.sessions:
            world.node.open_session(Session(self.session, "client", self.me.node_id, self.me.boot_id, self.me.name))
        world.node.step(self.session, message, round(world.now_s * 1000))
        world.pump()
        if way:
            self.inbox.clear()
        if way == "reply lost":
            self.close()
        self.is_silent = self.is_silent or way == "silence"
        self.leads_no_more = self.leads_no_more or way == "deposed"

    def receive(self, timeout_s: float | None) -> bytes:
        by_s = None if timeout_s is None else self.world.now_s + timeout_s
        while not self.inbox:
            if self.is_closed:
                raise ConnectionClosed("reset")
            assert by_s is not None, "nobody waits for ever, for the other side may be gone"
            if self.world.now_s >= by_s:
                raise Unavailable("no answer")
            self.world.sleep(0.05)
        return self.inbox.popleft()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.world.node.close_session(self.session)
            self.world.pump()


class FakeFinder:
    """Ears on a network on which `world.heard` is to be heard."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> FakeFinder:
        return self

    def __exit__(self, *_: object) -> None: ...

    def look(self, cluster_id: str | None, timeout_s: float) -> list[Address]:
        if not self.world.heard:
            self.world.sleep(timeout_s)
        return self.world.heard


@pytest.fixture(autouse=True)
def fake_time_and_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[World], World]]:
    def enter(world: World) -> World:
        monkeypatch.setattr(client_module, "time", world)
        monkeypatch.setattr(client_module, "dial", world.dial)
        monkeypatch.setattr(client_module, "Finder", lambda *_: FakeFinder(world))
        return world

    yield enter


Enter = Callable[[World], World]


@pytest.fixture
def enter(fake_time_and_network: Enter) -> Enter:
    return fake_time_and_network


# ---- each reply lost at each point


def put_some(world: World, cluster: Cluster) -> Any:
    cluster.put("in", "first", key="k")
    again = cluster.put_many("in", ["first again", "second"], keys=["k", "l"])
    return again, cluster.put_many("in", range(3))


def start_a_run(world: World, cluster: Cluster) -> Any:
    return cluster.start({"a": 1})


def take_all(world: World, cluster: Cluster) -> Any:
    found = []
    with cluster.take("in", wait_s=20) as items:
        for value in items:
            if value not in found:  # at least once
                found.append(value)
            if len(found) == 6:
                break
    return found


def take_and_fail(world: World, cluster: Cluster) -> Any:
    with pytest.raises(ZeroDivisionError), cluster.take("in", wait_s=20) as items:
        next(items)
        raise ZeroDivisionError
    world.sleep(0.1)
    return None


def retry(world: World, cluster: Cluster) -> Any:
    return cluster.retry("Same")


def discard(world: World, cluster: Cluster) -> Any:
    return cluster.discard("in")


def close(world: World, cluster: Cluster) -> Any:
    cluster.close("in")


def undeploy(world: World, cluster: Cluster) -> Any:
    return cluster.undeploy(discard=True)


def control(world: World, cluster: Cluster) -> Any:
    cluster.pause("Same")
    cluster.scale("Same", 3)
    return cluster.resume("Same")


def read(world: World, cluster: Cluster) -> Any:
    return list(cluster.results("in")), [item["id"] for item in cluster.parked()], cluster.status()["pipelines"]


def wait(world: World, cluster: Cluster) -> Any:
    with pytest.raises(ItemsParked) as caught:
        cluster.wait(60)
    return str(caught.value)


def with_items(world: World) -> None:
    with world.link() as cluster:
        cluster.put_many("in", range(6))


def with_parked(world: World) -> None:
    world.park(3)


def with_the_end(world: World) -> None:
    world.park(3)
    world.ask(Message("close", {"pipeline": "p", "name": "in"}))


CALLS: list[tuple[Callable[[World], None], Callable[[World, Cluster], Any]]] = [
    (lambda world: None, put_some), (World.end_run, start_a_run), (with_items, take_all), (with_items, take_and_fail), (with_parked, retry),
    (with_parked, discard), (with_items, close), (with_items, undeploy), (with_items, control),
    (with_parked, read), (with_the_end, wait),
]


def outcome(enter: Enter, prepare: Callable[[World], None], call: Callable[[World, Cluster], Any], fault: tuple[int, str] | None) -> Any:
    """What the call returned, what it left behind, and how many messages it took."""
    world = enter(World())
    prepare(world)
    world.sent, world.fault = 0, fault
    cluster = world.of_one_cluster()
    said = call(world, cluster)
    sent = world.sent
    cluster.close_connection()
    world.sleep(5)
    world.fault = None
    state = world.node.state
    queues = {name: (queue.put, queue.done, len(queue.ready), len(queue.leases), len(queue.parked), queue.closed, queue.next_id)
              for name, queue in state.queues.items()}
    left = state.pipelines.get("p")
    return (said, queues, left and (left.run, left.params, left.paused, left.scaled)), sent


@pytest.mark.parametrize(("prepare", "call"), CALLS, ids=[call.__name__ for _, call in CALLS])
def test_a_call_comes_to_the_same_whichever_of_its_replies_is_lost(enter: Enter, prepare: Any, call: Any) -> None:
    expected, messages = outcome(enter, prepare, call, None)
    assert messages >= 2
    for number in range(1, messages + 1):
        for way in WAYS:
            found, sent = outcome(enter, prepare, call, (number, way))
            assert found == expected, f"{way} at message {number} of {messages}"
            assert sent > messages or way == "another leads" or number == messages, "the fault came"


# ---- what cannot be known


def lost_for_good(world: World, way: str) -> None:
    world.sent, world.fault = 0, (2, way)
    world.away = set(world.cluster_ids)


@pytest.mark.parametrize("way", ["request lost", "reply lost", "silence", "deposed"])
def test_what_was_sent_and_is_not_answered_in_time_is_said_to_be_indefinite(enter: Enter, way: str) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    world.ask(Message("project", {"pipeline": "p"}))
    lost_for_good(world, way)
    begun_s = world.now_s
    with pytest.raises(Unavailable, match=r"\(indefinite\): ask again") as caught:
        cluster.put("in", 1)
    assert not caught.value.definite
    assert TIMEOUT_S - 1 < world.now_s - begun_s < TIMEOUT_S + client_module.SILENT_S + 1


def test_what_could_not_be_sent_has_certainly_not_happened(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.full("in")
    for connection in world.connections:
        connection.close()
    world.away = set(world.cluster_ids)
    with pytest.raises(ClusterNotFound) as caught:
        cluster.put("in", 1)
    assert caught.value.definite


def test_a_question_that_changes_nothing_is_definite_also_without_an_answer(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    lost_for_good(world, "silence")
    world.fault = (1, "silence")
    with pytest.raises(Unavailable, match="status: no answer in time") as caught:
        cluster.status()
    assert caught.value.definite


def test_a_run_that_is_not_done_in_time_is_said_to_be_that(enter: Enter) -> None:
    world = enter(World())
    with pytest.raises(Unavailable, match="run 1 of 'p' is not known to be done after 30 s") as caught:
        world.of_one_cluster().wait(30)
    assert caught.value.definite


def test_who_waits_without_end_gives_up_when_the_cluster_is_gone_for_the_time_of_the_connection(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    lost_for_good(world, "reply lost")
    with pytest.raises(Unavailable, match="not known to be done"):
        cluster.wait()
    with pytest.raises(ClusterNotFound), cluster.take("out") as items:
        next(items)


def test_who_waits_waits_for_the_run_that_was_under_way(enter: Enter) -> None:
    """Done while the connection was away, and the next one started by somebody else."""
    world = enter(World())
    cluster = world.of_one_cluster()
    world.park(2)
    sleep = world.sleep

    def sleep_and_end(seconds: float) -> None:
        sleep(seconds)
        world.sleep = sleep  # type: ignore[method-assign]
        world.ask(Message("close", {"pipeline": "p", "name": "in"}))
        world.ask(Message("start_run", {"pipeline": "p", "params": {}}))

    world.sleep = sleep_and_end  # type: ignore[method-assign]
    world.sent, world.fault = 0, (2, "reply lost")
    with pytest.raises(ItemsParked, match="run 1 of 'p' is done with 2 parked"):
        cluster.wait(60)


def test_nobody_leads_for_the_whole_time(enter: Enter) -> None:
    world = enter(World())
    world.leads = Address("nobody", 1)
    world.away = {world.leads}
    world.cluster_ids[world.leads] = "one"
    with pytest.raises((NoLeader, ClusterNotFound)) as caught:
        world.of_one_cluster().put("in", 1)
    assert caught.value.definite


# ---- a queue that is full


def test_a_queue_is_full_by_items_or_by_bytes(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.put_many("in", range(20))
    with pytest.raises(QueueFull, match=r"stayed full for 10 s \(20 items of at most 20\)"):
        cluster.put("in", 1)
    cluster.discard("in")
    for _ in range(5):
        cluster.put("in", bytes(15 << 20))
    with pytest.raises(QueueFull, match=r"stayed full for 10 s \(75 MiB of at most 64\)") as caught:
        cluster.put("in", 1)
    assert not caught.value.definite


# ---- another cluster


def test_another_cluster_at_the_old_address_is_passed_by(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.put("in", 1)
    world.cluster_ids[Address("a", 1)] = "two"
    world.leads = Address("b", 1)
    world.sent, world.fault = 0, (1, "reply lost")
    cluster.put("in", 2)
    assert cluster.link.peer.facts["address"] == "b:1"
    assert world.node.state.queues["p/in"].put == 2


def test_where_only_another_cluster_is_left_nothing_is_done_there(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.full("in")
    for connection in world.connections:
        connection.close()
    world.cluster_ids = dict.fromkeys(world.cluster_ids, "two")
    with pytest.raises(AuthenticationFailed, match="the node there is of cluster two, and this program was connected to one") as caught:
        cluster.put("in", 1)
    assert caught.value.definite and world.node.state.queues["p/in"].put == 0


def test_a_cluster_that_has_taken_in_the_one_that_was_known_will_do(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    for connection in world.connections:
        connection.close()
    world.cluster_ids = dict.fromkeys(world.cluster_ids, "two")
    made = FakeConnection.__init__

    def make(self: FakeConnection, *args: Any) -> None:
        made(self, *args)
        self.peer.facts["accepted"] = ["one"]

    monkeypatch.setattr(FakeConnection, "__init__", make)
    cluster.put("in", 1)
    assert world.node.state.queues["p/in"].put == 1


def test_a_cluster_that_has_moved_is_found_by_asking_the_network(enter: Enter) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.put("in", 1)
    for connection in world.connections:
        connection.close()
    world.away = set(world.cluster_ids)
    world.leads = Address("new", 7)
    world.cluster_ids[world.leads] = "one"
    world.heard = [world.leads]
    cluster.put("in", 2)
    assert world.node.state.queues["p/in"].put == 2


def test_a_node_is_asked_to_leave_once(enter: Enter) -> None:
    """Asked again after a lost connection, it could be another one that hears it."""
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.full("in")
    world.sent, world.fault = 0, (1, "request lost")
    with pytest.raises(ClusterError, match="lost|reset"):
        cluster.leave()
    assert world.sent == 1


def test_params_that_are_no_json_are_refused_before_they_are_sent(enter: Enter) -> None:
    world = enter(World())
    world.end_run()
    with pytest.raises(ClusterError, match="must be plain JSON"):
        world.of_one_cluster().start({"when": {1, 2}})


MISTAKES: list[tuple[Callable[[Cluster], Any], str]] = [
    (lambda c: c.put_many("in", [1, 2], keys=["a"]), "1 keys for 2 values"),
    (lambda c: c.put("in", 1, key=5), "one text for each value"),
    (lambda c: c.take("in", limit=-1), "limit=-1 is not a number"),
    (lambda c: c.take("in", wait_s="soon"), "wait_s='soon' is not seconds"),
    (lambda c: c.wait("soon"), "timeout_s='soon' is not seconds"),
    (lambda c: c.start(params=[1]), r"params=\[1\] is not a dict"),
    (lambda c: c.retry("Same", ids=["p/in:1"]), "are not the numbers of items"),
    (lambda c: client_module.connect(timeout_s="soon"), "timeout_s='soon' is not seconds"),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES)
def test_a_wrong_argument_is_said_at_once(enter: Enter, call: Callable[[Cluster], Any], words: str) -> None:
    world = enter(World())
    cluster = world.of_one_cluster()
    cluster.full("in")
    begun_s = world.now_s
    with pytest.raises(WrongUsage, match=words):
        call(cluster)
    assert world.now_s - begun_s < 1
