"""A compiled model as ctypes sees it: one typed wrapper per function of `csrc/fl.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import EngineError, MemoryCeiling, UnsupportedTarget

__all__ = [
    "ABI",
    "MARK",
    "MARKS",
    "MAX_BATCH",
    "NEEDS",
    "PAGE_TOKENS",
    "CBatch",
    "CDraw",
    "CHeadCounts",
    "CInfo",
    "COptions",
    "CSampling",
    "Library",
    "Need",
    "load_library",
]

# As in fl.h; the library repeats them in fl_describe and is refused when it disagrees.
ABI = 4
MAX_BATCH = 256
PAGE_TOKENS = 32
MARKS = 16384  # that a thread of a profiled library keeps
MARK = np.dtype([("end", "<u8"), ("waited", "<u4"), ("part", "<u2"), ("layer", "<u2")])
"""`fl_mark`: a part of a step ended."""

Need = Literal["likely", "all", "largest"]
"""Which logits of a row have to be exact where the model has a screen (`fl_need`): those that a
draw can reach, every one, or the largest alone. The others are estimates.
"""
NEEDS: Mapping[Need, int] = {"likely": 0, "all": 1, "largest": 2}


class COptions(ctypes.Structure):
    """`fl_options`."""

    _fields_ = [
        ("abi", c_uint32),
        ("n_threads", c_uint32),
        ("weights", c_void_p),
        ("weights_size", c_size_t),
        ("n_pages", c_uint32),
        ("max_sequences", c_uint32),
        ("exact_head", c_uint32),
    ]


class CBatch(ctypes.Structure):
    """`fl_batch`."""

    _fields_ = [
        ("n_tokens", c_uint32),
        ("n_sequences", c_uint32),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("pages", c_void_p),
        ("page_stride", c_uint32),
        ("n_logits", c_uint32),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("needs", c_void_p),
        ("hidden", c_void_p),
    ]


class CInfo(ctypes.Structure):
    """`fl_info`."""

    _fields_ = [
        ("abi", c_uint32),
        ("vocab_size", c_uint32),
        ("d_model", c_uint32),
        ("has_screen", c_uint32),
        ("max_context", c_uint32),
        ("page_tokens", c_uint32),
        ("page_bytes", c_size_t),
        ("weights_size", c_size_t),
        ("scratch_bytes", c_size_t),
        ("isa", c_char_p),
        ("artifact", c_char_p),
    ]


class CHeadCounts(ctypes.Structure):
    """`fl_head_counts`."""

    _fields_ = [
        ("rows", c_uint64),
        ("full", c_uint64),
        ("estimated", c_uint64),
        ("exact", c_uint64),
    ]


class CSampling(ctypes.Structure):
    """`fl_sampling`."""

    _fields_ = [
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("seed", c_uint64),
        ("draw", c_uint64),
        ("history", c_void_p),
        ("n_history", c_uint32),
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("n_bias", c_uint32),
    ]


class CDraw(ctypes.Structure):
    """`fl_draw`."""

    _fields_ = [
        ("token", c_int32),
        ("logprob", c_float),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("n_top", c_uint32),
        ("skip_logprob", c_uint32),
    ]


class Library:
    """One loaded model library. The GIL is released while a call runs."""

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineError(
                f"{path}: cannot be loaded: {error}; compile the model again"
            ) from None
        signatures = {
            "fl_describe": (None, [POINTER(CInfo), c_uint32]),
            "fl_open": (c_int32, [POINTER(COptions), POINTER(c_void_p)]),
            "fl_step": (c_int32, [c_void_p, POINTER(CBatch)]),
            "fl_close": (None, [c_void_p]),
            "fl_count_head": (None, [c_void_p, POINTER(CHeadCounts)]),
            "fl_page_read": (c_int32, [c_void_p, c_uint32, c_void_p, c_size_t]),
            "fl_page_write": (c_int32, [c_void_p, c_uint32, c_void_p, c_size_t]),
            "fl_sample": (
                c_int32,
                [c_void_p, c_uint32, POINTER(CSampling), c_void_p, POINTER(CDraw)],
            ),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._c, name)
            function.restype = result
            function.argtypes = arguments
        self.profiles = hasattr(self._c, "fl_profile_read")  # built with FL_PROFILE
        if self.profiles:
            self._c.fl_profile_read.restype = c_uint32
            self._c.fl_profile_read.argtypes = [
                c_void_p, c_uint32, c_void_p, c_uint32, POINTER(c_uint64)
            ]  # fmt: skip
        self.info = self.describe(1)
        if self.info.abi != ABI or self.info.page_tokens != PAGE_TOKENS:
            raise EngineError(
                f"{path}: built for ABI {self.info.abi}, this flashlite speaks {ABI}; "
                "compile the model again"
            )

    def describe(self, n_threads: int) -> CInfo:
        """What the library holds; `scratch_bytes` is for this many threads."""
        info = CInfo()
        self._c.fl_describe(info, n_threads)
        return info

    def open(self, options: COptions) -> c_void_p:
        """Open an engine; the weights must stay alive until `close`.

        Raises:
            EngineError, MemoryCeiling, UnsupportedTarget: as the status says.
        """
        handle = c_void_p()
        self.check(self._c.fl_open(options, handle), "open")
        return handle

    def step(self, handle: c_void_p, batch: CBatch) -> None:
        """Run one batch.

        Raises:
            EngineError: an id, position or page is outside its range.
        """
        self.check(self._c.fl_step(handle, batch), "step")

    def close(self, handle: c_void_p) -> None:
        """Stop the engine's threads and release its memory."""
        self._c.fl_close(handle)

    def count_head(self, handle: c_void_p) -> CHeadCounts:
        """What the split head has done since the engine was opened."""
        counts = CHeadCounts()
        self._c.fl_count_head(handle, counts)
        return counts

    def read_page(self, handle: c_void_p, page: int, out: int, size: int) -> None:
        """Copy a KV page to the address `out`.

        Raises:
            EngineError: there is no such page, or `size` is not that of a page.
        """
        self.check(self._c.fl_page_read(handle, page, out, size), "page_read")

    def write_page(self, handle: c_void_p, page: int, source: int, size: int) -> None:
        """Copy a KV page from the address `source`.

        Raises:
            EngineError: as `read_page`.
        """
        self.check(self._c.fl_page_write(handle, page, source, size), "page_write")

    def read_marks(
        self, handle: c_void_p, thread: int, out: NDArray[np.void]
    ) -> tuple[NDArray[np.void], int]:
        """Take the marks of one thread since the last call.

        Args:
            handle: of `open`.
            thread: 0, the caller's, to the engine's last.
            out: of `MARK`, [MARKS]; what is returned is a part of it.

        Returns:
            The marks, oldest first, and how many more there were than anybody kept.

        Raises:
            EngineError: the library was not built to be profiled.
        """
        if not self.profiles:
            raise EngineError("the library was not built to be profiled; compile it with profile")
        lost = c_uint64()
        n = self._c.fl_profile_read(handle, thread, out.ctypes.data, len(out), lost)
        return out[: int(n)], int(lost.value)

    def sample(
        self, logits: int, vocab: int, sampling: CSampling, scratch: int, draw: CDraw
    ) -> None:
        """Draw one token; `logits` and `scratch` are addresses.

        Raises:
            EngineError: a logit is not a number, or a setting is outside its range.
        """
        self.check(self._c.fl_sample(logits, vocab, sampling, scratch, draw), "sample")

    def check(self, status: int, call: str) -> None:
        """Raise the error of a status that is not FL_OK."""
        if status == 0:
            return
        isa = (self.info.isa or b"").decode() if hasattr(self, "info") else "?"
        if status == 3:
            raise MemoryCeiling(
                "the system refused the engine's memory; lower max_sequence_length or max_mem"
            )
        if status == 6:
            raise UnsupportedTarget(
                f"the library needs {isa}, which this CPU lacks; compile the model on this machine"
            )
        reasons = {
            1: "library and caller were built from different headers; compile the model again",
            2: "a count, id, position or page is outside its range",
            4: "the system refused a thread; lower threads",
            5: "the weights are not this model's; compile the model again",
        }
        raise EngineError(f"{call}: {reasons.get(status, f'status {status}')}")


@functools.cache
def load_library(path: Path) -> Library:
    """The library at `path`, loaded once per process."""
    return Library(path)
