"""How a cluster looks to people and to Prometheus: a status in; HTML, SVG and metrics out.

Decided here: what of a status is shown, how a graph is laid out, and which names the metrics have. No socket, clock or cluster is known
here. Whatever was named by somebody else becomes markup through `element` alone, which escapes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

HISTORY_S = 600
HISTORY_STEPS = 120
HISTORY_STEP_S = HISTORY_S // HISTORY_STEPS  # one point of a line; the rates of a status are of the last five seconds
LINES_MAX = 1000  # stages and queues with a history: at most some 10 MB
PARKED_SHOWN_MAX = 50
SERIES_MAX = 2000  # of one metric; how many more there would be is a metric too
ROLES = ("leader", "voter", "standby", "worker")
ITEM_STATES = ("ready", "leased", "delayed", "parked")

Record = Mapping[str, Any]  # what a status, a manifest or a parked item is made of
Values = tuple[float | None, ...]  # None where it is not known
Lines = Mapping[tuple[str, str, str], Values]  # by "stage" or "queue", pipeline and name


@dataclass(frozen=True)
class Snapshot:
    """What was known at one time. `status` is the last one that came, `trouble` why none comes now."""

    status: Record | None = None
    manifests: Mapping[str, Record] | None = None  # by pipeline
    parked: Sequence[Record] = ()
    lines: Lines | None = None  # of `History`
    trouble: str | None = None

    @cached_property
    def view(self) -> Html:
        """What the page shows; made once for all who look."""
        return view_of(self)


class History:
    """The last ten minutes, one point for every few seconds in which the cluster answered."""

    def __init__(self) -> None:
        self._points: dict[int, dict[tuple[str, str, str], float]] = {}  # by step, the oldest first

    def add(self, now_s: float, status: Record) -> None:
        """Remember this status; of several in one step the last one."""
        step = int(now_s // HISTORY_STEP_S)
        point = [(("stage", one["pipeline"], one["name"]), float(one["rate_per_s"])) for one in status["stages"]]
        point += [(("queue", one["pipeline"], one["name"]), float(_depth(one))) for one in status["queues"]]
        # The same keys in all points: the names of a status are made anew with it.
        same = {key: key for key in next(reversed(self._points.values()), ())}
        self._points[step] = {same.get(key, key): value for key, value in point[:LINES_MAX]}
        while (oldest := next(iter(self._points))) <= step - HISTORY_STEPS:
            del self._points[oldest]

    def lines(self) -> dict[tuple[str, str, str], Values]:
        """For each stage its rates, and for each queue its depths, oldest first."""
        if not self._points:
            return {}
        newest = max(self._points)
        steps = range(newest - HISTORY_STEPS + 1, newest + 1)
        return {key: tuple(self._points.get(step, {}).get(key) for step in steps) for key in self._points[newest]}


# ---- markup


class Html(str):
    """Markup that is as it should be. A plain str is text."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, object], *children: str) -> Html:
    """`<name attributes>children</name>`, where all that is no `Html` is escaped; an attribute that is None is left out."""
    told = "".join(f' {key}="{escape(str(value))}"' for key, value in attributes.items() if value is not None)
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{name}{told}>{inner}</{name}>")


