"""How a function of the user's is named to another process, and found again there.

Decided here: a function travels as the place where it stands and never as code or as a pickle; and a script is run once more to get at
its functions, under the name `__mp_main__` as `multiprocessing` does it, while everything of the older API that it calls does nothing.
The run ends at the call for whose processes it is, or before it where the script needs something that came out of a queue. So a script
needs no `if __name__` guard.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import tokenize
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2pcluster.errors import ProjectError, WrongUsage

MAIN = "__mp_main__"


@dataclass(frozen=True)
class Reference:
    """Where a function stands. `script` is its file, where it stands in the program itself; `calls` the blocking calls up to the one that
    it is for."""

    module: str
    qualname: str
    script: str | None = None
    package: str | None = None
    calls: int = 1

    def as_fields(self) -> dict[str, Any]:
        return asdict(self)


class ScriptEnds(SystemExit):
    """The script that is run for its functions is at the call that blocks: what stands behind it is not for this process. A thread of the
    script's ends with it in silence."""


class _Loading:
    """A script that is run for its functions only, and how many of its blocking calls are still to come."""

    def __init__(self) -> None:
        self.calls_left = 0  # 0: none is run so, this is the program itself
        self.calls = 0  # of the program itself
        self.module: types.ModuleType | None = None
        self.wanted = ""


_loading = _Loading()


def is_loading() -> bool:
    """Whether the older API is only to look as if it were there."""
    return _loading.calls_left > 0


def blocking_call() -> bool:
    """A call that blocks for as long as processes run: whether it is to do so. Raises `ScriptEnds` at the call that is looked for. In
    which order threads make such calls is not the script's to say, so theirs are not counted."""
    if threading.current_thread() is not threading.main_thread():
        return not is_loading()
    if not is_loading():
        _loading.calls += 1
        return True
    _loading.calls_left -= 1
    if not _loading.calls_left:
        _loading.calls_left = 1  # whoever catches the end of the script is still in it
        raise ScriptEnds
    return False


def needs_value() -> None:
    """The script would go on by what is in a queue, and here is nothing. Raises `ScriptEnds` if what is looked for is there already."""
    if hasattr(_loading.module, _loading.wanted):
        raise ScriptEnds


def reference_of(function: Callable[..., Any]) -> Reference:
    """Raises `WrongUsage` for what no other process can find."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or not isinstance(module, str) or not isinstance(qualname, str):
        raise WrongUsage(f"{function!r:.80} is no function: give process functions, and for each the queues and the number of processes")
    if "<" in qualname:
        raise WrongUsage(f"{qualname} cannot be found by another process: define it at the top of its file, with def")
    if module not in ("__main__", MAIN):
        return Reference(module, qualname)
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if script is None:
        raise WrongUsage(f"{qualname} stands in no file, so no other process can find it: put it into a file and import it from there")
    return Reference(module, qualname, str(Path(script).resolve()), getattr(main, "__package__", None) or None, max(1, _loading.calls))


def find(reference: Reference) -> Callable[..., Any]:
    """The function. Raises `ProjectError` where it is not; what the user's module raises goes up as it is."""
    try:
        found: Any = _main(reference) if reference.script else importlib.import_module(reference.module)
    except ModuleNotFoundError as error:
        raise ProjectError(f"module {error.name!r} is not on this machine: put it beside the program, or use ProtocolServer, which sends "
                           "the files") from error
    for name in reference.qualname.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        where = reference.script or f"module {reference.module}"
        raise ProjectError(f"there is no function {reference.qualname} in {where} up to the call that starts its processes: define it "
                           "before that")
    return found  # type: ignore[no-any-return]


def _main(reference: Reference) -> types.ModuleType:
    """The program's script as a module, run up to the call that this process is for."""
    assert reference.script is not None, "it is a script's function"
    module = types.ModuleType(MAIN)
    module.__file__, module.__package__ = reference.script, reference.package
    try:
        with tokenize.open(reference.script) as file:
            code = compile(file.read(), reference.script, "exec")
    except OSError as error:
        raise ProjectError(f"{reference.script} cannot be read ({error.strerror}): the functions of a script need its file") from error
    sys.modules["__main__"] = sys.modules[MAIN] = module
    _loading.calls_left, _loading.module, _loading.wanted = reference.calls, module, reference.qualname.partition(".")[0]
    try:
        with contextlib.suppress(ScriptEnds):
            exec(code, module.__dict__)
    finally:
        _loading.calls_left = 0
    return module
