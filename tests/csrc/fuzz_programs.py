"""Build the programs of `fuzz/`: under libFuzzer, with random inputs, and the thread pool.

    fuzz_program    libFuzzer, address and undefined-behaviour sanitizers: coverage-guided
    random_program  the same entry and sanitizers without libFuzzer, any C compiler
    pool_program    thread sanitizer

Every table of `kernel_harness.TABLES` that this CPU runs is in one program, the plain one first:
one input is one call in each of them.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import kernel_harness as h
import numpy as np
from numpy.typing import NDArray
from small import Small

from flashlite.codegen.generate import generate

__all__ = [
    "Model",
    "find_clang",
    "fuzz_program",
    "host_tables",
    "missing_fuzzer",
    "missing_thread_sanitizer",
    "pool_program",
    "random_program",
    "run_pool",
]

_STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno", "-g1")
_SEGMENT = "-DFL_SEGMENT=32"  # one page: short texts have several segments of attention
_ADDRESS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
# Counters of edges alone: comparisons of loops would cost half the time and say nothing.
_COUNTERS = ("-fsanitize-coverage=inline-8bit-counters,pc-table",)
_COVERED = ("-fprofile-instr-generate", "-fcoverage-mapping")
_RUNTIME = "libFuzzer and its sanitizers (Debian: apt-get install clang libclang-rt-dev)"


@dataclass(frozen=True)
class Model:
    """A generated model, to be compiled into a program with its weights."""

    text: str  # model.c
    weights: NDArray[np.uint8]

    @classmethod
    def of(cls, small: Small, isa: str = "plain") -> Model:
        """Of an artifact; `isa` is the table that the model names."""
        return cls(generate(small.artifact, isa), small.weights)


# ---- compilers ----


def find_clang() -> str | None:
    """The clang to fuzz with: FUZZ_CC, else the newest on PATH."""
    names = [os.environ.get("FUZZ_CC", ""), "clang", *(f"clang-{n}" for n in range(30, 11, -1))]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def missing_fuzzer() -> str:
    """Why nothing can be fuzzed here, in one line; empty when it can."""
    clang = find_clang()
    if clang is None:
        return f"no clang on PATH: fuzzing needs clang with {_RUNTIME}"
    text = "int LLVMFuzzerTestOneInput(const void *data, unsigned long size) "
    text += "{ return (void)data, (void)size, 0; }\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        flags = ["-fsanitize=fuzzer,address,undefined", "-xc", "-", "-o", str(program)]
        built = subprocess.run([clang, *flags], input=text, capture_output=True, text=True)
        if built.returncode:
            return f"{clang} links no fuzzer: install {_RUNTIME}"
        ran = subprocess.run([program, "-runs=1"], capture_output=True)
        return f"programs of {clang} with the sanitizers do not run" if ran.returncode else ""


def _thread_compiler() -> str:
    return find_clang() or os.environ.get("CC", "cc")


@functools.cache
def missing_thread_sanitizer() -> str:
    """Why the pool cannot run under the thread sanitizer here, in one line; empty when it can."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        command = [_thread_compiler(), "-fsanitize=thread", "-xc", "-", "-o", str(program)]
        try:
            built = subprocess.run(
                command, input="int main(void) { return 0; }\n", capture_output=True, text=True
            )
        except FileNotFoundError:
            return "no C compiler on PATH"
        if built.returncode:
            return f"{command[0]} has no thread sanitizer (Debian: libclang-rt-dev, or gcc)"
        ran = subprocess.run(_at_fixed_addresses(program), capture_output=True)
        return f"programs of {command[0]} with it do not run" if ran.returncode else ""


def _at_fixed_addresses(program: Path) -> list[str]:
    """The command of a program under the thread sanitizer, whose shadow has its own place."""
    setarch = shutil.which("setarch")
    return [*([setarch, "-R"] if setarch else []), str(program)]


@dataclass(frozen=True)
class _Unit:
    """One file to compile, with the flags that it has to itself."""

    source: Path
    flags: tuple[str, ...] = ()


def _link(
    units: Iterable[_Unit], target: Path, compiler: str, flags: Sequence[str], link: Sequence[str]
) -> Path:
    """Compile, as many at a time as cores, and link.

    Raises:
        RuntimeError: what the compiler said.
    """
    folder = target.parent / f"{target.name}.objects"
    folder.mkdir(parents=True, exist_ok=True)

    def run(*words: str) -> None:
        done = subprocess.run([compiler, *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} {' '.join(words)}\n{done.stderr}")

    def compile_unit(unit: _Unit) -> str:
        made = str(folder / f"{unit.source.stem}.o")
        include = (f"-I{h.CSRC}", f"-I{h.FUZZ}")
        run(*_STRICT, _SEGMENT, *flags, *unit.flags, *include, "-c", str(unit.source), "-o", made)
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_unit, units))
    run(*link, *objects, "-lm", "-lpthread", "-o", str(target))
    return target


