"""Which process of a source is the one, where a cut network has left several: the last one that the log assigned."""

from __future__ import annotations

from p2pcluster import Queue, source
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Executor, ToLeader
from p2pcluster.core.graph import Pipeline
from tests import plans
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


def test_what_a_draining_node_s_source_still_emits_counts_until_its_process_has_ended() -> None:
    leader = Leader()
    leader.deploy(Pipeline("p", Numbers >> Queue("out", maxsize=None)))
    leader.join("one")
    leader.settle()
    leader.join("two")
    leader.settle()
    before = epoch(leader)
    draining = {"service_us": {}, "running": {}, "troubles": {}, "trials": {}, "draining": True}
    leader.node.step("one", Message("stats", draining), leader.now_ms)
    leader.settle()
    assert leader.owners() == {"one"} and epoch(leader) == before, "another epoch would refuse what it has emitted already"
    leader.node.step("one", Message("source_lost", {"pipeline": "p", "stage": "Numbers", "shard": 0}), leader.now_ms)
    leader.settle()
    assert leader.owners() == {"two"}


def test_a_source_that_comes_to_a_machine_that_drains_goes_back_to_the_leader() -> None:
    """It wanted to leave and could not yet; its source was nobody's, and the run did not end."""
    executor = Executor("here")
    executor.on_leader(plans.plan(plans.planned(plans.manifest_of(plans.stage_of(kind="source")))), 0)
    executor.drain()
    executor.take_actions()
    where = {"pipeline": "p", "stage": "S", "shard": 0}
    executor.on_leader(Message("assigned", {**where, "producer": "source:p/1/S/0", "epoch": 1, "seq": 0, "count": 0, "hash": ""}), 10)
    told = [action.message for action in executor.take_actions() if isinstance(action, ToLeader)]
    assert [message.fields for message in told if message.kind == "source_lost"] == [where]
    assert executor.is_idle
