"""Where flashlite keeps what it fetches and what it builds.

FLASHLITE_HOME   models and artifacts; by default the platform's place for user data
FLASHLITE_CACHE  generated C, compiled libraries, saved prefixes; by default the platform's cache
"""

from __future__ import annotations

import functools
import os
import secrets
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_dir", "data_dir", "installation_key", "models_dir", "private_dir"]

_KEY_BYTES = 32


def data_dir() -> Path:
    """The folder of everything a user keeps; made when it is missing.

    Raises:
        OSError: it cannot be made.
    """
    path = _chosen("FLASHLITE_HOME") or _platform("XDG_DATA_HOME", ".local/share", "data")
    path.mkdir(parents=True, exist_ok=True)
    return path


def models_dir() -> Path:
    """The folder of pulled models, one folder each.

    Raises:
        OSError: it cannot be made.
    """
    path = data_dir() / "models"
    path.mkdir(exist_ok=True)
    return path


def cache_dir() -> Path:
    """The folder of builds: only its owner may enter, since libraries are loaded from it.

    Raises:
        OSError: it cannot be made.
    """
    path = _chosen("FLASHLITE_CACHE") or _platform("XDG_CACHE_HOME", ".cache", "cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def private_dir(path: Path) -> Path:
    """A folder that only its owner may enter; made when it is missing, closed when it is open.

    Raises:
        OSError: it cannot be made or belongs to somebody else.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def installation_key() -> bytes:
    """32 secret bytes of this installation, made at first use, readable by the user alone.

    They authenticate what flashlite leaves on disk for itself: libraries and saved prefixes.

    Raises:
        OSError: the key can be neither read nor made.
    """
    return _key_at(private_dir(data_dir()) / "installation.key")


@functools.cache
def _key_at(path: Path) -> bytes:
    if path.exists():
        key = path.read_bytes()
        if len(key) == _KEY_BYTES and _is_private(path):
            return key
        path.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
    try:
        os.link(temporary, path)  # the first of two concurrent makers wins
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()
    return path.read_bytes()


def _is_private(path: Path) -> bool:
    """Whether nobody else could have read it; where a file system keeps no modes, the best is
    to go on.
    """
    if os.name != "posix" or not path.stat().st_mode & 0o077:
        return True
    path.chmod(0o600)
    return bool(path.stat().st_mode & 0o077)


def _chosen(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser().absolute() if value else None


def _platform(xdg: str, unix: str, leaf: str) -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData/Local") / "flashlite" / leaf
    if sys.platform == "darwin":
        library = "Application Support" if leaf == "data" else "Caches"
        return Path.home() / "Library" / library / "flashlite"
    base = os.environ.get(xdg)
    # The XDG rule: a relative path is ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "flashlite"
    return Path.home() / unix / "flashlite"
