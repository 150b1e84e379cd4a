"""What a node that is the only voter does with its journal: write, apply, lay down a checkpoint, compact, die, start
again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from p2pcluster.core import commands
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.log import COMMANDS, Entry
from p2pcluster.core.queues import State
from p2pcluster.journal import Compaction, Write, apply_entry, checkpoint_of
from tests.contract.stores import MEMORY, AnyJournal, Store
from tests.simulation.queue_model import entry_body, values_of


def put(queue: str, seq: int, *bodies: bytes, keys: bytes | None = None) -> Message:
    """A client's put."""
    return commands.put("c1", 0, seq, [Port([queue], lengths_blob(map(len, bodies)), b"".join(bodies), None, keys)])


@dataclass
class SoleVoter:
    """What a sole voter does with its journal."""

    store: Store
    memory: int = MEMORY

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.journal: AnyJournal
        self.journal, self.recovered = self.store.open(self.memory)
        self.state = self.recovered.state
        self.last_index = self.recovered.last_index

    def entries(self, *bodies: Iterable[Message]) -> tuple[Entry, ...]:
        return tuple(
            Entry(index, 1, 10 * index, COMMANDS, entry_body(body))
            for index, body in enumerate(bodies, self.last_index + 1)
        )

    def write(self, write: Write) -> Compaction:
        compaction = self.journal.write(write)
        for chunk in compaction.filled:
            self.state.filled(chunk.queue, chunk.first, chunk.body_crc)
        for entry in write.entries:
            apply_entry(self.state, entry)
        self.last_index += len(write.entries)
        return compaction

    def commit(self, *messages: Message) -> None:
        self.write(Write(self.entries(messages), sole_voter=True))

    def checkpoint(self) -> None:
        self.write(Write(checkpoint=checkpoint_of(self.state)))

    def compact(self, bytes_max: int = 1 << 20) -> Compaction:
        return self.write(Write(compact=(self.last_index + 1, bytes_max)))

    def crash(self) -> None:
        self.store.crash()
        self.open()

    def end(self) -> None:
        self.journal.close()
        self.open()

    def chunks(self, queue: str) -> list[Chunk]:
        return list(self.state.queues[queue].chunks)

    def values(self, queue: str) -> list[bytes]:
        """The bytes of every open item."""
        found = []
        held = self.state.queues[queue]
        for chunk in held.chunks:
            lengths, body = chunk.lengths, chunk.body
            if lengths is None or body is None:
                lengths, body = self.journal.read_bodies(queue, chunk)
            for lo, hi in held.open_ranges(chunk.first, chunk.end):
                found += values_of(*chunk.slice_of(lengths, body, lo, hi))
        return found


def facts(state: State) -> tuple[Any, ...]:
    """All that a state is, in a form that can be compared."""
    return state.applied_idx, state.applied_term, state.at_ms, state.hash, state.all_rows()
