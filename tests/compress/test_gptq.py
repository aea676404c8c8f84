"""Rounding for what a matrix multiplies: each step lowers the error of the outputs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.compress.gptq import (
    _half_step,
    curvature,
    descend,
    gptq,
    output_error,
    search,
    weights_of,
)
from flashlite.compress.pack import Quantized, dequantize, pack
from flashlite.compress.quantize import CODES, quantize_matrix
from flashlite.errors import CompressError

F32 = NDArray[np.float32]
FORMATS = sorted(CODES)


def problem(rows: int = 48, cols: int = 76, seed: int = 0) -> tuple[F32, F32]:
    """Weights, and the mean of x x^T of inputs that hang together; the last group is short."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((cols, cols)) * np.exp(rng.standard_normal(cols))
    inputs = (rng.standard_normal((400, cols)) @ mixing).astype(np.float32)
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    return weights, inputs.T @ inputs / np.float32(len(inputs))


def errors(fmt: str, seed: int = 0) -> list[float]:
    """Of plain rounding, weighted scales, GPTQ, and descent after it."""
    weights, second = problem(seed=seed)
    curve = curvature(second)
    plain = quantize_matrix(weights, fmt)
    found = search(weights, fmt, second)
    rounded = gptq(weights, curve, found)
    better = descend(weights, curve, rounded)
    steps = (plain, found, rounded, better)
    return [output_error(weights, weights_of(m, weights.shape[1]), second) for m in steps]


@pytest.mark.parametrize("fmt", FORMATS)
def test_each_step_lowers_the_error_of_the_outputs(fmt: str) -> None:
    plain, found, rounded, better = np.mean([errors(fmt, seed) for seed in range(3)], axis=0)
    assert found < plain or fmt == "q8"
    assert rounded < 0.6 * found
    assert better < 0.97 * rounded


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_result_is_what_the_kernels_read(fmt: str) -> None:
    weights, second = problem()
    matrix = descend(weights, curvature(second), quantize_matrix(weights, fmt))
    rows, cols = weights.shape
    assert np.array_equal(dequantize(pack(matrix), rows, cols), weights_of(matrix, cols))
    assert matrix.codes.dtype == quantize_matrix(weights, fmt).codes.dtype
    span = CODES[fmt]
    codes = matrix.codes.astype(int) - span.zero
    assert codes.min() >= span.low
    assert codes.max() <= span.high


def test_gptq_is_the_textbook_recursion() -> None:
    """One row, no reordering of equal columns, against the algorithm written out."""
    weights, second = problem(rows=3, cols=32, seed=4)
    curve = curvature(second, 0.05)
    start = quantize_matrix(weights, "q4")
    rest = weights[:, curve.order].astype(np.float64)
    inverse = np.linalg.inv(curve.damped[np.ix_(curve.order, curve.order)].astype(np.float64))
    upper = np.linalg.cholesky(inverse).T
    scale = start.scales[:, 0].astype(np.float64)
    expected = np.empty_like(rest)
    for j in range(32):
        code = np.clip(np.rint(rest[:, j] / scale), -8, 7)
        expected[:, j] = code * scale
        step = (rest[:, j] - expected[:, j]) / upper[j, j]
        rest[:, j + 1 :] -= step[:, None] * upper[j, j + 1 :]
    got = weights_of(gptq(weights, curve, start), 32)[:, curve.order]
    assert np.mean(np.abs(got - expected) > 1e-4) < 0.02  # ties fall either way


def test_descent_never_raises_the_damped_error() -> None:
    weights, second = problem(seed=7)
    curve = curvature(second)
    matrix: Quantized = quantize_matrix(weights, "q4m")
    last = output_error(weights, weights_of(matrix, 76), curve.damped)
    for _ in range(4):
        matrix = descend(weights, curve, matrix, sweeps=1)
        error = output_error(weights, weights_of(matrix, 76), curve.damped)
        assert error <= last * (1 + 1e-5)
        last = error


def test_unread_columns_and_zero_rows_stay_finite() -> None:
    weights, second = problem()
    weights[3] = 0
    second[:, 5] = second[5] = 0
    curve = curvature(second)
    for fmt in FORMATS:
        matrix = descend(weights, curve, gptq(weights, curve, search(weights, fmt, second)))
        values = weights_of(matrix, 76)
        assert np.isfinite(values).all()
        assert not values[3].any()


def test_inputs_that_are_not_finite_are_refused() -> None:
    _, second = problem()
    second[2, 3] = np.nan
    with pytest.raises(CompressError, match="not finite"):
        curvature(second)


@pytest.mark.parametrize("fmt", FORMATS)
def test_importance_moves_the_error_to_where_it_counts_less(fmt: str) -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((64, 96)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(96)).astype(np.float32)
    plain = weights_of(quantize_matrix(weights, fmt), 96)
    counted = weights_of(quantize_matrix(weights, fmt, importance=importance), 96)

    def error(stored: F32) -> float:
        return float((np.square(stored - weights) * importance).sum())

    assert error(counted) < error(plain) * (1.0 if fmt == "q8" else 0.9)
    equal = quantize_matrix(weights, fmt, importance=np.ones(96, np.float32))
    assert np.mean(weights_of(equal, 96) != plain) < 0.02


def test_a_scale_moves_only_where_half_precision_lets_it_gain() -> None:
    value = np.array([1.0, 1.0, 1.0], np.float32)
    curve = np.array([1.0, 1.0, 0.0], np.float32)
    # Below 1 half-precision numbers are 2^-11 apart: a wish for less than half of it is none.
    wanted = np.array([0.25, -0.3 * 2**-11, 0.1], np.float32)
    assert _half_step(value, -wanted, curve).tolist() == [0.25, 0.0, 0.0]
    large = _half_step(np.array([65504.0], np.float32), np.array([-1e3], np.float32), curve[:1])
    assert large.tolist() == [0.0]
