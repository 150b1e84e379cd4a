"""Lines of all machines for a client: who is asked, whose answers are waited for, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pcluster import config, gathering
from p2pcluster.client import _printed
from p2pcluster.core import protocol
from p2pcluster.core.codec import Message
from p2pcluster.core.loglines import tag
from p2pcluster.errors import RemoteProtocolError
from p2pcluster.gathering import Gathering
from p2pcluster.logbook import Logbook
from tests import hostile


def lines(*texts: str, at: int = 0) -> bytes:
    return "".join(f"{tag(f'2026-11-24T11:54:20.{at + number:03d}Z', 1, 'out')}{text}\n" for number, text in enumerate(texts)).encode()


class Machines:
    """Three nodes, of which `one` leads and `gone` cannot be reached; what is sent arrives when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.books = {name: Logbook(folder / name, lambda text: None) for name in ("one", "two")}
        self.sent: list[tuple[str, Message]] = []
        self.replies: list[Message] = []
        self.members = {"one": "host one", "two": "host two", "gone": "host gone"}
        self.leader = self.gathering("one")
        self.follower = self.gathering("two")

    def gathering(self, name: str, boot: str = "b1") -> Gathering:
        return Gathering(name, boot, self.books[name], self.send, lambda session, message: self.replies.append(message), lambda: self.members)

    def send(self, node: str, message: Message) -> bool:
        if node == "gone":
            return False
        protocol.check("member", "leader", message)
        self.sent.append((node, message))
        return True

    def ask(self, now_ms: int = 0, **after: Any) -> None:
        message = Message("logs", {"req": 3, "pipeline": None, "stage": None, "after": after})
        protocol.check("client", "client", message)
        self.leader.ask("client", message, now_ms)

    def carry(self) -> None:
        for node, message in self.sent:
            answer = self.follower.answer(message)
            protocol.check("member", "executor", answer)
            self.leader.on_lines(node, answer)
        self.sent.clear()

    def reply(self) -> Message:
        (message,) = self.replies
        self.replies.clear()
        protocol.check("client", "node", message)
        return message


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return Machines(tmp_path)


def test_lines_of_all_machines_come_in_the_order_of_their_times_and_who_is_away_is_named(machines: Machines) -> None:
    machines.books["one"].add("p/A", lines("first", "third", at=1))
    machines.books["two"].add("p/B", lines("second", at=1))
    machines.ask()
    assert machines.replies == [], "it waits for the other"
    machines.carry()
    found = _printed(machines.reply(), {})
    assert [(line.node, line.stage, line.text) for line in found.lines] == [
        ("host one", "A", "first"), ("host two", "B", "second"), ("host one", "A", "third")]
    assert found.away == ["host gone"]


def test_a_machine_that_does_not_answer_in_time_is_away(machines: Machines) -> None:
    machines.books["one"].add("p/A", lines("here"))
    machines.ask(now_ms=0)
    machines.leader.tick(int(1000 * config.LOG_GATHER_S) - 1)
    assert machines.replies == []
    machines.leader.tick(int(1000 * config.LOG_GATHER_S))
    found = _printed(machines.reply(), {})
    assert ([line.text for line in found.lines], found.away) == (["here"], ["host gone", "host two"])
    machines.carry()
    assert machines.replies == [], "an answer that is late is nobody's"


def test_who_goes_on_gets_what_is_new_also_after_a_machine_was_started_again(machines: Machines) -> None:
    machines.books["two"].add("p/B", lines("old"))
    machines.ask()
    machines.carry()
    after = _printed(machines.reply(), {}).after
    assert after == {"one": {"boot": "b1", "stages": {}}, "two": {"boot": "b1", "stages": {"p/B": 1}}}
    machines.books["two"].add("p/B", lines("new"))
    machines.ask(**after)
    machines.carry()
    found = _printed(machines.reply(), after)
    assert [line.text for line in found.lines] == ["new"]
    machines.follower = machines.gathering("two", boot="b2")
    machines.ask(**found.after)
    machines.carry()
    found = _printed(machines.reply(), found.after)
    assert [line.text for line in found.lines] == ["old", "new"], "a new start counts its lines anew"
    assert found.after["two"]["boot"] == "b2"


def test_lines_that_went_before_they_were_asked_for_are_counted(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LOG_RING_LINES", 2)
    machines.books["two"].add("p/B", lines("seen"))
    machines.ask()
    machines.carry()
    after = _printed(machines.reply(), {}).after
    for number in range(5):
        machines.books["two"].add("p/B", lines(f"line {number}"))
    machines.ask(**after)
    machines.carry()
    found = _printed(machines.reply(), after)
    assert [line.text for line in found.lines] == ["3 lines left out: they came faster than they were asked for", "line 3", "line 4"]


def test_a_cluster_of_one_answers_at_once(machines: Machines) -> None:
    machines.members = {"one": "host one"}
    machines.books["one"].add("p/A", lines("alone"))
    machines.ask()
    assert [line.text for line in _printed(machines.reply(), {}).lines] == ["alone"]


def test_an_answer_that_is_longer_than_was_asked_for_or_that_nobody_asked_for_is_none(machines: Machines) -> None:
    machines.ask()
    ((_, question),) = machines.sent
    answer = Message("log_lines", {"ask": question.fields["ask"], "boot": "b", "stages": [["p/B", 0, 1]]}, (b"x" * (question.fields["bytes_max"] + 1),))
    machines.leader.on_lines("two", answer)
    machines.leader.on_lines("stranger", answer._replace(blobs=(b"x",)))
    assert machines.replies == []
    machines.leader.tick(int(1000 * config.LOG_GATHER_S))
    assert _printed(machines.reply(), {}).away == ["host gone", "host two"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_is_said_about_lines_is_refused_or_answered(machines: Machines, seed: int) -> None:
    random = Random(seed)
    machines.ask()
    number = next(iter(machines.leader._asked))
    said = [
        ("client", "client", Message("logs", {"req": 3, "pipeline": "p", "stage": None, "after": {"two": {"boot": "b1", "stages": {"p/B": 1}}}})),
        ("member", "leader", Message("logs", {"ask": number, "pipeline": None, "stage": "B", "after": {"boot": "b1", "stages": {"p/B": 0}},
                                              "bytes_max": 1000})),
        ("member", "executor", Message("log_lines", {"ask": number, "boot": "b", "stages": [["p/B", 0, 1]]}, (lines("x"),))),
    ]
    link, sender, message = random.choice(said)
    message = hostile.mangled(message, random)
    try:
        protocol.check(link, sender, message)
    except RemoteProtocolError:
        return
    if link == "client":
        machines.leader.ask("client", message, 0)
    elif sender == "leader":
        machines.follower.answer(message)
    else:
        machines.leader.on_lines("two", message)
    machines.leader.tick(1 << 40)
    for reply in machines.replies:
        if reply.fields["result"] == "ok":
            _printed(reply, {})
    machines.replies.clear()
    machines.sent.clear()


def test_too_many_who_ask_at_a_time_are_refused(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "ASKED_MAX", 2)
    for _ in range(3):
        machines.ask()
    assert machines.reply().fields["code"] == "too_many_asked"
