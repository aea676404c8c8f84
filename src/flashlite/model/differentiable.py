"""`Differentiable`: the forward of `Reference` in torch, so that gradients can flow through it.

    forward = Differentiable(source.spec, as_tensors(source.tensor))
    x = forward.embed(ids)                              # ids: int64 (batch, positions)
    for i in range(source.spec.n_layers):
        x = forward.layer(i, x)                         # (batch, positions, d_model)
    logits = forward.head(forward.final_norm(x))        # (batch, positions, vocab)

Sequences of a batch have equal length and begin at position 0; there is no cache and no padding.
The steps have the names and the results of `model/reference.py`; which tensors ask for gradients
is the caller's matter. Torch is imported when the first object is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import ContextOverflow, MissingExtra, UsageError
from flashlite.model.reference import streamed_past
from flashlite.model.rope import rope_tables
from flashlite.model.spec import ModelSpec

__all__ = ["Differentiable", "Tensor", "TensorObserver", "as_tensors", "require_torch"]

Tensor = Any  # torch.Tensor: torch may be absent
TensorObserver = Callable[[str, Tensor, Tensor], None]
"""Called with (matrix, its inputs, its outputs): (batch, positions, inputs / outputs)."""


def require_torch(feature: str) -> Any:
    """The module torch.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtra(feature, "train") from None
    return torch


def as_tensors(
    weights: Mapping[str, NDArray[np.float32]] | Callable[[str], NDArray[np.float32]],
) -> Callable[[str], Tensor]:
    """Weights of NumPy as torch tensors that share their memory; read-only arrays are copied.

    Raises:
        MissingExtra: torch is not installed.
    """
    torch = require_torch("a differentiable model")
    read = weights if callable(weights) else weights.__getitem__

    def tensor(name: str) -> Tensor:
        values = read(name)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    return tensor


