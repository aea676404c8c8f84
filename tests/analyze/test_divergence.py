"""Exact losses: a suffix equals the whole, and the formula equals the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import round_to, tiny

from flashlite.analyze import divergence
from flashlite.analyze.divergence import Exact
from flashlite.analyze.weights import CachedWeights, replaced
from flashlite.errors import EvaluateError
from flashlite.model.metrics import kl_divergence
from flashlite.model.reference import Floats, Reference


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("room", [0, 1 << 30])
@pytest.mark.parametrize("steps", [6, 1000])
def test_a_suffix_is_the_whole_and_the_loss_is_that_of_its_logits(
    family: str, room: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, texts=3)
    monkeypatch.setattr(divergence, "_CHUNK_VALUES", 500)  # several parts
    exact = Exact(model.spec, model.read, model.texts, positions=36, room=room)
    assert exact.positions == 36
    name = f"layers.{model.spec.n_layers - 1}.down"
    changed = {name: round_to(model.weights[name], steps)}
    found = exact.from_layer(model.spec.n_layers - 1, changed)
    assert found == exact.from_layer(0, changed) == exact.from_ids(changed)
    source, other = (Reference(model.spec, w) for w in (model.read, replaced(model.read, changed)))
    rows = slice(1, None, 2)
    plain = [
        kl_divergence(source.logits(ids)[rows], other.logits(ids)[rows]) for ids in model.texts
    ]
    assert found == pytest.approx(np.concatenate(plain).mean(), rel=1e-3, abs=5e-8)
    assert found > 0
    assert exact.from_layer(0, {}) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_table_and_the_head_apart(family: str) -> None:
    model = tiny(family, texts=3)
    exact = Exact(model.spec, model.read, model.texts, positions=1000)
    rounded = round_to(model.weights["embed"], 10)
    head = "embed" if model.spec.tied_head else "head"
    other = round_to(model.weights[head], 10)
    lookup_only = exact.from_ids({"embed": rounded}, head=model.weights[head])
    plain = []
    for ids in model.texts:
        source = Reference(model.spec, model.read)
        changed = Reference(model.spec, replaced(model.read, {"embed": rounded}))
        p = source.logits(ids)[1:]
        plain.append(
            [
                kl_divergence(p, (changed.hidden(ids) @ model.weights[head].T)[1:]).sum(),
                kl_divergence(p, (source.hidden(ids) @ other.T)[1:]).sum(),
            ]
        )
    lookup, by_head = np.sum(plain, axis=0) / exact.positions
    assert lookup_only == pytest.approx(lookup, rel=1e-3)
    assert exact.head_only(other) == pytest.approx(by_head, rel=1e-3)


def test_all_matrices_changed_is_the_model_of_them() -> None:
    model = tiny("gemma3", texts=2)
    exact = Exact(model.spec, model.read, model.texts)
    changed = {n: round_to(w, 20) for n, w in model.weights.items() if w.ndim == 2}
    assert exact.all_changed(lambda name, w: round_to(w, 20)) == exact.from_ids(changed)


def test_a_hopeless_change_is_finite() -> None:
    model = tiny("llama", texts=2)
    exact = Exact(model.spec, model.read, model.texts)
    huge = exact.from_ids({"head": model.weights["head"] * np.float32(-1e3)})
    assert 10 < huge < 1e6


def test_a_calibration_without_pairs_is_refused() -> None:
    model = tiny("llama", texts=2, length=1)
    with pytest.raises(EvaluateError, match="two tokens"):
        Exact(model.spec, model.read, model.texts)


def test_weights_are_kept_from_the_end_within_the_budget() -> None:
    model = tiny("llama")
    reads: list[str] = []

    def read(name: str) -> Floats:
        reads.append(name)
        return model.weights[name]

    total = sum(w.nbytes for w in model.weights.values())
    weights = CachedWeights(model.spec, read, total // 2)
    for _ in range(2):
        for name in model.weights:
            np.testing.assert_array_equal(weights(name), model.weights[name])
    once = {name for name in reads if reads.count(name) == 1}
    assert "head" in once
    assert "layers.1.q" in once
    assert "layers.0.q" not in once
    assert sum(model.weights[name].nbytes for name in once) <= total // 2
