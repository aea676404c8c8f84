"""API keys: made, stored as hashes, checked on every path.

    flashlite keys add laptop ──> keys.json (0600): name, BLAKE3 keyed by this installation
    request ── Bearer | x-goog-api-key | ?key= ──> KeyCheck ──> request.state.key = "laptop"

A key is 256 random bits, so that a fast hash is enough: there is nothing to guess. The hash is
keyed by the installation: a stolen file is no list to compare with another's.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

from blake3 import blake3
from filelock import FileLock
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flashlite.errors import UsageError
from flashlite.paths import data_dir, installation_key
from flashlite.server.errors import error_shape, refuse
from flashlite.server.limits import UNLIMITED
from flashlite.server.problems import Problem

__all__ = ["Key", "KeyCheck", "Keys", "default_path", "open_keys", "present_key"]

_PREFIX = "fl-"
_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LARGEST_FILE = 1 << 20  # bytes
_LONGEST_KEY = 512  # characters that a request may present
_LOOK_AGAIN = 1.0  # seconds after which a changed file is noticed
_CONTEXT = b"flashlite api keys"


@dataclass(frozen=True)
class Key:
    """A key that may ask; what it is cannot be told from this."""

    name: str
    digest: str  # hex
    created: int  # seconds since 1970

    @property
    def public(self) -> dict[str, Any]:
        """What may be shown."""
        return {"name": self.name, "created": self.created}


def default_path() -> Path:
    """Where `flashlite keys` keeps them."""
    return data_dir() / "keys.json"


def open_keys(path: str | None) -> Keys | None:
    """The keys that a server asks for; None: it asks for none.

    Args:
        path: of their file; None: the default one, if it holds any.

    Raises:
        UsageError: the named file holds none, or is not a file of keys.
    """
    keys = Keys(default_path() if path is None else Path(path))
    if len(keys):
        return keys
    if path is None:
        return None
    raise UsageError(f"{path} holds no keys: make one with flashlite keys add NAME --file {path}")


class Keys:
    """The keys of a file, which is read again when it changes.

    Example:
        keys = Keys(default_path())
        secret = keys.add("laptop")  # shown once
        keys.find(secret)  # "laptop"
    """

    def __init__(self, path: Path, secret: bytes | None = None) -> None:
        """Args:
            path: of the file; it may be missing.
            secret: 32 bytes that key the hashes; None: the installation's.

        Raises:
            UsageError: the file is not a file of keys, or others may read it.
        """
        self.path = path
        self._secret = blake3(_CONTEXT, key=secret or installation_key()).digest()
        self._stamp: tuple[int, int, int] | None = None
        self._looked = 0.0
        self._keys: dict[str, Key] = {}
        self._load()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, name: str) -> str:
        """Make a key; what is returned is stored nowhere.

        Raises:
            UsageError: the name is taken or cannot be one.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"key name {name[:80]!r}: use 1 to 64 letters, digits, dots, dashes, underscores"
            )
        secret = _PREFIX + secrets.token_urlsafe(_BYTES)
        with self._changing():
            if name in self._keys:
                raise UsageError(f"the key {name} exists; revoke it first or choose another name")
            self._keys[name] = Key(name, self._digest(secret), int(time.time()))
            self._write()
        return secret

    def revoke(self, name: str) -> None:
        """End a key; running servers notice within a second.

        Raises:
            UsageError: there is no such key.
        """
        with self._changing():
            if self._keys.pop(name, None) is None:
                known = ", ".join(self._keys) or "none"
                raise UsageError(f"there is no key {name[:80]!r}; known: {known}")
            self._write()

    def list(self) -> list[Key]:
        """All of them, oldest first."""
        self._load()
        return sorted(self._keys.values(), key=lambda key: (key.created, key.name))

    def find(self, presented: str) -> str | None:
        """The name of the key; each is compared in constant time, and all of them always."""
        now = time.monotonic()
        if now - self._looked > _LOOK_AGAIN:
            self._looked = now
            try:
                self._load()
            except (UsageError, OSError):  # spoilt while we run: nobody is let in by it
                self._keys = {}
        digest, found = self._digest(presented), None
        for key in self._keys.values():
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found

    def _digest(self, presented: str) -> str:
        return blake3(presented.encode("utf-8", "replace"), key=self._secret).hexdigest()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The file as it is now, while no other process changes it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", mode=0o600):
            self._load()
            yield

    def _load(self) -> None:
        try:
            with self.path.open("rb") as file:
                info = os.fstat(file.fileno())
                stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
                if stamp == self._stamp:
                    return
                if info.st_mode & 0o077:
                    raise UsageError(f"{self.path} can be read by others: chmod 600 it")
                raw = file.read(_LARGEST_FILE + 1)
        except FileNotFoundError:
            self._keys, self._stamp = {}, None
            return
        self._keys, self._stamp = _parse(self.path, raw), stamp

    def _write(self) -> None:
        """The file is there whole or not at all, and was never readable by others."""
        entries = [
            {"name": key.name, "blake3": key.digest, "created": key.created}
            for key in self._keys.values()
        ]
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": 1, "keys": entries}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def _parse(path: Path, raw: bytes) -> dict[str, Key]:
    try:
        if len(raw) > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        content = json.loads(raw)
        found = [
            Key(str(entry["name"]), str(entry["blake3"]), int(entry["created"]))
            for entry in content["keys"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no file of keys: {error}; make one: flashlite keys add"
        ) from None
    return {key.name: key for key in found}


def present_key(scope: Scope) -> str | None:
    """The key that a request shows, by header or, as Google's clients may, in the query."""
    headers: Mapping[bytes, bytes] = dict(scope["headers"])
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = bearer.strip() if scheme.lower() == b"bearer" else b""
    given = given or headers.get(b"x-goog-api-key", b"").strip()
    if given:
        return given.decode("latin-1")
    for part in scope.get("query_string", b"").split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"key":
            return unquote_plus(value.decode("latin-1"))
    return None


class KeyCheck:
    """Lets a request pass that shows a known key, and no other: routes are not asked.

    `/health` without a key says that the server runs, and nothing else. A key in the query is
    taken out of it, so that nothing behind this can log it.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, *, open_health: bool = True) -> None:
        """`keys` None: anyone may ask."""
        self._app = app
        self._keys = keys
        self._open = UNLIMITED if open_health else frozenset[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        presented = present_key(scope)
        error_shape(scope)  # decided while the query still has its key
        scope["query_string"] = b"&".join(
            part for part in scope["query_string"].split(b"&") if part.partition(b"=")[0] != b"key"
        )
        if self._keys is None:
            await self._app(scope, receive, send)
            return
        name = None
        if presented is not None and len(presented) <= _LONGEST_KEY:
            name = self._keys.find(presented)
        if name is not None:
            scope["state"]["key"] = name
            await self._app(scope, receive, send)
        elif scope["path"] in self._open and scope["method"] in ("GET", "HEAD"):
            await JSONResponse({"status": "ok"})(scope, receive, send)
        else:
            message = "the key is not known here, or was revoked"
            if presented is None:
                message = (
                    "a key is needed: send it as `Authorization: Bearer KEY` or "
                    "`x-goog-api-key: KEY`"
                )
            refused = refuse(scope, Problem("key", message))
            refused.headers["WWW-Authenticate"] = "Bearer"
            await refused(scope, receive, send)
