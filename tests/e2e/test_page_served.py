"""The page of real nodes: read, watched, misused, and looked at in a browser; on the node that leads and on the others."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import browser
from harness import NodeProcess, Site, free_port, wait_for

NAME = "<script>alert(1)<script>"
WAITING = f"""
    from p2pcluster import Pipeline, Queue, stage

    def same(x):
        return x

    waiting = stage(same, name={NAME!r}, where="'nobody' in tags")

    @stage(retries=0)
    def Fail(x):
        raise ValueError("<img src=x onerror=alert(1)>")

    pipeline = Pipeline("page", Queue("in") >> waiting, Queue("bad") >> Fail)
"""
NUMBERS = """
    from p2pcluster import Pipeline, Queue, stage

    @stage
    def Add(x):
        return x + 1

    pipeline = Pipeline("numbers", Queue("in") >> Add)
"""
SAMPLE = re.compile(r'[a-z0-9_]+(\{[a-z]+="(?:[^"\\\n]|\\.)*"(?:,[a-z]+="(?:[^"\\\n]|\\.)*")*\})? [0-9.e+-]+')


def page_of(node: NodeProcess) -> str:
    """Where a node says that its page is."""
    return urlsplit(node.wait_for_line("page at http://").split()[2]).netloc


def ask(where: str, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    link = http.client.HTTPConnection(where, timeout=30)
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    text = answer.read().decode()
    link.close()
    return answer, text


class Texts(HTMLParser):
    """The texts of a view, one for each cell and label."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(markup)

    def handle_data(self, data: str) -> None:
        self.found.append(data)


class Events:
    """The stream of a page's views, read as it comes."""

    def __init__(self, where: str) -> None:
        self._link = http.client.HTTPConnection(where, timeout=30)
        self._link.request("GET", "/events")
        self._answer = self._link.getresponse()
        assert self._answer.status == 200 and self._answer.headers["Content-Type"].startswith("text/event-stream")

    def next(self) -> list[str]:
        """The texts of the next view."""
        while line := self._answer.readline():
            if line.startswith(b"data: "):
                return Texts(json.loads(line.removeprefix(b"data: "))).found
        raise AssertionError("the stream has ended")

    def until(self, text: str) -> list[str]:
        """The first view with a text that has `text` in it."""
        for _ in range(60):
            found = self.next()
            if any(text in one for one in found):
                return found
        raise AssertionError(f"{text!r} did not come: {found}")

    def read_to_the_end(self) -> None:
        """Raises `TimeoutError` when the stream does not end."""
        while self._answer.readline():
            pass

    def close(self) -> None:
        self._answer.close()
        self._link.close()


def start(site: Site, page: object = 0) -> NodeProcess:
    empty = site.folder / "empty"
    empty.mkdir(exist_ok=True)
    node = site.start("run", "--page", page, cwd=empty)
    node.wait_for_line("leads cluster")
    return node


