"""Round a matrix so that its products change least, given what it multiplies.

Rounding each weight to its nearest code ignores that errors add up in a product: with X the inputs
and D the change of the weights, the outputs change by D X, and their squared sum is tr(D H D^T)
with H = X X^T. Three steps lower it, all rows at once:

    search      scales by `quantize_matrix`, each column weighted by its mean square input
    GPTQ        one column after the other, the most read first; what rounding it does to the
                outputs is undone by the columns still to come (Frantar et al. 2210.17323, alg. 1)
    descent     each scale, then each code of its group, set to its best value given all others
                (coordinate descent as in QuantEase, Behdin et al. 2309.01885), sweep after sweep

Scales stay those of their group of 32 columns whatever the order of the columns, so that the
result is an ordinary `Quantized`. Inside, matrices are transposed: a column is one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import CODE_DTYPE, GROUP, Quantized, groups_of
from flashlite.compress.quantize import CODES, quantize_matrix
from flashlite.errors import CompressError

__all__ = [
    "DAMPING",
    "Curvature",
    "curvature",
    "descend",
    "gptq",
    "output_error",
    "search",
    "weights_of",
]

DAMPING = 0.02  # of the mean diagonal of H, added to its diagonal
_LEAF = 8  # columns below which products go one by one
_BAND = 4096  # rows worked on at once

_F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Curvature:
    """How the outputs' error grows with a change of the weights; for all matrices of one input.

    Attributes:
        second: [cols, cols] the mean of x x^T over the inputs.
        damped: the same with the damping added.
        order: columns, the most read first.
        factor: R, upper triangular, of the damped inverse in this order: R^T R.
    """

    second: _F32
    damped: _F32
    order: NDArray[np.intp]
    factor: _F32


def curvature(second: _F32, damping: float = DAMPING) -> Curvature:
    """Damp and factor H; what was never read stays where it is.

    Args:
        second: [cols, cols] the mean of x x^T over the inputs.
        damping: of the mean diagonal, added to it.

    Raises:
        CompressError: H is not finite, or not positive definite even with the damping.
    """
    damped = _damped(second, damping)
    order = np.argsort(-np.diag(second), kind="stable")
    return Curvature(second, damped, order, _inverse_factor(damped[np.ix_(order, order)]))


@dataclass
class _Work:
    """A band of rows on its way, transposed; codes count from zero as the format multiplies them.

    A weight is scale * code + shift, with code in low..high.
    """

    codes: _F32  # [cols, rows]
    scales: _F32  # [groups, rows]
    shifts: _F32 | None  # [groups, rows], formats with a minimum
    low: int
    high: int

    def weights(self) -> _F32:
        """[cols, rows]"""
        cols = len(self.codes)
        out = self.codes * np.repeat(self.scales, GROUP, axis=0)[:cols]
        if self.shifts is not None:
            out += np.repeat(self.shifts, GROUP, axis=0)[:cols]
        return out


def gptq(weights: _F32, curve: Curvature, start: Quantized) -> Quantized:
    """Choose the codes of `start` anew, column by column, under its scales.

    Args:
        weights: [rows, cols] to come near to.
        curve: of the inputs.
        start: the scales (and minima) to keep.
    """
    order, factor = curve.order, curve.factor
    groups = order // GROUP

    def work(target: _F32, band: _Work) -> None:
        rest = np.ascontiguousarray(target[order])  # [cols, rows], what is left to come near to
        codes, errors = np.empty_like(rest), np.empty_like(rest)
        inverse = _reciprocal(band.scales)

        def run(first: int, last: int) -> None:
            if last - first > _LEAF:
                middle = (first + last) // 2
                run(first, middle)
                rest[middle:last] -= factor[first:middle, middle:last].T @ errors[first:middle]
                run(middle, last)
                return
            for j in range(first, last):
                group = groups[j]
                found, value = _nearest(rest[j], band, group, inverse)
                codes[j] = found
                errors[j] = (rest[j] - value) / factor[j, j]
                if j + 1 < last:
                    rest[j + 1 : last] -= factor[j, j + 1 : last, None] * errors[j]

        run(0, len(order))
        band.codes[order] = codes

    return _by_band(weights, start, work)


def descend(
    weights: _F32,
    curve: Curvature,
    start: Quantized,
    *,
    sweeps: int = 2,
    scales: bool = True,
) -> Quantized:
    """Improve codes and scales one at a time; the error under the damped H never rises.

    Args:
        weights: [rows, cols] to come near to.
        curve: of the inputs.
        start: where to begin.
        sweeps: how often each code and scale is set.
        scales: whether scales and minima move too.
    """
    damped = curve.damped
    diagonal = np.diag(damped).copy()
    cols = len(damped)
    spans = [(g * GROUP, min(cols, (g + 1) * GROUP)) for g in range(groups_of(cols))]

    def work(target: _F32, band: _Work) -> None:
        for _ in range(sweeps):
            slope = damped @ (band.weights() - target)  # half the derivative, by weight
            change = np.zeros_like(slope)

            def run(first: int, last: int, slope: _F32 = slope, change: _F32 = change) -> None:
                if last - first == 1:
                    low, high = spans[first]
                    _descend_group(
                        damped[low:high, low:high],
                        diagonal[low:high],
                        slope[low:high],
                        change[low:high],
                        band,
                        first,
                        scales,
                    )
                    return
                middle = (first + last) // 2
                run(first, middle)
                done = slice(spans[first][0], spans[middle - 1][1])
                rest = slice(spans[middle][0], spans[last - 1][1])
                slope[rest] += damped[rest, done] @ change[done]
                run(middle, last)

            run(0, len(spans))

    return _by_band(weights, start, work)


def output_error(weights: _F32, stored: _F32, second: _F32) -> float:
    """Mean squared change of the outputs, summed over rows: tr(D H D^T).

    Args:
        weights: [rows, cols] as they should be.
        stored: as they are.
        second: [cols, cols] the mean of x x^T over the inputs.
    """
    change = stored - weights
    return float(np.einsum("ij,ij->", change @ second, change))


def _restore(codes: _F32, scales: _F32, shifts: _F32 | None, fmt: str) -> Quantized:
    """`Quantized` of codes [rows, cols] as they are multiplied, scales [rows, groups]."""
    rows, cols = codes.shape
    zero = CODES[fmt].zero
    stored = np.full((rows, groups_of(cols) * GROUP), zero, CODE_DTYPE[fmt])
    stored[:, :cols] = codes + zero
    half = scales.astype(np.float16)
    return Quantized(fmt, stored, half, None if shifts is None else shifts.astype(np.float16))


def weights_of(matrix: Quantized, cols: int) -> _F32:
    """The weights that are stored, float32 [rows, cols]."""
    rows, groups = matrix.scales.shape
    values = matrix.codes.astype(np.float32).reshape(rows, groups, GROUP)
    values -= np.float32(CODES[matrix.format].zero)
    values *= matrix.scales.astype(np.float32)[:, :, None]
    if matrix.mins is not None:
        values += matrix.mins.astype(np.float32)[:, :, None]
    return np.ascontiguousarray(values.reshape(rows, groups * GROUP)[:, :cols])


def search(weights: _F32, fmt: str, hessian: _F32, *, name: str = "weights") -> Quantized:
    """The start of both: scales searched with columns weighted by what they read."""
    importance = np.maximum(np.diag(hessian), 0).astype(np.float32)
    return quantize_matrix(weights, fmt, name=name, importance=importance)


def _by_band(weights: _F32, start: Quantized, work: Callable[[_F32, _Work], None]) -> Quantized:
    rows, cols = weights.shape
    span = CODES[start.format]
    codes = np.empty((rows, cols), np.float32)
    scales = np.empty(start.scales.shape, np.float32)
    shifts = None if start.mins is None else np.empty(start.scales.shape, np.float32)
    for first in range(0, rows, _BAND):
        part = slice(first, first + _BAND)
        held = start.codes[part, :cols].T.astype(np.float32) - np.float32(span.zero)
        band = _Work(
            held,
            start.scales[part].T.astype(np.float32),
            None if start.mins is None else start.mins[part].T.astype(np.float32),
            span.low,
            span.high,
        )
        work(np.ascontiguousarray(weights[part].T), band)
        codes[part], scales[part] = band.codes.T, band.scales.T
        if shifts is not None and band.shifts is not None:
            shifts[part] = band.shifts.T
    return _restore(codes, scales, shifts, start.format)


def _nearest(values: _F32, band: _Work, group: int, inverse: _F32) -> tuple[_F32, _F32]:
    """The codes nearest to one column, and their weights."""
    if band.shifts is None:
        found = np.rint(values * inverse[group])
        np.clip(found, band.low, band.high, out=found)
        return found, found * band.scales[group]
    found = np.rint((values - band.shifts[group]) * inverse[group])
    np.clip(found, band.low, band.high, out=found)
    return found, found * band.scales[group] + band.shifts[group]


def _descend_group(
    damped: _F32,
    diagonal: _F32,
    slope: _F32,
    change: _F32,
    band: _Work,
    group: int,
    scales: bool,
) -> None:
    """One group: its scale, its minimum, then its codes; `slope` and `change` follow."""
    codes = band.codes[group * GROUP : group * GROUP + len(diagonal)]
    if scales:
        curve = np.einsum("kn,kn->n", codes, damped @ codes)
        down = np.einsum("kn,kn->n", codes, slope)
        step = _half_step(band.scales[group], down, curve)
        band.scales[group] += step
        moved = codes * step
        slope += damped @ moved
        change += moved
        if band.shifts is not None:
            total = np.float32(damped.sum())
            step = _half_step(band.shifts[group], slope.sum(axis=0), np.full_like(step, total))
            band.shifts[group] += step
            slope += damped.sum(axis=1)[:, None] * step
            change += step
    scale, inverse = band.scales[group], _reciprocal(band.scales[group])
    for j in range(len(diagonal)):
        # The best real value of this code is where the slope vanishes.
        wanted = codes[j] - slope[j] * (inverse / diagonal[j])
        np.rint(wanted, out=wanted)
        np.clip(wanted, band.low, band.high, out=wanted)
        wanted -= codes[j]
        if not wanted.any():
            continue
        codes[j] += wanted
        wanted *= scale
        change[j] += wanted
        slope += damped[:, j, None] * wanted


def _half_step(value: _F32, down: _F32, curve: _F32) -> _F32:
    """How far to move a half-precision number against its slope; 0 where nothing is gained."""
    step = np.divide(-down, curve, out=np.zeros_like(down), where=curve > 0)
    with np.errstate(over="ignore"):
        moved = (value + step).astype(np.float16).astype(np.float32)
    step = np.where(np.isfinite(moved), moved - value, 0).astype(np.float32)
    better = step * (2 * down + step * curve) < 0
    out: _F32 = np.where(better, step, np.float32(0))
    return out


def _reciprocal(scales: _F32) -> _F32:
    """1 / scale, 0 where a group is all zero."""
    out: _F32 = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > 1e-30)
    return out


def _damped(hessian: _F32, damping: float) -> _F32:
    mean = float(np.diag(hessian).mean())
    if not np.isfinite(hessian).all():
        raise CompressError("the inputs of a matrix are not finite: the calibration text is bad")
    out = hessian.astype(np.float32, copy=True)
    out[np.diag_indices_from(out)] += np.float32(damping * mean if mean > 0 else 1)
    return out


def _inverse_factor(damped: _F32) -> _F32:
    """R, upper triangular with R^T R = H^-1.

    With J the reversal of the order and L the Cholesky factor of J H J, U = J L J is upper
    triangular, H = U U^T, and R = U^-1.
    """
    try:
        lower = np.linalg.cholesky(damped[::-1, ::-1].astype(np.float64))
    except np.linalg.LinAlgError:
        raise CompressError(
            "the inputs of a matrix span too little: calibrate with more text or more damping"
        ) from None
    return _upper_inverse(np.ascontiguousarray(lower[::-1, ::-1])).astype(np.float32)


def _upper_inverse(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(upper)
    if n <= 64:
        return np.triu(np.linalg.inv(upper))
    half = n // 2
    out = np.zeros_like(upper)
    out[:half, :half] = _upper_inverse(upper[:half, :half])
    out[half:, half:] = _upper_inverse(upper[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (upper[:half, half:] @ out[half:, half:])
    return out
