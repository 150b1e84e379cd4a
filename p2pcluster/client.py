"""A program's way into a cluster: `connect` and what can be done with the result.

Decided here: how a cluster is found, what is asked again after a lost connection, and when an outcome is unknown. Every put carries
the number that its producer gave it, so that asking again never puts twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import p2pcluster
from p2pcluster import config
from p2pcluster.config import Address, Options, parse_address, resolve_options
from p2pcluster.core import loglines, protocol
from p2pcluster.core.codec import Message, decode, encode
from p2pcluster.core.commands import is_number, is_process_count, lengths_blob, lengths_of, PROCESSES_MAX
from p2pcluster.core.handshake import Handshake, Identity, derive_key
from p2pcluster.errors import (
    AuthenticationFailed,
    ClusterError,
    ClusterNotFound,
    HomeError,
    ItemsParked,
    ItemsRemain,
    NoLeader,
    ProtocolError,
    QueueFull,
    RolledBack,
    Unavailable,
    UnknownName,
    ValueRefused,
    WrongUsage,
)
from p2pcluster.finding import Finder
from p2pcluster.home import Keyfile, read_address
from p2pcluster.stream import BlockingConnection, ConnectionClosed, dial
from p2pcluster.values import DECODERS, ENCODERS, as_refusal, check_value

PUT_ITEMS_MAX = 2000  # of one message of `put_many`
PUT_BYTES_MAX = 1 << 20
TAKE_ITEMS_MAX = 100  # fetched ahead by `take`; given back when they were not asked for
RETRY_S = 0.2  # between two tries to reach a node
DIAL_S = 3.0  # for one node to answer
FIND_S = 1.0  # of listening to the network, between two rounds of tries
ASK_S = 1.0  # of silence, before a node that owes an answer is asked whether it is there
SILENT_S = 3.0  # of silence, after which it is not
READS = frozenset({"status", "parked", "project", "read", "value", "wait", "bundle_get"})  # nothing can have come of them
_SECONDS_MAX = 1e12  # of a delay, or since the epoch: 30,000 years, and a number that every node takes


def find_addresses(options: Options, user_home: Path, host: str) -> list[Address]:
    """Where a node may be: the seeds, and the address that the node of this machine's home wrote."""
    found = list(options.seed)
    address = read_address(_home_of(options, user_home, host))
    if address is not None:
        where = "127.0.0.1" if address.host == config.BIND_ANY else address.host
        found.insert(0, Address(where, address.port))
    return found


def _home_of(options: Options, user_home: Path, host: str) -> Path:
    return Path(options.home) if options.home else config.default_home(user_home, options.cluster, host)


def read_key(options: Options) -> bytes:
    """The cluster's key. Raises `HomeError` naming both commands where there is none."""
    keyfile = Keyfile(options.authkey_file) if options.authkey_file else Keyfile.default(options.cluster)
    key = keyfile.read()
    if key is None:
        raise HomeError(f"there is no key of cluster {options.cluster!r} here ({keyfile.path}): start a node, or copy the key of one: "
                        "python -m p2pcluster key there, python -m p2pcluster key --set here")
    return key


def _key_in_time(options: Options, deadline_s: float) -> bytes:
    """The key, which a first node that was just started makes only once it has heard nobody else. Raises `HomeError`."""
    while True:
        try:
            return read_key(options)
        except HomeError:
            starts = find_addresses(options, Path.home(), socket.gethostname())
            if not starts or time.monotonic() + RETRY_S >= deadline_s:
                raise
            time.sleep(RETRY_S)


