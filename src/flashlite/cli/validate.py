"""`flashlite validate`: what an artifact lost against its source, with thresholds for CI."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options, output
from flashlite.errors import EvaluateError, UsageError

if TYPE_CHECKING:
    from flashlite.artifact.format import Artifact
    from flashlite.evaluate.validation import Validation
    from flashlite.runtime.model import Model

__all__ = ["command"]

CONFIG = Path("sensitive_layers.json")
DEFAULT_SUITE = "benchmark_v3.1"

# Flag, what it limits, whether larger is worse, its help.
_LIMITS = (
    ("max_kl", "kl", True, "Mean KL divergence, nats per token."),
    ("min_top1", "top1", False, "Share of tokens whose likeliest successor is the source's."),
    ("max_ppl_ratio", "perplexity_ratio", True, "Perplexity over that of the source."),
    ("max_language_ratio", "language_ratio", True, "KL of the worst language over English."),
    ("max_flips", "flips", True, "Share of choices that changed."),
    ("max_accuracy_drop", "accuracy_drop", True, "Accuracy of the source less the artifact's."),
)


def _limits(function: Any) -> Any:
    for name, _, _, text in reversed(_LIMITS):
        function = click.option(
            "--" + name.replace("_", "-"), type=click.FloatRange(min=0), metavar="X", help=text
        )(function)
    return function


@click.command()
@click.argument("artifact", required=False)
@click.option(
    "--dataset",
    default=DEFAULT_SUITE,
    show_default=True,
    metavar="SUITE",
    help="A built-in suite, or the JSON file of one.",
)
@click.option("--source", metavar="MODEL", help="What to compare with.  [default: its source]")
@click.option("--quick", "size", flag_value="quick", help="Fewer items: a minute or two.")
@click.option("--standard", "size", flag_value="standard", default=True, hidden=True)
@click.option("--full", "size", flag_value="full", help="Every item: hours.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw of items.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="FILE.html  [default: ARTIFACT.html]"
)
@_limits
@click.option("--threads", type=click.IntRange(1, 64), help="[default: one per core]")
@click.option("--max-mem", metavar="SIZE", help="Fail beyond 4GB, 3.5GiB ...")
@output.json_option
def command(
    artifact: str | None,
    dataset: str,
    source: str | None,
    size: str,
    seed: int,
    report: Path | None,
    threads: int | None,
    max_mem: str | None,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Measure what ARTIFACT lost against the model it was made from.

    Both run on the same texts, the source in FP32: KL divergence, agreement, perplexity, choices
    and how many of them changed, by language, each with its 95 % interval; then the artifact
    writes freely. The result goes into the artifact's card and a page that opens without a
    network. The suite brings texts in 12 languages; FLASHLITE_DATA adds public sets.

    Without ARTIFACT, the one that sensitive_layers.json in this folder names. The exit code is 1
    when a limit is not kept.

    \b
    Examples:
      flashlite validate model.fl
      flashlite validate model.fl --quick --max-kl 0.05 --max-language-ratio 2
      flashlite_validate --dataset benchmark_v3.1
    """
    from flashlite.artifact.read import open_artifact
    from flashlite.artifact.write import record
    from flashlite.evaluate.validation_report import render_validation
    from flashlite.runtime.memory import format_size, parse_size
    from flashlite.runtime.process import limit_data

    ceiling = None if max_mem is None else parse_size(max_mem)
    path, named = (Path(artifact), None) if artifact else _from_config(CONFIG)
    opened = open_artifact(path)
    begun = time.monotonic()
    with limit_data(ceiling, threads or 1):
        found = _measure(opened, dataset, source or named, size, seed, threads)
    verdicts = _judge(found, limits)
    missed = [line for line, kept in verdicts.items() if not kept]
    record(opened, {"validation": found.to_json()})
    page = report or path.with_suffix(".html")
    compared = str(opened.provenance.get("source") or "its source")
    _write(page, render_validation(found, opened.name, compared, verdicts))
    seconds = time.monotonic() - begun
    if as_json:
        output.emit(
            {
                "artifact": str(path),
                "report": str(page),
                **found.to_json(),
                "verdicts": _said(verdicts),
                "held": not missed,
                "seconds": round(seconds, 1),
                "peak_memory_bytes": options.peak_memory(),
            }
        )
    else:
        _print(found)
        for line in _said(verdicts):
            click.echo(line)
        click.echo(
            f"{page}: the report; {path / 'card.json'} has the figures "
            f"({seconds:.0f} s, {format_size(options.peak_memory())})"
        )
    if missed:
        raise EvaluateError(
            f"{len(missed)} of {len(verdicts)} limits not kept: {'; '.join(missed)}"
        )


