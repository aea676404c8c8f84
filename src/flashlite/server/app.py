"""The application: routes, body limit, Host check, and how it is run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashlite.errors import UsageError
from flashlite.runtime.model import Model
from flashlite.server import openai
from flashlite.server.timing import Stopwatch, Timing
from flashlite.server.worker import Worker

__all__ = ["MEMORY", "Guard", "create_app", "health", "serve"]

_MAX_BODY = 1 << 20  # bytes of one request; of all requests that are being answered as well
_BODY_GROWTH = 6  # the body, what it decodes to (4 bytes a character at worst), a chat of it
_CONNECTIONS = 128  # more are answered with 503
_CONNECTION = 48 << 10  # bytes of one connection: transport, parser, task

MEMORY = _MAX_BODY * _BODY_GROWTH + _CONNECTIONS * _CONNECTION
"""Bytes that the server takes beside the model: `reserved` of `flashlite.load`."""
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})


def create_app(
    model: Model,
    *,
    deadline: float | None = None,
    report: Callable[[Timing], None] | None = None,
) -> Starlette:
    """The ASGI application of one model; it closes the model at shutdown.

    Args:
        model: what answers.
        deadline: seconds that an answer may take at most; None: as long as its client says.
        report: gets to know when each answer was written.
    """

    def written(timing: Timing) -> None:
        if timing.ended is not None and timing.written is not None:
            app.state.worker.note_written(timing.written - timing.ended)
        if report is not None:
            report(timing)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.worker = Worker(model)
        app.state.started = int(time.time())
        app.state.deadline = deadline
        yield
        app.state.worker.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
            Route("/v1/models", openai.models),
            Route("/health", health),
        ],
        middleware=[Middleware(Stopwatch, written), Middleware(Guard)],
        lifespan=lifespan,
    )
    return app


async def health(request: Request) -> Response:
    """GET /health: what runs and what it holds."""
    worker: Worker = request.app.state.worker
    running, waiting = worker.dispatch.load
    return JSONResponse(
        {
            "status": "ok",
            "model": worker.model.name,
            "running": running,
            "waiting": waiting,
            "memory": worker.model.memory,
        }
    )


@dataclass
class _Held:
    bytes: int = 0


class Guard:
    """Refuses a foreign Host (DNS rebinding), a body above 1 MiB, whatever its headers say, and
    more than that of all bodies together: requests that are being answered keep theirs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host not in _LOOPBACK:
            refused = openai.error_response(400, f"host {host!r} is not served here", "bad_host")
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
            if held.bytes > _MAX_BODY:
                return openai.error_response(
                    413, f"the body is larger than {_MAX_BODY} bytes", "invalid_request_error"
                )
            if self._held > _MAX_BODY:
                full = f"the requests being answered hold {_MAX_BODY} bytes; ask again later"
                refused = openai.error_response(503, full, "server_error", code="overloaded")
                refused.headers["Retry-After"] = "1"
                return refused
            if not message.get("more_body"):
                return b"".join(parts)


def serve(model: Model, *, port: int, deadline: float | None = None) -> None:
    """Serve on 127.0.0.1 until interrupted; `deadline` as in `create_app`.

    Raises:
        UsageError: the port is taken or outside its range.
    """
    config = uvicorn.Config(
        create_app(model, deadline=deadline),
        host="127.0.0.1",
        port=port,
        log_level="warning",
        timeout_keep_alive=15,
        limit_concurrency=_CONNECTIONS,
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit:
        raise UsageError(
            f"port {port} on 127.0.0.1 cannot be used; choose another --port"
        ) from None
