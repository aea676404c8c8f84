"""Logits do not depend on company: alone or among 16, in any chunks, with 1 thread or 2."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray
from small import Small, all_logits

from flashlite.artifact.read import load_weights
from flashlite.codegen.target import host_isa
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact

SCHEDULES = 500


def differences(
    engine: Engine, texts: Seq[NDArray[np.int32]], truth: Seq[NDArray[np.float32]], seed: int
) -> int:
    """Run one random schedule; how many rows of logits differ from the truth in any bit."""
    rng = random.Random(seed)
    chosen = rng.sample(range(len(texts)), rng.randint(1, min(16, len(texts))))
    sequences = {i: engine.new_sequence(len(texts[i])) for i in chosen}
    chunks = {i: rng.choice((1, 7, 16, 64, 512)) for i in chosen}
    wrong = 0
    while waiting := [i for i in chosen if sequences[i].length < len(texts[i])]:
        step: list[tuple[int, Work]] = []
        room = MAX_BATCH
        for i in rng.sample(waiting, rng.randint(1, len(waiting))):
            at = sequences[i].length
            ids = texts[i][at : at + min(chunks[i], room)]
            if len(ids):
                step.append((i, Work(sequences[i], ids)))
                room -= len(ids)
        logits = engine.step([work for _, work in step])
        for row, (i, _) in zip(logits, step, strict=True):
            wrong += not np.array_equal(row, truth[i][sequences[i].length - 1])
    for sequence in sequences.values():
        sequence.release()
    return wrong


def check(engines: Seq[Engine], texts: Seq[NDArray[np.int32]], schedules: int) -> None:
    truth = []
    for ids in texts:
        sequence = engines[0].new_sequence(len(ids))
        truth.append(all_logits(engines[0], sequence, ids))
        sequence.release()
    found = [differences(engines[seed % 2], texts, truth, seed) for seed in range(schedules)]
    assert sum(found) == 0


def test_500_random_schedules_give_the_same_bits(small: Small) -> None:
    lengths = [1, 2, 5, 6, 7, 31, 32, 33, 64, 65, 90, 96, 97, 100, 111, 120, 127, 128]
    texts = [small.ids(n, seed=n) for n in lengths]
    settings = {"max_tokens": 16 * 128, "max_sequences": 16}
    with (
        small.open(host_isa(), threads=1, **settings) as one,
        small.open(host_isa(), threads=2, **settings) as two,
    ):
        check([one, two], texts, SCHEDULES)


def test_schedules_of_a_real_model_give_the_same_bits() -> None:
    artifact = find_artifact("smollm2-135m-instruct")
    library, weights = load_library(compile_artifact(artifact)), load_weights(artifact)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 49152, n).astype(np.int32) for n in (3, 33, 64, 100, 200, 600)]
    with (
        Engine(library, weights, max_tokens=2048, threads=1, max_sequences=6) as one,
        Engine(library, weights, max_tokens=2048, threads=2, max_sequences=6) as two,
    ):
        check([one, two], texts, 12)
