"""python check.py FOLDER: whether each picture has its thumbnail."""

import sys
from pathlib import Path

files = sorted(Path(sys.argv[1]).glob("*.pgm"))
assert [file.stem for file in files] == [f"picture{number:03}" for number in range(60)], files
for number, file in enumerate(files):
    head, _, pixels = file.read_bytes().partition(b"\n")
    assert head == b"P5 12 12 255" and len(pixels) == 144, file
    corner = sum((x * y + number) % 256 for y in range(8) for x in range(8)) // 64
    assert pixels[0] == corner, f"{file}: {pixels[0]} where {corner} is due"
print(f"{len(files)} thumbnails")
