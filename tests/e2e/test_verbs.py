"""The command line as people use it: every verb against real nodes, what it prints and how it exits."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator

import pytest
from harness import NodeProcess, Site, json_lines, wait_for

from p2pcluster.cli import main
from tests.status_schema import mismatches

HEAD = "from p2pcluster import At, DROP, Pipeline, Queue, To, current, sink, source, stage\n"
SQUARES = (
    HEAD
    + """
@source
def Numbers():
    yield from range(10)

@stage
def Square(x): return x * x

@sink
def Print(x): print(x)

pipeline = Pipeline("squares", Numbers >> Square >> Print)

if __name__ == "__main__":
    pipeline.main()
"""
)
PRINTED = sorted(f"Print | {x * x}" for x in range(10))


def printed(lines: list[str]) -> list[str]:
    return sorted(line for line in lines if line.startswith("Print | "))


@pytest.fixture(scope="module", autouse=True)
def orphan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A verb where no node is: it looks for one for a while, so it does that beside the other tests."""
    made = Site(tmp_path_factory.mktemp("orphan"))
    yield made.start("status")
    made.close()


# ---- run


def test_run_until_done_prints_what_stages_print_and_exits_0_and_again_starts_the_next_run(site: Site) -> None:
    project = site.project(SQUARES)
    done = site.do("run", "--until-done", cwd=project)
    assert (done.code, done.err) == (0, "")
    assert printed(done.lines) == PRINTED
    assert f"home {site.home}" in done.lines[0]
    assert done.lines[-1].startswith("squares: run 1 done in ")
    same = site.do("run", project, "--until-done")
    assert same.code == 0
    assert "squares: run 1 is done; --again starts the next one" in same.lines
    assert printed(same.lines) == []
    second = site.do("run", project, "--until-done", "--again")
    assert second.code == 0
    assert printed(second.lines) == PRINTED
    assert second.lines[-1].startswith("squares: run 2 done in ")


def test_a_python_file_runs_itself_and_run_is_the_default_verb(site: Site) -> None:
    project = site.project(SQUARES)
    node = site.start("pipeline.py", cwd=project)
    node.wait_for_line("squares: run 1 starts")
    node.wait_for_line("Print | 81")
    assert node.is_running, "without --until-done it goes on"
    assert node.stop() == 0
    done = site.python_file(project / "pipeline.py", "--again")
    assert done.code == 0
    assert printed(done.lines) == PRINTED
    assert done.lines[-1].startswith("squares: run 2 done in ")


def test_in_a_notebook_main_says_what_to_call_instead_and_that_works_in_its_running_loop(site: Site) -> None:
    done = site.python("""
        import asyncio
        from p2pcluster import Pipeline, source, stage

        @source
        def Numbers():
            yield from range(3)

        @stage
        async def Next(x):
            await asyncio.sleep(0)
            return x + 1

        pipeline = Pipeline("notebook", Numbers >> Next)

        async def cell():
            print(pipeline.run_local().results)
            pipeline.main()

        try:
            asyncio.run(cell())
        except Exception as error:
            print(type(error).__name__, error)
    """)
    assert done.lines[0] == "{'Next': [1, 2, 3]}"
    assert done.lines[1].startswith("WrongUsage main() runs the file that was started")
    assert "call run_local() instead" in done.lines[1]


def test_file_and_variable_name_choose_a_pipeline_of_several(site: Site) -> None:
    project = site.project(SQUARES + "\nother = Pipeline('other', Numbers >> Print)\n")
    done = site.do("run", "project/pipeline.py:other", "--until-done")
    assert done.code == 0
    assert done.lines[-1].startswith("other: run 1 done in ")
    assert printed(done.lines) == sorted(f"Print | {x}" for x in range(10))
    done = site.do("run", f"{project}/pipeline.py:absent", "--until-done")
    assert done.code == 2
    assert "has no Pipeline called absent" in done.the_error()


def test_set_gives_parameters_to_a_new_run_over_those_of_the_pipeline(site: Site) -> None:
    project = site.project(
        HEAD
        + """
@source
def One():
    yield 1

@sink
def Print(x): print(sorted(current().params.items()))

pipeline = Pipeline("set", One >> Print, params={"a": 1, "b": 2})
"""
    )
    done = site.do("run", project, "--until-done", "--set", "b=[3]", "--set", 'c="x"')
    assert printed(done.lines) == ["Print | [('a', 1), ('b', [3]), ('c', 'x')]"]
    done = site.do("run", project, "--until-done", "--again")
    assert printed(done.lines) == ["Print | [('a', 1), ('b', 2)]"], "each run has its own"


