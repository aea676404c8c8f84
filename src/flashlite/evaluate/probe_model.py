"""Models of random weights in memory, to measure kernels with: no file, no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.format import ALIGN, Artifact, Manifest, layout
from flashlite.checkpoint.tokenizer import SpecialTokens
from flashlite.compress.plan import Format, Plan
from flashlite.model.spec import ModelSpec

__all__ = ["Probe", "make_probe"]


@dataclass(frozen=True)
class Probe:
    """An artifact that lies on no disk, and its weights."""

    artifact: Artifact
    weights: NDArray[np.uint8]

    @property
    def plan(self) -> Plan:
        """How its tensors are stored."""
        return self.artifact.plan


def make_probe(name: str, spec: ModelSpec, formats: Sequence[str]) -> Probe:
    """Random weights of a shape; its layers take the formats in turns, its head the first."""
    chosen: dict[str, Format] = {}
    for tensor, shape in spec.shapes():
        layer = int(tensor.split(".")[1]) if tensor.startswith("layers.") else 0
        fmt = "f32" if len(shape) == 1 else formats[layer % len(formats)]
        chosen[tensor] = fmt  # type: ignore[assignment]
    plan = Plan("probe", chosen)
    plan.check(spec)
    arrays = layout(spec, plan)
    digest = blake3(repr((spec, plan)).encode()).hexdigest()
    artifact = Artifact(
        path=Path(name),
        name=name,
        model=spec,
        plan=plan,
        tokens=SpecialTokens(None, (), False, ()),
        provenance={"source": "", "sha256": "", "licence": ""},
        tensors=arrays.tensors,
        weights_size=arrays.size,
        manifest=Manifest({}, {}, digest),
    )
    return Probe(artifact, _fill(artifact))


def _fill(artifact: Artifact) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    memory = np.empty(artifact.weights_size + ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    weights = memory[start : start + artifact.weights_size]
    weights[:] = rng.integers(0, 256, len(weights), np.uint8)
    for entry in artifact.tensors.values():
        part = weights[entry.offset : entry.offset + entry.nbytes]
        if entry.dtype == "F16":
            part.view("<f2")[:] = rng.normal(0, 0.002, entry.nbytes // 2).astype("<f2")
        elif entry.dtype == "F32":
            part.view("<f4")[:] = 1.0
    return weights
