"""What a node keeps of what its stages print: how much, in memory and in files, and what it says of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2pcluster import config
from p2pcluster.core.loglines import LogLine, read, tag
from p2pcluster.logbook import Logbook, Piece


def lines(*texts: str) -> bytes:
    return "".join(f"{tag('2026-11-24T11:54:20.752Z', 1, 'out')}{text}\n" for text in texts).encode()


def texts(pieces: list[Piece]) -> dict[str, list[str]]:
    return {piece.stage: [line.text for line in read(piece.lines)] for piece in pieces}


class Books:
    """A logbook with small limits, and what it complained of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.troubles: list[str] = []
        self.book = Logbook(folder, self.troubles.append)

    def since(self, stage: str | None = None, after: dict[str, int] | None = None, bytes_max: int = 1 << 20) -> list[Piece]:
        return list(self.book.since("p" if stage else None, stage, after or {}, bytes_max))


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Books:
    limits: dict[str, Any] = {"LOG_RING_LINES": 10, "LOG_RING_BYTES": 4000, "LOG_LINES_PER_S_MAX": 100, "LOG_FILE_BYTES": 500, "LOGS_BYTES_MAX": 3000,
                              "LOG_WRITE_BYTES": 1}
    for name, value in limits.items():
        monkeypatch.setattr(config, name, value)
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.5)
    return Books(tmp_path)


def test_lines_are_kept_by_stage_and_asked_for_by_pipeline_and_stage(books: Books) -> None:
    books.book.add("p/A", lines("a1", "a2"))
    books.book.add("p/B", lines("b1"))
    books.book.add("q/A", lines("c1"))
    assert texts(books.since()) == {"p/A": ["a1", "a2"], "p/B": ["b1"], "q/A": ["c1"]}
    assert texts(books.since("A")) == {"p/A": ["a1", "a2"]}


def test_who_asks_again_gets_what_came_since(books: Books) -> None:
    books.book.add("p/A", lines("a1", "a2"))
    (piece,) = books.since()
    assert (piece.first, piece.line_count) == (0, 2)
    after = {"p/A": piece.first + piece.line_count}
    assert books.since(after=after) == []
    books.book.add("p/A", lines("a3"))
    assert texts(books.since(after=after)) == {"p/A": ["a3"]}


def test_the_last_lines_are_kept_and_their_numbers_say_how_many_went(books: Books) -> None:
    for number in range(30):
        books.book.add("p/A", lines(f"line {number}"))
    (piece,) = books.since(after={"p/A": 5})
    assert [line.text for line in read(piece.lines)] == [f"line {number}" for number in range(20, 30)]
    assert piece.first == 20, "fifteen lines that were not asked for in time are gone"


def test_bytes_have_a_bound_too_and_the_newest_part_always_stays(books: Books) -> None:
    books.book.add("p/A", lines("x" * 3000))
    books.book.add("p/A", lines("y" * 3900))
    assert [text[0] for text in texts(books.since())["p/A"]] == ["y"]


def test_an_answer_has_a_bound_and_leaves_out_the_oldest(books: Books) -> None:
    for number in range(4):
        books.book.add("p/A", lines(f"{number}" * 500))
        books.book.add("p/B", lines("b"))
    found = texts(books.since(bytes_max=1600))
    assert [text[0] for text in found["p/A"]] == ["3"] and found["p/B"] == ["b"] * 4


def test_more_in_a_second_than_is_kept_is_counted_and_the_count_is_said_when_there_is_room_again(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    books.book.add("p/A", lines(*map(str, range(90))))
    books.book.add("p/A", lines(*map(str, range(60))))
    books.book.add("p/A", lines("one more"))
    assert len(texts(books.since())["p/A"]) == 90
    monkeypatch.setattr("time.time", lambda: 1_000_000_001.0)
    books.book.add("p/A", lines("next second"))
    (piece,) = books.since(after={"p/A": 90})
    said, after = read(piece.lines)
    assert (said.level, said.text) == ("note", "61 lines left out: it printed more than is kept of a second")
    assert after.text == "next second"


def test_lines_are_written_together_after_a_while_or_when_they_are_many(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LOG_WRITE_BYTES", 200)
    file = books.folder / "p" / "A.log"
    books.book.add("p/A", lines("a"))
    books.book.tick()
    assert not file.exists()
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.5 + config.LOG_WRITE_S)
    books.book.tick()
    assert [line.text for line in read(file.read_bytes())] == ["a"]
    books.book.add("p/A", lines("b" * 200))
    assert [line.text for line in read(file.read_bytes())] == ["a", "b" * 200]
    books.book.add("p/A", lines("c"))
    books.book.close()
    assert [line.text for line in read(file.read_bytes())] == ["a", "b" * 200, "c"]


def test_files_are_rotated_and_bounded_together(books: Books) -> None:
    for number in range(40):
        books.book.add("p/A", lines("x" * 100 + str(number)))
    files = sorted(path.name for path in books.folder.glob("p/*"))
    assert files == ["A.log", "A.log.1"]
    assert all(path.stat().st_size <= 500 for path in books.folder.glob("p/*"))
    stored = (books.folder / "p" / "A.log.1").read_bytes() + (books.folder / "p" / "A.log").read_bytes()
    numbers = [int(line.text.lstrip("x")) for line in read(stored)]
    assert numbers == list(range(numbers[0], 40))
    for stage in range(20):
        for number in range(8):
            books.book.add(f"p/S{stage}", lines("x" * 100 + str(number)))
    books.book.close()
    Books(books.folder).book.close()
    assert sum(path.stat().st_size for path in books.folder.glob("p/*")) <= 3000


def test_the_next_node_of_the_home_knows_the_last_lines(books: Books) -> None:
    books.book.add("p/A", lines("before"))
    books.book.close()
    again = Books(books.folder)
    again.book.add("p/A", lines("after"))
    assert texts(again.since()) == {"p/A": ["before", "after"]}
    stored = (books.folder / "p" / "A.log").read_bytes()
    assert [line.text for line in read(stored)] == ["before", "after"]


def test_a_folder_that_cannot_be_written_is_said_once_and_memory_goes_on(books: Books) -> None:
    (books.folder / "p").write_text("a file where a folder should be")
    books.book.add("p/A", lines("one"))
    books.book.add("p/B", lines("two"))
    assert len(books.troubles) == 1 and "is not written" in books.troubles[0] and "\n" not in books.troubles[0]
    assert texts(books.since()) == {"p/A": ["one"], "p/B": ["two"]}


def test_a_stored_line_is_one_that_can_be_read() -> None:
    assert isinstance(next(iter(read(b"2026-11-24T11:54:20.752Z 1 out | x\n"))), LogLine)
