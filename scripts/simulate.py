"""Play whole clusters in simulated time: the real core on a network, disks and machines that fail as a seed says.

    python scripts/simulate.py                        seeds 0 to 299
    python scripts/simulate.py --seeds 20000 --from 0 as many as wanted
    python scripts/simulate.py --from 17 --seeds 1 --verbose   what happens in one seed, line by line
    python scripts/simulate.py --mutations            seed bugs, one by one, and show that each is noticed

A seed decides everything and is the same run each time: what fails here is played again by its number. The exit code is 1 when a seed
fails, or when a seeded bug is not noticed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.simulation.cluster import run, run_many  # noqa: E402
from tests.simulation.mutations import MUTATIONS, SEEDS_MAX, first_failure, is_noticed  # noqa: E402
from tests.simulation.options import draw  # noqa: E402


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="play simulated clusters")
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--mutations", action="store_true", help="seed bugs and see that each is noticed")
    parser.add_argument("--verbose", action="store_true", help="tell what happens, and how often what happened")
    args = parser.parse_args(arguments)
    if args.mutations:
        return play_mutations(args.first)
    if args.verbose and args.seeds == 1:
        return tell(args.first)
    return play(args.first, args.seeds, args.verbose)


def tell(seed: int) -> int:
    """One seed, line by line; what it raises goes through, with its traceback."""
    options = draw(seed)
    print(options)
    outcome = run(options, print)
    print(f"seed {seed}: {outcome.events} events, {outcome.simulated_ms / 1000:g} s, fingerprint {outcome.fingerprint}")
    return 0


def play(first: int, count: int, verbose: bool) -> int:
    """Many seeds; the failing ones are printed with their options."""
    started_s = time.monotonic()
    played = failed = events = simulated_ms = crashes = elections = entries = 0
    counts: Counter[str] = Counter()
    for outcome in run_many(range(first, first + count)):
        played += 1
        events, simulated_ms = events + outcome.events, simulated_ms + outcome.simulated_ms
        crashes, elections, entries = crashes + outcome.crashes, elections + outcome.elections, entries + outcome.entries
        counts += outcome.counts
        if outcome.error is not None:
            failed += 1
            seed = outcome.options.seed
            print(f"seed {seed}: {outcome.error}\n  {outcome.options}\n  python scripts/simulate.py --from {seed} --seeds 1 --verbose",
                  flush=True)
    took_s = time.monotonic() - started_s
    if verbose:
        for what, often in sorted(counts.items()):
            print(f"{often:9} {what}")
    print(f"{played} seeds, {failed} failed; {took_s:.0f} s, {played / took_s:.2f} seeds/s, {events / took_s:.0f} events/s; each on average "
          f"{simulated_ms / played / 1000:.1f} simulated seconds, {crashes / played:.1f} crashes, {elections / played:.1f} elections, "
          f"{entries / played:.0f} entries")
    return 1 if failed else 0


def play_mutation(name: str, first: int) -> tuple[str, bool, str]:
    """One seeded bug: its name, whether it was noticed, and a line of the table."""
    mutation = next(mutation for mutation in MUTATIONS if mutation.name == name)
    failure = first_failure(mutation, range(first, first + SEEDS_MAX))
    noticed = is_noticed(mutation, failure)
    where = "in no seed" if failure is None else f"seed {failure.seed}, after {failure.seeds}: {failure.error[:110]}"
    return name, noticed, f"{'noticed' if noticed else 'MISSED':8} {name:42} {where}"


def play_mutations(first: int) -> int:
    """Each seeded bug until it is noticed."""
    missed = 0
    with multiprocessing.get_context("spawn").Pool() as pool:
        for _, noticed, line in pool.starmap(play_mutation, [(mutation.name, first) for mutation in MUTATIONS], chunksize=1):
            missed += not noticed
            print(line, flush=True)
    print(f"{len(MUTATIONS)} seeded bugs, {missed} not noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
