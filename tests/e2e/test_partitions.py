"""Cut networks: clusters of one to seven hosts, cables pulled, halves apart, one protocol lost, half of the nodes killed.

Whatever happens: every value once in the last queue, nothing parked, every copy whole, and equal copies at an equal entry.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from harness import Site, wait_for
from hosts import ROLES, WAIT_S, Hosts
from p2pcluster.errors import ClusterError
from tests.namespaces import Switch, namespaces_can_be_made

PIPELINE = """
    import time
    from p2pcluster import Pipeline, Queue, source, stage

    @source
    def Numbers():
        for n in range({count}):
            time.sleep(0.01)
            yield n

    @stage(processes=1)
    def Square(x):
        return x * x

    @stage(processes={processes}, per_node=1)
    def Add(x):
        time.sleep(0.02)
        return x + 1

    pipeline = Pipeline("cut", Numbers >> Square >> Queue("squares", maxsize=None), Queue("in") >> Add >> Queue("sums", maxsize=None))
"""
NUMBERS = 150  # from the source: more than a second of work
VALUES = 200  # of one test: some seconds of work for one process, so that a cut finds work in hand everywhere
NOBODY_S = 2.5  # more than two election timeouts, in which somebody would come to lead if that could be
REFUSED_S = 0.7  # for an answer that is not to come
SEED = 20260101  # of the order in which nodes are started


@contextlib.contextmanager
def network(folder: Path, count: int, start: bool = True) -> Iterator[Hosts]:
    """So many hosts, whose nodes are starting if they are to."""
    folder.mkdir()
    site = Site(folder)
    hosts = Hosts(site, Switch(), count, site.project(PIPELINE.format(count=NUMBERS, processes=5 if count == 5 else 2)))
    try:
        for name in hosts.names if start else ():
            hosts.start(name)
        yield hosts
    finally:
        hosts.close()
        site.close()


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if not namespaces_can_be_made():
        pytest.skip("network namespaces cannot be made here")


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Hosts]]:
    """Clusters of each size, all nodes of all started at the same instant."""
    folder = tmp_path_factory.mktemp("at-once")
    with contextlib.ExitStack() as stack:
        yield {size: stack.enter_context(network(folder / str(size), size)) for size in ROLES}


@pytest.fixture(scope="module")
def five(at_once: dict[int, Hosts]) -> Hosts:
    """The one of five hosts."""
    close_but_five(at_once)
    return at_once[5]


def close_but_five(networks: dict[int, Hosts]) -> None:
    """End those that are not needed any more."""
    for size, hosts in networks.items():
        if size != 5:
            hosts.close()


@pytest.fixture
def whole(five: Hosts) -> Iterator[Hosts]:
    """The same, with all cables in and all nodes there, before and after each test."""
    five.wait_for_roles("a", **ROLES[5])
    yield five
    five.switch.unite()
    five.switch.lose_nothing()
    for name, node in five.nodes.items():
        five.switch.plug(name)
        if not node.is_running:
            five.start(name)


_first = itertools.count(10 * VALUES, 10 * VALUES)  # below are those of `ends_well`


class Work:
    """Values of one test's own, and what must become of them."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.first = next(_first)
        self.put: list[int] = []

    def feed(self, name: str, count: int = VALUES) -> None:
        """Put values from a host, and wait until they are acknowledged."""
        start = self.first + len(self.put)
        values = list(range(start, start + count))
        with self.hosts.connect(name) as link:
            assert link.put_many("in", values) == count
        self.put += values

    def sums(self, name: str) -> Counter[int]:
        with self.hosts.connect(name) as link:
            return Counter(x for x in link.results("sums") if self.first < x <= self.first + 10 * VALUES)

    def wait_until_done(self, name: str) -> None:
        wait_for(lambda: set(self.sums(name)) >= {x + 1 for x in self.put}, f"all is done as {name} sees it", WAIT_S)

    def is_whole(self, unanswered: Iterable[int] = ()) -> None:
        """Everything that was acknowledged once, of what was not at most once each; nothing parked; all copies whole and equal."""
        hosts = self.hosts
        hosts.wait_for_roles("a", **ROLES[5])
        self.wait_until_done("a")
        with hosts.connect("a") as link:
            wait_for(lambda: all(queue["ready"] + queue["leased"] + queue["delayed"] == 0 for queue in link.status()["queues"]
                                 if queue["name"] in ("in", "Square")), "the queues are empty", WAIT_S)
            found = self.sums("a")
            assert {x: found[x + 1] for x in self.put if found[x + 1] != 1} == {}, "each value that was acknowledged is there once"
            extra = found - Counter(x + 1 for x in self.put)
            assert not extra - Counter(x + 1 for x in unanswered), "nothing else is there, and nothing twice"
            assert link.parked() == []
            wait_for(lambda: len(list(link.results("squares"))) >= NUMBERS, "the source's run through", WAIT_S)
            assert sorted(link.results("squares")) == [n * n for n in range(NUMBERS)]
        hosts.wait_for_equal_copies(hosts.names)


