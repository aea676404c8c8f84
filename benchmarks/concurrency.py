"""How much more is had from one model when several requests decode together.

    python benchmarks/concurrency.py
    python benchmarks/concurrency.py --together 1,4,64 --depth 256

N sequences of `--depth` tokens each decode 64 greedy tokens in the same steps; the figure is the
tokens per second of all of them. The gate: sixteen give four times the tokens/s of one. llama.cpp
runs the same with its batch of N sequences (n_seq_max); `plot.py` draws docs/concurrency.png.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace

import common
from common import OURS, SMOLLM2, Gate, Row
from flashlite.evaluate.process import Measurer

STEPS = 64
TOGETHER = (1, 2, 4, 8, 16)
GATE = Gate(4.0)  # of the tokens/s of one, by sixteen


def main() -> None:
    parser = common.make_parser(__doc__, peers="llama.cpp")
    default = ",".join(map(str, TOGETHER))
    parser.add_argument("--together", default=default, metavar="NS", help=f"[default: {default}]")
    parser.add_argument(
        "--depth", type=int, default=64, metavar="N", help="tokens before them [default: 64]"
    )
    options = common.arguments(parser)
    counts = [int(text) for text in options.together.split(",")]
    artifact = common.ready_artifact(SMOLLM2)
    ids = common.ordinary_ids(artifact)
    most = max(counts)
    # Each sequence gets whole steps of 256 tokens of the context, the unit of llama.cpp.
    context = most * -(-(options.depth + STEPS) // 256) * 256
    draw = random.Random(0)
    samples: dict[str, dict[int, list[float]]] = {}
    with ExitStack() as processes:
        running = []
        for one in common.contenders(SMOLLM2, options.peers, artifact):
            measurer = processes.enter_context(Measurer(one.name, one.command))
            measurer.open(one.model, threads=options.threads, context=context, sequences=most)
            measurer.together([draw.choices(ids, k=16)] * most, 4)  # warms up
            running.append(measurer)
            samples[one.name] = {n: [] for n in counts}
        timings = [(lap, n) for lap in range(options.rounds) for n in counts]
        for done, (lap, n) in enumerate(timings):
            common.progress(done, len(timings))
            prompts = [draw.choices(ids, k=options.depth) for _ in range(n)]
            first = lap % len(running)
            for measurer in running[first:] + running[:first]:
                rate = n * STEPS / measurer.together(prompts, STEPS)
                samples[measurer.name][n].append(rate)
        common.progress(len(timings), len(timings))
    medians = {
        name: {n: common.median(rates) for n, rates in taken.items()}
        for name, taken in samples.items()
    }
    ours = medians[OURS]
    rows = []
    for n in counts:
        peers = {name: of[n] for name, of in medians.items() if name != OURS}
        row = Row(
            f"{n} decoding together" if n > 1 else "1 decoding alone", "tok/s", ours[n], peers
        )
        if n > 1 and 1 in ours:
            gate = GATE if n == 16 else None
            row = replace(row, against="one", ratio=ours[n] / ours[1], gate=gate)
        rows.append(row)
    curves = {
        name: {"together": list(of), "tok_s": list(of.values())} for name, of in medians.items()
    }
    common.finish("concurrency", options, rows, curves=curves, samples=samples)


if __name__ == "__main__":
    main()
