"""`Analysis`: what `flashlite analyze` found, as `sensitive_layers.json` holds it.

    model         which model it is of; the digest changes when any weight does
    calibration   the token ids it was measured on; `held_back` ones gave the exact losses
    units         per unit and format: bytes, predicted and exact loss, and `kl`, to decide with
    tensors       per tensor and format: bytes and predicted loss
    proxy         how well the prediction ranks the exact losses, and what it was scaled by
    embedding     the look-up table and the head apart, with rows brought to one scale, too
    heads, kv_groups, neurons, layers    what could be left out
    artifact      what `flashlite quantize` made of it, None before

Losses are KL divergences from the source in float32, in nats per token. `analysis.schema.json`
beside this file says the same to other programs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlite.analyze.strict import load_json, read
from flashlite.errors import UsageError

__all__ = [
    "VERSION",
    "AnalysedModel",
    "Analysis",
    "Calibration",
    "EmbeddingLoss",
    "HeadScore",
    "KvGroupScore",
    "LayerScore",
    "NeuronScores",
    "Proxy",
    "TensorFormat",
    "TensorLoss",
    "Unit",
    "UnitFormat",
    "read_analysis",
    "write_analysis",
]

VERSION = 1
"""Of the file; another one is refused by its number."""


@dataclass(frozen=True)
class AnalysedModel:
    """The model that was analyzed: `name` as it was given, `path` where it lay."""

    name: str
    path: str
    digest: str
    family: str
    parameters: int


@dataclass(frozen=True)
class Calibration:
    """The text of the measurements: `source` is "model" where it wrote them, else a file's name."""

    source: str
    seed: int
    languages: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]
    held_back: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class UnitFormat:
    """One unit in one format; `kl` is exact where that was measured, else predicted and scaled."""

    bytes: int
    predicted_kl: float
    exact_kl: float | None
    kl: float


@dataclass(frozen=True)
class Unit:
    """Tensors that share a format."""

    name: str
    layer: int | None
    tensors: tuple[str, ...]
    parameters: int
    formats: Mapping[str, UnitFormat]


@dataclass(frozen=True)
class TensorFormat:
    """One tensor in one format."""

    bytes: int
    predicted_kl: float


@dataclass(frozen=True)
class TensorLoss:
    """One tensor."""

    name: str
    formats: Mapping[str, TensorFormat]


@dataclass(frozen=True)
class Proxy:
    """How the prediction was made and how good it is.

    Attributes:
        spearman: of predicted and exact losses over all units and formats measured; None: too few.
        scale: geometric mean of exact over predicted.
        gradients: whether both sides are weighted, or the inputs alone.
        by_format: `spearman` within one format.
        additivity: KL of the model with all units in a format, over the sum of the single ones.
    """

    spearman: float | None
    scale: float
    gradients: bool
    by_format: Mapping[str, float | None]
    additivity: Mapping[str, float]


@dataclass(frozen=True)
class EmbeddingLoss:
    """Exact losses of the table of tokens in one format: as both, as look-up alone, as head alone
    (None where it is not tied), and as both with each row divided by its largest weight before
    and multiplied after.
    """

    both: float
    lookup: float
    head: float | None
    normalised: float


@dataclass(frozen=True)
class HeadScore:
    """One query head: the predicted loss without it, the exact one with its mean in its place,
    and the share of its attention on the first 4 and the last 256 tokens (None: texts too short).
    """

    layer: int
    head: int
    importance: float
    exact_kl: float | None
    sink_window_mass: float | None


@dataclass(frozen=True)
class KvGroupScore:
    """All query heads of one key-value head, likewise."""

    layer: int
    group: int
    importance: float
    exact_kl: float | None


@dataclass(frozen=True)
class NeuronScores:
    """Importance of each block of 32 neurons of one layer's MLP."""

    layer: int
    blocks: tuple[float, ...]


@dataclass(frozen=True)
class LayerScore:
    """`redundancy` is 1 - cosine of the residual before and after: near 0, it adds little."""

    layer: int
    redundancy: float


@dataclass(frozen=True)
class Analysis:
    """All of it; lists that were not measured are empty."""

    model: AnalysedModel
    calibration: Calibration
    units: tuple[Unit, ...]
    tensors: tuple[TensorLoss, ...] = ()
    proxy: Proxy | None = None
    embedding: Mapping[str, EmbeddingLoss] | None = None
    heads: tuple[HeadScore, ...] = ()
    kv_groups: tuple[KvGroupScore, ...] = ()
    neurons: tuple[NeuronScores, ...] = ()
    layers: tuple[LayerScore, ...] = ()
    artifact: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal analysis."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: object) -> Analysis:
        """Read what `to_json` wrote; every value may be damaged.

        Raises:
            UsageError: a field is missing, unknown, or of a wrong type or range; it is named.
        """
        if not isinstance(data, dict):
            raise UsageError(f"the analysis is {type(data).__name__}, not an object")
        if data.get("version") != VERSION or isinstance(data.get("version"), bool):
            raise UsageError(
                f"the analysis has version {ascii(data.get('version'))[:20]}, this flashlite reads "
                f"{VERSION}; run `flashlite analyze` again"
            )
        found = read(cls, {key: value for key, value in data.items() if key != "version"}, "")
        found.check()
        return found

    def check(self) -> None:
        """What no type can say.

        Raises:
            UsageError: units or tensors are named twice, or a range is left.
        """
        names = [unit.name for unit in self.units]
        if not names:
            raise UsageError("the analysis names no unit")
        tensors = [tensor for unit in self.units for tensor in unit.tensors]
        for what, listed in (("unit", names), ("tensor", tensors)):
            if len(set(listed)) != len(listed):
                twice = next(name for name in listed if listed.count(name) > 1)
                raise UsageError(f"the analysis names {what} {twice[:60]!r} twice")
        for unit in self.units:
            if not unit.tensors or not unit.formats:
                raise UsageError(f"the analysis has no tensor or no format for unit {unit.name}")


def read_analysis(path: Path) -> Analysis:
    """Read `sensitive_layers.json`.

    Raises:
        UsageError: it is not one; the file and the field are named.
        OSError: it cannot be read.
    """
    data = load_json(path)
    try:
        return Analysis.from_json(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def write_analysis(analysis: Analysis, path: Path) -> None:
    """Write it under another name, then rename it into place: it is there whole or not at all.

    Raises:
        OSError: the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.new")
    text = json.dumps(analysis.to_json(), allow_nan=False, indent=1, ensure_ascii=False)
    # One id, one number a line would make a file of a hundred thousand lines.
    lines = _joined(text)
    try:
        temporary.write_text(lines + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _joined(text: str) -> str:
    """Lists of numbers brought onto one line."""
    import re

    return re.sub(
        r"\[\s*(-?[\d.eE+-]+(?:,\s*-?[\d.eE+-]+)*)\s*\]",
        lambda match: "[" + ", ".join(match[1].replace(",", " ").split()) + "]",
        text,
    )
