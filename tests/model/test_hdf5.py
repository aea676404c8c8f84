"""HDF5 files as models: what comes back is the model that went in, whatever laid the file out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import make_hdf5
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flashlite.checkpoint import hdf5
from flashlite.checkpoint.hdf5_write import write_hdf5
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import CheckpointError, UnsupportedModel
from flashlite.model.families import describe, describe_any
from flashlite.model.source import EncoderSource, SourceModel

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
CASES = sorted(folder.name for folder in FAMILIES.iterdir())


@pytest.fixture(autouse=True)
def _examine_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are harmless: no process for each."""
    monkeypatch.setattr(hdf5, "_run_child", make_hdf5.examine_here)


def arrays_of(case: str) -> dict[str, NDArray[np.float32]]:
    """The fixture's tensors, as Hugging Face names and stores them."""
    checkpoint = open_checkpoint(FAMILIES / case)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def assert_same(found: SourceModel, expected: SourceModel) -> None:
    assert found.spec == expected.spec
    for name, _ in expected.spec.shapes():
        a, b = found.tensor(name), expected.tensor(name)
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), name


def export(source: SourceModel | EncoderSource, path: Path) -> Path:
    write_hdf5(
        path,
        source.spec.shapes(),
        source.tensor,
        architecture=source.spec.family,
        spec=source.spec.to_json(),
        tokenizer=make_hdf5.NO_TEXT,
    )
    return path


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_same_model(case: str, tmp_path: Path) -> None:
    source = describe(open_checkpoint(FAMILIES / case))
    checkpoint = open_checkpoint(export(source, tmp_path / "base_fp32.h5"))
    assert (checkpoint.format, checkpoint.architecture) == ("hdf5", source.spec.family)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}
    assert_same(describe(checkpoint), source)


def test_an_export_of_quantized_interleaved_rows(tiny_gguf: Path, tmp_path: Path) -> None:
    source = describe(open_checkpoint(tiny_gguf))
    assert_same(describe(open_checkpoint(export(source, tmp_path / "base_fp32.h5"))), source)


def test_what_an_export_looks_like_to_others(tmp_path: Path) -> None:
    with h5py.File(make_hdf5.ours(tmp_path / "base_fp32.h5")) as file:
        assert file["layers/1/q"].dtype == "<f4"
        assert np.array_equal(file["layers/1/q"], make_hdf5.values()["layers.1.q"])
        assert '"class_name": "flashlite"' in file.attrs["model_config"].decode()


# ---- weights alone ----

Layout = Callable[[Path, dict[str, NDArray[np.float32]], Any], Path]
LAYOUTS: dict[str, tuple[list[str], Layout]] = {
    "names": (CASES, lambda path, arrays, _: make_hdf5.plain(path, arrays, groups=False)),
    "groups": (CASES, lambda path, arrays, _: make_hdf5.plain(path, arrays, groups=True)),
    "keras 2": (CASES, lambda path, arrays, _: make_hdf5.keras2(path, arrays)),
    "keras 3, names": (
        ["llama", "qwen2"],
        lambda path, arrays, spec: make_hdf5.keras3_llama(path, arrays, spec, classes=False),
    ),
    "keras 3, classes": (
        ["llama-scaled", "qwen2"],
        lambda path, arrays, spec: make_hdf5.keras3_llama(path, arrays, spec, classes=True),
    ),
    "keras 3, heads first": (["gemma3"], make_hdf5.keras3_gemma),
}


def layouts() -> list[Any]:
    return [
        pytest.param(case, write, id=f"{name}: {case}")
        for name, (cases, write) in LAYOUTS.items()
        for case in cases
    ]


@pytest.mark.parametrize(("case", "write"), layouts())
def test_weights_alone_with_a_model_they_are_like(case: str, write: Layout, tmp_path: Path) -> None:
    source = describe(open_checkpoint(FAMILIES / case))
    path = write(tmp_path / "weights.h5", arrays_of(case), source.spec)
    assert_same(describe(open_checkpoint(path, like=str(FAMILIES / case))), source)


def test_hugging_face_names_like_a_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    """The model that describes has rows in pairs, the file in halves: each by its own names."""
    source = describe(open_checkpoint(tiny_gguf))
    names = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    kinds = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    for i in range(source.spec.n_layers):
        for kind, name in kinds.items():
            names[f"layers.{i}.{kind}"] = f"model.layers.{i}.{name}.weight"
    arrays = {names[name]: source.tensor(name) for name, _ in source.spec.shapes()}
    path = make_hdf5.plain(tmp_path / "weights.h5", arrays, groups=True)
    assert_same(describe(open_checkpoint(path, like=str(tiny_gguf))), source)


def test_gguf_names_like_a_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    arrays = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    path = make_hdf5.plain(tmp_path / "weights.h5", arrays, groups=False)
    assert_same(describe(open_checkpoint(path, like=str(tiny_gguf))), describe(checkpoint))


