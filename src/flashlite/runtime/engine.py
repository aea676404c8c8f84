"""`Engine`: one compiled model in memory, stepped with batches of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from ctypes import c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import ContextOverflow, EngineError, UsageError
from flashlite.runtime.kvpages import PagePool, PageTable, pages_for
from flashlite.runtime.library import (
    ABI,
    MAX_BATCH,
    NEEDS,
    PAGE_TOKENS,
    CBatch,
    COptions,
    Library,
    Need,
)

__all__ = ["Engine", "HeadCounts", "Sequence", "Work", "default_threads"]

_MAX_THREADS = 64


class Sequence:
    """One timeline of tokens and its KV pages."""

    def __init__(self, table: PageTable, prompt: NDArray[np.int32] | None = None) -> None:
        self.table = table
        self.length = table.shared * PAGE_TOKENS  # positions 0 .. length - 1 are stored
        self.ids = np.zeros(table.max_tokens, np.int32)  # what they hold
        self._n_prompt = 0 if prompt is None else len(prompt)
        self._shares = prompt is not None
        if prompt is not None:
            self.ids[: len(prompt)] = prompt

    @property
    def shareable(self) -> int:
        """Tokens of the prompt that other sequences may have stored: whole pages, and never its
        last token, whose logits are wanted.
        """
        return max(self._n_prompt - 1, 0) // PAGE_TOKENS * PAGE_TOKENS

    def share(self) -> int:
        """Let others use the pages that are full, and use what others have stored of the prompt.

        The tokens before `length` are final from now on. A sequence made without its prompt
        shares nothing.

        Returns:
            Tokens of the prompt that need not be computed, beyond those of earlier calls.
        """
        if not self._shares:
            return 0
        table, before = self.table, self.length
        while (end := (table.shared + 1) * PAGE_TOKENS) <= self.length:
            table.publish(self._page_ids(), prompt=end <= self._n_prompt)
        while self.length == table.shared * PAGE_TOKENS < self.shareable:
            if not table.adopt(self._page_ids()):
                break
            self.length += PAGE_TOKENS
        return self.length - before

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on: what they stored will be written over.

        Raises:
            EngineError: others may be reading it.
        """
        if not self.table.shared * PAGE_TOKENS <= length <= self.length:
            raise EngineError(f"a sequence of {self.length} tokens cannot go back to {length}")
        self.length = length

    def release(self) -> None:
        """Give the pages back; the sequence holds nothing afterwards."""
        self.table.release()
        self.length = 0

    def _page_ids(self) -> bytes:
        """The ids of the first page that is not shared."""
        at = self.table.shared * PAGE_TOKENS
        return self.ids[at : at + PAGE_TOKENS].tobytes()


@dataclass(frozen=True)
class Work:
    """Tokens to append to one sequence in a step, and whose logits are wanted."""

    sequence: Sequence
    ids: Seq[int] | NDArray[np.int32]
    logits: Literal["none", "last", "all"] = "last"
    need: Need = "likely"


@dataclass(frozen=True)
class HeadCounts:
    """What the split head has done; all 0 where the model has none."""

    rows: int  # of logits that were screened
    full: int  # of these: computed in full, since the screen could not tell
    estimated: int  # logits that the others estimated with all columns
    exact: int  # blocks of 16 that they computed exactly


