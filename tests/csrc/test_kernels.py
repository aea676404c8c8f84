"""Every table of kernels against NumPy and against the plain table.

Every table must equal the plain one bit for bit, and the plain one what NumPy computes: exactly in
the integer part (with all scales 1 the results are integers below 2^24), within float32's reach of
float64 elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import kernel_harness as h
import numpy as np
import numpy.typing as npt
import pytest

INTEGER = [name for name, table in h.TABLES.items() if not table.fp32]
SHAPES = [(16, 32), (1, 1), (17, 33), (48, 96), (96, 576), (31, 1536), (5, 100), (64, 640)]
COUNTS = [2, 3, 4, 5, 6, 7, 12, 13, 20]


@pytest.fixture(scope="module")
def built() -> dict[str, h.Kernels]:
    return {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def table(name: str, built: dict[str, h.Kernels], directory: Path) -> h.Kernels:
    if name not in built:
        reason = h.missing(h.TABLES[name])
        if reason:
            pytest.skip(f"{name}: {reason}")
        built[name] = h.build(name, directory)
    return built[name]


@pytest.fixture
def plain(built: dict[str, h.Kernels], directory: Path) -> h.Kernels:
    return table("plain", built, directory)


@pytest.fixture(params=INTEGER)
def kernels(
    request: pytest.FixtureRequest, built: dict[str, h.Kernels], directory: Path
) -> h.Kernels:
    return table(request.param, built, directory)


@pytest.fixture(params=list(h.TABLES))
def any_kernels(
    request: pytest.FixtureRequest, built: dict[str, h.Kernels], directory: Path
) -> h.Kernels:
    return table(request.param, built, directory)


def multiply(kernels: h.Kernels, w: h.Linear, act: h.Activations) -> h.F32:
    """y [tokens, rows] by gemv or gemm."""
    if act.n == 1:
        return kernels.gemv(w, act)[None, : w.rows]
    return kernels.gemm(w, act)[: act.n, : w.rows]


# ---- matrices: the integer part, bit for bit ----


@pytest.mark.parametrize("format", h.FORMATS)
@pytest.mark.parametrize("n", [1, *COUNTS])
def test_products_are_exact_with_unit_scales(kernels: h.Kernels, format: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for rows, cols in SHAPES:
        w = h.random_linear(rng, format, rows, cols, unit=True)
        act = kernels.activations(n, cols)
        act.fill(rng.integers(-127, 128, (n, cols)), np.ones((n, act.groups)))
        expected = h.product(w, act.true_codes(), act.true(act.scale))
        assert np.array_equal(multiply(kernels, w, act), expected), (rows, cols)


@pytest.mark.parametrize("n", [1, 6, 18])
@pytest.mark.parametrize("x", [-127, 127, "alternating"])
@pytest.mark.parametrize(
    ("format", "code"),
    [
        ("q8", -128),
        ("q8", 127),
        ("q8", "mixed"),
        *((format, code) for format, bits in h.HIGH_BITS.items() for code in (0, (16 << bits) - 1)),
    ],
)
def test_extremes_do_not_saturate(
    kernels: h.Kernels, format: str, code: int | str, x: int | str, n: int
) -> None:
    rows, cols = 32, 128
    codes = np.full((rows, cols), -128 if code == "mixed" else code)
    if code == "mixed":
        codes[:, ::2] = 127
    w = h.Linear.pack(format, codes, np.ones((rows, 4)), np.ones((rows, 4)))
    values = np.full((n, cols), 127 if x == "alternating" else x)
    if x == "alternating":
        values[:, ::2] = -127
    act = kernels.activations(n, cols)
    act.fill(values, np.ones((n, 4)))
    expected = h.product(w, act.true_codes(), act.true(act.scale))
    assert np.array_equal(multiply(kernels, w, act), expected)


@pytest.mark.parametrize("format", h.FORMATS)
@pytest.mark.parametrize("n", [1, 4, 15])
def test_a_range_of_blocks_equals_the_whole(kernels: h.Kernels, format: str, n: int) -> None:
    rng = np.random.default_rng(3)
    w = h.random_linear(rng, format, 75, 96)
    act = kernels.quantize(rng.normal(0, 1, (n, 96)).astype(np.float32))
    run = kernels.gemv if n == 1 else kernels.gemm
    whole, part = run(w, act), run(w, act, block0=1, block1=4)
    assert np.array_equal(part, whole[..., 16:64])


@pytest.mark.parametrize("format", h.FORMATS)
@pytest.mark.parametrize("n", [1, 3, 17])
def test_scaled_products_agree(kernels: h.Kernels, plain: h.Kernels, format: str, n: int) -> None:
    rng = np.random.default_rng(5)
    w = h.random_linear(rng, format, 50, 576)
    x = rng.normal(0, 1, (n, 576)).astype(np.float32)
    act = kernels.quantize(x)
    y = multiply(kernels, w, act)
    expected = h.product(w, act.true_codes(), act.true(act.scale))
    reach = np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=3e-6 * reach)
    assert np.array_equal(y, multiply(plain, w, act))


@pytest.mark.parametrize("format", h.FORMATS)
@pytest.mark.parametrize("n", [1, 2, 13])
def test_fp32_products_agree(
    built: dict[str, h.Kernels], directory: Path, format: str, n: int
) -> None:
    kernels = table("fp32", built, directory)
    rng = np.random.default_rng(6)
    for rows, cols in ((50, 576), (7, 45)):
        w = h.random_linear(rng, format, rows, cols)
        x = rng.normal(0, 1, (n, cols)).astype(np.float32)
        expected = x.astype(np.float64) @ w.dense().T
        y = multiply(kernels, w, kernels.quantize(x))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


# ---- quantization ----


def awkward(rng: np.random.Generator, n: int, cols: int) -> h.F32:
    """Ordinary values, zeros, halves of a code, and tiny and huge groups."""
    x = rng.normal(0, 3, (n, cols)).astype(np.float32)
    x[rng.random((n, cols)) < 0.1] = 0
    for group in range(0, cols, h.GROUP):
        kind = rng.integers(6)
        part = x[:, group : group + h.GROUP]
        if kind == 0:
            part[...] = 0
        elif kind == 1:
            part[...] = rng.integers(-254, 255, part.shape) / 2
            part[:, 0] = 127
        elif kind == 2:
            part *= np.float32(10.0 ** rng.integers(-44, 37))
    return x


@pytest.mark.parametrize("n", [1, 2, 6, 13])
def test_quantize_equals_numpy(kernels: h.Kernels, n: int) -> None:
    rng = np.random.default_rng(n)
    for cols in (1, 31, 32, 33, 100, 576):
        x = awkward(rng, n, cols)
        codes, scale = h.quantize(x)
        act = kernels.quantize(x, split=1 if cols > 32 else None)
        assert np.array_equal(act.true_codes(), codes)
        assert np.array_equal(act.true(act.scale), scale)
        sums = codes.reshape(n, -1, h.GROUP).sum(2)
        assert np.array_equal(act.true(act.offset), -128 * sums)
        assert np.array_equal(act.true(act.moment), scale * sums.astype(np.float32))


def test_quantize_of_nan_and_infinity_equals_plain(kernels: h.Kernels, plain: h.Kernels) -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        x = awkward(rng, 3, 96)
        at = rng.random(x.shape) < 0.1
        x[at] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), x.shape)[at]
        ours, oracle = kernels.quantize(x), plain.quantize(x)
        assert np.array_equal(ours.codes, oracle.codes)
        assert np.array_equal(ours.offset, oracle.offset)
        assert np.array_equal(ours.moment, oracle.moment, equal_nan=True)
        assert np.array_equal(ours.scale, oracle.scale)


# ---- keys and values ----

HEAD_DIMS = [4, 8, 20, 32, 64, 80, 100, 128, 256]


def fill_pages(
    kernels: h.Kernels, rng: np.random.Generator, tokens: int, head_dim: int
) -> tuple[h.Pages, h.F32, h.F32]:
    pages = h.Pages(rng, tokens, head_dim, fp32=kernels.fp32)
    k, v = (rng.normal(0, 1, (tokens, head_dim)).astype(np.float32) for _ in range(2))
    for position in range(tokens):
        kernels.store_kv(pages, position, k[position], v[position])
    return pages, k, v


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_store_kv_equals_plain(kernels: h.Kernels, plain: h.Kernels, head_dim: int) -> None:
    ours = h.Pages(np.random.default_rng(0), 70, head_dim)
    oracle = h.Pages(np.random.default_rng(0), 70, head_dim)
    rng = np.random.default_rng(head_dim)
    for position in (0, 1, 31, 32, 69):
        k, v = awkward(rng, 2, head_dim)
        kernels.store_kv(ours, position, k, v)
        plain.store_kv(oracle, position, k, v)
    assert np.array_equal(ours.arena, oracle.arena)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_store_kv_follows_the_layout(plain: h.Kernels, head_dim: int) -> None:
    rng = np.random.default_rng(1)
    pages, k, v = fill_pages(plain, rng, 40, head_dim)
    for stored, values in zip(pages.dequantize(), (k, v), strict=True):
        step = np.abs(values).max(1, keepdims=True) / 127
        assert (np.abs(stored - values) <= 0.55 * step).all()


def ranges(rng: np.random.Generator, n: int, tokens: int) -> tuple[h.I32, h.I32]:
    last = rng.integers(0, tokens, n)
    return rng.integers(0, last + 1).astype(np.int32), last.astype(np.int32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attend_equals_plain(kernels: h.Kernels, plain: h.Kernels, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    for tokens, n in ((1, 1), (33, 3), (64, 5), (150, 7), (300, 32)):
        pages, _, _ = fill_pages(plain, rng, tokens, head_dim)
        q = rng.normal(0, 4 * head_dim**-0.5, (n, head_dim)).astype(np.float32)
        first, last = ranges(rng, n, tokens)
        ours = kernels.attend_parts(pages, q, first, last)
        for got, oracle in zip(ours, plain.attend_parts(pages, q, first, last), strict=True):
            assert np.array_equal(got, oracle)


def test_attend_of_infinite_scores_equals_plain(kernels: h.Kernels, plain: h.Kernels) -> None:
    """Also where a page holds no new maximum, or is not seen by every query."""
    rng = np.random.default_rng(4)
    pages = h.Pages(rng, 96, 32)
    for position in range(96):
        k, v = rng.normal(0, 8e6, (2, 32)).astype(np.float32)
        kernels.store_kv(pages, position, k, v / 8e6)
    q = rng.normal(0, 1, (24, 32)) * 10.0 ** rng.integers(28, 38, (24, 1))
    first, last = ranges(rng, 24, 96)
    ours = kernels.attend(pages, q.astype(np.float32), first, last)
    oracle = plain.attend(pages, q.astype(np.float32), first, last)
    assert np.isfinite(ours).any()
    assert np.array_equal(ours, oracle, equal_nan=True)


def check_attention(
    kernels: h.Kernels, out: h.F32, expected: npt.NDArray[Any], v: npt.NDArray[Any]
) -> None:
    """But for FP32, the weights of the values are rounded to 127 steps."""
    reach = 2e-6 if kernels.fp32 else 0.01 * float(np.abs(v).max())
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=reach)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attend_agrees_with_float64(any_kernels: h.Kernels, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    for tokens, n in ((1, 1), (5, 2), (33, 3), (64, 4), (150, 7), (200, 32)):
        pages, _, _ = fill_pages(any_kernels, rng, tokens, head_dim)
        q = rng.normal(0, 2 * head_dim**-0.5, (n, head_dim)).astype(np.float32)
        k, v = pages.dequantize()
        exact = q
        if not any_kernels.fp32:  # the queries that the kernels see
            codes, scale = h.quantize(q)
            exact = (codes.reshape(n, -1, h.GROUP) * scale[..., None]).reshape(n, -1)
            exact = exact[:, :head_dim]
        first, last = ranges(rng, n, tokens)
        for low in (np.zeros(n, np.int32), first):
            out, mass = any_kernels.attend_parts(pages, q, low, last)
            expected = h.softmax_attention(exact, k, v, low, last)
            check_attention(any_kernels, out, expected, v)
            scores = exact.astype(np.float64) @ k.T
            seen = [row[a : b + 1] for row, a, b in zip(scores, low, last, strict=True)]
            most = [row.max() for row in seen]
            np.testing.assert_allclose(mass[:, 0], most, rtol=1e-4, atol=1e-5)
            sums = [np.exp2(row - row.max()).sum() for row in seen]
            np.testing.assert_allclose(mass[:, 1], sums, rtol=1e-4)


def test_attend_keeps_large_and_far_scores(any_kernels: h.Kernels) -> None:
    """A running maximum that jumps by far more than 2^x can hold."""
    rng = np.random.default_rng(2)
    pages = h.Pages(rng, 96, 32, fp32=any_kernels.fp32)
    v = rng.normal(0, 1, (96, 32)).astype(np.float32)
    for position in range(96):
        k = np.full(32, [-50, 30, 1][position // 32], np.float32)
        any_kernels.store_kv(pages, position, k, v[position])
    out = any_kernels.attend(pages, np.ones((2, 32), np.float32), [0, 0], [95, 31])
    _, stored = pages.dequantize()
    check_attention(any_kernels, out[0], stored[32:64].mean(0), stored)
    check_attention(any_kernels, out[1], stored[:32].mean(0), stored)


def test_attend_over_no_positions_is_zero(any_kernels: h.Kernels) -> None:
    rng = np.random.default_rng(2)
    pages, _, _ = fill_pages(any_kernels, rng, 40, 64)
    out, mass = any_kernels.attend_parts(pages, np.ones((2, 64), np.float32), [0, 3], [-1, 2])
    assert not out.any()
    assert not mass[:, 1].any()


# ---- rows ----


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 40, 576, 1001])
def test_rmsnorm(any_kernels: h.Kernels, plain: h.Kernels, n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight = (rng.normal(0, 5, n).astype(np.float32) for _ in range(2))
    y = any_kernels.rmsnorm(x, weight, 1e-5)
    exact = x.astype(np.float64)
    expected = exact * weight / np.sqrt((exact**2).mean() + np.float32(1e-5))
    np.testing.assert_allclose(y, expected, rtol=2e-6)
    assert np.array_equal(y, plain.rmsnorm(x, weight, 1e-5))


def gated_inputs(n: int) -> tuple[h.F32, h.F32]:
    rng = np.random.default_rng(n)
    gate = rng.normal(0, 4, n).astype(np.float32)
    special = np.array([0, -0.0, 20, -20, 86, -86, 89, -89, 200, -200, 1e30, -1e30], np.float32)
    gate[: min(n, 12)] = special[:n]
    return gate, rng.normal(0, 1, n).astype(np.float32)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100, 1536])
def test_silu_mul(any_kernels: h.Kernels, plain: h.Kernels, n: int) -> None:
    gate, up = gated_inputs(n)
    g = np.clip(gate.astype(np.float64), -700, None)
    y = any_kernels.silu_mul(gate, up)
    np.testing.assert_allclose(y, g / (1 + np.exp(-g)) * up, rtol=1e-6, atol=1e-7)
    assert np.array_equal(y, plain.silu_mul(gate, up))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100, 1536])
def test_gelu_mul(any_kernels: h.Kernels, plain: h.Kernels, n: int) -> None:
    gate, up = gated_inputs(n)
    g = gate.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    y = any_kernels.gelu_mul(gate, up)
    np.testing.assert_allclose(y, 0.5 * g * (1 + np.tanh(inner)) * up, rtol=3e-6, atol=1e-6)
    assert np.array_equal(y, plain.gelu_mul(gate, up))


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 40, 384, 1001])
def test_layernorm(any_kernels: h.Kernels, plain: h.Kernels, n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight, bias = (rng.normal(3, 5, n).astype(np.float32) for _ in range(3))
    y = any_kernels.layernorm(x, weight, bias, 1e-5)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + np.float32(1e-5)) * weight + bias
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=3e-6)
    assert np.array_equal(y, plain.layernorm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100, 1536])
def test_gelu_erf(any_kernels: h.Kernels, plain: h.Kernels, n: int) -> None:
    x, _ = gated_inputs(n)
    y = any_kernels.gelu_erf(x)
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)]
    np.testing.assert_allclose(y, exact, rtol=1e-7, atol=1e-6)
    assert np.array_equal(y, plain.gelu_erf(x))


def test_gelu_erf_is_close_everywhere(plain: h.Kernels) -> None:
    x = np.linspace(-8, 8, 200_001, dtype=np.float32)
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)]
    assert np.abs(plain.gelu_erf(x) - np.array(exact)).max() <= 1e-6
    far = plain.gelu_erf(np.array([np.inf, -np.inf, np.nan], np.float32))
    assert far[0] == np.inf
    assert abs(far[1]) <= 1e-6
    assert np.isnan(far[2])


# ---- scalar arithmetic ----


@pytest.fixture(scope="module")
def scalar(directory: Path) -> h.Scalar:
    if h.missing(h.TABLES["plain"]):
        pytest.skip(h.missing(h.TABLES["plain"]))
    return h.Scalar(directory)


def test_half_to_float_is_exact(scalar: h.Scalar) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(scalar.half_to_float(halves), expected, equal_nan=True)


def test_float_to_half_rounds_to_even(scalar: h.Scalar) -> None:
    rng = np.random.default_rng(0)
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1].astype(np.float64) + halves[1:]).astype(np.float32) / 2
    bits = rng.integers(0, 1 << 32, 300_000, dtype=np.uint64).astype(np.uint32)
    near = [np.nextafter(between[:-1], np.float32(side)) for side in (-1e9, 1e9)]
    x = np.concatenate([halves, between[:-1], *near, bits.view(np.float32)])
    x = np.concatenate([x, -x, np.array([65519.99, 65520, 65535, 65536, 1e9], np.float32)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    ours: npt.NDArray[Any] = scalar.float_to_half(x).view(np.float16)
    assert np.array_equal(ours, expected, equal_nan=True)


def test_exp2_of_the_softmax(scalar: h.Scalar) -> None:
    x = np.linspace(-60, 0, 2_000_001, dtype=np.float32)[1:]
    expected = np.exp2(x.astype(np.float64))
    assert (np.abs(scalar.exp2(x) / expected - 1)).max() < 3e-6
    edge = np.array([0, -60, -1e30, -np.inf, np.nan], np.float32)
    assert np.array_equal(scalar.exp2(edge), [1, 0, 0, 0, 0])


def test_exp_is_within_two_ulp(scalar: h.Scalar) -> None:
    x = np.concatenate(
        [np.linspace(-87, 88, 1_000_001), np.linspace(-1, 1, 200_001)], dtype=np.float32
    )
    expected = np.exp(x.astype(np.float64))
    ulp = np.spacing(expected.astype(np.float32)).astype(np.float64)
    assert (np.abs(scalar.exp(x) - expected) / ulp).max() <= 2
    edge = np.array([-87.1, -1e30, -np.inf, 88.1, np.inf], np.float32)
    assert np.array_equal(scalar.exp(edge), [0, 0, 0, *[scalar.exp(edge[3:])[0]] * 2])
    assert np.isfinite(scalar.exp(np.array([np.nan], np.float32))).all()
