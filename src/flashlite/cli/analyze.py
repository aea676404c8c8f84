"""`flashlite analyze`: what each part of a model loses in each format, and what can go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options, output
from flashlite.errors import CompileError, UnsupportedTarget, UsageError
from flashlite.runtime.memory import format_size, parse_size

if TYPE_CHECKING:
    from flashlite.analyze.analysis import Analysis, Calibration
    from flashlite.analyze.calibration import Job, Sampler
    from flashlite.analyze.state import State
    from flashlite.checkpoint.pull import Pulled
    from flashlite.checkpoint.tokenizer import Tokenizer
    from flashlite.runtime.prepare import Progress

__all__ = ["command"]

_LENGTH = 512  # tokens of a calibration sequence
_HELD_BACK = 2048  # tokens that exact losses are taken on
_BATCH = 36  # texts written at once
_LEAST = 1 << 29  # of --max-mem


@click.command()
@click.argument("model", required=False)
@click.option("--model", "named", metavar="MODEL", help="The same as the argument.")
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("sensitive_layers.json"),
    show_default=True,
    help="Where the result goes.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a report to look at, an HTML file that needs no network.",
)
@click.option(
    "--calibration",
    "text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text, or chats as JSON lines, to measure on.  [default: the model writes it]",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True,
              help="Of the calibration and of drawn labels.")  # fmt: skip
@click.option(
    "--tokens",
    type=click.IntRange(64, 1 << 20),
    default=64 * _LENGTH,
    show_default=True,
    help="Tokens that statistics are taken on.",
)
@click.option("--formats", metavar="LIST", help="Formats to measure.  [default: all]")
@click.option(
    "--exact",
    metavar="LIST",
    help="Formats whose loss is run, not only predicted.  [default: the two smallest]",
)
@click.option("--no-gradients", is_flag=True, help="Predict without gradients, as without torch.")
@click.option("--like", metavar="MODEL", help="The model that an HDF5 file of weights belongs to.")
@click.option("--max-mem", metavar="SIZE", default="4GB", show_default=True,
              help="Keep within 2GB, 1.5GiB, 500MB ...")  # fmt: skip
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Go on where an interrupted run ended, or start anew.",
)
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@click.option("--accept-license", is_flag=True, help="For models whose licence asks for it.")
@output.json_option
def command(
    model: str | None,
    named: str | None,
    path: Path,
    report: Path | None,
    text: Path | None,
    seed: int,
    tokens: int,
    formats: str | None,
    exact: str | None,
    no_gradients: bool,
    like: str | None,
    max_mem: str,
    resume: bool,
    offline: bool,
    accept_license: bool,
    as_json: bool,
) -> None:
    """Measure what each part of MODEL loses in each format, and what could be left out.

    The result is read by `flashlite quantize --config`. An interrupted run goes on where it
    ended.

    \b
    Examples:
      flashlite analyze smollm2-135m-instruct --report analysis.html
      flashlite analyze --model base_fp32.h5 --calibration chats.jsonl
    """
    from flashlite.runtime.process import limit_data

    if (model is None) == (named is None):
        raise UsageError("name one model: `flashlite analyze MODEL`, or --model MODEL")
    if like is not None:
        raise UsageError(f"--like {like} is for HDF5 files that hold nothing but weights")
    ceiling = parse_size(max_mem)
    if ceiling < _LEAST:
        raise UsageError(f"--max-mem is {max_mem}, an analysis needs {format_size(_LEAST)} or more")
    for target in (path, report):
        if target is not None and not target.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {target.parent} to write {target.name} into")
    if report is not None:
        from flashlite.analyze.plots import require_matplotlib

        require_matplotlib()  # before the work, not after it
    with options.stages() as progress, limit_data(ceiling):
        analysis, state = _analyze(
            str(model or named), path, text,
            seed=seed, tokens=tokens, formats=formats, exact=exact, gradients=not no_gradients,
            memory=ceiling, fresh=not resume, offline=offline, accept_license=accept_license,
            progress=progress,
        )  # fmt: skip
        from flashlite.analyze.analysis import write_analysis

        write_analysis(analysis, path)
        if report is not None:
            from flashlite.analyze.report import write_report

            write_report(analysis, report)
        state.remove()
    figures = {
        "analysis": str(path),
        "report": None if report is None else str(report),
        **_figures(analysis),
        "peak_memory_bytes": options.peak_memory(),
    }
    if as_json:
        output.emit(figures)
    else:
        _show(analysis, path, report)


def _analyze(
    name: str,
    path: Path,
    text: Path | None,
    *,
    seed: int,
    tokens: int,
    formats: str | None,
    exact: str | None,
    gradients: bool,
    memory: int,
    fresh: bool,
    offline: bool,
    accept_license: bool,
    progress: Progress,
) -> tuple[Analysis, State]:
    from blake3 import blake3

    from flashlite.analyze.analysis import AnalysedModel
    from flashlite.analyze.pipeline import Settings, analyze
    from flashlite.analyze.sensitivity import Formats
    from flashlite.analyze.state import State
    from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.checkpoint.pull import pull
    from flashlite.checkpoint.tokenizer import Tokenizer
    from flashlite.compress.roundings import round_trip, stored_bytes
    from flashlite.model.families import describe

    pulled = pull(
        name,
        accept_license=accept_license,
        offline=offline,
        progress=lambda done, total: progress("pull", done, total),
    )
    checkpoint = open_checkpoint(pulled.path)
    source = describe(checkpoint)
    chosen, measured = _formats(formats, exact)
    gradients = gradients and _torch()
    digest = _digest(source, progress)
    key = {
        "version": 1,
        "digest": digest,
        "seed": seed,
        "tokens": tokens,
        "formats": chosen,
        "exact": measured,
        "gradients": gradients,
        "text": None if text is None else blake3(text.read_bytes()).hexdigest(),
    }
    state = State(path.with_name(f"{path.name}.partial"), key, fresh=fresh)
    tokenizer = Tokenizer(build_tokenizer_checked(checkpoint), name=pulled.name)
    calibration = _calibration(pulled, source.spec.max_context, tokenizer, text, seed, tokens,
                               state, progress)  # fmt: skip
    settings = Settings(measured, gradients, memory=memory, seed=seed)
    analysis = analyze(
        AnalysedModel(
            name,
            str(pulled.path.resolve()),
            digest,
            source.spec.family,
            sum(_size(shape) for _, shape in source.spec.shapes()),
        ),
        source.spec,
        source.tensor,
        calibration,
        Formats(chosen, lambda n, w, f: round_trip(source, n, w, f), stored_bytes),
        settings,
        state,
        progress,
    )
    return analysis, state


def _formats(formats: str | None, exact: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to predict, and what to measure: by default the formats of the fewest bytes."""
    from flashlite.compress.plan import PACKED
    from flashlite.compress.roundings import stored_bytes

    chosen = _list("--formats", formats, PACKED) or tuple(PACKED)
    by_size = sorted(chosen, key=lambda fmt: stored_bytes((16, 32), fmt))
    measured = _list("--exact", exact, chosen) or tuple(by_size[:_MEASURED])
    return chosen, tuple(fmt for fmt in chosen if fmt in measured)


