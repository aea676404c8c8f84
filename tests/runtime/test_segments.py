"""Texts beyond one segment of attention: the same bits however a step divides them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small import NO_TEXT, Small, all_logits, runs

from flashlite.artifact.read import load_weights
from flashlite.artifact.write import quantize
from flashlite.checkpoint.open import open_checkpoint
from flashlite.codegen.target import ISAS
from flashlite.compress.heads import stream_heads
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.runtime.engine import Work

FIXTURES = Path(__file__).parent.parent / "fixtures/families"
CONTEXT = 1100  # two segments of 512 and the beginning of a third
LAST = 1030  # decoded one by one from here on


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A model with full heads beside a streaming one, and one with windows across segments."""
    source = describe(open_checkpoint(FIXTURES / request.param))
    spec = replace(source.spec, max_context=CONTEXT)
    if request.param == "llama":
        spec = stream_heads(spec, [(0, 0), (1, 1)])
    else:
        spec = replace(spec, sliding_window=300)
    provenance = {"source": "", "sha256": "", "licence": ""}
    folder = tmp_path_factory.mktemp(request.param) / "small.fl"
    artifact = quantize(
        replace(source, spec=spec), NO_TEXT, folder, "q8", name="small", provenance=provenance
    )
    return Small(artifact, load_weights(artifact))


@pytest.fixture(scope="module")
def alone(long: Small) -> NDArray[np.float32]:
    """Logits after every token from LAST on, by one thread, in chunks."""
    ids = long.ids(CONTEXT)
    with long.open("plain", threads=1, max_tokens=CONTEXT) as engine:
        return all_logits(engine, engine.new_sequence(CONTEXT), ids)[LAST:]


def test_in_fp32_they_equal_the_oracle(long: Small) -> None:
    ids = long.ids(CONTEXT)
    expected = long.reference().logits(ids)[LAST:]
    for threads in (1, 3):
        with long.open("fp32", threads=threads, max_tokens=CONTEXT) as engine:
            sequence = engine.new_sequence(CONTEXT)
            all_logits(engine, sequence, ids[:LAST])
            got = all_logits(engine, sequence, ids[LAST:], chunk=1)
        assert kl_divergence(expected, got).max() <= 1e-5


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.skipif(not runs(isa), reason=f"this CPU lacks {isa}"))
        for isa in ISAS
        if isa != "fp32"
    ],
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_depend_on_neither_threads_nor_chunks(
    long: Small, alone: NDArray[np.float32], isa: str, threads: int
) -> None:
    ids = long.ids(CONTEXT)
    with long.open(isa, threads=threads, max_tokens=CONTEXT) as engine:
        sequence = engine.new_sequence(CONTEXT)
        all_logits(engine, sequence, ids[:LAST], chunk=97)
        got = [all_logits(engine, sequence, ids[LAST:1060], chunk=1)]
        got.append(all_logits(engine, sequence, ids[1060:], chunk=3))  # as drafts are checked
    np.testing.assert_array_equal(np.concatenate(got), alone)


def test_bits_do_not_depend_on_company(long: Small, alone: NDArray[np.float32]) -> None:
    """Decoded beside one other, short text, and beside so many that nothing is divided."""
    ids = long.ids(CONTEXT)
    for others in (1, 9):
        with long.open("plain", max_tokens=CONTEXT + 512, max_sequences=others + 1) as engine:
            sequence = engine.new_sequence(CONTEXT)
            beside = [engine.new_sequence(32) for _ in range(others)]
            all_logits(engine, sequence, ids[:LAST])
            rows = []
            for i, token in enumerate(ids[LAST : LAST + 20]):
                work = [Work(sequence, [token]), *(Work(s, ids[i : i + 1], "none") for s in beside)]
                rows.append(engine.step(work)[0].copy())
        np.testing.assert_array_equal(rows, alone[:20])
