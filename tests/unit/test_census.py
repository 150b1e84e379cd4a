"""The census measures what is in the source, whatever the source is, and keeps each record once.

The parts are imported through the package, as `p2pcluster.examples.census.X`. They import nothing of each other, so
that is the same code that a node imports by bare names; `pipeline.py` alone needs its folder on `sys.path`.
"""

from __future__ import annotations

import ast
import importlib
import logging
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pcluster.core.context import Context, active
from p2pcluster.examples.census import measure, store

CENSUS = Path(measure.__file__).parent

NESTED = b'''
"""A module."""

@decorated
@decorated_again
def outer(a, b=1, /, c=2, *rest, d, **more):
    """Outer."""
    key = lambda x, y: x
    for item in a:
        if item:
            pass
        elif b:
            with c:
                pass
        else:
            pass

    async def inner():
        async for x in y:
            await x

    class Local:
        def method(self): return 1

    return inner


class Shape:
    """A shape."""

    size = 1

    @property
    def area(self):
        match self.size:
            case 1:
                while True:
                    try:
                        pass
                    except* ValueError:
                        if 1:
                            pass
'''


def measured(source: bytes) -> list[measure.Record]:
    return measure.records({"path": "pkg/module.py", "source": source, "problem": None})


def by_name(source: bytes) -> dict[str, measure.Record]:
    return {record["name"]: record for record in measured(source)}


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for path, source in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(source)
    return root


# -- what is measured


def test_definitions_come_in_the_order_of_the_source_behind_their_file() -> None:
    assert [(record["kind"], record["name"]) for record in measured(NESTED)] == [
        ("file", ""),
        ("function", "outer"),
        ("function", "outer.<locals>.inner"),
        ("class", "outer.<locals>.Local"),
        ("function", "outer.<locals>.Local.method"),
        ("class", "Shape"),
        ("function", "Shape.area"),
    ]


def test_a_file_is_a_record_with_its_lines_and_its_docstring() -> None:
    file = by_name(NESTED)[""]
    assert file["path"] == "pkg/module.py"
    assert file["lines"] == NESTED.count(b"\n")
    assert file["docstring"]
    assert file["problem"] is None


def test_lines_run_from_the_definition_itself_and_not_from_its_decorators() -> None:
    outer = by_name(NESTED)["outer"]
    assert NESTED.splitlines()[outer["line"] - 1].startswith(b"def outer")
    assert NESTED.splitlines()[outer["line"] + outer["lines"] - 2].strip() == b"return inner"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("outer", 6), ("outer.<locals>.inner", 0), ("Shape.area", 1), ("Shape", None), ("", None)],
)
def test_arguments_of_every_kind_count_and_only_functions_have_any(name: str, arguments: int | None) -> None:
    assert by_name(NESTED)[name]["arguments"] == arguments


@pytest.mark.parametrize(
    ("name", "nesting"),
    [("outer", 3), ("outer.<locals>.inner", 1), ("outer.<locals>.Local.method", 0), ("Shape.area", 4), ("Shape", 0)],
)
def test_nesting_counts_blocks_but_neither_elif_nor_what_is_defined_inside(name: str, nesting: int) -> None:
    assert by_name(NESTED)[name]["nesting"] == nesting


def test_nesting_begins_anew_in_a_definition_that_stands_in_a_block() -> None:
    records = by_name(b"if a:\n    if b:\n        def f():\n            if c:\n                pass\n")
    assert {name: record["nesting"] for name, record in records.items()} == {"": 2, "f": 1}


def test_an_if_inside_an_else_is_deeper_than_an_elif() -> None:
    assert measured(b"if a:\n    pass\nelif b:\n    pass\nelif c:\n    pass\n")[0]["nesting"] == 1
    assert measured(b"if a:\n    pass\nelse:\n    if b:\n        pass\n")[0]["nesting"] == 2


def test_docstrings_are_seen_even_when_empty() -> None:
    records = by_name(b"def f():\n    ''\ndef g():\n    1\nclass C:\n    'C'\nclass D: x = 'D'\n")
    assert {name: record["docstring"] for name, record in records.items()} == {
        "": False, "f": True, "g": False, "C": True, "D": False,
    }  # fmt: skip


def test_definitions_hide_in_every_kind_of_block() -> None:
    source = b"""
if a:
    def f1(): pass
else:
    def f2(): pass
for a in b:
    def f3(): pass
else:
    def f4(): pass
while a:
    def f5(): pass
with a:
    def f6(): pass
try:
    def f7(): pass
except E:
    def f8(): pass
else:
    def f9(): pass
finally:
    def f10(): pass
match a:
    case 1:
        def f11(): pass
async def f12():
    async with a:
        def f13(): pass
    async for a in b:
        def f14(): pass
"""
    assert len(measured(source)) == 1 + 14


