"""An analysis of a small model, made without measuring: a finer format loses less by 4 a bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashlite.analyze.analysis import AnalysedModel, Analysis, Calibration, Unit, UnitFormat
from flashlite.analyze.digest import source_digest
from flashlite.analyze.units import units_of
from flashlite.compress.quantize import CODES
from flashlite.compress.roundings import stored_bytes
from flashlite.model.source import SourceModel

__all__ = ["analysis_of"]


def analysis_of(
    source: SourceModel,
    sequences: Sequence[Sequence[int]] | None = None,
    path: str = "model",
    seed: int = 0,
) -> Analysis:
    """Of a model, with random text to calibrate on unless some is given; each unit is as sensitive
    as a seeded draw says.
    """
    rng = np.random.default_rng(seed)
    vocab = source.spec.vocab_size
    if sequences is None:
        sequences = [[int(i) for i in rng.integers(0, vocab, 24)] for _ in range(9)]
    units = []
    for unit in units_of(source.spec):
        scale, formats = 0.01 * float(rng.lognormal()), {}
        for fmt in CODES:
            size = sum(stored_bytes(shape, fmt) for shape in unit.shapes)
            kl = scale * 4.0 ** (4.5 - 8 * size / unit.parameters)
            formats[fmt] = UnitFormat(size, kl, None, kl)
        units.append(Unit(unit.name, unit.layer, unit.tensors, unit.parameters, formats))
    parameters = sum(int(np.prod(shape)) for _, shape in source.spec.shapes())
    return Analysis(
        AnalysedModel(path, path, source_digest(source), source.spec.family, parameters),
        Calibration("model", 0, (), tuple(tuple(ids) for ids in sequences)),
        tuple(units),
    )
