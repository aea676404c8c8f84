"""What `describe` reads from each format, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashlite.checkpoint import blocks
from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import CheckpointError, UnsupportedModel
from flashlite.model.families import FAMILIES, describe
from flashlite.model.family import GGUF_NAMES
from flashlite.model.reference import Reference
from flashlite.model.rope import rope_frequencies
from flashlite.model.source import SourceModel


def with_config(case: Any, **changes: object) -> Checkpoint:
    """The checkpoint of a fixture with changed config keys; None removes one."""
    config = {**case.source.checkpoint.metadata, **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    checkpoint: Checkpoint = replace(case.source.checkpoint, metadata=kept)
    return checkpoint


def as_gguf(
    folder: Path, case: Any, metadata: Mapping[str, object], **extra: NDArray[np.float32]
) -> Checkpoint:
    """The same weights in a GGUF file, rope rows interleaved as llama's converter does."""
    spec = case.source.spec
    tensors = {name.replace("__", "."): make_gguf.encode(x, "F32") for name, x in extra.items()}
    for canonical, _ in spec.shapes():
        values = case.source.tensor(canonical)
        layer, kind = canonical.split(".")[1:] if "." in canonical else ("", canonical)
        generic = f"layers.{{i}}.{kind}" if layer else kind
        heads = {"q": spec.n_heads, "k": spec.n_kv_heads}.get(kind.removesuffix("_bias"))
        if spec.family == "llama" and heads:
            halves = values.reshape(heads, 2, spec.head_dim // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        name = GGUF_NAMES[generic].replace("{i}", layer)
        tensors[name] = make_gguf.encode(values, "F32")
    keys: dict[str, object] = {"general.architecture": spec.family}
    for key, value in metadata.items():  # as float64, so that specs can be compared for equality
        keys[f"{spec.family}.{key}"] = np.float64(value) if isinstance(value, float) else value
    return open_checkpoint(make_gguf.write_gguf(folder / "model.gguf", keys, tensors))


def sizes(case: Any) -> dict[str, object]:
    spec = case.source.spec
    return {
        "embedding_length": spec.d_model,
        "block_count": spec.n_layers,
        "feed_forward_length": spec.d_ff,
        "context_length": spec.max_context,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.freq_base": spec.rope_theta,
    }


# ---- the same model in two formats --------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gguf_and_hf_give_the_same_model(
    cases: Mapping[str, Any], tmp_path: Path, name: str
) -> None:
    case = cases[name]
    source = describe(as_gguf(tmp_path, case, sizes(case)))
    assert source.spec == case.source.spec
    found = Reference(source.spec, source.tensor).logits(case.ids)
    np.testing.assert_allclose(found, case.logits, rtol=0, atol=1e-4)


def test_gguf_llama_biases_and_rope_factors(cases: Mapping[str, Any], tmp_path: Path) -> None:
    case = cases["llama-scaled"]
    plain = rope_frequencies(replace(case.source.spec, rope_llama3=None))
    factors = plain / rope_frequencies(case.source.spec)
    source = describe(as_gguf(tmp_path, case, sizes(case), rope_freqs__weight=factors))
    assert source.spec.qkv_bias
    assert source.spec.rope_llama3 is None
    assert source.spec.rope_factors is not None
    found = Reference(source.spec, source.tensor).logits(case.ids)
    np.testing.assert_allclose(found, case.logits, rtol=0, atol=1e-4)


def test_gguf_gemma3(cases: Mapping[str, Any], tmp_path: Path) -> None:
    case = cases["gemma3"]
    keys = {
        **sizes(case),
        "attention.sliding_window": 10,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
        "rope.freq_base_swa": 50.0,
        "attention.scale": case.source.spec.attn_scale,
    }
    source = describe(as_gguf(tmp_path, case, keys))
    # Without the pattern, which few files write, every sixth layer is global: here none.
    assert source.spec == replace(case.source.spec, sliding_layers=(True,) * 4)
    source = describe(as_gguf(tmp_path, case, {**keys, "attention.sliding_window_pattern": 2}))
    assert source.spec == case.source.spec
    found = Reference(source.spec, source.tensor).logits(case.ids)
    np.testing.assert_allclose(found, case.logits, rtol=0, atol=1e-4)
    source = describe(as_gguf(tmp_path, case, {**keys, "attention.sliding_window": 0}))
    assert (source.spec.sliding_window, source.spec.sliding_layers) == (None, ())


