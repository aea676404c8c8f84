"""What every verb prints with: one JSON object, tables, sizes, progress.

Answers go to stdout; notes and bars go to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from flashlite.cli.language import translate

__all__ = ["count", "emit", "json_option", "note", "printable", "progress", "table", "write_json"]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on the last line of stdout."
)


def emit(data: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of stdout; NaN and infinities are refused."""
    click.echo(json.dumps(data, allow_nan=False, default=str))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write one JSON object; the file is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def note(text: str) -> None:
    """Say something beside the answer, on stderr, in the user's language."""
    click.echo(translate(text), err=True)


def printable(text: str) -> str:
    """`text` without what would steer a terminal: names in model files are not trusted."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def count(n: float) -> str:
    """A number of things in decimal units: `134.5 M`."""
    for unit in ("", " k", " M"):
        if abs(n) < 1000:
            return f"{n:.0f}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f} B"


def table(rows: Sequence[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Lay out rows in columns; numbers and sizes keep to the right.

    Args:
        rows: the cells; every row as long as the first.
        headers: one per column, or none.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    lines = [list(headers), *cells] if headers else cells
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [
        bool(cells) and all(row[i][:1].isdigit() or not row[i] for row in cells)
        for i in range(len(widths))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, for work of more than two seconds, on a terminal only.

    Example:
        with progress("pull smollm2-135m-instruct") as report:
            report(done, total)
    """
    if not sys.stderr.isatty():
        yield _nothing
        return
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
    with tqdm(desc=label, total=1, bar_format=layout, delay=2, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _nothing(done: int, total: int) -> None:
    """Progress nobody watches."""
