"""Which heads, neurons and layers matter, and where heads look.

Importance is the loss to expect when a unit's output is left out, in nats per token. With gradients
it is that of a gate that closes (statistics.py). Without, a unit is first scored by how much its
output varies, squared and against the residual it is added to; the lowest 30 % are then left out
one by one, their mean in their place, and the ratio of exact loss to score brings the others to
nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.divergence import Exact
from flashlite.analyze.statistics import NEURONS, Importance, Statistics
from flashlite.model.reference import Floats, Reference
from flashlite.model.rope import rope_tables, rotate
from flashlite.model.spec import ModelSpec

__all__ = [
    "SINK",
    "WINDOW",
    "ablated_kl",
    "attention_mass",
    "head_columns",
    "lowest",
    "prescores",
    "redundancies",
]

Doubles = NDArray[np.float64]
Read = Callable[[str], Floats]

SINK = 4  # tokens that a streaming head always sees
WINDOW = 256  # and the last ones, the query's own included
_MASS_ROWS = 256  # query positions scored at once


def head_columns(spec: ModelSpec, heads: Sequence[int]) -> NDArray[np.int64]:
    """The columns of `o` that read these query heads."""
    return np.concatenate(
        [np.arange(h * spec.head_dim, (h + 1) * spec.head_dim) for h in heads]
    ).astype(np.int64)


def ablated_kl(
    exact: Exact, name: str, columns: NDArray[np.int64], means: Mapping[str, Doubles]
) -> float:
    """The exact loss when some inputs of a matrix are their mean over the calibration.

    Args:
        exact: runs the model from that layer.
        name: `layers.I.o` or `layers.I.down`.
        columns: which inputs.
        means: mean inputs by matrix.
    """
    values = means[name][columns].astype(np.float32)

    def observe(seen: str, x: Floats) -> None:
        if seen == name:
            x[:, columns] = values

    return exact.from_layer(int(name.split(".")[1]), {}, observe)


def lowest(scores: Doubles, share: float) -> list[tuple[int, int]]:
    """Places (layer, unit) of the lowest `share` of all scores, lowest first."""
    order = np.argsort(scores, axis=None, kind="stable")[: round(share * scores.size)]
    return [(int(at) // scores.shape[1], int(at) % scores.shape[1]) for at in order]


def prescores(spec: ModelSpec, weights: Read, statistics: Statistics, exact: Exact) -> Importance:
    """How much heads, KV groups and blocks of neurons vary against the residual: no nats yet."""
    heads: list[Doubles] = []
    groups: list[Doubles] = []
    neurons: list[Doubles] = []
    for i in range(spec.n_layers):
        residual = sum(float(np.square(x, dtype=np.float64).sum()) for x in exact.inputs[i])
        residual /= sum(len(x) for x in exact.inputs[i])
        for kind, found in (("o", heads), ("down", neurons)):
            name = f"layers.{i}.{kind}"
            norms = np.einsum("ij,ij->j", weights(name), weights(name), dtype=np.float64)
            moved = statistics.variances[name] * norms / max(residual, 1e-30)
            if kind == "o":
                found.append(moved.reshape(spec.n_heads, -1).sum(axis=1))
                groups.append(found[-1].reshape(spec.n_kv_heads, -1).sum(axis=1))
            else:
                found.append(np.add.reduceat(moved, np.arange(0, len(moved), NEURONS)))
    return Importance(np.stack(heads), np.stack(groups), np.stack(neurons))


def attention_mass(spec: ModelSpec, weights: Read, ids: NDArray[np.int32]) -> Doubles | None:
    """Share of attention that each query head puts on the first 4 and the last 256 tokens.

    Only positions that see others are counted, all of them alike. Layers that slide within the
    window see no others: theirs is 1.

    Args:
        spec: the model.
        weights: the source's.
        ids: one text, the longer the better.

    Returns:
        [layers, heads]; None where the text is not longer than sink and window.
    """
    if len(ids) <= SINK + WINDOW + 1:
        return None
    mass = np.ones((spec.n_layers, spec.n_heads))
    at = 0

    def observe(name: str, x: Floats) -> None:
        if name == f"layers.{at}.q" and not _is_narrow(spec, at):
            mass[at] = _layer_mass(spec, weights, at, x)

    reference = Reference(spec, weights, observe)
    x = reference.embed(ids)
    for at in range(spec.n_layers):
        x = reference.layer(at, x)
    return mass


def redundancies(exact: Exact) -> list[float]:
    """1 - mean cosine of the residual before and after each layer."""
    found = []
    for before, after in zip(exact.inputs[:-1], exact.inputs[1:], strict=True):
        cosines = [
            (x * y).sum(axis=1)
            / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
            for x, y in zip(before, after, strict=True)
        ]
        found.append(max(0.0, 1 - float(np.concatenate(cosines).mean(dtype=np.float64))))
    return found


def _is_narrow(spec: ModelSpec, layer: int) -> bool:
    window = spec.sliding_window
    return spec.slides(layer) and window is not None and window <= WINDOW


def _layer_mass(spec: ModelSpec, weights: Read, i: int, x: Floats) -> Doubles:
    """Of one layer, from what q and k read."""
    cos, sin = rope_tables(spec, np.arange(len(x)), spec.slides(i))
    q, k = (_rotated(spec, weights, i, kind, x, cos, sin) for kind in "qk")
    group = spec.n_heads // spec.n_kv_heads
    window = spec.sliding_window if spec.slides(i) else None
    total, n = np.zeros(spec.n_heads), 0
    for first in range(SINK + WINDOW, len(x), _MASS_ROWS):
        rows = np.arange(first, min(first + _MASS_ROWS, len(x)))
        age = rows[:, None] - np.arange(rows[-1] + 1)
        hidden = (age < 0) if window is None else (age < 0) | (age >= window)
        near = (age < WINDOW) | (np.arange(rows[-1] + 1) < SINK)
        for head in range(spec.n_heads):
            scores = q[head, rows] @ k[head // group, : rows[-1] + 1].T
            scores *= np.float32(spec.softmax_scale)
            scores[hidden] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            total[head] += float(((p * near).sum(axis=1) / p.sum(axis=1)).sum(dtype=np.float64))
        n += len(rows)
    return np.minimum(total / n, 1.0)


def _rotated(
    spec: ModelSpec, weights: Read, i: int, kind: str, x: Floats, cos: Floats, sin: Floats
) -> Floats:
    """Queries or keys as they are multiplied: (heads, positions, head_dim)."""
    name = f"layers.{i}.{kind}"
    y = x @ weights(name).T
    if spec.qkv_bias:
        y += weights(f"{name}_bias")
    y = y.reshape(len(x), -1, spec.head_dim).swapaxes(0, 1)
    if spec.qk_norm:
        mean = np.mean(y * y, axis=-1, keepdims=True)
        y = y / np.sqrt(mean + np.float32(spec.norm_eps)) * weights(f"{name}_norm")
    return rotate(y, cos, sin)
