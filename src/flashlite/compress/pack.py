"""The packed layout of one matrix, as `csrc/fl_kernels.h` defines it, and its inverse.

    Quantized   codes row by row           [rows, cols]
       │ pack       ▲ unpack
       ▼            │
    Packed      blocks of 16 rows x 32 columns: one 64-byte vector holds 4 columns of 16 rows

Rows and columns are padded to whole blocks with weights that are zero.

A weight is  q8: scale * code   q4: scale * (code - 8)   q4m: scale * code + min
             q5: scale * (code - 16)   q6: scale * (code - 32).

q5 and q6 hold the low four bits of their codes as q4 does, and the bits above them in one or two
vectors of 64 bytes behind: of q5 each byte has one bit of eight codes, of q6 two bits of four. So
they are put back by a shift, a mask and an `or` on any processor.
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
    "ZERO",
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
_HIGH_BITS = {"q4": 0, "q4m": 0, "q5": 1, "q6": 2}  # of a code, beside its four low ones
CODE_BYTES = {"q8": 512} | {fmt: 256 + 64 * bits for fmt, bits in _HIGH_BITS.items()}
"""Of one block and group, by format."""
CODE_DTYPE: dict[str, type[Any]] = {"q8": np.int8} | dict.fromkeys(_HIGH_BITS, np.uint8)
ZERO = {"q8": 0, "q4": 8, "q4m": 0, "q5": 16, "q6": 32}
"""The code of a weight that is zero (q4m: with min 0)."""


@dataclass(frozen=True)
class Quantized:
    """One quantized matrix, row by row; `cols` is padded to whole groups.

    Attributes:
        format: a key of `CODE_BYTES`.
        codes: [rows, groups * 32], int8 for q8, else uint8: 0..15 for q4 and q4m, 0..31 for q5,
            0..63 for q6.
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
        format: a key of `CODE_BYTES`.
        codes: [blocks, groups, CODE_BYTES[format]], int8 for q8, else uint8.
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
    codes = _pad(matrix.codes, blocks * BLOCK_ROWS, groups * GROUP, ZERO[matrix.format])
    # (b, row, g, k4, k) -> (b, g, k4, row, k): eight vectors of 64 codes
    cells = codes.reshape(blocks, BLOCK_ROWS, groups, 8, 4).transpose(0, 2, 3, 1, 4)
    vectors = np.ascontiguousarray(cells).reshape(blocks, groups, 8, 64)
    if matrix.format != "q8":
        vectors = _narrow(vectors, _HIGH_BITS[matrix.format])
    return Packed(
        matrix.format,
        vectors.reshape(blocks, groups, CODE_BYTES[matrix.format]),
        _pack_rows(matrix.scales, blocks, groups),
        None if matrix.mins is None else _pack_rows(matrix.mins, blocks, groups),
    )


def unpack(packed: Packed, rows: int, cols: int) -> Quantized:
    """The `rows` x `cols` codes that `pack` arranged; columns stay padded to groups."""
    blocks, groups = packed.codes.shape[:2]
    vectors = packed.codes.reshape(blocks, groups, -1, 64)
    if packed.format != "q8":
        vectors = _widen(vectors, _HIGH_BITS[packed.format])
    cells = vectors.reshape(blocks, groups, 8, BLOCK_ROWS, 4).transpose(0, 3, 1, 2, 4)
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


def _narrow(vectors: NDArray[Any], bits: int) -> NDArray[Any]:
    """[..., 8, 64] codes -> [..., 4 + bits, 64]: nibbles in pairs, then `bits` more of each."""
    low = vectors & 15
    nibbles = low[..., 0::2, :] | (low[..., 1::2, :] << 4)
    if not bits:
        return nibbles
    high = (vectors >> 4).reshape(*vectors.shape[:-2], bits, 8 // bits, 64)
    places = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.concatenate((nibbles, np.bitwise_or.reduce(high << places, axis=-2)), axis=-2)


def _widen(vectors: NDArray[Any], bits: int) -> NDArray[Any]:
    """The inverse of `_narrow`."""
    nibbles = vectors[..., :4, :]
    codes = np.stack((nibbles & 15, nibbles >> 4), axis=-2)
    codes = codes.reshape(*vectors.shape[:-2], 8, 64)
    if bits:
        places = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        high = vectors[..., 4:, None, :] >> places & np.uint8((1 << bits) - 1)
        codes |= high.reshape(codes.shape) << 4
    return codes


def _weights(matrix: Quantized) -> NDArray[np.float32]:
    rows, groups = matrix.scales.shape
    values = matrix.codes.astype(np.float32).reshape(rows, groups, GROUP)
    if ZERO[matrix.format]:
        values -= ZERO[matrix.format]
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
