"""Whole clusters in simulated time: many seeds, bugs that are seeded and noticed, and what seeds have found, each in a scene of its own.

The simulator is `cluster`; `scripts/simulate.py` plays more seeds, and one seed line by line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from p2pcluster.core.membership import Vitals, next_configuration
from p2pcluster.core.quorum import Configuration
from p2pcluster.core.raft import Role
from tests.simulation.cluster import Outcome, Simulation, run, run_many, small_sizes
from tests.simulation.machine import Life, Machine
from tests.simulation.mutations import MUTATIONS, SEEDS_MAX, first_failure, is_noticed
from tests.simulation.options import Options, draw

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(300)

# ---- many seeds


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return list(run_many(SEEDS))


def test_nothing_is_lost_doubled_or_stuck_whatever_fails(outcomes: list[Outcome]) -> None:
    failed = [f"seed {outcome.options.seed}: {outcome.error}\n{outcome.options}" for outcome in outcomes if outcome.error]
    assert not failed, "\n".join(failed)


def test_the_seeds_are_hard(outcomes: list[Outcome]) -> None:
    """Ten simulated seconds and more, three crashes on average, clusters of one to seven machines, real files among them."""
    assert all(outcome.simulated_ms >= 10_000 for outcome in outcomes)
    assert sum(outcome.crashes for outcome in outcomes) >= 3 * len(outcomes)
    assert {outcome.options.machines for outcome in outcomes} == {1, 2, 3, 4, 5, 6, 7}
    assert any(outcome.options.real_journal for outcome in outcomes)


def test_every_fault_happens_and_what_it_leads_to(outcomes: list[Outcome]) -> None:
    counts = sum((outcome.counts for outcome in outcomes), Counter[str]())
    expected = [
        "dies", "loses power", "leaves a torn write", "has a full disk", "has an error before the next commit",
        "has an error after the next commit", "pauses", "pauses with its clock", "is cut for tcp", "is cut for udp",
        "is cut for tcp and udp", "is wiped", "leaves", "member_left ok", "stops", "ends", "founds", "joins",
        "begins a joint change", "dies behind a change of the configuration", "cuts its log off from", "loads entries",
        "sends a snapshot at", "becomes the snapshot at", "put already", "put stale_epoch", "done already", "fail stale_fence",
        "release already", "session_end ok", "retry ok", "discard ok", "due ok", "on_done_ran ok", "runs a tick",
        "deploy ok", "roll ok", "rolled_out ok", "roll_back ok", "undeploy ok", "undeploy items_remain",
        "pause ok", "resume ok", "scale ok", "scale source",
        *(f"stays {how}" for how in ("dead", "silent", "cut", "one way", "udp only")),
    ]
    assert [what for what in expected if not counts[what]] == []


def test_a_seed_is_the_same_run_each_time() -> None:
    seeds = [4, 11, 23]
    first, second = ([run(draw(seed)).fingerprint for seed in seeds] for _ in range(2))
    assert first == second
    code = "import sys; from tests.simulation.cluster import run; from tests.simulation.options import draw\n" \
           "print(*(run(draw(int(seed))).fingerprint for seed in sys.argv[1:]))"
    again = subprocess.run([sys.executable, "-c", code, *map(str, seeds)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)})
    assert again.stdout.split() == first


def test_options_are_told_so_that_they_can_be_given_again() -> None:
    options = draw(3)
    assert eval(str(options)) == options  # noqa: S307


# ---- seeded bugs

QUICK = (
    "skipped fsync", "vote not stored", "own log counted before the commit", "a snapshot that carries the vote",
    "commit by counting an older term", "configuration before the no-op", "a learner that refuses to vote", "votes for any log",
    "done applied twice", "parts that are seen at once", "parts that outlive their lease", "parts of a grant given twice",
    "a lease that outlives its session", "an apply that reads the clock", "a tick before its time", "a rate that is not kept",
    "items for a version that is not in force", "a roll-out that is forgotten", "what is paused is given",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_seeded_bug_is_noticed(name: str) -> None:
    mutation = next(mutation for mutation in MUTATIONS if mutation.name == name)
    failure = first_failure(mutation, range(SEEDS_MAX))
    assert is_noticed(mutation, failure), failure


# ---- what seeds have found


@contextmanager
def cluster(folder: Path, **given: Any) -> Iterator[Simulation]:
    """A cluster without faults, which are the scene's affair."""
    options = Options(**{"safety_ms": 8_000, "process_dies_share": 0.0, "voters": 3, "machines": 3, **given})
    with small_sizes(options):
        simulation = Simulation(options, folder)
        simulation.network.is_calm = True
        simulation.begin()
        yield simulation


