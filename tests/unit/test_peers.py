"""Dialling others: strangers who answer there, and nobody who does."""

from __future__ import annotations

import selectors
from typing import Any, cast

from p2pcluster.config import Address
from p2pcluster.core.handshake import Handshake
from p2pcluster.peers import REDIAL_S_MAX, TOLD_MAX, Events, Peers


def peers(notes: list[str]) -> Peers:
    def nothing(*_: object) -> None: ...

    return Peers("n", selectors.DefaultSelector(), lambda: cast(Handshake, None), Events(nothing, nothing, nothing, nothing, notes.append))


def test_an_address_where_nobody_answers_is_dialled_for_ever() -> None:
    made: Any = peers([])
    made.want("m", Address("127.0.0.1", 9), "m")
    target = made._targets["m"]
    for now_s in range(3000):
        made._again(target, float(now_s))
        assert 0 < target.next_s - now_s <= REDIAL_S_MAX


def test_a_stranger_who_says_something_else_each_time_is_told_of_once() -> None:
    notes: list[str] = []
    made: Any = peers(notes)
    for number in range(50):
        made._tell(("10.0.0.1:1", "authentication"), f"refused, and says {number}")
    assert len(notes) == 1
    for number in range(2 * TOLD_MAX):
        made._tell((f"10.0.{number // 256}.{number % 256}:1", "authentication"), "refused")
    assert len(notes) == TOLD_MAX
