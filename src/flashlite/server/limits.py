"""How much a client may ask: requests per second, tokens per minute, requests at a time.

    address ── AddressLimit ──> keys.py ──> Budget ──> routes
       10 requests/s each                    tokens/min and requests at a time, by key or address

The arithmetic of a moving window is the `limits` library's. Its storage is ours: on a clock that
nobody can set, and bounded, however many addresses ask.
"""

from __future__ import annotations

import bisect
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from limits import RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from flashlite.errors import UsageError
from flashlite.server.config import ServerConfig
from flashlite.server.errors import refuse
from flashlite.server.exchange import Usage
from flashlite.server.problems import Problem

__all__ = ["UNLIMITED", "AddressLimit", "Budget", "ClientAddress", "Windows", "client_of"]

UNLIMITED = frozenset({"/health", "/v1/health"})
"""Probes ask these often, and nothing is computed for them."""

_MOST_CLIENTS = 1 << 16  # whose windows are kept
_IPV6_CUSTOMER = 64  # bits: what one customer of a provider gets whole


class _Window:
    """When one key asked, for how much, and the sum; lists, since most hold a few entries."""

    __slots__ = ("amounts", "expiry", "times", "total")

    def __init__(self, expiry: int) -> None:
        self.times: list[float] = []
        self.amounts: list[int] = []
        self.total = 0
        self.expiry = expiry

    def leave(self, now: float) -> None:
        """Drop what is older than the window."""
        old = bisect.bisect_right(self.times, now - self.expiry)
        if old:
            self.total -= sum(self.amounts[:old])
            del self.times[:old], self.amounts[:old]


class Windows(Storage, MovingWindowSupport):
    """When each key asked lately, and for how much: a moving window in this process's memory.

    At most `most` keys are kept; the one silent for longest is forgotten first, which only those
    can bring about who own more addresses than that within one window.
    """

    STORAGE_SCHEME = None

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, most: int = _MOST_CLIENTS
    ) -> None:
        super().__init__()
        self._clock = clock
        self._most = most
        self._windows: OrderedDict[str, _Window] = OrderedDict()  # the one silent longest first

    def __len__(self) -> int:
        return len(self._windows)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Note `amount` if the window still has room for it."""
        if self.get_moving_window(key, limit, expiry)[1] + amount > limit:
            return False
        self.note(key, expiry, amount)
        return True

    def note(self, key: str, expiry: int, amount: int) -> None:
        """Count `amount`, whether or not there is room."""
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(expiry)
        window.times.append(self._clock())
        window.amounts.append(amount)
        window.total += amount
        self._windows.move_to_end(key)
        self._forget()

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest of the window was noted, and the sum of all."""
        now, window = self._clock(), self._windows.get(key)
        if window is None:
            return now, 0
        window.leave(now)
        return (window.times[0] if window.times else now), window.total

    def free_at(self, key: str, limit: int, expiry: int) -> float:
        """Seconds until the window has room again."""
        excess = self.get_moving_window(key, limit, expiry)[1] - limit + 1
        if excess <= 0:
            return 0.0
        window = self._windows[key]
        for when, amount in zip(window.times, window.amounts, strict=True):
            excess -= amount
            if excess <= 0:
                return max(0.0, when + expiry - self._clock())
        return float(expiry)  # a limit below 1: never

    def _forget(self) -> None:
        """Drop windows that are over, oldest first, and the oldest when there are too many."""
        now = self._clock()
        while self._windows:
            key, window = next(iter(self._windows.items()))
            alive = window.times and window.times[-1] > now - window.expiry
            if alive and len(self._windows) <= self._most:
                return
            self.clear(key)

    def clear(self, key: str) -> None:
        """Forget a key."""
        self._windows.pop(key, None)

    def reset(self) -> int:
        """Forget all keys; returns how many there were."""
        found = len(self._windows)
        self._windows.clear()
        return found

    def check(self) -> bool:
        """It is in this process: always there."""
        return True

    @property
    def base_exceptions(self) -> type[Exception]:
        """None of its own."""
        return Exception

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Of fixed windows, which are not exact and not kept."""
        raise NotImplementedError("only moving windows are kept")

    def get(self, key: str) -> int:
        """The sum of a key's window."""
        return self.get_moving_window(key, 0, 0)[1]

    def get_expiry(self, key: str) -> float:
        """When a key's window is over, on this storage's clock."""
        window = self._windows.get(key)
        return window.times[-1] + window.expiry if window and window.times else self._clock()


