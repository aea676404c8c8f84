"""`describe`: from a checkpoint to a `SourceModel`; the table of architectures flashlite runs."""

from __future__ import annotations

from collections.abc import Mapping

from flashlite.checkpoint.base import Checkpoint
from flashlite.errors import ArtifactError, CheckpointError, UnsupportedModel
from flashlite.model.bert import describe_encoder
from flashlite.model.family import GGUF_NAMES, Family
from flashlite.model.fields import Fields
from flashlite.model.gemma3 import GEMMA3
from flashlite.model.hdf5 import describe_encoder_like, describe_like, describe_own
from flashlite.model.llama import LLAMA
from flashlite.model.qwen2 import QWEN2
from flashlite.model.qwen3 import QWEN3
from flashlite.model.source import EncoderSource, SourceModel, connect

__all__ = ["ENCODERS", "FAMILIES", "describe", "describe_any"]

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, GEMMA3, QWEN2, QWEN3)}
ENCODERS = ("bert",)  # architectures that make vectors, not text
_ALIASES = {"gemma3_text": "gemma3"}  # config.json's `model_type`


def describe(checkpoint: Checkpoint) -> SourceModel:
    """Describe a checkpoint and find every tensor of it.

    Raises:
        UnsupportedModel: an architecture, or a tensor of it, that flashlite does not run.
        CheckpointError: metadata or tensors that are missing, of the wrong type, shape or range.
    """
    if checkpoint.like is not None:
        spec = describe(checkpoint.like).spec
        return describe_like(checkpoint, spec, FAMILIES[spec.family])
    if checkpoint.format == "hdf5" and checkpoint.architecture not in ENCODERS:
        found = describe_own(checkpoint)
        if isinstance(found, SourceModel):
            return found
    family = _family(checkpoint)
    gguf = checkpoint.format == "gguf"
    prefix = f"{checkpoint.architecture}." if gguf else ""
    fields = Fields(checkpoint.path, checkpoint.metadata, prefix)
    spec = (family.read_gguf if gguf else family.read_hf)(fields, checkpoint)
    try:
        spec.check()
    except ArtifactError as error:
        raise CheckpointError(str(error), path=checkpoint.path) from None
    if gguf:
        known = frozenset({"rope_freqs.weight"})
        return connect(
            checkpoint, spec, GGUF_NAMES, interleaved=family.interleaved_gguf, known=known
        )
    inert = {name for name in checkpoint.tensors if name.endswith("rotary_emb.inv_freq")}
    if spec.tied_head:  # some exporters write the tied head a second time
        inert.add(family.hf_names["head"])
    return connect(
        checkpoint,
        spec,
        family.hf_names,
        norm_offset=family.hf_norm_offset,
        known=frozenset(inert),
    )


def describe_any(checkpoint: Checkpoint) -> SourceModel | EncoderSource:
    """Describe a language model or a text encoder, whichever it is.

    Raises:
        UnsupportedModel, CheckpointError: as `describe`.
    """
    if checkpoint.architecture in ENCODERS:
        if checkpoint.like is not None:
            return describe_encoder_like(checkpoint, describe_encoder(checkpoint.like).spec)
        if checkpoint.format == "hdf5":
            return describe_own(checkpoint)
        return describe_encoder(checkpoint)
    return describe(checkpoint)


def _family(checkpoint: Checkpoint) -> Family:
    name = _ALIASES.get(checkpoint.architecture, checkpoint.architecture)
    if name in ENCODERS:
        raise UnsupportedModel(
            f"architecture {name} is an embedding model: it makes vectors, not text, and this "
            f"command runs {_known()}",
            path=checkpoint.path,
        )
    if name not in FAMILIES:
        raise UnsupportedModel(
            "architecture is not known", path=checkpoint.path, value=name, limit=_known()
        )
    return FAMILIES[name]


def _known() -> str:
    return ", ".join(sorted(FAMILIES))
