"""From an `Ask` to events, whatever protocol it came by.

    Ask ── lay out ──> ids ── admit ──> generate, n choices ── text ──> events

The chat is laid out by the model's template. A prompt longer than the context is FL-405: nothing
is dropped. The choices of one request share the prompt's pages: the first computes them, and the
others begin once it has drawn its first token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import BodyError
from flashlite.runtime.generation import FinishReason, Generation
from flashlite.runtime.grammar import Grammar, GrammarSpec, compile_grammar
from flashlite.server.exchange import (
    Ask,
    Ended,
    Event,
    Finished,
    Format,
    Reason,
    Started,
    TextDelta,
    Usage,
)
from flashlite.server.timing import Timing
from flashlite.server.worker import Worker

__all__ = ["answer", "answer_all", "lay_out"]

_LONG = 1 << 13  # characters: laying out more would keep the event loop from the others
_SEEDS = 1 << 64
_REASONS: dict[FinishReason, Reason] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "deadline": "deadline",
}


async def answer(worker: Worker, ask: Ask, timing: Timing) -> AsyncIterator[Event]:
    """The events of an answer; closing the iterator stops it within one step.

    Args:
        worker: of the model that `ask` names.
        ask: whose deadline counts from `timing.head_read`.
        timing: gets to know the deadline, and when the last token was there.

    Raises:
        FlashliteError: the request cannot be honoured, or the engine failed.
    """
    if ask.tools:
        raise BodyError("tools", "this model's tools are not served; leave out `tools`")
    tokenizer = worker.model.tokenizer
    if _size(ask) > _LONG:
        ids = await asyncio.to_thread(lay_out, tokenizer, ask)
    else:
        ids = lay_out(tokenizer, ask)
    grammar = await _grammar(tokenizer, ask.format)
    if ask.deadline_s is not None:
        timing.deadline = timing.head_read + ask.deadline_s
    generations: list[Generation] = []
    with worker.open() as stream:

        def add(choice: int) -> None:
            params = ask.params
            if params.seed is not None:
                params = dataclasses.replace(params, seed=(params.seed + choice) % _SEEDS)
            generations.append(
                stream.add(
                    ids,
                    params,
                    grammar,
                    client=ask.client,
                    arrived=timing.head_read,
                    deadline=timing.deadline,
                )
            )

        add(0)
        begun = False
        async for choice, piece in stream:
            if not begun:
                begun = True
                for other in range(1, ask.n):
                    add(other)
                yield Started(_usage(generations[:1], prompt_only=True))
            yield TextDelta(choice, piece.text, (piece.drawn,) if piece.drawn else ())
            if piece.finish_reason is not None:
                reason = _REASONS[piece.finish_reason]
                yield Finished(choice, reason, generations[choice].stops.matched)
        timing.ended = time.perf_counter()
        yield Ended(_usage(generations))


async def answer_all(worker: Worker, asks: Sequence[Ask], timing: Timing) -> AsyncIterator[Event]:
    """Several prompts of one request as one answer: choice `c` of ask `a` is `a * n + c`.

    Raises:
        FlashliteError: as `answer`, for the first that fails; the others are stopped.
    """
    if len(asks) == 1:
        async for only in answer(worker, asks[0], timing):
            yield only
        return
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def follow(index: int, ask: Ask) -> None:
        own = dataclasses.replace(timing)
        try:
            async for made in answer(worker, ask, own):
                queue.put_nowait((index, made))
        except Exception as error:
            queue.put_nowait((index, error))
        timing.deadline, timing.ended = own.deadline, own.ended

    tasks = [asyncio.create_task(follow(i, ask)) for i, ask in enumerate(asks)]
    usages: list[Usage] = []
    begun = False
    try:
        while len(usages) < len(asks):
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            event: Event = item
            if isinstance(event, Ended):
                usages.append(event.usage)
            elif not isinstance(event, Started):
                yield dataclasses.replace(event, choice=index * asks[index].n + event.choice)
            elif not begun:
                begun = True
                yield event
        yield Ended(_sum(usages))
    finally:
        for task in tasks:
            task.cancel()


def lay_out(tokenizer: Tokenizer, ask: Ask) -> list[int]:
    """The ids that the model reads.

    Raises:
        BodyError: a token id is outside the vocabulary.
        TemplateError, ForgeryError, TokenizerError, UsageError: as `Tokenizer.render_chat`.
    """
    if ask.prompt is None:
        return tokenizer.render_chat(
            [{"role": turn.role, "content": turn.text} for turn in ask.turns]
        )
    if isinstance(ask.prompt, str):
        return list(tokenizer.encode_prompt(ask.prompt))
    if wrong := [id_ for id_ in ask.prompt if not 0 <= id_ < tokenizer.vocab_size]:
        raise BodyError(
            "prompt", f"prompt has token {wrong[0]}, allowed ids 0 to {tokenizer.vocab_size - 1}"
        )
    return list(ask.prompt)


async def _grammar(tokenizer: Tokenizer, format_: Format) -> Grammar | None:
    """Compiled beside the event loop: the first of a vocabulary takes a second."""
    if format_.kind == "text":
        return None
    if format_.kind == "enum":
        spec = GrammarSpec.choice(format_.values)
    elif format_.kind == "json_object":
        spec = GrammarSpec.json_object()
    else:
        spec = GrammarSpec.json_schema({} if format_.schema is None else format_.schema)
    return await asyncio.to_thread(compile_grammar, spec, tokenizer)


def _size(ask: Ask) -> int:
    """Characters, about."""
    if ask.prompt is not None:
        return len(ask.prompt)
    return sum(len(turn.text) for turn in ask.turns)


def _usage(generations: Sequence[Generation], *, prompt_only: bool = False) -> Usage:
    first = generations[0]
    now = time.perf_counter()
    begun = first.first_token or now
    last = max((g.last_token for g in generations if g.last_token is not None), default=begun)
    return Usage(
        prompt_tokens=len(first.prompt),
        cached_tokens=first.cached_tokens,
        completion_tokens=0 if prompt_only else sum(len(g.generated) for g in generations),
        prompt_seconds=begun - first.submitted,
        completion_seconds=0.0 if prompt_only else last - begun,
    )


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in usages),
        cached_tokens=sum(u.cached_tokens for u in usages),
        completion_tokens=sum(u.completion_tokens for u in usages),
        prompt_seconds=max(u.prompt_seconds for u in usages),
        completion_seconds=max(u.completion_seconds for u in usages),
    )
