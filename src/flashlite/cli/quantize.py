"""`flashlite quantize`: a checkpoint into an artifact, by a preset or to a budget."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashlite.cli import options, output
from flashlite.cli.budget import PRESETS, Budget, Request, Result, make, read_config
from flashlite.errors import UsageError
from flashlite.runtime.memory import format_size, parse_size

if TYPE_CHECKING:
    from flashlite.compress.plan import Plan
    from flashlite.model.spec import ModelSpec

__all__ = ["command"]

_DEPTH = 512  # tokens before the one that --target-latency is about
CONFIG = "sensitive_layers.json"
_FIXED = ("import", "hybrid", "lossless", "q8", "q6", "q5", "q4")
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(us|ms|s)", re.ASCII)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@click.command()
@click.argument("model", required=False)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="What `flashlite analyze` wrote: formats are chosen by it.",
)
@click.option("--model", "new", metavar="MODEL", help="Apply the config's plan to another model.")
@click.option(
    "--preset",
    type=click.Choice([*_FIXED, *PRESETS]),
    help="balanced, small: the smallest within a KL of 0.05, 0.2 (with --config); lossless: INT8 "
    "and an exact head; hybrid: FP16 embeddings, INT8 layers; import: the source's own grids.  "
    "[default: balanced with --config, else import]",
)
@click.option("--target-size", metavar="SIZE", help="Bytes of the artifact on disk: 90MB.")
@click.option("--target-ram", metavar="SIZE", help="Bytes of the running process, KV included.")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens that --target-ram and --target-latency count."
)
@click.option("--target-latency", metavar="TIME", help="Time of one decoded token: 5ms.")
@click.option(
    "--machine",
    type=click.Path(path_type=Path),
    help="What `flashlite profile --machine -o FILE` measured; --target-latency needs it.",
)
@click.option("--threads", type=click.IntRange(1), help="That --target-latency is for.")
@click.option("--max-kl", type=click.FloatRange(0, min_open=True), help="Most nats per token.")
@click.option("--curve", is_flag=True, help="Print bytes against predicted KL, make nothing.")
@click.option("--embed", metavar="FORMAT", help="Store the embeddings as f16, q8 ...")
@click.option(
    "--normalize-embeddings",
    is_flag=True,
    help="Scale the table to where half-precision scales are exact; the model stays the same.",
)
@click.option(
    "--split-head",
    type=click.Choice(["auto", "off", "on"]),
    default="auto",
    show_default=True,
    help="Screen the vocabulary with a small table, where it pays; on: or fail.",
)
@click.option("-o", "--output", "directory", type=click.Path(path_type=Path), help="NAME.fl")
@click.option("--force", is_flag=True, help="Replace an artifact that is there.")
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@click.option("--accept-license", is_flag=True, help="For models whose licence asks for it.")
@click.option("--max-mem", metavar="SIZE", help="Fail beyond 2GB, 1.5GiB, 500MB ...")
@options.like_option
@output.json_option
def command(
    model: str | None,
    config: Path | None,
    new: str | None,
    preset: str | None,
    target_size: str | None,
    target_ram: str | None,
    context: int | None,
    target_latency: str | None,
    machine: Path | None,
    threads: int | None,
    max_kl: float | None,
    curve: bool,
    embed: str | None,
    normalize_embeddings: bool,
    split_head: str,
    directory: Path | None,
    force: bool,
    offline: bool,
    accept_license: bool,
    max_mem: str | None,
    like: str | None,
    as_json: bool,
) -> None:
    """Quantize MODEL into an artifact, a directory NAME.fl.

    MODEL is a known name, hf:ORG/NAME, or the path of a GGUF file, a safetensors folder or an HDF5
    file.

    With --config the model is the one that was analyzed, and each part of it gets the format that
    its sensitivity and the budget call for.

    \b
    Examples:
      flashlite quantize smollm2-135m-instruct
      flashlite quantize ./model.gguf --preset q4 -o model-q4.fl
      flashlite quantize ./weights.h5 --like smollm2-135m-instruct -o weights.fl
      flashlite quantize --config sensitive_layers.json
      flashlite quantize --config sensitive_layers.json --target-size 90MB
      flashlite quantize --config sensitive_layers.json --target-latency 5ms --machine machine.json
    """
    from flashlite.runtime.process import limit_data

    budget = Budget(
        None if target_size is None else parse_size(target_size),
        None if target_ram is None else parse_size(target_ram),
        None if target_latency is None else _parse_time(target_latency),
        max_kl,
    )
    ceiling = None if max_mem is None else parse_size(max_mem)
    if config is None:
        _refuse_without_config(budget, preset, new, curve, embed, normalize_embeddings)
        if model is None:
            raise UsageError(f"name a model, or give --config {CONFIG}")
        with limit_data(ceiling):
            _by_preset(
                model, preset or "import", split_head, directory, force, offline, accept_license,
                like, as_json,
            )  # fmt: skip
        return
    if model is not None and new is not None:
        raise UsageError(f"{model} and --model {new} are given: name one")
    if preset in _FIXED:
        raise UsageError(f"--preset {preset} needs no --config: leave one of them out")
    request = Request(
        config=config,
        budget=budget,
        preset=preset or "balanced",
        model=new or model,
        directory=directory,
        embed=embed,
        normalize_embeddings=normalize_embeddings,
        split_head=split_head,
        context=context,
        force=force,
        offline=offline,
        accept_license=accept_license,
        latency=None if machine is None else _latency_on(machine, context, threads),
    )
    if curve:
        _show_curve(config, as_json)
        return
    with options.stages() as progress, limit_data(ceiling):
        result = make(request, progress)
    _show(result, as_json)


def _latency_on(
    machine: Path, context: int | None, threads: int | None
) -> Callable[[ModelSpec, Plan], float]:
    """Seconds of a decode step of a plan on a machine that was measured."""
    from flashlite.compress.latency import predict_latency
    from flashlite.compress.machine_profile import MachineProfile

    profile = MachineProfile.read(machine)
    depth = context or _DEPTH

    def predict(spec: ModelSpec, plan: Plan) -> float:
        return predict_latency(spec, plan, profile, depth=depth, threads=threads).decode_seconds

    return predict


def _parse_time(text: str) -> float:
    """Seconds of `5ms`, `800us` or `0.01s`.

    Raises:
        UsageError: it is none of these, or not above zero.
    """
    match = _TIME.fullmatch(text.strip())
    seconds = float(match.group(1)) * _SECONDS[match.group(2)] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{text!r} is not a time above zero; write 5ms, 800us or 0.01s")
    return seconds


def _refuse_without_config(
    budget: Budget,
    preset: str | None,
    new: str | None,
    curve: bool,
    embed: str | None,
    normalize: bool,
) -> None:
    """What only an analysis makes possible."""
    wanted = {
        "--target-size": budget.target_size,
        "--target-ram": budget.target_ram,
        "--target-latency": budget.target_latency,
        "--max-kl": budget.max_kl,
        "--model": new,
        "--curve": curve or None,
        "--embed": embed,
        "--normalize-embeddings": normalize or None,
        f"--preset {preset}": True if preset in PRESETS else None,
    }
    if given := [name for name, value in wanted.items() if value is not None]:
        raise UsageError(
            f"{given[0]} needs to know what each part may lose: run `flashlite analyze MODEL`, "
            f"then give --config {CONFIG}"
        )


def _by_preset(
    model: str,
    preset: str,
    split_head: str,
    directory: Path | None,
    force: bool,
    offline: bool,
    accept_license: bool,
    like: str | None,
    as_json: bool,
) -> None:
    from flashlite.checkpoint.pull import pull
    from flashlite.model.spec import ModelSpec
    from flashlite.runtime import prepare

    with options.stages() as progress:
        pulled = pull(model, accept_license=accept_license, offline=offline)
        target = directory or Path(f"{pulled.name}-{preset}.fl")
        if target.exists() and not force:
            raise UsageError(
                f"{target} is there already; give --force to replace it, or another -o"
            )
        if preset == "lossless" and split_head == "on":
            raise UsageError("--preset lossless has an exact head: leave --split-head out")
        head = "off" if preset == "lossless" else split_head
        artifact = prepare.make_artifact(
            pulled, preset, target, head=head, like=like, progress=progress
        )
    screen = artifact.plan.screen
    figures = {
        "artifact": str(artifact.path),
        "preset": artifact.plan.preset,
        "digest": artifact.digest,
        "weights_bytes": artifact.weights_size,
        "split_head": None if screen is None else screen.to_json(),
        "peak_memory_bytes": options.peak_memory(),
    }
    if as_json:
        output.emit(figures)
        return
    size = format_size(artifact.weights_size)
    click.echo(f"{artifact.path}: {size} of weights ({preset})")
    if screen is not None:
        click.echo(f"split head: {format_size(artifact.screen_bytes)} of them")
    elif head == "auto" and isinstance(artifact.model, ModelSpec):
        click.echo("no split head: it would save too little, or too often be inexact")


def _show_curve(config: Path, as_json: bool) -> None:
    from flashlite.cli.budget import curve_of

    points = curve_of(read_config(config))
    if as_json:
        output.emit({"config": str(config), "curve": points})
        return
    rows = [
        (format_size(int(point["bytes"])), point["bits_per_weight"], f"{point['predicted_kl']:.5f}")
        for point in points
    ]
    click.echo(output.table(rows, ("weights", "bits", "predicted KL")))


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        output.emit({**result.to_json(), "peak_memory_bytes": options.peak_memory()})
        return
    counted: dict[str, int] = {}
    for fmt in result.formats.values():
        counted[fmt] = counted.get(fmt, 0) + 1
    chosen = ", ".join(f"{n} in {fmt}" for fmt, n in sorted(counted.items()))
    click.echo(f"{result.artifact.path}: {format_size(result.size)} on disk")
    click.echo(f"units: {chosen}")
    if result.before_kl is not None:
        click.echo(f"KL of the old artifact: {result.before_kl:.4f} nats per token")
    click.echo(
        f"KL on held-back text: {result.measured_kl:.4f} nats per token "
        f"(predicted {result.predicted_kl:.4f}); {result.kept} of {result.tried} swaps kept"
    )
    click.echo(
        f"error of the outputs after rounding: {100 * result.gain:.0f} % of plain rounding's"
    )
    for line in result.unmatched:
        click.echo(f"not matched: {line}")
    for line in result.notes:
        output.note(line)
