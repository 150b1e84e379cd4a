"""What a message and a frame look like as bytes, and what is refused: a contract with old journals and with peers."""

from __future__ import annotations

import json
import struct

import pytest

from p2pcluster.core import codec
from p2pcluster.core.codec import FrameReader, Message
from p2pcluster.errors import LocalProtocolError, RemoteProtocolError


def raw(header: bytes, *blobs: bytes) -> bytes:
    sizes = struct.pack(f">{len(blobs)}I", *map(len, blobs))
    return struct.pack(">II", len(header), len(blobs)) + sizes + header + b"".join(blobs)


def framed(*payloads: bytes) -> bytes:
    return b"".join(b"".join(codec.frame([payload])) for payload in payloads)


def test_a_message_has_exactly_this_layout() -> None:
    payload = codec.encode_bytes(Message("put", {"queue": "a/b", "n": 2}, (b"xy", b"")))

    assert payload == raw(b'["put",{"queue":"a/b","n":2}]', b"xy", b"")


def test_a_message_comes_back_with_its_blobs_as_views_into_what_was_received() -> None:
    payload = codec.encode_bytes(Message("put", {"deep": [{"ä": None}, 1.5, True]}, (b"xy", b"", b"z" * 70_000)))

    message = codec.decode(payload)

    assert message == Message("put", {"deep": [{"ä": None}, 1.5, True]}, (b"xy", b"", b"z" * 70_000))
    assert all(blob.obj is payload for blob in message.blobs if isinstance(blob, memoryview))


def test_encoding_copies_no_blob() -> None:
    blob = bytearray(100_000)

    parts = codec.encode(Message("put", {}, (blob,)))

    assert parts[1] is blob


def test_messages_in_sequence_are_decoded_with_the_offsets_of_their_blobs() -> None:
    first, second = Message("a", {}, (b"12", b"3")), Message("b", {"x": 1}, (b"4",))
    body = codec.encode_bytes(first) + codec.encode_bytes(second)

    assert list(codec.decode_all(body)) == [(first, body.index(b"123")), (second, len(body) - 1)]


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf"), {1, 2}, b"bytes"])
def test_a_field_that_is_not_json_is_our_error(value: object) -> None:
    with pytest.raises(LocalProtocolError, match="'put'"):
        codec.encode(Message("put", {"field": value}))


