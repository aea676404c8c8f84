"""From an allocation to matrices: round, look at what rounding gained, allocate again, swap.

    items -> allocation -> every unit rounded in its format and the two beside it
          -> items as rounding left them -> allocation -> swaps by true KL -> matrices

Rounding in three formats costs little more than in one, since the inputs are the same, and lets the
last choices be made between matrices that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from flashlite.compress.allocate import Item, Point, allocate, smallest_within
from flashlite.compress.differential import (
    UnitCost,
    items_of,
    neighbours,
    polish,
    split_sequences,
    unit_of,
)
from flashlite.compress.gptq import weights_of
from flashlite.compress.pack import Quantized
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.tensors import kept_grid
from flashlite.compress.walk import Rounded, Rounding, quantize_layers
from flashlite.errors import CompressError
from flashlite.model.reference import Floats, Reference

if TYPE_CHECKING:
    from flashlite.analyze.analysis import Analysis
    from flashlite.compress.plan import Format
    from flashlite.compress.workspace import Workspace
    from flashlite.model.source import SourceModel

__all__ = ["Carried", "Limits", "carry_out", "gains_of"]

Weights = Callable[[str], Floats]
Progress = Callable[[str, int, int], None]
_Loss = Callable[[Mapping[str, str]], float]

_EXPECTED_GAIN = 0.6  # of a format's loss is left after rounding well, before it is known
_TRIES = 8  # allocations whose loss is measured on the way to a wanted loss
_NEAR = 0.93  # of the wanted loss: near enough
_ROUNDS = 3  # walks through the layers, at most


@dataclass(frozen=True)
class Limits:
    """What the allocation must keep within: a cost, or a loss.

    `cost` is the price of a unit in a format, None: its bytes; `budget` the sum of all prices,
    what is beside the units taken off. With `max_kl` the budget is left open.
    """

    budget: float | None = None
    max_kl: float | None = None
    cost: UnitCost | None = None
    what: Callable[[float], str] = lambda cost: f"{cost:.0f} bytes"


@dataclass(frozen=True)
class Carried:
    """The result: a format for every unit and the matrices of those that are rounded."""

    formats: Mapping[str, str]  # by unit
    cost: float
    predicted_kl: float
    measured_kl: float
    embed_kl: float  # of the look-up table and the head it is tied to alone
    ready: Mapping[str, Quantized]  # by tensor
    steps: Mapping[str, int]
    gain: float  # error left after rounding, of that of plain rounding
    tried: int = 0
    kept: int = 0
    notes: Sequence[str] = field(default_factory=tuple)


class _Run:
    """What the stages share."""

    def __init__(
        self,
        source: SourceModel,
        weights: Weights,
        analysis: Analysis,
        limits: Limits,
        measure: Callable[[Weights], float],
        workspace: Callable[[Mapping[str, Sequence[str]]], Workspace],
        forced: Mapping[str, str],
        rounding: Rounding,
        progress: Progress | None,
    ) -> None:
        self.source, self.weights = source, weights
        self.analysis, self.limits = analysis, limits
        self.measure, self.workspace = measure, workspace
        self.forced, self.rounding, self.progress = forced, rounding, progress
        self.units = unit_of(analysis)
        self.fit, self.held = split_sequences(analysis.calibration)
        self.tables: dict[tuple[str, str], Quantized] = {}  # what lies outside the layers
        self.store: Workspace | None = None
        self._importance: Floats | None = None
        self._table_weights: dict[tuple[str, str], Floats] = {}

    def table(self, name: str, fmt: str) -> Quantized:
        """The look-up table or the head in a format, columns weighted by what the head reads."""
        if (name, fmt) not in self.tables:
            found = kept_grid(self.source, name, _as_format(fmt))
            if found is None:
                found = quantize_matrix(
                    self.weights(name), fmt, name=name, importance=self.importance()
                )
            self.tables[name, fmt] = found
        return self.tables[name, fmt]

    def importance(self) -> Floats:
        """Mean square of what the head reads, by column."""
        if self._importance is None:
            reference = Reference(self.source.spec, self.weights)
            total, count = np.zeros(self.source.spec.d_model, np.float64), 0
            for ids in self.held:
                states = reference.hidden(ids)[1:]
                total += np.square(states, dtype=np.float64).sum(axis=0)
                count += len(states)
            self._importance = (total / max(1, count)).astype(np.float32)
        return self._importance

    def stored(self, formats: Mapping[str, str]) -> Weights:
        """The weights of an allocation."""
        shapes = dict(self.source.spec.shapes())

        def get(name: str) -> Floats:
            if name not in self.units:
                return self.weights(name)
            fmt = formats[self.units[name]]
            if name in ("embed", "head"):
                return self.table_weights(name, fmt)
            return self.kept.weights(name, fmt, shapes[name][1])

        return get

    def losses(self) -> _Loss:
        """The measured loss of allocations of the last walk, each measured once."""
        seen: dict[tuple[str, ...], float] = {}

        def loss(formats: Mapping[str, str]) -> float:
            key = tuple(formats[unit.name] for unit in self.analysis.units)
            if key not in seen:
                seen[key] = self.measure(self.stored(formats))
            return seen[key]

        return loss

    @property
    def kept(self) -> Workspace:
        """What the last walk made."""
        if self.store is None:
            raise CompressError("nothing is rounded yet")
        return self.store

    def table_weights(self, name: str, fmt: str) -> Floats:
        """The same as floats; one format at a time is kept, and the source's where it is equal."""
        if _keeps(self.source, name, fmt):
            return self.weights(name)
        if (name, fmt) not in self._table_weights:
            self._table_weights.clear()
            matrix = self.table(name, fmt)
            self._table_weights[name, fmt] = weights_of(matrix, self.weights(name).shape[1])
        return self._table_weights[name, fmt]

    def walk(self, point: Point, items: Sequence[Item]) -> dict[str, Rounded]:
        """Round every matrix of the layers in its format and those beside it."""
        near = neighbours(items, point.formats)
        formats = {
            name: near[unit] for name, unit in self.units.items() if name.startswith("layers.")
        }
        self.store = self.workspace(formats)
        found: dict[str, Rounded] = {}
        embed = self.table_weights("embed", point.formats[self.units["embed"]])
        layers = quantize_layers(
            self.source.spec,
            self.weights,
            formats,
            self.fit,
            self.held,
            embed=embed,
            rounding=self.rounding,
            keep=lambda name, fmt: kept_grid(self.source, name, _as_format(fmt)),
            done=self.store.layer,
            progress=self.stage("round"),
        )
        for i, layer in enumerate(layers):
            if self.store.layer(i) is None:
                self.store.save(i, layer)
            # The codes stay on disk: a model may be larger than memory.
            found |= {rounded.name: _without_codes(rounded) for rounded in layer}
        return found

    def stage(self, name: str) -> Callable[[int, int], None] | None:
        """A progress callback of one stage."""
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(name, done, total)


