"""Messages as somebody sends them who holds the key and means no good, or whose program is broken.

Decided here: what is tried. Each begins as a message that a node takes in, and is then changed in a few places, so that it gets
past the first check and meets the ones behind it. All comes from a seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from random import Random
from typing import Any

from p2pcluster.core import commands
from p2pcluster.core.codec import Message, decode, encode_bytes
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.graph import Pipeline, Queue
from p2pcluster.core.ranges import Fence
from p2pcluster.core.stages import source, stage
from p2pcluster.errors import LocalProtocolError

NAME = "victim"
DEEP_NESTING = (40, 300)  # within what JSON is read to, and beyond what code that calls itself for each level should go to


@stage
def Same(value: Any) -> Any:
    return value


def manifest(name: str = NAME) -> dict[str, Any]:
    """Of the pipeline that is attacked: one queue that is fed from outside, one stage, results."""
    return Pipeline(name, Queue("in") >> Same).manifest()


def deploying(name: str = NAME, version: str = "0" * 64) -> list[Message]:
    """What ships it and begins a run, without a project that could be run."""
    return [
        Message("bundle_part", {"version": version, "part": 0, "parts": 1}, (b"zip",)),
        Message("deploy", {"pipeline": name, "version": version, "origin": {"node": "n", "name": "host", "folder": "/f"},
                           "manifest": manifest(name), "files": {"pipeline.py": "0" * 64}, "zip_sha256": "0" * 64,
                           "project": {"module": "pipeline", "variable": "pipeline", "import_paths": ["."], "python": ">=3.11"}}),
        Message("start_run", {"pipeline": name, "params": {"a": 1}}),
    ]


def requests(name: str = NAME) -> list[Message]:
    """One well-formed message of each kind that a client may send, but for those that end the node."""
    port, queue = Port([f"{name}/in"], lengths_blob([1, 2]), b"122"), f"{name}/in"
    keyed = port._replace(keys=b'["k", null]')
    fields: dict[str, dict[str, Any]] = {
        "take": {"queue": queue, "count": 1},
        "read": {"queue": queue, "after": 0, "count": 10},
        "value": {"queue": queue, "id": 1},
        "retry": {"queue": queue, "ids": [1, 2]},
        "discard": {"queue": queue, "ids": [1]},
        "close": {"pipeline": name, "name": "in"},
        "pause": {"pipeline": name, "stage": "Same", "reason": ""},
        "resume": {"pipeline": name, "stage": None},
        "scale": {"pipeline": name, "stage": "Same", "processes": 2},
        "status": {},
        "parked": {"pipeline": name, "after": f"{queue}:1"},
        "project": {"pipeline": name},
        "wait": {"pipeline": name},
    }
    found = [
        *deploying(name),
        *(Message(kind, values) for kind, values in fields.items()),
        commands.put("client:a", 1, 1, [port]),
        commands.put("client:b", 1, 1, [keyed]),
        commands.put("client:c", 1, 1, [port], {"count": 2, "hash": "h", "finished": False}, b"cursor"),
        commands.put("client:d", 1, 1, [port._replace(delay_ms=50)]),
        commands.put("client:e", 1, 1, [keyed._replace(at_ms=2_000)], {"tick_ms": 1_000}),
        commands.done(queue, [(1, 3)], [Port([f"{name}/Same.results"], lengths_blob([1, 1, 1]), b"abc", lengths_blob([1, 2]))]),
        commands.done(queue, [(1, 3)], [], whole=True),
        commands.release(queue, [(1, 2)], Fence("n", "b", 1)),
    ]
    return [message._replace(fields={**message.fields, "req": 5}) for message in found]


@source
def Emit() -> Any:
    yield from ()


@source(every_s=0.5, missed="all", rate="9/m")
def Tick() -> Any:
    return 1


@stage
def Route(value: Any) -> Any:
    return value


def with_a_source(name: str) -> dict[str, Any]:
    """The manifest of a pipeline that makes its items itself, chooses between two ways, and ends with something to be done."""
    again = Same.named("Again", rate="5/s", max_items=9, parked_share_max=0.5)
    return Pipeline(name, Emit >> Route >> {"ok": Same, "bad": again}, Tick >> Same.named("Ticked"), on_done=lambda: None).manifest()


def from_executor(name: str = NAME) -> list[Message]:
    """One well-formed message of each kind that a machine says to its leader, but for those that end a node."""
    queue, fence = f"{name}/in", Fence("m", "boot-m", 1)
    port = Port([queue], lengths_blob([1, 2]), b"122")
    fields: dict[str, dict[str, Any]] = {
        "join": {"boot": "boot-m", "name": "host/m", "facts": {
            "cores": 2, "memory_gb": 7.5, "name": "host/m", "os": "linux", "python": "3.11.2", "tags": ["gpu"], "address": "127.0.0.1:1",
            "slots": 2}},
        "report": {"held": {queue: [[1, 3, 1], [4, 5, 2]]}, "sources": [f"source:{name}/1/Emit/0"], "ran_before": {"boot-l": {queue: [1]}}},
        "window": {"queues": {queue: 3}},
        "stats": {"running": {f"{name}/Same": 1}, "service_us": {f"{name}/Same": 3.5}, "troubles": {f"{name}/Same": "does not start"},
                  "trials": {name: {"rollout": 7, "old": 0, "ready": ["Same"], "failure": {"stage": "Same", "text": "does not start"}}},
                  "draining": False},
        "source_lost": {"pipeline": name, "stage": "Emit", "shard": 0},
        "alarm": {"key": f"{name}/Same", "text": "it raised"},
        "seen": {"runs": {name: 1}},
        "project": {"pipeline": name, "req": 3},
        "bundle_get": {"version": "0" * 64, "part": 0},
        "fail": {"queue": queue, "id": 1, "fence": list(fence), "error": {"type": "E", "text": "t", "traceback": None}, "delay_ms": 0,
                 "req": 4},
        "on_done_ran": {"pipeline": name, "run": 1, "req": 5},
    }
    commands_of_it = [commands.put(f"source:{name}/1/Emit/0", 1, 1, [port], {"count": 2, "hash": "h", "finished": False}),
                      commands.done(queue, [(1, 3)], [Port([f"{name}/Same.results"], lengths_blob([1, 1]), b"ab")]),
                      commands.release(queue, [(1, 2)], fence)]
    return [*(Message(kind, values) for kind, values in fields.items()), *deploying(name),
            *(message._replace(fields={**message.fields, "req": 6}) for message in commands_of_it)]


def between_nodes(node_id: str, to: str) -> list[Message]:
    """One well-formed message of each kind that one node says to another as such."""
    raft: dict[str, Any] = {"generation": 0, "term": 1, "sender": node_id, "to": to}
    data = b"bytes of a snapshot"
    slice_fields = {"snapshot_id": hashlib.sha256(data).hexdigest(), "offset": 0, "total": len(data)}
    snapshot = {"index": 9, "term": 1, "at_ms": 5, "configuration": {"voters": [to, node_id], "voters_old": [], "learners": []},
                "snapshot_id": slice_fields["snapshot_id"]}
    return [
        Message("hello", {"cluster_id": "c", "leader": node_id, "leader_address": "127.0.0.1:9", "term": 1}),
        Message("give_way", {"cluster": "d"}),
        Message("accepted", {"cluster": "c", "into": "d"}),
        Message("snapshot_slice", slice_fields, (data,)),
        Message("raft_pre_vote", {**raft, "term": 2, "last_index": 5, "last_term": 1}),
        Message("raft_pre_vote_reply", {**raft, "granted": True}),
        Message("raft_vote", {**raft, "term": 2, "last_index": 5, "last_term": 1, "transfer": False}),
        Message("raft_vote_reply", {**raft, "granted": True}),
        Message("raft_append", {**raft, "prev_index": 0, "prev_term": 0, "commit_index": 0, "sent_ms": 1, "entries": []}),
        Message("raft_append_reply", {**raft, "match_index": 0, "sent_ms": 1, "rejected_index": None, "hint_index": 0, "hint_term": 0}),
        Message("raft_snapshot", {**raft, "snapshot": snapshot, "sent_ms": 1}),
        Message("raft_snapshot_reply", {**raft, "match_index": 0, "sent_ms": 1}),
        Message("raft_timeout_now", raft),
    ]


FATAL = ("stop_all", "leave", "raft_append", "raft_snapshot")  # that two lead in one term stops a node, whatever the message's form


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**62, 2**63, -(2**63), 2**64, 10**300, 0.5, -0.0, 1e308, "", "0", "a", "victim", "victim/in", "in",
    "x/y/z", ":", "a:b", "victim/in:", "victim/in:-1", ":99999999999999999999", "\0", "a\0b", "\ud800", "\u202e\u0661", "../../x", "/",
    ".", "..",
    "source:victim/1/Same/0", "client:a", "x" * 3000, [], {}, [[]], [{}], [None], [0], [-1], ["a"], [[0, 1]], [[1, 2**62 - 1]], [[2, 1]],
    [[1, 2], [1, 2]], [["a", "b", 1]], {"a": 1}, {"": None}, {"victim/in": [1]}, {"queues": ["victim/in"]},
    nested(DEEP_NESTING[0]), nested(DEEP_NESTING[1]),
)
KINDS = ("stop_all", "assign", "forget", "member", "member_left", "session_end", "due", "fail", "on_done_ran", "reply", "grant", "values",
         "hello", "roll", "rolled_out", "roll_back", "forget_uploads", "revoke",
         "raft_append", "__init__", "command", "", "\0", "x" * 500)
BLOBS = (b"", b"\0", b"\xff" * 4, lengths_blob([1, 2]), lengths_blob([2**32 - 1] * 2), b"[" * 100_000, b"[null, 1]", b'["\\ud800", null]',
         b"nan",
         b"cos\nsystem\n(S'exit 1'\ntR.")


def mangled(message: Message, random: Random) -> Message:
    """The message with one to three changes, as it comes out of the wire at the other side."""
    kind, fields, blobs = message.kind, copy.deepcopy(message.fields), list(message.blobs)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        what = random.randrange(10)
        if what == 0:
            kind = random.choice(KINDS) if random.random() < 0.5 else random.choice(requests()).kind
        elif what <= 2 and blobs:
            _change_blob(blobs, random)
        elif what == 3:
            fields[random.choice(("req", "result", "queue", "x", ""))] = copy.deepcopy(random.choice(STRANGE))
        else:
            _change_field(fields, random)
    try:
        return decode(encode_bytes(Message(kind, fields, tuple(blobs))))
    except LocalProtocolError:
        return message


def _change_blob(blobs: list[Any], random: Random) -> None:
    at = random.randrange(len(blobs))
    what = random.randrange(4)
    if what == 0:
        del blobs[at]
    elif what == 1:
        blobs.insert(at, random.choice(BLOBS))
    elif what == 2:
        blobs[at] = random.choice(BLOBS)
    else:
        blobs[at] = bytes(blobs[at])[: random.randrange(len(blobs[at]) + 1)]


def _change_field(fields: dict[str, Any], random: Random) -> None:
    """Somewhere in the tree of the fields, mostly near the top."""
    holder: Any = fields
    while holder:
        key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.7:
            holder = holder[key]
            continue
        if random.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(random.choice(STRANGE))
        return


def text_of(message: Message) -> str:
    """For a test that has failed: the message that did it."""
    return json.dumps([message.kind, message.fields])[:2000] + f" blobs {[bytes(blob[:60]) for blob in message.blobs]}"
