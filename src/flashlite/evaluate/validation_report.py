"""One page that shows a `Validation`: opens without a network, readable in light and in dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from flashlite.evaluate.statistics import Mean
from flashlite.evaluate.validation import Validation

__all__ = ["render_validation", "table_rows"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--paper:#fff;--line:#d7dee6;--bar:#2f6fb0;
--soft:#6a7686}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ef;--paper:#14191f;--line:#35404c;--bar:#6aa9e6;
--soft:#93a1b1}}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;
color:var(--ink);background:var(--paper)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
.big{display:flex;gap:2rem;flex-wrap:wrap;margin:1rem 0}.big b{display:block;font-size:1.7rem}
.big span,p.note{color:var(--soft)}svg text{fill:var(--ink);font:13px system-ui,sans-serif}
svg rect{fill:var(--bar)}svg line{stroke:var(--ink)}
"""


def render_validation(found: Validation, name: str, source: str, verdicts: Sequence[str]) -> str:
    """The page.

    Args:
        found: what was measured.
        name: of the artifact.
        source: what it was compared with.
        verdicts: a line per threshold, saying whether it holds.
    """
    big = [
        ("KL divergence", f"{found.kl:.4f} nats"),
        ("same likeliest token", f"{100 * found.top1:.2f} %"),
        ("perplexity", f"x {found.perplexity_ratio:.4f}"),
    ]
    if found.language_ratio is not None:
        big.append(("worst language / English", f"{found.language_ratio:.2f}"))
    if found.flips is not None:
        big.append(("answers that changed", f"{100 * found.flips:.2f} %"))
    figures = "".join(f"<div><span>{_(what)}</span><b>{_(value)}</b></div>" for what, value in big)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{_(name)}: validation</title><style>{_STYLE}</style>",
        f"<h1>{_(name)}</h1><p>against {_(source)} in FP32; suite {_(found.suite)}, "
        f"{_(found.size)}, seed {found.seed}</p><div class=big>{figures}</div>",
    ]
    if verdicts:
        parts.append("<ul>" + "".join(f"<li>{_(line)}</li>" for line in verdicts) + "</ul>")
    if found.absent:
        sets = ", ".join(found.absent)
        parts.append(f"<p class=note>Not measured, since FLASHLITE_DATA has it not: {_(sets)}.</p>")
    if found.languages:
        bars = {language: result.kl for language, result in found.languages.items()}
        parts.append("<h2>KL divergence by language</h2>" + _bars(bars))
    for title, (headers, rows) in table_rows(found).items():
        parts.append(f"<h2>{_(title)}</h2>" + _table(headers, rows))
    parts.append(
        "<p class=note>Lines and brackets are 95 % intervals: chunks of 64 tokens, or questions, "
        "drawn again 2,000 times. KL is of the compressed model from the source, over the whole "
        "vocabulary, mean over tokens.</p></html>"
    )
    return "\n".join(parts) + "\n"


def table_rows(found: Validation) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """The tables of a validation: headers and rows by title."""
    tables: dict[str, tuple[Sequence[str], list[list[str]]]] = {}
    headers = ("", "tokens", "KL, nats", "99 % KL", "same top-1 %", "perplexity", "of the source")
    for title, results in (("Texts", found.texts), ("Languages", found.languages)):
        if results:
            tables[title] = (
                headers,
                [
                    [
                        name,
                        f"{r.tokens:,}",
                        _mean(r.kl, 4),
                        f"{r.kl_99:.4f}",
                        _mean(r.top1, 2, 100),
                        f"{r.model_perplexity:.2f}",
                        f"{r.source_perplexity:.2f}",
                    ]
                    for name, r in results.items()
                ],
            )
    if found.choices:
        tables["Choices"] = (
            ("", "questions", "accuracy %", "of the source %", "chance %", "changed %"),
            [
                [
                    name,
                    f"{c.questions:,}",
                    _mean(c.model_accuracy, 1, 100),
                    _mean(c.source_accuracy, 1, 100),
                    f"{100 * c.chance:.1f}",
                    _mean(c.flips, 1, 100),
                ]
                for name, c in found.choices.items()
            ],
        )
    if found.generations:
        tables["Generated text"] = (
            ("", "temperature", "prompts", "ended %", "looping %", "valid JSON %"),
            [
                [
                    name,
                    f"{g.temperature:g}",
                    str(g.prompts),
                    f"{100 * g.ended:.0f}",
                    f"{100 * g.looping:.0f}",
                    "-" if g.json_valid is None else f"{100 * g.json_valid:.0f}",
                ]
                for name, several in found.generations.items()
                for g in several
            ],
        )
    return tables


def _mean(mean: Mean, digits: int, scale: float = 1) -> str:
    value, low, high = (f"{scale * x:.{digits}f}" for x in (mean.value, mean.low, mean.high))
    return f"{value} [{low}, {high}]"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_(cell)}</th>" for cell in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{_(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _bars(bars: Mapping[str, Mean]) -> str:
    """Horizontal bars with their intervals."""
    top, height = max(mean.high for mean in bars.values()) or 1.0, 24
    lines = [
        f"<svg viewBox='0 0 700 {height * len(bars) + 8}' role=img "
        "aria-label='KL divergence by language'>"
    ]
    for i, (name, mean) in enumerate(bars.items()):
        y = i * height + 4
        length, low, high = (560 * x / top for x in (mean.value, mean.low, mean.high))
        lines.append(
            f"<text x=36 y={y + 14} text-anchor=end>{_(name)}</text>"
            f"<rect x=44 y={y + 2} width={length:.1f} height=15 rx=2 />"
            f"<line x1={44 + low:.1f} x2={44 + high:.1f} y1={y + 9} y2={y + 9} />"
            f"<text x={50 + max(length, high):.1f} y={y + 14}>{mean.value:.4f}</text>"
        )
    return "".join(lines) + "</svg>"


_ = html.escape
