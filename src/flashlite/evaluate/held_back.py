"""`HeldBack`: the true loss of changed weights, in nats per token, on text nothing was fitted to.

The source's hidden states are kept, not its logits: with a vocabulary of 262,144 a thousand rows of
logits are a gigabyte, and the head's product is quickly made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import EvaluateError
from flashlite.model.reference import Floats, Reference
from flashlite.model.spec import ModelSpec

__all__ = ["HeldBack"]

Weights = Callable[[str], Floats]

_VALUES = 1 << 24  # logits held at once per model: 64 MB


class HeldBack:
    """KL divergence of a model with changed weights from its source, on fixed positions."""

    def __init__(
        self,
        spec: ModelSpec,
        source: Weights,
        sequences: Sequence[NDArray[np.int32]],
        *,
        positions: int = 768,
    ) -> None:
        """Run the source once.

        Args:
            spec: the model.
            source: canonical name -> weights to measure against.
            sequences: token ids, each from position 0; the first position is not scored.
            positions: scored at most, spread evenly over all sequences.

        Raises:
            EvaluateError: the sequences hold no position to score.
        """
        count = sum(max(0, len(ids) - 1) for ids in sequences)
        if not count:
            raise EvaluateError("the calibration holds no sequence of two tokens to measure on")
        self._spec = spec
        self._sequences = sequences
        self._stride = max(1, -(-count // positions))
        self._head = "embed" if spec.tied_head else "head"
        self._source = source
        self._states = self._run(source)

    @property
    def positions(self) -> int:
        """How many are scored."""
        return sum(map(len, self._states))

    def rows(self, weights: Weights) -> NDArray[np.float64]:
        """The divergence at each scored position, in nats."""
        head, ours = self._source(self._head), weights(self._head)
        step = max(1, _VALUES // len(head))
        parts = [
            _divergence(p[i : i + step] @ head.T, q[i : i + step] @ ours.T)
            for p, q in zip(self._states, self._run(weights), strict=True)
            for i in range(0, len(p), step)
        ]
        return np.concatenate(parts)

    def __call__(self, weights: Weights) -> float:
        """The mean of `rows`."""
        return float(self.rows(weights).mean())

    def _run(self, weights: Weights) -> list[Floats]:
        reference = Reference(self._spec, weights)
        return [reference.hidden(ids)[1 :: self._stride] for ids in self._sequences if len(ids) > 1]


def _divergence(p: Floats, q: Floats) -> NDArray[np.float64]:
    """KL(p || q) of rows of logits, which are used up."""
    p -= p.max(axis=1, keepdims=True)
    q -= q.max(axis=1, keepdims=True)
    likely = np.exp(p)
    total = likely.sum(axis=1, dtype=np.float64)
    other = np.exp(q).sum(axis=1, dtype=np.float64)
    p -= q
    rows = np.einsum("ij,ij->i", likely, p, dtype=np.float64)
    out: NDArray[np.float64] = rows / total - np.log(total) + np.log(other)
    return np.maximum(out, 0)
