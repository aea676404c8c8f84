"""Small models with a split head, and what NumPy makes of its arrays."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small import Small

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights, open_artifact, packed
from flashlite.artifact.write import add_screen
from flashlite.compress.pack import BLOCK_ROWS, Packed, dequantize
from flashlite.compress.screen import REST, SCREEN, Cut
from flashlite.compress.screen_trials import MARGIN, SURE, Gates, by_block, round_like_kernels
from flashlite.compress.split_head import Fitted, fit_screen
from flashlite.runtime.engine import Work

Floats = NDArray[np.float32]
ANY = Gates(argmax=0, top20=0, kl=np.inf, full=1)


def states_of(small: Small, ids: NDArray[np.int32]) -> Floats:
    """What the head reads after every token, on the best kernels of this CPU."""
    out = np.empty((len(ids), small.artifact.spec.d_model), np.float32)
    with small.open("plain") as engine:
        engine.step([Work(engine.new_sequence(len(ids)), ids, "all")], hidden=out)
    return out


def fit(small: Small, *, gates: Gates = ANY) -> Fitted:
    """A screen of half of the columns, fitted to random text."""
    spec = small.artifact.spec
    head = packed(small.artifact, small.weights, "head")
    n = min(200, spec.max_context)
    fitting = np.concatenate([states_of(small, small.ids(n, seed)) for seed in range(1, 5)])
    found = fit_screen(
        head,
        (spec.vocab_size, spec.d_model),
        fitting,
        states_of(small, small.ids(n, 9)),
        body_bytes=0,
        always=(3,),
        ranks=[32],
        must_save=False,
        gates=gates,
    )
    assert found is not None
    return found


def with_screen(small: Small, folder: Path, fitted: Fitted, *, coarse: Cut, fine: Cut) -> Small:
    """The same model with a split head of these cuts."""
    shutil.copytree(small.artifact.path, folder)
    screen = type(fitted.screen)(32, coarse, fine, fitted.screen.measured)
    made = add_screen(open_artifact(folder), Fitted(screen, fitted.arrays, fitted.trials))
    return Small(made, load_weights(made))


@dataclass(frozen=True)
class Estimates:
    """What the C should find for every state, by NumPy: [n, vocab] estimates, [n, blocks] cuts."""

    final: Floats
    twice: NDArray[np.bool_]
    exact: NDArray[np.bool_]
    nearest: Floats  # [n] how far the closest block is from a bar


def estimates(small: Small, hidden: Floats) -> Estimates:
    """The split head, from the arrays of the artifact."""
    artifact, spec = small.artifact, small.artifact.spec
    screen = artifact.plan.screen
    assert screen is not None
    d, rank, vocab = spec.d_model, screen.rank, spec.vocab_size

    def array(name: str) -> Floats:
        entry = artifact.tensors[f"{SCREEN}.{name}"]
        return small.weights[entry.offset : entry.offset + entry.nbytes].view(np.float32)

    def table(name: str, cols: int) -> Floats:
        return dequantize(_packed(small, artifact, name), vocab, cols)

    h = round_like_kernels(hidden)
    x = h @ array("project").reshape(d, d).T + array("shift")
    head = round_like_kernels(x[:, :rank]) @ table(SCREEN, rank).T
    first = head + array("bias") + (h @ array("mean"))[:, None]
    blocks = -(-vocab // BLOCK_ROWS)

    def errors(name: str, norms: Floats) -> Floats:
        wrong: Floats = np.abs(array(name)) * norms[:, None]
        return wrong

    def rows(values: Floats) -> Floats:
        repeated: Floats = np.repeat(values, BLOCK_ROWS, axis=1)[:, :vocab]
        return repeated

    def tops(values: Floats) -> Floats:
        most: Floats = by_block(np.ascontiguousarray(values.T), np.maximum).T
        return most

    wrong = errors("spread", np.linalg.norm(x[:, rank:], axis=1))
    plain = first.copy()
    first -= rows(half_square(wrong))
    peaks = tops(first)
    bar = np.sort(peaks, axis=1)[:, -min(SURE, blocks)] - screen.coarse.reach
    always = array("spread") < 0
    gaps = peaks + MARGIN * wrong - bar[:, None]
    twice = (gaps >= 0) | always
    rest = round_like_kernels(x[:, rank:]) @ table(REST, d - rank).T
    less = errors("rest_spread", np.linalg.norm(x, axis=1))
    second = plain + rest - rows(half_square(less))
    final: Floats = np.where(rows(twice.astype(np.float32)) > 0, second, first)
    peaks = np.where(twice, tops(final), -np.inf)
    bar = np.sort(peaks, axis=1)[:, -min(SURE, blocks)]
    bar = np.where(np.isfinite(bar), bar, np.where(twice, peaks, np.inf).min(axis=1))
    bar = bar - screen.fine.reach
    close = np.where(twice, peaks + MARGIN * less - bar[:, None], -np.inf)
    nearest: Floats = np.minimum(np.abs(gaps).min(axis=1), np.abs(close).min(axis=1))
    return Estimates(final, twice, (close >= 0) | always, nearest)


def half_square(x: Floats) -> Floats:
    half: Floats = np.float32(0.5) * x * x
    return half


def _packed(small: Small, artifact: Artifact, name: str) -> Packed:
    def part(what: str, dtype: type) -> NDArray[Any]:
        entry = artifact.tensors[f"{name}.{what}"]
        raw = small.weights[entry.offset : entry.offset + entry.nbytes]
        array: NDArray[Any] = raw.view(dtype).reshape(entry.shape)
        return array

    return Packed("q4", part("codes", np.uint8), part("scales", np.float16))
