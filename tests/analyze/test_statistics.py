"""Gradients against finite differences, and predicted against exact losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_model import Tiny, tiny

from flashlite.analyze import statistics
from flashlite.analyze.divergence import Exact
from flashlite.analyze.sensitivity import Formats, measure_unit
from flashlite.analyze.statistics import (
    Statistics,
    Sums,
    gradient_sums,
    plain_sums,
    predicted_kl,
)
from flashlite.analyze.units import units_of
from flashlite.analyze.weights import replaced
from flashlite.model.metrics import log_softmax
from flashlite.model.reference import Reference


def statistics_of(model: Tiny, gradients: bool = True, draws: int = 1) -> Statistics:
    sums = Sums()
    for at, ids in enumerate(model.texts * draws):
        if gradients:
            gradient_sums(model.spec, model.read, ids, at, sums)
        else:
            plain_sums(model.spec, model.read, ids, sums)
    return Statistics.of(model.spec, sums)


def fisher(model: Tiny, change: Any) -> float:
    """Mean over positions of the KL of a tiny change, exactly: all labels, all texts."""
    total, n = 0.0, 0
    for ids in model.texts:
        p = log_softmax(Reference(model.spec, model.read).logits(ids))
        q = log_softmax(change(ids))
        total += float((np.exp(p) * (p - q)).sum())
        n += len(ids)
    return total / n


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_a_change_of_one_output_loses_what_its_statistics_say(family: str) -> None:
    """E[g_i^2 |x|^2] / 2 against the KL of a random row of one matrix, by finite differences."""
    pytest.importorskip("torch")
    model = tiny(family, texts=24)
    found = statistics_of(model, draws=6)
    rng = np.random.default_rng(0)
    name = f"layers.{model.spec.n_layers - 1}.down"
    ratios = []
    for row in range(6):
        d = np.zeros_like(model.weights[name])
        d[row] = rng.standard_normal(d.shape[1], dtype=np.float32) * np.float32(0.02)
        d *= np.float32(np.abs(model.weights[name]).mean())
        changed = replaced(model.read, {name: model.weights[name] + d})
        exact = fisher(model, Reference(model.spec, changed).logits)
        ratios.append(exact / predicted_kl(d, found.outputs[name], found.inputs[name]))
    assert 0.7 < np.exp(np.mean(np.log(ratios))) < 1.4
    assert all(0.3 < ratio < 3 for ratio in ratios)


def test_gradients_of_one_label_are_finite_differences() -> None:
    """With one position there is one label: of some label, all outputs of o have its slopes."""
    pytest.importorskip("torch")
    model = tiny("llama", texts=1, length=1)
    ids = model.texts[0]
    sums = Sums()
    gradient_sums(model.spec, model.read, ids, 3, sums)
    name = "layers.1.o"
    seen: dict[str, Any] = {}
    Reference(model.spec, model.read, lambda n, x: seen.update({n: x.copy()})).hidden(ids)
    x = seen[name][0].astype(np.float64)
    slopes = []  # by output, of every label
    for i in range(6):
        logs = []
        for sign in (1, -1):
            w = model.weights[name].copy()
            w[i] += (sign * 1e-2 * x / (x @ x)).astype(np.float32)  # moves output i by 1e-2
            changed = replaced(model.read, {name: w})
            logs.append(log_softmax(Reference(model.spec, changed).logits(ids))[0])
        slopes.append((logs[0] - logs[1]) / 2e-2)
    expected = np.array(slopes) ** 2 * (x @ x)
    wrong = np.abs(expected - sums[f"rows/{name}"][:6, None]).max(axis=0)
    assert wrong.min() < 2e-2 * expected.max()
    assert np.median(wrong) > 10 * wrong.min()


def test_labels_are_drawn_as_often_as_they_are_likely() -> None:
    torch = pytest.importorskip("torch")
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).repeat(40000, 1)
    found = statistics._draw(torch, p, torch.Generator().manual_seed(0))
    shares = np.bincount(found.numpy(), minlength=4) / len(p)
    np.testing.assert_allclose(shares, p[0].numpy(), atol=0.01)
    assert shares[1] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_predictions_are_losses(family: str) -> None:
    pytest.importorskip("torch")
    model = tiny(family, texts=32)
    found = statistics_of(model, draws=2)
    exact = Exact(model.spec, model.read, model.texts, positions=700)
    rng = np.random.default_rng(0)
    for unit in units_of(model.spec):
        if unit.layer is None:
            continue
        changed, predicted = {}, 0.0
        for name in unit.tensors:
            w = model.weights[name]
            d = rng.standard_normal(w.shape, dtype=np.float32) * np.float32(0.02 * w.std())
            changed[name] = w + d
            predicted += predicted_kl(d, found.outputs[name], found.inputs[name])
        assert 0.6 < exact.from_layer(unit.layer, changed) / predicted < 1.6, unit.name


def test_gates_are_the_loss_of_a_closed_head() -> None:
    pytest.importorskip("torch")
    model = tiny("llama", texts=32)
    found = statistics_of(model, draws=8)
    assert found.importance is not None
    size = model.spec.head_dim
    for layer in range(model.spec.n_layers):
        name = f"layers.{layer}.o"
        for head in range(model.spec.n_heads):
            w = model.weights[name].copy()
            w[:, head * size : (head + 1) * size] *= 0.95  # a gate of 0.95: 0.05^2 of the loss
            exact = fisher(model, Reference(model.spec, replaced(model.read, {name: w})).logits)
            assert 0.5 < exact / (0.05**2 * found.importance.heads[layer, head]) < 2


def test_without_gradients_inputs_are_mean_squares() -> None:
    model = tiny("qwen3")
    found = statistics_of(model, gradients=False)
    squares: dict[str, list[Any]] = {}

    def observe(name: str, x: Any) -> None:
        squares.setdefault(name, []).append(x**2)

    for ids in model.texts:
        Reference(model.spec, model.read, observe).hidden(ids)
    for name, parts in squares.items():
        expected = np.concatenate(parts).mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(found.inputs[name], expected, rtol=1e-5)
        assert (found.outputs[name] == 1).all()
    assert found.importance is None
    assert found.tokens == sum(map(len, model.texts))
    assert found.inputs["embed"].sum() == pytest.approx(1)


def test_a_tied_table_loses_as_look_up_and_as_head(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(statistics, "_SCORED_EVERY", 1)  # a label at every position: less noise
    model = tiny("gemma3", texts=40)
    assert model.spec.tied_head
    found = statistics_of(model, draws=3)
    exact = Exact(model.spec, model.read, model.texts, positions=900)
    table = model.weights["embed"]
    d = np.random.default_rng(0).standard_normal(table.shape, dtype=np.float32)
    d *= np.float32(0.02 * table.std())
    head = predicted_kl(d, found.outputs["head"], found.inputs["head"])
    lookup = predicted_kl(d, found.inputs["embed"], found.outputs["embed"])
    assert 0.6 < exact.head_only(table + d) / head < 1.6
    assert 0.6 < exact.from_ids({"embed": table + d}, head=table) / lookup < 1.6
    rounding = Formats(("moved",), lambda name, w, fmt: w + d, lambda shape, fmt: 1)
    unit = units_of(model.spec)[0]
    measured = measure_unit(unit, model.spec, model.read, found, rounding, exact, ())
    assert measured.total("moved") == pytest.approx(head + lookup, rel=1e-4)
    assert measured.exact["moved"] == pytest.approx(exact.from_ids({"embed": table + d}))
