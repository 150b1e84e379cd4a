"""Whatever an attacker without the key records, alters, repeats and delivers, to whom and when.

What counts is what a living program sealed: unaltered, once, and after the listener had asked it. Each of these checks
is shown to fail on a gate with a bug.
"""

from __future__ import annotations

import hmac
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import config
from p2pcluster.config import Address
from p2pcluster.core import datagram as module
from p2pcluster.core.datagram import Beacon, Gate, Heard, Outgoing, Reason, Refused, State
from p2pcluster.core.handshake import derive_key

KEY = derive_key(b"a key")
ACTIONS = ("say", "deliver", "alter", "cut", "noise", "wait", "restart")
ATTACKER = Address("10.6.6.6", 666)
NODES_MAX = 4

Action = tuple[str, int, int, int]
actions = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**16), st.integers(0, 2**16), st.integers(0, 2**16))

BEACON = Beacon(
    name="n", state=State.FRESH, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None,
    last_index=0, last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1,
    tcp_host=None, tcp_port=1, udp_port=1, interval_ms=50, package="0.1", python="3.11",
)  # fmt: skip


@dataclass
class Recorded:
    """A datagram as it was sealed: by which program, when, saying what."""

    data: bytes
    boot_id: str
    step: int
    said: int


class Program:
    def __init__(self, number: int, start: int) -> None:
        self.node_id = f"n{number}"
        self.boot_id = f"b{number}.{start}"
        self.address = Address(f"10.0.0.{number + 1}", 5000 + start)
        secret = bytes([number]) * 28 + start.to_bytes(4, "big")
        self.gate = Gate(KEY, "default", self.node_id, self.boot_id, secret, 1)
        self.asked_step: dict[str, int] = {}
        self.heard: set[tuple[str, int]] = set()


class World:
    """Programs on a network that belongs to the attacker: he sees everything, and nothing arrives but by him."""

    def __init__(self) -> None:
        self.step = 0
        self.now_ms = 0
        self.starts = 0
        self.recorded: list[Recorded] = []
        self.programs = [self._start(number) for number in range(NODES_MAX)]

    def _start(self, number: int) -> Program:
        self.starts += 1
        return Program(number, self.starts)

    def run(self, script: list[Action]) -> None:
        for action, one, two, three in script:
            self.step += 1
            getattr(self, action)(one, two, three)

    # What can happen

    def say(self, one: int, two: int, three: int) -> None:
        """An honest program says its beacon, which the others get, or only some of them."""
        program = self.programs[one % NODES_MAX]
        self.record(program, program.gate.seal(self.beacon(), broadcast=True))
        self.spread(program, self.recorded[-1].data, two)

    def deliver(self, one: int, two: int, three: int) -> None:
        """Something that was recorded, again, to anybody, from his own address or the right one."""
        if self.recorded:
            self.give(self.programs[two % NODES_MAX], self.recorded[one % len(self.recorded)].data, three)

    def alter(self, one: int, two: int, three: int) -> None:
        if not self.recorded:
            return
        data = bytearray(self.recorded[one % len(self.recorded)].data)
        data[three % len(data)] ^= 1 + three % 255
        self.give(self.programs[two % NODES_MAX], bytes(data), three)

    def cut(self, one: int, two: int, three: int) -> None:
        if self.recorded:
            data = self.recorded[one % len(self.recorded)].data
            self.give(self.programs[two % NODES_MAX], data[: three % len(data)], three)

    def noise(self, one: int, two: int, three: int) -> None:
        begin = (b"", module.MAGIC, module.MAGIC + b"\0\1\7default")[one % 3]
        data = random.Random(one).randbytes(three % (config.DATAGRAM_BYTES_MAX + 100))
        self.give(self.programs[two % NODES_MAX], begin + data, three)

    def wait(self, one: int, two: int, three: int) -> None:
        self.now_ms += one % 3000
        for program in self.programs:
            self.send(program, tuple(program.gate.repeat_questions(self.beacon(), self.now_ms)), two)

    def restart(self, one: int, two: int, three: int) -> None:
        self.programs[one % NODES_MAX] = self._start(one % NODES_MAX)

    # What follows

    def beacon(self) -> Beacon:
        """Different each time, so that what is heard can be told apart."""
        return replace(BEACON, last_index=self.step)

    def record(self, program: Program, data: bytes) -> None:
        self.recorded.append(Recorded(data, program.boot_id, self.step, len(self.recorded)))

    def spread(self, sender: Program, data: bytes, to: int) -> None:
        for place, program in enumerate(self.programs):
            if to >> place & 1:
                self.open(program, data, sender.address)

    def send(self, sender: Program, outgoing: tuple[Outgoing, ...], way: int) -> None:
        """An answer reaches whom it is for, or nobody."""
        for data, address in outgoing:
            self.record(sender, data)
            if way % 4:
                for program in self.programs:
                    if address in (None, program.address):
                        self.open(program, data, sender.address)

    def give(self, program: Program, data: bytes, way: int) -> None:
        known = [recorded for recorded in self.recorded if recorded.data == data]
        addresses = [p.address for p in self.programs if known and p.boot_id == known[0].boot_id]
        self.open(program, data, addresses[0] if addresses and way % 2 else ATTACKER)

    def open(self, listener: Program, data: bytes, address: Address) -> None:
        result = listener.gate.open(data, address, self.beacon(), self.now_ms)
        if isinstance(result, Heard):
            self.check_heard(listener, result, data)
        elif result.reason is Reason.UNPROVEN and result.answers:
            self.note_question(listener, data)
        self.check_bounds(listener)
        self.send(listener, result.answers, len(data))

    def note_question(self, listener: Program, data: bytes) -> None:
        for recorded in self.recorded:
            if recorded.data == data:
                listener.asked_step.setdefault(recorded.boot_id, self.step)

    def check_heard(self, listener: Program, heard: Heard, data: bytes) -> None:
        sealed = [recorded for recorded in self.recorded if recorded.data == data]
        assert sealed, "something counted that no honest program sealed"
        assert sealed[0].boot_id == heard.boot_id, "something counted for another than its sender"
        assert heard.boot_id != listener.boot_id, "a program heard itself"
        assert (heard.boot_id, sealed[0].said) not in listener.heard, "a datagram counted twice"
        asked_step = listener.asked_step.get(heard.boot_id)
        assert asked_step is not None, "something counted of a program that was never asked"
        assert sealed[0].step >= asked_step, "something counted that is older than the question"
        assert isinstance(heard.body, Beacon)
        assert heard.body.last_index == sealed[0].step, "something else was heard than was said"
        listener.heard.add((heard.boot_id, sealed[0].said))

    def check_bounds(self, listener: Program) -> None:
        assert len(listener.gate._strangers) <= module.STRANGERS_MAX
        assert len(listener.gate._windows) <= module.BOOTS_MAX
        assert len(listener.gate._told) <= module.TOLD_MAX


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=120))
def test_only_what_living_programs_sealed_counts_and_only_once(script: list[Action]) -> None:
    World().run(script)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=1300))
