"""`Family`: one architecture, and what all of them read alike from GGUF and from HF files.

A family is a table entry: how to read its spec from each format, and under which names its tensors
lie. What a format says the same way for every family is read here; the rest in the family's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashlite.checkpoint.base import Checkpoint
from flashlite.errors import CheckpointError, UnsupportedModel
from flashlite.model.fields import Fields
from flashlite.model.spec import Llama3Rope, ModelSpec

__all__ = [
    "GGUF_NAMES",
    "HF_NAMES",
    "Family",
    "gguf_common",
    "hf_common",
    "hf_layer_types",
    "hf_rope",
    "hf_rope_object",
]

GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "layers.{i}.attn_norm": "blk.{i}.attn_norm.weight",
    "layers.{i}.q": "blk.{i}.attn_q.weight",
    "layers.{i}.k": "blk.{i}.attn_k.weight",
    "layers.{i}.v": "blk.{i}.attn_v.weight",
    "layers.{i}.q_bias": "blk.{i}.attn_q.bias",
    "layers.{i}.k_bias": "blk.{i}.attn_k.bias",
    "layers.{i}.v_bias": "blk.{i}.attn_v.bias",
    "layers.{i}.q_norm": "blk.{i}.attn_q_norm.weight",
    "layers.{i}.k_norm": "blk.{i}.attn_k_norm.weight",
    "layers.{i}.o": "blk.{i}.attn_output.weight",
    "layers.{i}.post_attn_norm": "blk.{i}.post_attention_norm.weight",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm.weight",
    "layers.{i}.gate": "blk.{i}.ffn_gate.weight",
    "layers.{i}.up": "blk.{i}.ffn_up.weight",
    "layers.{i}.down": "blk.{i}.ffn_down.weight",
    "layers.{i}.post_ffn_norm": "blk.{i}.post_ffw_norm.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}

HF_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.q": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.k": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.v": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.o": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.down": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@dataclass(frozen=True)
class Family:
    """How one architecture is read.

    Attributes:
        name: the architecture, as GGUF spells it.
        read_gguf: the spec from GGUF metadata and tensor directory.
        read_hf: the spec from `config.json` and tensor directory.
        interleaved_gguf: GGUF stores rows of q and k as rope pairs (2j, 2j + 1).
        hf_names: canonical -> HF tensor names.
        hf_norm_offset: added to HF norm weights.
    """

    name: str
    read_gguf: Callable[[Fields, Checkpoint], ModelSpec]
    read_hf: Callable[[Fields, Checkpoint], ModelSpec]
    interleaved_gguf: bool = False
    hf_names: Mapping[str, str] = field(default_factory=lambda: HF_NAMES)
    hf_norm_offset: float = 0.0


def gguf_common(fields: Fields, checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of a `ModelSpec` that GGUF says alike for every family, as keyword arguments.

    Raises:
        CheckpointError: a value is missing, has the wrong type or range, or asks for arithmetic
            flashlite does not have (mixture of experts, partial rotation, YaRN).
    """
    _refuse_set(fields, "expert_count", "attn_logit_softcapping", "final_logit_softcapping")
    d_model = fields.integer("embedding_length", 4, 65536)
    n_heads = fields.integer("attention.head_count", 1, 1024)
    head_dim = _head_dim(fields, "attention.key_length", d_model, n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        fields.integer(key, head_dim, head_dim, head_dim)
    common = {
        "n_layers": fields.integer("block_count", 1, 512),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("attention.head_count_kv", 1, n_heads, n_heads),
        "head_dim": head_dim,
        "d_ff": fields.integer("feed_forward_length", 4, 262144),
        "vocab_size": _vocabulary(checkpoint, GGUF_NAMES["embed"]),
        "max_context": fields.integer("context_length", 1, 16777216),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon", 1e-12, 1e-1),
        "tied_head": GGUF_NAMES["head"] not in checkpoint.tensors,
        "rope_theta": fields.number("rope.freq_base", 1.0, 1e12, 10000.0),
        "rope_linear": _gguf_linear(fields),
        "rope_factors": _gguf_factors(checkpoint, head_dim),
    }
    if fields.has("attention.scale"):
        common["attn_scale"] = fields.number("attention.scale", 1e-6, 1e6)
    return common


def hf_common(
    fields: Fields,
    checkpoint: Checkpoint,
    *,
    tied_default: bool,
    head_dim_default: int | None = None,
) -> dict[str, Any]:
    """The part of a `ModelSpec` that every HF `config.json` says alike, as keyword arguments.

    The defaults are those of the family in transformers, for keys the config leaves out.

    Raises:
        CheckpointError: as `gguf_common`.
    """
    _refuse_set(fields, "num_experts", "attn_logit_softcapping", "final_logit_softcapping")
    d_model = fields.integer("hidden_size", 4, 65536)
    n_heads = fields.integer("num_attention_heads", 1, 1024)
    return {
        "n_layers": fields.integer("num_hidden_layers", 1, 512),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", 1, n_heads, n_heads),
        "head_dim": _head_dim(fields, "head_dim", d_model, n_heads, head_dim_default),
        "d_ff": fields.integer("intermediate_size", 4, 262144),
        "vocab_size": _vocabulary(checkpoint, HF_NAMES["embed"]),
        "max_context": fields.integer("max_position_embeddings", 1, 16777216),
        "norm_eps": fields.number("rms_norm_eps", 1e-12, 1e-1, 1e-6),
        "tied_head": fields.flag("tie_word_embeddings", tied_default),
    }


def hf_rope(fields: Fields, theta_default: float) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` of transformers 5, else `rope_theta` and `rope_scaling`.

    Raises:
        CheckpointError: a value is out of range, or the kind of scaling is not known.
    """
    if fields.has("rope_parameters"):
        return hf_rope_object(fields.group("rope_parameters"), theta_default)
    theta = fields.number("rope_theta", 1.0, 1e12, theta_default)
    fields.number("partial_rotary_factor", 1.0, 1.0, 1.0)
    return hf_rope_object(fields.group("rope_scaling"), theta)


def hf_rope_object(rope: Fields, theta_default: float) -> dict[str, Any]:
    """Rotary settings of one object that holds all of them.

    Raises:
        CheckpointError: as `hf_rope`.
    """
    rope.number("partial_rotary_factor", 1.0, 1.0, 1.0)
    theta = rope.number("rope_theta", 1.0, 1e12, theta_default)
    settings: dict[str, Any] = {"rope_theta": theta}
    kind = rope.choice(
        "rope_type" if rope.has("rope_type") else "type",
        {name: name for name in ("default", "linear", "llama3")},
        "default",
    )
    if kind == "linear":
        settings["rope_linear"] = rope.number("factor", 1.0, 1e6)
    elif kind == "llama3":
        low = rope.number("low_freq_factor", 1e-3, 1e6)
        settings["rope_llama3"] = Llama3Rope(
            factor=rope.number("factor", 1.0, 1e6),
            low_freq_factor=low,
            high_freq_factor=rope.number("high_freq_factor", math.nextafter(low, math.inf), 1e6),
            original_context=rope.integer("original_max_position_embeddings", 1, 16777216),
        )
    return settings


def hf_layer_types(fields: Fields, n_layers: int) -> tuple[bool, ...] | None:
    """Which layers slide by `layer_types`, None where the config does not list them.

    Raises:
        CheckpointError: the list has another length or a kind of layer that is not known.
    """
    kinds = fields.strings("layer_types")
    if kinds is None:
        return None
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != n_layers:
        raise CheckpointError(
            "config.json layer_types",
            path=fields.path,
            value=f"{len(kinds)} entries, unknown: {unknown}",
            limit=f"{n_layers} of full_attention or sliding_attention",
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def _head_dim(
    fields: Fields, key: str, d_model: int, n_heads: int, default: int | None = None
) -> int:
    if not fields.has(key) and default is None and d_model % n_heads:
        raise CheckpointError(
            f"{d_model} channels do not divide by {n_heads} heads and there is no "
            f"{fields.prefix}{key}",
            path=fields.path,
        )
    return fields.integer(key, 4, 512, default or d_model // n_heads)


def _vocabulary(checkpoint: Checkpoint, embed: str) -> int:
    """Rows of the embedding: the one place where the size cannot be wrong."""
    shape = checkpoint.info(embed).shape
    if len(shape) != 2:
        raise CheckpointError(
            f"tensor {embed} is not a matrix", path=checkpoint.path, value=shape, limit="2 axes"
        )
    return shape[0]


def _gguf_linear(fields: Fields) -> float:
    kind = fields.choice("rope.scaling.type", {name: name for name in ("none", "linear")}, "linear")
    if kind == "none":
        return 1.0
    old = fields.number("rope.scale_linear", 0.0, 1e6, 1.0)  # files of 2023
    factor = fields.number("rope.scaling.factor", 0.0, 1e6, old)
    return factor or 1.0  # 0 stands for "not scaled"


def _gguf_factors(checkpoint: Checkpoint, head_dim: int) -> tuple[float, ...] | None:
    """Llama 3 scaling as converters store it: one divisor per pair."""
    name = "rope_freqs.weight"
    if name not in checkpoint.tensors:
        return None
    shape = checkpoint.tensors[name].shape
    if shape != (head_dim // 2,):
        raise CheckpointError(
            f"tensor {name} has the wrong shape",
            path=checkpoint.path,
            value=shape,
            limit=(head_dim // 2,),
        )
    factors = checkpoint.tensor(name)
    if not np.all((factors >= 1e-6) & (factors <= 1e6)):
        raise CheckpointError(
            f"tensor {name}",
            path=checkpoint.path,
            value=f"{factors.min()} to {factors.max()}",
            limit="1e-6 to 1e6",
        )
    return tuple(float(factor) for factor in factors)


def _refuse_set(fields: Fields, *keys: str) -> None:
    """Refuse arithmetic that no flashlite engine has; absent, null, 0 and false mean it is off."""
    for key in keys:
        value = fields.values.get(fields.prefix + key)
        if value is None or (isinstance(value, (bool, int, float)) and not value):
            continue
        raise UnsupportedModel(
            f"metadata {fields.prefix}{key} asks for something flashlite does not run",
            path=fields.path,
            value=value if isinstance(value, (bool, int, float)) else type(value).__name__,
            limit="absent or 0",
        )
