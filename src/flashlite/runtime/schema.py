"""JSON Schema in the words that llguidance enforces exactly; the rest is refused by name.

Annotations are dropped, references become `#/$defs/N`, and `not`, `if`, `dependencies` and their
kin become unions of what each of them leaves (`runtime/complement.py`). Nothing is approximated.
Keywords are those of JSON Schema 2020-12, and of drafts 4 to 7 where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from flashlite.errors import UnsupportedSchema
from flashlite.runtime.complement import Schema, complement, union

__all__ = ["simplify"]

_MOST_PARTS = 20_000
_MOST_DEPTH = 64
_MOST_MULTIPLE = 10_000  # a hundred times as much takes 6 s and 300 MB

_PLAIN = frozenset(  # taken over as they are
    {
        *("type", "enum", "const", "pattern", "minLength", "maxLength", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems"),
        *("maxProperties", "required"),
    }
)
_ONE = frozenset({"items", "additionalProperties"})  # a schema each
_MANY = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})  # a list of schemas
_NAMED = frozenset({"properties", "patternProperties"})
_HARMLESS: Mapping[str, tuple[object, ...]] = {  # refused unless they say nothing
    "contains": (),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
    "$dynamicRef": (),
    "$recursiveRef": (),
    "extends": (),
    "disallow": (),
    "divisibleBy": (),
    "x-guidance": (),
}
# Formats that a standard defines: they constrain, and llguidance enforces or refuses them. Any
# other name is for people.
_FORMATS = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "idn-email", "hostname", "regex"),
        *("idn-hostname", "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid"),
        *("uri-template", "json-pointer", "relative-json-pointer"),
    }
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Replies hold no `\\u` escapes (`runtime/grammar.py`): llguidance drops what would need one.
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_MAY_BE_UNWRITABLE = re.compile(r"\\(?:[xucavXUC]|0)")
_OLD = ("draft-04", "draft-06", "draft-07")  # keywords beside `$ref` mean nothing


def simplify(schema: object, *, expand_one_of: bool = False) -> Schema:
    """Rewrite a schema; the result accepts the same values.

    Args:
        expand_one_of: write each `oneOf` as "this one and none of the others", where the
            complements of its branches are known.

    Raises:
        UnsupportedSchema: naming the keyword, and where it stands.
    """
    return _Simplifier(schema, expand_one_of).run()


class _Simplifier:
    def __init__(self, root: object, expand_one_of: bool) -> None:
        self._root = root
        self._expand = expand_one_of
        top = root if isinstance(root, dict) else {}
        self._id = str(top.get("$id", top.get("id", ""))).rstrip("#")
        draft = str(top.get("$schema", ""))
        if "draft-03" in draft:
            raise UnsupportedSchema("JSON Schema draft 3", "#")
        self._old = any(name in draft for name in _OLD)
        self._defs: dict[str, Schema | None] = {}  # by pointer; None: being written
        self._parts = 0

    def run(self) -> Schema:
        made = self._walk(self._root, "#", 0)
        if made is False:
            raise UnsupportedSchema("a schema that no value satisfies", "#")
        if isinstance(made, dict) and self._defs:
            made["$defs"] = {_name(at): target for at, target in self._defs.items()}
        _check_letters(made)
        return made

    def _walk(self, schema: object, at: str, depth: int) -> Schema:
        self._parts += 1
        if self._parts > _MOST_PARTS or depth > _MOST_DEPTH:
            raise UnsupportedSchema(f"more than {_MOST_PARTS} parts or {_MOST_DEPTH} levels", at)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise UnsupportedSchema(f"a {type(schema).__name__} in the place of a schema", at)
        made: dict[str, Any] = {}
        if "$ref" in schema:
            made["$ref"] = self._refer(schema["$ref"], at, depth)
            if self._old:
                return made
        extra: list[Schema] = []
        for key, value in schema.items():
            here = f"{at}/{key}"
            if key in _PLAIN:
                made[key] = value
                if key == "pattern":
                    _check_pattern(value, at)
            elif key == "items" and isinstance(value, list):  # before draft 2020-12
                made["prefixItems"] = self._list(value, here, depth)
                made["items"] = self._walk(schema.get("additionalItems", True), here, depth + 1)
            elif key in _ONE:
                made[key] = self._walk(value, here, depth + 1)
            elif key == "oneOf" and self._expand:
                extra.append(self._exactly_one(self._list(value, here, depth), here))
            elif key in _MANY:
                made[key] = self._list(value, here, depth)
            elif key in _NAMED:
                for name in value if key == "patternProperties" else ():
                    _check_pattern(name, at)
                made[key] = self._named(value, here, depth)
            elif key == "format" and value in _FORMATS:
                made[key] = value
            elif key == "minProperties":
                self._check_count(value, schema, here)
                made[key] = value
            elif key == "not":
                extra.append(self._complement(self._walk(value, here, depth + 1), here))
            elif key == "if":
                extra.append(self._condition(schema, at, depth))
            elif key in ("dependencies", "dependentRequired", "dependentSchemas"):
                extra += self._dependencies(value, here, depth)
            elif key in _HARMLESS and value not in _HARMLESS[key]:
                raise UnsupportedSchema(f"`{key}`", at)
        _repair(made, at)
        if extra:
            made["allOf"] = [*made.get("allOf", []), *extra]
        return made

    def _list(self, value: object, at: str, depth: int) -> list[Schema]:
        if not isinstance(value, list):
            raise UnsupportedSchema(f"a {type(value).__name__} in the place of a list", at)
        return [self._walk(item, f"{at}/{i}", depth + 1) for i, item in enumerate(value)]

    def _named(self, value: object, at: str, depth: int) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise UnsupportedSchema(f"a {type(value).__name__} in the place of an object", at)
        return {name: self._walk(item, f"{at}/{name}", depth + 1) for name, item in value.items()}

    def _complement(self, schema: Schema, at: str) -> Schema:
        return complement(schema, self._resolve, at)

    def _exactly_one(self, branches: list[Schema], at: str) -> Schema:
        try:
            others = [self._complement(branch, at) for branch in branches]
        except UnsupportedSchema:
            return {"oneOf": branches}  # llguidance may see by itself that they are disjoint
        return union(
            {"allOf": [branch, *(other for j, other in enumerate(others) if j != i)]}
            for i, branch in enumerate(branches)
        )

    def _condition(self, schema: dict[str, Any], at: str, depth: int) -> Schema:
        asked = self._walk(schema["if"], f"{at}/if", depth + 1)
        then = self._walk(schema.get("then", True), f"{at}/then", depth + 1)
        other = self._walk(schema.get("else", True), f"{at}/else", depth + 1)
        if then is True and other is True:
            return True
        without = self._complement(asked, f"{at}/if")
        return union([{"allOf": [asked, then]}, {"allOf": [without, other]}])

    def _dependencies(self, value: object, at: str, depth: int) -> list[Schema]:
        if not isinstance(value, dict):
            raise UnsupportedSchema(f"a {type(value).__name__} in the place of an object", at)
        found: list[Schema] = []
        for name, needed in value.items():
            then: Schema
            if isinstance(needed, list):
                then = {"required": needed}
            else:
                then = self._walk(needed, f"{at}/{name}", depth + 1)
            found.append({"anyOf": [{"properties": {name: False}}, then]})
        return found

    def _check_count(self, least: object, schema: dict[str, Any], at: str) -> None:
        """A text may name a member twice, so that more members are written than there are."""
        required = schema.get("required", ())
        distinct = schema.get("additionalProperties") is False and not schema.get(
            "patternProperties"
        )
        if least in (0, 1) or distinct:
            return
        if isinstance(least, int) and isinstance(required, list) and len(set(required)) >= least:
            return
        raise UnsupportedSchema(f"`minProperties` {least} of members without names", at)

    # References

    def _refer(self, reference: object, at: str, depth: int) -> str:
        if not isinstance(reference, str):
            raise UnsupportedSchema("a `$ref` that is no text", at)
        if self._id and reference.startswith(self._id):
            reference = reference[len(self._id) :] or "#"
        if reference != "#" and not reference.startswith("#/"):
            raise UnsupportedSchema(f"`$ref` to {reference[:80]!r}, outside this schema", at)
        self._find(at, at)  # refuses what lies in a part with an address of its own
        if reference not in self._defs:
            target = self._find(reference, at)
            self._defs[reference] = None
            self._defs[reference] = self._walk(target, reference, depth + 1)
        return f"#/$defs/{_name(reference)}"

    def _find(self, pointer: str, at: str) -> object:
        node = self._root
        for step in pointer.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            else:
                raise UnsupportedSchema(f"`$ref` to {pointer[:80]!r}, which is not there", at)
            if isinstance(node, dict) and _has_address(node):
                raise UnsupportedSchema("`$ref` beside or into a part with its own `$id`", at)
        return node

    def _resolve(self, reference: str, at: str) -> Schema:
        for pointer, target in self._defs.items():
            if reference == f"#/$defs/{_name(pointer)}":
                if target is None:
                    break
                return target
        raise UnsupportedSchema("the complement of a schema that contains itself", at)


def _name(pointer: str) -> str:
    """Of a definition: its pointer, without what pointers would have to escape."""
    return "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in pointer)


def _has_address(node: dict[str, Any]) -> bool:
    return any(
        isinstance(node.get(key), str) and not node[key].startswith("#") for key in ("$id", "id")
    )


def _check_pattern(pattern: object, at: str) -> None:
    if not isinstance(pattern, str):
        raise UnsupportedSchema("a `pattern` that is no text", at)
    if found := _MAY_BE_UNWRITABLE.search(pattern):
        raise UnsupportedSchema(f"`{found[0]}` in a `pattern`", at)


def _check_letters(node: object) -> None:
    """Refuse constants and names with characters that a reply cannot hold."""
    texts: list[object] = [node] if isinstance(node, str) else []
    parts: list[object] = []
    if isinstance(node, dict):
        texts, parts = list(node), list(node.values())
    elif isinstance(node, list):
        parts = node
    for text in texts:
        if isinstance(text, str) and (found := _UNWRITABLE.search(text)):
            raise UnsupportedSchema(f"the character U+{ord(found[0]):04X} in a constant or name")
    for part in parts:
        _check_letters(part)


def _repair(made: dict[str, Any], at: str) -> None:
    """Whole counts, bounds as of draft 6, and steps that compile in bounded time."""
    for key in _COUNTS:
        if key in made:
            count = made[key]
            if isinstance(count, bool) or not isinstance(count, (int, float)) or count % 1:
                raise UnsupportedSchema(f"`{key}` {count!r:.40}", at)
            made[key] = int(count)
    for limit, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(made.get(strict), bool) and made.pop(strict) and limit in made:
            made[strict] = made.pop(limit)
    if "multipleOf" in made:
        step = made["multipleOf"]
        if isinstance(step, bool) or not isinstance(step, (int, float)) or step <= 0:
            raise UnsupportedSchema(f"`multipleOf` {step!r:.40}", at)
        digits = repr(step).removesuffix(".0").replace(".", "")
        if "e" in digits or int(digits) > _MOST_MULTIPLE:
            raise UnsupportedSchema(f"`multipleOf` {step!r:.40}, of too many digits", at)
