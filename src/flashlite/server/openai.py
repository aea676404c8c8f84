"""OpenAI's chat completions and models, as its SDKs read them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flashlite.errors import ContextOverflow, FlashliteError, Overloaded
from flashlite.runtime.scheduler import Generation, Piece
from flashlite.server.schemas import ChatRequest
from flashlite.server.timing import Timing, asked_deadline, retry_headers
from flashlite.server.worker import Worker

__all__ = ["chat_completions", "error_response", "models"]


async def models(request: Request) -> Response:
    """GET /v1/models."""
    worker: Worker = request.app.state.worker
    entry = {
        "id": worker.model.name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "flashlite",
        "context_length": worker.model.max_sequence_length,
    }
    return JSONResponse({"object": "list", "data": [entry]})


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions, streaming and not."""
    worker: Worker = request.app.state.worker
    body = await request.body()
    try:
        asked = msgspec.json.decode(body, type=ChatRequest)
    except msgspec.DecodeError as error:
        return error_response(400, str(error), "invalid_request_error")
    if asked.model and asked.model != worker.model.name:
        return error_response(
            404,
            f"model {asked.model!r} is not served here; use {worker.model.name!r}",
            "invalid_request_error",
            code="model_not_found",
        )
    messages = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text}
        for m in asked.messages
    ]
    try:
        timing: Timing = request.state.timing
        may_take = asked_deadline(
            request.scope["headers"], asked.deadline_ms, request.app.state.deadline
        )
        if may_take is not None:
            timing.deadline = timing.head_read + may_take
        prompt = worker.model.tokenizer.render_chat(messages)
        job = worker.submit(
            prompt,
            asked.sampling(),
            client=request.client.host if request.client else "",
            arrived=timing.head_read,
            deadline=timing.deadline,
        )
    except ContextOverflow as error:
        return error_response(
            400, str(error), "invalid_request_error", code="context_length_exceeded"
        )
    except FlashliteError as error:
        return error_response(400, str(error), "invalid_request_error", code=error.code)
    reply = _Reply(worker, asked, job.generation)
    pieces = _timed(worker.follow(job), timing)
    try:
        pieces = await _begun(pieces)
    except Overloaded as error:
        return _overloaded(error)
    except FlashliteError as error:
        return error_response(500, str(error), "server_error", code=error.code)
    if asked.stream:
        return StreamingResponse(reply.stream(pieces), media_type="text/event-stream")
    collected: list[Piece] = []
    try:
        async for piece in pieces:
            collected.append(piece)
            if await request.is_disconnected():
                await pieces.aclose()  # type: ignore[attr-defined]
                return Response(status_code=499)
    except FlashliteError as error:
        return error_response(500, str(error), "server_error", code=error.code)
    return JSONResponse(reply.whole(collected))


async def _timed(pieces: AsyncIterator[Piece], timing: Timing) -> AsyncIterator[Piece]:
    """The pieces; the timing gets to know when the last one was there."""
    async for piece in pieces:
        if piece.finish_reason is not None:
            timing.ended = time.perf_counter()
        yield piece


async def _begun(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The same, once the first is there: a request that is refused before it is a 503, whether it
    is streamed or not.
    """
    first = await anext(pieces)

    async def whole() -> AsyncIterator[Piece]:
        yield first
        async for piece in pieces:
            yield piece

    return whole()


def _overloaded(error: Overloaded) -> JSONResponse:
    response = error_response(503, str(error), "server_error", code="overloaded")
    response.headers.update(retry_headers(error.retry_after))
    return response


def error_response(
    status: int, message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status)


class _Reply:
    """Builds the bodies of one answer."""

    def __init__(self, worker: Worker, asked: ChatRequest, generation: Generation) -> None:
        self._tokenizer = worker.model.tokenizer
        self._asked = asked
        self._generation = generation
        self._base = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": worker.model.name,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(p.text for p in pieces)},
            "finish_reason": self._finish_reason(pieces[-1]),
            "logprobs": self._logprobs(pieces),
        }
        return {
            **self._base,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    async def stream(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """Server-sent events: role, text as it comes, finish reason, usage if asked, [DONE]."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for piece in pieces:
                delta = {"content": piece.text} if piece.text else {}
                if delta or piece.finish_reason or self._asked.logprobs:
                    yield self._chunk(delta, piece)
        except FlashliteError as error:
            yield _event({"error": {"message": str(error), "type": "server_error"}})
            return
        if self._asked.stream_options and self._asked.stream_options.include_usage:
            usage = {"choices": [], "usage": self._usage()}
            yield _event({**self._base, "object": "chat.completion.chunk", **usage})
        yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], piece: Piece | None = None) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": self._finish_reason(piece) if piece else None,
            "logprobs": self._logprobs([piece]) if piece else None,
        }
        return _event({**self._base, "object": "chat.completion.chunk", "choices": [choice]})

    def _finish_reason(self, piece: Piece) -> str | None:
        return "stop" if piece.finish_reason == "cancelled" else piece.finish_reason

    def _usage(self) -> dict[str, Any]:
        prompt, completion = len(self._generation.prompt), len(self._generation.generated)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._generation.cached_tokens},
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        drawn = [piece.drawn for piece in pieces if piece.drawn is not None]
        return {
            "content": [
                self._token(d.token, d.logprob)
                | {"top_logprobs": [self._token(token, value) for token, value in d.top]}
                for d in drawn
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
