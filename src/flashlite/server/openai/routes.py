"""The paths of OpenAI's protocol."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashlite.errors import FlashliteError, UnknownModel
from flashlite.server.answer import answer
from flashlite.server.openai.completions import completions
from flashlite.server.openai.decode import chat_ask, read_chat
from flashlite.server.openai.embeddings import embeddings
from flashlite.server.openai.encode import ChatWire
from flashlite.server.openai.refusal import refusal
from flashlite.server.problems import problem_of
from flashlite.server.reply import send
from flashlite.server.state import State
from flashlite.server.timing import Timing, asked_deadline

__all__ = ["routes"]


def routes() -> list[Route]:
    """With and without /v1, since base URLs are written both ways."""
    return [
        route
        for prefix in ("/v1", "")
        for route in (
            Route(f"{prefix}/chat/completions", _chat, methods=["POST"]),
            Route(f"{prefix}/completions", completions, methods=["POST"]),
            Route(f"{prefix}/embeddings", embeddings, methods=["POST"]),
            Route(f"{prefix}/models", _models),
            Route(f"{prefix}/models/{{name:path}}", _model),
        )
    ]


async def _chat(request: Request) -> Response:
    state: State = request.app.state.flashlite
    timing: Timing = request.state.timing
    try:
        asked = read_chat(await request.body())
        worker = state.worker(asked.model)
        ask = chat_ask(
            asked,
            client=request.client.host if request.client else "",
            deadline_s=asked_deadline(
                request.scope["headers"], asked.deadline_ms, state.config.deadline_s
            ),
            most=state.config.max_choices,
        )
    except FlashliteError as error:
        return refusal(problem_of(error))
    wire = ChatWire(
        worker.model.name,
        worker.model.tokenizer,
        f"fl-{worker.model.artifact.digest[:12]}",
        n=ask.n,
        logprobs=bool(asked.logprobs),
        include_usage=asked.stream_options is not None and asked.stream_options.include_usage,
    )
    return await send(request, answer(worker, ask, timing), wire, stream=bool(asked.stream))


async def _models(request: Request) -> Response:
    """GET /v1/models, in a body that OpenAI's and Gemini's SDKs both read."""
    state: State = request.app.state.flashlite
    entries = [_entry(state, name) for name in state.registry.names]
    return JSONResponse({"object": "list", "data": entries, "models": entries})


async def _model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    state: State = request.app.state.flashlite
    name = request.path_params["name"]
    if name not in state.registry.names:
        return refusal(problem_of(UnknownModel(name, state.registry.names)))
    return JSONResponse(_entry(state, name))


def _entry(state: State, name: str) -> dict[str, Any]:
    model = state.registry.models.get(name)
    if model is not None:
        context, methods = model.max_sequence_length, ["generateContent", "countTokens"]
    else:
        encoder = state.registry.embedder(name)
        context, methods = encoder.max_length, ["embedContent", "batchEmbedContents"]
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "flashlite",
        "context_length": context,
        "name": f"models/{name}",
        "displayName": name,
        "inputTokenLimit": context,
        "outputTokenLimit": context,
        "supportedGenerationMethods": methods,
    }
