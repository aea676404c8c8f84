"""Compile kernel tables, call them through ctypes, and pack their operands with NumPy.

A `Table` names one instruction set; `build` compiles it alone into a shared library and returns
`Kernels`, whose methods take and return NumPy arrays. Everything here follows `fl_kernels.h`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK_ROWS",
    "FORMATS",
    "FUZZ",
    "FUZZ_ENTRY",
    "GROUP",
    "HIGH_BITS",
    "PAGE",
    "TABLES",
    "TALL_TILE",
    "TILE",
    "ZERO",
    "Activations",
    "Kernels",
    "Linear",
    "Pages",
    "Scalar",
    "Table",
    "aligned",
    "build",
    "compile_c",
    "fuzz_tables",
    "missing",
    "missing_sanitizers",
    "product",
    "quantize",
    "random_linear",
    "softmax_attention",
]

CSRC = Path(__file__).parents[2] / "src" / "flashlite" / "csrc"
CFLAGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-O3", "-ffp-contract=off", "-fno-math-errno")
AVX512 = ("f", "bw", "vl", "dq", "vnni")
EMULATION = Path(__file__).parent / "avx512_emulation"
AMX_EMULATION = Path(__file__).parent / "amx_emulation"
FUZZ = Path(__file__).parent / "fuzz"
FUZZ_ENTRY = tuple(
    FUZZ / f"{name}.c" for name in ("input", "entry", "matrices", "attention", "rows", "sampling")
)
GROUP, BLOCK_ROWS, TILE, TALL_TILE, PAGE = 32, 16, 6, 16, 32
FORMATS = {"q8": 0, "q4": 1, "q4m": 2, "q5": 3, "q6": 4}
HIGH_BITS = {"q4": 0, "q4m": 0, "q5": 1, "q6": 2}  # of codes, beside those that nibbles hold
ZERO = {"q8": 0, "q4": 8, "q4m": 0, "q5": 16, "q6": 32}  # the code of a weight that is zero

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


class Table(NamedTuple):
    """One table of kernels: where its source is, and what compiler and CPU it needs."""

    source: str
    symbol: str
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # names of /proc/cpuinfo
    fp32: bool = False


TABLES = {
    "plain": Table("fl_kernels_plain.c", "fl_kernels_plain"),
    "plain-native": Table("fl_kernels_plain.c", "fl_kernels_plain", ("-march=native",)),
    "fp32": Table("fl_kernels_fp32.c", "fl_kernels_fp32", fp32=True),
    "avx2": Table(
        "fl_kernels_avx2.c",
        "fl_kernels_avx2",
        ("-mavx2", "-mfma", "-mf16c"),
        ("avx2", "fma", "f16c"),
    ),
    "avx2-native": Table(
        "fl_kernels_avx2.c", "fl_kernels_avx2", ("-march=native",), ("avx2", "fma", "f16c")
    ),
    "avx512": Table(
        "fl_kernels_avx512.c",
        "fl_kernels_avx512",
        (*(f"-mavx512{part}" for part in AVX512), "-mfma", "-mf16c"),
        (*(f"avx512{part}" for part in AVX512[:4]), "avx512_vnni", "fma", "f16c"),
    ),
    "amx": Table(
        "fl_kernels_amx.c",
        "fl_kernels_amx",
        (*(f"-mavx512{part}" for part in AVX512), "-mfma", "-mf16c", "-mamx-tile", "-mamx-int8"),
        ("amx_tile", "amx_int8", "avx512_vnni", "fma", "f16c"),
    ),
    "avx512-emulated": Table(  # the same source, its intrinsics made of AVX2
        "fl_kernels_avx512.c",
        "fl_kernels_avx512",
        (f"-I{EMULATION}", "-mavx2", "-mfma", "-mf16c"),
        ("avx2", "fma", "f16c"),
    ),
    "amx-emulated": Table(  # the same source, its tiles made of arrays
        "fl_kernels_amx.c",
        "fl_kernels_amx",
        (f"-I{AMX_EMULATION}", *(f"-mavx512{part}" for part in AVX512), "-mfma", "-mf16c"),
        (*(f"avx512{part}" for part in AVX512[:4]), "avx512_vnni", "fma", "f16c"),
    ),
}


def missing(table: Table) -> str:
    """Why this machine cannot run a table; empty when it can."""
    if not shutil.which(os.environ.get("CC", "cc")):
        return "no C compiler on PATH"
    if "-march=native" in table.flags and platform.machine() not in ("x86_64", "AMD64"):
        return "-march=native is tested on x86-64 only"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    lacking = [name for name in table.needs if name not in flags]
    return f"this CPU lacks {', '.join(lacking)}" if lacking else ""


class CLinear(ctypes.Structure):
    _fields_ = [
        ("format", ctypes.c_int),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("mins", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class CAct(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("moment", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
    ]


class CKv(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("page_bytes", ctypes.c_size_t),
        ("pages", ctypes.c_void_p),
        ("head_dim", ctypes.c_int32),
    ]


_P, _I, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_LINEAR, _ACT, _KV = (ctypes.POINTER(t) for t in (CLinear, CAct, CKv))


class CKernels(ctypes.Structure):
    _fields_ = [
        ("isa", ctypes.c_char_p),
        ("fp32", ctypes.c_int),
        ("tall_from", ctypes.c_int32),
        ("quantize", ctypes.CFUNCTYPE(None, _ACT, _I, _I, _I, _P, _I)),
        ("gemv", ctypes.CFUNCTYPE(None, _P, _LINEAR, _I, _I, _ACT)),
        ("gemm", ctypes.CFUNCTYPE(None, _P, ctypes.c_size_t, _LINEAR, _I, _I, _ACT, _P)),
        ("store_kv", ctypes.CFUNCTYPE(None, _KV, _I, _P, _P)),
        ("attend", ctypes.CFUNCTYPE(None, _P, _P, _KV, _I, _P, _P, _P, _P)),
        ("rmsnorm", ctypes.CFUNCTYPE(None, _P, _P, _P, _I, _F)),
        ("silu_mul", ctypes.CFUNCTYPE(None, _P, _P, _P, _I)),
        ("gelu_mul", ctypes.CFUNCTYPE(None, _P, _P, _P, _I)),
        ("layernorm", ctypes.CFUNCTYPE(None, _P, _P, _P, _P, _I, _F)),
        ("gelu_erf", ctypes.CFUNCTYPE(None, _P, _P, _I)),
    ]


def aligned(shape: int | Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros of a shape, starting on 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Linear:
    """A matrix of true codes with its packed form.

    codes [rows, cols] (s8 for q8, else from 0), scales and mins [rows, groups] float16.
    """

    format: str
    codes: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float16]
    mins: npt.NDArray[np.float16]
    packed: tuple[npt.NDArray[Any], ...]

    @classmethod
    def pack(
        cls,
        format: str,
        codes: npt.NDArray[Any],
        scales: npt.NDArray[Any],
        mins: npt.NDArray[Any] | None = None,
    ) -> Linear:
        rows, cols = codes.shape
        blocks, groups = _up(rows, BLOCK_ROWS) // BLOCK_ROWS, _up(cols, GROUP) // GROUP
        whole = np.zeros((blocks * BLOCK_ROWS, groups * GROUP), np.int32)
        whole[:rows, :cols] = codes
        # [block, row, group, k4, k] -> [block, group, k4, row, k]
        tiles = whole.reshape(blocks, BLOCK_ROWS, groups, 8, 4).transpose(0, 2, 3, 1, 4)
        if format == "q8":
            out = tiles.astype(np.int8).view(np.uint8)
        else:
            bits, low = HIGH_BITS[format], tiles & 15
            vectors = [low[:, :, 2 * i] | low[:, :, 2 * i + 1] << 4 for i in range(4)]
            vectors += [np.zeros_like(vectors[0]) for _ in range(bits)]
            for k4 in range(8 if bits else 0):
                vector, place = divmod(k4 * bits, 8)
                vectors[4 + vector] |= tiles[:, :, k4] >> 4 << place
            out = np.stack(vectors, axis=2).astype(np.uint8)
        halves = []
        for values in (scales, mins if mins is not None else np.zeros_like(scales)):
            padded = np.zeros((blocks * BLOCK_ROWS, groups), np.float16)
            padded[:rows] = values
            halves.append(padded.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))
        arrays = []
        for array in (out, *halves):
            copy = aligned(array.shape, array.dtype)
            copy[...] = array
            arrays.append(copy)
        return cls(
            format,
            codes.astype(np.int32),
            np.asarray(scales, np.float16),
            np.asarray(mins if mins is not None else np.zeros_like(scales), np.float16),
            tuple(arrays),
        )

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def cols(self) -> int:
        return int(self.codes.shape[1])

    @property
    def blocks(self) -> int:
        return int(self.packed[0].shape[0])

    @property
    def groups(self) -> int:
        return int(self.packed[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that a pass over the matrix reads."""
        return sum(a.nbytes for a in self.packed[: 3 if self.format == "q4m" else 2])

    def c(self) -> CLinear:
        codes, scales, mins = (a.ctypes.data for a in self.packed)
        return CLinear(
            FORMATS[self.format],
            self.rows,
            self.cols,
            self.blocks,
            self.groups,
            codes,
            scales,
            mins if self.format == "q4m" else None,
            None,
        )

    def dense(self) -> npt.NDArray[np.float64]:
        """The weights in float64."""
        scale, low = (
            np.repeat(a.astype(np.float64), GROUP, 1)[:, : self.cols]
            for a in (self.scales, self.mins)
        )
        if self.format == "q4m":
            return self.codes * scale + low
        return (self.codes - ZERO[self.format]) * scale


