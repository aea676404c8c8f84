"""Sizes of memory as people write them, and a plan that keeps within one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flashlite.errors import MemoryCeiling, UsageError

__all__ = ["Ledger", "format_size", "parse_size", "plan_tokens", "resident_bytes"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]?I?B?)", re.IGNORECASE | re.ASCII)
_FEWEST_TOKENS = 64


def parse_size(text: str | int) -> int:
    """Bytes of `2GB` (decimal), `2GiB` (binary) or a number.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    match = _SIZE.fullmatch(str(text).strip())
    unit = match.group(2).upper() if match else ""
    unit = unit + "B" if unit in ("K", "M", "G", "KI", "MI", "GI") else unit
    if match is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write 2GB, 1.5GiB, 500MB or a number of bytes")
    size = int(float(match.group(1)) * _UNITS[unit])
    if size <= 0:
        raise UsageError(f"{text!r} is not a size above zero")
    return size


def format_size(n: int) -> str:
    """`97.4 MB`, in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


@dataclass(frozen=True)
class Ledger:
    """What a running model may hold, in bytes."""

    weights: int
    scratch: int
    logits: int
    runtime: int  # interpreter, libraries, tokenizer: measured, not estimated
    kv_page: int  # bytes of one page
    page_tokens: int

    @property
    def fixed(self) -> int:
        """Everything but the KV arena."""
        return self.weights + self.scratch + self.logits + self.runtime

    def total(self, tokens: int) -> int:
        """Bytes with an arena for this many tokens."""
        return self.fixed + -(-tokens // self.page_tokens) * self.kv_page


def plan_tokens(ledger: Ledger, *, context: int, wanted: int | None, ceiling: int | None) -> int:
    """How many KV positions to reserve.

    Args:
        context: positions the model was trained for.
        wanted: `max_sequence_length`, None: as many as fit, up to the context.
        ceiling: `max_mem` in bytes, or None.

    Raises:
        UsageError: `wanted` is not within 1 .. context.
        MemoryCeiling: it does not fit; every term is named.
    """
    if wanted is not None and not 1 <= wanted <= context:
        raise UsageError(f"max_sequence_length is {wanted}, this model allows 1 to {context}")
    if ceiling is None:
        return context if wanted is None else wanted
    fitting = max(0, ceiling - ledger.fixed) // ledger.kv_page * ledger.page_tokens
    need = min(_FEWEST_TOKENS, context) if wanted is None else wanted
    if need > fitting:
        raise MemoryCeiling(
            f"the model needs {format_size(ledger.total(need))} for {need} tokens of context "
            f"(weights {format_size(ledger.weights)}, KV cache "
            f"{format_size(ledger.total(need) - ledger.fixed)}, scratch "
            f"{format_size(ledger.scratch + ledger.logits)}, runtime "
            f"{format_size(ledger.runtime)}) and max_mem is {format_size(ceiling)}; raise max_mem "
            "or lower max_sequence_length"
        )
    return min(context, fitting) if wanted is None else wanted


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now (`VmRSS`) or at its highest (`VmHWM`); 0 if unknown."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0
