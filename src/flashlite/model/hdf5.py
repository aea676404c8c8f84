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
from flashlite.model.bert import BERT_INERT, BERT_NAMES
from flashlite.model.encoder import EncoderSpec, Spec, spec_from_json
from flashlite.model.family import GGUF_NAMES, Family
from flashlite.model.keras_names import match_keras
from flashlite.model.source import (
    EncoderSource,
    SourceModel,
    connect,
    connect_encoder,
    stored_name,
)
from flashlite.model.spec import ModelSpec

__all__ = ["describe_encoder_like", "describe_like", "describe_own"]


def describe_own(checkpoint: Checkpoint) -> SourceModel | EncoderSource:
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
        described = spec_from_json(spec)
    except ArtifactError as error:
        raise CheckpointError(f"model_config: {error}", path=checkpoint.path) from None
    if described.family != checkpoint.architecture:
        raise CheckpointError(
            "model_config describes another architecture than it names",
            path=checkpoint.path,
            value=described.family,
            limit=checkpoint.architecture,
        )
    if isinstance(described, EncoderSpec):
        return connect_encoder(checkpoint, described, _canonical(described))
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
        other = frozenset({"lm_head", "inv_freq"} if spec.tied_head else {"inv_freq"})
        checkpoint = _of_keras(checkpoint, spec, family.hf_names, other)
    return connect(
        checkpoint,
        spec,
        family.hf_names,
        norm_offset=family.hf_norm_offset,
        known=frozenset(inert),
    )


def describe_encoder_like(checkpoint: Checkpoint, spec: EncoderSpec) -> EncoderSource:
    """Describe a file as the encoder that `spec` describes, whatever its tensors are called.

    Raises:
        UnsupportedModel, CheckpointError: as `describe_like`.
    """
    if "embed" in checkpoint.tensors:
        return connect_encoder(checkpoint, spec, _canonical(spec))
    prefix = next((p for p in ("", "bert.") if p + BERT_NAMES["embed"] in checkpoint.tensors), None)
    if prefix is None:
        other = frozenset({"pooler", "cls", "mlm", "nsp", "position_ids"})
        found = _of_keras(checkpoint, spec, BERT_NAMES, other)
        return connect_encoder(found, spec, BERT_NAMES)
    names = {canonical: prefix + name for canonical, name in BERT_NAMES.items()}
    known = frozenset(
        name for name in checkpoint.tensors if name.removeprefix(prefix).startswith(BERT_INERT)
    )
    return connect_encoder(checkpoint, spec, names, known=known)


def _of_keras(
    checkpoint: Checkpoint, spec: Spec, names: Mapping[str, str], other: frozenset[str]
) -> Checkpoint:
    """The file with the tensors of a model of Hugging Face."""
    wanted = {stored_name(name, names)[0]: shape for name, shape in spec.shapes()}
    return adopt(checkpoint, match_keras(checkpoint, wanted, other))


def _canonical(spec: Spec) -> dict[str, str]:
    """Every name as itself, in the form `connect` reads."""
    names = {}
    for name, _ in spec.shapes():
        _, dot, kind = name.rpartition(".")
        pattern = "layers.{i}." + kind if dot else name
        names[pattern] = pattern
    return names
