r"""Tool calls: how tools are told to a model, what it may write, and calls out of what it wrote.

    tools ── show_tools ──> messages      tools ── tool_grammar ──> GrammarSpec
    text and tokens ── CallParser ──> TextDelta, CallStarted, CallArguments

The wire form is that of Qwen and Hermes: a line of JSON between two tags.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

The grammar holds every call to it and the arguments to the tool's schema, so no call is malformed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import UnsupportedSchema, UsageError
from flashlite.runtime.grammar import GrammarSpec, json_rule
from flashlite.runtime.sampler import Drawn
from flashlite.server.exchange import CallArguments, CallStarted, TextDelta, Tool, ToolChoice, Turn

__all__ = ["CallParser", "Tags", "chosen_tools", "show_tools", "tool_grammar"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MOST_TOOLS = 128
_MOST_CALLS = 16  # in one answer
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,127}")
_HEAD = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
_OPEN_WORDS = frozenset({"type", "properties", "required", "title", "description", "$schema"})


@dataclass(frozen=True, slots=True)
class Tags:
    """The ids of the tags where they are control tokens, which print nothing; else None."""

    open: int | None = None
    close: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Tags:
        """As this vocabulary has them."""
        ids = [tokenizer.find(tag) for tag in (_OPEN, _CLOSE)]
        if all(id_ in tokenizer.tokens.control for id_ in ids):
            return cls(*ids)
        return cls()


def chosen_tools(tools: Sequence[Tool], choice: ToolChoice) -> tuple[Tool, ...]:
    """The tools that may be called.

    Raises:
        UsageError: names are malformed or used twice, there are too many, or the choice asks for
            one that is not there.
    """
    names = [tool.name for tool in tools]
    if len(names) > _MOST_TOOLS:
        raise UsageError(f"there are {len(names)} tools, allowed {_MOST_TOOLS}")
    for name in names:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"the tool name {name[:60]!r} is malformed; use 1 to 128 letters, digits and _.:-"
            )
        if names.count(name) > 1:
            raise UsageError(f"the tool {name!r} is there twice; give each its own name")
    if choice == "none":
        return ()
    if choice in ("auto", "required"):
        if choice == "required" and not tools:
            raise UsageError("tool_choice is 'required' and there are no tools; give at least one")
        return tuple(tools)
    for name in choice:
        if name not in names:
            known = ", ".join(names)[:120] or "none"
            raise UsageError(f"tool_choice names {name[:60]!r}, which is no tool; known: {known}")
    return tuple(tool for tool in tools if tool.name in choice)


def show_tools(turns: Sequence[Turn], tools: Sequence[Tool]) -> list[dict[str, str]]:
    """The messages of a chat, tools, calls and their results included as text.

    Args:
        turns: the conversation.
        tools: those that may be called; described in the system message, in front where there is
            none. Without tools, calls and results of earlier turns are shown all the same.
    """
    messages: list[dict[str, str]] = []
    for turn in turns:
        role, text = turn.role, turn.text
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
            if messages and messages[-1]["role"] == "user" and _is_result(messages[-1]["content"]):
                messages[-1]["content"] += "\n" + text
                continue
        for call in turn.tool_calls:
            written = f'{{"name": {_json(call.name)}, "arguments": {call.arguments}}}'
            text += f"\n{_OPEN}\n{written}\n{_CLOSE}" if text else f"{_OPEN}\n{written}\n{_CLOSE}"
        messages.append({"role": role, "content": text})
    if tools:
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] += "\n\n" + _describe(tools)
        else:
            messages.insert(0, {"role": "system", "content": _describe(tools)})
    return messages


def tool_grammar(
    tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool, tags: Tags
) -> GrammarSpec | None:
    """What an answer may be: calls, or with the choice `auto` any text or calls after any text.

    Returns:
        None where nothing may be called: the text is free.

    Raises:
        UsageError: as `chosen_tools`.
        UnsupportedSchema: naming the tool and the feature of its parameters.
    """
    callable_ = chosen_tools(tools, choice)
    if not callable_:
        return None
    special = tags.open is not None
    opening = f"<[{tags.open}]>" if special else _json(_OPEN)
    closing = f"<[{tags.close}]>" if special else _json(_CLOSE)
    rules = ["%llguidance {}"]
    more = f' ("\\n" call){{0,{_MOST_CALLS - 1}}}' if parallel else ""
    if choice != "auto":
        rules += [f"start: call{more}"]
    elif special:
        rules += [f"start: TEXT | TEXT call{more}", r"TEXT: /(?s:.*)/"]
    else:
        tag = re.escape(_OPEN)
        rules += [
            f"start: text | first body{more}",
            "text: TEXT",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){tag}(?s:.*)/",
            f"first[lazy]: /(?s:.*){tag}/",
        ]
    rules.append(f"call: {opening} body")
    rules.append("body: " + " | ".join(f"body_{i}" for i in range(len(callable_))))
    for i, tool in enumerate(callable_):
        head = f'\n{{"name": {_json(tool.name)}, "arguments": '
        rules.append(f'body_{i}: {_json(head)} args_{i} "}}\\n" {closing}')
        rules.append(f"args_{i}: {_arguments(tool)}")
    return GrammarSpec.lark("\n".join(rules))


class CallParser:
    """Takes one choice's text as it comes and tells text from calls.

    Example:
        parser = CallParser(0, Tags(), ids=lambda: "call_1")
        events = [*parser.push(text, drawn), *parser.finish()]
    """

    def __init__(self, choice: int, tags: Tags, ids: Callable[[], str]) -> None:
        """Args: ids: makes a fresh id for each call."""
        self._choice = choice
        self._tags = tags
        self._ids = ids
        self._state = "text"  # then "head", "arguments", "tail", and again
        self._held = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._index = -1
        self.complete = 0  # calls whose arguments have ended

    def push(
        self, text: str, drawn: Sequence[Drawn] = ()
    ) -> list[TextDelta | CallStarted | CallArguments]:
        """What a piece of the generated text adds: text that may begin a tag is held back."""
        events: list[TextDelta | CallStarted | CallArguments] = []
        tokens = tuple(drawn) if self._state == "text" else ()
        for one in drawn:
            if one.token == self._tags.open and self._state in ("text", "tail"):
                self._say(events, self._held + text, ())
                self._held, self._state, text = "", "head", ""
        self._held += text
        while self._held and self._move(events):
            pass
        if tokens and self._state == "text":
            said = next((e for e in events if isinstance(e, TextDelta)), None)
            if said is not None:
                events.remove(said)
            events.append(TextDelta(self._choice, said.text if said else "", tokens))
        return events

    def finish(self) -> list[TextDelta | CallStarted | CallArguments]:
        """The text has ended: what was held back, unless it belongs to a call without a name."""
        events: list[TextDelta | CallStarted | CallArguments] = []
        if self._state == "text":
            self._say(events, self._held, ())
        self._held = ""
        return events

    def _move(self, events: list[TextDelta | CallStarted | CallArguments]) -> bool:
        """Take what can be taken of the held text; whether more may follow."""
        return {
            "text": self._text,
            "head": self._head,
            "arguments": self._arguments,
            "tail": self._tail,
        }[self._state](events)

    def _text(self, events: list[Any]) -> bool:
        before, tag, after = self._held.partition(_OPEN)
        if tag and self._tags.open is None:
            self._say(events, before, ())
            self._held, self._state = after, "head"
            return True
        keep = 0 if self._tags.open is not None else _may_begin(self._held, _OPEN)
        self._say(events, self._held[: len(self._held) - keep], ())
        self._held = self._held[len(self._held) - keep :]
        return False

    def _head(self, events: list[Any]) -> bool:
        found = _HEAD.match(self._held)
        if found is None:
            return False
        self._index += 1
        name = json.loads(found[1])
        events.append(CallStarted(self._choice, self._index, self._ids(), name))
        self._held, self._state = self._held[found.end() :], "arguments"
        self._depth = 0
        return True

    def _arguments(self, events: list[Any]) -> bool:
        for place, letter in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    end = place + 1
                    events.append(CallArguments(self._choice, self._index, self._held[:end]))
                    self._held, self._state = self._held[end:], "tail"
                    self.complete += 1
                    return True
        events.append(CallArguments(self._choice, self._index, self._held))
        self._held = ""
        return False

    def _tail(self, events: list[Any]) -> bool:
        """Closing brace, closing tag, and the line before the next call: nobody's text."""
        at = self._held.find(_OPEN)
        if self._tags.open is None and at >= 0:
            self._held, self._state = self._held[at + len(_OPEN) :], "head"
            return True
        self._held = self._held[-(len(_OPEN) - 1) :]
        return False

    def _say(self, events: list[Any], text: str, drawn: tuple[Drawn, ...]) -> None:
        if text:
            events.append(TextDelta(self._choice, text, drawn))


