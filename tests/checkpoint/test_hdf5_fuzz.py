"""Damaged HDF5 files, by the hundred and through the real child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from make_hdf5 import compressed, ours

from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import CheckpointError

HERE = Path(__file__).parent
SECONDS = 20
MEMORY = 300 << 20  # Python, NumPy and h5py hold 50 MB


def test_no_damage_is_more_than_one_line(tmp_path: Path) -> None:
    files = [
        ours(tmp_path / "ours.h5"),
        compressed(tmp_path / "old.h5"),
        compressed(tmp_path / "new.h5", "latest"),
    ]
    ran = subprocess.run(
        [sys.executable, str(HERE / "fuzz_hdf5.py"), "0", "300", *map(str, files)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert sum(found["outcomes"].values()) == 300
    # Damage of every kind was met: in our checks, in the library's, in numbers alone.
    assert {"refused by us", "refused by the library", "read"} <= found["outcomes"].keys()
    assert found["slowest"] < SECONDS
    assert max(found["bytes"]) < MEMORY


@pytest.mark.parametrize("libver", [None, "latest"])
def test_thousands_of_attributes(libver: str | None, tmp_path: Path) -> None:
    path = tmp_path / "many.h5"
    with h5py.File(path, "w", libver=libver) as file:
        group = file.create_group("g")
        for number in range(3000 if libver else 300):  # older files hold 64 KiB of them
            group.attrs[f"{number}"] = np.int8(1)
    with pytest.raises(CheckpointError, match="'/g' has (300|3000) attributes, allowed 256"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [(1 << 39,), (1 << 20, 1 << 19)])
def test_a_shape_of_terabytes_costs_nothing(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as file:
        step = tuple(min(size, 1 << 10) for size in shape)
        dataset = file.create_dataset("d", shape, "f4", chunks=step, compression="gzip")
        dataset[tuple(slice(0, n) for n in step)] = 1.0
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="has a wrong number of chunks, found 1, allowed"):
        open_checkpoint(path)
