"""Where work on the journal happens: in the loop while commits are fast, in a thread when they are slow; and the bytes of granted items.

What is written is the loop's affair, and how it lies in the file the journal's.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from p2pcluster.core.codec import Buffer
from p2pcluster.core.chunks import Chunk
from p2pcluster.journal import Compaction, Journal, Write

COMMIT_FAST_S = 0.003  # commits that take longer on average go to a thread
COMMIT_WEIGHT = 0.2  # of the newest commit in that average


class Committer:
    """Work on the journal, inline or in a thread; one piece at a time. `wake` is called from the thread when one is done."""

    def __init__(self, journal: Journal, wake: Callable[[], None]) -> None:
        self.journal = journal
        self.seconds = 0.0
        self._wake = wake
        self._lock = threading.Condition()
        self._job: Callable[[], Compaction] | None = None
        self._result: Compaction | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._job is not None

    @property
    def is_slow(self) -> bool:
        return self.seconds > COMMIT_FAST_S

    def write(self, write: Write) -> Compaction:
        """Write now; durable when this returns. Raises `JournalError`."""
        started_s = time.monotonic()
        compaction = self.journal.write(write)
        self.seconds += COMMIT_WEIGHT * (time.monotonic() - started_s - self.seconds)
        return compaction

    def begin(self, job: Callable[[], Compaction]) -> None:
        """Do `job` in the thread; `take_finished` says when it is done."""
        assert self._job is None, "one piece at a time"
        if self._thread is None:
            sys.setswitchinterval(0.0005)  # a thread that waits for the interpreter waits this long, ten times less than usual
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        with self._lock:
            self._job, self._result = job, None
            self._lock.notify()

    def take_finished(self) -> Compaction | None:
        """What the job that was begun gave, once it is done. Raises what it raised."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._result is None:
                return None
            result, self._job, self._result = self._result, None, None
            return result

    def wait(self) -> None:
        """Until the job that was begun is over."""
        with self._lock:
            while self._job is not None and self._result is None and self._error is None:
                self._lock.wait()

    def _run(self) -> None:
        while True:
            with self._lock:
                while self._job is None or self._result is not None or self._error is not None:
                    self._lock.wait()
                job = self._job
            result: Compaction | None = None
            error: BaseException | None = None
            try:
                result = job()
            except BaseException as caught:  # it belongs to the loop, which raises it again
                error = caught
            with self._lock:
                self._result, self._error = result, error
                self._lock.notify_all()
            self._wake()


class Bodies:
    """The bytes of granted items: from memory, or read again from the journal; of each queue the last chunk stays at hand."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._last: dict[str, tuple[Chunk, bytes, bytes]] = {}

    def of(self, queue: str, chunk: Chunk, lo: int, hi: int) -> tuple[Buffer, Buffer]:
        if chunk.body is not None:
            return chunk.slice(lo, hi)
        found = self._last.get(queue)
        if found is None or found[0] is not chunk:
            lengths, body = self._journal.read_bodies(queue, chunk)
            found = self._last[queue] = (chunk, lengths, body)
        return chunk.slice_of(found[1], found[2], lo, hi)
