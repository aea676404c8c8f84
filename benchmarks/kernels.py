"""How near the kernels come to what this machine can do, on the shapes of SmolLM2-135M.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --tables avx2,plain-native --formats q4m --seconds 0.5

Two limits are measured in the same run, with the same threads:

  read bandwidth  a bare sum over as many bytes as the weights have; gemv (decoding) is held to 85 %
  VNNI peak       a loop of independent vpdpbusd on registers alone; gemm (prefill) of 512 tokens is
                  held to 75 %

The shares are printed for the tables of CPUs with VNNI; all tables are printed with their GB/s and
GMAC/s. Each figure is the best of many short runs within --seconds; the median of --rounds counts.
Gates are for the best table measured, the one that models run on, with --threads
threads; the figures of one thread are printed beside.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import common
from common import Gate, Row
from flashlite.codegen.target import host_target
from flashlite.evaluate.limits import best_time, dot_rate, read_rate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "csrc"))
import kernel_harness as h

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # qkv, out, gate and up, down
TOKENS = 512
HEAD_DIM, QUERIES, CONTEXT = 64, 3, 1024
ROWS = 320 * 1024  # of the matrix that gemv reads: more than 100 MB in every format
VNNI_TABLES = ("amx", "avx512")  # best first
GATES = {"gemv": Gate(0.85), "gemm": Gate(0.75)}


def random_packed(rng: np.random.Generator, format: str, rows: int, cols: int) -> h.Linear:
    """Random bytes in the packed layout; the true codes are left out."""
    blocks, groups = rows // h.BLOCK_ROWS, cols // h.GROUP
    size = 512 if format == "q8" else 256 + 64 * h.HIGH_BITS[format]
    codes = h.aligned((blocks, groups, size), np.uint8)
    codes[...] = rng.integers(0, 256, (groups, size), np.uint8)
    halves = []
    for _ in range(2):
        half = h.aligned((blocks, groups, 16), np.float16)
        half[...] = rng.normal(0, 0.02, (groups, 16))
        halves.append(half)
    none = np.broadcast_to(np.int32(0), (rows, cols))
    return h.Linear(format, none, halves[0], halves[1], (codes, *halves))


def shares(blocks: int, threads: int) -> list[tuple[int, int]]:
    cuts = [blocks * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(cuts))


def gemv_rate(kernels: h.Kernels, w: h.Linear, threads: int, seconds: float) -> float:
    """GB/s of packed weights."""
    rng = np.random.default_rng(0)
    act = kernels.quantize(rng.normal(0, 1, (1, 576)).astype(np.float32))
    c_w, c_act, parts = w.c(), act.c(), shares(w.blocks, threads)
    y = [h.aligned((b - a) * h.BLOCK_ROWS, np.float32) for a, b in parts]

    def work(i: int) -> None:
        kernels.table.gemv(y[i].ctypes.data, c_w, *parts[i], c_act)

    return w.nbytes / best_time(work, threads, seconds) / 1e9


def gemm_rate(kernels: h.Kernels, format: str, tokens: int, threads: int, seconds: float) -> float:
    """GMAC/s over the matrices of one layer."""
    rng = np.random.default_rng(0)
    time_all, macs = 0.0, 0
    for rows, cols in SHAPES:
        w = random_packed(rng, format, rows, cols)
        act = kernels.quantize(rng.normal(0, 1, (tokens, cols)).astype(np.float32))
        y = h.aligned((tokens + h.TILE, rows), np.float32)
        panels = [h.aligned(w.groups * 1280 + 64, np.uint8) for _ in range(threads)]
        c_w, c_act, parts = w.c(), act.c(), shares(w.blocks, threads)

        def work(
            i: int,
            w: Any = c_w,
            act: Any = c_act,
            y: Any = y,
            rows: int = rows,
            parts: Any = parts,
            panels: Any = panels,
        ) -> None:
            at = y.ctypes.data + parts[i][0] * h.BLOCK_ROWS * 4
            kernels.table.gemm(at, rows, w, *parts[i], act, panels[i].ctypes.data)

        time_all += best_time(work, threads, seconds / len(SHAPES))
        macs += rows * cols * tokens
    return macs / time_all / 1e9


def attend_time(kernels: h.Kernels, queries: int, seconds: float) -> float:
    """Microseconds of one head over CONTEXT positions, one thread."""
    rng = np.random.default_rng(0)
    pages = h.Pages(rng, CONTEXT, HEAD_DIM)
    for position in range(CONTEXT):
        k, v = rng.normal(0, 1, (2, HEAD_DIM)).astype(np.float32)
        kernels.store_kv(pages, position, k, v)
    q = rng.normal(0, 0.3, (queries, HEAD_DIM)).astype(np.float32)
    out, scratch = np.empty_like(q), h.aligned(1 << 17, np.uint8)
    first, last = np.zeros(queries, np.int32), np.full(queries, CONTEXT - 1, np.int32)
    kv = pages.c()

    def work(_: int) -> None:
        for _ in range(20):
            kernels.table.attend(
                out.ctypes.data,
                None,
                kv,
                queries,
                q.ctypes.data,
                first.ctypes.data,
                last.ctypes.data,
                scratch.ctypes.data,
            )

    return best_time(work, 1, seconds) / 20 * 1e6


def measure(kernels: h.Kernels, options: Any, formats: list[str]) -> dict[str, float]:
    """Every figure of one table, once."""
    figures, seconds, target = dict[str, float](), options.seconds, host_target()
    for threads in sorted({1, options.threads}):
        if kernels.name in VNNI_TABLES:
            peak = dot_rate(host_target(kernels.name), threads, seconds=seconds)
            figures[f"vnni_peak_gmac_s@{threads}"] = peak or 0.0
        for format in formats:
            weights = random_packed(np.random.default_rng(0), format, ROWS, 576)
            for what, value in (
                (
                    f"read_{format}",
                    read_rate(target, threads, nbytes=weights.nbytes, seconds=seconds),
                ),
                (f"gemv_{format}", gemv_rate(kernels, weights, threads, seconds)),
            ):
                figures[f"{what}_gb_s@{threads}"] = value
            for tokens in (3, 6, TOKENS):
                rate = gemm_rate(kernels, format, tokens, threads, seconds)
                figures[f"gemm_{format}_n{tokens}_gmac_s@{threads}"] = rate
    for queries in (QUERIES, 30):
        figures[f"attend_{queries}x{CONTEXT}_us"] = attend_time(kernels, queries, seconds)
    return figures


def share_rows(
    table: str, figures: dict[str, list[float]], formats: list[str], threads: int, judge: bool
) -> list[Row]:
    """What gemv and gemm of a table reach of the machine's limits; median of the rounds' shares."""
    rows = []
    for n in sorted({1, threads}):
        for format in formats:
            for kernel, limit, unit, mine in (
                ("gemv", f"read_{format}_gb_s@{n}", "GB/s", f"gemv_{format}_gb_s@{n}"),
                ("gemm", f"vnni_peak_gmac_s@{n}", "GMAC/s", f"gemm_{format}_n{TOKENS}_gmac_s@{n}"),
            ):
                pairs = list(zip(figures[mine], figures[limit], strict=True))
                rows.append(
                    Row(
                        f"{kernel} {format} by {table}, {n} thread{'s' * (n > 1)}",
                        unit,
                        common.median(figures[mine]),
                        {"limit": common.median(figures[limit])},
                        "read bandwidth" if kernel == "gemv" else "VNNI peak",
                        common.median([ours / most for ours, most in pairs]),
                        GATES[kernel] if judge and n == threads else None,
                    )
                )
    return rows


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1, isa=False)
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure [default: 1]")
    tables = ",".join(n for n, t in h.TABLES.items() if not t.fp32)
    parser.add_argument("--tables", default=tables, metavar="NAMES", help=f"[default: {tables}]")
    formats = ",".join(h.FORMATS)
    parser.add_argument("--formats", default=formats, metavar="NAMES", help=f"[default: {formats}]")
    options = common.arguments(parser)
    chosen = options.formats.split(",")
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.tables.split(","):
            if name not in h.TABLES:
                parser.error(f"table {name!r} is unknown; known are {tables}")
            if reason := h.missing(h.TABLES[name]):
                common.note(f"{name}: skipped, {reason}")
                continue
            taken, kernels = results.setdefault(name, {}), h.build(name, Path(folder))
            for _ in range(options.rounds):
                for what, value in measure(kernels, options, chosen).items():
                    taken.setdefault(what, []).append(value)
            for what, values in taken.items():
                print(f"{name:14} {what:28} {common.median(values):9.1f}", flush=True)
    measured = [name for name in VNNI_TABLES if name in results]
    rows = [
        row
        for name in measured
        for row in share_rows(
            name, results[name], chosen, options.threads, judge=name == measured[0]
        )
    ]
    common.finish("kernels", options, rows, kernels=results)


if __name__ == "__main__":
    main()
