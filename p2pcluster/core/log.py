"""The replicated log of one node, as far as the core has to know it, and what a leader knows about another node's log.

Decided here alone: which indexes exist, which term each has, where two logs last agree, which bodies are still in
memory, and what may be sent to a peer next. Not known here: who leads, what is committed, what a body means, where
entries are stored. The caller knows what is committed: only that is released or compacted, and never truncated.

    0 ... base_index | base_index+1 ... floor_index | floor_index+1 ... last_index
    compacted away   | terms only (bodies released) | whole entries
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

NOOP = 0
COMMANDS = 1
CONFIG = 2
KINDS = frozenset({NOOP, COMMANDS, CONFIG})


@dataclass(frozen=True, slots=True)
class Entry:
    """One position of the log. `at_ms` is cluster time and never goes back from one entry to the next."""

    index: int
    term: int
    at_ms: int
    kind: int
    body: bytes | memoryview


class Log:
    """Invariants: base_index <= floor_index <= last_index; terms and times never fall; indexes have no gap.

    Terms are held as runs, stretches of entries of one term, so that a log of millions of entries costs a few numbers.
    """

    def __init__(
        self, base_index: int = 0, base_term: int = 0, base_at_ms: int = 0, entries: Iterable[Entry] = ()
    ) -> None:
        """A long journal is fed in pieces: `append` some rows, `release_through` the committed ones, and so on."""
        assert base_index >= 0 and base_term >= 0
        self._run_starts = [base_index]
        self._run_terms = [base_term]
        self._floor_index = base_index
        self._floor_at_ms = base_at_ms
        self._entries: list[Entry] = []
        self._loaded: Sequence[Entry] = ()
        self._memory_bytes = 0
        self.append(entries)

    @property
    def base_index(self) -> int:
        """The last index that was compacted away: a snapshot covers it and everything below."""
        return self._run_starts[0]

    @property
    def base_term(self) -> int:
        """The term of the entry at `base_index`."""
        return self._run_terms[0]

    @property
    def floor_index(self) -> int:
        """The last index whose body is no longer in memory."""
        return self._floor_index

    @property
    def last_index(self) -> int:
        """The index of the newest entry, or `base_index` when there is none."""
        return self._floor_index + len(self._entries)

    @property
    def last_term(self) -> int:
        """The term of the entry at `last_index`."""
        return self._run_terms[-1]

    @property
    def last_at_ms(self) -> int:
        """The cluster time of the entry at `last_index`."""
        return self._entries[-1].at_ms if self._entries else self._floor_at_ms

    @property
    def memory_bytes(self) -> int:
        """What the bodies in memory add up to, for whoever decides what to release."""
        return self._memory_bytes

    def term(self, index: int) -> int:
        """The term of the entry at `index`, which is not below `base_index`."""
        assert self.base_index <= index <= self.last_index, (self.base_index, index, self.last_index)
        return self._run_terms[self._run_of(index)]

    def holds(self, index: int, term: int) -> bool:
        """Whether this log is known to have an entry of that index and term."""
        return self.base_index <= index <= self.last_index and self.term(index) == term

    def is_up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends there is at least as complete as this one (raft 5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def last_not_above(self, index: int, term: int) -> int:
        """The largest index up to `index` whose term is at most `term`; `base_index - 1` when that was compacted away.

        Two logs cannot agree above it, if the other one has `term` at `index`: this skips a whole term per question.
        """
        index = min(index, self.last_index)
        if index < self.base_index:
            return index
        run = self._run_of(index)
        while self._run_terms[run] > term:
            index = self._run_starts[run] - 1
            run -= 1
            if run < 0:
                return index
        return index

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries behind the last one."""
        for entry in entries:
            assert entry.index == self.last_index + 1, (entry.index, self.last_index)
            assert entry.term >= self.last_term, (entry.term, self.last_term)
            assert entry.at_ms >= self.last_at_ms, (entry.at_ms, self.last_at_ms)
            if entry.term != self.last_term:
                self._run_starts.append(entry.index)
                self._run_terms.append(entry.term)
            self._entries.append(entry)
            self._memory_bytes += len(entry.body)

    def truncate_from(self, index: int) -> None:
        """Forget the entry at `index` and everything behind it."""
        assert self._floor_index < index <= self.last_index, (self._floor_index, index, self.last_index)
        at = index - self._floor_index - 1
        self._memory_bytes -= sum(len(entry.body) for entry in islice(self._entries, at, None))
        del self._entries[at:]
        while self._run_starts[-1] >= index:
            del self._run_starts[-1], self._run_terms[-1]

    def release_through(self, index: int) -> None:
        """Drop the bodies up to `index` from memory; the journal keeps them."""
        count = index - self._floor_index
        if count <= 0:
            return
        assert count <= len(self._entries), (index, self.last_index)
        self._floor_at_ms = self._entries[count - 1].at_ms
        self._memory_bytes -= sum(len(entry.body) for entry in islice(self._entries, count))
        del self._entries[:count]
        self._floor_index = index

    def compact_through(self, index: int) -> None:
        """Forget the entries up to `index`, terms included: a snapshot covers them."""
        if index <= self.base_index:
            return
        self.release_through(index)
        run = self._run_of(index)
        del self._run_starts[:run], self._run_terms[:run]
        self._run_starts[0] = index
        self._loaded = ()

    def replace_by_snapshot(self, index: int, term: int, at_ms: int) -> None:
        """Start anew behind a snapshot."""
        assert index > self.base_index, (index, self.base_index)
        self._run_starts, self._run_terms = [index], [term]
        self._floor_index, self._floor_at_ms = index, at_ms
        self._entries, self._loaded, self._memory_bytes = [], (), 0

    def entries_in_memory(self, low: int, high: int) -> list[Entry]:
        """The entries from `low` to `high`, none of which was released."""
        assert self._floor_index < low, (self._floor_index, low)
        return self._entries[low - self._floor_index - 1 : high - self._floor_index]

    def keep_loaded(self, entries: Sequence[Entry]) -> None:
        """Hold on to released entries that the shell read back, until `drop_loaded`."""
        assert all(entry.index == entries[0].index + offset for offset, entry in enumerate(entries)), "a gap"
        self._loaded = entries

    def drop_loaded(self, needed_from: int | None = None) -> None:
        """Let go of the entries that were read back, unless one at or above `needed_from` is among them."""
        if needed_from is None or self._loaded and self._loaded[-1].index < needed_from:
            self._loaded = ()

    def batch(self, low: int, bytes_max: int) -> list[Entry] | None:
        """Entries from `low` on, at least one and up to `bytes_max` of bodies; None when they must be loaded first."""
        assert self.base_index < low <= self.last_index, (self.base_index, low, self.last_index)
        if low > self._floor_index:
            return _head(islice(self._entries, low - self._floor_index - 1, None), bytes_max)
        if self._loaded and self._loaded[0].index <= low <= self._loaded[-1].index:
            return _head(islice(self._loaded, low - self._loaded[0].index, None), bytes_max)
        return None

    def _run_of(self, index: int) -> int:
        return bisect_right(self._run_starts, index) - 1


