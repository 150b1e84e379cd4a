"""The commands that change a cluster's state: what each is called and which fields it has.

An entry of the log is a sequence of commands, each a `codec.Message`. How a command changes the state is decided in `queues`;
who may propose it, and when, in `node`. A kind that is not listed here stops a node: it is never skipped, since nodes that skip
different commands hold different states.

Blobs of outputs: for each port `lengths` (u32, little endian, one per value), `body` (the values one after the other), and where
the port says so `counts` (u32 per input: how many of the values come from it) or `keys` (JSON list of str or null per value).
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from p2pcluster import config
from p2pcluster.core import options, pythons
from p2pcluster.core.codec import Buffer, Message, decode_all
from p2pcluster.core.ranges import Fence, Range
from p2pcluster.errors import RemoteProtocolError

NAME_CHARS_MAX = 200  # longer than any that `graph` and `bundle` make
NUMBER_END = 1 << 62  # what comes from others is below it, and so fits in a table whatever is added to it
NESTING_MAX = 100  # what one Python or one place of a program reads of JSON is too deep for others: none may get into the log
PROCESSES_MAX = 10_000  # of one stage: each is planned by itself
REASON_CHARS_MAX = 1000  # of a pause: it stands in a line for people

FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "put": {"producer": (list,), "ports": (list,), "source": (dict, type(None))},
    "done": {"queue": (str,), "ranges": (list,), "ports": (list,), "whole": (bool,)},
    "part": {"queue": (str,), "id": (int,), "fence": (list,), "part": (int,), "ports": (list,)},
    "take": {"queue": (str,), "ranges": (list,), "fence": (list,)},
    "release": {"queue": (str,), "ranges": (list,), "fence": (list,)},
    "fail": {"queue": (str,), "id": (int,), "fence": (list,), "error": (dict,), "delay_ms": (int,)},
    "due": {"queue": (str,), "ids": (list,)},
    "session_end": {"node": (str,), "boot": (str,), "ran": (dict, type(None)), "error": (dict,), "delay_ms": (int,)},
    "retry": {"queue": (str,), "ids": (list, type(None))},
    "discard": {"queue": (str,), "ids": (list, type(None))},
    "bundle_part": {"version": (str,), "part": (int,), "parts": (int,)},
    "deploy": {"pipeline": (str,), "version": (str,), "origin": (dict,), "manifest": (dict,), "files": (dict,),
               "zip_sha256": (str,), "project": (dict,)},
    "roll": {"pipeline": (str,), "rollout": (int,), "node": (str,)},
    "rolled_out": {"pipeline": (str,), "rollout": (int,)},
    "roll_back": {"pipeline": (str,), "rollout": (int,), "failure": (dict,)},
    "undeploy": {"pipeline": (str,), "discard": (bool,)},
    "forget_uploads": {"versions": (list,)},
    "start_run": {"pipeline": (str,), "params": (dict, list, str, int, float, bool, type(None))},
    "assign": {"pipeline": (str,), "stage": (str,), "shard": (int,), "node": (str,), "boot": (str,)},
    "close": {"pipeline": (str,), "name": (str,)},
    "pause": {"pipeline": (str,), "stage": (str, type(None)), "reason": (str,)},
    "resume": {"pipeline": (str,), "stage": (str, type(None))},
    "scale": {"pipeline": (str,), "stage": (str,), "processes": (int, str, type(None))},
    "on_done_ran": {"pipeline": (str,), "run": (int,)},
    "forget": {"producers": (list,)},
    "forget_keys": {"queue": (str,), "before_ms": (int,)},
    "member": {"node": (str,), "name": (str,), "facts": (dict,)},
    "member_left": {"node": (str,)},
    "accept": {"cluster": (str,)},
    "dissolve": {"into": (str,)},
}

ONCE_KINDS = ("retry", "discard", "start_run", "close", "undeploy")  # may have a token `once`, so that a client can say them again and they happen once
# `retries`: of a `fail`, how often an item is tried again that no stage of the project's reads. The last two: of a whole `done`.
OPTIONAL = ("once", "retries", "fences", "parts")
ONCE = "once:"  # what a token is remembered under, among the producers


class Port(NamedTuple):
    """The values that leave a stage at one port, for all of `queues`; buffers as in the module's text."""

    queues: Sequence[str]
    lengths: Buffer
    body: Buffer
    counts: Buffer | None = None
    keys: Buffer | None = None
    delay_ms: int | None = None  # of a put: how long its items wait at first,
    at_ms: int | None = None  # or until when, by the time of day


