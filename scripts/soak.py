"""Kill things while a pipeline runs, and compare what comes out with what had to come out.

    python scripts/soak.py plain --kills 200          a plain generator through two stages; source, stage and node are killed
    python scripts/soak.py census --kills 20          the bundled example; the node and a stage process are killed in turn
    python scripts/soak.py cluster --nodes 3 --kills 20   the plain one on several nodes; leaders, followers and stage processes are killed
    python scripts/soak.py censuses --nodes 3 --kills 50  the census on several nodes, again and again; whoever leads is killed
    python scripts/soak.py diamond --count 10000 --kills 10   of the items of a diamond 20 % raise and 1 % kill their process; the node is killed

Everything runs on loopback in a temporary folder. The seed is printed; --seed repeats the choices (not the timing).
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from p2pcluster.client import connect  # noqa: E402
from p2pcluster.core.snapshot import read_configuration  # noqa: E402
from p2pcluster.errors import ClusterError  # noqa: E402
from p2pcluster.journal import open_for_reading  # noqa: E402

MISSED_S = 20.0  # a node without a majority that has not learnt of the end by then will not

PLAIN = '''
import time
from p2pcluster import Pipeline, Queue, source, stage

@source
def Numbers():
    for n in range({count}):
        yield n

@stage(processes=2)
def Add(x):
    time.sleep({delay})
    return x + 1

@stage(processes=2)
def Double(x):
    return 2 * x

pipeline = Pipeline("plain", Numbers >> Add >> Double >> Queue("out", maxsize=None))
'''


DIAMOND = '''
import os, signal, zlib
from p2pcluster import Pipeline, current, source, stage

def fate(name, n):
    """What becomes of the item n in a stage, each time: raises, dies, or ""."""
    chance = zlib.crc32(f"{{name}} {{n}}".encode()) % 1000
    return "raises" if chance < 200 else "dies" if chance < 210 else ""

def meet(name, n):
    """Note that the item is tried, in a file that a kill leaves whole; then what has to come."""
    file = os.open(current().out_dir / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{{name}} {{n}}\\n".encode())
    os.close(file)
    if fate(name, n) == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate(name, n) == "raises":
        raise ValueError(n)

@source
def Numbers():
    yield from range({count})

@stage(retries=1, backoff_s=0.05)
def Left(n):
    meet("Left", n)
    return ["Left", n]

@stage(retries=1, backoff_s=0.05)
def Right(n):
    meet("Right", n)
    return ["Right", n]

@stage(retries=1, backoff_s=0.05)
def Join(path):
    meet(f"Join {{path[0]}}", path[1])
    return path

pipeline = Pipeline("diamond", Numbers >> [Left, Right] >> Join)
'''


class Node:
    """A node under test: started, killed, started again. `pids` are the processes that this script started and may kill."""

    def __init__(self, folder: Path, arguments: list[str], name: str = "home", port: int = 47400) -> None:
        self.folder = folder
        self.home = folder / name
        self.arguments = arguments
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "P2PCLUSTER_HOME": str(self.home), "P2PCLUSTER_PORT": str(port),
                            "P2PCLUSTER_AUTHKEY_FILE": str(folder / "key"), "P2PCLUSTER_BIND": "127.0.0.1"}
        self.log = (folder / f"{name}.log").open("ab")
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.popen = subprocess.Popen([sys.executable, "-m", "p2pcluster", *self.arguments], env=self.environment, cwd=self.folder,
                                      stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    @property
    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def children(self) -> dict[int, str]:
        """The stage processes of this node: pid and what they run."""
        found = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"stage" in words:
                found[int(pid)] = words[-2].decode()
        return found

    def kill_node(self) -> None:
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait()

    def wait(self, timeout_s: float) -> int:
        assert self.popen is not None
        return self.popen.wait(timeout_s)


def check_journal(home: Path) -> None:
    """`journal_check.py` must say whole."""
    command = [sys.executable, str(ROOT / "scripts" / "journal_check.py"), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"journal_check: {done.stdout}{done.stderr}")


def wait_for_work(node: Node) -> None:
    """Until stage processes run, so that a kill hits work in hand."""
    deadline_s = time.monotonic() + 30
    while node.is_running and not node.children():
        if time.monotonic() > deadline_s:
            raise SystemExit("FAILED: no stage process runs for 30 s")
        time.sleep(0.01)


def kill_something(node: Node, chance: random.Random, kind: str, counts: Counter[str]) -> None:
    """One kill; a node that was killed is checked and started again."""
    children = node.children() if node.is_running else {}
    if kind == "node" or not children:
        before = node.pid
        node.kill_node()
        check_journal(node.home)
        node.start()
        assert node.pid != before, "the node is another process"
        counts["node"] += 1
        return
    wanted = [pid for pid, name in children.items() if (kind == "source") == name.endswith(("Numbers", "ListFiles"))] or list(children)
    pid = chance.choice(wanted)
    counts[children[pid]] += 1
    os.kill(pid, signal.SIGKILL)


def soak(node: Node, chance: random.Random, kills: int, gap_s: float, kinds: list[str], timeout_s: float) -> Counter[str]:
    """Kill `kills` times, each kind equally often, about `gap_s` apart, while the run goes on; then let it end."""
    counts: Counter[str] = Counter()
    order = (kinds * kills)[:kills]
    chance.shuffle(order)
    node.start()
    deadline_s = time.monotonic() + timeout_s
    for kind in order:
        wait_for_work(node)
        time.sleep(chance.uniform(0.0, 2.0) * gap_s)
        if not node.is_running:
            print(f"the run ended after {sum(counts.values())} kills: give it more work")
            break
        kill_something(node, chance, kind, counts)
    node.wait(max(1.0, deadline_s - time.monotonic()))
    check_journal(node.home)
    return counts


def plain(args: argparse.Namespace, folder: Path, chance: random.Random) -> None:
    project = folder / "project"
    project.mkdir()
    (project / "pipeline.py").write_text(PLAIN.format(count=args.count, delay=args.delay))
    node = Node(folder, ["run", str(project), "--until-done"])
    counts = soak(node, chance, args.kills, args.gap, ["source", "stage", "node"], args.timeout)
    node.arguments = ["run", str(project)]
    node.start()
    try:
        with connect("plain", home=node.home, authkey_file=folder / "key", timeout_s=30) as cluster:
            values = list(cluster.results("out"))
            parked = cluster.parked()
    finally:
        node.kill_node()
    expected = [2 * (n + 1) for n in range(args.count)]
    doubles = [value for value, count in Counter(values).items() if count > 1]
    print(f"{sum(counts.values())} kills {dict(counts)}: {len(values)} values, {len(set(expected) - set(values))} missing, "
          f"{len(doubles)} twice, {len(parked)} parked")
    if sorted(values) != expected or parked:
        raise SystemExit("FAILED")
    print("every value is there exactly once")


def census(args: argparse.Namespace, folder: Path, chance: random.Random) -> None:
    sys.path.insert(0, str(ROOT / "p2pcluster" / "examples" / "census"))
    import sysconfig

    from p2pcluster.examples.census import measure, store

    node = Node(folder, ["demo"])
    counts = soak(node, chance, args.kills, args.gap, ["stage", "node"], args.timeout)
    expected = measure.direct_census(Path(sysconfig.get_path("stdlib")))
    found = store.read_figures(folder / "home" / "out" / "census", 1).totals
    print(f"{sum(counts.values())} kills {dict(counts)}: {found}")
    if found != expected:
        raise SystemExit(f"FAILED: a direct count gives {expected}")
    print("the totals equal a direct count")


def censuses(args: argparse.Namespace, folder: Path, chance: random.Random) -> None:
    """Nodes that end with a run and start the next one, until so many leaders were killed; each census is compared with a direct count."""
    project = ROOT / "p2pcluster" / "examples" / "census"
    sys.path.insert(0, str(project))
    import sysconfig

    from p2pcluster.examples.census import measure, store

    expected = measure.direct_census(Path(sysconfig.get_path("stdlib")))
    port = chance.randrange(20000, 30000)
    nodes = [Node(folder, ["run", str(project), "--until-done", "--again"], f"node{n}", port) for n in range(args.nodes)]
    takeovers_s: list[float] = []
    runs = kills = 0
    deadline_s = time.monotonic() + args.timeout
    try:
        while kills < args.kills:
            for node in nodes:
                node.arguments = ["run", str(project), "--until-done", "--again"]
                node.start()
            kills += kill_leaders(nodes, chance, args.kills - kills, args.gap, takeovers_s, deadline_s)
            late = wait_for_ends(nodes, deadline_s)
            runs += 1
            check_cluster(nodes)
            outs = [node.home / "out" / "census" for node in nodes]
            (found,) = (store.read_figures(out, 1).totals for out in outs if (out / store.FILE_NAME).exists())
            print(f"census {runs}, {kills} kills so far, {late} nodes missed the end: {found}", flush=True)
            if found != expected:
                raise SystemExit(f"FAILED: a direct count gives {expected}")
    finally:
        for node in nodes:
            if node.is_running:
                node.kill_node()
    takeovers_s.sort()
    print(f"{kills} leaders killed in {runs} censuses, each equal to a direct count; another led after "
          f"{takeovers_s[len(takeovers_s) // 2]:.2f} s in the median and {takeovers_s[-1]:.2f} s at most")


def kill_leaders(nodes: list[Node], chance: random.Random, most: int, gap_s: float, takeovers_s: list[float], deadline_s: float) -> int:
    """Kill whoever leads, and start it again once another does, until the run is over; how many were killed."""
    kills = 0
    while kills < most and all(node.is_running for node in nodes):
        time.sleep(chance.uniform(0.0, 2.0) * gap_s)
        leader = leader_of(nodes)
        if leader is None or sum(voting(node) for node in nodes) < len(nodes):
            check_deadline(deadline_s, nodes)
            continue
        leader.kill_node()
        killed_s = time.monotonic()
        kills += 1
        others = [node for node in nodes if node is not leader]
        while all(node.is_running for node in others) and leader_of(others) is None:
            check_deadline(deadline_s, nodes)
            time.sleep(0.02)
        takeovers_s.append(time.monotonic() - killed_s)
        leader.arguments = [word for word in leader.arguments if word != "--again"]
        time.sleep(chance.choice([0.0, 0.5]))
        leader.start()
    return kills


def leader_of(nodes: list[Node]) -> Node | None:
    """Which of them leads, as one that runs says."""
    for node in nodes:
        try:
            if node.is_running:
                with connect(home=node.home, authkey_file=node.home.parent / "key", timeout_s=1) as link:
                    name = str(link.status()["leader"]["name"])
                return next((other for other in nodes if name.endswith("/" + other.home.name)), None)
        except ClusterError:
            continue
    return None


def voting(node: Node) -> bool:
    """Whether the node's copy of the journal votes, by what that says itself."""
    try:
        reader = open_for_reading(node.home / "journal.sqlite3", node.home / "journal.mark")
    except (ClusterError, OSError):
        return False
    configuration = read_configuration(reader.meta["configuration"])
    return configuration.is_voter(str(reader.meta["node_id"])) and not configuration.is_joint


