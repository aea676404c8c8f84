"""Let a model write many texts at once: the same ones every time, for what is fitted to them.

with open_writing(artifact, batch, longest) as engine:
    writers = [Writer(engine, ids, tokens, temperature, seed) for ...]
    write(engine, writers, ends)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams

__all__ = ["Writer", "open_writing", "write"]


def open_writing(artifact: Artifact, batch: int, longest: int) -> Engine:
    """An engine with room for `batch` texts of `longest` tokens; its head is used in full.

    Raises:
        FlashliteError: the artifact cannot be compiled or opened.
    """
    return Engine(
        load_library(compile_artifact(artifact)),
        load_weights(artifact),
        max_tokens=batch * (longest + 32),
        max_sequences=batch,
        exact_head=True,
    )


class Writer:
    """One text on its way.

    Attributes:
        drawn: its tokens so far, without the beginning.
        states: what the head read before each of them, if kept.
    """

    def __init__(
        self, engine: Engine, ids: Sequence[int], tokens: int, temperature: float, seed: int
    ) -> None:
        """Go on from `ids` by at most `tokens`; equal arguments give equal texts."""
        prompt = np.array(ids, np.int32)
        self.sequence = engine.new_sequence(len(ids) + tokens)
        self.next = list(ids)
        self.left = tokens
        self.drawn: list[int] = []
        self.states: list[NDArray[np.float32]] = []
        params = SamplingParams(temperature=temperature, seed=seed)
        scratch = np.empty(engine.vocab_size, np.uint64)
        self._sampler = Sampler(engine.library, params, prompt, tokens, scratch)

    def draw(self, logits: NDArray[np.float32], ends: frozenset[int]) -> None:
        """Draw the next token."""
        token = self._sampler.draw(logits).token
        self.drawn.append(token)
        self.next, self.left = [token], 0 if token in ends else self.left - 1


def write(
    engine: Engine, writers: Sequence[Writer], ends: frozenset[int], *, states: bool = False
) -> None:
    """Go on until every text has its length or drew one of `ends`.

    Args:
        engine: of `open_writing`.
        writers: at most its batch; their sequences are released at the end.
        ends: tokens that end a text.
        states: keep what the head reads, too.
    """
    for writer in writers:
        for at in range(0, len(writer.next) - 1, MAX_BATCH):
            engine.step([Work(writer.sequence, writer.next[at:-1][:MAX_BATCH], "none")])
        writer.next = writer.next[-1:]
    hidden = np.empty((len(writers), int(engine.info.d_model)), np.float32) if states else None
    while running := [writer for writer in writers if writer.left]:
        rows = None if hidden is None else hidden[: len(running)]
        logits = engine.step([Work(w.sequence, w.next) for w in running], hidden=rows)
        for i, writer in enumerate(running):
            if rows is not None:
                writer.states.append(rows[i].copy())
            writer.draw(logits[i], ends)
    for writer in writers:
        writer.sequence.release()
