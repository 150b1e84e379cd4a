"""One item at a time at an idle pipeline: another program puts the time, the sink looks how long ago that is."""

import json
import time
from pathlib import Path

from p2pcluster import Pipeline, Queue, current, sink



@sink
class Latencies:
    def __enter__(self):
        self.took_ms = []
        return self

    def __call__(self, put_s):
        self.took_ms.append(1000 * (time.monotonic() - put_s))

    def __exit__(self, *error):
        (Path(current().out_dir) / "Latencies.json").write_text(json.dumps(self.took_ms))


pipeline = Pipeline("latency_put", Queue("stamps") >> Latencies)
