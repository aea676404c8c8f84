"""BERT as sentence-transformers uses it: all-MiniLM, E5, BGE. Safetensors folders only."""

from __future__ import annotations

from collections.abc import Mapping

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.sentence import sentence_settings
from flashlite.errors import ArtifactError, CheckpointError, UnsupportedModel
from flashlite.model.encoder import MAX_TEXT, EncoderSpec
from flashlite.model.fields import Fields
from flashlite.model.source import EncoderSource, connect_encoder

__all__ = ["BERT_INERT", "BERT_NAMES", "describe_encoder"]

_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
BERT_NAMES: Mapping[str, str] = {
    "embed": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
    "embed_norm": "embeddings.LayerNorm.weight",
    "embed_norm_bias": "embeddings.LayerNorm.bias",
    **{f"layers.{{i}}.{k}": f"encoder.layer.{{i}}.{v}.weight" for k, v in _LAYER.items()},
    **{f"layers.{{i}}.{k}_bias": f"encoder.layer.{{i}}.{v}.bias" for k, v in _LAYER.items()},
}
_PREFIX = "bert."  # of the encoder inside a model with heads
# The tensors of heads that vectors do not pass through, and a buffer of numbers 0, 1, 2 ...
BERT_INERT = ("pooler.", "cls.", "embeddings.position_ids")


def describe_encoder(checkpoint: Checkpoint) -> EncoderSource:
    """Describe a BERT checkpoint and find every tensor of it.

    Raises:
        UnsupportedModel: another architecture, or arithmetic that flashlite does not have.
        CheckpointError: metadata or tensors that are missing, of the wrong type, shape or range.
    """
    if checkpoint.architecture != "bert" or checkpoint.format != "safetensors":
        raise UnsupportedModel(
            "is not an encoder flashlite runs",
            path=checkpoint.path,
            value=f"{checkpoint.architecture} ({checkpoint.format})",
            limit="bert in a safetensors folder",
        )
    prefix = _PREFIX if _PREFIX + BERT_NAMES["embed"] in checkpoint.tensors else ""
    names = {canonical: prefix + name for canonical, name in BERT_NAMES.items()}
    spec = _read_spec(Fields(checkpoint.path, checkpoint.metadata), checkpoint, names)
    try:
        spec.check()
    except ArtifactError as error:
        raise CheckpointError(str(error), path=checkpoint.path) from None
    known = frozenset(
        name for name in checkpoint.tensors if name.removeprefix(prefix).startswith(BERT_INERT)
    )
    return connect_encoder(checkpoint, spec, names, known=known)


def _read_spec(fields: Fields, checkpoint: Checkpoint, names: Mapping[str, str]) -> EncoderSpec:
    fields.choice("hidden_act", {"gelu": None}, "gelu")
    fields.choice("position_embedding_type", {"absolute": None}, "absolute")
    if fields.flag("is_decoder", False):
        raise UnsupportedModel("is a decoder with BERT's tensors", path=checkpoint.path)
    settings = sentence_settings(checkpoint)
    d_model = fields.integer("hidden_size", 4, 65536)
    n_heads = fields.integer("num_attention_heads", 1, 1024)
    if d_model % n_heads:
        raise CheckpointError(
            f"{d_model} channels do not divide by {n_heads} heads", path=checkpoint.path
        )
    rows = {}
    for canonical in ("embed", "positions", "types"):
        shape = checkpoint.info(names[canonical]).shape
        if len(shape) != 2:
            raise CheckpointError(
                f"tensor {names[canonical]} is not a matrix",
                path=checkpoint.path,
                value=shape,
                limit="2 axes",
            )
        rows[canonical] = shape[0]
    return EncoderSpec(
        family="bert",
        n_layers=fields.integer("num_hidden_layers", 1, 512),
        d_model=d_model,
        n_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=fields.integer("intermediate_size", 4, 262144),
        vocab_size=rows["embed"],
        n_positions=rows["positions"],
        n_types=rows["types"],
        max_context=min(settings.max_length or rows["positions"], rows["positions"], MAX_TEXT),
        norm_eps=fields.number("layer_norm_eps", 1e-15, 1e-1, 1e-12),
        pooling=settings.pooling,
    )
