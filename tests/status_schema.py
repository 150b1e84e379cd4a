"""Whether an object has the shape that `golden/status_schema.json` says: these keys and no others, of these types.

A type is `str`, `int`, `number` or `bool`; `a or b`; a choice of words, `a|b`; `null`, or a word by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "status_schema.json").read_text("utf-8"))
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "number": (int, float), "bool": (bool,), "null": (type(None),)}


def mismatches(value: Any, schema: Any = SCHEMA, where: str = "status") -> Iterator[str]:
    """What is not as the schema says, each in a line."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{where} is no object"
            return
        for key in schema.keys() ^ value.keys():
            yield f"{where}.{key} is {'missing' if key in schema else 'not in the schema'}"
        for key in schema.keys() & value.keys():
            yield from mismatches(value[key], schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, one in enumerate(value):
            yield from mismatches(one, schema[0], f"{where}[{number}]")
    elif not any(_fits(value, one) for one in schema.split(" or ")):
        yield f"{where} is {value!r:.60} and not {schema}"


def _fits(value: Any, wanted: str) -> bool:
    types = _TYPES.get(wanted)
    if types is None:
        return value in wanted.split("|")
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
