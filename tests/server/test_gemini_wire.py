"""Gemini's bodies to an `Ask`, and events to its responses: no server, no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import BodyError
from flashlite.runtime.model import load
from flashlite.server.exchange import (
    Ask,
    CallArguments,
    CallStarted,
    Ended,
    Event,
    Finished,
    Format,
    Reason,
    Started,
    TextDelta,
    Tool,
    ToolCall,
    Turn,
    Usage,
)
from flashlite.server.gemini.bodies import GenerateRequest
from flashlite.server.gemini.decode import generate_ask
from flashlite.server.gemini.encode import GeminiWire
from flashlite.server.gemini.plain import read
from flashlite.server.gemini.schema import closed, json_schema
from flashlite.server.problems import Problem

ASKED = {"role": "user", "parts": [{"text": "Rain in Oslo?"}]}
DECLARED = {
    "name": "rain",
    "description": "whether it rains",
    "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}},
}
USAGE = Usage(prompt_tokens=5, cached_tokens=3, completion_tokens=2)


def decoded(given: dict[str, Any]) -> Ask:
    return generate_ask(read(json.dumps(given).encode(), GenerateRequest), "m")


# Conversations


def test_a_conversation_becomes_turns() -> None:
    ask = decoded(
        {
            "system_instruction": {"parts": [{"text": "Be "}, {"text": "brief."}]},
            "contents": [
                ASKED,
                {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "Yes."}]},
                {"parts": [{"text": "Sure?"}]},
            ],
        }
    )
    assert ask.turns == (
        Turn("system", "Be brief."),
        Turn("user", "Rain in Oslo?"),
        Turn("assistant", "Yes."),
        Turn("user", "Sure?"),
    )
    assert ask.params.temperature == 1


def test_a_streamed_answer_repeated_in_pieces_is_one_turn() -> None:
    pieces = [{"role": "model", "parts": [{"text": text}]} for text in ("Y", "es", ".", "")]
    ask = decoded({"contents": [ASKED, *pieces, ASKED]})
    assert [turn.text for turn in ask.turns] == ["Rain in Oslo?", "Yes.", "Rain in Oslo?"]


def test_answers_of_functions_find_their_calls_by_name_and_order() -> None:
    calls = [
        {"functionCall": {"id": "a", "name": "rain", "args": {"big_city": "Oslo"}}},
        {"functionCall": {"name": "rain", "args": {}}},
        {"functionCall": {"id": "c", "name": "wind"}},
    ]
    answers = [
        {"functionResponse": {"name": "wind", "response": {"result": "none"}}},
        {"functionResponse": {"name": "rain", "response": {"error": "no"}}},
        {"functionResponse": {"name": "rain", "response": {}}},
    ]
    ask = decoded(
        {
            "contents": [
                ASKED,
                {"role": "model", "parts": calls},
                {"role": "user", "parts": [*answers, {"text": "So?"}]},
            ]
        }
    )
    _, made, *rest = ask.turns
    # What the user names is not respelled.
    assert made.tool_calls[0] == ToolCall("a", "rain", '{"big_city": "Oslo"}')
    unnamed = made.tool_calls[1].id
    assert [turn.tool_call_id for turn in rest] == ["c", "a", unnamed, None]
    assert rest[0] == Turn("tool", '{"result": "none"}', tool_call_id="c", name="wind")
    assert rest[-1] == Turn("user", "So?")


@pytest.mark.parametrize(
    ("calling", "choice"),
    [
        (None, "auto"),
        ({"mode": "AUTO"}, "auto"),
        ({"mode": "VALIDATED"}, "auto"),
        ({"mode": "ANY"}, "required"),
        ({"mode": "ANY", "allowed_function_names": ["rain"]}, ("rain",)),
    ],
)
def test_tools_and_how_they_are_chosen(calling: Any, choice: object) -> None:
    config = {"toolConfig": {"functionCallingConfig": calling}}
    ask = decoded({"contents": [ASKED], "tools": [{"functionDeclarations": [DECLARED]}]} | config)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "additionalProperties": False,
    }
    assert ask.tools == (Tool("rain", "whether it rains", schema),)
    assert ask.tool_choice == choice


def test_mode_none_leaves_no_tools() -> None:
    config = {"toolConfig": {"functionCallingConfig": {"mode": "NONE"}}}
    ask = decoded({"contents": [ASKED], "tools": [{"functionDeclarations": [DECLARED]}]} | config)
    assert ask.tools == ()


def test_a_plain_json_schema_of_a_tool_is_kept() -> None:
    schema = {"type": "object", "properties": {"some_city": {"type": "string"}}}
    declared = {"name": "rain", "parameters_json_schema": schema, "response_json_schema": {}}
    ask = decoded({"contents": [ASKED], "tools": [{"function_declarations": [declared]}]})
    assert ask.tools[0].parameters == schema


def test_a_function_that_is_not_declared_cannot_be_demanded() -> None:
    calling = {"mode": "ANY", "allowedFunctionNames": ["snow"]}
    with pytest.raises(BodyError, match="'snow'"):
        decoded(
            {
                "contents": [ASKED],
                "tools": [{"functionDeclarations": [DECLARED]}],
                "toolConfig": {"functionCallingConfig": calling},
            }
        )


# Schemas


def test_geminis_schema_becomes_json_schema() -> None:
    given = {
        "type": "OBJECT",
        "property_ordering": ["b", "a"],
        "properties": {
            "a": {"type": "INTEGER", "format": "int32", "minimum": 1.0, "nullable": True},
            "b": {"type": "ARRAY", "items": {"type": "STRING"}, "min_items": "1", "maxItems": 2.0},
            "c": {"any_of": [{"type": "NUMBER"}, {"type": "BOOLEAN"}], "nullable": True},
            "d_e": {"type": "STRING", "enum": ["x"], "format": "enum", "nullable": True},
        },
        "required": ["a"],
    }
    made = json_schema(given, "s")
    assert list(made["properties"]) == ["b", "a", "c", "d_e"]
    assert made == {
        "type": "object",
        "properties": {
            "a": {"type": ["integer", "null"], "minimum": 1},
            "b": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            "c": {
                "anyOf": [{"anyOf": [{"type": "number"}, {"type": "boolean"}]}, {"type": "null"}]
            },
            "d_e": {"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "null"}]},
        },
        "required": ["a"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({"type": "OBJECT", "properties": {"a": {"kind": 1}}}, "s.properties.a.kind"),
        ({"type": "STRUCT"}, "s.type"),
        ({"type": "ARRAY", "items": 3}, "s.items"),
        ({"anyOf": {}}, "s.anyOf"),
        ({"minItems": "x"}, "s.minItems"),
        ({"properties": [], "type": "OBJECT"}, "s.properties"),
    ],
)
def test_what_is_wrong_in_a_schema_is_named(given: Any, at: str) -> None:
    with pytest.raises(BodyError) as caught:
        json_schema(given, "s")
    assert caught.value.param == at


def test_a_schema_without_an_end_is_refused() -> None:
    given: dict[str, Any] = {}
    for _ in range(100):
        given = {"items": given}
    with pytest.raises(BodyError, match="deeper"):
        json_schema(given, "s")


def test_plain_schemas_are_closed_where_that_only_narrows_them() -> None:
    inner: dict[str, Any] = {"properties": {"a": {}}}
    given = {"$defs": {"d": inner}, "properties": {"x": {"$ref": "#/$defs/d"}}}
    assert closed(given) == {
        "$defs": {"d": inner | {"additionalProperties": False}},
        "properties": {"x": {"$ref": "#/$defs/d"}},
        "additionalProperties": False,
    }
    for combined in ({"allOf": [inner, inner]}, {"properties": {"b": {}}, "anyOf": [inner]}):
        assert closed(combined) == combined
    opened = inner | {"additionalProperties": True}
    assert closed(opened) == opened


@pytest.mark.parametrize(
    ("config", "format_"),
    [
        ({}, Format()),
        ({"responseMimeType": "text/plain"}, Format()),
        (
            {"responseMimeType": "application/json"},
            Format("json_schema", {"type": ["object", "array"]}),
        ),
        (
            {"responseMimeType": "application/json", "responseSchema": {"type": "STRING"}},
            Format("json_schema", {"type": "string"}),
        ),
        (
            {"responseMimeType": "text/x.enum", "responseJsonSchema": {"enum": ["a", "b"]}},
            Format("enum", values=("a", "b")),
        ),
    ],
)
def test_formats(config: dict[str, Any], format_: Format) -> None:
    assert decoded({"contents": [ASKED], "generationConfig": config}).format == format_


# Responses


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf: Path) -> Tokenizer:
    with load(tiny_gguf, isa="plain") as model:
        return model.tokenizer


def answered(*events: Event, reason: Reason = "stop") -> list[Event]:
    return [Started(Usage(5, 3)), *events, Finished(0, reason), Ended(USAGE)]


def streamed(wire: GeminiWire, events: Sequence[Event]) -> list[Any]:
    pieces = b"".join(wire.stream(event) for event in events).decode().split("\n\n")
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces if piece]


CALLS: tuple[Event, ...] = (
    CallStarted(0, 0, "c1", "rain"),
    CallArguments(0, 0, '{"city":'),
    CallArguments(0, 0, ' "Oslo"}'),
    CallStarted(0, 1, "c2", "wind"),
)


def test_calls_come_whole_and_together(tokenizer: Tokenizer) -> None:
    events = answered(TextDelta(0, "Let me see."), *CALLS, reason="tool_calls")
    calls = [
        {"functionCall": {"id": "c1", "name": "rain", "args": {"city": "Oslo"}}},
        {"functionCall": {"id": "c2", "name": "wind", "args": {}}},
    ]
    whole = json.loads(GeminiWire("m", tokenizer).whole(events))
    assert whole["candidates"] == [
        {
            "index": 0,
            "finishReason": "STOP",
            "content": {"role": "model", "parts": [{"text": "Let me see."}, *calls]},
        }
    ]
    text, last = streamed(GeminiWire("m", tokenizer), events)
    assert text["candidates"][0]["content"]["parts"] == [{"text": "Let me see."}]
    assert last["candidates"][0]["content"]["parts"] == calls
    assert last["candidates"][0]["finishReason"] == "STOP"


@pytest.mark.parametrize("arguments", ['{"city": "Os', "[1]"])
def test_a_call_that_is_no_json_object_is_malformed(tokenizer: Tokenizer, arguments: str) -> None:
    events = answered(CallStarted(0, 0, "c", "f"), CallArguments(0, 0, arguments), reason="length")
    (candidate,) = json.loads(GeminiWire("m", tokenizer).whole(events))["candidates"]
    assert candidate["finishReason"] == "MALFORMED_FUNCTION_CALL"
    assert candidate["content"]["parts"] == [{"text": ""}]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("stop", "STOP"),
        ("length", "MAX_TOKENS"),
        ("content_filter", "SAFETY"),
        ("deadline", "OTHER"),
        ("cancelled", "OTHER"),
    ],
)
def test_finish_reasons(tokenizer: Tokenizer, reason: Reason, said: str) -> None:
    events = answered(TextDelta(0, "a"), reason=reason)
    (candidate,) = json.loads(GeminiWire("m", tokenizer).whole(events))["candidates"]
    assert candidate["finishReason"] == said
    assert ("finishMessage" in candidate) == (said == "OTHER")


def test_usage(tokenizer: Tokenizer) -> None:
    usage = json.loads(GeminiWire("m", tokenizer).whole(answered()))["usageMetadata"]
    assert usage == {
        "promptTokenCount": 5,
        "candidatesTokenCount": 2,
        "totalTokenCount": 7,
        "cachedContentTokenCount": 3,
        "thoughtsTokenCount": 0,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 5}],
    }


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_fails_says_so_in_its_form(tokenizer: Tokenizer, begun: bool) -> None:
    problem = Problem("overloaded", "busy", retry_after=1.0)
    events: tuple[Event, ...] = (Started(Usage(5)), TextDelta(0, "a"))[: 1 + begun]
    sse = GeminiWire("m", tokenizer)
    written = b"".join(map(sse.stream, events)) + sse.failure(problem)
    last = written.decode().split("\n\n")[-2]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["status"], error["message"]) == (503, "UNAVAILABLE", "busy")
    array = GeminiWire("m", tokenizer, sse=False)
    body = b"".join(map(array.stream, events)) + array.failure(problem)
    assert json.loads(body)[-1]["error"]["code"] == 503
    assert len(json.loads(body)) == 1 + begun
