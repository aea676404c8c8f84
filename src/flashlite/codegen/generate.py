"""`generate`: the `model.c` of an artifact, whichever kind of model it holds."""

from __future__ import annotations

from flashlite.artifact.format import Artifact
from flashlite.codegen.emit import emit_model
from flashlite.codegen.emit_encoder import emit_encoder
from flashlite.model.encoder import EncoderSpec

__all__ = ["generate"]


def generate(artifact: Artifact, isa: str) -> str:
    """`emit_model`, or `emit_encoder` where the artifact holds an encoder.

    Raises:
        UnsupportedTarget: as `emit_model`.
    """
    if isinstance(artifact.model, EncoderSpec):
        return emit_encoder(artifact, isa)
    return emit_model(artifact, isa)
