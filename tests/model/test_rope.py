"""Rotary frequencies against the formulas, and the rotation against complex numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from flashlite.model.rope import rope_frequencies, rope_tables, rotate
from flashlite.model.spec import Llama3Rope, ModelSpec

SPEC = ModelSpec(
    family="llama",
    n_layers=1,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    d_ff=16,
    vocab_size=10,
    max_context=100,
    norm_eps=1e-5,
    activation="silu",
    tied_head=True,
    rope_theta=10000.0,
)


def test_frequencies_fall_from_one_by_the_base() -> None:
    frequencies = rope_frequencies(SPEC)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_local_layers_use_their_own_base_unscaled() -> None:
    spec = replace(SPEC, rope_theta_local=16.0, rope_linear=8.0)
    np.testing.assert_allclose(rope_frequencies(spec, local=True), [1, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(
        rope_frequencies(spec), np.array([1.0, 0.1, 0.01, 0.001]) / 8, rtol=1e-6
    )
    scaled = replace(SPEC, rope_linear=8.0)
    np.testing.assert_array_equal(rope_frequencies(scaled, local=True), rope_frequencies(scaled))


def test_llama3_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    # Turns over 1000 positions: 159, 15.9, 1.59, 0.159.
    scaling = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=1000
    )
    frequencies = rope_frequencies(replace(SPEC, rope_llama3=scaling))
    kept = (1000 * 0.01 / (2 * math.pi) - 1.0) / 3.0
    mixed = kept * 0.01 + (1 - kept) * 0.01 / 8
    np.testing.assert_allclose(frequencies, [1.0, 0.1, mixed, 0.001 / 8], rtol=1e-6)


def test_factors_say_what_llama3_says() -> None:
    scaling = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=1000
    )
    scaled = rope_frequencies(replace(SPEC, rope_llama3=scaling))
    factors = tuple(float(f) for f in rope_frequencies(SPEC) / scaled)
    np.testing.assert_allclose(
        rope_frequencies(replace(SPEC, rope_factors=factors)), scaled, rtol=1e-6
    )


@pytest.mark.parametrize("position", [0, 1, 37, 8191])
def test_rotation_turns_pairs_by_the_angle(position: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1, 8)).astype(np.float32)
    cos, sin = rope_tables(SPEC, np.array([position]))
    turned = rotate(x, cos, sin)
    pairs = x[..., :4] + 1j * x[..., 4:]
    expected = pairs * np.exp(1j * position * rope_frequencies(SPEC).astype(np.float64))
    np.testing.assert_allclose(turned[..., :4] + 1j * turned[..., 4:], expected, atol=1e-6)
