"""What a person can write in a pipeline, run by real processes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from harness import NodeProcess, Site, json_lines, wait_for

HEAD = "from p2pcluster import At, DROP, Pipeline, Queue, To, current, sink, source, stage\n"


def test_a_source_that_yields_and_a_stage_that_returns(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
@source
def Numbers():
    yield from range(1000)

@stage
def Square(x):
    return x * x

pipeline = Pipeline("squares", Numbers >> Square)
""",
        "squares",
        "Square",
    )
    assert sorted(found) == [x * x for x in range(1000)]


def test_the_older_names_of_the_decorators(shared: Site) -> None:
    found = shared.results_of(
        """
from p2pcluster import Pipeline, i_wrap, io_wrap

@i_wrap
def Generate():
    yield from "abc"

@io_wrap(processes=2)
def Upper(x):
    return x.upper()

pipeline = Pipeline("older", Generate >> Upper)
""",
        "older",
        "Upper",
    )
    assert sorted(found) == ["A", "B", "C"]


def test_a_plain_source_is_called_until_it_raises_stop_iteration(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
numbers = iter(range(50))

@source
def Next():
    return next(numbers)

@stage
def Same(x):
    return x

pipeline = Pipeline("called", Next >> Same)
""",
        "called",
        "Same",
    )
    assert sorted(found) == list(range(50))


def test_a_generator_stage_emits_what_it_yields_drop_emits_nothing_and_none_is_a_value(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
@source
def Words():
    yield from ["a b", "", "c"]

@stage
def Split(line):
    yield from line.split()
    if not line:
        yield DROP

@stage
def NoneForC(word):
    return None if word == "c" else word

@stage
def WithoutA(word):
    return DROP if word == "a" else word

pipeline = Pipeline("emitting", Words >> Split >> NoneForC >> WithoutA)
""",
        "emitting",
        "WithoutA",
    )
    assert sorted(found, key=str) == [None, "b"]


def test_fan_out_merge_and_routes(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
@source
def Numbers():
    yield from range(20)

@source
def Letters():
    yield from "abc"

@stage
def Sort(x):
    if isinstance(x, str):
        return To("text", x)
    return To("odd", x) if x % 2 else x          # without a label it takes the first route

@stage
def Even(x): return x

@stage
def Odd(x): return x

@stage
def Text(x): return x

@stage
def TextAgain(x): return x * 2

pipeline = Pipeline("graph", [Numbers, Letters] >> Sort >> {"even": Even, "odd": Odd, "text": [Text, TextAgain]})
""",
        "graph",
    )
    with shared.connect("graph") as cluster:
        cluster.wait(30)
        found = {name: sorted(cluster.results(name)) for name in ("Even", "Odd", "Text", "TextAgain")}
    assert found == {
        "Even": list(range(0, 20, 2)),
        "Odd": list(range(1, 20, 2)),
        "Text": ["a", "b", "c"],
        "TextAgain": ["aa", "bb", "cc"],
    }


def test_a_route_that_does_not_exist_parks_the_item_and_names_the_routes(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
@source
def One():
    yield 1

@stage(retries=0)
def Lost(x):
    return To("nowhere", x)

@stage
def Here(x): return x

pipeline = Pipeline("lost", One >> Lost >> {"here": Here})
""",
        "lost",
    )
    with shared.connect("lost") as cluster:
        wait_for(cluster.parked, "the item is parked")
        (item,) = cluster.parked()
    assert "no route 'nowhere'" in item["error"]["text"]
    assert "'here'" in item["error"]["text"]


def test_a_cycle_goes_round_until_it_is_left(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
@source
def Numbers():
    yield from [1, 5, 9]

@stage
def Up(x):
    return To("again", x + 1) if x < 10 else To("out", x)

@stage
def Out(x): return x

again = Queue("again", maxsize=None)
pipeline = Pipeline("ring", Numbers >> again >> Up >> {"again": again, "out": Out})
""",
        "ring",
        "Out",
    )
    assert found == [10, 10, 10]


def test_a_class_is_made_and_entered_once_in_each_process_and_left_at_the_end(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
import os

@source
def Numbers():
    yield from range(100)

@stage(processes=1)
class Add:
    def __init__(self):
        self.log = open(os.path.join(current().out_dir, "log"), "a")
        self.say("made")

    def say(self, text):
        self.log.write(text + "\\n")
        self.log.flush()

    def __enter__(self):
        self.say("entered")
        return self

    def __exit__(self, *exception):
        self.say("left")

    def __call__(self, x):
        return x + 1

pipeline = Pipeline("classes", Numbers >> Add)
""",
        "classes",
        "Add",
    )
    assert sorted(found) == list(range(1, 101))
    log = shared.out("classes") / "log"
    wait_for(lambda: log.read_text().split() == ["made", "entered", "left"], "the object is left at the end")


