"""One item at a time at an idle pipeline, by another program."""

from common import Latencies

from p2pcluster import Pipeline, Queue

pipeline = Pipeline("latency_put", Queue("stamps") >> Latencies)
