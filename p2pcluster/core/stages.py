"""What a person writes a pipeline with: stages, queues, and the flows that `>>` makes of them.

This file alone decides what can be a stage, how it is called, and what may stand beside what as far as two neighbours
can tell. It refuses to know whether the whole is a pipeline (`graph.py`) and how anything runs.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    Unpack,
    cast,
    overload,
)

from p2pcluster import config
from p2pcluster.core.options import Kind, OptionWords, Site, call_site, check_name, checked_options, is_whole, place
from p2pcluster.errors import GraphError, ValueRefused

Shape = Literal["function", "generator", "class", "async"]
Codec = Literal["pickle", "json"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)
W = TypeVar("W")
Item_contra = TypeVar("Item_contra", contravariant=True)


# What a function may return besides a plain value.


class Drop(enum.Enum):
    """The type of `DROP`: an enum, because its member is the same object on both sides of a pickle."""

    DROP = "DROP"


DROP: Final = Drop.DROP
"""What a stage returns to emit nothing for its item."""


class To(NamedTuple, Generic[V_co]):
    """A value and the route that it takes."""

    label: str
    value: V_co


class At(NamedTuple, Generic[V_co]):
    """A source's value and the cursor from which a restarted source goes on behind it; the value may be a `To`."""

    value: V_co
    cursor: Any


# What a type checker is told about neighbours. P and R stay the function's own; what a function emits (what it yields,
# what it awaits to, what its `To` carries) is worked out by the overloads of `_emits`, so no third parameter is needed.
# The methods under TYPE_CHECKING are never called: they are the shapes by which a checker compares two neighbours.

_Wrapped = Union[To[V], At[V]]  # noqa: UP007 - an alias that can be subscripted, here and below
_Emitted = Union[V, To[V], At[V], Drop]  # noqa: UP007


class _Emits(Protocol[P, V_co]):
    def _starts(self, *args: P.args, **kwargs: P.kwargs) -> None: ...
    def _emits(self) -> V_co: ...


class _Takes(Protocol[Item_contra, R_co]):
    def _joins(self, item: Item_contra, /) -> R_co: ...


class _TakesItem(Protocol[Item_contra, R_co]):
    def __call__(self, item: Item_contra, /) -> R_co: ...


# mypy takes a decorated class for the class that it was, so the class itself is let through where its Stage stands.
_Next = Union[_Takes[V, W], type[_TakesItem[V, W]]]  # noqa: UP007


