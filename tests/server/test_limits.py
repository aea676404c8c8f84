"""What one client may ask: exact, on a clock nobody sets, bounded, by the true address (T9)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.strategies import MovingWindowRateLimiter
from running import Running, exchange, request, serving
from starlette.types import Message, Receive, Scope, Send

from flashlite.errors import UsageError
from flashlite.runtime.process import resident_bytes
from flashlite.server.limits import ClientAddress, Windows, client_of

MODELS = "/v1/models"
CHAT = "/v1/chat/completions"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# The window


@given(
    st.lists(st.floats(0, 0.6, allow_subnormal=False), max_size=80),
    st.integers(1, 12),
)
def test_a_window_lets_in_what_a_plain_count_lets_in(gaps: list[float], limit: int) -> None:
    clock = Clock()
    limiter, item = MovingWindowRateLimiter(Windows(clock)), RateLimitItemPerSecond(limit)
    accepted: list[float] = []
    for gap in gaps:
        clock.now += gap
        room = sum(when > clock.now - 1 for when in accepted) < limit
        assert limiter.hit(item, "a") == room
        if room:
            accepted.append(clock.now)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=40))
def test_free_at_is_the_first_moment_with_room(hits: list[tuple[float, int]]) -> None:
    clock = Clock()
    windows = Windows(clock)
    for gap, amount in hits:
        clock.now += gap
        windows.note("a", 60, amount)
    wait = windows.free_at("a", 100, 60)
    if wait > 0:
        clock.now += wait - 1e-6
        assert windows.get_moving_window("a", 100, 60)[1] >= 100
        clock.now += 2e-6
    assert windows.get_moving_window("a", 100, 60)[1] < 100


def test_a_million_addresses_take_little_memory() -> None:
    windows, item = Windows(), RateLimitItemPerSecond(10)
    limiter = MovingWindowRateLimiter(windows)
    before = resident_bytes()
    for i in range(1_000_000):
        assert limiter.hit(item, str(i))
    assert len(windows) <= 1 << 16
    assert resident_bytes() - before < 64 << 20


def test_the_wall_clock_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, item = Windows(), RateLimitItemPerSecond(10)
    limiter = MovingWindowRateLimiter(windows)
    assert all(limiter.hit(item, "a") for _ in range(10))
    for days in (1, -1):
        true = time.time()
        monkeypatch.setattr(time, "time", lambda true=true, days=days: true + days * 86400)
        assert not limiter.hit(item, "a")
        assert limiter.hit(item, f"b{days}")


# The address


def seen(address: str, trusted: list[str], *forwarded: str) -> str:
    found: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(client_of(scope))

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    scope: dict[str, Any] = {"type": "http", "client": (address, 1), "headers": headers}
    asyncio.run(ClientAddress(app, trusted)(scope, receive, send))
    return found[0]


@pytest.mark.parametrize(
    ("address", "trusted", "forwarded", "client"),
    [
        ("192.0.2.1", [], ["198.51.100.7"], "192.0.2.1"),
        ("192.0.2.1", ["192.0.2.1"], ["198.51.100.7"], "198.51.100.7"),
        ("192.0.2.1", ["192.0.2.0/24"], ["6.6.6.6, 198.51.100.7, 192.0.2.9"], "198.51.100.7"),
        ("192.0.2.1", ["192.0.2.0/24"], ["6.6.6.6", "198.51.100.7"], "198.51.100.7"),
        ("192.0.2.1", ["192.0.2.1"], ["6.6.6.6, nonsense"], "192.0.2.1"),
        ("192.0.2.1", ["192.0.2.1"], [], "192.0.2.1"),
        ("2001:db8:1:2:3::4", [], [], "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", [], [], "192.0.2.1"),
    ],
)
def test_the_address_is_the_last_that_no_proxy_of_ours_has(
    address: str, trusted: list[str], forwarded: list[str], client: str
) -> None:
    assert seen(address, trusted, *forwarded) == client


def test_a_proxy_that_is_no_address_is_refused() -> None:
    with pytest.raises(UsageError, match="no address and no network"):
        seen("192.0.2.1", ["proxy.example"])


# Over sockets


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Running]:
    with serving(tiny_gguf, max_connections=512) as running:
        yield running


def burst_from(server: Running, i: int) -> None:
    burst = 12 + i % 5
    with server.connect(f"127.0.{1 + i // 100}.{1 + i % 100}") as connection:
        began = time.monotonic()
        replies = [
            exchange(connection, request(MODELS, x_forwarded_for=f"10.0.{i}.{n}"))
            for n in range(burst)
        ]
        spent = time.monotonic() - began
    statuses = [reply.status for reply in replies if reply]
    assert len(statuses) == burst
    assert set(statuses) <= {200, 429}
    assert 10 <= statuses.count(200) <= 10 * spent + 10
    if spent < 1:
        assert statuses == [200] * 10 + [429] * (burst - 10)


def test_200_addresses_are_limited_exactly_and_apart(server: Running) -> None:
    """T9: bursts above the limit, forged X-Forwarded-For, an honest client at 9/s beside."""
    honest: list[int] = []
    stop = threading.Event()

    def ask_at_9() -> None:
        with server.connect("127.0.9.9") as connection:
            while not stop.is_set():
                reply = exchange(connection, request(MODELS))
                honest.append(reply.status if reply else 0)
                time.sleep(1 / 9)

    thread = threading.Thread(target=ask_at_9)
    thread.start()
    try:
        for i in range(200):
            burst_from(server, i)
    finally:
        stop.set()
        thread.join()
    assert set(honest) == {200}
    assert len(honest) > 3


def test_a_refusal_says_when_to_come_again(server: Running) -> None:
    with server.connect("127.0.7.1") as connection:
        reply = None
        for _ in range(11):
            reply = exchange(connection, request(MODELS))
        assert reply is not None
        assert reply.status == 429
        assert reply.headers["retry-after"] == "1"
        wait = int(reply.headers["retry-after-ms"])
        assert 0 < wait <= 1000
        error = json.loads(reply.body)["error"]
        assert error["code"] == "rate_limit_exceeded"
        time.sleep(wait / 1000 + 0.01)
        again = exchange(connection, request(MODELS))
        assert again is not None
        assert again.status == 200


@pytest.mark.parametrize(
    ("host", "path", "headers", "expected"),
    [
        (1, MODELS, {"x-goog-api-key": "k"}, ("error", "status", "RESOURCE_EXHAUSTED")),
        (2, "/v1beta/models/m:generateContent", {}, ("error", "code", 429)),
        (3, "/v1beta/openai/models", {}, ("error", "type", "rate_limit_error")),
        (4, MODELS + "?key=k", {}, ("error", "status", "RESOURCE_EXHAUSTED")),
        (5, MODELS, {}, ("error", "type", "rate_limit_error")),
    ],
)
def test_a_refusal_has_the_asking_protocols_shape(
    server: Running,
    host: int,
    path: str,
    headers: dict[str, Any],
    expected: tuple[str, str, object],
) -> None:
    with server.connect(f"127.0.8.{host}") as connection:
        replies = [exchange(connection, request(path, **headers)) for _ in range(11)]
    assert replies[-1] is not None
    outer, inner, value = expected
    assert json.loads(replies[-1].body)[outer][inner] == value


def test_ollamas_errors_are_a_text_and_spanish_is_spoken(server: Running) -> None:
    with server.connect("127.0.8.254") as connection:
        asked = request("/api/nothing", accept_language="es-MX,es;q=0.9,en;q=0.5")
        replies = [exchange(connection, asked) for _ in range(11)]
    assert replies[0] is not None
    assert replies[-1] is not None
    assert json.loads(replies[0].body) == {"error": "no se sirve nada en /api/nothing"}
    assert json.loads(replies[-1].body)["error"].startswith("demasiadas peticiones")


def test_health_is_not_limited(server: Running) -> None:
    with server.connect("127.0.7.2") as connection:
        replies = [exchange(connection, request("/health")) for _ in range(30)]
    assert {reply.status for reply in replies if reply} == {200}


def ask(**fields: Any) -> bytes:
    content = {"messages": [{"role": "user", "content": "once"}], "max_tokens": 20} | fields
    return request(CHAT, json.dumps(content).encode())


def test_tokens_of_a_minute_are_counted_prompt_and_answer(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, tokens_per_minute=60, rate_limit=0) as running:
        spent = 0
        with running.connect() as connection:
            while True:
                reply = exchange(connection, ask(temperature=0))
                assert reply is not None
                if reply.status == 429:
                    break
                assert spent < 60  # the one that overdraws is the last
                spent += json.loads(reply.body)["usage"]["total_tokens"]
        assert spent >= 60
        assert 1 < int(reply.headers["retry-after"]) <= 60
        assert "60 tokens a minute" in json.loads(reply.body)["error"]["message"]
        with running.connect("127.0.5.5") as other:
            fresh = exchange(other, ask())
        assert fresh is not None
        assert fresh.status == 200


@pytest.mark.parametrize(
    ("settings", "status"), [({"max_concurrent": 2}, 429), ({"max_requests": 2}, 503)]
)
def test_requests_at_a_time_are_limited(
    tiny_gguf: Path, settings: dict[str, Any], status: int
) -> None:
    with serving(tiny_gguf, rate_limit=0, **settings) as running:
        body = b'{"messages": [{"role": "user", "content": "once"}], "max_tokens": 2'
        held = [running.connect() for _ in range(2)]
        for connection in held:  # a body that has not ended is a request at work
            whole = request(CHAT, body + b"}")
            connection.sendall(whole[:-1])
        time.sleep(0.2)
        with running.connect() as third:
            refused = exchange(third, ask())
        assert refused is not None
        assert refused.status == status
        assert "retry-after" in refused.headers
        for connection in held:
            last = exchange(connection, b"}")
            assert last is not None
            assert last.status == 200
            connection.close()
        with running.connect() as fourth:
            again = exchange(fourth, ask(max_tokens=1))
        assert again is not None
        assert again.status == 200
