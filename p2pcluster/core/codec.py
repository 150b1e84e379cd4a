"""How a message becomes bytes and back: the one format of frames, commands and journal entries.

A message is a kind, JSON fields and blobs. Blobs are opaque here and everywhere on a node; nothing in this package
but a stage process ever unpickles one. A frame is a length and a message. What the kinds mean, and sealing, are
decided elsewhere.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from p2pcluster.errors import LocalProtocolError, RemoteProtocolError

_U32 = struct.Struct(">I")
_HEAD = struct.Struct(">II")
_SMALL_BYTES = 1 << 16  # many small frames in one piece, and cheap to have for each peer

Buffer = bytes | bytearray | memoryview


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond every number")
    return number


# Made once: `json.dumps` and `json.loads` make a new one at each call that sets an option. What one refuses to write
# the other refuses to read, or a peer could hand an infinity to code that trusts what was decoded.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


class Message(NamedTuple):
    """`kind` names the message, `fields` is a JSON object, `blobs` are opaque bytes (views into the frame they came
    in)."""

    kind: str
    fields: dict[str, Any]
    blobs: tuple[Buffer, ...] = ()


def encode(message: Message) -> list[Buffer]:
    """The message as parts to be written one after the other; no blob is copied.

    Layout: header_len u32, blob_count u32, blob sizes u32 each, header (UTF-8 JSON `[kind, fields]`), blobs.
    Raises `LocalProtocolError` when the fields are not JSON.
    """
    try:
        header = _ENCODER.encode([message.kind, message.fields]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LocalProtocolError(f"message {message.kind!r} has a field that is not JSON: {error}") from error
    sizes = [len(blob) for blob in message.blobs]
    return [_HEAD.pack(len(header), len(sizes)) + struct.pack(f">{len(sizes)}I", *sizes) + header, *message.blobs]


def encode_bytes(message: Message) -> bytes:
    """The message as one bytes object."""
    return b"".join(encode(message))


def decode(payload: Buffer) -> Message:
    """The message in `payload`, its blobs as views into it.

    Raises `RemoteProtocolError` for anything that `encode` cannot have made.
    """
    message, end = decode_at(payload, 0)
    if end != len(payload):
        raise RemoteProtocolError(f"{len(payload) - end} bytes follow the end of a message")
    return message


def decode_at(payload: Buffer, start: int) -> tuple[Message, int]:
    """The message that begins at `start`, and the offset behind it. Raises `RemoteProtocolError`."""
    view = memoryview(payload)
    try:
        header_len, blob_count = _HEAD.unpack_from(view, start)
        if blob_count > (len(view) - start) // 4:
            raise RemoteProtocolError("a message announces more blobs than it can hold")
        sizes = struct.unpack_from(f">{blob_count}I", view, start + 8)
    except struct.error as error:
        raise RemoteProtocolError("a message is cut short") from error
    header_at = start + 8 + 4 * blob_count
    offset = header_at + header_len
    end = offset + sum(sizes)
    if end > len(view):
        raise RemoteProtocolError("a message is cut short")
    kind, fields = _header(view[header_at:offset])
    blobs = []
    for size in sizes:
        blobs.append(view[offset : offset + size])
        offset += size
    return Message(kind, fields, tuple(blobs)), end


def _header(view: memoryview) -> tuple[str, dict[str, Any]]:
    try:
        header = _DECODER.decode(str(view, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError("a message's header is not JSON") from error
    if not (isinstance(header, list) and len(header) == 2):
        raise RemoteProtocolError("a message's header is not a kind and its fields")
    kind, fields = header
    if not (isinstance(kind, str) and isinstance(fields, dict)):
        raise RemoteProtocolError("a message's header is not a kind and its fields")
    return kind, fields


def decode_all(payload: Buffer) -> Iterator[tuple[Message, int]]:
    """Each message of a sequence, with the offset at which its blobs begin. Raises `RemoteProtocolError`."""
    offset = 0
    while offset < len(payload):
        message, offset = decode_at(payload, offset)
        yield message, offset - sum(len(blob) for blob in message.blobs)


def frame(parts: Iterable[Buffer]) -> list[Buffer]:
    """`parts` with the length in front that a `FrameReader` splits by."""
    parts = list(parts)
    return [_U32.pack(sum(len(part) for part in parts)), *parts]


class FrameReader:
    """Splits a byte stream into frames, whatever the pieces are that it arrives in.

    Either `feed` it, or let a socket write into `space` and say with `received` how much came: a large frame is then
    written once, to where it stays. A frame over `frame_bytes_max` raises `RemoteProtocolError` as soon as its length
    is read; the stream is then unusable. A frame, once returned, is never changed.
    """

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        # Lengths and small frames arrive in `_small`, many at a time. A frame that does not fit gets a buffer of its
        # own.
        self._small = memoryview(bytearray(_U32.size + min(_SMALL_BYTES, frame_bytes_max)))
        self._small_filled = 0
        self._large: memoryview | None = None
        self._large_filled = 0

    @property
    def buffered_bytes(self) -> int:
        """What has arrived of a frame that is not whole yet."""
        return self._small_filled if self._large is None else _U32.size + self._large_filled

    @property
    def missing_bytes(self) -> int:
        """How many more bytes complete the next length or, once that is known, its frame: who feeds no more than that
        leaves in the socket whatever follows the frame."""
        if self._large is not None:
            return len(self._large) - self._large_filled
        if self._small_filled < _U32.size:
            return _U32.size - self._small_filled
        (size,) = _U32.unpack_from(self._small)
        return _U32.size + int(size) - self._small_filled

    def space(self) -> memoryview:
        """Where the next bytes are to be written; never empty, and good until `received` is called."""
        return self._small[self._small_filled :] if self._large is None else self._large[self._large_filled :]

    def received(self, count: int) -> list[Buffer]:
        """Every frame that is complete with the first `count` bytes of `space`, in order."""
        if self._large is None:
            self._small_filled += count
            return self._split()
        self._large_filled += count
        if self._large_filled < len(self._large):
            return []
        whole = self._large.toreadonly()
        self._large = None
        return [whole]

    def feed(self, data: Buffer) -> list[Buffer]:
        """Every frame that `data` completes, in order."""
        frames: list[Buffer] = []
        rest = memoryview(data)
        while rest:
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            frames += self.received(count)
            rest = rest[count:]
        return frames

    def _split(self) -> list[Buffer]:
        small, end = self._small, self._small_filled
        frames: list[Buffer] = []
        start = 0
        while end - start >= _U32.size:
            (size,) = _U32.unpack_from(small, start)
            if size > self.frame_bytes_max:
                raise RemoteProtocolError(
                    f"a frame of {size} bytes is over the limit of {self.frame_bytes_max}; is the peer p2pcluster?"
                )
            body = start + _U32.size
            if body + size > end:
                if _U32.size + size > len(small):
                    self._begin_large(size, small[body:end])
                    start = end
                break
            frames.append(bytes(small[body : body + size]))
            start = body + size
        if start:
            small[: end - start] = bytes(small[start:end])
            self._small_filled = end - start
        return frames

    def _begin_large(self, size: int, beginning: memoryview) -> None:
        self._large = memoryview(bytearray(size))
        self._large[: len(beginning)] = beginning
        self._large_filled = len(beginning)
