"""Modules of a project that have the name of one of Python's own, as a `queue.py` beside a `pipeline.py`.

Decided here: this package gets Python's, whatever lies in the folder that a program was started in; and a project that imports its own by a
name that stands for Python's by then is told so. Until Python's own come first, nothing is imported but what each Python has loaded.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT = os.path.dirname(os.path.abspath(os.__file__))


def _is_pythons(path: str) -> bool:
    return (path == _ROOT or path.startswith(_ROOT + os.sep)) and "site-packages" not in path


class PythonsFirst:
    """While it is entered, modules are looked for among Python's own before anywhere else."""

    def __enter__(self) -> None:
        self._before = sys.path[:]
        sys.path.sort(key=lambda path: not _is_pythons(path))

    def __exit__(self, *exception: object) -> None:
        sys.path[:] = self._before


def put_pythons_first() -> None:
    """For a process that is a node's from here on: it looks for Python's own first for good, and forgets others that were loaded by their
    names."""
    sys.path.sort(key=lambda path: not _is_pythons(path))
    for name in sys.stdlib_module_names & set(sys.modules):
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and not _is_pythons(os.path.abspath(file)) and "site-packages" not in file:
            del sys.modules[name]


def hidden_names(paths: Iterable[str]) -> dict[str, str]:
    """Of modules in these folders that have the name of one of Python's that is loaded already, the files by their names."""
    found: dict[str, str] = {}
    for path in paths:
        for entry in os.listdir(path) if os.path.isdir(path) else ():
            name, suffix = os.path.splitext(entry)
            is_module = suffix == ".py" or os.path.exists(os.path.join(path, name, "__init__.py"))
            if name in sys.stdlib_module_names and name in sys.modules and is_module:
                found.setdefault(name, entry)
    return found


def wrong_import(hidden: dict[str, str], paths: list[str], module: str) -> str | None:
    """Which of the project's files, `module` or one that it has loaded, imports one of the `hidden`, in words."""
    import ast

    tops = [os.path.abspath(path) + os.sep for path in paths]
    files = {getattr(loaded, "__file__", None) for loaded in list(sys.modules.values())}
    files |= {os.path.join(path, *module.split(".")) + ".py" for path in paths}
    for file in sorted(file for file in files if file and os.path.abspath(file).startswith(tuple(tops)) and os.path.exists(file)):
        with open(file, "rb") as opened:
            tree = ast.parse(opened.read())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if (top := name.partition(".")[0]) in hidden:
                    return (f"{os.path.basename(file)} imports {top} and would get Python's own module of that name instead of the "
                            f"project's {hidden[top]}: rename that")
    return None
