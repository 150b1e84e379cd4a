"""What one node makes of the beacons that it hears, and which configuration a leader strives for."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.core import membership as module
from p2pcluster.core.datagram import Beacon, Heard, Reason, Refused, State
from p2pcluster.core.membership import (
    AskForKey,
    Blocked,
    Discovery,
    Door,
    Due,
    Found,
    Join,
    Leader,
    MakeKey,
    Serve,
    Verdict,
    Vitals,
    Watch,
    next_configuration,
    role_of,
    standbys_wanted,
    voters_wanted,
)
from p2pcluster.core.quorum import Configuration

WINDOW_MS = 600
BEAT_MS = WINDOW_MS // config.BEACONS_PER_FOUNDING_WINDOW


def beacon(**changes: Any) -> Beacon:
    return dataclasses.replace(
        Beacon(
            name="host", state=State.FRESH, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None,
            last_index=0, last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1,
            tcp_host=None, tcp_port=47400, udp_port=50001, interval_ms=BEAT_MS, package="0.1.0", python="3.11.7",
        ),
        **changes,
    )


def member(cluster_id: str = "c1", **changes: Any) -> Beacon:
    known = {"state": State.MEMBER, "cluster_id": cluster_id, "interval_ms": module.CALM_MS_MAX, "members": 1}
    return beacon(**(known | changes))


class Node:
    """A discovery, its clock, and the other nodes' counters."""

    def __init__(self, node_id: str = "m", me: Beacon | None = None, has_key: bool = True, **options: Any) -> None:
        self.now_ms = 0
        self.counter = 0
        self.discovery = Discovery(
            node_id, me or beacon(), random.Random(1), 0, window_ms=WINDOW_MS, has_key=has_key, **options
        )

    def hear(self, node_id: str, what: Beacon, boot: str = "", is_broadcast: bool = True, counter: int = 0) -> None:
        self.counter += 1
        address = address_of(node_id)
        boot_id = boot or f"boot-{node_id}"
        heard = Heard(node_id, boot_id, counter or self.counter, is_broadcast, address, what)
        self.discovery.hear(heard, self.now_ms)

    def refuse(self, reason: Reason, host: str = "10.6.6.6", key_id: str = "") -> None:
        self.discovery.hear_refused(Refused(reason, Address(host, 666), key_id), self.now_ms)

    def state(self) -> State:
        return self.discovery.state

    def due(self) -> Due:
        return self.discovery.due(self.now_ms)

    def until(self, end_ms: int, hearing: dict[str, Beacon] | None = None) -> list[tuple[int, Any]]:
        """Turns until then, with the beacons of others coming each beat; the decisions and when they came."""
        decided = []
        while self.now_ms < end_ms:
            if hearing and self.now_ms % BEAT_MS == 0:
                for node_id, what in hearing.items():
                    self.hear(node_id, what)
            decision = self.due().decision
            if decision is not None:
                decided.append((self.now_ms, decision))
            self.now_ms += 10
        return decided


def address_of(node_id: str) -> Address:
    return Address(f"10.0.0.{ord(node_id[0])}", 50000)


def founder(**options: Any) -> Node:
    node = Node(**options)
    assert node.until(WINDOW_MS + 10) == [(WINDOW_MS, Found())]
    node.discovery.founded("c0", node.now_ms)
    node.discovery.update(node.now_ms, leader_id="m", term=1, members=1)
    return node


# --- Founding


def test_a_node_that_stood_still_for_the_window_asks_on_before_it_founds() -> None:
    """A machine that halts for a moment would else found between its first beacon and the answer to it."""
    node = Node()
    node.due()
    node.now_ms = WINDOW_MS + 100
    assert node.until(node.now_ms + 3 * BEAT_MS) == []
    node.hear("a", member())
    assert [type(decision) for _, decision in node.until(2 * WINDOW_MS + 200)] == [Join]


def test_a_fresh_node_alone_founds_after_one_window_and_serves_after_a_second() -> None:
    node = Node()
    assert node.until(WINDOW_MS + 10) == [(WINDOW_MS, Found())]
    node.discovery.founded("c0", node.now_ms)
    assert node.state() is State.FOUNDER
    assert node.until(4 * WINDOW_MS) == [(2 * WINDOW_MS + 10, Serve())]
    assert node.state() is State.MEMBER


def test_of_fresh_nodes_the_lowest_founds() -> None:
    node = Node("m")
    assert node.until(3 * WINDOW_MS, {"n": beacon(), "z": beacon()}) == [(WINDOW_MS, Found())]


