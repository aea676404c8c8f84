"""KV pages: which page of the arena holds which 32 tokens of which sequence.

Nothing grows at run time: the arena has `n_pages`, and each of them is

    blank    nobody's, its bytes mean nothing
    own      one sequence's, written by it alone
    shared   full and in the tree: read by any sequence whose text begins so, written by none
    idle     shared, and used by nobody at present: free for whoever needs room

    blank -- take --> own -- publish --> shared <-- hold, leave --> idle -- evict --> blank
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import EngineError, MemoryCeiling
from flashlite.runtime.library import PAGE_TOKENS
from flashlite.runtime.prefixtree import Node, PrefixTree

__all__ = ["PagePool", "PageTable", "pages_for"]


class PagePool:
    """The free pages of one arena: the blank ones, then the idle ones, the longest idle first."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.tree = PrefixTree()
        self._blank = list(range(n_pages - 1, -1, -1))  # low ids are taken first

    @property
    def free(self) -> int:
        """Pages that a sequence may have."""
        return len(self._blank) + self.tree.idle

    def take(self) -> int:
        """One page.

        Raises:
            MemoryCeiling: all pages are taken.
        """
        if self._blank:
            return self._blank.pop()
        if self.tree.idle:
            return self.tree.evict()
        raise MemoryCeiling(
            f"all {self.n_pages} KV pages ({self.n_pages * PAGE_TOKENS} tokens) are in use; "
            "raise max_mem or run fewer sequences"
        )

    def give_back(self, pages: list[int]) -> None:
        """Return a sequence's own pages; each must have been taken."""
        self._blank.extend(reversed(pages))

    def check_integrity(self) -> None:
        """Prove that no page has two places.

        Raises:
            EngineError: one does.
        """
        shared = list(self.tree.nodes())
        pages = [*self._blank, *(node.page for node in shared)]
        if len(set(pages)) != len(pages):
            raise EngineError("a KV page was given back twice")
        if self.tree.idle != sum(not node.users for node in shared):
            raise EngineError("a KV page without users is not idle")
        for node in shared:
            if node.users < max((child.users for child in node.children.values()), default=0):
                raise EngineError("a KV page has fewer users than the page that follows it")


class PageTable:
    """The pages of one sequence, in order of position: shared ones, then its own."""

    def __init__(self, pool: PagePool, max_tokens: int) -> None:
        self._pool = pool
        self._path: list[Node] = []
        self._own: list[int] = []
        self.max_tokens = max_tokens
        self.ids: NDArray[np.int32] = np.full(pages_for(max_tokens), -1, np.int32)

    @property
    def shared(self) -> int:
        """Pages at the beginning that this sequence may read and not write."""
        return len(self._path)

    def reserve(self, n_tokens: int, beginning: bytes = b"") -> None:
        """Make positions 0 .. n_tokens - 1 storable; a failure takes nothing.

        Args:
            n_tokens: at most `max_tokens`.
            beginning: token ids, int32, of which whole pages that are in the tree are taken from
                there; nothing was reserved before.

        Raises:
            MemoryCeiling: the arena has not enough free pages.
        """
        pool = self._pool
        path = pool.tree.find(beginning) if beginning else []
        missing = pages_for(n_tokens) - len(self._path) - len(self._own) - len(path)
        # The idle ones among the shared are free until they are held.
        free = pool.free - sum(not node.users for node in path)
        if missing > free:
            raise MemoryCeiling(
                f"{missing} more KV pages are needed and {free} of {pool.n_pages} are free; "
                "raise max_mem or run fewer sequences"
            )
        for node in path:
            self._append(node, prompt=True)
        for _ in range(missing):
            page = pool.take()
            self.ids[len(self._path) + len(self._own)] = page
            self._own.append(page)

    def adopt(self, tokens: bytes) -> bool:
        """Take the next page, which holds these 32 ids of a prompt, from the tree instead of
        writing it; False: it is not there.
        """
        found = self._pool.tree.find(tokens, self._last)
        if found:
            self._pool.give_back([self._own.pop(0)])  # reserved for it, and not needed after all
            self._append(found[0], prompt=True)
        return bool(found)

    def publish(self, tokens: bytes, *, prompt: bool) -> None:
        """Share the first of the own pages, which holds these 32 ids and is not written again.

        When another sequence was first, its page takes the place of this one: their bytes are
        equal, since they depend on the ids alone.
        """
        page = self._own.pop(0)
        found = self._pool.tree.find(tokens, self._last)
        if found:
            self._pool.give_back([page])
            self._append(found[0], prompt=prompt)
        else:
            self._append(self._pool.tree.insert(self._last, tokens, page), prompt=prompt)

    def release(self) -> None:
        """Give all pages back; calling it again does nothing."""
        self._pool.give_back(self._own)
        self._pool.tree.leave(self._path)
        self._own, self._path = [], []
        self.ids[:] = -1

    def _append(self, node: Node, *, prompt: bool) -> None:
        self._pool.tree.hold(node)
        node.prompts += prompt
        self.ids[len(self._path)] = node.page
        self._path.append(node)

    @property
    def _last(self) -> Node:
        return self._path[-1] if self._path else self._pool.tree.root


def pages_for(n_tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-n_tokens // PAGE_TOKENS)
