"""Gemini's `Schema`, an OpenAPI dialect, as JSON Schema.

    {"type": "STRING", "nullable": true}  ──>  {"type": ["string", "null"]}

An object has the properties that it declares and no others, as Gemini answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from flashlite.errors import BodyError
from flashlite.server.gemini.plain import camel, whole

__all__ = ["closed", "json_schema"]

_TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_COUNTS = frozenset(
    {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
)
_KEPT = frozenset({"title", "description", "default", "pattern", "minimum", "maximum", "required"})
_IGNORED = frozenset({"example", "propertyOrdering", "nullable"})  # the last two are used below
_WIDTHS = frozenset({"float", "double", "int32", "int64", "enum"})  # formats that say no more
_DEPTH = 64
# Where schemas are combined, a property that one does not declare may be another's.
_COMBINING = re.compile(rb'"(allOf|oneOf|not|if|dependentSchemas|unevaluatedProperties)":')


def json_schema(given: object, at: str, depth: int = 0) -> dict[str, Any]:
    """The JSON Schema of a `Schema`.

    Args:
        given: in either spelling.
        at: its path in the body, for errors.
        depth: how many schemas are around it.

    Raises:
        BodyError: naming the part that is not known, or of another type.
    """
    if not isinstance(given, Mapping):
        raise BodyError(at, f"the field `{at}` is not a schema")
    if depth > _DEPTH:
        raise BodyError(at[:256], f"the schema is deeper than {_DEPTH} levels")
    made: dict[str, Any] = {}
    fields = {camel(key): value for key, value in given.items() if value is not None}
    for key, value in fields.items():
        place = f"{at}.{key}"[:256]
        if key == "type":
            made |= _type(value, place)
        elif key == "format":
            if value not in _WIDTHS:
                made["format"] = value
        elif key == "items":
            made["items"] = json_schema(value, place, depth + 1)
        elif key in ("properties", "$defs", "defs"):
            if not isinstance(value, Mapping):
                raise BodyError(place, f"the field `{place}` is not an object")
            name = "$defs" if key == "defs" else key
            made[name] = {k: json_schema(v, f"{place}.{k}", depth + 1) for k, v in value.items()}
        elif key in ("anyOf", "prefixItems"):
            if not isinstance(value, list):
                raise BodyError(place, f"the field `{place}` is not a list")
            made[key] = [json_schema(v, f"{place}[{i}]", depth + 1) for i, v in enumerate(value)]
        elif key == "additionalProperties":
            made[key] = value if isinstance(value, bool) else json_schema(value, place, depth + 1)
        elif key == "enum":
            if not isinstance(value, list):
                raise BodyError(place, f"the field `{place}` is not a list")
            made["enum"] = value
        elif key in ("$ref", "ref"):
            made["$ref"] = value
        elif key in _COUNTS:
            made[key] = _count(value, place)
        elif key in _KEPT:
            made[key] = whole(value)
        elif key not in _IGNORED:
            raise BodyError(place, f"the field `{place}` is not known here")
    if "properties" in made:
        made["properties"] = _ordered(made["properties"], fields.get("propertyOrdering"), at)
        made.setdefault("additionalProperties", False)
    return _nullable(made) if fields.get("nullable") is True else made


def closed(schema: Any) -> Any:
    """A JSON Schema whose objects have the properties that it declares and no others.

    What is valid against it is valid against the given one as well; a small model that may add
    properties does not stop adding them.
    """
    return schema if _COMBINING.search(msgspec.json.encode(schema)) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(within := schema.get(key), Mapping):
            made[key] = {name: _closed(value) for name, value in within.items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            made[key] = _closed(schema[key])
    for key in ("anyOf", "prefixItems"):
        if "properties" not in schema and isinstance(several := schema.get(key), list):
            made[key] = [_closed(value) for value in several]
    if "properties" in schema and not schema.keys() & {"anyOf", "$ref", "patternProperties"}:
        made.setdefault("additionalProperties", False)
    return made


def _type(value: object, at: str) -> dict[str, Any]:
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    if names == ["type_unspecified"]:
        return {}
    if wrong := [name for name in names if name not in _TYPES]:
        raise BodyError(
            at, f"the field `{at}` is {wrong[0][:40]!r}, use {', '.join(sorted(_TYPES))}"
        )
    return {"type": names if isinstance(value, list) else names[0]}


def _count(value: object, at: str) -> object:
    """A whole number; Google's JSON writes those of 64 bits as strings."""
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit() and len(value) < 19):
            raise BodyError(at, f"the field `{at}` is {value[:40]!r}, not a whole number")
        return int(value)
    return whole(value)


def _ordered(properties: dict[str, Any], order: object, at: str) -> dict[str, Any]:
    """Answers have their keys in this order."""
    if order is None:
        return properties
    at = f"{at}.propertyOrdering"
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise BodyError(at, f"the field `{at}` is not a list of names")
    first = {name: properties[name] for name in order if name in properties}
    return first | properties


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, or null."""
    kind = schema.get("type")
    if kind is None or "enum" in schema or "anyOf" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema | {"type": [*(kind if isinstance(kind, list) else [kind]), "null"]}
