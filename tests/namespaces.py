"""Network namespaces of a test's own, joined by a bridge: hosts with addresses, real UDP broadcast between them, a cable to pull.

No interface of the machine is part of it, and nothing leaves it.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 20.0


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
        self.prefix = f"p2pt{os.getpid()}"
        self.namespaces: list[str] = []
        self.programs: list[Host] = []
        self.bridge = self._namespace("sw")
        self.run("link", "add", "br0", "type", "bridge", "mcast_snooping", "0", inside=self.bridge)
        self.run("link", "set", "br0", "up", inside=self.bridge)

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
