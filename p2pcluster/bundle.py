"""A project as a bundle: which files belong to it, what its version is, and the zip that carries it to other nodes.

Decided here alone: what is shipped (git's opinion, where there is a git), what a version is, which names every disk can
hold, and how a zip becomes a folder that is either whole or absent. Unknown here: what a pipeline is. This file
reads a project's pyproject.toml and the bytes of its files; it imports and runs none of them.

The version is a hash over names, contents and executable bits, never over the zip: two builds of zlib compress the same
file to different bytes. `unpack` reads the dialect that `pack` writes (regular files end to end, two modes, no extras)
and refuses every other zip; one table of rules about names serves both, so what was packed can be unpacked.
"""

from __future__ import annotations

import copy
import errno
import fnmatch
import hashlib
import heapq
import io
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import tomllib
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from p2pcluster.core import pythons
from p2pcluster.errors import BundleRejected, HomeError, ProjectError

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What a bundle may hold; `pack` and `unpack` obey the same numbers.

    `bytes_max` counts the files as they lie on the disk, not compressed: the number that a user can look up.
    """

    bytes_max: int = 64 * _MIB
    entries_max: int = 100_000
    ratio_max: int = 1_100  # per file; deflate itself ends at 1032:1, so an honest file of zeros passes


@dataclass(frozen=True)
class Bundle:
    """A packed project.

    `files` maps each name (relative, with slashes) to the SHA-256 of its content, followed by " x" where it is
    executable. `version` is a function of `files` alone, `zip_sha256` one of `zip_bytes`. `notes` are for the user.
    """

    zip_bytes: bytes
    zip_sha256: str
    version: str
    files: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Project:
    """Where a pipeline is to be imported from.

    `variable` is None when the module is to be searched for its pipeline. `import_paths` are relative to the project's
    folder, so that they hold on every node, in the order of `sys.path`. `excludes` are the user's patterns for `pack`;
    `python` says which Pythons the project admits, None where its pyproject.toml does not.
    """

    folder: Path
    module: str
    variable: str | None
    import_paths: tuple[str, ...]
    excludes: tuple[str, ...]
    python: str | None = None


# --- Which files belong to a project


class _Patterns:
    """Globs over relative names: without a slash they mean a file or folder anywhere, with one they start at the root.

    `*` crosses slashes, so `data/*.csv` reaches the sub-folders of data too.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        trimmed = [pattern.removeprefix("./").rstrip("/") for pattern in patterns]
        self._part = self._compiled(pattern for pattern in trimmed if "/" not in pattern)
        self._path = self._compiled(pattern.lstrip("/") for pattern in trimmed if "/" in pattern)

    @staticmethod
    def _compiled(patterns: Iterable[str]) -> re.Pattern[str]:
        never = r"(?!)"
        return re.compile("|".join([fnmatch.translate(pattern) for pattern in patterns] or [never]))

    def name(self, path: str) -> bool:
        """Whether a pattern means exactly this file or folder."""
        return bool(self._part.match(path.rpartition("/")[2]) or self._path.match(path))

    def cover(self, path: str) -> bool:
        """Whether a pattern means this file or a folder above it."""
        return any(self.name(above) for above in _with_parents(path))


_JOURNAL = "journal.sqlite3"
_DEFAULT_EXCLUDES = _Patterns(
    [
        *(".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", "node_modules", ".tox", "*.egg-info"),
        *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".DS_Store"),
        ".#*",  # Emacs keeps a broken link of this name beside each unsaved file
        *(".p2pcluster", f"{_JOURNAL}*", "*.sqlite3-wal", "*.sqlite3-shm", "*.sqlite3-journal"),
    ]
)

# What git sets for its hooks; inherited, it would make git answer for another folder than ours.
_GIT_LOCAL = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
_GIT_TIMEOUT_S = 60
_GIT_SUBMODULE = "160000 "


def _with_parents(name: str) -> Iterator[str]:
    """`a/b/c` gives `a`, `a/b`, `a/b/c`."""
    slash = name.find("/")
    while slash != -1:
        yield name[:slash]
        slash = name.find("/", slash + 1)
    yield name