class Link:
    """One authenticated connection to the leader, found again within the timeout when it is lost.

    It stays with the cluster that it first found: another one at an old address is passed by. `secret` stands for the key file's content,
    and with it only the seeds are dialled, whatever cluster is there: whoever brings a key means one server, and not this machine's.
    `on_try` hears why a try failed, and None when there is a connection.
    """

    def __init__(self, options: Options, timeout_s: float, secret: bytes | None = None,
                 on_try: Callable[[ClusterError | None], None] | None = None) -> None:
        self.options = options
        self.timeout_s = timeout_s
        self._id = secrets.token_hex(8)
        self._only_seeds = secret is not None
        self._on_try = on_try or (lambda trouble: None)
        self._key = derive_key(secret or _key_in_time(options, time.monotonic() + timeout_s))
        self._connection: BlockingConnection | None = None
        self._next_request = self._first_request = 1
        self._replies: dict[int, Message] = {}
        self._heard_s = 0.0  # when the other side last said something
        self._asked: int | None = None  # the request by which it is asked whether it is there
        self._known: list[Address] = []
        self._cluster_id: str | None = None
        self.first_peer: Identity | None = None  # whom it found by itself: the node of this machine, where there is one
        self._sent_to: set[str] = set()  # by nodes that said who leads, since one did or it was waited for
        self._open(time.monotonic() + timeout_s)

    @property
    def peer(self) -> Identity:
        """The node at the other end."""
        assert self._connection is not None, "the link is open"
        return self._connection.peer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, message: Message, timeout_s: float | None = None) -> Message:
        """The reply to `message`, which is asked again after a lost connection: only for what may be asked twice.

        `timeout_s` is for the answer; a lost cluster is looked for within the link's own time, if that is shorter. Raises `Unavailable`
        (indefinite, unless nothing can have come of it) when it was sent and there is no answer in time, what `_open` raises when it could
        not be sent, `NoLeader` when nodes answer and none leads.
        """
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        unanswered = False
        while True:
            try:
                request = self.request(message, min(deadline_s, time.monotonic() + self.timeout_s))
            except (ClusterNotFound, Unavailable, ProtocolError) as error:
                raise (_unknown(message, error) if unanswered else error) from error
            try:
                reply = self.reply(request, deadline_s)
            except Unavailable as error:
                self.close()
                unanswered = True
                if time.monotonic() >= deadline_s:
                    raise _unknown(message, error) from error
                continue
            if reply.fields.get("result") != "error":
                self._sent_to.clear()
                return reply
            if self.redirected(reply):
                continue
            if time.monotonic() + RETRY_S >= deadline_s:
                none = NoLeader(f"the cluster has no leader now ({reply.fields.get('text')}): look with python -m p2pcluster status")
                raise _unknown(message, none) if unanswered else none
            time.sleep(RETRY_S)

    def say_once(self, message: Message) -> Message:
        """The reply to what must not be said to another node than this one. Raises `Unavailable`."""
        return self.reply(self.request(message, time.monotonic() + self.timeout_s), time.monotonic() + self.timeout_s)

    def redirected(self, reply: Message) -> bool:
        """Whether the node that answered knows who leads, and nobody was sent there yet: then he is asked next. Else it is time to wait: the
        one that is named may be dead, and the next one not elected."""
        where = reply.fields.get("leader")
        if where is None or where in self._sent_to:
            self._sent_to.clear()
            return False
        self._sent_to.add(where)
        self._known.insert(0, parse_address(where))
        self.close()
        return True

    def request(self, message: Message, deadline_s: float) -> int:
        """Send; returns the number that the reply will have. What raises was not heard: half a frame is none."""
        while True:
            connection = self._open(deadline_s)
            if self._has_ended(connection):
                continue
            try:
                return self._send(connection, message)
            except ConnectionClosed:
                self.close()
            except Unavailable:
                self.close()
                raise

    def _has_ended(self, connection: BlockingConnection) -> bool:
        """Whether the connection is known to be gone by now: what is not sent over it has certainly not happened."""
        try:
            while True:
                self._take_in(decode(connection.receive(0.0)))
        except ConnectionClosed:
            self.close()
            return True
        except Unavailable:
            return self._connection is None

    def _send(self, connection: BlockingConnection, message: Message) -> int:
        request = self._next_request
        self._next_request += 1
        connection.send(encode(message._replace(fields={**message.fields, "req": request})))
        return request

    def is_current(self, request: int) -> bool:
        """Whether the connection over which `request` went is still there, so that its answer may come."""
        return self._connection is not None and request >= self._first_request

    def reply(self, request: int, deadline_s: float | None) -> Message:
        """The message that answers `request`. Raises `Unavailable`."""
        while request not in self._replies:
            if self._connection is None or not self.is_current(request):
                raise Unavailable("the connection was lost")
            self._hear(self._connection, deadline_s)
        return self._replies.pop(request)

    def _hear(self, connection: BlockingConnection, deadline_s: float | None) -> None:
        """Take in a message. Who says nothing for a while is asked whether he is there, and whether he still leads: a machine that is
        switched off says nothing more, and one that leads no more has forgotten what it was asked. Raises `Unavailable`."""
        quiet_until_s = self._heard_s + (ASK_S if self._asked is None else SILENT_S)
        until_s = quiet_until_s if deadline_s is None else min(quiet_until_s, deadline_s)
        try:
            message = decode(connection.receive(max(0.0, until_s - time.monotonic())))
        except ConnectionClosed:
            self.close()
            raise
        except Unavailable:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise
            self._ask(connection)
            return
        self._take_in(message)

    def _take_in(self, message: Message) -> None:
        self._heard_s = time.monotonic()
        if message.kind == "members":
            self._known = [*self._known[:1], *map(parse_address, message.fields["addresses"])]
        elif self._asked is None or message.fields.get("req") != self._asked:
            self._replies[message.fields.get("req", 0)] = message
        else:
            self._asked = None
            if message.fields.get("result") == "error":
                self.close()
                raise Unavailable("the node that was asked leads no more")

    def _ask(self, connection: BlockingConnection) -> None:
        if self._asked is not None:
            self.close()
            self._known = [*self._known[1:], *self._known[:1]]  # others first
            raise Unavailable(f"the node that was asked says nothing for {SILENT_S:g} s")
        try:
            self._asked = self._send(connection, Message("project", {"pipeline": ""}))
        except Unavailable:
            self.close()
            raise

    def forget(self, request: int) -> None:
        """Nobody waits for this reply."""
        self._replies.pop(request, None)

    def _open(self, deadline_s: float) -> BlockingConnection:
        """The connection; a new one where there is none. Raises `ClusterNotFound`, `Unavailable`, `ProtocolError`."""
        if self._connection is None:
            self._replies.clear()
            self._first_request = self._next_request
            with contextlib.ExitStack() as stack:
                finder: Finder | None = None
                while (trouble := self._try_all(deadline_s)) is not None:
                    is_over = time.monotonic() + RETRY_S >= deadline_s
                    if is_over or (isinstance(trouble, ProtocolError) and self._cluster_id is None):
                        raise trouble
                    finder = finder or self._finder(stack)
                    if finder is None:
                        time.sleep(RETRY_S)
                    else:
                        found = finder.look(self._cluster_id, min(FIND_S, deadline_s - time.monotonic()))
                        self._known = [*found, *self._known]
        assert self._connection is not None
        return self._connection

    def _try_all(self, deadline_s: float) -> ClusterError | None:
        """Dial whoever is known; why there is no connection, or None."""
        try:
            self._connection = self._dial_any(max(0.1, deadline_s - time.monotonic()))
        except (ClusterNotFound, Unavailable, ProtocolError) as error:
            self._on_try(error)
            return error
        self._heard_s, self._asked = time.monotonic(), None
        self._on_try(None)
        return None

    def _finder(self, stack: contextlib.ExitStack) -> Finder | None:
        """Ears on the network, where nobody at a known address is of the cluster; on this machine alone where its node keeps to that."""
        if self._only_seeds:
            return None
        here = read_address(_home_of(self.options, Path.home(), socket.gethostname()))
        bind = config.BIND_LOOPBACK if here is not None and here.host.startswith("127.") else self.options.bind
        with contextlib.suppress(HomeError):
            return stack.enter_context(Finder(self.options, self._key, bind))
        return None

    def _dial_any(self, timeout_s: float) -> BlockingConnection:
        sure = list(self.options.seed) if self._only_seeds else find_addresses(self.options, Path.home(), socket.gethostname())
        addresses = list(dict.fromkeys([*self._known[:1], *sure, *self._known[1:]]))
        failures: list[ClusterError] = [ClusterNotFound(
            f"no node of cluster {self.options.cluster!r} is known here, and none is heard: start one with python -m p2pcluster, or name one with "
            "--seed HOST:PORT")]
        for address in addresses:
            try:
                connection = dial(address.host, address.port, self._handshake(), min(DIAL_S, timeout_s / len(addresses)))
                self._check_cluster(address, connection)
            except (ClusterNotFound, Unavailable, ProtocolError) as error:
                failures.append(error)
                continue
            self.first_peer = self.first_peer or connection.peer
            self._known = [address, *(parse_address(where) for where in connection.peer.facts.get("members", ()))]
            return connection
        # That somebody is there who does not fit says more than that somebody else is away.
        raise next((error for error in failures if isinstance(error, ProtocolError)), failures[-1])

    def _check_cluster(self, address: Address, connection: BlockingConnection) -> None:
        """Whoever restores a backup, or starts with an empty home, has another cluster at the old address: what was asked of the first one
        is not for it. One that this one's cluster dissolved into will do, for nothing had been put there."""
        other, facts = connection.peer.cluster_id, connection.peer.facts
        if self._only_seeds or self._cluster_id in (None, other) or self._cluster_id in facts.get("accepted", ()):
            self._cluster_id = other
            return
        connection.close()
        raise AuthenticationFailed(f"{address.host}:{address.port}: the node there is of {_named(other)}, and this program was connected to "
                                   f"{self._cluster_id}: start a node of that one, or connect anew")

    def _handshake(self) -> Handshake:
        # Each connection is a session of its own: what was granted over a lost one goes back, heard of or not.
        me = Identity(self._id, secrets.token_hex(8), "client", socket.gethostname(), self.options.cluster, None, protocol.VERSION,
                      p2pcluster.__version__, platform.python_version())
        return Handshake("dial", self._key, me, secrets.token_bytes(32))


