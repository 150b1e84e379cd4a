"""The registry of messages, its page, and its gateway."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import p2pcluster
from p2pcluster.core import commands, datagram, protocol
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.errors import RemoteProtocolError
from tests import hostile

PAGE = (Path(p2pcluster.__file__).parent / "PROTOCOL.md").read_text()
SECTIONS = {"client": "Client and node", "member": "Leader and member", "process": "Node and stage process"}


def rows_of(title: str) -> dict[str, tuple[str, str]]:
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    return {m[1]: (m[2], m[3]) for m in re.finditer(r"^\| `(\w+)` \| (\w+) \| (.*)\|$", section, re.M)}


@pytest.mark.parametrize("link", protocol.LINKS)
def test_the_page_lists_every_message_of_the_registry_and_no_other(link: str) -> None:
    rows = rows_of(SECTIONS[link])
    assert {kind: sender for kind, (sender, _) in rows.items()} == {k: s.sender for k, s in protocol.LINKS[link].items()}


@pytest.mark.parametrize("link", protocol.LINKS)
def test_the_page_names_every_field(link: str) -> None:
    rows = rows_of(SECTIONS[link])
    missing = [(kind, name) for kind, spec in protocol.LINKS[link].items() for name in spec.fields if f"`{name}`" not in rows[kind][1]]
    assert missing == []


def test_a_message_of_the_other_side_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="does not send 'reply'"):
        protocol.check("client", "client", Message("reply", {"req": 1, "kind": "x", "result": "ok"}))


def test_a_missing_field_and_a_bool_for_a_number_are_refused() -> None:
    protocol.check("client", "client", Message("take", {"req": 1, "queue": "p/q", "count": 1}))
    with pytest.raises(RemoteProtocolError, match="'req'"):
        protocol.check("client", "client", Message("take", {"queue": "p/q", "count": 1}))
    with pytest.raises(RemoteProtocolError, match="'count'"):
        protocol.check("client", "client", Message("take", {"req": 1, "queue": "p/q"}))
    with pytest.raises(RemoteProtocolError, match="'count'"):
        protocol.check("client", "client", Message("take", {"req": 1, "queue": "p/q", "count": True}))


SAID = [*hostile.from_executor(), *hostile.between_nodes("m", "n")]
MEMBER = {message.kind: message for message in SAID if message.kind in protocol.MEMBER} | {
    "grant": Message("grant", {"queue": "p/q", "version": "v", "fence": ["n", "b", 1], "deliveries": {"1": 2},
                               "pieces": [[1, 3, 1, None], [4, 5, 1, ["k"]]]}, (lengths_blob([1, 1]), b"ab", lengths_blob([0]), b"")),
    "assigned": Message("assigned", {"pipeline": "p", "stage": "s", "shard": 0, "producer": "source:p/1/s/0", "epoch": 1, "seq": 0,
                                     "count": 0, "hash": ""}, (b"cursor",)),
    "tick": Message("tick", {"pipeline": "p", "stage": "s", "shard": 0, "epoch": 1, "seq": 3, "at_ms": 1_800_000_000_000}),
    "revoke": Message("revoke", {"pipeline": "p", "stage": "s", "shard": 0}),
    "reply": Message("reply", {"req": 1, "kind": "put", "result": "ok", "seq": 1}),
    "bundle_slice": Message("bundle_slice", {"version": "v", "part": 0, "parts": 1}, (b"zip",)),
}


@pytest.mark.parametrize("kind", MEMBER)
def test_what_members_say_passes(kind: str) -> None:
    protocol.check("member", protocol.MEMBER[kind].sender, MEMBER[kind])


@pytest.mark.parametrize(("kind", "change"), [
    ("hello", {"leader": ""}), ("hello", {"cluster_id": "\ud800"}), ("hello", {"leader_address": "h" * 200 + ":1"}),
    ("give_way", {"cluster": "\ud800"}), ("accepted", {"into": "x" * 1000}),
    ("join", {"boot": ""}), ("join", {"name": "\n"}), ("join", {"facts": {"slots": "2"}}), ("join", {"facts": {"slots": 1 << 40}}),
    ("join", {"facts": {"tags": [["deep"]]}}), ("join", {"facts": {"x": {}}}), ("join", {"facts": {"x": "y" * 10_000}}),
    ("report", {"held": {"p/q": [[3, 1, 1]]}}), ("report", {"held": {"p/q": [[1, 2]]}}), ("report", {"held": {"p/q": None}}),
    ("report", {"sources": [1]}), ("report", {"ran_before": {"b": {"p/q": [None]}}}), ("report", {"ran_before": {"b": []}}),
    ("window", {"queues": {"p/q": -1}}), ("window", {"queues": {"p/q": "1"}}), ("seen", {"runs": {"p": None}}),
    ("stats", {"running": {"p/s": 0.5}}), ("stats", {"service_us": {"p/s": 10**300}}), ("stats", {"troubles": {"p/s": 1}}),
    ("stats", {"trials": {"p": {"rollout": 1, "old": 0, "ready": []}}}), ("grant", {"version": None}),
    ("snapshot_slice", {"total": 1}), ("bundle_slice", {"parts": 0}), ("bundle_slice", {"parts": 1 << 40}),
    ("grant", {"fence": ["n", "b"]}), ("grant", {"deliveries": {"one": 1}}), ("grant", {"pieces": [[1, 3, 1, None]]}),
    ("grant", {"pieces": [[1, 3, 1, None], [4, 6, 1, None]]}), ("grant", {"pieces": [[1, 3, 1, ["k"]], [4, 5, 1, None]]}),
    ("assigned", {"stage": "a/b"}), ("reply", {"seq": "1"}), ("reply", {"code": []}), ("reply", {"kind": "deploy"}),
])
def test_a_member_message_with_something_wrong_inside_is_refused_by_its_name(kind: str, change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match=f"message '{kind}'"):
        protocol.check("member", protocol.MEMBER[kind].sender, MEMBER[kind]._replace(fields={**MEMBER[kind].fields, **change}))


def good_put() -> Message:
    return commands.put("client:a", 1, 1, [Port(["p/q"], lengths_blob([2, 1]), b"abc")])


def good_done() -> Message:
    return commands.done("p/q", [(1, 3)], [Port(["p/r"], lengths_blob([1, 1, 1]), b"abc", lengths_blob([1, 2]))])


@pytest.mark.parametrize("message", [good_put(), good_done()])
def test_a_whole_command_passes(message: Message) -> None:
    commands.check(message)


@pytest.mark.parametrize("change", [
    {"producer": ["client:a", 1]}, {"producer": ["client:a", "1", 1]}, {"producer": ["client:a", 1, -1]},
    {"ports": [{"queues": []}]}, {"ports": [{"queues": [5]}]}, {"ports": [{"queues": ["p/q"], "evil": 1}]}, {"ports": []},
    {"ports": [{"queues": ["p/q"], "counts": True}]}, {"source": {"count": "many"}}, {"source": {"evil": 1}}, {"source": {"tick_ms": -1}},
    {"ports": [{"queues": ["p/q"], "delay_ms": -1}]}, {"ports": [{"queues": ["p/q"], "delay_ms": 0.5}]},
    {"ports": [{"queues": ["p/q"], "at_ms": "noon"}]}, {"ports": [{"queues": ["p/q"], "at_ms": 1 << 62}]},
    {"ports": [{"queues": ["p/q"], "delay_ms": 1, "at_ms": 1}]},
])
def test_a_put_that_apply_could_not_take_in_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        commands.check(good_put()._replace(fields={**good_put().fields, **change}))


@pytest.mark.parametrize("ranges", [[], [[3, 3]], [[3, 1]], [["a", "b"]], [[1, 2, 3]], [[1, 3], [2, 4]], [[-1, 2]], [[True, 2]], [[1, 2]]])
def test_a_done_with_ranges_that_do_not_fit_is_refused(ranges: list[object]) -> None:
    with pytest.raises(RemoteProtocolError):
        commands.check(good_done()._replace(fields={**good_done().fields, "ranges": ranges}))


def test_lengths_that_do_not_add_up_to_the_body_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="do not fit"):
        commands.check(commands.put("client:a", 1, 1, [Port(["p/q"], lengths_blob([2, 9]), b"abc")]))


def test_blobs_that_no_port_takes_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="blobs"):
        commands.check(good_put()._replace(blobs=(*good_put().blobs, b"more")))
    with pytest.raises(RemoteProtocolError, match="blobs"):
        commands.check(Message("close", {"pipeline": "p", "name": "q"}, (b"x",)))


def test_a_deploy_whose_manifest_names_a_queue_that_it_does_not_have_is_refused() -> None:
    fields = {"pipeline": "p", "version": "v", "origin": {}, "files": {}, "zip_sha256": "", "project": {},
              "manifest": {"stages": [{"name": "s", "kind": "sink", "reads": "nowhere", "ports": []}], "queues": [], "back_edges": [],
                           "on_done": False}}
    with pytest.raises(RemoteProtocolError, match="manifest"):
        commands.check(Message("deploy", fields))


def test_the_page_lists_every_kind_of_datagram() -> None:
    section = PAGE.split("## Datagrams\n", 1)[1]
    listed = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))))
    assert listed == set(datagram.KINDS)


def test_what_a_stage_emits_does_not_wait() -> None:
    """Only a put says so: a `done` whose outputs would wait is no command of ours."""
    record = {**good_done().fields["ports"][0], "delay_ms": 5}
    with pytest.raises(RemoteProtocolError):
        commands.check(good_done()._replace(fields={**good_done().fields, "ports": [record]}))
