"""Events as OpenAI's chat completions: one object, or chunks of server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.runtime.sampler import Drawn
from flashlite.server.exchange import (
    CallArguments,
    CallStarted,
    Ended,
    Event,
    Finished,
    Reason,
    Started,
    TextDelta,
    Usage,
)
from flashlite.server.openai.refusal import body, refusal
from flashlite.server.problems import Problem

__all__ = ["ChatWire", "usage_of"]

_FINISH: dict[Reason, str] = {"cancelled": "stop"}  # the others are called the same


def usage_of(usage: Usage) -> dict[str, Any]:
    """`usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ChatWire:
    """Writes one chat completion."""

    media_type = "text/event-stream"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        fingerprint: str,
        *,
        n: int,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        """`fingerprint`: of what computes the answer; `include_usage`: a last chunk tells it."""
        self._tokenizer = tokenizer
        self._n = n
        self._wants_logprobs = logprobs
        self._include_usage = include_usage
        self._base = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, events: Sequence[Event]) -> bytes:
        """The completion."""
        choices = [self._choice(index, events) for index in range(self._n)]
        usage = next(event.usage for event in events if isinstance(event, Ended))
        return msgspec.json.encode(
            {
                **self._base,
                "object": "chat.completion",
                "choices": choices,
                "usage": usage_of(usage),
            }
        )

    def stream(self, event: Event) -> bytes:
        """A chunk: the role first, then text and calls, the finish reason, usage if asked."""
        if isinstance(event, Started):
            role = {"role": "assistant", "content": ""}
            return b"".join(self._chunk(index, role) for index in range(self._n))
        if isinstance(event, TextDelta):
            drawn = event.drawn if self._wants_logprobs else ()
            if not event.text and not drawn:
                return b""
            return self._chunk(event.choice, {"content": event.text}, drawn=drawn)
        if isinstance(event, CallStarted):
            call = {
                "index": event.index,
                "id": event.id,
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
            return self._chunk(event.choice, {"tool_calls": [call]})
        if isinstance(event, CallArguments):
            more = {"index": event.index, "function": {"arguments": event.text}}
            return self._chunk(event.choice, {"tool_calls": [more]})
        if isinstance(event, Finished):
            return self._chunk(event.choice, {}, _FINISH.get(event.reason, event.reason))
        last = b"data: [DONE]\n\n"
        if not self._include_usage:
            return last
        usage = {"choices": [], "usage": usage_of(event.usage)}
        return _sse({**self._base, "object": "chat.completion.chunk", **usage}) + last

    def failure(self, problem: Problem) -> bytes:
        """An error where a chunk would be."""
        return _sse(body(problem))

    def refusal(self, problem: Problem) -> Response:
        """An error with its status."""
        return refusal(problem)

    def _choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text, drawn, reason = "", list[Drawn](), "stop"
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, (Started, Ended)) or event.choice != index:
                continue
            if isinstance(event, TextDelta):
                text += event.text
                drawn += event.drawn
            elif isinstance(event, CallStarted):
                function = {"name": event.name, "arguments": ""}
                calls[event.index] = {"id": event.id, "type": "function", "function": function}
            elif isinstance(event, CallArguments):
                calls[event.index]["function"]["arguments"] += event.text
            else:
                reason = _FINISH.get(event.reason, event.reason)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": list(calls.values())}
        return {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": self._logprobs(drawn) if self._wants_logprobs else None,
        }

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        reason: str | None = None,
        drawn: Sequence[Drawn] = (),
    ) -> bytes:
        entry = {
            "index": choice,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": self._logprobs(drawn) if drawn else None,
        }
        return _sse({**self._base, "object": "chat.completion.chunk", "choices": [entry]})

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        return {
            "content": [
                self._token(d.token, d.logprob)
                | {"top_logprobs": [self._token(token, value) for token, value in d.top]}
                for d in drawn
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"
