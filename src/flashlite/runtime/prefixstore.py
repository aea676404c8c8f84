"""Beginnings of prompts on disk, so that a restart does not compute them again.

    prefixes/MODEL/          one folder per fingerprint: artifact, generated C and kernels
      PREFIX.kv              one file per beginning
        head                 magic, sizes, fingerprint, and a keyed BLAKE3 of the whole front
        ids                  int32, 32 to a page
        marks                a keyed BLAKE3 of each page
        pages                as they lie in the arena

Nothing of a file is used before it is proved to be ours: the key is secret to this installation.
A file that is not as it was written is removed; what cannot be saved is not saved. Neither is an
error to anybody: the prompt is computed then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite import paths
from flashlite.artifact.format import Artifact
from flashlite.codegen.emit import emit_model
from flashlite.codegen.toolchain import CSRC
from flashlite.runtime.prefixtree import PAGE_KEY, Prefix

__all__ = ["MAX_BYTES", "PrefixStore", "Saved", "fingerprint", "open_store"]

MAX_BYTES = 256_000_000  # of all models together; the longest unused go first
_MAGIC = b"FLprefx\1"
_HEAD = struct.Struct("<8sII32s32s")  # magic, page bytes, pages, fingerprint, MAC
_MAC = 32
_CONTEXT = "flashlite saved prefixes 2026"
_MAX_PAGES = 1 << 16
_STALE_SECONDS = 3600
_FREE_SHARE = 8  # a file takes at most this part of what the disk has free

Place = Callable[[int, NDArray[np.uint8]], None]
"""Called with the number of a page, counted from the beginning of the text, and its bytes."""


@dataclass(frozen=True)
class Saved:
    """A file whose front is proved."""

    path: Path
    ids: bytes  # int32
    marks: bytes  # a MAC per page

    @property
    def pages(self) -> int:
        """How many it holds."""
        return len(self.marks) // _MAC

    @property
    def front(self) -> int:
        """Bytes before the pages."""
        return _HEAD.size + len(self.ids) + len(self.marks)


def fingerprint(artifact: Artifact, isa: str) -> bytes:
    """What stored pages depend on beside their ids, as 32 bytes: weights, arithmetic and layout.

    Every integer instruction set gives the same bits, so they share one; `fp32` differs. The
    hand-written C is part of it whole: a change of any kernel could change a bit.
    """
    digest = blake3(emit_model(artifact, "fp32" if isa == "fp32" else "plain").encode())
    for path in sorted(CSRC.glob("*.[ch]")):
        digest.update(path.read_bytes())
    return digest.digest()


def open_store(artifact: Artifact, isa: str, page_bytes: int) -> PrefixStore | None:
    """The saved prefixes of a model; None where the folder or the key cannot be had."""
    mark = fingerprint(artifact, isa)
    try:
        folder = paths.private_dir(paths.cache_dir() / "prefixes" / mark.hex()[:32])
        return PrefixStore(folder, mark, page_bytes, paths.installation_key())
    except OSError:
        return None


class PrefixStore:
    """The saved prefixes of one model. Safe beside other processes: files appear whole."""

    def __init__(
        self,
        folder: Path,
        mark: bytes,
        page_bytes: int,
        installation_key: bytes,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Read what is there.

        Args:
            folder: private to the user; its siblings are other models'.
            mark: the `fingerprint`.
            page_bytes: of one KV page.
            installation_key: 32 bytes; the key of the MACs is derived from it.
            max_bytes: of the folder and its siblings together.
        """
        self._folder = folder
        self._mark = mark
        self._page = np.empty(page_bytes, np.uint8)
        self._key = blake3(installation_key, derive_key_context=_CONTEXT).digest()
        self._max_bytes = max_bytes
        self._saved: dict[str, Saved] = {}  # by name
        self._seen = -1  # time of the folder's last change, when it was listed
        self._refresh()

    def find(self, ids: bytes) -> tuple[Saved, int] | None:
        """The file that holds the most whole pages of the beginning of a text, and how many."""
        self._refresh()
        best: tuple[Saved, int] | None = None
        for saved in self._saved.values():
            if saved.ids[:PAGE_KEY] == ids[:PAGE_KEY]:
                pages = _common_pages(saved.ids, ids)
                if pages > (best[1] if best else 0):
                    best = saved, pages
        return best

    def read(self, saved: Saved, first: int, end: int, place: Place) -> bool:
        """Hand over the pages first .. end - 1, each proved before `place` sees it.

        Returns:
            False: the file is not as it was written, and is gone now; pages handed over are right
            nevertheless.
        """
        try:
            with _opened(saved.path) as file:
                if os.fstat(file.fileno()).st_size != self._size(saved):
                    raise ValueError
                file.seek(saved.front + first * self._page.nbytes)
                for index in range(first, end):
                    mark = saved.marks[index * _MAC : (index + 1) * _MAC]
                    if file.readinto(self._page.data) != self._page.nbytes:
                        raise ValueError
                    if not secrets.compare_digest(self._mac(self._page.data), mark):
                        raise ValueError
                    place(index, self._page)
            os.utime(saved.path)  # used now
        except (OSError, ValueError):
            self._discard(saved.path)
            return False
        return True

    def save_latest(self, prefixes: Iterable[Prefix], read_page: Place) -> None:
        """Keep prefixes, the latest first, as many as the limit allows; otherwise as `save`."""
        room = self._max_bytes // (self._page.nbytes + 256)
        for prefix in prefixes:
            room -= len(prefix.pages)
            if room < 0:
                return
            self.save(prefix, read_page)

    def save(self, prefix: Prefix, read_page: Place) -> int:
        """Keep a prefix, or what of it the limit allows; nothing is done where it is kept already.

        Args:
            prefix: its ids and its pages in the arena.
            read_page: called with a page of the arena and the array to fill.

        Returns:
            Pages kept.
        """
        page_bytes = self._page.nbytes
        pages = min(len(prefix.pages), _MAX_PAGES, self._max_bytes // 2 // (page_bytes + 256))
        ids = prefix.ids[: pages * PAGE_KEY]
        try:
            paths.private_dir(self._folder)  # another process removes it while it is empty
            known = self.find(ids)
            if known and known[1] == pages:
                os.utime(known[0].path)
                return pages
            size = _HEAD.size + len(ids) + pages * (_MAC + page_bytes)
            if not pages or size > shutil.disk_usage(self._folder).free // _FREE_SHARE:
                return 0
            self._write(ids, prefix.pages[:pages], read_page)
            self._seen = -1  # clocks of folders are too coarse to show every change
            if known and known[1] == known[0].pages:
                self._discard(known[0].path)  # the new one begins with it
            self._trim()
        except OSError:
            return 0
        return pages

    def _write(self, ids: bytes, pages: list[int], read_page: Place) -> None:
        name = f"{blake3(ids).hexdigest()[:32]}.kv"
        handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".partial")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.seek(_HEAD.size + len(ids) + len(pages) * _MAC)
                marks = []
                for page in pages:
                    read_page(page, self._page)
                    marks.append(self._mac(self._page.data))
                    file.write(self._page.data)
                body = ids + b"".join(marks)
                file.seek(0)
                file.write(self._head(len(pages), body) + body)
            Path(temporary).replace(self._folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _head(self, pages: int, body: bytes) -> bytes:
        fields = (_MAGIC, self._page.nbytes, pages, self._mark)
        return _HEAD.pack(*fields, self._mac(_HEAD.pack(*fields, bytes(_MAC)) + body))

    def _mac(self, data: bytes | memoryview) -> bytes:
        return blake3(data, key=self._key).digest()

    def _size(self, saved: Saved) -> int:
        return saved.front + saved.pages * self._page.nbytes

    def _refresh(self) -> None:
        """Take note of what this and other processes added and removed."""
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed == self._seen:
                return
            names = {path.name for path in self._folder.iterdir() if path.suffix == ".kv"}
        except OSError:
            names, changed = set(), -1
        self._seen = changed
        for gone in self._saved.keys() - names:
            del self._saved[gone]
        for name in sorted(names - self._saved.keys()):
            path = self._folder / name
            try:
                self._saved[name] = self._prove(path)
            except (OSError, ValueError):
                self._discard(path)

    def _prove(self, path: Path) -> Saved:
        """Read the front of a file.

        Raises:
            OSError, ValueError: it is not as it was written, or not ours.
        """
        with _opened(path) as file:
            head = file.read(_HEAD.size)
            if len(head) != _HEAD.size:
                raise ValueError
            magic, page_bytes, pages, _, _ = _HEAD.unpack(head)
            size = _HEAD.size + pages * (PAGE_KEY + _MAC + page_bytes)
            known = magic == _MAGIC and page_bytes == self._page.nbytes
            if not known or not 1 <= pages <= _MAX_PAGES:
                raise ValueError
            if os.fstat(file.fileno()).st_size != size:
                raise ValueError
            body = file.read(pages * (PAGE_KEY + _MAC))
        if not secrets.compare_digest(self._head(pages, body), head):
            raise ValueError
        return Saved(path, body[: pages * PAGE_KEY], body[pages * PAGE_KEY :])

    def _discard(self, path: Path) -> None:
        self._saved.pop(path.name, None)
        with contextlib.suppress(OSError):
            path.unlink()

    def _trim(self) -> None:
        """Remove the longest unused files beyond the limit, and what killed processes left."""
        files = []
        for path in self._folder.parent.glob("*/*"):
            with contextlib.suppress(OSError):  # another process may be doing the same
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = 0
        for changed, size, path in sorted(files, reverse=True):
            total += size
            stale = path.suffix != ".kv" and time.time() - changed / 1e9 > _STALE_SECONDS
            if stale or (total > self._max_bytes and path.suffix == ".kv"):
                total -= size
                with contextlib.suppress(OSError):
                    path.unlink()
        for folder in self._folder.parent.iterdir():
            if folder != self._folder:
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A plain file that only its owner can have written.

    Raises:
        OSError, ValueError: it is something else.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError
        if os.name == "posix" and (status.st_mode & 0o077 or status.st_uid != os.getuid()):
            raise ValueError
        yield file


def _common_pages(one: bytes, other: bytes) -> int:
    """Whole pages at the beginning in which two texts agree."""
    n = min(len(one), len(other)) // PAGE_KEY
    a, b = (np.frombuffer(ids, np.int32, n * PAGE_KEY // 4) for ids in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) * 4 // PAGE_KEY if len(differ) else n
