"""`flashlite delta`: what fine-tuning made, into an artifact and out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashlite.cli import output
from flashlite.runtime.memory import format_size

if TYPE_CHECKING:
    from flashlite.artifact.format import Artifact

__all__ = ["command"]


@click.group()
def command() -> None:
    """Apply deltas to an artifact, list them, and roll them back to the last bit.

    A delta holds the last layers of one artifact, tuned. Applied, it lies in the weights; what it
    replaced is kept beside it. A change replaces the artifact as a whole or not at all.

    \b
    Examples:
      flashlite delta apply gemma.fl bank.delta
      flashlite delta list gemma.fl
      flashlite delta rollback gemma.fl
    """


@command.command("apply")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("delta", type=click.Path(path_type=Path))
@output.json_option
def _apply(artifact: Path, delta: Path, as_json: bool) -> None:
    """Put DELTA into ARTIFACT.

    \b
    Examples:
      flashlite delta apply gemma.fl bank.delta
    """
    from flashlite.artifact.deltas import applied_deltas, apply_delta

    changed = apply_delta(artifact, delta)
    latest = applied_deltas(changed)[-1]
    _say(changed, f"delta {latest.number} ({latest.digest[:12]}) applied", as_json)


@command.command("list")
@click.argument("artifact", type=click.Path(path_type=Path))
@output.json_option
def _list(artifact: Path, as_json: bool) -> None:
    """Show the deltas in ARTIFACT, the oldest first.

    \b
    Examples:
      flashlite delta list gemma.fl --json
    """
    from flashlite.artifact.deltas import applied_deltas
    from flashlite.artifact.read import open_artifact

    opened = open_artifact(artifact)
    found = applied_deltas(opened)
    if as_json:
        output.emit(
            {
                "artifact": str(artifact),
                "digest": opened.digest,
                "deltas": [
                    {
                        "number": delta.number,
                        "digest": delta.digest,
                        "layers": delta.layers,
                        "bytes": delta.size,
                        "kept_bytes": delta.kept,
                        "made": dict(delta.made),
                    }
                    for delta in found
                ],
            }
        )
    elif found:
        rows = [
            (
                delta.number,
                delta.digest[:12],
                delta.layers,
                format_size(delta.size),
                format_size(delta.kept),
                str(delta.made.get("purpose", ""))[:40],
            )
            for delta in found
        ]
        click.echo(output.table(rows, ("n", "delta", "layers", "size", "kept", "purpose")))
    else:
        click.echo("no delta is applied")


@command.command("rollback")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("count", type=int, default=1)
@output.json_option
def _rollback(artifact: Path, count: int, as_json: bool) -> None:
    """Take the latest COUNT deltas out of ARTIFACT (1 when not given).

    Every file has the bytes again that it had before.

    \b
    Examples:
      flashlite delta rollback gemma.fl
      flashlite delta rollback gemma.fl 2
    """
    from flashlite.artifact.deltas import roll_back

    _say(roll_back(artifact, count), f"rolled back {count}", as_json)


def _say(artifact: Artifact, what: str, as_json: bool) -> None:
    from flashlite.artifact.deltas import applied_deltas

    applied = len(applied_deltas(artifact))
    if as_json:
        output.emit({"artifact": str(artifact.path), "digest": artifact.digest, "applied": applied})
    else:
        click.echo(f"{artifact.path}: {what}; {applied} applied, now {artifact.digest[:12]}")
