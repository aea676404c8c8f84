"""`flashlite compile`: an artifact into C and a library."""

from __future__ import annotations

from pathlib import Path

import click

from flashlite.cli import options, output

__all__ = ["command"]


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option(
    "--target",
    default="native",
    show_default=True,
    help="native, aarch64-linux-gnu, aarch64-macos, x86_64-windows-gnu ... (zig, built only)",
)
@click.option(
    "--isa", type=click.Choice(["amx", "avx512", "avx2", "plain", "fp32"]), help="[default: best]"
)
@click.option("--emit-c", is_flag=True, help="Print the generated model.c and build nothing.")
@click.option(
    "--preset",
    type=click.Choice(["import", "hybrid", "q8", "q6", "q5", "q4"]),
    default="import",
    show_default=True,
    help="How to quantize a model that has no artifact yet.",
)
@output.json_option
def command(
    model: str, target: str, isa: str | None, emit_c: bool, preset: str, as_json: bool
) -> None:
    """Generate C for MODEL and compile it into a shared library.

    \b
    Examples:
      flashlite compile smollm2-135m-instruct
      flashlite compile smollm2-135m-instruct --emit-c | less
      flashlite compile smollm2-135m-instruct --target aarch64-linux-gnu
    """
    from flashlite.codegen.emit import emit_model
    from flashlite.codegen.target import parse_target
    from flashlite.runtime import prepare

    with options.stages() as progress:
        artifact = prepare.find_artifact(model, preset=preset, progress=progress)
    chosen = parse_target(target, isa)
    if emit_c:
        click.echo(emit_model(artifact, chosen.isa))
        return
    library: Path = prepare.compile_artifact(artifact, chosen)
    if as_json:
        output.emit({"library": str(library), "target": chosen.label})
    else:
        click.echo(library)
