"""A request's body as a typed struct, and what is wrong with it by the field's name."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

from flashlite.errors import BodyError, UsageError
from flashlite.runtime.sampling import SamplingParams

__all__ = ["Name", "Text", "decode", "sampling"]

Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]
Name = Annotated[str, msgspec.Meta(max_length=256)]

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?")
_PLACE = re.compile(r"(.*) - at `\$\.?(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?")


def decode(body: bytes, kind: type[_Struct]) -> _Struct:
    """The body as a struct.

    Raises:
        BodyError: naming the field that is unknown, missing or of another type.
        UsageError: it is not JSON.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        for pattern, what in ((_UNKNOWN, "is not known here"), (_MISSING, "is missing")):
            if match := pattern.fullmatch(text):
                field = ".".join(part for part in (match[2], match[1]) if part)[:256]
                raise BodyError(field, f"the field `{field}` {what}") from None
        match = _PLACE.fullmatch(text)
        field, why = (match[2], match[1]) if match else ("", text)
        raise BodyError(field, f"the field `{field}`: {why}" if field else why) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None


def sampling(stop: object, bias: dict[str, float] | None, **given: Any) -> SamplingParams:
    """The checked settings; what is None keeps its default, temperature 1.

    Args:
        stop: a string, several, or None.
        bias: of `logit_bias`, by token id.
        given: other fields of `SamplingParams`.

    Raises:
        BodyError: a value is outside its range.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)  # type: ignore[arg-type]
    try:
        biases = {int(token): value for token, value in (bias or {}).items()}
    except ValueError:
        raise BodyError("logit_bias", "logit_bias has a key that is not a token id") from None
    settings = {"temperature": 1.0} | {k: v for k, v in given.items() if v is not None}
    params = SamplingParams(stop=stops, logit_bias=biases, **settings)
    try:
        params.check()
    except UsageError as error:
        field = str(error).split(maxsplit=1)[0]
        raise BodyError(field if field in settings else "stop", str(error)) from None
    return params
