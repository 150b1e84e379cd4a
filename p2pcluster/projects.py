"""The unpacked projects that stage processes run from: on this disk, out of this node's journal, or from the leader, part by part.

What a zip may hold is `bundle`'s word.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from p2pcluster import bundle
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Start
from p2pcluster.core.records import BundlePart
from p2pcluster.errors import ClusterError, ProjectError
from p2pcluster.journal import Journal


class Projects:
    """The folder of each version that is needed here. `start` is called once a process's project is here."""

    def __init__(self, folder: Path, journal: Journal, parts_of: Callable[[str], list[BundlePart] | None], to_leader: Callable[[Message], None],
                 start: Callable[[Start, Path], None],
                 on_failure: Callable[[int, str, int, list[str]], None], on_note: Callable[[str], None]) -> None:
        self._folder = folder
        self._journal = journal
        self._parts_of = parts_of
        self._to_leader = to_leader
        self._start = start
        self._on_failure = on_failure
        self._on_note = on_note
        self._waiting: dict[str, list[Start]] = {}
        self._fetched: dict[str, list[bytes]] = {}
        self._fetched_again: set[str] = set()

    def tidy(self, kept: Collection[str]) -> None:
        """At a node's start, when nothing runs from them: the folders of versions that no pipeline keeps go."""
        for folder in self._folder.iterdir() if self._folder.exists() else ():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed is in nobody's way, and tried again at the next start

    def provide(self, action: Start) -> None:
        """Start the process, now or when its project has come."""
        version = action.spec.version
        if not (self._folder / version).exists() and self._parts_of(version) is None:
            self._fetch(action)
            return
        try:
            folder = self.folder_of(version, action.project["zip_sha256"])
        except ClusterError as error:
            self._on_failure(action.key, f"could not be started ({error})", 0, [])
            return
        self._start(action, folder)

    def folder_of(self, version: str, zip_sha256: str) -> Path:
        """The unpacked project, of which this node has a copy. Raises `ClusterError` where it cannot be unpacked."""
        folder, parts = self._folder / version, self._parts_of(version)
        if not folder.exists():
            if parts is None:
                raise ProjectError(f"the project of version {version[:8]} is not on this node any more")
            bundle.unpack(self._journal.read_bundle(version, parts), zip_sha256, folder)
        return folder

    def _fetch(self, action: Start) -> None:
        version = action.spec.version
        self._waiting.setdefault(version, []).append(action)
        if version not in self._fetched:
            self._fetched[version] = []
            self._ask(version)

    def _ask(self, version: str) -> None:
        self._to_leader(Message("bundle_get", {"version": version, "part": len(self._fetched[version])}))

    def ask_again(self) -> None:
        """Somebody else leads: what was asked for may never have come."""
        for version in self._fetched:
            self._ask(version)

    def forget(self, key: int) -> bool:
        """Whether the process waits for its project; it then never starts."""
        for version, actions in self._waiting.items():
            kept = [action for action in actions if action.key != key]
            if len(kept) < len(actions):
                self._waiting[version] = kept
                if not kept:
                    self._fetched.pop(version, None)  # it may be gone there too, and then no part of it ever comes
                return True
        return False

    def slice_of(self, message: Message) -> Message | None:
        """For the leader: the part that a node or a client asks for; None where there is none."""
        version, number = message.fields["version"], message.fields["part"]
        parts = self._parts_of(version)
        if parts is None or number >= len(parts):
            return None
        return Message("bundle_slice", {"version": version, "part": number, "parts": len(parts)},
                       (self._journal.read_bundle_part(version, number, parts[number]),))

    def on_slice(self, message: Message) -> None:
        """A part has come: ask for the next, or begin. A bundle that was changed on its way is refused and fetched again."""
        version = message.fields["version"]
        fetched = self._fetched.get(version)
        if fetched is None or message.fields["part"] != len(fetched):
            return
        fetched.append(bytes(message.blobs[0]))
        if len(fetched) < message.fields["parts"]:
            self._ask(version)
            return
        del self._fetched[version]
        actions = self._waiting.pop(version, [])
        if actions:
            self._unpack(version, b"".join(fetched), actions)

    def _unpack(self, version: str, zip_bytes: bytes, actions: list[Start]) -> None:
        try:
            bundle.unpack(zip_bytes, actions[0].project["zip_sha256"], self._folder / version)
        except ClusterError as error:
            if version in self._fetched_again:
                self._fetched_again.discard(version)
                for action in actions:  # the process is tried again later, and with it this
                    self._on_failure(action.key, f"could not be started ({error})", 0, [])
                return
            self._fetched_again.add(version)
            self._on_note(f"the project of version {version[:8]} did not come whole and is fetched again: {error}")
        for action in actions:
            self.provide(action)
