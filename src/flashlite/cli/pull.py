"""`flashlite pull MODEL`: fetch a pretrained model, checked."""

from __future__ import annotations

import click

from flashlite.checkpoint.known_models import KNOWN_MODELS
from flashlite.checkpoint.pull import pull
from flashlite.cli import output
from flashlite.errors import UsageError
from flashlite.runtime.memory import format_size

__all__ = ["command"]


@click.command(
    "pull",
    help="Fetch a pretrained model.",
    epilog="MODEL is hf:ORG/NAME, a path, or one of: " + ", ".join(KNOWN_MODELS) + ".",
)
@click.argument("model")
@click.option("--accept-license", is_flag=True, help="Accept the licence of a model that asks.")
@click.option("--check", is_flag=True, help="Only say whether a newer base exists.")
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@output.json_option
def command(model: str, accept_license: bool, check: bool, offline: bool, as_json: bool) -> None:
    """Fetch `model` and say where it lies."""
    if check:
        if offline:
            raise UsageError("--check asks the source, --offline forbids it: leave one out")
        _check(model, as_json)
        return
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


def _check(model: str, as_json: bool) -> None:
    from flashlite.checkpoint.check import check_base

    base = check_base(model)
    if as_json:
        output.emit(
            {"name": base.name, "here": base.here, "there": base.there, "newer": base.newer}
        )
    elif base.newer:
        click.echo(f"{base.name}: a newer base exists ({base.there[:16]}, here {base.here})")
        output.note(
            "pull it, then `flashlite quantize --config sensitive_layers.json --model MODEL`"
        )
    else:
        click.echo(f"{base.name}: up to date")
