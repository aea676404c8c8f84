"""flashlite itself as a measured engine; see worker.py. `path` is an artifact's directory."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np

from flashlite.artifact.read import load_texts, load_weights, open_artifact
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact
from flashlite.runtime.process import return_unused

__all__ = ["Model", "decode_seconds", "prefill_seconds"]


class Model:
    """An artifact open in flashlite: checked, its library from the cache, its tokenizer loaded."""

    exact_head = False

    def __init__(self, path: str, threads: int, context: int, sequences: int = 1) -> None:
        artifact = open_artifact(Path(path))
        self._tokenizer = Tokenizer(load_texts(artifact), name=artifact.name)
        return_unused()
        self._engine = Engine(
            load_library(compile_artifact(artifact)),
            load_weights(artifact),
            max_tokens=context,
            threads=threads,
            max_sequences=sequences,
            exact_head=self.exact_head,
        )

    def prefill(self, ids: Seq[int]) -> float:
        """Seconds from an empty cache to the next token."""
        return prefill_seconds(self._engine, ids)

    def decode(self, ids: Seq[int], n: int) -> float:
        """Seconds of `n` greedy steps after `ids`."""
        return decode_seconds(self._engine, [ids], n)

    def together(self, prompts: Seq[Seq[int]], n: int) -> float:
        """Seconds of `n` greedy steps of all prompts at once."""
        return decode_seconds(self._engine, prompts, n)

    def close(self) -> None:
        """Free everything."""
        self._engine.close()


def prefill_seconds(engine: Engine, ids: Seq[int]) -> float:
    """Seconds from an empty cache to the token after `ids`."""
    sequence = engine.new_sequence(len(ids))
    start = time.perf_counter()
    _append(engine, sequence, ids)
    seconds = time.perf_counter() - start
    sequence.release()
    return seconds


def decode_seconds(engine: Engine, prompts: Seq[Seq[int]], n: int) -> float:
    """Seconds of `n` greedy steps of all prompts at once, whose prefill is not counted."""
    sequences = [engine.new_sequence(len(ids) + n) for ids in prompts]
    tokens = [_append(engine, *pair) for pair in zip(sequences, prompts, strict=True)]
    start = time.perf_counter()
    for _ in range(n):
        work = [
            Work(s, [token], need="largest") for s, token in zip(sequences, tokens, strict=True)
        ]
        tokens = np.argmax(engine.step(work), axis=1).tolist()
    seconds = time.perf_counter() - start
    for sequence in sequences:
        sequence.release()
    return seconds


def _append(engine: Engine, sequence: Sequence, ids: Seq[int]) -> int:
    """Run `ids` through the engine; the most likely token after them."""
    last = (len(ids) - 1) // MAX_BATCH * MAX_BATCH
    for at in range(0, last, MAX_BATCH):
        engine.step([Work(sequence, ids[at : at + MAX_BATCH], "none")])
    return int(np.argmax(engine.step([Work(sequence, ids[last:], need="largest")])[0]))