def test_who_is_not_the_lowest_waits_and_says_for_whom() -> None:
    node = Node("m")
    assert node.until(3 * WINDOW_MS, {"a": beacon(name="lab")}) == []
    assert node.discovery.waits_for(node.now_ms) == "waiting for lab, which founds the cluster"


def test_the_next_one_founds_when_the_lowest_falls_silent() -> None:
    node = Node("m")
    node.until(2 * WINDOW_MS, {"a": beacon()})
    silent_ms = node.now_ms - BEAT_MS
    ((founded_ms, decision),) = node.until(4 * WINDOW_MS)
    assert decision == Found()
    assert founded_ms - silent_ms >= 2 * BEAT_MS


@pytest.mark.parametrize("state", [State.MEMBER, State.FOUNDER])
def test_who_hears_a_member_joins_at_once_and_never_founds(state: State) -> None:
    node = Node("a")
    node.hear("m", member(state=state, leader_id=None))
    assert node.until(10 * WINDOW_MS) == [(0, Join("c1"))]
    assert node.discovery.state is State.JOINING


def test_who_hears_of_a_cluster_from_somebody_who_joins_it_does_not_found() -> None:
    node = Node("a")
    assert node.until(3 * WINDOW_MS, {"z": beacon(state=State.JOINING)}) == []
    assert [decision for _, decision in node.until(5 * WINDOW_MS)] == [Found()]


def test_a_node_that_worked_for_a_cluster_waits_for_it_and_says_so() -> None:
    node = Node("a", belonged_to="c7")
    assert node.until(10 * WINDOW_MS) == []
    assert "waiting to join cluster c7, of which nobody is heard" in node.discovery.waits_for(node.now_ms)
    node.hear("m", member("c7"))
    assert node.due().decision == Join("c7")


def test_a_node_that_worked_for_a_cluster_changes_to_another_freely() -> None:
    node = Node("a", belonged_to="c7")
    node.hear("m", member("c8"))
    assert node.due().decision == Join("c8")


def test_each_decision_comes_once() -> None:
    node = Node()
    assert len(node.until(20 * WINDOW_MS)) == 1


def test_a_member_decides_nothing() -> None:
    node = Node(me=member())
    assert node.discovery.state is State.MEMBER
    assert node.until(20 * WINDOW_MS, {"a": beacon(), "b": member()}) == []


def test_a_founder_that_hears_another_waits_for_a_window_without() -> None:
    node = founder()
    node.until(WINDOW_MS + 300)
    node.hear("z", member("c9", state=State.FOUNDER))
    ((serves_ms, decision),) = node.until(4 * WINDOW_MS)
    assert decision == Serve()
    assert serves_ms >= 300 + 2 * WINDOW_MS


def test_a_founder_that_will_give_way_does_not_serve_meanwhile() -> None:
    node = founder()
    assert node.until(5 * WINDOW_MS, {"z": member("c9", has_work=True)}) == []


def test_a_founder_that_stays_serves_beside_an_empty_cluster() -> None:
    node = founder()
    assert [decision for _, decision in node.until(5 * WINDOW_MS, {"z": member("c9")})] == [Serve()]


# --- Enough nodes


def test_nobody_founds_before_so_many_are_seen_and_says_how_many_are_missing() -> None:
    node = Node(me=beacon(expect=3))
    assert node.until(3 * WINDOW_MS, {"z": beacon()}) == []
    assert node.discovery.waits_for(node.now_ms) == "waiting for 1 more node (--expect 3)"
    assert [decision for _, decision in node.until(5 * WINDOW_MS, {"y": beacon(), "z": beacon()})] == [Found()]


def test_the_largest_number_in_any_beacon_holds() -> None:
    node = Node()
    assert node.until(3 * WINDOW_MS, {"z": beacon(expect=3)}) == []
    assert node.discovery.waits_for(node.now_ms) == "waiting for 1 more node (--expect 3)"


def test_a_node_that_was_started_again_with_another_number_is_heard() -> None:
    node = Node()
    node.until(2 * WINDOW_MS, {"z": beacon(expect=9)})
    node.hear("z", beacon(expect=2), boot="again")
    assert [decision for _, decision in node.until(3 * WINDOW_MS)] == [Found()]


# --- The key


