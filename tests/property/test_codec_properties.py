"""Every message comes back; every stream of frames, however it is cut; for all other bytes there is one typed error."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster.core import codec
from p2pcluster.core.codec import Buffer, FrameReader, Message
from p2pcluster.errors import RemoteProtocolError

LIMIT = 200_000

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
messages = st.builds(
    Message,
    st.text(max_size=12),
    st.dictionaries(st.text(max_size=8), json_values, max_size=5),
    st.lists(st.binary(max_size=200), max_size=6).map(tuple),
)
# Sizes around what decides: the length, the reader's small buffer, and frames larger than it.
payload_sizes = st.integers(0, 40) | st.integers((1 << 16) - 8, (1 << 16) + 8) | st.just(150_000)
streams = st.lists(payload_sizes, max_size=6).map(
    lambda sizes: [bytes([index + 1]) * size for index, size in enumerate(sizes)]
)


def framed(payloads: list[bytes]) -> bytes:
    return b"".join(part for payload in payloads for part in codec.frame([payload]))


def fed(reader: FrameReader, pieces: list[bytes]) -> list[Buffer]:
    return [frame for piece in pieces for frame in reader.feed(piece)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place for place in places if place < len(stream)), len(stream)]
    return [stream[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def decode_or_refuse(payload: bytes) -> Message | None:
    try:
        return codec.decode(payload)
    except RemoteProtocolError:
        return None


@given(messages)
def test_every_message_comes_back(message: Message) -> None:
    assert codec.decode(codec.encode_bytes(message)) == message


@given(st.lists(messages, max_size=5))
def test_every_sequence_of_messages_comes_back(sequence: list[Message]) -> None:
    body = b"".join(codec.encode_bytes(message) for message in sequence)

    decoded = list(codec.decode_all(body))

    assert [message for message, _ in decoded] == sequence
    for message, offset in decoded:
        blobs = b"".join(message.blobs)
        assert body[offset : offset + len(blobs)] == blobs


@given(messages, st.data())
def test_a_cut_message_is_always_refused(message: Message, data: st.DataObject) -> None:
    payload = codec.encode_bytes(message)
    length = data.draw(st.integers(0, len(payload) - 1))

    assert decode_or_refuse(payload[:length]) is None


@given(messages, st.data())
def test_a_damaged_message_is_refused_or_is_another_message(message: Message, data: st.DataObject) -> None:
    payload = bytearray(codec.encode_bytes(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))

    decoded = decode_or_refuse(bytes(payload))

    if decoded is not None:
        assert_can_be_sent_on(decoded)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_are_a_message(payload: bytes) -> None:
    decoded = decode_or_refuse(payload)

    if decoded is not None:
        assert_can_be_sent_on(decoded)


@given(st.binary(max_size=80), st.lists(st.binary(max_size=8), max_size=3))
def test_any_header_is_refused_or_is_a_message(header: bytes, blobs: list[bytes]) -> None:
    sizes = struct.pack(f">{len(blobs)}I", *map(len, blobs))

    decoded = decode_or_refuse(struct.pack(">II", len(header), len(blobs)) + sizes + header + b"".join(blobs))

    assert decoded is None or decoded.blobs == tuple(blobs)


@given(json_values, st.floats(allow_nan=True, allow_infinity=True))
def test_what_is_decoded_has_only_numbers_that_are_numbers(value: Any, number: float) -> None:
    header = f'["put",{{"x":{number!r}}}]'.replace("nan", "NaN").replace("inf", "Infinity").encode()
    decoded = decode_or_refuse(struct.pack(">II", len(header), 0) + header)

    assert (decoded is None) == (number != number or abs(number) == float("inf"))


@settings(max_examples=150)
@given(streams, st.lists(st.integers(0, 600_000), max_size=12))
def test_a_stream_gives_the_same_frames_however_it_is_cut(payloads: list[bytes], places: list[int]) -> None:
    reader = FrameReader(LIMIT)

    assert fed(reader, cut(framed(payloads), places)) == payloads
    assert reader.buffered_bytes == 0


@given(st.lists(st.binary(max_size=12), max_size=5))
def test_a_stream_gives_the_same_frames_byte_by_byte_and_at_every_single_cut(payloads: list[bytes]) -> None:
    stream = framed(payloads)

    assert fed(FrameReader(LIMIT), [bytes([byte]) for byte in stream]) == payloads
    for place in range(len(stream) + 1):
        assert fed(FrameReader(LIMIT), [stream[:place], stream[place:]]) == payloads


@settings(max_examples=60)
@given(streams, st.data())
def test_a_reader_knows_how_much_it_holds_and_lacks(payloads: list[bytes], data: st.DataObject) -> None:
    stream = framed(payloads)
    place = data.draw(st.integers(0, len(stream)))
    reader = FrameReader(LIMIT)
    frames = reader.feed(stream[:place])
    whole = sum(4 + len(frame) for frame in frames)

    assert reader.buffered_bytes == place - whole
    if place < len(stream):
        missing = reader.missing_bytes
        assert len(reader.feed(stream[place : place + missing - 1])) == 0
        assert reader.missing_bytes == 1


@given(st.lists(st.binary(max_size=30), max_size=4), st.integers(31, 2**32 - 1), st.binary(max_size=10))
def test_a_frame_over_the_limit_ends_every_stream(before: list[bytes], size: int, after: bytes) -> None:
    reader = FrameReader(30)
    assert fed(reader, [framed(before)]) == before

    try:
        reader.feed(struct.pack(">I", size) + after)
    except RemoteProtocolError:
        return
    raise AssertionError("a frame over the limit was let through")


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_any_bytes_in_any_pieces_give_frames_within_the_limit_or_one_typed_error(pieces: list[bytes]) -> None:
    reader = FrameReader(64)
    taken = 0
    try:
        for piece in pieces:
            frames = reader.feed(piece)
            taken += sum(4 + len(frame) for frame in frames)
            assert all(len(frame) <= 64 for frame in frames)
    except RemoteProtocolError:
        return
    assert taken + reader.buffered_bytes == sum(map(len, pieces)), "no byte is lost, none is made up"


def assert_can_be_sent_on(message: Message) -> None:
    again = codec.decode(codec.encode_bytes(message))
    assert again == message
