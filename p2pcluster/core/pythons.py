"""Which Pythons a project admits: `[tool.p2pcluster] python`, such as ">=3.11, <3.14, !=3.12.0".

This file alone decides what such a text may be, and whether a version satisfies it. A version of two numbers stands for all of its
releases: 3.12.1 satisfies ==3.12 and <=3.12, and not >3.12.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

_Version = tuple[int, ...]
_COMPARISONS: dict[str, Callable[[_Version, _Version], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}
_PART = re.compile(r"\s*(>=|>|<=|<|==|!=)\s*([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?\s*")
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?(?![0-9])")
_CHARS_MAX = 200


def is_requirement(text: Any) -> bool:
    """Whether this says which Pythons are admitted."""
    return isinstance(text, str) and len(text) <= _CHARS_MAX and all(map(_PART.fullmatch, text.split(",")))


def admits(requirement: str, version: Any) -> bool:
    """Whether a requirement admits a version as `platform.python_version()` writes it. A version that cannot be read is not admitted."""
    found = _VERSION.match(version) if isinstance(version, str) else None
    return found is not None and all(_holds(part, _numbers(*found.groups())) for part in requirement.split(","))


def same_minor(version: str) -> str:
    """The requirement of a project that names none: the minor version that it was deployed from."""
    found = _VERSION.match(version)
    assert found is not None, "Python writes its version like this"
    return f"=={found[1]}.{found[2]}"


def _holds(part: str, version: _Version) -> bool:
    found = _PART.fullmatch(part)
    assert found is not None, "what is no requirement is refused where it comes in"
    wanted = _numbers(*found.groups()[1:])
    return _COMPARISONS[found[1]](version[: len(wanted)], wanted)


def _numbers(*texts: str | None) -> _Version:
    return tuple(int(text) for text in texts if text is not None)
