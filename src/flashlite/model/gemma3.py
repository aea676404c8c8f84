"""Gemma 3 text models: norms on both sides of each block, five sliding layers to one global.

Embeddings are multiplied by sqrt(d_model) in float32, as llama.cpp does; transformers rounds that
factor to the type of the weights, which is the same number when they are float32.
"""

from __future__ import annotations

from typing import Any

from flashlite.checkpoint.base import Checkpoint
from flashlite.errors import UnsupportedModel
from flashlite.model.family import (
    HF_NAMES,
    Family,
    gguf_common,
    hf_common,
    hf_layer_types,
    hf_rope,
    hf_rope_object,
)
from flashlite.model.fields import Fields
from flashlite.model.spec import ModelSpec

__all__ = ["GEMMA3"]

_PATTERN = 6  # every sixth layer is global
_LOCAL_THETA = 10000.0
_LAYERS_27B = 62

_HF_NAMES = {
    **HF_NAMES,
    "layers.{i}.post_attn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.post_ffn_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def _read_gguf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    common = gguf_common(fields, checkpoint)
    if common["n_layers"] == _LAYERS_27B:
        # GGUF has no key for it: 27B alone scales by d_model / n_heads (168), not by head_dim.
        common.setdefault("attn_scale", (common["d_model"] / common["n_heads"]) ** -0.5)
    theta = fields.number("rope.freq_base_swa", 1.0, 1e12, _LOCAL_THETA)
    window = fields.integer("attention.sliding_window", 0, 16777216, 0)
    pattern = fields.integer("attention.sliding_window_pattern", 1, 512, _PATTERN)
    return _spec(common, theta, window, _every(pattern, common["n_layers"]))


def _read_hf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    if fields.has("text_config"):
        raise UnsupportedModel(
            "this Gemma 3 also reads images; convert its text model to GGUF and use that",
            path=checkpoint.path,
        )
    if fields.flag("use_bidirectional_attention", False):
        raise UnsupportedModel(
            "this Gemma 3 attends in both directions (an embedding model)", path=checkpoint.path
        )
    fields.choice("hidden_activation", {"gelu_pytorch_tanh": None}, "gelu_pytorch_tanh")
    common = hf_common(fields, checkpoint, tied_default=True, head_dim_default=256)
    common["qkv_bias"] = fields.flag("attention_bias", False)
    common["attn_scale"] = fields.number("query_pre_attn_scalar", 1e-6, 1e6, 256.0) ** -0.5
    rope = fields.group("rope_parameters")
    if rope.has("full_attention"):  # transformers 5: one object per kind of layer
        common |= hf_rope_object(rope.group("full_attention"), 1e6)
        local = rope.group("sliding_attention")
        local.choice("rope_type", {"default": None}, "default")
        theta = local.number("rope_theta", 1.0, 1e12, _LOCAL_THETA)
    else:
        common |= hf_rope(fields, 1e6)
        theta = fields.number("rope_local_base_freq", 1.0, 1e12, _LOCAL_THETA)
    layers = hf_layer_types(fields, common["n_layers"])
    if layers is None:
        pattern = fields.integer("sliding_window_pattern", 1, 512, _PATTERN)
        layers = _every(pattern, common["n_layers"])
    return _spec(common, theta, fields.integer("sliding_window", 0, 16777216, 4096), layers)


def _spec(
    common: dict[str, Any], theta_local: float, window: int, layers: tuple[bool, ...]
) -> ModelSpec:
    """A window of 0 means that no layer slides."""
    return ModelSpec(
        family="gemma3",
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embed_scale=common["d_model"] ** 0.5,
        rope_theta_local=theta_local,
        sliding_window=window or None,
        sliding_layers=layers if window else (),
        **common,
    )


def _every(pattern: int, n_layers: int) -> tuple[bool, ...]:
    """All layers slide but every `pattern`th."""
    return tuple((i + 1) % pattern != 0 for i in range(n_layers))


GEMMA3 = Family("gemma3", _read_gguf, _read_hf, hf_names=_HF_NAMES, hf_norm_offset=1.0)
