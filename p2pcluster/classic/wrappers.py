"""The decorators of the older API: a decorated function that is called with queues runs the loop, and with anything else is the function
itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from p2pcluster.classic import loops
from p2pcluster.classic.functions import ScriptEnds, is_loading
from p2pcluster.classic.queues import RawQueue
from p2pcluster.core import stages
from p2pcluster.core.stages import Stage
from p2pcluster.errors import WrongUsage


class Looping:
    """A decorated function. `stage` is what it would be in a pipeline, with the options that it was given."""

    def __init__(self, stage: Stage[..., Any]) -> None:
        self.stage = stage
        self.__qualname__ = stage.name
        functools.update_wrapper(self, stage.function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or kwargs or not all(isinstance(value, RawQueue) for value in args):
            return self.stage(*args, **kwargs)
        if not is_loading():
            return loops.run(self.stage, args)
        if self.stage.kind != "source":
            raise ScriptEnds  # its loop has no end, so nothing behind it is for a process
        return None

    def __reduce__(self) -> str:
        """Pickled as the place where it stands, like a function."""
        return self.__qualname__

    def __repr__(self) -> str:
        return repr(self.stage)


def _decorator(make: Callable[..., Any], *known: str) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        for name in options:
            if name not in known:
                raise WrongUsage(f"a decorator of the older API has no option {name!r}" + (f", only {' and '.join(known)}" if known else "")
                                 + ": where and in how many processes a function runs is said to process")
        if function is None:
            return functools.partial(decorate, **options)
        return Looping(make(function, **options))

    return decorate


i_wrap = _decorator(stages.source)
io_wrap = _decorator(stages.stage, "retries", "backoff_s")
o_wrap = _decorator(stages.sink, "retries", "backoff_s")


def as_looping(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `process` calls with the queues: stages of a pipeline run the loop too."""
    return Looping(function) if isinstance(function, Stage) else function
