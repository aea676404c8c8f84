"""Apply deltas to an artifact, list them, and roll them back to the last bit.

    NAME.fl/deltas/001/delta.safetensors   what was applied
                       undo.safetensors    the tensors it replaced, as a delta
                       manifest.json       the manifest it replaced
                       card.json           and the card, whose figures no longer hold

An applied delta lies in the weights themselves: running the model needs nothing new, neither code
nor memory. What it replaced stays beside it, a few per cent of the artifact. Where tensors lie
follows from the description, which no delta changes; so putting the replaced tensors, card and
manifest back gives every file its former bytes, and a rollback that would not is refused before
anything is replaced. Every change is a new folder that is swapped in as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.delta import Delta, delta_bytes, read_delta, tail_tensors
from flashlite.artifact.format import (
    CARD,
    DELTAS,
    DTYPES,
    LIMITS,
    MANIFEST,
    WEIGHTS,
    Artifact,
    FileDigest,
    Layout,
    Manifest,
    layout,
)
from flashlite.artifact.integrity import (
    corrupt,
    digest,
    open_file,
    parse_json,
    read_manifest,
    read_small,
)
from flashlite.artifact.read import load_weights, open_artifact
from flashlite.artifact.staging import staged
from flashlite.errors import ArtifactError, UsageError

__all__ = ["Applied", "applied_deltas", "apply_delta", "roll_back"]

_DELTA, _UNDO = "delta.safetensors", "undo.safetensors"
_MOST = 999  # deltas that one artifact keeps
_PIECE = 1 << 20


@dataclass(frozen=True)
class Applied:
    """One delta that lies in an artifact.

    Attributes:
        number: 1 is the oldest.
        digest: BLAKE3 that names it, hex.
        layers: how many at the end it replaced.
        size: bytes of the delta.
        kept: bytes kept to take it back.
        made: what made it.
    """

    number: int
    digest: str
    layers: int
    size: int
    kept: int
    made: Mapping[str, Any]


def apply_delta(path: Path, delta_path: Path) -> Artifact:
    """Put a delta into an artifact, which is written anew and swapped in.

    Args:
        path: the artifact's folder.
        delta_path: the file.

    Raises:
        ArtifactError: as `open_artifact`, `load_weights`, `read_delta`; the artifact keeps 999
            deltas already; the disk is full or refuses. The artifact is as it was.
        IntegrityError: bytes are not those of the manifest or of the delta's digest.
    """
    artifact = open_artifact(path)
    weights = load_weights(artifact)
    delta = read_delta(delta_path, artifact)
    number = len(_numbers(artifact)) + 1
    if number > _MOST:
        raise ArtifactError(f"{path}: keeps {_MOST} deltas already; roll some back")
    place = f"{DELTAS}/{number:03d}"
    replaced = _arrays(artifact, weights, [t.name for t in tail_tensors(artifact, delta.layers)])
    undo = delta_bytes(artifact, delta.layers, replaced, {"undoes": delta.digest})
    card = read_small(artifact.path, CARD, artifact.manifest)
    added = {
        f"{place}/{_DELTA}": delta.raw,
        f"{place}/{_UNDO}": undo,
        f"{place}/{MANIFEST}": read_small(artifact.path, MANIFEST),
        f"{place}/{CARD}": card,
    }
    fresh = parse_json(card, artifact.path / CARD)
    # What was measured was measured of other weights.
    fresh["measured"] = {"delta": {"digest": delta.digest, "made": dict(delta.made)}}
    needed = artifact.weights_size + sum(len(data) for data in added.values()) + (1 << 20)
    needed += sum(file.size for name, file in artifact.manifest.files.items() if name != WEIGHTS)
    with staged(artifact.path, needed) as folder:
        files, tensors = _write_weights(folder, artifact, weights, delta.arrays)
        for name in artifact.manifest.files:
            if name not in (WEIGHTS, CARD):
                files[name] = _copy(artifact, name, folder)
        for name, data in {**added, CARD: _json(fresh)}.items():
            files[name] = _put(folder, name, data)
        version = parse_json(added[f"{place}/{MANIFEST}"], artifact.path)["format_version"]
        manifest = {
            "format_version": version,
            "files": {n: {"size": f.size, "blake3": f.blake3} for n, f in sorted(files.items())},
            "tensors": tensors,
        }
        (folder / MANIFEST).write_bytes(_json(manifest))
        written = open_artifact(folder)
        _still(artifact)
    return replace(written, path=artifact.path)


def applied_deltas(artifact: Artifact) -> list[Applied]:
    """The deltas in an artifact, the oldest first; their bytes are verified.

    Raises:
        ArtifactError: one is malformed.
        IntegrityError: one is not what the manifest says.
    """
    found = []
    for number in _numbers(artifact):
        place = f"{DELTAS}/{number:03d}"
        delta = _kept_delta(artifact, f"{place}/{_DELTA}")
        kept = sum(
            file.size
            for name, file in artifact.manifest.files.items()
            if name.startswith(f"{place}/") and not name.endswith(f"/{_DELTA}")
        )
        found.append(
            Applied(number, delta.digest, delta.layers, len(delta.raw), kept, dict(delta.made))
        )
    return found


def roll_back(path: Path, count: int = 1) -> Artifact:
    """Take the latest deltas back: every file has the bytes it had before they were applied.

    Args:
        path: the artifact's folder.
        count: how many deltas.

    Raises:
        UsageError: the artifact has not that many.
        ArtifactError, IntegrityError: as `apply_delta`; or what is kept would not give the former
            bytes. The artifact is as it was.
    """
    artifact = open_artifact(path)
    numbers = _numbers(artifact)
    if not 1 <= count <= len(numbers):
        raise UsageError(f"{path}: {count} deltas to roll back, it has {len(numbers)}")
    weights = load_weights(artifact)
    back: dict[str, NDArray[Any]] = {}
    for number in numbers[: -count - 1 : -1]:  # the latest first: the oldest has the last word
        back.update(_kept_delta(artifact, f"{DELTAS}/{number:03d}/{_UNDO}").arrays)
    place = f"{DELTAS}/{numbers[-count]:03d}"
    former = _bytes(artifact, f"{place}/{MANIFEST}", LIMITS[MANIFEST])
    card = _bytes(artifact, f"{place}/{CARD}", LIMITS[CARD])
    needed = artifact.weights_size + sum(f.size for f in artifact.manifest.files.values())
    with staged(artifact.path, needed) as folder:
        (folder / MANIFEST).write_bytes(former)
        wanted = read_manifest(folder)
        files, tensors = _write_weights(folder, artifact, weights, back)
        files[CARD] = _put(folder, CARD, card)
        for name in wanted.files:
            if name not in (WEIGHTS, CARD):
                files[name] = _copy(artifact, name, folder)
        _same(artifact, files, tensors, wanted)
        written = open_artifact(folder)
        _still(artifact)
    return replace(written, path=artifact.path)


def _same(
    artifact: Artifact,
    files: Mapping[str, FileDigest],
    tensors: Mapping[str, str],
    wanted: Manifest,
) -> None:
    odd = [
        name
        for name in sorted({*files, *wanted.files})
        if files.get(name) != wanted.files.get(name)
    ]
    if odd or tensors != wanted.tensors:
        raise ArtifactError(
            f"{artifact.path}: what is kept does not give {odd[0] if odd else 'the tensors'} its "
            "former bytes; quantize the model again"
        )


def _numbers(artifact: Artifact) -> list[int]:
    """Of the applied deltas, in order: 1, 2, ...; anything else is refused."""
    found: dict[int, set[str]] = {}
    for name in artifact.manifest.files:
        if not name.startswith(f"{DELTAS}/"):
            continue
        parts = name.split("/")
        if len(parts) != 3 or not (len(parts[1]) == 3 and parts[1].isdigit()):
            raise ArtifactError(f"{artifact.path}: {name[:80]!r} is no part of a delta")
        found.setdefault(int(parts[1]), set()).add(parts[2])
    numbers = sorted(found)
    whole = {_DELTA, _UNDO, MANIFEST, CARD}
    if numbers != list(range(1, len(numbers) + 1)) or any(v != whole for v in found.values()):
        raise ArtifactError(f"{artifact.path}: its applied deltas are not whole")
    return numbers


def _kept_delta(artifact: Artifact, name: str) -> Delta:
    """A delta inside the artifact; which model it applied to is no question any more."""
    path = artifact.path / name
    expected = artifact.manifest.files[name]
    size, found = _digest_file(path, expected.size)
    if FileDigest(size, found) != expected:
        raise corrupt(path, "the file")
    return read_delta(path, artifact, check_base=False)


def _bytes(artifact: Artifact, name: str, limit: int) -> bytes:
    """A small file of the artifact, verified."""
    path, expected = artifact.path / name, artifact.manifest.files[name]
    if expected.size > limit:
        raise ArtifactError(f"{path}: {expected.size} bytes, at most {limit} are read")
    with open_file(path) as file:
        data = b"".join(_pieces(file, expected.size))
    if FileDigest(len(data), digest(data)) != expected:
        raise corrupt(path, "the file")
    return data


def _copy(artifact: Artifact, name: str, folder: Path) -> FileDigest:
    """Copy one listed file, verified on its way."""
    source, target = artifact.path / name, folder / name
    expected = artifact.manifest.files[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher, size = blake3(), 0
    with open_file(source) as file, target.open("wb") as out:
        for piece in _pieces(file, expected.size):
            hasher.update(piece)
            size += len(piece)
            out.write(piece)
    found = FileDigest(size, hasher.hexdigest())
    if found != expected:
        raise corrupt(source, "the file")
    return found


def _digest_file(path: Path, most: int) -> tuple[int, str]:
    hasher, size = blake3(), 0
    with open_file(path) as file:
        for piece in _pieces(file, most):
            hasher.update(piece)
            size += len(piece)
    return size, hasher.hexdigest()


def _pieces(file: BinaryIO, most: int) -> Any:
    """The file's bytes; at most one more than `most`, so that a longer file shows."""
    left = most + 1
    while left and (piece := file.read(min(left, _PIECE))):
        left -= len(piece)
        yield piece


