"""What the page and the metrics make of a status, whose text is never markup; and how often a cluster is asked for one.

`PYTHONPATH=. python tests/unit/test_page.py` draws the README's picture anew.
"""

from __future__ import annotations

import http.client
import itertools
import re
import threading
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcluster import Pipeline, Queue, page, sink, source, stage, view
from p2pcluster.client import Link
from p2pcluster.config import Address, Options
from p2pcluster.core.codec import Message
from p2pcluster.errors import NoLeader
from p2pcluster.view import History, Snapshot, graph, metrics, sparkline, view_of

GOLDEN = Path(__file__).parents[1] / "golden" / "page.svg"
HOSTILE = """<script>alert(1)</script>"'><b onload=x>&amp; \\ {} \u202e\n\t-->]]>"""


# ---- a status as a node gives it


def manifest_of(*flows: Any, name: str = "squares") -> dict[str, Any]:
    return Pipeline(name, *flows).manifest()


def a_source(name: str) -> Any:
    return source(lambda: 1, name=name)


def a_stage(name: str) -> Any:
    return stage(lambda x: x, name=name)


def a_sink(name: str) -> Any:
    return sink(lambda x: None, name=name)


def squares() -> dict[str, Any]:
    return manifest_of(a_source("Generate") >> a_stage("Square") >> {"even": a_sink("Print"), "odd": a_stage("Sum")})


def stage_of(name: str = "Square", **fields: Any) -> dict[str, Any]:
    return {"pipeline": "squares", "name": name, "processes": 2, "done": 1234, "parked": 0, "rate_per_s": 120.5, "service_ms": 8.25,
            "idle_because": None, **fields}


def queue_of(name: str = "Square", **fields: Any) -> dict[str, Any]:
    return {"pipeline": "squares", "name": name, "ready": 5, "leased": 2, "delayed": 0, "parked": 0, "rate_in_per_s": 1.0,
            "rate_out_per_s": 1.0, "oldest_s": 2.5, **fields}


def node_of(name: str = "ann", **fields: Any) -> dict[str, Any]:
    facts = {"cores": 4, "memory_gb": 16.0, "name": name, "os": "linux", "python": "3.12.1", "tags": ["gpu"]}
    return {"id": f"id of {name}", "name": name, "role": "leader", "address": "10.0.0.7:47400", "alive": True, "slots": 4, "facts": facts,
            **fields}


def status_of(**fields: Any) -> dict[str, Any]:
    return {
        "cluster": {"id": "c", "name": "default", "term": 3, "commit_index": 99},
        "leader": {"id": "n", "name": "ann", "address": "10.0.0.7:47400"},
        "nodes": [node_of()],
        "pipelines": [{"name": "squares", "version": "0123456789", "origin": {}, "run": 1, "state": "running", "rollout": None}],
        "stages": [stage_of("Generate", service_ms=None), stage_of(), stage_of("Print", processes=0, idle_because="its queue is empty"),
                   stage_of("Sum")],
        "queues": [queue_of(), queue_of("Print", ready=0, leased=0, oldest_s=None), queue_of("Sum"),
                   queue_of("Sum.results", ready=40, leased=0)],
        "alarms": [], **fields,
    }


