"""A web server's log, enriched with what another service knows of each address; lines that are none go elsewhere."""

import asyncio
import json
import re
from urllib.parse import urlsplit

from p2pcluster import At, Pipeline, To, current, sink, source, stage

LINE = re.compile(r'(?P<address>\S+) \S+ \S+ \[[^]]*\] "(?P<method>\w+) (?P<path>\S+) [^"]*" (?P<status>\d{3}) (?P<size>\d+)')


@source
def Lines(cursor=None):
    with open(current().params["log"], encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if cursor is None or number > cursor:
                yield At({"number": number, "line": line.rstrip("\n")}, number)


@stage
def Parse(entry):
    found = LINE.fullmatch(entry["line"])
    if found is None:
        return To("bad", entry)
    return To("good", {"number": entry["number"], **found.groupdict()})


@stage(concurrency=20, retries=4, backoff_s=0.1, timeout_s=20)
async def Locate(entry):
    """Asks the service over HTTP; many at once, since each of them only waits."""
    where = urlsplit(current().params["service"])
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(f"GET /{entry['address']} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.splitlines()[0]:
        raise ConnectionError(f"the service says {head.splitlines()[0]!r} for {entry['address']}")
    return {**entry, "country": json.loads(body)["country"]}


@sink
def Store(entry):
    with open(current().out_dir / "entries.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


@sink
def Reject(entry):
    with open(current().out_dir / "rejected.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


pipeline = Pipeline("weblog", Lines >> Parse >> {"good": Locate >> Store, "bad": Reject}, params={"log": "access.log", "service": ""})

if __name__ == "__main__":
    pipeline.main()
