"""PyTorch as a peer, through transformers; see worker.py.

The path is a folder as transformers writes it; its last name is the type of the weights, `bfloat16`
or `float32`. At its best on a CPU: scaled-dot-product attention, a static loop that does nothing
but one forward and an argmax per token, logits of the last position alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__all__ = ["Model"]


class Model:
    """A causal language model open in PyTorch."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        del context  # its cache grows as needed
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        folder = Path(path)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, folder.name), attn_implementation="sdpa"
        ).eval()

    def prefill(self, ids: list[int]) -> float:
        """Seconds from an empty cache to the next token."""
        start = time.perf_counter()
        self._run(ids, None)
        return time.perf_counter() - start

    def decode(self, ids: list[int], n: int) -> float:
        """Seconds of `n` greedy steps after `ids`."""
        token, cache = self._run(ids, None)
        start = time.perf_counter()
        for _ in range(n):
            token, cache = self._run([token], cache)
        return time.perf_counter() - start

    def close(self) -> None:
        """Free everything."""
        del self._model

    def _run(self, ids: list[int], cache: Any) -> tuple[int, Any]:
        """Append `ids`; the most likely token after them, and the cache."""
        out = self._model(
            input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return int(out.logits[0, -1].argmax()), out.past_key_values
