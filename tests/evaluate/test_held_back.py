"""True KL on held-back text against the metric of whole logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import EvaluateError
from flashlite.evaluate.held_back import HeldBack
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.model.reference import Reference

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "llama"])
def test_it_is_the_divergence_of_the_logits(family: str) -> None:
    source = describe(open_checkpoint(FAMILIES / family))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, source.spec.vocab_size, n).astype(np.int32) for n in (20, 1, 13)]

    def noisy(name: str) -> NDArray[np.float32]:
        values = source.tensor(name)
        waves = np.sin(np.arange(values.size, dtype=np.float32)).reshape(values.shape)
        out: NDArray[np.float32] = values + np.float32(0.01) * waves
        return out

    held = HeldBack(source.spec, source.tensor, texts)
    assert held.positions == 19 + 12
    expected = np.concatenate(
        [
            kl_divergence(
                Reference(source.spec, source.tensor).logits(ids)[1:],
                Reference(source.spec, noisy).logits(ids)[1:],
            )
            for ids in texts
            if len(ids) > 1
        ]
    )
    assert np.allclose(held.rows(noisy), expected, rtol=1e-3, atol=1e-6)
    assert held(noisy) == pytest.approx(expected.mean(), rel=1e-3)
    assert held(source.tensor) == pytest.approx(0, abs=1e-9)
    few = HeldBack(source.spec, source.tensor, texts, positions=8)
    assert 4 <= few.positions <= 9


def test_text_without_a_position_is_refused() -> None:
    source = describe(open_checkpoint(FAMILIES / "llama"))
    with pytest.raises(EvaluateError, match="no sequence of two tokens"):
        HeldBack(source.spec, source.tensor, [np.array([1], np.int32)])
