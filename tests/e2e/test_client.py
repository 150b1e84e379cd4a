"""`connect`: a program's way into a cluster, against real nodes that are also killed under it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from harness import Proxy, Site, wait_for

from p2pcluster import ItemsParked, connect
from p2pcluster.client import Cluster
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterError, ClusterNotFound, QueueFull, Unavailable, UnknownName, ValueRefused

HEAD = "from p2pcluster import At, DROP, Pipeline, Queue, To, current, sink, source, stage\n"
ECHO = (
    HEAD
    + """
@stage(retries=0)
def Echo(x):
    if x == "bad":
        raise ValueError("bad")
    return [x, current().key]

pipeline = Pipeline("echo", Queue("in") >> Echo, params={"a": 1})
"""
)
OUT = (
    HEAD
    + """
@stage
def Same(x): return x

pipeline = Pipeline("{name}", Queue("in") >> Same >> Queue("out"))
"""
)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A node with a pipeline that is fed from outside."""
    made = Site(tmp_path_factory.mktemp("echo"))
    made.hands()
    made.deploy(ECHO, "echo")
    yield made
    made.close()


@pytest.fixture
def cluster(echo: Site) -> Iterator[Cluster]:
    """A connection to it, and a run of its own for the test."""
    with echo.connect("echo") as connected:
        if _state(connected) == "done":
            connected.start()
        yield connected
        if _state(connected) == "running":
            connected.close("in")
            connected.discard("in")


def _state(cluster: Cluster) -> str:
    return next(str(p["state"]) for p in cluster.status()["pipelines"] if p["name"] == cluster.pipeline)


def _feed_to_the_end(cluster: Cluster) -> list[Any]:
    cluster.close("in")
    cluster.wait(30)
    return [value for value, _ in cluster.results("Echo")]


# ---- put


def test_what_is_put_is_processed_in_any_of_the_ways_to_put_it(cluster: Cluster) -> None:
    cluster.put("in", {"number": 7})
    assert cluster.put_many("in", (x for x in range(5000))) == 5000
    assert cluster.put_many("in", []) == 0
    found = _feed_to_the_end(cluster)
    assert sorted(map(str, found)) == sorted(map(str, [{"number": 7}, *range(5000)]))


def test_a_key_is_put_once_and_is_the_items_key(cluster: Cluster) -> None:
    cluster.put("in", "a", key="order-1")
    cluster.put("in", "a again", key="order-1")
    assert cluster.put_many("in", ["b", "c", "a"], keys=["order-2", "order-3", "order-1"]) == 2
    cluster.close("in")
    cluster.wait(30)
    assert sorted(cluster.results("Echo")) == [["a", "order-1"], ["b", "order-2"], ["c", "order-3"]]


def test_a_value_that_cannot_be_put_is_refused_and_nothing_of_its_batch_is_put(cluster: Cluster) -> None:
    with pytest.raises(ValueRefused, match="cannot be put"):
        cluster.put_many("in", [1, 2, lambda: None])
    with pytest.raises(ValueRefused, match="16 MiB"):
        cluster.put_many("in", [1, bytes((16 << 20) + 1)])
    assert _feed_to_the_end(cluster) == []


def test_what_the_node_cannot_take_is_refused_with_the_reason_and_not_asked_again(cluster: Cluster) -> None:
    """A client of another mind would else ask until its time is over, and call the outcome unknown."""
    reply = cluster.link.call(Message("retry", {"queue": "echo/in", "ids": ["first"]}))
    with pytest.raises(ClusterError, match=r"retry: refused \(command 'retry': field 'ids'") as caught:
        cluster.check(reply, "retry")
    assert caught.value.definite
    cluster.put("in", 1)
    assert _feed_to_the_end(cluster) == [1]


def test_names_that_do_not_exist(cluster: Cluster, echo: Site) -> None:
    with pytest.raises(UnknownName, match="no queue 'inn'; it has in, Echo.results"):
        cluster.put("inn", 1)
    with pytest.raises(UnknownName, match="no queue 'Ekho'"):
        list(cluster.results("Ekho"))
    with pytest.raises(UnknownName, match="no pipeline 'ecco'"), echo.connect("ecco") as other:
        other.put("in", 1)


def test_a_closed_queue_takes_nothing_more_until_the_next_run(cluster: Cluster) -> None:
    cluster.close("in")
    with pytest.raises(ValueRefused, match="closed"):
        cluster.put("in", 1)
    cluster.wait(30)
    run = cluster.start(params={"a": 2})
    cluster.put("in", 1)
    assert run > 1
    assert _feed_to_the_end(cluster) == [1]


