"""What the older API's servers and clients agree on: the cluster of a port, its key, the names inside it, and how trouble is told.

Decided here: an authkey, however weak, is stretched before it is a cluster's key; a program of the older API ends with one line where it
cannot go on, and with `Stopped` on Ctrl-C.
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from p2pcluster.config import Address, Options, resolve_options
from p2pcluster.errors import ClusterError, WrongUsage

PIPELINE = "classic"
READER = "clients"  # what reads the queues, in the manifest's words
ASKED = "classic.asked"  # where a client asks what to run ...
ANSWERS = "classic.answers"  # ... and where it reads it
CONNECT_S = 60.0  # how long a client waits for its server's first word
FOREVER_S = 1e6  # what waits for a server to come back, waits for this; about as much as the system's calls take
KEY_CHARACTERS_STRONG = 16
STOPPED = 128 + signal.SIGINT  # the exit code of what Ctrl-C has ended
SCRYPT_N = 1 << 14  # with r=8 a guess costs 16 MiB and some 50 ms
FROM_ENVIRONMENT = ("BIND", "ADVERTISE", "TAG", "SLOTS", "VERBOSE")  # home, key, port and cluster are the program's own

P = ParamSpec("P")
R = TypeVar("R")


class Stopped(SystemExit, KeyboardInterrupt):
    """Ctrl-C, once everything has ended in order: caught as `KeyboardInterrupt`, and without a traceback where nobody catches it."""


def cluster_name(port: int) -> str:
    """The cluster of all that use a port."""
    return f"classic-{port}"


def stretched(authkey: bytes | str, port: int) -> bytes:
    """The cluster's key, as one line of text. Raises `WrongUsage` for an authkey that is none."""
    key = authkey.encode() if isinstance(authkey, str) else authkey
    if not isinstance(key, bytes) or not key:
        raise WrongUsage(f"authkey is {authkey!r:.40} but must be bytes, at least one: take those of secrets.token_bytes(32)")
    salt = f"p2pcluster {cluster_name(port)}".encode()
    return hashlib.scrypt(key, salt=salt, n=SCRYPT_N, r=8, p=1, maxmem=64 << 20).hex().encode()


def warn_of_weak_key(authkey: bytes | str) -> None:
    """Say so, on standard error, where a key can be guessed."""
    if len(authkey) < KEY_CHARACTERS_STRONG:
        say(f"this authkey has {len(authkey)} characters: whoever guesses it runs code on every machine; take {KEY_CHARACTERS_STRONG} or "
            "more, by chance, as python -c 'import secrets; print(secrets.token_hex(16))' makes it")


def options_of(port: int, home: str | os.PathLike[str] | None = None, seed: Address | None = None) -> Options:
    """A node's or client's options; of the environment only what is not the program's own to say. Raises `WrongUsage`."""
    if not isinstance(port, int) or isinstance(port, bool):
        raise WrongUsage(f"port is {port!r:.40} but must be a number from 1 to 65535")
    environ = {name: value for name, value in os.environ.items() if name.removeprefix("P2PCLUSTER_") in FROM_ENVIRONMENT}
    flags = {"cluster": cluster_name(port), "port": port, "home": None if home is None else os.fspath(home),
             "seed": None if seed is None else [str(seed)]}
    return resolve_options(flags, environ, {})


def say(text: str) -> None:
    """A line for people, beside what the program prints."""
    print(f"p2pcluster: {text}", file=sys.stderr, flush=True)


def parked(options: Options) -> str:
    """That something is, and where to look."""
    return f"parked: python -m p2pcluster parked --cluster {options.cluster}"


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Whoever stops a program in order, a system that goes down too, is answered like a person; where signals come to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_one_line(call: Callable[P, R]) -> Callable[P, R]:
    """What the package raises on purpose ends the program with a line; its cause is the error, for a program that catches `SystemExit`."""

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except ClusterError as error:
            say(str(error))
            raise SystemExit(error.exit_code) from error
        except KeyboardInterrupt:  # also while a server is waited for
            raise Stopped(STOPPED) from None

    return called


def names_of(names: Any) -> list[str]:
    """Queue names as they were given, in a list or as one. Raises `WrongUsage`."""
    if not isinstance(names, (str, list, tuple, set, frozenset, dict)):
        raise WrongUsage(f"queues are {names!r:.60} but must be a list of names")
    found = [names] if isinstance(names, str) else list(names)
    for name in found:
        if not isinstance(name, str) or not name or "/" in name or not name.isprintable() or len(name) > 100 or name in (ASKED, ANSWERS):
            raise WrongUsage(f"{name!r:.60} cannot name a queue: take 1 to 100 printable characters without '/'")
    return found
