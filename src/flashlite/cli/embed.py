"""`flashlite embed`: texts in, one vector of each out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashlite.cli import options, output
from flashlite.errors import ContextOverflow, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["command"]


@click.command()
@click.argument("model", default="all-minilm-l6-v2")
@click.option("-p", "--prompt", "prompts", multiple=True, help="A text; repeatable.")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="A text on each line of this file; `-` reads stdin.",
)
@click.option("--truncate", is_flag=True, help="Cut texts that are too long, and say how many.")
@click.option("--threads", type=int, help="[default: one per core]")
@click.option("--max-mem", metavar="SIZE", help="Keep within 2GB, 1.5GiB, 500MB ...")
@click.option(
    "--preset",
    type=click.Choice(["import", "hybrid", "q8", "q4"]),
    default="import",
    show_default=True,
    help="How to quantize a model that has no artifact yet.",
)
@click.option(
    "--isa", type=click.Choice(["amx", "avx512", "avx2", "plain"]), help="[default: best]"
)
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@output.json_option
def command(
    model: str,
    prompts: tuple[str, ...],
    file: Path | None,
    truncate: bool,
    threads: int | None,
    max_mem: str | None,
    preset: str,
    isa: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Turn texts into vectors with MODEL, an encoder.

    Prints one JSON list per text, of length 1 each: the product of two is their cosine.

    \b
    Examples:
      flashlite embed all-minilm-l6-v2 -p "A man is eating." -p "Someone eats."
      flashlite embed all-minilm-l6-v2 --file sentences.txt --json > vectors.json
    """
    from flashlite.runtime.encoder import load_encoder

    texts = [*prompts, *(_lines(file) if file is not None else [])]
    if not texts:
        raise UsageError("there is no text; give -p TEXT or --file FILE")
    with options.stages() as progress:
        encoder = load_encoder(
            model,
            max_mem=max_mem,
            threads=threads,
            preset=preset,
            offline=offline,
            isa=isa,
            progress=progress,
        )
    with encoder, output.progress("embed") as report:
        start = time.perf_counter()
        try:
            found = encoder.tokenize(texts, truncate=truncate)
        except ContextOverflow as error:
            raise ContextOverflow(
                error.tokens, error.limit, "split the text, or cut it with --truncate"
            ) from None
        vectors = []
        for first in range(0, len(texts), _TOGETHER):
            report(first, len(texts))
            vectors.append(encoder.embed_ids(found.ids[first : first + _TOGETHER]))
        seconds = time.perf_counter() - start
    if found.truncated:
        output.note(f"{len(found.truncated)} of {len(texts)} texts were cut")
    rows = [row for part in vectors for row in _numbers(part)]
    if not as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    output.emit(
        {
            "model": encoder.name,
            "dimension": encoder.dimension,
            "tokens": sum(map(len, found.ids)),
            "truncated": list(found.truncated),
            "seconds": round(seconds, 6),
            "peak_memory_bytes": options.peak_memory(),
            "vectors": rows,
        }
    )


_TOGETHER = 1024  # texts between two reports of progress


def _lines(file: Path) -> list[str]:
    """The lines of a file, line ends left out.

    Raises:
        UsageError: it is not UTF-8.
    """
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 at byte {error.start}") from None


def _numbers(vectors: NDArray[np.float32]) -> list[list[float]]:
    """Nine digits are all that a float32 holds."""
    return [[float(f"{value:.9g}") for value in row] for row in vectors.tolist()]
