"""`doctor`: why nodes do not see each other. It looks at this machine and listens for a few seconds, and says what it found.

It alone decides which findings are troubles and what to try for each. It refuses to be a node: it never answers the question by which
others learn that a program lives, so that it counts in nobody's election or founding. And it speaks only when it has heard nobody who would
take its key amiss: a node that is about to found its cluster founds none once it has heard another key.
"""

from __future__ import annotations

import platform
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import p2pcluster
from p2pcluster import config
from p2pcluster.config import Address, Options
from p2pcluster.core import protocol
from p2pcluster.core.datagram import Beacon, Gate, Heard, Reason, Refused, State
from p2pcluster.core.handshake import derive_key, key_id
from p2pcluster.errors import HomeError
from p2pcluster.home import Home, Keyfile, read_address
from p2pcluster.lan import Interface, Lan, LanStatistics, Seeds

QUIET_S = config.BEACON_INTERVAL_LEADERLESS_S * 1.2  # who has no leader beacons once in this time, unasked
LISTEN_S = 3.0
SPEAK_EACH_S = 0.5
LOOK_S = 0.02
DIAL_S = 1.0
CLOCK_OFF_S = 0.5

# Part of every day, or counted in another way: nobody has to do anything about them.
_HARMLESS = (Reason.OWN, Reason.UNPROVEN, Reason.REPEATED, Reason.ELSEWHERE)
_OTHER_KEYS = (Reason.OTHER_KEY, Reason.NO_KEY)


@dataclass(frozen=True, slots=True)
class HeardNode:
    """A node that has proven that it lives and has this key."""

    node_id: str
    host: str
    beacon: Beacon

    @property
    def address(self) -> Address:
        return Address(self.beacon.tcp_host or self.host, self.beacon.tcp_port)


@dataclass(slots=True)
class Findings:
    """What was looked at. An `_error` is one sentence, or "" where all is well."""

    cluster: str
    home: str
    bind: str
    port: int
    key_file: str
    key_id: str = ""  # "" without a key
    key_error: str = ""
    home_node: Address | None = None  # what the node of this home wrote
    home_in_use: bool = False
    home_error: str = ""
    udp_error: str = ""
    tcp_error: str = ""
    interfaces: list[Interface] = field(default_factory=list)
    traffic: LanStatistics | None = None
    nodes: list[HeardNode] = field(default_factory=list)
    refused: dict[Reason, int] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)  # hosts that are heard and do not answer
    notes: list[str] = field(default_factory=list)  # of the gate and the network, with what to do
    seeds: dict[Address, str] = field(default_factory=dict)  # each with why it cannot be reached, or ""
    spoke: bool = False
    clock_off_s: float = 0.0


# ---- what it means


def report(found: Findings) -> list[str]:
    """The findings as lines, what to do about them behind."""
    lines = [
        f"p2pcluster {p2pcluster.__version__} (protocol {protocol.VERSION}), Python {platform.python_version()} on {platform.system()}",
        f"clock: {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; it and the steady clock differ by {abs(found.clock_off_s) * 1000:.0f} ms after "
        f"{LISTEN_S:g} s",
        f"cluster: {found.cluster}",
        f"home: {found.home}; {_home_line(found)}",
        f"key: {found.key_file}; {_key_line(found)}",
        f"bind: {found.bind}",
        f"UDP port {found.port}: {found.udp_error or 'can be shared'}",
        f"TCP port {found.port}: {_tcp_line(found)}",
    ]
    lines += [f"interface {way.name}: {way.address}, broadcast to {way.broadcast}: {way.error or f'{way.sent} sent'}" for way in found.interfaces]
    if found.traffic is not None:
        lines.append(f"broadcasts: {found.traffic.broadcasts} sent, {found.refused.get(Reason.OWN, 0)} of them heard here; "
                     f"{found.traffic.heard_shared + found.traffic.heard_own} datagrams heard in all")
    lines += [f"seed {seed}: {error or 'takes TCP connections'}" for seed, error in found.seeds.items()]
    lines += [f"heard: {_node_line(node, found)}" for node in found.nodes] or ["heard: no node of this cluster and key"]
    lines += [f"refused: {count} {'datagram' if count == 1 else 'datagrams'}, {reason.value}" for reason, count in found.refused.items()
              if reason not in _HARMLESS]
    lines += [f"trouble: {text}" for text in troubles(found)]
    return lines + [f"hint: {text}" for text in hints(found)]


def exit_code(found: Findings) -> int:
    """0 when a node of the cluster was heard, or nothing is wrong."""
    return 0 if found.nodes or not troubles(found) else 1


