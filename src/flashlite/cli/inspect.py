"""`flashlite inspect`: what a model, a file or an artifact holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options, output
from flashlite.runtime.memory import format_size

if TYPE_CHECKING:
    from flashlite.artifact.format import Artifact
    from flashlite.checkpoint.base import Checkpoint
    from flashlite.model.encoder import Spec

__all__ = ["command"]


@click.command()
@click.argument("model")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@options.like_option
@output.json_option
def command(model: str, tensors: bool, like: str | None, as_json: bool) -> None:
    """Show what MODEL holds: its shape, its tensors, its licence.

    MODEL is a pulled model's name, a GGUF file, a safetensors folder, an HDF5 file or an artifact.
    Nothing is fetched and no weight is read.

    \b
    Examples:
      flashlite inspect smollm2-135m-instruct
      flashlite inspect ./model.gguf --tensors
    """
    found = _artifact(Path(model)) if _is_artifact(model) else _checkpoint(model, like)
    listed = found.pop("tensors")
    kinds = _kinds(listed)
    if as_json:
        output.emit({**found, "types": kinds, **({"tensors": listed} if tensors else {})})
        return
    click.echo(output.table([(name, _shown(name, value)) for name, value in found.items()]))
    click.echo()
    rows = [
        (kind["type"], kind["tensors"], output.count(kind["values"]), format_size(kind["bytes"]))
        for kind in kinds
    ]
    click.echo(output.table(rows, ("type", "tensors", "values", "size")))
    if tensors:
        click.echo()
        named = [
            (tensor["name"], tensor["type"], " x ".join(map(str, tensor["shape"])))
            for tensor in listed
        ]
        click.echo(output.table(named, ("tensor", "type", "shape")))


def _is_artifact(model: str) -> bool:
    return model.rstrip("/").endswith(".fl") or Path(model, "manifest.json").is_file()


def _artifact(path: Path) -> dict[str, Any]:
    from flashlite.artifact.read import open_artifact

    artifact = open_artifact(path)
    return {
        "path": str(artifact.path),
        "format": "flashlite artifact",
        "name": artifact.name,
        "preset": artifact.plan.preset,
        **_spec(artifact.model),
        "split_head": _split_head(artifact),
        "chat_template": (artifact.path / "chat_template.jinja").is_file(),
        "licence": artifact.provenance.get("licence") or None,
        "source": artifact.provenance.get("source") or None,
        "digest": artifact.digest,
        "bytes": _folder_size(artifact.path),
        "tensors": _stored(artifact),
    }


def _split_head(artifact: Artifact) -> str | None:
    screen = artifact.plan.screen
    if screen is None:
        return None
    of_all = f"{screen.rank} of {artifact.model.d_model} columns"
    return f"{of_all} estimate every logit, {format_size(artifact.screen_bytes)}"


def _checkpoint(model: str, like: str | None) -> dict[str, Any]:
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.checkpoint.pull import resolve_model
    from flashlite.errors import UnsupportedModel
    from flashlite.model.families import describe_any

    pulled = resolve_model(model)
    checkpoint = open_checkpoint(pulled.path, like=like)
    try:
        shape = _spec(describe_any(checkpoint).spec)
    except UnsupportedModel as error:
        # It can be looked at all the same; that it cannot be run is said.
        shape = {"architecture": checkpoint.architecture or None, "runs": f"no: {error}"}
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        **shape,
        "chat_template": _has_template(checkpoint),
        "licence": pulled.licence or checkpoint.metadata.get("general.license") or None,
        "sha256": pulled.sha256,
        "bytes": sum(file.stat().st_size for file in {t.file for t in checkpoint.tensors.values()}),
        "tensors": [
            {"name": t.name, "type": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
            for t in checkpoint.tensors.values()
        ],
    }


def _spec(spec: Spec) -> dict[str, Any]:
    from flashlite.model.encoder import EncoderSpec

    if isinstance(spec, EncoderSpec):
        return {
            "architecture": f"{spec.family} (encoder)",
            "layers": spec.n_layers,
            "width": spec.d_model,
            "heads": spec.n_heads,
            "head_dim": spec.head_dim,
            "feed_forward": spec.d_ff,
            "vocabulary": spec.vocab_size,
            "pooling": spec.pooling,
            "context": spec.max_context,
        }
    return {
        "architecture": spec.family,
        "layers": spec.n_layers,
        "width": spec.d_model,
        "heads": spec.n_heads,
        "kv_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "feed_forward": spec.d_ff,
        "vocabulary": spec.vocab_size,
        "tied_head": spec.tied_head,
        "context": spec.max_context,
        "sliding_window": spec.sliding_window,
    }


def _has_template(checkpoint: Checkpoint) -> bool:
    if checkpoint.like is not None:
        return _has_template(checkpoint.like)
    if checkpoint.metadata.get("tokenizer.chat_template"):
        return True
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if (folder / "chat_template.jinja").is_file():
        return checkpoint.format == "safetensors"
    return False


def _stored(artifact: Artifact) -> list[dict[str, Any]]:
    """Tensors by their formats; one that is packed counts with its scales and minima."""
    from flashlite.compress.plan import stored_shapes

    nbytes: dict[str, int] = {}
    for array, t in artifact.tensors.items():
        name, _, part = array.rpartition(".")
        name = name if part in ("codes", "scales", "mins") else array
        nbytes[name] = nbytes.get(name, 0) + t.nbytes
    return [
        {
            "name": name,
            "type": artifact.plan.formats[name],
            "shape": list(shape),
            "bytes": nbytes[name],
        }
        for name, shape in stored_shapes(artifact.spec, artifact.plan).items()
    ]


def _kinds(tensors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per stored type: how many tensors, values and bytes; the largest first."""
    kinds: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        kind = kinds.setdefault(
            tensor["type"], {"type": tensor["type"], "tensors": 0, "values": 0, "bytes": 0}
        )
        values = 1
        for length in tensor["shape"]:
            values *= length
        kind["tensors"] += 1
        kind["values"] += values
        kind["bytes"] += tensor["bytes"]
    return sorted(kinds.values(), key=lambda kind: -kind["bytes"])


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shown(name: str, value: object) -> str:
    if name == "bytes":
        return format_size(int(str(value)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
