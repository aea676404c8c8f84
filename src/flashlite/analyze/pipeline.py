"""`analyze`: every stage of an analysis, each kept as it is done.

statistics (sums, every few sequences) -> units one by one -> all together -> heads
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashlite.analyze import heads as heads_
from flashlite.analyze.analysis import (
    AnalysedModel,
    Analysis,
    Calibration,
    HeadScore,
    KvGroupScore,
    LayerScore,
    NeuronScores,
    TensorFormat,
    TensorLoss,
)
from flashlite.analyze.divergence import Exact
from flashlite.analyze.sensitivity import (
    Formats,
    Measured,
    additivity,
    fit_proxy,
    measure_unit,
    units_with_losses,
)
from flashlite.analyze.state import State
from flashlite.analyze.statistics import Statistics, Sums, gradient_sums, plain_sums
from flashlite.analyze.units import units_of
from flashlite.analyze.weights import CachedWeights
from flashlite.model.reference import Floats
from flashlite.model.spec import ModelSpec

__all__ = ["Settings", "analyze"]

Progress = Callable[[str, int, int], None]

_GRADIENT_SEQUENCES = 32
_KEPT_EVERY = 8  # sequences between two savings of the statistics


@dataclass(frozen=True)
class Settings:
    """What decides how much is measured.

    Attributes:
        exact: formats whose loss is measured unit by unit.
        gradients: take gradients (torch).
        positions: scored for an exact loss.
        ablate: share of heads left out one by one.
        memory: bytes that the whole may take.
        seed: of drawn labels.
    """

    exact: tuple[str, ...]
    gradients: bool
    positions: int = 512
    ablate: float = 0.3
    memory: int = 4 << 30
    seed: int = 0


def analyze(
    model: AnalysedModel,
    spec: ModelSpec,
    read: Callable[[str], Floats],
    calibration: Calibration,
    formats: Formats,
    settings: Settings,
    state: State,
    progress: Progress | None = None,
) -> Analysis:
    """Measure a model.

    Args:
        model: what the result calls it.
        spec: its description.
        read: `SourceModel.tensor`.
        calibration: what to measure on.
        formats: what to measure.
        settings: how much.
        state: where parts are kept, keyed by all of the above.
        progress: called with (stage, done, total).

    Raises:
        FlashliteError: the source cannot be read, or the calibration is too short.
    """
    report = progress or _silent
    weights = CachedWeights(spec, read, settings.memory // 2)
    statistics = _statistics(spec, weights, calibration, settings, state, report)
    held_back = [np.array(ids, np.int32) for ids in calibration.held_back]
    exact = Exact(
        spec,
        weights,
        held_back,
        positions=settings.positions,
        room=settings.memory // 6,
        progress=lambda done, total: report("run the source", done, total),
    )
    units = units_of(spec)
    measured: dict[str, Measured] = {}
    for at, unit in enumerate(units):
        report("sensitivity", at, len(units))
        found = _kept_unit(state, unit.name)
        if found is None:
            found = measure_unit(unit, spec, weights, statistics, formats, exact, settings.exact)
            state.save(f"unit-{unit.name}", found.to_json())
        measured[unit.name] = found
    added = {}
    for at, fmt in enumerate(settings.exact):
        report("all together", at, len(settings.exact))
        part = state.load(f"together-{fmt}")
        if part is None:
            part = {"ratio": additivity(units, measured, formats, fmt, exact)}
            state.save(f"together-{fmt}", part)
        if part["ratio"] is not None:
            added[fmt] = part["ratio"]
    proxy = fit_proxy(measured, statistics.gradients, added)
    scores = _heads(spec, weights, statistics, calibration, settings, exact, state, report)
    shapes = {
        name: shape for unit in units for name, shape in zip(unit.tensors, unit.shapes, strict=True)
    }
    return Analysis(
        model=model,
        calibration=calibration,
        units=units_with_losses(units, measured, formats, proxy.scale),
        tensors=tuple(
            TensorLoss(
                name,
                {
                    f: TensorFormat(formats.stored_bytes(shapes[name], f), x)
                    for f, x in loss.items()
                },
            )
            for found in measured.values()
            for name, loss in found.predicted.items()
        ),
        proxy=proxy,
        embedding=measured["embed"].embedding,
        heads=scores[0],
        kv_groups=scores[1],
        neurons=scores[2],
        layers=tuple(LayerScore(i, x) for i, x in enumerate(heads_.redundancies(exact))),
    )


def _kept_unit(state: State, name: str) -> Measured | None:
    try:
        return Measured.from_json(state.load(f"unit-{name}"))
    except (KeyError, TypeError, AttributeError):
        return None


def _statistics(
    spec: ModelSpec,
    weights: CachedWeights,
    calibration: Calibration,
    settings: Settings,
    state: State,
    report: Progress,
) -> Statistics:
    stage = "statistics with gradients" if settings.gradients else "statistics"
    sums = Sums()
    sequences = calibration.sequences
    if settings.gradients:  # the way back costs three times the way there
        sequences = sequences[:_GRADIENT_SEQUENCES]
    if (kept := state.load_arrays("statistics")) is not None:
        sums.update(kept)
    first = int(sums.pop("sequences", np.zeros(())))
    for at in range(first, len(sequences)):
        report(stage, at, len(sequences))
        ids = np.array(sequences[at], np.int32)
        if settings.gradients:
            gradient_sums(spec, weights, ids, settings.seed + at, sums)
        else:
            plain_sums(spec, weights, ids, sums)
        if (at + 1) % _KEPT_EVERY == 0 or at + 1 == len(sequences):
            state.save_arrays("statistics", {**sums, "sequences": np.array(at + 1)})
    return Statistics.of(spec, sums)


def _heads(
    spec: ModelSpec,
    weights: CachedWeights,
    statistics: Statistics,
    calibration: Calibration,
    settings: Settings,
    exact: Exact,
    state: State,
    report: Progress,
) -> tuple[tuple[HeadScore, ...], tuple[KvGroupScore, ...], tuple[NeuronScores, ...]]:
    importance = statistics.importance or heads_.prescores(spec, weights, statistics, exact)
    per_group = spec.n_heads // spec.n_kv_heads
    chosen = [("head", *place) for place in heads_.lowest(importance.heads, settings.ablate)]
    if per_group > 1:
        chosen += [("group", *place) for place in heads_.lowest(importance.groups, settings.ablate)]
    known: dict[tuple[str, int, int], float] = {}
    parts = state.load("ablations") or {}
    for at, (kind, layer, unit) in enumerate(chosen):
        report("heads", at, len(chosen))
        key = f"{kind}-{layer}-{unit}"
        if key not in parts:
            of = [unit] if kind == "head" else range(unit * per_group, (unit + 1) * per_group)
            columns = heads_.head_columns(spec, list(of))
            name = f"layers.{layer}.o"
            parts[key] = heads_.ablated_kl(exact, name, columns, statistics.means)
            state.save("ablations", parts)
        known[kind, layer, unit] = parts[key]
    if per_group == 1:
        known |= {("group", i, h): kl for (_, i, h), kl in known.items()}
    if statistics.importance is None:
        ratios = [
            kl / importance.heads[i, h] for (kind, i, h), kl in known.items() if kind == "head"
        ]
        importance = importance.scaled(float(np.median(ratios)) if ratios else 1.0)
    report("attention", 0, 1)
    text = np.concatenate([np.array(ids, np.int32) for ids in calibration.held_back])
    mass = heads_.attention_mass(spec, weights, text[: spec.max_context])
    layers = range(spec.n_layers)
    return (
        tuple(
            HeadScore(
                i,
                h,
                float(importance.heads[i, h]),
                known.get(("head", i, h)),
                None if mass is None else float(mass[i, h]),
            )
            for i in layers
            for h in range(spec.n_heads)
        ),
        tuple(
            KvGroupScore(i, g, float(importance.groups[i, g]), known.get(("group", i, g)))
            for i in layers
            for g in range(spec.n_kv_heads)
        ),
        tuple(NeuronScores(i, tuple(float(x) for x in importance.neurons[i])) for i in layers),
    )


def _silent(stage: str, done: int, total: int) -> None:
    """Progress nobody watches."""
