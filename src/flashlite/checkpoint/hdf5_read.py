"""The numbers of an HDF5 dataset, read by our own few lines: one piece, or chunks put together.

The HDF5 library (see hdf5_child.py) says where the bytes lie and is not believed: offsets, sizes
and shapes were compared with each other and with the file before a `Stored` was made.

Source: HDF5 File Format Specification 3.0, "Data Storage - Filter Pipeline".
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint import blocks
from flashlite.checkpoint.base import Checkpoint, TensorInfo
from flashlite.errors import CheckpointError

__all__ = ["NUMBERS", "Adopted", "Piece", "Stored", "adopt", "read_dataset"]

Bytes = NDArray[np.uint8]

NUMBERS: Mapping[str, tuple[str, str, str]] = {
    "f2": ("F16", "f2", "<f2"),
    "f4": ("F32", "f4", "<f4"),
    "f8": ("F32", "f8", "<f4"),  # rounded to what every later stage computes with
    "b2": ("BF16", "u2", "<u2"),
    **{
        f"{kind}{size}": (f"{kind.upper()}{8 * size}", f"{kind}{size}", f"<{kind}{size}")
        for kind in "iu"
        for size in (1, 2, 4, 8)
    },
}
"""Number in the file, its byte order aside -> type of the tensor, NumPy type in the file and out.

Whole numbers lie in buffers that no forward pass needs; they fail when they are read as weights.
"""


@dataclass(frozen=True)
class Piece:
    """One stored chunk."""

    start: tuple[int, ...]  # where its first value stands in the dataset
    mask: int  # bit i: filter i was left out
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """How the numbers of one dataset lie in the file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    number: str  # byte order and a key of `NUMBERS`
    chunk: tuple[int, ...]  # the dataset's own shape where it lies in one piece
    filters: tuple[str, ...]  # "shuffle", "deflate": in the order they were applied
    pieces: tuple[Piece, ...]

    @property
    def in_file(self) -> np.dtype[Any]:
        """The NumPy type of the stored numbers."""
        return np.dtype(self.number[0] + NUMBERS[self.number[1:]][1])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk without filters."""
        return prod(self.chunk) * self.in_file.itemsize

    def with_pieces(self, pieces: tuple[Piece, ...]) -> Stored:
        """The same with its places known."""
        return replace(self, pieces=pieces)

    def info(self) -> TensorInfo:
        """The tensor that `read_dataset` makes of it."""
        dtype, _, out = NUMBERS[self.number[1:]]
        nbytes = prod(self.shape) * np.dtype(out).itemsize
        return TensorInfo(self.name, self.shape, dtype, self.file, self.pieces[0].offset, nbytes)


def read_dataset(stored: Stored) -> Bytes:
    """Read one dataset as little-endian bytes of the type its `info` names.

    Raises:
        CheckpointError: the file cannot be read or has become shorter, or a chunk does not
            inflate to what it must.
    """
    out = np.empty(stored.shape, dtype=NUMBERS[stored.number[1:]][2])
    for piece in stored.pieces:
        raw = blocks.read_bytes(
            TensorInfo(stored.name, (piece.nbytes,), "U8", stored.file, piece.offset, piece.nbytes)
        )
        values = _plain(stored, piece, raw).view(stored.in_file).reshape(stored.chunk)
        ends = [
            min(a + n, size)
            for a, n, size in zip(piece.start, stored.chunk, stored.shape, strict=True)
        ]
        there = tuple(slice(a, b) for a, b in zip(piece.start, ends, strict=True))
        here = tuple(slice(0, b - a) for a, b in zip(piece.start, ends, strict=True))
        with np.errstate(over="ignore"):  # an infinity is refused by who reads it, with its place
            out[there] = values[here]
    return out.reshape(-1).view(np.uint8)


def _plain(stored: Stored, piece: Piece, raw: Bytes) -> Bytes:
    """Undo the filters of one chunk, the last one first."""
    for position in reversed(range(len(stored.filters))):
        if piece.mask >> position & 1:
            continue
        if stored.filters[position] == "deflate":
            raw = _inflate(stored, piece, raw)
        else:  # byte k of every value stands together
            raw = np.ascontiguousarray(raw.reshape(stored.in_file.itemsize, -1).T).reshape(-1)
    if raw.size != stored.chunk_bytes:
        raise _broken(stored, piece, f"{raw.size} bytes")
    return raw


def _inflate(stored: Stored, piece: Piece, raw: Bytes) -> Bytes:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(raw.data, stored.chunk_bytes + 1)
    except zlib.error as error:
        raise _broken(stored, piece, str(error)) from None
    if len(data) != stored.chunk_bytes or not inflater.eof:
        raise _broken(stored, piece, f"{len(data)} bytes" + ("" if inflater.eof else " or more"))
    return np.frombuffer(data, dtype=np.uint8)


def _broken(stored: Stored, piece: Piece, found: str) -> CheckpointError:
    return CheckpointError(
        f"dataset {stored.name!r} has a damaged chunk",
        path=stored.file,
        offset=piece.offset,
        value=found,
        limit=f"{stored.chunk_bytes} bytes",
    )


@dataclass(frozen=True)
class Adopted:
    """A tensor under another name and in another order."""

    source: str  # its name in the file
    axes: tuple[int, ...]  # the stored axes in their new order
    shape: tuple[int, ...]  # what the reordered numbers are then cut into


def adopt(checkpoint: Checkpoint, tensors: Mapping[str, Adopted]) -> Checkpoint:
    """The same file, seen through other names.

    Args:
        checkpoint: a file whose numbers are stored one by one (not in blocks of a quantized type).
        tensors: name -> what it is; the rest of the file is not seen.
    """
    infos = {
        name: replace(checkpoint.info(item.source), name=name, shape=item.shape)
        for name, item in tensors.items()
    }

    def read(info: TensorInfo) -> Bytes:
        item = tensors[info.name]
        old = checkpoint.info(item.source)
        raw = checkpoint.read(old)
        if item.axes == tuple(range(len(old.shape))):
            return raw
        values = raw.reshape(*old.shape, old.nbytes // prod(old.shape))
        return np.ascontiguousarray(values.transpose(*item.axes, len(old.shape))).reshape(-1)

    return replace(checkpoint, tensors=infos, read=read)
