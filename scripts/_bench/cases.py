"""The cases: what each runs, and how its figures come out of what was seen. Every count and sum is checked first."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from _bench.clusters import POLL_S, Nodes, Progress, progress_of, read_status, wait_for
from _bench.machine import Sampler, children_of, percentile, usage_of
from _bench.nodes import BenchError, Node, environment, read_json_file, scratch
from p2pcluster.client import Cluster
from p2pcluster.core.membership import voters_wanted

MANAGERS = Path(__file__).with_name("managers.py")
W2_PROCESSES = 8
W2_NAP_S = 0.01
PUT_PAUSE_S = 0.02
STEADY_PROCESSES = 3  # of the project `steady`
READY_AT_KILL = 300  # two seconds of the steady pipeline's work
FAILOVER_S_MAX = 60.0
DONE_AFTER_HANDOVER = 10  # times that the new leader tells of more, before it counts as going on
ENTRIES_UNDER_WAY = 20
RATE_MIN_PER_S = 500  # slower than this is not a figure but a failure: bounds every wait
MIB = 1 << 20

Figures = dict[str, Any]


class Sizes(NamedTuple):
    """How much each case does."""

    items: int = 1_000_000
    slow_items: int = 500_000
    managers_items: int = 50_000  # one get and one put for each: a fiftieth of the rate of the others
    naps: int = 2_000
    latencies: int = 500
    starts: int = 5
    idle_s: float = 10.0
    nodes: int = 3
    listen_s: float = 60.0  # a beacon of an idle node comes every 5 to 10 s
    kills: int = 10
    handovers: int = 10
    phases: int = 40  # of the case `logs`, by turns silent and talking: short, as other work on the machine comes and goes
    phase_ms: int = 250


QUICK = Sizes(items=100_000, slow_items=100_000, managers_items=10_000, naps=800, latencies=300, starts=3, idle_s=5.0,
              listen_s=30.0, kills=5, handovers=3, phases=24)


def time_allowed_s(items: int) -> float:
    return 60.0 + items / RATE_MIN_PER_S


def sum_of_squares(items: int) -> int:
    return (items - 1) * items * (2 * items - 1) // 6


def check_total(who: str, found: Figures, items: int) -> None:
    """Raises `BenchError` unless every item came, once."""
    expected = (items, sum_of_squares(items))
    if (found["count"], found["total"]) != expected:
        raise BenchError(f"{who}: count and sum are {found['count']:,} and {found['total']:,}, "
                         f"and should be {expected[0]:,} and {expected[1]:,}")


def rate_per_s(found: Figures, items: int) -> float:
    return float(items / (found["last_s"] - found["first_s"]))


# ---- W1


def w1(sizes: Sizes) -> Figures:
    """Small items through three processes, fsync before acknowledge."""
    return _w1(sizes.items, None)


def w1_slow_disk(sizes: Sizes) -> Figures:
    """The same with 10 ms added to each fsync."""
    return _w1(sizes.slow_items, 0.010)


def _w1(items: int, delay_s: float | None) -> Figures:
    with scratch() as folder, Node(folder, "w1", "--until-done", params={"items": items}, delay_s=delay_s) as node:
        with Sampler(node.pid) as sampler:
            node.wait_until_done(time_allowed_s(items))
        out = node.out_dir("w1")
        found = read_json_file(out / "Total.json")
        check_total("W1", found, items)
        names = {node.pid: "node", _pid_in(out / "numbers.pid"): "source", _pid_in(out / "Total.pid"): "sink"}
        log = node.log_size()
        return {
            "items": items, "rate_per_s": rate_per_s(found, items),
            "cpu_s_per_100k": _cpu_per_100k(sampler, names, found, items),
            "node_rss_mib_max": _mib(sampler.rss_bytes_max(node.pid)),
            "commits": log.entries, "items_per_commit": items / log.entries,
        }


def _pid_in(file: Path) -> int:
    return int(file.read_text())


def _cpu_per_100k(sampler: Sampler, names: dict[int, str], found: Figures, items: int) -> Figures:
    """By process; the one child that has no name of its own is the stage."""
    figures = {}
    for pid in sampler.pids():
        cpu_s = sampler.cpu_s_between(pid, found["first_s"], found["last_s"])
        if cpu_s:
            figures[names.get(pid, "stage")] = cpu_s * 100_000 / items
    return {**figures, "all": sum(figures.values())}


# ---- what a stage that prints much costs the others


def logs(sizes: Sizes) -> Figures:
    """W1's work beside a source that prints 10,000 lines/s: the rate while they go to the node, and while they go into /dev/null."""
    params = {"phases": sizes.phases, "phase_ms": sizes.phase_ms}
    with scratch() as folder, Node(folder, "logs", "--until-done", params=params) as node:
        node.wait_until_done(time_allowed_s(0) + sizes.phases * sizes.phase_ms / 1000)
        out = node.out_dir("logs")
        samples, phases = read_json_file(out / "samples.json"), read_json_file(out / "phases.json")
        printed, came = sum(lines for _, _, lines in phases), sum(line.startswith("talk | ") for _, line in node.lines)
    if printed != came:
        raise BenchError(f"logs: {printed:,} lines were printed and {came:,} came to the terminal")
    talking = [(begin_s, end_s) for begin_s, end_s, lines in phases if lines]
    silent = [(begin_s, end_s) for begin_s, end_s, lines in phases if not lines]
    return {
        "silent": {"rate_per_s": _rate_in(samples, silent)},
        "talking": {"rate_per_s": _rate_in(samples, talking), "lines_per_s": printed / sum(end_s - begin_s for begin_s, end_s in talking)},
    }