def _named(cluster_id: str | None) -> str:
    return "no cluster yet" if cluster_id is None else f"cluster {cluster_id}"


def _unknown(message: Message, error: ClusterError) -> Unavailable:
    """What to say of a message that was sent and not answered."""
    if message.kind in READS:
        return Unavailable(f"{message.kind}: no answer in time ({error}): ask again", definite=True)
    return Unavailable(f"{message.kind}: no answer in time ({error}), so whether it happened is unknown (indefinite): ask again")


class Items:
    """The values that `take` hands out; a context manager and an iterator. See `Cluster.take`.

    What was granted over a connection that is lost went back, so it is not handed out; what was acknowledged over it and not
    answered is acknowledged again, by id.
    """

    def __init__(self, cluster: Cluster, queue: str, limit: int | None, wait_s: float | None) -> None:
        self._cluster = cluster
        self._queue = queue
        self._left = limit
        self._wait_s = wait_s
        self._held: deque[tuple[int, bytes]] = deque()
        self._taken_by = 0  # the request that `_held` and `_current` came by
        self._fence: list[Any] = []
        self._current: int | None = None
        self._unsettled: deque[tuple[int, Message]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._acknowledge()
            self._give_back()
            self._settle()
            return
        # The caller's exception is the one to tell of: what cannot be said now goes back with the connection.
        with contextlib.suppress(ClusterNotFound, Unavailable):
            self._give_back()
            self._settle()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._acknowledge()
        if self._left is not None and self._left <= 0:
            raise StopIteration
        if not self._cluster.link.is_current(self._taken_by):
            self._held.clear()
        if not self._held:
            self._settle()
            self._fetch()
        if not self._held:
            raise StopIteration
        value = self._cluster.value_of(self._queue, self._held[0][1])  # what cannot be read stays held, and goes back
        self._current, _ = self._held.popleft()
        if self._left is not None:
            self._left -= 1
        return value

    def _fetch(self) -> None:
        count = min(TAKE_ITEMS_MAX, TAKE_ITEMS_MAX if self._left is None else self._left)
        take = Message("take", {"queue": self._cluster.full(self._queue), "count": count})
        message = self._cluster.check(self._granted(take), self._queue)
        if message.kind == "grant":
            self._fence = message.fields["fence"]
            self._held.extend(bodies_of(message))

    def _granted(self, take: Message) -> Message:
        """The answer to `take`, which is asked again where the connection is lost or nobody leads yet."""
        link = self._cluster.link
        led_by_s = time.monotonic() + link.timeout_s
        while True:
            self._taken_by = link.request(take, time.monotonic() + link.timeout_s)
            try:
                message = link.reply(self._taken_by, None if self._wait_s is None else time.monotonic() + self._wait_s)
            except Unavailable:
                if link.is_current(self._taken_by):
                    return self._cancel(self._taken_by, take)
                continue
            if message.fields.get("result") != "error":
                return message
            if link.redirected(message):
                continue
            if time.monotonic() > led_by_s:
                raise NoLeader(f"the cluster has no leader now ({message.fields.get('text')}): look with python -m p2pcluster status")
            time.sleep(RETRY_S)

    def _cancel(self, request: int, take: Message) -> Message:
        """Nothing came in time. What crosses the cancelling on its way is still ours."""
        link = self._cluster.link
        reply = link.call(take._replace(fields={**take.fields, "count": 0}))
        try:
            return link.reply(request, time.monotonic())
        except Unavailable:
            return reply

    def _acknowledge(self) -> None:
        if self._current is not None:
            item_id, self._current = self._current, None
            self._say("done", [item_id], ports=[], whole=False)

    def _give_back(self) -> None:
        """What was taken and not acknowledged; over a connection that is lost it has gone back."""
        ids = [item_id for item_id in (self._current, *(held for held, _ in self._held)) if item_id is not None]
        self._current = None
        self._held.clear()
        if ids and self._cluster.link.is_current(self._taken_by):
            self._say("release", ids, fence=self._fence)

    def _say(self, kind: str, ids: list[int], **fields: Any) -> None:
        """Send it; `_settle` waits for the answer."""
        ranges = [[item_id, item_id + 1] for item_id in ids]
        command = Message(kind, {"queue": self._cluster.full(self._queue), "ranges": ranges, **fields})
        link = self._cluster.link
        self._unsettled.append((link.request(command, time.monotonic() + link.timeout_s), command))

    def _settle(self) -> None:
        """Wait until what was said is durable."""
        link = self._cluster.link
        while self._unsettled:
            request, command = self._unsettled[0]
            try:
                reply = link.reply(request, time.monotonic() + link.timeout_s)
            except Unavailable:
                link.close()
                reply = link.call(command)
            if reply.fields.get("result") == "error":  # it was said to one who does not lead
                reply = link.call(command)
            if command.kind == "done":
                self._cluster.check(reply, self._queue)
            self._unsettled.popleft()


class Cluster:
    """A connection to a cluster, for one thread; `with connect(...) as cluster`. Names are those of one pipeline."""

    def __init__(self, link: Link, pipeline: str | None) -> None:
        self.link = link
        self._pipeline = pipeline
        self._manifest: dict[str, Any] | None = None
        self.is_patient = False  # whether a put waits for room in its queue for as long as it takes
        self._producer = f"client:{secrets.token_hex(8)}"
        self._seq = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close_connection()

    def close_connection(self) -> None:
        """Leave; what was taken and not acknowledged goes back."""
        self.link.close()

    # ---- names

    @property
    def pipeline(self) -> str:
        """The pipeline that names belong to. Raises `UnknownName` when none was named and there is not exactly one."""
        if self._pipeline is None:
            names = self.link.call(Message("project", {"pipeline": ""})).fields["pipelines"]
            if len(names) != 1:
                said = f"it has {', '.join(names)}" if names else "it has none yet"
                raise UnknownName(f"say which pipeline of cluster {self.link.options.cluster!r} is meant: {said}")
            self._pipeline = names[0]
        return self._pipeline

    @property
    def manifest(self) -> dict[str, Any]:
        """What the pipeline's version says of its stages and queues."""
        if self._manifest is None:
            project = self.project()
            if project is None:
                raise UnknownName(f"cluster {self.link.options.cluster!r} has no pipeline {self.pipeline!r}: look with python -m p2pcluster status")
            self._manifest = project["manifest"]
        return self._manifest

    def project(self) -> dict[str, Any] | None:
        """The deployed project: version, origin, files, run, state, manifest; None when there is none."""
        project: dict[str, Any] | None = self.link.call(Message("project", {"pipeline": self.pipeline})).fields["project"]
        return project

    def full(self, queue: str) -> str:
        """The queue's name in the cluster."""
        self.queue_record(queue)
        return f"{self.pipeline}/{queue}"

    def queue_record(self, queue: str) -> dict[str, Any]:
        """What the manifest says of a queue. Raises `UnknownName`, which names those that there are."""
        for _ in range(2):
            for record in self.manifest["queues"]:
                if record["name"] == queue:
                    return dict(record)
            names = ", ".join(record["name"] for record in self.manifest["queues"])
            self._manifest = None  # another version may have come since it was asked for
        raise UnknownName(f"pipeline {self.pipeline!r} has no queue {queue!r}; it has {names}")

    def check(self, reply: Message, what: str) -> Message:
        """Raise what a refusal means."""
        if reply.fields.get("result") != "refused":
            return reply
        code = reply.fields.get("code")
        if code in ("unknown_queue", "unknown_name", "unknown_pipeline", "unknown_item"):
            raise UnknownName(f"{what!r} does not exist in pipeline {self.pipeline!r}: look with python -m p2pcluster status")
        if code == "closed":
            raise ValueRefused(f"queue {what!r} is closed: nothing more can be put until the next run")
        if code == "not_running":
            raise ValueRefused(f"pipeline {self.pipeline!r} has no run under way: start one with start(), or run --again")
        raise ClusterError(f"{what}: refused ({reply.fields.get('text', code)})")

    # ---- values

    def put(self, queue: str, value: Any, key: str | None = None, delay_s: float | None = None, at: datetime | float | None = None) -> None:
        """Put one value; it is durable when this returns. A `key` that the queue remembers is not put again.

        With `delay_s` nobody gets it before so much time has passed, with `at` not before that time: a datetime with a time zone, or
        seconds since the epoch. Raises `ValueRefused`, `UnknownName`, `QueueFull`; `Unavailable` when the outcome is unknown.
        """
        self.put_many(queue, [value], None if key is None else [key], delay_s, at)

    def put_many(self, queue: str, values: Iterable[Any], keys: Iterable[str] | None = None, delay_s: float | None = None,
                 at: datetime | float | None = None) -> int:
        """Put each value; returns how many were new. Every value is checked before the first is sent. All of them wait alike."""
        waits = _waits(delay_s, at)
        encode_value = ENCODERS[self.queue_record(queue)["codec"]]
        bodies = []
        for value in values:
            try:
                body = encode_value(value)
            except Exception as error:  # a value's own __reduce__ may raise anything
                raise as_refusal(value, error) from error
            check_value(body)
            bodies.append(body)
        names = None if keys is None else list(keys)
        if names is not None and (len(names) != len(bodies) or not all(isinstance(name, str) for name in names)):
            raise WrongUsage(f"{len(names)} keys for {len(bodies)} values: give one text for each value")
        added = 0
        for start, stop in _batches(bodies):
            try:
                added += self._put(queue, bodies[start:stop], None if names is None else names[start:stop], waits)
            except BaseException as error:
                if start:
                    error.add_note(f"the first {start} of {len(bodies)} values were put")
                raise
        return added

    def _put(self, queue: str, bodies: list[bytes], keys: list[str] | None, waits: dict[str, int]) -> int:
        blobs = [lengths_blob(map(len, bodies)), b"".join(bodies)]
        port: dict[str, Any] = {"queues": [self.full(queue)], **waits}
        if keys is not None:
            port["keys"] = True
            blobs.append(json.dumps(keys).encode())
        message = Message("put", {"producer": [self._producer, 1, self._seq + 1], "ports": [port], "source": None}, tuple(blobs))
        try:
            reply = self._put_when_there_is_room(queue, message)
        except BaseException:
            # Full, out of reach or interrupted: it may still be taken in. The number is spent, or the next value would count as this one.
            self._producer, self._seq = f"client:{secrets.token_hex(8)}", 0
            raise
        self.check(reply, queue)
        self._seq += 1
        return int(reply.fields.get("added", 0))

    def _put_when_there_is_room(self, queue: str, message: Message) -> Message:
        while True:
            try:
                return self.link.call(message)
            except Unavailable as error:
                full = self._how_full(queue)
                if self.is_patient and full is not None:
                    continue
                if not full:
                    raise
                raise QueueFull(f"queue {queue!r} stayed full for {self.link.timeout_s:g} s ({full}); the value may still go in: put it again "
                                "with the same key, or look why with python -m p2pcluster status") from error

    def _how_full(self, queue: str) -> str | None:
        """In words, "" where there is room; None when nobody answers."""
        try:
            status = self.link.call(Message("status", {}), min(self.link.timeout_s, SILENT_S)).fields["status"]
            found = [q for q in status["queues"] if q["name"] == queue and q["pipeline"] == self.pipeline]
            record = self.queue_record(queue)
        except ClusterError:
            return None
        if not found or record["maxsize"] is None:
            return ""
        (now,) = found
        count = now["ready"] + now["leased"] + now["delayed"]
        if count >= record["maxsize"]:
            return f"{count} items of at most {record['maxsize']}"
        return f"{now['bytes'] >> 20} MiB of at most {record['bytes_max'] >> 20}" if now["bytes"] >= record["bytes_max"] else ""

    def take(self, queue: str, limit: int | None = None, wait_s: float | None = None) -> Items:
        """Values of a queue, to be iterated inside a `with`: at most `limit`, until none came for `wait_s` (None: for ever).

        A value is acknowledged when the next is asked for, or at a normal end of the `with`; an exception gives it back.
        """
        if limit is not None and not is_number(limit):
            raise WrongUsage(f"limit={limit!r} is not a number of values: correct it or leave it out")
        return Items(self, queue, limit, _seconds("wait_s", wait_s))

    def results(self, stage: str) -> Iterator[Any]:
        """Every value that a last stage returned in this run, or the content of a queue, without taking it.

        Raises `UnknownName` for a stage that is not a last one: what waits before it is not what it returned.
        """
        names = {record["name"] for record in self.manifest["queues"]}
        queue = f"{stage}.results" if f"{stage}.results" in names else stage
        if queue == stage and any(record["name"] == stage for record in self.manifest["stages"]):
            kept = ", ".join(name for record in self.manifest["queues"] if record["results"] for name in record["fed_by"]) or "none"
            raise UnknownName(f"stage {stage!r} of pipeline {self.pipeline!r} keeps no results, as it is not a last stage that returns "
                              f"values; those that keep some: {kept}")
        full, after = self.full(queue), 0
        while True:
            message = self.check(self.link.call(Message("read", {"queue": full, "after": after, "count": TAKE_ITEMS_MAX * 10})), queue)
            if message.kind != "values":
                return
            for item_id, body in bodies_of(message):
                after = item_id
                yield self.value_of(queue, body)

    def value_of(self, queue: str, body: bytes) -> Any:
        """The value of an item's bytes. Raises `ValueRefused` for one that cannot be made in this program."""
        codec = "pickle" if body[:1] == b"\x80" else "json"  # JSON never begins so, and a queue of an older version is in no manifest
        try:
            return DECODERS[codec](body)
        except Exception as error:
            raise ValueRefused(f"a value of {queue!r} cannot be read here ({type(error).__name__}: {error}): do this where what its class "
                               "needs can be imported, as in the project's folder") from error

    # ---- the pipeline

    def start(self, params: Mapping[str, Any] | None = None) -> int:
        """Start the next run; returns its number. `params` go over those of the pipeline. Raises `ClusterError` while one is under way."""
        self._manifest = None  # a new version may have other params
        if params is not None and not isinstance(params, Mapping):
            raise WrongUsage(f"params={params!r} is not a dict: give values by name")
        merged = {**(self.manifest["params"] or {}), **(params or {})}
        reply = self._once(Message("start_run", {"pipeline": self.pipeline, "params": _checked_params(merged)}))
        if reply.fields.get("code") == "running":
            raise ClusterError(f"run {reply.fields['run']} of {self.pipeline!r} is under way: wait for it first")
        return int(self.check(reply, self.pipeline).fields["run"])

    def wait_for_rollout(self, version: str) -> int:
        """Until a version that was deployed over a run is on every node; returns on how many. Raises `RolledBack` when it did not start."""
        while True:
            project = self.project()
            rolled = project and project["rolled"]
            if project is None or project["rollout"] is None or project["version"] != version:
                break
            time.sleep(RETRY_S)
        if rolled is None or rolled["version"] != version:
            raise ClusterError(f"version {version[:8]} of {self.pipeline!r} is not rolled out any more, as somebody has deployed another one or "
                               "undeployed it meanwhile: look with python -m p2pcluster status")
        failure = rolled["failure"]
        if failure is not None:
            raise RolledBack(f"version {version[:8]} was rolled back, because {failure['stage']} on {failure['node']} {failure['text']}; the former "
                             "version runs on: correct it and deploy again")
        return int(rolled["nodes"])

    def undeploy(self, discard: bool = False) -> int:
        """End the pipeline: its processes, queues, runs and files go. Returns how many items went with it.

        Raises `ItemsRemain` while there are some, unless they are to be discarded; `UnknownName`.
        """
        if self.project() is None:
            raise UnknownName(f"cluster {self.link.options.cluster!r} has no pipeline {self.pipeline!r}: look with python -m p2pcluster status")
        reply = self._once(Message("undeploy", {"pipeline": self.pipeline, "discard": discard}))
        if reply.fields.get("code") == "items_remain":
            raise ItemsRemain(f"pipeline {self.pipeline!r} still has {reply.fields['open']} items in its queues and {reply.fields['parked']} parked: "
                              "let them be finished or take them, or drop them with undeploy --discard")
        fields = self.check(reply, self.pipeline).fields
        return int(fields.get("open", 0) + fields.get("parked", 0))

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the run that is under way is done. Raises `ItemsParked`; `Unavailable` when it is not done in time."""
        _seconds("timeout_s", timeout_s)
        project = self.project()
        run = max(1, int(project["run"])) if project is not None else 0
        message = Message("wait", {"pipeline": self.pipeline, "run": run})
        try:
            reply = self.check(self.link.call(message, timeout_s=1e9 if timeout_s is None else timeout_s), self.pipeline)
        except Unavailable as error:
            waited = "" if timeout_s is None else f" after {timeout_s:g} s"
            raise Unavailable(f"run {run} of {self.pipeline!r} is not known to be done{waited}: look why with python -m p2pcluster status",
                              definite=True) from error
        parked = reply.fields["parked"]
        if parked:
            raise ItemsParked(f"run {reply.fields['run']} of {self.pipeline!r} is done with {parked} parked: look with python -m p2pcluster parked list")

    def status(self) -> dict[str, Any]:
        """The object of `status --json`."""
        status: dict[str, Any] = self.link.call(Message("status", {})).fields["status"]
        return status

    def logs(self, stage: str | None = None, after: dict[str, Any] | None = None) -> Printed:
        """The last lines that a stage, or each of them, printed and logged on each machine; with the `after` of a former answer, what came
        since then."""
        message = Message("logs", {"pipeline": self._pipeline if stage is None else self.pipeline, "stage": self._stage_name(stage),
                                   "after": after or {}})
        reply = self.check(self.link.call(message), stage or "logs")
        return _printed(reply, after or {})

    def parked(self) -> list[dict[str, Any]]:
        """The parked items, with why, without their values."""
        found: list[dict[str, Any]] = []
        more = True
        while more:
            after = found[-1]["id"] if found else None
            reply = self.link.call(Message("parked", {"pipeline": self._pipeline, "after": after}))
            found += reply.fields["parked"]
            more = reply.fields["more"]
        return found

    def parked_value(self, queue: str, item_id: int) -> Any:
        """The value of one parked item."""
        reply = self.check(self.link.call(Message("value", {"queue": f"{self.pipeline}/{queue}", "id": item_id})), f"{queue}:{item_id}")
        ((_, body),) = bodies_of(reply)
        return self.value_of(queue, body)

    def retry(self, stage: str, ids: list[int] | None = None) -> int:
        """Give parked items of a stage (or queue) another set of deliveries; returns how many."""
        return self._on_parked("retry", self._queue_of(stage), ids)

    def discard(self, queue: str, ids: list[int] | None = None) -> int:
        """Drop parked items by id, or everything in a queue; returns how many. The only way in which items are lost."""
        return self._on_parked("discard", self._queue_of(queue), ids)

    def _once(self, message: Message) -> Message:
        """The reply to what happens once, however often a lost connection has it asked again."""
        return self.link.call(message._replace(fields={**message.fields, "once": secrets.token_hex(8)}))

    def _queue_of(self, name: str) -> str:
        for record in self.manifest["stages"]:
            if record["name"] == name and record["reads"]:
                return str(record["reads"])
        return name

    def _on_parked(self, kind: str, queue: str, ids: list[int] | None) -> int:
        if ids is not None and not all(is_number(item_id) for item_id in ids):
            raise WrongUsage(f"ids={ids!r} are not the numbers of items, which stand behind the colon in parked(): correct them or leave them out")
        reply = self._once(Message(kind, {"queue": f"{self.pipeline}/{queue}", "ids": ids}))
        if reply.fields.get("code") == "unknown_queue":
            self.queue_record(queue)  # which names those that there are; a queue of an older version is not among them and may be meant
        return int(self.check(reply, queue).fields.get("count", 0))

    def close(self, name: str) -> None:
        """End a source, or a queue that is fed from outside. Raises `UnknownName`, which names those that there are."""
        self._manifest = None
        names = [stage["name"] for stage in self.manifest["stages"] if stage["kind"] == "source"]
        names += [record["name"] for record in self.manifest["queues"] if record["outside"]]
        if name not in names:
            raise UnknownName(f"pipeline {self.pipeline!r} has no source and no queue fed from outside called {name!r}; it has {', '.join(names)}")
        self.check(self._once(Message("close", {"pipeline": self.pipeline, "name": name})), name)

    def pause(self, stage: str | None = None) -> None:
        """Give a stage, or all of them, no more items, and call no source of them; what is in hand is finished and processes stay.

        It holds until `resume`, over runs and versions, as long as there is the stage.
        """
        self._control(Message("pause", {"pipeline": self.pipeline, "stage": self._stage_name(stage), "reason": ""}))

    def resume(self, stage: str | None = None) -> list[str]:
        """Take back `pause(stage)`, or `pause()`. Returns which stages are paused nevertheless, each by a word of its own; "" is all of them."""
        reply = self._control(Message("resume", {"pipeline": self.pipeline, "stage": self._stage_name(stage)}))
        return list(reply.fields["left"])

    def scale(self, stage: str, processes: int | str | None) -> None:
        """Run so many processes of a stage, or "auto" for a share of the free slots, whatever its code says, over runs and versions.

        None takes that back.
        """
        if processes is not None and not is_process_count(processes):
            raise WrongUsage(f"{processes!r} processes of {stage}: give a number from 1 to {PROCESSES_MAX}, or auto; to run none, pause it")
        message = Message("scale", {"pipeline": self.pipeline, "stage": self._stage_name(stage), "processes": processes})
        if self._control(message).fields.get("code") == "source":
            raise WrongUsage(f"{stage} is a source, each process of which has a part of its own: say processes= in the code and deploy that")

    def _control(self, message: Message) -> Message:
        reply = self.link.call(message)
        return reply if reply.fields.get("code") == "source" else self.check(reply, message.fields["stage"] or self.pipeline)

    def _stage_name(self, name: str | None) -> str | None:
        """The name, if it is a stage's. Raises `UnknownName`, which names those that there are."""
        self._manifest = None  # another version may have come since it was asked for
        names = [str(stage["name"]) for stage in self.manifest["stages"]]
        if name is not None and name not in names:
            raise UnknownName(f"pipeline {self.pipeline!r} has no stage {name!r}; it has {', '.join(names)}")
        return name

    def leave(self) -> None:
        """Have the node that this is connected to go out of its cluster for good. Raises `ClusterError` with why it cannot."""
        reply = self.link.say_once(Message("leave", {}))  # asked again, another node might hear it
        if reply.fields["result"] == "refused":
            raise ClusterError(f"the node cannot leave: {reply.fields['text']}")

    def stop(self) -> None:
        """Stop the node that leads; what runs may finish."""
        self.link.call(Message("stop", {}))


def connect(pipeline: str | None = None, cluster: str | None = None, timeout_s: float = config.CONNECT_TIMEOUT_S, *,
            home: str | os.PathLike[str] | None = None, seed: str | None = None,
            authkey_file: str | os.PathLike[str] | None = None) -> Cluster:
    """Find a cluster and connect to it: by `seed` (HOST:PORT), else by what the node of this machine's `home` wrote.

    Each argument that is None is taken from P2PCLUSTER_... in the environment, then from the default. Raises `ClusterNotFound`,
    `AuthenticationFailed`, `HomeError`.
    """
    flags = {"cluster": cluster, "home": None if home is None else os.fspath(home), "seed": None if seed is None else [seed],
             "authkey_file": None if authkey_file is None else os.fspath(authkey_file)}
    return Cluster(Link(resolve_options(flags, os.environ, {}), _seconds("timeout_s", timeout_s) or 0.0), pipeline)


class Line(NamedTuple):
    """What a stage printed. `at` is UTC in ISO form; `item` an id, or "-"; `level` out, err, one of the logging module's, or note."""

    at: str
    node: str
    pipeline: str
    stage: str
    item: str
    level: str
    text: str


class Printed(NamedTuple):
    """An answer of `Cluster.logs`: lines in the order of their times, the machines that did not answer, and from where to go on."""

    lines: list[Line]
    away: list[str]
    after: dict[str, Any]


def _printed(reply: Message, before: dict[str, Any]) -> Printed:
    lines: list[Line] = []
    after = dict(before)
    blobs = iter(reply.blobs)
    for node in reply.fields["nodes"]:
        known = before.get(node["node"], {})
        known = known["stages"] if known.get("boot") == node["boot"] else {}
        seen = dict(known)
        for stage, first, count in node["stages"]:
            pipeline, _, name = stage.partition("/")
            found = list(loglines.read(bytes(next(blobs))))
            if stage in known and first > known[stage] and found:
                lost = f"{first - known[stage]} lines left out: they came faster than they were asked for"
                found.insert(0, loglines.LogLine(found[0].at, "-", "note", lost))
            lines += [Line(line.at, node["name"], pipeline, name, line.item, line.level, line.text) for line in found]
            seen[stage] = first + count
        if node["is_here"]:
            after[node["node"]] = {"boot": node["boot"], "stages": seen}
    lines.sort(key=lambda line: line.at)
    return Printed(lines, [node["name"] for node in reply.fields["nodes"] if not node["is_here"]], after)


def bodies_of(message: Message) -> Iterator[tuple[int, bytes]]:
    """The ids and bytes of the items in a grant."""
    for number, (lo, hi, _, _) in enumerate(message.fields["pieces"]):
        lengths, body = message.blobs[2 * number], bytes(message.blobs[2 * number + 1])
        start = 0
        for item_id, size in zip(range(lo, hi), lengths_of(lengths), strict=True):
            yield item_id, body[start : start + size]
            start += size


def _seconds(name: str, value: Any) -> float | None:
    """The value. Raises `WrongUsage` for what is no time."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _SECONDS_MAX:
        raise WrongUsage(f"{name}={value!r} is not seconds, 0 or more: correct it or leave it out")
    return float(value)


def _checked_params(params: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(params)
    except (TypeError, ValueError) as error:
        raise WrongUsage(f"params= must be plain JSON ({error}): give text, numbers, lists and dicts") from error
    return params


def _waits(delay_s: float | None, at: datetime | float | None) -> dict[str, int]:
    """What a put says of a wait. Raises `WrongUsage`."""
    if delay_s is not None and at is not None:
        raise WrongUsage("delay_s= and at= were both given: a value waits for a while or until a time, so leave one out")
    name, given = ("delay_s", delay_s) if at is None else ("at", at)
    if given is None:
        return {}
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise WrongUsage(f"at={given} has no time zone, so it is another moment on each machine: give one, as in datetime.now(UTC)")
        given = given.timestamp()
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < _SECONDS_MAX:
        kind = "seconds, 0 or more" if name == "delay_s" else "a datetime with a time zone or seconds since the epoch"
        raise WrongUsage(f"{name}={given!r} is not {kind}: correct it or leave it out")
    return {"delay_ms" if name == "delay_s" else "at_ms": math.ceil(1000 * given)}


def _batches(bodies: list[bytes]) -> Iterator[tuple[int, int]]:
    start = size = 0
    for at, body in enumerate(bodies):
        if at > start and (at - start >= PUT_ITEMS_MAX or size + len(body) > PUT_BYTES_MAX):
            yield start, at
            start, size = at, 0
        size += len(body)
    if start < len(bodies):
        yield start, len(bodies)
