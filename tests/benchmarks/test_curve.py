"""What the curve of loss against size is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import curve
import lowrank
from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.quantize import quantize_matrix
from flashlite.model.families import describe

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


@pytest.fixture(scope="module")
def body() -> curve.Body:
    return curve.body_of(describe(open_checkpoint(FAMILIES / "llama")))


@pytest.mark.parametrize("bits", [4.5, 4.8, 5.0, 5.25, 6.0, 7.0, 8.5])
def test_a_fixed_choice_uses_its_bytes_and_no_more(body: curve.Body, bits: float) -> None:
    budget = bits * body.bytes(curve.alike(body, "q8")) / 8.5
    steps = curve.ladder(body)
    sizes = [body.bytes(curve.alike(body, fmt)) for fmt in steps]
    for choose in (curve.uniform, curve.edges):
        formats = choose(body, budget)
        size = body.bytes(formats)
        assert size <= budget
        # What is left is less than any matrix could use, or everything is at its finest.
        smallest = min(s[0] * s[1] for s in body.shapes.values())
        assert size >= max(s for s in sizes if s <= budget) - 2 * smallest
    only = curve.uniform(body, sizes[2])
    assert set(only.values()) == {steps[2]}


def test_edges_are_finer_than_the_middle() -> None:
    source = describe(open_checkpoint(FAMILIES / "llama"))
    body = curve.body_of(source)
    budget = 0.5 * sum(body.bytes(curve.alike(body, fmt)) for fmt in ("q4", "q8"))
    formats = curve.edges(body, budget)
    steps = curve.ladder(body)
    n = source.spec.n_layers
    rank = [np.mean([steps.index(formats[f"layers.{i}.{k}"]) for k in "qkvo"]) for i in range(n)]
    assert rank[0] == rank[-1] == max(rank)


def test_low_rank_keeps_what_the_inputs_show() -> None:
    rng = np.random.default_rng(0)
    cols, rank = 48, 6
    weights = rng.standard_normal((32, cols)).astype(np.float32)
    basis = rng.standard_normal((cols, rank)).astype(np.float32)
    second = basis @ basis.T + np.float32(1e-4) * np.eye(cols, dtype=np.float32)
    a, b = lowrank.factors(weights, second, rank)
    change = a @ b - weights
    left = float(np.einsum("ij,ij->", change @ second, change))
    power = float(np.einsum("ij,ij->", weights @ second, weights))
    assert left < 1e-3 * power  # the inputs lie in six directions, and six are kept
    stored = quantize_matrix(weights, "q4")
    assert stored.codes.shape == (32, 64)
    assert lowrank.low_rank_bytes((32, 48), 8) == 8 * 80 * 17 // 16
    assert lowrank.rank_for((32, 48), lowrank.low_rank_bytes((32, 48), 8)) == 8