@pytest.mark.parametrize(
    "name", ["embed", "layers.0.q", "layers.4.k", "layers.2.v", "layers.1.down"]
)
def test_blocks_are_the_stored_rows_of_tensor(tiny_gguf: Path, name: str) -> None:
    source = describe(open_checkpoint(tiny_gguf))
    dtype, rows = source.blocks(name)
    values = source.tensor(name)
    info = replace(source.checkpoint.info(source.sources[name].name), dtype=dtype)
    assert rows.shape == (len(values), info.nbytes // len(values))
    np.testing.assert_array_equal(blocks.dequantize(info, rows.ravel()), values)
    stored = source.checkpoint.tensor(info.name)
    assert np.array_equal(stored, values) == (name[-1] not in "qk")


def test_only_matrices_have_blocks(cases: Mapping[str, Any]) -> None:
    source = cases["llama"].source
    with pytest.raises(CheckpointError, match="final_norm is not a matrix"):
        source.blocks("final_norm")
    with pytest.raises(CheckpointError, match=r"no tensor layers\.9\.q"):
        source.tensor("layers.9.q")


# ---- spellings of config.json -------------------------------------------------------------------


def test_older_config_of_gemma3_reads_the_same(cases: Mapping[str, Any]) -> None:
    case = cases["gemma3"]
    older = with_config(
        case,
        rope_parameters=None,
        layer_types=None,
        rope_theta=1000,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        sliding_window_pattern=2,
    )
    assert describe(older).spec == case.source.spec


def test_older_config_of_llama_reads_the_same(cases: Mapping[str, Any]) -> None:
    case = cases["llama-scaled"]
    scaling = dict(case.source.checkpoint.metadata["rope_parameters"])
    older = with_config(
        case, rope_parameters=None, rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling
    )
    assert describe(older).spec == case.source.spec


def test_gemma3_defaults_are_those_of_the_released_models(cases: Mapping[str, Any]) -> None:
    case = cases["gemma3"]
    spec = describe(with_config(case, layer_types=None, rope_parameters=None)).spec
    assert spec.sliding_layers == (True,) * 4
    assert (spec.rope_theta, spec.rope_theta_local, spec.rope_linear) == (1e6, 1e4, 1.0)
    assert spec.embed_scale == 24**0.5


def test_gemma3_27b_scales_by_channels_per_head(cases: Mapping[str, Any], tmp_path: Path) -> None:
    case = cases["gemma3"]
    keys = {**sizes(case), "block_count": 62, "attention.sliding_window": 10}
    checkpoint = as_gguf(tmp_path, case, keys)
    layers = {
        name.replace("blk.0", f"blk.{i}"): info
        for name, info in checkpoint.tensors.items()
        for i in range(62)
        if "blk.0" in name
    }
    spec = describe(replace(checkpoint, tensors={**checkpoint.tensors, **layers})).spec
    assert spec.attn_scale == 12**-0.5
    assert [i for i, slides in enumerate(spec.sliding_layers) if not slides] == list(
        range(5, 62, 6)
    )


def test_qwen2_layers_slide_only_when_told(cases: Mapping[str, Any]) -> None:
    case = cases["qwen2"]
    assert describe(with_config(case, layer_types=None)).spec == case.source.spec
    assert describe(with_config(case, use_sliding_window=False)).spec.sliding_layers == ()


def test_tied_head_may_be_written_twice(cases: Mapping[str, Any]) -> None:
    case = cases["llama"]
    assert describe(with_config(case, tie_word_embeddings=True)).spec.tied_head


# ---- what is refused ----------------------------------------------------------------------------


def test_unknown_architecture_names_the_known_ones(cases: Mapping[str, Any]) -> None:
    checkpoint = replace(cases["llama"].source.checkpoint, architecture="mamba")
    with pytest.raises(UnsupportedModel, match=r"mamba.*gemma3, llama, qwen2, qwen3"):
        describe(checkpoint)
    assert sorted(FAMILIES) == ["gemma3", "llama", "qwen2", "qwen3"]


def test_bert_is_called_an_embedding_model(cases: Mapping[str, Any]) -> None:
    checkpoint = replace(cases["llama"].source.checkpoint, architecture="bert")
    with pytest.raises(UnsupportedModel, match="embedding model"):
        describe(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_length", 0),
        ("embedding_length", 2**64 - 1),
        ("embedding_length", "16"),
        ("embedding_length", 16.0),
        ("embedding_length", True),
        ("embedding_length", None),
        ("embedding_length", 18),
        ("block_count", 2**31),
        ("block_count", 3),
        ("feed_forward_length", np.array([24, 24])),
        ("context_length", 0),
        ("context_length", True),
        ("attention.head_count", 0),
        ("attention.head_count", 3),
        ("attention.head_count_kv", 3),
        ("attention.head_count_kv", 2**63),
        ("attention.key_length", 6),
        ("attention.value_length", 8),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", None),
        ("rope.freq_base", float("inf")),
        ("rope.freq_base", -1.0),
        ("rope.dimension_count", 2),
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.type", 3),
        ("rope.scaling.factor", 1e9),
        ("attention.scale", -1.0),
        ("expert_count", 8),
        ("expert_count", np.zeros(2)),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_bad_gguf_metadata_is_refused(
    plain_checkpoint: Any, gguf_metadata: Any, gguf_arrays: Any, key: str, value: object
) -> None:
    describe(plain_checkpoint("gguf", "llama", gguf_metadata, gguf_arrays))
    metadata = {**gguf_metadata, f"llama.{key}": value}
    with pytest.raises(CheckpointError) as caught:
        describe(plain_checkpoint("gguf", "llama", metadata, gguf_arrays))
    assert len(str(caught.value)) < 400


LOCAL_YARN = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "yarn"}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"hidden_size": -32}),
        ("llama", {"tie_word_embeddings": "yes"}),
        ("llama", {"tie_word_embeddings": 1}),
        ("llama", {"rope_parameters": [1]}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}),
        ("llama", {"rope_parameters": {"rope_theta": 0}}),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama", {"num_attention_heads": 5}),
        ("llama-scaled", {"attention_bias": False}),
        ("llama-scaled", {"head_dim": None}),
        ("gemma3", {"layer_types": ["full_attention"]}),
        ("gemma3", {"layer_types": ["full_attention", "chunked"] * 2}),
        ("gemma3", {"layer_types": "full_attention"}),
        ("gemma3", {"sliding_window": -1}),
        ("gemma3", {"rope_parameters": LOCAL_YARN}),
        ("gemma3", {"query_pre_attn_scalar": 0}),
        ("gemma3", {"text_config": {}}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"hidden_activation": "gelu"}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {"num_hidden_layers": 2, "layer_types": None}),
        ("qwen3", {"num_hidden_layers": 3}),
        ("qwen3", {"max_position_embeddings": None}),
    ],
)
def test_bad_config_is_refused(
    cases: Mapping[str, Any], name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError):
        describe(with_config(cases[name], **changes))


