"""The version that comes after: it reads what waits. Its source has nothing to add."""

from __future__ import annotations

from collections.abc import Iterator

from common import Total

from p2pcluster import Pipeline, Queue, source, stage


@source
def numbers() -> Iterator[dict[str, int]]:
    yield from ()


@stage(processes=1)
def square(item: dict[str, int]) -> int:
    return item["number"] ** 2


waiting = Queue("waiting", maxsize=None)
pipeline = Pipeline("million", numbers >> waiting >> square >> Total, params={"items": 1_000_000})
