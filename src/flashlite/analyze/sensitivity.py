"""What each unit loses in each format: predicted for all, exact for some, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashlite.analyze.analysis import EmbeddingLoss, Proxy, Unit, UnitFormat
from flashlite.analyze.divergence import Exact
from flashlite.analyze.ranks import spearman
from flashlite.analyze.statistics import Statistics, predicted_kl
from flashlite.analyze.units import UnitShape
from flashlite.model.reference import Floats
from flashlite.model.spec import ModelSpec

__all__ = [
    "Formats",
    "Measured",
    "additivity",
    "fit_proxy",
    "measure_unit",
    "units_with_losses",
]

Read = Callable[[str], Floats]

_ROWS = 1 << 22  # weights compared at once: 16 MB


@dataclass(frozen=True)
class Formats:
    """What compression offers, passed in since it is built after this.

    Attributes:
        names: of the formats, as the plan spells them.
        round_trip: (canonical name, weights, format) -> the weights as they will be multiplied.
        stored_bytes: (shape, format) -> bytes in the artifact.
    """

    names: tuple[str, ...]
    round_trip: Callable[[str, Floats, str], Floats]
    stored_bytes: Callable[[tuple[int, int], str], int]


@dataclass(frozen=True)
class Measured:
    """One unit: predicted losses by tensor and format, exact ones by format; of the table of tokens
    also its uses apart.
    """

    predicted: Mapping[str, Mapping[str, float]]
    exact: Mapping[str, float]
    embedding: Mapping[str, EmbeddingLoss] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Measured:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, AttributeError: it is something else.
        """
        embedding = data["embedding"]
        if embedding is not None:
            embedding = {fmt: EmbeddingLoss(**loss) for fmt, loss in embedding.items()}
        return cls(data["predicted"], data["exact"], embedding)

    def total(self, fmt: str) -> float:
        """Predicted loss of the unit in a format."""
        return sum(losses[fmt] for losses in self.predicted.values())


def measure_unit(
    unit: UnitShape,
    spec: ModelSpec,
    weights: Read,
    statistics: Statistics,
    formats: Formats,
    exact: Exact,
    wanted: Iterable[str],
) -> Measured:
    """Round a unit in every format; run the model with it in the `wanted` ones, and with the table
    of tokens in all.
    """
    predicted: dict[str, dict[str, float]] = {name: {} for name in unit.tensors}
    measured: dict[str, float] = {}
    embedding: dict[str, EmbeddingLoss] = {}
    wanted = set(wanted)
    for fmt in formats.names:
        changed: dict[str, Floats] = {}
        for name in unit.tensors:
            source = weights(name)
            rounded = formats.round_trip(name, source, fmt)
            predicted[name][fmt] = _predict(name, source, rounded, spec, statistics)
            if rounded is not source:
                changed[name] = rounded
            del rounded  # a table of a large vocabulary is most of the model
        if unit.name == "embed":
            embedding[fmt] = _embedding(spec, weights, formats, fmt, exact, changed)
            measured[fmt] = embedding[fmt].both
        elif fmt in wanted:
            first = spec.n_layers if unit.layer is None else unit.layer
            # Weights that lie on the format's grid already are what they were.
            measured[fmt] = exact.from_layer(first, changed) if changed else 0.0
    return Measured(predicted, measured, embedding or None)