def joined(parts: Iterable[Html]) -> Html:
    """Markup behind markup."""
    return Html("".join(parts))


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls by itself where it is too wide, also by keyboard. What begins with "#" in `heads` is a column of numbers."""
    kinds = [{"class": "number"} if head.startswith("#") else {} for head in heads]
    head = (element("th", {**kind, "scope": "col"}, head.lstrip("#")) for head, kind in zip(heads, kinds, strict=True))
    body = (
        [element("th", {"scope": "row"}, row[0]), *(element("td", kind, cell) for cell, kind in zip(row[1:], kinds[1:], strict=True))]
        for row in rows
    )
    lines = element("tbody", {}, *(element("tr", {}, *cells) for cells in body))
    inside = element("table", {}, element("thead", {}, element("tr", {}, *head)), lines)
    return element("div", {"class": "scroll", "role": "region", "tabindex": 0, "aria-label": label}, inside)


# ---- the page

STAGE_HEADS = ("stage", "#processes", "#per second", "ten minutes", "#ms each", "#done", "#parked", "idle because")
QUEUE_HEADS = ("queue", "#waiting", "#in hand", "ten minutes", "#delayed", "#parked", "#in per s", "#out per s", "#oldest s")
NODE_HEADS = ("node", "role", "address", "#slots", "#cores", "#GB", "system", "tags")


def view_of(snapshot: Snapshot) -> Html:
    """All of the page that changes. `data-title` is for the window's title."""
    status = snapshot.status
    trouble = element("p", {"class": "trouble", "role": "alert"}, snapshot.trouble) if snapshot.trouble else Html()
    if status is None:
        return element("div", {"id": "view", "data-title": "p2pcluster"}, trouble or element("p", {}, "asking the cluster"))
    alarms = len(status["alarms"])
    title = f"{f'({alarms}) ' if alarms else ''}{status['cluster']['name']} - p2pcluster"
    attributes = {"id": "view", "data-title": title, "class": "stale" if snapshot.trouble else None}
    return element(
        "div", attributes, trouble, _cluster(status), _alarms(status["alarms"]),
        *(_pipeline(snapshot, status, pipeline) for pipeline in status["pipelines"]),
        *(() if status["pipelines"] else [element("p", {}, "No pipeline is deployed.")]),
        _nodes(status["nodes"]), _parked(status, snapshot.parked))


def _cluster(status: Record) -> Html:
    cluster, leader = status["cluster"], status["leader"]
    facts = (("cluster", cluster["name"]), ("led by", leader["name"]), ("at", leader["address"]), ("term", cluster["term"]),
             ("entry", _count(cluster["commit_index"])))
    pairs = (element("div", {}, element("dt", {}, name), element("dd", {}, str(value))) for name, value in facts)
    return element("dl", {"class": "facts"}, *pairs)


def _alarms(alarms: Sequence[str]) -> Html:
    if not alarms:
        return Html()
    return element("section", {"class": "alarms", "aria-label": "alarms", "aria-live": "polite"},
                   element("ul", {}, *(element("li", {}, alarm) for alarm in alarms)))


def _pipeline(snapshot: Snapshot, status: Record, pipeline: Record) -> Html:
    name = pipeline["name"]
    stages = [stage for stage in status["stages"] if stage["pipeline"] == name]
    queues = [queue for queue in status["queues"] if queue["pipeline"] == name]
    manifest = (snapshot.manifests or {}).get(name)
    if manifest is not None:
        places = {record["name"]: at for at, record in enumerate(manifest["queues"])}
        queues.sort(key=lambda queue: places.get(queue["name"], len(places)))
    lines = snapshot.lines or {}
    state = element("span", {"class": f"state {pipeline['state']}"}, f"run {pipeline['run']} {pipeline['state']}")
    head = element("h2", {}, name, " ", state, " ", element("span", {"class": "version"}, f"version {pipeline['version'][:8]}{_rolled(pipeline)}"))
    ways = (("across", False), ("down", True)) if manifest else ()
    drawn = [_scrolled(graph(manifest, stages, queues, down), name, way) for way, down in ways if manifest]
    return element(
        "section", {}, head, *drawn,
        table(f"stages of {name}", STAGE_HEADS, (_stage_row(stage, lines) for stage in stages)),
        table(f"queues of {name}", QUEUE_HEADS, (_queue_row(queue, lines) for queue in queues)))


def _rolled(pipeline: Record) -> str:
    return "" if pipeline["rollout"] is None else f" on {pipeline['rollout']} of the nodes so far"


def _scrolled(drawn: Html, name: str, way: str) -> Html:
    return element("div", {"class": f"scroll graph {way}", "role": "region", "tabindex": 0, "aria-label": f"graph of {name}"}, drawn)


def _stage_row(stage: Record, lines: Lines) -> list[str]:
    service = "" if stage["service_ms"] is None else f"{stage['service_ms']:.3g}"
    line = sparkline(lines.get(("stage", stage["pipeline"], stage["name"]), ()))
    return [stage["name"], str(stage["processes"]), _rate(stage["rate_per_s"]), line, service, _count(stage["done"]),
            _parked_count(stage["parked"]), stage["idle_because"] or ""]


def _queue_row(queue: Record, lines: Lines) -> list[str]:
    line = sparkline(lines.get(("queue", queue["pipeline"], queue["name"]), ()))
    return [queue["name"], _count(queue["ready"]), _count(queue["leased"]), line, _count(queue["delayed"]),
            _parked_count(queue["parked"]), _rate(queue["rate_in_per_s"]), _rate(queue["rate_out_per_s"]),
            "" if queue["oldest_s"] is None else f"{queue['oldest_s']:.0f}"]


