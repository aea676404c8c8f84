"""Real models: presets and budgets with everything stacked, against the source in FP32.

The compiled engine, INT8 activations and KV included, on wikitext-2 valid, which nothing is fitted
to; the analysis is that of `benchmarks/curve.py`, made on first use.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import curve
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights, open_artifact
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.cli import main
from flashlite.codegen.target import host_isa, host_target
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.model.reference import Reference
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact

pytestmark = pytest.mark.accept

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
WINDOWS, SIZE, STRIDE = 4, 512, 4


def compiled(artifact: Artifact, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits of the engine."""
    library = load_library(compile_artifact(artifact, host_target(host_isa())))
    with Engine(library, load_weights(artifact), max_tokens=len(ids), threads=2) as engine:
        sequence = engine.new_sequence(len(ids))
        parts = [
            engine.step([Work(sequence, ids[i : i + MAX_BATCH], "all")]).copy()
            for i in range(0, len(ids), MAX_BATCH)
        ]
    return np.concatenate(parts)


def loss(model: str, artifact: Artifact) -> float:
    """Mean KL from the source."""
    source = describe(open_checkpoint(pull(model, offline=True, accept_license=True).path))
    reference = Reference(source.spec, source.tensor)
    found = []
    for ids in curve.windows(model, source, WINDOWS, SIZE):
        exact = reference.logits(ids, slice(1, None, STRIDE))
        found.append(kl_divergence(exact, compiled(artifact, ids)[1::STRIDE]))
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("preset", "limit"), [("hybrid", 0.006), ("lossless", 0.008)])
def test_presets_keep_their_loss(model: str, preset: str, limit: float) -> None:
    kl = loss(model, find_artifact(model, preset=preset, accept_license=True))
    print(f"\n{model}, {preset}: KL {kl:.5f} nats, everything stacked")
    assert kl <= limit


@pytest.mark.parametrize("model", MODELS)
def test_balanced_is_small_and_keeps_its_loss(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sensitive_layers.json"
    config.write_bytes(curve.analyzed(model).read_bytes())
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert main.main(["quantize", "--config", str(config), "--offline", "--json"]) == 0
    seconds = time.monotonic() - start
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    kl = loss(model, open_artifact(Path(figures["artifact"])))
    print(
        f"\n{model}, balanced: {figures['size_bytes'] / 1e6:.1f} MB, KL {kl:.4f} nats on "
        f"wikitext-2, {figures['measured_kl']:.4f} on held-back text, {seconds:.0f} s"
    )
    assert figures["measured_kl"] <= 0.05


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_met_within_a_percent(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sensitive_layers.json"
    config.write_bytes(curve.analyzed(model).read_bytes())
    target = {"gemma-3-270m": 280, "smollm2-135m-instruct": 90}[model]
    words = ["--target-size", f"{target}MB", "-o", str(tmp_path / "out.fl"), "--offline", "--json"]
    assert main.main(["quantize", "--config", str(config), *words]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    print(f"\n{model}: {figures['size_bytes'] / 1e6:.2f} MB of {target}")
    assert 0.99 <= figures["size_bytes"] / (target * 1e6) <= 1.0
