"""What people, disks and stages do wrong: each gets one clear line (what, why, what next), and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Finished, Site, is_alive, wait_for

from p2pcluster.errors import ClusterNotFound, HomeError, ItemsParked, Unavailable
from p2pcluster.home import Home
from p2pcluster.journal import Journal, row_crc

HEAD = "from p2pcluster import At, DROP, Pipeline, Queue, To, current, sink, source, stage\n"
FED = (
    HEAD
    + """
@stage
def Same(x): return x

pipeline = Pipeline("fed", Queue("in") >> Same)
"""
)


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("fed"))
    made.hands()
    made.deploy(FED, "fed")
    yield made
    made.close()


def assert_says(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line, f"{part!r} is missing: {line}"


# ---- projects


def test_deploying_a_folder_without_a_project(site: Site) -> None:
    (site.folder / "empty").mkdir()
    done = site.do("deploy", "empty")
    assert done.code == 2
    assert_says(done.the_error(), "empty holds no project", "pipeline.py")


def test_running_what_is_not_there(site: Site) -> None:
    done = site.do("run", "nowhere.py")
    assert done.code == 1
    assert_says(done.the_error(), "there is no nowhere.py here", "name a folder, FILE.py or FILE.py:NAME")


BAD_PROJECTS = {
    "a syntax error": ("x = (\n", ["pipeline.py, line 1", "'(' was never closed", "correct it"]),
    "an import error": (
        "import no_such_module_here\n",
        ["No module named 'no_such_module_here'", "pipeline.py, line 1", "correct it"],
    ),
    "two pipelines": (
        HEAD + "@source\ndef A(): yield 1\n@sink\ndef B(x): pass\n"
        "one = Pipeline('one', A >> B)\ntwo = Pipeline('two', A >> B)\n",
        ["2 pipelines (one, two)", "pipeline.py:NAME"],
    ),
    "none": ("x = 1\n", ["pipeline.py has no Pipeline", "assign one to a variable"]),
    "a cycle": (
        HEAD + "@source\ndef A(): yield 1\n@stage\ndef B(x): return x\n@stage\ndef C(x): return x\n"
        "pipeline = Pipeline('p', A >> B >> C >> B)\n",
        ["closes the cycle B >> C >> B", "pipeline.py:", "maxsize=None"],
    ),
    "a nameless lambda": (
        HEAD + "@source\ndef A(): yield 1\npipeline = Pipeline('p', A >> stage(lambda x: x))\n",
        ["a lambda has no name", "pipeline.py:4", 'name="..."'],
    ),
    "an error of several lines": (
        "raise ValueError('one line\\nand another')\n",
        ["ValueError: one line and another (pipeline.py, line 1)", "correct it", "--verbose"],
    ),
    "a module that ends its process": (
        "import os\nos._exit(7)\n",
        ["importing pipeline", "exited with code 7", "if __name__"],
    ),
    "a module that exits": ("raise SystemExit('not today')\n", ["not today", "pipeline.py, line 1", "correct it"]),
}


@pytest.mark.parametrize("fault", BAD_PROJECTS)
def test_a_project_with(site: Site, fault: str) -> None:
    text, said = BAD_PROJECTS[fault]
    done = site.do("deploy", site.project(text))
    assert done.code == (2 if fault == "none" else 1)
    assert_says(done.the_error(), *said)


def test_a_node_that_is_offered_a_bad_project_ends_with_the_same_line_and_verbose_adds_the_traceback(
    site: Site,
) -> None:
    text, said = BAD_PROJECTS["an import error"]
    project = site.project(text)
    done = site.do("run", project)
    assert done.code == 1
    assert_says(done.the_error(), *said)
    assert "Traceback" not in done.out + done.err
    verbose = site.do("run", project, "--verbose")
    assert verbose.code == 1
    assert "Traceback" in verbose.out + verbose.err
    assert "import no_such_module_here" in verbose.out + verbose.err


def test_a_file_without_a_pipeline(site: Site) -> None:
    site.project("x = 1\n", notes="y = 2\n")
    done = site.do("run", "project/notes.py")
    assert done.code == 2
    assert_says(done.the_error(), "notes.py has no Pipeline", "assign one to a variable")


# ---- homes, ports and keys


def test_a_home_that_another_node_holds(fed: Site) -> None:
    done = fed.do("run", cwd=fed.folder / "empty")
    assert done.code == 1
    pid = fed.nodes[0].pid
    assert_says(done.the_error(), f"is in use by the node with process id {pid}", f"kill {pid}", "--home DIR")
    assert fed.status()["leader"]["address"], "the first node goes on"


def test_a_port_that_another_program_uses(site: Site) -> None:
    """Connections come to another port then, and clients find it; a discovery port that is taken has no substitute."""
    with socket.create_server(("127.0.0.1", site.port)):
        node = site.hands()
        assert_says(node.wait_for_line("is taken"), f"port {site.port} is taken", "connections come to port")
        assert site.status()["leader"]["address"] != f"127.0.0.1:{site.port}"
        assert node.stop() == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rude:
        rude.bind(("", site.port))
        done = site.do("run", cwd=site.folder / "empty")
    assert done.code == 1
    assert_says(done.the_error(), f"UDP port {site.port} cannot be shared", "stop the program", "--port N")


def test_a_home_that_cannot_be_written(site: Site) -> None:
    (site.folder / "file").write_text("not a folder")
    done = site.do("run", "--home", site.folder / "file" / "home")
    assert done.code == 1
    assert_says(done.the_error(), "as a home", "a file is where a folder should be", "--home")
    sealed = "/proc/home" if os.geteuid() == 0 else str(_sealed(site.folder))
    done = site.do("run", "--home", sealed)
    assert done.code == 1
    assert_says(done.the_error(), f"cannot use {sealed}", "--home")


def _sealed(folder: Path) -> Path:
    (folder / "sealed").mkdir(mode=0o500)
    return folder / "sealed" / "home"


def test_a_home_on_a_network_file_system(site: Site) -> None:
    mounts = f"/dev/vda / ext4 rw 0 0\nserver:/export {site.folder} nfs4 rw 0 0\n"
    with pytest.raises(HomeError) as caught:
        Home.open(site.home, mounts)
    assert_says(str(caught.value), "network file system (nfs4 at", "SQLite is not safe", "python -m p2pcluster --home ")
    assert not site.home.exists()


def test_a_key_file_that_others_can_read(site: Site) -> None:
    site.key_file.write_text("a-shared-key\n")
    site.key_file.chmod(0o644)
    done = site.do("run")
    assert done.code == 1
    assert_says(done.the_error(), "is open to others", f"chmod 600 {site.key_file}")
    site.key_file.chmod(0o600)
    assert site.do("key").out == "a-shared-key\n"


def test_a_wrong_key(fed: Site) -> None:
    (fed.folder / "wrong").write_text("0" * 64)
    (fed.folder / "wrong").chmod(0o600)
    done = fed.do("status", P2PCLUSTER_AUTHKEY_FILE=str(fed.folder / "wrong"))
    assert done.code == 1
    assert_says(
        done.the_error(), "another key of cluster 'default'", "`python -m p2pcluster key` there", "key --set` here"
    )
    fed.nodes[0].wait_for_line("refused 127.0.0.1")
    assert fed.status()["leader"]["address"], "the node goes on"


def test_no_key_at_all(site: Site) -> None:
    site.key_file.unlink()
    done = site.do("status")
    assert done.code == 1
    assert_says(done.the_error(), "there is no key", "python -m p2pcluster key there", "key --set here")


def test_a_home_of_another_cluster(site: Site) -> None:
    assert site.hands().stop() == 0
    done = site.do("run", "--cluster", "lab")
    assert done.code == 1
    assert_says(done.the_error(), "belongs to cluster 'default' and not to 'lab'", "--cluster default")


# ---- what stages do


def test_items_that_fail_are_parked_with_the_reason_and_the_others_go_on(shared: Site) -> None:
    """One pipeline for all that a function can do wrong: each item says what to do with it."""
    shared.deploy(
        HEAD
        + """