def _nodes(nodes: Sequence[Record]) -> Html:
    return element("section", {}, element("h2", {}, "Nodes"), table("nodes", NODE_HEADS, map(_node_row, nodes)))


def _node_row(node: Record) -> list[str]:
    facts = node["facts"]
    memory = facts.get("memory_gb")
    return [node["name"], element("span", {"class": f"role {node['role']}"}, node["role"]), str(node["address"]), str(node["slots"]),
            str(facts.get("cores", "")), "" if memory is None else str(memory), f"{facts.get('os', '')} python {facts.get('python', '')}",
            ", ".join(map(str, facts.get("tags", ())))]


def _parked(status: Record, items: Sequence[Record]) -> Html:
    count = sum(queue["parked"] for queue in status["queues"])
    if not count:
        return Html()
    shown = items[:PARKED_SHOWN_MAX]
    more = count - len(shown)
    rest = [element("p", {}, f"{_count(more)} more: python -m p2pcluster parked list")] if more > 0 else []
    return element("section", {}, element("h2", {}, f"Parked items: {_count(count)}"), *map(_parked_item, shown), *rest)


def _parked_item(item: Record) -> Html:
    error = item["error"]
    head = element("summary", {}, element("b", {}, item["id"]), " ", str(error.get("text", "")))
    times = item["deliveries"]
    where = f"parked after {times} {'delivery' if times == 1 else 'deliveries'}, in run {item['run']}, on node {error.get('node')}"
    stderr = "\n".join(map(str, error.get("stderr") or ()))
    blocks = [element("pre", {"tabindex": 0}, text) for text in (error.get("traceback"), stderr) if text]
    return element("details", {"id": f"parked-{item['id']}"}, head, element("p", {}, where), *blocks)


# ---- the graph

STAGE_SIZE = (136, 52)
QUEUE_SIZE = (80, 32)
GAP = 24  # along the way of the items
ROW_GAP = 26
MARGIN = 14
NAME_CHARS = 16  # that a box has room for
LABEL_CHARS = 12
LABEL_CHAR_WIDTH = 7
FITTING_WIDTHS = (900, 1600)  # of a drawing that is made a little smaller where that shows all of it; a wider one is scrolled


class _Box(NamedTuple):
    """A stage or a queue in the drawing: `x, y` are its middle."""

    kind: str
    name: str
    x: float
    y: float
    width: float
    height: float


def graph(manifest: Record, stages: Sequence[Record], queues: Sequence[Record], down: bool = False) -> Html:
    """A pipeline as SVG, from left to right, or from top to bottom for narrow windows; stages are boxes, queues pills with their depth."""
    edges = list(_edges(manifest))
    boxes, width, height = _placed(manifest, edges, down)
    counts = {("stage", stage["name"]): stage for stage in stages} | {("queue", queue["name"]): queue for queue in queues}
    records = {("queue", record["name"]): record for record in manifest["queues"]}
    kinds = {stage["name"]: stage["kind"] for stage in manifest["stages"]}
    drawn = [_edge(boxes[a], boxes[b], label, is_back, down) for a, b, label, is_back in edges]
    for key, box in boxes.items():
        told = counts.get(key)
        drawn.append(_stage_box(box, kinds[box.name], told) if box.kind == "stage" else _queue_pill(box, records[key], told))
    fits = "fits" if FITTING_WIDTHS[0] < width <= FITTING_WIDTHS[1] else None
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "class": fits, "aria-label": "stages and queues; the tables below say the same"}
    return _svg(width, height, attributes, *drawn)


def _svg(width: float, height: float, attributes: Mapping[str, object], *children: Html) -> Html:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return element("svg", {**attributes, **size, "role": "img"}, *children)


def _text(kind: str, x: float, y: float, text: str) -> Html:
    return element("text", {"class": kind, "x": f"{x:g}", "y": f"{y:g}"}, text)


def _rect(kind: str | None, x: float, y: float, width: float, height: float, radius: float) -> Html:
    size = {"width": f"{width:.4g}", "height": f"{height:g}", "rx": f"{radius:g}"}
    return element("rect", {"class": kind, "x": f"{x:g}", "y": f"{y:g}", **size})


