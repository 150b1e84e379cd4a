"""A node that leads alone, without a world around it; what other machines say, the test says. For tests of who is given what."""

from __future__ import annotations

from random import Random
from typing import Any

from p2pcluster.core.codec import Message
from p2pcluster.core.graph import Pipeline
from p2pcluster.core.log import Log
from p2pcluster.core.node import Node
from p2pcluster.core.sessions import Session
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from tests import hostile


class Leader:
    """The node, its time, and what it has sent to whom."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.sent: list[tuple[str, Message]] = []
        self.node = Node("n", Random(0), HardState(), Log(), State(), Configuration(("n",)), 0, 0)
        while not self.node.is_serving:
            self.pass_time()
        self.node.open_session(Session("client", "client", "client", "boot", "client"))

    def deploy(self, pipeline: Pipeline, origin: str = "n", python: str | None = None, version: str = "0" * 64) -> None:
        """Ship a pipeline and begin a run of it, or go on with the one that runs."""
        for message in hostile.deploying(pipeline.name, version):
            fields = {**message.fields, "req": 1}
            if message.kind == "deploy":
                project = {name: value for name, value in {**fields["project"], "python": python}.items() if value is not None}
                fields |= {"manifest": pipeline.manifest(), "origin": {"node": origin, "name": origin, "folder": "/f"}, "project": project}
            self.node.step("client", message._replace(fields=fields), self.now_ms)
            self.carry()

    def join(self, name: str, *sources: str, **facts: Any) -> None:
        """A machine comes, and says which sources it runs."""
        self.node.open_session(Session(name, "node", name, "boot", name, {"slots": 2, **facts}))
        self.node.step(name, Message("report", {"held": {}, "sources": list(sources), "ran_before": {}}), self.now_ms)
        self.carry()

    def pass_time(self, ms: int = 300) -> None:
        self.now_ms += ms
        self.node.tick(self.now_ms)
        self.carry()

    def settle(self) -> None:
        """Time for a plan, and for what it brings about."""
        for _ in range(5):
            self.pass_time()

    def carry(self) -> None:
        while self.node.has_ready():
            self.node.advance(self.node.ready())
        for session, item in self.node.take_outbox():
            assert isinstance(item, Message)
            self.sent.append((session, item))

    def plan(self, name: str) -> dict[str, Any]:
        """The last plan that a machine was sent."""
        return next(message.fields for session, message in reversed(self.sent) if session == name and message.kind == "plan")

    def processes(self, name: str) -> dict[str, int]:
        found: dict[str, int] = self.plan(name)["processes"]
        return found

    def runs_on_done(self) -> set[str]:
        """The machines that would be told to call it."""
        return {name for name, session in self.node.sessions.items() if session.kind == "node"
                and any(pipeline["runs_on_done"] for pipeline in self.plan(name)["pipelines"].values())}

    def owners(self) -> set[str]:
        """The machines that sources were assigned to."""
        return {producer.node for producer in self.node.state.producers.values()} - {""}
