"""`flashlite pull MODEL`: fetch a pretrained model, checked."""

from __future__ import annotations

import click

from flashlite.checkpoint.known_models import KNOWN_MODELS
from flashlite.checkpoint.pull import pull
from flashlite.cli import output
from flashlite.runtime.memory import format_size

__all__ = ["command"]


@click.command(
    "pull",
    help="Fetch a pretrained model.",
    epilog="MODEL is hf:ORG/NAME, a path, or one of: " + ", ".join(KNOWN_MODELS) + ".",
)
@click.argument("model")
@click.option("--accept-license", is_flag=True, help="Accept the licence of a model that asks.")
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@output.json_option
def command(model: str, accept_license: bool, offline: bool, as_json: bool) -> None:
    """Fetch `model` and say where it lies."""
    with output.progress(f"pull {model}") as report:
        pulled = pull(model, accept_license=accept_license, offline=offline, progress=report)
    n_bytes = sum(p.stat().st_size for p in [pulled.path, *pulled.path.rglob("*")] if p.is_file())
    if as_json:
        output.emit(
            {
                "name": pulled.name,
                "path": str(pulled.path),
                "bytes": n_bytes,
                "sha256": pulled.sha256,
                "licence": pulled.licence,
                "licence_url": pulled.licence_url,
            }
        )
        return
    click.echo(f"{pulled.name}: {pulled.path} ({format_size(n_bytes)})")
    if pulled.licence:
        click.echo(f"licence: {pulled.licence} {pulled.licence_url or ''}".rstrip())