def _rate_in(samples: Sequence[Sequence[float]], spans: Sequence[Sequence[float]]) -> float:
    """Items per second in the median of these spans, each from its first sample to its last: other work on the machine comes and goes."""
    rates = []
    for begin_s, end_s in spans:
        inside = [(at_s, items) for at_s, items in samples if begin_s <= at_s <= end_s]
        if len(inside) > 1:
            rates.append((inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]))
    if not rates:
        raise BenchError("logs: no items came in a phase")
    return median(rates)


# ---- the baseline


def managers(sizes: Sizes) -> Figures:
    """W1 over managers' queues: one message for each item, and a thousand items in a message."""
    return {
        "plain": _managers_w1(sizes.managers_items, 1),
        "batched": _managers_w1(sizes.items, 1000),
    }


def _managers_w1(items: int, batch: int) -> Figures:
    with _managers(batch) as start:
        workers = {"source": start("source", items), "stage": start("square", items), "sink": start("total", items)}
        reports = {name: report(time_allowed_s(items)) for name, report in workers.items()}
        found = reports["sink"]
        check_total("managers", found, items)
        server = usage_of(start.server_pid)
    cpu = {"server": server.cpu_s if server else None, **{name: report["cpu_s"] for name, report in reports.items()}}
    known = {name: cpu_s * 100_000 / items for name, cpu_s in cpu.items() if cpu_s is not None}
    cpu_per_100k = {**known, "all": sum(known.values())}
    return {"items": items, "rate_per_s": rate_per_s(found, items), "cpu_s_per_100k": cpu_per_100k}


class _Managers:
    """Calling it starts a worker, and gives what waits for its report."""

    def __init__(self, server_pid: int, port: int, batch: int, authkey: str, processes: ExitStack) -> None:
        self.server_pid = server_pid
        self._port = port
        self._batch = batch
        self._authkey = authkey
        self._processes = processes

    def __call__(self, role: str, items: int) -> Callable[[float], Figures]:
        popen = _script(self._processes, role, str(self._port), str(items), str(self._batch), self._authkey)

        def report(timeout_s: float) -> Figures:
            try:
                text, _ = popen.communicate(timeout=timeout_s)
                return dict(json.loads(text))
            except (subprocess.TimeoutExpired, ValueError) as error:
                raise BenchError(f"the managers' {role} gave no figures: {error}") from error

        return report