class Differentiable:
    """A decoder described by a `ModelSpec`, computed by torch in the type of its weights."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor] | Callable[[str], Tensor],
        observe: TensorObserver | None = None,
    ) -> None:
        """Keep the spec and the weights; nothing is read yet.

        Args:
            spec: the model.
            weights: canonical name -> tensor in its canonical shape: a mapping, or a function that
                is called once per tensor and step, so that no two layers need to be in memory.
            observe: called for every matrix of a layer with what goes in and what comes out; it
                may register hooks on both.

        Raises:
            MissingExtra: torch is not installed.
        """
        self.spec = spec
        self._torch = require_torch("a differentiable model")
        self._observe = observe
        self._weight = weights if callable(weights) else weights.__getitem__

    def logits(self, ids: Tensor) -> Tensor:
        """Scores of the next token, (batch, positions, vocab).

        Raises:
            UsageError: `ids` is not a batch of ids of the vocabulary.
            ContextOverflow: more ids than the model has positions.
        """
        return self.head(self.hidden(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads, (batch, positions, d_model).

        Raises:
            UsageError, ContextOverflow: as `logits`.
        """
        x = self.embed(ids)
        for i in range(self.spec.n_layers):
            x = self.layer(i, x)
        return self.final_norm(x)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer reads, (batch, positions, d_model).

        Raises:
            UsageError, ContextOverflow: as `logits`.
        """
        self._check(ids)
        return self._torch.nn.functional.embedding(ids, self._weight("embed")) * float(
            np.float32(self.spec.embed_scale)
        )

    def layer(self, i: int, x: Tensor) -> Tensor:
        """The residual after layer `i`, given the one before it."""
        x = x + self.attention(i, x)
        return x + self.mlp(i, x)

    def attention(self, i: int, x: Tensor) -> Tensor:
        """What the attention of layer `i` adds to the residual `x`."""
        spec, layer = self.spec, f"layers.{i}."
        functional = self._torch.nn.functional
        positions = x.shape[1]
        cos, sin = (
            self._torch.from_numpy(table).to(device=x.device, dtype=x.dtype)
            for table in rope_tables(spec, np.arange(positions), spec.slides(i))
        )
        x = self._norm(layer + "attn_norm", x)
        q, k, v = (self._project(layer + name, x) for name in "qkv")
        if spec.qk_norm:
            q, k = self._norm(layer + "q_norm", q), self._norm(layer + "k_norm", k)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        counts = spec.heads_of(i)
        if any(count > 1 for count in counts):
            shared = self._torch.repeat_interleave(self._torch.tensor(counts, device=x.device))
            k, v = k[:, shared], v[:, shared]
        hidden = self._hidden(i, positions, x.device)
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            scale=spec.softmax_scale,
        )
        y = self._linear(layer + "o", y.transpose(1, 2).flatten(2))
        if spec.lost_heads(i):
            y = y + self._weight(layer + "o_bias")
        return self._norm(layer + "post_attn_norm", y) if spec.post_norms else y

    def mlp(self, i: int, x: Tensor) -> Tensor:
        """What the MLP of layer `i` adds to the residual `x`."""
        spec, layer = self.spec, f"layers.{i}."
        functional = self._torch.nn.functional
        x = self._norm(layer + "ffn_norm", x)
        gate, up = (self._linear(layer + name, x) for name in ("gate", "up"))
        if spec.activation == "silu":
            inner = functional.silu(gate)
        else:
            inner = functional.gelu(gate, approximate="tanh")
        y = self._linear(layer + "down", inner * up)
        return self._norm(layer + "post_ffn_norm", y) if spec.post_norms else y

    def final_norm(self, x: Tensor) -> Tensor:
        """What the head reads, given the residual after the last layer."""
        return self._norm("final_norm", x)

    def head(self, hidden: Tensor) -> Tensor:
        """Scores of every token, given what `hidden` or `final_norm` returns."""
        weight = self._weight("embed" if self.spec.tied_head else "head")
        return self._torch.nn.functional.linear(hidden, weight)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """q, k or v by head: (batch, heads, positions, head_dim)."""
        y = self._linear(name, x)
        if self.spec.qkv_bias:
            y = y + self._weight(name + "_bias")
        return y.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def _hidden(self, i: int, positions: int, device: Any) -> Tensor | None:
        """What the queries of a layer do not see, (heads or 1, queries, keys), where that is more
        than what comes after them.
        """
        spec, streams = self.spec, self.spec.streams_of(i)
        window = spec.sliding_window if spec.slides(i) else None
        narrow = window is not None and window < positions
        if not narrow and not any(streams):
            return None
        at = self._torch.arange(positions, device=device)
        age = at[:, None] - at
        hidden = (age < 0)[None]
        if narrow:
            hidden = hidden | (age >= window)
        if any(streams):
            past = self._torch.from_numpy(streamed_past(0, positions)).to(device)
            heads = np.repeat(streams, spec.heads_of(i))
            hidden = hidden | (self._torch.from_numpy(heads).to(device)[:, None, None] & past)
        return hidden

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = self._torch.nn.functional.linear(x, self._weight(name))
        if self._observe is not None:
            self._observe(name, x, y)
        return y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last axis."""
        mean = (x * x).mean(dim=-1, keepdim=True)
        return x / self._torch.sqrt(mean + self.spec.norm_eps) * self._weight(name)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return self._torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _check(self, ids: Tensor) -> None:
        whole = (self._torch.int32, self._torch.int64)
        if ids.ndim != 2 or not ids.numel() or ids.dtype not in whole:
            raise UsageError(
                f"ids of shape {tuple(ids.shape)} and type {ids.dtype}: needs rows of ids"
            )
        if ids.shape[1] > self.spec.max_context:
            raise ContextOverflow(ids.shape[1], self.spec.max_context)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            found = low if low < 0 else high
            raise UsageError(f"token id {found}, allowed 0 to {self.spec.vocab_size - 1}")
