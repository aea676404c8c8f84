"""Write an artifact so that its folder is either the old one or the new one, never half of one.

quantize ──> write_artifact ──> hidden sibling folder ──> fsync ──> swapped with the target
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.format import (
    CARD,
    CONFIG,
    DTYPES,
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
from flashlite.artifact.integrity import parse_json, read_small
from flashlite.artifact.read import load_texts, load_weights, open_artifact
from flashlite.artifact.staging import staged
from flashlite.checkpoint.tokenizer import TokenizerFiles
from flashlite.compress.normalize import Ready
from flashlite.compress.pack import Quantized, pack
from flashlite.compress.plan import Plan, plan_preset, stored_shapes
from flashlite.compress.screen import SCREEN
from flashlite.compress.split_head import Fitted
from flashlite.compress.tensors import compress_tensor, packed_arrays
from flashlite.errors import ArtifactError
from flashlite.model.encoder import Spec
from flashlite.model.source import SourceTensors

__all__ = [
    "add_screen",
    "artifact_bytes",
    "measured_of",
    "quantize",
    "record",
    "write_artifact",
]

Progress = Callable[[int, int], None]
"""Called with (bytes of weights written, bytes in all)."""


def quantize(
    source: SourceTensors,
    tokenizer: TokenizerFiles,
    directory: Path,
    preset: str = "import",
    *,
    name: str,
    provenance: Mapping[str, str],
    plan: Plan | None = None,
    ready: Ready | None = None,
    measured: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Quantize a described checkpoint into an artifact.

    Args:
        source: the checkpoint.
        tokenizer: its tokenizer and chat template.
        directory: the artifact's folder; an artifact that is there is replaced.
        preset: `import`, `hybrid`, `q8`, `q6`, `q5` or `q4`.
        name: the model's name, 1 to 64 of a-z, 0-9, dot, dash, underscore.
        provenance: `source`, `sha256` and `licence` of the weights.
        plan: the format of every tensor, instead of the preset's.
        ready: tensors that are quantized already (vectors: as floats), by stored name.
        measured: what is known of its quality, for the card.
        progress: called with (bytes written, bytes in all).

    Raises:
        CompressError: an unknown preset, or weights that do not fit its formats.
        CheckpointError: the source cannot be read.
        ArtifactError: the folder cannot be written; nothing is left behind.
    """
    chosen = plan_preset(preset, source) if plan is None else plan
    made = ready or {}

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        for stored in stored_shapes(source.spec, chosen):
            matrix = made.get(stored)
            if matrix is None:
                yield from compress_tensor(source, stored, chosen.formats[stored]).items()
            elif isinstance(matrix, Quantized):
                yield from packed_arrays(stored, pack(matrix)).items()
            else:
                yield stored, matrix

    return write_artifact(
        directory,
        source.spec,
        chosen,
        tokenizer,
        arrays(),
        name=name,
        provenance=provenance,
        measured=measured,
        progress=progress,
    )


def add_screen(artifact: Artifact, fitted: Fitted) -> Artifact:
    """Write an artifact anew with a split head; its other tensors stay as they are.

    Raises:
        ArtifactError: as `write_artifact`.
        IntegrityError: the artifact is not what its manifest says.
    """
    weights = load_weights(artifact)
    plan = artifact.plan.with_screen(fitted.screen, artifact.spec)

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        for name, entry in artifact.tensors.items():
            if not name.startswith(f"{SCREEN}."):
                part = weights[entry.offset : entry.offset + entry.nbytes]
                yield name, part.view(DTYPES[entry.dtype]).reshape(entry.shape)
        yield from fitted.arrays.items()

    return write_artifact(
        artifact.path,
        artifact.spec,
        plan,
        load_texts(artifact),
        arrays(),
        name=artifact.name,
        provenance=artifact.provenance,
        measured=measured_of(artifact),
    )


