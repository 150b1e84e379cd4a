"""What `doctor` makes of its findings: lines, troubles, hints and the exit code; and that it stays a stranger to whom it listens to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

import p2pcluster
from p2pcluster import doctor
from p2pcluster.config import Address, Options
from p2pcluster.core import protocol
from p2pcluster.core.datagram import Beacon, Gate, Heard, Reason, State
from p2pcluster.core.handshake import derive_key
from p2pcluster.doctor import Findings, HeardNode
from p2pcluster.lan import Interface, Lan, LanStatistics

BEACON = Beacon(
    name="lab-1", state=State.MEMBER, cluster_id="c1", generation=0, term=4, leader_id="n1", leader_address=Address("10.0.0.7", 47400),
    last_index=0, last_term=0, commit_index=0, role="leader", voters=1, members=1, has_work=False, expect=1, tcp_host=None, tcp_port=47400,
    udp_port=5000, interval_ms=5000, package=p2pcluster.__version__, python="3.11.7",
)
LEADER = HeardNode("n1", "10.0.0.7", BEACON)
SENT = LanStatistics(4, 4, 400, 0, 4, 0, 400, 0)


def findings(**changes: Any) -> Findings:
    """Of a machine on which all is well and nobody is heard."""
    found = Findings("default", "/h", "0.0.0.0", 47400, "/k", key_id="1234abcd", spoke=True, traffic=SENT, refused={Reason.OWN: 4},
                     interfaces=[Interface("eth0", "10.0.0.5", "10.0.0.255", 4)])
    for name, value in changes.items():
        assert hasattr(found, name)
        setattr(found, name, value)
    return found


def text(found: Findings) -> str:
    return "\n".join(doctor.report(found))


def test_silence_is_no_trouble_and_the_hints_say_what_to_try() -> None:
    found = findings()
    assert doctor.troubles(found) == []
    assert doctor.exit_code(found) == 0
    for words in ("no node of this cluster and key", "port 47400 through the firewall", "--seed HOST:PORT", "Docker"):
        assert words in text(found)


def test_a_node_that_was_heard_is_told_with_its_cluster_its_leader_and_its_address() -> None:
    follower = HeardNode("n2", "10.0.0.8", replace(BEACON, name="lab-2", role="voter"))
    said = text(findings(nodes=[LEADER, follower]))
    assert "heard: lab-1 at 10.0.0.7:47400: cluster default (c1), member, leads, term 4; the key fits" in said
    assert "heard: lab-2 at 10.0.0.8:47400: cluster default (c1), member, led by lab-1 at 10.0.0.7:47400; the key fits" in said
    assert "Docker" not in said


def test_a_node_whose_leader_is_not_known_says_so() -> None:
    said = text(findings(nodes=[HeardNode("n1", "10.0.0.7", replace(BEACON, state=State.FRESH, cluster_id=None, leader_id=None))]))
    assert "(not founded), fresh, without a leader" in said


def test_nodes_of_this_machine_alone_are_not_others() -> None:
    said = text(findings(nodes=[HeardNode("n1", "10.0.0.5", BEACON)], tcp_error="held by another program"))
    assert "hint: no other machine was heard" in said
    assert "TCP port 47400: held by node lab-1" in said


def test_the_loopback_is_named_as_the_reason_before_any_firewall() -> None:
    said = text(findings(bind="127.0.0.1"))
    assert "keeps to this machine" in said
    assert "firewall" not in said


def test_a_machine_without_a_network_is_told_so() -> None:
    words = "no interface of this machine"
    assert words in text(findings(interfaces=[Interface("loopback", "127.0.0.1", "127.255.255.255", 4)]))
    assert words not in text(findings())


def test_who_does_not_hear_itself_has_a_firewall() -> None:
    found = findings(refused={})
    assert "does not hear its own broadcasts" in text(found)
    assert doctor.exit_code(found) == 1


@pytest.mark.parametrize("changes", [
    {"key_error": "the key /k is open to others"}, {"home_error": "/h is on a network file system"}, {"udp_error": "UDP port cannot be shared"},
    {"notes": ["10.0.0.7 holds another key"], "refused": {Reason.OWN: 1, Reason.OTHER_KEY: 2}}, {"unanswered": ["10.0.0.7"]},
    {"seeds": {Address("10.0.0.7", 47400): "Connection refused"}}, {"clock_off_s": -3.0}, {"home_in_use": True},
])
def test_each_trouble_is_a_line_and_ends_with_1_unless_a_node_was_heard(changes: dict[str, Any]) -> None:
    found = findings(**changes)
    assert sum(line.startswith("trouble: ") for line in doctor.report(found)) == 1
    assert doctor.exit_code(found) == 1
    assert doctor.exit_code(findings(**changes, nodes=[LEADER])) == 0


def test_refusals_are_counted_by_reason_and_what_is_harmless_is_not_told() -> None:
    said = text(findings(refused={Reason.OWN: 9, Reason.UNPROVEN: 2, Reason.OTHER_KEY: 1, Reason.VERSION: 3}))
    assert [line for line in said.splitlines() if line.startswith("refused")] == [
        "refused: 1 datagram, another key", "refused: 3 datagrams, another protocol version"]


def test_where_somebody_is_refused_the_network_is_not_to_blame() -> None:
    assert "firewall" not in text(findings(refused={Reason.OWN: 9, Reason.OTHER_KEY: 1}, notes=["10.0.0.7 holds another key"]))


def test_another_version_and_another_python_are_hints() -> None:
    said = text(findings(nodes=[HeardNode("n1", "10.0.0.7", replace(BEACON, package="9.9", python="3.99.1"))]))
    assert "hint: lab-1 runs p2pcluster 9.9" in said
    assert "hint: lab-1 runs Python 3.99.1" in said


def test_a_port_that_a_stranger_holds_is_told_with_what_it_means() -> None:
    said = text(findings(tcp_error="held by another program, or not to be had (Address already in use)"))
    assert "TCP port 47400: held by another program" in said
    assert "--seed must name that" in said


def test_a_home_says_whether_its_node_runs() -> None:
    at = Address("127.0.0.1", 47400)
    assert "; no node runs there" in text(findings())
    assert "a node runs there, at 127.0.0.1:47400" in text(findings(home_in_use=True, home_node=at))
    assert "one at 127.0.0.1:47400 was killed" in text(findings(home_node=at))


class Wire:
    """A network of two: what is sent waits in a list."""

    own_port = 5001

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.coming: list[tuple[bytes, Address]] = []

    def broadcast(self, data: bytes) -> None:
        self.sent.append(data)

    def send(self, data: bytes, address: Address) -> None:
        self.sent.append(data)

    def receive(self) -> list[tuple[bytes, Address]]:
        coming, self.coming = self.coming, []
        return coming


def test_it_hears_a_node_that_never_counts_it_in() -> None:
    key, here, wire = derive_key(b"x"), Address("10.0.0.5", 5001), Wire()
    seeds = SimpleNamespace(addresses=lambda: ())
    listening = doctor._Listening(Options(), key, cast(Lan, wire), cast(Any, seeds), findings())
    node = Gate(key, "default", "n1", "boot", b"s" * 32, protocol.VERSION)
    heard_by_node = []
    listening._speak()
    for now_ms in range(0, 1000, 20):
        listening._hear(now_ms)
        for data in wire.sent:
            heard = node.open(data, here, BEACON, now_ms)
            heard_by_node += [heard] if isinstance(heard, Heard) else []
            wire.coming += [(answer, Address("10.0.0.7", 5000)) for answer, _ in heard.answers]
        wire.sent.clear()
        wire.coming += [(question, Address("10.0.0.7", 5000)) for question, _ in node.repeat_questions(BEACON, now_ms)]
    assert listening._nodes == {"n1": LEADER}
    assert heard_by_node == []
