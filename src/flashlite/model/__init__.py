"""Describe a checkpoint, and run its description in plain NumPy."""

from flashlite.model.families import FAMILIES, describe
from flashlite.model.metrics import kl_divergence, log_softmax, perplexity, top1_agreement
from flashlite.model.reference import Reference
from flashlite.model.rope import rope_frequencies
from flashlite.model.source import Source, SourceModel
from flashlite.model.spec import Llama3Rope, ModelSpec

__all__ = [
    "FAMILIES",
    "Llama3Rope",
    "ModelSpec",
    "Reference",
    "Source",
    "SourceModel",
    "describe",
    "kl_divergence",
    "log_softmax",
    "perplexity",
    "rope_frequencies",
    "top1_agreement",
]
