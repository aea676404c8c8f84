"""`flashlite analyze`: what each part of a model loses in each format, and what can go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options, output
from flashlite.errors import UsageError
from flashlite.runtime.memory import format_size, parse_size

if TYPE_CHECKING:
    from flashlite.analyze.analysis import Analysis

__all__ = ["command"]

_LEAST = 1 << 29  # of --max-mem


@click.command()
@click.argument("model", required=False)
@click.option("--model", "named", metavar="MODEL", help="The same as the argument.")
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("sensitive_layers.json"),
    show_default=True,
    help="Where the result goes.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a report to look at, an HTML file that needs no network.",
)
@click.option(
    "--calibration",
    "text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text, or chats as JSON lines, to measure on.  [default: the model writes it]",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True,
              help="Of the calibration and of drawn labels.")  # fmt: skip
@click.option(
    "--tokens",
    type=click.IntRange(64, 1 << 20),
    default=1 << 15,
    show_default=True,
    help="Tokens that statistics are taken on.",
)
@click.option("--formats", metavar="LIST", help="Formats to measure.  [default: all]")
@click.option(
    "--exact",
    metavar="LIST",
    help="Formats whose loss is run, not only predicted.  [default: the two smallest]",
)
@click.option("--no-gradients", is_flag=True, help="Predict without gradients, as without torch.")
@options.like_option
@click.option("--max-mem", metavar="SIZE", default="4GB", show_default=True,
              help="Keep within 2GB, 1.5GiB, 500MB ...")  # fmt: skip
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Go on where an interrupted run ended, or start anew.",
)
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@click.option("--accept-license", is_flag=True, help="For models whose licence asks for it.")
@output.json_option
def command(
    model: str | None,
    named: str | None,
    path: Path,
    report: Path | None,
    text: Path | None,
    seed: int,
    tokens: int,
    formats: str | None,
    exact: str | None,
    no_gradients: bool,
    like: str | None,
    max_mem: str,
    resume: bool,
    offline: bool,
    accept_license: bool,
    as_json: bool,
) -> None:
    """Measure what each part of MODEL loses in each format, and what could be left out.

    The result is read by `flashlite quantize --config`. An interrupted run goes on where it
    ended.

    \b
    Examples:
      flashlite analyze smollm2-135m-instruct --report analysis.html
      flashlite analyze --model base_fp32.h5 --calibration chats.jsonl
    """
    from flashlite.runtime.process import limit_data

    if (model is None) == (named is None):
        raise UsageError("name one model: `flashlite analyze MODEL`, or --model MODEL")
    ceiling = parse_size(max_mem)
    if ceiling < _LEAST:
        raise UsageError(f"--max-mem is {max_mem}, an analysis needs {format_size(_LEAST)} or more")
    for target in (path, report):
        if target is not None and not target.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {target.parent} to write {target.name} into")
    if report is not None:
        from flashlite.analyze.plots import require_matplotlib

        require_matplotlib()  # before the work, not after it
    with options.stages() as progress, limit_data(ceiling):
        from flashlite.cli.analyzing import analyze_model

        analysis, state = analyze_model(
            str(model or named), path, text, like=like,
            seed=seed, tokens=tokens, formats=formats, exact=exact, gradients=not no_gradients,
            memory=ceiling, fresh=not resume, offline=offline, accept_license=accept_license,
            progress=progress,
        )  # fmt: skip
        from flashlite.analyze.analysis import write_analysis

        write_analysis(analysis, path)
        if report is not None:
            from flashlite.analyze.report import write_report

            write_report(analysis, report)
        state.remove()
    figures = {
        "analysis": str(path),
        "report": None if report is None else str(report),
        **_figures(analysis),
        "peak_memory_bytes": options.peak_memory(),
    }
    if as_json:
        output.emit(figures)
    else:
        _show(analysis, path, report)


def _figures(analysis: Analysis) -> dict[str, Any]:
    proxy = analysis.proxy
    measured = (
        {}
        if proxy is None
        else {
            "gradients": proxy.gradients,
            "spearman": proxy.spearman,
            "spearman_by_format": dict(proxy.by_format),
            "scale": proxy.scale,
            "additivity": dict(proxy.additivity),
        }
    )
    return {
        "model": analysis.model.name,
        "digest": analysis.model.digest,
        "units": len(analysis.units),
        "calibration_tokens": sum(map(len, analysis.calibration.sequences)),
        "held_back_tokens": sum(map(len, analysis.calibration.held_back)),
        **measured,
    }


def _show(analysis: Analysis, path: Path, report: Path | None) -> None:
    formats = list(analysis.units[0].formats)
    least = min(formats, key=lambda fmt: analysis.units[0].formats[fmt].bytes)
    worst = sorted(analysis.units, key=lambda unit: -unit.formats[least].kl)
    rows = [
        (unit.name, output.count(unit.parameters), *(f"{unit.formats[f].kl:.5f}" for f in formats))
        for unit in worst[:10]
    ]
    click.echo(f"loss in nats per token, the 10 most sensitive of {len(analysis.units)} units:")
    click.echo(output.table(rows, ("unit", "weights", *formats)))
    proxy = analysis.proxy
    if proxy is not None and proxy.spearman is not None:
        how = "gradients" if proxy.gradients else "no gradients"
        click.echo(f"predicted against exact losses: Spearman {proxy.spearman:.3f} ({how})")
        if proxy.spearman < _TRUSTED:
            output.note(
                f"below {_TRUSTED}: trust exact losses only; measure more with --exact or --tokens"
            )
    for fmt, ratio in (proxy.additivity if proxy is not None else {}).items():
        click.echo(f"all units in {fmt}: {ratio:.2f} of the sum of the single losses")
    click.echo(f"{path}" + ("" if report is None else f", {report}"))


_TRUSTED = 0.8  # least rank correlation of a prediction to be believed
