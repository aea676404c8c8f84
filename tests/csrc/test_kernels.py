"""Every table of kernels against the plain one, and the plain one against NumPy."""

from __future__ import annotations

from pathlib import Path

import kernel_harness as h
import numpy as np
import pytest

SIMD = [n for n, t in h.TABLES.items() if n != "plain" and not t.fp32]
INTEGER = ["plain", *SIMD]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, h.Kernels]:
    return {}


@pytest.fixture(scope="session")
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


SHAPES = [(16, 32), (1, 1), (17, 33), (48, 96), (160, 576), (31, 1536), (5, 100), (64, 640)]


@pytest.mark.parametrize("format", h.FORMATS)
def test_gemv_is_exact_with_unit_scales(kernels: h.Kernels, format: str) -> None:
    rng = np.random.default_rng(1)
    for rows, cols in SHAPES:
        w = h.random_linear(rng, format, rows, cols, unit=True)
        act = h.Activations(1, cols)
        act.fill(rng.integers(-127, 128, (1, cols)), np.ones((1, act.groups)))
        expected = h.product(w, act.true_codes(), act.true(act.scale))
        y = kernels.gemv(w, act)
        assert np.array_equal(y[:rows], expected[0])


@pytest.mark.parametrize("format", h.FORMATS)
@pytest.mark.parametrize("n", [2, 3, 4, 6, 7, 12, 13, 20])
def test_gemm_is_exact_with_unit_scales(kernels: h.Kernels, format: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for rows, cols in SHAPES:
        w = h.random_linear(rng, format, rows, cols, unit=True)
        act = h.Activations(n, cols)
        act.fill(rng.integers(-127, 128, (n, cols)), np.ones((n, act.groups)))
        expected = h.product(w, act.true_codes(), act.true(act.scale))
        y = kernels.gemm(w, act)
        assert np.array_equal(y[:n, :rows], expected)
        assert not y[n:].any()


@pytest.mark.parametrize("n", [1, 2, 6, 13])
def test_quantize_equals_numpy(kernels: h.Kernels, n: int) -> None:
    rng = np.random.default_rng(n)
    for cols in (1, 31, 32, 33, 100, 576):
        x = rng.normal(0, 3, (n, cols)).astype(np.float32)
        codes, scale = h.quantize(x)
        act = kernels.quantize(x)
        assert np.array_equal(act.true_codes(), codes)
        assert np.array_equal(act.true(act.scale), scale)
        assert np.array_equal(act.true(act.sum), codes.reshape(n, -1, h.GROUP).sum(2))
