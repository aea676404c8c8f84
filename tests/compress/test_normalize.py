"""Embeddings brought to where half-precision scales are exact: the same model, kept better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.gptq import weights_of
from flashlite.compress.normalize import Ready, normalize_embeddings, table_exponent
from flashlite.compress.pack import Quantized
from flashlite.compress.quantize import quantize_matrix
from flashlite.model.families import describe
from flashlite.model.reference import Reference
from flashlite.model.source import SourceModel

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


def source(family: str) -> SourceModel:
    return describe(open_checkpoint(FAMILIES / family))


def floats(ready: Ready, name: str, cols: int) -> NDArray[np.float32]:
    value = ready[name]
    if isinstance(value, Quantized):
        return weights_of(value, cols)
    return value.astype(np.float32)


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "llama"])
@pytest.mark.parametrize("fmt", ["q8", "q4m"])
def test_the_model_stays_the_same_to_the_last_bit(family: str, fmt: str) -> None:
    model = source(family)
    table = model.tensor("embed")
    ready: Ready = {"embed": quantize_matrix(table, fmt)}
    moved, after = normalize_embeddings(model, ready, 5, head_apart=False)
    ids = np.arange(1, 20, dtype=np.int32)

    def logits(of: SourceModel, found: Ready) -> NDArray[np.float32]:
        def weights(name: str) -> NDArray[np.float32]:
            return floats(found, name, table.shape[1]) if name in found else of.tensor(name)

        return Reference(of.spec, weights).logits(ids)

    assert moved.spec.embed_scale == model.spec.embed_scale / 32
    assert np.array_equal(logits(model, ready), logits(moved, after))
    assert ("final_norm" in after) == model.spec.tied_head


def test_a_head_that_stands_apart_keeps_its_norm() -> None:
    model = source("gemma3")
    assert model.spec.tied_head
    table = model.tensor("embed").astype(np.float16)
    _, after = normalize_embeddings(model, {"embed": table}, 3, head_apart=True)
    assert set(after) == {"embed"}
    assert np.array_equal(floats(after, "embed", 0), table.astype(np.float32) * 8)


def test_small_tables_lose_less_afterwards() -> None:
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((64, 64)) * 2e-5).astype(np.float32)

    def error(factor: float) -> float:
        stored = weights_of(quantize_matrix(table * np.float32(factor), "q8"), 64)
        return float(np.square(stored / factor - table).mean() / np.square(table).mean())

    exponent = table_exponent(table, "q8")
    assert exponent > 8
    assert error(2.0**exponent) < 0.5 * error(1.0)
    assert error(2.0 ** (exponent + 3)) == pytest.approx(error(2.0**exponent), rel=0.05)


def test_ordinary_tables_need_nothing_and_limits_are_kept() -> None:
    table = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    assert table_exponent(table, "q8") == 0
    assert table_exponent(np.zeros((4, 32), np.float32), "q8") == 0
    tiny = table * np.float32(1e-30)
    k = table_exponent(tiny, "q8", 1.0)
    assert 1.0 / 2.0**k >= 1e-6
    model = source("llama")
    assert normalize_embeddings(model, {}, 0, head_apart=False) == (model, {})
    replace(model.spec, embed_scale=1.0 / 2.0**k).check()
