"""What a running function can ask about the item in its hands.

This file alone decides what `current()` answers, and that the answer belongs to one stage process, or to one task of an
`async` stage. It refuses to know where an item comes from, where progress is shown and what a log is: the shell hands
those in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from p2pcluster.errors import WrongUsage

if TYPE_CHECKING:
    from logging import Logger
    from os import PathLike

_current: ContextVar[Context] = ContextVar("p2pcluster_context")
_of_process: Context | None = None  # the one that was made active last


class Context:
    """The answer of `current()`. One object serves many items: copy what is needed out of it, do not keep it.

    For the life of a process: `run, queue, stage, node, params, out_dir, log, totals` (`totals` in `on_done` only). For
    each item, assigned by whoever runs the function: `item_id` always, `delivery` (1 is the first) and `put_key` where
    they differ from the item before. A source has no item: there `item_id` is None, or the number of the tick. For a
    batch they are those of its first item.
    """

    __slots__ = (
        "run",
        "queue",
        "stage",
        "node",
        "params",
        "out_dir",
        "log",
        "totals",
        "item_id",
        "delivery",
        "put_key",
        "_on_progress",
    )

    def __init__(
        self,
        *,
        run: int | str,
        queue: str | None,
        stage: str,
        node: str,
        params: Any,
        out_dir: str | PathLike[str],
        log: Logger,
        on_progress: Callable[[float, str], None],
        totals: dict[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.queue = queue
        self.stage = stage
        self.node = node
        self.params = params
        self.out_dir = out_dir
        self.log = log
        self.totals = totals
        self.item_id: int | None = None
        self.delivery = 1
        self.put_key: str | None = None
        self._on_progress = on_progress

    @property
    def key(self) -> str:
        """The same at every delivery of the item: the key it was put with, else one made of run, queue and id.

        Raises `WrongUsage` where there is no item. Made when asked for, because most functions never ask.
        """
        if self.put_key is not None:
            return self.put_key
        if self.item_id is None:
            raise WrongUsage(f"{self.stage!r} has no item now, so it has no key; use `key` in a stage or a sink")
        return f"{self.run}/{self.queue or self.stage}/{self.item_id}"

    def progress(self, fraction: float, text: str = "", total: float | None = None) -> None:
        """Say how far the item in hand is: a fraction of 1, or of `total` if given; beyond the end is the end."""
        if total is not None:
            fraction = fraction / total if total > 0 else 1.0
        self._on_progress(min(max(fraction, 0.0), 1.0), text)


def current() -> Context:
    """The context of the item that this stage is working on. Raises `WrongUsage` outside a stage."""
    try:
        return _current.get()
    except LookupError:
        raise WrongUsage(
            "current() was called outside a stage; call it in the function that handles the item, "
            "and pass what it returns to the threads that the function starts"
        ) from None


def item_in_hand() -> int | None:
    """The id of the item that is worked on here, for what is printed; in a thread of the user's, of the process's."""
    context = _current.get(_of_process)
    return None if context is None else context.item_id


@contextmanager
def active(context: Context) -> Iterator[Context]:
    """Make `context` what `current()` answers inside the `with`; an `async` stage does so once in each of its tasks."""
    global _of_process
    _of_process = context
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
