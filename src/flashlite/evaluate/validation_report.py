"""One page that shows a `Validation`: opens without a network, readable in light and in dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from flashlite.evaluate.choices import ChoiceResult
from flashlite.evaluate.statistics import Mean
from flashlite.evaluate.validation import DECADES, TextResult, Validation
from flashlite.evaluate.validation_plots import bars, columns, pairs

__all__ = ["render_validation", "table_rows"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--paper:#fff;--line:#d7dee6;--bar:#2f6fb0;
--soft:#6a7686;--good:#1f7a46;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ef;--paper:#14191f;--line:#35404c;--bar:#6aa9e6;
--soft:#93a1b1;--good:#62c08a;--bad:#f28b82}}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;
color:var(--ink);background:var(--paper)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.big{display:flex;gap:1rem 2rem;flex-wrap:wrap;margin:1rem 0}.big b{display:block;font-size:1.6rem}
.big span,.big small,p.note{color:var(--soft)}.big small{display:block}
li.kept::marker{content:"\\2713  ";color:var(--good)}
li.missed::marker{content:"\\2717  ";color:var(--bad)}li.missed{color:var(--bad)}
svg{max-width:100%;height:auto;display:block}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}
svg .soft{fill:var(--soft)}svg rect,svg .dot{fill:var(--bar)}svg line{stroke:var(--ink)}
svg .ring{fill:var(--paper);stroke:var(--soft);stroke-width:2}svg .grid{stroke:var(--line)}
"""


def render_validation(
    found: Validation, name: str, source: str, verdicts: Mapping[str, bool]
) -> str:
    """The page.

    Args:
        found: what was measured.
        name: of the artifact.
        source: what it was compared with.
        verdicts: a line per threshold, and whether it holds.
    """
    figures = "".join(
        f"<div><span>{_(what)}</span><b>{_(value)}</b><small>{_(interval)}</small></div>"
        for what, value, interval in _figures(found)
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{_(name)}: validation</title><style>{_STYLE}</style>",
        f"<h1>{_(name)}</h1><p>against {_(source)} in FP32; suite {_(found.suite)}, "
        f"{_(found.size)}, seed {found.seed}; {found.total.tokens:,} tokens</p>"
        f"<div class=big>{figures}</div>",
    ]
    if verdicts:
        lines = "".join(
            f"<li class={'kept' if kept else 'missed'}>{_(line)}</li>"
            for line, kept in verdicts.items()
        )
        parts.append(f"<h2>Limits</h2><ul>{lines}</ul>")
    if found.absent:
        sets = ", ".join(found.absent)
        parts.append(f"<p class=note>Not measured, since FLASHLITE_DATA has it not: {_(sets)}.</p>")
    tables = {title: _table(*table) for title, table in table_rows(found).items()}
    parts.append("<h2>Texts</h2>" + tables["Texts"])
    if len(found.texts) > 1:
        parts.append(bars("KL divergence by text", _kl(found.texts)))
    parts.append("<h2>Tokens by what they lost</h2>")
    parts.append(columns("share of tokens by KL divergence, nats", _shares(found.decades)))
    if found.languages:
        english = found.languages["en"].kl.value if "en" in found.languages else None
        parts.append("<h2>Languages</h2>" + tables["Languages"])
        parts.append(bars("KL divergence by language", _kl(found.languages), english, "English"))
    if found.choices:
        rows = {n: (c.source_accuracy, c.model_accuracy) for n, c in found.choices.items()}
        parts.append("<h2>Choices</h2>" + tables["Choices"])
        parts.append(pairs("accuracy, the source's as a ring", rows))
    if found.generations:
        parts.append("<h2>Generated text</h2>" + tables["Generated text"])
        parts.append(
            "<p class=note>Of the compressed model alone, 64 tokens at most. Looping: 8 tokens in "
            "a row came 4 times. Repeated: share of stretches of 4 tokens that had come before. "
            "Small models loop in full precision too.</p>"
        )
    parts.append(
        "<p class=note>Brackets, lines over bars and whiskers are 95 % intervals: chunks of 64 "
        "tokens, or questions, drawn again 2,000 times; differences from the source are paired. KL "
        "is of the compressed model from the source, over the whole vocabulary, mean over tokens. "
        "Differences within their intervals mean nothing.</p></html>"
    )
    return "\n".join(parts) + "\n"


