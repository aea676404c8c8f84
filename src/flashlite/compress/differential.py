"""Differential quantization: from an analysis and a goal to the matrices that an artifact stores.

    Analysis + Goal -> items -> allocation -> (polish with the true KL) -> GPTQ, layer by layer

A goal is one of: bytes on disk, bytes of memory, seconds of a decode step, or nats lost. What the
artifact, the runtime and the machine add to the units' own costs comes as a number from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.analysis import Analysis, Calibration, Unit, UnitFormat
from flashlite.analyze.units import UnitShape, units_of
from flashlite.compress.allocate import Choice, Item, Point, hull
from flashlite.compress.plan import PACKED, Format, Plan
from flashlite.compress.roundings import stored_bytes
from flashlite.errors import CompressError
from flashlite.model.spec import ModelSpec

__all__ = [
    "Goal",
    "Polished",
    "Swap",
    "check_units",
    "items_of",
    "migrate",
    "neighbours",
    "plan_of",
    "polish",
    "split_sequences",
    "unit_of",
]

UnitCost = Callable[[str, str], "float | None"]
"""Seconds (or bytes) of one unit in one format; None: it may not have this format."""


@dataclass(frozen=True)
class Goal:
    """What the result must keep within: `size` and `ram` in bytes, `latency` in seconds of one
    decode step, `kl` in nats per token.
    """

    kind: Literal["size", "ram", "latency", "kl"]
    value: float


@dataclass(frozen=True)
class Swap:
    """One change of an allocation that was measured."""

    up: str
    down: str
    kl: float
    kept: bool


@dataclass(frozen=True)
class Polished:
    """An allocation after trying swaps, and all that were tried."""

    formats: Mapping[str, str]
    kl: float
    before: float
    cost: float
    swaps: Sequence[Swap]


def check_units(analysis: Analysis, spec: ModelSpec) -> None:
    """Refuse an analysis that is not one of this model.

    Raises:
        CompressError: it names a tensor that does not exist, leaves one out, names one twice, or
            counts other bytes than its shape gives; the tensor is named.
    """
    shapes = {name: shape for name, shape in spec.shapes() if len(shape) == 2}
    seen: set[str] = set()
    for unit in analysis.units:
        for name in unit.tensors:
            if name not in shapes:
                raise CompressError(
                    f"the config's unit {unit.name} names tensor {name[:60]!r}, which the model "
                    "does not have; analyze this model, or name the one it belongs to (--model)"
                )
            if name in seen:
                raise CompressError(f"the config names tensor {name} in two units")
            seen.add(name)
        size = sum(shapes[name][0] * shapes[name][1] for name in unit.tensors)
        if unit.parameters != size:
            raise CompressError(
                f"the config counts {unit.parameters} parameters in unit {unit.name}, this model "
                f"has {size}: it was made for other shapes; analyze this model"
            )
    if missing := [name for name in shapes if name not in seen]:
        raise CompressError(f"the config has no unit for tensor {missing[0]}; analyze again")


def items_of(
    analysis: Analysis,
    spec: ModelSpec,
    *,
    cost: UnitCost | None = None,
    forced: Mapping[str, str] | None = None,
    gains: Mapping[tuple[str, str], float] | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
) -> list[Item]:
    """What the knapsack chooses from.

    Args:
        analysis: of this model.
        spec: the model.
        cost: of a unit in a format; None: its bytes in the artifact.
        forced: units whose format is decided already.
        gains: how much of its loss remains after better rounding, by unit and format.
        only: the formats that each unit may have, by unit.
    """
    shapes = {name: shape for name, shape in spec.shapes() if len(shape) == 2}
    forced = forced or {}
    found = []
    for unit in analysis.units:
        choices = []
        for fmt, entry in unit.formats.items():
            if fmt not in PACKED or forced.get(unit.name, fmt) != fmt:
                continue
            if only is not None and fmt not in only.get(unit.name, (fmt,)):
                continue
            if cost is None:
                price: float | None = float(
                    sum(stored_bytes((shapes[n][0], shapes[n][1]), fmt) for n in unit.tensors)
                )
            else:
                price = cost(unit.name, fmt)
            if price is None:
                continue
            remaining = 1.0 if gains is None else gains.get((unit.name, fmt), 1.0)
            choices.append(Choice(fmt, price, max(0.0, entry.kl) * remaining))
        if not choices:
            wanted = forced.get(unit.name)
            raise CompressError(
                f"unit {unit.name} has no measured format"
                + (f" {wanted}" if wanted else "")
                + "; analyze it with that format"
            )
        found.append(Item(unit.name, tuple(choices)))
    return found


def neighbours(items: Sequence[Item], formats: Mapping[str, str]) -> dict[str, list[str]]:
    """Of each unit: its format, then the next better and the next cheaper one that can pay."""
    found: dict[str, list[str]] = {}
    for item in items:
        offers = [choice.format for choice in hull(item)]
        at = offers.index(formats[item.name]) if formats[item.name] in offers else 0
        near = [offers[i] for i in (at, at + 1, at - 1) if 0 <= i < len(offers)]
        found[item.name] = near
    return found


def unit_of(analysis: Analysis) -> dict[str, str]:
    """The unit of every tensor."""
    return {name: unit.name for unit in analysis.units for name in unit.tensors}


def migrate(analysis: Analysis, spec: ModelSpec) -> tuple[Analysis, list[str]]:
    """Fit an analysis to another model: units whose tensors have the same shapes keep what was
    found, a new unit takes the largest loss of its kind.

    Returns:
        The analysis, and in words what did not match.

    Raises:
        CompressError: nothing matches.
    """
    known = {unit.name: unit for unit in analysis.units}
    wanted = {unit.name: unit for unit in units_of(spec)}
    kept, odd = [], []
    for name in known:
        if name not in wanted:
            odd.append(f"{name}: this model has no such part")
    for name, shape in wanted.items():
        old = known.get(name)
        if old is not None and (old.tensors, old.parameters) == (shape.tensors, shape.parameters):
            kept.append(old)
            continue
        if old is None:
            odd.append(f"{name}: not in the config, counted like the worst of its kind")
        else:
            odd.append(
                f"{name}: {old.parameters} parameters in the config, {shape.parameters} here, "
                "counted like the worst of its kind"
            )
        kept.append(_guessed(analysis, shape))
    if not any(known.get(unit.name) is unit for unit in kept):
        raise CompressError(
            "no unit of the config has the shape it has in this model: analyze it instead"
        )
    return replace(analysis, units=tuple(kept)), odd


def _guessed(analysis: Analysis, shape: UnitShape) -> Unit:
    """A unit that nothing is known of: what the worst of its kind loses, else the worst of all."""
    kind = shape.name.rpartition(".")[2]
    alike = [unit for unit in analysis.units if unit.name.rpartition(".")[2] == kind]
    formats: dict[str, UnitFormat] = {}
    for fmt in analysis.units[0].formats:
        losses = [u.formats[fmt].kl for u in alike or analysis.units if fmt in u.formats]
        if losses and fmt in PACKED:
            size = sum(stored_bytes(part, fmt) for part in shape.shapes)
            formats[fmt] = UnitFormat(size, max(losses), None, max(losses))
    return Unit(shape.name, shape.layer, shape.tensors, shape.parameters, formats)


def plan_of(
    analysis: Analysis,
    spec: ModelSpec,
    formats: Mapping[str, str],
    *,
    preset: str,
    embed: str | None = None,
) -> Plan:
    """The plan of an allocation.

    Args:
        formats: by unit.
        preset: the name it is known by.
        embed: stores the look-up table in another format than the head; f16 keeps both.
    """
    units = unit_of(analysis)
    chosen: dict[str, Format] = {}
    for name, shape in spec.shapes():
        chosen[name] = "f32" if len(shape) == 1 else _format(formats[units[name]])
    if embed is not None and embed != chosen["embed"]:
        if spec.tied_head and embed == "f16":
            chosen["head"] = chosen["embed"]
        chosen["embed"] = _format(embed)
    plan = Plan(preset, chosen)
    plan.check(spec)
    return plan


def split_sequences(
    calibration: Calibration,
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """Sequences to fit to, and those held back to judge by: the analysis's own, else every eighth.

    Raises:
        CompressError: there are fewer than two.
    """
    rows = [np.asarray(ids, np.int32) for ids in calibration.sequences]
    held = [np.asarray(ids, np.int32) for ids in calibration.held_back]
    if rows and held:
        return rows, held
    rows += held
    if len(rows) < 2:
        raise CompressError(
            f"the config holds {len(rows)} calibration sequences, at least 2 are needed: one "
            "to fit to and one to judge by; analyze again with more text"
        )
    step = max(2, min(8, len(rows)))
    held = rows[step - 1 :: step]
    return [ids for at, ids in enumerate(rows) if at % step != step - 1], held


def polish(
    items: Sequence[Item],
    start: Point,
    measure: Callable[[Mapping[str, str]], float],
    *,
    swaps: int = 20,
    seconds: float = 120.0,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, int], None] | None = None,
) -> Polished:
    """Try the swaps that promise most, one unit a format up and another down at no more cost, and
    keep those that lower the true KL.

    Args:
        items: what was allocated from.
        start: the allocation.
        measure: true KL of an allocation: formats by unit.
        swaps: tried at most.
        seconds: after which no further one is tried.
        progress: called with (tried, at most).
    """
    began = clock()
    formats = dict(start.formats)
    before = best = measure(formats)
    cost = start.cost
    tried: list[Swap] = []
    for up, down in _swaps(items, formats):
        if len(tried) >= swaps or clock() - began > seconds:
            break
        changed = cost + up[3] + down[3]
        # An earlier swap may have moved one of the two.
        if formats[up[0]] != up[1] or formats[down[0]] != down[1] or changed > start.cost:
            continue
        candidate = {**formats, up[0]: up[2], down[0]: down[2]}
        kl = measure(candidate)
        kept = kl < best
        tried.append(Swap(f"{up[0]} {up[1]}->{up[2]}", f"{down[0]} {down[1]}->{down[2]}", kl, kept))
        if kept:
            formats, best, cost = candidate, kl, changed
        if progress is not None:
            progress(len(tried), swaps)
    return Polished(formats, best, before, cost, tried)


_Move = tuple[str, str, str, float]  # unit, format, format after, cost added


def _swaps(items: Sequence[Item], formats: Mapping[str, str]) -> list[tuple[_Move, _Move]]:
    """Pairs of moves that cost nothing together, those whose loss rises least first."""
    ups: list[tuple[float, _Move]] = []
    downs: list[tuple[float, _Move]] = []
    for item in items:
        offers = hull(item)
        at = next((i for i, c in enumerate(offers) if c.format == formats[item.name]), None)
        if at is None:
            continue
        here = offers[at]
        for near, into in ((at + 1, ups), (at - 1, downs)):
            if 0 <= near < len(offers):
                there = offers[near]
                move = (item.name, here.format, there.format, there.cost - here.cost)
                into.append((there.kl - here.kl, move))
    pairs = [
        (gain + loss, up, down)
        for gain, up in ups
        for loss, down in downs
        if up[0] != down[0] and up[3] + down[3] <= 0
    ]
    pairs.sort(key=lambda pair: pair[0])
    return [(up, down) for _, up, down in pairs]


def _format(name: str) -> Format:
    for fmt in (*PACKED, "f16"):
        if fmt == name:
            return fmt
    raise CompressError(f"there is no format {name[:20]!r}; choose one of {', '.join(PACKED)}, f16")
