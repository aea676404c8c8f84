"""`flashlite validate` on a real model, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashlite.runtime.prepare import find_artifact

pytestmark = pytest.mark.accept


def test_smollm2_is_validated_in_time_and_memory(tmp_path: Path, flashlite_data: Path) -> None:
    folder = tmp_path / "model.fl"
    shutil.copytree(find_artifact("smollm2-135m-instruct").path, folder)
    words = [
        sys.executable,
        "-m",
        "flashlite",
        "validate",
        str(folder),
        "--json",
        "--max-kl",
        "0.02",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\nvalidate: {found['seconds']} s, {found['peak_memory_bytes'] / 1e6:.0f} MB, KL "
        f"{found['kl']:.4f}, worst language x {found['language_ratio']:.2f}"
    )
    assert found["absent"] == []
    assert found["kl"] <= 0.008
    assert found["seconds"] <= 8 * 60
    assert found["peak_memory_bytes"] <= 4e9
    assert Path(found["report"]).is_file()
    card = json.loads((folder / "card.json").read_text())
    assert card["measured"]["validation"]["kl"] == found["kl"]
    words[-1] = "0.001"
    again = subprocess.run([*words, "--quick"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "limits not kept: kl" in again.stderr
