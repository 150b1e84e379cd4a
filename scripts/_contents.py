"""What two states must agree in, whatever way their chunks were cut.

How chunks lie together is each node's own affair: a checkpoint joins small ones, a replay of the log does not.
Decided here is what remains when that is left out: every row of every other table, and for each queue its items (ids,
runs, keys, sizes, bytes), told as one short value each, so that what differs can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import _journal  # noqa: F401  (finds the package)
from p2pcluster.core.commands import lengths_of
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.queues import State
from p2pcluster.core.records import QueueState
from p2pcluster.core.rows import Row
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.ranges import Range, RangeSet
from p2pcluster.core.tables import TABLES

Bodies = Callable[[str, Chunk], tuple[bytes, bytes]]
Contents = dict[tuple[str, Row], Any]


def contents_of(state: State, bodies: Bodies) -> Contents:
    """All that `state` stands for, by table and key. `bodies` gives the bytes of a chunk."""
    contents: Contents = {("at", ()): (state.applied_idx, state.applied_term, state.at_ms, state.hash)}
    rows = state.all_rows()
    for table in TABLES:
        if table not in ("chunks", "keys", "bundles"):  # the first two are told queue by queue
            contents |= {(table, key): values for key, values in rows[table].items()}
    for key, part in state.bundles.items():  # not where in the log it came: a snapshot does not say
        contents["bundles", key] = (part.parts, part.body_bytes, part.body_crc)
    for queue in state.queues.values():
        contents["items", (queue.name,)] = _items(queue, bodies)
    return contents


def unfinished(queue: QueueState, chunk: Chunk) -> list[Range]:
    """The ids of a chunk that are open or parked."""
    found = RangeSet(queue.open_ranges(chunk.first, chunk.end))
    for item_id in queue.parked:
        if chunk.first <= item_id < chunk.end:
            found.add(item_id, item_id + 1)
    return list(found)


def _items(queue: QueueState, bodies: Bodies) -> dict[str, Any]:
    lengths_hash, bodies_hash, keys_hash = (hashlib.blake2b(digest_size=8) for _ in range(3))
    runs: dict[int, RangeSet] = {}
    for chunk in queue.chunks:
        found = unfinished(queue, chunk)
        lengths, body = bodies(queue.name, chunk)
        for lo, hi in found:
            runs.setdefault(chunk.run, RangeSet()).add(lo, hi)
            of_range, bytes_of_range = chunk.slice_of(lengths, body, lo, hi)
            lengths_hash.update(of_range)
            bodies_hash.update(bytes_of_range)
        for item_id, key in _keys(chunk, found):
            keys_hash.update(json.dumps([item_id, key]).encode())
    return {
        "ready": list(queue.ready), "delayed": dict(sorted(queue.delayed.items())),
        "deliveries": dict(sorted(queue.deliveries.items())),
        "runs": {run: list(ranges) for run, ranges in sorted(runs.items())},
        "known keys": hashlib.blake2b(b"".join(sorted(queue.keys)), digest_size=8).hexdigest(),
        "lengths": lengths_hash.hexdigest(), "bodies": bodies_hash.hexdigest(), "item keys": keys_hash.hexdigest(),
    }


def _keys(chunk: Chunk, ranges: list[Range]) -> Iterator[tuple[int, str]]:
    if chunk.keys is not None:
        keys = json.loads(bytes(chunk.keys))
        yield from ((item_id, keys[item_id - chunk.first]) for lo, hi in ranges for item_id in range(lo, hi)
                    if keys[item_id - chunk.first] is not None)


def sizes_are_right(chunk: Chunk, lengths: bytes, body: bytes) -> bool:
    """Whether a chunk's bytes are as many as its row says, and its items as large as they add up to."""
    return len(lengths) == 4 * chunk.count and len(body) == chunk.body_bytes and sum(lengths_of(lengths)) == len(body)


def first_difference(ours: Contents, theirs: Contents, whose: tuple[str, str]) -> str | None:
    """Where two contents differ, in one line; `whose` names them."""
    for place in [*ours, *(key for key in theirs if key not in ours)]:
        left, right = ours.get(place), theirs.get(place)
        if left == right:
            continue
        table, key = place
        if isinstance(left, dict) and isinstance(right, dict):
            part = next(name for name in left if left[name] != right[name])
            table, left, right = f"{part} of items", left[part], right[part]
        return f"{table} {'/'.join(map(_short, key))}: {whose[0]} {_short(left)}, {whose[1]} {_short(right)}"
    return None


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def digest(contents: Contents, configuration: Configuration, meta: dict[str, Any], chain: bytes) -> str:
    """One short text for all that is the cluster's: nodes that stand at the same entry have the same."""
    own = ("clean_", "commit_", "applied_", "sum_", "base_", "configuration", "node_id", "term", "voted_for")
    kept = {key: value for key, value in meta.items() if not key.startswith(own)}
    whole = hashlib.blake2b(chain, digest_size=8)
    for part in (configuration, *sorted(kept.items()), *sorted(contents.items(), key=repr)):
        whole.update(repr(part).encode())
    return whole.hexdigest()
