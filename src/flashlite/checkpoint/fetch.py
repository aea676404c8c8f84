"""What every source of a pretrained model shares: space, digests, progress, atomic notes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashlite.errors import PullError

__all__ = [
    "Progress",
    "check_space",
    "read_note",
    "sha256_file",
    "stamps",
    "watch",
    "write_note",
]

# Called with (bytes done, bytes in all), now and then, from another thread.
Progress = Callable[[int, int], None]

_CHUNK = 1 << 20
_NOTE_LIMIT = 1 << 20  # bytes of a note read back


def sha256_file(path: Path) -> str:
    """The sha256 of a file, as hex.

    Raises:
        OSError: it cannot be read.
    """
    import hashlib  # loads OpenSSL, 3.6 MB that a model which is here does without

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what cannot end: `needed` bytes must be free where `folder` lies.

    Raises:
        PullError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PullError(
            f"{folder} has {free / 1e6:.0f} MB free, the download needs {needed / 1e6:.0f} MB: "
            "free some space or set FLASHLITE_HOME to another disk"
        )


def stamps(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Size and time of change of each file: equal stamps mean that no byte was touched.

    Raises:
        OSError: a file is missing.
    """
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_note(path: Path) -> dict[str, Any]:
    """A JSON object that `write_note` wrote; empty when it is missing or unreadable."""
    try:
        with path.open("rb") as file:
            note = json.loads(file.read(_NOTE_LIMIT))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(path: Path, note: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name, then rename it into place.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(note, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def watch(measure: Callable[[], int], done: int, total: int, progress: Progress) -> Iterator[None]:
    """While the body runs, report `done` plus what `measure` says has arrived, five times a second.

    The libraries that download show progress in ways of their own; the size of what lies on
    disk is the same for all of them.
    """
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(0.2):
            # A file may be renamed away between the listing and the look at its size.
            try:
                arrived = measure()
            except OSError:
                continue
            progress(min(total, done + arrived), total)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
