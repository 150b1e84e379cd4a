"""Shows what a journal holds, as it is now: the tables with the committed tail of the log applied.

    python scripts/journal_show.py HOME                        term, vote, members, pipelines, queues
    python scripts/journal_show.py HOME --entries -n 20        the log's last entries and the commands in them
    python scripts/journal_show.py HOME --entries --follow     entries as they are committed, until Ctrl-C
    python scripts/journal_show.py HOME --items Square -n 5    items that are not finished: state, key, size, value
    python scripts/journal_show.py HOME --parked               parked items: why, traceback, last lines of stderr, value
    python scripts/journal_show.py HOME --queues               the queues alone

HOME is a node's home, or a journal, or a copy of one; the node may run. --json prints JSON lines. No value is ever
loaded: plain data is shown as such, anything else by its disassembly. Times are the cluster's own, which counts on
while a node runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from _contents import unfinished
from _journal import Place, View, connect, place_of, run, seconds, size, sqlite_errors, view
from p2pcluster import journal
from p2pcluster.core.commands import decode_commands, read_ports
from p2pcluster.core.log import COMMANDS, CONFIG, NOOP, Entry
from p2pcluster.core.messages import decode_configuration
from p2pcluster.core.chunks import Chunk
from p2pcluster.core.records import QueueState
from p2pcluster.core.quorum import Configuration
from p2pcluster.safe_values import show, show_json

LOOK_S = 0.2  # between two looks at a journal that is followed
FOLLOWED_FIRST = 10  # entries that were there before
LINE_CHARS_MAX = 300
KINDS = {NOOP: "noop", COMMANDS: "commands", CONFIG: "config"}

Record = dict[str, Any]


# ---- entries


def entry_record(entry: Entry, committed: bool) -> Record:
    """An entry for programs; bodies of values are counted and not shown."""
    record: Record = {"index": entry.index, "term": entry.term, "at_ms": entry.at_ms,
                      "kind": KINDS.get(entry.kind, entry.kind), "bytes": len(entry.body), "committed": committed}
    if entry.kind == COMMANDS:
        record["commands"] = [_command(message) for message, _ in decode_commands(entry.body)]
    elif entry.kind == CONFIG:
        record["configuration"] = _configuration(decode_configuration(entry.body))
    return record


def _configuration(found: Configuration) -> Record:
    return {name: list(getattr(found, name)) for name in ("voters", "voters_old", "learners")}


def _command(message: Any) -> Record:
    fields = dict(message.fields)
    if "ports" in fields:
        fields["ports"] = [
            {"queues": list(port.queues), "items": len(port.lengths) // 4, "bytes": len(port.body),
             **({"keyed": True} if port.keys else {})}
            for port, _ in read_ports(message.fields["ports"], message.blobs)
        ]
    elif message.blobs:
        fields["blob_bytes"] = [len(blob) for blob in message.blobs]
    return {"command": message.kind, **fields}


def entry_lines(record: Record) -> Iterator[str]:
    """The same for people."""
    note = "" if record["committed"] else "  not committed"
    yield (f"{record['index']}  term {record['term']}  at {seconds(record['at_ms'])}  {record['kind']}  "
           f"{size(record['bytes'])}{note}")
    for command in record.get("commands", ()):
        words = {name: value for name, value in command.items() if name != "command" and value is not None}
        yield _cut(f"    {command['command']} {json.dumps(words, ensure_ascii=False)}")
    if "configuration" in record:
        yield _cut(f"    {json.dumps(record['configuration'])}")


def _cut(line: str) -> str:
    return line if len(line) <= LINE_CHARS_MAX else line[:LINE_CHARS_MAX] + "..."


def entries_of(shown: View, count: int | None) -> Iterator[Record]:
    """The log's last `count` entries, or all."""
    meta = shown.reader.meta
    first = max(meta["base_idx"], shown.reader.last_index - count if count is not None else 0)
    for entry in _entries(shown, first):
        yield entry_record(entry, entry.index <= shown.reader.commit_index)


