"""Every setting with its unit, its default and the reason, and how a node's options are found.

This file alone decides the numbers: one that two modules must agree on stands here and nowhere else, derived from its
parents where it has any, and `validate` asserts the relations that safety or a promise rests on. It refuses to know the
environment: flags, variables, the project's table, the user's folder and the host's name are all arguments.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from p2pcluster.errors import WrongUsage

KIB = 1024
MIB = 1024 * KIB

# --- Values and messages --------------------------------------------------------------------------------------------
VALUE_BYTES_MAX = 16 * MIB  # each voter's journal holds it; larger things belong in a file that the value names
BUNDLE_BYTES_MAX = 64 * MIB  # a project's zip: code and small data; without a limit a stray .git or data set is shipped
BUNDLE_PART_BYTES = 256 * KIB  # one log entry each: short enough that queue operations get between two of them
UPLOAD_S = 600.0  # parts of a project that nobody goes on with are kept for so long: a deployment that was cut off begins anew
BUNDLE_PARTS_IN_FLIGHT = 4  # 1 MiB on its way keeps a LAN busy without filling the log's window
BUNDLE_VERSIONS_KEPT = 2  # the current one and the one that a roll-back returns to
OUTPUT_PART_BYTES = 1 * MIB  # outputs of one item beyond this go ahead in parts, so that no frame holds all of them
BULK_SLICE_BYTES = 256 * KIB  # snapshots, bundles and logs; one slice takes 20 ms at 100 Mbit/s
COMMIT_BYTES_MAX = 32 * MIB  # a group commit closes here: twice the largest value, so one never waits for room
FRAME_BYTES_MAX = 64 * MIB  # a group commit and the message around it; a longer frame is not p2pcluster, or an attack
REQUEST_BYTES_MAX = 24 * MIB  # what a client says at once: with the quarter of a group commit that may stand before it, one entry
DATAGRAM_BYTES_MAX = 1200  # below every path MTU in use (IPv6's 1280 less headers): a beacon is never fragmented
PREAUTH_BYTES_MAX = 4 * KIB  # what a stranger may make a node hold, for each connection...
PREAUTH_TOTAL_BYTES_MAX = 16 * PREAUTH_BYTES_MAX  # ...and for all of them together
PREAUTH_S = 2.0  # ...and for how long: two round trips of a bad network

# --- Queues and deliveries ------------------------------------------------------------------------------------------
QUEUE_ITEMS_MAX = 10_000  # bounded by default: a slow stage holds its sources back rather than filling disks
QUEUE_BYTES_MAX = 64 * MIB  # the same bound where items are large; room for four of the largest values
RETRIES = 3  # four deliveries: one hiccup, one restart and one machine's death do not park an item
BACKOFF_S = 1.0  # before the second delivery; doubles with each further one
BACKOFF_MAX_S = 60.0  # an outage that ends is noticed within a minute
BATCH_WAIT_S = 0.05  # a batch that does not fill goes out after this; below what a person notices
KEY_HASH_BYTES = 16  # a 128-bit hash of `key=`: no collision to be expected among 10^15 keys
KEY_RETENTION_S = 24 * 3600  # a queue fed from outside forgets keys after a day: a client's retries are over by then
KEYS_FORGOTTEN_S = 600  # old keys are forgotten so much together: one command for many
PRODUCER_RETENTION_S = KEY_RETENTION_S  # the same for the sequence numbers of a client's connection
QUEUE_NAME_BYTES_MAX = 200  # a name appears in every message about the queue

# --- Work for stage processes ---------------------------------------------------------------------------------------
WORK_TARGET_US = 8_000  # what a piece of work should take: long beside a message (50 us), short beside what is noticed
WORK_ITEMS_MAX = 4096  # of one piece of work, however short the function
WORK_BYTES_MAX = 1 * MIB  # of one piece of work, unless a single value is larger
GRANT_BYTES_MAX = FRAME_BYTES_MAX // 2  # of the items in one message to a node or a client, unless a single one is larger
WORK_QUEUED_US_MAX = 200_000  # a slower function gets its next item when it asks: nothing waits behind a long one
SHARED_US_MAX = 1_000_000  # a function slower than this gets no item set aside on its machine either
TIMEOUT_GRACE_S = 2.0  # an item among several that is not ended in time by its own process takes the process along after this
PARTS_IN_FLIGHT = 4  # of one item: the next ones are made while these are written
OUTPUT_PART_ITEMS = 65_536  # values of one part, however small they are
RECALL_AFTER_S = 0.1  # an item that runs this long gives up what waits behind it in its process
SOURCE_BATCHES_IN_FLIGHT = 4  # of a source: the next ones are filled while these are written
SOURCE_FLUSH_S = 0.002  # a value waits this long at most for company
RESTART_BACKOFF_S = 0.1  # before a process is started again that died twice without finishing anything; doubles...
RESTART_BACKOFF_MAX_S = 30.0  # ...up to this
DOUBLINGS_MAX = 64  # of any back-off: all are at their limit long before, and the 1024th power of 2.0 is an error
ROLL_OUT_WATCHED_S = 0.5  # a process of a new version that has worked, or been there for so long, has started
ROLL_OUT_CRASHES = 2  # of one that has not, in a row: one may be chance, and a version is not taken back for that
TROUBLE_FORGOTTEN_S = 300.0  # a node where a stage did not start, and others run it, is tried again after this
ON_DONE_TRIES = 4  # an `on_done` that keeps failing is given up with an alarm, so that a run can end
LOG_RING_LINES = 2000  # of each stage on each machine, in memory: what `logs` shows at once...
LOG_RING_BYTES = 256 * KIB  # ...and at most so many bytes, at most a stage, so that forty of them hold 10 MB
LOG_LINES_PER_S_MAX = 20_000  # of each stage: what it prints beyond is counted and not kept
LOG_BYTES_PER_S_MAX = 4 * MIB  # the same in bytes
LOG_WRITE_BYTES = 64 * KIB  # what waits to be written is, when it is so much...
LOG_WRITE_S = 0.5  # ...or as old as this: a node that is killed takes no more than that with it
LOG_FILE_BYTES = 4 * MIB  # of a stage's file, which then becomes the one before: eight, with that
LOGS_BYTES_MAX = 128 * MIB  # of all such files of a node: the oldest go first
LOG_ANSWER_BYTES_MAX = 1 * MIB  # of one machine's answer...
LOG_ANSWERS_BYTES_MAX = FRAME_BYTES_MAX // 2  # ...and of all of them together, which go to a client in one message
LOG_GATHER_S = 2.0  # a machine that has not answered by then is said to be away
LOG_POLL_S = 0.5  # how often `logs -f` asks
STDERR_LINES_KEPT = 20  # of each process, for the record of an item that it died with
HELD_PUTS_MAX = 100  # of one client, for want of room in their queues: whoever waits for answers has one...
HELD_BYTES_MAX = 64 * MIB  # ...and what these may hold of the leader's memory
WAITS_MAX = 100  # of one client, for runs to be done
PARKED_ITEMS_MAX = 200  # of one answer about parked items: each may bring a traceback and those lines, 60 KB in all
RATE_BURST_S = 0.1  # of a rate may come at once: some looks at the clock, and what whoever the rate is to spare can bear
TAKE_RECORD_DELAY_MS = 50  # a lease's record waits this long for another command to ride with

# --- The journal ----------------------------------------------------------------------------------------------------
CHECKPOINT_INTERVAL_S = 1.0  # what a restart must replay at most, in time...
CHECKPOINT_DIRTY_MAX = 2000  # ...and in changed chunks: about 20 ms of table writes
COMMIT_INDEX_IDLE_S = 0.05  # a commit index that no later entry carries is written by itself after this
CHUNK_ITEMS_TARGET = 4096  # compaction joins small chunks up to this: a million items are then 250 rows
CHUNK_BYTES_TARGET = 1 * MIB  # or up to this: a row that is read back in a few milliseconds
COMPACTION_SLICE_S = 0.02  # the loop is never held longer: a fifth of a heartbeat interval
BODY_MEMORY_BYTES_MAX = 128 * MIB  # bodies held in memory; a million ready items must fit in 300 MB with all else
WAL_BYTES_MAX = 128 * MIB  # a checkpoint is forced here: it is scanned at start, at more than 100 MB/s
LOG_BYTES_MAX = 256 * MIB  # beyond this, chunks that hold old entries back get their bytes copied to rows of their own
SQLITE_CACHE_BYTES = 8 * MIB  # a checkpoint's pages fit, so that SQLite need not spill; an idle node stays under 60 MB
BALLAST_BYTES = 8 * MIB  # given back when the disk is full, so that compaction has room to work in

# --- Consensus: raft, section 5.6: broadcast << election timeout << time between failures ---------------------------
HEARTBEAT_INTERVAL_MS = 100  # a node may be out of the processor for several of these without an election
LEASE_MS = 5 * HEARTBEAT_INTERVAL_MS  # check-quorum: a leader that heard no majority for this long stops serving
ELECTION_TIMEOUT_MS_MIN = 7 * HEARTBEAT_INTERVAL_MS  # the shortest silence that starts an election
ELECTION_TIMEOUT_MS_MAX = 11 * HEARTBEAT_INTERVAL_MS  # a spread of four intervals: two candidates seldom start together
SILENT_FAILOVER_MS = 1500  # promised: from a machine's silence to the next committed `done`
TICK_MS = 20  # the clock of the core; timeouts are accurate to this
SESSION_TIMEOUT_MS = 2000  # a node's leases outlive a failover, so that a new leader does not hand out what still runs
CLOCK_GAP_MS = LEASE_MS // 2  # a gap between two ticks above this (sleep, a stopped process) voids the leader's lease
PROMOTE_STABLE_S = 3.0  # a learner is promoted after this long caught up: a flapping machine gets no vote
APPEND_BYTES_MAX = 1 * MIB  # entries of one append, unless a single one is larger: heartbeats get between two of them
APPENDS_IN_FLIGHT = 8  # for each follower: covers a round trip at the rates aimed at

# --- Discovery and founding -----------------------------------------------------------------------------------------
PORT = 47400  # UDP and TCP; where TCP finds it taken (Linux gives it to outgoing connections too) any free port will do
FOUNDING_WINDOW_MS = 2000  # a fresh node listens this long before it founds a cluster
FOUNDING_WINDOW_LOOPBACK_MS = 300  # on one machine nothing is lost or late
BEACONS_PER_FOUNDING_WINDOW = 6  # five in a row may be lost
BEACON_INTERVAL_LEADERLESS_S = 1.0  # while there is no leader, who is there matters
BEACON_INTERVAL_S_MIN = 5.0  # with a leader a beacon only finds newcomers, who are answered at once
BEACON_INTERVAL_S_MAX = 2 * BEACON_INTERVAL_S_MIN  # jittered in between: nodes started together drift apart
CONNECT_TIMEOUT_S = 10.0  # `connect` and the verbs: an election and a founding window fit several times

# --- Starting and ending --------------------------------------------------------------------------------------------
MANIFEST_S = 60  # to import a project and see what it holds: large libraries take some seconds
PLACEMENT_S = 20  # to import a project and call its placement; the default plan holds meanwhile, so nobody waits for it
PLACEMENT_AGAIN_S = 60.0  # until a placement that failed is asked again: what it lacks takes a person
PLACEMENT_BYTES_MAX = 1 * MIB  # of its answer: some thousand nodes and stages
DRAIN_S = 10.0  # what runs may finish after the first signal; init systems kill after this or more
DONE_ACKNOWLEDGED_S = 10.0  # how long a leader waits, at the end of `--until-done`, for nodes to learn of it

# --- The key --------------------------------------------------------------------------------------------------------
KEY_RANDOM_BYTES = 32  # of chance, written as hex: as much as HMAC-SHA256 can use
KEY_FILE_BYTES_MAX = 4 * KIB  # a larger file is something else that was named by mistake

# --- Names and options ----------------------------------------------------------------------------------------------
CLUSTER = "default"
BIND_ANY = "0.0.0.0"  # a socket bound to one interface's address hears no broadcast
BIND_LOOPBACK = "127.0.0.1"
EXPECT = 1  # found alone
SLOTS_MAX = 4096  # of one node: each is looked at when processes are planned
HOME_FOLDER = ".p2pcluster"  # in the user's folder: keys, and homes by cluster and host
KEY_FILE = "authkey"
NAME_CHARACTERS_MAX = 64
ENVIRONMENT_PREFIX = "P2PCLUSTER_"
PROJECT_TABLE = "[tool.p2pcluster]"
PROJECT_KEYS = ("pipeline", "python", "exclude")  # of the table, but about the project and not about a node


def validate() -> None:
    """Assert what the numbers must be to each other. Called at a node's start and by a test."""
    assert VALUE_BYTES_MAX < COMMIT_BYTES_MAX, "the largest value fits in a group commit with others"
    assert VALUE_BYTES_MAX <= GRANT_BYTES_MAX < FRAME_BYTES_MAX, "any value can be handed out, in a frame that is not full"
    assert COMMIT_BYTES_MAX + MIB <= FRAME_BYTES_MAX, "a group commit and its headers fit in one frame"
    assert VALUE_BYTES_MAX + MIB < REQUEST_BYTES_MAX <= COMMIT_BYTES_MAX * 3 // 4, "any value can be put, and its entry replicated"
    assert REQUEST_BYTES_MAX <= HELD_BYTES_MAX, "any single put may wait for room"
    assert VALUE_BYTES_MAX <= QUEUE_BYTES_MAX, "the largest value fits in an empty queue"
    assert VALUE_BYTES_MAX <= BODY_MEMORY_BYTES_MAX, "the largest value fits in memory's budget"
    assert OUTPUT_PART_BYTES <= VALUE_BYTES_MAX, "a part is no larger than what a queue must take anyway"
    assert FRAME_BYTES_MAX < WAL_BYTES_MAX, "one frame's entries do not force a checkpoint by themselves"
    assert QUEUE_BYTES_MAX < LOG_BYTES_MAX, "one full queue does not force its bytes to be copied"
    assert WAL_BYTES_MAX < LOG_BYTES_MAX, "checkpoints come before compaction"
    assert BUNDLE_PART_BYTES * BUNDLE_PARTS_IN_FLIGHT <= COMMIT_BYTES_MAX, "a bundle leaves room in each commit"
    assert BUNDLE_PART_BYTES <= APPEND_BYTES_MAX, "a part is an entry like others"
    assert PREAUTH_BYTES_MAX <= PREAUTH_TOTAL_BYTES_MAX < FRAME_BYTES_MAX, "strangers cost less than members"
    assert BACKOFF_S <= BACKOFF_MAX_S, "back-off grows"
    assert COMPACTION_SLICE_S * 1000 * 2 < HEARTBEAT_INTERVAL_MS, "compaction delays no heartbeat"
    assert COMMIT_INDEX_IDLE_S < CHECKPOINT_INTERVAL_S, "the commit index is on disk before the tables need it"
    assert 2 * TICK_MS < HEARTBEAT_INTERVAL_MS, "a heartbeat is some ticks away"
    assert 3 * HEARTBEAT_INTERVAL_MS <= LEASE_MS, "two lost heartbeats do not end a lease"
    assert LEASE_MS + 2 * TICK_MS < ELECTION_TIMEOUT_MS_MIN, "an old leader stops before a new one can serve"
    assert ELECTION_TIMEOUT_MS_MIN < ELECTION_TIMEOUT_MS_MAX, "candidates differ"
    assert ELECTION_TIMEOUT_MS_MAX + 2 * HEARTBEAT_INTERVAL_MS < SILENT_FAILOVER_MS, "an election fits in the promise"
    assert SILENT_FAILOVER_MS < SESSION_TIMEOUT_MS, "sessions outlive a failover"
    assert CLOCK_GAP_MS < LEASE_MS, "a leader that slept notices before it serves"
    assert SESSION_TIMEOUT_MS < PROMOTE_STABLE_S * 1000, "a member whose session just ended is not promoted"
    assert 2 * FOUNDING_WINDOW_MS < CONNECT_TIMEOUT_S * 1000, "a client that comes with the first node finds it"
    assert FOUNDING_WINDOW_LOOPBACK_MS / BEACONS_PER_FOUNDING_WINDOW >= 2 * TICK_MS, "each beacon has a tick of its own"
    assert BEACON_INTERVAL_LEADERLESS_S < BEACON_INTERVAL_S_MIN, "beacons are rarer with a leader"
    assert PLACEMENT_S < PLACEMENT_AGAIN_S, "one call of a placement is over when the next begins"
    assert 1024 <= PORT < 49152, "a registered port: no privilege needed, and not one of those meant for short use"
    assert KEY_RANDOM_BYTES * 2 + 2 <= KEY_FILE_BYTES_MAX, "a key of our own can be read back"


