"""python check.py FOLDER: whether the means are what they should be, twice the number of steps, give or take six standard errors."""

import json
import sys
from pathlib import Path

found = json.loads((Path(sys.argv[1]) / "means.json").read_text())
assert found["walks"] == 600, found
assert sorted(map(int, found["means"])) == [100, 400, 1600], found
for steps, mean in found["means"].items():
    ratio = mean / (2 * int(steps))
    assert 0.5 < ratio < 1.6, f"walks of {steps} steps: {ratio:.2f} of what was expected"
print("the walks are as long as they should be")
