"""Pipelines that a type checker accepts without a word."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from p2pcluster import DROP, At, Drop, Flow, Pipeline, Queue, Stage, To, current, i_wrap, sink, source, stage


@source
def numbers() -> Iterator[int]:
    yield from range(3)


@i_wrap(every_s=1.5)
def tick() -> int:
    return 1


@source
def lines(cursor: int | None = None) -> Iterator[At[int]]:
    yield At(1, cursor=1)


@stage(processes=4, retries=5, timeout_s=30, where="cores >= 4")
def double(x: int, by: int = 2) -> int:
    return x * by


@stage
def odd(x: int) -> int | Drop:
    return x if x % 2 else DROP


@stage
def parse(x: int) -> To[int] | To[str]:
    return To("number", x) if x else To("text", "zero")


@stage(concurrency=8)
async def fetch(x: int) -> str:
    return str(x)


@stage
async def pages(x: int) -> AsyncIterator[str]:
    yield str(x)


@stage
class Spell:
    def __call__(self, x: int) -> str:
        return str(x)


@stage(concurrency=4, timeout_s=2)
class Ask:
    async def __aenter__(self) -> Ask:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def __call__(self, x: int) -> str:
        return str(x)


@stage(concurrency=2)
async def follow(text: str) -> AsyncIterator[To[int] | To[str]]:
    yield To("number", 1)
    yield To("text", text)


@sink(batch=10)
async def store(texts: list[str]) -> None:
    print(texts)


@stage(batch=100, batch_wait_s=0.1)
def total(xs: list[int]) -> list[str]:
    return [str(x) for x in xs]


@sink
def show(text: str) -> None:
    print(current().key, text)


@sink
def keep(x: int) -> None:
    print(x)


typed: Stage[[int], str] = stage(lambda x: str(x), name="typed")
nine: int = double(3, by=3)
again = double.named("again", retries=0)
flow: Flow[[], None] = numbers >> double >> fetch >> show

Pipeline(
    "good",
    flow,
    tick >> odd >> again >> [fetch, keep],
    lines >> Queue("parsed", maxsize=None, codec="json") >> parse >> {"number": keep, "text": [show]},
    numbers >> Spell >> show,
    numbers >> total >> show,
    numbers >> pages >> show,
    numbers >> Ask >> follow >> {"number": keep, "text": store},
    [numbers, tick] >> (double >> fetch) >> show,
    Queue("outside") >> keep,
    [Queue("outside"), tick] >> keep,
    params={"size": 3},
    on_done=lambda: None,
)
