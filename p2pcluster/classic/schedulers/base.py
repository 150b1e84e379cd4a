"""What a scheduler is: it decides which of the server's functions a client runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self


class ClientInfo(bytes):
    """What a client says of itself: `name, cores, memory_gb, tags, address`; and `runs`, the names of what clients of its machine were told
    to run and have not ended since. As bytes it is its name."""

    name: str
    cores: int
    memory_gb: float | None
    tags: tuple[str, ...]
    address: str
    runs: tuple[str, ...]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        made = cls(str(facts["name"]).encode())
        made.name, made.address = str(facts["name"]), str(facts["address"])
        made.cores, made.memory_gb = int(facts["cores"]), facts["memory_gb"]
        made.tags, made.runs = tuple(facts["tags"]), tuple(facts["runs"])
        return made

    def __repr__(self) -> str:
        return f"<client {json.dumps({name: getattr(self, name) for name in self.__annotations__})}>"


class BaseScheduler:
    """A scheduler of one's own has a `schedule` like this one's."""

    def schedule(self, info: ClientInfo, functions: Mapping[str, bytes]) -> Any:
        """What the client runs: some of `functions`, `{name: pickled [function, queues, count]}`, or such lists in their place, by name or
        in a list."""
        raise NotImplementedError
