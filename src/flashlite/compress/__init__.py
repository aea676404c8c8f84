"""Decide how each tensor is stored, and carry it out."""

from flashlite.compress.pack import Packed, Quantized, dequantize, pack, unpack
from flashlite.compress.plan import PRESETS, Format, Plan, plan_preset, stored_shapes
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.tensors import compress_tensor

__all__ = [
    "PRESETS",
    "Format",
    "Packed",
    "Plan",
    "Quantized",
    "compress_tensor",
    "dequantize",
    "pack",
    "plan_preset",
    "quantize_matrix",
    "stored_shapes",
    "unpack",
]