# ---- programs ----


def host_tables() -> list[str]:
    """The tables that this CPU runs, one name for each symbol, the plain one first."""
    names: dict[str, str] = {}
    for name, table in h.TABLES.items():
        if not h.missing(table):
            names.setdefault(table.symbol, name)
    return list(names.values())


def _table_units(names: Sequence[str]) -> list[_Unit]:
    """The entry and the tables, each with its own instruction set."""
    tables = [h.TABLES[name] for name in names]
    units = [_Unit(path, (h.fuzz_tables(tables),)) for path in h.FUZZ_ENTRY]
    units += [_Unit(h.CSRC / table.source, table.flags) for table in tables]
    return [*units, *(_Unit(h.CSRC / name) for name in ("fl_sample.c", "fl_os.c"))]


def _model_files(model: Model, folder: Path) -> list[_Unit]:
    """model.c, and its weights as an array that ends where they end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.c").write_text(model.text)
    numbers = ",".join(map(str, model.weights.tolist()))
    (folder / "weights.c").write_text(
        "#include <stdint.h>\n"
        "extern const uint8_t fz_weights[];\n"
        f"_Alignas(64) const uint8_t fz_weights[] = {{{numbers}}};\n"
    )
    return [_Unit(folder / "model.c"), _Unit(folder / "weights.c")]


def _engine_units(model: Model | None, folder: Path) -> list[_Unit]:
    """Engines of all tables in one program: fl_engine.c asks a variable which one it is."""
    if model is None:
        return []
    system = (
        "-Dfl_os_reserve=fz_reserve",
        "-Dfl_os_release=fz_unreserve",
        "-Dfl_os_runs=fz_os_runs",
    )
    engine = _Unit(h.CSRC / "fl_engine.c", ("-DFL_KERNELS=(*fz_engine_table)", *system))
    own = (
        h.CSRC / "fl_attention.c",
        h.CSRC / "fl_encoder.c",
        h.CSRC / "fl_head.c",
        h.CSRC / "fl_ops.c",
        h.FUZZ / "engine.c",
    )
    return [engine, *map(_Unit, own), *_model_files(model, folder)]


def _entry_flags(model: Model | None) -> tuple[str, ...]:
    return () if model is None else ("-DFUZZ_ENGINE",)


def fuzz_program(
    folder: Path, names: Sequence[str], model: Model | None, *, coverage: bool = False
) -> Path:
    """Under libFuzzer; with `coverage` it counts lines instead of looking for errors."""
    clang = find_clang()
    if clang is None:
        raise RuntimeError(missing_fuzzer())
    flags = (*_COUNTERS, *(_COVERED if coverage else ("-O2", *_ADDRESS)))
    link = ("-fsanitize=fuzzer", *(_COVERED if coverage else _ADDRESS))
    units = [*_table_units(names), *_engine_units(model, folder / "model")]
    target = folder / ("covered" if coverage else "fuzz")
    return _link(units, target, clang, (*flags, *_entry_flags(model)), link)


def random_program(folder: Path, names: Sequence[str], model: Model | None) -> Path:
    """Under the sanitizers of the system's compiler: `random ROUNDS`."""
    units = [*_table_units(names), *_engine_units(model, folder / "model")]
    units.append(_Unit(h.FUZZ / "random_main.c"))
    flags = ("-O1", *_ADDRESS, *_entry_flags(model))
    return _link(units, folder / "random", os.environ.get("CC", "cc"), flags, _ADDRESS)


def pool_program(folder: Path, model: Model, name: str) -> Path:
    """Under the thread sanitizer: `pool SECONDS`. `name`: the table that the model names."""
    files = ("fl_attention.c", "fl_encoder.c", "fl_engine.c", "fl_head.c", "fl_ops.c", "fl_os.c")
    units = [*(_Unit(h.CSRC / file) for file in files), _Unit(h.FUZZ / "pool_main.c")]
    tables = {h.TABLES[each].source: h.TABLES[each] for each in ("plain", name)}
    units += [_Unit(h.CSRC / table.source, table.flags) for table in tables.values()]
    units += _model_files(model, folder / "model")
    sanitize = ("-fsanitize=thread",)
    return _link(units, folder / "pool", _thread_compiler(), ("-O1", *sanitize), sanitize)


def run_pool(program: Path, seconds: float) -> str:
    """What the pool did.

    Raises:
        RuntimeError: the sanitizer's report, or what did not hold.
    """
    words = [*_at_fixed_addresses(program), str(seconds)]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return done.stdout
