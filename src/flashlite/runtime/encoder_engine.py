"""`EncoderEngine`: one compiled encoder in memory, stepped with whole texts.

    ids of texts -> steps of up to 512 tokens, texts behind each other, no padding -> vectors

What a text's vector is depends on its ids alone, bit for bit, whatever is in the step beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import ContextOverflow, EngineError, UsageError
from flashlite.runtime.engine import default_threads
from flashlite.runtime.library import ABI, PAGE_TOKENS, CBatch, COptions, Library

__all__ = ["MAX_TEXTS", "PAGES", "STEP_TOKENS", "EncoderEngine"]

STEP_TOKENS = 512  # in one step: FL_MAX_TEXT
MAX_TEXTS = 64  # in one step
PAGES = MAX_TEXTS + STEP_TOKENS // PAGE_TOKENS  # of keys and values: each text begins a page

Ids = Sequence[int]


class EncoderEngine:
    """A compiled encoder and its weights.

    Example:
        with EncoderEngine(library, weights) as engine:
            vectors = engine.embed([[101, 7592, 102], [101, 102]])  # float32 (2, d_model)
    """

    def __init__(
        self, library: Library, weights: NDArray[np.uint8], *, threads: int | None = None
    ) -> None:
        """Open the engine.

        Args:
            library: compiled for exactly these weights.
            weights: the artifact's data section, 64-byte aligned; kept alive, never copied.
            threads: None: one per core this process may use.

        Raises:
            UsageError: `threads` is outside its range.
            EngineError, MemoryCeiling, UnsupportedTarget: the library refused.
        """
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= 64:
            raise UsageError(f"threads is {self.threads}, allowed 1 to 64")
        self.library = library
        self.info = library.describe(self.threads)
        self.d_model = int(self.info.d_model)
        self.max_context = int(self.info.max_context)
        self._weights = weights
        options = COptions(
            abi=ABI,
            n_threads=self.threads,
            weights=weights.ctypes.data,
            weights_size=weights.nbytes,
            n_pages=PAGES,
            max_sequences=MAX_TEXTS,
        )
        self._handle = library.open(options)
        self._stride = -(-self.max_context // PAGE_TOKENS)

    @property
    def is_open(self) -> bool:
        """Whether it can step."""
        return bool(self._handle)

    def embed(self, texts: Sequence[Ids]) -> NDArray[np.float32]:
        """The vectors of texts, float32 (texts, d_model), each of length 1.

        Args:
            texts: ids of each whole text, with what the tokenizer puts around it.

        Raises:
            ContextOverflow: FL-405, a text is longer than the model takes.
            EngineError: a text is empty or holds an id outside the vocabulary, or the engine is
                closed.
        """
        if not self.is_open:
            raise EngineError("the engine is closed")
        for text in texts:
            if not 1 <= len(text) <= self.max_context:
                if not len(text):
                    raise EngineError("a text has no tokens, not even those around it")
                raise ContextOverflow(len(text), self.max_context)
        vectors = np.empty((len(texts), self.d_model), np.float32)
        for first, last in _steps([len(text) for text in texts]):
            self._step(texts[first:last], vectors[first:last])
        return vectors

    def _step(self, texts: Sequence[Ids], out: NDArray[np.float32]) -> None:
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        total = int(lengths.sum())
        tokens = np.fromiter(chain.from_iterable(texts), np.int32, total)
        starts = np.cumsum(lengths) - lengths
        sequences = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
        positions = np.arange(total, dtype=np.int32) - starts.astype(np.int32)[sequences]
        counts = (lengths + (PAGE_TOKENS - 1)) // PAGE_TOKENS
        first_pages = (np.cumsum(counts) - counts).astype(np.int32)
        pages = first_pages[:, None] + np.arange(self._stride, dtype=np.int32)
        batch = CBatch(
            n_tokens=total,
            n_sequences=len(texts),
            tokens=tokens.ctypes.data,
            positions=positions.ctypes.data,
            sequences=sequences.ctypes.data,
            pages=pages.ctypes.data,
            page_stride=self._stride,
            n_logits=0,
            hidden=out.ctypes.data,
        )
        self.library.step(self._handle, batch)

    def close(self) -> None:
        """Stop the threads and release the memory; calling it again does nothing."""
        if self._handle:
            self.library.close(self._handle)
            self._handle.value = None

    def __enter__(self) -> EncoderEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()


def _steps(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of texts that fill a step: (first, behind the last)."""
    first = tokens = 0
    for i, length in enumerate(lengths):
        if tokens + length > STEP_TOKENS or i - first == MAX_TEXTS:
            yield first, i
            first, tokens = i, 0
        tokens += length
    if first < len(lengths):
        yield first, len(lengths)
