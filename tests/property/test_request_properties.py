"""Whatever a client says that holds the key: the node that leads answers it or refuses it with a typed error, and goes on.

The node is whole but for its sockets and its disk: what it proposes is applied, what it plans is carried out by a machine's
half, and every answer is put into bytes.
"""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import config
from p2pcluster.core import protocol
from p2pcluster.core.codec import Message, decode, encode_bytes
from p2pcluster.core.commands import Port, lengths_blob, put
from p2pcluster.core.executor import Executor, ToLeader
from p2pcluster.core.log import Log
from p2pcluster.core.grants import Grant, grant_message
from p2pcluster.core.node import Node
from p2pcluster.core.sessions import LOCAL_SESSION, Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.errors import RemoteProtocolError
from tests import hostile

MESSAGES = 40  # of one attack


class Victim:
    """A node that leads alone, with its machine's half, an honest client and a hostile one."""

    executor_class = Executor

    def __init__(self) -> None:
        self.now_ms = 0
        self.node = Node("n", Random(0), HardState(), Log(), State(), Configuration(("n",)), 0, 0)
        self.executor = self.executor_class("n")
        self.answers: list[tuple[str, Message]] = []
        while not self.node.is_serving:
            self.pass_time()
        self.node.open_session(Session(LOCAL_SESSION, "node", "n", "boot", "n", {"slots": 2, "python": "3.11.2"}))
        for name in ("honest", "hostile"):
            self.node.open_session(Session(name, "client", name, "boot", name))
        self.executor.on_new_leader({}, self.now_ms)
        self.carry()
        for message in hostile.deploying():
            self.ask(message)
        self.seq = 0

    def pass_time(self, by_ms: int = 300) -> None:
        self.now_ms += by_ms
        self.node.tick(self.now_ms)
        self.executor.tick(self.now_ms, {})
        self.carry()

    def carry(self) -> None:
        """What the loop does behind what it heard: there nobody is left whose connection could be closed for it."""
        try:
            self.carry_all()
        except RemoteProtocolError as error:
            raise AssertionError("the loop ends") from error

    def carry_all(self) -> None:
        for _ in range(100):
            moved = False
            for action in self.executor.take_actions():
                moved = True
                if isinstance(action, ToLeader):
                    self.node.step(LOCAL_SESSION, action.message, self.now_ms)
            for session, item in self.node.take_outbox():
                moved = True
                message = item if isinstance(item, Message) else self.materialized(item)
                arrived = decode(encode_bytes(message))
                if session == LOCAL_SESSION:
                    self.executor.on_leader(arrived, self.now_ms)
                else:
                    self.answers.append((session, arrived))
            if self.node.has_ready():
                moved = True
                self.node.advance(self.node.ready())
            if not moved:
                return
        raise AssertionError("it does not come to rest")

    @staticmethod
    def materialized(grant: Grant) -> Message:
        return grant_message(grant, [chunk.slice(lo, hi) for chunk, lo, hi in grant.pieces])

    def hear(self, message: Message, session: str = "hostile") -> None:
        """What a node's loop does with a client's message. Raises `RemoteProtocolError`, for which it closes the connection."""
        protocol.check("client", "client", message)
        self.node.step(session, message, self.now_ms)
        self.carry()

    def ask(self, message: Message) -> Message:
        """An honest request and its answer."""
        self.answers.clear()
        self.hear(message._replace(fields={**message.fields, "req": 7}), "honest")
        for _ in range(10):
            for session, answer in self.answers:
                if session == "honest" and answer.fields.get("req") == 7:
                    return answer
            self.pass_time()
        raise AssertionError(f"no answer to an honest {message.kind}")

    def write_down(self) -> None:
        """The tables take in what there is, and a state is made of them again."""
        rows = self.node.state.all_rows()
        self.node.state.rows_changed()
        self.node.state.rows_written()
        assert rows

    def is_well(self) -> None:
        self.seq += 1
        assert self.ask(put("client:honest", 1, self.seq, [Port(["good/in"], lengths_blob([1]), b"1")])).fields["result"] == "ok"
        assert self.ask(Message("status", {})).fields["status"]["queues"]
        self.write_down()


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_whatever_a_client_says_is_answered_or_refused_and_others_are_served(seed: int) -> None:
    random = Random(seed)
    victim = Victim()
    for message in hostile.deploying("good", "1" * 64):
        victim.ask(message)
    for _ in range(MESSAGES):
        message = random.choice(hostile.requests())
        if random.random() < 0.9:
            message = hostile.mangled(message, random)
        if message.kind in ("stop", "leave"):
            continue
        try:
            victim.hear(message)
        except RemoteProtocolError:
            pass
        except Exception as error:
            raise AssertionError(hostile.text_of(message)) from error
        try:
            victim.pass_time(random.choice((20, 1100)))
        except Exception as error:
            raise AssertionError("later: " + hostile.text_of(message)) from error
    victim.is_well()


