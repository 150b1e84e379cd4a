"""One item at a time at an idle pipeline, by a source."""

from __future__ import annotations

import time
from collections.abc import Iterator

from common import Latencies

from p2pcluster import Pipeline, current, source

PAUSE_S = 0.02


@source
def stamps() -> Iterator[float]:
    for _ in range(current().params["items"]):
        time.sleep(PAUSE_S)
        yield time.monotonic()


pipeline = Pipeline("latency_source", stamps >> Latencies, params={"items": 300})