def carry_out(
    source: SourceModel,
    analysis: Analysis,
    limits: Limits,
    *,
    measure: Callable[[Weights], float],
    workspace: Callable[[Mapping[str, Sequence[str]]], Workspace],
    weights: Weights | None = None,
    forced: Mapping[str, str] | None = None,
    rounding: Rounding | None = None,
    swaps: int = 20,
    seconds: float = 120.0,
    progress: Progress | None = None,
) -> Carried:
    """Allocate, round and measure.

    Args:
        source: the model.
        analysis: of this model, checked.
        limits: the budget.
        measure: true KL, in nats, of the model with these weights.
        workspace: where matrices of a walk with these formats are kept.
        weights: reads the source's tensors, perhaps keeping the large ones; None: its own method.
        forced: units whose format is decided.
        rounding: None: the default.
        swaps: measured at most, in `seconds`.
        progress: called with (stage, done, total).

    Raises:
        CompressError: the budget or the loss cannot be reached; what can is named.
    """
    run = _Run(
        source,
        weights or source.tensor,
        analysis,
        limits,
        measure,
        workspace,
        forced or {},
        rounding or Rounding(),
        progress,
    )
    items = items_of(analysis, source.spec, cost=limits.cost, forced=run.forced)
    notes: list[str] = []
    good: tuple[Point, list[Item], dict[str, Rounded], _Loss, Workspace] | None = None
    point = _first(items, limits)
    for attempt in range(_ROUNDS):
        rounded = run.walk(point, items)
        gains = gains_of(analysis, rounded)
        only = neighbours(items, point.formats)
        refined = items_of(
            analysis, source.spec, cost=limits.cost, forced=run.forced, gains=gains, only=only
        )
        loss = run.losses()
        if limits.max_kl is None:
            best = allocate(refined, _given(limits), what=limits.what)
            break
        best, edge = _within(refined, limits.max_kl, loss, run.stage("measure"))
        reached = loss(best.formats)
        if reached <= limits.max_kl and (good is None or best.cost < good[0].cost):
            good = (best, refined, rounded, loss, run.kept)
        if not edge or attempt + 1 == _ROUNDS:
            break
        # The wanted loss lies beyond the formats that were rounded: go there. Where the analysis
        # has led astray once already, to the best there is.
        point = _beyond(items, best, reached, limits.max_kl)
        if attempt + 2 == _ROUNDS and good is None:
            point = _finest(items)
    if limits.max_kl is not None:
        if good is None:
            raise CompressError(
                f"a KL of at most {limits.max_kl:g} nats was not reached: the least measured "
                f"is {loss(best.formats):.4g}; allow more, or analyze with finer formats"
            )
        best, refined, rounded, loss, run.store = good
    done = polish(refined, best, loss, swaps=swaps, seconds=seconds, progress=run.stage("swap"))
    final = dict(done.formats)
    embed_kl = _embed_loss(run, final)
    predicted = sum(
        choice.kl
        for item in refined
        for choice in item.choices
        if choice.format == final[item.name]
    )
    ready = {
        name: run.kept.matrix(name, final[unit])
        if name.startswith("layers.")
        else run.table(name, final[unit])
        for name, unit in run.units.items()
    }
    return Carried(
        formats=final,
        cost=done.cost,
        predicted_kl=predicted,
        measured_kl=done.kl,
        embed_kl=embed_kl,
        ready=ready,
        steps=_steps(rounded, final, run.units),
        gain=_mean_gain(rounded, final, run.units),
        tried=len(done.swaps),
        kept=sum(swap.kept for swap in done.swaps),
        notes=tuple(notes),
    )


