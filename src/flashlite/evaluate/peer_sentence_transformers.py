"""sentence-transformers as a peer, in FP32 with torch on the CPU; see worker.py.

`path` is the folder of the checkpoint that our artifact was made from.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Model"]


class Model:
    """A checkpoint open in sentence-transformers."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        del context  # texts are as long as the model says
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
        import torch
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

        torch.set_num_threads(threads)
        self._model: Any = SentenceTransformer(path, device="cpu")

    def embed(self, texts: list[str], batch: int) -> tuple[float, NDArray[np.float32]]:
        """Seconds from texts to vectors, and these; it sorts texts by length itself."""
        start = time.perf_counter()
        vectors: NDArray[np.float32] = self._model.encode(
            texts,
            batch_size=batch,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return time.perf_counter() - start, vectors

    def close(self) -> None:
        """Free everything."""
        del self._model
