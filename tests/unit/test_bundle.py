"""What a bundle holds, what is refused on the way in and out, and where a project is found.

Every zip that is refused here differs in one point from `zip_of(Entry("a"))`, which is accepted.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pcluster import bundle
from p2pcluster.bundle import Bundle, Limits, Project, changed_files, find_project, pack, unpack, version_of
from p2pcluster.errors import BundleRejected, HomeError, ProjectError

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
needs_case = pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="this disk ignores case")
posix_only = pytest.mark.skipif(os.name != "posix", reason="this system has no such files")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "project"
    path.mkdir()
    return path


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A folder that another user can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """root can read everything; the tests about that which cannot be read are for somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def write(folder: Path, *names: str) -> None:
    """Writes files, each with its own name as its content."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def tree(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Every file below the folder: its content, and whether it is executable."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), bool(path.stat().st_mode & 0o100))
        for path in folder.rglob("*")
        if path.is_file()
    }


def names_in(packed: Bundle) -> set[str]:
    assert list(packed.files) == sorted(packed.files)
    return set(packed.files)


def refusal(folder: Path, **options: object) -> str:
    """The message with which `pack` refuses the folder."""
    with pytest.raises(BundleRejected) as caught:
        pack(folder, **options)  # type: ignore[arg-type]
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    message = str(error)
    assert message.isprintable(), "a message is one line"
    assert ": " in message, "a message says what to do next"
    return message


# --- Packing a folder that git does not know


def test_the_whole_tree_is_packed_data_files_and_all(folder: Path) -> None:
    write(folder, "pipeline.py", "package/__init__.py", "package/deep/er/module.py", "data/t.csv", ".env", "LICENSE")
    assert names_in(pack(folder)) == set(tree(folder))


def test_files_maps_each_name_to_the_hash_of_its_content(folder: Path) -> None:
    write(folder, "a/b.txt")
    assert pack(folder).files == {"a/b.txt": hashlib.sha256(b"a/b.txt").hexdigest()}


def test_any_zip_program_can_open_a_bundle(folder: Path) -> None:
    write(folder, "a.txt", "b/ü.txt")
    with zipfile.ZipFile(io.BytesIO(pack(folder).zip_bytes)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a.txt", "b/ü.txt"]


def test_a_folder_without_files_is_an_empty_bundle(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert pack(folder).files == {}


@pytest.mark.parametrize(
    "name",
    [
        *(".git/config", ".hg/store", ".svn/entries", "__pycache__/a.pyc", "old.pyc", ".venv/bin/python", "venv/x.cfg"),
        *("node_modules/x/index.js", ".pytest_cache/v", ".mypy_cache/m", ".hypothesis/e", ".tox/py", "p.egg-info/x"),
        *(".DS_Store", "db.sqlite3-wal", "db.sqlite3-shm", ".p2pcluster/default/authkey"),
    ],
)
@pytest.mark.parametrize("above", ["", "package/"])
def test_what_tools_leave_behind_is_not_packed(folder: Path, name: str, above: str) -> None:
    write(folder, "pipeline.py", above + name)
    assert names_in(pack(folder)) == {"pipeline.py"}


def test_what_only_resembles_such_a_name_is_packed(folder: Path) -> None:
    write(folder, "venv.py", "my_venv/a", "x.pyc.txt", "git/config", ".gitignore", "data.sqlite3")
    assert names_in(pack(folder)) == set(tree(folder))


def test_a_node_whose_home_lies_in_the_project_is_not_packed(folder: Path) -> None:
    write(folder, "pipeline.py", "home1/journal.sqlite3", "home1/out/squares/result.txt", "out/kept.txt")
    assert names_in(pack(folder)) == {"pipeline.py", "out/kept.txt"}


def test_a_project_that_is_itself_a_home_is_packed_without_the_journal(folder: Path) -> None:
    write(folder, "pipeline.py", "journal.sqlite3", "journal.sqlite3-wal")
    assert names_in(pack(folder)) == {"pipeline.py"}


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("data", {"a.py", "sub/b.csv"}),
        ("data/", {"a.py", "sub/b.csv"}),
        ("/data", {"a.py", "sub/b.csv", "sub/data/d.bin"}),
        ("./data/*", {"a.py", "sub/b.csv", "sub/data/d.bin"}),
        ("*.csv", {"a.py", "data/deep/c.bin", "sub/data/d.bin"}),
        ("data/*.bin", {"a.py", "data/b.csv", "sub/b.csv", "sub/data/d.bin"}),
        ("sub/data/d.bin", {"a.py", "data/b.csv", "data/deep/c.bin", "sub/b.csv"}),
        ("ata", {"a.py", "data/b.csv", "data/deep/c.bin", "sub/b.csv", "sub/data/d.bin"}),
        ("", {"a.py", "data/b.csv", "data/deep/c.bin", "sub/b.csv", "sub/data/d.bin"}),
    ],
)
def test_a_pattern_of_the_user_excludes(folder: Path, pattern: str, left: set[str]) -> None:
    write(folder, "a.py", "data/b.csv", "data/deep/c.bin", "sub/b.csv", "sub/data/d.bin")
    assert names_in(pack(folder, extra_excludes=[pattern])) == left


@posix_only
def test_sockets_and_pipes_are_passed_over(readable_by_all: Path) -> None:
    write(readable_by_all, "a.py")
    os.mkfifo(readable_by_all / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(readable_by_all / "socket"))
        assert names_in(pack(readable_by_all)) == {"a.py"}


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere")


@posix_only
def test_a_file_that_cannot_be_read_is_named(readable_by_all: Path) -> None:
    write(readable_by_all, "a.py", "secret.txt")
    (readable_by_all / "secret.txt").chmod(0)
    with an_ordinary_user():
        assert "secret.txt cannot be read" in refusal(readable_by_all)
        assert names_in(pack(readable_by_all, extra_excludes=["secret.txt"])) == {"a.py"}


@posix_only
def test_a_folder_that_cannot_be_read_is_named(readable_by_all: Path) -> None:
    write(readable_by_all, "a.py", "closed/b.py")
    (readable_by_all / "closed").chmod(0)
    with an_ordinary_user():
        assert "closed/ cannot be read" in refusal(readable_by_all)


def test_a_file_that_is_deleted_meanwhile_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "a.py", "b.py")
    monkeypatch.setattr(bundle, "_clash", lambda names: (folder / "b.py").unlink())
    assert names_in(pack(folder)) == {"a.py"}


def test_a_file_that_grows_meanwhile_is_counted_as_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "a.py", "log.txt")
    monkeypatch.setattr(bundle, "_clash", lambda names: (folder / "log.txt").write_bytes(bytes(5000)) and None)
    assert "log.txt" in refusal(folder, bytes_max=1000)


# --- Links


@posix_only
def test_a_link_to_a_file_is_packed_as_the_content_of_the_file(folder: Path) -> None:
    write(folder, "data/a.txt")
    (folder / "link.txt").symlink_to("data/a.txt")
    (folder / "absolute.txt").symlink_to(folder / "data/a.txt")
    assert len(set(pack(folder).files.values())) == 1
    assert names_in(pack(folder)) == {"data/a.txt", "link.txt", "absolute.txt"}


@posix_only
def test_a_link_to_a_folder_is_packed_as_the_files_of_that_folder(folder: Path) -> None:
    write(folder, "data/a.txt", "data/deep/b.txt", "data/skipped.pyc", "database/c.txt", "tests/data.txt")
    (folder / "tests/data").symlink_to("../data")
    assert names_in(pack(folder)) == {
        *("data/a.txt", "data/deep/b.txt", "database/c.txt"),
        *("tests/data.txt", "tests/data/a.txt", "tests/data/deep/b.txt"),
    }


@posix_only
def test_a_link_in_a_linked_folder_is_followed_too(folder: Path) -> None:
    write(folder, "a/one.txt")
    (folder / "b").mkdir()
    (folder / "b/to_a").symlink_to("../a")
    (folder / "c").symlink_to("b")
    assert names_in(pack(folder)) == {"a/one.txt", "b/to_a/one.txt", "c/to_a/one.txt"}


@posix_only
def test_a_project_that_is_reached_by_a_link_is_packed(folder: Path, tmp_path: Path) -> None:
    write(folder, "a.py")
    (folder / "b.py").symlink_to("a.py")
    (tmp_path / "link").symlink_to(folder)
    assert pack(tmp_path / "link").version == pack(folder).version


@posix_only
@pytest.mark.parametrize("target", ["../outside.txt", "/etc/hostname", "../", "sub/../../outside.txt", "../project2/x"])
def test_a_link_that_leaves_the_folder_is_refused_by_name(folder: Path, target: str) -> None:
    write(folder, "a.py", "sub/b.py", "../outside.txt", "../project2/x")
    (folder / "link").symlink_to(target)
    assert "link leads out of the project" in refusal(folder)
    assert names_in(pack(folder, extra_excludes=["link"])) == {"a.py", "sub/b.py"}


@posix_only
@pytest.mark.parametrize("target", ["missing.txt", "link", "a.py/b"])
def test_a_broken_link_is_refused_by_name(folder: Path, target: str) -> None:
    write(folder, "a.py")
    (folder / "link").symlink_to(target)
    assert "link is a broken link" in refusal(folder)


@posix_only
def test_the_broken_link_that_an_editor_leaves_is_passed_over(folder: Path) -> None:
    write(folder, "a.py")
    (folder / ".#a.py").symlink_to("me@machine.1234")
    assert names_in(pack(folder)) == {"a.py"}


@posix_only
@pytest.mark.parametrize("target", [".", "..", "../..", "../other"])
def test_a_link_to_a_folder_above_it_is_refused(folder: Path, target: str) -> None:
    write(folder, "sub/deep/a.py")
    (folder / "sub/deep/link").symlink_to(target)
    (folder / "sub/other").symlink_to("deep")
    assert "is a link to a folder that it lies in" in refusal(folder)


@posix_only
def test_links_that_multiply_the_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "entries_max", 1000)
    write(folder, "level0/a.txt")
    for level in range(1, 25):
        (folder / f"level{level}").mkdir()
        (folder / f"level{level}/left").symlink_to(f"../level{level - 1}")
        (folder / f"level{level}/right").symlink_to(f"../level{level - 1}")
    assert "more than 1000 files" in refusal(folder)


# --- Names


@posix_only
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a\\b.txt", "backslash"),
        ("C:a.txt", "drive"),
        ("sub/d:", "drive"),
        ("aux.py", "device"),
        ("NUL", "device"),
        ("com1 .txt", "device"),
        ("...", "dots"),
        ("sub/.. /x", "dots"),
        ("/".join(["d"] * 65), "deeper"),
    ],
)
def test_a_name_that_not_every_disk_can_hold_is_refused(folder: Path, name: str, fault: str) -> None:
    write(folder, name)
    message = refusal(folder)
    assert fault in message
    assert name in message


@posix_only
def test_a_name_that_is_not_utf8_is_refused_in_a_printable_line(folder: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9\n.txt")).write_text("")
    except OSError:
        pytest.skip("this disk refuses such names itself")
    assert "is not valid UTF-8" in refusal(folder)


@posix_only
@pytest.mark.parametrize(
    "name", ["a b.txt", "-rf", "'\"$(x)`.txt", "new\nline", "ab:c... d", "日本語/ü.txt", "~", "con_.py", "*"]
)
def test_a_name_that_is_merely_strange_is_packed(folder: Path, tmp_path: Path, name: str) -> None:
    write(folder, name)
    packed = pack(folder)
    unpack(packed.zip_bytes, packed.zip_sha256, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(folder)


@needs_case
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("read.txt", "READ.txt"),
        ("data/x", "Data/y"),
        ("a/data/x", "a/DATA"),
        ("stra\u00dfe", "strasse"),
        ("caf\u00e9", "cafe\u0301"),
        ("name", "name."),
        ("name", "name /x"),
    ],
)
def test_two_names_that_are_one_on_another_disk_are_refused(folder: Path, first: str, second: str) -> None:
    write(folder, first, second)
    assert "are one name" in refusal(folder)


# --- Sizes


def test_a_project_over_the_limit_names_the_ten_largest_files(folder: Path) -> None:
    for number in range(12):
        write(folder, f"data/{number:02}.bin")
        os.truncate(folder / f"data/{number:02}.bin", (number + 1) * 1024 * 1024)
    message = refusal(folder, bytes_max=64 * 1024 * 1024)
    assert re.findall(r"data/(\d+).bin", message) == ["11", "10", "09", "08", "07", "06", "05", "04", "03", "02"]
    assert "78.0 MiB in 12 files" in message
    assert "64.0 MiB" in message
    assert "data/11.bin 12.0 MiB" in message
    assert ".gitignore" in message and "[tool.p2pcluster] exclude" in message


def test_the_limit_itself_is_allowed(folder: Path) -> None:
    write(folder, "1234567890")
    assert names_in(pack(folder, bytes_max=10)) == {"1234567890"}
    assert "1234567890" in refusal(folder, bytes_max=9)


@posix_only
def test_sizes_are_checked_before_any_file_is_read(readable_by_all: Path) -> None:
    write(readable_by_all, "a_secret", "large")
    (readable_by_all / "a_secret").chmod(0)
    os.truncate(readable_by_all / "large", 1 << 40)
    with an_ordinary_user():
        assert "1048576.0 MiB" in refusal(readable_by_all)


def test_a_tree_with_too_many_files_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "entries_max", 5)
    write(folder, "a.py", *(f"data/{number}" for number in range(5)))
    assert "data (5)" in refusal(folder)
    assert len(pack(folder, extra_excludes=["a.py"]).files) == 5


@posix_only
def test_files_are_counted_before_any_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "entries_max", 5)
    write(folder, *(f"data/{number}" for number in range(6)))
    (folder / "broken").symlink_to("missing")
    assert "data (6)" in refusal(folder)


# --- Versions


def test_the_version_of_a_known_project_is_the_same_for_ever(folder: Path) -> None:
    write(folder, "pipeline.py", "data/ü.txt")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    assert pack(folder).version == "634730d4f945516bcd6cb7533a714e490be1d8f09f8c9a1b426f5a2a1786cd7e"


def test_equal_content_is_an_equal_bundle_wherever_and_whenever_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "one", "a.py", "sub/b.py")
    write(tmp_path / "two", "sub/b.py", "a.py")
    os.utime(tmp_path / "two/a.py", (1, 1))
    (tmp_path / "two/a.py").chmod(0o600)
    (tmp_path / "two/empty").mkdir()
    assert pack(tmp_path / "one") == pack(tmp_path / "two")


def test_the_version_does_not_depend_on_the_zip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.txt").write_text("abc" * 10_000 + "cab" * 10_000)
    first = pack(folder)
    monkeypatch.setattr(bundle, "_COMPRESSION_LEVEL", 1)
    second = pack(folder)
    assert first.zip_sha256 != second.zip_sha256
    assert first.version == second.version == version_of(second.files)


@pytest.mark.parametrize("change", ["content", "name", "executable", "more", "less", "swapped"])
def test_every_change_is_another_version(folder: Path, change: str) -> None:
    write(folder, "a.py", "b.py")
    before = pack(folder)
    if change == "content":
        (folder / "a.py").write_text("a.pY")
    elif change == "name":
        (folder / "a.py").rename(folder / "c.py")
    elif change == "executable":
        (folder / "a.py").chmod(0o755)
    elif change == "more":
        write(folder, "c.py")
    elif change == "less":
        (folder / "a.py").unlink()
    else:
        (folder / "a.py").write_text("b.py")
        (folder / "b.py").write_text("a.py")
    after = pack(folder)
    assert before.version != after.version
    assert before.zip_sha256 == hashlib.sha256(before.zip_bytes).hexdigest()
    assert changed_files(before.files, after.files) != []


def test_changed_files_tells_new_gone_and_changed_apart() -> None:
    old = {"same": "1", "gone": "2", "edited": "3"}
    new = {"same": "1", "edited": "4", "b\nnew": "5"}
    assert changed_files(old, new) == ["+'b\\nnew'", "~edited", "-gone"]


# --- Packing a git checkout


def git(folder: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *who, *arguments], cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture
def checkout(folder: Path) -> Path:
    git(folder, "init")
    return folder


@needs_git
def test_in_a_checkout_tracked_and_untracked_files_are_packed_and_ignored_ones_not(checkout: Path) -> None:
    write(checkout, "tracked.py", "data/untracked.csv", "big/ignored.bin", "package/noise.log", "package/kept.py")
    (checkout / ".gitignore").write_text("big/\n*.log\n")
    git(checkout, "add", "tracked.py")
    packed = pack(checkout)
    assert names_in(packed) == {".gitignore", "tracked.py", "data/untracked.csv", "package/kept.py"}
    assert packed.notes == ()


@needs_git
def test_in_a_checkout_the_contents_are_those_of_the_working_tree(checkout: Path) -> None:
    write(checkout, "edited.py", "deleted.py", "moved/away.py")
    git(checkout, "add", ".")
    (checkout / "edited.py").write_text("new")
    (checkout / "deleted.py").unlink()
    shutil.rmtree(checkout / "moved")
    assert pack(checkout).files == {"edited.py": hashlib.sha256(b"new").hexdigest()}


@needs_git
def test_a_file_that_is_tracked_although_it_is_ignored_is_packed(checkout: Path) -> None:
    write(checkout, "keep.log", "drop.log")
    (checkout / ".gitignore").write_text("*.log\n")
    git(checkout, "add", "-f", "keep.log")
    assert names_in(pack(checkout)) == {".gitignore", "keep.log"}


@needs_git
def test_a_folder_of_a_checkout_is_packed_alone_by_the_rules_of_the_whole(checkout: Path) -> None:
    write(checkout, "outside.py", "jobs/nightly/pipeline.py", "jobs/nightly/x.log", "jobs/nightly/new.py")
    (checkout / ".gitignore").write_text("*.log\n")
    git(checkout, "add", "jobs/nightly/pipeline.py")
    assert names_in(pack(checkout / "jobs/nightly")) == {"pipeline.py", "new.py"}


@needs_git
@posix_only
def test_names_that_git_would_quote_are_packed(checkout: Path) -> None:
    write(checkout, "ü.py", 'quote".py', "new\nline", "tab\there", " space ", "-dash")
    git(checkout, "add", "ü.py", "new\nline")
    assert names_in(pack(checkout)) == {name for name in tree(checkout) if not name.startswith(".git/")}


@needs_git
def test_the_default_excludes_hold_for_what_nobody_committed(checkout: Path) -> None:
    write(checkout, "a.py", "__pycache__/a.pyc", "venv/lib/x.py", "home1/journal.sqlite3", "home1/out/x")
    write(checkout, "fixtures/venv/kept.py", "fixtures/old/journal.sqlite3")
    git(checkout, "add", "fixtures")
    assert names_in(pack(checkout)) == {"a.py", "fixtures/venv/kept.py", "fixtures/old/journal.sqlite3"}


@needs_git
def test_the_users_patterns_hold_for_tracked_files_too(checkout: Path) -> None:
    write(checkout, "a.py", "data/x.bin")
    git(checkout, "add", ".")
    assert names_in(pack(checkout, extra_excludes=["data"])) == {"a.py"}


@needs_git
def test_a_submodule_is_packed_by_its_own_rules(checkout: Path) -> None:
    write(checkout, "a.py", "vendor/sub/b.py", "vendor/sub/noise.log")
    (checkout / "vendor/sub/.gitignore").write_text("*.log\n")
    git(checkout / "vendor/sub", "init")
    git(checkout / "vendor/sub", "add", ".")
    git(checkout / "vendor/sub", "commit", "-m", "first")
    git(checkout, "add", "a.py", "vendor/sub")
    write(checkout, "vendor/sub/c.py")
    assert names_in(pack(checkout)) == {"a.py", "vendor/sub/.gitignore", "vendor/sub/b.py", "vendor/sub/c.py"}
    shutil.rmtree(checkout / "vendor/sub")
    assert names_in(pack(checkout)) == {"a.py"}, "a submodule that is not checked out has no files"
    (checkout / "vendor/sub").mkdir()
    assert names_in(pack(checkout)) == {"a.py"}, "nor has an empty one, in which git answers for the outer repository"


@needs_git
def test_a_repository_inside_the_repository_is_packed(checkout: Path) -> None:
    write(checkout, "a.py", "other/b.py", "other/.hidden/c.py")
    git(checkout / "other", "init")
    git(checkout / "other", "add", "b.py")
    git(checkout / "other", "commit", "-m", "first")
    assert names_in(pack(checkout)) == {"a.py", "other/b.py", "other/.hidden/c.py"}


@needs_git
def test_a_project_in_a_folder_that_git_ignores_is_packed_whole_and_says_so(checkout: Path) -> None:
    write(checkout, "work/pipeline.py", "work/data.bin")
    (checkout / ".gitignore").write_text("*\n")
    packed = pack(checkout / "work")
    assert names_in(packed) == {"pipeline.py", "data.bin"}
    assert len(packed.notes) == 1 and packed.notes[0].isprintable()


@needs_git
@posix_only
@pytest.mark.parametrize("script", [None, "exit 128", "kill -9 $$", "echo half; exit 1"])
def test_without_a_git_that_works_the_folder_is_walked(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    write(checkout, "a.py", "x.log", "__pycache__/a.pyc")
    (checkout / ".gitignore").write_text("*.log\n")
    (tmp_path / "bin").mkdir()
    if script:
        (tmp_path / "bin/git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    packed = pack(checkout)
    assert names_in(packed) == {".gitignore", "a.py", "x.log"}
    assert len(packed.notes) == 1


def test_a_folder_that_no_git_knows_is_packed_without_a_note(folder: Path) -> None:
    write(folder, "a.py")
    assert pack(folder).notes == ()


@needs_git
def test_a_hook_of_another_repository_does_not_mislead(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(checkout, "a.py", "x.log", "kept.log")
    (checkout / ".gitignore").write_text("*.log\n")
    git(checkout, "add", "-f", "kept.log")
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other/index"))
    assert names_in(pack(checkout)) == {".gitignore", "a.py", "kept.log"}


@needs_git
@posix_only
def test_a_tracked_file_that_became_a_folder_and_a_folder_that_became_a_link(checkout: Path) -> None:
    write(checkout, "was_file", "was_folder/a.py", "new_home/a.py")
    git(checkout, "add", "was_file", "was_folder")
    (checkout / "was_file").unlink()
    write(checkout, "was_file/inner.py")
    shutil.rmtree(checkout / "was_folder")
    (checkout / "was_folder").symlink_to("new_home")
    assert names_in(pack(checkout)) == {"was_file/inner.py", "new_home/a.py", "was_folder/a.py"}


@needs_git
@posix_only
def test_a_tracked_folder_that_became_a_link_out_of_the_project_is_refused(checkout: Path) -> None:
    write(checkout, "data/a.csv", "../elsewhere/a.csv")
    git(checkout, "add", "data")
    shutil.rmtree(checkout / "data")
    (checkout / "data").symlink_to("../elsewhere")
    assert "leads out of the project" in refusal(checkout)


@needs_git
@posix_only
def test_a_link_to_a_folder_brings_no_file_that_git_ignores(checkout: Path) -> None:
    write(checkout, "data/a.csv", "data/noise.log")
    (checkout / ".gitignore").write_text("*.log\n")
    (checkout / "alias").symlink_to("data")
    assert names_in(pack(checkout)) == {".gitignore", "data/a.csv", "alias/a.csv"}


# --- Unpacking


@pytest.fixture
def packed(folder: Path) -> Bundle:
    write(folder, "pipeline.py", "data/deep/ü.bin", "empty")
    (folder / "empty").write_bytes(b"")
    (folder / "data/zeros").write_bytes(bytes(1_000_000))
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    return pack(folder)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "home" / "bundles" / "version"


def beside(destination: Path) -> list[str]:
    """What lies in the parent of the destination."""
    return sorted(os.listdir(destination.parent)) if destination.parent.exists() else []


def test_what_was_packed_is_unpacked_with_contents_and_executable_bits(
    folder: Path, packed: Bundle, destination: Path
) -> None:
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert tree(destination) == tree(folder)
    assert beside(destination) == ["version"]
    assert pack(destination).version == packed.version


def test_a_destination_that_exists_is_left_as_it_is(packed: Bundle, destination: Path) -> None:
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    (destination / "pipeline.py").write_text("a stage wrote here")
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert (destination / "pipeline.py").read_text() == "a stage wrote here"
    assert beside(destination) == ["version"]


def test_an_empty_folder_in_the_place_of_the_destination_is_filled(packed: Bundle, destination: Path) -> None:
    destination.mkdir(parents=True)
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert set(tree(destination)) == set(packed.files)


def test_a_file_in_the_place_of_the_destination_is_an_error(packed: Bundle, destination: Path) -> None:
    destination.parent.mkdir(parents=True)
    destination.write_text("mine")
    with pytest.raises(HomeError) as caught:
        unpack(packed.zip_bytes, packed.zip_sha256, destination)
    one_line(caught.value)
    assert destination.read_text() == "mine"
    assert beside(destination) == ["version"]


def test_a_zip_with_another_hash_is_refused_before_anything_is_done(packed: Bundle, destination: Path) -> None:
    with pytest.raises(BundleRejected) as caught:
        unpack(packed.zip_bytes + b"\0", packed.zip_sha256, destination)
    assert "hash" in one_line(caught.value)
    assert not destination.parent.exists()


def test_the_hash_is_checked_even_where_the_destination_exists(packed: Bundle, destination: Path) -> None:
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    with pytest.raises(BundleRejected):
        unpack(packed.zip_bytes[:-1], packed.zip_sha256, destination)


KILLED_WHILE_UNPACKING = """
import os, signal, sys
from pathlib import Path
from p2pcluster.bundle import unpack
syncs_left = int(sys.argv[3])
real_fsync = os.fsync
def fsync(descriptor):
    global syncs_left
    syncs_left -= 1
    if syncs_left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real_fsync(descriptor)
