"""Each line that ends in `# rejected` must be rejected by a type checker, and no other line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from p2pcluster import At, Drop, Queue, To, sink, source, stage


@source
def numbers() -> Iterator[int]:
    yield from range(3)


@source
def lines(cursor: int | None = None) -> Iterator[At[int]]:
    yield At(1, cursor=1)


@stage
def double(x: int) -> int:
    return x * 2


@stage
def maybe(x: int) -> int | Drop:
    return x


@stage
def route(x: int) -> To[int]:
    return To("a", x)


@stage
async def fetch(x: int) -> str:
    return str(x)


@stage
async def pages(x: int) -> AsyncIterator[str]:
    yield str(x)


@stage
class Spell:
    def __call__(self, x: int) -> str:
        return str(x)


@stage(concurrency=4)
class Ask:
    async def __call__(self, x: int) -> str:
        return str(x)


@stage(concurrency=2)
async def routed(x: int) -> AsyncIterator[To[int]]:
    yield To("number", x)


@sink
def show(text: str) -> None:
    print(text)


numbers >> show  # rejected
lines >> show  # rejected
double >> show  # rejected
maybe >> show  # rejected
route >> show  # rejected
fetch >> double  # rejected
pages >> double  # rejected
routed >> show  # rejected
double >> Spell >> double  # rejected
show >> Ask  # rejected
double >> Ask >> double  # rejected
numbers >> double >> show  # rejected
numbers >> (show >> show)  # rejected
numbers >> Queue("between") >> show  # rejected
numbers >> [double, show]  # rejected
numbers >> {1: double}  # rejected
double("3")  # rejected
stage(double.function, retry=3)  # rejected
stage(double.function, timeout_s="soon")  # rejected
stage(double.function, batch="many")  # rejected
stage(fetch.function, concurrency="8")  # rejected
Queue("numbers", codec="xml")  # rejected
