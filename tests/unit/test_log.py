"""The log in memory, and what a leader knows about another's."""

from __future__ import annotations

import pytest

from p2pcluster.core.log import COMMANDS, Entry, Log, Mode, Progress


def entry(index: int, term: int, body: bytes = b"xx") -> Entry:
    return Entry(index, term, index * 10, COMMANDS, body)


def log_of(*terms: int, base: int = 0, base_term: int = 0) -> Log:
    return Log(base, base_term, base * 10, [entry(base + 1 + at, term) for at, term in enumerate(terms)])


def test_an_empty_log_ends_at_its_base() -> None:
    log = Log(7, 3, 99)
    assert (log.base_index, log.last_index, log.last_term, log.last_at_ms) == (7, 7, 3, 99)
    assert log.term(7) == 3


def test_the_term_of_every_entry_is_known() -> None:
    log = log_of(1, 1, 2, 5, 5, base=4, base_term=1)
    assert [log.term(index) for index in range(4, 10)] == [1, 1, 1, 2, 5, 5]


def test_the_term_of_a_compacted_or_missing_entry_is_not_asked() -> None:
    log = log_of(1, base=4, base_term=1)
    for index in (3, 6):
        with pytest.raises(AssertionError):
            log.term(index)
        assert not log.holds(index, 1)


@pytest.mark.parametrize(
    "bad", [entry(4, 2), entry(2, 2), entry(3, 1), Entry(3, 2, 19, COMMANDS, b"")],
    ids=["gap", "repeat", "term goes back", "time goes back"],
)
def test_an_entry_that_does_not_follow_is_refused(bad: Entry) -> None:
    with pytest.raises(AssertionError):
        log_of(2, 2).append([bad])


def test_truncation_forgets_entries_and_terms() -> None:
    log = log_of(1, 2, 2, 3)
    log.truncate_from(3)
    assert (log.last_index, log.last_term, log.last_at_ms, log.memory_bytes) == (2, 2, 20, 4)
    log.truncate_from(2)
    log.append([entry(2, 4)])
    assert [log.term(index) for index in (1, 2)] == [1, 4]


def test_truncation_down_to_a_released_entry_keeps_its_time() -> None:
    log = log_of(1, 2, 2)
    log.release_through(1)
    log.truncate_from(2)
    assert (log.last_index, log.last_term, log.last_at_ms) == (1, 1, 10)


def test_a_released_entry_is_never_truncated() -> None:
    log = log_of(1, 1, 1)
    log.release_through(2)
    with pytest.raises(AssertionError):
        log.truncate_from(2)


def test_releasing_keeps_terms_and_drops_bodies() -> None:
    log = log_of(1, 2, 3)
    log.release_through(2)
    log.release_through(1)
    assert (log.floor_index, log.last_index, log.memory_bytes) == (2, 3, 2)
    assert [log.term(index) for index in (1, 2, 3)] == [1, 2, 3]
    log.release_through(3)
    assert (log.last_index, log.last_at_ms, log.memory_bytes) == (3, 30, 0)


