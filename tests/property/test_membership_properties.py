"""Founding on a simulated network, and which members vote, whatever comes in whatever order.

On a network that keeps the promise of the founding rule (of two beacons in a row one arrives) there is one founder,
from every order of starts. On one that keeps nothing there may be more, and none of them goes on once they hear each
other. Each check is shown to fail on a bug.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.core import datagram as datagram_module
from p2pcluster.core import membership as module
from p2pcluster.core.datagram import Beacon, Gate, Heard, Outgoing, Reason, Refused, State
from p2pcluster.core.handshake import derive_key
from p2pcluster.core.membership import (
    AskForKey,
    Blocked,
    Discovery,
    Due,
    Found,
    Join,
    MakeKey,
    Serve,
    Verdict,
    Vitals,
    next_configuration,
    standbys_wanted,
    voters_wanted,
)
from p2pcluster.core.quorum import Configuration

BEACON = Beacon(
    name="n", state=State.FRESH, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None,
    last_index=0, last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1,
    tcp_host=None, tcp_port=1, udp_port=1, interval_ms=1, package="0.1", python="3.11",
)  # fmt: skip
WINDOWS_MS = (config.FOUNDING_WINDOW_MS, config.FOUNDING_WINDOW_LOOPBACK_MS)


@dataclass
class Setting:
    """A network, who is on it, and when it stops to be bad."""

    seed: int
    starts_ms: list[int]  # of each node, in any order
    window_ms: int = WINDOWS_MS[0]
    loss: float = 0.5
    keeps_promise: bool = True  # of two in a row, from one node to another, one arrives
    heals_ms: int | None = None  # nothing is lost from then on
    delay_ms_max: int = 10
    keys: list[str | None] | None = None  # of each node; by default all have the same
    hosts: list[int] | None = None  # nodes of one host share its key file
    expects: list[int] | None = None
    work: float = 0.0  # how likely a cluster that serves begins to work
    ends_ms: int = 0

    def __post_init__(self) -> None:
        self.ends_ms = self.ends_ms or max(self.starts_ms) + 12 * self.window_ms


class Node:
    """A node's shell, as thin as can be: what was decided is done at once."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.node_id = f"{random.Random(world.setting.seed * 1000 + number).randrange(16**4):04x}-{number}"
        setting = world.setting
        self.host = number if setting.hosts is None else setting.hosts[number]
        self.key = "k" if setting.keys is None else setting.keys[number]
        self.expect = 1 if setting.expects is None else setting.expects[number]
        self.counter = 0
        self.boot = 0
        self.decided: list[Any] = []
        self.has_heard_cluster = False
        self.rival_heard_ms = -(10**9)
        self.is_out = False
        self.wakes_ms = 10**9
        self.begin(world.now_ms)

    def begin(self, now_ms: int) -> None:
        self.boot += 1
        self.counter = 0
        self.has_heard_cluster = False
        me = replace(BEACON, name=self.node_id, expect=self.expect)
        self.discovery = Discovery(
            self.node_id, me, random.Random(f"{self.world.setting.seed}{self.node_id}"), now_ms,
            window_ms=self.world.setting.window_ms, has_key=self.key is not None,
        )  # fmt: skip

    @property
    def cluster_id(self) -> str | None:
        return self.discovery.me.cluster_id

    def turn(self, now_ms: int) -> None:
        due = self.discovery.due(now_ms)
        if due.decision is not None:
            self.decided.append(due.decision)
            self.do(due.decision, now_ms)
        if due.broadcast:
            self.world.broadcast(self)
        for address in due.unicast:
            self.world.send(self, address)

    def do(self, decision: Any, now_ms: int) -> None:
        match decision:
            case Found():
                assert not self.has_heard_cluster, "it founded beside a cluster that it had heard"
                self.world.note("found", self)
                self.lead(f"{random.Random(self.node_id).randrange(16**4):04x}.{self.boot}", now_ms)
            case Serve():
                quiet_ms = now_ms - self.rival_heard_ms
                assert quiet_ms >= self.world.setting.window_ms, "it serves beside another founder"
                self.world.note("serve", self)
                if self.world.chance.random() < self.world.setting.work:
                    self.discovery.update(now_ms, has_work=True)
            case MakeKey():
                self.world.note("make key", self)
                self.key = self.world.key_files.setdefault(self.host, f"made by {self.node_id}")
                self.discovery.key_made(now_ms)
            case AskForKey():
                self.key = self.world.key_files.get(self.host)
                if self.key is None:
                    self.is_out = True  # it names both commands and ends
                else:
                    self.discovery.key_found(now_ms)
            case Blocked():
                self.world.note("blocked", self)

    def lead(self, cluster_id: str, now_ms: int) -> None:
        self.discovery.founded(cluster_id, now_ms)
        self.discovery.update(now_ms, leader_id=self.node_id, term=1, role="leader", voters=1, members=1)

    def hear(self, sender: Node, counter: int, boot: int, key: str | None, beacon: Beacon, is_broadcast: bool) -> None:
        now_ms = self.world.now_ms
        if key != self.key:
            reason = Reason.NO_KEY if key is None else Reason.OTHER_KEY
            self.discovery.hear_refused(Refused(reason, sender.address, key or ""), now_ms)
            return
        heard = Heard(sender.node_id, f"{sender.node_id}.{boot}", counter, is_broadcast, sender.address, beacon)
        self.discovery.hear(heard, now_ms)
        newest = self.discovery.peers[sender.node_id]
        is_late = (newest.counter, newest.boot_id) != (counter, heard.boot_id)
        if beacon.state in (State.FOUNDER, State.MEMBER) and not is_late:
            self.has_heard_cluster = True
            if beacon.state is State.FOUNDER and beacon.cluster_id != self.cluster_id:
                self.rival_heard_ms = now_ms

    @property
    def address(self) -> Address:
        return Address("10.0.0.1", 1000 + self.number)


