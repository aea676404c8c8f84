"""Measure screens of every rank and reach at once, on states that the fit has not seen.

Two passes over the vocabulary, a band of rows at a time: the first finds the largest logits and
estimates of every state, the second what lies within reach of them and what is lost by the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import (
    BLOCK_ROWS,
    CODE_BYTES,
    GROUP,
    Packed,
    blocks_of,
    dequantize,
    groups_of,
)

__all__ = [
    "SURE",
    "Bands",
    "Basis",
    "Gates",
    "Measurement",
    "Table",
    "Trial",
    "by_block",
    "round_like_kernels",
    "tail",
]

MARGIN = np.float32(2)  # standard deviations that a value may lie above its estimate
SURE = 20  # estimates that set the bar: FL_SURE
_COARSE = (6.0, 7.0, 8.0, 9.0)  # nats
_FINE = (3.0, 4.0, 5.0, 6.0)
_TOP = 20
# Bytes read in order in the time of one that is not, measured: blocks of the full head, rows.
_BLOCK_APART, _ROW_APART = 1.5, 8.0

_F32 = NDArray[np.float32]
Bands = Callable[[], Iterator[tuple[int, _F32]]]
"""Goes over the head: (first row, rows in floats), whole blocks at a time."""


@dataclass(frozen=True)
class Gates:
    """What a screen must reach on text that the fit has not seen.

    Attributes:
        argmax: share of states whose largest logit is exact.
        top20: share whose 20 largest are all exact.
        kl: mean divergence of the split head from the full one, in nats.
        full: share of states that are computed in full after all.
    """

    argmax: float = 0.9993
    top20: float = 0.993
    kl: float = 0.0015
    full: float = 0.03


@dataclass(frozen=True)
class Trial:
    """One rank and two reaches, as measured; the figures are those of `Gates`."""

    rank: int
    coarse: float  # reach of second estimates
    fine: float  # reach of exact values
    argmax: float
    top20: float
    kl: float
    full: float
    estimated: float  # mean number of rows estimated with all columns
    exact: float  # mean number of blocks computed exactly
    nbytes: float  # read per row of logits, on average
    cost: float  # the same, blocks that lie apart counted for what they take

    def passes(self, gates: Gates) -> bool:
        """Whether it reaches every gate."""
        return (
            self.argmax >= gates.argmax
            and self.top20 >= gates.top20
            and self.kl <= gates.kl
            and self.full <= gates.full
        )


@dataclass(frozen=True)
class Basis:
    """Where the table's columns lie, and what its input is made of."""

    mean: _F32  # [d] mean row of the head
    centre: _F32  # [d] mean state
    columns: _F32  # [d, d] from a centred row of the head to a row of the table
    project: _F32  # [d, d] from a state to the table's input
    shift: _F32  # [d]
    variance: _F32  # [d] mean square of each input


@dataclass(frozen=True)
class Table:
    """The table at full width, and how far off its estimates are.

    `spread[rank]` [blocks] times the norm of the input columns that `tail` names is the standard
    deviation of an estimate's error; that of a block's worst row counts for all 16.
    """

    packed: Packed
    bias: _F32  # [rows]
    spread: Mapping[int, _F32]  # by rank
    always: NDArray[np.bool_]  # [blocks] exact whatever the estimates say


