"""`flashlite run`: one prompt in, one text out, with the figures that matter."""

from __future__ import annotations

import sys
from typing import Any

import click

from flashlite.cli import options, output

__all__ = ["command"]


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option(
    "-p", "--prompt", required=True, help="The text to continue; `-` reads it from stdin."
)
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt into the chat template.")
@click.option("--system", help="A system message (with --chat).")
@options.sampling
@options.running
@output.json_option
def command(
    model: str,
    prompt: str,
    as_chat: bool,
    system: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Run MODEL on one prompt.

    MODEL is a known name, hf:ORG/NAME, a checkpoint's path or an artifact; what is missing is
    pulled, quantized and compiled first.

    \b
    Examples:
      flashlite run smollm2-135m-instruct -p "Once upon a time" --max-tokens 64
      flashlite run smollm2-135m-instruct --chat -p "What is the capital of France?" --json
      cat letter.txt | flashlite run ./my-model.fl -p -
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    params = options.sampling_params(flags)
    with options.stages() as progress:
        loaded = options.load_model(model, flags, progress)
    with loaded:
        if as_chat or system is not None:
            messages = [{"role": "system", "content": system}] if system is not None else []
            ids = loaded.tokenizer.render_chat([*messages, {"role": "user", "content": text}])
        else:
            ids = loaded.tokenizer.encode_prompt(text)
        answer = options.generate(loaded, ids, params, echo=not as_json)
        if as_json:
            output.emit(
                {
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "prompt_tokens": answer.prompt_tokens,
                    "cached_tokens": answer.cached_tokens,
                    "completion_tokens": answer.completion_tokens,
                    "drafted_tokens": answer.drafted_tokens,
                    "accepted_tokens": answer.accepted_tokens,
                    "time_to_first_token_s": round(answer.time_to_first_token, 6),
                    "tokens_per_second": round(answer.tokens_per_second, 2),
                    "peak_memory_bytes": options.peak_memory(),
                    "model": loaded.name,
                    "logprobs": [
                        {"id": token, "logprob": logprob, "top": [list(t) for t in top]}
                        for token, logprob, top in answer.logprobs
                    ],
                }
            )