def _embedding(
    spec: ModelSpec,
    weights: Read,
    formats: Formats,
    fmt: str,
    exact: Exact,
    changed: dict[str, Floats],
) -> EmbeddingLoss:
    """Exact losses of the table of tokens in one format, its uses apart."""
    if not changed:
        return EmbeddingLoss(0.0, 0.0, 0.0 if spec.tied_head else None, 0.0)
    source = weights("embed")
    both = exact.from_ids(changed)
    lookup, head = both, None
    if spec.tied_head:
        lookup, head = exact.from_ids(changed, head=source), exact.head_only(changed["embed"])
    changed.clear()
    normalised = np.empty_like(source)
    step = max(1, _ROWS // source.shape[1])
    for first in range(0, len(source), step):
        rows = source[first : first + step]
        sizes = np.abs(rows).max(axis=1, keepdims=True)
        sizes[sizes == 0] = 1
        rounded = formats.round_trip("embed (rows of one size)", rows / sizes, fmt)
        np.multiply(rounded, sizes, out=normalised[first : first + step])
    return EmbeddingLoss(both, lookup, head, exact.from_ids({"embed": normalised}))


def fit_proxy(
    measured: Mapping[str, Measured], gradients: bool, added: Mapping[str, float]
) -> Proxy:
    """Compare all predicted losses with all exact ones.

    Args:
        measured: by unit.
        gradients: how they were predicted.
        added: `additivity` by format.
    """
    pairs = [
        (fmt, found.total(fmt), exact)
        for found in measured.values()
        for fmt, exact in found.exact.items()
        if exact > 0 and found.total(fmt) > 0  # a grid that is kept loses nothing, predicted or not
    ]
    by_format = {
        fmt: spearman([p for f, p, _ in pairs if f == fmt], [e for f, _, e in pairs if f == fmt])
        for fmt in dict.fromkeys(f for f, _, _ in pairs)
    }
    return Proxy(
        spearman([p for _, p, _ in pairs], [e for _, _, e in pairs]),
        _scale((p, e) for _, p, e in pairs),
        gradients,
        by_format,
        added,
    )


def units_with_losses(
    units: Sequence[UnitShape],
    measured: Mapping[str, Measured],
    formats: Formats,
    overall: float,
) -> tuple[Unit, ...]:
    """Every unit with its losses; where no exact one is known, the prediction is scaled by what
    exact and predicted losses of the unit's other formats are apart.

    Args:
        units: of the model.
        measured: by unit.
        formats: all of them.
        overall: scale of a unit without any exact loss.
    """
    found = []
    for unit in units:
        losses = measured[unit.name]
        pairs = [(losses.total(fmt), exact) for fmt, exact in losses.exact.items()]
        scale = _scale(((p, e) for p, e in pairs if p > 0 and e > 0), overall)
        entries = {}
        for fmt in formats.names:
            predicted, exact = losses.total(fmt), losses.exact.get(fmt)
            size = sum(formats.stored_bytes(shape, fmt) for shape in unit.shapes)
            entries[fmt] = UnitFormat(
                size, predicted, exact, predicted * scale if exact is None else exact
            )
        found.append(Unit(unit.name, unit.layer, unit.tensors, unit.parameters, entries))
    return tuple(found)


def additivity(
    units: Sequence[UnitShape],
    measured: Mapping[str, Measured],
    formats: Formats,
    fmt: str,
    exact: Exact,
) -> float | None:
    """KL of the whole model in one format over the sum of its units'; None where that is 0.

    Every matrix is rounded when it is read and dropped after its layer: memory holds one layer.
    """
    single = sum(measured[unit.name].exact[fmt] for unit in units)
    if single <= 0:
        return None
    return exact.all_changed(lambda name, w: formats.round_trip(name, w, fmt)) / single


def _predict(
    name: str, source: Floats, rounded: Floats, spec: ModelSpec, statistics: Statistics
) -> float:
    inputs, outputs = statistics.inputs, statistics.outputs
    step = max(1, _ROWS // source.shape[1])
    total = 0.0
    for first in range(0, len(source), step):
        rows = slice(first, first + step)
        change = rounded[rows] - source[rows]
        if name == "embed":
            # A look-up reads whole rows, as often as they occur, and hands on their columns.
            total += predicted_kl(change, inputs[name][rows], outputs[name])
            if spec.tied_head:
                total += predicted_kl(change, outputs["head"][rows], inputs["head"])
        else:
            total += predicted_kl(change, outputs[name][rows], inputs[name])
    return total


def _scale(pairs: Iterable[tuple[float, float]], default: float = 1.0) -> float:
    """Geometric mean of exact over predicted."""
    logs = [math.log(exact / predicted) for predicted, exact in pairs]
    return math.exp(sum(logs) / len(logs)) if logs else default
