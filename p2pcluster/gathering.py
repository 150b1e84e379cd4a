"""What stages printed, gathered from every machine for a client that asked.

The node that leads asks all that it is connected to, and answers when all have answered or the time is over; of whom it then says that they
are away. Each machine answers from its own memory: nothing of this is in the log, and nobody waits for it but who asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from p2pcluster import config
from p2pcluster.core.codec import Buffer, Message
from p2pcluster.logbook import Logbook

ASKED_MAX = 100  # questions of clients at a time


@dataclass(slots=True)
class _Asked:
    """A client's question. `answers` by node: what it said, and the bytes."""

    session: str
    request: int
    due_ms: int
    waits_for: set[str]
    bytes_max: int
    answers: dict[str, tuple[dict[str, Any], tuple[Buffer, ...]]] = field(default_factory=dict)


class Gathering:
    """See the module. `send` says something to a node; `reply` to a client; `members` are the nodes of the cluster with their names."""

    def __init__(self, node_id: str, boot: str, logbook: Logbook, send: Callable[[str, Message], bool],
                 reply: Callable[[str, Message], None], members: Callable[[], dict[str, str]]) -> None:
        self._node_id = node_id
        self._boot = boot
        self._logbook = logbook
        self._send = send
        self._reply = reply
        self._members = members
        self._asked: dict[int, _Asked] = {}
        self._next = 1

    def ask(self, session: str, message: Message, now_ms: int) -> None:
        """A client wants lines: of a pipeline and a stage, or of all, behind those that it has."""
        fields, nodes = message.fields, self._members()
        if len(self._asked) >= ASKED_MAX:
            refusal = {"req": fields["req"], "kind": "logs", "result": "refused", "code": "too_many_asked",
                       "text": f"{ASKED_MAX} programs ask for lines at this moment: ask again"}
            self._reply(session, Message("reply", refusal))
            return
        number, self._next = self._next, self._next + 1
        bytes_max = min(config.LOG_ANSWER_BYTES_MAX, config.LOG_ANSWERS_BYTES_MAX // max(1, len(nodes)))
        asked = self._asked[number] = _Asked(session, fields["req"], now_ms + int(1000 * config.LOG_GATHER_S), set(), bytes_max)
        for node in sorted({*nodes, self._node_id}):
            question = Message("logs", {"ask": number, "pipeline": fields["pipeline"], "stage": fields["stage"],
                                        "after": fields["after"].get(node, {}), "bytes_max": bytes_max})
            if node == self._node_id:
                self.on_lines(node, self.answer(question))
            elif self._send(node, question):
                asked.waits_for.add(node)
        self._finish(number)

    def answer(self, message: Message) -> Message:
        """What this machine has of it. Line numbers of a former start of this node count for nothing."""
        fields = message.fields
        after = fields["after"].get("stages", {}) if fields["after"].get("boot") == self._boot else {}
        pieces = list(self._logbook.since(fields["pipeline"], fields["stage"], after, fields["bytes_max"]))
        stages = [[piece.stage, piece.first, piece.line_count] for piece in pieces]
        return Message("log_lines", {"ask": fields["ask"], "boot": self._boot, "stages": stages}, tuple(piece.lines for piece in pieces))

    def on_lines(self, node: str, message: Message) -> None:
        """A machine's answer. One that is longer than was asked for is none: all of them have to fit into one message."""
        asked = self._asked.get(message.fields["ask"])
        if asked is not None and sum(map(len, message.blobs)) <= asked.bytes_max and (node == self._node_id or node in asked.waits_for):
            asked.waits_for.discard(node)
            asked.answers[node] = {"boot": message.fields["boot"], "stages": message.fields["stages"]}, message.blobs
            if node != self._node_id:
                self._finish(message.fields["ask"])

    def tick(self, now_ms: int) -> None:
        """Answer what has waited long enough."""
        for number, asked in list(self._asked.items()):
            if now_ms >= asked.due_ms:
                asked.waits_for.clear()
                self._finish(number)

    def _finish(self, number: int) -> None:
        asked = self._asked[number]
        if asked.waits_for:
            return
        del self._asked[number]
        names = {self._node_id: "", **self._members()}
        nodes = [{"node": node, "name": names.get(node, node), "is_here": node in asked.answers,
                  **asked.answers.get(node, ({"boot": "", "stages": []}, ()))[0]} for node in sorted({*names, *asked.answers})]
        blobs = tuple(blob for node in nodes for blob in asked.answers.get(node["node"], ({}, ()))[1])
        self._reply(asked.session, Message("reply", {"req": asked.request, "kind": "logs", "result": "ok", "nodes": nodes}, blobs))
