"""Both models on the same tokens: the source in FP32, and the compressed one on its engine.

The source is walked layer by layer over all sequences, so that each of its tensors is read once and
only residuals stay in memory; the head and everything that compares the two run over a few rows at
a time. KL divergence is exact, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.model.reference import Floats, Reference, Weights
from flashlite.model.spec import ModelSpec
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH

__all__ = ["Excerpt", "Scored", "compare"]

Progress = Callable[[int, int], None]
_ROW_VALUES = 1 << 23  # logits of one kind held at once: 32 MB


@dataclass(frozen=True)
class Excerpt:
    """Token ids, of which those from `first` on are predicted and compared (1 or more)."""

    ids: NDArray[np.int32]
    first: int = 1


@dataclass(frozen=True)
class Scored:
    """What came out at the predicted tokens of one sequence, an array each."""

    kl: Floats  # nats, of the compressed model from the source
    same_top: NDArray[np.bool_]  # whether both would say the same
    source_loss: Floats  # nats of the token that follows
    model_loss: Floats


def compare(
    spec: ModelSpec,
    weights: Weights,
    engine: Engine,
    sequences: Sequence[Excerpt],
    progress: Progress | None = None,
) -> list[Scored]:
    """Run both models over all sequences.

    Args:
        spec: of the source.
        weights: of the source, float32 by canonical name; each layer's are asked for once.
        engine: the compressed model, open for as many tokens as the longest sequence has.
        sequences: each at most as long as the model's context.
        progress: called with (layers and sequences done, of all).
    """
    steps = spec.n_layers + len(sequences)
    residuals = _walk(spec, weights, sequences, lambda done: progress and progress(done, steps))
    table = (weights if callable(weights) else weights.__getitem__)(
        "embed" if spec.tied_head else "head"
    )
    scored = []
    for done, (sequence, hidden) in enumerate(zip(sequences, residuals, strict=True), 1):
        scored.append(_compare_one(engine, sequence, hidden, table))
        if progress is not None:
            progress(spec.n_layers + done, steps)
    return scored


def _walk(
    spec: ModelSpec,
    weights: Weights,
    sequences: Sequence[Excerpt],
    report: Callable[[int], object],
) -> list[Floats]:
    """What the head reads at the rows before each predicted token."""
    read = weights if callable(weights) else weights.__getitem__
    held: dict[str, Floats] = {}

    def once(name: str) -> Floats:
        if name not in held:
            held[name] = read(name)
        return held[name]

    reference = Reference(spec, once)
    states = [reference.embed(sequence.ids) for sequence in sequences]
    held.clear()
    for i in range(spec.n_layers):
        states = [reference.layer(i, x) for x in states]
        held.clear()
        report(i + 1)
    return [
        reference.final_norm(x[sequence.first - 1 : -1])
        for x, sequence in zip(states, sequences, strict=True)
    ]


def _compare_one(engine: Engine, sequence: Excerpt, hidden: Floats, table: Floats) -> Scored:
    step = max(1, min(64, _ROW_VALUES // len(table)))
    ids, at = sequence.ids, sequence.first
    timeline = engine.new_sequence(len(ids))
    parts: list[tuple[Floats, NDArray[np.bool_], Floats, Floats]] = []
    try:
        for start in range(0, at - 1, MAX_BATCH):
            engine.step([Work(timeline, ids[start : min(start + MAX_BATCH, at - 1)], "none")])
        for row in range(0, len(hidden), step):
            rows = hidden[row : row + step]
            first = at - 1 + row
            ours = engine.step([Work(timeline, ids[first : first + len(rows)], "all")])
            parts.append(_compare_rows(rows @ table.T, ours, ids[first + 1 :][: len(rows)]))
    finally:
        timeline.release()
    return Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))


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
