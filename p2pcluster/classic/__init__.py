"""The older API: programs of the package `clusterer` run with the import line as the only change.

They are faces of the same node, journal and protocol; there is no second queue and no second socket here.

- A server is a node (`daemon.Daemon`) in a thread, alone in the cluster `classic-PORT`: it answers who looks for it and joins nobody. Its
  key is the authkey, stretched. Its home is the usual one of that cluster, so every verb of the command line works on it with `--cluster
  classic-PORT`.
- Its queues are those of one pipeline without stages, each fed from outside and never closed. Whatever is put is in the journal.
- A client starts processes and gives each the place of its function and the names of its queues. Each process is a client of the node
  (`client.Link`): a raw `put` is a put, a raw `get` a take that is acknowledged at once. A decorated function takes with a lease and
  finishes its item in the same command that puts what came of it, so what a process dies with goes back, and nothing is done twice unless
  something dies.
- What a server tells its clients to run travels as JSON through two more of these queues, the project's files as the deployed bundle.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from p2pcluster.classic.wrappers import i_wrap, io_wrap, o_wrap

if TYPE_CHECKING:
    from p2pcluster.classic.clients import BaseClient, BroadcastClient, FunctionClient, ProtocolClient
    from p2pcluster.classic.schedulers import BaseScheduler, PipelineReplicate
    from p2pcluster.classic.servers import BaseServer, BroadcastServer, FunctionServer, ProtocolServer

__all__ = [
    "BaseClient", "BaseScheduler", "BaseServer", "BroadcastClient", "BroadcastServer", "FunctionClient", "FunctionServer",
    "PipelineReplicate", "ProtocolClient", "ProtocolServer", "i_wrap", "io_wrap", "o_wrap",
]


def __getattr__(name: str) -> Any:
    # Each process of a client imports this package, and needs none of what starts nodes and processes.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = next((part for part in ("clients", "servers") if name.endswith(part[:-1].title())), "schedulers")
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
