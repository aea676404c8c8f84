"""Attention mass, ablation and redundancy against plain computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_model import tiny

from flashlite.analyze import heads
from flashlite.analyze.divergence import Exact
from flashlite.analyze.heads import ablated_kl, attention_mass, head_columns, lowest, redundancies
from flashlite.analyze.ranks import spearman
from flashlite.model import reference
from flashlite.model.metrics import kl_divergence
from flashlite.model.reference import Reference


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "qwen3"])
def test_mass_is_that_of_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "WINDOW", 5)
    monkeypatch.setattr(heads, "_MASS_ROWS", 7)
    model = tiny(family, texts=1, length=40)
    spec, ids = model.spec, model.texts[0]
    plain: list[float] = []

    def attend(q: Any, k: Any, v: Any, scale: float, window: int | None, _: bool) -> Any:
        scores = (q @ k.T) * scale
        age = np.arange(len(q))[:, None] - np.arange(len(k))
        scores[(age < 0) | (age >= (window or 10**9))] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        near = (age < 5) | (np.arange(len(k)) < heads.SINK)
        plain.append(float((p * near).sum(axis=1)[heads.SINK + 5 :].mean()))
        return p @ v

    monkeypatch.setattr(reference, "_attend", attend)
    Reference(spec, model.read).hidden(ids)
    monkeypatch.undo()
    monkeypatch.setattr(heads, "WINDOW", 5)
    monkeypatch.setattr(heads, "_MASS_ROWS", 7)
    found = attention_mass(spec, model.read, ids)
    assert found is not None
    expected = np.array(plain).reshape(spec.n_layers, spec.n_heads)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert 0.1 < found.min() < 0.95
    assert attention_mass(spec, model.read, ids[:10]) is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_head_left_out_is_its_mean(family: str) -> None:
    model = tiny(family, texts=3)
    spec = model.spec
    exact = Exact(spec, model.read, model.texts, positions=1000)
    name = f"layers.{spec.n_layers - 2}.o"
    columns = head_columns(spec, [0, spec.n_heads - 1])
    assert len(columns) == 2 * spec.head_dim
    means = {name: np.linspace(-1, 1, spec.q_rows)}
    found = ablated_kl(exact, name, columns, means)
    # The same with a matrix that does not read them, and their part as a constant.
    w = model.weights[name].copy()
    constant = w[:, columns] @ means[name][columns].astype(np.float32)
    w[:, columns] = 0

    class Biased(Reference):
        def _linear(self, at: str, x: Any) -> Any:
            y = super()._linear(at, x)
            return y + constant if at == name else y

    other = Biased(spec, {**model.weights, name: w})
    source = Reference(spec, model.read)
    rows = [kl_divergence(source.logits(i)[1:], other.logits(i)[1:]) for i in model.texts]
    assert found == pytest.approx(np.concatenate(rows).mean(), rel=1e-3)
    assert found > 1e-4


def test_the_lowest_come_first() -> None:
    scores = np.array([[3.0, 1.0], [2.0, 0.5]])
    assert lowest(scores, 0.5) == [(1, 1), (0, 1)]
    assert lowest(scores, 0) == []


def test_a_layer_that_adds_nothing_is_redundant() -> None:
    model = tiny("llama", texts=2)
    for kind in ("o", "down"):
        model.weights[f"layers.1.{kind}"] = np.zeros_like(model.weights[f"layers.1.{kind}"])
    found = redundancies(Exact(model.spec, model.read, model.texts))
    assert found[1] == pytest.approx(0, abs=1e-6)
    assert found[0] > 0.01


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (1, -1, 0, 0)
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 12 / 60)
    assert spearman([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None
