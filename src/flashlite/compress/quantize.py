"""Turn float weights into codes and half-precision scales, one group of 32 columns at a time.

Rounding to the nearest code under the scale max|w| / qmax is the plain way. Here each group tries
about twenty scales around it; for each the codes are rounded, the scale (and the minimum) that
fits these codes best follows in closed form, and the choice with the least squared error is
polished with its scale already rounded to half precision, as it will be stored.

With an importance per column, the mean square of what the column multiplies, errors are counted
with this weight: the scale then suits the weights that are read most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import CODE_DTYPE, GROUP, ZERO, Quantized, groups_of
from flashlite.errors import CompressError

__all__ = ["CODES", "HALF_MAX", "Codes", "quantize_matrix", "to_half"]

HALF_MAX = 65504.0  # the largest finite half-precision number

_F32 = NDArray[np.float32]
_Fit = tuple[_F32, _F32, _F32 | None]  # codes [k, n] less their zero, scales [n], mins [n] or None
_CHUNK = 1 << 15  # weights searched at once: their few temporaries stay in the level-2 cache
_POLISH = 2  # rounds of re-rounding and re-fitting after the best start is known


@dataclass(frozen=True)
class Codes:
    """The codes of a format: a weight is scale * (stored - zero), plus the minimum if it has one.

    `low` and `high` bound stored - zero.
    """

    low: int
    high: int
    zero: int
    minimum: bool = False


CODES: dict[str, Codes] = {
    "q8": Codes(-127, 127, 0),
    "q6": Codes(-32, 31, ZERO["q6"]),
    "q5": Codes(-16, 15, ZERO["q5"]),
    "q4": Codes(-8, 7, ZERO["q4"]),
    "q4m": Codes(0, 15, 0, minimum=True),
}


def quantize_matrix(
    weights: _F32, fmt: str, *, name: str = "weights", importance: _F32 | None = None
) -> Quantized:
    """Quantize a matrix [rows, cols] to a packed format.

    Columns of a short last group are padded with code zero and do not bend its scale.

    Args:
        weights: the matrix.
        fmt: one of `CODES`.
        name: for messages.
        importance: [cols] weight of each column's squared error, not below 0; None: all equal.

    Raises:
        CompressError: a weight is not finite, or a scale or minimum exceeds half precision
            (65504); the message names the tensor.
    """
    rows, cols = weights.shape
    groups = groups_of(cols)
    codes = np.full((rows, groups * GROUP), ZERO[fmt], CODE_DTYPE[fmt])
    scales = np.empty((rows, groups), np.float16)
    mins = np.empty((rows, groups), np.float16) if fmt == "q4m" else None
    for band, first, last in _parts(rows, cols):
        low, high = first * GROUP, min(cols, last * GROUP)
        block = weights[band, low:high]
        height, width = block.shape[0], (high - low) // (last - first)
        # [k, n]: a group is a column, so every sum over a group is a sum of whole vectors.
        columns = np.ascontiguousarray(block.reshape(-1, width).T, dtype=np.float32)
        if not np.isfinite(columns).all():
            raise CompressError(f"tensor {name} holds a weight that is not finite")
        counted = None
        if importance is not None:
            counted = _counted(importance[low:high].reshape(-1, width), columns.shape)
        found, scale, minimum = _SEARCH[fmt](columns, counted)
        codes[band, low:high] = found.T.reshape(height, high - low) + np.float32(ZERO[fmt])
        scales[band, first:last] = to_half(scale, name).reshape(height, -1)
        if mins is not None and minimum is not None:
            mins[band, first:last] = to_half(minimum, name).reshape(height, -1)
    return Quantized(fmt, codes, scales, mins)


def to_half(values: _F32, name: str) -> NDArray[np.float16]:
    """Round to half precision.

    Raises:
        CompressError: a value is too large for it, naming the tensor and the value.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        worst = float(np.abs(values).max())
        raise CompressError(
            f"tensor {name} needs {worst:.6g} in half precision, which holds at most "
            f"{HALF_MAX:.0f}; scale the weights of the source down"
        )
    return half


