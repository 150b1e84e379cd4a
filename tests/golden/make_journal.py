"""Makes the journal that every later version has to open, and says what it holds.

    python tests/golden/make_journal.py

Run it again only when the format changes before anybody has a journal of it. After that a new format gets a file of its
own beside the old ones, and a step in `journal.MIGRATIONS` that leads the old ones up. `journal_v3.json` says what is
in `journal_v3.sqlite3`: items in every state, some with their bytes in the log and some in rows of their own, and a
tail that is not committed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from p2pcluster import config
from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.log import COMMANDS, NOOP, Entry
from p2pcluster.core.queues import State
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import HardState
from p2pcluster.core.ranges import Fence
from p2pcluster.journal import FORMAT, Journal, Recovered, Write
from tests.contract.stores import RealStore
from tests.simulation.queue_model import beginning, deployment, entry_body, source_key, values_of
from tests.simulation.sole_voter import SoleVoter, put

FOLDER = Path(__file__).resolve().parent
FENCE = Fence("node-a", "boot-1", 4294967297)
ERROR = {
    "type": "ValueError",
    "text": "no such number",
    "traceback": "Traceback ...",
    "stage": "p/last",
    "node": "host",
}


def describe(journal: Journal, recovered: Recovered) -> dict[str, Any]:
    """What a journal holds, in words that outlive the code."""
    state = recovered.state
    return {
        "term": recovered.hard_state.term,
        "voted_for": recovered.hard_state.voted_for,
        "base_index": recovered.base_index,
        "base_term": recovered.base_term,
        "last_index": recovered.last_index,
        "commit_index": recovered.commit_index,
        "applied_index": state.applied_idx,
        "at_ms": state.at_ms,
        "state_hash": state.hash.hex(),
        "node_id": journal.meta["node_id"],
        "configuration": json.loads(journal.meta["configuration"]),
        "entries": [[e.index, e.term, e.at_ms, e.kind, len(e.body)] for e in journal.entries(0)],
        "queues": {name: _queue(journal, recovered, name) for name in sorted(state.queues)},
        "producers": {
            key: [p.epoch, p.seq, p.count, p.hash, p.finished, p.at_ms, p.node, p.boot, (p.cursor or b"").decode()]
            for key, p in sorted(state.producers.items())
        },
        "pipelines": {
            name: [p.version, p.run, p.state, p.params, p.started_ms, p.previous]
            for name, p in sorted(state.pipelines.items())
        },
        "bundles": {
            version: journal.read_bundle(version, parts).decode("latin-1")
            for version in ("v1", "w1")
            if (parts := state.bundle_parts(version)) is not None
        },
        "members": state.members,
        **_flow(state),
        **_controls(state),
        **_versions(state),
    }


def _flow(state: State) -> dict[str, Any]:
    """What is known of rates, ticks and parked shares, where there are any."""
    found = {name: [p.paced, p.ticks, {stage: list(share) for stage, share in p.shares.items()}] for name, p in state.pipelines.items()}
    return {"flow": found} if any(any(records) for records in found.values()) else {}


def _controls(state: State) -> dict[str, Any]:
    """What people have said at run time, where they have."""
    found = {name: [p.paused, p.scaled] for name, p in state.pipelines.items()}
    return {"controls": found} if any(any(said) for said in found.values()) else {}


def _versions(state: State) -> dict[str, Any]:
    """Which versions are on their way over the nodes, how the last one ended, and what is left of pipelines that were undeployed."""
    rolling = {
        name: [p.rollout.number, p.rollout.former.version, p.rollout.nodes] for name, p in state.pipelines.items() if p.rollout
    }
    rolled = {name: p.rolled for name, p in state.pipelines.items() if p.rolled}
    found = {"rolling": rolling, "rolled": rolled, "ended": {name: list(end) for name, end in state.ended.items()}}
    return {"versions": found} if any(found.values()) else {}


def _queue(journal: Journal, recovered: Recovered, name: str) -> dict[str, Any]:
    queue = recovered.state.queues[name]
    items = {}
    for chunk in queue.chunks:
        lengths, body = (
            journal.read_bodies(name, chunk)
            if chunk.lengths is None or chunk.body is None
            else (chunk.lengths, chunk.body)
        )
        for item_id, value in enumerate(values_of(lengths, body), chunk.first):
            if queue.open_ranges(item_id, item_id + 1) or item_id in queue.parked:
                items[str(item_id)] = [value.decode(), chunk.key_of(item_id), chunk.run]
    return {
        "next_id": queue.next_id,
        "put": queue.put,
        "done": queue.done,
        "closed": queue.closed,
        "items": items,
        "ready": [list(pair) for pair in queue.ready],
        "leases": [[lo, hi, *fence] for lo, hi, fence in queue.leases],
        "delayed": {str(i): due for i, due in queue.delayed.items()},
        "deliveries": {str(i): n for i, n in queue.deliveries.items()},
        "parked": {str(i): [p.run, p.deliveries, p.at_ms, p.error] for i, p in queue.parked.items()},
        "keys": sorted(digest.hex() for digest in queue.keys),
        **({"hidden": [list(pair) for pair in queue.hidden]} if queue.hidden else {}),
        **({"parts": {str(i): [p.count, list(map(list, p.spans))] for i, p in queue.parts.items()}} if queue.parts else {}),
    }


def write_everything(node: SoleVoter) -> None:
    """A short life: work, failures, a checkpoint, a compaction, more work, and a tail that waits for a majority."""
    node.write(
        Write(
            hard_state=HardState(1, "node-a"),
            meta=(("node_id", "node-a"), ("cluster_id", "c0ffee"), ("cluster_name", "golden")),
            configuration=Configuration(("node-a", "node-b", "node-c")),
        )
    )
    node.commit(*beginning(), Message("member", {"node": "node-a", "name": "host", "facts": {"cores": 2}}))
    assign = Message("assign", {"pipeline": "p", "stage": "gen", "shard": 0, "node": "node-a", "boot": "boot-1"})
    numbers = Port(["p/a", "p/b"], lengths_blob([3, 3, 5]), b"onetwothree")
    node.commit(
        assign, commands.put(source_key("p", 1, "gen", 0), 1, 1, [numbers], {"count": 3, "hash": "abc"}, b"after three")
    )
    node.commit(
        put("p/in", 1, b"first", b"second", b"third", b"fourth"), put("w/x", 2, b"keyed", b"again", keys=b'["k", "k"]')
    )
    node.commit(commands.take("p/in", [(1, 4)], FENCE), commands.take("p/a", [(1, 3)], FENCE))
    node.commit(commands.fail("p/in", 1, FENCE, ERROR, 0), commands.fail("p/a", 1, FENCE, ERROR, 1500))
    node.commit(commands.done("p/in", [(2, 3)], [Port(["p/last.results"], lengths_blob([6]), b"SECOND")]))
    late = Port(["p/d"], lengths_blob([4]), b"late")
    until, after = late._replace(at_ms=1_800_000_000_000), late._replace(delay_ms=700)
    node.commit(commands.put("waits", 0, 1, [until]), commands.put("waits", 0, 2, [after]))
    node.commit(commands.put(source_key("p", 1, "gen", 0), 1, 2, [], {"tick_ms": 1_700_000_000_000}))
    node.commit(commands.part("p/in", 3, FENCE, 0, [Port(["p/last.results"], lengths_blob([3, 4]), b"THIRDly")]))
    node.commit(Message("pause", {"pipeline": "p", "stage": "out", "reason": ""}), Message("scale", {"pipeline": "p", "stage": "left", "processes": 3}))
    write_versions(node)
    node.checkpoint()
    config.LOG_BYTES_MAX = 0  # so that the bytes go to rows of their own
    while node.compact().more:
        pass
    for seq in range(3, 15):
        node.commit(put("p/d", seq, b"small %d" % seq))
    node.checkpoint()
    node.commit(Message("pause", {"pipeline": "w", "stage": None, "reason": "half of its items are parked"}))
    node.commit(put("p/d", 15, b"only in the log"), commands.done("p/b", [(2, 3)], []))
    tail = (
        Entry(node.last_index + 1, 1, 900, NOOP, b""),
        Entry(node.last_index + 2, 1, 900, COMMANDS, entry_body([put("p/d", 16, b"not committed")])),
    )
    node.journal.write(Write(tail, commit_index=node.last_index))


def write_versions(node: SoleVoter) -> None:
    """One is on its way, one has gone back, and a pipeline has ended."""
    *parts, deploy = deployment("w1")
    ended = {**deploy.fields, "pipeline": "e", "manifest": {**deploy.fields["manifest"], "pipeline": "e"}}
    node.commit(*parts, deploy._replace(fields=ended), Message("start_run", {"pipeline": "e", "params": None}))
    value = Port(["e/x"], lengths_blob([12]), b"goes with it")
    node.commit(commands.put("ends", 0, 1, [value]), Message("undeploy", {"pipeline": "e", "discard": True}))
    node.commit(*(message._replace(fields={**message.fields, "version": "w2"}) for message in deployment("w1")))
    failure = {"node": "host", "stage": "eat", "text": "does not start: No module named 'rare'"}
    node.commit(Message("roll", {"pipeline": "w", "rollout": node.last_index, "node": "node-a"}),
                Message("roll_back", {"pipeline": "w", "rollout": node.last_index, "failure": failure}))
    node.commit(*deployment("v2"))
    node.commit(Message("roll", {"pipeline": "p", "rollout": node.last_index, "node": "node-a"}))


def main() -> None:
    """Write both files."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        store = RealStore(Path(folder))
        node = SoleVoter(store)
        write_everything(node)
        node.journal.close()
        target = FOLDER / f"journal_v{FORMAT}.sqlite3"
        target.write_bytes(store.path.read_bytes())
        journal, recovered = store.open()
        (FOLDER / f"journal_v{FORMAT}.json").write_text(
            json.dumps(describe(journal, recovered), indent=1, sort_keys=True) + "\n"
        )
        journal.close()
    print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
