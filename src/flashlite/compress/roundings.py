"""What a format does to weights, and what it takes: for measurements before a plan exists."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import (
    BLOCK_ROWS,
    GROUP,
    blocks_of,
    dequantize,
    groups_of,
    pack,
)
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.tensors import keeps_grid
from flashlite.model.source import SourceModel

__all__ = ["round_trip", "stored_bytes"]

_BAND_VALUES = 1 << 19  # weights rounded at a time, per thread


def round_trip(
    source: SourceModel, name: str, weights: NDArray[np.float32], fmt: str
) -> NDArray[np.float32]:
    """Weights [rows, cols] as they will be multiplied when stored in a packed format.

    Args:
        source: where a tensor of this name already lies on the format's grid, it stays as it is.
        name: canonical, or any other for a matrix that the source does not hold.
        weights: float32.
        fmt: a packed format.

    Raises:
        CompressError: a value does not fit half precision.
    """
    if name in source.sources:
        dtype = source.checkpoint.info(source.sources[name].name).dtype
        if keeps_grid(dtype, fmt):  # type: ignore[arg-type]
            return weights
    out = np.empty_like(weights)
    rows, cols = weights.shape
    step = max(1, _BAND_VALUES // (cols * BLOCK_ROWS)) * BLOCK_ROWS

    def run(first: int) -> None:
        band = weights[first : first + step]
        packed = pack(quantize_matrix(band, fmt, name=name))
        out[first : first + step] = dequantize(packed, len(band), cols)

    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(run, range(0, rows, step)):
            pass
    return out


def stored_bytes(shape: tuple[int, int], fmt: str) -> int:
    """What a matrix takes in an artifact in a packed format, padding to whole blocks included."""
    return blocks_of(shape[0]) * groups_of(shape[1]) * _block_bytes(fmt)


@functools.cache
def _block_bytes(fmt: str) -> int:
    """One block of 16 rows and 32 columns, its scales included."""
    one = pack(quantize_matrix(np.ones((BLOCK_ROWS, GROUP), np.float32), fmt))
    return one.codes.nbytes + one.scales.nbytes + (0 if one.mins is None else one.mins.nbytes)


def _threads() -> int:
    try:
        return min(8, len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        return min(8, os.cpu_count() or 1)
