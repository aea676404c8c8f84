"""Say whether a newer base of a pulled model exists, without fetching it.

A known model's digest is pinned in this version of flashlite: after an update of flashlite it may
differ from what was pulled. A hub repository names its commit; where that moved, the digests of
the weights decide, since most commits change a README.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashlite import paths
from flashlite.checkpoint.fetch import read_note, sha256_file
from flashlite.checkpoint.known_models import KNOWN_MODELS
from flashlite.checkpoint.pull import digest_of
from flashlite.errors import PullError

__all__ = ["Base", "check_base"]


@dataclass(frozen=True)
class Base:
    """What lies here and what there is."""

    name: str
    here: str | None  # digest, or commit of a repository; None: not pulled
    there: str
    newer: bool


def check_base(name: str) -> Base:
    """Compare what was pulled with what would be pulled now.

    Args:
        name: a known name or `hf:ORG/NAME`, written as it was pulled.

    Raises:
        PullError: the name is neither, nothing was pulled, or the network failed.
    """
    if name.startswith("hf:"):
        return _hub(name)
    if name not in KNOWN_MODELS:
        raise PullError(
            f"{name[:200]!r} has no source to ask: --check takes a known model "
            f"({', '.join(KNOWN_MODELS)}) or hf:ORG/NAME; compare a file of your own by analyzing "
            "it again"
        )
    model = KNOWN_MODELS[name]
    there = digest_of({file.name: file.sha256 for file in model.files})
    here = read_note(paths.models_dir() / name / "pulled.json").get("sha256")
    if here is None:
        raise PullError(f"{name} is not here yet: run `flashlite pull {name}`")
    return Base(name, str(here), there, here != there)


def _hub(name: str) -> Base:
    from flashlite.checkpoint import hub

    wanted = hub.parse(name)
    folder = paths.models_dir() / "hf" / wanted.folder
    note = read_note(folder / f".{wanted.label}.pulled.json")
    if not note:
        raise PullError(f"{name} is not here yet: run `flashlite pull {name}`")
    snapshot = hub.describe_snapshot(wanted)
    here = str(note.get("commit"))
    newer = snapshot.commit != here and any(
        _differs(folder / file.name, file.size, file.sha256) for file in snapshot.files
    )
    return Base(name, here, snapshot.commit, newer)


def _differs(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file here is another than the repository declares."""
    try:
        if path.stat().st_size != size:
            return True
        return sha256 is not None and sha256_file(path) != sha256
    except OSError:
        return True
