"""A pipeline with nothing to do: three stage processes that wait."""

from p2pcluster import Pipeline, Queue, sink, stage


@stage(processes=2)
def same(value):
    return value


@sink
def forget(value):
    pass


pipeline = Pipeline("idle", Queue("values") >> same >> forget)
