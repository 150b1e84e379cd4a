"""Lines of stages: their tags, what a terminal shows of them, and what is stored."""

from __future__ import annotations

import time
from random import Random

import pytest

from p2pcluster.core import loglines
from p2pcluster.core.loglines import LogLine, clean, for_log, for_terminal, note, read, tag, tagged, utc

AT = "2026-11-24T11:54:20.752Z"


def lines(*texts: str, level: str = "out", item: int | None = 7, is_shown: bool = True) -> bytes:
    return "".join(f"{tag(AT, item, level, is_shown)}{text}\n" for text in texts).encode()


def test_times_are_those_of_the_calendar() -> None:
    random = Random(1)
    for second in [0, 951_782_399, 951_782_400, 1_709_164_800, 4_107_542_399, *(random.randrange(0, 20_000_000_000) for _ in range(2000))]:
        assert utc(1000 * second + 7) == time.strftime("%Y-%m-%dT%H:%M:%S.007Z", time.gmtime(second))


def test_a_terminal_shows_the_text_behind_the_stages_name() -> None:
    assert for_terminal(lines("one", "", "three"), b"Print | ") == b"Print | one\nPrint | \nPrint | three\n"


def test_a_name_with_a_backslash_is_shown_as_it_is() -> None:
    assert for_terminal(lines("x"), rb"a\1\g<0> | ") == rb"a\1\g<0> | x" + b"\n"


def test_a_terminal_does_not_show_what_is_for_the_log_only() -> None:
    both = lines("seen") + lines("unseen", level="info", is_shown=False) + lines("seen too")
    assert for_terminal(both, b"") == b"seen\nseen too\n"
    assert [line.text for line in read(for_log(both))] == ["seen", "unseen", "seen too"]


def test_what_is_stored_is_read_back() -> None:
    stored = for_log(lines("a | b", "") + lines("no item", level="warning", item=None)) + note(AT, "3 lines left out")
    assert list(read(stored)) == [LogLine(AT, "7", "out", "a | b"), LogLine(AT, "7", "out", ""), LogLine(AT, "-", "warning", "no item"),
                                  LogLine(AT, "-", "note", "3 lines left out")]


def test_lines_of_other_programs_get_the_tag_that_the_node_has_for_them() -> None:
    mixed = b"raw\n" + lines("ours") + b"raw again\n"
    found = list(read(for_log(tagged(mixed, tag(AT, None, "err")))))
    assert [(line.level, line.text) for line in found] == [("err", "raw"), ("out", "ours"), ("err", "raw again")]
    assert tagged(lines("ours", "ours too"), "other") == lines("ours", "ours too")


@pytest.mark.parametrize("raw", [b"\x1e\n", b"a\x1eb\x1fc\n", b"\x1f\n\x1d\n", b"\x1e\x1f\n", b"\xff\xfe\n", b"\r\n", b"\n\n"])
def test_whatever_a_program_writes_is_one_line_for_each_of_its_lines(raw: bytes) -> None:
    found = tagged(raw + lines("ours"), tag(AT, None, "out"))
    assert found.count(b"\n") == raw.count(b"\n") + 1
    assert list(read(for_log(found)))[-1] == LogLine(AT, "7", "out", "ours")


def test_the_users_text_holds_no_marks() -> None:
    assert clean("a\x1eb\x1fc\x1dd") == "a?b?c?d"
    assert clean("plain") == "plain"


def test_what_is_no_stored_line_is_left_out() -> None:
    assert list(read(b"cut in the middle | x\n" + note(AT, "whole") + b"2026 7 shouting | x\n\n")) == [LogLine(AT, "-", "note", "whole")]
    assert "note" in loglines.LEVELS
