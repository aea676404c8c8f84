"""What a request must be before anything reads it: for this host, whole in time, not too large."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashlite.server.config import LOOPBACK, ServerConfig
from flashlite.server.errors import refuse
from flashlite.server.language import asked_language, language
from flashlite.server.problems import Problem

__all__ = ["BodyLimit", "HostCheck", "RequestId", "SafeHeaders"]

_BODY_RATE = 50_000  # bytes per second that a body must come with, once body_timeout has passed
_PATIENCE = 3  # times body_timeout: no body takes longer
_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[^\[\]:/?#@\s]{1,253})(?::[0-9]{1,5})?")
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class RequestId:
    """Gives every response an `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = f"req_{uuid.uuid4().hex}".encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        await self._app(scope, receive, named)


class SafeHeaders:
    """The language of the request, and headers that keep browsers from misusing an answer.

    A route that sets one of them, as the page at `/` does, keeps its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ())]
                there = {name.lower() for name, _ in headers}
                message["headers"] = headers + [pair for pair in _SAFE if pair[0] not in there]
            await send(message)

        asked = dict(scope["headers"]).get(b"accept-language", b"").decode("latin-1")
        token = language.set(asked_language(asked))
        try:
            await self._app(scope, receive, safe)
        finally:
            language.reset(token)


class HostCheck:
    """Refuses a foreign Host (DNS rebinding), what a foreign page sends, and an oversized head.

    A page of another origin may send a POST without asking first; it could not read the answer,
    but it would cost one. An address as Host cannot be rebound: it is accepted where the server
    listens beyond loopback.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._hosts = LOOPBACK | {config.host, *config.allowed_hosts}
        self._addresses = config.host not in LOOPBACK
        self._origins = frozenset(config.cors_origins)
        self._head = config.head_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "http" and (problem := self._problem(scope)) is not None:
            await refuse(scope, problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> Problem | None:
        # h11 limits a head while it waits for its end; one that comes at once it does not
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._head:
            return Problem("head", f"the head is larger than {self._head} bytes")
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            message = "the request gives its length twice: Content-Length and Transfer-Encoding"
            return Problem("invalid", message)
        host = headers.get(b"host", b"").decode("latin-1")
        match = _HOST.fullmatch(host)
        if match is None or not self._is_ours(match[1].strip("[]").lower()):
            message = f"host {host[:100]!r} is not served here; allow it with --allowed-host"
            return Problem("host", message)
        origin = headers.get(b"origin", b"").decode("latin-1")
        if (
            origin
            and scope["method"] not in ("GET", "HEAD", "OPTIONS")
            and origin not in self._origins
            and "*" not in self._origins
            and _netloc(origin) != host.lower()
        ):
            message = f"pages of {origin[:100]} may not ask here; allow them with --cors-origin"
            return Problem("forbidden", message)
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self._hosts:
            return True
        if not self._addresses:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


@dataclass
class _Held:
    bytes: int = 0


class BodyLimit:
    """Reads a body whole, if it comes in time and is not above `max_body`, whatever its headers
    say, nor more than that with all bodies together: requests that are being answered keep theirs.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._most = config.body_bytes
        self._seconds = config.body_timeout_s
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _Held()
        try:
            body = await self._read(receive, held)
            if isinstance(body, Problem):
                await _refusal(scope, body)(scope, receive, send)
                return
            if body is None:  # the client has gone
                return
            replayed = False

            async def replay() -> Message:
                nonlocal replayed
                if replayed:
                    return await receive()
                replayed = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self._app(scope, replay, send)
        finally:
            self._held -= held.bytes

    async def _read(self, receive: Receive, held: _Held) -> bytes | Problem | None:
        """The whole body, counted in `held` as it comes; or why not; None: nobody is there."""
        parts: list[bytes] = []
        began = time.monotonic()
        while True:
            allowed = self._seconds + held.bytes / _BODY_RATE
            left = began + min(allowed, _PATIENCE * self._seconds) - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except asyncio.TimeoutError:
                spent = time.monotonic() - began
                slow = f"the body came too slowly: {held.bytes} bytes in {spent:.0f} s"
                return Problem("slow", slow)
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            parts.append(part)
            held.bytes += len(part)
            self._held += len(part)
            if held.bytes > self._most:
                return Problem("size", f"the body is larger than {self._most} bytes")
            if self._held > self._most:
                full = f"the requests being answered hold {self._most} bytes; ask again later"
                return Problem("overloaded", full, retry_after=1)
            if not message.get("more_body"):
                return b"".join(parts)


def _refusal(scope: Scope, problem: Problem) -> Response:
    """A body that stays unread would keep the connection."""
    refused = refuse(scope, problem)
    if problem.kind == "slow":
        refused.headers["Connection"] = "close"
    return refused