def wait_for_ends(nodes: list[Node], deadline_s: float) -> int:
    """Until all have ended with the run; how many had to be told, because they were dead when the others knew that it was done."""
    alone_since_s = None
    while any(node.is_running for node in nodes):
        check_deadline(deadline_s, nodes)
        running = [node for node in nodes if node.is_running]
        if len(running) < len(nodes) // 2 + 1:
            alone_since_s = alone_since_s or time.monotonic()
            if time.monotonic() > alone_since_s + MISSED_S:
                for node in running:
                    node.popen.send_signal(signal.SIGTERM) if node.popen else None
                    node.wait(30)
                return len(running)
        time.sleep(0.05)
    codes = [node.wait(1) for node in nodes]
    if any(codes):
        raise SystemExit(f"FAILED: the nodes ended with {codes}")
    return 0


def check_deadline(deadline_s: float, nodes: list[Node]) -> None:
    if time.monotonic() > deadline_s:
        raise SystemExit(f"FAILED: not done in time; of {len(nodes)} nodes {sum(node.is_running for node in nodes)} run")


def cluster(args: argparse.Namespace, folder: Path, chance: random.Random) -> None:
    project = folder / "project"
    project.mkdir()
    (project / "pipeline.py").write_text(PLAIN.format(count=args.count, delay=args.delay))
    port = chance.randrange(20000, 30000)
    nodes = [Node(folder, ["run", str(project)], f"node{n}", port) for n in range(args.nodes)]
    for node in nodes:
        node.start()
    counts: Counter[str] = Counter()
    deadline_s = time.monotonic() + args.timeout
    while not (folder / "key").exists():
        time.sleep(0.1)
    try:
        with connect("plain", home=nodes[0].home, authkey_file=folder / "key", timeout_s=60) as link:
            while len(link.status()["nodes"]) < args.nodes:
                time.sleep(0.2)
            for _ in range(args.kills):
                time.sleep(chance.uniform(0.0, 2.0) * args.gap)
                state = link.status()
                if state["pipelines"][0]["state"] == "done":
                    print(f"the run ended after {sum(counts.values())} kills: give it more work")
                    break
                kill_in_cluster(nodes, state, chance, counts)
            while (state := link.status())["pipelines"][0]["state"] != "done":
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"FAILED: not done in time: {state}")
                time.sleep(0.5)
            values, parked = list(link.results("out")), link.parked()
    finally:
        for node in nodes:
            node.popen.send_signal(signal.SIGTERM) if node.is_running and node.popen else None
        for node in nodes:
            node.wait(30)
    check_cluster(nodes)
    expected = [2 * (n + 1) for n in range(args.count)]
    doubles = [value for value, count in Counter(values).items() if count > 1]
    print(f"{sum(counts.values())} kills {dict(counts)}: {len(values)} values, {len(set(expected) - set(values))} missing, "
          f"{len(doubles)} twice, {len(parked)} parked")
    if sorted(values) != expected or parked:
        raise SystemExit("FAILED")
    print("every value is there exactly once")


