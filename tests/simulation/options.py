"""What a simulated cluster has to go through: one record of all faults, drawn from a seed.

Times between faults are means in milliseconds, 0 for never. Shares are of one. The seed decides everything else too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any


@dataclass(frozen=True)
class Options:
    """See the module."""

    seed: int = 0
    # who is there
    machines: int = 3
    voters: int = 3  # of a cluster that was founded before; 0: the machines have to find each other
    late: int = 0  # of the machines, so many come later
    real_journal: bool = False
    # the network
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # share of packets that are far too late
    delay_ms_max: int = 4
    partition_every_ms: int = 0
    one_way_every_ms: int = 0
    udp_cut_every_ms: int = 0
    tcp_cut_every_ms: int = 0
    reset_share: float = 0.5  # of the connections that a cut breaks at once
    # machines
    pause_every_ms: int = 0
    clock_stop_every_ms: int = 0
    crash_every_ms: int = 0
    power_share: float = 0.3  # of the crashes that take the machine along
    down_ms_max: int = 1500
    torn_share: float = 0.4  # of what was being written when it crashed
    kept_share: float = 0.3  # the rest of it is lost
    change_crash_share: float = 0.0  # of the writes with a change of the configuration that are the last ones
    leave_every_ms: int = 0
    stop_every_ms: int = 0
    wipes: int = 0
    # disks
    fsync_ms_max: int = 0  # 0: written within the event
    commit_error_every_ms: int = 0
    disk_full_every_ms: int = 0
    # sizes, small so that each bound is met
    log_bytes_max: int = 20_000
    body_memory_bytes_max: int = 2_000
    log_memory_bytes_max: int = 4_000
    append_bytes_max: int = 2_000
    # work
    gen_items: int = 30
    cursor_items: int = 16
    clients: int = 2
    client_puts: int = 12
    process_dies_share: float = 0.004
    janitor_every_ms: int = 0  # somebody looks at the parked items
    control_every_ms: int = 0  # somebody pauses, resumes and scales stages
    runs: int = 1
    ticks: int = 8  # of each source that is called so often, until it ends
    wall_skew_ms_max: int = 300  # by which machines' ideas of the time of day are wrong
    deploy_every_ms: int = 0  # new versions of the pipeline, some of which do not start
    undeploy_every_ms: int = 0  # a second pipeline comes and goes
    # phases
    safety_ms: int = 10_000
    calm_ms_max: int = 90_000

    def __str__(self) -> str:
        plain = Options()
        changed = {name: value for name, value in vars(self).items() if value != getattr(plain, name) or name == "seed"}
        return f"Options({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def draw(seed: int, **given: Any) -> Options:
    """The options of a seed; `given` ones go over them."""
    random = Random(f"options {seed}")
    machines = random.choice((1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5, 5, 6, 7))
    late = random.randrange(0, 1 + machines // 3) if machines > 1 else 0
    founded = [count for count in (1, 3, 5) if count <= machines - late]
    calm_network = random.random() < 0.25

    def sometimes(share: float, low: int, high: int) -> int:
        return random.randrange(low, high) if random.random() < share else 0

    options = Options(
        seed=seed, machines=machines, late=late, voters=0 if random.random() < 0.1 else random.choice(founded), real_journal=random.random() < 0.04,
        loss=0.0 if calm_network else random.choice((0.0, 0.02, 0.1, 0.3)), duplication=0.0 if calm_network else random.choice((0.0, 0.1, 0.5)),
        reordering=random.choice((0.0, 0.0, 0.1)), delay_ms_max=random.choice((3, 10, 40)),
        partition_every_ms=sometimes(0.4, 1500, 6000), one_way_every_ms=sometimes(0.25, 2000, 6000),
        udp_cut_every_ms=sometimes(0.15, 2000, 6000), tcp_cut_every_ms=sometimes(0.25, 2000, 6000), reset_share=random.random(),
        pause_every_ms=sometimes(0.25, 1000, 5000), clock_stop_every_ms=sometimes(0.15, 2000, 6000),
        crash_every_ms=random.randrange(1500, 4400), power_share=random.random() * 0.6, down_ms_max=random.choice((300, 1500, 4000)),
        leave_every_ms=sometimes(0.25, 2000, 6000), stop_every_ms=sometimes(0.2, 2000, 8000), wipes=int(random.random() < 0.12),
        fsync_ms_max=random.choice((0, 0, 3, 25)), commit_error_every_ms=sometimes(0.2, 2000, 8000), disk_full_every_ms=sometimes(0.1, 3000, 8000),
        log_bytes_max=random.choice((3_000, 20_000, 1 << 28)), body_memory_bytes_max=random.choice((0, 300, 1 << 27)),
        log_memory_bytes_max=random.choice((0, 2_000, 1 << 24)), append_bytes_max=random.choice((200, 2_000, 1 << 18)),
        change_crash_share=random.choice((0.0, 0.0, 0.2)),
        gen_items=random.randrange(8, 40), cursor_items=random.randrange(4, 16), clients=random.randrange(1, 4),
        client_puts=random.randrange(3, 11), process_dies_share=random.choice((0.0, 0.004, 0.02)),
        janitor_every_ms=sometimes(0.3, 300, 2000), runs=2 if random.random() < 0.1 else 1, ticks=random.randrange(3, 12), wall_skew_ms_max=random.choice((0, 50, 1500)),
        deploy_every_ms=sometimes(0.2, 500, 3000), undeploy_every_ms=sometimes(0.12, 500, 3000),
        control_every_ms=sometimes(0.3, 100, 1500),
    )
    return replace(options, **given)
