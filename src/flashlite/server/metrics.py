"""GET /metrics: what the server did and holds, for Prometheus.

Labels are routes, methods, statuses, models and kinds: nothing that a client wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashlite.runtime.process import resident_bytes
from flashlite.server.exchange import Usage
from flashlite.server.state import State

__all__ = ["Metrics", "Observe"]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300)
_REJECTED = {
    400: "invalid",
    401: "key",
    403: "forbidden",
    404: "path",
    405: "method",
    408: "slow",
    413: "size",
    429: "rate",
    431: "head",
    503: "overloaded",
}


class Metrics:
    """The counters of one application, and what it holds at the moment of asking."""

    def __init__(self, state: Callable[[], State]) -> None:
        """`state` is asked at each scrape."""
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "flashlite_requests",
            "Requests answered",
            ["route", "method", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "flashlite_request_seconds",
            "From the head to the last byte",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "flashlite_first_byte_seconds",
            "From the head to the answer's first byte",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "flashlite_rejections",
            "Requests that were refused, by why",
            ["kind"],
            registry=registry,
        )
        self.prompt = Counter("flashlite_prompt_tokens", "Tokens read", registry=registry)
        self.cached = Counter(
            "flashlite_cached_tokens", "Of the tokens read: found stored", registry=registry
        )
        self.generated = Counter("flashlite_generated_tokens", "Tokens written", registry=registry)
        self.abandoned = Counter(
            "flashlite_abandoned", "Answers whose client left before the end", registry=registry
        )
        registry.register(_Holdings(state))

    async def endpoint(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class _Holdings(Collector):
    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        return []  # nothing is asked before the server has started

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        running, waiting = state.load
        yield GaugeMetricFamily("flashlite_running", "Requests being answered", running)
        yield GaugeMetricFamily("flashlite_waiting", "Requests in the queue", waiting)
        resident = resident_bytes()
        yield GaugeMetricFamily("flashlite_resident_bytes", "Memory of the process", resident)
        pages = GaugeMetricFamily(
            "flashlite_kv_pages", "Pages of the KV cache", labels=["model", "state"]
        )
        for name, model in state.registry.models.items():
            pool = model.scheduler.engine.pool
            pages.add_metric([name, "free"], pool.free)
            pages.add_metric([name, "used"], pool.n_pages - pool.free)
        yield pages


class Observe:
    """Counts every request, whoever answered it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, observed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, first, whole = 0, 0.0, False

        async def observed(message: Message) -> None:
            nonlocal status, first, whole
            if message["type"] == "http.response.start":
                status, first = message["status"], time.perf_counter()
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, observed)
        finally:
            self._note(scope, status, began, first, whole)

    def _note(self, scope: Scope, status: int, began: float, first: float, whole: bool) -> None:
        metrics = self._metrics
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        metrics.requests.labels(route, method, str(status or 499)).inc()
        if not whole:
            metrics.abandoned.inc()
        else:
            metrics.seconds.labels(route).observe(time.perf_counter() - began)
            metrics.first.labels(route).observe(first - began)
        if status in _REJECTED:
            metrics.rejected.labels(_REJECTED[status]).inc()
        usage = scope.get("state", {}).get("usage")
        if isinstance(usage, Usage):
            metrics.prompt.inc(usage.prompt_tokens)
            metrics.cached.inc(usage.cached_tokens)
            metrics.generated.inc(usage.completion_tokens)
