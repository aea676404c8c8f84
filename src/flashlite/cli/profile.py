"""`flashlite profile`: where the time of a compiled model goes, and what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashlite.cli import options, output
from flashlite.compress.machine_profile import BATCHES
from flashlite.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashlite.codegen.target import Target
    from flashlite.evaluate.profile import Line, Phase, Profile

__all__ = ["command"]

BUSY = 0.5  # load average from which figures are doubtful


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Length of the prompt.",
)
@click.option(
    "--decode", type=click.IntRange(1), default=64, show_default=True, help="Steps of decoding."
)
@click.option(
    "--depth",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Tokens stored before them.",
)
@click.option("--by-time", is_flag=True, help="The most expensive first, instead of in order.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Write every part of every step, for ui.perfetto.dev.",
)
@click.option(
    "--redundancy/--no-redundancy",
    default=True,
    show_default=True,
    help="Measure also how little each layer does.",
)
@click.option("--threads", type=click.IntRange(1, 64), help="[default: one per core]")
@click.option("--max-mem", metavar="SIZE", help="Keep within 2GB, 1.5GiB, 500MB ...")
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Times each."
)
@click.option(
    "--preset",
    type=click.Choice(["import", "hybrid", "q8", "q6", "q5", "q4"]),
    default="import",
    show_default=True,
    help="How to quantize a model that has no artifact yet.",
)
@click.option(
    "--isa", type=click.Choice(["amx", "avx512", "avx2", "plain"]), help="[default: best]"
)
@click.option(
    "--exact-head",
    is_flag=True,
    help="Compute every logit, also where the model has a split head.",
)
@click.option(
    "--machine",
    is_flag=True,
    help="Measure what this machine's kernels do per second, whatever the model.",
)
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="With --machine: where to write it, for quantize --target-latency.",
)
@output.json_option
def command(
    model: str,
    prompt_tokens: int,
    decode: int,
    depth: int,
    by_time: bool,
    trace: Path | None,
    redundancy: bool,
    threads: int | None,
    max_mem: str | None,
    rounds: int,
    preset: str,
    isa: str | None,
    exact_head: bool,
    machine: bool,
    file: Path | None,
    as_json: bool,
) -> None:
    """Measure where the time of MODEL goes: prefill and decoding, by part and by layer.

    Beside each time stand the bytes and the products that had to be done, and their share of what
    this machine reads and multiplies at most. 1-cos is how far a layer turns what it reads: a
    layer near 0 does little.

    \b
    Examples:
      flashlite profile smollm2-135m-instruct
      flashlite profile smollm2.fl --depth 2048 --by-time
      flashlite profile smollm2.fl --trace smollm2.json    # open it in ui.perfetto.dev
      flashlite profile --machine -o machine.json
    """
    from flashlite.codegen.target import host_target
    from flashlite.evaluate.machine import commit, describe_machine
    from flashlite.evaluate.profiling import profile_artifact
    from flashlite.evaluate.trace import trace_events
    from flashlite.runtime import prepare
    from flashlite.runtime.engine import default_threads
    from flashlite.runtime.memory import parse_size

    ceiling = None if max_mem is None else parse_size(max_mem)
    for path in (trace, file):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path.parent}: there is no such folder; make it, or write elsewhere")
    if file is not None and not machine:
        raise UsageError("-o is where --machine is written; give --machine too")
    surroundings = describe_machine()
    if (surroundings["load"] or 0) > BUSY:
        output.note(f"the machine is busy (load {surroundings['load']}): figures will be doubtful")
    if machine:
        _measure_machine(host_target(isa), threads, file, as_json=as_json)
        return
    with options.stages() as progress:
        artifact = prepare.find_artifact(model, preset=preset, progress=progress)
        profile = profile_artifact(
            artifact,
            host_target(isa),
            prompt_tokens=prompt_tokens,
            decode=decode,
            depth=depth,
            threads=default_threads() if threads is None else threads,
            rounds=rounds,
            max_mem=ceiling,
            exact_head=exact_head,
            redundancy=redundancy,
            progress=progress,
        )
    if trace is not None:
        output.write_json(trace, trace_events(profile))
    if profile.lost:
        output.note(f"{profile.lost} marks found no room: what they measured is missing")
    if as_json:
        from flashlite import __version__

        output.emit(
            {
                **profile.to_json(),
                "version": __version__,
                "commit": commit(),
                "machine": surroundings,
            }
        )
        return
    click.echo(_report(profile, by_time=by_time))


def _measure_machine(
    target: Target, threads: int | None, file: Path | None, *, as_json: bool
) -> None:
    from flashlite.evaluate.calibrate import measure_machine
    from flashlite.runtime.engine import default_threads

    counts = sorted({1, default_threads()}) if threads is None else [threads]
    with output.progress("measuring") as report:
        profile = measure_machine(target, counts, report)
    data = profile.to_json()
    if file is not None:
        output.write_json(file, data)
    if as_json:
        output.emit(data)
        return
    click.echo(f"{profile.cpu}, {profile.isa}")
    for rates in profile.rates:
        rows = [
            [
                fmt,
                _number(rates.gemv_gb_s[fmt]),
                *(_number(rates.gemm(fmt, tokens)) for tokens in BATCHES),
            ]
            for fmt in rates.gemv_gb_s
        ]
        dots = "" if rates.dot_gmac_s is None else f", products {rates.dot_gmac_s:.0f} GMAC/s"
        click.echo(f"\n{rates.threads} threads: memory {rates.read_gb_s:.1f} GB/s{dots}")
        headers = ["weights", "1 token GB/s", *(f"{tokens}: GMAC/s" for tokens in BATCHES)]
        click.echo(output.table(rows, headers))


def _report(profile: Profile, *, by_time: bool) -> str:
    dots = profile.dot_gmac_s
    lines = [
        f"{profile.model} on {profile.isa}, {profile.threads} threads; this machine reads "
        f"{profile.read_gb_s:.1f} GB/s"
        + (f" and multiplies {dots:.0f} GMAC/s" if dots is not None else "")
    ]
    for phase in (profile.prefill, profile.decode):
        lines += ["", _title(phase), _parts(profile, phase, by_time=by_time)]
    lines += ["", "By layer", _layers(profile, by_time=by_time)]
    return "\n".join(lines)


def _title(phase: Phase) -> str:
    what = (
        f"Prefill of {phase.tokens} tokens"
        if phase.name == "prefill"
        else f"Decoding after {phase.depth} tokens, {phase.tokens} steps"
    )
    return (
        f"{what}: {phase.normal * 1e6:,.1f} us per token, {1 / phase.normal:,.1f} tokens/s "
        f"({phase.overhead - 1:+.1%} while profiled)"
    )


def _parts(profile: Profile, phase: Phase, *, by_time: bool) -> str:
    found = phase.by_part()
    if by_time:
        found.sort(key=lambda line: -line.seconds)
    rows = [_row(profile, phase, line) for line in found]
    total = [sum(getattr(line, name) for line in found) for name in ("seconds", "waited")]
    rows.append(
        [
            "sum",
            f"{total[0] * 1e6:,.1f}",
            f"{total[0] / phase.seconds:.1%}",
            f"{total[1] / phase.seconds:.1%}",
            _number(sum(line.weight_bytes + line.kv_bytes for line in found) / 1e6),
            "",
            "",
            _number(sum(line.macs for line in found) / 1e6),
            "",
            "",
        ]
    )
    headers = [
        "",
        "us/token",
        "share",
        "wait",
        "MB",
        "GB/s",
        "of most",
        "MMAC",
        "GMAC/s",
        "of most",
    ]
    return output.table(rows, headers)


def _row(profile: Profile, phase: Phase, line: Line) -> Sequence[str]:
    read, dots = line.gb_s / profile.read_gb_s, None
    if profile.dot_gmac_s is not None and line.macs:
        dots = line.gmac_s / profile.dot_gmac_s
    moved = line.weight_bytes + line.kv_bytes
    return [
        line.part,
        f"{line.seconds * 1e6:,.1f}",
        f"{line.seconds / phase.seconds:.1%}",
        f"{line.waited / line.seconds:.1%}" if line.waited and line.seconds else "",
        _number(moved / 1e6) if moved else "",
        _number(line.gb_s) if moved else "",
        f"{read:.0%}" if moved else "",
        _number(line.macs / 1e6) if line.macs else "",
        _number(line.gmac_s) if line.macs else "",
        "" if dots is None else f"{dots:.0%}",
    ]


def _layers(profile: Profile, *, by_time: bool) -> str:
    prefill, decode = profile.prefill.by_layer(), profile.decode.by_layer()
    order = list(range(len(decode)))
    if by_time:
        order.sort(key=lambda i: -decode[i].seconds)
    rows = [
        [
            str(decode[i].layer),
            f"{prefill[i].seconds * 1e6:,.2f}",
            f"{prefill[i].seconds / profile.prefill.seconds:.1%}",
            f"{decode[i].seconds * 1e6:,.1f}",
            f"{decode[i].seconds / profile.decode.seconds:.1%}",
            _number(decode[i].weight_bytes / 1e6),
            _number(decode[i].gb_s),
            "" if profile.redundancy is None else f"{profile.redundancy[i]:.3f}",
        ]
        for i in order
    ]
    headers = ["layer", "prefill us", "share", "decode us", "share", "MB", "GB/s", "1-cos"]
    return output.table(rows, headers)


def _number(value: float) -> str:
    """Three digits, and all of those before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"
