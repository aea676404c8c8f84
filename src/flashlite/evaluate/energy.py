"""Joules, where the machine counts them: Linux's powercap (RAPL) counters of whole packages.

Virtual machines mostly have none; then CPU-seconds are what there is.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EnergyMeter", "find_meter"]

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts the energy of all packages of the machine, of whatever runs on it."""

    def __init__(self, zones: list[Path]) -> None:
        """Begin to count; `zones` are folders of powercap."""
        self._zones = [
            (zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in zones
        ]
        self._last = [_number(file) for file, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Joules since it was made. Counters that began anew once since the last call are seen.

        Raises:
            OSError: a counter cannot be read.
        """
        now = [_number(file) for file, _ in self._zones]
        for before, after, (_, most) in zip(self._last, now, self._zones, strict=True):
            self._total += after - before if after >= before else after + most - before
        self._last = now
        return self._total / 1e6


def find_meter(powercap: Path = _POWERCAP) -> EnergyMeter | None:
    """A meter of this machine's packages; None where it has no counter that we may read."""
    zones = sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []
    packages = [zone for zone in zones if zone.name.count(":") == 1]
    try:
        return EnergyMeter(packages) if packages else None
    except (OSError, ValueError):  # only root may read it
        return None


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
