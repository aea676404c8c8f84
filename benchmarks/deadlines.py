"""Whether answers keep their deadline when a server is asked for four times what it can do.

    python benchmarks/deadlines.py
    python benchmarks/deadlines.py --requests 100 --overload 2 --deadline 1

First the capacity: as many clients as there are slots, each asking again as soon as it is answered.
Then `--overload` times as many requests per second arrive at random times, from eight addresses,
each with a deadline. The server's clock runs from a request's head to its last byte; the clients'
view stands beside it. The gates: no answer later than its deadline, one step and 50 ms; every
request gets a whole answer, a part that says so, or a 503.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import uvicorn

import common
from common import SMOLLM2, Gate, Row
from flashlite.runtime.model import load
from flashlite.server.app import create_app
from flashlite.server.config import ServerConfig
from flashlite.server.pace import Shape
from flashlite.server.registry import Registry
from flashlite.server.timing import DEADLINE_HEADER, Timing

ADDRESSES = 8
SLACK = 0.05  # seconds
CONTEXT = 1024
WORDS = ("river", "stone", "music", "green", "seven", "often", "carry", "light", "north", "paper")
NONE = Gate(0, less=True)


@dataclass(frozen=True)
class Load:
    """What the clients do; `rate` None: `together` of them ask again when they are answered."""

    url: str
    requests: int
    seed: int
    rate: float | None = None
    together: int = 1
    deadline: float | None = None


@dataclass(frozen=True)
class Seen:
    """An answer as its client saw it."""

    outcome: str  # complete, partial, refused, or what went wrong
    seconds: float
    tokens: int


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1, isa=False)
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="[default: 2000]")
    parser.add_argument("--overload", type=float, default=4, metavar="X", help="[default: 4]")
    parser.add_argument("--deadline", type=float, default=2, metavar="S", help="[default: 2]")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="[default: 8]")
    parser.add_argument("--child", metavar="JSON", help="what the script starts itself with")
    options = common.arguments(parser)
    if options.child:
        seen = asyncio.run(clients(Load(**json.loads(options.child))))
        print(json.dumps([asdict(one) for one in seen]))
        return
    common.ready_artifact(SMOLLM2)
    with server(options.threads, options.slots) as (url, timings, steps):
        ask(Load(url, 2 * options.slots, seed=1, together=options.slots))  # warms up
        began = time.perf_counter()
        best = ask(Load(url, 8 * options.slots, seed=2, together=options.slots))
        took = time.perf_counter() - began
        capacity, best_tokens = len(best) / took, sum(one.tokens for one in best) / took
        common.note(f"{capacity:.1f} requests/s, {best_tokens:.0f} tokens/s")
        timings.clear()
        steps.clear()
        rate = options.overload * capacity
        seen, took = [], 0.0
        for lap in range(options.rounds):
            began = time.perf_counter()
            seen += ask(Load(url, options.requests, 3 + lap, rate, deadline=options.deadline))
            took += time.perf_counter() - began
        time.sleep(0.2)  # a client may have the last byte before its time is noted
    late = [t.written - t.head_read - options.deadline for t in timings if t.written is not None]
    ends = Counter(one.outcome for one in seen)
    known = ends["complete"] + ends["partial"] + ends["refused"]
    allowed = max(steps) + SLACK
    n = len(seen)
    tokens = sum(one.tokens for one in seen) / took
    times = sorted(one.seconds for one in seen)
    rows = [
        Row("answers too late", "", sum(one > allowed for one in late), gate=NONE),
        Row("requests without an answer, a part or a 503", "", n - known, gate=NONE),
        Row("requests the server did not time", "", n - len(late), gate=NONE),
        Row("latest, after its deadline", "ms", 1e3 * max(late)),
        Row("longest step", "ms", 1e3 * max(steps)),
        Row("complete", "%", 100 * ends["complete"] / n),
        Row("partial", "%", 100 * ends["partial"] / n),
        Row("refused", "%", 100 * ends["refused"] / n),
        Row("tokens in time", "tok/s", tokens, {"capacity": best_tokens}, "capacity",
            tokens / best_tokens),
        Row("clients' view, median", "ms", 1e3 * times[n // 2]),
        Row("clients' view, slowest", "ms", 1e3 * times[-1]),
    ]  # fmt: skip
    common.finish(
        "deadlines", options, rows, requests=n, capacity=capacity, rate=rate, outcomes=dict(ends)
    )


@contextmanager
def server(threads: int, slots: int) -> Iterator[tuple[str, list[Timing], list[float]]]:
    """Its address, the timings of its answers, and the seconds of its steps."""
    timings: list[Timing] = []
    steps: list[float] = []
    model = load(SMOLLM2, threads=threads, max_sequences=slots, max_sequence_length=CONTEXT)
    app = create_app(Registry([model]), ServerConfig(rate_limit=0), report=timings.append)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    pace = app.state.worker.dispatch.deadlines.pace
    learn = pace.note

    def note(shape: Shape, seconds: float) -> None:
        steps.append(seconds)
        learn(shape, seconds)

    pace.note = note
    try:
        yield f"http://127.0.0.1:{port}", timings, steps
    finally:
        running.should_exit = True
        thread.join()


def ask(load: Load) -> list[Seen]:
    """Let a process of its own be the clients: they share no interpreter with the server."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(load))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Seen(**one) for one in json.loads(output)]


async def clients(load: Load) -> list[Seen]:
    """Send all requests; what came of each, in their order."""
    draw = random.Random(load.seed)
    bodies = [body(draw) for _ in range(load.requests)]
    headers = {} if load.deadline is None else {DEADLINE_HEADER: str(1e3 * load.deadline)}
    limits = httpx.Limits(max_connections=None)
    transports = [
        httpx.AsyncHTTPTransport(local_address=f"127.0.0.{2 + i}", limits=limits)
        for i in range(ADDRESSES)
    ]
    sessions = [
        httpx.AsyncClient(base_url=load.url, transport=one, headers=headers, timeout=120)
        for one in transports
    ]
    together = asyncio.Semaphore(load.together if load.rate is None else load.requests)

    async def one(number: int) -> Seen:
        async with together:
            return await send(sessions[number % ADDRESSES], bodies[number])

    tasks = []
    at = time.perf_counter()
    for number in range(load.requests):
        if load.rate is not None:
            at += draw.expovariate(load.rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number)))
    seen = await asyncio.gather(*tasks)
    for session in sessions:
        await session.aclose()
    return seen


def body(draw: random.Random) -> dict[str, Any]:
    words = draw.choices(WORDS, k=min(200, 4 + int(draw.expovariate(1 / 40))))
    return {
        "messages": [{"role": "user", "content": f"Tell me about {' '.join(words)}."}],
        "max_tokens": min(128, 4 + int(draw.expovariate(1 / 32))),
        "temperature": 1,
        "seed": draw.randrange(1 << 30),
    }


async def send(session: httpx.AsyncClient, asked: dict[str, Any]) -> Seen:
    began = time.perf_counter()
    try:
        reply = await session.post("/v1/chat/completions", json=asked)
    except httpx.HTTPError as error:
        return Seen(repr(error), time.perf_counter() - began, 0)
    seconds = time.perf_counter() - began
    if reply.status_code == 503:
        return Seen("refused", seconds, 0)
    if reply.status_code != 200:
        return Seen(str(reply.status_code), seconds, 0)
    answer = reply.json()
    partial = answer["choices"][0]["finish_reason"] == "deadline"
    tokens = answer["usage"]["completion_tokens"]
    return Seen("partial" if partial else "complete", seconds, tokens)


if __name__ == "__main__":
    main()
