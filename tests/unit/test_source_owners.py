"""Which process of a source is the one, where a cut network has left several: the last one that the log assigned."""

from __future__ import annotations

from random import Random

from p2pcluster import Queue, source
from p2pcluster.core.codec import Message
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.log import Log
from p2pcluster.core.node import Node, Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from tests import hostile


@source
def Numbers() -> object:
    yield 1


class Leader:
    """A node that leads alone, and other machines of which the test says what they say."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.node = Node("n", Random(0), HardState(), Log(), State(), Configuration(("n",)), 0, 0)
        while not self.node.is_serving:
            self.pass_time()
        self.node.open_session(Session("client", "client", "client", "boot", "client"))
        manifest = Pipeline("p", Numbers >> Queue("out", maxsize=None)).manifest()
        for message in hostile.deploying("p"):
            fields = {**message.fields, "req": 1} | ({"manifest": manifest} if message.kind == "deploy" else {})
            self.node.step("client", message._replace(fields=fields), self.now_ms)
            self.carry()

    def pass_time(self) -> None:
        self.now_ms += 300
        self.node.tick(self.now_ms)
        self.carry()

    def carry(self) -> list[tuple[str, Message]]:
        sent = []
        while self.node.has_ready():
            self.node.advance(self.node.ready())
        for session, item in self.node.take_outbox():
            assert isinstance(item, Message)
            sent.append((session, item))
        return sent

    def join(self, name: str, *sources: str) -> None:
        """A machine comes, and says which sources it runs."""
        self.node.open_session(Session(name, "node", name, "boot", name, {"slots": 2}))
        self.node.step(name, Message("report", {"held": {}, "sources": list(sources), "ran_before": {}}), self.now_ms)
        self.carry()

    def epoch(self) -> int:
        ((_, producer),) = self.node.state.producers.items()
        return producer.epoch


def test_a_process_that_was_replaced_while_its_machine_was_cut_off_ends_without_disturbing_its_successor() -> None:
    leader = Leader()
    leader.join("one")
    for _ in range(5):
        leader.pass_time()
    ((key, producer),) = leader.node.state.producers.items()
    assert producer.node == "one"
    leader.node.close_session("one")
    leader.join("two")
    for _ in range(5):
        leader.pass_time()
    assert leader.node.state.producers[key].node == "two"
    epoch = leader.epoch()
    leader.join("one", key)  # it is back, and its process goes on until its next put is refused
    leader.node.step("one", Message("source_lost", {"pipeline": "p", "stage": "Numbers", "shard": 0}), leader.now_ms)
    for _ in range(5):
        leader.pass_time()
    assert leader.epoch() == epoch, "a new assignment would end the process that is good"
    leader.node.step("two", Message("source_lost", {"pipeline": "p", "stage": "Numbers", "shard": 0}), leader.now_ms)
    for _ in range(5):
        leader.pass_time()
    assert leader.epoch() == epoch + 1
