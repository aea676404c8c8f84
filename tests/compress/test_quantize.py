from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.compress.pack import Quantized, dequantize, pack
from flashlite.compress.quantize import quantize_matrix
from flashlite.errors import CompressError

FORMATS = ["q8", "q6", "q5", "q4", "q4m"]
SYMMETRIC = {"q8": (-127, 127), "q6": (-32, 31), "q5": (-16, 15), "q4": (-8, 7)}
ZERO = {"q6": 32, "q5": 16, "q4": 8}
Floats = NDArray[np.float32]


def weights(rows: int, cols: int, seed: int = 0) -> Floats:
    """Heavy-tailed, as trained weights are."""
    values = np.random.default_rng(seed).standard_t(5, (rows, cols)) * 0.03
    return np.asarray(values, np.float32)


def restored(matrix: Quantized, cols: int) -> Floats:
    return dequantize(pack(matrix), len(matrix.codes), cols)


def plain_rounding(w: Floats, fmt: str) -> Floats:
    """Nearest code under the scale of the largest weight, in half precision."""
    groups = w.reshape(-1, 32)
    if fmt == "q4m":
        low = groups.min(axis=1, keepdims=True)
        scale = ((groups.max(axis=1, keepdims=True) - low) / 15).astype(np.float16)
        floor = low.astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint((groups - floor) / scale.astype(np.float32)), 0, 15)
        return np.asarray(codes * scale + floor, np.float32).reshape(w.shape)
    low, high = SYMMETRIC[fmt]
    scale = (np.abs(groups).max(axis=1, keepdims=True) / high).astype(np.float16)
    codes = np.clip(np.rint(groups / scale.astype(np.float32)), low, high)
    return np.asarray(codes * scale, np.float32).reshape(w.shape)


def relative_error(found: Floats, w: Floats) -> float:
    return float(np.sqrt(np.square(found - w).sum() / np.square(w).sum()))


@pytest.mark.parametrize(
    ("fmt", "at_most"),
    [("q8", 0.99), ("q6", 0.95), ("q5", 0.9), ("q4", 0.845), ("q4m", 0.925)],
)
def test_search_beats_plain_rounding(fmt: str, at_most: float) -> None:
    w = weights(256, 640)
    searched = relative_error(restored(quantize_matrix(w, fmt), 640), w)
    plain = relative_error(plain_rounding(w, fmt), w)
    assert searched <= at_most * plain


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_group_is_worse_than_plainly_rounded(fmt: str) -> None:
    """Each group is compared with the plain scale that its search starts from."""
    w = weights(256, 320, seed=3)
    if fmt in ZERO:  # the largest weight on the longer side of the range
        low, high = SYMMETRIC[fmt]
        peak = np.abs(w.reshape(-1, 32)).argmax(axis=1)
        signed = w.reshape(-1, 32)[np.arange(len(peak)), peak]
        scale = (signed / low).astype(np.float16).astype(np.float32)[:, None]
        codes = np.clip(np.rint(w.reshape(-1, 32) / scale), low, high)
        plain = (codes * scale).reshape(w.shape)
    else:
        plain = plain_rounding(w, fmt)

    def per_group(found: Floats) -> Floats:
        return np.asarray(np.square(found.astype(np.float64) - w).reshape(-1, 32).sum(axis=1))

    searched = per_group(restored(quantize_matrix(w, fmt), 320))
    assert (searched <= per_group(plain) * (1 + 1e-4)).all()


def test_a_minimum_pays_for_its_half_bit() -> None:
    """Why preset q4 stores q4m: the error falls by a sixth or more."""
    w = weights(256, 640)
    symmetric, affine = (
        relative_error(restored(quantize_matrix(w, fmt), 640), w) for fmt in ("q4", "q4m")
    )
    assert affine < 0.84 * symmetric


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("cols", [1, 31, 33, 45, 172])
def test_a_short_last_group_is_fitted_on_its_own_columns(fmt: str, cols: int) -> None:
    """The padding must not bend the last group: it comes out as the same columns do alone."""
    w = weights(37, cols, seed=cols)
    w[:, -1] += 0.5  # far from zero, where padding with zeros would cost most
    first = cols // 32 * 32 if cols % 32 else cols - 32
    whole, alone = quantize_matrix(w, fmt), quantize_matrix(w[:, first:], fmt)
    assert whole.codes.shape == (37, -(-cols // 32) * 32)
    assert np.array_equal(whole.codes[:, first:], alone.codes)
    assert np.array_equal(whole.scales[:, -1:], alone.scales)
    assert (whole.codes[:, cols:] == ZERO.get(fmt, 0)).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_on_a_grid_are_kept(fmt: str) -> None:
    rng = np.random.default_rng(1)
    low, high = SYMMETRIC.get(fmt, (0, 15))
    codes = rng.integers(low, high + 1, (64, 4, 32))
    codes[..., 0], codes[..., 1] = low, high  # the whole range is used
    scale = np.float16(0.01171875)
    w = (codes * np.float32(scale)).astype(np.float32)
    if fmt == "q4m":
        w += np.float32(np.float16(-0.0625))
    w = w.reshape(64, 128)
    assert np.array_equal(restored(quantize_matrix(w, fmt), 128), w)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 3e-8, 6e-8, 1e-6])
def test_tiny_groups_keep_finite_scales(fmt: str, size: float) -> None:
    w = (np.random.default_rng(2).uniform(-1, 1, (16, 64)) * size).astype(np.float32)
    matrix = quantize_matrix(w, fmt)
    assert np.isfinite(matrix.scales).all()
    assert np.abs(restored(matrix, 64) - w).max() <= max(size, 1e-7)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_constant_group_is_kept_closely(fmt: str) -> None:
    w = np.full((3, 64), 0.3, np.float32)
    assert np.abs(restored(quantize_matrix(w, fmt), 64) - w).max() < 3e-4


@pytest.mark.parametrize(
    ("fmt", "value"), [("q8", 1e7), ("q6", 3e6), ("q5", 2e6), ("q4", 6e5), ("q4m", -7e4)]
)
def test_a_scale_beyond_half_precision_names_the_tensor(fmt: str, value: float) -> None:
    w = weights(16, 64)
    w[3, 5] = value
    with pytest.raises(CompressError, match=r"layers\.3\.up .*65504"):
        quantize_matrix(w, fmt, name="layers.3.up")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    w = weights(16, 64)
    w[3, 5] = value
    with pytest.raises(CompressError, match=r"head .*not finite"):
        quantize_matrix(w, "q8", name="head")
