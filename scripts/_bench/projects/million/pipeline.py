"""Numbers into a queue that nobody reads yet."""

from __future__ import annotations

from collections.abc import Iterator

from p2pcluster import Pipeline, Queue, current, source


@source
def numbers() -> Iterator[dict[str, int]]:
    for number in range(current().params["items"]):
        yield {"number": number}


pipeline = Pipeline("million", numbers >> Queue("waiting", maxsize=None), params={"items": 1_000_000})