_Key = tuple[str, str]
_Edge = tuple[_Key, _Key, str | None, bool]


def _edges(manifest: Record) -> Iterator[_Edge]:
    back = {tuple(edge) for edge in manifest["back_edges"]}
    for stage in manifest["stages"]:
        if stage["reads"]:
            yield ("queue", stage["reads"]), ("stage", stage["name"]), None, False
        for port in stage["ports"]:
            for queue in port["queues"]:
                yield ("stage", stage["name"]), ("queue", queue), port["label"], (stage["name"], queue) in back


def _placed(manifest: Record, edges: Sequence[_Edge], down: bool) -> tuple[dict[_Key, _Box], float, float]:
    """Where each stage and queue lies, and how large the drawing is."""
    ranks = _ranks(manifest)
    columns = [list(group) for _, group in groupby(sorted(ranks, key=ranks.__getitem__), key=ranks.__getitem__)]
    before: dict[_Key, list[_Key]] = {}
    for a, b, _, is_back in edges:
        if not is_back:
            before.setdefault(b, []).append(a)
    sizes = {key: STAGE_SIZE if key[0] == "stage" else QUEUE_SIZE for key in ranks}
    along, across = (1, 0) if down else (0, 1)  # which of width and height is the way of the items
    step = STAGE_SIZE[across] + ROW_GAP
    breadth = max(map(len, columns), default=0) * step - ROW_GAP + 2 * MARGIN
    places: dict[_Key, tuple[float, float]] = {}
    at, gap = float(MARGIN), 0
    for column in columns:
        length = max(sizes[key][along] for key in column)
        near = {key: _mean([places[one][1] for one in before.get(key, ())], breadth / 2) for key in column}
        first = _mean(list(near.values()), breadth / 2) - (len(column) - 1) / 2 * step  # beside what leads there, and inside
        first = min(max(first, MARGIN + STAGE_SIZE[across] / 2), breadth - MARGIN - STAGE_SIZE[across] / 2 - (len(column) - 1) * step)
        for row, key in enumerate(sorted(column, key=lambda key: near[key])):
            places[key] = (at + length / 2, first + row * step)
        labels = [len(_short(label, LABEL_CHARS)) for a, _, label, _ in edges if label and a in column]
        gap = GAP + (0 if down else LABEL_CHAR_WIDTH * max(labels, default=0))
        at += length + gap
    # An edge that goes back runs beside everything else.
    room = ROW_GAP + MARGIN if any(is_back for *_, is_back in edges) else 0
    size = (at - gap + MARGIN, breadth + room)
    boxes = {key: _Box(*key, *(place[::-1] if down else place), *sizes[key]) for key, place in places.items()}
    return boxes, size[along], size[across]


def _ranks(manifest: Record) -> dict[_Key, int]:
    """How far from an input each stage and queue stands, edges that go back left out."""
    back = {tuple(edge) for edge in manifest["back_edges"]}
    ranks: dict[_Key, int] = {}
    records = {record["name"]: record for record in manifest["queues"]}
    reads = {stage["name"]: stage["reads"] for stage in manifest["stages"]}

    def place(queue: str) -> int:
        feeders = [stage for stage in records[queue]["fed_by"] if (stage, queue) not in back]
        ranks["queue", queue] = max((ranks["stage", stage] + 1 for stage in feeders), default=0)
        return ranks["queue", queue]

    for stage in manifest["order"]:
        ranks["stage", stage] = place(reads[stage]) + 1 if reads[stage] else 0
    for queue, record in records.items():
        if record["read_by"] is None:
            place(queue)
    return ranks


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _edge(a: _Box, b: _Box, label: str | None, is_back: bool, down: bool) -> Html:
    if is_back:
        return element("path", {"class": "edge back", "d": _way_back(a, b, down)})
    if down:
        x, y, u, v = a.x, a.y + a.height / 2, b.x, b.y - b.height / 2
        bend, end = f"{x:g},{(y + v) / 2:g} {u:g},{(y + v) / 2:g}", (u, v - 4)
    else:
        x, y, u, v = a.x + a.width / 2, a.y, b.x - b.width / 2, b.y
        bend, end = f"{(x + u) / 2:g},{y:g} {(x + u) / 2:g},{v:g}", (u - 5, v - 5)
    drawn = element("path", {"class": "edge", "d": f"M{x:g},{y:g} C{bend} {u:g},{v:g}"})
    if label is None:
        return drawn
    return joined([drawn, _text("label port", *end, _short(label, LABEL_CHARS))])


