"""Counts what is in a journal: entries and commands by kind and size, items per commit, tables, queues, rates.

    python scripts/journal_stats.py HOME            a node's home, or a journal, or a copy of one; the node may run
    python scripts/journal_stats.py HOME --json     one JSON object

Entries and rates are those of the log as far as it goes back; items that came and went before that are in the queues'
own counts alone. What a command asked for is counted, also where it changed nothing because something else had been
faster. An entry is a commit, save where a slow disk let several queue up. Times are the cluster's own, which counts
on while a node runs. No value is ever loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from _journal import View, place_of, run, seconds, size, sqlite_errors, view
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import decode_commands, read_ports
from p2pcluster.core.log import COMMANDS, CONFIG, NOOP
from p2pcluster.core.tables import TABLES

KINDS = {NOOP: "noop", COMMANDS: "commands", CONFIG: "config"}
STRETCHES = 10  # of time, for the rates
BAR_CHARS = 40

Record = dict[str, Any]


class _Tally:
    """Goes through the log once."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.kind_bytes: Counter[str] = Counter()
        self.commands: Counter[str] = Counter()
        self.command_bytes: Counter[str] = Counter()
        self.entry_bytes: list[int] = []
        self.times_ms: list[int] = []
        self.put: list[int] = []
        self.done: list[int] = []

    def entry(self, at_ms: int, kind: int, body: bytes) -> None:
        name = KINDS.get(kind, str(kind))
        self.kinds[name] += 1
        self.kind_bytes[name] += len(body)
        self.entry_bytes.append(len(body))
        self.times_ms.append(at_ms)
        put = done = 0
        if kind == COMMANDS:
            for message, _ in decode_commands(body):
                self.commands[message.kind] += 1
                self.command_bytes[message.kind] += sum(map(len, message.blobs))
                put += _items_put(message)
                done += sum(hi - lo for lo, hi in message.fields["ranges"]) if message.kind == "done" else 0
        self.put.append(put)
        self.done.append(done)