def all_have_work(hosts: Hosts, names: Iterable[str]) -> None:
    """Wait until a stage process works on each of these hosts."""
    for name in names:
        wait_for(lambda: hosts.nodes[name].stage_pids("Add"), f"a stage works on {name}")  # noqa: B023


def refuses(hosts: Hosts, name: str, value: int) -> None:
    """A put at a host without a majority is not acknowledged, and a status is not answered."""
    with pytest.raises(ClusterError), hosts.connect(name, REFUSED_S) as link:
        link.put("in", value)
    assert hosts.status(name, 0.2) is None


# ---- sizes


def test_clones_that_start_on_empty_machines_at_the_same_instant_make_one_cluster_of_any_size(at_once: dict[int, Hosts]) -> None:
    for hosts in at_once.values():
        is_one_cluster(hosts)
    for hosts in at_once.values():
        ends_well(hosts, 0, hosts.names[-1])
    close_but_five(at_once)


def is_one_cluster(hosts: Hosts, names: list[str] | None = None) -> dict[str, str]:
    """Of the nodes that were started, one has founded it and each has a role and finds the leader; the clones of the project are one version."""
    names = names or hosts.names
    roles = hosts.wait_for_roles(names[0], **ROLES[len(names)])
    assert sorted(roles) == sorted(names)
    founders = [name for name, node in hosts.nodes.items() if any("founded cluster" in line for line in node.lines)]
    assert len(founders) == 1
    assert not any("another version" in line or "replaces" in line for node in hosts.nodes.values() for line in node.lines)
    leaders = {hosts.leader(name) for name in names}
    assert len(leaders) == 1 and None not in leaders, "a worker knows where the leader listens too"
    return roles


def ends_well(hosts: Hosts, fed: int, name: str) -> None:
    """What was fed (the numbers up to `fed`, and a few more now) and what the source gave is there once; all copies are whole and equal."""
    count = fed + 10
    with hosts.connect(name) as link:
        assert link.put_many("in", range(fed, count)) == 10
        wait_for(lambda: len(list(link.results("sums"))) >= count, "what was fed is done", WAIT_S)
        wait_for(lambda: len(list(link.results("squares"))) >= NUMBERS, "the source's run is through", WAIT_S)
        assert sorted(link.results("sums")) == list(range(1, count + 1))
        assert sorted(link.results("squares")) == [n * n for n in range(NUMBERS)]
        assert link.parked() == []
    roles = hosts.wait_for_roles(name, **ROLES[len(hosts.names)])
    hosts.wait_for_equal_copies(other for other, role in roles.items() if role != "worker")


