"""What a stage process prints: whole lines with tags, whoever prints them and however."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator

import pytest

from p2pcluster.core.loglines import LogLine, for_log, for_terminal, read
from p2pcluster.output import Lines, LinesHandler, tag_logging


class Pipe:
    """A pipe with a stream of a stage process at one end; `item` is what is in hand."""

    def __init__(self) -> None:
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self.item: int | None = 5
        self.raw = io.TextIOWrapper(os.fdopen(write_fd, "wb", buffering=0), encoding="utf-8", write_through=True)
        self.lines = Lines(self.raw, "out", lambda: self.item)

    def bytes(self) -> bytes:
        try:
            return os.read(self.read_fd, 1 << 20)
        except BlockingIOError:
            return b""

    def came(self) -> list[LogLine]:
        return list(read(for_log(self.bytes())))


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.raw.close()
    os.close(made.read_fd)


def test_each_line_has_the_item_and_the_level(pipe: Pipe) -> None:
    print("one", 2, file=pipe.lines)
    pipe.item = None
    print("three\nfour", file=pipe.lines)
    assert [(line.item, line.level, line.text) for line in pipe.came()] == [("5", "out", "one 2"), ("-", "out", "three"), ("-", "out", "four")]


def test_a_line_that_comes_in_pieces_is_one_line(pipe: Pipe) -> None:
    print("a", end="", file=pipe.lines)
    print("b", end="", file=pipe.lines)
    assert pipe.bytes() == b""
    print("c", file=pipe.lines)
    assert [line.text for line in pipe.came()] == ["abc"]


def test_a_flush_sends_what_was_begun_and_the_rest_of_the_line_continues_it(pipe: Pipe) -> None:
    print("half", end="", flush=True, file=pipe.lines)
    begun = pipe.bytes()
    assert begun.endswith(b"half")
    print(" and half", end="", flush=True, file=pipe.lines)
    print("\nnext", file=pipe.lines)
    assert for_terminal(begun + pipe.bytes(), b"S | ") == b"S | half and half\nS | next\n"


def test_a_bar_that_is_drawn_over_and_over_is_sent_in_time(pipe: Pipe) -> None:
    for _ in range(400):
        pipe.lines.write("\r" + "#" * 60)
    assert len(pipe.bytes()) > 1 << 14


def test_marks_in_the_users_text_are_no_marks(pipe: Pipe) -> None:
    print("a\x1eb\x1fc", file=pipe.lines)
    assert [line.text for line in pipe.came()] == ["a?b?c"]


def test_half_a_surrogate_pair_is_printed_as_what_it_is(pipe: Pipe) -> None:
    print("half \ud83d", file=pipe.lines)
    assert [line.text for line in pipe.came()] == ["half \\ud83d"]


def test_it_looks_like_a_stream(pipe: Pipe) -> None:
    assert pipe.lines.writable() and not pipe.lines.isatty() and pipe.lines.encoding == "utf-8"
    assert pipe.lines.fileno() == pipe.raw.fileno()
    pipe.lines.reconfigure(line_buffering=False)
    pipe.lines.buffer.write(b"raw\n")
    assert pipe.bytes() == b"raw\n"
    with pytest.raises(TypeError, match="must be str, not bytes"):
        pipe.lines.write(b"bytes")  # type: ignore[arg-type]


def test_a_finalizer_that_prints_while_something_is_printed_does_not_wait_for_itself(pipe: Pipe) -> None:
    def item() -> int | None:
        if not inner:
            inner.append(True)
            print("inner", file=pipe.lines)
        return None

    inner: list[bool] = []
    pipe.lines = Lines(pipe.raw, "out", item)
    print("outer", file=pipe.lines)
    assert {line.text for line in pipe.came()} == {"inner", "outer"}


def test_records_have_levels_and_those_below_warning_are_not_for_the_terminal(pipe: Pipe) -> None:
    log = logging.Logger("x")
    log.addHandler(LinesHandler(pipe.lines))
    log.info("quiet")
    log.warning("loud %s", 1)
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    log.critical("end")
    log.debug("detail")
    came = pipe.bytes()
    found = list(read(for_log(came)))
    assert [(line.level, line.text) for line in found][:3] == [("info", "quiet"), ("warning", "loud 1"), ("error", "failed")]
    assert [(line.level, line.text) for line in found][-2:] == [("critical", "end"), ("debug", "detail")]
    assert ("error", "ValueError: no") in [(line.level, line.text) for line in found]
    shown = for_terminal(came, b"")
    assert b"loud 1\n" in shown and b"ValueError: no\n" in shown and b"quiet" not in shown and b"detail" not in shown


def test_a_project_that_set_logging_up_keeps_what_it_has(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    mine = logging.NullHandler()
    root.addHandler(mine)
    tag_logging(pipe.lines)
    assert root.handlers == [mine] and root.level == logging.WARNING
    root.removeHandler(mine)
    tag_logging(pipe.lines)
    assert root.level == logging.INFO
    root.info("seen")
    assert [(line.level, line.text) for line in pipe.came()] == [("info", "seen")]