def _items_put(message: Message) -> int:
    if "ports" not in message.fields:
        return 0
    ports = read_ports(message.fields["ports"], message.blobs)
    return sum(len(port.lengths) // 4 * len(port.queues) for port, _ in ports)


def stats(shown: View) -> Record:
    """Everything in one object."""
    tally = _Tally()
    for row in shown.db.execute("SELECT at_ms, kind, body FROM journal ORDER BY idx"):
        tally.entry(*row)
    reader, state, path = shown.reader, shown.state, shown.place.journal
    (page_bytes,) = shown.db.execute("PRAGMA page_size").fetchone()
    (free_pages,) = shown.db.execute("PRAGMA freelist_count").fetchone()
    return {
        "journal": str(path), "file_bytes": path.stat().st_size, "free_bytes": page_bytes * free_pages,
        "wal_bytes": shown.place.wal.stat().st_size if shown.place.wal.exists() else 0,
        "log": {"first": reader.meta["base_idx"] + 1, "last": reader.last_index, "committed": reader.commit_index,
                "tables_at": reader.meta["applied_idx"], "bytes": reader.log_bytes},
        "entries": {name: {"count": count, "bytes": tally.kind_bytes[name]}
                    for name, count in tally.kinds.most_common()},
        "commands": {name: {"count": count, "blob_bytes": tally.command_bytes[name]}
                     for name, count in tally.commands.most_common()},
        "entry_bytes": _spread(tally.entry_bytes),
        "items_put_per_entry": _spread([count for count in tally.put if count]),
        "items_done_per_entry": _spread([count for count in tally.done if count]),
        "tables": {table: _table(shown, table) for table in ("journal", *TABLES, "meta")},
        "queues": [
            {"queue": queue.name, "ready": len(queue.ready), "leased": len(queue.leases), "delayed": len(queue.delayed),
             "parked": len(queue.parked), "put": queue.put, "done": queue.done, "open_bytes": queue.open_bytes,
             "chunks": len(queue.chunks),
             "oldest_ms": None if (oldest := queue.oldest_ms()) is None else max(0, state.at_ms - oldest)}
            for queue in state.queues.values()
        ],
        "rates": list(_rates(tally)),
    }


def _spread(values: list[int]) -> Record | None:
    if not values:
        return None
    values = sorted(values)
    at = {name: values[min(len(values) - 1, len(values) * share // 100)] for name, share in (("p50", 50), ("p99", 99))}
    mean = round(sum(values) / len(values), 1)
    return {"count": len(values), "sum": sum(values), "mean": mean, **at, "max": values[-1]}


def _table(shown: View, table: str) -> Record:
    """Rows, and about how many bytes their columns hold."""
    columns = [name for _, name, *_ in shown.db.execute(f"PRAGMA table_info({table})")]
    lengths = " + ".join(f"coalesce(length(CAST({name} AS BLOB)), 0)" for name in columns)
    rows, held = shown.db.execute(f"SELECT count(*), coalesce(sum({lengths}), 0) FROM {table}").fetchone()
    return {"rows": rows, "bytes": held}


def _rates(tally: _Tally) -> Iterator[Record]:
    """Items per second in equal stretches of the log's time."""
    if not tally.times_ms:
        return
    start, end = tally.times_ms[0], tally.times_ms[-1] + 1
    stretch_ms = max(1, -(-(end - start) // STRETCHES))
    sums: Counter[tuple[int, str]] = Counter()
    for at_ms, put, done in zip(tally.times_ms, tally.put, tally.done, strict=True):
        number = (at_ms - start) // stretch_ms
        sums[number, "entries"] += 1
        sums[number, "put"] += put
        sums[number, "done"] += done
    for number in range((end - start - 1) // stretch_ms + 1):
        per_s = {f"{name}_per_s": round(sums[number, name] * 1000 / stretch_ms, 1)
                 for name in ("entries", "put", "done")}
        yield {"from_ms": start + number * stretch_ms, "ms": stretch_ms, **per_s}


# ---- for people


def lines_of(found: Record) -> Iterator[str]:
    """The object of `stats` as text."""
    log = found["log"]
    yield (f"{found['journal']}: {size(found['file_bytes'])}, of it {size(found['free_bytes'])} free; write-ahead log "
           f"{size(found['wal_bytes'])}")
    yield (f"log       entries {log['first']} to {log['last']}, {size(log['bytes'])}; committed up to "
           f"{log['committed']}, in the tables up to {log['tables_at']}")
    for name, record in found["entries"].items():
        yield f"  {name:<14} {record['count']:>9,}  {size(record['bytes']):>9}"
    for name, record in found["commands"].items():
        yield f"    {name:<12} {record['count']:>9,}  {size(record['blob_bytes']):>9} of values"
    for name, title in (("entry_bytes", "bytes of an entry"), ("items_put_per_entry", "items put by one"),
                        ("items_done_per_entry", "items done by one")):
        yield f"  {title:<18} {_spread_text(found[name])}"
    yield "tables"
    for name, record in found["tables"].items():
        if record["rows"]:
            yield f"  {name:<14} {record['rows']:>9,} rows  {size(record['bytes']):>9}"
    yield "queues"
    for queue in found["queues"]:
        oldest = "" if queue["oldest_ms"] is None else f", oldest {seconds(queue['oldest_ms'])}"
        counts = ", ".join(f"{name} {queue[name]:,}" for name in ("ready", "leased", "delayed", "parked"))
        yield (f"  {queue['queue']}: {counts}, about {size(queue['open_bytes'])} in {queue['chunks']:,} chunks{oldest}"
               f"; put {queue['put']:,}, done {queue['done']:,}")
    yield from _rate_lines(found["rates"])


def _spread_text(spread: Record | None) -> str:
    if spread is None:
        return "none"
    return f"mean {spread['mean']:,}, p50 {spread['p50']:,}, p99 {spread['p99']:,}, most {spread['max']:,}"


def _rate_lines(rates: list[Record]) -> Iterator[str]:
    if not rates:
        return
    yield f"items per second, in stretches of {seconds(rates[0]['ms'])}"
    most = max(1.0, *(rate["done_per_s"] for rate in rates), *(rate["put_per_s"] for rate in rates))
    for rate in rates:
        bar = "#" * round(BAR_CHARS * rate["done_per_s"] / most)
        yield (f"  {seconds(rate['from_ms']):>9}  put {rate['put_per_s']:>11,.0f}  done {rate['done_per_s']:>11,.0f}  "
               f"entries {rate['entries_per_s']:>7,.0f}  {bar}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="HOME|FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    place = place_of(args.path)
    with view(place) as shown, sqlite_errors(place.journal):
        found = stats(shown)
    print(json.dumps(found) if args.json else "\n".join(lines_of(found)))
    return 0


if __name__ == "__main__":
    sys.exit(run("journal_stats", main))
