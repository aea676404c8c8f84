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

__all__ = ["command"]

_EXTRAS = {"serve": "starlette", "compiler": "ziglang", "hub": "huggingface_hub"}


@click.command()
@output.json_option
def command(as_json: bool) -> None:
    """Check this machine: CPU, compiler, folders, memory, extras.

    Exit code 1 when a model could not be compiled and run here.
    """
    report, problems = _examine()
    if as_json:
        output.emit(report | {"problems": problems})
    else:
        width = max(map(len, report))
        for name, value in report.items():
            click.echo(f"{name:<{width}}  {value}")
        for problem in problems:
            click.echo(f"problem: {problem}")
        click.echo("ready" if not problems else f"{len(problems)} to mend")
    if problems:
        raise click.exceptions.Exit(1)


def _examine() -> tuple[dict[str, Any], list[str]]:
    from flashlite.codegen.target import host_target
    from flashlite.codegen.toolchain import find_compiler
    from flashlite.runtime.engine import default_threads

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
    for extra, module in _EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        report[f"extra_{extra}"] = "installed" if installed else f"pip install 'flashlite[{extra}]'"
    return report, problems


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
