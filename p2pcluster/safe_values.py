"""Shows what a user's value holds without running anything of the user's.

Decided here alone: which pickles are plain data (None, bool, int, float, str, bytes, bytearray, list, tuple, dict,
set, frozenset, and the dates and times of `datetime`), and how a value is written for a reader. The bytes are read by
a small machine of its own that knows the opcodes of plain data and no others: it imports nothing and calls nothing
but `datetime`'s constructors, so whatever else a pickle asks for is shown by its disassembly. What is shown is
bounded, since a few bytes can stand for a value without an end. It refuses to know where bytes come from.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

READ_BYTES_MAX = 1 << 20  # a larger value is named by its size: read step by step it would take seconds
TEXT_CHARS_MAX = 2000  # of a value in one line
DISASSEMBLY_LINES_MAX = 60
_DEPTH_MAX = 50  # of what is shown; what lies deeper is three dots
_KEY_NODES_MAX = 1000  # parts of a dict's key: a deeper tuple would overrun the interpreter's stack when it is hashed
_JSON_NODES_MAX = 100_000
_INT_BITS_MAX = 12_000  # about what the interpreter is willing to write in decimal

_CLASSES: dict[tuple[str, str], Callable[..., Any]] = {
    ("datetime", name): getattr(datetime, name) for name in ("date", "datetime", "time", "timedelta", "timezone")
}


class NotPlain(Exception):
    """The bytes are no pickle of plain data; says why."""


def read_plain(body: bytes) -> Any:
    """The plain data that a pickle holds. Raises `NotPlain`."""
    if len(body) > READ_BYTES_MAX:
        raise NotPlain(f"{len(body):,} bytes are too many to be read here")
    return _Machine().run(body)


def show(body: bytes, codec: str = "pickle") -> str:
    """A value for people: one line for plain data, else why it is none and the disassembly, line by line."""
    try:
        return render(_read(body, codec))
    except NotPlain as reason:
        return "\n".join([f"not plain data: {reason}", *disassemble(body, codec)])


def show_json(body: bytes, codec: str = "pickle") -> dict[str, Any]:
    """A value for programs: `value` where JSON can say it exactly, `python` for other plain data, else `not_plain` with
    the reason and `disassembly`, a list of lines."""
    try:
        value = _read(body, codec)
    except NotPlain as reason:
        return {"not_plain": str(reason), "disassembly": disassemble(body, codec)}
    return {"value": value} if _is_json(value) else {"python": render(value)}


def _read(body: bytes, codec: str) -> Any:
    if codec != "json":
        return read_plain(body)
    if len(body) > READ_BYTES_MAX:
        raise NotPlain(f"{len(body):,} bytes are too many to be read here")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotPlain(f"not JSON ({error})") from error


def disassemble(body: bytes, codec: str = "pickle") -> list[str]:
    """What a pickle would do when it is loaded, one opcode a line; the first bytes of what is no pickle."""
    if codec == "json":
        return [render(body[:200])]
    lines = _Lines()
    try:
        pickletools.dis(body[:READ_BYTES_MAX], lines)
    except _Enough:
        return [*lines.text.splitlines()[:DISASSEMBLY_LINES_MAX], "..."]
    except (ValueError, IndexError, OverflowError) as error:
        return [*lines.text.splitlines(), f"... ({error})"]
    return lines.text.splitlines()


class _Enough(Exception):
    pass


class _Lines(io.StringIO):
    """Takes the disassembler's output until it is enough: that of a large value would have no end."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = 0

    def write(self, text: str) -> int:
        self._ended += text.count("\n")
        if self._ended > DISASSEMBLY_LINES_MAX:
            raise _Enough
        return super().write(text if len(text) <= 200 else text[:200] + "...")

    @property
    def text(self) -> str:
        return self.getvalue()


# ---- reading


