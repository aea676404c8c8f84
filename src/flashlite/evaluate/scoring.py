"""Both models on the same tokens: the source in FP32, and the compressed one on its engine.

The source's hidden states come from `teacher`; the head and everything that compares the two run
over a few rows at a time. KL divergence is exact, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.evaluate.teacher import Excerpt, Kept, walk_blocks
from flashlite.model.reference import Floats, Weights
from flashlite.model.spec import ModelSpec
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH

__all__ = ["Scored", "compare"]

Progress = Callable[[int, int], None]
_ROW_VALUES = 1 << 23  # logits of one kind held at once: 32 MB


@dataclass(frozen=True)
class Scored:
    """What came out at the predicted tokens of one sequence, an array each."""

    kl: Floats  # nats, of the compressed model from the source
    same_top: NDArray[np.bool_]  # whether both would say the same
    source_loss: Floats  # nats of the token that follows
    model_loss: Floats
    source_rivals: Floats  # nats of each rival at the first predicted token
    model_rivals: Floats


def compare(
    spec: ModelSpec,
    weights: Weights,
    engine: Engine,
    sequences: Sequence[Excerpt],
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> list[Scored]:
    """Run both models over all sequences.

    Args:
        spec: of the source.
        weights: of the source, float32 by canonical name; each layer's are asked for once per
            block of sequences.
        engine: the compressed model, open for as many tokens as the longest sequence has.
        sequences: each at most as long as the model's context.
        progress: called with (tokens done, of all), every token counting once for each model.
        kept: where the source's hidden states are kept.
    """
    total = 2 * sum(len(sequence.ids) for sequence in sequences)
    walked = compared = 0

    def report(tokens: int | None = None) -> None:
        nonlocal walked
        walked = walked if tokens is None else tokens
        if progress is not None:
            progress(walked + compared, total)

    read = weights if callable(weights) else weights.__getitem__
    table: Floats | None = None
    scored = []
    for sequence, hidden in walk_blocks(spec, weights, sequences, kept, report):
        if table is None:  # after the first walk, which has no use for it
            table = read("embed" if spec.tied_head else "head")
        scored.append(_compare_one(engine, sequence, hidden, table))
        compared += len(sequence.ids)
        report()
    return scored


def _compare_one(engine: Engine, sequence: Excerpt, hidden: Floats, table: Floats) -> Scored:
    step = max(1, min(64, _ROW_VALUES // len(table)))
    ids, at = sequence.ids, sequence.first
    timeline = engine.new_sequence(len(ids))
    parts: list[tuple[Floats, NDArray[np.bool_], Floats, Floats]] = []
    rivals: list[Floats] = []
    try:
        for start in range(0, at - 1, MAX_BATCH):
            engine.step([Work(timeline, ids[start : min(start + MAX_BATCH, at - 1)], "none")])
        for row in range(0, len(hidden), step):
            rows = hidden[row : row + step]
            first = at - 1 + row
            theirs = rows @ table.T
            ours = engine.step([Work(timeline, ids[first : first + len(rows)], "all")])
            if not rivals:
                rivals = [_losses(logits[0], sequence.rivals) for logits in (theirs, ours)]
            parts.append(_compare_rows(theirs, ours, ids[first + 1 :][: len(rows)]))
    finally:
        timeline.release()
    return Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)), *rivals)


def _losses(logits: Floats, ids: Sequence[int]) -> Floats:
    """Nats of each of `ids` under one row of logits."""
    if not ids:
        return np.zeros(0, np.float32)
    shifted = logits - logits.max()
    total = np.log(np.exp(shifted).sum(dtype=np.float64))
    losses: Floats = (total - shifted[list(ids)]).astype(np.float32)
    return losses


def _compare_rows(
    source: Floats, model: Floats, targets: NDArray[np.int32]
) -> tuple[Floats, NDArray[np.bool_], Floats, Floats]:
    """KL, agreement and losses, in one pass over two arrays (rows, vocab)."""
    same = source.argmax(axis=-1) == model.argmax(axis=-1)
    # Shifted, exponentials of float32 are accurate enough; sums run in float64.
    p = source - source.max(axis=-1, keepdims=True)
    q = model - model.max(axis=-1, keepdims=True)
    weights = np.exp(p)
    p_sum = weights.sum(axis=-1, dtype=np.float64)
    q_log = np.log(np.exp(q).sum(axis=-1, dtype=np.float64))
    p_log = np.log(p_sum)
    apart = np.einsum("ij,ij->i", weights, p - q, dtype=np.float64) / p_sum
    kl = apart - p_log + q_log
    here = np.arange(len(targets)), targets
    return (
        kl.astype(np.float32),
        same,
        (p_log - p[here]).astype(np.float32),
        (q_log - q[here]).astype(np.float32),
    )
