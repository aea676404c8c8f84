"""What a model's head reads while the model writes: hidden states of text sampled from itself.

    openings in 14 languages and code -> sampled on, many at once -> states after the final norm

A split head is fitted to them (`compress/split_head.py`). They come from no data set, so that none
leaks into a model, and from the model's own text, since that is what it will be used on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.openings import OPENINGS, Opening
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import TemplateError
from flashlite.runtime.writing import Writer, open_writing, write

__all__ = ["sample_states"]

# What split heads are fitted to: another list would mean other bytes in the same artifact.
_LANGUAGES = (
    "en", "es", "fr", "de", "it", "pt", "ru", "tr", "vi", "zh", "ja", "ko", "ar", "hi", "code",
)  # fmt: skip
_TOKENS = 200  # sampled from each beginning
_FITTED = (0.0, 0.7, 0.7, 1.0, 1.0)  # temperatures of texts to fit to
_CHECKED = (0.7, 1.0)  # and to measure on: texts at 0 repeat themselves and are screened well
_CHECKED_TOKENS = 60
_CHECKED_SEED = 1 << 20  # of the first text; those to fit to begin at 0


def sample_states(
    artifact: Artifact,
    *,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Let a model write, and keep what its head reads; the same every time.

    Args:
        artifact: the model; its head is used in full.
        check: of the beginnings that are measured on, instead of those that are fitted to.
        progress: called with (texts written, texts in all).

    Returns:
        float32 [n, d_model] after the final norm, text after text.

    Raises:
        FlashliteError: the artifact cannot be compiled or opened.
    """
    tokenizer = Tokenizer(load_texts(artifact), name=artifact.name)
    tokens = _CHECKED_TOKENS if check else _TOKENS
    seed = _CHECKED_SEED if check else 0
    jobs = [
        (ids, temperature)
        for opening in OPENINGS
        if opening.language in _LANGUAGES
        for ids in _beginnings(tokenizer, opening, int(check))
        for temperature in (_CHECKED if check else _FITTED)
    ]
    longest = max(len(ids) for ids, _ in jobs) + tokens
    batch = min(len(jobs), 32)
    ends = frozenset(artifact.tokens.eos)
    states: list[NDArray[np.float32]] = []
    with open_writing(artifact, batch, longest) as engine:
        for first in range(0, len(jobs), batch):
            if progress is not None:
                progress(first, len(jobs))
            writers = [
                Writer(engine, ids, tokens, temperature, seed + first + i)
                for i, (ids, temperature) in enumerate(jobs[first : first + batch])
            ]
            write(engine, writers, ends, states=True)
            for writer in writers:
                states += writer.states
    return np.array(states, np.float32)


def _beginnings(tokenizer: Tokenizer, opening: Opening, which: int) -> list[list[int]]:
    found = [list(tokenizer.encode_prompt(opening.texts[which]))]
    with contextlib.suppress(TemplateError):  # a base model
        messages = [{"role": "user", "content": opening.questions[which]}]
        found.append(list(tokenizer.render_chat(messages)))
    return found
