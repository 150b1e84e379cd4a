"""Every message that is spoken, with who says it and which fields it has: the registry that `PROTOCOL.md` is compared with.

Three links: a client and a node; the leader and a machine's executor (`member`); a node and its stage processes. The commands among
the messages are `commands.FIELDS`'s; what all of them mean is decided where they are handled.

Between members the gateway looks inside the fields too (`_INSIDE`): whoever holds the key may run another version, or be broken, and
what passes here is used by the loop without another look. It costs by the message and by the range, never by the item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from p2pcluster import config
from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import NUMBER_END, is_amount, is_fence, is_flag, is_manifest, is_name, is_number, is_process_count, is_shallow, is_text
from p2pcluster.errors import RemoteProtocolError

VERSION = 2  # since 2 a put may wait, a source ticks, and people pause and scale: a node of 1 would make another state of the same log
LABEL_CHARS_MAX = 100  # of an id, a node's name or an address
FACTS_MAX = 100  # of one node
FACT_SIZE_MAX = 1000  # characters of a text, or members of a list

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
    **_commands("client", "put", "done", "fail", "release", "retry", "discard", "bundle_part", "deploy", "undeploy", "start_run", "close",
                "pause", "resume", "scale"),
    "take": Spec("client", {"queue": _TEXT, "count": _NUMBER}),
    "read": Spec("client", {"queue": _TEXT, "after": _NUMBER, "count": _NUMBER}),
    "value": Spec("client", {"queue": _TEXT, "id": _NUMBER}),
    "status": Spec("client", {}),
    "logs": Spec("client", {"pipeline": _TEXT_OR_NONE, "stage": _TEXT_OR_NONE, "after": (dict,)}),
    "parked": Spec("client", {"pipeline": _TEXT_OR_NONE, "after": _TEXT_OR_NONE}),
    "project": Spec("client", {"pipeline": _TEXT}),
    "wait": Spec("client", {"pipeline": _TEXT}),
    "stop": Spec("client", {}),
    "leave": Spec("client", {}),
    "bundle_get": Spec("client", {"version": _TEXT, "part": _NUMBER}),
    "bundle_slice": Spec("node", {"req": _NUMBER, "version": _TEXT, "part": _NUMBER, "parts": _NUMBER}),
    "members": Spec("node", {"addresses": (list,)}),
    "reply": Spec("node", {"req": _NUMBER, "kind": _TEXT, "result": _TEXT}),
    "grant": Spec("node", {"req": _NUMBER, "queue": _TEXT, "fence": (list,), "deliveries": (dict,), "pieces": (list,)}),
    "values": Spec("node", {"req": _NUMBER, "queue": _TEXT, "fence": (list,), "deliveries": (dict,), "pieces": (list,)}),
}

MEMBER: dict[str, Spec] = {
    **_commands("executor", "put", "done", "part", "fail", "release", "on_done_ran", "bundle_part", "deploy", "start_run"),
    "hello": Spec("node", {"cluster_id": _TEXT_OR_NONE, "leader": _TEXT_OR_NONE, "leader_address": _TEXT_OR_NONE, "term": _NUMBER}),
    "give_way": Spec("node", {"cluster": _TEXT}),
    "accepted": Spec("node", {"cluster": _TEXT, "into": _TEXT}),
    "snapshot_slice": Spec("node", {"snapshot_id": _TEXT, "offset": _NUMBER, "total": _NUMBER}),
    "join": Spec("executor", {"boot": _TEXT, "name": _TEXT, "facts": (dict,)}),
    "report": Spec("executor", {"held": (dict,), "sources": (list,), "ran_before": (dict,)}),
    "window": Spec("executor", {"queues": (dict,)}),
    "stats": Spec("executor", {"running": (dict,), "service_us": (dict,), "troubles": (dict,), "trials": (dict,), "draining": (bool,)}),
    "source_lost": Spec("executor", {"pipeline": _TEXT, "stage": _TEXT, "shard": _NUMBER}),
    "alarm": Spec("executor", {"key": _TEXT, "text": _TEXT}),
    "seen": Spec("executor", {"runs": (dict,)}),
    "leave": Spec("executor", {}),
    "left": Spec("leader", {}),
    "stop_all": Spec("executor", {}),
    "log_lines": Spec("executor", {"ask": _NUMBER, "boot": _TEXT, "stages": (list,)}),
    "logs": Spec("leader", {"ask": _NUMBER, "pipeline": _TEXT_OR_NONE, "stage": _TEXT_OR_NONE, "after": (dict,), "bytes_max": _NUMBER}),
    "project": Spec("executor", {"pipeline": _TEXT}),
    "bundle_get": Spec("executor", {"version": _TEXT, "part": _NUMBER}),
    "bundle_slice": Spec("leader", {"version": _TEXT, "part": _NUMBER, "parts": _NUMBER}),
    "reported": Spec("leader", {}),
    "stop": Spec("leader", {}),
    "alarms": Spec("leader", {"texts": (list,)}),
    "plan": Spec("leader", {"pipelines": (dict,), "processes": (dict,)}),
    "grant": Spec("leader", {"queue": _TEXT, "version": _TEXT, "fence": (list,), "deliveries": (dict,), "pieces": (list,)}),
    "revoke": Spec("leader", {"pipeline": _TEXT, "stage": _TEXT, "shard": _NUMBER}),
    "assigned": Spec("leader", {"pipeline": _TEXT, "stage": _TEXT, "shard": _NUMBER, "producer": _TEXT, "epoch": _NUMBER, "seq": _NUMBER,
                                "count": _NUMBER, "hash": _TEXT}),
    "tick": Spec("leader", {"pipeline": _TEXT, "stage": _TEXT, "shard": _NUMBER, "epoch": _NUMBER, "seq": _NUMBER, "at_ms": _NUMBER}),
    "reply": Spec("leader", {"req": _NUMBER, "kind": _TEXT, "result": _TEXT}),
}

PROCESS: dict[str, Spec] = {
    "setup": Spec("node", {"folder": _TEXT, "project": (dict,), "run": _NUMBER, "stage": _TEXT, "role": _TEXT, "node": _TEXT,
                           "out_dir": _TEXT, "hash_seed": _NUMBER, "queue": _TEXT}),
    "begin": Spec("node", {"producer": _TEXT, "epoch": _NUMBER, "seq": _NUMBER, "count": _NUMBER, "hash": _TEXT, "shard": _NUMBER}),
    "tick": Spec("node", {"seq": _NUMBER, "at_ms": _NUMBER}),
    "work": Spec("node", {"work": _NUMBER, "queue": _TEXT, "deliveries": (dict,), "slices": (list,)}),
    "recall": Spec("node", {"work": _NUMBER}),
    "ack": Spec("node", {"seq": _NUMBER}),
    "part_ack": Spec("node", {"item": _NUMBER, "part": _NUMBER, "is_kept": (bool,)}),
    "pause": Spec("node", {}),
    "resume": Spec("node", {}),
    "stop": Spec("node", {}),
    "ready": Spec("process", {}),
    "done": Spec("process", {"work": _NUMBER, "count": _NUMBER, "elapsed_us": (int, float), "ports": (list,)}),
    "part": Spec("process", {"work": _NUMBER, "part": _NUMBER, "ports": (list,)}),
    "lost": Spec("process", {"work": _NUMBER, "count": _NUMBER}),
    "divided": Spec("process", {"work": _NUMBER}),
    "failed": Spec("process", {"work": _NUMBER, "elapsed_us": (int, float), "error": (dict,)}),
    "returned": Spec("process", {"work": _NUMBER, "kept": _NUMBER}),
    "put": Spec("process", {"seq": _NUMBER, "ports": (list,), "source": (dict,)}),
    "changed": Spec("process", {}),
    "shorter": Spec("process", {}),
    "error": Spec("process", {"error": (dict,)}),
    "spent": Spec("process", {}),
    "finished": Spec("process", {}),
    "progress": Spec("process", {"fraction": (int, float), "text": _TEXT, "total": (int, float, type(None))}),
}

LINKS = {"client": CLIENT, "member": MEMBER, "process": PROCESS}


def check(link: str, sender: str, message: Message) -> None:
    """Raise `RemoteProtocolError` unless `sender` may say this on that link, with these fields."""
    spec = LINKS[link].get(message.kind)
    if spec is None or spec.sender != sender:
        raise RemoteProtocolError(f"{'an' if sender[0] == 'e' else 'a'} {sender} does not send {message.kind!r:.50}")
    for name, types in spec.fields.items():
        value = message.fields.get(name, ...)
        if value is ... or not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise RemoteProtocolError(f"message {message.kind!r}: field {name!r} is missing or not what it must be")
        if type(value) is int and link != "process" and not 0 <= value < NUMBER_END:
            raise RemoteProtocolError(f"message {message.kind!r}: field {name!r} is out of range")
    request = message.fields.get("req", None if link == "client" else 0)  # each of a client's messages is answered
    if not isinstance(request, int) or isinstance(request, bool):
        raise RemoteProtocolError(f"message {message.kind!r}: field 'req' is not a number")
    if link == "member":
        _check_inside(message)
    elif link == "client":
        _check_fields(message, _INSIDE_CLIENT)


def _check_fields(message: Message, inside: dict[str, dict[str, Check]]) -> None:
    for name, is_right in inside.get(message.kind, {}).items():
        if not is_right(message.fields[name]):
            raise RemoteProtocolError(f"message {message.kind!r}: field {name!r} does not hold what it must")


def _check_inside(message: Message) -> None:
    _check_fields(message, _INSIDE)
    fits = _WHOLE.get(message.kind)
    if fits is not None and not fits(message):
        raise RemoteProtocolError(f"message {message.kind!r}: its fields and its {len(message.blobs)} blobs do not fit each other")


# ---- inside the fields of what members say

Check = Callable[[Any], bool]


def _or_none(is_right: Check) -> Check:
    return lambda value: value is None or is_right(value)


def _list(is_right: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _map(is_key: Check, is_right: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(is_key, value)) and all(map(is_right, value.values()))


def _record(**checks: Check) -> Check:
    """An object that has at least these fields."""
    return lambda value: isinstance(value, dict) and all(name in value and is_right(value[name]) for name, is_right in checks.items())


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and is_shallow(value)


def _is_words(value: Any) -> bool:
    """For people. What an exception says may be text that no table takes in."""
    return isinstance(value, str)


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LABEL_CHARS_MAX and value.isprintable()


def _is_count(value: Any) -> bool:
    """Of processes."""
    return is_number(value) and value <= commands.PROCESSES_MAX


def _is_held(held: Any) -> bool:
    return isinstance(held, list) and len(held) == 3 and all(map(is_number, held)) and held[0] < held[1]


def _is_piece(piece: Any) -> bool:
    if type(piece) is not list or len(piece) != 4:
        return False
    lo, hi, run, keys = piece
    are_numbers = type(lo) is type(hi) is type(run) is int and 0 <= lo < hi < NUMBER_END and 0 <= run < NUMBER_END
    return are_numbers and (keys is None or (type(keys) is list and len(keys) == hi - lo))


def _is_item_id(name: Any) -> bool:
    """As the name of a field, which JSON makes of the number."""
    return isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 20


def _is_read_up_to(after: Any) -> bool:
    """Up to where the lines of a node are known: of which start of it, and the number of the next line of each stage."""
    return isinstance(after, dict) and (not after or (is_text(after.get("boot")) and _map(is_text, is_number)(after.get("stages"))))


def _is_stretch_of_lines(stretch: Any) -> bool:
    return isinstance(stretch, list) and len(stretch) == 3 and is_text(stretch[0]) and all(map(is_number, stretch[1:]))


def _is_fact(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= FACT_SIZE_MAX and all(isinstance(text, str) and len(text) <= FACT_SIZE_MAX for text in value)
    if isinstance(value, str):
        return len(value) <= FACT_SIZE_MAX
    return value is None or isinstance(value, bool) or is_amount(value)


def _are_facts(facts: dict[str, Any]) -> bool:
    """Flat, so that whatever a rule makes of them is bounded too; `slots` is what the plan counts with."""
    is_flat = len(facts) <= FACTS_MAX and all(map(_is_label, facts)) and all(map(_is_fact, facts.values()))
    return is_flat and is_number(facts.get("slots", 1)) and facts.get("slots", 1) <= config.SLOTS_MAX


_FAILURE = _record(node=_is_words, stage=_is_words, text=_is_words)
_is_rolled = _record(version=is_name, nodes=is_number, failure=_or_none(_FAILURE))
_TRIAL = _record(rollout=is_number, old=is_number, ready=_list(is_text), failure=_or_none(_record(stage=is_text, text=_is_words)))
_PLANNED = _record(
    version=is_name, rollout=_or_none(is_number), rolled=_or_none(_is_rolled), run=is_number,
    state=lambda state: state in ("new", "running", "done"), manifest=is_manifest, project=_is_dict,
    params=is_shallow, on_done_run=is_number, zip_sha256=is_text, runs_on_done=is_flag, is_over=is_flag, seconds=_or_none(is_amount),
    parked=is_number, paused=_map(is_text, is_text), scaled=_map(is_text, is_process_count),
)
_DEPLOYED = _record(
    version=is_text, origin=_is_dict, files=_map(is_text, is_text), run=is_number, state=is_text, project=_is_dict,
    rolled=_or_none(_is_rolled), rollout=_or_none(is_number),
)


def _is_planned(pipeline: Any) -> bool:
    return _PLANNED(pipeline) and (pipeline["seconds"] is not None or pipeline["state"] != "done")


_INSIDE_CLIENT: dict[str, dict[str, Check]] = {  # what commands hold is looked at when they are proposed
    "logs": {"after": lambda after: _map(_is_label, _is_read_up_to)(after)},
}

_INSIDE: dict[str, dict[str, Check]] = {
    "hello": {"cluster_id": _or_none(_is_label), "leader": _or_none(_is_label), "leader_address": _or_none(_is_label)},
    "give_way": {"cluster": _is_label},
    "accepted": {"cluster": _is_label, "into": _is_label},
    "join": {"boot": _is_label, "name": _is_label, "facts": _are_facts},
    "report": {"held": _map(is_text, _list(_is_held)), "sources": _list(is_text),
               "ran_before": _map(_is_label, _map(is_text, commands.have_run))},
    "logs": {"after": _is_read_up_to},
    "log_lines": {"stages": _list(_is_stretch_of_lines)},
    "window": {"queues": _map(is_text, is_number)},
    "stats": {"running": _map(is_text, is_number), "service_us": _map(is_text, is_amount), "troubles": _map(is_text, _is_words),
              "trials": _map(is_text, _TRIAL)},
    "seen": {"runs": _map(is_text, is_number)},
    "alarm": {"key": is_text},
    "alarms": {"texts": _list(_is_words)},
    "bundle_slice": {"parts": commands.are_parts},
    "plan": {"pipelines": _map(is_name, _is_planned), "processes": _map(is_text, _is_count)},
    "grant": {"fence": is_fence, "deliveries": _map(_is_item_id, is_number), "pieces": _list(_is_piece)},
    "assigned": {"stage": is_name, "producer": is_text, "hash": is_text},
}

_REPLIES: dict[tuple[str, str], dict[str, Check]] = {  # by kind and result, or what it is refused for
    ("put", "ok"): {"seq": is_number},
    ("put", "already"): {"seq": is_number},
    ("put", "sequence"): {"seq": is_number},
    ("project", "ok"): {"project": _or_none(_DEPLOYED)},
    ("deploy", "ok"): {"run": is_number, "state": is_text, "rollout": _or_none(is_number)},
    ("start_run", "ok"): {"run": is_number},
    ("start_run", "running"): {"run": is_number},
}


def _is_whole_reply(message: Message) -> bool:
    fields = message.fields
    result, code = fields["result"], fields.get("code", "")
    if not isinstance(code, str):
        return False
    return _record(**_REPLIES.get((fields["kind"], code if result == "refused" else result), {}))(fields)


def _is_whole_grant(message: Message) -> bool:
    """Two blobs for each piece, the first with a length for each item."""
    pieces, blobs = message.fields["pieces"], message.blobs
    return len(blobs) == 2 * len(pieces) and all(
        len(lengths) == 4 * (hi - lo) for (lo, hi, _, _), lengths in zip(pieces, blobs[::2], strict=True))


_WHOLE: dict[str, Callable[[Message], bool]] = {
    "snapshot_slice": lambda m: len(m.blobs) == 1 and m.fields["offset"] + len(m.blobs[0]) <= m.fields["total"],
    "bundle_slice": lambda m: len(m.blobs) == 1 and len(m.blobs[0]) <= config.BUNDLE_PART_BYTES,
    "grant": _is_whole_grant,
    "assigned": lambda m: len(m.blobs) <= 1,
    "log_lines": lambda m: len(m.blobs) == len(m.fields["stages"]),
    "reply": _is_whole_reply,
}
