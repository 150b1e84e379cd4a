"""The page of a node: who may read it, how, and how often a cluster is asked for it.

Threads of their own serve it. They never touch the node: like every client they ask the cluster over a connection, at most once a second
for all who look together, and once in a few seconds while nobody does, so that who comes finds the last ten minutes. What they show is
decided in `view`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from p2pcluster.client import Cluster, Link
from p2pcluster.config import Address, Options
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterError, WrongUsage
from p2pcluster.view import HISTORY_STEP_S, History, Snapshot, metrics

SNAPSHOT_S = 1.0  # between two questions to the cluster, however many look
ANSWER_S = 3.0  # an election fits in
PARKED_S = 5.0  # between two looks at the parked items, which may be megabytes of tracebacks
CONNECTIONS_MAX = 64  # each has a thread
SOCKET_TIMEOUT_S = 10.0  # who reads or writes nothing for so long has gone
RETRY_MS = 1000  # after which a browser comes back
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HEAD, _, _TAIL = Path(__file__).with_name("page.html").read_text("utf-8").partition("<!-- view -->")


def _allowed_inline(tag: str) -> str:
    """The page's own style or script, as its Content-Security-Policy names it: no other one is heard."""
    text = (_HEAD + _TAIL).partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": "; ".join((
        "default-src 'none'", f"style-src {_allowed_inline('style')}", f"script-src {_allowed_inline('script')}", "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


# ---- asking


class Watch:
    """The cluster as it was a second ago at most, for many threads, and its last ten minutes."""

    def __init__(self, connect: Callable[[], Link], now_s: Callable[[], float] = time.monotonic) -> None:
        self._connect = connect
        self._now_s = now_s
        self._lock = threading.Lock()
        self._lookers = 0
        self._link: Link | None = None
        self._history = History()
        self._manifests: dict[str, tuple[str, dict[str, Any]]] = {}  # with the version that each is of
        self._parked: tuple[float, list[dict[str, Any]]] = (float("-inf"), [])
        self._asked_s = self._sampled_s = float("-inf")
        self._snapshot = Snapshot()

    def look(self) -> Snapshot:
        """What is known; asked for when the last answer is a second old."""
        with self._lock:
            if self._now_s() - self._asked_s >= SNAPSHOT_S:
                self._asked_s = self._now_s()
                self._snapshot = self._ask()
            return self._snapshot

    def sample(self) -> None:
        """One more point of the history, unless somebody who looks has made one."""
        with self._lock:
            if self._now_s() - self._sampled_s >= HISTORY_STEP_S:
                with contextlib.suppress(ClusterError):  # a gap; who looks is told why
                    self._status(Cluster(self._opened(), None))

    def close(self) -> None:
        """Nobody looks any more."""
        with self._lock:
            self._hang_up()

    def _ask(self) -> Snapshot:
        old = self._snapshot
        try:
            link = self._opened()
            status = self._status(Cluster(link, None))
            manifests = {one["name"]: self._manifest(link, one["name"], one["version"]) for one in status["pipelines"]}
            parked = self._parked_items(link, status)
        except ClusterError as error:
            self._hang_up()
            return Snapshot(old.status, old.manifests, old.parked, old.lines, str(error))
        return Snapshot(status, manifests, parked, self._history.lines())

    def _opened(self) -> Link:
        self._link = self._link or self._connect()
        return self._link

    def _status(self, cluster: Cluster) -> dict[str, Any]:
        status = cluster.status()
        self._sampled_s = self._now_s()
        self._history.add(self._sampled_s, status)
        return status

    def _manifest(self, link: Link, pipeline: str, version: str) -> dict[str, Any]:
        """Asked for once for each version."""
        known = self._manifests.get(pipeline)
        if known is None or known[0] != version:
            known = self._manifests[pipeline] = (version, Cluster(link, pipeline).manifest)
        return known[1]

    def _parked_items(self, link: Link, status: dict[str, Any]) -> list[dict[str, Any]]:
        """Some of them, as they were a few seconds ago at most."""
        if not any(queue["parked"] for queue in status["queues"]):
            self._parked = (float("-inf"), [])
        elif self._now_s() - self._parked[0] >= PARKED_S:
            self._parked = (self._now_s(), link.call(Message("parked", {"pipeline": None, "after": None})).fields["parked"])
        return self._parked[1]

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