def kill_in_cluster(nodes: list[Node], state: dict[str, Any], chance: random.Random, counts: Counter[str]) -> None:
    """Kill the leader, another node or a stage process; what was killed starts again."""
    leader = next((node for node in nodes if state["leader"]["name"].endswith("/" + node.home.name)), nodes[0])
    kind = chance.choice(["leader", "node", "stage"])
    node = leader if kind == "leader" else chance.choice(nodes)
    if kind == "stage" and (children := node.children()):
        os.kill(chance.choice(list(children)), signal.SIGKILL)
    else:
        node.kill_node()
        time.sleep(chance.choice([0.0, 1.0, 3.0]))
        node.start()
    counts["leader" if node is leader and kind != "stage" else kind] += 1


def diamond(args: argparse.Namespace, folder: Path, chance: random.Random) -> None:
    """On each path done and parked together are what was put, and it is the same items that fail each time that they are tried."""
    project = folder / "project"
    project.mkdir()
    (project / "pipeline.py").write_text(DIAMOND.format(count=args.count))
    node = Node(folder, ["run", str(project)], port=chance.randrange(20000, 30000))
    node.start()
    begun_s = time.monotonic()
    deadline_s = begun_s + args.timeout
    while not (folder / "key").exists():
        check_deadline(deadline_s, [node])
        time.sleep(0.1)
    try:
        with connect("diamond", home=node.home, authkey_file=folder / "key", timeout_s=60) as link:
            kills = kill_until_done(node, link, args, chance, deadline_s)
            done = {stage["name"]: stage["done"] for stage in link.status()["stages"]}
            results, parked = Counter(map(tuple, link.results("Join"))), parked_calls(link)
    finally:
        node.popen.send_signal(signal.SIGTERM) if node.is_running and node.popen else None
        node.wait(30)
    check_journal(node.home)
    calls = Counter((name, int(n)) for name, n in (
        line.rsplit(" ", 1) for line in (node.home / "out" / "diamond" / "calls").read_text().splitlines()))
    print(f"{args.count} items, {kills} kills of the node, {time.monotonic() - begun_s:.0f} s")
    for name, count in {"Left": args.count, "Right": args.count, "Join": done["Left"] + done["Right"]}.items():
        left = sum(number for call, number in parked.items() if call[0].startswith(name))
        print(f"  {name}: {count} put = {done[name]} done + {left} parked")
        if done[name] + left != count:
            raise SystemExit("FAILED: an item is lost or counted twice")
    check_fates(runpy.run_path(str(project / "pipeline.py"))["fate"], calls, results, parked)


