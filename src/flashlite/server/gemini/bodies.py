"""The bodies of Gemini's requests, in camelCase; `plain.read` makes them of either spelling.

What is not declared here is a 400 that names the field. Fields of type `Any` without a comment are
about Google's own accounts and services and change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from flashlite.server.bodies import Name, Text

__all__ = [
    "BatchEmbedRequest",
    "CacheRequest",
    "Config",
    "Content",
    "CountRequest",
    "Declaration",
    "EmbedRequest",
    "FunctionCall",
    "FunctionCalling",
    "FunctionResponse",
    "GenerateRequest",
    "Part",
    "Safety",
    "Thinking",
    "ToolConfig",
    "ToolSet",
]

_FunctionName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_.:-]{0,127}$")]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename="camel"):
    """A part of a body."""


class FunctionCall(_Strict):
    """A call that the model made."""

    name: _FunctionName
    id: Name | None = None
    args: dict[str, Any] = {}


class FunctionResponse(_Strict):
    """What the function answered; without an id, the first open call of the name is meant."""

    name: _FunctionName
    id: Name | None = None
    response: dict[str, Any] = {}
    scheduling: Any = None
    will_continue: Literal[False] = False


class Part(_Strict):
    """One of text, call and response; media are declared only to be refused by name."""

    text: Text | None = None
    thought: bool = False
    thought_signature: Any = None
    function_call: FunctionCall | None = None
    function_response: FunctionResponse | None = None
    inline_data: Any = None
    file_data: Any = None
    video_metadata: Any = None
    media_resolution: Any = None
    part_metadata: Any = None


class Content(_Strict):
    """A message."""

    parts: Annotated[list[Part], msgspec.Meta(max_length=2048)] = []
    role: Literal["user", "model", "function", "system", ""] = "user"


class Thinking(_Strict):
    """Of models that think; for the others every value is honoured, as none of it is used."""

    include_thoughts: bool = False
    thinking_budget: int | None = None
    thinking_level: Name | None = None


class Config(_Strict):
    """`generationConfig`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    candidate_count: Annotated[int, msgspec.Meta(ge=1)] = 1
    max_output_tokens: int | None = None
    stop_sequences: Annotated[list[str], msgspec.Meta(max_length=16)] = []
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    response_logprobs: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_mime_type: Literal["text/plain", "application/json", "text/x.enum", ""] = ""
    response_schema: Any = None
    response_json_schema: Any = None
    response_modalities: list[Literal["TEXT", "text"]] = []
    thinking_config: Thinking | None = None
    media_resolution: Any = None
    enable_enhanced_civic_answers: Any = None


class Declaration(_Strict):
    """A function that the client can run; what it answers is not constrained."""

    name: _FunctionName
    description: Text = ""
    parameters: Any = None
    parameters_json_schema: dict[str, Any] | None = None
    response: Any = None
    response_json_schema: Any = None
    behavior: Any = None


class ToolSet(_Strict):
    """An entry of `tools`."""

    function_declarations: Annotated[list[Declaration], msgspec.Meta(max_length=128)] = []


class FunctionCalling(_Strict):
    """`functionCallingConfig`."""

    mode: Literal["MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED"] = "AUTO"
    allowed_function_names: list[str] = []


class ToolConfig(_Strict):
    """`toolConfig`."""

    function_calling_config: FunctionCalling = msgspec.field(default_factory=FunctionCalling)


class Safety(_Strict):
    """Checked and not acted on: no model here scores these categories."""

    category: Annotated[str, msgspec.Meta(pattern="^HARM_CATEGORY_[A-Z_]{1,64}$")]
    threshold: Literal[
        "HARM_BLOCK_THRESHOLD_UNSPECIFIED",
        "BLOCK_LOW_AND_ABOVE",
        "BLOCK_MEDIUM_AND_ABOVE",
        "BLOCK_ONLY_HIGH",
        "BLOCK_NONE",
        "OFF",
    ]


class _Conversation(_Strict):
    """What a request and a cached content share."""

    contents: Annotated[list[Content], msgspec.Meta(max_length=2048)] = []
    system_instruction: Content | None = None
    tools: Annotated[list[ToolSet], msgspec.Meta(max_length=128)] = []
    tool_config: ToolConfig | None = None
    model: Name = ""


class GenerateRequest(_Conversation):
    """Body of `:generateContent` and `:streamGenerateContent`."""

    generation_config: Config = msgspec.field(default_factory=Config)
    safety_settings: Annotated[list[Safety], msgspec.Meta(max_length=64)] = []
    cached_content: Name = ""
    labels: Any = None
    service_tier: Any = None
    store: Any = None
    deadline_ms: Any = None  # ours: how long the answer may take


class CountRequest(_Strict):
    """Body of `:countTokens`: contents, or a whole request."""

    contents: Annotated[list[Content], msgspec.Meta(max_length=2048)] = []
    generate_content_request: GenerateRequest | None = None


class EmbedRequest(_Strict):
    """Body of `:embedContent`; what the vectors are for changes nothing with these encoders."""

    content: Content
    model: Name = ""
    task_type: Any = None
    title: Any = None
    output_dimensionality: int | None = None


class BatchEmbedRequest(_Strict):
    """Body of `:batchEmbedContents`."""

    requests: Annotated[list[EmbedRequest], msgspec.Meta(min_length=1, max_length=2048)]


class CacheRequest(_Conversation):
    """Body of a POST of `cachedContents`; a PATCH may change its end alone."""

    ttl: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?s$")] | None = None
    expire_time: Name | None = None
    display_name: Annotated[str, msgspec.Meta(max_length=128)] = ""