def _finest(items: Sequence[Item]) -> Point:
    return allocate(items, sum(max(c.cost for c in item.choices) for item in items))


def _beyond(items: Sequence[Item], at: Point, measured: float, wanted: float) -> Point:
    """Where the wanted loss should be met, if losses go on as they are at one allocation."""
    expected = sum(
        choice.kl
        for item in items
        for choice in item.choices
        if choice.format == at.formats[item.name]
    )
    finest = _finest(items)
    goal = 0.8 * wanted * expected / max(measured, 1e-12)
    return finest if goal <= finest.kl else smallest_within(items, goal)


def _given(limits: Limits) -> float:
    if limits.budget is None:
        raise CompressError("neither a budget nor a loss is given")
    return limits.budget


def _first(items: Sequence[Item], limits: Limits) -> Point:
    if limits.max_kl is None:
        return allocate(items, _given(limits), what=limits.what)
    return smallest_within(items, limits.max_kl / _EXPECTED_GAIN)


def _within(
    items: Sequence[Item],
    most: float,
    loss: Callable[[Mapping[str, str]], float],
    progress: Callable[[int, int], None] | None,
) -> tuple[Point, bool]:
    """The cheapest allocation whose measured loss is at most `most`, and whether it lies at the
    edge of what was rounded.
    """
    finest = _finest(items)
    coarsest = allocate(items, sum(min(c.cost for c in item.choices) for item in items))
    best: Point | None = None
    wanted, low, high = most, 0.0, float("inf")  # predicted losses: low is good enough, high is not
    for attempt in range(_TRIES):
        try:
            point = smallest_within(items, max(wanted, finest.kl))
        except CompressError:
            point = finest
        kl = loss(point.formats)
        if progress is not None:
            progress(attempt + 1, _TRIES)
        if kl <= most:
            low = max(low, wanted)
            if best is None or point.cost < best.cost:
                best = point
            if kl >= _NEAR * most or point.formats == coarsest.formats:
                break
        else:
            high = min(high, wanted)
            if point.formats == finest.formats:
                return point, True
        # Aim a little below; between two that are known once there are two.
        wanted *= 0.5 * (1 + _NEAR) * most / max(kl, 1e-9)
        if not low < wanted < high:
            wanted = (low + high) / 2 if high < float("inf") else 2 * low
    if best is None:
        return finest, loss(finest.formats) > most
    return best, best.formats == coarsest.formats


def gains_of(analysis: Analysis, rounded: Mapping[str, Rounded]) -> dict[tuple[str, str], float]:
    """By unit and format: the outputs' error after rounding, of that of plain rounding."""
    found: dict[tuple[str, str], float] = {}
    for unit in analysis.units:
        parts = [rounded[name] for name in unit.tensors if name in rounded]
        if not parts:
            continue
        for fmt in parts[0].matrices:
            found[unit.name, fmt] = float(np.mean([part.left(fmt) for part in parts]))
    return found


def _embed_loss(run: _Run, formats: Mapping[str, str]) -> float:
    """What the table alone loses; nothing where it keeps the source's grid."""
    unit = run.units["embed"]
    if _keeps(run.source, "embed", formats[unit]):
        return 0.0
    table = run.table_weights("embed", formats[unit])
    return run.measure(lambda name: table if name == "embed" else run.weights(name))


def _keeps(source: SourceModel, name: str, fmt: str) -> bool:
    """Whether the format holds this tensor of the source without loss."""
    from flashlite.compress.tensors import keeps_grid

    return keeps_grid(source.checkpoint.info(source.sources[name].name).dtype, _as_format(fmt))


def _without_codes(rounded: Rounded) -> Rounded:
    empty = np.empty((0, 0), np.float16)
    return replace(
        rounded, matrices={fmt: Quantized(fmt, empty, empty) for fmt in rounded.matrices}
    )


def _steps(
    rounded: Mapping[str, Rounded], formats: Mapping[str, str], units: Mapping[str, str]
) -> dict[str, int]:
    counted: dict[str, int] = {}
    for name, matrix in rounded.items():
        step = matrix.steps[formats[units[name]]]
        counted[step] = counted.get(step, 0) + 1
    return counted


def _mean_gain(
    rounded: Mapping[str, Rounded], formats: Mapping[str, str], units: Mapping[str, str]
) -> float:
    gains = [
        matrix.left(formats[units[name]])
        for name, matrix in rounded.items()
        if matrix.steps[formats[units[name]]] != "kept"
    ]
    return float(np.mean(gains)) if gains else 1.0


def _as_format(name: str) -> Format:
    from flashlite.compress.plan import PACKED

    for fmt in PACKED:
        if fmt == name:
            return fmt
    raise CompressError(f"there is no packed format {name[:20]!r}")
