"""`MachineProfile`: what one machine's kernels do per second, as a file.

`flashlite profile --machine -o machine.json` measures and writes it; `latency.py` predicts from it
how fast a plan would run there, before anything is quantized. It holds for one CPU and one table
of kernels, whose digest it names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashlite.errors import CompressError

__all__ = ["BATCHES", "MachineProfile", "Rates"]

VERSION = 1
BATCHES = (2, 4, 8, 16, 64, 256)
"""Tokens of a step for which products are measured."""

_LIMIT = 1 << 20  # bytes of a file
_KEYS = {"version", "cpu", "isa", "kernels", "rates"}
_PAIRS = ("one", "many")


@dataclass(frozen=True)
class Rates:
    """What is measured with one number of threads.

    Attributes:
        threads: of the engine.
        read_gb_s: bare reading of memory.
        dot_gmac_s: bare integer products; None where the instruction set has none.
        gather_gb_s: bare reading of pieces of 256 bytes that lie apart.
        kv_gb_s: pages of KV cache read by a step of one token, beside what computing takes.
        gemv_gb_s: by format, packed weights multiplied by one token.
        gemm_gmac_s: by format and tokens of a step, weights multiplied by several.
        fixed_us: by part of a step, what it takes however small it is: calls, barriers, waking.
        element_ns: by part of a step, what each number that it goes over takes: of a step of one
            token, and of several.
        attend_ns: of one token and of several: what a position takes that one query head sees, and
            what each channel of it adds.
    """

    threads: int
    read_gb_s: float
    dot_gmac_s: float | None
    gather_gb_s: float
    kv_gb_s: float
    gemv_gb_s: Mapping[str, float]
    gemm_gmac_s: Mapping[str, Mapping[int, float]]
    fixed_us: Mapping[str, float] = field(default_factory=dict)
    element_ns: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    attend_ns: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))

    def gemm(self, fmt: str, tokens: int) -> float:
        """GMAC/s of a step of so many tokens, between what was measured on a logarithmic scale."""
        table = self.gemm_gmac_s[fmt]
        sizes = sorted(table)
        if tokens <= sizes[0] or tokens >= sizes[-1]:
            return table[sizes[0] if tokens <= sizes[0] else sizes[-1]]
        high = next(size for size in sizes if size >= tokens)
        low = max(size for size in sizes if size <= tokens)
        if low == high:
            return table[low]
        at = math.log(tokens / low) / math.log(high / low)
        return float(table[low] ** (1 - at) * table[high] ** at)


@dataclass(frozen=True)
class MachineProfile:
    """A machine, its kernels, and their rates by number of threads."""

    cpu: str
    isa: str
    kernels: str  # digest of the C of the kernels and how it was compiled
    rates: tuple[Rates, ...]

    def of(self, threads: int | None = None) -> Rates:
        """The rates of so many threads; None: of the most that were measured.

        Raises:
            CompressError: that number was not measured.
        """
        if threads is None:
            return max(self.rates, key=lambda rates: rates.threads)
        for rates in self.rates:
            if rates.threads == threads:
                return rates
        known = ", ".join(str(rates.threads) for rates in self.rates)
        raise CompressError(
            f"the machine was not measured with {threads} threads, only with {known}; measure it "
            f"with flashlite profile --machine --threads {threads}"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal profile."""
        rates = []
        for one in self.rates:
            data = asdict(one)
            data["gemm_gmac_s"] = {
                fmt: {str(n): rate for n, rate in table.items()}
                for fmt, table in one.gemm_gmac_s.items()
            }
            data["element_ns"] = {part: list(pair) for part, pair in one.element_ns.items()}
            data["attend_ns"] = [list(pair) for pair in one.attend_ns]
            rates.append(data)
        return {
            "version": VERSION,
            "cpu": self.cpu,
            "isa": self.isa,
            "kernels": self.kernels,
            "rates": rates,
        }

    @classmethod
    def from_json(cls, data: object) -> MachineProfile:
        """Read what `to_json` wrote.

        Raises:
            CompressError: it is not a machine profile, or one of another version.
        """
        if not isinstance(data, dict) or set(data) != _KEYS:
            raise _bad(f"an object of {', '.join(sorted(_KEYS))}")
        if data["version"] != VERSION:
            raise CompressError(
                f"the machine profile has version {str(data['version'])[:20]}, this flashlite "
                f"reads {VERSION}; measure it again with flashlite profile --machine"
            )
        for name in ("cpu", "isa", "kernels"):
            if not isinstance(data[name], str):
                raise _bad(f"text as {name}")
        if not isinstance(data["rates"], list) or not data["rates"]:
            raise _bad("a list of rates")
        rates = tuple(_rates(one) for one in data["rates"])
        if len({one.threads for one in rates}) != len(rates):
            raise _bad("each number of threads once")
        return cls(data["cpu"], data["isa"], data["kernels"], rates)

    @classmethod
    def read(cls, path: Path) -> MachineProfile:
        """Read a file that `flashlite profile --machine` wrote.

        Raises:
            CompressError: it cannot be read, or is not a machine profile.
        """
        try:
            with path.open("rb") as file:
                raw = file.read(_LIMIT + 1)
        except OSError as error:
            raise CompressError(
                f"{path}: {error.strerror}; make it with flashlite profile --machine -o {path}"
            ) from None
        if len(raw) > _LIMIT:
            raise CompressError(f"{path}: is larger than {_LIMIT} bytes, no machine profile")
        try:
            return cls.from_json(json.loads(raw))
        except (ValueError, RecursionError):
            raise CompressError(f"{path}: is no JSON") from None
        except CompressError as error:
            raise CompressError(f"{path}: {error}") from None