import os, signal, sys, time

WRONG = ["raise", "unpicklable", "main", "exit", "signal", "never", "large", "text of an exception"]

class Rude(Exception):
    def __str__(self):
        raise RuntimeError("no text either")

@source
def Deeds():
    for deed in WRONG:
        yield "fine"
        yield deed
    yield "fine"

@stage(processes=1, retries=1, backoff_s=0.01, timeout_s=1)
def Do(deed):
    if deed == "raise":
        print("about to raise", file=sys.stderr)
        raise LookupError("the shelf is empty")
    if deed == "unpicklable":
        return lambda: None
    if deed == "main":
        main = sys.modules["__main__"]
        main.Point = type("Point", (), {"__module__": "__main__"})
        return main.Point()
    if deed == "exit":
        print("last words", file=sys.stderr, flush=True)
        os._exit(5)
    if deed == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    while deed == "never":
        time.sleep(0.05)
    if deed == "large":
        return bytes((16 << 20) + 1)
    if deed == "text of an exception":
        raise Rude
    return deed

pipeline = Pipeline("deeds", Deeds >> Do)
""",
        "deeds",
    )
    with shared.connect("deeds") as cluster:
        with pytest.raises(ItemsParked):
            cluster.wait(60)
        assert list(cluster.results("Do")) == ["fine"] * 9, "what is fine goes through, once each"
        parked = {cluster.parked_value("Do", int(item["id"].rpartition(":")[2])): item for item in cluster.parked()}
    assert sorted(parked) == sorted(
        ["raise", "unpicklable", "main", "exit", "signal", "never", "large", "text of an exception"]
    )
    assert all(item["deliveries"] == 2 for item in parked.values())
    said = {deed: item["error"] for deed, item in parked.items()}
    assert said["raise"]["text"] == "LookupError: the shelf is empty"
    assert 'raise LookupError("the shelf is empty")' in said["raise"]["traceback"]
    assert_says(said["unpicklable"]["text"], "a value of type function cannot be put", "emit plain data")
    assert_says(said["main"]["text"], "lives in __main__", "move the class to a module")
    assert_says(said["exit"]["text"], "exited with code 5")
    assert said["exit"]["stderr"][-1] == "last words"
    assert_says(said["signal"]["text"], "died of signal 9 (SIGKILL)")
    assert_says(said["never"]["text"], "longer than its timeout_s=1")
    assert_says(said["large"]["text"], "over the limit of 16 MiB", "put the data in a file and emit its path")
    assert_says(said["text of an exception"]["text"], "Rude")


def test_run_until_done_exits_3_when_items_are_parked_and_says_how_to_look(site: Site) -> None:
    project = site.project(
        HEAD
        + """
