"""Every message that is spoken, with who says it and which fields it has: the registry that `PROTOCOL.md` is compared with.

Three links: a client and a node; the leader and a machine's executor (`member`); a node and its stage processes. The commands among
the messages are `commands.FIELDS`'s; what all of them mean is decided where they are handled.
"""

from __future__ import annotations

from typing import NamedTuple

from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.errors import RemoteProtocolError

VERSION = 1
NUMBER_END = 1 << 62  # what comes from others is below it, and so fits in a table whatever is added to it
_SLICES = frozenset({"snapshot_slice", "bundle_slice"})  # which carry one blob

Types = tuple[type, ...]
_NUMBER: Types = (int,)
_TEXT: Types = (str,)
_TEXT_OR_NONE: Types = (str, type(None))


class Spec(NamedTuple):
    """`sender` says it on this link; `fields` must be there with one of these types."""

    sender: str
    fields: dict[str, Types]


def _commands(sender: str, *kinds: str) -> dict[str, Spec]:
    return {kind: Spec(sender, commands.FIELDS[kind]) for kind in kinds}


CLIENT: dict[str, Spec] = {
    **_commands("client", "put", "done", "release", "retry", "discard", "bundle_part", "deploy", "start_run", "close"),
    "take": Spec("client", {"queue": _TEXT, "count": _NUMBER}),
    "read": Spec("client", {"queue": _TEXT, "after": _NUMBER, "count": _NUMBER}),
    "value": Spec("client", {"queue": _TEXT, "id": _NUMBER}),
    "status": Spec("client", {}),
    "parked": Spec("client", {"pipeline": _TEXT_OR_NONE, "after": _TEXT_OR_NONE}),
    "project": Spec("client", {"pipeline": _TEXT}),
    "wait": Spec("client", {"pipeline": _TEXT}),
    "stop": Spec("client", {}),
    "leave": Spec("client", {}),
    "members": Spec("node", {"addresses": (list,)}),
    "reply": Spec("node", {"req": _NUMBER, "kind": _TEXT, "result": _TEXT}),
    "grant": Spec("node", {"req": _NUMBER, "queue": _TEXT, "fence": (list,), "deliveries": (dict,), "pieces": (list,)}),
    "values": Spec("node", {"req": _NUMBER, "queue": _TEXT, "fence": (list,), "deliveries": (dict,), "pieces": (list,)}),
}

MEMBER: dict[str, Spec] = {
    **_commands("executor", "put", "done", "fail", "release", "on_done_ran", "bundle_part", "deploy", "start_run"),
    "hello": Spec("node", {"cluster_id": _TEXT_OR_NONE, "leader": _TEXT_OR_NONE, "leader_address": _TEXT_OR_NONE, "term": _NUMBER}),
    "give_way": Spec("node", {"cluster": _TEXT}),
    "accepted": Spec("node", {"cluster": _TEXT, "into": _TEXT}),
    "snapshot_slice": Spec("node", {"snapshot_id": _TEXT, "offset": _NUMBER, "total": _NUMBER}),
    "join": Spec("executor", {"boot": _TEXT, "name": _TEXT, "facts": (dict,)}),
    "report": Spec("executor", {"held": (dict,), "sources": (list,), "ran_before": (dict,)}),
    "window": Spec("executor", {"queues": (dict,)}),
    "stats": Spec("executor", {"running": (dict,), "service_us": (dict,), "troubles": (dict,), "draining": (bool,)}),
    "source_lost": Spec("executor", {"pipeline": _TEXT, "stage": _TEXT, "shard": _NUMBER}),
    "alarm": Spec("executor", {"key": _TEXT, "text": _TEXT}),
    "seen": Spec("executor", {"runs": (dict,)}),
    "leave": Spec("executor", {}),
    "left": Spec("leader", {}),
    "stop_all": Spec("executor", {}),
    "project": Spec("executor", {"pipeline": _TEXT}),
    "bundle_get": Spec("executor", {"version": _TEXT, "part": _NUMBER}),
    "bundle_slice": Spec("leader", {"version": _TEXT, "part": _NUMBER, "parts": _NUMBER}),
    "reported": Spec("leader", {}),
    "stop": Spec("leader", {}),
    "plan": Spec("leader", {"pipelines": (dict,), "processes": (dict,)}),
    "grant": Spec("leader", {"queue": _TEXT, "fence": (list,), "deliveries": (dict,), "pieces": (list,)}),
    "assigned": Spec("leader", {"pipeline": _TEXT, "stage": _TEXT, "shard": _NUMBER, "producer": _TEXT, "epoch": _NUMBER, "seq": _NUMBER,
                                "count": _NUMBER, "hash": _TEXT}),
    "reply": Spec("leader", {"req": _NUMBER, "kind": _TEXT, "result": _TEXT}),
}

PROCESS: dict[str, Spec] = {
    "setup": Spec("node", {"folder": _TEXT, "project": (dict,), "run": _NUMBER, "stage": _TEXT, "role": _TEXT, "node": _TEXT,
                           "out_dir": _TEXT, "hash_seed": _NUMBER, "queue": _TEXT}),
    "begin": Spec("node", {"producer": _TEXT, "epoch": _NUMBER, "seq": _NUMBER, "count": _NUMBER, "hash": _TEXT, "shard": _NUMBER}),
    "work": Spec("node", {"work": _NUMBER, "queue": _TEXT, "deliveries": (dict,), "slices": (list,)}),
    "recall": Spec("node", {"work": _NUMBER}),
    "ack": Spec("node", {"seq": _NUMBER}),
    "stop": Spec("node", {}),
    "ready": Spec("process", {}),
    "done": Spec("process", {"work": _NUMBER, "count": _NUMBER, "elapsed_us": (int, float), "ports": (list,)}),
    "failed": Spec("process", {"work": _NUMBER, "elapsed_us": (int, float), "error": (dict,)}),
    "returned": Spec("process", {"work": _NUMBER, "kept": _NUMBER}),
    "put": Spec("process", {"seq": _NUMBER, "ports": (list,), "source": (dict,)}),
    "changed": Spec("process", {}),
    "shorter": Spec("process", {}),
    "error": Spec("process", {"error": (dict,)}),
    "finished": Spec("process", {}),
    "progress": Spec("process", {"fraction": (int, float), "text": _TEXT, "total": (int, float, type(None))}),
}

LINKS = {"client": CLIENT, "member": MEMBER, "process": PROCESS}


def check(link: str, sender: str, message: Message) -> None:
    """Raise `RemoteProtocolError` unless `sender` may say this on that link, with these fields."""
    spec = LINKS[link].get(message.kind)
    if spec is None or spec.sender != sender:
        raise RemoteProtocolError(f"a {sender} does not send {message.kind!r}")
    for name, types in spec.fields.items():
        value = message.fields.get(name, ...)
        if value is ... or not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise RemoteProtocolError(f"message {message.kind!r}: field {name!r} is missing or not what it must be")
        if type(value) is int and link != "process" and not 0 <= value < NUMBER_END:
            raise RemoteProtocolError(f"message {message.kind!r}: field {name!r} is out of range")
    if len(message.blobs) != 1 and message.kind in _SLICES:
        raise RemoteProtocolError(f"message {message.kind!r} has {len(message.blobs)} blobs")
    request = message.fields.get("req", None if link == "client" else 0)  # each of a client's messages is answered
    if not isinstance(request, int) or isinstance(request, bool):
        raise RemoteProtocolError(f"message {message.kind!r}: field 'req' is not a number")
