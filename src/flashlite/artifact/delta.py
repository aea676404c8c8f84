"""`NAME.delta`: the last layers and the final norm of an artifact, tuned, in one safetensors file.

    8 bytes   length of the header
    header    the tensors as the artifact stores them, and `__metadata__`: format_version, base (the
              model it applies to), layers, made (what made it, JSON), digest
    data      the tensors, one after another, in the artifact's order

`base` names the model's description, formats and tensors, not the manifest: a card measured anew or
a split head fitted anew leaves a delta valid. `digest` is BLAKE3 over all the rest. A delta is read
against the artifact it shall change: only that artifact's own layout is accepted.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.format import DTYPES, Artifact, PackedTensor
from flashlite.artifact.integrity import digest, first_infinite, open_file, parse_json
from flashlite.compress.screen import SCREEN
from flashlite.compress.tail import tail_shapes
from flashlite.errors import ArtifactError, CompressError, IntegrityError

__all__ = ["Delta", "base_digest", "delta_bytes", "read_delta", "tail_tensors", "write_delta"]

VERSION = 1
_HEADER = 1 << 20  # the most bytes of a header that are read
_FACTS = 1 << 16  # the most bytes of what made it
_KEYS = {"format_version", "base", "layers", "made", "digest"}


@dataclass(frozen=True)
class Delta:
    """A delta in memory, checked against its artifact.

    Attributes:
        base: BLAKE3 of the model it applies to, hex.
        layers: how many at the end it replaces.
        made: what made it: command, data, seed, figures before and after.
        arrays: the tensors by stored name, in the artifact's order.
        digest: BLAKE3 of the file's other bytes, hex; it names the delta.
        raw: the file's bytes; the arrays lie in them.
    """

    base: str
    layers: int
    made: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    digest: str
    raw: bytes = field(repr=False)


def base_digest(artifact: Artifact) -> str:
    """What a delta applies to: BLAKE3 of description, formats, tensors; not of the split head."""
    formats, tensors = artifact.plan.formats, artifact.manifest.tensors
    described = {
        "model": artifact.spec.to_json(),
        "formats": {n: f for n, f in sorted(formats.items()) if not n.startswith(f"{SCREEN}.")},
        "tensors": {n: d for n, d in sorted(tensors.items()) if not n.startswith(f"{SCREEN}.")},
    }
    return digest(json.dumps(described, sort_keys=True).encode())


def tail_tensors(artifact: Artifact, layers: int) -> list[PackedTensor]:
    """The stored arrays of the last layers and the final norm, where they lie in a delta.

    Raises:
        ArtifactError: the model has not that many layers.
    """
    try:
        names = {name for name, _ in tail_shapes(artifact.spec, layers)}
    except CompressError as error:
        raise ArtifactError(f"{artifact.path}: {error}") from None
    entries, offset = [], 0
    for name, entry in artifact.tensors.items():
        stem, _, part = name.rpartition(".")
        if name in names or (stem in names and part in ("codes", "scales", "mins")):
            entries.append(replace(entry, offset=offset))
            offset += entry.nbytes
    return entries


def delta_bytes(
    artifact: Artifact,
    layers: int,
    arrays: Mapping[str, NDArray[Any]],
    made: Mapping[str, Any],
) -> bytes:
    """The bytes of a delta file.

    Args:
        artifact: what it applies to.
        layers: how many at the end it replaces.
        arrays: exactly their stored arrays.
        made: what made it.

    Raises:
        ArtifactError: the arrays are not those of the artifact, one is not finite, or `made` is
            too long.
    """
    entries = tail_tensors(artifact, layers)
    if odd := set(arrays) ^ {entry.name for entry in entries}:
        raise ArtifactError(f"a delta of {layers} layers lacks or must not hold {min(odd)[:60]!r}")
    parts = []
    for entry in entries:
        array = np.ascontiguousarray(arrays[entry.name])
        if (array.dtype, array.shape) != (DTYPES[entry.dtype], entry.shape):
            raise ArtifactError(
                f"array {entry.name} is {array.dtype} {array.shape}, must be "
                f"{DTYPES[entry.dtype]} {entry.shape}"
            )
        parts.append(array.tobytes())
    data = b"".join(parts)
    _check_finite(entries, data, "the delta")
    facts = json.dumps(made, sort_keys=True, allow_nan=False)
    if len(facts) > _FACTS:
        raise ArtifactError(f"what made the delta takes {len(facts)} bytes, allowed {_FACTS}")
    fields = {
        "format_version": str(VERSION),
        "base": base_digest(artifact),
        "layers": str(layers),
        "made": facts,
    }
    header = _header(entries, {**fields, "digest": _own_digest(entries, fields, data)})
    return header + data


def write_delta(path: Path, data: bytes) -> None:
    """Put the bytes of a delta at `path`, whole or not at all.

    Raises:
        ArtifactError: the disk refuses.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror}") from None


