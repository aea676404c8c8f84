"""A request's deadline as HTTP says it, and the clock from its head to its last byte.

A deadline is how long the whole answer may take. It can be said three ways, and by the server
(`--deadline 2s`); the shortest holds:

    X-Server-Timeout: 2                   seconds; google-genai sends it with its own timeout
    X-Flashlite-Deadline-Ms: 1500         milliseconds
    {"deadline_ms": 1500, ...}            the same, in the body
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashlite.errors import UsageError

__all__ = [
    "DEADLINE_FIELD",
    "DEADLINE_HEADER",
    "TIMEOUT_HEADER",
    "Stopwatch",
    "Timing",
    "asked_deadline",
    "parse_duration",
    "retry_headers",
]

TIMEOUT_HEADER = "X-Server-Timeout"
DEADLINE_HEADER = "X-Flashlite-Deadline-Ms"
DEADLINE_FIELD = "deadline_ms"

_LONGEST = 86_400.0  # seconds
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,20})?")
_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0}


def asked_deadline(
    headers: Iterable[tuple[bytes, bytes]], field: object = None, server: float | None = None
) -> float | None:
    """Seconds that the answer may take, from all that was said; None: nobody said anything.

    Args:
        headers: of the request, as ASGI gives them.
        field: the body's `deadline_ms`, None where it has none.
        server: the server's own deadline in seconds.

    Raises:
        UsageError: one of them is no number, not above 0, or longer than a day.
    """
    found = [] if server is None else [server]
    units = {TIMEOUT_HEADER: 1.0, DEADLINE_HEADER: 1e-3}
    names = {name.lower().encode(): name for name in units}
    for raw, value in headers:
        if (name := names.get(raw.lower())) is not None:
            found.append(_seconds(name, value.decode("latin-1").strip(), units[name]))
    if field is not None:
        number = math.nan
        if isinstance(field, (int, float)) and not isinstance(field, bool) and abs(field) < 1e18:
            number = float(field)
        found.append(_checked(DEADLINE_FIELD, field, number, 1e-3))
    return min(found, default=None)


def parse_duration(text: str) -> float:
    """Seconds of "2s", "500ms", "1.5" or "1m", as `--deadline` takes it.

    Raises:
        UsageError: it is none of these, not above 0, or longer than a day.
    """
    match = re.fullmatch(r"(.*?)\s*(ms|s|m|)", text.strip())
    number, unit = match.groups() if match else (text, "")
    return _seconds("deadline", number, _UNITS[unit])


def retry_headers(retry_after: float | None) -> dict[str, str]:
    """Headers of a 503, as SDKs read them; None: another try would be no better."""
    if retry_after is None:
        return {"x-should-retry": "false"}
    seconds = min(max(retry_after, 0.0), _LONGEST)
    return {
        "Retry-After": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1e3))),
    }


def _seconds(name: str, text: str, unit: float) -> float:
    return _checked(name, text, float(text) if _NUMBER.fullmatch(text) else math.nan, unit)


def _checked(name: str, given: object, number: float, unit: float) -> float:
    if not 0 < number * unit <= _LONGEST:
        shown = repr(given) if len(repr(given)) <= 40 else f"{repr(given)[:37]}..."
        what = "milliseconds" if unit < 1 else "seconds"
        most = round(_LONGEST / (1e-3 if unit < 1 else 1))
        raise UsageError(f"{name} is {shown}: give a number of {what} above 0 and up to {most}")
    return number * unit


@dataclass
class Timing:
    """When what happened to a request, in seconds of one clock; `request.state.timing`."""

    head_read: float
    deadline: float | None = None  # when its last byte must be written; whoever parses it sets it
    ended: float | None = None  # when the last token was there; whoever answers sets it
    status: int = 0
    written: float | None = None  # when the last byte was handed to the socket


class Stopwatch:
    """The outermost middleware: a `Timing` for each request, reported once it is written."""

    def __init__(
        self,
        app: ASGIApp,
        report: Callable[[Timing], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`report` gets every timing whose answer was written whole."""
        self._app = app
        self._report = report
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, timed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        timing = Timing(self._clock())
        scope.setdefault("state", {})["timing"] = timing

        async def timed(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                timing.status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                timing.written = self._clock()
                if self._report is not None:
                    self._report(timing)

        await self._app(scope, receive, timed)
