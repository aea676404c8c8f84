"""From a name to something that runs: pull -> quantize -> compile, each done once and kept.

name, path or artifact  ->  Pulled  ->  Artifact  ->  library
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from flashlite import paths
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import open_artifact
from flashlite.checkpoint.pull import Pulled, pull
from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import Target, host_target
from flashlite.codegen.toolchain import build_library
from flashlite.errors import ArtifactError, CompileError

__all__ = [
    "DEFAULT_MODEL",
    "Progress",
    "artifact_path",
    "compile_artifact",
    "find_artifact",
    "make_artifact",
]

DEFAULT_MODEL = "smollm2-135m-instruct"

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while something long runs."""


def find_artifact(
    model: str,
    *,
    preset: str = "import",
    check: bool = True,
    accept_license: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """The artifact of a model, made now if it is not there.

    Args:
        model: a known name, `hf:ORG/NAME`, a checkpoint's path, or an artifact's directory.
        preset: how to quantize when the artifact has to be made.
        check: verify the small files against the manifest when opening.

    Raises:
        FlashliteError: whatever stage failed.
    """
    if Path(model, "manifest.json").is_file() or model.rstrip("/").endswith(".fl"):
        return open_artifact(Path(model), enable_integrity_check=check)
    pulled = pull(
        model, accept_license=accept_license, offline=offline, progress=_stage(progress, "pull")
    )
    directory = artifact_path(pulled, preset)
    if directory.exists():
        try:
            return open_artifact(directory, enable_integrity_check=check)
        except ArtifactError:
            # Ours to make again: an older format or a damaged file, and the source is at hand.
            pass
    return make_artifact(pulled, preset, directory, progress=progress)


def make_artifact(
    pulled: Pulled, preset: str, directory: Path, *, progress: Progress | None = None
) -> Artifact:
    """Quantize a pulled checkpoint into `directory`; it appears whole or not at all.

    Raises:
        FlashliteError: the checkpoint, its tokenizer or the disk is at fault.
    """
    # Imported here: a model that is ready starts without them.
    from flashlite.artifact.write import quantize
    from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.model.families import describe

    checkpoint = open_checkpoint(pulled.path)
    source = describe(checkpoint)
    tokenizer = build_tokenizer_checked(checkpoint)
    return quantize(
        source,
        tokenizer,
        directory,
        preset,
        name=_artifact_name(pulled),
        provenance={
            "source": pulled.path.name,
            "sha256": pulled.sha256 or _sha256(pulled.path),
            "licence": pulled.licence or "",
        },
        progress=_stage(progress, "quantize"),
    )


def compile_artifact(artifact: Artifact, target: Target | None = None) -> Path:
    """The artifact's library for a target, from the cache when it was built before.

    Args:
        artifact: what to compile.
        target: None for the machine at hand and the best its CPU and its compiler know.

    Raises:
        CompileError: no compiler, or it failed.
        UnsupportedTarget: FL-612.
    """
    chosen = target or host_target()
    try:
        return build_library(emit_model(artifact, chosen.isa), chosen)
    except CompileError:
        if target is not None or chosen.isa != "amx" or os.environ.get("FLASHLITE_ISA"):
            raise
    # A compiler older than the CPU: tiles came with gcc 11 and clang 12.
    older = host_target("avx512")
    return build_library(emit_model(artifact, older.isa), older)


def artifact_path(pulled: Pulled, preset: str) -> Path:
    """Where the artifact of this exact source and preset is kept.

    A pulled model is known by its digest; a user's own file by its path, size and time of change.
    """
    status = pulled.path.stat()
    identity = pulled.sha256 or f"{status.st_size} {status.st_mtime_ns}"
    mark = blake3(f"{pulled.path.resolve()} {identity}".encode()).hexdigest()[:8]
    return paths.data_dir() / "artifacts" / f"{_artifact_name(pulled)}-{preset}-{mark}.fl"


def _artifact_name(pulled: Pulled) -> str:
    """The model's name in an artifact's narrower alphabet."""
    return re.sub(r"[^a-z0-9._-]+", "-", pulled.name.lower()).strip("-._")[:64] or "model"


def _sha256(path: Path) -> str:
    """Of a file; empty for a folder."""
    import hashlib

    if not path.is_file():
        return ""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
