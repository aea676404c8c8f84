"""`Statistics`: what matrices read, and what their outputs do to the model's answers.

With W' = W + D, the loss of one matrix is to second order

    KL = 1/2 E[(g . D x)^2] ~ 1/2 sum_ij E[g_i^2 x_j^2] D_ij^2 ~ 1/2 sum_ij b_i a_j D_ij^2

per token, where x are its inputs and g the gradient of log p at its outputs. Labels are drawn from
the model itself: then E[g g'] is the Fisher matrix, which is the Hessian of KL (Martens, "New
insights and perspectives on the natural gradient method", section 5). Of E[g_i^2 x_j^2] only
the sums over rows and over columns are kept, in place of two separate means: positions where
both are large, such as the first, then count as they should.

Without gradients b is 1 and a is E[x_j^2]: the scale is found afterwards, from exact losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.model.differentiable import Differentiable, as_tensors, require_torch
from flashlite.model.reference import Floats, Reference
from flashlite.model.spec import ModelSpec

__all__ = [
    "NEURONS",
    "Importance",
    "Statistics",
    "Sums",
    "gradient_sums",
    "plain_sums",
    "predicted_kl",
]

Doubles = NDArray[np.float64]
Read = Callable[[str], Floats]
Ids = NDArray[np.int32]

NEURONS = 32  # of the MLP that are judged together: a group of columns of `down`
_SCORED_EVERY = 4  # positions have a label: with a large vocabulary, labels are most of the work
_CHUNK_VALUES = 1 << 24  # logits held at once: 64 MB an array


class Sums(dict[str, Doubles]):
    """Named sums over tokens, added up sequence by sequence: the state of a pass."""

    def grow(self, name: str, values: Any) -> None:
        """Add `values` to the sum of that name."""
        found = np.asarray(values, np.float64)
        self[name] = self[name] + found if name in self else found


@dataclass(frozen=True)
class Importance:
    """The loss to expect without a unit, in nats per token.

    Attributes:
        heads: query heads, [layers, heads].
        groups: query heads that share a key and value, [layers, KV heads].
        neurons: blocks of 32 neurons, [layers, blocks].
    """

    heads: Doubles
    groups: Doubles
    neurons: Doubles

    def scaled(self, factor: float) -> Importance:
        """All of it times a factor."""
        return Importance(self.heads * factor, self.groups * factor, self.neurons * factor)


@dataclass(frozen=True)
class Statistics:
    """Means over calibration tokens.

    Attributes:
        gradients: whether gradients were taken.
        tokens: how many tokens the means are over.
        inputs: a of every matrix, [cols]; `embed` as a look-up table: how often each token occurs.
        outputs: b of every matrix, [rows], 1 without gradients; of `embed`: of its columns.
        means: mean inputs of every `o` and `down`, [cols].
        variances: their variances, [cols].
        importance: of what could be left out; None without gradients.
    """

    gradients: bool
    tokens: int
    inputs: Mapping[str, Doubles]
    outputs: Mapping[str, Doubles]
    means: Mapping[str, Doubles]
    variances: Mapping[str, Doubles]
    importance: Importance | None = None

    @classmethod
    def of(cls, spec: ModelSpec, sums: Sums) -> Statistics:
        """The means of what a pass added up."""
        n = float(sums["tokens"])
        gradients = "gates/heads/0" in sums
        inputs: dict[str, Doubles] = {"embed": sums["counts"] / n}
        outputs: dict[str, Doubles] = {}
        means, variances = {}, {}
        for name, shape in _multiplied(spec).items():
            if gradients:
                # Sums over rows and columns of E[g_i^2 x_j^2]; a b' has the same ones.
                count = float(sums["labels"]) if name == "head" else n
                columns, rows = sums[f"columns/{name}"] / count, sums[f"rows/{name}"] / count
                inputs[name] = columns / max(float(np.sqrt(columns.sum())), 1e-30)
                outputs[name] = rows / max(float(np.sqrt(rows.sum())), 1e-30)
            else:
                inputs[name] = sums[f"squares/{name}"] / n
                outputs[name] = np.ones(shape[0])
            if name.endswith((".o", ".down")):
                means[name] = sums[f"values/{name}"] / n
                squares = sums[f"squares/{name}"] / n
                variances[name] = np.maximum(squares - means[name] ** 2, 0)
        scale = np.float64(spec.embed_scale) ** 2
        reads = sums["embed"] / n if gradients else np.ones(spec.d_model)
        outputs["embed"] = reads * scale
        importance = None
        if gradients:
            layers = range(spec.n_layers)
            importance = Importance(
                *(
                    np.stack([sums[f"gates/{kind}/{i}"] / (2 * n) for i in layers])
                    for kind in ("heads", "groups", "neurons")
                )
            )
        return cls(gradients, int(n), inputs, outputs, means, variances, importance)


def predicted_kl(change: Floats, outputs: Doubles, inputs: Doubles) -> float:
    """1/2 sum_ij b_i a_j D_ij^2 in nats per token, of a change [rows, cols] of a matrix."""
    squared = change * change
    by_row = squared @ inputs.astype(np.float32)
    return 0.5 * float(outputs @ by_row.astype(np.float64))


def plain_sums(spec: ModelSpec, weights: Read, ids: Ids, sums: Sums) -> None:
    """Add one sequence, without gradients.

    Args:
        spec: the model.
        weights: the source's.
        ids: token ids from position 0.
        sums: grows.
    """

    def observe(name: str, x: Floats) -> None:
        if name.endswith((".k", ".v", ".up")):
            return  # they read what q and gate read
        for other in _SAME.get(name.rpartition(".")[2], (name.rpartition(".")[2],)):
            sums.grow(f"squares/{name.rpartition('.')[0]}.{other}", _squares(x))
        if name.endswith((".o", ".down")):
            sums.grow(f"values/{name}", x.sum(axis=0, dtype=np.float64))

    hidden = Reference(spec, weights, observe).hidden(ids)
    sums.grow("squares/head", _squares(hidden))
    _count(spec, ids, sums)


def gradient_sums(spec: ModelSpec, weights: Read, ids: Ids, seed: int, sums: Sums) -> None:
    """Add one sequence, with the gradient of the log-probability of labels drawn from the model.

    Layers are run again one by one on the way back, so that memory holds one layer's graph.

    Args:
        spec: the model.
        weights: the source's.
        ids: token ids from position 0.
        seed: of the labels.
        sums: grows.

    Raises:
        MissingExtra: torch is not installed.
    """
    torch = require_torch("sensitivity by gradients")
    tensors = as_tensors(weights)
    tokens = torch.from_numpy(np.asarray(ids, np.int64))[None]
    forward = Differentiable(spec, tensors)
    with torch.no_grad():
        xs = [forward.embed(tokens)]
        for i in range(spec.n_layers):
            xs.append(forward.layer(i, xs[-1]))
    last = xs.pop().requires_grad_()
    hidden = forward.final_norm(last)
    head = tensors("embed" if spec.tied_head else "head")
    first = int(np.random.default_rng(seed).integers(min(_SCORED_EVERY, len(ids))))
    rows = np.arange(first, len(ids), _SCORED_EVERY)
    slopes = torch.zeros_like(hidden)
    slopes[0, rows] = _label_gradients(torch, spec, hidden.detach()[0, rows], head, seed, sums)
    # Fewer labels make the sum of their gradients smaller, not what it stands for.
    hidden.backward(slopes * (len(ids) / len(rows)) ** 0.5)
    upstream = last.grad
    for i in reversed(range(spec.n_layers)):
        seen: dict[str, tuple[Any, Any]] = {}

        def observe(name: str, x: Any, y: Any, seen: dict[str, tuple[Any, Any]] = seen) -> None:
            x.retain_grad()
            y.retain_grad()
            seen[name] = (x, y)

        x = xs.pop().requires_grad_()
        Differentiable(spec, tensors, observe).layer(i, x).backward(upstream)
        upstream = x.grad
        for name, (read, wrote) in seen.items():
            _two_sided(name, read.detach()[0], wrote.grad[0], sums)
        _gates(spec, i, seen, sums)
    sums.grow("embed", (upstream[0] ** 2).sum(dim=0).numpy())
    sums.grow("labels", len(rows))
    _count(spec, ids, sums)


_SAME = {"q": ("q", "k", "v"), "gate": ("gate", "up")}


def _label_gradients(
    torch: Any, spec: ModelSpec, hidden: Any, head: Any, seed: int, sums: Sums
) -> Any:
    """D log p(label) / d hidden of labels drawn from the model, (positions, d_model)."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CHUNK_VALUES // spec.vocab_size)
    parts = []
    for first in range(0, len(hidden), step):
        h = hidden[first : first + step]
        p = torch.softmax(h @ head.T, dim=-1)
        labels = _draw(torch, p, generator)
        parts.append(head[labels] - p @ head)
        # The head's own outputs: E[g_i^2] = p_i (1 - p_i), without drawing.
        spread = p - p * p
        squares = h * h
        sums.grow("rows/head", (spread.T @ squares.sum(dim=1)).numpy())
        sums.grow("columns/head", (squares.T @ spread.sum(dim=1)).numpy())
    return torch.cat(parts)


