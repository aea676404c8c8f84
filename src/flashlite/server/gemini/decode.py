"""A Gemini request as an `Ask`.

contents, systemInstruction ──> turns      generationConfig ──> params, format
tools, toolConfig ──> tools, tool_choice   cachedContent ──> turns in front of the request's
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashlite.errors import BodyError
from flashlite.runtime.sampling import SamplingParams
from flashlite.server.bodies import sampling
from flashlite.server.exchange import Ask, Format, Tool, ToolCall, ToolChoice, Turn
from flashlite.server.gemini.bodies import (
    Config,
    Content,
    FunctionCalling,
    GenerateRequest,
    ToolConfig,
    ToolSet,
)
from flashlite.server.gemini.schema import closed, json_schema

__all__ = ["Beginning", "beginning", "generate_ask", "text_of"]

_ANY_JSON = {"type": ["object", "array"]}
_SEEDS = 1 << 64
_FIELDS = {  # of SamplingParams, as Gemini calls them
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "max_tokens": "maxOutputTokens",
    "logprobs": "logprobs",
    "seed": "seed",
    "stop": "stopSequences",
}


@dataclass(frozen=True, slots=True)
class Beginning:
    """The part of a conversation that may be cached."""

    turns: tuple[Turn, ...] = ()
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "auto"


def beginning(
    contents: Sequence[Content],
    system: Content | None,
    tools: Sequence[ToolSet],
    config: ToolConfig | None,
    before: Sequence[Turn] = (),
) -> Beginning:
    """What a body says, but for its settings.

    Args:
        before: turns in front of the contents, whose calls these may answer.

    Raises:
        BodyError: a part cannot be read, or a tool is named that is not declared.
    """
    turns: list[Turn] = []
    if system is not None:
        turns.append(Turn("system", text_of(system, "systemInstruction")))
    open_calls = [call for turn in before for call in turn.tool_calls]
    for index, content in enumerate(contents):
        for turn in _turns(content, f"contents[{index}]", len(before) + index, open_calls):
            if turns and turn.role == turns[-1].role == "assistant":
                turns[-1] = _joined(turns[-1], turn)
            else:
                turns.append(turn)
    declared = tuple(
        _tool(declaration, f"tools[{i}].functionDeclarations[{j}]")
        for i, entry in enumerate(tools)
        for j, declaration in enumerate(entry.function_declarations)
    )
    calling = config.function_calling_config if config else FunctionCalling()
    choice = _choice(calling, {tool.name for tool in declared})
    return Beginning(tuple(turns), () if choice == "none" else declared, choice)


def generate_ask(
    asked: GenerateRequest,
    model: str,
    *,
    cached: Beginning | None = None,
    client: str = "",
    deadline_s: float | None = None,
    most: int = 8,
) -> Ask:
    """The question of a body.

    Args:
        asked: the body.
        model: of the path.
        cached: what `cachedContent` names.
        client: who asks.
        deadline_s: seconds the answer may take.
        most: candidates of one request.

    Raises:
        BodyError: a value is outside its range, or cannot be honoured.
    """
    if not asked.contents:
        raise BodyError("contents", "the field `contents` is missing; send at least one message")
    if cached and (asked.system_instruction or asked.tools or asked.tool_config):
        raise BodyError(
            "cachedContent",
            "with cachedContent, systemInstruction, tools and toolConfig belong into the cache",
        )
    before = cached or Beginning()
    own = beginning(
        asked.contents, asked.system_instruction, asked.tools, asked.tool_config, before.turns
    )
    config = asked.generation_config
    if config.candidate_count > most:
        count = f"candidateCount is {config.candidate_count}, allowed 1 to {most}"
        raise BodyError("generationConfig.candidateCount", count)
    return Ask(
        model=model,
        turns=before.turns + own.turns,
        tools=before.tools or own.tools,
        tool_choice=before.choice if cached else own.choice,
        format=_format(config),
        params=_params(config),
        n=config.candidate_count,
        deadline_s=deadline_s,
        client=client,
    )


def text_of(content: Content, at: str) -> str:
    """The text of a message that may hold nothing else.

    Raises:
        BodyError: a part of it is no text.
    """
    _checked(content, at)
    for i, part in enumerate(content.parts):
        if part.text is None:
            raise BodyError(f"{at}.parts[{i}]", f"{at}.parts[{i}] must be text")
    return "".join(part.text or "" for part in content.parts)


def _checked(content: Content, at: str) -> None:
    if not content.parts:
        raise BodyError(f"{at}.parts", f"the field `{at}.parts` is empty; send at least one part")
    for i, part in enumerate(content.parts):
        place = f"{at}.parts[{i}]"
        for name, value in (("inlineData", part.inline_data), ("fileData", part.file_data)):
            if value is not None:
                raise BodyError(f"{place}.{name}", f"{place}.{name}: this model reads text alone")
        given = (part.text, part.function_call, part.function_response)
        if sum(value is not None for value in given) != 1:
            raise BodyError(
                place, f"{place} must have one of text, functionCall and functionResponse"
            )


def _turns(content: Content, at: str, number: int, open_calls: list[ToolCall]) -> list[Turn]:
    """One turn of the message, and one before it for each function that answered.

    `number`: of the message in the conversation; `open_calls` loses the answered and gains the new.
    """
    _checked(content, at)
    calls = _calls(content, number)
    turns = []
    for part in content.parts:
        if (answered := part.function_response) is not None:
            id_ = answered.id or _claim(answered.name, open_calls)
            text = json.dumps(answered.response, ensure_ascii=False)
            turns.append(Turn("tool", text, tool_call_id=id_, name=answered.name))
    open_calls += calls
    # Thoughts of earlier answers are not read again.
    texts = [part.text for part in content.parts if part.text is not None and not part.thought]
    if not turns or texts:
        roles = {"model": "assistant", "system": "system"}
        role = roles.get(content.role, "user")
        turns.append(Turn(role, "".join(texts), tuple(calls)))  # type: ignore[arg-type]
    return turns


def _joined(one: Turn, other: Turn) -> Turn:
    """One answer: Google's chats repeat a streamed one piece by piece."""
    return Turn("assistant", one.text + other.text, one.tool_calls + other.tool_calls)


