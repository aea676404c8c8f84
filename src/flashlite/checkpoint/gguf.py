"""GGUF files, versions 2 and 3, read as if an enemy had written them.

    magic "GGUF" | u32 version | u64 tensors | u64 keys
    keys:    string key, u32 type, value
    tensors: string name, u32 dims, u64 size per dim (fastest first), u32 type, u64 offset
    padding to the alignment, then the data: each tensor follows the one before, padded likewise

Nothing the file says is believed before it is compared with a limit and with the bytes that are
left, in Python integers, which do not overflow. The header is read with `read`, never mapped, so
that a file cut short by somebody else meanwhile is an error and not a signal.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint import blocks
from flashlite.checkpoint.base import MAX_TENSORS, Checkpoint, TensorInfo, check_name
from flashlite.errors import CheckpointError, UnsupportedModel

__all__ = ["MAGIC", "read_gguf"]

MAGIC = b"GGUF"

_MAX_KEYS = 65536
_MAX_DIMS = 4
_MAX_DIM = 1 << 40
_MAX_ELEMENTS = 1 << 24  # of one array
_MAX_STRING = 1 << 25  # bytes: whole tokenizer.json files are found in metadata
_MAX_HEADER = 1 << 27  # bytes
_MIN_ALIGNMENT, _MAX_ALIGNMENT = 8, 65536
_READ_AHEAD = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# Type numbers of metadata values.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

# Type numbers of tensors: those flashlite reads, and names for the rest.
_TENSOR_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
_UNREAD_TYPES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def read_gguf(path: Path) -> Checkpoint:
    """Read the header of a GGUF file; tensor data stays on disk.

    Metadata values come back as `int`, `float`, `bool`, `str`, `list[str]`, or for an array of
    numbers or booleans a NumPy array of the file's own type.

    Raises:
        UnsupportedModel: a tensor type that flashlite does not decode.
        CheckpointError: the file cannot be opened; is not GGUF, or big-endian, or of another
            version; ends too early; a count, length, dimension, alignment or the header as a whole
            is beyond its limit; a type number is unknown; a boolean is not 0 or 1; a string is not
            UTF-8; an array holds arrays; a key or tensor name is malformed or appears twice; a row
            is no whole number of blocks; a tensor is misplaced (not aligned, overlapping another,
            leaving a hole, or beyond the end); bytes follow the last one; `general.architecture`
            is missing or no word; or the model is split over several files.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _read(path, _Cursor(path, file))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


