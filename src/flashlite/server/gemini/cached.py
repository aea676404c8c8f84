"""/cachedContents: create, get, list, patch, delete."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashlite.errors import BodyError, FlashliteError
from flashlite.runtime.sampling import SamplingParams
from flashlite.server.answer import answer
from flashlite.server.exchange import Ask, Ended
from flashlite.server.gemini.bodies import CacheRequest
from flashlite.server.gemini.caches import Cached, Caches, expiry
from flashlite.server.gemini.decode import Beginning, beginning
from flashlite.server.gemini.encode import refusal
from flashlite.server.gemini.plain import read
from flashlite.server.models import paged
from flashlite.server.problems import Problem, problem_of
from flashlite.server.state import State
from flashlite.server.timing import Timing, asked_deadline

__all__ = ["cache_routes", "cached_beginning"]

_Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


def cache_routes(prefix: str) -> list[Route]:
    """The paths below a version."""
    one = f"{prefix}/cachedContents/{{id}}"
    return [
        Route(f"{prefix}/cachedContents", _checked(_create), methods=["POST"]),
        Route(f"{prefix}/cachedContents", _checked(_list)),
        Route(one, _checked(_get)),
        Route(one, _checked(_patch), methods=["PATCH"]),
        Route(one, _checked(_delete), methods=["DELETE"]),
    ]


def cached_beginning(request: Request, name: str, model: str) -> Beginning | Response | None:
    """What a request names by `cachedContent`, or the answer that it is not there.

    Raises:
        BodyError: it is of another model.
    """
    if not name:
        return None
    found = _find(request, name)
    if found is None:
        return _not_cached(name)
    if found.model != model:
        raise BodyError("cachedContent", f"{found.name} is of the model {found.model}")
    return found.beginning


def _find(request: Request, name: str) -> Cached | None:
    return _caches(request).find(name, _owner(request))


def _not_cached(name: str) -> Response:
    message = f"{name[:100]} is not kept here: it has expired, was deleted or never was"
    return refusal(Problem("path", message))


def _caches(request: Request) -> Caches:
    """Of this server, from its first request on."""
    state = request.app.state
    if not hasattr(state, "gemini_caches"):
        state.gemini_caches = Caches()
    caches: Caches = state.gemini_caches
    return caches


def _owner(request: Request) -> str:
    """The key's name; a server that asks for none has one owner."""
    return getattr(request.state, "key", "") or ""


def _checked(handler: _Handler) -> _Handler:
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except FlashliteError as error:
            return refusal(problem_of(error))
        except RecursionError:
            return refusal(Problem("invalid", "the body is nested too deeply"))

    return handle


async def _create(request: Request) -> Response:
    """Computes the beginning's pages, with one token, so that requests find them."""
    state: State = request.app.state.flashlite
    timing: Timing = request.state.timing
    caches = _caches(request)
    asked = read(await request.body(), CacheRequest)
    name = asked.model.removeprefix("models/")
    worker = state.worker(name)
    begun = beginning(asked.contents, asked.system_instruction, asked.tools, asked.tool_config)
    if not begun.turns:
        raise BodyError("contents", "nothing to cache: send contents or systemInstruction")
    expiry(asked, caches.now, default=True)  # before the work
    ask = Ask(
        model=name,
        turns=begun.turns,
        tools=begun.tools,
        tool_choice=begun.choice,
        params=SamplingParams(max_tokens=1),
        deadline_s=asked_deadline(request.scope["headers"], None, state.config.deadline_s),
        client=request.client.host if request.client else "",
    )
    tokens = 0
    async with contextlib.aclosing(answer(worker, ask, timing)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Ended):
                tokens = event.usage.prompt_tokens
                request.state.usage = event.usage
    made = caches.add(
        begun,
        owner=_owner(request),
        model=worker.model.name,
        display_name=asked.display_name,
        tokens=tokens,
        expires=expiry(asked, caches.now, default=True),
    )
    return JSONResponse(made.wire)


async def _list(request: Request) -> Response:
    entries = [cached.wire for cached in _caches(request).of(_owner(request))]
    page, more = paged(request, entries)
    return JSONResponse({"cachedContents": page, **more})


async def _get(request: Request) -> Response:
    name = _name(request)
    found = _find(request, name)
    return _not_cached(name) if found is None else JSONResponse(found.wire)


async def _patch(request: Request) -> Response:
    caches, name = _caches(request), _name(request)
    asked = read(await request.body(), CacheRequest)
    if asked.contents or asked.system_instruction or asked.tools or asked.tool_config:
        raise BodyError("contents", "a cached content may change ttl and expireTime alone")
    found = _find(request, name)
    if found is None:
        return _not_cached(name)
    return JSONResponse(caches.extend(found, expiry(asked, caches.now, default=False)).wire)


async def _delete(request: Request) -> Response:
    name = _name(request)
    found = _find(request, name)
    if found is None:
        return _not_cached(name)
    _caches(request).remove(found)
    return JSONResponse({})


def _name(request: Request) -> str:
    return f"cachedContents/{request.path_params['id']}"
