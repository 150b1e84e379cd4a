"""What happens to the machines and disks of a cluster of several nodes, and what comes out of its pipelines all the same.

After each fault, every value is where the last queue is read exactly once, nothing is parked, `journal_check.py` calls every copy
whole, and the copies are the same at the same entry. Most tests share one cluster of three, which each leaves as it found it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT, NodeProcess, Site, wait_for
from p2pcluster.client import Cluster, connect
from p2pcluster.errors import ClusterError
from p2pcluster.home import read_address
from p2pcluster.journal import open_for_reading

HEAD = "from p2pcluster import At, Pipeline, Queue, current, sink, source, stage\n"
NUMBERS = (
    HEAD
    + """
import time

@source
def Numbers():
    yield from range({count})

@stage(processes={processes})
def Add(x):
    time.sleep({delay})
    return x + 1

pipeline = Pipeline("{name}", Numbers >> Add >> Queue("out", maxsize=None))
"""
)
FED = (
    HEAD
    + """
@stage(processes=3)
def Same(x): return x

pipeline = Pipeline("{name}", Queue("in", maxsize=None) >> Same >> Queue("out", maxsize=None))
"""
)
SMALL_DISK_MB = 24
WAITING = 200_000  # items when a machine joins; it goes with a million too
LATER_PYTHONS = ("3.12", "3.13")


class Machines:
    """The nodes of a cluster by name, each with a home of its own beside the site's and an environment that it keeps."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.running: dict[str, NodeProcess] = {}
        self.homes: dict[str, Path] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.commands: dict[str, list[str]] = {}

    def home(self, name: str) -> Path:
        return self.homes.setdefault(name, self.site.folder / name)

    def environment(self, name: str) -> dict[str, str]:
        return {"P2PCLUSTER_HOME": str(self.home(name)), **self.environments.get(name, {})}

    def start(self, name: str, *words: object) -> NodeProcess:
        empty = self.site.folder / "empty"
        empty.mkdir(exist_ok=True)
        node = self.site.start(*words, cwd=empty, command=self.commands.get(name), **self.environment(name))
        self.running[name] = node
        return node

    def start_first(self, name: str, *words: object) -> NodeProcess:
        """The node that leads, since no other is there yet."""
        node = self.start(name, *words)
        node.wait_for_line("leads cluster")
        return node

    def kill(self, name: str) -> None:
        self.running.pop(name).kill()

    def connect(self, name: str, pipeline: str | None = None, timeout_s: float = 30.0) -> Cluster:
        return connect(pipeline, home=self.home(name), authkey_file=self.site.key_file, timeout_s=timeout_s)

    def deploy(self, name: str, text: str, pipeline: str, table: str = 'python = ">=3.11"') -> None:
        folder = self.site.project(text, pipeline)
        (folder / "pyproject.toml").write_text(f"[tool.p2pcluster]\n{table}\n")
        done = self.site.do("deploy", folder, **self.environment(name))
        assert done.code == 0, done.err

    def status(self, name: str) -> dict[str, Any] | None:
        try:
            with self.connect(name) as link:
                return link.status()
        except ClusterError:
            return None

    def wait_for_roles(self, name: str, **roles: int) -> dict[str, Any]:
        """The status, as `name` hears it, once so many nodes have each role."""

        def fits() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status and Counter(node["role"] for node in status["nodes"]) == roles else None

        return wait_for(fits, f"nodes with the roles {roles}", 60)

    def leader(self, name: str) -> str:
        return self.who_leads(self.wait_for_leader(name))

    def wait_for_leader(self, name: str, other_than: str = "") -> dict[str, Any]:
        def leads() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status and self.who_leads(status) != other_than else None

        return wait_for(leads, f"a leader other than {other_than!r}", 60)

    def who_leads(self, status: dict[str, Any]) -> str:
        """The name here; a node whose home lies in the usual place has the host's name, so it is known by its port."""
        port = int(status["leader"]["address"].rpartition(":")[2])
        homes = {name: read_address(self.home(name)) for name in self.running}
        return next((name for name, address in homes.items() if address and address.port == port), "?")

    def follower(self, leader: str) -> str:
        return next(name for name in sorted(self.running) if name != leader)

    def wait_for_work(self, name: str, stage: str) -> list[int]:
        return wait_for(lambda: self.running[name].stage_pids(stage), f"{name} runs {stage}")

    def assert_copies_are_whole_and_equal(self, names: list[str] | None = None) -> None:
        """Once they have all come to the same entry, which they do when nothing more happens."""
        chosen = sorted(names or self.running)

        def at_one_entry() -> bool:
            hashes: dict[int, set[bytes]] = {}
            for name in chosen:
                state = self._reader(name).state
                hashes.setdefault(state.applied_idx, set()).add(state.hash)
            assert all(len(same) == 1 for same in hashes.values()), "copies at one entry hold the same state"
            return len(hashes) == 1

        wait_for(at_one_entry, f"the copies of {chosen} stand at one entry")
        wait_for(lambda: len({self._check(name) for name in chosen}) == 1, f"the contents of {chosen} are the same")

    def _reader(self, name: str) -> Any:
        home = self.home(name)
        return open_for_reading(home / "journal.sqlite3", home / "journal.mark")

    def _check(self, name: str) -> str:
        """What a copy holds, in one word."""
        done = self.site.python_file(ROOT / "scripts" / "journal_check.py", self.home(name))
        assert done.code == 0, (name, done.out, done.err)
        assert done.out.startswith("whole: ")
        return done.out.split()[-1]