class Engine:
    """A compiled model, its weights, and an arena of KV pages.

    Example:
        with Engine(library, weights, max_tokens=2048) as engine:
            sequence = engine.new_sequence(2048)
            logits = engine.step([Work(sequence, prompt_ids)])  # float32 (1, vocab)
    """

    def __init__(
        self,
        library: Library,
        weights: NDArray[np.uint8],
        *,
        max_tokens: int,
        threads: int | None = None,
        max_sequences: int = 1,
        max_draft: int = 0,
        exact_head: bool = False,
    ) -> None:
        """Open the engine.

        Args:
            library: compiled for exactly these weights.
            weights: the artifact's data section, 64-byte aligned; kept alive, never copied.
            max_tokens: KV positions in the arena, over all sequences, rounded up to pages.
            threads: None: one per core this process may use.
            max_sequences: sequences in one step, 1 .. 256.
            max_draft: rows of logits kept ready beside one per sequence; a step that asks for
                more takes fresh memory.
            exact_head: compute every logit, also where the model has a screen.

        Raises:
            UsageError: a number is outside its range.
            EngineError, MemoryCeiling, UnsupportedTarget: the library refused.
        """
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= _MAX_THREADS:
            raise UsageError(f"threads is {self.threads}, allowed 1 to {_MAX_THREADS}")
        if not 1 <= max_sequences <= MAX_BATCH:
            raise UsageError(f"max_sequences is {max_sequences}, allowed 1 to {MAX_BATCH}")
        self.library = library
        self.info = library.describe(self.threads)
        self.vocab_size = int(self.info.vocab_size)
        self.max_context = int(self.info.max_context)
        self.pool = PagePool(pages_for(max_tokens))
        self.max_sequences = max_sequences
        self._weights = weights
        options = COptions(
            abi=ABI,
            n_threads=self.threads,
            weights=weights.ctypes.data,
            weights_size=weights.nbytes,
            n_pages=self.pool.n_pages,
            max_sequences=max_sequences,
            exact_head=exact_head,
        )
        self._handle = library.open(options)
        self._tokens = np.zeros(MAX_BATCH, np.int32)
        self._positions = np.zeros(MAX_BATCH, np.int32)
        self._sequences = np.zeros(MAX_BATCH, np.int32)
        self._logit_rows = np.zeros(MAX_BATCH, np.int32)
        self._needs = np.zeros(MAX_BATCH, np.uint8)
        self._pages = np.zeros((max_sequences, self.pool.n_pages), np.int32)
        self._logits = np.zeros((max_sequences + max_draft, self.vocab_size), np.float32)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by use: what the engine holds at most."""
        return {
            "weights": int(self._weights.nbytes),
            "kv": self.pool.n_pages * self.page_bytes,
            "scratch": int(self.info.scratch_bytes),
            "logits": int(self._logits.nbytes),
        }

    @property
    def is_open(self) -> bool:
        """Whether it can step."""
        return bool(self._handle)

    @property
    def page_bytes(self) -> int:
        """Of one KV page of the arena."""
        return int(self.info.page_bytes)

    def new_sequence(self, max_tokens: int, prompt: NDArray[np.int32] | None = None) -> Sequence:
        """A sequence of at most `max_tokens`, its pages reserved now, so that it cannot run short.

        Args:
            max_tokens: positions it may hold.
            prompt: what it will begin with, to share pages with other sequences; what they have
                stored of it is there from the start (`length`). None: it shares nothing.

        Raises:
            ContextOverflow: FL-405, more than the model's context or the whole arena.
            MemoryCeiling: the arena has not enough free pages at present.
        """
        limit = min(self.max_context, self.pool.n_pages * int(self.info.page_tokens))
        if max_tokens > limit:
            raise ContextOverflow(max_tokens, limit)
        if prompt is not None and len(prompt) > max_tokens:
            raise ContextOverflow(len(prompt), max_tokens)
        table = PageTable(self.pool, max_tokens)
        beginning = b"" if prompt is None else prompt[: len(prompt) - 1].tobytes()
        table.reserve(max_tokens, beginning)
        return Sequence(table, prompt)

    @property
    def head_counts(self) -> HeadCounts:
        """What the split head has done since the engine was opened.

        Raises:
            EngineError: the engine is closed.
        """
        counts = self.library.count_head(self._open_handle())
        return HeadCounts(
            int(counts.rows), int(counts.full), int(counts.estimated), int(counts.exact)
        )

    def step(
        self, work: Seq[Work], *, hidden: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Append tokens to sequences and return the logits asked for.

        Args:
            work: what to append to which sequence.
            hidden: float32 (rows, d_model), filled with what the head reads for every row of
                logits, after the final norm.

        Returns:
            float32 (rows, vocab), in order of `work`. With one row per sequence, and `max_draft`
            more, it is a view that the next step overwrites.

        Raises:
            ContextOverflow: a sequence would grow beyond what it reserved (FL-405).
            EngineError: the batch is empty, too large, or holds an id outside the vocabulary.
        """
        n, rows = self._fill(work)
        if hidden is not None and (
            hidden.shape != (rows, int(self.info.d_model)) or not hidden.flags.c_contiguous
        ):
            raise EngineError(f"hidden is {hidden.shape}, the step has {rows} rows of logits")
        logits = self._logits
        if rows > len(logits):  # "all": evaluation, not serving
            logits = np.empty((rows, self.vocab_size), np.float32)
        batch = CBatch(
            n_tokens=n,
            n_sequences=len(work),
            tokens=self._tokens.ctypes.data,
            positions=self._positions.ctypes.data,
            sequences=self._sequences.ctypes.data,
            pages=self._pages.ctypes.data,
            page_stride=self._pages.shape[1],
            n_logits=rows,
            logit_rows=self._logit_rows.ctypes.data,
            logits=logits.ctypes.data,
            needs=self._needs.ctypes.data,
            hidden=None if hidden is None else hidden.ctypes.data,
        )
        self.library.step(self._handle, batch)
        for item in work:
            sequence, end = item.sequence, item.sequence.length + len(item.ids)
            sequence.ids[sequence.length : end] = item.ids
            sequence.length = end
        return logits[:rows]

    def read_marks(self, thread: int, out: NDArray[np.void]) -> tuple[NDArray[np.void], int]:
        """The marks of one thread since the last call, and how many were lost; see `Library`.

        Raises:
            EngineError: the engine is closed, or its library was not built to be profiled.
        """
        return self.library.read_marks(self._open_handle(), thread, out)

    def read_page(self, page: int, out: NDArray[np.uint8]) -> None:
        """Copy a KV page of the arena to `out`, of `info.page_bytes`.

        Raises:
            EngineError: the engine is closed, or there is no such page, or it has another size.
        """
        self.library.read_page(self._open_handle(), page, out.ctypes.data, out.nbytes)

    def write_page(self, page: int, source: NDArray[np.uint8]) -> None:
        """Copy `source` to a KV page of the arena; otherwise as `read_page`."""
        self.library.write_page(self._open_handle(), page, source.ctypes.data, source.nbytes)

    def close(self) -> None:
        """Stop the threads and release the arena; calling it again does nothing."""
        if self._handle:
            self.library.close(self._handle)
            self._handle.value = None

    def _fill(self, work: Seq[Work]) -> tuple[int, int]:
        """Write the batch arrays; returns (tokens, rows of logits)."""
        self._open_handle()
        total = sum(len(item.ids) for item in work)
        if not work or len(work) > self.max_sequences or any(not len(item.ids) for item in work):
            raise EngineError(
                f"a step takes 1 to {self.max_sequences} sequences with tokens, not {len(work)}"
            )
        if total > MAX_BATCH:
            raise EngineError(f"a step takes at most {MAX_BATCH} tokens, not {total}")
        n = rows = 0
        for index, item in enumerate(work):
            sequence, count = item.sequence, len(item.ids)
            if sequence.length + count > sequence.table.max_tokens:
                raise ContextOverflow(sequence.length + count, sequence.table.max_tokens)
            end = n + count
            self._tokens[n:end] = item.ids
            self._positions[n:end] = np.arange(sequence.length, sequence.length + count)
            self._sequences[n:end] = index
            held = sequence.table.ids
            self._pages[index, : len(held)] = held
            wanted = {"none": 0, "last": 1, "all": count}[item.logits]
            self._needs[rows : rows + wanted] = NEEDS[item.need]
            self._logit_rows[rows : rows + wanted] = np.arange(end - wanted, end)
            rows += wanted
            n = end
        return n, rows

    def _open_handle(self) -> c_void_p:
        if not self.is_open:
            raise EngineError("the engine is closed")
        return self._handle

    def __enter__(self) -> Engine:
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


def default_threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)
