"""What holds for every project, every damaged bundle and every hostile zip.

1. What was packed is unpacked byte for byte, or was refused by name; harmless names are never refused.
2. A zip that is not the one that was packed is refused, or gives the very same files.
3. Whatever the bytes, nothing but `BundleRejected` is raised, and nothing appears except the destination, whole.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from p2pcluster.bundle import Bundle, Limits, changed_files, find_project, pack, unpack, version_of
from p2pcluster.errors import BundleRejected, ProjectError

deterministic = settings(deadline=None, derandomize=True, max_examples=60)

HOSTILE_PARTS = [
    *("..", ".", "...", ".. ", "a.", "a ", "A", "a", "C:", "c:x", "a\\b", "..\\x", "NUL", "aux.py", "com1 .t", "~"),
    *("caf\u00e9", "cafe\u0301", "stra\u00dfe", "STRASSE", "\u0130", "i\u0307", "\u212a", "k", "\u202e", "a\nb", "*?["),
    *("\udce9", "x" * 255, "\u00fc" * 127, "\u00fc" * 128, "%2e%2e", "$(x)", "a;b", "'", '"', " ", "-rf", "PK\x03\x04"),
]
parts = st.one_of(
    st.sampled_from(HOSTILE_PARTS),
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=8),
)
contents = st.tuples(st.binary(max_size=200), st.booleans())
hostile_trees = st.dictionaries(st.lists(parts, min_size=1, max_size=4).map("/".join), contents, max_size=6)

harmless_parts = st.from_regex(r"[a-z0-9_äñ語][a-z0-9_ äñ語.,+=-]{0,10}[a-z0-9]\.dat", fullmatch=True)
harmless_trees = st.dictionaries(st.lists(harmless_parts, min_size=1, max_size=4).map("/".join), contents, max_size=6)

# What is left out by default; not what these properties are about.
LEFT_OUT = [
    *(".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", "node_modules", ".tox", "*.egg-info", ".#*"),
    *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".DS_Store", ".p2pcluster"),
    *("journal.sqlite3*", "*.sqlite3-wal", "*.sqlite3-shm", "*.sqlite3-journal"),
]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is on the disk after a loss of power is not the matter here, and waiting for it most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def write_tree(folder: Path, files: Mapping[str, tuple[bytes, bool]]) -> bool:
    """Writes the files; false when the disk cannot hold two of these names at once."""
    folder.mkdir()
    for name, (content, executable) in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (OSError, UnicodeError):
            return False
        path.chmod(0o755 if executable else 0o644)
    return read_tree(folder) == dict(files)


def read_tree(folder: Path) -> dict[str, tuple[bytes, bool]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), bool(path.stat().st_mode & 0o100))
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def unpacked(zip_bytes: bytes) -> dict[str, tuple[bytes, bool]] | None:
    """The files of a zip under its own hash, None when it is refused; in both cases nothing else came to be."""
    with scratch() as root:
        destination = root / "home" / "version"
        try:
            unpack(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), destination, Limits(bytes_max=1_000_000))
        except BundleRejected as error:
            assert str(error).isprintable()
            assert read_tree(root) == {}
            assert not destination.exists()
            assert list(root.glob("home/*")) == []
            return None
        files = read_tree(destination)
        assert len(read_tree(root)) == len(files)
        assert os.listdir(root) == ["home"]
        assert os.listdir(root / "home") == ["version"]
        return files


class Packed(NamedTuple):
    files: dict[str, tuple[bytes, bool]]
    bundle: Bundle


def packed(files: Mapping[str, tuple[bytes, bool]]) -> Packed | None:
    """The files on a disk, packed; None when they are refused, in one line that says what to do."""
    with scratch() as root:
        assume(write_tree(root / "project", files))
        try:
            return Packed(dict(files), pack(root / "project"))
        except BundleRejected as error:
            assert str(error).isprintable()
            assert "rename" in str(error)
            return None


# --- 1. Round trips


@deterministic
@given(hostile_trees)
@example({"a/.. /b": (b"", False)})
@example({"caf\u00e9": (b"1", False), "cafe\u0301": (b"2", False)})
@example({"\u0130": (b"1", False), "i\u0307": (b"2", False)})
@example({"x" * 255: (b"1", False)})
@example({"PK\x03\x04": (b"PK\x05\x06" + bytes(18), True)})
def test_hostile_names_are_refused_or_survive_the_journey(files: dict[str, tuple[bytes, bool]]) -> None:
    assume(not any(fnmatchcase(part, out) for name in files for part in name.split("/") for out in LEFT_OUT))
    result = packed(files)
    if result is not None:
        assert unpacked(result.bundle.zip_bytes) == files
        assert set(result.bundle.files) == set(files)


@deterministic
@given(harmless_trees)
def test_harmless_names_always_survive_the_journey(files: dict[str, tuple[bytes, bool]]) -> None:
    folders = {name.rpartition("/")[0] for name in files}
    assume(not any(f"{folder}/".startswith(f"{name}/") for folder in folders for name in files))
    result = packed(files)
    assert result is not None
    assert unpacked(result.bundle.zip_bytes) == files


@deterministic
@given(harmless_trees, st.randoms(use_true_random=False))
def test_the_order_of_writing_and_the_place_change_nothing(
    files: dict[str, tuple[bytes, bool]], random: Random
) -> None:
    shuffled = list(files.items())
    random.shuffle(shuffled)
    first, second = packed(files), packed(dict(shuffled))
    assert first is not None and second is not None
    assert first.bundle == second.bundle


@deterministic
@given(harmless_trees, harmless_trees)
@example({"a": (b"", False)}, {"a": (b"", True)})
@example({"a": (b"1", False), "b": (b"2", False)}, {"a": (b"2", False), "b": (b"1", False)})
def test_two_projects_have_one_version_exactly_when_they_are_equal(
    one: dict[str, tuple[bytes, bool]], two: dict[str, tuple[bytes, bool]]
) -> None:
    first, second = packed(one), packed(two)
    assert first is not None and second is not None
    assert (first.bundle.version == second.bundle.version) == (one == two)
    assert (changed_files(first.bundle.files, second.bundle.files) == []) == (one == two)


names = st.sampled_from(["a", "b", "c/d", "e"])
listings = st.dictionaries(names, st.sampled_from(["1", "2", "2 x"]))


@deterministic
@given(listings, listings)
def test_changed_files_is_what_turns_the_old_names_into_the_new(old: dict[str, str], new: dict[str, str]) -> None:
    changes = changed_files(old, new)
    added, gone, edited = ({change[1:] for change in changes if change[0] == sign} for sign in "+-~")
    assert (set(old) - gone) | added == set(new)
    assert {name for name in set(old) & set(new) if old[name] != new[name]} == edited
    assert len(changes) == len(added) + len(gone) + len(edited)


@deterministic
@given(listings)
def test_the_version_is_a_function_of_names_and_hashes_alone(files: dict[str, str]) -> None:
    assert version_of(files) == version_of(dict(reversed(files.items())))


# --- 2. Damage

SAMPLE = {
    "data/ü.bin": (bytes(range(256)), False),
    "empty": (b"", False),
    "nested.zip": (b"PK\x05\x06" + bytes(18), False),
    "pipeline.py": (b"pipeline = 1\n" * 20, False),
    "run.sh": (b"#!/bin/sh\n", True),
}


@pytest.fixture(scope="module")
def sample() -> Bundle:
    with scratch() as root:
        assert write_tree(root / "project", SAMPLE)
        return pack(root / "project")


def test_the_undamaged_sample_is_unpacked(sample: Bundle) -> None:
    assert unpacked(sample.zip_bytes) == SAMPLE


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_every_flipped_byte_is_refused_or_changes_nothing(sample: Bundle, mask: int) -> None:
    refused = 0
    for position in range(len(sample.zip_bytes)):
        damaged = bytearray(sample.zip_bytes)
        damaged[position] ^= mask
        files = unpacked(bytes(damaged))
        assert files is None or files == SAMPLE, f"byte {position}"
        refused += files is None
    assert refused > len(sample.zip_bytes) / 2


def test_every_truncation_is_refused(sample: Bundle) -> None:
    for length in range(len(sample.zip_bytes)):
        assert unpacked(sample.zip_bytes[:length]) is None, f"{length} bytes"
        assert unpacked(sample.zip_bytes[length + 1 :]) is None, f"from byte {length + 1}"


@deterministic
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_under_the_announced_hash_every_damage_is_refused(sample: Bundle, position: int, mask: int) -> None:
    damaged = bytearray(sample.zip_bytes)
    damaged[position % len(damaged)] ^= mask
    with scratch() as root:
        with pytest.raises(BundleRejected):
            unpack(bytes(damaged), sample.zip_sha256, root / "version")
        assert os.listdir(root) == []


# --- 3. Hostile zips

tokens = st.sampled_from(
    [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"../", b"\0", b"\xff\xff\xff\xff", b"/", b"\\"]
)
splices_of_a_zip = st.lists(
    st.tuples(st.integers(min_value=0), st.integers(0, 8), st.one_of(tokens, st.binary(max_size=8))), max_size=6
)


@deterministic
@given(splices_of_a_zip)
def test_a_zip_that_is_cut_and_spliced_is_refused_or_whole(
    sample: Bundle, splices: list[tuple[int, int, bytes]]
) -> None:
    damaged = bytearray(sample.zip_bytes)
    for position, removed, inserted in splices:
        start = position % (len(damaged) + 1)
        damaged[start : start + removed] = inserted
    unpacked(bytes(damaged))


@deterministic
@given(st.lists(st.one_of(tokens, st.binary(max_size=40))).map(b"".join))
def test_arbitrary_bytes_are_refused_or_whole(garbage: bytes) -> None:
    unpacked(garbage)


LEADS_ELSEWHERE = [
    *("../", "/", "//", "a/../../", "C:/", "C:", "..\\", "\\", "a\\..\\..\\", "./", "a/./", "a//", ".. /"),
    *("a/.../", "nul/", "\0"),
]


class Hostile(NamedTuple):
    name: str
    mode: int


honest_entries = st.builds(Hostile, harmless_parts, st.sampled_from([0o100644, 0o100755]))
slip_names = st.tuples(st.sampled_from(LEADS_ELSEWHERE), harmless_parts).map("".join)
slips = st.builds(Hostile, slip_names, st.just(0o100644))
special_modes = st.sampled_from([0o120777, 0o040755, 0o010644, 0o020644, 0o060644, 0o104755])
special = st.builds(Hostile, harmless_parts, special_modes)
duplicates = st.builds(Hostile, st.sampled_from(["One", "one", "ONE", "one/x", "one."]), st.just(0o100644))


def hostile_zip(entries: list[Hostile], content: bytes = b"../../escaped") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry in entries:
            info = zipfile.ZipInfo("name")
            info.filename = entry.name  # set afterwards, for zipfile would tidy it up
            info.create_system = 3
            info.external_attr = entry.mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@deterministic
@given(st.lists(honest_entries, unique_by=lambda entry: entry.name, max_size=4))
def test_honest_entries_are_unpacked(entries: list[Hostile]) -> None:
    expected = {entry.name: (b"../../escaped", entry.mode == 0o100755) for entry in entries}
    assert unpacked(hostile_zip(entries)) == expected


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(deterministic, max_examples=300)
@given(
    st.lists(honest_entries, unique_by=lambda entry: entry.name, max_size=3),
    st.lists(st.one_of(slips, special), min_size=1, max_size=2) | st.lists(duplicates, min_size=2, max_size=3),
    st.randoms(use_true_random=False),
)
def test_one_hostile_entry_spoils_the_zip(honest: list[Hostile], hostile: list[Hostile], random: Random) -> None:
    entries = honest + hostile
    random.shuffle(entries)
    assert unpacked(hostile_zip(entries)) is None


@deterministic
@given(st.integers(1, 4), st.integers(0, 1_000_000))
def test_sizes_that_lie_are_refused(count: int, lie: int) -> None:
    content = bytes(100_000)
    assume(lie != len(content))
    zip_bytes = hostile_zip([Hostile(f"{number}", 0o100644) for number in range(count)], content)
    lying = zip_bytes.replace(len(content).to_bytes(4, "little"), lie.to_bytes(4, "little"))
    assert lying != zip_bytes
    assert unpacked(lying) is None


@deterministic
@given(st.integers(1, 5), st.integers(150_000, 1_200_000))
def test_a_bomb_is_refused_and_everything_below_the_limit_is_not(count: int, size: int) -> None:
    zip_bytes = hostile_zip([Hostile(f"{number}", 0o100644) for number in range(count)], bytes(size))
    assert (unpacked(zip_bytes) is None) == (count * size > 1_000_000)


# --- Finding a project


@deterministic
@given(
    st.one_of(
        st.text(max_size=40),
        st.text(max_size=20).map(lambda text: f"tool.p2pcluster.pipeline = {text!r}"),
        st.from_regex(r"tool\.p2pcluster\.(pipeline|exclude) = ('[a-z.:]{0,9}'|\[('[a-z]')?\]|1|\{\})", fullmatch=True),
    ),
    st.one_of(st.none(), st.text(max_size=12), st.from_regex(r"[a-z:./]{0,6}pipeline\.py[:a-z.]{0,3}", fullmatch=True)),
)
def test_a_project_is_found_or_not_or_an_error_of_one_line(toml: str, target: str | None) -> None:
    with scratch() as root:
        (root / "pipeline.py").write_text("raise SystemExit")
        (root / "pyproject.toml").write_bytes(toml.encode("utf-8", "surrogatepass"))
        try:
            project = find_project(target, root)
        except ProjectError as error:
            assert str(error).isprintable()
        else:
            assert project is None or project.module.replace(".", "").isidentifier()
