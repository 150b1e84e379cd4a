"""A run's end is told at once, and not with the next plan that is due."""

from __future__ import annotations

from p2pcluster import Queue, sink
from p2pcluster.core.codec import Message
from p2pcluster.core.graph import Pipeline
from tests.leader import Leader


@sink
def Print(x: object) -> None:
    pass


def report() -> None:
    pass


def test_the_machines_hear_at_the_next_tick_that_the_run_is_over() -> None:
    leader = Leader()
    leader.deploy(Pipeline("p", Queue("in") >> Print, on_done=report))
    leader.join("one")
    leader.settle()
    leader.node.step("client", Message("close", {"req": 1, "pipeline": "p", "name": "in"}), leader.now_ms)
    leader.settle()
    assert leader.plan("one")["pipelines"]["p"]["state"] == "done" and not leader.plan("one")["pipelines"]["p"]["is_over"]
    leader.node.step("one", Message("on_done_ran", {"req": 1, "pipeline": "p", "run": 1}), leader.now_ms)
    leader.carry()
    leader.pass_time(10)
    assert leader.plan("one")["pipelines"]["p"]["is_over"]