def test_a_run_that_is_under_way_is_not_started_over(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="is under way"):
        cluster.start()


def test_a_queue_that_stays_full_is_said_to_be(echo: Site) -> None:
    echo.deploy(
        HEAD
        + """
@stage(retries=1000, backoff_s=60)
def Never(x): raise OSError

pipeline = Pipeline("narrow", Queue("in", maxsize=3) >> Never)
""",
        "narrow",
    )
    with echo.connect("narrow", timeout_s=1) as cluster:
        for x in range(3):
            cluster.put("in", x)
        with pytest.raises(QueueFull, match="stayed full for 1 s"):
            cluster.put("in", 3)
        assert cluster.status()["leader"]["name"], "the connection is of use still"


def test_a_patient_put_waits_for_room_beyond_its_time_and_is_put_once(echo: Site, proxy: Proxy) -> None:
    """As the verb `put` does; asking again needs a new connection, by which the test sees that it did."""
    echo.deploy(
        HEAD
        + """
import time
from pathlib import Path

@stage(processes=1)
def Gated(x):
    while not Path(current().out_dir, "open").exists():
        time.sleep(0.01)
    return x

pipeline = Pipeline("gated", Queue("in", maxsize=3) >> Gated)
""",
        "gated",
    )
    with _connect_through(proxy, echo, "gated", 0.5) as cluster:
        cluster.is_patient = True
        cluster.put_many("in", [0, 1, 2])
        putting = threading.Thread(target=lambda: cluster.put("in", 3))
        putting.start()
        wait_for(lambda: proxy.connections >= 3, "it asks again")
        (echo.out("gated") / "open").touch()
        putting.join()
        cluster.close("in")
        cluster.wait(30)
        assert sorted(cluster.results("Gated")) == [0, 1, 2, 3]


def test_what_was_put_before_a_put_of_many_failed_is_said(echo: Site) -> None:
    echo.deploy(
        HEAD
        + """
@stage(retries=1000, backoff_s=60)
def Never(x): raise OSError

pipeline = Pipeline("short", Queue("in", maxsize=10) >> Never)
""",
        "short",
    )
    with echo.connect("short", timeout_s=1) as cluster:
        with pytest.raises(QueueFull) as caught:
            cluster.put_many("in", list(range(5000)))
        assert caught.value.__notes__ == ["the first 2000 of 5000 values were put"]


# ---- wait and parked


def test_wait_raises_when_items_are_parked_and_retry_opens_the_run_again(cluster: Cluster) -> None:
    cluster.put_many("in", ["good", "bad"])
    cluster.close("in")
    with pytest.raises(ItemsParked, match="1 parked: look with python -m p2pcluster parked list"):
        cluster.wait(30)
    assert _state(cluster) == "done"
    (item,) = cluster.parked()
    assert item["queue"] == "echo/in"
    assert cluster.retry("Echo") == 1
    with pytest.raises(ItemsParked):
        cluster.wait(30)
    assert cluster.discard("Echo", [int(item["id"].rpartition(":")[2])]) == 1
    cluster.wait(30)
    assert [value for value, _ in cluster.results("Echo")] == ["good"]


def test_many_parked_items_are_listed_to_the_last(echo: Site) -> None:
    echo.deploy(
        HEAD
        + """
@sink(retries=0)
def Fail(x): raise ValueError(x)

pipeline = Pipeline("many", Queue("in") >> Fail)
""",
        "many",
    )
    with echo.connect("many") as cluster:
        cluster.put_many("in", list(range(450)))
        cluster.close("in")
        with pytest.raises(ItemsParked, match="450 parked"):
            cluster.wait(30)
        assert [item["id"] for item in cluster.parked()] == [f"many/in:{number}" for number in range(1, 451)]
        assert cluster.discard("Fail") == 450
        assert cluster.parked() == []


def test_wait_gives_up_after_its_time(cluster: Cluster) -> None:
    with pytest.raises(Unavailable):
        cluster.wait(timeout_s=0.3)
    assert _state(cluster) == "running"


# ---- take


