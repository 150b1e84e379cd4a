"""Pictures are made small. Shrinking takes by far the longest, so it gets as many processes as there are free slots."""

import hashlib
import zlib
from pathlib import Path

from p2pcluster import Pipeline, current, sink, source, stage

SIZE = 96


@source
def Pictures():
    """Stands for a camera: made by arithmetic, so that anybody can check what comes out."""
    for number in range(current().params["pictures"]):
        yield {"name": f"picture{number:03}", "pixels": bytes((x * y + number) % 256 for y in range(SIZE) for x in range(SIZE))}


@stage
def Compress(picture):
    return {**picture, "pixels": zlib.compress(picture["pixels"])}


@stage(retries=1, timeout_s=60)
def Shrink(picture):
    """The mean of each 8 by 8 pixels, computed a few times more than needed: the slow stage."""
    pixels = zlib.decompress(picture["pixels"])
    for _ in range(current().params["slowness"]):
        hashlib.pbkdf2_hmac("sha256", pixels, b"slow", 2000)
    small = bytearray()
    for top in range(0, SIZE, 8):
        for left in range(0, SIZE, 8):
            block = [pixels[(top + y) * SIZE + left + x] for y in range(8) for x in range(8)]
            small.append(sum(block) // 64)
    return {"name": picture["name"], "pixels": bytes(small)}


@sink(processes=2)
def Save(thumbnail):
    file = Path(current().out_dir) / f"{thumbnail['name']}.pgm"
    file.write_bytes(f"P5 {SIZE // 8} {SIZE // 8} 255\n".encode() + thumbnail["pixels"])


pipeline = Pipeline("thumbnails", Pictures >> Compress >> Shrink >> Save, params={"pictures": 60, "slowness": 3})

if __name__ == "__main__":
    pipeline.main()
