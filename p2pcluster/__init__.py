"""p2pcluster: functions joined by durable queues, run on every machine of a network.

This file alone decides which names are public. It holds no code of its own, and importing it opens nothing.
"""

from __future__ import annotations

from p2pcluster.shadows import PythonsFirst

with PythonsFirst():
    from typing import TYPE_CHECKING, Any

    from p2pcluster.core.context import Context, current
    from p2pcluster.core.graph import Pipeline
    from p2pcluster.core.stages import DROP, At, Drop, Flow, Queue, Stage, To, i_wrap, io_wrap, o_wrap, sink, source, stage
    from p2pcluster.errors import ClusterError, GraphError, ItemsParked

if TYPE_CHECKING:
    from p2pcluster.client import connect

__version__ = "0.1.0"

__all__ = [
    "DROP",
    "At",
    "ClusterError",
    "Context",
    "Drop",
    "Flow",
    "GraphError",
    "ItemsParked",
    "Pipeline",
    "Queue",
    "Stage",
    "To",
    "connect",
    "current",
    "i_wrap",
    "io_wrap",
    "o_wrap",
    "sink",
    "source",
    "stage",
]


def __getattr__(name: str) -> Any:
    # A stage process imports this package and never connects: sockets and what they pull in wait until somebody asks.
    if name == "connect":
        with PythonsFirst():
            from p2pcluster.client import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
