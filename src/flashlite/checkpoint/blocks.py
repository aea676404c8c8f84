"""From the bytes of a tensor to numbers: the number formats of GGUF and safetensors.

Every format packs `block` consecutive values of a row into `nbytes` bytes, exactly as ggml lays
them out (ggml-common.h of llama.cpp). Decoding is exact: a float16 scale times a code of a few
bits fits float32, so only the last addition rounds, and it rounds as it does in ggml.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import CheckpointError, UnsupportedModel

__all__ = [
    "GRID_DTYPES",
    "LAYOUTS",
    "Grid",
    "Layout",
    "TensorInfo",
    "chunks",
    "dequantize",
    "grid",
    "nbytes",
    "read_bytes",
]

_CHUNK_VALUES = 1 << 20  # values decoded at a time: a few MB of scratch, whatever the tensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; nothing of its data is read yet."""

    name: str
    shape: tuple[int, ...]  # row-major: (rows, columns), the last one contiguous
    dtype: str  # a key of `LAYOUTS`: F32, F16, BF16, Q4_0, ... Q6_K; else it cannot be decoded
    file: Path
    offset: int  # bytes from the start of `file`
    nbytes: int

    @property
    def cols(self) -> int:
        """Length of the contiguous axis; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """All other axes multiplied; 1 for a vector."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows


@dataclass(frozen=True)
class Grid:
    """The integer grid of a tensor, unchanged: `(codes - zero) * scales [+ mins]` per 32 columns.

    Q4_0: codes 0..15, zero 8. Q4_1: codes 0..15, zero 0, with mins. Q8_0: codes -128..127, zero 0.
    Scales may be negative or zero; they are finite.
    """

    codes: NDArray[Any]  # uint8 (Q4_0, Q4_1) or int8 (Q8_0), (rows, cols)
    scales: NDArray[np.float16]  # (rows, cols / 32)
    mins: NDArray[np.float16] | None  # (rows, cols / 32), Q4_1 only
    zero: int


