"""Who counts: majorities of one half and of two."""

from __future__ import annotations

import pytest

from p2pcluster.core.quorum import Configuration, Tally, agreed_value, has_majority, majority, tally

ONE = Configuration(("a",))
THREE = Configuration(("a", "b", "c"))
JOINT = Configuration(voters=("c", "d", "e"), voters_old=("a", "b", "c"), learners=())


@pytest.mark.parametrize(
    ("count", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)]
)
def test_a_majority_is_more_than_half(count: int, needed: int) -> None:
    assert majority(count) == needed


@pytest.mark.parametrize(
    ("configuration", "nodes", "decides"),
    [
        (ONE, "a", True),
        (ONE, "b", False),
        (THREE, "ab", True),
        (THREE, "a", False),
        (THREE, "axyz", False),
        (JOINT, "ab", False),
        (JOINT, "de", False),
        (JOINT, "bcd", True),
        (JOINT, "abde", True),
        (JOINT, "cxyz", False),
        (Configuration(), "abc", False),
        (Configuration(("a",), (), ("b", "c")), "bc", False),
    ],
)
def test_each_half_needs_its_own_majority(configuration: Configuration, nodes: str, decides: bool) -> None:
    assert has_majority(configuration, set(nodes)) is decides


@pytest.mark.parametrize(
    ("configuration", "granted", "refused", "result"),
    [
        (ONE, "a", "", Tally.WON),
        (THREE, "ab", "", Tally.WON),
        (THREE, "ab", "c", Tally.WON),
        (THREE, "a", "b", Tally.OPEN),
        (THREE, "a", "bc", Tally.LOST),
        (THREE, "axy", "", Tally.OPEN),
        (THREE, "a", "xyz", Tally.OPEN),
        (JOINT, "cde", "", Tally.OPEN),
        (JOINT, "cde", "ab", Tally.LOST),
        (JOINT, "acd", "", Tally.WON),
        (Configuration(), "abc", "", Tally.LOST),
    ],
)
def test_a_vote_is_won_lost_or_open(configuration: Configuration, granted: str, refused: str, result: Tally) -> None:
    votes = dict.fromkeys(granted, True) | dict.fromkeys(refused, False)
    assert tally(configuration, votes) is result


@pytest.mark.parametrize(
    ("configuration", "values", "agreed"),
    [
        (ONE, {"a": 5}, 5),
        (ONE, {}, 0),
        (THREE, {"a": 5}, 0),
        (THREE, {"a": 5, "b": 3}, 3),
        (THREE, {"a": 5, "b": 3, "c": 4}, 4),
        (THREE, {"a": 5, "x": 9, "y": 9}, 0),
        (JOINT, {"a": 9, "b": 9}, 0),
        (JOINT, {"a": 9, "b": 9, "d": 4, "e": 3}, 3),
        (JOINT, {"c": 7, "d": 6, "a": 5}, 5),
        (Configuration(), {"a": 9}, 0),
    ],
)
def test_the_agreed_value_is_the_smaller_of_the_halves(
    configuration: Configuration, values: dict[str, int], agreed: int
) -> None:
    assert agreed_value(configuration, values, 0) == agreed


def test_only_an_undivided_single_voter_decides_alone() -> None:
    assert ONE.is_sole_voter("a")
    assert not ONE.is_sole_voter("b")
    assert not Configuration(("a",), ("a", "b", "c")).is_sole_voter("a")
    assert Configuration(("a",), (), ("b",)).is_sole_voter("a")


def test_a_change_goes_through_both_halves_and_ends_with_the_new_one() -> None:
    joint = THREE.joint_with(("a", "d", "e"), ("b",))
    assert joint.is_joint
    assert joint.halves() == (("a", "d", "e"), ("a", "b", "c"))
    assert joint.is_voter("b") and joint.is_voter("d")
    assert joint.members == {"a", "b", "c", "d", "e"}
    assert joint.without_old() == Configuration(("a", "d", "e"), (), ("b",))


@pytest.mark.parametrize(
    "parts", [(("a", "a"), (), ()), (("a",), (), ("a",)), ((), ("a",), ()), (("a",), (), ("b", "b"))]
)
def test_a_configuration_that_contradicts_itself_is_not_made(parts: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(AssertionError):
        Configuration(*parts)


def test_a_second_change_does_not_start_inside_the_first() -> None:
    with pytest.raises(AssertionError):
        JOINT.joint_with(("a",), ())
