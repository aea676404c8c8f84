"""What went wrong, before any protocol says it in its own way.

FlashliteError ── problem_of ──> Problem ── a protocol's `refusal` ──> wire
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashlite.errors import (
    BodyError,
    ContextOverflow,
    EngineError,
    FlashliteError,
    MemoryCeiling,
    Overloaded,
    TemplateError,
    TokenizerError,
    UnknownModel,
    UsageError,
)
from flashlite.server.timing import retry_headers

__all__ = ["Kind", "Problem", "problem_of"]

Kind = Literal[
    "invalid",  # the request cannot be honoured as it is
    "context",  # FL-405
    "host",  # a Host header that is not ours
    "key",  # no key, or an unknown one
    "forbidden",
    "path",  # nothing is served there
    "method",
    "model",  # not served here
    "slow",  # a body that does not come
    "size",  # too large a body
    "head",  # too large a head
    "rate",  # too many requests
    "overloaded",  # another time, or never so fast
    "internal",
]

_STATUS: dict[Kind, int] = {
    "invalid": 400,
    "context": 400,
    "host": 400,
    "key": 401,
    "forbidden": 403,
    "path": 404,
    "method": 405,
    "model": 404,
    "slow": 408,
    "size": 413,
    "head": 431,
    "rate": 429,
    "overloaded": 503,
    "internal": 500,
}
_SOON = 1.0  # seconds after which memory may be free again


@dataclass(frozen=True)
class Problem:
    """Why a request is not answered."""

    kind: Kind
    message: str
    param: str | None = None  # the field at fault, by its path in the body
    code: str | None = None  # FL-405, ...
    retry_after: float | None = None  # seconds; of rate and overloaded, None: a retry is useless

    @property
    def status(self) -> int:
        """Of HTTP."""
        return _STATUS[self.kind]

    @property
    def headers(self) -> dict[str, str]:
        """That tell SDKs whether, and when, to try again."""
        return retry_headers(self.retry_after) if self.kind in ("rate", "overloaded") else {}


def problem_of(error: FlashliteError) -> Problem:
    """What to tell a client about an error."""
    message, code = str(error), error.code
    if isinstance(error, ContextOverflow):
        return Problem("context", message, code=code)
    if isinstance(error, UnknownModel):
        return Problem("model", message, param="model", code=code)
    if isinstance(error, Overloaded):
        return Problem("overloaded", message, code=code, retry_after=error.retry_after)
    if isinstance(error, MemoryCeiling):
        return Problem("overloaded", message, code=code, retry_after=_SOON)
    if isinstance(error, BodyError):
        return Problem("invalid", message, param=error.param, code=code)
    if isinstance(error, (UsageError, TemplateError, TokenizerError)):
        return Problem("invalid", message, code=code)
    kind: Kind = "internal" if isinstance(error, EngineError) else "invalid"
    return Problem(kind, message, code=code)