def record(artifact: Artifact, measured: Mapping[str, Any]) -> Artifact:
    """Write what was measured into an artifact's card; all else stays as it is.

    The folder is made anew beside the old one, its large files by hard links where the file system
    has them, and takes its place in one rename.

    Args:
        artifact: opened with its integrity checked.
        measured: JSON; keys that the card's `measured` has are replaced.

    Raises:
        IntegrityError: the card or the manifest is not what it was.
        ArtifactError: the folder cannot be written.
    """
    path = artifact.path
    card = parse_json(read_small(path, CARD, artifact.manifest), path / CARD)
    card["measured"] = {**card.get("measured", {}), **measured}
    data = _json(card)
    files = {**artifact.manifest.files, CARD: FileDigest(len(data), blake3(data).hexdigest())}
    large = artifact.manifest.files[WEIGHTS].size
    with staged(path, sum(f.size for f in files.values()) - large + (1 << 16)) as folder:
        for file in files:
            if file != CARD:
                _link(path / file, folder / file)
        (folder / CARD).write_bytes(data)
        manifest = _manifest(artifact.format_version, files, artifact.manifest.tensors)
        (folder / MANIFEST).write_bytes(manifest)
        written = open_artifact(folder)
    return replace(written, path=path)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def write_artifact(
    directory: Path,
    spec: Spec,
    plan: Plan,
    tokenizer: TokenizerFiles,
    arrays: Iterable[tuple[str, NDArray[Any]]],
    *,
    name: str,
    provenance: Mapping[str, str],
    measured: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write an artifact from its arrays, which are taken one at a time.

    Args:
        directory: its folder; an artifact that is there is replaced, anything else is refused.
        spec: the model.
        plan: the format of every tensor.
        tokenizer: its tokenizer and chat template.
        arrays: (stored name, array) in the order of `layout(spec, plan)`, padding left out.
        name: as `quantize`.
        provenance: as `quantize`.
        measured: as `quantize`.
        progress: as `quantize`.

    Raises:
        ArtifactError: the disk is full or refuses, the folder holds something else, or the arrays
            are not those of the plan. Nothing is left behind.
    """
    directory = Path(directory)
    plan.check(spec)
    check_tokens(tokenizer.tokens, spec)
    arranged = layout(spec, plan)
    nothing = Manifest({}, {}, "")
    artifact = Artifact(
        directory,
        check_name(name),
        spec,
        plan,
        tokenizer.tokens,
        check_provenance(provenance),
        arranged.tensors,
        arranged.size,
        nothing,
    )
    texts = _texts(artifact, tokenizer, measured)
    # The manifest holds about 100 bytes per tensor, as the header of the weights does.
    needed = arranged.size + 2 * len(arranged.header()) + sum(map(len, texts.values())) + (1 << 16)
    with staged(directory, needed) as folder:
        files: dict[str, FileDigest] = {}
        for file, data in texts.items():
            (folder / file).write_bytes(data)
            files[file] = FileDigest(len(data), blake3(data).hexdigest())
        files[WEIGHTS], digests = _write_weights(folder / WEIGHTS, arranged, arrays, progress)
        (folder / MANIFEST).write_bytes(_manifest(artifact.format_version, files, digests))
        written = open_artifact(folder)  # only what can be read takes the place of what was there
    return replace(written, path=directory)


def artifact_bytes(
    spec: Spec,
    plan: Plan,
    tokenizer: TokenizerFiles,
    *,
    name: str,
    provenance: Mapping[str, str],
    measured: Mapping[str, Any] | None = None,
) -> int:
    """What `write_artifact` would put on disk, to a few bytes, without writing it."""
    arranged = layout(spec, plan)
    artifact = Artifact(
        Path(),
        name,
        spec,
        plan,
        tokenizer.tokens,
        provenance,
        arranged.tensors,
        arranged.size,
        Manifest({}, {}, ""),
    )
    texts = _texts(artifact, tokenizer, measured)
    digest = "0" * 64
    files = {file: FileDigest(len(data), digest) for file, data in texts.items()}
    files[WEIGHTS] = FileDigest(arranged.size, digest)
    manifest = _manifest(artifact.format_version, files, dict.fromkeys(arranged.tensors, digest))
    small = sum(map(len, texts.values())) + len(manifest)
    return arranged.size + len(arranged.header()) + small


def _texts(
    artifact: Artifact, tokenizer: TokenizerFiles, measured: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """The small files but the manifest."""
    texts = {
        CONFIG: _json(artifact.config()),
        TOKENIZER: tokenizer.tokenizer_json,
        CARD: _json(_card(artifact, measured or {})),
    }
    if tokenizer.chat_template is not None:
        texts[TEMPLATE] = tokenizer.chat_template.encode()
    return texts


def _write_weights(
    path: Path,
    arranged: Layout,
    arrays: Iterable[tuple[str, NDArray[Any]]],
    progress: Progress | None,
) -> tuple[FileDigest, dict[str, str]]:
    """Write header, arrays and padding in order; the digests are those of what was meant."""
    digests: dict[str, str] = {}
    whole = blake3(max_threads=blake3.AUTO)
    incoming = iter(arrays)
    header = arranged.header()
    with path.open("wb", buffering=0) as file:

        def write(data: memoryview | bytes) -> None:
            view = memoryview(data)
            whole.update(view)
            while len(view):
                view = view[file.write(view) :]

        write(header)
        for entry in arranged.entries:
            if entry.name.startswith("_pad."):
                write(bytes(entry.nbytes))
                continue
            name, array = next(incoming, ("", np.empty(0)))
            found = (name, array.dtype, array.shape)
            if found != (entry.name, DTYPES[entry.dtype], entry.shape):
                raise ArtifactError(
                    f"array {name!r}, {array.dtype} {array.shape}, came where the plan has "
                    f"{entry.name}, {DTYPES[entry.dtype]} {entry.shape}"
                )
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digests[name] = blake3(data, max_threads=blake3.AUTO).hexdigest()
            write(data)
            if progress is not None:
                progress(entry.offset + entry.nbytes, arranged.size)
    if progress is not None:
        progress(arranged.size, arranged.size)
    return FileDigest(len(header) + arranged.size, whole.hexdigest()), digests


def _manifest(version: int, files: Mapping[str, FileDigest], tensors: Mapping[str, str]) -> bytes:
    return _json(
        {
            "format_version": version,
            "files": {n: {"size": f.size, "blake3": f.blake3} for n, f in sorted(files.items())},
            "tensors": dict(tensors),
        }
    )


def measured_of(artifact: Artifact) -> dict[str, Any]:
    """What the card of an artifact says was measured, but of its split head."""
    card = parse_json(read_small(artifact.path, CARD, artifact.manifest), artifact.path / CARD)
    found = card.get("measured")
    known = found if isinstance(found, dict) else {}
    return {name: value for name, value in known.items() if name != "split_head"}


def _card(artifact: Artifact, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is measured: sizes, and bits per weight."""
    formats: dict[str, dict[str, int]] = {}
    parameters = 0
    for name, shape in stored_shapes(artifact.model, artifact.plan).items():
        size = int(np.prod(shape))
        stored = sum(
            entry.nbytes
            for key, entry in artifact.tensors.items()
            if key in (name, f"{name}.codes", f"{name}.scales", f"{name}.mins")
        )
        fmt = artifact.plan.formats[name]
        row = formats.setdefault(fmt, {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += size
        row["bytes"] += stored
        again = name == "head" and artifact.model.tied_head
        if not again and not name.startswith(SCREEN):
            parameters += size
    total = sum(row["bytes"] for row in formats.values())
    screen = artifact.plan.screen
    return {
        "preset": artifact.plan.preset,
        "parameters": parameters,
        "weights_bytes": artifact.weights_size,
        "bits_per_weight": round(8 * total / parameters, 3),
        "formats": formats,
        "measured": {
            **measured,
            **({} if screen is None else {"split_head": dict(screen.measured)}),
        },
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
