"""How a user's value becomes bytes and back, and which values cannot be put.

Used where user code runs: in a stage process, and in a program that is connected. A node never imports it: to a node, bytes are
bytes.
"""

from __future__ import annotations

import json
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from p2pcluster import config
from p2pcluster.errors import ValueRefused

MAIN_MODULES = ("__main__", "__mp_main__")  # the second is a script that a process has run for its functions

ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "pickle": pickle.dumps,  # bare: a protocol by keyword would cost as much as the pickling of a small value
    "json": lambda value: json.dumps(value, separators=(",", ":")).encode(),
}
DECODERS: dict[str, Callable[[bytes], Any]] = {"pickle": pickle.loads, "json": json.loads}


def as_refusal(value: Any, error: BaseException) -> BaseException:
    """What to say when an encoder raised `error` for `value`."""
    if isinstance(error, ValueRefused):
        return error
    refusal = ValueRefused(f"a value of type {type(value).__name__} cannot be put ({type(error).__name__}: {error}): emit plain data")
    refusal.__cause__ = error
    return refusal


def check_value(body: bytes) -> None:
    """Refuse what cannot be put: too many bytes, or a class that only this program's main module has."""
    if len(body) > config.VALUE_BYTES_MAX:
        raise ValueRefused(
            f"a value of {len(body):,} bytes is over the limit of {config.VALUE_BYTES_MAX >> 20} MiB: put the data in a file and emit its path"
        )
    if b"_main__" in body and _names_main(body):
        raise ValueRefused(
            "a value's class lives in __main__, where no other process finds it: move the class to a module that the project imports"
        )


def _names_main(body: bytes) -> bool:
    """Whether loading `body` would look something up in `__main__`; a mere text of that name does not."""
    pushed: list[Any] = [None, None]
    memo: list[Any] = []
    try:
        for opcode, argument, _ in pickletools.genops(body):
            if opcode.name == "MEMOIZE":
                memo.append(pushed[-1])
            elif opcode.name == "STACK_GLOBAL" and pushed[-2] in MAIN_MODULES:
                return True
            elif opcode.name.endswith("BINGET"):
                assert isinstance(argument, int), "a memo's place is a number"
                pushed.append(memo[argument])
            elif opcode.name not in ("FRAME", "PROTO"):
                pushed.append(argument if isinstance(argument, str) else None)
    except (ValueError, IndexError):
        return False  # JSON, or bytes that are no pickle of ours
    return False
