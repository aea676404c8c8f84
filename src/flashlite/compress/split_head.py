"""Make the screen of a split head: estimate every logit cheaply, so that few need be exact.

    logit_i = w_i . h = w_mean . h + bias_i + (w_i - w_mean) . (h - h_mean),   bias_i fits h_mean

The last term is what the table estimates. The basis of the table is whitened: with C the covariance
of the hidden states and U the directions in which the head answers to them most (eigenvectors of
C^1/2 W^T W C^1/2, rows weighted by how likely their tokens are), columns of W C^1/2 U fall in
importance, so that the first few carry most of every logit. Each column is then scaled to the same
spread and its input by the inverse, which is what makes 4 bits enough: a group of 32 columns shares
a scale, and without it the first column would take all of it.

Measured, mean error of estimates in nats (Gemma-3-270M / SmolLM2-135M, own text, temperature 0.7):
4-bit copy of the head 0.87 / 0.73, after centring 0.71 / 0.32, whitened at full width - / 0.22,
whitened without equal spread at 320 columns 3.2 / 1.5, with it 1.15 / 0.84.

The error of an estimate is at most |what the table leaves out of the row| |what it leaves out of
the state|, by Cauchy and Schwarz: sqrt(columns left out), 20 times, as wide as the errors that
occur, and most of the vocabulary would pass. So a row's margin is that product less this factor,
in standard deviations, and rank and reach are chosen by measurement, on text that the fit has not
seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import (
    BLOCK_ROWS,
    GROUP,
    Packed,
    blocks_of,
    dequantize,
    groups_of,
    pack,
)
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.screen import REST, SCREEN, Cut, Screen, by_row
from flashlite.compress.screen_trials import (
    Bands,
    Basis,
    Gates,
    Measurement,
    Table,
    Trial,
    by_block,
    tail,
)

__all__ = ["Fitted", "Gates", "Trial", "fit_screen", "head_bytes", "is_worth_trying"]

_MOST_ALWAYS = 64  # of these blocks
_RIDGE = 1e-3  # of the mean variance, added to the covariance
_BAND = 4096  # rows of the head held in floats at a time
_CHECKED = 1536  # states that the choice is measured on
_LIKELY = 512  # states that the weights of rows are taken from
_USUAL = 0.4  # of the full head's bytes: a split head's (Gemma-3-270M: 0.36)
_SMALL = 4 << 20  # bytes of a head that stays in the cache: nothing to save
_LEAST_SAVED = 1.25  # bytes of a decode step, before and after

_F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Fitted:
    """A screen, its arrays in stored order, and everything that was tried."""

    screen: Screen
    arrays: Mapping[str, NDArray[Any]]
    trials: Sequence[Trial]


def head_bytes(head: Packed) -> int:
    """What the full head reads per step."""
    mins = 0 if head.mins is None else head.mins.nbytes
    return int(head.codes.nbytes + head.scales.nbytes + mins)


def is_worth_trying(head: Packed, body_bytes: int) -> bool:
    """Whether a usual screen would save enough of a step's bytes to be felt."""
    whole = head_bytes(head)
    return whole > _SMALL and _pays(whole, _USUAL * whole, body_bytes)