class Joinable(Generic[P, R_co]):
    """What `>>` works on: stages, queues and the flows made of them."""

    if TYPE_CHECKING:

        def _starts(self, *args: P.args, **kwargs: P.kwargs) -> None: ...
        def _joins(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

        @overload
        def _emits(self: Joinable[P, Iterator[_Wrapped[V]]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, Iterator[_Emitted[V]]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, AsyncIterator[_Wrapped[V]]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, AsyncIterator[_Emitted[V]]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, Coroutine[Any, Any, _Wrapped[V]]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, Coroutine[Any, Any, _Emitted[V]]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, _Wrapped[V]]) -> V: ...
        @overload
        def _emits(self: Joinable[P, _Emitted[V]]) -> V: ...
        def _emits(self) -> Any: ...

    @overload
    def __rshift__(self, other: Queue) -> Flow[P, R_co]: ...
    @overload
    def __rshift__(self, other: Mapping[str, object]) -> Flow[P, Any]: ...
    @overload
    def __rshift__(self: _Emits[P, V], other: _Next[V, W]) -> Flow[P, W]: ...
    @overload
    def __rshift__(self: _Emits[P, V], other: Sequence[_Next[V, Any]]) -> Flow[P, Any]: ...
    def __rshift__(self, other: Any) -> Any:
        if isinstance(other, Mapping):
            return _routed(as_flow(self), other)
        return _joined(as_flow(self), as_flow(other))

    def __rrshift__(self, other: Sequence[object] | type[Any]) -> Flow[..., R_co]:
        return _joined(as_flow(other), as_flow(self))


# Stages.


def _without_partial(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _called(function: Any) -> Any:
    """The function whose body runs when `function` (a function, class, partial or object) is called with an item."""
    function = _without_partial(function)
    if inspect.isclass(function):
        return next((vars(base)["__call__"] for base in function.__mro__ if "__call__" in vars(base)), None)
    return function if inspect.isroutine(function) else getattr(type(function), "__call__", None)


def _code_at(function: Any, site: Site) -> str:
    """Where `function` is written; `site` for what has no code of its own to say so (classes, built-in functions)."""
    if inspect.isclass(function):
        return site.at
    function = inspect.unwrap(_without_partial(function))
    code = getattr(_called(function), "__code__", None)
    if code is None:
        return site.at
    return place(code.co_filename, code.co_firstlineno, getattr(function, "__module__", None) or site.module)


def _signature(function: Any) -> inspect.Signature | None:
    """How `function` is called with an item; None where Python does not tell (some built-in functions)."""
    try:
        if not inspect.isclass(function):
            return inspect.signature(function)
        signature = inspect.signature(function.__call__)
    except ValueError:
        return None
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _check_class(who: str, function: Any) -> None:
    if not inspect.isclass(function):
        return
    if _called(function) is None:
        raise GraphError(f"{who}: its class has no __call__; write `def __call__(self, item)`, or use a function")
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise GraphError(f"{who}: its class is made without arguments; give those of __init__ defaults") from None
    except ValueError:  # a class written in C that does not describe itself
        return


def _check_takes_item(who: str, signature: inspect.Signature) -> None:
    try:
        signature.bind(None)
    except TypeError:
        raise GraphError(
            f"{who}: is called with one positional item, and its signature is {signature}; let it take exactly that"
        ) from None


def _check_takes_nothing(who: str, signature: inspect.Signature, words: Sequence[str]) -> None:
    if ("shard" in words) != ("shards" in words):
        raise GraphError(f"{who}: takes one of `shard, shards`; take both, or neither")
    try:
        signature.bind(**dict.fromkeys(words))
    except TypeError:
        raise GraphError(
            f"{who}: a source takes no arguments but `cursor` and `shard, shards`, and its signature is {signature}; "
            "give the others defaults"
        ) from None


_SOURCE_WORDS = ("cursor", "shard", "shards")


class Stage(Joinable[P, R_co]):
    """A function with its place in a pipeline, made by `source`, `stage` or `sink`; called like the function itself.

    `is_generator` (emits what it yields), `is_async`, `resumable` (a source that takes `cursor`) and `sharded` (one
    that takes `shard, shards`) are found through partials and in a class's `__call__`. Nothing changes once it is made.
    Two stages are equal when they are the same object.
    """

    def __init__(
        self,
        function: Callable[P, R_co],
        kind: Kind,
        name: str,
        given: Mapping[str, Any],
        site: Site,
        defined_at: str,
    ) -> None:
        blame = f"{kind} {name!r} ({defined_at})"
        _check_class(blame, function)
        called = _called(function)
        signature = _signature(function)
        self.name = name
        self.function = function
        self.kind: Kind = kind
        self.options = checked_options(blame, kind, given)
        self.defined_at = defined_at
        self.is_generator = inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called)
        self.is_async = inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)
        self.shape = self._shape()
        self._given = dict(given)
        words = [word for word in _SOURCE_WORDS if kind == "source" and signature and word in signature.parameters]
        self.resumable = "cursor" in words
        self.sharded = "shard" in words
        if signature is not None and kind == "source":
            _check_takes_nothing(blame, signature, words)
        elif signature is not None:
            _check_takes_item(blame, signature)
        self._check_options(blame)
        self._look_like(function, signature, site)

    def _shape(self) -> Shape:
        if inspect.isclass(self.function):
            return "class"
        if self.is_async:
            return "async"
        return "generator" if self.is_generator else "function"

    def _check_options(self, blame: str) -> None:
        """The rules that need both an option and the function."""
        if self.options.concurrency > 1 and not self.is_async:
            raise GraphError(f"{blame}: concurrency is for `async def`; use processes={self.options.concurrency}")
        if self.kind != "source":
            return
        if self.options.processes == "auto":
            raise GraphError(f'{blame}: a source has no queue that "auto" could go by; give a number of processes')
        if self.options.max_items is not None and self.is_generator and not self.resumable and self.options.every_s is None:
            raise GraphError(
                f"{blame}: a fresh process would run the generator from its start, over and over; take `cursor`, or leave max_items out"
            )
        if self.options.processes > 1 and self.options.every_s is not None and not self.sharded:
            raise GraphError(f"{blame}: {self.options.processes} processes would each run every tick; take `shard, shards`")
        if self.options.processes > 1 and self.is_generator and not self.sharded:
            raise GraphError(
                f"{blame}: {self.options.processes} processes would each yield everything; take `shard, shards`"
            )

    def _look_like(self, function: Any, signature: inspect.Signature | None, site: Site) -> None:
        self.__name__ = self.__qualname__ = self.name
        # `updated=()`: a class's __dict__ holds its methods, and a function's may hold anything.
        functools.update_wrapper(self, function, updated=())
        # A stage lives where it was made: another module than its function's for `stage(math.sqrt, name="root")`.
        self.__module__ = site.module
        if signature is not None:
            self.__signature__ = signature

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function itself. A class is made, entered, called and left, all for this one call."""
        if self.shape == "class":
            return cast("R_co", _call_once(self, args, kwargs))
        return self.function(*args, **kwargs)

    def named(self, name: str, **overrides: Any) -> Stage[P, R_co]:
        """The same function as another stage, with this one's options but for `overrides`. Raises `GraphError`."""
        check_name(self.kind, name, self.defined_at)
        return Stage(self.function, self.kind, name, {**self._given, **overrides}, call_site(), self.defined_at)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name!r} ({self.defined_at})>"

    def __reduce__(self) -> str:
        """Pickle as the place where it can be found again. Raises `ValueRefused` when there is none."""
        module = sys.modules.get(self.__module__)
        variables = [name for name, value in vars(module).items() if value is self] if module else []
        for path in (self.__qualname__, *variables):
            if _looked_up(module, path) is self:
                return path
        raise ValueRefused(
            f"{self!r} cannot be pickled: module {self.__module__!r} has no variable that holds it; assign it to one"
        )


