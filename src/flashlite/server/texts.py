"""Small services around a model: its tokens, and what it is. As llama-server's clients ask."""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashlite.errors import FlashliteError
from flashlite.server.bodies import Name, Text, decode
from flashlite.server.openai.refusal import refusal
from flashlite.server.problems import problem_of
from flashlite.server.state import State

__all__ = ["routes"]


class _Tokenize(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    content: Text
    model: Name = ""
    add_special: bool = False
    with_pieces: bool = False


class _Detokenize(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tokens: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=1 << 17)]
    model: Name = ""


def routes() -> list[Route]:
    """/tokenize, /detokenize and /props."""
    return [
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
        Route("/props", _props),
    ]


async def _tokenize(request: Request) -> Response:
    state: State = request.app.state.flashlite
    try:
        asked = decode(await request.body(), _Tokenize)
        tokenizer = state.registry.chat(asked.model).tokenizer
        encode = tokenizer.encode_prompt if asked.add_special else tokenizer.encode
        ids = list(encode(asked.content))
    except FlashliteError as error:
        return refusal(problem_of(error))
    if not asked.with_pieces:
        return JSONResponse({"tokens": ids})
    pieces = [{"id": id_, "piece": _piece(tokenizer.token_bytes(id_))} for id_ in ids]
    return JSONResponse({"tokens": pieces})


async def _detokenize(request: Request) -> Response:
    state: State = request.app.state.flashlite
    try:
        asked = decode(await request.body(), _Detokenize)
        content = state.registry.chat(asked.model).tokenizer.decode(asked.tokens)
    except FlashliteError as error:
        return refusal(problem_of(error))
    return JSONResponse({"content": content})


async def _props(request: Request) -> Response:
    state: State = request.app.state.flashlite
    try:
        model = state.registry.chat(request.query_params.get("model", ""))
    except FlashliteError as error:
        return refusal(problem_of(error))
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": model.max_sequence_length},
            "total_slots": state.config.max_sequences,
            "model_alias": model.name,
            "is_sleeping": False,
        }
    )


def _piece(raw: bytes) -> str | list[int]:
    """Text, or the bytes where they are no whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
