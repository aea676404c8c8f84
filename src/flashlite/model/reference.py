"""`Reference`: the plain NumPy forward in FP32, the oracle every engine is measured against.

    reference = Reference(source.spec, source.tensor)
    logits = reference.logits(np.array([504, 3575, 282]))     # (3, vocab)

One sequence from position 0, no cache, no quantization. The flow of one layer:

    x += post(o(attention(rope(qnorm(q(norm x))), rope(knorm(k(norm x))), v(norm x))))
    x += post(down(act(gate(norm x)) * up(norm x)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import ContextOverflow, UsageError
from flashlite.model.rope import rope_tables, rotate
from flashlite.model.spec import STREAM_PAGE, STREAM_TOKENS, ModelSpec

__all__ = ["Floats", "Observer", "Reference", "Weights", "streamed_past"]

Floats = NDArray[np.float32]
Weights = Mapping[str, Floats] | Callable[[str], Floats]
Observer = Callable[[str, Floats], None]  # (name of a matrix, what it multiplies: (ids, inputs))

_QUERY_ROWS = 128  # query positions scored at once: their scores stay in the level-2 cache
_LATER = np.triu(np.ones((_QUERY_ROWS, _QUERY_ROWS), bool), 1)  # keys after their query


class Reference:
    """A transformer described by a `ModelSpec`, computed with NumPy in float32."""

    def __init__(self, spec: ModelSpec, weights: Weights, observe: Observer | None = None) -> None:
        """Keep the spec and the weights; nothing is read yet.

        Args:
            spec: the model.
            weights: canonical name -> float32 array in its canonical shape: a mapping, or a
                function such as `SourceModel.tensor`, which is called once per tensor and pass
                so that no two layers need to be in memory at once.
            observe: called with the inputs of every matrix of a layer, before it multiplies them.
        """
        self.spec = spec
        self._observe = observe
        self._weight = weights if callable(weights) else weights.__getitem__

    def logits(self, ids: NDArray[np.integer], rows: slice = slice(None)) -> Floats:
        """Scores of the next token, (rows of ids, vocab); `rows` limits the cost of the head.

        Raises:
            UsageError: `ids` is empty, not one-dimensional, or holds an id outside the vocabulary.
            ContextOverflow: more ids than the model has positions.
        """
        return self.head(self.hidden(ids)[rows])

    def hidden(self, ids: NDArray[np.integer]) -> Floats:
        """What the head reads: the residual after the final norm, (ids, d_model).

        Raises:
            UsageError, ContextOverflow: as `logits`.
        """
        x = self.embed(ids)
        for i in range(self.spec.n_layers):
            x = self.layer(i, x)
        return self.final_norm(x)

    def embed(self, ids: NDArray[np.integer]) -> Floats:
        """What the first layer reads, (ids, d_model).

        Raises:
            UsageError, ContextOverflow: as `logits`.
        """
        self._check(ids)
        x: Floats = self._weight("embed")[ids] * np.float32(self.spec.embed_scale)
        return x

    def layer(self, i: int, x: Floats) -> Floats:
        """The residual after layer `i`, given the one before it: both (positions, d_model)."""
        x = x + self._attention(i, x)
        return x + self._mlp(i, x)

    def final_norm(self, x: Floats) -> Floats:
        """What the head reads, given the residual after the last layer."""
        return self._norm("final_norm", x)

    def head(self, hidden: Floats) -> Floats:
        """Scores of every token, (rows, vocab), given what `hidden` or `final_norm` returns."""
        logits: Floats = hidden @ self._weight("embed" if self.spec.tied_head else "head").T
        return logits

    def _attention(self, i: int, x: Floats) -> Floats:
        spec, layer = self.spec, f"layers.{i}."
        cos, sin = rope_tables(spec, np.arange(len(x)), spec.slides(i))
        x = self._norm(layer + "attn_norm", x)
        q, k, v = (self._project(layer + name, x) for name in "qkv")
        if spec.qk_norm:
            q, k = self._norm(layer + "q_norm", q), self._norm(layer + "k_norm", k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        counts = spec.heads_of(i)
        shared = np.repeat(np.arange(len(counts)), counts)  # KV head of each query head
        heads = [self.attend(i, h, q[h], k[kv], v[kv]) for h, kv in enumerate(shared)]
        y = self._linear(layer + "o", np.concatenate(heads, axis=-1))
        if spec.lost_heads(i):
            y += self._weight(layer + "o_bias")
        return self._norm(layer + "post_attn_norm", y) if spec.post_norms else y

    def attend(self, i: int, head: int, q: Floats, k: Floats, v: Floats) -> Floats:
        """Attention of one query head of layer `i`, all (positions, head_dim)."""
        spec = self.spec
        window = spec.sliding_window if spec.slides(i) else None
        kv = int(np.searchsorted(np.cumsum(spec.heads_of(i)), head, side="right"))
        return _attend(q, k, v, spec.softmax_scale, window, spec.streams_of(i)[kv])

    def _project(self, name: str, x: Floats) -> Floats:
        """q, k or v by head: (heads, positions, head_dim)."""
        y = self._linear(name, x)
        if self.spec.qkv_bias:
            y += self._weight(name + "_bias")
        by_head: Floats = y.reshape(len(x), -1, self.spec.head_dim).swapaxes(0, 1)
        return by_head

    def _mlp(self, i: int, x: Floats) -> Floats:
        spec, layer = self.spec, f"layers.{i}."
        x = self._norm(layer + "ffn_norm", x)
        gate, up = (self._linear(layer + name, x) for name in ("gate", "up"))
        y = self._linear(layer + "down", self.act(i, gate) * up)
        return self._norm(layer + "post_ffn_norm", y) if spec.post_norms else y

    def _linear(self, name: str, x: Floats) -> Floats:
        """(n, inputs) by the matrix (outputs, inputs): (n, outputs)."""
        if self._observe is not None:
            self._observe(name, x)
        y: Floats = x @ self._weight(name).T
        return y

    def act(self, i: int, gate: Floats) -> Floats:
        """The activation of layer `i`, elementwise over (ids, d_ff)."""
        return _silu(gate) if self.spec.activation == "silu" else _gelu_tanh(gate)

    def _norm(self, name: str, x: Floats) -> Floats:
        """RMSNorm over the last axis."""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        y: Floats = x / np.sqrt(mean + np.float32(self.spec.norm_eps)) * self._weight(name)
        return y

    def _check(self, ids: NDArray[np.integer]) -> None:
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise UsageError(f"ids of shape {ids.shape} and type {ids.dtype}: needs a row of ids")
        if len(ids) > self.spec.max_context:
            raise ContextOverflow(len(ids), self.spec.max_context)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            found = low if low < 0 else high
            raise UsageError(f"token id {found}, allowed 0 to {self.spec.vocab_size - 1}")


def _attend(
    q: Floats, k: Floats, v: Floats, scale: float, window: int | None, streams: bool
) -> Floats:
    """Causal attention of one head, all (positions, head_dim); `window` counts the query too."""
    out = np.empty_like(q)
    for start in range(0, len(q), _QUERY_ROWS):
        stop = min(start + _QUERY_ROWS, len(q))
        first = 0 if window is None else max(0, start - window + 1)
        scores = q[start:stop] @ k[first:stop].T
        scores *= np.float32(scale)
        later = _LATER[: stop - start, : stop - start]
        np.copyto(scores[:, start - first :], -np.inf, where=later)
        if window is not None and stop - first > window:
            age = np.arange(start, stop)[:, None] - np.arange(first, stop)
            np.copyto(scores, -np.inf, where=age >= window)
        if streams:
            np.copyto(scores, -np.inf, where=streamed_past(start, stop))
        # The query itself is always visible, so the maximum is finite.
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        out[start:stop] = (scores @ v[first:stop]) / scores.sum(axis=-1, keepdims=True)
    return out


def streamed_past(start: int, stop: int) -> NDArray[np.bool_]:
    """What a streaming head hides from the queries start .. stop - 1: (queries, positions)."""
    query, key = np.arange(start, stop)[:, None], np.arange(stop)
    page = np.maximum(0, query - STREAM_TOKENS + 1) // STREAM_PAGE
    hidden: NDArray[np.bool_] = (key >= STREAM_PAGE) & (key < page * STREAM_PAGE)
    return hidden


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right -0
        y: Floats = x / (1 + np.exp(-x))
    return y


def _gelu_tanh(x: Floats) -> Floats:
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    y: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return y
