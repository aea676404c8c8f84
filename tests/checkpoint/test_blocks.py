from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_gguf import encode
from numpy.typing import NDArray

from flashlite.checkpoint import blocks
from flashlite.checkpoint.blocks import GRID_DTYPES, LAYOUTS, TensorInfo
from flashlite.errors import CheckpointError, UnsupportedModel

# The formats one value at a time, as ggml-quants.c of llama.cpp reads them.


def half(raw: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", raw, at)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibble(raw: bytes, at: int, i: int) -> int:
    """Value i of 32, of which byte j holds numbers j (low half) and j + 16 (high half)."""
    return raw[at + i] & 15 if i < 16 else raw[at + i - 16] >> 4


def fifth(raw: bytes, at: int, i: int) -> int:
    return (int.from_bytes(raw[at : at + 4], "little") >> i & 1) << 4


def six_bits(raw: bytes, group: int) -> tuple[int, int]:
    """Scale and minimum of group 0..7 in the twelve bytes `raw`."""
    if group < 4:
        return raw[group] & 63, raw[group + 4] & 63
    scale = (raw[group + 4] & 15) | (raw[group - 4] >> 6) << 4
    return scale, (raw[group + 4] >> 4) | (raw[group] >> 6) << 4


def k_nibble(raw: bytes, at: int, i: int) -> int:
    byte = raw[at + i // 64 * 32 + i % 32]
    return byte & 15 if i % 64 < 32 else byte >> 4


def scalar_f32(raw: bytes, i: int) -> float:
    return float(struct.unpack_from("<f", raw)[0])


def scalar_bf16(raw: bytes, i: int) -> float:
    return float(struct.unpack("<f", b"\0\0" + raw)[0])


def scalar_q4_0(raw: bytes, i: int) -> float:
    return half(raw, 0) * (nibble(raw, 2, i) - 8)


def scalar_q4_1(raw: bytes, i: int) -> float:
    return half(raw, 0) * nibble(raw, 4, i) + half(raw, 2)


def scalar_q5_0(raw: bytes, i: int) -> float:
    return half(raw, 0) * ((nibble(raw, 6, i) | fifth(raw, 2, i)) - 16)


def scalar_q5_1(raw: bytes, i: int) -> float:
    return half(raw, 0) * (nibble(raw, 8, i) | fifth(raw, 4, i)) + half(raw, 2)


def scalar_q8_0(raw: bytes, i: int) -> float:
    return half(raw, 0) * signed(raw[2 + i])


def scalar_q4_k(raw: bytes, i: int) -> float:
    scale, least = six_bits(raw[4:16], i // 32)
    return half(raw, 0) * scale * k_nibble(raw, 16, i) - half(raw, 2) * least


def scalar_q5_k(raw: bytes, i: int) -> float:
    scale, least = six_bits(raw[4:16], i // 32)
    code = k_nibble(raw, 48, i) | (raw[16 + i % 32] >> (i // 32) & 1) << 4
    return half(raw, 0) * scale * code - half(raw, 2) * least


def scalar_q6_k(raw: bytes, i: int) -> float:
    part, quarter, lane = i // 128, i % 128 // 32, i % 32
    low = raw[part * 64 + quarter % 2 * 32 + lane]
    low = low & 15 if quarter < 2 else low >> 4
    code = low | (raw[128 + part * 32 + lane] >> 2 * quarter & 3) << 4
    return half(raw, 208) * signed(raw[192 + i // 16]) * (code - 32)


SCALAR: dict[str, Callable[[bytes, int], float]] = {
    "F32": scalar_f32,
    "F16": lambda raw, i: half(raw, 0),
    "BF16": scalar_bf16,
    "Q4_0": scalar_q4_0,
    "Q4_1": scalar_q4_1,
    "Q5_0": scalar_q5_0,
    "Q5_1": scalar_q5_1,
    "Q8_0": scalar_q8_0,
    "Q4_K": scalar_q4_k,
    "Q5_K": scalar_q5_k,
    "Q6_K": scalar_q6_k,
}


def random_tensor(dtype: str, rows: int, blocks_per_row: int) -> tuple[TensorInfo, bytes]:
    """Random bytes, with scales that are finite and never subnormal."""
    rng = np.random.default_rng(rows * 1000 + blocks_per_row)
    layout = LAYOUTS[dtype]
    raw = rng.integers(0, 256, (rows * blocks_per_row, layout.nbytes), dtype=np.uint8)
    parts = layout.scales or (slice(0, layout.nbytes),)
    for part in parts:
        values = rng.normal(0, 1, len(raw))
        if dtype == "F32":
            raw[:, part] = values.astype("<f4")[:, None].view(np.uint8)
        elif dtype == "BF16":
            raw[:, part] = (
                (values.astype("<f4").view("<u4") >> 16).astype("<u2")[:, None].view("u1")
            )
        else:
            raw[:, part] = values.astype("<f2")[:, None].view(np.uint8)
    shape = (rows, blocks_per_row * layout.block)
    info = TensorInfo("w", shape, dtype, Path("model.gguf"), 0, raw.size)
    return info, raw.tobytes()


def as_bytes(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(raw, np.uint8)


def test_every_format_has_a_scalar_reference() -> None:
    assert SCALAR.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize(("rows", "per_row"), [(1, 1), (3, 2), (2, 5)])
def test_decoding_equals_the_scalar_reference_bit_for_bit(
    dtype: str, rows: int, per_row: int
) -> None:
    info, raw = random_tensor(dtype, rows, per_row)
    layout = LAYOUTS[dtype]
    expected = [
        SCALAR[dtype](raw[at : at + layout.nbytes], i)
        for at in range(0, len(raw), layout.nbytes)
        for i in range(layout.block)
    ]
    got = blocks.dequantize(info, as_bytes(raw))
    assert got.dtype == np.float32
    assert got.shape == info.shape
    # Python computes in float64; rounded once to float32 that is what ggml gives.
    np.testing.assert_array_equal(got.ravel(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_chunks_equal_the_whole(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info, raw = random_tensor(dtype, 7, 2)
    whole = blocks.dequantize(info, as_bytes(raw))
    monkeypatch.setattr(blocks, "_CHUNK_VALUES", 3 * info.cols)
    starts, parts = zip(*blocks.chunks(info, as_bytes(raw)), strict=True)
    assert starts == (0, 3, 6)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("shape", [(), (1,), (64,), (2, 3, 32), (2, 1, 2, 32)])
def test_any_number_of_axes_keeps_its_shape(shape: tuple[int, ...]) -> None:
    values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    info = TensorInfo("w", shape, "F32", Path("m"), 0, values.nbytes)
    np.testing.assert_array_equal(blocks.dequantize(info, as_bytes(values.tobytes())), values)


@pytest.mark.parametrize("dtype", GRID_DTYPES)
@pytest.mark.parametrize("chunk", [1 << 20, 96])
def test_grid_holds_the_stored_codes_and_scales(
    dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CHUNK_VALUES", chunk)
    info, raw = random_tensor(dtype, 5, 3)
    grid = blocks.grid(info, as_bytes(raw))
    assert grid.codes.shape == info.shape
    assert grid.scales.shape == (5, 3)
    assert (grid.mins is not None) == (dtype == "Q4_1")
    size = LAYOUTS[dtype].nbytes
    for block in range(15):
        part = raw[block * size : (block + 1) * size]
        row, group = divmod(block, 3)
        assert grid.scales[row, group].tobytes() == part[:2]
        if grid.mins is not None:
            assert grid.mins[row, group].tobytes() == part[2:4]
        for i in range(32):
            code = int(grid.codes[row, 32 * group + i])
            if dtype == "Q8_0":
                assert code == struct.unpack_from("<b", part, 2 + i)[0]
            else:
                assert code == nibble(part, size - 16, i)
    values = (grid.codes.astype(np.float32) - grid.zero).reshape(5, 3, 32)
    values *= grid.scales.astype(np.float32)[:, :, None]
    if grid.mins is not None:
        values += grid.mins.astype(np.float32)[:, :, None]
    np.testing.assert_array_equal(values.reshape(5, 96), blocks.dequantize(info, as_bytes(raw)))


@pytest.mark.parametrize("dtype", sorted(LAYOUTS.keys() - set(GRID_DTYPES)))
def test_other_formats_have_no_grid(dtype: str) -> None:
    info, raw = random_tensor(dtype, 1, 1)
    with pytest.raises(UnsupportedModel, match=f"'w' has no grid.*found {dtype}.*Q4_0, Q4_1, Q8_0"):
        blocks.grid(info, as_bytes(raw))


@pytest.mark.parametrize(("dtype", "step"), [("Q8_0", 1 / 127), ("Q4_0", 1 / 7), ("Q4_1", 2 / 15)])
def test_round_trip_through_the_writer(dtype: str, step: float) -> None:
    values = np.random.default_rng(1).uniform(-1, 1, (8, 64)).astype(np.float32)
    tensor = encode(values, dtype)
    info = TensorInfo("w", tensor.shape, dtype, Path("m"), 0, len(tensor.data))
    got = blocks.dequantize(info, as_bytes(tensor.data))
    assert np.abs(got - values).max() <= step * 1.01


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_a_value_or_scale_that_is_not_finite_is_refused(dtype: str, bad: float) -> None:
    info, raw = random_tensor(dtype, 4, 2)
    info = replace(info, name="blk.0.w", offset=4096)
    layout = LAYOUTS[dtype]
    code = {"F32": "<f4", "BF16": None}.get(dtype, "<f2")
    poison = np.array(bad, code).tobytes() if code else np.array(bad, "<f4").tobytes()[2:]
    for part in layout.scales or (slice(0, layout.nbytes),):
        broken = bytearray(raw)
        at = 5 * layout.nbytes + part.start
        broken[at : at + len(poison)] = poison
        with pytest.raises(CheckpointError, match=r"'blk\.0\.w' has a .* not finite") as error:
            blocks.dequantize(info, as_bytes(bytes(broken)))
        assert error.value.offset == 4096 + at
        if dtype in GRID_DTYPES:
            with pytest.raises(CheckpointError, match="not finite"):
                blocks.grid(info, as_bytes(bytes(broken)))


def test_a_format_that_cannot_be_decoded_is_named() -> None:
    info = TensorInfo("ids", (4,), "I64", Path("m"), 0, 32)
    with pytest.raises(UnsupportedModel, match=r"'ids'.*found I64.*F32, F16, BF16, Q4_0"):
        blocks.dequantize(info, np.zeros(32, np.uint8))


def test_the_wrong_number_of_bytes_is_refused() -> None:
    info, raw = random_tensor("Q8_0", 2, 2)
    with pytest.raises(CheckpointError, match="wrong number of bytes"):
        blocks.dequantize(info, as_bytes(raw[:-34]))


@pytest.mark.parametrize(("dtype", "cols"), [("Q4_0", 33), ("Q8_0", 31), ("Q4_K", 128)])
def test_a_row_must_be_whole_blocks(dtype: str, cols: int) -> None:
    with pytest.raises(ValueError, match=f"{cols} columns are not a multiple"):
        blocks.nbytes(dtype, (2, cols))


def test_sizes_do_not_overflow() -> None:
    assert blocks.nbytes("F32", (1 << 40, 1 << 40, 1 << 40)) == 1 << 122


def test_read_bytes_gives_exactly_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(range(200)))
    info = TensorInfo("w", (16,), "F32", file, 100, 64)
    assert blocks.read_bytes(info).tobytes() == bytes(range(100, 164))


@pytest.mark.parametrize("size", [0, 99, 100, 163])
def test_a_file_that_became_shorter_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"become shorter.*found {size} bytes"):
        blocks.read_bytes(TensorInfo("w", (16,), "F32", file, 100, 64))


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(120))
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_size=164))
    with pytest.raises(CheckpointError, match="become shorter.*found 120 bytes"):
        blocks.read_bytes(TensorInfo("w", (16,), "F32", file, 100, 64))


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        blocks.read_bytes(TensorInfo("w", (16,), "F32", tmp_path / "gone", 0, 64))


def test_decoding_a_big_table_needs_little_more_than_its_result() -> None:
    rows, cols = 16384, 640
    raw = np.zeros(blocks.nbytes("Q6_K", (rows, 768)), np.uint8)
    info = TensorInfo("w", (rows, 768), "Q6_K", Path("m"), 0, raw.size)
    result = rows * 768 * 4
    tracemalloc.start()
    try:
        blocks.dequantize(info, raw)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        q8 = TensorInfo("w", (rows, cols), "Q4_1", Path("m"), 0, rows * cols // 32 * 20)
        blocks.grid(q8, np.zeros(q8.nbytes, np.uint8))
        grid_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < result + (40 << 20)
    assert grid_peak < q8.nbytes + rows * cols * 1.2 + (20 << 20)
