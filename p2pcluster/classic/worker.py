"""Inside a process that `process` has started: find the function, connect to the server, call it with its queues.

Decided here: what ends the process. Its parent speaks over an inherited socket, whose end is this process's end; told to stop, a
decorated function finishes the item in hand, and anything else is interrupted as by Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from p2pcluster.classic import functions, loops, utils, wrappers
from p2pcluster.classic.queues import Door, RawQueue
from p2pcluster.config import parse_address
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterError
from p2pcluster.worker import Channel

RAISED, REFUSED, STOPPED = 3, 4, utils.STOPPED  # exit codes, beside 0: the function has returned

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# As for stage processes: our own imports come before the program's folder is on the path.
_BOOT = ("import sys; root = sys.argv[1]; sys.path.insert(0, root); from p2pcluster.classic.worker import main; sys.path.remove(root); "
         "sys.exit(main(int(sys.argv[2]), int(sys.argv[3])))")


def command(descriptor: int, page: int, name: str) -> list[str]:
    """The command line of a process that has inherited a socket and a page of memory; `name` is for people who look with `ps`."""
    return [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, str(descriptor), str(page), name]


def main(descriptor: int, page: int) -> int:
    """Run one process; returns its exit code."""
    loops.be_watched(page)
    os.close(page)
    for stream in (sys.stdout, sys.stderr):
        # A line is one write, since processes share a terminal.
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    channel = Channel(socket.socket(fileno=descriptor))
    heard = channel.receive()
    if len(heard) != 1:  # nothing, or already that it is to stop
        return STOPPED
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_listen, args=(channel, threading.get_ident()), daemon=True).start()
    try:
        return _run(heard[0], channel)
    except KeyboardInterrupt:
        return STOPPED


def _listen(channel: Channel, main_thread: int) -> None:
    """Hear the parent: its end is ours, at once, so that what is in hand goes back."""
    while channel.receive():
        loops.stopping.set()
        if not loops.has_item():
            signal.pthread_kill(main_thread, signal.SIGINT)
    os._exit(STOPPED)


def _run(setup: Message, channel: Channel) -> int:
    fields: dict[str, Any] = setup.fields
    sys.path[:] = fields["path"]
    sys.argv[:] = fields["argv"]
    try:
        function = wrappers.as_looping(functions.find(functions.Reference(**fields["function"])))
        door = Door(utils.options_of(fields["port"], seed=parse_address(fields["server"])), bytes(setup.blobs[0]),
                    lambda trouble: channel.send(Message("server", {"trouble": None if trouble is None else str(trouble)})))
        door.open(utils.FOREVER_S)
        queues = [RawQueue(door, name) for name in fields["queues"]]
    except ClusterError as error:
        channel.send(Message("refused", {"text": str(error)}))
        return REFUSED
    except Exception as error:  # of the user's module; whoever started this tells of it
        traceback.print_exc()
        channel.send(Message("refused", {"text": f"{fields['name']} cannot be loaded ({type(error).__name__}: {error}): see above"}))
        return REFUSED
    try:
        function(*queues)
    except ClusterError as error:
        channel.send(Message("refused", {"text": f"{fields['name']}: {error}"}))
        return REFUSED
    except Exception:  # the function's own; the process is over, and its parent says so
        traceback.print_exc()
        return RAISED
    return 0
