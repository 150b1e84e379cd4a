"""Who talks to the leader, and what is known of them: this machine's own executor, other nodes' executors, clients.

To the core they are names with a kind; how bytes reach them is the shell's affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOCAL_SESSION = "local"  # of the machine's own executor, whose messages are not looked at twice


@dataclass(slots=True)
class Session:
    """Somebody who talks to the leader. `windows`: for a node how many items of a queue it wants to hold, for a client how many more.
    `is_watched`: of a client that somebody else watches, who can say what ran when it has died."""

    id: str
    kind: str
    node: str
    boot: str
    name: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    has_reported: bool = False
    is_watched: bool = False
    is_leaving: bool = False
    is_draining: bool = False
    windows: dict[str, int] = field(default_factory=dict)
    take_requests: dict[str, int] = field(default_factory=dict)
    service_us: dict[str, float] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)  # by pipeline what became of a version that is rolled out
    versions: dict[str, str] = field(default_factory=dict)  # by pipeline the one that it was told last to run
    planned: dict[str, Any] | None = None
    told_alarms: frozenset[str] = frozenset()  # the kinds of those that its terminal knows of
    seen: dict[str, int] = field(default_factory=dict)
    held_puts: int = 0
    held_bytes: int = 0
