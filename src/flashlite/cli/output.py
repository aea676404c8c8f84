"""What every verb prints with: one JSON object, tables, sizes, progress.

Answers go to stdout; notes and bars go to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

__all__ = ["count", "json_option", "note", "print_json", "size", "stage_progress", "table"]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on the last line of stdout."
)


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of stdout; NaN and infinities are refused."""
    click.echo(json.dumps(data, ensure_ascii=False, allow_nan=False, default=str))


def note(text: str) -> None:
    """Say something beside the answer, on stderr."""
    click.echo(text, err=True)


def size(n_bytes: float) -> str:
    """Bytes in decimal units: `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


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
    cells = [[str(cell) for cell in row] for row in rows]
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
def stage_progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr for work of more than two seconds; on a terminal only, one stage at a time.

    Args:
        quiet: draw nothing.

    Example:
        with stage_progress() as report:
            report("pull", done, total)
    """
    bars = _Bars()
    try:
        yield _nothing if quiet or not sys.stderr.isatty() else bars.report
    finally:
        bars.close()


class _Bars:
    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def report(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            from tqdm import tqdm

            self.close()
            self._stage = stage
            layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
            self._bar = tqdm(desc=stage, total=total, bar_format=layout, delay=2, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _nothing(stage: str, done: int, total: int) -> None:
    """Progress nobody watches."""