def table_rows(found: Validation) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """The tables of a validation: headers and rows by title."""
    tables: dict[str, tuple[Sequence[str], list[list[str]]]] = {}
    headers = (
        "",
        "tokens",
        "KL, nats",
        "99 % KL",
        "same top-1 %",
        "perplexity",
        "of the source",
        "ln ratio",
    )
    texts = dict(found.texts) | ({"all": found.total} if len(found.texts) > 1 else {})
    for title, results in (("Texts", texts), ("Languages", found.languages)):
        if results:
            tables[title] = (headers, [_text_row(name, r) for name, r in results.items()])
    if found.choices:
        choices = dict(found.choices)
        if found.questions is not None and len(choices) > 1:
            choices["all"] = found.questions
        tables["Choices"] = (
            (
                "",
                "questions",
                "accuracy %",
                "of the source %",
                "difference",
                "chance %",
                "changed %",
            ),
            [_choice_row(name, c) for name, c in choices.items()],
        )
    if found.generations:
        tables["Generated text"] = (
            ("", "temperature", "prompts", "ended %", "looping %", "repeated %", "valid JSON %"),
            [
                [
                    name,
                    f"{g.temperature:g}",
                    str(g.prompts),
                    f"{100 * g.ended:.0f}",
                    f"{100 * g.looping:.0f}",
                    f"{100 * g.repetition:.1f}",
                    "-" if g.json_valid is None else f"{100 * g.json_valid:.0f}",
                ]
                for name, several in found.generations.items()
                for g in several
            ],
        )
    return tables


def _figures(found: Validation) -> list[tuple[str, str, str]]:
    """What is said first: a name, a figure, its interval."""
    total = found.total
    big = [
        ("KL divergence", f"{found.kl:.4f} nats", _interval(total.kl, 4)),
        ("same likeliest token", f"{100 * found.top1:.2f} %", _interval(total.top1, 2, 100)),
        (
            "perplexity",
            f"x {found.perplexity_ratio:.4f}",
            f"ln {total.log_ratio.value:+.4f} {_interval(total.log_ratio, 4)}",
        ),
    ]
    if found.language_ratio is not None:
        value = f"{found.language_ratio:.2f}"
        big.append(("worst language / English", value, str(found.worst_language)))
    if found.questions is not None:
        flips, change = found.questions.flips, found.questions.difference
        big.append(("answers that changed", f"{100 * flips.value:.2f} %", _interval(flips, 2, 100)))
        points = f"{100 * change.value:+.2f} points"
        big.append(("accuracy", points, _interval(change, 2, 100)))
    return big


def _text_row(name: str, r: TextResult) -> list[str]:
    return [
        name,
        f"{r.tokens:,}",
        _mean(r.kl, 4),
        f"{r.kl_99:.4f}",
        _mean(r.top1, 2, 100),
        f"{r.model_perplexity:.2f}",
        f"{r.source_perplexity:.2f}",
        _mean(r.log_ratio, 4),
    ]


def _choice_row(name: str, c: ChoiceResult) -> list[str]:
    return [
        name,
        f"{c.questions:,}",
        _mean(c.model_accuracy, 1, 100),
        _mean(c.source_accuracy, 1, 100),
        _mean(c.difference, 1, 100),
        f"{100 * c.chance:.1f}",
        _mean(c.flips, 1, 100),
    ]


def _kl(results: Mapping[str, TextResult]) -> dict[str, Mean]:
    return {name: result.kl for name, result in results.items()}


def _shares(decades: Sequence[float]) -> dict[str, float]:
    names = [f"{nats:g}" for nats in DECADES]
    labels = [f"< {names[0]}", *(f"{a} .." for a in names[:-1]), f"{names[-1]} and more"]
    return dict(zip(labels, decades, strict=True))


def _interval(mean: Mean, digits: int, scale: float = 1) -> str:
    return f"[{scale * mean.low:.{digits}f}, {scale * mean.high:.{digits}f}]"


def _mean(mean: Mean, digits: int, scale: float = 1) -> str:
    return f"{scale * mean.value:.{digits}f} {_interval(mean, digits, scale)}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_(cell)}</th>" for cell in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{_(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


_ = html.escape
