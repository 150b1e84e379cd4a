#!/usr/bin/env python3
"""What p2pcluster does per second here: `python scripts/bench.py [--quick] [--json] [--only CASE ...]`.

Of several nodes of one cluster, all on this machine, and of killed leaders: `python scripts/bench.py --nodes 3
--failover 50`. They share its cores, and the end of a killed process shows at once at its connections: neither is so
between machines.

A benchmark of real processes, not a test: it fails when items are missing, never because it is slow. The baseline, the
standard library's `multiprocessing.managers` queues doing the same work, runs between the other cases, and ratios are
of one run. Journals are written where TMPDIR says: name a folder on a real disk, since a disk in memory makes fsync
free. Other work on the machine makes every figure worse; `machine.load` tells of it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _bench import cases, machine, nodes  # noqa: E402
from p2pcluster.errors import ClusterError  # noqa: E402

NODES = range(3, 8)

# What the design aims at on two cores, by the figure's name.
AIMS = {
    "w1.rate_per_s": "200,000", "ratios.w1_to_managers_plain": "over 8", "w2.share_of_ideal": "0.97",
    "latency.source.p50_ms": "under 1", "latency.put.p50_ms": "under 1", "start.first_run_done_s": "under 1.5",
    "idle.alone.node_cpu_percent": "under 1", "idle.alone.node_rss_mib": "under 60",
    "idle.with_stages.node_cpu_percent": "under 1", "idle.with_stages.node_rss_mib": "under 60",
    "million.rss_mib": "under 300", "million.start_after_kill_s": "under 5", "million.start_after_stop_s": "under 5",
    "ratios.drain_to_w1": "1", "ratios.nodes_to_w1": "0.4", "nodes.start.first_run_done_s": "under 3",
    "ratios.logs_talking_to_silent": "over 0.9",
    "failover.p50_ms": "under 300", "failover.p99_ms": "under 1,000", "handover.gap_max_ms": "under 200",
}
RATIOS = {
    "w1_to_managers_plain": ("w1.rate_per_s", "managers.plain.rate_per_s"),
    "w1_to_managers_batched": ("w1.rate_per_s", "managers.batched.rate_per_s"),
    "w1_slow_disk_to_w1": ("w1_slow_disk.rate_per_s", "w1.rate_per_s"),
    "w2_to_managers": ("w2.share_of_ideal", "w2.managers_share_of_ideal"),
    "latency_put_to_managers": ("latency.put.p50_ms", "latency.managers.p50_ms"),
    "latency_source_to_managers": ("latency.source.p50_ms", "latency.managers.p50_ms"),
    "nodes_to_w1": ("nodes.rate_per_s", "w1.rate_per_s"),
    "nodes_from_a_follower_to_w1": ("nodes.from_a_follower.rate_per_s", "w1.rate_per_s"),
    "logs_talking_to_silent": ("logs.talking.rate_per_s", "logs.silent.rate_per_s"),
    "drain_to_w1": ("million.drain_rate_per_s", "w1.rate_per_s"),
}


def run(names: Iterable[str], sizes: cases.Sizes) -> Iterator[tuple[str, Any]]:
    """The parts of the report, each as soon as it is known: the machine, the cases, and the ratios of what was run."""
    with nodes.scratch() as folder:
        yield "machine", machine.describe(folder)
    figures: dict[str, Any] = {}
    for name in names:
        figures[name] = cases.CASES[name](sizes)
        yield name, figures[name]
    known = dict(flat(figures))
    pairs = {name: pair for name, pair in RATIOS.items() if known.keys() >= set(pair)}
    yield "ratios", {name: known[ours] / known[base] for name, (ours, base) in pairs.items()}


def flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each figure with the names that lead to it."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def lines(name: str, part: dict[str, Any]) -> Iterator[str]:
    """The table's lines for one part of the report."""
    for label, value in flat(part, f"{name}."):
        aim = AIMS.get(label)
        yield f"{label:<44}{shown(value):>20}" + (f"   aim: {aim}" if aim else "")


def shown(value: Any) -> str:
    """A figure with three digits or more, and no more than it needs."""
    if value is None:
        return "unknown"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure p2pcluster on this machine, beside multiprocessing.managers.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--only", nargs="+", choices=cases.CASES, metavar="CASE", help=f"of {', '.join(cases.CASES)}")
    parser.add_argument("--quick", action="store_true", help="a tenth of the items: some minutes, and rough figures")
    parser.add_argument("--nodes", type=int, choices=NODES, metavar="N",
                        help="nodes of the cases nodes and failover, 3 to 7; without --only: just w1 and nodes")
    parser.add_argument("--failover", type=int, metavar="N",
                        help="so many kills of the leader in the case failover; without --only: just that and handover")
    args = parser.parse_args(argv)
    if args.failover is not None and args.failover < 1:
        parser.error("--failover needs a kill at least")
    return args


def chosen(args: argparse.Namespace) -> tuple[list[str], cases.Sizes]:
    """The cases to run, and how much each does."""
    sizes = cases.QUICK if args.quick else cases.Sizes()
    sizes = sizes._replace(nodes=args.nodes or sizes.nodes, kills=args.failover or sizes.kills)
    asked = (["w1", "nodes"] if args.nodes else []) + (["failover", "handover"] if args.failover else [])
    return args.only or asked or list(cases.CASES), sizes


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that what was started is ended
    report = {}
    try:
        for name, part in run(*chosen(args)):
            report[name] = part
            if not args.json:
                print("\n".join(lines(name, part)), flush=True)
    except (nodes.BenchError, ClusterError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
