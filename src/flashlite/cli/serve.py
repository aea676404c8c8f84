"""`flashlite serve`: models on loopback for OpenAI's clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flashlite.cli import options, output
from flashlite.errors import MissingExtra

__all__ = ["command"]


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--embed", metavar="MODEL", help="An encoder to serve embeddings with.")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A TOML file of settings; flags win over it.",
)
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: 8000]")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="A name that requests may call this server by; repeatable.",
)
@click.option(
    "--public-without-keys",
    is_flag=True,
    help="Listen beyond this machine although anyone may ask.",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 256),
    help="Conversations of one model answered at the same time.  [default: 4]",
)
@click.option(
    "--deadline",
    metavar="TIME",
    help="What an answer may take at most: 2s, 500ms. Later it is cut short and marked, or refused "
    "at once. A request may ask for less.",
)
@options.running
@click.pass_context
def command(
    context: click.Context, /, models: tuple[str, ...], path: Path | None, **flags: Any
) -> None:
    """Serve models on 127.0.0.1 for OpenAI clients.

    The first MODEL answers requests that name none. All models share --max-mem.

    \b
    Example:
      flashlite serve smollm2-135m-instruct --port 8000 --max-sequence-length 2048
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    try:
        from flashlite.server.app import memory_of, serve
        from flashlite.server.config import read_config
        from flashlite.server.registry import open_registry
    except ModuleNotFoundError:
        raise MissingExtra("flashlite serve", "serve") from None
    default = click.core.ParameterSource.DEFAULT
    given = {n: v for n, v in flags.items() if context.get_parameter_source(n) is not default}
    config = read_config(path, {**given, "models": models or None})
    config.check()
    with options.stages() as progress:
        registry = open_registry(config, {"server": memory_of(config)}, progress)
    for model in registry.models.values():
        if model.plan.note:
            output.note(model.plan.note)
    names = ", ".join(registry.names)
    output.note(f"{names} on http://{config.host}:{config.port}/v1 (Ctrl-C to stop)")
    serve(registry, config)