def test_pyproject_names_the_pipeline_and_the_cluster(site: Site) -> None:
    project = site.project("", package="")
    (project / "src" / "lab").mkdir(parents=True)
    (project / "src" / "lab" / "__init__.py").touch()
    (project / "src" / "lab" / "flow.py").write_text(SQUARES.replace("pipeline = ", "mine = "))
    (project / "pyproject.toml").write_text('[tool.p2pcluster]\npipeline = "lab.flow:mine"\ncluster = "lab"\n')
    done = site.do("run", project, "--until-done")
    assert done.code == 0
    assert "of cluster lab at" in done.lines[0]
    assert printed(done.lines) == PRINTED


# ---- verbs that ask a running node


NUMBERS = (
    HEAD
    + """
from pathlib import Path

@stage(retries=0)
def Invert(x):
    if x == 0 and not Path(current().out_dir, "fixed").exists():
        print("a zero came")
        raise ZeroDivisionError("nothing is its inverse")
    return 0 if x == 0 else 1 / x

pipeline = Pipeline("inverses", Queue("numbers", codec="json") >> Invert)
"""
)


@pytest.fixture(scope="module")
def inverses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A node that runs a pipeline fed from outside."""
    made = Site(tmp_path_factory.mktemp("inverses"))
    node = made.start("run", made.project(NUMBERS))
    node.wait_for_line("inverses: run 1 starts")
    yield made
    made.close()


def _stage(site: Site, name: str) -> dict[str, int]:
    return next(stage for stage in site.status()["stages"] if stage["name"] == name)


def test_status_json_has_the_shape_that_is_promised(inverses: Site) -> None:
    wait_for(lambda: _stage(inverses, "Invert")["processes"], "the stage runs")
    status = json.loads(inverses.do("status", "--json").out)
    assert list(mismatches(status)) == []
    (node,) = status["nodes"]
    assert (node["role"], node["alive"], node["id"]) == ("leader", True, status["leader"]["id"])
    (pipeline,) = status["pipelines"]
    assert (pipeline["name"], pipeline["run"], pipeline["state"]) == ("inverses", 1, "running")
    (stage,) = status["stages"]
    assert stage["idle_because"] == "its queue is empty"
    assert [queue["name"] for queue in status["queues"]] == ["numbers", "Invert.results"]
    assert status["network"] == {"refused_connections": 0, "refused_datagrams": 0, "refused_clients": 0}
    assert status["alarms"] == []


def test_status_for_people_fits_80_columns_and_watch_goes_on_until_ctrl_c(inverses: Site) -> None:
    done = inverses.do("status")
    assert done.code == 0
    assert all(len(line) <= 80 for line in done.lines)
    assert any(line.startswith("inverses: run 1 running") for line in done.lines)
    watch = inverses.start("status", "--watch")
    watch.wait_for_line("inverses: run 1 running")
    watch.signal(signal.SIGINT)
    assert watch.wait_for_exit() == 130
    assert watch.errors == []


def test_put_results_parked_retry_and_close(inverses: Site) -> None:
    """The life of a run that is fed from outside, from its first value to done."""
    done = inverses.do("put", "numbers", stdin="1\n\n2\n0\n4\n0\n")
    assert (done.code, done.out, done.err) == (0, "", "5 put into numbers\n")
    wait_for(lambda: _stage(inverses, "Invert")["parked"] == 2, "the zeros are parked")
    assert sorted(json_lines(inverses.do("results", "Invert").out)) == [0.25, 0.5, 1.0]
    assert sorted(json_lines(inverses.do("results", "Invert").out)) == [0.25, 0.5, 1.0], "results are not taken away"

    listed = inverses.do("parked").lines
    assert len(listed) == 2
    item_id = listed[0].split()[0]
    assert item_id.startswith("inverses/numbers:")
    assert "ZeroDivisionError: nothing is its inverse" in listed[0]
    shown = inverses.do("parked", "show", item_id)
    assert f"{item_id}: parked after 1 deliveries" in shown.out
    assert "value: 0" in shown.out
    assert 'raise ZeroDivisionError("nothing is its inverse")' in shown.out

    assert inverses.do("parked", "discard", item_id).out == "1 dropped\n"
    inverses.out("inverses").joinpath("fixed").touch()
    assert inverses.do("parked", "retry").out == "1 go round again\n"
    wait_for(lambda: _stage(inverses, "Invert")["parked"] == 0, "what is retried goes through")
    assert inverses.do("parked").out == ""
    assert sorted(json_lines(inverses.do("results", "Invert").out)) == [0, 0.25, 0.5, 1.0]

    (inverses.folder / "more.jsonl").write_text("8\n16\n")
    done = inverses.do("put", "numbers", "more.jsonl", "--close")
    assert (done.code, done.err) == (0, "2 put into numbers and it is closed\n")
    with inverses.connect("inverses") as cluster:
        cluster.wait(30)
    assert inverses.status()["pipelines"][0]["state"] == "done"
    refused = inverses.do("put", "numbers", stdin="1\n")
    assert refused.code == 1
    assert "is closed" in refused.the_error()
    assert "run --again" in refused.the_error() or "next run" in refused.the_error()
    assert inverses.do("discard", "Invert.results", "--yes").out == "6 dropped\n"
    assert inverses.do("results", "Invert").out == ""


def test_the_journal_is_plain_sqlite_for_whoever_looks_while_the_node_runs(inverses: Site) -> None:
    database = sqlite3.connect(f"{inverses.journal.as_uri()}?mode=ro", uri=True)
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    database.close()
    assert names >= {
        "meta",
        "journal",
        "queues",
        "chunks",
        "leases",
        "keys",
        "parked",
        "producers",
        "projects",
        "members",
    }


def test_discard_asks_first(inverses: Site) -> None:
    done = inverses.do("discard", "numbers")
    assert done.code == 2
    assert "--yes" in done.the_error()
    done = inverses.do("parked", "discard")
    assert done.code == 2
    assert "drops every parked item" in done.the_error()


def test_close_behind_a_put_is_looked_at_before_anything_is_put(inverses: Site) -> None:
    ready = len(inverses.do("results", "Invert").lines)
    done = inverses.do("put", "Invert.results", "--close", stdin="1\n")
    assert done.code == 2 and "nothing was put" in done.the_error()
    assert len(inverses.do("results", "Invert").lines) == ready
    done = inverses.do("put", "numbers", "--close", stdin="[" * 100_000)
    assert done.code == 1 and "is not JSON" in done.the_error()


def test_take_takes_at_most_n_and_follow_waits_for_more(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
@stage
def Same(x): return x

pipeline = Pipeline("taken", Queue("in") >> Same >> Queue("out"))
""",
        "taken",
    )
    assert shared.do("put", "in", stdin="1\n2\n3\n").code == 0
    follow = shared.start("take", "out", "--follow")
    follow.wait_for_line("3")
    assert shared.do("put", "in", stdin="4\n").code == 0
    follow.wait_for_line("4")
    follow.signal(signal.SIGINT)
    assert follow.wait_for_exit() == 130
    assert shared.do("put", "in", stdin="5\n6\n7\n").code == 0
    wait_for(lambda: _queue(shared, "out")["ready"] >= 3, "the three are there")
    first = json_lines(shared.do("take", "out", "-n", "2").out)
    rest = json_lines(shared.do("take", "out").out)
    assert len(first) == 2
    assert sorted([*first, *rest])[-3:] == [5, 6, 7]