def test_a_node_alone_without_a_key_makes_one_and_founds() -> None:
    node = Node(has_key=False)
    assert node.until(WINDOW_MS + 10) == [(WINDOW_MS, MakeKey())]
    node.discovery.key_made(node.now_ms)
    assert node.until(WINDOW_MS + 50) == [(WINDOW_MS + 10, Found())]


def test_without_a_key_the_lowest_makes_it_and_the_others_wait() -> None:
    assert [d for _, d in Node("m", has_key=False).until(2 * WINDOW_MS, {"z": beacon()})] == [MakeKey()]
    assert Node("m", has_key=False).until(2 * WINDOW_MS, {"a": beacon()}) == []


def test_a_node_without_a_key_that_hears_one_asks_at_once_and_is_silent() -> None:
    node = Node(has_key=False)
    node.refuse(Reason.OTHER_KEY, "10.0.0.9", "abcd1234")
    due = node.due()
    assert due == Due(decision=AskForKey("10.0.0.9", "abcd1234"))
    for _ in range(100):
        node.now_ms += 50
        assert node.due() == Due()


def test_a_node_that_was_given_the_key_listens_for_a_whole_window() -> None:
    node = Node(has_key=False)
    node.refuse(Reason.OTHER_KEY, key_id="abcd1234")
    node.until(5 * WINDOW_MS)
    node.discovery.key_found(node.now_ms)
    assert node.due().broadcast
    assert node.until(9 * WINDOW_MS) == [(6 * WINDOW_MS, Found())]


def test_what_was_heard_without_a_key_does_not_count_as_authenticated() -> None:
    node = Node(has_key=False, me=beacon(expect=2))
    node.until(WINDOW_MS + 10, {"z": beacon()})
    node.discovery.key_made(node.now_ms)
    assert node.until(2 * WINDOW_MS) == []


def test_a_fresh_node_that_hears_its_clusters_name_under_another_key_is_blocked() -> None:
    node = Node()
    node.refuse(Reason.OTHER_KEY, "10.0.0.9", "abcd1234")
    assert node.until(5 * WINDOW_MS) == [(WINDOW_MS, Blocked("10.0.0.9", "abcd1234"))]
    assert node.discovery.state is State.BLOCKED


def test_a_blocked_node_joins_when_it_hears_a_member_under_its_own_key() -> None:
    node = Node()
    node.refuse(Reason.OTHER_KEY, key_id="abcd1234")
    node.until(2 * WINDOW_MS)
    node.hear("z", member())
    assert node.due().decision == Join("c1")