os.fsync = fsync
unpack(sys.stdin.buffer.read(), sys.argv[1], Path(sys.argv[2]))
"""


@posix_only
@pytest.mark.parametrize("syncs", [0, 2, 5, 6])
def test_a_process_that_is_killed_leaves_nothing_half_and_the_next_call_tidies(
    packed: Bundle, destination: Path, folder: Path, syncs: int
) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_UNPACKING, packed.zip_sha256, str(destination), str(syncs)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(bundle.__file__).parent.parent), path])}
    killed = subprocess.run(command, input=packed.zip_bytes, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not destination.exists()
    assert len(beside(destination)) == 1
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert tree(destination) == tree(folder)
    assert beside(destination) == ["version"]


def test_the_leftovers_of_another_version_are_removed_too(packed: Bundle, destination: Path) -> None:
    write(destination.parent, ".unpacking-abc/deep/file", "another_version/kept")
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert beside(destination) == ["another_version", "version"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["fsync", "mkdir", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing(
    packed: Bundle, destination: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: int
) -> None:
    destination.parent.mkdir(parents=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch, pytest.raises(HomeError) as caught:
        patch.setattr(os, function, full)
        unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert "the disk is full" in one_line(caught.value)
    assert beside(destination) == []
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert set(tree(destination)) == set(packed.files)


@posix_only
def test_a_home_that_cannot_be_written_is_told(packed: Bundle, readable_by_all: Path) -> None:
    readable_by_all.chmod(0o555)
    with an_ordinary_user(), pytest.raises(HomeError) as caught:
        unpack(packed.zip_bytes, packed.zip_sha256, readable_by_all / "bundles/version")
    assert "make it writable" in one_line(caught.value)


@posix_only
def test_every_file_and_folder_is_on_the_disk_before_the_name_is(
    packed: Bundle, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(status: os.stat_result) -> tuple[int, int]:
        """A file and how much of it is written; of a folder, which grows in its own way, only which one."""
        return status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else 0

    synced: list[tuple[int, int]] = []
    synced_before_rename: list[tuple[int, int]] = []
    rename, fsync = os.rename, os.fsync

    def watched_fsync(descriptor: int) -> None:
        synced.append(identity(os.fstat(descriptor)))
        fsync(descriptor)

    def watched_rename(old: Path, new: Path) -> None:
        synced_before_rename.extend(synced)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert set(synced_before_rename) == {identity(path.stat()) for path in [destination, *destination.rglob("*")]}
    assert synced[len(synced_before_rename) :] == [identity(destination.parent.stat())]


# --- Zips that pack did not make


@dataclass(frozen=True)
class Entry:
    """A file in a zip made by hand, in which every header can lie."""

    name: str
    content: bytes = b"content"
    mode: int = 0o100644
    method: int = zipfile.ZIP_DEFLATED
    flags: int | None = None
    size: int | None = None
    crc: int | None = None
    stream: bytes | None = None
    stream_size: int | None = None
    local_name: str | None = None
    local_extra: bytes = b""
    extra: bytes = b""
    offset: int | None = None


def deflated(content: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(content) + compressor.flush()


def zip_of(*entries: Entry, before: bytes = b"", between: bytes = b"") -> bytes:
    data, directory = bytearray(before), bytearray()
    for entry in entries:
        name = entry.name.encode()
        local_name = name if entry.local_name is None else entry.local_name.encode()
        stream = entry.stream
        if stream is None:
            stream = deflated(entry.content) if entry.method == zipfile.ZIP_DEFLATED else entry.content
        flags = (0 if entry.name.isascii() else 0x800) if entry.flags is None else entry.flags
        crc = zlib.crc32(entry.content) if entry.crc is None else entry.crc
        size = len(entry.content) if entry.size is None else entry.size
        stream_size = len(stream) if entry.stream_size is None else entry.stream_size
        shared = (20, flags, entry.method, 0, 0x21, crc, stream_size, size)
        offset = len(data) if entry.offset is None else entry.offset
        data += struct.pack("<4s5H3L2H", b"PK\3\4", *shared, len(local_name), len(entry.local_extra))
        data += local_name + entry.local_extra + stream
        sizes = (len(name), len(entry.extra), 0, 0, 0, entry.mode << 16, offset)
        directory += struct.pack("<4sBB5H3L5H2L", b"PK\1\2", 20, 3, *shared, *sizes) + name + entry.extra
    data += between
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(data), 0)
    return bytes(data + directory + end)


def try_to_unpack(zip_bytes: bytes, destination: Path, limits: Limits = Limits()) -> str:
    """The message with which a zip is refused; whatever it tried, nothing is there afterwards."""
    with pytest.raises(BundleRejected) as caught:
        unpack(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), destination, limits)
    assert beside(destination) == []
    root = destination.parent.parent.parent
    assert [path for path in root.rglob("*") if path.is_file() or path.is_symlink()] == []
    return one_line(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("a")],
        [Entry("a"), Entry("b/c", mode=0o100755), Entry("b/d/e", method=zipfile.ZIP_STORED), Entry("ü")],
        [Entry("a", content=b"")],
        [Entry("name", flags=0x800)],
        [],
    ],
)
def test_a_zip_made_by_hand_to_the_same_rules_is_accepted(destination: Path, entries: list[Entry]) -> None:
    zip_bytes = zip_of(*entries)
    unpack(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), destination)
    assert tree(destination) == {entry.name: (entry.content, entry.mode == 0o100755) for entry in entries}


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "//server/share", "../escaped", "a/../../escaped", "a/..", "..", ".", "./a", "a/./b", ""),
        *("a//b", "a/", "a\\b", "..\\escaped", "\\\\server\\share", "C:", "C:/x", "c:x", "a/C:x", "a\0b", "\0"),
        *("NUL", "con.txt", "a/LPT1", "COM1 .x", "com\u00b9", ".. /escaped", "...", "a/ ", "a" * 256, "d/" * 64 + "a"),
        "/".join(["d" * 100] * 11),
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(destination: Path, name: str) -> None:
    try_to_unpack(zip_of(Entry("first"), Entry(name)), destination)


@pytest.mark.parametrize(
    "mode", [0o120777, 0o040755, 0o060644, 0o020644, 0o010644, 0o140644, 0o104755, 0o100666, 0o100600, 0o644, 0]
)
def test_what_is_not_a_regular_file_is_refused(destination: Path, mode: int) -> None:
    assert "regular file" in try_to_unpack(zip_of(Entry("a", content=b"/etc/passwd", mode=mode)), destination)


def test_a_link_and_a_file_behind_it_are_refused(destination: Path, tmp_path: Path) -> None:
    link = Entry("a", content=str(tmp_path).encode(), mode=0o120777, method=zipfile.ZIP_STORED)
    try_to_unpack(zip_of(link, Entry("a/escaped")), destination)


@pytest.mark.parametrize(
    "names",
    [
        *(["a", "a"], ["a", "A"], ["caf\u00e9", "cafe\u0301"], ["a", "a/b"], ["a/b", "a"], ["A/b", "a"]),
        *(["stra\u00dfe", "STRASSE"], ["a", "a."], ["x/a /b", "x/a"], ["x/y/z", "x/Y/z"], ["d/a", "D/b"]),
    ],
)
def test_names_that_are_one_on_some_disk_are_refused(destination: Path, names: list[str]) -> None:
    assert "are one name" in try_to_unpack(zip_of(*map(Entry, names)), destination)


BOMB = deflated(bytes(10_000_000))


@pytest.mark.parametrize(
    "entry",
    [
        Entry("a", crc=0),
        Entry("a", size=6),
        Entry("a", size=8),
        Entry("a", size=0),
        Entry("a", size=6, crc=zlib.crc32(b"content")),
        Entry("a", size=8, method=zipfile.ZIP_STORED),
        Entry("a", content=b"", stream=BOMB),
        Entry("a", content=b"con", stream=deflated(b"content")),
        Entry("a", content=bytes(100), stream=BOMB),
        Entry("a", stream=deflated(b"content")[:-2]),
        Entry("a", stream=b"\xff\xff\xff"),
        Entry("a", stream=b""),
        Entry("a", flags=1),
        Entry("a", flags=8),
        Entry("ü", flags=0),
        Entry("a", method=12),
        Entry("a", method=99),
        Entry("a", local_name="b"),
        Entry("a", local_name="aa"),
        Entry("a", local_name=""),
        Entry("a", local_extra=b"\1\0\0\0"),
        Entry("a", local_extra=b"\1\0\0\0", stream_size=len(deflated(b"content")) + 4),
        Entry("a", stream_size=3),
        Entry("a", stream_size=1_000_000),
        Entry("a", extra=b"\1\0\0\0"),
        Entry("a", offset=1),
        Entry("a", offset=0xFFFFFFF0),
    ],
    ids=lambda entry: re.sub(r"stream=b.*?(, local|$)", r"stream=..\1", repr(entry))[:90],
)
@pytest.mark.parametrize("position", ["alone", "first", "last"])
def test_headers_that_lie_and_streams_that_break_are_refused(destination: Path, entry: Entry, position: str) -> None:
    good = Entry("good")
    entries = {"alone": [entry], "first": [entry, good], "last": [good, entry]}[position]
    try_to_unpack(zip_of(*entries), destination)


def test_entries_that_share_bytes_are_refused(destination: Path) -> None:
    assert "begin" in try_to_unpack(zip_of(Entry("a"), Entry("a", offset=0)), destination)
    inner = zip_of(Entry("b"))[: -(46 + 1 + 22)]
    outer = Entry("a", content=inner, method=zipfile.ZIP_STORED)
    assert "begin" in try_to_unpack(zip_of(outer, Entry("b", offset=31)), destination)


def test_an_entry_that_reaches_beyond_the_end_is_refused(destination: Path) -> None:
    reaches = Entry("a", stream_size=1_000_000)
    try_to_unpack(zip_of(reaches, Entry("b", offset=30 + 1 + 1_000_000)), destination)


def test_a_name_that_is_not_utf8_although_it_says_so_is_refused(destination: Path) -> None:
    zip_bytes = zip_of(Entry("ab", flags=0x800)).replace(b"ab", b"\xe9b")
    assert "no zip" in try_to_unpack(zip_bytes, destination)


def test_bytes_that_belong_to_no_file_are_refused(destination: Path) -> None:
    try_to_unpack(zip_of(Entry("a"), before=b"#!/bin/sh\n"), destination)
    try_to_unpack(zip_of(Entry("a"), between=b"more"), destination)
    try_to_unpack(b"#!/bin/sh\n" + zip_of(Entry("a")), destination)


def test_what_is_no_zip_is_refused(destination: Path) -> None:
    good = zip_of(Entry("a"), Entry("b"))
    for garbage in [b"", b"PK", bytes(100), good[1:], *(good[:length] for length in range(len(good)))]:
        try_to_unpack(garbage, destination)


def test_more_bytes_than_allowed_are_refused_while_they_stream(destination: Path) -> None:
    zip_bytes = zip_of(Entry("a", content=b"x" * 600), Entry("b", content=b"y" * 600))
    assert "b unpacks to more" in try_to_unpack(zip_bytes, destination, Limits(bytes_max=1199))
    unpack(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), destination, Limits(bytes_max=1200))


def test_a_bomb_is_refused(destination: Path) -> None:
    bombs = [Entry(f"{number}", content=bytes(10_000_000), stream=BOMB) for number in range(7)]
    assert "6 unpacks to more" in try_to_unpack(zip_of(*bombs), destination)


def test_more_compression_than_allowed_is_refused(destination: Path) -> None:
    zip_bytes = zip_of(Entry("a", content=bytes(100_000)))
    assert "a unpacks to more" in try_to_unpack(zip_bytes, destination, Limits(ratio_max=100))
    unpack(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), destination)


def test_more_files_than_allowed_are_refused(destination: Path) -> None:
    zip_bytes = zip_of(*(Entry(f"{number}", content=b"") for number in range(11)))
    assert "holds 11 files" in try_to_unpack(zip_bytes, destination, Limits(entries_max=10))
    unpack(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), destination, Limits(entries_max=11))


def test_a_bundle_with_more_files_than_a_short_directory_can_count_is_unpacked(
    folder: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    write(folder, "a", "b", "c", "d")
    packed = pack(folder)
    unpack(packed.zip_bytes, packed.zip_sha256, destination)
    assert tree(destination) == tree(folder)


# --- Finding the project


def project_error(target: str | None, cwd: Path) -> str:
    with pytest.raises(ProjectError) as caught:
        find_project(target, cwd)
    return one_line(caught.value)


def test_a_folder_with_a_pipeline_file_is_a_project(folder: Path) -> None:
    write(folder, "pipeline.py")
    expected = Project(folder.resolve(), "pipeline", None, (".",), ())
    assert find_project(None, folder) == expected
    assert find_project(".", folder) == expected
    assert find_project(str(folder), Path("/")) == expected
    assert find_project("project/", folder.parent) == expected


def test_a_folder_without_a_project_is_none(folder: Path) -> None:
    write(folder, "other.py", "src/x.py")
    (folder / "pyproject.toml").write_text('[tool.p2pcluster]\nhome = "x"\n[tool.black]\n')
    assert find_project(None, folder) is None
    assert find_project("src", folder) is None


def test_pyproject_names_module_variable_and_excludes_and_wins_over_the_file(folder: Path) -> None:
    write(folder, "pipeline.py", "src/package/module.py")
    (folder / "pyproject.toml").write_text(
        '[tool.p2pcluster]\npipeline = "package.module:squares"\nexclude = ["data/*.bin", "notebooks"]\n'
    )
    expected = Project(folder.resolve(), "package.module", "squares", (".", "src"), ("data/*.bin", "notebooks"))
    assert find_project(None, folder) == expected


def test_pyproject_says_which_pythons_a_project_admits(folder: Path) -> None:
    write(folder, "pipeline.py")
    (folder / "pyproject.toml").write_text('tool.p2pcluster.python = ">=3.11, <3.14"')
    assert find_project(None, folder) == Project(folder.resolve(), "pipeline", None, (".",), (), ">=3.11, <3.14")


def test_a_package_can_hold_the_pipeline(folder: Path) -> None:
    write(folder, "package/__init__.py")
    (folder / "pyproject.toml").write_text('tool.p2pcluster.pipeline = "package:squares"')
    project = find_project(None, folder)
    assert project is not None and project.module == "package"


def test_a_file_is_a_project_in_its_own_folder(folder: Path) -> None:
    write(folder, "jobs/squares.py", "jobs/src/lib.py")
    (folder / "jobs/pyproject.toml").write_text('tool.p2pcluster.exclude = ["big"]')
    jobs = folder.resolve() / "jobs"
    assert find_project("jobs/squares.py", folder) == Project(jobs, "squares", None, (".", "src"), ("big",))
    assert find_project("jobs/squares.py:main", folder) == Project(jobs, "squares", "main", (".", "src"), ("big",))
    assert find_project(f"{jobs}/squares.py:main", Path("/")) == find_project("squares.py:main", jobs)


def test_finding_a_project_runs_none_of_its_code(folder: Path) -> None:
    (folder / "pipeline.py").write_text("raise SystemExit('this was run')")
    assert find_project("pipeline.py", folder) == find_project(None, folder)


@posix_only
def test_a_linked_file_belongs_to_the_folder_that_the_user_named(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/real.py")
    (folder / "squares.py").symlink_to(tmp_path / "elsewhere/real.py")
    project = find_project("squares.py", folder)
    assert project is not None and (project.folder, project.module) == (folder.resolve(), "squares")


@pytest.mark.parametrize(
    ("target", "path", "variable"),
    [
        ("pipeline.py", "pipeline.py", None),
        ("pipeline.py:main", "pipeline.py", "main"),
        ("pipeline.py:", "pipeline.py", ""),
        ("C:\\jobs\\pipeline.py", "C:\\jobs\\pipeline.py", None),
        ("C:\\jobs\\pipeline.py:main", "C:\\jobs\\pipeline.py", "main"),
        ("c:/jobs", "c:/jobs", None),
        ("C:pipeline.py", "C:pipeline.py", None),
        ("C:pipeline.py:main", "C:pipeline.py", "main"),
        ("12:30/pipeline.py:main", "12:30/pipeline.py", "main"),
    ],
)
def test_a_variable_is_told_from_a_drive(folder: Path, target: str, path: str, variable: str | None) -> None:
    assert bundle._split_target(target, folder) == (folder / path, variable)


@posix_only
def test_a_path_that_exists_is_not_split_at_its_colon(folder: Path) -> None:
    write(folder, "odd:name/pipeline.py")
    project = find_project("odd:name", folder)
    assert project is not None and project.folder.name == "odd:name"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("missing.py", "there is no missing.py"),
        ("missing", "there is no missing"),
        ("missing.py:main", "there is no missing.py:main"),
        ("", "there is no file"),
        ("new\nline.py", "there is no 'new\\nline.py'"),
        ("data.txt", "not a Python file"),
        ("my-pipeline.py", "cannot be imported"),
        ("2nd.py", "cannot be imported"),
        ("__init__.py", "cannot be imported"),
        ("p2pcluster.py", "cannot be imported"),
        ("ok.py:", "not the name of a variable"),
        ("ok.py:a.b", "not the name of a variable"),
        ("ok.py:2", "not the name of a variable"),
        ("folder:main", "names a variable in a folder"),
    ],
)
def test_a_target_that_is_wrong_says_why(folder: Path, target: str, reason: str) -> None:
    write(folder, "data.txt", "my-pipeline.py", "2nd.py", "__init__.py", "p2pcluster.py", "ok.py", "folder/pipeline.py")
    assert reason in project_error(target, folder)


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ("[tool.p2pcluster", "cannot be read"),
        ("\0", "cannot be read"),
        ("a=" + "[" * 5000, "cannot be read"),
        ("tool = 1", "not a table"),
        ("tool.p2pcluster = 1", "not a table"),
        ("tool.p2pcluster.pipeline = 1", "not of the form"),
        ("tool.p2pcluster.pipeline = ''", "not of the form"),
        ("tool.p2pcluster.pipeline = 'package.module'", "not of the form"),
        ("tool.p2pcluster.pipeline = 'package.module:'", "not of the form"),
        ("tool.p2pcluster.pipeline = ':squares'", "not of the form"),
        ("tool.p2pcluster.pipeline = 'package..module:squares'", "not of the form"),
        ("tool.p2pcluster.pipeline = '../module:squares'", "not of the form"),
        ("tool.p2pcluster.pipeline = 'package/module.py:squares'", "not of the form"),
        ("tool.p2pcluster.pipeline = 'a:b:c'", "not of the form"),
        ("tool.p2pcluster.pipeline = 'a:b c'", "not of the form"),
        ("tool.p2pcluster.pipeline = 'absent.module:squares'", "there is no absent/module.py under ."),
        ("tool.p2pcluster.exclude = 'data'", "not a list of patterns"),
        ("tool.p2pcluster.exclude = [1]", "not a list of patterns"),
        ("tool.p2pcluster.python = '~=3.11'", "has the python '~=3.11', which is not a list of versions"),
        ("tool.p2pcluster.python = 3.11", "has the python 3.11, which is not"),
    ],
)
def test_a_pyproject_that_is_wrong_says_why(folder: Path, toml: str, reason: str) -> None:
    write(folder, "pipeline.py")
    (folder / "pyproject.toml").write_text(toml)
    message = project_error(None, folder)
    assert reason in message
    assert "pyproject.toml" in message


def test_a_pyproject_that_is_not_utf8_says_so(folder: Path) -> None:
    write(folder, "pipeline.py")
    (folder / "pyproject.toml").write_bytes(b"# caf\xe9\n")
    assert "pyproject.toml cannot be read" in project_error(None, folder)
