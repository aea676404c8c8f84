"""What a body of so many bits per weight loses: ours, uniform, a fixed preset, llama.cpp.

    python benchmarks/curve.py                                   # analyzes Gemma-3-270M first
    python benchmarks/curve.py --config sensitive_layers.json    # whatever model that is of

KL divergence from the source in nats per token, on wikitext-2 valid, which nothing is fitted to.
The head and the look-up table are the source's in every column, so that only the layers' matrices
differ. Columns, at equal bytes of these matrices:

    flashlite    formats by knapsack, GPTQ and coordinate descent, then swaps by the KL of the
                 analysis's own held-back text
    uniform      one format, scales searched; between two formats, layers spread evenly over both
    edges        the first and the last eighth of the layers in a finer format
    llama.cpp    the same source requantized, every GGUF type whose body is no larger than ours

A file on a coarse grid (Q5_0, Q4_1 ...) loses nothing in a format that contains the grid: above its
own bits per weight a curve says more about the file than about the method.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import common
from common import GEMMA, OURS, Gate, Row
from flashlite.analyze.analysis import Analysis
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.cli.budget import read_config
from flashlite.compress.allocate import Item, Point, allocate, least_cost
from flashlite.compress.carry_out import gains_of
from flashlite.compress.differential import items_of, polish, split_sequences
from flashlite.compress.gptq import weights_of
from flashlite.compress.quantize import CODES, quantize_matrix
from flashlite.compress.roundings import stored_bytes
from flashlite.compress.tensors import kept_grid
from flashlite.compress.walk import Rounded, Rounding, quantize_layers
from flashlite.compress.workspace import Workspace
from flashlite.evaluate.held_back import HeldBack
from flashlite.evaluate.peers import PEERS, peer_python
from flashlite.model.families import describe
from flashlite.model.source import SourceModel

__all__ = ["BITS", "GGUF_TYPES", "body_items", "edges", "uniform"]

Weights = Callable[[str], NDArray[np.float32]]

BITS = (4.5, 5.0, 5.5, 6.0, 7.0, 8.25)
GGUF_TYPES = {  # the numbers of llama.cpp's llama_ftype
    "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q6_K": 18,
}  # fmt: skip
_UNIFORM = Gate(0.75, less=True)  # of the uniform KL at the same bytes
_EDGES = Gate(0.85, less=True)
_PEER = Gate(1.0, less=True)
_REQUANTIZE = """
import sys
import llama_cpp.llama_cpp as llama
source, target, kind, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
params = llama.llama_model_quantize_default_params()
params.ftype, params.nthread, params.allow_requantize = kind, threads, True
sys.exit(llama.llama_model_quantize(source.encode(), target.encode(), params))
"""


@dataclass(frozen=True)
class Body:
    """The matrices of the layers, and the bytes of each in each format."""

    source: SourceModel
    shapes: Mapping[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        """How many weights."""
        return sum(rows * cols for rows, cols in self.shapes.values())

    def bytes(self, formats: Mapping[str, str]) -> int:
        """Of the body under these formats, by tensor."""
        return sum(stored_bytes(shape, formats[name]) for name, shape in self.shapes.items())

    def bits(self, size: float) -> float:
        """Per weight."""
        return 8 * size / self.parameters


def body_of(source: SourceModel) -> Body:
    """Of a described model."""
    shapes = {
        name: (shape[0], shape[1])
        for name, shape in source.spec.shapes()
        if len(shape) == 2 and name.startswith("layers.")
    }
    return Body(source, shapes)


def body_items(items: Sequence[Item]) -> list[Item]:
    """Those of the layers."""
    return [item for item in items if item.name.startswith("layers.")]


def alike(body: Body, fmt: str) -> dict[str, str]:
    """Every matrix in one format."""
    return {name: fmt for name in body.shapes}  # noqa: C420 - keeps the type


def ladder(body: Body) -> list[str]:
    """The formats, smallest first."""
    return sorted(CODES, key=lambda fmt: body.bytes(alike(body, fmt)))


def uniform(body: Body, budget: float) -> dict[str, str]:
    """One format for everything; what is left of the budget makes layers, spread evenly over the
    model, one format finer.
    """
    steps = ladder(body)
    sizes = [body.bytes(alike(body, fmt)) for fmt in steps]
    at = max((i for i, size in enumerate(sizes) if size <= budget), default=0)
    formats = alike(body, steps[at])
    if at + 1 == len(steps):
        return formats
    return _refine(body, formats, steps[at + 1], _spread(body.source.spec.n_layers), budget)


def edges(body: Body, budget: float) -> dict[str, str]:
    """The first and the last eighth of the layers as fine as the budget allows over one coarser
    format for the rest, which takes what is left evenly.
    """
    steps = ladder(body)
    n = body.source.spec.n_layers
    eighth = max(1, round(n / 8))
    outer = [*range(eighth), *range(n - eighth, n)]
    best = alike(body, steps[0])
    for low in range(len(steps)):
        for high in range(low + 1, len(steps)):
            formats = {
                name: steps[high if int(name.split(".")[1]) in outer else low]
                for name in body.shapes
            }
            if body.bytes(best) < body.bytes(formats) <= budget:
                best = formats
    finer = steps[min(len(steps) - 1, steps.index(best[f"layers.{n // 2}.q"]) + 1)]
    return _refine(body, best, finer, [i for i in _spread(n) if i not in outer], budget)


def _refine(
    body: Body, formats: dict[str, str], finer: str, order: Sequence[int], budget: float
) -> dict[str, str]:
    """Make matrices finer, layer after layer, while they fit."""
    found, size = dict(formats), body.bytes(formats)
    for i in order:
        for name in body.shapes:
            if int(name.split(".")[1]) != i:
                continue
            more = stored_bytes(body.shapes[name], finer)
            more -= stored_bytes(body.shapes[name], found[name])
            if more > 0 and size + more <= budget:
                found[name], size = finer, size + more
    return found


def _spread(n: int) -> list[int]:
    """0..n-1 so that each beginning of the list is spread evenly (golden ratio)."""
    return sorted(range(n), key=lambda i: (i * 0.6180339887498949) % 1)


class Measured:
    """Weights of candidates and their KL on the test text and on the held-back text."""

    def __init__(
        self, source: SourceModel, text: Sequence[NDArray[np.int32]], positions: int
    ) -> None:
        self.source = source
        self._tables: dict[str, NDArray[np.float32]] = {}
        self.test = HeldBack(source.spec, self.original, text, positions=positions)

    def original(self, name: str) -> NDArray[np.float32]:
        """A tensor of the source; the large ones are kept."""
        if name not in ("embed", "head"):
            return self.source.tensor(name)
        if name not in self._tables:
            self._tables[name] = self.source.tensor(name)
        return self._tables[name]

    def plain(self, formats: Mapping[str, str]) -> Weights:
        """Rounded to scales that are searched matrix by matrix: what a fixed preset stores."""

        def get(name: str) -> NDArray[np.float32]:
            original = self.original(name)
            if name not in formats:
                return original
            kept = kept_grid(self.source, name, formats[name])  # type: ignore[arg-type]
            matrix = kept or quantize_matrix(original, formats[name], name=name)
            return weights_of(matrix, original.shape[1])

        return get

    def replaced(self, get: Weights, names: Sequence[str]) -> Weights:
        """These tensors from elsewhere."""
        return lambda name: get(name) if name in names else self.original(name)


def round_all(
    analysis: Analysis, source: SourceModel, folder: Path, prefix: Mapping[str, str]
) -> tuple[Workspace, dict[str, Rounded]]:
    """Every matrix in every format; later layers are rounded for those of `prefix`, by unit."""
    units = {name: unit.name for unit in analysis.units for name in unit.tensors}
    formats = {
        name: [prefix[unit], *(fmt for fmt in CODES if fmt != prefix[unit])]
        for name, unit in units.items()
        if name.startswith("layers.")
    }
    fit, held = split_sequences(analysis.calibration)
    store = Workspace(folder)
    found: dict[str, Rounded] = {}
    layers = quantize_layers(
        source.spec,
        source.tensor,
        formats,
        fit,
        held,
        rounding=Rounding(),
        keep=lambda name, fmt: kept_grid(source, name, fmt),  # type: ignore[arg-type]
        done=store.layer,
        progress=common.progress,
    )
    for i, layer in enumerate(layers):
        store.save(i, layer)
        found |= {rounded.name: rounded for rounded in layer}
    return store, found


def ours(
    analysis: Analysis, body: Body, store: Workspace, rounded: Mapping[str, Rounded],
    budget: float, measured: Measured, held: HeldBack, seconds: float,
) -> tuple[Point, Weights]:  # fmt: skip
    """The allocation at one budget, polished, and its weights."""
    spec = body.source.spec
    items = body_items(items_of(analysis, spec, gains=gains_of(analysis, rounded)))
    units = {name: unit.name for unit in analysis.units for name in unit.tensors}

    def weights(formats: Mapping[str, str]) -> Weights:
        def get(name: str) -> NDArray[np.float32]:
            return store.weights(name, formats[units[name]], body.shapes[name][1])

        return measured.replaced(get, list(body.shapes))

    point = allocate(items, budget)
    if seconds:
        done = polish(items, point, lambda formats: held(weights(formats)), seconds=seconds)
        point = Point(done.cost, point.kl, done.formats)
    return point, weights(point.formats)


def requantized(source: Path, kind: str, folder: Path, threads: int) -> Path:
    """The file that llama.cpp makes of the source."""
    target = folder / f"{kind}.gguf"
    command = [peer_python(PEERS["llama.cpp"], common.note), "-c", _REQUANTIZE, source, target]
    words = [*map(str, command), str(GGUF_TYPES[kind]), str(threads)]
    subprocess.run(words, check=True, capture_output=True)
    return target


def analyzed(model: str) -> Path:
    """The analysis of a model, made on first use and kept beside the results."""
    path = common.RESULTS / f"{model}.analysis.json"
    if not path.is_file():
        common.RESULTS.mkdir(exist_ok=True)
        common.note(f"analyzing {model}, once")
        words = ["analyze", model, "-o", str(path), "--accept-license"]
        subprocess.run([sys.executable, "-m", "flashlite", *words], check=True)
    return path


def windows(model: str, source: SourceModel, count: int, size: int) -> list[NDArray[np.int32]]:
    """Text of wikitext-2 valid, each window from position 0 and begun as the model asks."""
    from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked

    place = os.environ.get("FLASHLITE_DATA")
    if place is None:
        raise SystemExit("FLASHLITE_DATA does not say where wikitext-2/valid.txt lies")
    files = build_tokenizer_checked(source.checkpoint)
    text = Path(place, "wikitext-2/valid.txt").read_text(encoding="utf-8")
    ids = Tokenizer(files, name=model).encode(text[: count * size * 8])
    begin = [files.tokens.bos] if files.tokens.add_bos and files.tokens.bos is not None else []
    step = size - len(begin)
    return [np.array([*begin, *ids[i * step : (i + 1) * step]], np.int32) for i in range(count)]


def main() -> None:
    parser = common.make_parser(__doc__, peers="llama.cpp", rounds=1, isa=False)
    parser.add_argument("--config", type=Path, help="what analyze wrote [default: made once]")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="[default: %(default)s]")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens [default: 4]")
    parser.add_argument("--positions", type=int, default=1024, help="scored [default: 1024]")
    parser.add_argument("--polish", type=float, default=0, help="seconds per point [default: 0]")
    parser.add_argument("--prefix", type=float, default=5.0, help="bits rounded for [default: 5]")
    parser.add_argument("--work", type=Path, help="keep matrices here, to go on from")
    options = common.arguments(parser)
    analysis = read_config(options.config or analyzed(GEMMA))
    path = pull(analysis.model.name, accept_license=True).path
    source = describe(open_checkpoint(path))
    body = body_of(source)
    measured = Measured(
        source, windows(analysis.model.name, source, options.windows, 512), options.positions
    )
    _, held_ids = split_sequences(analysis.calibration)
    held = HeldBack(source.spec, measured.original, held_ids, positions=512)
    bits = [float(word) for word in options.bits.split(",")]
    items = body_items(items_of(analysis, source.spec))
    curves: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, size: float, weights: Weights) -> float:
        kl = measured.test(weights)
        curves.setdefault(name, []).append((body.bits(size), kl))
        common.note(f"{name} {body.bits(size):.3f} bits: KL {kl:.5f}")
        return kl

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch) / "work"
        start = time.perf_counter()
        first = allocate(items, max(options.prefix * body.parameters / 8, least_cost(items)))
        store, rounded = round_all(analysis, source, folder, first.formats)
        seconds = time.perf_counter() - start
        common.note(f"rounded in every format: {seconds:.0f} s")
        rows = []
        for bit in bits:
            # Columns padded to whole groups may make the smallest body larger than its bits say.
            budget = max(bit * body.parameters / 8, least_cost(items))
            point, weights = ours(
                analysis, body, store, rounded, budget, measured, held, options.polish
            )
            mine = note(OURS, point.cost, weights)
            for name, choose, gate in (("uniform", uniform, _UNIFORM), ("edges", edges, _EDGES)):
                formats = choose(body, budget)
                theirs = note(name, body.bytes(formats), measured.plain(formats))
                rows.append(_row(f"{bit} bits", mine, name, theirs, gate))
        rows += list(_peer_rows(options, path, body, measured, curves, note, Path(scratch)))
    common.finish(
        "curve",
        options,
        rows,
        model=analysis.model.name,
        positions=measured.test.positions,
        rounding_seconds=seconds,
        curves={
            name: {"bits": [x for x, _ in sorted(c)], "kl": [y for _, y in sorted(c)]}
            for name, c in curves.items()
        },
    )


def _peer_rows(
    options: argparse.Namespace, path: Path, body: Body, measured: Measured,
    curves: Mapping[str, list[tuple[float, float]]],
    note: Callable[[str, float, Weights], float], scratch: Path,
) -> Iterator[Row]:  # fmt: skip
    """Each GGUF type against the largest of our points that is no larger."""
    if "llama.cpp" not in options.peers:
        return
    for kind in GGUF_TYPES:
        target = requantized(path, kind, scratch, options.threads)
        theirs = describe(open_checkpoint(target))
        names = list(body.shapes)
        size = sum(theirs.checkpoint.info(theirs.sources[name].name).nbytes for name in names)
        kl = note("llama.cpp", size, measured.replaced(theirs.tensor, names))
        target.unlink()
        below = [(x, y) for x, y in curves[OURS] if x <= body.bits(size) * 1.002]
        if below:
            at, mine = max(below)
            yield _row(
                f"{kind}, {body.bits(size):.2f} bits (ours {at:.2f})", mine, "llama.cpp", kl, _PEER
            )


def _row(measure: str, mine: float, name: str, theirs: float, gate: Gate) -> Row:
    ratio = mine / theirs if theirs > 0 else 1.0
    return Row(measure, "nats", mine, {name: theirs}, name, ratio, gate)


if __name__ == "__main__":
    main()
