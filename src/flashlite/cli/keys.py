"""`flashlite keys`: who may ask a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashlite.cli import output
from flashlite.errors import MissingExtra

if TYPE_CHECKING:
    from flashlite.server.keys import Keys

__all__ = ["command"]

_file = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file of keys.  [default: keys.json beside the models]",
)


@click.group()
def command() -> None:
    """Make, list and revoke the keys that a server asks for.

    As soon as there is one, `flashlite serve` answers nobody who shows none. A running server
    notices a new or revoked key within a second, if it was started with at least one.

    \b
    Example:
      flashlite keys add laptop
      curl http://127.0.0.1:8000/v1/models -H "Authorization: Bearer fl-..."
    """


@command.command("add")
@click.argument("name")
@_file
@output.json_option
def _add(name: str, path: Path | None, as_json: bool) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    keys = _open(path)
    secret = keys.add(name)
    if as_json:
        output.emit({"name": name, "key": secret, "file": keys.path})
        return
    click.echo(secret)
    output.note("Keep it: it is shown this once and stored as a hash.")


@command.command("list")
@_file
@output.json_option
def _list(path: Path | None, as_json: bool) -> None:
    """Name all keys; what they are is not stored."""
    keys = _open(path)
    found = keys.list()
    if as_json:
        output.emit({"keys": [key.public for key in found], "file": keys.path})
        return
    for key in found:
        click.echo(f"{key.name}  {time.strftime('%Y-%m-%d', time.gmtime(key.created))}")


@command.command("revoke")
@click.argument("name")
@_file
@output.json_option
def _revoke(name: str, path: Path | None, as_json: bool) -> None:
    """End a key; running servers notice within a second."""
    keys = _open(path)
    keys.revoke(name)
    if as_json:
        output.emit({"revoked": name, "file": keys.path})
        return
    output.note(f"The key {name} is revoked.")


def _open(path: Path | None) -> Keys:
    try:
        from flashlite.server.keys import Keys, default_path
    except ModuleNotFoundError:
        raise MissingExtra("flashlite keys", "serve") from None
    return Keys(path or default_path())
