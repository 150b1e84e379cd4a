"""Programs as people would write them, with nothing but the README: each runs as they would run it, and a check of its own looks at the end."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

from harness import ROOT, Site

PROGRAMS = ROOT / "tests" / "e2e" / "programs"


def program(site: Site, name: str) -> Path:
    """A copy of the program's folder, since projects are packed with all that is in them."""
    return Path(shutil.copytree(PROGRAMS / name, site.folder / name))


def check(site: Site, folder: Path, *words: object) -> str:
    done = site.python_file(folder / "check.py", *words)
    assert done.code == 0, done.err
    return done.out


def run(site: Site, folder: Path, *words: object) -> None:
    done = site.python_file(folder / "pipeline.py", *words, timeout_s=60)
    assert done.code == 0, (done.out, done.err)


def test_random_numbers(site: Site) -> None:
    folder = program(site, "random_numbers")
    run(site, folder)
    assert "as long as they should be" in check(site, folder, site.out("walks"))


def test_the_words_of_a_folder_that_is_not_in_the_project(site: Site) -> None:
    folder, chance = program(site, "word_count"), random.Random(7)
    texts = site.folder / "my texts, ä"
    words = ["the", "cat", "sat", "on", "MAT", "Straße", "été", "42"]
    for number in range(12):
        file = texts / f"part {number % 3}" / f"text {number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(" ".join(chance.choices(words, k=60)) for _ in range(5)), "utf-8")
    run(site, folder, "--set", f'folder="{texts}"')
    assert "3600 words, each counted once" in check(site, folder, site.out("words"), texts)


def test_thumbnails_with_a_slow_stage(site: Site) -> None:
    folder = program(site, "thumbnails")
    run(site, folder, "--slots", 3)
    assert check(site, folder, site.out("thumbnails")) == "60 thumbnails\n"


def test_a_web_log_with_calls_to_a_service_and_bad_lines_apart(site: Site) -> None:
    folder, chance = program(site, "web_log"), random.Random(11)
    log = site.folder / "access.log"
    lines = []
    for number in range(300):
        address = f"10.0.{number % 4}.{number % 50}"
        good = f'{address} - - [24/Nov/2026:10:00:{number % 60:02} +0000] "GET /page/{number} HTTP/1.1" 200 {number * 7}'
        lines.append(chance.choice(["", "garbage ü", good[2:30], "\x00"]) if number % 13 == 5 else good)
    log.write_text("\n".join(lines) + "\n", "utf-8")
    with subprocess.Popen([sys.executable, str(folder / "service.py")], stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline())
            run(site, folder, "--set", f'log="{log}"', "--set", f'service="http://127.0.0.1:{port}"')
        finally:
            service.kill()
    assert check(site, folder, site.out("weblog"), log) == "277 entries and 23 rejected\n"


def test_a_sweep_whose_results_another_script_reads(site: Site) -> None:
    folder = program(site, "sweep")
    node = site.start(cwd=folder)
    node.wait_for_line("run 1 starts")
    read = site.python_file(folder / "best.py")
    assert read.code == 0, read.err
    assert check(site, folder, read.out) == "the best fit is y = x\n"