class Address(NamedTuple):
    """A host name or address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Options:
    """What a node was asked to be; each field is a flag, a `P2PCLUSTER_...` variable and a key of the table."""

    cluster: str = CLUSTER
    home: str | None = None  # None: `default_home`
    authkey_file: str | None = None  # None: `default_authkey_file`
    bind: str = BIND_ANY
    advertise: str | None = None  # None: the address that the peer sees
    port: int = PORT
    seed: tuple[Address, ...] = ()
    tag: tuple[str, ...] = ()
    slots: int | None = None  # None: the machine's cores
    expect: int = EXPECT
    page: Address | None = None
    verbose: bool = False

    @property
    def loopback(self) -> bool:
        """Whether no packet may leave this machine."""
        return ipaddress.ip_address(self.bind).is_loopback


OPTION_NAMES = tuple(field.name for field in fields(Options))


def resolve_options(flags: Mapping[str, Any], environ: Mapping[str, str], pyproject: Mapping[str, Any]) -> Options:
    """The options of a node: a flag wins over its variable, that over the project's table, that over the default.

    `flags` maps option names to what was typed, None where nothing was; `environ` is the environment; `pyproject` is
    the whole parsed file. A list (seed, tag) is replaced by the higher place, never joined. Raises `WrongUsage` that
    names the place of a bad value.
    """
    unknown_flags = set(flags) - set(OPTION_NAMES)
    assert not unknown_flags, f"flags that are no options: {unknown_flags}"
    table = project_table(pyproject)
    return Options(**{name: value for name in OPTION_NAMES for value in _found(name, flags, environ, table)})


def project_table(pyproject: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `[tool.p2pcluster]`, written with `_`; raises `WrongUsage` for a key that means nothing."""
    tool = pyproject.get("tool", {})
    table = tool.get("p2pcluster", {}) if isinstance(tool, Mapping) else tool
    if not isinstance(table, Mapping):
        raise WrongUsage(f"{PROJECT_TABLE} in pyproject.toml is no table; write its keys below a line {PROJECT_TABLE}")
    known = (*OPTION_NAMES, *PROJECT_KEYS)
    result: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise WrongUsage(f"{PROJECT_TABLE} has no key {key!r}; {_nearest(name, known)}")
        if name in result:
            raise WrongUsage(f"{PROJECT_TABLE} names {name!r} twice, with - and with _; keep one")
        result[name] = value
    return result


