"""The JSON Schema of `sensitive_layers.json`, made from the dataclasses it is read into.

`analysis.schema.json` beside this file is what `json_schema` returns; a test compares the two.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from flashlite.analyze.analysis import VERSION, Analysis

__all__ = ["json_schema"]

_PLAIN: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    str: {"type": "string", "minLength": 1, "maxLength": 4096},
    int: {"type": "integer"},
    float: {"type": "number"},
}


def json_schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    schema = _object(Analysis)
    schema["properties"] = {"version": {"const": VERSION}, **schema["properties"]}
    schema["required"] = ["version", *schema["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sensitive_layers.json",
        "description": "What flashlite analyze found; losses in nats per token.",
        **schema,
    }


def _object(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {
        "type": "object",
        "properties": {field.name: _value(hints[field.name]) for field in fields(cls)},
        "required": [field.name for field in fields(cls) if field.default is MISSING],
        "additionalProperties": False,
    }


def _value(kind: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = _value(next(a for a in arguments if a is not type(None)))
        return {"anyOf": [inner, {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _value(arguments[0])}
    if origin in (Mapping, dict):
        return {"type": "object", "additionalProperties": _value(arguments[1])}
    return _object(kind) if is_dataclass(kind) else dict(_PLAIN[kind])
