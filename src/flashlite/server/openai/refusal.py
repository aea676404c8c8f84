"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from flashlite.server.language import translate
from flashlite.server.problems import Kind, Problem

__all__ = ["body", "refusal"]

_CODES: dict[Kind, str] = {
    "context": "context_length_exceeded",
    "key": "invalid_api_key",
    "model": "model_not_found",
    "overloaded": "overloaded",
    "rate": "rate_limit_exceeded",
}
_TYPES: dict[Kind, str] = {
    "host": "bad_host",
    "key": "authentication_error",
    "rate": "rate_limit_error",
    "overloaded": "server_error",
    "internal": "server_error",
}


def body(problem: Problem) -> dict[str, Any]:
    """The error object."""
    return {
        "error": {
            "message": translate(problem.message),
            "type": _TYPES.get(problem.kind, "invalid_request_error"),
            "param": problem.param,
            "code": _CODES.get(problem.kind, problem.code),
        }
    }


def refusal(problem: Problem) -> Response:
    """The response."""
    return Response(
        msgspec.json.encode(body(problem)),
        problem.status,
        problem.headers,
        "application/json",
    )
