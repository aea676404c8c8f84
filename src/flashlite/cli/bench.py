"""`flashlite bench`: speed and memory, beside other engines on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashlite.cli import options, output
from flashlite.errors import UsageError
from flashlite.runtime.memory import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashlite.evaluate.peers import Peer
    from flashlite.evaluate.speed import Contender, Figures

__all__ = ["command"]

OURS = "flashlite"
BUSY = 0.5  # load average from which figures are doubtful


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option("--peers", default="", metavar="NAMES", help="Measure also: llama.cpp,openvino")
@click.option("--prefill", type=int, metavar="N", help="Measure also a prompt of N tokens.")
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Of each engine.  [default: one per core]"
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Times each."
)
@click.option(
    "--preset",
    type=click.Choice(["import", "hybrid", "q8", "q6", "q5", "q4"]),
    default="import",
    show_default=True,
    help="How to quantize a model that has no artifact yet.",
)
@click.option(
    "--exact-head",
    is_flag=True,
    help="Compute every logit, also where the model has a split head.",
)
@output.json_option
def command(
    model: str,
    peers: str,
    prefill: int | None,
    threads: int | None,
    rounds: int,
    preset: str,
    exact_head: bool,
    as_json: bool,
) -> None:
    """Measure MODEL: prefill, decoding, time to open, peak memory.

    Engines run on the same weights in processes of their own and take turns; prompts are random
    and never repeat, so that no cache of prefixes counts. A peer is installed on first use.

    \b
    Examples:
      flashlite bench smollm2-135m-instruct
      flashlite bench smollm2-135m-instruct --peers llama.cpp,openvino
      flashlite bench smollm2-135m-instruct --prefill 8000 --threads 2 --json
    """
    from flashlite.evaluate import machine, speed
    from flashlite.evaluate.peers import find_peers
    from flashlite.evaluate.process import our_command
    from flashlite.runtime import prepare
    from flashlite.runtime.engine import default_threads

    wanted = find_peers([name.strip() for name in peers.split(",") if name.strip()])
    with options.stages() as progress:
        artifact = prepare.find_artifact(model, preset=preset, progress=progress)
    prepare.compile_artifact(artifact)  # so that opening finds the library
    ours = speed.Contender(OURS, our_command(exact_head=exact_head), artifact.path)
    contenders = [ours, *_install(wanted, model)]
    threads = default_threads() if threads is None else threads
    measures = speed.choose_measures(artifact.spec.max_context, prefill)
    surroundings = machine.describe_machine()
    if (surroundings["load"] or 0) > BUSY:
        output.note(f"the machine is busy (load {surroundings['load']}): figures will be doubtful")
    control = {*artifact.tokens.control, *artifact.tokens.eos}
    ordinary = [i for i in range(artifact.spec.vocab_size) if i not in control]
    with output.progress("measuring") as report:
        figures = speed.compare(
            contenders, measures, ordinary, threads=threads, rounds=rounds, report=report
        )
    if not as_json:
        click.echo(_table(figures))
        return
    from flashlite import __version__

    output.emit(
        {
            "model": artifact.name,
            "version": __version__,
            "commit": machine.commit(),
            "machine": {**surroundings, "threads": threads},
            "rounds": rounds,
            "figures": {name: _summary(taken) for name, taken in figures.items()},
            "ratios": {
                measure: {name: round(ratio, 4) for name, ratio in of.items()}
                for measure, of in speed.ratios(figures, OURS).items()
            },
        }
    )


def _install(peers: Sequence[Peer], model: str) -> list[Contender]:
    """The peers, ready to run on the model's GGUF file."""
    from flashlite.checkpoint.pull import pull
    from flashlite.evaluate.peers import peer_python
    from flashlite.evaluate.process import peer_command
    from flashlite.evaluate.speed import Contender

    if not peers:
        return []
    if Path(model, "manifest.json").is_file():
        raise UsageError(f"peers read GGUF files and {model} is an artifact; name its source")
    source = pull(model).path
    if source.suffix != ".gguf":
        raise UsageError(f"peers read GGUF files and {source} is none; leave out --peers")
    return [
        Contender(peer.name, peer_command(peer_python(peer, output.note), peer.script), source)
        for peer in peers
    ]


def _summary(figures: Figures) -> dict[str, Any]:
    return {
        "open_s": round(figures.open_seconds, 4),
        "peak_rss_bytes": figures.peak_bytes,
        "tokens_per_s": {name: round(value, 2) for name, value in figures.medians.items()},
        "samples": {
            name: [round(value, 2) for value in values] for name, values in figures.samples.items()
        },
    }


def _table(figures: Mapping[str, Figures]) -> str:
    from flashlite.evaluate.speed import ratios

    peers = [name for name in figures if name != OURS]
    faster = ratios(figures, OURS)
    rows: list[Sequence[str]] = []
    for measure, speed in figures[OURS].medians.items():
        theirs = [f"{figures[name].medians[measure]:.1f}" for name in peers]
        times = [f"{faster[measure][name]:.2f}" for name in peers]
        rows.append([f"{measure} tokens/s", f"{speed:.1f}", *theirs, *times])
    blank = [""] * len(peers)
    rows.append(["open s", *(f"{f.open_seconds:.2f}" for f in figures.values()), *blank])
    rows.append(["peak RSS", *(format_size(f.peak_bytes) for f in figures.values()), *blank])
    return output.table(rows, ["", *figures, *(f"x {name}" for name in peers)])
