"""What a client may send: every field typed and bounded; unknown ones are refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flashlite.runtime.sampling import SamplingParams

__all__ = ["ChatMessage", "ChatRequest", "StreamOptions", "TextPart"]

_Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """One part of a message given as a list."""

    type: Literal["text"]
    text: _Text


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    name: Annotated[str, msgspec.Meta(max_length=64)] | None = None

    @property
    def text(self) -> str:
        """The message's text, parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options` of a request."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=2048)]
    model: Annotated[str, msgspec.Meta(max_length=256)] = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], msgspec.Meta(max_length=4096)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    n: Literal[1] = 1
    user: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    deadline_ms: float | None = None

    def sampling(self) -> SamplingParams:
        """The checked settings; what was not sent keeps OpenAI's default of temperature 1.

        Raises:
            UsageError: a value is outside its range.
        """
        stop = (
            () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.max_completion_tokens
        given = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "max_tokens": self.max_tokens if limit is None else limit,
        }
        params = SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            stop=tuple(stop),
            logprobs=logprobs,
            logit_bias=_token_ids(self.logit_bias or {}),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        params.check()
        return params


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    from flashlite.errors import UsageError

    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise UsageError("logit_bias has a key that is not a token id") from None