def test_the_walk_finds_what_a_walk_over_everything_finds() -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for path in (ast.__file__, warnings.__file__, subprocess.__file__):
        source = Path(path).read_bytes()
        expected = {(node.name, node.lineno) for node in ast.walk(ast.parse(source)) if isinstance(node, definitions)}
        found = [(record["name"].rpartition(".")[2], record["line"]) for record in measured(source)[1:]]
        assert sorted(found) == sorted(expected)


# -- source of every sort


@pytest.mark.parametrize(
    "source",
    [
        b"def f(:\n",
        b"x = '\0'\n",
        b"# coding: no-such-coding\n",
        b"x = '\xff'\n",
        "def f(): pass\n".encode("utf-16"),
        b"(" * 10_000,
        b"-" * 100_000 + b"1",
        b"x" + b".a" * 100_000,
    ],
    ids=["syntax", "null byte", "unknown coding", "not utf-8", "utf-16", "parentheses", "signs", "attributes"],
)
def test_a_file_that_does_not_parse_is_one_record_that_says_why(source: bytes) -> None:
    [record] = measured(source)
    assert record["kind"] == "file"
    assert record["lines"] == len(source.splitlines())
    assert record["problem"]
    assert "\n" not in record["problem"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("\ufeffdef naïve(): pass\n".encode(), "naïve"),
        ("# coding: latin-1\ndef naïve(): pass\n".encode("latin-1"), "naïve"),
        (b"def windows():\r\n    pass\r\n", "windows"),
        (b"def unfinished(): pass", "unfinished"),
    ],
    ids=["byte order mark", "latin-1", "CRLF", "no newline at the end"],
)
def test_the_coding_and_the_line_ends_are_the_sources_own(source: bytes, name: str) -> None:
    file, function = measured(source)
    assert file["problem"] is None
    assert function["name"] == name


def test_an_empty_file_is_a_file_without_lines() -> None:
    [record] = measured(b"")
    assert (record["lines"], record["docstring"], record["problem"]) == (0, False, None)


def test_source_may_nest_as_deep_as_the_parser_allows() -> None:
    depth = 90
    source = "".join(" " * level + f"def f{level}():\n" for level in range(depth)) + " " * depth + "pass\n"
    assert len(measured(source.encode())) == 1 + depth


def test_warnings_of_old_code_are_not_shown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [record] = measured(b"x = 1 is 1\ny = '\\d'\nassert (x, y)\n")
    assert record["problem"] is None


def test_a_path_that_is_not_text_becomes_text() -> None:
    [record] = measure.records({"path": os.fsdecode(b"caf\xe9.py"), "source": b"", "problem": None})
    assert record["path"].encode() == b"caf\\udce9.py"


# -- which files


def test_what_others_installed_and_what_is_not_python_is_left_out(tmp_path: Path) -> None:
    kept = ["a.py", "a/z.py", "b.py"]
    left_out = ["a/site-packages/x.py", "dist-packages/x.py", "c.pyc", "d.txt", "__pycache__/e.py"]
    tree(tmp_path, dict.fromkeys(reversed(kept + left_out), b""))
    assert measure.python_files(tmp_path) == kept


@pytest.mark.skipif(os.name == "nt", reason="needs links and named pipes")
def test_links_to_nowhere_and_pipes_are_not_files(tmp_path: Path) -> None:
    tree(tmp_path, {"real.py": b""})
    (tmp_path / "dangling.py").symlink_to(tmp_path / "gone.py")
    os.mkfifo(tmp_path / "pipe.py")
    assert measure.python_files(tmp_path) == ["real.py"]


def test_a_folder_without_python_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name another folder as parameter `root`"):
        list(measure.source_files(tmp_path))


def test_the_source_resumes_behind_any_cursor(tmp_path: Path) -> None:
    paths = ["a.py", "a/b.py", "a/c.py", "d.py"]
    tree(tmp_path, {path: path.encode() for path in paths})
    whole = list(measure.source_files(tmp_path))
    assert [(position, total, file["path"]) for position, total, file in whole] == [
        (index, 4, path) for index, path in enumerate(paths)
    ]
    for index, path in enumerate(paths):
        assert list(measure.source_files(tmp_path, path)) == whole[index + 1 :]


def test_a_cursor_whose_file_is_gone_still_marks_its_place(tmp_path: Path) -> None:
    tree(tmp_path, {"a.py": b"", "c.py": b""})
    assert [file["path"] for _, _, file in measure.source_files(tmp_path, "b.py")] == ["c.py"]


