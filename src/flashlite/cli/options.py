"""Flags that several verbs share; their defaults are read from the dataclass they fill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flashlite.cli import output
from flashlite.errors import UsageError

if TYPE_CHECKING:
    from flashlite.runtime.model import Answer, Model
    from flashlite.runtime.prepare import Progress
    from flashlite.runtime.sampling import SamplingParams

__all__ = [
    "generate",
    "load_model",
    "peak_memory",
    "running",
    "sampling",
    "sampling_params",
    "stages",
]

F = TypeVar("F", bound=Callable[..., Any])

_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", int, "Stop after this many tokens.  [default: 512]"),
    ("temperature", float, "0 takes the most likely token; 0.7 varies.  [default: 0]"),
    ("top_k", int, "Draw among the K most likely; 0 is off."),
    ("top_p", float, "Draw among the most likely that reach this probability; 1 is off."),
    ("min_p", float, "Drop tokens below this share of the likeliest one's; 0 is off."),
    ("repetition_penalty", float, "Above 1 makes repeating less likely."),
    ("presence_penalty", float, "Subtracted once from a token that occurred."),
    ("frequency_penalty", float, "Subtracted per occurrence."),
    ("seed", int, "Makes drawing repeatable."),
    ("logprobs", int, "Report the N likeliest tokens at each step (with --json)."),
)
MAX_TOKENS = 512  # a small model that loops would go on to the end of its context
_RUNNING = ("max_mem", "max_sequence_length", "threads", "preset", "isa", "offline",
            "accept_license", "enable_integrity_check", "prefix_cache", "speculate",
            "exact_head")  # fmt: skip


def sampling(function: F) -> F:
    """The flags of `SamplingParams`."""
    function = click.option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        help="Added to a token's logit; repeatable.",
    )(function)
    function = click.option("--stop", multiple=True, help="End before this text; repeatable.")(
        function
    )
    for name, kind, text in reversed(_SAMPLING):
        function = click.option(f"--{name.replace('_', '-')}", type=kind, help=text)(function)
    return function


def running(function: F) -> F:
    """The flags of `flashlite.load`."""
    decorators = (
        click.option("--max-mem", metavar="SIZE", help="Keep within 2GB, 1.5GiB, 500MB ..."),
        click.option(
            "--max-sequence-length",
            type=int,
            help="Tokens of prompt and answer together.  [default: the model's context]",
        ),
        click.option("--threads", type=int, help="[default: one per core]"),
        click.option(
            "--preset",
            type=click.Choice(["import", "hybrid", "q8", "q6", "q5", "q4"]),
            default="import",
            show_default=True,
            help="How to quantize a model that has no artifact yet.",
        ),
        click.option(
            "--isa", type=click.Choice(["amx", "avx512", "avx2", "plain"]), help="[default: best]"
        ),
        click.option("--offline", is_flag=True, help="Use only what is on this machine."),
        click.option(
            "--accept-license", is_flag=True, help="For models whose licence asks for it."
        ),
        click.option(
            "--enable-integrity-check/--no-integrity-check",
            default=True,
            show_default=True,
            help="Compare every file with the manifest before use.",
        ),
        click.option(
            "--prefix-cache/--no-prefix-cache",
            default=True,
            show_default=True,
            help="Reuse what prompts that begin equally stored, also after a restart.",
        ),
        click.option(
            "--speculate/--no-speculate",
            default=True,
            show_default=True,
            help="Guess tokens that repeat the text, where it is faster; answers stay the same.",
        ),
        click.option(
            "--exact-head",
            is_flag=True,
            help="Compute every logit, also where the model has a split head.",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


@contextlib.contextmanager
def stages() -> Iterator[Progress]:
    """A progress callback for `load`: one bar per stage, on stderr, for long work only."""
    with contextlib.ExitStack() as bars:
        current: dict[str, Callable[[int, int], None]] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in current:
                bars.close()
                current.clear()
                current[stage] = bars.enter_context(output.progress(stage))
            current[stage](done, total)

        yield report


def sampling_params(flags: Mapping[str, Any]) -> SamplingParams:
    """The checked `SamplingParams` of the given flags; flags not given keep its defaults, except
    that an answer ends after `MAX_TOKENS`.

    Raises:
        UsageError: a value is outside its range.
    """
    from flashlite.runtime.sampling import SamplingParams

    given = {name: flags[name] for name, _, _ in _SAMPLING if flags[name] is not None}
    params = SamplingParams(
        **{"max_tokens": MAX_TOKENS, **given},
        stop=tuple(flags["stop"]),
        logit_bias=_parse_bias(flags["logit_bias"]),
    )
    params.check()
    return params


def load_model(
    model: str,
    flags: Mapping[str, Any],
    progress: Progress | None,
    *,
    max_sequences: int = 1,
    reserved: Mapping[str, int] | None = None,
) -> Model:
    """`flashlite.load` with the flags of `running`; a shortened context is told on stderr.

    Raises:
        FlashliteError: as `flashlite.load`.
    """
    from flashlite.runtime.model import load

    settings = {name: flags[name] for name in _RUNNING}
    loaded = load(
        model, progress=progress, max_sequences=max_sequences, reserved=reserved, **settings
    )
    if loaded.plan.note:
        output.note(loaded.plan.note)
    return loaded


def generate(model: Model, ids: Sequence[int], params: SamplingParams, *, echo: bool) -> Answer:
    """Generate, printing text as it comes when `echo`; Ctrl-C stops within one step."""
    from flashlite.runtime.model import summarize

    generation = model.submit(ids, params)
    pieces = []
    for piece in model.follow(generation):
        pieces.append(piece)
        if echo and piece.text:
            click.echo(piece.text, nl=False)
    if echo:
        click.echo()
    if echo and generation.finish_reason == "length":
        n = len(generation.generated)
        output.note(f"[stopped after {n} tokens, the limit: --max-tokens or the context]")
    return summarize(generation, pieces)


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    from flashlite.runtime.process import resident_bytes

    return resident_bytes("VmHWM")


def _parse_bias(entries: Sequence[str]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for entry in entries:
        token, _, value = entry.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias {entry!r} is not ID=BIAS, such as 42=-5") from None
    return bias
