""":embedContent and :batchEmbedContents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashlite.errors import BodyError
from flashlite.server.exchange import Usage
from flashlite.server.gemini.bodies import BatchEmbedRequest, EmbedRequest
from flashlite.server.gemini.decode import text_of
from flashlite.server.gemini.plain import read
from flashlite.server.openai.embeddings import shortened
from flashlite.server.state import State

__all__ = ["batch_embed_contents", "embed_content"]


async def embed_content(request: Request, name: str) -> Response:
    """One vector, of length 1.

    Raises:
        FlashliteError: the text cannot be embedded.
    """
    asked = read(await request.body(), EmbedRequest)
    vectors, tokens = await _embed(request, name, [asked], "")
    usage = {"promptTokenCount": tokens}
    return JSONResponse({"embedding": {"values": vectors[0]}, "usageMetadata": usage})


async def batch_embed_contents(request: Request, name: str) -> Response:
    """A vector for each request, in their order.

    Raises:
        FlashliteError: a text cannot be embedded; none is.
    """
    asked = read(await request.body(), BatchEmbedRequest)
    for index, one in enumerate(asked.requests):
        if one.model.removeprefix("models/") not in ("", name):
            at = f"requests[{index}].model"
            raise BodyError(at, f"{at} is {one.model[:100]!r}, the path says {name[:100]!r}")
    vectors, tokens = await _embed(request, name, asked.requests, "requests[{}].")
    embeddings = [{"values": vector} for vector in vectors]
    return JSONResponse({"embeddings": embeddings, "usageMetadata": {"promptTokenCount": tokens}})


async def _embed(
    request: Request, name: str, asked: Sequence[EmbedRequest], at: str
) -> tuple[list[list[float]], int]:
    """The vectors and the tokens read; `at`: where a request is in the body."""
    state: State = request.app.state.flashlite
    encoder = state.registry.embedder(name)
    texts = [text_of(one.content, f"{at.format(i)}content") for i, one in enumerate(asked)]
    ids = (await asyncio.to_thread(encoder.tokenize, texts)).ids
    vectors = await asyncio.to_thread(encoder.embed_ids, ids)
    cut = [
        shortened(
            vectors[i : i + 1], one.output_dimensionality, f"{at.format(i)}outputDimensionality"
        )
        for i, one in enumerate(asked)
    ]
    tokens = sum(map(len, ids))
    request.state.usage = Usage(prompt_tokens=tokens)
    return [one[0].tolist() for one in cut], tokens
