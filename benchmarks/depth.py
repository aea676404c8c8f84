"""What a longer context costs: prefill of N tokens, and decoding after N, beside other engines.

    python benchmarks/depth.py
    python benchmarks/depth.py --depths 512,2048 --peers ''

As speed.py, along the whole context; `plot.py` draws docs/context.png from it. No gates: speed.py
holds them. Five rounds take a quarter of an hour, most of it the peers' long prompts.
"""

from __future__ import annotations

import common
from common import OURS, SMOLLM2
from flashlite.evaluate.speed import Measure, compare

STEPS = 64
DEPTHS = (512, 1024, 2048, 4096, 8192 - STEPS)


def main() -> None:
    parser = common.make_parser(__doc__, peers="llama.cpp,openvino")
    default = ",".join(map(str, DEPTHS))
    parser.add_argument(
        "--depths", default=default, metavar="NS", help=f"tokens of context [default: {default}]"
    )
    options = common.arguments(parser)
    depths = [int(text) for text in options.depths.split(",")]
    artifact = common.ready_artifact(SMOLLM2)
    measures = [m for depth in depths for m in (Measure(depth), Measure(depth, STEPS))]
    figures = compare(
        common.contenders(SMOLLM2, options.peers, artifact),
        measures,
        common.ordinary_ids(artifact),
        threads=options.threads,
        rounds=options.rounds,
        report=common.progress,
    )
    rows = []
    curves: dict[str, dict[str, dict[str, list[float]]]] = {"prefill": {}, "decode": {}}
    for measure in measures:
        ours, theirs = common.rows_of(figures, measure.name)
        kind, title = ("decode", "decoding after") if measure.steps else ("prefill", "prefill of")
        against = next(iter(theirs), "")
        rows.append(common.speed_row(f"{title} {measure.prompt:,}", "tok/s", ours, theirs, against))
        for name, value in {OURS: ours, **theirs}.items():
            curve = curves[kind].setdefault(name, {"tokens": [], "tok_s": []})
            curve["tokens"].append(measure.prompt)
            curve["tok_s"].append(value)
    common.finish(
        "depth",
        options,
        rows,
        curves=curves,
        samples={name: dict(taken.samples) for name, taken in figures.items()},
    )


if __name__ == "__main__":
    main()
