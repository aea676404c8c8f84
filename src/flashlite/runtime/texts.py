"""Texts that a model writes itself, to tune on and to measure on: no data set leaks into a model.

BOS, or openings in 17 languages and code ──> sampled on, many at once ──> ids, text after text
"""

from __future__ import annotations

from collections.abc import Callable

from flashlite.analyze.openings import OPENINGS
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import TemplateError
from flashlite.runtime.writing import Writer, open_writing, write

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
    with open_writing(artifact, _TOGETHER, length) as engine:
        while written < tokens:
            width = min(_TOGETHER, max(1, -(-(tokens - written) // length)))
            jobs = [
                (
                    beginnings[(number + i) % len(beginnings)],
                    _TEMPERATURES[(number + i) // len(beginnings) % len(_TEMPERATURES)],
                    seed + number + i,
                )
                for i in range(width)
            ]
            number += width
            writers = [
                Writer(engine, ids, length - len(ids), temperature, draw)
                for ids, temperature, draw in jobs
            ]
            write(engine, writers, ends)
            for (ids, _, _), writer in zip(jobs, writers, strict=True):
                written += len(ids) + len(writer.drawn)
                if len(ids) + len(writer.drawn) >= min(_SHORTEST, length):
                    kept.append([*ids, *writer.drawn])
            if progress is not None:
                progress(min(written, tokens), tokens)
    return kept


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
