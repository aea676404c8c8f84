"""Marks of a profiled library, read as spans of time.

A mark says that a part ended; the part began where the mark before it stands. So the spans of the
calling thread leave no gap: what they add up to is the time of the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import EngineError
from flashlite.runtime.engine import Engine
from flashlite.runtime.library import MARK, MARKS

__all__ = ["CALL", "MarkReader", "Span", "spans_of"]

CALL = "call"
"""What is neither a part of the model nor sampling: arguments, waking threads, the last barrier."""

# `fl_part`, by number; a norm is named after what follows it.
_NORM = "norm"
_NAMES = (
    "begin",
    "embed",
    _NORM,
    "qkv",
    "rope_store",
    "attention",
    "o",
    "gate_up",
    "activation",
    "down",
    "head",
    CALL,
)
_OUTSIDE = ("embed", "head", CALL)  # of the layers


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a step on one thread; times in nanoseconds of the monotonic clock."""

    part: str
    layer: int | None
    start: int
    end: int
    waited: int = 0  # of it, for other threads


class MarkReader:
    """Takes the marks of all threads after a step; its memory is made once."""

    def __init__(self, engine: Engine) -> None:
        """Forget the marks that are there.

        Raises:
            EngineError: the engine's library was not built to be profiled.
        """
        self._engine = engine
        self._buffer = np.zeros(MARKS, MARK)
        self.lost = 0
        self.take()
        self.lost = 0

    def take(self) -> list[NDArray[np.void]]:
        """The marks since the last call, by thread."""
        found = []
        for thread in range(self._engine.threads):
            marks, lost = self._engine.read_marks(thread, self._buffer)
            found.append(marks.copy())
            self.lost += lost
        return found


def spans_of(marks: NDArray[np.void]) -> list[Span]:
    """One thread's marks as spans, in order; a step whose beginning was lost is left out.

    Raises:
        EngineError: a part is unknown: library and caller are of different versions.
    """
    found: list[Span] = []
    start: int | None = None
    for part, layer, end, waited in _rows(marks):
        if part == 0:
            start = end
            continue
        if start is None:
            continue
        if part >= len(_NAMES):
            raise EngineError(f"the library marks a part {part} that is not known; compile it anew")
        name = _NAMES[part]
        if found and name != _NORM and found[-1].part == _NORM:
            before = found.pop()
            norm = "attn_norm" if name == "qkv" else "ffn_norm"
            found.append(Span(norm, before.layer, before.start, before.end, before.waited))
        found.append(Span(name, None if name in _OUTSIDE else layer, start, end, waited))
        start = end
    return found


def _rows(marks: NDArray[np.void]) -> Iterable[tuple[int, int, int, int]]:
    columns = (marks[name].tolist() for name in ("part", "layer", "end", "waited"))
    return zip(*columns, strict=True)