def _git(folder: str, *arguments: str) -> list[str] | None:
    """What git lists in this folder; None where git is missing, fails, or knows of no checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_LOCAL}
    # A file system monitor that git starts would inherit our pipe and keep it open.
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "-z", *arguments]
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [os.fsdecode(name) for name in answer.stdout.split(b"\0") if name]


def _names_by_git(root: str, prefix: str, excludes: _Patterns) -> list[str] | None:
    """The tracked files and the untracked ones that are not ignored, below `prefix` ("" or "sub/folder/").

    The default excludes bind only what is untracked: whoever commits a folder called venv means it.
    """
    tracked = _git(os.path.join(root, prefix), "--stage")
    untracked = None if tracked is None else _git(os.path.join(root, prefix), "--others", "--exclude-standard")
    if tracked is None or untracked is None:
        return None
    homes = {prefix + name.rpartition("/")[0] for name in untracked if name.endswith(f"/{_JOURNAL}")}
    names = []
    for line in tracked:
        name = prefix + line.partition("\t")[2]
        names += _names_of_repository(root, name, excludes) if line.startswith(_GIT_SUBMODULE) else [name]
    for line in untracked:
        name = prefix + line.rstrip("/")
        if _DEFAULT_EXCLUDES.cover(name) or not homes.isdisjoint(_with_parents(name)):
            continue
        names += _names_of_repository(root, name, excludes) if line.endswith("/") else [name]
    return names


def _names_of_repository(root: str, name: str, excludes: _Patterns) -> list[str]:
    """The files of a repository inside a repository, which the outer git shows as one name."""
    path = os.path.join(root, name)
    if os.path.islink(path):
        return [name]
    if not os.path.isdir(path):
        return []
    # Without a .git of its own, git would answer for the outer repository once more, and so for ever.
    names = _names_by_git(root, f"{name}/", excludes) if os.path.lexists(os.path.join(path, ".git")) else None
    return _names_by_walk(root, f"{name}/", excludes) if names is None else names


def _names_by_walk(root: str, prefix: str, excludes: _Patterns) -> list[str]:
    """Every name below `prefix` that is no folder, except for the excludes and the homes of nodes."""
    names: list[str] = []
    folders = [prefix]
    while folders:
        folder = folders.pop()
        entries = _scan(root, folder)
        if folder and any(entry.name == _JOURNAL for entry in entries):
            continue
        for entry in entries:
            name = folder + entry.name
            if _DEFAULT_EXCLUDES.name(name) or excludes.name(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{name}/")
            else:
                names.append(name)
        _check_count(names)
    return names


def _scan(root: str, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder or root, error) from error


# --- What stands behind each name


class _File(NamedTuple):
    name: str
    path: str
    size: int
    executable: bool


class _Tree:
    """The names of a project resolved to files: links followed, and held inside the folder.

    A link to a file stands for the file's content, a link to a folder for the listed files of that folder.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._real_paths: dict[str, str] = {}

    def files(self, names: Iterable[str]) -> list[_File]:
        """The regular files behind the names, sorted; deleted ones, sockets, fifos and devices are left out."""
        listed = sorted(set(names), reverse=True)
        pending = list(listed)
        files: dict[str, _File] = {}
        while pending:
            name = pending.pop()
            _check_name(name)
            status = self._status(name)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                pending += self._names_behind_link(name, listed)
            elif stat.S_ISREG(status.st_mode):
                executable = bool(status.st_mode & stat.S_IXUSR)
                files[name] = _File(name, os.path.join(self._root, name), status.st_size, executable)
            # Links to folders that hold links to folders can double the names at each step.
            _check_count(pending)
            _check_count(files)
        return [files[name] for name in sorted(files)]

    def _status(self, name: str) -> os.stat_result | None:
        """The status of what the name stands for, None when nothing is there any more."""
        path = os.path.join(self._root, name)
        real = self._real(path)
        if not self._inside(real):
            raise BundleRejected(
                f"{_shown(name)} leads out of the project, to {_shown(real)}: other machines lack that; "
                f"copy it into the project or exclude the link ({_HOW_TO_EXCLUDE})"
            )
        try:
            return os.stat(real)
        except OSError as error:
            if os.path.islink(path):
                raise BundleRejected(
                    f"{_shown(name)} is a broken link ({error.strerror}): "
                    f"repair it, remove it or exclude it ({_HOW_TO_EXCLUDE})"
                ) from error
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return None
            raise _unreadable(name, error) from error

    def _real(self, path: str) -> str:
        """`os.path.realpath`, which asks the disk about each folder once: for a large tree that is most of the cost."""
        if path == self._root:
            return path
        if path not in self._real_paths:
            folder, base = os.path.split(path)
            here = os.path.join(self._real(folder), base)
            self._real_paths[path] = os.path.realpath(here) if os.path.islink(here) else here
        return self._real_paths[path]

    def _inside(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)

    def _names_behind_link(self, name: str, listed: Sequence[str]) -> list[str]:
        target = self._real(os.path.join(self._root, name))
        folders = [self._root, *(self._real(os.path.join(self._root, above)) for above in _with_parents(name))]
        if target in folders[:-1]:
            raise BundleRejected(
                f"{_shown(name)} is a link to a folder that it lies in, so the files would have no end: "
                f"remove it or exclude it ({_HOW_TO_EXCLUDE})"
            )
        prefix = os.path.relpath(target, self._root).replace(os.sep, "/") + "/"
        return [f"{name}/{other.removeprefix(prefix)}" for other in listed if other.startswith(prefix)]


