"""Runs the tests in a virtual environment that it makes: with nothing but Python 3.11 or later, and a network the first time.

    python scripts/test.py                          every test, on this Python
    python scripts/test.py tests/unit -k codec      what follows goes to pytest
    python scripts/test.py --all-pythons            then also on the other Pythons of this machine that are supported

The environment is `.venv` in the project's folder; for the other Pythons, and where `.venv` is one of another Python, it is `.venv-3.X`.
Where nothing is chosen, the folders in tests, and the files in tests/e2e one by one, run two at a time, since the latter mostly wait for real
processes; each prints what it has to say when it is through. On the other Pythons they are left out: they take most of the time. The exit
code is pytest's: that of the first run that failed, else 0; 1 with a line that says why when no test could run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
PYTHONS = ((3, 11), (3, 12), (3, 13))  # those that --all-pythons looks for
END_TO_END = "tests/e2e"
LANES = 2  # pytest processes at a time: more would have tests wait for the processor in vain on a small machine
START_S = 60.0  # for a Python to say what it is


class CannotTest(Exception):
    """No test ran; one line that says why and what to do."""


def main(arguments: list[str]) -> int:
    """Run the tests; returns the exit code."""
    all_pythons = "--all-pythons" in arguments
    wanted = [argument for argument in arguments if argument != "--all-pythons"]
    try:
        codes = [_test(sys.executable, sys.version_info[:2], wanted)] if wanted else _test_all(sys.executable, sys.version_info[:2])
        if all_pythons:
            codes += _test_others(wanted)
    except CannotTest as error:
        print(f"scripts/test.py: {error}", file=sys.stderr)
        return 1
    return next((code for code in codes if code), 0)


def _test(python: str, version: tuple[int, int], arguments: list[str]) -> int:
    command = [_environment(python, version), "-m", "pytest", *arguments]
    _announce(version, arguments)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _test_all(python: str, version: tuple[int, int]) -> list[int]:
    """Every test, in parts: folder by folder, and those end to end file by file, the large ones first."""
    environment = _environment(python, version)
    parts = sorted({file.parent for file in (ROOT / "tests").glob("*/test_*.py")} - {ROOT / END_TO_END}, reverse=True)
    parts += sorted((ROOT / END_TO_END).glob("test_*.py"), key=lambda file: file.stat().st_size, reverse=True)
    return _test_parts([(environment, part.relative_to(ROOT).as_posix()) for part in parts])


def _test_others(wanted: list[str]) -> list[int]:
    """All but the tests end to end, on the other Pythons."""
    environments = [_environment(python, version) for version, python in _other_pythons()]
    return _test_parts([(environment, f"--ignore={END_TO_END}", *wanted) for environment in environments])


def _test_parts(parts: list[tuple[str, ...]]) -> list[int]:
    """Each part is an environment's Python and the words for its pytest; as many at a time as there are lanes."""
    print(f"--- {len(parts)} parts, {LANES} at a time; what each has to say comes when it is through", flush=True)
    with ThreadPoolExecutor(LANES) as lanes:
        runs = [lanes.submit(_test_part, *part) for part in parts]
        try:
            return [run.result() for run in runs]
        finally:
            lanes.shutdown(cancel_futures=True)  # when this script is interrupted; else all have ended


def _test_part(environment: str, *words: str) -> int:
    command = [environment, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    print(f"--- {shlex.join(command)}\n{done.stdout.decode(errors='replace')}", flush=True)
    return done.returncode


def _announce(version: tuple[int, int], arguments: list[str]) -> None:
    print(f"--- Python {_dotted(version)}: {shlex.join(['pytest', *arguments])}", flush=True)


# ---- environments


def _environment(python: str, version: tuple[int, int]) -> str:
    """The Python of an environment of this version in which the tests can run; what is missing is made or installed."""
    folder = _folder(version)
    inside = _inside(folder)
    if _can(inside, "import pytest, hypothesis"):
        return inside
    anew = ["--clear"] if folder.exists() and _version_of(inside) != version else []
    made = subprocess.run([python, "-m", "venv", *anew, str(folder)], check=False)
    if made.returncode:
        raise CannotTest(f"{python} could not make a virtual environment (its words are above): install its venv and ensurepip modules, "
                         f"which some systems pack apart, such as in python{_dotted(version)}-venv")
    packages = _test_packages()
    installed = subprocess.run([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=False)
    if installed.returncode:
        raise CannotTest(f"{' and '.join(packages)} could not be installed (pip's words are above): connect to a network that reaches a "
                         f"package index, or install them into {folder} by hand")
    return inside


def _folder(version: tuple[int, int]) -> Path:
    """`.venv`, unless somebody has made that with another Python."""
    plain = ROOT / ".venv"
    if version == sys.version_info[:2] and (not plain.exists() or _version_of(_inside(plain)) == version):
        return plain
    return ROOT / f".venv-{_dotted(version)}"


def _inside(folder: Path) -> str:
    return str(folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python")


def _test_packages() -> list[str]:
    """What the `test` extra of pyproject.toml names."""
    import tomllib  # not at the top: an older Python is to hear what it lacks, and this is what it lacks first

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    packages: list[str] = project["optional-dependencies"]["test"]
    return packages


# ---- Pythons


def _other_pythons() -> list[tuple[tuple[int, int], str]]:
    """The supported versions but this one, each with the first of its Pythons that works; says which are not there."""
    found = []
    for version in PYTHONS:
        if version == sys.version_info[:2]:
            continue
        works = (path for path in _candidates(version) if _version_of(path) == version and _can(path, "import venv, ensurepip"))
        python = next(works, None)
        if python is None:
            print(f"--- Python {_dotted(version)}: none here that starts and can make an environment, so not tested", flush=True)
        else:
            found.append((version, python))
    return found


def _candidates(version: tuple[int, int]) -> list[str]:
    """Where such a Python may be: on the path, and where pyenv keeps those that its folder on the path does not start."""
    name = f"python{_dotted(version)}" + (".exe" if os.name == "nt" else "")
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += sorted(pyenv.glob(f"versions/{_dotted(version)}*/bin"), reverse=True)
    return [str(folder / name) for folder in folders if (folder / name).is_file()]


def _version_of(python: str) -> tuple[int, int] | None:
    """The version of a Python; None for one that does not start, as pyenv's on the path may not."""
    words = (_said(python, "import sys; print(*sys.version_info[:2])") or "").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def _can(python: str, statement: str) -> bool:
    return _said(python, statement) is not None


def _said(python: str, program: str) -> str | None:
    """What a one-line program prints; None if it fails."""
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=START_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        sys.exit(f"scripts/test.py: this is Python {sys.version.split()[0]}; start it with {_dotted(OLDEST)} or later")
    sys.exit(main(sys.argv[1:]))
