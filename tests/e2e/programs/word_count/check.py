"""python check.py FOLDER TEXTS: whether the words were counted as one program would count them."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

found = Counter(json.loads((Path(sys.argv[1]) / "words.json").read_text("utf-8")))
expected = Counter()
for path in Path(sys.argv[2]).rglob("*.txt"):
    expected.update(re.findall(r"\w+", path.read_text("utf-8").lower()))
assert found == expected, f"not the same: {(found - expected) + (expected - found)}"
print(f"{sum(found.values())} words, each counted once")