def _queue(site: Site, name: str) -> dict[str, int]:
    return next(queue for queue in site.status()["queues"] if queue["name"] == name)


def test_a_value_of_a_projects_class_is_read_in_its_folder_and_elsewhere_the_line_says_so(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
from point import Point

@source
def One():
    yield Point()

@stage
def Last(x): return x

@stage(retries=0)
def Fail(x): raise ValueError("no")

pipeline = Pipeline("classy", One >> [Last, Fail])
""",
        "classy",
        point="""
class Point:
    def __repr__(self):
        return "a point"
""",
    )
    with shared.connect("classy") as cluster:
        wait_for(lambda: cluster.parked() and _stage(shared, "Last")["done"], "one is done and one is parked")
    done = shared.do("results", "Last", "--pipeline", "classy")
    assert done.code == 1
    assert "cannot be read here (ModuleNotFoundError: No module named 'point')" in done.the_error()
    assert "project's folder" in done.the_error()
    assert shared.do("results", "Last", "--pipeline", "classy", cwd=shared.folder / "classy").out == '"a point"\n'
    shown = shared.do("parked", "show", "classy/Fail:1")
    assert shown.code == 0
    assert "why: ValueError: no" in shown.out
    assert "value: a value of 'Fail' cannot be read here" in shown.out


def test_a_stage_in_the_middle_has_no_results_and_says_which_have(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
@source
def One():
    yield 1

@stage
def Middle(x): return x

@stage
def Last(x): return x

pipeline = Pipeline("middle", One >> Middle >> Last)
""",
        "middle",
    )
    done = shared.do("results", "Middle", "--pipeline", "middle")
    assert done.code == 1
    assert "stage 'Middle' of pipeline 'middle' keeps no results" in done.the_error()
    assert done.the_error().endswith("those that keep some: Last")