def _entries(shown: View, after: int) -> Iterator[Entry]:
    """They were checked when the journal was opened."""
    rows = shown.db.execute("SELECT idx, term, at_ms, kind, body FROM journal WHERE idx > ? ORDER BY idx", (after,))
    return (Entry(*row) for row in rows)


def followed(place: Place, before: int, count: int | None) -> Iterator[Record]:
    """The last `before` committed entries, then those that follow as they are committed: `count` in all, or no end.

    Each look is brief and over a connection of its own. Where the log was compacted meanwhile, it goes on at what is
    there.
    """
    with view(place) as shown:
        last = max(shown.reader.meta["base_idx"], shown.reader.commit_index - before)
    while count is None or count > 0:
        found = _committed_after(place, last)
        for entry in found[:count]:
            yield entry_record(entry, True)
            last = entry.index
        if count is not None:
            count -= len(found[:count])
        if not found:
            time.sleep(LOOK_S)


def _committed_after(place: Place, last: int) -> list[Entry]:
    db = connect(place)
    try:
        with sqlite_errors(place.journal):
            db.execute("BEGIN")
            meta = journal.read_meta(db, place.journal)
            after = max(last, meta["base_idx"])
            found = db.execute("SELECT chain FROM journal WHERE idx = ?", (after,)).fetchone()
            chain = found[0] if found else meta["base_chain"]
            commit_idx = journal.last_commit_idx(db, meta)
            rows = journal.read_log(db, place.journal, after, chain)
            return [row.entry for row in rows if row.entry.index <= commit_idx]
    finally:
        db.close()


# ---- items


def items_of(shown: View, queue: QueueState, parked_only: bool = False) -> Iterator[tuple[Record, bytes]]:
    """Each item that is not finished, with its bytes."""
    for chunk in queue.chunks:
        if parked_only and not any(chunk.first <= item_id < chunk.end for item_id in queue.parked):
            continue
        lengths, body = shown.bodies(queue.name, chunk)
        keys = json.loads(bytes(chunk.keys)) if chunk.keys is not None else [None] * chunk.count
        for lo, hi in unfinished(queue, chunk):
            for item_id in range(lo, hi):
                if parked_only and item_id not in queue.parked:
                    continue
                value = bytes(chunk.slice_of(lengths, body, item_id, item_id + 1)[1])
                key = keys[item_id - chunk.first]
                yield {**_where(shown, queue, chunk, item_id), "key": key, "bytes": len(value)}, value


def _where(shown: View, queue: QueueState, chunk: Chunk, item_id: int) -> Record:
    """An item's state, and since when."""
    record: Record = {"id": f"{queue.name}:{item_id}", "state": "ready", "run": chunk.run,
                      "age_ms": max(0, shown.state.at_ms - chunk.at_ms), "deliveries": queue.deliveries.get(item_id, 0)}
    leased = queue.leases.overlap(item_id, item_id + 1)
    if leased:
        record |= {"state": "leased", "lease": leased[0][2]._asdict()}
    elif item_id in queue.delayed:
        due = queue.delayed[item_id]  # below zero: a time of day
        record |= {"state": "delayed", **({"due_in_ms": due - shown.state.at_ms} if due >= 0 else {"due_at_s": -due / 1000})}
    elif item_id in queue.parked:
        parked = queue.parked[item_id]
        record |= {"state": "parked", "run": parked.run, "deliveries": parked.deliveries,
                   "parked_ms_ago": max(0, shown.state.at_ms - parked.at_ms), "error": parked.error}
    return record


def item_lines(record: Record, value: str) -> Iterator[str]:
    """An item for people."""
    words = [record["id"], record["state"]]
    if "lease" in record:
        words.append(f"by node {record['lease']['node']}, take {record['lease']['seq']}")
    if "due_in_ms" in record:
        words.append(f"due in {seconds(max(0, record['due_in_ms']))}")
    if "due_at_s" in record:
        words.append(f"due at {datetime.fromtimestamp(record['due_at_s'], UTC).isoformat(' ')}")
    words += [f"put {seconds(record['age_ms'])} before the last entry", f"deliveries {record['deliveries']}",
              size(record["bytes"])]
    if record["key"] is not None:
        words.append(f"key {record['key']!r}")
    yield "  ".join(words)
    error = record.get("error", {})
    if error:
        yield f"    why: {error.get('text')}"
    for name, text in error.items():
        if name != "text" and text:
            lines = text if isinstance(text, list) else str(text).rstrip().splitlines()
            yield f"    {name}:" + (f" {lines[0]}" if len(lines) == 1 else "")
            yield from (f"      {line}" for line in lines if len(lines) > 1)
    first, *others = value.splitlines() or [""]
    yield f"    value: {first}"
    yield from (f"      {line}" for line in others)


