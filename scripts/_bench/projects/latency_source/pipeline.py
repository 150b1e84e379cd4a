"""One item at a time at an idle pipeline: the source yields the time, the sink looks how long ago that is."""

import json
import time
from pathlib import Path

from p2pcluster import Pipeline, current, sink, source

PAUSE_S = 0.02


@source
def stamps():
    for _ in range(current().params["items"]):
        time.sleep(PAUSE_S)
        yield time.monotonic()


@sink
class Latencies:
    def __enter__(self):
        self.took_ms = []
        return self

    def __call__(self, put_s):
        self.took_ms.append(1000 * (time.monotonic() - put_s))

    def __exit__(self, *error):
        (Path(current().out_dir) / "Latencies.json").write_text(json.dumps(self.took_ms))


pipeline = Pipeline("latency_source", stamps >> Latencies, params={"items": 300})