def test_a_file_that_cannot_be_read_is_a_record_and_not_a_failure(tmp_path: Path) -> None:
    [record] = measure.records(measure.read_file(tmp_path, "gone.py"))
    assert (record["kind"], record["path"], record["lines"]) == ("file", "gone.py", 0)
    assert record["problem"] == "FileNotFoundError: No such file or directory"


def test_a_file_too_large_for_a_value_is_a_record_and_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SOURCE_BYTES_MAX", 10)
    tree(tmp_path, {"fits.py": b"0123456789", "large.py": b"0123456789\n"})
    assert measure.read_file(tmp_path, "fits.py")["source"] == b"0123456789"
    [record] = measure.records(measure.read_file(tmp_path, "large.py"))
    assert record["problem"] == "larger than 10 bytes"


SMALL = {
    "top.py": b'def f():\n    "Documented."\n\n\nclass C:\n    def m(self):\n        pass\n',
    "pkg/__init__.py": b"",
    "pkg/inner.py": b"async def g(a, b):\n    return a\n",
    "pkg/bad.py": b"def (\n",
}
SMALL_TOTALS = {"files": 4, "unparsed": 1, "lines": 10, "functions": 3, "classes": 1, "documented": 1}


def test_a_direct_census_counts_it_all(tmp_path: Path) -> None:
    assert measure.direct_census(tree(tmp_path, SMALL)) == SMALL_TOTALS


# -- what is kept


def keyed(records: list[measure.Record], run: int) -> list[tuple[str, measure.Record]]:
    return [(f"{run}/census/Store/{item_id}", record) for item_id, record in enumerate(records, 1)]


def small_records(tmp_path: Path) -> list[measure.Record]:
    root = tree(tmp_path / "small", SMALL)
    return [record for _, _, file in measure.source_files(root) for record in measure.records(file)]


def test_the_database_holds_what_a_direct_census_counts(tmp_path: Path) -> None:
    database = store.Database(tmp_path / "out" / "census")
    for key, record in keyed(small_records(tmp_path), run=1):
        database.add(key, record, now_s=100.0)
    database.close()
    figures = store.read_figures(tmp_path / "out" / "census", longest_max=2)
    assert figures.totals == SMALL_TOTALS
    assert figures.function_counts == {2: 3}
    assert [function.name for function in figures.longest] == ["g", "f"]
    assert figures.packages == [store.Package("", 3, 1), store.Package("pkg", 1, 0)]
    assert [file.path for file in figures.unparsed] == ["pkg/bad.py"]


def test_a_record_that_comes_again_by_its_key_changes_nothing(tmp_path: Path) -> None:
    items = keyed(small_records(tmp_path), run=1)
    for now_s, handed in ((100.0, items), (200.0, items[:2])):  # a new process is handed some of it again
        database = store.Database(tmp_path)
        for key, record in handed:
            database.add(key, record, now_s)
        database.close()
    figures = store.read_figures(tmp_path, longest_max=1)
    assert figures.totals == SMALL_TOTALS
    assert figures.duration_s == 0.0


def test_the_same_record_under_two_keys_is_two_records(tmp_path: Path) -> None:
    [record] = measured(b"")
    database = store.Database(tmp_path)
    database.add("1/census/Store/1", record, 100.0)
    database.add("1/census/Store/2", record, 107.5)
    figures = store.read_figures(tmp_path, longest_max=1)
    database.close()
    assert figures.totals["files"] == 2
    assert figures.duration_s == 7.5


def test_the_longest_functions_come_first(tmp_path: Path) -> None:
    database = store.Database(tmp_path)
    for key, record in keyed(measured(b"def f(): pass\ndef g():\n\n    pass\ndef h():\n    pass\n"), run=1):
        database.add(key, record, 100.0)
    database.close()
    assert [function.name for function in store.read_figures(tmp_path, longest_max=2).longest] == ["g", "h"]


def test_the_next_run_starts_from_nothing(tmp_path: Path) -> None:
    items = small_records(tmp_path)
    database = store.Database(tmp_path)
    for key, record in keyed(items, run=9) + keyed(items, run=10):
        database.add(key, record, 100.0)
    database.close()
    assert store.read_figures(tmp_path, longest_max=1).totals == SMALL_TOTALS


def test_a_run_that_fails_to_begin_leaves_the_one_before_it_whole(tmp_path: Path) -> None:
    items = keyed(small_records(tmp_path), run=1)
    database = store.Database(tmp_path)
    for key, record in items:
        database.add(key, record, 100.0)
    with pytest.raises(sqlite3.IntegrityError):
        database.add("2/census/Store/1", {**items[0][1], "path": None}, 100.0)
    database.close()
    assert store.read_figures(tmp_path, longest_max=1).totals == SMALL_TOTALS


