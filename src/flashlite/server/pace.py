"""What a step of this server takes, learned from the steps it has made.

    seconds = fixed + a * prompt + b * reach + c * decoding + d * depth        (`Shape`)

Least squares over relative errors with exponential forgetting: the last hundred or two steps count.
A coefficient that nothing speaks of at present (no prompt came for a minute) stays what it was.
Outliers are clipped before they are learned. How far steps lie above their prediction is kept
apart, as a quantile: the sum of many steps asks for the mean, the next step for its worst case.

Pure: shapes and seconds in, seconds out, no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.latency import CALL, part_seconds
from flashlite.compress.machine_profile import MachineProfile
from flashlite.compress.plan import Plan
from flashlite.compress.work import step_parts
from flashlite.model.spec import ModelSpec

__all__ = ["Pace", "Quantile", "Shape", "seed_of"]

_UNITS = (1.0, 64.0, 64.0 * 512.0, 1.0, 512.0)  # of fixed, prompt, reach, decoding, depth: near one
_KEEP = 0.99  # weight of what was learned after one more step
_STAY = 0.05  # weight of the cost known before, in steps
_CLIP = 4.0  # a step counts as at most so many times its prediction, and at least its inverse
_TRUSTED = 16  # steps after which clipping begins
_REFIT = 8  # steps between solutions from then on
_WINDOW = 256  # values of which a quantile is taken
_WORST = 0.98  # of the ratios of steps to their predictions


class Shape(NamedTuple):
    """What one engine step computes."""

    prompt: int = 0  # prompt tokens
    reach: float = 0.0  # positions stored before each of these, all together
    decoding: int = 0  # sequences that decode
    depth: float = 0.0  # positions stored before their tokens, all together

    @classmethod
    def chunk(cls, first: int, tokens: int) -> Shape:
        """A piece of a prompt whose first token stands at position `first`."""
        return cls(tokens, tokens * (first + tokens / 2))


class Quantile:
    """A quantile of the last values that came."""

    def __init__(self, share: float, start: float) -> None:
        """`start` counts as a tenth of the window until values push it out."""
        self._share = share
        self._values = deque([start] * (_WINDOW // 10))
        self._ordered = list(self._values)

    def note(self, value: float) -> None:
        """Learn one value."""
        if len(self._values) == _WINDOW:
            del self._ordered[bisect_left(self._ordered, self._values.popleft())]
        self._values.append(value)
        insort(self._ordered, value)

    @property
    def value(self) -> float:
        """The quantile."""
        return self._ordered[min(len(self._ordered) - 1, int(self._share * len(self._ordered)))]


class Pace:
    """The time of steps of one engine."""

    def __init__(self, seed: Iterable[tuple[Shape, float]] = ()) -> None:
        """`seed`: steps with their seconds, measured before or predicted (`seed_of`)."""
        self._cost = (0.0,) * len(_UNITS)  # seconds per unit of each feature
        self._squares: NDArray[np.float64] = np.zeros((len(_UNITS), len(_UNITS)))
        self._products: NDArray[np.float64] = np.zeros(len(_UNITS))
        self._largest: NDArray[np.float64] = np.full(len(_UNITS), 1e-9)
        self._ratios = Quantile(_WORST, 1.25)
        self._steps = 0
        for shape, seconds in seed:
            self.note(shape, seconds)

    @property
    def known(self) -> bool:
        """A step has been seen; before, every prediction is 0."""
        return self._steps > 0

    def note(self, shape: Shape, seconds: float) -> None:
        """Learn from one step; what is no time (a clock that jumped) is left out."""
        if not 0 < seconds < math.inf:
            return
        expected = self.step(shape)
        if self._steps >= _TRUSTED and expected > 0:
            self._ratios.note(seconds / expected)
            seconds = min(max(seconds, expected / _CLIP), expected * _CLIP)
        else:
            expected = seconds
        row = np.array((1.0, *shape)) / _UNITS / expected
        self._squares = self._squares * _KEEP + np.outer(row, row)
        self._products = self._products * _KEEP + row * (seconds / expected)
        self._largest = np.maximum(self._largest, row * row)
        self._steps += 1
        if self._steps < _TRUSTED or self._steps % _REFIT == 0:
            self._solve()

    def step(self, shape: Shape) -> float:
        """Expected seconds of a step."""
        fixed, a, b, c, d = self._cost
        prompt, reach, decoding, depth = shape
        return (
            fixed
            + a * prompt / _UNITS[1]
            + b * reach / _UNITS[2]
            + c * decoding
            + d * depth / _UNITS[4]
        )

    def at_most(self, shape: Shape) -> float:
        """Seconds that a step does not exceed, but for one in fifty."""
        return self.step(shape) * self._ratios.value

    def _solve(self) -> None:
        """The costs that explain what was seen; none is below zero."""
        known = np.array(self._cost)
        stay = _STAY * self._largest
        squares = self._squares + np.diag(stay)
        products = self._products + stay * known
        cost = np.zeros(len(_UNITS))
        free = list(range(len(_UNITS)))
        while free:
            found = np.linalg.solve(squares[np.ix_(free, free)], products[free])
            if found.min() >= 0:
                cost[free] = found
                break
            del free[int(found.argmin())]
        self._cost = tuple(cost.tolist())


def seed_of(
    spec: ModelSpec, plan: Plan, machine: MachineProfile, *, threads: int | None = None
) -> Iterator[tuple[Shape, float]]:
    """Steps that a measured machine is predicted to make, as the seed of a `Pace`.

    Args:
        spec: the model.
        plan: how its tensors are stored.
        machine: what the machine does per second.
        threads: of the engine; None: the most that were measured.

    Raises:
        CompressError: a format of the plan, or the number of threads, was not measured.
    """
    rates = machine.of(threads)
    parts = step_parts(spec, plan)
    call = rates.fixed_us.get(CALL, 0.0) / 1e6

    def prefill(tokens: int, first: int) -> float:
        last = ("head", "sampling")  # of one row only
        return call + sum(
            part_seconds(part, rates, 1 if part.name in last else tokens, first) for part in parts
        )

    def decode(together: int, depth: int) -> float:
        return call + sum(
            together * part_seconds(part, rates, 1, depth)  # each over pages of its own
            if part.heads
            else part_seconds(part, rates, together, depth)
            for part in parts
        )

    for depth in (64, 512, 2048):
        for tokens in (16, 64, 256):
            yield Shape.chunk(depth, tokens), prefill(tokens, depth)
        for together in (1, 2, 4, 8):
            yield Shape(0, 0, together, together * depth), decode(together, depth)