def _rates(data: object) -> Rates:
    names = set(Rates.__dataclass_fields__)
    if not isinstance(data, dict) or set(data) != names:
        raise _bad(f"rates of {', '.join(sorted(names))}")
    threads = data["threads"]
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise _bad("threads as a number from 1 to 1024")
    attend = data["attend_ns"]
    if not isinstance(attend, list) or len(attend) != len(_PAIRS):
        raise _bad("two pairs as attend_ns")
    dots = data["dot_gmac_s"]
    tables = _object(data["gemm_gmac_s"], "gemm_gmac_s")
    gemm = {fmt: _batches(table, fmt) for fmt, table in tables.items()}
    gemv = {
        fmt: _positive(rate, f"gemv_gb_s of {fmt}")
        for fmt, rate in _object(data["gemv_gb_s"], "gemv_gb_s").items()
    }
    if set(gemm) != set(gemv) or not gemv:
        raise _bad("the same formats in gemv_gb_s and gemm_gmac_s")
    return Rates(
        threads,
        _positive(data["read_gb_s"], "read_gb_s"),
        None if dots is None else _positive(dots, "dot_gmac_s"),
        _positive(data["gather_gb_s"], "gather_gb_s"),
        _positive(data["kv_gb_s"], "kv_gb_s"),
        gemv,
        gemm,
        {
            part: _number(value, f"fixed_us of {part}")
            for part, value in _object(data["fixed_us"], "fixed_us").items()
        },
        {
            part: _pair(pair, f"element_ns of {part}")
            for part, pair in _object(data["element_ns"], "element_ns").items()
        },
        (_pair(attend[0], "attend_ns"), _pair(attend[1], "attend_ns")),
    )


def _batches(data: object, fmt: str) -> dict[int, float]:
    found = {}
    for key, rate in _object(data, f"gemm_gmac_s of {fmt}").items():
        if not key.isdecimal() or not 2 <= int(key) <= 1 << 20:
            raise _bad(f"numbers of tokens in gemm_gmac_s of {fmt}")
        found[int(key)] = _positive(rate, f"gemm_gmac_s of {fmt}")
    if not found:
        raise _bad(f"a rate in gemm_gmac_s of {fmt}")
    return found


def _object(data: object, name: str) -> dict[str, Any]:
    if not isinstance(data, dict) or len(data) > 100:
        raise _bad(f"an object as {name}")
    return data


def _pair(data: object, name: str) -> tuple[float, float]:
    if not isinstance(data, list) or len(data) != len(_PAIRS):
        raise _bad(f"two numbers as {name}")
    return _number(data[0], name), _number(data[1], name)


def _positive(value: object, name: str) -> float:
    number = _number(value, name)
    if number <= 0:
        raise _bad(f"a number above 0 as {name}")
    return number


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _bad(f"a number as {name}")
    if not 0 <= value <= 1e12:  # a NaN fails it too
        raise _bad(f"a number from 0 to 1e12 as {name}")
    return float(value)


def _bad(wanted: str) -> CompressError:
    return CompressError(
        f"a machine profile has {wanted}; measure it again with flashlite profile --machine"
    )