_HOW_TO_EXCLUDE = 'a line in .gitignore, or [tool.p2pcluster] exclude = ["NAME"] in pyproject.toml'


def _shown(text: str) -> str:
    """A name as it may stand in a message of one line."""
    return text if text.isprintable() else ascii(text)


def _unreadable(name: str, error: OSError) -> BundleRejected:
    reason = error.strerror or type(error).__name__
    return BundleRejected(
        f"{_shown(name)} cannot be read ({reason}): "
        f"give this user the right to read it or exclude it ({_HOW_TO_EXCLUDE})"
    )


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f} MiB"


def _check_count(names: Collection[str]) -> None:
    if len(names) <= Limits.entries_max:
        return
    folders = Counter(name.rpartition("/")[0] or "." for name in names)
    fullest = ", ".join(f"{_shown(folder)} ({count})" for folder, count in folders.most_common(3))
    raise BundleRejected(
        f"the project has more than {Limits.entries_max} files, the most in {fullest}: "
        f"exclude what the stages do not read ({_HOW_TO_EXCLUDE})"
    )


def _too_large(files: Collection[_File], bytes_max: int) -> BundleRejected:
    total = sum(file.size for file in files)
    largest = heapq.nlargest(10, files, key=lambda file: file.size)
    named = ", ".join(f"{_shown(file.name)} {_mib(file.size)}" for file in largest)
    return BundleRejected(
        f"the project has {_mib(total)} in {len(files)} files, more than the {_mib(bytes_max)} that are shipped; "
        f"the largest: {named}; exclude what the stages do not read ({_HOW_TO_EXCLUDE})"
    )


# --- Which names every disk can hold