def test_a_page_shows_what_changes_and_is_for_reading_only(site: Site) -> None:
    node = start(site)
    where = page_of(node)
    assert where.startswith("127.0.0.1:")
    site.deploy(WAITING)
    events = Events(where)
    assert NAME in events.until(NAME)
    with site.connect("page") as cluster:
        cluster.put_many("in", range(3))
        events.until("queue in: 3 items")
        cluster.put_many("in", range(1231))
        assert "1,234" in events.until("queue in: 1,234 items")
        cluster.put("bad", 1)
        parked = events.until("Parked items: 1")
        while not any("Traceback" in text for text in parked):
            parked = events.next()
        assert "squares" not in parked and "ValueError: <img src=x onerror=alert(1)>" in "".join(parked)
        assert any("no node satisfies" in text for text in parked), "the alarm"
        status = cluster.status()

    answer, text = ask(where, "/")
    assert answer.status == 200 and "1,234" in Texts(text).found, "it is whole without any script"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"] and "Set-Cookie" not in answer.headers
    answer, text = ask(where, "/api/status")
    assert answer.headers["Content-Type"] == "application/json" and json.loads(text).keys() == status.keys()
    answer, text = ask(where, "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert [line for line in text.splitlines() if not line.startswith(("# HELP ", "# TYPE ")) and not SAMPLE.fullmatch(line)] == []
    assert 'p2pcluster_queue_items{pipeline="page",queue="in",state="ready"} 1234' in text
    answer, text = ask(where, "/", "HEAD")
    assert answer.status == 200 and text == ""

    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(where, "/api/status", method)[0].status == 405, method
    for path in ("/", "/events", "/api/status", "/metrics"):
        answer, text = ask(where, path, Host="evil.example:8000")
        assert answer.status == 421 and "1,234" not in text, path
    assert ask(where, "/../../etc/passwd")[0].status == 404
    _misuse(where)
    assert ask(where, "/")[0].status == 200

    assert node.stop() == 0, "it ends while somebody watches"
    events.read_to_the_end()
    assert not [line for line in node.errors if "Traceback" in line]


def _misuse(where: str) -> None:
    """Noise, half a request, and more connections than there are seats."""
    host, port = where.split(":")
    left_early = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for noise in (os.urandom(4096), b"GET / HTTP/1.1\r\nHost: " + b"x" * 70_000, left_early, b"\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as link:
            link.sendall(noise)
    crowd = [socket.create_connection((host, int(port)), timeout=10) for _ in range(80)]
    for link in crowd:
        link.close()
    wait_for(lambda: _answers(where), "the seats are free again")


def _answers(where: str) -> bool:
    try:
        return ask(where, "/metrics")[0].status == 200
    except (ConnectionError, http.client.HTTPException):
        return False


def test_every_node_serves_it_and_what_it_counts_survives_a_change_of_leader(site: Site) -> None:
    empty = site.folder / "empty"
    empty.mkdir()
    homes = {name: str(site.folder / name) for name in ("one", "two", "three")}
    nodes = {name: site.start("run", cwd=empty, P2PCLUSTER_HOME=home, P2PCLUSTER_PAGE="0") for name, home in homes.items()}
    pages = {name: page_of(node) for name, node in nodes.items()}
    leader = wait_for(lambda: _leader(pages), "three copies that vote", 60)
    site.home = site.folder / leader
    site.deploy(NUMBERS)
    with site.connect("numbers") as cluster:
        cluster.put_many("in", range(500))
    follower = next(name for name in nodes if name != leader)
    done = 'p2pcluster_stage_done_items_total{pipeline="numbers",stage="Add"} 500'
    wait_for(lambda: done in ask(pages[follower], "/metrics")[1], "a follower's page counts what the leader's journal has")
    events = Events(pages[follower])
    assert "500" in events.until("Add")
    nodes[leader].kill()
    after = wait_for(lambda: _metrics_of_another(pages[follower], leader), "another node leads, and the page says so")
    assert done in after
    found = events.until("voter")
    while leader_of(found).endswith(leader):
        found = events.next()
    assert "500" in found, "the same stream goes on"
    events.close()


def leader_of(texts: list[str]) -> str:
    return texts[texts.index("led by") + 1]


def _leader(pages: dict[str, str]) -> str | None:
    """Who leads, once all three have a vote."""
    answer, text = ask(next(iter(pages.values())), "/api/status")
    if answer.status != 200:
        return None
    status = json.loads(text)
    roles = sorted(node["role"] for node in status["nodes"])
    return str(status["leader"]["name"]).rpartition("/")[2] if roles == ["leader", "voter", "voter"] else None


def _metrics_of_another(where: str, old: str) -> str | None:
    answer, text = ask(where, "/api/status")
    if answer.status != 200 or json.loads(text)["leader"]["name"].endswith(old):
        return None
    text = ask(where, "/metrics")[1]
    return text if "p2pcluster_up 1" in text else None


def test_a_page_that_cannot_be_served_is_one_line(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = site.do("run", "--page", where)
    assert done.code == 2 and done.the_error().startswith(f"--page {where}: nobody can listen there")


# ---- in a browser


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[browser.Tab]:
    path = browser.found()
    if path is None or sys.platform != "linux":
        pytest.skip("no Chromium is installed here")
    with browser.tab(path, tmp_path / "browser") as made:
        yield made


def test_in_a_browser_it_lives_keeps_what_is_open_and_comes_back(site: Site, tab: browser.Tab) -> None:
    port = free_port()
    node = start(site, port)
    site.deploy(WAITING)
    with site.connect("page") as cluster:
        cluster.put("bad", 1)
        cluster.put_many("in", range(5))
        wait_for(lambda: len(cluster.parked()) == 1, "the item is parked")

    tab.do("Page.navigate", url=f"http://127.0.0.1:{port}/")
    _see(tab, "document.readyState === 'complete' && live.textContent === 'live'", "the page is live")
    assert NAME in tab.ask("document.querySelector('tbody th').textContent")
    assert tab.ask("document.querySelectorAll('script').length") == 1, "a stage's name is text"
    assert tab.ask("document.title") == "(1) default - p2pcluster"

    # What a person has open and where he is stay, while the numbers change.
    _see(tab, "document.querySelector('details')", "the parked item is shown")
    tab.ask("document.querySelector('summary').focus()")
    tab.press("Enter")
    assert tab.ask("document.querySelector('details').open"), "by keyboard"
    tab.ask("window.kept = document.querySelector('details')")
    with site.connect("page") as cluster:
        cluster.put_many("in", range(1000))
    _see(tab, "document.querySelector('main').textContent.includes('1,005')", "the depth changes without a reload")
    assert tab.ask("kept === document.querySelector('details') && kept.open && document.activeElement === kept.firstChild")
    with site.connect("page") as cluster:
        cluster.put("bad", 2)
    _see(tab, "document.querySelectorAll('details').length === 2", "a second item is parked")
    assert tab.ask("document.querySelectorAll('details')[0].open && !document.querySelectorAll('details')[1].open")

    # Narrow and dark.
    assert tab.ask("getComputedStyle(document.querySelector('.across')).display") == "block"
    light = tab.ask("getComputedStyle(document.documentElement).backgroundColor")
    tab.do("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    tab.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.ask("document.documentElement.scrollWidth <= 360"), "only what is inside scrolls"
    assert tab.ask("getComputedStyle(document.querySelector('.across')).display") == "none"
    assert tab.ask("getComputedStyle(document.documentElement).backgroundColor") != light

    # By keyboard to everything that scrolls or opens.
    tab.ask("document.activeElement.blur()")
    reached = set()
    for _ in range(12):
        tab.press("Tab")
        reached.add(tab.ask("document.activeElement.getAttribute('aria-label') || document.activeElement.tagName"))
    assert {"A", "graph of page", "stages of page", "queues of page", "nodes", "SUMMARY"} <= reached

    node.stop()
    _see(tab, "live.textContent.includes('does not answer')", "the page says that nobody answers")
    assert tab.ask("document.querySelector('main').textContent.includes('1,005')"), "what was known stays"
    start(site, port)
    _see(tab, "live.textContent === 'live'", "it comes back by itself")
    with site.connect("page") as cluster:
        cluster.put("in", 0)
    _see(tab, "document.querySelector('main').textContent.includes('1,006')", "and lives")
    assert tab.complaints == []


def _see(tab: browser.Tab, fact: str, what: str) -> Any:
    return wait_for(lambda: tab.ask(f"Boolean({fact})"), what)
