"""GET /models and /models/{name}, in bodies that OpenAI's and Gemini's clients both read.

Both protocols have these under the same paths, so one answer must do for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashlite.errors import BodyError, FlashliteError, UnknownModel
from flashlite.server.errors import refuse
from flashlite.server.problems import problem_of
from flashlite.server.state import State

__all__ = ["paged", "routes"]

_MOST = 1000  # entries of a page


def routes() -> list[Route]:
    """Of OpenAI's version, Gemini's two, and none."""
    return [
        route
        for prefix in ("/v1", "/v1beta", "")
        for route in (
            Route(f"{prefix}/models", _list_models),
            Route(f"{prefix}/models/{{name:path}}", _get_model),
        )
    ]


async def _list_models(request: Request) -> Response:
    """All models, or a page of them (`pageSize`, `pageToken`)."""
    state: State = request.app.state.flashlite
    entries = [_entry(state, name) for name in state.registry.names]
    try:
        page, more = paged(request, entries)
    except FlashliteError as error:
        return refuse(request.scope, problem_of(error))
    return JSONResponse({"object": "list", "data": page, "models": page, **more})


async def _get_model(request: Request) -> Response:
    """One model."""
    state: State = request.app.state.flashlite
    name = request.path_params["name"]
    if name not in state.registry.names:
        return refuse(request.scope, problem_of(UnknownModel(name, state.registry.names)))
    return JSONResponse(_entry(state, name))


def paged(
    request: Request, entries: Sequence[dict[str, Any]]
) -> tuple[Sequence[dict[str, Any]], dict[str, str]]:
    """The page that `pageSize` and `pageToken` ask for, and `nextPageToken` where more follows.

    Raises:
        BodyError: one of them is no number, or too large.
    """
    start = _number(request, "pageToken", 0, len(entries))
    end = start + (_number(request, "pageSize", _MOST, 1 << 31) or _MOST)
    return entries[start:end], {"nextPageToken": str(end)} if end < len(entries) else {}


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) <= most):
        raise BodyError(name, f"{name} is {text[:40]!r}, allowed 0 to {most}")
    return int(text)


def _entry(state: State, name: str) -> dict[str, Any]:
    model = state.registry.models.get(name)
    if model is not None:
        context = model.max_sequence_length
        methods = ["generateContent", "streamGenerateContent", "countTokens", "createCachedContent"]
    else:
        encoder = state.registry.embedder(name)
        context, methods = encoder.max_length, ["embedContent", "batchEmbedContents"]
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "flashlite",
        "context_length": context,
        "name": f"models/{name}",
        "version": "1",
        "displayName": name,
        "inputTokenLimit": context,
        "outputTokenLimit": context,
        "supportedGenerationMethods": methods,
        "thinking": False,
    }
