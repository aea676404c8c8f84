"""Which variable of a Keras file is which tensor of a Hugging Face model.

Keras 2 stores variables by name (`.../q_proj/kernel:0`), Keras 3 by number (`.../q_proj/vars/0`).
Names are compared from their end, after those of KerasHub's layers have been replaced by Hugging
Face's; what stands before (the model's, the container's) may be anything. Kernels are stored inputs
first, some with an axis per head; they are brought to (outputs, inputs).

Sources: keras/src/saving/saving_lib.py; keras_hub/src/utils/transformers/convert_*.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.hdf5_read import Adopted
from flashlite.errors import CheckpointError, UnsupportedModel

__all__ = ["match_keras"]

# A layer of the stack: its class (and the first has no number) or its name.
_BLOCK = re.compile(
    r"(?:[a-z0-9_]*(?:transformer_decoder|decoder_block)|transformer_layer|layers_)_?(\d*)"
)
_PARTS: Mapping[str, tuple[str, ...]] = {
    "token_embedding": ("embed_tokens",),
    "reversible_embedding": ("embed_tokens",),
    "sequence_output_layernorm": ("norm",),
    "final_normalization": ("norm",),
    "self_attention_layer": ("self_attn",),
    "attention": ("self_attn",),
    "query_dense": ("q_proj",),
    "key_dense": ("k_proj",),
    "value_dense": ("v_proj",),
    "output_dense": ("o_proj",),
    "query_norm": ("q_norm",),
    "key_norm": ("k_norm",),
    "query_dense_layer_norm": ("q_norm",),
    "key_dense_layer_norm": ("k_norm",),
    "self_attention_layernorm": ("input_layernorm",),
    "feedforward_layernorm": ("post_attention_layernorm",),
    "feedforward_gate_dense": ("mlp", "gate_proj"),
    "feedforward_intermediate_dense": ("mlp", "up_proj"),
    "feedforward_output_dense": ("mlp", "down_proj"),
    "pre_attention_norm": ("input_layernorm",),
    "post_attention_norm": ("post_attention_layernorm",),
    "pre_ffw_norm": ("pre_feedforward_layernorm",),
    "post_ffw_norm": ("post_feedforward_layernorm",),
    "gating_ffw": ("mlp", "gate_proj"),
    "gating_ffw_2": ("mlp", "up_proj"),
    "ffw_linear": ("mlp", "down_proj"),
}
_OUTPUT_NORM = re.compile(r"[a-z0-9_]*(?:layer_norm|layernorm|rms_normalization)")
_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "embeddings": "weight",
    "embedding": "weight",
    "beta": "bias",
}
# State of training, beside the weights.
_TRAINING = frozenset(
    ("optimizer", "optimizer_weights", "seed_generator", "metrics", "loss_tracker", "random_state")
)


def match_keras(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], other: frozenset[str]
) -> dict[str, Adopted]:
    """Find the tensors of a model among the variables of a Keras file.

    Args:
        checkpoint: the file.
        wanted: the names and shapes of the model's tensors, as Hugging Face has them.
        other: words in the names of variables that the model does not read.

    Raises:
        UnsupportedModel: a variable is no tensor of the model.
        CheckpointError: two are the same one, or one has a shape that cannot be brought to the
            model's.
    """
    keys = {tuple(name.removeprefix("model.").split(".")): name for name in wanted}
    found: dict[str, Adopted] = {}
    for stored, info in checkpoint.tensors.items():
        words = stored.replace("_._", ".").removesuffix(":0").split(".")
        if _TRAINING & set(words):
            continue
        parts, kernel = _leaf(words)
        name = _ending(parts, keys)
        if name is None:
            parts, kernel = _leaf(_in_other_words(words))
            name = _ending(parts, keys)
        if name is None:
            if other & set(parts):
                continue
            if parts[-1] == "bias" and not checkpoint.tensor(stored).any():
                continue  # some exporters write them
            raise UnsupportedModel(
                f"dataset {stored} is no tensor of the model it should be like",
                path=checkpoint.path,
            )
        if name in found:
            raise CheckpointError(
                f"datasets {found[name].source} and {stored} are both {name}", path=checkpoint.path
            )
        axes = _axes(info.shape, wanted[name], kernel)
        if axes is None:
            raise CheckpointError(
                f"dataset {stored} has the wrong shape for {name}",
                path=checkpoint.path,
                value=info.shape,
                limit=f"{wanted[name]}, or as Keras stores it",
            )
        found[name] = Adopted(stored, axes, wanted[name])
    return found


def _ending(parts: tuple[str, ...], keys: Mapping[tuple[str, ...], str]) -> str | None:
    """What the longest end of a name stands for."""
    return next((keys[parts[i:]] for i in range(len(parts)) if parts[i:] in keys), None)


def _in_other_words(words: list[str]) -> list[str]:
    """KerasHub's words for a layer in those of Hugging Face."""
    parts: list[str] = []
    for position, word in enumerate(words):
        plain = word.lstrip("_")
        if plain in _PARTS:
            parts += _PARTS[plain]
        elif block := _BLOCK.fullmatch(plain):
            parts += ["layers", block[1] or "0"]
        elif position and words[position - 1] == "layers" and _OUTPUT_NORM.fullmatch(plain):
            parts.append("norm")
        else:
            parts.append(word)
    return parts


def _leaf(words: list[str]) -> tuple[tuple[str, ...], bool]:
    """A name with Hugging Face's last word, and whether the variable is stored inputs first."""
    parts = list(words)
    if len(parts) < 2:
        return tuple(parts), False
    owner, leaf = parts[-2], parts[-1]
    if owner == "vars" and len(parts) > 2:
        owner = parts[-3]
        leaf = {"0": "kernel", "1": "bias"}.get(leaf, leaf)
        if owner == "embed_tokens":
            leaf = {"kernel": "embeddings", "bias": "reverse_embeddings"}.get(leaf, leaf)
        parts[-2:] = [leaf]
    if leaf == "reverse_embeddings":
        return (*parts[:-2], "lm_head", "weight"), True
    return (*parts[:-1], _LEAVES.get(leaf, leaf)), leaf == "kernel"


def _axes(shape: tuple[int, ...], wanted: tuple[int, ...], kernel: bool) -> tuple[int, ...] | None:
    """In which order stored axes make up the wanted ones; None if they cannot, or not surely."""
    same = tuple(range(len(shape)))
    if len(wanted) == 1:  # a bias may have an axis per head
        return same if _product(shape) == wanted[0] else None
    if not kernel:
        return same if shape == wanted else None
    if len(shape) == 2:
        return (1, 0) if shape[::-1] == wanted else None
    if len(shape) != 3:
        return None
    a, b, c = shape
    fits = {
        (1, 2, 0): (b * c, a),  # (inputs, heads, channels)
        (0, 2, 1): (a * c, b),  # (heads, inputs, channels), as Gemma's
        (2, 0, 1): (c, a * b),  # (heads, channels, outputs)
    }
    possible = [axes for axes, found in fits.items() if found == wanted]
    # An axis of one head may stand anywhere.
    orders = {tuple(axis for axis in axes if shape[axis] > 1) for axes in possible}
    return possible[0] if len(orders) == 1 else None


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