class _Machine:
    """A pickle machine for plain data. `_marks` holds the stacks that MARK put aside."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, body: bytes) -> Any:
        try:
            for opcode, argument, at in pickletools.genops(body):
                if opcode.name == "STOP":
                    if self._marks or len(self._stack) != 1:
                        raise NotPlain("it ends before its value is whole")
                    return self._checked(self._stack.pop())
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise NotPlain(f"{opcode.name} at byte {at} makes more than plain data")
                step(self, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise NotPlain(f"not a whole pickle ({error})") from error
        raise NotPlain("it ends before its value is whole")

    def _checked(self, value: Any) -> Any:
        if isinstance(value, _Class):
            raise NotPlain(f"it is the class {value.name[0]}.{value.name[1]} itself")
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        return self._checked(self._stack.pop())

    def _pop_mark(self) -> list[Any]:
        items = [self._checked(item) for item in self._stack]
        self._stack = self._marks.pop()
        return items

    # -- steps

    def _constant(self, argument: Any) -> None:
        self._push(argument)

    def _skip(self, argument: Any) -> None:
        pass

    def _bytearray(self, argument: Any) -> None:
        self._push(bytearray(argument))

    def _mark(self, argument: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _drop(self, argument: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _drop_mark(self, argument: Any) -> None:
        self._pop_mark()

    def _dup(self, argument: Any) -> None:
        self._push(self._stack[-1])

    def _memoize(self, argument: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, argument: Any) -> None:
        self._memo[int(argument)] = self._stack[-1]

    def _get(self, argument: Any) -> None:
        self._push(self._memo[int(argument)])

    def _tuple(self, count: int | None) -> None:
        if count is None:
            self._push(tuple(self._pop_mark()))
            return
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _list(self, argument: Any) -> None:
        self._push(self._pop_mark())

    def _append(self, argument: Any) -> None:
        item = self._pop()
        self._target(list).append(item)

    def _appends(self, argument: Any) -> None:
        items = self._pop_mark()
        self._target(list).extend(items)

    def _dict(self, argument: Any) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_all(items)

    def _set_item(self, argument: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_all([key, value])

    def _set_items(self, argument: Any) -> None:
        self._set_all(self._pop_mark())

    def _set_all(self, items: list[Any]) -> None:
        target = self._target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    def _add_items(self, argument: Any) -> None:
        items = self._pop_mark()
        self._target(set).update(map(_hashable, items))

    def _frozenset(self, argument: Any) -> None:
        self._push(frozenset(map(_hashable, self._pop_mark())))

    def _target(self, kind: type) -> Any:
        target = self._stack[-1]
        if type(target) is not kind:
            raise NotPlain(f"it adds to a {type(target).__name__} as if it were a {kind.__name__}")
        return target

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._push(_Class((module, name)))

    def _stack_global(self, argument: Any) -> None:
        name, module = self._pop(), self._pop()
        self._push(_Class((module, name)))

    def _reduce(self, argument: Any) -> None:
        arguments, called = self._pop(), self._stack.pop()
        if not isinstance(called, _Class) or type(arguments) is not tuple:
            raise NotPlain("it calls what is no class")
        try:
            self._push(_CLASSES[called.name](*arguments))
        except (ValueError, TypeError, OverflowError) as error:
            raise NotPlain(f"{called.name[1]} does not take what it is given ({error})") from error


class _Class:
    """A class of `_CLASSES` on the stack, where only REDUCE may take it from. Raises `NotPlain` for any other."""

    def __init__(self, name: tuple[Any, Any]) -> None:
        if name not in _CLASSES:
            raise NotPlain(f"it names {str(name[0])[:100]}.{str(name[1])[:100]}")
        self.name = name


def _steps() -> dict[str, Callable[[_Machine, Any], None]]:
    constants = ("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
                 "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8")
    steps: dict[str, Callable[[_Machine, Any], None]] = dict.fromkeys(constants.split(), _Machine._constant)
    makers: dict[str, Callable[[], Any]] = {
        "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
        "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
    }
    for name, make in makers.items():
        steps[name] = lambda machine, argument, make=make: machine._push(make())  # type: ignore[misc]
    for name in ("PUT", "BINPUT", "LONG_BINPUT"):
        steps[name] = _Machine._put
    for name in ("GET", "BINGET", "LONG_BINGET"):
        steps[name] = _Machine._get
    for count in (1, 2, 3):
        steps[f"TUPLE{count}"] = lambda machine, argument, count=count: machine._tuple(count)  # type: ignore[misc]
    steps |= {
        "PROTO": _Machine._skip, "FRAME": _Machine._skip,
        "MARK": _Machine._mark, "POP": _Machine._drop, "POP_MARK": _Machine._drop_mark, "DUP": _Machine._dup,
        "MEMOIZE": _Machine._memoize, "BYTEARRAY8": _Machine._bytearray,
        "TUPLE": lambda machine, argument: machine._tuple(None), "FROZENSET": _Machine._frozenset,
        "LIST": _Machine._list, "APPEND": _Machine._append, "APPENDS": _Machine._appends, "DICT": _Machine._dict,
        "SETITEM": _Machine._set_item, "SETITEMS": _Machine._set_items, "ADDITEMS": _Machine._add_items,
        "GLOBAL": _Machine._global, "STACK_GLOBAL": _Machine._stack_global, "REDUCE": _Machine._reduce,
    }
    return steps


_STEPS = _steps()


def _hashable(key: Any) -> Any:
    """`key`, if hashing it is safe. Raises `NotPlain`."""
    waiting = [key]
    for _ in range(_KEY_NODES_MAX):
        if not waiting:
            return key
        part = waiting.pop()
        if type(part) is tuple:
            waiting += part[:_KEY_NODES_MAX]
    raise NotPlain("a key has too many parts")


# ---- writing


def render(value: Any) -> str:
    """Plain data as Python would write it, in one line of at most about `TEXT_CHARS_MAX` characters."""
    pieces = []
    left = TEXT_CHARS_MAX
    for piece in _pieces(value, 0):
        pieces.append(piece[:left])
        left -= len(piece)
        if left < 0:
            return "".join(pieces) + "..."
    return "".join(pieces)


def _pieces(value: Any, depth: int) -> Iterator[str]:
    kind = type(value)
    if kind not in _BRACKETS:
        yield _scalar(value)
        return
    opening, closing = _BRACKETS[kind]
    if not value and kind in (set, frozenset):
        opening, closing = kind.__name__ + "(", ")"
    yield opening
    if depth >= _DEPTH_MAX:
        yield "..."
    else:
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item, depth + 1)
            if kind is dict:
                yield ": "
                yield from _pieces(value[item], depth + 1)
    yield "," + closing if kind is tuple and len(value) == 1 else closing


_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"), tuple: ("(", ")"), dict: ("{", "}"), set: ("{", "}"), frozenset: ("frozenset({", "})"),
}


def _scalar(value: Any) -> str:
    if isinstance(value, str | bytes | bytearray) and len(value) > TEXT_CHARS_MAX:
        return f"{value[:TEXT_CHARS_MAX]!r}... ({len(value):,} long)"
    if isinstance(value, int) and value.bit_length() > _INT_BITS_MAX:
        return f"(an integer of {value.bit_length():,} bits)"
    return repr(value)


def _is_json(value: Any) -> bool:
    """Whether JSON says exactly this: no tuple becomes a list, no key a string."""
    waiting = [(value, 0)]
    for _ in range(_JSON_NODES_MAX):
        if not waiting:
            return True
        part, depth = waiting.pop()
        kind = type(part)
        if kind is list or kind is dict:
            if depth >= _DEPTH_MAX or len(part) + len(waiting) > _JSON_NODES_MAX:
                return False
            if kind is dict and not all(type(key) is str for key in part):
                return False
            waiting += [(item, depth + 1) for item in (part.values() if kind is dict else part)]
        elif kind is float:
            if not math.isfinite(part):
                return False
        elif kind is int:
            if part.bit_length() > _INT_BITS_MAX:
                return False
        elif part is not None and kind not in (bool, str):
            return False
    return False
