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
    """A screen of 32 columns, fitted to random text."""
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
    """What the C should find for every state, by NumPy."""

    final: Floats  # [n, vocab]
    twice: NDArray[np.bool_]  # [n, vocab]
    exact: NDArray[np.bool_]  # [n, blocks]
    nearest: Floats  # [n] how far the closest row is from a bar


def estimates(small: Small, hidden: Floats, sure: int = SURE) -> Estimates:
    """The split head, from the arrays of the artifact, where the `sure` largest must be exact."""
    artifact, spec = small.artifact, small.artifact.spec
    screen = artifact.plan.screen
    assert screen is not None
    d, rank, vocab = spec.d_model, screen.rank, spec.vocab_size

    def array(name: str) -> Floats:
        entry = artifact.tensors[f"{SCREEN}.{name}"]
        return small.weights[entry.offset : entry.offset + entry.nbytes].view(np.float32)

    def table(name: str, cols: int) -> Floats:
        packed = _packed(small, artifact, name)
        return dequantize(in_blocks(packed) if name == REST else packed, vocab, cols)

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

    wrong = rows(errors("spread", np.linalg.norm(x[:, rank:], axis=1)))
    plain = first.copy()
    first -= half_square(wrong)
    bar = np.sort(tops(first), axis=1)[:, -min(sure, blocks)] - screen.coarse.reach
    always = rows(np.broadcast_to(array("spread") < 0, (len(x), blocks)))
    gaps = first + MARGIN * wrong - bar[:, None]
    twice = (gaps >= 0) | always
    rest = round_like_kernels(x[:, rank:]) @ table(REST, d - rank).T
    less = rows(errors("rest_spread", np.linalg.norm(x, axis=1)))
    final: Floats = np.where(twice, plain + rest - half_square(less), first)
    seconds = np.sort(np.where(twice, final, -np.inf), axis=1)
    place = vocab - np.minimum(twice.sum(axis=1), sure)
    bar = seconds[np.arange(len(x)), place] - screen.fine.reach
    close = np.where(twice, final + MARGIN * less - bar[:, None], -np.inf)
    exact = (close >= 0) | (always & twice)
    nearest: Floats = np.minimum(np.abs(gaps).min(axis=1), np.abs(close).min(axis=1))
    return Estimates(final, twice, tops(exact.astype(np.float32)) > 0, nearest)


def in_blocks(stored: Packed) -> Packed:
    """Of a table stored row by row."""
    blocks, groups, _ = stored.codes.shape
    codes = stored.codes.reshape(blocks, BLOCK_ROWS, groups, 4, 4).transpose(0, 2, 3, 1, 4)
    scales = stored.scales.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1)
    return Packed(stored.format, codes.reshape(blocks, groups, -1), scales)


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
