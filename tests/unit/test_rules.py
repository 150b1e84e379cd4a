"""`where=` rules: which are refused and where the finger points, what is told of one that does not hold, and what cannot be made to grow."""

from __future__ import annotations

import pytest

from p2pcluster import errors, stage
from p2pcluster.core import rules
from p2pcluster.errors import GraphError

FACTS = {"cores": 2, "memory_gb": 7.5, "name": "lab-1", "os": "linux", "python": "3.11.7", "tags": ["ssd"], "address": "10.0.0.7:47400",
         "origin": False}

REFUSED = {
    "": (1, "its end"),
    "cores >= 4 && origin": (13, "'& origin'"),
    "cores = 4": (7, "'= 4'"),
    "len(tags) > 1": (1, "a call"),
    "cores > 1 and tags[0] == 'x'": (15, "an index"),
    "name.upper() == 'X'": (1, "a call"),
    "cores >= 4 if origin else True": (1, "if with else"),
    "corse > 1": (1, "did you mean cores"),
    "'é' in tags and cores & 3": (23, "this operator"),
    "memory_gb is None": (11, "use == or !="),
    "cores > 1 and ~cores": (15, "this operator"),
    "(cores,\n name.x)": (10, "an attribute"),
    "cores in {1, 2}": (10, "a set"),
    "f'{cores}'": (1, "an f-string"),
    "b'x' in tags": (1, "a bytes"),
    "cores == 1j": (10, "a complex"),
    "cores == ...": (10, "a ellipsis"),
    "name == '\\d'": (9, "escape"),
    "cores\0": (1, "null bytes"),
    "name == '\ud800'": (10, "cannot read"),
    "lambda: 1": (1, "lambda"),
    "(" * 300: (201, "nested"),
    "-" * 900 + "1": (41, "deep"),
    "1" * 2000: (1001, "shorten"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_rule_is_refused_with_the_character_pointed_at(text: str) -> None:
    at, why = REFUSED[text]
    with pytest.raises(GraphError) as caught:
        rules.parse(text)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    assert f": character {at}, " in said and why in said, said


def test_a_stage_with_a_rule_that_is_none_is_refused_when_it_is_made_with_its_file_and_line() -> None:
    with pytest.raises(errors.GraphError, match=r"^stage 'Square' \(test_rules\.py:\d+\): where='cores >= 4 !': character 12, '!'"):
        stage(lambda x: x, name="Square", where="cores >= 4 !")


@pytest.mark.parametrize("text", ["9**9**9 > 1", "'a' * 10**9 == ''", "tags * 10**7 == []", "2**4000 * 2**4000 > 1", "'%1000000000d' % 1 == ''"])
def test_what_would_grow_without_end_is_not_worked_out(text: str) -> None:
    with pytest.raises(rules.RuleFailed):
        rules.value(rules.parse(text), FACTS)


@pytest.mark.parametrize(("text", "said"), {
    "cores >= 2 and 'ssd' in tags": None,
    " not origin": None,
    "cores >= 4 and 'gpu' in tags": "cores >= 4 fails (cores is 2)",
    "cores >= 2 and (os == 'linux' and 'gpu' in tags)": "'gpu' in tags fails (tags is ['ssd'])",
    "cores > 8 or memory_gb > 8": "cores > 8 or memory_gb > 8 fails (cores is 2, memory_gb is 7.5)",
    "cores >= 2 and cores / 0 > 1": "cores / 0 cannot be worked out: division by zero (cores is 2)",
    "name > 3": "name > 3 cannot be worked out: '>' not supported between instances of 'str' and 'int' (name is 'lab-1')",
    "1.0 * 10**400 > cores": "1.0 * 10**400 cannot be worked out: int too large to convert to float",
    "cores < 1 and cores / 0": "cores < 1 fails (cores is 2)",
}.items())
def test_the_part_that_fails_is_told_with_its_facts(text: str, said: str | None) -> None:
    assert rules.unfit(rules.parse(text), FACTS) == said


def test_a_fact_that_a_node_does_not_tell_is_none() -> None:
    assert rules.value(rules.parse("memory_gb == None"), {}) is True
    assert "cannot be worked out" in str(rules.unfit(rules.parse("memory_gb >= 8"), {}))


def test_a_rule_that_holds_nowhere_is_one_bounded_line_with_each_node_and_its_part() -> None:
    nodes = {str(n): (f"node-{n}", {**FACTS, "cores": n, "tags": ["x" * 500]}) for n in range(1, 8)}
    fit, why = rules.fitting("cores >= 4 and 'gpu' in tags", nodes)
    assert fit == frozenset() and why is not None
    assert "on node-1 cores >= 4 fails (cores is 1)" in why and "and 4 more" in why
    assert "\n" not in why and len(why) < 500
    assert rules.fitting("cores >= 6", nodes) == (frozenset({"6", "7"}), None)


def test_a_manifest_of_old_with_another_text_stops_nobody() -> None:
    fit, why = rules.fitting("anywhere()", {"a": ("node-a", FACTS)})
    assert fit == frozenset() and why is not None and "deploy again" in why


def test_without_nodes_nothing_is_told() -> None:
    assert rules.fitting("cores > 1", {}) == (frozenset(), None)
