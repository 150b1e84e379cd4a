"""What a process has in hand, in a page of memory that it shares with who started it: read there when the process has died.

Decided here: what it takes to count a delivery of the item that ran, for a process that can say nothing any more. A store to memory for
each item, and some text for each take; nothing is sent for it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from typing import Any

SIZE = 4096
_HEAD = struct.Struct("<QQ")  # id of the item that runs, or 0; and how long the text behind this is
_ITEM = struct.Struct("<Q")


class InHand:
    """The page. `is_watched`: whether another process reads it."""

    def __init__(self, descriptor: int = -1) -> None:
        self.is_watched = descriptor >= 0
        self._page = mmap.mmap(descriptor, SIZE)

    def took(self, how: dict[str, Any]) -> None:
        """From here on items come by this take: what a `fail` says of each of them."""
        text = json.dumps(how).encode()
        assert len(text) <= SIZE - _HEAD.size, "names of queues are short"
        self._page[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._page, 0, 0, len(text))

    def begins(self, item_id: int) -> None:
        _ITEM.pack_into(self._page, 0, item_id)

    def ends(self) -> None:
        _ITEM.pack_into(self._page, 0, 0)

    def read(self) -> dict[str, Any] | None:
        """The fields of a `fail` for the item that runs, without its error; None where none runs."""
        item_id, length = _HEAD.unpack_from(self._page, 0)
        if not item_id:
            return None
        return {**json.loads(self._page[_HEAD.size : _HEAD.size + length]), "id": item_id}

    def close(self) -> None:
        self._page.close()


def new_page() -> int:
    """A descriptor for a page that a process may inherit. Raises `OSError`."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(SIZE))
        file.flush()
        descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, True)
    return descriptor
