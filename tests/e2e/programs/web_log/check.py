"""python check.py FOLDER LOG: whether each line of the log is in the right file, and each address has its country."""

import json
import sys
from pathlib import Path

folder, lines = Path(sys.argv[1]), Path(sys.argv[2]).read_text("utf-8").splitlines()
entries = {entry["number"]: entry for entry in map(json.loads, (folder / "entries.jsonl").read_text("utf-8").splitlines())}
rejected = {entry["number"]: entry for entry in map(json.loads, (folder / "rejected.jsonl").read_text("utf-8").splitlines())}
assert sorted([*entries, *rejected]) == list(range(len(lines))), "a line is missing, or in both"
for number, line in enumerate(lines):
    if line.startswith("10."):
        entry = entries[number]
        assert entry["address"] == line.split()[0] and entry["country"] == "ABCDE"[sum(map(int, entry["address"].split("."))) % 5], entry
    else:
        assert rejected[number]["line"] == line, rejected[number]
print(f"{len(entries)} entries and {len(rejected)} rejected")