def troubles(found: Findings) -> list[str]:
    """What keeps a node here from others, each with what to do."""
    texts = [text for text in (found.key_error, found.home_error, found.udp_error) if text]
    texts += [note for note in found.notes if note not in texts]
    if abs(found.clock_off_s) > CLOCK_OFF_S:
        texts.append(f"this machine's clock was set by {found.clock_off_s:+.1f} s meanwhile: look at what sets it")
    if found.home_in_use and not found.udp_error and not any(node.address.port == _port_of(found.home_node) for node in found.nodes):
        texts.append(f"the node of this home was not heard: is it started with the same --port and --bind as this ({found.port}, {found.bind})?")
    if found.spoke and found.traffic is not None and found.traffic.sent and not found.refused.get(Reason.OWN):
        texts.append(f"this machine does not hear its own broadcasts: {_firewall(found)}")
    texts += [f"{host} is heard and does not answer: {_firewall(found)}, on both machines" for host in found.unanswered]
    texts += [f"seed {seed} cannot be reached by TCP ({error}): start a node there, look at the port, and {_firewall(found)} there"
              for seed, error in found.seeds.items() if error]
    return texts


def hints(found: Findings) -> list[str]:
    """What to try when nobody, or only this machine, is heard; and what differs among those that are."""
    texts = [f"{node.beacon.name} runs p2pcluster {node.beacon.package}, here is {p2pcluster.__version__}: install one version on all"
             for node in found.nodes if node.beacon.package != p2pcluster.__version__]
    texts += [f"{node.beacon.name} runs Python {node.beacon.python}, here is {platform.python_version()}: a project's modules must fit both"
              for node in found.nodes if _minor(node.beacon.python) != _minor(platform.python_version())]
    if not found.spoke and any(reason in found.refused for reason in _OTHER_KEYS):
        texts.append("nothing was broadcast from here, as that would hold up the nodes with another key or none: bring the key, and ask again")
    own = {way.address for way in found.interfaces} | {config.BIND_LOOPBACK}
    if any(node.host not in own for node in found.nodes) or any(reason not in _HARMLESS for reason in found.refused):
        return texts  # the network carries what it should
    texts.append("no other machine was heard" if found.nodes else "no node was heard: is one started, with this --cluster and --port?")
    if found.bind == config.BIND_LOOPBACK:
        texts.append("--bind 127.0.0.1 keeps to this machine: leave it out on every machine to hear others")
        return texts
    if found.interfaces and all(way.address == config.BIND_LOOPBACK for way in found.interfaces):
        texts.append("no interface of this machine is up and can broadcast: look at the cable, the Wi-Fi or the VPN, or name a node with --seed")
    texts.append(f"where a firewall is, {_firewall(found)}, on every machine")
    texts.append("Wi-Fi that keeps its guests apart, clouds, Docker and most VPNs carry no broadcast: name a node with --seed HOST:PORT, and in "
                 "Docker use the host's network or publish the port for UDP and TCP")
    if sys.platform == "darwin":
        texts.append("on macOS allow the terminal in System Settings, Privacy & Security, Local Network")
    return texts


def _firewall(found: Findings) -> str:
    return f"let UDP and TCP port {found.port} through the firewall"


def _home_line(found: Findings) -> str:
    if found.home_in_use:
        return f"a node runs there, at {found.home_node}" if found.home_node else "a node starts there"
    if found.home_error:
        return "it cannot be used"
    return f"no node runs there; one at {found.home_node} was killed" if found.home_node else "no node runs there"


def _key_line(found: Findings) -> str:
    if found.key_error:
        return "it cannot be used"
    return f"its id is {found.key_id}" if found.key_id else "there is none yet; the first node makes one"


def _tcp_line(found: Findings) -> str:
    if not found.tcp_error:
        return "free"
    holder = next((node for node in found.nodes if node.address.port == found.port and _is_here(node, found)), None)
    if holder is not None:
        return f"held by node {holder.beacon.name}"
    if found.home_in_use and _port_of(found.home_node) == found.port:
        return "held by the node of this home"
    return f"{found.tcp_error}; a node here takes a free one, which others learn by discovery, and --seed must name that"


def _is_here(node: HeardNode, found: Findings) -> bool:
    return node.host in {way.address for way in found.interfaces} | {config.BIND_LOOPBACK}


def _node_line(node: HeardNode, found: Findings) -> str:
    said = node.beacon
    names = {other.node_id: other.beacon.name for other in found.nodes}
    if said.leader_id is None:
        led = "without a leader"
    elif said.leader_id == node.node_id:
        led = f"leads, term {said.term}"
    else:
        led = f"led by {names.get(said.leader_id, said.leader_id)}" + (f" at {said.leader_address}" if said.leader_address else "")
    here = " (the node of this home)" if found.home_in_use and _is_here(node, found) and node.address.port == _port_of(found.home_node) else ""
    return (f"{said.name} at {node.address}{here}: cluster {found.cluster} ({said.cluster_id or 'not founded'}), {said.state.value}, {led}; the key "
            f"fits; p2pcluster {said.package}, Python {said.python}")


def _port_of(address: Address | None) -> int | None:
    return None if address is None else address.port


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


# ---- looking