def _put(folder: Path, name: str, data: bytes) -> FileDigest:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return FileDigest(len(data), digest(data))


def _arrays(
    artifact: Artifact, weights: NDArray[np.uint8], names: list[str]
) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        entry = artifact.tensors[name]
        part = weights[entry.offset : entry.offset + entry.nbytes]
        found[name] = part.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return found


def _write_weights(
    folder: Path,
    artifact: Artifact,
    weights: NDArray[np.uint8],
    arrays: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, FileDigest], dict[str, str]]:
    """The data section with some arrays replaced: its digest, and that of every tensor."""
    arranged: Layout = layout(artifact.spec, artifact.plan)
    header = arranged.header()
    hasher = blake3(header)
    tensors: dict[str, str] = {}
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header)
        for entry in arranged.entries:
            if entry.name in arrays:
                part = np.ascontiguousarray(arrays[entry.name]).reshape(-1).view(np.uint8)
            else:
                part = weights[entry.offset : entry.offset + entry.nbytes]
            hasher.update(part.data)
            file.write(part.data)
            if not entry.name.startswith("_pad."):
                tensors[entry.name] = digest(part.data)
    found = FileDigest(len(header) + arranged.size, hasher.hexdigest())
    return {WEIGHTS: found}, tensors


def _still(artifact: Artifact) -> None:
    """Refuse to replace what another process has replaced meanwhile."""
    if read_manifest(artifact.path).digest != artifact.digest:
        raise ArtifactError(f"{artifact.path}: was changed meanwhile; run the same command again")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
