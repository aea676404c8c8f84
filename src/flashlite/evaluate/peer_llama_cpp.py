"""llama.cpp as a peer, through the lowest level of llama-cpp-python; see worker.py.

At its best: native build, flash attention, batches of 2048, and a greedy loop that does nothing
but decode one token and take the argmax of its logits.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

__all__ = ["Model"]

BATCH = 2048
MICRO_BATCH = 512  # the default; larger ones were not faster and take more memory


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _silence(level: int, text: bytes, user_data: Any) -> None:
    pass


class Model:
    """A GGUF file open in llama.cpp."""

    def __init__(self, path: str, threads: int, context: int, sequences: int = 1) -> None:
        llama.llama_log_set(_silence, None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = context
        params.n_seq_max = sequences
        params.n_batch = BATCH
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def prefill(self, ids: list[int]) -> float:
        """Seconds from an empty cache to the next token."""
        self._clear()
        start = time.perf_counter()
        self._run(ids)
        return time.perf_counter() - start

    def decode(self, ids: list[int], n: int) -> float:
        """Seconds of `n` greedy steps after `ids`."""
        self._clear()
        token = self._run(ids)
        start = time.perf_counter()
        for _ in range(n):
            token = self._run([token])
        return time.perf_counter() - start

    def together(self, prompts: list[list[int]], n: int) -> float:
        """Seconds of `n` greedy steps of all prompts at once."""
        self._clear()
        batch = llama.llama_batch_init(max(len(prompts), *map(len, prompts)), 0, 1)
        tokens = []
        for i, ids in enumerate(prompts):
            self._step(batch, [(token, at, i) for at, token in enumerate(ids)])
            tokens.append(self._logits_argmax(-1))
        start = time.perf_counter()
        for step in range(n):
            at = [len(ids) + step for ids in prompts]
            self._step(batch, list(zip(tokens, at, range(len(prompts)), strict=True)), every=True)
            tokens = [self._logits_argmax(row) for row in range(len(prompts))]
        seconds = time.perf_counter() - start
        llama.llama_batch_free(batch)
        return seconds

    def close(self) -> None:
        """Free everything."""
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def _run(self, ids: list[int]) -> int:
        """Append `ids`; the most likely token after them."""
        for at in range(0, len(ids), BATCH):
            part = ids[at : at + BATCH]
            tokens = (llama.llama_token * len(part))(*part)
            batch = llama.llama_batch_get_one(tokens, len(part))  # logits of the last one only
            self._decode(batch)
        return self._logits_argmax(-1)

    def _step(self, batch: Any, rows: list[tuple[int, int, int]], *, every: bool = False) -> None:
        """Run (token, position, sequence) rows; logits of each, or of the last one only."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = every or i == len(rows) - 1
        self._decode(batch)

    def _decode(self, batch: Any) -> None:
        if status := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {status}")

    def _logits_argmax(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)  # waits for the computation
        values = (ctypes.c_float * self._vocab_size).from_address(ctypes.addressof(logits.contents))
        return int(np.argmax(np.frombuffer(values, np.float32)))