def test_a_reader_that_ends_early_is_no_error(shared: Site) -> None:
    """As in `results STAGE | head -1`."""
    shared.deploy(
        HEAD
        + """
@source
def Numbers():
    yield from range(20_000)

@stage
def Same(x): return "x" * 20

pipeline = Pipeline("long", Numbers >> Same)
""",
        "long",
    )
    with shared.connect("long") as cluster:
        cluster.wait(30)
    results = shared.start("results", "Same", "--pipeline", "long", held=True)
    assert results.popen.stdout is not None
    assert results.popen.stdout.readline() == '"xxxxxxxxxxxxxxxxxxxx"\n'
    results.popen.stdout.close()
    assert results.popen.wait(30) == 0
    assert results.popen.stderr is not None
    assert results.popen.stderr.read() == ""


def test_close_ends_a_source_that_never_would(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
from itertools import count

@source
def Numbers():
    yield from count()

@sink
def Nothing(x): pass

pipeline = Pipeline("endless", Numbers >> Nothing)
""",
        "endless",
    )
    with shared.connect("endless") as cluster:
        wait_for(lambda: _stage(shared, "Nothing")["done"] > 100, "it runs")
        assert shared.do("close", "Numbers", "--pipeline", "endless").code == 0
        cluster.wait(30)


def test_stop_ends_the_node_in_order(site: Site) -> None:
    node = site.hands()
    assert site.do("stop").code == 0
    done = node.finished()
    assert (done.code, done.err) == (0, "")
    assert "stopping" in done.lines[-1]
    assert not (site.home / "address.json").exists()
    assert not site.journal.with_name("journal.sqlite3-wal").exists(), "the journal was closed in order"


def test_a_backup_under_load_is_restored_and_goes_on_from_there(site: Site) -> None:
    project = site.project(VERSION, helper="MARK = 1")
    node = site.start("run", project)
    wait_for(lambda: site.is_up and _marked(site) >= 50, "some are done")
    done = site.do("backup", site.folder / "copy.sqlite3")
    assert done.code == 0
    assert "copy.sqlite3: the journal up to entry " in done.out
    nowhere = site.do("backup", site.folder / "no" / "copy.sqlite3")
    assert nowhere.code == 1
    assert "there is no folder" in nowhere.the_error()
    twice = site.do("backup", site.folder / "copy.sqlite3")
    assert twice.code == 1
    assert "exists: name a file that does not" in twice.the_error()
    assert node.stop() == 0
    site.home = site.folder / "restored"
    site.home.mkdir(mode=0o700)
    (site.folder / "copy.sqlite3").rename(site.journal)
    site.start("run", project).wait_for_line("versions: run 1 goes on")
    with site.connect("versions") as cluster:
        restored = len(list(cluster.results("Mark")))
    wait_for(lambda: _marked(site) >= restored + 100, "it goes on")
    found = _end_and_read(site)
    assert [x for x, _ in found] == list(range(len(found))), "each item once"


def test_a_backup_where_there_is_no_journal(site: Site) -> None:
    done = site.do("backup", site.folder / "copy.sqlite3")
    assert done.code == 1
    assert "there is no journal" in done.the_error()
    assert "--home" in done.the_error()
    assert not (site.folder / "copy.sqlite3").exists()


def test_the_key_is_shown_and_set(site: Site) -> None:
    site.key_file.unlink()
    shown = site.do("key")
    assert shown.code == 1
    assert "there is no key" in shown.the_error()
    done = site.do("key", "--set", stdin="a key of mine\n")
    assert (done.code, done.out) == (0, "")
    assert site.do("key").out == "a key of mine\n"
    assert site.key_file.stat().st_mode & 0o777 == 0o600
    empty = site.do("key", "--set", stdin="\n")
    assert empty.code == 1
    assert "empty" in empty.the_error()
    assert site.do("key").out == "a key of mine\n"


def test_a_folder_without_a_project_gives_a_pair_of_hands_and_a_node_without_a_key_makes_one(site: Site) -> None:
    site.key_file.unlink()
    site.hands().wait_for_line("no project here: this node works for the cluster's pipelines")
    assert site.key_file.stat().st_mode & 0o777 == 0o600
    assert len(site.do("key").out.strip()) == 64


# ---- new versions


VERSION = (
    HEAD
    + """
from itertools import count
from pathlib import Path
from helper import MARK

@source
def Numbers():
    for x in count():
        if Path(current().out_dir, "end").exists():
            return
        yield x

@stage(processes=2)
def Mark(x):
    return [x, MARK]

pipeline = Pipeline("versions", Numbers >> Queue("numbers", maxsize=100) >> Mark)
"""
)


def _end_and_read(site: Site) -> list[list[object]]:
    """Let the source of `VERSION` end, and read what came of it."""
    (site.out("versions") / "end").touch()
    with site.connect("versions") as cluster:
        cluster.wait(60)
        assert cluster.parked() == []
        return sorted(cluster.results("Mark"))


def test_an_edited_project_replaces_the_old_version_under_load_and_keeps_every_item(site: Site) -> None:
    project = site.project(VERSION, helper="MARK = 'old'")
    node = site.start("run", project)
    wait_for(lambda: site.is_up and _marked(site) >= 20, "some are done by the old version")
    broken = site.do("deploy", site.project(VERSION, helper="MARK = "))
    assert broken.code == 1
    assert "helper.py, line 1: invalid syntax" in broken.the_error(), "what runs goes on"
    project = site.project(VERSION, helper="MARK = 'new'")
    done = site.do("deploy", project)
    assert done.code == 0
    assert "replaces" in done.lines[0] and done.lines[0].endswith(": ~helper.py"), done.out
    assert done.lines[1].endswith("runs on 1 node"), done.out
    marked = _marked(site)
    wait_for(lambda: _marked(site) >= marked + 500, "the new version works")
    found = _end_and_read(site)
    assert [x for x, _ in found] == list(range(len(found))), "each item once, whichever version did it"
    assert [x for x, mark in found if mark == "new"][-1] == len(found) - 1
    assert found[0] == [0, "old"]
    assert node.is_running
    same = site.do("deploy", project)
    assert (same.code, "is deployed already" in same.out) == (0, True)


def _marked(site: Site) -> int:
    with site.connect("versions") as cluster:
        return sum(stage["done"] for stage in cluster.status()["stages"] if stage["name"] == "Mark")


def test_run_replaces_an_edited_project_of_the_same_folder_and_none_from_another(site: Site) -> None:
    project = site.project(SQUARES)
    assert site.do("run", project, "--until-done").code == 0
    site.project(SQUARES.replace("x * x", "x * x * x"), notes="# new")
    done = site.do("run", project, "--until-done", "--again")
    assert done.code == 0
    (line,) = [line for line in done.lines if line.startswith("squares: version") and "replaces" in line]
    assert line.endswith(": +notes.py, ~pipeline.py")
    cubes = sorted(f"Print | {x**3}" for x in range(10))
    assert printed(done.lines) == cubes
    copy = site.project(SQUARES, name="copy")
    done = site.do("run", copy, "--until-done", "--again")
    assert done.code == 0
    (line,) = [line for line in done.lines if "another version is deployed" in line]
    assert str(project) in line
    assert "python -m p2pcluster deploy" in line
    assert printed(done.lines) == cubes, "the cluster's version ran"


TWO = (
    HEAD
    + """
@stage
def Same(x): return x

@stage(retries=1000, backoff_s=0.1)
def Never(x): raise OSError("not yet")

pipeline = Pipeline("fewer", Queue("in") >> Same, Queue("other") >> Never)
"""
)


def test_a_stage_that_a_new_version_lacks_keeps_its_items_with_an_alarm(site: Site) -> None:
    site.hands()
    site.deploy(TWO)
    assert site.do("put", "other", stdin="1\n2\n3\n").code == 0
    site.deploy(TWO.replace(', Queue("other") >> Never', ""))
    (alarm,) = wait_for(lambda: site.status()["alarms"], "an alarm about the queue without a reader")
    assert "queue fewer/other has 3 items and no stage reads it" in alarm
    site.deploy(TWO.replace('raise OSError("not yet")', "return -x"))
    with site.connect("fewer") as cluster:
        wait_for(
            lambda: sorted(cluster.results("Never")) == [-3, -2, -1], "a version with that stage goes on with them"
        )
    site.deploy(TWO)
    assert site.do("put", "other", stdin="4\n").code == 0
    site.deploy(TWO.replace(', Queue("other") >> Never', ""))
    assert "discard other --pipeline fewer" in alarm
    assert site.do("discard", "other", "--pipeline", "fewer", "--yes").out == "1 dropped\n"
    assert not [alarm for alarm in site.status()["alarms"] if "fewer/other" in alarm]


# ---- signals


SLOW = (
    HEAD
    + """
import time
from pathlib import Path

@source
def Numbers():
    yield from range(3)

@sink
def Print(x):
    print("began", x)
    Path(current().out_dir, f"{x}.began").touch()
    while not Path(current().out_dir, f"{x}.open").exists():
        time.sleep(0.01)
    print("ended", x)

pipeline = Pipeline("slow", Numbers >> Print)
"""
)


def test_a_signal_drains_what_runs_is_finished_and_nothing_new_begins(site: Site) -> None:
    """One node after another gets its signal while it is at the next item."""
    project = site.project(SLOW)
    for x, (number, words, code) in enumerate(
        [(signal.SIGINT, [], 0), (signal.SIGTERM, ["--until-done"], 1), (signal.SIGHUP, [], 0)]
    ):
        node = site.start("run", project, *words)
        node.wait_for_line(f"Print | began {x}")
        node.signal(number)
        node.wait_for_line("what runs may finish")
        (site.out("slow") / f"{x}.open").touch()
        done = node.finished()
        assert (done.code, done.err) == (code, ""), "a run that was to be done and is not is an error"
        assert printed(done.lines) == [f"Print | began {x}", f"Print | ended {x}"]
    done = site.do("run", project, "--until-done")
    assert (done.code, printed(done.lines)) == (0, []), "nothing was left to do, and nothing ran twice"


POLL = (
    HEAD
    + """
import time
from pathlib import Path

@source
def Poll():
    \"\"\"What it returns it cannot return again.\"\"\"
    out = Path(current().out_dir)
    if (out / "end").exists():
        raise StopIteration
    with open(out / "polled", "a") as file:
        number = file.tell()
        file.write(".")
    return number

@stage(processes=1)
def Same(x):
    if not Path(current().out_dir, "end").exists():
        time.sleep(0.001)
    return x

pipeline = Pipeline("polling", Poll >> Queue("in", maxsize=200) >> Same)
"""
)


def test_what_a_function_source_returned_survives_a_new_version_and_a_stop_in_order(site: Site) -> None:
    """Nobody can ask it again: what it gave is put before its process ends, though the queue behind it is full."""
    node = site.start("run", site.project(POLL))
    node.wait_for_line("run 1 starts")
    with site.connect("polling") as cluster:
        wait_for(lambda: _is_full(site), "the queue is full")
        site.deploy(POLL + "# edited")
        done = _stage(site, "Same")["done"]
        wait_for(
            lambda: _stage(site, "Same")["done"] >= done + 300 and _is_full(site), "the new version fills it again"
        )
        assert cluster.status()["alarms"] == []
    assert node.stop() == 0
    polled = (site.out("polling") / "polled").stat().st_size
    (site.out("polling") / "end").touch()
    site.start("run", "project").wait_for_line("leads cluster")
    with site.connect("polling") as cluster:
        cluster.wait(30)
        assert sorted(cluster.results("Same")) == list(range(polled))


def _is_full(site: Site) -> bool:
    queue = _queue(site, "in")
    return queue["ready"] + queue["leased"] >= 200


def test_help_shows_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main([*words, "--help"])
        assert end.value.code == 0
        return capsys.readouterr().out

    overview = help_of()
    for verb in (
        "run",
        "demo",
        "deploy",
        "status",
        "put",
        "take",
        "results",
        "discard",
        "close",
        "parked",
        "stop",
        "backup",
        "key",
    ):
        assert verb in overview
        assert f"example: python -m p2pcluster {verb}" in help_of(verb)


def test_without_a_node_a_verb_exits_4(orphan: NodeProcess) -> None:
    done = orphan.finished()
    assert done.code == 4
    assert done.err.startswith("waiting for a node of cluster 'default', at most 10 s")
    assert "no node of cluster 'default' is known here" in done.the_error()
    assert "start one with python -m p2pcluster" in done.the_error()
