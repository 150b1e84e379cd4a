"""The house rules that a program can check: what lies where, which module may know which, and that nothing lies about unused.

Everything is read as text. Each check is a function of a module's source, so that a second test can show that it finds what it is for.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import p2pcluster
from p2pcluster import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "p2pcluster"

TOP_LEVEL = {"p2pcluster", "tests", "scripts", "pyproject.toml", "README.md"}
MADE_BY_TOOLS = ("build", "dist", "*.egg-info", "__pycache__")

# Floor by floor; a package stands for all that is in it. A module may import those of lower floors, and in a package others of its own.
PACKAGES = ("core", "classic")
FLOORS = (
    {"errors", "config", "shadows"},
    {"core"},
    {"home", "journal", "wal", "stream", "lan", "bundle", "process", "values", "safe_values", "logbook", "output"},
    {"beacons", "clients", "committer", "finding", "gathering", "neighbours", "offering", "peers", "placements", "projects",
     "rivals"},  # the rooms of the daemon
    {"runners"},
    {"together"},
    {"client", "worker", "daemon", "local"},
    {"cli", "doctor", "page", "patience", "shown", "starter", "view", "classic", "examples"},
    {"__main__"},
)
BESIDE = {
    ("config", "errors"): "a setting that is out of range is an error",
    ("journal", "wal"): "the write-ahead log is a part of the file that the journal opens",
    ("process", "stream"): "a stage process is talked to over the same kind of connection",
    ("neighbours", "peers"): "the neighbours are peers, each with links of its own",
    ("rivals", "neighbours"): "another cluster of this name is spoken to over the connections to its nodes",
    ("rivals", "peers"): "and is dialled like them",
    ("cli", "doctor"): "a verb with much to say has a module of its own",
    ("cli", "patience"): "and so is what it waits for",
    ("cli", "shown"): "how a status looks on a terminal is a matter of its own",
    ("cli", "starter"): "and so has one with a text of its own",
    ("cli", "page"): "run serves the page beside its node",
    ("page", "view"): "what is served is made by a module that knows no socket",
}
UPWARD = {
    ("core.graph", "cli"): "Pipeline.main() is the way from a pipeline.py to the command line",
    ("core.graph", "local"): "Pipeline.run_local() is the way from a pipeline to a run in this process",
}
ENTRANCES = {"", "__main__", "worker", "safe_values"}  # started or imported by others than the package
NOT_IN_CORE = {
    "asyncio", "datetime", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "selectors", "shutil", "socket", "sqlite3",
    "subprocess", "tempfile", "threading", "time", "uuid",
}
LAYERS_OF_TESTS = {"unit", "property", "simulation", "contract", "e2e", "golden"}


class Import(NamedTuple):
    """One name that a module imports. `module` is as it is written, with `from x import y` as `x.y` where that is a module."""

    module: str
    line: int
    is_lazy: bool
    is_for_types: bool


# ---- reading


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@cache
def modules() -> dict[str, Path]:
    """Each module of the package by its name in it; the package itself is ""."""
    return {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]


def imports(tree: ast.AST, is_lazy: bool = False, is_for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_lazy, is_for_types)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are written out in full"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, is_lazy, is_for_types)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from imports(ast.Module([child], []), is_lazy, True)
            for child in node.orelse:
                yield from imports(ast.Module([child], []), is_lazy, is_for_types)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, is_lazy or inside, is_for_types)


def own_imports(tree: ast.Module) -> Iterator[tuple[str, Import]]:
    """The modules of this package that a module imports, each as in `modules()`."""
    known = modules()
    for found in imports(tree):
        parts = found.module.split(".")
        if parts[0] == "p2pcluster":
            name = ".".join(parts[1:])
            yield name if name in known else ".".join(parts[1:-1]), found


# ---- floors


def floor_of(module: str) -> int | None:
    """The number of a module's floor; None for one that has none yet. The package's own `__init__` is above all."""
    if not module:
        return len(FLOORS)
    return next((number for number, names in enumerate(FLOORS) if module.partition(".")[0] in names), None)


def wrong_way(module: str, tree: ast.Module) -> list[str]:
    """The imports of a module that do not go down."""
    mine, found = floor_of(module), []
    assert mine is not None, f"{module} has no floor"
    for name, at in own_imports(tree):
        theirs = floor_of(name)
        both_in_one = module.partition(".")[0] == name.partition(".")[0] in PACKAGES
        allowed = (
            theirs is not None and (theirs < mine or both_in_one or (module, name) in BESIDE)
            or (module, name) in UPWARD and at.is_lazy
            or at.is_for_types
            or (name == "" and at.module == "p2pcluster")  # for p2pcluster.__version__
            or module.split(".")[0] == "examples"  # a project as a user's: it imports what a user imports
        )
        if not allowed:
            found.append(f"{module}, line {at.line}, imports {at.module}")
    return found


def test_each_module_stands_on_a_floor() -> None:
    assert [module for module in modules() if floor_of(module) is None] == [], "put it on a floor, in FLOORS above and in DESIGN.md"


def test_imports_go_down() -> None:
    assert [line for module, path in modules().items() for line in wrong_way(module, tree_of(path))] == []


def test_the_exceptions_are_needed() -> None:
    needed = {(module, name) for module, path in modules().items() for name, _ in own_imports(tree_of(path))}
    assert {pair for pair in (*BESIDE, *UPWARD) if pair not in needed} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_ring_of_imports(package: str) -> None:
    after = {module: {name for name, at in own_imports(tree_of(path)) if name.startswith(f"{package}.") and not at.is_for_types}
             for module, path in modules().items() if module.startswith(f"{package}.")}
    while free := {module for module, names in after.items() if not names & set(after)}:
        after = {module: names for module, names in after.items() if module not in free}
    assert after == {}, "these import each other"


def impure(tree: ast.Module) -> set[str]:
    return {at.module.split(".")[0] for at in imports(tree) if not at.is_for_types} & NOT_IN_CORE


def test_core_is_pure() -> None:
    assert {module: found for module, path in modules().items() if module.startswith("core") and (found := impure(tree_of(path)))} == {}


def foreign(tree: ast.Module, *known: str) -> set[str]:
    return {at.module.split(".")[0] for at in imports(tree)} - sys.stdlib_module_names - set(known)


@cache
def _in_and_above(folder: Path, top: Path) -> frozenset[str]:
    """What can be imported by its bare name from a script or a project's module: its neighbours, and those of the folders above."""
    if not folder.is_relative_to(top):
        return frozenset()
    return frozenset(other.stem for other in folder.iterdir() if other.suffix == ".py" or other.is_dir()) | _in_and_above(folder.parent, top)


