"""A folder that appears whole or not at all.

The new folder is filled beside its target under a hidden name, made durable, and then swapped with
the target in one rename. Whatever goes wrong before that leaves the target as it was and nothing
else; what a killed process left behind is removed by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashlite.artifact.format import DELTAS, LIMITS
from flashlite.errors import ArtifactError

if sys.platform != "win32":
    import fcntl

__all__ = ["staged"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def staged(target: Path, needed: int) -> Iterator[Path]:
    """A new empty folder that takes the place of `target` when the block ends without an error.

    Args:
        target: where it will be; an artifact that is there is replaced.
        needed: bytes that will be written.

    Raises:
        ArtifactError: there is not enough space, `target` holds something that is no artifact, or
            the system refuses; nothing is left behind.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(target)
        available = shutil.disk_usage(target.parent).free
        if available < needed:
            raise _no_space(target, needed, available)
        folder, lock = _make_folder(target)
        try:
            yield folder
            _make_durable(folder)
            with _locked(target.parent):
                _publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the old artifact, once published
            if lock is not None:
                os.close(lock)
    except OSError as error:
        if error.errno in _FULL:
            raise _no_space(target, needed, shutil.disk_usage(target.parent).free) from None
        raise ArtifactError(f"{target}: cannot be written: {error.strerror}") from None


def _refuse_strangers(target: Path) -> None:
    """Replace an artifact, a damaged one too, or an empty folder; never anything else."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArtifactError(f"{target}: is not a folder; choose another name")
    if target.is_dir():
        for entry in target.iterdir():
            if entry.name not in LIMITS and entry.name != DELTAS:
                raise ArtifactError(
                    f"{target}: holds {entry.name[:80]!r}, which is no part of an artifact; choose "
                    "another folder or remove it"
                )


def _no_space(target: Path, needed: int, available: int) -> ArtifactError:
    return ArtifactError(
        f"{target}: not enough space: {needed} bytes are needed and {available} are available; "
        "free some, raise the quota, or choose another folder"
    )


def _make_folder(target: Path) -> tuple[Path, int | None]:
    """A new hidden sibling and the lock that says its maker lives; stale ones are removed."""
    prefix, suffix = f".{target.name}.", ".partial"
    folder = target.parent / f"{prefix}{secrets.token_hex(4)}{suffix}"
    if sys.platform == "win32":
        folder.mkdir()
        return folder, None
    with _locked(target.parent):  # so that no folder is seen between its making and its locking
        for stale in sorted(target.parent.iterdir()):
            if stale.name.startswith(prefix) and stale.name.endswith(suffix):
                _remove_abandoned(stale)
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        _lock(lock, wait=True)
        return folder, lock


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed writer left; the folder of a living one is locked."""
    with suppress(FileNotFoundError):  # its writer has just ended
        handle = os.open(folder, os.O_RDONLY)
        try:
            if _lock(handle, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time makes or publishes folders here; held for a moment only."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open folder until it is closed; False if it is taken or cannot be locked here."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or a network file system without locks
        return False
    return True


def _make_durable(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(folder: Path, target: Path) -> None:
    """Put `folder` where `target` is; what was there ends up at `folder`."""
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        # No atomic swap here: for a moment the target is missing, but never half there.
        aside = folder.with_suffix(".replaced")
        target.rename(aside)
        try:
            folder.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where kernel and file system can (Linux, renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))
