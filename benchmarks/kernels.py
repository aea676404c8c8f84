"""Speed of the kernel tables of this machine, on the shapes of SmolLM2-135M.

    python benchmarks/kernels.py [--threads 2] [--seconds 1] [--tables avx2,plain-native]

Prints, per table, the GB/s at which gemv (decode) reads weights that do not fit the caches, beside
the rate of a bare read in the same run, and the GMAC/s of gemm (prefill) with 512 tokens. Each
figure is the best of many short runs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "csrc"))
import itertools

import kernel_harness as h

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # qkv, out, gate and up, down
TOKENS = 512
HEAD_DIM, QUERIES, CONTEXT = 64, 3, 1024
READ = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *p, size_t n) {
    uint64_t s[32] = {0};
    for (size_t i = 0; i + 32 <= n; i += 32) for (size_t j = 0; j < 32; j++) s[j] += p[i + j];
    for (size_t j = 1; j < 32; j++) s[0] += s[j];
    return s[0];
}
"""


def best_time(work: Callable[[int], object], threads: int, seconds: float) -> float:
    """Seconds of the fastest round of `work(thread)` on all threads at once."""
    best, end = float("inf"), time.perf_counter() + seconds
    barrier = threading.Barrier(threads)
    spans = [(0.0, 0.0)] * threads
    running = True

    def loop(thread: int) -> None:
        nonlocal best, running
        while running:
            barrier.wait()
            start = time.perf_counter()
            work(thread)
            spans[thread] = start, time.perf_counter()
            if barrier.wait() == 0:
                best = min(best, max(b for _, b in spans) - min(a for a, _ in spans))
                running = time.perf_counter() < end
            barrier.wait()

    pool = [threading.Thread(target=loop, args=(i,)) for i in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return best


def random_packed(rng: np.random.Generator, format: str, rows: int, cols: int) -> h.Linear:
    """Random bytes in the packed layout; the true codes are left out."""
    blocks, groups = rows // h.BLOCK_ROWS, cols // h.GROUP
    size = 512 if format == "q8" else 256
    codes = h.aligned((blocks, groups, size), np.uint8)
    codes[...] = rng.integers(0, 256, (groups, size), np.uint8)
    halves = []
    for _ in range(2):
        half = h.aligned((blocks, groups, 16), np.float16)
        half[...] = rng.normal(0, 0.02, (groups, 16))
        halves.append(half)
    none = np.broadcast_to(np.int32(0), (rows, cols))
    return h.Linear(format, none, halves[0], halves[1], (codes, *halves))


def read_rate(directory: Path, threads: int, seconds: float) -> float:
    """GB/s of a bare sum over 128 MB per thread."""
    library = directory / "read.so"
    if not library.exists():
        h.compile_c([], library, ["-march=native", "-fPIC", "-shared"], text=READ)
    read = ctypes.CDLL(str(library)).read_all
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    data = [np.ones(16 << 20, np.uint64) for _ in range(threads)]
    best = best_time(lambda i: read(data[i].ctypes.data, data[i].size), threads, seconds)
    return sum(a.nbytes for a in data) / best / 1e9


def shares(blocks: int, threads: int) -> list[tuple[int, int]]:
    cuts = [blocks * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(cuts))


def gemv_rate(kernels: h.Kernels, format: str, threads: int, seconds: float) -> float:
    """GB/s of packed weights."""
    rng = np.random.default_rng(0)
    w = random_packed(rng, format, 160 * 1024, 576)
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
                kv,
                queries,
                q.ctypes.data,
                first.ctypes.data,
                last.ctypes.data,
                scratch.ctypes.data,
            )

    return best_time(work, 1, seconds) / 20 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tables", default=",".join(n for n, t in h.TABLES.items() if not t.fp32))
    parser.add_argument("--formats", default=",".join(h.FORMATS))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for name in options.tables.split(","):
            reason = h.missing(h.TABLES[name])
            if reason:
                print(f"{name}: skipped, {reason}")
                continue
            kernels = h.build(name, directory)
            figures = results[name] = {}
            for threads in sorted({1, options.threads}):
                figures[f"read_gb_s@{threads}"] = read_rate(directory, threads, options.seconds)
                for format in options.formats.split(","):
                    rate = gemv_rate(kernels, format, threads, options.seconds)
                    figures[f"gemv_{format}_gb_s@{threads}"] = rate
                    for tokens in (3, 6, TOKENS):
                        rate = gemm_rate(kernels, format, tokens, threads, options.seconds)
                        figures[f"gemm_{format}_n{tokens}_gmac_s@{threads}"] = rate
            for queries in (QUERIES, 30):
                time_us = attend_time(kernels, queries, options.seconds)
                figures[f"attend_{queries}x{CONTEXT}_us"] = time_us
            for measure, value in figures.items():
                print(f"{name:14} {measure:28} {value:9.1f}", flush=True)
    print(json.dumps({"kernels": results}))


if __name__ == "__main__":
    main()
