"""Events as Gemini's `GenerateContentResponse`: one object, server-sent events or a JSON array.

A server-sent event is `data: {json}` and a blank line and nothing else: Google's clients fail on
comments, `event:` lines and `[DONE]`. A stream's calls come whole, in its last piece, with the
finish reasons; clients that run functions themselves then see all of a turn's calls at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import Response

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.runtime.sampler import Drawn
from flashlite.server.errors import gemini_body
from flashlite.server.exchange import (
    CallArguments,
    CallStarted,
    Ended,
    Event,
    Reason,
    Started,
    TextDelta,
    Usage,
)
from flashlite.server.problems import Problem

__all__ = ["GeminiWire", "refusal", "usage_of"]

_FINISH: dict[Reason, str] = {
    "stop": "STOP",
    "length": "MAX_TOKENS",
    "tool_calls": "STOP",
    "content_filter": "SAFETY",
    "cancelled": "OTHER",
    "deadline": "OTHER",
}
_WHY: dict[Reason, str] = {
    "cancelled": "the answer was cancelled; it is a part",
    "deadline": "the deadline passed; the answer is a part",
}
_LEAST = -9999.0  # JSON has no infinity


def refusal(problem: Problem) -> Response:
    """The answer that there is none."""
    content = msgspec.json.encode(gemini_body(problem))
    return Response(content, problem.status, problem.headers, "application/json")


def usage_of(usage: Usage) -> dict[str, Any]:
    """`usageMetadata`; no model here thinks."""
    return {
        "promptTokenCount": usage.prompt_tokens,
        "candidatesTokenCount": usage.completion_tokens,
        "totalTokenCount": usage.total_tokens,
        "cachedContentTokenCount": usage.cached_tokens,
        "thoughtsTokenCount": 0,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": usage.prompt_tokens}],
    }


@dataclass
class _Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class _Candidate:
    """What is known of a choice and was not sent."""

    text: str = ""
    drawn: list[Drawn] = field(default_factory=list)
    calls: dict[int, _Call] = field(default_factory=dict)
    reason: Reason | None = None


class GeminiWire:
    """Writes one answer."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        n: int = 1,
        logprobs: int | None = None,
        sse: bool = True,
    ) -> None:
        """`logprobs`: how many alternatives to tell, None: no logprobs at all."""
        self.media_type = "text/event-stream" if sse else "application/json"
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._sse = sse
        self._candidates = [_Candidate() for _ in range(n)]
        self._usage = Usage()
        self._written = False  # something of a JSON array
        self._base = {"modelVersion": model, "responseId": uuid.uuid4().hex}

    def whole(self, events: Sequence[Event]) -> bytes:
        """The response."""
        for event in events:
            self._take(event)
        return msgspec.json.encode(self._response(range(len(self._candidates))))

    def stream(self, event: Event) -> bytes:
        """A piece: text as it comes, and at the end what is left of every candidate."""
        self._take(event)
        if isinstance(event, TextDelta):
            waiting = self._candidates[event.choice]
            if waiting.text or (waiting.drawn and self._logprobs is not None):
                return self._piece(self._response([event.choice], parting=False))
        if isinstance(event, Ended):
            last = self._piece(self._response(range(len(self._candidates))))
            return last if self._sse else last + b"]"
        return b""

    def failure(self, problem: Problem) -> bytes:
        """An error where a piece would be."""
        return self._piece(gemini_body(problem)) + (b"" if self._sse else b"]")

    def refusal(self, problem: Problem) -> Response:
        """An error with its status."""
        return refusal(problem)

    def _piece(self, body: dict[str, Any]) -> bytes:
        if self._sse:
            return b"data: " + msgspec.json.encode(body) + b"\n\n"
        before = b",\r\n" if self._written else b"["
        self._written = True
        return before + msgspec.json.encode(body)

    def _take(self, event: Event) -> None:
        if isinstance(event, (Started, Ended)):
            self._usage = event.usage
            return
        candidate = self._candidates[event.choice]
        if isinstance(event, TextDelta):
            candidate.text += event.text
            candidate.drawn += event.drawn
        elif isinstance(event, CallStarted):
            candidate.calls[event.index] = _Call(event.id, event.name)
        elif isinstance(event, CallArguments):
            candidate.calls[event.index].arguments += event.text
        else:
            candidate.reason = event.reason

    def _response(self, choices: Sequence[int], *, parting: bool = True) -> dict[str, Any]:
        """What these candidates have not sent; `parting`: calls and finish reasons as well."""
        return {
            "candidates": [self._candidate(choice, parting) for choice in choices],
            "usageMetadata": usage_of(self._usage),
            **self._base,
        }

    def _candidate(self, index: int, parting: bool) -> dict[str, Any]:
        known = self._candidates[index]
        made: dict[str, Any] = {"index": index}
        parts: list[dict[str, Any]] = [{"text": known.text}] if known.text else []
        if parting:
            reason = known.reason or "stop"
            made["finishReason"] = _FINISH[reason]
            if reason in _WHY:
                made["finishMessage"] = _WHY[reason]
            try:
                parts += [_function_call(call) for call in known.calls.values()]
            except (msgspec.DecodeError, TypeError):
                made["finishReason"] = "MALFORMED_FUNCTION_CALL"
                made["finishMessage"] = "the arguments of a call are no JSON object"
        # Clients drop a turn without parts from their history.
        made["content"] = {"role": "model", "parts": parts or [{"text": ""}]}
        if self._logprobs is not None and known.drawn:
            made |= self._spell(known.drawn)
        known.text, known.drawn = "", []
        return made

    def _spell(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        chosen = [self._token(d.token, d.logprob) for d in drawn]
        result: dict[str, Any] = {"chosenCandidates": chosen}
        if self._logprobs:
            result["topCandidates"] = [
                {"candidates": [self._token(token, value) for token, value in d.top]} for d in drawn
            ]
        mean = sum(token["logProbability"] for token in chosen) / len(chosen)
        return {"avgLogprobs": mean, "logprobsResult": result}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_bytes(token).decode("utf-8", errors="replace")
        return {"token": text, "tokenId": token, "logProbability": max(logprob, _LEAST)}


def _function_call(call: _Call) -> dict[str, Any]:
    arguments = msgspec.json.decode(call.arguments or "{}")
    if not isinstance(arguments, dict):
        raise TypeError("arguments are an object")
    return {"functionCall": {"id": call.id, "name": call.name, "args": arguments}}
