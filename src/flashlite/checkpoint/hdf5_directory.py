"""What the child process says of an HDF5 file, checked as if the child had been taken over.

Every dataset must be there whole: its pieces cover it, lie inside the file, share no byte, and
inflate to little more than real weights do.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from flashlite.checkpoint.base import MAX_TENSORS, check_name
from flashlite.checkpoint.hdf5_child import MAX_CHUNKS
from flashlite.checkpoint.hdf5_read import NUMBERS, Piece, Stored
from flashlite.errors import CheckpointError

__all__ = ["check_directory"]

_MAX_DIM = 1 << 40
_MAX_RANK = 8

# Chunks may inflate to this many times their bytes, and to a little in any case. Weights shrink by
# a third at most; deflate itself could inflate a thousandfold.
_MAX_RATIO, _FREE_BYTES = 64, 1 << 20

_FILTERS: tuple[list[str], ...] = ([], ["deflate"], ["shuffle"], ["shuffle", "deflate"])


def check_directory(path: Path, entries: list[Any], size: int) -> dict[str, Stored]:
    """The datasets of a file of `size` bytes, by name.

    Raises:
        CheckpointError: there are too many; a name, shape or chunk cannot be; or the numbers of
            one are missing, lie outside the file or in another's, or would inflate too far.
    """
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(
            "holds too many datasets", path=path, value=len(entries), limit=MAX_TENSORS
        )
    stored: dict[str, Stored] = {}
    for entry in entries:
        item = _entry(path, entry)
        if item.name in stored:
            raise CheckpointError("two datasets have one name", path=path, value=ascii(item.name))
        stored[item.name] = item
    _check_places(path, stored.values(), size)
    return stored


def _entry(path: Path, entry: Any) -> Stored:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise CheckpointError("has a dataset without a name", path=path)
    # What is a group in one file is a dot in another.
    name = entry["name"].strip("/").replace("/", ".")
    check_name("a dataset", name, path)
    shape, number = _axes(path, name, "shape", entry.get("shape")), entry.get("number")
    if not isinstance(number, str) or number[:1] not in ("<", ">") or number[1:] not in NUMBERS:
        raise _wrong(path, name, "number format", number, ", ".join(NUMBERS))
    if "chunk" in entry:
        return _in_chunks(Stored(name, path, shape, number, (), (), ()), entry)
    return _in_one_piece(Stored(name, path, shape, number, shape, (), ()), entry)


def _in_one_piece(item: Stored, entry: dict[str, Any]) -> Stored:
    offset, nbytes = entry.get("offset"), entry.get("nbytes")
    if nbytes != item.chunk_bytes:
        raise _wrong(item.file, item.name, "number of bytes", nbytes, item.chunk_bytes)
    if type(offset) is not int:
        raise CheckpointError(f"dataset {item.name!r} was never written", path=item.file)
    start = (0,) * len(item.shape)
    return item.with_pieces((Piece(start, 0, offset, item.chunk_bytes),))


def _in_chunks(item: Stored, entry: dict[str, Any]) -> Stored:
    path, name = item.file, item.name
    chunk, filters = _axes(path, name, "chunk", entry["chunk"]), entry.get("filters")
    if len(chunk) != len(item.shape):
        raise _wrong(path, name, "number of axes in a chunk", len(chunk), len(item.shape))
    if filters not in _FILTERS:
        raise _wrong(path, name, "order of filters", filters, "shuffle, then deflate")
    item = Stored(name, path, item.shape, item.number, chunk, tuple(filters), ())
    found = entry.get("pieces")
    needed = prod(-(-n // step) for n, step in zip(item.shape, chunk, strict=True))
    if not isinstance(found, list) or len(found) != needed or needed > MAX_CHUNKS:
        count = len(found) if isinstance(found, list) else None
        raise _wrong(path, name, "number of chunks", count, f"{needed}, at most {MAX_CHUNKS}")
    pieces = tuple(_piece(item, piece) for piece in found)
    if len({piece.start for piece in pieces}) != needed:
        raise CheckpointError(f"dataset {name!r} has a chunk twice", path=path)
    declared, there = needed * item.chunk_bytes, sum(piece.nbytes for piece in pieces)
    if declared > max(_MAX_RATIO * there, _FREE_BYTES):
        raise CheckpointError(
            f"dataset {name!r} would inflate {declared // max(1, there)} times",
            path=path,
            value=f"{there} bytes for {declared}",
            limit=f"{_MAX_RATIO} times",
        )
    return item.with_pieces(pieces)


def _piece(item: Stored, found: Any) -> Piece:
    if not isinstance(found, list) or len(found) != 4 or not _whole(found[0]):
        raise _wrong(item.file, item.name, "chunk", found, "start, mask, offset and size")
    start, numbers = tuple(found[0]), found[1:]
    grid = zip(start, item.shape, item.chunk, strict=True) if len(start) == len(item.shape) else ()
    inside = bool(start or not item.shape) and all(
        0 <= at < size and at % step == 0 for at, size, step in grid
    )
    if len(start) != len(item.shape) or not inside or not _whole(numbers) or min(numbers) < 0:
        raise _wrong(item.file, item.name, "chunk", found, "a place on the grid of chunks")
    mask, offset, nbytes = numbers
    deflated = any(
        name == "deflate" and not mask >> position & 1 for position, name in enumerate(item.filters)
    )
    if nbytes < 1 or (not deflated and nbytes != item.chunk_bytes):
        raise _wrong(item.file, item.name, "chunk of this size", nbytes, item.chunk_bytes)
    return Piece(start, mask, offset, nbytes)


def _check_places(path: Path, items: Iterable[Stored], size: int) -> None:
    places = sorted(
        (piece.offset, piece.nbytes, item.name) for item in items for piece in item.pieces
    )
    for offset, nbytes, name in places:
        if offset < 0 or offset + nbytes > size:
            raise CheckpointError(
                f"dataset {name!r} reaches beyond the end of the file",
                path=path,
                offset=offset,
                value=f"{nbytes} bytes",
                limit=f"{max(0, size - offset)} bytes left",
            )
    for (offset, nbytes, _), (following, _, name) in pairwise(places):
        if offset + nbytes > following:
            raise CheckpointError(f"dataset {name!r} overlaps another", path=path, offset=following)


def _axes(path: Path, name: str, what: str, found: Any) -> tuple[int, ...]:
    if not _whole(found) or len(found) > _MAX_RANK or not all(1 <= n <= _MAX_DIM for n in found):
        limit = f"up to {_MAX_RANK} axes of 1 to {_MAX_DIM}"
        raise _wrong(path, name, what, found, limit)
    return tuple(found)


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _wrong(path: Path, name: str, what: str, value: object, limit: object) -> CheckpointError:
    return CheckpointError(
        f"dataset {name!r} has a wrong {what}", path=path, value=value, limit=limit
    )
