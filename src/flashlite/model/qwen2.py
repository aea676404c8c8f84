"""Qwen 2 and 2.5: llama with biases on q, k and v; layers may slide."""

from __future__ import annotations

from typing import Any

from flashlite.checkpoint.base import Checkpoint
from flashlite.model.family import Family, gguf_common, hf_common, hf_layer_types, hf_rope
from flashlite.model.fields import Fields
from flashlite.model.spec import ModelSpec

__all__ = ["QWEN2", "hf_sliding"]


def hf_sliding(fields: Fields, n_layers: int) -> dict[str, Any]:
    """Sliding layers of Qwen: by `layer_types`, else those from `max_window_layers` up."""
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return {}
    layers = hf_layer_types(fields, n_layers)
    if layers is None:
        first = fields.integer("max_window_layers", 0, 512, 28)
        layers = tuple(i >= first for i in range(n_layers))
    window = fields.integer("sliding_window", 1, 16777216)
    return {"sliding_window": window, "sliding_layers": layers}


def _read_gguf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    return ModelSpec(
        family="qwen2", activation="silu", qkv_bias=True, **gguf_common(fields, checkpoint)
    )


def _read_hf(fields: Fields, checkpoint: Checkpoint) -> ModelSpec:
    fields.choice("hidden_act", {"silu": None}, "silu")
    common = hf_common(fields, checkpoint, tied_default=False)
    return ModelSpec(
        family="qwen2",
        activation="silu",
        qkv_bias=True,
        **common,
        **hf_rope(fields, 10000.0),
        **hf_sliding(fields, common["n_layers"]),
    )


QWEN2 = Family("qwen2", _read_gguf, _read_hf)
