"""`source_digest`: which weights an analysis is of."""

from __future__ import annotations

from blake3 import blake3

from flashlite.model.source import SourceModel

__all__ = ["source_digest"]


def source_digest(source: SourceModel) -> str:
    """BLAKE3 over all tensors by name: it changes when any weight does.

    Raises:
        CheckpointError: the source cannot be read.
    """
    digest = blake3(max_threads=blake3.AUTO)
    for name, info in sorted(source.checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(source.checkpoint.raw(name).tobytes())
    return digest.hexdigest()