@source
def Numbers():
    yield from range(4)

@sink(retries=0)
def Fail(x):
    1 / (x - 2)

pipeline = Pipeline("three", Numbers >> Fail)
"""
    )
    done = site.do("run", project, "--until-done")
    assert done.code == 3
    assert_says(done.lines[-1], "1 item parked", "python -m p2pcluster parked list")
    assert "Fail: item three/Fail:3 failed: ZeroDivisionError: division by zero" in done.lines
    assert site.do("run", project, "--until-done").code == 3, "a done run that has parked items says so again"


def test_a_stage_that_does_not_start_keeps_its_items_and_status_says_why(site: Site) -> None:
    """The module imports where it is checked and not where it runs; then the fault is taken away."""
    project = site.project(
        HEAD
        + """
import os, sys
from pathlib import Path

@source
def Numbers():
    yield from range(10)

@stage
class Needs:
    def __init__(self):
        if not Path(os.environ["FLAG"]).exists():
            raise OSError("the licence server is away")

    def __call__(self, x):
        return x

pipeline = Pipeline("needs", Numbers >> Needs)
"""
    )
    node = site.start("run", project, "--until-done", FLAG=str(site.folder / "flag"))
    node.wait_for_line("does not start: OSError: the licence server is away")
    with site.connect("needs") as cluster:

        def idle() -> str:
            return next(stage["idle_because"] or "" for stage in cluster.status()["stages"] if stage["name"] == "Needs")

        wait_for(lambda: "the licence server is away" in idle(), "status says why")
        assert any("the licence server is away" in alarm for alarm in cluster.status()["alarms"])
        assert cluster.parked() == []
    (site.folder / "flag").touch()
    assert node.wait_for_exit() == 0, "no item was counted as delivered"


def test_a_source_whose_process_ends_again_and_again_says_so(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
import os

@source
def Exits():
    os._exit(3)

@sink
def Nothing(x): pass

pipeline = Pipeline("exits", Exits >> Nothing)
""",
        "exits",
    )
    shared.nodes[0].wait_for_line("Exits: the source's process exited with code 3 and is started again")
    shared.nodes[0].wait_for_line("Exits: the source's process exited with code 3 2 times without emitting anything")
    with shared.connect("exits") as cluster:
        assert any("Exits: the source's process exited with code 3" in alarm for alarm in cluster.status()["alarms"])
        cluster.close("Exits")
        cluster.wait(30)


