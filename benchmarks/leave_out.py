"""What a model can do without: attention heads, the far past of heads, neurons at each token.

    python benchmarks/leave_out.py                       # SmolLM2-135M, some 8 minutes
    python benchmarks/leave_out.py --model gemma-3-270m

In FP32 and NumPy, so that nothing but what is left out counts. Fitted on prose (the first half of
each book in FLASHLITE_DATA/long_docs), measured on wikitext-2 valid. The gates are shares of all
units at a loss: heads at 0.01 nats, streaming KV heads at 0.005 with texts of 2,048 tokens, neurons
at 0.01. A share below its gate is the answer: then it stays off.

A neuron is skipped at a token when |act(gate)| |up row| |down column| lies below its layer's
threshold (CATS, Lee et al. 2024). Packed rows come in blocks of 16, so that a kernel could leave
out whole blocks only: their share is printed beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import common
from common import GEMMA, SMOLLM2, Gate, Row
from flashlite.artifact.read import load_texts
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.compress.heads import (
    HeadStatistics,
    StreamWatch,
    choose_removed,
    choose_streams,
    largest_prefix,
)
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.model.reference import Floats, Reference
from flashlite.model.source import SourceModel
from flashlite.model.spec import ModelSpec

Ids = NDArray[np.int64]
Weights = Callable[[str], Floats]
BLOCK = 16
QUANTILES = 40
GATES = {"heads": Gate(0.10), "streams": Gate(0.30), "neurons": Gate(0.25)}


class Cached(dict[str, Floats]):
    """Tensors of a source, read once."""

    def __init__(self, source: SourceModel) -> None:
        super().__init__()
        self.source = source

    def __missing__(self, name: str) -> Floats:
        self[name] = self.source.tensor(name)
        return self[name]


class Texts:
    """Token ids of prose to fit on and of articles to measure on."""

    def __init__(self, model: str) -> None:
        artifact = common.ready_artifact(model)
        self.tokenizer = Tokenizer(load_texts(artifact), name=artifact.name)
        begins = load_texts(artifact).tokens
        self.first = [begins.bos] if begins.add_bos and begins.bos is not None else []
        self.data = Path(os.environ["FLASHLITE_DATA"])

    def cut(self, file: str, length: int, n: int, skip: int = 0) -> list[Ids]:
        text = (self.data / file).read_text(encoding="utf-8")[skip : skip + 12 * length * n]
        ids = self.tokenizer.encode(text)
        return [np.array([*self.first, *ids[i * length : (i + 1) * length]]) for i in range(n)]


class Loss:
    """KL divergence from the whole model on the second half of some texts."""

    def __init__(self, spec: ModelSpec, weights: Weights, texts: Sequence[Ids], step: int) -> None:
        self.texts, self.rows = texts, slice(len(texts[0]) // 2, None, step)
        self.whole = [Reference(spec, weights).logits(ids, self.rows) for ids in texts]

    def of(self, other: Reference) -> float:
        pairs = zip(self.whole, self.texts, strict=True)
        return float(
            np.mean([kl_divergence(p, other.logits(ids, self.rows)).mean() for p, ids in pairs])
        )


class Skipping(Reference):
    """Leaves out neurons below a threshold per layer; counts them, and whole blocks of them."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Floats]) -> None:
        super().__init__(spec, weights)
        layers = range(spec.n_layers)
        norm = np.linalg.norm
        self.norms = [
            norm(weights[f"layers.{i}.up"], axis=1) * norm(weights[f"layers.{i}.down"], axis=0)
            for i in layers
        ]
        self.seen: list[list[Floats]] = [[] for _ in layers]
        self.thresholds: Sequence[float] = [-1.0] * spec.n_layers
        self.reset()

    def reset(self) -> None:
        self.skipped, self.blocks, self.calls = 0.0, 0.0, 0

    def act(self, i: int, gate: Floats) -> Floats:
        active = super().act(i, gate)
        score = np.abs(active) * self.norms[i]
        if self.thresholds[i] < 0:
            self.seen[i].append(score)
            return active
        low = score < self.thresholds[i]
        whole = low[:, : low.shape[1] // BLOCK * BLOCK].reshape(len(low), -1, BLOCK).all(axis=-1)
        self.skipped += float(low.mean())
        self.blocks += float(whole.mean())
        self.calls += 1
        return np.where(low, np.float32(0), active)


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1, isa=False)
    parser.add_argument("--model", choices=[SMOLLM2, GEMMA], default=SMOLLM2)
    options = common.arguments(parser)
    if "FLASHLITE_DATA" not in os.environ:
        parser.error("FLASHLITE_DATA is not set: it names the folder of the evaluation sets")
    path = pull(options.model, accept_license=options.model == GEMMA).path
    source, texts = describe(open_checkpoint(path)), Texts(options.model)
    spec, weights = source.spec, Cached(source)
    books = ("long_docs/alice_in_wonderland.txt", "long_docs/quijote_es_first_part.txt")
    fit = [ids for book in books for ids in texts.cut(book, 512, 8)]
    articles = texts.cut("wikitext-2/valid.txt", 512, 2)
    loss = Loss(spec, weights.__getitem__, articles, 2)

    def removed(other: SourceModel) -> float:
        changed = {f"layers.{i}." for i in range(spec.n_layers) if other.spec.lost_heads(i)}

        def tensor(name: str) -> Floats:
            own = name.rpartition(".")[0] + "." in changed
            return other.tensor(name) if own else weights[name]

        return loss.of(Reference(other.spec, tensor))

    common.note("heads")
    statistics = HeadStatistics.collect(source, fit)
    heads = choose_removed(source, statistics, 0.01, removed)
    for kl, (layer, head) in heads.ranked[:10]:
        print(f"without head {head} of layer {layer}: {kl:.5f} nats")

    common.note("streams")
    long = Loss(spec, weights.__getitem__, texts.cut("wikitext-2/valid.txt", 2048, 1, 100_000), 4)
    watching = StreamWatch(spec, weights.__getitem__)
    watching.hidden(texts.cut(books[0], 2048, 1)[0])
    streams = choose_streams(
        spec, watching.changed, 0.005, lambda other: long.of(Reference(other, weights.__getitem__))
    )

    common.note("neurons")
    skipping = Skipping(spec, weights)
    for ids in fit[::4]:
        skipping.hidden(ids)
    scores = [np.concatenate(rows) for rows in skipping.seen]
    skipping.seen = [[] for _ in scores]

    def skip(n: int) -> float:
        skipping.thresholds = [float(np.quantile(rows, n / QUANTILES)) for rows in scores]
        skipping.reset()
        return loss.of(skipping)

    n, skip_kl = largest_prefix(QUANTILES // 2, 0.01, skip)
    skip(n)
    kv_heads = sum(not spec.slides(i) for i in range(spec.n_layers)) * spec.n_kv_heads
    found = {
        "heads": (len(heads.heads) / (spec.n_layers * spec.n_heads), heads.kl),
        "streams": (len(streams.heads) / kv_heads, streams.kl),
        "neurons": (skipping.skipped / skipping.calls, skip_kl),
    }
    rows = [
        Row(f"{options.model} {what} left out at {kl:.4f} nats", "share", share, gate=GATES[what])
        for what, (share, kl) in found.items()
    ]
    rows.append(
        Row("whole blocks of 16 neurons among these", "share", skipping.blocks / skipping.calls)
    )
    common.finish(
        "leave_out",
        options,
        rows,
        removed=heads.heads,
        ranked=heads.ranked,
        streams=streams.heads,
        ranked_streams=streams.ranked,
    )


if __name__ == "__main__":
    main()
