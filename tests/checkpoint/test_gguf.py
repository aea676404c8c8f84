from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_gguf import Field, Tensor, encode, gguf_bytes

from flashlite.checkpoint import gguf
from flashlite.checkpoint.gguf import read_gguf
from flashlite.errors import CheckpointError, UnsupportedModel

METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "a.text": "two\nlines",
    "a.words": ["a", "", "é▁x"],
    "a.flag": True,
    "a.flags": np.array([True, False, True]),
    "a.numbers": np.array([1.5, -2.5, 3.25], dtype=np.float32),
}
WEIGHTS = np.random.default_rng(0).normal(0, 1, (3, 64)).astype(np.float32)
TENSORS = {
    "one.weight": encode(WEIGHTS, "Q8_0"),
    "two.weight": encode(WEIGHTS[:, :5], "F32"),
    "three.weight": encode(WEIGHTS[0, :7], "F16"),
}


def file_of(raw: bytes, folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_a_written_file_reads_back(tmp_path: Path, version: int, alignment: int) -> None:
    metadata = METADATA | {"general.alignment": alignment}
    raw, _, data = gguf_bytes(metadata, TENSORS, version=version, alignment=alignment)
    checkpoint = read_gguf(file_of(raw, tmp_path))
    assert checkpoint.format == "gguf"
    assert checkpoint.architecture == "llama"
    assert checkpoint.metadata["a.text"] == "two\nlines"
    assert checkpoint.metadata["a.words"] == ["a", "", "é▁x"]
    assert checkpoint.metadata["a.flag"] is True
    np.testing.assert_array_equal(checkpoint.metadata["a.flags"], [True, False, True])
    np.testing.assert_array_equal(checkpoint.metadata["a.numbers"], [1.5, -2.5, 3.25])
    assert list(checkpoint.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        info = checkpoint.info(name)
        assert (info.shape, info.dtype, info.nbytes) == (
            tensor.shape,
            tensor.dtype,
            len(tensor.data),
        )
        assert info.offset % alignment == 0
        assert info.offset >= data
        assert checkpoint.raw(name).tobytes() == tensor.data
    np.testing.assert_array_equal(checkpoint.tensor("two.weight"), WEIGHTS[:, :5])
    assert checkpoint.grid("one.weight").codes.shape == (3, 64)
    assert [start for start, _ in checkpoint.chunks("one.weight")] == [0]


@pytest.mark.parametrize(
    "number",
    [
        np.uint8(255),
        np.int8(-128),
        np.uint16(65535),
        np.int16(-32768),
        np.uint32(2**32 - 1),
        np.int32(-(2**31)),
        np.uint64(2**64 - 1),
        np.int64(-(2**63)),
        np.float32(0.1),
        np.float64(0.1),
    ],
    ids=lambda number: type(number).__name__,
)
def test_numbers_of_every_type_come_back(tmp_path: Path, number: np.generic) -> None:
    metadata = METADATA | {"n": number, "ns": np.array([number, number])}
    checkpoint = read_gguf(file_of(gguf_bytes(metadata, {})[0], tmp_path))
    value = checkpoint.metadata["n"]
    assert type(value) is type(number.item())
    assert value == number.item()
    values = checkpoint.metadata["ns"]
    assert isinstance(values, np.ndarray)
    assert values.dtype == number.dtype
    assert list(values) == [number, number]


def test_the_checkpoint_cannot_be_edited(tmp_path: Path) -> None:
    checkpoint = read_gguf(file_of(gguf_bytes(METADATA, TENSORS)[0], tmp_path))
    with pytest.raises(TypeError):
        checkpoint.metadata["x"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        del checkpoint.tensors["one.weight"]  # type: ignore[attr-defined]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = read_gguf(file_of(gguf_bytes(METADATA, TENSORS)[0], tmp_path))
    with pytest.raises(CheckpointError, match=r"there is no tensor 'blk\.0\.w'"):
        checkpoint.tensor("blk.0.w")


def test_the_tiny_model_has_the_shape_of_stories260k(tiny_gguf: Path) -> None:
    checkpoint = read_gguf(tiny_gguf)
    assert checkpoint.info("token_embd.weight").shape == (512, 64)
    assert checkpoint.info("blk.4.ffn_down.weight").shape == (64, 172)
    assert {info.dtype for info in checkpoint.tensors.values()} == {
        "F32",
        "F16",
        "Q4_0",
        "Q4_1",
        "Q8_0",
    }
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == len(set(tokens)) == 512


def test_stories260k_keeps_its_weights(stories260k: Path, flashlite_data: Path) -> None:
    checkpoint = read_gguf(stories260k)
    raw = (flashlite_data / "tiny_lm/stories260K/stories260K.bin").read_bytes()
    embed = np.frombuffer(raw, "<f4", 512 * 64, 28).reshape(512, 64)
    np.testing.assert_array_equal(checkpoint.tensor("token_embd.weight"), embed)
    assert sum(checkpoint.tensor(name).size for name in checkpoint.tensors) == 260_032


def test_smollm2_opens_fast(smollm2_gguf: Path) -> None:
    start = time.process_time()
    checkpoint = read_gguf(smollm2_gguf)
    assert time.process_time() - start < 0.5  # 0.08 s on two slow cores
    assert checkpoint.architecture == "llama"
    assert len(checkpoint.tensors) == 272
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == 49152  # type: ignore[arg-type]
    assert len(checkpoint.metadata["tokenizer.ggml.merges"]) == 48900  # type: ignore[arg-type]
    assert checkpoint.grid("blk.29.ffn_down.weight").codes.max() == 15


# ---- every way a file can be wrong --------------------------------------------------------------


def patched(name: str, value: int) -> bytes:
    """The sample file with one integer of its header replaced."""
    raw, fields, _ = gguf_bytes(METADATA, TENSORS)
    field = next(field for field in fields if field.name == name)
    return put(raw, field, value)


def put(raw: bytes, field: Field, value: int) -> bytes:
    return (
        raw[: field.offset]
        + value.to_bytes(field.width, "little")
        + raw[field.offset + field.width :]
    )


def with_key(key: str, value: object) -> bytes:
    return gguf_bytes(METADATA, TENSORS, keys=[(key, value)])[0]


def with_names(*names: str) -> bytes:
    tensor = encode(WEIGHTS, "F32")
    return gguf_bytes(METADATA, [(name, tensor) for name in names])[0]


def with_text(old: bytes, new: bytes) -> bytes:
    raw = gguf_bytes(METADATA, TENSORS)[0]
    assert raw.count(old) == 1
    assert len(old) == len(new)
    return raw.replace(old, new)


def cut(count: int) -> bytes:
    raw = gguf_bytes(METADATA, {"w": encode(WEIGHTS, "F32")})[0]
    return raw[: len(raw) - count]


def sizes(shape: tuple[int, ...]) -> bytes:
    return gguf_bytes(METADATA, {"w": Tensor("F32", shape, b"")})[0]


FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "the magic number reaches beyond the end"),
    "another magic": (lambda: b"GGML" + bytes(99), "is not a GGUF file, found b'GGML'"),
    "version 0": (lambda: patched("version", 0), "unknown version, found 0, allowed 2 or 3"),
    "version 1": (lambda: patched("version", 1), "unknown version, found 1"),
    "version 4": (lambda: patched("version", 4), "unknown version, found 4"),
    "big-endian": (lambda: patched("version", 3 << 24), "big-endian.*convert the model"),
    "too many tensors": (
        lambda: patched("number of tensors", 65537),
        "too many tensors, found 65537, allowed 65536, at byte 8",
    ),
    "more tensors than there are": (
        lambda: patched("number of tensors", 4),
        "a tensor has a name of the wrong length",
    ),
    "too many keys": (
        lambda: patched("number of keys", 65537),
        "too many keys, found 65537, allowed 65536, at byte 16",
    ),
    "a key twice": (lambda: with_key("a.text", "again"), "key 'a.text' appears twice"),
    "an empty key": (lambda: with_key("", 1), "a key has a name of the wrong length, found 0"),
    "a long key": (lambda: with_key("k" * 257, 1), "name of the wrong length, found 257"),
    "a key with a control character": (lambda: with_key("a\x1b[2J", 1), "unprintable.*x1b"),
    "a string beyond the end": (
        lambda: patched("length of value of a.text", 1 << 20),
        "value of key 'a.text' reaches beyond the end.*1048576 bytes",
    ),
    "a string beyond its limit": (
        lambda: patched("length of value of a.text", 1 << 40),
        "key 'a.text' is too long, found 1099511627776, allowed 33554432",
    ),
    "a string that is not UTF-8": (
        lambda: with_text(b"two\nlines", b"two\xfflines"),
        "value of key 'a.text' is not UTF-8, at byte",
    ),
    "half of a surrogate pair": (
        lambda: with_text(b"two\nlines", b"t\xed\xa0\x80lines"),
        "not UTF-8",
    ),
    "an unknown value type": (
        lambda: patched("type of a.flag", 13),
        "key 'a.flag' has an unknown value type, found 13, allowed 0 to 12",
    ),
    "an unknown element type": (
        lambda: patched("element type of a.words", 99),
        "key 'a.words' has an unknown element type, found 99",
    ),
    "an array of arrays": (
        lambda: patched("element type of a.words", 9),
        "key 'a.words' is an array of arrays",
    ),
    "an array beyond its limit": (
        lambda: patched("count of a.words", (1 << 24) + 1),
        "array 'a.words' is too long, found 16777217, allowed 16777216",
    ),
    "an array beyond the end": (
        lambda: patched("count of a.numbers", 1 << 20),
        "array 'a.numbers' reaches beyond the end.*1048576 elements",
    ),
    "a boolean of 2": (lambda: patched("value of a.flag", 2), "neither 0 nor 1, found 2"),
    "an array with a boolean of 255": (
        lambda: with_text(b"\x01\x00\x01", b"\x01\x00\xff"),
        "'a.flags' has a boolean that is neither 0 nor 1, found 255",
    ),
    "no architecture": (lambda: gguf_bytes({}, {})[0], "does not name an architecture, found None"),
    "an architecture of the wrong type": (
        lambda: gguf_bytes({"general.architecture": 5}, {})[0],
        "does not name an architecture, found 5",
    ),
    "an architecture that is no word": (
        lambda: gguf_bytes({"general.architecture": "ll\nama"}, {})[0],
        "does not name an architecture",
    ),
    "an empty architecture": (
        lambda: gguf_bytes({"general.architecture": ""}, {})[0],
        "does not name an architecture",
    ),
    "a long architecture": (
        lambda: gguf_bytes({"general.architecture": "x" * 65}, {})[0],
        "does not name an architecture.*1 to 64 printable",
    ),
    "alignment 0": (lambda: with_key("general.alignment", 0), "cannot be used, found 0, allowed"),
    "alignment 24": (lambda: with_key("general.alignment", 24), "a power of two, 8 to 65536"),
    "alignment 2^31": (lambda: with_key("general.alignment", 1 << 31), "found 2147483648"),
    "an alignment that is text": (lambda: with_key("general.alignment", "32"), "cannot be used"),
    "an alignment that is true": (lambda: with_key("general.alignment", True), "cannot be used"),
    "one part of several": (
        lambda: with_key("split.count", np.uint16(3)),
        "split over several files.*llama-gguf-split --merge.*split.count 3",
    ),
    "a tensor twice": (lambda: with_names("w", "v", "w"), "tensor 'w' appears twice"),
    "a tensor without a name": (lambda: with_names(""), "a tensor has a name of the wrong length"),
    "a name that is a path": (lambda: with_names("../../etc/passwd"), "with a space, a path"),
    "a name with a separator": (lambda: with_names("a/b"), "with a space, a path"),
    "a name with a backslash": (lambda: with_names("a\\b"), "with a space, a path"),
    "a name that climbs": (lambda: with_names("a..b"), "with a space, a path"),
    "a name with a space": (lambda: with_names("a b"), "with a space, a path"),
    "a name with a line break": (lambda: with_names("w\nint x;"), r"unprintable.*w\\nint x;"),
    "a name that turns text around": (lambda: with_names("w\u202e"), r"unprintable.*u202e"),
    "no dimensions": (
        lambda: patched("dimensions of one.weight", 0),
        "'one.weight' has a wrong number of dimensions, found 0, allowed 1 to 4",
    ),
    "five dimensions": (
        lambda: patched("dimensions of one.weight", 5),
        "wrong number of dimensions, found 5",
    ),
    "a dimension of 0": (lambda: sizes((3, 0)), "'w' has a wrong dimension, found 0"),
    "a dimension of 2^63": (lambda: sizes((1 << 63,)), "found 9223372036854775808"),
    "a product beyond 64 bits": (
        lambda: sizes((1 << 40, 1 << 40)),
        "reaches beyond the end of the file, found 4835703278458516698824704 bytes",
    ),
    "a row that is no whole number of blocks": (
        lambda: patched("dimension 0 of one.weight", 65),
        "'one.weight' of type Q8_0: 65 columns are not a multiple of 32",
    ),
    "a shape larger than the data": (
        lambda: patched("dimension 1 of one.weight", 4),
        "'two.weight' overlaps another tensor",
    ),
    "a shape smaller than the data": (
        lambda: patched("dimension 1 of one.weight", 1),
        "'two.weight' follows a hole",
    ),
    "an offset that is not aligned": (
        lambda: patched("offset of two.weight", 225),
        "'two.weight' is not aligned, found 225, allowed n x 32",
    ),
    "an offset into another tensor": (
        lambda: patched("offset of two.weight", 32),
        "'two.weight' overlaps another tensor, found 32, allowed 224",
    ),
    "an offset after a hole": (
        lambda: patched("offset of two.weight", 256),
        "'two.weight' follows a hole, found 256, allowed 224",
    ),
    "an offset that wraps around": (
        lambda: patched("offset of two.weight", (1 << 64) - 32),
        "'two.weight' follows a hole",
    ),
    "data cut short": (lambda: cut(1), "'w' reaches beyond the end.*768 bytes.*767 bytes left"),
    "bytes after the last tensor": (
        lambda: gguf_bytes(METADATA, TENSORS)[0] + b"x",
        "has bytes after its last tensor, found 1, at byte",
    ),
    "fewer tensors than there are": (
        lambda: patched("number of tensors", 2),
        "has bytes after its last tensor",
    ),
    "no data at all": (lambda: cut(768 + 32), "reaches beyond the end of the file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    build, message = FAULTS[fault]
    path = file_of(build(), tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_gguf(path)
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("kind", "name"), [(10, "Q2_K"), (16, "IQ2_XXS"), (26, "I32"), (39, "MXFP4"), (4242, "unknown")]
)
def test_a_tensor_type_flashlite_does_not_read_is_named(
    tmp_path: Path, kind: int, name: str
) -> None:
    path = file_of(patched("type of one.weight", kind), tmp_path)
    expected = rf"'one\.weight'.*another quantization.*type {kind} \({name}\).*F32.*Q4_1.*Q6_K"
    with pytest.raises(UnsupportedModel, match=expected):
        read_gguf(path)


def test_an_unknown_architecture_is_only_reported(tmp_path: Path) -> None:
    raw = gguf_bytes({"general.architecture": "mamba"}, {})[0]
    assert read_gguf(file_of(raw, tmp_path)).architecture == "mamba"


def test_a_header_beyond_its_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_MAX_HEADER", 4096)
    raw = gguf_bytes(METADATA | {"a.long": "x" * 5000}, TENSORS)[0]
    with pytest.raises(CheckpointError, match=r"the header is too long, found .*, allowed 4096"):
        read_gguf(file_of(raw, tmp_path))


@pytest.mark.parametrize("read_ahead", [1, 7, 64])
def test_a_header_read_in_small_pieces_is_the_same(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, read_ahead: int
) -> None:
    whole = read_gguf(tiny_gguf)
    monkeypatch.setattr(gguf, "_READ_AHEAD", read_ahead)
    pieces = read_gguf(tiny_gguf)
    assert pieces.tensors == whole.tensors
    assert pieces.metadata["tokenizer.ggml.tokens"] == whole.metadata["tokenizer.ggml.tokens"]


def test_a_file_that_shrinks_while_its_header_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, _, data = gguf_bytes(METADATA, TENSORS)
    path = file_of(raw[: data // 2], tmp_path)
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_size=len(raw)))
    with pytest.raises(CheckpointError, match="the file has become shorter"):
        read_gguf(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "gone.gguf")


def test_a_file_truncated_after_opening_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = file_of(gguf_bytes(METADATA, TENSORS)[0], tmp_path)
    checkpoint = read_gguf(path)
    os.truncate(path, checkpoint.info("three.weight").offset)
    assert checkpoint.raw("one.weight").tobytes() == TENSORS["one.weight"].data
    with pytest.raises(CheckpointError, match="become shorter"):
        checkpoint.tensor("three.weight")


def test_bytes_outside_a_tensor_never_come_out(tmp_path: Path) -> None:
    raw, _, data = gguf_bytes(METADATA, TENSORS)
    plain = read_gguf(file_of(raw, tmp_path))
    inside = np.zeros(len(raw), dtype=bool)
    inside[: data - 1] = True  # the header, but not the last byte of its padding
    for info in plain.tensors.values():
        inside[info.offset : info.offset + info.nbytes] = True
    canary = np.where(inside, np.frombuffer(raw, np.uint8), 0xA5).astype(np.uint8).tobytes()
    assert canary != raw
    checkpoint = read_gguf(file_of(canary, tmp_path))
    for name, tensor in TENSORS.items():
        assert checkpoint.raw(name).tobytes() == tensor.data
