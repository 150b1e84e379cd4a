"""A node's folder and the cluster's key file: where each thing lies, and that nobody else uses it.

This file alone decides the names in a home, which file systems can hold one, how one node is kept out of another's
home, and how a key comes to be. It refuses to know what is inside the journal, the bundles or the position files, and
what a key is used for. Whatever the operating system refuses becomes one `HomeError`: what, why, what to do next.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from p2pcluster import config
from p2pcluster.errors import HomeError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Shared between machines, or without the locks and shared memory that SQLite's log needs. Also with `fuse.` in front.
_NETWORK_FILE_SYSTEMS = frozenset(
    "9p acfs afs beegfs ceph ceph-fuse cifs coda curlftpfs davfs davfs2 gcsfuse glusterfs goofys gpfs juicefs lustre "
    "mfs moosefs ncp ncpfs nfs nfs3 nfs4 orangefs panfs pvfs2 rclone s3fs smb2 smb3 smbfs sshfs vboxsf vmhgfs "
    "vmhgfs-fuse wekafs".split()
)
_MOUNTS = Path("/proc/mounts")
_LOCAL_FOLDERS = (Path("/var/tmp"), Path("/tmp"))  # by preference: the first outlives a restart of the machine
_WINDOWS_LOCK_AT = 1 << 30  # Windows locks bytes against reading too: far behind the process id, which others read
_OTHER_KEYFILE = "name another file with --authkey-file"
_COPY_KEY = "copy the line that `python -m p2pcluster key` shows on another node"


class Home:
    """The folder of one node, held by this process until `close` or its death.

    Invariant: while a Home is open, no other Home of the same folder is, in this process or another.
    """

    def __init__(self, path: Path, lock: _Lock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], mounts: str | None = None) -> Home:
        """The home at `path`, made where there is none; `mounts` stands for /proc/mounts. Raises `HomeError`."""
        table = _parse_mounts(_read_mounts() if mounts is None else mounts)
        elsewhere = f"use a folder of your own on a local disk: python -m p2pcluster --home {_local_folder(table)}"
        with _translated(f"cannot use {os.fspath(path)} as a home", elsewhere):
            folder = Path(os.path.realpath(os.path.expanduser(path)))
            mount = _mount_of(folder, table)
            if mount.is_network:
                raise HomeError(
                    f"{folder} is on a network file system ({mount.kind} at {mount.point}), where SQLite is not safe; "
                    f"{elsewhere}"
                )
            _make_folder(folder)
            _refuse_foreign(folder, elsewhere)
            home = cls(folder, _Lock(folder / "lock"))
            try:
                for part in (home.bundles, home.out, home.logs, home.run):
                    part.mkdir(mode=0o700, exist_ok=True)
            except OSError:
                home.close()
                raise
        return home

    @property
    def journal(self) -> Path:
        """The SQLite file."""
        return self.path / "journal.sqlite3"

    @property
    def mark(self) -> Path:
        """How far the journal was acknowledged: it tells an end that is damaged from one that never was whole."""
        return self.path / "journal.mark"

    @property
    def bundles(self) -> Path:
        """Projects, one folder for each version."""
        return self.path / "bundles"

    @property
    def out(self) -> Path:
        """What stages write, one folder for each pipeline; outlives versions."""
        return self.path / "out"

    @property
    def logs(self) -> Path:
        """The node's log, and what stages printed."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """Position files: which item each stage process is at. Read after a death, so that no opening empties it."""
        return self.path / "run"

    def write_address(self, host: str, port: int, cluster: str) -> None:
        """Tell this machine's clients where the node listens."""
        address = NodeAddress(host, port, cluster, os.getpid())
        file = _address_file(self.path)
        with _translated(f"cannot write {file}", "make room or choose another folder with --home"):
            _replace(file, json.dumps(asdict(address)).encode() + b"\n")

    def close(self) -> None:
        """Withdraw the address and let others have the folder; a second call does nothing."""
        if not self._lock.held:
            return
        file = _address_file(self.path)
        try:
            with _translated(f"cannot remove {file}", "remove it by hand"):
                file.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def __enter__(self) -> Home:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class NodeAddress:
    """Where a node says that it listens. A killed node leaves it behind."""

    host: str
    port: int
    cluster: str
    pid: int

    def is_well_formed(self) -> bool:
        texts = isinstance(self.host, str) and isinstance(self.cluster, str)
        return texts and isinstance(self.port, int) and isinstance(self.pid, int)