def test_take_acknowledges_when_the_next_is_asked_for_and_an_exception_gives_back(echo: Site) -> None:
    echo.deploy(OUT.format(name="taking"), "taking")
    with echo.connect("taking") as cluster:
        cluster.put_many("in", list(range(5)))
        with pytest.raises(RuntimeError), cluster.take("out", wait_s=5) as items:
            assert next(items) == 0
            assert next(items) == 1
            raise RuntimeError("1 is not done")
        with cluster.take("out", limit=3, wait_s=5) as items:
            assert list(items) == [1, 2, 3], "0 was acknowledged, 1 came back and is first again"
        with cluster.take("out", wait_s=5) as items:
            assert next(items) == 4
        with cluster.take("out", wait_s=0.2) as items:
            assert list(items) == [], "what was in hand at the normal end is acknowledged"


def test_what_is_taken_and_not_acknowledged_comes_back_when_the_program_is_gone(echo: Site) -> None:
    echo.deploy(OUT.format(name="leaving"), "leaving")
    with echo.connect("leaving") as cluster:
        cluster.put_many("in", list(range(3)))
        done = echo.python("""
            import os
            from p2pcluster import connect
            with connect("leaving") as cluster, cluster.take("out") as items:
                print(next(items), next(items), flush=True)
                os._exit(0)
        """)
        assert done.out == "0 1\n", done.err
        with cluster.take("out", wait_s=1) as items:
            assert list(items) in ([1, 2], [0, 1, 2]), "whether the acknowledgement of 0 was still heard is chance"


def test_two_takers_share_and_nobody_gets_what_another_has(echo: Site) -> None:
    echo.deploy(OUT.format(name="sharing"), "sharing")
    found: list[int] = []

    def take() -> None:
        with echo.connect("sharing") as own, own.take("out", wait_s=1) as items:
            for value in items:
                found.append(value)

    with echo.connect("sharing") as cluster:
        takers = [threading.Thread(target=take) for _ in range(2)]
        for taker in takers:
            taker.start()
        cluster.put_many("in", list(range(1000)))
        for taker in takers:
            taker.join()
    assert sorted(found) == list(range(1000))


def test_values_that_together_exceed_a_message_come_in_several(echo: Site) -> None:
    """They stay in their queue, because its stage does not start."""
    echo.deploy(
        HEAD
        + """
@stage
class Never:
    def __init__(self): raise OSError("no camera")
    def __call__(self, x): return x

pipeline = Pipeline("large", Queue("in", maxsize=None) >> Never)
""",
        "large",
    )
    sizes = [15 << 20] * 5
    with echo.connect("large", timeout_s=30) as cluster:
        for size in sizes:
            cluster.put("in", bytes(size))
        assert [len(value) for value in cluster.results("in")] == sizes
        with cluster.take("in", wait_s=1) as items:
            assert [len(value) for value in items] == sizes
        cluster.close("in")
        cluster.wait(30)


def test_a_taker_that_waits_gets_what_comes_later(echo: Site) -> None:
    echo.deploy(OUT.format(name="later"), "later")
    with echo.connect("later") as giver, echo.connect("later") as taker, taker.take("out", limit=1) as items:
        asked = threading.Timer(0.2, lambda: giver.put("in", "late"))
        asked.start()
        assert next(items) == "late"
        asked.join()


# ---- finding, losing and finding again


@pytest.fixture
def proxy(echo: Site) -> Iterator[Proxy]:
    made = Proxy(echo.port)
    yield made
    made.cut()


def _connect_through(proxy: Proxy, echo: Site, pipeline: str, timeout_s: float) -> Cluster:
    return connect(
        pipeline,
        timeout_s=timeout_s,
        home=echo.folder / "elsewhere",
        authkey_file=echo.key_file,
        seed=f"127.0.0.1:{proxy.port}",
    )


def test_a_put_whose_answer_is_lost_is_asked_again_and_put_once(cluster: Cluster, echo: Site, proxy: Proxy) -> None:
    with _connect_through(proxy, echo, "echo", 30) as through:
        through.put("in", 0)
        put_so_far = _done(cluster)
        proxy.hold_answers()
        putting = threading.Thread(target=lambda: through.put("in", 1))
        putting.start()
        wait_for(lambda: _done(cluster) > put_so_far, "it is put, and nobody was told")
        proxy.cut()
        proxy.mend()
        putting.join()
        through.put("in", 2)
        assert proxy.connections == 2
    assert sorted(_feed_to_the_end(cluster)) == [0, 1, 2]


def _done(cluster: Cluster) -> int:
    return sum(int(stage["done"]) for stage in cluster.status()["stages"] if stage["pipeline"] == "echo")


