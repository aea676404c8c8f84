"""Which tokens may come next: JSON schemas, choices, patterns and tool calls as grammars.

    GrammarSpec ── compile_grammar ──> Grammar ── start ──> Guide (one for each request)
    logits ── Guide.allow ──> draw ── Guide.accept ──> forced tokens

`llguidance` does the parsing (MIT, no dependencies of its own). What it would ignore or only
approximate is refused (`runtime/schema.py`), so nothing is accepted that the schema forbids.
Compiling is bounded by counts, not by a clock, so a schema is accepted everywhere or nowhere.

JSON is written on one line, keys in the order of the schema, with ", " and ": ": where space is
free, small models fill it, and fewer tokens are forced. `\\u` escapes are left out, since a key
spelled with them would pass as another one.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import EngineError, FlashliteError, MissingExtra, UnsupportedSchema
from flashlite.runtime.complement import Schema
from flashlite.runtime.schema import simplify

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["Grammar", "GrammarSpec", "Guide", "compile_grammar", "dead_end", "json_rule"]

_JSON_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf"\\',
    "lenient": False,
    "coerce_one_of": False,
}
_MOST_SOURCE = 1 << 19  # characters of a grammar
_MOST_CHOICES = 1000
_MOST_KEPT = 16  # compiled grammars of one model
# A state of the lexer takes 1 to 2 kB, a symbol of the grammar about 100 bytes.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 15 ms
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a text must be; equal specs share one compiled grammar.

    Example:
        GrammarSpec.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    """

    kind: Literal["json_schema", "choice", "regex", "lark"]
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> GrammarSpec:
        """JSON that is valid against a schema (drafts 4 to 2020-12).

        Raises:
            UnsupportedSchema: it is not JSON.
        """
        try:
            return cls("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UnsupportedSchema(f"a schema that is no JSON ({error})") from None

    @classmethod
    def json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def choice(cls, values: Sequence[str]) -> GrammarSpec:
        """One of these texts, as it stands, without quotes.

        Raises:
            UnsupportedSchema: there is none, too many, or one is empty or no text.
        """
        if not 1 <= len(values) <= _MOST_CHOICES:
            raise UnsupportedSchema(f"{len(values)} choices, allowed 1 to {_MOST_CHOICES}")
        if not all(isinstance(value, str) and value for value in values):
            raise UnsupportedSchema("a choice that is empty or no text")
        return cls("choice", json.dumps(list(values), ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> GrammarSpec:
        """A text that matches from its first to its last character (syntax of Rust's `regex`)."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> GrammarSpec:
        """A grammar in llguidance's Lark; JSON inside it comes from `json_rule`."""
        return cls("lark", source)


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """A schema as an expression of a Lark grammar.

    Raises:
        UnsupportedSchema: naming the feature.
    """
    simple = _exact(schema)
    plain = {} if isinstance(simple, bool) else simple  # `False` was refused
    return "%json " + json.dumps({"x-guidance": _JSON_OPTIONS, **plain})


class Guide:
    """The place of one request in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """The text is complete, and nothing may follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def force(self) -> list[int]:
        """Take the tokens that must come next, in the vocabulary's own cut of the forced text.

        Raises:
            EngineError: the grammar is too ambiguous to go on.
        """
        tokens: list[int] = self._matcher.compute_ff_tokens()
        forced = tokens[: self._matcher.validate_tokens(tokens)] if tokens else []
        if forced and self._matcher.try_consume_tokens(forced) != len(forced):
            raise self._failure()
        return forced

    def allow(self, logits: NDArray[np.float32]) -> None:
        """Set every logit to -inf whose token may not come next; end tokens may where the text
        may end.

        Args:
            logits: one row, modified.

        Raises:
            EngineError: no token may come next.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or not bits.any():
            raise self._failure()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def accept(self, token: int) -> list[int]:
        """Move past a drawn token, which `allow` let through; returns what `force` does.

        Raises:
            EngineError: the grammar does not know the token.
        """
        if not self._matcher.consume_token(token):
            raise self._failure()
        return [] if self._matcher.is_stopped() else self.force()

    def _failure(self) -> EngineError:
        return EngineError(" ".join(self._matcher.get_error().split())[:160] or "dead end")


def dead_end(why: str) -> EngineError:
    """What a request ends with whose grammar leaves it no next token."""
    return EngineError(
        f"no next token is allowed by the grammar ({why}); simplify the schema, or remove the "
        "logit_bias that forbids what it needs"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar; requests share it."""

    spec: GrammarSpec
    _matcher: LLMatcher

    def start(self) -> Guide:
        """A guide at the beginning of the text."""
        return Guide(self._matcher.deep_copy())


def compile_grammar(spec: GrammarSpec, tokenizer: Tokenizer) -> Grammar:
    """Compile for one vocabulary: milliseconds, one at a time; equal specs are compiled once.

    Raises:
        UnsupportedSchema: naming the feature that cannot be enforced, or the limit it exceeds.
        MissingExtra: llguidance is not installed.
    """
    with _building:
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return vocabulary.compile(spec)


_building = threading.Lock()


class _Vocabulary:
    """A model's tokens as llguidance reads them (a trie: 3 MB for 49 thousand), and the grammars
    compiled for it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper
        except ImportError:
            raise MissingExtra("structured output", "serve") from None
        if not tokenizer.tokens.eos:
            raise UnsupportedSchema(f"a grammar: {tokenizer.name} has no end token")
        self.tokenizer: LLTokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(tokenizer)),
            eos_token=list(tokenizer.tokens.eos),
            slices=[],  # they would take 17 to 66 MB for masks that are fast enough
        )
        self._limits: LLParserLimits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> Grammar:
        with self._lock:
            grammar = self._kept.get(spec)
            if grammar is None:
                grammar = self._kept[spec] = Grammar(spec, self._matcher(spec))
            self._kept.move_to_end(spec)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return grammar

    def _matcher(self, spec: GrammarSpec) -> LLMatcher:
        if len(spec.source) > _MOST_SOURCE:
            raise UnsupportedSchema(
                f"a {spec.kind} of {len(spec.source)} characters, allowed {_MOST_SOURCE}"
            )
        if spec.kind != "json_schema":
            return self._open(_source(spec))
        return self._open(_grammar_of(_exact(json.loads(spec.source))))

    def _open(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refusal(matcher)
        if not any(matcher.compute_bitmask()) or matcher.is_error():
            raise UnsupportedSchema("a grammar that no text satisfies")
        return matcher


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()


class _Tokens:
    """What `TokenizerWrapper` asks of a tokenizer; it does not keep it alive."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = frozenset(tokenizer.tokens.control)
        self.eos_token_id = tokenizer.tokens.eos[0]
        self.bos_token_id = tokenizer.tokens.bos
        self.special_token_ids = sorted(control)
        self.tokens = [
            tokenizer.spelling(id_).encode() if id_ in control else tokenizer.token_bytes(id_)
            for id_ in range(tokenizer.vocab_size)
        ]
        self._tokenizer = weakref.ref(tokenizer)
        # SentencePiece puts a space before a text; behind another character it does not.
        self._mark = "" if tokenizer.decode(tokenizer.encode("a")) == "a" else "\x02"
        self._marks = len(tokenizer.encode(self._mark))

    def __call__(self, text: bytes) -> list[int]:
        """The vocabulary's own cut of a forced text; nothing where the tokenizer refuses it, and
        then its tokens are drawn one by one.
        """
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return []
        try:
            return tokenizer.encode(self._mark + text.decode())[self._marks :]
        except (FlashliteError, UnicodeDecodeError):
            return []


def _refusal(matcher: LLMatcher) -> UnsupportedSchema:
    """Of a pattern the parser's message has many lines; the one that says why begins `error:`."""
    lines = matcher.get_error().strip().splitlines() or ["a grammar"]
    return UnsupportedSchema(next((x for x in lines if x.startswith("error: ")), lines[0]))


def _source(spec: GrammarSpec) -> str:
    from llguidance import LLMatcher

    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    if spec.kind == "choice":
        values = json.loads(spec.source)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, values)))
    return LLMatcher.grammar_from_lark(spec.source)


def _grammar_of(schema: Schema) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise UnsupportedSchema(str(error)) from None


def _exact(schema: object) -> Schema:
    """The schema in words that llguidance carries out; `oneOf` is expanded where it must be."""
    from llguidance import LLMatcher

    simple = simplify(schema)
    failed, messages = LLMatcher.validate_grammar_with_warnings(_grammar_of(simple))
    if failed and "oneOf" in messages[0]:
        return simplify(schema, expand_one_of=True)
    return simple