def test_canonical_names_without_the_description(tmp_path: Path) -> None:
    path = make_hdf5.ours(tmp_path / "base.h5")
    like = make_hdf5.ours(tmp_path / "like.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["model_config"]
        del file["tokenizer"]
    found = describe(open_checkpoint(path, like=str(like)))
    assert np.array_equal(found.tensor("layers.0.o"), make_hdf5.values()["layers.0.o"])


def test_weights_alone_say_what_they_lack(tmp_path: Path) -> None:
    path = make_hdf5.plain(tmp_path / "weights.h5", arrays_of("llama"), groups=True)
    with pytest.raises(UnsupportedModel, match="does not say of which model: give --like MODEL"):
        describe(open_checkpoint(path))


def like(arrays: dict[str, NDArray[np.float32]], tmp_path: Path, write: Any) -> SourceModel:
    path = write(tmp_path / "weights.h5", arrays)
    return describe(open_checkpoint(path, like=str(FAMILIES / "llama")))


@pytest.mark.parametrize(
    "write",
    [lambda p, a: make_hdf5.plain(p, a, groups=True), make_hdf5.keras2],
    ids=["hf", "keras"],
)
def test_other_shapes_are_refused(write: Any, tmp_path: Path) -> None:
    arrays = arrays_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match="has the wrong shape"):
        like(arrays | {name: arrays[name][:-1]}, tmp_path, write)
    less = {key: array for key, array in arrays.items() if key != name}
    with pytest.raises(CheckpointError, match="up_proj.weight is missing"):
        like(less, tmp_path, write)
    with pytest.raises(UnsupportedModel, match="adapter"):
        like(arrays | {"model.adapter.weight": arrays[name]}, tmp_path, write)


def test_one_tensor_under_two_names_of_keras(tmp_path: Path) -> None:
    arrays = arrays_of("llama")
    twice = {"copy." + name: array for name, array in arrays.items() if "layers.0.self" in name}
    with pytest.raises(CheckpointError, match=r"are both model\.layers\.0\.self_attn"):
        like(arrays | twice, tmp_path, make_hdf5.keras2)


def test_a_kernel_that_could_be_turned_two_ways_is_refused(tmp_path: Path) -> None:
    from flashlite.model.keras_names import _axes

    assert _axes((16, 2, 4), (8, 16), True) == (1, 2, 0)
    assert _axes((2, 16, 4), (8, 16), True) == (0, 2, 1)
    assert _axes((2, 4, 16), (16, 8), True) == (2, 0, 1)
    assert _axes((4, 4, 4), (16, 4), True) is None  # the first two
    assert _axes((16, 2, 3), (8, 16), True) is None
    assert _axes((16, 16), (16, 16), False) == (0, 1)
    assert _axes((16, 16), (16, 16), True) == (1, 0)


# ---- encoders ----


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a random BERT of two layers."""
    d, ff = 16, 32
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (50, d),
        "embeddings.position_embeddings.weight": (24, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
    }
    for i in range(2):
        for name, out, wide in (
            ("attention.self.query", d, d),
            ("attention.self.key", d, d),
            ("attention.self.value", d, d),
            ("attention.output.dense", d, d),
            ("intermediate.dense", ff, d),
            ("output.dense", d, ff),
        ):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (out, wide)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{name}.{kind}": (d,) for kind in ("weight", "bias")}
    rng = np.random.default_rng(2)
    folder = tmp_path / "bert"
    folder.mkdir()
    save_file(
        {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "bert", "hidden_size": d, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": ff,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_encoder(path: Path, folder: Path, like: str | None) -> None:
    found = describe_any(open_checkpoint(path, like=like))
    expected = describe_any(open_checkpoint(folder))
    assert found.spec == expected.spec
    for name, _ in expected.spec.shapes():
        assert found.tensor(name).tobytes() == expected.tensor(name).tobytes(), name


def test_an_export_of_an_encoder(bert: Path, tmp_path: Path) -> None:
    path = export(describe_any(open_checkpoint(bert)), tmp_path / "base_fp32.h5")
    assert_same_encoder(path, bert, None)
    with pytest.raises(UnsupportedModel, match="it makes vectors, not text"):
        describe(open_checkpoint(path))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_an_encoder_by_names(prefix: str, bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert)
    arrays = {prefix + name: checkpoint.tensor(name) for name in checkpoint.tensors}
    for path in (
        make_hdf5.plain(tmp_path / "plain.h5", arrays, groups=True),
        make_hdf5.keras2(tmp_path / "tf_model.h5", arrays),
    ):
        assert_same_encoder(path, bert, str(bert))


def test_a_broken_description_is_one_line(tmp_path: Path) -> None:
    spec = make_hdf5.SPEC.to_json()
    for changes, said in (
        ({"n_layers": 0}, "n_layers is 0, allowed 1"),
        ({"family": "qwen2"}, "another architecture than it names"),
        ({"n_layers": 3}, "layers.2.attn_norm is missing"),
        ({"d_model": 20}, "wrong shape"),
        ({"colour": "red"}, "unknown model keys"),
    ):
        path = make_hdf5.ours(tmp_path / "base.h5", spec=spec | changes)
        with pytest.raises(CheckpointError, match=said):
            describe(open_checkpoint(path))