_MEASURED = 2  # formats whose loss is measured when --exact does not say


def _list(flag: str, given: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if given is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UsageError(f"{flag} names {name[:40]!r}, known are {', '.join(known)}")
    if not names:
        raise UsageError(f"{flag} is empty; give some of {', '.join(known)}")
    return names


def _torch() -> bool:
    try:
        import torch
    except ImportError:
        output.note(
            "torch is not installed: predicting without gradients (pip install 'flashlite[train]')"
        )
        return False
    import os

    with contextlib.suppress(AttributeError):  # not Linux
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return True


def _digest(source: Any, progress: Progress) -> str:
    """Of every tensor's name, shape, type and bytes, whatever file they lie in."""
    from blake3 import blake3

    digest = blake3()
    tensors = source.checkpoint.tensors
    for at, name in enumerate(sorted(tensors)):
        progress("digest", at, len(tensors))
        info = tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(source.checkpoint.raw(name).tobytes())
    return f"blake3:{digest.hexdigest()}"


def _calibration(
    pulled: Pulled,
    max_context: int,
    tokenizer: Tokenizer,
    text: Path | None,
    seed: int,
    tokens: int,
    state: State,
    progress: Progress,
) -> Calibration:
    from dataclasses import asdict

    from flashlite.analyze import calibration
    from flashlite.analyze.analysis import Calibration
    from flashlite.analyze.strict import read

    if (kept := state.load("calibration")) is not None:
        with contextlib.suppress(UsageError):
            return read(Calibration, kept, "")
    length = min(_LENGTH, max_context)
    if text is not None:
        found = calibration.from_file(
            text, tokenizer, seed=seed, tokens=tokens, held_back=_HELD_BACK, length=length
        )
    else:
        with _sampler(pulled, length, progress) as sampler:
            found = calibration.from_model(
                tokenizer,
                sampler,
                seed=seed,
                tokens=tokens,
                held_back=_HELD_BACK,
                length=length,
                progress=lambda done, total: progress("write the calibration", done, total),
            )
    state.save("calibration", asdict(found))
    return found


@contextlib.contextmanager
def _sampler(pulled: Pulled, length: int, progress: Progress) -> Iterator[Sampler]:
    """The model itself, compiled, as a writer of texts."""
    import tempfile

    from flashlite.artifact.read import open_artifact
    from flashlite.errors import ArtifactError
    from flashlite.runtime import prepare
    from flashlite.runtime.writing import Writer, open_writing, write

    with tempfile.TemporaryDirectory() as folder:
        directory = prepare.artifact_path(pulled, "import")
        try:
            artifact = open_artifact(directory)
        except (ArtifactError, OSError):
            # A split head would take minutes to fit, and is not used here.
            artifact = prepare.make_artifact(
                pulled, "import", Path(folder) / "source.fl", head="off", progress=progress
            )
        ends = frozenset(artifact.tokens.eos)
        try:
            engine = open_writing(artifact, _BATCH, length)
        except (CompileError, UnsupportedTarget) as error:
            raise type(error)(
                f"{error}; or give a text to measure on with --calibration FILE"
            ) from None
        with engine:

            def sample(jobs: Sequence[Job]) -> list[list[int]]:
                texts = []
                for first in range(0, len(jobs), _BATCH):
                    part = jobs[first : first + _BATCH]
                    writers = [
                        Writer(engine, job.ids, max(1, job.length - len(job.ids)),
                               job.temperature, job.seed)
                        for job in part
                    ]  # fmt: skip
                    write(engine, writers, ends)
                    texts += [[*job.ids, *w.drawn] for job, w in zip(part, writers, strict=True)]
                return texts

            yield sample


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _figures(analysis: Analysis) -> dict[str, Any]:
    assert analysis.proxy is not None  # noqa: S101
    proxy = analysis.proxy
    return {
        "model": analysis.model.name,
        "digest": analysis.model.digest,
        "units": len(analysis.units),
        "calibration_tokens": sum(map(len, analysis.calibration.sequences)),
        "held_back_tokens": sum(map(len, analysis.calibration.held_back)),
        "gradients": proxy.gradients,
        "spearman": proxy.spearman,
        "spearman_by_format": dict(proxy.by_format),
        "scale": proxy.scale,
        "additivity": dict(proxy.additivity),
    }


def _show(analysis: Analysis, path: Path, report: Path | None) -> None:
    formats = list(analysis.units[0].formats)
    worst = sorted(analysis.units, key=lambda unit: -unit.formats[formats[-1]].kl)
    least = min(formats, key=lambda fmt: analysis.units[0].formats[fmt].bytes)
    worst = sorted(analysis.units, key=lambda unit: -unit.formats[least].kl)
    rows = [
        (unit.name, output.count(unit.parameters), *(f"{unit.formats[f].kl:.5f}" for f in formats))
        for unit in worst[:10]
    ]
    click.echo(f"loss in nats per token, the 10 most sensitive of {len(analysis.units)} units:")
    click.echo(output.table(rows, ("unit", "weights", *formats)))
    proxy = analysis.proxy
    if proxy is not None and proxy.spearman is not None:
        how = "gradients" if proxy.gradients else "no gradients"
        click.echo(f"predicted against exact losses: Spearman {proxy.spearman:.3f} ({how})")
        if proxy.spearman < _TRUSTED:
            output.note(
                f"below {_TRUSTED}: trust exact losses only; measure more with --exact or --tokens"
            )
    for fmt, ratio in (proxy.additivity if proxy is not None else {}).items():
        click.echo(f"all units in {fmt}: {ratio:.2f} of the sum of the single losses")
    click.echo(f"{path}" + ("" if report is None else f", {report}"))


_TRUSTED = 0.8  # least rank correlation of a prediction to be believed
