from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlite.compress.pack import Packed, Quantized, dequantize, pack, unpack

FORMATS = ["q8", "q6", "q5", "q4", "q4m"]
BITS = {"q6": 6, "q5": 5, "q4": 4, "q4m": 4}  # of an unsigned code


def random_matrix(fmt: str, rows: int, cols: int, seed: int = 0) -> Quantized:
    rng = np.random.default_rng(seed)
    groups = -(-cols // 32)
    low, high, dtype = (-128, 128, np.int8) if fmt == "q8" else (0, 1 << BITS[fmt], np.uint8)
    codes = rng.integers(low, high, (rows, groups * 32)).astype(dtype)
    scales = rng.normal(size=(rows, groups)).astype(np.float16)
    mins = rng.normal(size=(rows, groups)).astype(np.float16) if fmt == "q4m" else None
    return Quantized(fmt, codes, scales, mins)


def code_at(packed: Packed, row: int, col: int) -> int:
    """One code, by the formula of csrc/fl_kernels.h."""
    block, r = divmod(row, 16)
    group, c = divmod(col, 32)
    cell = packed.codes[block, group]
    if packed.format == "q8":
        k4, k = divmod(c, 4)
        return int(cell[(k4 * 16 + r) * 4 + k])
    i, rest = divmod(c, 8)
    half, k = divmod(rest, 4)
    byte = int(cell[(i * 16 + r) * 4 + k])
    low, k4, more = byte >> 4 if half else byte & 15, c // 4, BITS[packed.format] - 4
    if not more:
        return low
    vector, place = divmod(k4 * more, 8)
    return low | (int(cell[256 + vector * 64 + r * 4 + k]) >> place & (1 << more) - 1) << 4


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (35, 96), (1, 64), (48, 160)])
def test_every_code_lies_where_the_kernels_look(fmt: str, rows: int, cols: int) -> None:
    matrix = random_matrix(fmt, rows, cols)
    packed = pack(matrix)
    assert packed.codes.shape == (
        -(-rows // 16),
        cols // 32,
        512 if fmt == "q8" else 64 * BITS[fmt],
    )
    for row in range(rows):
        for col in range(cols):
            assert code_at(packed, row, col) == matrix.codes[row, col]
        for group in range(cols // 32):
            assert packed.scales[row // 16, group, row % 16] == matrix.scales[row, group]
            if matrix.mins is not None and packed.mins is not None:
                assert packed.mins[row // 16, group, row % 16] == matrix.mins[row, group]


@pytest.mark.parametrize("fmt", FORMATS)
def test_padding_rows_weigh_nothing(fmt: str) -> None:
    packed = pack(random_matrix(fmt, 17, 32))
    assert not packed.scales[1, :, 1:].any()
    assert packed.mins is None or not packed.mins[1, :, 1:].any()
    whole = dequantize(packed, 32, 32)
    assert not whole[17:].any()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 70), st.integers(1, 130), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(fmt: str, rows: int, cols: int, seed: int) -> None:
    matrix = random_matrix(fmt, rows, cols, seed)
    back = unpack(pack(matrix), rows, cols)
    assert np.array_equal(back.codes, matrix.codes)
    assert back.codes.dtype == matrix.codes.dtype
    assert np.array_equal(back.scales, matrix.scales)
    assert (back.mins is None) == (matrix.mins is None)
    if back.mins is not None and matrix.mins is not None:
        assert np.array_equal(back.mins, matrix.mins)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(40, 64), (700, 1600), (5, 45)])
def test_dequantize_gives_scale_times_code(fmt: str, rows: int, cols: int) -> None:
    matrix = random_matrix(fmt, rows, cols)
    groups = matrix.scales.shape[1]
    codes = matrix.codes.astype(np.float64).reshape(rows, groups, 32)
    codes -= {"q4": 8, "q5": 16, "q6": 32}.get(fmt, 0)
    expected = codes * matrix.scales.astype(np.float64)[:, :, None]
    if matrix.mins is not None:
        expected += matrix.mins.astype(np.float64)[:, :, None]
    expected = expected.reshape(rows, groups * 32)[:, :cols].astype(np.float32)
    assert np.array_equal(dequantize(pack(matrix), rows, cols), expected)
