"""The body of a chat completion as an `Ask`.

Fields that clients send and that change nothing here are accepted and ignored (`_Ignored`); any
other unknown field is a 400 that names it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from flashlite.errors import BodyError
from flashlite.server.bodies import Name, Text, decode, sampling
from flashlite.server.exchange import Ask, Format, Tool, ToolCall, ToolChoice, Turn

__all__ = ["ChatRequest", "StreamOptions", "chat_ask", "read_chat"]

_ToolName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of a body."""


class _Ignored(_Strict, kw_only=True):
    """What clients send about accounts, billing and caches of OpenAI's own."""

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    verbosity: Any = None
    reasoning_effort: Any = None  # of models that think
    prediction: Any = None  # a hint; drafts come from the text itself
    modalities: list[Literal["text"]] | None = None


class _Part(_Strict, kw_only=True):
    type: Literal["text"]
    text: Text


class _Function(_Strict, kw_only=True):
    name: _ToolName
    arguments: Text = "{}"


class _Call(_Strict, kw_only=True):
    id: Name
    function: _Function
    type: Literal["function"] = "function"
    index: int | None = None


class _Message(_Strict, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[_Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[_Call], msgspec.Meta(max_length=128)] | None = None
    tool_call_id: Name | None = None
    # What SDKs repeat of our own answers.
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    reasoning_content: Any = None

    def turn(self, index: int) -> Turn:
        if self.content is None and self.role != "assistant":
            field = f"messages[{index}].content"
            raise BodyError(field, f"{field} is missing; only an assistant may have none")
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in self.tool_calls or ()
        )
        role = "system" if self.role == "developer" else self.role
        return Turn(role, text, calls, self.tool_call_id, self.name)


class _Declaration(_Strict, kw_only=True):
    name: _ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(_Strict, kw_only=True):
    function: _Declaration
    type: Literal["function"] = "function"


class _Named(_Strict, kw_only=True):
    name: _ToolName


class _Choice(_Strict, kw_only=True):
    function: _Named
    type: Literal["function"] = "function"


class _Schema(_Strict, kw_only=True):
    name: Name = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: Text | None = None


class _Format(_Strict, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    def format(self) -> Format:
        if self.type != "json_schema":
            return Format(self.type)
        if self.json_schema is None or self.json_schema.schema is None:
            raise BodyError(
                "response_format.json_schema", "response_format json_schema has no schema"
            )
        return Format("json_schema", self.json_schema.schema, self.json_schema.strict is not False)


class StreamOptions(_Strict, kw_only=True):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Ignored, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=2048)]
    model: Name = ""
    stream: bool | None = None
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
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    tools: Annotated[list[_Tool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | _Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    deadline_ms: Any = None


def read_chat(body: bytes) -> ChatRequest:
    """The checked body.

    Raises:
        BodyError, UsageError: as `decode`.
    """
    asked = decode(body, ChatRequest)
    if asked.stream_options is not None and not asked.stream:
        raise BodyError("stream_options", "stream_options needs stream: true")
    if asked.top_logprobs is not None:
        if not 0 <= asked.top_logprobs <= 20:
            raise BodyError(
                "top_logprobs", f"top_logprobs is {asked.top_logprobs}, allowed 0 to 20"
            )
        if asked.top_logprobs and not asked.logprobs:
            raise BodyError("top_logprobs", "top_logprobs needs logprobs: true")
    return asked


def chat_ask(asked: ChatRequest, *, client: str, deadline_s: float | None, most: int) -> Ask:
    """The question of a body.

    Args:
        client: who asks.
        deadline_s: seconds the answer may take.
        most: choices of one request.

    Raises:
        BodyError: a value is outside its range.
    """
    n = asked.n or 1
    if n > most:
        raise BodyError("n", f"n is {n}, allowed 1 to {most}")
    limit = asked.max_completion_tokens
    choice: ToolChoice = (
        (asked.tool_choice.function.name,)
        if isinstance(asked.tool_choice, _Choice)
        else asked.tool_choice or "auto"
    )
    tools = tuple(_tool(tool.function) for tool in asked.tools or ())
    return Ask(
        model=asked.model,
        turns=tuple(message.turn(i) for i, message in enumerate(asked.messages)),
        tools=() if choice == "none" else tools,
        tool_choice=choice,
        parallel_tools=asked.parallel_tool_calls is not False,
        format=asked.response_format.format() if asked.response_format else Format(),
        params=sampling(
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
            max_tokens=asked.max_tokens if limit is None else limit,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        ),
        n=n,
        deadline_s=deadline_s,
        client=client,
    )


def _tool(declared: _Declaration) -> Tool:
    if declared.parameters is None:
        return Tool(declared.name, declared.description or "")
    return Tool(declared.name, declared.description or "", declared.parameters)
