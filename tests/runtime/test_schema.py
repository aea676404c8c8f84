"""Schemas: what is accepted is exactly what they allow, and the rest is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import accepts, accepts_text

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import UnsupportedSchema
from flashlite.runtime.grammar import Grammar, GrammarSpec, compile_grammar
from flashlite.runtime.model import load
from flashlite.runtime.process import resident_bytes
from flashlite.runtime.schema import simplify


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf: Path) -> Tokenizer:
    with load(tiny_gguf, isa="plain", max_sequence_length=64) as model:
        return model.tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    with load("smollm2-135m-instruct", max_sequence_length=64) as model:
        return model.tokenizer


def grammar_of(schema: Any, tokenizer: Tokenizer) -> Grammar | None:
    try:
        return compile_grammar(GrammarSpec.json_schema(schema), tokenizer)
    except UnsupportedSchema:
        return None


# Published sets


def test_every_instance_of_the_schema_bench_is_told_right(
    flashlite_data: Path, smollm2: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    schemas = accepted = instances = 0
    wrong = []
    for path in sorted((flashlite_data / "jsonschemabench").glob("*.json")):
        document = json.loads(path.read_bytes())
        schemas += 1
        grammar = grammar_of(document["schema"], smollm2)
        if grammar is None:
            continue
        accepted += 1
        for test in document["tests"]:
            instances += 1
            if accepts(grammar, smollm2, document["schema"], test["data"]) != test["valid"]:
                wrong.append((path.name, test["valid"]))
    with capsys.disabled():
        print(
            f"\nschemas accepted: {accepted} of {schemas} ({accepted / schemas:.1%}); "
            f"instances told right: {instances - len(wrong)} of {instances}"
        )
    assert not wrong
    assert accepted >= 0.9 * schemas


def _suite(folder: Path) -> Iterator[tuple[str, Any, Any, bool]]:
    for path in sorted(folder.glob("*/*.json")):
        for group in json.loads(path.read_bytes()):
            for test in group["tests"]:
                what = f"{path.parent.name}/{path.name}: {test['description']}"
                yield what, group["schema"], test["data"], test["valid"]


def test_nothing_that_the_official_suite_calls_invalid_is_accepted(
    flashlite_data: Path, smollm2: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = flashlite_data / "json_schema_test_suite"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    judged = refused = 0
    narrow = []
    for what, schema, value, valid in _suite(folder):
        grammar = grammar_of(schema, smollm2)
        refused += grammar is None
        if grammar is None:
            continue
        judged += 1
        accepted = accepts(grammar, smollm2, schema, value)
        assert valid or not accepted, what
        if valid and not accepted:
            narrow.append(what)
    with capsys.disabled():
        print(f"\nsuite: {judged} tests judged, {refused} of schemas refused, {len(narrow)} narrow")
    # Numbers have one spelling (1, not 1.0), standard formats bind, and without `$schema` the words
    # beside a reference count.
    known = ("float", "1.0", "0.0", "format.json", "annotation", "maxItems ignored", "vocabulary")
    assert [what for what in narrow if not any(word in what for word in known)] == []


# Against another implementation

names = st.sampled_from(["a", "b", "c"])
values = st.sampled_from([None, True, False, 0, 3, -2, 1.5, "", "a", "ab", "x"])
leaves = st.one_of(
    st.builds(lambda t: {"type": t}, st.sampled_from(["null", "boolean", "number", "string"])),
    st.builds(lambda v: {"const": v}, values),
    st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=3, unique_by=repr)),
    st.builds(lambda n: {"type": "number", "minimum": n}, st.integers(-2, 3)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 2)),
    st.builds(lambda n: {"minLength": n}, st.integers(0, 2)),
    st.booleans(),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    members = st.dictionaries(names, inner, max_size=2)
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": members},
        optional={
            "required": st.lists(names, max_size=2, unique=True),
            "additionalProperties": st.booleans(),
        },
    )


def _combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        _objects(inner),
        st.builds(lambda s: {"not": s}, inner),
        st.builds(lambda s: {"anyOf": s}, some),
        st.builds(lambda s: {"allOf": s}, some),
        st.builds(lambda s: {"oneOf": s}, some),
        st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
        st.builds(lambda n, m: {"type": "object", "dependentRequired": {n: [m]}}, names, names),
        st.builds(lambda s: {"prefixItems": s, "type": "array", "items": False}, some),
    )


schemas = st.recursive(leaves, _combined, max_leaves=6)
documents = st.recursive(
    values,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), inner, max_size=3),
        st.lists(inner, max_size=3),
    ),
    max_leaves=5,
)


@settings(max_examples=600, deadline=None)
@given(schemas, st.lists(documents, min_size=1, max_size=8))
def test_random_schemas_accept_what_another_validator_accepts(
    tokenizer: Tokenizer, schema: Any, found: list[Any]
) -> None:
    grammar = grammar_of(schema, tokenizer)
    if grammar is None:
        return
    validator = jsonschema.Draft202012Validator(schema)
    for value in found:
        expected = validator.is_valid(value)
        assert accepts(grammar, tokenizer, schema, value) == expected, (schema, value)


# By hand


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"not": {"type": "string"}}, ["1", "null", "[]"], ['"a"']),
        ({"not": {"required": ["a"]}, "type": "object"}, ["{}", '{"b": 1}'], ['{"a": 1}']),
        ({"not": {"enum": ["ab", "a", ""]}, "type": "string"}, ['"abc"', '"b"'], ['"ab"', '"a"']),
        ({"not": {"const": "[^"}, "type": "string"}, ['"["', '"^"'], ['"[^"']),
        ({"not": {"enum": [1, 5]}, "type": "integer"}, ["0", "3", "6"], ["1", "5"]),
        ({"not": {"minimum": 2}, "type": "number"}, ["1.5"], ["2", "3"]),
        (
            {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
            ['{"a": 1}'],
            ['{"a": 1, "b": 1}', "{}"],
        ),
        ({"dependencies": {"a": ["b"]}, "type": "object"}, ['{"b": 1}', "{}"], ['{"a": 1}']),
        (
            {
                "if": {"properties": {"k": {"const": "x"}}, "required": ["k"]},
                "then": {"required": ["y"]},
                "properties": {"k": {"type": "string"}},
                "type": "object",
            },
            ['{"k": "z"}', '{"k": "x", "y": 1}'],
            ['{"k": "x"}'],
        ),
        ({"format": "html-selector", "type": "string"}, ['"h1"'], ["1"]),
        ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, ["4"], ["3"]),
        ({"items": [{"type": "integer"}], "additionalItems": False}, ["[1]"], ["[1, 2]"]),
        (
            {
                "$defs": {
                    "n": {
                        "anyOf": [
                            {"type": "null"},
                            {"type": "array", "items": {"$ref": "#/$defs/n"}},
                        ]
                    }
                },
                "$ref": "#/$defs/n",
            },
            ["[[null], null]"],
            ["[1]"],
        ),
        (
            {"definitions": {"a/b%": {"type": "null"}}, "$ref": "#/definitions/a~1b%25"},
            ["null"],
            ["1"],
        ),
        (
            {
                "$id": "http://x/y.json",
                "$defs": {"s": {"type": "string"}},
                "$ref": "http://x/y.json#/$defs/s",
            },
            ['"a"'],
            ["1"],
        ),
        ({"minProperties": 1, "type": "object"}, ['{"a": 1}'], ["{}"]),
        (
            {"properties": {"a": {"type": "integer"}}, "type": "object"},
            ['{"b": "x"}'],
            ['{"\\u0061": "x"}', '{"a": "x"}'],
        ),
    ],
)
def test_rewritten_keywords(
    schema: Any, good: list[str], bad: list[str], tokenizer: Tokenizer
) -> None:
    grammar = compile_grammar(GrammarSpec.json_schema(schema), tokenizer)
    assert [t for t in good if not accepts_text(grammar, tokenizer, t)] == []
    assert [t for t in bad if accepts_text(grammar, tokenizer, t)] == []


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "null"}}, "contains"),
        ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"not": {"pattern": "a"}}, "pattern"),
        ({"not": {"type": "integer"}}, "integer"),
        ({"not": {"const": [1]}}, "constant list"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
        ({"properties": {"a": {"contains": {}}}}, "contains` at #/properties/a"),
        ({"$ref": "https://example.com/x.json"}, "outside this schema"),
        ({"$ref": "#/$defs/none"}, "not there"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text satisfies"),
        ({"$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "itself"),
        ({"$defs": {"x": {"$id": "http://o/", "$ref": "#/a"}}, "$ref": "#/$defs/x"}, "$id"),
        ({"minProperties": 2}, "minProperties"),
        ({"const": "a\x01"}, "U+0001"),
        ({"enum": [{"\x7f": 1}]}, "U+007F"),
        ({"const": "\ud800"}, "U+D800"),
        ({"pattern": r"^a\x01b$"}, "`\\x`"),
        ({"pattern": "(?=a)b", "type": "string"}, "look"),
        ({"type": "string", "format": "idn-email"}, "format"),
        ({"multipleOf": 1000003, "type": "integer"}, "multipleOf"),
        ({"multipleOf": 0}, "multipleOf"),
        ({"minLength": -1, "type": "string"}, "minLength"),
        ({"maxItems": 1.5}, "maxItems"),
        ({"type": "any"}, "any"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft 3"),
        ({"properties": []}, "list"),
        ({"anyOf": {}}, "dict"),
        ({"items": 3}, "int"),
        (False, "no value"),
        ({"anyOf": []}, "anyOf"),
        ("text", "str"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    schema: Any, named: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        compile_grammar(GrammarSpec.json_schema(schema), tokenizer)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


HOSTILE: dict[str, Any] = {
    "deep": _deep(900),
    "long": {"description": "x" * (1 << 20)},
    "many names": {"properties": {f"p{i}": {"type": "string"} for i in range(30_000)}},
    "many constants": {"enum": [f"x{i}" for i in range(40_000)]},
    "pattern of patterns": {"type": "string", "pattern": "((a{100}){100}){100}"},
    "pattern that doubles": {"type": "string", "pattern": "(a|b)*a(a|b){400}"},
    "unions of unions": {
        "allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(30)]
    },
    "conditions of conditions": {
        "not": {"anyOf": [{"allOf": [{"required": ["a", "b", "c"]}] * 20}] * 20}
    },
    "oneOf of many": {"oneOf": [{"required": [f"a{i}"]} for i in range(200)]},
    "huge counts": {"type": "array", "minItems": 10**12, "items": {"minLength": 10**12}},
    "huge numbers": {"type": "integer", "minimum": -(10**400), "maximum": 10**400},
    "fine steps": {"type": "number", "multipleOf": 1e-300},
    "references to references": {
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
        | {"d40": {}},
        "$ref": "#/$defs/d0",
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_cost_little(name: str, tokenizer: Tokenizer) -> None:
    before, begun = resident_bytes(), time.process_time()
    grammar_of(HOSTILE[name], tokenizer)
    assert time.process_time() - begun < 2
    assert resident_bytes() - before < 100e6


def test_a_simplified_schema_is_left_as_it_is() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert simplify(schema) == schema
    assert simplify({**schema, "title": "T", "examples": [1]}) == schema
