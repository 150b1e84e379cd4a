"""Commands become messages and back, and what the gateway lets through apply takes in without looking again.

That each message of the protocol has its fields is `test_protocol`'s affair.
"""

from __future__ import annotations

import copy
import json
import struct
import sys
from random import Random
from typing import Any

import pytest

from p2pcluster.core import commands
from p2pcluster.core.codec import Message, decode, encode_bytes
from p2pcluster.core.commands import Port, lengths_blob, lengths_of
from p2pcluster.core.queues import State
from p2pcluster.core.ranges import Fence
from p2pcluster.core.tables import TABLES
from p2pcluster.errors import RemoteProtocolError
from tests.simulation.queue_chooser import Chooser
from tests.simulation.queue_model import Model, beginning, deployment, entry_body

FENCE = Fence("n1", "b1", 7)


# --- Making and reading ----------------------------------------------------------------------------------------------


def test_lengths_are_little_endian_words() -> None:
    blob = lengths_blob([0, 1, 2**32 - 1])
    assert blob == struct.pack("<3I", 0, 1, 2**32 - 1)
    assert list(lengths_of(blob)) == [0, 1, 2**32 - 1]
    assert list(lengths_of(memoryview(b"??" + blob)[2:])) == [0, 1, 2**32 - 1]


def test_lengths_are_the_same_on_a_machine_with_another_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """There they are swapped; swapped twice they must come out as they went in."""
    monkeypatch.setattr(sys, "byteorder", "big")
    blob = lengths_blob([1, 258])
    assert blob == struct.pack(">2I", 1, 258)
    assert list(lengths_of(blob)) == [1, 258]


def test_a_blob_of_lengths_that_is_cut_short_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="cut short"):
        lengths_of(b"\0\0\0")


def test_the_ports_of_a_command_find_their_blobs_again() -> None:
    plain = Port(["p/a", "p/b"], lengths_blob([1, 2]), b"abb")
    counted = Port(["p/c"], lengths_blob([3]), b"ccc", lengths_blob([0, 1]))
    keyed = Port(["p/d"], lengths_blob([1]), b"d", None, b'["k"]')
    message = decode(encode_bytes(commands.put("c1", 3, 9, [plain, counted, keyed], {"count": 4}, b"cursor")))
    assert message.fields == {
        "producer": ["c1", 3, 9],
        "source": {"count": 4, "cursor": True},
        "ports": [{"queues": ["p/a", "p/b"]}, {"queues": ["p/c"], "counts": True}, {"queues": ["p/d"], "keys": True}],
    }
    found = commands.read_ports(message.fields["ports"], message.blobs)
    assert [first for _, first in found] == [0, 2, 5]
    assert [tuple(port) for port, _ in found] == [tuple(plain), tuple(counted), tuple(keyed)]
    assert message.blobs[-1] == b"cursor"


@pytest.mark.parametrize("ports", [[{"queues": ["p/a"]}], [{}], [[]], [None], ["queues"]])
def test_ports_without_their_blobs_are_refused(ports: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="do not fit"):
        commands.read_ports(ports, [b"\0\0\0\0"])


@pytest.mark.parametrize("keys", [b"[1]", b"{}", b"nothing", b'"k"', b'["k", ["k"]]', b"\xff"])
def test_keys_are_a_list_of_texts_and_nulls(keys: bytes) -> None:
    assert commands.keys_of(b'["k", null]') == ["k", None]
    with pytest.raises(RemoteProtocolError, match="keys"):
        commands.keys_of(keys)


def test_the_commands_of_an_entry_are_told_apart_with_the_place_of_their_blobs() -> None:
    put = commands.put("c1", 0, 1, [Port(["p/a"], lengths_blob([5]), b"hello")])
    body = entry_body([commands.take("p/a", [(1, 2)], FENCE), put, put])
    found = commands.decode_commands(body)
    assert [message.kind for message, _ in found] == ["take", "put", "put"]
    for message, offset in found[1:]:
        assert body[offset + 4 : offset + 9] == b"hello"
        assert [bytes(blob) for blob in message.blobs] == [lengths_blob([5]), b"hello"]