def _parts(rows: int, cols: int) -> Iterator[tuple[slice, int, int]]:
    """(band of rows, first group, last group + 1): the short last group stands alone."""
    whole, groups = cols // GROUP, groups_of(cols)
    for first, last in ((0, whole), (whole, groups)):
        if first == last:
            continue
        width = min(cols, last * GROUP) - first * GROUP
        step = max(1, _CHUNK // width)
        for row in range(0, rows, step):
            yield slice(row, row + step), first, last


def _symmetric(w: _F32, low: int, high: int, starts: _F32, a: _F32 | None = None) -> _Fit:
    """Fit w ~ s * q with q in low..high; w is [k, n], one group per column.

    The scale takes the sign that puts the largest weight on the longer side of the range.
    """
    peak = np.take_along_axis(w, np.abs(w).argmax(axis=0)[None], axis=0)[0] / np.float32(low)
    q, gain = np.empty_like(w), np.zeros_like(peak)
    best = peak.copy()
    aw = w if a is None else a * w
    least = np.float32(1 if a is None else 1e-12)  # a sum of squared codes is 0 or above this
    for start in starts:
        _round(w, peak * start, None, low, high, q)
        qw, qq = _dot(q, aw), _dot(q, q, a)
        # The best scale for these codes is qw / qq; it removes qw^2 / qq of the squared error.
        better = qw * qw > gain * qq
        ratio = qw / np.maximum(qq, least)
        np.copyto(gain, qw * ratio, where=better)
        np.copyto(best, ratio, where=better)
    plain = _half(peak)
    for _ in range(_POLISH):
        _round(w, _half(best), None, low, high, q)
        qq = _dot(q, q, a)
        np.copyto(best, _dot(q, aw) / np.maximum(qq, least), where=qq > 0)
    scale = _half(best)
    _round(w, scale, None, low, high, q)
    rounded = np.empty_like(w)
    _round(w, plain, None, low, high, rounded)
    worse = _error(w, q, scale, None, a) > _error(w, rounded, plain, None, a)
    np.copyto(q, rounded, where=worse)
    return q, np.where(worse, plain, scale), None


def _affine(w: _F32, high: int, starts: _F32, a: _F32 | None = None) -> _Fit:
    """Fit w ~ s * q + m with q in 0..high; w is [k, n], one group per column."""
    k = np.float32(w.shape[0])  # also the sum of a
    bottom, top = w.min(axis=0), w.max(axis=0)
    step, centre = (top - bottom) / np.float32(high), (top + bottom) / 2
    mean = w.mean(axis=0) if a is None else _dot(w, a) / k
    centred = w - mean
    if a is not None:
        centred *= a
    flattest = np.float32(0.5 if a is None else 1e-6)
    q, gain = np.empty_like(w), np.zeros_like(step)
    best, least = step.copy(), bottom.copy()
    for start in starts:
        scale = step * start
        _round(w, scale, centre - scale * np.float32(high / 2), 0, high, q)
        total = q.sum(axis=0) if a is None else _dot(q, a)
        # Least squares of a line through (q, w): with w centred only the spread of q counts.
        qw, spread = _dot(q, centred), _dot(q, q, a) - total * total / k
        better = (qw * qw > gain * spread) & (spread > flattest / 2)
        ratio = qw / np.maximum(spread, flattest)
        np.copyto(gain, qw * ratio, where=better)
        np.copyto(best, ratio, where=better)
        np.copyto(least, mean - ratio * total / k, where=better)
    for _ in range(_POLISH):
        _round(w, _half(best), _half(least), 0, high, q)
        total = q.sum(axis=0) if a is None else _dot(q, a)
        spread = _dot(q, q, a) - total * total / k
        flat = spread < flattest
        np.copyto(best, _dot(q, centred) / np.maximum(spread, flattest), where=~flat)
        least = mean - _half(best) * total / k
    scale, minimum = _half(best), _half(least)
    _round(w, scale, minimum, 0, high, q)
    rounded, plain, floor = np.empty_like(w), _half(step), _half(bottom)
    _round(w, plain, floor, 0, high, rounded)
    worse = _error(w, q, scale, minimum, a) > _error(w, rounded, plain, floor, a)
    np.copyto(q, rounded, where=worse)
    return q, np.where(worse, plain, scale), np.where(worse, floor, minimum)


def _counted(importance: _F32, shape: tuple[int, ...]) -> _F32:
    """The weight of every value of a band, [k, n], with mean 1 in each group."""
    mean = importance.mean(axis=1, keepdims=True)
    usable = np.isfinite(mean) & (mean > 0)
    share = np.where(usable, importance / np.where(usable, mean, 1), 1).astype(np.float32)
    return np.ascontiguousarray(np.tile(share, (shape[1] // len(share), 1)).T)


def _round(w: _F32, scale: _F32, shift: _F32 | None, low: int, high: int, out: _F32) -> None:
    """Write out = clip(round((w - shift) / scale)); all zero where the scale is (nearly) zero."""
    usable = np.abs(scale) > 1e-30
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=usable)
    if shift is None:
        np.multiply(w, inverse, out=out)
    else:
        np.subtract(w, shift, out=out)
        np.multiply(out, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, low, high, out=out)


def _dot(a: _F32, b: _F32, weight: _F32 | None = None) -> _F32:
    out: _F32 = np.einsum("kn,kn->n", a if weight is None else a * weight, b)
    return out


def _error(w: _F32, q: _F32, scale: _F32, shift: _F32 | None, weight: _F32 | None = None) -> _F32:
    rest = q * scale
    if shift is not None:
        rest += shift
    rest -= w
    return _dot(rest, rest, weight)


def _half(values: _F32) -> _F32:
    """Rounded to half precision, as it will be stored; too large ones stay for `to_half`."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(rounded), rounded, values)


def _search_q8(w: _F32, a: _F32 | None) -> _Fit:
    return _symmetric(w, -127, 127, _STARTS_Q8, a)


def _search_q6(w: _F32, a: _F32 | None) -> _Fit:
    return _symmetric(w, -32, 31, _STARTS_Q6, a)


def _search_q5(w: _F32, a: _F32 | None) -> _Fit:
    return _symmetric(w, -16, 15, _STARTS_Q5, a)


def _search_q4(w: _F32, a: _F32 | None) -> _Fit:
    return _symmetric(w, -8, 7, _STARTS_Q4, a)


def _search_q4m(w: _F32, a: _F32 | None) -> _Fit:
    return _affine(w, 15, _STARTS_Q4M, a)


# With 255 codes more starts gain less than 1 % of the error, and they clip the largest weights.
_STARTS_Q8 = np.ones(1, np.float32)
_STARTS_Q6 = np.linspace(0.90, 1.1, 20, dtype=np.float32)  # of max|w| / 32
_STARTS_Q5 = np.linspace(0.80, 1.2, 20, dtype=np.float32)  # of max|w| / 16
_STARTS_Q4 = np.linspace(0.75, 1.2, 20, dtype=np.float32)  # of max|w| / 8
_STARTS_Q4M = np.linspace(0.70, 1.05, 20, dtype=np.float32)  # of (max - min) / 15
_SEARCH: dict[str, Callable[[_F32, _F32 | None], _Fit]] = {
    "q8": _search_q8,
    "q6": _search_q6,
    "q5": _search_q5,
    "q4": _search_q4,
    "q4m": _search_q4m,
}
