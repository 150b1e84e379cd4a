"""Numbers from outside through a slow stage, one process on each of three nodes: something is done at any moment.

A stage and no sink, as a sink keeps to one machine.
"""

from __future__ import annotations

import time

from p2pcluster import Pipeline, Queue, stage

NAP_S = 0.02


@stage(processes=3, per_node=1)
def square(number: int) -> int:
    time.sleep(NAP_S)
    return number**2


pipeline = Pipeline("steady", Queue("numbers", maxsize=None) >> square >> Queue("squares", maxsize=None))