def test_a_stage_that_prints_100_mb_while_nobody_reads_holds_only_itself(site: Site) -> None:
    project = site.project(
        HEAD
        + """
@source
def Numbers():
    yield from range(100)

@sink
def Chatter(x):
    print(("x" * 1023 + "\\n") * 1024, end="")

pipeline = Pipeline("loud", Numbers >> Chatter)
"""
    )
    node = site.start("run", project, "--until-done", held=True)
    wait_for(lambda: site.is_up, "the node listens")
    with site.connect("loud") as cluster:

        def chatter() -> dict[str, int]:
            return next((stage for stage in cluster.status()["stages"] if stage["name"] == "Chatter"), {})

        wait_for(lambda: chatter().get("processes"), "the sink runs")
        looks = [chatter()["done"]]
        while len(looks) < 200 or looks[-1] != looks[-200]:
            looks.append(chatter()["done"])  # the node answers while its terminal is held
        assert looks[-1] < 100, "the sink waits until somebody reads"
        assert _resident_bytes(node.pid) < 120 << 20, "what is not read is not kept in memory"
    assert node.is_running
    node.read_on()
    assert node.wait_for_exit(60) == 0
    lines = [line for line in node.lines if line.startswith("Chatter | ")]
    assert len(lines) == 100 * 1024
    assert all(len(line) == len("Chatter | ") + 1023 for line in lines)


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_stage_processes_end_when_their_node_is_killed(site: Site) -> None:
    """Also one that never returns, so that none works beside its successor."""
    project = site.project(
        HEAD
        + """
import time

@source
def One():
    yield 1

@sink
def Forever(x):
    while True:
        time.sleep(0.1)

pipeline = Pipeline("forever", One >> Forever)
"""
    )
    node = site.start("run", project)
    (pid,) = wait_for(lambda: node.stage_pids("Forever"), "the sink runs")
    node.kill()
    wait_for(lambda: not is_alive(pid), "the sink's process ends")


# ---- values and names on the command line


def _ready_or_done(site: Site) -> int:
    return sum(stage["done"] for stage in site.status()["stages"])