def default_home(user_home: str | Path, cluster: str, host: str) -> Path:
    """The folder of this host's node: by host, because a user's folder may be shared between machines."""
    folder = re.sub(r"[^A-Za-z0-9._-]", "-", host).lstrip(".")
    if folder in ("", KEY_FILE):
        folder = "host" + folder
    return Path(user_home) / HOME_FOLDER / cluster / folder


def default_authkey_file(user_home: str | Path, cluster: str) -> Path:
    """The cluster's key: outside any home, so that all nodes of a user on a machine share it."""
    return Path(user_home) / HOME_FOLDER / cluster / KEY_FILE


def parse_address(text: str) -> Address:
    """`HOST:PORT`, or `[ADDRESS]:PORT` for IPv6. Raises `ValueError` whose text completes "must be ..."."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/@]+)):([0-9]{1,5})", text.strip())
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError("HOST:PORT, with a port from 1 to 65535")
    return Address(match[1] or match[2], int(match[3]))


def _found(
    name: str, flags: Mapping[str, Any], environ: Mapping[str, str], table: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The checked value from the highest place that has one, or nothing."""
    variable = ENVIRONMENT_PREFIX + name.upper()
    if flags.get(name) is not None:
        return (_checked(name, flags[name], "--" + name.replace("_", "-")),)
    if environ.get(variable, "").strip():
        return (_checked(name, environ[variable], variable),)
    if name in table:
        return (_checked(name, table[name], f"{PROJECT_TABLE} {name}"),)
    return ()