def random_linear(
    rng: np.random.Generator, format: str, rows: int, cols: int, *, unit: bool = False
) -> Linear:
    """Random codes over the whole range; scales of 1 and integer mins when `unit`."""
    low, high = (-128, 128) if format == "q8" else (0, 16 << HIGH_BITS[format])
    codes = rng.integers(low, high, (rows, cols))
    shape = (rows, _up(cols, GROUP) // GROUP)
    if unit:
        return Linear.pack(format, codes, np.ones(shape), rng.integers(-3, 4, shape))
    return Linear.pack(format, codes, rng.normal(0, 0.02, shape), rng.normal(0, 0.1, shape))


class Activations:
    """Quantized activations of n tokens, zero until quantized or filled."""

    def __init__(self, n: int, cols: int, *, tall: bool = False, fp32: bool = False) -> None:
        self.n, self.cols = n, cols
        self.width = 1 if n == 1 else TALL_TILE if tall else TILE
        self.groups = _up(cols, GROUP) // GROUP
        tiles = _up(n, self.width) // self.width
        steps, dtype = (GROUP, np.float32) if fp32 else (8, np.int32)
        # [tile, group, step, lane] whatever order they lie in
        if self.width == TALL_TILE:
            self.codes = aligned((tiles, self.groups, self.width, steps), dtype).swapaxes(2, 3)
        else:
            self.codes = aligned((tiles, self.groups, steps, self.width), dtype)
        self.scale = aligned((tiles, self.groups, self.width), np.float32)
        self.moment = aligned((tiles, self.groups, self.width), np.float32)
        self.offset = aligned((tiles, self.groups, self.width), np.int32)

    def c(self) -> CAct:
        return CAct(
            self.n,
            self.width,
            self.groups,
            self.codes.ctypes.data,
            self.scale.ctypes.data,
            self.moment.ctypes.data,
            self.offset.ctypes.data,
        )

    def fill(self, codes: npt.NDArray[Any], scale: npt.NDArray[Any]) -> None:
        """Set codes [n, cols] (s8) and scales [n, groups]; the rest follows."""
        whole = np.zeros((self.n, self.groups * GROUP), np.int8)
        whole[:, : self.cols] = codes
        dwords = whole.view(np.int32).reshape(self.n, self.groups, 8)
        sums = whole.reshape(self.n, self.groups, GROUP).sum(2, dtype=np.int32)
        for t in range(self.n):
            tile, lane = divmod(t, self.width)
            self.codes[tile, :, :, lane] = dwords[t]
            self.scale[tile, :, lane] = scale[t]
            self.moment[tile, :, lane] = scale[t] * sums[t].astype(np.float32)
            self.offset[tile, :, lane] = -128 * sums[t]

    def true_codes(self) -> I32:
        """The codes as [n, groups * 32]."""
        by_token = np.ascontiguousarray(self.codes.transpose(0, 3, 1, 2))
        by_token = by_token.reshape(-1, self.groups * 8)
        return by_token.view(np.int8)[: self.n].astype(np.int32)

    def true(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`scale`, `moment` or `offset` as [n, groups]."""
        by_token: npt.NDArray[Any] = array.transpose(0, 2, 1).reshape(-1, self.groups)
        return by_token[: self.n]


class Pages:
    """KV pages of one sequence, one layer and one head, in a shuffled arena of random bytes."""

    OFFSET = 64  # of this layer and head inside a page

    def __init__(
        self, rng: np.random.Generator, tokens: int, head_dim: int, *, fp32: bool = False
    ) -> None:
        count = _up(tokens, PAGE) // PAGE
        groups = _up(head_dim, GROUP) // GROUP
        size = head_dim * 32 * 8 if fp32 else head_dim * 32 * 2 + groups * 32 * 4
        self.tokens, self.head_dim, self.fp32 = tokens, head_dim, fp32
        self.arena = aligned((count + 2, _up(size, 64) + 128), np.uint8)
        self.arena[...] = rng.integers(0, 256, self.arena.shape)
        self.pages = rng.permutation(count + 2)[:count].astype(np.int32)

    def c(self) -> CKv:
        return CKv(
            self.arena.ctypes.data + self.OFFSET,
            self.arena.shape[1],
            self.pages.ctypes.data,
            self.head_dim,
        )

    def dequantize(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Keys and values as float64 [tokens, head_dim]."""
        d, groups = self.head_dim, _up(self.head_dim, GROUP) // GROUP
        page = self.arena[self.pages, self.OFFSET :]
        count, size = len(page), 4 if self.fp32 else 1
        width = d * PAGE * size
        scales = 0 if self.fp32 else groups * PAGE * 2
        number = np.float32 if self.fp32 else np.int8

        def cut(start: int, length: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            return np.ascontiguousarray(page[:, start : start + length]).view(dtype)

        k, v = cut(0, width, number), cut(width + scales, width, number)
        if not self.fp32:
            v = v.reshape(count, PAGE // 4, d, 4).transpose(0, 1, 3, 2)
        v = v.reshape(-1, d)[: self.tokens].astype(np.float64)
        if self.fp32:
            k = k.reshape(count, d, PAGE).transpose(0, 2, 1).reshape(-1, d)[: self.tokens]
            return k.astype(np.float64), v
        k = k.reshape(count, d // 4, PAGE, 4).transpose(0, 2, 1, 3).reshape(-1, d)[: self.tokens]
        steps = []
        for start in (width, 2 * width + scales):
            halves = cut(start, scales, np.float16).reshape(count, groups, PAGE)
            by_token = halves.transpose(0, 2, 1).reshape(-1, groups)[: self.tokens]
            steps.append(np.repeat(by_token.astype(np.float64), GROUP, 1)[:, :d])
        return k * steps[0], v * steps[1]


class Kernels:
    """One compiled table."""

    def __init__(self, name: str, library: Path, table: Table) -> None:
        self.name, self.fp32 = name, table.fp32
        self._library = ctypes.CDLL(str(library))
        self.table = CKernels.in_dll(self._library, table.symbol)
        self.isa = self.table.isa.decode()

    def activations(self, n: int, cols: int) -> Activations:
        """As this table wants them for its products."""
        tall = 0 < self.table.tall_from <= n
        return Activations(n, cols, tall=tall, fp32=self.fp32)

    def quantize(self, x: F32, *, split: int | None = None) -> Activations:
        """Quantize x [n, cols], in two calls per token when `split` (a group) is given."""
        act = self.activations(*x.shape)
        self.quantize_into(act, x, split=split)
        return act

    def quantize_into(self, act: Activations, x: F32, *, split: int | None = None) -> None:
        c = act.c()
        cuts = [0, act.groups] if split is None else [0, split, act.groups]
        for t in range(act.n):
            for low, high in itertools.pairwise(cuts):
                part = np.ascontiguousarray(x[t, GROUP * low : GROUP * high], np.float32)
                self.table.quantize(c, t, low, high, part.ctypes.data, act.cols)

    def gemv(self, w: Linear, act: Activations, *, block0: int = 0, block1: int = -1) -> F32:
        block1 = w.blocks if block1 < 0 else block1
        y = aligned((block1 - block0) * BLOCK_ROWS, np.float32)
        y[:] = np.nan
        self.table.gemv(y.ctypes.data, w.c(), block0, block1, act.c())
        return y

    def gemm(self, w: Linear, act: Activations, *, block0: int = 0, block1: int = -1) -> F32:
        """y [n, rows of the blocks]."""
        block1 = w.blocks if block1 < 0 else block1
        rows = (block1 - block0) * BLOCK_ROWS
        y = np.full((act.n + 1, rows + 3), np.nan, np.float32)
        panel = aligned(w.groups * (2 * 512 + 4 * 64) + 64, np.uint8)
        self.table.gemm(y.ctypes.data, rows + 3, w.c(), block0, block1, act.c(), panel.ctypes.data)
        if not np.isnan(y[:, rows:]).all() or not np.isnan(y[-1]).all():
            raise RuntimeError("gemm wrote past its rows or tokens")
        return y[:-1, :rows]

    def store_kv(self, pages: Pages, position: int, k: F32, v: F32) -> None:
        k, v = (np.ascontiguousarray(a, np.float32) for a in (k, v))
        self.table.store_kv(pages.c(), position, k.ctypes.data, v.ctypes.data)

    def attend(self, pages: Pages, q: F32, first: npt.ArrayLike, last: npt.ArrayLike) -> F32:
        """q [n_q, head_dim], first and last [n_q]."""
        return self.attend_parts(pages, q, first, last)[0]

    def attend_parts(
        self, pages: Pages, q: F32, first: npt.ArrayLike, last: npt.ArrayLike
    ) -> tuple[F32, F32]:
        """The same, and the maximum and sum of every softmax, [n_q, 2]."""
        q = np.ascontiguousarray(q, np.float32)
        low, high = (np.ascontiguousarray(a, np.int32) for a in (first, last))
        out, mass = np.full_like(q, np.nan), np.full((len(q), 2), np.nan, np.float32)
        scratch = aligned(32 * ((pages.head_dim + 32) * 8 + 512) + 12288, np.uint8)
        self.table.attend(
            out.ctypes.data,
            mass.ctypes.data,
            pages.c(),
            len(q),
            q.ctypes.data,
            low.ctypes.data,
            high.ctypes.data,
            scratch.ctypes.data,
        )
        return out, mass

    def rmsnorm(self, x: F32, weight: F32, eps: float) -> F32:
        y = np.full_like(x, np.nan)
        self.table.rmsnorm(y.ctypes.data, x.ctypes.data, weight.ctypes.data, len(x), eps)
        return y

    def silu_mul(self, gate: F32, up: F32) -> F32:
        return self._gated(self.table.silu_mul, gate, up)

    def gelu_mul(self, gate: F32, up: F32) -> F32:
        return self._gated(self.table.gelu_mul, gate, up)

    def layernorm(self, x: F32, weight: F32, bias: F32, eps: float) -> F32:
        y = np.full_like(x, np.nan)
        rows = (array.ctypes.data for array in (y, x, weight, bias))
        self.table.layernorm(*rows, len(x), eps)
        return y

    def gelu_erf(self, x: F32) -> F32:
        y = np.full_like(x, np.nan)
        self.table.gelu_erf(y.ctypes.data, x.ctypes.data, len(x))
        return y

    @staticmethod
    def _gated(function: Callable[..., None], gate: F32, up: F32) -> F32:
        y = np.full_like(gate, np.nan)
        function(y.ctypes.data, gate.ctypes.data, up.ctypes.data, len(gate))
        return y


def compile_c(
    sources: Sequence[Path | str], target: Path, flags: Sequence[str] = (), text: str | None = None
) -> None:
    """Compile C files (and `text` as one more, by the name "-") or raise with what cc said."""
    defines = ("-DFL_HAVE_AVX2", "-DFL_HAVE_AVX512", "-DFL_HAVE_FP32")
    command = [os.environ.get("CC", "cc"), *CFLAGS, *defines, *flags, f"-I{CSRC}"]
    command += [*(str(s) for s in sources), *(["-xc", "-"] if text else []), "-o", str(target)]
    done = subprocess.run([*command, "-lm"], capture_output=True, text=True, input=text)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _sources(table: Table) -> list[Path]:
    return [CSRC / name for name in sorted({table.source, "fl_kernels_plain.c"})]


def build(name: str, directory: Path) -> Kernels:
    """Compile one table into `directory` and load it."""
    table = TABLES[name]
    library = directory / f"{name}.so"
    compile_c(_sources(table), library, [*table.flags, "-fPIC", "-shared"])
    if "amx_tile" in table.needs:
        ctypes.CDLL(None).syscall(158, 0x1023, 18)  # arch_prctl: the process may use tiles
    return Kernels(name, library, table)


def fuzz_tables(tables: Sequence[Table]) -> str:
    """The compiler's flag that gives these tables, the plain one first, to `fuzz/entry.c`."""
    return "-DFUZZ_TABLES=" + " ".join(f"TABLE({table.symbol})" for table in tables)


SANITIZE = ("-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def missing_sanitizers(directory: Path) -> str:
    """Why programs cannot be built and run under the sanitizers here; empty when they can."""
    program = directory / "sanitized"
    try:
        compile_c([], program, SANITIZE, text="int main(void) { return 0; }\n")
    except RuntimeError:
        return "the C compiler has no address sanitizer"
    return "" if subprocess.run([program]).returncode == 0 else "sanitized programs do not run"


_SCALAR = """
#include <stddef.h>
#include "fl_math.h"
void half_to_float(float *y, const uint16_t *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = fl_half_to_float(x[i]);
}
void float_to_half(uint16_t *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = fl_float_to_half(x[i]);
}
void exponential(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = fl_exp(x[i]);
}
void power_of_two(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = fl_exp2(x[i]);
}
"""


class Scalar:
    """The functions of `fl_math.h` over arrays."""

    def __init__(self, directory: Path) -> None:
        library = directory / "scalar.so"
        compile_c([], library, ["-fPIC", "-shared"], text=_SCALAR)
        self._library = ctypes.CDLL(str(library))

    def _map(self, name: str, x: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        x = np.ascontiguousarray(x)
        y = np.empty(x.shape, dtype)
        function = self._library[name]
        function.argtypes, function.restype = (_P, _P, ctypes.c_size_t), None
        function(y.ctypes.data, x.ctypes.data, x.size)
        return y

    def half_to_float(self, x: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
        return self._map("half_to_float", x, np.float32)

    def float_to_half(self, x: F32) -> npt.NDArray[Any]:
        return self._map("float_to_half", x, np.uint16)

    def exp(self, x: F32) -> npt.NDArray[Any]:
        return self._map("exponential", x, np.float32)

    def exp2(self, x: F32) -> npt.NDArray[Any]:
        return self._map("power_of_two", x, np.float32)


# ---- NumPy references ----


def quantize(x: npt.NDArray[Any]) -> tuple[I32, F32]:
    """Codes [n, groups * 32] and scales [n, groups] of x [n, cols], in float32 as the kernels."""
    n, cols = x.shape
    whole = np.zeros((n, _up(cols, GROUP)), np.float32)
    whole[:, :cols] = x
    groups = whole.reshape(n, -1, GROUP)
    amax = np.abs(groups).max(2)
    live = amax >= np.float32(1e-30)
    safe = np.where(live, amax, np.float32(127))
    inverse = np.where(live, np.float32(127) / safe, np.float32(0))
    codes = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int32)
    scale = np.where(live, safe / np.float32(127), np.float32(0))
    return codes.reshape(n, -1), scale


def product(w: Linear, codes: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """y [n, rows] in float64 from codes [n, groups * 32] and scales [n, groups]."""
    x = codes.reshape(len(codes), -1, GROUP) * scale.astype(np.float64)[..., None]
    result: npt.NDArray[Any] = x.reshape(len(codes), -1)[:, : w.cols] @ w.dense().T
    return result


def softmax_attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    first: npt.NDArray[Any],
    last: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """Attention in float64, to the base 2: q [n_q, d], k and v [tokens, d]."""
    scores = q.astype(np.float64) @ k.astype(np.float64).T
    at = np.arange(len(k))
    scores[(at < np.asarray(first)[:, None]) | (at > np.asarray(last)[:, None])] = -np.inf
    p = np.exp2(scores - scores.max(1, keepdims=True))
    result: npt.NDArray[Any] = p / p.sum(1, keepdims=True) @ v.astype(np.float64)
    return result
