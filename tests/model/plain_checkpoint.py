"""Checkpoints made of float32 arrays, for tests that need no real container format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.base import Checkpoint, TensorInfo

__all__ = ["FAMILIES_FOLDER", "gguf_arrays", "gguf_metadata", "plain_checkpoint"]

FAMILIES_FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
Arrays = dict[str, NDArray[np.float32]]


def plain_checkpoint(
    folder: Path,
    fmt: Literal["gguf", "safetensors"],
    architecture: str,
    metadata: Mapping[str, object],
    arrays: Arrays,
) -> Checkpoint:
    """Write the arrays one after another into one file and describe them."""
    path = folder / "tensors.bin"
    tensors: dict[str, TensorInfo] = {}
    with path.open("wb") as file:
        for name, array in arrays.items():
            data = np.ascontiguousarray(array, dtype="<f4")
            tensors[name] = TensorInfo(name, data.shape, "F32", path, file.tell(), data.nbytes)
            file.write(data.tobytes())
    return Checkpoint(path, fmt, architecture, metadata, tensors)


def gguf_metadata(architecture: str = "llama", **changes: object) -> dict[str, Any]:
    """Keys of a two-layer model; `changes` replaces or (None) removes keys, `__` standing for a dot."""
    keys: dict[str, object] = {
        "embedding_length": 16,
        "block_count": 2,
        "feed_forward_length": 24,
        "context_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100.0,
    }
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}


def gguf_arrays(
    *, layers: int = 2, d: int = 16, heads: int = 4, kv: int = 2, head_dim: int = 4, ff: int = 24
) -> Arrays:
    """Random tensors for `gguf_metadata`'s llama, under GGUF names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, d), "output_norm.weight": (d,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (heads * head_dim, d),
            f"blk.{i}.attn_k.weight": (kv * head_dim, d),
            f"blk.{i}.attn_v.weight": (kv * head_dim, d),
            f"blk.{i}.attn_output.weight": (d, heads * head_dim),
            f"blk.{i}.ffn_norm.weight": (d,),
            f"blk.{i}.ffn_gate.weight": (ff, d),
            f"blk.{i}.ffn_up.weight": (ff, d),
            f"blk.{i}.ffn_down.weight": (d, ff),
        }
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
