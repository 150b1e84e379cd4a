"""`where=` expressions: which are rules, whether one holds for a node, and if not, which part of it fails.

This file alone decides the grammar: facts of a node, numbers, text, True, False, None, tuples and lists of such, comparisons, `in`,
`and`, `or`, `not` and arithmetic. On that grammar a rule means what Python's `eval` would make of it. Python's own parser reads it, and
nothing that it finds is run: an evaluator of a few lines walks over what this file admits. A rule cannot be made to take long or to grow:
its length, its depth and what it computes are bounded, and `%` is for numbers only, because formatting can pad without end.
"""

from __future__ import annotations

import ast
import difflib
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from p2pcluster.errors import GraphError

FACTS = ("cores", "memory_gb", "name", "os", "python", "tags", "address", "origin")
CHARS_MAX = 1000  # a rule is a line or two
DEPTH_MAX = 40  # of parts within parts: far from what Python's own recursion allows
INTEGER_BITS_MAX = 4096  # a number of 1,200 digits is no fact of a machine
ITEMS_MAX = 10_000  # characters of a text, or members of a list, that arithmetic may make
_SHOWN_CHARS = 60
_NODES_TOLD = 3  # of those that a rule fails on: the line stays one that can be read

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda member, whole: member in whole, ast.NotIn: lambda member, whole: member not in whole,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}
_HAS = "a rule has facts of a node, numbers, text, comparisons, in, and, or, not, arithmetic, tuples and lists"


@dataclass(frozen=True)
class Rule:
    """A rule that was checked: its text, and the tree that Python's parser made of it."""

    text: str
    tree: ast.expr


class RuleFailed(Exception):
    """A rule has no value for a node: `part` of it cannot be worked out."""

    def __init__(self, part: ast.expr, why: str) -> None:
        super().__init__(why)
        self.part = part