def leader_of(simulation: Simulation) -> Machine:
    """Whoever serves, when every node that runs follows it."""
    def lives() -> list[Life]:
        return [machine.life for machine in simulation.machines if machine.life is not None]

    def found() -> list[Life]:
        return [life for life in lives() if life.node.is_serving]

    simulation.until(lambda: bool(found()) and all(life._led_by is not None for life in lives()))
    return found()[0].machine


def life_of(machine: Machine) -> Life:
    assert machine.life is not None
    return machine.life


def items_held(simulation: Simulation, machine: Machine) -> int:
    """How many items are leased to the machine's node."""
    queues = life_of(leader_of(simulation)).node.state.queues.values()
    return sum(hi - lo for queue in queues for lo, hi, fence in queue.leases if fence.node == machine.node_id)


def break_connection(one: Machine, other: Machine) -> None:
    """Both ends see it at once, and what was on its way is lost."""
    end: Any = life_of(one).peers.peers[other.node_id or ""].connection
    far_end = end.other
    end.fail("reset")
    far_end.fail("reset")


def test_a_silent_machine_gives_its_items_back(tmp_path: Path) -> None:
    """Nothing is sent when the power goes: a connection is given up when nothing comes over it."""
    with cluster(tmp_path, gen_items=200, safety_ms=1_000) as simulation:
        leader = leader_of(simulation)
        follower = next(machine for machine in simulation.machines if machine is not leader)
        simulation.until(lambda: items_held(simulation, follower) > 3)
        follower.crash("for this test", power=True)
        simulation.let_pass(100)
        assert items_held(simulation, follower)
        simulation.until(lambda: not items_held(simulation, follower), limit_ms=5_000)
        assert leader_of(simulation) is leader


def test_a_machine_whose_connection_came_back_at_once_is_given_work_again(tmp_path: Path) -> None:
    """Between two looks of its own it is led by the same node as before, which has forgotten it."""
    with cluster(tmp_path) as simulation:
        leader = leader_of(simulation)
        dialled = [machine for machine in simulation.machines if machine.node_id > leader.node_id]  # the lower id dials
        follower = dialled[0]
        life_of(follower)._tick = lambda: None  # type: ignore[method-assign]
        break_connection(leader, follower)
        simulation.until(lambda: follower.node_id in life_of(leader).peers.peers)
        simulation.until(lambda: life_of(follower).neighbours.serving_leader() is not None)
        assert f"node:{follower.node_id}" not in life_of(leader).node.sessions
        del life_of(follower)._tick  # type: ignore[attr-defined]
        simulation.until(lambda: f"node:{follower.node_id}" in life_of(leader).node.sessions, limit_ms=1_000)


def test_a_node_reads_its_configuration_again_that_no_checkpoint_has_yet(tmp_path: Path) -> None:
    with cluster(tmp_path, machines=2, voters=1) as simulation:
        leader = leader_of(simulation)
        simulation.until(lambda: len(life_of(leader).node.raft.committed_configuration.members) == 2)
        configuration = life_of(leader).node.raft.configuration
        leader.crash("for this test")
        leader.start()
        assert life_of(leader).node.raft.configuration == configuration


def test_a_leader_leaves_although_its_successor_did_not_hear_it_at_first(tmp_path: Path) -> None:
    """Meanwhile the others do its work: it takes none any more."""
    with cluster(tmp_path) as simulation:
        leader = leader_of(simulation)
        raft = life_of(leader).node.raft
        simulation.until(lambda: all(peer.match_index == raft.last_index for peer in raft.peers()), step_ms=1)
        life_of(leader).event(life_of(leader).leave, may_wait=False)
        successor = next(machine for machine in simulation.machines if machine.node_id == raft._transfer_to)
        ways = {(leader.number, successor.number), (successor.number, leader.number)}
        break_connection(leader, successor)
        simulation.network.cuts["tcp"] |= ways
        simulation.let_pass(raft.settings.election_timeout_ms - 50)
        assert raft._transfer_to == successor.node_id
        simulation.network.heal("tcp", ways)
        simulation.until(lambda: not leader.is_up, limit_ms=10_000)
        assert leader.node_id not in life_of(leader_of(simulation)).node.state.members


def test_a_leader_that_has_met_nobody_yet_gives_no_vote_to_the_dead() -> None:
    """Three voters, one has left: of the two that stay neither is known to be alive, and one alone would decide."""
    configuration = Configuration(("a", "b", "c"))
    unknown = {"a": Vitals(False, 0), "b": Vitals(False, 0)}
    assert next_configuration(configuration, ["a", "b"], unknown, "c", 0) is None
    met = {**unknown, "b": Vitals(True, 0, 0)}
    following = next_configuration(configuration, ["a", "b"], met, "c", 5_000)
    assert following is not None and following.voters == ("b",)


