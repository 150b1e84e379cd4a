"""Tasks that sleep, eight at a time. The source waits for all eight processes: their start is not to be measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

from common import here

from p2pcluster import Pipeline, current, sink, source, stage

PROCESSES = 8
NAP_S = 0.01
READY_S = 60.0


@source
def tasks() -> Iterator[int]:
    deadline_s = time.monotonic() + READY_S
    while len(list(here(".").glob("*.ready"))) < PROCESSES and time.monotonic() < deadline_s:
        time.sleep(0.01)
    yield from range(current().params["items"])


@stage(processes=PROCESSES)
class Nap:
    def __enter__(self) -> Nap:
        here(f"{os.getpid()}.ready").touch()
        return self

    def __call__(self, number: int) -> tuple[float, float]:
        began_s = time.monotonic()
        time.sleep(NAP_S)
        return began_s, time.monotonic()

    def __exit__(self, *error: object) -> None:
        pass


@sink
class Collect:
    """When each nap began and ended."""

    def __enter__(self) -> Collect:
        self.naps: list[tuple[float, float]] = []
        return self

    def __call__(self, nap: tuple[float, float]) -> None:
        self.naps.append(nap)

    def __exit__(self, *error: object) -> None:
        here("Collect.json").write_text(json.dumps(self.naps))


pipeline = Pipeline("w2", tasks >> Nap >> Collect, params={"items": 2000})
