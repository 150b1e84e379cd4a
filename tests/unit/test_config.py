"""The numbers keep their relations, and a node's options come from the right place or are refused with its name."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from p2pcluster import config
from p2pcluster.config import Address, Options, resolve_options
from p2pcluster.errors import WrongUsage

# option: (as a flag, what it becomes), (as a variable, ...), (as a key of the table, ...): all different
PLACES: dict[str, tuple[tuple[Any, Any], tuple[str, Any], tuple[Any, Any]]] = {
    "cluster": (("lab", "lab"), ("lab-2", "lab-2"), ("lab_3.x", "lab_3.x")),
    "home": (("/a b", "/a b"), ("~/b", "~/b"), ("c", "c")),
    "authkey_file": (("/k", "/k"), ("~/k", "~/k"), ("k", "k")),
    "bind": (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("10.0.0.7", "10.0.0.7")),
    "advertise": (("10.0.0.7", "10.0.0.7"), ("node.example", "node.example"), ("n", "n")),
    "port": (("1", 1), (" 65535 ", 65535), (47401, 47401)),
    "seed": (
        (["a:1", "b:2"], (Address("a", 1), Address("b", 2))),
        ("c:3, d:4,c:3", (Address("c", 3), Address("d", 4))),
        (["[fe80::1%eth0]:5"], (Address("fe80::1%eth0", 5),)),
    ),
    "tag": ((["gpu", "gpu", "big"], ("gpu", "big")), ("ssd,", ("ssd",)), ("rack:7", ("rack:7",))),
    "slots": (("0", 0), ("16", 16), (8, 8)),
    "expect": ((3, 3), ("5", 5), (7, 7)),
    "page": (("h:8000", Address("h", 8000)), (" 0 ", Address("127.0.0.1", 0)), (8001, Address("127.0.0.1", 8001))),
    "verbose": ((True, True), ("no", False), (True, True)),
}

REFUSED: dict[str, list[Any]] = {
    "cluster": ["", "..", ".hidden", "a/b", "a b", "a" * 65, "a\n", "end.", 7],
    "home": ["", "a\0b", 7],
    "authkey_file": ["", True],
    "bind": ["", "127.0.0.1:80", "::1", "host", "1.2.3", 2130706433],
    "advertise": ["", "host:80", "a b", "me@host", 7],
    "port": ["", "0", "65536", "-1", "1.5", "0x10", "١", "abc", "9" * 5000, 0, True, 1.0, None],
    "seed": ["a", ["a:0"], "a:65536", ":1", "a:b", "a b:1", "http://a:1", "fe80::1:5", [["a", 1]], 7],
    "tag": ["a b", ["x" * 65], "a\0", {"a": 1}, [1]],
    "slots": ["-1", "4097", "many", True, 1.5],
    "expect": ["0", "10001", False],
    "page": ["", ":8000", "h:", "h:65536", "65536", -1, True, 1.5, "a b:1", "h:١"],
    "verbose": ["maybe", 1, ["true"]],
}


def in_table(**keys: Any) -> dict[str, Any]:
    return {"project": {"name": "x"}, "tool": {"other": {"seed": 1}, "p2pcluster": keys}}


def variable(name: str) -> str:
    return "P2PCLUSTER_" + name.upper()


def test_the_relations_between_the_numbers_hold() -> None:
    config.validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VALUE_BYTES_MAX", config.COMMIT_BYTES_MAX),
        ("COMMIT_BYTES_MAX", config.FRAME_BYTES_MAX),
        ("QUEUE_BYTES_MAX", config.VALUE_BYTES_MAX - 1),
        ("QUEUE_BYTES_MAX", config.LOG_BYTES_MAX),
        ("BODY_MEMORY_BYTES_MAX", config.VALUE_BYTES_MAX - 1),
        ("OUTPUT_PART_BYTES", config.VALUE_BYTES_MAX + 1),
        ("WAL_BYTES_MAX", config.FRAME_BYTES_MAX),
        ("LOG_BYTES_MAX", config.WAL_BYTES_MAX),
        ("BUNDLE_PARTS_IN_FLIGHT", 1000),
        ("BUNDLE_PART_BYTES", config.APPEND_BYTES_MAX + 1),
        ("PREAUTH_TOTAL_BYTES_MAX", config.PREAUTH_BYTES_MAX - 1),
        ("BACKOFF_MAX_S", 0.5),
        ("COMPACTION_SLICE_S", 0.05),
        ("COMMIT_INDEX_IDLE_S", 1.0),
        ("TICK_MS", 50),
        ("LEASE_MS", 200),
        ("LEASE_MS", config.ELECTION_TIMEOUT_MS_MIN),
        ("ELECTION_TIMEOUT_MS_MIN", config.ELECTION_TIMEOUT_MS_MAX),
        ("SILENT_FAILOVER_MS", config.ELECTION_TIMEOUT_MS_MAX),
        ("SESSION_TIMEOUT_MS", config.SILENT_FAILOVER_MS),
        ("CLOCK_GAP_MS", config.LEASE_MS),
        ("PROMOTE_STABLE_S", 2.0),
        ("CONNECT_TIMEOUT_S", 4.0),
        ("BEACONS_PER_FOUNDING_WINDOW", 10),
        ("BEACON_INTERVAL_LEADERLESS_S", config.BEACON_INTERVAL_S_MIN),
        ("PORT", 1023),
        ("KEY_RANDOM_BYTES", config.KEY_FILE_BYTES_MAX),
    ],
)
def test_a_number_that_breaks_a_relation_is_noticed(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, name, value)
    with pytest.raises(AssertionError):
        config.validate()


def test_every_number_is_set_once_and_says_its_reason() -> None:
    numbers, _, _ = Path(config.__file__).read_text().partition("# --- Names and options")
    _, _, numbers = numbers.partition("# --- ")
    settings = re.findall(r"^([A-Z_0-9]+) = .*?(  # .+)?$", numbers, flags=re.MULTILINE)
    names = [name for name, _ in settings]
    assert len(names) > 40
    assert len(names) == len(set(names))
    assert [name for name, reason in settings if not reason] == []


def test_the_defaults_are_those_of_a_node_alone_in_its_network() -> None:
    options = resolve_options({}, {}, {})
    assert options == Options()
    assert (options.cluster, options.bind, options.port, options.expect) == ("default", "0.0.0.0", 47400, 1)
    assert not options.loopback


def test_the_table_of_this_test_names_every_option() -> None:
    names = [field.name for field in fields(Options)]
    assert list(PLACES) == names
    assert list(REFUSED) == names


@pytest.mark.parametrize("name", PLACES)
def test_a_flag_wins_over_its_variable_and_that_over_the_project(name: str) -> None:
    (flag, from_flag), (text, from_variable), (key, from_table) = PLACES[name]
    environ, table = {variable(name): text}, in_table(**{name: key})
    assert getattr(resolve_options({name: flag}, environ, table), name) == from_flag
    assert getattr(resolve_options({name: None}, environ, table), name) == from_variable
    assert getattr(resolve_options({}, {"UNRELATED": "1"}, table), name) == from_table


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert resolve_options({}, {"P2PCLUSTER_PORT": " "}, in_table(port=47411)).port == 47411


def test_a_flag_that_is_false_or_zero_still_wins() -> None:
    options = resolve_options({"verbose": False, "slots": 0}, {"P2PCLUSTER_VERBOSE": "1", "P2PCLUSTER_SLOTS": "3"}, {})
    assert (options.verbose, options.slots) == (False, 0)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_a_bad_value_is_refused_in_one_line_that_names_its_place(name: str, value: Any) -> None:
    places: list[tuple[dict[str, Any], dict[str, str], dict[str, Any], str]] = []
    places.append(({}, {}, in_table(**{name: value}), f"[tool.p2pcluster] {name}"))
    if value is not None:
        places.append(({name: value}, {}, {}, "--" + name.replace("_", "-")))
    if isinstance(value, str) and value:
        places.append(({}, {variable(name): value}, {}, variable(name)))
    for flags, environ, table, place in places:
        with pytest.raises(WrongUsage) as caught:
            resolve_options(flags, environ, table)
        message = str(caught.value)
        assert message.startswith(f"{place} is ")
        assert " but must be " in message
        assert len(message.splitlines()) == 1
        assert len(message) < 250


def test_a_key_that_means_nothing_is_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(WrongUsage, match=r"\[tool\.p2pcluster\] has no key 'pipelin'; did you mean 'pipeline'\?"):
        resolve_options({}, {}, in_table(pipelin="x:y"))


def test_a_key_that_resembles_nothing_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(WrongUsage, match="it knows advertise, authkey_file, bind, .*verbose$"):
        resolve_options({}, {}, in_table(qqqq=1))


def test_the_projects_own_keys_are_not_a_nodes_options() -> None:
    options = resolve_options({}, {}, in_table(pipeline="a:b", python=">=3.11", exclude=["*.csv"]))
    assert options == Options()


def test_a_key_may_be_written_as_the_flag_is_but_once() -> None:
    assert resolve_options({}, {}, in_table(**{"authkey-file": "k"})).authkey_file == "k"
    with pytest.raises(WrongUsage, match="twice"):
        resolve_options({}, {}, in_table(**{"authkey-file": "k", "authkey_file": "l"}))


@pytest.mark.parametrize("pyproject", [{"tool": {"p2pcluster": 3}}, {"tool": 3}])
def test_a_project_file_without_tables_is_refused(pyproject: dict[str, Any]) -> None:
    with pytest.raises(WrongUsage, match="is no table"):
        resolve_options({}, {}, pyproject)


def test_a_flag_that_is_no_option_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        resolve_options({"prot": 1}, {}, {})


@pytest.mark.parametrize(("bind", "loopback"), [("127.0.0.1", True), ("127.1.2.3", True), ("10.0.0.1", False)])
def test_a_bind_address_on_loopback_is_known_as_one(bind: str, loopback: bool) -> None:
    assert resolve_options({"bind": bind}, {}, {}).loopback is loopback


def test_an_address_is_shown_as_it_is_written() -> None:
    assert [str(config.parse_address(text)) for text in ("host:1", "[::1]:2")] == ["host:1", "[::1]:2"]


@pytest.mark.parametrize(
    ("host", "folder"),
    [
        ("lab1.example", "lab1.example"),
        ("My Mac/2", "My-Mac-2"),
        ("..", "host"),
        ("", "host"),
        ("naïve", "na-ve"),
        ("authkey", "hostauthkey"),
    ],
)
def test_a_home_is_by_cluster_and_host_whatever_the_host_is_called(host: str, folder: str) -> None:
    assert config.default_home("/u", "lab", host) == Path("/u/.p2pcluster/lab") / folder


def test_the_key_lies_outside_every_home() -> None:
    key = config.default_authkey_file("/u", "lab")
    assert key == Path("/u/.p2pcluster/lab/authkey")
    assert not key.is_relative_to(config.default_home("/u", "lab", "h"))
