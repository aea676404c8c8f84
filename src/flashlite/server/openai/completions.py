"""POST /v1/completions: a text, or token ids, continued as they stand."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import BodyError, FlashliteError
from flashlite.runtime.sampler import Drawn
from flashlite.server.answer import answer_all
from flashlite.server.bodies import Name, Text, decode, sampling
from flashlite.server.exchange import Ask, Ended, Event, Finished, Started, TextDelta
from flashlite.server.openai.decode import StreamOptions
from flashlite.server.openai.encode import usage_of
from flashlite.server.openai.refusal import body, refusal
from flashlite.server.problems import Problem, problem_of
from flashlite.server.reply import send
from flashlite.server.state import State
from flashlite.server.timing import Timing, asked_deadline

__all__ = ["CompletionRequest", "completions"]

_MOST_PROMPTS = 64
_MOST_CHOICES = 128  # of all prompts together
_DEFAULT_TOKENS = 16  # OpenAI's
_Ids = Annotated[list[int], msgspec.Meta(min_length=1, max_length=1 << 17)]


class CompletionRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text | int | _Ids], msgspec.Meta(min_length=1)]
    model: Name = ""
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], msgspec.Meta(max_length=4096)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    deadline_ms: Any = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt: text, or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [tuple(self.prompt)]  # type: ignore[arg-type]
        if any(isinstance(item, int) for item in self.prompt):
            raise BodyError("prompt", "prompt mixes token ids with whole prompts")
        return [item if isinstance(item, str) else tuple(item) for item in self.prompt]  # type: ignore[arg-type]


async def completions(request: Request) -> Response:
    """The continuations."""
    state: State = request.app.state.flashlite
    timing: Timing = request.state.timing
    try:
        asked = decode(await request.body(), CompletionRequest)
        worker = state.worker(asked.model)
        deadline_s = asked_deadline(
            request.scope["headers"], asked.deadline_ms, state.config.deadline_s
        )
        asks = _asks(asked, request.client.host if request.client else "", deadline_s)
        if asks[0].n > state.config.max_choices:
            raise BodyError("n", f"n is {asks[0].n}, allowed 1 to {state.config.max_choices}")
    except FlashliteError as error:
        return refusal(problem_of(error))
    wire = _Wire(worker.model.name, worker.model.tokenizer, asked, asks)
    return await send(request, answer_all(worker, asks, timing), wire, stream=bool(asked.stream))


def _asks(asked: CompletionRequest, client: str, deadline_s: float | None) -> list[Ask]:
    if asked.suffix:
        raise BodyError("suffix", "suffix is not served: these models only continue a text")
    if asked.best_of not in (None, asked.n or 1):
        raise BodyError("best_of", "best_of is not served; use n and choose yourself")
    if asked.stream_options is not None and not asked.stream:
        raise BodyError("stream_options", "stream_options needs stream: true")
    if asked.echo and asked.logprobs is not None:
        raise BodyError("echo", "echo with logprobs is not served; ask for one of them")
    prompts, n = asked.prompts(), asked.n or 1
    if len(prompts) > _MOST_PROMPTS or len(prompts) * n > _MOST_CHOICES:
        raise BodyError(
            "prompt",
            f"{len(prompts)} prompts with n {n}, allowed {_MOST_PROMPTS} prompts and "
            f"{_MOST_CHOICES} choices",
        )
    params = sampling(
        asked.stop,
        asked.logit_bias,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        max_tokens=_DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens,
        logprobs=asked.logprobs,
    )
    return [
        Ask(
            model=asked.model,
            prompt=prompt,
            params=params,
            n=n,
            deadline_s=deadline_s,
            client=client,
        )
        for prompt in prompts
    ]


class _Wire:
    """Writes one text completion."""

    media_type = "text/event-stream"

    def __init__(
        self, model: str, tokenizer: Tokenizer, asked: CompletionRequest, asks: Sequence[Ask]
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = asked.logprobs is not None
        options = asked.stream_options
        self._include_usage = options is not None and options.include_usage
        n = asks[0].n
        self._texts = ["" for _ in range(n * len(asks))]  # in front of each choice
        if asked.echo:
            for index, ask in enumerate(asks):
                text = (
                    ask.prompt
                    if isinstance(ask.prompt, str)
                    else tokenizer.decode(ask.prompt or ())
                )
                self._texts[index * n : (index + 1) * n] = [text] * n
        self._base = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, events: Sequence[Event]) -> bytes:
        """The completion."""
        texts = list(self._texts)
        drawn: list[list[Drawn]] = [[] for _ in texts]
        reasons = ["stop"] * len(texts)
        usage: dict[str, Any] = {}
        for event in events:
            if isinstance(event, TextDelta):
                texts[event.choice] += event.text
                drawn[event.choice] += event.drawn
            elif isinstance(event, Finished):
                reasons[event.choice] = _reason(event)
            elif isinstance(event, Ended):
                usage = usage_of(event.usage)
        choices = [
            self._choice(i, text, reasons[i], drawn[i] if self._logprobs else None)
            for i, text in enumerate(texts)
        ]
        return msgspec.json.encode({**self._base, "choices": choices, "usage": usage})

    def stream(self, event: Event) -> bytes:
        """A chunk."""
        if isinstance(event, Started):
            echoed = [self._choice(i, text) for i, text in enumerate(self._texts) if text]
            return b"".join(self._sse({"choices": [choice]}) for choice in echoed)
        if isinstance(event, TextDelta):
            drawn = event.drawn if self._logprobs else None
            if not event.text and not drawn:
                return b""
            return self._sse({"choices": [self._choice(event.choice, event.text, None, drawn)]})
        if isinstance(event, Finished):
            return self._sse({"choices": [self._choice(event.choice, "", _reason(event))]})
        if not isinstance(event, Ended):
            return b""
        last = b"data: [DONE]\n\n"
        if not self._include_usage:
            return last
        return self._sse({"choices": [], "usage": usage_of(event.usage)}) + last

    def failure(self, problem: Problem) -> bytes:
        """An error where a chunk would be."""
        return b"data: " + msgspec.json.encode(body(problem)) + b"\n\n"

    def refusal(self, problem: Problem) -> Response:
        """An error with its status."""
        return refusal(problem)

    def _sse(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode({**self._base, **fields}) + b"\n\n"

    def _choice(
        self, index: int, text: str, reason: str | None = None, drawn: Sequence[Drawn] | None = None
    ) -> dict[str, Any]:
        logprobs = None if drawn is None else self._spell(drawn)
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def _spell(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        tokens = [self._text(d.token) for d in drawn]
        offsets = [0, *itertools.accumulate(map(len, tokens))][: len(tokens)]
        return {
            "tokens": tokens,
            "token_logprobs": [max(d.logprob, -9999.0) for d in drawn],
            "top_logprobs": [{self._text(t): max(v, -9999.0) for t, v in d.top} for d in drawn],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", errors="replace")


def _reason(event: Finished) -> str:
    return "stop" if event.reason == "cancelled" else event.reason
