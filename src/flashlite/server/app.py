"""The application: routes, body limit, Host check, and how it is run."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashlite.errors import UsageError
from flashlite.server import openai, texts
from flashlite.server.config import LOOPBACK, ServerConfig
from flashlite.server.openai.refusal import refusal
from flashlite.server.problems import Problem
from flashlite.server.registry import Registry
from flashlite.server.state import State
from flashlite.server.timing import Stopwatch, Timing

__all__ = ["Guard", "RequestId", "create_app", "memory_of", "serve"]

_BODY_GROWTH = 6  # the body, what it decodes to (4 bytes a character at worst), a chat of it
_CONNECTION = 48 << 10  # bytes of one connection: transport, parser, task
_GRACE = 5  # seconds that unfinished answers have at shutdown


def memory_of(config: ServerConfig) -> int:
    """Bytes that the server takes beside its models."""
    return config.body_bytes * _BODY_GROWTH + config.max_connections * _CONNECTION


def create_app(
    registry: Registry,
    config: ServerConfig | None = None,
    *,
    report: Callable[[Timing], None] | None = None,
) -> Starlette:
    """The ASGI application of open models; it closes them at shutdown.

    Args:
        registry: what answers.
        config: None: the defaults.
        report: gets to know when each answer was written.
    """
    config = config or ServerConfig()

    def written(timing: Timing) -> None:
        state: State = app.state.flashlite
        if timing.ended is not None and timing.written is not None:
            for worker in state.workers.values():
                worker.note_written(timing.written - timing.ended)
        if report is not None:
            report(timing)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.flashlite = State(registry, config)
        yield
        app.state.flashlite.close()

    app = Starlette(
        routes=[
            *openai.routes(),
            *texts.routes(),
            Route("/health", _health),
            Route("/v1/health", _health),
        ],
        middleware=[
            Middleware(Stopwatch, written),
            Middleware(RequestId),
            Middleware(Guard, config),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
        lifespan=lifespan,
    )
    return app


async def _health(request: Request) -> Response:
    """GET /health: what runs and what it holds."""
    state: State = request.app.state.flashlite
    running, waiting = state.load
    names = state.registry.names
    return JSONResponse(
        {
            "status": "ok",
            "model": names[0],
            "models": names,
            "running": running,
            "waiting": waiting,
            "memory": state.registry.memory,
        }
    )


async def _refuse(request: Request, error: Exception) -> Response:
    """A path or a method that is not served."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    path = request.url.path[:200]
    if status == 405:
        refused = refusal(Problem("method", f"{request.method} is not served at {path}"))
        refused.headers.update(getattr(error, "headers", None) or {})
        return refused
    return refusal(Problem("path", f"nothing is served at {path}"))


async def _fail(request: Request, error: Exception) -> Response:
    """A fault of ours; its trace goes to the log, not to the client."""
    return refusal(Problem("internal", "the server failed; its log says why"))


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


@dataclass
class _Held:
    bytes: int = 0


class Guard:
    """Refuses a foreign Host (DNS rebinding), a body above `max_body`, whatever its headers
    say, and more than that of all bodies together: requests that are being answered keep theirs.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._most = config.body_bytes
        self._hosts = LOOPBACK | {"[::1]", config.host, *config.allowed_hosts}
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host not in self._hosts:
            message = f"host {host[:100]!r} is not served here; allow it with --allowed-host"
            refused = refusal(Problem("host", message))
            await refused(scope, receive, send)
            return
        held = _Held()
        try:
            body = await self._read_body(receive, held)
            if isinstance(body, Response):
                await body(scope, receive, send)
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

    async def _read_body(self, receive: Receive, held: _Held) -> bytes | Response:
        """The whole body, counted in `held` as it comes, or the answer that refuses it."""
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            part = message.get("body", b"")
            parts.append(part)
            held.bytes += len(part)
            self._held += len(part)
            if held.bytes > self._most:
                return refusal(Problem("size", f"the body is larger than {self._most} bytes"))
            if self._held > self._most:
                full = f"the requests being answered hold {self._most} bytes; ask again later"
                return refusal(Problem("overloaded", full, retry_after=1))
            if not message.get("more_body"):
                return b"".join(parts)


def serve(registry: Registry, config: ServerConfig) -> None:
    """Serve until interrupted; unfinished answers get a few seconds to end.

    Raises:
        UsageError: the port is taken or outside its range.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(registry, config),
            host=config.host,
            port=config.port,
            log_level="warning",
            timeout_keep_alive=15,
            timeout_graceful_shutdown=_GRACE,
            limit_concurrency=config.max_connections,
            server_header=False,
        )
    )
    try:
        server.run()
    except SystemExit:
        raise UsageError(
            f"port {config.port} on {config.host} cannot be used; choose another --port"
        ) from None
