"""A project that comes from the leader part by part, also when what comes is not what was announced."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest

from p2pcluster import bundle
from p2pcluster.core.codec import Message
from p2pcluster.core.executor import Spec, Start
from p2pcluster.projects import Projects

VERSION = "a" * 64


class Machine:
    """A node without the bundle, and what it says."""

    def __init__(self, folder: Path) -> None:
        source = folder / "source"
        source.mkdir()
        (source / "pipeline.py").write_text("x = 1\n" * 50)
        self.zip = bundle.pack(source).zip_bytes
        self.asked: list[int] = []
        self.started: list[Path] = []
        self.failed: list[str] = []
        self.notes: list[str] = []
        self.projects = Projects(folder / "bundles", cast(Any, None), lambda version: None, self._ask,
                                 lambda action, at: self.started.append(at), lambda key, how, running, stderr: self.failed.append(how),
                                 self.notes.append)

    def _ask(self, message: Message) -> None:
        assert message.kind == "bundle_get"
        self.asked.append(message.fields["part"])

    def want(self) -> None:
        spec = Spec("p", VERSION, 1, "S", "stage")
        self.projects.provide(Start(1, spec, {"zip_sha256": sha256(self.zip).hexdigest()}, None, "p/q"))

    def send(self, *parts: bytes) -> None:
        for number, part in enumerate(parts):
            self.projects.on_slice(Message("bundle_slice", {"version": VERSION, "part": number, "parts": len(parts)}, (part,)))

    @property
    def halves(self) -> tuple[bytes, bytes]:
        middle = len(self.zip) // 2
        return self.zip[:middle], self.zip[middle:]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_project_comes_part_by_part(machine: Machine) -> None:
    machine.want()
    machine.send(*machine.halves)
    assert (machine.asked, len(machine.started), machine.notes) == ([0, 1], 1, [])
    assert (machine.started[0] / "pipeline.py").exists()


@pytest.mark.parametrize("how", ["altered", "swapped", "cut", "empty", "longer"])
def test_a_project_that_was_changed_on_its_way_is_refused_and_fetched_again(machine: Machine, how: str) -> None:
    first, second = machine.halves
    wrong = {"altered": (first, second[:-1] + bytes([second[-1] ^ 1])), "swapped": (second, first), "cut": (first, second[:-1]),
             "empty": (b"", b""), "longer": (first, second + b"\0")}[how]
    machine.want()
    machine.send(*wrong)
    assert (machine.asked, machine.started, machine.failed, len(machine.notes)) == ([0, 1, 0], [], [], 1)
    assert "fetched again" in machine.notes[0]
    machine.send(first, second)
    assert (machine.asked, len(machine.started), len(machine.notes)) == ([0, 1, 0, 1], 1, 1)


def test_a_project_that_nobody_waits_for_any_more_is_asked_for_again_when_somebody_does(machine: Machine) -> None:
    """Its version went back before the first part had come, and who leads has it no more; then it is deployed again."""
    machine.want()
    assert machine.projects.forget(1)
    machine.want()
    assert machine.asked == [0, 0]
    machine.send(*machine.halves)
    assert len(machine.started) == 1


def test_folders_of_versions_that_nobody_keeps_go_at_a_start(machine: Machine, tmp_path: Path) -> None:
    machine.projects.tidy([VERSION])
    machine.want()
    machine.send(*machine.halves)
    (tmp_path / "bundles" / ("b" * 64)).mkdir()
    machine.projects.tidy([VERSION])
    assert [folder.name for folder in (tmp_path / "bundles").iterdir()] == [VERSION]


def test_parts_that_were_not_asked_for_or_come_twice_count_for_nothing(machine: Machine) -> None:
    first, second = machine.halves
    machine.send(first, second)
    machine.want()
    machine.projects.on_slice(Message("bundle_slice", {"version": VERSION, "part": 1, "parts": 2}, (second,)))
    machine.projects.on_slice(Message("bundle_slice", {"version": "b" * 64, "part": 0, "parts": 1}, (b"evil",)))
    machine.send(first, second)
    assert len(machine.started) == 1 and machine.notes == []


def test_a_project_that_never_comes_whole_ends_the_start_and_not_in_a_loop(machine: Machine) -> None:
    machine.want()
    machine.send(b"evil")
    machine.send(b"evil")
    assert (machine.asked, machine.started, len(machine.failed), len(machine.notes)) == ([0, 0], [], 1, 1)
    machine.want()
    machine.send(*machine.halves)
    assert len(machine.started) == 1, "the process is tried again later"