def test_an_unknown_kind_of_command_stops_the_node() -> None:
    body = entry_body([Message("put_twice", {})])
    with pytest.raises(AssertionError, match="update this node"):
        State().apply(1, 1, 0, body)


def test_every_kind_of_command_is_applied() -> None:
    assert set(State()._handlers) == set(commands.FIELDS)


# --- The gateway -----------------------------------------------------------------------------------------------------


def test_ranges_may_come_in_any_order() -> None:
    """An item that failed comes round again behind those with higher ids, and is reported with them."""
    commands.check(commands.done("p/a", [(100, 110), (5, 6)], []))


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(3, 3)],
        [(4, 3)],
        [(1, 4), (3, 5)],
        [(3, 5), (1, 4)],
        [(1, 2), (1, 2)],
        [(-1, 2)],
        [(1, True)],
        [(1.0, 2)],
        [("a", "b")],
        [(1, 2, 3)],
        [(1, 1 << 63)],
    ],
)
def test_ranges_that_are_none_are_refused(ranges: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="ranges"):
        commands.check(commands.done("p/a", ranges, []))


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (commands.put("c\ud800", 0, 1, []), "producer"),
        (commands.put("c1", 1 << 63, 1, []), "producer"),
        (commands.put("source:p/1/gen/0", 1, 1, [], {"hash": "\udfff"}), "source"),
        (commands.put("source:p/1/gen/0", 1, 1, [], {"count": 1 << 63}), "source"),
        (commands.put("source:p/1/gen/0", 1, 1, [], {"finished": 1}), "source"),
        (commands.release("p/\ud800", [(1, 2)], FENCE), "queue"),
        (commands.release("p/a", [(1, 2)], Fence("n\ud800", "b", 1)), "fence"),
        (Message("member", {"node": "n1", "name": "\udead", "facts": {}}), "name"),
    ],
)
def test_what_no_table_can_hold_is_refused(command: Message, field: str) -> None:
    with pytest.raises(RemoteProtocolError, match=field):
        commands.check(command)


def test_half_of_a_surrogate_pair_is_a_key_and_an_error_text_like_others() -> None:
    """File names that are no UTF-8 come as such, and people put them where they like."""
    keys = json.dumps(["\udcff"]).encode()
    put = commands.put("c1", 0, 1, [Port(["p/in"], lengths_blob([1]), b"x", None, keys)])
    fail = commands.fail("p/in", 1, FENCE, {"type": "E", "text": "\udcff", "traceback": None}, 0)
    commands.check(put)
    commands.check(fail)
    state = State()
    outcomes = state.apply(1, 1, 0, entry_body([*beginning(), put, commands.take("p/in", [(1, 2)], FENCE), fail]))
    assert [outcome.result for outcome in outcomes[-3:]] == ["ok", "ok", "ok"]
    storable(state)


# --- What passes the gateway is taken in -----------------------------------------------------------------------------

SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    1 << 61,
    1 << 70,
    1.5,
    "",
    "p",
    "p/in",
    "p/a",
    "v1",
    "gen",
    "\ud800",
    [],
    {},
    [[1, 2]],
    [1, 1, "a"],
]
BLOBS = [b"", b"\0", lengths_blob([1]), lengths_blob([1, 0]), b'["a"]', b'["a", 1]', b"x" * 40]


def storable(state: State) -> None:
    """Every row that a checkpoint would write can be written."""
    for table, rows in state.all_rows().items():
        for key, row in rows.items():
            for value in (*key, *(row or ())):
                assert value is None or isinstance(value, int | str | bytes), (table, value)
                assert not isinstance(value, int) or -(1 << 63) <= value < 1 << 63, (table, value)
                if isinstance(value, str):
                    value.encode()
    assert set(state.all_rows()) == set(TABLES)


