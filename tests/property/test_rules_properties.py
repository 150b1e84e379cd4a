"""On its grammar a rule means what Python's `eval` makes of it: the same value, of the same type, or an error where Python has one."""

from __future__ import annotations

import warnings
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pcluster.core import rules
from p2pcluster.errors import GraphError

FACTS: dict[str, Any] = {"cores": 8, "memory_gb": None, "name": "lab-1", "os": "linux", "python": "3.11.7", "tags": ["gpu", "ssd"],
                         "address": "10.0.0.7:47400", "origin": True}

ATOMS = st.one_of(
    st.sampled_from(rules.FACTS), st.integers(0, 12).map(str), st.sampled_from(["0.5", "1e3", "0x1f", "'gpu'", '"lab"', "''", "True", "False", "None"]),
)
BINARY = ["+", "-", "*", "/", "//", "%", "**", "and", "or", "<", "<=", ">", ">=", "==", "!=", "in", "not in"]


def _larger(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(parts, st.sampled_from(BINARY), parts)
    return st.one_of(
        pair.map(" ".join), pair.map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(st.sampled_from(["not ", "-", "+"]), parts).map("".join),
        st.lists(parts, max_size=3).map(lambda p: f"[{', '.join(p)}]"), st.lists(parts, max_size=3).map(lambda p: f"({''.join(f'{one}, ' for one in p)})"),
        st.tuples(parts, st.sampled_from(["<", "==", ">="]), parts, st.sampled_from(["<", "!=", "in"]), parts).map(" ".join),
    )


EXPRESSIONS = st.recursive(ATOMS, _larger, max_leaves=12)
FAILED = object()


def by_python(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return eval(text, {"__builtins__": {}}, FACTS)
    except (TypeError, ArithmeticError, ValueError):
        return FAILED


@settings(max_examples=1500, deadline=None)
@given(EXPRESSIONS)
@example("cores < 3 and cores / 0")
@example("cores > 3 or cores / 0")
@example("1 < 0 < cores / 0")
@example("0 or name")
@example("(-8) ** 0.5 < 1")
@example("not cores in [8]")
@example("-2 ** 2")
@example("1 == True == 1.0")
def test_a_rule_is_worth_what_python_makes_of_it(text: str) -> None:
    try:
        rule = rules.parse(text)
        mine = rules.value(rule, FACTS)
    except GraphError as error:
        assert "deep" in str(error) or _is_no_python(text), (text, error)
        return
    except rules.RuleFailed as failed:
        bounds = ("too large", "too long", "% is for numbers")
        assert any(bound in str(failed) for bound in bounds) or by_python(text) is FAILED, (text, failed)
        return
    theirs = by_python(text)
    assert theirs is not FAILED and type(mine) is type(theirs) and repr(mine) == repr(theirs), (text, mine, theirs)
    assert (rules.unfit(rule, FACTS) is None) is bool(theirs)


def _is_no_python(text: str) -> bool:
    try:
        compile(text, "", "eval")
    except SyntaxError:
        return True
    return False


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("abcores ()[]<>=!+-*/%.,'\"\\\n\0:@&|~^{}#not in", max_size=60)))
def test_any_text_is_a_rule_or_refused_in_one_line(text: str) -> None:
    try:
        rule = rules.parse(text)
    except GraphError as error:
        assert len(str(error).splitlines()) == 1 and "character " in str(error)
        return
    said = rules.unfit(rule, FACTS)
    assert said is None or len(said.splitlines()) == 1
