"""How fast and how true is an encoder: sentences/s and STS-B, beside sentence-transformers.

    python benchmarks/encoder.py
    python benchmarks/encoder.py --rounds 9 --threads 1

Both turn the sentences of STS-B dev (FLASHLITE_DATA/glue/STS-B) into vectors, from text to floats,
in processes of their own that take turns; idle ones are stopped. Ours holds INT8 weights, the peer
the FP32 ones they were made of; it is given the batch size at which it is fastest here. The score
is 100 times Spearman's correlation of the cosines with what people said.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import common
from common import OURS, Gate, Row
from flashlite.checkpoint.pull import pull
from flashlite.errors import UsageError
from flashlite.evaluate.peers import find_peers, peer_python
from flashlite.evaluate.process import Measurer, our_command, peer_command
from flashlite.model.ranks import spearman

MODEL = "all-minilm-l6-v2"
PEER = "sentence-transformers"
BATCHES = (16, 32, 64, 128, 256)
MOST_LOST = 0.5  # points of the score


def main() -> None:
    parser = common.make_parser(__doc__, peers=PEER)
    options = common.arguments(parser)
    first, second, scores = read_pairs(sts_b())
    texts = [*first, *second]
    artifact = common.ready_artifact(MODEL)
    source = pull(MODEL).path
    peers = find_peers([name for name in options.peers.split(",") if name], encode=True)
    with ExitStack() as processes:
        models = {OURS: (our_command(encode=True), artifact.path)}
        for peer in peers:
            models[peer.name] = (
                peer_command(peer_python(peer, common.note), peer.script),
                source,
            )
        running = {}
        for name, (command, path) in models.items():
            running[name] = processes.enter_context(Measurer(name, command))
            running[name].open(path, threads=options.threads, context=0)
        found = {name: score(measurer.vectors(texts), scores) for name, measurer in running.items()}
        batches = {name: best_batch(running[name], texts) for name in running if name != OURS}
        samples: dict[str, list[float]] = {name: [] for name in running}
        order = list(running.values())
        for lap in range(options.rounds):
            common.progress(lap, options.rounds)
            for measurer in order[lap % len(order) :] + order[: lap % len(order)]:
                seconds = measurer.embed(texts, batches.get(measurer.name, 32))
                samples[measurer.name].append(len(texts) / seconds)
        peaks = {name: measurer.peak_memory() / 1e6 for name, measurer in running.items()}
    common.progress(options.rounds, options.rounds)
    speeds = {name: common.median(values) for name, values in samples.items()}
    rows = [
        common.speed_row(
            "STS-B sentences", "/s", speeds.pop(OURS), speeds, PEER, Gate(2.0, aim=4.0)
        ),
        score_row(found),
        Row("peak memory", "MB", peaks.pop(OURS), peaks),
    ]
    common.finish("encoder", options, rows, samples=samples, batches=batches)


def score_row(found: dict[str, float]) -> Row:
    """Ours has to stay near the peer's."""
    ours = found.pop(OURS)
    limit = Gate(round(found[PEER] - MOST_LOST, 2)) if PEER in found else None
    return Row("STS-B dev, Spearman", "points", ours, found, gate=limit)


def best_batch(measurer: Measurer, texts: list[str]) -> int:
    """The batch size at which a peer is fastest on this machine, of two tries each."""
    speeds: Mapping[int, float] = {
        batch: min(measurer.embed(texts, batch) for _ in range(2)) for batch in BATCHES
    }
    return min(speeds, key=lambda batch: speeds[batch])


def score(vectors: list[list[float]], scores: list[float]) -> float:
    """Spearman's correlation of cosines and scores, in points."""
    first, second = np.split(np.array(vectors, np.float64), 2)
    return 100 * spearman((first * second).sum(axis=1), np.array(scores))


def read_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of a file of STS-B."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line]
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


def sts_b() -> Path:
    """Where the sentences lie."""
    path = Path(os.environ.get("FLASHLITE_DATA", ""), "glue", "STS-B", "sts-dev.tsv")
    if not path.is_file():
        raise UsageError(f"{path} is not there; set FLASHLITE_DATA to where the data sets lie")
    return path


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"encoder: {error}")
