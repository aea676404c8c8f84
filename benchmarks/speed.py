"""How fast is one request: prefill and decoding, beside other engines on the same weights.

    python benchmarks/speed.py
    python benchmarks/speed.py --rounds 9 --models smollm2
    python benchmarks/speed.py --isa avx2        # ours as on a CPU without AVX-512

Every engine reads the same GGUF file in a process of its own and takes its turn in each round;
idle ones are stopped. Prompts are random and never repeat, so that no cache of prefixes counts.
"Decoding after D" is 128 greedy steps after a prompt of D tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import common
from common import GEMMA, SMOLLM2, Gate
from flashlite.evaluate.speed import Measure, compare

LLAMA, OPENVINO = "llama.cpp", "openvino"

# What is measured, which peer it is held against, and the gate.
QUESTIONS: Mapping[str, tuple[str, list[tuple[str, Measure, str, Gate]]]] = {
    "smollm2": (
        SMOLLM2,
        [
            ("decoding after 16", Measure(16, 128), LLAMA, Gate(2.2)),
            ("decoding after 1,024", Measure(1024, 128), LLAMA, Gate(2.5)),
            ("prefill of 512", Measure(512), OPENVINO, Gate(1.4)),
            ("prefill of 2,048", Measure(2048), OPENVINO, Gate(1.6)),
        ],
    ),
    "gemma": (
        GEMMA,
        [
            ("decoding after 16", Measure(16, 128), LLAMA, Gate(2.5)),
            ("prefill of 512", Measure(512), LLAMA, Gate(4.0)),
        ],
    ),
}
TITLES = {"smollm2": "SmolLM2-135M", "gemma": "Gemma-3-270M"}


def main() -> None:
    parser = common.make_parser(__doc__, peers=f"{LLAMA},{OPENVINO}")
    parser.add_argument(
        "--models",
        default=",".join(QUESTIONS),
        metavar="NAMES",
        help=f"of {', '.join(QUESTIONS)} [default: all]",
    )
    options = common.arguments(parser)
    models = [name for name in options.models.split(",") if name]
    if unknown := [name for name in models if name not in QUESTIONS]:
        parser.error(f"model {unknown[0]!r} is unknown; known are {', '.join(QUESTIONS)}")
    rows, samples = [], {}
    for name in models:
        model, questions = QUESTIONS[name]
        artifact = common.ready_artifact(model)
        # Gemma is held against llama.cpp alone.
        peers = options.peers if name == "smollm2" else _without(options.peers, OPENVINO)
        figures = compare(
            common.contenders(model, peers, artifact),
            [measure for _, measure, _, _ in questions],
            common.ordinary_ids(artifact),
            threads=options.threads,
            rounds=options.rounds,
            report=common.progress,
        )
        for title, measure, against, gate in questions:
            ours, theirs = common.rows_of(figures, measure.name)
            rows.append(
                common.speed_row(f"{TITLES[name]} {title}", "tok/s", ours, theirs, against, gate)
            )
        samples[name] = {engine: dict(taken.samples) for engine, taken in figures.items()}
    common.finish("speed", options, rows, samples=samples)


def _without(names: str, name: str) -> str:
    return ",".join(part for part in names.split(",") if part.strip() != name)


if __name__ == "__main__":
    main()