def changed(kind: str, **changes: Any) -> Message:
    """A well-formed request but for these fields; `...` leaves one out."""
    message = next(request for request in hostile.requests() if request.kind == kind)
    fields = {name: value for name, value in {**message.fields, **changes}.items() if value is not ...}
    return message._replace(fields=fields)


def deploy_with(part: str, **changes: Any) -> Message:
    message = changed("deploy")
    manifest = copy.deepcopy(message.fields["manifest"])
    for name, value in changes.items():
        manifest[part][0].pop(name)
        if value is not ...:
            manifest[part][0][name] = value
    return changed("deploy", manifest=manifest)


KILLERS: list[Message] = [
    *(changed(kind, req=...) for kind in ("take", "read", "wait", "value", "put", "status")),
    changed("take", req=True), changed("take", req=None), changed("take", count=-1), changed("read", after=-1),
    changed("read", count=1 << 62),
    changed("parked", after="x"), changed("parked", after=":"), changed("parked", after=":" + "9" * 5000),
    changed("deploy", pipeline="a/b"), changed("deploy", pipeline=".."), changed("deploy", pipeline="a\0b"), changed("deploy", pipeline=""),
    changed("deploy", version="../../x"), changed("deploy", version="\0"),
    *(deploy_with("stages", **change) for change in (
        {"where": ...}, {"where": 1}, {"name": "a\0b"}, {"name": "a/b"}, {"reads": []}, {"ports": [{"queues": "in"}]},
        {"processes": 1 << 61},
        {"processes": True}, {"processes": 0}, {"kind": "source", "processes": "auto"})),
    *(deploy_with("queues", **change) for change in ({"name": "\ud800"}, {"name": "a\nb"}, {"maxsize": -1}, {"outside": 0})),
    changed("put", ports=[{"queues": [f"{hostile.NAME}/in"], "keys": True}])._replace(blobs=(lengths_blob([1]), b"1", b"[" * 100_000)),
]


@pytest.mark.parametrize("message", KILLERS, ids=lambda message: message.kind)
def test_what_once_ended_a_node_or_would_is_refused_before_it_is_proposed(message: Message) -> None:
    victim = Victim()
    before = victim.node.state.hash
    with pytest.raises(RemoteProtocolError):
        victim.hear(message)
    victim.pass_time()
    assert victim.node.state.hash == before


def put_into_a_full_queue(victim: Victim, seq: int, size: int = 1) -> Message:
    """The hostile client's `seq`th put, of a producer of its own."""
    port = Port([f"{hostile.NAME}/in"], lengths_blob([size]), bytes(size))
    message = put(f"client:{seq}", 1, 1, [port])
    return message._replace(fields={**message.fields, "req": seq})


@pytest.mark.parametrize("depth", [150, 500, 900, 950, 970, 985])
def test_what_is_nested_so_deep_that_another_node_could_not_read_it_does_not_get_into_the_log(depth: int) -> None:
    deep = hostile.nested(depth)
    origin = {"node": "n", "more": deep}
    for message in (changed("start_run", params=deep), changed("deploy", origin=origin), changed("deploy", files={"x": deep}),
                    changed("deploy", project={"module": deep}), deploy_with("stages", defined_at=deep)):
        with pytest.raises(RemoteProtocolError):
            Victim().hear(message)


