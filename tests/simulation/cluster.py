"""Whole clusters in simulated time: machines that fail, a network that lies, disks that lose, and work that must come through.

`Simulation` is one run of one seed: a safety phase under every fault that its options name, then the faults freeze
outside of a majority and progress is demanded. `run` plays a seed and says what came of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from p2pcluster import config, peers
from p2pcluster.core import node as node_module
from p2pcluster.core.codec import Message, encode_bytes
from p2pcluster.core.log import COMMANDS, NOOP, Entry
from p2pcluster.core.membership import voters_wanted
from p2pcluster.core.quorum import Configuration, has_majority
from p2pcluster.core.raft import HardState
from p2pcluster.journal import Write
from tests.simulation import pipeline
from tests.simulation.checker import Checker, Violation, require
from tests.simulation.clients import Client, Janitor, Operator, Producer, Taker
from tests.simulation.disk import real_disk, sim_disk
from tests.simulation.machine import Life, Machine
from tests.simulation.options import Options, draw
from tests.simulation.sim_journal import Fault
from tests.simulation.controls import Controller
from tests.simulation.updates import Ender, Updater
from tests.simulation.world import Network, World, host_of, PORT

CLIENT_NUMBERS_FROM = 100
LOOK_MS = 250  # from one look to the next whether all is over
HOUSEKEEPING_MS = 2_200  # for checkpoints and compaction
LOG_BYTES_LEFT = 10_000  # of entries that nobody has gone over yet


@dataclass(frozen=True)
class Outcome:
    """What a run of a seed gave."""

    options: Options
    fingerprint: str
    events: int
    simulated_ms: int
    crashes: int
    elections: int
    entries: int
    counts: Counter[str]  # what happened how often, and what came of commands
    error: str | None = None


class Simulation:
    """See the module."""

    def __init__(self, options: Options, folder: Path, says: Callable[[str], None] | None = None) -> None:
        self.options = options
        self.world = World(options)
        self.world.says = says
        self.random = self.world.random
        self.network = Network(self.world)
        self.checker = Checker()
        self.crashes = 0
        self._folder = folder
        self.machines: list[Machine] = []
        for number in range(1, options.machines + 1):
            self._add_machine(number)
        common = (self.world, self.network, self.checker, self.machines)
        self.producers = [Producer(CLIENT_NUMBERS_FROM + at, *common, puts=options.client_puts)
                          for at in range(options.clients)]
        self.takers = [Taker(CLIENT_NUMBERS_FROM + 50 + at, *common) for at in range(2)]
        self._common = common
        self.updaters: list[Client] = []
        if options.deploy_every_ms:
            self.updaters.append(Updater(CLIENT_NUMBERS_FROM + 90, *common, every_ms=options.deploy_every_ms, until_ms=options.safety_ms))
        if options.control_every_ms:
            self.updaters.append(Controller(CLIENT_NUMBERS_FROM + 95, *common, every_ms=options.control_every_ms, until_ms=options.safety_ms))
        if options.undeploy_every_ms:
            self.updaters.append(Ender(CLIENT_NUMBERS_FROM + 91, *common, every_ms=options.undeploy_every_ms, until_ms=options.safety_ms))

    def _add_machine(self, number: int) -> None:
        disk = real_disk(self._folder / f"m{number}") if self.options.real_journal else sim_disk()
        machine = Machine(number, self.world, self.network, self.checker, disk)
        self.machines.append(machine)
        self.checker.machines = self.machines
        for one in self.machines:
            one.others = [other for other in self.machines if other is not one]

    # ---- the two phases

    def run(self) -> None:
        """From the first start to the end. Raises `Violation`, or whatever the code under test raises."""
        self.begin()
        self._cause_faults()
        self.let_pass(self.options.safety_ms)
        self._freeze()
        self._demand_progress()

    def begin(self) -> None:
        """Everything starts."""
        options = self.options
        first = self.machines[: options.machines - options.late]
        if options.voters:
            self._prepare(first[: options.voters])
        for machine in first:
            machine.start_later(self.random.randrange(300))
        for machine in self.machines[len(first) :]:
            machine.start_later(self.random.randrange(options.safety_ms))
        if not options.voters:
            operator = Operator(CLIENT_NUMBERS_FROM + 60, *self._common, messages=pipeline.deployment())
            operator.start()
        for client in [*self.producers, *self.takers, *self._janitors(), *self.updaters]:
            client.start()

    def _janitors(self) -> list[Client]:
        options = self.options
        if not options.janitor_every_ms:
            return []
        return [Janitor(CLIENT_NUMBERS_FROM + 80, *self._common, every_ms=options.janitor_every_ms,
                        until_ms=options.safety_ms)]

    def _prepare(self, voters: list[Machine]) -> None:
        """Disks of a cluster that was founded before, with the pipeline deployed."""
        ids = ["%016x" % self.random.getrandbits(64) for _ in voters]
        facts = {"cores": 2, "slots": 2}
        members = [Message("member", {"node": node_id, "name": machine.name,
                                      "facts": {**facts, "address": f"{host_of(machine.number)}:{PORT}"}})
                   for node_id, machine in zip(ids, voters, strict=True)]
        body = b"".join(map(encode_bytes, [*members, *pipeline.deployment()]))
        entries = (Entry(1, 1, 0, NOOP, b""), Entry(2, 1, 0, COMMANDS, body))
        for node_id, machine in zip(ids, voters, strict=True):
            machine.disk.open(self.options.body_memory_bytes_max)
            machine.disk.write(Write(
                entries, HardState(1, None), 2, meta=(("node_id", node_id), ("cluster_name", "sim"), ("cluster_id", "c1")),
                configuration=Configuration(tuple(ids))))
            machine.node_id = node_id
            self.checker.cluster_of[node_id] = "c1"
        self.checker.found("c1", entries, Configuration(tuple(ids)))
        for machine in voters:
            machine.disk.crash()

    def _freeze(self) -> None:
        """A majority gets well, everything else stays as it is, or as bad as it can be."""
        world = self.world
        well = self._choose_majority()
        ill = [machine for machine in self.machines if machine not in well]
        world.mark("the faults", "freeze outside of", *(machine.name for machine in well))
        for machine in ill:
            self._make_ill(machine)
        for kind in ("tcp", "udp"):
            ways = {way for way in self.network.cuts[kind] if way[0] not in numbers(ill) and way[1] not in numbers(ill)}
            self.network.heal(kind, ways)
        self.network.is_calm = True
        for machine in well:
            machine.disk.is_full = machine.disk.dies_at_next_write = False
            machine.disk.error_at_next_write = None
            machine.wake()
            machine.start()

    def _make_ill(self, machine: Machine) -> None:
        """For good: dead, silent, or cut off in one direction or by one protocol."""
        how = self.random.choice(("dead", "dead", "silent", "cut", "one way", "udp only"))
        self.world.mark(machine.name, f"stays {how}")
        machine.is_gone = True
        machine.wake()
        if how == "dead":
            machine.crash("for good")
        elif how == "silent":
            machine.crash("for good", power=True)
        else:
            others = numbers(self.machines) - {machine.number}
            out, back = {(machine.number, other) for other in others}, {(other, machine.number) for other in others}
            kinds = ("tcp",) if how == "udp only" else ("tcp", "udp")
            for kind in kinds:
                self.network.close(kind, out if how == "one way" else out | back)

    def _choose_majority(self) -> list[Machine]:
        """Machines that hold a majority of every configuration that may be in force."""
        well = [machine for machine in self.machines if not machine.is_gone]
        for machine in self.random.sample(well, len(well)):
            rest = [other for other in well if other is not machine]
            if self.random.random() < 0.6 and self._is_enough(rest):
                well = rest
        return well

    def _is_enough(self, machines: list[Machine]) -> bool:
        """Whether these are a majority of every configuration that may be in force, or may come to be before anybody can know
        that the others are gone.

        Any of those who have a copy may be about to get a vote: so many may be gone as the fewest voters can spare that a change
        may lead to. These are no more than the members want, and three where one voter is joined by two more, or where a dead one
        of three is exchanged: two who are gone may then both be among three, and nothing can be demanded of the one that is left.
        """
        ids = {machine.node_id for machine in machines if machine.node_id}
        configurations = self._configurations()
        copies = {member for configuration in configurations for member in configuration.members}
        fewest = min([voters_wanted(len(copies)), *(len(half) for configuration in configurations for half in configuration.halves())])
        spare = (max(3, fewest) - 1) // 2
        return bool(machines) and len(copies - ids) <= spare and all(has_majority(c, ids) for c in configurations)

    def _configurations(self) -> list[Configuration]:
        """Those that somebody goes by, or may go by again."""
        found: set[Configuration] = set()
        for machine in self.machines:
            if machine.life is not None and machine.life.cluster_id == self.checker.main_id:
                found.update(configuration for _, configuration in machine.life.node.raft._configurations)
        found |= self.checker.configurations()
        return [configuration for configuration in found if configuration.voters]

    # ---- progress

    def _demand_progress(self) -> None:
        """Everything comes to its end."""
        close = Message("close", {"pipeline": pipeline.NAME, "name": "in"})
        again = Message("start_run", {"pipeline": pipeline.NAME, "params": None})
        self.until(lambda: all(client.is_done for client in [*self.producers, *self.updaters]), LOOK_MS)
        if self.options.deploy_every_ms:
            self._demand_the_way_back()
        for run_number in range(1, 1 + self.options.runs):
            operator = Operator(CLIENT_NUMBERS_FROM + 60 + run_number, *self._common,
                                messages=[close] if run_number == 1 else [again, close])
            operator.start()
            self.until(lambda operator=operator: operator.is_done and self._why_not_over() is None, LOOK_MS)
        self.let_pass(HOUSEKEEPING_MS)
        for _ in range(50):
            if (why_not := self._why_not_over()) is None:
                break
            self.let_pass(50)
        require(why_not is None, f"what was over is not any more: {why_not}")
        self._check_end()

    def _demand_the_way_back(self) -> None:
        """A version that does not start, while a run is under way, is not there to stay."""
        broken = "x0-out"
        Operator(CLIENT_NUMBERS_FROM + 99, *self._common, messages=pipeline.shipment(broken)).start()

        def has_gone_back() -> bool:
            states = [life.node.state.pipelines[pipeline.NAME] for life in self._well_lives() if life.node.is_serving]
            return any((found.rolled or {}).get("version") == broken and found.version != broken for found in states)

        self.until(has_gone_back, LOOK_MS)

    def until(self, fact: Callable[[], bool], step_ms: int = 10, limit_ms: int | None = None) -> None:
        """Time passes until something has come about."""
        end_ms = self.world.now_ms + (self.options.calm_ms_max if limit_ms is None else limit_ms)
        while not fact():
            if self.world.now_ms >= end_ms:
                raise Violation(f"no progress: {self._why_not_over() or 'clients wait'}")
            self.let_pass(step_ms)

    def let_pass(self, duration_ms: int) -> None:
        """So much time."""
        until_ms = self.world.now_ms + duration_ms
        while self.world.step(until_ms):
            pass

    def _well_lives(self) -> list[Life]:
        """Those of the cluster that the work is for."""
        lives = [machine.life for machine in self.machines if machine.life is not None and not machine.is_gone]
        return [life for life in lives if life.cluster_id == self.checker.main_id]

    def _why_not_over(self) -> str | None:
        """What has not come to its end, None when all has."""
        lives = self._well_lives()
        leaders = [life for life in lives if life.node.is_serving]
        if len(leaders) != 1:
            return f"{len(leaders)} leaders serve"
        leader = leaders[0]
        state = leader.node.state
        found = state.pipelines.get(pipeline.NAME)
        if found is not None and found.rollout is not None:
            return f"version {found.version} is rolled out on {len(found.rollout.nodes)} nodes"
        if found is None or found.state != "done" or not node_module.is_over(found):
            return f"the run is {found and found.state}: {self._open_items(leader)}"
        for queue in state.queues.values():
            if queue.leases or queue.delayed or (queue.ready and not queue.results):
                return f"{self._open_items(leader)}"
        for life in lives:
            raft = life.node.raft
            if raft.configuration.members and life.node_id in leader.node.raft.configuration.members:
                if life.node.state.applied_idx != state.applied_idx:
                    return f"{life.name} has applied {life.node.state.applied_idx} of {state.applied_idx}"
            if life.executor._unanswered:
                return f"{life.name} waits for {len(life.executor._unanswered)} answers"
            if list(life.queues_held()):
                return f"{life.name} holds {list(life.queues_held())}"
        if leader.node.raft.configuration.is_joint:
            return "a change of the configuration does not end"
        return None

    @staticmethod
    def _open_items(leader: Life) -> str:
        return ", ".join(
            f"{queue.name}: {len(queue.ready)} ready, {list(queue.leases)} leased, {len(queue.delayed)} delayed"
            for queue in leader.node.state.queues.values() if queue.open_count) or "sources do not end"

    def _check_end(self) -> None:
        """Nothing is lost, nothing is there twice, logs are short, and everybody agrees."""
        leader = next(life for life in self._well_lives() if life.node.is_serving)
        for life in self._well_lives():
            if life.node.state.applied_idx == leader.node.state.applied_idx:
                require(life.node.state.hash == leader.node.state.hash, f"{life.name} and {leader.name} have different states")
                self.checker.compare(life, life.node.state)
                require(life.journal.log_bytes <= LOG_BYTES_LEFT + 2 * config.LOG_BYTES_MAX,
                        f"{life.name} keeps {life.journal.log_bytes} bytes of log, of a limit of {config.LOG_BYTES_MAX}")
        self._check_values()

    def _check_values(self) -> None:
        """Each value that was put or emitted is in each queue once, and what became of it is there."""
        queues = self.checker.main.ledger.queues
        expected = Counter(value for producer in self.producers for value in producer.put)
        found = Counter(item.body for item in queues[f"{pipeline.NAME}/in"].items.values())
        keyed = {value for value, count in found.items() if count != expected[value]}
        require(not keyed, f"values of clients are there another number of times than they were put: {sorted(keyed)[:5]}")
        emitted = Counter(value for stage, shards in (("gen", 1), ("cur", 2)) for shard in range(shards)
                          for value in pipeline.source_values(stage, shard, self.options) * self.options.runs)
        found = Counter(item.body for item in queues[f"{pipeline.NAME}/a"].items.values())
        wrong = (emitted - found) + (found - emitted)
        require(not wrong, f"values of sources are lost or there twice: {sorted(wrong)[:5]}")
        ticked = Counter(pipeline.tick_value(stage, number) for stage in pipeline.TICK_S for number in range(1, 1 + self.options.ticks)
                         for _ in range(self.options.runs))
        found = Counter(item.body for item in queues[pipeline.RATED].items.values())
        require(ticked == found, f"ticks are lost or there twice: {sorted((ticked - found) + (found - ticked))[:5]}")
        for name, stage in pipeline.STAGE_OF.items():
            self._check_outputs(name, stage)

    def _check_outputs(self, name: str, stage: str) -> None:
        """What is done has its outputs, and what has outputs is done."""
        queues = self.checker.main.ledger.queues
        record = next(record for record in pipeline.MANIFEST["stages"] if record["name"] == stage)
        done = [item.body for item in queues[name].items.values() if item.state == "done"]
        for number, port in enumerate(record["ports"]):
            expected = Counter(value for body in done for at, value in pipeline.outputs(stage, body) if at == number)
            for queue in port["queues"]:
                items = queues[f"{pipeline.NAME}/{queue}"].items.values()
                seen = (item for item in items if item.state not in ("hidden", "withdrawn"))
                found = Counter(item.body for item in seen if item.parents and item.body in expected)
                require(expected == found, f"outputs of {stage} in {queue} are lost or there twice")

    # ---- faults

    def _cause_faults(self) -> None:
        options, until_ms = self.options, self.options.safety_ms
        for mean_ms, cause in (
            (options.crash_every_ms, self._crash), (options.partition_every_ms, self._partition),
            (options.one_way_every_ms, self._cut_one_way), (options.udp_cut_every_ms, lambda: self._cut_kind("udp")),
            (options.tcp_cut_every_ms, lambda: self._cut_kind("tcp")), (options.pause_every_ms, lambda: self._pause(False)),
            (options.clock_stop_every_ms, lambda: self._pause(True)), (options.leave_every_ms, self._leave),
            (options.stop_every_ms, self._stop),
            (options.commit_error_every_ms, self._commit_error), (options.disk_full_every_ms, self._fill_disk),
        ):
            self.world.every(mean_ms, cause, until_ms)
        for _ in range(options.wipes):
            self.world.after(self.random.randrange(2_000, until_ms), self._wipe)

    def _someone(self) -> Machine | None:
        up = [machine for machine in self.machines if machine.is_up]
        if not up:
            return None
        leaders = [machine for machine in up if machine.life is not None and machine.life.leads]
        return self.random.choice(leaders if leaders and self.random.random() < 0.4 else up)

    def _down_ms(self) -> int:
        return self.random.randrange(20, 20 + self.options.down_ms_max)

    def _crash(self) -> None:
        machine = self._someone()
        if machine is None:
            return
        self.crashes += 1
        if self.random.random() < 0.3:
            machine.disk.dies_at_next_write = True
            return
        machine.crash("killed", self.random.random() < self.options.power_share)
        machine.start_later(self._down_ms())

    def _cut(self, kinds: tuple[str, ...], ways: set[tuple[int, int]]) -> None:
        for kind in kinds:
            self.network.cuts[kind] |= ways
        self.world.mark("the network", f"is cut for {' and '.join(kinds)}", sorted(ways))
        if "tcp" in kinds:
            for machine in self.machines:
                if machine.life is not None:
                    self._reset_some(machine.life, ways)
        duration_ms = self.random.choice((300, 1500, 4000))
        for kind in kinds:
            self.world.after(self.random.randrange(50, duration_ms), lambda kind=kind: self.network.heal(kind, ways))

    def _reset_some(self, life: Life, ways: set[tuple[int, int]]) -> None:
        for peer in list(life.peers.peers.values()):
            end: Any = peer.connection
            if (end.host, end.other.host) in ways and self.random.random() < self.options.reset_share:
                end.fail("reset")

    def _partition(self) -> None:
        side = set(self.random.sample(sorted(numbers(self.machines)), self.random.randrange(1, 1 + len(self.machines))))
        rest = numbers(self.machines) - side
        ways = {(a, b) for a in side for b in rest} | {(b, a) for a in side for b in rest}
        self._cut(("tcp", "udp"), ways)

    def _cut_one_way(self) -> None:
        if len(self.machines) > 1:
            one, other = self.random.sample(sorted(numbers(self.machines)), 2)
            self._cut(self.random.choice((("tcp", "udp"), ("tcp",), ("udp",))), {(one, other)})

    def _cut_kind(self, kind: str) -> None:
        one = self.random.choice(self.machines).number
        ways = {way for other in numbers(self.machines) - {one} for way in ((one, other), (other, one))}
        self._cut((kind,), ways)

    def _pause(self, clock_stops: bool) -> None:
        machine = self._someone()
        if machine is not None:
            machine.pause(self.random.randrange(50, self.random.choice((300, 1000, 3000))), clock_stops)

    def _commit_error(self) -> None:
        machine = self._someone()
        if machine is not None:
            fault = self.random.choice((Fault.BEFORE, Fault.AFTER))
            machine.disk.error_at_next_write = fault
            self.world.mark(machine.name, f"has an error {fault.value} the next commit")

    def _fill_disk(self) -> None:
        machine = self._someone()
        if machine is not None:
            machine.disk.is_full = True
            disk = machine.disk
            self.world.mark(machine.name, "has a full disk")
            self.world.after(self.random.randrange(200, 2500), lambda: setattr(disk, "is_full", False))

    def _can_do_without(self, machine: Machine) -> bool:
        """Whether a majority of every configuration is left when this machine's copy is lost for good."""
        return self._is_enough([other for other in self.machines if other is not machine and not other.is_gone])

    def _leave(self) -> None:
        """A node leaves in order, or its machine is switched off for good."""
        machine = self._someone()
        if machine is None or not self._can_do_without(machine):
            return
        if self.random.random() < 0.7:
            assert machine.life is not None
            machine.life.event(machine.life.leave)
        else:
            machine.crash("for good", self.random.random() < 0.3)
            machine.is_gone = True

    def _stop(self) -> None:
        """A node stops in order, and starts again after a while."""
        machine = self._someone()
        if machine is not None and machine.life is not None:
            machine.life.event(machine.life.stop)

    def _wipe(self) -> None:
        machine = self._someone()
        if machine is not None and self._can_do_without(machine):
            machine.crash("before it is wiped", True)
            machine.wipe()
            machine.start_later(self._down_ms())


