"""Schemas for what other schemas refuse.

A complement is exact or it is none: `not` and its kin are built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from flashlite.errors import UnsupportedSchema

__all__ = ["Schema", "complement", "union"]

Schema = dict[str, Any] | bool

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_MOST_LETTERS = 2000  # of the constants that a text must differ from
_MOST_DEPTH = 64

# keyword: (type, the keyword that says the opposite, how far away its value is)
_BOUNDS = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
}


def union(schemas: Iterable[Schema]) -> Schema:
    """What any of the schemas accepts."""
    found = [schema for schema in schemas if schema is not False]
    if any(schema is True for schema in found):
        return True
    if len(found) == 1:
        return found[0]
    return {"anyOf": found} if found else False


def complement(
    schema: Schema, resolve: Callable[[str, str], Schema], at: str, depth: int = 0
) -> Schema:
    """The schema of all JSON values that a simplified schema refuses.

    Args:
        schema: as `simplify` writes it.
        resolve: the simplified target of a reference; called with the place too.
        at: the place, for the error.

    Raises:
        UnsupportedSchema: it cannot be written.
    """
    if isinstance(schema, bool):
        return not schema
    if depth > _MOST_DEPTH:
        raise UnsupportedSchema("the complement of a schema that contains itself", at)

    def other(part: Schema) -> Schema:
        return complement(part, resolve, at, depth + 1)

    parts: list[Schema] = []
    for key, value in schema.items():
        if key == "type":
            parts.append(_other_types(value, at))
        elif key in ("enum", "const"):
            parts += _other_values(value if key == "enum" else [value], at)
        elif key in _BOUNDS:
            type_, opposite, away = _BOUNDS[key]
            if not (away < 0 and value <= 0):  # a length is never below 0
                parts.append({"type": type_, opposite: value + away})
        elif key == "maxProperties" and value == 0:
            parts.append({"type": "object", "minProperties": 1})
        elif key == "required":
            parts += [{"type": "object", "properties": {name: False}} for name in value]
        elif key == "properties":
            for name, part in value.items():
                if (without := other(part)) is not False:
                    only = {"required": [name], "properties": {name: without}}
                    parts.append({"type": "object", **only})
        elif key == "prefixItems":
            for i, part in enumerate(value):
                if (without := other(part)) is not False:
                    items = {"minItems": i + 1, "prefixItems": [*[True] * i, without]}
                    parts.append({"type": "array", **items})
        elif key == "items" and value is False:
            parts.append({"type": "array", "minItems": len(schema.get("prefixItems", ())) + 1})
        elif key == "allOf":
            parts += [other(part) for part in value]
        elif key == "anyOf":
            parts.append({"allOf": [other(part) for part in value]})
        elif key == "$ref":
            parts.append(other(resolve(value, at)))
        elif key in ("items", "additionalProperties") and value is True:
            continue
        else:
            raise UnsupportedSchema(f"the complement of `{key}`", at)
    return union(parts)


def _other_types(value: object, at: str) -> Schema:
    named = {value} if isinstance(value, str) else set(value) if isinstance(value, list) else set()
    if not named or named - {*_TYPES, "integer"}:
        raise UnsupportedSchema(f"the type {value!r:.60}", at)
    if "integer" in named and "number" not in named:
        raise UnsupportedSchema("the complement of `integer`", at)
    others = [name for name in _TYPES if name not in named]
    return {"type": others} if others else False


def _other_values(values: list[Any], at: str) -> list[Schema]:
    if any(isinstance(value, (list, dict)) for value in values):
        raise UnsupportedSchema("the complement of a constant list or object", at)
    texts = [value for value in values if isinstance(value, str)]
    truths = [value for value in values if isinstance(value, bool)]
    numbers = sorted({v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
    named = {
        "string": texts,
        "boolean": truths,
        "number": numbers,
        "null": [value for value in values if value is None],
    }
    parts: list[Schema] = [{"type": [name for name in _TYPES if not named.get(name)]}]
    if texts:
        parts.append({"type": "string", "pattern": f"^{_other_texts(set(texts), at)}$"})
    if truths:
        parts += [{"const": value} for value in (True, False) if value not in truths]
    if numbers:
        parts.append({"type": "number", "exclusiveMaximum": numbers[0]})
        for low, high in pairwise(numbers):
            parts.append({"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high})
        parts.append({"type": "number", "exclusiveMinimum": numbers[-1]})
    return parts


def _other_texts(texts: set[str], at: str) -> str:
    """A pattern of every text but these: it goes along their tree and leaves it somewhere."""
    if sum(map(len, texts)) > _MOST_LETTERS:
        raise UnsupportedSchema(f"the complement of more than {_MOST_LETTERS} letters", at)
    firsts = sorted({text[0] for text in texts if text})
    ways = [] if "" in texts else [""]
    if firsts:
        ways.append(f"[^{''.join(map(_letter, firsts))}][\\s\\S]*")
    else:
        ways.append("[\\s\\S]+")
    for first in firsts:
        rest = {text[1:] for text in texts if text[:1] == first}
        ways.append(_letter(first) + _other_texts(rest, at))
    return f"(?:{'|'.join(ways)})"


def _letter(letter: str) -> str:
    return f"\\{letter}" if letter in r".+*?()|[]{}^$#&-~/\\" else letter