def _from_config(path: Path) -> tuple[Path, str | None]:
    """The artifact and the model that an analysis names."""
    if not path.is_file():
        raise UsageError(
            f"no ARTIFACT given and no {path} in this folder; name an artifact, or run "
            "`flashlite analyze` and `flashlite quantize --config` first"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        named, model = data.get("artifact"), data["model"].get("path")
    except (OSError, ValueError, KeyError, AttributeError):
        raise UsageError(f"{path} is not what `flashlite analyze` writes") from None
    if not isinstance(named, str):
        raise UsageError(f"{path} names no artifact yet; run `flashlite quantize --config {path}`")
    return path.parent / named, model if isinstance(model, str) else None


def _measure(
    artifact: Artifact,
    dataset: str,
    source: str | None,
    size: str,
    seed: int,
    threads: int | None,
) -> Validation:
    from flashlite.analyze.digest import source_digest
    from flashlite.artifact.read import load_texts, load_weights
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.checkpoint.tokenizer import Tokenizer
    from flashlite.evaluate.suites import draw_items, find_suite
    from flashlite.evaluate.teacher import Kept
    from flashlite.evaluate.validation import validate
    from flashlite.model.families import describe
    from flashlite.runtime.engine import Engine
    from flashlite.runtime.library import load_library
    from flashlite.runtime.model import load
    from flashlite.runtime.prepare import compile_artifact

    suite = find_suite(dataset)
    described = describe(open_checkpoint(_source_path(artifact, source)))
    spec, held = described.spec, artifact.spec
    if (spec.vocab_size, spec.n_layers) != (held.vocab_size, held.n_layers):
        raise UsageError(
            f"the source has {spec.n_layers} layers and {spec.vocab_size} tokens, the artifact "
            f"{held.n_layers} and {held.vocab_size}: it is another model"
        )
    drawn, absent = draw_items(suite, size, seed)
    if absent:
        output.note(f"not measured, FLASHLITE_DATA has it not: {', '.join(absent)}")
    tokens = artifact.tokens
    begin = [tokens.bos] if tokens.add_bos and tokens.bos is not None else []
    library = load_library(compile_artifact(artifact))
    context = min(512, held.max_context)
    with ExitStack() as stack:
        progress = stack.enter_context(options.stages())
        engine = stack.enter_context(
            Engine(library, load_weights(artifact), max_tokens=context, threads=threads)
        )
        writers: list[Model] = []

        def generate(prompt: str, temperature: float, most: int) -> tuple[list[int], str, bool]:
            if not writers:  # opened when it is needed
                engine.close()
                opened = load(
                    str(artifact.path),
                    threads=threads,
                    max_sequence_length=context,
                    prefix_cache=False,
                )
                writers.append(stack.enter_context(opened))
            return _answer(writers[0], prompt, temperature, most)

        return validate(
            suite.name,
            drawn,
            absent,
            spec,
            described.tensor,
            engine,
            Tokenizer(load_texts(artifact), name=artifact.name),
            begin,
            generate,
            size=size,
            seed=seed,
            kept=Kept(source_digest(described)),
            progress=progress,
        )


def _answer(
    writer: Model, prompt: str, temperature: float, most: int
) -> tuple[list[int], str, bool]:
    from flashlite.errors import TemplateError
    from flashlite.runtime.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=most, seed=0)
    try:
        ids = writer.tokenizer.render_chat([{"role": "user", "content": prompt}])
    except TemplateError:  # a base model goes on writing
        ids = writer.tokenizer.encode_prompt(prompt + "\n")
    generation = writer.submit(ids, params)
    text = "".join(piece.text for piece in writer.follow(generation))
    return list(generation.generated), text, generation.finish_reason == "stop"


def _source_path(artifact: Artifact, named: str | None) -> Path:
    """The checkpoint an artifact was made from: as named, or a pulled model of the same digest."""
    from flashlite.checkpoint.known_models import KNOWN_MODELS
    from flashlite.checkpoint.pull import resolve_model
    from flashlite.errors import FlashliteError

    if named is not None:
        return resolve_model(named).path
    wanted = artifact.provenance.get("sha256")
    for name in KNOWN_MODELS if wanted else ():
        try:
            pulled = resolve_model(name)
        except FlashliteError:
            continue  # not on this machine
        if pulled.sha256 == wanted:
            return pulled.path
    raise UsageError(
        f"{artifact.path} was made from {artifact.provenance.get('source') or 'an unknown file'}, "
        "which is not among the pulled models; name it with --source"
    )


def _judge(found: Validation, limits: Mapping[str, float | None]) -> dict[str, bool]:
    """A line per limit that was given, and whether it is kept.

    Raises:
        UsageError: a limit on what the suite does not measure.
    """
    verdicts = {}
    for flag, name, larger_is_worse, _ in _LIMITS:
        limit, value = limits[flag], getattr(found, name)
        if limit is None:
            continue
        if value is None:
            raise UsageError(f"--{flag.replace('_', '-')}: this suite does not measure it")
        relation = "at most" if larger_is_worse else "at least"
        kept = value <= limit if larger_is_worse else value >= limit
        verdicts[f"{name} {value:.4f}, {relation} {limit:g}"] = bool(kept)
    return verdicts


def _said(verdicts: Mapping[str, bool]) -> list[str]:
    return [f"{line}: {'kept' if kept else 'NOT KEPT'}" for line, kept in verdicts.items()]


def _print(found: Validation) -> None:
    from flashlite.evaluate.validation_report import table_rows

    for headers, rows in table_rows(found).values():
        click.echo(output.table(rows, headers) + "\n")
    click.echo(
        f"KL {found.kl:.4f} nats, same top-1 {100 * found.top1:.2f} %, perplexity "
        f"x {found.perplexity_ratio:.4f}"
    )


def _write(path: Path, text: str) -> None:
    """The whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
