"""Deadlines as HTTP says them, and the clock around an answer."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from starlette.types import Message, Receive, Scope, Send

from flashlite.errors import UsageError
from flashlite.server.timing import Stopwatch, Timing, asked_deadline, parse_duration, retry_headers

TIMEOUT = b"X-Server-Timeout"
DEADLINE = b"x-flashlite-deadline-ms"


def test_without_a_word_there_is_no_deadline() -> None:
    assert asked_deadline([(b"accept", b"*/*")]) is None
    assert asked_deadline([], None, 2.0) == 2.0


def test_the_shortest_deadline_holds() -> None:
    headers = [(TIMEOUT, b"3"), (DEADLINE, b"1500")]
    assert asked_deadline(headers) == 1.5
    assert asked_deadline(headers, 700) == pytest.approx(0.7)
    assert asked_deadline(headers, 9000.5, server=1.0) == 1.0
    assert asked_deadline([(TIMEOUT, b"3"), (TIMEOUT, b" 2 ")]) == 2.0


@pytest.mark.parametrize(
    "value", ["", "0", "-1", "nan", "inf", "1e3", "2s", "86401", "0x10", "1_0", "٣", "9" * 400]
)
def test_a_header_that_is_no_duration_is_refused_by_name(value: str) -> None:
    with pytest.raises(UsageError, match="X-Server-Timeout is ") as refused:
        asked_deadline([(TIMEOUT, value.encode())])
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "value", [True, "1500", 0, 10**30, -5, float("nan"), [], {}, 1e300, 86_400_001]
)
def test_a_field_that_is_no_duration_is_refused_by_name(value: Any) -> None:
    with pytest.raises(
        UsageError, match="deadline_ms is .* milliseconds above 0 and up to 86400000"
    ):
        asked_deadline([], value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2s", 2), ("500ms", 0.5), ("1.5", 1.5), ("1m", 60), (" 2 s ", 2)]
)
def test_durations_of_the_command_line(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "2h", "0s", "-2s", "two", "2ss", "3000m"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="deadline is "):
        parse_duration(text)


def test_retry_headers_are_whole_seconds_and_milliseconds() -> None:
    assert retry_headers(2.3) == {"Retry-After": "3", "retry-after-ms": "2300"}
    assert retry_headers(0.0) == {"Retry-After": "1", "retry-after-ms": "1"}
    assert retry_headers(None) == {"x-should-retry": "false"}


def test_the_clock_runs_from_the_head_to_the_last_byte() -> None:
    now = 10.0
    reported: list[Timing] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal now
        timing: Timing = scope["state"]["timing"]
        assert timing.head_read == 10.0
        now += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        assert timing.written is None
        now += 1
        timing.ended = now
        await send({"type": "http.response.body", "body": b"b"})

    async def send(message: Message) -> None:
        nonlocal now
        now += 0.25  # the socket takes its time

    async def receive() -> Message:
        raise AssertionError

    watch = Stopwatch(app, reported.append, lambda: now)
    anyio.run(watch, {"type": "http"}, receive, send)
    (timing,) = reported
    assert (timing.status, timing.ended, timing.written) == (200, 12.5, 12.75)