def test_a_blocked_node_is_not_waited_for() -> None:
    node = Node("m")
    assert [d for _, d in node.until(3 * WINDOW_MS, {"a": beacon(state=State.BLOCKED)})] == [Found()]


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.OTHER_KEY])
def test_no_other_refused_datagram_keeps_a_node_from_founding(reason: Reason) -> None:
    node = Node()
    for _ in range(WINDOW_MS // 10):
        node.refuse(reason)
        node.until(node.now_ms + 10)
    assert [decision for _, decision in node.until(2 * WINDOW_MS)] == [Found()]


@pytest.mark.parametrize("reason", [Reason.OTHER_KEY, Reason.NO_KEY])
def test_a_member_answers_who_has_no_key_or_another_but_not_each_time(reason: Reason) -> None:
    node = Node(me=member(leader_id="x"))
    node.due()
    answered = 0
    for _ in range(1000):
        node.refuse(reason)
        answered += len(node.due().unicast)
        node.now_ms += 1
    assert 1 <= answered <= 1000 // BEAT_MS + 1


# --- When a beacon is said, and to whom


def said_at(node: Node, end_ms: int) -> list[int]:
    said = []
    while node.now_ms < end_ms:
        if node.due().broadcast:
            said.append(node.now_ms)
        node.now_ms += 1
    return said


def test_a_fresh_node_speaks_at_once_and_six_times_in_its_window() -> None:
    assert said_at(Node(has_key=False), WINDOW_MS) == list(range(0, WINDOW_MS, BEAT_MS))


def test_a_fresh_node_that_waits_for_people_slows_down() -> None:
    node = Node(me=beacon(expect=2))
    said = said_at(node, module.HURRIED_WINDOWS * WINDOW_MS + 5000)
    assert said[-1] - said[-2] == module.LEADERLESS_MS


def test_without_a_leader_a_member_speaks_every_second() -> None:
    said = said_at(Node(me=member(leader_id=None)), 10_000)
    assert said == list(range(0, 10_000, 1000))


def test_with_a_leader_a_member_speaks_every_five_to_ten_seconds_and_not_in_step() -> None:
    said = said_at(Node(me=member(leader_id="x")), 200_000)
    gaps = [later - earlier for earlier, later in zip(said, said[1:], strict=False)]
    assert 5000 <= min(gaps) < max(gaps) <= 10_000
    assert len(set(gaps)) > len(gaps) // 2


def test_each_beacon_says_when_the_next_one_comes() -> None:
    node = Node(me=member(leader_id="x"))
    for _ in range(20):
        node.now_ms = node.discovery.next_due_ms
        assert node.due().broadcast
        assert node.discovery.beacon.interval_ms == node.discovery.next_due_ms - node.now_ms


def test_a_newcomer_is_answered_at_once_there_and_by_broadcast() -> None:
    node = Node(me=member(leader_id="x"))
    node.due()
    node.now_ms = 1000
    node.hear("z", beacon())
    assert node.discovery.next_due_ms <= node.now_ms
    assert node.due() == Due(broadcast=True, unicast=(address_of("z"),))


def test_a_member_answers_each_beacon_of_who_has_no_cluster_yet() -> None:
    node = Node(me=member(leader_id="x"))
    for state in (State.FRESH, State.JOINING, State.FRESH):
        node.now_ms += 100
        node.hear("z", beacon(state=state))
        assert address_of("z") in node.due().unicast


def test_a_settled_member_is_not_answered() -> None:
    node = Node(me=member(leader_id="x"))
    node.hear("z", member(leader_id="x"))
    node.due()
    node.now_ms = 1000
    node.hear("z", member(leader_id="x"))
    assert node.due() == Due()


def test_who_comes_back_after_a_silence_is_a_newcomer() -> None:
    node = Node(me=member(leader_id="x"))
    node.hear("z", member(leader_id="x"))
    node.due()
    node.now_ms = 60_000
    node.hear("z", member(leader_id="x"))
    assert node.due().unicast == (address_of("z"),)


def test_the_leader_answers_who_lost_it() -> None:
    node = Node(me=member(leader_id="m", term=5))
    for lost in (member(leader_id=None, term=5), member(leader_id="x", term=4)):
        node.hear("z", member(leader_id="m", term=5))
        node.due()
        node.now_ms += 1000
        node.hear("z", lost)
        assert node.due().unicast == (address_of("z"),)


def test_many_newcomers_cause_few_broadcasts() -> None:
    node = Node(me=member(leader_id="x"))
    broadcasts = 0
    for number in range(600):
        node.now_ms += 1
        node.hear(f"z{number}", beacon())
        broadcasts += node.due().broadcast
    assert broadcasts <= 600 // (BEAT_MS // 2) + 1


def test_a_new_leader_says_so_at_once() -> None:
    node = Node(me=member(leader_id="x", term=1))
    node.due()
    node.now_ms = 500
    node.discovery.update(500, leader_id="m", term=2)
    due = node.due()
    assert due.broadcast and node.discovery.beacon.leader_id == "m"


def test_who_loses_the_leader_speaks_within_a_second() -> None:
    node = Node(me=member(leader_id="x"))
    node.due()
    node.discovery.update(100, leader_id=None)
    assert node.discovery.next_due_ms <= 1100


def test_seeds_get_each_beacon_until_broadcasts_pass() -> None:
    seed = Address("10.0.0.122", 47400)  # z's host
    node = Node(seeds=[seed])
    assert seed in node.due().unicast
    node.hear("z", beacon(), is_broadcast=True)
    node.due()
    node.now_ms += BEAT_MS
    assert node.due() == Due(broadcast=True)


def test_who_is_not_heard_by_broadcast_gets_each_beacon_by_unicast() -> None:
    node = Node()
    node.hear("z", beacon(udp_port=777), is_broadcast=False)
    node.due()
    node.now_ms += BEAT_MS
    assert node.due() == Due(broadcast=True, unicast=(Address(address_of("z").host, 777),))


def test_a_remembered_peer_gets_beacons_while_nobody_is_heard_from_its_host() -> None:
    there = Address(address_of("z").host, 47400)
    node = Node(me=member(leader_id="x"), remembered=[there])
    assert there in node.due().unicast
    node.hear("z", member(leader_id="x"))
    node.now_ms = node.discovery.next_due_ms
    assert node.due().unicast == (address_of("z"),)
    node.now_ms = node.discovery.next_due_ms
    assert node.due().unicast == ()


# --- What is believed


def test_an_older_beacon_of_the_same_start_changes_nothing() -> None:
    node = Node(me=member(leader_id="x"))
    node.hear("z", member(term=7), counter=10)
    node.hear("z", member(term=6), counter=9)
    assert node.discovery.peers["z"].beacon.term == 7


def test_a_late_beacon_of_an_earlier_start_brings_nothing_back() -> None:
    node = Node(me=member(leader_id="x"))
    node.hear("z", member(term=7), boot="first", counter=1000)
    node.hear("z", member(term=8), boot="second", counter=1)
    node.hear("z", member(term=7), boot="first", counter=1001)
    assert node.discovery.peers["z"].boot_id == "second"


def test_what_is_remembered_of_others_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEERS_MAX", 5)
    node = Node(me=member(leader_id="x"))
    for number in range(20):
        node.hear(f"z{number}", member())
        node.hear("y", member(), boot=f"boot{number}")
    assert len(node.discovery.peers) == 5
    assert len(node.discovery.peers["y"].past_boots) == module.PAST_BOOTS_MAX


def test_the_leader_of_the_highest_term_is_believed() -> None:
    node = Node(me=member(leader_id="x", term=4))
    node.hear("x", member(leader_id="x", term=4))
    node.hear("y", member(leader_id="y", term=5, tcp_port=1111))
    node.hear("z", member(leader_id=None, term=6))
    assert node.discovery.leader(0) == Leader("y", Address(address_of("y").host, 1111), 0, 5)


def test_a_leader_of_another_cluster_is_not_ones_own() -> None:
    node = Node(me=member(leader_id="x", term=4))
    node.hear("y", member("c9", leader_id="y", term=9))
    leader = node.discovery.leader(0)
    assert leader is not None and leader.node_id == "x"


def test_a_leader_that_was_not_heard_itself_is_known_by_what_others_say() -> None:
    node = Node()
    assert node.discovery.leader(0) is None
    there = Address("10.0.0.77", 47401)
    node.hear("z", member(leader_id="y", leader_address=there, term=3))
    assert node.discovery.leader(0) == Leader("y", there, 0, 3)
    node.hear("y", member(leader_id="y", term=3, tcp_host="lab.example", tcp_port=5))
    assert node.discovery.leader(0) == Leader("y", Address("lab.example", 5), 0, 3)


def test_a_higher_generation_wins_over_any_term() -> None:
    node = Node(me=member(leader_id="x", term=90))
    node.hear("y", member(leader_id="y", term=1, generation=1))
    leader = node.discovery.leader(0)
    assert leader is not None and leader.node_id == "y"
    assert node.discovery.newest_generation() == 1


def test_another_clusters_generation_is_nobodys_business() -> None:
    node = Node(me=member())
    node.hear("y", member("c9", generation=5))
    assert node.discovery.newest_generation() == 0


def test_doors_are_the_live_members_the_leader_first() -> None:
    node = Node()
    node.hear("x", member(leader_id="z", term=2))
    node.hear("y", beacon())
    node.hear("z", member(leader_id="z", term=2))
    assert [door.node_id for door in node.discovery.doors(0)] == ["z", "x"]
    assert node.discovery.doors(0)[0] == Door("z", Address(address_of("z").host, 47400))
    assert node.discovery.doors(100_000) == []


def test_addresses_of_nodes_are_where_they_were_heard() -> None:
    node = Node()
    node.hear("z", beacon(udp_port=7, tcp_port=8))
    host = address_of("z").host
    assert node.discovery.tcp_address("z") == Address(host, 8)
    assert node.discovery.tcp_address("y") is None
    assert node.discovery.udp_addresses(["y", "z"]) == [Address(host, 7)]


def test_a_fresh_node_that_hears_two_clusters_joins_the_one_that_stays() -> None:
    node = Node()
    node.hear("y", member("c1", members=1))
    node.hear("z", member("c2", members=3))
    node.hear("x", member("c3", members=1, has_work=True))
    assert node.discovery.cluster_id(0) == "c3"
    assert node.due().decision == Join("c3")


# --- Two clusters of one name


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (member("c1"), member("c2"), Verdict.STAYS),
        (member("c2"), member("c1"), Verdict.YIELDS),
        (member("c2", members=2), member("c1"), Verdict.STAYS),
        (member("c1"), member("c2", members=2), Verdict.YIELDS),
        (member("c2", has_work=True), member("c1", members=5), Verdict.STAYS),
        (member("c1", members=5), member("c2", has_work=True), Verdict.YIELDS),
        (member("c1", has_work=True), member("c2", has_work=True, members=9), Verdict.STANDS),
    ],
)
def test_which_of_two_clusters_stays(ours: Beacon, theirs: Beacon, verdict: Verdict) -> None:
    node, other = Node("m", me=ours), Node("z", me=theirs)
    node.hear("z", theirs)
    other.hear("m", ours)
    (rival,) = node.discovery.rivals(0)
    (seen_from_there,) = other.discovery.rivals(0)
    opposite = {Verdict.STAYS: Verdict.YIELDS, Verdict.YIELDS: Verdict.STAYS, Verdict.STANDS: Verdict.STANDS}
    assert (rival.verdict, seen_from_there.verdict) == (verdict, opposite[verdict])
    assert (rival.cluster_id, rival.members, rival.doors[0].node_id) == (theirs.cluster_id, theirs.members, "z")


