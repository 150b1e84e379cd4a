"""`python slow_disk_node.py SECONDS run ...`: a node whose every fsync takes so much longer; its stages are as ever.

SQLite syncs the write-ahead log at each COMMIT, and both of its files at a checkpoint.
"""

from __future__ import annotations

import functools
import sqlite3
import sys
import time
from typing import Any


class SlowConnection(sqlite3.Connection):
    """Sleeps after each statement that ends with an fsync; like the real one, it lets other threads run meanwhile."""

    delay_s = 0.0

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        cursor = super().execute(sql, *parameters)
        if sql == "COMMIT":
            time.sleep(self.delay_s)
        elif sql.startswith("PRAGMA wal_checkpoint"):
            time.sleep(2 * self.delay_s)
        return cursor


def main(argv: list[str]) -> int:
    from p2pcluster import cli

    SlowConnection.delay_s = float(argv[0])
    sqlite3.connect = functools.partial(sqlite3.connect, factory=SlowConnection)  # type: ignore[assignment]
    return cli.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
