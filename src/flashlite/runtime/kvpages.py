"""KV pages: which page of the arena holds which 32 tokens of which sequence.

Nothing grows at run time: the arena has `n_pages`, a sequence takes pages as it gets longer and
gives them all back at its end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import EngineError, MemoryCeiling
from flashlite.runtime.library import PAGE_TOKENS

__all__ = ["PagePool", "PageTable", "pages_for"]


class PagePool:
    """The free pages of one arena."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))  # low ids are taken first

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """One page.

        Raises:
            MemoryCeiling: all pages are taken.
        """
        if not self._free:
            raise MemoryCeiling(
                f"all {self.n_pages} KV pages ({self.n_pages * PAGE_TOKENS} tokens) are in use; "
                "raise max_mem or run fewer sequences"
            )
        return self._free.pop()

    def give_back(self, pages: list[int]) -> None:
        """Return pages; each must have been taken."""
        self._free.extend(reversed(pages))

    def check_integrity(self) -> None:
        """Prove that no page is free twice.

        Raises:
            EngineError: it is.
        """
        if len(set(self._free)) != len(self._free):
            raise EngineError("a KV page was given back twice")


class PageTable:
    """The pages of one sequence, in order of position."""

    def __init__(self, pool: PagePool, max_tokens: int) -> None:
        self._pool = pool
        self._held: list[int] = []
        self.max_tokens = max_tokens
        self.ids: NDArray[np.int32] = np.full(pages_for(max_tokens), -1, np.int32)

    def reserve(self, n_tokens: int) -> None:
        """Make positions 0 .. n_tokens - 1 storable; a failure takes nothing.

        Raises:
            MemoryCeiling: the arena has not enough free pages.
        """
        missing = pages_for(n_tokens) - len(self._held)
        if missing > self._pool.free:
            self._pool_short(missing)
        for _ in range(missing):
            page = self._pool.take()
            self.ids[len(self._held)] = page
            self._held.append(page)

    def release(self) -> None:
        """Give all pages back; calling it again does nothing."""
        self._pool.give_back(self._held)
        self._held = []
        self.ids[:] = -1

    def _pool_short(self, missing: int) -> None:
        raise MemoryCeiling(
            f"{missing} more KV pages are needed and {self._pool.free} of {self._pool.n_pages} "
            "are free; raise max_mem or run fewer sequences"
        )


def pages_for(n_tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-n_tokens // PAGE_TOKENS)
