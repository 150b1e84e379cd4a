"""Small items as fast as they go, beside a source that prints ten thousand lines in each second of every other phase."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

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
    """Silent and talking in turns, once the items flow; when each phase began and ended, and how many lines there were."""
    deadline_s = time.monotonic() + READY_S
    while not here("flows").exists() and time.monotonic() < deadline_s:
        time.sleep(BEAT_S)
    phases = []
    for number in range(current().params["phases"]):
        begin_s = time.monotonic()
        lines = _talk_until(begin_s, begin_s + current().params["phase_ms"] / 1000) if number % 2 else _rest_until(
            begin_s + current().params["phase_ms"] / 1000)
        phases.append((begin_s, time.monotonic(), lines))
    here("phases.new").write_text(json.dumps(phases))
    here("phases.new").rename(here("phases.json"))
    yield DROP


def _talk_until(begin_s: float, end_s: float) -> int:
    lines = 0
    while (now_s := time.monotonic()) < end_s:
        while lines < (now_s - begin_s) * LINES_PER_S:
            print("a line as long as such lines are, with a number of its own:", lines)
            lines += 1
        time.sleep(BEAT_S)
    return lines


def _rest_until(end_s: float) -> int:
    while time.monotonic() < end_s:
        time.sleep(BEAT_S)
    return 0


pipeline = Pipeline("logs", numbers >> square >> Count, talk >> sink(lambda value: None, name="nobody"), params={"phases": 10, "phase_ms": 1000})
