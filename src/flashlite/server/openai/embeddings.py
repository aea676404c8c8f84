"""POST /v1/embeddings: texts or token ids to vectors, as floats or in base64."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from flashlite.errors import BodyError, ContextOverflow, FlashliteError
from flashlite.runtime.encoder import Encoder
from flashlite.server.bodies import Name, Text, decode
from flashlite.server.exchange import Usage
from flashlite.server.openai.refusal import refusal
from flashlite.server.problems import problem_of
from flashlite.server.state import State

__all__ = ["EmbeddingRequest", "embeddings", "shortened"]

_Ids = Annotated[list[int], msgspec.Meta(min_length=1, max_length=1 << 16)]
_MOST = msgspec.Meta(min_length=1, max_length=2048)


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: Text | Annotated[list[Text | int | _Ids], _MOST]
    model: Name = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Any = None


async def embeddings(request: Request) -> Response:
    """The vectors, each of length 1, in the order of the inputs."""
    state: State = request.app.state.flashlite
    try:
        asked = decode(await request.body(), EmbeddingRequest)
        encoder = state.registry.embedder(asked.model)
        ids = await asyncio.to_thread(_ids, encoder, asked.input)
        vectors = await asyncio.to_thread(encoder.embed_ids, ids)
        vectors = shortened(vectors, asked.dimensions, "dimensions")
    except FlashliteError as error:
        return refusal(problem_of(error))
    plain = asked.encoding_format == "float"
    tokens = sum(map(len, ids))
    request.state.usage = Usage(prompt_tokens=tokens)
    body = {
        "object": "list",
        "model": encoder.name,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector.tolist() if plain else _base64(vector),
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


def _ids(encoder: Encoder, given: str | list[Any]) -> list[list[int]]:
    """Each input as the encoder reads it."""
    inputs: list[Any] = [given] if isinstance(given, str) else given
    if all(isinstance(item, int) for item in inputs):
        inputs = [inputs]
    if all(isinstance(item, str) for item in inputs):
        return encoder.tokenize(inputs).ids
    if not all(isinstance(item, list) for item in inputs):
        raise BodyError("input", "input mixes texts and token ids; send one kind")
    tokens, last = encoder.artifact.tokens, encoder.tokenizer.vocab_size - 1
    begin = [] if tokens.bos is None else [tokens.bos]
    end = list(tokens.eos[:1])
    for index, item in enumerate(inputs):
        if wrong := [id_ for id_ in item if not 0 <= id_ <= last]:
            raise BodyError("input", f"input has token {wrong[0]}, allowed ids 0 to {last}")
        if len(item) + 2 > encoder.max_length:
            raise ContextOverflow(len(item) + 2, encoder.max_length, f"split input {index}")
    return [[*begin, *item, *end] for item in inputs]


def shortened(
    vectors: NDArray[np.float32], dimensions: int | None, field: str
) -> NDArray[np.float32]:
    """The first numbers of each vector, again of length 1; `field` asked for how many.

    Raises:
        BodyError: the vectors have fewer.
    """
    width = vectors.shape[1]
    if dimensions is None or dimensions == width:
        return vectors
    if not 1 <= dimensions <= width:
        raise BodyError(field, f"{field} is {dimensions}, allowed 1 to {width}")
    cut = vectors[:, :dimensions]
    length = np.linalg.norm(cut, axis=1, keepdims=True)
    made: NDArray[np.float32] = cut / np.maximum(length, np.finfo(np.float32).tiny)
    return made


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
