"""`Screen`: what an artifact says of its split head, and which tensors that means.

    screen            [vocab, rank]       4-bit table: a first estimate of every logit
    screen.rest       [vocab, d - rank]   its other columns, row by row: a second estimate of some
    screen.project    [d * d]             from what the head reads to the table's input, row by row
    screen.shift      [d]                 added to that
    screen.mean       [d]                 the mean row of the head, left out of the table
    screen.bias       [vocab]             added to estimates
    screen.spread     [blocks]            how wrong first estimates are, by input left out
    screen.rest_spread [blocks]           ... and second ones, by input rounded

`csrc/fl_head.c` says how they are used, `split_head.py` how they are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import BLOCK_ROWS, GROUP, blocks_of
from flashlite.errors import CompressError

if TYPE_CHECKING:
    from flashlite.model.spec import ModelSpec

__all__ = ["REST", "SCREEN", "Cut", "Screen", "by_row", "screen_shapes"]

SCREEN = "screen"  # the table's stored name, and what the others begin with
REST = "screen.rest"
_KEYS = {"rank", "coarse", "fine", "measured"}
_MOST_REACH = 1000.0  # nats
_MOST_MEASURED = 32  # figures


@dataclass(frozen=True)
class Cut:
    """What goes on to the next stage.

    Attributes:
        reach: what may reach so many nats below the 20th largest estimate.
        limit: at most so many; a row of logits that needs more is computed in full.
    """

    reach: float
    limit: int

    def check(self, n: int) -> None:
        """Refuse what does not fit a vocabulary of so many rows, or blocks.

        Raises:
            CompressError: naming the value and its limits.
        """
        if not 0 <= self.reach <= _MOST_REACH:  # a NaN fails it too
            raise CompressError(f"a screen's reach is {self.reach}, allowed 0 to {_MOST_REACH:g}")
        if not 1 <= self.limit <= n:
            raise CompressError(f"a screen's limit is {self.limit}, allowed 1 to {n}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"reach": self.reach, "limit": self.limit}

    @classmethod
    def from_json(cls, data: object) -> Cut:
        """Read what `to_json` wrote.

        Raises:
            CompressError: it is not a cut.
        """
        if not isinstance(data, dict) or set(data) != {"reach", "limit"}:
            raise CompressError("a screen's cut is not an object of limit and reach")
        if not _is_int(data["limit"]) or not _is_finite(data["reach"]):
            raise CompressError("a screen's limit or reach is not a number")
        return cls(float(data["reach"]), data["limit"])


@dataclass(frozen=True)
class Screen:
    """The constants of a split head, and what was measured when it was made.

    Attributes:
        rank: columns of the table that every logit is first estimated with.
        coarse: rows that are estimated with all columns.
        fine: blocks of 16 rows, around some of these, that are computed exactly.
        measured: figures by name, such as the share of largest logits that were exact.
    """

    rank: int
    coarse: Cut
    fine: Cut
    measured: Mapping[str, float] = field(default_factory=dict)

    def check(self, spec: ModelSpec) -> None:
        """Refuse constants that do not fit the model.

        Raises:
            CompressError: naming the value and its limits.
        """
        if self.rank % GROUP or not GROUP <= self.rank < spec.d_model:
            raise CompressError(
                f"the screen has rank {self.rank}, allowed multiples of {GROUP} below "
                f"{spec.d_model}"
            )
        self.coarse.check(spec.vocab_size)
        self.fine.check(blocks_of(spec.vocab_size))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal screen."""
        return {
            "rank": self.rank,
            "coarse": self.coarse.to_json(),
            "fine": self.fine.to_json(),
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, data: object, spec: ModelSpec) -> Screen:
        """Read what `to_json` wrote and check it against the model.

        Raises:
            CompressError: it is not a screen, or not one for this model.
        """
        if not isinstance(data, dict) or set(data) != _KEYS:
            raise CompressError(f"the screen is not an object of {', '.join(sorted(_KEYS))}")
        rank, measured = data["rank"], data["measured"]
        if not _is_int(rank):
            raise CompressError("the screen's rank is not a whole number")
        if (
            not isinstance(measured, dict)
            or len(measured) > _MOST_MEASURED
            or not all(isinstance(k, str) and _is_finite(v) for k, v in measured.items())
        ):
            raise CompressError("the screen's measured figures are not numbers by name")
        screen = cls(rank, Cut.from_json(data["coarse"]), Cut.from_json(data["fine"]), measured)
        screen.check(spec)
        return screen


def screen_shapes(spec: ModelSpec, screen: Screen) -> dict[str, tuple[int, ...]]:
    """The stored tensors of a screen, in the order they are stored."""
    vocab, d, blocks = spec.vocab_size, spec.d_model, blocks_of(spec.vocab_size)
    return {
        SCREEN: (vocab, screen.rank),
        REST: (vocab, d - screen.rank),
        f"{SCREEN}.project": (d * d,),
        f"{SCREEN}.shift": (d,),
        f"{SCREEN}.mean": (d,),
        f"{SCREEN}.bias": (vocab,),
        f"{SCREEN}.spread": (blocks,),
        f"{SCREEN}.rest_spread": (blocks,),
    }


def by_row(packed: NDArray[Any]) -> NDArray[Any]:
    """Codes or scales of blocks, each row of a block in one piece: how `screen.rest` is stored.

    [blocks, groups, 4, 16, 4 bytes] -> [blocks, 16, groups, 4, 4 bytes], scales likewise; the
    shape stays [blocks, groups, ...].
    """
    blocks, groups, size = packed.shape
    cells = packed.reshape(blocks, groups, -1, BLOCK_ROWS, 4 if size > BLOCK_ROWS else 1)
    return np.ascontiguousarray(cells.transpose(0, 3, 1, 2, 4)).reshape(packed.shape)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False
