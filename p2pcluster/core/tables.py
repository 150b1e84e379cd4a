"""The tables of a journal that people with a SQL shell rely on: names, columns, keys.

`queues` says which rows a state has, `journal` writes and reads them; the `crc` column that every row ends with is the journal's.
"""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """`columns` as SQL declarations by name; the first `key_columns` of them are the primary key."""

    columns: dict[str, str]
    key_columns: int


TABLES: dict[str, Table] = {
    "queues": Table({"name": "TEXT", "next_id": "INTEGER", "put": "INTEGER", "done": "INTEGER", "closed": "INTEGER"}, 1),
    "chunks": Table({
        "queue": "TEXT", "first_id": "INTEGER", "count": "INTEGER", "run": "INTEGER", "at_ms": "INTEGER",
        "open": "TEXT", "deliveries": "TEXT", "delayed": "TEXT", "keys": "BLOB",
        "entry_idx": "INTEGER", "entry_offset": "INTEGER", "body_bytes": "INTEGER", "body_crc": "INTEGER",
        "lengths": "BLOB", "body": "BLOB",
    }, 2),
    "leases": Table({"queue": "TEXT", "lo": "INTEGER", "hi": "INTEGER", "node": "TEXT", "boot": "TEXT", "seq": "INTEGER"}, 2),
    "keys": Table({"queue": "TEXT", "hash": "BLOB", "at_ms": "INTEGER"}, 2),
    "parked": Table({
        "queue": "TEXT", "id": "INTEGER", "run": "INTEGER", "deliveries": "INTEGER", "at_ms": "INTEGER", "error": "TEXT",
    }, 2),
    "producers": Table({
        "key": "TEXT", "epoch": "INTEGER", "seq": "INTEGER", "count": "INTEGER", "hash": "TEXT", "cursor": "BLOB",
        "finished": "INTEGER", "at_ms": "INTEGER", "node": "TEXT", "boot": "TEXT",
    }, 1),
    "projects": Table({
        "pipeline": "TEXT", "version": "TEXT", "run": "INTEGER", "state": "TEXT", "on_done_run": "INTEGER",
        "started_ms": "INTEGER", "done_ms": "INTEGER", "detail": "TEXT",
    }, 1),
    "bundles": Table({
        "version": "TEXT", "part": "INTEGER", "parts": "INTEGER", "entry_idx": "INTEGER", "entry_offset": "INTEGER",
        "body_bytes": "INTEGER", "body_crc": "INTEGER", "body": "BLOB",
    }, 2),
    "members": Table({"node": "TEXT", "name": "TEXT", "facts": "TEXT"}, 1),
    "clusters": Table({"cluster": "TEXT", "fate": "TEXT"}, 1),
    "parts": Table({"queue": "TEXT", "id": "INTEGER", "count": "INTEGER", "spans": "TEXT"}, 2),
}

# Columns that stay NULL while the bytes still stand in the log; `body_crc` covers them once they are filled in. A row's own crc
# covers the others, so that a row changes without its body being read.
BODY_COLUMNS = ("lengths", "body")
