"""How much memory a running model may take: sizes as people write them, a ledger that names every
term, and the plan that keeps their sum within a ceiling.

    make_ledger (model.py) -> Ledger -> plan_memory -> MemoryPlan: context, arena, every term
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flashlite.errors import MemoryCeiling, UsageError

__all__ = [
    "LOGPROB_BYTES",
    "REQUEST_BYTES",
    "TEMPLATE_BYTES",
    "TEXT_BYTES",
    "TOKENIZER_GROWTH",
    "TOKEN_BYTES",
    "Ledger",
    "MemoryPlan",
    "format_size",
    "parse_size",
    "plan_memory",
    "text_limit",
]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]?I?B?)", re.IGNORECASE | re.ASCII)
_FEWEST_TOKENS = 64
_SHARE = 4  # without a ceiling, the arena takes one part in this many of the free memory

# What Python holds beside the engine; tests/runtime/test_ceiling.py measures them.
TOKEN_BYTES = 512  # per position of a running request: ids, history, pieces of text not yet read
REQUEST_BYTES = 1 << 18  # per running request, whatever its length: bias, decoder, stop strings
LOGPROB_BYTES = 160  # per likely token that is reported, beside that
TEXT_BYTES = 400  # to tokenize one byte of UTF-8, at worst, until it is done
TOKENIZER_GROWTH = 18  # building a vocabulary takes this many times its file, until it is done
TEMPLATE_BYTES = 5 << 20  # the library of chat templates, and one compiled
_TEXT_PER_TOKEN = 8  # bytes of text that one position of context stands for, at least
_SHORTEST_TEXT = 1 << 14  # bytes of text that are always taken
_PAGE_BYTES = 1 << 10  # per KV page: its place in the tables and in the prefix tree
_MEASURED = 1 << 20  # what `runtime` differs by from one start to the next
_MARGIN = 6 << 20  # code read on first use, fragments of the heap


def parse_size(text: str | int) -> int:
    """Bytes of `2GB` (decimal), `2GiB` (binary) or a number.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    match = _SIZE.fullmatch(str(text).strip())
    unit = match.group(2).upper() if match else ""
    unit = unit + "B" if unit in ("K", "M", "G", "KI", "MI", "GI") else unit
    if match is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write 2GB, 1.5GiB, 500MB or a number of bytes")
    size = int(float(match.group(1)) * _UNITS[unit])
    if size <= 0:
        raise UsageError(f"{text!r} is not a size above zero")
    return size


def format_size(n: int) -> str:
    """`97.4 MB`, in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def text_limit(context: int) -> int:
    """Bytes of text that a ceiling leaves room to tokenize at once: more than a context full of
    any language takes, less than what would be refused anyway after much work.
    """
    return max(_SHORTEST_TEXT, context * _TEXT_PER_TOKEN)


@dataclass(frozen=True)
class Ledger:
    """What a running model holds at most, in bytes: terms that are fixed, and those that grow with
    the context and the arena.

    Two lengths count. `context`: positions one sequence may hold, prompt and answer together.
    `arena`: KV positions of all sequences together; sequences that do not fit wait for pages.
    """

    weights: int  # without the screen
    scratch: int  # of the engine, for all its threads
    logits: int
    sampling: int  # sorting space of the sampler, shared by all requests
    runtime: int  # interpreter, libraries, vocabulary: measured when they are loaded
    page_bytes: int  # of one KV page
    page_tokens: int
    sequences: int  # that run at once
    reserved: Mapping[str, int] = field(default_factory=dict)  # other parts of the process, by name
    screen: int = 0  # of the split head, beside the weights

    def pages(self, arena: int) -> int:
        """Pages of an arena of this many positions."""
        return -(-arena // self.page_tokens)

    def arena_bytes(self, arena: int) -> int:
        """Bytes of an arena of this many positions, with what keeps count of its pages."""
        tables = _PAGE_BYTES + 4 * self.sequences
        return self.pages(arena) * (self.page_bytes + tables)

    def request_bytes(self, context: int) -> int:
        """What one running request may hold beside the engine."""
        return context * TOKEN_BYTES + REQUEST_BYTES

    def terms(self, context: int, arena: int) -> dict[str, int]:
        """Every term by name."""
        return {
            "weights": self.weights,
            **({"screen": self.screen} if self.screen else {}),
            "KV cache": self.arena_bytes(arena),
            "scratch": self.scratch,
            "logits": self.logits,
            "sampling": self.sampling,
            "requests": self.sequences * self.request_bytes(context),
            "tokenizing": text_limit(context) * TEXT_BYTES,
            **self.reserved,
            "runtime": self.runtime,
            "margin": _MARGIN,
        }

    def total(self, context: int, arena: int) -> int:
        """The sum of all terms."""
        return sum(self.terms(context, arena).values())


@dataclass(frozen=True)
class MemoryPlan:
    """The lengths chosen for a model and what they take."""

    ledger: Ledger
    context: int  # positions one sequence may hold
    arena: int  # KV positions of all sequences
    max_mem: int | None
    shortened_by: str | None = None  # why `context` is below the model's own

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by name."""
        return self.ledger.terms(self.context, self.arena)

    @property
    def total(self) -> int:
        """Bytes that the process may come to hold."""
        return sum(self.terms.values())

    @property
    def note(self) -> str | None:
        """What a user should hear: that the context is shorter than the model's, and why."""
        if self.shortened_by is None:
            return None
        return (
            f"context shortened to {self.context} tokens: {self.shortened_by}; "
            "--max-mem or --max-sequence-length"
        )

    def to_json(self) -> dict[str, object]:
        """For `doctor --json` and /health."""
        return {
            "max_mem": self.max_mem,
            "total": self.total,
            "terms": self.terms,
            "context": self.context,
            "arena_tokens": self.arena,
            "sequences": self.ledger.sequences,
            "note": self.note,
        }


