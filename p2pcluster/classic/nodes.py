"""The node behind a server of the older API: a daemon in a thread, alone in the cluster of its port, with the queues as a pipeline.

Decided here: the manifest (queues that are fed from outside and never closed, no stages), where home and key lie, and what a start says
of the items that are there from before. It is spoken to as any node is, by `p2pcluster.client`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2pcluster import bundle, config
from p2pcluster.classic import utils
from p2pcluster.classic.queues import Door
from p2pcluster.client import Cluster
from p2pcluster.config import Address
from p2pcluster.daemon import Daemon
from p2pcluster.errors import HomeError, NoLeader, Unavailable
from p2pcluster.home import Home, Keyfile
from p2pcluster.offering import Offer, deploy_messages

START_S = 30.0  # for a node to lead its cluster; a long journal is read first


class QueueNode:
    """One node with its queues, from `start` to `stop`. `fresh`: what is in them from before is dropped."""

    def __init__(self, port: int, authkey: bytes | str, home: str | os.PathLike[str] | None, fresh: bool) -> None:
        self.port = port
        self.options = utils.options_of(port, home)
        self.door: Door | None = None
        self.version = self.zip_sha256 = ""
        self._secret = utils.stretched(authkey, port)
        self._fresh = fresh
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, names: Sequence[str], files: Path | None = None, talks: bool = False) -> None:
        """Be a node with these queues; `files` is the folder that is shipped with them, `talks` says whether clients ask what to run.
        One that is it already has them from here on. Raises `HomeError` where that cannot be."""
        is_new = self._thread is None
        if is_new:
            self._start()
        self._deploy(names, files, talks, is_new)

    def _start(self) -> None:
        options = self.options
        _refuse_taken_port(options.bind, self.port)
        home = Home.open(options.home or config.default_home(Path.home(), options.cluster, socket.gethostname()))
        try:
            keyfile = Keyfile(home.path / config.KEY_FILE) if options.home else Keyfile.default(options.cluster)
            keyfile.set_key(self._secret.decode())
            offer = Offer(without="a server of the older API: this node holds queues, and its clients run the functions")
            daemon = Daemon(options, home, keyfile, offer, alone=True)
        except BaseException:
            home.close()
            raise
        self._thread = threading.Thread(target=self._serve, args=(daemon,), daemon=True)
        self._thread.start()
        host = options.bind if options.bind != config.BIND_ANY else config.BIND_LOOPBACK
        here = utils.options_of(self.port, seed=Address(host, self.port))
        self.door = Door(here, self._secret, lambda trouble: self._raise_what_ended_it())

    def _serve(self, daemon: Daemon) -> None:
        try:
            daemon.run()
        except BaseException as error:  # it belongs to whoever waits
            self._error = error

    def wait(self) -> None:
        """Until the node has ended. Raises what ended it."""
        if self._thread is not None:
            self._thread.join()
        self._raise_what_ended_it()

    def _raise_what_ended_it(self) -> None:
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the node, if it runs; for any thread, and a second call does nothing."""
        if self.door is None or self._thread is None or not self._thread.is_alive():
            return
        with contextlib.suppress(Unavailable, NoLeader), self.door.connect(config.CONNECT_TIMEOUT_S) as cluster:
            cluster.stop()
        self._thread.join(2 * config.DRAIN_S)

    # ---- the queues

    def _deploy(self, names: Sequence[str], files: Path | None, talks: bool, is_new: bool) -> None:
        packed = _packed(files, names)
        self.version, self.zip_sha256 = packed.version, packed.zip_sha256
        manifest = manifest_of(names, talks)
        assert self.door is not None and self._thread is not None
        with self.door.connect(START_S) as cluster:
            origin = {"node": cluster.link.peer.node_id, "name": socket.gethostname(), "folder": str(files or "")}
            record: dict[str, Any] = {"classic": list(names)}
            deployed = cluster.project()
            if deployed is None or (deployed["version"], deployed["manifest"]) != (packed.version, manifest):
                for message in deploy_messages(packed, manifest, record, origin):
                    cluster.check(cluster.link.call(message), utils.PIPELINE)
            if deployed is None or not deployed["run"]:
                cluster.start()
            for name in (utils.ASKED, utils.ANSWERS) if talks else ():
                cluster.discard(name)
            if is_new:
                self._tell_of_before(cluster, names)
        utils.say(f"serving {', '.join(names) or ('functions' if talks else 'no queues')} on port {self.port}")

    def _tell_of_before(self, cluster: Cluster, names: Sequence[str]) -> None:
        waiting = {q["name"]: q["ready"] + q["leased"] + q["delayed"] + q["parked"] for q in cluster.status()["queues"]
                   if q["pipeline"] == utils.PIPELINE}
        if self._fresh:
            for name in waiting:
                cluster.discard(name)
        elif before := [f"{count} in {name}" + ("" if name in names else ", which is not configured now")
                        for name, count in waiting.items() if count]:
            utils.say(f"items from before: {'; '.join(before)}; fresh=True would drop them")


def manifest_of(names: Sequence[str], talks: bool) -> dict[str, Any]:
    """The pipeline of a server: queues without a limit, which clients feed and read."""
    queues = [_queue(name, "pickle") for name in names] + [_queue(name, "json") for name in (utils.ASKED, utils.ANSWERS) if talks]
    return {"format": 1, "pipeline": utils.PIPELINE, "stages": [], "queues": queues, "back_edges": [], "order": [], "params": None,
            "placement": False, "on_done": False}


def _queue(name: str, codec: str) -> dict[str, Any]:
    return {"name": name, "maxsize": None, "bytes_max": None, "codec": codec, "read_by": utils.READER, "fed_by": [], "outside": True,
            "results": False}


def _packed(files: Path | None, names: Sequence[str]) -> bundle.Bundle:
    """The project's files; without any, a file with the names of the queues stands for them."""
    if files is not None:
        return bundle.pack(files)
    with tempfile.TemporaryDirectory(prefix="p2pcluster-") as scratch:
        (Path(scratch) / "queues.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
        return bundle.pack(Path(scratch))


def _refuse_taken_port(bind: str, port: int) -> None:
    try:
        socket.create_server((bind, port)).close()
    except OSError as error:
        raise HomeError(f"port {port} cannot be had ({os.strerror(error.errno or 0)}): end the program that has it, or take another port in server and "
                        "clients") from error
