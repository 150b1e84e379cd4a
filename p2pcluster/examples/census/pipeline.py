"""The census as a pipeline: the Python files of this machine, measured by many processes, kept in one database.

Decides only how the parts are joined; what is counted, kept and shown is decided in `measure`, `store` and `report`.
Another folder is counted with `--set root='"/some/folder"'`.
"""

from __future__ import annotations

import os
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import measure
import report
import store

from p2pcluster import At, Pipeline, current, sink, source, stage

PAGE_NAME = "census.html"


def census_root() -> Path:
    """The folder whose files are counted: the parameter `root`, else the running interpreter's standard library."""
    return Path(current().params["root"] or sysconfig.get_path("stdlib"))


# Where the project came from, because "this machine" means that one, and its reader looks there for the result.
@source(where="origin")
def ListFiles(cursor: str | None = None) -> Iterator[At[measure.SourceFile]]:
    """Each file, in the order of the paths. The path is the cursor: a restarted source goes on behind the last one."""
    for position, total, file in measure.source_files(census_root(), cursor):
        current().progress(position + 1, file["path"], total=total)
        yield At(file, file["path"])


@stage
def Measure(file: measure.SourceFile) -> Iterator[measure.Record]:
    """The file's record and those of its functions and classes, each an item of its own."""
    yield from measure.records(file)


@sink(where="origin")
class Store:
    """Keeps each record. One comes again, by the same key, if this process is killed before its *done* is heard."""

    def __enter__(self) -> Store:
        self.database = store.Database(Path(current().out_dir))
        return self

    def __call__(self, record: measure.Record) -> None:
        self.database.add(current().key, record, time.time())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()


def finish() -> None:
    """Prints the table and the path of the page, which it writes whole or not at all."""
    folder = Path(current().out_dir)
    figures = store.read_figures(folder, report.LONGEST_MAX)
    python, root = platform.python_version(), str(census_root())
    page, unfinished = folder / PAGE_NAME, folder / f"{PAGE_NAME}.part"
    unfinished.write_text(report.page(figures, python, root), encoding="utf-8")
    os.replace(unfinished, page)
    print(report.table(figures, python, root))
    print(f"page: {page}")


pipeline = Pipeline("census", ListFiles >> Measure >> Store, params={"root": None}, on_done=finish)

if __name__ == "__main__":
    pipeline.main()