class Reader(HTMLParser):
    """What a browser makes of markup: elements, attributes, text."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == [], "each element ends"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError("the view has no comments")


def hostile_snapshot(text: str) -> Snapshot:
    """Everything that somebody outside may name, named `text`."""
    facts = {"cores": text, "memory_gb": text, "os": text, "python": text, "tags": [text]}
    status = status_of(
        cluster={"id": text, "name": text, "term": 1, "commit_index": 1}, leader={"id": text, "name": text, "address": text},
        nodes=[node_of(text, id=text, address=text, facts=facts)], alarms=[text],
        pipelines=[{"name": text, "version": text, "origin": {}, "run": 1, "state": "running", "rollout": None}],
        stages=[stage_of(text, pipeline=text, idle_because=text)], queues=[queue_of(text, pipeline=text, parked=1)],
    )
    queue = {"name": text, "maxsize": 10, "read_by": text, "fed_by": [], "results": False}
    queues = [queue, {**queue, "name": f"{text}'", "read_by": None, "fed_by": [text]}]
    stages = [{"name": text, "kind": "stage", "reads": text, "ports": [{"label": text, "queues": [f"{text}'"]}]}]
    manifest = {"stages": stages, "queues": queues, "back_edges": [], "order": [text]}
    error = {"text": text, "node": text, "traceback": text, "stderr": [text]}
    parked = [{"id": text, "queue": text, "run": 1, "deliveries": 4, "at_ms": 0, "error": error}]
    return Snapshot(status, {text: manifest}, parked, {}, text)


# ---- markup


ELEMENTS = {
    "b", "dd", "details", "div", "dl", "dt", "g", "h2", "li", "p", "path", "pre", "rect", "section", "span", "summary", "svg", "table",
    "tbody", "td", "text", "th", "thead", "title", "tr", "ul",
}


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=12) | st.sampled_from([HOSTILE, "</title><script>", "<!--", "]]>", '" onclick="x', "&lt;"]))
def test_no_name_becomes_markup(text: str) -> None:
    plain, hostile = Reader(view_of(hostile_snapshot("x"))), Reader(view_of(hostile_snapshot(text)))
    assert hostile.elements == plain.elements
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert set(hostile.elements) <= ELEMENTS
    read = "".join(hostile.texts).replace("\r\n", "\n").replace("\r", "\n")
    assert read.count(text.replace("\r\n", "\n").replace("\r", "\n")) >= 15, "each is there as it was written"


def test_the_view_has_nothing_that_the_policy_of_the_page_forbids() -> None:
    names = {name for name, _ in Reader(view_of(hostile_snapshot(HOSTILE))).attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "src", "href", "srcset")]


def test_the_page_asks_nobody_but_its_node_and_runs_only_its_own_script() -> None:
    text = (Path(page.__file__).parent / "page.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    assert not re.findall(r"<(?:link|img|script|iframe)[^>]+(?:src|href)=\"(?!data:)", text)
    policy = page.HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    assert len(re.findall(r"<script>", text)) == len(re.findall(r"<style>", text)) == 1
    assert text.count("<!-- view -->") == 1


# ---- what is shown


def words(markup: str) -> str:
    return " | ".join(Reader(markup).texts)


def test_numbers_names_and_reasons_are_shown() -> None:
    error = {"text": "ValueError: no", "node": "bob", "traceback": "Traceback: line 1", "stderr": ["said before"]}
    parked = [{"id": "squares/Square:7", "queue": "squares/Square", "run": 1, "deliveries": 4, "at_ms": 0, "error": error}]
    status = status_of(alarms=["the disk is full"], queues=[queue_of(parked=3, ready=12_345)])
    shown = words(view_of(Snapshot(status, {"squares": squares()}, parked)))
    for text in ("default", "10.0.0.7:47400", "run 1 running", "version 01234567", "Generate", "2 × · 120/s", "12,347",
                 "its queue is empty", "the disk is full", "leader", "gpu", "linux python 3.12.1", "Parked items: 3", "squares/Square:7",
                 "ValueError: no", "Traceback: line 1", "said before", "on node bob", "2 more: python -m p2pcluster parked list"):
        assert text in shown, text


def test_what_was_known_stays_while_nobody_answers() -> None:
    assert "asking the cluster" in words(view_of(Snapshot()))
    assert "no node answers" in words(view_of(Snapshot(trouble="no node answers")))
    late = view_of(Snapshot(status_of(), trouble="no leader"))
    assert ("class", "stale") in Reader(late).attributes and "Square" in words(late) and "no leader" in words(late)
    assert "No pipeline is deployed." in words(view_of(Snapshot(status_of(pipelines=[], stages=[], queues=[]))))


def test_the_title_counts_the_alarms() -> None:
    assert ("data-title", "(2) default - p2pcluster") in Reader(view_of(Snapshot(status_of(alarms=["a", "b"])))).attributes


# ---- the graph


def _ring() -> dict[str, Any]:
    first = a_stage("first")
    return manifest_of(a_source("in") >> first >> {"ok": a_sink("out"), "again": Queue("back", maxsize=None) >> a_stage("retry") >> first})


GRAPHS = {
    "a line": squares(),
    "to all": manifest_of(a_source("a") >> [a_stage(f"to {at}") for at in range(5)]),
    "merged": manifest_of([a_source("a"), a_source("b"), a_source("c")] >> a_stage("d") >> Queue("out")),
    "fed from outside": manifest_of(Queue("numbers") >> a_stage("d") >> a_sink("e")),
    "two flows": manifest_of(a_source("a") >> a_sink("b"), a_source("c") >> a_stage("d") >> a_stage("e") >> a_sink("f")),
    "a ring": _ring(),
}


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_stage_and_queue_has_a_place_of_its_own(name: str, down: bool) -> None:
    manifest = GRAPHS[name]
    drawing = xml.fromstring(graph(manifest, [], [], down))
    width, height = (float(drawing.get(side, "")) for side in ("width", "height"))
    boxes = [rect for rect in drawing.iter("{http://www.w3.org/2000/svg}rect") if rect.get("class") is None]
    assert len(boxes) == len(manifest["stages"]) + len(manifest["queues"])
    places = [tuple(float(rect.get(side, "")) for side in ("x", "y", "width", "height")) for rect in boxes]
    for at, (x, y, w, h) in enumerate(places):
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
        for u, v, w2, h2 in places[at + 1 :]:
            assert u >= x + w or x >= u + w2 or v >= y + h or y >= v + h2, "boxes keep apart"
    edges = [path.get("class") for path in drawing.iter("{http://www.w3.org/2000/svg}path")]
    stages = manifest["stages"]
    outputs = sum(len(port["queues"]) for one in stages for port in one["ports"])
    assert len(edges) == sum(one["reads"] is not None for one in stages) + outputs
    assert edges.count("edge back") == len(manifest["back_edges"])


@pytest.mark.parametrize("down", [False, True])
def test_items_run_one_way(down: bool) -> None:
    drawing = xml.fromstring(graph(GRAPHS["two flows"], [], [], down))
    for path in drawing.iter("{http://www.w3.org/2000/svg}path"):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d", ""))]
        assert numbers[-1 if down else -2] > numbers[1 if down else 0]


def picture() -> str:
    """The README's: a graph with the page's own style."""
    stages = [stage_of("Generate", processes=1, rate_per_s=412.0, idle_because="queue squares/Square is full"),
              stage_of("Square", processes=4, rate_per_s=408.0),
              stage_of("Print", processes=1, rate_per_s=204.0), stage_of("Sum", processes=1, rate_per_s=204.0)]
    queues = [queue_of(ready=8421, parked=3), queue_of("Print", ready=12), queue_of("Sum", ready=0, leased=0),
              queue_of("Sum.results", ready=20_512)]
    style = re.search(r"<style>.*?</style>", (Path(page.__file__).parent / "page.html").read_text("utf-8"), flags=re.DOTALL)
    assert style is not None
    drawn = graph(squares(), stages, queues).replace("<svg ", '<svg class="graph across" ', 1)
    return drawn.replace(">", ">" + style[0], 1) + "\n"


def test_the_picture_of_the_readme_is_how_the_page_looks() -> None:
    xml.fromstring(picture())
    assert GOLDEN.read_text("utf-8") == picture(), "draw it anew, look at it, and commit it"


# ---- history


def test_history_has_a_point_for_every_few_seconds_and_gaps_where_nothing_is_known() -> None:
    history = History()
    assert history.lines() == {}
    for at_s, rate in ((0.0, 1.0), (1.0, 2.0), (5.0, 3.0), (25.0, 4.0)):
        history.add(at_s, status_of(stages=[stage_of(rate_per_s=rate)], queues=[queue_of()]))
    lines = history.lines()
    assert lines["stage", "squares", "Square"][-6:] == (2.0, 3.0, None, None, None, 4.0)
    assert lines["queue", "squares", "Square"][-1] == 7.0
    assert {len(line) for line in lines.values()} == {view.HISTORY_STEPS}
    history.add(25.0 + view.HISTORY_S, status_of(stages=[], queues=[queue_of()]))
    assert list(history.lines()) == [("queue", "squares", "Square")]
    assert history.lines()["queue", "squares", "Square"][:-1] == (None,) * 119
    for at_s in range(2 * view.HISTORY_S):
        history.add(1000.0 + at_s, status_of())
    assert len(vars(history)["_points"]) == view.HISTORY_STEPS, "it does not grow"


@given(st.lists(st.none() | st.floats(min_value=0, max_value=1e9), max_size=120))
def test_a_line_stays_in_its_frame(values: Sequence[float | None]) -> None:
    drawing = xml.fromstring(sparkline(tuple(values)))
    for path in [one for one in drawing.iter("path") if one.get("class") == "line"]:
        for x, y in re.findall(r"([\d.]+),([\d.]+)", path.get("d", "")):
            assert 0 <= float(x) <= view.SPARK_SIZE[0] and 0 < float(y) < view.SPARK_SIZE[1]


# ---- metrics

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABELS = r'\{[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"(?:,[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*")*\}'
SAMPLE = re.compile(rf"({NAME})({LABELS})? (-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """Read the text format: comments before the samples of their metric, each metric in one place, each series once."""
    assert text.endswith("\n")
    found: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    current = ""
    for line in text[:-1].split("\n"):
        if comment := re.fullmatch(rf"# (HELP|TYPE) ({NAME}) (.+)", line):
            if comment[1] == "HELP":
                assert comment[2] not in kinds, "a metric stands in one place"
            else:
                assert comment[3] in ("counter", "gauge")
                kinds[comment[2]], current = comment[3], comment[2]
                assert (comment[3] == "counter") == comment[2].endswith("_total")
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample is not None and sample[1] == current, line
        assert (sample[1], sample[2] or "") not in found, "a series comes once"
        found[sample[1], sample[2] or ""] = float(sample[3])
    return found


def test_metrics_say_what_the_status_says() -> None:
    found = samples_of(metrics(status_of()))
    assert found["p2pcluster_up", ""] == 1
    assert found["p2pcluster_nodes", '{role="leader"}'] == 1 and found["p2pcluster_nodes", '{role="worker"}'] == 0
    assert found["p2pcluster_stage_done_items_total", '{pipeline="squares",stage="Square"}'] == 1234
    assert found["p2pcluster_stage_service_seconds", '{pipeline="squares",stage="Square"}'] == 0.00825
    assert ("p2pcluster_stage_service_seconds", '{pipeline="squares",stage="Generate"}') not in found
    assert found["p2pcluster_queue_items", '{pipeline="squares",queue="Square",state="leased"}'] == 2
    assert found["p2pcluster_pipeline_running", '{pipeline="squares"}'] == 1


def test_a_cluster_that_does_not_answer_is_down() -> None:
    assert samples_of(metrics(None)) == {("p2pcluster_up", ""): 0, ("p2pcluster_series_dropped", ""): 0}


@given(text=st.text(max_size=12) | st.just(HOSTILE))
def test_names_do_not_break_the_format(text: str) -> None:
    status = hostile_snapshot(text).status
    found = samples_of(metrics(status))
    ((_, labels),) = [key for key in found if key[0] == "p2pcluster_pipeline_run"]
    escapes = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
    assert re.sub(r"\\.", lambda match: escapes[match[0]], labels.removeprefix('{pipeline="').removesuffix('"}')) == text


def test_the_number_of_series_is_bounded() -> None:
    many = [queue_of(f"q{at}", oldest_s=None) for at in range(view.SERIES_MAX)]
    found = samples_of(metrics(status_of(queues=many)))
    assert sum(name == "p2pcluster_queue_items" for name, _ in found) == view.SERIES_MAX
    assert found["p2pcluster_series_dropped", ""] == 3 * view.SERIES_MAX


# ---- asking


class FakeLink:
    """A cluster that answers what is set here."""

    def __init__(self) -> None:
        self.status = status_of()
        self.trouble: NoLeader | None = None
        self.asked: list[str] = []
        self.is_open = False

    def connect(self) -> Link:
        self.is_open = True
        return cast(Link, self)

    def call(self, message: Message) -> Message:
        assert self.is_open
        self.asked.append(message.kind)
        if self.trouble is not None:
            raise self.trouble
        answers: dict[str, Any] = {"status": self.status, "project": {"manifest": squares()}, "parked": [], "more": False}
        return Message("reply", {"req": 1, "result": "ok", **answers})

    def close(self) -> None:
        self.is_open = False


class Looking:
    """A watch with a clock of the test's."""

    def __init__(self) -> None:
        self.link, self.now_s = FakeLink(), 1000.0
        self.watch = page.Watch(self.link.connect, lambda: self.now_s)

    def after(self, seconds: float) -> Snapshot:
        self.now_s += seconds
        return self.watch.look()


