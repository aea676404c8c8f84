"""A Gemini body in one spelling, before it is checked.

Google's clients mix `top_k` and `topK` at every depth, write whole numbers as `3.0`, and send null
for what is not set. What belongs to the user (arguments, schemas) stays as it is.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from flashlite.errors import BodyError, UsageError
from flashlite.server.bodies import decode

__all__ = ["camel", "read", "whole"]

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_SNAKE = re.compile(r"(?<=[a-z0-9])_([a-z0-9])")
_EXACT = 1 << 53  # floats below are whole numbers without loss
_OPAQUE = frozenset(
    {
        "args",
        "labels",
        "parameters",
        "parametersJsonSchema",
        "response",
        "responseJsonSchema",
        "responseSchema",
    }
)


def read(body: bytes, kind: type[_Struct]) -> _Struct:
    """The checked body; an empty one is an object without fields.

    Raises:
        BodyError: naming the field that is unknown, missing, given twice or of another type.
        UsageError: it is not JSON.
    """
    try:
        found = msgspec.json.decode(body or b"{}")
        return decode(msgspec.json.encode(_plain(found, "")), kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None


def camel(name: str) -> str:
    """`top_k` as `topK`."""
    return _SNAKE.sub(lambda match: match[1].upper(), name)


def whole(value: Any) -> Any:
    """A float without a fraction as an integer; anything else as it is."""
    if isinstance(value, float) and abs(value) < _EXACT and value.is_integer():
        return int(value)
    return value


def _plain(value: Any, at: str) -> Any:
    if isinstance(value, list):
        return [_plain(item, f"{at}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return whole(value)
    made: dict[str, Any] = {}
    for key, item in value.items():
        name = camel(key)
        place = f"{at}.{name}" if at else name
        if name in made:
            raise BodyError(place[:256], f"the field `{place[:256]}` is given in two spellings")
        if item is not None:
            made[name] = item if name in _OPAQUE else _plain(item, place)
    return made
