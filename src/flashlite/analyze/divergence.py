"""`Exact`: the true loss of a changed model, in nats per token, by running only what changed.

    inputs of every layer, kept once      [layers + 1] x [positions, d_model]
    a change in layer i                   layers i .. last are run again, then the head

With p the source's probabilities and d = z' - z the change of its logits,

    KL(p || p') = log sum_k p_k exp(d_k - m),    m = sum_k p_k d_k

and where the head is unchanged d is one product, W (h' - h). Small losses keep their digits: no two
large logarithms are subtracted from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.weights import replaced
from flashlite.errors import EvaluateError
from flashlite.model.reference import Floats, Observer, Reference
from flashlite.model.spec import ModelSpec

__all__ = ["Exact"]

Read = Callable[[str], Floats]
Ids = NDArray[np.int32]

_CHUNK_VALUES = 1 << 24  # logits held at once: 64 MB an array


class Exact:
    """KL divergence of changed models from the source, on fixed positions of fixed sequences."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Read,
        sequences: Sequence[Ids],
        *,
        positions: int = 512,
        room: int = 1 << 29,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run the source once and keep what every layer reads.

        Args:
            spec: the model.
            weights: the source's.
            sequences: token ids, each from position 0.
            positions: scored at most, spread evenly; the first of a sequence is not scored.
            room: bytes of probabilities that may be kept; beyond, they are made again each time.
            progress: called with (layers run, layers).

        Raises:
            EvaluateError: no sequence has two tokens.
        """
        self._sequences = [ids for ids in sequences if len(ids) > 1]
        total = sum(len(ids) for ids in self._sequences)
        if not total:
            raise EvaluateError("the calibration holds back no sequence of two tokens")
        self.spec = spec
        self._weights = weights
        self._head = "embed" if spec.tied_head else "head"
        self._step = max(1, _CHUNK_VALUES // spec.vocab_size)
        stride = max(1, total // max(1, positions))
        self._rows = [np.arange(max(1, stride - 1), len(ids), stride) for ids in self._sequences]
        reference = Reference(spec, weights)
        xs = [reference.embed(ids) for ids in self._sequences]
        self.inputs = [xs]  # of each layer, and what the last one leaves: (positions, d_model)
        for i in range(spec.n_layers):
            xs = [reference.layer(i, x) for x in xs]
            self.inputs.append(xs)
            if progress is not None:
                progress(i + 1, spec.n_layers)
        self._states = self._scored(reference, xs)
        self._kept: list[Floats] | None = None
        if 4 * len(self._states) * spec.vocab_size <= room:
            self._kept = [self._likely(rows) for rows in self._chunks()]

    @property
    def positions(self) -> int:
        """How many are scored."""
        return len(self._states)

    def from_layer(
        self, layer: int, changed: dict[str, Floats], observe: Observer | None = None
    ) -> float:
        """The mean loss when tensors of this layer, or of later ones, are `changed`.

        Args:
            layer: the first that differs; `n_layers` runs the final norm and the head alone.
            changed: canonical name -> other weights.
            observe: as of `Reference`; it may change the inputs that it is shown, in place.
        """
        reference = Reference(self.spec, replaced(self._weights, changed), observe)
        return self._loss(reference, self._run(reference, self.inputs[layer], layer), changed)

    def from_ids(self, changed: dict[str, Floats], *, head: Floats | None = None) -> float:
        """The mean loss of a model with `changed` tensors, look-up table and head included.

        Args:
            changed: canonical name -> other weights; a tied `embed` changes both its uses.
            head: what a tied head multiplies instead of `embed`.
        """
        reference = Reference(self.spec, replaced(self._weights, changed))
        xs = [reference.embed(ids) for ids in self._sequences]
        heads = {**changed} if head is None else {**changed, self._head: head}
        return self._loss(reference, self._run(reference, xs, 0), heads)

    def all_changed(self, change: Callable[[str, Floats], Floats]) -> float:
        """The mean loss when every matrix is what `change` (of its name and weights) returns.

        Matrices are changed layer by layer: memory holds those of one.
        """
        matrices = [name for name, shape in self.spec.shapes() if len(shape) == 2]
        outer = {n: change(n, self._weights(n)) for n in matrices if not n.startswith("layers.")}
        reference = Reference(self.spec, replaced(self._weights, outer))
        xs = [reference.embed(ids) for ids in self._sequences]
        for i in range(self.spec.n_layers):
            names = [name for name in matrices if name.startswith(f"layers.{i}.")]
            inner = {name: change(name, self._weights(name)) for name in names}
            layer = Reference(self.spec, replaced(self._weights, inner))
            xs = [layer.layer(i, x) for x in xs]
        return self._loss(reference, xs, outer)

    def head_only(self, head: Floats) -> float:
        """The mean loss when only the head's matrix is another."""
        return self._divergence(self._states, head)

    def _run(self, reference: Reference, xs: list[Floats], first: int) -> list[Floats]:
        for i in range(first, self.spec.n_layers):
            xs = [reference.layer(i, x) for x in xs]
        return xs

    def _loss(self, reference: Reference, xs: list[Floats], changed: dict[str, Floats]) -> float:
        return self._divergence(self._scored(reference, xs), changed.get(self._head))

    def _scored(self, reference: Reference, xs: list[Floats]) -> Floats:
        rows = [reference.final_norm(x[at]) for x, at in zip(xs, self._rows, strict=True)]
        found: Floats = np.concatenate(rows)
        return found

    def _chunks(self) -> list[slice]:
        return [slice(at, at + self._step) for at in range(0, len(self._states), self._step)]

    def _likely(self, rows: slice) -> Floats:
        """The source's probabilities, (rows, vocab)."""
        p: Floats = self._states[rows] @ self._weights(self._head).T
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        return p

    def _divergence(self, states: Floats, head: Floats | None) -> float:
        """Mean KL in nats; `head` None: the source's own."""
        own = self._weights(self._head).T
        total = 0.0
        # Fresh memory of this size costs as much as the sums in it: it is taken once.
        room = np.empty((min(self._step, len(states)), self.spec.vocab_size), np.float32)
        for at, rows in enumerate(self._chunks()):
            p = self._likely(rows) if self._kept is None else self._kept[at]
            if head is None:
                change = np.matmul(states[rows] - self._states[rows], own, out=room[: len(p)])
            else:
                change = np.matmul(states[rows], head.T, out=room[: len(p)])
                change -= self._states[rows] @ own
            total += float(_divergences(p, change).sum())
        return total / len(self._states)


def _divergences(p: Floats, change: Floats) -> NDArray[np.float64]:
    """KL of every row from its probabilities and the change of its logits, which is used up."""
    mean = np.einsum("ij,ij->i", p, change)[:, None]
    change -= mean
    top = np.maximum(change.max(axis=1, keepdims=True) - np.float32(60), 0)  # exp stays finite
    change -= top
    np.exp(change, out=change)
    if not top.any():
        change -= 1  # p sums to 1 but for rounding, which must not count
        grown = np.einsum("ij,ij->i", p, change).astype(np.float64)
        small: NDArray[np.float64] = np.maximum(np.log1p(grown), 0)
        return small
    total = np.einsum("ij,ij->i", p, change).astype(np.float64)
    large: NDArray[np.float64] = np.log(np.maximum(total, 1e-300)) + top[:, 0]
    return np.maximum(large, 0)
