"""Where the census is kept: one SQLite file, each record in it once, and the questions that its report asks.

Knows nothing of pipelines and pages. The file can be opened by anybody with an SQL shell; its one table is `records`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# The folder outlives versions of this project: whoever changes the columns changes this name too.
FILE_NAME = "census.sqlite3"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    key TEXT PRIMARY KEY, run TEXT NOT NULL, stored_at REAL NOT NULL,
    kind TEXT NOT NULL, path TEXT NOT NULL, name TEXT NOT NULL, line INTEGER NOT NULL, lines INTEGER NOT NULL,
    nesting INTEGER NOT NULL, arguments INTEGER, docstring INTEGER NOT NULL, problem TEXT
) WITHOUT ROWID
"""
_INSERT = """
INSERT INTO records VALUES (:key, :run, :stored_at, :kind, :path, :name, :line, :lines, :nesting, :arguments,
    :docstring, :problem)
ON CONFLICT (key) DO NOTHING
"""


class Database:
    """The census's file in `folder`, opened for writing.

    Invariant: it holds records of one run, each key at most once.

    When `add` has returned, the record is in the operating system's hands: no kill of this process loses it. An fsync
    for each of some 70,000 records would take longer than measuring them, so a power cut may take the last ones (and
    leaves the file whole).
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # isolation_level=None: each statement is its own transaction. The timeout is for a predecessor not yet dead.
        self._connection = sqlite3.connect(folder / FILE_NAME, isolation_level=None, timeout=30)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(_SCHEMA)
        self._run: str | None = None

    def add(self, key: str, record: Mapping[str, Any], now_s: float) -> None:
        """Keeps `record` under `key`, which begins with the run and a slash. A known key changes nothing."""
        run = key.split("/", 1)[0]
        row = {**record, "key": key, "run": run, "stored_at": now_s}
        if run == self._run:
            self._connection.execute(_INSERT, row)
        else:
            self._begin_run(row)

    def _begin_run(self, row: Mapping[str, Any]) -> None:
        # One transaction, so that no kill leaves records of two runs beside each other.
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM records WHERE run <> :run", row)
            self._connection.execute(_INSERT, row)
        self._run = row["run"]

    def close(self) -> None:
        self._connection.close()


class Function(NamedTuple):
    """A function as the report shows it."""

    name: str
    path: str
    line: int
    lines: int
    nesting: int
    arguments: int


class Package(NamedTuple):
    """A folder right below the root: how many functions and classes it holds, how many of them have a docstring.

    The modules that lie in the root itself are counted as one without a name.
    """

    name: str
    definitions: int
    documented: int


class Unparsed(NamedTuple):
    """A file that does not parse, and why."""

    path: str
    problem: str


class Figures(NamedTuple):
    """What a report is made of.

    `totals` is as `measure.count` makes it. `duration_s` is the time between the first record stored and the last.
    `function_counts` maps a number of lines to how many functions have it. The largest package comes first.
    """

    totals: dict[str, int]
    duration_s: float
    longest: list[Function]
    function_counts: dict[int, int]
    packages: list[Package]
    unparsed: list[Unparsed]


def read_figures(folder: Path, longest_max: int) -> Figures:
    """The census in `folder`, which holds one record at least, with its `longest_max` longest functions."""
    # Read-only, since a second connection that may write or checkpoint can damage the file in many SQLite versions.
    connection = sqlite3.connect(f"{(folder / FILE_NAME).resolve().as_uri()}?mode=ro", uri=True)
    try:
        return Figures(
            totals=_totals(connection),
            duration_s=_one(connection, "SELECT max(stored_at) - min(stored_at) FROM records")[0],
            longest=_longest(connection, longest_max),
            function_counts=_function_counts(connection),
            packages=_packages(connection),
            unparsed=_unparsed(connection),
        )
    finally:
        connection.close()


def _totals(connection: sqlite3.Connection) -> dict[str, int]:
    names = ("files", "unparsed", "lines", "functions", "classes", "documented")
    row = _one(
        connection,
        """SELECT sum(kind = 'file'), sum(problem IS NOT NULL), sum(lines * (kind = 'file')),
                  sum(kind = 'function'), sum(kind = 'class'), sum(docstring * (kind <> 'file'))
           FROM records""",
    )
    return dict(zip(names, row, strict=True))


def _longest(connection: sqlite3.Connection, longest_max: int) -> list[Function]:
    rows = connection.execute(
        """SELECT name, path, line, lines, nesting, arguments FROM records WHERE kind = 'function'
           ORDER BY lines DESC, path, line LIMIT ?""",
        (longest_max,),
    )
    return [Function(*row) for row in rows]


def _function_counts(connection: sqlite3.Connection) -> dict[int, int]:
    return dict(connection.execute("SELECT lines, count(*) FROM records WHERE kind = 'function' GROUP BY lines"))


def _packages(connection: sqlite3.Connection) -> list[Package]:
    rows = connection.execute(
        """SELECT CASE WHEN instr(path, '/') THEN substr(path, 1, instr(path, '/') - 1) ELSE '' END AS package,
                  count(*), sum(docstring)
           FROM records WHERE kind <> 'file' GROUP BY package ORDER BY count(*) DESC, package"""
    )
    return [Package(*row) for row in rows]


def _unparsed(connection: sqlite3.Connection) -> list[Unparsed]:
    rows = connection.execute("SELECT path, problem FROM records WHERE problem IS NOT NULL ORDER BY path")
    return [Unparsed(*row) for row in rows]


def _one(connection: sqlite3.Connection, query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] = connection.execute(query).fetchone()
    return row