def test_async_functions_generators_and_classes(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
import asyncio

@source
async def Numbers():
    for x in range(10):
        await asyncio.sleep(0)
        yield x

@stage
async def Twice(x):
    await asyncio.sleep(0)
    return 2 * x

@stage
async def Both(x):
    yield x
    yield -x

@stage(processes=1)
class Plus:
    async def __aenter__(self):
        self.plus = 1
        return self

    async def __aexit__(self, *exception):
        pass

    async def __call__(self, x):
        await asyncio.sleep(0)
        return x + self.plus

pipeline = Pipeline("asynchronous", Numbers >> Twice >> Both >> Plus)
""",
        "asynchronous",
        "Plus",
    )
    assert sorted(found) == sorted(sign * 2 * x + 1 for x in range(10) for sign in (1, -1))


def test_closures_partials_lambdas_and_a_function_twice(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
from functools import partial

def adder(n):
    def add(x):
        return x + n
    return add

def times(n, x):
    return n * x

@source
def Numbers():
    yield from range(5)

@stage
def Same(x): return x

plus = stage(adder(100), name="plus")
triple = stage(partial(times, 3), name="triple")
minus = stage(lambda x: -x, name="minus")
pipeline = Pipeline("made", Numbers >> Same >> plus >> Same.named("again") >> triple >> minus)
""",
        "made",
        "minus",
    )
    assert sorted(found, reverse=True) == [-3 * (x + 100) for x in range(5)]


def test_what_current_says(shared: Site) -> None:
    (found,) = shared.results_of(
        HEAD
        + """
import os

@source
def One():
    yield {"of": current().stage}

@stage(backoff_s=0)
def Ask(x):
    now = current()
    if now.delivery == 1:
        raise ValueError("once more")
    now.log.warning("heard by the node")
    now.progress(1, "of 2", total=2)
    return [x, now.item_id, now.key, now.delivery, now.stage, bool(now.node), now.params, str(now.out_dir), os.getcwd()]

pipeline = Pipeline("asking", One >> Ask, params={"depth": 3})
""",
        "asking",
        "Ask",
    )
    emitted, item_id, key, delivery, stage, has_node, params, out_dir, folder = found
    assert emitted == {"of": "One"}
    assert (item_id, key, delivery, stage, has_node) == (1, "1/asking/Ask/1", 2, "Ask", True)
    assert params == {"depth": 3}
    assert out_dir == str(shared.out("asking"))
    assert folder.startswith(str(shared.home / "bundles")), "the working folder is that of the shipped project"
    node = shared.nodes[0]
    node.wait_for_line("Ask | heard by the node")
    assert "50 %" in node.wait_for_line("of 2")


def test_the_whole_folder_is_shipped_and_imports_come_from_it(shared: Site) -> None:
    folder = shared.project(
        HEAD
        + """
from helper import double
from pathlib import Path

@source
def Lines():
    yield from Path("data.txt").read_text().split()

@stage
def Double(x):
    return double(x)

pipeline = Pipeline("shipped", Lines >> Double)
""",
        "shipped",
        helper="def double(x): return 2 * x",
    )
    (folder / "data.txt").write_text("a b")
    shared.do("deploy", folder)
    with shared.connect("shipped") as cluster:
        cluster.wait(30)
        assert sorted(cluster.results("Double")) == ["aa", "bb"]


def test_a_module_named_like_one_of_the_standard_library_does_not_break_a_stage_process(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
@source
def One():
    yield 1

@stage
def Same(x): return x

pipeline = Pipeline("shadows", One >> Same)
""",
        "shadows",
        "Same",
        queue="raise RuntimeError",
        json="raise RuntimeError",
        socket="raise RuntimeError",
    )
    assert found == [1]


def test_on_done_runs_once_the_run_is_done(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
from pathlib import Path

@source
def Numbers():
    yield from range(10)

@sink
def Keep(x):
    with open(Path(current().out_dir) / "kept", "a") as file:
        file.write(f"{x}\\n")

def count():
    folder = Path(current().out_dir)
    (folder / "count").write_text(f"{len((folder / 'kept').read_text().split())} {current().params}")

pipeline = Pipeline("counting", Numbers >> Keep, params={"a": 1}, on_done=count)
""",
        "counting",
    )
    with shared.connect("counting") as cluster:
        cluster.wait(30)
    assert (shared.out("counting") / "count").read_text() == "10 {'a': 1}"


