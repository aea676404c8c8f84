"""OpenAI's own client against `flashlite serve` with SmolLM2 and an encoder, as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

Messages = list[openai.types.chat.ChatCompletionMessageParam]
CAPITAL: Messages = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(smollm2_gguf: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flashlite.cli.main", "serve", str(smollm2_gguf)]
    command += ["--port", str(port), "--max-sequence-length", "1024", "--embed", "all-minilm-l6-v2"]
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
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        yield client
    process.terminate()
    assert process.wait(30) in (0, -15)


@pytest.fixture
def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_chat_whole_and_streamed(client: openai.OpenAI, name: str) -> None:
    whole = client.chat.completions.create(
        model=name, messages=CAPITAL, temperature=0, max_tokens=24
    )
    text = whole.choices[0].message.content or ""
    assert len(text) > 20
    stream = client.chat.completions.create(
        model=name, messages=CAPITAL, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-none", messages=CAPITAL)
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id


def test_too_long_a_prompt_is_fl_405(client: openai.OpenAI, name: str) -> None:
    long: Messages = [{"role": "user", "content": "again and " * 2000}]
    with pytest.raises(openai.BadRequestError, match="FL-405") as caught:
        client.chat.completions.create(model=name, messages=long)
    assert caught.value.code == "context_length_exceeded"


def test_embeddings_in_base64_and_floats(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="all-minilm-l6-v2", input=["A cat.", "A kitten."])
    plain = client.embeddings.create(
        model="all-minilm-l6-v2", input=["A cat.", "A kitten."], encoding_format="float"
    )
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
    a, b = (entry.embedding for entry in packed.data)
    assert sum(x * y for x, y in zip(a, b, strict=True)) > 0.6
