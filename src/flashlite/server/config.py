"""How a server is set up: flags and a TOML file, as one frozen `ServerConfig`.

    flags ─┐
           ├─> ServerConfig ──> registry.py (models), app.py (routes, limits), worker.py
    TOML ──┘        a flag wins over the file, the file over the default

The file's keys are the names of the fields:

    models = ["smollm2-135m-instruct"]
    embed = "all-minilm-l6-v2"
    max_mem = "2GB"
    deadline = "2s"
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from flashlite.errors import UsageError
from flashlite.runtime.memory import parse_size
from flashlite.runtime.prepare import DEFAULT_MODEL
from flashlite.server.timing import parse_duration

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["LOOPBACK", "ServerConfig", "WindowPolicy", "read_config"]

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_LARGEST_FILE = 1 << 20  # bytes

WindowPolicy = Literal["error"]
"""What happens to a prompt that is longer than the context: `error` is FL-405."""


@dataclass(frozen=True)
class ServerConfig:
    """Every setting of `flashlite serve`; `check` refuses what cannot be honoured."""

    # What is served
    models: tuple[str, ...] = (DEFAULT_MODEL,)  # as `flashlite.load` takes them; the first answers
    # requests that name none
    embed: str | None = None  # an encoder, as `flashlite.load_encoder` takes it

    # What they may take, together
    max_mem: str | None = None  # 2GB, 1.5GiB, ...: of the process; None: no ceiling
    max_sequence_length: int | None = None  # tokens of prompt and answer; None: the model's
    max_sequences: int = 4  # conversations of one model that are answered at the same time
    threads: int | None = None  # None: one per core

    # How they are made and run
    preset: str = "import"  # how to quantize a model that has no artifact yet
    isa: str | None = None  # None: the best this CPU runs
    offline: bool = False  # use only what is on this machine
    accept_license: bool = False  # for models whose licence asks for it
    enable_integrity_check: bool = True  # compare every file with the manifest
    prefix_cache: bool = True  # reuse what prompts that begin equally stored
    speculate: bool = True  # check guessed tokens where that is faster
    exact_head: bool = False  # compute every logit, also where the model has a split head

    # Answers
    deadline: str | None = None  # 2s, 500ms: what an answer may take at most; None: no limit
    window: WindowPolicy = "error"  # for a prompt that is longer than the context
    max_choices: int = 8  # `n` of one request, at most

    # The network
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000
    public_without_keys: bool = False  # listen beyond this machine although anyone may ask
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header, beside those of loopback
    cors_origins: tuple[str, ...] = ()  # origins of pages that may ask; "*" for any
    trusted_proxies: tuple[str, ...] = ()  # addresses or networks whose X-Forwarded-For is true
    tls_cert: str | None = None  # files in PEM: with both, HTTPS is spoken
    tls_key: str | None = None
    keys_file: str | None = None  # of `flashlite keys`; None: the default one if it is there
    open_health: bool = True  # /health without a key says that the server runs, no more

    # What one client may ask
    rate_limit: int = 10  # requests per second of an address; 0: no limit
    tokens_per_minute: int = 0  # of prompts and answers, of a key or an address; 0: no limit
    max_concurrent: int = 64  # requests at a time of a key or an address; more get 429
    max_requests: int = 128  # of all clients, answered or waiting; more get 503
    max_body: str = "1MiB"  # of one request, and of all that are being answered together
    max_head: str = "32KiB"  # request line and headers
    max_connections: int = 128  # the one silent for longest gives way to a new one

    # How long a client may take
    head_timeout: str = "10s"  # to send a request's head
    body_timeout: str = "10s"  # to send its body, and longer at 50 kB/s, at most three times that
    send_timeout: str = "10s"  # to read what was sent
    keep_alive: str = "15s"  # until its next request

    def check(self, *, keys: bool = False) -> None:
        """Refuse what cannot be honoured.

        Args:
            keys: requests are asked for a key.

        Raises:
            UsageError: naming the field, its value and the way out.
        """
        if not self.models and self.embed is None:
            raise UsageError("nothing to serve: name a model, or an encoder with --embed")
        for name, value, low, high in (
            ("port", self.port, 0, 65535),
            ("max_sequences", self.max_sequences, 1, 256),
            ("max_choices", self.max_choices, 1, 128),
            ("max_connections", self.max_connections, 1, 65536),
            ("max_concurrent", self.max_concurrent, 1, 65536),
            ("max_requests", self.max_requests, 1, 65536),
            ("rate_limit", self.rate_limit, 0, 1_000_000),
            ("tokens_per_minute", self.tokens_per_minute, 0, 1_000_000_000),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}, allowed {low} to {high}")
        for size in (self.max_mem, self.max_body, self.max_head):
            if size is not None:
                parse_size(size)
        for time in (self.head_timeout, self.body_timeout, self.send_timeout, self.keep_alive):
            parse_duration(time)
        if self.deadline is not None:
            parse_duration(self.deadline)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("TLS needs both a certificate and its key: --tls-cert and --tls-key")
        if self.host not in LOOPBACK and not keys and not self.public_without_keys:
            raise UsageError(
                f"host {self.host} is reachable from other machines and no keys are set: set "
                "keys, listen on 127.0.0.1, or force it with --public-without-keys"
            )

    @property
    def deadline_s(self) -> float | None:
        """Seconds of `deadline`."""
        return None if self.deadline is None else parse_duration(self.deadline)

    @property
    def body_bytes(self) -> int:
        """Bytes of `max_body`."""
        return parse_size(self.max_body)

    @property
    def head_bytes(self) -> int:
        """Bytes of `max_head`."""
        return parse_size(self.max_head)

    @property
    def head_timeout_s(self) -> float:
        """Seconds of `head_timeout`."""
        return parse_duration(self.head_timeout)

    @property
    def body_timeout_s(self) -> float:
        """Seconds of `body_timeout`."""
        return parse_duration(self.body_timeout)

    @property
    def send_timeout_s(self) -> float:
        """Seconds of `send_timeout`."""
        return parse_duration(self.send_timeout)

    @property
    def keep_alive_s(self) -> float:
        """Seconds of `keep_alive`."""
        return parse_duration(self.keep_alive)


def read_config(path: Path | None, flags: Mapping[str, Any]) -> ServerConfig:
    """The settings of a TOML file and of flags.

    Args:
        path: of the file; None: there is none.
        flags: by field name; None: the flag was not given.

    Raises:
        UsageError: the file cannot be read, has an unknown key, or a value of the wrong type.
    """
    given: dict[str, Any] = {} if path is None else _read(path)
    given |= {name: value for name, value in flags.items() if value is not None}
    return ServerConfig(**given)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise UsageError(f"{path} is larger than {_LARGEST_FILE} bytes; is it the config file?")
        table = tomllib.loads(raw.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    kinds = get_type_hints(ServerConfig)
    found = {}
    for key, value in table.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(kinds)}"
            raise UsageError(f"{path} has the unknown key {key!r}{hint}")
        found[key] = _checked(path, key, value, kinds[key])
    return found


def _checked(path: Path, key: str, value: Any, kind: Any) -> Any:
    """The value, if it is of the field's type; a list becomes a tuple."""
    options = get_args(kind)
    if kind == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        expected = "a list of strings"
    elif options and all(isinstance(option, str) for option in options):
        if value in options:
            return value
        expected = " or ".join(options)
    else:
        plain = [option for option in options if option is not type(None)] or [kind]
        if type(value) in plain:
            return value
        expected = {str: "a string", int: "a whole number", bool: "true or false"}[plain[0]]
    raise UsageError(f"{path}: {key} is {value!r}, expected {expected}")
