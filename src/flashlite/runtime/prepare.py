"""From a name to something that runs: pull -> quantize -> compile, each done once and kept.

name, path or artifact  ->  Pulled  ->  Artifact  ->  library
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from flashlite import paths
from flashlite.artifact.format import FORMAT_VERSION, Artifact
from flashlite.artifact.read import open_artifact
from flashlite.checkpoint.pull import Pulled, pull
from flashlite.codegen.generate import generate
from flashlite.codegen.target import Target, host_target
from flashlite.codegen.toolchain import build_library
from flashlite.errors import (
    ArtifactError,
    CompileError,
    CompressError,
    UnsupportedTarget,
    UsageError,
)

if TYPE_CHECKING:
    from flashlite.compress.normalize import Ready
    from flashlite.compress.plan import Plan
    from flashlite.model.source import SourceModel

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_MODEL",
    "SPLIT_HEAD",
    "Decided",
    "Progress",
    "artifact_path",
    "compile_artifact",
    "find_artifact",
    "make_artifact",
    "split_head",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ENCODER = "all-minilm-l6-v2"
SPLIT_HEAD = ("auto", "off", "on")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while something long runs."""


@dataclass(frozen=True)
class Decided:
    """A model's plan and the tensors that are quantized already."""

    source: SourceModel
    plan: Plan
    ready: Ready
    measured: Mapping[str, float]


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
    pulled: Pulled,
    preset: str,
    directory: Path,
    *,
    head: str = "auto",
    like: str | None = None,
    decided: Decided | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Quantize a pulled checkpoint into `directory`; it appears whole or not at all.

    Args:
        head: `split_head`'s mode.
        like: for an HDF5 file of weights alone, a model of the same shape; see `open_checkpoint`.
        decided: formats and matrices found beforehand, instead of the preset's.

    Raises:
        FlashliteError: the checkpoint, its tokenizer or the disk is at fault.
    """
    # Imported here: a model that is ready starts without them.
    from flashlite.artifact.write import quantize
    from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.model.families import describe_any
    from flashlite.model.source import EncoderSource

    checkpoint = open_checkpoint(pulled.path, like=like)
    source = describe_any(checkpoint) if decided is None else decided.source
    tokenizer = build_tokenizer_checked(checkpoint)
    artifact = quantize(
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
        plan=None if decided is None else decided.plan,
        ready=None if decided is None else decided.ready,
        measured=None if decided is None else decided.measured,
        progress=_stage(progress, "quantize"),
    )
    if isinstance(source, EncoderSource):  # it has none
        return artifact
    return split_head(artifact, head, progress=progress)


def split_head(artifact: Artifact, mode: str, *, progress: Progress | None = None) -> Artifact:
    """Give an artifact a split head, fitted to text sampled from the model, and write it anew.

    Args:
        artifact: its other tensors stay as they are.
        mode: `off`: none; `auto`: one where it is good enough and saves enough, and the model can
            be compiled here; `on`: one, or an error.

    Raises:
        UsageError: there is no such mode.
        CompressError: `on`, and no screen is good enough.
        FlashliteError: `on`, and the model cannot be compiled or opened here.
    """
    if mode not in SPLIT_HEAD:
        raise UsageError(f"split head is {mode!r}, choose one of {', '.join(SPLIT_HEAD)}")
    if mode == "off":
        return artifact
    from flashlite.artifact.read import load_weights, packed
    from flashlite.artifact.write import add_screen
    from flashlite.compress.split_head import fit_screen, head_bytes, is_worth_trying
    from flashlite.runtime.states import sample_states

    spec, weights = artifact.spec, load_weights(artifact)
    table = packed(artifact, weights, "head")
    # A step reads one row of a look-up table that is stored apart.
    apart = {"embed"} if artifact.stored_name("head") == "head" else set()
    read = sum(t.nbytes for n, t in artifact.tensors.items() if n.split(".")[0] not in apart)
    body = read - head_bytes(table)
    if mode == "auto" and not is_worth_trying(table, body):
        return artifact
    try:
        fitting = sample_states(artifact, progress=_stage(progress, "sample"))
        checking = sample_states(artifact, check=True, progress=_stage(progress, "sample to check"))
    except (CompileError, UnsupportedTarget):
        if mode == "auto":
            return artifact
        raise
    fitted = fit_screen(
        table,
        (spec.vocab_size, spec.d_model),
        fitting,
        checking,
        body_bytes=body,
        always=artifact.tokens.eos,
        must_save=mode == "auto",
        progress=_stage(progress, "split head"),
    )
    if fitted is None:
        if mode == "auto":
            return artifact
        raise CompressError(
            f"{artifact.name}: no split head keeps the likeliest tokens exact often enough; "
            "leave it to --split-head auto"
        )
    return add_screen(artifact, fitted)


def compile_artifact(
    artifact: Artifact, target: Target | None = None, *, profile: bool = False
) -> Path:
    """The artifact's library for a target, from the cache when it was built before.

    Args:
        artifact: what to compile.
        target: None for the machine at hand and the best its CPU and its compiler know.
        profile: a library that says where the time of a step goes (`Engine.read_marks`).

    Raises:
        CompileError: no compiler, or it failed.
        UnsupportedTarget: FL-612.
    """
    chosen = target or host_target()
    try:
        return build_library(generate(artifact, chosen.isa), chosen, profile=profile)
    except CompileError:
        if target is not None or chosen.isa != "amx" or os.environ.get("FLASHLITE_ISA"):
            raise
    # A compiler older than the CPU: tiles came with gcc 11 and clang 12.
    older = host_target("avx512")
    return build_library(generate(artifact, older.isa), older, profile=profile)


def artifact_path(pulled: Pulled, preset: str) -> Path:
    """Where the artifact of this exact source and preset is kept.

    A pulled model is known by its digest; a user's own file by its path, size and time of change.
    What was made before artifacts could hold what they hold now is not found.
    """
    status = pulled.path.stat()
    identity = pulled.sha256 or f"{status.st_size} {status.st_mtime_ns}"
    known = f"{pulled.path.resolve()} {identity} {FORMAT_VERSION}"
    mark = blake3(known.encode()).hexdigest()[:8]
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
