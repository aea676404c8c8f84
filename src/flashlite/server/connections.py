"""Connections that take their time are cut, so that they keep nobody else out.

uvicorn waits for ever: for a head that never ends, for a client that does not read. Here each
connection has a clock:

    opened ──head_timeout──> request is whole ──(hardening.py: the body)──> answer
                                                  unread for send_timeout ──> cut

and when all places are taken, the connection that has been silent for longest gives way.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashlite.server.config import ServerConfig
from flashlite.server.openai.refusal import body
from flashlite.server.problems import Problem

__all__ = ["Connections", "WatchedProtocol", "watched"]

_SLOWEST_READ = 64 << 10  # bytes in send_timeout, of an answer that is longer than the buffers
_CROWD = 4  # times max_connections that are open for a moment
_PAUSE = 0.1  # seconds in which what has come is read
_log = logging.getLogger("flashlite.server")


class Connections:
    """The open connections of a server; `idle` are those without a whole request, oldest first."""

    def __init__(self, config: ServerConfig) -> None:
        self.most = config.max_connections
        self.head_s = config.head_timeout_s
        self.send_s = config.send_timeout_s
        self.idle: OrderedDict[WatchedProtocol, None] = OrderedDict()
        self.open = 0
        self._thinning = False

    def make_room(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Let another in, and some idle ones give way if all places are taken; False: all are busy.

        Not at once: of many that are accepted together, an honest one's request may be here and
        not be read yet.
        """
        if self.open < self.most:
            return True
        if not self.idle:
            return False
        if self.open >= _CROWD * self.most:
            next(iter(self.idle)).cut("gave way to another")
        elif not self._thinning:
            self._thinning = True
            loop.call_later(_PAUSE, self._thin)
        return True

    def _thin(self) -> None:
        self._thinning = False
        while self.open > self.most and self.idle:
            next(iter(self.idle)).cut("gave way to another")


class WatchedProtocol(H11Protocol):
    """HTTP/1.1 on one connection, with a clock."""

    def __init__(self, watch: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch
        self._head: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._counted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A place is taken, or another gives way."""
        super().connection_made(transport)
        room = self._watch.make_room(self.loop)
        self._watch.open += 1
        self._counted = True
        if not room:
            message = f"{self._watch.most} connections are open and busy; ask again later"
            self._refuse(Problem("overloaded", message, retry_after=1.0))
            return
        transport.set_write_buffer_limits(high=1)  # paused: the client has not read all there is
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The place is free."""
        self._leave()
        self._disarm()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        super().connection_lost(exc)
        # uvicorn leaves its timer armed when a connection fails
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, a body, or of a body that nobody waits for any more."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._answering:
            if not self.transport.is_closing():
                self._expect_head()
            return
        self._disarm()
        if not self.cycle.more_body:
            self._watch.idle.pop(self, None)

    def on_response_complete(self) -> None:
        """The next request may already be here."""
        super().on_response_complete()
        if not self._answering and self._counted:
            self._watch.idle[self] = None
            self._watch.idle.move_to_end(self)

    def pause_writing(self) -> None:
        """The client has not read what was sent."""
        super().pause_writing()
        if self._sending is None:
            self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has."""
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the shape of other errors."""
        self._refuse(Problem("invalid", "the request is not valid HTTP"))

    def cut(self, why: str) -> None:
        """End the connection at once; what answers on it is cancelled."""
        _log.info("connection cut: %s", why)
        self._leave()
        self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        """Further bytes do not wind the clock up again."""
        self._watch.idle[self] = None
        if self._head is None:
            late = functools.partial(self.cut, "no whole request came")
            self._head = self.loop.call_later(self._watch.head_s, late)

    def _disarm(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _leave(self) -> None:
        """Counted once, when it is cut or lost."""
        if self._counted:
            self._counted = False
            self._watch.open -= 1
        self._watch.idle.pop(self, None)

    def _await_reader(self, unread: int) -> None:
        self._sending = self.loop.call_later(self._watch.send_s, self._check_reader, unread)

    def _check_reader(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if before - unread < min(before, _SLOWEST_READ):
            self.cut("its client does not read")
        else:
            self._await_reader(unread)

    def _refuse(self, problem: Problem) -> None:
        """Answer before any request was understood, and close."""
        content = msgspec.json.encode(body(problem))
        headers = [
            *problem.headers.items(),
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("connection", "close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=problem.status, headers=headers),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def watched(config: ServerConfig) -> tuple[Connections, Callable[..., WatchedProtocol]]:
    """The connections of a server to be, and what uvicorn makes each with (`Config.http`)."""
    connections = Connections(config)
    return connections, functools.partial(WatchedProtocol, connections)