def test_a_line_that_is_not_json_names_the_line_and_none_is_taken(fed: Site) -> None:
    before = _ready_or_done(fed)
    done = fed.do("put", "in", stdin='{"a": 1}\n\n{"a": 2\n{"a": 3}\n')
    assert done.code == 1
    assert_says(done.the_error(), "line 3 of standard input is not JSON", "nothing was put", "correct it")
    (fed.folder / "values.jsonl").write_text("1\nNaN-ish\n")
    assert_says(fed.do("put", "in", "values.jsonl").the_error(), "line 2 of values.jsonl is not JSON")
    assert _ready_or_done(fed) == before


def test_a_file_to_put_that_is_not_there(fed: Site) -> None:
    done = fed.do("put", "in", "missing.jsonl")
    assert done.code == 2
    assert_says(done.the_error(), "missing.jsonl cannot be read", "name a file with JSON lines")


@pytest.mark.parametrize(
    "words", [["put", "inn"], ["take", "inn"], ["results", "inn"], ["discard", "inn", "--yes"], ["close", "inn"]]
)
def test_an_unknown_queue_is_named_with_those_that_there_are(fed: Site, words: list[str]) -> None:
    done = fed.do(*words, stdin="1\n")
    assert done.code == 1
    assert_says(
        done.the_error(),
        "pipeline 'fed' has no",
        "'inn'; it has in" + ("" if words[0] == "close" else ", Same.results"),
    )


def test_an_unknown_pipeline(fed: Site) -> None:
    done = fed.do("put", "in", "--pipeline", "fled", stdin="1\n")
    assert done.code == 1
    assert_says(done.the_error(), "no pipeline 'fled'", "python -m p2pcluster status")


def test_a_value_over_the_limit_is_refused_before_anything_is_put(fed: Site) -> None:
    before = _ready_or_done(fed)
    done = fed.do("put", "in", stdin='1\n"' + "x" * (16 << 20) + '"\n')
    assert done.code == 1
    assert_says(done.the_error(), "over the limit of 16 MiB", "put the data in a file")
    assert _ready_or_done(fed) == before


def test_a_class_of_a_program_is_refused_at_put(fed: Site) -> None:
    done = fed.python("""
        from p2pcluster import connect

        class Point: pass

        with connect() as cluster:
            try:
                cluster.put("in", Point())
            except Exception as error:
                print(type(error).__name__, error)
    """)
    assert_says(done.out, "ValueRefused", "lives in __main__", "move the class to a module that the project imports")


def test_wrong_words(fed: Site) -> None:
    done = fed.do("statsu")
    assert done.code == 2
    assert_says(done.the_error(), "no verb 'statsu'", "did you mean status?")
    done = fed.do("run", "--port", "many")
    assert done.code == 2
    assert_says(done.the_error(), "--port is 'many'", "a port from 1 to 65535")
    done = fed.do("run", "--set", "depth=deep", cwd=fed.folder / "empty")
    assert done.code == 2
    assert_says(done.the_error(), "--set depth=deep", "not JSON", """--set 'depth="..."'""")
    done = fed.do("take", "in", "-n", "few")
    assert done.code == 2
    assert_says(done.the_error(), "invalid int value: 'few'", "see python -m p2pcluster take --help")
    done = fed.do("take", "in", "-n", "0")
    assert done.code == 2
    assert_says(done.the_error(), "-n is 0 but must be a number of values from 1")
    done = fed.do("parked", "show", "fed/Same:99")
    assert done.code == 2
    assert_says(done.the_error(), "no item 'fed/Same:99' is parked", "parked list")


# ---- journals


def _refused_journal(site: Site) -> Finished:
    before = site.journal.read_bytes()
    done = site.do("run")
    assert done.code == 1
    assert site.journal.read_bytes() == before, "the file is kept as it is"
    return done


def test_a_journal_that_is_not_sqlite(site: Site) -> None:
    site.home.mkdir(mode=0o700)
    site.journal.write_text("these are my notes\n" * 100)
    done = _refused_journal(site)
    assert_says(done.the_error(), str(site.journal), "is not an SQLite file", "move it away, or choose another --home")