def read_address(home: str | os.PathLike[str]) -> NodeAddress | None:
    """What the node of `home` wrote, or None. It is a hint: what is not an address is none. Raises `HomeError`."""
    file = _address_file(Path(home).expanduser())
    with _translated(f"cannot read {file}", "run this as the user of the node"):
        try:
            address = NodeAddress(**json.loads(file.read_bytes()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None
    return address if address.is_well_formed() else None


def _address_file(home: Path) -> Path:
    return home / "address.json"


class Keyfile:
    """A cluster's key: one line of text, in a file that its owner alone can read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(os.path.expanduser(path)))  # a link is kept, what it names is written

    @classmethod
    def default(cls, cluster: str, user_home: str | os.PathLike[str] = "~") -> Keyfile:
        """The key of `cluster` in the user's folder."""
        return cls(config.default_authkey_file(Path(user_home), cluster))

    def read(self) -> bytes | None:
        """The key, or None where there is no file. Raises `HomeError` for what is no key, or no secret."""
        with _translated(f"cannot read the key {self.path}", f"run this as its owner, or {_OTHER_KEYFILE}"):
            data = self._read_private()
        if data is None:
            return None
        if not data.strip():
            raise HomeError(f"the key {self.path} is empty; remove it, or fill it: python -m p2pcluster key --set")
        if not _is_key(data):
            raise HomeError(
                f"{self.path} is not one line of at most {config.KEY_FILE_BYTES_MAX} bytes, so it is not a key; "
                f"{_OTHER_KEYFILE}"
            )
        return data.strip()

    def make(self) -> bytes:
        """The key that is there, or else a new random one; all who call this at one instant get the same."""
        key = self.read()
        if key is not None:
            return key
        with _translated(f"cannot write the key {self.path}", _OTHER_KEYFILE):
            _make_folder(self.path.parent)
            self._link_new(secrets.token_hex(config.KEY_RANDOM_BYTES).encode() + b"\n")
        key = self.read()
        if key is None:
            raise HomeError(f"the key {self.path} was removed while it was made; start again")
        return key

    def set_key(self, text: str) -> bytes:
        """Store `text`, less what is blank around it, in place of what is there; returns it as `read` will."""
        data = text.strip().encode(errors="surrogateescape") + b"\n"
        if not data.strip():
            raise HomeError(f"the key to set is empty; {_COPY_KEY}")
        if not _is_key(data):
            raise HomeError(f"the key to set is not one line of at most {config.KEY_FILE_BYTES_MAX} bytes; {_COPY_KEY}")
        with _translated(f"cannot write the key {self.path}", _OTHER_KEYFILE):
            if self.path.exists() and not self.path.is_file():  # root can rename over a device
                raise HomeError(f"the key {self.path} is not a regular file; {_OTHER_KEYFILE}")
            _make_folder(self.path.parent)
            _replace(self.path, data)
        return data.strip()

    def show(self) -> str:
        """The key as a line to copy. Raises `HomeError` where there is none."""
        key = self.read()
        if key is None:
            raise HomeError(f"there is no key {self.path}; start a node, or bring one: python -m p2pcluster key --set")
        return key.decode(errors="backslashreplace")

    def _read_private(self) -> bytes | None:
        # Without O_NONBLOCK a named pipe would be waited for.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise HomeError(f"the key {self.path} is not a regular file; {_OTHER_KEYFILE}")
            if os.name == "posix" and status.st_mode & 0o077:
                raise HomeError(f"the key {self.path} is open to others; make it yours alone: chmod 600 {self.path}")
            return file.read(config.KEY_FILE_BYTES_MAX + 1)

    def _link_new(self, data: bytes) -> None:
        """Name the file once it is whole, and only where the name is free; a rename would replace another's key."""
        temporary = _write_beside(self.path, data)
        try:
            with suppress(FileExistsError):
                os.link(temporary, self.path)
        finally:
            temporary.unlink()
        _sync_folder(self.path.parent)


def _is_key(data: bytes) -> bool:
    one_line = len(data.strip().splitlines()) == 1 and b"\0" not in data
    return one_line and len(data) <= config.KEY_FILE_BYTES_MAX


class _Lock:
    """A lock that ends with its holder. The file stays: once removed, two nodes could hold two files of its name."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            _lock_nowait(self._file)
            self._file.truncate(0)
            self._file.write(b"%d\n" % os.getpid())
        except BlockingIOError as error:
            holder = self._file.read(20).decode(errors="replace").strip()
            self._file.close()
            raise HomeError(_in_use(path.parent, holder)) from error
        except OSError:
            self._file.close()
            raise

    @property
    def held(self) -> bool:
        return not self._file.closed

    def release(self) -> None:
        self._file.close()


def _in_use(folder: Path, holder: str) -> str:
    own_folder = "give this node a folder of its own: --home DIR"
    if not holder.isdigit():  # it has just taken the lock
        return f"{folder} is in use by another node; stop that one, or {own_folder}"
    if int(holder) == os.getpid():
        return f"{folder} is in use by this very process ({holder}); close that node first, or {own_folder}"
    return f"{folder} is in use by the node with process id {holder}; stop it (kill {holder}), or {own_folder}"


if sys.platform == "win32":

    def _lock_nowait(file: IO[bytes]) -> None:
        file.seek(_WINDOWS_LOCK_AT)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
        finally:
            file.seek(0)

else:

    def _lock_nowait(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class _Mount:
    point: Path
    kind: str

    @property
    def is_network(self) -> bool:
        return self.kind.removeprefix("fuse.") in _NETWORK_FILE_SYSTEMS


def _read_mounts() -> str:
    """The system's table of mounts; nothing where there is none to read, such as on macOS."""
    try:
        return os.fsdecode(_MOUNTS.read_bytes())
    except OSError:
        return ""


def _parse_mounts(text: str) -> list[_Mount]:
    """Of each line the mount point, whose blanks and backslashes are octal numbers, and the type."""
    lines = [line.split(" ") for line in text.splitlines()]
    return [_Mount(Path(_unescape(words[1])), words[2]) for words in lines if len(words) >= 3]


def _unescape(text: str) -> str:
    """Octal numbers are bytes, of which several may make one character."""
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text)))