def _looked_up(module: object, path: str) -> object:
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def entered(made: Any) -> AbstractContextManager[Any]:
    """The context manager that a stage class's object is, or one that does nothing."""
    return made if hasattr(type(made), "__enter__") else nullcontext(made)


@asynccontextmanager
async def entered_async(made: Any) -> AsyncIterator[Any]:
    """The same for an object that is used in a loop: its `async with` if it has one, else its `with`."""
    if hasattr(type(made), "__aenter__"):
        async with made:
            yield made
    else:
        with entered(made):
            yield made


def needs_loop(stage: Stage[..., Any]) -> bool:
    """Whether calling `stage` gives something to be awaited: it is `async`, or its class can only be entered so."""
    function = stage.function
    return stage.is_async or (
        stage.shape == "class" and hasattr(function, "__aenter__") and not hasattr(function, "__enter__")
    )


def _call_once(stage: Stage[..., Any], args: Any, kwargs: Any) -> Any:
    once: Callable[..., Any]
    if needs_loop(stage):
        once = _yielded_async if stage.is_generator else _awaited
    else:
        once = _yielded if stage.is_generator else _returned
    return once(stage.function(), args, kwargs)


def _returned(made: Any, args: Any, kwargs: Any) -> Any:
    with entered(made):
        return made(*args, **kwargs)


