"""The scripts show what a journal holds, of a running node too, and change nothing and run nothing of a user's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pytest

from p2pcluster.core import commands
from p2pcluster.core.codec import Message, encode_bytes
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.log import COMMANDS, CONFIG, Entry
from p2pcluster.core.messages import encode_configuration
from p2pcluster.core.quorum import Configuration
from p2pcluster.journal import Write, apply_entry, back_up, checkpoint_of
from tests.journals import ERROR, FENCES, Scribe, encoded, mixed

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _journal  # noqa: E402
import journal_check  # noqa: E402
import journal_show  # noqa: E402
import journal_stats  # noqa: E402


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """One of the scripts, as a person runs it."""
    return subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, words)], capture_output=True,
                          text=True, timeout=60, check=False)


class Printed(Protocol):
    def __call__(self, *words: object, show: Any = ...) -> str: ...


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What a script prints that is run to its end in this process."""

    def run(*words: object, show: Any = journal_show) -> str:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        assert show.main() == 0
        return capsys.readouterr().out

    return run


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file of a folder but SQLite's shared memory, which is made anew by whoever reads."""
    files = (path for path in folder.iterdir() if not path.name.endswith("-shm"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def whole(path: Path) -> journal_check.Report:
    report = journal_check.check(_journal.place_of(str(path)))
    assert report.is_whole, report
    return report


class Bomb:
    """Loading one leaves a file."""

    path: Path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home of a node that was closed: items in every state, some put with keys, one that is a bomb."""
    Bomb.path = tmp_path / "exploded"
    scribe = Scribe(tmp_path / "home", Random(5))
    scribe.begin()
    lengths, body = encoded([{"n": 1}, ("two", 2), "three", None, b"five", Bomb()])
    source = {"count": 6, "hash": "", "finished": True}
    scribe.commit(commands.put("source:mix/1/gen/0", 1, 1, [Port(["mix/work"], lengths, body)], source))
    fed = encoded([{"a": 1}, {"a": 2}], "json")
    scribe.commit(commands.put("client", 0, 1, [Port(["mix/fed"], *fed, None, json.dumps(["red", None]).encode())]))
    scribe.commit(commands.take("mix/work", [(1, 4)], FENCES[0]), checkpoint=True)
    for _ in range(2):
        scribe.commit(commands.fail("mix/work", 1, FENCES[0], ERROR, 100))
        scribe.commit(Message("due", {"queue": "mix/work", "ids": [1]}), commands.take("mix/work", [(1, 2)], FENCES[0]))
    scribe.commit(commands.fail("mix/work", 2, FENCES[0], ERROR, 700))
    scribe.commit(commands.done("mix/work", [(4, 5)], [Port(["mix/print"], *encoded([4]))]))
    scribe.close()
    return tmp_path / "home"


# ---- journal_show


def test_the_overview_tells_term_vote_members_pipelines_and_queues(home: Path, printed: Printed) -> None:
    text = printed(home)
    for part in ("format 3, closed in order", "node-a of cluster test (cluster-1)", "1, voted for node-a",
                 "entries 1 to 16", "node-b other", "mix version v1, run 1 running",
                 "source:mix/1/gen/0 epoch 1, 6 values, finished"):
        assert part in text
    (found,) = records(printed(home, "--json"))
    assert found["voted_for"] == "node-a"
    assert [member["node"] for member in found["members"]] == ["node-a", "node-b"]
    assert found["log"] == {**found["log"], "first": 1, "last": 16, "committed": 16, "tables_at": 16}
    assert {queue["queue"] for queue in found["queues"]} == {
        "mix/work", "mix/both", "mix/print", "mix/fed", "mix/eat.results"}


def test_the_overview_tells_the_voters_that_the_log_has(tmp_path: Path, printed: Printed) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    body = encode_configuration(Configuration(("a", "b", "c"), (), ("d",)))
    assert "voters    none" in printed(tmp_path / "home")
    scribe.journal.write(Write((Entry(1, 1, 5, CONFIG, body),), None, 1, True))
    scribe.journal.close()
    assert whole(tmp_path / "home").last == 1
    assert "voters    a, b, c; learners d" in printed(tmp_path / "home")
    (found,) = records(printed(tmp_path / "home", "--entries", "--json"))
    assert found["configuration"] == {"voters": ["a", "b", "c"], "voters_old": [], "learners": ["d"]}


def test_items_are_shown_in_every_state_with_their_values(home: Path, printed: Printed) -> None:
    found = {record["id"]: record for record in records(printed(home, "--items", "work", "--json"))}
    assert {number: found[f"mix/work:{number}"]["state"] for number in (1, 2, 3, 5, 6)} == {
        1: "parked", 2: "delayed", 3: "leased", 5: "ready", 6: "ready"}
    assert len(found) == 5, "the fourth is done"
    assert found["mix/work:1"]["value"] == {"n": 1}
    assert found["mix/work:1"]["error"] == ERROR
    assert found["mix/work:2"]["python"] == "('two', 2)"
    assert found["mix/work:2"]["deliveries"] == 1
    assert 0 < found["mix/work:2"]["due_in_ms"] <= 700
    assert found["mix/work:3"]["value"] == "three"
    assert found["mix/work:3"]["lease"] == {"node": "node-a", "boot": "boot-1", "seq": 7}
    assert found["mix/work:5"]["python"] == "b'five'"
    assert "it names " in found["mix/work:6"]["not_plain"]
    assert any("touch" in line for line in found["mix/work:6"]["disassembly"])


def test_items_of_a_queue_fed_in_json_with_keys(home: Path, printed: Printed) -> None:
    found = records(printed(home, "--items", "mix/fed", "--json"))
    assert [(record["key"], record["value"]) for record in found] == [("red", {"a": 1}), (None, {"a": 2})]
    text = printed(home, "--items", "fed", "-n", "1")
    assert "mix/fed:1  ready" in text
    assert "key 'red'" in text
    assert "value: {'a': 1}" in text
    assert "mix/fed:2" not in text


def test_parked_items_are_shown_with_why_traceback_and_stderr(home: Path, printed: Printed) -> None:
    text = printed(home, "--parked")
    for part in ("mix/work:1  parked", "deliveries 2", "why: ValueError: no", "Traceback (most recent call last):",
                 "      another", "value: {'n': 1}"):
        assert part in text
    (found,) = records(printed(home, "--parked", "--json"))
    assert found["error"]["traceback"] == ERROR["traceback"]


def test_queues_are_counted(home: Path, printed: Printed) -> None:
    found = {record["queue"]: record for record in records(printed(home, "--queues", "--json"))}
    work = found["mix/work"]
    assert [work[name] for name in ("ready", "leased", "delayed", "parked", "put", "done")] == [2, 1, 1, 1, 6, 1]
    assert found["mix/fed"]["keys"] == 1
    assert "ready 2  leased 1  delayed 1  parked 1  put 6  done 1" in printed(home, "--queues")


def test_entries_are_shown_with_their_commands(home: Path, printed: Printed) -> None:
    found = records(printed(home, "--entries", "--json"))
    assert [record["index"] for record in found] == list(range(1, 17))
    assert found[0]["kind"] == "noop"
    put = found[7]["commands"][0]
    assert put["command"] == "put"
    assert put["ports"] == [{"queues": ["mix/work"], "items": 6, "bytes": put["ports"][0]["bytes"]}]
    text = printed(home, "--entries", "-n", "2")
    assert [line.split()[0] for line in text.splitlines() if not line.startswith(" ")] == ["15", "16"]
    assert 'done {"queue": "mix/work", "ranges": [[4, 5]]' in text


def test_what_is_not_committed_is_marked_and_not_applied(tmp_path: Path, printed: Printed) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    member = Message("member", {"node": "node-c", "name": "late", "facts": {}})
    scribe.journal.write(Write((Entry(scribe.index + 1, 2, 9000, COMMANDS, encode_bytes(member)),), None, scribe.index))
    scribe.journal.abandon()
    found = records(printed(tmp_path / "home", "--entries", "--json"))
    assert [record["committed"] for record in found[-2:]] == [True, False]
    assert "node-c" not in printed(tmp_path / "home")
    assert "not committed" in printed(tmp_path / "home", "--entries")


def test_the_state_is_the_one_of_now_and_not_of_the_last_checkpoint(tmp_path: Path, printed: Printed) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    scribe.commit(commands.put("client", 0, 1, [Port(["mix/both"], *encoded([1, 2, 3]))]), checkpoint=True)
    scribe.commit(commands.done("mix/both", [(1, 3)], []))
    found = records(printed(tmp_path / "home", "--items", "both", "--json"))
    assert [record["value"] for record in found] == [3]
    scribe.journal.abandon()


def test_versions_on_their_way_and_those_that_went_back_are_shown(printed: Printed) -> None:
    lines = printed(SCRIPTS.parent / "tests" / "golden" / "journal_v3.sqlite3").splitlines()
    assert "rollout   p from version v1, so far on node-a" in lines
    assert "went back w version w2: eat on host does not start: No module named 'rare'" in lines


def test_an_unknown_queue_is_named_with_those_that_there_are(home: Path) -> None:
    done = script("journal_show", home, "--items", "wrok")
    assert done.returncode == 1
    assert done.stderr == ("journal_show: 'wrok' is no queue of this journal: name one of mix/both, mix/eat.results, "
                           "mix/fed, mix/print, mix/work\n")


@pytest.mark.parametrize("words", [["--follow"], ["--count", "3"], ["--entries", "--queues"], []])
def test_words_that_do_not_go_together_are_wrong_usage(home: Path, words: list[str]) -> None:
    assert script("journal_show", *([home, *words] if words else [])).returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error(home: Path) -> None:
    process = subprocess.Popen([sys.executable, str(SCRIPTS / "journal_show.py"), str(home), "--entries"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 0
    process.stderr.close()


class Following:
    """`journal_show --entries --follow` that runs."""

    def __init__(self, home: Path, *words: str) -> None:
        command = [sys.executable, SCRIPTS / "journal_show.py", home, "--entries", "--follow", "--json", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self._lines = self.process.stdout

    def next(self) -> int:
        index: int = json.loads(self._lines.readline())["index"]
        return index

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


def test_new_entries_are_followed_as_they_are_committed(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    last = scribe.index
    following = Following(tmp_path / "home", "-n", "2", "--count", "5")
    assert [following.next(), following.next()] == [last - 1, last]
    scribe.wander(1)
    assert following.next() == last + 1
    scribe.wander(4)
    assert [following.next(), following.next()] == [last + 2, last + 3]
    assert following.end() == (0, "", "")
    scribe.journal.abandon()


def test_following_goes_on_over_a_compaction_and_ends_at_an_interrupt(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    following = Following(tmp_path / "home", "-n", "1")
    assert following.next() == scribe.index
    scribe.wander(30, compact_every=10)
    seen = [following.next()]
    while seen[-1] < scribe.index:
        seen.append(following.next())
    assert seen == list(range(seen[0], scribe.index + 1))
    following.process.send_signal(signal.SIGINT)
    assert following.end() == (130, "", "")
    scribe.journal.abandon()


# ---- what all of them must leave alone


@pytest.mark.parametrize("state", ["closed", "killed", "backup"])
def test_no_script_changes_a_file(tmp_path: Path, state: str, printed: Printed) -> None:
    scribe = mixed(tmp_path / "home", 4, from_start=False, steps=20)
    folder = tmp_path / "looked at"
    if state == "killed":
        scribe.killed(folder)
    scribe.close()
    if state == "closed":
        shutil.copytree(tmp_path / "home", folder)
    elif state == "backup":
        folder.mkdir()
        back_up(tmp_path / "home" / "journal.sqlite3", folder / "journal.sqlite3")
    before = fingerprints(folder)
    for show, words in (
        (journal_check, []), (journal_stats, []), (journal_show, []), (journal_show, ["--items", "work"]),
        (journal_show, ["--entries"]), (journal_show, ["--entries", "--follow", "--count", "1"]),
    ):
        assert printed(folder / "journal.sqlite3", *words, show=show)
        assert fingerprints(folder) == before, (show, words)


def test_no_script_runs_what_a_value_asks_for(home: Path, printed: Printed) -> None:
    for show, words in ((journal_check, []), (journal_stats, []), (journal_show, ["--items", "work"]),
                        (journal_show, ["--parked"]), (journal_show, ["--entries"])):
        assert printed(home, *words, show=show)
    assert not Bomb.path.exists()
    pickle.loads(pickle.dumps(Bomb(), 5))
    assert Bomb.path.exists(), "the bomb would have been noticed"


def test_a_journal_is_looked_at_while_it_is_written(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            scribe.wander(6, checkpoint_every=3, compact_every=2)
            scribe.journal.checkpoint_wal()

    writer = threading.Thread(target=write)
    writer.start()
    with contextlib.ExitStack() as stack:
        stack.callback(writer.join)
        stack.callback(stop.set)
        looks = [whole(tmp_path / "home").last for _ in range(10)]
        with _journal.view(_journal.place_of(str(tmp_path / "home"))) as shown:
            assert journal_stats.stats(shown)["log"]["last"] >= looks[-1]
            for queue in shown.state.queues.values():
                assert len(list(journal_show.items_of(shown, queue))) == queue.open_count + len(queue.parked)
    assert looks == sorted(looks)
    assert looks[-1] > looks[0], "it was written meanwhile"
    scribe.close()


# ---- journal_check


def test_a_whole_journal_is_said_to_be_whole(tmp_path: Path) -> None:
    scribe = mixed(tmp_path / "home", 2, from_start=True, steps=20)
    killed = scribe.killed(tmp_path / "killed")
    scribe.close()
    done = script("journal_check", tmp_path / "home")
    assert done.returncode == 0
    assert done.stdout.startswith("whole: 27 entries (1 to 27), ")
    assert "replayed from the start" in done.stdout
    assert whole(killed).digest == whole(tmp_path / "home").digest, "a kill and an end in order leave the same"
    copy = tmp_path / "copy.sqlite3"
    back_up(tmp_path / "home" / "journal.sqlite3", copy)
    assert whole(copy).digest == whole(tmp_path / "home").digest


def test_a_compacted_log_holds_what_the_whole_one_held(tmp_path: Path) -> None:
    for name, from_start in (("long", True), ("short", False)):
        mixed(tmp_path / name, 3, from_start, steps=40).close()
    long, short = whole(tmp_path / "long"), whole(tmp_path / "short")
    assert short.first > 1 and "the start is compacted away" in str(short)
    assert (long.digest, long.open, long.parked) == (short.digest, short.open, short.parked)


def test_a_configuration_beside_the_tables_that_is_not_the_log_s_is_a_problem(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    logged, other = Configuration(("a", "b", "c"), (), ()), Configuration(("a",), (), ())
    entry = Entry(scribe.index + 1, 1, 9000, CONFIG, encode_configuration(logged))
    scribe.journal.write(Write((entry,), None, entry.index, True))
    apply_entry(scribe.state, entry)
    scribe.journal.write(Write(commit_index=entry.index, checkpoint=checkpoint_of(scribe.state), configuration=logged))
    assert whole(tmp_path / "home").last == entry.index
    scribe.journal.write(Write(commit_index=entry.index, checkpoint=checkpoint_of(scribe.state), configuration=other))
    scribe.journal.close()
    assert "the configuration beside the tables is" in str(journal_check.check(_journal.place_of(str(tmp_path / "home"))))


def test_one_value_more_is_another_digest(tmp_path: Path) -> None:
    digests = set()
    for value in (1, 2):
        scribe = Scribe(tmp_path / f"home{value}", Random(1))
        scribe.begin()
        scribe.commit(commands.put("client", 0, 1, [Port(["mix/both"], *encoded([value]))]))
        scribe.close()
        digests.add(whole(tmp_path / f"home{value}").digest)
    assert len(digests) == 2


def test_damage_is_one_line_for_each_problem_with_the_first_bad_entry(tmp_path: Path) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.begin()
    value = b"a value that is easily found"
    scribe.commit(commands.put("client", 0, 1, [Port(["mix/both"], lengths_blob([len(value)]), value)]))
    bad = scribe.index
    scribe.wander(3)
    scribe.close()
    path = tmp_path / "home" / "journal.sqlite3"
    data = path.read_bytes()
    assert data.count(value) == 1
    path.write_bytes(data.replace(value, value.upper()))
    done = script("journal_check", tmp_path / "home")
    assert done.returncode == 1
    assert done.stdout == f"damaged at entry {bad}: entry {bad} is damaged\n"


def test_a_mark_that_cannot_be_read_is_a_problem(home: Path) -> None:
    (home / "journal.mark").write_bytes(b"x" * 128)
    report = journal_check.check(_journal.place_of(str(home)))
    assert str(report) == "damaged: the mark beside the file is not readable"


def test_a_journal_about_to_be_made_is_whole_and_one_that_was_emptied_is_not(home: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "journal.sqlite3").touch()
    assert whole(empty).last == 0
    (home / "journal.sqlite3").write_bytes(b"")
    assert "it is empty and had committed" in str(journal_check.check(_journal.place_of(str(home))))


def test_tables_of_another_make_are_a_problem(home: Path) -> None:
    db = sqlite3.connect(home / "journal.sqlite3")
    db.execute("ALTER TABLE members ADD COLUMN colour TEXT")
    db.commit()
    db.close()
    assert "the definition of table members is not the one" in str(journal_check.check(_journal.place_of(str(home))))


def test_a_row_that_was_changed_by_hand_is_found(home: Path) -> None:
    db = sqlite3.connect(home / "journal.sqlite3")
    db.execute("UPDATE queues SET done = done + 1 WHERE name = 'mix/work'")
    db.commit()
    db.close()
    assert "table queues, row ('mix/work',) is damaged" in str(journal_check.check(_journal.place_of(str(home))))


def test_a_row_that_was_taken_away_by_hand_is_found(home: Path) -> None:
    db = sqlite3.connect(home / "journal.sqlite3")
    db.execute("DELETE FROM parked")
    db.commit()
    db.close()
    assert "table parked does not add up" in str(journal_check.check(_journal.place_of(str(home))))


@pytest.mark.parametrize("name", ["journal_check", "journal_show", "journal_stats"])
def test_what_is_no_journal_is_one_line(tmp_path: Path, name: str) -> None:
    done = script(name, tmp_path)
    assert done.returncode == 1
    missing = tmp_path / "journal.sqlite3"
    assert done.stderr == f"{name}: there is no journal at {missing}: name a node's home or the file itself\n"
    (tmp_path / "notes.txt").write_text("not a journal\n" * 100)
    done = script(name, tmp_path / "notes.txt")
    assert done.returncode == 1
    assert len((done.stdout + done.stderr).splitlines()) <= 2
    assert "Traceback" not in done.stdout + done.stderr
    db = sqlite3.connect(tmp_path / "other.sqlite3")
    db.execute("CREATE TABLE other (a)")
    db.commit()
    db.close()
    done = script(name, tmp_path / "other.sqlite3")
    assert done.returncode == 1
    assert "not a journal of p2pcluster" in done.stderr


# ---- journal_stats


def test_entries_commands_tables_and_queues_are_counted(home: Path, printed: Printed) -> None:
    found = json.loads(printed(home, "--json", show=journal_stats))
    assert found["entries"]["noop"]["count"] == 1
    assert found["entries"]["commands"]["count"] == 15
    assert {name: record["count"] for name, record in found["commands"].items()} == {
        "member": 2, "bundle_part": 2, "deploy": 1, "start_run": 1, "assign": 1, "put": 2, "take": 3, "fail": 3,
        "due": 2, "done": 1}
    assert found["items_put_per_entry"] == {"count": 3, "sum": 9, "mean": 3.0, "p50": 2, "p99": 6, "max": 6}
    assert found["items_done_per_entry"]["sum"] == 1
    assert found["tables"]["journal"]["rows"] == 16
    assert found["tables"]["parked"]["rows"] == 1
    assert found["file_bytes"] == (home / "journal.sqlite3").stat().st_size
    assert found["wal_bytes"] == 0
    work = next(queue for queue in found["queues"] if queue["queue"] == "mix/work")
    assert (work["ready"], work["leased"], work["delayed"], work["parked"]) == (2, 1, 1, 1)
    assert sum(rate["put_per_s"] * rate["ms"] for rate in found["rates"]) == pytest.approx(9000, rel=0.05)


def test_the_text_names_the_same(home: Path, printed: Printed) -> None:
    text = printed(home, show=journal_stats)
    for part in ("log       entries 1 to 16", "  commands", "    take",
                 "items put by one   mean 3.0, p50 2, p99 6, most 6", "  journal",
                 "mix/work: ready 2, leased 1, delayed 1, parked 1", "items per second"):
        assert part in text


def test_an_empty_journal_can_be_counted(tmp_path: Path, printed: Printed) -> None:
    scribe = Scribe(tmp_path / "home", Random(1))
    scribe.journal.write(Write(checkpoint=checkpoint_of(scribe.state)))
    scribe.journal.close()
    found = json.loads(printed(tmp_path / "home", "--json", show=journal_stats))
    assert found["rates"] == []
    assert found["entry_bytes"] is None