def parked_calls(link: Any) -> Counter[tuple[str, int]]:
    """The calls whose items are parked, as they are noted."""
    found: Counter[tuple[str, int]] = Counter()
    for item in link.parked():
        name, _, item_id = item["id"].partition("/")[2].rpartition(":")
        value = link.parked_value(name, int(item_id))
        found[(name, value) if name != "Join" else (f"Join {value[0]}", value[1])] += 1
    return found


def check_fates(fate: Any, calls: Counter[tuple[str, int]], results: Counter[tuple[str, int]], parked: Counter[tuple[str, int]]) -> None:
    """What became of each item is what had to, each time that it was tried."""
    fates = {call: fate(*call) for call in calls}
    bad = {call for call, what in fates.items() if what}
    counts = Counter(fates.values())
    print(f"  of {len(calls)} calls {counts['raises']} raise and {counts['dies']} kill their process; all were made {sum(calls.values())} times")
    came = {(f"Join {side}", n) for side, n in results}
    troubles = {
        "came of a parked item": [call for call in came if call in parked] + [call for call in results if call in parked],
        "came twice, or were parked twice": [call for call, number in [*results.items(), *parked.items()] if number > 1],
        "fail each time and are not parked": list(bad - set(parked)),
        "do not fail and are parked": list(set(parked) - bad),
        "were to come and did not": [call for call in calls if call[0].startswith("Join") and call not in bad and call not in came],
        "were parked before they had been tried twice": [call for call in bad if calls[call] < 2],
    }
    for what, found in troubles.items():
        if found:
            raise SystemExit(f"FAILED: {len(found)} {what}: {sorted(found)[:5]}")
    print("no output comes from a parked item, and the same items fail each time that they are tried")