def _way_back(a: _Box, b: _Box, down: bool) -> str:
    """Beside everything else: below what runs from left to right."""
    far = 2.0 * ROW_GAP + MARGIN
    if down:
        x, y, u, v = a.x + a.width / 2, a.y, b.x + b.width / 2, b.y
        return f"M{x:g},{y:g} C{x + far:g},{y:g} {u + far:g},{v:g} {u:g},{v:g}"
    x, y, u, v = a.x, a.y + a.height / 2, b.x, b.y + b.height / 2
    return f"M{x:g},{y:g} C{x:g},{y + far:g} {u:g},{v + far:g} {u:g},{v:g}"


def _stage_box(box: _Box, kind: str, stage: Record | None) -> Html:
    left, top = box.x - box.width / 2, box.y - box.height / 2
    works = stage is not None and stage["processes"] and not stage["idle_because"]
    told = "" if stage is None else f"{stage['processes']} × · {_rate(stage['rate_per_s'])}/s"
    why = "" if stage is None or not stage["idle_because"] else f": {stage['idle_because']}"
    return element(
        "g", {"class": f"stage {kind}{' works' if works else ''}"}, element("title", {}, f"{kind} {box.name}{why}"),
        _rect(None, left, top, box.width, box.height, 7 if kind == "stage" else 16),
        _text("name", box.x, box.y - 4, _short(box.name, NAME_CHARS)), _text("told", box.x, box.y + 15, told))


def _queue_pill(box: _Box, record: Record, queue: Record | None) -> Html:
    left, top = box.x - box.width / 2, box.y - box.height / 2
    depth = 0 if queue is None else _depth(queue)
    full = min(1.0, depth / record["maxsize"]) if record["maxsize"] else 0.0
    room = box.width - 2 * MARGIN
    title = f"queue {box.name}: {depth:,} items" + (f" of at most {record['maxsize']:,}" if record["maxsize"] else "")
    parts = [
        element("title", {}, title),
        _rect(None, left, top, box.width, box.height, box.height / 2),
        _rect("fill", left + MARGIN, top + box.height - 6, room * full, 2, 1),
        _text("depth", box.x, box.y + 4, _brief(depth)),
    ]
    if record["read_by"] != box.name:
        label = "results" if record["results"] else box.name
        parts.append(_text("label", box.x, top - 5, _short(label, LABEL_CHARS)))
    if queue is not None and queue["parked"]:
        parts.append(_text("parked", box.x, top + box.height + 13, f"{_brief(queue['parked'])} parked"))
    return element("g", {"class": "queue holds" if depth else "queue"}, *parts)


SPARK_SIZE = (120, 22)


@lru_cache(maxsize=1024)  # a line changes every few seconds, and is drawn every second
def sparkline(values: Values) -> Html:
    """Ten minutes as a small line, with gaps where nothing is known."""
    width, height = SPARK_SIZE
    step = width / max(1, len(values) - 1)
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    drawn = [element("path", {"class": "base", "d": f"M0,{height - .5}H{width}"})]
    for is_gap, group in groupby(enumerate(values), key=lambda point: point[1] is None):
        if not is_gap:
            run = [f"{at * step:.1f},{height - 1 - (height - 3) * (value or 0.0) / top:.1f}" for at, value in group]
            first, last = (point.partition(",")[0] for point in (run[0], run[-1]))
            drawn.append(element("path", {"class": "area", "d": f"M{first},{height} L{' '.join(run)} {last},{height}Z"}))
            drawn.append(element("path", {"class": "line", "d": f"M{' '.join(run)}{' h.1' if len(run) == 1 else ''}"}))
    known = [value for value in values if value is not None]
    label = f"at most {max(known):,.0f} in ten minutes" if known else "nothing is known yet"
    return _svg(width, height, {"class": "spark", "aria-label": label}, element("title", {}, label), *drawn)


# ---- numbers and names


def _depth(queue: Record) -> int:
    return int(queue["ready"] + queue["leased"] + queue["delayed"])


def _count(number: float) -> str:
    return f"{number:,}"