class Measurement:
    """States, and what screens make of them."""

    def __init__(self, basis: Basis, table: Table, states: _F32) -> None:
        """The ranks of `table.spread` are measured; the highest is that of second estimates."""
        self._table = table
        self._ranks = sorted(table.spread)
        self._exact = round_like_kernels(states)  # [n, d]
        inputs = self._exact @ basis.project.T + basis.shift
        self._inputs = round_like_kernels(inputs)  # groups do not depend on the rank
        self._common = self._exact @ basis.mean
        self._norms = {
            rank: np.sqrt((self._inputs[:, tail(rank, len(basis.mean))] ** 2).sum(axis=1))
            for rank in self._ranks
        }
        n = len(states)
        self._largest = np.full(n, -np.inf, np.float32)
        self._peaks = np.full((len(self._ranks), SURE, n), -np.inf, np.float32)
        self._top = np.full((n, _TOP), -np.inf, np.float32)
        self._top_ids = np.zeros((n, _TOP), np.int64)

    def run(self, bands: Bands, limits: tuple[int, int], full_bytes: int) -> list[Trial]:
        """Measure every rank and reach.

        Args:
            bands: the full head.
            limits: rows estimated twice, and blocks computed exactly, beyond which a state is
                computed in full.
            full_bytes: what that reads.
        """
        for row, band in bands():
            logits = band @ self._exact.T
            np.maximum(self._largest, logits.max(axis=0), out=self._largest)
            self._note_top(row, logits)
            for peaks, estimates in zip(self._peaks, self._estimates(row, len(band)), strict=True):
                last = peaks is self._peaks[-1]
                both = np.concatenate(
                    (peaks, estimates if last else by_block(estimates, np.maximum))
                )
                peaks[:] = -np.partition(-both, SURE - 1, axis=0)[:SURE]
        bars = self._peaks.min(axis=1)  # the SURE-th largest of each rank
        cuts = [
            (i, coarse, fine)
            for i in range(len(self._ranks) - 1)
            for coarse in _COARSE
            for fine in _FINE
        ]
        sums = [_Sums(len(self._largest)) for _ in cuts]
        z = np.zeros(len(self._largest))
        for row, band in bands():
            logits = band @ self._exact.T
            blocks = slice(row // BLOCK_ROWS, row // BLOCK_ROWS + blocks_of(len(band)))
            weights = np.exp(logits - self._largest)
            mass = by_block(weights, np.add)
            most = by_block(logits, np.maximum)
            z += mass.sum(axis=0)
            member = self._members(row, len(band))
            guesses, crosses, reached = [], [], []
            for rank, estimates in zip(self._ranks, self._estimates(row, len(band)), strict=True):
                guesses.append(np.exp(estimates - self._largest))
                crosses.append(weights * (logits - estimates))
                margin = MARGIN * self._errors(rank, blocks)
                margin[self._table.always[blocks]] = np.inf
                reached.append(estimates + np.repeat(margin, BLOCK_ROWS, axis=0)[: len(band)])
            done = None
            for (i, coarse, fine), total in zip(cuts, sums, strict=True):
                if done != (i, coarse):  # what does not depend on `fine`
                    done = (i, coarse)
                    twice = reached[i] >= bars[i] - np.float32(coarse)
                    counts = twice.sum(axis=0)
                    guess = by_block(np.where(twice, guesses[-1], guesses[i]), np.add)
                    cross = by_block(np.where(twice, crosses[-1], crosses[i]), np.add)
                    top = by_block(np.where(twice, reached[-1], -np.inf), np.maximum)
                exact = top >= bars[-1] - np.float32(fine)
                total.add(counts, exact, mass, guess, cross, most, member)
        return [
            self._trial(i, coarse, fine, total, z, bars, limits, full_bytes)
            for (i, coarse, fine), total in zip(cuts, sums, strict=True)
        ]

    def _estimates(self, row: int, n: int) -> Iterator[_F32]:
        """[n rows, states] for one rank after the other."""
        first, count = row // BLOCK_ROWS, blocks_of(n)
        packed, cols = self._table.packed, self._inputs.shape[1]
        part = Packed(
            packed.format,
            packed.codes[first : first + count],
            packed.scales[first : first + count],
        )
        table = dequantize(part, n, cols)
        total = self._table.bias[row : row + n, None] + self._common
        done = 0
        for rank in self._ranks:
            total += table[:, done:rank] @ self._inputs[:, done:rank].T
            done = rank
            blocks = slice(first, first + count)
            errors = self._errors(rank, blocks)
            offset = np.float32(0.5) * errors * errors  # they make exponentials larger on average
            estimates: _F32 = total - np.repeat(offset, BLOCK_ROWS, axis=0)[:n]
            yield estimates

    def _errors(self, rank: int, blocks: slice) -> _F32:
        """[blocks, states] standard deviations of estimates."""
        errors: _F32 = self._table.spread[rank][blocks, None] * self._norms[rank]
        return errors

    def _note_top(self, row: int, logits: _F32) -> None:
        n = min(_TOP, len(logits))
        here = np.argpartition(-logits, n - 1, axis=0)[:n]
        values = np.concatenate((self._top, np.take_along_axis(logits, here, axis=0).T), axis=1)
        ids = np.concatenate((self._top_ids, here.T + row), axis=1)
        order = np.argsort(-values, axis=1)[:, :_TOP]
        self._top = np.take_along_axis(values, order, axis=1)
        self._top_ids = np.take_along_axis(ids, order, axis=1)

    def _members(self, row: int, n: int) -> _Members:
        """Of the largest logits in these rows: their blocks here, their states, and 1 or 1000 for
        the very largest, so that one sum counts both.
        """
        states, places = np.nonzero((self._top_ids >= row) & (self._top_ids < row + n))
        blocks = (self._top_ids[states, places] - row) // BLOCK_ROWS
        return blocks, states, np.where(places == 0, 1000, 1)

    def _trial(
        self,
        i: int,
        coarse: float,
        fine: float,
        sums: _Sums,
        z: NDArray[np.float64],
        bars: _F32,
        limits: tuple[int, int],
        full_bytes: int,
    ) -> Trial:
        bar = np.maximum(bars[i] - np.float32(coarse), bars[-1] - np.float32(fine))
        full = (sums.twice > limits[0]) | (sums.exact > limits[1]) | (sums.best < bar)
        kl = np.where(full, 0, sums.cross / z + np.log((sums.chosen + sums.guessed) / z))
        rows, cols, rank = len(self._table.bias), self._exact.shape[1], self._ranks[i]
        blocks, cell = blocks_of(rows), CODE_BYTES["q4"] + 2 * BLOCK_ROWS  # of a block and group
        screen = blocks * groups_of(rank) * cell + rows * 4 + blocks * 4 + cols * cols * 4
        each = full_bytes / blocks
        twice, exact = sums.twice * groups_of(cols - rank) * cell / BLOCK_ROWS, sums.exact * each
        apart = _ROW_APART * twice + _BLOCK_APART * exact
        top = min(_TOP, rows)
        return Trial(
            rank=rank,
            coarse=float(coarse),
            fine=float(fine),
            argmax=float(np.mean(full | (sums.found >= 1000))),
            top20=float(np.mean(full | (sums.found == 1000 + top - 1))),
            kl=float(kl.mean()),
            full=float(full.mean()),
            estimated=float(np.where(full, 0, sums.twice).mean()),
            exact=float(np.where(full, 0, sums.exact).mean()),
            nbytes=float(screen + np.where(full, full_bytes, twice + exact).mean()),
            cost=float(screen + np.where(full, full_bytes, apart).mean()),
        )


_Members = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]


