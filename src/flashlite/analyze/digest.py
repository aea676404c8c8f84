"""`source_digest`: which weights an analysis is of."""

from __future__ import annotations

from blake3 import blake3

from flashlite.model.source import SourceModel

__all__ = ["source_digest"]


def source_digest(source: SourceModel) -> str:
    """Of every tensor's name, type, shape and bytes, whatever file they lie in.

    Raises:
        CheckpointError: the source cannot be read.
    """
    digest = blake3()
    for name, info in sorted(source.checkpoint.tensors.items()):
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(source.checkpoint.raw(name).tobytes())
    return f"blake3:{digest.hexdigest()}"
