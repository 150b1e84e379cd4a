"""Who counts: configurations, and what a majority of one has agreed on.

Decided here alone: when enough voters have voted, stored or answered, in both halves of a joint configuration (raft
6). Not known here: terms, logs, time, messages. Every function is a pure answer about its arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Configuration:
    """The members with a copy of the log. It is joint while `voters_old` is not empty: then both halves decide.

    A member may be in both halves. A learner is in neither, or is an old voter that stays on as a learner.
    Without voters it is the configuration of a node that has not joined: nothing is ever decided in it.
    """

    voters: tuple[str, ...] = ()
    voters_old: tuple[str, ...] = ()
    learners: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in (self.voters, self.voters_old, self.learners):
            assert len(set(part)) == len(part), part
        assert not set(self.voters) & set(self.learners), self
        assert self.voters or not self.voters_old, self

    @property
    def is_joint(self) -> bool:
        """Whether the change to `voters` is still under way."""
        return bool(self.voters_old)

    @property
    def members(self) -> frozenset[str]:
        """Everyone who gets the log."""
        return frozenset(self.voters + self.voters_old + self.learners)

    def is_voter(self, node_id: str) -> bool:
        """Whether the node may campaign and counts."""
        return node_id in self.voters or node_id in self.voters_old

    def is_sole_voter(self, node_id: str) -> bool:
        """Whether the node decides alone: what is durable on it is committed."""
        return self.voters == (node_id,) and not self.is_joint

    def halves(self) -> tuple[tuple[str, ...], ...]:
        """The groups of voters in each of which a majority is needed."""
        return (self.voters, self.voters_old) if self.voters_old else (self.voters,)

    def joint_with(self, voters: tuple[str, ...], learners: tuple[str, ...]) -> Configuration:
        """The first step of a change: the present voters and the next ones decide together."""
        assert not self.is_joint, self
        return Configuration(voters=voters, voters_old=self.voters, learners=learners)

    def without_old(self) -> Configuration:
        """The second step of a change: the next voters decide alone."""
        assert self.is_joint, self
        return Configuration(voters=self.voters, voters_old=(), learners=self.learners)


class Tally(enum.Enum):
    """How a vote stands."""

    WON = "won"
    LOST = "lost"
    OPEN = "open"


def majority(count: int) -> int:
    """How many of `count` voters any two majorities share one of. Of nobody it is one: nobody decides nothing."""
    return count // 2 + 1


def has_majority(configuration: Configuration, nodes: Collection[str]) -> bool:
    """Whether `nodes` hold a majority of every half."""
    return all(
        sum(1 for voter in half if voter in nodes) >= majority(len(half)) for half in configuration.halves()
    )


def tally(configuration: Configuration, votes: Mapping[str, bool]) -> Tally:
    """How the vote stands; votes of others than voters do not count, an absent vote may still come."""
    if has_majority(configuration, {node for node, granted in votes.items() if granted}):
        return Tally.WON
    not_refused = {voter for voter in configuration.members if votes.get(voter, True)}
    return Tally.OPEN if has_majority(configuration, not_refused) else Tally.LOST


def agreed_value(configuration: Configuration, values: Mapping[str, int], absent: int) -> int:
    """The largest value that a majority of every half has reached; a voter that is not in `values` has `absent`."""
    return min(_agreed_in(half, values, absent) for half in configuration.halves())


def _agreed_in(half: tuple[str, ...], values: Mapping[str, int], absent: int) -> int:
    if not half:
        return absent
    reached = sorted((values.get(voter, absent) for voter in half), reverse=True)
    return reached[majority(len(half)) - 1]