class World:
    """A network that loses, delays and reorders; and clusters whose members join and dissolve at once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.chance = random.Random(setting.seed)
        self.now_ms = 0
        self.nodes: list[Node] = []
        self.events: list[tuple[str, str, int]] = []
        self.key_files: dict[int, str] = {}
        for number, key in enumerate(setting.keys or []):
            if key is not None and setting.hosts is not None:
                self.key_files[setting.hosts[number]] = key
        self.lost: dict[tuple[int, int], bool] = {}
        self.heap: list[tuple[int, int, Callable[[], None]]] = []
        self.order = count()

    def run(self) -> World:
        for number, start_ms in enumerate(self.setting.starts_ms):
            self.at(start_ms, lambda number=number: self.start(number))  # type: ignore[misc]
        while self.heap and self.heap[0][0] <= self.setting.ends_ms:
            self.now_ms, _, act = heapq.heappop(self.heap)
            act()
        return self

    def at(self, time_ms: int, act: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time_ms, next(self.order), act))

    def start(self, number: int) -> None:
        node = Node(self, number)
        self.nodes.append(node)
        self.wake(node, self.now_ms)

    def tick(self, node: Node) -> None:
        if not node.is_out and self.now_ms >= node.wakes_ms:
            node.wakes_ms = 10**9
            node.turn(self.now_ms)
            self.join(node)
            self.dissolve(node)
            self.wake(node, node.discovery.next_due_ms)

    def wake(self, node: Node, time_ms: int) -> None:
        """The node's next turn, and not on the millisecond."""
        time_ms = max(self.now_ms, time_ms) + 1 + self.chance.randrange(config.TICK_MS)
        if time_ms < node.wakes_ms:
            node.wakes_ms = time_ms
            self.at(time_ms, lambda: self.tick(node))

    def note(self, what: str, node: Node) -> None:
        self.events.append((what, node.node_id, self.now_ms))

    def of(self, what: str) -> list[str]:
        return [node_id for event, node_id, _ in self.events if event == what]

    # The network

    def broadcast(self, sender: Node) -> None:
        for node in self.nodes:
            self.carry(sender, node, True)

    def send(self, sender: Node, address: Address) -> None:
        for node in self.nodes:
            if node.address == address:
                self.carry(sender, node, False)

    def carry(self, sender: Node, to: Node, is_broadcast: bool) -> None:
        sender.counter += 1
        link = (sender.number, to.number)
        is_healed = self.setting.heals_ms is not None and self.now_ms >= self.setting.heals_ms
        may_lose = not is_healed and not (self.setting.keeps_promise and self.lost.get(link))
        self.lost[link] = may_lose and self.chance.random() < self.setting.loss
        if sender is to or self.lost[link]:
            return
        said = (sender, sender.counter, sender.boot, sender.key, sender.discovery.beacon, is_broadcast)
        self.at(self.now_ms + self.chance.randrange(self.setting.delay_ms_max), lambda: self.arrive(to, *said))

    def arrive(self, to: Node, *said: Any) -> None:
        to.hear(*said)
        self.wake(to, self.now_ms)

    # Clusters, whose TCP always works

    def join(self, node: Node) -> None:
        if node.discovery.state is not State.JOINING:
            return
        leader = node.discovery.leader(self.now_ms)
        for other in self.nodes:
            if leader is not None and other.node_id == leader.node_id and other.discovery.me.leader_id == other.node_id:
                assert other.cluster_id is not None
                node.discovery.joined(other.cluster_id, self.now_ms)
                node.discovery.update(self.now_ms, leader_id=other.node_id, term=1, role="worker")
                self.count_members(other.cluster_id)

    def count_members(self, cluster_id: str | None) -> None:
        members = [node for node in self.nodes if node.cluster_id == cluster_id]
        for node in members:
            node.discovery.update(self.now_ms, members=len(members))

    def dissolve(self, node: Node) -> None:
        """The leader of a cluster that gives way asks the other one's, which agrees if it sees it so too."""
        if node.discovery.me.leader_id != node.node_id:
            return
        for rival in node.discovery.rivals(self.now_ms):
            if rival.verdict is Verdict.YIELDS and self.accepts(rival.cluster_id, node.cluster_id):
                assert not node.discovery.me.has_work, "work was thrown away"
                self.note("dissolve", node)
                for member in [other for other in self.nodes if other.cluster_id == node.cluster_id]:
                    member.begin(self.now_ms)
                    self.wake(member, self.now_ms)
                return

    def accepts(self, cluster_id: str, other_id: str | None) -> bool:
        return any(
            rival.cluster_id == other_id and rival.verdict is Verdict.STAYS
            for node in self.nodes
            if node.cluster_id == cluster_id and node.discovery.me.leader_id == node.node_id
            for rival in node.discovery.rivals(self.now_ms)
        )

    def clusters(self) -> set[str | None]:
        return {node.cluster_id for node in self.nodes if not node.is_out}


