"""Network namespaces of a test's own, joined by a bridge: hosts with addresses, real UDP broadcast between them, cables to pull.

A second bridge hangs at the first one by a cable: hosts that are moved there are cut off together. What goes to a host can also be lost by protocol.

No interface of the machine is part of it, and nothing leaves it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 20.0
PROTOCOLS = {"tcp": 6, "udp": 17}
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


class Host:
    """A program in a namespace, told what to do by lines."""

    def __init__(self, namespace: str, script: str, *arguments: str) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", script, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0
        )
        self.lines: list[str] = []
        self._cut = b""

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def wait_for(self, begin: str) -> str:
        """The next line that begins so."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + WAIT_S
        while True:
            for place, line in enumerate(self.lines):
                if line.startswith(begin):
                    return self.lines.pop(place)
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"no line {begin!r} among {self.lines}"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"the program ended; it said {self.lines}"
            *whole, self._cut = (self._cut + data).split(b"\n")
            self.lines += [line.decode() for line in whole]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Switch:
    """Namespaces of this test's own, joined by a bridge in one more: no interface of the machine is part of it."""

    def __init__(self) -> None:
        self.prefix = f"p2pt{os.getpid()}n{next(_numbers)}"
        self.namespaces: list[str] = []
        self.programs: list[Host] = []
        self.bridge = self._namespace("sw")
        self.run("link", "add", "br0", "type", "bridge", "mcast_snooping", "0", inside=self.bridge)
        self.run("link", "set", "br0", "up", inside=self.bridge)
        self._away: set[str] = set()
        self._losing: set[str] = set()

    def host(self, name: str, *addresses: str) -> str:
        """A namespace with an interface at the bridge for each address."""
        namespace = self._namespace(name)
        self.run("link", "set", "lo", "up", inside=namespace)
        for number, address in enumerate(addresses):
            far = f"{name}{number}"
            peer = ("peer", "name", far, "netns", self.bridge)
            self.run("link", "add", f"eth{number}", "type", "veth", *peer, inside=namespace)
            self.run("link", "set", far, "master", "br0", "up", inside=self.bridge)
            self.run("addr", "add", address, "brd", "+", "dev", f"eth{number}", inside=namespace)
            self.run("link", "set", f"eth{number}", "up", inside=namespace)
        return namespace

    # ---- faults; a host is named as in `host`, and has one interface

    def pull(self, name: str) -> None:
        """Pull the host's cable."""
        self.run("link", "set", f"{name}0", "down", inside=self.bridge)

    def plug(self, name: str) -> None:
        self.run("link", "set", f"{name}0", "up", inside=self.bridge)

    def split(self, away: Iterable[str]) -> None:
        """Move these hosts to the second bridge, and pull the one cable between the two."""
        if not self._away:
            self.run("link", "add", "br1", "type", "bridge", "mcast_snooping", "0", inside=self.bridge)
            self.run("link", "add", "up0", "type", "veth", "peer", "name", "down0", inside=self.bridge)
            for link, bridge in (("up0", "br0"), ("down0", "br1")):
                self.run("link", "set", link, "master", bridge, "up", inside=self.bridge)
            self.run("link", "set", "br1", "up", inside=self.bridge)
        self.run("link", "set", "up0", "down", inside=self.bridge)
        self._away = set(away)
        for name in self._away:
            self.run("link", "set", f"{name}0", "master", "br1", inside=self.bridge)

    def join(self) -> None:
        """Put the cable between the two bridges back, over which everything goes from then on."""
        self.run("link", "set", "up0", "up", inside=self.bridge)

    def unite(self) -> None:
        """All hosts at the first bridge, as in the beginning."""
        for name in self._away:
            self.run("link", "set", f"{name}0", "master", "br0", inside=self.bridge)
        if self._away:
            self.run("link", "del", "up0", inside=self.bridge)
            self.run("link", "del", "br1", inside=self.bridge)
        self._away = set()

    def lose(self, protocol: str, to: str, senders: Iterable[str] = ("0.0.0.0/0",)) -> None:
        """What these addresses send to the host by a protocol is lost without a word."""
        link = f"{to}0"
        self.lose_nothing(to)
        self._losing.add(to)
        self._tc("qdisc", "add", "dev", link, "root", "handle", "1:", "htb")  # what no filter names goes straight through
        self._tc("class", "add", "dev", link, "parent", "1:", "classid", "1:1", "htb", "rate", "1mbit")
        self._tc("qdisc", "add", "dev", link, "parent", "1:1", "blackhole")
        for sender in senders:
            match = ("match", "ip", "protocol", str(PROTOCOLS[protocol]), "0xff", "match", "ip", "src", sender)
            self._tc("filter", "add", "dev", link, "parent", "1:", "protocol", "ip", "u32", *match, "flowid", "1:1")

    def lose_nothing(self, *names: str) -> None:
        """To these hosts, or to any, everything comes again."""
        for name in names or tuple(self._losing):
            if name in self._losing:
                self._tc("qdisc", "del", "dev", f"{name}0", "root")
                self._losing.discard(name)

    def _tc(self, *words: str) -> None:
        subprocess.run(["tc", "-n", self.bridge, *words], check=True, capture_output=True, text=True)

    # ---- programs

    def start(self, namespace: str, script: str, *arguments: str) -> Host:
        program = Host(namespace, script, *arguments)
        self.programs.append(program)
        program.wait_for("ready")
        return program

    def run(self, *words: str, inside: str | None = None) -> None:
        where = [] if inside is None else ["-n", inside]
        subprocess.run(["ip", *where, *words], check=True, capture_output=True, text=True)

    def close(self) -> None:
        for program in self.programs:
            program.close()
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)

    def _namespace(self, name: str) -> str:
        namespace = f"{self.prefix}-{name}"
        self.run("netns", "add", namespace)
        self.namespaces.append(namespace)
        return namespace


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """What this thread opens meanwhile is opened in the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{namespace}") as other:
        assert libc.setns(other.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(own.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def namespaces_can_be_made() -> bool:
    """Whether the tests between hosts can run. Where the kernel would let them and only a tool is missing, CI may not pass without them."""
    possible = _can_make_one()
    if not possible and os.environ.get("CI") == "true" and sys.platform == "linux" and shutil.which("unshare"):
        alone = subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode == 0
        assert not alone, "this machine can make network namespaces and has no ip command: install iproute2"
    return possible


def _can_make_one() -> bool:
    if sys.platform != "linux" or shutil.which("ip") is None:
        return False
    name = f"p2pt{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True).returncode == 0
