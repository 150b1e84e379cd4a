"""The pipeline that simulated clusters run, and what its stages make of each value.

A value says where it comes from, and what happens to it is a matter of its bytes alone. So whoever looks at a value
later can tell which input it is an output of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any
from zlib import crc32

from p2pcluster.core.codec import Buffer, Message
from p2pcluster.core.commands import lengths_blob
from tests.simulation.options import Options

NAME = "p"
VERSION = "v1"
PARTS = (b"PK one", b"PK two")
RETRIES = 2
POISON_OF_100 = 3  # values that fail at every delivery
FLAKY_OF_100 = 8  # and that fail at the first one
KILLER_OF_1000 = 8  # and that end the process that runs them, every time
SLOW_OF_1000 = 4  # and that run until the stage's timeout, the first time
TIMEOUT_S = 0.5
TICK_S = {"tick": 0.4, "beat": 0.7}  # sources that are called so often
RATE, RATE_INTERVAL_MS, RATE_BURST = "8/s", 125, 1
RATED = f"{NAME}/t"  # the queue that is emptied at that rate
EPOCH_MS = 1_700_000_000_000  # the time of day when the simulation begins
BATCH = 3  # values that `eat` is called with together
IN_PARTS_OF_100 = 60  # values of which `right` emits all but the last output ahead of its end


def _stage(name: str, kind: str, reads: str | None, ports: list[list[str]], processes: int | str, **more: Any
           ) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "reads": reads, "processes": processes, "shape": "function", "per_node": None, "where": None,
        "ports": [{"label": None if at == 0 else f"port{at}", "queues": queues} for at, queues in enumerate(ports)],
        "retries": RETRIES, "backoff_s": 0.05, "timeout_s": None, "where": None, "batch": None, "batch_wait_s": 0.05,
        "concurrency": 1, "resumable": False, "sharded": False, "rate": None, "every_s": None, "missed": "skip",
        "max_items": None, "parked_share_max": None,
        "defined_at": "pipeline.py:1", **more,
    }


def _queue(name: str, read_by: str | None = None, maxsize: int | None = None, outside: bool = False,
           results: bool = False) -> dict[str, Any]:
    return {"name": name, "maxsize": maxsize, "bytes_max": None, "codec": "pickle", "read_by": read_by, "fed_by": [],
            "outside": outside, "results": results}


MANIFEST: dict[str, Any] = {
    "format": 1, "pipeline": NAME, "back_edges": [], "on_done": True, "params": None, "placement": False,
    "order": ["gen", "cur", "tick", "beat", "left", "right", "out", "eat", "tock"],
    "stages": [
        _stage("gen", "source", None, [["a"]], 1, shape="generator"),
        _stage("cur", "source", None, [["a", "d"]], 2, shape="generator", resumable=True, sharded=True),
        _stage("tick", "source", None, [["t"]], 1, every_s=TICK_S["tick"], missed="all"),
        _stage("beat", "source", None, [["t"]], 1, every_s=TICK_S["beat"]),
        _stage("left", "stage", "a", [["b"]], "auto", timeout_s=TIMEOUT_S),
        _stage("right", "stage", "b", [["c"], ["d"]], 2, shape="generator"),
        _stage("out", "sink", "c", [], 1, max_items=9),
        _stage("eat", "stage", "in", [["eat.results"]], 1, batch=BATCH),
        _stage("tock", "sink", "t", [], 1, rate=RATE),
    ],
    "queues": [_queue("a", "left", 24), _queue("b", "right", 16), _queue("c", "out", 200), _queue("d"),
               _queue("in", "eat", 40, outside=True), _queue("eat.results", results=True), _queue("t", "tock", 30)],
}
STAGE_OF = {f"{NAME}/{stage['reads']}": stage["name"] for stage in MANIFEST["stages"] if stage["reads"]}


SECOND_NAME = "u"  # a pipeline that comes and goes
SECOND: dict[str, Any] = {
    "format": 1, "pipeline": SECOND_NAME, "back_edges": [], "on_done": False, "params": None, "placement": False, "order": ["gulp"],
    "stages": [_stage("gulp", "sink", "x", [], 1)], "queues": [_queue("x", "gulp", 30, outside=True)],
}
SECOND_QUEUE = f"{SECOND_NAME}/x"
READS = {(manifest["pipeline"], stage["name"]): f"{manifest['pipeline']}/{stage['reads']}" for manifest in (MANIFEST, SECOND)
         for stage in manifest["stages"]}
CAN_BE_BROKEN = ("gen", "left", "out")  # stages that may not start in a version


def bundle_of(version: str) -> tuple[bytes, ...]:
    """The parts of a version's files."""
    return PARTS if version == VERSION else (b"PK one of " + version.encode(), PARTS[1])