class _Cursor:
    """A position in the header; every read is checked against the file's size first."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.buffer = b""  # the file from byte 0; doubles when it has been read through
        self.pos = 0

    def fail(
        self, message: str, *, offset: int | None = None, value: object = None, limit: object = None
    ) -> CheckpointError:
        """An error at `offset`, or here."""
        at = self.pos if offset is None else offset
        return CheckpointError(message, path=self.path, offset=at, value=value, limit=limit)

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes, now in the buffer; returns where they start."""
        start = self.pos
        if count > self.size - start:
            raise self.fail(
                f"{what} reaches beyond the end of the file",
                value=f"{count} bytes",
                limit=f"{self.size - start} bytes left",
            )
        if count > _MAX_HEADER - start:
            raise self.fail("the header is too long", value=start + count, limit=_MAX_HEADER)
        end = start + count
        if end > len(self.buffer):
            self._fill(end, what)
        self.pos = end
        return start

    def _fill(self, end: int, what: str) -> None:
        have = len(self.buffer)
        goal = min(self.size, _MAX_HEADER, max(end, 2 * have, _READ_AHEAD))
        parts = [self.buffer]
        while have < goal:
            parts.append(self.file.read(goal - have))
            if not parts[-1]:
                raise self.fail(f"{what} could not be read: the file has become shorter")
            have += len(parts[-1])
        self.buffer = b"".join(parts)

    def u32(self, what: str) -> int:
        start = self.take(4, what)  # first, as it may replace the buffer
        value: int = _U32.unpack_from(self.buffer, start)[0]
        return value

    def u64(self, what: str) -> int:
        start = self.take(8, what)  # first, as it may replace the buffer
        value: int = _U64.unpack_from(self.buffer, start)[0]
        return value

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """Read `count` strings; the loop runs once per token of a vocabulary, so it is plain."""
        out: list[str] = []
        buffer, pos, filled = self.buffer, self.pos, len(self.buffer)
        unpack = _U64.unpack_from
        for _ in range(count):
            if filled - pos < 8:
                self.pos = pos
                self.take(8, f"the length of {what}")
                buffer, filled = self.buffer, len(self.buffer)
            length = unpack(buffer, pos)[0]
            if length > _MAX_STRING:
                raise self.fail(f"{what} is too long", offset=pos, value=length, limit=_MAX_STRING)
            pos += 8
            if filled - pos < length:
                self.pos = pos
                self.take(length, what)
                buffer, filled = self.buffer, len(self.buffer)
            try:
                out.append(buffer[pos : pos + length].decode())
            except UnicodeDecodeError as error:
                raise self.fail(f"{what} is not UTF-8", offset=pos + error.start) from None
            pos += length
        self.pos = pos
        return out

    def value(self, key: str) -> object:
        """A metadata value."""
        start = self.pos
        kind = self.u32(f"the type of key {key!r}")
        if kind == _STRING:
            return self.string(f"the value of key {key!r}")
        if kind == _ARRAY:
            return self.array(key)
        number = _NUMBERS.get(kind)
        if number is None:
            raise self.fail(
                f"key {key!r} has an unknown value type", offset=start, value=kind, limit="0 to 12"
            )
        if kind == _BOOL:
            return bool(self.booleans(1, key)[0])
        return self.numbers(1, number, key)[0].item()

    def array(self, key: str) -> object:
        start = self.pos
        kind = self.u32(f"the element type of key {key!r}")
        if kind == _ARRAY:
            raise self.fail(f"key {key!r} is an array of arrays, which no model needs")
        number = _NUMBERS.get(kind)
        if number is None and kind != _STRING:
            raise self.fail(
                f"key {key!r} has an unknown element type",
                offset=start,
                value=kind,
                limit="0 to 12",
            )
        start = self.pos
        count = self.u64(f"the length of key {key!r}")
        if count > _MAX_ELEMENTS:
            raise self.fail(
                f"array {key!r} is too long", offset=start, value=count, limit=_MAX_ELEMENTS
            )
        least = count * (8 if number is None else number.itemsize)
        if least > self.size - self.pos:
            raise self.fail(
                f"array {key!r} reaches beyond the end of the file",
                offset=start,
                value=f"{count} elements",
                limit=f"{self.size - self.pos} bytes left",
            )
        if number is None:
            return self.strings(count, f"a string of key {key!r}")
        return self.booleans(count, key) if kind == _BOOL else self.numbers(count, number, key)

    def numbers(self, count: int, number: np.dtype[Any], key: str) -> NDArray[Any]:
        start = self.take(count * number.itemsize, f"the value of key {key!r}")
        return np.frombuffer(self.buffer[start : self.pos], number)

    def booleans(self, count: int, key: str) -> NDArray[np.bool_]:
        start = self.pos
        values = self.numbers(count, _NUMBERS[_BOOL], key)
        wrong = values > 1
        if wrong.any():
            at = int(np.argmax(wrong))
            raise self.fail(
                f"key {key!r} has a boolean that is neither 0 nor 1",
                offset=start + at,
                value=int(values[at]),
            )
        return values.astype(np.bool_)


