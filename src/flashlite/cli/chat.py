"""`flashlite chat`: talk to a model, or ask it one question."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options
from flashlite.cli.language import translate
from flashlite.errors import FlashliteError

if TYPE_CHECKING:
    from flashlite.runtime.model import Model
    from flashlite.runtime.sampling import SamplingParams

__all__ = ["command"]


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option("-p", "--prompt", help="Ask this one question and exit.")
@click.option("--system", help="A system message.")
@options.sampling
@options.running
def command(model: str, prompt: str | None, system: str | None, **flags: Any) -> None:
    """Chat with MODEL (default smollm2-135m-instruct).

    On a fresh machine this pulls, quantizes and compiles the model first. Ctrl-C stops an answer,
    Ctrl-D or /exit ends the chat, /reset starts over.

    \b
    Examples:
      flashlite chat
      flashlite chat -p "What is the capital of France?"
      flashlite chat smollm2-135m-instruct --temperature 0.7 --max-mem 500MB
    """
    params = options.sampling_params(flags)
    start = [{"role": "system", "content": system}] if system is not None else []
    with options.stages() as progress:
        loaded = options.load_model(model, flags, progress)
    with loaded:
        loaded.tokenizer.render_chat([*start, {"role": "user", "content": "?"}])  # has a template
        if prompt is not None:
            ids = loaded.tokenizer.render_chat([*start, {"role": "user", "content": prompt}])
            options.generate(loaded, ids, params, echo=True)
        else:
            _converse(loaded, start, params)


def _converse(model: Model, start: list[dict[str, str]], params: SamplingParams) -> None:
    interactive = sys.stdin.isatty()
    messages = list(start)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo()
            return
        if line.strip() in ("/exit", "/quit"):
            return
        if line.strip() == "/reset":
            messages = list(start)
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            ids = model.tokenizer.render_chat(asked)
            answer = options.generate(model, ids, params, echo=True)
        except KeyboardInterrupt:
            click.echo(" [stopped]")  # the question stays unanswered and is forgotten
            continue
        except FlashliteError as error:
            if not interactive:
                raise
            click.echo(f"flashlite: {translate(str(error))}", err=True)
            continue
        messages = [*asked, {"role": "assistant", "content": answer.text}]
