"""Small items as fast as they go, beside a source that prints ten thousand lines a second: in every other phase into nothing."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from common import here

from p2pcluster import DROP, Pipeline, current, sink, source, stage

READY_S = 30.0
LINES_PER_S = 10_000
BEAT_S = 0.005
SAMPLE_S = 0.02


@source
def numbers() -> Iterator[dict[str, int]]:
    number = 0
    while number % 1000 or not here("phases.json").exists():
        yield {"number": number}
        number += 1


@stage(processes=1)
def square(item: dict[str, int]) -> int:
    return item["number"] ** 2


@sink
class Count:
    """How many values had come by when."""

    def __enter__(self) -> Count:
        self.count = 0
        self.samples: list[tuple[float, int]] = []
        return self

    def __call__(self, value: int) -> None:
        self.count += 1
        if self.count % 100 == 0:
            now_s = time.monotonic()
            if not self.samples or now_s - self.samples[-1][0] >= SAMPLE_S:
                self.samples.append((now_s, self.count))
                if len(self.samples) == 1:
                    here("flows").touch()

    def __exit__(self, *error: object) -> None:
        here("samples.json").write_text(json.dumps(self.samples))


@source
def talk() -> Iterator[object]:
    """Into nothing and aloud in turns, once the items flow; when each phase began and ended, and how many lines were aloud."""
    deadline_s = time.monotonic() + READY_S
    while not here("flows").exists() and time.monotonic() < deadline_s:
        time.sleep(BEAT_S)
    phases = []
    with open(os.devnull, "w", buffering=1) as nothing:
        for number in range(current().params["phases"]):
            begin_s = time.monotonic()
            lines = _talk(begin_s, begin_s + current().params["phase_ms"] / 1000, sys.stdout if number % 2 else nothing)
            phases.append((begin_s, time.monotonic(), lines if number % 2 else 0))
    here("phases.new").write_text(json.dumps(phases))
    here("phases.new").rename(here("phases.json"))
    yield DROP


def _talk(begin_s: float, end_s: float, out: TextIO) -> int:
    lines = 0
    while (now_s := time.monotonic()) < end_s:
        while lines < (now_s - begin_s) * LINES_PER_S:
            print("a line as long as such lines are, with a number of its own:", lines, file=out)
            lines += 1
        time.sleep(BEAT_S)
    return lines


pipeline = Pipeline("logs", numbers >> square >> Count, talk >> sink(lambda value: None, name="nobody"), params={"phases": 10, "phase_ms": 1000})
