"""Bytes that are what the manifest says, or an error that names what is not.

BLAKE3 reads at several GB/s, so every file is checked at every load.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.format import (
    CONFIG,
    FORMAT_VERSION,
    LIMITS,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    FileDigest,
    Manifest,
    PackedTensor,
)
from flashlite.errors import ArtifactError, IntegrityError

__all__ = [
    "check_version",
    "corrupt",
    "differing",
    "digest",
    "first_infinite",
    "open_file",
    "parse_json",
    "read_manifest",
    "read_small",
]

_HEX = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,3}")
_AGAIN = "quantize or pull the model again"


def digest(data: bytes | memoryview) -> str:
    """BLAKE3, hex."""
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


def corrupt(path: Path, what: str) -> IntegrityError:
    """The error for bytes that differ from the manifest."""
    return IntegrityError(f"{path}: {what} differs from {MANIFEST}; {_AGAIN}")


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for unbuffered reading; a pipe or a device is refused, not waited for.

    Raises:
        ArtifactError: it is missing, is not a regular file, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtifactError(f"{path}: not a regular file; {_AGAIN}")
            yield file
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there is no such file; {_AGAIN}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None


def read_small(folder: Path, name: str, manifest: Manifest | None = None) -> bytes:
    """Read one file other than the weights; with a manifest, only as the manifest has it.

    Raises:
        ArtifactError: it cannot be read or is larger than `LIMITS` allows.
        IntegrityError: it is not the file of the manifest.
    """
    path, limit = folder / name, LIMITS[name]
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ArtifactError(f"{path}: {size} bytes, at most {limit} are read; {_AGAIN}")
        parts = []
        # Not `limit` at once: that much memory would be asked for.
        while part := file.read(min(size, limit) + 1):
            parts.append(part)
            limit -= len(part)
            if limit < 0:
                raise ArtifactError(f"{path}: grows while it is read; {_AGAIN}")
    data = b"".join(parts)
    if manifest is not None:
        expected = manifest.files.get(name)
        if expected is None or expected != FileDigest(len(data), digest(data)):
            raise corrupt(path, "the file")
    return data


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no duplicate keys, no NaN, no absurd nesting.

    Raises:
        ArtifactError: it is not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {twice[:60]!r} stands there twice")
        return found

    def constant(text: str) -> float:
        raise ValueError(f"{text} is not a number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ArtifactError(f"{path}: nested too deeply; {_AGAIN}") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}; {_AGAIN}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object; {_AGAIN}")
    return value


def check_version(data: Mapping[str, Any], path: Path) -> None:
    """Refuse what a newer flashlite wrote, by number, before anything else is believed.

    Raises:
        ArtifactError: `format_version` is missing, not a whole number, or newer.
    """
    version = data.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{path}: format_version is {str(version)[:20]!r}, not a number from 1")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format {version} is newer than {FORMAT_VERSION}, the newest this flashlite "
            "reads; upgrade flashlite, or quantize the model again"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ArtifactError: it is missing, malformed or newer.
    """
    path = folder / MANIFEST
    data = read_small(folder, MANIFEST)
    value = parse_json(data, path)
    check_version(value, path)
    files, tensors = value.get("files"), value.get("tensors")
    if set(value) != {"format_version", "files", "tensors"} or not (
        isinstance(files, dict) and isinstance(tensors, dict)
    ):
        raise ArtifactError(f"{path}: not an object of format_version, files, tensors; {_AGAIN}")
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if name not in files:
            raise ArtifactError(f"{path}: does not list {name}; {_AGAIN}")
    for name, hexes in tensors.items():
        if not isinstance(hexes, str) or not _HEX.fullmatch(hexes):
            raise ArtifactError(f"{path}: tensor {name[:60]!r} has no BLAKE3 digest; {_AGAIN}")
    entries = {name: _entry(name, entry, path) for name, entry in files.items()}
    return Manifest(entries, tensors, digest(data))


def _entry(name: str, entry: object, path: Path) -> FileDigest:
    if not _PATH.fullmatch(name) or name == MANIFEST:
        raise ArtifactError(f"{path}: lists the file {name[:60]!r}, which is not allowed")
    if isinstance(entry, dict) and set(entry) == {"size", "blake3"}:
        size, hexes = entry["size"], entry["blake3"]
        if type(size) is int and size >= 0 and isinstance(hexes, str) and _HEX.fullmatch(hexes):
            return FileDigest(size, hexes)
    raise ArtifactError(f"{path}: file {name} has no size and BLAKE3 digest; {_AGAIN}")


def differing(
    tensors: Mapping[str, PackedTensor], weights: NDArray[np.uint8], manifest: Manifest
) -> list[str]:
    """The stored arrays whose bytes are not those of the manifest."""
    return [
        name
        for name, t in tensors.items()
        if digest(weights[t.offset : t.offset + t.nbytes].data) != manifest.tensors.get(name)
    ]


def first_infinite(tensors: Mapping[str, PackedTensor], weights: NDArray[np.uint8]) -> str | None:
    """The first stored array of floats that holds an infinity or a NaN, None if all are finite."""
    for name, t in tensors.items():
        data = weights[t.offset : t.offset + t.nbytes]
        # Not finite: all exponent bits are ones. Without the sign such bits are the largest.
        if t.dtype == "F16" and _largest(data.view(np.uint16), 0x7FFF) >= 0x7C00:
            return name
        if t.dtype == "F32" and _largest(data.view(np.uint32), 0x7FFFFFFF) >= 0x7F800000:
            return name
    return None


def _largest(bits: NDArray[Any], mask: int) -> int:
    step = 1 << 18  # stays in the cache
    return max(
        (int((bits[i : i + step] & mask).max()) for i in range(0, len(bits), step)), default=0
    )
