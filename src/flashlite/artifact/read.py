"""Open an artifact and read its weights, trusting nothing that is not checked.

    open_artifact ──> Artifact ──> load_weights ──> the data section, verified, in private memory
                         │                               └─> packed, tensor: parts of it
                         └───────> load_texts ───> the tokenizer's files

Nothing is memory-mapped from the file: a later write to it, or its truncation, cannot reach a
process that has loaded it.
"""

from __future__ import annotations

import codecs
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.format import (
    CARD,
    CONFIG,
    DTYPES,
    LIMITS,
    MANIFEST,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    Artifact,
    FileDigest,
    Layout,
    Manifest,
    check_name,
    check_provenance,
    check_tokens,
    layout,
)
from flashlite.artifact.integrity import (
    check_version,
    corrupt,
    differing,
    first_infinite,
    open_file,
    parse_json,
    read_manifest,
    read_small,
)
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles
from flashlite.compress.pack import Packed, dequantize
from flashlite.compress.plan import Plan
from flashlite.errors import ArtifactError, CompressError, IntegrityError, TokenizerError
from flashlite.model.encoder import spec_from_json

__all__ = ["load_texts", "load_weights", "open_artifact", "packed", "tensor"]

_PIECE = 1 << 18  # bytes of text looked at together
_KEYS = {"format_version", "name", "model", "plan", "tokens", "provenance"}


def open_artifact(path: Path, *, enable_integrity_check: bool = True) -> Artifact:
    """Read and check everything of an artifact but its weights.

    Args:
        path: its directory.
        enable_integrity_check: compare every small file with the manifest.

    Raises:
        ArtifactError: a file is missing, malformed, too large, or written by a newer flashlite.
        IntegrityError: a file differs from the manifest.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: there is no such artifact; make one with flashlite quantize")
    manifest = read_manifest(path)
    try:
        return _open(path, manifest, check=enable_integrity_check)
    except ArtifactError:
        replaced = read_manifest(path)
        if replaced.digest == manifest.digest:
            raise
        # Another process swapped in a new artifact between two of our reads.
        return _open(path, replaced, check=enable_integrity_check)


def load_weights(artifact: Artifact, *, verify: bool = True) -> NDArray[np.uint8]:
    """Read the data section once, into private memory that starts on 64 bytes.

    Args:
        artifact: from `open_artifact`.
        verify: digest the bytes that were read and compare them with the manifest.

    Returns:
        uint8 [weights_size], read-only; its memory lives as long as the array.

    Raises:
        ArtifactError: the file is missing, too short or too long, or a scale, minimum, norm or
            bias is not finite.
        IntegrityError: the bytes differ from the manifest; it names the tensor.
    """
    path = artifact.path / WEIGHTS
    with open_file(path) as file:
        header = _read_header(file, path, artifact.weights_size)
        memory = _private_memory(artifact.weights_size)
        _read_halves(memoryview(memory), file, len(header), path)
    weights = np.frombuffer(memory, np.uint8)
    if verify:
        hasher = blake3(header, max_threads=blake3.AUTO).update(memoryview(memory))
        found = FileDigest(len(header) + len(weights), hasher.hexdigest())
        if found != artifact.manifest.files[WEIGHTS]:
            bad = differing(artifact.tensors, weights, artifact.manifest)
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise corrupt(path, f"tensor {bad[0]}{more}" if bad else "the header or padding")
    if name := first_infinite(artifact.tensors, weights):
        raise ArtifactError(
            f"{path}: tensor {name} holds a value that is not finite; quantize the model again"
        )
    weights.flags.writeable = False
    return weights


def load_texts(artifact: Artifact, *, verify: bool = True) -> TokenizerFiles:
    """Read the tokenizer and the chat template.

    Raises:
        ArtifactError: a file is missing, too large, or not UTF-8.
        IntegrityError: a file differs from the manifest.
    """
    manifest = artifact.manifest if verify else None

    def text(name: str) -> bytes:
        data = read_small(artifact.path, name, manifest)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for at in range(0, len(data) + 1, _PIECE):  # a `str` of it all may take 4 times as much
                decoder.decode(data[at : at + _PIECE], final=at + _PIECE > len(data))
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{artifact.path / name}: not UTF-8: {error.reason}") from None
        return data

    template = text(TEMPLATE).decode() if TEMPLATE in artifact.manifest.files else None
    return TokenizerFiles(text(TOKENIZER), template, artifact.tokens)


def packed(artifact: Artifact, weights: NDArray[np.uint8], canonical: str) -> Packed:
    """One matrix as the kernels read it, without a copy.

    Raises:
        ArtifactError: the artifact has no such packed matrix.
    """
    name = artifact.stored_name(canonical)
    if f"{name}.codes" not in artifact.tensors:
        raise ArtifactError(f"{artifact.path}: there is no packed matrix {canonical!r}")
    fmt = artifact.plan.formats[name]
    mins = _array(artifact, weights, f"{name}.mins") if fmt == "q4m" else None
    codes, scales = (_array(artifact, weights, f"{name}.{part}") for part in ("codes", "scales"))
    return Packed(fmt, codes, scales, mins)


def tensor(artifact: Artifact, weights: NDArray[np.uint8], canonical: str) -> NDArray[np.float32]:
    """One tensor as float32 in its true shape, exactly as the kernels understand it.

    Args:
        artifact: from `open_artifact`.
        weights: from `load_weights`.
        canonical: a name of the spec's `shapes`, or `head` of a tied model.

    Raises:
        ArtifactError: the model has no such tensor.
    """
    name = artifact.stored_name(canonical)
    if name in artifact.tensors:
        return _array(artifact, weights, name).astype(np.float32)
    shape = dict(artifact.model.shapes()).get("embed" if name == "head" else name, (0, 0))
    return dequantize(packed(artifact, weights, canonical), shape[0], shape[1])


def _open(path: Path, manifest: Manifest, *, check: bool) -> Artifact:
    expected = manifest if check else None
    config = parse_json(read_small(path, CONFIG, expected), path / CONFIG)
    check_version(config, path / CONFIG)
    artifact, arrays = _describe(path, config, manifest)
    if set(manifest.tensors) != set(arrays.tensors):
        odd = min(set(manifest.tensors) ^ set(arrays.tensors))
        raise ArtifactError(f"{path / MANIFEST}: its tensors are not this model's: {odd[:60]!r}")
    _check_weights(path / WEIGHTS, arrays)
    if check:
        for name in (TOKENIZER, TEMPLATE, CARD):
            if name in manifest.files:
                read_small(path, name, manifest)
    return artifact


def _describe(path: Path, config: dict[str, Any], manifest: Manifest) -> tuple[Artifact, Layout]:
    """Turn `config.json` into an Artifact; every value of it may be hostile."""
    where = path / CONFIG
    if set(config) != _KEYS:
        odd = sorted(set(config) ^ _KEYS)[0]
        raise ArtifactError(f"{where}: key {odd[:60]!r} is missing or unknown")
    if not isinstance(config["model"], dict):
        raise ArtifactError(f"{where}: the model description is not an object")
    try:
        spec = spec_from_json(config["model"])
        plan = Plan.from_json(config["plan"], spec)
        tokens = SpecialTokens.from_json(config["tokens"])
    except (ArtifactError, CompressError, TokenizerError) as error:
        raise ArtifactError(f"{where}: {error}") from None
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ArtifactError(f"{where}: {type(error).__name__}: {error}") from None
    check_tokens(tokens, spec)
    arrays = layout(spec, plan)
    artifact = Artifact(
        path=path,
        name=check_name(config["name"]),
        model=spec,
        plan=plan,
        tokens=tokens,
        provenance=check_provenance(config["provenance"]),
        tensors=arrays.tensors,
        weights_size=arrays.size,
        manifest=manifest,
    )
    if (version := config["format_version"]) < artifact.format_version:
        raise ArtifactError(
            f"{where}: says format {version} and holds what came with {artifact.format_version}"
        )
    return artifact, arrays


def _check_weights(path: Path, arrays: Layout) -> None:
    """Compare the file's length and its directory of tensors with what the model needs."""
    with open_file(path) as file:
        header = _read_header(file, path, arrays.size)
    found = parse_json(header[8:], path)
    for entry in arrays.entries:
        place = [entry.offset, entry.offset + entry.nbytes]
        wanted = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": place}
        if entry.name not in found:
            raise ArtifactError(f"{path}: tensor {entry.name} is missing")
        if (value := found[entry.name]) != wanted:
            raise ArtifactError(
                f"{path}: tensor {entry.name} is described as {str(value)[:120]}, must be {wanted}"
            )
    if len(found) != len(arrays.entries):
        known = {entry.name for entry in arrays.entries}
        odd = next(name for name in found if name not in known)
        raise ArtifactError(f"{path}: tensor {odd[:60]!r} is not part of this model")


