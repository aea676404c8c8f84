"""How sure a mean is: bootstrap over chunks. Given differences of pairs, it is a paired one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mean", "bootstrap"]

_DRAWS = 2000
_DRAWN_AT_ONCE = 1 << 20  # chunks: what a full run draws would not fit into memory
_CHUNK = 64  # neighbouring tokens: they are alike, so they are drawn together


@dataclass(frozen=True)
class Mean:
    """A mean and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Its three numbers."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def bootstrap(parts: Sequence[NDArray[np.floating]], seed: int = 0) -> Mean:
    """The mean of all values, and how far it moves when chunks of 64 are drawn with replacement.

    A chunk never spans two parts; the percentile interval of Efron and Tibshirani (1993), 13.3.

    Args:
        parts: values in their order, one array per text; at least one value in all.
        seed: of the draws, so that a report can be made again.
    """
    chunks = [part[i : i + _CHUNK] for part in parts for i in range(0, len(part), _CHUNK)]
    sums = np.array([chunk.sum() for chunk in chunks], np.float64)
    sizes = np.array([len(chunk) for chunk in chunks], np.float64)
    mean = float(sums.sum() / sizes.sum())
    rng = np.random.default_rng(seed)
    means = np.empty(_DRAWS)
    step = max(1, _DRAWN_AT_ONCE // len(chunks))
    for at in range(0, _DRAWS, step):
        here = means[at : at + step]
        drawn = rng.integers(0, len(chunks), (len(here), len(chunks)))
        here[:] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(mean, float(low), float(high))