# --- One founder, where the network keeps the promise


def check_one_founder(setting: Setting) -> None:
    world = World(setting).run()
    assert len(world.of("found")) == 1, world.events
    assert world.of("serve") == world.of("found")
    assert len(world.clusters()) == 1 and None not in world.clusters()
    founded_ms, serves_ms = (time_ms for what, _, time_ms in world.events if what in ("found", "serve"))
    assert founded_ms >= min(setting.starts_ms) + setting.window_ms, "it did not listen for a window"
    assert serves_ms >= founded_ms + setting.window_ms, "it served before a second window"


def promised(seed: int, nodes: int, window_ms: int, spread: float) -> Setting:
    chance = random.Random(seed)
    starts_ms = [round(chance.random() * spread * window_ms) for _ in range(nodes)]
    return Setting(seed, starts_ms, window_ms)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    nodes=st.integers(1, 7),
    window_ms=st.sampled_from(WINDOWS_MS),
    spread=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
)
def test_one_founds_from_any_order_of_starts(seed: int, nodes: int, window_ms: int, spread: float) -> None:
    check_one_founder(promised(seed, nodes, window_ms, spread))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_nobody_founds_before_enough_nodes_are_seen(seed: int, expects: list[int]) -> None:
    check_expect(seed, expects)


def check_expect(seed: int, expects: list[int]) -> None:
    nodes = len(expects)
    chance = random.Random(seed)
    window_ms = WINDOWS_MS[0]
    # Everybody has been heard before the first window is over; the last comes much later.
    starts_ms = [chance.randrange(window_ms // 4) for _ in range(nodes - 1)] + [3 * window_ms]
    expects[-1] = 1
    world = World(Setting(seed, starts_ms, window_ms, expects=expects)).run()
    needed = max(expects)
    if needed > nodes:
        assert world.of("found") == []
        return
    ((_, _, founded_ms),) = [event for event in world.events if event[0] == "found"]
    assert founded_ms >= sorted(starts_ms)[needed - 1], "it founded before enough nodes were there"
    assert len(world.clusters()) == 1


# --- Keys


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 6))
def test_of_nodes_without_a_key_on_one_machine_one_makes_it_and_all_use_it(seed: int, nodes: int) -> None:
    chance = random.Random(seed)
    starts_ms = [chance.randrange(2000) for _ in range(nodes)]
    world = World(Setting(seed, starts_ms, WINDOWS_MS[1], keys=[None] * nodes, hosts=[0] * nodes)).run()
    assert len(world.of("make key")) == 1
    assert len(world.of("found")) == 1
    assert len(world.clusters()) == 1
    assert {node.key for node in world.nodes} == {world.key_files[0]}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 6))