def test_both_raise_an_alarm_when_both_hold_work_and_none_else() -> None:
    node = Node(me=member("c1", has_work=True))
    node.hear("z", member("c2"))
    assert node.discovery.alarms(0) == []
    node.hear("z", member("c2", has_work=True))
    (alarm,) = node.discovery.alarms(0)
    assert "c1" in alarm and "c2" in alarm and "--cluster" in alarm and "\n" not in alarm


def test_of_a_cluster_its_leader_is_believed_and_work_from_whoever_knows_it() -> None:
    node = Node(me=member("c1", has_work=True))
    node.hear("w", member("c2", leader_id="x", members=2))
    node.hear("y", member("c2", leader_id="x", members=2, has_work=True))
    node.hear("x", member("c2", leader_id="x", members=4))
    (rival,) = node.discovery.rivals(0)
    assert (rival.members, rival.verdict) == (4, Verdict.STANDS)


def test_a_cluster_that_fell_silent_is_no_rival_any_more() -> None:
    node = Node(me=member("c1"))
    node.hear("z", member("c2"))
    assert node.discovery.rivals(1000)
    assert node.discovery.rivals(60_000) == []


def test_a_node_without_a_cluster_has_no_rivals() -> None:
    node = Node()
    node.hear("z", member("c2"))
    assert node.discovery.rivals(0) == []


