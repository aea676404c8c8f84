"""Memory as the system sees it: what this process holds, what the machine has free, and a limit.

All of it reads /proc and cgroups; elsewhere than on Linux figures are 0 or None and the limit does
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["free_memory", "limit_data", "resident_bytes", "return_unused"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_RUST_STACK = 2 << 20  # of each thread that hashes or tokenizes
_OUR_THREADS = 3  # the interpreter's: one that reads weights, one that steps, one to spare


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process: resident now (`VmRSS`), at its highest (`VmHWM`), or the mappings
    that count against RLIMIT_DATA (`VmData`); 0 if unknown.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def free_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that can be taken without swapping: what the machine has available, or less where a
    cgroup (a container) allows less; None if unknown.
    """
    try:
        text = (proc / "meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    found = [int(match.group(1)) * 1024] if match else []
    found += _cgroup_rooms(proc, cgroups)
    return max(0, min(found)) if found else None


def return_unused() -> None:
    """Give freed heap back to the system (glibc): building a vocabulary frees half of what it
    took, in pieces that malloc would keep.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def limit_data(ceiling: int | None, threads: int = 1) -> Iterator[None]:
    """Let this process's private memory grow to `ceiling` bytes resident and not much beyond.

    RLIMIT_DATA counts what is mapped, a ceiling what is touched. So what is mapped now may grow by
    what the ceiling leaves, and by the stacks of threads yet to start, which are mapped whole and
    hardly touched. Beyond that an allocation fails (MemoryError) instead of the process being
    killed. Only the soft limit is lowered, never raised; it is put back when the last of several
    limits ends. Child processes inherit it.
    """
    if ceiling is None or sys.platform != "linux":
        yield
        return
    import resource

    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stack = _RUST_STACK if stack == resource.RLIM_INFINITY else stack
    room = max(0, ceiling - resident_bytes())
    stacks = (threads + _OUR_THREADS) * stack + (os.cpu_count() or 1) * _RUST_STACK
    limit = resident_bytes("VmData") + room + stacks
    _limits.add(limit)
    try:
        yield
    finally:
        _limits.remove(limit)


class _Limits:
    """The data limits in force; the lowest counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ours: list[int] = []
        self._before = -1  # the soft limit without ours

    def add(self, limit: int) -> None:
        import resource

        with self._lock:
            if not self._ours:
                self._before = resource.getrlimit(resource.RLIMIT_DATA)[0]
            self._ours.append(limit)
            self._apply()

    def remove(self, limit: int) -> None:
        with self._lock:
            self._ours.remove(limit)
            self._apply()

    def _apply(self) -> None:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        known = [n for n in (*self._ours, self._before, hard) if n != resource.RLIM_INFINITY]
        soft = min(known) if known else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


_limits = _Limits()


def _cgroup_rooms(proc: Path, cgroups: Path) -> list[int]:
    """What each cgroup with a memory limit that holds this process has left."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2
            mount, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = (
                cgroups / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path may be that of the host, and the mount the container's own.
        group = mount / path.strip("/")
        while True:
            room = _room(group, limit, usage, cache)
            rooms += [] if room is None else [room]
            if group == mount or mount not in group.parents:
                break
            group = group.parent
    return rooms


def _room(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes left below one group's limit; file cache that can be dropped counts as left."""
    try:
        most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
        stat = (group / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):  # "max": no limit
        return None
    match = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
    return most - used + (int(match.group(1)) if match else 0)
