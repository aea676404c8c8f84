"""Plots of a validation as inline SVG; their colours are classes of the page's style."""

from __future__ import annotations

import html
from collections.abc import Mapping

from flashlite.evaluate.statistics import Mean

__all__ = ["bars", "columns", "pairs"]

_WIDTH, _LEFT, _ROW = 760, 130, 24
_SPAN = _WIDTH - _LEFT - 80  # of the longest bar; what is left writes its figure


def bars(title: str, values: Mapping[str, Mean], mark: float | None = None, name: str = "") -> str:
    """Horizontal bars with their intervals; `mark` draws a line down at a value."""
    top = max(max(mean.high for mean in values.values()), mark or 0) or 1.0
    bottom = _ROW * len(values) + 4
    lines = [_open(title, bottom + (18 if mark is not None else 4))]
    if mark is not None:
        x = _LEFT + _SPAN * mark / top
        lines.append(
            f"<line class=grid x1={x:.1f} x2={x:.1f} y1=0 y2={bottom} />"
            f"<text class=soft x={x:.1f} y={bottom + 14} text-anchor=middle>{_(name)}</text>"
        )
    for i, (label, mean) in enumerate(values.items()):
        y = i * _ROW + 4
        length, low, high = (max(0.0, _SPAN * x / top) for x in (mean.value, mean.low, mean.high))
        lines.append(
            f"<text x={_LEFT - 8} y={y + 14} text-anchor=end>{_(label)}</text>"
            f"<rect x={_LEFT} y={y + 2} width={length:.1f} height=15 rx=2 />"
            f"<line x1={_LEFT + low:.1f} x2={_LEFT + high:.1f} y1={y + 9.5} y2={y + 9.5} />"
            f"<text x={_LEFT + 6 + max(length, high):.1f} y={y + 14}>{mean.value:.4f}</text>"
        )
    return "".join(lines) + "</svg>"


def columns(title: str, shares: Mapping[str, float]) -> str:
    """Upright columns of shares, each with its percentage."""
    height, width = 120, _WIDTH / len(shares)
    top = max(shares.values()) or 1.0
    lines = [_open(title, height + 44)]
    for i, (label, share) in enumerate(shares.items()):
        x, tall = (i + 0.5) * width, height * share / top
        lines.append(
            f"<rect x={x - 0.35 * width:.1f} y={20 + height - tall:.1f} width={0.7 * width:.1f} "
            f"height={tall:.1f} rx=2 />"
            f"<text x={x:.1f} y={14 + height - tall:.1f} text-anchor=middle>{100 * share:.1f} %"
            f"</text><text class=soft x={x:.1f} y={height + 38} text-anchor=middle>{_(label)}"
            "</text>"
        )
    return "".join(lines) + "</svg>"


def pairs(title: str, values: Mapping[str, tuple[Mean, Mean]]) -> str:
    """Two shares a row, 0 to 100 %: the first a ring, the second a dot with its interval."""
    bottom = _ROW * len(values) + 4
    lines = [_open(title, bottom + 20)]
    for percent in range(0, 101, 25):
        x = _LEFT + _SPAN * percent / 100
        lines.append(
            f"<line class=grid x1={x:.1f} x2={x:.1f} y1=0 y2={bottom} />"
            f"<text class=soft x={x:.1f} y={bottom + 15} text-anchor=middle>{percent} %</text>"
        )
    for i, (label, (first, second)) in enumerate(values.items()):
        y = i * _ROW + 14
        low, high, there, here = (
            _LEFT + _SPAN * x for x in (second.low, second.high, first.value, second.value)
        )
        lines.append(
            f"<text x={_LEFT - 8} y={y + 4} text-anchor=end>{_(label)}</text>"
            f"<line x1={low:.1f} x2={high:.1f} y1={y} y2={y} />"
            f"<circle class=ring cx={there:.1f} cy={y} r=7 />"
            f"<circle class=dot cx={here:.1f} cy={y} r=4.5 />"
        )
    return "".join(lines) + "</svg>"


def _open(title: str, height: float) -> str:
    return (
        f"<svg viewBox='0 0 {_WIDTH} {height:.0f}' width={_WIDTH} height={height:.0f} role=img "
        f"aria-label='{_(title)}'><title>{_(title)}</title>"
    )


_ = html.escape
