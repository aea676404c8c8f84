"""Logits of llama.cpp for given token ids; run by the Python of a peer environment.

    python llama_cpp_logits.py MODEL.gguf ids.npy logits.npy WINDOW

Each window of ids is evaluated from position 0 with an empty cache; logits.npy is (n, vocab).
"""

from __future__ import annotations

import sys

import numpy as np
from llama_cpp import Llama


def main() -> None:
    path, ids_path, out_path, window = sys.argv[1:]
    size = int(window)
    ids = np.load(ids_path)
    model = Llama(
        path, n_ctx=size, n_batch=size, n_ubatch=size, n_threads=2, n_threads_batch=2,
        logits_all=True, flash_attn=True, verbose=False,
    )  # fmt: skip
    out = np.lib.format.open_memmap(out_path, "w+", np.float32, (len(ids), model.n_vocab()))
    for i in range(0, len(ids), size):
        part = ids[i : i + size]
        model.reset()
        model.eval(part.tolist())
        out[i : i + len(part)] = model.scores[: len(part)]
    out.flush()


main()