def test_a_field_nested_without_end_is_our_error() -> None:
    endless: list[object] = []
    for _ in range(200_000):
        endless = [endless]

    with pytest.raises(LocalProtocolError):
        codec.encode(Message("put", {"field": endless}))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"put",
        b"[]",
        b'["put"]',
        b'["put",{},1]',
        b'["put",[]]',
        b"[1,{}]",
        b'{"put":{}}',
        b'["put",{"x":NaN}]',
        b'["put",{"x":-Infinity}]',
        b'["put",{"x":1e999}]',
        b'["put",{"x":"\xff"}]',
        '["put",{}]'.encode("utf-16"),
        '["put",{}]'.encode("utf-8-sig"),
        b'["put",{"x":' + b"9" * 5000 + b"}]",
        b'["put",{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        b'["put",{}]{}',
    ],
    ids=lambda header: repr(header[:24]),
)
def test_a_header_that_is_no_kind_with_fields_is_the_peers_error(header: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode(raw(header))


def test_a_message_cut_anywhere_is_the_peers_error() -> None:
    payload = codec.encode_bytes(Message("put", {"queue": "a"}, (b"xy", b"z")))

    for length in range(len(payload)):
        with pytest.raises(RemoteProtocolError):
            codec.decode(payload[:length])


def test_bytes_behind_a_message_are_the_peers_error() -> None:
    with pytest.raises(RemoteProtocolError, match="2 bytes follow"):
        codec.decode(codec.encode_bytes(Message("put", {})) + b"zz")


def test_four_billion_announced_blobs_cost_nothing_to_refuse() -> None:
    with pytest.raises(RemoteProtocolError, match="more blobs than it can hold"):
        codec.decode(struct.pack(">II", 2, 2**32 - 1) + bytes(64))


def test_sizes_that_add_up_beyond_the_payload_are_refused() -> None:
    header = b'["put",{}]'
    with pytest.raises(RemoteProtocolError, match="cut short"):
        codec.decode(struct.pack(">IIII", len(header), 2, 2**32 - 1, 2**32 - 1) + header)


def test_a_frame_is_its_length_and_its_parts() -> None:
    assert b"".join(codec.frame([b"ab", b"", b"c"])) == b"\0\0\0\3abc"


def test_an_empty_frame_is_a_frame() -> None:
    assert FrameReader(10).feed(framed(b"", b"a", b"")) == [b"", b"a", b""]


def test_a_frame_of_exactly_the_limit_passes() -> None:
    assert FrameReader(5).feed(framed(b"12345")) == [b"12345"]


@pytest.mark.parametrize("limit", [5, 100_000])
def test_a_frame_over_the_limit_is_refused_as_soon_as_its_length_is_known(limit: int) -> None:
    reader = FrameReader(limit)
    assert reader.feed(struct.pack(">I", limit + 1)[:3]) == []

    with pytest.raises(RemoteProtocolError, match=f"a frame of {limit + 1} bytes is over the limit of {limit}"):
        reader.feed(struct.pack(">I", limit + 1)[3:])


def test_a_large_frame_takes_no_memory_before_its_length_is_allowed() -> None:
    with pytest.raises(RemoteProtocolError):
        FrameReader(1 << 20).feed(b"GET / HTTP/1.1\r\n\r\n")


def test_a_reader_says_what_it_holds_and_what_it_lacks() -> None:
    reader = FrameReader(1 << 20)
    assert (reader.buffered_bytes, reader.missing_bytes) == (0, 4)
    for size in (7, 100_000):
        stream = framed(bytes(size))
        assert reader.feed(stream[:3]) == []
        assert (reader.buffered_bytes, reader.missing_bytes) == (3, 1)
        assert reader.feed(stream[3:4]) == []
        assert (reader.buffered_bytes, reader.missing_bytes) == (4, size)
        assert reader.feed(stream[4:6]) == []
        assert (reader.buffered_bytes, reader.missing_bytes) == (6, size - 2)
        assert reader.feed(stream[6:]) == [bytes(size)]
        assert (reader.buffered_bytes, reader.missing_bytes) == (0, 4)


def test_who_reads_no_more_than_is_missing_takes_nothing_of_the_next_frame() -> None:
    reader = FrameReader(1 << 20)
    stream = framed(b"first", b"second")
    taken = 0
    frames: list[codec.Buffer] = []
    while not frames:
        step = reader.missing_bytes
        frames = reader.feed(stream[taken : taken + step])
        taken += step

    assert frames == [b"first"]
    assert stream[taken:] == framed(b"second")


def test_a_returned_frame_does_not_change_when_the_next_ones_arrive() -> None:
    reader = FrameReader(1 << 20)
    for size in (10, 100_000):
        (frame,) = reader.feed(framed(b"a" * size))
        reader.feed(framed(b"b" * size))

        assert frame == b"a" * size
        assert memoryview(frame).readonly


def test_a_socket_can_write_straight_into_a_large_frame() -> None:
    reader = FrameReader(1 << 20)
    stream = memoryview(framed(bytes(range(256)) * 1000))
    frames: list[codec.Buffer] = []
    sizes = []
    while stream:
        space = reader.space()
        count = min(len(space), len(stream))
        space[:count] = stream[:count]
        frames += reader.received(count)
        stream = stream[count:]
        sizes.append(count)

    assert frames == [bytes(range(256)) * 1000]
    assert len(sizes) == 2, "what the small buffer held, and all the rest at once"


def test_the_decoded_fields_can_be_encoded_again() -> None:
    fields = json.loads('{"text":"\\ud800 \\u0000","number":-0.0,"large":' + "9" * 4000 + "}")
    message = Message("put", fields)

    assert codec.decode(codec.encode_bytes(message)) == message