def _head(entries: Iterable[Entry], bytes_max: int) -> list[Entry]:
    taken: list[Entry] = []
    room = bytes_max
    for entry in entries:
        room -= len(entry.body)
        if room < 0 and taken:
            break
        taken.append(entry)
    return taken


class Mode(enum.Enum):
    """How a leader sends to a peer."""

    PROBE = "probe"  # where the logs agree is not known: one message, then wait for its reply
    STREAM = "stream"  # known: send on without waiting
    SNAPSHOT = "snapshot"  # what the peer needs was compacted away: heartbeats only, until it has the snapshot


class Progress:
    """What a leader knows of one peer's log. Invariant: match_index < next_index."""

    __slots__ = (
        "match_index", "next_index", "mode", "acked_ms", "heartbeat_due", "waits_for_load", "_probing", "_in_flight",
    )

    def __init__(self, next_index: int) -> None:
        self.match_index = 0
        self.next_index = next_index
        self.mode = Mode.PROBE
        self.acked_ms: int | None = None
        self.heartbeat_due = True
        self.waits_for_load = False
        self._probing = False
        self._in_flight: deque[int] = deque()

    def may_append(self, last_index: int, in_flight_max: int) -> bool:
        """Whether entries may be sent now (a probe may have none)."""
        if self.mode is Mode.SNAPSHOT or self.waits_for_load:
            return False
        if self.mode is Mode.PROBE:
            return not self._probing
        return self.next_index <= last_index and len(self._in_flight) < in_flight_max

    def sent(self, last_index: int) -> None:
        """A message went out that ends at `last_index`. A stream goes on behind it, a probe waits."""
        if self.mode is Mode.PROBE:
            self._probing = True
        elif last_index >= self.next_index:
            self._in_flight.append(last_index)
            self.next_index = last_index + 1

    def accepted(self, match_index: int) -> None:
        """The peer durably holds everything up to `match_index`; a guess that reaches no further is confirmed."""
        if match_index >= self.next_index - 1:
            self.mode = Mode.STREAM
            self._probing = False
        self.match_index = max(self.match_index, match_index)
        self.next_index = max(self.next_index, self.match_index + 1)
        while self._in_flight and self._in_flight[0] <= self.match_index:
            self._in_flight.popleft()

    def is_stale_rejection(self, rejected_index: int) -> bool:
        """Whether what was sent or heard since has overtaken this rejection."""
        if self.mode is Mode.SNAPSHOT or rejected_index <= self.match_index:
            return True
        if self.mode is Mode.PROBE:
            return rejected_index != self.next_index - 1
        return rejected_index >= self.next_index

    def rejected(self, next_index: int) -> None:
        """The logs do not agree up to where it was thought: ask again, from `next_index` down."""
        self._probe_from(max(next_index, self.match_index + 1))

    def restart(self) -> None:
        """What was in flight is lost, what was acknowledged is not; a guess is still the best guess."""
        self._probe_from(self.match_index + 1 if self.mode is Mode.STREAM else self.next_index)

    def wait_for_snapshot(self, base_index: int) -> None:
        """Nothing but a snapshot helps this peer, as long as it does not hold `base_index`."""
        self._probe_from(base_index + 1)
        self.mode = Mode.SNAPSHOT

    def _probe_from(self, next_index: int) -> None:
        self.next_index = next_index
        self.mode = Mode.PROBE
        self._probing = False
        self.waits_for_load = False
        self._in_flight.clear()