def lengths_of(buffer: Buffer) -> array[int]:
    """The u32 numbers of a `lengths` or `counts` blob. Raises `RemoteProtocolError` when it is no whole number of them."""
    if len(buffer) % 4:
        raise RemoteProtocolError("a blob of lengths is cut short")
    numbers = array("I")
    numbers.frombytes(buffer)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def lengths_blob(numbers: Iterable[int]) -> bytes:
    """The blob that `lengths_of` reads."""
    packed = array("I", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _ports(ports: Iterable[Port]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    fields = []
    blobs: list[Buffer] = []
    for port in ports:
        record: dict[str, Any] = {"queues": list(port.queues)}
        blobs += [port.lengths, port.body]
        if port.counts is not None:
            record["counts"] = True
            blobs.append(port.counts)
        if port.keys is not None:
            record["keys"] = True
            blobs.append(port.keys)
        if port.delay_ms is not None:
            record["delay_ms"] = port.delay_ms
        if port.at_ms is not None:
            record["at_ms"] = port.at_ms
        fields.append(record)
    return fields, blobs


def read_ports(fields: list[dict[str, Any]], blobs: Sequence[Buffer]) -> list[tuple[Port, int]]:
    """Each port with the number of its first blob. Raises `RemoteProtocolError` when the blobs do not fit the fields."""
    ports = []
    at = 0
    try:
        for record in fields:
            first = at
            lengths, body = blobs[at], blobs[at + 1]
            at += 2
            counts = keys = None
            if record.get("counts"):
                counts = blobs[at]
                at += 1
            if record.get("keys"):
                keys = blobs[at]
                at += 1
            ports.append((Port(record["queues"], lengths, body, counts, keys, record.get("delay_ms"), record.get("at_ms")), first))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise RemoteProtocolError("the ports of a message do not fit its blobs") from error
    return ports


def put(producer: str, epoch: int, seq: int, ports: Iterable[Port], source: dict[str, Any] | None = None,
        cursor: Buffer | None = None) -> Message:
    """Values from a producer. `source`: `count`, `hash`, `finished` of a source process, `cursor: true` with the last blob."""
    fields, blobs = _ports(ports)
    if cursor is not None:
        source = {**(source or {}), "cursor": True}
        blobs.append(cursor)
    return Message("put", {"producer": [producer, epoch, seq], "ports": fields, "source": source}, tuple(blobs))


def done(queue: str, ranges: Sequence[Range], ports: Iterable[Port], whole: bool = False, fences: Sequence[Fence] | None = None,
         parts: int = 0) -> Message:
    """The inputs `ranges` are finished with these outputs. `whole`: they cannot be told apart (a batch); then `fences` are those of the
    ranges, and `parts` went ahead, of the first input's."""
    fields, blobs = _ports(ports)
    found = Message("done", {"queue": queue, "ranges": [list(r) for r in ranges], "ports": fields, "whole": whole}, tuple(blobs))
    if fences is not None:
        found.fields["fences"] = [list(fence) for fence in fences]
    if parts:
        found.fields["parts"] = parts
    return found


def part(queue: str, item_id: int, fence: Fence, number: int, ports: Iterable[Port]) -> Message:
    """Some of what an item emits, ahead of its `done` and invisible until then. Numbered from 0, which begins anew."""
    fields, blobs = _ports(ports)
    return Message("part", {"queue": queue, "id": item_id, "fence": list(fence), "part": number, "ports": fields}, tuple(blobs))


def take(queue: str, ranges: Sequence[Range], fence: Fence) -> Message:
    """The session of `fence` leases `ranges`."""
    return Message("take", {"queue": queue, "ranges": [list(r) for r in ranges], "fence": list(fence)})


def release(queue: str, ranges: Sequence[Range], fence: Fence) -> Message:
    """What did not run goes back, no delivery counted."""
    return Message("release", {"queue": queue, "ranges": [list(r) for r in ranges], "fence": list(fence)})


def fail(queue: str, item_id: int, fence: Fence, error: dict[str, Any], delay_ms: int) -> Message:
    """One delivery failed. `delay_ms` is the proposer's choice (it holds the jitter); whether it is parked is apply's."""
    return Message("fail", {"queue": queue, "id": item_id, "fence": list(fence), "error": error, "delay_ms": delay_ms})


def session_end(node: str, boot: str, ran: dict[str, list[Any]] | None, error: dict[str, Any], delay_ms: int) -> Message:
    """A session is over: its leases go back, and the items in `ran` (by queue) count a delivery; of what ran in one process together,
    [lo, hi], none is parked for it. None: nobody can say what ran, so all
    count, but only an item that was leased alone can be parked for it."""
    return Message("session_end", {"node": node, "boot": boot, "ran": ran, "error": error, "delay_ms": delay_ms})


def decode_commands(body: Buffer) -> list[tuple[Message, int]]:
    """The commands of an entry, each with the offset in `body` at which its blobs begin.

    An unknown kind is an `AssertionError`: this node must not go on with a log that it does not understand.
    """
    commands = list(decode_all(body))
    for message, _ in commands:
        assert message.kind in FIELDS, f"unknown command kind {message.kind!r}: a newer version wrote this log; update this node"
    return commands


def check(message: Message) -> None:
    """The gateway for commands that come from elsewhere: what passes here, apply takes in without looking again.

    Raises `RemoteProtocolError` that names the field.
    """
    fields = FIELDS.get(message.kind)
    if fields is None:
        raise RemoteProtocolError(f"{message.kind!r} is not a command")
    for name, types in fields.items():
        value = message.fields.get(name, ...)
        wrong_bool = isinstance(value, bool) and bool not in types
        if value is ... or not isinstance(value, types) or wrong_bool:
            raise _wrong(message, name)
        if message.kind == "deploy" and name in ("pipeline", "version") and not is_name(value):
            raise _wrong(message, name)
        inside = _INSIDE.get(name) or _PLAIN.get(types)
        if inside is not None and not inside(value):
            raise _wrong(message, name)
    if "once" in message.fields and not (message.kind in ONCE_KINDS and is_token(message.fields["once"])):
        raise _wrong(message, "once")
    if "retries" in message.fields and not (message.kind == "fail" and is_number(message.fields["retries"])):
        raise _wrong(message, "retries")
    if message.kind != "bundle_part" and ("fences" in message.fields or "parts" in message.fields) and not _is_whole_done(message):
        raise _wrong(message, "fences")
    if message.kind in ("put", "done", "part"):
        _check_ports(message)
    elif len(message.blobs) != (1 if message.kind == "bundle_part" else 0):
        raise RemoteProtocolError(f"command {message.kind!r} has {len(message.blobs)} blobs")


def _is_whole_done(message: Message) -> bool:
    """A fence for each range, and the number of parts that went ahead."""
    fences, parts = message.fields.get("fences"), message.fields.get("parts", 1)
    if message.kind != "done" or not message.fields["whole"] or not isinstance(fences, list) or not is_number(parts) or not parts:
        return False
    return len(fences) == len(message.fields["ranges"]) and all(isinstance(fence, list) and is_fence(fence) for fence in fences)


def _wrong(message: Message, name: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"command {message.kind!r}: field {name!r} is missing or not what it must be")


def _check_ports(message: Message) -> None:
    ports = read_ports(message.fields["ports"], message.blobs)
    inputs = sum(hi - lo for lo, hi in message.fields["ranges"]) if message.kind == "done" else None
    for port, _ in ports:
        sizes = lengths_of(port.lengths)
        whole = sum(sizes) == len(port.body) and len(sizes) > 0
        counts = None if port.counts is None else lengths_of(port.counts)
        if counts is not None:
            whole = whole and inputs == len(counts) and sum(counts) == len(sizes)
        elif inputs is not None and not message.fields["whole"]:
            whole = whole and inputs == len(sizes)
        if port.keys is not None:
            whole = whole and message.kind == "put" and len(keys_of(port.keys)) == len(sizes)
        if port.delay_ms is not None or port.at_ms is not None:
            whole = whole and message.kind == "put" and (port.delay_ms is None or port.at_ms is None)
        if not whole:
            raise RemoteProtocolError(f"command {message.kind!r}: a port's blobs do not fit each other")
    used = sum(2 + (port.counts is not None) + (port.keys is not None) for port, _ in ports)
    cursor = bool(message.kind == "put" and message.fields["source"] and message.fields["source"].get("cursor"))
    if used + cursor != len(message.blobs):
        raise RemoteProtocolError(f"command {message.kind!r} has {len(message.blobs)} blobs and its ports take {used}")


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NUMBER_END


def is_token(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isalnum() and len(value) <= NAME_CHARS_MAX


def is_text(value: Any) -> bool:
    """Half of a surrogate pair can be written in JSON and in no table."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in value))


def _are_ranges(ranges: list[Any]) -> bool:
    """Apart from each other, in any order: an item that comes round again runs behind those with higher ids."""
    for pair in ranges:
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) and pair[0] < pair[1]):
            return False
    return bool(ranges) and all(before[1] <= after[0] for before, after in pairwise(sorted(ranges)))


def _are_ids(ids: list[Any] | None) -> bool:
    return ids is None or all(map(is_number, ids))


def have_run(told: Any) -> bool:
    """Ids of items, and [lo, hi] for those that ran together."""
    return isinstance(told, list) and all(is_number(one) or (
        isinstance(one, list) and len(one) == 2 and all(map(is_number, one)) and one[0] < one[1]) for one in told)


def _are_ports(ports: list[Any]) -> bool:
    return all(
        isinstance(port, dict) and set(port) <= {"queues", "counts", "keys", "delay_ms", "at_ms"} and isinstance(port.get("queues"), list)
        and port["queues"] and all(isinstance(name, str) for name in port["queues"])
        and is_number(port.get("delay_ms", 0)) and is_number(port.get("at_ms", 0)) for port in ports
    )


def _is_source(source: dict[str, Any] | None) -> bool:
    kinds = {"count": is_number, "hash": is_text, "finished": is_flag, "cursor": is_flag, "tick_ms": is_number}
    return source is None or all(name in kinds and kinds[name](value) for name, value in source.items())


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def are_parts(count: Any) -> bool:
    """Of a bundle."""
    return is_number(count) and 0 < count <= config.BUNDLE_BYTES_MAX // config.BUNDLE_PART_BYTES


def is_fence(fence: list[Any]) -> bool:
    return len(fence) == 3 and is_text(fence[0]) and is_text(fence[1]) and is_number(fence[2])


def is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether apply and the leader find what they look for; that the graph is sound is the graph check's word."""
    try:
        stages, queues = manifest["stages"], manifest["queues"]
        if not all(check(stage[name]) for stage in stages for name, check in _STAGE.items()):
            return False
        if not all(check(queue[name]) for queue in queues for name, check in _QUEUE.items()):
            return False
        if any(stage["kind"] == "source" and stage["processes"] == "auto" for stage in stages) or not is_shallow(manifest):
            return False
        names = {name for stage in stages for port in stage["ports"] for name in port["queues"]}
        names |= {stage["reads"] for stage in stages if stage["reads"] is not None}
        return names <= {queue["name"] for queue in queues} and all(
            len(edge) == 2 and all(map(is_name, edge)) for edge in manifest["back_edges"]) and isinstance(manifest["on_done"], bool)
    except (KeyError, TypeError):
        return False


def is_shallow(value: Any) -> bool:
    """Whether a value of any form is nested so little that every node can read it."""
    level = [value]
    for _ in range(NESTING_MAX):
        level = [part for one in level if isinstance(one, dict | list) for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return True
    return False


def is_name(value: Any) -> bool:
    """Of a pipeline, a stage or a queue. A pipeline's, and a version, are folders too."""
    is_usable = isinstance(value, str) and value.isprintable() and "/" not in value and value not in (".", "..")
    return is_usable and 0 < len(value) <= NAME_CHARS_MAX


def is_process_count(value: Any) -> bool:
    return value == "auto" or (is_number(value) and 0 < value <= PROCESSES_MAX)


def is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < NUMBER_END


_STAGE: dict[str, Callable[[Any], bool]] = {
    "name": is_name,
    "reads": lambda queue: queue is None or is_name(queue),
    "ports": lambda ports: all(isinstance(port["queues"], list) for port in ports),
    "where": lambda where: where is None or is_text(where),
    "kind": lambda kind: kind in ("source", "stage", "sink"),
    "processes": lambda count: is_process_count(count),
    "per_node": lambda count: count is None or is_number(count),
    "retries": is_number,
    "backoff_s": is_amount,
    "timeout_s": lambda timeout_s: timeout_s is None or is_amount(timeout_s),
    "sharded": is_flag,
    "batch": lambda count: count is None or (is_number(count) and count > 0),
    "batch_wait_s": is_amount,
    "concurrency": lambda count: is_number(count) and 0 < count <= PROCESSES_MAX,
    "shape": is_text,
    "rate": lambda rate: rate is None or options.is_rate(rate),
    "every_s": lambda every_s: every_s is None or is_amount(every_s),
    "max_items": lambda count: count is None or (is_number(count) and count > 0),
    "parked_share_max": lambda share: share is None or (is_amount(share) and share < 1),
    "missed": lambda missed: missed in ("skip", "all"),
}
_QUEUE: dict[str, Callable[[Any], bool]] = {
    "name": is_name,
    "maxsize": lambda count: count is None or is_number(count),
    "bytes_max": lambda size: size is None or is_number(size),
    "read_by": lambda stage: stage is None or is_text(stage),
    "results": is_flag,
    "outside": is_flag,
}


_INSIDE: dict[str, Callable[[Any], bool]] = {
    "producer": lambda p: len(p) == 3 and is_text(p[0]) and not p[0].startswith(ONCE) and is_number(p[1]) and is_number(p[2]),
    "stage": lambda stage: stage is None or is_text(stage),
    "reason": lambda reason: is_text(reason) and reason.isprintable() and len(reason) <= REASON_CHARS_MAX,
    "processes": lambda count: count is None or is_process_count(count),
    "fence": is_fence,
    "ranges": _are_ranges,
    "ids": _are_ids,
    "parts": are_parts,
    "ports": _are_ports,
    "source": _is_source,
    "manifest": is_manifest,
    "project": lambda project: is_shallow(project) and ("python" not in project or pythons.is_requirement(project["python"])),
    "origin": is_shallow,
    "files": is_shallow,
    "params": is_shallow,
    "error": is_shallow,
    "failure": is_shallow,
    "versions": lambda versions: all(map(is_text, versions)),
    "ran": lambda ran: ran is None or all(have_run(told) for told in ran.values()),
    "producers": lambda keys: all(isinstance(key, str) for key in keys),
}
_PLAIN: dict[tuple[type, ...], Callable[[Any], bool]] = {(int,): is_number, (str,): is_text}


def keys_of(blob: Buffer) -> list[str | None]:
    """The keys of a `keys` blob. Raises `RemoteProtocolError`."""
    try:
        keys = json.loads(bytes(blob))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError("a blob of keys is not JSON") from error
    if not isinstance(keys, list) or not all(key is None or isinstance(key, str) for key in keys):
        raise RemoteProtocolError("a blob of keys is not a list of str or null")
    return keys
