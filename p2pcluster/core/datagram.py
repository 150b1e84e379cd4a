"""What travels by UDP, and why a datagram counts only once, only from who sealed it, and only while that program lives.

Decided here alone: the bytes of a datagram, what is proven before one counts, and what is said about one that does
not. Not known here: sockets, the time (an argument), what a beacon means (`membership.py`) and what a vote means
(`raft.py`).

    magic 4 | protocol u16 | cluster | key id | flags u8 | node id | boot id | counter u64 | body | tag 16

Texts are one byte of length and UTF-8. The body is a `codec` message. The tag is HMAC-SHA256 over all before it,
under a key of its own. What stands before `flags` is in clear and of the same form in every protocol version, so that
two programs which do not fit can say why. Nothing is hidden.

A recorded datagram must not pass for news. So each program start has a boot id and numbers what it seals, from 1. Of
a boot id that was not met before nothing counts: it is asked a question with a nonce, and its answer is what counts
first, with its beacon in it. What it sealed before that answer never counts. From then on each number counts once;
numbers may overtake each other a little, because two sockets are read one after the other. A boot id that was
forgotten is asked again, so what is remembered can be bounded.

A question goes to the address where the stranger was heard; when no answer comes it is repeated there and by
broadcast: a firewall often lets the shared port through, and not a node's own.

A node without a key seals with a key that everybody knows, under the empty key id. Only nodes without a key read that:
all it decides is who of them makes the key.
"""

from __future__ import annotations

import enum
import hmac
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.core import codec, messages
from p2pcluster.core.codec import Message
from p2pcluster.core.handshake import TAG_BYTES, key_id, subkey
from p2pcluster.core.messages import PreVoteReply, PreVoteRequest, RaftMessage, VoteReply, VoteRequest
from p2pcluster.errors import LocalProtocolError, RemoteProtocolError

MAGIC = b"p2pc"
NAME_CHARS_MAX = 40  # of a node's name in a beacon
TEXT_CHARS_MAX = 100  # of ids, versions and hosts
REORDER_MAX = 64  # numbers that may come behind a higher one
BOOTS_MAX = 1024  # met and remembered, 100 bytes each
STRANGERS_MAX = 256  # asked and not answered yet
TOLD_MAX = 1024  # sentences said in a node's life about datagrams
QUESTION_MS = 2000  # how long an answer to a question is waited for
RETRY_MS = 40  # before a question is repeated for the first time; doubles each time
NONCE_BYTES = 16

_CLEAR = struct.Struct(">4sH")
_COUNTER = struct.Struct(">Q")
_BROADCAST_FLAG = 1
_NO_KEY = bytes(32)
_INT_MAX = 2**63 - 1
_VOTES = (PreVoteRequest, PreVoteReply, VoteRequest, VoteReply)


class Reason(enum.Enum):
    """Why a datagram does not count."""

    TOO_LONG = "too long"
    NOT_OURS = "not p2pcluster"
    CUT = "cut short"
    VERSION = "another protocol version"
    CLUSTER = "another cluster"
    OTHER_KEY = "another key"
    NO_KEY = "sealed without a key"
    TAG = "altered or forged"
    OWN = "sent by this program"
    UNPROVEN = "of a program that has not answered yet"
    REPEATED = "heard before"
    REPLAYED = "far behind its sender"
    TWIN = "of another program with this node's id"
    MALFORMED = "sealed well and not understood"
    ELSEWHERE = "for another node"


_STRANGE = (Reason.TOO_LONG, Reason.NOT_OURS, Reason.CUT)  # for which a person reads the same sentence


class State(enum.Enum):
    """Where a node stands between its start and its cluster."""

    FRESH = "fresh"  # of no cluster, and listens: it may found one
    JOINING = "joining"  # knows of a cluster, and found none
    BLOCKED = "blocked"  # heard its cluster's name under another key, and founds nothing
    FOUNDER = "founder"  # has founded, and does not serve yet
    MEMBER = "member"


