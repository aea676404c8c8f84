"""Models that lost heads, or whose heads stream, on the engine against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import NO_TEXT, Small, all_logits, runs

from flashlite.artifact.read import load_weights
from flashlite.artifact.write import quantize
from flashlite.checkpoint.open import open_checkpoint
from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import ISAS
from flashlite.compress.heads import HeadStatistics, stream_heads, trim_heads
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.model.source import SourceModel
from flashlite.runtime.engine import Work

HERE = Path(__file__).parent.parent
CONTEXT = 460  # well beyond what a streaming head sees


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Three heads gone, a whole KV head among them, and two that stream."""
    source = describe(open_checkpoint(HERE / "fixtures/families/llama"))
    source = replace(source, spec=replace(source.spec, max_context=CONTEXT))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, source.spec.vocab_size, 60)]
    group = source.spec.n_heads // source.spec.n_kv_heads
    gone = [(0, h) for h in range(group)] + [(1, 0)]
    trimmed = trim_heads(source, HeadStatistics.collect(source, texts), gone)
    streaming = replace(trimmed, spec=stream_heads(trimmed.spec, [(0, 0), (1, 1)]))
    return store(streaming, tmp_path_factory.mktemp("heads") / "small.fl")


def store(source: SourceModel, folder: Path) -> Small:
    provenance = {"source": "", "sha256": "", "licence": ""}
    artifact = quantize(source, NO_TEXT, folder, "q8", name="small", provenance=provenance)
    return Small(artifact, load_weights(artifact))


def test_in_fp32_the_engine_equals_the_oracle(changed: Small) -> None:
    ids = changed.ids(CONTEXT)
    expected = changed.reference().logits(ids)
    with changed.open("fp32") as engine:
        got = all_logits(engine, engine.new_sequence(len(ids)), ids, chunk=45)
    assert kl_divergence(expected, got).max() <= 1e-5


def test_streaming_changes_what_is_far(changed: Small) -> None:
    """Or else the test above would say nothing."""
    whole = replace(changed.artifact.spec, streams=())
    ids = changed.ids(CONTEXT)
    reference = changed.reference()
    there = reference.logits(ids)
    reference.spec = replace(whole, tied_head=reference.spec.tied_head)
    apart = kl_divergence(reference.logits(ids), there)
    assert apart[:287].max() < 1e-9  # up to here whole pages reach back to the first
    assert apart[288:].max() > 1e-6


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.skipif(not runs(isa), reason=f"this CPU lacks {isa}"))
        for isa in ISAS
        if isa != "fp32"
    ],
)
def test_bits_do_not_depend_on_chunks_threads_or_company(changed: Small, isa: str) -> None:
    ids, other = changed.ids(CONTEXT), changed.ids(CONTEXT, seed=1)
    with changed.open("plain", threads=1) as engine:
        alone = all_logits(engine, engine.new_sequence(len(ids)), ids)
    with changed.open(isa, threads=2, max_tokens=1024, max_sequences=2) as engine:
        first, second = engine.new_sequence(len(ids)), engine.new_sequence(len(ids))
        rows = []
        for start in range(0, CONTEXT, 23):
            part = slice(start, start + 23)
            work = [Work(second, other[part], "none"), Work(first, ids[part], "all")]
            rows.append(engine.step(work).copy())
    np.testing.assert_array_equal(np.concatenate(rows), alone)


def test_what_is_gone_is_absent_from_the_code(changed: Small) -> None:
    text = emit_model(changed.artifact, "plain")
    spec = changed.artifact.spec
    assert f"KV_HEADS_IN_ALL = {spec.n_layers * spec.n_kv_heads - 1}," in text
    assert f"QUERIES_0[{spec.n_kv_heads - 1}]" in text
    assert "STREAMS_0" in text
    heads = spec.n_layers * spec.n_kv_heads - 1
    with changed.open("plain") as engine:
        assert engine.page_bytes % heads == 0
        assert (
            engine.page_bytes // heads == 64 * 32 // 64 * spec.head_dim * 2 + 2 * 64
        )  # K, V, scales
