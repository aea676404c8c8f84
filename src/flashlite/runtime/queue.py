"""Who waits, and whose turn it is."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served for each client, and the clients take turns.

    However many items one client adds, an item of another waits for one turn of each client that
    was there before.

    Example:
        queue = FairQueue()
        queue.push("a", 1); queue.push("a", 2); queue.push("b", 3)
        [queue.pop() for _ in range(3)]  # [1, 3, 2]
    """

    def __init__(self) -> None:
        self._turns: OrderedDict[str, deque[T]] = OrderedDict()
        self._lock = threading.Lock()

    def push(self, client: str, item: T) -> None:
        """Append an item to its client's line."""
        with self._lock:
            self._turns.setdefault(client, deque()).append(item)

    def head(self) -> T:
        """The item that `pop` would take; there must be one."""
        with self._lock:
            return next(iter(self._turns.values()))[0]

    def pop(self) -> T:
        """Take the next item; its client's next turn comes after all others'."""
        with self._lock:
            client, line = self._turns.popitem(last=False)
            item = line.popleft()
            if line:
                self._turns[client] = line
            return item

    def discard(self, client: str, item: T) -> None:
        """Remove an item, if it waits."""
        with self._lock:
            line = self._turns.get(client)
            if line is not None and item in line:
                line.remove(item)
                if not line:
                    del self._turns[client]

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._turns.values()))