def test_only_the_standard_library_is_imported_and_by_tests_pytest_and_hypothesis_too() -> None:
    found = {}
    for path in python_files("p2pcluster", "scripts", "tests"):
        known = {"p2pcluster", "tests", "__main__"} if path.is_relative_to(ROOT / "scripts") else {"p2pcluster", "__main__"}
        for top in (PACKAGE / "examples", ROOT / "scripts", ROOT / "tests"):
            known |= _in_and_above(path.parent, top)
        if path.is_relative_to(ROOT / "tests"):
            known |= {"tests", "pytest", "hypothesis"} | {other.stem for other in (ROOT / "scripts").glob("*.py")}
        if strange := foreign(tree_of(path), *known):
            found[str(path.relative_to(ROOT))] = strange
    assert found == {}


def test_each_module_is_used() -> None:
    """A module that nobody imports is either dead or not wired in."""
    used = {name for path in modules().values() for name, _ in own_imports(tree_of(path)) if path.name != "__init__.py"}
    for entrance in ("", "classic", "classic/schedulers"):  # what programs import
        used |= {name for name, _ in own_imports(tree_of(PACKAGE / entrance / "__init__.py"))}
    used |= {name.rpartition(".")[0] for name in used}
    projects = {name for name in modules() if name.startswith("examples")}
    assert [module for module in modules() if module not in used | projects | ENTRANCES] == []


def test_each_module_of_an_example_is_used_by_its_pipeline() -> None:
    for folder in {path.parent for path in (PACKAGE / "examples").glob("*/pipeline.py")}:
        used = {at.module.split(".")[0] for path in folder.glob("*.py") for at in imports(tree_of(path))}
        assert {path.stem for path in folder.glob("*.py")} - used == {"__init__", "pipeline"}


def test_each_helper_of_the_tests_is_used() -> None:
    used = {part for path in python_files("tests", "scripts") for at in imports(tree_of(path)) for part in at.module.split(".")}
    with_tests = {path.parent for path in python_files("tests") if path.name.startswith("test_")} | {ROOT / "tests"}
    helpers = {path.stem for path in python_files("tests") if path.parent in with_tests and not re.match(r"test_|conftest$|__init__$", path.stem)}
    assert helpers - used == set()


# ---- what lies where


def test_the_top_level_holds_what_it_may() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in names - TOP_LEVEL if not any(fnmatch.fnmatch(name, pattern) for pattern in MADE_BY_TOOLS)} == set()
    assert TOP_LEVEL <= names


def test_tests_lie_in_their_layer() -> None:
    assert {path.relative_to(ROOT / "tests").parts[0] for path in python_files("tests") if path.name.startswith("test_")} <= LAYERS_OF_TESTS
    names = [path.name for path in python_files("tests") if path.name.startswith("test_")]
    assert len(names) == len(set(names)), "pytest wants each name once"