def _checked(name: str, value: Any, place: str) -> Any:
    try:
        return _PARSERS[name](value)
    except ValueError as error:
        raise WrongUsage(f"{place} is {_short(value)} but must be {error}") from error


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(sorted(known))}"


def _name(value: Any) -> str:
    """A name that is also a folder's, on every system."""
    pattern = rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{NAME_CHARACTERS_MAX - 1}}}"
    if not isinstance(value, str) or not re.fullmatch(pattern, value) or value.endswith("."):
        raise ValueError(f"a name of at most {NAME_CHARACTERS_MAX} letters, digits, '.', '_' or '-', such as lab-2")
    return value


def _tag(value: str) -> str:
    if not re.fullmatch(rf"[^\s,\x00-\x1f\x7f]{{1,{NAME_CHARACTERS_MAX}}}", value):
        raise ValueError(f"tags of 1 to {NAME_CHARACTERS_MAX} characters without blanks and commas, such as gpu")
    return value


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("a path")
    return value


def _ip_address(value: Any) -> str:
    if value == "localhost":
        return BIND_LOOPBACK
    try:
        return str(ipaddress.IPv4Address(value if isinstance(value, str) else None))
    except ValueError as error:
        raise ValueError(f"an IPv4 address of this machine, such as {BIND_LOOPBACK}") from error


