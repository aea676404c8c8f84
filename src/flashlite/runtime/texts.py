"""Texts that a model writes itself, to tune on and to measure on: no data set leaks into a model.

BOS, or openings in 14 languages and code ──> sampled on, many at once ──> ids, text after text
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashlite.analyze.openings import OPENINGS
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import TemplateError
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams

__all__ = ["sample_texts"]

_TEMPERATURES = (0.7, 1.0, 1.0)
_TOGETHER = 32  # texts written at the same time
_SHORTEST = 16  # tokens; a text that ends sooner is not kept
_HELD_SEED = 1 << 21


def sample_texts(
    artifact: Artifact,
    tokens: int,
    *,
    length: int = 512,
    seed: int = 0,
    held: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Let a model write; the same for the same arguments.

    Args:
        artifact: the model; its head is used in full.
        tokens: how many to write, about.
        length: the most tokens of one text.
        seed: of the draws.
        held: from other openings and with other draws, to measure on.
        progress: called with (tokens written, tokens in all).

    Raises:
        FlashliteError: the artifact cannot be compiled or opened.
    """
    tokenizer = Tokenizer(load_texts(artifact), name=artifact.name)
    length = min(length, artifact.spec.max_context)
    beginnings = _beginnings(tokenizer, int(held), length)
    ends = frozenset(artifact.tokens.eos)
    seed += _HELD_SEED if held else 0
    kept: list[list[int]] = []
    written = number = 0
    with Engine(
        load_library(compile_artifact(artifact)),
        load_weights(artifact),
        max_tokens=_TOGETHER * (length + 32),
        max_sequences=_TOGETHER,
        exact_head=True,
    ) as engine:
        while written < tokens:
            width = min(_TOGETHER, max(1, -(-(tokens - written) // length)))
            writers = [
                _Writer(
                    engine,
                    beginnings[(number + i) % len(beginnings)],
                    length,
                    _TEMPERATURES[(number + i) // len(beginnings) % len(_TEMPERATURES)],
                    seed + number + i,
                )
                for i in range(width)
            ]
            number += width
            _write(engine, writers, ends)
            for writer in writers:
                written += len(writer.ids)
                if len(writer.ids) >= min(_SHORTEST, length):
                    kept.append(writer.ids)
                writer.sequence.release()
            if progress is not None:
                progress(min(written, tokens), tokens)
    return kept


class _Writer:
    """One text on its way."""

    def __init__(
        self, engine: Engine, ids: list[int], length: int, temperature: float, seed: int
    ) -> None:
        self.ids = list(ids)
        self.sequence: Sequence = engine.new_sequence(length)
        self.left = length - len(ids)
        params = SamplingParams(temperature=temperature, seed=seed)
        scratch = np.empty(engine.vocab_size, np.uint64)
        prompt = np.array(ids, np.int32)
        self._sampler = Sampler(engine.library, params, prompt, self.left, scratch)

    def take(self, logits: np.ndarray, ends: frozenset[int]) -> None:
        """Draw the next token."""
        token = self._sampler.draw(logits).token
        self.ids.append(token)
        self.left = 0 if token in ends else self.left - 1


def _write(engine: Engine, writers: list[_Writer], ends: frozenset[int]) -> None:
    for writer in writers:
        for at in range(0, len(writer.ids) - 1, MAX_BATCH):
            engine.step([Work(writer.sequence, writer.ids[at:-1][:MAX_BATCH], "none")])
    while running := [writer for writer in writers if writer.left > 0]:
        logits = engine.step([Work(w.sequence, w.ids[-1:]) for w in running])
        for writer, row in zip(running, logits, strict=True):
            writer.take(row, ends)


def _beginnings(tokenizer: Tokenizer, which: int, length: int) -> list[list[int]]:
    """BOS alone before every opening, where there is one: most of what it leads to is varied."""
    bos = tokenizer.tokens.bos
    found: list[list[int]] = []
    for opening in OPENINGS:
        if bos is not None and tokenizer.tokens.add_bos:
            found.append([bos])
        found.append(list(tokenizer.encode_prompt(opening.texts[which])))
        try:
            messages = [{"role": "user", "content": opening.questions[which]}]
            found.append(list(tokenizer.render_chat(messages)))
        except TemplateError:  # a base model
            continue
    return [ids[: length // 2] for ids in found if ids]
