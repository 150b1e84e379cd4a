"""What the census counts: which files belong to it, and what is in each.

Knows nothing of pipelines, databases or pages: a folder goes in, records come out. The same folder gives the same
records, whether one process asks (`direct_census`) or many do.
"""

from __future__ import annotations

import ast
import os
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypedDict

# A value of a pipeline is at most 16 MiB; the rest is for the path and the pickling around it.
SOURCE_BYTES_MAX = 15 * 2**20

# What others installed is not part of the tree that is counted; dist-packages is Debian's name for it.
_FOLDERS_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
# Definitions are statements, so expressions need no walk; these are the fields in which statements hold statements.
_STATEMENT_FIELDS = ("body", "handlers", "cases", "orelse", "finalbody")


class SourceFile(TypedDict):
    """One file on its way to be measured, with its bytes: on another machine its path may lead to other source.

    `path` is relative to the root, with "/". `source` is None when the file cannot be had; `problem` then says why.
    """

    path: str
    source: bytes | None
    problem: str | None


class Record(TypedDict):
    """One file, function or class.

    `name` is the qualified name, empty for a file. `lines` are those from the `def` or `class` (decorators lie above
    it) to the last. `nesting` is how deep its own blocks (if, for, while, with, try, match) go, what is defined
    inside it left out. `arguments` is what the signature lists, `self` included; None for files and classes.
    `problem` says why a file does not parse, and is None otherwise.
    """

    kind: Literal["file", "function", "class"]
    path: str
    name: str
    line: int
    lines: int
    nesting: int
    arguments: int | None
    docstring: bool
    problem: str | None


class Totals(TypedDict):
    """A census in numbers. `unparsed` are among `files`; `documented` are functions and classes with a docstring."""

    files: int
    unparsed: int
    lines: int
    functions: int
    classes: int
    documented: int


def python_files(root: Path) -> list[str]:
    """The Python files below `root`, as sorted paths relative to it. Raises `FileNotFoundError` when there is none."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _FOLDERS_LEFT_OUT]
        for name in names:
            # isfile: a dangling link has no source, and opening a pipe would wait for a writer.
            if name.endswith(".py") and os.path.isfile(os.path.join(folder, name)):
                found.append(Path(folder, name).relative_to(root).as_posix())
    if not found:
        raise FileNotFoundError(f"no Python file lies below {root}; name another folder as parameter `root`")
    return sorted(found)


def read_file(root: Path, path: str) -> SourceFile:
    """The file at `path` below `root`; one that cannot be read, or is too large for a value, has a problem instead."""
    try:
        with open(root / path, "rb") as file:
            source = file.read(SOURCE_BYTES_MAX + 1)
    except OSError as error:
        return {"path": path, "source": None, "problem": f"{type(error).__name__}: {error.strerror}"}
    if len(source) > SOURCE_BYTES_MAX:
        return {"path": path, "source": None, "problem": f"larger than {SOURCE_BYTES_MAX:,} bytes"}
    return {"path": path, "source": source, "problem": None}


def source_files(root: Path, cursor: str | None = None) -> Iterator[tuple[int, int, SourceFile]]:
    """(how many files come before, how many there are, the file) for each one after the path `cursor`, or for all."""
    paths = python_files(root)
    start = 0 if cursor is None else bisect_right(paths, cursor)
    for position in range(start, len(paths)):
        yield position, len(paths), read_file(root, paths[position])


def records(file: SourceFile) -> list[Record]:
    """What is in `file`: its own record, then one for each function and class in the order of the source."""
    path = _text(file["path"])
    source = file["source"]
    if source is None:
        return [_file_record(path, 0, file["problem"])]
    lines = len(source.splitlines())
    try:
        tree = _parse(source, path)
    # ValueError is an older parser's answer to null bytes, RecursionError and MemoryError are any parser's to source
    # that is nested too deeply. A machine that is truly out of memory looks the same: its file counts as not parsed.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [_file_record(path, lines, _problem(error))]
    own = _file_record(path, lines, None)
    own["docstring"] = _has_docstring(tree)
    return _measured(tree, own)


def direct_census(root: Path) -> Totals:
    """The totals of `root`, computed here and now without a pipeline: what the pipeline's are to be compared with."""
    return count(record for _, _, file in source_files(root) for record in records(file))


