"""The curves of docs/: cost against context length, throughput against concurrency, loss against
size.

    python benchmarks/table.py --run depth concurrency curve
    python benchmarks/plot.py

Reads benchmarks/results/depth.json, concurrency.json and curve.json and writes docs/context.png,
docs/concurrency.png and docs/loss.png. Needs matplotlib: pip install 'flashlite[bench]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

import common
from common import OURS, RESULTS, ROOT

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_concurrency", "draw_context", "draw_loss", "main"]

# Colours that stay apart for the colour-blind (Okabe and Ito); marks, so that grey print does too.
STYLES = {OURS: ("#D55E00", "o"), "llama.cpp": ("#0072B2", "s"), "openvino": ("#009E73", "^")}
LABELS = {"openvino": "OpenVINO"}


def draw_context(data: Mapping[str, Any]) -> Figure:
    """Prefill and decoding, tokens/s against tokens of context."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for axis, kind, title in zip(
        axes, ("prefill", "decode"), ("Prefill of a prompt", "Decoding after it"), strict=True
    ):
        _draw(axis, data["curves"][kind], "tokens")
        axis.set(title=title, xlabel="context (tokens)", ylabel="tokens per second")
    figure.suptitle("SmolLM2-135M, the same Q4_1 weights: speed against context length")
    return _finished(figure, axes[1], data)


def draw_concurrency(data: Mapping[str, Any]) -> Figure:
    """Tokens/s of all sequences against how many decode together."""
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    _draw(axis, data["curves"], "together")
    axis.set(xlabel="sequences decoding together", ylabel="tokens per second, all sequences")
    axis.set_title("SmolLM2-135M, the same Q4_1 weights: throughput against concurrency")
    return _finished(figure, axis, data)


def draw_loss(data: Mapping[str, Any]) -> Figure:
    """KL divergence against bits per weight of the body."""
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for name, curve in data["curves"].items():
        colour, mark = STYLES.get(name, ("#555555", {"edges": "v"}.get(name, "x")))
        # A format on the source's own grid loses nothing, which no logarithm shows.
        points = [(x, y) for x, y in zip(curve["bits"], curve["kl"], strict=True) if y > 0]
        width = 2.4 if name == OURS else 1.2
        axis.plot(*zip(*points, strict=True), color=colour, marker=mark, lw=width, label=name)
    axis.set_yscale("log")
    axis.set(xlabel="bits per weight of the layers", ylabel="KL divergence (nats per token)")
    axis.set_title(f"{data['model']}: what quantization loses, wikitext-2 valid")
    axis.grid(visible=True, color="#dddddd", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    return _finished(figure, axis, data)


def _draw(axis: Axes, curves: Mapping[str, Mapping[str, Sequence[float]]], x: str) -> None:
    for name, curve in curves.items():
        colour, mark = STYLES.get(name, ("#555555", "x"))
        width = 2.4 if name == OURS else 1.6
        axis.plot(
            curve[x],
            curve["tok_s"],
            color=colour,
            marker=mark,
            linewidth=width,
            label=LABELS.get(name, name),
        )
    ticks = sorted({place for curve in curves.values() for place in curve[x]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{place:,.0f}" for place in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.grid(visible=True, color="#dddddd", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def _finished(figure: Figure, legend_on: Axes, data: Mapping[str, Any]) -> Figure:
    legend_on.legend(frameon=False)
    caption = f"{common.describe(data)}; median of {data['rounds']} rounds"
    figure.supxlabel(caption, fontsize=7.5, color="#555555")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="[default: %(default)s]")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="[default: %(default)s]")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    drawings = {
        "context": ("depth", draw_context),
        "concurrency": ("concurrency", draw_concurrency),
        "loss": ("curve", draw_loss),
    }
    for name, (benchmark, draw) in drawings.items():
        source = options.results / f"{benchmark}.json"
        if not source.is_file():
            raise SystemExit(f"{source} is not there; python benchmarks/table.py --run {benchmark}")
        figure = draw(json.loads(source.read_text(encoding="utf-8")))
        figure.savefig(options.out / f"{name}.png", dpi=150, metadata={"Software": None})
        plt.close(figure)
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
