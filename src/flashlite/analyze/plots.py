"""The plots of a report, as SVG text that takes its ink from the page around it.

Matplotlib draws with one colour that is no other's, and `currentColor` takes its place: text and
axes are then dark on a light page and light on a dark one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.analysis import Analysis
from flashlite.errors import MissingExtra

__all__ = [
    "greedy_curve",
    "heads_map",
    "layers_plot",
    "neurons_map",
    "pareto",
    "require_matplotlib",
    "sensitivity_map",
]

Doubles = NDArray[np.float64]
Point = tuple[int, float]  # bytes, nats

_INK = "#010203"
_LINE, _DOT = "#2a78d6", "#d1495b"  # readable on white and on black
_LEAST = 1e-9  # nats: what is drawn in the place of 0
_PARTS = ("qkv", "o", "gate_up", "down")


def require_matplotlib() -> Any:
    """The module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("a report with plots", "report") from None
    return matplotlib


def sensitivity_map(analysis: Analysis) -> str:
    """Layers x units, one panel per format, the loss on one logarithmic scale."""
    formats = list(analysis.units[0].formats)
    layers = 1 + max((u.layer for u in analysis.units if u.layer is not None), default=0)
    parts = [p for p in _PARTS if any(u.name.endswith(f".{p}") for u in analysis.units)]
    values = np.full((len(formats), layers, len(parts)), np.nan)
    for unit in analysis.units:
        part = unit.name.rpartition(".")[2]
        if unit.layer is None or part not in parts:
            continue
        for at, fmt in enumerate(formats):
            if fmt in unit.formats:
                kl = max(unit.formats[fmt].kl, _LEAST)
                values[at, unit.layer, parts.index(part)] = kl

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
        norm = _log_norm(values)
        for at, (axis, fmt) in enumerate(zip(axes, formats, strict=True)):
            mesh = axis.pcolormesh(values[at], norm=norm, cmap="viridis")
            axis.set_title(fmt)
            axis.set_xticks(np.arange(len(parts)) + 0.5, parts, rotation=60)
            axis.invert_yaxis() if at == 0 else None
        axes[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=list(axes), label="nats per token", fraction=0.04)

    return _svg(draw, (1.6 + 1.5 * len(formats), 2.0 + 0.13 * layers))


def greedy_curve(analysis: Analysis) -> list[Point]:
    """Bytes against loss from all units at their smallest to all at their best: at each step the
    upgrade that saves most loss per byte, along the convex hull of every unit.
    """
    steps: list[tuple[float, int, float]] = []
    size, kl = 0, 0.0
    for unit in analysis.units:
        hull = _hull([(entry.bytes, entry.kl) for entry in unit.formats.values()])
        size, kl = size + hull[0][0], kl + hull[0][1]
        for (b0, k0), (b1, k1) in pairwise(hull):
            steps.append(((k1 - k0) / (b1 - b0), b1 - b0, k1 - k0))
    curve = [(size, kl)]
    for _, grown, change in sorted(steps):
        size, kl = size + grown, max(0.0, kl + change)
        curve.append((size, kl))
    return curve


def pareto(analysis: Analysis) -> str:
    """Bytes against loss: formats chosen unit by unit, and one format throughout."""
    curve = greedy_curve(analysis)
    uniform = {
        fmt: (
            sum(u.formats[fmt].bytes for u in analysis.units),
            sum(u.formats[fmt].kl for u in analysis.units),
        )
        for fmt in analysis.units[0].formats
        if all(fmt in u.formats for u in analysis.units)
    }

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.plot(
            [b / 1e6 for b, _ in curve],
            [max(k, _LEAST) for _, k in curve],
            color=_LINE,
            linewidth=2,
            label="chosen unit by unit",
        )
        for at, (fmt, (size, kl)) in enumerate(uniform.items()):
            label = "one format throughout" if at == 0 else None
            axis.plot(size / 1e6, max(kl, _LEAST), "o", color=_DOT, label=label)
            axis.annotate(fmt, (size / 1e6, max(kl, _LEAST)), xytext=(6, 6),
                          textcoords="offset points", color=_INK)  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("weights, MB")
        axis.set_ylabel("sum of losses, nats per token")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, labelcolor=_INK)

    return _svg(draw, (7.0, 4.0))


