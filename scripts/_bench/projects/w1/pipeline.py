"""Small numbers, squared, added up: each of the three in one process."""

import json
import os
import time
from pathlib import Path

from p2pcluster import Pipeline, current, sink, source, stage

READY_S = 30.0


def here(name):
    return Path(current().out_dir) / name


@source
def numbers():
    here("numbers.pid").write_text(str(os.getpid()))
    deadline_s = time.monotonic() + READY_S
    while not here("Total.pid").exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    for number in range(current().params["items"]):
        yield {"number": number}


@stage(processes=1)
def square(item):
    return item["number"] ** 2


@sink
class Total:
    """Writes `Total.json` when its process is told to end."""

    def __init__(self):
        self.items = current().params["items"]
        self.count = self.total = 0
        self.first_s = self.last_s = None

    def __enter__(self):
        here("Total.pid").write_text(str(os.getpid()))
        return self

    def __call__(self, value):
        self.count += 1
        self.total += value
        if self.count == 1:
            self.first_s = time.monotonic()
        if self.count == self.items:
            self.last_s = time.monotonic()

    def __exit__(self, *error):
        found = {"count": self.count, "total": self.total, "first_s": self.first_s, "last_s": self.last_s}
        here("Total.json").write_text(json.dumps(found))


pipeline = Pipeline("w1", numbers >> square >> Total, params={"items": 1_000_000})
