"""What is handed to a session: which parts of which chunks, how many of them fit in a message, and that message.

Nothing here decides who gets what: that is the leader's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p2pcluster import config
from p2pcluster.core import commands
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.ranges import Fence, Range, RangeSet
from p2pcluster.core.records import QueueState


@dataclass(frozen=True, slots=True)
class Grant:
    """Items for a session: the ids `[lo, hi)` of each piece, whose bytes the shell fetches when it sends them."""

    session: str
    kind: str
    queue: str
    fence: Fence
    pieces: tuple[tuple[Chunk, int, int], ...]
    deliveries: dict[int, int]
    request: int | None
    version: str | None = None  # that the items are for, where a node runs them


def pieces_of(queue: QueueState, ranges: list[Range]) -> tuple[tuple[Chunk, int, int], ...]:
    return tuple(
        (chunk, max(lo, chunk.first), min(hi, chunk.end)) for lo, hi in ranges for chunk in queue.chunks.overlap(lo, hi)
    )


def fitting(pieces: tuple[tuple[Chunk, int, int], ...], ranges: list[Range]) -> tuple[tuple[tuple[Chunk, int, int], ...], list[Range]]:
    """As many of these from the front as fit in a message, at least one item; a part of a chunk counts as all of it, since the sizes
    of its items may not be at hand."""
    left = config.GRANT_BYTES_MAX
    for at, (chunk, lo, hi) in enumerate(pieces):
        left -= chunk.body_bytes
        if left >= 0:
            continue
        fitting = pieces[:at] or ((chunk, lo, lo + max(1, min(hi - lo, config.GRANT_BYTES_MAX * chunk.count // chunk.body_bytes))),)
        return fitting, [(first, end) for _, first, end in fitting]
    return pieces, ranges


def deliveries_of(queue: QueueState, ranges: list[Range]) -> dict[int, int]:
    if not queue.deliveries:
        return {}
    inside = RangeSet(ranges)
    return {item_id: count for item_id, count in queue.deliveries.items() if item_id in inside}


def grant_message(grant: Grant, bodies: list[tuple[Buffer, Buffer]]) -> Message:
    """The message for a grant whose pieces have these `lengths` and `body` blobs."""
    fields: dict[str, Any] = {
        "queue": grant.queue, "fence": list(grant.fence), "deliveries": grant.deliveries,
        "pieces": [[lo, hi, chunk.run, _keys(chunk, lo, hi)] for chunk, lo, hi in grant.pieces],
    }
    if grant.request is not None:
        fields["req"] = grant.request
    if grant.version is not None:
        fields["version"] = grant.version
    return Message(grant.kind, fields, tuple(blob for pair in bodies for blob in pair))


def _keys(chunk: Chunk, lo: int, hi: int) -> list[str | None] | None:
    if chunk.keys is None:
        return None
    keys = commands.keys_of(chunk.keys)
    return keys[lo - chunk.first : hi - chunk.first]
