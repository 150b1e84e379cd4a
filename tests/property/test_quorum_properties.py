"""Quorums against twins that count in the most simple-minded way."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core.quorum import Configuration, Tally, agreed_value, has_majority, tally

NODES = "abcdef"


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    some = st.lists(st.sampled_from(NODES), unique=True, max_size=5).map(tuple)
    voters = draw(some.filter(bool))
    voters_old = draw(st.one_of(st.just(()), some))
    learners = tuple(node for node in draw(some) if node not in voters)
    return Configuration(voters, voters_old, learners)


def _wins(configuration: Configuration, granted: set[str]) -> bool:
    halves = [set(configuration.voters)] + ([set(configuration.voters_old)] if configuration.voters_old else [])
    return all(2 * len(half & granted) > len(half) for half in halves)


@given(configurations(), st.sets(st.sampled_from(NODES)))
def test_a_majority_is_more_than_half_of_every_half(configuration: Configuration, nodes: set[str]) -> None:
    assert has_majority(configuration, nodes) == _wins(configuration, nodes)


@settings(max_examples=60)
@given(configurations())
def test_any_two_majorities_share_a_voter(configuration: Configuration) -> None:
    subsets = [set(subset) for size in range(len(NODES) + 1) for subset in combinations(NODES, size)]
    deciding = [subset for subset in subsets if has_majority(configuration, subset)]
    for one, other in combinations(deciding, 2):
        for half in configuration.halves():
            assert one & other & set(half)


@settings(max_examples=60)
@given(configurations())
def test_both_steps_of_a_change_share_a_voter_with_what_comes_before_and_after(configuration: Configuration) -> None:
    if not configuration.is_joint:
        return
    before, after = Configuration(configuration.voters_old), configuration.without_old()
    subsets = [set(subset) for size in range(len(NODES) + 1) for subset in combinations(NODES, size)]
    joint_majorities = [subset for subset in subsets if has_majority(configuration, subset)]
    for neighbour in (before, after):
        for other in (subset for subset in subsets if has_majority(neighbour, subset)):
            assert all(one & other for one in joint_majorities)


@given(configurations(), st.dictionaries(st.sampled_from(NODES), st.booleans()))
def test_a_vote_is_open_exactly_while_the_missing_votes_can_turn_it(
    configuration: Configuration, votes: dict[str, bool]
) -> None:
    missing = [node for node in NODES if node not in votes]
    outcomes = set()
    for rest in product((True, False), repeat=len(missing)):
        every_vote = votes | dict(zip(missing, rest, strict=True))
        outcomes.add(_wins(configuration, {node for node, granted in every_vote.items() if granted}))
    expected = Tally.OPEN if len(outcomes) == 2 else Tally.WON if outcomes == {True} else Tally.LOST
    assert tally(configuration, votes) is expected


@given(configurations(), st.dictionaries(st.sampled_from(NODES), st.integers(1, 9)))
def test_the_agreed_value_is_the_largest_that_a_majority_has_reached(
    configuration: Configuration, values: dict[str, int]
) -> None:
    reached = [
        value for value in range(10)
        if _wins(configuration, {node for node in NODES if values.get(node, 0) >= value})
    ]
    assert agreed_value(configuration, values, 0) == max(reached)
