"""What stands before every route, outermost first.

    clock, request id, language, metrics ─> address ─> Host ─> CORS ─> requests/s ─> key
        ─> tokens/min, requests at a time ─> body ─> routes

An address is limited before its key is looked at: guessing keys is limited too.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from flashlite.server.config import ServerConfig
from flashlite.server.hardening import BodyLimit, HostCheck, RequestId, SafeHeaders
from flashlite.server.keys import KeyCheck, Keys
from flashlite.server.limits import AddressLimit, Budget, ClientAddress
from flashlite.server.metrics import Metrics, Observe
from flashlite.server.timing import Stopwatch, Timing

__all__ = ["front"]

_RETRY_HEADERS = ("x-request-id", "retry-after", "retry-after-ms", "x-should-retry")


def front(
    config: ServerConfig,
    keys: Keys | None,
    metrics: Metrics,
    written: Callable[[Timing], None],
) -> list[Middleware]:
    """The middlewares of an application.

    Args:
        config: the limits.
        keys: that requests must show; None: anyone may ask.
        metrics: count what was answered.
        written: gets to know when each answer was written.
    """
    shared = []
    if config.cors_origins:
        shared = [
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_origins,
                allow_methods=("GET", "POST", "PATCH", "DELETE"),
                allow_headers=("*",),
                expose_headers=_RETRY_HEADERS,
            )
        ]
    return [
        Middleware(Stopwatch, written),
        Middleware(RequestId),
        Middleware(SafeHeaders),
        Middleware(Observe, metrics),
        Middleware(ClientAddress, config.trusted_proxies),
        Middleware(HostCheck, config),
        *shared,
        Middleware(AddressLimit, config.rate_limit),
        Middleware(KeyCheck, keys, open_health=config.open_health),
        Middleware(Budget, config),
        Middleware(BodyLimit, config),
    ]