def look(options: Options) -> Findings:
    """Examine this machine and listen."""
    home = Path(options.home) if options.home else config.default_home(Path.home(), options.cluster, socket.gethostname())
    keyfile = Keyfile(options.authkey_file) if options.authkey_file else Keyfile.default(options.cluster)
    found = Findings(options.cluster, str(home.expanduser()), options.bind, options.port, str(keyfile.path))
    _look_at_home(home.expanduser(), found)
    key = None
    try:
        secret = keyfile.read()
        key = None if secret is None else derive_key(secret)
    except HomeError as error:
        found.key_error = str(error)
    found.key_id = "" if key is None else key_id(key)
    found.tcp_error = _tcp_error(options)
    seeds = Seeds(options.seed)
    try:
        with Lan(options.bind, options.port) as lan:
            _Listening(options, key, lan, seeds, found).run()
    except HomeError as error:
        found.udp_error = str(error)
    finally:
        seeds.close()
    found.seeds = {seed: _dial_error(seed, options) for seed in options.seed}
    return found


def _look_at_home(home: Path, found: Findings) -> None:
    """Whether a node holds it, or could. One that is not there yet is not made for this."""
    if not (home / "lock").exists():
        return
    try:
        address = read_address(home)
        found.home_node = None if address is None else Address(address.host, address.port)
        Home.open(home).close()
    except HomeError as error:
        found.home_in_use = " is in use by " in str(error)
        found.home_error = "" if found.home_in_use else str(error)


def _tcp_error(options: Options) -> str:
    try:
        socket.create_server((options.bind, options.port)).close()
    except OSError as error:
        return f"held by another program, or not to be had ({error.strerror})"
    return ""


def _dial_error(seed: Address, options: Options) -> str:
    try:
        where = Address(str(socket.getaddrinfo(seed.host, seed.port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]), seed.port)
        if options.loopback and not where.host.startswith("127."):
            return f"--bind {options.bind} keeps everything on this machine"
        socket.create_connection(where, DIAL_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class _Listening:
    """A few seconds on the cluster's port."""

    def __init__(self, options: Options, key: bytes | None, lan: Lan, seeds: Seeds, found: Findings) -> None:
        self._lan = lan
        self._seeds = seeds
        self._found = found
        self._gate = Gate(key, options.cluster, secrets.token_hex(8), secrets.token_hex(8), secrets.token_bytes(32), protocol.VERSION)
        self._me = Beacon(
            name="doctor", state=State.JOINING, cluster_id=None, generation=0, term=0, leader_id=None, leader_address=None, last_index=0,
            last_term=0, commit_index=0, role="none", voters=0, members=0, has_work=False, expect=1, tcp_host=None, tcp_port=options.port,
            udp_port=lan.own_port, interval_ms=1, package=p2pcluster.__version__, python=platform.python_version(),
        )
        self._nodes: dict[str, HeardNode] = {}
        self._unproven: set[str] = set()

    def run(self) -> None:
        start_s, wall_s = time.monotonic(), time.time()
        speak_s = start_s + QUIET_S
        with selectors.DefaultSelector() as selector:
            for sock in self._lan.sockets():
                selector.register(sock, selectors.EVENT_READ)
            while (now_s := time.monotonic()) < start_s + LISTEN_S:
                self._hear(round(now_s * 1000))
                if now_s >= speak_s and not any(reason in self._gate.refused_counts for reason in _OTHER_KEYS):
                    speak_s = now_s + SPEAK_EACH_S
                    self._speak()
                selector.select(LOOK_S)
        found = self._found
        found.clock_off_s = (time.time() - wall_s) - (time.monotonic() - start_s)
        found.interfaces, found.traffic = self._lan.interfaces(), self._lan.statistics()
        found.nodes = sorted(self._nodes.values(), key=lambda node: node.beacon.name)
        found.refused = dict(self._gate.refused_counts)
        found.unanswered = sorted(self._unproven - {node.host for node in found.nodes}) if found.spoke else []
        found.notes = [*self._gate.take_notes(), *self._lan.take_notes()]

    def _hear(self, now_ms: int) -> None:
        """Takes in what came. Of what the gate would send only its own questions go out, and no answer: see the module."""
        # Before anything is opened: a question that is due would else be among the answers to what is opened.
        for data, where in self._gate.repeat_questions(self._me, now_ms):
            self._found.spoke = True
            if where is None:
                self._lan.broadcast(data)
            else:
                self._lan.send(data, where)
        for data, address in self._lan.receive():
            heard = self._gate.open(data, address, self._me, now_ms)
            if isinstance(heard, Heard) and isinstance(heard.body, Beacon):
                self._nodes[heard.node_id] = HeardNode(heard.node_id, heard.address.host, heard.body)
            elif isinstance(heard, Refused) and heard.reason is Reason.UNPROVEN:
                self._unproven.add(address.host)

    def _speak(self) -> None:
        self._found.spoke = True
        self._lan.broadcast(self._gate.seal(self._me, broadcast=True))
        for seed in self._seeds.addresses():
            self._lan.send(self._gate.seal(self._me), seed)


def run(options: Options, out: Callable[[str], None]) -> int:
    """The verb; returns its exit code."""
    found = look(options)
    for line in report(found):
        out(line)
    return exit_code(found)