def test_noise_is_refused_with_a_reason(data: bytes) -> None:
    gate = Gate(KEY, "default", "n1", "b1", bytes(32), 1)
    result = gate.open(data, ATTACKER, BEACON, 0)
    assert isinstance(result, Refused)
    assert result.answers == ()
    assert all(note.isprintable() for note in gate.take_notes())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_noise_behind_a_true_beginning_is_refused(tail: bytes, keep: int) -> None:
    sender = Gate(KEY, "default", "n1", "b1", bytes(32), 1)
    listener = Gate(KEY, "default", "n2", "b2", bytes(32), 1)
    data = sender.seal(BEACON)
    forged = data[:keep] + tail
    result = listener.open(forged, ATTACKER, BEACON, 0)
    assert isinstance(result, Refused)
    assert forged == data or result.reason is not Reason.UNPROVEN


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200))
def test_a_window_lets_each_number_through_once(counters: list[int]) -> None:
    window = module._Window(0)
    counted: list[int] = []
    for counter in counters:
        if window.reason_against(counter) is None:
            window.add(counter)
            counted.append(counter)
    assert len(set(counted)) == len(counted)
    highest = 0
    for counter in counters:
        if counter > highest - module.REORDER_MAX:
            assert counter in counted, "a number was refused that had not come before and was not far behind"
        highest = max(highest, counter)


# --- The checks can fail


def random_script(seed: int, size: int = 150) -> list[Action]:
    chance = random.Random(seed)
    weights = (6, 8, 1, 1, 1, 2, 1)
    return [
        (chance.choices(ACTIONS, weights)[0], chance.randrange(2**16), chance.randrange(2**16), chance.randrange(2**16))
        for _ in range(size)
    ]


def counts_whatever_comes(gate: Gate, body: Any, stranger: Any) -> bool:
    return True


def takes_any_answer(gate: Gate, body: Any, stranger: Any) -> bool:
    return isinstance(body, module._Answer)


class OpenWindow(module._Window):
    """Forgets what has counted."""

    __slots__ = ()

    def add(self, counter: int) -> None:
        pass


class KindWindow(module._Window):
    """Lets those through that were sealed just before the answer."""

    __slots__ = ()

    def __init__(self, highest: int) -> None:
        super().__init__(highest)
        self._seen = 1


BUGS: dict[str, tuple[object, str, Any]] = {
    "no question is asked": (Gate, "_is_answer", counts_whatever_comes),
    "any answer will do": (Gate, "_is_answer", takes_any_answer),
    "a number counts again": (module, "_Window", OpenWindow),
    "numbers before the answer count": (module, "_Window", KindWindow),
    "the tag is not compared": (hmac, "compare_digest", lambda one, other: True),
    "strangers are kept for ever": (Gate, "_stranger", None),
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_check_fails_on_a_gate_with_a_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, name, wrong = BUGS[bug]
    if bug == "strangers are kept for ever":
        monkeypatch.setattr(module, "STRANGERS_MAX", 2)
        monkeypatch.setattr(Gate, "_stranger", unbounded(Gate._stranger))
    else:
        monkeypatch.setattr(target, name, wrong)
    assert any(fails(random_script(seed)) for seed in range(40)), f"nobody notices: {bug}"


def unbounded(stranger_of: Callable[..., Any]) -> Callable[..., Any]:
    def keep(gate: Gate, key: Any, address: Address, now_ms: int) -> Any:
        kept = dict(gate._strangers)
        stranger = stranger_of(gate, key, address, now_ms)
        for other, value in kept.items():
            gate._strangers.setdefault(other, value)
        return stranger

    return keep


def test_the_scripts_that_find_the_bugs_pass_without_them() -> None:
    assert not any(fails(random_script(seed)) for seed in range(40))


def fails(script: list[Action]) -> bool:
    try:
        World().run(script)
    except AssertionError:
        return True
    return False


def test_the_scripts_exercise_what_they_are_about() -> None:
    heard = 0
    reasons: set[Reason] = set()
    for seed in range(30):
        world = World()
        world.run(random_script(seed))
        for program in world.programs:
            heard += program.gate.heard_count
            reasons |= program.gate.refused_counts.keys()
    assert heard > 100
    assert {Reason.UNPROVEN, Reason.REPEATED, Reason.OWN, Reason.TAG, Reason.CUT, Reason.NOT_OURS} <= reasons
