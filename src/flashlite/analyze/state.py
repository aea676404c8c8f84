"""`State`: what an interrupted analysis has found so far, so that the next one goes on from there.

    FOLDER/key.json       the model and the settings; a folder of others is emptied
    FOLDER/NAME.json      a finished part
    FOLDER/NAME.npz       arrays of a part

Each file appears whole or not at all; one that cannot be read counts as missing.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import UsageError

__all__ = ["State"]


class State:
    """Parts of an analysis on disk."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Use the folder; made when it is missing, emptied when its key is another.

        Args:
            folder: ours alone.
            key: all that decides what is found.
            fresh: forget what is there.

        Raises:
            UsageError: a folder of that name holds something else.
            OSError: it cannot be made.
        """
        self.folder = folder
        text = json.dumps(key, sort_keys=True)
        marker = folder / "key.json"
        if folder.exists() and any(folder.iterdir()) and not marker.exists():
            raise UsageError(f"{folder} is there and holds no analysis; move it away")
        if fresh or not marker.exists() or marker.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._write("key.json", text.encode())
        for stale in folder.glob("*.new"):
            stale.unlink(missing_ok=True)

    def load(self, name: str) -> Any:
        """A part, None where it is missing."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save(self, name: str, part: Any) -> None:
        """Keep a part.

        Raises:
            OSError: the disk is full or refuses.
        """
        self._write(f"{name}.json", json.dumps(part, allow_nan=False).encode())

    def load_arrays(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Arrays by name, None where they are missing."""
        try:
            # Opened here: np.load leaves a damaged file open.
            with (self.folder / f"{name}.npz").open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def save_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays.

        Raises:
            OSError: the disk is full or refuses.
        """
        temporary = self.folder / f"{name}.npz.new"
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))
        temporary.replace(self.folder / f"{name}.npz")

    def remove(self) -> None:
        """The work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{name}.new"
        temporary.write_bytes(content)
        temporary.replace(self.folder / name)