def _arguments(tool: Tool) -> str:
    schema = dict(tool.parameters)
    kind = schema.setdefault("type", "object")
    if kind != "object":
        raise UnsupportedSchema(f"tool {tool.name}: parameters of type {kind!r:.40}, not object")
    if schema.keys() <= _OPEN_WORDS:  # what a tool does not declare it does not take
        schema["additionalProperties"] = False
    try:
        return json_rule(schema)
    except UnsupportedSchema as error:
        raise UnsupportedSchema(f"tool {tool.name}: {error.feature}", error.at) from None


def _describe(tools: Sequence[Tool]) -> str:
    lines = [
        "# Tools",
        "",
        "You may call one or more functions to assist with the user query.",
        "",
        "You are provided with function signatures within <tools></tools> XML tags:",
        "<tools>",
        *(
            _json(
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": dict(tool.parameters),
                    },
                }
            )
            for tool in tools
        ),
        "</tools>",
        "",
        "For each function call, return a json object with function name and arguments within "
        f"{_OPEN}{_CLOSE} XML tags:",
        _OPEN,
        '{"name": <function-name>, "arguments": <args-json-object>}',
        _CLOSE,
    ]
    return "\n".join(lines)


def _is_result(text: str) -> bool:
    return text.startswith("<tool_response>\n") and text.endswith("\n</tool_response>")


def _may_begin(text: str, tag: str) -> int:
    """How many letters at the end of a text may begin the tag."""
    for n in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-n:]):
            return n
    return 0


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
