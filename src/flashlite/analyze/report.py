"""`write_report`: an analysis as one HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flashlite.analyze import plots
from flashlite.analyze.analysis import Analysis

__all__ = ["write_report"]

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1c1e; --page: #fff; --faint: #6b6b70;
  --line: #d8d8dc }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ececee; --page: #161618; --faint: #a0a0a6; --line: #3a3a3e }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
p.note {{ color: var(--faint); max-width: 46rem }}
svg {{ max-width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }}
th:first-child, td:first-child {{ text-align: left }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }}
dt {{ color: var(--faint) }} dd {{ margin: 0; overflow-wrap: anywhere }}
</style></head><body>
"""


def write_report(analysis: Analysis, path: Path) -> None:
    """Write the report under another name, then rename it into place.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(_html(analysis), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _html(analysis: Analysis) -> str:
    name = escape(analysis.model.name)
    parts = [_HEAD.format(title=f"{name}: analysis"), f"<h1>{name}</h1>", _summary(analysis)]
    parts += _section(
        "Sensitivity",
        "Loss when one unit alone is stored in a format: KL divergence from the source in "
        "float32, nats per token. Exact where it was run, else predicted and scaled.",
        plots.sensitivity_map(analysis),
    )
    parts += _section(
        "Size against loss",
        "The least sum of single losses at each size, and one format throughout. The sum is what "
        "a choice is made by; the true loss of the whole is measured after quantization.",
        plots.pareto(analysis),
    )
    if analysis.embedding:
        parts += _section("Table of tokens", _EMBEDDING, _embedding(analysis))
    if analysis.heads:
        parts += _section("Heads", _HEADS, plots.heads_map(analysis) + _heads(analysis))
    if analysis.neurons:
        parts += _section("Neurons", "Loss when a block is left out.", plots.neurons_map(analysis))
    if analysis.layers:
        parts += _section(
            "Layers",
            "How far each layer turns the residual: a layer near 0 adds little that is new.",
            plots.layers_plot(analysis),
        )
    parts += _section("All units", "Exact losses are marked *.", _units(analysis))
    return "\n".join([*parts, "</body></html>", ""])


_EMBEDDING = (
    "Exact loss with the table of tokens alone in a format: as look-up and head together, each by "
    "itself, and together with each row divided by its largest weight before."
)
_HEADS = (
    "Importance is the loss to expect when a head is left out; the table holds the heads with the "
    "least, and their exact loss with the mean of their output in their place."
)


def _summary(analysis: Analysis) -> str:
    proxy, text = analysis.proxy, analysis.calibration
    rows = [
        ("model", f"{analysis.model.family}, {analysis.model.parameters:,} parameters"),
        ("digest", analysis.model.digest),
        (
            "calibration",
            f"{'written by the model' if text.source == 'model' else text.source}, "
            f"{sum(map(len, text.sequences)):,} tokens for statistics, "
            f"{sum(map(len, text.held_back)):,} held back, seed {text.seed}",
        ),
    ]
    if proxy is not None:
        how = "with gradients" if proxy.gradients else "without gradients"
        rank = "too few units" if proxy.spearman is None else f"{proxy.spearman:.3f}"
        rows.append(("prediction", f"{how}; rank correlation with exact losses {rank}"))
        for fmt, ratio in proxy.additivity.items():
            rows.append((f"all in {fmt}", f"{ratio:.2f} of the sum of single losses"))
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
    return f"<dl>{lines}</dl>"


def _section(title: str, note: str, content: str) -> list[str]:
    return [
        f"<h2>{title}</h2>",
        f'<p class="note">{note}</p>',
        f'<div class="wide">{content}</div>',
    ]


def _embedding(analysis: Analysis) -> str:
    rows = [
        [fmt, *(_nats(x) for x in (loss.both, loss.lookup, loss.head, loss.normalised))]
        for fmt, loss in (analysis.embedding or {}).items()
    ]
    return _table(["format", "both", "look-up alone", "head alone", "rows of one size"], rows)


def _heads(analysis: Analysis) -> str:
    least = sorted(analysis.heads, key=lambda head: head.importance)[:12]
    rows = [
        [
            f"layer {head.layer}, head {head.head}",
            _nats(head.importance),
            _nats(head.exact_kl),
            "" if head.sink_window_mass is None else f"{head.sink_window_mass:.3f}",
        ]
        for head in least
    ]
    return _table(["least important", "importance", "exact loss", "sink + window"], rows)


def _units(analysis: Analysis) -> str:
    formats = list(analysis.units[0].formats)
    rows = []
    for unit in analysis.units:
        cells = [unit.name, f"{unit.parameters:,}"]
        for fmt in formats:
            entry = unit.formats.get(fmt)
            mark = "" if entry is None or entry.exact_kl is None else "*"
            cells.append("" if entry is None else _nats(entry.kl) + mark)
        rows.append(cells)
    return _table(["unit", "weights", *formats], rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
