"""A home belongs to one node at a time and lies on a local disk; a cluster has one key, whoever makes it first."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from p2pcluster import home as home_module
from p2pcluster.errors import HomeError
from p2pcluster.home import Home, Keyfile, NodeAddress, read_address

LOCAL = "/dev/vda / ext4 rw 0 0\n"
UNWRITABLE = "/proc/no-such-folder"  # not even for root
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, which refuses even root")
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(HomeError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# --- The folder ------------------------------------------------------------------------------------------------------


@posix
def test_a_new_home_and_what_is_made_above_it_is_its_users_alone(tmp_path: Path) -> None:
    with Home.open(tmp_path / "a" / "b", LOCAL) as home:
        folders = [tmp_path / "a", home.path, home.bundles, home.out, home.logs, home.run]
        assert [mode(folder) for folder in folders] == [0o700] * 6
        assert mode(home.path / "lock") == 0o600


def test_the_names_in_a_home_are_those_that_others_look_for(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL) as home:
        paths = [home.journal, home.mark, home.bundles, home.out, home.logs, home.run]
        names = ["journal.sqlite3", "journal.mark", "bundles", "out", "logs", "run"]
        assert [path.relative_to(tmp_path.resolve()).as_posix() for path in paths] == names


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL) as home:
        (home.run / "position").write_bytes(b"7")
        home.journal.write_bytes(b"x")
    with Home.open(tmp_path, LOCAL) as home:
        assert (home.run / "position").read_bytes() == b"7"
        assert home.journal.read_bytes() == b"x"


def test_a_home_in_the_users_folder_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with Home.open("~/node", LOCAL) as home:
        assert home.path == tmp_path.resolve() / "node"


@linux
def test_a_home_that_cannot_be_written_is_refused_with_another_that_can() -> None:
    message = refusal(lambda: Home.open(UNWRITABLE, LOCAL))
    assert message.startswith(f"cannot use {UNWRITABLE} as a home: ")
    assert message.endswith("python -m p2pcluster --home /var/tmp/p2pcluster-$USER")


@linux
def test_a_lock_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("/proc/no-such-file")
    assert refusal(lambda: Home.open(tmp_path, LOCAL)).startswith(f"cannot use {tmp_path} as a home: ")


def test_a_file_in_the_place_of_a_home_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "node"):
        assert "a file is where a folder should be" in refusal(partial(Home.open, path, LOCAL))


def test_a_home_that_cannot_be_laid_out_is_left_unlocked(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert "a file is where a folder should be" in refusal(lambda: Home.open(tmp_path, LOCAL))
    (tmp_path / "out").unlink()
    Home.open(tmp_path, LOCAL).close()


@posix
def test_a_home_that_everybody_can_write_is_refused_with_one_inside_it(tmp_path: Path) -> None:
    for bits in (0o777, 0o702):
        tmp_path.chmod(bits)
        message = refusal(lambda: Home.open(tmp_path, LOCAL))
        assert "every user" in message
        assert message.endswith(f"--home {tmp_path}/node")
    Home.open(tmp_path / "node", LOCAL).close()


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give a folder away")
def test_a_home_of_another_user_is_refused_except_to_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(tmp_path, 12345, -1)
    Home.open(tmp_path, LOCAL).close()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert "belongs to another user" in refusal(lambda: Home.open(tmp_path, LOCAL))


# --- Network file systems --------------------------------------------------------------------------------------------


NETWORK = "nfs nfs4 cifs smbfs smb3 fuse.sshfs 9p afs ceph fuse.ceph-fuse glusterfs fuse.glusterfs lustre beegfs"


@pytest.mark.parametrize("kind", NETWORK.split())
def test_a_network_file_system_is_refused_with_the_command_that_works(kind: str, tmp_path: Path) -> None:
    mounts = LOCAL + f"server:/export {tmp_path} {kind} rw,vers=4.2 0 0\n"
    message = refusal(lambda: Home.open(tmp_path / "node", mounts))
    assert f"({kind} at {tmp_path})" in message
    assert message.endswith("python -m p2pcluster --home /var/tmp/p2pcluster-$USER")
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "fuseblk", "fuse.unionfs"])
def test_a_local_file_system_is_accepted(kind: str, tmp_path: Path) -> None:
    Home.open(tmp_path, f"{LOCAL}/dev/x {tmp_path} {kind} rw 0 0\n").close()


def test_the_deepest_mount_decides(tmp_path: Path) -> None:
    over_nfs = f"server:/ / nfs4 rw 0 0\n/dev/x {tmp_path} ext4 rw 0 0\n"
    Home.open(tmp_path / "node", over_nfs).close()
    under_ext4 = f"server:/ {tmp_path}/a nfs4 rw 0 0\n/dev/x {tmp_path} ext4 rw 0 0\n"
    assert "nfs4" in refusal(lambda: Home.open(tmp_path / "a" / "node", under_ext4))


def test_of_two_mounts_at_one_point_the_later_decides(tmp_path: Path) -> None:
    lines = [f"auto {tmp_path} autofs rw 0 0\n", f"server:/ {tmp_path} nfs rw 0 0\n"]
    assert "nfs at" in refusal(lambda: Home.open(tmp_path, LOCAL + lines[0] + lines[1]))
    Home.open(tmp_path, LOCAL + lines[1] + lines[0]).close()


def test_a_mount_whose_name_only_begins_alike_does_not_count(tmp_path: Path) -> None:
    Home.open(tmp_path / "node1", f"{LOCAL}server:/ {tmp_path}/node nfs4 rw 0 0\n").close()


def test_blanks_backslashes_and_other_letters_in_a_mount_point_are_understood(tmp_path: Path) -> None:
    folder = tmp_path / "a b\tc\\dé#"
    escaped = str(folder)
    for letter in "\\ \t#":
        escaped = escaped.replace(letter, f"\\{ord(letter):03o}")
    escaped_utf8 = escaped.replace("é", "\\303\\251")
    for point in (escaped, escaped_utf8):
        assert "nfs4" in refusal(partial(Home.open, folder, f"{LOCAL}server:/ {point} nfs4 rw 0 0\n"))


def test_a_link_to_a_network_file_system_is_seen_through(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "share")
    mounts = f"{LOCAL}server:/ {tmp_path}/share nfs4 rw 0 0\n"
    assert "nfs4" in refusal(lambda: Home.open(tmp_path / "link" / "node", mounts))


def test_the_command_that_works_names_no_network_file_system_either(tmp_path: Path) -> None:
    mounts = "server:/ / nfs4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n"
    if tmp_path.is_relative_to("/tmp"):
        mounts += f"server:/ {tmp_path} nfs4 rw 0 0\n"
    assert refusal(lambda: Home.open(tmp_path, mounts)).endswith("--home /tmp/p2pcluster-$USER")


def test_lines_that_are_no_mounts_are_passed_over(tmp_path: Path) -> None:
    Home.open(tmp_path, "\n \ngarbage\n\0\n" + LOCAL).close()


def test_without_a_table_of_mounts_a_home_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home_module, "_MOUNTS", tmp_path / "none")
    Home.open(tmp_path / "node").close()


def test_the_systems_own_table_is_read_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"{LOCAL}server:/ {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(home_module, "_MOUNTS", table)
    assert "nfs4" in refusal(lambda: Home.open(tmp_path / "node"))


# --- The lock --------------------------------------------------------------------------------------------------------


HOLD = """
import sys
from p2pcluster.home import Home
home = Home.open(sys.argv[1], "")
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the home `tmp_path` open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_home_of_another_process_is_refused_with_its_pid_and_the_remedy(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    message = refusal(lambda: Home.open(tmp_path, LOCAL))
    assert f"process id {holder.pid}" in message
    assert f"kill {holder.pid}" in message
    assert "--home DIR" in message


@posix
def test_a_killed_process_leaves_its_home_to_the_next(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    refusal(lambda: Home.open(tmp_path, LOCAL))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Home.open(tmp_path, LOCAL):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


@posix
def test_a_home_that_others_can_only_read_is_accepted_and_left_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Home.open(tmp_path, LOCAL).close()
    assert mode(tmp_path) == 0o755


def test_nothing_is_left_of_a_longer_pid_that_held_the_home_before(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123456789012\n")
    with Home.open(tmp_path, LOCAL):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_one_process_cannot_open_a_home_twice(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL):
        message = refusal(lambda: Home.open(tmp_path / "." / ".." / tmp_path.name, LOCAL))
        assert "this very process" in message
    Home.open(tmp_path, LOCAL).close()


def test_a_child_does_not_keep_its_parents_home(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        Home.open(tmp_path, LOCAL).close()
        assert child.poll() is None
        child.kill()


def test_a_holder_that_has_not_written_its_pid_yet_is_still_a_holder(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL):
        (tmp_path / "lock").write_bytes(b"")
        assert "in use by another node" in refusal(lambda: Home.open(tmp_path, LOCAL))


def test_of_many_that_open_a_home_at_once_one_gets_it(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def attempt(_: int) -> Home | None:
        together.wait()
        try:
            return Home.open(tmp_path / "node", LOCAL)
        except HomeError:
            return None

    with ThreadPoolExecutor(8) as pool:
        homes = [home for home in pool.map(attempt, range(8)) if home]
    assert len(homes) == 1
    homes[0].close()


# --- The address -----------------------------------------------------------------------------------------------------


def test_clients_read_the_address_while_the_node_runs(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL) as home:
        assert read_address(tmp_path) is None
        home.write_address("10.0.0.7", 47400, "lab")
        home.write_address("10.0.0.7", 47401, "lab")
        assert read_address(tmp_path) == NodeAddress("10.0.0.7", 47401, "lab", os.getpid())
        assert json.loads((tmp_path / "address.json").read_text()) == {
            "host": "10.0.0.7", "port": 47401, "cluster": "lab", "pid": os.getpid(),
        }  # fmt: skip
    assert read_address(tmp_path) is None
    home.close()


def test_writing_the_address_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL) as home:
        home.write_address("h", 1, "c")
        assert {path.name for path in tmp_path.iterdir()} == {"address.json", "bundles", "lock", "logs", "out", "run"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"host": "h"}', '{"host": 1, "port": 1, "cluster": "c", "pid": 1}', "\udcff"]
)
def test_what_is_not_an_address_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "address.json").write_bytes(text.encode(errors="surrogateescape"))
    assert read_address(tmp_path) is None


def test_where_there_is_no_home_there_is_no_address(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_address(tmp_path / "none") is None
    assert read_address(tmp_path / "file") is None


def test_an_address_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "address.json").mkdir()
    assert "run this as the user of the node" in refusal(lambda: read_address(tmp_path))


def test_an_address_that_cannot_be_written_is_an_error_and_leaves_no_rest(tmp_path: Path) -> None:
    with Home.open(tmp_path, LOCAL) as home:
        (tmp_path / "address.json").mkdir()
        before = set(tmp_path.iterdir())
        assert "cannot write" in refusal(lambda: home.write_address("h", 1, "c"))
        assert set(tmp_path.iterdir()) == before
        (tmp_path / "address.json").rmdir()


def test_a_home_whose_address_cannot_be_removed_is_released_all_the_same(tmp_path: Path) -> None:
    home = Home.open(tmp_path, LOCAL)
    (tmp_path / "address.json").mkdir()
    assert "remove it by hand" in refusal(home.close)
    Home.open(tmp_path, LOCAL)._lock.release()


# --- The key ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyfile(tmp_path: Path) -> Keyfile:
    return Keyfile(tmp_path / "clusters" / "lab" / "authkey")


def test_where_there_is_no_key_none_is_read_and_none_shown(keyfile: Keyfile) -> None:
    assert keyfile.read() is None
    assert "key --set" in refusal(keyfile.show)
    assert not keyfile.path.parent.exists()


def test_a_key_is_made_of_32_random_bytes_and_read_back(keyfile: Keyfile) -> None:
    key = keyfile.make()
    assert len(bytes.fromhex(key.decode())) == 32
    assert keyfile.read() == key
    assert keyfile.show() == key.decode()
    assert keyfile.path.read_bytes() == key + b"\n"


@posix
def test_a_key_is_its_owners_alone(keyfile: Keyfile) -> None:
    keyfile.make()
    assert (mode(keyfile.path), mode(keyfile.path.parent)) == (0o600, 0o700)
    keyfile.set_key("another")
    assert mode(keyfile.path) == 0o600


def test_a_key_that_is_there_is_not_made_again(keyfile: Keyfile) -> None:
    key = keyfile.set_key("mine")
    assert keyfile.make() == key
    assert Keyfile(keyfile.path).make() == key


def test_the_default_key_is_by_cluster_in_the_users_folder(tmp_path: Path) -> None:
    assert Keyfile.default("lab", tmp_path).path == tmp_path.resolve() / ".p2pcluster" / "lab" / "authkey"
    assert Keyfile.default("lab").path == Path("~/.p2pcluster/lab/authkey").expanduser().resolve()


def test_two_that_find_no_key_at_the_same_instant_end_up_with_one(
    keyfile: Keyfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    others: list[bytes] = []

    def link_after_another(*names: str | Path) -> None:
        monkeypatch.setattr(os, "link", link)
        others.append(Keyfile(keyfile.path).make())
        link(*names)

    monkeypatch.setattr(os, "link", link_after_another)
    assert [keyfile.make()] == others
    assert list(keyfile.path.parent.iterdir()) == [keyfile.path]


def test_many_threads_that_make_a_key_at_once_get_the_same(keyfile: Keyfile) -> None:
    together = threading.Barrier(16)

    def make(_: int) -> bytes:
        together.wait()
        return Keyfile(keyfile.path).make()

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(make, range(16))) == {keyfile.read()}
    assert list(keyfile.path.parent.iterdir()) == [keyfile.path]


MAKE = """
import sys
from p2pcluster.home import Keyfile
print("ready", flush=True)
sys.stdin.read()
print(Keyfile(sys.argv[1]).make().decode())
"""


def test_many_processes_that_make_a_key_at_once_get_the_same(keyfile: Keyfile) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, str(keyfile.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    keys = set()
    for process in processes:
        with process:
            assert process.stdout is not None
            keys.add(process.stdout.read().strip())
    assert keys == {keyfile.show()}
    assert list(keyfile.path.parent.iterdir()) == [keyfile.path]


def test_a_key_that_is_removed_while_it_is_made_is_an_error(keyfile: Keyfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: None)
    assert "start again" in refusal(keyfile.make)
    assert list(keyfile.path.parent.iterdir()) == []


def test_a_file_system_without_links_is_refused_without_a_rest(
    keyfile: Keyfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert refusal(keyfile.make).endswith("--authkey-file")
    assert list(keyfile.path.parent.iterdir()) == []


@linux
def test_a_key_that_cannot_be_written_is_refused_with_the_option_that_helps() -> None:
    for call in (Keyfile(UNWRITABLE).make, lambda: Keyfile(UNWRITABLE).set_key("k")):
        message = refusal(call)
        assert message.startswith(f"cannot write the key {UNWRITABLE}: ")
        assert "--authkey-file" in message


@posix
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_a_key_that_others_can_reach_is_refused_with_the_command_that_helps(bits: int, keyfile: Keyfile) -> None:
    keyfile.make()
    keyfile.path.chmod(bits)
    for call in (keyfile.read, keyfile.make, keyfile.show):
        assert refusal(call).endswith(f"chmod 600 {keyfile.path}")
    keyfile.path.chmod(0o600)
    assert keyfile.read()


def given(keyfile: Keyfile, data: bytes) -> None:
    keyfile.path.parent.mkdir(parents=True, exist_ok=True)
    keyfile.path.write_bytes(data)
    keyfile.path.chmod(0o600)


@pytest.mark.parametrize("data", [b"abc", b"abc\n", b"abc\r\n", b"\n  abc\t\r\n\r\n", b"abc\r"])
def test_line_ends_and_blanks_around_a_key_do_not_count(data: bytes, keyfile: Keyfile) -> None:
    given(keyfile, data)
    assert keyfile.read() == b"abc"


@pytest.mark.parametrize("data", [b"", b"\r\n", b" \n\n"])
def test_an_empty_key_is_refused(data: bytes, keyfile: Keyfile) -> None:
    given(keyfile, data)
    assert "is empty" in refusal(keyfile.read)
    assert "is empty" in refusal(keyfile.make)


@pytest.mark.parametrize("data", [b"a" * 4097, b"a" + b" " * 5000, b"a\nb\n", b"a\rb", b"a\0b", bytes(10_000)])
def test_a_file_that_is_something_else_is_refused_as_a_key(data: bytes, keyfile: Keyfile) -> None:
    given(keyfile, data)
    assert "is not a key" in refusal(keyfile.read)


def test_a_key_as_large_as_allowed_is_read(keyfile: Keyfile) -> None:
    given(keyfile, b"a" * 4095 + b"\n")
    assert keyfile.read() == b"a" * 4095
    assert keyfile.set_key("b" * 4095) == b"b" * 4095 == keyfile.read()


@posix
def test_what_is_not_a_file_is_no_key_and_is_not_replaced(keyfile: Keyfile) -> None:
    keyfile.path.parent.mkdir(parents=True)
    os.mkfifo(keyfile.path, 0o600)
    for call in (keyfile.read, keyfile.make, lambda: keyfile.set_key("k")):
        assert "not a regular file" in refusal(call)
    assert stat.S_ISFIFO(keyfile.path.stat().st_mode)


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    assert "cannot read the key" in refusal(Keyfile(tmp_path).read)
    assert "not a regular file" in refusal(lambda: Keyfile(tmp_path).set_key("k"))


def test_a_key_that_is_set_replaces_the_one_that_was(keyfile: Keyfile) -> None:
    keyfile.make()
    assert keyfile.set_key("  4f6e\r\n") == b"4f6e" == keyfile.read()
    assert list(keyfile.path.parent.iterdir()) == [keyfile.path]


def test_a_key_that_is_set_keeps_its_bytes_whatever_the_terminal_made_of_them(keyfile: Keyfile) -> None:
    assert keyfile.set_key(b"\xff\xfe".decode(errors="surrogateescape")) == b"\xff\xfe" == keyfile.read()


def test_a_key_that_is_set_need_not_be_ascii(keyfile: Keyfile) -> None:
    assert keyfile.set_key("schlüssel") == "schlüssel".encode()
    assert keyfile.show() == "schlüssel"


@pytest.mark.parametrize("text", ["", " \n", "a\nb", "a\0", "a" * 4096])
def test_a_bad_key_is_not_set_and_the_old_one_stays(text: str, keyfile: Keyfile) -> None:
    key = keyfile.make()
    assert "copy the line" in refusal(lambda: keyfile.set_key(text))
    assert keyfile.read() == key


def test_a_link_to_a_key_stays_a_link(tmp_path: Path, keyfile: Keyfile) -> None:
    keyfile.make()
    link = tmp_path / "link"
    link.symlink_to(keyfile.path)
    Keyfile(link).set_key("new")
    assert link.is_symlink()
    assert keyfile.read() == b"new"
