"""The torch forward against the NumPy reference, layer by layer, and its gradients."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.errors import ContextOverflow, MissingExtra, UsageError
from flashlite.model.differentiable import Differentiable, as_tensors
from flashlite.model.reference import Reference

torch: Any = pytest.importorskip("torch", reason="torch is not installed")


def in_memory(case: Any) -> dict[str, NDArray[np.float32]]:
    return {name: case.source.tensor(name) for name, _ in case.source.spec.shapes()}


def test_every_step_equals_the_reference(case: Any) -> None:
    weights, spec = in_memory(case), case.source.spec
    reference, ours = Reference(spec, weights), Differentiable(spec, as_tensors(weights))
    batch = np.stack([case.ids, case.ids[::-1]])
    x = ours.embed(torch.from_numpy(batch.astype(np.int64)))
    rows = [reference.embed(ids) for ids in batch]
    for i in range(spec.n_layers):
        np.testing.assert_allclose(x.numpy(), rows, rtol=0, atol=1e-4)
        x, rows = ours.layer(i, x), [reference.layer(i, row) for row in rows]
    h, rows = ours.final_norm(x), [reference.final_norm(row) for row in rows]
    found, expected = ours.head(h).numpy(), [reference.head(row) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(found[0] - case.logits).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma3", {"sliding_window": 9}),
        ("gemma3", {"embed_scale": 1.0}),
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"post_norms": False}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen3", {"qk_norm": False}),
        ("llama", {"attn_scale": 0.36}),
    ],
)
def test_a_wrong_spec_is_noticed(
    cases: Mapping[str, Any], name: str, change: dict[str, Any]
) -> None:
    case = cases[name]
    wrong = Differentiable(replace(case.source.spec, **change), as_tensors(in_memory(case)))
    found = wrong.logits(torch.from_numpy(case.ids[None].astype(np.int64)))[0].numpy()
    assert np.abs(found - case.logits).max() > 1e-3


def test_gradients_are_those_of_finite_differences(cases: Mapping[str, Any]) -> None:
    case = cases["gemma3"]
    spec = case.source.spec
    tensors = {name: torch.from_numpy(w).double() for name, w in in_memory(case).items()}
    name = "layers.1.k"
    tensors[name].requires_grad_()
    ids = torch.from_numpy(case.ids[None].astype(np.int64))

    def loss() -> Any:
        return Differentiable(spec, tensors).logits(ids).log_softmax(-1)[0, -1, 3]

    loss().backward()
    with torch.no_grad():
        tensors[name][2, 5] += 1e-4
        above = float(loss())
        tensors[name][2, 5] -= 2e-4
        below = float(loss())
    slope = float(tensors[name].grad[2, 5])
    assert abs(slope) > 1e-6
    assert (above - below) / 2e-4 == pytest.approx(slope, rel=1e-4)


def test_an_observer_sees_every_matrix_with_its_inputs_and_outputs(case: Any) -> None:
    weights, spec = in_memory(case), case.source.spec
    seen: dict[str, tuple[Any, Any]] = {}
    ours = Differentiable(spec, as_tensors(weights), lambda n, x, y: seen.update({n: (x, y)}))
    ours.hidden(torch.from_numpy(case.ids[None].astype(np.int64)))
    matrices = [n for n, s in spec.shapes() if len(s) == 2 and n.startswith("layers.")]
    assert sorted(seen) == sorted(matrices)
    for name, (x, y) in seen.items():
        np.testing.assert_allclose(x.numpy() @ weights[name].T, y.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("ids", [[], [[]], [[80]], [[-1]], [1, 2], [[1.5]]])
def test_bad_ids_are_refused(cases: Mapping[str, Any], ids: Any) -> None:
    source = cases["llama"].source
    with pytest.raises(UsageError, match="id"):
        Differentiable(source.spec, as_tensors(source.tensor)).logits(torch.tensor(ids))


def test_more_ids_than_positions_are_refused(cases: Mapping[str, Any]) -> None:
    source = cases["llama"].source
    with pytest.raises(ContextOverflow, match=r"65 tokens.* 64"):
        Differentiable(source.spec, as_tensors(source.tensor)).logits(torch.zeros(1, 65).long())


def test_without_torch_the_extra_is_named(
    cases: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"flashlite\[train\]"):
        Differentiable(cases["llama"].source.spec, {})


@pytest.mark.parametrize("streams", [False, True])
def test_layers_that_lost_heads_or_stream_equal_the_reference(
    cases: Mapping[str, Any], streams: bool
) -> None:
    spec = cases["llama"].source.spec
    assert (spec.n_layers, spec.n_kv_heads) == (2, 2)
    spec = replace(
        spec,
        max_context=400,
        heads=((spec.n_heads // 2, spec.n_heads // 2 - 1), (1,)),
        streams=((False, streams), (streams,)),
    )
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3)
        for name, shape in spec.shapes()
    }
    ids = rng.integers(0, spec.vocab_size, 380)
    expected = Reference(spec, weights).logits(ids)
    found = Differentiable(spec, as_tensors(weights)).logits(torch.from_numpy(ids[None]))[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)
    if streams:
        dense = Reference(replace(spec, streams=()), weights).logits(ids)
        assert np.abs(dense - expected).max() > 1e-3