# ---- serving


@contextlib.contextmanager
def serving(options: Options) -> Iterator[str]:
    """Serve the page of the node with these options; gives its address. Raises `WrongUsage` where one cannot listen."""
    assert options.page is not None, "a page was asked for"
    watch = Watch(lambda: Link(options, ANSWER_S))
    try:
        server = _Server(options.page, watch)
    except OSError as error:
        raise WrongUsage(f"--page {options.page}: nobody can listen there ({error.strerror or error}): choose another port, "
                         "or 0 for any that is free") from error
    threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
    threading.Thread(target=_sample, args=(watch, server.closing), name="history", daemon=True).start()
    try:
        yield f"http://{Address(options.page.host, server.server_address[1])}/"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def _sample(watch: Watch, closing: threading.Event) -> None:
    while not closing.wait(HISTORY_STEP_S):
        watch.sample()
    watch.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX  # a browser opens several at once, and what does not fit comes again seconds later

    def __init__(self, address: Address, watch: Watch) -> None:
        self.watch = watch
        self.closing = threading.Event()
        self.own_names = {"localhost", socket.gethostname().lower(), address.host.lower()}
        self._seats = threading.BoundedSemaphore(CONNECTIONS_MAX)
        if ":" in address.host:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the look-up of names that an HTTPServer begins with: it can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._seats.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._seats.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes away in the middle is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with it."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "p2pcluster"
    sys_version = ""
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        answers = {"/": self._page, "/events": self._events, "/api/status": self._status, "/metrics": self._metrics}
        answer = answers.get(self.path.partition("?")[0])
        if not is_own_host(self.headers.get_all("Host", []), self.server.own_names):
            self._refuse(421, "this page answers to an address, localhost, this machine's name and the name given with --page only")
        elif answer is None:
            self._refuse(404, "there are / and /events, /api/status and /metrics")
        else:
            answer()

    do_HEAD = do_GET

    def _only_read(self) -> None:
        self._refuse(405, "the page is for reading: GET it")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _only_read

    def _page(self) -> None:
        self._answer(200, "text/html; charset=utf-8", _HEAD + self.server.watch.look().view + _TAIL)

    def _status(self) -> None:
        found = self.server.watch.look()
        if found.trouble is None:
            self._answer(200, "application/json", json.dumps(found.status))
        else:
            self._answer(503, "application/json", json.dumps({"error": found.trouble}))

    def _metrics(self) -> None:
        found = self.server.watch.look()
        self._answer(200, METRICS_TYPE, metrics(None if found.trouble else found.status))

    def _events(self) -> None:
        """The page's view again and again, each time that it has changed; a line without news shows whether the reader is still there."""
        self._begin(200, "text/event-stream; charset=utf-8")
        shown = None
        while self.command != "HEAD":
            view = self.server.watch.look().view
            news = f"retry: {RETRY_MS}\nevent: view\ndata: {json.dumps(view)}\n\n"
            self.wfile.write(b": no news\n\n" if view == shown else news.encode())
            shown = view
            if self.server.closing.wait(SNAPSHOT_S):
                return

    def _refuse(self, code: int, why: str) -> None:
        self._answer(code, "text/plain; charset=utf-8", why + "\n")

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self._begin(code, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, code: int, kind: str, length: int | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, **HEADERS, "Connection": "close"}.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if code == 405:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the node's."""


def is_own_host(hosts: list[str], own_names: set[str]) -> bool:
    """Whether a request means this page. A stranger's page can have its own name point here and read what we answer, but no address."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?", hosts[0].strip().lower()) if len(hosts) == 1 else None
    if found is None:
        return False
    name = found[1] or found[2]
    return name in own_names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
