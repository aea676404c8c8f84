"""Which pages of the arena hold which tokens, as a tree of pages.

A child holds the 32 tokens that follow its parent's, so a path from the root is a text, and what a
page holds depends on that path alone:

    root -- [You are a helpful ...] -- [... assistant. Q: ...]
                                    \\- [... translator. Q: ...]

Token ids are compared, never only a hash of them. A page with users belongs to running sequences;
one without is idle: it stays as it is until somebody asks for its tokens, or for room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flashlite.errors import EngineError
from flashlite.runtime.library import PAGE_TOKENS

__all__ = ["PAGE_KEY", "Node", "Prefix", "PrefixTree", "prefix_of"]

PAGE_KEY = PAGE_TOKENS * 4  # bytes of a page's token ids


class Prefix(NamedTuple):
    """The beginning of a text: whole pages."""

    ids: bytes  # int32, PAGE_TOKENS to a page
    pages: list[int]  # of the arena


class Node:
    """One full page: its tokens, where it lies, and who needs it."""

    __slots__ = ("children", "page", "parent", "prompts", "stamp", "tokens", "users")

    def __init__(self, parent: Node | None, tokens: bytes, page: int) -> None:
        self.parent = parent
        self.tokens = tokens  # PAGE_TOKENS int32
        self.page = page  # of the arena; -1: the root
        self.children: dict[bytes, Node] = {}
        self.users = 0  # running sequences; a page's users also use its parent
        self.prompts = 0  # how many prompts began with the text that ends here
        self.stamp = 0  # when it was last taken up or left


class PrefixTree:
    """Full pages by their text."""

    def __init__(self) -> None:
        self.root = Node(None, b"", -1)
        # From the longest idle. A child is left before its parent, so the first is always a leaf.
        self._idle: OrderedDict[int, Node] = OrderedDict()  # by page
        self._clock = 0

    @property
    def idle(self) -> int:
        """Pages that nobody uses: each can be evicted."""
        return len(self._idle)

    def find(self, tokens: bytes, after: Node | None = None) -> list[Node]:
        """The pages that hold the beginning of a text, as many as there are.

        Args:
            tokens: int32 ids; what follows the last whole page is not looked at.
            after: the page before the first of them; None: the text begins there.
        """
        node, path = after or self.root, []
        for at in range(0, len(tokens) - PAGE_KEY + 1, PAGE_KEY):
            found = node.children.get(tokens[at : at + PAGE_KEY])
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def hold(self, node: Node) -> None:
        """Count one more user; its parent's users must count the same one."""
        node.users += 1
        self._touch(node)
        self._idle.pop(node.page, None)

    def leave(self, path: Sequence[Node]) -> None:
        """Count one user less for every page of a path from the root.

        Raises:
            EngineError: a page had no users.
        """
        for node in reversed(path):
            if node.users < 1:
                raise EngineError("a shared KV page was given back twice")
            node.users -= 1
            self._touch(node)
            if not node.users:
                self._idle[node.page] = node

    def insert(self, parent: Node, tokens: bytes, page: int) -> Node:
        """Make a page known that holds `tokens` after `parent`; its writer holds it next."""
        node = Node(parent, tokens, page)
        parent.children[tokens] = node
        return node

    def evict(self) -> int:
        """Forget the page that was idle for longest, a leaf; returns its number.

        Raises:
            EngineError: no page is idle.
        """
        if not self._idle:
            raise EngineError("no KV page is idle")
        page, node = self._idle.popitem(last=False)
        if node.children or node.parent is None:
            raise EngineError("a KV page was evicted before the pages that follow it")
        del node.parent.children[node.tokens]
        return page

    def nodes(self) -> Iterator[Node]:
        """Every page, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def frequent(self, least: int, once: int) -> list[Prefix]:
        """The beginnings of prompts that are worth keeping, the latest first.

        Args:
            least: tokens below which one is not worth it.
            once: how many to take, the latest ones, of those that only one prompt began with.

        None is the beginning of another.
        """
        single = sorted((n for n in self._ends(1) if n.prompts == 1), key=_stamp, reverse=True)
        chosen, covered = [], set[Node]()
        for node in [*single[:once], *self._ends(2)]:
            path = _path_to(node)
            if node not in covered and len(path) * PAGE_TOKENS >= least:
                covered.update(path)
                chosen.append(node)
        chosen.sort(key=_stamp, reverse=True)
        return [prefix_of(_path_to(node)) for node in chosen]

    def _ends(self, prompts: int) -> list[Node]:
        """The last pages that at least so many prompts began with."""
        return [
            node
            for node in self.nodes()
            if node.prompts >= prompts
            and not any(child.prompts >= prompts for child in node.children.values())
        ]

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.stamp = self._clock


def _path_to(node: Node) -> list[Node]:
    """From the first page to this one."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def prefix_of(path: Sequence[Node]) -> Prefix:
    """The text of a path from the root, and its pages."""
    return Prefix(b"".join(node.tokens for node in path), [node.page for node in path])


def _stamp(node: Node) -> int:
    return node.stamp