# ---- the rest


def queue_record(shown: View, queue: QueueState) -> Record:
    oldest_ms = queue.oldest_ms()
    return {"queue": queue.name, "ready": len(queue.ready), "leased": len(queue.leases), "delayed": len(queue.delayed),
            "parked": len(queue.parked), "put": queue.put, "done": queue.done, "next_id": queue.next_id,
            "closed": queue.closed, "open_bytes": queue.open_bytes, "keys": len(queue.keys), "hidden": len(queue.hidden),
            "oldest_ms": None if oldest_ms is None else max(0, shown.state.at_ms - oldest_ms)}


def queue_lines(records: list[Record]) -> Iterator[str]:
    """Queues as a table for people."""
    names = ("ready", "leased", "delayed", "parked", "put", "done")
    width = max((len(record["queue"]) for record in records), default=0)
    for record in records:
        counts = "  ".join(f"{name} {record[name]}" for name in names)
        oldest = ""
        if record["oldest_ms"] is not None:
            oldest = f"  {size(record['open_bytes'])}  oldest {seconds(record['oldest_ms'])}"
        yield f"{record['queue']:<{width}}  {counts}{oldest}{'  closed' if record['closed'] else ''}"


def overview(shown: View) -> Record:
    """The journal in one object."""
    reader, state = shown.reader, shown.state
    meta = reader.meta
    return {
        "journal": str(shown.place.journal), "format": meta["format"], "node": meta.get("node_id"),
        "cluster": meta.get("cluster_name"), "cluster_id": meta.get("cluster_id"), "term": meta["term"],
        "voted_for": meta["voted_for"],
        "log": {"first": meta["base_idx"] + 1, "last": reader.last_index, "committed": reader.commit_index,
                "tables_at": meta["applied_idx"], "bytes": reader.log_bytes},
        "closed_in_order": meta["clean_idx"] is not None, "state_hash": state.hash.hex(),
        "configuration": _configuration(shown.configuration()),
        "members": [{"node": node, **member} for node, member in sorted(state.members.items())],
        "pipelines": [{"name": p.name, "version": p.version, "run": p.run, "state": p.state, "params": p.params,
                       "origin": p.origin, "paused": p.paused, "scaled": p.scaled, "rolled": p.rolled,
                       "rollout": p.rollout and {"former": p.rollout.former.version, "nodes": p.rollout.nodes}}
                      for p in state.pipelines.values()],
        "producers": [{"producer": key, "epoch": p.epoch, "seq": p.seq, "count": p.count, "finished": p.finished,
                       "node": p.node}
                      for key, p in sorted(state.producers.items())],
        "queues": [queue_record(shown, queue) for queue in state.queues.values()],
    }