class _Sums:
    """What a pass over the vocabulary adds up for one rank and its reaches, by state."""

    def __init__(self, n: int) -> None:
        self.twice = np.zeros(n)  # rows
        self.exact = np.zeros(n)  # blocks
        self.chosen = np.zeros(n)  # probability mass of exact logits, before division
        self.guessed = np.zeros(n)  # of estimates
        self.cross = np.zeros(n)  # sum over estimates of mass * (logit - estimate)
        self.best = np.full(n, -np.inf)  # largest exact logit
        self.found = np.zeros(n)  # of the largest logits: how many are exact

    def add(
        self,
        twice: NDArray[np.integer],
        exact: NDArray[np.bool_],
        mass: _F32,
        guess: _F32,
        cross: _F32,
        most: _F32,
        member: _Members,
    ) -> None:
        """Add a band: `twice` [states], the others [blocks, states]."""
        self.twice += twice
        self.exact += exact.sum(axis=0)
        self.chosen += np.where(exact, mass, 0).sum(axis=0)
        self.guessed += np.where(exact, 0, guess).sum(axis=0)
        self.cross += np.where(exact, 0, cross).sum(axis=0)
        np.maximum(self.best, np.where(exact, most, -np.inf).max(axis=0), out=self.best)
        blocks, states, worth = member
        hit = exact[blocks, states]
        np.add.at(self.found, states[hit], worth[hit])


def tail(rank: int, cols: int) -> slice:
    """The columns that decide how wrong estimates of this rank are: those left out, or all, which
    are rounded, where none is.
    """
    return slice(rank if rank < cols else 0, cols)


def by_block(values: _F32, combine: np.ufunc) -> _F32:
    """[rows, states] -> [blocks, states]; the last block may be short."""
    whole = len(values) // BLOCK_ROWS * BLOCK_ROWS
    parts = [combine.reduce(values[:whole].reshape(-1, BLOCK_ROWS, values.shape[1]), axis=1)]
    if whole < len(values):
        parts.append(combine.reduce(values[whole:], axis=0)[None])
    out: _F32 = np.concatenate(parts)
    return out


def round_like_kernels(x: _F32) -> _F32:
    """As the kernels quantize activations: 8 bits, one scale per group of 32."""
    n, cols = x.shape
    padded = np.zeros((n, groups_of(cols), GROUP), np.float32)
    padded.reshape(n, -1)[:, :cols] = x
    scale = np.abs(padded).max(axis=2, keepdims=True) / np.float32(127)
    codes = np.rint(padded / np.where(scale == 0, 1, scale))
    rounded: _F32 = (codes * scale).reshape(n, -1)[:, :cols]
    return rounded
