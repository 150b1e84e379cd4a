"""The baseline: the same work over `multiprocessing.managers` queues, TCP on loopback with an authkey, all in memory.

`python managers.py serve` is the process that holds the queues; the others are workers that get, work and put. Each
prints one JSON line when it ends. `batch` is how many items one message holds: 1 is what a program does that simply
uses the queues, more is batching by hand.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from multiprocessing.managers import BaseManager
from typing import Any

QUEUE_ITEMS_MAX = 10_000  # as much as a queue of ours holds
END = None
NAP_S = 0.01
NAP_PROCESSES = 8


class Queues(BaseManager):
    """`in_q` and `out_q`, bounded; `ready_q`, through which workers say that they are there."""


def serve(batch: int, authkey: bytes) -> None:
    """Print the port, then serve until standard input ends, so that no server outlives the benchmark."""
    for name in ("in_q", "out_q", "ready_q"):
        held: queue.Queue[Any] = queue.Queue(0 if name == "ready_q" else max(1, QUEUE_ITEMS_MAX // batch))
        Queues.register(name, callable=lambda held=held: held)
    server = Queues(("127.0.0.1", 0), authkey).get_server()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(server.address[1], flush=True)  # type: ignore[index]
    server.serve_forever()


def connected(port: int, authkey: bytes) -> Any:
    for name in ("in_q", "out_q", "ready_q"):
        Queues.register(name)
    manager = Queues(("127.0.0.1", port), authkey)
    manager.connect()
    return manager


def source(manager: Any, items: int, batch: int) -> dict[str, Any]:
    out_q = manager.in_q()
    _wait_for_workers(manager, 2)
    held = []
    for number in range(items):
        held.append({"number": number})
        if len(held) == batch:
            out_q.put(held if batch > 1 else held[0])
            held = []
    if held:
        out_q.put(held)
    out_q.put(END)
    return {}


def square(manager: Any, items: int, batch: int) -> dict[str, Any]:
    in_q, out_q = manager.in_q(), manager.out_q()
    manager.ready_q().put(os.getpid())
    while (message := in_q.get()) is not END:
        out_q.put([item["number"] ** 2 for item in message] if batch > 1 else message["number"] ** 2)
    out_q.put(END)
    return {}


def total(manager: Any, items: int, batch: int) -> dict[str, Any]:
    in_q = manager.out_q()
    manager.ready_q().put(os.getpid())
    count = added = 0
    first_s = 0.0
    while (message := in_q.get()) is not END:
        if not count:
            first_s = time.monotonic()
        for value in message if batch > 1 else (message,):
            count += 1
            added += value
    return {"count": count, "total": added, "first_s": first_s, "last_s": time.monotonic()}


def naps(manager: Any, items: int, batch: int) -> dict[str, Any]:
    """Tasks for `nap`."""
    out_q = manager.in_q()
    _wait_for_workers(manager, NAP_PROCESSES)
    for number in range(items):
        out_q.put(number)
    out_q.put(END)
    return {}


def nap(manager: Any, items: int, batch: int) -> dict[str, Any]:
    """One of several: sleeps for each item, and passes the end on to the next."""
    in_q, out_q = manager.in_q(), manager.out_q()
    manager.ready_q().put(os.getpid())
    while in_q.get() is not END:
        began_s = time.monotonic()
        time.sleep(NAP_S)
        out_q.put((began_s, time.monotonic()))
    in_q.put(END)
    return {}


def collect(manager: Any, items: int, batch: int) -> dict[str, Any]:
    in_q = manager.out_q()
    return {"naps": [in_q.get() for _ in range(items)]}


def stamps(manager: Any, items: int, batch: int) -> dict[str, Any]:
    """One item at a time into an idle queue."""
    out_q = manager.in_q()
    for _ in range(items):
        time.sleep(2 * NAP_S)
        out_q.put(time.monotonic())
    out_q.put(END)
    return {}


def latencies(manager: Any, items: int, batch: int) -> dict[str, Any]:
    in_q = manager.in_q()
    took_ms = []
    while (put_s := in_q.get()) is not END:
        took_ms.append(1000 * (time.monotonic() - put_s))
    return {"latencies_ms": took_ms}


def _wait_for_workers(manager: Any, count: int) -> None:
    """So that nothing piles up, or is done by half of them, before the measurement begins."""
    ready_q = manager.ready_q()
    for _ in range(count):
        ready_q.get()


ROLES = {role.__name__: role for role in (source, square, total, naps, nap, collect, stamps, latencies)}


def main(argv: list[str]) -> None:
    """`serve BATCH AUTHKEY`, or `ROLE PORT ITEMS BATCH AUTHKEY`."""
    authkey = argv[-1].encode()
    if argv[0] == "serve":
        serve(int(argv[1]), authkey)
        return
    report = ROLES[argv[0]](connected(int(argv[1]), authkey), int(argv[2]), int(argv[3]))
    print(json.dumps({**report, "cpu_s": time.process_time()}))


if __name__ == "__main__":
    main(sys.argv[1:])
