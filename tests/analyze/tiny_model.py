"""A tiny model in memory with sensitive answers, and the rounding of no real format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.analysis import AnalysedModel, Calibration
from flashlite.analyze.sensitivity import Formats
from flashlite.checkpoint.open import open_checkpoint
from flashlite.model.families import describe
from flashlite.model.spec import ModelSpec

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
MODEL = AnalysedModel("tiny", "/models/tiny", "blake3:00", "llama", 1)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tiny:
    """A model's spec, its weights and texts for it."""

    spec: ModelSpec
    weights: dict[str, Floats]
    texts: list[NDArray[np.int32]]

    def read(self, name: str) -> Floats:
        return self.weights[name]


def tiny(family: str, texts: int = 12, length: int = 24) -> Tiny:
    """A stored fixture of one family, and random ids."""
    source = describe(open_checkpoint(FAMILIES / family))
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, source.spec.vocab_size, length).astype(np.int32) for _ in range(texts)]
    weights = {name: source.tensor(name) for name, _ in source.spec.shapes()}
    return Tiny(source.spec, weights, ids)


def round_to(weights: Floats, steps: int) -> Floats:
    """To multiples of the largest weight of the row over `steps`."""
    step = np.abs(weights).max(axis=1, keepdims=True) / steps
    rounded: Floats = np.rint(weights / step) * step
    return rounded


def formats() -> Formats:
    """Two: `coarse` and `fine`."""
    steps = {"coarse": 12, "fine": 100}
    return Formats(
        ("fine", "coarse"),
        lambda name, weights, fmt: round_to(weights, steps[fmt]),
        lambda shape, fmt: shape[0] * shape[1] // (2 if fmt == "coarse" else 1),
    )


def calibration(model: Tiny, held_back: int = 4) -> Calibration:
    rows = [tuple(int(i) for i in ids) for ids in model.texts]
    return Calibration("model", 0, ("en",), tuple(rows[held_back:]), tuple(rows[:held_back]))