def _read(path: Path, cursor: _Cursor) -> Checkpoint:
    n_tensors, n_keys = _counts(cursor)
    metadata = _metadata(cursor, n_keys)
    architecture = _architecture(path, metadata)
    alignment = _alignment(path, metadata)
    entries = [_entry(cursor) for _ in range(n_tensors)]
    data = -(-cursor.pos // alignment) * alignment
    tensors = _place(cursor, entries, data, alignment)
    return Checkpoint(
        path, "gguf", architecture, MappingProxyType(metadata), MappingProxyType(tensors)
    )


def _counts(cursor: _Cursor) -> tuple[int, int]:
    start = cursor.take(4, "the magic number")
    magic = cursor.buffer[start : start + 4]
    if magic != MAGIC:
        raise cursor.fail("is not a GGUF file", offset=start, value=magic, limit=MAGIC)
    start = cursor.pos
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise cursor.fail(
            "is a big-endian GGUF file; convert the model again as little-endian",
            offset=start,
            value=f"version {version:#x}",
        )
    if version not in (2, 3):
        raise cursor.fail(
            "is a GGUF file of an unknown version", offset=start, value=version, limit="2 or 3"
        )
    n_tensors = _count(cursor, "tensors", MAX_TENSORS)
    n_keys = _count(cursor, "keys", _MAX_KEYS)
    return n_tensors, n_keys


def _count(cursor: _Cursor, what: str, limit: int) -> int:
    start = cursor.pos
    count = cursor.u64(f"the number of {what}")
    if count > limit:
        raise cursor.fail(f"holds too many {what}", offset=start, value=count, limit=limit)
    return count


def _metadata(cursor: _Cursor, n_keys: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for _ in range(n_keys):
        start = cursor.pos
        key = cursor.string("a key")
        check_name("a key", key, cursor.path, start)
        if key in metadata:
            raise cursor.fail(f"key {key!r} appears twice", offset=start)
        metadata[key] = cursor.value(key)
    return metadata


def _architecture(path: Path, metadata: dict[str, object]) -> str:
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            "is one part of a model split over several files; "
            "join them with `llama-gguf-split --merge FIRST-PART OUT.gguf`",
            path=path,
            value=f"split.count {parts}",
            limit=1,
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise CheckpointError(
            "general.architecture does not name an architecture",
            path=path,
            value=ascii(name),
            limit="1 to 64 printable characters",
        )
    return name


def _alignment(path: Path, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if (
        not isinstance(value, int)
        or not _MIN_ALIGNMENT <= value <= _MAX_ALIGNMENT
        or value & (value - 1)
    ):
        raise CheckpointError(
            "general.alignment cannot be used",
            path=path,
            value=value,
            limit=f"a power of two, {_MIN_ALIGNMENT} to {_MAX_ALIGNMENT}",
        )
    return value


def _entry(cursor: _Cursor) -> tuple[int, TensorInfo]:
    """One tensor of the directory: where its entry starts, and its offset from the data."""
    start = cursor.pos
    name = cursor.string("a tensor name")
    check_name("a tensor", name, cursor.path, start)
    at = cursor.pos
    n_dims = cursor.u32(f"the dimensions of tensor {name!r}")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.fail(
            f"tensor {name!r} has a wrong number of dimensions",
            offset=at,
            value=n_dims,
            limit=f"1 to {_MAX_DIMS}",
        )
    sizes = []
    for _ in range(n_dims):
        at = cursor.pos
        sizes.append(cursor.u64(f"the shape of tensor {name!r}"))
        if not 1 <= sizes[-1] <= _MAX_DIM:
            raise cursor.fail(
                f"tensor {name!r} has a wrong dimension",
                offset=at,
                value=sizes[-1],
                limit=f"1 to {_MAX_DIM}",
            )
    shape = tuple(reversed(sizes))
    at = cursor.pos
    dtype = _tensor_type(cursor, name)
    try:
        size = blocks.nbytes(dtype, shape)
    except ValueError as error:
        raise cursor.fail(f"tensor {name!r} of type {dtype}: {error}", offset=at) from None
    at = cursor.pos
    offset = cursor.u64(f"the offset of tensor {name!r}")
    return at, TensorInfo(name, shape, dtype, cursor.path, offset, size)


def _tensor_type(cursor: _Cursor, name: str) -> str:
    at = cursor.pos
    kind = cursor.u32(f"the type of tensor {name!r}")
    dtype = _TENSOR_TYPES.get(kind)
    if dtype is None:
        raise UnsupportedModel(
            f"tensor {name!r} has a type flashlite does not read; take the model in another "
            "quantization",
            path=cursor.path,
            offset=at,
            value=f"type {kind} ({_UNREAD_TYPES.get(kind, 'unknown')})",
            limit=", ".join(blocks.LAYOUTS),
        )
    return dtype


def _place(
    cursor: _Cursor, entries: list[tuple[int, TensorInfo]], data: int, alignment: int
) -> dict[str, TensorInfo]:
    """Check that the tensors follow one another from byte `data` on, as ggml demands."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for at, info in entries:
        what = f"tensor {info.name!r}"
        if info.name in tensors:
            raise cursor.fail(f"{what} appears twice", offset=at)
        if info.offset % alignment:
            raise cursor.fail(
                f"{what} is not aligned", offset=at, value=info.offset, limit=f"n x {alignment}"
            )
        if info.offset != expected:
            fault = "overlaps another tensor" if info.offset < expected else "follows a hole"
            raise cursor.fail(f"{what} {fault}", offset=at, value=info.offset, limit=expected)
        left = max(0, cursor.size - data - info.offset)
        if info.nbytes > left:
            raise cursor.fail(
                f"{what} reaches beyond the end of the file",
                offset=at,
                value=f"{info.nbytes} bytes",
                limit=f"{left} bytes left",
            )
        tensors[info.name] = replace(info, offset=data + info.offset)
        expected = -(-(info.offset + info.nbytes) // alignment) * alignment
    if cursor.size > data + expected:
        raise cursor.fail(
            "has bytes after its last tensor",
            offset=data + expected,
            value=cursor.size - data - expected,
        )
    return tensors