def test_llama3_needs_its_frequencies_in_order(cases: Mapping[str, Any]) -> None:
    case = cases["llama-scaled"]
    rope = {**case.source.checkpoint.metadata["rope_parameters"], "high_freq_factor": 1.0}
    with pytest.raises(CheckpointError, match="high_freq_factor"):
        describe(with_config(case, rope_parameters=rope))


def test_head_size_must_fit_the_engine(
    plain_checkpoint: Any, gguf_metadata: Any, gguf_arrays: Any
) -> None:
    metadata = {**gguf_metadata, "llama.attention.key_length": 6}
    with pytest.raises(CheckpointError, match="head_dim is 6, not a multiple of 4"):
        describe(plain_checkpoint("gguf", "llama", metadata, gguf_arrays))


@pytest.mark.parametrize(("name", "head_dim"), [("llama", 8), ("qwen3", 128), ("gemma3", 256)])
def test_head_size_left_out_is_the_family_default(
    cases: Mapping[str, Any], name: str, head_dim: int
) -> None:
    case = cases[name]
    if name == "llama":
        assert describe(with_config(case, head_dim=None)).spec.head_dim == head_dim
        return
    rows = head_dim * case.source.spec.n_heads
    with pytest.raises(CheckpointError, match=rf"q_proj.*allowed \({rows}, 24\)"):
        describe(with_config(case, head_dim=None))


def test_a_missing_tensor_is_named(cases: Mapping[str, Any]) -> None:
    for tensor in (
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ):
        checkpoint = cases["llama"].source.checkpoint
        tensors = {name: info for name, info in checkpoint.tensors.items() if name != tensor}
        with pytest.raises(CheckpointError, match=tensor):
            describe(replace(checkpoint, tensors=tensors))


@pytest.mark.parametrize("shape", [(32, 31), (16, 64), (1024,), (32, 32, 1)])
def test_a_wrong_shape_is_named_with_both_shapes(
    cases: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoint = cases["llama"].source.checkpoint
    info = replace(checkpoint.tensors[name], shape=shape)
    with pytest.raises(CheckpointError) as caught:
        describe(replace(checkpoint, tensors={**checkpoint.tensors, name: info}))
    assert all(part in str(caught.value) for part in (name, str(shape), "(32, 32)"))


def test_a_tensor_nobody_reads_is_refused(
    plain_checkpoint: Any, gguf_metadata: Any, gguf_arrays: Any
) -> None:
    for name in ("blk.0.ffn_gate_inp.weight", "blk.2.attn_q.weight", "blk.0.attn_output.bias"):
        extra = {**gguf_arrays, name: np.ones(16, dtype=np.float32)}
        with pytest.raises(UnsupportedModel, match=name):
            describe(plain_checkpoint("gguf", "llama", gguf_metadata, extra))
    zero = {**gguf_arrays, "blk.0.attn_output.bias": np.zeros(16, dtype=np.float32)}
    describe(plain_checkpoint("gguf", "llama", gguf_metadata, zero))


@pytest.mark.parametrize("factors", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, 1e30]])
def test_rope_factors_are_checked(
    plain_checkpoint: Any, gguf_metadata: Any, gguf_arrays: Any, factors: list[float]
) -> None:
    extra = {**gguf_arrays, "rope_freqs.weight": np.array(factors, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        describe(plain_checkpoint("gguf", "llama", gguf_metadata, extra))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data())
def test_any_config_value_is_read_or_refused(cases: Mapping[str, Any], data: st.DataObject) -> None:
    case = cases[data.draw(st.sampled_from(sorted(cases)))]
    metadata = case.source.checkpoint.metadata
    key = data.draw(st.sampled_from(sorted(metadata)))
    changed = replace(case.source.checkpoint, metadata={**metadata, key: data.draw(JSON)})
    with suppress(CheckpointError):
        assert isinstance(describe(changed), SourceModel)
