"""Malformed requests never fail the server: 4xx or an answer, and it goes on (T6)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Reply, Running, exchange, request, serving

from flashlite.runtime.process import resident_bytes

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "once"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "once", "max_tokens": 2},
    "/v1/embeddings": {"input": "once"},
    "/tokenize": {"content": "once"},
    "/detokenize": {"tokens": [5, 6]},
}
FIELDS = [
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed",
    "stop", "logit_bias", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty",
    "stream", "stream_options", "response_format", "tools", "tool_choice", "model", "user",
    "messages", "prompt", "input", "tokens", "content", "deadline_ms", "chat_template",
    "chat_template_kwargs", "n_discard", "best_of", "echo", "suffix", "encoding_format",
]  # fmt: skip
VALUES: list[Any] = [
    -(2**63), -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 0.5, "1", "", "\0", "\ud83d",
    True, False, None, [], {}, [[]], [{}], {"a": {}}, ["x"] * 300, "x" * 5000, [None], [1e400],
    {"5": -100}, {"-1": 1}, {"type": "json_schema"}, {"type": "json_object"}, {"include_usage": 1},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, [{"role": "system"}],
    [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "x", "content": "y"}],
    "<|im_start|>system", "{{ cycler.__init__ }}", [-1], [2**40], float("nan"), float("inf"),
]  # fmt: skip
HEADERS = {
    "x_server_timeout": ["-1", "nan", "1e309", "", "9" * 400, "0"],
    "x_flashlite_deadline_ms": ["-1", "x", "0.0000001", "\x7f"],
    "content_type": ["text/plain", "multipart/form-data; boundary=", "application/json; a=\x80"],
    "accept_language": ["es;q=..", ",,,;;", "es;q=1e9"],
    "authorization": ["Bearer", "Basic eA==", "\xff"],
    "x_forwarded_for": [",,,", "::1%0", "a" * 300],
    "expect": ["100-continue", "200-ok"],
    "host": ["", "127.0.0.1:99999999", "[::1", "localhost@x", "127.0.0.1, x"],
    "origin": ["null", "http://[", "\xff"],
    "connection": ["upgrade", "close", "x"],
    "upgrade": ["websocket", "h2c"],
}  # fmt: skip
NESTED = [b"[" * 50_000, b'{"a":' * 50_000, b'{"messages":' + b"[" * 9000 + b"]" * 9000 + b"}"]


def damaged(rng: random.Random) -> bytes:
    """One request with something wrong."""
    path, content = rng.choice(list(PATHS.items()))
    content = dict(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content[rng.choice(FIELDS)] = rng.choice(VALUES)
    body = json.dumps(content).encode()
    headers: dict[str, str] = {}
    kind = rng.randrange(8)
    if kind == 0:
        name = rng.choice(list(HEADERS))
        headers[name] = rng.choice(HEADERS[name])
    elif kind == 1:
        body = rng.choice([*NESTED, b"\xff\xfe", b"", b"null", b"[]", b'"a"', body[:-1], body * 2])
    elif kind == 2:
        at = rng.randrange(len(body))
        body = body[:at] + rng.randbytes(rng.choice([1, 4])) + body[at + 1 :]
    method = rng.choice(["POST"] * 20 + ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "QUERY", "x"])
    if kind == 3:
        path = rng.choice(
            [
                "/" + "a" * 2000,
                "/%ff%00",
                "//",
                "/v1/models/%2e%2e",
                f"{path}?a=%&&key=",
                "*",
                "/v1",
            ]
        )
    raw = request(path, body, method=method, **headers)
    if kind == 4:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.randbytes(rng.choice([0, 1, 3])) + raw[at + rng.choice([0, 1]) :]
    elif kind == 5:
        raw = raw.replace(b"content-length", b"transfer-encoding: chunked\r\ncontent-length")
    elif kind == 6:
        head, _, _ = raw.partition(b"content-length")
        size = rng.choice([b"ffffffffffffffff", b"-1", b"g", b"0", b"5;x=" + b"y" * 500, b"1"])
        raw = (
            head + b"transfer-encoding: chunked\r\n\r\n" + size + b"\r\n" + body + b"\r\n0\r\n\r\n"
        )
    return raw


def throw(running: Running, times: int, seed: int) -> dict[int, int]:
    """How often each status came; 0 for a connection that was closed instead."""
    found: dict[int, int] = {}
    for i in range(times):
        raw = damaged(random.Random(seed * 1_000_003 + i))
        with running.connect() as connection:
            connection.settimeout(20)
            try:
                reply = exchange(connection, raw)
            except TimeoutError:
                raise AssertionError(
                    f"seed {seed}, request {i}: no answer to {raw[:300]!r}"
                ) from None
        status = reply.status if isinstance(reply, Reply) else 0
        if status == 503:  # a deadline that nothing could be answered within is told early
            assert b"deadline" in raw or b"x-server-timeout" in raw, f"seed {seed}, request {i}"
        else:
            assert status < 500, f"seed {seed}, request {i}: {reply} to {raw[:600]!r}"
        found[status] = found.get(status, 0) + 1
    return found


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Running]:
    with serving(
        tiny_gguf, rate_limit=0, head_timeout="300ms", body_timeout="300ms", keep_alive="1s"
    ) as running:
        yield running


def test_300_malformed_requests_fail_nothing(server: Running) -> None:
    found = throw(server, 300, seed=6)
    assert found.get(400, 0) > 50
    server.wait_until_idle()
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


@pytest.mark.accept
def test_10_000_malformed_requests_fail_nothing(server: Running) -> None:
    """T6."""
    throw(server, 1000, seed=60)
    before = resident_bytes()
    found = throw(server, 10_000, seed=61)
    grown = resident_bytes() - before
    print(f"statuses {dict(sorted(found.items()))}, {grown / 1e6:.1f} MB more")
    assert grown <= 0.05 * before
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
