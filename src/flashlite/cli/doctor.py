"""`flashlite doctor`: what this machine has, and what would be missing."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

import click

from flashlite import paths
from flashlite.cli import output
from flashlite.errors import FlashliteError
from flashlite.runtime.memory import MemoryPlan, format_size, parse_size

__all__ = ["command"]

_EXTRAS = {"serve": "starlette", "compiler": "ziglang", "h5": "h5py", "hub": "huggingface_hub"}


@click.command()
@click.argument("model", required=False)
@click.option("--max-mem", metavar="SIZE", help="Keep within 2GB, 1.5GiB, 500MB ...")
@click.option(
    "--max-sequence-length",
    type=int,
    help="Tokens of prompt and answer together.  [default: the model's context]",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Conversations answered at the same time.",
)
@click.option("--threads", type=int, help="[default: one per core]")
@output.json_option
def command(
    model: str | None,
    max_mem: str | None,
    max_sequence_length: int | None,
    max_sequences: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check this machine: CPU, compiler, folders, memory, extras.

    With MODEL, also what it would hold in memory, term by term; its weights are not read.

    Exit code 1 when a model could not be compiled and run here.

    \b
    Example:
      flashlite doctor smollm2-135m-instruct --max-mem 500MB
    """
    report, problems = _examine()
    plan = None
    if model is not None:
        try:
            plan = _plan(model, max_mem, max_sequence_length, max_sequences, threads)
        except FlashliteError as error:
            problems.append(str(error))
    if as_json:
        memory = {} if plan is None else {"memory": plan.to_json()}
        output.emit(report | memory | {"problems": problems})
    else:
        width = max(map(len, report))
        for name, value in report.items():
            click.echo(f"{name:<{width}}  {value}")
        if plan is not None:
            click.echo(_ledger(plan))
        for problem in problems:
            click.echo(f"problem: {problem}")
        click.echo("ready" if not problems else f"{len(problems)} to mend")
    if problems:
        raise click.exceptions.Exit(1)


def _plan(
    model: str, max_mem: str | None, length: int | None, sequences: int, threads: int | None
) -> MemoryPlan:
    """What a model on this machine would hold.

    Raises:
        FlashliteError: it is not here, or it does not fit.
    """
    from flashlite.codegen.target import host_target
    from flashlite.runtime.model import plan_model
    from flashlite.runtime.prepare import find_artifact

    _, _, plan = plan_model(
        find_artifact(model, offline=True),
        host_target(),
        ceiling=None if max_mem is None else parse_size(max_mem),
        wanted=length,
        threads=threads,
        max_sequences=sequences,
    )
    return plan


def _ledger(plan: MemoryPlan) -> str:
    """The terms as a table, their sum and what it is for."""
    rows = [(name, format_size(size)) for name, size in plan.terms.items()]
    limit = "" if plan.max_mem is None else f" of {format_size(plan.max_mem)}"
    rows.append(("total", format_size(plan.total) + limit))
    lines = [
        output.table(rows, ["memory", "at most"]),
        f"context {plan.context} tokens; {plan.ledger.sequences} sequences share {plan.arena}",
    ]
    return "\n".join(lines + ([plan.note] if plan.note else []))


def _examine() -> tuple[dict[str, Any], list[str]]:
    from flashlite.codegen.target import host_target
    from flashlite.codegen.toolchain import find_compiler
    from flashlite.runtime.engine import default_threads
    from flashlite.runtime.process import free_memory

    report: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": default_threads(),
    }
    problems: list[str] = []
    try:
        target = host_target()
        report["instruction_set"] = target.isa
        report["compiler"] = find_compiler(target).version
    except FlashliteError as error:
        problems.append(str(error))
    report["models"] = str(paths.models_dir())
    report["cache"] = str(paths.cache_dir())
    free = shutil.disk_usage(_existing(paths.data_dir())).free
    report["free_disk_bytes"] = free
    report["free_memory_bytes"] = free_memory()
    for extra, module in _EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        report[f"extra_{extra}"] = "installed" if installed else f"pip install 'flashlite[{extra}]'"
    return report, problems


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