def test_a_cluster_has_the_roles_of_its_size_as_it_grows_to_seven_and_half_of_these_may_be_killed_at_once(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    with network(tmp_path / "seven", 7, start=False) as hosts:
        chance.shuffle(order := hosts.names)
        for count, name in enumerate(order, 1):
            hosts.start(name)
            if count in ROLES:
                roles = is_one_cluster(hosts, order[:count])
        of = {role: [name for name in hosts.names if roles[name] == role] for role in set(roles.values())}
        killed = [of["leader"][0], of["voter"][0], of["worker"][0]]
        left = [name for name in hosts.names if name not in killed]
        with hosts.connect(of["worker"][0]) as link:
            assert link.put_many("in", range(VALUES)) == VALUES
        pids = {name: hosts.nodes[name].pid for name in killed}
        for name in killed:
            hosts.nodes[name].popen.kill()
        for name in killed:
            hosts.nodes[name].kill()  # and what it started has ended too
        hosts.wait_for_leader(left[0], left)
        with hosts.connect(left[0]) as link:
            assert link.put_many("in", range(VALUES, VALUES + 20)) == 20
            wait_for(lambda: len(list(link.results("sums"))) >= VALUES + 20, "the others do the work", WAIT_S)
        for name in killed:
            assert hosts.start(name).pid != pids[name]
        hosts.wait_for_roles(left[0], **ROLES[7])
        ends_well(hosts, VALUES + 20, killed[0])


# ---- cables


def test_a_leader_that_is_cut_off_serves_nothing_and_its_work_is_done_by_the_others(whole: Hosts) -> None:
    work = Work(whole)
    first = whole.leader("a")
    assert first is not None
    others = [name for name in whole.names if name != first]
    all_have_work(whole, whole.names)
    work.feed(others[0])
    whole.switch.pull(first)
    whole.wait_for_leader(others[0], others)
    refuses(whole, first, value := work.first + 5 * VALUES)
    work.feed(others[1], 20)
    work.wait_until_done(others[0])
    whole.switch.plug(first)
    whole.nodes[first].wait_for_line(" follows ", WAIT_S)
    work.is_whole(unanswered=[value])


@pytest.mark.parametrize("with_leader", [True, False], ids=["with the leader", "without the leader"])
def test_the_smaller_half_stands_still_and_the_larger_one_does_its_work(whole: Hosts, with_leader: bool) -> None:
    work = Work(whole)
    first = whole.leader("a")
    others = [name for name in whole.names if name != first]
    small = [str(first), others[0]] if with_leader else others[:2]
    large = [name for name in whole.names if name not in small]
    all_have_work(whole, whole.names)
    work.feed(large[0])
    term = whole.term(large[0])
    with whole.connect(small[0], 1.5) as before:
        before.status()
        whole.switch.split(small)
        value = work.first + 5 * VALUES
        with pytest.raises(ClusterError):  # over a connection from before, to a leader who may not know it yet
            before.put("in", value)
    leader = whole.wait_for_leader(large[0], large)
    for offset, name in enumerate(small, 1):
        refuses(whole, name, value + offset)
    assert with_leader == (leader != first)
    work.feed(large[1], 20)
    work.wait_until_done(large[0])
    assert (whole.term(leader) > term) == with_leader, "who leads a majority is not disturbed by the others"
    whole.nodes[small[0]].wait_for_line("nobody leads, so everything waits: 3 of the 5 nodes that vote must be here and 2 are", WAIT_S)
    whole.switch.join()
    work.is_whole(unanswered=range(value, value + 3))


# ---- one protocol


def test_with_datagrams_alone_nobody_leads_who_cannot_replicate(whole: Hosts) -> None:
    work = Work(whole)
    first = whole.leader("a")
    assert first is not None
    others = [name for name in whole.names if name != first]
    work.feed(others[0], 50)
    whole.switch.lose("tcp", first)
    for name in others:
        whole.switch.lose("tcp", name, [f"{whole.addresses[first]}/32"])
    second = whole.wait_for_leader(others[0], others)
    term = whole.term(second)
    refuses(whole, first, value := work.first + 5 * VALUES)
    work.feed(others[1], 50)
    work.wait_until_done(others[0])
    assert whole.leader(others[1]) == second
    assert whole.term(second) == term, "who hears by datagrams alone does not disturb"
    for name in whole.names:
        whole.switch.lose("tcp", name)
    wait_for(lambda: not any(whole.status(name, 0.3) for name in whole.names), "nobody leads", WAIT_S)
    terms = {name: whole.term(name) for name in others}
    until_s = time.monotonic() + NOBODY_S
    while time.monotonic() < until_s:
        assert not any(whole.status(name, 0.3) for name in whole.names)
    assert {name: whole.term(name) for name in others} == terms, "nobody campaigns who reaches no majority by TCP"
    whole.switch.lose_nothing()
    work.is_whole(unanswered=[value])


def test_without_datagrams_a_cluster_goes_on_elects_and_takes_back_who_was_killed(whole: Hosts) -> None:
    work = Work(whole)
    first = whole.leader("a")
    assert first is not None
    others = [name for name in whole.names if name != first]
    for name in whole.names:
        whole.switch.lose("udp", name)
    all_have_work(whole, whole.names)
    work.feed(others[0])
    term = whole.term(others[0])
    whole.nodes[first].kill()
    second = whole.wait_for_leader(others[0], others)
    assert whole.term(second) > term
    work.feed(others[1], 20)
    whole.start(first).wait_for_line(" follows ", WAIT_S)
    work.is_whole()