def fit_screen(
    head: Packed,
    shape: tuple[int, int],
    fitting: _F32,
    checking: _F32,
    *,
    body_bytes: int,
    always: Sequence[int] = (),
    ranks: Sequence[int] | None = None,
    must_save: bool = True,
    gates: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted | None:
    """Fit a screen to a head and to the states it reads.

    Args:
        head: the full head as the kernels read it.
        shape: its true rows and columns.
        fitting: float32 [n, columns] what the head reads, after the final norm.
        checking: the same of other texts, to measure on.
        body_bytes: what a step reads beside the head.
        always: tokens whose logits are exact whatever the estimates say.
        ranks: those to try, multiples of 32 below the columns; None: a few.
        must_save: refuse one that saves too little of a step to be felt.
        gates: None: `Gates()`.
        progress: called with (rows done, rows in all).

    Returns:
        The screen that reads the fewest bytes among those that pass; None when none passes or none
        saves enough.
    """
    rows, cols = shape
    checking = _spread(checking, _CHECKED)
    ranks = _default_ranks(cols) if ranks is None else ranks
    passes = 6 * blocks_of(rows)
    done = 0

    def bands() -> Iterator[tuple[int, _F32]]:
        nonlocal done
        step = _BAND // BLOCK_ROWS
        for first in range(0, blocks_of(rows), step):
            part = slice(first, first + step)
            mins = None if head.mins is None else head.mins[part]
            band = Packed(head.format, head.codes[part], head.scales[part], mins)
            row = first * BLOCK_ROWS
            yield row, dequantize(band, min(rows - row, _BAND), cols)
            done += len(band.codes)
            if progress is not None:
                progress(min(done, passes), passes)

    basis = _fit_basis(bands, shape, fitting)
    table = _build_table(bands, shape, basis, always, ranks)
    blocks = blocks_of(rows)
    limits = (max(1, rows // 3), max(1, blocks // 4))
    trials = Measurement(basis, table, checking).run(bands, limits, head_bytes(head))
    chosen = _choose(trials, gates or Gates())
    if chosen is None or (must_save and not _pays(head_bytes(head), chosen.cost, body_bytes)):
        return None
    screen = Screen(
        chosen.rank,
        Cut(chosen.coarse, limits[0]),
        Cut(chosen.fine, limits[1]),
        {
            "argmax_contained": round(chosen.argmax, 5),
            "top20_contained": round(chosen.top20, 5),
            "kl": round(chosen.kl, 6),
            "full": round(chosen.full, 5),
            "rows_estimated": round(chosen.estimated, 1),
            "blocks_exact": round(chosen.exact, 1),
            "bytes": round(chosen.nbytes),
            "head_bytes": head_bytes(head),
            "states": len(checking),
        },
    )
    return Fitted(screen, _arrays(basis, table, chosen.rank), trials)


def _arrays(basis: Basis, table: Table, rank: int) -> dict[str, NDArray[Any]]:
    """What is stored, in the order of `screen_shapes`."""
    groups, cols = groups_of(rank), len(basis.mean)
    codes, scales = table.packed.codes, table.packed.scales
    return {
        f"{SCREEN}.codes": np.ascontiguousarray(codes[:, :groups]),
        f"{SCREEN}.scales": np.ascontiguousarray(scales[:, :groups]),
        f"{REST}.codes": by_row(codes[:, groups:]),
        f"{REST}.scales": by_row(scales[:, groups:]),
        f"{SCREEN}.project": basis.project.ravel(),
        f"{SCREEN}.shift": basis.shift,
        f"{SCREEN}.mean": basis.mean,
        f"{SCREEN}.bias": table.bias,
        f"{SCREEN}.spread": np.where(table.always, -table.spread[rank], table.spread[rank]),
        f"{SCREEN}.rest_spread": table.spread[cols],
    }


def _default_ranks(cols: int) -> list[int]:
    """Whole groups from about a third of the columns to a half."""
    groups = groups_of(cols)
    ranks = {GROUP * max(1, round(groups * share)) for share in (0.3, 0.4, 0.5)}
    return sorted(rank for rank in ranks if rank < cols)


def _spread(states: _F32, most: int) -> _F32:
    """At most so many of them, taken evenly."""
    return states[:: max(1, -(-len(states) // most))]


def _fit_basis(bands: Bands, shape: tuple[int, int], states: _F32) -> Basis:
    rows, cols = shape
    centre = states.mean(axis=0)
    moved = (states - centre).astype(np.float64)
    cov = moved.T @ moved / len(moved)
    cov += _RIDGE * np.trace(cov) / cols * np.eye(cols)
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values)) @ vectors.T
    likely = _likelihoods(bands, rows, _spread(states, _LIKELY))
    weights = 0.5 / rows + 0.5 * likely
    total, gram = np.zeros(cols), np.zeros((cols, cols))
    weighted = np.zeros(cols)
    for row, band in bands():
        share = weights[row : row + len(band), None]
        scaled = band * np.sqrt(share).astype(np.float32)
        gram += scaled.T @ scaled
        weighted += (band * share).sum(axis=0)
        total += band.sum(axis=0, dtype=np.float64)
    mean = total / rows
    # Of rows less their mean; the weights sum to 1.
    gram += np.outer(mean, mean) - np.outer(weighted, mean) - np.outer(mean, weighted)
    _, vectors = np.linalg.eigh(root @ gram @ root)
    whitened = root @ vectors[:, ::-1]
    # Columns of equal spread over the vocabulary.
    squares = np.zeros(cols)
    for _, band in bands():
        answer = (band - mean.astype(np.float32)) @ whitened.astype(np.float32)
        squares += (answer.astype(np.float64) ** 2).sum(axis=0)
    spread = np.sqrt(squares / rows) + 1e-12
    columns, project = whitened / spread, spread[:, None] * np.linalg.inv(whitened)
    shift = -project @ centre
    inputs = moved @ project.T
    return Basis(
        mean=mean.astype(np.float32),
        centre=centre.astype(np.float32),
        columns=columns.astype(np.float32),
        project=project.astype(np.float32),
        shift=shift.astype(np.float32),
        variance=(inputs**2).mean(axis=0).astype(np.float32),
    )


def _likelihoods(bands: Bands, rows: int, states: _F32) -> NDArray[np.float64]:
    """Mean probability of every token."""
    logits = np.empty((len(states), rows), np.float32)
    for row, band in bands():
        logits[:, row : row + len(band)] = states @ band.T
    mean = np.zeros(rows)
    for line in logits:
        line -= line.max()
        np.exp(line, out=line)
        mean += line / line.sum()
    return mean / len(states)


def _build_table(
    bands: Bands,
    shape: tuple[int, int],
    basis: Basis,
    always: Sequence[int],
    ranks: Iterable[int],
) -> Table:
    rows, cols = shape
    codes, scales = [], []
    bias = np.empty(rows, np.float32)
    squares = {rank: np.empty(rows, np.float32) for rank in (*ranks, cols)}
    for row, band in bands():
        here = slice(row, row + len(band))
        centred = band - basis.mean
        bias[here] = centred @ basis.centre
        values: _F32 = (centred @ basis.columns).astype(np.float32)
        piece = pack(quantize_matrix(values, "q4", name=SCREEN))
        codes.append(piece.codes)
        scales.append(piece.scales)
        rounding = (dequantize(piece, len(band), cols) - values) ** 2 * basis.variance
        left_out = values**2 * basis.variance
        for rank, square in squares.items():
            square[here] = rounding[:, :rank].sum(axis=1) + left_out[:, rank:].sum(axis=1)
    kept = np.zeros(blocks_of(rows), np.bool_)
    kept[np.unique(np.asarray(always, np.intp) // BLOCK_ROWS)[:_MOST_ALWAYS]] = True
    packed = Packed("q4", np.concatenate(codes), np.concatenate(scales))
    spread: dict[int, _F32] = {
        rank: np.sqrt(
            by_block(square[:, None], np.maximum)[:, 0] / basis.variance[tail(rank, cols)].sum()
        )
        for rank, square in squares.items()
    }
    return Table(packed, bias, spread, kept)


def _choose(trials: Sequence[Trial], gates: Gates) -> Trial | None:
    passing = [trial for trial in trials if trial.passes(gates)]
    return min(passing, key=lambda trial: trial.cost, default=None)


def _pays(full: int, split: float, body: int) -> bool:
    return full + body >= _LEAST_SAVED * (split + body)
