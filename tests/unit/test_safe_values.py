"""Plain data is read as pickle would read it; whatever would run code is shown and never run."""

from __future__ import annotations

import datetime
import pickle
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcluster import safe_values
from p2pcluster.safe_values import NotPlain, read_plain, render, show, show_json

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
                    st.datetimes(), st.dates(), st.timedeltas(), st.binary().map(bytearray))
keys = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.text(), st.integers()))
plain = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner), st.sets(keys), st.frozensets(keys)),
    max_leaves=20)


@given(value=plain)
def test_plain_data_is_read_as_pickle_reads_it(value: Any) -> None:
    body = pickle.dumps(value, 5)
    found = read_plain(body)
    assert found == value
    assert type(found) is type(value)


of_any_protocol = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner), st.lists(inner).map(tuple)))


@given(value=of_any_protocol, protocol=st.integers(0, 5))
def test_older_protocols_are_read_too(value: Any, protocol: int) -> None:
    assert read_plain(pickle.dumps(value, protocol)) == value


def test_shared_and_circular_values_are_read() -> None:
    inner = [1]
    found = read_plain(pickle.dumps([inner, inner], 5))
    assert found[0] is found[1]
    circle: list[Any] = []
    circle.append(circle)
    found = read_plain(pickle.dumps(circle, 5))
    assert found[0] is found
    assert show(pickle.dumps(circle, 5)).startswith("[[[[")


class Bomb:
    """Loading one would be noticed."""

    exploded = False

    def __reduce__(self) -> Any:
        return (setattr, (Bomb, "exploded", True))


class Thing:
    pass


NOT_PLAIN = {
    "an object of a class": pickle.dumps(Thing(), 5),
    "a class": pickle.dumps(Thing, 5),
    "a call": pickle.dumps(Bomb(), 5),
    "a call inside of plain data": pickle.dumps({"a": [1, Bomb()]}, 5),
    "a call in an older protocol": pickle.dumps(Bomb(), 0),
    "os.system": b"cposix\nsystem\n(S'true'\ntR.",
    "an INST": b"(iposix\nsystem\n.",
    "an OBJ": b"(cposix\nsystem\no.",
    "a persistent id": b"Pname\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a BUILD": b"\x80\x02}}b.",
    "a method of a class that is known": b"\x80\x04\x8c\x08datetime\x8c\x0cdatetime.now\x93)R.",
    "a class that is known, itself": b"\x80\x04\x8c\x08datetime\x8c\x04date\x93.",
    "a class that is known, in a list": b"\x80\x04]\x8c\x08datetime\x8c\x04date\x93a.",
    "a call of what is no class": b"\x80\x02K\x01)R.",
    "a date that there is not": b"\x80\x02cdatetime\ndate\n(K\x01K\x01K\x01K\x01tR.",
    "nothing": b"",
    "no pickle": b"hello",
    "a pickle that is cut": pickle.dumps([1, 2, 3], 5)[:-3],
    "a value too many": b"\x80\x02K\x01K\x02.",
    "an open mark": b"\x80\x02(K\x01.",
    "a mark that is not there": b"\x80\x02t.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "an unhashable key": b"\x80\x02}]K\x01s.",
    "an odd number of keys and values": b"\x80\x02}(K\x01u.",
    "a set used as a list": b"\x80\x04\x8fK\x01a.",
    "an integer as a module's name": b"\x80\x04K\x01K\x02\x93.",
    "a key so deep that hashing it would overrun the stack": b"\x80\x02})" + b"\x85" * 20_000 + b"K\x01s.",
    "a blob longer than there are bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",
    "an array longer than there are bytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.",
    "many bytes": pickle.dumps(bytes(safe_values.READ_BYTES_MAX + 1), 5),
}


@pytest.mark.parametrize("body", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_data_is_shown_and_not_run(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pickle"], "loads", None)
    with pytest.raises(NotPlain):
        read_plain(body)
    text = show(body)
    assert text.startswith("not plain data: ")
    found = show_json(body)
    assert found["not_plain"]
    assert isinstance(found["disassembly"], list)
    assert not Bomb.exploded


def test_the_reason_names_the_class_and_the_disassembly_what_would_be_called() -> None:
    text = show(NOT_PLAIN["os.system"])
    assert "it names posix.system" in text
    assert "GLOBAL     'posix system'" in text
    assert "REDUCE" in text


def test_a_memo_index_costs_nothing() -> None:
    assert read_plain(b"\x80\x02K\x01r\xff\xff\xff\xff.") == 1


@given(value=plain)
def test_what_is_shown_is_what_python_would_write(value: Any) -> None:
    text = render(value)
    if len(text) <= safe_values.TEXT_CHARS_MAX:
        assert eval(text, {"datetime": datetime, "inf": float("inf")}) == value


@pytest.mark.parametrize("body", [
    *(pickle.dumps(value, 5) for value in ("x" * 100_000, [0] * 100_000, 1 << 100_000, {(i,): i for i in range(9999)})),
    b"\x80\x05]" + b"2\x86" * 30_000 + b".",  # a pair of pairs of pairs ...: few bytes for a value without an end
    b"\x80\x05" + b"]" * 10_000 + b"a" * 9_999 + b".",
], ids=["text", "list", "integer", "dict", "doubling", "depth"])
def test_what_is_shown_is_bounded(body: bytes) -> None:
    assert len(show(body)) < 2 * safe_values.TEXT_CHARS_MAX
    found = show_json(body)
    assert "value" in found or len(found["python"]) < 2 * safe_values.TEXT_CHARS_MAX


def test_json_says_a_value_where_it_says_exactly_that() -> None:
    assert show_json(pickle.dumps({"a": [1, None, 2.5, "x", True]}, 5)) == {"value": {"a": [1, None, 2.5, "x", True]}}
    for value in [(1, 2), {1: 2}, {1, 2}, b"x", float("inf"), [(1,)], datetime.date(2020, 1, 2)]:
        assert show_json(pickle.dumps(value, 5)) == {"python": repr(value)}


def test_a_value_of_a_json_queue() -> None:
    assert show(b'{"a": [1, "two"]}', "json") == "{'a': [1, 'two']}"
    assert show_json(b'{"a": null}', "json") == {"value": {"a": None}}
    assert show(b"{", "json").startswith("not plain data: not JSON")
    assert "not_plain" in show_json(b"[" * 100_000, "json")