_NAME_BYTES_MAX = 1_024  # the longest path of macOS
_PART_BYTES_MAX = 255
_DEPTH_MAX = 64  # shutil.rmtree keeps a frame and a descriptor per level; some systems give 256 descriptors
_DRIVE = re.compile(r"[A-Za-z]:")
_PORTS = [port + digit for port in ("COM", "LPT") for digit in "0123456789¹²³"]
_DEVICES = frozenset(["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS])


def _name_fault(name: str) -> str | None:
    """Why this name cannot be in a bundle, or None."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    parts = name.split("/")
    if "\0" in name or "\\" in name:
        return "holds a NUL or a backslash"
    if len(encoded) > _NAME_BYTES_MAX or len(parts) > _DEPTH_MAX:
        return f"is longer than {_NAME_BYTES_MAX} bytes or deeper than {_DEPTH_MAX} folders"
    return next(filter(None, map(_part_fault, parts)), None)


def _part_fault(part: str) -> str | None:
    if not part.rstrip(". "):  # Windows drops dots and spaces at the end, so that ".. " is ".."
        return "is absolute, or has a part that is empty or of dots alone and can lead out of the folder"
    if _DRIVE.match(part):
        return "begins like a drive of Windows"
    if part.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        return "is the name of a device on Windows"
    if len(part.encode()) > _PART_BYTES_MAX:
        return f"has a part of more than {_PART_BYTES_MAX} bytes"
    return None


def _check_name(name: str) -> None:
    if fault := _name_fault(name):
        raise BundleRejected(f"{_shown(name)} {fault}: rename it or exclude it ({_HOW_TO_EXCLUDE})")


def _folded(path: str) -> str:
    """Equal for two paths that are one on some disk: it may ignore case, the spelling of accents, dots at the end."""
    caseless = unicodedata.normalize("NFC", path.casefold())
    return "/".join(part.rstrip(". ") for part in caseless.split("/"))


def _clash(names: Iterable[str]) -> str | None:
    """What is wrong with names of which two are one on some disk, be they files, folders, or one of each."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    spelled: set[str] = set()
    for name in names:
        for folder in list(_with_parents(name))[:-1]:
            if folder not in spelled and folders.setdefault(_folded(folder), folder) != folder:
                return _one_name(folders[_folded(folder)], folder)
            spelled.add(folder)
        folded = _folded(name)
        if folded in files:
            return _one_name(files[folded], name)
        files[folded] = name
    both = files.keys() & folders.keys()
    return _one_name(files[min(both)], folders[min(both)]) if both else None


def _one_name(first: str, second: str) -> str:
    return f"{_shown(first)} and {_shown(second)} are one name on a disk that ignores case or the spelling of accents"


# --- Packing

_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_MODE_PLAIN = stat.S_IFREG | 0o644
_MODE_EXECUTABLE = stat.S_IFREG | 0o755
_SYSTEM_UNIX = 3
_COMPRESSION_LEVEL = 6


def pack(folder: Path, bytes_max: int = Limits.bytes_max, extra_excludes: Iterable[str] = ()) -> Bundle:
    """The project in `folder` as a bundle.

    In a git checkout: what git tracks, and what is neither tracked nor ignored, as it lies in the working tree.
    Elsewhere, and where git gives no answer: the whole tree but for the default excludes. `extra_excludes` are globs,
    which without a slash mean a file or folder anywhere, and with one a path from the root. Raises `BundleRejected`.
    """
    assert 0 < bytes_max <= 1024 * _MIB, "zip64 has no place in our dialect"
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise BundleRejected(f"{_shown(root)} is not a folder: name the folder of a project")
    excludes = _Patterns(extra_excludes)
    names = _names_by_git(root, "", excludes)
    notes = () if names else _notes_without_git(root)
    # Git lists nothing in a folder that it ignores whole, such as a project inside a repository of dot-files.
    names = names or _names_by_walk(root, "", excludes)
    files = _Tree(root).files(name for name in names if not excludes.cover(name))
    if fault := _clash(file.name for file in files):
        raise BundleRejected(f"{fault}: rename one of them or exclude it ({_HOW_TO_EXCLUDE})")
    if sum(file.size for file in files) > bytes_max:
        raise _too_large(files, bytes_max)
    zip_bytes, hashes = _zipped(files, bytes_max)
    return Bundle(zip_bytes, hashlib.sha256(zip_bytes).hexdigest(), version_of(hashes), hashes, notes)


def version_of(files: Mapping[str, str]) -> str:
    """The version of a project with these files: equal on every machine that holds the same ones."""
    digest = hashlib.sha256(b"p2pcluster bundle 1\0")
    for name in sorted(files):
        digest.update(f"{files[name]}\0{name}\0".encode())
    return digest.hexdigest()


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names that differ between two `Bundle.files`, each behind `+` (new), `-` (gone) or `~` (changed)."""
    signs = {name: "~" if name in old and name in new else "+" if name in new else "-" for name in {*old, *new}}
    return [signs[name] + _shown(name) for name in sorted(signs) if old.get(name) != new.get(name)]


def _notes_without_git(root: str) -> tuple[str, ...]:
    if not any(os.path.lexists(os.path.join(above, ".git")) for above in (root, *map(str, Path(root).parents))):
        return ()
    return (
        "git lists no file here (it is missing, it failed, or it ignores this folder), so .gitignore was not heeded: "
        "every file is shipped that is not excluded by default or by [tool.p2pcluster] exclude",
    )


def _zipped(files: Sequence[_File], bytes_max: int) -> tuple[bytes, dict[str, str]]:
    buffer = io.BytesIO()
    hashes: dict[str, str] = {}
    left = bytes_max
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in files:
            content = _content(file, left)
            if content is None:
                continue
            if len(content) > left:  # it has grown since its size was asked for
                raise _too_large([*files, file._replace(size=len(content))], bytes_max)
            left -= len(content)
            hashes[file.name] = hashlib.sha256(content).hexdigest() + (" x" if file.executable else "")
            info = zipfile.ZipInfo(file.name, _TIMESTAMP)
            info.create_system = _SYSTEM_UNIX
            info.external_attr = (_MODE_EXECUTABLE if file.executable else _MODE_PLAIN) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, _COMPRESSION_LEVEL)
    return buffer.getvalue(), hashes


def _content(file: _File, bytes_max: int) -> bytes | None:
    """The bytes of a file, at most one more than the maximum; None when it has been deleted meanwhile."""
    try:
        with open(file.path, "rb") as stream:
            return stream.read(bytes_max + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(file.name, error) from error


# --- Unpacking

_UNPACKING = ".unpacking-"
_PART_BYTES = 256 * 1024
_SYNCS_AT_ONCE = 16
_LOCAL_HEADER = struct.Struct("<26xHH")
_FLAG_UTF8 = 0x800
# zipfile documents the first alone; by its source, damaged bytes can make it raise any of these.
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError)

# Each call removes what earlier ones left behind, and must not take its neighbour's work for that. Other processes are
# kept away by the lock of the home.
_one_at_a_time = threading.Lock()


def unpack(zip_bytes: bytes, zip_sha256: str, destination: Path, limits: Limits = Limits()) -> None:
    """Makes `destination` the folder with the files of a bundle; does nothing where that folder stands already.

    A destination that exists is complete: the files are written and synced beside it, and renamed as the last step.
    A process that is killed leaves a folder `.unpacking-*` there, which the next call removes. Raises `BundleRejected`
    for a zip that is not the promised one or not one of `pack`'s, `HomeError` for a disk that is full or refuses.
    """
    if hashlib.sha256(zip_bytes).hexdigest() != zip_sha256:
        raise BundleRejected(f"the bundle does not have the hash {zip_sha256[:12]} that was announced: fetch it again")
    with _one_at_a_time, _opened(zip_bytes) as archive:
        entries = _checked_entries(archive, zip_bytes, limits)
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            for leftover in destination.parent.glob(f"{_UNPACKING}*"):
                shutil.rmtree(leftover)
            if not _is_complete(destination):
                _unpack_beside(archive, entries, destination, limits)
        except OSError as error:
            raise _home_error(destination.parent, error) from error


def _opened(zip_bytes: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(zip_bytes))
    except _ZIP_FAULTS as error:
        raise _not_ours(f"it is no zip ({_shown(str(error))})") from error


def _not_ours(reason: str) -> BundleRejected:
    return BundleRejected(f"the bundle is refused because {reason}: deploy the project again from a node that holds it")


def _checked_entries(archive: zipfile.ZipFile, zip_bytes: bytes, limits: Limits) -> list[zipfile.ZipInfo]:
    """The entries of the archive, each of which `pack` could have written."""
    entries = archive.infolist()
    if len(entries) > limits.entries_max:
        raise _not_ours(f"it holds {len(entries)} files, more than {limits.entries_max}")
    end = 0
    for entry in entries:
        name = entry.orig_filename  # zipfile cuts `filename` at a NUL
        if fault := _entry_fault(entry):
            raise _not_ours(f"{_shown(name)} {fault}")
        # End to end, without extra fields: no two entries can share bytes, which is how a small zip hides a large one.
        start = end
        end += _LOCAL_HEADER.size + len(name.encode()) + entry.compress_size
        if entry.header_offset != start or end > archive.start_dir:
            raise _not_ours(f"{_shown(name)} does not begin where the file before it ends")
        if _LOCAL_HEADER.unpack_from(zip_bytes, start) != (len(name.encode()), 0):
            raise _not_ours(f"{_shown(name)} has two headers that differ")
    if end != archive.start_dir:
        raise _not_ours("bytes that belong to no file lie before its directory")
    if fault := _clash(entry.orig_filename for entry in entries):
        raise _not_ours(fault)
    return entries


def _entry_fault(entry: zipfile.ZipInfo) -> str | None:
    if fault := _name_fault(entry.orig_filename):
        return fault
    if entry.external_attr >> 16 not in (_MODE_PLAIN, _MODE_EXECUTABLE):
        return "is not a regular file (a link, a folder or a device)"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.extra:
        return "is stored in a way that bundles do not use"
    if entry.flag_bits not in (0, _FLAG_UTF8):
        return "is encrypted, or its sizes follow its content"
    return None


def _is_complete(destination: Path) -> bool:
    """Whether the files are there; an empty folder is one that somebody made for us to fill."""
    return destination.is_dir() and any(destination.iterdir())


def _unpack_beside(
    archive: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], destination: Path, limits: Limits
) -> None:
    beside = Path(tempfile.mkdtemp(prefix=_UNPACKING, dir=destination.parent))
    try:
        _write_entries(archive, entries, beside, limits)
        # After a loss of power a rename can be on the disk without what lies below it: a folder that looks complete.
        # Together, because a thousand files take seconds one after the other, and a disk writes many in one go.
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            list(pool.map(_sync, [beside, *beside.rglob("*")]))
        if destination.is_dir():
            destination.rmdir()
        os.rename(beside, destination)
        _sync(destination.parent)
    except BaseException:
        # What cannot be removed now is removed by the next call; the first error is the one to report.
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write_entries(
    archive: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], folder: Path, limits: Limits
) -> None:
    bytes_left = limits.bytes_max
    for entry in entries:
        path = folder.joinpath(*entry.orig_filename.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        bytes_left -= _write_entry(archive, entry, path, min(bytes_left, limits.ratio_max * entry.compress_size))


def _write_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, bytes_max: int) -> int:
    """Writes one file and returns its size, which is counted: what the headers say is compared, not believed."""
    mode = 0o777 if entry.external_attr >> 16 == _MODE_EXECUTABLE else 0o666
    written = 0
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as sink:
        for part in _parts(archive, entry):
            written += len(part)
            if written > bytes_max:
                raise _not_ours(f"{_shown(entry.orig_filename)} unpacks to more than a bundle may hold")
            sink.write(part)
        if written != entry.file_size:
            raise _not_ours(f"{_shown(entry.orig_filename)} is not as long as it claims")
    return written


def _parts(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of an entry in pieces; a generator, so that the errors of the zip and of the disk stay apart."""
    to_its_end = copy.copy(entry)
    to_its_end.file_size = sys.maxsize  # zipfile would stop where the header says, and call that the file
    try:
        with archive.open(to_its_end) as source:
            while part := source.read(_PART_BYTES):
                yield part
    except _ZIP_FAULTS as error:
        raise _not_ours(f"{_shown(entry.orig_filename)} is damaged ({_shown(str(error))})") from error


def _sync(path: Path) -> None:
    windows = os.name == "nt"  # which cannot sync a folder, nor a file that is not open for writing
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _home_error(folder: Path, error: OSError) -> HomeError:
    where = _shown(str(folder))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HomeError(f"a bundle cannot be unpacked in {where}, the disk is full: make room or use another --home")
    reason = _shown(str(error))
    return HomeError(f"a bundle cannot be unpacked in {where} ({reason}): make it writable or use another --home")


# --- Finding the project

_PYPROJECT = "pyproject.toml"
_ENTRY_POINT = re.compile(r"(?P<module>[^:]+):(?P<variable>[^:]+)")
_NOT_A_MODULE = frozenset(["__main__", "__init__", "p2pcluster"])  # importing them gives something else


def find_project(target: str | None, cwd: Path) -> Project | None:
    """The project that `run` and `deploy` mean by DIR, FILE.py, FILE.py:NAME or nothing; None for a folder without one.

    Raises `ProjectError` for what is missing or malformed. Reads no line of the project's code.
    """
    if target is None:
        return _project_in(cwd)
    path, variable = _split_target(target, cwd)
    if target and os.path.isdir(path):
        if variable is not None:
            raise ProjectError(f"{_shown(target)} names a variable in a folder: write FILE.py:NAME or the folder alone")
        return _project_in(path)
    if not os.path.exists(path) or not target:
        shown = _shown(target) or "file without a name"
        raise ProjectError(f"there is no {shown} here: name a folder, FILE.py or FILE.py:NAME")
    return _project_of_file(path, variable)


def _split_target(target: str, cwd: Path) -> tuple[Path, str | None]:
    head, colon, name = target.rpartition(":")
    drive_alone = len(head) == 1 and head.isalpha()
    if not colon or drive_alone or os.path.exists(cwd / target):
        return cwd / target, None
    return cwd / head, name


def _project_of_file(path: Path, variable: str | None) -> Project:
    shown = _shown(str(path))
    if path.suffix != ".py":
        raise ProjectError(f"{shown} is not a Python file: name a folder, FILE.py or FILE.py:NAME")
    if not path.stem.isidentifier() or path.stem in _NOT_A_MODULE:
        raise ProjectError(f"{shown} cannot be imported under that name: rename it, to pipeline.py for instance")
    if variable is not None and not variable.isidentifier():
        raise ProjectError(f"{_shown(variable)!r} is not the name of a variable in {shown}: write FILE.py:NAME")
    folder = path.parent.resolve()
    return _project(folder, path.stem, variable, _settings(folder))


def _project_in(folder: Path) -> Project | None:
    folder = folder.resolve()
    settings = _settings(folder)
    if "pipeline" not in settings:
        return _project(folder, "pipeline", None, settings) if os.path.isfile(folder / "pipeline.py") else None
    value = settings["pipeline"]
    match = _ENTRY_POINT.fullmatch(value) if isinstance(value, str) else None
    if not match or not all(part.isidentifier() for part in [*match["module"].split("."), match["variable"]]):
        raise ProjectError(
            f"{_shown(str(folder / _PYPROJECT))} has the pipeline {value!r}, which is not of the form "
            '"package.module:variable": correct it under [tool.p2pcluster]'
        )
    project = _project(folder, match["module"], match["variable"], settings)
    _check_module_exists(project)
    return project


def _project(folder: Path, module: str, variable: str | None, settings: Mapping[str, Any]) -> Project:
    import_paths = (".", "src") if os.path.isdir(folder / "src") else (".",)
    excludes = settings.get("exclude", [])
    if not isinstance(excludes, list) or not all(isinstance(pattern, str) for pattern in excludes):
        raise ProjectError(
            f"{_shown(str(folder / _PYPROJECT))} has an exclude that is not a list of patterns: "
            'write exclude = ["data/*.bin"] under [tool.p2pcluster]'
        )
    python = settings.get("python")
    if python is not None and not pythons.is_requirement(python):
        raise ProjectError(
            f"{_shown(str(folder / _PYPROJECT))} has the python {_shown(repr(python)):.80}, which is not a list of versions, each behind "
            '>=, >, <=, <, == or !=: write python = ">=3.11, <3.14" under [tool.p2pcluster]'
        )
    return Project(folder, module, variable, import_paths, tuple(excludes), python)


def _check_module_exists(project: Project) -> None:
    relative = project.module.replace(".", "/")
    sources = (f"{relative}.py", f"{relative}/__init__.py")
    if not any(os.path.isfile(project.folder / path / source) for path in project.import_paths for source in sources):
        raise ProjectError(
            f"{_shown(str(project.folder / _PYPROJECT))} names the module {project.module}, but there is no "
            f"{relative}.py under {' or '.join(project.import_paths)}: correct the pipeline under [tool.p2pcluster]"
        )


def _settings(folder: Path) -> Mapping[str, Any]:
    """The table [tool.p2pcluster] of the project, empty where there is none."""
    path = folder / _PYPROJECT
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = _shown(str(error))
        raise ProjectError(f"{_shown(str(path))} cannot be read ({reason}): correct it or remove it") from error
    tool = tables.get("tool", {})
    settings = tool.get("p2pcluster", {}) if isinstance(tool, dict) else None
    if not isinstance(settings, dict):
        raise ProjectError(f"{_shown(str(path))} has a [tool.p2pcluster] that is not a table: correct it or remove it")
    return settings