def test_a_graph_that_goes_round_where_it_does_not_say_so_ends_no_leader() -> None:
    """The graph check is in the deploying program, and who sends a deployment may not have asked it."""
    victim = Victim()
    for message in hostile.deploying("good", "1" * 64):
        victim.ask(message)
    round_message = deploy_with("stages", ports=[{"label": None, "queues": ["in"]}])
    victim.hear(round_message)
    victim.pass_time(3_000)
    victim.is_well()


def test_a_graph_of_any_depth_ends_no_leader() -> None:
    victim = Victim()
    for message in hostile.deploying("good", "1" * 64):
        victim.ask(message)
    deep = changed("deploy", manifest=copy.deepcopy(changed("deploy").fields["manifest"]))
    (stage,), queue = deep.fields["manifest"]["stages"], deep.fields["manifest"]["queues"][0]
    names = ["in", *(f"q{number}" for number in range(1100))]
    stages = [{**stage, "name": f"s{number}", "reads": name, "ports": [{"label": None, "queues": [after]}]}
              for number, (name, after) in enumerate(zip(names, names[1:], strict=False))]
    deep.fields["manifest"] |= {"stages": stages[::-1], "queues": [{**queue, "name": name} for name in names]}
    victim.hear(deep)
    victim.pass_time(3_000)
    victim.is_well()


def refusals(victim: Victim, code: str) -> list[Message]:
    return [answer for session, answer in victim.answers if session == "hostile" and answer.fields.get("code") == code]


def test_puts_that_wait_for_room_are_limited_for_each_client_and_go_with_it() -> None:
    victim = Victim()
    queue = victim.node.state.queues[f"{hostile.NAME}/in"]
    queue.maxsize = 0
    for seq in range(config.HELD_PUTS_MAX + 3):
        victim.hear(put_into_a_full_queue(victim, seq))
    refused = [answer.fields["req"] for answer in refusals(victim, "too_many_held")]
    assert refused == list(range(config.HELD_PUTS_MAX, config.HELD_PUTS_MAX + 3))
    assert "wait for their answers, then put this again" in refusals(victim, "too_many_held")[0].fields["text"]
    victim.hear(put_into_a_full_queue(victim, 1000), "honest")
    queue.maxsize = None
    victim.pass_time()
    victim.ask(Message("retry", {"queue": f"{hostile.NAME}/in", "ids": None}))
    assert queue.put == config.HELD_PUTS_MAX + 1, "what waited and was not refused is taken in when there is room"
    session = victim.node.sessions["hostile"]
    assert (session.held_puts, session.held_bytes) == (0, 0)
    queue.maxsize = 0
    size = config.HELD_BYTES_MAX // 4
    victim.answers.clear()
    for seq in range(2000, 2006):
        victim.hear(put_into_a_full_queue(victim, seq, size))
    assert len(refusals(victim, "too_many_held")) == 3, "so are their bytes"
    victim.node.close_session("hostile")
    assert not victim.node._held, "nobody leaves behind what he had waiting"


def test_waits_are_limited_for_each_client() -> None:
    victim = Victim()
    wait = Message("wait", {"pipeline": hostile.NAME})
    for number in range(config.WAITS_MAX + 2):
        victim.hear(wait._replace(fields={**wait.fields, "req": number}))
    assert [answer.fields["req"] for answer in refusals(victim, "too_many_waits")] == [config.WAITS_MAX, config.WAITS_MAX + 1]
    victim.answers.clear()
    victim.hear(wait._replace(fields={**wait.fields, "req": 1}), "honest")
    assert not [answer for session, answer in victim.answers if session == "honest"]


def test_an_item_that_has_failed_a_thousand_times_is_still_tried_again() -> None:
    victim = Victim()
    for at in range(3):
        assert victim.ask(put("client:k", 1, at + 1, [Port([f"{hostile.NAME}/in"], lengths_blob([1]), b"1")])).fields["result"] == "ok"
    victim.node.state.queues[f"{hostile.NAME}/in"].deliveries[1] = 5000
    fail = Message("fail", {"queue": f"{hostile.NAME}/in", "id": 1, "fence": ["n", "boot", 1], "error": {}, "delay_ms": 0})
    victim.node.step(LOCAL_SESSION, fail, victim.now_ms)
    victim.carry()
