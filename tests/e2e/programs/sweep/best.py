"""Another script: has the sweep run with parameters of its own, and reads the best of what came out."""

import json

from p2pcluster import ItemsParked, connect

with connect(pipeline="sweep", timeout_s=30) as cluster:
    cluster.wait(timeout_s=60)
    cluster.start(params={"rates": [0.01, 0.1, 0.5, 9.0], "powers": [1, 2, 3]})
    try:
        cluster.wait(timeout_s=60)
    except ItemsParked as error:
        print(error)
    fits = list(cluster.results("Fit"))
    best = min(fits, key=lambda fit: fit["loss"])
    failed = cluster.parked()
    print(json.dumps({"fits": len(fits), "best": best, "failed": [item["error"]["text"] for item in failed]}))