# --- Vitals


def observed(watch: Watch, now_ms: int, alive: str = "abc", last_index: int = 0, **matches: int) -> Any:
    return watch.observe("abc", alive, matches, last_index, now_ms)


def test_vitals_say_since_when_a_member_is_alive_or_dead() -> None:
    watch = Watch(0)
    observed(watch, 100, "ab")
    observed(watch, 200, "a")
    vitals = observed(watch, 300, "ac")
    assert [(vitals[m].is_alive, vitals[m].since_ms) for m in "abc"] == [(True, 100), (False, 200), (True, 300)]


def test_who_never_came_is_dead_since_the_term_began() -> None:
    assert observed(Watch(50), 100, "ab")["c"] == Vitals(False, 50)


def test_what_is_in_flight_is_not_behind() -> None:
    watch = Watch(0)
    for now_ms in range(0, 5000, 100):
        vitals = observed(watch, now_ms, last_index=now_ms, b=now_ms - 300, c=now_ms - 2000)
    assert vitals["b"].caught_up_since_ms is not None and vitals["b"].caught_up_since_ms <= 1100
    assert vitals["c"].caught_up_since_ms is None


def test_who_dies_or_falls_behind_has_to_be_stable_anew() -> None:
    watch = Watch(0)
    assert observed(watch, 1000, b=5, last_index=5)["b"].is_ready(5000)
    observed(watch, 6000, "ac", b=5, last_index=5)
    vitals = observed(watch, 6100, "abc", b=5, last_index=5)
    assert not vitals["b"].is_ready(8000)
    assert vitals["b"].is_ready(6100 + round(1000 * config.PROMOTE_STABLE_S))


def test_a_watch_says_who_has_been_dead_for_long_and_nothing_of_whom_it_has_not_looked_at() -> None:
    watch = Watch(0)
    assert not watch.is_dead_for("c", 0, 10**9)
    observed(watch, 100, "ab")
    assert not watch.is_dead_for("c", 1000, 999)
    assert watch.is_dead_for("c", 1000, 1000)
    assert not watch.is_dead_for("a", 0, 10**9)


