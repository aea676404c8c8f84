"""`EncoderReference`: the plain NumPy forward of an encoder in FP32, the oracle of its engine.

    reference = EncoderReference(source.spec, source.tensor)
    vector = reference.embed(np.array([101, 7592, 102]))     # (d_model,), of length 1

One text at a time, no padding, no quantization. The flow of one layer, norms behind the sums
(Devlin et al., "BERT", 2019, after Vaswani et al., "Attention is all you need", 2017):

    x = norm(x + o(attention(q x, k x, v x)))
    x = norm(x + down(gelu(up x)))
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import ContextOverflow, UsageError
from flashlite.model.encoder import EncoderSpec
from flashlite.model.reference import Floats, Observer, Weights

__all__ = ["EncoderReference"]

_ERF = np.frompyfunc(math.erf, 1, 1)


class EncoderReference:
    """A text encoder described by an `EncoderSpec`, computed with NumPy in float32."""

    def __init__(
        self, spec: EncoderSpec, weights: Weights, observe: Observer | None = None
    ) -> None:
        """Keep the spec and the weights; nothing is read yet. Arguments as `Reference`."""
        self.spec = spec
        self._observe = observe
        self._weight = weights if callable(weights) else weights.__getitem__

    def embed(self, ids: NDArray[np.integer]) -> Floats:
        """The vector of a text, (d_model,), of length 1.

        Args:
            ids: the whole text, with what the tokenizer puts around it.

        Raises:
            UsageError: `ids` is empty, not one-dimensional, or holds an id outside the vocabulary.
            ContextOverflow: more ids than a text may have.
        """
        x = self.states(ids)
        pooled = x.mean(axis=0) if self.spec.pooling == "mean" else x[0]
        y: Floats = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
        return y

    def states(self, ids: NDArray[np.integer]) -> Floats:
        """What is pooled: the last layer's output, (ids, d_model).

        Raises:
            UsageError, ContextOverflow: as `embed`.
        """
        self._check(ids)
        x = self._weight("embed")[ids] + self._weight("types")[0]
        x = self._norm("embed_norm", x + self._weight("positions")[: len(ids)])
        for i in range(self.spec.n_layers):
            x = self.layer(i, x)
        return x

    def layer(self, i: int, x: Floats) -> Floats:
        """The output of layer `i`, given the one before it: both (positions, d_model)."""
        name = f"layers.{i}."
        q, k, v = (self._heads(name + part, x) for part in "qkv")
        scores = (q @ k.swapaxes(1, 2)) * np.float32(self.spec.softmax_scale)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads = (weights @ v) / weights.sum(axis=-1, keepdims=True)
        mixed = heads.swapaxes(0, 1).reshape(x.shape)
        x = self._norm(name + "attn_norm", x + self._linear(name + "o", mixed))
        hidden = _gelu(self._linear(name + "up", x))
        return self._norm(name + "ffn_norm", x + self._linear(name + "down", hidden))

    def _heads(self, name: str, x: Floats) -> Floats:
        """q, k or v by head: (heads, positions, head_dim)."""
        y = self._linear(name, x)
        by_head: Floats = y.reshape(len(x), -1, self.spec.head_dim).swapaxes(0, 1)
        return by_head

    def _linear(self, name: str, x: Floats) -> Floats:
        if self._observe is not None:
            self._observe(name, x)
        y: Floats = x @ self._weight(name).T + self._weight(name + "_bias")
        return y

    def _norm(self, name: str, x: Floats) -> Floats:
        """LayerNorm over the last axis."""
        x = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(x * x, axis=-1, keepdims=True)
        y: Floats = x / np.sqrt(variance + np.float32(self.spec.norm_eps)) * self._weight(name)
        return y + self._weight(name + "_bias")

    def _check(self, ids: NDArray[np.integer]) -> None:
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise UsageError(f"ids of shape {ids.shape} and type {ids.dtype}: needs a row of ids")
        if len(ids) > self.spec.max_context:
            raise ContextOverflow(len(ids), self.spec.max_context)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            found = low if low < 0 else high
            raise UsageError(f"token id {found}, allowed 0 to {self.spec.vocab_size - 1}")


def _gelu(x: Floats) -> Floats:
    """With the exact error function; NumPy has none of its own."""
    erf = _ERF(x * np.float32(0.5**0.5)).astype(np.float32)
    y: Floats = np.float32(0.5) * x * (1 + erf)
    return y