def _read_header(file: BinaryIO, path: Path, weights_size: int) -> bytes:
    """The length and the JSON at the start of the file; the file ends where the weights do."""
    size = os.fstat(file.fileno()).st_size
    prefix = bytearray(8)
    _read_into(memoryview(prefix), file, 0, path)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= LIMITS[WEIGHTS]:
        raise ArtifactError(f"{path}: header of {length} bytes, allowed 2 to {LIMITS[WEIGHTS]}")
    if size != 8 + length + weights_size:
        raise ArtifactError(
            f"{path}: {size} bytes, must be {8 + length + weights_size}: the file is cut or longer "
            "than its tensors; quantize or pull the model again"
        )
    header = bytearray(8 + length)
    header[:8] = prefix
    _read_into(memoryview(header)[8:], file, 8, path)
    return bytes(header)


def _read_into(view: memoryview, file: BinaryIO, start: int, path: Path) -> None:
    """Fill `view` with the file's bytes from `start` on."""
    while len(view):
        try:
            got = os.preadv(file.fileno(), [view], start)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        if not got:
            raise IntegrityError(f"{path}: has become shorter; quantize or pull the model again")
        view, start = view[got:], start + got


def _read_halves(view: memoryview, file: BinaryIO, start: int, path: Path) -> None:
    """`_read_into` by two threads: the system makes the pages meanwhile, which takes it as long as
    copying does.
    """
    middle = len(view) // 2
    with ThreadPoolExecutor(1) as another:
        second = another.submit(_read_into, view[middle:], file, start + middle, path)
        _read_into(view[:middle], file, start, path)
        second.result()


def _private_memory(size: int) -> mmap.mmap:
    """Zeroed pages of our own; huge ones where the system offers them."""
    try:
        if not hasattr(mmap, "MAP_ANONYMOUS"):
            return mmap.mmap(-1, size)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ArtifactError(
            f"the system refused {size} bytes for the weights: {error}; raise max_mem"
        ) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _array(artifact: Artifact, weights: NDArray[np.uint8], stored: str) -> NDArray[Any]:
    entry = artifact.tensors[stored]
    part = weights[entry.offset : entry.offset + entry.nbytes]
    array: NDArray[Any] = part.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return array
