"""Google's own client against `flashlite serve` with SmolLM2 and an encoder, as a process."""

from __future__ import annotations

import asyncio
import enum
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pydantic
import pytest
from google import genai
from google.genai import errors, types

CAPITAL = "What is the capital of France?"
ENCODER = "all-minilm-l6-v2"


class Person(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=20)]
    age: Annotated[int, pydantic.Field(ge=0, le=120)]
    email: Annotated[str, pydantic.Field(max_length=20)] | None


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@pytest.fixture(scope="module")
def url(smollm2_gguf: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flashlite.cli.main", "serve", str(smollm2_gguf)]
    command += ["--port", str(port), "--max-sequence-length", "1024", "--embed", ENCODER]
    command += ["--rate-limit", "0"]
    process = subprocess.Popen(command, env=os.environ | {"LC_ALL": "C"})
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < until
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    yield url
    process.terminate()
    assert process.wait(30) in (0, -15)


@pytest.fixture(params=["v1", "v1beta"])
def client(url: str, request: pytest.FixtureRequest) -> Iterator[genai.Client]:
    options = types.HttpOptions(base_url=url, api_version=request.param)
    with genai.Client(api_key="k", http_options=options) as client:
        yield client


@pytest.fixture
def name(client: genai.Client) -> str:
    return str(next(iter(client.models.list())).name)


def config(**given: object) -> types.GenerateContentConfig:
    return types.GenerateContentConfig.model_validate(
        {"temperature": 0, "max_output_tokens": 24} | given
    )


def said_by_openai(url: str, name: str) -> str:
    """The same question by the other protocol: one engine answers both."""
    asked = {
        "model": name.removeprefix("models/"),
        "messages": [{"role": "user", "content": CAPITAL}],
        "temperature": 0,
        "max_tokens": 24,
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json()
    return str(reply["choices"][0]["message"]["content"])


def test_chat_whole_and_streamed(client: genai.Client, url: str, name: str) -> None:
    whole = client.models.generate_content(model=name, contents=CAPITAL, config=config())
    assert whole.text
    assert whole.text == said_by_openai(url, name)
    chunks = list(
        client.models.generate_content_stream(model=name, contents=CAPITAL, config=config())
    )
    assert "".join(chunk.text or "" for chunk in chunks) == whole.text
    usage, last = whole.usage_metadata, chunks[-1].usage_metadata
    assert usage is not None
    assert last is not None
    assert usage.total_token_count == last.total_token_count
    assert usage.thoughts_token_count == 0
    assert chunks[-1].candidates is not None
    assert chunks[-1].candidates[0].finish_reason in ("STOP", "MAX_TOKENS")


@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
def test_the_asynchronous_client_streams(client: genai.Client, url: str, name: str) -> None:
    async def ask() -> str:
        async with client.aio as asynchronous:
            stream = await asynchronous.models.generate_content_stream(
                model=name, contents=CAPITAL, config=config()
            )
            return "".join([chunk.text or "" async for chunk in stream])

    assert asyncio.run(ask()) == said_by_openai(url, name)


def test_a_chat_keeps_its_history(client: genai.Client, name: str) -> None:
    chat = client.chats.create(model=name, config=config(system_instruction="Be brief."))
    assert chat.send_message("My name is Ada.").text
    assert "".join(chunk.text or "" for chunk in chat.send_message_stream("What is my name?"))
    reply = chat.send_message("What is my name?")
    assert reply.text
    # Of the streamed answer every piece is a content of its own, and the model reads one.
    history = chat.get_history(curated=True)
    assert len(history) > 6
    assert [content.role for content in history[:3]] == ["user", "model", "user"]


def test_every_setting_that_the_client_can_send(client: genai.Client, name: str) -> None:
    given = config(
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        candidate_count=2,
        stop_sequences=["\n\n\n"],
        response_logprobs=True,
        logprobs=3,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        seed=1,
        system_instruction="Be brief.",
        safety_settings=[
            {"category": "HARM_CATEGORY_HATE_SPEECH", "threshold": "BLOCK_NONE"},
        ],
        thinking_config={"include_thoughts": True, "thinking_budget": 0},
    )
    reply = client.models.generate_content(model=name, contents=CAPITAL, config=given)
    assert reply.candidates is not None
    assert [candidate.index for candidate in reply.candidates] == [0, 1]
    result = reply.candidates[0].logprobs_result
    assert result is not None
    assert result.chosen_candidates
    assert result.top_candidates
    assert len(result.top_candidates[0].candidates or ()) == 3
    assert reply.candidates[0].avg_logprobs is not None


def test_structured_output_is_parsed(client: genai.Client, name: str) -> None:
    schemas = {"response_schema": Person, "response_json_schema": Person.model_json_schema()}
    for field, schema in schemas.items():
        reply = client.models.generate_content(
            model=name,
            contents="Invent a person.",
            config=config(
                max_output_tokens=400, response_mime_type="application/json", **{field: schema}
            ),
        )
        assert reply.candidates is not None
        assert reply.candidates[0].finish_reason == types.FinishReason.STOP, reply.text
        assert Person.model_validate_json(reply.text or "")
    name_schema = {"type": "STRING", "max_length": 20}
    reply = client.models.generate_content(
        model=name,
        contents="Name two people.",
        config=config(
            max_output_tokens=100,
            response_mime_type="application/json",
            response_schema={"type": "ARRAY", "items": name_schema, "min_items": 2, "max_items": 2},
        ),
    )
    assert isinstance(reply.parsed, list)
    assert [type(item) for item in reply.parsed] == [str, str]


def test_an_enum_is_parsed(client: genai.Client, name: str) -> None:
    reply = client.models.generate_content(
        model=name,
        contents="What colour is the sky?",
        config=config(response_mime_type="text/x.enum", response_schema=Colour),
    )
    assert reply.text in ("red", "blue")
    assert isinstance(reply.parsed, Colour)


def test_what_is_counted_is_what_is_read(client: genai.Client, name: str) -> None:
    counted = client.models.count_tokens(model=name, contents=CAPITAL)
    reply = client.models.generate_content(model=name, contents=CAPITAL, config=config())
    assert reply.usage_metadata is not None
    assert counted.total_tokens == reply.usage_metadata.prompt_token_count


def test_embeddings_tell_what_is_alike(client: genai.Client) -> None:
    texts: list[Any] = ["A cat.", "A kitten.", "Tax law."]
    reply = client.models.embed_content(model=ENCODER, contents=texts)
    assert reply.embeddings is not None
    cat, kitten, tax = (entry.values or [] for entry in reply.embeddings)
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > 0.6
    assert sum(a * b for a, b in zip(cat, tax, strict=True)) < 0.4
    short = client.models.embed_content(
        model=ENCODER,
        contents="A cat.",
        config={"task_type": "RETRIEVAL_QUERY", "output_dimensionality": 8},
    )
    assert short.embeddings is not None
    assert sum(x * x for x in short.embeddings[0].values or []) == pytest.approx(1, abs=1e-5)
    assert len(short.embeddings[0].values or []) == 8


def test_models(client: genai.Client, name: str) -> None:
    listed = [str(model.name) for model in client.models.list()]
    assert listed == [name, f"models/{ENCODER}"]
    found = client.models.get(model=name)
    assert found.input_token_limit == 1024
    assert list(client.models.list(config={"query_base": False})) == []


def test_errors_have_code_status_and_message(client: genai.Client, name: str) -> None:
    with pytest.raises(errors.ClientError) as caught:
        client.models.generate_content(model="gemini-none", contents=CAPITAL)
    assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")
    with pytest.raises(errors.ClientError, match="FL-405") as caught:
        list(client.models.generate_content_stream(model=name, contents="again and " * 2000))
    assert (caught.value.code, caught.value.status) == (400, "INVALID_ARGUMENT")
    unknown = types.HttpOptions(extra_body={"generationConfig": {"foo": 1}})
    with pytest.raises(errors.ClientError, match="foo"):
        client.models.generate_content(
            model=name, contents=CAPITAL, config=config(http_options=unknown)
        )
    image = types.Part.from_bytes(data=b"abc", mime_type="image/png")
    asked: list[Any] = [CAPITAL, image]
    with pytest.raises(errors.ClientError, match="text alone"):
        client.models.generate_content(model=name, contents=asked)


def test_a_cached_content_is_made_used_kept_longer_and_deleted(
    client: genai.Client, name: str
) -> None:
    long = "In Oslo it rains on most days of October. " * 12
    cache = client.caches.create(
        model=name,
        config={"contents": long, "system_instruction": "Be brief.", "ttl": "300s"},
    )
    assert cache.name is not None
    assert cache.usage_metadata is not None
    tokens = cache.usage_metadata.total_token_count or 0
    assert tokens > 100
    reply = client.models.generate_content(
        model=name, contents="Where?", config=config(cached_content=cache.name)
    )
    assert reply.usage_metadata is not None
    assert tokens - (reply.usage_metadata.cached_content_token_count or 0) < 64
    found = client.caches.get(name=cache.name)
    later = client.caches.update(name=cache.name, config={"ttl": "600s"})
    assert later.expire_time is not None
    assert found.expire_time is not None
    assert later.expire_time > found.expire_time
    assert cache.name in [entry.name for entry in client.caches.list()]
    client.caches.delete(name=cache.name)
    with pytest.raises(errors.ClientError) as caught:
        client.caches.get(name=cache.name)
    assert caught.value.code == 404
