"""The paths of OpenAI's protocol."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flashlite.errors import FlashliteError
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
