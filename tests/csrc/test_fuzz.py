"""A short run of the fuzz targets under the system compiler's sanitizers, with random inputs.

`make fuzz` runs the same targets for long, guided by coverage; `make accept` for half a minute.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import fuzz_programs as f
import kernel_harness as h
import pytest
from small import quantize_small
from split import fit, with_screen

from flashlite.compress.screen import Cut

FAMILIES = Path(__file__).parents[1] / "fixtures/families"
ENCODERS = Path(__file__).parents[1] / "fixtures/encoders"
ROUNDS = 6000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def run(program: Path) -> str:
    done = subprocess.run([program, str(ROUNDS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [n for n in h.TABLES if n != "plain" and "native" not in n])
def test_random_calls_are_clean_and_equal_the_plain_ones(name: str, folder: Path) -> None:
    """Buffers of exactly the promised size; every bit of what comes out (FP32: its memory)."""
    reason = h.missing(h.TABLES[name]) or h.missing_sanitizers(folder)
    if reason:
        pytest.skip(f"{name}: {reason}")
    program = f.random_program(folder / name, ["plain", name], None)
    assert run(program) == f"{h.TABLES[name].symbol.removeprefix('fl_kernels_')}: {ROUNDS} rounds\n"


@pytest.mark.parametrize("kind", ["full", "split", "encoder"])
def test_random_batches_are_clean_or_refused(folder: Path, tiny_gguf: Path, kind: str) -> None:
    """A generated model in every table of this CPU; half of the batches are hostile."""
    reason = h.missing(h.TABLES["plain"]) or h.missing_sanitizers(folder)
    if reason:
        pytest.skip(reason)
    if kind == "encoder":
        small = quantize_small(ENCODERS / "bert-first", "q8", folder / "encoder.fl")
    elif kind == "full":
        small = quantize_small(FAMILIES / "gemma3", "import", folder / "full.fl")
    else:
        whole = quantize_small(tiny_gguf, "q8", folder / "whole.fl")
        cuts = {"coarse": Cut(0.2, 256), "fine": Cut(0.2, 16)}
        small = with_screen(whole, folder / "split.fl", fit(whole), **cuts)
    run(f.random_program(folder / f"engine.{kind}", f.host_tables(), f.Model.of(small)))
