"""What a library is compiled for: an operating system, a CPU and one instruction set."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from flashlite.errors import UnsupportedTarget, UsageError

__all__ = ["ISAS", "Target", "check_isa", "host_isa", "host_target", "parse_target"]

# Best first. "fp32" is the test build: plain kernels, activations and KV kept in float.
ISAS = ("amx", "avx512", "avx2", "plain", "fp32")

_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = (*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")), *_AVX2_FLAGS)
_ISA_FLAGS = {
    # Tuned for the CPU that has them, the compiler makes the products by tiles a quarter faster.
    "amx": ("-mamx-tile", "-mamx-int8", "-mtune=sapphirerapids", *_AVX512_FLAGS),
    "avx512": _AVX512_FLAGS,
    "avx2": _AVX2_FLAGS,
    "plain": (),
    "fp32": (),
}
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_ISA_CPUINFO = {
    "amx": _AVX512 | {"amx_tile", "amx_int8"},
    "avx512": _AVX512,
    "avx2": _AVX2,
}
_SUFFIX = {"linux": ".so", "macos": ".dylib", "windows": ".dll"}


@dataclass(frozen=True)
class Target:
    """`triple` is None for the machine at hand, else a zig target such as aarch64-linux-gnu."""

    arch: str  # "x86_64", "aarch64", ...
    system: str  # "linux", "macos", "windows"
    isa: str  # one of ISAS
    triple: str | None = None

    @property
    def kernel_flags(self) -> tuple[str, ...]:
        """Compiler flags of the kernel file of this instruction set."""
        return _ISA_FLAGS[self.isa]

    @property
    def library_name(self) -> str:
        """File name of the compiled library."""
        return "model" + _SUFFIX[self.system]

    @property
    def label(self) -> str:
        """A short name for people and for cache folders."""
        return f"{self.triple or f'{self.arch}-{self.system}'}-{self.isa}"


def host_isa() -> str:
    """The best instruction set of this CPU; FLASHLITE_ISA forces another.

    Raises:
        UsageError: FLASHLITE_ISA names no instruction set.
        UnsupportedTarget: it names one that this CPU lacks (FL-612).
    """
    forced = os.environ.get("FLASHLITE_ISA")
    features = _cpu_features()
    if forced:
        if forced not in ISAS:
            raise UsageError(f"FLASHLITE_ISA is {forced!r}; use one of {', '.join(ISAS)}")
        check_isa(forced)
        return forced
    return next(isa for isa in ISAS if _ISA_CPUINFO.get(isa, set()) <= features)


def check_isa(isa: str) -> None:
    """Refuse an instruction set that this CPU does not run.

    Raises:
        UnsupportedTarget: FL-612, naming what lacks.
    """
    if missing := sorted(_ISA_CPUINFO.get(isa, set()) - _cpu_features()):
        raise UnsupportedTarget(
            f"the library needs {isa} and this CPU lacks {', '.join(missing)}; "
            "compile it on this machine, or for another instruction set with --isa avx2 or plain"
        )


def host_target(isa: str | None = None) -> Target:
    """The machine at hand.

    Raises:
        UsageError: `isa` names no instruction set.
        UnsupportedTarget: as `host_isa`.
    """
    if isa is not None and isa not in ISAS:
        raise UsageError(f"instruction set {isa!r} is not known; use one of {', '.join(ISAS)}")
    if isa is not None:
        check_isa(isa)
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, "linux")
    return Target(arch=_machine(), system=system, isa=isa or host_isa())


def parse_target(text: str, isa: str | None = None) -> Target:
    """A cross target such as `aarch64-linux-gnu`, `aarch64-macos` or `x86_64-windows-gnu`.

    Raises:
        UsageError: the text is not ARCH-SYSTEM[-ABI], or the instruction set does not exist there.
    """
    if text == "native":
        return host_target(isa)
    parts = text.split("-")
    if len(parts) < 2 or parts[0] not in ("x86_64", "aarch64") or parts[1] not in _SUFFIX:
        raise UsageError(
            f"target {text!r} is not known; use native, x86_64-linux-gnu, aarch64-linux-gnu, "
            "aarch64-macos or x86_64-windows-gnu"
        )
    isa = isa or ("avx2" if parts[0] == "x86_64" else "plain")
    if isa not in ISAS or (parts[0] != "x86_64" and _ISA_FLAGS[isa]):
        raise UsageError(f"instruction set {isa!r} does not exist on {parts[0]}; use plain")
    if parts[1] == "windows" and len(parts) == 2:
        text += "-gnu"
    return Target(arch=parts[0], system=parts[1], isa=isa, triple=text)


def _machine() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _cpu_features() -> set[str]:
    """Feature names as Linux spells them; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()
