"""What the rows of the log say of the commit index."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from p2pcluster.core.log import NOOP, Entry
from p2pcluster.core.raft import HardState
from p2pcluster.journal import Journal, Write


def test_the_commit_index_of_the_rows_never_goes_back(tmp_path: Path) -> None:
    # Found by a soak: a lone voter's last entry, then the entry that brings further voters, written before Raft had counted the former.
    journal, _ = Journal.open(tmp_path / "journal.sqlite3", tmp_path / "journal.mark")
    journal.write(Write((Entry(1, 1, 1, NOOP, b""), Entry(2, 1, 2, NOOP, b"")), HardState(1, "a"), sole_voter=True))
    journal.write(Write((Entry(3, 1, 3, NOOP, b""),), commit_index=1))
    journal.abandon()
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as db:
        assert [row[0] for row in db.execute("SELECT commit_idx FROM journal ORDER BY idx")] == [1, 2, 2]