ROLES = ("none", "leader", "voter", "standby", "worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beacon:
    """What a node says about itself to everybody. Who it is stands on the envelope.

    A host that is None is the one that the datagram came from. `has_work`: something was put or done in its cluster.
    `interval_ms`: the next beacon comes within it.
    """

    name: str
    state: State
    cluster_id: str | None
    generation: int
    term: int
    leader_id: str | None
    leader_address: Address | None
    last_index: int
    last_term: int
    commit_index: int
    role: str
    voters: int
    members: int
    has_work: bool
    expect: int
    tcp_host: str | None
    tcp_port: int
    udp_port: int
    interval_ms: int
    package: str
    python: str


@dataclass(frozen=True, slots=True)
class Ballot:
    """A vote request or reply, to one or several nodes. `message.to` stands for none of them."""

    message: RaftMessage
    to: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    to_boot: str
    nonce: str
    beacon: Beacon


@dataclass(frozen=True, slots=True)
class _Answer:
    nonce: str
    beacon: Beacon


_Body = Beacon | Ballot | _Question | _Answer
Outgoing = tuple[bytes, Address | None]  # None: by broadcast


@dataclass(frozen=True, slots=True)
class Heard:
    """A datagram that counts. `body` is a vote for this node or the sender's beacon; send the `answers`."""

    node_id: str
    boot_id: str
    counter: int
    is_broadcast: bool
    address: Address
    body: Beacon | RaftMessage
    answers: tuple[Outgoing, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """A datagram that does not count. `key_id`: what it claims, not proven, and "" without one. Send the `answers`."""

    reason: Reason
    address: Address
    key_id: str = ""
    answers: tuple[Outgoing, ...] = ()


class _Refusal(Exception):
    def __init__(
        self, reason: Reason, note: str = "", key_id: str = "", answers: tuple[Outgoing, ...] = ()
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.note = note  # what a person reads behind the host; "" where there is nothing to tell
        self.key_id = key_id
        self.answers = answers


@dataclass(frozen=True, slots=True)
class _Envelope:
    protocol: int
    cluster: str
    key_id: str
    flags: int
    node_id: str
    boot_id: str
    counter: int
    body: memoryview


class _Window:
    """Which numbers of one boot counted already: the highest, and a bit for each of those just below it."""

    __slots__ = ("highest", "_seen")

    def __init__(self, highest: int) -> None:
        self.highest = highest
        self._seen = (1 << REORDER_MAX) - 1  # what was sealed before the answer never counts

    def reason_against(self, counter: int) -> Reason | None:
        behind = self.highest - counter
        if behind >= REORDER_MAX:
            return Reason.REPLAYED
        return Reason.REPEATED if behind >= 0 and self._seen >> behind & 1 else None

    def add(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead > 0:
            # The shift is bounded: a counter may jump by 2**63.
            self._seen = self._seen << min(ahead, REORDER_MAX) & (1 << REORDER_MAX) - 1
            self.highest = counter
        self._seen |= 1 << self.highest - counter


class _Stranger:
    """A boot id that has not answered yet."""

    __slots__ = ("address", "nonce", "since_ms", "asked", "retry_ms", "answered_counter")

    def __init__(self, address: Address, nonce: str, now_ms: int) -> None:
        self.address = address
        self.nonce = nonce
        self.since_ms = now_ms
        self.asked = 0
        self.retry_ms = now_ms
        self.answered_counter = 0

    def is_over(self, now_ms: int) -> bool:
        return now_ms >= self.since_ms + QUESTION_MS


class Gate:
    """Seals what goes out and opens what comes in, for one program start.

    Invariants: a number is sealed once; a (boot id, number) counts at most once; nothing counts that was sealed before
    its boot id answered a nonce of this gate; what is remembered is bounded whatever comes in.
    """

    def __init__(
        self, key: bytes | None, cluster: str, node_id: str, boot_id: str, secret: bytes, protocol: int
    ) -> None:
        """`key` is `handshake.derive_key`'s, or None for a node that has none yet; `secret` is 32 bytes of chance.

        One gate for a boot id and a key: a second one would number from 1 again, and not be heard.
        """
        assert len(secret) >= 32
        assert all(0 < len(text.encode()) <= TEXT_CHARS_MAX for text in (cluster, node_id, boot_id))
        self.cluster = cluster
        self.node_id = node_id
        self.boot_id = boot_id
        self.key_id = "" if key is None else key_id(key)
        self.heard_count = 0
        self.refused_counts: dict[Reason, int] = {}
        self._keyed = hmac.new(subkey(_NO_KEY if key is None else key, "datagrams"), digestmod="sha256")
        self._protocol = protocol
        self._secret = secret
        self._nonces = 0
        self._counter = 0
        self._windows: OrderedDict[tuple[str, str], _Window] = OrderedDict()
        self._strangers: OrderedDict[tuple[str, str], _Stranger] = OrderedDict()
        self._told: set[tuple[str, Reason]] = set()
        self._notes: list[str] = []

    def seal(self, body: Beacon | Ballot, *, broadcast: bool = False) -> bytes:
        """The datagram to send, once: each one sealed counts once, wherever it arrives."""
        return self._seal(body, broadcast)

    def open(self, data: bytes, address: Address, me: Beacon, now_ms: int) -> Heard | Refused:
        """What a datagram that came from `address` is. `me` is this node's present beacon, for the answers."""
        try:
            heard = self._open(data, address, me, now_ms)
        except _Refusal as refusal:
            self._tell(address.host, refusal)
            self.refused_counts[refusal.reason] = self.refused_counts.get(refusal.reason, 0) + 1
            return Refused(refusal.reason, address, refusal.key_id, refusal.answers)
        self.heard_count += 1
        return heard

    def repeat_questions(self, me: Beacon, now_ms: int) -> list[Outgoing]:
        """Questions that no answer has come to, due again by now. To be asked every tick or two."""
        outgoing: list[Outgoing] = []
        for key, stranger in list(self._strangers.items()):
            if stranger.is_over(now_ms):
                del self._strangers[key]
            elif now_ms >= stranger.retry_ms:
                outgoing += self._ask(key, stranger, me, now_ms)
        return outgoing

    def take_notes(self) -> list[str]:
        """Sentences for people about what was refused: one for each host and reason, once."""
        notes, self._notes = self._notes, []
        return notes

    # From bytes to who said what

    def _open(self, data: bytes, address: Address, me: Beacon, now_ms: int) -> Heard:
        envelope = self._authenticate(data)
        if envelope.boot_id == self.boot_id:
            raise _Refusal(Reason.OWN)
        key = (envelope.node_id, envelope.boot_id)
        window = self._windows.get(key)
        if window is None:
            body = self._body(envelope)
            answers = self._hear_stranger(key, envelope, body, address, me, now_ms)
        else:
            self._require_new(window, envelope.counter)
            body = self._body(envelope)
            window.add(envelope.counter)
            self._windows.move_to_end(key)
            answers = self._answers_to(envelope, body, address, me)
        if envelope.node_id == self.node_id:
            raise _Refusal(Reason.TWIN, _twin_note(), answers=tuple(answers))
        return self._heard(envelope, body, address, tuple(answers))

    def _require_new(self, window: _Window, counter: int) -> None:
        reason = window.reason_against(counter)
        if reason is not None:
            raise _Refusal(reason, _replayed_note() if reason is Reason.REPLAYED else "")

    def _authenticate(self, data: bytes) -> _Envelope:
        if len(data) > config.DATAGRAM_BYTES_MAX:
            raise _Refusal(Reason.TOO_LONG, _stranger_note())
        if data[: len(MAGIC)] != MAGIC:
            raise _Refusal(Reason.NOT_OURS, _stranger_note())
        envelope = _split(data, self._compare)
        if not hmac.compare_digest(self._tag(data[:-TAG_BYTES]), data[-TAG_BYTES:]):
            raise _Refusal(Reason.TAG, _tag_note(self.cluster))
        return envelope

    def _compare(self, protocol: int, cluster: str, their_key_id: str) -> None:
        """The differences that a person can remove, the outermost first. Nothing of this is proven."""
        if protocol != self._protocol:
            raise _Refusal(
                Reason.VERSION,
                f"speaks protocol {protocol} and this node protocol {self._protocol}: install one version of p2pcluster"
                " on both",
            )
        if cluster != self.cluster:
            raise _Refusal(
                Reason.CLUSTER,
                f"is of cluster {cluster!r} and this node of {self.cluster!r}: start one of them with the other's"
                " --cluster NAME, or leave them apart",
            )
        if their_key_id == self.key_id:
            return
        if not their_key_id:
            raise _Refusal(
                Reason.NO_KEY,
                f"has no key of cluster {cluster!r}: run `python -m p2pcluster key` here and give what it prints to"
                " `python -m p2pcluster key --set` there",
            )
        note = f"holds another key of cluster {cluster!r} (its id is {their_key_id}, here it is {self.key_id})"
        if not self.key_id:
            note = f"holds the key of cluster {cluster!r} and this node holds none"
        raise _Refusal(
            Reason.OTHER_KEY,
            f"{note}: run `python -m p2pcluster key` there and give what it prints to"
            " `python -m p2pcluster key --set` here, or choose another name with --cluster",
            their_key_id,
        )

    def _body(self, envelope: _Envelope) -> _Body:
        try:
            body = _decode(codec.decode(envelope.body))
            if isinstance(body, Ballot) and body.message.sender != envelope.node_id:
                raise RemoteProtocolError("a vote that is not its sender's")
        except RemoteProtocolError as error:
            note = f"sent a datagram of cluster {self.cluster!r} that this node does not understand ({error}): install"
            raise _Refusal(Reason.MALFORMED, f"{note} one version of p2pcluster on both") from error
        return body

    def _heard(self, envelope: _Envelope, body: _Body, address: Address, answers: tuple[Outgoing, ...]) -> Heard:
        content: Beacon | RaftMessage
        if isinstance(body, Ballot):
            if self.node_id not in body.to:
                raise _Refusal(Reason.ELSEWHERE)
            content = replace(body.message, to=self.node_id)
        else:
            content = body if isinstance(body, Beacon) else body.beacon
        is_broadcast = bool(envelope.flags & _BROADCAST_FLAG)
        return Heard(envelope.node_id, envelope.boot_id, envelope.counter, is_broadcast, address, content, answers)

    # Who is alive

    def _hear_stranger(
        self, key: tuple[str, str], envelope: _Envelope, body: _Body, address: Address, me: Beacon, now_ms: int
    ) -> list[Outgoing]:
        """Meets who answers the question that was put to it, and refuses whatever else it sends."""
        stranger = self._stranger(key, address, now_ms)
        if self._is_answer(body, stranger):
            self._meet(key, envelope.counter)
            return []
        answers: list[Outgoing] = []
        # A stranger's question is answered, or two strangers would wait for each other; each one once, so that who
        # repeats recorded ones gets little out of it.
        if envelope.counter > stranger.answered_counter:
            answers = self._answers_to(envelope, body, address, me)
            if answers:
                stranger.answered_counter = envelope.counter
        if now_ms >= stranger.retry_ms:
            answers += self._ask(key, stranger, me, now_ms)
        raise _Refusal(Reason.UNPROVEN, answers=tuple(answers))

    def _stranger(self, key: tuple[str, str], address: Address, now_ms: int) -> _Stranger:
        stranger = self._strangers.get(key)
        if stranger is None or stranger.is_over(now_ms):
            self._nonces += 1
            nonce = hmac.digest(self._secret, self._nonces.to_bytes(8, "big"), "sha256")[:NONCE_BYTES].hex()
            stranger = self._strangers[key] = _Stranger(address, nonce, now_ms)
            self._strangers.move_to_end(key)
            if len(self._strangers) > STRANGERS_MAX:
                self._strangers.popitem(last=False)
        stranger.address = address
        return stranger

    def _is_answer(self, body: _Body, stranger: _Stranger) -> bool:
        return isinstance(body, _Answer) and hmac.compare_digest(body.nonce.encode(), stranger.nonce.encode())

    def _meet(self, key: tuple[str, str], counter: int) -> None:
        del self._strangers[key]
        self._windows[key] = _Window(counter)
        if len(self._windows) > BOOTS_MAX:
            self._windows.popitem(last=False)

    def _ask(self, key: tuple[str, str], stranger: _Stranger, me: Beacon, now_ms: int) -> list[Outgoing]:
        stranger.retry_ms = now_ms + (RETRY_MS << min(stranger.asked, 10))
        stranger.asked += 1
        question = _Question(key[1], stranger.nonce, me)
        outgoing: list[Outgoing] = [(self._seal(question, False), stranger.address)]
        if stranger.asked > 1:
            outgoing.append((self._seal(question, True), None))
        return outgoing

    def _answers_to(self, envelope: _Envelope, body: _Body, address: Address, me: Beacon) -> list[Outgoing]:
        """What a question to this program is answered: on the way that it came."""
        if not isinstance(body, _Question) or body.to_boot != self.boot_id:
            return []
        answer = _Answer(body.nonce, me)
        outgoing: list[Outgoing] = [(self._seal(answer, False), address)]
        if envelope.flags & _BROADCAST_FLAG:
            outgoing.append((self._seal(answer, True), None))
        return outgoing

    # Small common things

    def _seal(self, body: _Body, broadcast: bool) -> bytes:
        self._counter += 1
        head = _CLEAR.pack(MAGIC, self._protocol) + _text(self.cluster) + _text(self.key_id)
        head += bytes([_BROADCAST_FLAG if broadcast else 0]) + _text(self.node_id) + _text(self.boot_id)
        data = head + _COUNTER.pack(self._counter) + codec.encode_bytes(_encode(body))
        data += self._tag(data)
        if len(data) > config.DATAGRAM_BYTES_MAX:
            raise LocalProtocolError(
                f"what this node says about itself takes {len(data)} bytes of at most {config.DATAGRAM_BYTES_MAX}: use"
                " a shorter --advertise or --cluster"
            )
        return data

    def _tag(self, data: bytes) -> bytes:
        mac = self._keyed.copy()
        mac.update(data)
        return mac.digest()[:TAG_BYTES]

    def _tell(self, host: str, refusal: _Refusal) -> None:
        told = (host, Reason.NOT_OURS if refusal.reason in _STRANGE else refusal.reason)
        if not refusal.note or told in self._told or len(self._told) >= TOLD_MAX:
            return
        self._told.add(told)
        self._notes.append(f"{host} {refusal.note}")


def ballots(raft_messages: Iterable[RaftMessage]) -> list[Ballot]:
    """Votes as datagrams: those that differ in their target only become one, for all of them."""
    grouped: dict[RaftMessage, list[str]] = {}
    for message in raft_messages:
        assert isinstance(message, _VOTES), f"a {type(message).__name__} travels by TCP"
        grouped.setdefault(replace(message, to=_NOBODY, over_tcp=False), []).append(message.to)
    return [Ballot(message, tuple(dict.fromkeys(to))) for message, to in grouped.items()]


def short_name(name: str) -> str:
    """A node's name as a beacon can carry it."""
    return "".join(char if char.isprintable() and char.isascii() else "?" for char in name[:NAME_CHARS_MAX]) or "?"


_NOBODY = "*"


def _split(data: bytes, compare: Callable[[int, str, str], None]) -> _Envelope:
    """The parts of a datagram; `compare` is asked as soon as what is in clear is known."""
    try:
        _, protocol = _CLEAR.unpack_from(data)
        cluster, at = _take_text(data, _CLEAR.size)
        their_key_id, at = _take_text(data, at)
        compare(protocol, cluster, their_key_id)
        flags = data[at]
        node_id, at = _take_text(data, at + 1)
        boot_id, at = _take_text(data, at)
        (counter,) = _COUNTER.unpack_from(data, at)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise _Refusal(Reason.CUT, _stranger_note()) from error
    at += _COUNTER.size
    if not node_id or not boot_id or not 0 < counter <= _INT_MAX:
        raise _Refusal(Reason.CUT, _stranger_note())
    body = memoryview(data)[at:-TAG_BYTES]
    return _Envelope(protocol, cluster, their_key_id, flags, node_id, boot_id, counter, body)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return bytes([len(encoded)]) + encoded


def _take_text(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    if end > len(data):
        raise IndexError(at)
    text = str(data[at + 1 : end], "utf-8")
    if len(text) > TEXT_CHARS_MAX or not text.isprintable():
        raise IndexError(at)
    return text, end


def _stranger_note() -> str:
    return "sends what is not p2pcluster to its UDP port: stop that program, or start the cluster with --port N"


def _tag_note(cluster: str) -> str:
    return (
        f"sends datagrams that name cluster {cluster!r} and this key and do not prove it: they were altered on their"
        " way or are forged; look for a proxy or a stranger there"
    )


def _replayed_note() -> str:
    return "repeats datagrams that were sent long ago: they are ignored; look for a stranger or a loop in the network"


def _twin_note() -> str:
    return (
        "runs a node with the id of this one: its home is a copy of this one's; stop one of them and give it an empty"
        " --home DIR"
    )


# Bodies on the wire

_Reader = Callable[[Any], Any]


def _encode(body: _Body) -> Message:
    if isinstance(body, Beacon):
        return Message("beacon", _beacon_fields(body))
    if isinstance(body, Ballot):
        vote = messages.to_message(replace(body.message, to=_NOBODY))
        return Message(vote.kind, vote.fields | {"to": list(body.to)})
    if isinstance(body, _Question):
        return Message("echo_request", {"boot": body.to_boot, "nonce": body.nonce} | _beacon_fields(body.beacon))
    return Message("echo_reply", {"nonce": body.nonce} | _beacon_fields(body.beacon))


def _beacon_fields(beacon: Beacon) -> dict[str, Any]:
    fields = {name: getattr(beacon, name) for name in _BEACON_FIELDS}
    fields["state"] = beacon.state.value
    fields["leader_address"] = None if beacon.leader_address is None else list(beacon.leader_address)
    return fields


def _decode(message: Message) -> _Body:
    """The body in `message`. Raises `RemoteProtocolError` for whatever `_encode` cannot have made."""
    if message.blobs:
        raise RemoteProtocolError("it carries blobs")
    if message.kind == "beacon":
        return Beacon(**_read("beacon", _BEACON_FIELDS, message.fields))
    if message.kind == "echo_request":
        fields = _read(message.kind, _QUESTION_FIELDS, message.fields)
        return _Question(fields.pop("boot"), fields.pop("nonce"), Beacon(**fields))
    if message.kind == "echo_reply":
        fields = _read(message.kind, _ANSWER_FIELDS, message.fields)
        return _Answer(fields.pop("nonce"), Beacon(**fields))
    return _decode_ballot(message)


def _decode_ballot(message: Message) -> Ballot:
    to = message.fields.get("to")
    if not isinstance(to, list) or not to or not all(_is_text(name) for name in to):
        raise RemoteProtocolError(f"{message.kind!r:.50} is no datagram of this version")
    vote = messages.from_message(message._replace(fields=message.fields | {"to": _NOBODY}), over_tcp=False)
    if not isinstance(vote, _VOTES):
        raise RemoteProtocolError(f"a {message.kind!r} does not travel by UDP")
    return Ballot(vote, tuple(to))


def _read(what: str, readers: dict[str, _Reader], fields: dict[str, Any]) -> dict[str, Any]:
    if fields.keys() != readers.keys():
        raise RemoteProtocolError(f"the fields of a {what!r} are not those of this version")
    try:
        return {name: read(fields[name]) for name, read in readers.items()}
    except ValueError as error:
        raise RemoteProtocolError(f"a field of a {what!r} is off: {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= TEXT_CHARS_MAX and value.isprintable()


def _short_text(value: Any) -> str:
    if not _is_text(value):
        raise ValueError(f"{value!r:.50} is no short text")
    assert isinstance(value, str)
    return value


def _short_text_or_none(value: Any) -> str | None:
    return None if value is None else _short_text(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _INT_MAX:
        raise ValueError(f"{value!r:.50} is not a count")
    return value


def _port(value: Any) -> int:
    if type(value) is not int or not 0 < value <= 65535:
        raise ValueError(f"{value!r:.50} is not a port")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r:.50} is neither true nor false")
    return value


def _address_or_none(value: Any) -> Address | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r:.50} is no address")
    return Address(_short_text(value[0]), _port(value[1]))


def _role(value: Any) -> str:
    if value not in ROLES:
        raise ValueError(f"{value!r:.50} is no role")
    assert isinstance(value, str)
    return value


_BEACON_FIELDS: Final[dict[str, _Reader]] = {
    "name": _short_text,
    "state": State,
    "cluster_id": _short_text_or_none,
    "generation": _count,
    "term": _count,
    "leader_id": _short_text_or_none,
    "leader_address": _address_or_none,
    "last_index": _count,
    "last_term": _count,
    "commit_index": _count,
    "role": _role,
    "voters": _count,
    "members": _count,
    "has_work": _flag,
    "expect": _count,
    "tcp_host": _short_text_or_none,
    "tcp_port": _port,
    "udp_port": _port,
    "interval_ms": _count,
    "package": _short_text,
    "python": _short_text,
}
_ANSWER_FIELDS: Final[dict[str, _Reader]] = {"nonce": _short_text} | _BEACON_FIELDS
_QUESTION_FIELDS: Final[dict[str, _Reader]] = {"boot": _short_text} | _ANSWER_FIELDS
KINDS = frozenset({"beacon", "echo_request", "echo_reply", "raft_pre_vote", "raft_pre_vote_reply", "raft_vote", "raft_vote_reply"})
