"""`flashlite analyze` on real models: how well it predicts, how long it takes, what it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashlite.analyze.analysis import read_analysis
from flashlite.checkpoint.pull import resolve_model
from flashlite.errors import PullError

pytestmark = [pytest.mark.accept, pytest.mark.timeout(0)]

MINUTES = {"smollm2-135m-instruct": 10, "gemma-3-270m": 15}  # on two cores


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("model", list(MINUTES))
def test_a_real_model(model: str, gradients: bool, tmp_path: Path) -> None:
    try:
        resolve_model(model)
    except PullError:
        pytest.skip(f"{model} is not here: run `flashlite pull {model}`")
    if gradients:
        pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    path = tmp_path / "sensitive_layers.json"
    words = ["analyze", model, "-o", str(path), "--report", str(tmp_path / "a.html"), "--json"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flashlite", *words, *([] if gradients else ["--no-gradients"])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    minutes = (time.monotonic() - began) / 60
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    analysis = read_analysis(path)
    assert analysis.embedding is not None
    print(
        f"\n{model}, gradients {gradients}: Spearman {found['spearman']:.3f} "
        f"{found['spearman_by_format']}, scale {found['scale']:.2f}, additivity "
        f"{found['additivity']}, {minutes:.1f} min on {len(os.sched_getaffinity(0))} cores, peak "
        f"{found['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    for fmt, loss in analysis.embedding.items():
        print(f"  embedding {fmt}: {loss}")
    for head in sorted(analysis.heads, key=lambda head: head.importance)[:5]:
        print(f"  {head}")
    assert found["spearman"] >= 0.8
    assert all(0.7 <= ratio <= 1.5 for ratio in found["additivity"].values())
    assert found["peak_memory_bytes"] <= 4e9
    if len(os.sched_getaffinity(0)) >= 2:
        assert minutes <= MINUTES[model]