def test_what_a_watch_remembers_is_bounded() -> None:
    watch = Watch(0)
    for now_ms in range(0, 20_000, 20):
        observed(watch, now_ms, last_index=now_ms)
    assert len(watch._ends) <= config.ELECTION_TIMEOUT_MS_MIN // 20 + 2


# --- Voters, standbys, workers

NOW_MS = 1_000_000
GOOD, BEHIND = Vitals(True, 0, 0), Vitals(True, 0)
JUST_DIED, DEAD, GONE = Vitals(False, NOW_MS - 1000), Vitals(False, NOW_MS - 5000), Vitals(False, 0)


def following(voters: str, learners: str = "", **vitals: Vitals) -> tuple[str, str] | None:
    """The next configuration of these members, voters and learners, a letter each; `a` leads. None: no change."""
    configuration = Configuration(voters=tuple(voters), learners=tuple(learners))
    result = next_configuration(configuration, set(vitals), vitals, "a", NOW_MS)
    return None if result is None else ("".join(sorted(result.voters)), "".join(sorted(result.learners)))


@pytest.mark.parametrize(
    ("members", "voters", "standbys"),
    [(1, 1, 0), (2, 1, 1), (3, 3, 0), (4, 3, 1), (5, 5, 0), (6, 5, 1), (7, 5, 1), (100, 5, 1)],
)
def test_how_many_vote_and_how_many_stand_by(members: int, voters: int, standbys: int) -> None:
    assert (voters_wanted(members), standbys_wanted(members)) == (voters, standbys)


def test_one_member_is_the_voter() -> None:
    assert following("a", a=GOOD) is None


def test_the_second_member_is_the_standby() -> None:
    assert following("a", a=GOOD, b=BEHIND) == ("a", "b")
    assert following("a", "b", a=GOOD, b=GOOD) is None


def test_the_third_gets_a_copy_first_and_then_all_three_vote_in_one_step() -> None:
    assert following("a", "b", a=GOOD, b=GOOD, c=BEHIND) == ("a", "bc")
    assert following("a", "bc", a=GOOD, b=GOOD, c=BEHIND) is None
    assert following("a", "bc", a=GOOD, b=GOOD, c=GOOD) == ("abc", "")


def test_who_is_caught_up_but_not_stable_does_not_vote_yet() -> None:
    unstable = Vitals(True, 0, NOW_MS - 1000)
    assert following("a", "bc", a=GOOD, b=GOOD, c=unstable) is None


def test_the_fourth_stands_by_and_with_the_fifth_five_vote() -> None:
    assert following("abc", a=GOOD, b=GOOD, c=GOOD, d=BEHIND) == ("abc", "d")
    assert following("abc", "d", a=GOOD, b=GOOD, c=GOOD, d=GOOD, e=BEHIND) == ("abc", "de")
    assert following("abc", "de", a=GOOD, b=GOOD, c=GOOD, d=GOOD, e=GOOD) == ("abcde", "")


def test_with_more_than_six_the_rest_work_without_a_copy() -> None:
    assert following("abcde", "f", a=GOOD, b=GOOD, c=GOOD, d=GOOD, e=GOOD, f=GOOD, g=BEHIND, h=BEHIND) is None


def test_a_dead_voter_and_the_standby_change_places() -> None:
    assert following("abc", "d", a=GOOD, b=DEAD, c=GOOD, d=GOOD) == ("acd", "b")


def test_a_voter_that_only_just_died_may_come_back() -> None:
    assert following("abc", "d", a=GOOD, b=JUST_DIED, c=GOOD, d=GOOD) is None


def test_a_dead_voter_that_nobody_can_replace_stays_a_voter() -> None:
    assert following("abc", a=GOOD, b=GONE, c=GOOD) is None
    assert following("abc", "d", a=GOOD, b=GONE, c=GOOD, d=BEHIND) is None
    assert following("abc", "d", a=GOOD, b=GONE, c=GOOD, d=GONE) is None


def test_a_dead_member_does_not_keep_the_living_from_voting() -> None:
    """One voted and four stood by, one of them dead: the three living ones waited for each other for ever."""
    assert following("a", "bcde", a=GOOD, b=GOOD, c=GOOD, d=GOOD, e=GONE) == ("abc", "de")
    assert following("abc", "de", a=GOOD, b=GOOD, c=GOOD, d=GOOD, e=GONE) is None
    assert following("a", "bcde", a=GOOD, b=GOOD, c=GOOD, d=GOOD, e=BEHIND) == ("abc", "de"), "nor does one that is slow"