def client_of(scope: Scope) -> str:
    """Who asks: the key's name, else the address (of IPv6 the customer's network)."""
    key = scope.get("state", {}).get("key")
    return f"key {key}" if key else _network(scope)


def _network(scope: Scope) -> str:
    address: str = (scope.get("client") or ("", 0))[0]
    if ":" not in address:
        return address
    try:
        whole = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    return str(ipaddress.ip_network((whole, _IPV6_CUSTOMER), strict=False))


class ClientAddress:
    """Puts the asking client's address in the place of a trusted proxy's.

    Of `X-Forwarded-For` the last address counts that is not itself a trusted proxy's: what stands
    before it was written by the client. From anybody else the header means nothing.
    """

    def __init__(self, app: ASGIApp, trusted: Iterable[str]) -> None:
        """Args:
            app: what is asked next.
            trusted: addresses or networks of proxies.

        Raises:
            UsageError: one of them is neither.
        """
        self._app = app
        self._trusted = []
        for text in trusted:
            try:
                self._trusted.append(ipaddress.ip_network(text))
            except ValueError:
                raise UsageError(
                    f"trusted proxy {text!r} is no address and no network; "
                    "write 10.0.0.5 or 10.0.0.0/24"
                ) from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope.get("client") and self._is_proxy(scope["client"][0]):
            given = b",".join(v for k, v in scope["headers"] if k == b"x-forwarded-for")
            hops = [hop.strip() for hop in given.decode("latin-1").split(",")]
            for hop in reversed(hops):
                try:
                    address = str(ipaddress.ip_address(hop))
                except ValueError:
                    break
                scope["client"] = (address, 0)
                if not self._is_proxy(address):
                    break
        await self._app(scope, receive, send)

    def _is_proxy(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self._trusted)


class AddressLimit:
    """Requests per second of each address, exactly: the rest gets 429 and when to come again."""

    def __init__(self, app: ASGIApp, per_second: int, windows: Windows | None = None) -> None:
        """`per_second` 0 means no limit."""
        self._app = app
        self._windows = windows or Windows()
        self._limiter = MovingWindowRateLimiter(self._windows)
        self._item = RateLimitItemPerSecond(per_second) if per_second else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        item = self._item
        if item is None or scope["type"] != "http" or scope["path"] in UNLIMITED:
            await self._app(scope, receive, send)
            return
        address = _network(scope)
        if self._limiter.hit(item, address):
            await self._app(scope, receive, send)
            return
        wait = self._windows.free_at(item.key_for(address), item.amount, item.get_expiry())
        message = (
            f"too many requests: {item.amount} a second are allowed; ask again in {wait:.2f} s"
        )
        await refuse(scope, Problem("rate", message, retry_after=wait))(scope, receive, send)


class Budget:
    """Tokens per minute and requests at a time of each client, and requests of all together.

    What a request costs is known when it has been answered: one is let in while the minute has any
    room left, and what it took, prompt and answer, is counted at its end, also when it was cut.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, windows: Windows | None = None) -> None:
        self._app = app
        self._windows = windows or Windows()
        self._limiter = MovingWindowRateLimiter(self._windows)
        tokens = config.tokens_per_minute
        self._tokens = RateLimitItemPerMinute(tokens) if tokens else None
        self._at_once = config.max_concurrent
        self._most = config.max_requests
        self._running: Counter[str] = Counter()
        self._total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        client = client_of(scope)
        if (problem := self._refused(client)) is not None:
            await refuse(scope, problem)(scope, receive, send)
            return
        self._running[client] += 1
        self._total += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._total -= 1
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
            self._charge(client, scope["state"].get("usage"))

    def _refused(self, client: str) -> Problem | None:
        if self._total >= self._most:
            message = f"{self._total} requests are being answered or wait; ask again later"
            return Problem("overloaded", message, retry_after=1.0)
        if self._running[client] >= self._at_once:
            message = (
                f"{self._at_once} requests at a time are allowed; ask again when one has ended"
            )
            return Problem("rate", message, retry_after=1.0)
        item = self._tokens
        if item is not None and not self._limiter.test(item, client):
            wait = self._windows.free_at(item.key_for(client), item.amount, item.get_expiry())
            message = (
                f"{item.amount} tokens a minute are allowed and spent; ask again in {wait:.1f} s"
            )
            return Problem("rate", message, retry_after=wait)
        return None

    def _charge(self, client: str, usage: Any) -> None:
        if self._tokens is not None and isinstance(usage, Usage):
            spent = usage.total_tokens
            if spent:
                self._windows.note(self._tokens.key_for(client), self._tokens.get_expiry(), spent)
