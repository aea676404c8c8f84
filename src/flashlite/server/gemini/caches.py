"""Cached contents: beginnings of conversations that requests name instead of repeating.

    create ── first token ──> KV pages in the prefix cache      generateContent ──> found there

What is kept here is the text; the pages are the prefix cache's, which gives them up where memory
is needed for answers. They are then computed again, and `cachedContentTokenCount` says what was
found. Nothing outlives the server.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from flashlite.errors import BodyError, MemoryCeiling
from flashlite.server.gemini.bodies import CacheRequest
from flashlite.server.gemini.decode import Beginning

__all__ = ["Cached", "Caches", "expiry"]

_DEFAULT_TTL = 3600.0  # seconds
_MOST = 64  # of all owners
_MOST_CHARACTERS = 4 << 20
_FRACTION = re.compile(r"\.(\d{1,6})\d*")


@dataclass(frozen=True)
class Cached:
    """One cached content; times in seconds since 1970."""

    name: str  # cachedContents/...
    owner: str  # who may use it: the name of a key
    model: str
    display_name: str
    beginning: Beginning
    tokens: int  # with those of the template
    created: float
    updated: float
    expires: float

    @property
    def wire(self) -> dict[str, Any]:
        """As Gemini shows it: without its text."""
        return {
            "name": self.name,
            "model": f"models/{self.model}",
            "displayName": self.display_name,
            "createTime": _written(self.created),
            "updateTime": _written(self.updated),
            "expireTime": _written(self.expires),
            "usageMetadata": {"totalTokenCount": self.tokens},
        }

    @property
    def characters(self) -> int:
        """Of the text."""
        return sum(len(turn.text) for turn in self.beginning.turns)


class Caches:
    """The cached contents of a server, each seen by its owner alone, until it expires."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970."""
        self._clock = clock
        self._kept: dict[str, Cached] = {}

    @property
    def now(self) -> float:
        """Seconds since 1970."""
        return self._clock()

    def add(
        self,
        beginning: Beginning,
        *,
        owner: str,
        model: str,
        display_name: str,
        tokens: int,
        expires: float,
    ) -> Cached:
        """Keep a beginning whose pages were computed.

        Raises:
            MemoryCeiling: too many are kept, or too much text.
        """
        now = self._live()
        name = f"cachedContents/{secrets.token_hex(12)}"
        made = Cached(name, owner, model, display_name, beginning, tokens, now, now, expires)
        if len(self._kept) >= _MOST:
            raise MemoryCeiling(f"{_MOST} cached contents are kept; delete one")
        if made.characters + sum(c.characters for c in self._kept.values()) > _MOST_CHARACTERS:
            raise MemoryCeiling(
                f"cached contents would hold more than {_MOST_CHARACTERS} characters; delete one"
            )
        self._kept[name] = made
        return made

    def find(self, name: str, owner: str) -> Cached | None:
        """By name; None: there is none, it has expired, or it is another's."""
        self._live()
        found = self._kept.get(name)
        return found if found is not None and found.owner == owner else None

    def of(self, owner: str) -> list[Cached]:
        """All of one owner, the oldest first."""
        self._live()
        return [cached for cached in self._kept.values() if cached.owner == owner]

    def extend(self, cached: Cached, expires: float) -> Cached:
        """Let it end at another time."""
        made = dataclasses.replace(cached, updated=self._live(), expires=expires)
        self._kept[cached.name] = made
        return made

    def remove(self, cached: Cached) -> None:
        """Forget it."""
        self._kept.pop(cached.name, None)

    def _live(self) -> float:
        """The time; what has expired by now is gone."""
        now = self._clock()
        self._kept = {name: c for name, c in self._kept.items() if c.expires > now}
        return now


def expiry(asked: CacheRequest, now: float, *, default: bool) -> float:
    """When a cached content ends.

    Args:
        asked: its `ttl` or `expireTime`.
        now: seconds since 1970.
        default: where neither is given, it is an hour, not an error.

    Raises:
        BodyError: the time cannot be read, has passed, or is missing.
    """
    if asked.ttl is not None and asked.expire_time is not None:
        raise BodyError("ttl", "send one of ttl and expireTime")
    if asked.expire_time is not None:
        try:
            text = _FRACTION.sub(lambda m: f".{m[1]:0<6}", asked.expire_time).replace("Z", "+00:00")
            when = datetime.fromisoformat(text)
            expires = when.timestamp() if when.tzinfo else 0.0
        except (ValueError, OverflowError):
            expires = 0.0
        if expires <= now:
            raise BodyError(
                "expireTime",
                f"expireTime is {asked.expire_time[:40]!r}, give a time to come with its zone, as "
                "2030-01-31T12:00:00Z",
            )
        return expires
    if asked.ttl is None:
        if not default:
            raise BodyError("ttl", "nothing to change: send ttl or expireTime")
        return now + _DEFAULT_TTL
    seconds = float(asked.ttl.removesuffix("s"))
    if seconds <= 0:
        raise BodyError("ttl", f"ttl is {asked.ttl!r}, give seconds above 0, as 300s")
    return now + seconds


def _written(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, timezone.utc)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")