@contextmanager
def _managers(batch: int) -> Iterator[_Managers]:
    authkey = secrets.token_hex(16)
    with ExitStack() as processes:
        server = _script(processes, "serve", str(batch), authkey)
        assert server.stdout is not None, "its output is a pipe"
        line = server.stdout.readline()
        if not line:
            raise BenchError("the managers' server did not start")
        yield _Managers(server.pid, int(line), batch, authkey, processes)


def _script(processes: ExitStack, *arguments: str) -> subprocess.Popen[str]:
    stdin = subprocess.PIPE if arguments[0] == "serve" else subprocess.DEVNULL
    popen = subprocess.Popen([sys.executable, str(MANAGERS), *arguments], env=environment(), text=True, stdin=stdin,
                             stdout=subprocess.PIPE)
    processes.callback(_end, popen)
    return popen


def _end(popen: subprocess.Popen[str]) -> None:
    if popen.poll() is None:
        popen.kill()
    popen.communicate()


# ---- W2


def w2(sizes: Sizes) -> Figures:
    """Tasks that sleep 10 ms, in eight processes: the ideal's share of the time that it takes, first to last."""
    return {"tasks": sizes.naps, "share_of_ideal": _w2(sizes.naps), "managers_share_of_ideal": _managers_w2(sizes.naps)}


def _w2(naps: int) -> float:
    with scratch() as folder, Node(folder, "w2", "--until-done", params={"items": naps}) as node:
        node.wait_until_done(time_allowed_s(naps))
        return _share_of_ideal("W2", read_json_file(node.out_dir("w2") / "Collect.json"), naps)


def _managers_w2(naps: int) -> float:
    with _managers(1) as start:
        workers = [start("nap", naps) for _ in range(W2_PROCESSES)]
        start("naps", naps)
        collected = start("collect", naps)(time_allowed_s(naps))
        for report in workers:
            report(time_allowed_s(naps))
        return _share_of_ideal("managers", collected["naps"], naps)


def _share_of_ideal(who: str, spans: Sequence[Sequence[float]], naps: int) -> float:
    if len(spans) != naps:
        raise BenchError(f"{who}: {len(spans)} tasks were done, and should be {naps}")
    took_s = max(ended_s for _, ended_s in spans) - min(began_s for began_s, _ in spans)
    return naps * W2_NAP_S / W2_PROCESSES / took_s


# ---- idle latency


def latency(sizes: Sizes) -> Figures:
    """One item at a time at an idle pipeline, from its put to the sink."""
    return {
        "items": sizes.latencies, "source": _latency_of_source(sizes.latencies),
        "put": _latency_of_put(sizes.latencies), "managers": _latency_of_managers(sizes.latencies),
    }


def _latency_of_source(items: int) -> Figures:
    with scratch() as folder, Node(folder, "latency_source", "--until-done", params={"items": items}) as node:
        node.wait_until_done(time_allowed_s(items))
        return _latency_figures(read_json_file(node.out_dir("latency_source") / "Latencies.json"), items)


def _latency_of_put(items: int) -> Figures:
    """By `connect().put` of this process; also when `put` returns, which it does once the item is durable."""
    returned_ms = []
    with scratch() as folder, Node(folder, "latency_put", "--until-done") as node:
        node.wait_for_line("run 1 starts")
        with node.connect("latency_put") as cluster:
            for _ in range(items):
                time.sleep(PUT_PAUSE_S)
                put_s = time.monotonic()
                cluster.put("stamps", put_s)
                returned_ms.append(1000 * (time.monotonic() - put_s))
            cluster.close("stamps")
        node.wait_until_done(time_allowed_s(items))
        found = read_json_file(node.out_dir("latency_put") / "Latencies.json")
    figures = _latency_figures(found, items)
    return {**figures, **{f"returned_{name}": value for name, value in _latency_figures(returned_ms, items).items()}}