def overview_lines(found: Record) -> Iterator[str]:
    """The same for people."""
    log = found["log"]
    closed = "closed in order" if found["closed_in_order"] else "in use or killed"
    yield f"journal   {found['journal']}, format {found['format']}, {closed}"
    yield f"node      {found['node']} of cluster {found['cluster']} ({found['cluster_id']})"
    yield f"term      {found['term']}, voted for {found['voted_for']}"
    yield (f"log       entries {log['first']} to {log['last']}, {size(log['bytes'])}; committed up to "
           f"{log['committed']}, in the tables up to {log['tables_at']}")
    yield f"voters    {_voters(found['configuration'])}"
    for member in found["members"]:
        yield _cut(f"member    {member['node']} {member['name']} {json.dumps(member['facts'])}")
    for pipeline in found["pipelines"]:
        yield _cut(f"pipeline  {pipeline['name']} version {pipeline['version'][:12]}, run {pipeline['run']} "
                   f"{pipeline['state']}, params {json.dumps(pipeline['params'])}")
        if pipeline["rollout"] is not None:
            yield _cut(f"rollout   {pipeline['name']} from version {pipeline['rollout']['former'][:12]}, "
                       f"so far on {', '.join(pipeline['rollout']['nodes']) or 'no node'}")
        if pipeline["rolled"] is not None and pipeline["rolled"]["failure"] is not None:
            failure = pipeline["rolled"]["failure"]
            yield _cut(f"went back {pipeline['name']} version {pipeline['rolled']['version'][:12]}: {failure['stage']} on {failure['node']} {failure['text']}")
        for stage, reason in pipeline["paused"].items():
            yield _cut(f"paused    {pipeline['name']}{f'/{stage}' if stage else ''}{f': {reason}' if reason else ''}")
        for stage, processes in pipeline["scaled"].items():
            yield _cut(f"scaled    {pipeline['name']}/{stage} to {processes}")
    for producer in found["producers"]:
        made = f"{producer['count']} values" if producer["count"] else f"{producer['seq']} puts"
        finished = ", finished" if producer["finished"] else ""
        yield _cut(f"producer  {producer['producer']} epoch {producer['epoch']}, {made}{finished}")
    yield from (f"queue     {line}" for line in queue_lines(found["queues"]))


def _voters(configuration: Record) -> str:
    if not configuration["voters"]:
        return "none: this node has not joined a cluster"
    old = f" (joint with {', '.join(configuration['voters_old'])})" if configuration["voters_old"] else ""
    return f"{', '.join(configuration['voters'])}{old}; learners {', '.join(configuration['learners']) or 'none'}"


# ---- the command


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_json(record: Record) -> None:
    print(json.dumps(record))


def _show_items(shown: View, args: argparse.Namespace) -> None:
    queues = [shown.queue(args.items)] if args.items else list(shown.state.queues.values())
    left = args.n
    for queue in queues:
        codec = shown.codec(queue)
        for record, value in items_of(shown, queue, args.parked):
            if left is not None and left <= 0:
                return
            left = None if left is None else left - 1
            if args.json:
                _print_json({**record, **show_json(value, codec)})
            else:
                _print(item_lines(record, show(value, codec)))


def _show_entries(records: Iterable[Record], args: argparse.Namespace) -> None:
    for record in records:
        if args.json:
            _print_json(record)
        else:
            _print(entry_lines(record))
        if args.follow:
            sys.stdout.flush()


def _show(args: argparse.Namespace) -> int:
    place = place_of(args.path)
    if args.follow:
        _show_entries(followed(place, FOLLOWED_FIRST if args.n is None else args.n, args.count), args)
        return 0
    with view(place) as shown, sqlite_errors(place.journal):
        if args.entries:
            _show_entries(entries_of(shown, args.n), args)
        elif args.items or args.parked:
            _show_items(shown, args)
        elif args.queues:
            records = [queue_record(shown, queue) for queue in shown.state.queues.values()]
            _print((json.dumps(record) for record in records) if args.json else queue_lines(records))
        else:
            found = overview(shown)
            _print([json.dumps(found)] if args.json else overview_lines(found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="HOME|FILE")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--entries", action="store_true", help="the log")
    what.add_argument("--items", metavar="QUEUE", help="the queue's items that are not finished")
    what.add_argument("--parked", action="store_true", help="parked items of every queue")
    what.add_argument("--queues", action="store_true", help="the queues")
    parser.add_argument("--json", action="store_true", help="JSON lines")
    parser.add_argument("-n", type=int, metavar="N", help="the last N entries, or the first N items")
    parser.add_argument("--follow", action="store_true", help="with --entries: go on with what is committed")
    parser.add_argument("--count", type=int, metavar="N", help="with --follow: end after N entries")
    args = parser.parse_args()
    if args.follow and not args.entries:
        parser.error("--follow goes with --entries")
    if args.count is not None and not args.follow:
        parser.error("--count goes with --follow; for fewer entries there is -n")
    return _show(args)


if __name__ == "__main__":
    sys.exit(run("journal_show", main))
