"""What Raft nodes say to each other, and how that becomes a `codec.Message` and back.

Decided here alone: the fields of each Raft message, their form on the wire, and what a well-formed one is. Not known
here: what a message means (`raft.py`), how it travels, who authenticated it. Whatever arrives in another form raises
`RemoteProtocolError`: a decoded message keeps every promise that its class makes, so nothing behind it checks again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from p2pcluster.core import codec
from p2pcluster.core.log import CONFIG, KINDS, Entry
from p2pcluster.core.quorum import Configuration
from p2pcluster.errors import RemoteProtocolError

_INT_MAX = 2**63 - 1
_NAME_CHARS_MAX = 200
_MEMBERS_MAX = 1000


@dataclass(frozen=True, slots=True)
class SnapshotMeta:
    """What a snapshot stands for: the log up to `index`, and the configuration in force there.

    `snapshot_id` is the shell's name for the bytes, which travel elsewhere.
    """

    index: int
    term: int
    at_ms: int
    configuration: Configuration
    snapshot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftMessage:
    """What all have. `over_tcp` is not sent: the receiving shell says by which way the message came."""

    generation: int
    term: int
    sender: str
    to: str
    over_tcp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PreVoteRequest(RaftMessage):
    """Would you vote for me? `term` is the one that the sender would campaign in; it is in it only after that."""

    last_index: int
    last_term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreVoteReply(RaftMessage):
    """`term` repeats the request's when granted, and is the replier's own when refused."""

    granted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRequest(RaftMessage):
    """Vote for me. `transfer`: the leader itself asked the sender to take over, so nobody needs to protect it."""

    last_index: int
    last_term: int
    transfer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteReply(RaftMessage):
    """The vote is durable by the time this is sent."""

    granted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendEntries(RaftMessage):
    """Entries that follow (`prev_index`, `prev_term`) without a gap; none: a heartbeat. `sent_ms` is its clock."""

    prev_index: int
    prev_term: int
    commit_index: int
    sent_ms: int
    entries: tuple[Entry, ...] = ()

    @property
    def last_index(self) -> int:
        """The last index that this message speaks of."""
        return self.prev_index + len(self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendReply(RaftMessage):
    """Accepted: the sender's durable log is the leader's up to `match_index`, and `rejected_index` is None.

    Rejected: the sender's log lacks the leader's entry at `rejected_index`; the two cannot agree above (`hint_index`,
    `hint_term`). `sent_ms` repeats the request's.
    """

    match_index: int
    sent_ms: int
    rejected_index: int | None = None
    hint_index: int = 0
    hint_term: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallSnapshot(RaftMessage):
    """Replace the log by this snapshot. The shell steps it in when the bytes are whole and checked, not before."""

    snapshot: SnapshotMeta
    sent_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotReply(RaftMessage):
    """The sender's durable state holds everything up to `match_index`."""

    match_index: int
    sent_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutNow(RaftMessage):
    """Campaign at once; the leader makes way (dissertation 3.10)."""


def encode_configuration(configuration: Configuration) -> bytes:
    """The body of a CONFIG entry."""
    return codec.encode_bytes(codec.Message("configuration", _configuration_fields(configuration)))


def decode_configuration(body: codec.Buffer) -> Configuration:
    """The configuration in the body of a CONFIG entry. Raises `RemoteProtocolError`."""
    message = codec.decode(body)
    if message.kind != "configuration" or message.blobs:
        raise RemoteProtocolError(f"a configuration was expected, a {message.kind!r} came")
    configuration = _configuration(message.fields)
    if not configuration.voters:
        raise RemoteProtocolError("a change to a configuration without voters came")
    return configuration


def to_message(message: RaftMessage) -> codec.Message:
    """The message as it goes on the wire."""
    kind = _KIND_OF[type(message)]
    fields = {name: getattr(message, name) for name in _FIELDS[kind]}
    if isinstance(message, AppendEntries):
        fields["entries"] = [[entry.term, entry.at_ms, entry.kind] for entry in message.entries]
        return codec.Message(kind, fields, tuple(entry.body for entry in message.entries))
    if isinstance(message, InstallSnapshot):
        fields["snapshot"] = _snapshot_fields(message.snapshot)
    return codec.Message(kind, fields)


def from_message(message: codec.Message, *, over_tcp: bool) -> RaftMessage:
    """The Raft message that came. Raises `RemoteProtocolError` for whatever `to_message` cannot have made."""
    if message.kind not in KINDS_ON_THE_WIRE:
        raise RemoteProtocolError(f"{message.kind!r} is no Raft message; does the peer run another version?")
    fields = _read_fields(message.kind, _FIELDS[message.kind], message.fields)
    if message.kind == "raft_append":
        fields["entries"] = _entries(fields, message.blobs)
    elif message.blobs:
        raise RemoteProtocolError(f"a {message.kind!r} carries blobs")
    return _CLASS_OF[message.kind](over_tcp=over_tcp, **fields)