def _brief(number: int) -> str:
    """Six characters at most, where there is little room."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if number >= 100 * size or (unit == "M" and number >= size):
            return f"{number / size:,.0f}{unit}" if number >= 100 * size else f"{number / size:.1f}{unit}"
    return f"{number:,}"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10 or per_s == 0 else f"{per_s:.1f}"


def _parked_count(count: int) -> Html:
    return element("span", {"class": "parked" if count else None}, _count(count))


def _short(name: str, chars: int) -> str:
    return name if len(name) <= chars else name[: chars - 1] + "…"


# ---- metrics


class _Metric(NamedTuple):
    """One name of the metrics with what it is worth, by labels."""

    name: str
    kind: str
    help: str
    samples: list[tuple[dict[str, str], float]]


def metrics(status: Record | None) -> str:
    """The Prometheus text format. Labels are names that somebody deployed or gave a machine, never ids of items or texts of errors."""
    found = [_Metric("up", "gauge", "Whether the cluster could be asked.", [({}, 0 if status is None else 1)])]
    if status is not None:
        found += [*_cluster_metrics(status), *_stage_metrics(status["stages"]), *_queue_metrics(status["queues"])]
    dropped = sum(max(0, len(metric.samples) - SERIES_MAX) for metric in found)
    found.append(_Metric("series_dropped", "gauge", f"Series left out, beyond {SERIES_MAX} of one metric.", [({}, dropped)]))
    return "".join(line + "\n" for metric in found if metric.samples for line in _metric_lines(metric))


def _cluster_metrics(status: Record) -> list[_Metric]:
    nodes, pipelines = status["nodes"], status["pipelines"]
    return [
        _Metric("term", "gauge", "The term of the leader.", [({}, status["cluster"]["term"])]),
        _Metric("commit_index", "gauge", "The last entry that is committed.", [({}, status["cluster"]["commit_index"])]),
        _Metric("alarms", "gauge", "Alarms that hold now.", [({}, len(status["alarms"]))]),
        _Metric("nodes", "gauge", "Nodes that are here, by role.",
                [({"role": role}, sum(node["role"] == role for node in nodes)) for role in ROLES]),
        _Metric("node_slots", "gauge", "Slots of a node.", [({"node": node["name"], "id": node["id"]}, node["slots"]) for node in nodes]),
        _Metric("pipeline_run", "gauge", "The number of the run.", [({"pipeline": one["name"]}, one["run"]) for one in pipelines]),
        _Metric("pipeline_running", "gauge", "Whether the run is under way.",
                [({"pipeline": one["name"]}, one["state"] == "running") for one in pipelines]),
    ]


def _stage_metrics(stages: Sequence[Record]) -> list[_Metric]:
    named = [({"pipeline": stage["pipeline"], "stage": stage["name"]}, stage) for stage in stages]
    return [
        _Metric("stage_processes", "gauge", "Processes of a stage.", [(labels, stage["processes"]) for labels, stage in named]),
        _Metric("stage_done_items_total", "counter", "Items that a stage finished, on all nodes; the journal counts.",
                [(labels, stage["done"]) for labels, stage in named]),
        _Metric("stage_service_seconds", "gauge", "Mean time of one item in a stage.",
                [(labels, stage["service_ms"] / 1000) for labels, stage in named if stage["service_ms"] is not None]),
    ]


def _queue_metrics(queues: Sequence[Record]) -> list[_Metric]:
    named = [({"pipeline": queue["pipeline"], "queue": queue["name"]}, queue) for queue in queues]
    return [
        _Metric("queue_items", "gauge", "Items of a queue, by state.",
                [({**labels, "state": state}, queue[state]) for labels, queue in named for state in ITEM_STATES]),
        _Metric("queue_oldest_seconds", "gauge", "Age of the oldest open item.",
                [(labels, queue["oldest_s"]) for labels, queue in named if queue["oldest_s"] is not None]),
    ]


def _metric_lines(metric: _Metric) -> Iterator[str]:
    name = f"p2pcluster_{metric.name}"
    yield f"# HELP {name} {metric.help}"
    yield f"# TYPE {name} {metric.kind}"
    for labels, value in metric.samples[:SERIES_MAX]:
        told = ",".join(f'{key}="{_label(text)}"' for key, text in labels.items())
        yield f"{name}{{{told}}} {value + 0}" if told else f"{name} {value + 0}"


def _label(text: str) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