def numbers(machines: list[Machine]) -> set[int]:
    return {machine.number for machine in machines}


@contextlib.contextmanager
def small_sizes(options: Options) -> Iterator[None]:
    """Bounds that a simulated cluster reaches."""
    with (
        mock.patch.object(config, "LOG_BYTES_MAX", options.log_bytes_max),
        mock.patch.object(node_module, "LOG_MEMORY_BYTES_MAX", options.log_memory_bytes_max),
        mock.patch.object(peers, "start_dial", lambda host, port, life: life.dial(host)),
    ):
        yield


def run(options: Options, says: Callable[[str], None] | None = None) -> Outcome:
    """Play one seed."""
    folder = Path(tempfile.mkdtemp(prefix="p2pcluster-simulation-"))
    simulation: Simulation | None = None
    error: str | None = None
    try:
        with small_sizes(options):
            simulation = Simulation(options, folder, says)
            simulation.run()
    except Exception as caught:
        if says is not None:
            raise
        place = traceback.extract_tb(caught.__traceback__)[-1]
        error = f"{type(caught).__name__}: {caught} ({Path(place.filename).name}:{place.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert simulation is not None
    world, checker = simulation.world, simulation.checker
    return Outcome(options, world.fingerprint, world.events, world.now_ms, simulation.crashes, checker.elections,
                   checker.main.ledger.index, world.counts + checker.main.ledger.outcomes, error)


def _play(seed: int) -> Outcome:
    return run(draw(seed))


def run_many(seeds: Iterable[int], workers: int | None = None) -> Iterator[Outcome]:
    """Play seeds in processes beside each other; what came of each, in the order of the seeds."""
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count() or 1) as pool:
        yield from pool.imap(_play, seeds)