def damaged(random: Random, message: Message) -> Message:
    """The message with one or two things changed somewhere."""
    fields, blobs = json.loads(json.dumps(message.fields)), list(message.blobs)
    for _ in range(random.choice([1, 1, 2])):
        if blobs and random.random() < 0.3:
            at = random.randrange(len(blobs))
            blobs[at : at + 1] = random.choice([[], [random.choice(BLOBS)], [bytes(blobs[at])] * 2])
        else:
            _change_somewhere(random, fields)
    return Message(message.kind, fields, tuple(blobs))


def _change_somewhere(random: Random, value: Any) -> None:
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = random.choice(places)
        if isinstance(value[place], dict | list) and value[place] and random.random() < 0.8:
            value = value[place]
            continue
        if random.random() < 0.2:
            del value[place]
        elif isinstance(value, list) and random.random() < 0.3:
            value.append(copy.deepcopy(value[place]))
        else:
            value[place] = copy.deepcopy(random.choice(SCALARS))
        return


def try_damaged_commands(random: Random) -> tuple[int, int]:
    """How many of some damaged commands the gateway let through, and how many it refused."""
    model, state = Model(), State(random.choice([0, 1 << 30]))
    chooser = Chooser(random, model)
    passed = refused = 0
    index = 1
    state.apply(1, 1, 0, entry_body(beginning()))
    model.apply(0, beginning())
    for _ in range(25):
        whole = chooser.entry() if random.random() < 0.8 else deployment(random.choice(["v1", "v2"]))
        index += 1
        state.apply(index, 1, index, entry_body(whole))
        model.apply(index, whole)
        message = damaged(random, random.choice(whole)) if whole else Message("forget", {"producers": []})
        try:
            commands.check(message)
        except RemoteProtocolError:
            refused += 1
            continue
        passed += 1
        index += 1
        state.apply(index, 1, index, entry_body([message]))
        storable(state)
    return passed, refused


@pytest.mark.parametrize("seed", range(40))
def test_apply_takes_in_whatever_passes_the_gateway(seed: int) -> None:
    try_damaged_commands(Random(seed))


def test_of_damaged_commands_some_pass_and_some_do_not() -> None:
    passed, refused = (
        sum(counts) for counts in zip(*(try_damaged_commands(Random(seed)) for seed in range(10)), strict=True)
    )
    assert passed > 10
    assert refused > 50


@pytest.mark.parametrize("gap", ["_are_ranges", "_check_ports", "_are_ids"])
def test_a_gap_in_the_gateway_is_noticed(gap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, gap, lambda value: True)
    for name, check in list(commands._INSIDE.items()):
        if getattr(check, "__name__", "") == gap:
            monkeypatch.setitem(commands._INSIDE, name, lambda value: True)
    with pytest.raises(Exception):  # noqa: B017 - whatever apply makes of nonsense; without the gap there is nothing
        for seed in range(400):
            try_damaged_commands(Random(seed))


@pytest.mark.parametrize(
    ("at", "field", "value"),
    [
        ("stages", "processes", "auto"),
        ("stages", "retries", "3"),
        ("stages", "backoff_s", None),
        ("stages", "timeout_s", True),
        ("stages", "reads", "nowhere"),
        ("queues", "maxsize", -1),
        ("queues", "results", 1),
        ("queues", "name", None),
    ],
)
def test_a_manifest_that_apply_could_not_read_is_refused(at: str, field: str, value: Any) -> None:
    deploy = json.loads(json.dumps(deployment("v1")[-1].fields))
    commands.check(Message("deploy", deploy))
    deploy["manifest"][at][0][field] = value
    with pytest.raises(RemoteProtocolError, match="manifest"):
        commands.check(Message("deploy", deploy))


def test_a_bundle_has_no_more_parts_than_its_bytes_allow() -> None:
    with pytest.raises(RemoteProtocolError, match="parts"):
        commands.check(Message("bundle_part", {"version": "v", "part": 0, "parts": 1 << 40}, (b"x",)))
