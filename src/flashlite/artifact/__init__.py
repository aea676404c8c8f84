"""The artifact on disk: its format, and how it is written, read and verified."""

from flashlite.artifact.format import Artifact, Manifest, PackedTensor
from flashlite.artifact.read import load_texts, load_weights, open_artifact, packed, tensor
from flashlite.artifact.write import quantize, write_artifact

__all__ = [
    "Artifact",
    "Manifest",
    "PackedTensor",
    "load_texts",
    "load_weights",
    "open_artifact",
    "packed",
    "quantize",
    "tensor",
    "write_artifact",
]
