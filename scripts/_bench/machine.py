"""What can be measured of processes and of the machine from outside: CPU time, memory, the disk's fsync.

Refuses to know what runs in a process. Figures that only Linux's /proc gives are missing elsewhere, never guessed.
"""

from __future__ import annotations

import math
import os
import platform
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

SAMPLE_INTERVAL_S = 0.05
FSYNC_PROBES = 50
FSYNC_PROBE_BYTES = 4096

_PROC = Path("/proc")


class Usage(NamedTuple):
    """Of one process: CPU time since its start, and resident memory."""

    cpu_s: float
    rss_bytes: int


def usage_of(pid: int) -> Usage | None:
    """None for a process that is gone, or where there is no /proc."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system, rss_pages = int(fields[11]), int(fields[12]), int(fields[21])
    return Usage((user + system) / os.sysconf("SC_CLK_TCK"), rss_pages * os.sysconf("SC_PAGE_SIZE"))


def children_of(pid: int) -> list[int]:
    """The processes that the main thread of `pid` has started and that still run."""
    try:
        return [int(word) for word in (_PROC / str(pid) / "task" / str(pid) / "children").read_text().split()]
    except OSError:
        return []


class Sampler:
    """Looks at a process and its children again and again, in a thread, while the `with` lasts."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._samples: list[tuple[float, dict[int, Usage]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def pids(self) -> list[int]:
        """Every process that was seen, in the order in which they came."""
        return list(dict.fromkeys(pid for _, usages in self._samples for pid in usages))

    def cpu_s_between(self, pid: int, start_s: float, end_s: float) -> float | None:
        """CPU time between two moments of `time.monotonic`, on the lines between the samples; None: it was not seen."""
        known = [(at_s, usages[pid].cpu_s) for at_s, usages in self._samples if pid in usages]
        if not known:
            return None
        return _value_at(known, end_s) - _value_at(known, start_s)

    def rss_bytes_max(self, pid: int) -> int | None:
        return max((usages[pid].rss_bytes for _, usages in self._samples if pid in usages), default=None)

    def _run(self) -> None:
        while not self._stop.is_set():
            usages = {pid: usage for pid in (self.pid, *children_of(self.pid)) if (usage := usage_of(pid)) is not None}
            self._samples.append((time.monotonic(), usages))
            self._stop.wait(SAMPLE_INTERVAL_S)


def _value_at(known: Sequence[tuple[float, float]], at_s: float) -> float:
    """Between two samples: on the straight line that joins them."""
    before = known[0]
    for sample in known:
        if sample[0] >= at_s:
            span_s = sample[0] - before[0]
            return before[1] + (sample[1] - before[1]) * ((at_s - before[0]) / span_s if span_s > 0 else 0.0)
        before = sample
    return known[-1][1]


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    assert ordered and 0 < share <= 1, "a percentile of nothing"
    return ordered[math.ceil(share * len(ordered)) - 1]


def fsync_ms(folder: Path) -> float:
    """What a small write and its fsync cost in `folder`: the median of some. A disk in memory shows itself here."""
    path = folder / "fsync-probe"
    took_ms = []
    with path.open("wb", buffering=0) as file:
        for _ in range(FSYNC_PROBES):
            started_s = time.perf_counter()
            file.write(bytes(FSYNC_PROBE_BYTES))
            os.fsync(file.fileno())
            took_ms.append(1000 * (time.perf_counter() - started_s))
    path.unlink()
    return percentile(took_ms, 0.5)


def describe(folder: Path) -> dict[str, Any]:
    """The machine that the figures belong to; `folder` lies on the disk that the journals are written to."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cores": os.cpu_count(), "memory_gb": None if memory_bytes is None else memory_bytes / (1 << 30),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version, "fsync_ms": fsync_ms(folder),
    }
