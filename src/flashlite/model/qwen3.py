"""Qwen 3: llama with a norm on every head of q and k, and its own head size."""

from __future__ import annotations

from flashlite.checkpoint.base import Checkpoint
from flashlite.model.family import Family, gguf_common, hf_common, hf_rope
from flashlite.model.fields import Fields
from flashlite.model.qwen2 import hf_sliding
from flashlite.model.spec import ModelSpec

__all__ = ["QWEN3"]


def _read_gguf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    return ModelSpec(
        family="qwen3", activation="silu", qk_norm=True, **gguf_common(fields, checkpoint)
    )


def _read_hf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    fields.choice("hidden_act", {"silu": None}, "silu")
    common = hf_common(fields, checkpoint, tied_default=False, head_dim_default=128)
    return ModelSpec(
        family="qwen3",
        activation="silu",
        qk_norm=True,
        qkv_bias=fields.flag("attention_bias", False),
        **common,
        **hf_rope(fields, 10000.0),
        **hf_sliding(fields, common["n_layers"]),
    )


QWEN3 = Family("qwen3", _read_gguf, _read_hf)
