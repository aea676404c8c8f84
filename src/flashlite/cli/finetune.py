"""`flashlite finetune`: the last layers of a quantized model, tuned into a delta."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options, output
from flashlite.errors import CompressError, UsageError

if TYPE_CHECKING:
    from flashlite.compress.tuning import Outcome, Report

__all__ = ["command"]


@click.command()
@click.argument("model")
@click.option("--heal", is_flag=True, help="Bring back what quantization cost (the default).")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="CHATS.jsonl",
    help="Chats to learn, one JSON object with `messages` a line, the last an answer.",
)
@click.option(
    "--eval",
    "held",
    type=click.Path(path_type=Path),
    metavar="HELD.jsonl",
    help="Chats to measure on.  [default: one in ten of --data]",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="sensitive_layers.json",
    help="Use its calibration texts; without it the model writes some.",
)
@click.option("--source", help="The checkpoint an artifact was made from.")
@click.option("--preset", default="import", show_default=True, metavar="NAME",
              help="How to quantize a model that has no artifact yet.")  # fmt: skip
@click.option("--layers", type=int, default=3, show_default=True, help="How many, from the end.")
@click.option("--steps", type=int, default=220, show_default=True, help="At most.")
@click.option("--rate", type=float, default=1e-4, show_default=True, help="Learning rate.")
@click.option("--tokens", type=int, default=40_000, show_default=True, help="Of general text.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of texts and their order.")
@click.option("--max-minutes", type=float, help="Stop with the best found so far.")
@click.option("--threads", type=int, help="[default: one per core]")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="Where to write.")
@click.option("--force", is_flag=True, help="Replace a file, and write a delta that got worse.")
@click.option("--resume/--fresh", default=True, help="Go on with an interrupted run, or forget it.")
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@click.option("--accept-license", is_flag=True, help="For models whose licence asks for it.")
@output.json_option
def command(
    model: str,
    heal: bool,
    data: Path | None,
    held: Path | None,
    config: Path | None,
    source: str | None,
    preset: str,
    layers: int,
    steps: int,
    rate: float,
    tokens: int,
    seed: int,
    max_minutes: float | None,
    threads: int | None,
    target: Path | None,
    force: bool,
    resume: bool,
    offline: bool,
    accept_license: bool,
    as_json: bool,
) -> None:
    """Tune the last layers and the final norm of MODEL into a delta.

    MODEL is an artifact, or a known name or a checkpoint whose artifact is made first. Its other
    layers stay as they are. Without --data it is healed: taught to say what its source says. With
    --data it learns a domain, and a quarter of every step keeps it near its source.

    \b
    Examples:
      flashlite finetune gemma.fl -o healed.delta
      flashlite finetune gemma.fl --data chats.jsonl --eval held.jsonl -o bank.delta
      flashlite delta apply gemma.fl bank.delta
    """
    from flashlite.artifact.delta import write_delta
    from flashlite.checkpoint.pull import pull
    from flashlite.compress.tuning import Settings
    from flashlite.model.differentiable import require_torch
    from flashlite.runtime import prepare
    from flashlite.runtime.tune import Wanted, source_of, tune

    if heal and data is not None:
        raise UsageError("--heal and --data: choose one")
    torch = require_torch("fine-tuning")
    if threads is not None:
        if not 1 <= threads <= 1024:
            raise UsageError(f"--threads is {threads}, allowed 1 to 1024")
        torch.set_num_threads(threads)
    settings = Settings(
        layers=layers,
        steps=steps,
        rate=rate,
        seed=seed,
        max_seconds=None if max_minutes is None else 60 * max_minutes,
    )
    settings.check()
    if not 1 <= tokens <= 100_000_000:
        raise UsageError(f"--tokens is {tokens}, allowed 1 to 100000000")
    with options.stages() as progress:
        artifact = prepare.find_artifact(
            model, preset=preset, accept_license=accept_license, offline=offline, progress=progress
        )
        is_artifact = artifact.path.resolve() == Path(model).resolve()
        if source is None and not is_artifact:
            origin = pull(model, accept_license=accept_license, offline=offline)
        else:
            origin = source_of(artifact, source)
    path = target or Path(f"{artifact.name}-{_purpose(data)}.delta")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; give --force to replace it, or another -o")
    wanted = Wanted(artifact, origin, data, held, config, tokens, fresh=not resume)
    with options.stages() as progress, _watched() as report:
        tuned = tune(wanted, settings, progress=progress, report=report)
    worse = tuned.worse
    written = worse is None or force
    if written:
        write_delta(path, tuned.delta)
    if as_json:
        output.emit(
            {
                "delta": str(path) if written else None,
                "artifact": str(artifact.path),
                "bytes": len(tuned.delta),
                "share": round(tuned.share, 5),
                "steps": tuned.outcome.steps,
                "stopped": tuned.outcome.stopped,
                "worse": worse,
                **_figures(tuned.outcome),
                "peak_memory_bytes": options.peak_memory(),
            }
        )
    else:
        click.echo(_table(tuned.outcome))
    if not written:
        raise CompressError(f"{worse}; no delta was written (--force writes it all the same)")
    if worse is not None:
        output.note(f"{worse}; the delta was written because of --force")
    if not as_json:
        share = f"{100 * tuned.share:.1f} % of the model"
        click.echo(f"{path}: {layers} layers, {share}, step {tuned.outcome.steps}")
        output.note(f"apply it with: flashlite delta apply {artifact.path} {path}")


def _purpose(data: Path | None) -> str:
    if data is None:
        return "healed"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", data.stem)[:64].strip("-.") or "domain"


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[Report], None]]:
    """One bar per stage, with the loss and what is held back."""
    names = {"read": "read texts", "tune": "tune", "measure": "measure"}
    with contextlib.ExitStack() as bars:
        current: dict[str, Callable[[int, int, str], None]] = {}

        def report(seen: Report) -> None:
            if seen.stage not in current:
                bars.close()
                current.clear()
                bar = bars.enter_context(output.noted_progress(names[seen.stage]))
                current[seen.stage] = bar
            note = ""
            if seen.loss is not None and seen.held is not None:
                note = f"loss {seen.loss:.4f}, held-out {seen.held:.4f}"
            current[seen.stage](seen.done, seen.total, note)

        yield report


def _figures(outcome: Outcome) -> dict[str, Any]:
    """Before and after, by set of texts."""
    found: dict[str, Any] = {
        "before": {name: quality.to_json() for name, quality in outcome.before.items()},
        "after": {name: quality.to_json() for name, quality in outcome.after.items()},
    }
    if outcome.domain_before is not None and outcome.domain_after is not None:
        found["domain"] = {
            "before": outcome.domain_before.to_json(),
            "after": outcome.domain_after.to_json(),
        }
    return found


def _table(outcome: Outcome) -> str:
    rows: list[tuple[str, str, str, str]] = []
    for name, old in outcome.before.items():
        new = outcome.after[name]
        change = f"{100 * (new.kl / old.kl - 1):+.1f} %" if old.kl else ""
        rows.append((f"{name}: KL, nats", f"{old.kl:.5f}", f"{new.kl:.5f}", change))
        rows.append((f"{name}: top-1", f"{100 * old.top1:.1f} %", f"{100 * new.top1:.1f} %", ""))
        change = f"{100 * (new.perplexity / old.perplexity - 1):+.1f} %"
        rows.append(
            (f"{name}: perplexity", f"{old.perplexity:.2f}", f"{new.perplexity:.2f}", change)
        )
    before, after = outcome.domain_before, outcome.domain_after
    if before is not None and after is not None:
        rows.append(("answers: loss", f"{before.loss:.4f}", f"{after.loss:.4f}", ""))
        for name, old_share, new_share in (
            ("answers: right among the labels", before.accuracy, after.accuracy),
            ("answers: right when free", before.free, after.free),
        ):
            change = f"{100 * (new_share - old_share):+.1f} points"
            rows.append((name, f"{100 * old_share:.1f} %", f"{100 * new_share:.1f} %", change))
    return output.table(rows, ("", "before", "after", ""))
