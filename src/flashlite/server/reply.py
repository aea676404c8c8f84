"""Sends an answer in a protocol's wire format, whole or as a stream, and stops when nobody reads.

    events ──> Wire.whole ──> one body          Wire.stream ──> piece after piece

What fails before the first token is a refusal with its own status, in both forms.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from flashlite.errors import FlashliteError
from flashlite.server.exchange import Ended, Event, Started, TextDelta, Usage
from flashlite.server.problems import Problem, problem_of

__all__ = ["Wire", "send"]


class Wire(Protocol):
    """How a protocol writes one answer."""

    media_type: str  # of a stream

    def stream(self, event: Event) -> bytes:
        """What an event adds to a stream; may be nothing."""

    def failure(self, problem: Problem) -> bytes:
        """The end of a stream that fails on its way."""

    def whole(self, events: Sequence[Event]) -> bytes:
        """The body of an answer in one piece: JSON."""

    def refusal(self, problem: Problem) -> Response:
        """The answer that there is none."""


async def send(
    request: Request, events: AsyncIterator[Event], wire: Wire, *, stream: bool
) -> Response:
    """The response; a client that leaves stops the answer within one step."""
    events = _metered(request, events)
    reading = asyncio.create_task(_read(events, 1 if stream else None))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=499)
    finally:  # whatever is not done is not wanted
        leaving.cancel()
        reading.cancel()
    try:
        found = reading.result()
    except FlashliteError as error:
        return wire.refusal(problem_of(error))
    if stream:
        return StreamingResponse(_stream(found, events, wire), media_type=wire.media_type)
    return Response(wire.whole(found), media_type="application/json")


async def _metered(request: Request, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events; `request.state.usage` is what was computed so far, also when nobody reads on."""
    try:
        async for event in events:
            if isinstance(event, (Started, Ended)):
                request.state.usage = event.usage
            elif isinstance(event, TextDelta) and event.drawn:
                spent: Usage = request.state.usage
                tokens = spent.completion_tokens + len(event.drawn)
                request.state.usage = dataclasses.replace(spent, completion_tokens=tokens)
            yield event
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def _read(events: AsyncIterator[Event], most: int | None) -> list[Event]:
    found: list[Event] = []
    async for event in events:
        found.append(event)
        if len(found) == most:
            break
    return found


async def _left(request: Request) -> None:
    """Returns when the client has gone; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    begun: Sequence[Event], events: AsyncIterator[Event], wire: Wire
) -> AsyncIterator[bytes]:
    try:
        for event in begun:
            yield wire.stream(event)
        async for event in events:
            if written := wire.stream(event):
                yield written
    except FlashliteError as error:
        yield wire.failure(problem_of(error))
    finally:
        await events.aclose()  # type: ignore[attr-defined]
