"""Counts the words in a folder of text files that are anywhere on this computer: python pipeline.py --set folder='"/where/they/are"'"""

import json
import re
from collections import Counter
from pathlib import Path

from p2pcluster import Pipeline, current, sink, source, stage


@source
def Files():
    folder = Path(current().params["folder"])
    for path in sorted(folder.rglob("*.txt")):
        yield {"name": str(path.relative_to(folder)), "text": path.read_text("utf-8")}


@stage
def Paragraphs(file):
    for number, paragraph in enumerate(file["text"].split("\n\n")):
        yield {"name": f"{file['name']}:{number}", "text": paragraph}


@stage
def Count(paragraph):
    return {"name": paragraph["name"], "words": Counter(re.findall(r"\w+", paragraph["text"].lower()))}


@sink
class Add:
    """The counts of each paragraph in a file of their own: written again after a kill, it is the same file."""

    def __enter__(self):
        self.folder = current().out_dir / "parts"
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, *exception):
        pass

    def __call__(self, counted):
        part = self.folder / counted["name"].replace("/", "_")
        part.write_text(json.dumps(counted["words"]), "utf-8")


def total():
    words = Counter()
    for part in (current().out_dir / "parts").iterdir():
        words.update(json.loads(part.read_text("utf-8")))
    (current().out_dir / "words.json").write_text(json.dumps(words, ensure_ascii=False), "utf-8")


pipeline = Pipeline("words", Files >> Paragraphs >> Count >> Add, params={"folder": "texts"}, on_done=total)

if __name__ == "__main__":
    pipeline.main()