def test_a_node_that_was_stopped_and_starts_again_goes_on_as_a_follower(tmp_path: Path) -> None:
    with cluster(tmp_path) as simulation:
        leader = leader_of(simulation)
        life_of(leader).event(life_of(leader).stop)
        simulation.until(lambda: not leader.is_up)
        simulation.until(lambda: leader.is_up)
        assert leader_of(simulation) is not leader
        assert life_of(leader).node.raft.role is Role.FOLLOWER


def test_a_machine_that_is_cut_off_for_good_stays_so_when_an_earlier_cut_ends(tmp_path: Path) -> None:
    """Else it goes on to lead those whom it reaches, and of the others nobody may be asked to."""
    with cluster(tmp_path) as simulation:
        leader_of(simulation)
        network, ill = simulation.network, simulation.machines[2]
        simulation._cut(("tcp", "udp"), {(3, 1)})
        simulation.random.choice = lambda among: "one way" if "one way" in among else among[0]  # type: ignore[method-assign]
        simulation._make_ill(ill)
        simulation.let_pass(4_000)
        assert all(network.is_cut(kind, 3, other) for kind in ("tcp", "udp") for other in (1, 2))
        assert not any(network.is_cut(kind, other, 3) for kind in ("tcp", "udp") for other in (1, 2))


def test_of_those_who_get_a_vote_next_no_more_may_go_than_the_next_voters_can_spare(tmp_path: Path) -> None:
    """One voter is joined by two at once, and a dead one of three is exchanged: for those who died in that moment it is too early to
    be known as dead, and if they are two of three, the third decides nothing by itself."""
    vitals = {"a": Vitals(True, 0, 0), "b": Vitals(True, 0, 0), "c": Vitals(True, 0, 0), "d": Vitals(True, 0), "e": Vitals(True, 0)}
    joined = next_configuration(Configuration(("a",), learners=("b", "c", "d", "e")), "abcde", vitals, "a", 5_000)
    assert joined is not None and joined.voters == ("a", "b", "c")
    vitals |= {"c": Vitals(False, 0, 0), "d": Vitals(True, 0, 0)}
    exchanged = next_configuration(Configuration(("a", "b", "c"), learners=("d", "e")), "abcde", vitals, "a", 5_000)
    assert exchanged is not None and set(exchanged.voters) == {"a", "b", "d"}
    for voters, spare in ((1, 1), (3, 1), (5, 2)):
        with cluster(tmp_path, machines=5, voters=voters) as simulation:
            raft = life_of(leader_of(simulation)).node.raft
            simulation.until(lambda raft=raft: len(raft.committed_configuration.members) == 5)
            assert len(raft.configuration.voters) == voters
            others = [machine for machine in simulation.machines if machine.life is None or machine.life.node.raft is not raft]
            assert [simulation._is_enough([leader_of(simulation), *others[gone:]]) for gone in (1, 2, 3)] == \
                [spare >= gone for gone in (1, 2, 3)]


def test_a_client_that_an_old_address_leads_into_another_cluster_asks_its_own_again(tmp_path: Path) -> None:
    """A machine that was wiped while it led is another node, alone in a cluster of its own, at the address that is known as the leader's."""
    with cluster(tmp_path, machines=4, voters=3) as simulation:
        ways = {way for other in (1, 2, 3) for way in ((4, other), (other, 4))}
        for kind in ("tcp", "udp"):
            simulation.network.close(kind, ways)
        stranger = simulation.machines[3]
        simulation.until(lambda: stranger.is_up and life_of(stranger).node.is_serving)
        for producer in simulation.producers:
            simulation.until(lambda producer=producer: producer._asked is not None, step_ms=1)
            producer._hint = stranger.number
            producer._lost()
        simulation.until(lambda: all(producer.is_done for producer in simulation.producers))
        queues = simulation.checker.main.ledger.queues
        assert {item.body for item in queues["p/in"].items.values()} == {value for producer in simulation.producers for value in producer.put}


def test_a_founder_that_dies_behind_the_write_that_founds_has_founded(tmp_path: Path) -> None:
    with cluster(tmp_path, machines=1, voters=0, kept_share=1.0, torn_share=0.0) as simulation:
        (founder,) = simulation.machines
        simulation.until(lambda: founder.is_up, step_ms=1)
        founder.disk.dies_at_next_write = True
        simulation.until(lambda: founder.starts == 2 and founder.is_up)
        assert leader_of(simulation) is founder
        assert simulation.checker.main_id == life_of(founder).cluster_id is not None