def kill_until_done(node: Node, link: Any, args: argparse.Namespace, chance: random.Random, deadline_s: float) -> int:
    """Kill the node so many times, about a gap apart, each time with work in hand; then until the run is done."""
    kills = 0
    while True:
        check_deadline(deadline_s, [node])
        found = link.status()["pipelines"]
        if found and found[0]["state"] == "done":
            return kills
        if kills < args.kills and found:
            wait_for_work(node)
            time.sleep(chance.uniform(0.0, 2.0) * args.gap)
            node.kill_node()
            check_journal(node.home)
            node.start()
            kills += 1
        time.sleep(0.2)


def check_cluster(nodes: list[Node]) -> None:
    """Every copy is whole, and copies that stand at the same entry hold the same state."""
    states: dict[int, set[bytes]] = {}
    for node in nodes:
        check_journal(node.home)
        reader = open_for_reading(node.home / "journal.sqlite3", node.home / "journal.mark")
        states.setdefault(reader.state.applied_idx, set()).add(reader.state.hash)
    print(f"copies stand at entries {sorted(states)}")
    if any(len(hashes) > 1 for hashes in states.values()):
        raise SystemExit("FAILED: copies at one entry differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plain", "census", "cluster", "censuses", "diamond"])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gap", type=float, default=1.0, help="seconds between kills, on average")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--delay", type=float, default=0.0005, help="seconds that an item of the first stage takes")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--timeout", type=float, default=900.0)
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    os.environ["P2PCLUSTER_BIND"] = "127.0.0.1"  # where this program's own connections look for a node too
    folder = Path(tempfile.mkdtemp(prefix="p2pcluster-soak-"))
    try:
        {"plain": plain, "census": census, "cluster": cluster, "censuses": censuses, "diamond": diamond}[args.what](args, folder, random.Random(seed))
    except BaseException:
        print(f"kept: {folder}")
        raise
    shutil.rmtree(folder)


if __name__ == "__main__":
    try:
        main()
    except ClusterError as error:
        raise SystemExit(f"soak: {error}") from error
