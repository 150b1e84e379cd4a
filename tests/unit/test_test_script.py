"""scripts/test.py finds the Pythons that work, leaves other people's environments alone, and says in one line why it cannot test."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = sys.version_info[:2]
OTHER = (3, 12) if HERE != (3, 12) else (3, 13)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its Pythons are written in sh")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in a project of its own, on a machine without a Python on its path."""
    spec = importlib.util.spec_from_file_location("test_script", ROOT / "scripts" / "test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    project = tmp_path / "project"
    project.mkdir()
    (project / "tests" / "unit").mkdir(parents=True)
    (project / "tests" / "unit" / "test_one.py").write_text("#")
    (project / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    monkeypatch.setattr(module, "ROOT", project)
    monkeypatch.setattr(sys, "executable", str(python(tmp_path / "own", HERE)))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return module


def python(folder: Path, version: tuple[int, int], body: str | None = None) -> Path:
    """A Python that says its version, makes environments of the same kind, installs and tests; or one that does `body`."""
    path = folder / f"python{version[0]}.{version[1]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + (body or f"""
case "$*" in
    *version_info*) echo {version[0]} {version[1]};;
    *"import pytest"*) test -e "$0.ready";;
    *"-m venv"*) for last; do :; done; /bin/mkdir -p "$last/bin"; /bin/cp "$0" "$last/bin/python";;
    *"-m pip"*) : > "$0.ready"; echo "pip $*" >> "$0.log";;
    *"-m pytest"*) echo "$*" >> "$0.log"; exit ${{PYTEST_CODE:-0}};;
esac
"""))
    path.chmod(0o755)
    return path


def said(folder: Path) -> list[str]:
    """What was asked of the Python of an environment."""
    return (folder / "bin" / "python.log").read_text().splitlines()


def test_an_environment_is_made_and_pytest_gets_the_words(script: ModuleType) -> None:
    for name, size in (("e2e/test_small.py", 1), ("e2e/test_large.py", 9), ("e2e/harness.py", 5), ("golden/data", 1)):
        (file := script.ROOT / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#" * size)
    assert script.main(["-k", "codec"]) == 0
    assert script.main([]) == 0
    first, *tests = said(script.ROOT / ".venv")
    assert first.endswith("pytest>=8 hypothesis>=6.100")
    assert tests[0] == "-m pytest -k codec", "nothing is installed twice"
    assert sorted(tests[1:]) == ["-m pytest tests/e2e/test_large.py", "-m pytest tests/e2e/test_small.py", "-m pytest tests/unit"]


def test_the_exit_code_is_that_of_pytest(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_CODE", "5")
    assert script.main([]) == 5


def test_all_pythons_are_those_that_start(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capfd: pytest.CaptureFixture[str]) -> None:
    python(tmp_path / "shims", OTHER, "echo no such version >&2; exit 127")
    python(tmp_path / "pyenv" / "versions" / f"{OTHER[0]}.{OTHER[1]}.9" / "bin", OTHER)
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    assert script.main(["--all-pythons", "-q"]) == 0
    assert said(script.ROOT / ".venv")[1:] == ["-m pytest -q"]
    assert said(script.ROOT / f".venv-{OTHER[0]}.{OTHER[1]}")[1:] == ["-m pytest --ignore=tests/e2e -q"]
    third = next(version for version in script.PYTHONS if version not in (HERE, OTHER))
    assert f"Python {third[0]}.{third[1]}: none here that starts" in capfd.readouterr().out


def test_a_failure_on_another_python_is_a_failure(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python(tmp_path / "bin", OTHER)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(script, "_test_part", lambda environment, *words: int(".venv-" in environment))
    assert script.main(["--all-pythons"]) == 1


def test_an_environment_of_another_python_is_left_alone(script: ModuleType) -> None:
    python(script.ROOT / ".venv" / "bin", OTHER).rename(script.ROOT / ".venv" / "bin" / "python")
    assert script.main(["-q"]) == 0
    assert not (script.ROOT / ".venv" / "bin" / "python.log").exists()
    assert said(script.ROOT / f".venv-{HERE[0]}.{HERE[1]}")[1:] == ["-m pytest -q"]


@pytest.mark.parametrize(("fails", "says"), [
    ('case "$*" in *"-m venv"*) exit 1;; *) exit 1;; esac', "install its venv and ensurepip modules"),
    ('case "$*" in *"-m venv"*) for last; do :; done; /bin/mkdir -p "$last/bin"; /bin/cp "$0" "$last/bin/python";; *) exit 1;; esac',
     "connect to a network that reaches a package index"),
])
def test_what_is_missing_is_said_in_one_line(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capfd: pytest.CaptureFixture[str], fails: str, says: str) -> None:
    monkeypatch.setattr(sys, "executable", str(python(tmp_path / "poor", HERE, fails)))
    assert script.main([]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("scripts/test.py: ") and says in line


def test_an_older_python_is_told_what_it_lacks() -> None:
    program = ("import runpy, sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1 (old)'; "
               f"runpy.run_path({str(ROOT / 'scripts' / 'test.py')!r}, run_name='__main__')")
    done: Any = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "scripts/test.py: this is Python 3.9.1; start it with 3.11 or later\n"