def test_after_a_put_of_unknown_outcome_the_next_value_is_not_taken_for_it(
    cluster: Cluster, echo: Site, proxy: Proxy
) -> None:
    with _connect_through(proxy, echo, "echo", 1) as through:
        through.put("in", 0)
        put_so_far = _done(cluster)
        proxy.hold_answers()
        failures: list[BaseException] = []

        def put() -> None:
            try:
                through.put("in", 1)
            except Unavailable as error:
                failures.append(error)

        putting = threading.Thread(target=put)
        putting.start()
        wait_for(lambda: _done(cluster) > put_so_far, "it is put, and nobody was told")
        proxy.cut()
        putting.join()
        (failure,) = failures
        assert "indefinite" in str(failure)
        proxy.mend()
        through.put("in", 2)
    assert sorted(_feed_to_the_end(cluster)) == [0, 1, 2]


def test_a_taker_whose_connection_is_lost_goes_on_and_what_was_fetched_ahead_comes_again(
    echo: Site, proxy: Proxy
) -> None:
    echo.deploy(OUT.format(name="cut"), "cut")
    with echo.connect("cut") as cluster, _connect_through(proxy, echo, "cut", 10) as through:
        cluster.put_many("in", list(range(300)))
        wait_for(lambda: _ready(cluster, "cut", "out") == 300, "all are there")
        found = []
        with through.take("out", wait_s=2) as items:
            for value in items:
                found.append(value)
                if len(found) in (50, 51, 170):
                    proxy.cut()
                    proxy.mend()
        assert sorted(set(found)) == list(range(300))
        assert len(found) <= 303, "one that was in hand may come twice"
        assert _ready(cluster, "cut", "out") == 0


def _ready(cluster: Cluster, pipeline: str, queue: str) -> int:
    found = [q for q in cluster.status()["queues"] if (q["pipeline"], q["name"]) == (pipeline, queue)]
    return int(found[0]["ready"]) + int(found[0]["leased"])


def test_no_node_here(site: Site) -> None:
    with pytest.raises(ClusterNotFound, match="start one with python -m p2pcluster"):
        site.connect(timeout_s=0.3)


def test_a_node_is_found_by_its_address_too(echo: Site) -> None:
    with connect(
        "echo", home=echo.folder / "elsewhere", seed=f"127.0.0.1:{echo.port}", authkey_file=echo.key_file
    ) as cluster:
        assert cluster.status()["cluster"]["name"] == "default"


def test_a_node_that_is_killed_in_the_middle_of_puts_has_each_once(site: Site) -> None:
    """The connection is lost at some moment of a stream of puts, twice; no put fails and none is doubled."""
    site.hands()
    site.deploy(ECHO)
    count = 400
    reached = [threading.Event() for _ in range(2)]

    def kill_and_start() -> None:
        for event in reached:
            assert event.wait(60)
            site.nodes[-1].kill()
            site.hands()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    with site.connect("echo", timeout_s=30) as cluster:
        for number in range(count):
            if number in (100, 250):
                reached[number // 200].set()
            cluster.put("in", number)
        killer.join()
        assert len(site.nodes) == 3
        assert sorted(_feed_to_the_end(cluster)) == list(range(count))


def test_a_taker_goes_on_after_the_node_was_killed(site: Site) -> None:
    """At least once: what was in hand when the node died may come again, and nothing is missing."""
    site.hands()
    site.deploy(OUT.format(name="taken"), "taken")
    found = []
    with site.connect("taken", timeout_s=30) as cluster:
        cluster.put_many("in", list(range(300)))
        wait_for(lambda: cluster.status()["queues"][1]["ready"] == 300, "all are there")
        with cluster.take("out", wait_s=4) as items:
            for value in items:
                found.append(value)
                if len(found) == 50:
                    site.nodes[-1].kill()
                    site.hands()
                if len(set(found)) == 300:
                    break
    assert set(found) == set(range(300))
    assert len(found) <= 301, "only the one in hand may come twice"


def test_a_put_to_a_node_that_does_not_come_back_says_that_its_outcome_is_unknown(site: Site) -> None:
    site.hands()
    site.deploy(ECHO)
    with site.connect("echo", timeout_s=1) as cluster:
        cluster.put("in", 0)
        site.nodes[-1].signal(signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="indefinite") as caught:
                cluster.put("in", 1)
        finally:
            site.nodes[-1].signal(signal.SIGCONT)
        assert not caught.value.definite
