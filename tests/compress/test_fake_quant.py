"""What training sees is what the kernels will see."""

from __future__ import annotations

import numpy as np
import pytest

from flashlite.compress.fake_quant import Grid
from flashlite.compress.pack import CODE_BYTES, dequantize, pack
from flashlite.compress.quantize import quantize_matrix

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("fmt", sorted(CODE_BYTES))
@pytest.mark.parametrize("shape", [(16, 64), (5, 40)])
def test_values_are_those_of_the_packed_matrix(fmt: str, shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights[1] = 0
    matrix = quantize_matrix(weights, fmt)
    stored = torch.from_numpy(dequantize(pack(matrix), *shape))
    grid = Grid.of(matrix)
    start = grid.start(stored, torch.from_numpy(weights))
    np.testing.assert_array_equal(grid.values(start).numpy(), stored.numpy())
    np.testing.assert_array_equal(grid.quantized(start).codes, matrix.codes)
    # Nearer to the source than the codes are, and no weight on the border of two.
    far = np.abs(stored.numpy() - weights).sum()
    assert np.abs(start.numpy() - weights).sum() < 0.3 * far
    step = np.abs(matrix.scales.astype(np.float32)).repeat(32, axis=1)[:, : shape[1]]
    moved = start + torch.from_numpy(step)
    packed = pack(grid.quantized(moved))
    np.testing.assert_array_equal(grid.values(moved).numpy(), dequantize(packed, *shape))
    assert (grid.quantized(moved).codes != matrix.codes).mean() > 0.3  # padding and zeros stay


def test_scales_are_searched_as_quantization_does() -> None:
    weights = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
    grid = Grid.search(torch.from_numpy(weights), "q4m", "w")
    matrix = quantize_matrix(weights, "q4m")
    np.testing.assert_array_equal(grid.scales, matrix.scales)
    assert grid.mins is not None
    assert matrix.mins is not None
    np.testing.assert_array_equal(grid.mins, matrix.mins)
