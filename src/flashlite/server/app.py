"""The application: its routes behind what `front` checks, and how it is run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashlite.errors import UsageError
from flashlite.server import gemini, models, openai, texts
from flashlite.server.config import ServerConfig
from flashlite.server.connections import watched
from flashlite.server.errors import refuse
from flashlite.server.front import front
from flashlite.server.keys import Keys
from flashlite.server.metrics import Metrics
from flashlite.server.problems import Problem
from flashlite.server.registry import Registry
from flashlite.server.state import State
from flashlite.server.timing import Timing

__all__ = ["create_app", "memory_of", "serve", "uvicorn_config"]

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
    keys: Keys | None = None,
) -> Starlette:
    """The ASGI application of open models; it closes them at shutdown.

    Args:
        registry: what answers.
        config: None: the defaults.
        report: gets to know when each answer was written.
        keys: that requests must show; None: anyone may ask.
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

    metrics = Metrics(lambda: app.state.flashlite)
    app = Starlette(
        routes=[
            *openai.routes(),
            *gemini.routes(),
            *models.routes(),
            *texts.routes(),
            Route("/health", _health),
            Route("/v1/health", _health),
            Route("/metrics", metrics.endpoint),
        ],
        middleware=front(config, keys, metrics, written),
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
        refused = refuse(
            request.scope, Problem("method", f"{request.method[:20]} is not served at {path}")
        )
        refused.headers.update(getattr(error, "headers", None) or {})
        return refused
    return refuse(request.scope, Problem("path", f"nothing is served at {path}"))


async def _fail(request: Request, error: Exception) -> Response:
    """A fault of ours; its trace goes to the log, not to the client."""
    return refuse(request.scope, Problem("internal", "the server failed; its log says why"))


def uvicorn_config(app: Starlette, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn runs the application: slow connections are cut, nothing of a request is logged,
    and nobody but `trusted_proxies` says where a request comes from.
    """
    _, protocol = watched(config)
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(config.keep_alive_s),
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=config.head_bytes,
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
    )


def serve(registry: Registry, config: ServerConfig, keys: Keys | None = None) -> None:
    """Serve until interrupted; unfinished answers get a few seconds to end.

    Raises:
        UsageError: the port is taken or outside its range, or the certificate cannot be used.
    """
    app = create_app(registry, config, keys=keys)
    try:
        settings = uvicorn_config(app, config)
        settings.load()
    except OSError as error:  # of ssl too
        raise UsageError(
            f"certificate {config.tls_cert} with key {config.tls_key} cannot be used: {error}"
        ) from None
    try:
        uvicorn.Server(settings).run()
    except SystemExit:
        raise UsageError(
            f"port {config.port} on {config.host} cannot be used; choose another --port"
        ) from None