def is_broken(version: str, stage: str) -> bool:
    """Whether the stage does not start in the version."""
    return version.startswith("x") and version.endswith(f"-{stage}")


def shipment(version: str, manifest: dict[str, Any] = MANIFEST) -> list[Message]:
    """What brings a version into a cluster."""
    parts = bundle_of(version)
    deploy = Message("deploy", {
        "pipeline": manifest["pipeline"], "version": version, "origin": {"name": "origin", "folder": "/f"}, "manifest": manifest,
        "files": {"pipeline.py": version}, "zip_sha256": "0" * 64, "project": {"module": "pipeline"},
    })
    return [*(Message("bundle_part", {"version": version, "part": part, "parts": len(parts)}, (body,)) for part, body in enumerate(parts)), deploy]


def second_shipment() -> list[Message]:
    return shipment("u1", SECOND)


def deployment() -> list[Message]:
    """What brings the pipeline into a cluster."""
    return [*shipment(VERSION), Message("start_run", {"pipeline": NAME, "params": None})]


# ---- what stages make of values


def outputs(stage: str, value: bytes) -> list[tuple[int, bytes]]:
    """What the stage emits for a value, as (port, value)."""
    if stage == "left":
        return [(0, value + b">L")]
    if stage == "right":
        count = crc32(b"count" + value) % 4
        return [(crc32(b"port%d" % at + value) % 2, value + b">R%d" % at) for at in range(count)]
    if stage == "eat":
        return [(0, value + b">E")]
    return []


def parts_of(stage: str, value: bytes) -> list[tuple[int, bytes]]:
    """Which of its outputs a stage emits for a value ahead of its end, each in a part of its own."""
    return outputs(stage, value)[:-1] if stage == "right" and crc32(b"parts" + value) % 100 < IN_PARTS_OF_100 else []


def behaviour(stage: str, value: bytes, delivery: int) -> str:
    """What happens when a stage runs the value: `ok`, `raises`, `dies`, or `hangs`. `delivery` counts from 1."""
    number = crc32(stage.encode() + b"|" + value)
    if number % 1000 < KILLER_OF_1000:
        return "dies"
    if stage == "left" and number % 1000 < KILLER_OF_1000 + SLOW_OF_1000 and delivery == 1:
        return "hangs"
    if number // 1000 % 100 < POISON_OF_100:
        return "raises"
    if number // 1000 % 100 < POISON_OF_100 + FLAKY_OF_100 and delivery == 1:
        return "raises"
    return "ok"


def service_ms(stage: str, value: bytes) -> int:
    """How long a value takes."""
    return 1 + crc32(b"time" + stage.encode() + value) % (40 if stage == "right" else 8)


def source_values(stage: str, shard: int, options: Options) -> list[bytes]:
    """All that a shard of a source emits."""
    count = options.gen_items if stage == "gen" else options.cursor_items
    return [b"%s%d:%d" % (stage.encode(), shard, number) for number in range(count)]


def tick_value(stage: str, number: int) -> bytes:
    """What a tick emits."""
    return b"%s:%d" % (stage.encode(), number)


def pack(values: Iterable[bytes]) -> tuple[bytes, bytes]:
    """The `lengths` and `body` of values."""
    values = list(values)
    return lengths_blob(map(len, values)), b"".join(values)


def pack_results(stage: str, results: list[list[tuple[int, bytes]]]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """The ports and blobs of a report on inputs that gave `results`."""
    count = {"left": 1, "right": 2, "eat": 1}.get(stage, 0)
    if count == 1:
        return [{"port": 0}], list(pack(result[0][1] for result in results))
    ports: list[dict[str, Any]] = []
    blobs: list[Buffer] = []
    for port in range(count):
        groups = [[value for number, value in result if number == port] for result in results]
        if any(groups):
            ports.append({"port": port, "counts": True})
            blobs += [*pack(value for group in groups for value in group), lengths_blob(map(len, groups))]
    return ports, blobs


def pack_together(outputs: list[tuple[int, bytes]]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """The ports and blobs of outputs that are not told apart by their inputs."""
    ports: list[dict[str, Any]] = []
    blobs: list[Buffer] = []
    for number in sorted({number for number, _ in outputs}):
        ports.append({"port": number})
        blobs += pack(value for port, value in outputs if port == number)
    return ports, blobs


def digest_of(values: Iterable[bytes]) -> str:
    """The running hash of what a plain generator has emitted."""
    return hashlib.sha256(b"".join(values)).hexdigest()


def encode_cursor(number: int) -> bytes:
    return json.dumps(number).encode()
