"""What a machine can do at most: bytes read per second, and integer products per second.

A bare sum over more memory than any cache holds, and a loop of independent dot products on
registers alone (`csrc/fl_limits.c`): nothing a model does is faster, so their share says how much
is left to gain.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import numpy as np

from flashlite.codegen.target import Target
from flashlite.codegen.toolchain import build_limits

__all__ = ["READ_BYTES", "best_time", "dot_rate", "gather_rate", "read_rate"]

READ_BYTES = 128 << 20  # more than the caches of most machines
_SPAN = 0.01  # seconds
_DOT_ROUNDS = 100_000
_PIECE, _PIECES = 256, 20_000


def best_time(work: Callable[[int], object], threads: int, seconds: float) -> float:
    """Seconds of the fastest round of `work(thread)` on all threads at once.

    A round repeats the work for at least 10 ms, beside which the moments that threads need to
    start together are short.
    """
    work(0)
    begun = time.perf_counter()
    work(0)
    repeats = 1 + int(_SPAN / max(time.perf_counter() - begun, 1e-7))
    best, end = float("inf"), time.perf_counter() + seconds
    barrier = threading.Barrier(threads)
    spans = [(0.0, 0.0)] * threads
    running = True

    def loop(thread: int) -> None:
        nonlocal best, running
        while running:
            barrier.wait()
            start = time.perf_counter()
            for _ in range(repeats):
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
    return best / repeats


def read_rate(
    target: Target, threads: int, *, nbytes: int = READ_BYTES, seconds: float = 0.5
) -> float:
    """GB/s of a bare sum over `nbytes`, shared out among the threads.

    Raises:
        CompileError: no compiler, or it failed.
    """
    read = ctypes.CDLL(str(build_limits(target))).fl_limit_read
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    data = [np.ones(nbytes // 8 // threads, np.uint64) for _ in range(threads)]
    best = best_time(lambda i: read(data[i].ctypes.data, data[i].size), threads, seconds)
    return sum(a.nbytes for a in data) / best / 1e9


def gather_rate(target: Target, threads: int, *, seconds: float = 0.5) -> float:
    """GB/s of pieces of 256 bytes that lie anywhere in `READ_BYTES`.

    Raises:
        CompileError: no compiler, or it failed.
    """
    gather = ctypes.CDLL(str(build_limits(target))).fl_limit_gather
    gather.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_size_t)
    gather.restype = ctypes.c_uint64
    data = np.ones(READ_BYTES // 8, np.uint64)
    bits = (READ_BYTES // _PIECE).bit_length() - 1
    best = best_time(lambda _: gather(data.ctypes.data, bits, _PIECES), threads, seconds)
    return threads * _PIECES * _PIECE / best / 1e9


def dot_rate(target: Target, threads: int, *, seconds: float = 0.5) -> float | None:
    """GMAC/s of the integer product that the target's kernels are made of, with nothing else in
    its way; None where its instruction set has none.

    Raises:
        CompileError: no compiler, or it failed.
    """
    dots = ctypes.CDLL(str(build_limits(target))).fl_limit_dots
    dots.argtypes, dots.restype = (ctypes.c_uint64,), ctypes.c_uint64
    if not (macs := int(dots(_DOT_ROUNDS))):
        return None
    return threads * macs / best_time(lambda _: dots(_DOT_ROUNDS), threads, seconds) / 1e9
