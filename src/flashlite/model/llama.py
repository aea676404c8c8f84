"""Llama 2 and 3, SmolLM2 and their kin: RMSNorm, grouped-query attention, SwiGLU."""

from __future__ import annotations

from flashlite.checkpoint.base import Checkpoint
from flashlite.model.family import (
    GGUF_NAMES,
    HF_NAMES,
    Family,
    gguf_common,
    hf_common,
    hf_rope,
)
from flashlite.model.fields import Fields
from flashlite.model.spec import ModelSpec

__all__ = ["LLAMA"]


def _read_gguf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    bias = GGUF_NAMES["layers.{i}.q_bias"].replace("{i}", "0") in checkpoint.tensors
    return ModelSpec(
        family="llama", activation="silu", qkv_bias=bias, **gguf_common(fields, checkpoint)
    )


def _read_hf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    fields.choice("hidden_act", {"silu": None, "swish": None}, "silu")
    return ModelSpec(
        family="llama",
        activation="silu",
        qkv_bias=fields.flag("attention_bias", False),
        **hf_common(fields, checkpoint, tied_default=False),
        **hf_rope(fields, 10000.0),
    )


LLAMA = Family("llama", _read_gguf, _read_hf, interleaved_gguf=True, hf_names=HF_NAMES)