def _host(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^\s:/@\[\]]+", value):
        raise ValueError("an address or host name without a port (--port says it)")
    return value


def _integer(low: int, high: int, meaning: str) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{meaning} from {low} to {high}")
        return value

    return parse


def _page(value: Any) -> Address:
    """Where to serve the page: a port alone is this machine's, and port 0 is any that is free."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    host, _, port = text.strip().rpartition(":") if ":" in text else (BIND_LOOPBACK, "", text.strip())
    if not re.fullmatch("[0-9]{1,5}", port, re.ASCII):
        raise ValueError("HOST:PORT or PORT, where port 0 stands for any that is free")
    return parse_address(f"{host}:{port}") if int(port) else parse_address(f"{host}:1")._replace(port=0)


def _listed(parse: Callable[[str], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A list, or a text with commas between its parts; what comes twice counts once."""

    def parse_list(value: Any) -> tuple[Any, ...]:
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("a text, or a list of texts")
        texts = [text.strip() for part in parts for text in part.split(",")]
        return tuple(dict.fromkeys(parse(text) for text in texts if text))

    return parse_list


def _boolean(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, str):
        value = words.get(value.strip().lower())
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


_NODES_MAX = 10_000
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "cluster": _name,
    "home": _path,
    "authkey_file": _path,
    "bind": _ip_address,
    "advertise": _host,
    "port": _integer(1, 65535, "a port"),
    "seed": _listed(parse_address),
    "tag": _listed(_tag),
    "slots": _integer(0, SLOTS_MAX, "a number of processes"),
    "expect": _integer(1, _NODES_MAX, "a number of nodes, itself counted,"),
    "page": _page,
    "verbose": _boolean,
}
assert tuple(_PARSERS) == OPTION_NAMES, "each option has its check"
