"""`flashlite quantize`: a checkpoint into an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from flashlite.cli import options, output
from flashlite.errors import UsageError
from flashlite.runtime.memory import format_size, parse_size

__all__ = ["command"]


@click.command()
@click.argument("model")
@click.option(
    "--preset",
    type=click.Choice(["import", "hybrid", "q8", "q6", "q5", "q4"]),
    default="import",
    show_default=True,
    help="import keeps 4-, 5- and 8-bit grids bit for bit; hybrid: FP16 embeddings, INT8 layers.",
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
    model: str,
    preset: str,
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

    \b
    Examples:
      flashlite quantize smollm2-135m-instruct
      flashlite quantize ./model.gguf --preset q4 -o model-q4.fl
      flashlite quantize ./weights.h5 --like smollm2-135m-instruct -o weights.fl
    """
    from flashlite.checkpoint.pull import pull
    from flashlite.model.spec import ModelSpec
    from flashlite.runtime import prepare
    from flashlite.runtime.process import limit_data

    ceiling = None if max_mem is None else parse_size(max_mem)
    with options.stages() as progress, limit_data(ceiling):
        pulled = pull(model, accept_license=accept_license, offline=offline)
        target = directory or Path(f"{pulled.name}-{preset}.fl")
        if target.exists() and not force:
            raise UsageError(
                f"{target} is there already; give --force to replace it, or another -o"
            )
        artifact = prepare.make_artifact(
            pulled, preset, target, head=split_head, like=like, progress=progress
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
    else:
        size = format_size(artifact.weights_size)
        click.echo(f"{artifact.path}: {size} of weights ({preset})")
        if screen is not None:
            click.echo(f"split head: {format_size(artifact.screen_bytes)} of them")
        elif split_head == "auto" and isinstance(artifact.model, ModelSpec):
            click.echo("no split head: it would save too little, or too often be inexact")
