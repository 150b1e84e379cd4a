"""What a node says when nobody leads."""

from __future__ import annotations

from p2pcluster.core.absence import TOLD_AFTER_MS, Absence
from p2pcluster.core.quorum import Configuration

THREE = Configuration(("a", "b", "c"))
NAMES = {name: {"name": f"host/{name}"} for name in "abcde"}


def test_after_a_while_it_names_who_is_missing_and_what_to_do_and_says_so_once() -> None:
    absence = Absence()
    assert absence.look(False, THREE, {"a"}, NAMES, 100) is None
    assert absence.look(False, THREE, {"a"}, NAMES, 99 + TOLD_AFTER_MS) is None, "an election may still be under way"
    line = absence.look(False, THREE, {"a"}, NAMES, 100 + TOLD_AFTER_MS)
    assert line is not None and "2 of the 3 nodes that vote must be here and 1 is" in line and "start host/b, host/c again" in line and "recover" in line
    assert absence.look(False, THREE, {"a"}, NAMES, 900_000) is None


def test_it_is_said_again_when_it_happens_again_or_has_become_another_matter() -> None:
    absence = Absence()
    five = Configuration(tuple("abcde"))
    absence.look(False, five, {"a"}, NAMES, 0)
    assert absence.look(False, five, {"a"}, NAMES, TOLD_AFTER_MS)
    line = absence.look(False, five, {"a", "b"}, NAMES, TOLD_AFTER_MS + 1)
    assert line is not None and "and 2 are;" in line and "host/b" not in line
    assert absence.look(True, five, {"a", "b", "c"}, NAMES, TOLD_AFTER_MS + 2) is None
    assert absence.look(False, five, {"a", "b"}, NAMES, TOLD_AFTER_MS + 3) is None, "the time begins anew"
    assert absence.look(False, five, {"a", "b"}, NAMES, 2 * TOLD_AFTER_MS + 3)


def test_a_standby_whose_only_voter_is_away_says_so_and_a_node_that_has_not_joined_says_nothing() -> None:
    absence = Absence()
    two = Configuration(("a",), learners=("b",))
    absence.look(False, two, {"b"}, {}, 0)
    line = absence.look(False, two, {"b"}, {}, TOLD_AFTER_MS)
    assert line is not None and "the one node that votes is not here" in line and "start a again" in line
    assert Absence().look(False, Configuration(), {"b"}, {}, 10**9) is None


def test_with_a_majority_here_it_points_to_the_doctor_and_in_a_joint_configuration_both_halves_count() -> None:
    absence = Absence()
    absence.look(False, THREE, {"a", "b"}, NAMES, 0)
    assert "doctor" in (absence.look(False, THREE, {"a", "b"}, NAMES, TOLD_AFTER_MS) or "")
    joint = Configuration(("a", "b", "c"), ("d",))
    line = absence.look(False, joint, {"a", "b"}, NAMES, TOLD_AFTER_MS + 1)
    assert line is not None and "start host/d again" in line
