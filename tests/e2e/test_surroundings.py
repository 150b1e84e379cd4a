"""Where and how people start it: odd terminals, locales, flags of Python, and Ctrl-C before anything has begun."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness import Site

SHORT = """
    from p2pcluster import Pipeline, sink, source

    @source
    def Numbers():
        yield from range(3)

    @sink
    def Print(x):
        print(x)

    pipeline = Pipeline("{name}", Numbers >> Print)

    if __name__ == "__main__":
        pipeline.main()
"""


def test_without_a_standard_output_a_run_is_a_run(site: Site) -> None:
    """As under a service manager that closes it."""
    folder = site.project(SHORT.format(name="mute"))
    command = 'exec "$0" pipeline.py >&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=folder, env=site.environment(), stdin=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with_errors = site.do("run", folder, "--until-done", "--port", "none")
    assert with_errors.code == 2


def test_warnings_as_errors_and_python_without_asserts_change_nothing(site: Site) -> None:
    folder = site.project(SHORT.format(name="strict"))
    for flags in (["-O", "-W", "error"], ["-X", "dev", "-W", "error"]):
        command = [sys.executable, *flags, str(folder / "pipeline.py"), "--again"]
        done = subprocess.run(command, cwd=site.folder, env=site.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "Print | 2" in done.stdout


def test_a_locale_in_which_not_every_name_can_be_a_file_is_refused_with_the_way_out(site: Site) -> None:
    """A pipeline's name is a folder, and whoever deploys one elsewhere does not know the locale here."""
    folder = site.project(SHORT.format(name="ünï"))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = site.do("run", folder, "--until-done", **plain)
    assert done.code == 1
    assert "start it with PYTHONUTF8=1" in done.the_error()
    assert site.do("run", folder, "--until-done", **{**plain, "PYTHONUTF8": "1"}).code == 0


@pytest.mark.parametrize("module", ["p2pcluster.cli", "p2pcluster.bundle", "argparse"])
def test_ctrl_c_while_the_program_is_still_loading_ends_it_without_a_traceback(site: Site, module: str) -> None:
    (site.folder / "early").mkdir()
    (site.folder / "early" / "sitecustomize.py").write_text(textwrap.dedent(f"""
        import sys

        class Interrupted:
            def find_spec(self, name, *rest):
                if name == {module!r}:
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted())
    """))
    path = os.pathsep.join([str(site.folder / "early"), site.environment()["PYTHONPATH"]])
    done = site.do("status", PYTHONPATH=path)
    assert (done.code, done.out, done.err) == (130, "", "")
    folder = site.project(SHORT.format(name="early"))
    done = subprocess_of(site, folder / "pipeline.py", path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def subprocess_of(site: Site, file: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(file)], cwd=file.parent, env=site.environment(PYTHONPATH=path), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60, check=False)


def test_main_without_its_guard_is_told_what_to_write(site: Site) -> None:
    folder = site.project(SHORT.format(name="bare").replace('if __name__ == "__main__":', "if True:"))
    done = site.python_file(folder / "pipeline.py")
    assert done.code == 2
    assert done.the_error() == ('pipeline.py:15 calls main() when it is imported, as it is in each process of a run: write if __name__ == "__main__": '
                                "before it")


def test_a_file_of_a_package_is_told_how_a_package_is_run(site: Site) -> None:
    folder = site.project(SHORT.format(name="pack"), "mypkg", __init__="", helper="x = 1\n")
    (folder / "pipeline.py").write_text("from .helper import x\n" + (folder / "pipeline.py").read_text())
    done = site.do("run", folder / "pipeline.py", "--until-done")
    assert done.code == 1
    assert 'pipeline = "PACKAGE.pipeline:VARIABLE" under [tool.p2pcluster]' in done.the_error()
