"""What `make fuzz` and `make tsan` run.

    run_fuzz.py fuzz --runs 20000000   every kernel, the sampler and the engine; all cores
    run_fuzz.py tsan --seconds 60      the thread pool

Programs, the corpus and what was found lie in build/fuzz; a later run goes on with the corpus.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

import fuzz_campaign as c
import fuzz_programs as f
import kernel_harness as h
import make_gguf
from small import quantize_small

from flashlite.codegen.target import host_isa

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fuzz"
FAMILY = HERE.parent / "fixtures/families/gemma3"  # windows, norms of heads, two tables of angles
SLICE = 200_000  # executions between two lines of progress


def fuzz(runs: int, workers: int) -> int:
    """Fuzz in slices, each worker one at a time. Returns the exit status."""
    if reason := f.missing_fuzzer():
        print(f"fuzz: {reason}", file=sys.stderr)
        return 1
    tables = f.host_tables()
    left_out = sorted({t.symbol for t in h.TABLES.values()} - {h.TABLES[n].symbol for n in tables})
    print(f"fuzz: building {', '.join(tables)}", flush=True)
    if left_out:
        print(f"fuzz: this CPU does not run {', '.join(left_out)}")
    model = f.Model.of(quantize_small(FAMILY, "import", BUILD / "fuzz.fl"))
    campaign = c.Campaign(f.fuzz_program(BUILD, tables, model), BUILD / "corpus")
    c.write_seeds(campaign.corpus)
    try:
        _run_slices(campaign, runs, workers)
    except c.Found as found:
        print(f"fuzz: found\n{found}", file=sys.stderr)
        return 1
    covered = f.fuzz_program(BUILD, tables, model, coverage=True)
    for name, percent in sorted((c.line_coverage(covered, campaign.corpus) or {}).items()):
        print(f"fuzz: {percent:6.2f}% of the lines of {name}")
    return 0


def _run_slices(campaign: c.Campaign, runs: int, workers: int) -> None:
    seeds = _seeds()
    lock = threading.Lock()
    begin = time.monotonic()
    done, planned = 0, 0
    failures: list[c.Found] = []

    def work() -> None:
        nonlocal done, planned
        while True:
            with lock:
                size = min(SLICE, runs - planned)
                if size <= 0 or failures:
                    return
                planned += size
                seed = next(seeds)
            try:
                part = campaign.run(size, seed)
            except c.Found as found:
                failures.append(found)
                return
            with lock:
                done += part.executions
                _report(done, runs, time.monotonic() - begin, part)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _seeds() -> Iterator[int]:
    """Other ones in every run: the corpus is what a run takes over from the last."""
    return itertools.count(1 + time.time_ns() // 1000 % 1_000_000_000)


def _report(done: int, runs: int, seconds: float, part: c.Slice) -> None:
    rate = done / seconds
    left = max(0, runs - done) / rate / 60
    print(
        f"fuzz: {done:,} of {runs:,} executions, {rate:,.0f}/s, {part.edges} edges, "
        f"{part.features} features, {left:.0f} min left",
        flush=True,
    )


def tsan(seconds: float) -> int:
    """The pool under the thread sanitizer. Returns the exit status."""
    if reason := f.missing_thread_sanitizer():
        print(f"tsan: {reason}", file=sys.stderr)
        return 1
    isa = host_isa()
    tiny = BUILD / "tiny.gguf"
    BUILD.mkdir(parents=True, exist_ok=True)
    make_gguf.write_gguf(tiny, *make_gguf.tiny_model())
    model = f.Model.of(quantize_small(tiny, "import", BUILD / "tsan.fl"), isa)
    try:
        print(f.run_pool(f.pool_program(BUILD, model, isa), seconds), end="")
    except RuntimeError as error:
        print(f"tsan: {error}", file=sys.stderr)
        return 1
    print("tsan: clean")
    return 0


def main() -> int:
    """As the module says."""
    parser = argparse.ArgumentParser(description="Fuzz the C, or run its threads under a sanitizer")
    verbs = parser.add_subparsers(dest="verb", required=True)
    fuzzing = verbs.add_parser("fuzz")
    fuzzing.add_argument("--runs", type=int, default=20_000_000)
    fuzzing.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    threading_ = verbs.add_parser("tsan")
    threading_.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    if options.verb == "fuzz":
        return fuzz(options.runs, options.workers)
    return tsan(options.seconds)


if __name__ == "__main__":
    sys.exit(main())
