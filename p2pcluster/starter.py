"""The project that `new` writes: the smallest one that shows a source, a stage, a sink, and a test without a cluster."""

from __future__ import annotations

from pathlib import Path

from p2pcluster.errors import WrongUsage

_PIPELINE = '''\
"""{title}: run it with python pipeline.py, and its test with python -m pytest."""

from p2pcluster import Pipeline, sink, source, stage


@source
def Numbers():
    """Where items come from: run once, to its end."""
    for number in range(1, 11):
        yield {{"number": number}}


@stage(retries=2)
def Square(item):
    """What is done with each item, in as many processes as it needs."""
    return item["number"] ** 2


@sink
def Print(square):
    """Where they end."""
    print(square)


pipeline = Pipeline({name!r}, Numbers >> Square >> Print)

if __name__ == "__main__":
    pipeline.main()
'''
_TEST = '''\
"""Tests of the pipeline, without a cluster: run_local runs all of it in this process."""

from pipeline import Square, pipeline


def test_each_number_is_squared_and_printed(capsys):
    assert pipeline.run_local(limit=3).parked == []
    assert capsys.readouterr().out == "1\\n4\\n9\\n"


def test_an_item_without_a_number_is_parked():
    run = pipeline.run_local(inputs=[{"nummer": 4}])
    assert [(stage, value) for stage, value, exception in run.parked] == [("Square", {"nummer": 4})]


def test_one_stage_alone():
    assert Square({"number": 5}) == 25
'''


def write_project(folder: Path) -> list[str]:
    """Write it into a folder that is made, or empty; returns the files' names. Raises `WrongUsage`."""
    name = "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in folder.resolve().name).strip("-") or "pipeline"
    files = {"pipeline.py": _PIPELINE.format(title=name, name=name), "test_pipeline.py": _TEST}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise WrongUsage(f"{folder} holds something already: name a new folder, or an empty one")
        for file, text in files.items():
            (folder / file).write_text(text, "utf-8")
    except OSError as error:
        raise WrongUsage(f"{folder} cannot be written ({error.strerror}): name a folder that can") from error
    return list(files)
