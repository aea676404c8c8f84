"""Whether a grammar accepts a JSON value, in whatever order its members are written.

A grammar writes members in the order of the schema, and a value has none. A walk with one byte at a
time finds the order in which the value would be written, if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llguidance

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.runtime.grammar import Grammar, _exact, _grammar_of

__all__ = ["accepts", "accepts_text", "order_of"]

_BYTES = llguidance.LLTokenizer("byte", slices=[])
_MOST_TRIES = 300


def accepts_text(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """With the model's own vocabulary, as a request would be."""
    matcher = grammar._matcher.deep_copy()
    ids = tokenizer.encode(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def accepts(grammar: Grammar, tokenizer: Tokenizer, schema: Any, value: Any) -> bool:
    """Whether the value is accepted in some order of its members."""
    if accepts_text(grammar, tokenizer, json.dumps(value, ensure_ascii=False)):
        return True
    text = order_of(schema, value)
    return text is not None and accepts_text(grammar, tokenizer, text)


def order_of(schema: Any, value: Any) -> str | None:
    """The text of a value that the schema's grammar accepts, None where there is none."""
    grammar = _grammar_of(_exact(schema))
    matcher = llguidance.LLMatcher(_BYTES, grammar, log_level=0)
    walk = _Walk(schema)
    for end, text in walk.texts(matcher, value):
        if end.is_accepting():
            return text
    return None


class _Walk:
    def __init__(self, schema: Any) -> None:
        self._rank: dict[str, int] = {}
        self._rank_names(schema)
        self._tries = 0

    def texts(self, matcher: Any, value: Any) -> Iterator[tuple[Any, str]]:
        """The matcher after each way to write the value, and the way."""
        self._tries += 1
        if self._tries > _MOST_TRIES:
            return
        if isinstance(value, dict) and value:
            yield from self._members(_fed(matcher, "{"), value, "{")
        elif isinstance(value, list) and value:
            yield from self._items(_fed(matcher, "["), value, "[")
        else:
            text = json.dumps(value, ensure_ascii=False)
            if (after := _fed(matcher, text)) is not None:
                yield after, text

    def _items(self, matcher: Any, rest: list[Any], text: str) -> Iterator[tuple[Any, str]]:
        if matcher is None:
            return
        for after, written in self.texts(matcher, rest[0]):
            end = ", " if rest[1:] else "]"
            closed, so_far = _fed(after, end), text + written + end
            if rest[1:]:
                yield from self._items(closed, rest[1:], so_far)
            elif closed is not None:
                yield closed, so_far

    def _members(self, matcher: Any, rest: dict[str, Any], text: str) -> Iterator[tuple[Any, str]]:
        if matcher is None:
            return
        if not rest:
            if (closed := _fed(matcher, "}")) is not None:
                yield closed, text + "}"
            return
        for name in sorted(rest, key=lambda name: self._rank.get(name, 1 << 30)):
            key = ("" if text.endswith("{") else ", ") + json.dumps(name, ensure_ascii=False) + ": "
            if (named := _fed(matcher, key)) is None:
                continue
            left = {k: v for k, v in rest.items() if k != name}
            for after, written in self.texts(named, rest[name]):
                yield from self._members(after, left, text + key + written)

    def _rank_names(self, schema: Any) -> None:
        if isinstance(schema, dict):
            for key, part in schema.items():
                if key == "properties" and isinstance(part, dict):
                    for name in part:
                        self._rank.setdefault(name, len(self._rank))
                self._rank_names(part)
        elif isinstance(schema, list):
            for part in schema:
                self._rank_names(part)


def _fed(matcher: Any, text: str) -> Any:
    after = matcher.deep_copy()
    ids = list(text.encode())
    return after if after.try_consume_tokens(ids) == len(ids) else None