def _entries(fields: Mapping[str, Any], blobs: tuple[codec.Buffer, ...]) -> tuple[Entry, ...]:
    rows = fields["entries"]
    if len(rows) != len(blobs):
        raise RemoteProtocolError(f"{len(rows)} entries came with {len(blobs)} bodies")
    term, at_ms = fields["prev_term"], 0
    entries = []
    for index, (row, body) in enumerate(zip(rows, blobs, strict=True), fields["prev_index"] + 1):
        if row[0] < term or row[1] < at_ms:
            raise RemoteProtocolError(f"the entry at index {index} goes back in term or time")
        term, at_ms, kind = row
        if kind not in KINDS:
            raise RemoteProtocolError(f"the entry at index {index} is of the unknown kind {kind}")
        if kind == CONFIG:
            decode_configuration(body)
        entries.append(Entry(index, term, at_ms, kind, body if isinstance(body, memoryview) else bytes(body)))
    if term > fields["term"]:
        raise RemoteProtocolError(f"entries of term {term} came in a message of term {fields['term']}")
    return tuple(entries)


def _configuration_fields(configuration: Configuration) -> dict[str, Any]:
    return {name: list(getattr(configuration, name)) for name in _CONFIGURATION_FIELDS}


def _snapshot_fields(snapshot: SnapshotMeta) -> dict[str, Any]:
    fields = {name: getattr(snapshot, name) for name in _SNAPSHOT_FIELDS}
    fields["configuration"] = _configuration_fields(snapshot.configuration)
    return fields


_Reader = Callable[[Any], Any]


def _read_fields(what: str, readers: Mapping[str, _Reader], fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict) or fields.keys() != readers.keys():
        raise RemoteProtocolError(f"the fields of a {what!r} are not those of this version")
    try:
        return {name: read(fields[name]) for name, read in readers.items()}
    except ValueError as error:
        raise RemoteProtocolError(f"a field of a {what!r} is off: {error}") from error


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _INT_MAX:
        raise ValueError(f"{value!r:.50} is not a count")
    return value


def _count_or_none(value: Any) -> int | None:
    return None if value is None else _count(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r:.50} is neither true nor false")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _NAME_CHARS_MAX:
        raise ValueError(f"{value!r:.50} is not a name")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MEMBERS_MAX:
        raise ValueError(f"{value!r:.50} is not a list of names")
    names = tuple(_name(item) for item in value)
    if len(set(names)) != len(names):
        raise ValueError(f"{value!r:.50} has a name twice")
    return names


def _rows(value: Any) -> list[list[int]]:
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 3 for row in value):
        raise ValueError(f"{value!r:.50} is not a list of entries")
    return [[_count(item) for item in row] for row in value]


def _configuration(value: Any) -> Configuration:
    fields = _read_fields("configuration", _CONFIGURATION_FIELDS, value)
    if set(fields["voters"]) & set(fields["learners"]) or (fields["voters_old"] and not fields["voters"]):
        raise RemoteProtocolError("a configuration contradicts itself")
    return Configuration(**fields)


def _snapshot(value: Any) -> SnapshotMeta:
    return SnapshotMeta(**_read_fields("snapshot", _SNAPSHOT_FIELDS, value))


_CONFIGURATION_FIELDS: dict[str, _Reader] = {"voters": _names, "voters_old": _names, "learners": _names}
_SNAPSHOT_FIELDS: dict[str, _Reader] = {
    "index": _count, "term": _count, "at_ms": _count, "configuration": _configuration, "snapshot_id": _name,
}
_COMMON: dict[str, _Reader] = {"generation": _count, "term": _count, "sender": _name, "to": _name}
_LOG_END: dict[str, _Reader] = {"last_index": _count, "last_term": _count}
_TABLE: tuple[tuple[str, type[RaftMessage], dict[str, _Reader]], ...] = (
    ("raft_pre_vote", PreVoteRequest, _LOG_END),
    ("raft_pre_vote_reply", PreVoteReply, {"granted": _flag}),
    ("raft_vote", VoteRequest, {**_LOG_END, "transfer": _flag}),
    ("raft_vote_reply", VoteReply, {"granted": _flag}),
    ("raft_append", AppendEntries, {
        "prev_index": _count, "prev_term": _count, "commit_index": _count, "sent_ms": _count, "entries": _rows,
    }),
    ("raft_append_reply", AppendReply, {
        "match_index": _count, "sent_ms": _count, "rejected_index": _count_or_none, "hint_index": _count,
        "hint_term": _count,
    }),
    ("raft_snapshot", InstallSnapshot, {"snapshot": _snapshot, "sent_ms": _count}),
    ("raft_snapshot_reply", SnapshotReply, {"match_index": _count, "sent_ms": _count}),
    ("raft_timeout_now", TimeoutNow, {}),
)
_FIELDS: dict[str, dict[str, _Reader]] = {kind: {**_COMMON, **own} for kind, _, own in _TABLE}
_CLASS_OF: dict[str, type[RaftMessage]] = {kind: message_class for kind, message_class, _ in _TABLE}
_KIND_OF: dict[type[RaftMessage], str] = {message_class: kind for kind, message_class, _ in _TABLE}
KINDS_ON_THE_WIRE = frozenset(_FIELDS)
