"""`flashlite serve`: an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

from typing import Any

import click

from flashlite.cli import options, output
from flashlite.errors import MissingExtra

__all__ = ["command"]


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Conversations answered at the same time.",
)
@options.running
def command(model: str, port: int, max_sequences: int, **flags: Any) -> None:
    """Serve MODEL on 127.0.0.1 for OpenAI clients.

    Endpoints: POST /v1/chat/completions (streaming and not), GET /v1/models, GET /health.

    \b
    Example:
      flashlite serve smollm2-135m-instruct --port 8000 --max-sequence-length 2048
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    try:
        from flashlite.server.app import MEMORY, serve
    except ModuleNotFoundError:
        raise MissingExtra("flashlite serve", "serve") from None
    with options.stages() as progress:
        loaded = options.load_model(
            model, flags, progress, max_sequences=max_sequences, reserved={"server": MEMORY}
        )
    output.note(f"{loaded.name} on http://127.0.0.1:{port}/v1 (Ctrl-C to stop)")
    serve(loaded, port=port)