def count(found: Iterable[Record]) -> Totals:
    """The totals of these records."""
    totals: Totals = {"files": 0, "unparsed": 0, "lines": 0, "functions": 0, "classes": 0, "documented": 0}
    for record in found:
        match record["kind"]:
            case "file":
                totals["files"] += 1
                totals["lines"] += record["lines"]
                totals["unparsed"] += record["problem"] is not None
            case "function":
                totals["functions"] += 1
                totals["documented"] += record["docstring"]
            case "class":
                totals["classes"] += 1
                totals["documented"] += record["docstring"]
    return totals


def _parse(source: bytes, path: str) -> ast.Module:
    # Bytes, so that the parser itself obeys a byte order mark and a coding line.
    with warnings.catch_warnings():
        # Old code warns of its escapes while it is parsed; that is not news to somebody who counts lines.
        warnings.simplefilter("ignore")
        return ast.parse(source, filename=path)


def _measured(tree: ast.Module, own: Record) -> list[Record]:
    """`own` and the records of all definitions in it."""
    found = [own]
    # A stack of our own, because source may nest deeper than Python calls: node, whose it is, prefix of names, depth.
    pending: list[tuple[ast.AST, Record, str, int]] = [(tree, own, "", 0)]
    while pending:
        node, owner, prefix, depth = pending.pop()
        if isinstance(node, _Definition):
            owner = _definition_record(node, own["path"], prefix)
            found.append(owner)
            prefix = owner["name"] + ("." if owner["kind"] == "class" else ".<locals>.")
            depth = 0
        elif isinstance(node, _BLOCKS):
            depth += 1
            owner["nesting"] = max(owner["nesting"], depth)
        for inner in reversed(_inner_statements(node)):
            pending.append((inner, owner, prefix, depth - _is_elif(inner, node)))
    return found


def _inner_statements(node: ast.AST) -> list[ast.AST]:
    return [inner for field in _STATEMENT_FIELDS for inner in getattr(node, field, ())]


def _is_elif(inner: ast.AST, outer: ast.AST) -> bool:
    """Whether `inner` is an `elif` of `outer`: to the tree an `if` in its else, but one that stands in its column."""
    return (
        isinstance(inner, ast.If)
        and isinstance(outer, ast.If)
        and inner.col_offset == outer.col_offset
        and outer.orelse == [inner]
    )


def _file_record(path: str, lines: int, problem: str | None) -> Record:
    return {
        "kind": "file",
        "path": path,
        "name": "",
        "line": 1,
        "lines": lines,
        "nesting": 0,
        "arguments": None,
        "docstring": False,
        "problem": problem,
    }


def _definition_record(node: _Definition, path: str, prefix: str) -> Record:
    assert node.end_lineno is not None, "the parser gives every statement its end"
    return {
        "kind": "class" if isinstance(node, ast.ClassDef) else "function",
        "path": path,
        "name": prefix + node.name,
        "line": node.lineno,
        "lines": node.end_lineno - node.lineno + 1,
        "nesting": 0,
        "arguments": None if isinstance(node, ast.ClassDef) else _argument_count(node.args),
        "docstring": _has_docstring(node),
        "problem": None,
    }


def _argument_count(arguments: ast.arguments) -> int:
    named = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    return named + (arguments.vararg is not None) + (arguments.kwarg is not None)


def _has_docstring(node: ast.Module | _Definition) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def _problem(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        text = f"{error.msg} (line {error.lineno})" if error.lineno else error.msg
    else:
        text = str(error) or "nested too deeply"
    return _text(f"{type(error).__name__}: {' '.join(text.split())}")


def _text(text: str) -> str:
    """`text` as something that every file and database can hold: a name on disk need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
