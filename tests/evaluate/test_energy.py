"""Counters of energy, from a folder laid out as powercap's."""

from __future__ import annotations

from pathlib import Path

from flashlite.evaluate.energy import find_meter


def zone(root: Path, name: str, value: int, most: int = 1000_000_000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 5), zone(tmp_path, "intel-rapl:1", 7)
    core = zone(tmp_path, "intel-rapl:0:0", 0)
    meter = find_meter(tmp_path)
    assert meter is not None
    assert meter.joules() == 0
    first.write_text("2000005")
    second.write_text("3000007")
    core.write_text("1000000")
    assert meter.joules() == 5


def test_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", 999_000_000)
    meter = find_meter(tmp_path)
    assert meter is not None
    counter.write_text("1000000")
    assert meter.joules() == 2


def test_without_a_counter_there_is_no_meter(tmp_path: Path) -> None:
    assert find_meter(tmp_path) is None
    assert find_meter(tmp_path / "absent") is None
    (tmp_path / "intel-rapl:0").mkdir()  # one that cannot be read
    assert find_meter(tmp_path) is None