def read_delta(path: Path, artifact: Artifact, *, check_base: bool = True) -> Delta:
    """Read a delta and believe nothing of it that is not checked.

    Args:
        path: the file.
        artifact: what it shall change.
        check_base: refuse one that applies to another model; those inside an artifact once did.

    Raises:
        ArtifactError: it is malformed, too large, newer, holds other tensors than the artifact's,
            a value that is not finite, or applies to another model.
        IntegrityError: its bytes are not those its digest names.
    """
    raw = _read(path, artifact)
    length = int.from_bytes(raw[:8], "little")
    header = parse_json(raw[8 : 8 + length], path)
    fields = header.pop("__metadata__", None)
    if not isinstance(fields, dict) or set(fields) != _KEYS:
        raise ArtifactError(f"{path}: is no delta: its metadata are not {', '.join(sorted(_KEYS))}")
    if not all(isinstance(value, str) for value in fields.values()):
        raise ArtifactError(f"{path}: its metadata hold a value that is not text")
    version = _number(fields["format_version"], path, "format_version")
    if version > VERSION:
        raise ArtifactError(
            f"{path}: delta format {version} is newer than {VERSION}, the newest this flashlite "
            "reads; upgrade flashlite"
        )
    layers = _number(fields["layers"], path, "layers")
    if check_base and (wanted := base_digest(artifact)) != fields["base"]:
        raise ArtifactError(
            f"{path}: applies to model {fields['base'][:12]}, {artifact.path} is {wanted[:12]}; "
            "deltas apply in the order they were made in"
        )
    entries = tail_tensors(artifact, layers)
    data = memoryview(raw)[8 + length :]
    if header != _described(entries) or len(data) != sum(entry.nbytes for entry in entries):
        raise ArtifactError(
            f"{path}: its tensors are not the last {layers} layers and the final norm of "
            f"{artifact.path}"
        )
    own = fields.pop("digest")
    if own != _own_digest(entries, fields, data):
        raise IntegrityError(f"{path}: differs from the digest it carries; make or fetch it again")
    if len(fields["made"]) > _FACTS:
        raise ArtifactError(f"{path}: what made it takes {len(fields['made'])} bytes")
    made = parse_json(fields["made"].encode(), path)
    _check_finite(entries, data, str(path))
    arrays = {}
    for entry in entries:
        part = np.frombuffer(data, np.uint8, entry.nbytes, entry.offset)
        arrays[entry.name] = part.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return Delta(fields["base"], layers, made, arrays, own, raw)


def _read(path: Path, artifact: Artifact) -> bytes:
    """The file's bytes; no more than a delta of this artifact can have."""
    limit = 8 + _HEADER + sum(entry.nbytes for entry in artifact.tensors.values())
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not 10 <= size <= limit:
            raise ArtifactError(f"{path}: {size} bytes, a delta of this model has 10 to {limit}")
        parts, left = [], size + 1
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    raw = b"".join(parts)
    length = int.from_bytes(raw[:8], "little")
    if len(raw) != size or not 2 <= length <= min(_HEADER, size - 8):
        raise ArtifactError(f"{path}: is no delta: its header would have {length} bytes")
    return raw


def _described(entries: list[PackedTensor]) -> dict[str, Any]:
    return {
        e.name: {
            "dtype": e.dtype,
            "shape": list(e.shape),
            "data_offsets": [e.offset, e.offset + e.nbytes],
        }
        for e in entries
    }


def _header(entries: list[PackedTensor], fields: Mapping[str, str]) -> bytes:
    described = {"__metadata__": dict(fields), **_described(entries)}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _own_digest(
    entries: list[PackedTensor], fields: Mapping[str, str], data: bytes | memoryview
) -> str:
    text = json.dumps([dict(sorted(fields.items())), _described(entries)], sort_keys=True)
    return blake3(text.encode()).update(data).hexdigest()


def _check_finite(entries: list[PackedTensor], data: bytes | memoryview, where: str) -> None:
    weights = np.frombuffer(data, np.uint8)
    if name := first_infinite({entry.name: entry for entry in entries}, weights):
        raise ArtifactError(f"{where}: tensor {name} holds a value that is not finite")


def _number(text: str, path: Path, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 6) or int(text) < 1:
        raise ArtifactError(f"{path}: {what} is {text[:20]!r}, not a number from 1")
    return int(text)
