"""Errors as the asking protocol writes them: OpenAI's, Gemini's or Ollama's shape.

    scope ── error_shape ──┐
                           ├─> refuse ──> response with the status and retry headers
    Problem ───────────────┘

What answers before a route is found (limits, keys, a missing path) cannot know the protocol but
from the request: by the path, or by the header that Google's clients send.
"""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from flashlite.server.language import translate
from flashlite.server.openai import refusal as openai
from flashlite.server.problems import Problem

__all__ = ["Shape", "body", "error_shape", "gemini_body", "ollama_body", "refuse"]

Shape = Literal["openai", "gemini", "ollama"]

_GEMINI_PATH = re.compile(
    r"/v1beta/(?!openai(/|$))|(/v1)?/(cachedContents|interactions|tunedModels)(/|$)|.*:[a-zA-Z]+$"
)
_GEMINI_HEADERS = frozenset({b"x-goog-api-key", b"x-goog-api-client"})
_GEMINI_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def error_shape(scope: Scope) -> Shape:
    """Whose errors a request expects; the first answer for a request holds."""
    state = scope.setdefault("state", {})
    if "error_shape" not in state:
        state["error_shape"] = _shape(scope)
    shape: Shape = state["error_shape"]
    return shape


def _shape(scope: Scope) -> Shape:
    path: str = scope["path"]
    if path.startswith("/api/"):
        return "ollama"
    if path.startswith("/v1beta/openai/"):
        return "openai"
    if _GEMINI_PATH.match(path) or any(name in _GEMINI_HEADERS for name, _ in scope["headers"]):
        return "gemini"
    query = scope.get("query_string", b"").decode("latin-1")
    return "gemini" if any(name == "key" for name, _ in parse_qsl(query)) else "openai"


def body(problem: Problem, shape: Shape) -> dict[str, Any]:
    """The error object of a protocol, in the request's language."""
    if shape == "gemini":
        return gemini_body(problem)
    return ollama_body(problem) if shape == "ollama" else openai.body(problem)


def gemini_body(problem: Problem) -> dict[str, Any]:
    """Google's: code, message, status, and when to try again."""
    error: dict[str, Any] = {
        "code": problem.status,
        "message": translate(problem.message),
        "status": _GEMINI_STATUS.get(problem.status, "INVALID_ARGUMENT"),
    }
    details: list[dict[str, Any]] = []
    if problem.code is not None:
        details.append(
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": problem.code,
                "domain": "flashlite",
            }
        )
    if problem.retry_after is not None:
        delay = f"{max(problem.retry_after, 0.001):.3f}s"
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
    return {"error": error | ({"details": details} if details else {})}


def ollama_body(problem: Problem) -> dict[str, Any]:
    """Ollama's: a text."""
    return {"error": translate(problem.message)}


def refuse(scope: Scope, problem: Problem) -> Response:
    """The response that says what went wrong, in the shape and the language of the request."""
    content = msgspec.json.encode(body(problem, error_shape(scope)))
    return Response(content, problem.status, problem.headers, "application/json")
