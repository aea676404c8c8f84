"""Rotary embedding: the frequencies and the rotation, the one place that knows them.

The generated C and the NumPy reference use the same float32 frequencies.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flashlite.model.spec import Llama3Rope, ModelSpec

__all__ = ["rope_frequencies", "rope_tables", "rotate"]


def rope_frequencies(spec: ModelSpec, local: bool = False) -> NDArray[np.float32]:
    """Radians per position of each pair, [head_dim / 2]; pair j is (j, j + head_dim / 2).

    Args:
        spec: the model.
        local: for layers that slide. Where they have their own base (Gemma 3), that base is used
            unscaled; otherwise they rotate like the global layers.
    """
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    if local and spec.rope_theta_local is not None:
        return (spec.rope_theta_local**-exponents).astype(np.float32)
    frequencies = spec.rope_theta**-exponents / spec.rope_linear
    if spec.rope_llama3 is not None:
        frequencies = _llama3(frequencies, spec.rope_llama3)
    if spec.rope_factors is not None:
        frequencies = frequencies / np.asarray(spec.rope_factors, dtype=np.float64)
    return frequencies.astype(np.float32)


def rope_tables(
    spec: ModelSpec, positions: NDArray[np.integer], local: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, each [positions, head_dim / 2].

    The angle is taken in float64: at position 8,000 a float32 angle is off by 2e-4 radians.
    """
    angles = np.outer(positions.astype(np.float64), rope_frequencies(spec, local))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Rotate the pairs of x [..., positions, head_dim] by tables [positions, head_dim / 2]."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _llama3(frequencies: NDArray[np.float64], scaling: Llama3Rope) -> NDArray[np.float64]:
    """Slow pairs are stretched by `factor`, fast ones kept, those between are mixed.

    A pair is slow when it turns less than `low_freq_factor` times over the original context and
    fast when it turns more than `high_freq_factor` times (Llama 3.1 model card, `rope_type`).
    """
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
