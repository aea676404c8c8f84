from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flashlite.checkpoint import safetensors
from flashlite.checkpoint.safetensors import INDEX, read_safetensors
from flashlite.errors import CheckpointError, UnsupportedModel

CONFIG = {"model_type": "llama", "hidden_size": 4, "rope_scaling": {"factor": 2.0}}
Arrays = dict[str, NDArray[Any]]


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "model.embed.weight": rng.normal(0, 1, (6, 4)).astype(np.float32),
        "model.norm.weight": rng.normal(0, 1, 4).astype(np.float16),
        "model.position_ids": np.arange(6, dtype=np.int64),
    }


def folder_of(path: Path, config: object = CONFIG) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def raw_file(header: object, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_folder_written_by_the_official_library_reads_back(tmp_path: Path) -> None:
    written = arrays()
    save_file(written, folder_of(tmp_path) / "model.safetensors", metadata={"format": "pt"})
    checkpoint = read_safetensors(tmp_path)
    assert checkpoint.format == "safetensors"
    assert checkpoint.architecture == "llama"
    assert checkpoint.metadata["rope_scaling"] == {"factor": 2.0}
    assert checkpoint.tensors.keys() == written.keys()
    for name, values in written.items():
        assert checkpoint.info(name).shape == values.shape
        assert checkpoint.raw(name).tobytes() == values.tobytes()
        if values.dtype.kind == "f":
            np.testing.assert_array_equal(checkpoint.tensor(name), values.astype(np.float32))


def test_bfloat16_is_decoded(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38], np.float32)
    data = (values.view("<u4") >> 16).astype("<u2").tobytes()
    raw = raw_file({"w": entry(0, 6, 3, dtype="BF16")}, data)
    (folder_of(tmp_path) / "model.safetensors").write_bytes(raw)
    expected = (values.view("<u4") & 0xFFFF0000).view("<f4")
    np.testing.assert_array_equal(read_safetensors(tmp_path).tensor("w"), expected)


def test_a_buffer_of_integers_opens_and_fails_only_when_read(tmp_path: Path) -> None:
    save_file(arrays(), folder_of(tmp_path) / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"'model\.position_ids'.*found I64"):
        read_safetensors(tmp_path).tensor("model.position_ids")


def test_a_value_that_is_not_finite_is_refused_when_read(tmp_path: Path) -> None:
    written = arrays()
    written["model.embed.weight"][3, 1] = np.nan
    save_file(written, folder_of(tmp_path) / "model.safetensors")
    checkpoint = read_safetensors(tmp_path)
    checkpoint.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight' has a value.*number 13"):
        checkpoint.tensor("model.embed.weight")


def test_one_file_opens_beside_its_config(tmp_path: Path) -> None:
    save_file(arrays(), folder_of(tmp_path) / "weights.safetensors")
    assert read_safetensors(tmp_path / "weights.safetensors").tensors.keys() == arrays().keys()
    assert read_safetensors(tmp_path).tensors.keys() == arrays().keys()


def test_gemma3_text_is_gemma3(tmp_path: Path) -> None:
    save_file(arrays(), folder_of(tmp_path, {"model_type": "gemma3_text"}) / "model.safetensors")
    assert read_safetensors(tmp_path).architecture == "gemma3"


