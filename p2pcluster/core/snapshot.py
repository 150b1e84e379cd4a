"""A state as bytes, for a node that is so far behind that the log no longer has what it lacks.

Decided here: the form. A snapshot is a head and the rows of every table, with the bytes that they stand for; never a term, a vote, a node's
id or a log. What the rows mean is `queues`'s, how they are read and stored is the journal's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from p2pcluster.core.codec import Buffer, Message, decode_all, encode
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import RemoteProtocolError

Value = str | int | bytes | None


@dataclass(frozen=True, slots=True)
class Head:
    """Where the state stands: the last entry applied, its term, time and chain, the state's hash, the configuration in force."""

    index: int
    term: int
    at_ms: int
    chain: bytes
    state_hash: bytes
    configuration: Configuration


class TableRow(NamedTuple):
    """A row: its columns less the bodies', and the bodies."""

    table: str
    values: tuple[Value, ...]
    bodies: tuple[Buffer, ...]


def encode_snapshot(head: Head, rows: Iterable[TableRow]) -> Iterator[Buffer]:
    """The snapshot, in pieces to be written one after the other."""
    configuration = {name: list(getattr(head.configuration, name)) for name in Configuration.__dataclass_fields__}
    yield from encode(Message("snapshot", {"index": head.index, "term": head.term, "at_ms": head.at_ms, "chain": head.chain.hex(),
                                           "state_hash": head.state_hash.hex(), "configuration": configuration}))
    for row in rows:
        yield from encode(Message(row.table, {"values": [_plain(value) for value in row.values]}, row.bodies))


def decode_snapshot(data: Buffer) -> tuple[Head, list[TableRow]]:
    """Head and rows. Raises `RemoteProtocolError` for anything that `encode_snapshot` cannot have made."""
    messages = [message for message, _ in decode_all(data)]
    if not messages or messages[0].kind != "snapshot":
        raise RemoteProtocolError("a snapshot does not begin with its head")
    try:
        return _head(messages[0].fields), [_row(message) for message in messages[1:]]
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise RemoteProtocolError(f"a snapshot is not of this version ({error})") from error


def configuration_text(configuration: Configuration) -> str:
    """A configuration as the journal's `meta` stores it."""
    return json.dumps([configuration.voters, configuration.voters_old, configuration.learners])


def read_configuration(text: str | None) -> Configuration:
    """What `configuration_text` wrote; empty for None."""
    return Configuration(*(tuple(names) for names in json.loads(text))) if text else Configuration()


def _head(fields: dict[str, Any]) -> Head:
    configuration = Configuration(**{name: tuple(fields["configuration"][name]) for name in Configuration.__dataclass_fields__})
    return Head(int(fields["index"]), int(fields["term"]), int(fields["at_ms"]), bytes.fromhex(fields["chain"]),
                bytes.fromhex(fields["state_hash"]), configuration)


def _row(message: Message) -> TableRow:
    if message.kind not in TABLES:
        raise ValueError(f"there is no table {message.kind!r}")
    return TableRow(message.kind, tuple(_value(value) for value in message.fields["values"]), message.blobs)


def _plain(value: Value) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _value(value: Any) -> Value:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    if value is None or isinstance(value, str | int):
        return value
    raise ValueError(f"a column holds {type(value).__name__}")
