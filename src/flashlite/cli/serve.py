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
    "--keys-file",
    type=click.Path(path_type=str, dir_okay=False),
    help="Ask for the keys of this file.  [default: those of `flashlite keys`, if there are any]",
)
@click.option(
    "--rate-limit",
    type=click.IntRange(0, 1_000_000),
    help="Requests per second of one address; 0: no limit.  [default: 10]",
)
@click.option(
    "--tokens-per-minute",
    type=click.IntRange(0, 1_000_000_000),
    help="Tokens, read and written, of one key or address; 0: no limit.  [default: 0]",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    metavar="ADDRESS",
    help="An address or network whose X-Forwarded-For says who asks; repeatable.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="An origin whose pages may ask, as https://example.org; repeatable.",
)
@click.option("--tls-cert", type=click.Path(path_type=str), help="Certificate in PEM: HTTPS.")
@click.option("--tls-key", type=click.Path(path_type=str), help="The certificate's key in PEM.")
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
        from flashlite.server.keys import open_keys
        from flashlite.server.registry import open_registry
    except ModuleNotFoundError:
        raise MissingExtra("flashlite serve", "serve") from None
    default = click.core.ParameterSource.DEFAULT
    given = {n: v for n, v in flags.items() if context.get_parameter_source(n) is not default}
    config = read_config(path, {**given, "models": models or None})
    keys = open_keys(config.keys_file)
    config.check(keys=keys is not None)
    with options.stages() as progress:
        registry = open_registry(config, {"server": memory_of(config)}, progress)
    for model in registry.models.values():
        if model.plan.note:
            output.note(model.plan.note)
    names = ", ".join(registry.names)
    scheme = "https" if config.tls_cert else "http"
    output.note(f"{names} on {scheme}://{config.host}:{config.port}/v1 (Ctrl-C to stop)")
    serve(registry, config, keys)