def _calls(content: Content, number: int) -> list[ToolCall]:
    """Calls whose client left out the id are named after their place."""
    found = [part.function_call for part in content.parts if part.function_call is not None]
    return [
        ToolCall(
            call.id or f"call_{number}_{i}", call.name, json.dumps(call.args, ensure_ascii=False)
        )
        for i, call in enumerate(found)
    ]


def _claim(name: str, open_calls: list[ToolCall]) -> str | None:
    """The first unanswered call of a function: clients match by name and order."""
    for index, call in enumerate(open_calls):
        if call.name == name:
            return open_calls.pop(index).id
    return None


def _tool(declared: Any, at: str) -> Tool:
    if declared.parameters is not None and declared.parameters_json_schema is not None:
        raise BodyError(at, f"{at} has parameters and parametersJsonSchema; send one")
    if declared.parameters_json_schema is not None:
        return Tool(declared.name, declared.description, declared.parameters_json_schema)
    if declared.parameters is not None:
        schema = json_schema(declared.parameters, f"{at}.parameters")
        return Tool(declared.name, declared.description, schema)
    return Tool(declared.name, declared.description)


def _choice(calling: FunctionCalling, declared: set[str]) -> ToolChoice:
    names = calling.allowed_function_names
    at = "toolConfig.functionCallingConfig"
    if names and calling.mode != "ANY":
        raise BodyError(f"{at}.allowedFunctionNames", "allowedFunctionNames needs mode ANY")
    if calling.mode == "NONE":
        return "none"
    if calling.mode != "ANY":
        return "auto"  # VALIDATED as well: calls are always valid against their schema
    if not declared:
        raise BodyError(f"{at}.mode", "mode ANY needs functionDeclarations")
    if wrong := [name for name in names if name not in declared]:
        raise BodyError(
            f"{at}.allowedFunctionNames", f"{wrong[0][:64]!r} is not in functionDeclarations"
        )
    return tuple(names) or "required"


def _params(config: Config) -> SamplingParams:
    if config.logprobs is not None and not config.response_logprobs:
        raise BodyError("generationConfig.logprobs", "logprobs needs responseLogprobs: true")
    try:
        return sampling(
            config.stop_sequences,
            None,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            seed=None if config.seed is None else config.seed % _SEEDS,  # Gemini's has a sign
            max_tokens=config.max_output_tokens,
            logprobs=(config.logprobs or 0) if config.response_logprobs else None,
        )
    except BodyError as error:
        name = _FIELDS.get(error.param, error.param)
        message = str(error).replace(error.param, name, 1)
        raise BodyError(f"generationConfig.{name}", message) from None


def _format(config: Config) -> Format:
    at = "generationConfig.responseSchema"
    given, raw, kind = (
        config.response_schema,
        config.response_json_schema,
        config.response_mime_type,
    )
    if given is not None and raw is not None:
        raise BodyError(at, "send one of responseSchema and responseJsonSchema")
    if given is None and raw is None:
        if kind == "text/x.enum":
            raise BodyError(at, "text/x.enum needs a responseSchema with enum")
        return Format("json_schema", _ANY_JSON) if kind == "application/json" else Format()
    if kind not in ("application/json", "text/x.enum"):
        raise BodyError(
            "generationConfig.responseMimeType",
            "a response schema needs responseMimeType application/json or text/x.enum",
        )
    schema = json_schema(given, at) if raw is None else closed(raw)
    if not isinstance(schema, (dict, bool)):
        raise BodyError(
            "generationConfig.responseJsonSchema", "responseJsonSchema is not a JSON schema"
        )
    if kind == "application/json":
        return Format("json_schema", schema)
    values = schema.get("enum") if isinstance(schema, dict) else None
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise BodyError(f"{at}.enum", "text/x.enum needs a schema whose enum is a list of strings")
    return Format("enum", values=tuple(values))