def _mount_of(folder: Path, mounts: list[_Mount]) -> _Mount:
    """Where `folder` is or would be: the deepest mount above it, and the last of several at one point."""
    above = [mount for mount in mounts if folder.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point.parts), default=_Mount(Path("/"), "unknown"))


def _local_folder(mounts: list[_Mount]) -> str:
    """A home for the advice that an error gives; the shell fills in the user."""
    local = (folder for folder in _LOCAL_FOLDERS if not _mount_of(folder, mounts).is_network)
    return f"{next(local, _LOCAL_FOLDERS[0])}/p2pcluster-$USER"


def _make_folder(folder: Path) -> None:
    """Make it and what is missing above it, each for this user alone."""
    if not folder.is_dir():
        if folder.parent != folder:
            _make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _refuse_foreign(folder: Path, elsewhere: str) -> None:
    """Who can write to a home can put code among its bundles."""
    if sys.platform == "win32":
        return
    status = folder.stat()
    if status.st_mode & stat.S_IWOTH:
        raise HomeError(f"{folder} can be written by every user; chmod 700 it, or use --home {folder}/node")
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        raise HomeError(f"{folder} belongs to another user, who could change what runs here; {elsewhere}")


def _replace(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, whole, also after a power failure."""
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink()
        raise
    _sync_folder(path.parent)


def _write_beside(path: Path, data: bytes) -> Path:
    """A new file in the same folder that this user alone can read, on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # a folder cannot be opened there, and NTFS journals names by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(what: str, what_next: str) -> Iterator[None]:
    """Turn what the system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise HomeError(f"{what}: {_reason(error)}; {what_next}") from error


def _reason(error: OSError) -> str:
    if error.errno in (errno.EEXIST, errno.ENOTDIR):  # "File exists" misleads where a folder was to be made
        return "a file is where a folder should be"
    return error.strerror or str(error)
