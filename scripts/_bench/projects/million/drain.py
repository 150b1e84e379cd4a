"""The version that comes after: it reads what waits. Its source has nothing to add."""

from common import Total

from p2pcluster import Pipeline, Queue, source, stage


@source
def numbers():
    yield from ()


@stage(processes=1)
def square(item):
    return item["number"] ** 2


pipeline = Pipeline("million", numbers >> Queue("waiting", maxsize=None) >> square >> Total, params={"items": 1_000_000})