def test_of_nodes_without_a_key_on_several_machines_one_makes_it_and_the_others_ask(seed: int, nodes: int) -> None:
    check_keys_of_machines(seed, nodes)


def check_keys_of_machines(seed: int, nodes: int) -> None:
    chance = random.Random(seed)
    starts_ms = [chance.randrange(2000) for _ in range(nodes)]
    world = World(Setting(seed, starts_ms, keys=[None] * nodes, hosts=list(range(nodes)))).run()
    assert len(world.of("make key")) == 1, "two keys were made"
    assert world.of("found") == world.of("make key")
    assert sum(node.is_out for node in world.nodes) == nodes - 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.booleans(), min_size=2, max_size=6))
def test_nobody_makes_a_key_where_there_is_one(seed: int, have_keys: list[bool]) -> None:
    have_keys[0] = True
    chance = random.Random(seed)
    starts_ms = [0] + [chance.randrange(2000) for _ in have_keys[1:]]
    keys = ["k" if has_key else None for has_key in have_keys]
    world = World(Setting(seed, starts_ms, keys=keys, hosts=list(range(len(keys))))).run()
    assert world.of("make key") == []
    assert len(world.of("found")) == 1
    assert [node.is_out for node in sorted(world.nodes, key=lambda node: node.number)] == [not has for has in have_keys]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 5))
def test_fresh_nodes_that_hear_their_clusters_name_under_another_key_found_nothing(seed: int, nodes: int) -> None:
    check_other_key(seed, nodes)


def check_other_key(seed: int, nodes: int) -> None:
    chance = random.Random(seed)
    starts_ms = [chance.randrange(1000) for _ in range(nodes)]
    keys: list[str | None] = [f"k{min(number, 1)}" for number in range(nodes)]
    world = World(Setting(seed, starts_ms, keys=keys)).run()
    assert world.of("found") == []
    assert sorted(world.of("blocked")) == sorted(node.node_id for node in world.nodes)


# --- Where the network keeps nothing


def unreliable(seed: int) -> Setting:
    chance = random.Random(seed)
    window_ms = chance.choice(WINDOWS_MS)
    nodes = chance.randrange(2, 7)
    starts_ms = [round(chance.random() * chance.choice([0, 1, 4]) * window_ms) for _ in range(nodes)]
    heals_ms = round(chance.random() * 8 * window_ms)
    return Setting(
        seed, starts_ms, window_ms, loss=chance.choice([0.3, 0.8, 1.0]), keeps_promise=False, heals_ms=heals_ms,
        delay_ms_max=chance.choice([2, 40]), work=chance.choice([0.0, 0.5]),
        ends_ms=max(heals_ms, *starts_ms) + 10 * window_ms + 3 * module.CALM_MS_MAX,
    )  # fmt: skip


def check_no_two_once_they_hear(setting: Setting) -> World:
    world = World(setting).run()
    working = {node.cluster_id for node in world.nodes if node.discovery.me.has_work}
    assert None not in world.clusters(), "a node found no cluster"
    if len(working) <= 1:
        assert len(world.clusters()) == 1, f"several clusters though {len(working)} hold work"
        assert working <= world.clusters()
        assert not any(alarm for node in world.nodes for alarm in node.discovery.alarms(world.now_ms))
        return world
    assert world.clusters() == working, "an empty cluster stayed beside one that holds work"
    for node in world.nodes:
        if node.discovery.me.leader_id == node.node_id:
            assert len(node.discovery.alarms(world.now_ms)) == len(working) - 1, "two clusters and no alarm"
    return world


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_several_founders_become_one_when_they_hear_each_other(seed: int) -> None:
    check_no_two_once_they_hear(unreliable(seed))