def test_members_that_are_dead_still_count() -> None:
    assert following("abcde", a=GOOD, b=GOOD, c=GOOD, d=GONE, e=GONE) is None


def test_a_standby_that_is_gone_for_long_is_replaced_by_a_worker() -> None:
    living = {name: GOOD for name in "abcde"}
    assert following("abcde", "f", **living, f=DEAD, g=BEHIND) is None
    assert following("abcde", "f", **living, f=GONE, g=BEHIND) == ("abcde", "g")


def test_while_a_voter_is_dead_one_more_worker_gets_a_copy() -> None:
    living = {name: GOOD for name in "abcd"}
    assert following("abcde", "f", **living, e=DEAD, f=BEHIND, g=BEHIND) == ("abcde", "fg")


def test_who_leaves_is_replaced_where_somebody_is_ready() -> None:
    assert following("abc", "d", a=GOOD, b=GOOD, d=GOOD) == ("abd", "")


def test_who_leaves_stays_until_the_standby_has_caught_up() -> None:
    assert following("abc", "d", a=GOOD, b=GOOD, d=BEHIND) is None


def test_who_leaves_two_others_leaves_a_voter_and_a_standby() -> None:
    assert following("abc", a=GOOD, b=GOOD) == ("a", "b")


def test_who_leaves_when_nobody_can_replace_it_leaves_an_odd_number() -> None:
    assert following("abc", "d", a=GOOD, b=GOOD, d=GONE) == ("a", "bd")
    assert following("abcde", "f", a=GOOD, b=GOOD, c=GOOD, d=GOOD, f=GONE) == ("abc", "df")


def test_a_leader_that_leaves_gives_its_vote_to_the_standby() -> None:
    assert following("a", "b", b=GOOD) == ("b", "")
    assert following("a", "b", b=BEHIND) is None
    assert following("a", "b", b=GONE) is None


def test_a_standby_that_leaves_is_dropped() -> None:
    assert following("a", "b", a=GOOD) == ("a", "")


def test_who_waits_for_a_successor_does_not_keep_it_from_its_copy() -> None:
    configuration = Configuration(voters=("a", "b", "c"), learners=("d",))
    vitals = {"a": GOOD, "b": GOOD, "c": GOOD, "d": BEHIND}
    assert next_configuration(configuration, {"a", "b", "d"}, vitals, "a", NOW_MS) is None


def test_a_standby_that_is_ready_takes_no_living_voters_place() -> None:
    living = {name: GOOD for name in "axyb"}
    assert following("axy", "bc", **living, c=BEHIND) is None


def test_of_too_many_voters_the_dead_go_first_and_the_leader_never() -> None:
    assert following("zabcd", a=GOOD, b=DEAD, c=GOOD, d=GOOD) == ("acd", "b")
    configuration = Configuration(voters=tuple("vwxyz"))
    vitals = {name: GOOD for name in "vwxy"}
    result = next_configuration(configuration, set(vitals), vitals, "y", NOW_MS)
    assert result == Configuration(voters=("v", "w", "y"), learners=("x",))


def test_of_two_who_hold_a_copy_the_living_one_stands_by() -> None:
    living = {name: GOOD for name in "abcde"}
    assert following("abcde", "fg", **living, f=JUST_DIED, g=GOOD) == ("abcde", "g")


def test_a_member_that_was_never_seen_gets_no_copy() -> None:
    configuration = Configuration(voters=("a",))
    assert next_configuration(configuration, {"a", "b"}, {"a": GOOD}, "a", NOW_MS) is None


def test_while_a_change_is_under_way_there_is_no_next_one() -> None:
    joint = Configuration(voters=("a",)).joint_with(("a", "b", "c"), ())
    assert next_configuration(joint, {"a"}, {"a": GOOD}, "a", NOW_MS) is None


def test_places_are_kept_so_that_equal_members_are_an_equal_configuration() -> None:
    configuration = Configuration(voters=("c", "a", "b"), learners=("d",))
    vitals = {"a": GOOD, "b": DEAD, "c": GOOD, "d": GOOD}
    result = next_configuration(configuration, set(vitals), vitals, "a", NOW_MS)
    assert result == Configuration(voters=("c", "a", "d"), learners=("b",))


def test_the_roles_of_members() -> None:
    configuration = Configuration(voters=("a", "b"), voters_old=("a", "c"), learners=("d",))
    roles = [role_of(name, configuration, "a") for name in "abcde"]
    assert roles == ["leader", "voter", "voter", "standby", "worker"]