def _latency_of_managers(items: int) -> Figures:
    with _managers(1) as start:
        stamped, taken = start("stamps", items), start("latencies", items)
        stamped(time_allowed_s(items))
        return _latency_figures(taken(time_allowed_s(items))["latencies_ms"], items)


def _latency_figures(took_ms: Sequence[float], items: int) -> Figures:
    """Without the first tenth, which meets processes that still start."""
    if len(took_ms) != items:
        raise BenchError(f"{len(took_ms)} single items arrived, and should be {items}")
    warm = took_ms[items // 10 :]
    return {"p50_ms": percentile(warm, 0.5), "p99_ms": percentile(warm, 0.99)}


# ---- start, idle cost


def start(sizes: Sizes) -> Figures:
    """From a node's start, with nothing there yet, to its first *done*: one item through three processes. Medians."""
    serves, arrives, done = [], [], []
    for _ in range(sizes.starts):
        with scratch() as folder, Node(folder, "w1", "--until-done", params={"items": 1}) as node:
            done.append(node.wait_for_line("run 1 done") - node.started_s)
            node.wait_until_done(time_allowed_s(1))
            serves.append(node.wait_for_serving() - node.started_s)
            found = read_json_file(node.out_dir("w1") / "Total.json")
            check_total("start", found, 1)
            arrives.append(found["first_s"] - node.started_s)
    return {
        "serves_s": percentile(serves, 0.5), "first_item_at_sink_s": percentile(arrives, 0.5),
        "first_run_done_s": percentile(done, 0.5), "first_run_done_s_max": max(done),
    }


def idle(sizes: Sizes) -> Figures:
    """What a node costs that has nothing to do: alone, and with stage processes that wait."""
    return {"alone": _idle(None, 0, sizes.idle_s), "with_stages": _idle("idle", 3, sizes.idle_s)}


def _idle(project: str | None, processes: int, idle_s: float) -> Figures:
    with scratch() as folder, Node(folder, project) as node:
        node.wait_for_serving()
        deadline_s = time.monotonic() + time_allowed_s(0)
        while len(children_of(node.pid)) < processes and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(min(2.0, idle_s))  # what follows a start, checkpoints among it, is over
        pids = [node.pid, *children_of(node.pid)]
        before, began_s = [usage_of(pid) for pid in pids], time.monotonic()
        time.sleep(idle_s)
        after, took_s = [usage_of(pid) for pid in pids], time.monotonic() - began_s
        node.stop()
    shares = [100 * (b.cpu_s - a.cpu_s) / took_s for a, b in zip(before, after, strict=True) if a and b]
    sizes_mib = [usage.rss_bytes / MIB for usage in after if usage]
    if not shares:
        return {"node_cpu_percent": None, "node_rss_mib": None}
    figures: Figures = {"node_cpu_percent": shares[0], "node_rss_mib": sizes_mib[0]}
    if processes:
        figures |= {"stage_cpu_percent": sum(shares[1:]) / processes, "stage_rss_mib": max(sizes_mib[1:])}
    return figures


# ---- a million ready items


def million(sizes: Sizes) -> Figures:
    """They are put while nobody reads; the node is killed, stopped, started again; then a new version reads them."""
    items = sizes.items
    with scratch() as folder:
        figures: Figures = {"items": items}
        with Node(folder, "million", params={"items": items}) as node, Sampler(node.pid) as sampler:
            began_s = node.wait_for_line("run 1 starts")
            ended_s = _wait_until_done(node, time_allowed_s(items))
            figures |= {"fill_rate_per_s": items / (ended_s - began_s), "rss_mib": _rss_mib(node)}
            node.kill()
        figures |= {"fill_rss_mib_max": _mib(sampler.rss_bytes_max(node.pid))}
        with Node(folder, "million") as node:
            figures["start_after_kill_s"] = node.wait_for_serving() - node.started_s
            figures["restarted_rss_mib"] = _rss_mib(node)
            _check_ready(node, items)
            node.stop()
        return figures | _drain(folder, items)


def _drain(folder: Path, items: int) -> Figures:
    """The next version, from the same folder, has a reader for what waits."""
    words = ("--again", "--until-done")
    with Node(folder, "million", *words, file="drain.py", params={"items": items}) as node:
        with Sampler(node.pid) as sampler:
            start_s = node.wait_for_serving() - node.started_s
            node.wait_until_done(time_allowed_s(items))
        found = read_json_file(node.out_dir("million") / "Total.json")
        check_total("million", found, items)
    return {"start_after_stop_s": start_s, "drain_rate_per_s": rate_per_s(found, items),
            "drain_rss_mib_max": _mib(sampler.rss_bytes_max(node.pid))}


def _wait_until_done(node: Node, timeout_s: float) -> float:
    deadline_s = time.monotonic() + timeout_s
    with node.connect("million") as cluster:
        cluster.wait(max(1.0, deadline_s - time.monotonic()))
        return time.monotonic()


def _check_ready(node: Node, items: int) -> None:
    with node.connect("million") as cluster:
        ready = [queue["ready"] for queue in cluster.status()["queues"] if queue["name"] == "waiting"]
    if ready != [items]:
        raise BenchError(f"million: {ready} items are ready after the restart, and should be {items:,}")


def _rss_mib(node: Node) -> float | None:
    usage = usage_of(node.pid)
    return None if usage is None else _mib(usage.rss_bytes)


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / MIB


# ---- several nodes


def several(sizes: Sizes) -> Figures:
    """W1 on several nodes, deployed from the one that leads and from another; their start; what they say while idle."""
    return {
        "count": sizes.nodes, "items": sizes.items, **_several_w1(sizes, True),
        "from_a_follower": _several_w1(sizes, False), "start": _several_start(sizes), "idle": _several_idle(sizes),
    }


def _several_w1(sizes: Sizes, by_leader: bool) -> Figures:
    """Source and sink run where the project came from; every node has a copy before the first item flows."""
    with scratch() as folder, Nodes(folder, sizes.nodes) as nodes:
        leader = nodes.wait_for_voters()
        nodes.deploy("w1", leader if by_leader else nodes.others(leader)[0].name, sizes.items)
        with nodes.connect("w1") as cluster:
            cluster.wait(time_allowed_s(sizes.items))
        nodes.stop()
        found = nodes.read_output("w1", "Total.json")
        check_total(f"W1 on {sizes.nodes} nodes", found, sizes.items)
        entries = [nodes.named(name).log_size().entries for name in nodes.names()]
        check_copies(entries, voters_wanted(sizes.nodes))
        return {"rate_per_s": rate_per_s(found, sizes.items), "entries": max(entries)}


def check_copies(entries: Sequence[int], copies: int) -> None:
    """Raises `BenchError` unless so many nodes hold the log, but for what was under way when all were stopped."""
    whole = sum(count > 0 and count >= max(entries) - ENTRIES_UNDER_WAY for count in entries)
    if whole < copies:
        raise BenchError(f"the nodes' logs end at {', '.join(f'{count:,}' for count in entries)}: {copies} should be "
                         "copies of one, so the rate is not that of a replicated log")


def _several_start(sizes: Sizes) -> Figures:
    """Like `start`: with a key, and no home yet, to the first *done* that any of them tells. Medians."""
    arrives, done = [], []
    for _ in range(sizes.starts):
        words = ("--until-done",)
        with scratch() as folder, Nodes(folder, sizes.nodes, *words, project="w1", params={"items": 1}) as nodes:
            done.append(nodes.wait_for_line("run 1 done") - nodes.started_s)
            found = nodes.read_output("w1", "Total.json")
            check_total("start of several nodes", found, 1)
            arrives.append(found["first_s"] - nodes.started_s)
    return {"first_item_at_sink_s": percentile(arrives, 0.5), "first_run_done_s": percentile(done, 0.5),
            "first_run_done_s_max": max(done)}


def _several_idle(sizes: Sizes) -> Figures:
    with scratch() as folder, Nodes(folder, sizes.nodes) as nodes:
        nodes.wait_for_voters()
        time.sleep(min(2.0, sizes.listen_s))
        heard = nodes.hear(sizes.listen_s)
    node_minutes = sizes.nodes * sizes.listen_s / 60
    return {"broadcasts_per_node_minute": heard.datagrams / node_minutes,
            "broadcast_bytes_per_node_minute": heard.bytes / node_minutes}


# ---- failover


def failover(sizes: Sizes) -> Figures:
    """The leader is killed again and again while items are done: from the kill to the next *done* that is committed.

    As a client sees it that asks every survivor all the time; so it also holds the time of an item, 20 ms, and a poll.
    """
    with scratch() as folder, Nodes(folder, sizes.nodes) as nodes:
        leader = nodes.wait_for_voters()
        nodes.deploy("steady", leader)
        put, leads_ms, done_ms, settled_s = 0, [], [], []
        for _ in range(sizes.kills):
            put = _work_at_hand(nodes, put)
            led, done, leader = _kill_leader(nodes)
            leads_ms.append(1000 * led)
            done_ms.append(1000 * done)
            began_s = time.monotonic()
            nodes.start(leader)
            nodes.wait_for_voters()
            settled_s.append(time.monotonic() - began_s)
        with nodes.connect("steady") as cluster:
            cluster.close("numbers")
            cluster.wait(time_allowed_s(put))
            check_squares(list(cluster.results("squares")), put, len(cluster.parked()))
        nodes.stop()
    return {
        "nodes": sizes.nodes, "kills": sizes.kills, "items": put, "p50_ms": percentile(done_ms, 0.5),
        "p99_ms": percentile(done_ms, 0.99), "max_ms": max(done_ms), "new_leader_p50_ms": percentile(leads_ms, 0.5),
        "new_leader_p99_ms": percentile(leads_ms, 0.99), "killed_node_votes_again_s": percentile(settled_s, 0.5),
    }


def _work_at_hand(nodes: Nodes, put: int) -> int:
    """Until each process of the stage runs, something is done and enough waits; returns how much was put in all."""
    with nodes.connect("steady") as cluster:
        done = read_status(cluster.status()).done
        deadline_s = time.monotonic() + FAILOVER_S_MAX
        while time.monotonic() < deadline_s:
            now = read_status(cluster.status())
            if now.ready < READY_AT_KILL:
                cluster.put_many("numbers", range(put, put + READY_AT_KILL))
                put += READY_AT_KILL
            elif now.processes == STEADY_PROCESSES and now.done > done:
                return put
            time.sleep(0.02)
    raise BenchError(f"failover: {now.processes} of {STEADY_PROCESSES} processes run and {now.done - done} items were "
                     f"done in {FAILOVER_S_MAX:g} s; nothing was killed meanwhile")


def _kill_leader(nodes: Nodes) -> tuple[float, float, str]:
    """How long until another node leads, how long until that tells of one more *done*, and who was killed."""
    with ExitStack() as links:
        known = {name: links.enter_context(nodes.named(name).connect("steady")) for name in nodes.names()}
        leader = wait_for(lambda: next(_leading(known.values()), None), "a leader", POLL_S).leader
        survivors = [cluster for name, cluster in known.items() if name != leader]
        killed_s = nodes.named(leader).kill_now()
        first, later = _next_done(survivors, leader, killed_s + FAILOVER_S_MAX)
    nodes.named(leader).kill()
    return first.at_s - killed_s, later.at_s - killed_s, leader


def handover(sizes: Sizes) -> Figures:
    """The leader is asked to stop, as by Ctrl-C, while items are done: the longest time meanwhile in which none is.

    As a client sees it that asks every node all the time. An item takes 20 ms.
    """
    with scratch() as folder, Nodes(folder, sizes.nodes) as nodes:
        leader = nodes.wait_for_voters()
        nodes.deploy("steady", leader)
        put, gaps_ms = 0, []
        for _ in range(sizes.handovers):
            put = _work_at_hand(nodes, put)
            gap_s, leader = _stop_leader(nodes)
            gaps_ms.append(1000 * gap_s)
            nodes.start(leader)
            nodes.wait_for_voters()
        with nodes.connect("steady") as cluster:
            cluster.close("numbers")
            cluster.wait(time_allowed_s(put))
            check_squares(list(cluster.results("squares")), put, len(cluster.parked()))
        nodes.stop()
    return {"nodes": sizes.nodes, "handovers": sizes.handovers, "items": put, "gap_p50_ms": percentile(gaps_ms, 0.5),
            "gap_max_ms": max(gaps_ms)}


def _stop_leader(nodes: Nodes) -> tuple[float, str]:
    """The longest time without one more *done*, from before the leader is asked to stop until another has told of several; who that was."""
    with ExitStack() as links:
        known = {name: links.enter_context(nodes.named(name).connect("steady")) for name in nodes.names()}
        last = wait_for(lambda: next(_leading(known.values()), None), "a leader", POLL_S)
        leader, gap_s, heard = last.leader, 0.0, 0
        nodes.named(leader).ask_to_stop()
        deadline_s = time.monotonic() + FAILOVER_S_MAX
        while heard < DONE_AFTER_HANDOVER and time.monotonic() < deadline_s:
            for now in _leading(known.values()):
                if now.done > last.done:
                    gap_s, last = max(gap_s, now.at_s - last.at_s), now
                    heard += now.leader != leader
            time.sleep(POLL_S)
    if heard < DONE_AFTER_HANDOVER:
        raise BenchError(f"handover: {FAILOVER_S_MAX:g} s after {leader} was asked to stop no other node gets on")
    nodes.named(leader).wait_until_stopped()
    return gap_s, leader


def _next_done(survivors: Sequence[Cluster], killed: str, deadline_s: float) -> tuple[Progress, Progress]:
    """The first answers of a new leader. What the old one committed last may show in the first: that is no progress."""
    first = None
    while time.monotonic() < deadline_s:
        for now in _leading(survivors):
            if first is not None and now.done > first.done:
                return first, now
            first = first or now
        time.sleep(POLL_S)
    raise BenchError(f"failover: {FAILOVER_S_MAX:g} s after the kill of {killed} "
                     + ("no other node leads" if first is None else f"{first.leader} leads and nothing more was done"))


def _leading(clusters: Iterable[Cluster]) -> Iterator[Progress]:
    """What those who lead say, each asked in turn."""
    for cluster in clusters:
        now = progress_of(cluster)
        if now is not None:
            yield now


def check_squares(values: Sequence[int], items: int, parked: int) -> None:
    """Raises `BenchError` unless each number came back as its square, once."""
    counts = Counter(values)
    twice = sum(count > 1 for count in counts.values())
    missing = sum(number**2 not in counts for number in range(items))
    if twice or missing or parked or len(values) != items:
        raise BenchError(f"failover: of {items:,} items {missing} are missing, {twice} came twice, {parked} are parked")


CASES: dict[str, Callable[[Sizes], Figures]] = {
    "w1": w1, "managers": managers, "w1_slow_disk": w1_slow_disk, "logs": logs, "w2": w2, "latency": latency, "start": start,
    "idle": idle, "million": million, "nodes": several, "failover": failover, "handover": handover,
}
