"""How alike two orders are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import UsageError

__all__ = ["spearman"]


def spearman(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Spearman's correlation of two rows: that of their ranks, equal values sharing one.

    Raises:
        UsageError: they are not two rows of equal length, or one of them is all the same.
    """
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise UsageError(f"values of shapes {x.shape} and {y.shape}: needs two equal rows")
    a, b = _ranks(x), _ranks(y)
    if not a.std() or not b.std():
        raise UsageError("a row of equal values has no order")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return ranks
