"""A running server that is asked for more than it can do: nothing comes late."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from flashlite.runtime.model import load
from flashlite.server.app import create_app
from flashlite.server.config import ServerConfig
from flashlite.server.pace import Shape
from flashlite.server.registry import Registry
from flashlite.server.timing import Timing

CHAT = "/v1/chat/completions"
TOKENS = 60
SLACK = 0.05  # seconds beyond the deadline and one step


@dataclass
class Served:
    url: str
    timings: list[Timing]  # of answers, in the order of their last bytes
    steps: list[float]  # seconds of each
    alone: float  # seconds of an answer of `TOKENS` when nothing else runs

    def late(self, may_take: float, answers: int) -> float:
        """Seconds by which the latest of so many answers missed its deadline."""
        until = time.monotonic() + 5
        while len(self.timings) < answers:  # a client may have the last byte before it is noted
            assert time.monotonic() < until
            time.sleep(0.001)
        assert len(self.timings) == answers
        return max(t.written - t.head_read - may_take for t in self.timings if t.written)


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Served]:
    """SmolLM2 with four slots; the timing of every answer is kept."""
    model = load(smollm2_gguf, max_sequences=4, max_sequence_length=1024)
    timings: list[Timing] = []
    app = create_app(
        Registry([model]),
        ServerConfig(rate_limit=0, max_concurrent=1024, max_requests=1024),
        report=timings.append,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    steps: list[float] = []
    pace = next(iter(app.state.flashlite.workers.values())).dispatch.deadlines.pace
    learn = pace.note

    def note(shape: Shape, seconds: float) -> None:
        steps.append(seconds)
        learn(shape, seconds)

    pace.note = note
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        began = time.perf_counter()
        for seed in range(4):
            client.post(CHAT, json=ask(TOKENS, seed=seed)).raise_for_status()
        alone = (time.perf_counter() - began) / 4
    while len(timings) < 4:
        time.sleep(0.001)
    yield Served(url, timings, steps, alone)
    server.should_exit = True
    thread.join()


def ask(tokens: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Once upon a time there was a little dog"}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 1, "seed": 1} | fields


def outcome(reply: httpx.Response) -> str:
    if reply.status_code == 503:
        assert reply.json()["error"]["code"] == "overloaded"
        again = int(reply.headers.get("retry-after", 0))
        assert again >= 1 or reply.headers["x-should-retry"] == "false"
        return "refused"
    (choice,) = reply.raise_for_status().json()["choices"]
    assert choice["finish_reason"] in ("stop", "length", "deadline")
    return "partial" if choice["finish_reason"] == "deadline" else "complete"


def test_four_times_too_much_is_answered_in_time_or_refused(served: Served) -> None:
    draw, may_take = random.Random(0), 4 * served.alone
    rate = 8 / served.alone  # four slots make at most twice the answers of one
    served.timings.clear()
    served.steps.clear()

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=60) as client:
            replies = []
            for seed in range(100):
                body = ask(TOKENS, seed=seed, deadline_ms=1000 * may_take)
                replies.append(asyncio.create_task(client.post(CHAT, json=body)))
                await asyncio.sleep(draw.expovariate(rate))
            return await asyncio.gather(*replies)

    outcomes = Counter(map(outcome, asyncio.run(flood())))
    assert outcomes.total() == 100
    assert outcomes["refused"] >= 10
    assert outcomes["complete"] >= 10
    assert served.late(may_take, 100) <= max(served.steps) + SLACK


def test_a_streamed_answer_ends_marked_at_its_deadline(served: Served) -> None:
    served.timings.clear()
    may_take = max(1, math.ceil(served.alone))
    never_ends = {"2": -100, "0": -100}
    with httpx.Client(base_url=served.url, timeout=60) as client:
        body = ask(900, stream=True, logit_bias=never_ends)
        reply = client.post(CHAT, json=body, headers={"X-Server-Timeout": str(may_take)})
    assert '"finish_reason":"deadline"' in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")
    assert -may_take / 3 < served.late(may_take, 1) <= max(served.steps) + SLACK


def test_a_stream_that_cannot_begin_in_time_is_a_503(served: Served) -> None:
    headers = {"X-Flashlite-Deadline-Ms": "1"}
    with httpx.Client(base_url=served.url) as client:
        reply = client.post(CHAT, json=ask(400, stream=True), headers=headers)
    assert outcome(reply) == "refused"
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({"X-Server-Timeout": "soon"}, {}),
        ({"X-Flashlite-Deadline-Ms": "-3"}, {}),
        ({}, {"deadline_ms": 0}),
    ],
)
def test_a_deadline_that_is_none_is_a_400(
    served: Served, headers: dict[str, str], fields: dict[str, Any]
) -> None:
    with httpx.Client(base_url=served.url) as client:
        reply = client.post(CHAT, json=ask(4, **fields), headers=headers)
    assert reply.status_code == 400
    assert "above 0" in reply.json()["error"]["message"]
