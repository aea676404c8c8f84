"""A real server of a tiny model in this process, and raw connections to it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from flashlite.runtime.kvpages import PagePool
from flashlite.runtime.model import load
from flashlite.server.app import create_app, uvicorn_config
from flashlite.server.config import ServerConfig
from flashlite.server.keys import Keys
from flashlite.server.registry import Registry
from flashlite.server.state import State

__all__ = ["Reply", "Running", "exchange", "read_reply", "request", "serving"]


@dataclass(frozen=True)
class Running:
    app: Starlette
    listener: socket.socket  # what it does not set, accepted connections have of it

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def state(self) -> State:
        state: State = self.app.state.flashlite
        return state

    @property
    def pool(self) -> PagePool:
        (model,) = self.state.registry.models.values()
        return model.scheduler.engine.pool

    def connect(self, source: str | None = None, *, window: int | None = None) -> socket.socket:
        """A connection, from a loopback address of one's choice."""
        made = socket.socket()
        if window is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        made.settimeout(30)
        if source is not None:
            made.bind((source, 0))
        made.connect(("127.0.0.1", self.port))
        return made

    def wait_until_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.state.load != (0, 0):
            assert time.monotonic() < deadline, self.state.load
            time.sleep(0.01)


@contextlib.contextmanager
def serving(gguf: Path, keys: Keys | None = None, **settings: Any) -> Iterator[Running]:
    config = ServerConfig(port=0, **settings)
    config.check(keys=keys is not None)
    model = load(gguf, max_sequences=3, threads=1, isa="plain")
    app = create_app(Registry([model]), config, keys=keys)
    server = uvicorn.Server(uvicorn_config(app, config))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(app, server.servers[0].sockets[0]._sock)  # type: ignore[attr-defined]
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def request(path: str, body: bytes = b"", *, method: str | None = None, **headers: str) -> bytes:
    """A request's bytes; `x_api_key=` is the header `x-api-key`."""
    fields = {"host": "127.0.0.1"} | {k.replace("_", "-"): v for k, v in headers.items()}
    if body:
        fields["content-length"] = str(len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    verb = method or ("POST" if body else "GET")
    return f"{verb} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def exchange(connection: socket.socket, raw: bytes) -> Reply | None:
    """Send a request and read its answer; None: the connection was closed instead."""
    try:
        connection.sendall(raw)
        return read_reply(connection, head=raw.startswith(b"HEAD"))
    except ConnectionError:
        return None


def read_reply(connection: socket.socket, *, head: bool = False) -> Reply | None:
    """One answer, by its length or its chunks; of HEAD without a body."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return None
        data += part
    top, _, body = data.partition(b"\r\n\r\n")
    line, *rest = top.decode("latin-1").split("\r\n")
    pairs = (item.partition(":") for item in rest)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    chunked = not head and headers.get("transfer-encoding") == "chunked"
    length = 0 if head else int(headers.get("content-length", "0"))
    while not body.endswith(b"0\r\n\r\n") if chunked else len(body) < length:
        part = connection.recv(65536)
        if not part:
            return None
        body += part
    return Reply(int(line.split()[1]), headers, body)
