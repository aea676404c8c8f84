"""The application: routes, body limit, Host check, and how it is run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

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
from flashlite.server.worker import Worker

__all__ = ["Guard", "create_app", "health", "serve"]

_MAX_BODY = 1 << 20  # bytes
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})


def create_app(model: Model) -> Starlette:
    """The ASGI application of one model; it closes the model at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.worker = Worker(model)
        app.state.started = int(time.time())
        yield
        app.state.worker.close()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
            Route("/v1/models", openai.models),
            Route("/health", health),
        ],
        middleware=[Middleware(Guard)],
        lifespan=lifespan,
    )


async def health(request: Request) -> Response:
    """GET /health: what runs and what it holds."""
    worker: Worker = request.app.state.worker
    running, waiting = worker.model.scheduler.load
    return JSONResponse(
        {
            "status": "ok",
            "model": worker.model.name,
            "running": running,
            "waiting": waiting,
            "memory": worker.model.scheduler.engine.memory,
        }
    )


class Guard:
    """Refuses a foreign Host (DNS rebinding) and a body above 1 MiB, whatever its headers say."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
        body = await _read_body(receive)
        if body is None:
            refused = openai.error_response(
                413, f"the body is larger than {_MAX_BODY} bytes", "invalid_request_error"
            )
            await refused(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None above the limit."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def serve(model: Model, *, port: int) -> None:
    """Serve on 127.0.0.1 until interrupted.

    Raises:
        UsageError: the port is taken or outside its range.
    """
    config = uvicorn.Config(
        create_app(model), host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=15
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit:
        raise UsageError(
            f"port {port} on 127.0.0.1 cannot be used; choose another --port"
        ) from None
