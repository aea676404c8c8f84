"""Gemini's wire format from a real server of a tiny model, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Running, serving

SAY = {"contents": [{"role": "user", "parts": [{"text": "once upon a time"}]}]}


@pytest.fixture(scope="module")
def running(tiny_gguf: Path) -> Iterator[Running]:
    with serving(tiny_gguf, rate_limit=0) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture
def name(running: Running) -> str:
    return running.state.registry.names[0]


def body(**config: Any) -> dict[str, Any]:
    return SAY | {"generationConfig": {"maxOutputTokens": 8, "temperature": 0} | config}


def post(client: httpx.Client, path: str, given: Any) -> Any:
    response = client.post(path, json=given)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("version", ["/v1beta", "/v1", ""])
def test_an_answer_has_geminis_shape(client: httpx.Client, name: str, version: str) -> None:
    reply = post(client, f"{version}/models/{name}:generateContent", body())
    (candidate,) = reply["candidates"]
    assert candidate["finishReason"] in ("STOP", "MAX_TOKENS")
    assert candidate["content"]["role"] == "model"
    usage = reply["usageMetadata"]
    assert usage["totalTokenCount"] == usage["promptTokenCount"] + usage["candidatesTokenCount"]
    assert usage["thoughtsTokenCount"] == 0
    assert reply["modelVersion"] == name
    assert reply["responseId"]


def test_events_are_data_and_a_blank_line_and_nothing_else(client: httpx.Client, name: str) -> None:
    whole = post(client, f"/v1/models/{name}:generateContent", body(maxOutputTokens=24))
    path = f"/v1/models/{name}:streamGenerateContent?alt=sse"
    response = client.post(path, json=body(maxOutputTokens=24))
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert_one_answer(chunks, whole)


def test_without_sse_a_stream_is_a_json_array(client: httpx.Client, name: str) -> None:
    whole = post(client, f"/v1/models/{name}:generateContent", body(maxOutputTokens=24))
    response = client.post(
        f"/v1/models/{name}:streamGenerateContent", json=body(maxOutputTokens=24)
    )
    assert response.headers["content-type"] == "application/json"
    assert_one_answer(response.json(), whole)


def assert_one_answer(chunks: list[Any], whole: Any) -> None:
    assert len(chunks) > 2
    candidates = [chunk["candidates"][0] for chunk in chunks]
    text = "".join(part["text"] for c in candidates for part in c["content"]["parts"])
    assert text == whole["candidates"][0]["content"]["parts"][0]["text"]
    reasons = [c.get("finishReason") for c in candidates]
    assert reasons[-1] == whole["candidates"][0]["finishReason"]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    counts = ("promptTokenCount", "candidatesTokenCount", "totalTokenCount")
    for count in counts:
        assert chunks[-1]["usageMetadata"][count] == whole["usageMetadata"][count]
    assert len({chunk["responseId"] for chunk in chunks}) == 1


def test_both_spellings_and_floats_for_whole_numbers(client: httpx.Client, name: str) -> None:
    path = f"/v1beta/models/{name}:generateContent"
    camel = {"maxOutputTokens": 5.0, "topK": 3.0, "topP": 0.9, "seed": -4, "candidateCount": 2}
    snake = {
        "max_output_tokens": 5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": -4,
        "candidate_count": 2.0,
        "thinking_config": {"include_thoughts": True, "thinkingBudget": 0},
    }
    texts = []
    for config in ({"generationConfig": camel}, {"generation_config": snake}):
        reply = post(client, path, SAY | config)
        assert [candidate["index"] for candidate in reply["candidates"]] == [0, 1]
        assert reply["usageMetadata"]["candidatesTokenCount"] <= 10
        texts.append([c["content"]["parts"] for c in reply["candidates"]])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_logprobs(client: httpx.Client, name: str) -> None:
    path = f"/v1/models/{name}:generateContent"
    reply = post(client, path, body(responseLogprobs=True, logprobs=3))
    (candidate,) = reply["candidates"]
    result = candidate["logprobsResult"]
    chosen, top = result["chosenCandidates"], result["topCandidates"]
    assert len(chosen) == len(top) == reply["usageMetadata"]["candidatesTokenCount"]
    for token, alternatives in zip(chosen, top, strict=True):
        assert len(alternatives["candidates"]) == 3
        assert token == alternatives["candidates"][0]
    mean = sum(token["logProbability"] for token in chosen) / len(chosen)
    assert candidate["avgLogprobs"] == pytest.approx(mean)
    assert "logprobsResult" not in post(client, path, body())["candidates"][0]


def test_a_schema_in_geminis_dialect_is_kept(client: httpx.Client, name: str) -> None:
    schema = {
        "type": "OBJECT",
        "properties": {
            "mood": {"type": "STRING", "enum": ["glad", "sad"], "format": "enum"},
            "rain": {"type": "BOOLEAN", "nullable": True},
        },
        "required": ["mood", "rain"],
        "property_ordering": ["rain", "mood"],
    }
    config = {"response_mime_type": "application/json", "response_schema": schema}
    reply = post(client, f"/v1/models/{name}:generateContent", body(**config, maxOutputTokens=200))
    made = json.loads(reply["candidates"][0]["content"]["parts"][0]["text"])
    assert list(made) == ["rain", "mood"]
    assert made["mood"] in ("glad", "sad")
    assert made["rain"] in (True, False, None)


def test_an_enum_is_a_bare_word(client: httpx.Client, name: str) -> None:
    config = {
        "responseMimeType": "text/x.enum",
        "responseSchema": {"type": "STRING", "enum": ["red", "blue"]},
    }
    reply = post(client, f"/v1/models/{name}:generateContent", body(**config))
    assert reply["candidates"][0]["content"]["parts"] in ([{"text": "red"}], [{"text": "blue"}])


def test_what_is_counted_is_what_is_read(client: httpx.Client, name: str) -> None:
    given = body() | {"systemInstruction": {"parts": [{"text": "Be brief."}]}}
    reply = post(client, f"/v1/models/{name}:generateContent", given)
    inner = {"generateContentRequest": given | {"model": f"models/{name}"}}
    counted = post(client, f"/v1beta/models/{name}:countTokens", inner)
    assert counted["totalTokens"] == reply["usageMetadata"]["promptTokenCount"]
    plain = post(client, f"/v1beta/models/{name}:countTokens", SAY)
    assert 0 < plain["totalTokens"] < counted["totalTokens"]


def test_what_was_stored_is_told(client: httpx.Client, name: str) -> None:
    given = {"contents": [{"parts": [{"text": "tell it once more " * 20}]}]}
    given["generationConfig"] = {"maxOutputTokens": 2}  # type: ignore[assignment]
    path = f"/v1/models/{name}:generateContent"
    usages = [post(client, path, given)["usageMetadata"] for _ in range(2)]
    found = (usages[1]["promptTokenCount"] - 1) // 32 * 32
    assert usages[1]["cachedContentTokenCount"] == found >= 32


def test_models_are_listed_in_pages_and_found(client: httpx.Client, name: str) -> None:
    listed = client.get("/v1beta/models", params={"pageSize": 1}).json()
    assert [model["name"] for model in listed["models"]] == [f"models/{name}"]
    assert "nextPageToken" not in listed
    assert client.get("/v1beta/models?pageToken=1").json()["models"] == []
    assert client.get("/v1beta/models?pageToken=x").status_code == 400
    found = client.get(f"/v1beta/models/{name}").json()
    assert found == listed["models"][0]
    assert "countTokens" in found["supportedGenerationMethods"]
    assert client.get("/v1beta/tunedModels").json() == {}


def test_safety_settings_are_checked_and_said_to_be_unscored(
    client: httpx.Client, name: str
) -> None:
    setting = {"category": "HARM_CATEGORY_HATE_SPEECH", "threshold": "BLOCK_NONE"}
    path = f"/v1/models/{name}:generateContent"
    response = client.post(path, json=body() | {"safetySettings": [setting]})
    assert response.status_code == 200
    assert "safetySettings" in response.headers["x-flashlite-notice"]
    setting["threshold"] = "BLOCK_SOME"
    assert client.post(path, json=body() | {"safetySettings": [setting]}).status_code == 400


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"foo": 1}, "`foo`"),
        ({"generationConfig": {"foo_bar": 1}}, "`generationConfig.fooBar`"),
        ({"generationConfig": {"topK": 1, "top_k": 1}}, "two spellings"),
        ({"generationConfig": {"topK": 1.5}}, "`generationConfig.topK`"),
        ({"generationConfig": {"topP": 2}}, "topP"),
        ({"generationConfig": {"maxOutputTokens": 0}}, "maxOutputTokens"),
        ({"generationConfig": {"candidateCount": 99}}, "candidateCount"),
        ({"generationConfig": {"logprobs": 2}}, "responseLogprobs"),
        ({"generationConfig": {"responseSchema": {"type": "STRING"}}}, "responseMimeType"),
        ({"contents": []}, "`contents`"),
        ({"contents": [{"parts": []}]}, "contents[0].parts"),
        ({"contents": [{"parts": [{}]}]}, "contents[0].parts[0]"),
        (
            {"contents": [{"parts": [{"inlineData": {"mime_type": "image/png", "data": "YQ=="}}]}]},
            "contents[0].parts[0].inlineData: this model reads text alone",
        ),
        ({"tools": [{"googleSearch": {}}]}, "googleSearch"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "functionDeclarations"),
        ({"generationConfig": {"responseModalities": ["AUDIO"]}}, "responseModalities"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    client: httpx.Client, name: str, given: dict[str, Any], named: str
) -> None:
    response = client.post(f"/v1/models/{name}:generateContent", json=SAY | given)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert named in error["message"]


def test_a_schema_that_cannot_be_enforced_is_refused(client: httpx.Client, name: str) -> None:
    config = {
        "responseMimeType": "application/json",
        "responseJsonSchema": {"type": "array", "contains": {"const": 1}},
    }
    for verb in ("generateContent", "streamGenerateContent?alt=sse"):
        response = client.post(f"/v1/models/{name}:{verb}", json=body(**config))
        assert response.status_code == 400
        assert "contains" in response.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_fl_405(client: httpx.Client, name: str) -> None:
    long = {"contents": [{"parts": [{"text": "again and " * 4000}]}]}
    error = client.post(f"/v1/models/{name}:generateContent", json=long).json()["error"]
    assert error["code"] == 400
    assert "FL-405" in error["message"]
    assert error["details"][0]["reason"] == "FL-405"


def test_what_is_not_served_is_not_found(client: httpx.Client, name: str) -> None:
    for path in ("none:generateContent", f"{name}:foo", f"a/b:{name}:countTokens"):
        error = client.post(f"/v1/models/{path}", json=SAY).json()["error"]
        assert (error["code"], error["status"]) == (404, "NOT_FOUND")
    colons = client.post("/v1/models/a/b:270m:countTokens", json=SAY).json()["error"]
    assert "model 'a/b:270m' is not served" in colons["message"]
    asked = client.get("/v1/models/none", headers={"x-goog-api-key": "k"}).json()["error"]
    assert asked["status"] == "NOT_FOUND"
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/none?key=k").json()["error"]["status"] == "NOT_FOUND"


def test_a_chat_server_says_how_to_embed(client: httpx.Client, name: str) -> None:
    given = {"content": {"parts": [{"text": "a"}]}}
    response = client.post(f"/v1/models/{name}:embedContent", json=given)
    assert response.status_code == 400
    assert "--embed" in response.json()["error"]["message"]


def test_a_body_that_is_no_json_is_refused(client: httpx.Client, name: str) -> None:
    for raw in (b"{", b"[]", b"1", b"\xff", b'{"contents": ' + b"[" * 5000):
        response = client.post(f"/v1/models/{name}:generateContent", content=raw)
        assert response.status_code == 400, raw[:20]
        assert response.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_nested_arguments_are_read_or_refused(client: httpx.Client, name: str) -> None:
    for depth in range(100, 1100, 50):
        nested = "[" * depth + "]" * depth
        for raw in (
            '{"contents": [{"parts": [{"functionCall": {"name": "f", "args": {"a": %s}}}]}]}',
            '{"generationConfig": {"responseJsonSchema": {"enum": %s}}, "contents": []}',
            '{"nothing": %s}',
        ):
            content = (raw % nested).encode()
            response = client.post(f"/v1/models/{name}:countTokens", content=content)
            assert response.status_code in (200, 400), response.text
