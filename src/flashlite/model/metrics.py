"""How far one set of logits is from another: KL divergence, top-1 agreement, perplexity.

All arrays of logits are (rows, vocab); sums run in float64, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import UsageError

__all__ = ["kl_divergence", "log_softmax", "perplexity", "top1_agreement"]

Logits = NDArray[np.floating]

_CHUNK_VALUES = 1 << 22  # float64 values held at once per array: 32 MB


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities, along the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(p_logits: Logits, q_logits: Logits) -> NDArray[np.float64]:
    """KL(p || q) of every row in nats, [rows]; p is the reference.

    Raises:
        UsageError: the shapes differ or are not (rows, vocab).
    """
    _same_shape(p_logits, q_logits)
    out = np.empty(len(p_logits))
    for rows in _chunks(p_logits):
        p, q = log_softmax(p_logits[rows]), log_softmax(q_logits[rows])
        out[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    return out


def top1_agreement(p_logits: Logits, q_logits: Logits) -> float:
    """Share of rows whose largest logit stands at the same id.

    Raises:
        UsageError: as `kl_divergence`.
    """
    _same_shape(p_logits, q_logits)
    return float(np.mean(p_logits.argmax(axis=-1) == q_logits.argmax(axis=-1)))


def perplexity(logits: Logits, targets: NDArray[np.integer]) -> float:
    """Exponential of the mean negative log-likelihood: row i scores targets[i], the token after it.

    Raises:
        UsageError: there is not one target per row, or one is no id of the vocabulary.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise UsageError(f"targets of shape {targets.shape} for logits of shape {logits.shape}")
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise UsageError(f"a target is outside the vocabulary of {logits.shape[1]}")
    total = 0.0
    for rows in _chunks(logits):
        logs = log_softmax(logits[rows])
        total += float(np.take_along_axis(logs, targets[rows, None], axis=-1).sum())
    return float(np.exp(-total / len(targets)))


def _same_shape(p: Logits, q: Logits) -> None:
    if p.ndim != 2 or p.shape != q.shape or not len(p):
        raise UsageError(f"logits of shapes {p.shape} and {q.shape}: needs two equal (rows, vocab)")


def _chunks(logits: Logits) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)
