"""The packed layout of one matrix, as `csrc/fl_kernels.h` defines it, and its inverse.

    Quantized   codes row by row           [rows, cols]
       │ pack       ▲ unpack
       ▼            │
    Packed      blocks of 16 rows x 32 columns: one 64-byte vector holds 4 columns of 16 rows

Rows and columns are padded to whole blocks with weights that are zero.

A weight is  q8: scale * code   q4: scale * (code - 8)   q4m: scale * code + min.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK_ROWS",
    "CODE_BYTES",
    "CODE_DTYPE",
    "GROUP",
    "Packed",
    "Quantized",
    "blocks_of",
    "dequantize",
    "groups_of",
    "pack",
    "unpack",
]

GROUP = 32  # columns that share a scale: FL_GROUP
BLOCK_ROWS = 16  # rows of one packed block: FL_BLOCK_ROWS
CODE_BYTES = {"q8": 512, "q4": 256, "q4m": 256}  # of one block and group
CODE_DTYPE: dict[str, type[Any]] = {"q8": np.int8, "q4": np.uint8, "q4m": np.uint8}
_ZERO = {"q8": 0, "q4": 8, "q4m": 0}  # the code of a weight that is zero (q4m: with min 0)


@dataclass(frozen=True)
class Quantized:
    """One quantized matrix, row by row; `cols` is padded to whole groups.

    Attributes:
        format: "q8", "q4" or "q4m".
        codes: [rows, groups * 32], int8 for q8, uint8 in 0..15 for q4 and q4m.
        scales: float16 [rows, groups].
        mins: float16 [rows, groups] for q4m, else None.
    """

    format: str
    codes: NDArray[Any]
    scales: NDArray[np.float16]
    mins: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class Packed:
    """One matrix as the kernels read it; three arrays, each of whole blocks.

    Attributes:
        format: "q8", "q4" or "q4m".
        codes: int8 [blocks, groups, 512] for q8, uint8 [blocks, groups, 256] for q4 and q4m.
        scales: float16 [blocks, groups, 16].
        mins: float16 [blocks, groups, 16] for q4m, else None.
    """

    format: str
    codes: NDArray[Any]
    scales: NDArray[np.float16]
    mins: NDArray[np.float16] | None = None


def blocks_of(rows: int) -> int:
    """How many blocks of 16 hold `rows` rows."""
    return -(-rows // BLOCK_ROWS)


def groups_of(cols: int) -> int:
    """How many groups of 32 hold `cols` columns."""
    return -(-cols // GROUP)


def pack(matrix: Quantized) -> Packed:
    """Arrange a matrix for the kernels; padding rows get scale 0 and min 0."""
    rows = matrix.codes.shape[0]
    groups = groups_of(matrix.codes.shape[1])
    blocks = blocks_of(rows)
    codes = _pad(matrix.codes, blocks * BLOCK_ROWS, groups * GROUP, _ZERO[matrix.format])
    if matrix.format == "q8":  # (b, row, g, k4, k) -> (b, g, k4, row, k)
        cells = codes.reshape(blocks, BLOCK_ROWS, groups, 8, 4).transpose(0, 2, 3, 1, 4)
    else:  # (b, row, g, i, half, k) -> (b, g, i, row, k), the first half in the low nibble
        halves = codes.reshape(blocks, BLOCK_ROWS, groups, 4, 2, 4)
        nibbles = halves[..., 0, :] | (halves[..., 1, :] << 4)
        cells = nibbles.transpose(0, 2, 3, 1, 4)
    return Packed(
        matrix.format,
        np.ascontiguousarray(cells).reshape(blocks, groups, CODE_BYTES[matrix.format]),
        _pack_rows(matrix.scales, blocks, groups),
        None if matrix.mins is None else _pack_rows(matrix.mins, blocks, groups),
    )


def unpack(packed: Packed, rows: int, cols: int) -> Quantized:
    """The `rows` x `cols` codes that `pack` arranged; columns stay padded to groups."""
    blocks, groups = packed.codes.shape[:2]
    if packed.format == "q8":
        cells = packed.codes.reshape(blocks, groups, 8, BLOCK_ROWS, 4).transpose(0, 3, 1, 2, 4)
    else:
        nibbles = packed.codes.reshape(blocks, groups, 4, BLOCK_ROWS, 4).transpose(0, 3, 1, 2, 4)
        cells = np.stack((nibbles & 15, nibbles >> 4), axis=4)
    codes = cells.reshape(blocks * BLOCK_ROWS, groups * GROUP)[:rows, : groups_of(cols) * GROUP]
    return Quantized(
        packed.format,
        np.ascontiguousarray(codes),
        _unpack_rows(packed.scales, rows),
        None if packed.mins is None else _unpack_rows(packed.mins, rows),
    )


def dequantize(packed: Packed, rows: int, cols: int) -> NDArray[np.float32]:
    """The weights, float32 [rows, cols], in a few times their own size of memory at most."""
    out = np.empty((rows, cols), np.float32)
    step = max(1, (1 << 20) // max(1, packed.codes[0].size))  # blocks at a time
    for first in range(0, blocks_of(rows), step):
        part = slice(first, first + step)
        low, high = first * BLOCK_ROWS, min(rows, (first + step) * BLOCK_ROWS)
        mins = None if packed.mins is None else packed.mins[part]
        piece = Packed(packed.format, packed.codes[part], packed.scales[part], mins)
        out[low:high] = _weights(unpack(piece, high - low, cols))[:, :cols]
    return out


def _weights(matrix: Quantized) -> NDArray[np.float32]:
    rows, groups = matrix.scales.shape
    values = matrix.codes.astype(np.float32).reshape(rows, groups, GROUP)
    if matrix.format == "q4":
        values -= 8
    values *= matrix.scales.astype(np.float32)[:, :, None]
    if matrix.mins is not None:
        values += matrix.mins.astype(np.float32)[:, :, None]
    return values.reshape(rows, groups * GROUP)


def _pad(values: NDArray[Any], rows: int, cols: int, fill: int) -> NDArray[Any]:
    if values.shape == (rows, cols):
        return values
    out = np.full((rows, cols), fill, values.dtype)
    out[: values.shape[0], : values.shape[1]] = values
    return out


def _pack_rows(values: NDArray[np.float16], blocks: int, groups: int) -> NDArray[np.float16]:
    padded = _pad(values, blocks * BLOCK_ROWS, groups, 0)
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))


def _unpack_rows(values: NDArray[np.float16], rows: int) -> NDArray[np.float16]:
    blocks, groups = values.shape[:2]
    flat = values.transpose(0, 2, 1).reshape(blocks * BLOCK_ROWS, groups)
    return np.ascontiguousarray(flat[:rows])
