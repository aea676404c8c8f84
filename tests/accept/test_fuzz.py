"""Coverage-guided fuzzing and the thread sanitizer, for half a minute each.

`make fuzz` and `make tsan` run the same for long.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))

import fuzz_campaign as c
import fuzz_programs as f
import kernel_harness as h
from small import quantize_small

from flashlite.codegen.target import host_isa

pytestmark = pytest.mark.accept

FAMILIES = Path(__file__).parents[1] / "fixtures/families"
RUNS = 300_000


def test_fuzzing_finds_nothing_and_reaches_every_line(tmp_path: Path) -> None:
    if reason := f.missing_fuzzer():
        pytest.skip(reason)
    model = f.Model.of(quantize_small(FAMILIES / "gemma3", "import", tmp_path / "small.fl"))
    tables = f.host_tables()
    campaign = c.Campaign(f.fuzz_program(tmp_path, tables, model), tmp_path / "corpus")
    c.write_seeds(campaign.corpus)
    done = campaign.run(RUNS, seed=1)
    print(f"\n{done.executions:,} executions, {done.edges} edges, {done.features} features")
    assert done.executions >= RUNS
    covered = f.fuzz_program(tmp_path, tables, model, coverage=True)
    lines = c.line_coverage(covered, campaign.corpus)
    if lines is None:
        pytest.skip("clean, but llvm-cov is not here to say what was reached")
    for name, percent in sorted(lines.items()):
        print(f"{percent:6.2f}% of the lines of {name}")
    assert {name: percent for name, percent in lines.items() if "kernels" in name} == {
        h.TABLES[name].source: 100.0 for name in tables
    }
    assert lines["fl_sample.c"] == 100.0
    assert min(lines["fl_engine.c"], lines["fl_ops.c"]) > 80.0  # their pool: the other test


def test_the_thread_sanitizer_finds_nothing_in_the_pool(tmp_path: Path, tiny_gguf: Path) -> None:
    if reason := f.missing_thread_sanitizer():
        pytest.skip(reason)
    isa = host_isa()
    model = f.Model.of(quantize_small(tiny_gguf, "import", tmp_path / "small.fl"), isa)
    print("\n" + f.run_pool(f.pool_program(tmp_path, model, isa), 20.0))
