"""`calibrate`: the token ids that a model is measured on.

Sampled from the model itself, in 12 languages, a few more, and code, or read from the user's file.
Never from an evaluation set: whatever is chosen by the measurements would be chosen for it. A part
is held back; exact losses are taken there alone, and statistics never.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashlite.analyze.analysis import Calibration
from flashlite.analyze.openings import OPENINGS
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import TemplateError, UsageError

__all__ = ["Job", "Sampler", "from_file", "from_model"]

_HELD_BACK_TEXT = 56  # tokens of one text: so that 2,048 hold every beginning
_TEMPERATURES = (0.7, 1.0)
_SHORTEST = 16  # tokens of a sequence
_MAX_FILE = 1 << 28


@dataclass(frozen=True)
class Job:
    """One text to write: go on from `ids` until there are `length` tokens in all."""

    ids: tuple[int, ...]
    length: int
    temperature: float
    seed: int


Sampler = Callable[[Sequence[Job]], list[list[int]]]
"""Returns the texts, beginnings included, in the order of the jobs."""


def from_model(
    tokenizer: Tokenizer,
    sampler: Sampler,
    *,
    seed: int,
    tokens: int,
    held_back: int,
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Let the model write its calibration; the same every time.

    Args:
        tokenizer: the model's.
        sampler: writes texts with the model.
        seed: of all draws.
        tokens: for statistics.
        held_back: for exact losses, from other beginnings.
        length: of a sequence.
        progress: called with (tokens written, tokens in all).
    """
    need = tokens + held_back
    parts: list[list[tuple[int, ...]]] = []
    done = 0
    for which, (want, text) in enumerate(
        ((tokens, length // 2), (held_back, min(_HELD_BACK_TEXT, length // 2)))
    ):
        beginnings = _beginnings(tokenizer, which, text)
        count = max(1, want // length)
        sequences: list[tuple[int, ...]] = []
        left: list[list[int]] = []
        number = 0
        while len(sequences) < count:
            jobs = []
            for ids in beginnings:
                temperature = _TEMPERATURES[number % len(_TEMPERATURES)]
                jobs.append(Job(ids, text, temperature, _seed(seed, which, number)))
                number += 1
            texts = sampler(jobs)
            left += texts if which else _shuffled(texts, seed + number)
            sequences += _pack(left, length, count - len(sequences))
            if progress is not None:
                progress(min(need, done + len(sequences) * length), need)
        done += want
        parts.append(sequences)
    languages = tuple(opening.language for opening in OPENINGS)
    return Calibration("model", seed, languages, tuple(parts[0]), tuple(parts[1]))


def from_file(
    path: Path, tokenizer: Tokenizer, *, seed: int, tokens: int, held_back: int, length: int
) -> Calibration:
    """Take the calibration from a text, or from chats in JSON lines.

    A line of JSON is `{"messages": [...]}`, a list of messages, or `{"text": "..."}`.

    Raises:
        UsageError: the file is not text, a line is not a chat, or there is too little text.
        OSError: it cannot be read.
    """
    texts = _pack_file(_documents(path, tokenizer), tokenizer, length)
    order = np.random.default_rng(seed).permutation(len(texts))
    wanted = [max(1, held_back // length), max(1, tokens // length)]
    if len(texts) < 2:
        raise UsageError(
            f"{path} holds {sum(map(len, texts))} tokens, needs at least {2 * length}: one "
            "sequence to measure statistics on and one to judge by; give more text"
        )
    wanted[0] = min(wanted[0], max(1, len(texts) // 4))
    rows = [texts[at] for at in order[: sum(wanted)]]
    return Calibration(path.name, seed, (), tuple(rows[wanted[0] :]), tuple(rows[: wanted[0]]))


def _beginnings(tokenizer: Tokenizer, which: int, longest: int) -> list[tuple[int, ...]]:
    """Of texts, then of chats where the model has a template."""
    found = [tuple(tokenizer.encode_prompt(opening.texts[which])) for opening in OPENINGS]
    with contextlib.suppress(TemplateError):  # a base model
        for opening in OPENINGS:
            messages = [{"role": "user", "content": opening.questions[which]}]
            found.append(tuple(tokenizer.render_chat(messages)))
    # Half a text at least is the model's own; a beginning in a poor vocabulary may be long.
    return [ids[: max(1, longest // 2)] for ids in found]


def _pack(texts: list[list[int]], length: int, count: int) -> list[tuple[int, ...]]:
    """Whole sequences from the front of `texts`, which are used up; each begins with a text."""
    found: list[tuple[int, ...]] = []
    while len(found) < count and sum(map(len, texts)) >= length:
        row: list[int] = []
        while len(row) < length:
            row += texts.pop(0)
        found.append(tuple(row[:length]))
    return found


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if (size := path.stat().st_size) > _MAX_FILE:
        raise UsageError(f"{path} has {size} bytes, allowed {_MAX_FILE}; give a part of it")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start}") from None
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        yield tokenizer.encode_prompt(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _chat(path, number, line, tokenizer)


def _chat(path: Path, number: int, line: str, tokenizer: Tokenizer) -> list[int]:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{path}, line {number}: not JSON: {line.strip()[:40]!r}") from None
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return tokenizer.encode_prompt(found["text"])
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise UsageError(
            f"{path}, line {number}: needs an object with `messages` or `text`, or a list of "
            "messages"
        )
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=False)
    except (UsageError, TemplateError) as error:
        raise UsageError(f"{path}, line {number}: {error}") from None


def _pack_file(
    documents: Iterator[list[int]], tokenizer: Tokenizer, length: int
) -> list[tuple[int, ...]]:
    """Sequences of `length`, each from a beginning: long documents are cut, short ones joined."""
    start = [] if tokenizer.tokens.bos is None else [tokenizer.tokens.bos]
    begins = tokenizer.encode_prompt("a")[: len(start)] == start
    pieces: list[list[int]] = []
    for ids in documents:
        pieces.append(ids[:length])
        step = length - len(start) if begins else length
        for at in range(length, len(ids), step):
            pieces.append((start if begins else []) + ids[at : at + step])
    return _pack(pieces, length, len(pieces)) or [
        tuple(piece) for piece in pieces if len(piece) >= _SHORTEST
    ]


def _shuffled(texts: list[list[int]], seed: int) -> list[list[int]]:
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[at] for at in order]


def _seed(seed: int, which: int, number: int) -> int:
    return (seed << 24) + (which << 20) + number
