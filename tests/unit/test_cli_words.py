"""The command line's words: each verb explains each of its words with an example, and what is mistyped is answered in one line with what was
meant."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from p2pcluster import cli, patience
from p2pcluster.client import Link
from p2pcluster.config import Options
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterNotFound


def parsers() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(verbs.choices)


@pytest.mark.parametrize("verb", parsers())
def test_each_word_of_a_verb_is_explained_and_its_example_can_be_typed(verb: str) -> None:
    parser = parsers()[verb]
    assert [action.dest for action in parser._actions if not action.help] == []
    assert parser.description and parser.epilog and parser.epilog.startswith("example: python -m p2pcluster ")
    words = shlex.split(parser.epilog.removeprefix("example: python -m p2pcluster ").partition(" < ")[0])
    assert words[0] == verb and cli.parse(cli._with_verb(words)).verb == verb


@pytest.mark.parametrize("verb", parsers())
def test_each_verb_does_something(verb: str) -> None:
    assert verb in cli._VERBS and set(cli._VERBS) == set(parsers())


@pytest.mark.parametrize(("typed", "answer"), [
    ("statsu", "there is no verb 'statsu'; did you mean status?"),
    ("puase Train", "there is no verb 'puase'; did you mean pause?"),
    ("xyzzy", "there is no verb 'xyzzy'; see python -m p2pcluster --help"),
    ("status --jsn", "status has no option --jsn; did you mean --json?; see python -m p2pcluster status --help"),
    ("run --untildone", "run has no option --untildone; did you mean --until-done?; see python -m p2pcluster run --help"),
    ("--agian", "run has no option --agian; did you mean --again?; see python -m p2pcluster run --help"),
    ("parked shwo", "'shwo' is none of list, show, retry, discard; did you mean show?; see python -m p2pcluster parked --help"),
    ("put q file more", "put does not take another word, 'more'; see python -m p2pcluster put --help"),
    ("scale Train", "the following arguments are required: N; see python -m p2pcluster scale --help"),
    ("take q -n many", "argument -n: invalid int value: 'many'; see python -m p2pcluster take --help"),
])
def test_a_mistyped_word_is_answered_in_one_line_with_what_was_meant(typed: str, answer: str, capsys: pytest.CaptureFixture[str],
                                                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(typed))
    assert end.value.code == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"p2pcluster: {answer}\n")


@pytest.mark.parametrize(("typed", "processes"), [("4", 4), ("auto", "auto"), ("code", None), ("0", 0), ("-1", -1), ("many", "many")])
def test_a_number_of_processes_is_read_as_it_is_meant(typed: str, processes: Any) -> None:
    assert cli.parse(["scale", "Train", "--", typed]).processes == processes


# ---- waiting


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SAID_AFTER_S", 0.01)


def said(waiting: patience.Waiting, capsys: pytest.CaptureFixture[str]) -> str:
    """What is on standard error once the time is over: it is not looked at while it is written."""
    assert waiting._timer is not None
    waiting._timer.join(30)
    return capsys.readouterr().err


def test_who_waits_is_told_for_what_and_why_once(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = patience.Waiting()
    waiting.what = "a node of cluster 'default', at most 10 s"
    waiting.hear(ClusterNotFound("nobody listens there"))
    with waiting:
        assert said(waiting, capsys) == "waiting for a node of cluster 'default', at most 10 s (nobody listens there)\n"
    waiting.hear(None)
    waiting.what = "an answer of the node that leads"
    with waiting:
        assert said(waiting, capsys) == "waiting for an answer of the node that leads\n"
    with waiting:
        assert said(waiting, capsys) == ""


def test_who_need_not_wait_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with patience.Waiting():
        pass
    assert capsys.readouterr().err == ""


def test_a_verb_that_waits_for_room_says_so(impatient: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Link, message: Message, timeout_s: float | None = None) -> Message:
        assert isinstance(self, patience.TellingLink)
        told.append(said(self._waiting, capsys))
        return message

    told: list[str] = []
    monkeypatch.setattr(Link, "__init__", lambda self, *words, **named: None)
    monkeypatch.setattr(Link, "call", slow)
    link = patience.TellingLink(Options(), 10.0)
    link.call(Message("put", {}))
    link.call(Message("status", {}))
    assert told == ["waiting for room in a full queue\n", "waiting for an answer of the node that leads\n"]
