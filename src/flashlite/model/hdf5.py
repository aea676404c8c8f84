"""HDF5 files as models: ours by what they say, others by a model of the same shape.

canonical names      what `flashlite export-h5` writes
HF or GGUF names     model.layers.0.self_attn.q_proj.weight, blk.0.attn_q.weight; dots or groups
names of Keras       layers/transformer_layer_0/_self_attention_layer/_query_dense/vars/0,
                     model/layers_._0/self_attn/q_proj/kernel:0, and their kin (keras_names.py)
"""

from __future__ import annotations

from collections.abc import Mapping

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.hdf5_read import adopt
from flashlite.errors import ArtifactError, CheckpointError, UnsupportedModel
from flashlite.model.family import GGUF_NAMES, Family
from flashlite.model.keras_names import match_keras
from flashlite.model.source import SourceModel, connect, stored_name
from flashlite.model.spec import ModelSpec

__all__ = ["describe_like", "describe_own"]


def describe_own(checkpoint: Checkpoint) -> SourceModel:
    """Describe a file by its own `model_config`.

    Raises:
        UnsupportedModel: it has none.
        CheckpointError: the description or the tensors are not what they must be.
    """
    spec = checkpoint.metadata.get("spec")
    if not isinstance(spec, Mapping):
        raise UnsupportedModel(
            "holds weights and does not say of which model: give --like MODEL, a known name or a "
            "path of a model of the same shape",
            path=checkpoint.path,
        )
    try:
        described = ModelSpec.from_json(spec)
    except ArtifactError as error:
        raise CheckpointError(f"model_config: {error}", path=checkpoint.path) from None
    return connect(checkpoint, described, _canonical(described))


def describe_like(checkpoint: Checkpoint, spec: ModelSpec, family: Family) -> SourceModel:
    """Describe a file as the model that `spec` describes, whatever its tensors are called.

    Raises:
        UnsupportedModel: a tensor that this model does not have.
        CheckpointError: a tensor is missing or has another shape.
    """
    canonical = _canonical(spec)
    if "embed" in checkpoint.tensors:
        return connect(checkpoint, spec, canonical)
    if GGUF_NAMES["embed"] in checkpoint.tensors:
        known = frozenset({"rope_freqs.weight"})
        return connect(
            checkpoint, spec, GGUF_NAMES, interleaved=family.interleaved_gguf, known=known
        )
    inert = {name for name in checkpoint.tensors if name.endswith("rotary_emb.inv_freq")}
    if spec.tied_head:
        inert.add(family.hf_names["head"])
    if family.hf_names["embed"] not in checkpoint.tensors:
        wanted = {stored_name(name, family.hf_names)[0]: shape for name, shape in spec.shapes()}
        checkpoint = adopt(checkpoint, match_keras(checkpoint, wanted))
    return connect(
        checkpoint,
        spec,
        family.hf_names,
        norm_offset=family.hf_norm_offset,
        known=frozenset(inert),
    )


def _canonical(spec: ModelSpec) -> dict[str, str]:
    """Every name as itself, in the form `connect` reads."""
    names = {}
    for name, _ in spec.shapes():
        _, dot, kind = name.rpartition(".")
        pattern = "layers.{i}." + kind if dot else name
        names[pattern] = pattern
    return names