def test_a_cluster_is_asked_once_a_second_however_many_look() -> None:
    at = Looking()
    first = at.watch.look()
    readers = [threading.Thread(target=at.watch.look) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert at.link.asked == ["status", "project"]
    assert at.after(0.9) is first and at.link.asked == ["status", "project"]
    assert at.after(0.1) is not first and at.link.asked == ["status", "project", "status"], "a version's graph is asked for once"
    at.link.status = status_of(pipelines=[{**at.link.status["pipelines"][0], "version": "another"}])
    at.after(1)
    assert at.link.asked[-2:] == ["status", "project"]


def test_ten_minutes_are_known_before_anybody_looks_and_cost_a_question_each_few_seconds() -> None:
    at = Looking()
    for second in range(700):
        at.now_s += 1
        at.link.status = status_of(queues=[queue_of(ready=second, leased=0)])
        at.watch.sample()
    assert at.link.asked == ["status"] * (700 // view.HISTORY_STEP_S), "and nothing else, however often it is thought of"
    at.link.status = status_of(queues=[queue_of(ready=700, leased=0)])
    line = (at.watch.look().lines or {})["queue", "squares", "Square"]
    assert len(line) == view.HISTORY_STEPS and None not in line and line[-1] == 700
    assert line[0] is not None and 100 <= line[0] <= 110, "the oldest is of ten minutes ago"
    at.link.asked.clear()
    for _ in range(20):
        at.after(0.5)
        at.watch.sample()
    assert at.link.asked == ["status"] * 10, "while somebody looks there are points enough"
    at.watch.close()
    assert not at.link.is_open


def test_a_cluster_that_is_away_is_a_gap() -> None:
    at = Looking()
    at.watch.sample()
    at.link.trouble = NoLeader("no leader now")
    for _ in range(4):
        at.now_s += view.HISTORY_STEP_S
        at.watch.sample()
    at.link.trouble = None
    line = (at.after(view.HISTORY_STEP_S).lines or {})["queue", "squares", "Square"]
    assert line[-6:] == (7.0, None, None, None, None, 7.0)


def test_the_memory_of_a_history_is_bounded() -> None:
    history, status = History(), status_of(stages=[stage_of(f"s{at}") for at in range(view.LINES_MAX + 5)])
    for step in range(300):
        history.add(step * view.HISTORY_STEP_S, {**status, "stages": [{**one, "name": "".join(one["name"])} for one in status["stages"]]})
    assert len(history.lines()) == view.LINES_MAX and len(history._points) == view.HISTORY_STEPS
    assert len({id(key) for point in history._points.values() for key in point}) == view.LINES_MAX, "names are kept once"


def test_parked_items_are_asked_for_seldom_and_only_where_there_are_some() -> None:
    at = Looking()
    at.watch.look()
    at.link.status = status_of(queues=[queue_of(parked=1)])
    for _ in range(10):
        at.after(1)
    assert at.link.asked.count("parked") == 2
    at.link.status = status_of()
    assert at.after(1).parked == []


def test_trouble_is_told_beside_what_was_known_and_forgotten_when_it_is_over() -> None:
    at = Looking()
    at.watch.look()
    at.link.trouble = NoLeader("no leader now")
    found = at.after(1)
    assert (found.trouble, found.status) == ("no leader now", at.link.status) and not at.link.is_open
    at.link.trouble = None
    assert at.after(1).trouble is None and at.link.is_open


def test_who_watches_is_told_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    link = FakeLink()
    monkeypatch.setattr(page, "Link", lambda options, timeout_s: link.connect())
    with page.serving(Options(page=Address("127.0.0.1", 0))) as url:
        where = url.removeprefix("http://").rstrip("/")
        watching = http.client.HTTPConnection(where, timeout=30)
        watching.request("GET", "/events")
        answer = watching.getresponse()
        assert answer.readline().startswith(b"retry")
    assert len(list(itertools.islice(iter(answer.readline, b""), 20))) < 20, "the stream ends"
    watching.close()
    with pytest.raises(ConnectionError):
        http.client.HTTPConnection(where, timeout=30).request("GET", "/")


@pytest.mark.parametrize(("hosts", "is_own"), [
    (["127.0.0.1:8000"], True), (["localhost:9000"], True), (["LOCALHOST"], True), (["[::1]:8000"], True), (["10.1.2.3"], True),
    (["lab:8000"], True), (["evil.example:8000"], False), (["127.0.0.1.evil.example"], False), (["localhost.evil.example"], False),
    (["127.0.0.1:8000@evil.example"], False), (["[evil.example]"], False), ([""], False), ([], False),
    (["localhost", "evil.example"], False), (["localhost:8000:1"], False), (["2130706433"], False),
])
def test_a_request_must_be_meant_for_this_page(hosts: list[str], is_own: bool) -> None:
    assert page.is_own_host(hosts, {"localhost", "lab"}) is is_own


if __name__ == "__main__":
    GOLDEN.write_text(picture(), "utf-8")
