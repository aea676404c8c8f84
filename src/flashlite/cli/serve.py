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
@click.option(
    "--deadline",
    metavar="TIME",
    help="What an answer may take at most: 2s, 500ms. Later it is cut short and marked, or refused "
    "at once. A request may ask for less.",
)
@options.running
def command(model: str, port: int, max_sequences: int, deadline: str | None, **flags: Any) -> None:
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
        from flashlite.server.timing import parse_duration
    except ModuleNotFoundError:
        raise MissingExtra("flashlite serve", "serve") from None
    seconds = None if deadline is None else parse_duration(deadline)
    with options.stages() as progress:
        loaded = options.load_model(
            model, flags, progress, max_sequences=max_sequences, reserved={"server": MEMORY}
        )
    output.note(f"{loaded.name} on http://127.0.0.1:{port}/v1 (Ctrl-C to stop)")
    serve(loaded, port=port, deadline=seconds)