def test_a_journal_that_is_another_programs_database(site: Site) -> None:
    site.home.mkdir(mode=0o700)
    with sqlite3.connect(site.journal) as database:
        database.execute("CREATE TABLE songs (title)")
    database.close()
    done = site.do("run")
    assert done.code == 1
    assert_says(done.the_error(), "not a journal of p2pcluster", "choose another --home")


def test_a_journal_of_a_newer_format(site: Site) -> None:
    site.home.mkdir(mode=0o700)
    Journal.open(site.journal, site.home / "journal.mark")[0].close()
    with sqlite3.connect(site.journal) as database:
        database.execute("UPDATE meta SET value = 99, crc = ? WHERE key = 'format'", (row_crc(("format", 99)),))
    database.close()
    done = site.do("run")
    assert done.code == 1
    assert_says(done.the_error(), "has format 99", "update p2pcluster")


def test_a_journal_with_a_damaged_entry(site: Site) -> None:
    site.hands()
    site.deploy(FED)
    assert site.do("put", "in", stdin='"a needle in the journal"\n').code == 0
    assert site.nodes[-1].stop() == 0
    data = site.journal.read_bytes()
    at = data.index(b"a needle in the journal")
    site.journal.write_bytes(data[:at] + b"A" + data[at + 1 :])
    done = _refused_journal(site)
    assert_says(
        done.the_error(),
        f"journal {site.journal} is damaged",
        "the file is kept as it is",
        "restore a backup",
        "--home",
    )


# ---- a full disk


@pytest.fixture
def small_disk(site: Site) -> Iterator[Site]:
    """A site whose home is a disk of 24 MB."""
    site.home.mkdir(mode=0o700)
    mount = shutil.which("mount")
    mounted = (
        mount
        and subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", site.home], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("this user may not mount a tmpfs")
    yield site
    site.close()
    subprocess.run(["umount", site.home], check=True)


def test_a_full_disk_stops_the_node_and_what_was_acknowledged_is_there_after_space_is_freed(small_disk: Site) -> None:
    site = small_disk
    hog = site.home / "out" / "hog"
    node = site.hands()
    site.deploy(FED)
    acknowledged = []
    with site.connect("fed", timeout_s=1) as cluster:
        hog.write_bytes(bytes(max(0, shutil.disk_usage(site.home).free - (1 << 20))))
        with pytest.raises((Unavailable, ClusterNotFound)):
            for number in range(10_000):
                cluster.put("in", [number, "x" * 10_000])
                acknowledged.append(number)
    done = node.finished()
    assert done.code == 1
    assert_says(
        done.the_error(),
        f"the disk of {site.home} is full",
        "free some space and start again",
        "nothing acknowledged is lost",
    )
    hog.unlink()
    site.hands()
    with site.connect("fed") as cluster:
        cluster.close("in")
        cluster.wait(60)
        found = sorted(number for number, _ in cluster.results("Same"))
    assert found[: len(acknowledged)] == acknowledged
    assert found[len(acknowledged) :] in ([], [len(acknowledged)]), (
        "the put whose outcome was unknown may be there, once"
    )


# ---- signals


def test_a_second_signal_stops_at_once_and_loses_nothing(site: Site) -> None:
    project = site.project(
        HEAD
        + """
import time
from pathlib import Path

@source
def One():
    yield 1

@sink
def Slow(x):
    print("began")
    while not Path(current().out_dir, "open").exists():
        time.sleep(0.05)
    print("ended")

pipeline = Pipeline("slow", One >> Slow)
"""
    )
    node = site.start("run", project, "--until-done")
    node.wait_for_line("Slow | began")
    node.signal(signal.SIGINT)
    node.wait_for_line("a second signal stops at once")
    node.signal(signal.SIGINT)
    done = node.finished()
    assert done.code == 1
    assert done.err == ""
    (site.out("slow") / "open").touch()
    again = site.do("run", project, "--until-done")
    assert again.code == 0
    assert "Slow | ended" in again.lines