DIES_WHEN_ADDED = """
import os, signal, sys
from pathlib import Path
from p2pcluster.examples.census import measure, store
database = store.Database(Path(sys.argv[1]))
[record] = measure.records({"path": "a.py", "source": b"", "problem": None})
for item_id in range(1, 101):
    database.add(f"1/census/Store/{item_id}", record, 100.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_what_was_added_survives_the_death_of_the_process(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIES_WHEN_ADDED, tmp_path], env=importable(), check=False)
    assert died.returncode == -9
    assert store.read_figures(tmp_path, longest_max=1).totals["files"] == 100


def importable() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CENSUS.parents[2])}


def test_the_file_can_be_read_with_plain_sql(tmp_path: Path) -> None:
    database = store.Database(tmp_path)
    for key, record in keyed(measured(NESTED), run=3):
        database.add(key, record, 100.0)
    database.close()
    connection = sqlite3.connect(tmp_path / store.FILE_NAME)
    rows = connection.execute("SELECT run, key, nesting FROM records WHERE name = 'Shape.area'").fetchall()
    connection.close()
    assert rows == [("3", "3/census/Store/7", 4)]


# -- how it is joined


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`pipeline.py`, imported as a stage process imports it; its neighbours' bare names are forgotten again."""
    bare_names = ("pipeline", "measure", "store", "report")
    assert not set(bare_names) & (set(sys.modules) | set(sys.stdlib_module_names))
    monkeypatch.syspath_prepend(str(CENSUS))
    yield importlib.import_module("pipeline")
    for name in bare_names:
        del sys.modules[name]


def context(stage: str, out_dir: Path, root: Path, shown: list[tuple[float, str]]) -> Context:
    return Context(
        run=4,
        queue=stage,
        stage=stage,
        node="here",
        params={"root": str(root)},
        out_dir=out_dir,
        log=logging.getLogger(stage),
        on_progress=lambda fraction, text: shown.append((fraction, text)),
    )


def test_the_pipeline_is_a_source_that_resumes_a_stage_and_one_sink(census: Any) -> None:
    manifest = census.pipeline.manifest()
    assert manifest["pipeline"] == "census"
    assert manifest["on_done"]
    assert [(stage["name"], stage["kind"], stage["processes"]) for stage in manifest["stages"]] == [
        ("ListFiles", "source", 1),
        ("Measure", "stage", "auto"),
        ("Store", "sink", 1),
    ]
    assert [stage["resumable"] for stage in manifest["stages"]] == [True, False, False]


def test_the_source_counts_the_standard_library_unless_told_otherwise(census: Any, tmp_path: Path) -> None:
    default = context("ListFiles", tmp_path, tmp_path, [])
    default.params = census.pipeline.params
    with active(default):
        assert census.census_root() == Path(os.__file__).parent


def test_the_source_yields_each_file_with_its_cursor_and_tells_how_far_it_is(census: Any, tmp_path: Path) -> None:
    root = tree(tmp_path / "small", SMALL)
    shown: list[tuple[float, str]] = []
    with active(context("ListFiles", tmp_path, root, shown)):
        whole = list(census.ListFiles())
        rest = list(census.ListFiles(cursor=whole[1].cursor))
    assert [at.cursor for at in whole] == sorted(SMALL)
    assert [at.value["path"] for at in whole] == sorted(SMALL)
    assert rest == whole[2:]
    assert shown[:4] == list(zip((0.25, 0.5, 0.75, 1.0), sorted(SMALL), strict=True))


def test_the_joined_parts_print_and_draw_what_a_direct_census_counts(
    census: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out_dir = tree(tmp_path / "small", SMALL), tmp_path / "out" / "census"
    with active(context("ListFiles", out_dir, root, [])):
        files = [at.value for at in census.ListFiles()]
    records = [record for file in files for record in census.Measure(file)]
    sink_context = context("Store", out_dir, root, [])
    with active(sink_context), census.Store.function() as keep:
        for item_id, record in [*enumerate(records, 1), *enumerate(records, 1)]:  # every item is delivered twice
            sink_context.item_id = item_id
            keep(record)
        with active(context("finish", out_dir, root, [])):
            census.finish()
    assert store.read_figures(out_dir, longest_max=1).totals == measure.direct_census(root)
    table = capsys.readouterr().out
    assert "did not parse      1" in table
    assert f"page: {out_dir / 'census.html'}" in table
    assert (out_dir / "census.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert not list(out_dir.glob("*.part"))


def test_a_run_in_one_process_counts_what_a_direct_census_counts(census: Any, tmp_path: Path) -> None:
    root = tree(tmp_path / "small", SMALL)
    ran = census.pipeline.run_local(params={"root": str(root)}, out_dir=tmp_path / "out")
    assert ran.parked == []
    assert store.read_figures(tmp_path / "out", longest_max=1).totals == measure.direct_census(root)