def _yielded(made: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    with entered(made):
        yield from made(*args, **kwargs)


async def _awaited(made: Any, args: Any, kwargs: Any) -> Any:
    async with entered_async(made):
        returned = made(*args, **kwargs)
        return await returned if inspect.isawaitable(returned) else returned


async def _yielded_async(made: Any, args: Any, kwargs: Any) -> AsyncIterator[Any]:
    async with entered_async(made):
        yielded = made(*args, **kwargs)
        if inspect.isgenerator(yielded):
            for value in yielded:
                yield value
        else:
            async for value in yielded:
                yield value


# The decorators.


class _CallableObject(Protocol[P, R_co]):
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class _Decorates(Protocol):
    @overload
    def __call__(self, function: type[_CallableObject[P, R]], /) -> Stage[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Stage[P, R]: ...


class _DecoratesBatch(Protocol):
    def __call__(self, function: Callable[..., Any], /) -> Stage[..., Any]: ...


class Decorator:
    """Makes a Stage of a function or class: `@stage`, `@stage(retries=5)` or `stage(function, name="x")`.

    Options, with what they default to:
    - `name` (the function's): lambdas and partials need one;
    - `processes` ("auto" for a stage, 1 for a source or sink), `per_node` (a maximum);
    - `where` (None): an expression over the facts of a node;
    - `retries` (3, so four deliveries), `backoff_s` (1, doubling), `timeout_s` (None);
    - `batch` (None): the function gets a list of so many items, or of those that came within `batch_wait_s` (0.05);
    - `concurrency` (1): how many items an `async def` has in hand at once;
    - `rate` (None): "100/s" over the whole cluster;
    - `every_s` (None): a source is called so often; `missed` ("skip"): of the ticks that were missed "all", or the last one;
    - `max_items` (None): a process makes way for a fresh one after so many items;
    - `parked_share_max` (None): the stage stops by itself when a larger share of its last items was parked.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind

    # A batch turns the function's lists into its neighbours' items; types cannot follow that, so nothing is claimed.
    @overload
    def __call__(
        self, function: Callable[..., Any], /, *, batch: int | None, **options: Unpack[OptionWords]
    ) -> Stage[..., Any]: ...
    @overload
    def __call__(self, function: type[_CallableObject[P, R]], /, **options: Unpack[OptionWords]) -> Stage[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /, **options: Unpack[OptionWords]) -> Stage[P, R]: ...
    @overload
    def __call__(self, /, *, batch: int | None, **options: Unpack[OptionWords]) -> _DecoratesBatch: ...
    @overload
    def __call__(self, /, **options: Unpack[OptionWords]) -> _Decorates: ...
    def __call__(self, function: Any = None, /, **options: Any) -> Any:
        if function is None:
            return functools.partial(self._make, given=options)
        return self._make(function, given=options)

    def _make(self, function: Any, given: Mapping[str, Any]) -> Stage[..., Any]:
        site = call_site()
        if isinstance(function, Stage):
            raise GraphError(f"{who(function)}: is a {function.kind} already; use its `.named(...)`")
        if not callable(function):
            raise GraphError(f"{self._kind} at {site.at}: {function!r} cannot be called; give it a function or a class")
        defined_at = _code_at(function, site)
        given = dict(given)
        name = given.pop("name", None)
        if name is None:
            name = getattr(function, "__name__", "<lambda>")
        if name == "<lambda>":
            raise GraphError(f'{self._kind} at {defined_at}: {_noun(function)} has no name; add name="..."')
        check_name(self._kind, name, defined_at)
        return Stage(function, self._kind, name, given, site, defined_at)

    def __repr__(self) -> str:
        return f"<decorator {self._kind}>"


def _noun(function: Any) -> str:
    if isinstance(function, functools.partial):
        return "a partial"
    if inspect.isclass(function) or inspect.isroutine(function):
        return "a lambda" if function.__name__ == "<lambda>" else f"plain {function.__name__!r}"
    return repr(function)


source: Final = Decorator("source")
stage: Final = Decorator("stage")
sink: Final = Decorator("sink")
i_wrap: Final = source
io_wrap: Final = stage
o_wrap: Final = sink


# Queues and flows.


@dataclass(frozen=True)
class Queue(Joinable[..., Any]):
    """A queue with a name and limits of its own, before a stage, behind one, or both. Equal ones are the same queue.

    `maxsize` is in items, None for no limit; `codec` says how client and stage processes write a value.
    """

    name: str
    maxsize: int | None = config.QUEUE_ITEMS_MAX
    codec: Codec = "pickle"
    defined_at: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        at = call_site().at
        object.__setattr__(self, "defined_at", at)
        check_name("queue", self.name, at)
        if self.maxsize is not None and not is_whole(self.maxsize, 1):
            raise GraphError(
                f"queue {self.name!r} ({at}): maxsize={self.maxsize!r} is not a whole number from 1 (None: no limit)"
            )
        if self.codec not in ("pickle", "json"):
            raise GraphError(f'queue {self.name!r} ({at}): codec={self.codec!r} is unknown; use "pickle" or "json"')

    @property
    def bytes_max(self) -> int | None:
        """The limit in bytes; a queue without a limit in items has none in bytes either."""
        return None if self.maxsize is None else config.QUEUE_BYTES_MAX


Node = Stage[..., Any] | Queue


class Edge(NamedTuple):
    """One arrow of a graph; `label` is the route it belongs to, None where every value goes along."""

    before: Node
    label: str | None
    after: Node


@dataclass(frozen=True)
class Flow(Joinable[P, R_co]):
    """Stages and queues that are joined; `>>` makes a new one from the `tails` of one to the `heads` of another."""

    edges: tuple[Edge, ...]
    heads: tuple[Node, ...]
    tails: tuple[Node, ...]


def as_flow(value: object) -> Flow[..., Any]:
    if isinstance(value, Flow):
        return value
    if isinstance(value, (Stage, Queue)):
        return Flow((), (value,), (value,))
    if isinstance(value, (list, tuple)):
        return _side_by_side([as_flow(one) for one in value])
    raise GraphError(f"{call_site().at}: {_noun(value)} cannot stand in a flow; decorate it with source, stage or sink")


def _side_by_side(flows: Sequence[Flow[..., Any]]) -> Flow[..., Any]:
    if not flows:
        raise GraphError(f"{call_site().at}: an empty list or dict stands in a flow; fill it or leave it out")
    return Flow(
        tuple(edge for flow in flows for edge in flow.edges),
        distinct(node for flow in flows for node in flow.heads),
        distinct(node for flow in flows for node in flow.tails),
    )


def _joined(left: Flow[..., Any], right: Flow[..., Any], label: str | None = None) -> Flow[..., Any]:
    between = tuple(Edge(tail, label, head) for tail in left.tails for head in right.heads)
    return Flow(left.edges + between + right.edges, left.heads, right.tails)


def _routed(left: Flow[..., Any], routes: Mapping[Any, object]) -> Flow[..., Any]:
    for tail in left.tails:
        if isinstance(tail, Queue):
            raise GraphError(f"{who(tail)}: a queue cannot choose routes; put a stage between it and the dict")
    for label in routes:
        if not isinstance(label, str):
            raise GraphError(f"{who(left.tails[0])}: route {label!r} is not a str; label its routes with str")
    joined = [_joined(left, as_flow(target), label) for label, target in routes.items()]
    merged = _side_by_side(joined)
    return Flow(distinct(merged.edges), left.heads, merged.tails)


def distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def who(node: Node) -> str:
    kind = "queue" if isinstance(node, Queue) else node.kind
    return f"{kind} {node.name!r} ({node.defined_at})"
