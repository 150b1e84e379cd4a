"""Which process of a source is the one, where a cut network has left several: the last one that the log assigned."""

from __future__ import annotations

from p2pcluster import Queue, source
from p2pcluster.core.codec import Message
from p2pcluster.core.graph import Pipeline
from tests.leader import Leader


@source
def Numbers() -> object:
    yield 1


def epoch(leader: Leader) -> int:
    ((_, producer),) = leader.node.state.producers.items()
    return producer.epoch


def test_a_process_that_was_replaced_while_its_machine_was_cut_off_ends_without_disturbing_its_successor() -> None:
    leader = Leader()
    leader.deploy(Pipeline("p", Numbers >> Queue("out", maxsize=None)))
    leader.join("one")
    leader.settle()
    ((key, producer),) = leader.node.state.producers.items()
    assert producer.node == "one"
    leader.node.close_session("one")
    leader.join("two")
    leader.settle()
    assert leader.node.state.producers[key].node == "two"
    before = epoch(leader)
    leader.join("one", key)  # it is back, and its process goes on until its next put is refused
    leader.node.step("one", Message("source_lost", {"pipeline": "p", "stage": "Numbers", "shard": 0}), leader.now_ms)
    leader.settle()
    assert epoch(leader) == before, "a new assignment would end the process that is good"
    leader.node.step("two", Message("source_lost", {"pipeline": "p", "stage": "Numbers", "shard": 0}), leader.now_ms)
    leader.settle()
    assert epoch(leader) == before + 1


def test_a_node_that_drains_for_as_long_as_it_takes_holds_no_source_back() -> None:
    """It wanted to leave and could not yet; the source that was its was nobody's, and the run did not end."""
    leader = Leader()
    leader.deploy(Pipeline("p", Numbers >> Queue("out", maxsize=None)))
    leader.join("one")
    leader.settle()
    leader.join("two")
    leader.settle()
    assert leader.owners() == {"one"}
    draining = {"service_us": {}, "running": {}, "troubles": {}, "trials": {}, "draining": True}
    leader.node.step("one", Message("stats", draining), leader.now_ms)
    leader.settle()
    assert leader.owners() == {"two"}
