"""Take attention heads out of a model, and let others see part of the text.

    statistics of what `o` reads -> error of each head's removal -> bisection by true KL -> Trimmed

A query head that goes takes its rows of q and its columns of o with it; a KV head whose query heads
all go takes its rows of k and v, and its part of every page. What the layer loses is given back in
closed form: the kept columns of o are fitted to the whole output by ridge regression, and what
remains is, on average, a bias (FLAP, An et al. 2023, removes channels so; research on heads: Michel
et al. 2019). No training.

Heads that only look at the beginning and at what is near (StreamingLLM, Xiao et al. 2023) keep
their weights and read less of the KV cache: `ModelSpec.streams`.

SmolLM2-135M, fitted on prose, measured on wikitext-2 valid (benchmarks/leave_out.py): 10 of 270
query heads go for 0.008 nats together (one of them for nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import CompressError
from flashlite.model.reference import Floats, Reference, Weights
from flashlite.model.source import SourceModel
from flashlite.model.spec import ModelSpec

if TYPE_CHECKING:
    from flashlite.checkpoint.base import TensorInfo

__all__ = [
    "Chosen",
    "Head",
    "HeadStatistics",
    "StreamWatch",
    "Trimmed",
    "choose_removed",
    "choose_streams",
    "largest_prefix",
    "rank_heads",
    "stream_heads",
    "trim_heads",
]

_RIDGE = 0.01  # of the mean of the diagonal

Head = tuple[int, int]
"""Layer and query head (or KV head, where streams are meant)."""


@dataclass(frozen=True)
class HeadStatistics:
    """What the output projection of every layer reads, over calibration text.

    `gram` [layers][q_rows, q_rows] is the mean of x xT, `mean` [layers][q_rows] that of x; float64.
    """

    gram: Sequence[NDArray[np.float64]]
    mean: Sequence[NDArray[np.float64]]

    @classmethod
    def collect(
        cls,
        source: SourceModel,
        sequences: Sequence[NDArray[np.integer]],
        progress: Callable[[int, int], None] | None = None,
    ) -> HeadStatistics:
        """Run the source in FP32 over the sequences."""
        spec = source.spec
        gram = [np.zeros((spec.q_rows, spec.q_rows)) for _ in range(spec.n_layers)]
        mean = [np.zeros(spec.q_rows) for _ in range(spec.n_layers)]

        def observe(name: str, x: Floats) -> None:
            if name.endswith(".o"):
                layer = int(name.split(".")[1])
                gram[layer] += x.T @ x
                mean[layer] += x.sum(axis=0, dtype=np.float64)

        reference = Reference(spec, source.tensor, observe)
        residuals = [reference.embed(ids) for ids in sequences]
        for i in range(spec.n_layers):  # layer by layer: every tensor is read once
            layer = Reference(spec, _kept(source, f"layers.{i}."), observe)
            residuals = [layer.layer(i, x) for x in residuals]
            if progress is not None:
                progress(i + 1, spec.n_layers)
        n = sum(len(ids) for ids in sequences)
        return cls([g / n for g in gram], [m / n for m in mean])


@dataclass(frozen=True)
class Trimmed(SourceModel):
    """A source whose layers have fewer heads; all else is read from it unchanged."""

    whole: SourceModel
    kept: Mapping[int, Sequence[int]]  # the query heads left in each layer
    replaced: Mapping[str, Floats]  # o and o_bias of the layers that lost some

    def tensor(self, canonical: str) -> NDArray[np.float32]:
        """As `SourceModel.tensor`."""
        if canonical in self.replaced:
            return self.replaced[canonical]
        values = self.whole.tensor(canonical)
        rows = self._rows(canonical)
        return values if rows is None else values[rows]

    def blocks(self, canonical: str) -> tuple[str, NDArray[np.uint8]]:
        """As `SourceModel.blocks`."""
        if canonical in self.replaced:
            values = self.replaced[canonical]
            return "F32", values.view(np.uint8).reshape(len(values), -1)
        dtype, raw = self.whole.blocks(canonical)
        rows = self._rows(canonical)
        return dtype, raw if rows is None else np.ascontiguousarray(raw[rows])

    def info(self, canonical: str) -> TensorInfo:
        """As `SourceModel.info`."""
        if canonical in self.replaced:
            values = self.replaced[canonical]
            like = self.whole.info(canonical.removesuffix("_bias"))
            return replace(like, shape=values.shape, dtype="F32", nbytes=values.nbytes)
        info, rows = self.whole.info(canonical), self._rows(canonical)
        if rows is None:
            return info
        shape = (len(rows), *info.shape[1:])
        return replace(info, shape=shape, nbytes=info.nbytes // info.shape[0] * len(rows))

    def _rows(self, canonical: str) -> NDArray[np.intp] | None:
        """The rows of q, k or v that are left, None where all are."""
        if not canonical.startswith("layers."):
            return None
        _, layer, kind = canonical.split(".")
        kind = kind.removesuffix("_bias")
        if kind not in ("q", "k", "v") or not self.spec.lost_heads(int(layer)):
            return None
        kept = self.kept[int(layer)]
        if kind != "q":
            group = self.spec.n_heads // self.spec.n_kv_heads
            kept = sorted({h // group for h in kept})
        return _columns(kept, self.spec.head_dim)


def trim_heads(
    source: SourceModel, statistics: HeadStatistics, removed: Sequence[Head]
) -> SourceModel:
    """The source without the query heads `removed`, compensated; with none, the source itself.

    Raises:
        CompressError: a head is none of the model's, or a layer would have none left.
    """
    if not removed:
        return source
    spec = source.spec
    group, lost = spec.n_heads // spec.n_kv_heads, set(removed)
    for layer, head in sorted(lost):
        if not (0 <= layer < spec.n_layers and 0 <= head < spec.n_heads):
            raise CompressError(
                f"head {head} of layer {layer} does not exist: the model has {spec.n_layers} "
                f"layers of {spec.n_heads} heads"
            )
    kept = {i: [h for h in range(spec.n_heads) if (i, h) not in lost] for i in range(spec.n_layers)}
    if empty := [i for i, heads in kept.items() if not heads]:
        raise CompressError(f"layer {empty[0]} would have no head left, at least one has to stay")
    counts = tuple(
        tuple(n for kv in range(spec.n_kv_heads) if (n := sum(h // group == kv for h in kept[i])))
        for i in range(spec.n_layers)
    )
    replaced: dict[str, Floats] = {}
    for i in sorted({layer for layer, _ in lost}):
        o = source.tensor(f"layers.{i}.o")
        columns = _columns(kept[i], spec.head_dim)
        fitted, bias = _compensate(o, statistics.gram[i], statistics.mean[i], columns)
        replaced[f"layers.{i}.o"], replaced[f"layers.{i}.o_bias"] = fitted, bias
    return Trimmed(
        replace(spec, heads=counts), source.checkpoint, source.sources, source, kept, replaced
    )


def rank_heads(source: SourceModel, statistics: HeadStatistics) -> list[tuple[float, Head]]:
    """All query heads with the relative error of their layer's output without them, rising.

    The error is what compensation leaves, E|W x - W' x'|2 / E|W x|2: a head that others can stand
    in for has a small one even where its output is large.
    """
    spec, ranked = source.spec, []
    for i in range(spec.n_layers):
        o = source.tensor(f"layers.{i}.o").astype(np.float64)
        gram, mean = statistics.gram[i], statistics.mean[i]
        whole = max(float(np.einsum("ij,jk,ik->", o, gram, o, optimize=True)), 1e-30)
        for head in range(spec.n_heads):
            kept = [h for h in range(spec.n_heads) if h != head]
            if not kept:
                continue
            columns = _columns(kept, spec.head_dim)
            fitted, bias = _compensate(o.astype(np.float32), gram, mean, columns)
            rest = o.copy()
            rest[:, columns] -= fitted
            left = float(np.einsum("ij,jk,ik->", rest, gram, rest, optimize=True))
            left -= 2 * float(bias @ (rest @ mean)) - float(bias @ bias)
            ranked.append((left / whole, (i, head)))
    return sorted(ranked)


def stream_heads(spec: ModelSpec, heads: Sequence[Head]) -> ModelSpec:
    """The model with these KV heads streaming.

    Raises:
        CompressError: a head does not exist or its layer slides anyway.
    """
    flags = [list(spec.streams_of(i)) for i in range(spec.n_layers)]
    for layer, head in heads:
        if not (0 <= layer < spec.n_layers and 0 <= head < len(flags[layer])):
            raise CompressError(f"KV head {head} of layer {layer} does not exist")
        if spec.slides(layer):
            raise CompressError(f"layer {layer} slides: its heads cannot stream")
        flags[layer][head] = True
    return replace(spec, streams=tuple(tuple(row) for row in flags) if heads else ())


@dataclass(frozen=True)
class Chosen:
    """Heads that a limit on the loss allows, the loss of all together, and every one looked at.

    `ranked`: (loss of this head alone in nats per token, or the score it was ranked by; head).
    """

    heads: Sequence[Head]
    kl: float
    ranked: Sequence[tuple[float, Head]]


def choose_removed(
    source: SourceModel,
    statistics: HeadStatistics,
    limit: float,
    measure: Callable[[SourceModel], float],
    *,
    share: float = 0.1,
) -> Chosen:
    """The query heads to remove within `limit` nats.

    The `share` of all heads whose removal leaves the smallest error is measured one by one; then
    the best of them are removed together, as many as the limit allows.

    Args:
        source: the model, in FP32.
        statistics: of its output projections.
        limit: nats per token that all removals together may cost.
        measure: KL divergence of a source from the whole one.
        share: of the heads to measure.
    """
    errors = rank_heads(source, statistics)
    looked_at = errors[: max(1, round(share * len(errors)))]
    ranked = sorted(
        (measure(trim_heads(source, statistics, [head])), head) for _, head in looked_at
    )
    heads = _stays_whole([head for kl, head in ranked if kl <= limit], source.spec)
    n, kl = largest_prefix(
        len(heads), limit, lambda n: measure(trim_heads(source, statistics, heads[:n]))
    )
    return Chosen(heads[:n], kl, ranked)


class StreamWatch(Reference):
    """The oracle that also looks at what each query head would say if it streamed.

    `changed`: by query head, |streamed - whole|2 / |whole|2 of its output, of the positions in the
    second half of each text.
    """

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__(spec, weights)
        streaming = replace(
            spec, streams=tuple((True,) * len(spec.heads_of(i)) for i in range(spec.n_layers))
        )
        self._streaming = Reference(streaming, weights)
        self._sums: dict[Head, NDArray[np.float64]] = {}

    @property
    def changed(self) -> dict[Head, float]:
        """See the class."""
        return {head: float(apart / whole) for head, (apart, whole) in self._sums.items()}

    def attend(self, i: int, head: int, q: Floats, k: Floats, v: Floats) -> Floats:
        """As `Reference.attend`."""
        whole = super().attend(i, head, q, k, v)
        if not self.spec.slides(i):
            far = slice(len(q) // 2, None)
            apart = self._streaming.attend(i, head, q, k, v)[far] - whole[far]
            sums = np.array([np.square(apart).sum(), np.square(whole[far]).sum() + 1e-30])
            self._sums[i, head] = self._sums.get((i, head), np.zeros(2)) + sums
        return whole


def choose_streams(
    spec: ModelSpec,
    changed: Mapping[Head, float],
    limit: float,
    measure: Callable[[ModelSpec], float],
) -> Chosen:
    """The KV heads that may stream within `limit` nats.

    Args:
        spec: the model.
        changed: what `StreamWatch` saw on texts of some 2,000 tokens.
        limit: nats per token.
        measure: KL divergence, on other texts of that length, of a model with other streams.
    """
    score: dict[Head, float] = {}
    for i in range(spec.n_layers):
        query = 0
        for kv, count in enumerate(spec.heads_of(i)):
            if not spec.slides(i):
                score[i, kv] = max(changed[i, h] for h in range(query, query + count))
            query += count
    ranked = sorted((change, head) for head, change in score.items())
    heads = [head for _, head in ranked]
    n, kl = largest_prefix(len(heads), limit, lambda n: measure(stream_heads(spec, heads[:n])))
    return Chosen(heads[:n], kl, ranked)


def largest_prefix(n: int, limit: float, loss: Callable[[int], float]) -> tuple[int, float]:
    """The longest prefix of n ranked units whose loss is at most `limit`, and its loss.

    By bisection: the loss of k units is taken to grow with k, and is called at most log2(n) + 1
    times.
    """
    low, high, best = 0, n, 0.0
    while low < high:
        middle = (low + high + 1) // 2
        found = loss(middle)
        if found <= limit:
            low, best = middle, found
        else:
            high = middle - 1
    return low, best


def _stays_whole(heads: Sequence[Head], spec: ModelSpec) -> list[Head]:
    """The heads in their order, without those that would leave a layer with none."""
    left = dict.fromkeys(range(spec.n_layers), spec.n_heads)
    kept = []
    for layer, head in heads:
        if left[layer] > 1:
            left[layer] -= 1
            kept.append((layer, head))
    return kept


def _compensate(
    o: Floats, gram: NDArray[np.float64], mean: NDArray[np.float64], columns: NDArray[np.intp]
) -> tuple[Floats, Floats]:
    """The columns of `o` fitted to its whole output around the means, and the bias that is left."""
    centred = gram - np.outer(mean, mean)
    inner = centred[np.ix_(columns, columns)]
    ridge = _RIDGE * float(np.mean(np.diag(inner))) + 1e-12
    inner = inner + ridge * np.eye(len(columns))
    # Ridge pulls towards the columns as they are, not towards zero.
    lost = np.setdiff1d(np.arange(o.shape[1]), columns)
    wanted = o[:, lost].astype(np.float64) @ centred[np.ix_(lost, columns)]
    fitted = o[:, columns] + np.linalg.solve(inner, wanted.T).T
    bias = o.astype(np.float64) @ mean - fitted @ mean[columns]
    return np.ascontiguousarray(fitted, np.float32), bias.astype(np.float32)


def _columns(heads: Sequence[int], head_dim: int) -> NDArray[np.intp]:
    """The rows (or columns) of these heads."""
    return (np.asarray(heads)[:, None] * head_dim + np.arange(head_dim)).ravel()


def _kept(source: SourceModel, prefix: str) -> Mapping[str, Floats]:
    """The tensors of one layer, read when they are first needed and kept."""

    class Layer(dict[str, Floats]):
        def __missing__(self, name: str) -> Floats:
            self[name] = source.tensor(name)
            return self[name]

    return Layer()