@lru_cache(maxsize=256)
def parse(text: str) -> Rule:
    """The rule. Raises `GraphError` that points to the character at which `text` ceases to be one."""
    rule = text.strip(" \t")
    if len(rule) > CHARS_MAX:
        raise _error(rule, CHARS_MAX, f"it has {len(rule)} characters, and a rule at most {CHARS_MAX}: shorten it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python only warns of (a bad escape, `1or 2`) is not worth guessing at
            tree = ast.parse(rule, mode="eval").body
    except SyntaxError as error:
        at = _offset(rule, error.lineno or 1, max(0, (error.offset or 1) - 1))
        raise _error(rule, at, f"{error.msg}; {_HAS}") from None
    except (ValueError, RecursionError, MemoryError, Warning):
        at = next((at for at, sign in enumerate(rule) if sign == "\0" or "\ud800" <= sign <= "\udfff"), 0)
        raise _error(rule, at, f"Python cannot read it; {_HAS}") from None
    _check(rule, tree, DEPTH_MAX)
    return Rule(rule, tree)


def value(rule: Rule, facts: Mapping[str, Any]) -> Any:
    """What the rule makes of these facts; one that is not given is None. Raises `RuleFailed`."""
    return _value(rule.tree, facts)


def unfit(rule: Rule, facts: Mapping[str, Any]) -> str | None:
    """Which part of the rule fails for these facts, in some words of one line; None where the rule holds."""
    part = rule.tree
    try:
        if _value(part, facts):
            return None
        while isinstance(part, ast.BoolOp) and isinstance(part.op, ast.And):
            part = next(one for one in part.values if not _value(one, facts))
    except RuleFailed as failed:
        return f"{_source(rule, failed.part)} cannot be worked out: {_short(str(failed))}{_facts_in(failed.part, facts)}"
    return f"{_source(rule, part)} fails{_facts_in(part, facts)}"


def fitting(text: str, nodes: Mapping[str, tuple[str, Mapping[str, Any]]]) -> tuple[frozenset[str], str | None]:
    """Of nodes, given as name and facts by id, those for which the rule holds; and where there is none, why, in one line."""
    try:
        rule = parse(text)
    except GraphError as error:  # of a manifest that an older version admitted
        return frozenset(), f"{error}; correct it and deploy again"
    why = {node: unfit(rule, facts) for node, (_, facts) in nodes.items()}
    fit = frozenset(node for node, failed in why.items() if failed is None)
    if fit or not nodes:
        return fit, None
    told = [f"on {_short(nodes[node][0])} {failed}" for node, failed in list(why.items())[:_NODES_TOLD]]
    more = f", and {len(why) - len(told)} more" if len(why) > len(told) else ""
    return fit, f"no node satisfies where={_short(rule.text)!r}: {'; '.join(told)}{more}: start a node that does, or deploy another rule"


# ---- checking


def _check(rule: str, node: ast.expr, depth: int) -> None:
    """Refuse what is no part of the grammar."""
    if not depth:
        raise _error(rule, _start(rule, node), f"parts within parts, more than {DEPTH_MAX} deep: make it simpler")
    if isinstance(node, ast.Name):
        if node.id not in FACTS:
            close = difflib.get_close_matches(node.id, FACTS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the facts are {', '.join(FACTS)}"
            raise _error(rule, _start(rule, node), f"{node.id!r:.50} is no fact of a node; {hint}")
    elif isinstance(node, ast.Constant):
        if not (node.value is None or isinstance(node.value, bool | int | float | str)):
            raise _error(rule, _start(rule, node), f"a {type(node.value).__name__} has no place in a rule; {_HAS}")
        _bounded(node, node.value, lambda why: _error(rule, _start(rule, node), why))
    elif not isinstance(node, ast.BoolOp | ast.UnaryOp | ast.BinOp | ast.Compare | ast.Tuple | ast.List):
        raise _error(rule, _start(rule, node), f"{_NAMES.get(type(node), type(node).__name__)} is no part of a rule; {_HAS}")
    _check_operators(rule, node)
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.expr):
            _check(rule, part, depth - 1)


_NAMES: dict[type[ast.expr], str] = {
    ast.Call: "a call", ast.Attribute: "an attribute", ast.Subscript: "an index", ast.Lambda: "lambda", ast.IfExp: "if with else",
    ast.Dict: "a dict", ast.Set: "a set", ast.JoinedStr: "an f-string", ast.NamedExpr: ":=", ast.Starred: "*", ast.Await: "await",
    ast.ListComp: "a comprehension", ast.SetComp: "a comprehension", ast.DictComp: "a comprehension", ast.GeneratorExp: "a comprehension",
    ast.Yield: "yield", ast.YieldFrom: "yield", ast.Slice: "an index",
}


def _check_operators(rule: str, node: ast.expr) -> None:
    if isinstance(node, ast.UnaryOp) and type(node.op) not in _UNARY:
        raise _error(rule, _start(rule, node), f"this operator is no part of a rule; {_HAS}")
    if isinstance(node, ast.BinOp) and type(node.op) not in _ARITHMETIC:
        raise _error(rule, _behind(rule, node.left), f"this operator is no part of a rule; {_HAS}")
    if isinstance(node, ast.Compare):
        for left, comparison in zip([node.left, *node.comparators], node.ops, strict=False):
            if type(comparison) not in _COMPARISONS:
                raise _error(rule, _behind(rule, left), "`is` is no part of a rule; use == or !=")


def _offset(rule: str, line: int, column: int) -> int:
    lines = rule.splitlines(keepends=True)
    return sum(len(one) for one in lines[: line - 1]) + column


def _start(rule: str, node: ast.expr) -> int:
    return _offset(rule, node.lineno, _characters(rule, node.lineno, node.col_offset))


def _characters(rule: str, line: int, utf8_bytes: int) -> int:
    """Python counts columns in bytes."""
    return len(rule.splitlines()[line - 1].encode()[:utf8_bytes].decode(errors="replace"))


def _behind(rule: str, node: ast.expr) -> int:
    """Where the operator behind a part begins."""
    assert node.end_lineno is not None and node.end_col_offset is not None, "the parser says where a part ends"
    at = _offset(rule, node.end_lineno, _characters(rule, node.end_lineno, node.end_col_offset))
    while at < len(rule) and rule[at] in " \t\r\n\\)":
        at += 1
    return at


def _error(rule: str, at: int, why: str) -> GraphError:
    at = min(at, len(rule))
    there = repr(rule[at : at + 20]) if rule[at:] else "its end"
    return GraphError(f"where={_short(rule)!r}: character {at + 1}, {there}: {why}")


# ---- evaluating


def _value(node: ast.expr, facts: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return facts.get(node.id)
    if isinstance(node, ast.Tuple):
        return tuple(_value(one, facts) for one in node.elts)
    if isinstance(node, ast.List):
        return [_value(one, facts) for one in node.elts]
    if isinstance(node, ast.BoolOp):
        return _either(node, facts)
    if isinstance(node, ast.Compare):
        return _compared(node, facts)
    if isinstance(node, ast.UnaryOp):
        return _worked_out(node, _UNARY[type(node.op)], _value(node.operand, facts))
    assert isinstance(node, ast.BinOp), "the check lets nothing else through"
    left, right = _value(node.left, facts), _value(node.right, facts)
    _check_growth(node, left, right)
    found = _worked_out(node, _ARITHMETIC[type(node.op)], left, right)
    _bounded(node, found, lambda why: RuleFailed(node, why))
    return found


def _either(node: ast.BoolOp, facts: Mapping[str, Any]) -> Any:
    stops_at = isinstance(node.op, ast.Or)
    found: Any = None
    for part in node.values:
        found = _value(part, facts)
        if bool(found) is stops_at:
            break
    return found


def _compared(node: ast.Compare, facts: Mapping[str, Any]) -> Any:
    left, found = _value(node.left, facts), True
    for comparison, part in zip(node.ops, node.comparators, strict=True):
        right = _value(part, facts)
        found = _worked_out(node, _COMPARISONS[type(comparison)], left, right)
        if not found:
            break
        left = right
    return found


def _worked_out(node: ast.expr, function: Callable[..., Any], *operands: Any) -> Any:
    try:
        return function(*operands)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise RuleFailed(node, str(error)) from None


def _check_growth(node: ast.BinOp, left: Any, right: Any) -> None:
    """Refuse, before it is done, arithmetic whose result would not be bounded by what it is made of."""
    if isinstance(node.op, ast.Mod) and not isinstance(left, int | float | complex):
        raise RuleFailed(node, "% is for numbers")
    whole = isinstance(left, int) and isinstance(right, int)
    if isinstance(node.op, ast.Pow) and whole and right > 0 and left.bit_length() * right > 2 * INTEGER_BITS_MAX:
        raise RuleFailed(node, "the number is too large")
    if isinstance(node.op, ast.Mult):
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > ITEMS_MAX:
                raise RuleFailed(node, "it is too long")


def _bounded(node: ast.expr, found: Any, error: Callable[[str], Exception]) -> None:
    if isinstance(found, int) and found.bit_length() > INTEGER_BITS_MAX:
        raise error("the number is too large")
    if isinstance(found, str | list | tuple) and len(found) > ITEMS_MAX:
        raise error("it is too long")


# ---- for people


def _source(rule: Rule, part: ast.expr) -> str:
    return _short(ast.get_source_segment(rule.text, part) or rule.text)


def _facts_in(part: ast.expr, facts: Mapping[str, Any]) -> str:
    names = dict.fromkeys(node.id for node in ast.walk(part) if isinstance(node, ast.Name))
    told = [f"{name} is {_short(repr(facts.get(name)))}" for name in names]
    return f" ({', '.join(told)})" if told else ""


def _short(text: str) -> str:
    text = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