def assert_done(link: Cluster, expected: list[Any], timeout_s: float = 60.0) -> None:
    """The run ends, and each value came out once."""
    link.wait(timeout_s)
    assert sorted(link.results("out")) == expected
    assert link.parked() == []


def out_so_far(link: Cluster) -> int:
    return sum(queue["ready"] for queue in link.status()["queues"] if queue["pipeline"] == link.pipeline and queue["name"] == "out")


def assert_says(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line, f"{part!r} is missing: {line}"


def later_python() -> str | None:
    """A Python of a later minor version than this one, on the path or where pyenv keeps them."""
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for version in LATER_PYTHONS:
        for folder in [*places, *sorted(pyenv.glob(f"versions/{version}*/bin"))]:
            python = folder / f"python{version}"
            if python.is_file() and _version_of(python) == version != _dotted_version():
                return str(python)
    return None


def _version_of(python: Path) -> str:
    done = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _dotted_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


PYTHON_OF_B = later_python()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Three machines: a; b, which has another Python where there is one; c, whose home is a small disk where one can be had."""
    site = Site(tmp_path_factory.mktemp("cluster"))
    made = Machines(site)
    only_here = site.folder / "only_here"
    only_here.mkdir()
    (only_here / "rare.py").write_text("def treat(x):\n    return x + 1\n")
    for name in ("a", "c"):
        made.environments[name] = {"PYTHONPATH": f"{ROOT}{os.pathsep}{only_here}"}
    if PYTHON_OF_B:
        made.commands["b"] = [PYTHON_OF_B, "-m", "p2pcluster"]
    small_disk = made.home("c")
    is_small = mount_small_disk(small_disk)
    try:
        made.start_first("c")
        for name in ("a", "b"):
            made.start(name)
        made.wait_for_roles("c", leader=1, voter=2)
        yield made
    finally:
        site.close()
        if is_small:
            subprocess.run(["umount", small_disk], check=True)


def mount_small_disk(folder: Path) -> bool:
    folder.mkdir(mode=0o700)
    mount = shutil.which("mount")
    words = ["-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m,mode=700", "tmpfs", folder]
    return mount is not None and subprocess.run([mount, *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def three(cluster: Machines) -> Machines:
    """The shared cluster, all three voting."""
    for name in ("a", "b", "c"):
        if name not in cluster.running or not cluster.running[name].is_running:
            cluster.start(name)
    cluster.wait_for_roles("a", leader=1, voter=2)
    return cluster


# ---- processes and nodes that die


def test_a_follower_and_its_processes_are_killed_with_work_in_hand(three: Machines) -> None:
    three.deploy("a", NUMBERS.format(name="killed", count=600, processes=6, delay=0.01), "killed")
    follower = three.follower(three.leader("a"))
    with three.connect("a" if follower != "a" else "b", "killed") as link:
        node = three.running[follower]
        three.wait_for_work(follower, "Add")
        wait_for(lambda: out_so_far(link) > 20, "some results")
        node.kill_one(lambda: node.stage_pids("Add"))
        three.wait_for_work(follower, "Add")
        before = out_so_far(link)
        three.kill(follower)
        wait_for(lambda: out_so_far(link) > before, "the others go on")
        three.start(follower)
        three.running[follower].wait_for_line(" follows ")
        assert_done(link, list(range(1, 601)))
    three.wait_for_roles("a", leader=1, voter=2)
    three.assert_copies_are_whole_and_equal()


def test_on_done_waits_for_the_machine_that_the_project_came_from(three: Machines) -> None:
    """That one has the files. It is dead when the run is done; another one's try would fail, be repeated and be given up."""
    leader = three.leader("a")
    origin = three.follower(leader)
    gate, told = three.site.folder / "gate", three.site.folder / "told"
    three.deploy(
        origin,
        HEAD
        + f"""
import time
from pathlib import Path

@source
def Numbers():
    yield from range(30)

@stage(processes=6)
def Wait(x):
    while not Path({str(gate)!r}).exists():
        time.sleep(0.01)
    return x

def finish():
    with open({str(told)!r}, "a") as file:
        file.write(current().node + "\\n")

pipeline = Pipeline("finish", Numbers >> Wait >> Queue("out", maxsize=None), on_done=finish)
""",
        "finish",
    )
    with three.connect(leader, "finish") as link:
        wait_for(lambda: any(stage["idle_because"] == "the source has ended" for stage in link.status()["stages"]), "the source has ended")
        three.kill(origin)
        gate.touch()
        wait_for(lambda: all(pipeline["state"] == "done" for pipeline in link.status()["pipelines"]), "all items are done")
        assert not told.exists()
        three.start(origin)
        assert_done(link, list(range(30)))
    assert told.read_text().split() == [f"{socket.gethostname()}/{three.home(origin).name}"]
    three.wait_for_roles("a", leader=1, voter=2)
    three.assert_copies_are_whole_and_equal()


# ---- machines that differ


@pytest.mark.skipif(PYTHON_OF_B is None, reason=f"no Python {' or '.join(LATER_PYTHONS)} here beside {_dotted_version()}")
def test_a_node_with_another_python_holds_a_copy_and_works_only_for_a_project_that_admits_it(three: Machines) -> None:
    text = HEAD + """
import sys, time

@stage(processes=6)
def Where(x):
    time.sleep(0.005)
    return x, "%d.%d" % sys.version_info[:2]

pipeline = Pipeline("pythons", Queue("in", maxsize=None) >> Where >> Queue("out", maxsize=None))
"""
    three.deploy("a", text, "pythons", table="")
    ours, theirs = _dotted_version(), _version_of(Path(PYTHON_OF_B or ""))
    with three.connect("b", "pythons") as link:
        link.put_many("in", range(100))
        wait_for(lambda: out_so_far(link) == 100, "the others do all of it")
        assert {version for _, version in link.results("out")} == {ours}
        (alarm,) = (alarm for alarm in link.status()["alarms"] if alarm.startswith("pythons: "))
        assert_says(alarm, f"{socket.gethostname()}/{three.home('b').name} (Python {theirs}.", f"for Python =={ours}",
                    'write python = ">=3.11"', "in its pyproject.toml")

        refused = three.site.project(text, "pythons") / "pyproject.toml"
        refused.write_text('[tool.p2pcluster]\npython = "~=3.11"\n')
        done = three.site.do("deploy", refused.parent, **three.environment("a"))
        assert done.code == 1
        assert_says(done.the_error(), "pyproject.toml has the python '~=3.11'", 'write python = ">=3.11, <3.14"')

        three.deploy("a", text, "pythons")
        three.wait_for_work("b", "Where")
        link.put_many("in", range(100, 400))
        link.close("in")
        link.wait(60)
        values = list(link.results("out"))
        assert link.parked() == [] and not any(alarm.startswith("pythons: ") for alarm in link.status()["alarms"])
        versions = {node["facts"]["python"].rpartition(".")[0] for node in link.status()["nodes"]}
    assert sorted(x for x, _ in values) == list(range(400))
    assert {version for _, version in values} == versions == {ours, theirs}
    three.assert_copies_are_whole_and_equal()


def test_a_stage_whose_module_is_missing_on_one_node_runs_on_the_others(three: Machines) -> None:
    three.deploy(
        "a",
        HEAD
        + """
import rare

@source
def Numbers():
    yield from range(300)

@stage(processes=1, retries=0)
def First(x):
    return rare.treat(x)

@stage(processes=1, retries=0)
def Second(x):
    return rare.treat(x)

@stage(processes=1, retries=0)
def Third(x):
    return rare.treat(x), current().node

pipeline = Pipeline("rare", Numbers >> First >> Second >> Third >> Queue("out", maxsize=None))
""",
        "rare",
    )
    with three.connect("a", "rare") as link:
        link.wait(60)
        values = list(link.results("out"))
        alarms = link.status()["alarms"]
        assert link.parked() == []
    assert sorted(x for x, _ in values) == list(range(3, 303))
    lacking = f"{socket.gethostname()}/{three.home('b').name}"
    assert lacking not in {node for _, node in values}
    assert any("No module named 'rare'" in alarm and f"on {lacking}: does not start" in alarm for alarm in alarms), alarms
    three.assert_copies_are_whole_and_equal()


# ---- disks


def test_a_damaged_journal_keeps_its_node_out_until_it_comes_back_as_a_new_member(three: Machines) -> None:
    leader = three.leader("a")
    name = three.follower(leader)
    three.deploy(leader, FED.format(name="flipped"), "flipped")
    with three.connect(leader, "flipped") as link:
        link.put_many("in", ["a needle in the journal", *range(100)])
        three.assert_copies_are_whole_and_equal()
        assert three.running.pop(name).stop() == 0
        journal = three.home(name) / "journal.sqlite3"
        data = journal.read_bytes()
        at = data.index(b"a needle in the journal")
        journal.write_bytes(data[:at] + b"A" + data[at + 1 :])

        refused = three.site.do("run", cwd=three.site.folder / "empty", **three.environment(name))
        assert refused.code == 1
        error = refused.the_error()
        assert_says(error, f"journal {journal} is damaged: ", "start with an empty --home", "joins the others as a new member")
        assert journal.read_bytes()[at : at + 1] == b"A", "the file is kept as it is"
        link.put_many("in", range(100, 200))  # two of three are a majority

        three.homes[name] = three.site.folder / f"{name}-again"
        three.start(name)
        three.wait_for_roles(leader, leader=1, voter=2)
        link.close("in")
        assert_done_with(link, ["a needle in the journal", *range(200)])
    three.assert_copies_are_whole_and_equal()


def assert_done_with(link: Cluster, expected: list[Any]) -> None:
    link.wait(60)
    assert Counter(link.results("out")) == Counter(expected)
    assert link.parked() == []


@pytest.mark.parametrize("case", ["a follower's", "the leader's"])
def test_a_full_disk_stops_its_node_alone_and_with_space_it_goes_on(three: Machines, case: str) -> None:
    """c has the small disk."""
    home = three.home("c")
    if not home.is_mount():
        pytest.skip("this user may not mount a tmpfs")
    make_leader(three, "c", case == "the leader's")
    name = "leads" if case == "the leader's" else "follows"
    three.deploy("a", FED.format(name=name), name)
    hog = home / "out" / "hog"
    hog.write_bytes(bytes(max(0, shutil.disk_usage(home).free - (1 << 20))))
    acknowledged = 0
    with three.connect("a", name) as link:
        full = three.running["c"]
        while full.is_running:
            assert acknowledged < 1_000, "the disk fills up"
            link.put("in", [acknowledged, "x" * 20_000])
            acknowledged += 1
        done = full.finished()
        assert done.code == 1
        assert_says(done.the_error(), f"the disk of {home} is full", "free some space and start again", "nothing acknowledged is lost")
        for _ in range(20):
            link.put("in", [acknowledged, "after"])
            acknowledged += 1
        three.wait_for_leader("a", other_than="c")

        hog.unlink()
        three.start("c").wait_for_line(" follows ")
        three.wait_for_roles("a", leader=1, voter=2)
        link.close("in")
        link.wait(60)
        assert sorted(number for number, _ in link.results("out")) == list(range(acknowledged))
        assert link.parked() == []
    three.assert_copies_are_whole_and_equal()


def make_leader(machines: Machines, name: str, leads: bool) -> None:
    """Have a node lead, or not: whoever leads and should not is killed, so that chance chooses the next one, and started again."""
    for _ in range(20):
        leader = machines.leader("a")
        if (leader == name) == leads:
            return
        machines.running.pop(leader).kill()
        machines.wait_for_leader(next(iter(machines.running)), other_than=leader)
        machines.start(leader)
        machines.wait_for_roles(name, leader=1, voter=2)
    raise AssertionError(f"{name} {'never leads' if leads else 'leads all the time'}")


# ---- keys, and a disk that is gone


@pytest.fixture
def machines(site: Site) -> Machines:
    return Machines(site)


def test_the_key_goes_to_the_machines_as_the_readme_says_and_a_wiped_one_is_a_new_node(machines: Machines) -> None:
    """Each machine has a user's folder of its own, where the key is and, below it, the node's home."""
    site = machines.site
    site.key_file.unlink()
    for name in ("a", "b", "c"):
        (site.folder / name).mkdir()
        machines.environments[name] = {"HOME": str(site.folder / name), "P2PCLUSTER_HOME": "", "P2PCLUSTER_AUTHKEY_FILE": ""}
        machines.homes[name] = site.folder / name / ".p2pcluster" / "default" / socket.gethostname()
    machines.start_first("a")
    key = site.do("key", **machines.environment("a"))
    assert key.code == 0
    unkeyed = site.do(**machines.environment("b"))
    assert unkeyed.code == 1
    assert_says(unkeyed.the_error(), "p2pcluster key", "p2pcluster key --set")
    for name in ("b", "c"):
        assert site.do("key", "--set", stdin=key.out, **machines.environment(name)).code == 0
        machines.start(name)
    site.key_file.write_text(key.out)  # for this test's own questions
    site.key_file.chmod(0o600)
    first = machines.wait_for_roles("a", leader=1, voter=2)
    machines.deploy("a", NUMBERS.format(name="wiped", count=600, processes=6, delay=0.01), "wiped")
    with machines.connect("a", "wiped") as link:
        wait_for(lambda: out_so_far(link) > 20, "some results")
        machines.kill("c")
        shutil.rmtree(site.folder / "c" / ".p2pcluster")
        refused = site.do(**machines.environment("c"))
        assert refused.code == 1
        assert_says(refused.the_error(), "p2pcluster key", "p2pcluster key --set")
        assert site.do("key", "--set", stdin=site.do("key", **machines.environment("a")).out, **machines.environment("c")).code == 0
        machines.start("c").wait_for_line(" follows ")
        after = machines.wait_for_roles("a", leader=1, voter=2)
        assert ids(after) != ids(first), "an empty disk is a new node"
        assert len(ids(after) & ids(first)) == 2
        assert_done(link, list(range(1, 601)))
    machines.assert_copies_are_whole_and_equal()
    survivor = machines.leader("a")
    machines.kill(next(name for name in ("a", "b") if name != survivor))  # with the new one there is a majority
    with machines.connect(survivor, "wiped") as link:
        assert link.start() == 2, "what is said is committed"


def ids(status: dict[str, Any]) -> set[str]:
    return {node["id"] for node in status["nodes"]}


# ---- two clusters of one name


def test_two_clusters_of_one_name_that_both_have_work_go_on_and_say_so(machines: Machines) -> None:
    """They come to be on two ports, between which nothing is heard; then one of them moves to the other's port."""
    site = machines.site
    for name, port in (("a", site.port), ("b", site.port + 1)):
        machines.environments[name] = {"P2PCLUSTER_PORT": str(port)}
        machines.start_first(name)
        machines.deploy(name, FED.format(name=f"of_{name}"), f"of_{name}")
        with machines.connect(name, f"of_{name}") as link:
            link.put_many("in", range(50))
    machines.running.pop("b").stop()
    machines.environments["b"] = {"P2PCLUSTER_PORT": str(site.port)}
    machines.start("b").wait_for_line("leads cluster")
    for name in ("a", "b"):
        with machines.connect(name, f"of_{name}") as link:
            alarms = wait_for(lambda: link.status()["alarms"], f"{name} raises an alarm")  # noqa: B023
            assert_says(alarms[0], "two clusters of this name hold work", "stop the nodes of one", "--cluster")
            assert len(link.status()["nodes"]) == 1
            link.put_many("in", range(50, 100))
            link.close("in")
            assert_done(link, list(range(100)))
        machines.assert_copies_are_whole_and_equal([name])


# The place for: of two clusters of one name the empty one dissolves, and its nodes join the other.


# ---- much that waits


def test_a_machine_that_joins_a_long_queue_gets_a_snapshot_while_work_goes_on(machines: Machines) -> None:
    machines.start_first("a")
    machines.deploy(
        "a",
        HEAD
        + f"""
import time

@source
def Numbers():
    yield from range({WAITING})

@stage(processes=2)
def Add(x):
    if not (current().out_dir.parent.parent.parent / "open").exists():
        time.sleep(0.01)
    return x + 1

pipeline = Pipeline("long", Numbers >> Queue("waiting", maxsize=None) >> Add >> Queue("out", maxsize=None))
""",
        "long",
    )
    with machines.connect("a", "long") as link:
        wait_for(lambda: any("source has ended" in (s["idle_because"] or "") for s in link.status()["stages"]), "all of it waits", 60)
        before = out_so_far(link)
        machines.start("b")
        machines.wait_for_roles("a", leader=1, standby=1)
        machines.running["a"].wait_for_line("sending a snapshot")
        index = link.status()["cluster"]["commit_index"]
        wait_for(lambda: last_index(machines, "b") >= index, "the copy has everything")
        during = out_so_far(link)
        assert before < during < WAITING, "work went on meanwhile, and is not over"
        (machines.site.folder / "open").touch()
        link.wait(120)
        assert sorted(link.results("out")) == list(range(1, WAITING + 1))
        assert link.parked() == []
    machines.assert_copies_are_whole_and_equal()


def last_index(machines: Machines, name: str) -> int:
    home = machines.home(name)
    try:
        return open_for_reading(home / "journal.sqlite3", home / "journal.mark").last_index
    except (ClusterError, OSError):
        return 0
