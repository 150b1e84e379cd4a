"""Sinks that several pipelines share; copied beside each pipeline.py. Each writes its file when its process ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from p2pcluster import current, sink


def here(name: str) -> Path:
    return Path(current().out_dir) / name


@sink
class Total:
    """How many values, their sum, and when the first and the last of `items` came."""

    def __enter__(self) -> Total:
        self.items: int = current().params["items"]
        self.count = self.total = 0
        self.first_s: float | None = None
        self.last_s: float | None = None
        here("Total.pid").write_text(str(os.getpid()))
        return self

    def __call__(self, value: int) -> None:
        self.count += 1
        self.total += value
        if self.count == 1:
            self.first_s = time.monotonic()
        if self.count == self.items:
            self.last_s = time.monotonic()

    def __exit__(self, *error: object) -> None:
        found = {"count": self.count, "total": self.total, "first_s": self.first_s, "last_s": self.last_s}
        here("Total.json").write_text(json.dumps(found))


@sink
class Latencies:
    """How long ago each value, a time of the monotonic clock, was made."""

    def __enter__(self) -> Latencies:
        self.took_ms: list[float] = []
        return self

    def __call__(self, made_s: float) -> None:
        self.took_ms.append(1000 * (time.monotonic() - made_s))

    def __exit__(self, *error: object) -> None:
        here("Latencies.json").write_text(json.dumps(self.took_ms))