def test_a_long_journal_is_fed_in_pieces() -> None:
    log = Log()
    for index in range(1, 1001):
        log.append([entry(index, 1 + index // 400)])
        log.release_through(index)
    assert (log.last_index, log.last_term, log.memory_bytes) == (1000, 3, 0)
    assert log.term(399) == 1 and log.term(400) == 2


def test_compaction_forgets_terms_too() -> None:
    log = log_of(1, 1, 2, 3)
    log.compact_through(3)
    log.compact_through(2)
    assert (log.base_index, log.base_term, log.last_index) == (3, 2, 4)
    assert log.term(4) == 3


def test_compaction_through_the_end_leaves_an_empty_log() -> None:
    log = log_of(1, 2)
    log.compact_through(2)
    assert (log.base_index, log.base_term, log.last_index, log.last_at_ms) == (2, 2, 2, 20)
    log.append([entry(3, 2)])
    assert log.term(3) == 2


def test_a_snapshot_replaces_everything() -> None:
    log = log_of(1, 1, 1)
    log.replace_by_snapshot(9, 4, 500)
    assert (log.base_index, log.base_term, log.last_index, log.last_at_ms, log.memory_bytes) == (9, 4, 9, 500, 0)


@pytest.mark.parametrize(
    ("index", "term", "expected"),
    [(5, 2, 4), (9, 9, 6), (6, 1, 2), (3, 2, 3), (1, 0, 0), (0, 0, 0), (6, 4, 5)],
)
def test_logs_cannot_agree_above_the_last_entry_of_a_term_not_above(index: int, term: int, expected: int) -> None:
    assert log_of(1, 1, 2, 2, 4, 5).last_not_above(index, term) == expected


def test_agreement_below_the_base_is_not_known() -> None:
    log = log_of(5, 6, base=10, base_term=4)
    assert log.last_not_above(12, 3) == 9
    assert log.last_not_above(7, 9) == 7


@pytest.mark.parametrize(
    ("last_index", "last_term", "is_up_to_date"),
    [(2, 3, True), (1, 3, False), (9, 2, False), (1, 4, True), (3, 3, True)],
)
def test_a_later_term_then_a_longer_log_is_more_complete(last_index: int, last_term: int, is_up_to_date: bool) -> None:
    """Raft 5.4.1."""
    assert log_of(1, 3).is_up_to_date(last_index, last_term) is is_up_to_date


def test_a_batch_is_bounded_in_bytes_but_never_empty() -> None:
    log = log_of(1, 1, 1, 1)
    assert [item.index for item in log.batch(2, 5) or ()] == [2, 3]
    assert [item.index for item in log.batch(2, 1) or ()] == [2]
    assert [item.index for item in log.batch(2, 99) or ()] == [2, 3, 4]


def test_a_released_batch_is_there_again_once_it_was_loaded() -> None:
    log = log_of(1, 1, 1, 1)
    log.release_through(3)
    assert log.batch(2, 99) is None
    log.keep_loaded([entry(2, 1), entry(3, 1)])
    assert [item.index for item in log.batch(2, 99) or ()] == [2, 3]
    assert [item.index for item in log.batch(3, 99) or ()] == [3]
    assert log.batch(1, 99) is None
    log.drop_loaded(3)
    assert log.batch(3, 99) is not None
    log.drop_loaded(4)
    assert log.batch(3, 99) is None


def test_loaded_entries_with_a_gap_are_refused() -> None:
    with pytest.raises(AssertionError):
        log_of(1, 1, 1).keep_loaded([entry(1, 1), entry(3, 1)])


def test_a_probe_is_one_message_until_it_is_answered() -> None:
    progress = Progress(next_index=5)
    assert progress.may_append(last_index=9, in_flight_max=4)
    progress.sent(7)
    assert not progress.may_append(9, 4)
    assert progress.next_index == 5
    progress.accepted(7)
    assert (progress.mode, progress.match_index, progress.next_index) == (Mode.STREAM, 7, 8)


def test_a_stream_runs_ahead_up_to_its_bound() -> None:
    progress = Progress(next_index=1)
    progress.accepted(0)
    for index in (2, 4):
        assert progress.may_append(9, in_flight_max=2)
        progress.sent(index)
    assert not progress.may_append(9, in_flight_max=2)
    progress.accepted(3)
    assert progress.may_append(9, in_flight_max=2)
    assert (progress.match_index, progress.next_index) == (3, 5)


def test_an_acknowledgement_short_of_the_guess_does_not_confirm_it() -> None:
    progress = Progress(next_index=10)
    progress.accepted(4)
    assert (progress.mode, progress.match_index, progress.next_index) == (Mode.PROBE, 4, 10)
    progress.accepted(9)
    assert progress.mode is Mode.STREAM


def test_overtaken_rejections_are_recognised() -> None:
    progress = Progress(next_index=10)
    assert not progress.is_stale_rejection(9)
    assert progress.is_stale_rejection(8)
    progress.rejected(next_index=6)
    assert (progress.mode, progress.next_index) == (Mode.PROBE, 6)
    progress.accepted(5)
    progress.sent(8)
    assert progress.is_stale_rejection(5)
    assert not progress.is_stale_rejection(7)
    assert progress.is_stale_rejection(9)


def test_a_rejection_never_reaches_below_what_was_acknowledged() -> None:
    progress = Progress(next_index=5)
    progress.accepted(4)
    progress.sent(8)
    progress.rejected(next_index=2)
    assert progress.next_index == 5


def test_a_restart_forgets_what_was_in_flight_and_keeps_a_guess() -> None:
    guessing = Progress(next_index=70)
    guessing.sent(70)
    guessing.restart()
    assert (guessing.mode, guessing.next_index, guessing.may_append(99, 1)) == (Mode.PROBE, 70, True)
    streaming = Progress(next_index=5)
    streaming.accepted(4)
    streaming.sent(9)
    streaming.restart()
    assert (streaming.mode, streaming.next_index) == (Mode.PROBE, 5)


def test_a_peer_that_waits_for_a_snapshot_gets_no_entries_until_it_holds_the_base() -> None:
    progress = Progress(next_index=3)
    progress.wait_for_snapshot(base_index=50)
    assert not progress.may_append(99, 9)
    assert progress.is_stale_rejection(50)
    progress.accepted(20)
    assert progress.mode is Mode.SNAPSHOT
    progress.accepted(55)
    assert (progress.mode, progress.next_index) == (Mode.STREAM, 56)
