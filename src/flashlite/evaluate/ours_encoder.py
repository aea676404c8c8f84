"""flashlite's encoder as a measured engine; see worker.py. `path` is an artifact's directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.read import open_artifact
from flashlite.codegen.target import host_target
from flashlite.runtime.encoder import open_encoder

__all__ = ["Model"]


class Model:
    """An artifact open in flashlite."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        del context  # texts are as long as the model says
        self._encoder = open_encoder(open_artifact(Path(path)), host_target(), threads=threads)

    def embed(self, texts: Sequence[str], batch: int) -> tuple[float, NDArray[np.float32]]:
        """Seconds from texts to vectors, and these; it fills its steps as it likes."""
        del batch
        start = time.perf_counter()
        vectors = self._encoder.embed(texts)
        return time.perf_counter() - start, vectors

    def close(self) -> None:
        """Free everything."""
        self._encoder.close()