def plan_memory(
    ledger: Ledger,
    *,
    context: int,
    wanted: int | None = None,
    ceiling: int | None = None,
    free: int | None = None,
) -> MemoryPlan:
    """Choose the context and the arena.

    The arena holds every sequence at full length where memory allows it, and never less than one.
    With a ceiling, the whole ledger keeps within it; without, the arena keeps within a quarter of
    the free memory, except that a length the user names is honoured.

    Args:
        context: positions the model was trained for.
        wanted: `max_sequence_length`; None: as many as fit, up to `context`.
        ceiling: `max_mem` in bytes, or None.
        free: bytes of free memory; None: unknown, taken as enough.

    Raises:
        UsageError: `wanted` is not within 1 .. context.
        MemoryCeiling: it does not fit; every term is named.
    """
    if wanted is not None and not 1 <= wanted <= context:
        raise UsageError(f"max_sequence_length is {wanted}, this model allows 1 to {context}")
    least = min(_FEWEST_TOKENS, context) if wanted is None else wanted
    if ceiling is not None:
        if ledger.total(least, least) > ceiling:
            raise _too_small(ledger, least, ceiling)
        length = _longest(ledger, least, wanted or context, ceiling)
        pages = (ceiling - ledger.total(length, 0)) // ledger.arena_bytes(1)
        why = f"max_mem is {format_size(ceiling)}"
    else:
        room = None if free is None else free // _SHARE
        most = context if room is None else room // ledger.arena_bytes(1) * ledger.page_tokens
        length = max(least, min(context, most)) if wanted is None else wanted
        pages = max(ledger.pages(length), most // ledger.page_tokens)
        why = f"its KV cache may take a quarter of {format_size(free or 0)} of free memory"
        if room is None:
            pages = ledger.pages(length) * ledger.sequences
    # Each sequence takes whole pages.
    pages = min(pages, ledger.pages(length) * ledger.sequences)
    shortened = wanted is None and length < context
    arena = pages * ledger.page_tokens
    return MemoryPlan(ledger, length, arena, ceiling, why if shortened else None)


def _longest(ledger: Ledger, least: int, most: int, ceiling: int) -> int:
    """The longest context that fits together with an arena for one sequence of it."""
    while least < most:
        middle = (least + most + 1) // 2
        if ledger.total(middle, middle) <= ceiling:
            least = middle
        else:
            most = middle - 1
    return least


def _too_small(ledger: Ledger, tokens: int, ceiling: int) -> MemoryCeiling:
    terms = ledger.terms(tokens, tokens)
    total = sum(terms.values())
    named = ", ".join(f"{name} {format_size(size)}" for name, size in terms.items())
    enough = -(-(total + _MEASURED) // 10**6)
    return MemoryCeiling(
        f"the model needs {format_size(total)} for {tokens} tokens of context ({named}) and "
        f"max_mem is {format_size(ceiling)}; raise max_mem to {enough}MB or lower "
        "max_sequence_length"
    )
