"""Where flashlite keeps what it fetches and what it builds.

FLASHLITE_HOME   models and artifacts; by default the platform's place for user data
FLASHLITE_CACHE  generated C and compiled libraries; by default the platform's cache
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_dir", "data_dir", "models_dir"]


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
