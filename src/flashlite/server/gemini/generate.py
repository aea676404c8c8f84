""":generateContent, :streamGenerateContent and :countTokens."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashlite.errors import BodyError
from flashlite.server.answer import answer, lay_out
from flashlite.server.exchange import Ask
from flashlite.server.gemini.bodies import CountRequest, GenerateRequest
from flashlite.server.gemini.cached import cached_beginning
from flashlite.server.gemini.decode import beginning, generate_ask
from flashlite.server.gemini.encode import GeminiWire
from flashlite.server.gemini.plain import read
from flashlite.server.reply import send
from flashlite.server.state import State
from flashlite.server.timing import Timing, asked_deadline

__all__ = ["count_tokens", "generate_content", "stream_generate_content"]

_NOTICE = "x-flashlite-notice"
_UNSCORED = "safetySettings were read and not acted on: no model here scores their categories"


async def generate_content(request: Request, name: str) -> Response:
    """The answer in one piece.

    Raises:
        FlashliteError: the request cannot be honoured.
    """
    return await _generate(request, name, stream=False)


async def stream_generate_content(request: Request, name: str) -> Response:
    """The answer as it comes: server-sent events with `alt=sse`, else a JSON array.

    Raises:
        FlashliteError: the request cannot be honoured.
    """
    return await _generate(request, name, stream=True)


async def _generate(request: Request, name: str, *, stream: bool) -> Response:
    state: State = request.app.state.flashlite
    timing: Timing = request.state.timing
    asked = read(await request.body(), GenerateRequest)
    worker = state.worker(name)
    cached = cached_beginning(request, asked.cached_content, worker.model.name)
    if isinstance(cached, Response):
        return cached
    ask = generate_ask(
        asked,
        name,
        cached=cached,
        client=request.client.host if request.client else "",
        deadline_s=asked_deadline(
            request.scope["headers"], asked.deadline_ms, state.config.deadline_s
        ),
        most=state.config.max_choices,
    )
    wire = GeminiWire(
        worker.model.name,
        worker.model.tokenizer,
        n=ask.n,
        logprobs=ask.params.logprobs,
        sse=request.query_params.get("alt") == "sse",
    )
    response = await send(request, answer(worker, ask, timing), wire, stream=stream)
    if asked.safety_settings:
        response.headers[_NOTICE] = _UNSCORED
    return response


async def count_tokens(request: Request, name: str) -> Response:
    """How many tokens the model reads of a request, those of its chat template included.

    Raises:
        FlashliteError: the request cannot be honoured.
    """
    state: State = request.app.state.flashlite
    model = state.registry.chat(name)
    asked = read(await request.body(), CountRequest)
    if (inner := asked.generate_content_request) is not None:
        cached = cached_beginning(request, inner.cached_content, model.name)
        if isinstance(cached, Response):
            return cached
        ask = generate_ask(inner, name, cached=cached, most=state.config.max_choices)
    elif asked.contents:
        ask = Ask(model=name, turns=beginning(asked.contents, None, (), None).turns)
    else:
        raise BodyError("contents", "the field `contents` is missing; send at least one message")
    tokens = len(await asyncio.to_thread(lay_out, model.tokenizer, ask))
    details = [{"modality": "TEXT", "tokenCount": tokens}]
    return JSONResponse({"totalTokens": tokens, "promptTokensDetails": details})