def test_the_unreliable_networks_have_several_founders_often_enough() -> None:
    worlds = [check_no_two_once_they_hear(unreliable(seed)) for seed in range(40)]
    assert sum(len(world.of("found")) > 1 for world in worlds) >= 8
    assert sum(bool(world.of("dissolve")) for world in worlds) >= 8
    assert any(len(world.clusters()) > 1 for world in worlds)


# --- With the datagrams' own proof in between


class Proven:
    """A node with a gate, on a network that loses some of everything."""

    def __init__(self, number: int, now_ms: int) -> None:
        self.node_id = f"n{number}"
        self.address = Address("10.0.0.1", 2000 + number)
        secret = bytes([number]) * 32
        self.gate = Gate(derive_key(b"k"), "default", self.node_id, f"boot{number}", secret, 1)
        window_ms = WINDOWS_MS[0]
        me = replace(BEACON, tcp_port=2000 + number, udp_port=2000 + number)
        self.discovery = Discovery(self.node_id, me, random.Random(number), now_ms, window_ms=window_ms, has_key=True)
        self.founded = False

    def turn(self, now_ms: int) -> list[Outgoing]:
        due = self.discovery.due(now_ms)
        outgoing = self.gate.repeat_questions(self.discovery.beacon, now_ms)
        if due.broadcast:
            outgoing.append((self.gate.seal(self.discovery.beacon, broadcast=True), None))
        outgoing += [(self.gate.seal(self.discovery.beacon), address) for address in due.unicast]
        if isinstance(due.decision, Found):
            self.founded = True
            self.discovery.founded(f"c-{self.node_id}", now_ms)
        return outgoing

    def hear(self, data: bytes, address: Address, now_ms: int) -> list[Outgoing]:
        result = self.gate.open(data, address, self.discovery.beacon, now_ms)
        if isinstance(result, Heard):
            self.discovery.hear(result, now_ms)
        else:
            self.discovery.hear_refused(result, now_ms)
        return list(result.answers)


def founders_with_gates(seed: int, nodes: int, loss: float) -> int:
    chance = random.Random(seed)
    programs = [Proven(number, 0) for number in chance.sample(range(1, 100), nodes)]
    for now_ms in range(0, 3 * WINDOWS_MS[0], config.TICK_MS):
        waiting = [(program, outgoing) for program in programs for outgoing in program.turn(now_ms)]
        while waiting:
            sender, (data, to) = waiting.pop(0)
            for program in programs:
                if to in (None, program.address) and chance.random() >= loss:
                    waiting += [(program, outgoing) for outgoing in program.hear(data, sender.address, now_ms)]
    return sum(program.founded for program in programs)


def test_with_gates_and_no_loss_one_founds() -> None:
    assert [founders_with_gates(seed, nodes, 0.0) for seed in range(3) for nodes in (1, 2, 5)] == [1] * 9


def test_with_gates_a_loss_of_thirty_in_a_hundred_seldom_makes_two_founders() -> None:
    counts = [founders_with_gates(seed, 3, 0.3) for seed in range(40)]
    assert min(counts) == 1
    assert sum(founders > 1 for founders in counts) <= 1