def test_an_on_done_that_fails_is_tried_again_and_then_given_up_with_an_alarm(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
@source
def One():
    yield 1

@sink
def Keep(x): pass

def fail():
    raise OSError("no mail server")

pipeline = Pipeline("failing", One >> Keep, on_done=fail)
""",
        "failing",
    )
    with shared.connect("failing") as cluster:
        cluster.wait(30)
        assert any(
            "on_done of failing failed: OSError: no mail server" in alarm for alarm in cluster.status()["alarms"]
        )


def test_a_queue_at_the_end_is_taken_from_and_its_codec_is_json(shared: Site) -> None:
    shared.deploy(
        HEAD
        + """
@source
def Numbers():
    yield from range(3)

@stage
def Record(x): return {"x": x}

pipeline = Pipeline("ending", Numbers >> Record >> Queue("records", codec="json"))
""",
        "ending",
    )
    with shared.connect("ending") as cluster:
        cluster.wait(30)
    taken = shared.do("take", "records", "--pipeline", "ending")
    assert sorted(json_lines(taken.out), key=str) == [{"x": 0}, {"x": 1}, {"x": 2}]
    assert shared.do("take", "records", "--pipeline", "ending").out == "", "what was taken is gone"


def test_a_sharded_source_divides_the_work(shared: Site) -> None:
    found = shared.results_of(
        HEAD
        + """
@source(processes=2)
def Numbers(shard, shards):
    yield from range(shard, 100, shards)

@stage
def Same(x): return x

pipeline = Pipeline("sharded", Numbers >> Same)
""",
        "sharded",
        "Same",
    )
    assert sorted(found) == list(range(100))


def test_back_pressure_holds_a_source_back_and_everything_arrives(shared: Site) -> None:
    """With queues of ten items and a stage that makes three of one."""
    found = shared.results_of(
        HEAD
        + """
@source
def Numbers():
    yield from range(500)

@stage
def Three(x):
    yield from (x, x, x)

@stage
def Same(x): return x

pipeline = Pipeline("narrow", Numbers >> Queue("a", maxsize=10) >> Three >> Queue("b", maxsize=10) >> Same)
""",
        "narrow",
        "Same",
    )
    assert sorted(found) == sorted(list(range(500)) * 3)


# ---- sources that are restarted


GATED = (
    HEAD
    + """
import os, time
from pathlib import Path

def gate(name):
    \"\"\"Wait until the test opens the gate; says that it was reached.\"\"\"
    folder = Path(current().out_dir)
    (folder / f"{name}.reached").touch()
    while not (folder / f"{name}.open").exists():
        time.sleep(0.01)

def starts():
    \"\"\"How often the source was started, this time included.\"\"\"
    with open(Path(current().out_dir) / "starts", "a") as file:
        file.write(".")
    return os.path.getsize(Path(current().out_dir) / "starts")

@stage
def Same(x): return x
"""
)


def _kill_source_at_gate(site: Site, pipeline: str) -> None:
    node = site.nodes[-1]
    out = site.out(pipeline)
    wait_for(lambda: (out / "a.reached").exists(), "the source is at the gate")
    with site.connect(pipeline) as cluster:
        wait_for(lambda: _passed(cluster.status(), pipeline) >= 50, "what was emitted before the gate is durable")
    node.kill_one(lambda: node.stage_pids("Values"))
    (out / "a.open").touch()


def _passed(status: dict[str, list[dict[str, object]]], pipeline: str) -> int:
    (source,) = [stage for stage in status["stages"] if stage["pipeline"] == pipeline and stage["name"] == "Values"]
    return int(str(source["done"]))


def test_a_killed_generator_that_yields_the_same_goes_on_where_it_was(shared: Site) -> None:
    shared.deploy(
        GATED
        + """
@source
def Values():
    for x in range(100):
        if x == 50:
            gate("a")
        yield {str(x): {f"{x}", "set", "order"}}      # sets come in the same order after a restart

pipeline = Pipeline("equal", Values >> Same)
""",
        "equal",
    )
    _kill_source_at_gate(shared, "equal")
    with shared.connect("equal") as cluster:
        cluster.wait(30)
        found = [next(iter(value)) for value in cluster.results("Same")]
        assert not [alarm for alarm in cluster.status()["alarms"] if "restart" in alarm and "equal" in alarm]
    assert sorted(found, key=int) == [str(x) for x in range(100)]


def test_a_killed_generator_that_yields_other_values_starts_anew_with_an_alarm(shared: Site) -> None:
    shared.deploy(
        GATED
        + """
@source
def Values():
    start = starts()
    for x in range(100):
        if x == 50:
            gate("a")
        yield (min(start, 2), x)

pipeline = Pipeline("other", Values >> Same)
""",
        "other",
    )
    _kill_source_at_gate(shared, "other")
    with shared.connect("other") as cluster:
        cluster.wait(30)
        found = sorted(cluster.results("Same"))
        assert any("gave other values than before" in alarm for alarm in cluster.status()["alarms"])
    assert found == [(1, x) for x in range(50)] + [(2, x) for x in range(100)]


def test_a_killed_generator_that_ends_earlier_stays_open_and_the_alarm_says_how_to_close_it(shared: Site) -> None:
    shared.deploy(
        GATED
        + """
@source
def Values():
    start = starts()
    for x in range(100 if start == 1 else 20):
        if x == 50:
            gate("a")
        yield x

pipeline = Pipeline("shorter", Values >> Same)
""",
        "shorter",
    )
    _kill_source_at_gate(shared, "shorter")
    with shared.connect("shorter") as cluster:

        def alarm() -> str | None:
            return next((text for text in cluster.status()["alarms"] if "ended before the point" in text), None)

        text = wait_for(alarm, "an alarm about the shorter generator")
        assert text is not None
        command = text.rpartition("run ")[2].split()
        assert command[:2] == ["close", "Values"]
        closed = shared.do(*command, "--pipeline", "shorter")
        assert closed.code == 0, closed.err
        cluster.wait(30)
        assert sorted(cluster.results("Same")) == list(range(50))


def test_a_resumable_source_goes_on_behind_its_cursor(shared: Site) -> None:
    shared.deploy(
        GATED
        + """
@source
def Values(cursor=None):
    starts()
    with open(Path(current().out_dir) / "cursors", "a") as file:
        file.write(f"{cursor}\\n")
    for x in range(0 if cursor is None else cursor, 100):
        if x == 50:
            gate("a")
        yield At(x, x + 1)

pipeline = Pipeline("resumable", Values >> Same)
""",
        "resumable",
    )
    _kill_source_at_gate(shared, "resumable")
    with shared.connect("resumable") as cluster:
        cluster.wait(30)
        assert sorted(cluster.results("Same")) == list(range(100))
    assert (shared.out("resumable") / "cursors").read_text().split() == ["None", "50"]


def test_a_source_that_raises_is_started_again_and_says_so(shared: Site) -> None:
    shared.deploy(
        GATED
        + """
@source
def Values():
    start = starts()
    for x in range(10):
        if start == 1 and x == 5:
            raise ConnectionError("the camera is away")
        yield x

pipeline = Pipeline("raising", Values >> Same)
""",
        "raising",
    )
    with shared.connect("raising") as cluster:
        cluster.wait(30)
        assert sorted(cluster.results("Same")) == list(range(10))
        assert any("the camera is away" in alarm for alarm in cluster.status()["alarms"])


# ---- kill -9 of anything, at moments that a seed chooses


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_or_made_twice_by_kill_9_of_node_stage_and_source(site: Site, seed: int) -> None:
    """Three kills with work in hand, in an order and at items that the seed chooses; the long soaks are elsewhere."""
    count = 2000
    chance = random.Random(seed)
    victims = chance.sample(["node", "Half", "Values"], 3)
    moments = sorted(chance.sample(range(count // 2), 3))
    project = site.project(
        GATED
        + f"""
@source
def Values():
    for x in range({count}):
        yield x

@stage(processes=1, retries=50, backoff_s=0.01)
def Half(x):
    if x in {moments}:
        gate(x)
    return x / 2

@stage
def Twice(x): return int(2 * x)

pipeline = Pipeline("killed", Values >> Queue("values", maxsize=200) >> Half >> Twice >> Queue("out", maxsize=None))
"""
    )
    node = site.start("run", project, "--until-done")
    for moment, victim in zip(moments, victims, strict=True):
        _wait_for_gate(site, moment)
        former = node.pid if victim == "node" else node.kill_one(_pids_of(node, victim))
        if victim == "node":
            node.kill()
            node = site.start("run", project, "--until-done")
        assert former not in [node.pid, *node.stage_pids(victim)]
        (site.out("killed") / f"{moment}.open").touch()
    assert node.wait_for_exit() == 0, f"seed {seed}"
    site.hands()
    with site.connect("killed") as cluster:
        assert sorted(cluster.results("out")) == list(range(count)), f"seed {seed}"
        assert cluster.parked() == []


def _wait_for_gate(site: Site, moment: int) -> None:
    wait_for(lambda: (site.out("killed") / f"{moment}.reached").exists(), f"item {moment} runs")


def _pids_of(node: NodeProcess, stage: str) -> Callable[[], list[int]]:
    return lambda: node.stage_pids(stage)