# ---- how a module is written


def documented(tree: ast.Module) -> bool:
    return bool(ast.get_docstring(tree))


def test_each_module_opens_with_what_it_is() -> None:
    files = [path for path in python_files("p2pcluster", "scripts", "tests") if path.read_text("utf-8").strip()]
    assert [str(path.relative_to(ROOT)) for path in files if not documented(tree_of(path))] == []


def catches_blindly(tree: ast.Module) -> list[int]:
    """Lines that catch everything by `except:`, or everything to go on as if nothing had been."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            if node.type is None or (broad and silent):
                found.append(node.lineno)
    return found


def test_nothing_is_caught_blindly() -> None:
    assert {str(path.relative_to(ROOT)): lines for path in python_files("p2pcluster", "scripts", "tests")
            if (lines := catches_blindly(tree_of(path)))} == {}


def unannotated(tree: ast.Module) -> list[str]:
    """Functions that leave a type out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            names = [one.arg for one in arguments if one is not None and one.annotation is None and one.arg not in ("self", "cls")]
            if names or node.returns is None:
                found.append(f"line {node.lineno}: {node.name}")
    return found


def test_each_function_is_annotated() -> None:
    files = [path for path in python_files("p2pcluster", "scripts") if "projects" not in path.parts]  # those of the benchmark are as a user's
    assert {str(path.relative_to(ROOT)): found for path in files if (found := unannotated(tree_of(path)))} == {}


# ---- errors


def _error_classes() -> dict[str, type[errors.ClusterError]]:
    return {name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.ClusterError)}


def test_each_error_says_what_it_means_and_has_a_code_of_its_own() -> None:
    classes = _error_classes()
    assert [name for name, value in classes.items() if not value.__doc__] == []
    codes = [value.code for value in classes.values()]
    assert sorted(codes) == sorted(set(codes))


def test_each_error_is_used() -> None:
    named = {node.id for module, path in modules().items() if module != "errors" for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
    above = {base.__name__ for value in _error_classes().values() for base in value.__mro__[1:]}
    assert set(_error_classes()) - named - above == set()


# ---- the package as it is installed


@cache
def pyproject() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_what_is_installed_is_this_version_and_needs_nothing() -> None:
    project = pyproject()["project"]
    assert project["version"] == p2pcluster.__version__
    assert project["dependencies"] == []
    assert project["requires-python"] == ">=3.11"
    assert project["scripts"] == {"p2pcluster": "p2pcluster.cli:console"}


def test_each_file_of_the_package_is_installed() -> None:
    tool: dict[str, dict[str, object]] = pyproject()["tool"]  # type: ignore[assignment]
    data: dict[str, list[str]] = tool["setuptools"]["package-data"]  # type: ignore[assignment]
    left = []
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            if not any(fnmatch.fnmatch(path.name, pattern) for pattern in data.get(package, [])):
                left.append(str(path.relative_to(ROOT)))
    assert left == []
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert (PACKAGE / "py.typed").is_file()


# ---- each check finds what it is for


BAD = '''
import os
import requests
from p2pcluster.cli import main
from p2pcluster.core.queues import State
if TYPE_CHECKING:
    import socket
def late(x):
    from p2pcluster.daemon import Daemon
    try:
        import random
    except:
        pass
    try:
        pass
    except Exception:
        pass
    try:
        pass
    except OSError:
        pass
'''


def test_each_check_finds_what_it_is_for() -> None:
    bad = ast.parse(BAD)
    assert wrong_way("core.raft", bad) == ["core.raft, line 4, imports p2pcluster.cli.main", "core.raft, line 9, imports p2pcluster.daemon.Daemon"]
    assert len(wrong_way("wal", bad)) == 2
    assert wrong_way("core.graph", ast.parse("from p2pcluster.cli import main")) != [], "it may only when it is called"
    assert wrong_way("bundle", ast.parse("from p2pcluster.home import Home")) != [], "adapters do not know each other"
    assert wrong_way("config", ast.parse("from p2pcluster.core import codec")) != []
    assert impure(bad) == {"os", "random"}
    assert foreign(bad, "p2pcluster") == {"requests"}
    assert not documented(bad)
    assert catches_blindly(bad) == [12, 16]
    assert unannotated(bad) == ["line 8: late"]
    assert floor_of("nobody") is None


@pytest.mark.parametrize("number", range(len(FLOORS)))
def test_no_module_stands_on_two_floors(number: int) -> None:
    assert not FLOORS[number] & {name for other, names in enumerate(FLOORS) if other != number for name in names}
