"""`SourceModel`: one checkpoint seen through canonical names.

source.tensor("layers.0.q")     float32, rows in canonical order
source.blocks("layers.0.q")     the same rows as they lie in the file, still quantized
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.base import Checkpoint, TensorInfo
from flashlite.errors import CheckpointError, UnsupportedModel
from flashlite.model.encoder import EncoderSpec, Spec
from flashlite.model.spec import ModelSpec

__all__ = [
    "EncoderSource",
    "Source",
    "SourceModel",
    "SourceTensors",
    "connect",
    "connect_encoder",
    "stored_name",
]

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Source:
    """Which checkpoint tensor holds a canonical one, and what turns it into canonical form."""

    name: str
    rope_heads: int | None = None  # heads whose rows lie as pairs (2j, 2j + 1), as in llama GGUF
    offset: float = 0.0  # added to every value: 1 where norms are stored as w of (1 + w)


@dataclass(frozen=True)
class SourceTensors:
    """A described checkpoint of either kind: its spec, and every canonical tensor on demand."""

    spec: Spec
    checkpoint: Checkpoint
    sources: Mapping[str, Source]  # one for each name of `spec.shapes()`

    def tensor(self, canonical: str) -> NDArray[np.float32]:
        """Read one tensor as float32 in its canonical shape and row order.

        Raises:
            CheckpointError: the model has no such tensor, or it cannot be read.
        """
        source = self._source(canonical)
        values = self.checkpoint.tensor(source.name)
        if source.offset:
            values = values + np.float32(source.offset)
        return values if source.rope_heads is None else _halves(values, source.rope_heads)

    def blocks(self, canonical: str) -> tuple[str, NDArray[np.uint8]]:
        """Read one matrix as stored: its type and its quantized rows [rows, bytes per row].

        Raises:
            CheckpointError: as `tensor`, or it is not a matrix.
        """
        source = self._source(canonical)
        info = self.checkpoint.info(source.name)
        if len(info.shape) != 2:
            raise CheckpointError(f"{canonical} is not a matrix", path=self.checkpoint.path)
        rows = self.checkpoint.raw(source.name).reshape(info.shape[0], -1)
        return info.dtype, rows if source.rope_heads is None else _halves(rows, source.rope_heads)

    def info(self, canonical: str) -> TensorInfo:
        """The directory entry of one tensor: its stored type, and its shape in canonical form.

        Raises:
            CheckpointError: the model has no such tensor.
        """
        return self.checkpoint.info(self._source(canonical).name)

    def _source(self, canonical: str) -> Source:
        if canonical not in self.sources:
            raise CheckpointError(f"the model has no tensor {canonical}", path=self.checkpoint.path)
        return self.sources[canonical]


@dataclass(frozen=True)
class SourceModel(SourceTensors):
    """A described language model."""

    spec: ModelSpec


@dataclass(frozen=True)
class EncoderSource(SourceTensors):
    """A described text encoder."""

    spec: EncoderSpec


def connect(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    names: Mapping[str, str],
    *,
    interleaved: bool = False,
    norm_offset: float = 0.0,
    known: frozenset[str] = frozenset(),
) -> SourceModel:
    """Find every canonical tensor of `spec` in the checkpoint.

    Args:
        checkpoint: the model file.
        spec: its description.
        names: canonical name -> checkpoint name, with `{i}` for the layer in both.
        interleaved: rows of q and k lie as pairs (2j, 2j + 1) and are brought to halves.
        norm_offset: added to norm weights.
        known: further tensors the file may hold, because they are already in `spec` or say nothing.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is one the spec does not use.
    """
    heads = {"q": spec.n_heads, "k": spec.n_kv_heads} if interleaved else {}
    sources = _find(checkpoint, spec, names, heads, norm_offset)
    _refuse_unused(checkpoint, {source.name for source in sources.values()} | known, spec)
    return SourceModel(spec, checkpoint, sources)


def connect_encoder(
    checkpoint: Checkpoint,
    spec: EncoderSpec,
    names: Mapping[str, str],
    *,
    known: frozenset[str] = frozenset(),
) -> EncoderSource:
    """Find every canonical tensor of an encoder; arguments and errors as `connect`."""
    sources = _find(checkpoint, spec, names, {}, 0.0)
    _refuse_unused(checkpoint, {source.name for source in sources.values()} | known, spec)
    return EncoderSource(spec, checkpoint, sources)


def _find(
    checkpoint: Checkpoint,
    spec: Spec,
    names: Mapping[str, str],
    heads: Mapping[str, int],
    norm_offset: float,
) -> dict[str, Source]:
    """Where each tensor of `spec.shapes()` lies."""
    sources: dict[str, Source] = {}
    for canonical, shape in spec.shapes():
        name, kind = stored_name(canonical, names)
        if name not in checkpoint.tensors:
            raise CheckpointError(
                f"tensor {name} is missing, {spec.family} needs it for {canonical}",
                path=checkpoint.path,
            )
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"tensor {name} has the wrong shape", path=checkpoint.path, value=found, limit=shape
            )
        offset = norm_offset if kind.endswith("norm") else 0.0
        sources[canonical] = Source(name, heads.get(kind.removesuffix("_bias")), offset)
    return sources


def stored_name(canonical: str, names: Mapping[str, str]) -> tuple[str, str]:
    """The name in the file of a canonical tensor, and the canonical name without its layer.

    Args:
        canonical: for example `layers.0.q`.
        names: as for `connect`.
    """
    if not canonical.startswith("layers."):
        return names[canonical], canonical
    _, layer, kind = canonical.split(".")
    return names["layers.{i}." + kind].replace("{i}", layer), kind


def _refuse_unused(checkpoint: Checkpoint, used: set[str], spec: Spec) -> None:
    """A tensor nobody reads would mean another arithmetic than the spec's.

    Biases of zero are let through: they change nothing, and some exporters write them.
    """
    for name, info in checkpoint.tensors.items():
        if name in used:
            continue
        if name.endswith(".bias") and len(info.shape) == 1 and not checkpoint.tensor(name).any():
            continue
        raise UnsupportedModel(
            f"tensor {name} of shape {info.shape} is not part of a {spec.family} model as "
            "flashlite runs it",
            path=checkpoint.path,
        )


def _halves(rows: NDArray[T], heads: int) -> NDArray[T]:
    """Rows (2j, 2j + 1) of every head, brought to (j, j + head_dim / 2)."""
    order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
    halves: NDArray[T] = rows[order]
    return halves
