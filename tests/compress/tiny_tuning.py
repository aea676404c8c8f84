"""A random model of three layers and its quantized twin, small enough to be tuned in a second."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import Packed, dequantize, pack
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.tail_cache import Model
from flashlite.compress.tuning import Material, Settings
from flashlite.compress.tuning_texts import Text, plain_text
from flashlite.model.differentiable import Differentiable, as_tensors
from flashlite.model.spec import ModelSpec

SPEC = ModelSpec(
    family="gemma3", n_layers=3, d_model=36, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=40,
    vocab_size=90, max_context=64, norm_eps=1e-6, activation="gelu_tanh", tied_head=True,
    rope_theta=1e4, qk_norm=True, post_norms=True, embed_scale=6.0, sliding_window=8,
    sliding_layers=(True, False, True),
)  # fmt: skip
QUICK = Settings(
    layers=2, steps=60, rate=5e-4, tokens=128, measure_every=10, search_every=20, save_every=10
)


@dataclass(frozen=True)
class Twin:
    """A model in FP32 and what a format makes of it."""

    source: Model
    student: Model
    matrices: dict[str, Packed]

    def packed(self, name: str) -> Packed:
        return self.matrices[name]


def twin(fmt: str, *, seed: int = 0, layers: Sequence[int] = (0, 1, 2)) -> Twin:
    """The same weights twice; matrices of `layers` are quantized, and so is the table."""
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    seen: dict[str, NDArray[np.float32]] = {}
    matrices: dict[str, Packed] = {}
    for name, shape in SPEC.shapes():
        scale = 0.25 if len(shape) == 2 else 0.1
        values = rng.normal(size=shape).astype(np.float32) * np.float32(scale)
        weights[name] = values if len(shape) == 2 else 1 + values
        seen[name] = weights[name]
        if len(shape) == 2:
            in_format = name == "embed" or int(name.split(".")[1]) in layers
            matrices[name] = pack(quantize_matrix(values, fmt if in_format else "q8"))
            seen[name] = dequantize(matrices[name], *shape)
    weights["head"], seen["head"] = weights["embed"], seen["embed"]
    return Twin(Model(SPEC, weights.__getitem__), Model(SPEC, seen.__getitem__), matrices)


@functools.cache
def some_texts(n: int, seed: int, length: int = 24) -> list[Text]:
    """What the source writes; lengths differ."""
    import torch

    forward = Differentiable(SPEC, as_tensors(twin("q8").source.weights))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SPEC.vocab_size, (n, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            chances = torch.softmax(forward.logits(ids)[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    sizes = np.random.default_rng(seed).integers(length // 2, length + 1, n)
    return [plain_text([int(i) for i in row[:size]]) for row, size in zip(ids, sizes, strict=True)]


def material() -> Material:
    return Material(some_texts(250, 1), some_texts(30, 2), others={"other": some_texts(20, 3)})