def _draw(torch: Any, p: Any, generator: Any) -> Any:
    """One label a row, by inverting the distribution: of a large vocabulary it is 5 times faster
    than `torch.multinomial`.
    """
    below = torch.cumsum(p, dim=-1)
    at = torch.rand(len(p), 1, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, at, right=True)[:, 0].clamp(max=p.shape[1] - 1)


def _two_sided(name: str, x: Any, g: Any, sums: Sums) -> None:
    x2, g2 = x * x, g * g
    sums.grow(f"columns/{name}", (x2.T @ g2.sum(dim=1)).numpy())
    sums.grow(f"rows/{name}", (g2.T @ x2.sum(dim=1)).numpy())
    if name.endswith((".o", ".down")):
        sums.grow(f"squares/{name}", x2.double().sum(dim=0).numpy())
        sums.grow(f"values/{name}", x.double().sum(dim=0).numpy())


def _gates(spec: ModelSpec, i: int, seen: Mapping[str, tuple[Any, Any]], sums: Sums) -> None:
    """(d log p / d xi)^2 of gates xi = 1 on heads and neurons, the same at all positions.

    Michel, Levy and Neubig, "Are sixteen heads really better than one?", section 4.1, with the
    square, so that half of it is the loss to second order when the gate closes.
    """
    for kind, tensor in (("heads", f"layers.{i}.o"), ("neurons", f"layers.{i}.down")):
        x = seen[tensor][0]
        effect = (x.detach() * x.grad)[0].double().sum(dim=0).numpy()  # by column
        if kind == "heads":
            gates = effect.reshape(spec.n_heads, spec.head_dim).sum(axis=1)
            groups = gates.reshape(spec.n_kv_heads, -1).sum(axis=1)
            sums.grow(f"gates/groups/{i}", groups**2)
        else:
            gates = np.add.reduceat(effect, np.arange(0, len(effect), NEURONS))
        sums.grow(f"gates/{kind}/{i}", gates**2)


def _count(spec: ModelSpec, ids: Ids, sums: Sums) -> None:
    sums.grow("tokens", len(ids))
    sums.grow("counts", np.bincount(ids, minlength=spec.vocab_size))


def _multiplied(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every matrix that is multiplied, the head under its own name also where it is tied."""
    found: dict[str, tuple[int, ...]]
    found = {n: s for n, s in spec.shapes() if len(s) == 2 and n != "embed"}
    found["head"] = (spec.vocab_size, spec.d_model)
    return found


def _squares(x: Floats) -> Doubles:
    found: Doubles = np.einsum("ij,ij->j", x, x, dtype=np.float64)
    return found
