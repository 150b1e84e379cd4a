"""A pipeline with nothing to do: three stage processes that wait."""

from __future__ import annotations

from p2pcluster import Pipeline, Queue, sink, stage


@stage(processes=2)
def same(value: int) -> int:
    return value


@sink
def forget(value: int) -> None:
    pass


pipeline = Pipeline("idle", Queue("values") >> same >> forget)
