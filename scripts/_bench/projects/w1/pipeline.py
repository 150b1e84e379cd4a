"""Small items, squared, added up: each of the three in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from common import Total, here

from p2pcluster import Pipeline, current, source, stage

READY_S = 30.0


@source
def numbers() -> Iterator[dict[str, int]]:
    here("numbers.pid").write_text(str(os.getpid()))
    deadline_s = time.monotonic() + READY_S
    while not here("Total.pid").exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    for number in range(current().params["items"]):
        yield {"number": number}


@stage(processes=1)
def square(item: dict[str, int]) -> int:
    return item["number"] ** 2


pipeline = Pipeline("w1", numbers >> square >> Total, params={"items": 1_000_000})
