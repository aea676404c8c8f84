"""How soon the first token comes: from a cold process, inside a running one, after a restart.

    python benchmarks/start.py
    python benchmarks/start.py --rounds 21 --peers ''

Everything is cached beforehand: the artifact, the library, the files in the system's page cache.

  cold process   from the start of `flashlite run` to the first byte of its answer to a prompt of 32
                 tokens. Peers: from the start of a Python that imports the engine and opens the
                 model to the token after the same ids; they are spared the command line and the
                 tokenizing. Gate: 0.35 s.
  load again     `flashlite.load` to the first token, in a process that had the model open before:
                 manifest and weights are read and digested anew. Gate: 60 ms. Beside it, the engine
                 alone (threads, arena, scratch), on weights that are in memory already.
  prefix         a process that has just started is asked for a prompt whose first 512 tokens an
                 earlier process saved. Measured: the restore alone (find the file, prove its
                 digests, fill the KV pages) and the time to the first token; beside it, the same
                 computed anew. Gate of the restore: 15 ms.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import common
from common import SMOLLM2, Gate, Row
from flashlite.evaluate.process import Measurer

PROMPT = 32
PREFIX = 512
WARM_UP = 4  # loads
TAIL = 16  # tokens of the prompt after the prefix, new each time
COLD, REOPEN, RESTORE = (Gate(0.35, less=True), Gate(60, less=True), Gate(15, less=True))


def main() -> None:
    parser = common.make_parser(__doc__, peers="llama.cpp,openvino")
    parser.add_argument("--child", metavar="JSON", help="what the script starts itself with")
    options = common.arguments(parser)
    if options.child:
        print(json.dumps(in_child(options.threads, **json.loads(options.child))))
        return
    artifact = common.ready_artifact(SMOLLM2)
    engines = common.contenders(SMOLLM2, options.peers, artifact)[1:]
    ids, draw = common.ordinary_ids(artifact), random.Random(0)
    text, prompt = prompt_of(PROMPT)
    samples: dict[str, dict[str, list[float]]] = {"cold_s": {common.OURS: []}}
    with common.own_prefixes():
        prefix = draw.choices(ids, k=PREFIX)
        ask_child(options, tokens=[*prefix, *draw.choices(ids, k=TAIL)], keep=True)
        for lap in range(-1, options.rounds):  # the first one warms up
            common.progress(lap + 1, options.rounds + 1)
            taken = {common.OURS: cold_ours(text, options.threads)}
            for one in engines:
                start = time.perf_counter()
                with Measurer(one.name, one.command) as measurer:
                    measurer.open(one.model, threads=options.threads, context=512)
                    measurer.prefill(prompt)
                    taken[one.name] = time.perf_counter() - start
            tail = draw.choices(ids, k=TAIL)
            found = ask_child(options, tokens=[*prefix, *tail])
            computed = ask_child(options, tokens=[*draw.choices(ids, k=PREFIX), *tail])
            if found["cached"] != PREFIX or computed["cached"]:
                raise SystemExit(f"the prefix cache did not do as expected: {found}, {computed}")
            if lap < 0:
                continue
            for name, seconds in taken.items():
                samples["cold_s"].setdefault(name, []).append(seconds)
            keep(samples, "found_ms", found)
            keep(samples, "computed_ms", computed)
        common.progress(options.rounds + 1, options.rounds + 1)
        again = ask_child(options, tokens=prompt, times=options.rounds)
    cold = {name: common.median(values) for name, values in samples["cold_s"].items()}
    reopened = again["reopen_ms"]
    found_ms, computed_ms = samples["found_ms"], samples["computed_ms"]
    rows = [
        Row("cold process to first token", "s", cold.pop(common.OURS), cold, gate=COLD),
        Row("load again to first token", "ms", common.median(reopened), gate=REOPEN),
        Row("engine open to first token", "ms", common.median(again["engine_ms"])),
        Row("restore 512 tokens from disk", "ms", common.median(found_ms["restore"]), gate=RESTORE),
        Row("first token after a found prefix", "ms", common.median(found_ms["first"])),
        Row("first token after computing it", "ms", common.median(computed_ms["first"])),
    ]
    common.finish("start", options, rows, samples={**samples, "again": again})


def keep(samples: dict[str, dict[str, list[float]]], name: str, report: dict[str, Any]) -> None:
    """Append what a child reported to the samples of its kind."""
    for part in ("restore", "first"):
        samples.setdefault(name, {}).setdefault(part, []).append(report[f"{part}_ms"])


def cold_ours(text: str, threads: int) -> float:
    """Seconds from the start of `flashlite run` to the first byte it writes."""
    words = [sys.executable, "-m", "flashlite", "run", SMOLLM2, "-p", text, "--max-tokens", "4"]
    start = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen([*words, "--threads", str(threads)], stdout=pipe, stderr=pipe) as process:
        first = process.stdout.read(1) if process.stdout else b""
        seconds = time.perf_counter() - start
        _, said = process.communicate()  # let it end by itself
    if not first or process.returncode:
        raise SystemExit(f"flashlite run ended with {process.returncode}: {said.decode()}")
    return seconds


def ask_child(options: Any, **request: Any) -> dict[str, Any]:
    """Run this script anew, in a process that has just started."""
    words = [sys.executable, __file__, "--threads", str(options.threads)]
    done = subprocess.run(
        [*words, "--child", json.dumps(request)], stdout=subprocess.PIPE, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def prompt_of(tokens: int) -> tuple[str, Sequence[int]]:
    """A text of exactly so many tokens, and their ids."""
    from flashlite.runtime.model import load

    with load(SMOLLM2, max_sequence_length=64, prefix_cache=False) as model:
        text = "Once upon a time there was a small town by the sea"
        while len(ids := model.tokenizer.encode_prompt(text)) < tokens:
            text += " and"
    if len(ids) != tokens:
        raise SystemExit(f"the prompt has {len(ids)} tokens instead of {tokens}")
    return text, ids


def in_child(
    threads: int, *, tokens: Sequence[int], keep: bool = False, times: int = 0
) -> dict[str, Any]:
    """Answer one request, timing the restore of its prefix; then open the model `times` again."""
    from flashlite.artifact.read import load_weights
    from flashlite.runtime.engine import Engine, Work
    from flashlite.runtime.model import Model, load
    from flashlite.runtime.sampling import SamplingParams

    def first_token(model: Model) -> tuple[float, int]:
        generation = model.submit(tokens, SamplingParams(max_tokens=1))
        list(model.follow(generation))
        return generation.first_token or 0.0, generation.cached_tokens

    model = load(SMOLLM2, threads=threads, max_sequence_length=1024)
    scheduler, spans = model.scheduler, list[float]()
    restore = scheduler._restore

    def timed(sequence: Any) -> None:
        begun = time.perf_counter()
        restore(sequence)
        spans.append(time.perf_counter() - begun)

    scheduler._restore = timed  # type: ignore[method-assign]
    begun = time.perf_counter()
    end, cached = first_token(model)
    report: dict[str, Any] = {
        "restore_ms": sum(spans) * 1e3,
        "first_ms": (end - begun) * 1e3,
        "cached": cached,
        "reopen_ms": [],
        "engine_ms": [],
    }
    if keep or times:
        model.close()  # saves a prefix of 64 tokens and more for the next process
    if not times:
        return report
    # The first laps warm up: virtual machines hand out memory slowly when it is first touched.
    for lap in range(-WARM_UP, times):
        begun = time.perf_counter()
        with load(SMOLLM2, threads=threads, max_sequence_length=1024) as opened:
            end, _ = first_token(opened)
        if lap >= 0:
            report["reopen_ms"].append((end - begun) * 1e3)
    weights, library = load_weights(model.artifact), scheduler.engine.library
    for lap in range(-1, times):
        begun = time.perf_counter()
        with Engine(library, weights, max_tokens=1024, threads=threads) as engine:
            engine.step([Work(engine.new_sequence(1024), tokens)])
            end = time.perf_counter()
        if lap >= 0:
            report["engine_ms"].append((end - begun) * 1e3)
    return report


if __name__ == "__main__":
    main()