def heads_map(analysis: Analysis) -> str:
    """Layers x heads: importance, and the share of attention on sink and window."""
    layers = 1 + max(head.layer for head in analysis.heads)
    count = 1 + max(head.head for head in analysis.heads)
    importance = np.full((layers, count), np.nan)
    mass = np.full((layers, count), np.nan)
    for head in analysis.heads:
        importance[head.layer, head.head] = max(head.importance, _LEAST)
        if head.sink_window_mass is not None:
            mass[head.layer, head.head] = head.sink_window_mass
    panels = [(importance, "importance, nats per token", _log_norm(importance))]
    if not np.isnan(mass).all():
        panels.append((mass, "attention on first 4 + last 256", None))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (values, title, norm) in zip(axes, panels, strict=True):
            mesh = axis.pcolormesh(values, cmap="viridis", norm=norm)
            axis.invert_yaxis()
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("head")
            axis.set_ylabel("layer")
            figure.colorbar(mesh, ax=axis, fraction=0.08)

    return _svg(draw, (2.5 + 3.5 * len(panels), 1.8 + 0.12 * layers))


def neurons_map(analysis: Analysis) -> str:
    """Layers x blocks of 32 neurons, least important first in each layer."""
    width = max(len(layer.blocks) for layer in analysis.neurons)
    values = np.full((len(analysis.neurons), width), np.nan)
    for at, layer in enumerate(analysis.neurons):
        values[at, : len(layer.blocks)] = np.sort(np.maximum(layer.blocks, _LEAST))

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        mesh = axis.pcolormesh(values, cmap="viridis", norm=_log_norm(values), rasterized=True)
        axis.invert_yaxis()
        axis.set_xlabel("blocks of 32 neurons, least important first")
        axis.set_ylabel("layer")
        figure.colorbar(mesh, ax=axis, label="nats per token", fraction=0.04)

    return _svg(draw, (7.0, 1.8 + 0.1 * len(values)))


def layers_plot(analysis: Analysis) -> str:
    """How much each layer turns the residual."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.bar(
            [layer.layer for layer in analysis.layers],
            [layer.redundancy for layer in analysis.layers],
            color=_LINE,
        )
        axis.set_xlabel("layer")
        axis.set_ylabel("1 - cosine")
        axis.grid(axis="y", alpha=0.25)

    return _svg(draw, (7.0, 2.4))


def _hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull, from the fewest bytes on, as far as losses fall."""
    hull: list[Point] = []
    for size, kl in sorted(points):
        if hull and kl >= hull[-1][1]:
            continue
        if hull and size == hull[-1][0]:
            hull.pop()
        while len(hull) > 1:
            (b0, k0), (b1, k1) = hull[-2:]
            if (k1 - k0) * (size - b1) < (kl - k1) * (b1 - b0):
                break
            hull.pop()
        hull.append((size, kl))
    return hull


def _log_norm(values: Doubles) -> Any:
    from matplotlib.colors import LogNorm

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    low = max(low, high * 1e-6)
    return LogNorm(low, high if high > low else 10 * low, clip=True)


def _svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    with _style():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return re.sub(_INK, "currentColor", text[text.index("<svg") :])


def _style() -> AbstractContextManager[None]:
    matplotlib = require_matplotlib()
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
           "ytick.color")  # fmt: skip
    context: AbstractContextManager[None] = matplotlib.rc_context(
        {
            **dict.fromkeys(ink, _INK),
            "svg.fonttype": "none",
            "svg.hashsalt": "flashlite",
            "font.family": "sans-serif",
            "font.size": 10,
        }
    )
    return context
