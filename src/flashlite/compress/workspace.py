"""What an interrupted quantization leaves behind, so that the next one goes on from there.

    FOLDER/layer-7.npz    every matrix of a layer in every format tried; whole or not there

Matrices are read back one at a time: a model may be larger than memory. The folder is named by all
that decides its contents, so that it never serves another model, plan or text.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.gptq import weights_of
from flashlite.compress.pack import Quantized
from flashlite.compress.walk import Rounded
from flashlite.errors import CompressError

__all__ = ["Workspace"]


class Workspace:
    """Rounded matrices on disk, by layer."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is made if it is not there.

        Raises:
            OSError: it cannot be made.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.new"):
            stale.unlink(missing_ok=True)

    def layer(self, i: int) -> list[Rounded] | None:
        """What was stored of a layer; None where nothing, or nothing whole, is there."""
        path = self._path(i)
        if not path.exists():
            return None
        try:
            # Opened here: of a damaged file the library would forget to close its own.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(bytes(stored["about"]))
                return [_rounded(entry, stored) for entry in about]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, i: int, layer: Sequence[Rounded]) -> None:
        """Store a layer under another name, then rename it into place.

        Raises:
            OSError: the disk is full or refuses.
        """
        arrays: dict[str, NDArray[Any]] = {}
        about = []
        for rounded in layer:
            about.append(
                {
                    "name": rounded.name,
                    "formats": list(rounded.matrices),
                    "steps": dict(rounded.steps),
                    "errors": {fmt: dict(errors) for fmt, errors in rounded.errors.items()},
                }
            )
            for fmt, matrix in rounded.matrices.items():
                arrays[f"{rounded.name}/{fmt}/codes"] = matrix.codes
                arrays[f"{rounded.name}/{fmt}/scales"] = matrix.scales
                if matrix.mins is not None:
                    arrays[f"{rounded.name}/{fmt}/mins"] = matrix.mins
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        path = self._path(i)
        temporary = path.with_name(f"{path.name}.new")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)

    def matrix(self, name: str, fmt: str) -> Quantized:
        """One matrix of a saved layer.

        Raises:
            CompressError: it is not there.
        """
        try:
            path = self._path(int(name.split(".")[1]))
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return _matrix(name, fmt, stored)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CompressError(
                f"{self.folder}: {name} in {fmt} is not there ({error}); run the same command again"
            ) from None

    def weights(self, name: str, fmt: str, cols: int) -> NDArray[np.float32]:
        """The weights of one matrix.

        Raises:
            CompressError: as `matrix`.
        """
        return weights_of(self.matrix(name, fmt), cols)

    def remove(self) -> None:
        """The work is done: delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, i: int) -> Path:
        return self.folder / f"layer-{i}.npz"


def _rounded(entry: Any, stored: Any) -> Rounded:
    name = entry["name"]
    matrices = {fmt: _matrix(name, fmt, stored) for fmt in entry["formats"]}
    return Rounded(name, matrices, entry["steps"], entry["errors"])


def _matrix(name: str, fmt: str, stored: Any) -> Quantized:
    key = f"{name}/{fmt}/mins"
    mins = stored[key] if key in stored else None  # noqa: SIM401 - an archive, no mapping
    return Quantized(fmt, stored[f"{name}/{fmt}/codes"], stored[f"{name}/{fmt}/scales"], mins)
