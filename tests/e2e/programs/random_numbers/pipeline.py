"""How long is the way home? Random walks of different lengths, and what physicists say of them: the distance grows with the square root."""

import json
import random
from collections import defaultdict

from p2pcluster import Pipeline, current, sink, source, stage


@source
def Lengths():
    for _ in range(current().params["walks"]):
        yield random.choice([100, 400, 1600])


@stage
def Walk(steps):
    x = y = 0.0
    for _ in range(steps):
        x += random.gauss(0, 1)
        y += random.gauss(0, 1)
    return {"steps": steps, "squared": x * x + y * y}


@sink
def Keep(walk):
    with open(current().out_dir / "walks.jsonl", "a") as file:
        file.write(json.dumps({**walk, "key": current().key}) + "\n")


def average():
    """The mean of the squared distances, by length. A line may be there twice after a kill, so the key decides."""
    walks = {}
    for line in (current().out_dir / "walks.jsonl").read_text().splitlines():
        walk = json.loads(line)
        walks[walk["key"]] = walk
    squares = defaultdict(list)
    for walk in walks.values():
        squares[walk["steps"]].append(walk["squared"])
    means = {steps: sum(values) / len(values) for steps, values in sorted(squares.items())}
    (current().out_dir / "means.json").write_text(json.dumps({"walks": len(walks), "means": means}))


pipeline = Pipeline("walks", Lengths >> Walk >> Keep, params={"walks": 600}, on_done=average)

if __name__ == "__main__":
    pipeline.main()
