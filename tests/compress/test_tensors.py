from __future__ import annotations

from pathlib import Path

import make_gguf
import numpy as np
import pytest

from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.pack import Packed, dequantize
from flashlite.compress.plan import Format, plan_preset
from flashlite.compress.tensors import compress_tensor
from flashlite.errors import CheckpointError, CompressError
from flashlite.model.families import describe
from flashlite.model.source import SourceModel


def model(tmp_path: Path, **dtypes: str) -> SourceModel:
    parts = make_gguf.tiny_model(dtypes=dtypes)
    return describe(open_checkpoint(make_gguf.write_gguf(tmp_path / "model.gguf", *parts)))


def stored(source: SourceModel, name: str, fmt: Format) -> np.ndarray:
    arrays = compress_tensor(source, name, fmt)
    packed = Packed(
        fmt, arrays[f"{name}.codes"], arrays[f"{name}.scales"], arrays.get(f"{name}.mins")
    )
    shape = dict(source.spec.shapes())[name]
    return dequantize(packed, shape[0], shape[1])


@pytest.mark.parametrize(
    ("dtype", "fmt"),
    [
        ("Q4_0", "q4"),
        ("Q4_1", "q4m"),
        ("Q8_0", "q8"),
        ("Q4_0", "q8"),
        ("Q4_0", "q5"),
        ("Q4_0", "q6"),
    ],
)
@pytest.mark.parametrize("name", ["layers.1.q", "layers.0.gate", "embed"])
def test_a_grid_the_format_contains_is_kept_bit_for_bit(
    tmp_path: Path, dtype: str, fmt: Format, name: str
) -> None:
    source = model(tmp_path, attn_q=dtype, ffn_gate=dtype, token_embd=dtype)
    assert np.array_equal(stored(source, name, fmt), source.tensor(name))


@pytest.mark.parametrize("fmt", ["q5", "q6", "q8"])
def test_q5_0_is_kept_bit_for_bit(tmp_path: Path, fmt: Format) -> None:
    """Codes -16..15 times a half-precision scale; the scale of a whole block may be zero."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (64 * 2, 22), dtype=np.uint8)
    raw[:, :2] = rng.normal(size=(128, 1)).astype("<f2").view(np.uint8)
    raw[5, :2] = 0
    metadata, tensors = make_gguf.tiny_model()
    tensors["blk.0.attn_output.weight"] = make_gguf.Tensor("Q5_0", (64, 64), raw.tobytes())
    path = make_gguf.write_gguf(tmp_path / "q5.gguf", metadata, tensors)
    source = describe(open_checkpoint(path))
    assert np.array_equal(stored(source, "layers.0.o", fmt), source.tensor("layers.0.o"))
    assert plan_preset("import", source).formats["layers.0.o"] == "q5"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["layers.1.q", "layers.0.down"])
def test_every_other_type_is_close_in_q8(tmp_path: Path, dtype: str, name: str) -> None:
    source = model(tmp_path, attn_q=dtype, ffn_down=dtype)
    expected = source.tensor(name)
    found = stored(source, name, "q8")
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 127
    assert np.abs(found - expected).max() > 0


def test_a_half_precision_table_is_the_rounded_tensor(tmp_path: Path) -> None:
    source = model(tmp_path, token_embd="F32")
    table = compress_tensor(source, "embed", "f16")["embed"]
    assert table.dtype == np.float16
    assert np.array_equal(table, source.tensor("embed").astype(np.float16))


def test_the_head_of_a_tied_model_comes_from_the_table(tmp_path: Path) -> None:
    source = model(tmp_path)
    head = compress_tensor(source, "head", "q8")
    embed = compress_tensor(source, "embed", "q8")
    assert set(head) == {"head.codes", "head.scales"}
    assert np.array_equal(head["head.codes"], embed["embed.codes"])


def test_a_norm_is_stored_as_it_is(tmp_path: Path) -> None:
    source = model(tmp_path)
    norm = compress_tensor(source, "final_norm", "f32")["final_norm"]
    assert norm.dtype == np.float32
    assert np.array_equal(norm, source.tensor("final_norm"))


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    metadata, tensors = make_gguf.tiny_model()
    good = tensors["blk.2.attn_q.weight"]
    data = bytearray(good.data)
    data[20:22] = np.float16(np.nan).tobytes()
    tensors["blk.2.attn_q.weight"] = make_gguf.Tensor(good.dtype, good.shape, bytes(data))
    path = make_gguf.write_gguf(tmp_path / "nan.gguf", metadata, tensors)
    source = describe(open_checkpoint(path))
    with pytest.raises(CheckpointError, match=r"attn_q.*not finite"):
        compress_tensor(source, "layers.2.q", "q4m")


def test_a_weight_too_large_for_the_table_names_it(tmp_path: Path) -> None:
    metadata, tensors = make_gguf.tiny_model(dtypes={"token_embd": "F32"})
    values = np.frombuffer(tensors["token_embd.weight"].data, "<f4").reshape(512, 64).copy()
    values[7, 7] = 1e5
    tensors["token_embd.weight"] = make_gguf.encode(values, "F32")
    path = make_gguf.write_gguf(tmp_path / "large.gguf", metadata, tensors)
    with pytest.raises(CompressError, match=r"embed needs 100000 .*65504"):
        compress_tensor(describe(open_checkpoint(path)), "embed", "f16")