@dataclass(frozen=True)
class Layout:
    """One number format."""

    block: int  # values
    nbytes: int  # bytes per block
    scales: tuple[slice, ...]  # where the float16 scales and minima stand in a block
    decode: Callable[[Bytes], Floats]  # (n, nbytes) -> (n, block)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this format and shape, in Python integers that cannot overflow.

    Raises:
        ValueError: the last axis is not a whole number of blocks.
        KeyError: `dtype` is not in `LAYOUTS`.
    """
    layout = LAYOUTS[dtype]
    cols = shape[-1] if shape else 1
    if cols % layout.block:
        raise ValueError(f"{cols} columns are not a multiple of {layout.block}")
    total = layout.nbytes * (cols // layout.block)
    for size in shape[:-1]:
        total *= size
    return total


def read_bytes(info: TensorInfo) -> Bytes:
    """Read the bytes of one tensor into private memory.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter since it was opened.
    """
    try:
        with info.file.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if info.nbytes > size - info.offset:
                raise _shorter(info, size)
            out = np.empty(info.nbytes, dtype=np.uint8)
            view = out.data
            file.seek(info.offset)
            while len(view):
                got = file.readinto(view)
                if not got:
                    raise _shorter(info, info.offset + info.nbytes - len(view))
                view = view[got:]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=info.file) from None
    return out


def chunks(info: TensorInfo, raw: Bytes) -> Iterator[tuple[int, Floats]]:
    """Decode a tensor some rows at a time: `(first row, float32 (rows, cols))`, in order.

    Raises:
        CheckpointError: a scale or a value is not finite.
        UnsupportedModel: the format is one flashlite does not decode.
    """
    layout = _layout(info)
    blocks = _blocks(info, raw, layout)
    for start, stop in _row_ranges(info):
        yield start, _decode(info, layout, blocks, start, stop)


def dequantize(info: TensorInfo, raw: Bytes) -> Floats:
    """Decode a whole tensor to float32 in its own shape; scratch memory stays small.

    Raises:
        CheckpointError: a scale or a value is not finite.
        UnsupportedModel: the format is one flashlite does not decode.
    """
    out = np.empty((info.rows, info.cols), dtype=np.float32)
    for start, values in chunks(info, raw):
        out[start : start + len(values)] = values
    return out.reshape(info.shape)


def grid(info: TensorInfo, raw: Bytes) -> Grid:
    """The codes, scales and minima of a Q4_0, Q4_1 or Q8_0 tensor, bit for bit.

    Raises:
        CheckpointError: a scale is not finite.
        UnsupportedModel: the format has no such grid.
    """
    if info.dtype not in GRID_DTYPES:
        raise UnsupportedModel(
            f"tensor {info.name!r} has no grid of 32 to import",
            path=info.file,
            value=info.dtype,
            limit=", ".join(GRID_DTYPES),
        )
    layout = LAYOUTS[info.dtype]
    blocks = _blocks(info, raw, layout)
    _check_scales(info, layout, blocks, 0)
    groups = info.cols // 32
    halves = [_f16(blocks[:, part]).reshape(info.rows, groups) for part in layout.scales]
    mins = halves[1] if info.dtype == "Q4_1" else None
    if info.dtype == "Q8_0":
        codes = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).reshape(info.rows, info.cols)
        return Grid(codes, halves[0], mins, 0)
    nibbles = np.empty((info.rows, info.cols), dtype=np.uint8)
    per_row = groups
    for start, stop in _row_ranges(info):
        packed = blocks[start * per_row : stop * per_row, layout.nbytes - 16 :]
        nibbles[start:stop] = _nibbles(packed).reshape(stop - start, info.cols)
    return Grid(nibbles, halves[0], mins, 8 if info.dtype == "Q4_0" else 0)


# ---- one block of each format -------------------------------------------------------------------


def _f16(part: Bytes) -> NDArray[np.float16]:
    """Two little-endian bytes per block, as float16 (n,)."""
    return np.ascontiguousarray(part).view("<f2")[:, 0]


def _scale(part: Bytes) -> Floats:
    return _f16(part).astype(np.float32)[:, None]


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves first, then high halves: (n, k) bytes -> (n, 2k) codes."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _f32_block(b: Bytes) -> Floats:
    return np.ascontiguousarray(b).view("<f4").astype(np.float32)


def _f16_block(b: Bytes) -> Floats:
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _bf16_block(b: Bytes) -> Floats:
    return (np.ascontiguousarray(b).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: Bytes) -> Floats:
    return _scale(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _scale(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _scale(b[:, 2:4])


def _fifth_bits(part: Bytes) -> Bytes:
    """Four bytes -> their 32 bits, lowest first, worth 16 each."""
    bits: Bytes = np.unpackbits(part, axis=1, bitorder="little") * np.uint8(16)
    return bits


def _q5_0(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return _scale(b[:, :2]) * (codes.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return _scale(b[:, :2]) * codes.astype(np.float32) + _scale(b[:, 2:4])


def _q8_0(b: Bytes) -> Floats:
    codes = np.ascontiguousarray(b[:, 2:]).view(np.int8)
    return _scale(b[:, :2]) * codes.astype(np.float32)


def _six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """Twelve bytes -> eight 6-bit scales and eight 6-bit minima of a K block, (n, 8, 1) each.

    Bytes 0-3 and 4-7 hold the first four scales and minima in their low six bits; their top two
    bits complete the last four, whose low halves share bytes 8-11.
    """
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    mins = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return scales.astype(np.float32)[:, :, None], mins.astype(np.float32)[:, :, None]


def _k_affine(b: Bytes, codes: Bytes) -> Floats:
    """(n, 8, 32) codes of a Q4_K or Q5_K block, whose scales stand in its first 16 bytes."""
    scales, mins = _six_bit_pairs(b[:, 4:16])
    scales *= _scale(b[:, 0:2])[:, :, None]
    mins *= _scale(b[:, 2:4])[:, :, None]
    return (scales * codes.astype(np.float32) - mins).reshape(len(b), 256)


def _k_nibbles(packed: Bytes) -> Bytes:
    """128 bytes -> (n, 8, 32): each run of 32 bytes holds two groups, low halves then high."""
    runs = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), 8, 32)


def _q4_k(b: Bytes) -> Floats:
    return _k_affine(b, _k_nibbles(b[:, 16:144]))


def _q5_k(b: Bytes) -> Floats:
    group = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (b[:, None, 16:48] >> group & 1) * np.uint8(16)  # bit g of byte l: value l of group g
    return _k_affine(b, _k_nibbles(b[:, 48:176]) | fifth)


def _q6_k(b: Bytes) -> Floats:
    n = len(b)
    # Each half of 128 values: 64 bytes of low nibbles, 32 bytes of four 2-bit tops.
    low = b[:, :128].reshape(n, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(n, 2, 4, 32)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    top = (b[:, 128:192].reshape(n, 2, 1, 32) >> shift & 3) << 4
    codes = (low | top).reshape(n, 16, 16).astype(np.float32) - 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    scales *= _scale(b[:, 208:210])
    return (scales[:, :, None] * codes).reshape(n, 256)


_D = slice(0, 2)
_M = slice(2, 4)

LAYOUTS: dict[str, Layout] = {
    "F32": Layout(1, 4, (), _f32_block),
    "F16": Layout(1, 2, (), _f16_block),
    "BF16": Layout(1, 2, (), _bf16_block),
    "Q4_0": Layout(32, 18, (_D,), _q4_0),
    "Q4_1": Layout(32, 20, (_D, _M), _q4_1),
    "Q5_0": Layout(32, 22, (_D,), _q5_0),
    "Q5_1": Layout(32, 24, (_D, _M), _q5_1),
    "Q8_0": Layout(32, 34, (_D,), _q8_0),
    "Q4_K": Layout(256, 144, (_D, _M), _q4_k),
    "Q5_K": Layout(256, 176, (_D, _M), _q5_k),
    "Q6_K": Layout(256, 210, (slice(208, 210),), _q6_k),
}
"""Every format flashlite decodes."""

GRID_DTYPES = ("Q4_0", "Q4_1", "Q8_0")
"""Formats whose grid is taken over unchanged."""


# ---- helpers ------------------------------------------------------------------------------------


def _layout(info: TensorInfo) -> Layout:
    layout = LAYOUTS.get(info.dtype)
    if layout is None:
        raise UnsupportedModel(
            f"tensor {info.name!r} has a number format that cannot be decoded",
            path=info.file,
            value=info.dtype,
            limit=", ".join(LAYOUTS),
        )
    return layout


def _blocks(info: TensorInfo, raw: Bytes, layout: Layout) -> Bytes:
    if raw.size != nbytes(info.dtype, info.shape):
        raise CheckpointError(
            f"tensor {info.name!r} of shape {info.shape} has the wrong number of bytes",
            path=info.file,
            value=raw.size,
            limit=nbytes(info.dtype, info.shape),
        )
    return raw.reshape(-1, layout.nbytes)


def _row_ranges(info: TensorInfo) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_VALUES // max(1, info.cols))
    for start in range(0, info.rows, step):
        yield start, min(info.rows, start + step)


def _decode(info: TensorInfo, layout: Layout, blocks: Bytes, start: int, stop: int) -> Floats:
    per_row = info.cols // layout.block
    part = blocks[start * per_row : stop * per_row]
    _check_scales(info, layout, part, start * per_row)
    values = layout.decode(part).reshape(stop - start, info.cols)
    if not layout.scales and not np.isfinite(values).all():
        raise _not_finite(info, "value", int(np.argmin(np.isfinite(values.ravel()))), start)
    return values


def _check_scales(info: TensorInfo, layout: Layout, blocks: Bytes, first: int) -> None:
    for part in layout.scales:
        finite = np.isfinite(_f16(blocks[:, part]))
        if not finite.all():
            bad = first + int(np.argmin(finite))
            raise CheckpointError(
                f"tensor {info.name!r} has a scale that is not finite in block {bad}",
                path=info.file,
                offset=info.offset + bad * layout.nbytes + part.start,
            )


def _not_finite(info: TensorInfo, what: str, index: int, row: int) -> CheckpointError:
    index += row * info.cols
    return CheckpointError(
        f"tensor {info.name!r} has a {what} that is not finite, number {index}",
        path=info.file,
        offset=info.offset + index * LAYOUTS[info.dtype].nbytes,
    )


def _shorter(info: TensorInfo, size: int) -> CheckpointError:
    return CheckpointError(
        f"tensor {info.name!r} reaches beyond the end: the file has become shorter",
        path=info.file,
        offset=info.offset,
        value=f"{size} bytes",
        limit=f"{info.offset + info.nbytes} bytes",
    )
