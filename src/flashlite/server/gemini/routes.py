"""The paths of Gemini's protocol.

    POST /v1beta/models/{name}:generateContent ── last colon ──> name, verb

A name may have colons and slashes of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashlite.errors import FlashliteError
from flashlite.server.errors import refuse
from flashlite.server.gemini.cached import cache_routes
from flashlite.server.gemini.embed import batch_embed_contents, embed_content
from flashlite.server.gemini.encode import refusal
from flashlite.server.gemini.generate import count_tokens, generate_content, stream_generate_content
from flashlite.server.problems import Problem, problem_of

__all__ = ["routes"]

_Verb: TypeAlias = Callable[[Request, str], Awaitable[Response]]

_VERBS: dict[str, _Verb] = {
    "generateContent": generate_content,
    "streamGenerateContent": stream_generate_content,
    "countTokens": count_tokens,
    "embedContent": embed_content,
    "batchEmbedContents": batch_embed_contents,
}


def routes() -> list[Route]:
    """Of both versions and of none, as LiteLLM asks."""
    return [
        route
        for prefix in ("/v1beta", "/v1", "")
        for route in (
            Route(f"{prefix}/models/{{target:path}}", _model_verb, methods=["POST"]),
            Route(f"{prefix}/tunedModels", _tuned_models),
            *cache_routes(prefix),
        )
    ]


async def _model_verb(request: Request) -> Response:
    target: str = request.path_params["target"]
    name, _, verb = target.rpartition(":")
    if verb not in _VERBS or not name:
        served = ", ".join(_VERBS)
        message = f"nothing is served at models/{target[:200]}; a model's methods: {served}"
        return refuse(request.scope, Problem("path", message))
    try:
        return await _VERBS[verb](request, name)
    except FlashliteError as error:
        return refusal(problem_of(error))
    except RecursionError:
        return refusal(Problem("invalid", "the body is nested too deeply"))


async def _tuned_models(request: Request) -> Response:
    """There are none."""
    return JSONResponse({})
