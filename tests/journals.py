"""Journals for tests: written through `Journal` itself, with a bit of everything that a cluster's state can hold.

`Scribe` is the smallest node: it proposes what comes to its mind, writes it, applies it, and checkpoints now and
then. Everything is drawn from the `Random` that it is given.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from p2pcluster import config
from p2pcluster.core import commands
from p2pcluster.core.codec import Message, encode_bytes
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.log import COMMANDS, NOOP, Entry
from p2pcluster.core.queues import State
from p2pcluster.core.raft import HardState
from p2pcluster.core.ranges import Fence
from p2pcluster.journal import Journal, Write, apply_entry, checkpoint_of

FENCES = [Fence("node-a", "boot-1", 7), Fence("node-a", "boot-1", 8), Fence("node-b", "boot-2", 7)]
ERROR = {"type": "ValueError", "text": "ValueError: no", "node": "host", "stderr": ["one line", "another"],
         "traceback": "Traceback (most recent call last):\n  ...\nValueError: no"}


def _stage(name: str, kind: str, reads: str | None, outputs: Sequence[str], retries: int = 1) -> dict[str, Any]:
    return {"name": name, "kind": kind, "reads": reads, "retries": retries, "processes": 1, "shape": "function",
            "ports": [{"label": None, "queues": list(outputs)}] if outputs else [], "per_node": None, "where": None, "backoff_s": 1.0,
            "timeout_s": None, "where": None, "batch": None, "batch_wait_s": 0.05, "concurrency": 1, "resumable": True,
            "sharded": False, "rate": None, "every_s": None, "missed": "skip", "max_items": None,
            "parked_share_max": None, "defined_at": "pipeline.py:1"}


def _queue(name: str, read_by: str | None, outside: bool = False, results: bool = False, codec: str = "pickle",
           ) -> dict[str, Any]:
    return {"name": name, "maxsize": 1000, "bytes_max": 1 << 20, "codec": codec, "read_by": read_by, "fed_by": [],
            "outside": outside, "results": results}


MANIFEST = {
    "format": 1, "pipeline": "mix", "back_edges": [], "on_done": True, "order": ["gen", "work", "print", "eat"],
    "params": None, "placement": False,
    "stages": [_stage("gen", "source", None, ["work", "both"]), _stage("work", "stage", "work", ["print"]),
               _stage("print", "sink", "print", [], retries=0), _stage("eat", "stage", "fed", ["eat.results"])],
    "queues": [_queue("work", "work"), _queue("both", None), _queue("print", "print"),
               _queue("fed", "eat", outside=True, codec="json"), _queue("eat.results", None, results=True)],
}
SOURCE = "source:mix/1/gen/0"


def encoded(values: Sequence[Any], codec: str = "pickle") -> tuple[bytes, bytes]:
    """The `lengths` and `body` of values."""
    bodies = [json.dumps(value).encode() if codec == "json" else pickle.dumps(value, 5) for value in values]
    return lengths_blob(map(len, bodies)), b"".join(bodies)


class Scribe:
    """Writes a journal. `commit` what is wanted, or let it `wander`."""

    def __init__(self, folder: Path, chance: Random) -> None:
        folder.mkdir(exist_ok=True)
        self.path, self.mark_path = folder / "journal.sqlite3", folder / "journal.mark"
        self.chance = chance
        self.journal, recovered = Journal.open(self.path, self.mark_path)
        self.state: State = recovered.state
        self.index = recovered.last_index
        self.at_ms = 1000
        self.seqs: dict[str, int] = {}

    # ---- writing

    def vote(self, term: int, voted_for: str | None) -> None:
        """A commit of nothing but term and vote."""
        self.journal.write(Write(hard_state=HardState(term, voted_for)))

    def commit(self, *messages: Message, checkpoint: bool = False, compact_from: int | None = None,
               kind: int = COMMANDS) -> None:
        self.index += 1
        self.at_ms += self.chance.randint(1, 40)
        entry = Entry(self.index, 1, self.at_ms, kind, b"".join(map(encode_bytes, messages)))
        written = checkpoint_of(self.state) if checkpoint else None
        compact = None if compact_from is None else (compact_from, 1 << 14)
        with mock.patch.object(config, "LOG_BYTES_MAX", 1 << 14 if compact else config.LOG_BYTES_MAX):
            done = self.journal.write(Write((entry,), None, self.index, True, checkpoint=written, compact=compact))
        for chunk in done.filled:
            self.state.filled(chunk.queue, chunk.first, chunk.body_crc)
        apply_entry(self.state, entry)

    def begin(self) -> None:
        """A new cluster with a project that runs."""
        self.journal.write(Write(hard_state=HardState(1, "node-a"),
                                 meta=(("node_id", "node-a"), ("cluster_id", "cluster-1"), ("cluster_name", "test"))))
        self.commit(kind=NOOP)
        self.commit(Message("member", {"node": "node-a", "name": "host", "facts": {"cores": 2}}),
                    Message("member", {"node": "node-b", "name": "other", "facts": {"cores": 4}}))
        for part in range(2):
            body = self.chance.randbytes(3000)
            self.commit(Message("bundle_part", {"version": "v1", "part": part, "parts": 2}, (body,)))
        self.commit(Message("deploy", {
            "pipeline": "mix", "version": "v1", "origin": {"name": "host"}, "manifest": MANIFEST,
            "files": {"pipeline.py": "0" * 64}, "zip_sha256": "0" * 64, "project": {"module": "pipeline"},
        }))
        self.commit(Message("start_run", {"pipeline": "mix", "params": {"n": 3}}))
        self.commit(Message("assign", {"pipeline": "mix", "stage": "gen", "shard": 0, "node": "node-a",
                                       "boot": "boot-1"}))

    def wander(self, steps: int, checkpoint_every: int = 9, compact_every: int | None = None) -> None:
        """So many entries of whatever is possible."""
        for step in range(1, steps + 1):
            messages = [message for _ in range(self.chance.randint(1, 3)) for message in self._something()]
            self.commit(*messages, checkpoint=step % checkpoint_every == 0,
                        compact_from=self.index + 1 if compact_every and step % compact_every == 0 else None)

    # ---- what is possible

    def _something(self) -> list[Message]:
        name = self.chance.choice(["source", "client", "client", "take", "take", "done", "done", "done", "fail", "fail",
                                   "due", "release", "session_end", "retry", "small"])
        found: list[Message] = getattr(self, f"_a_{name}")()
        return found

    def _values(self, most: int) -> list[Any]:
        count = self.chance.randint(1, most)
        long = self.chance.random() < 0.1
        return [{"n": self.index, "text": self.chance.randbytes(4500 if long else self.chance.randint(4, 90)).hex()}
                for _ in range(count)]

    def _a_source(self) -> list[Message]:
        self.seqs[SOURCE] = self.seqs.get(SOURCE, 0) + 1
        values = self._values(12)
        source = {"count": self.state.producers[SOURCE].count + len(values), "hash": self.chance.randbytes(8).hex(),
                  "finished": False}
        return [commands.put(SOURCE, 1, self.seqs[SOURCE], [Port(["mix/work", "mix/both"], *encoded(values))], source,
                             pickle.dumps(self.index))]

    def _a_client(self) -> list[Message]:
        key = self.chance.choice(["client-1", "client-2"])
        self.seqs[key] = self.seqs.get(key, 0) + 1
        values = self._values(4)
        keys = [self.chance.choice(["red", "green", "blue", f"key-{self.chance.randrange(50)}", None]) for _ in values]
        port = Port(["mix/fed"], *encoded(values, "json"), None, json.dumps(keys).encode())
        return [commands.put(key, 0, self.seqs[key], [port])]

    def _a_small(self) -> list[Message]:
        """Several puts of one value each: a checkpoint lays them together."""
        found = []
        for _ in range(5):
            self.seqs["small"] = self.seqs.get("small", 0) + 1
            found.append(commands.put("small", 0, self.seqs["small"], [Port(["mix/both"], *encoded([self.index]))]))
        return found

    def _a_take(self) -> list[Message]:
        queue = self.chance.choice(["mix/work", "mix/print", "mix/fed"])
        ranges = self.state.queues[queue].ready.first(self.chance.randint(1, 9))
        return [commands.take(queue, ranges, self.chance.choice(FENCES))] if ranges else []

    def _leased(self) -> tuple[str, int, int, Fence] | None:
        held = [(name, lo, hi, fence) for name, queue in self.state.queues.items() for lo, hi, fence in queue.leases]
        return self.chance.choice(held) if held else None

    def _a_done(self) -> list[Message]:
        found = self._leased()
        if found is None:
            return []
        queue, lo, hi, _ = found
        hi = self.chance.randint(lo + 1, hi)
        outputs = {"mix/work": ["mix/print"], "mix/fed": ["mix/eat.results"]}.get(queue)
        ports = [Port(outputs, *encoded([{"out": i} for i in range(lo, hi)]))] if outputs else []
        return [commands.done(queue, [(lo, hi)], ports)]

    def _a_fail(self) -> list[Message]:
        found = self._leased()
        return [commands.fail(found[0], found[1], found[3], ERROR, self.chance.randint(10, 5000))] if found else []

    def _a_release(self) -> list[Message]:
        found = self._leased()
        return [commands.release(found[0], [found[1:3]], found[3])] if found and self.chance.random() < 0.3 else []

    def _a_due(self) -> list[Message]:
        due = [(name, list(queue.delayed)) for name, queue in self.state.queues.items() if len(queue.delayed) > 2]
        return [Message("due", {"queue": name, "ids": ids[:2]}) for name, ids in due[:1]]

    def _a_session_end(self) -> list[Message]:
        if self.chance.random() < 0.7:
            return []
        return [commands.session_end("node-b", "boot-2", {}, ERROR, 100)]

    def _a_retry(self) -> list[Message]:
        parked = [(name, list(queue.parked)) for name, queue in self.state.queues.items() if len(queue.parked) > 3]
        return [Message("retry", {"queue": name, "ids": ids[:1]}) for name, ids in parked[:1]]

    # ---- ending

    def close(self) -> None:
        """As a node does that was asked to end."""
        self.journal.write(Write(commit_index=self.index, checkpoint=checkpoint_of(self.state)))
        self.journal.close()

    def killed(self, folder: Path) -> Path:
        """What a kill would leave at this moment: the files as they are while the connection is open."""
        folder.mkdir(exist_ok=True)
        for path in self.path.parent.glob("journal.*"):
            shutil.copy(path, folder / path.name)
        return folder


def mixed(folder: Path, seed: int, from_start: bool, steps: int = 70) -> Scribe:
    """A journal with a bit of everything, still open. `from_start`: its log was never compacted."""
    scribe = Scribe(folder, Random(seed))
    scribe.begin()
    scribe.wander(steps, compact_every=None if from_start else 9)
    return scribe
