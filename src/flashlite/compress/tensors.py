"""From one tensor of the source to the arrays that the artifact stores for it.

A source that already lies on a grid which the chosen format contains keeps it bit for bit: nothing
is searched and nothing is lost. Everything else is decoded to float32 and quantized, a band of
rows at a time, so that memory stays near the size of the tensor as read and as stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint import blocks
from flashlite.checkpoint.blocks import TensorInfo
from flashlite.compress.pack import (
    BLOCK_ROWS,
    CODE_BYTES,
    CODE_DTYPE,
    GROUP,
    ZERO,
    Packed,
    Quantized,
    blocks_of,
    groups_of,
    pack,
)
from flashlite.compress.plan import Format
from flashlite.compress.quantize import quantize_matrix, to_half
from flashlite.model.source import SourceTensors

__all__ = ["compress_tensor", "keeps_grid", "kept_grid", "packed_arrays"]

_BAND_VALUES = 1 << 19  # weights decoded at a time, per thread
_KEPT = {
    "q8": ("Q8_0", "Q5_0", "Q4_0"),
    "q6": ("Q5_0", "Q4_0"),
    "q5": ("Q5_0", "Q4_0"),
    "q4": ("Q4_0",),
    "q4m": ("Q4_1",),
}

Bytes = NDArray[np.uint8]


def keeps_grid(dtype: str, fmt: Format) -> bool:
    """Whether a tensor of this type is stored in this format without any loss."""
    return dtype in _KEPT.get(fmt, ())


def compress_tensor(source: SourceTensors, name: str, fmt: Format) -> dict[str, NDArray[Any]]:
    """Read, quantize and pack one tensor.

    Args:
        source: the described checkpoint.
        name: a stored name; `head` of a tied model reads the embedding table.
        fmt: what to store it as.

    Returns:
        The arrays by their names in the artifact: `NAME.codes`, `NAME.scales` and, for q4m,
        `NAME.mins`, in the layout of `Packed`; or the tensor itself, f16 or f32, as `NAME`.

    Raises:
        CheckpointError: the source cannot be read or holds values that are not finite.
        CompressError: a value does not fit half precision.
    """
    canonical = "embed" if name == "head" and source.spec.tied_head else name
    if fmt == "f32":
        return {name: source.tensor(canonical)}
    info = source.info(canonical)
    _, raw = source.blocks(canonical)
    if fmt == "f16":
        return {name: _half_table(info, raw, canonical)}
    return packed_arrays(name, _packed(info, raw, fmt, canonical))


def packed_arrays(name: str, packed: Packed) -> dict[str, NDArray[Any]]:
    """The arrays of one packed matrix by their names in the artifact, in stored order."""
    arrays: dict[str, NDArray[Any]] = {
        f"{name}.codes": packed.codes,
        f"{name}.scales": packed.scales,
    }
    if packed.mins is not None:
        arrays[f"{name}.mins"] = packed.mins
    return arrays


def kept_grid(source: SourceTensors, name: str, fmt: Format) -> Quantized | None:
    """The source's own codes and scales where the format holds them without loss, else None.

    Raises:
        CheckpointError: the source cannot be read.
    """
    info = source.info(name)
    if not keeps_grid(info.dtype, fmt):
        return None
    return _keep(info, source.blocks(name)[1], fmt)


def _half_table(info: TensorInfo, raw: Bytes, name: str) -> NDArray[np.float16]:
    table = np.empty(info.shape, np.float16)

    def work(first: int, band: TensorInfo, part: Bytes) -> None:
        table[first : first + band.rows] = to_half(blocks.dequantize(band, part), name)

    _each_band(info, raw, work)
    return table


def _packed(info: TensorInfo, raw: Bytes, fmt: Format, name: str) -> Packed:
    shape = (blocks_of(info.rows), groups_of(info.cols))
    codes = np.empty((*shape, CODE_BYTES[fmt]), CODE_DTYPE[fmt])
    scales = np.empty((*shape, BLOCK_ROWS), np.float16)
    mins = np.empty((*shape, BLOCK_ROWS), np.float16) if fmt == "q4m" else None

    def work(first: int, band: TensorInfo, part: Bytes) -> None:
        if keeps_grid(info.dtype, fmt):
            matrix = _keep(band, part, fmt)
        else:
            matrix = quantize_matrix(blocks.dequantize(band, part), fmt, name=name)
        piece = pack(matrix)
        here = slice(first // BLOCK_ROWS, first // BLOCK_ROWS + len(piece.codes))
        codes[here], scales[here] = piece.codes, piece.scales
        if mins is not None and piece.mins is not None:
            mins[here] = piece.mins

    _each_band(info, raw, work)
    return Packed(fmt, codes, scales, mins)


def _keep(info: TensorInfo, raw: Bytes, fmt: Format) -> Quantized:
    """The source's own codes and scales, moved to where the format has its zero."""
    if info.dtype == "Q5_0":  # w = scale * code exactly, code in -16..15: read it back from w
        scales = np.ascontiguousarray(raw.reshape(-1, 22)[:, :2]).view("<f2").reshape(info.rows, -1)
        weights = blocks.dequantize(info, raw).reshape(info.rows, -1, GROUP)
        divisor = np.where(scales == 0, np.float16(1), scales).astype(np.float32)
        signed = np.rint(weights / divisor[:, :, None]).reshape(info.shape)
        return Quantized(fmt, (signed + np.float32(ZERO[fmt])).astype(CODE_DTYPE[fmt]), scales)
    grid = blocks.grid(info, raw)
    codes, shift = grid.codes, ZERO[fmt] - grid.zero
    if shift:
        codes = (codes.astype(np.int16) + shift).astype(CODE_DTYPE[fmt])
    return Quantized(fmt, codes, grid.scales, grid.mins)


def _each_band(
    info: TensorInfo, raw: Bytes, work: Callable[[int, TensorInfo, Bytes], None]
) -> None:
    """Run `work(first row, band, its bytes)` over bands of whole row blocks, on all cores."""

    def run(first: int) -> None:
        part = raw[first : first + step]
        size = (len(part), info.cols)
        offset = info.offset + first * raw.shape[1]
        work(first, replace(info, shape=size, offset=offset, nbytes=part.size), part)

    step = max(1, _BAND_VALUES // (info.cols * BLOCK_ROWS)) * BLOCK_ROWS
    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(run, range(0, info.rows, step)):
            pass


def _threads() -> int:
    try:
        return min(8, len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        return min(8, os.cpu_count() or 1)
