"""What a stage process prints and logs, on its way into the pipes to its node: line by line, each with its tag.

`sys.stdout` and `sys.stderr` are replaced by streams that do so; the logging module gets a handler, unless the project has set it up by
itself. What a library in C or a child of the process writes goes into the same pipes as it is, and the node tags it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from p2pcluster.core.loglines import clean, tag, utc

BEGUN_PARTS_MAX = 100  # of a line that does not end: a bar that is drawn over and over


class Lines(io.TextIOBase):
    """A text stream that sends whole lines. `item` tells which item is in hand."""

    def __init__(self, stream: TextIO, level: str, item: Callable[[], int | None]) -> None:
        self._stream = stream
        self._level = level
        self._item = item
        self._fd = stream.fileno()
        self._begun: list[str] = []
        self._is_open = False  # a line was begun in the pipe
        self._tag_of: tuple[int, int | None, str, bool] | None = None
        self._last_tag = ""
        self._renew_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()  # what is printed while something is printed, by a finalizer, is printed too

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    @property
    def name(self) -> str:
        return str(self._stream.name)

    @property
    def line_buffering(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def reconfigure(self, **options: Any) -> None:
        """It stays as it is: the node reads UTF-8."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if "\n" in text:
            with self._lock:
                begun, self._begun = self._begun, []
                if text == "\n":  # what print says last, each time
                    self._send("".join(begun), self._level, True)
                else:
                    *lines, rest = f"{''.join(begun)}{text}".split("\n")
                    self.send(lines, self._level)
                    self._begun.append(rest)
        else:
            with self._lock:
                self._begun.append(text)
                if len(self._begun) > BEGUN_PARTS_MAX:
                    self.flush()
        return len(text)

    def flush(self) -> None:
        """What was begun goes into the pipe, where the next words continue it."""
        with self._lock:
            begun, self._begun = clean("".join(self._begun)), []
            if begun:
                self._out(begun if self._is_open else self._tag(self._level, True) + begun)
                self._is_open = True

    def send(self, lines: list[str], level: str, is_shown: bool = True) -> None:
        """Whole lines."""
        with self._lock:
            for line in lines:
                self._send(line, level, is_shown)

    def _send(self, line: str, level: str, is_shown: bool) -> None:
        line = clean(line)
        self._out(f"{line}\n" if self._is_open else f"{self._tag(level, is_shown)}{line}\n")
        self._is_open = False

    def _tag(self, level: str, is_shown: bool) -> str:
        """Many lines have one: of the same item, in the same millisecond."""
        of = time.time_ns() // 1_000_000, self._item(), level, is_shown
        if of != self._tag_of:
            self._last_tag, self._tag_of = tag(utc(of[0]), of[1], level, is_shown), of
        return self._last_tag

    def _out(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._fd, data) :]


class LinesHandler(logging.Handler):
    """Records of the logging module as lines; below WARNING they are in the log and not on the terminal."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.send(self.format(record).split("\n"), _level(record.levelno), record.levelno >= logging.WARNING)
        except Exception:  # as each handler: a record that cannot be formatted must not end what is logged about
            self.handleError(record)


def _level(number: int) -> str:
    names = ((logging.CRITICAL, "critical"), (logging.ERROR, "error"), (logging.WARNING, "warning"), (logging.INFO, "info"))
    return next((name for least, name in names if number >= least), "debug")


def tag_output(item: Callable[[], int | None]) -> Lines:
    """From here on what is printed is tagged. Returns the stream for errors."""
    sys.stdout, sys.stderr = Lines(sys.stdout, "out", item), Lines(sys.stderr, "err", item)
    return sys.stderr


def tag_logging(errors: Lines) -> None:
    """The logging module's records too, from INFO on, unless somebody has set it up by now."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(LinesHandler(errors))
        if root.level == logging.WARNING:
            root.setLevel(logging.INFO)
