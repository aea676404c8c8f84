"""Fuzz in slices over one corpus (see `fuzz_programs`), and say what the corpus reaches."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import kernel_harness as h
import numpy as np
from fuzz_programs import find_clang

__all__ = ["Campaign", "Found", "Slice", "line_coverage", "write_seeds"]

OPERATIONS = 12  # of entry.c, with a model
_LLVM = ("llvm-profdata", "llvm-cov")


class Found(Exception):
    """An input that a kernel does not survive, or on which two tables differ."""


@dataclass(frozen=True)
class Slice:
    """What one run of the program did."""

    executions: int
    edges: int
    features: int


def write_seeds(corpus: Path, each: int = 16) -> None:
    """Inputs that reach every operation, each of several lengths."""
    corpus.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for operation in range(OPERATIONS):
        for i in range(each):
            data = rng.integers(0, 256, 1 + 8 * i, dtype=np.uint8)
            data[0] = operation
            (corpus / f"seed-{operation:02}-{i:02}").write_bytes(data.tobytes())


@dataclass(frozen=True)
class Campaign:
    """Runs of one program over one corpus; a finding lies beside the corpus."""

    program: Path
    corpus: Path

    def command(self, runs: int, seed: int) -> list[str]:
        """`runs` executions, those of the corpus among them."""
        options = {
            "runs": runs,
            "seed": seed,
            "max_len": 256,
            "timeout": 30,
            "rss_limit_mb": 2048,
            "entropic_scale_per_exec_time": 1,  # three times as many: quick inputs more often
            "print_final_stats": 1,
        }
        words = [f"-{name}={value}" for name, value in options.items()]
        prefix = f"-artifact_prefix={self.corpus.parent}/"
        return [str(self.program), *words, prefix, str(self.corpus)]

    def environment(self) -> dict[str, str]:
        """Little is kept of what was freed: a call is short, and memory is dear in the cache."""
        options = "quarantine_size_mb=4:malloc_context_size=4:abort_on_error=0"
        return os.environ | {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}

    def start(self, runs: int, seed: int) -> subprocess.Popen[str]:
        """The program, its report on stderr."""
        return subprocess.Popen(
            self.command(runs, seed),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment(),
        )

    def run(self, runs: int, seed: int) -> Slice:
        """One slice to its end.

        Raises:
            Found: with the report and how to see it again.
        """
        process = self.start(runs, seed)
        return self.judge(process, process.communicate()[0])

    def judge(self, process: subprocess.Popen[str], report: str) -> Slice:
        """What a process that ended has found."""
        if process.returncode:
            raise Found(self._explain(report, process.returncode))
        executions = re.search(r"number_of_executed_units: (\d+)", report)
        edges = re.findall(r" cov: (\d+) ft: (\d+)", report)
        if executions is None or not edges:
            raise Found(f"the fuzzer's report has no figures:\n{report[-2000:]}")
        return Slice(int(executions[1]), int(edges[-1][0]), int(edges[-1][1]))

    def _explain(self, report: str, status: int) -> str:
        written = re.search(r"Test unit written to (\S+)", report)
        marks = (" differs at ", "broken promise", "ERROR: ", "runtime error: ")
        begin = min((at for mark in marks if (at := report.find(mark)) >= 0), default=0)
        lines = report[report.rfind("\n", 0, begin) + 1 :].strip().splitlines()
        end = next((i for i, line in enumerate(lines) if line.startswith("SUMMARY")), len(lines))
        text = "\n".join(line for line in lines[: min(end, 24)] if " in fuzzer::" not in line)
        text = text or f"status {status}"
        return text if written is None else f"{text}\nagain: {self.program} {written[1]}"


def line_coverage(program: Path, corpus: Path) -> dict[str, float] | None:
    """Percent of the lines of each hand-written C file that a corpus runs, by file name.

    None where llvm-profdata and llvm-cov are absent.
    """
    suffix = re.sub(r"^clang", "", Path(find_clang() or "clang").name)
    tools = [shutil.which(f"{name}{suffix}") or shutil.which(name) for name in _LLVM]
    merge, cov = tools
    if merge is None or cov is None:
        return None
    raw, merged = program.with_suffix(".profraw"), program.with_suffix(".profdata")
    environment = os.environ | {"LLVM_PROFILE_FILE": str(raw)}
    words = [str(program), "-runs=0", "-max_len=256", str(corpus)]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    subprocess.run([merge, "merge", "-o", merged, raw], check=True)
    words = [cov, "export", "-summary-only", f"-instr-profile={merged}", str(program)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    files = json.loads(done.stdout)["data"][0]["files"]
    return {
        Path(file["filename"]).name: float(file["summary"]["lines"]["percent"])
        for file in files
        if Path(file["filename"]).parent == h.CSRC and file["filename"].endswith(".c")
    }