def test_without_repeated_questions_a_loss_makes_more_founders(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail."""
    monkeypatch.setattr(Gate, "repeat_questions", lambda gate, me, now_ms: [])
    monkeypatch.setattr(datagram_module, "RETRY_MS", datagram_module.QUESTION_MS)
    assert sum(founders_with_gates(seed, 3, 0.3) > 1 for seed in range(40)) > 1


# --- The checks of founding can fail


def fails(check: Callable[[], object]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def some_fail(checks: list[Callable[[], object]]) -> bool:
    return any(fails(check) for check in checks)


SPREADS = (0.0, 0.2, 1.0, 3.0)
PROMISED = [promised(seed, 2 + seed % 5, WINDOWS_MS[seed % 2], SPREADS[seed % 4]) for seed in range(40)]
ONE_FOUNDER: list[Callable[[], object]] = [
    lambda setting=setting: check_one_founder(setting) for setting in PROMISED  # type: ignore[misc]
]
HEALING: list[Callable[[], object]] = [
    lambda seed=seed: check_no_two_once_they_hear(unreliable(seed)) for seed in range(40)  # type: ignore[misc]
]
EXPECT: list[Callable[[], object]] = [
    lambda seed=seed: check_expect(seed, [1, 1 + seed % 5, 2, 1]) for seed in range(20)  # type: ignore[misc]
]
KEYS: list[Callable[[], object]] = [
    lambda seed=seed: check_keys_of_machines(seed, 2 + seed % 4) for seed in range(20)  # type: ignore[misc]
]
OTHER_KEYS: list[Callable[[], object]] = [
    lambda seed=seed: check_other_key(seed, 2 + seed % 3) for seed in range(20)  # type: ignore[misc]
]


def deaf_to_clusters(discovery: Discovery, beacon: Beacon, now_ms: int) -> None:
    pass


def impatient(discovery: Discovery, now_ms: int) -> None:
    discovery._listens_until_ms = now_ms + discovery._beat_ms
    discovery._asks_left = 0
    discovery._hurries_until_ms = now_ms + module.HURRIED_WINDOWS * discovery._window_ms


def eager_to_serve(discovery: Discovery, now_ms: int) -> Any:
    if discovery.state is State.FOUNDER:
        discovery._serve_ms = now_ms
    return DECIDE(discovery, now_ms)


DECIDE = Discovery._decide
HEAR_OF_CLUSTER = Discovery._hear_of_cluster


def deaf_as_founder(discovery: Discovery, beacon: Beacon, now_ms: int) -> None:
    if discovery.state is not State.FOUNDER:
        HEAR_OF_CLUSTER(discovery, beacon, now_ms)


def by_members_only(ours: Beacon, theirs: Beacon) -> Verdict:
    stays = (-ours.members, ours.cluster_id or "") < (-theirs.members, theirs.cluster_id or "")
    return Verdict.STAYS if stays else Verdict.YIELDS


BUGS: dict[str, tuple[Any, str, Any, list[Callable[[], object]]]] = {
    "everybody is the lowest": (Discovery, "_lowest", lambda discovery, now_ms: discovery.node_id, ONE_FOUNDER),
    "a cluster that is heard does not matter": (Discovery, "_hear_of_cluster", deaf_to_clusters, ONE_FOUNDER),
    "one beacon must be heard, not one of two": (
        module, "_two_beacons_ms", lambda beacon: beacon.interval_ms + 40, ONE_FOUNDER
    ),
    "the window is one beat": (Discovery, "_listen", impatient, ONE_FOUNDER),
    "a newcomer is not answered": (Discovery, "_wants_answer", lambda discovery, beacon, is_new: False, ONE_FOUNDER),
    "no second window": (Discovery, "_decide", eager_to_serve, ONE_FOUNDER),
    "serves beside another founder": (Discovery, "_hear_of_cluster", deaf_as_founder, HEALING),
    "no rival is seen": (Discovery, "rivals", lambda discovery, now_ms: [], HEALING),
    "each cluster thinks that it stays": (module, "_verdict", lambda ours, theirs: Verdict.STAYS, HEALING),
    "each cluster thinks that it goes": (module, "_verdict", lambda ours, theirs: Verdict.YIELDS, HEALING),
    "work does not matter": (module, "_verdict", by_members_only, HEALING),
    "nobody is waited for": (Discovery, "_missing", lambda discovery, now_ms: 0, EXPECT),
    "only the own N counts": (Discovery, "_expected", lambda discovery: discovery.me.expect, EXPECT),
    "everybody makes a key": (Discovery, "_lowest", lambda discovery, now_ms: discovery.node_id, KEYS),
    "another key does not matter": (Discovery, "hear_refused", lambda discovery, refused, now_ms: None, OTHER_KEYS),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_each_check_of_founding_fails_on_a_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, name, wrong, checks = BUGS[bug]
    monkeypatch.setattr(target, name, wrong)
    assert some_fail(checks), f"nobody notices: {bug}"


@pytest.mark.parametrize("checks", [ONE_FOUNDER, HEALING, EXPECT, KEYS, OTHER_KEYS], ids=range(5))
def test_the_checks_that_find_the_bugs_pass_without_them(checks: list[Callable[[], object]]) -> None:
    assert not some_fail(checks)


# --- Voters, standbys, workers

CHANGES = ("join", "leave", "die", "live", "catch_up", "fall_behind", "wait", "step", "step", "wait_long")
Change = tuple[str, int]
changes = st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 1000)), max_size=80)
Next = Callable[[Configuration, Any, Any, str, int], Configuration | None]


class Roster:
    """Members that come, die and leave, and a leader that takes each step as soon as it may."""

    def __init__(self, following: Next = next_configuration) -> None:
        self.following = following
        self.now_ms = 0
        # Ids say nothing about who came first.
        self.names = (f"{number * 37 % 101:03d}" for number in count(1))
        self.leader_id = "999"  # the first to go, if it were not the leader
        self.configuration = Configuration(voters=(self.leader_id,))
        self.members = {self.leader_id}
        self.vitals = {self.leader_id: Vitals(True, 0, 0)}

    def run(self, script: list[Change]) -> Roster:
        for change, number in script:
            getattr(self, change)(number)
        return self

    def one(self, number: int, among: set[str]) -> str | None:
        names = sorted(among)
        return names[number % len(names)] if names else None

    def join(self, number: int) -> None:
        if len(self.members) < 9:
            name = next(self.names)
            self.members.add(name)
            self.vitals[name] = Vitals(True, self.now_ms)

    def leave(self, number: int) -> None:
        name = self.one(number, self.members - {self.leader_id})
        if name is not None:
            self.members.discard(name)

    def die(self, number: int) -> None:
        name = self.one(number, {m for m in self.members - {self.leader_id} if self.vitals[m].is_alive})
        if name is not None:
            self.vitals[name] = Vitals(False, self.now_ms)

    def live(self, number: int) -> None:
        name = self.one(number, {m for m in self.members if not self.vitals[m].is_alive})
        if name is not None:
            self.vitals[name] = Vitals(True, self.now_ms)

    def catch_up(self, number: int) -> None:
        behind = {m for m in self.configuration.members & self.members if self.vitals[m].caught_up_since_ms is None}
        name = self.one(number, {m for m in behind if self.vitals[m].is_alive})
        if name is not None:
            self.vitals[name] = replace(self.vitals[name], caught_up_since_ms=self.now_ms)

    def fall_behind(self, number: int) -> None:
        name = self.one(number, self.members - {self.leader_id})
        if name is not None:
            self.vitals[name] = replace(self.vitals[name], caught_up_since_ms=None)

    def wait(self, number: int) -> None:
        self.now_ms += number * 5

    def wait_long(self, number: int) -> None:
        self.now_ms += module.DEAD_STANDBY_MS

    def ask(self) -> Configuration | None:
        members = list(self.members)
        random.Random(self.now_ms).shuffle(members)
        result = self.following(self.configuration, members, self.vitals, self.leader_id, self.now_ms)
        again = self.following(self.configuration, sorted(members), dict(self.vitals), self.leader_id, self.now_ms)
        assert result == again, "equal input gave another result"
        return result

    def step(self, number: int) -> None:
        before, after = self.configuration, self.ask()
        if after is None:
            return
        self.check_step(before, after)
        self.configuration = after
        for member in self.members - after.members:
            self.vitals[member] = replace(self.vitals[member], caught_up_since_ms=None)
        assert self.ask() is None, "a step that was taken wants another one at once"

    def check_step(self, before: Configuration, after: Configuration) -> None:
        gone, come = set(before.voters) - set(after.voters), set(after.voters) - set(before.voters)
        left = set(before.voters) - self.members
        assert not after.is_joint and after.voters
        assert len(after.voters) % 2 == 1, "an even number of voters"
        assert len(after.voters) <= max(voters_wanted(len(self.members)), len(before.voters))
        assert self.leader_id in after.voters, "the leader lost its vote"
        assert set(after.learners) <= self.members, "somebody who left is a standby"
        for voter in come:
            assert voter in before.learners, "a vote for who had no copy"
            assert self.vitals[voter].is_ready(self.now_ms), "a vote for who was not caught up and stable"
        if not left:
            assert len(after.voters) >= len(before.voters), "fewer voters though nobody left"
            for voter in gone:
                assert self.vitals[voter].is_dead_for(module.DEAD_VOTER_MS, self.now_ms), "a living voter was exchanged"
            assert len(gone) <= len(come), "a dead voter was removed and not exchanged"

    def settle(self) -> None:
        """Everybody lives and keeps up: step until nothing is left to do."""
        for _ in range(8):
            self.now_ms += module.DEAD_STANDBY_MS
            for member in self.members:
                caught_up = self.now_ms if member in self.configuration.members else None
                since_ms = self.vitals[member].since_ms if self.vitals[member].is_alive else self.now_ms
                self.vitals[member] = Vitals(True, since_ms, caught_up)
            self.now_ms += module.DEAD_STANDBY_MS
            self.step(0)
        assert self.ask() is None
        assert len(self.configuration.voters) == voters_wanted(len(self.members)), "not the voters that are wanted"
        assert len(self.configuration.learners) == standbys_wanted(len(self.members)), "not the standbys wanted"
        assert self.configuration.members <= self.members, "somebody who left is in the configuration"


@settings(max_examples=300, deadline=None)
@given(changes)
def test_every_step_of_the_configuration_is_sound_and_it_settles(script: list[Change]) -> None:
    Roster().run(script).settle()


@settings(max_examples=200, deadline=None)
@given(changes, st.integers(0, 1000))
def test_one_death_changes_one_vote_at_most(script: list[Change], number: int) -> None:
    roster = Roster().run(script)
    roster.settle()
    before = roster.configuration
    roster.die(number)
    roster.now_ms += module.DEAD_VOTER_MS
    after = roster.ask() or before
    assert len(set(before.voters) ^ set(after.voters)) <= 2
    assert len(set(before.learners) ^ set(after.learners)) <= 2


@settings(max_examples=200, deadline=None)
@given(changes, st.integers(0, 1000))
def test_a_short_absence_changes_nothing(script: list[Change], number: int) -> None:
    roster = Roster().run(script)
    roster.settle()
    roster.die(number)
    roster.now_ms += module.DEAD_VOTER_MS - 1
    assert roster.ask() is None


def random_changes(seed: int) -> list[Change]:
    chance = random.Random(seed)
    weights = (6, 1, 2, 1, 6, 1, 3, 5, 5, 1)
    return [(chance.choices(CHANGES, weights)[0], chance.randrange(1000)) for _ in range(60)]


def check_roster(seed: int, following: Next = next_configuration) -> None:
    Roster(following).run(random_changes(seed)).settle()


def by_living(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    living = [member for member in members if vitals[member].is_alive]
    return next_configuration(configuration, living, vitals, leader, now_ms)


def removes_the_dead(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    voters = tuple(voter for voter in configuration.voters if voter in members and vitals[voter].is_alive)
    if voters and voters != configuration.voters:
        return Configuration(voters=voters)
    return next_configuration(configuration, members, vitals, leader, now_ms)


def promotes_at_once(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    ready = {member: replace(vital, caught_up_since_ms=-(10**6)) for member, vital in vitals.items()}
    return next_configuration(configuration, members, ready, leader, now_ms)


def forgets_the_standby(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    result = next_configuration(configuration, members, vitals, leader, now_ms)
    return result and replace(result, learners=())


def one_at_a_time(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    result = next_configuration(configuration, members, vitals, leader, now_ms)
    if result is None or len(result.voters) <= len(configuration.voters) + 1:
        return result
    return replace(result, voters=result.voters[: len(configuration.voters) + 1], learners=result.learners)


def depends_on_order(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    result = next_configuration(configuration, members, vitals, leader, now_ms)
    return result and replace(result, learners=tuple(m for m in members if m in result.learners))


def drops_the_leader(configuration: Configuration, members: Any, vitals: Any, leader: str, now_ms: int) -> Any:
    return next_configuration(configuration, members, vitals, min(members), now_ms)


ROSTER_BUGS: dict[str, Next] = {
    "counts the living": by_living,
    "removes the dead": removes_the_dead,
    "promotes at once": promotes_at_once,
    "forgets the standby": forgets_the_standby,
    "grows by one": one_at_a_time,
    "depends on the order of its arguments": depends_on_order,
    "takes another for the leader": drops_the_leader,
}


@pytest.mark.parametrize("bug", ROSTER_BUGS)
def test_each_check_of_the_configuration_fails_on_a_bug(bug: str) -> None:
    following = ROSTER_BUGS[bug]
    assert any(fails(lambda seed=seed: check_roster(seed, following)) for seed in range(200))  # type: ignore[misc]


def test_the_changes_that_find_the_bugs_pass_without_them() -> None:
    for seed in range(200):
        check_roster(seed)


def test_due_of_a_settled_member_is_quiet() -> None:
    world = World(promised(1, 3, WINDOWS_MS[0], 0.2)).run()
    member = world.nodes[0].discovery
    assert member.due(world.now_ms) in (Due(), Due(broadcast=True))
    assert Join(world.nodes[0].cluster_id or "") in [d for node in world.nodes for d in node.decided]
