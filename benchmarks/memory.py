"""How much memory a full context takes: the highest resident memory of a process (VmHWM).

    python benchmarks/memory.py
    python benchmarks/memory.py --contexts 2048 --rounds 1

Each engine opens the model for N tokens of context in a process of its own, is given the same
prompt of N tokens, and says what it held at most. Gates: 0.95 of llama.cpp's at 2,048 tokens, 0.8
at 8,192. Where speed needs rounds, memory hardly varies; --rounds 1 is good for a look.
"""

from __future__ import annotations

import random

import common
from common import OURS, SMOLLM2, Gate
from flashlite.evaluate.process import Measurer

LLAMA = "llama.cpp"
GATES = {2048: Gate(0.95, less=True), 8192: Gate(0.8, less=True)}


def main() -> None:
    parser = common.make_parser(__doc__, peers="llama.cpp,openvino")
    default = ",".join(map(str, GATES))
    parser.add_argument("--contexts", default=default, metavar="NS", help=f"[default: {default}]")
    options = common.arguments(parser)
    artifact = common.ready_artifact(SMOLLM2)
    ids = common.ordinary_ids(artifact)
    engines = common.contenders(SMOLLM2, options.peers, artifact)
    draw, rows, samples = random.Random(0), [], {}
    for tokens in [int(text) for text in options.contexts.split(",")]:
        peaks: dict[str, list[float]] = {one.name: [] for one in engines}
        for _ in range(options.rounds):
            prompt = draw.choices(ids, k=tokens)
            for one in engines:
                with Measurer(one.name, one.command) as measurer:
                    measurer.open(one.model, threads=options.threads, context=tokens)
                    measurer.prefill(prompt)
                    peaks[one.name].append(measurer.peak_memory() / 1e6)
        medians = {name: common.median(taken) for name, taken in peaks.items()}
        ours = medians.pop(OURS)
        rows.append(
            common.speed_row(
                f"peak memory at {tokens:,}", "MB", ours, medians, LLAMA, GATES.get(tokens)
            )
        )
        samples[tokens] = peaks
    common.finish("memory", options, rows, samples=samples)


if __name__ == "__main__":
    main()
