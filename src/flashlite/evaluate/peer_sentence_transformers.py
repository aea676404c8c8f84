"""sentence-transformers as a peer, in FP32 with torch on the CPU; see worker.py.

`path` is the folder of the checkpoint that our artifact was made from.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before what reads it is imported

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

__all__ = ["Model"]


class Model:
    """A checkpoint open in sentence-transformers."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        del context  # texts are as long as the model says
        torch.set_num_threads(threads)
        self._model: Any = SentenceTransformer(path, device="cpu")

    def embed(self, texts: list[str], batch: int) -> tuple[float, NDArray[np.float32]]:
        """Seconds from texts to vectors, and these; it sorts texts by length itself."""
        start = time.perf_counter()
        vectors = self._model.encode(
            texts,
            batch_size=batch,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return time.perf_counter() - start, np.asarray(vectors, np.float32)

    def close(self) -> None:
        """Free everything."""
        del self._model
