"""What a verb waits for, said to the person at the terminal once it takes longer than a blink."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Self

from p2pcluster.client import Link
from p2pcluster.config import Options
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterError

SAID_AFTER_S = 1.0


class Waiting:
    """A context manager: who is inside it for longer than `SAID_AFTER_S` has a line on standard error, one for each thing waited for."""

    def __init__(self) -> None:
        self.what = ""
        self.trouble: ClusterError | None = None
        self._told: set[str] = set()
        self._timer: threading.Timer | None = None

    def hear(self, trouble: ClusterError | None) -> None:
        """Why the last try failed."""
        self.trouble = trouble

    def __enter__(self) -> Self:
        self._timer = threading.Timer(SAID_AFTER_S, self._say)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._timer is not None, "it was entered"
        self._timer.cancel()

    def _say(self) -> None:
        if self.what not in self._told:
            self._told.add(self.what)
            print(f"waiting for {self.what}" + (f" ({self.trouble})" if self.trouble else ""), file=sys.stderr, flush=True)


class TellingLink(Link):
    """The link of a verb: it says what it waits for."""

    def __init__(self, options: Options, timeout_s: float) -> None:
        self._waiting = Waiting()
        self._waiting.what = f"a node of cluster {options.cluster!r}, at most {timeout_s:g} s"
        with self._waiting:
            super().__init__(options, timeout_s, on_try=self._waiting.hear)

    def call(self, message: Message, timeout_s: float | None = None) -> Message:
        self._waiting.what = "room in a full queue" if message.kind == "put" else "an answer of the node that leads"
        with self._waiting:
            return super().call(message, timeout_s)