def sharded(folder: Path, **change: object) -> Path:
    """Three tensors in two shards; `change` replaces entries of the weight map."""
    written = arrays()
    names = list(written)
    shards = {
        "model-00001-of-00002.safetensors": names[:1],
        "model-00002-of-00002.safetensors": names[1:],
    }
    weight_map: dict[str, object] = {}
    for shard, held in shards.items():
        save_file({name: written[name] for name in held}, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    weight_map |= {name.replace("__", "."): shard for name, shard in change.items()}
    weight_map = {name: shard for name, shard in weight_map.items() if shard is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder_of(folder)


def test_shards_read_as_one(tmp_path: Path) -> None:
    checkpoint = read_safetensors(sharded(tmp_path))
    assert checkpoint.tensors.keys() == arrays().keys()
    for name, values in arrays().items():
        assert checkpoint.raw(name).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        ".x.safetensors",
        "x.bin",
        "x\n.safetensors",
        "x" * 300 + ".safetensors",
        5,
        ["x.safetensors"],
    ],
    ids=str,
)
def test_a_shard_must_be_a_plain_name(tmp_path: Path, shard: object) -> None:
    with pytest.raises(CheckpointError, match="a shard is no plain file name"):
        read_safetensors(sharded(tmp_path, new=shard))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": "model-00001-of-00002.safetensors"}, "lacks a tensor of .*'new'"),
        ({"model__embed__weight": "model-00002-of-00002.safetensors"}, "lacks a tensor|holds a"),
        ({"model__position_ids": None}, r"holds a tensor not in .*'model\.position_ids'"),
        ({"new": "model-00003-of-00003.safetensors"}, "model-00003.*cannot be read: No such file"),
    ],
)
def test_index_and_shards_must_agree(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(sharded(tmp_path, **change))


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": "x"}], ids=str)
def test_an_index_needs_a_weight_map(tmp_path: Path, index: object) -> None:
    (folder_of(tmp_path) / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map is no object|is no JSON object"):
        read_safetensors(tmp_path)


def test_too_many_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "_MAX_SHARDS", 1)
    with pytest.raises(CheckpointError, match="too many shards, found 2, allowed 1"):
        read_safetensors(sharded(tmp_path))


def test_links_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    folder.mkdir()
    save_file(arrays(), outside)
    (folder_of(folder) / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        read_safetensors(folder)
    (folder / "model.safetensors").unlink()
    save_file(arrays(), folder / "model.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leads out of its folder|cannot be read"):
        read_safetensors(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors(folder)


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(arrays(), folder_of(blobs) / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    assert read_safetensors(snapshot).tensors.keys() == arrays().keys()


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    save_file(arrays(), folder_of(tmp_path) / "a.safetensors")
    save_file(arrays(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 \.safetensors files and no .*index"):
        read_safetensors(tmp_path)


# ---- every way a file can be wrong --------------------------------------------------------------

TWO = {"a": entry(0, 8, 2), "b": entry(8, 16, 2)}
DATA = bytes(16)

HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "header of impossible length"),
    "seven bytes": (lambda: bytes(7), "header of impossible length"),
    "a header of 0 bytes": (lambda: raw_file({}, b"", length=0), "found 0, allowed 2 to"),
    "a header beyond the file": (
        lambda: raw_file(TWO, DATA, length=4096),
        "impossible length, found 4096",
    ),
    "a header beyond 100 MB": (
        lambda: raw_file(TWO, DATA, length=100_000_001),
        "impossible length, found 100000001",
    ),
    "a length of 2^64-1": (
        lambda: raw_file(TWO, DATA, length=2**64 - 1),
        "found 18446744073709551615",
    ),
    "no JSON": (lambda: raw_file(b"{nonsense", b""), "is not JSON: .*at byte 9"),
    "half of the JSON": (lambda: raw_file(TWO, DATA, length=20), "is not JSON"),
    "no UTF-8": (lambda: raw_file(b'{"\xff": 1}', b""), "is not UTF-8, at byte 10"),
    "a list": (lambda: raw_file([], b""), "is no JSON object"),
    "NaN": (lambda: raw_file(b'{"a": NaN}', b""), "a number is none, found NaN"),
    "an endless integer": (
        lambda: raw_file(b'{"a": ' + b"9" * 5000 + b"}", b""),
        "a number is too long",
    ),
    "too deep": (lambda: raw_file(b'{"a":' * 50000, b""), "is nested too deeply|is not JSON"),
    "a key twice": (
        lambda: raw_file(b'{"a": %b, "a": %b}' % ((json.dumps(TWO["a"]).encode(),) * 2), bytes(8)),
        "a key appears twice, found 'a'",
    ),
    "a key of an entry twice": (
        lambda: raw_file(
            b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', bytes(8)
        ),
        "a key appears twice, found 'shape'",
    ),
    "metadata that is no text": (
        lambda: raw_file({"__metadata__": {"a": 1}}, b""),
        "__metadata__ is no object of strings",
    ),
    "metadata that is no object": (
        lambda: raw_file({"__metadata__": 5}, b""),
        "__metadata__ is no object of strings",
    ),
    "a path for a name": (
        lambda: raw_file({"../../etc/passwd": entry(0, 8, 2)}, bytes(8)),
        "with a space, a path",
    ),
    "a control character in a name": (
        lambda: raw_file({"a\x1b[2J": entry(0, 8, 2)}, bytes(8)),
        r"unprintable.*x1b",
    ),
    "a name that is half a surrogate pair": (
        lambda: raw_file(b'{"\\ud800": {}}', b""),
        "unprintable.*ud800",
    ),
    "an empty name": (lambda: raw_file({"": entry(0, 8, 2)}, bytes(8)), "wrong length"),
    "an entry that is no object": (lambda: raw_file({"a": 5}, b""), "'a' is malformed"),
    "an entry without a shape": (
        lambda: raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
        "'a' is malformed",
    ),
    "an entry with more": (
        lambda: raw_file({"a": entry(0, 8, 2) | {"x": 1}}, bytes(8)),
        "'a' is malformed",
    ),
    "a negative dimension": (
        lambda: raw_file({"a": entry(0, 8, -1, -2)}, bytes(8)),
        r"'a' has a wrong shape, found \[-1, -2\]",
    ),
    "a dimension of 0": (lambda: raw_file({"a": entry(0, 0, 0)}, b""), "'a' has a wrong shape"),
    "a dimension that is true": (
        lambda: raw_file({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, DATA),
        "wrong shape",
    ),
    "a dimension of 2.0": (
        lambda: raw_file({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, DATA),
        "wrong shape",
    ),
    "nine dimensions": (
        lambda: raw_file({"a": entry(0, 4, *[1] * 9)}, bytes(4)),
        "wrong shape.*up to 8 dimensions",
    ),
    "a product beyond 64 bits": (
        lambda: raw_file({"a": entry(0, 8, 1 << 32, 1 << 32)}, bytes(8)),
        r"wrong data_offsets.*begin \+ 73786976294838206464",
    ),
    "too few bytes for the shape": (
        lambda: raw_file({"a": entry(0, 4, 2)}, bytes(4)),
        r"'a' of type F32 and shape \[2\] has wrong data_offsets",
    ),
    "offsets that run backwards": (
        lambda: raw_file({"a": entry(8, 0, 2)}, bytes(8)),
        "wrong data_offsets",
    ),
    "a negative offset": (
        lambda: raw_file({"a": entry(-8, 0, 2)}, bytes(8)),
        "wrong data_offsets",
    ),
    "three offsets": (
        lambda: raw_file(
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)
        ),
        "wrong data_offsets",
    ),
    "an offset too many": (
        lambda: raw_file({"a": entry(0, 8, 2) | {"data_offsets": [0, 8, 8]}}, bytes(8)),
        "wrong data_offsets",
    ),
    "offsets that are true": (
        lambda: raw_file({"a": entry(0, 1, 1, dtype="U8") | {"data_offsets": [0, True]}}, b"x"),
        "wrong data_offsets",
    ),
    "offsets that are no list": (
        lambda: raw_file({"a": entry(0, 8, 2) | {"data_offsets": None}}, bytes(8)),
        "wrong data_offsets",
    ),
    "an overlap": (
        lambda: raw_file({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12)),
        "'b' overlaps another tensor",
    ),
    "a hole": (
        lambda: raw_file({"a": entry(0, 8, 2), "b": entry(12, 20, 2)}, bytes(20)),
        "'b' follows a hole",
    ),
    "a hole at the start": (lambda: raw_file({"a": entry(4, 12, 2)}, bytes(12)), "follows a hole"),
    "data cut short": (
        lambda: raw_file(TWO, DATA[:-1]),
        "'b' reaches beyond the end.*8 bytes.*7 bytes left",
    ),
    "trailing bytes": (lambda: raw_file(TWO, DATA + b"x"), "bytes after its last tensor, found 1"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    build, message = HEADERS[fault]
    (folder_of(tmp_path) / "model.safetensors").write_bytes(build())
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors(tmp_path)
    assert str(error.value).isprintable()
    assert "model.safetensors" in str(error.value)
    assert len(str(error.value)) < 600


def test_the_sample_of_the_faults_is_itself_right(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "model.safetensors").write_bytes(raw_file(TWO, DATA))
    assert read_safetensors(tmp_path).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "Q4_0", "f32", "", 5, None, ["F32"]], ids=str)
def test_an_unknown_number_format_is_named(tmp_path: Path, dtype: object) -> None:
    header = {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}
    (folder_of(tmp_path) / "model.safetensors").write_bytes(raw_file(header, bytes(8)))
    with pytest.raises(UnsupportedModel, match="unknown number format.*allowed F32, F16, BF16"):
        read_safetensors(tmp_path)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 1)
    (folder_of(tmp_path) / "model.safetensors").write_bytes(raw_file(TWO, DATA))
    with pytest.raises(CheckpointError, match="too many tensors, found 2, allowed 1"):
        read_safetensors(tmp_path)


def test_an_index_of_too_many_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 2)
    with pytest.raises(CheckpointError, match="weight_map is no object.*found 3, allowed 2 names"):
        read_safetensors(sharded(tmp_path))


def test_a_shard_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="00002.safetensors: is not a regular file"):
        read_safetensors(tmp_path)


def test_a_file_that_shrinks_while_its_header_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_file(TWO, DATA)
    (folder_of(tmp_path) / "model.safetensors").write_bytes(raw[:40])
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_size=len(raw)))
    with pytest.raises(CheckpointError, match="has become shorter while it was read"):
        safetensors._file_tensors(tmp_path / "model.safetensors")


def test_json_that_costs_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "_MAX_MARKS", 5)
    (folder_of(tmp_path) / "model.safetensors").write_bytes(raw_file(TWO, DATA))
    with pytest.raises(CheckpointError, match="holds too much JSON, found .*, allowed 5"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("kind", [None, 5, "", "a\nb", ["llama"], "x" * 65], ids=repr)
def test_config_must_name_a_model_type(tmp_path: Path, kind: object) -> None:
    save_file(arrays(), folder_of(tmp_path, {"model_type": kind}) / "model.safetensors")
    with pytest.raises(CheckpointError, match="model_type does not name an architecture"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"[1]", "is no JSON object"),
        (b'{"model_type": "llama", "model_type": "gemma3"}', "appears twice"),
        (b'{"model_type": "llama", "x": Infinity}', "a number is none, found Infinity"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * ((1 << 24) + 1), "is too long"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    save_file(arrays(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_safetensors(tmp_path)
